"""The four demos: counts against hand-written pandas, determinism, modalities, cross-site."""

import numpy as np
import pandas as pd
import pytest

from ehrfuse import FusionClassifier
from ehrfuse.datasets import (
    in_hospital_mortality,
    later_icu_stay,
    load_eicu,
    load_meds,
    load_mimic3,
    load_mimic4,
    readmission_30d,
    vocabulary,
)
from ehrfuse.datasets.tasks import READY

pytest.importorskip("duckdb")

FOLDERS = {
    "mimic4": (load_mimic4, "mimic-iv-demo-2.2"),
    "mimic3": (load_mimic3, "mimic-iii-demo-1.4"),
    "meds": (load_meds, "mimic-iv-demo-meds"),
    "eicu": (load_eicu, "eicu-crd-demo-2.0.1"),
}


@pytest.fixture(scope="module")
def demo(shared_data):
    """Build from a demo; once per source and task."""
    kept = {}

    def build(source, task, **options):
        load, folder = FOLDERS[source]
        key = source, repr(task) if isinstance(task, str) else id(task), repr(options)
        if key not in kept:
            kept[key] = load(shared_data / folder, task, **options)
        return kept[key]

    return build


@pytest.fixture(scope="module")
def raw(shared_data):
    def read(table, *dates, folder="mimic-iv-demo-2.2/hosp"):
        path = shared_data / folder / f"{table}.csv.gz"
        return (
            pd.read_csv(path, low_memory=False)
            .rename(columns=str.lower)
            .pipe(lambda f: f.assign(**{d: pd.to_datetime(f[d]) for d in dates}))
        )

    return read


# ---------------------------------------------------------------- counts by hand


def test_admissions_deaths_and_readmissions_of_mimic4(demo, raw):
    adm = raw("admissions", "admittime", "dischtime")
    soon = []
    for stay in adm.itertuples():  # any later admission counts, not only the next line
        wait = adm.loc[adm["subject_id"] == stay.subject_id, "admittime"] - stay.dischtime
        soon.append(bool(((wait > pd.Timedelta(0)) & (wait <= pd.Timedelta(days=30))).any()))
    soon = pd.Series(soon, index=adm.index)
    alive = adm["hospital_expire_flag"] == 0
    data = demo("mimic4", "readmission_30d")
    assert len(data.y) == alive.sum() == 260
    assert data.y.sum() == soon[alive].sum() == 53
    by_hand = soon[alive].set_axis(adm.loc[alive, "hadm_id"])
    assert (data.y.set_axis(data.X["hadm_id"]) == by_hand.reindex(data.X["hadm_id"])).all()
    first = data.flow.iloc[0]
    assert (first["rows"], first["patients"]) == (275, 100)
    left = data.flow.set_index("step").loc["left the hospital alive"]
    assert left["excluded"] == 15  # deaths in hospital


def test_stays_of_mimic4(demo, raw):
    stays = raw("icustays", "intime", "outtime", folder="mimic-iv-demo-2.2/icu")
    data = demo("mimic4", "later_icu_stay")
    assert data.flow.loc[0, "rows"] == len(stays) == 140
    adm = raw("admissions", "deathtime").set_index("hadm_id")
    stays = stays.sort_values("intime")
    stays["later"] = stays.groupby("hadm_id")["intime"].shift(-1).notna()
    died = stays["hadm_id"].map(adm["deathtime"])
    hours = (stays["outtime"] - stays["intime"]) / pd.Timedelta(hours=1)
    kept = (hours >= 24) & ~(died <= stays["intime"] + pd.Timedelta(hours=24))
    kept &= ~(died <= stays["outtime"])
    by_hand = stays[kept].set_index("stay_id")["later"]
    assert data.y.sum() == by_hand.sum() > 0
    ours = data.y.set_axis(data.X["stay_id"]).sort_index()
    assert ours.index.tolist() == sorted(by_hand.index)
    assert (ours == by_hand.astype(int).sort_index()).all()


