"""The same cohorts through Ibis: bit for bit what the embedded engine gives."""

import pandas as pd
import pyarrow as pa
import pytest
from benchmarks.make_mimic4 import make_mimic4

from ehrfuse.datasets import (
    in_hospital_mortality,
    load_eicu,
    load_mimic3,
    load_mimic4,
    readmission_30d,
)

ibis = pytest.importorskip("ibis")
pytestmark = pytest.mark.filterwarnings("ignore")  # other people's deprecations


def cells(X):
    return {name: [repr(cell) for cell in X[name].tolist()] for name in X.columns}


def same(a, b):
    assert list(a.X.columns) == list(b.X.columns)
    found, expected = cells(a.X), cells(b.X)
    for name in a.X.columns:
        assert found[name] == expected[name], name
    assert a.y.tolist() == b.y.tolist()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mimic")
    make_mimic4(folder, 6_000, "parquet", charted=20, notes=True, seed=4)
    return folder


def fill(connection, folder):
    """The tables as a warehouse has them: a database per module, names as in the release."""
    for path in sorted(folder.rglob("*.parquet")):
        if path.stem.startswith("mimic-cxr"):
            continue
        database = f"mimiciv_{path.parent.name}"
        if database not in connection.list_databases():
            connection.create_database(database)
        table = pa.parquet.read_table(path)
        connection.create_table(path.stem, table, database=database)
    return connection


@pytest.mark.parametrize(
    "task", [in_hospital_mortality(24, first_stay=False), readmission_30d()], ids=["icu", "left"]
)
def test_duckdb_through_ibis(made, task):
    connection = fill(ibis.duckdb.connect(), made)
    tables = set(connection.list_tables())
    same(load_mimic4(connection, task), load_mimic4(made, task))
    assert set(connection.list_tables()) == tables  # nothing of ours stays


def test_other_sources(shared_data):
    for load, folder in ((load_eicu, "eicu-crd-demo-2.0.1"), (load_mimic3, "mimic-iii-demo-1.4")):
        connection = ibis.duckdb.connect()
        task = in_hospital_mortality(24)
        for path in sorted((shared_data / folder).glob("*.csv.gz")):
            name = path.name.split(".")[0]
            if name.lower() in ("chartevents", "vitalaperiodic"):
                continue
            frame = pd.read_csv(path, low_memory=False).dropna(axis=1, how="all")
            if frame.empty:
                continue
            for column in frame:
                if column.lower().endswith(("time", "date", "dod", "dob")) and "24" not in column:
                    frame[column] = pd.to_datetime(frame[column]).astype("datetime64[us]")
            connection.create_table(name, pa.Table.from_pandas(frame, preserve_index=False))
        data = load(connection, task)
        raw = load(shared_data / folder, task)
        assert data.y.tolist() == raw.y.tolist()
        assert cells(data.X[["age", "race", "history"]]) == cells(raw.X[["age", "race", "history"]])


def test_queries_translate_to_bigquery(made):
    """Not run there: every query of a build is written in BigQuery's words without an error."""
    import sqlglot

    from ehrfuse.datasets import _warehouse

    asked = []

    class Noted(_warehouse.Warehouse):
        def _translated(self, sql):
            asked.append(sql)
            return super()._translated(sql)

    connection = fill(ibis.duckdb.connect(), made)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_warehouse, "Warehouse", Noted)
        load_mimic4(connection, in_hospital_mortality(24, first_stay=False))
    assert len(asked) > 8
    for sql in asked:
        written = sqlglot.transpile(sql, read="duckdb", write="bigquery")[0]
        assert "DOUBLE" not in written.replace("FLOAT64", "")


def test_pyspark(made):
    """Local Spark, where there is one."""
    pytest.importorskip("pyspark")
    from pyspark.sql import SparkSession

    session = (
        SparkSession.builder.master("local[1]")
        .config("spark.ui.enabled", "false")
        .config("spark.sql.session.timeZone", "UTC")
        .config("spark.sql.shuffle.partitions", "1")
        .config("spark.driver.bindAddress", "127.0.0.1")
        .config("spark.driver.host", "127.0.0.1")
        .getOrCreate()
    )
    connection = ibis.pyspark.connect(session)
    keep = {"patients", "admissions", "icustays", "labevents", "prescriptions", "diagnoses_icd"}
    for path in sorted(made.rglob("*.parquet")):
        if path.stem in keep:
            session.read.parquet(str(path)).createOrReplaceTempView(path.stem)
    data = load_mimic4(connection, in_hospital_mortality(24, first_stay=False))
    raw = load_mimic4(made, in_hospital_mortality(24, first_stay=False))
    assert data.y.tolist() == raw.y.tolist()
    for name in ("chemistry", "lab_sodium", "medications", "age"):
        assert cells(data.X[[name]]) == cells(raw.X[[name]]), name
