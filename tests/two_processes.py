"""Fits under torchrun, each of whose processes writes its weights; run by test_distributed.py.

Started without torchrun, it does the same fits in one process.
"""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checks import Killed, killed_after
from sklearn.base import clone
from sklearn.model_selection import cross_val_score

from ehrfuse import FusionClassifier, MMNARFusionClassifier, SequenceClassifier, TabNetClassifier
from ehrfuse.datasets import make_ehr
from ehrfuse.modalities import Tabular, Visits

torch.set_num_threads(1)
RANK, SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
QUIET = {"dropout": 0.0, "column_dropout": 0.0}  # random numbers would differ by process
TABLES = {
    "vitals": Tabular(["age", "heart_rate"], **QUIET),
    "labs": Tabular(["sodium", "lactate"], **QUIET),
}
COMMON = {
    "max_epochs": 3, "random_state": 0, "batch_size": 15, "dropout": 0.0, "d_model": 8,
    "lr": 1e-2, "validation_fraction": 0.2, "patience": 3,
}  # fmt: skip


def cases():
    """By name: without batch statistics or random numbers, so that one process gives the same."""
    yield "fusion", FusionClassifier(TABLES, n_members=2, **COMMON)
    yield "tasks", FusionClassifier(TABLES, n_members=2, fusion="concat", **COMMON)
    plain = {"modality_dropout": 0.0, "reconstruction_weight": 0.0, "contrastive_weight": 0.0}
    yield "mmnar", MMNARFusionClassifier(TABLES, n_members=2, **plain, **COMMON)
    yield "sequence", SequenceClassifier({"visits": Visits("visits", now=0.0)}, **COMMON)


def tasks(y):
    """Two outcomes, of which some are unknown."""
    Y = np.column_stack([y, 1 - y]).astype(float)
    Y[np.random.default_rng(0).random(Y.shape) < 0.4] = np.nan
    return Y


def save(folder, name, model):
    weights = {key: t.numpy() for key, t in model.module_.state_dict().items()}
    np.savez(folder / f"{name}-{SIZE}-{RANK}.npz", **weights)


def several(folder, X, y):
    """What only several processes can show."""
    tabnet = TabNetClassifier(TABLES, n_d=8, n_a=8, max_epochs=2, random_state=0, verbose=True)
    save(folder, "tabnet", tabnet.fit(X, y))
    with pytest.raises(ValueError, match="fit with other data; give all the same rows"):
        clone(tabnet).fit(X.iloc[RANK:], y[RANK:])
    with pytest.raises(ValueError, match="need a random_state"):
        clone(tabnet).set_params(random_state=None).fit(X, y)
    kept = FusionClassifier(TABLES, n_members=2, checkpoint=folder / "kept", **COMMON)
    kept.set_params(dropout=0.3)
    save(folder, "whole", clone(kept).set_params(checkpoint=None).fit(X, y))
    with killed_after(7), pytest.raises(Killed):
        kept.fit(X, y)
    save(folder, "kept", kept.fit(X, y))
    scores = cross_val_score(clone(kept).set_params(checkpoint=None), X, y, cv=2)
    (folder / f"scores-{RANK}").write_text(str(scores.tolist()))


def main(folder):
    X, y = make_ehr(n_samples=80, random_state=0)
    for name, model in cases():
        save(folder, name, model.fit(X, tasks(y) if name == "tasks" else y))
    if SIZE > 1:
        several(folder, X, y)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
