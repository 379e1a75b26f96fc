"""Numeric columns with holes: reading, robust scales, quantile bins."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from pandas.api.types import infer_dtype, is_bool_dtype, is_numeric_dtype

from ehrfuse.modalities._base import describe
from ehrfuse.nn.numeric import NumericFeatures

COLUMNS_AT_ONCE = 64  # a sort copies its input, so wide tables are sorted in strips
ROWS_AT_ONCE = 2048
MIN_KNOWN = 20
LARGEST = 1e30  # scaled value; its square is still less than the largest float64
MIN_MISSING = 5


def is_number_column(column: pd.Series) -> bool:
    """Whether a column holds numbers: by its dtype, or by its cells where the dtype is object."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        return False
    if is_numeric_dtype(column.dtype) or is_bool_dtype(column.dtype):
        return True
    if column.dtype != object:
        return False
    kinds = ("integer", "floating", "mixed-integer-float", "decimal", "boolean")
    return bool(column.notna().any()) and infer_dtype(column, skipna=True) in kinds


def read_origin(cells: pd.DataFrame, columns: list[str]) -> np.ndarray:
    """Median of every column, in float64 (p,); 0 where nothing is known or it is not finite."""
    origin = np.zeros(len(columns))
    for j, name in enumerate(columns):
        known = _float64(cells[name])
        known = known[~np.isnan(known)]
        if len(known):
            origin[j] = np.median(known)
    return np.where(np.isfinite(origin), origin, 0.0)


def read_numbers(
    cells: pd.DataFrame, columns: list[str], origin: np.ndarray | None = None
) -> np.ndarray:
    """Columns minus their origin as one float32 table with NaN for null, a column at a time.

    The origin goes first, in float64: of a time stamp in seconds float32 keeps only the minutes.
    """
    origin = np.zeros(len(columns)) if origin is None else origin
    table = np.empty((len(cells), len(columns)), "float32")
    for j, name in enumerate(columns):
        with np.errstate(over="ignore"):
            table[:, j] = _float64(cells[name]) - origin[j]
        if np.isinf(table[:, j]).any():
            row = int(np.flatnonzero(np.isinf(table[:, j]))[0])
            raise ValueError(
                f"Column {name!r} holds infinity in row {row}; numbers must be finite (and fit "
                "float32). Replace it by a null cell or a finite number."
            )
    return table


def _float64(column):
    if not is_numeric_dtype(column.dtype):
        column = _parse(column)
    return column.to_numpy(dtype="float64", na_value=np.nan)


def _parse(column):
    numbers = pd.to_numeric(column.astype(object), errors="coerce")
    bad = np.flatnonzero((numbers.isna() & column.notna()).to_numpy())
    if len(bad):
        raise ValueError(
            f"Column {column.name!r} is read as numbers, but row {bad[0]} holds "
            f"{describe(column.iloc[bad[0]])}; make it a number or a null cell."
        )
    return numbers.astype("float64")


