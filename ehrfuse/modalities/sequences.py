"""Events: a coded stream in one cell. Visits: a list of wide records in one cell."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ehrfuse._data import Block
from ehrfuse._runtime import check_option
from ehrfuse.modalities._base import Modality, check_count
from ehrfuse.modalities._numbers import RobustScale, build_features, numeric_features, scaled
from ehrfuse.modalities._streams import Records, encode_strings, read_records
from ehrfuse.modalities._summary import SummaryPlan, code_ids, event_values, n_rows
from ehrfuse.modalities._visits import bin_events, check_width, mean_of
from ehrfuse.nn.encoders import EventEncoder, TableEncoder, VisitEncoder
from ehrfuse.nn.timeline import VisitInput

__all__ = ["Events", "Visits"]

UNITS = ("h", "d", "w", "min")


class Events(Modality):
    """A stream of coded events: a cell is a list of ``{"time", "code", "value"}``.

    Parameters
    ----------
    columns : str
        One column. The recommended dtype is Arrow
        ``list<struct<time: float32, code: string, value: float32>>``; lists of dicts work too.
        Null: nothing is known. Empty list: nothing happened.
    time_unit : {"h", "d", "w", "min"}, default="h"
        Unit of ``time``, which is relative to the prediction: 0 is then, the past is negative.
    now : float, default=0.0
        Time that "time since" is measured from, in `time_unit`.
    summary : bool, default=True
        Give a token of summary statistics per code (those of `EventSummary`).
    windows : int, default=4
        The summary also has the mean of every one of so many equal time windows, and what
        `EventSummary` adds with them.
    stream : bool, default=False
        Give a token pooled over the raw events as well. It costs two to three times the fit and
        changed nothing on 4,000 intensive-care stays; try it where the order of events matters.
    max_events : int, default=512
        The raw stream keeps the latest events of a row; the summary reads all.
    max_codes : int, default=200
        Codes kept, the most frequent in `fit`; others are left out.
    min_count : int, default=1
        Training rows that must hold a code for it to be kept; raise it where codes are free text.
    n_bins : int, default=8
        Bins of the piecewise-linear encoding of every statistic.
    dropout : float, default=0.2
        On the summary token.
    column_dropout : float, default=0.5
        Share of the statistics hidden from every training row.

    Attributes
    ----------
    codes_ : list of str
    """

    _one_column = True

    def __init__(
        self,
        columns,
        *,
        time_unit="h",
        now=0.0,
        summary=True,
        windows=4,
        stream=False,
        max_events=512,
        max_codes=200,
        min_count=1,
        n_bins=8,
        dropout=0.2,
        column_dropout=0.5,
    ):
        super().__init__(columns)
        self.time_unit = time_unit
        self.now = now
        self.summary = summary
        self.windows = windows
        self.stream = stream
        self.max_events = max_events
        self.max_codes = max_codes
        self.min_count = min_count
        self.n_bins = n_bins
        self.dropout = dropout
        self.column_dropout = column_dropout

    def _check_params(self):
        check_option(self.time_unit, "time_unit", UNITS)
        for name in ("max_events", "max_codes", "min_count", "n_bins"):
            check_count(getattr(self, name), name)
        check_count(self.windows, "windows", 0)
        if not (self.summary or self.stream):
            raise ValueError(f"{self} reads nothing; leave summary or stream on, or use 'drop'.")

    def _learn(self, cells):
        records = read_records(self._only(cells), ("time", "code"))
        records.refuse_future(self.now)
        values = event_values(records)
        self.plan_, table = SummaryPlan.learn(
            records, values, self.max_codes, self.now, self.windows, min_count=self.min_count
        )
        self.codes_ = self.plan_.codes
        self.time_scale_ = _scale_of(self.now - records.time)
        code = code_ids(records, self.codes_)
        self.value_scale_ = _scale_by_code(code, values, len(self.codes_))
        if self.summary:
            self.summary_scale_ = RobustScale.learn(table)
            known = self._only(cells).notna().to_numpy()
            self.features_ = numeric_features(
                self.summary_scale_.apply(table, out=table), self.n_bins, known
            )

    def _read(self, cells, present):
        records = read_records(self._only(cells), ("time", "code"))
        records.refuse_future(self.now)
        values = event_values(records)
        arrays, ragged = {}, {}
        if self.summary:
            table = self.plan_.table(records, values)
            self.summary_scale_.apply(table, out=table)
            table[~present] = np.nan
            arrays["summary"] = table
        if self.stream:
            ragged = self._stream(records, values, present)
        return Block(present, arrays, ragged)

    def _stream(self, records, values, present):
        code = code_ids(records, self.codes_)
        known = (code >= 0) & present[records.row]
        counts = np.bincount(records.row[known], minlength=len(present))
        kept = Records(np.concatenate([[0], np.cumsum(counts)]), {}, records.time[known])
        places, offsets = kept.latest(self.max_events)
        code = code[known][places]
        center, scale = self.value_scale_
        value = scaled(values[known][places], center[code], scale[code])
        time = (self.now - kept.time[places]) / self.time_scale_
        return {
            "code": (code.astype("int32"), offsets),
            "value": (value.astype("float32"), offsets),
            "time": (time.astype("float32"), offsets),
        }

    def make_summary_encoder(self, d_model, n_members=1):
        """Build the encoder of the summary alone.

        Parameters
        ----------
        d_model : int
        n_members : int, default=1

        Returns
        -------
        encoder : Module or None
            From `values` (b, p) to one token; None where `summary` is off.
        """
        if not self.summary:
            return None
        return TableEncoder(
            build_features(self.features_), [], d_model, n_members,
            self.dropout, self.column_dropout,
        )  # fmt: skip

    def make_encoder(self, d_model, n_members=1):
        summary = self.make_summary_encoder(d_model, n_members)
        return EventEncoder(max(1, len(self.codes_)), d_model, summary, self.stream)


class EventVisits(Events):
    """`Events` read as visits; what the sequence methods make of a declared `Events`.

    Parameters
    ----------
    columns, time_unit, now, summary, windows, stream, max_events, max_codes, min_count : optional
        As in `Events`; the raw stream is not given.
    n_bins : int
        As in `Events`.
    dropout, column_dropout : float
        As in `Events`.
    bin : float, default=1.0
        Width of a bin, in `time_unit`.
    max_visits : int, default=64
        The latest bins are kept.
    """

    def __init__(
        self,
        columns,
        *,
        time_unit="h",
        now=0.0,
        summary=True,
        windows=4,
        stream=False,
        max_events=512,
        max_codes=200,
        min_count=1,
        n_bins=8,
        dropout=0.2,
        column_dropout=0.5,
        bin=1.0,
        max_visits=64,
    ):
        super().__init__(
            columns, time_unit=time_unit, now=now, summary=summary, windows=windows, stream=stream,
            max_events=max_events, max_codes=max_codes, min_count=min_count, n_bins=n_bins,
            dropout=dropout, column_dropout=column_dropout,
        )  # fmt: skip
        self.bin = bin
        self.max_visits = max_visits

    def _check_params(self):
        super()._check_params()
        check_width(self.bin)
        check_count(self.max_visits, "max_visits")

    def _learn(self, cells):
        super()._learn(cells)
        records = read_records(self._only(cells), ("time", "code"))
        code, values = code_ids(records, self.codes_), event_values(records)
        valued = (code >= 0) & ~np.isnan(values)
        self.valued_ = np.bincount(code[valued], minlength=len(self.codes_)) > 0
        _, numbers, _ = self._bins(records)
        self.mean_ = mean_of(numbers)

    def _bins(self, records):
        """Ages, scaled numbers and offsets; a code without values is 1 where it happened."""
        code, values = code_ids(records, self.codes_), event_values(records)
        bare = (code >= 0) & ~self.valued_[code] if len(self.codes_) else code > 0
        age, numbers, offsets = bin_events(
            records, code, np.where(bare, 1.0, values), len(self.codes_), self.bin, self.now,
            self.max_visits,
        )  # fmt: skip
        center, scale = (part[: len(self.codes_)] for part in self.value_scale_)
        return age, scaled(numbers, center, scale), offsets

    def _read(self, cells, present):
        block = super()._read(cells, present)
        records = read_records(self._only(cells), ("time", "code"))
        age, numbers, offsets = self._bins(records)
        length = np.diff(offsets)
        shown = np.repeat(present, length)
        offsets = np.concatenate([[0], np.cumsum(np.where(present, length, 0))]).astype("int64")
        ragged = {"time": (age[shown], offsets), "numbers": (numbers[shown], offsets)}
        arrays = {name: array for name, array in block.arrays.items() if name == "summary"}
        return Block(present, arrays, ragged)

    def make_encoder(self, d_model, n_members=1):
        return VisitInput(len(self.codes_), 0, d_model)


class Visits(Modality):
    """A history of visits: a cell is a list of ``{"time", field, ...}``, one record a contact.

    Parameters
    ----------
    columns : str
        One column. Fields are numbers (null where not taken) or lists of codes; Arrow
        ``list<struct<...>>`` is recommended, lists of dicts work too.
    time_unit : {"d", "h", "w", "min"}, default="d"
        Unit of ``time``, which is relative to the prediction: 0 is then, the past is negative.
    now : float, default=0.0
        Time that ages are measured from; gestational weeks need it.
    max_visits : int, default=64
        The latest visits are kept.
    max_codes : int, default=500
        Codes kept over all code fields, the most frequent in `fit`.
    min_count : int, default=1
        Training rows that must hold a code for it to be kept; raise it where codes are free text.

    Attributes
    ----------
    numeric_fields_, code_fields_ : list of str
    codes_ : list of str
        ``"field:code"`` of every code kept.
    """

    _one_column = True

    def __init__(
        self, columns, *, time_unit="d", now=0.0, max_visits=64, max_codes=500, min_count=1
    ):
        super().__init__(columns)
        self.time_unit = time_unit
        self.now = now
        self.max_visits = max_visits
        self.max_codes = max_codes
        self.min_count = min_count

    def _check_params(self):
        check_option(self.time_unit, "time_unit", UNITS)
        check_count(self.max_visits, "max_visits")
        check_count(self.max_codes, "max_codes")
        check_count(self.min_count, "min_count")

    def _learn(self, cells):
        records = read_records(self._only(cells), ("time",))
        records.refuse_future(self.now)
        fields = {name: f for name, f in records.fields.items() if name != "time"}
        self.numeric_fields_ = sorted(n for n, f in fields.items() if _is_number(f.type))
        self.code_fields_ = sorted(set(fields) - set(self.numeric_fields_))
        self.time_scale_ = _scale_of(self.now - records.time)
        self.scale_ = RobustScale.learn(self._numbers(records))
        found, visits = self._code_words(records)
        words, place, counts = np.unique(
            np.asarray(found, dtype=object), return_inverse=True, return_counts=True
        )
        counts[n_rows(records.row[visits], place, len(words)) < self.min_count] = 0
        ranked = sorted((-n, word) for n, word in zip(counts, words, strict=True) if n)
        ranked = ranked[: self.max_codes]
        self.codes_ = sorted(word for _, word in ranked)

    def _numbers(self, records):
        table = np.full((len(records.time), len(self.numeric_fields_)), np.nan, "float32")
        for j, name in enumerate(self.numeric_fields_):
            if name in records.fields and not pa.types.is_null(records.fields[name].type):
                table[:, j] = records.number(name)
        if np.isinf(table).any():
            raise ValueError(
                f"Column {self.columns_[0]!r} holds an infinite number; replace it by null."
            )
        return table

    def _code_words(self, records):
        """Every code as ``"field:code"``, and the visit that it belongs to."""
        words, visits = [], []
        for name in self.code_fields_:
            field = records.fields.get(name)
            if field is None or pa.types.is_null(field.type):
                continue
            visit = np.arange(len(field))
            if pa.types.is_list(field.type) or pa.types.is_large_list(field.type):
                lengths = pc.fill_null(pc.list_value_length(field), 0)
                visit = np.repeat(visit, lengths.to_numpy(zero_copy_only=False))
                field = field.flatten()
            codes, names = encode_strings(field)
            labels = np.array([f"{name}:{word}" for word in names], dtype=object)
            words.extend(labels[codes[codes >= 0]])
            visits.extend(visit[codes >= 0])
        return words, np.asarray(visits, dtype="int64")

    def _read(self, cells, present):
        records = read_records(self._only(cells), ("time",))
        records.refuse_future(self.now)
        hidden = ~present[records.row]
        lengths = np.where(present, np.diff(records.offsets), 0)
        places, offsets = records.latest(self.max_visits)
        shown = ~hidden[places]
        places, offsets = places[shown], _offsets(np.minimum(lengths, self.max_visits))
        numbers = self.scale_.apply(self._numbers(records)[places])
        time = ((self.now - records.time[places]) / self.time_scale_).astype("float32")
        ragged = {"time": (time, offsets), "numbers": (numbers, offsets)}
        if self.codes_:
            ragged |= self._codes(records, places, offsets)
        return Block(present, ragged=ragged)

    def _codes(self, records, places, offsets):
        words, visits = self._code_words(records)
        place = {word: j for j, word in enumerate(self.codes_)}
        code = np.array([place.get(word, -1) for word in words], dtype="int32")
        kept = np.full(len(records.time), -1)
        kept[places] = np.arange(len(places))
        visit = kept[visits]
        known = (code >= 0) & (visit >= 0)
        order = np.argsort(visit[known], kind="stable")
        code, visit = code[known][order], visit[known][order]
        row = np.searchsorted(offsets, visit, side="right") - 1
        code_offsets = _offsets(np.bincount(row, minlength=len(offsets) - 1))
        within = (visit - offsets[row]).astype("int32")
        return {"code": (code, code_offsets), "code_visit": (within, code_offsets)}

    def make_encoder(self, d_model, n_members=1):
        return VisitEncoder(len(self.numeric_fields_), len(self.codes_), d_model)


def _offsets(lengths):
    return np.concatenate([[0], np.cumsum(lengths)]).astype("int64")


def _scale_of(age):
    """Largest distance in time; 1 where there is none."""
    return float(np.abs(age).max(initial=0.0)) or 1.0


def _is_number(kind):
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def _scale_by_code(code, values, n_codes):
    """Median and robust spread of every code's values, as two arrays."""
    center, scale = np.zeros(max(1, n_codes), "float32"), np.ones(max(1, n_codes), "float32")
    valued = (code >= 0) & ~np.isnan(values)
    order = np.flatnonzero(valued)[np.argsort(code[valued], kind="stable")]
    for part in np.split(order, np.flatnonzero(np.diff(code[order])) + 1):
        if len(part):
            learned = RobustScale.learn(values[part][:, None])
            center[code[part[0]]], scale[code[part[0]]] = learned.center[0], learned.scale[0]
    return center, scale
