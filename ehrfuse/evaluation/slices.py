"""Scores within parts of the data: missing patterns, and subgroups of patients."""

from typing import NamedTuple

import numpy as np
import pandas as pd
from sklearn.utils import check_random_state

from ehrfuse.evaluation._inputs import (
    check_labels,
    check_proba,
    check_rows,
    find_patterns,
    group_codes,
)
from ehrfuse.evaluation.metrics import bootstrap_scores, check_settings

MAX_SUBGROUPS = 20  # beyond this, values that are all rare are numbers, not groups


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
    metrics : str or sequence of str, default=("auroc", "auprc", "brier")
        Names as in `bootstrap_scores`.
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
    patterns = find_patterns(X, modalities, min_count=min_count)
    check_rows(len(X), y=y)
    slices = _Slices(patterns.kinds["pattern"].tolist(), patterns.rows)
    codes = group_codes(groups, len(X), X)
    return _score_slices(
        y, proba, [({}, "pattern", slices)], codes, metrics, n_resamples, confidence, random_state
    )


def score_by_subgroup(
    y,
    proba,
    subgroups,
    *,
    metrics=("auroc", "auprc", "brier"),
    groups=None,
    min_count=50,
    n_resamples=1000,
    confidence=0.95,
    random_state=None,
):
    """Scores within subgroups of patients, such as sex, age band or hospital.

    Parameters
    ----------
    y : array-like of shape (n_samples,) or (n_samples, n_tasks)
        Yes/no outcomes, null where unknown, as in `bootstrap_scores`.
    proba : array-like or list
        Probabilities of held-out rows, as `predict_proba` gives them.
    subgroups : Series, DataFrame or array-like of shape (n_samples,)
        The subgroup of every row; each column of a frame is one way to divide the rows, scored
        after the other. Null is a subgroup of its own, ``"(unknown)"``.
    metrics : str or sequence of str, default=("auroc", "auprc", "brier")
        Names as in `bootstrap_scores`.
    groups : array-like of shape (n_samples,), default=None
        Patient of every row, for the bootstrap.
    min_count : int, default=50
        Subgroups with fewer rows are pooled into one last row ``"other (k values)"``; a single
        rare one keeps its name.
    n_resamples : int, default=1000
    confidence : float, default=0.95
    random_state : int, RandomState instance or None, default=None

    Returns
    -------
    table : DataFrame
        One row per subgroup (and per `task` if `y` has one column per task): `by` (what divides),
        `subgroup`, `n` (rows), `known` (rows with a known label), `rate` (share of events),
        `mean_prediction`, and for each metric its estimate, `<metric>_lo` and `<metric>_hi`; NaN
        where a subgroup holds one class.

    See Also
    --------
    score_by_pattern : The same for missing patterns.
    worst_group_scorer : The lowest of them as a scorer.

    Examples
    --------
    >>> from ehrfuse.evaluation import score_by_subgroup
    >>> table = score_by_subgroup(
    ...     [0, 0, 1, 1, 0, 1], [0.1, 0.4, 0.8, 0.3, 0.2, 0.9], list("ffffmm"),
    ...     metrics=["auroc"], min_count=1, random_state=0,
    ... )
    >>> table[["by", "subgroup", "n", "rate", "auroc"]]
             by subgroup  n  rate  auroc
    0  subgroup        f  4   0.5   0.75
    1  subgroup        m  2   0.5   1.00
    """
    frame = subgroups if isinstance(subgroups, pd.DataFrame) else pd.Series(subgroups).to_frame()
    check_rows(len(y), subgroups=frame)
    ways = []
    for place, name in enumerate(frame.columns):
        name = "subgroup" if name in (0, None) else name
        slices = subgroup_slices(frame.iloc[:, place], name, min_count)
        ways.append(({"by": name}, "subgroup", slices))
    codes = group_codes(groups, len(y))
    return _score_slices(y, proba, ways, codes, metrics, n_resamples, confidence, random_state)


class _Slices(NamedTuple):
    """A division of the rows: names of its parts, and the part of every row."""

    names: list
    rows: np.ndarray


def subgroup_slices(cells, name, min_count):
    """Rows by the value of a column, the rare values pooled last."""
    values = cells.astype(object).where(cells.notna(), "(unknown)")
    counts = values.value_counts(sort=False).sort_index(key=lambda index: index.map(str))
    rare = counts[counts < min_count]
    if len(counts) > MAX_SUBGROUPS and len(rare) == len(counts):
        raise ValueError(
            f"Subgroups by {name!r} have {len(counts)} distinct values, none in {min_count} rows; "
            "cut numbers into bands first, as by pandas.cut, or lower min_count."
        )
    names = [value for value in counts.index if value not in rare.index or len(rare) == 1]
    places = {value: place for place, value in enumerate(names)}
    rows = values.map(lambda value: places.get(value, len(names))).to_numpy(dtype=int)
    pooled = [] if len(rare) < 2 else [f"other ({len(rare)} values)"]
    return _Slices(names + pooled, rows)


def _score_slices(y, proba, ways, codes, metrics, n_resamples, confidence, random_state):
    metrics = [metrics] if isinstance(metrics, str) else list(metrics)
    check_settings(metrics, n_resamples, confidence)
    tasks = check_labels(y)
    proba = check_proba(proba, tasks)
    settings = {
        "metrics": metrics,
        "n_resamples": n_resamples,
        "confidence": confidence,
        "random_state": check_random_state(random_state),
    }
    table = []
    for task, known in enumerate(tasks.known.T):
        for way, kind, slices in ways:
            for place, name in enumerate(slices.names):
                inside = slices.rows == place
                rows = inside & known
                row = {} if tasks.names is None else {"task": tasks.names[task]}
                row |= way | {kind: name, "n": int(inside.sum()), "known": int(rows.sum())}
                row |= _slice_scores(
                    tasks.labels[rows, task], proba[rows, task], codes[rows], settings
                )
                table.append(row)
    return pd.DataFrame(table)


def _slice_scores(labels, p, codes, settings):
    scores = {"rate": np.nan, "mean_prediction": np.nan}
    if len(labels):
        scores = {"rate": labels.mean(), "mean_prediction": p.mean()}
        found = bootstrap_scores(labels, p, groups=codes, **settings)
    for metric in settings["metrics"]:
        row = found.loc[metric] if len(labels) else dict.fromkeys(["estimate", "lo", "hi"], np.nan)
        scores |= {metric: row["estimate"], f"{metric}_lo": row["lo"], f"{metric}_hi": row["hi"]}
    return scores
