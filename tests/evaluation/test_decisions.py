"""Net benefit, calibration error and calibration tables equal hand and scikit-learn's counts."""

import numpy as np
import pandas as pd
import pytest
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import make_scorer
from sklearn.model_selection import KFold, cross_val_score

from ehrfuse.evaluation import (
    METRICS,
    bootstrap_scores,
    calibration_table,
    decision_curve,
    expected_calibration_error,
    masked_scorer,
    net_benefit,
    paired_difference,
)


def simulate(n=600, seed=0, excess=0.0, scale=1.0):
    """Outcomes, and predictions off by an excess and a scale on the logit."""
    rng = np.random.default_rng(seed)
    logit = rng.normal(-1, 1.2, n)
    y = (rng.random(n) < 1 / (1 + np.exp(-logit))).astype(float)
    return y, 1 / (1 + np.exp(-(scale * logit + excess)))


# ---------------------------------------------------------------- net benefit


@pytest.mark.parametrize("threshold", [0.05, 0.2, 0.5])
def test_net_benefit_by_counting(threshold):
    y, p = simulate()
    true = ((p >= threshold) & (y == 1)).sum()
    false = ((p >= threshold) & (y == 0)).sum()
    expected = true / 600 - false / 600 * threshold / (1 - threshold)
    assert net_benefit(y, p, threshold=threshold) == pytest.approx(expected)
    row = bootstrap_scores(y, p, metrics=f"net_benefit@{threshold}", n_resamples=50)
    assert row["estimate"].iloc[0] == pytest.approx(expected)


def test_weights_of_a_net_benefit_repeat_rows():
    y, p = simulate(40)
    weight = np.random.default_rng(1).integers(0, 3, 40)
    twice = np.repeat(np.arange(40), weight)
    one = net_benefit(y, p, threshold=0.3, sample_weight=weight)
    assert one == pytest.approx(net_benefit(y[twice], p[twice], threshold=0.3))


def test_decision_curve_agrees_with_net_benefit_and_knows_the_two_policies():
    y, p = simulate()
    thresholds = [0.2, 0.3]
    table = decision_curve(
        y, {"good": p, "flat": np.full_like(p, 0.05)}, thresholds=thresholds, n_resamples=200,
        random_state=0,
    )  # fmt: skip
    rate = y.mean()
    for _, row in table.iterrows():
        odds = row["threshold"] / (1 - row["threshold"])
        assert row["treat_all"] == pytest.approx(rate - (1 - rate) * odds)
        assert row["gain"] == pytest.approx(row["net_benefit"] - max(row["treat_all"], 0))
    good = table[table["model"] == "good"]
    expected = [net_benefit(y, p, threshold=t) for t in thresholds]
    np.testing.assert_allclose(good["net_benefit"], expected)
    assert (good["lo"] < good["net_benefit"]).all()
    assert (good["net_benefit"] < good["hi"]).all()
    assert (good["gain_lo"] > 0).all()
    flat = table[table["model"] == "flat"]  # treats nobody
    np.testing.assert_array_equal(flat[["net_benefit", "lo", "hi"]], 0)


def test_decision_curve_resamples_patients():
    y, p = simulate(100)
    copies = np.repeat(np.arange(100), 5)
    wide = decision_curve(y[copies], p[copies], groups=copies, thresholds=[0.2], random_state=0)
    narrow = decision_curve(y[copies], p[copies], thresholds=[0.2], random_state=0)
    width = lambda table: (table["hi"] - table["lo"]).iloc[0]  # noqa: E731
    assert width(wide) > 1.8 * width(narrow)


@pytest.mark.parametrize("threshold", [0.0, 1.0, 10, "0.1"])
def test_thresholds_are_risks(threshold):
    with pytest.raises(ValueError, match="must be a risk between 0 and 1"):
        net_benefit([0, 1], [0.1, 0.9], threshold=threshold)


@pytest.mark.parametrize("metric", ["net_benefit", "net_benefit@2", "net_benefit@x", "f1", 3])
def test_unknown_metric_is_told(metric):
    with pytest.raises(ValueError, match=r"is not known; choose one of 'auroc'.*net_benefit@T"):
        bootstrap_scores([0, 1], [0.1, 0.9], metrics=[metric])


# ---------------------------------------------------------------- calibration error


@pytest.mark.parametrize("strategy", ["quantile", "uniform"])
@pytest.mark.parametrize("n_bins", [5, 10])
def test_calibration_error_from_the_curve_of_sklearn(strategy, n_bins):
    y, p = simulate(excess=0.5)
    observed, predicted = calibration_curve(y, p, n_bins=n_bins, strategy=strategy)
    edges = np.linspace(0, 1, n_bins + 1)
    edges = edges if strategy == "uniform" else np.quantile(p, edges)
    counts = np.bincount(np.searchsorted(edges[1:-1], p))
    counts = counts[counts > 0]
    gaps = np.abs(observed - predicted)
    error = expected_calibration_error
    options = {"n_bins": n_bins, "strategy": strategy}
    assert error(y, p, **options) == pytest.approx(np.average(gaps, weights=counts))
    squared = np.average(gaps**2, weights=counts) ** 0.5
    assert error(y, p, norm="l2", **options) == pytest.approx(squared)
    assert error(y, p, norm="max", **options) == pytest.approx(gaps.max())
    if n_bins == 10:
        metric = "ece" if strategy == "quantile" else "ece_uniform"
        assert METRICS[metric](y, p) == pytest.approx(error(y, p, **options))


