"""What MIMIC-III and MIMIC-IV share: clocks, stays, codes, laboratory, drugs and notes.

MIMIC's clocks (time stamps are shifted per patient, consistently):

* a result or an entry counts when it was *stored* (``storetime``; where there is none,
  ``charttime``), and not before it was charted;
* diagnoses, procedures, DRG codes and discharge fields count from the discharge of their admission,
  because coders work afterwards;
* what has a date only counts from the end of that day;
* rows are placed by patient and time, so that those without ``hadm_id`` are placed too.
"""

import numpy as np
import pandas as pd

from ehrfuse.datasets import vocabulary
from ehrfuse.datasets._cohort import Source, read_texts, visits

PLANNED = ("ELECTIVE", "SURGICAL SAME DAY ADMISSION")
OLDEST = 90  # stands for all ages above 89
RACES = {
    "WHITE": "white", "PORTUGUESE": "white", "CAUCASIAN": "white", "BLACK": "black",
    "AFRICAN AMERICAN": "black", "ASIAN": "asian", "HISPANIC": "hispanic",
    "SOUTH AMERICAN": "hispanic", "AMERICAN INDIAN": "native", "NATIVE": "native",
    "PACIFIC": "native",
}  # fmt: skip
UNKNOWN = ("UNKNOWN", "UNABLE TO OBTAIN", "DECLINED", "NOT SPECIFIED", "PATIENT DECLINED")
DEMOGRAPHICS = ["age", "sex", "race", "height", "weight"]
HEIGHT, WEIGHT = (100, 250), (20, 400)  # cm, kg: outside are inches, pounds, slips of the pen

COMMON = """
patients: subject_id BIGINT, gender VARCHAR, anchor_age DOUBLE?, anchor_year BIGINT?, \
anchor_year_group VARCHAR?, dob TIMESTAMP?, dod TIMESTAMP?
admissions: subject_id BIGINT, hadm_id BIGINT, admittime TIMESTAMP, dischtime TIMESTAMP, \
deathtime TIMESTAMP?, admission_type VARCHAR?, admission_location VARCHAR?, \
discharge_location VARCHAR?, insurance VARCHAR?, language VARCHAR?, marital_status VARCHAR?, \
race|ethnicity VARCHAR?, edregtime TIMESTAMP?, edouttime TIMESTAMP?, hospital_expire_flag BIGINT?
icustays: subject_id BIGINT, hadm_id BIGINT, stay_id|icustay_id BIGINT, first_careunit VARCHAR?, \
intime TIMESTAMP, outtime TIMESTAMP?
labevents: subject_id BIGINT, itemid BIGINT, charttime TIMESTAMP, storetime TIMESTAMP?, \
valuenum DOUBLE, valueuom VARCHAR?
chartevents: subject_id BIGINT, itemid BIGINT, charttime TIMESTAMP, storetime TIMESTAMP?, \
valuenum DOUBLE, valueuom VARCHAR?, error BIGINT?
outputevents: subject_id BIGINT, itemid BIGINT, charttime TIMESTAMP, storetime TIMESTAMP?, \
value DOUBLE, valueuom VARCHAR?
prescriptions: subject_id BIGINT, starttime|startdate TIMESTAMP, drug VARCHAR
diagnoses_icd: hadm_id BIGINT, seq_num BIGINT?, icd_code|icd9_code VARCHAR, icd_version BIGINT?
procedures_icd: hadm_id BIGINT, seq_num BIGINT?, icd_code|icd9_code VARCHAR, icd_version BIGINT?
drgcodes: hadm_id BIGINT, drg_type VARCHAR, drg_code VARCHAR
"""


