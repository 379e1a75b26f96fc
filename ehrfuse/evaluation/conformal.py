"""Prediction sets that hold the truth as often as promised, within each missing pattern."""

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import NotFittedError
from sklearn.utils import check_scalar
from sklearn.utils.validation import check_is_fitted

from ehrfuse._patterns import pattern_labels
from ehrfuse._runtime import check_option, import_optional
from ehrfuse.evaluation._inputs import (
    check_present,
    check_rows,
    estimator_modalities,
    find_patterns,
    group_codes,
)
from ehrfuse.evaluation.missingness import rate_interval


class ConformalByPattern(BaseEstimator):
    """Split conformal prediction with MAPIE, calibrated within each missing pattern.

    A set of classes is predicted instead of one. Over new patients of a pattern it holds the true
    class with at least `confidence_level`, whatever the model is worth; a poor or unsure model
    gives larger sets. Calibrated over all rows together, a pattern in which the model does badly
    would be covered less often than promised, and others more.

    Parameters
    ----------
    estimator : fitted classifier with `predict_proba`
        It is not fitted again.
    modalities : dict of str to modality, str or list of str, default=None
        Columns of every modality; None takes those that the estimator names.
    confidence_level : float, default=0.9
    min_count : int, default=50
        Patterns with fewer calibration rows are pooled, and calibrated as one. So are patterns that
        only turn up later, for which nothing is promised. If the pool is itself smaller than this,
        its rows are calibrated together with all others.
    conformity_score : {"lac", "aps", "top_k"}, default="lac"
        As in :class:`mapie.classification.SplitConformalClassifier`; ``"lac"`` takes classes by
        their probability and is the only one for two classes.
    random_state : int, RandomState instance or None, default=None

    Attributes
    ----------
    classes_ : array of shape (n_classes,)
    table_ : DataFrame
        One row per pattern of the calibration rows: `pattern`, `n`, and `calibrated_with`, which is
        the pattern itself, ``"(pool)"`` or ``"(all)"``.

    See Also
    --------
    Rectifier : Corrects the probabilities of each pattern.

    Notes
    -----
    Needs the package MAPIE (``pip install 'ehrfuse[conformal]'``). The calibration rows must be of
    other patients than the training rows, and one row per patient: the promise is for rows that are
    exchangeable with the calibration rows, so it does not reach another hospital, nor a change of
    ordering habits. Coverage is that of a pattern, not of a class: with a rare outcome most misses
    may fall on it, and `coverage` tells how many. An empty set means that no class is likely
    enough; where the model is sure it is a way to miss, so count it as "do not know".

    References
    ----------
    Vovk V, Lindsay D, Nouretdinov I, Gammerman A. Mondrian confidence machine. 2003.

    Cordier T, Blot V, Lacombe L, Morzadec T, Capitaine A, Brunel N. Flexible and systematic
    uncertainty estimation with conformal prediction via the MAPIE library. COPA 2023.

    Examples
    --------
    >>> import numpy as np, pandas as pd
    >>> from sklearn.ensemble import HistGradientBoostingClassifier
    >>> from ehrfuse.evaluation import ConformalByPattern
    >>> rng = np.random.default_rng(0)
    >>> X = pd.DataFrame(rng.normal(size=(900, 2)), columns=["ph", "age"])
    >>> y = np.where(X["ph"] + rng.normal(size=900) > 0, "died", "lived")
    >>> X["ph"] = X["ph"].mask(rng.random(900) < 0.3)
    >>> model = HistGradientBoostingClassifier(max_iter=20).fit(X[:300], y[:300])
    >>> conformal = ConformalByPattern(model, {"gas": "ph", "static": "age"})
    >>> conformal.conformalize(X[300:600], y[300:600]).predict_set(X[600:602]).shape
    (2, 2)
    >>> conformal.table_
          pattern    n calibrated_with
    0  gas+static  218      gas+static
    1      static   82          static
    """

    def __init__(
        self,
        estimator,
        modalities=None,
        *,
        confidence_level=0.9,
        min_count=50,
        conformity_score="lac",
        random_state=None,
    ):
        self.estimator = estimator
        self.modalities = modalities
        self.confidence_level = confidence_level
        self.min_count = min_count
        self.conformity_score = conformity_score
        self.random_state = random_state

    def conformalize(self, X, y):
        """Calibrate the sets on rows that the estimator has not seen.

        Parameters
        ----------
        X : DataFrame of shape (n_samples, n_columns)
        y : array-like of shape (n_samples,)
            Classes that the estimator knows.

        Returns
        -------
        self : ConformalByPattern
        """
        self._check(X, y)
        modalities = self._modalities()
        patterns = find_patterns(X, modalities)
        names = patterns.kinds["pattern"].to_numpy(dtype=object)
        counts = np.bincount(patterns.rows, minlength=len(names))
        own = counts >= self.min_count
        pool = "(pool)" if counts[~own].sum() >= self.min_count else "(all)"
        used = np.where(own, names, pool)
        self.table_ = pd.DataFrame({"pattern": names, "n": counts, "calibrated_with": used})
        self.modalities_, self.rest_ = modalities, pool
        self.classes_ = np.asarray(self.estimator.classes_)
        proba, y = self._proba(X), np.asarray(y)
        parts = {name: used[patterns.rows] == name for name in dict.fromkeys([*used[own], pool])}
        parts["(all)"] = np.ones(len(X), dtype=bool)
        self.conformal_ = {
            name: self._one(proba[rows], y[rows]) for name, rows in parts.items() if rows.any()
        }
        return self

    def predict_set(self, X):
        """Classes that each set holds.

        Parameters
        ----------
        X : DataFrame of shape (n_samples, n_columns)

        Returns
        -------
        sets : array of bool, shape (n_samples, n_classes)
            In the order of `classes_`.
        """
        if not hasattr(self, "conformal_"):
            raise NotFittedError(
                "This ConformalByPattern is not calibrated yet; call conformalize(X, y) first."
            )
        proba, used = self._proba(X), self._used(X)
        sets = np.zeros(proba.shape, dtype=bool)
        for name in dict.fromkeys(used):
            rows = used == name
            sets[rows] = self.conformal_[name].predict_set(proba[rows])[1][:, :, 0]
        return sets

    def predict_proba(self, X):
        """Probabilities of the estimator, as they are.

        Parameters
        ----------
        X : DataFrame of shape (n_samples, n_columns)

        Returns
        -------
        proba : array of shape (n_samples, n_classes)
        """
        return self._proba(X)

    def predict(self, X):
        """Classes of the estimator, as they are.

        Parameters
        ----------
        X : DataFrame of shape (n_samples, n_columns)

        Returns
        -------
        y : array of shape (n_samples,)
        """
        return np.asarray(self.estimator.classes_)[self._proba(X).argmax(axis=1)]

    def coverage(self, X, y, *, groups=None, confidence=0.95):
        """How often the sets hold the truth, pattern by pattern.

        Parameters
        ----------
        X : DataFrame of shape (n_samples, n_columns)
            Rows of neither training nor calibration.
        y : array-like of shape (n_samples,)
        groups : str or array-like of shape (n_samples,), default=None
            Patient of every row, or the column of X that holds it, for cluster-robust intervals.
        confidence : float, default=0.95
            Of the interval, not of the sets.

        Returns
        -------
        table : DataFrame
            One row per pattern of these rows, the most frequent first, and ``"(all)"``: `pattern`,
            `calibrated_with`, `n`, `coverage`, `lo`, `hi` (Wilson's interval), `size` (mean number
            of classes in a set), `certain` (share of the sets with one class), and
            ``coverage_<class>`` for every class.
        """
        check_rows(len(X), y=y)
        self._check_labels(y)
        sets, used, y = self.predict_set(X), self._used(X), np.asarray(y)
        hit = (sets & (y[:, None] == self.classes_)).any(axis=1).astype(float)
        codes = group_codes(groups, len(X), X)
        patterns = find_patterns(X, self.modalities_)
        names = [*patterns.kinds["pattern"], "(all)"]
        table = []
        for place, name in enumerate(names):
            rows = patterns.rows == place if name != "(all)" else np.ones(len(X), dtype=bool)
            with_ = used[rows][0] if name != "(all)" else ""
            covered, lo, hi = rate_interval(hit[rows], codes[rows], confidence)
            size = sets[rows].sum(axis=1)
            row = {"pattern": name, "calibrated_with": with_, "n": int(rows.sum())}
            row |= {"coverage": covered, "lo": lo, "hi": hi, "size": size.mean()}
            row["certain"] = (size == 1).mean()
            for value in self.classes_:
                own = hit[rows & (y == value)]
                row[f"coverage_{value}"] = own.mean() if len(own) else np.nan
            table.append(row)
        return pd.DataFrame(table)

    def _check(self, X, y):
        check_scalar(self.min_count, "min_count", (int, np.integer), min_val=1)
        check_scalar(
            self.confidence_level, "confidence_level", float, min_val=0, max_val=1,
            include_boundaries="neither",
        )  # fmt: skip
        check_option(self.conformity_score, "conformity_score", ("lac", "aps", "top_k"))
        check_rows(len(X), y=y)
        least = int(np.ceil(1 / (1 - self.confidence_level) - 1e-9)) - 1
        if min(self.min_count, len(X)) < least:
            raise ValueError(
                f"min_count={self.min_count} and {len(X)} rows are too few for "
                f"confidence_level={self.confidence_level}; {least} rows are the least that can "
                "promise it, and several times as many give sets of a useful size."
            )
        check_is_fitted(self.estimator)
        if self.conformity_score != "lac" and len(self.estimator.classes_) < 3:
            raise ValueError(
                f"conformity_score={self.conformity_score!r} is for three classes and more, and "
                "the estimator knows two; use 'lac'."
            )
        self._check_labels(y)

    def _check_labels(self, y):
        if np.ndim(y) != 1 or pd.isna(np.asarray(y, dtype=object)).any():
            raise ValueError(
                "y must be one known class per row; leave rows with an unknown label out, and "
                "calibrate one task at a time."
            )
        known = np.asarray(self.estimator.classes_).tolist()
        unknown = sorted(set(np.asarray(y).tolist()) - set(known), key=str)
        if unknown:
            raise ValueError(f"y holds classes that the estimator has not seen: {unknown[:5]}.")

    def _modalities(self):
        if self.modalities is not None:
            return self.modalities
        return estimator_modalities(self.estimator)

    def _proba(self, X):
        proba = np.asarray(self.estimator.predict_proba(X), dtype=float)
        if proba.ndim != 2 or (np.abs(proba.sum(axis=1) - 1) > 1e-3).any():
            raise ValueError(
                "The estimator's probabilities do not add up to one in every row: it has several "
                "tasks. Give one that predicts the classes of one outcome."
            )
        # MAPIE asks that rows sum to one more exactly than float32 does.
        return proba / proba.sum(axis=1, keepdims=True)

    def _used(self, X):
        """By which calibration each row is served."""
        labels = pattern_labels(check_present(X, self.modalities_))
        known = dict(zip(self.table_["pattern"], self.table_["calibrated_with"], strict=True))
        return np.array([known.get(label, self.rest_) for label in labels], dtype=object)

    def _one(self, proba, y):
        mapie = import_optional("mapie.classification", "conformal")
        return mapie.SplitConformalClassifier(
            _AsGiven(self.classes_), self.confidence_level, self.conformity_score,
            prefit=True, random_state=self.random_state,
        ).conformalize(proba, y)  # fmt: skip


class _AsGiven(ClassifierMixin, BaseEstimator):
    """Gives back probabilities that stand in X: MAPIE sees numbers, never a frame with notes."""

    def __init__(self, classes):
        self.classes = classes
        self.classes_ = classes
        self.n_features_in_ = len(classes)

    def fit(self, X, y):
        return self

    def predict_proba(self, X):
        return np.asarray(X)

    def predict(self, X):
        return self.classes_[np.asarray(X).argmax(axis=1)]
