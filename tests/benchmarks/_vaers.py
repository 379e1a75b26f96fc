"""VAERS reports as a cohort: what was known at vaccination and onset, the narrative, hospital stay.

Plain pandas, for the benchmark only. Fields that tell of the outcome or of the course (hospital
days, death, recovery, laboratory data, dates of the report) are never read as inputs.
"""

from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.utils import Bunch

from ehrfuse import Tabular, Text

FOLDER = "vaers"
NUMBERS = ("age", "days_to_onset", "n_vaccines", "max_dose", "month")
WORDS = ("sex", "state", "administered_by", "funded_by")
NOTES = ("history", "current_illness", "other_medication", "prior_vaccination")
MIN_REPORTS = 100  # a vaccine, maker, site or route is a column when as many reports name it


def find(folder):
    """Folder of the yearly files, itself or the subfolder; None without them."""
    places = (Path(folder) / FOLDER, Path(folder))
    return next((p for p in places if any(p.glob("*VAERSDATA.csv.gz"))), None)


def load(folder, columns=None):
    """Build the cohort from whichever years lie in the folder.

    Parameters
    ----------
    folder : path
    columns : list of str or None
        Columns of the table, those of another folder; None finds them.

    Returns
    -------
    data : Bunch
        X (one row a report), y (hospitalised), groups (equal narratives) and modalities.
    """
    reports = _read(folder, "VAERSDATA")
    reports = reports.drop_duplicates("VAERS_ID").set_index("VAERS_ID")
    shots = _read(folder, "VAERSVAX")
    shots = shots[shots["VAERS_ID"].isin(reports.index)]
    table = pd.concat([_fields(reports), _shots(shots, reports.index)], axis=1)
    if columns is None:
        common = table.columns[len(NUMBERS) + len(WORDS) + len(NOTES) :]
        rare = [c for c in common if table[c].sum() < MIN_REPORTS]
        table = table.drop(columns=rare)
    else:
        table = table.reindex(columns=columns, fill_value=False)
    X = table.assign(narrative=reports["SYMPTOM_TEXT"].where(reports["SYMPTOM_TEXT"].notna(), None))
    y = reports["HOSPITAL"].eq("Y").astype(int).rename("hospitalised")
    text = X["narrative"].fillna("").str.lower().str.findall(r"[a-z0-9]+").str.join(" ")
    alone = "report " + X.index.astype(str)
    groups = pd.factorize(np.where(text == "", alone, text))[0]
    modalities = {"table": Tabular(list(table.columns)), "note": Text("narrative")}
    return Bunch(X=X.reset_index(drop=True), y=y.reset_index(drop=True), groups=groups,
                 modalities=modalities, columns=list(table.columns))  # fmt: skip


def _read(folder, kind):
    files = sorted(Path(folder).glob(f"*{kind}.csv.gz"))
    return pd.concat([pd.read_csv(f, encoding="latin-1", low_memory=False) for f in files])


def _fields(reports):
    """What is known of the person and of the vaccination."""
    onset = pd.to_datetime(reports["ONSET_DATE"], format="%m/%d/%Y", errors="coerce")
    columns = {
        "age": reports["AGE_YRS"],
        "days_to_onset": reports["NUMDAYS"].where(reports["NUMDAYS"].between(0, 3650)),
        "sex": reports["SEX"].where(reports["SEX"].isin(["F", "M"])),
        "state": reports["STATE"],
        "administered_by": reports["V_ADMINBY"],
        "funded_by": reports["V_FUNDBY"],
        "month": onset.dt.month,
    }
    told = dict(zip(NOTES, ("HISTORY", "CUR_ILL", "OTHER_MEDS", "PRIOR_VAX"), strict=True))
    for name, column in told.items():
        text = reports[column].fillna("").str.strip().str.upper()
        columns[name] = ~text.str.match(r"^(NONE|NO|NKA|NKDA|UNK\w*|N/?A|NONE .*|~.*)?\.?$")
    return pd.DataFrame(columns)


def _shots(shots, index):
    """How many vaccines, the highest dose, and which vaccines, makers, sites and routes."""
    dose = shots["VAX_DOSE"].where(shots["VAX_DOSE"].between(0, 9))
    by = shots.assign(dose=dose).groupby("VAERS_ID")
    parts = [pd.DataFrame({"n_vaccines": by.size(), "max_dose": by["dose"].max()})]
    for column in ("VAX_TYPE", "VAX_MANU", "VAX_SITE", "VAX_ROUTE"):
        flags = pd.crosstab(shots["VAERS_ID"], shots[column]) > 0
        flags.columns = [f"{column.lower()}_{''.join(filter(str.isalnum, c))}" for c in flags]
        parts.append(flags.T.groupby(level=0).any().T)
    frame = pd.concat([p.reindex(index) for p in parts], axis=1)
    for column in frame.columns[2:]:
        frame[column] = frame[column].fillna(False).astype(bool)
    return frame
