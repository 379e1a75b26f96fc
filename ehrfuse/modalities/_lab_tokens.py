"""Lab values as streams of (analyte, value, time): what the masked lab pretrainer and MEDFuse read.

A declared `Labs` or `Events` is wrapped in a modality that gives the measured values alone, as
normal scores, and whose encoder is the masked transformer. It stands for the one that was declared,
so estimators that take it over from a pretrainer need not know of it.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from pandas.api.types import is_numeric_dtype
from scipy.special import ndtri

from ehrfuse._data import Block
from ehrfuse.modalities._base import Modality
from ehrfuse.modalities._numbers import read_numbers, read_origin, scaled
from ehrfuse.modalities._streams import Records, read_records
from ehrfuse.modalities._summary import code_ids, event_values, learn_codes
from ehrfuse.nn.lab_transformer import LabTransformer

LIMIT = 4.0  # normal scores beyond mean one in thirty thousand
N_KNOTS = 101


@dataclass(frozen=True)
class QuantileScale:
    """Values of every analyte to normal scores by its quantiles, and to standard deviations.

    Attributes
    ----------
    knots : array of shape (n_codes, N_KNOTS)
        Quantiles of the training values.
    center, scale : arrays of shape (n_codes,)
        Mean and standard deviation of the training values, the outer half per cent on both sides
        drawn in: one slip of the pen must not set the unit.
    """

    knots: np.ndarray
    center: np.ndarray
    scale: np.ndarray

    @classmethod
    def learn(cls, code, value, n_codes):
        """From training values (n,) and their analytes (n,)."""
        levels = np.linspace(0, 1, N_KNOTS)
        knots = np.zeros((n_codes, N_KNOTS))
        center, scale = np.zeros(n_codes), np.ones(n_codes)
        order = np.argsort(code, kind="stable")
        starts = np.searchsorted(code[order], np.arange(n_codes + 1))
        for c in range(n_codes):
            part = value[order[starts[c] : starts[c + 1]]].astype("float64")
            if not len(part):
                continue
            knots[c] = np.quantile(part, levels)
            part = part.clip(*np.quantile(part, [0.005, 0.995]))
            center[c], scale[c] = part.mean(), part.std() or 1.0
        return cls(knots, center, scale)

    def scores(self, code, value):
        """Normal scores, within `LIMIT`; NaN stays."""
        levels = np.linspace(0, 1, N_KNOTS).clip(0.25 / N_KNOTS, 1 - 0.25 / N_KNOTS)
        marks = ndtri(levels)
        found = np.full(len(code), np.nan, "float32")
        order = np.argsort(code, kind="stable")
        starts = np.searchsorted(code[order], np.arange(len(self.knots) + 1))
        for c, knots in enumerate(self.knots):
            rows = order[starts[c] : starts[c + 1]]
            v = value[rows].astype("float64")
            # Many equal values are many equal knots: their score is the middle of those.
            low = np.interp(v, knots, marks)
            high = -np.interp(-v, -knots[::-1], -marks[::-1])
            beyond = (v - v.clip(knots[0], knots[-1])) / self.scale[c]
            found[rows] = (0.5 * (low + high) + beyond).clip(-LIMIT, LIMIT)
        return found

    def standardise(self, code, value):
        """Standard deviations from the mean."""
        return scaled(value, self.center[code], self.scale[code]).astype("float32")

    def unit(self, code):
        """A standard deviation in the unit of the analyte; 0 where all values were equal."""
        constant = self.knots[:, 0] == self.knots[:, -1]
        return np.where(constant, 0.0, self.scale)[code]

    def restore(self, code, standard):
        """The unit of the analyte again."""
        return standard * self.unit(code) + self.center[code]


class Tokens(Modality):
    """What both kinds share: the declared modality, the sizes of the transformer, the scale.

    Parameters
    ----------
    declared : Labs or Events
    width, n_layers, n_heads : int
    dropout : float
    use_time : bool
        Give every value the time since it was drawn.

    Attributes
    ----------
    codes_ : list of str
        Analytes: columns, or codes of events.
    maskable_ : bool array of shape (n_codes,)
        Codes that carry values; the others can be seen but not be asked for.
    values_ : QuantileScale
    """

    repeats = False  # whether a row may hold several values of one analyte

    def __init__(self, declared, width, n_layers, n_heads, dropout=0.0, use_time=False):
        self.declared = declared
        self.width = width
        self.n_layers = n_layers
        self.n_heads = n_heads
        self.dropout = dropout
        self.use_time = use_time

    @property
    def columns(self):
        return self.declared.columns

    @property
    def n_bins(self):
        return self.declared.n_bins

    @property
    def _one_column(self):
        return self.declared._one_column

    @property
    def n_codes(self):
        return max(1, len(self.codes_))

    def _check_params(self):
        self.declared._check_params()

    def make_encoder(self, d_model, n_members=1):
        return LabTransformer(
            self.n_codes, d_model, self.width, self.n_layers, self.n_heads, self.dropout,
            self.use_time, self.n_bins,
        )  # fmt: skip

    def restore(self, code, standard):
        """Values in their own unit from standard deviations."""
        return self.values_.restore(code, standard)

    def _block(self, present, code, value, offsets, time):
        known = ~np.isnan(value)
        standard = np.full(len(value), np.nan, "float32")
        standard[known] = self.values_.standardise(code[known], value[known])
        score = np.full(len(value), np.nan, "float32")
        score[known] = self.values_.scores(code[known], value[known])
        ragged = {"code": code.astype("int32"), "value": score, "standard": standard}
        ragged |= {} if time is None else {"time": time.astype("float32")}
        return Block(present, ragged={name: (flat, offsets) for name, flat in ragged.items()})


class TableTokens(Tokens):
    """`Labs`: every measured cell is a token; a cell has no time."""

    origin_: "np.ndarray | None" = None  # as in models of before it was learned

    def _learn(self, cells):
        self.origin_ = read_origin(cells, self.columns_)
        table = read_numbers(cells, self.columns_, self.origin_)
        self.codes_ = list(self.columns_)
        known = ~np.isnan(table)
        self.maskable_ = known.any(axis=0)
        self.rate_ = known.mean(axis=0).clip(1e-3)
        self.values_ = QuantileScale.learn(np.nonzero(known)[1], table[known], self.n_codes)

    def restore(self, code, standard):
        origin = 0.0 if self.origin_ is None else self.origin_[code]
        return super().restore(code, standard) + origin

    def _read(self, cells, present):
        table = read_numbers(cells, self.columns_, self.origin_)
        # A column that no training row had is not read: nobody trained its vector.
        known = ~np.isnan(table) & self.maskable_ & present[:, None]
        present = known.any(axis=1)
        offsets = np.concatenate([[0], np.cumsum(known.sum(1))]).astype("int64")
        time = np.zeros(known.sum(), "float32") if self.use_time else None
        return self._block(present, np.nonzero(known)[1], table[known], offsets, time)

    def holes(self, cells):
        """Row, analyte and (no) time of every null cell that can be filled."""
        table = read_numbers(cells, self.columns_, self.origin_)
        row, code = np.nonzero(np.isnan(table) & self.maskable_)
        return row, code, np.zeros(len(row), "float32")

    def fill(self, cells, row, code, value, measured=None):
        """The columns with values in the holes; `measured` replaces what is known already."""
        table = np.column_stack([_as_float(cells[c]) for c in self.columns_])
        if measured is not None:
            table[~np.isnan(table)] = measured
        table[row, code] = value
        return {c: table[:, j] for j, c in enumerate(self.columns_)}

    def never_seen(self, cells):
        """Columns with null cells that cannot be filled, because no training row had a value."""
        return [
            c for c, seen in zip(self.columns_, self.maskable_, strict=True)
            if not seen and cells[c].isna().any()
        ]  # fmt: skip


class StreamTokens(Tokens):
    """`Events`: every record with a value is a token, the latest `max_events` of a row."""

    repeats = True

    def _records(self, cells):
        records = read_records(self._only(cells), ("time", "code"))
        records.refuse_future(self.declared.now)
        return records, event_values(records)

    def _learn(self, cells):
        records, values = self._records(cells)
        declared = self.declared
        self.codes_, valued = learn_codes(records, values, declared.max_codes, declared.min_count)
        self.maskable_ = np.array([code in valued for code in self.codes_] or [False])
        self.time_scale_ = float(np.abs(self.declared.now - records.time).max(initial=0.0)) or 1.0
        code = code_ids(records, self.codes_)
        known = (code >= 0) & ~np.isnan(values)
        self.values_ = QuantileScale.learn(code[known], values[known], self.n_codes)
        pairs = np.unique(records.row[code >= 0] * self.n_codes + code[code >= 0]) % self.n_codes
        rows = np.bincount(pairs, minlength=self.n_codes)
        self.rate_ = (rows / max(1, len(cells))).clip(1e-3)

    def _read(self, cells, present):
        records, values = self._records(cells)
        code = code_ids(records, self.codes_)
        # A record that should have a value and has none is a hole, not a token.
        known = (code >= 0) & present[records.row] & ~(np.isnan(values) & self.maskable_[code])
        counts = np.bincount(records.row[known], minlength=len(present))
        kept = Records(np.concatenate([[0], np.cumsum(counts)]), {}, records.time[known])
        places, offsets = kept.latest(self.declared.max_events)
        time = self._age(kept.time[places]) if self.use_time else None
        return self._block(present, code[known][places], values[known][places], offsets, time)

    def _age(self, time):
        return (self.declared.now - time) / self.time_scale_

    def holes(self, cells):
        """Row, code and time of every record whose value is null and can be filled."""
        records, values = self._records(cells)
        code = code_ids(records, self.codes_)
        hole = np.flatnonzero(np.isnan(values) & (code >= 0) & self.maskable_[code])
        return records.row[hole], code[hole], self._age(records.time[hole])

    def fill(self, cells, row, code, value, measured=None):
        """The column with values in the holes; records in time order, as Arrow lists."""
        records, values = self._records(cells)
        codes = code_ids(records, self.codes_)
        hole = np.flatnonzero(np.isnan(values) & (codes >= 0) & self.maskable_[codes])
        whole, kind = _as_measured(records)
        if measured is not None:
            whole[~np.isnan(values)] = measured
        whole[hole] = value
        fields = records.fields | {"value": pa.array(whole, kind, from_pandas=True)}
        flat = pa.StructArray.from_arrays(list(fields.values()), names=list(fields))
        absent = np.append(self._only(cells).isna().to_numpy(dtype=bool), False)
        offsets = pa.array(records.offsets.astype("int32"), mask=absent)
        lists = pa.ListArray.from_arrays(offsets, flat)
        return {self.columns_[0]: pd.arrays.ArrowExtensionArray(lists)}

    def never_seen(self, cells):
        """Nothing: a record of an unknown code stays as it is."""
        return []


def _as_measured(records):
    """Values of records as exact as they came, NaN where null, and the type that holds them."""
    given = records.fields.get("value")
    if given is None or pa.types.is_null(given.type):
        return np.full(len(records.time), np.nan), pa.float32()
    small = pa.types.is_float32(given.type) or pa.types.is_float16(given.type)
    exact = pc.cast(given, pa.float64()).to_numpy(zero_copy_only=False)
    return np.array(exact), pa.float32() if small else pa.float64()


def _as_float(column):
    """A column of numbers as float64, as exact as it came."""
    if is_numeric_dtype(column.dtype):
        return column.to_numpy(dtype="float64", na_value=np.nan)
    return pd.to_numeric(column.astype(object)).to_numpy(dtype="float64", na_value=np.nan)


def lab_tokens(modality, width, n_layers, n_heads, dropout=0.0, use_time=False):
    """Wrap a declared modality: `Events` has a stream to read, `Labs` a table."""
    kind = StreamTokens if modality._one_column else TableTokens
    return kind(modality, width, n_layers, n_heads, dropout, use_time)
