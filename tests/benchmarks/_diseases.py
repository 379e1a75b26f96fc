"""Cohorts of the ten-disease task: text and labs of the first 24 hours, diagnoses of the stay.

Plain pandas, for the benchmark only. Which ten diseases they are is counted on training rows, so a
cohort holds the set of all diagnoses of every row.
"""

from pathlib import Path

import _eicu
import numpy as np
import pandas as pd
from sklearn.utils import Bunch

HOURS = 24
N_DISEASES = 10
# The eICU tables that tell the diagnosis itself; apacheadmissiondx of `patient` is never read.
NAMED = ("diagnosis", "admissionDx")
STATISTICS = ("last", "mean")


def top(sets, rows, n=N_DISEASES):
    """Names of the most frequent diagnoses among some rows, the most frequent first."""
    counts = pd.Series([name for i in rows for name in sets[i]]).value_counts()
    return sorted(counts.index, key=lambda name: (-counts[name], name))[:n]


def labels(sets, names):
    """0 and 1 for every row and name."""
    return pd.DataFrame({name: [float(name in found) for found in sets] for name in names})


def terms_of(name):
    """Words that name a disease: what a keyword rule looks for, and what the switch takes out."""
    phrase = name.split("|")[-1].lower()
    words = {phrase, *SYNONYMS.get(phrase, ())}
    return sorted(words)


# What charts call them, beside the last step of the diagnosis path. Written by hand.
SYNONYMS = {
    "diabetes mellitus": ("diabetes", "diabetic", "insulin", "dm", "hypoglycemic agent"),
    "acute respiratory failure": ("respiratory failure", "mechanical ventilation", "intubated"),
    "pneumonia": ("pulmonary infection", "pulmonary infections", "community-acquired"),
    "atrial fibrillation": ("afib", "a-fib", "arrhythmias", "arrhythmia", "irregular"),
    "hypertension": ("hypertensive", "antihypertensive", "htn"),
    "acute renal failure": ("renal failure", "aki", "dialysis", "disorder of kidney"),
    "congestive heart failure": ("chf", "heart failure"),
    "sepsis": ("septic", "septic shock"),
    "acute coronary syndrome": ("acs", "myocardial infarction", "mi", "nstemi", "stemi", "angina"),
    "anemia": ("anemic", "packed red blood cells", "transfusion of prbc's"),
    "copd": ("chronic obstructive pulmonary disease", "emphysema"),
    "dka": ("ketoacidosis",),
}


# ---------------------------------------------------------------- eICU


def eicu(folder):
    """Unit stays of at least 24 hours with a charted diagnosis; groups are patients."""
    place = _eicu.find(folder)
    if place is None:
        return None
    patients = _eicu._read(place, "patient").set_index("patientunitstayid").sort_index()
    diagnosis = _eicu._read(place, "diagnosis")
    # The third step names the disease ("cardiovascular|arrhythmias|atrial fibrillation").
    steps = diagnosis["diagnosisstring"].str.split("|")
    diagnosis = diagnosis.assign(name=steps.str[:3].str.join("|"))[steps.str.len() >= 3]
    sets = diagnosis.groupby("patientunitstayid")["name"].agg(set)
    long_enough = patients["unitdischargeoffset"] >= HOURS * 60
    stays = patients.index[long_enough & patients.index.isin(sets.index)]
    hours = pd.read_parquet(place / "derived" / "hourly_labs_vitals.parquet")
    hours = hours[hours["hour"].between(0, HOURS - 1) & hours["patientunitstayid"].isin(stays)]
    variables = [v for panel in _eicu.PANELS.values() for v in panel]
    long = hours.melt(["patientunitstayid", "hour"], variables, "code").dropna()
    labs = _table(long, "patientunitstayid", "hour", stays)
    tables = {n: c for n, c in _eicu.TEXT_TABLES.items() if n not in NAMED}
    note = _notes(place, tables, stays)
    groups = patients.loc[stays, "uniquepid"].to_numpy()
    return _cohort("eicu-crd-demo", labs, note, groups, sets.loc[stays].tolist())


