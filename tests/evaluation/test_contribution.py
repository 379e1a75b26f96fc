"""Contributions are true of models whose answer is known, and Shapley's rule holds."""

import itertools

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import KFold, cross_validate

from ehrfuse import FusionClassifier, Tabular
from ehrfuse.datasets import make_ehr
from ehrfuse.evaluation import contribution_scorer, modality_contribution
from ehrfuse.evaluation.contribution import draw_orders, shapley_steps, share_matrix, without


class Sum(ClassifierMixin, BaseEstimator):
    """Risk is a logistic sum of columns; a null adds nothing."""

    def __init__(self, columns):
        self.columns = columns

    def fit(self, X, y):
        self.classes_ = np.array([0, 1])
        return self

    def predict_proba(self, X):
        p = 1 / (1 + np.exp(-X[self.columns].fillna(0).sum(axis=1).to_numpy()))
        return np.column_stack([1 - p, p])


def case(n=400, k=4, seed=0):
    rng = np.random.default_rng(seed)
    X = pd.DataFrame(rng.normal(size=(n, k)), columns=[f"c{j}" for j in range(k)])
    X *= np.linspace(1.5, 0, k)  # the last column is nothing
    y = (rng.random(n) < 1 / (1 + np.exp(-X.sum(axis=1)))).astype(int)
    return Sum(list(X)).fit(X, y), X, y, {f"m{j}": f"c{j}" for j in range(k)}


def auroc(model, X, y, kept):
    p = model.predict_proba(X.assign(**{c: np.nan for c in X if c not in kept}))[:, 1]
    return roc_auc_score(y, p)


def test_drop_is_the_score_with_all_minus_the_score_without():
    model, X, y, modalities = case()
    table = modality_contribution(model, X, y, modalities, n_resamples=20, random_state=0)
    whole = auroc(model, X, y, list(X))
    for name, column in modalities.items():
        expected = whole - auroc(model, X, y, [c for c in X if c != column])
        assert table.loc[name, "contribution"] == pytest.approx(expected)
    assert table.loc["(all)", "contribution"] == pytest.approx(whole - 0.5)
    assert table.loc["m3", ["contribution", "lo", "hi"]].tolist() == [0, 0, 0]
    assert (table["present"] == 1).all()


def test_shapley_by_going_through_all_orders():
    model, X, y, modalities = case()
    table = modality_contribution(
        model, X, y, modalities, method="shapley", n_resamples=20, random_state=0
    )
    gains = {name: [] for name in modalities}
    for order in itertools.permutations(modalities):
        kept, before = [], 0.5
        for name in order:
            kept.append(modalities[name])
            after = auroc(model, X, y, kept)
            gains[name].append(after - before)
            before = after
    for name, parts in gains.items():
        assert table.loc[name, "contribution"] == pytest.approx(np.mean(parts))
    assert table["contribution"][:-1].sum() == pytest.approx(table.loc["(all)", "contribution"])


def test_drawn_orders_come_near_the_exact_shares():
    rng = np.random.default_rng(0)
    values = {frozenset(s): rng.random() for k in range(6)
              for s in itertools.combinations(range(5), k)}  # fmt: skip

    def share(orders):
        members, shares = share_matrix(5, shapley_steps(5, orders))
        return shares @ [values[c] for c in members]

    exact = share(())
    drawn = share([rng.permutation(5).tolist() for _ in range(4000)])
    np.testing.assert_allclose(drawn, exact, atol=0.02)
    assert exact[:-1].sum() == pytest.approx(exact[-1])


def test_many_modalities_are_sampled_and_still_sum():
    model, X, y, modalities = case(n=120, k=10)
    options = {"method": "shapley", "n_permutations": 4, "n_resamples": 20, "random_state": 0}
    table = modality_contribution(model, X, y, modalities, **options)
    assert table["contribution"][:-1].sum() == pytest.approx(table.loc["(all)", "contribution"])
    assert (table["sampling_error"][:-2] > 0).all()
    assert table.loc["m9", ["contribution", "sampling_error"]].tolist() == [0, 0]
    pd.testing.assert_frame_equal(table, modality_contribution(model, X, y, modalities, **options))
    orders = draw_orders(10, 3, np.random.RandomState(0))
    assert orders[1] == orders[0][::-1]
    assert len(orders) == 6


def test_losses_count_so_that_help_is_positive():
    model, X, y, modalities = case()
    for metric in ("brier", "log_loss", "auprc", "net_benefit@0.3"):
        table = modality_contribution(
            model, X, y, modalities, metric=metric, n_resamples=20, random_state=0
        )
        assert table.loc["m0", "lo"] > 0, metric


