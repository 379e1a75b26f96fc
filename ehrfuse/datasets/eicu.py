"""eICU Collaborative Research Database: unit stays, timed in minutes from admission to the unit."""

import numpy as np
import pandas as pd
import pyarrow as pa

from ehrfuse.datasets import vocabulary
from ehrfuse.datasets._cohort import Source, build, join_texts, melted, visits
from ehrfuse.datasets._mimic import DEMOGRAPHICS, HEIGHT, OLDEST, WEIGHT
from ehrfuse.datasets.mimic4 import open_tables

_APERIODIC = ("noninvasivesystolic", "noninvasivediastolic", "noninvasivemean")
_PERIODIC = (
    "heartrate", "respiration", "sao2", "temperature", "systemicsystolic", "systemicdiastolic",
    "systemicmean",
)  # fmt: skip
_HOURLY = [analyte.short for analyte in vocabulary.ANALYTES if analyte.short]
SCHEMA = f"""
patient: patientunitstayid BIGINT, patienthealthsystemstayid BIGINT, uniquepid VARCHAR, \
gender VARCHAR?, age VARCHAR?, ethnicity VARCHAR?, hospitalid BIGINT?, admissionheight DOUBLE?, \
admissionweight DOUBLE?, hospitaladmitoffset DOUBLE?, hospitaladmitsource VARCHAR?, \
hospitaldischargeoffset DOUBLE?, hospitaldischargestatus VARCHAR?, \
unittype VARCHAR?, unitadmitsource VARCHAR?, unitvisitnumber BIGINT?, unitstaytype VARCHAR?, \
unitdischargeoffset DOUBLE, unitdischargestatus VARCHAR?
hourly: patientunitstayid BIGINT, hour DOUBLE, {", ".join(f"{name} DOUBLE?" for name in _HOURLY)}
lab: patientunitstayid BIGINT, labresultoffset BIGINT, labresultrevisedoffset BIGINT?, \
labname VARCHAR, labresult DOUBLE, labmeasurenamesystem VARCHAR?
vitalperiodic: patientunitstayid BIGINT, observationoffset BIGINT, \
{", ".join(f"{name} DOUBLE?" for name in _PERIODIC)}
vitalaperiodic: patientunitstayid BIGINT, observationoffset BIGINT, \
{", ".join(f"{name} DOUBLE?" for name in _APERIODIC)}
nursecharting: patientunitstayid BIGINT, nursingchartoffset BIGINT, \
nursingchartentryoffset BIGINT?, nursingchartcelltypevallabel VARCHAR, \
nursingchartcelltypevalname VARCHAR, nursingchartvalue VARCHAR
respiratorycharting: patientunitstayid BIGINT, respchartoffset BIGINT, \
respchartentryoffset BIGINT?, respchartvaluelabel VARCHAR, respchartvalue VARCHAR
intakeoutput: patientunitstayid BIGINT, intakeoutputoffset BIGINT, \
intakeoutputentryoffset BIGINT?, cellpath VARCHAR, cellvaluenumeric DOUBLE
medication: patientunitstayid BIGINT, drugorderoffset BIGINT, drugstartoffset BIGINT, \
drugname VARCHAR?
infusiondrug: patientunitstayid BIGINT, infusionoffset BIGINT, drugname VARCHAR
note: patientunitstayid BIGINT, noteoffset BIGINT, noteenteredoffset BIGINT?, notepath VARCHAR
physicalexam: patientunitstayid BIGINT, physicalexamoffset BIGINT, physicalexampath VARCHAR
pasthistory: patientunitstayid BIGINT, pasthistoryoffset BIGINT, pasthistoryenteredoffset BIGINT?, \
pasthistorypath VARCHAR
treatment: patientunitstayid BIGINT, treatmentoffset BIGINT, treatmentstring VARCHAR
diagnosis: patientunitstayid BIGINT, diagnosisoffset BIGINT, diagnosisstring VARCHAR, \
icd9code VARCHAR?
admissiondx: patientunitstayid BIGINT, admitdxenteredoffset BIGINT, admitdxpath VARCHAR
careplangeneral: patientunitstayid BIGINT, cplitemoffset BIGINT, cplgroup VARCHAR, \
cplitemvalue VARCHAR
"""
ABOUT = """eICU Collaborative Research Database (https://physionet.org/content/eicu-crd/). The data
are under the licence of their release (full: PhysioNet Credentialed Health Data License; demo: Open
Database License 1.0). Please cite Pollard TJ et al., Scientific Data 2018;5:180178, and Goldberger
AL et al., Circulation 2000;101:e215-e220."""