def test_laboratory_values_at_the_landmark(demo, raw):
    """The latest value of every admission that was stored by 24 hours, by hand."""
    task = in_hospital_mortality(24, "admission", first_stay=False)
    data = demo("mimic4", task)
    labs = raw("labevents", "charttime", "storetime")
    adm = raw("admissions", "admittime", "edregtime").set_index("hadm_id")
    names = {50912: "creatinine", 50813: "lactate", 50983: "sodium"}
    checked = 0
    for item, name in names.items():
        mine = labs[(labs["itemid"] == item) & labs["valuenum"].notna()]
        others = {"sodium": 50824, "lactate": 52442}.get(name)
        if others:
            mine = pd.concat([mine, labs[(labs["itemid"] == others) & labs["valuenum"].notna()]])
        for row, stay in enumerate(data.X["hadm_id"].head(90)):
            line = adm.loc[stay]
            at = line["admittime"] + pd.Timedelta(hours=24)
            assert data.landmark[row] == at
            since = min(line["admittime"], line["edregtime"])
            since = line["admittime"] if pd.isna(since) else since
            found = mine[mine["subject_id"] == line["subject_id"]]
            known = found[["charttime", "storetime"]].max(axis=1)
            found = found[(found["charttime"] >= since) & (known <= at)]
            value = data.X[f"lab_{name}"].iloc[row]
            if found.empty:
                assert np.isnan(value)
                continue
            latest = found[found["charttime"] == found["charttime"].max()]["valuenum"]
            assert np.float32(latest.max()) == np.float32(value)
            checked += 1
    assert checked > 180


def test_events_agree_with_the_values(demo):
    """The last event of an analyte is its value at the landmark."""
    data = demo("mimic4", "readmission_30d")
    for name in ("chemistry", "blood_gas", "liver"):
        for row, cell in enumerate(data.X[name]):
            cell = cell if isinstance(cell, list) else []
            known = [e for e in cell if e["value"] is not None]
            last = {e["code"]: e["value"] for e in known}
            for code, value in last.items():
                assert data.X[f"lab_{code}"].iloc[row] == np.float32(value)
            assert all(e["time"] <= 0 for e in cell)


def test_mimic3(demo, raw):
    folder = "mimic-iii-demo-1.4"
    adm = raw("ADMISSIONS", "admittime", "dischtime", folder=folder)
    assert len(adm) == 129
    assert adm["hospital_expire_flag"].sum() == 40
    data = demo("mimic3", "readmission_30d")
    assert data.flow["rows"].iloc[0] == 129
    assert len(data.y) == 129 - 40 - (adm["hospital_expire_flag"] == 0).sum() + 88
    ages = demo("mimic3", "in_hospital_mortality").X["age"]
    assert ages.between(18, 90).all()  # 300 years are 90
    assert (ages == 90).any()


def test_eicu(demo, raw):
    patients = raw("patient", folder="eicu-crd-demo-2.0.1")
    data = demo("eicu", "in_hospital_mortality")
    there = patients["unitdischargeoffset"] >= 24 * 60
    dead = patients["hospitaldischargestatus"] == "Expired"
    known = patients["hospitaldischargestatus"].notna()
    early = dead & (patients["hospitaldischargeoffset"] <= 24 * 60)
    assert len(data.y) == (there & known & ~early).sum()
    assert data.y.sum() == (there & dead & ~early).sum()
    assert data.X["age"].max() == 90


def test_eicu_reads_units(shared_data, tmp_path):
    """Ionised calcium in mg/dL becomes mmol/L, and implausible values become null."""
    (tmp_path / "patient.csv").write_text(
        "patientunitstayid,patienthealthsystemstayid,uniquepid,age,unitdischargeoffset,"
        "hospitaldischargestatus,unitvisitnumber,hospitaladmitoffset\n"
        "1,1,a,> 89,3000,Alive,1,-10\n2,2,b,70,3000,Expired,1,0\n"
    )
    (tmp_path / "LAB.csv").write_text(
        "PATIENTUNITSTAYID,LABRESULTOFFSET,LABNAME,LABRESULT,LABMEASURENAMESYSTEM\n"
        "1,100,ionized calcium,4.81,mg/dL\n1,200,potassium,40,mmol/L\n1,100,potassium,4,mmol/L\n"
        "2,100,creatinine,88.42,umol/L\n2,1500,creatinine,5,mg/dL\n"
    )
    X = load_eicu(tmp_path, "in_hospital_mortality").X
    assert X["lab_ionized_calcium"].iloc[0] == pytest.approx(1.2, rel=1e-3)
    assert X["lab_potassium"].iloc[0] == 4  # the implausible one does not replace it
    assert [e["value"] for e in X["chemistry"][0]] == [4.0, None]
    assert X["lab_creatinine"].iloc[1] == pytest.approx(1.0, rel=1e-3)
    assert X["age"].tolist() == [90, 70]


