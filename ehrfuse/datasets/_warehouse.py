"""The same queries in a warehouse: BigQuery, Spark, or whatever else Ibis connects to.

Queries are written once, in DuckDB's SQL; Ibis translates them and brings back Arrow. What is small
(stays, cohort rules) is put together here, what is large (measurements, drugs, notes) is filtered
there, so that only rows of the cohort within their time travel.
"""

import uuid

import pyarrow as pa

from ehrfuse._runtime import import_optional
from ehrfuse.datasets._tables import _RENAMED, Tables, parse_schema


class Warehouse(Tables):
    """Tables of an Ibis connection.

    Parameters
    ----------
    connection : ibis backend
        Its tables, of all databases that it lists, are found by name, in any case.
    schema : str
    """

    def __init__(self, connection, schema):
        self.ibis = import_optional("ibis", "warehouse")
        self.schema = parse_schema(schema)
        self.backend = connection
        self.files, self.headers, self.handles = {}, {}, {}
        self._names = {}
        for place, name in self._listed():
            known = _RENAMED.get(name.lower(), name.lower())
            if known in self.schema and known not in self.files:
                handle = connection.table(name, database=place)
                self.files[known] = f"{place}.{name}" if place else name
                self.headers[known] = [column.lower() for column in handle.columns]
                self.handles[known] = handle

    def _listed(self):
        """Pairs of database and table; the current database first."""
        pairs = [(None, name) for name in self.backend.list_tables()]
        try:
            databases = self.backend.list_databases()
        except (AttributeError, NotImplementedError):
            databases = []
        for place in sorted(databases):
            if place not in ("information_schema", "pg_catalog", "system", "temp"):
                pairs += [(place, name) for name in self.backend.list_tables(database=place)]
        return pairs

    def __exit__(self, *error):
        for name in self._names.values():
            self.backend.drop_table(name, force=True)

    def _source(self, name):
        place, _, table = self.files[name].rpartition(".")
        return f'"{place}"."{table}"' if place else f'"{table}"'

    def _select(self, table, column):
        # The engine quotes names as they were made; here their case may differ.
        found = column.find(self.headers[table])
        if found is not None:
            real = self.handles[table].columns[self.headers[table].index(found)]
            return f'CAST("{real}" AS {column.kind}) AS "{column.name}"'
        return super()._select(table, column)

    def register(self, name, frame):
        """Put a small frame into the warehouse under a name of this session's own."""
        if name in self._names:
            self.backend.drop_table(self._names[name], force=True)
        own = f"ehrfuse_{name}_{uuid.uuid4().hex[:12]}"
        table = pa.Table.from_pandas(frame, preserve_index=False)
        self.backend.create_table(own, table)
        self._names[name] = own

    def _translated(self, sql):
        for name, own in sorted(self._names.items(), key=lambda pair: -len(pair[0])):
            for word in ("FROM", "JOIN"):
                sql = sql.replace(f"{word} {name} ", f"{word} {own} ")
        return self.backend.sql(sql, dialect="duckdb")

    def query(self, sql):
        """Run a query and return an Arrow table."""
        return self._translated(sql).to_pyarrow()

    def stream(self, sql, size=500_000):
        """Run a query and yield Arrow batches."""
        yield from self._translated(sql).to_pyarrow_batches(chunk_size=size)