RACES = {
    "Caucasian": "white", "African American": "black", "Asian": "asian", "Hispanic": "hispanic",
    "Native American": "native", "Other/Unknown": "other",
}  # fmt: skip
ADMISSION = {  # column of X: column of the table
    "unit_type": "unittype",
    "unit_admit_source": "unitadmitsource",
    "hospital_admit_source": "hospitaladmitsource",
    "unit_stay_type": "unitstaytype",
    "unit_visit_number": "unitvisitnumber",
}
# Table: SQL of the phrase, column of its time, and of the time it was entered (if it has one).
TEXTS = {
    "note": ("notepath", "noteoffset", "noteenteredoffset"),
    "physicalexam": ("physicalexampath", "physicalexamoffset", None),
    "pasthistory": ("pasthistorypath", "pasthistoryoffset", "pasthistoryenteredoffset"),
    "treatment": ("treatmentstring", "treatmentoffset", None),
    "diagnosis": ("diagnosisstring", "diagnosisoffset", None),
    "admissiondx": ("admitdxpath", "admitdxenteredoffset", None),
    "careplangeneral": ("cplgroup || '/' || cplitemvalue", "cplitemoffset", None),
}
_WHOLE = ("treatment", "diagnosis", "admissiondx", "careplangeneral")
# Entries of the form itself, and the measured values that stand in the panels.
_FORM = "Obtain Options|View Options|Save/|Include Rx|Vital Sign and Phys|Weight and I&"
_EVER = -(10**8)  # minutes: all the past


def load_eicu(
    root,
    task=("in_hospital_mortality", "later_icu_stay"),
    *,
    labs="events",
    cache=None,
    memory_limit="512MB",
    threads=None,
):
    """Build a data set from a folder of the eICU database.

    Parameters
    ----------
    root : str, Path, list of these, or an Ibis connection
        Folder of the release, ``.csv.gz``, ``.csv`` or Parquet. What is absent is left out and
        listed. A table ``hourly_labs_vitals.parquet`` of hourly values with ricu's names, where
        there is one, takes the place of the tables of measurements. A connection reads the same
        tables in a warehouse (extra ``warehouse``).
    task : str, Task or list of these, default=("in_hospital_mortality", "later_icu_stay")
        Tasks of unit ``"icu"``. By default both are predicted at 24 hours, for all unit stays of at
        least 24 hours.
    labs : {"events", "values"}, default="events"
        Whether `modalities` reads laboratory panels as events, or the latest value of every
        analyte (for estimators that read `Labs`). X holds both.
    cache : path, default=None
        Folder that keeps finished inputs, without texts, for the next call.
    memory_limit : str, default="512MB"
        What the query engine may hold; it spills to disk beyond it.
    threads : int, default=None
        Threads of the query engine; by default all cores, at most four. They do not change X.

    Returns
    -------
    data : :class:`~sklearn.utils.Bunch`
        As `load_mimic4` gives it, with ``uniquepid`` and ``patientunitstayid`` as identifiers and
        ``note``, the text of what was charted.

    Raises
    ------
    ImportError
        If DuckDB (extra ``cohort``) is not installed.
    FileNotFoundError
        If the folder or the table of patients is not there.
    ValueError
        If a table is not what it should be, or the task has another unit.

    See Also
    --------
    load_mimic4 : The same columns from MIMIC-IV, and the contents described.

    Notes
    -----
    * Drug orders count from the order on, cancelled ones too: when they were cancelled is not told.
    * A row counts when it was entered, where the table says so, and not before its own offset.
      Discharge fields and severity scores (``apachePatientResult``) are never read as inputs.
    * The text joins charted phrases of notes, examinations, history, treatments, diagnoses and
      care plans, each once, since charting copies forward. `phenotyping` leaves out the tables of
      diagnoses.
    * An unknown discharge status is an unknown label.
    * The order of two hospitalisations of a patient is not told, so that there is no readmission;
      ``history`` holds earlier unit stays of the same hospitalisation.

    Examples
    --------
    >>> from ehrfuse.datasets import load_eicu
    >>> data = load_eicu("eicu-crd-demo")  # doctest: +SKIP
    """
    with open_tables(root, SCHEMA, memory_limit, threads) as tables:
        return build(Eicu(tables), task, labs, cache)


