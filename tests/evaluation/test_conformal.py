"""Coverage holds within each pattern on simulated data, and what is pooled is said."""

import numpy as np
import pandas as pd
import pytest
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression

from ehrfuse import FusionClassifier
from ehrfuse.datasets import make_ehr
from ehrfuse.evaluation import ConformalByPattern

pytest.importorskip("mapie")
MODALITIES = {"gas": "ph", "static": "age"}


class Fixed(ClassifierMixin, BaseEstimator):
    """A model that is right where the gas is known and overconfident where it is not."""

    def __init__(self, classes=("died", "lived")):
        self.classes = classes
        self.classes_ = np.array(classes)

    def fit(self, X, y):
        return self

    def predict_proba(self, X):
        known = X["ph"].notna().to_numpy()
        score = np.where(known, X["ph"].fillna(0), 3 * X["age"].fillna(0))
        p = 1 / (1 + np.exp(-score))
        return np.column_stack([p, 1 - p])

    def __sklearn_is_fitted__(self):
        return True


def draw(n, seed, rare=0.0):
    """Where the gas is missing, the outcome has nothing to do with the age."""
    rng = np.random.default_rng(seed)
    X = pd.DataFrame({"ph": rng.normal(0, 2, n), "age": rng.normal(0, 1, n)})
    absent = rng.random(n) < 0.3
    risk = np.where(absent, 0.5, 1 / (1 + np.exp(-X["ph"])))
    X["ph"] = X["ph"].mask(absent)
    X["age"] = X["age"].mask(~absent & (rng.random(n) < rare))
    return X, np.where(rng.random(n) < risk, "died", "lived")


@pytest.mark.parametrize("level", [0.8, 0.9])
def test_coverage_of_every_pattern_over_many_calibrations(level):
    """Mean coverage is the promise; calibrated over all rows it is not."""
    X_new, y_new = draw(4000, 10_000)
    found, together = [], []
    for seed in range(30):
        X, y = draw(400, seed)
        for kept, modalities in ((found, MODALITIES), (together, {"static": "age"})):
            conformal = ConformalByPattern(Fixed(), modalities, confidence_level=level)
            sets = conformal.conformalize(X, y).predict_set(X_new)
            hit = (sets & (y_new[:, None] == conformal.classes_)).any(axis=1)
            kept.append([hit[X_new["ph"].notna()].mean(), hit[X_new["ph"].isna()].mean()])
    for coverage in np.mean(found, axis=0):
        assert level - 0.01 <= coverage <= level + 0.03
    assert np.mean(together, axis=0)[1] < level - 0.05
    assert np.mean(together, axis=0)[0] > level + 0.005