def test_meds_agrees_with_the_raw_tables(demo):
    """The same patients: same rows and labels and, without times of storage, nearly the labs."""
    task = readmission_30d()
    meds, tables = demo("meds", task), demo("mimic4", task)
    assert meds.y.tolist() == tables.y.tolist()
    assert (meds.groups == tables.groups).all()
    for name in ("creatinine", "sodium", "white_cells"):
        a, b = meds.X[f"lab_{name}"].to_numpy(), tables.X[f"lab_{name}"].to_numpy()
        assert np.mean((a == b) | (np.isnan(a) & np.isnan(b))) > 0.95


# ---------------------------------------------------------------- every task of every source


SUPPORTED = [(s, t) for s in ("mimic4", "mimic3", "meds") for t in READY]
SUPPORTED += [("eicu", t) for t in ("in_hospital_mortality", "later_icu_stay", "length_of_stay",
                                    "phenotyping")]  # fmt: skip


@pytest.mark.parametrize(("source", "task"), SUPPORTED)
def test_every_task_builds(demo, source, task):
    data = demo(source, task)
    n = len(data.X)
    assert n == len(data.y) == len(data.groups) == len(data.landmark) > 30
    assert data.flow["rows"].iloc[-1] == n
    assert {"found", "missing", "description"} <= set(data)
    columns = {name for m in data.modalities.values() for name in np.atleast_1d(m.columns)}
    assert columns <= set(data.X.columns)
    assert not columns & {"subject_id", "hadm_id", "stay_id", "patientunitstayid"}
    assert data.X.index.equals(data.y.index)


def test_no_variable_stands_in_two_modalities(demo):
    for source, ways in (("mimic4", ["events", "values"]), ("mimic3", ["events"]),
                         ("eicu", ["events"])):  # fmt: skip
        for labs in ways:
            options = {} if labs == "events" else {"labs": labs}
            data = demo(source, "in_hospital_mortality", **options)
            seen = [c for m in data.modalities.values() for c in np.atleast_1d(m.columns)]
            assert len(seen) == len(set(seen))
            assert ("labs" in data.modalities) == (labs == "values")
            assert ("chemistry" in data.modalities) == (labs == "events")
            codes = [code for name in data.modalities for code in vocabulary.PANELS.get(name, ())]
            assert len(codes) == len(set(codes))


def test_nobody_is_dropped_for_a_missing_modality(demo, raw):
    data = demo("mimic4", "readmission_30d")
    assert data.X["blood_gas"].isna().any()
    assert len(data.X) == 260


def test_folds_by_groups_share_no_patient(demo):
    from sklearn.model_selection import GroupKFold

    for source in FOLDERS:
        task = "in_hospital_mortality" if source == "eicu" else "readmission_30d"
        data = demo(source, task)
        for train, test in GroupKFold(4).split(data.X, data.y, data.groups):
            assert not set(data.X["subject_id"].iloc[train]) & set(data.X["subject_id"].iloc[test])


def test_history_ends_at_the_landmark(demo):
    data = demo("mimic4", "readmission_30d")
    cells = data.X["history"]
    assert all(visit["time"] <= 0 for cell in cells for visit in cell)
    assert all(cell[-1]["time"] == 0 for cell in cells)  # the admission that ends now
    stay = demo("mimic4", "in_hospital_mortality")
    assert all(visit["time"] < 0 for cell in stay.X["history"] for visit in cell)
    assert (stay.X["history"].list.len() == 0).any()  # present and empty: no earlier admission


def test_a_task_in_another_unit_is_refused(demo):
    with pytest.raises(ValueError, match=r"rows of icu only, .* can give: in_hospital"):
        demo("eicu", "readmission_30d")
    with pytest.raises(ValueError, match="labs='both'"):
        demo("eicu", "in_hospital_mortality", labs="both")


def test_an_empty_cohort_shows_the_flow(demo):
    with pytest.raises(ValueError, match="at least 99 years old"):
        demo("mimic4", in_hospital_mortality(24, min_age=99))


# ---------------------------------------------------------------- determinism


def told(cell):
    """What a cell says, whichever null of pandas it holds: old versions read None as NaN."""
    return "null" if cell is None or (isinstance(cell, float) and cell != cell) else repr(cell)


def equal(a, b):
    pd.testing.assert_frame_equal(a.X, b.X, check_exact=True)
    pd.testing.assert_index_equal(a.X.columns, b.X.columns)
    for name in a.X.columns:
        assert [told(c) for c in a.X[name].tolist()] == [told(c) for c in b.X[name].tolist()]
    assert np.array_equal(a.y.to_numpy(), b.y.to_numpy(), equal_nan=True)


