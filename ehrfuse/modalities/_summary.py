"""Summary statistics of event streams: the same facts for networks, trees and examples."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from ehrfuse.modalities._base import check_count
from ehrfuse.modalities._streams import Records, read_records

STATISTICS = ("last", "mean", "min", "max", "sd", "first", "count", "slope", "time_since")
RECENT = ("recent_mean", "recent_min", "recent_max")
DIFFERENCES = {
    "last_minus_first": ("last", "first"),
    "last_minus_mean": ("last", "mean"),
    "recent_minus_mean": ("recent_mean", "mean"),
}
MAX_CATEGORIES = 255  # of a column, what scikit-learn's boosting can hold
TIMELESS = ("count", "time_since")  # what a code without values still has


def learn_codes(
    records: Records, values: np.ndarray, max_codes: int, min_count: int = 1
) -> tuple[list[str], set[str]]:
    """The most frequent codes of at least `min_count` rows, in a fixed order; those with values."""
    code, words = records.strings("code")
    seen = np.bincount(code[code >= 0], minlength=len(words))
    seen[n_rows(records.row, code, len(words)) < min_count] = 0
    valued = np.bincount(code[(code >= 0) & ~np.isnan(values)], minlength=len(words))
    ranked = sorted(range(len(words)), key=lambda j: (-seen[j], words[j]))
    kept = sorted(words[j] for j in ranked[:max_codes] if seen[j])
    return kept, {words[j] for j in np.flatnonzero(valued)}


def n_rows(row: np.ndarray, code: np.ndarray, n_codes: int) -> np.ndarray:
    """How many rows hold every code."""
    known = code >= 0
    pairs = np.unique(row[known] * max(1, n_codes) + code[known])
    return np.bincount(pairs % max(1, n_codes), minlength=n_codes)


def code_ids(records: Records, codes: list[str]) -> np.ndarray:
    """Place of every record's code in `codes`, -1 where it is not among them."""
    found, words = records.strings("code")
    place = {code: j for j, code in enumerate(codes)}
    lookup = np.array([place.get(word, -1) for word in words] + [-1], dtype="int64")
    return lookup[found]


def event_values(records: Records) -> np.ndarray:
    """Values of all records as float32, NaN where there is none."""
    if "value" not in records.fields:
        return np.full(len(records.time), np.nan, "float32")
    values = records.number("value")
    if np.isinf(values).any():
        raise ValueError("Events hold an infinite value; replace it by null or a finite number.")
    return values


