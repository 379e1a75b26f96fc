"""Metrics equal scikit-learn's, intervals cover, unknown labels and single classes are told."""

import pickle
import time
import warnings

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import RandomForestClassifier
from sklearn.exceptions import UndefinedMetricWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, brier_score_loss, log_loss, roc_auc_score
from sklearn.model_selection import GridSearchCV, KFold, cross_val_score
from sklearn.multioutput import MultiOutputClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import check_random_state

from ehrfuse.evaluation import (
    METRICS,
    bootstrap_scores,
    masked_scorer,
    paired_difference,
    score_by_pattern,
)
from ehrfuse.evaluation._resampling import resampled_weights

SKLEARN = {
    "auroc": roc_auc_score,
    "auprc": average_precision_score,
    "brier": brier_score_loss,
    "log_loss": log_loss,
}


def simulate(n=400, seed=0, n_groups=None):
    rng = np.random.default_rng(seed)
    groups = np.arange(n) if n_groups is None else rng.integers(0, n_groups, n)
    risk = 1 / (1 + np.exp(-(rng.normal(size=n) - 1)))
    return (rng.random(n) < risk).astype(float), risk, groups


class RowRisk(ClassifierMixin, BaseEstimator):
    """Gives back the probabilities that stand in X, one column per task."""

    def fit(self, X, y):
        self.classes_ = np.arange(np.shape(y)[1] if np.ndim(y) == 2 else 2)
        return self

    def predict_proba(self, X):
        return np.asarray(X)


# ---------------------------------------------------------------- metrics


@pytest.mark.parametrize("metric", SKLEARN)
@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(0, 6), st.integers(0, 4)), min_size=2, max_size=40
    )
)
@settings(max_examples=60, deadline=None)
def test_weighted_metric_with_ties_equals_sklearn(metric, rows):
    y, p, w = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    p /= 6
    with_weight = y[w > 0]
    if len(np.unique(with_weight)) < 2:
        return
    expected = SKLEARN[metric](y, p, sample_weight=w)
    assert METRICS[metric](y, p, w) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("metric", SKLEARN)
def test_matrix_of_weights_scores_every_resample(metric):
    y, p, groups = simulate(300, n_groups=80)
    p = p.round(2)
    (weights,) = resampled_weights(np.unique(groups, return_inverse=True)[1], 50, 0)
    expected = [SKLEARN[metric](y, p, sample_weight=w) for w in weights]
    np.testing.assert_allclose(METRICS[metric](y, p, weights), expected, atol=1e-10)


def test_closed_forms():
    y, p = np.array([0.0, 0, 1, 1]), np.array([0.2, 0.5, 0.5, 0.8])
    assert METRICS["auroc"](y, p) == pytest.approx(3.5 / 4)  # one tie among four pairs
    assert METRICS["auprc"](y, p) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert METRICS["brier"](y, p) == pytest.approx((0.04 + 0.25 + 0.25 + 0.04) / 4)
    assert METRICS["log_loss"](y, p) == pytest.approx(-np.mean(np.log([0.8, 0.5, 0.5, 0.8])))


@pytest.mark.parametrize("metric", ["auroc", "auprc"])
@pytest.mark.parametrize("label", [0.0, 1.0])
def test_rank_metric_of_one_class_is_nan(metric, label):
    assert np.isnan(METRICS[metric](np.full(3, label), np.array([0.1, 0.2, 0.3])))


# ---------------------------------------------------------------- scorer


@pytest.mark.parametrize("metric", SKLEARN)
def test_scorer_equals_sklearn_and_greater_is_better(metric):
    y, p, _ = simulate()
    sign = -1 if metric in ("brier", "log_loss") else 1
    score = masked_scorer(metric)(RowRisk().fit(p, y), np.column_stack([1 - p, p]), y)
    assert score == pytest.approx(sign * SKLEARN[metric](y, p))


