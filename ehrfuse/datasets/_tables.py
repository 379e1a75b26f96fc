"""Raw tables in a folder, and the embedded engine that reads them.

A table is a file ``NAME.csv``, ``NAME.csv.gz`` or ``NAME.parquet`` somewhere below the folder, with
headers in any case. A source says which columns it needs, of which type, and which may be absent;
from then on every query sees the same names and types, whatever the file was. Queries are plain
SQL in one dialect, so that `_warehouse` can send the same text to BigQuery or Spark.
"""

import gzip
import os
import re
from pathlib import Path

import pyarrow.parquet as pq

from ehrfuse._runtime import import_optional

SUFFIXES = (".parquet", ".csv", ".csv.gz")  # in the order of preference
DEPTH = 3
# Folders with a file per study or patient: nothing in them is a table.
_SKIPPED = {"files", "derived_images", "__pycache__"}
_RENAMED = {
    "mimic-cxr-2.0.0-metadata": "cxr_metadata",
    "hourly_labs_vitals": "hourly",
}


class Column:
    """One column that a source reads: its name, type, other spellings, and whether it may lack.

    Parameters
    ----------
    text : str
        ``name TYPE``, with ``|`` between spellings and ``?`` at the end where it may be absent:
        ``race|ethnicity VARCHAR?``.
    """

    def __init__(self, text):
        names, kind = text.split()
        self.names = names.split("|")
        self.name = self.names[0]
        self.optional = kind.endswith("?")
        self.kind = kind.rstrip("?")

    def find(self, columns):
        """Spelling of this column among lower-case `columns`; None if it is absent."""
        return next((name for name in self.names if name in columns), None)


def parse_schema(text):
    """Read a schema: a line per table, ``table: column TYPE, column TYPE?``.

    Parameters
    ----------
    text : str

    Returns
    -------
    schema : dict of str to list of Column
    """
    schema = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        table, _, columns = line.partition(":")
        schema[table] = [Column(column.strip()) for column in columns.split(",")]
    return schema


def find_tables(roots):
    """Files of all tables below some folders.

    Parameters
    ----------
    roots : path or list of paths

    Returns
    -------
    files : dict of str to Path
        By lower-case name without suffix; of several formats in one folder the first of `SUFFIXES`.
    """
    roots = [roots] if isinstance(roots, str | os.PathLike) else list(roots)
    found = {}
    for root in map(Path, roots):
        if not root.is_dir():
            raise FileNotFoundError(f"There is no folder {str(root)!r}; check the path.")
        for path in sorted(_walk(root, DEPTH)):
            suffix = next((s for s in SUFFIXES if path.name.lower().endswith(s)), None)
            if suffix is None or path.name.startswith("."):
                continue
            stem = path.name[: -len(suffix)].lower()
            found.setdefault(_RENAMED.get(stem, stem), []).append(path)
    return {name: _prefer(name, paths) for name, paths in found.items()}


def _walk(folder, depth):
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir() and depth and entry.name not in _SKIPPED:
                yield from _walk(Path(entry.path), depth - 1)
            elif entry.is_file():
                yield Path(entry.path)


def _prefer(name, paths):
    """Parquet before CSV before gzip; the same table in two folders is an error."""

    def rank(path):
        return next(i for i, s in enumerate(SUFFIXES) if path.name.lower().endswith(s))

    best = min(map(rank, paths))
    paths = [path for path in paths if rank(path) == best]
    if len(paths) > 1:
        places = " and ".join(repr(str(path)) for path in paths[:3])
        raise ValueError(f"Table {name!r} is there more than once: {places}; keep one of them.")
    return paths[0]


def header_of(path):
    """Lower-case column names of a file."""
    if path.name.lower().endswith(".parquet"):
        try:
            return [name.lower() for name in pq.read_schema(path).names]
        except Exception as error:
            raise ValueError(
                f"{str(path)!r} is not a readable Parquet file; delete it and make it again."
            ) from error
    try:
        with (gzip.open if path.name.lower().endswith(".gz") else open)(path, "rb") as file:
            line = file.readline()
    except (OSError, EOFError) as error:
        raise ValueError(
            f"{str(path)!r} cannot be read ({error}); it may be cut short: fetch it again."
        ) from error
    names = line.decode("utf-8-sig").strip().split(",")
    return [name.strip().strip('"').lower() for name in names]


