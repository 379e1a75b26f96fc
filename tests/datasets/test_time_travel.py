"""Whatever stands in the tables after the prediction, X is the same.

Of every second patient all that follows is removed, of the others it is altered.
"""

import numpy as np
import pandas as pd
import pytest
import time_machine
from benchmarks.make_mimic4 import make_mimic4

from ehrfuse.datasets import (
    _cohort,
    critical_outcome,
    icu_admission_90d,
    in_hospital_mortality,
    later_icu_stay,
    length_of_stay,
    load_eicu,
    load_meds,
    load_mimic3,
    load_mimic4,
    mortality_post_discharge,
    phenotyping,
    readmission_30d,
)

pytest.importorskip("duckdb")

TASKS = {
    "icu": [in_hospital_mortality(24, first_stay=False), later_icu_stay(), length_of_stay()],
    "discharge": [readmission_30d(), icu_admission_90d(), mortality_post_discharge()],
    "phenotyping": phenotyping(k=3),
    "ed": critical_outcome(),
    "admission": in_hospital_mortality(48, "admission", first_stay=False),
}


def cells(X, keys):
    """Every cell of the wanted rows as text, by a key that the future does not move."""
    place = X.groupby("subject_id").cumcount()
    index = pd.MultiIndex.from_arrays([X["subject_id"], place])
    table = {name: [repr(cell) for cell in X[name].tolist()] for name in X.columns}
    frame = pd.DataFrame(table, index=index).sort_index()
    return frame[frame.index.isin(keys)]


def choose(X, seed=0):
    """One row of every patient, as (patient, place): the machine erases all that follows it."""
    frame = pd.DataFrame({"subject": X["subject_id"], "place": X.groupby("subject_id").cumcount()})
    chosen = frame.sample(frac=1, random_state=seed).drop_duplicates("subject").sort_index()
    return chosen.index, pd.MultiIndex.from_frame(chosen)


def same(before, after, least):
    both = before.index.intersection(after.index)
    assert len(both) >= least * len(before)
    assert list(before.columns) == list(after.columns)
    for name in before.columns:
        differ = before.loc[both, name] != after.loc[both, name]
        assert not differ.any(), f"{name} knows the future in {differ.sum()} rows"


# ---------------------------------------------------------------- MIMIC


def few(tables, n):
    """The first patients of the tables, so that the tests stay quick."""
    keep = set(tables["patients"]["subject_id"].head(n))
    admissions = tables["admissions"]
    stays = set(admissions.loc[admissions["subject_id"].isin(keep), "hadm_id"])
    out = {}
    for name, frame in tables.items():
        key, wanted = ("subject_id", keep) if "subject_id" in frame else ("hadm_id", stays)
        out[name] = frame[frame[key].isin(wanted)].reset_index(drop=True)
    return out


@pytest.fixture(scope="module")
def mimic4(shared_data, tmp_path_factory):
    tables = time_machine.read_tables(shared_data / "mimic-iv-demo-2.2", time_machine.Mimic.tables)
    tables = few(tables, 16)
    return tables, time_machine.write_tables(tables, tmp_path_factory.mktemp("mimic4")), {}


@pytest.fixture(scope="module")
def mimic3(shared_data, tmp_path_factory):
    tables = time_machine.read_tables(shared_data / "mimic-iii-demo-1.4", time_machine.Mimic.tables)
    tables = few(tables, 6)
    tables["noteevents"] = _notes(tables["admissions"])  # the demo's table is empty
    return tables, time_machine.write_tables(tables, tmp_path_factory.mktemp("mimic3")), {}


def _notes(admissions):
    """Notes of all kinds, some dated only, from the admission until after the discharge."""
    lines = []
    for place, stay in enumerate(admissions.itertuples()):
        admit, leave = pd.Timestamp(stay.admittime), pd.Timestamp(stay.dischtime)
        for part in np.linspace(0, 1.1, 6):
            at = (admit + part * (leave - admit)).floor("min")
            for category in ("Radiology", "Nursing", "Discharge summary"):
                dated = category == "Discharge summary" or place % 2 == 0
                lines.append({
                    "subject_id": stay.subject_id, "hadm_id": stay.hadm_id,
                    "chartdate": str(at.normalize()), "charttime": None if dated else str(at),
                    "storetime": None if dated else str(at + pd.Timedelta(hours=3)),
                    "category": category, "iserror": None, "text": f"{category} at {at}",
                })  # fmt: skip
    return pd.DataFrame(lines)


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    """All modules of MIMIC-IV: charts, notes, emergency department and films."""
    folder = tmp_path_factory.mktemp("modules")
    make_mimic4(folder / "raw", 9_000, "csv", charted=60, notes=True, seed=3)
    tables = time_machine.read_tables(folder / "raw", time_machine.Mimic.tables)
    films = tables["cxr_metadata"]["dicom_id"]
    vectors = np.random.default_rng(0).normal(size=(len(films), 4)).astype("float32")
    embeddings = pd.DataFrame({"dicom_id": films, "embedding": list(vectors)})
    tables = {name: frame.reset_index(drop=True) for name, frame in tables.items()}
    options = {"image_embeddings": embeddings}
    return tables, time_machine.write_tables(tables, folder / "copy"), options