def test_scorer_leaves_unknown_labels_out_task_by_task():
    rng = np.random.default_rng(0)
    Y = rng.integers(0, 2, (60, 3)).astype(float)
    P = rng.random((60, 3))
    Y[rng.random(Y.shape) < 0.3] = np.nan
    single = [
        roc_auc_score(y[~np.isnan(y)], p[~np.isnan(y)]) for y, p in zip(Y.T, P.T, strict=True)
    ]
    known = (~np.isnan(Y)).sum(axis=0)
    model = RowRisk().fit(P, Y)
    assert masked_scorer("auroc")(model, P, Y) == pytest.approx(np.mean(single))
    weighted = masked_scorer("auroc", average="weighted")(model, P, Y)
    assert weighted == pytest.approx(np.average(single, weights=known))
    changed = np.where(np.isnan(Y), 1 - P, P)  # predictions under unknown labels do not count
    assert masked_scorer("auroc")(model, changed, Y) == pytest.approx(np.mean(single))


def test_two_tasks_are_not_taken_for_two_classes():
    rng = np.random.default_rng(1)
    Y, P = rng.integers(0, 2, (50, 2)).astype(float), rng.random((50, 2))
    expected = np.mean([roc_auc_score(Y[:, k], P[:, k]) for k in (0, 1)])
    assert masked_scorer("auroc")(RowRisk().fit(P, Y), P, Y) == pytest.approx(expected)


@pytest.mark.parametrize(
    "y",
    [
        pd.Series(["alive", "dead", None, "dead", "alive"], index=[3, 3, 1, 0, 9]),
        np.array([False, True, None, True, False], dtype=object),
        pd.Series([0, 1, None, 1, 0], dtype="Int64"),
        pd.Series([0, 1, None, 1, 0], dtype=pd.ArrowDtype(pa.int8())),
        pd.Series([False, True, None, True, False], dtype="boolean"),
        pd.Series(["a", "b", None, "b", "a"], dtype=pd.ArrowDtype(pa.string())),
        pd.Series(["a", "b", None, "b", "a"], dtype="category"),
        pd.DataFrame({"death": pd.array([0, 1, None, 1, 0], dtype="boolean")}),
        pd.DataFrame({"death": pd.array([0, 1, None, 1, 0], dtype=pd.ArrowDtype(pa.int64()))}),
    ],
    ids=lambda y: str(getattr(y, "dtype", "frame")),
)
def test_labels_of_every_dtype(y):
    p = np.array([0.3, 0.2, 0.9, 0.8, 0.1])
    table = bootstrap_scores(y, p, metrics=["auroc"], n_resamples=10, random_state=0)
    assert table["estimate"].iloc[0] == 0.75
    assert table["n"].iloc[0] == 4


def test_positive_class_is_the_estimators_second():
    class Reversed(RowRisk):
        def fit(self, X, y):
            self.classes_ = np.array(["sick", "fine"])
            return self

    p = np.array([0.1, 0.9, 0.8])
    score = masked_scorer("auroc")(Reversed().fit(p, p), p, np.array(["sick", "fine", "sick"]))
    assert score == 1.0


def test_two_tasks_are_no_two_classes():
    y, P = np.array([0, 1, 0, 1]), np.array([[0.1, 0.5], [0.9, 0.1], [0.2, 0.3], [0.3, 0.2]])
    with pytest.raises(ValueError, match="two tasks or two models"):
        bootstrap_scores(y, P, n_resamples=10)
    halves = np.column_stack([1 - P[:, 0], P[:, 0]])
    table = bootstrap_scores(y, halves, metrics=["auroc"], n_resamples=10, random_state=0)
    assert table["estimate"].iloc[0] == 1.0


def test_scorer_skips_single_class_tasks_with_a_warning():
    Y = pd.DataFrame({"death": [0.0, 1, 0, 1], "dialysis": [0.0, 0, np.nan, 0]})
    P = np.array([[0.1, 0.5], [0.9, 0.1], [0.2, 0.3], [0.3, 0.2]])
    model = RowRisk().fit(P, Y)
    with pytest.warns(UndefinedMetricWarning, match=r"\['dialysis'\].*left out of the average"):
        assert masked_scorer("auroc")(model, P, Y) == 1.0
    with pytest.warns(UndefinedMetricWarning, match="the score is NaN"):
        assert np.isnan(masked_scorer("brier")(model, P, Y * 0))
    with pytest.warns(UndefinedMetricWarning, match="which y lacks here"):
        assert np.isnan(masked_scorer("auroc")(model, P[:, 0], np.zeros(4)))
    with pytest.warns(UndefinedMetricWarning, match="NaN"):
        assert np.isnan(masked_scorer("auroc")(model, P[:, 0], np.full(4, np.nan)))


