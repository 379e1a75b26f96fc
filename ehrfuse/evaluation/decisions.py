"""From probabilities to decisions: net benefit at thresholds, and calibration."""

import numpy as np
import pandas as pd
from scipy.special import expit, logit
from sklearn.utils import check_scalar

from ehrfuse._runtime import check_option
from ehrfuse.evaluation._inputs import check_labels, check_proba, find_patterns, group_codes
from ehrfuse.evaluation._resampling import (
    as_weights,
    benefits,
    calibration_bins,
    percentile_interval,
    resampled_weights,
)
from ehrfuse.evaluation.metrics import check_settings
from ehrfuse.evaluation.missingness import rate_interval

_NORMS = ("l1", "l2", "max")


def net_benefit(y_true, y_prob, *, threshold, sample_weight=None):
    """Net benefit of treating those whose risk reaches a threshold.

    Parameters
    ----------
    y_true : array-like of shape (n_samples,)
        Two classes, the second in sorted order is the event; null where unknown.
    y_prob : array-like of shape (n_samples,) or (n_samples, 2)
        Probability of the event.
    threshold : float
        Risk, between 0 and 1, from which one would treat. It says how many false alarms one true
        alarm is worth: at 0.1, nine.
    sample_weight : array-like of shape (n_samples,), default=None

    Returns
    -------
    benefit : float
        True positives per patient, less false positives per patient times
        ``threshold / (1 - threshold)``. To treat nobody has 0.

    See Also
    --------
    decision_curve : Over many thresholds, with intervals and the policy of treating all.

    References
    ----------
    Vickers AJ, Elkin EB. Decision curve analysis: a novel method for evaluating prediction models.
    Med Decis Making 2006;26:565-574.

    Examples
    --------
    >>> from ehrfuse.evaluation import net_benefit
    >>> died, risk = [0, 0, 1, 1, 0, 1], [0.1, 0.4, 0.8, 0.3, 0.2, 0.9]
    >>> round(net_benefit(died, risk, threshold=0.25), 3)
    0.444

    As a scorer:

    >>> from sklearn.metrics import make_scorer
    >>> scorer = make_scorer(net_benefit, response_method="predict_proba", threshold=0.25)
    """
    _check_threshold(threshold)
    labels, p, weights = _one_task(y_true, y_prob, sample_weight)
    return float(np.average(benefits(labels, p, threshold), weights=weights))


def expected_calibration_error(
    y_true, y_prob, *, n_bins=10, strategy="quantile", norm="l1", sample_weight=None
):
    """Mean distance between predicted and observed risk over bins of the prediction.

    Parameters
    ----------
    y_true : array-like of shape (n_samples,)
        Two classes, the second in sorted order is the event; null where unknown.
    y_prob : array-like of shape (n_samples,) or (n_samples, 2)
        Probability of the event.
    n_bins : int, default=10
    strategy : {"quantile", "uniform"}, default="quantile"
        Bins of equal counts, or of equal width. Where most risks are low, most bins of equal width
        are empty or hold a handful of rows.
    norm : {"l1", "l2", "max"}, default="l1"
        The mean distance weighted by rows, its root mean square, or the largest.
    sample_weight : array-like of shape (n_samples,), default=None

    Returns
    -------
    error : float
        Between 0 and 1, lower is better.

    Notes
    -----
    It depends on the bins, and in small sets it is above 0 for a perfect model too (see
    `bootstrap_scores`); compare models on the same rows and bins. Predictions that are equal share
    a bin.

    References
    ----------
    Naeini MP, Cooper GF, Hauskrecht M. Obtaining well calibrated probabilities using Bayesian
    binning. AAAI 2015.

    Examples
    --------
    >>> from ehrfuse.evaluation import expected_calibration_error
    >>> expected_calibration_error([0, 1, 0, 1], [0.2, 0.2, 0.6, 0.6], n_bins=2)
    0.2
    """
    check_option(strategy, "strategy", ("quantile", "uniform"))
    check_option(norm, "norm", _NORMS)
    check_scalar(n_bins, "n_bins", (int, np.integer), min_val=1)
    labels, p, weights = _one_task(y_true, y_prob, sample_weight)
    bins = calibration_bins(p, n_bins, strategy)
    mass = np.bincount(bins, weights)
    gap = np.bincount(bins, weights * (labels - p))
    kept = mass > 0
    mass, gap = mass[kept], np.abs(gap[kept] / mass[kept])
    if norm == "max":
        return float(gap.max())
    power = 1 if norm == "l1" else 2
    return float(np.average(gap**power, weights=mass) ** (1 / power))


