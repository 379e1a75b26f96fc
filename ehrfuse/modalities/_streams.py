"""Cells that hold lists of records, as flat arrays with offsets.

The recommended cell is an Arrow ``list<struct<...>>``; object cells (lists of dicts, arrays of
dicts, dicts of arrays, DataFrames) are the beginner's form and are canonicalised once per call.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from ehrfuse.modalities._base import describe


@dataclass(frozen=True)
class Records:
    """All records of a column: row i owns records offsets[i] to offsets[i + 1], by time."""

    offsets: np.ndarray
    fields: dict[str, pa.Array]
    time: np.ndarray
    column: str = ""

    @property
    def row(self) -> np.ndarray:
        """Row number of every record."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))

    def number(self, name: str) -> np.ndarray:
        """One field as float32, null as NaN."""
        try:
            numbers = pc.cast(self.fields[name], pa.float32())
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise ValueError(
                f"Column {self.column!r} has records whose {name!r} is {self.fields[name].type}; "
                "it must be a number or null. Put words into the code."
            ) from error
        return numbers.to_numpy(zero_copy_only=False).astype("float32")

    def refuse_future(self, now: float) -> None:
        """Raise where records lie after the prediction: no model may see them."""
        late = int((self.time > now + 1e-4 * max(1.0, abs(now))).sum())
        if late:
            raise ValueError(
                f"Column {self.column!r} has {late} records after the prediction time (time "
                f"above now={now:g}, the highest is {self.time.max():g}); leave them out, or "
                "set `now` if time counts from elsewhere."
            )

    def strings(self, name: str) -> tuple[np.ndarray, list[str]]:
        """One field as integer codes and their dictionary; null is -1."""
        return encode_strings(self.fields[name])

    def latest(self, limit: int) -> "tuple[np.ndarray, np.ndarray]":
        """Places of the last `limit` records of every row, and the new offsets."""
        length = np.minimum(np.diff(self.offsets), limit)
        offsets = np.concatenate([[0], np.cumsum(length)])
        within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], length)
        return np.repeat(self.offsets[1:] - length, length) + within, offsets


def encode_strings(field: pa.Array) -> tuple[np.ndarray, list[str]]:
    """Integer codes into a list of strings; null is -1."""
    if not pa.types.is_dictionary(field.type):
        field = field.cast(pa.string()).dictionary_encode()
    codes = pc.fill_null(field.indices.cast(pa.int64()), -1).to_numpy(zero_copy_only=False)
    return codes, [str(word) for word in field.dictionary.to_pylist()]


def read_records(column: pd.Series, needs: tuple[str, ...]) -> Records:
    """Flatten a column of record lists and put every row's records in time order.

    Parameters
    ----------
    column : Series of n cells
    needs : names of fields that every record must have; the first is the time
    """
    lists = _as_arrow(column, needs)
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype("int64")
    flat = lists.flatten()
    if pa.types.is_null(flat.type):
        flat = pa.array([], pa.struct([(name, pa.float32()) for name in needs]))
    if not pa.types.is_struct(flat.type):
        raise _wrong(column, f"lists of {flat.type}", needs)
    if flat.null_count:
        raise _wrong(column, "a list with a null record", needs)
    fields = {flat.type.field(i).name: flat.field(i) for i in range(flat.type.num_fields)}
    lost = [name for name in needs if name not in fields]
    if lost:
        raise _wrong(column, f"records with the fields {list(fields)}", needs)
    return _in_time_order(column, offsets, fields, needs[0])


def _in_time_order(column, offsets, fields, clock):
    kind = fields[clock].type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise ValueError(
            f"Column {column.name!r} has {clock} of type {kind}; it must be a number relative to "
            "the prediction time (past negative). Subtract the prediction time first."
        )
    time = pc.cast(fields[clock], pa.float32()).to_numpy(zero_copy_only=False).astype("float32")
    if not np.isfinite(time).all():
        raise ValueError(
            f"Column {column.name!r} has records whose {clock} is null or not finite; "
            "every record needs one. Put timeless facts into columns of their own."
        )
    records = Records(offsets, fields, time, column.name)
    row = records.row
    if len(time) and ((np.diff(time) < 0) & (np.diff(row) == 0)).any():
        order = np.lexsort((time, row))  # stable: records of equal time keep their order
        taken = {name: field.take(pa.array(order)) for name, field in fields.items()}
        records = Records(offsets, taken, time[order], column.name)
    return records


def _as_arrow(column, needs):
    if isinstance(column.dtype, pd.ArrowDtype):
        lists = pa.array(column)
        lists = lists.combine_chunks() if isinstance(lists, pa.ChunkedArray) else lists
        if not (pa.types.is_list(lists.type) or pa.types.is_large_list(lists.type)):
            raise _wrong(column, f"Arrow type {lists.type}", needs)
        return lists
    null = column.isna().to_numpy()
    cells = [
        None if gone else _plain(cell, column, needs)
        for cell, gone in zip(column, null, strict=True)
    ]
    try:
        return pa.array(cells) if not null.all() else pa.array(cells, pa.list_(pa.null()))
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise _wrong(column, "records whose fields change their type", needs) from error


def _plain(cell, column, needs):
    """One object cell as a list of dicts with plain numbers."""
    if isinstance(cell, pd.DataFrame):
        cell = cell.to_dict("list")
    if isinstance(cell, Mapping):
        names = list(cell)
        if not all(np.ndim(cell[name]) for name in names):
            raise _wrong(column, "one record outside a list", needs)
        if len({len(cell[name]) for name in names}) > 1:
            raise _wrong(column, "a dict of arrays of unequal length", needs)
        cell = [
            dict(zip(names, record, strict=True)) for record in zip(*cell.values(), strict=True)
        ]
    if not isinstance(cell, list | tuple | np.ndarray):
        raise _wrong(column, describe(cell), needs)
    if not all(isinstance(record, Mapping) for record in cell):
        raise _wrong(column, "a list whose items are no records", needs)
    # A code is a name: as a float, long identifiers would run together.
    return [
        {name: value if name == "code" else _scalar(value) for name, value in record.items()}
        for record in cell
    ]


def _scalar(value):
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, int | np.integer | np.floating) and not isinstance(value, bool):
        return float(value)  # 80 and 80.5 in one list are one kind of number
    return value


def _wrong(column, got, needs):
    shape = ", ".join(f"{name!r}: ..." for name in needs)
    return ValueError(
        f"Column {column.name!r} holds {got}; a cell must be a list of records {{{shape}}}, "
        "an empty list where nothing happened, or null where nothing is known."
    )
