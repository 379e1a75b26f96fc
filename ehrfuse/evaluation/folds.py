"""Out-of-fold predictions where labels may be unknown and patients repeat."""

import warnings
from numbers import Integral

import numpy as np
from sklearn.base import clone
from sklearn.model_selection import GroupKFold, KFold, StratifiedGroupKFold, StratifiedKFold

from ehrfuse.evaluation._features import is_same
from ehrfuse.evaluation._inputs import check_labels, group_codes, group_values


def out_of_fold(estimator, X, y, *, cv=5, groups=None):
    """Predict every row by a model that has not seen it, nor another row of its patient.

    Parameters
    ----------
    estimator : classifier with `predict_proba`
        Cloned and fitted once a fold.
    X : DataFrame of shape (n_samples, n_columns)
    y : array-like of shape (n_samples,) or (n_samples, n_tasks)
        With several tasks, NaN where a label is unknown.
    cv : int or splitter, default=5
        A number of folds is split by patient if `groups` is given, else in proportion to the
        classes of a 1-D `y`.
    groups : str or array-like of shape (n_samples,), default=None
        Patient of every row, or the column of X that holds it. The estimator sees that
        column too; one that reads all columns should be given X without it, and an array here.

    Returns
    -------
    proba : array of shape (n_samples, n_classes) or (n_samples, n_tasks)
        NaN in rows that no fold held out.

    See Also
    --------
    bootstrap_scores : Scores of such predictions with intervals.

    Notes
    -----
    :func:`sklearn.model_selection.cross_val_predict` does the same for a 1-D `y`; with several
    tasks it numbers the labels first and takes NaN for a class.

    Examples
    --------
    >>> from sklearn.linear_model import LogisticRegression
    >>> from ehrfuse.evaluation import out_of_fold
    >>> X, y = [[0.0], [1.0], [2.0], [3.0]] * 5, [0, 0, 1, 1] * 5
    >>> out_of_fold(LogisticRegression(), X, y).shape
    (20, 2)
    """
    group_codes(groups, len(y), X)  # refuses what is no patient of every row
    groups = None if groups is None else np.asarray(group_values(groups, X))
    proba = None
    for train, test in make_splits(y, cv, groups):
        model = clone(estimator).fit(take(X, train), take(y, train))
        part = np.asarray(model.predict_proba(take(X, test)))
        if proba is None:
            proba = np.full((len(y), part.shape[1]), np.nan)
        proba[test] = part
    return proba


def take(table, rows):
    """Some rows of a frame or array."""
    return table.iloc[rows] if hasattr(table, "iloc") else np.asarray(table)[rows]


def hide_groups(estimator, X, groups):
    """X as the model may see it, and the groups as an array.

    A column that tells the groups is no feature: it goes, unless the estimator has a `groups`
    parameter that names it.
    """
    if groups is None:
        return X, None
    values = np.asarray(group_values(groups, X))
    params = estimator.get_params(deep=True).items()
    named = [v for name, v in params if name.split("__")[-1] == "groups" and isinstance(v, str)]
    away = [column for column in _group_columns(X, groups, values) if column not in named]
    return (X.drop(columns=away) if away else X), values


def _group_columns(X, groups, values):
    """Columns that tell the groups: by the name given, by that of a Series, or by every value."""
    name = groups if isinstance(groups, str) else getattr(groups, "name", None)
    columns = getattr(X, "columns", ())
    return [c for c in columns if (name is not None and c == name) or is_same(X[c], values)]


def make_splits(y, cv, groups=None, seed=None):
    """Pairs of training and test rows, patients whole; shuffled if there is a seed.

    With a seed, classes of a 1-D `y` are spread over the folds of patients too.
    """
    n_rows = len(y)
    strata = y
    if isinstance(cv, Integral):
        several = np.ndim(y) == 2 and np.shape(y)[1] > 1
        shuffle = {} if seed is None else {"shuffle": True, "random_state": seed}
        if groups is None:
            kind = KFold if several else StratifiedKFold
        else:
            kind = GroupKFold if several or seed is None else StratifiedGroupKFold
        cv = kind(cv, **shuffle)
        if seed is not None and not several:
            strata = np.nan_to_num(check_labels(y).labels[:, 0], nan=2.0)  # unknown: a class
    with warnings.catch_warnings():  # a splitter without eyes for groups is found out below
        warnings.filterwarnings("ignore", message="The groups parameter is ignored")
        if hasattr(cv, "split"):
            splits = list(cv.split(np.zeros(n_rows), strata, groups))
        else:  # pairs of rows, as scikit-learn takes them
            splits = [tuple(map(_row_numbers, pair)) for pair in cv]
    for train, test in splits if groups is not None else ():
        both = np.intersect1d(groups[train], groups[test])
        if len(both):
            raise ValueError(
                f"cv={cv!r} puts {len(both)} patients into the training and the test rows of one "
                "fold; use a splitter that respects groups, such as GroupKFold(5), or an integer."
            )
    return splits


def _row_numbers(rows):
    rows = np.asarray(rows)
    return np.flatnonzero(rows) if rows.dtype == bool else rows
