"""
From raw tables to a model
==========================

The example writes a small hospital in MIMIC-IV's layout, states a task of its own, and lets the
loader build the cohort: who is in it, what was known at the prediction, and which modalities there
are. With a folder of the real MIMIC-IV only the path changes.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from sklearn.model_selection import GroupKFold, cross_val_score

from ehrfuse import FusionClassifier
from ehrfuse.datasets import Task, load_mimic4

torch.set_num_threads(1)
rng = np.random.default_rng(0)

# %%
# A hospital of 400 patients: sicker ones have a higher creatinine, and stay longer.

n = 400
admitted = pd.Timestamp("2150-01-01") + pd.to_timedelta(rng.integers(0, 10**6, n), unit="min")
ill = rng.normal(size=n)
stay = 30 + 90 * np.exp(0.6 * ill + 0.3 * rng.normal(size=n))
patients = pd.DataFrame(
    {
        "subject_id": np.arange(n),
        "gender": rng.choice(["F", "M"], n),
        "anchor_age": rng.integers(16, 90, n),
        "anchor_year": 2150,
    }
)
admissions = pd.DataFrame(
    {
        "subject_id": np.arange(n),
        "hadm_id": 1000 + np.arange(n),
        "admittime": admitted,
        "dischtime": admitted + pd.to_timedelta(stay, unit="h"),
        "admission_type": rng.choice(["EW EMER.", "ELECTIVE"], n),
        "hospital_expire_flag": 0,
    }
)
who = rng.integers(0, n, 6000)
taken = admitted[who] + pd.to_timedelta(rng.random(6000) * stay[who], unit="h")
labs = pd.DataFrame(
    {
        "subject_id": who,
        "itemid": 50912,  # creatinine
        "charttime": taken,
        "storetime": taken + pd.Timedelta(hours=1),
        "valuenum": np.exp(0.5 * ill[who] + 0.3 * rng.normal(size=6000)).round(2),
        "valueuom": "mg/dL",
    }
)
folder = Path("hospital")
folder.mkdir(exist_ok=True)
tables = {"patients": patients, "admissions": admissions, "labevents": labs}
for name, table in tables.items():
    table.to_csv(folder / f"{name}.csv", index=False)

# %%
# The task: will an admission last longer than a week, asked at 24 hours?

task = Task(
    name="over_a_week",
    unit="admission",
    hours=24,
    label=lambda stays: (stays["hospital_out"] > 7 * 24).astype(float),
    rules=(
        ("adult", lambda stays: stays["age"] >= 18),
        ("in hospital at 24 hours", lambda stays: stays["hospital_out"] > 24),
    ),
)
data = load_mimic4(folder, task)
print(data.flow.to_string(index=False))
print(list(data.modalities))
print(data.X["chemistry"].iloc[0])  # hours before the prediction, stored by then

# %%
# Patients stay together; the modalities go into any estimator as they are.

model = FusionClassifier(data.modalities, max_epochs=5, random_state=0)
folds = GroupKFold(3)
scores = cross_val_score(model, data.X, data.y, groups=data.groups, cv=folds, scoring="roc_auc")
print("AUROC", scores.round(3))

# %%
# The flow of the cohort as a picture.

fig, ax = plt.subplots(figsize=(6, 2.2))
ax.barh(data.flow["step"][::-1], data.flow["rows"][::-1], color="0.6")
ax.set_xlabel("admissions")
fig.savefig("cohort_flow.png", dpi=120, bbox_inches="tight")
