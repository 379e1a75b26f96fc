"""The eICU demo as a cohort: first 24 hours of unit stays of at least 24 hours, two outcomes.

Plain pandas, for the benchmark only. Every row read was charted (and, where the table says so,
entered) at or before the prediction; discharge fields and severity scores are never read as inputs.
"""

from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.utils import Bunch

from ehrfuse import Events, Tabular, Text
from ehrfuse.datasets._engine import events_series

FOLDER = "eicu-crd-demo-2.0.1"
HORIZON = 24  # hours from admission to the unit to the prediction

# One entry is one order or one device, as far as the hourly table tells them apart.
PANELS = {
    "vitals": ("hr", "resp", "o2sat", "temp", "sbp", "dbp", "map"),
    "urine": ("urine",),
    "oxygen": ("fio2",),
    "blood_gas": ("ph", "pco2", "po2", "be", "cai", "methb"),
    "lactate": ("lact",),
    "chemistry": ("na", "k", "cl", "bicar", "bun", "crea", "glu", "ca", "mg", "phos"),
    "blood_count": ("hgb", "wbc", "plt", "mch", "mchc", "mcv"),
    "inflammation": ("lymph", "neut", "bnd", "crp"),
    "liver": ("alb", "alp", "alt", "ast", "bili", "bili_dir"),
    "coagulation": ("inr_pt", "ptt", "fgn"),
    "cardiac": ("ck", "ckmb", "tnt"),
}
STATIC = (
    "age", "gender", "height", "weight", "ethnicity", "unit_type", "unit_admit_source",
    "hospital_admit_source", "unit_stay_type", "unit_visit_number", "hours_in_hospital",
)  # fmt: skip
TASKS = ("hospital_death", "later_icu_stay")

# Table: columns of the phrase, column of its time, and of the time it was entered (if it has one).
# Diagnoses are inputs here: both tasks are about what follows, not about what the patient has.
TEXT_TABLES = {
    "note": (["notepath"], "noteoffset", "noteenteredoffset"),
    "physicalExam": (["physicalexampath"], "physicalexamoffset", None),
    "pastHistory": (["pasthistorypath"], "pasthistoryoffset", "pasthistoryenteredoffset"),
    "treatment": (["treatmentstring"], "treatmentoffset", None),
    "diagnosis": (["diagnosisstring"], "diagnosisoffset", None),
    "admissionDx": (["admitdxpath"], "admitdxenteredoffset", None),
    "carePlanGeneral": (["cplgroup", "cplitemvalue"], "cplitemoffset", None),
}
WHOLE_PATHS = ("treatment", "diagnosis", "admissionDx", "carePlanGeneral")
# Entries of the form itself, and the measured values that the hourly table has already.
LEFT_OUT = "Obtain Options|View Options|Save/|Include Rx|Vital Sign and Phys|Weight and I&"


def find(folder):
    """Folder of the tables, itself or the subfolder of the official name; None without them."""
    places = (Path(folder) / FOLDER, Path(folder))
    return next((place for place in places if (place / "patient.csv.gz").exists()), None)


def load(folder):
    """Build the cohort.

    Parameters
    ----------
    folder : path
        With the tables of the demo, one ``.csv.gz`` each, and ``derived/``.

    Returns
    -------
    data : Bunch
        X (one row per unit stay, indexed by ``patientunitstayid``, with ``uniquepid``), y (frame of
        two tasks, NaN where unknown), groups (patient) and modalities.
    """
    patients = _read(folder, "patient").set_index("patientunitstayid").sort_index()
    y = _labels(patients)
    stays = patients.index[patients["unitdischargeoffset"] >= HORIZON * 60]
    patients, y = patients.loc[stays], y.loc[stays]
    X = pd.concat([_static(patients), _panels(folder, stays), _notes(folder, stays)], axis=1)
    return Bunch(X=X, y=y, groups=X["uniquepid"].to_numpy(), modalities=modalities())