@dataclass(frozen=True)
class SummaryPlan:
    """Which numbers describe a stream: learned once, then the same for every row.

    Attributes
    ----------
    codes : list of str
    kept : list of (code, column)
        Places in `codes` and in `columns` of the numbers that can carry information.
    columns : list of str
        Statistics, then the mean of every time window, the earliest first, then those of the last
        half window and the differences.
    start, now : float
        The windows divide the time between them into equal parts.
    """

    codes: list[str]
    kept: list[tuple[int, int]]
    columns: list[str]
    start: float
    now: float

    @classmethod
    def learn(
        cls, records, values, max_codes, now, n_windows=0, statistics=STATISTICS, min_count=1
    ):
        """From training rows: the plan, and the table of those rows.

        Numbers that no training row has are left out: a code that never carries a value keeps count
        and time_since only.
        """
        codes, valued = learn_codes(records, values, max_codes, min_count)
        windows = [f"mean_{w}of{n_windows}" for w in range(1, n_windows + 1)]
        windows += [*RECENT, *DIFFERENCES] if n_windows else []
        columns = [*STATISTICS, *windows]
        kept = [
            (j, columns.index(name))
            for j, code in enumerate(codes)
            for name in (*statistics, *windows)
            if code in valued or name in TIMELESS
        ]
        start = float(records.time.min(initial=now))
        table = cls(codes, kept, columns, start, now).table(records, values)
        known = ~np.isnan(table).all(axis=0) if len(table) else np.ones(len(kept), bool)
        kept = [pair for pair, some in zip(kept, known, strict=True) if some]
        return cls(codes, kept, columns, start, now), table[:, known]

    @property
    def names(self) -> list[str]:
        """``code__statistic`` of every number."""
        return [f"{self.codes[j]}__{self.columns[k]}" for j, k in self.kept]

    def table(self, records: Records, values: np.ndarray) -> np.ndarray:
        """All numbers of all rows: (n, len(kept)), NaN where undefined, count 0 where none."""
        n_rows, n_codes = len(records.offsets) - 1, len(self.codes)
        full = np.full((n_rows * n_codes, len(self.columns)), np.nan, "float32")
        full[:, STATISTICS.index("count")] = 0
        code = code_ids(records, self.codes)
        key = records.row * n_codes + code
        for wanted, fill in ((code >= 0, _timeless), ((code >= 0) & ~np.isnan(values), _valued)):
            # Stable: within a row and code, records stay in time order.
            order = np.flatnonzero(wanted)[np.argsort(key[wanted], kind="stable")]
            if len(order):
                starts = np.flatnonzero(np.diff(key[order], prepend=-1))
                fill(full, key[order][starts], starts, records.time[order], values[order], self.now)
                if fill is _valued:
                    self._windows(full, key[order], records.time[order], values[order])
        full = full.reshape(n_rows, n_codes, len(self.columns))
        return full[:, [j for j, _ in self.kept], [k for _, k in self.kept]]

    def _windows(self, full, key, time, values):
        """Mean of every window; mean, lowest and highest of the last half window; differences."""
        n_windows = len(self.columns) - len(STATISTICS) - len(RECENT) - len(DIFFERENCES)
        if n_windows <= 0:
            return
        width = max(self.now - self.start, 1e-6) / n_windows
        window = np.floor((time - self.start) / width).astype(int).clip(0, n_windows - 1)
        place = key * n_windows + window
        count = np.bincount(place, minlength=len(full) * n_windows)
        total = np.bincount(place, values, minlength=len(full) * n_windows)
        first = len(STATISTICS)
        with np.errstate(invalid="ignore"):
            full[:, first : first + n_windows] = (total / count).reshape(len(full), n_windows)
        recent = time >= self.now - width / 2
        if recent.any():
            key, values = key[recent], values[recent].astype("float64")
            starts = np.flatnonzero(np.diff(key, prepend=-1))
            n = np.diff(np.append(starts, len(key)))
            found = (
                np.add.reduceat(values, starts) / n,
                np.minimum.reduceat(values, starts),
                np.maximum.reduceat(values, starts),
            )
            place = self.columns.index(RECENT[0])
            full[key[starts], place : place + len(RECENT)] = np.stack(found, 1)
        for name, (one, other) in DIFFERENCES.items():
            one, other = self.columns.index(one), self.columns.index(other)
            full[:, self.columns.index(name)] = full[:, one] - full[:, other]


def _ends(starts, n):
    return np.append(starts[1:], n)


def _timeless(table, keys, starts, time, values, now):
    ends = _ends(starts, len(time))
    table[keys, STATISTICS.index("count")] = ends - starts
    table[keys, STATISTICS.index("time_since")] = now - time[ends - 1]


def _valued(table, keys, starts, time, values, now):
    ends = _ends(starts, len(time))
    n = ends - starts
    t, v = time.astype("float64"), values.astype("float64")
    mean = np.add.reduceat(v, starts) / n
    dv, dt = v - np.repeat(mean, n), t - np.repeat(np.add.reduceat(t, starts) / n, n)
    with np.errstate(invalid="ignore", divide="ignore"):
        sd = np.sqrt(np.add.reduceat(dv**2, starts) / np.where(n > 1, n - 1, np.nan))
        spread = np.add.reduceat(dt**2, starts)
        slope = np.add.reduceat(dv * dt, starts) / np.where(spread > 1e-9, spread, np.nan)
    found = {
        "last": v[ends - 1],
        "mean": mean,
        "min": np.minimum.reduceat(v, starts),
        "max": np.maximum.reduceat(v, starts),
        "sd": sd,
        "first": v[starts],
        "slope": slope,
    }
    for name, column in found.items():
        table[keys, STATISTICS.index(name)] = column


