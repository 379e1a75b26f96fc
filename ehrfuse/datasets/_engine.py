"""Parquet helpers for nested columns, and the way from long arrays to an events column."""

import json
import os
import uuid
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

EVENT_TYPE = pa.struct(
    [
        ("time", pa.float32()),
        # Parquet gives dictionaries back with int32 indices; any other width would not round-trip.
        ("code", pa.dictionary(pa.int32(), pa.string())),
        ("value", pa.float32()),
    ]
)
# Parquet calls the items of a list "element"; with another name the type would change on reading.
EVENTS_TYPE = pa.list_(pa.field("element", EVENT_TYPE))

_KEY = b"ehrfuse"


def events_series(row, time, code, value, n_rows, present=None, index=None, name=None):
    """Gather a long table of observations into one Arrow events column.

    Parameters
    ----------
    row : int array of shape (n_observations,)
        Row of the new column that an observation belongs to, from 0 to ``n_rows - 1``; any order.
    time : float array of shape (n_observations,)
        Finite times relative to the prediction, in the unit that the modality will declare.
    code : array of str or Categorical of shape (n_observations,)
        A Categorical keeps all its categories, in their order, as the column's dictionary.
    value : float array of shape (n_observations,)
        NaN becomes null: a code without a number.
    n_rows : int
        Length of the column.
    present : bool array of shape (n_rows,), default=None
        Rows whose cell is a list, possibly an empty one; the others are null. By default the rows
        that have an observation.
    index : Index of length n_rows, default=None
        Index of the column; by default a RangeIndex.
    name : str, default=None
        Name of the column.

    Returns
    -------
    column : Series of shape (n_rows,)
        Dtype ``list<element: struct<time: float32, code: dictionary, value: float32>>``; events
        ascend in time, ties stay in the order given.

    Raises
    ------
    ValueError
        If the arrays differ in length, a row number is out of range, a time is not finite, or a
        row has events though `present` says that it has none.

    Examples
    --------
    >>> from ehrfuse.datasets._engine import events_series
    >>> column = events_series([0, 2, 0], [-1, -2, -3], ["HR", "MAP", "HR"], [80, 65, 90], 3)
    >>> column[0]
    [{'time': -3.0, 'code': 'HR', 'value': 90.0}, {'time': -1.0, 'code': 'HR', 'value': 80.0}]
    >>> column.isna().tolist()
    [False, True, False]
    """
    row, time = np.asarray(row, dtype=np.int64), np.asarray(time, dtype=np.float64)
    value = np.asarray(value, dtype=np.float64)
    code = code if isinstance(code, pd.Categorical) else pd.Categorical(code)
    count = _count(row, time, code, value, n_rows)
    present = count > 0 if present is None else np.asarray(present, dtype=bool)
    _check_present(present, count)

    if not _ascending(row, time):
        order = np.lexsort((time, row))  # stable: ties stay as given
        time, value, code = time[order], value[order], code[order]
    codes = pa.DictionaryArray.from_arrays(
        pa.array(code.codes.astype(np.int32), mask=code.codes < 0),
        pa.array(code.categories.astype(str).tolist(), pa.string()),
    )
    values = pa.array(value.astype(np.float32), mask=np.isnan(value))
    records = pa.StructArray.from_arrays(
        [pa.array(time.astype(np.float32)), codes, values], fields=list(EVENT_TYPE)
    )
    return records_series(records, count, present, index=index, name=name)


def records_series(records, count, present, index=None, name=None):
    """Cut a struct array into the cells of a column.

    Parameters
    ----------
    records : pyarrow.StructArray of shape (n_records,)
        The records of row 0, then those of row 1, and so on.
    count : int array of shape (n_rows,)
        Records per row; they sum to n_records.
    present : bool array of shape (n_rows,)
        Rows whose cell is a list; the others are null and must have no records.
    index : Index of length n_rows, default=None
    name : str, default=None

    Returns
    -------
    column : Series of shape (n_rows,), dtype ``list<element: struct<...>>``
    """
    offsets = pa.array(np.concatenate([[0], np.cumsum(count)]).astype(np.int32))
    kind = pa.list_(pa.field("element", records.type))
    cells = pa.ListArray.from_arrays(offsets, records, type=kind, mask=pa.array(~present))
    return pd.Series(pd.arrays.ArrowExtensionArray(cells), index=index, name=name)