def calibration_table(y, proba, X=None, modalities=None, *, groups=None, n_bins=10,
                      strategy="quantile", min_count=100, confidence=0.95):  # fmt: skip
    """Predicted and observed risk, bin by bin, for all rows or within each missing pattern.

    Parameters
    ----------
    y : array-like of shape (n_samples,)
        One yes/no outcome, null where unknown.
    proba : array-like of shape (n_samples,) or (n_samples, 2)
        Probabilities of held-out rows.
    X : DataFrame of shape (n_samples, n_columns), default=None
        The same rows, from which the patterns are read; only with `modalities`.
    modalities : dict of str to modality, str or list of str, default=None
        None takes all rows together.
    groups : str or array-like of shape (n_samples,), default=None
        Patient of every row, or the column of X that holds it, for cluster-robust intervals.
    n_bins : int, default=10
    strategy : {"quantile", "uniform"}, default="quantile"
        Bins of equal counts within each pattern, or of equal width.
    min_count : int, default=100
        Patterns with fewer rows are pooled.
    confidence : float, default=0.95

    Returns
    -------
    table : DataFrame
        One row per pattern and bin: `pattern` (``"(all)"`` without modalities), `bin`, `n`,
        `predicted` (mean), `rate` (observed), `lo`, `hi` (Wilson's interval, cluster-robust with
        `groups`), and, the same in all bins of a pattern, `intercept` (log-odds by which the
        predictions are too low on the whole; 0 is right) and `slope` (below 1: too extreme; above
        1: too timid).

    Notes
    -----
    Intercept and slope are those of Cox's logistic recalibration: the intercept with the slope
    held at 1, the slope with a free intercept; NaN where the outcome does not vary, or where the
    predictions separate it.

    References
    ----------
    Van Calster B, Nieboer D, Vergouwe Y, De Cock B, Pencina MJ, Steyerberg EW. A calibration
    hierarchy for risk models was defined. J Clin Epidemiol 2016;74:167-176.

    Examples
    --------
    >>> from ehrfuse.evaluation import calibration_table
    >>> died, risk = [0, 1, 0, 1, 1, 0], [0.2, 0.2, 0.3, 0.6, 0.7, 0.6]
    >>> calibration_table(died, risk, n_bins=2)[["n", "predicted", "rate"]].round(2)
       n  predicted  rate
    0  3       0.23  0.33
    1  3       0.63  0.67
    """
    check_option(strategy, "strategy", ("quantile", "uniform"))
    check_scalar(n_bins, "n_bins", (int, np.integer), min_val=1)
    tasks, p = _checked(y, proba)
    codes = group_codes(groups, len(p), X)
    names, places = ["(all)"], np.zeros(len(p), dtype=int)
    if modalities is not None:
        patterns = find_patterns(X, modalities, min_count=min_count)
        names, places = patterns.kinds["pattern"].tolist(), patterns.rows
    known, labels, table = tasks.known[:, 0], tasks.labels[:, 0], []
    for place, name in enumerate(names):
        rows = np.flatnonzero(known & (places == place))
        if not len(rows):
            continue
        line = dict(zip(("intercept", "slope"), recalibration(labels[rows], p[rows]), strict=True))
        bins = calibration_bins(p[rows], n_bins, strategy)
        for number in np.unique(bins):
            own = rows[bins == number]
            rate, lo, hi = rate_interval(labels[own], codes[own], confidence)
            head = {"pattern": name, "bin": int(number), "n": len(own), "predicted": p[own].mean()}
            table.append(head | {"rate": rate, "lo": lo, "hi": hi} | line)
    return pd.DataFrame(table)


def recalibration(labels, p):
    """Cox's intercept (slope held at 1) and slope, by Newton's method; NaN where they diverge."""
    if len(labels) == 0 or labels.min() == labels.max():
        return np.nan, np.nan
    x = logit(np.clip(p, 1e-6, 1 - 1e-6))
    alone = _newton(np.ones((len(x), 1)), labels, x)
    both = _newton(np.column_stack([np.ones_like(x), x]), labels, np.zeros_like(x))
    return alone[0], both[-1]


def _newton(design, labels, offset):
    beta = np.zeros(design.shape[1])
    for _ in range(50):
        fitted = expit(design @ beta + offset)
        curvature = (design * (fitted * (1 - fitted))[:, None]).T @ design
        if np.linalg.cond(curvature) > 1e12:
            break
        step = np.linalg.solve(curvature, design.T @ (labels - fitted))
        beta += np.clip(step, -5, 5)
        if np.abs(step).max() < 1e-10:
            return beta
    return np.full(len(beta), np.nan)


