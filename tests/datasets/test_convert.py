"""to_parquet: the same tables, resumable, and nothing half-written."""

import gzip
import os
import resource
import subprocess
import sys
import time

import pandas as pd
import pyarrow.parquet as pq
import pytest
from benchmarks.make_mimic4 import make_mimic4

from ehrfuse.datasets import in_hospital_mortality, load_mimic4, to_parquet

TASK = in_hospital_mortality(24, "admission", first_stay=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mimic")
    make_mimic4(folder, 8_000, "csv.gz", notes=True, seed=2)
    return folder


def cells(X):
    return {name: [repr(cell) for cell in X[name].tolist()] for name in X.columns}


def test_the_same_tables(made, tmp_path):
    files = to_parquet(made, tmp_path, progress=False)
    assert (tmp_path / "hosp" / "labevents.parquet") in files
    for path in files:
        source = made / path.relative_to(tmp_path)
        before = pd.read_csv(source.with_suffix(".csv.gz"), dtype=str).rename(columns=str.lower)
        after = pq.read_table(path).to_pandas()
        assert list(after.columns) == list(before.columns)
        assert len(after) == len(before)
    labs = pq.read_schema(tmp_path / "hosp" / "labevents.parquet")
    assert [str(labs.field(n).type) for n in ("hadm_id", "charttime", "valuenum", "value")] == [
        "int64", "timestamp[us]", "double", "string",
    ]  # fmt: skip
    pytest.importorskip("duckdb")
    assert cells(load_mimic4(tmp_path, TASK).X) == cells(load_mimic4(made, TASK).X)


def test_a_note_of_many_lines_survives(made, tmp_path):
    to_parquet(made / "note", tmp_path, progress=False)
    before = pd.read_csv(made / "note" / "radiology.csv.gz")["text"]
    after = pq.read_table(tmp_path / "radiology.parquet")["text"].to_pandas()
    assert before.str.contains("\n").all()
    assert before.tolist() == after.tolist()


def test_a_second_call_converts_what_is_absent_or_changed(made, tmp_path):
    files = to_parquet(made, tmp_path, progress=False)
    stamps = {path: path.stat().st_mtime_ns for path in files}
    files[0].unlink()
    source = made / files[1].relative_to(tmp_path).with_suffix(".csv.gz")
    now = time.time()
    os.utime(source, (now, now))
    to_parquet(made, tmp_path, progress=False)
    again = {path for path in files if path.stat().st_mtime_ns != stamps[path]}
    assert again == set(files[:2])


def test_a_truncated_table_is_named_and_leaves_nothing(made, tmp_path):
    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir()
    packed = (made / "hosp" / "labevents.csv.gz").read_bytes()
    (raw / "labevents.csv.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(ValueError, match=r"labevents.csv.gz' is cut short"):
        to_parquet(raw, out, progress=False)
    assert list(out.iterdir()) == []


def test_a_wrong_cell_is_not_quoted(tmp_path):
    (tmp_path / "labevents.csv").write_text("subject_id,charttime\n1,2100-01-01\nMr Smith,x\n")
    with pytest.raises(ValueError, match="cannot be converted") as caught:
        to_parquet(tmp_path, tmp_path / "out", progress=False)
    assert "Smith" not in str(caught.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_header_with_a_column_twice(tmp_path):
    (tmp_path / "a.csv").write_text("x,X\n1,2\n")
    with pytest.raises(ValueError, match="has a column twice"):
        to_parquet(tmp_path, tmp_path / "out", progress=False)


def test_no_tables(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no \.csv"):
        to_parquet(tmp_path, tmp_path / "out")


LIMITED = """
import resource, sys
from ehrfuse.datasets import to_parquet
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
try:
    to_parquet(sys.argv[1], sys.argv[2], progress=False)
except OSError as error:
    print(f"{type(error).__name__}: {error}")
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="no file size limits here")
def test_a_full_disk_leaves_nothing_half_written(made, tmp_path):
    """The system refuses bytes beyond a limit, as a full disk does."""
    command = [sys.executable, "-c", LIMITED, str(made / "hosp"), str(tmp_path), "60000"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "OSError" in done.stdout
    assert "nothing is left of it" in done.stdout
    left = sorted(path.name for path in tmp_path.iterdir())
    assert "labevents.parquet" not in left
    assert all(name.endswith(".parquet") and not name.startswith(".") for name in left)
    for name in left:  # what is there is whole
        pq.read_table(tmp_path / name)
    to_parquet(made / "hosp", tmp_path, progress=False)  # with room again it goes on
    assert (tmp_path / "labevents.parquet").exists()


def test_two_processes_at_once(made, tmp_path):
    code = "import sys; from ehrfuse.datasets import to_parquet; to_parquet(*sys.argv[1:3])"
    command = [sys.executable, "-c", code, str(made), str(tmp_path)]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(2)]
    for process in both:
        process.communicate()
    assert all(process.returncode == 0 for process in both)
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or path.suffix == ".parquet"
    rows = pq.read_table(tmp_path / "hosp" / "labevents.parquet").num_rows
    with gzip.open(made / "hosp" / "labevents.csv.gz", "rb") as file:
        assert rows == sum(1 for _ in file) - 1


def test_memory_does_not_grow_with_the_table(tmp_path):
    """A table of several blocks comes out in several row groups, one after the other."""
    lines = "".join(f"{i},{i},2100-01-01 00:00:00,{'x' * 80}\n" for i in range(300_000))
    (tmp_path / "labevents.csv").write_text("subject_id,itemid,charttime,comments\n" + lines)
    to_parquet(tmp_path, tmp_path / "out", progress=False)
    found = pq.ParquetFile(tmp_path / "out" / "labevents.parquet")
    assert found.num_row_groups > 1
    assert found.metadata.num_rows == 300_000