class EventSummary(TransformerMixin, BaseEstimator):
    """Turn columns of event lists into one number per code and statistic.

    The statistics are those that the networks' `Events` encoder reads, so trees and networks see
    the same facts.

    Parameters
    ----------
    columns : list of str or None, default=None
        Columns of events; None takes every column whose cells are lists of records with a code.
    statistics : tuple of str, default=("last", "mean", ..., "time_since")
        Out of last, mean, min, max, sd, first, count, slope (least squares, per unit of time) and
        time_since.
    max_codes : int, default=200
        Keep at most this many codes a column, the most frequent in `fit`.
    min_count : int, default=1
        Training rows that must hold a code for it to be kept; raise it where codes are free text.
    windows : int, default=0
        Add the mean of every one of so many equal time windows between the earliest training event
        and `now`; the mean, lowest and highest value of the last half window; and how far the last
        value, and that recent mean, are from the first value and the mean of all.
    now : float, default=0.0
        Time that `time_since` is measured from, in the unit of the events.
    remainder : {"passthrough", "drop"}, default="passthrough"
        What happens to the other columns. Passed through, words become categories; columns that
        trees cannot read (lists, more than 255 different words) or learn from (no training row has
        a value) are left out and listed in `left_out_`.

    Attributes
    ----------
    columns_ : list of str
    left_out_ : list of str
        Other columns that are not passed through.
    plans_ : dict of str to SummaryPlan
        Codes and statistics kept for every column.

    Notes
    -----
    The slope is the least-squares slope per unit of time, sd has n - 1 below the line. A code that
    never carried a value in `fit` gets count and time_since only. Count is 0 where the code did not
    occur, all else is NaN.

    Examples
    --------
    >>> import pandas as pd
    >>> from ehrfuse import EventSummary
    >>> stay = [
    ...     {"time": -5.0, "code": "HR", "value": 80.0},
    ...     {"time": -1.0, "code": "HR", "value": 90.0},
    ... ]
    >>> X = pd.DataFrame({"vitals": [stay, None]})
    >>> EventSummary(statistics=("last", "count", "slope")).fit_transform(X)
       vitals__HR__last  vitals__HR__count  vitals__HR__slope
    0              90.0                2.0                2.5
    1               NaN                0.0                NaN
    """

    def __init__(
        self,
        columns=None,
        *,
        statistics=STATISTICS,
        windows=0,
        max_codes=200,
        min_count=1,
        now=0.0,
        remainder="passthrough",
    ):
        self.columns = columns
        self.statistics = statistics
        self.windows = windows
        self.max_codes = max_codes
        self.min_count = min_count
        self.now = now
        self.remainder = remainder

    def fit(self, X, y=None):
        """Learn the codes of every column.

        Parameters
        ----------
        X : DataFrame of shape (n_samples, n_columns)
        y : ignored

        Returns
        -------
        self : EventSummary
        """
        unknown = set(self.statistics) - set(STATISTICS)
        if unknown:
            raise ValueError(
                f"statistics {sorted(unknown)} are not known; choose from {STATISTICS}."
            )
        if self.remainder not in ("passthrough", "drop"):
            raise ValueError(f"remainder={self.remainder!r}; choose 'passthrough' or 'drop'.")
        columns = (
            [c for c in X.columns if _is_stream(X[c])] if self.columns is None else self.columns
        )
        self.columns_ = [columns] if isinstance(columns, str) else list(columns)
        lost = [c for c in self.columns_ if c not in X.columns]
        if lost:
            raise ValueError(f"X lacks the columns {lost}; columns= names columns of X.")
        others = [c for c in X.columns if c not in self.columns_]
        passed = [c for c in others if _for_trees(X[c])] if self.remainder != "drop" else []
        self.left_out_ = [c for c in others if c not in passed]
        check_count(self.windows, "windows", 0)
        check_count(self.max_codes, "max_codes")
        check_count(self.min_count, "min_count")
        self.plans_ = {}
        for column in self.columns_:
            records = read_records(X[column], ("time", "code"))
            records.refuse_future(self.now)
            self.plans_[column], _ = SummaryPlan.learn(
                records, event_values(records), self.max_codes, self.now, self.windows,
                self.statistics, self.min_count,
            )  # fmt: skip
        self.feature_names_in_ = np.asarray(X.columns, dtype=object)
        self.n_features_in_ = X.shape[1]
        return self

    def transform(self, X):
        """Compute the statistics.

        Parameters
        ----------
        X : DataFrame of shape (n_samples, n_columns)

        Returns
        -------
        table : DataFrame of shape (n_samples, n_features), indexed as X
        """
        check_is_fitted(self)
        parts = [_tree_ready(X[c]) for c in self._passed()]
        for column in self.columns_:
            records = read_records(X[column], ("time", "code"))
            records.refuse_future(self.now)
            plan = self.plans_[column]
            names = [f"{column}__{name}" for name in plan.names]
            table = plan.table(records, event_values(records))
            parts.append(pd.DataFrame(table, columns=names, index=X.index))
        return pd.concat(parts, axis=1) if parts else pd.DataFrame(index=X.index)

    def get_feature_names_out(self, input_features=None):
        """Names of the columns of `transform`.

        Parameters
        ----------
        input_features : ignored

        Returns
        -------
        names : array of str
        """
        check_is_fitted(self)
        names = self._passed()
        for column in self.columns_:
            names = names + [f"{column}__{name}" for name in self.plans_[column].names]
        return np.asarray(names, dtype=object)

    def _passed(self):
        gone = {*self.columns_, *self.left_out_}
        return [c for c in self.feature_names_in_ if c not in gone]

    def __sklearn_tags__(self):
        """Tags: frames with holes in, no array checks."""
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.no_validation = True
        return tags


