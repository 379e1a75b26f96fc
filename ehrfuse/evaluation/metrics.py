"""Scores with honest intervals: unknown labels left out, patients resampled whole."""

import numpy as np
import pandas as pd
from sklearn.utils import check_scalar

from ehrfuse.evaluation._inputs import check_labels, check_proba, group_codes
from ehrfuse.evaluation._resampling import (
    LOSSES,
    METRICS,
    bootstrap_draws,
    centred,
    metric_function,
    one_score,
    percentile_interval,
)

__all__ = ["METRICS", "bootstrap_scores", "paired_difference"]


def check_settings(metrics, n_resamples, confidence):
    """Raise unless every metric is known, resamples are counted and the confidence is a share."""
    for metric in metrics:
        metric_function(metric)
    check_scalar(n_resamples, "n_resamples", (int, np.integer), min_val=1)
    check_scalar(
        confidence, "confidence", float, min_val=0, max_val=1, include_boundaries="neither"
    )


def bootstrap_scores(
    y,
    proba,
    *,
    groups=None,
    metrics=("auroc", "auprc", "brier"),
    n_resamples=2000,
    confidence=0.95,
    random_state=None,
):
    """Scores of predictions with patient-bootstrap intervals.

    Parameters
    ----------
    y : array-like of shape (n_samples,) or (n_samples, n_tasks)
        Yes/no outcomes: two classes (the second in sorted order is the positive one), or one 0/1
        column per task. Null means unknown and is left out.
    proba : array-like of shape (n_samples,), (n_samples, 2) or (n_samples, n_tasks), or list
        Probabilities of held-out rows, as `predict_proba` gives them.
    groups : array-like of shape (n_samples,), default=None
        Patient of every row; patients are resampled whole. None takes every row for a patient.
    metrics : str or sequence of str, default=("auroc", "auprc", "brier")
        Names of `METRICS`: ``"auroc"``, ``"auprc"`` (average precision), ``"brier"``,
        ``"log_loss"``, ``"ece"`` (calibration error, ten bins of equal counts), ``"ece_uniform"``
        (ten of equal width), or ``"net_benefit@T"`` at a threshold T.
    n_resamples : int, default=2000
    confidence : float, default=0.95
        Coverage of the percentile interval.
    random_state : int, RandomState instance or None, default=None

    Returns
    -------
    scores : DataFrame
        Columns `estimate`, `lo`, `hi` and `n` (rows with a known label), indexed by `metric`, or
        by (`task`, `metric`) if `y` has one column per task. NaN where the known labels are
        of one class.

    See Also
    --------
    paired_difference : Two models on the same rows.

    Notes
    -----
    The interval says how the scores of these fixed predictions would vary over other patients of
    the same kind. It does not hold the variation of fitting again: average out-of-fold predictions
    over several seeds first.

    Resampling repeats rows, which by itself raises a calibration error; the interval of ``"ece"``
    is shifted by that excess. The estimate itself is too high too in small sets: a perfect model of
    n rows has an error near ``sqrt(20 p (1 - p) / (pi n))``.

    References
    ----------
    Efron B, Tibshirani RJ. An Introduction to the Bootstrap. Chapman & Hall, 1993.

    Examples
    --------
    >>> from ehrfuse.evaluation import bootstrap_scores
    >>> died = [0, 0, 1, 1, 0, 1]
    >>> risk = [0.1, 0.4, 0.8, 0.3, 0.2, 0.9]
    >>> bootstrap_scores(died, risk, random_state=0)["estimate"].round(3).to_dict()
    {'auroc': 0.889, 'auprc': 0.917, 'brier': 0.125}
    """
    metrics = [metrics] if isinstance(metrics, str) else list(metrics)
    check_settings(metrics, n_resamples, confidence)
    tasks = check_labels(y)
    proba = check_proba(proba, tasks)
    codes = group_codes(groups, len(proba))
    draws = bootstrap_draws(tasks, [proba], codes, metrics, n_resamples, random_state)[0]
    table, names = [], []
    for task, rows in enumerate(tasks.known.T):
        labels, own = tasks.labels[rows, task], proba[rows, task]
        for metric, some in zip(metrics, draws[task], strict=True):
            table.append((*score_and_interval(metric, labels, own, some, confidence), rows.sum()))
            names.append((None if tasks.names is None else tasks.names[task], metric))
    index = pd.MultiIndex.from_tuples(names, names=["task", "metric"])
    index = index.droplevel("task") if tasks.names is None else index
    return pd.DataFrame(table, index=index, columns=["estimate", "lo", "hi", "n"])