def quantiles(table: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Quantiles of every column (n, p) over its known cells: (len(levels), p); NaN where none."""
    found = np.full((len(levels), table.shape[1]), np.nan, "float32")
    for start in range(0, table.shape[1], COLUMNS_AT_ONCE):
        part = np.sort(table[:, start : start + COLUMNS_AT_ONCE], axis=0)  # NaN goes last
        known = (~np.isnan(part)).sum(0)
        place = levels[:, None] * np.maximum(known - 1, 0)
        below, column = np.floor(place).astype(int), np.arange(part.shape[1])
        above = np.minimum(below + 1, np.maximum(known - 1, 0))
        low, high = part[below, column], part[above, column]
        found[:, start : start + COLUMNS_AT_ONCE] = low + (high - low) * (place - below)
    return found


@dataclass(frozen=True)
class RobustScale:
    """Median to 0 and interquartile range to 1.349, as for a normal variable of sd 1.

    Where half of the values are equal, the range between the 5 % and 95 % quantile, then the whole
    range, takes the place of the interquartile one. A constant or empty column keeps its unit.
    """

    center: np.ndarray
    scale: np.ndarray

    @classmethod
    def learn(cls, table: np.ndarray) -> "RobustScale":
        """From the known cells of (n, p)."""
        if not len(table):
            return cls(np.zeros(table.shape[1], "float32"), np.ones(table.shape[1], "float32"))
        low, q05, q25, q50, q75, q95, high = quantiles(
            table, np.array([0, 0.05, 0.25, 0.5, 0.75, 0.95, 1])
        )
        scale = (q75 - q25) / 1.349
        for spread in ((q95 - q05) / 3.29, (high - low) / 4):
            scale = np.where(scale > 0, scale, spread)
        scale = np.where(scale > 0, scale, 1)  # also where it is NaN
        return cls(np.nan_to_num(q50).astype("float32"), scale.astype("float32"))

    def apply(self, table: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Scaled copy of (n, p), or in place with ``out=table``; never infinite."""
        with np.errstate(over="ignore"):  # training values of 1e-30, and one of 1e30 at predict
            out = np.subtract(table, self.center, out=out)
            out = np.divide(out, self.scale, out=out)
        return np.clip(out, -LARGEST, LARGEST, out=out)


def scaled(values: np.ndarray, center: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Like `RobustScale.apply`, for values that each have a center and a scale of their own."""
    with np.errstate(over="ignore"):
        return np.clip((values - center) / scale, -LARGEST, LARGEST)


def vector_scale(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and spread of every feature of training vectors (n, size), two float32 arrays.

    A feature that hardly varies beside the others is noise: its spread counts as a tenth of theirs.
    Vectors that differ by less than 1e-12 are constant: in float32 such a spread may be zero.
    """
    n, size = vectors.shape
    if not n:
        return np.zeros(size, "float32"), np.ones(size, "float32")
    parts = range(0, n, ROWS_AT_ONCE)  # a deviation in float64 is twice its vectors
    mean = sum(vectors[i : i + ROWS_AT_ONCE].sum(0, dtype="float64") for i in parts) / n
    square = sum(((vectors[i : i + ROWS_AT_ONCE] - mean) ** 2).sum(0) for i in parts) / n
    least = 0.1 * np.sqrt(square.mean())
    scale = np.maximum(np.sqrt(square), least if least > 1e-12 else 1.0)
    return mean.astype("float32"), scale.astype("float32")


def edges_of(table: np.ndarray, n_bins: int) -> np.ndarray:
    """Quantile edges (p, n_bins + 1) of scaled columns, zeros where bins would say nothing.

    A column needs `MIN_KNOWN` known values for its quantiles to mean something, and two bins for
    them to say more than the value itself does.
    """
    edges = np.zeros((table.shape[1], n_bins + 1), "float32")
    if len(table):
        found = quantiles(table, np.linspace(0, 1, n_bins + 1)).T
        useful = (np.diff(found, axis=1) > 0).sum(1) >= 2
        useful &= (~np.isnan(table)).sum(0) >= MIN_KNOWN
        edges[useful] = found[useful]
    return edges


def numeric_features(table: np.ndarray, n_bins: int, present: np.ndarray) -> dict[str, np.ndarray]:
    """What `NumericFeatures` needs, from scaled training rows: bin edges, flags, mean features."""
    table = table if present.all() else table[present]
    edges = edges_of(table, n_bins)
    flags = distinct_flags(table)
    features = NumericFeatures(torch.from_numpy(edges), torch.from_numpy(flags))
    features.learn_center(torch.from_numpy(table))
    return {"edges": edges, "flags": flags, "center": features.center.numpy()}


def build_features(learned: dict[str, np.ndarray]) -> NumericFeatures:
    """The module of what `numeric_features` has learned."""
    # Copies: a model that joblib maps from disk holds read-only arrays.
    features = NumericFeatures(torch.tensor(learned["edges"]), torch.tensor(learned["flags"]))
    features.center.copy_(torch.tensor(learned["center"]))
    return features


def distinct_flags(table: np.ndarray) -> np.ndarray:
    """Columns whose missing cells differ from those of all columns before.

    A flag that is on, or off, in hardly any row says who those rows are and nothing else.
    """
    kept, known = [], set()
    few = min(MIN_MISSING, len(table) // 10)
    for j in range(table.shape[1]):
        missing = np.isnan(table[:, j])
        pattern = np.packbits(missing).tobytes()
        if few < missing.sum() < len(table) - few and pattern not in known:
            known.add(pattern)
            kept.append(j)
    return np.array(kept, dtype="int64")