class Eicu(Source):
    """The eICU database.

    Parameters
    ----------
    tables : Tables
    """

    units = ("icu",)
    defaults = {  # noqa: RUF012
        "in_hospital_mortality": {"hours": 24, "first_stay": False, "min_age": 0},
        "length_of_stay": {"min_age": 0},
        "phenotyping": {"unit": "icu", "min_age": 0},
    }
    per_hour = 60.0  # minutes
    about = ABOUT

    def __init__(self, tables):
        super().__init__(tables)
        tables.require("patient")
        frame = tables.query(f"SELECT DISTINCT * FROM {tables.table('patient')} t").to_pandas()
        frame = frame.dropna(subset="patientunitstayid")
        twice = frame["patientunitstayid"].duplicated().sum()
        if twice:
            raise ValueError(
                f"Table 'patient' has {twice} keys 'patientunitstayid' with contradicting rows; a "
                "key must be unique: check the export."
            )
        self.stays = frame.sort_values("patientunitstayid", ignore_index=True)

    def after(self, start, hours):
        """See `Source.after`."""
        return (start + round(60 * hours)).astype("int64")

    def candidates(self, unit, codes=False):
        """See `Source.candidates`."""
        p = self.stays
        place = ["patienthealthsystemstayid", "unitvisitnumber"]
        ordered = p.sort_values([*place, "patientunitstayid"])
        # A later unit stay of the same hospitalisation starts so long after this one.
        since_hospital = -ordered["hospitaladmitoffset"]
        coming = since_hospital.groupby(ordered[place[0]]).shift(-1) - since_hospital
        later = ordered[place[1]] < ordered.groupby(place[0])[place[1]].transform("max")
        coming = coming.fillna(0).where(later)
        status = {"Expired": 1.0, "Alive": 0.0}
        died = p["hospitaldischargestatus"].map(status)
        died_here = p["unitdischargestatus"].map(status)
        gone = p["hospitaldischargeoffset"].fillna(p["unitdischargeoffset"])
        death = p["unitdischargeoffset"].where(died_here == 1, gone.where(died == 1))
        out = pd.DataFrame(
            {
                "key": p["patientunitstayid"],
                "start": 0,
                "since": _EVER,
                "subject": p["uniquepid"],
                "admission": p["patienthealthsystemstayid"],
                "stay": p["patientunitstayid"],
                "age": age(p["age"]),
                "hospital_in": p["hospitaladmitoffset"] / 60,
                "hospital_out": p["hospitaldischargeoffset"] / 60,
                "icu_in": 0.0,
                "icu_out": p["unitdischargeoffset"] / 60,
                "death": death / 60,
                "died_in_hospital": died,
                "died_in_icu": died_here,
                "later_icu": coming.reindex(p.index) / 60,
                "next_admission": np.nan,
                "next_unplanned": np.nan,
                "next_icu": np.nan,
            }
        )
        order = ordered.groupby("uniquepid").cumcount() + 1
        out["number"] = order.reindex(p.index)
        if codes:
            out["codes"] = self._codes_of(out["stay"])
        return out

    def _codes_of(self, stays):
        self.tables.require("diagnosis")
        found = self.tables.query(f"""
            SELECT DISTINCT patientunitstayid AS stay, icd9code AS code
            FROM {self.tables.table("diagnosis")} t
            WHERE icd9code IS NOT NULL ORDER BY 1, 2""").to_pandas()
        found["code"] = "ICD9:" + first_code(found["code"])
        lists = found.groupby("stay")["code"].agg(list)
        return stays.map(lists).map(lambda codes: codes if isinstance(codes, list) else [])

    # ------------------------------------------------------------ inputs

    def static(self, rows):
        """See `Source.static`."""
        p = self.stays.set_index("patientunitstayid").loc[rows.frame["stay"]].reset_index()
        X = pd.DataFrame(
            {
                "subject_id": p["uniquepid"],
                "patientunitstayid": p["patientunitstayid"],
                "age": rows.frame["age"],
                "sex": p["gender"].map({"Female": "female", "Male": "male"}),
                "race": p["ethnicity"].map(RACES),
                "height": p["admissionheight"].where(p["admissionheight"].between(*HEIGHT)),
                "weight": p["admissionweight"].where(p["admissionweight"].between(*WEIGHT)),
            }
        )
        X = X.assign(**{name: p[column] for name, column in ADMISSION.items()})
        X["hours_in_hospital"] = -p["hospitaladmitoffset"] / 60
        admission = [*ADMISSION, "hours_in_hospital"]
        return X, {
            "demographics": {"kind": "Tabular", "columns": DEMOGRAPHICS},
            "admission": {"kind": "Tabular", "columns": admission},
        }

    def measured(self):
        """See `Source.measured`."""
        if self.tables.has("hourly"):
            return [self._hourly()]
        parts = []
        if self.tables.has("lab"):
            known = "GREATEST(labresultoffset, COALESCE(labresultrevisedoffset, labresultoffset))"
            facts = self._facts("lab", "labresultoffset", known, "LOWER(labname)", "labresult",
                                "labmeasurenamesystem")  # fmt: skip
            items = vocabulary.items_of("eicu")
            parts.append((facts, items[~items["item"].isin((*_PERIODIC, *_APERIODIC))]))
        for table, columns in (("vitalperiodic", _PERIODIC), ("vitalaperiodic", _APERIODIC)):
            if self.tables.has(table):
                parts.append(self._wide(table, columns))
        return parts + self._charted()

    def _charted(self):
        """Coma scale, inspired oxygen and urine from the charting tables."""
        parts, items = [], vocabulary.items_of("eicu")
        if self.tables.has("nursecharting"):
            time = "nursingchartoffset"
            facts = self._facts(
                "nursecharting", time, _late(time, "nursingchartentryoffset"),
                "LOWER(nursingchartcelltypevalname)", "TRY_CAST(nursingchartvalue AS DOUBLE)", "''",
                "WHERE nursingchartcelltypevallabel = 'Glasgow coma score'",
            )  # fmt: skip
            scale = {"eyes": "gcs_eye", "verbal": "gcs_verbal", "motor": "gcs_motor"}
            codes = [vocabulary.NAMES.index(name) for name in scale.values()]
            scale = pd.DataFrame({"item": list(scale), "code": codes, "factor": 1.0, "shift": 0.0})
            parts.append((facts, scale))
        if self.tables.has("respiratorycharting"):
            time = "respchartoffset"
            facts = self._facts(
                "respiratorycharting", time, _late(time, "respchartentryoffset"), "'fio2'",
                "TRY_CAST(REPLACE(respchartvalue, '%', '') AS DOUBLE)", "''",
                "WHERE LOWER(respchartvaluelabel) LIKE 'fio2%'",
            )  # fmt: skip
            parts.append((facts, items[items["item"] == "fio2"]))
        if self.tables.has("intakeoutput"):
            time = "intakeoutputoffset"
            facts = self._facts(
                "intakeoutput", time, _late(time, "intakeoutputentryoffset"), "'urine'",
                "cellvaluenumeric", "''", "WHERE cellpath LIKE '%Output (ml)|Urine%'",
            )  # fmt: skip
            short = vocabulary.items_of("short")
            parts.append((facts, short[short["item"] == "urine"]))
        return parts

    def _facts(self, table, time, known, item, value, unit, more=""):
        return f"""(SELECT patientunitstayid AS key, {time} AS time, {known} AS known,
            {item} AS item, {value} AS value, {unit} AS unit
            FROM {self.tables.table(table)} t {more})"""

    def _wide(self, table, columns):
        time, columns = "observationoffset", self._there(table, columns)
        items = vocabulary.items_of("eicu")
        facts = melted(self.tables.table(table), "patientunitstayid", time, time, columns)
        return facts, items[items["item"].isin(columns)]

    def _hourly(self):
        """What an hour's cell holds is known when the hour is over."""
        columns = self._there("hourly", _HOURLY)
        time, known = "CAST(60 * hour AS BIGINT)", "CAST(60 * hour + 60 AS BIGINT)"
        table = self.tables.table("hourly")
        facts = melted(table, "patientunitstayid", time, known, columns, "WHERE hour >= 0")
        items = vocabulary.items_of("short")
        return facts, items[items["item"].isin(columns)]

    def _there(self, table, columns):
        return [column for column in columns if self.tables.has(table, column)]

    def drugs(self):
        """See `Source.drugs`."""
        parts = []
        if self.tables.has("medication"):
            parts.append(f"""SELECT patientunitstayid AS key, drugstartoffset AS time,
                GREATEST(drugstartoffset, drugorderoffset) AS known, LOWER(TRIM(drugname)) AS name
                FROM {self.tables.table("medication")} t""")
        if self.tables.has("infusiondrug"):
            parts.append(f"""SELECT patientunitstayid AS key, infusionoffset AS time,
                infusionoffset AS known, LOWER(TRIM(drugname)) AS name
                FROM {self.tables.table("infusiondrug")} t""")
        return f"({' UNION ALL '.join(parts)})" if parts else None

    def history(self, rows):
        """See `Source.history`."""
        past = self._past(rows)
        codes = {}
        if self.tables.has("diagnosis"):
            self.tables.register("wanted", pd.DataFrame({"id": np.unique(past["id"])}))
            found = self.tables.query(f"""
                SELECT DISTINCT w.id AS id, t.icd9code AS code
                FROM {self.tables.table("diagnosis")} t JOIN wanted w ON w.id = t.patientunitstayid
                WHERE t.icd9code IS NOT NULL ORDER BY 1, 2""").to_pandas()
            words = pa.array("ICD9:" + first_code(found["code"]), pa.string())
            codes["diagnoses"] = found["id"].to_numpy(), words
        return visits(rows, past, codes, ["length_of_stay"])

    def _past(self, rows):
        """Earlier unit stays of the same hospitalisation, on the clock of the present one."""
        columns = ["patienthealthsystemstayid", "unitvisitnumber", "patientunitstayid",
                   "hospitaladmitoffset", "unitdischargeoffset"]  # fmt: skip
        stays = self.stays[columns]
        now = stays.set_index("patientunitstayid").loc[rows.frame["stay"]].reset_index()
        now = now.assign(row=range(rows.n), landmark=rows.landmark.to_numpy())
        both = now.merge(stays, on=columns[0], suffixes=("", "_past"))
        both = both[both["unitvisitnumber_past"] < both["unitvisitnumber"]]
        # Minutes from this admission to the earlier discharge: both clocks know the hospital's.
        shift = both["hospitaladmitoffset"] - both["hospitaladmitoffset_past"]
        left = both["unitdischargeoffset_past"] + shift
        both, left = both[left <= both["landmark"]], left[left <= both["landmark"]]
        return pd.DataFrame(
            {
                "row": both["row"],
                "id": both["patientunitstayid_past"],
                "time": (left - both["landmark"]) / 1440,
                "length_of_stay": both["unitdischargeoffset_past"] / 1440,
            }
        )

    def texts(self, rows, hidden):
        """See `Source.texts`."""
        tables = [name for name in TEXTS if self.tables.has(name) and name not in hidden]
        if not tables:
            return {}
        parts = []
        for number, name in enumerate(tables):
            part = self._phrases(name)
            parts.append(part.assign(table=number))
        long = pd.concat(parts, ignore_index=True)
        long = long.sort_values(["row", "time", "table", "phrase"], kind="stable")
        # Charting copies forward: a phrase that is charted again tells of the charting.
        long = long.drop_duplicates(["row", "phrase"])
        words = pa.array(long["phrase"].to_numpy(), pa.string())
        text = join_texts(long["row"].to_numpy(), words, ". ").reindex(range(rows.n))
        return {"note": text.astype(object).where(text.notna(), None).to_numpy()}

    def _phrases(self, table):
        """Row, first time and phrase of what was entered by the landmark, from one table."""
        path, time, entered = TEXTS[table]
        known = time if entered is None else _late(time, entered)
        found = self.tables.query(f"""
            SELECT k.row AS row, MIN(e.time) AS time, e.path AS path
            FROM (SELECT patientunitstayid AS key, {time} AS time, {known} AS known, {path} AS path
                  FROM {self.tables.table(table)} t) e
            JOIN keys k ON e.key = k.key
            WHERE e.path IS NOT NULL AND e.known <= k.landmark AND e.time <= k.landmark
            GROUP BY k.row, e.path ORDER BY 1, 2, 3""")
        path = found["path"].combine_chunks().dictionary_encode()
        words = path.dictionary.to_pandas().astype(object)
        steps = words.str.replace("|", "/", regex=False).str.split("/")
        # The last two steps say what was found where ("Motor Score/6"); the earlier are the menu.
        phrase = (steps if table in _WHOLE else steps.str[-2:]).str.join(" ")
        phrase = phrase.where(~words.str.contains(_FORM))
        cells = phrase.to_numpy(dtype=object)[path.indices.to_numpy()]
        frame = pd.DataFrame(
            {"row": found["row"].to_numpy(), "time": found["time"].to_numpy(), "phrase": cells}
        )
        return frame.dropna(subset="phrase")


def _late(time, entered):
    """SQL of when a row was known: entered, and not before its own time."""
    return f"GREATEST({time}, COALESCE({entered}, {time}))"


def age(text):
    """Years; ``> 89`` is 90."""
    years = text.astype(object).replace("> 89", str(OLDEST))
    return pd.to_numeric(years, errors="coerce").clip(upper=OLDEST)


def first_code(codes):
    """The first of ``401.9, I10``, without its point, as MIMIC writes it."""
    return codes.str.split(",").str[0].str.strip().str.replace(".", "", regex=False)
