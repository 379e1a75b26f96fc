"""What the modules of MIMIC-IV bring: notes, emergency department, charts and films."""

import numpy as np
import pandas as pd
import pytest
from benchmarks.make_mimic4 import make_mimic4

from ehrfuse import Embedding, Image
from ehrfuse.datasets import critical_outcome, in_hospital_mortality, load_mimic4, readmission_30d

pytest.importorskip("duckdb")
TASK = in_hospital_mortality(24, "admission", first_stay=False)


@pytest.fixture
def made(tmp_path):
    make_mimic4(tmp_path, 5_000, "csv", charted=40, notes=True, seed=5)
    return tmp_path


def read(folder, name, *dates):
    return pd.read_csv(folder / f"{name}.csv", parse_dates=list(dates))


def test_reports_by_the_landmark_in_time_order(made):
    data = load_mimic4(made, TASK)
    notes = read(made, "note/radiology", "charttime", "storetime")
    adm = read(made, "hosp/admissions", "admittime", "edregtime").set_index("hadm_id")
    some = 0
    for row, stay in enumerate(data.X["hadm_id"]):
        at = adm.loc[stay, "admittime"] + pd.Timedelta(hours=24)
        since = pd.to_datetime(adm.loc[stay, ["admittime", "edregtime"]]).min()
        mine = notes[notes["subject_id"] == adm.loc[stay, "subject_id"]]
        mine = mine[(mine["charttime"] >= since) & (mine["storetime"] <= at)]
        text = "\n\n".join(mine.sort_values(["charttime", "text"])["text"])
        found = data.X["radiology"].iloc[row]
        assert (found if isinstance(found, str) else "") == text
        some += bool(text)
    assert some > 3
    assert "discharge_note" not in data.X  # this task is made within the stay


def test_discharge_notes_of_the_day_of_discharge(made):
    path = made / "note" / "discharge.csv"
    notes = read(made, "note/discharge", "charttime")
    addendum = notes.head(1).copy()
    addendum["charttime"] += pd.Timedelta(days=2)
    addendum["text"] = "ADDENDUM"
    pd.concat([notes, addendum]).to_csv(path, index=False)
    X = load_mimic4(made, readmission_30d()).X
    written = notes.set_index("hadm_id")["text"]
    for stay, text in zip(X["hadm_id"], X["discharge_note"], strict=True):
        assert text == written[stay] if stay in written.index else not isinstance(text, str)


def test_arrivals_that_went_home_are_rows_too(made):
    data = load_mimic4(made, critical_outcome())
    stays = read(made, "ed/edstays", "intime")
    assert data.flow["rows"].iloc[0] == len(stays)
    home = data.X["stay_id"].isin(stays.loc[stays["hadm_id"].isna(), "stay_id"])
    assert home.any()
    assert "hadm_id" not in data.X  # it would tell who is admitted
    assert data.y[home.to_numpy()].sum() == 0
    assert data.X["triage_acuity"].notna().all()
    assert data.X["chief_complaint"].isin(["CHEST PAIN", "FEVER, COUGH"]).all()
    races = stays.set_index("stay_id")["race"].str.lower()
    assert data.X["race"].tolist() == races[data.X["stay_id"]].tolist()


def test_without_the_module_arrivals_are_those_of_admissions(made):
    (made / "ed" / "edstays.csv").unlink()
    data = load_mimic4(made, critical_outcome())
    assert data.flow["rows"].iloc[0] == read(made, "hosp/admissions")["edregtime"].notna().sum()
    assert "visits that ended at home" in data.description


def test_films_are_paths_that_exist_or_null(made):
    films = read(made, "cxr/mimic-cxr-2.0.0-metadata")
    half = films.iloc[::2]
    for film in half.itertuples():
        number = f"p{film.subject_id}"
        place = made / "cxr" / "files" / number[:3] / number / f"s{film.study_id}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{film.dicom_id}.jpg").write_bytes(b"")
    data = load_mimic4(made, readmission_30d())
    assert isinstance(data.modalities["cxr"], Image)
    paths = data.X["cxr"].dropna()
    assert 0 < len(paths) < len(data.X)
    assert all(path.endswith(".jpg") for path in paths)
    names = {path.rsplit("/", 1)[1].removesuffix(".jpg") for path in paths}
    assert names <= set(half["dicom_id"])


def test_vectors_of_films(made):
    films = read(made, "cxr/mimic-cxr-2.0.0-metadata")
    vectors = list(np.eye(len(films), 8, dtype="float32"))
    table = pd.DataFrame({"dicom_id": films["dicom_id"], "embedding": vectors})
    table.to_parquet(made / "vectors.parquet")
    for given in (table, made / "vectors.parquet"):
        data = load_mimic4(made, readmission_30d(), image_embeddings=given)
        assert isinstance(data.modalities["cxr"], Embedding)
        assert {len(v) for v in data.X["cxr"].dropna()} == {8}
    with pytest.raises(ValueError, match="has no columns"):
        load_mimic4(made, readmission_30d(), image_embeddings=table[["dicom_id"]])


def test_films_without_images_or_vectors_are_said(made):
    data = load_mimic4(made, readmission_30d())
    assert "cxr" not in data.X
    assert "neither images nor embeddings" in data.description


def test_charted_values(made):
    data = load_mimic4(made, in_hospital_mortality(24, first_stay=False))
    codes = {e["code"]: e["value"] for cell in data.X["vitals"].dropna() for e in cell}
    assert 34 < codes["temperature"] < 40  # charted in Fahrenheit
    assert data.X["height"].dropna().between(100, 250).all()
    urine = read(made, "icu/outputevents")
    assert urine["itemid"].isin([226588]).any()  # a chest tube is not urine
    n = sum(len(cell) for cell in data.X["urine"].dropna())
    assert 0 < n < len(urine)