class Mimic(Source):
    """The two MIMIC databases; a subclass names what only one of them has."""

    units = ("icu", "admission", "discharge", "ed")

    def __init__(self, tables):
        super().__init__(tables)
        tables.require("patients", "admissions")
        self.patients = self._unique("patients", ["subject_id"])
        admissions = self._unique("admissions", ["hadm_id"])
        self.admissions = admissions.sort_values(
            ["subject_id", "admittime", "hadm_id"], ignore_index=True
        )
        self.stays = None
        if tables.has("icustays"):
            stays = self._unique("icustays", ["stay_id"])
            self.stays = stays.sort_values(["subject_id", "intime", "stay_id"], ignore_index=True)

    def _unique(self, table, key):
        """A small table whose key may not repeat, unless the rows are the same."""
        frame = self.tables.query(f"SELECT DISTINCT * FROM {self.tables.table(table)} t")
        frame = frame.to_pandas().dropna(subset=key)
        twice = frame[key[0]].duplicated().sum()
        if twice:
            raise ValueError(
                f"Table {table!r} has {twice} keys {key[0]!r} with contradicting rows; "
                "a key must be unique: check the export."
            )
        return frame

    # ------------------------------------------------------------ who could be predicted

    def candidates(self, unit, codes=False):
        """See `Source.candidates`."""
        if unit == "icu" and self.stays is None:
            raise self._no_stays()
        hospital = self._hospital()
        frame = {"icu": self._icu, "ed": self._arrivals}.get(unit, self._admitted)(hospital, unit)
        hours = _hours_after(frame["start"])
        out = pd.DataFrame(
            {
                "key": frame["subject_id"],
                "start": frame["start"],
                "since": frame["since"],
                "subject": frame["subject_id"],
                "admission": frame["hadm_id"],
                "stay": frame["stay_id"],
                "age": self._age(frame),
                "hospital_in": hours(frame["admittime"]),
                "hospital_out": hours(frame["dischtime"]),
                "icu_in": hours(frame["intime"]),
                "icu_out": hours(frame["outtime"]),
                "death": hours(frame["death"]),
                "died_in_hospital": frame["died"],
                "died_in_icu": self._died_in_icu(frame),
                "later_icu": hours(frame["later"]),
                "next_admission": hours(frame["next_admission"]),
                "next_unplanned": hours(frame["next_unplanned"]),
                "next_icu": hours(frame["next_icu"]),
                "number": frame.groupby("subject_id").cumcount() + 1,
                "race": frame["race"],
            }
        )
        if "ed_stay" in frame:
            out["stay"] = frame["ed_stay"]
        if codes:
            out["codes"] = self._codes_of(out["admission"])
        return out

    def _no_stays(self):
        return FileNotFoundError(
            "Rows are intensive-care stays, but the table icustays is not in the folder; give the "
            "module icu too, or a task of another unit."
        )

    def _hospital(self):
        """Admissions with what happened around them."""
        adm = self.admissions.copy()
        known = adm["hospital_expire_flag"].astype("float64")
        adm["died"] = known.fillna(adm["deathtime"].notna().astype(float))
        ends = self.patients.set_index("subject_id")["dod"] + pd.Timedelta(days=1)
        registered = adm["subject_id"].map(ends)  # a date: some time before the end of that day
        died = adm["deathtime"].fillna(adm["dischtime"].where(adm["died"] == 1))
        # Nobody dies in hospital after leaving it: a later time of death is a slip of the clock.
        late = (adm["died"] == 1) & (died > adm["dischtime"])
        died = died.mask(late, adm["dischtime"])
        adm["death"] = died.fillna(registered)
        adm["since"] = adm[["admittime", "edregtime"]].min(axis=1)
        coming = adm[["subject_id", "admittime"]]
        adm["next_admission"] = _next(adm, coming)
        adm["next_unplanned"] = _next(adm, coming[~adm["admission_type"].isin(PLANNED)])
        adm["next_icu"] = pd.NaT
        if self.stays is not None:
            arrivals = self.stays[["subject_id", "intime"]].rename(columns={"intime": "admittime"})
            adm["next_icu"] = _next(adm, arrivals)
        return adm

    def _first_stays(self):
        columns = ["hadm_id", "stay_id", "intime", "outtime", "first_careunit", "later"]
        if self.stays is None:
            empty = pd.DataFrame(columns=columns)
            times = dict.fromkeys(("intime", "outtime", "later"), "datetime64[us]")
            return empty.astype({"hadm_id": "int64", "stay_id": "float64"} | times)
        stays = self.stays.copy()
        stays["later"] = stays.groupby("hadm_id")["intime"].shift(-1)
        return stays[columns]

    def _icu(self, hospital, unit):
        frame = self._first_stays().merge(hospital, on="hadm_id", how="inner", validate="m:1")
        frame = frame.sort_values(["subject_id", "intime", "stay_id"], ignore_index=True)
        frame["since"] = frame[["since", "intime"]].min(axis=1)
        return frame.assign(start=frame["intime"])

    def _admitted(self, hospital, unit):
        first = self._first_stays().drop_duplicates("hadm_id")
        frame = hospital.merge(first, on="hadm_id", how="left", validate="1:1")
        start = frame["admittime" if unit == "admission" else "dischtime"]
        frame = frame.assign(start=start).dropna(subset="start")
        return frame.sort_values(["subject_id", "start", "hadm_id"], ignore_index=True)

    def _arrivals(self, hospital, unit):
        """Arrivals at the emergency department that ended in an admission."""
        self.remarks.append(
            "Emergency arrivals are those of the admissions table: visits that ended at home are "
            "only in the module 'ed', which is absent."
        )
        frame = self._admitted(hospital[hospital["edregtime"].notna()], "admission")
        frame = frame.assign(start=frame["edregtime"], since=frame["edregtime"])
        frame = frame.sort_values(["subject_id", "start", "hadm_id"], ignore_index=True)
        # The record of the admission that follows is not yet there: take the one before.
        return frame.assign(race=frame.groupby("subject_id")["race"].shift(1))

    def _died_in_icu(self, frame):
        died = (frame["died"] == 1) & (frame["death"] <= frame["outtime"])
        return died.astype(float).where(frame["died"].notna() & frame["intime"].notna())

    def _age(self, frame):
        raise NotImplementedError

    # ------------------------------------------------------------ codes

    def _code_sql(self, table):
        if table == "drgcodes":
            word = "UPPER(t.drg_type) || ':' || t.drg_code"
            return word, "t.drg_type, t.drg_code"
        return self.icd("t"), "t.seq_num, t.icd_code"

    def icd(self, t):
        """SQL of a diagnosis or procedure code with the edition before it."""
        edition = f"COALESCE({t}.icd_version, 9)"
        return f"'ICD' || CAST({edition} AS VARCHAR) || ':' || TRIM({t}.icd_code)"

    def _codes(self, table, admissions):
        """Admissions and codes of a coding table, sorted."""
        self.tables.register("wanted", pd.DataFrame({"hadm_id": np.unique(admissions)}))
        word, order = self._code_sql(table)
        found = self.tables.query(f"""
            SELECT t.hadm_id AS hadm_id, {word} AS code
            FROM {self.tables.table(table)} t JOIN wanted w ON t.hadm_id = w.hadm_id
            WHERE {word} IS NOT NULL
            ORDER BY t.hadm_id, {order}""")
        return found["hadm_id"].to_numpy(), found["code"].combine_chunks()

    def _codes_of(self, admissions):
        self.tables.require("diagnoses_icd")
        known = admissions.dropna().astype("int64")
        ids, words = self._codes("diagnoses_icd", known)
        lists = pd.Series(words.to_pylist(), dtype=object).groupby(ids).agg(list)
        found = admissions.map(lists)
        return found.map(lambda codes: codes if isinstance(codes, list) else [])

    # ------------------------------------------------------------ inputs

    def static(self, rows):
        """See `Source.static`."""
        frame = rows.frame
        adm = self.admissions.set_index("hadm_id").reindex(frame["admission"]).reset_index()
        people = self.patients.set_index("subject_id").reindex(frame["subject"]).reset_index()
        # A number that the future gives (of an admission from the emergency department, of a later
        # intensive-care stay) would tell it by being there.
        numbers = {"subject_id": frame["subject"]}
        if rows.unit != "ed":
            numbers["hadm_id"] = frame["admission"].astype("int64")
        if rows.unit == "icu" or (self.tables.has("edstays") and rows.unit == "ed"):
            numbers["stay_id"] = frame["stay"].astype("int64")
        X = pd.DataFrame(
            numbers
            | {
                "age": frame["age"],
                "sex": people["gender"].map({"F": "female", "M": "male"}),
                "race": frame["race"].map(race),
            }
        )
        X["height"], X["weight"] = self._body(rows)
        columns = {
            "admission_type": adm["admission_type"],
            "admission_location": adm["admission_location"],
            "insurance": adm["insurance"],
            "language": adm["language"],
            "marital_status": adm["marital_status"],
        }
        if rows.unit == "ed":  # nobody is admitted yet
            columns = {}
        if rows.unit == "icu":
            units = self.stays.set_index("stay_id")["first_careunit"]
            columns["care_unit"] = frame["stay"].map(units)
            columns["hours_in_hospital"] = -frame["hospital_in"]
        if rows.unit == "discharge":
            columns["discharge_location"] = adm["discharge_location"]
            columns["days_in_hospital"] = -frame["hospital_in"] / 24
        X = X.assign(**{name: column.to_numpy() for name, column in columns.items()})
        modalities = {"demographics": {"kind": "Tabular", "columns": DEMOGRAPHICS}}
        if columns:
            modalities["admission"] = {"kind": "Tabular", "columns": list(columns)}
        return X, modalities

    def _body(self, rows):
        """Latest height (cm) and weight (kg) of `body_facts` by the landmark."""
        parts = self.body_facts()
        if not parts:
            return np.full(rows.n, np.nan), np.full(rows.n, np.nan)
        table = self.tables.query(f"""
            SELECT k.row AS row, e.item AS item, e.time AS time, e.value AS value
            FROM ({" UNION ALL ".join(parts)}) e JOIN keys k ON e.key = k.key
            WHERE e.time <= k.landmark AND e.known <= k.landmark AND e.value IS NOT NULL
            ORDER BY 1, 2, 3, 4""").to_pandas()
        table = table[
            ((table["item"] == "height") & table["value"].between(*HEIGHT))
            | ((table["item"] == "weight") & table["value"].between(*WEIGHT))
        ]
        latest = table.groupby(["item", "row"])["value"].last()
        none = pd.Series(dtype="float64")
        return tuple(
            (latest[item] if item in latest.index.get_level_values(0) else none)
            .reindex(range(rows.n))
            .to_numpy()
            for item in ("height", "weight")
        )

    def body_facts(self):
        """Queries of key, time, known, item ('height', 'weight') and value in cm and kg.

        They add to what is charted (`measured`), and may be older than the stay.
        """
        return []

    def measured(self):
        """See `Source.measured`."""
        parts = []
        for table, kind, value, more in (
            ("labevents", "mimic", "valuenum", ""),
            ("chartevents", "charted", "valuenum", "WHERE COALESCE(t.error, 0) = 0"),
            ("outputevents", "charted", "value", ""),
        ):
            if self.tables.has(table):
                facts = f"""(SELECT subject_id AS key, charttime AS time, {stored("t")} AS known,
                    itemid AS item, {value} AS value, valueuom AS unit
                    FROM {self.tables.table(table)} t {more})"""
                items = vocabulary.items_of(kind)
                urine = items["code"] == vocabulary.NAMES.index("urine")
                if kind == "charted":
                    items = items[urine if table == "outputevents" else ~urine]
                parts.append((facts, items))
        return parts

    def history(self, rows):
        """See `Source.history`."""
        past = self._past(rows)
        codes = {}
        fields = {"diagnoses_icd": "diagnoses", "procedures_icd": "procedures", "drgcodes": "drg"}
        for table, field in fields.items():
            if self.tables.has(table):
                codes[field] = self._codes(table, past["id"])
        numbers = ["length_of_stay", "emergency"]
        if self.stays is not None:
            numbers.append("icu_stays")
        return visits(rows, past, codes, numbers)

    def _past(self, rows):
        """A line per row and admission that had ended by the landmark, never the row's own.

        A discharge may be recorded before the patient leaves the unit; only a row that stands for
        the discharge itself sees the codes of its own admission.
        """
        adm = self.admissions.rename(columns={"hadm_id": "id"})
        keys = rows.keys[["row", "key", "landmark"]]
        past = keys.merge(adm, left_on="key", right_on="subject_id")
        past = past[past["dischtime"] <= past["landmark"]].copy()
        if rows.unit != "discharge":
            own = rows.frame["admission"].to_numpy()[past["row"]]
            past = past[past["id"].to_numpy() != own].copy()
        day = pd.Timedelta(days=1)
        past["time"] = (past["dischtime"] - past["landmark"]) / day
        past["length_of_stay"] = (past["dischtime"] - past["admittime"]) / day
        unplanned = ~past["admission_type"].isin(PLANNED)
        past["emergency"] = unplanned.astype(float).where(past["admission_type"].notna())
        if self.stays is not None:
            past["icu_stays"] = past["id"].map(self.stays.groupby("hadm_id").size()).fillna(0)
        return past