def test_calibration_error_of_many_resamples_at_once():
    y, p = simulate(200)
    weights = np.random.default_rng(0).integers(0, 3, (6, 200)).astype(float)
    single = [METRICS["ece"](y, p, w) for w in weights]
    np.testing.assert_allclose(METRICS["ece"](y, p, weights), single)
    own = [expected_calibration_error(y, p, sample_weight=w) for w in weights]
    np.testing.assert_allclose(own, single)


def test_interval_of_a_calibration_error_holds_the_estimate():
    """Resampling alone raises the error of a perfect model; the interval must not show it."""
    y, p = simulate(400)
    row = bootstrap_scores(y, p, metrics="ece", n_resamples=300, random_state=0).iloc[0]
    assert 0 <= row["lo"] <= row["estimate"] <= row["hi"]
    pair = paired_difference(
        y, p, np.clip(p + 0.2, 0, 1), metric="ece", n_resamples=300, random_state=0
    )
    assert pair["lo"] < pair["difference"] < pair["hi"] < 0
    assert pair["share_a_better"] == 1


def test_functions_make_scorers():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(150, 2))
    y = np.where(X[:, 0] + rng.normal(size=150) > 0, "yes", "no")
    for function, ours, sign, options in [
        (expected_calibration_error, "ece", -1, {}),
        (net_benefit, "net_benefit@0.3", 1, {"threshold": 0.3}),
    ]:
        scorer = make_scorer(
            function, greater_is_better=sign > 0, response_method="predict_proba", **options
        )
        one, two = (
            cross_val_score(LogisticRegression(), X, y, cv=KFold(3), scoring=s)
            for s in (scorer, masked_scorer(ours))
        )
        np.testing.assert_allclose(one, two)


def test_unknown_labels_are_left_out():
    y, p = simulate(80)
    holes = np.where(np.arange(80) % 4 == 0, np.nan, y)
    known = ~np.isnan(holes)
    for function in (expected_calibration_error, lambda *a: net_benefit(*a, threshold=0.2)):
        assert function(holes, p) == pytest.approx(function(y[known], p[known]))
    with pytest.raises(ValueError, match="no known label"):
        expected_calibration_error([np.nan], [0.1])


# ---------------------------------------------------------------- calibration table


def test_intercept_and_slope_are_those_of_an_unpenalised_regression():
    y, p = simulate(excess=0.7, scale=1.8)
    row = calibration_table(y, p).iloc[0]
    x = np.log(p / (1 - p))[:, None]
    model = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(x, y)
    assert row["slope"] == pytest.approx(model.coef_[0, 0], abs=1e-4)
    # With the slope held at 1 the mean prediction must meet the rate.
    shifted = 1 / (1 + np.exp(-(x[:, 0] + row["intercept"])))
    assert shifted.mean() == pytest.approx(y.mean())


def test_table_by_pattern_counts_every_row_once():
    y, p = simulate()
    rng = np.random.default_rng(0)
    X = pd.DataFrame({"a": rng.normal(size=600), "b": 1.0, "who": np.arange(600) // 2})
    X["a"] = X["a"].mask(rng.random(600) < 0.4)
    table = calibration_table(y, p, X, {"A": "a", "B": "b"}, groups="who", n_bins=4)
    assert table.groupby("pattern")["n"].sum().to_dict() == {
        "A+B": int(X["a"].notna().sum()), "B": int(X["a"].isna().sum()),
    }  # fmt: skip
    inside = X["a"].isna().to_numpy()
    own = table[table["pattern"] == "B"]
    assert np.average(own["rate"], weights=own["n"]) == pytest.approx(y[inside].mean())
    assert np.average(own["predicted"], weights=own["n"]) == pytest.approx(p[inside].mean())
    assert (table["lo"] <= table["rate"] + 1e-12).all()
    assert (table["rate"] <= table["hi"] + 1e-12).all()


def test_no_slope_where_there_is_none():
    assert calibration_table([1, 1, 1], [0.2, 0.4, 0.6])["slope"].isna().all()
    apart = calibration_table([0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9])
    assert apart["slope"].isna().all()


def test_one_threshold_and_what_is_none():
    y, p = [0, 1, 0, 1], [0.2, 0.7, 0.4, 0.9]
    one = decision_curve(y, p, thresholds=0.3, n_resamples=5, random_state=0)
    pd.testing.assert_frame_equal(
        one, decision_curve(y, p, thresholds=[0.3], n_resamples=5, random_state=0)
    )
    for odd in ([], [[0.1, 0.2]], "half"):
        with pytest.raises(ValueError, match="must be one risk or a list of risks"):
            decision_curve(y, p, thresholds=odd)
    with pytest.raises(ValueError, match=r"threshold=1\.0 must be a risk between 0 and 1"):
        decision_curve(y, p, thresholds=1)
    with pytest.raises(ValueError, match="proba is an empty dict; pass probabilities of at least"):
        decision_curve(y, {})
    with pytest.raises(TypeError, match="confidence must be an instance of float"):
        decision_curve(y, p, confidence=95)