@pytest.mark.parametrize(
    "model",
    [
        RandomForestClassifier(n_estimators=5, random_state=0),
        MultiOutputClassifier(LogisticRegression()),
        KNeighborsClassifier(),
    ],
    ids=lambda model: type(model).__name__,
)
def test_scorer_reads_lists_of_multi_output_classifiers(model):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(80, 3))
    Y = (X[:, :2] + rng.normal(size=(80, 2)) > 0).astype(float)
    P = model.fit(X, Y).predict_proba(X)
    expected = np.mean([roc_auc_score(Y[:, k], P[k][:, 1]) for k in (0, 1)])
    assert masked_scorer("auroc")(model, X, Y) == pytest.approx(expected)


@pytest.mark.parametrize("seen", [0, 1])
def test_multi_output_classifier_that_saw_one_class(seen):
    X = np.arange(8.0)[:, None]
    Y = np.column_stack([np.arange(8) % 2, np.full(8, seen)])
    model = KNeighborsClassifier(3).fit(X, Y)
    Y[0, 1] = 1 - seen
    score = masked_scorer("brier")(model, X, Y)
    first = brier_score_loss(Y[:, 0], model.predict_proba(X)[0][:, 1])
    assert score == pytest.approx(-(first + 1 / 8) / 2)


def test_scorer_in_cross_validation_and_grid_search():
    rng = np.random.default_rng(0)
    X = pd.DataFrame(rng.normal(size=(120, 3)), columns=list("abc"))
    y = (X["a"] + rng.normal(size=120) > 0).astype(int).to_numpy()
    model = make_pipeline(StandardScaler(), LogisticRegression())
    ours = cross_val_score(model, X, y, scoring=masked_scorer("auroc"), cv=KFold(3))
    np.testing.assert_allclose(ours, cross_val_score(model, X, y, scoring="roc_auc", cv=KFold(3)))
    grid = GridSearchCV(
        LogisticRegression(), {"C": [1e-4, 1.0]}, scoring=masked_scorer("brier"), cv=KFold(3)
    ).fit(X, y)
    assert grid.best_params_ == {"C": 1.0}
    assert grid.best_score_ < 0


def test_scorer_in_cross_validation_with_unknown_labels():
    rng = np.random.default_rng(0)
    P = rng.random((60, 2))
    Y = pd.DataFrame((rng.random((60, 2)) < P).astype(float), columns=["death", "return"])
    Y = Y.mask(rng.random(Y.shape) < 0.3)
    scores = cross_val_score(
        RowRisk(), P, Y, scoring=masked_scorer("auroc"), cv=KFold(3), error_score="raise"
    )
    assert scores.shape == (3,)
    assert (scores > 0.5).all()
    grid = GridSearchCV(RowRisk(), {}, scoring=masked_scorer("auprc"), cv=KFold(3)).fit(P, Y)
    assert np.isfinite(grid.best_score_)


def test_scorer_sample_weight_pickle_and_repr():
    scorer = masked_scorer("auroc", average="weighted")
    assert repr(scorer) == "masked_scorer('auroc', average='weighted')"
    y, p, _ = simulate(50)
    weight = np.random.default_rng(0).integers(0, 3, 50)
    model = RowRisk().fit(p, y)
    again = pickle.loads(pickle.dumps(scorer))
    assert again(model, p, y, weight) == pytest.approx(roc_auc_score(y, p, sample_weight=weight))


def test_scorer_single_class_dummy():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = DummyClassifier(strategy="prior").fit(np.zeros((3, 1)), np.zeros(3))
    assert masked_scorer("brier")(model, np.zeros((2, 1)), np.array([0, 1])) == -0.5


# ---------------------------------------------------------------- bootstrap


def test_bootstrap_resamples_groups_whole():
    codes = np.repeat(np.arange(20), 3)
    weights = np.concatenate(list(resampled_weights(codes, 300, 0)))
    assert weights.shape == (300, 60)
    by_group = weights.reshape(300, 20, 3)
    assert (by_group == by_group[:, :, :1]).all()
    assert (by_group[:, :, 0].sum(axis=1) == 20).all()
    assert by_group[:, :, 0].mean() == pytest.approx(1)
    assert by_group[:, :, 0].var() == pytest.approx(0.95, abs=0.05)  # multinomial: 1 - 1/20