def _count(row, time, code, value, n_rows):
    """Observations per row, after the checks."""
    if len({len(row), len(time), len(code), len(value)}) != 1:
        raise ValueError(
            "row, time, code and value must be equally long, but have "
            f"{len(row)}, {len(time)}, {len(code)} and {len(value)} items."
        )
    if len(row) and (row.min() < 0 or row.max() >= n_rows):
        raise ValueError(
            f"row holds numbers from {row.min()} to {row.max()}; with n_rows={n_rows} only "
            f"0 to {n_rows - 1} are allowed."
        )
    if not np.isfinite(time).all():
        raise ValueError(
            f"{(~np.isfinite(time)).sum()} times are not finite; "
            "drop those observations or give them a time."
        )
    if len(row) > np.iinfo(np.int32).max:
        raise ValueError(
            f"{len(row)} observations do not fit into one events column (at most 2**31 - 1); "
            "split the rows over several frames."
        )
    return np.bincount(row, minlength=n_rows)


def _check_present(present, count):
    if present.shape != count.shape:
        raise ValueError(
            f"present has shape {present.shape}, but the column has {len(count)} rows; "
            "give one flag per row."
        )
    contradicted = int((count[~present] > 0).sum())
    if contradicted:
        raise ValueError(
            f"{contradicted} rows have events though present is False there; "
            "mark them as present or drop their events."
        )


def _ascending(row, time):
    step = np.diff(row)
    return bool(((step > 0) | ((step == 0) & (np.diff(time) >= 0))).all())


def write_parquet(X, path):
    """Write a frame with nested columns to a Parquet file that every reader can open.

    ``DataFrame.to_parquet`` writes Arrow list and struct columns in a way that
    ``pandas.read_parquet`` cannot read back. This writer keeps index and dtypes and leaves out
    what stops pandas, so that `read_parquet` gives an equal frame and plain pandas opens the
    file too (nested cells are then Python objects).

    Parameters
    ----------
    X : DataFrame of shape (n_rows, n_columns)
        Columns named by distinct strings. Besides what pandas itself writes: Arrow-backed
        columns, object cells that are lists of dicts (they come back as an Arrow column), and
        numpy arrays, of one shape per column if they have more than one axis.
    path : str or Path
        Where to write. An existing file is replaced only when the new one is complete.

    Raises
    ------
    TypeError
        If `X` is not a DataFrame or a column name is not a string.
    ValueError
        If column names repeat or a column holds cells that Parquet cannot take.

    See Also
    --------
    read_parquet : The reader.

    Notes
    -----
    Parquet has no timestamps in seconds: ``timestamp[s]`` comes back as ``timestamp[ms]``.

    Examples
    --------
    >>> import pandas as pd
    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> from ehrfuse.datasets import read_parquet, write_parquet
    >>> X = pd.DataFrame({"events": [[{"time": -1.0, "code": "HR", "value": 80.0}], [], None]})
    >>> with TemporaryDirectory() as folder:
    ...     write_parquet(X, Path(folder) / "x.parquet")
    ...     events = read_parquet(Path(folder) / "x.parquet")["events"]
    >>> events.isna().tolist()
    [False, False, True]
    """
    _check_frame(X)
    shapes, ready = {}, {}
    for column in X.columns:
        shape = _common_shape(X[column])
        if shape is not None:
            shapes[column] = list(shape)
            ready[column] = X[column].map(lambda cell: cell.ravel(), na_action="ignore")
    table = _to_table(X.assign(**ready) if ready else X)
    backed = [str(c) for c in X.columns if isinstance(X[c].dtype, pd.ArrowDtype)]
    backed += [c for c in X.columns if c not in backed and _is_records(table.field(c).type)]
    table = _describe(table, backed, shapes)

    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        pq.write_table(table, temporary, compression="zstd", use_compliant_nested_type=False)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _check_frame(X):
    if not isinstance(X, pd.DataFrame):
        raise TypeError(f"X is a {type(X).__name__}; write_parquet takes a pandas DataFrame.")
    wrong = [column for column in X.columns if not isinstance(column, str)]
    if wrong:
        raise TypeError(f"Column names {wrong[:5]} are not strings; rename them.")
    if not X.columns.is_unique:
        twice = X.columns[X.columns.duplicated()].unique().tolist()
        raise ValueError(f"Column names {twice} occur more than once; rename or drop them.")


