"""
Pretrain on labs without labels
===============================

Most stays have labs, few have a label. A transformer learns from the labs alone, by guessing values
that are hidden from it. What it learned fills holes, with an error bar for every guess, and is the
lab branch that a classifier starts from.
"""

import time

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.frozen import FrozenEstimator
from sklearn.metrics import roc_auc_score

from ehrfuse import EventSummary, Labs, MaskedLabPretrainer, MEDFuseClassifier
from ehrfuse.datasets import load_physionet2012

torch.set_num_threads(1)  # the networks are small: threads would only wait for each other
started = time.perf_counter()

# %%
# The last value of every variable in the first 48 hours, one column each, null where not measured.

data = load_physionet2012()
panels = [name for name in data.modalities if name != "static"]
summary = EventSummary(statistics=("last",), remainder="drop")
X = summary.fit_transform(data.X[panels]).rename(columns=lambda c: c.split("__")[1])
X = X.loc[:, X.nunique() > 1].astype("float64")
rows = np.random.default_rng(0).permutation(len(X))
train, test = X.iloc[rows[: len(X) // 2]], X.iloc[rows[len(X) // 2 :]]
print(f"{len(train)} stays to learn from, {X.shape[1]} analytes, {X.isna().mean().mean():.0%} null")

# %%
# Three of four values of every stay are hidden in turn; no label is read.

pretrainer = MaskedLabPretrainer({"labs": Labs(list(X))}, max_epochs=8, random_state=0)
pretrainer.fit(train)

# %%
# Hide the metabolic panel of other stays, as if nobody had ordered it, and have it guessed.

panel = ["BUN", "Creatinine", "HCO3", "K", "Na"]
hidden = test.assign(**dict.fromkeys(panel, np.nan))
guess, error = pretrainer.impute(hidden, return_std=True)
for name in panel:
    known = test[name].notna()
    miss = guess.loc[known, name] - test.loc[known, name]
    plain = train[name].mean() - test.loc[known, name]
    inside = (miss.abs() < 2 * error.loc[known, name]).mean()
    print(f"{name}: error {miss.std():.3g}, of the mean {plain.std():.3g}; "
          f"{inside:.0%} within two of its own standard deviations")  # fmt: skip

# %%
# A few labels: the classifier takes the lab branch over, and steps gently from where it is.

few = train.index[:200]
clf = MEDFuseClassifier(
    {"labs": Labs(list(X))}, pretrained=FrozenEstimator(pretrainer), max_epochs=5, random_state=0
)
clf.fit(X.loc[few], data.y.loc[few])
score = roc_auc_score(data.y.loc[test.index], clf.predict_proba(test)[:, 1])
print(f"death in hospital, {len(few)} labels, took over {clf.transferred_}: AUROC {score:.3f}")

# %%
# Guessed against measured urea nitrogen, with the likely error of every tenth guess.

shown = test.index[test["BUN"].notna()][::10]
plt.errorbar(
    test.loc[shown, "BUN"], guess.loc[shown, "BUN"],
    yerr=error["BUN"].set_axis(test.index)[shown], fmt="o", ms=3, alpha=0.6,
)  # fmt: skip
plt.xlabel("measured BUN (mg/dL)")
plt.ylabel("guessed from the other panels")
plt.savefig("pretrain_labs.png", dpi=120, bbox_inches="tight")
print(f"saved pretrain_labs.png, {time.perf_counter() - started:.0f} s in all")
