"""Subgroups are scored each on its own rows, and their worst serves as a scorer."""

import pickle

import numpy as np
import pandas as pd
import pytest
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.exceptions import UndefinedMetricWarning
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, KFold, cross_val_score

from ehrfuse.evaluation import score_by_pattern, score_by_subgroup, worst_group_scorer


def case(n=300, seed=0):
    rng = np.random.default_rng(seed)
    X = pd.DataFrame({"a": rng.normal(size=n), "b": rng.normal(size=n)})
    X["sex"] = rng.choice(["f", "m"], n)
    X["site"] = rng.choice([1, 2, 3], n, p=[0.6, 0.37, 0.03])
    y = (X["a"] * np.where(X["sex"] == "f", 1.5, 0.2) + rng.normal(size=n) > 0).astype(int)
    return X, y, 1 / (1 + np.exp(-X["a"].to_numpy()))


def test_each_subgroup_on_its_own_rows():
    X, y, p = case()
    table = score_by_subgroup(y, p, X[["sex", "site"]], min_count=5, n_resamples=20, random_state=0)
    assert table["by"].unique().tolist() == ["sex", "site"]
    assert table.groupby("by")["n"].sum().tolist() == [300, 300]
    for _, row in table.iterrows():
        rows = (X[row["by"]] == row["subgroup"]).to_numpy()
        assert row["auroc"] == pytest.approx(roc_auc_score(y[rows], p[rows]))
        assert row["rate"] == pytest.approx(y[rows].mean())
        assert row["auroc_lo"] <= row["auroc"] <= row["auroc_hi"]


def test_nulls_are_a_subgroup_and_rare_values_are_pooled():
    X, y, p = case()
    cells = X["sex"].mask(X["b"] > 0.5)
    table = score_by_subgroup(y, p, cells, n_resamples=5, metrics="brier")
    assert table["subgroup"].tolist() == ["(unknown)", "f", "m"]
    assert table["by"].unique().tolist() == ["sex"]
    several = np.where(np.arange(300) < 290, "common", np.arange(300).astype(str))
    table = score_by_subgroup(y, p, several, n_resamples=5, metrics="brier")
    assert table["subgroup"].tolist() == ["common", "other (10 values)"]
    assert table["n"].tolist() == [290, 10]
    one = np.where(np.arange(300) < 299, "common", "rare")
    assert score_by_subgroup(y, p, one, n_resamples=5)["subgroup"].tolist() == ["common", "rare"]


def test_several_tasks_and_one_class():
    X, y, p = case()
    Y = pd.DataFrame({"death": y, "never": 0.0})
    table = score_by_subgroup(Y, np.column_stack([p, p]), X["sex"], n_resamples=5)
    assert table["task"].tolist() == ["death", "death", "never", "never"]
    assert table.loc[table["task"] == "never", "auroc"].isna().all()


def test_numbers_are_no_groups():
    X, y, p = case()
    with pytest.raises(ValueError, match=r"by 'a' have 300 distinct values.*pandas\.cut"):
        score_by_subgroup(y, p, X["a"])


def test_worst_group_is_the_lowest_of_the_table():
    X, y, _ = case()
    model = HistGradientBoostingClassifier(max_iter=5, random_state=0)
    model.fit(X[["a", "b"]], y)

    class Own:
        classes_ = model.classes_

        def predict_proba(self, X):
            return model.predict_proba(X[["a", "b"]])

    p = Own().predict_proba(X)
    for metric, sign, worst in (("auroc", 1, min), ("brier", -1, max)):
        table = score_by_subgroup(y, p, X["sex"], metrics=metric, n_resamples=2)
        score = worst_group_scorer(metric, by="sex")(Own(), X, y)
        assert score == pytest.approx(sign * worst(table[metric]))
    X = X.assign(b=X["b"].where(X["a"] > -0.5))
    table = score_by_pattern(y, Own().predict_proba(X), X, {"A": "a", "B": "b"}, n_resamples=2)
    scorer = worst_group_scorer("auroc", {"A": "a", "B": "b"})
    assert pickle.loads(pickle.dumps(scorer))(Own(), X, y) == pytest.approx(table["auroc"].min())


def test_in_searches():
    X, y, _ = case()
    X = X.assign(sex=(X["sex"] == "f").astype(int))
    scorer = worst_group_scorer("auroc", by="sex", min_count=10)
    assert "by='sex'" in repr(scorer)
    model = HistGradientBoostingClassifier(max_iter=5, random_state=0)
    scores = cross_val_score(model, X, y, cv=KFold(3), scoring=scorer)
    plain = cross_val_score(model, X, y, cv=KFold(3), scoring="roc_auc")
    assert (scores < plain).all()
    search = GridSearchCV(model, {"max_iter": [1, 5]}, cv=KFold(2), scoring=scorer).fit(X, y)
    assert np.isfinite(search.best_score_)


def test_refusals_of_the_scorer():
    X, y, _ = case()
    model = HistGradientBoostingClassifier(max_iter=2).fit(X[["a"]], y)
    with pytest.raises(ValueError, match="by='ward' is no column"):
        worst_group_scorer("auroc", by="ward")(model, X[["a"]], y)
    with pytest.raises(ValueError, match="names no modalities"):
        worst_group_scorer("auroc")(model, X[["a"]], y)
    with pytest.warns(UndefinedMetricWarning, match="the score is NaN"):
        assert np.isnan(worst_group_scorer("auroc", {"A": "a"})(model, X[["a"]], y * 0))
