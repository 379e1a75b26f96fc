"""
Tune everything at once, and ask whether the film helps
=======================================================

Parameters of a modality have its name in front, as steps of a Pipeline do; ``"drop"`` leaves a
modality out. So one grid search tunes the note's length, the learning rate and the choice of data.
"""

import pandas as pd
import torch
from sklearn.model_selection import GridSearchCV, GroupKFold

from ehrfuse import Embedding, FusionClassifier, Labs, Tabular, Text
from ehrfuse.datasets import make_ehr

torch.set_num_threads(1)
X, y = make_ehr(n_samples=600, random_state=0)
clf = FusionClassifier(
    {
        "vitals": Tabular(["age", "heart_rate", "sex"]),
        "labs": Labs(["sodium", "lactate", "creatinine", "wbc"]),
        "note": Text("note"),
        "cxr": Embedding("cxr"),
    },
    n_members=2,
    groups="subject_id",
    random_state=0,
)
grid = {"lr": [2e-3, 1e-2], "note__max_length": [16, 256], "cxr": ["drop", Embedding("cxr")]}
search = GridSearchCV(clf, grid, cv=GroupKFold(3), scoring="roc_auc")
search.fit(X, y, groups=X["subject_id"])
results = pd.DataFrame(search.cv_results_)
print(results[["param_lr", "param_note__max_length", "param_cxr", "mean_test_score"]].round(3))