def _is_list(column: pd.Series) -> bool:
    if isinstance(column.dtype, pd.ArrowDtype):
        return pa.types.is_nested(column.dtype.pyarrow_dtype)
    first = next(iter(column.dropna().head(1)), None)
    return isinstance(first, list | tuple | np.ndarray | dict | pd.DataFrame)


def _is_stream(column: pd.Series) -> bool:
    """Whether cells are lists of records with a code: not visits, vectors or pictures."""
    if isinstance(column.dtype, pd.ArrowDtype):
        kind = column.dtype.pyarrow_dtype
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
            return False
        record = kind.value_type
        if pa.types.is_struct(record):
            return record.get_field_index("code") >= 0
        return pa.types.is_null(record)
    if not _is_list(column):
        return False
    for cell in column.dropna():
        if isinstance(cell, dict | pd.DataFrame):
            return "code" in cell
        if len(cell):  # of something else it is a vector, a picture, a list of codes
            return isinstance(cell[0], dict) and "code" in cell[0]
    return True


def _for_trees(column: pd.Series) -> bool:
    """Whether boosted trees can read a column and learn from it."""
    if _is_list(column) or column.isna().all():
        return False
    if pd.api.types.is_numeric_dtype(column.dtype):
        return True
    try:
        return column.nunique() <= MAX_CATEGORIES
    except TypeError:  # cells that cannot be compared are no categories
        return False


def _tree_ready(column: pd.Series) -> pd.Series:
    if pd.api.types.is_numeric_dtype(column.dtype) or isinstance(column.dtype, pd.CategoricalDtype):
        return column
    # Trees sort the categories, so a hole must not be one of pandas' own kind.
    return column.astype(object).where(column.notna(), None).astype("category")
