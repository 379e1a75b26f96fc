"""The sequence baselines as estimators: exact contributions, attention, what fit measures."""

import numpy as np
import pytest
from sklearn.base import clone

from ehrfuse import SequenceClassifier, SequenceRegressor
from ehrfuse.datasets import make_ehr, make_prenatal
from ehrfuse.methods.sequence import ARCHITECTURES, WITHOUT_ATTENTION

FAST = {"d_model": 8, "max_epochs": 2, "random_state": 0}


@pytest.fixture(scope="module")
def cohort():
    kinds = ["vitals", "course", "history"]
    return make_ehr(n_samples=72, modalities=kinds, random_state=0, as_bunch=True)


@pytest.fixture(scope="module")
def women():
    return make_prenatal(72, random_state=0, as_bunch=True)


def logit(p):
    return np.log(p / (1 - p))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture(architecture, cohort):
    """Codes, numbers, events and static columns together; order and company do not matter."""
    clf = SequenceClassifier(cohort.modalities, architecture=architecture, **FAST)
    p = clf.fit(cohort.X, cohort.y).predict_proba(cohort.X)
    assert np.isfinite(p).all()
    np.testing.assert_allclose(clf.predict_proba(cohort.X.iloc[[5]]), p[[5]], atol=1e-9)
    turned = cohort.X.assign(
        visits=[None if v is None or v is np.nan or not isinstance(v, list) else v[::-1]
                for v in cohort.X["visits"]]
    )  # fmt: skip
    np.testing.assert_allclose(clf.predict_proba(turned), p, atol=1e-9)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_learns(architecture, women):
    """Sixteen women are learned by heart."""
    clf = SequenceClassifier(
        women.modalities, architecture=architecture, d_model=16, dropout=0.0, max_epochs=80,
        batch_size=16, lr=1e-2, weight_decay=0.0, random_state=0,
    ).set_params(static="drop")  # fmt: skip
    X, y = women.X[women.X["visits"].list.len() > 1].head(16), np.arange(16) % 2
    clf.fit(X, y)
    assert clf.history_[-1]["train_loss"] < 0.1 * clf.history_[0]["train_loss"]


def test_contributions_of_retain_add_up_to_the_logit(cohort):
    clf = SequenceClassifier(cohort.modalities, architecture="retain", **FAST)
    clf.fit(cohort.X, cohort.y)
    frame = clf.explain(cohort.X)
    total = frame.groupby("row")["weight"].sum().to_numpy()
    np.testing.assert_allclose(total, logit(clf.predict_proba(cohort.X)[:, 1]), atol=1e-8)
    features = set(frame["feature"])
    assert {"(rest)", "(visit)"} < features
    assert {"HR"} & features or "heart_rate" not in features
    assert set(frame["modality"]) == {"", "course", "history"}
    assert any(":" in feature for feature in features)  # codes of the history


def test_contributions_by_class():
    X, _ = make_prenatal(72, random_state=0)
    from ehrfuse import Visits

    y = np.arange(72) % 3
    clf = SequenceClassifier(
        {"v": Visits("visits", time_unit="w", now=42)}, architecture="retain", **FAST
    )
    logits = clf.fit(X, y).predict_proba(X)
    totals = [clf.explain(X, output=k).groupby("row")["weight"].sum().to_numpy() for k in range(3)]
    p = np.exp(np.stack(totals, 1))
    np.testing.assert_allclose(p / p.sum(1, keepdims=True), logits, atol=1e-8)
    with pytest.raises(ValueError, match="output"):
        clf.explain(X, output=3)


@pytest.mark.parametrize("architecture", ["dipole", "hitanet", "transformer"])
def test_attention_over_visits(architecture, women):
    clf = SequenceClassifier(women.modalities, architecture=architecture, **FAST)
    clf.fit(women.X, women.y)
    frame = clf.explain(women.X)
    some = women.X["visits"].list.len().to_numpy()
    assert len(frame) == some.sum()
    total = frame.groupby("row")["weight"].sum()
    assert (total <= 1 + 1e-9).all()
    if architecture != "transformer":
        enough = total.index[some[total.index] > 1]
        np.testing.assert_allclose(total[enough], 1, atol=1e-9)
    first = frame[frame["row"] == frame["row"].iloc[0]]
    weeks = sorted(visit["time"] for visit in women.X["visits"].iloc[first["row"].iloc[0]])
    np.testing.assert_allclose(first["time"], weeks, atol=1e-3)


@pytest.mark.parametrize("architecture", WITHOUT_ATTENTION)
def test_no_attention_says_what_to_use(architecture, women):
    clf = SequenceClassifier(women.modalities, architecture=architecture, **FAST)
    clf.fit(women.X, women.y)
    with pytest.raises(ValueError, match="sensitivity"):
        clf.explain(women.X)


def test_grud_fades_to_the_training_mean(women):
    clf = SequenceClassifier(women.modalities, architecture="grud", **FAST).fit(women.X, women.y)
    mean = clf.module_.trunk.mean
    assert (mean != 0).any()
    other = clone(clf).fit(women.X.head(36), women.y.head(36)).module_.trunk.mean
    assert not np.allclose(mean, other)


def test_hitanet_knows_the_longest_history(women):
    clf = SequenceClassifier(women.modalities, architecture="hitanet", **FAST)
    clf.fit(women.X, women.y)
    spans = [max(t) - min(t) for v in women.X["visits"] if (t := [visit["time"] for visit in v])]
    assert float(clf.module_.trunk.span) == pytest.approx(max(spans), rel=1e-4)


def test_regressor():
    women = make_prenatal(72, task="outcome", random_state=0, as_bunch=True)
    reg = SequenceRegressor(women.modalities, architecture="retain", **FAST)
    reg.fit(women.X, women.y)
    assert reg.predict(women.X).shape == (len(women.X), 4)
    assert {"row", "weight"} <= set(reg.explain(women.X.head(3), output=2))


def test_bad_options(women):
    with pytest.raises(ValueError, match="architecture='cnn' is not known"):
        SequenceClassifier(women.modalities, architecture="cnn").fit(women.X, women.y)
    with pytest.raises(ValueError, match="multiple of n_heads"):
        SequenceClassifier(women.modalities, architecture="hitanet", d_model=10).fit(
            women.X, women.y
        )