def test_bootstrap_estimates_and_layout():
    y, p, groups = simulate(n_groups=100)
    table = bootstrap_scores(y, p, groups=groups, n_resamples=200, random_state=0)
    assert list(table.columns) == ["estimate", "lo", "hi", "n"]
    assert table.index.tolist() == ["auroc", "auprc", "brier"]
    for metric, row in table.iterrows():
        assert row["estimate"] == pytest.approx(SKLEARN[metric](y, p))
        assert row["lo"] < row["estimate"] < row["hi"]
    again = bootstrap_scores(y, p, groups=groups, n_resamples=200, random_state=0)
    pd.testing.assert_frame_equal(table, again)
    named = [f"patient {group}" for group in groups]
    assert bootstrap_scores(y, p, groups=named, n_resamples=200, random_state=0).equals(table)


def test_bootstrap_of_several_tasks_with_unknown_labels():
    y, p, _ = simulate(200)
    Y = pd.DataFrame({"death": y, "return": np.where(np.arange(200) < 150, 1 - y, np.nan)})
    Y["never known"] = np.nan
    Y["never seen"] = 0.0
    P = np.column_stack([p, p, p, p])
    table = bootstrap_scores(Y, P, metrics=["auroc"], n_resamples=100, random_state=0)
    assert table.index.names == ["task", "metric"]
    assert table["n"].tolist() == [200, 150, 0, 200]
    assert table.loc[("return", "auroc"), "estimate"] == pytest.approx(
        1 - roc_auc_score(y[:150], p[:150])
    )
    assert table.loc[["never known", "never seen"], ["estimate", "lo", "hi"]].isna().all(axis=None)


def test_interval_covers_the_truth_and_groups_widen_it():
    covered, narrow = [], []
    for seed in range(150):
        rng = np.random.default_rng(seed)
        groups = np.repeat(np.arange(60), 5)
        y = np.repeat(rng.integers(0, 2, 60), 5).astype(float)
        latent = np.repeat(rng.normal(size=60), 5) + y  # one draw per patient
        p = 1 / (1 + np.exp(-latent))
        truth = 0.7602  # P(N(1, 2) > 0)
        for kept, clusters in ((covered, groups), (narrow, None)):
            row = bootstrap_scores(
                y, p, groups=clusters, metrics=["auroc"], n_resamples=200, random_state=seed
            ).iloc[0]
            kept.append(row["lo"] <= truth <= row["hi"])
    assert 0.88 <= np.mean(covered) <= 0.99
    assert np.mean(narrow) < 0.75  # five copies of a patient are not five patients


def test_bootstrap_is_fast_enough():
    y, p, _ = simulate(4000)
    start = time.process_time()
    bootstrap_scores(y, p, random_state=0)
    assert time.process_time() - start < 15


def test_one_row_and_few_rows():
    row = bootstrap_scores([1], [0.3], n_resamples=20, random_state=0)
    assert row[["estimate", "lo", "hi"]].isna().all(axis=None)
    two = bootstrap_scores([0, 1], [0.3, 0.4], n_resamples=50, random_state=0)
    assert two.loc["auroc"].tolist() == [1, 1, 1, 2]


def test_global_random_state_and_inputs_are_left_alone():
    y, p, groups = simulate(100, n_groups=20)
    before = check_random_state(None).get_state()[1].copy()
    copies = (y.copy(), p.copy(), groups.copy())
    bootstrap_scores(y, p, groups=groups, n_resamples=20, random_state=0)
    np.testing.assert_array_equal(before, check_random_state(None).get_state()[1])
    for left, copy in zip((y, p, groups), copies, strict=True):
        np.testing.assert_array_equal(left, copy)


# ---------------------------------------------------------------- paired difference


