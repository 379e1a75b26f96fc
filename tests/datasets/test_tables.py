"""Raw tables: formats, headers, layouts, and what is wrong with them."""

import gzip
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from benchmarks.make_mimic4 import make_mimic4

from ehrfuse.datasets import _tables as tables_module
from ehrfuse.datasets import in_hospital_mortality, load_eicu, load_meds, load_mimic4

pytest.importorskip("duckdb")
TASK = in_hospital_mortality(24, "admission", first_stay=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mimic")
    make_mimic4(folder, 8_000, "csv", seed=1)
    return folder


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made, tmp_path / "copy")


def cells(X):
    return {name: [repr(cell) for cell in X[name].tolist()] for name in X.columns}


def test_every_format_and_any_case_of_headers(made, tmp_path):
    expected = cells(load_mimic4(made, TASK).X)
    for form in ("gz", "parquet", "upper"):
        for path in made.rglob("*.csv"):
            frame = pd.read_csv(path, dtype={"icd_code": str})
            place = tmp_path / form / path.relative_to(made)
            place.parent.mkdir(parents=True, exist_ok=True)
            if form == "gz":
                frame.to_csv(f"{place}.gz", index=False)
            elif form == "parquet":  # times as text, whole numbers with nulls as floats
                frame.to_parquet(place.with_suffix(".parquet"), index=False)
            else:
                frame.rename(columns=str.upper).to_csv(
                    place.with_name(path.name.upper().replace("CSV", "csv")), index=False, quoting=1
                )
        assert cells(load_mimic4(tmp_path / form, TASK).X) == expected, form


def test_the_layout_of_release_1(made, tmp_path):
    """Stays in ``core``, and ethnicity instead of race."""
    expected = cells(load_mimic4(made, TASK).X)
    shutil.copytree(made / "icu", tmp_path / "icu")
    shutil.copytree(made / "hosp", tmp_path / "hosp")
    (tmp_path / "core").mkdir()
    for name in ("patients", "admissions"):
        frame = pd.read_csv(tmp_path / "hosp" / f"{name}.csv")
        (tmp_path / "hosp" / f"{name}.csv").unlink()
        frame = frame.rename(columns={"race": "ethnicity"}).drop(
            columns=["admit_provider_id"], errors="ignore"
        )
        frame.to_csv(tmp_path / "core" / f"{name}.csv", index=False)
    assert cells(load_mimic4(tmp_path, TASK).X) == expected


def test_modules_in_folders_of_their_own(made, tmp_path):
    expected = cells(load_mimic4(made, TASK).X)
    for module in ("hosp", "icu"):
        shutil.copytree(made / module, tmp_path / module / "2.2" / module)
    assert cells(load_mimic4([tmp_path / "hosp", tmp_path / "icu"], TASK).X) == expected


def test_absent_tables_are_listed_and_their_columns_absent(copy):
    shutil.rmtree(copy / "icu")
    (copy / "hosp" / "prescriptions.csv").unlink()
    data = load_mimic4(copy, TASK)
    assert {"icustays", "prescriptions", "chartevents"} <= set(data.missing)
    assert "medications" not in data.X
    assert "prescriptions" in data.description
    with pytest.raises(FileNotFoundError, match="table icustays is not in the folder"):
        load_mimic4(copy, "in_hospital_mortality")


def test_no_laboratory_at_all(copy):
    (copy / "hosp" / "labevents.csv").unlink()
    data = load_mimic4(copy, TASK)
    assert "chemistry" not in data.X
    assert "lab_sodium" not in data.X


def test_wrong_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        load_mimic4(tmp_path / "nowhere")
    with pytest.raises(
        FileNotFoundError, match="tables patients, admissions are not in the folder"
    ):
        load_mimic4(tmp_path)
    with pytest.raises(FileNotFoundError, match="tables patient are not in the folder"):
        load_eicu(tmp_path)
    with pytest.raises(FileNotFoundError, match="no Parquet files"):
        load_meds(tmp_path)


def test_a_table_in_two_folders(copy):
    (copy / "other").mkdir()
    shutil.copy(copy / "hosp" / "labevents.csv", copy / "other")
    with pytest.raises(ValueError, match="'labevents' is there more than once"):
        load_mimic4(copy, TASK)


# ---------------------------------------------------------------- damage


def refusal(folder, task=TASK):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        load_mimic4(folder, task)
    assert caught.value.__cause__ is None  # nothing below the message quotes rows either
    return str(caught.value)


