"""Metrics of weighted rows, and the weights of a patient bootstrap.

Every metric is one function of labels, probabilities and weights. The weights may be a matrix
with one row per resample, so that a bootstrap of thousands of resamples is a few array operations
on predictions sorted once, not thousands of calls.
"""

import numpy as np
from sklearn.utils import check_random_state

CELLS_AT_ONCE = 1_000_000  # of the weight matrix: 8 MB stay in cache and bound the memory


def _cumulated(y, p, weights):
    """Weighted true and false positives at every distinct threshold, highest first."""
    order = np.argsort(-p, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(p[order])), len(p) - 1)
    weights, positive = weights[..., order], y[order]
    true = np.cumsum(weights * positive, axis=-1)[..., ends]
    false = np.cumsum(weights * (1 - positive), axis=-1)[..., ends]
    return true, false


def as_weights(y, sample_weight):
    return np.ones(len(y)) if sample_weight is None else np.asarray(sample_weight, dtype=float)


def _auroc(y, p, sample_weight=None):
    true, false = _cumulated(y, p, as_weights(y, sample_weight))
    steps = np.diff(false, axis=-1, prepend=0)
    # A tie between a case and a control counts one half: the trapezoid.
    area = (steps * (true - np.diff(true, axis=-1, prepend=0) / 2)).sum(axis=-1)
    with np.errstate(invalid="ignore"):
        return area / (true[..., -1] * false[..., -1])


def _auprc(y, p, sample_weight=None):
    true, false = _cumulated(y, p, as_weights(y, sample_weight))
    with np.errstate(invalid="ignore"):
        precision = np.nan_to_num(true / (true + false))
        area = (np.diff(true, axis=-1, prepend=0) * precision).sum(axis=-1) / true[..., -1]
    return np.where(false[..., -1] > 0, area, np.nan)[()]


def _mean_loss(loss, sample_weight):
    weights = as_weights(loss, sample_weight)
    with np.errstate(invalid="ignore"):
        return weights @ loss / weights.sum(axis=-1)


def _brier(y, p, sample_weight=None):
    return _mean_loss((p - y) ** 2, sample_weight)


def _log_loss(y, p, sample_weight=None):
    eps = np.finfo(float).eps
    return _mean_loss(-np.log(np.clip(np.where(y == 1, p, 1 - p), eps, 1 - eps)), sample_weight)


METRICS = {"auroc": _auroc, "auprc": _auprc, "brier": _brier, "log_loss": _log_loss}
"""Metric name to function of (y, p, sample_weight); weights of (n_resamples, n_samples) give one
score per resample. ``"auprc"`` is the average precision."""


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


def percentile_interval(draws, confidence):
    """Percentile interval; resamples without both classes have no score and are left out."""
    draws = draws[~np.isnan(draws)]
    if len(draws) == 0:
        return np.nan, np.nan
    return tuple(np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2]))