def score_and_interval(metric, y, p, draws, confidence):
    """Estimate of one task with its interval; NaN without both classes."""
    estimate = one_score(metric, y, p)
    if np.isnan(estimate):
        return np.nan, np.nan, np.nan
    lo, hi = percentile_interval(centred(draws, estimate, metric), confidence)
    return estimate, max(0.0, lo) if str(metric).startswith("ece") else lo, hi


def paired_difference(
    y,
    proba_a,
    proba_b,
    *,
    metric="auroc",
    groups=None,
    n_resamples=2000,
    confidence=0.95,
    random_state=None,
):
    """Difference of two models' scores on the same rows, with a paired patient bootstrap.

    Parameters
    ----------
    y : array-like of shape (n_samples,) or (n_samples, n_tasks)
        Yes/no outcomes, null where unknown, as in `bootstrap_scores`.
    proba_a, proba_b : array-like or list
        Probabilities of both models for the same rows, as `predict_proba` gives them.
    metric : str, default="auroc"
        A name as in `bootstrap_scores`.
    groups : array-like of shape (n_samples,), default=None
        Patient of every row; patients are resampled whole.
    n_resamples : int, default=2000
    confidence : float, default=0.95
    random_state : int, RandomState instance or None, default=None

    Returns
    -------
    result : Series or DataFrame
        `difference` (score of a minus score of b), `lo`, `hi`, `share_a_better` (share of the
        resamples in which a is better, ties counting one half; lower is better for the Brier
        score, the log loss and the calibration error) and `n` (rows with a known label). A frame
        with one row per task if `y` has one column per task.

    Notes
    -----
    Both models are scored on the same resamples, so what they share cancels: this interval is
    narrower than the two single ones suggest, and it is the one to compare models by.

    Examples
    --------
    >>> from ehrfuse.evaluation import paired_difference
    >>> died = [0, 0, 1, 1, 0, 1]
    >>> good, coin = [0.1, 0.4, 0.8, 0.3, 0.2, 0.9], [0.5] * 6
    >>> paired_difference(died, good, coin, random_state=0)["difference"].round(3)
    np.float64(0.389)
    """
    check_settings([metric], n_resamples, confidence)
    tasks = check_labels(y)
    a, b = check_proba(proba_a, tasks), check_proba(proba_b, tasks)
    codes = group_codes(groups, len(a))
    draws = bootstrap_draws(tasks, [a, b], codes, [metric], n_resamples, random_state)[:, :, 0]
    table = []
    for task, rows in enumerate(tasks.known.T):
        labels = tasks.labels[rows, task]
        lead = one_score(metric, labels, a[rows, task]) - one_score(metric, labels, b[rows, task])
        leads = draws[0, task] - draws[1, task]
        table.append((lead, *lead_summary(lead, leads, metric, confidence), rows.sum()))
    columns = ["difference", "lo", "hi", "share_a_better", "n"]
    index = pd.Index([metric] if tasks.names is None else tasks.names, name="task")
    result = pd.DataFrame(table, index=index, columns=columns)
    return result.iloc[0] if tasks.names is None else result


def lead_summary(lead, draws, metric, confidence):
    """Interval and share of resamples in which a is better, or NaN without both classes."""
    if np.isnan(lead):
        return np.nan, np.nan, np.nan
    draws = centred(draws[~np.isnan(draws)], lead, metric)
    better = -draws if metric in LOSSES else draws
    share = float(np.mean((better > 0) + 0.5 * (better == 0))) if len(draws) else np.nan
    return *percentile_interval(draws, confidence), share
