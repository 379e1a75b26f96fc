"""
What is missing, and what it tells
==================================

In a simulated cohort sicker patients are examined more. The example asks how informative the
holes are, and corrects a model that cannot see them by a rectifier. The best possible prediction is
known.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.impute import SimpleImputer
from sklearn.metrics import brier_score_loss
from sklearn.pipeline import make_pipeline

from ehrfuse import Rectifier
from ehrfuse.datasets import make_ehr
from ehrfuse.evaluation import (
    MissingPatternDisplay,
    outcome_by_pattern,
    presence_informativeness,
    score_by_pattern,
)

torch.set_num_threads(1)

# %%
# Labs and the X-ray vector are there or not depending on how ill the patient is.

kinds = ["vitals", "labs", "cxr"]
data = make_ehr(
    4000, strength=3.0, pattern_effect=1.0, modalities=kinds, random_state=0, as_bunch=True
)
modalities = {name: data.modalities[name] for name in kinds}
print(outcome_by_pattern(data.X, data.y, modalities, groups="subject_id").round(3).to_string())
print(
    presence_informativeness(
        data.X, modalities, y=data.y, groups="subject_id", n_resamples=200, random_state=0
    )
    .round(3)
    .to_string()
)

# %%
# Median imputation hides the pattern from the trees. The rectifier sees it: on rows that a model
# has not seen it measures how far every pattern's mean prediction is off, shrinks what is noise,
# and corrects the rest.

numbers = data.X[["subject_id", "age", "heart_rate", "sodium", "lactate", "creatinine", "wbc"]]
labs = {"labs": ["sodium", "lactate", "creatinine", "wbc"]}
trees = HistGradientBoostingClassifier(max_iter=60, max_leaf_nodes=7, random_state=0)
blind = make_pipeline(SimpleImputer(strategy="median"), trees)
rectified = Rectifier(blind, labs, groups="subject_id", random_state=0)

train = data.groups < np.quantile(data.groups, 0.5)  # half of the patients
test = ~train
blind.fit(numbers[train].drop(columns="subject_id"), data.y[train])
rectified.fit(numbers[train], data.y[train])
proba = {
    "blind": blind.predict_proba(numbers[test].drop(columns="subject_id"))[:, 1],
    "rectified": rectified.predict_proba(numbers[test])[:, 1],
    "oracle": data.oracle[test],
}
for name, p in proba.items():
    print(f"{name:10s} Brier {brier_score_loss(data.y[test], p):.4f}")
print(rectified.table_.round(3).to_string())
scores = score_by_pattern(data.y[test], proba["rectified"], numbers[test], labs, n_resamples=200)
print(scores.round(3).to_string())

# %%
# The patterns as a picture.

MissingPatternDisplay.from_frame(data.X, modalities, data.y, groups="subject_id", unit="rows")
plt.savefig("missing_modalities.png", dpi=120, bbox_inches="tight")