def test_patients_are_resampled_whole():
    model, X, y, modalities = case(n=80)
    copies = np.repeat(np.arange(80), 5)
    X, y = X.iloc[copies].assign(who=copies), y[copies]
    wide = modality_contribution(model, X, y, modalities, groups="who", random_state=0).loc["m0"]
    narrow = modality_contribution(model, X, y, modalities, random_state=0).loc["m0"]
    assert wide["hi"] - wide["lo"] > 1.7 * (narrow["hi"] - narrow["lo"])


def test_cells_of_every_dtype_become_null_and_the_frame_stays():
    X = pd.DataFrame(
        {
            "whole": [1, 2], "flag": [True, False], "real": [0.5, 1.5], "word": ["a", "b"],
            "kind": pd.Categorical(["u", "v"]), "Int": pd.array([1, 2], dtype="Int64"),
            "list": pd.Series([[1], [2, 3]], dtype=pd.ArrowDtype(pa.list_(pa.int64()))),
            "dicts": [[{"time": 0.0}], []], "other": [1, 2],
        },
        index=[7, 7],
    )  # fmt: skip
    copy = X.copy(deep=True)
    gone = without(X, list(X.columns[:-1]))
    assert gone.iloc[:, :-1].isna().all(axis=None)
    assert gone["other"].tolist() == [1, 2]
    pd.testing.assert_frame_equal(X, copy)
    for column in ("real", "kind", "Int", "list", "word"):
        assert gone[column].dtype == X[column].dtype, column


def test_of_our_own_estimators_and_in_cross_validation():
    data = make_ehr(n_samples=120, modalities=["vitals", "labs"], random_state=0, as_bunch=True)
    clf = FusionClassifier(data.modalities, max_epochs=2, n_members=2, random_state=0)
    clf.fit(data.X[:80], data.y[:80])
    table = modality_contribution(clf, data.X[80:], data.y[80:], n_resamples=10, random_state=0)
    assert table.index.tolist() == [*data.modalities, "(all)"]
    assert table["present"].iloc[0] == data.X[80:][["age"]].notna().mean().iloc[0]
    scorer = contribution_scorer("brier", method="shapley")
    found = cross_validate(clf, data.X, data.y, cv=KFold(2), scoring=scorer)
    parts = sum(found[f"test_{name}"] for name in data.modalities)
    np.testing.assert_allclose(parts, found["test_(all)"])


def test_several_tasks_are_averaged():
    data = make_ehr(n_samples=120, n_tasks=2, label_missing=0.2, modalities=["vitals", "labs"],
                    random_state=0, as_bunch=True)  # fmt: skip
    clf = FusionClassifier(data.modalities, max_epochs=2, n_members=2, random_state=0)
    clf.fit(data.X, data.y)
    table = modality_contribution(clf, data.X, data.y, n_resamples=10, random_state=0)
    assert table.notna().all(axis=None)


def test_refusals():
    model, X, y, modalities = case(n=60)
    strict = LogisticRegression().fit(X, y)
    with pytest.raises(ValueError, match=r"LogisticRegression does not predict without \['m0'"):
        modality_contribution(strict, X, y, modalities, n_resamples=2)
    with pytest.raises(ValueError, match="names no modalities; give them"):
        modality_contribution(strict, X, y)
    with pytest.raises(ValueError, match="method='owen' is not known"):
        modality_contribution(model, X, y, modalities, method="owen")
    many = {f"m{j}": Tabular(["c0"]) for j in range(9)}
    with pytest.raises(ValueError, match="There are 9 modalities; a scorer shares exactly"):
        contribution_scorer("auroc", many, method="shapley")(model, X, y)


def test_an_estimator_that_does_not_predict_at_all_says_why_itself():
    """Its error is not about a modality that is away."""
    X, y = pd.DataFrame({"a": np.arange(40.0), "b": 1.0}), np.arange(40) % 2
    model = FusionClassifier({"v": Tabular(["a"])}, max_epochs=1)
    with pytest.raises(NotFittedError, match="not fitted yet"):
        modality_contribution(model, X, y)
    fitted = HistGradientBoostingClassifier(max_iter=2).fit(X[["a"]], y)
    with pytest.raises(ValueError, match="seen at fit time") as caught:
        modality_contribution(fitted, X, y, {"v": "a"})
    assert "does not predict without" not in str(caught.value)
