"""Summary statistics of event streams: the same facts for networks, trees and examples."""

import numpy as np
import pandas as pd
import pyarrow as pa
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from ehrfuse.modalities._streams import Records, read_records

STATISTICS = ("last", "mean", "min", "max", "sd", "first", "count", "slope", "time_since")
TIMELESS = ("count", "time_since")  # what a code without values still has


def learn_codes(records: Records, values: np.ndarray, max_codes: int) -> tuple[list[str], set[str]]:
    """The most frequent codes in a fixed order, and those of them that carry values."""
    code, words = records.strings("code")
    seen = np.bincount(code[code >= 0], minlength=len(words))
    valued = np.bincount(code[(code >= 0) & ~np.isnan(values)], minlength=len(words))
    ranked = sorted(range(len(words)), key=lambda j: (-seen[j], words[j]))
    kept = sorted(words[j] for j in ranked[:max_codes] if seen[j])
    return kept, {words[j] for j in np.flatnonzero(valued)}


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


def summarise(records: Records, values: np.ndarray, codes: list[str], now: float) -> np.ndarray:
    """Statistics of every row and code: (n, len(codes), len(STATISTICS)), NaN where undefined.

    `count` and `time_since` look at all records, the others at records with a value. The slope is
    the least-squares slope per unit of time; sd has n - 1 below the line.
    """
    n_rows, n_codes = len(records.offsets) - 1, len(codes)
    table = np.full((n_rows * n_codes, len(STATISTICS)), np.nan, "float32")
    table[:, STATISTICS.index("count")] = 0
    code, row = code_ids(records, codes), records.row
    key = row * n_codes + code
    for wanted, fill in ((code >= 0, _timeless), ((code >= 0) & ~np.isnan(values), _valued)):
        # Stable: within a row and code, records stay in time order.
        order = np.flatnonzero(wanted)[np.argsort(key[wanted], kind="stable")]
        if len(order):
            starts = np.flatnonzero(np.diff(key[order], prepend=-1))
            fill(table, key[order][starts], starts, records.time[order], values[order], now)
    return table.reshape(n_rows, n_codes, len(STATISTICS))


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
        Columns of events; None takes every column whose cells are lists.
    statistics : tuple of str, default=("last", "mean", ..., "time_since")
        Out of last, mean, min, max, sd, first, count, slope (least squares, per unit of time) and
        time_since.
    max_codes : int, default=200
        Keep at most this many codes a column, the most frequent in `fit`.
    now : float, default=0.0
        Time that `time_since` is measured from, in the unit of the events.
    remainder : {"passthrough", "drop"}, default="passthrough"
        What happens to the other columns; passed through, text columns become categories.

    Attributes
    ----------
    codes_ : dict of str to list of str
        Codes kept for every column.
    columns_ : list of str

    Notes
    -----
    A code that never carried a value in `fit` gets count and time_since only. Count is 0 where the
    code did not occur, all else is NaN.

    Examples
    --------
    >>> import pandas as pd
    >>> from ehrfuse import EventSummary
    >>> X = pd.DataFrame({"vitals": [
    ...     [{"time": -5.0, "code": "HR", "value": 80.0}, {"time": -1.0, "code": "HR", "value": 90.0}],
    ...     None,
    ... ]})
    >>> EventSummary(statistics=("last", "count", "slope")).fit_transform(X)
       vitals__HR__last  vitals__HR__count  vitals__HR__slope
    0              90.0                2.0                2.5
    1               NaN                0.0                NaN
    """

    def __init__(
        self, columns=None, *, statistics=STATISTICS, max_codes=200, now=0.0, remainder="passthrough"
    ):
        self.columns = columns
        self.statistics = statistics
        self.max_codes = max_codes
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
            raise ValueError(f"statistics {sorted(unknown)} are not known; choose from {STATISTICS}.")
        if self.remainder not in ("passthrough", "drop"):
            raise ValueError(f"remainder={self.remainder!r}; choose 'passthrough' or 'drop'.")
        columns = [c for c in X.columns if _is_stream(X[c])] if self.columns is None else self.columns
        self.columns_ = [columns] if isinstance(columns, str) else list(columns)
        self.codes_, self._kept = {}, {}
        for column in self.columns_:
            records = read_records(X[column], ("time", "code"))
            values = event_values(records)
            codes, valued = learn_codes(records, values, self.max_codes)
            self.codes_[column] = codes
            self._kept[column] = kept_statistics(codes, valued, self.statistics)
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
        rest = [c for c in self.feature_names_in_ if c not in self.columns_]
        parts = []
        if self.remainder == "passthrough":
            parts = [_tree_ready(X[c]) for c in rest]
        for column in self.columns_:
            records = read_records(X[column], ("time", "code"))
            table = summarise(records, event_values(records), self.codes_[column], self.now)
            kept = self._kept[column]
            names = [f"{column}__{self.codes_[column][j]}__{STATISTICS[k]}" for j, k in kept]
            picked = table[:, [j for j, _ in kept], [k for _, k in kept]]
            parts.append(pd.DataFrame(picked, columns=names, index=X.index))
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
        rest = [c for c in self.feature_names_in_ if c not in self.columns_]
        names = rest if self.remainder == "passthrough" else []
        for column in self.columns_:
            names = names + [
                f"{column}__{self.codes_[column][j]}__{STATISTICS[k]}" for j, k in self._kept[column]
            ]
        return np.asarray(names, dtype=object)

    def __sklearn_tags__(self):
        """Tags: frames with holes in, no array checks."""
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.no_validation = True
        return tags


def kept_statistics(codes, valued, statistics=STATISTICS) -> list[tuple[int, int]]:
    """Pairs (code, statistic) that can carry information."""
    return [
        (j, STATISTICS.index(name))
        for j, code in enumerate(codes)
        for name in statistics
        if code in valued or name in TIMELESS
    ]


def _is_stream(column: pd.Series) -> bool:
    if isinstance(column.dtype, pd.ArrowDtype):
        kind = column.dtype.pyarrow_dtype
        return pa.types.is_list(kind) or pa.types.is_large_list(kind)
    first = next(iter(column.dropna().head(1)), None)
    return isinstance(first, list | tuple | np.ndarray | dict | pd.DataFrame)


def _tree_ready(column: pd.Series) -> pd.Series:
    numeric = pd.api.types.is_numeric_dtype(column.dtype)
    return column if numeric else column.astype("category")
