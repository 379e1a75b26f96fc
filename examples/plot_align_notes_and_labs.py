"""
Learn from notes, predict without them
======================================

`ClipEHRAligner` draws the structured record and the note of a stay together. What the record has
learned from the notes stays in its encoder, so that a classifier with few labels starts from it,
and nobody needs a note at the bedside.
"""

# %%
# A simulation in which it can help: records and notes both show a hidden state, the record dimly,
# and the outcome depends on that state. All stays have both, only 40 have a known outcome.
import numpy as np
import pandas as pd
from sklearn.frozen import FrozenEstimator
from sklearn.metrics import roc_auc_score

from ehrfuse import ClipEHRAligner, Labs, TabNetClassifier, TabNetPretrainer, Text
from ehrfuse.evaluation import AttentionChangeDisplay

rng = np.random.default_rng(1)
n = 1000
state = rng.normal(size=(n, 3))
labs = 0.6 * state @ rng.normal(size=(3, 6)) + rng.normal(size=(n, 6))
X = pd.DataFrame(labs, columns=["sodium", "lactate", "creatinine", "bun", "wbc", "platelets"])
said = [["fever", "chills", "cough"], ["chest", "pain", "pressure"], ["rash", "itch", "hives"]]
X["note"] = [
    " ".join(word for j, words in enumerate(said) if row[j] > 0 for word in rng.permutation(words))
    for row in state
]
y = (rng.random(n) < 1 / (1 + np.exp(-3 * state[:, 0]))).astype(int)
train, test, few = X.iloc[:600], X.iloc[600:], np.arange(40)

# %%
# The ways of the paper's ablation are the values of one parameter. In a grid search one would write
# ``pretrained=ClipEHRAligner()`` and let it inherit tables and notes; here each is fitted once.
tables = {"labs": Labs(list(X.columns[:6]))}
both = {**tables, "note": Text("note")}
size = {"n_d": 16, "n_a": 8, "random_state": 0}
starts = {
    "scratch": None,
    "masked": TabNetPretrainer(tables, max_epochs=8, **size).fit(train),
    "aligned": ClipEHRAligner(both, max_epochs=15, **size).fit(train),
}
for name, start in starts.items():
    start_from = {} if start is None else {"pretrained": FrozenEstimator(start)}
    freeze = () if start is None else ("encoders",)
    clf = TabNetClassifier(tables, freeze=freeze, **start_from, **size)
    clf.fit(train.iloc[few], y[few])
    proba = clf.predict_proba(test.drop(columns="note"))[:, 1]
    print(
        f"{name:8} AUROC {roc_auc_score(y[600:], proba):.3f} from {len(few)} labels, no note read"
    )

# %%
# Both sides lie in one space: records find their notes, and a sentence finds its patients.
aligner = starts["aligned"]
print(aligner.retrieval_scores(test).round(3))
proba = aligner.zero_shot_proba(test, {"infection": "fever chills cough", "allergy": "rash hives"})
print("closer to infection than to allergy:", (proba[:, 0] > 0.5).mean().round(2))

# %%
# A draft for a stay without a note: the nearest notes of the training stays.
print(aligner.retrieve(test.head(1), memory=train, k=3)[["similarity", "note"]].round(2))

# %%
# Which columns gained attention by the notes.
AttentionChangeDisplay.from_estimators(starts["masked"], aligner, labels=("masked", "aligned"))
