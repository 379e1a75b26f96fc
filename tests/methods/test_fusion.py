"""Late fusion: what the mean knows and what it does not."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from ehrfuse import FusionClassifier
from ehrfuse.datasets import make_ehr
from ehrfuse.methods.fusion import FusionTrunk


def test_mean_is_blind_to_what_absent_rows_hold_and_to_order():
    torch.manual_seed(0)
    trunk = FusionTrunk(3, 4, 2, "mean").eval()
    pooled, present = torch.randn(6, 3, 4), torch.tensor([[1, 0, 1]] * 6, dtype=torch.bool)
    out = trunk(pooled, present)
    pooled[:, 1] = 7.0
    torch.testing.assert_close(trunk(pooled, present), out)


def test_concat_tells_absent_from_zero():
    torch.manual_seed(0)
    trunk = FusionTrunk(2, 4, 1, "concat")
    torch.nn.init.normal_(trunk.absence.vector)
    zeros = torch.zeros(1, 2, 4)
    there, gone = torch.tensor([[True, True]]), torch.tensor([[True, False]])
    assert not torch.allclose(trunk(zeros, there), trunk(zeros, gone))


@pytest.mark.parametrize("fusion", ["mean", "concat"])
def test_more_modalities_help_and_random_labels_do_not(fusion):
    data = make_ehr(n_samples=900, random_state=0, as_bunch=True)
    vitals = {"vitals": data.modalities["vitals"]}
    few = vitals | {"labs": data.modalities["labs"], "cxr": data.modalities["cxr"]}
    train, test = np.arange(600), np.arange(600, 900)

    def score(modalities, y):
        clf = FusionClassifier(modalities, fusion=fusion, n_members=4, random_state=0)
        p = clf.fit(data.X.iloc[train], y[train]).predict_proba(data.X.iloc[test])
        return roc_auc_score(y[test], p[:, 1])

    alone, fused = score(vitals, data.y), score(few, data.y)
    assert fused > alone + 0.03
    assert fused > roc_auc_score(data.y[test], data.oracle[test]) - 0.08
    random = np.random.default_rng(0).permutation(data.y)
    assert abs(score(few, random) - 0.5) < 0.12