def test_paired_difference_is_paired():
    y, p, groups = simulate(500, n_groups=150)
    other = np.clip(p + np.random.default_rng(1).normal(0, 0.02, 500), 0, 1)
    pair = paired_difference(y, p, other, groups=groups, n_resamples=300, random_state=0)
    assert pair.name == "auroc"
    assert pair["difference"] == pytest.approx(roc_auc_score(y, p) - roc_auc_score(y, other))
    assert pair["n"] == 500
    single = bootstrap_scores(y, p, groups=groups, n_resamples=300, random_state=0).loc["auroc"]
    assert pair["hi"] - pair["lo"] < 0.5 * (single["hi"] - single["lo"])
    mirrored = paired_difference(y, other, p, groups=groups, n_resamples=300, random_state=0)
    assert mirrored["lo"] == pytest.approx(-pair["hi"])
    assert mirrored["share_a_better"] == pytest.approx(1 - pair["share_a_better"])


def test_paired_difference_of_the_same_model_is_nothing():
    y, p, _ = simulate()
    pair = paired_difference(y, p, p, n_resamples=50, random_state=0)
    assert pair[["difference", "lo", "hi"]].tolist() == [0, 0, 0]
    assert pair["share_a_better"] == 0.5


def test_lower_brier_is_better():
    y, p, _ = simulate()
    pair = paired_difference(y, p, 1 - p, metric="brier", n_resamples=50, random_state=0)
    assert pair["difference"] < 0
    assert pair["share_a_better"] == 1


def test_paired_difference_of_several_tasks():
    y, p, _ = simulate()
    Y = pd.DataFrame({"death": y, "unseen": np.zeros_like(y), "unknown": np.nan})
    P = np.column_stack([p] * 3)
    table = paired_difference(Y, P, P**2, n_resamples=20, random_state=0)
    assert table.index.tolist() == ["death", "unseen", "unknown"]
    assert table["n"].tolist() == [400, 400, 0]
    assert table.loc[["unseen", "unknown"], "difference":"share_a_better"].isna().all(axis=None)


def test_paired_interval_covers():
    covered = []
    for seed in range(150):
        rng = np.random.default_rng(seed)
        y = rng.integers(0, 2, 200).astype(float)
        a, b = rng.normal(size=(2, 200)) + y  # equally good: the true difference is 0
        pair = paired_difference(
            y, 1 / (1 + np.exp(-a)), 1 / (1 + np.exp(-b)), n_resamples=200, random_state=seed
        )
        covered.append(pair["lo"] <= 0 <= pair["hi"])
    assert 0.88 <= np.mean(covered) <= 0.99


# ---------------------------------------------------------------- scores by pattern


def pattern_frame(n=300, seed=0):
    rng = np.random.default_rng(seed)
    X = pd.DataFrame({"ph": rng.normal(7.4, 0.1, n), "note": "text", "id": rng.integers(0, 90, n)})
    X["ph"] = X["ph"].mask(rng.random(n) < 0.4)
    X["note"] = X["note"].mask(rng.random(n) < 0.1)
    return X


def test_score_by_pattern_scores_each_pattern_on_its_own():
    X, (y, p, _) = pattern_frame(), simulate(300)
    X.index = np.random.default_rng(0).integers(0, 50, 300)  # repeated and shuffled
    modalities = {"gas": "ph", "note": ["note"]}
    table = score_by_pattern(
        y, p, X, modalities, groups="id", min_count=1, n_resamples=50, random_state=0
    )
    assert table["n"].sum() == 300
    assert table["n"].is_monotonic_decreasing
    inside = (X["ph"].notna() & X["note"].notna()).to_numpy()
    row = table.set_index("pattern").loc["gas+note"]
    assert row["n"] == row["known"] == inside.sum()
    assert row["rate"] == pytest.approx(y[inside].mean())
    assert row["mean_prediction"] == pytest.approx(p[inside].mean())
    assert row["auroc"] == pytest.approx(roc_auc_score(y[inside], p[inside]))
    assert row["brier_lo"] < row["brier"] < row["brier_hi"]


def test_score_by_pattern_pools_rare_patterns_and_keeps_every_row():
    X, (y, p, _) = pattern_frame(), simulate(300)
    table = score_by_pattern(
        y, p, X, {"gas": "ph", "note": "note"}, min_count=60, n_resamples=20, random_state=0
    )
    assert table["pattern"].tolist()[-1] == "other (2 patterns)"
    assert table["n"].sum() == 300