def _notes(place, tables, stays):
    """Charted phrases in time order, each once; `_eicu._notes` without the tables left out."""
    parts = [_eicu._phrases(place, table, *columns) for table, columns in tables.items()]
    long = pd.concat(parts, ignore_index=True)
    long = long[long["stay"].isin(stays) & (long["known"] <= HOURS * 60)]
    long = long.sort_values(["stay", "time"], kind="stable").drop_duplicates(["stay", "phrase"])
    return long.groupby("stay")["phrase"].agg(". ".join).reindex(stays)


def _table(long, stay, time, stays):
    """Last value and mean of every variable, one row a stay."""
    groups = long.sort_values(time, kind="stable").groupby([stay, "code"], observed=True)["value"]
    parts = [groups.agg(how).unstack().add_suffix(f"__{how}") for how in STATISTICS]
    return pd.concat(parts, axis=1).reindex(stays).astype("float64")


def _cohort(name, labs, note, groups, sets):
    X = labs.assign(note=note.to_numpy(), subject=groups).reset_index(drop=True)
    return Bunch(name=name, X=X, labs=list(labs), groups=np.asarray(groups), sets=sets)


# ---------------------------------------------------------------- MIMIC demos: no notes in them


def mimic(folder, version):
    """Admissions; ICD codes to three characters, drugs started in 24 hours as text, first labs."""
    read = _reader(folder, version)
    if read is None:
        return None
    stays = read("admissions").set_index("hadm_id").sort_index()
    start = pd.to_datetime(stays["admittime"])
    codes = read("diagnoses_icd").dropna(subset=["hadm_id"])
    icd = "icd9_code" if version == 3 else "icd_code"
    kind = codes["icd_version"].astype(str) if "icd_version" in codes else "9"
    codes = codes.assign(name="ICD-" + kind + " " + codes[icd].astype(str).str.strip().str[:3])
    sets = codes.groupby("hadm_id")["name"].agg(set).reindex(stays.index)
    sets = [found if isinstance(found, set) else set() for found in sets]
    labs = _first_labs(read("labevents"), start, version)
    names = read("d_labitems").set_index("itemid")["label"]
    labs["code"] = labs["itemid"].map(names)
    common = labs.groupby("code")["hadm_id"].nunique().nlargest(60).index
    table = _table(labs[labs["code"].isin(common)], "hadm_id", "time", stays.index)
    note = _drugs(read("prescriptions"), start, version)
    name = "mimic-iv-demo-2.2" if version == 4 else "mimic-iii-demo-1.4"
    return _cohort(name, table, note.reindex(stays.index), stays["subject_id"].to_numpy(), sets)


def _reader(folder, version):
    """Function of a table's name to the frame with lower-case columns; None without the demo."""
    name = "mimic-iv-demo-2.2" if version == 4 else "mimic-iii-demo-1.4"
    places = (Path(folder) / name, Path(folder))
    part = Path("hosp") if version == 4 else Path()

    def path(place, table):
        return place / part / f"{table if version == 4 else table.upper()}.csv.gz"

    found = [place for place in places if path(place, "admissions").exists()]
    if not found:
        return None
    return lambda table: pd.read_csv(path(found[0], table), low_memory=False).rename(
        columns=str.lower
    )


def _first_labs(labs, start, version):
    """Values of an admission that were known 24 hours after its start."""
    labs = labs.dropna(subset=["hadm_id", "valuenum"])
    clock = labs["storetime"].fillna(labs["charttime"]) if version == 4 else labs["charttime"]
    begin = labs["hadm_id"].map(start)
    labs = labs.assign(time=(pd.to_datetime(clock) - begin).dt.total_seconds() / 3600)
    labs = labs.loc[labs["time"] <= HOURS, ["hadm_id", "itemid", "time", "valuenum"]]
    return labs.rename(columns={"valuenum": "value"}).astype({"hadm_id": "int64"})


def _drugs(drugs, start, version):
    """Names of the drugs started in the first 24 hours, as one text."""
    clock = pd.to_datetime(drugs["starttime" if version == 4 else "startdate"])
    hours = (clock - drugs["hadm_id"].map(start)).dt.total_seconds() / 3600
    # A date without a time counts from the end of its day.
    hours = hours + (24 if version == 3 else 0)
    early = drugs[hours <= HOURS].dropna(subset=["drug"])
    return early.groupby("hadm_id")["drug"].agg(lambda found: ". ".join(dict.fromkeys(found)))
