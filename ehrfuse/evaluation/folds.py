"""Out-of-fold predictions where labels may be unknown and patients repeat."""

from numbers import Integral

import numpy as np
from sklearn.base import clone
from sklearn.model_selection import GroupKFold, KFold, StratifiedKFold

from ehrfuse.evaluation._inputs import group_values


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
        Patient of every row, or the column of X that holds it.

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
    groups = None if groups is None else np.asarray(group_values(groups, X))
    n_rows = len(y)
    if isinstance(cv, Integral):
        several = np.ndim(y) == 2 and np.shape(y)[1] > 1
        kind = GroupKFold if groups is not None else KFold if several else StratifiedKFold
        cv = kind(cv)
    proba = None
    for train, test in cv.split(np.zeros(n_rows), y, groups):
        model = clone(estimator).fit(_take(X, train), _take(y, train))
        part = np.asarray(model.predict_proba(_take(X, test)))
        if proba is None:
            proba = np.full((n_rows, part.shape[1]), np.nan)
        proba[test] = part
    return proba


def _take(table, rows):
    return table.iloc[rows] if hasattr(table, "iloc") else np.asarray(table)[rows]
