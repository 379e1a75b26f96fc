"""Cohorts of visits for the sequence benchmarks: one row per stay, its history up to discharge.

All are read from a folder of open data sets; a loader gives None where its set is not there.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from sklearn.utils import Bunch

from ehrfuse import Tabular, Visits

MAX_HISTORY = 20  # visits of a row


def _bunch(stays, visits, y, static, unit="d"):
    """Rows of `stays` (sorted by patient and time) with the visits of the patient so far.

    `visits` are dicts in the order of `stays`, with an absolute ``time`` in days.
    """
    patient = stays["patient"].to_numpy()
    cells, first = [], 0
    for row in range(len(stays)):
        if row and patient[row] != patient[row - 1]:
            first = row
        now = visits[row]["time"]
        history = visits[max(first, row + 1 - MAX_HISTORY) : row + 1]
        cells.append([visit | {"time": visit["time"] - now} for visit in history])
    column = pd.Series(pd.arrays.ArrowExtensionArray(pa.array(cells)), index=range(len(stays)))
    X = stays[["patient", *static]].reset_index(drop=True).assign(visits=column)
    modalities = {"static": Tabular(list(static)), "visits": Visits("visits", time_unit=unit)}
    return Bunch(X=X, y=pd.Series(np.asarray(y)), groups=patient, modalities=modalities)


def _take(data, rows):
    return Bunch(
        X=data.X.iloc[rows].reset_index(drop=True), y=data.y.iloc[rows].reset_index(drop=True),
        groups=data.groups[rows], modalities=data.modalities,
    )  # fmt: skip


# ---------------------------------------------------------------- Diabetes 130-US hospitals

NUMBERS = (
    "time_in_hospital", "num_lab_procedures", "num_procedures", "num_medications",
    "number_outpatient", "number_emergency", "number_inpatient", "number_diagnoses",
)  # fmt: skip
ORIGIN = ("admission_type_id", "discharge_disposition_id", "admission_source_id")
GAPS = {"<30": 15.0, ">30": 120.0, "NO": 365.0}  # days to the next encounter: the set is as coarse
GONE = (11, 13, 14, 19, 20, 21)  # died or hospice: cannot be readmitted


def diabetes(folder, n_patients=None):
    """Readmission within 30 days; the gap to the next encounter is known of earlier ones only.

    Encounters of a patient are ordered by ``encounter_id``. ``readmitted`` of the current and of
    later encounters is never read: it is the label.
    """
    path = Path(folder) / "diabetes-130" / "diabetic_data.csv.gz"
    if not path.exists():
        return None
    table = pd.read_csv(path, na_values="?", keep_default_na=False, low_memory=False)
    table = table.sort_values(["patient_nbr", "encounter_id"], ignore_index=True)
    if n_patients is not None:
        people = table["patient_nbr"].unique()
        kept = np.random.default_rng(0).choice(people, min(n_patients, len(people)), replace=False)
        table = table[table["patient_nbr"].isin(kept)].reset_index(drop=True)
    drugs = list(table.columns[table.columns.get_loc("metformin") : -3])
    gap = table["readmitted"].map(GAPS).to_numpy()
    new = table["patient_nbr"].ne(table["patient_nbr"].shift()).to_numpy()
    before = np.append(0.0, gap[:-1])  # what stood between the encounter before and this one
    # Each patient's clock starts anew; differences are all that is read.
    total = np.cumsum(np.where(new, 0.0, before))
    days = total - total[np.maximum.accumulate(np.where(new, np.arange(len(new)), 0))]
    visits = [_encounter(row, time, drugs) for row, time in
              zip(table.to_dict("records"), days, strict=True)]  # fmt: skip
    static = ("age", "gender", "race")
    stays = table.rename(columns={"patient_nbr": "patient"})
    data = _bunch(stays, visits, (table["readmitted"] == "<30").astype(int), static)
    return _take(data, np.flatnonzero(~table["discharge_disposition_id"].isin(GONE)))


def _encounter(row, time, drugs):
    diagnoses = [row[f"diag_{i}"] for i in (1, 2, 3)]
    return {
        "time": float(time),
        **{name: float(row[name]) for name in NUMBERS},
        "dx": [str(code).split(".")[0] for code in diagnoses if not pd.isna(code)],
        "rx": [f"{drug} {row[drug]}" for drug in drugs if row[drug] != "No"],
        "result": [f"{n} {row[n]}" for n in ("A1Cresult", "max_glu_serum") if row[n] != "None"],
        "origin": [f"{name} {row[name]}" for name in ORIGIN],
    }


# ---------------------------------------------------------------- MIMIC-IV demo

LABS = {50912: "creatinine", 51222: "haemoglobin", 50971: "potassium", 50983: "sodium",
        51301: "white_cells", 51265: "platelets", 51006: "urea"}  # fmt: skip


def mimic4(folder):
    """Readmission within 30 days of discharge; laboratory means and codes of each admission."""
    home = Path(folder) / "mimic-iv-demo-2.2" / "hosp"
    if not (home / "admissions.csv.gz").exists():
        return None
    stays = pd.read_csv(home / "admissions.csv.gz", parse_dates=["admittime", "dischtime"])
    stays = stays.sort_values(["subject_id", "admittime"], ignore_index=True)
    people = pd.read_csv(home / "patients.csv.gz").set_index("subject_id")
    labs = pd.read_csv(home / "labevents.csv.gz", usecols=["hadm_id", "itemid", "valuenum"])
    labs = labs[labs["itemid"].isin(LABS)].groupby(["hadm_id", "itemid"])["valuenum"].mean()
    codes = pd.read_csv(home / "diagnoses_icd.csv.gz")
    codes = codes.assign(code=codes["icd_code"].astype(str).str.strip().str[:3])
    codes = codes.groupby("hadm_id")["code"].agg(lambda c: sorted(set(c)))
    days = (stays["dischtime"] - pd.Timestamp("2100-01-01")).dt.total_seconds() / 86400
    visits = [
        {
            "time": float(day),
            "days": (stay.dischtime - stay.admittime).total_seconds() / 86400,
            **{name: _number(labs.get((stay.hadm_id, item))) for item, name in LABS.items()},
            "dx": list(codes.get(stay.hadm_id, [])),
        }
        for day, stay in zip(days, stays.itertuples(), strict=True)
    ]
    following = stays.groupby("subject_id")["admittime"].shift(-1)
    y = ((following - stays["dischtime"]).dt.total_seconds() / 86400).lt(30).astype(int)
    stays["age"] = people.loc[stays["subject_id"], "anchor_age"].to_numpy()
    stays["gender"] = people.loc[stays["subject_id"], "gender"].to_numpy()
    data = _bunch(stays.rename(columns={"subject_id": "patient"}), visits, y, ("age", "gender"))
    return _take(data, np.flatnonzero(stays["hospital_expire_flag"] == 0))


def _number(value):
    return None if value is None or not np.isfinite(value) else float(value)


# ---------------------------------------------------------------- CMS SynPUF, a negative control


def synpuf(folder, n_patients=None):
    """Readmission within 30 days in claims whose synthesis has removed what follows from what."""
    home = Path(folder) / "cms-synpuf"
    if not (home / "inpatient_claims.parquet").exists():
        return None
    claims = pd.read_parquet(home / "inpatient_claims.parquet")
    claims = claims[claims["SEGMENT"].astype(str) == "1"]
    if n_patients is not None:
        people = claims["DESYNPUF_ID"].unique()
        kept = np.random.default_rng(0).choice(people, min(n_patients, len(people)), replace=False)
        claims = claims[claims["DESYNPUF_ID"].isin(kept)]
    admitted = pd.to_datetime(claims["CLM_ADMSN_DT"], format="%Y%m%d")
    left = pd.to_datetime(claims["NCH_BENE_DSCHRG_DT"], format="%Y%m%d")
    claims = claims.assign(admitted=admitted, left=left).dropna(subset=["admitted", "left"])
    claims = claims.sort_values(["DESYNPUF_ID", "left", "admitted"], ignore_index=True)
    diagnoses = [c for c in claims if c.startswith("ICD9_DGNS_CD")]
    days = (claims["left"] - pd.Timestamp("2007-01-01")).dt.days
    stay = (claims["left"] - claims["admitted"]).dt.days
    found = claims[diagnoses].astype(str).to_numpy()
    visits = [
        {
            "time": float(day),
            "days": float(length),
            "dx": sorted({c[:3] for c in row if len(c) > 2}),
        }
        for day, length, row in zip(days, stay, found, strict=True)
    ]
    following = claims.groupby("DESYNPUF_ID")["admitted"].shift(-1)
    y = (following - claims["left"]).dt.days.between(0, 30).astype(int)
    people = pd.read_parquet(home / "beneficiary_summary.parquet")
    people = people.drop_duplicates("DESYNPUF_ID").set_index("DESYNPUF_ID")
    own = people.loc[claims["DESYNPUF_ID"]]
    claims["sex"] = own["BENE_SEX_IDENT_CD"].astype(str).to_numpy()
    born = pd.to_datetime(own["BENE_BIRTH_DT"], format="%Y%m%d").to_numpy()
    claims["age"] = (claims["admitted"] - born).dt.days / 365.25
    return _bunch(claims.rename(columns={"DESYNPUF_ID": "patient"}), visits, y, ("age", "sex"))