def test_coverage_table_counts():
    X, y = draw(600, 0)
    conformal = ConformalByPattern(Fixed(), MODALITIES).conformalize(X, y)
    X_new, y_new = draw(500, 1)
    table = conformal.coverage(X_new, y_new)
    sets = conformal.predict_set(X_new)
    hit = sets[np.arange(500), (y_new == "lived").astype(int)]
    assert table["pattern"].tolist() == ["gas+static", "static", "(all)"]
    assert table["n"].tolist() == [X_new["ph"].notna().sum(), X_new["ph"].isna().sum(), 500]
    last = table.iloc[-1]
    assert last["coverage"] == pytest.approx(hit.mean())
    assert last["size"] == pytest.approx(sets.sum(axis=1).mean())
    assert last["coverage_died"] == pytest.approx(hit[y_new == "died"].mean())
    assert last["lo"] < last["coverage"] < last["hi"]
    by_patient = conformal.coverage(X_new, y_new, groups=np.arange(500) // 10).iloc[-1]
    assert by_patient["coverage"] == last["coverage"]


def test_rare_and_unseen_patterns_are_pooled():
    X, y = draw(800, 0, rare=0.12)
    conformal = ConformalByPattern(Fixed(), MODALITIES, min_count=100).conformalize(X, y)
    table = conformal.table_.set_index("pattern")
    assert table["n"].sum() == 800
    assert table.loc["gas", "calibrated_with"] == "(all)"  # its pool is too small as well
    assert table.loc["static", "calibrated_with"] == "static"
    small = ConformalByPattern(Fixed(), MODALITIES, min_count=50).conformalize(X, y)
    assert small.table_["calibrated_with"].tolist() == ["gas+static", "static", "gas"]
    three = {"gas": "ph", "static": "age", "site": "site"}
    sites = X.assign(site=np.where(np.arange(800) % 16, np.nan, 1.0))
    pooled = ConformalByPattern(Fixed(), three, min_count=60).conformalize(sites, y)
    rare = pooled.table_.loc[pooled.table_["n"] < 60, "calibrated_with"]
    assert len(rare) >= 2
    assert rare.unique().tolist() == ["(pool)"]
    unseen = X[:3].assign(ph=np.nan, age=np.nan, site=1.0)
    assert pooled.predict_set(unseen).shape == (3, 2)
    assert pooled.coverage(unseen, y[:3])["calibrated_with"].iloc[0] == "(pool)"


def test_three_classes_and_other_scores():
    rng = np.random.default_rng(0)
    X = pd.DataFrame(rng.normal(size=(900, 2)), columns=["ph", "age"])
    y = (X["ph"] + 0.7 * rng.normal(size=900) > 0).astype(int) + (X["age"] > 0.8)
    model = LogisticRegression().fit(X[:300], y[:300])
    for score in ("lac", "aps", "top_k"):
        conformal = ConformalByPattern(model, MODALITIES, conformity_score=score, random_state=0)
        conformal.conformalize(X[300:600], y[300:600])
        row = conformal.coverage(X[600:], y[600:]).iloc[-1]
        assert row["coverage"] > 0.84
        assert 1 <= row["size"] < 3
    np.testing.assert_array_equal(conformal.predict(X), model.predict(X))
    np.testing.assert_allclose(conformal.predict_proba(X), model.predict_proba(X))


def test_of_our_own_estimators_on_frames_with_notes():
    data = make_ehr(n_samples=260, random_state=0, as_bunch=True)
    clf = FusionClassifier(data.modalities, max_epochs=1, n_members=2, random_state=0)
    clf.fit(data.X[:100], data.y[:100])
    conformal = ConformalByPattern(clf, min_count=30).conformalize(data.X[100:], data.y[100:])
    assert conformal.predict_set(data.X[:20]).shape == (20, 2)
    assert "ConformalByPattern" in repr(conformal)


def test_calibration_rows_alone_decide():
    X, y = draw(300, 0)
    X_new, _ = draw(50, 1)
    conformal = ConformalByPattern(Fixed(), MODALITIES).conformalize(X, y)
    whole = conformal.predict_set(X_new)
    np.testing.assert_array_equal(conformal.predict_set(X_new[:10]), whole[:10])


def test_refusals():
    X, y = draw(300, 0)
    with pytest.raises(NotFittedError, match=r"call conformalize\(X, y\) first"):
        ConformalByPattern(Fixed(), MODALITIES).predict_set(X)
    with pytest.raises(NotFittedError):
        ConformalByPattern(LogisticRegression(), MODALITIES).conformalize(X, y)
    with pytest.raises(ValueError, match=r"classes that the estimator has not seen: \['gone'\]"):
        ConformalByPattern(Fixed(), MODALITIES).conformalize(X, np.full(300, "gone"))
    with pytest.raises(ValueError, match="99 rows are the least that can promise it"):
        ConformalByPattern(Fixed(), MODALITIES, confidence_level=0.99).conformalize(X, y)
    holes = pd.Series(y).mask(np.arange(300) < 2)
    with pytest.raises(ValueError, match="one known class per row"):
        ConformalByPattern(Fixed(), MODALITIES).conformalize(X, holes)
    with pytest.raises(ValueError, match="conformity_score='raps' is not known"):
        ConformalByPattern(Fixed(), MODALITIES, conformity_score="raps").conformalize(X, y)


def test_coverage_asks_for_known_labels_and_one_outcome():
    X, y = draw(200, 0)
    conformal = ConformalByPattern(Fixed(), MODALITIES, confidence_level=0.8).conformalize(X, y)
    holes = y.astype(object)
    holes[::3] = None
    for wrong in (holes, pd.DataFrame({"y": y})):
        with pytest.raises(ValueError, match="one known class per row"):
            conformal.coverage(X, wrong)
    with pytest.raises(ValueError, match="has not seen"):
        conformal.coverage(X, np.full(200, "moved"))

    class TwoTasks(Fixed):
        def predict_proba(self, X):
            return np.full((len(X), 2), 0.3)

    with pytest.raises(ValueError, match="several tasks"):
        ConformalByPattern(TwoTasks(), MODALITIES, confidence_level=0.8).conformalize(X, y)


@pytest.mark.parametrize("score", ["aps", "top_k"])
def test_scores_for_more_classes_than_two(score):
    X, y = pd.DataFrame({"a": np.arange(100.0)}), np.arange(100) // 50
    conformal = ConformalByPattern(
        LogisticRegression().fit(X, y), {"all": "a"}, conformity_score=score
    )
    with pytest.raises(ValueError, match=f"'{score}' is for three classes and more.*use 'lac'"):
        conformal.conformalize(X, y)