def decision_curve(y, proba, *, thresholds=None, groups=None, n_resamples=1000, confidence=0.95,
                   random_state=None):  # fmt: skip
    """Net benefit over thresholds, of models and of treating all.

    Parameters
    ----------
    y : array-like of shape (n_samples,)
        One yes/no outcome, null where unknown.
    proba : array-like of shape (n_samples,) or (n_samples, 2), or dict of str to these
        Probabilities of held-out rows, of one or several models.
    thresholds : float or array-like of float, default=None
        Between 0 and 1; None is 0.01, 0.02, ..., 0.5. Choose those at which somebody would
        treat, before looking at the curve.
    groups : array-like of shape (n_samples,), default=None
        Patient of every row; patients are resampled whole.
    n_resamples : int, default=1000
    confidence : float, default=0.95
        Coverage of the pointwise percentile interval.
    random_state : int, RandomState instance or None, default=None

    Returns
    -------
    table : DataFrame
        One row per `model` and `threshold`: `net_benefit`, `lo`, `hi`, `treat_all` (net benefit of
        treating everybody; nobody is 0), `gain`, `gain_lo`, `gain_hi` (over the better of all and
        nobody, paired).

    See Also
    --------
    DecisionCurveDisplay : The curve.

    References
    ----------
    Vickers AJ, Elkin EB. Decision curve analysis: a novel method for evaluating prediction models.
    Med Decis Making 2006;26:565-574.

    Examples
    --------
    >>> from ehrfuse.evaluation import decision_curve
    >>> died, risk = [0, 0, 1, 1, 0, 1], [0.1, 0.4, 0.8, 0.3, 0.2, 0.9]
    >>> table = decision_curve(died, risk, thresholds=[0.25, 0.5], random_state=0)
    >>> table[["threshold", "net_benefit", "treat_all"]].round(3)
       threshold  net_benefit  treat_all
    0       0.25        0.444      0.333
    1       0.50        0.333      0.000
    """
    thresholds = _as_thresholds(np.arange(1, 51) / 100 if thresholds is None else thresholds)
    check_settings((), n_resamples, confidence)
    models = proba if isinstance(proba, dict) else {"model": proba}
    if not models:
        raise ValueError("proba is an empty dict; pass probabilities of at least one model.")
    checked = {name: _checked(y, own) for name, own in models.items()}
    tasks = next(iter(checked.values()))[0]
    known, codes = tasks.known[:, 0], group_codes(groups, len(tasks.labels))
    labels = tasks.labels[known, 0]
    policies = [np.ones(len(labels)), *(p[known] for _, p in checked.values())]
    rows = np.stack([_benefit_matrix(labels, p, thresholds) for p in policies])
    drawn = np.concatenate(
        [_means(rows, w[:, known]) for w in resampled_weights(codes, n_resamples, random_state)],
        axis=1,
    )
    means, best_drawn = rows.mean(axis=1), np.maximum(drawn[0], 0)
    best = np.maximum(means[0], 0)
    table = []
    for name, own, own_drawn in zip(checked, means[1:], drawn[1:], strict=True):
        for place, threshold in enumerate(thresholds):
            interval = percentile_interval(own_drawn[:, place], confidence)
            lead = percentile_interval((own_drawn - best_drawn)[:, place], confidence)
            gain = own[place] - best[place]
            table.append((name, threshold, own[place], *interval, means[0, place], gain, *lead))
    columns = ["model", "threshold", "net_benefit", "lo", "hi", "treat_all", "gain", "gain_lo",
               "gain_hi"]  # fmt: skip
    return pd.DataFrame(table, columns=columns)


def _benefit_matrix(labels, p, thresholds):
    return np.column_stack([benefits(labels, p, threshold) for threshold in thresholds])


def _means(rows, weights):
    """Weighted means, shape (n_policies, n_resamples, n_thresholds)."""
    with np.errstate(invalid="ignore"):
        return weights @ rows / weights.sum(axis=1)[:, None]


def _check_threshold(threshold):
    if not isinstance(threshold, float | np.floating) or not 0 < threshold < 1:
        raise ValueError(
            f"threshold={threshold!r} must be a risk between 0 and 1, such as 0.2: that from which "
            "one would treat."
        )


def _as_thresholds(thresholds):
    """Thresholds as a vector; one number is one of them."""
    found = np.atleast_1d(thresholds)
    if found.ndim != 1 or not len(found) or found.dtype.kind not in "fiu":
        raise ValueError(
            f"thresholds={thresholds!r} must be one risk or a list of risks between 0 and 1, such "
            "as [0.1, 0.2]."
        )
    for threshold in found.astype(float).tolist():
        _check_threshold(threshold)
    return found.astype(float)


def _checked(y, proba):
    """One task's labels, and the probability of its event."""
    tasks = check_labels(y)
    if tasks.labels.shape[1] != 1:
        raise ValueError(
            f"y has {tasks.labels.shape[1]} tasks; pass one outcome at a time, such as y['death']."
        )
    return tasks, check_proba(proba, tasks)[:, 0]


def _one_task(y_true, y_prob, sample_weight):
    """Known labels, their probabilities and weights."""
    tasks, p = _checked(y_true, y_prob)
    known = tasks.known[:, 0]
    if not known.any():
        raise ValueError("y_true holds no known label; there is nothing to score.")
    return tasks.labels[known, 0], p[known], as_weights(p, sample_weight)[known]
