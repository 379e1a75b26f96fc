"""What every check of the leak audit is given: rows, outcomes, patients, folds, and a finding."""

import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.sparse import issparse
from scipy.stats import rankdata
from sklearn.base import clone, is_classifier, is_regressor
from sklearn.model_selection import GroupKFold, KFold, StratifiedGroupKFold, StratifiedKFold

from ehrfuse._runtime import resolve_device, seeded
from ehrfuse.evaluation._inputs import check_labels, check_rows, group_codes, group_values
from ehrfuse.evaluation._resampling import METRICS

VERDICTS = ("pass", "skipped", "warn", "leak")  # the worst last
_FEW = 5  # patients of one number of rows, below which their rows are shuffled singly


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Parameters
    ----------
    check : str
        Name of the check, as `checks` takes it.
    verdict : {"pass", "warn", "leak", "skipped"}
    sentence : str
        What was found, or why nothing was looked for.
    evidence : DataFrame
        The figures behind it.
    fix : str
        What to do; empty where nothing is to be done.
    """

    check: str
    verdict: str
    sentence: str
    evidence: pd.DataFrame = field(default_factory=pd.DataFrame)
    fix: str = ""


class EstimatorFailed(Exception):
    """A fit or a prediction on altered rows raised; the check that asked is skipped."""


class Target(NamedTuple):
    """One outcome as numbers, NaN where unknown."""

    name: str
    values: np.ndarray
    binary: bool
    label: object = None  # the class that counts as one, where y holds classes

    def skill(self, scores, rows=slice(None)):
        """How well scores order the outcome of `rows`: 0.5 is chance, 1 perfect.

        AUROC, or (1 + Spearman's correlation) / 2 of a number; NaN where nothing varies.
        """
        values, scores = self.values[rows], np.asarray(scores, dtype=float)
        known = ~np.isnan(values) & ~np.isnan(scores)
        values, scores = values[known], scores[known]
        if len(values) < 2 or values.min() == values.max():
            return np.nan
        if self.binary:
            return float(METRICS["auroc"](values, scores))
        if scores.min() == scores.max():
            return 0.5
        return float(1 + np.corrcoef(rankdata(values), rankdata(scores))[0, 1]) / 2


def make_targets(y, regression):
    """Outcomes of y: one per task, one against the rest for several classes, or the number."""
    if np.ndim(y) == 2 and np.shape(y)[1] > 1:
        frame = pd.DataFrame(y)
        if regression:
            values = frame.to_numpy(dtype=float, na_value=np.nan)
        else:
            values = check_labels(y).labels
        return [
            Target(str(c), v, not regression) for c, v in zip(frame.columns, values.T, strict=True)
        ]
    flat = pd.Series(np.ravel(np.asarray(y)))
    if regression:
        return [Target("y", flat.to_numpy(dtype=float, na_value=np.nan), False)]
    known = flat.notna().to_numpy()
    classes = np.unique(flat[known].to_numpy())
    if len(classes) < 2:
        raise ValueError(f"y holds {len(classes)} class(es); the audit needs at least two.")
    targets = []
    for label in classes[1:] if len(classes) == 2 else classes:
        values = np.full(len(flat), np.nan)
        values[known] = flat[known].to_numpy() == label
        targets.append(Target(str(label), values, True, label))
    return targets


def take(table, rows):
    """Rows by position of a frame, an array or a sparse matrix."""
    if hasattr(table, "iloc"):
        return table.iloc[rows]
    return table[rows] if issparse(table) else np.asarray(table)[rows]


def _as_frame(X):
    if isinstance(X, pd.DataFrame):
        if X.columns.has_duplicates:
            twice = list(X.columns[X.columns.duplicated()].unique())
            raise ValueError(f"X has the column names {twice} more than once; rename the columns.")
        return X
    array = X.toarray() if issparse(X) else np.asarray(X)
    if array.ndim != 2:
        raise ValueError(f"X has {array.ndim} dimension(s); pass one row per case, two dimensions.")
    return pd.DataFrame(array, columns=[f"column {i}" for i in range(array.shape[1])])


def _as_outcome(y):
    """One column of a frame or an array as the vector it is, so that unknown labels are seen."""
    if np.ndim(y) not in (1, 2):
        raise ValueError(
            f"y has {np.ndim(y)} dimensions; pass one label per row, or one column per task."
        )
    if np.ndim(y) == 2 and np.shape(y)[1] == 1:
        return y.iloc[:, 0] if hasattr(y, "iloc") else np.asarray(y)[:, 0]
    return y


class Case:
    """Everything that the checks share. Rows of unknown outcome are left out of 1-D outcomes.

    `rows` are the rows that fits and column models use, at most `max_rows`, patients whole;
    `folds` are over all rows.
    """

    def __init__(
        self, estimator, X, y, *, groups, time, cv, max_rows, n_permutations, n_jobs, seed
    ):
        frame, y = _as_frame(X), _as_outcome(y)
        check_rows(len(frame), y=y)
        self.estimator = estimator
        self.n_jobs, self.n_permutations, self.seed = n_jobs, n_permutations, seed
        self.regression = _is_regression(estimator, y)
        self.tasks = np.ndim(y) == 2 and np.shape(y)[1] > 1
        self.grouped = groups is not None
        names = {value for value in (groups, time) if isinstance(value, str)}
        names |= {value.name for value in (groups, time) if _is_column(value, frame)}
        codes = group_codes(groups, len(frame), frame)
        time = None if time is None else pd.Series(np.asarray(group_values(time, frame, "time")))
        check_rows(len(frame), time=time)
        known = np.arange(len(frame))
        if np.ndim(y) == 1:
            known = np.flatnonzero(pd.Series(np.asarray(y)).notna().to_numpy())
        self.X, self.y, self.frame = take(X, known), take(_plain(y), known), frame.iloc[known]
        self.features = [c for c in frame.columns if c not in names]
        self.codes = pd.factorize(codes[known])[0]
        self.group_values = group_values(groups, frame)
        self.time = None if time is None else time.iloc[known].reset_index(drop=True)
        self.targets = make_targets(self.y, self.regression)
        self.given_folds = hasattr(cv, "split") or not np.isscalar(cv)
        self.folds = self._make_folds(cv, known, y, codes)
        self.rows = self._sample(max_rows)
        self.inner = self._inner_folds()

    def __len__(self):
        return len(self.frame)

    def rng(self, salt=0):
        """A stream of random numbers of its own for every check."""
        return np.random.default_rng([self.seed, salt])

    def _make_folds(self, cv, known, every_y, every_code):
        groups = None if not self.grouped else self.codes
        one = np.ndim(self.y) == 1 and not self.regression
        if not self.given_folds:
            n_folds = int(min(cv, len(np.unique(self.codes))))
            if one:
                n_folds = max(2, min(n_folds, *np.unique(self.y, return_counts=True)[1]))
                kind = StratifiedKFold if groups is None else StratifiedGroupKFold
                cv = kind(n_folds, shuffle=True, random_state=self.seed)
            elif groups is None:
                cv = KFold(n_folds, shuffle=True, random_state=self.seed)
            else:
                cv = GroupKFold(n_folds)
        if hasattr(cv, "split") and len(known) < len(every_code):
            # A splitter may hold row numbers: it is asked about all rows, unknown ones included.
            labels = np.asarray(every_y)
            labels = np.nan_to_num(labels) if self.regression else pd.factorize(labels)[0]
            cv = self._splits(cv, np.zeros(len(labels)), labels, every_code)
        if hasattr(cv, "split"):
            return self._splits(cv, self.X, self.y, groups)
        place = np.full(int(known.max()) + 1, -1)
        place[known] = np.arange(len(known))
        folds = [tuple(np.asarray(part) for part in fold) for fold in cv]
        folds = [tuple(np.flatnonzero(p) if p.dtype == bool else p for p in f) for f in folds]
        return [tuple(place[p[np.isin(p, known)]] for p in fold) for fold in folds]

    def _splits(self, cv, X, y, codes):
        groups = codes if self.grouped else None
        with warnings.catch_warnings():  # that groups are ignored is what the audit finds
            warnings.simplefilter("ignore", UserWarning)
            return [tuple(map(np.asarray, fold)) for fold in cv.split(X, y, groups)]

    def _sample(self, max_rows):
        if len(self) <= max_rows:
            return np.arange(len(self))
        order = self.rng(1).permutation(self.codes.max() + 1)
        sizes = np.bincount(self.codes)[order]
        n_groups = max(2, int((np.cumsum(sizes) <= max_rows).sum()))
        return np.flatnonzero(np.isin(self.codes, order[:n_groups]))

    def fold(self, number):
        """Train and test rows of a fold, of the rows that fits use."""
        train, test = self.folds[number % len(self.folds)]
        return train[np.isin(train, self.rows)], test[np.isin(test, self.rows)]

    def _inner_folds(self):
        """Five folds over `rows`, patients whole, for the models of columns."""
        codes = self.codes[self.rows]
        n_folds = min(5, len(np.unique(codes)))
        labels = self.targets[0].values[self.rows]
        place = np.random.default_rng(self.seed).permutation(codes.max() + 1)
        if not self.targets[0].binary:
            return [np.flatnonzero(place[codes] % n_folds == fold) for fold in range(n_folds)]
        # Patients with an event are dealt out first, so that every fold has its share.
        event = np.zeros(codes.max() + 1)
        np.maximum.at(event, codes, np.nan_to_num(labels))
        rank = np.empty(len(place), dtype=int)
        rank[np.lexsort((place, event))] = np.arange(len(place))
        return [np.flatnonzero(rank[codes] % n_folds == fold) for fold in range(n_folds)]

    # ------------------------------------------------------------ labels

    def permuted(self, rng, within=None):
        """An order of rows that exchanges whole patients, among those of as many rows.

        Rows of patients whose number of rows is rare are shuffled one by one: left in place they
        would keep their labels.
        """
        within = np.arange(len(self)) if within is None else within
        order = np.arange(len(self))
        codes = self.codes[within]
        by_group = within[np.argsort(codes, kind="stable")]
        _, sizes = np.unique(codes, return_counts=True)
        starts = np.cumsum(sizes) - sizes
        odd = []
        for size in np.unique(sizes):
            own = starts[sizes == size]
            rows = by_group[own[:, None] + np.arange(size)]
            if len(own) < _FEW:
                odd.append(rows.ravel())
            else:
                order[rows] = rows[rng.permutation(len(own))]
        if odd:
            odd = np.concatenate(odd)
            order[odd] = rng.permutation(odd)
        return order

    # ------------------------------------------------------------ the estimator

    @cached_property
    def model(self):
        """The estimator with every open seed set, so that two fits are the same fit."""
        model = clone(self.estimator)
        params = model.get_params(deep=True)
        names = [n for n, v in params.items() if n.split("__")[-1] == "random_state" and v is None]
        if names:  # a frozen estimator takes no parameters
            model.set_params(**dict.fromkeys(names, self.seed % 2**31))
        return model

    def fit(self, X, y):
        """A fresh fit under one seed; what it draws from global streams is given back."""
        with _quiet(self.seed):
            return clone(self.model).fit(X, y)

    def predict(self, model, X):
        """Predictions as numbers, shape (n_rows, n_targets)."""
        with _quiet(self.seed):
            return _predictions(model, X, self.targets, self.tasks)


def _plain(y):
    return y if hasattr(y, "iloc") else np.asarray(y)


def _is_regression(estimator, y):
    if estimator is not None and (is_classifier(estimator) or is_regressor(estimator)):
        return is_regressor(estimator)
    values = pd.Series(np.ravel(np.asarray(y))).dropna()
    return pd.api.types.is_float_dtype(values.dtype) and values.nunique() > 20


@contextmanager
def _quiet(seed):
    """Seed the global streams, silence warnings, and turn errors into one kind."""
    state = np.random.get_state()  # noqa: NPY002 (estimators without a seed draw from it)
    try:
        np.random.seed(seed % 2**31)  # noqa: NPY002
        with seeded(seed % 2**31, resolve_device(None)), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        raise EstimatorFailed(type(error).__name__) from error
    finally:
        np.random.set_state(state)  # noqa: NPY002


def _predictions(model, X, targets, tasks):
    """Scores of every target: of each task, of each class, or the number itself."""
    if hasattr(model, "predict_proba"):
        told = model.predict_proba(X)
    elif hasattr(model, "decision_function"):
        told = model.decision_function(X)
    else:
        told = np.asarray(model.predict(X))
        if targets[0].label is not None and told.ndim == 1:
            return np.column_stack([told == target.label for target in targets]).astype(float)
    if isinstance(told, list):
        told = np.column_stack([np.asarray(block)[:, -1] for block in told])
    told = np.asarray(told, dtype=float).reshape(len(told), -1)
    if tasks or told.shape[1] == 1 or targets[0].label is None:
        return told
    classes, scores = list(model.classes_), np.zeros((len(told), len(targets)))
    for place, target in enumerate(targets):
        if target.label in classes:
            scores[:, place] = told[:, classes.index(target.label)]
    return scores


def _is_column(value, frame):
    """Whether a Series is a column of the frame, and not only called like one."""
    name = getattr(value, "name", None)
    if name is None or name not in frame.columns:
        return False
    return np.array_equal(pd.factorize(frame[name])[0], pd.factorize(np.asarray(value))[0])