def test_truncated_gzip(copy):
    path = copy / "hosp" / "labevents.csv"
    packed = gzip.compress(path.read_bytes())
    path.unlink()
    path.with_name("labevents.csv.gz").write_bytes(packed[: len(packed) // 2])
    assert "ends too early" in refusal(copy)


def test_truncated_before_the_header_ends(copy):
    (copy / "hosp" / "patients.csv").unlink()
    (copy / "hosp" / "patients.csv.gz").write_bytes(gzip.compress(b"subject_id,gen" * 99)[:12])
    with pytest.raises(ValueError, match="cut short"):
        load_mimic4(copy, TASK)


def test_damaged_parquet(copy):
    (copy / "hosp" / "labevents.csv").unlink()
    (copy / "hosp" / "labevents.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(ValueError, match="not a readable Parquet file"):
        load_mimic4(copy, TASK)


def test_a_wrong_type_names_file_line_and_column_but_not_the_row(copy):
    path = copy / "hosp" / "labevents.csv"
    lines = path.read_text().splitlines()
    parts = lines[5].split(",")
    parts[1], parts[-1] = "SECRET", "Mr Smith"
    path.write_text("\n".join([*lines[:5], ",".join(parts), *lines[6:]]) + "\n")
    message = refusal(copy)
    assert "labevents.csv" in message
    assert "line 6" in message
    assert "'subject_id'" in message
    assert "SECRET" not in message
    assert "Smith" not in message


def test_a_row_cut_short(copy):
    path = copy / "hosp" / "labevents.csv"
    path.write_text(path.read_text().rstrip("\n")[:-30] + "\n1,2,3\n")
    assert "another number of columns" in refusal(copy)


def test_a_missing_column(copy):
    path = copy / "hosp" / "labevents.csv"
    pd.read_csv(path).drop(columns="charttime").to_csv(path, index=False)
    with pytest.raises(ValueError, match=r"'labevents'.*has no column 'charttime'"):
        load_mimic4(copy, TASK)


def test_no_time_of_storage(copy):
    """An optional column: results then count from when they were charted."""
    path = copy / "hosp" / "labevents.csv"
    pd.read_csv(path).drop(columns=["storetime", "valueuom"]).to_csv(path, index=False)
    assert load_mimic4(copy, TASK).X["chemistry"].notna().any()


def test_rows_are_placed_by_time_not_by_admission(copy, made):
    """A quarter of the laboratory rows has no ``hadm_id``: it is never needed."""
    expected = cells(load_mimic4(made, TASK).X)
    path = copy / "hosp" / "labevents.csv"
    pd.read_csv(path).assign(hadm_id=None).to_csv(path, index=False)
    assert cells(load_mimic4(copy, TASK).X) == expected


def test_later_years_can_be_held_out(made):
    data = load_mimic4(made, TASK)
    assert data.X["anchor_year_group"].notna().all()
    columns = {c for m in data.modalities.values() for c in np.atleast_1d(m.columns)}
    assert "anchor_year_group" not in columns


def test_duplicated_keys(copy, made):
    """Whole rows that repeat are one row; rows that contradict each other are an error."""
    expected = cells(load_mimic4(made, TASK).X)
    for name in ("patients", "admissions", "labevents", "prescriptions"):
        path = copy / "hosp" / f"{name}.csv"
        frame = pd.read_csv(path)
        pd.concat([frame, frame.head(50)]).to_csv(path, index=False)
    assert cells(load_mimic4(copy, TASK).X) == expected
    path = copy / "hosp" / "admissions.csv"
    frame = pd.read_csv(path)
    frame.loc[len(frame)] = frame.loc[0]
    frame.loc[len(frame) - 1, "dischtime"] = "2199-01-01 00:00:00"
    frame.to_csv(path, index=False)
    assert "keys 'hadm_id' with contradicting rows" in refusal(copy)


def test_little_memory_is_said_or_suffices(made):
    expected = cells(load_mimic4(made, TASK).X)
    assert cells(load_mimic4(made, TASK, memory_limit="200MB").X) == expected
    with pytest.raises(ValueError, match="memory_limit='1MB' does not suffice"):
        load_mimic4(made, TASK, memory_limit="1MB")


@pytest.mark.parametrize(
    ("options", "words"),
    [({"threads": 0}, "threads=0"), ({"memory_limit": "lots"}, "memory_limit='lots' is not")],
)
def test_wrong_options(made, options, words):
    with pytest.raises(ValueError, match=words):
        load_mimic4(made, TASK, **options)


def test_without_the_engine_the_pip_line_is_named(made, monkeypatch):
    monkeypatch.setitem(sys.modules, "duckdb", None)
    with pytest.raises(ImportError, match=r"pip install 'ehrfuse\[cohort\]'"):
        load_mimic4(made, TASK)


def test_two_processes_share_a_cache(made, tmp_path):
    code = (
        "from ehrfuse.datasets import *; import sys;"
        "X = load_mimic4(sys.argv[1], in_hospital_mortality(24, 'admission', first_stay=False),"
        " cache=sys.argv[2]).X; print(len(X), repr(X.lab_sodium.tolist()))"
    )
    command = [sys.executable, "-c", code, str(made), str(tmp_path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    out = [process.communicate()[0] for process in both]
    assert out[0] == out[1]
    assert all(process.returncode == 0 for process in both)
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".parquet"]


def test_parse_schema():
    schema = tables_module.parse_schema("t: race|ethnicity VARCHAR?, x DOUBLE")
    race, x = schema["t"]
    assert (race.name, race.optional, race.kind) == ("race", True, "VARCHAR")
    assert race.find({"ethnicity"}) == "ethnicity"
    assert not x.optional


def test_folders_with_a_file_per_study_are_not_walked(made, copy):
    (copy / "files" / "p10").mkdir(parents=True)
    (copy / "files" / "p10" / "labevents.csv").write_text("not a table")
    assert np.array_equal(load_mimic4(copy, TASK).groups, load_mimic4(made, TASK).groups)
