"""Scores with honest intervals: unknown labels left out, patients resampled whole."""

import warnings

import numpy as np
import pandas as pd
from sklearn.exceptions import UndefinedMetricWarning
from sklearn.utils import check_random_state, check_scalar

from ehrfuse._runtime import check_option
from ehrfuse.evaluation._inputs import (
    check_labels,
    check_proba,
    check_rows,
    find_patterns,
    group_codes,
)
from ehrfuse.evaluation._resampling import (
    METRICS,
    as_weights,
    percentile_interval,
    resampled_weights,
)

_LOSSES = frozenset({"brier", "log_loss"})  # lower is better


def _score(metric, y, p, sample_weight=None):
    """Score of one task; NaN where its known labels are of one class or none."""
    if len(y) == 0 or y.min() == y.max():
        return np.nan
    return float(METRICS[metric](y, p, sample_weight))


class _MaskedScorer:
    """What `masked_scorer` returns; a class at module level, so that it can be pickled."""

    def __init__(self, metric, average):
        self.metric = metric
        self.average = average

    def __repr__(self):
        return f"masked_scorer({self.metric!r}, average={self.average!r})"

    def __call__(self, estimator, X, y, sample_weight=None):
        """Score `estimator` on X and y, higher is better."""
        classes = getattr(estimator, "classes_", None)
        tasks = check_labels(y, classes)
        proba = check_proba(estimator.predict_proba(X), tasks, classes)
        weights = as_weights(proba, sample_weight)
        scores = np.array(
            [
                _score(self.metric, labels[known], p[known], weights[known])
                for labels, known, p in zip(tasks.labels.T, tasks.known.T, proba.T, strict=True)
            ]
        )
        scored = ~np.isnan(scores)
        if not scored.all():
            self._warn(tasks, scored)
        if not scored.any():
            return np.nan
        shares = tasks.known.sum(axis=0)[scored] if self.average == "weighted" else None
        sign = -1.0 if self.metric in _LOSSES else 1.0
        return sign * float(np.average(scores[scored], weights=shares))

    def _warn(self, tasks, scored):
        names = [0] if tasks.names is None else tasks.names
        left_out = [name for name, has in zip(names, scored, strict=True) if not has]
        what = "y" if tasks.names is None else f"task(s) {left_out}"
        end = "they are left out of the average." if scored.any() else "the score is NaN."
        warnings.warn(
            f"{self.metric} needs known labels of both classes, which {what} lacks here; {end}",
            UndefinedMetricWarning,
            stacklevel=3,
        )


def masked_scorer(metric, average="macro"):
    """Scorer for yes/no outcomes of which some labels are unknown.

    Parameters
    ----------
    metric : {"auroc", "auprc", "brier", "log_loss"}
        ``"brier"`` and ``"log_loss"`` are returned negative, so that greater is better.
    average : {"macro", "weighted"}, default="macro"
        Mean over the tasks of `y`: plain, or weighted by their numbers of known labels.

    Returns
    -------
    scorer : callable
        ``scorer(estimator, X, y, sample_weight=None)`` gives a float. It can be pickled and works
        as `scoring` in scikit-learn's `cross_val_score`, `GridSearchCV` and the like.

    Raises
    ------
    ValueError
        If `metric` or `average` is not known.

    Notes
    -----
    `y` is one label per row (two classes, null where unknown), or one 0/1 column per task with NaN
    where unknown; unknown labels are left out task by task. A task whose known labels are of one
    class is skipped with a warning; if none is left the score is NaN.

    The estimator's ``predict_proba`` may be of shape (n_samples, 2), (n_samples, n_tasks), or a
    list of (n_samples, 2). With unknown labels pass `cv` as a splitter object that does not
    look at `y`, such as `KFold` or `GroupKFold`: an integer makes scikit-learn stratify by `y`.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.dummy import DummyClassifier
    >>> from ehrfuse.evaluation import masked_scorer
    >>> X, y = np.zeros((4, 1)), np.array([0.0, 1.0, np.nan, 1.0])
    >>> model = DummyClassifier(strategy="prior").fit(X[:2], [0, 1])
    >>> masked_scorer("auroc")(model, X, y)
    0.5
    """
    check_option(metric, "metric", list(METRICS))
    check_option(average, "average", ["macro", "weighted"])
    return _MaskedScorer(metric, average)