def _common_shape(column):
    """Shape of cells that are arrays of two or more axes; None for every other column."""
    if column.dtype != object:
        return None
    cells = [cell for cell in column if isinstance(cell, np.ndarray)]
    shapes = {cell.shape for cell in cells}
    if not any(len(shape) > 1 for shape in shapes):
        return None
    if len(shapes) > 1 or len(cells) < column.notna().sum():
        raise ValueError(
            f"Column {column.name!r} mixes arrays of shapes {sorted(shapes)} or other cells; "
            "arrays with several axes must have one shape in all rows."
        )
    return shapes.pop()


def _to_table(X):
    try:
        return pa.Table.from_pandas(X)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
        for column in X.columns:
            try:
                pa.array(X[column], from_pandas=True)
            except pa.ArrowException:
                raise ValueError(
                    f"Column {column!r} holds cells that Parquet cannot take ({error.args[0]}); "
                    "make all its cells of one kind."
                ) from error
        raise


def _is_records(kind):
    """Tell what object cells of dicts become: lists of structs stay in Arrow."""
    listed = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return pa.types.is_struct(kind) or (listed and pa.types.is_struct(kind.value_type))


def _describe(table, backed, shapes):
    """Note the Arrow-backed columns and hide their dtypes from pandas, which trips on them."""
    metadata = dict(table.schema.metadata)
    described = json.loads(metadata[b"pandas"])
    for column in described["columns"]:
        if column["name"] in backed:
            column["numpy_type"] = "object"
    metadata[b"pandas"] = json.dumps(described).encode()
    metadata[_KEY] = json.dumps({"arrow": backed, "shapes": shapes}).encode()
    return table.replace_schema_metadata(metadata)


def read_parquet(path, columns=None):
    """Read a Parquet file, keeping nested columns in Arrow.

    Parameters
    ----------
    path : str or Path
        A file of `write_parquet`, or any other Parquet file.
    columns : list of str, default=None
        Columns to read, in this order; by default all. The index is always read.

    Returns
    -------
    X : DataFrame of shape (n_rows, n_columns)
        Equal to the frame that was written. Cells that are lists of records form an Arrow-backed
        column whoever wrote the file; a null list stays null and an empty list stays empty.

    Raises
    ------
    FileNotFoundError
        If there is no file at `path`.
    ValueError
        If the file is not Parquet or lacks one of `columns`.

    See Also
    --------
    write_parquet : The writer, with an example.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No file at {str(path)!r}; check the path.")
    if isinstance(columns, str):
        raise TypeError(f"columns={columns!r} is one string; give a list of column names.")
    try:
        schema = pq.read_schema(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{str(path)!r} is not a readable Parquet file ({error}).") from error
    lost = [column for column in columns or [] if column not in schema.names]
    if lost:
        raise ValueError(
            f"{str(path)!r} has no columns {lost}; it has {', '.join(map(repr, schema.names))}."
        )
    table = pq.read_table(path, columns=columns, use_pandas_metadata=True)
    return _to_frame(table, columns)


def _without(table, names):
    """Blank columns, and drop what the metadata say of them: pandas stumbles over such dtypes."""
    metadata = dict(table.schema.metadata or {})
    if b"pandas" in metadata:
        described = json.loads(metadata[b"pandas"])
        described["columns"] = [c for c in described["columns"] if c["name"] not in names]
        metadata[b"pandas"] = json.dumps(described).encode()
    for name in names:  # blanked, not dropped: a table without columns has lost its length
        table = table.set_column(
            table.schema.get_field_index(name), name, pa.nulls(len(table), pa.int8())
        )
    return table.replace_schema_metadata(metadata)


def _to_frame(table, columns):
    own = json.loads((table.schema.metadata or {}).get(_KEY, b'{"arrow": [], "shapes": {}}'))
    backed = [f.name for f in table.schema if f.name in own["arrow"] or _is_records(f.type)]
    X = _without(table, backed).to_pandas()
    for name in backed:
        cells = table.column(name).combine_chunks()
        X[name] = pd.Series(pd.arrays.ArrowExtensionArray(cells), index=X.index)
    for name, shape in own["shapes"].items():
        if name in X.columns:
            X[name] = X[name].map(lambda cell, s=shape: cell.reshape(s), na_action="ignore")
    return X if columns is None else X[list(columns)]
