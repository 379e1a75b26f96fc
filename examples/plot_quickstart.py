"""
Fuse what was measured, read what was not
=========================================

Real intensive-care stays, each with a different set of panels that somebody ordered or did not.
Gradient boosting on summary features, plain late fusion and fusion that reads the missing pattern
are cross-validated on the same folds, and the picture shows which patterns there are.
"""

import time
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline

from ehrfuse import EventSummary, FusionClassifier, MMNARFusionClassifier
from ehrfuse.datasets import load_physionet2012
from ehrfuse.evaluation import MissingPatternDisplay, bootstrap_scores

torch.set_num_threads(1)  # the networks are small: threads would only wait for each other
# Rare combinations of twelve panels are new to some fold; the rectifier says so, once a fold.
warnings.filterwarnings("ignore", message="Patterns not seen in fit")
started = time.perf_counter()

# %%
# 2,000 stays: static facts, and one column of events per panel, null where nothing was measured.

data = load_physionet2012()
X, y = data.X, data.y
print(f"{len(X)} stays, {y.mean():.1%} died in hospital, {len(data.modalities)} modalities")

# %%
# Three models on the same rows. The trees read the summary statistics that the networks read too.

trees = HistGradientBoostingClassifier(
    learning_rate=0.03, max_iter=300, max_leaf_nodes=15, min_samples_leaf=30,
    l2_regularization=1.0, max_features=0.3, random_state=0,
)  # fmt: skip
models = {
    "HistGradientBoosting": make_pipeline(EventSummary(), trees),
    "FusionClassifier": FusionClassifier(data.modalities, random_state=0),
    "MMNARFusionClassifier": MMNARFusionClassifier(
        data.modalities, rectifier="holdout", random_state=0
    ),
}
folds = StratifiedKFold(5, shuffle=True, random_state=0)
proba = {
    name: cross_val_predict(model, X, y, cv=folds, method="predict_proba")[:, 1]
    for name, model in models.items()
}
proba["MMNAR + trees (mean)"] = np.mean(
    [proba["HistGradientBoosting"], proba["MMNARFusionClassifier"]], axis=0
)

# %%
# Out-of-fold scores with 95 % intervals from resampled patients.

scores = {
    name: bootstrap_scores(y, p, n_resamples=500, random_state=0) for name, p in proba.items()
}
table = pd.DataFrame(
    {
        name: {
            metric: f"{row.estimate:.3f} ({row.lo:.3f}-{row.hi:.3f})"
            for metric, row in score.iterrows()
        }
        for name, score in scores.items()
    }
).T
print(table.to_string())

# %%
# Which panels come together, and how often each combination ends in death.

MissingPatternDisplay.from_frame(X, data.modalities, y)
plt.savefig("quickstart_patterns.png", dpi=120, bbox_inches="tight")
print(f"saved quickstart_patterns.png, {time.perf_counter() - started:.0f} s in all")
