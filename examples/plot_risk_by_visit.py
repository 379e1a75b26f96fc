"""
Risk from a history of visits
=============================

A time-aware transformer is pretrained on prenatal visits without labels, then fine-tuned to predict
hypertension that is diagnosed later. Which visits it looked at, which values moved one prediction,
and what each stage of training did to the patient vectors follow. The women are simulated.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.metrics import roc_auc_score

from ehrfuse import RAPTClassifier, RAPTPretrainer, SequenceClassifier
from ehrfuse.datasets import make_prenatal
from ehrfuse.evaluation import (
    EmbeddingDisplay,
    TimelineDisplay,
    explain_in_words,
    sensitivity,
    silhouette_report,
)

torch.set_num_threads(1)

# %%
# One row per woman: a few static facts, and her visits up to week 28 with holes in them.

data = make_prenatal(900, task="hypertension", random_state=0, as_bunch=True)
train, test = slice(0, 600), slice(600, None)
print(data.X["visits"].iloc[3][:2])

# %%
# The pretrainer is a parameter of the classifier and sees its training rows only.

clf = RAPTClassifier(data.modalities, pretrained=RAPTPretrainer(max_epochs=4), random_state=0)
clf.fit(data.X[train], data.y[train])
retain = SequenceClassifier(data.modalities, architecture="retain", random_state=0)
retain.fit(data.X[train], data.y[train])
for name, model in {"RAPT": clf, "RETAIN": retain}.items():
    risk = model.predict_proba(data.X[test])[:, 1]
    print(f"{name:7s} AUROC {roc_auc_score(data.y[test], risk):.3f}")

# %%
# What training did to the patient vectors.

print(silhouette_report(clf, data.y[test], data.X[test]).round(3).to_string())
EmbeddingDisplay.from_stages(clf, data.y[test], data.X[test])
plt.savefig("stages.png", dpi=120, bbox_inches="tight")

# %%
# One woman with a long history: the attention of RAPT, the exact contributions of RETAIN, and what
# every value did to her risk.

long = data.X[test].iloc[[int(data.X["visits"].iloc[test].list.len().argmax())]]
TimelineDisplay.from_explanation(clf.explain(long), unit="w")
plt.savefig("attention.png", dpi=120, bbox_inches="tight")
TimelineDisplay.from_explanation(retain.explain(long), unit="w")
plt.savefig("contributions.png", dpi=120, bbox_inches="tight")
moved = sensitivity(clf, long)
risk = float(clf.predict_proba(long)[0, 1])
print(explain_in_words(moved, risk, outcome="hypertension", unit="weeks"))