def stored(t):
    """SQL of when a row was known: stored, and not before it was charted."""
    return f"GREATEST({t}.charttime, COALESCE({t}.storetime, {t}.charttime))"


def dated(column):
    """SQL of the end of a day."""
    return f"(CAST(CAST({column} AS DATE) AS TIMESTAMP) + INTERVAL 1 DAY)"


def race(text):
    """One of white, black, asian, hispanic, native, other; None where it was not told."""
    if not isinstance(text, str) or any(word in text.upper() for word in UNKNOWN):
        return None
    return next((group for word, group in RACES.items() if word in text.upper()), "other")


def note_text(source, rows, facts):
    """Texts of a query, one cell a row."""
    return read_texts(source, facts).reindex(range(rows.n))


def _hours_after(start):
    def hours(times):
        return (times - start) / pd.Timedelta(hours=1)

    return hours


def _next(admissions, arrivals):
    """The first of some arrivals of the patient after each discharge."""
    left = admissions[["subject_id", "dischtime"]].reset_index().dropna(subset="dischtime")
    found = pd.merge_asof(
        left.sort_values(["dischtime", "index"]),
        arrivals.dropna().sort_values("admittime"),
        left_on="dischtime",
        right_on="admittime",
        by="subject_id",
        direction="forward",
        allow_exact_matches=False,
    )
    return found.set_index("index")["admittime"].reindex(admissions.index)
