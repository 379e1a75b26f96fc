"""
What a knowledge graph knows of a patient
=========================================

Notes name drugs; a graph knows which of them interact. The example links notes to the graph,
retrieves facts, and measures what they add to a risk model, against knowledge drawn at random,
links that are shuffled, and none. Here an interaction raises the risk, so that true knowledge must
help and the others must not.
"""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from sklearn.metrics import roc_auc_score

from ehrfuse import KnowledgeAugmentedRiskModel, KnowledgeGraph, KnowledgeRetriever, Tabular, Text
from ehrfuse.knowledge import NoteLinker

torch.set_num_threads(1)

# %%
# A graph of made-up drugs: any two interact or do not. It is a directed multigraph of facts with
# their sources; a denial stays a denial.

rng = np.random.default_rng(0)
drugs = [f"{a}{b}" for a in ("ava", "beni", "cori", "dola", "fexi") for b in ("cillin", "statin",
         "pril", "olol", "azole", "mab")]  # fmt: skip
pairs = [(a, b) for i, a in enumerate(drugs) for b in drugs[:i] if rng.random() < 0.25]
table = pd.DataFrame(pairs, columns=["head", "tail"]).assign(relation="interacts_with")
table["evidence"] = [f"PMID {1000 + i}" for i in range(len(table))]
denials = pd.DataFrame({"head": ["avapril"], "relation": ["not_indicated_for"], "tail": ["gout"]})
graph = KnowledgeGraph.from_triples(pd.concat([table, denials]))
print(graph, graph.sentences()[:2], sep="\n")

# %%
# Mentions in a note: the longest name at word boundaries, and whether it is denied.

for mention in NoteLinker(graph).link("On avapril and benicillin. Denies coristatin. Gout."):
    print(f"{mention.text:12s} {'denied' if mention.negated else 'affirmed'}")

# %%
# A cohort: every note names two drugs. Both kinds of pairs hold the same drugs as often, so no
# single word tells anything; whether the two interact does.

n = 1500
pick = table.iloc[rng.integers(len(table), size=n)]
first, second = pick["head"].to_numpy(), pick["tail"].to_numpy(copy=True)
apart = np.flatnonzero(rng.random(n) < 0.5)
second[apart] = second[rng.permutation(apart)]
known = {frozenset(pair) for pair in pairs}
joined = np.array([frozenset(pair) in known for pair in zip(first, second, strict=True)])
X = pd.DataFrame({
    "age": rng.normal(65, 10, n),
    "note": [f"Takes {a}. Started {b} today." for a, b in zip(first, second, strict=True)],
})  # fmt: skip
y = (rng.random(n) < np.where(joined, 0.6, 0.15)).astype(int)
train, test = slice(0, 1000), slice(1000, None)

# %%
# The retriever is a transformer: it adds a text column and numbers, for any pipeline.

found = KnowledgeRetriever(graph, budget=24).fit(X[train]).transform(X[test])
print(found[["note", "knowledge"]].iloc[0].tolist())

# %%
# Two stages, cross-fitted: notes with knowledge first, then everything together. The controls say
# what the knowledge is worth.

modalities = {"table": Tabular(["age"]), "note": Text("note")}
controls = {
    "true": KnowledgeRetriever(graph),
    "random": KnowledgeRetriever(graph, control="random"),
    "shuffled": KnowledgeRetriever(graph, control="shuffled"),
    "none": None,
}
scores, fitted = {}, {}
for name, knowledge in controls.items():
    model = KnowledgeAugmentedRiskModel(
        modalities, knowledge=knowledge, stage2="lr", random_state=0
    )
    fitted[name] = model.fit(X[train], y[train])
    scores[name] = roc_auc_score(y[test], model.predict_proba(X[test])[:, 1])
    print(f"{name:10s} AUROC {scores[name]:.3f}")

# %%
# Every prediction can be told: findings, facts with their source, the share of each feature group.

explained = fitted["true"].explain(X[test].head(2))
print(explained[0].shares.round(2).to_string())
print(explained[0].knowledge[["text", "evidence"]].head(2).to_string(index=False))
page = explained.to_html()

# %%
# As a picture.

plt.figure(figsize=(5, 3))
plt.bar(list(scores), list(scores.values()), color=["C0", "C7", "C7", "C7"])
plt.axhline(0.5, color="k", lw=0.8, ls=":")
plt.ylim(0.4, 0.9)
plt.ylabel("AUROC")
plt.xlabel("knowledge")
plt.savefig("retrieve_knowledge.png", dpi=120, bbox_inches="tight")