def _check_settings(metrics, n_resamples, confidence):
    for metric in metrics:
        check_option(metric, "metric", list(METRICS))
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
    metrics : str or sequence of {"auroc", "auprc", "brier", "log_loss"}, \
            default=("auroc", "auprc", "brier")
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
    _check_settings(metrics, n_resamples, confidence)
    tasks = check_labels(y)
    proba = check_proba(proba, tasks)
    codes = group_codes(groups, len(proba))
    cells = [(task, metric) for task in range(proba.shape[1]) for metric in metrics]
    draws = {cell: [] for cell in cells}
    for weights in resampled_weights(codes, n_resamples, random_state):
        for task, rows in enumerate(tasks.known.T):
            if not rows.any():
                continue
            known = (tasks.labels[rows, task], proba[rows, task], weights[:, rows])
            for metric in metrics:
                draws[task, metric].append(METRICS[metric](*known))
    table = []
    for task, metric in cells:
        rows = tasks.known[:, task]
        estimate = _score(metric, tasks.labels[rows, task], proba[rows, task])
        some = np.concatenate([[np.nan], *draws[task, metric]])
        lo, hi = (np.nan, np.nan) if np.isnan(estimate) else percentile_interval(some, confidence)
        table.append((estimate, lo, hi, int(rows.sum())))
    names = [(None if tasks.names is None else tasks.names[task], m) for task, m in cells]
    index = pd.MultiIndex.from_tuples(names, names=["task", "metric"])
    index = index.droplevel("task") if tasks.names is None else index
    return pd.DataFrame(table, index=index, columns=["estimate", "lo", "hi", "n"])


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
    metric : {"auroc", "auprc", "brier", "log_loss"}, default="auroc"
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
        score and the log loss) and `n` (rows with a known label). A frame with one row per
        task if `y` has one column per task.

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
    _check_settings([metric], n_resamples, confidence)
    tasks = check_labels(y)
    a, b = check_proba(proba_a, tasks), check_proba(proba_b, tasks)
    codes = group_codes(groups, len(a))
    draws = [[] for _ in range(a.shape[1])]
    for weights in resampled_weights(codes, n_resamples, random_state):
        for task, rows in enumerate(tasks.known.T):
            if rows.any():
                labels, some, score = tasks.labels[rows, task], weights[:, rows], METRICS[metric]
                lead = score(labels, a[rows, task], some) - score(labels, b[rows, task], some)
                draws[task].append(lead)
    table = []
    for task, rows in enumerate(tasks.known.T):
        labels = tasks.labels[rows, task]
        lead = _score(metric, labels, a[rows, task]) - _score(metric, labels, b[rows, task])
        table.append((lead, *_lead_summary(lead, draws[task], metric, confidence), rows.sum()))
    columns = ["difference", "lo", "hi", "share_a_better", "n"]
    index = pd.Index([metric] if tasks.names is None else tasks.names, name="task")
    result = pd.DataFrame(table, index=index, columns=columns)
    return result.iloc[0] if tasks.names is None else result


def _lead_summary(lead, draws, metric, confidence):
    """Interval and share of resamples in which a is better, or NaN without both classes."""
    if np.isnan(lead):
        return np.nan, np.nan, np.nan
    draws = np.concatenate(draws)
    draws = draws[~np.isnan(draws)]
    better = -draws if metric in _LOSSES else draws
    share = float(np.mean((better > 0) + 0.5 * (better == 0))) if len(draws) else np.nan
    return *percentile_interval(draws, confidence), share