class Tables:
    """The tables of one source, read by DuckDB.

    Parameters
    ----------
    roots : path or list of paths
        Folders with the tables.
    schema : str
        What is read, as `parse_schema` takes it.
    memory_limit : str, default="512MB"
        What the engine may hold; beyond it, it spills to a temporary folder.
    threads : int, default=None
        By default as many as there are cores, at most four.

    Attributes
    ----------
    files : dict of str to Path
        The files of the tables of the schema that are there.
    """

    def __init__(self, roots, schema, memory_limit="512MB", threads=None):
        self.duckdb = import_optional("duckdb", "cohort")
        self.schema = parse_schema(schema)
        self.memory_limit, self.threads = memory_limit, threads
        found = find_tables(roots)
        self.files = {name: found[name] for name in self.schema if name in found}
        self.headers = {name: header_of(path) for name, path in self.files.items()}
        self.connection = self._connect()

    def _connect(self):
        connection = self.duckdb.connect()
        threads = min(4, os.cpu_count() or 1) if self.threads is None else self.threads
        if not isinstance(threads, int) or threads < 1:
            raise ValueError(f"threads={threads!r}; give a whole number of at least 1, or None.")
        try:
            connection.execute("SET memory_limit = $1", [str(self.memory_limit)])
        except self.duckdb.Error:
            raise ValueError(
                f"memory_limit={self.memory_limit!r} is not understood; write it like '512MB'."
            ) from None
        connection.execute(f"SET threads = {threads}")
        connection.execute("SET preserve_insertion_order = false")
        connection.execute("SET enable_progress_bar = false")
        return connection

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.connection.close()

    def has(self, table, *columns):
        """Whether a table is there, and these columns of it."""
        return table in self.files and all(self._spelling(table, c) for c in columns)

    def _column(self, table, name):
        return next(column for column in self.schema[table] if column.name == name)

    def _spelling(self, table, name):
        return self._column(table, name).find(self.headers[table])

    def require(self, *tables):
        """Raise unless these tables are there."""
        lost = [table for table in tables if table not in self.files]
        if lost:
            raise FileNotFoundError(
                f"The tables {', '.join(lost)} are not in the folder; found are "
                f"{', '.join(sorted(self.files)) or 'none'}. Give the folder of the release."
            )

    def table(self, name):
        """SQL of one table with the names and types of the schema; absent columns are null."""
        columns = ", ".join(self._select(name, column) for column in self.schema[name])
        return f"(SELECT {columns} FROM {self._source(name)})"

    def _select(self, table, column):
        found = column.find(self.headers[table])
        if found is None and not column.optional:
            raise ValueError(
                f"Table {table!r} ({self._place(table)}) has no column {column.name!r}; it has "
                f"{', '.join(self.headers[table])}."
            )
        value = "NULL" if found is None else f'"{found}"'
        return f'CAST({value} AS {column.kind}) AS "{column.name}"'

    def _place(self, table):
        return str(self.files[table])

    def _source(self, name):
        path = str(self.files[name]).replace("'", "''")
        if path.lower().endswith(".parquet"):
            return f"read_parquet('{path}')"
        kinds = {c.find(self.headers[name]): c.kind for c in self.schema[name]}
        columns = ", ".join(
            f"'{h}': '{kinds.get(h, 'VARCHAR')}'" for h in self.headers[name]
        )  # nothing is guessed: a sniffer that sees integers in its sample would choke later
        return (
            f"read_csv('{path}', auto_detect = false, header = true, columns = {{{columns}}}, "
            "delim = ',', quote = '\"', escape = '\"', nullstr = '')"
        )

    def register(self, name, frame):
        """Put a small frame into the engine as a temporary table."""
        self.connection.register("_frame", frame)
        self.connection.execute(f"CREATE OR REPLACE TEMP TABLE {name} AS SELECT * FROM _frame")
        self.connection.unregister("_frame")

    def stream(self, sql, size=500_000):
        """Run a query and yield Arrow batches of so many rows at most."""
        try:
            result = self.connection.sql(sql)
            read = getattr(result, "to_arrow_reader", None) or result.fetch_arrow_reader
            yield from read(size)
        except self.duckdb.Error as error:
            raise _explained(error, self) from None

    def query(self, sql):
        """Run a query and return an Arrow table."""
        try:
            return self.connection.sql(sql).to_arrow_table()
        except self.duckdb.Error as error:
            raise _explained(error, self) from None  # the engine's own words quote whole rows


def _explained(error, tables):
    """Say what went wrong and where, without a word of what stands in the rows."""
    text = str(error)
    path = re.search(r"file = (.+)", text) or re.search(
        r"(?:stream|file)[:\s]+\"?(/[^\s\"]+)", text
    )
    place = f" in {path.group(1).strip()!r}" if path else ""
    line = re.search(r"CSV Error on Line: (\d+)", text)
    line = f", line {line.group(1)}" if line else ""
    wrong = re.search(r'converting column "([^"]+)".*?to \'(\w+)\'', text, re.DOTALL)
    if wrong:
        what = f"column {wrong.group(1)!r} holds something that is no {wrong.group(2)}"
    elif "Expected Number of Columns" in text:
        what = "a row has another number of columns than the header"
    elif "GZIP" in text:
        what = "the gzip stream ends too early; fetch the file again"
    elif "Could not convert" in text or "Conversion" in text:
        what = "a cell is not of the type that its column should have"
    elif isinstance(error, tables.duckdb.OutOfMemoryException):
        what = f"memory_limit={tables.memory_limit!r} does not suffice; give more"
    else:
        what = re.split(r"\n|Original Line", text)[0][:200]
    return ValueError(f"Reading the tables failed{place}{line}: {what}.")
