"""Diabetes-130 as a cohort: a table, and a note made of the columns that the table leaves out.

The note is semi-synthetic: the titles of the ICD-9 codes and what was done to each drug, in words.
Plain pandas, for the benchmark only.
"""

from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.utils import Bunch

from ehrfuse import Tabular, Text

FOLDER = "diabetes-130"
GONE = (11, 13, 14, 19, 20, 21)  # died, or discharged to a hospice: no readmission is possible
NUMBERS = (
    "time_in_hospital", "num_lab_procedures", "num_procedures", "num_medications",
    "number_outpatient", "number_emergency", "number_inpatient", "number_diagnoses",
)  # fmt: skip
WORDS = (
    "race", "gender", "age", "admission_type_id", "discharge_disposition_id",
    "admission_source_id", "payer_code", "medical_specialty", "max_glu_serum", "A1Cresult",
)  # fmt: skip
DOSE = {"Up": "raised", "Down": "lowered", "Steady": "continued"}


def find(folder):
    """Folder of the file, itself or the subfolder; None without it."""
    places = (Path(folder) / FOLDER, Path(folder))
    return next((p for p in places if (p / "diabetic_data.csv.gz").exists()), None)


def load(folder, every=1):
    """Build the cohort.

    Parameters
    ----------
    folder : path
    every : int, default=1
        Take every so many patients.

    Returns
    -------
    data : Bunch
        X (one row an encounter), y (readmitted within 30 days), groups (patient), modalities.
    """
    raw = pd.read_csv(Path(folder) / "diabetic_data.csv.gz", low_memory=False, na_values="?")
    raw = raw[~raw["discharge_disposition_id"].isin(GONE)]
    patient = pd.factorize(raw["patient_nbr"], sort=True)[0]
    raw, patient = raw[patient % every == 0], patient[patient % every == 0]
    X = raw[list(NUMBERS)].copy()
    for column in WORDS:
        X[column] = raw[column].astype(object).where(raw[column].notna(), None).map(
            str, na_action="ignore"
        )  # fmt: skip
    X["narrative"] = _notes(raw, _titles(folder))
    y = raw["readmitted"].eq("<30").astype(int).reset_index(drop=True)
    modalities = {"table": Tabular([*NUMBERS, *WORDS]), "note": Text("narrative")}
    return Bunch(X=X.reset_index(drop=True), y=y, groups=patient, modalities=modalities)


def _titles(folder):
    """Title of every ICD-9-CM code, from the code table beside the data set."""
    path = Path(folder).parent / "knowledge" / "codes" / "icd9cm.csv.gz"
    return pd.read_csv(path, dtype=str).set_index("code")["name"] if path.exists() else pd.Series()


def _notes(raw, titles):
    """One sentence a diagnosis and a drug; the code itself where it has no title."""
    parts = []
    for column in ("diag_1", "diag_2", "diag_3"):
        code = raw[column].astype(object)
        parts.append(code.map(titles).fillna(code).fillna(""))
    drugs = raw.columns[raw.columns.get_loc("metformin") : raw.columns.get_loc("change")]
    for drug in drugs:
        done = raw[drug].map(DOSE)
        parts.append(np.where(done.notna(), f"{drug} " + done.fillna(""), ""))
    table = pd.concat([pd.Series(p, index=raw.index) for p in parts], axis=1)
    return table.apply(lambda row: ". ".join(part for part in row if part), axis=1)
