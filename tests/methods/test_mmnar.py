"""What is true of CRL-MMNAR only: gates, left-out modalities, fading, the rectifier, no leak."""

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.model_selection import cross_val_predict

from ehrfuse import FusionClassifier, MMNARFusionClassifier, MMNARPretrainer, Rectifier, Tabular
from ehrfuse.datasets import make_ehr
from ehrfuse.methods.mmnar import PatternFusion, Reconstruction, hide_some
from ehrfuse.nn.core import Encoded

FAST = {"d_model": 8, "n_members": 2, "max_epochs": 3, "random_state": 0}


@pytest.fixture(scope="module")
def cohort():
    return make_ehr(n_samples=240, random_state=0, as_bunch=True)


@pytest.fixture
def modalities(cohort):
    return {name: cohort.modalities[name] for name in ("vitals", "labs", "cxr")}


def trunk_of(use_pattern=True, n_layers=0, members=2):
    torch.manual_seed(0)
    return PatternFusion(3, 8, members, 2, n_layers, use_pattern, 0.0).eval()


def some_rows(n=8):
    torch.manual_seed(1)
    present = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]] * (n // 4)).bool()
    return torch.randn(n, 3, 8), present


@pytest.mark.parametrize("n_layers", [0, 1])
def test_content_of_what_is_not_shown_cannot_matter(n_layers):
    trunk = trunk_of(n_layers=n_layers)
    pooled, present = some_rows()
    out = trunk(pooled, present, present)
    changed = torch.where(present[..., None], pooled, torch.full_like(pooled, 9.0))
    torch.testing.assert_close(trunk(changed, present, present), out)
    assert out.isfinite().all()  # the second row has no modality at all


def test_gates_start_open_and_read_the_pattern():
    trunk = trunk_of()
    pooled, present = some_rows()
    full = torch.ones_like(present)
    assert not torch.allclose(trunk(pooled, present, present), trunk(pooled, present, full))
    plain = trunk_of(use_pattern=False)
    torch.testing.assert_close(plain(pooled, present, present), plain(pooled, present, full))


def test_hidden_modalities_leave_one_and_hide_only_what_is_there():
    torch.manual_seed(0)
    present = torch.rand(4000, 5) < 0.6
    shown = hide_some(present, 0.5)
    assert not (shown & ~present).any()
    assert (shown.any(1) == present.any(1)).all()
    several = present.sum(1) > 2
    share = shown[several].sum() / present[several].sum()
    assert 0.5 < share < 0.62  # a half, and the one that always stays
    assert torch.equal(hide_some(present, 0.0), present)


def make_reconstruction():
    trunk = trunk_of()
    return trunk, Reconstruction(3, 8, trunk.n_outputs, 2, 0.1)


def encoded_of(pooled, present):
    return Encoded([], [], pooled, present)


def test_reconstruction_never_sees_what_it_guesses():
    """The guess of a left-out modality does not change with that modality."""
    trunk, part = make_reconstruction()
    pooled = torch.randn(4, 3, 8)
    present = torch.tensor([[True, True, False]] * 4)
    guesses = []
    part.guess[0].register_forward_hook(lambda module, inputs, output: guesses.append(output))
    part._choose = lambda present: torch.zeros(len(present), dtype=torch.long)
    part(encoded_of(pooled, present), trunk)
    other = pooled.clone()
    other[:, 0] += 5.0
    part(encoded_of(other, present), trunk)
    torch.testing.assert_close(guesses[0], guesses[1])


def test_reconstruction_target_stands_still():
    trunk, part = make_reconstruction()
    pooled = torch.randn(8, 3, 8, requires_grad=True)
    present = torch.tensor([[True, True, False]] * 8)
    part._choose = lambda present: torch.zeros(len(present), dtype=torch.long)
    square, contrast = part(encoded_of(pooled, present), trunk)
    (square + contrast).backward()
    assert (pooled.grad[:, 0] == 0).all()  # left out: it is the target, and has no gradient
    assert (pooled.grad[:, 1] != 0).any()


def test_rows_with_fewer_than_two_modalities_take_no_part():
    trunk, part = make_reconstruction()
    pooled = torch.randn(8, 3, 8)
    present = torch.tensor([[True, False, False], [False, False, False]] * 4)
    present = present[[0, 0, 1, 1, 0, 0, 1, 1]]  # the two members of a row are alike
    square, contrast = part(encoded_of(pooled, present), trunk)
    assert square.item() == 0
    assert contrast.item() == 0


def test_left_out_modality_is_one_that_was_there():
    _, part = make_reconstruction()
    present = torch.rand(500, 3) < 0.5
    present[:, 1] |= ~present.any(1)
    chosen = part._choose(present)
    assert present[torch.arange(500), chosen].all()
    assert len(chosen.unique()) == 3


def test_auxiliary_terms_fade_and_leave_early_stopping_alone(cohort, modalities):
    clf = MMNARFusionClassifier(
        modalities, **FAST | {"max_epochs": 4}, fade_epochs=2, validation_fraction=0.2
    ).fit(cohort.X, cohort.y)
    first, last = clf.history_[0], clf.history_[-1]
    assert first["train_reconstruction"] > 0
    assert "train_reconstruction" not in last
    assert all(r["val_loss"] == pytest.approx(r["val_outcome"]) for r in clf.history_)


def test_every_part_can_be_switched_off(cohort, modalities):
    off = {"pattern": False, "reconstruction_weight": 0, "contrastive_weight": 0}
    clf = MMNARFusionClassifier(modalities, **FAST, **off, modality_dropout=0.0)
    clf.fit(cohort.X, cohort.y)
    assert set(clf.history_[0]) == {"epoch", "train_loss", "train_outcome"}
    assert "auxiliary" not in clf.module_.heads
    attention = MMNARFusionClassifier(modalities, **FAST, n_layers=1).fit(cohort.X, cohort.y)
    assert len(attention.module_.trunk.blocks) == 1
    with pytest.raises(ValueError, match="both 0: there is nothing to learn from"):
        MMNARPretrainer(modalities, reconstruction_weight=0, contrastive_weight=0).fit(cohort.X)


def test_pretraining_learns_to_guess(cohort, modalities):
    encoder = MMNARPretrainer(modalities, **FAST | {"max_epochs": 25}).fit(cohort.X)
    history = encoder.history_
    assert history[-1]["train_contrastive"] < history[0]["train_contrastive"]


# ---------------------------------------------------------------- rectifier


@pytest.mark.parametrize("rectifier", ["holdout", "crossfit", Rectifier(None, method="holdout")])
def test_rectified_model_is_a_classifier(cohort, modalities, rectifier):
    clf = MMNARFusionClassifier(modalities, **FAST, groups="subject_id", rectifier=rectifier)
    clf = clone(clf).fit(cohort.X, cohort.y)
    p = clf.predict_proba(cohort.X.drop(columns="subject_id"))
    assert np.isfinite(p).all()
    np.testing.assert_allclose(p.sum(1), 1)
    assert set(clf.rectifier_.table_) >= {"pattern", "n", "tau_raw", "se", "tau", "source"}
    assert len(clf.rectifier_.estimators_) == (5 if rectifier == "crossfit" else 1)


def test_rectifier_rows_are_not_those_of_the_network(cohort, modalities):
    """Leak 1 of the release: the correction was fitted on rows that the network or score saw."""
    seen = []

    class Spy(Tabular):
        def _learn(self, cells):
            seen.append(set(cells.index))
            super()._learn(cells)

    X = cohort.X.reset_index(drop=True)
    spied = modalities | {"vitals": Spy(["age", "heart_rate", "sex"])}
    clf = MMNARFusionClassifier(spied, **FAST, groups="subject_id", rectifier="holdout")
    clf.fit(X, cohort.y)
    held_out = X.drop(index=list(seen[0]))
    assert 0.1 < len(held_out) / len(X) < 0.3
    assert not set(held_out["subject_id"]) & set(X.loc[list(seen[0]), "subject_id"])
    assert clf.rectifier_.table_["n"].sum() == len(held_out)


def test_labels_of_test_rows_move_nothing(cohort, modalities):
    """Leak 2: single predictions were pushed toward test labels."""
    clf = MMNARFusionClassifier(modalities, **FAST, rectifier="holdout")
    train = np.arange(240) < 180
    a = clone(clf).fit(cohort.X[train], cohort.y[train]).predict_proba(cohort.X[~train])
    y = cohort.y.copy()
    y[~train] = 1 - y[~train]
    b = clone(clf).fit(cohort.X[train], y[train]).predict_proba(cohort.X[~train])
    np.testing.assert_array_equal(a, b)


def test_other_test_rows_move_nothing(cohort, modalities):
    """Leak 3: the test set weighted the correction, so a row's risk hung on its neighbours."""
    clf = MMNARFusionClassifier(modalities, **FAST, rectifier="holdout")
    clf.fit(cohort.X[:180], cohort.y[:180])
    whole = clf.predict_proba(cohort.X[180:])
    np.testing.assert_allclose(clf.predict_proba(cohort.X[180:200]), whole[:20], atol=1e-9)
    changed = cohort.X[180:].copy()
    changed.iloc[20:] = cohort.X.iloc[:40].to_numpy()
    np.testing.assert_allclose(clf.predict_proba(changed)[:20], whole[:20], atol=1e-9)


def test_a_second_fit_forgets_the_first(cohort, modalities):
    clf = MMNARFusionClassifier(modalities, **FAST, rectifier="holdout").fit(cohort.X, cohort.y)
    clf.set_params(rectifier=None).fit(cohort.X, cohort.y)
    fresh = MMNARFusionClassifier(modalities, **FAST).fit(cohort.X, cohort.y)
    np.testing.assert_array_equal(clf.predict_proba(cohort.X), fresh.predict_proba(cohort.X))
    clf.set_params(rectifier="holdout").fit(cohort.X, cohort.y)
    assert not hasattr(clf, "module_")


def test_validation_rows_cannot_meet_a_rectifier(cohort, modalities):
    clf = MMNARFusionClassifier(modalities, **FAST, rectifier="holdout")
    with pytest.raises(ValueError, match="X_val cannot be combined with a rectifier"):
        clf.fit(cohort.X, cohort.y, X_val=cohort.X, y_val=cohort.y)


def test_wrong_rectifier_is_explained(cohort, modalities):
    clf = MMNARFusionClassifier(modalities, **FAST, rectifier="always")
    with pytest.raises(ValueError, match="always"):
        clf.fit(cohort.X, cohort.y)


def test_pattern_helps_under_strong_mnar_and_not_without():
    """At strength 4 what is missing says much; blind late fusion cannot use it."""
    only = ["vitals", "labs", "film", "note", "cxr"]
    gain = {}
    for strength in (0.0, 4.0):
        data = make_ehr(2400, strength=strength, modalities=only, random_state=1, as_bunch=True)
        modalities = {name: data.modalities[name] for name in ("vitals", "cxr", "labs")}
        folds = {"cv": 3, "method": "predict_proba"}
        for kind in (MMNARFusionClassifier, FusionClassifier):
            clf = kind(modalities, n_members=4, random_state=0)
            p = cross_val_predict(clf, data.X, data.y, **folds)[:, 1]
            loss = -np.mean(np.log(np.where(data.y == 1, p, 1 - p)))
            gain[strength, kind.__name__] = loss
    with_pattern, without = (
        gain[4.0, name] for name in ("MMNARFusionClassifier", "FusionClassifier")
    )
    assert with_pattern < without + 0.002
    assert abs(gain[0.0, "MMNARFusionClassifier"] - gain[0.0, "FusionClassifier"]) < 0.02