def modalities(stream=False):
    """Static columns, one entry per panel, and the charted text."""
    panels = {name: Events(name, time_unit="h", stream=stream) for name in PANELS}
    return {"static": Tabular(list(STATIC)), **panels, "note": Text("note")}


def _read(folder, table):
    return pd.read_csv(Path(folder) / f"{table}.csv.gz", low_memory=False)


def _labels(patients):
    """Death in hospital, and a later unit stay in the same hospitalisation."""
    status = patients["hospitaldischargestatus"]
    died = status.map({"Expired": 1.0, "Alive": 0.0})
    last = patients.groupby("patienthealthsystemstayid")["unitvisitnumber"].transform("max")
    later = (last > patients["unitvisitnumber"]).astype(float)
    # Who dies in this stay can have no later one: not a negative, but not defined.
    later[patients["unitdischargestatus"] == "Expired"] = np.nan
    return pd.DataFrame(dict(zip(TASKS, (died, later), strict=True)))


def _static(patients):
    """What is known of a stay from its admission on."""
    age = pd.to_numeric(patients["age"].replace("> 89", "90"), errors="coerce")
    height = patients["admissionheight"]
    weight = patients["admissionweight"]
    return pd.DataFrame({
        "uniquepid": patients["uniquepid"],
        "age": age,
        "gender": patients["gender"],
        "height": height.where(height.between(100, 250)),  # inches and slips of the pen
        "weight": weight.where(weight.between(20, 400)),
        "ethnicity": patients["ethnicity"],
        "unit_type": patients["unittype"],
        "unit_admit_source": patients["unitadmitsource"],
        "hospital_admit_source": patients["hospitaladmitsource"],
        "unit_stay_type": patients["unitstaytype"],
        "unit_visit_number": patients["unitvisitnumber"],
        "hours_in_hospital": -patients["hospitaladmitoffset"] / 60,
    })  # fmt: skip


def _panels(folder, stays):
    """One events column per panel from the hourly table; times run from -24 to -1."""
    hourly = pd.read_parquet(Path(folder) / "derived" / "hourly_labs_vitals.parquet")
    hourly = hourly[hourly["hour"].between(0, HORIZON - 1)]
    hourly = hourly[hourly["patientunitstayid"].isin(stays)]
    columns = {}
    for name, variables in PANELS.items():
        long = hourly.melt(["patientunitstayid", "hour"], list(variables), "code").dropna()
        columns[name] = events_series(
            stays.get_indexer(long["patientunitstayid"]),
            long["hour"].astype(float) - HORIZON,
            pd.Categorical(long["code"], categories=list(variables)),
            long["value"],
            len(stays),
            index=stays,
        )
    return pd.DataFrame(columns, index=stays)


def _notes(folder, stays):
    """Charted phrases of the first 24 hours in time order, each once; null where there is none."""
    parts = [_phrases(folder, table, *columns) for table, columns in TEXT_TABLES.items()]
    long = pd.concat(parts, ignore_index=True)
    long = long[long["stay"].isin(stays) & (long["known"] <= HORIZON * 60)]
    # Charting copies forward: a phrase that is charted again tells of the charting.
    long = long.sort_values(["stay", "time"], kind="stable").drop_duplicates(["stay", "phrase"])
    return long.groupby("stay")["phrase"].agg(". ".join).reindex(stays).rename("note")


def _phrases(folder, table, path, time, entered):
    """Stay, time, when it was known, and the phrase, from one table."""
    raw = _read(folder, table).dropna(subset=path)
    raw = raw[~raw[path[0]].str.contains(LEFT_OUT)]
    steps = raw[path[0]] if len(path) == 1 else raw[path].agg("/".join, axis=1)
    steps = steps.str.replace("|", "/").str.split("/")
    # The last two steps say what was found where ("Motor Score/6"); the earlier are the menu.
    phrase = (steps if table in WHOLE_PATHS else steps.str[-2:]).str.join(" ")
    known = raw[time] if entered is None else raw[[time, entered]].max(axis=1)
    stay = raw["patientunitstayid"]
    return pd.DataFrame({"stay": stay, "time": raw[time], "known": known, "phrase": phrase})