@pytest.mark.parametrize("unit", list(TASKS))
@pytest.mark.parametrize(
    ("source", "load"), [("mimic4", load_mimic4), ("mimic3", load_mimic3), ("modules", load_mimic4)]
)
def test_mimic(source, load, unit, request, tmp_path):
    tables, folder, options = request.getfixturevalue(source)
    data = load(folder, TASKS[unit], **options)
    rows, keys = choose(data.X)
    landmark = pd.Series(data.landmark[rows], index=data.groups[rows].astype(str))
    machine = time_machine.Mimic(tables, landmark)
    before = cells(data.X, keys)
    # Without codes nobody knows the label of phenotyping: there is nothing left to compare.
    changed = machine.rewrite("alter" if unit == "phenotyping" else "mixed")
    assert any(len(changed[t]) != len(f) or not changed[t].equals(f) for t, f in tables.items())
    after = load(time_machine.write_tables(changed, tmp_path), TASKS[unit], **options)
    same(before, cells(after.X, keys), 0.8)


def test_all_inputs_of_all_modules_are_there(modules):
    """The test above would prove nothing for a column that is empty."""
    _, folder, options = modules
    data = load_mimic4(folder, TASKS["discharge"], **options)
    assert set(data.modalities) >= {
        "demographics", "admission", "triage", "vitals", "neuro", "urine", "oxygen", "chemistry",
        "medications", "history", "cxr", "radiology", "discharge_note", "chief_complaint",
    }  # fmt: skip
    empty = data.X.columns[data.X.isna().all()]
    assert set(empty) <= {name for name in empty if name.startswith("lab_")}


def test_the_machine_finds_a_leak(modules, tmp_path, monkeypatch):
    """With the rule of time off, the columns that it guards differ."""
    tables, folder, options = modules
    task = TASKS["admission"]
    monkeypatch.setattr(_cohort, "_COUNTS", "k.since <= e.time AND e.time <= k.landmark")
    data = load_mimic4(folder, task, **options)
    rows, keys = choose(data.X)
    landmark = pd.Series(data.landmark[rows], index=data.groups[rows].astype(str))
    changed = time_machine.Mimic(tables, landmark).rewrite("remove")
    after = load_mimic4(time_machine.write_tables(changed, tmp_path), task, **options)
    with pytest.raises(AssertionError, match="knows the future"):
        same(cells(data.X, keys), cells(after.X, keys), 0.8)


# ---------------------------------------------------------------- eICU and MEDS


@pytest.fixture(scope="module")
def eicu(shared_data):
    """All tables of the stays of 70 hospitalisations."""
    tables = time_machine.read_tables(shared_data / "eicu-crd-demo-2.0.1", time_machine.Eicu.tables)
    patient = tables["patient"]
    few_stays = patient["patienthealthsystemstayid"].drop_duplicates().head(70)
    keep = patient.loc[patient["patienthealthsystemstayid"].isin(few_stays), "patientunitstayid"]
    for name, frame in tables.items():
        frame["patientunitstayid"] = frame["patientunitstayid"].astype(str)
        tables[name] = frame[frame["patientunitstayid"].isin(set(keep))].reset_index(drop=True)
    return tables


@pytest.mark.parametrize(
    "task", [[in_hospital_mortality(24), later_icu_stay(), length_of_stay()],
             phenotyping(k=3, unit="icu")], ids=["icu", "phenotyping"],
)  # fmt: skip
@pytest.mark.parametrize("hourly", [True, False], ids=["hourly", "tables"])
def test_eicu(task, hourly, eicu, tmp_path):
    tables = {n: f for n, f in eicu.items() if hourly or n != "hourly_labs_vitals"}
    data = load_eicu(time_machine.write_tables(tables, tmp_path / "raw"), task)
    stay = data.X["patientunitstayid"].astype(str)
    whole = tables["patient"].set_index("patientunitstayid")["patienthealthsystemstayid"]
    chosen = stay.sample(frac=1, random_state=0)
    chosen = chosen[~chosen.map(whole).duplicated()]
    machine = time_machine.Eicu(tables, chosen, 24 * 60)
    before = by_stay(data.X, chosen)
    changed = machine.rewrite("mixed" if isinstance(task, list) else "alter")
    copy = time_machine.write_tables(changed, tmp_path / "changed")
    same(before, by_stay(load_eicu(copy, task).X, chosen), 0.8)


def by_stay(X, chosen):
    table = {name: [repr(cell) for cell in X[name].tolist()] for name in X.columns}
    frame = pd.DataFrame(table, index=X["patientunitstayid"].astype(str))
    return frame[frame.index.isin(set(chosen))].sort_index()


@pytest.mark.parametrize("unit", list(TASKS))
def test_meds(unit, shared_data, tmp_path):
    events = pd.read_parquet(shared_data / "mimic-iv-demo-meds" / "data" / "events.parquet")
    events = events[events["subject_id"].isin(events["subject_id"].unique()[:10])]
    events = events.reset_index(drop=True)
    data = load_meds(write_meds(events, tmp_path / "raw"), TASKS[unit])
    rows, keys = choose(data.X)
    landmark = pd.Series(data.landmark[rows], index=data.groups[rows])
    machine = time_machine.Meds(events, landmark, arrivals=unit == "ed")
    before = cells(data.X, keys)
    changed = machine.rewrite("alter" if unit == "phenotyping" else "mixed")
    after = load_meds(write_meds(changed, tmp_path / "changed"), TASKS[unit])
    same(before, cells(after.X, keys), 0.8)


def write_meds(events, folder):
    (folder / "data").mkdir(parents=True)
    events.to_parquet(folder / "data" / "0.parquet", index=False)
    return folder
