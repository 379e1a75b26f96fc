"""
Which of these models, and what for
===================================

Three models on the same folds: the table of a paper, what the difference is worth, whether one
would decide better by them, what each modality adds, and how sure one may be of the next patient.
The patients are simulated.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.pipeline import make_pipeline

from ehrfuse import EventSummary, FusionClassifier
from ehrfuse.datasets import make_ehr
from ehrfuse.evaluation import (
    ComparisonDisplay,
    ConformalByPattern,
    ContributionDisplay,
    DecisionCurveDisplay,
    PatternCalibrationDisplay,
    compare,
)

torch.set_num_threads(1)

# %%
# The patient's number is a column of X; `compare` keeps patients whole and hides the column from
# models that would take it for a feature.

data = make_ehr(800, modalities=["vitals", "labs", "course"], random_state=0, as_bunch=True)
trees = HistGradientBoostingClassifier(max_iter=30, max_leaf_nodes=7, learning_rate=0.05)
models = {
    "rate alone": DummyClassifier(),
    "boosting": make_pipeline(EventSummary(), trees),
    "FusionClassifier": FusionClassifier(data.modalities, groups="subject_id", max_epochs=5),
}
found = compare(
    models, data.X, data.y, groups="subject_id", cv=3, reference="boosting", n_resamples=500
)
print(found.to_markdown())

# %%
# Differences from the reference, on the same resampled patients.

ComparisonDisplay.from_comparison(found)
plt.savefig("compare_differences.png", dpi=120)

# %%
# A risk is there to decide by: net benefit at every threshold.

risks = {name: found.predictions[name] for name in ("boosting", "FusionClassifier")}
DecisionCurveDisplay.from_predictions(data.y, risks, groups=data.groups, n_resamples=200)
plt.savefig("compare_decisions.png", dpi=120)

# %%
# Whether the risks are true, within each missing pattern.

PatternCalibrationDisplay.from_predictions(
    data.y, risks["FusionClassifier"], data.X, data.modalities, groups="subject_id"
)
plt.savefig("compare_calibration.png", dpi=120)

# %%
# What each modality adds for patients that the model has not seen.

share = np.searchsorted(np.quantile(data.groups, [0.5, 0.75]), data.groups, side="right")
fit, calibrate, new = (share == part for part in range(3))
clf = models["FusionClassifier"].set_params(random_state=0).fit(data.X[fit], data.y[fit])
ContributionDisplay.from_estimator(
    clf, data.X[new], data.y[new], method="shapley", groups="subject_id", random_state=0
)
plt.savefig("compare_contribution.png", dpi=120)

# %%
# Sets of outcomes that hold the truth in nine of ten patients of every pattern (needs MAPIE).

try:
    conformal = ConformalByPattern(clf, confidence_level=0.9, min_count=40)
    conformal.conformalize(data.X[calibrate], data.y[calibrate])
    print(conformal.coverage(data.X[new], data.y[new]).round(2).to_string(index=False))
except ImportError as error:
    print(error)