def score_by_pattern(
    y,
    proba,
    X,
    modalities,
    *,
    metrics=("auroc", "auprc", "brier"),
    groups=None,
    min_count=50,
    n_resamples=1000,
    confidence=0.95,
    random_state=None,
):
    """Scores within each missing pattern.

    Parameters
    ----------
    y : array-like of shape (n_samples,) or (n_samples, n_tasks)
        Yes/no outcomes, null where unknown, as in `bootstrap_scores`.
    proba : array-like or list
        Probabilities of held-out rows, as `predict_proba` gives them.
    X : DataFrame of shape (n_samples, n_columns)
        The same rows, from which the patterns are read.
    modalities : dict of str to modality, str or list of str
        Columns of every modality; a modality is present where any of its cells is not null.
    metrics : str or sequence of {"auroc", "auprc", "brier", "log_loss"}, \
            default=("auroc", "auprc", "brier")
    groups : str or array-like of shape (n_samples,), default=None
        Patient of every row, or the column of X that holds it.
    min_count : int, default=50
        Patterns with fewer rows are pooled into one last row ``"other (k patterns)"``.
    n_resamples : int, default=1000
    confidence : float, default=0.95
    random_state : int, RandomState instance or None, default=None

    Returns
    -------
    table : DataFrame
        One row per pattern (and per `task` if `y` has one column per task), the most frequent
        first: `pattern`, `n` (rows), `known` (rows with a known label), `rate` (share of events),
        `mean_prediction`, and for each metric its estimate, `<metric>_lo` and `<metric>_hi`; NaN
        where a pattern holds one class.

    See Also
    --------
    outcome_by_pattern : The outcome rates alone, with intervals.

    Examples
    --------
    >>> import pandas as pd
    >>> from ehrfuse.evaluation import score_by_pattern
    >>> X = pd.DataFrame({"ph": [7.4, None, 7.1, None, 7.3, 7.2], "note": list("abcdef")})
    >>> table = score_by_pattern(
    ...     [0, 0, 1, 1, 0, 1], [0.1, 0.4, 0.8, 0.3, 0.2, 0.9], X,
    ...     {"gas": "ph", "note": "note"}, metrics=["auroc"], min_count=1, random_state=0,
    ... )
    >>> table[["pattern", "n", "rate", "mean_prediction", "auroc"]]
        pattern  n  rate  mean_prediction  auroc
    0  gas+note  4   0.5             0.50    1.0
    1      note  2   0.5             0.35    0.0
    """
    metrics = [metrics] if isinstance(metrics, str) else list(metrics)
    _check_settings(metrics, n_resamples, confidence)
    tasks = check_labels(y)
    proba = check_proba(proba, tasks)
    patterns = find_patterns(X, modalities, min_count=min_count)
    check_rows(len(X), y=y)
    codes = group_codes(groups, len(X), X)
    settings = {
        "metrics": metrics,
        "n_resamples": n_resamples,
        "confidence": confidence,
        "random_state": check_random_state(random_state),
    }
    table = []
    for task, known in enumerate(tasks.known.T):
        for kind, pattern in enumerate(patterns.kinds["pattern"]):
            inside = patterns.rows == kind
            rows = inside & known
            row = {} if tasks.names is None else {"task": tasks.names[task]}
            row |= {"pattern": pattern, "n": int(inside.sum()), "known": int(rows.sum())}
            row |= _pattern_scores(
                tasks.labels[rows, task], proba[rows, task], codes[rows], settings
            )
            table.append(row)
    return pd.DataFrame(table)


def _pattern_scores(labels, p, codes, settings):
    scores = {"rate": np.nan, "mean_prediction": np.nan}
    if len(labels):
        scores = {"rate": labels.mean(), "mean_prediction": p.mean()}
        found = bootstrap_scores(labels, p, groups=codes, **settings)
    for metric in settings["metrics"]:
        row = found.loc[metric] if len(labels) else dict.fromkeys(["estimate", "lo", "hi"], np.nan)
        scores |= {metric: row["estimate"], f"{metric}_lo": row["lo"], f"{metric}_hi": row["hi"]}
    return scores
