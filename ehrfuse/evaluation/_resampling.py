"""Metrics of weighted rows, and the weights of a patient bootstrap.

Every metric is one function of labels, probabilities and weights. The weights may be a matrix
with one row per resample, so that a bootstrap of thousands of resamples is a few array operations
on predictions sorted once, not thousands of calls.
"""

import numpy as np
from sklearn.utils import check_random_state

N_BINS = 10  # of the calibration error
CELLS_AT_ONCE = 1_000_000  # of the weight matrix: 8 MB stay in cache and bound the memory


def _at_positives(y, p, weights):
    """At every probability that a positive has, highest first: weights of positives and negatives.

    Only there do the two areas move, and most clinical outcomes are rare.

    Returns
    -------
    here : the positives with this probability
    above, upto : the negatives with a higher one, and with a higher or equal one
    total : all negatives
    """
    own, others = np.flatnonzero(y == 1), np.flatnonzero(y != 1)
    own, others = (rows[np.argsort(-p[rows], kind="stable")] for rows in (own, others))
    falls = -p[own]
    starts = np.flatnonzero(np.diff(falls, prepend=-np.inf))
    here = np.add.reduceat(weights[..., own], starts, axis=-1)
    passed = np.zeros((*weights.shape[:-1], len(others) + 1))
    np.cumsum(weights[..., others], axis=-1, out=passed[..., 1:])
    above, upto = (
        passed[..., np.searchsorted(-p[others], falls[starts], side)] for side in ("left", "right")
    )
    return here, above, upto, passed[..., -1]


def as_weights(y, sample_weight):
    return np.ones(len(y)) if sample_weight is None else np.asarray(sample_weight, dtype=float)


def _auroc(y, p, sample_weight=None):
    here, above, upto, total = _at_positives(y, p, as_weights(y, sample_weight))
    # A tie between a case and a control counts one half.
    won = (here * (total[..., None] - (above + upto) / 2)).sum(axis=-1)
    with np.errstate(invalid="ignore"):
        return won / (here.sum(axis=-1) * total)


def _auprc(y, p, sample_weight=None):
    here, _, upto, total = _at_positives(y, p, as_weights(y, sample_weight))
    true = np.cumsum(here, axis=-1)
    with np.errstate(invalid="ignore"):
        precision = np.nan_to_num(true / (true + upto))
        area = (here * precision).sum(axis=-1) / here.sum(axis=-1)
    return np.where(total > 0, area, np.nan)[()]


def _mean_loss(loss, sample_weight):
    weights = as_weights(loss, sample_weight)
    with np.errstate(invalid="ignore"):
        return weights @ loss / weights.sum(axis=-1)


def _brier(y, p, sample_weight=None):
    return _mean_loss((p - y) ** 2, sample_weight)


def _log_loss(y, p, sample_weight=None):
    eps = np.finfo(float).eps
    return _mean_loss(-np.log(np.clip(np.where(y == 1, p, 1 - p), eps, 1 - eps)), sample_weight)


def calibration_bins(p, n_bins, strategy):
    """Bin of every prediction, from 0; bins hold (lower, upper], as in `calibration_curve`."""
    shares = np.linspace(0, 1, n_bins + 1)
    edges = shares if strategy == "uniform" else np.quantile(p, shares)
    return np.searchsorted(edges[1:-1], p)


def _binned_error(strategy):
    def error(y, p, sample_weight=None):
        # Bins are those of all rows, so that every resample is scored on the same ones.
        bins = calibration_bins(p, N_BINS, strategy)
        gaps = np.where(bins[:, None] == np.arange(N_BINS), (y - p)[:, None], 0.0)
        weights = as_weights(y, sample_weight)
        with np.errstate(invalid="ignore"):
            return np.abs(weights @ gaps).sum(axis=-1) / weights.sum(axis=-1)

    return error


def benefits(y, p, threshold):
    """What each row adds to the net benefit: 1 for a true positive, less the odds for a false."""
    odds = threshold / (1 - threshold)
    return np.where(p >= threshold, y - (1 - y) * odds, 0.0)


METRICS = {
    "auroc": _auroc,
    "auprc": _auprc,
    "brier": _brier,
    "log_loss": _log_loss,
    "ece": _binned_error("quantile"),
    "ece_uniform": _binned_error("uniform"),
}
"""Metric name to function of (y, p, sample_weight); weights of (n_resamples, n_samples) give one
score per resample. ``"auprc"`` is the average precision; ``"ece"`` the expected calibration error
over ten bins of equal counts, ``"ece_uniform"`` over ten of equal width. Wherever a metric is
named, ``"net_benefit@0.2"`` is the net benefit at that threshold."""

LOSSES = frozenset({"brier", "log_loss", "ece", "ece_uniform"})  # lower is better


def metric_function(name):
    """Function of a metric's name, or one sentence that says which there are."""
    if isinstance(name, str) and name in METRICS:
        return METRICS[name]
    kind, _, threshold = str(name).partition("@")
    try:
        value = float(threshold)
    except ValueError:
        value = np.nan
    if kind != "net_benefit" or not 0 < value < 1:
        allowed = ", ".join(map(repr, METRICS))
        raise ValueError(
            f"metric={name!r} is not known; choose one of {allowed}, or 'net_benefit@T' with a "
            "threshold T between 0 and 1, such as 'net_benefit@0.2'."
        )
    return lambda y, p, sample_weight=None: _mean_loss(benefits(y, p, value), sample_weight)


def one_score(metric, y, p, sample_weight=None):
    """Score of one task; NaN where its known labels are of one class or none."""
    if len(y) == 0 or y.min() == y.max():
        return np.nan
    return float(metric_function(metric)(y, p, sample_weight))


def resampled_weights(codes, n_resamples, random_state):
    """How often each row is drawn, groups whole: arrays (some resamples, n_samples)."""
    rng = check_random_state(random_state)
    n_groups = int(codes.max()) + 1
    at_once = max(1, CELLS_AT_ONCE // len(codes))
    for start in range(0, n_resamples, at_once):
        size = min(at_once, n_resamples - start)
        drawn = rng.randint(n_groups, size=(size, n_groups))
        drawn += n_groups * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * n_groups)
        yield counts.reshape(size, n_groups)[:, codes].astype(float)


def bootstrap_draws(tasks, probas, codes, metrics, n_resamples, random_state):
    """Scores of every resample, shape (n_models, n_tasks, n_metrics, n_resamples).

    All models and tasks are scored on the same resamples, so that differences are paired.
    """
    metrics = [metric_function(metric) for metric in metrics]
    n_tasks = tasks.labels.shape[1]
    draws = np.full((len(probas), n_tasks, len(metrics), n_resamples), np.nan)
    done = 0
    for weights in resampled_weights(codes, n_resamples, random_state):
        end = done + len(weights)
        for task, rows in enumerate(tasks.known.T):
            if not rows.any():
                continue
            labels, some = tasks.labels[rows, task], weights[:, rows]
            for model, proba in enumerate(probas):
                for place, metric in enumerate(metrics):
                    draws[model, task, place, done:end] = metric(labels, proba[rows, task], some)
        done = end
    return draws


def centred(draws, estimate, metric):
    """Draws without the excess of resampling: repeated rows look worse calibrated than they are."""
    if not str(metric).startswith("ece") or np.isnan(draws).all():
        return draws
    return draws - (np.nanmean(draws) - estimate)


def percentile_interval(draws, confidence):
    """Percentile interval; resamples without both classes have no score and are left out."""
    draws = draws[~np.isnan(draws)]
    if len(draws) == 0:
        return np.nan, np.nan
    return tuple(np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2]))
