"""MEDS: a long table of coded events, whatever the hospital it comes from."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ehrfuse.datasets import vocabulary
from ehrfuse.datasets._cohort import build, read_texts, visits
from ehrfuse.datasets._mimic import DEMOGRAPHICS, OLDEST, Mimic, race
from ehrfuse.datasets._tables import Tables

SCHEMA = """
data: subject_id BIGINT, time TIMESTAMP, code VARCHAR, numeric_value DOUBLE, text_value VARCHAR?
"""
ABOUT = """Medical Event Data Standard (https://medical-event-data-standard.github.io). The data are
under the licence of their release."""

# What the codes of an export start with; those of MIMIC-IV as MEDS.
CODES = {
    "admission": "HOSPITAL_ADMISSION",
    "discharge": "HOSPITAL_DISCHARGE",
    "icu_in": "ICU_ADMISSION",
    "icu_out": "ICU_DISCHARGE",
    "ed_in": "ED_REGISTRATION",
    "birth": "MEDS_BIRTH",
    "death": "MEDS_DEATH",
    "died": "HOSPITAL_DISCHARGE//DIED",
    "elective": "HOSPITAL_ADMISSION//ELECTIVE",
    "sex": "GENDER",
    "race": "RACE",
    "measured": "LAB",
    "outputs": "SUBJECT_FLUID_OUTPUT",
    "drugs": "MEDICATION",
    "diagnoses": "DIAGNOSIS",
    "procedures": "PROCEDURE",
    "drg": "DRG",
}
_BODY = {"Height (Inches)": ("height", 2.54), "Weight (Lbs)": ("weight", 0.45359237)}


def load_meds(
    root,
    task="in_hospital_mortality",
    *,
    codes=None,
    labs="events",
    cache=None,
    memory_limit="512MB",
    threads=None,
):
    """Build a data set from a MEDS export.

    Parameters
    ----------
    root : str or Path
        Folder with ``data/`` and Parquet files below it, of MEDS 0.3 or 0.4; ``text_value`` is read
        where there is one.
    task : str, Task or list of these, default="in_hospital_mortality"
        As in `load_mimic4`.
    codes : dict of str to str, default=None
        What the codes start with, where the export has others than MIMIC-IV's: any of
        ``admission, discharge, icu_in, icu_out, ed_in, birth, death, died, elective, sex, race,
        measured, outputs, drugs, diagnoses, procedures, drg``.
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
        As `load_mimic4` gives it. Panels are read from codes ``LAB//item//unit`` whose items are
        MIMIC's.

    Raises
    ------
    ImportError
        If DuckDB (extra ``cohort``) is not installed.
    FileNotFoundError
        If there are no Parquet files below ``data/``.
    ValueError
        If the export has no admissions, or columns are absent.

    See Also
    --------
    load_mimic4 : The same columns from the raw tables, with times of storage.

    Notes
    -----
    MEDS has one time per event and none of storage: an event counts from its time. Discharge codes
    of MIMIC-IV as MEDS are timed at the discharge. An admission ends with the first discharge after
    it.

    Examples
    --------
    >>> from ehrfuse.datasets import load_meds
    >>> data = load_meds("mimic-iv-demo-meds", task="readmission_30d")  # doctest: +SKIP
    """
    unknown = set(codes or {}) - set(CODES)
    if unknown:
        raise ValueError(f"codes has keys {sorted(unknown)}; known are {', '.join(CODES)}.")
    with MedsTables(root, SCHEMA, memory_limit, threads) as tables:
        return build(Meds(tables, CODES | (codes or {})), task, labs, cache)


class MedsTables(Tables):
    """All shards below ``data/`` as one table."""

    def __init__(self, root, schema, memory_limit, threads):
        folder = Path(root)
        shards = sorted((folder / "data").rglob("*.parquet"))
        if not shards:
            raise FileNotFoundError(
                f"There are no Parquet files below {str(folder / 'data')!r}; give the folder of a "
                "MEDS export."
            )
        super().__init__(folder, schema, memory_limit, threads)
        self.files = {"data": shards}
        self.headers = {"data": [name.lower() for name in pq.read_schema(shards[0]).names]}

    def _place(self, table):
        return str(self.files[table][0])

    def _source(self, name):
        paths = ", ".join("'" + str(path).replace("'", "''") + "'" for path in self.files[name])
        return f"read_parquet([{paths}], union_by_name = true)"


class Meds(Mimic):
    """A MEDS export; the stays are put together from their events.

    Parameters
    ----------
    tables : Tables
    codes : dict of str to str
    """

    about = ABOUT

    def __init__(self, tables, codes):
        self.tables, self.remarks, self.codes = tables, [], codes
        self.data = tables.table("data")
        starts = ("admission", "discharge", "icu_in", "icu_out", "ed_in", "birth", "death", "sex",
                  "race")  # fmt: skip
        rule = " OR ".join(self._starts(codes[kind]) for kind in starts)
        found = tables.query(
            f"SELECT DISTINCT subject_id, time, code FROM {self.data} t WHERE {rule} "
            "ORDER BY 1, 2, 3"
        ).to_pandas()
        self.found = found
        self.patients = self._people()
        self.admissions = self._hospital_stays()
        if not len(self.admissions):
            raise ValueError(
                f"No event has a code that starts with {codes['admission']!r}; name the code of "
                "admissions, e.g. codes={'admission': 'VISIT'}."
            )
        stays = self._spans("icu_in", "icu_out", "intime", "outtime")
        self.stays = self._within(stays) if len(stays) else None

    def options(self):
        """See `Source.options`."""
        return tuple(sorted(self.codes.items()))

    def missing(self):
        """See `Source.missing`."""
        return [] if self.tables.has("data", "text_value") else ["text_value"]

    def _no_stays(self):
        return ValueError(
            f"Rows are intensive-care stays, but no event has a code that starts with "
            f"{self.codes['icu_in']!r}; name the code, e.g. codes={{'icu_in': 'ICU'}}."
        )

    def _starts(self, prefix):
        quoted = prefix.replace("'", "''")
        return f"(code = '{quoted}' OR code LIKE '{quoted}//%')"

    def _of(self, kind):
        """Events whose code is, or starts with, that of a kind; with the rest of the code."""
        prefix = self.codes[kind]
        code = self.found["code"]
        events = self.found[(code == prefix) | code.str.startswith(f"{prefix}//")].copy()
        events["rest"] = events["code"].str[len(prefix) + 2 :]
        return events

    def _people(self):
        def one(kind, column):
            return self._of(kind).drop_duplicates("subject_id").set_index("subject_id")[column]

        people = pd.DataFrame(index=np.sort(self.found["subject_id"].unique()))
        people["gender"] = one("sex", "rest").str[:1].str.upper()
        people["race"] = one("race", "rest")
        people["dob"] = one("birth", "time")
        death = one("death", "time")  # a date is some time before the end of that day
        people["dod"] = death.where(death != death.dt.normalize(), death + pd.Timedelta(days=1))
        return people.rename_axis("subject_id").reset_index()

    def _spans(self, begin, end, start, stop):
        """Stays from their first and last events, each with the first end after its beginning."""
        first = self._of(begin).dropna(subset="time").sort_values("time", kind="stable")
        last = self._of(end).dropna(subset="time").sort_values("time", kind="stable")
        last = last.drop_duplicates(["subject_id", "time"])
        spans = pd.merge_asof(
            first.rename(columns={"time": start, "rest": "kind"}),
            last[["subject_id", "time", "code"]].rename(columns={"time": stop, "code": "how"}),
            left_on=start, right_on=stop, by="subject_id", direction="forward",
        )  # fmt: skip
        spans = spans.sort_values(["subject_id", start], ignore_index=True)
        return spans.drop_duplicates(["subject_id", start], ignore_index=True)

    def _hospital_stays(self):
        adm = self._spans("admission", "discharge", "admittime", "dischtime")
        if not len(adm):
            return adm
        arrivals = self._of("ed_in").dropna(subset="time").sort_values("time")
        arrivals = arrivals[["subject_id", "time"]].rename(columns={"time": "edregtime"})
        adm = pd.merge_asof(
            adm.sort_values("admittime"), arrivals, left_on="admittime", right_on="edregtime",
            by="subject_id", direction="backward", tolerance=pd.Timedelta(days=2),
        ).sort_values(["subject_id", "admittime"], ignore_index=True)  # fmt: skip
        adm["hadm_id"] = np.arange(len(adm))
        death = adm["subject_id"].map(self.patients.set_index("subject_id")["dod"])
        inside = (death >= adm["admittime"]) & (death <= adm["dischtime"])
        died = (adm["how"] == self.codes["died"]) | inside
        adm["deathtime"] = pd.concat([death, adm["dischtime"]], axis=1).min(axis=1).where(died)
        adm["hospital_expire_flag"] = died.astype(float).where(adm["dischtime"].notna())
        elective = adm["code"].str.startswith(self.codes["elective"])
        adm["admission_type"] = np.where(elective, "ELECTIVE", adm["kind"].replace("", None))
        adm["race"] = adm["subject_id"].map(self.patients.set_index("subject_id")["race"])
        return adm

    def _within(self, stays):
        """Stays with the admission that they lie in."""
        adm = self.admissions[["subject_id", "admittime", "hadm_id"]]
        found = pd.merge_asof(
            stays.sort_values("intime"),
            adm.sort_values("admittime"),
            left_on="intime", right_on="admittime", by="subject_id", direction="backward",
        )  # fmt: skip
        found = found.dropna(subset="hadm_id").astype({"hadm_id": "int64"})
        found = found.sort_values(["subject_id", "intime"], ignore_index=True)
        found["stay_id"] = np.arange(len(found))
        return found.rename(columns={"kind": "first_careunit"})

    def _hospital(self):
        adm = super()._hospital()
        # The day of a death is its time here, not a date.
        adm["death"] = (
            adm["subject_id"]
            .map(self.patients.set_index("subject_id")["dod"])
            .fillna(adm["dischtime"].where(adm["died"] == 1))
        )
        late = (adm["died"] == 1) & (adm["death"] > adm["dischtime"])
        adm["death"] = adm["death"].mask(late, adm["dischtime"])
        return adm

    def _age(self, frame):
        born = self.patients.set_index("subject_id")["dob"].reindex(frame["subject_id"])
        days = (frame["start"] - pd.Series(born.to_numpy(), frame.index)).dt.days
        return np.minimum((days / 365.2425).to_numpy(), OLDEST)

    # ------------------------------------------------------------ codes

    def _codes(self, kind, admissions):
        """Codes of a kind, by the admission at whose end, or within which, they stand."""
        spans = self.admissions[["subject_id", "hadm_id", "admittime", "dischtime"]]
        self.tables.register("spans", spans[spans["hadm_id"].isin(np.unique(admissions))])
        prefix = len(self.codes[kind]) + 3
        found = self.tables.query(f"""
            SELECT DISTINCT s.hadm_id AS hadm_id, SUBSTRING(t.code, {prefix}) AS code
            FROM {self.data} t JOIN spans s ON t.subject_id = s.subject_id
            WHERE {self._starts(self.codes[kind])}
              AND t.time > s.admittime AND t.time <= s.dischtime
            ORDER BY 1, 2""")
        # ICD//10//I10 as the other sources write it.
        words = pc.replace_substring_regex(
            found["code"].combine_chunks(), r"^ICD//(\d+)//", r"ICD\1:"
        )
        return found["hadm_id"].to_numpy(), words

    def _codes_of(self, admissions):
        ids, words = self._codes("diagnoses", admissions.dropna().astype("int64"))
        lists = pd.Series(words.to_pylist(), dtype=object).groupby(ids).agg(list)
        found = admissions.map(lists)
        return found.map(lambda codes: codes if isinstance(codes, list) else [])

    # ------------------------------------------------------------ inputs

    def static(self, rows):
        """See `Source.static`."""
        frame = rows.frame
        people = self.patients.set_index("subject_id").reindex(frame["subject"]).reset_index()
        X = pd.DataFrame(
            {
                "subject_id": frame["subject"],
                "age": frame["age"],
                "sex": people["gender"].map({"F": "female", "M": "male"}),
                "race": people["race"].map(race),
            }
        )
        X["height"], X["weight"] = self._body(rows)
        X["admission_type"] = (
            self.admissions.set_index("hadm_id")["admission_type"]
            .reindex(frame["admission"])
            .to_numpy(dtype=object)
        )
        admission = ["admission_type"]
        if rows.unit == "icu":
            X["care_unit"] = frame["stay"].map(self.stays.set_index("stay_id")["first_careunit"])
            X["hours_in_hospital"] = -frame["hospital_in"]
            admission += ["care_unit", "hours_in_hospital"]
        modalities = {"demographics": {"kind": "Tabular", "columns": DEMOGRAPHICS}}
        if rows.unit == "ed":
            return X.drop(columns="admission_type"), modalities
        return X, modalities | {"admission": {"kind": "Tabular", "columns": admission}}

    def body_facts(self):
        """See `Mimic.body_facts`."""
        names = ", ".join(f"'{name}'" for name in _BODY)
        item = " ".join(f"WHEN '{name}' THEN '{what}'" for name, (what, _) in _BODY.items())
        factor = " ".join(f"WHEN '{name}' THEN {f}" for name, (_, f) in _BODY.items())
        value = f"numeric_value * CASE code {factor} END"
        return [
            f"""
            SELECT subject_id AS key, time, time AS known, CASE code {item} END AS item,
                   {value} AS value FROM {self.data} t WHERE code IN ({names})"""
        ]

    def measured(self):
        """See `Source.measured`."""
        items = pd.concat(
            [vocabulary.items_of("mimic"), vocabulary.items_of("charted")], ignore_index=True
        )
        urine = items["code"] == vocabulary.NAMES.index("urine")
        return [
            (self._coded(self.codes["measured"]), items[~urine]),
            (self._coded(self.codes["outputs"]), items[urine]),
        ]

    def _coded(self, prefix):
        """Facts of codes ``PREFIX//item//unit``."""
        rest = f"SUBSTRING(code, {len(prefix) + 3})"
        return f"""(SELECT subject_id AS key, time, time AS known,
            TRY_CAST(SPLIT_PART({rest}, '//', 1) AS BIGINT) AS item, numeric_value AS value,
            SPLIT_PART({rest}, '//', 2) AS unit FROM {self.data} t WHERE {self._starts(prefix)})"""

    def drugs(self):
        """See `Source.drugs`."""
        prefix = self.codes["drugs"]
        return f"""(SELECT subject_id AS key, time, time AS known,
            LOWER(TRIM(SUBSTRING(code, {len(prefix) + 3}))) AS name
            FROM {self.data} t WHERE {self._starts(prefix)})"""

    def history(self, rows):
        """See `Source.history`."""
        past = self._past(rows)
        kinds = ("diagnoses", "procedures", "drg")
        codes = {kind: self._codes(kind, past["id"]) for kind in kinds}
        numbers = ["length_of_stay", "emergency"] + ["icu_stays"] * (self.stays is not None)
        return visits(rows, past, codes, numbers)

    def texts(self, rows, hidden):
        """See `Source.texts`."""
        if not self.tables.has("data", "text_value"):
            return {}
        facts = f"""(SELECT subject_id AS key, time, time AS known, text_value AS text
            FROM {self.data} t WHERE LENGTH(text_value) > 0)"""
        text = read_texts(self, facts).reindex(range(rows.n))
        return {"notes": text.astype(object).to_numpy()}
