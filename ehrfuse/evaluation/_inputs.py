"""What every evaluation function asks of its inputs: labels, probabilities, groups, patterns.

Everything is matched by position, as in scikit-learn: an index may repeat or be shuffled.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd

from ehrfuse._patterns import pattern_labels, presence


class Tasks(NamedTuple):
    """Outcomes as one array of 0, 1 and NaN (unknown), one column per task."""

    labels: np.ndarray
    names: list | None  # None: y was one-dimensional
    positive: object = 1  # the label that counts as yes

    @property
    def known(self):
        return ~np.isnan(self.labels)


def check_labels(y, classes=None) -> Tasks:
    """Yes/no outcomes from a vector of two classes or an array with one column per task.

    `classes`, where an estimator knows them, say which label of a vector is the positive one.
    """
    if np.ndim(y) not in (1, 2):
        raise ValueError(
            f"y has {np.ndim(y)} dimensions; pass one label per row, or one column per task."
        )
    if len(y) == 0:
        raise ValueError("y has no rows; there is nothing to evaluate.")
    if np.ndim(y) == 1:
        labels, positive = _one_task(pd.Series(y), classes)
        return Tasks(labels[:, None], None, positive)
    frame = pd.DataFrame(y)
    try:
        labels = frame.to_numpy(dtype=float, na_value=np.nan)
    except (TypeError, ValueError):
        labels = np.full(frame.shape, 2.0)
    if not np.isin(labels[~np.isnan(labels)], (0, 1)).all():
        raise ValueError(
            "y with one column per task must hold 0, 1 and NaN (unknown) only; "
            "code every task as a yes/no outcome first."
        )
    return Tasks(labels, list(frame.columns))


def _one_task(y: pd.Series, classes) -> tuple[np.ndarray, object]:
    known = y.notna().to_numpy()
    values = y.to_numpy(dtype=object)[known]
    levels = np.unique(values)
    if classes is not None and len(classes) == 2 and np.isin(levels, classes).all():
        positive = classes[1]
    elif all(level in (0, 1) for level in levels):
        positive = 1
    elif len(levels) == 2:
        positive = levels[1]
    else:
        shown = ", ".join(map(repr, levels[:5]))
        raise ValueError(
            f"y holds {len(levels)} classes ({shown}); these scores are for yes/no outcomes: "
            "pass two classes, or one 0/1 column per class."
        )
    labels = np.full(len(y), np.nan)
    labels[known] = values == positive
    return labels, positive


def check_proba(proba, tasks: Tasks, classes=None) -> np.ndarray:
    """Probability of the positive class, shape (n_samples, n_tasks), from any `predict_proba`.

    Accepts (n_samples,), the (n_samples, 2) of a binary classifier, (n_samples, n_tasks), and
    the list of (n_samples, 2) of scikit-learn's multi-output classifiers.
    """
    n_rows, n_tasks = tasks.labels.shape
    if isinstance(proba, list) and len(proba) and np.ndim(proba[0]) == 2:
        levels = classes if classes is not None else [None] * len(proba)
        blocks = zip(proba, levels, strict=True)
        array = np.column_stack([_positive_column(block, level) for block, level in blocks])
    else:
        array = np.asarray(proba, dtype=float)
        if n_tasks == 1:
            array = _positive_column(array, classes, tasks.positive)
    if array.shape != (n_rows, n_tasks):
        raise ValueError(
            f"The probabilities have shape {np.shape(proba)}, but y has {n_rows} rows and "
            f"{n_tasks} task(s); pass predict_proba(X) of the same rows."
        )
    seen = array[tasks.known]
    # A hair of room: float32 sums of ensembles end at 1.0000001.
    if not ((seen >= -1e-6) & (seen <= 1 + 1e-6)).all():
        raise ValueError(
            "The probabilities must lie between 0 and 1 and hold no NaN where the label is known; "
            "pass predict_proba(X), not decision_function(X)."
        )
    return np.clip(array, 0, 1)


def _positive_column(block, classes, positive=1) -> np.ndarray:
    block = np.asarray(block, dtype=float)
    if block.ndim == 2 and block.shape[1] == 2:
        total = block.sum(axis=1)
        if (np.abs(total[np.isfinite(total)] - 1) > 1e-3).any():
            raise ValueError(
                "The two columns of probabilities do not add up to one, so they are two tasks or "
                "two models and not the two classes of one outcome; pass the column of this "
                "outcome."
            )
        return block[:, [1]]
    # A classifier that saw one class gives one column of ones, for that class.
    if block.ndim == 2 and block.shape[1] == 1 and classes is not None and len(classes) == 1:
        return np.full_like(block, float(classes[0] == positive))
    return block[:, None] if block.ndim == 1 else block


def check_frame(X) -> pd.DataFrame:
    """X as it is, if it is a frame with rows and every column name once."""
    if not isinstance(X, pd.DataFrame):
        raise TypeError(f"X is a {type(X).__name__}; pass a pandas DataFrame, one row per case.")
    twice = list(X.columns[X.columns.duplicated()].unique())
    if twice:
        raise ValueError(f"X has the column names {twice} more than once; rename the columns.")
    if len(X) == 0:
        raise ValueError("X has no rows; there is nothing to evaluate.")
    return X


def check_rows(n_rows: int, **others):
    """Raise unless every array among `others` that is not None has `n_rows` rows."""
    for name, other in others.items():
        if other is not None and len(other) != n_rows:
            raise ValueError(f"{name} has {len(other)} rows, but {n_rows} are needed, one per row.")


def group_values(groups, X: pd.DataFrame | None = None, name="groups"):
    """Values of the group of every row: the column that `groups` names, else `groups` itself.

    `name` is that of the parameter, in what is said of a wrong one.
    """
    if isinstance(groups, str):
        if X is None or groups not in X.columns:
            raise ValueError(
                f"{name}={groups!r} names no column here; pass a column of X or one value per row."
            )
        return X[groups]
    if groups is not None and _dimensions(groups) != 1:
        raise ValueError(
            f"{name} has {_dimensions(groups)} dimensions ({type(groups).__name__}); pass one "
            "value per row (of a frame, one column), or the name of a column of X."
        )
    return groups


def _dimensions(values) -> int:
    try:
        return np.ndim(values)
    except ValueError:  # lists of unequal lengths
        return 2


def group_codes(groups, n_rows: int, X: pd.DataFrame | None = None) -> np.ndarray:
    """Group of every row as an integer from 0; without groups every row is its own."""
    groups = group_values(groups, X)
    if groups is None:
        return np.arange(n_rows)
    check_rows(n_rows, groups=groups)
    codes, _ = pd.factorize(pd.Series(groups).to_numpy(dtype=object))
    if (codes < 0).any():
        raise ValueError(
            f"groups is null in {int((codes < 0).sum())} rows; give every row its patient, "
            "or leave these rows out."
        )
    return codes


_TABLE_COLUMNS = {"task", "pattern", "n", "share", "known", "rate", "lo", "hi"}


class Patterns(NamedTuple):
    """Missing patterns of a frame, the most frequent first, the pooled rest last."""

    kinds: pd.DataFrame  # pattern, then one nullable bool column per modality
    rows: np.ndarray  # (n_samples,): which row of `kinds` each case belongs to
    present: pd.DataFrame  # (n_samples, n_modalities) of bool


def check_present(X, modalities) -> pd.DataFrame:
    """Presence of every modality, after X and modalities were looked at."""
    check_frame(X)
    if not isinstance(modalities, Mapping):
        raise TypeError(
            f"modalities is a {type(modalities).__name__}; "
            "pass a dict of modality name to modality, column or list of columns."
        )
    present = presence(X, modalities)
    if present.shape[1] == 0:
        raise ValueError("modalities is empty; name at least one modality and its columns.")
    return present


def estimator_modalities(estimator) -> Mapping:
    """The modalities that an estimator names, itself or one inside it."""
    inner = estimator
    while inner is not None:
        for name in ("modalities_", "modalities"):
            if isinstance(getattr(inner, name, None), Mapping):
                return getattr(inner, name)
        steps = getattr(inner, "steps", None)  # of a pipeline: its last one predicts
        if steps:
            inner = steps[-1][1]
            continue
        inner = getattr(inner, "best_estimator_", getattr(inner, "estimator", None))
    raise ValueError(
        f"{type(estimator).__name__} names no modalities; give them, as a dict of name to "
        "columns, such as {'labs': ['sodium', 'lactate']}."
    )


def find_patterns(X, modalities, *, min_count=1, max_patterns=None, bands=1) -> Patterns:
    """Patterns of X; those of fewer than `min_count` rows or beyond `max_patterns` are pooled.

    With several `bands` what is pooled is divided by how many modalities a row has.
    """
    present = check_present(X, modalities)
    clash = sorted(_TABLE_COLUMNS.intersection(present.columns))
    if clash:
        raise ValueError(f"Modalities are named {clash}, as columns of the table; rename them.")
    flags, first, rows, counts = np.unique(
        present.to_numpy(), axis=0, return_index=True, return_inverse=True, return_counts=True
    )
    labels = pattern_labels(present)[first]
    order = np.lexsort((labels.astype(str), -counts))
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    kinds = pd.DataFrame(flags[order], columns=present.columns, dtype="boolean")
    kinds.insert(0, "pattern", labels[order])
    kept = int((counts >= min_count).sum())
    kept = kept if max_patterns is None else min(kept, max_patterns)
    rows = rank[np.ravel(rows)]
    # A lone rare pattern keeps its name: "other (1 pattern)" would say less.
    if len(kinds) - kept > 1:
        sizes, names = flags[order][kept:].sum(axis=1), []
        places = _bands(sizes, counts[order][kept:], bands)
        for band in range(places.max() + 1):
            own = sizes[places == band]
            span = f", {_span(own)} of {flags.shape[1]}" if places.max() else ""
            names.append(f"other ({len(own)} pattern{'s' * (len(own) > 1)}{span})")
        pooled = pd.DataFrame({"pattern": names})
        pooled = pooled.reindex(columns=kinds.columns).astype(kinds.dtypes)
        kinds = pd.concat([kinds[:kept], pooled], ignore_index=True)
        rows = np.concatenate([np.arange(kept), kept + places])[rows]
    return Patterns(kinds, rows, present)


def _bands(sizes, counts, bands):
    """Band of every pattern: those of one size together, the fullest first, rows about equal."""
    levels = np.unique(sizes)[::-1]
    mass = np.array([counts[sizes == level].sum() for level in levels])
    middle = (np.cumsum(mass) - mass / 2) / mass.sum()
    places = np.minimum((middle * bands).astype(int), bands - 1)
    places = np.unique(places, return_inverse=True)[1]
    return places[np.searchsorted(-levels, -sizes)]


def _span(numbers):
    low, high = int(numbers.min()), int(numbers.max())
    return str(low) if low == high else f"{low} to {high}"