@pytest.mark.parametrize("source", ["mimic4", "eicu"])
def test_the_same_files_give_the_same_bits(demo, source, shared_data):
    load, folder = FOLDERS[source]
    task = "in_hospital_mortality"
    once = demo(source, task)
    equal(once, load(shared_data / folder, task, threads=1 if source == "eicu" else 3))


def test_the_order_of_rows_in_the_files_does_not_matter(tmp_path, shared_data, raw):
    for name in ("patients", "admissions", "labevents", "prescriptions", "diagnoses_icd"):
        frame = raw(name)
        for part, order in (("a", frame), ("b", frame.sample(frac=1, random_state=0))):
            (tmp_path / part).mkdir(exist_ok=True)
            order.to_csv(tmp_path / part / f"{name}.csv", index=False)
    task = in_hospital_mortality(24, "admission")
    equal(load_mimic4(tmp_path / "a", task), load_mimic4(tmp_path / "b", task))


def test_cache(demo, shared_data, tmp_path):
    load, folder = FOLDERS["eicu"]
    once = demo("eicu", "in_hospital_mortality")
    load(shared_data / folder, "in_hospital_mortality", cache=tmp_path)
    files = sorted(tmp_path.iterdir())
    assert [f.suffix for f in files] == [".json", ".parquet"]
    stamp = files[1].stat().st_mtime_ns
    equal(once, load(shared_data / folder, "in_hospital_mortality", cache=tmp_path))
    assert files[1].stat().st_mtime_ns == stamp
    note = once.X["note"].dropna().iloc[0].split(". ")[0]
    assert note.encode() not in files[1].read_bytes()  # no text in caches
    assert "note" not in pd.read_parquet(files[1]).columns


# ---------------------------------------------------------------- across sites


def test_a_model_of_one_site_predicts_at_another(demo):
    """Fitted on the eICU demo, predicts on the MIMIC-IV demo, and back."""
    here = demo("eicu", "in_hospital_mortality")
    there = demo("mimic4", in_hospital_mortality(24, first_stay=False))
    shared = {
        name: modality
        for name, modality in here.modalities.items()
        if name in there.modalities and name != "admission"
    }
    assert {"demographics", "chemistry", "blood_gas", "liver", "history"} <= set(shared)
    for fit, predict in ((here, there), (there, here)):
        model = FusionClassifier(shared, max_epochs=1, random_state=0).fit(fit.X, fit.y)
        proba = model.predict_proba(predict.X)
        assert proba.shape == (len(predict.X), 2)
        assert np.isfinite(proba).all()
        # It reads there what it learned here: without the labs the predictions differ.
        blind = predict.X.assign(chemistry=None)
        assert not np.allclose(model.predict_proba(blind), proba)


def test_eicu_agrees_with_plain_pandas(demo, shared_data):
    """The cohort that the benchmarks build by hand: every label, panel, column and phrase."""
    from benchmarks import _eicu

    tasks = [in_hospital_mortality(24, first_stay=False, min_age=0), later_icu_stay()]
    data = demo("eicu", tasks)
    hand = _eicu.load(shared_data / "eicu-crd-demo-2.0.1")
    X = data.X.set_index("patientunitstayid")
    assert X.index.equals(hand.X.index)
    np.testing.assert_array_equal(data.y.to_numpy(), hand.y.to_numpy())
    names = {a.short: a.name for a in vocabulary.ANALYTES}
    for panel in _eicu.PANELS:
        for ours, theirs in zip(X[panel].tolist(), hand.X[panel].tolist(), strict=True):
            assert isinstance(ours, list) == isinstance(theirs, list)
            if isinstance(ours, list):
                found = sorted((e["time"], e["code"], e["value"]) for e in ours)
                assert found == sorted((e["time"], names[e["code"]], e["value"]) for e in theirs)
    for column in _eicu.STATIC:
        renamed = {"gender": "sex", "ethnicity": "race"}.get(column)
        if renamed:  # other words for the same groups
            assert pd.crosstab(hand.X[column], X[renamed]).gt(0).sum().tolist() == (
                [1] * X[renamed].nunique()
            )
        else:
            pd.testing.assert_series_equal(hand.X[column], X[column], check_dtype=False)
    for ours, theirs in zip(X["note"].tolist(), hand.X["note"].tolist(), strict=True):
        if not isinstance(theirs, str):
            continue
        # The word None is a finding here ("Sedation None"); pandas takes it for a missing cell.
        differ = set(ours.split(". ")) ^ set(theirs.split(". "))
        assert all(phrase.endswith(" None") for phrase in differ)