def test_score_by_pattern_of_tasks_without_labels_or_with_one_class():
    X, (y, p, _) = pattern_frame(), simulate(300)
    absent = X["ph"].isna().to_numpy()
    Y = pd.DataFrame({"death": np.where(absent, 0, y), "icu": np.where(absent, np.nan, y)})
    table = score_by_pattern(
        Y, np.column_stack([p, p]), X, {"gas": "ph", "note": "note"}, n_resamples=20,
        min_count=1, random_state=0,
    )  # fmt: skip
    table = table.set_index(["task", "pattern"])
    assert table.loc[("death", "note"), "rate"] == 0
    assert np.isnan(table.loc[("death", "note"), "auroc"])
    assert table.loc[("icu", "note"), "known"] == 0
    assert table.loc[("icu", "note"), "rate":].isna().all()
    assert np.isfinite(table.loc[("icu", "gas+note"), "auroc"])


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: masked_scorer("accuracy"), ValueError, "metric='accuracy' is not known"),
        (lambda: masked_scorer("auroc", average="micro"), ValueError, "average='micro'"),
        (lambda: bootstrap_scores([0, 1, 2], [0.1] * 3), ValueError, "y holds 3 classes"),
        (lambda: bootstrap_scores(["dead"], [0.1]), ValueError, r"1 classes \('dead'\)"),
        (lambda: bootstrap_scores([[0, 2.0]], [[0.1, 0.2]]), ValueError, "0, 1 and NaN"),
        (lambda: bootstrap_scores([["a", "b"]], [[0.1, 0.2]]), ValueError, "0, 1 and NaN"),
        (lambda: bootstrap_scores(np.zeros((2, 2, 2)), [0.1]), ValueError, "3 dimensions"),
        (lambda: bootstrap_scores([], []), ValueError, "no rows"),
        (lambda: bootstrap_scores([0, 1], [0.1]), ValueError, "2 rows and 1 task"),
        (lambda: bootstrap_scores([0, 1], [0.1, np.nan]), ValueError, "no NaN where the label"),
        (lambda: bootstrap_scores([0, 1], [-2.0, 3.0]), ValueError, "decision_function"),
        (lambda: bootstrap_scores([0, 1], [0.1, 0.2], groups=[1]), ValueError, "groups has 1 rows"),
        (
            lambda: bootstrap_scores([0, 1], [0.1, 0.2], groups=[1, None]),
            ValueError,
            "null in 1 rows",
        ),
        (lambda: bootstrap_scores([0, 1], [0.1, 0.2], groups="id"), ValueError, "names no column"),
        (lambda: bootstrap_scores([0, 1], [0.1, 0.2], metrics=["f1"]), ValueError, "'f1'"),
        (lambda: bootstrap_scores([0, 1], [0.1, 0.2], n_resamples=0), ValueError, "n_resamples"),
        (lambda: bootstrap_scores([0, 1], [0.1, 0.2], confidence=95.0), ValueError, "confidence"),
        (lambda: paired_difference([0, 1], [0.1, 0.2], [0.1]), ValueError, "2 rows and 1 task"),
    ],
)
def test_bad_input_gets_one_clear_sentence(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_scores_by_pattern_names_what_is_wrong():
    X = pattern_frame(4)
    call = ([0, 1, 0, 1], [0.1, 0.2, 0.3, 0.4])
    with pytest.raises(ValueError, match="groups='patient' names no column"):
        score_by_pattern(*call, X, {"gas": "ph"}, groups="patient")
    with pytest.raises(ValueError, match="y has 4 rows, but 3 are needed"):
        score_by_pattern(*call, X[:3], {"gas": "ph"})
    with pytest.raises(TypeError, match="X is a ndarray"):
        score_by_pattern(*call, X.to_numpy(), {"gas": "ph"})
    with pytest.raises(TypeError, match="modalities is a list"):
        score_by_pattern(*call, X, ["ph"])
    with pytest.raises(ValueError, match=r"needs columns \['lactate'\]"):
        score_by_pattern(*call, X, {"labs": "lactate"})


def test_one_metric_may_be_given_by_name():
    y, p = np.array([0, 1, 1, 0]), np.array([0.1, 0.8, 0.6, 0.4])
    found = bootstrap_scores(y, p, metrics="auroc", n_resamples=5, random_state=0)
    assert len(found) == 1
