"""MIMIC-IV with its modules hosp, icu, note, ed and the films of MIMIC-CXR."""

import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from ehrfuse.datasets import vocabulary
from ehrfuse.datasets._cohort import build, melted, read_texts
from ehrfuse.datasets._mimic import COMMON, OLDEST, Mimic, dated, note_text, stored
from ehrfuse.datasets._tables import Tables

SCHEMA = (
    COMMON
    + """
omr: subject_id BIGINT, chartdate TIMESTAMP, result_name VARCHAR, result_value VARCHAR
discharge: subject_id BIGINT, hadm_id BIGINT?, charttime TIMESTAMP, text VARCHAR
radiology: subject_id BIGINT, charttime TIMESTAMP, storetime TIMESTAMP?, text VARCHAR
edstays: subject_id BIGINT, hadm_id BIGINT?, stay_id BIGINT, intime TIMESTAMP, outtime TIMESTAMP, \
disposition VARCHAR?, race VARCHAR?
triage: stay_id BIGINT, temperature DOUBLE?, heartrate DOUBLE?, resprate DOUBLE?, o2sat DOUBLE?, \
sbp DOUBLE?, dbp DOUBLE?, acuity DOUBLE?, chiefcomplaint VARCHAR?
vitalsign: subject_id BIGINT, charttime TIMESTAMP, temperature DOUBLE?, heartrate DOUBLE?, \
resprate DOUBLE?, o2sat DOUBLE?, sbp DOUBLE?, dbp DOUBLE?
cxr_metadata: subject_id BIGINT, study_id BIGINT, dicom_id VARCHAR, viewposition VARCHAR?, \
studydate BIGINT, studytime DOUBLE
"""
)
ABOUT = """MIMIC-IV (https://physionet.org/content/mimiciv/). The data are under the licence of
their release (full: PhysioNet Credentialed Health Data License; demo: Open Database License 1.0).
Please cite Johnson AEW et al., Scientific Data 2023;10:1, and Goldberger AL et al., Circulation
2000;101:e215-e220."""
VITALS = {  # columns of the emergency department
    "heartrate": "heart_rate", "resprate": "respiratory_rate", "o2sat": "spo2",
    "sbp": "systolic_bp", "dbp": "diastolic_bp", "temperature": "temperature",
}  # fmt: skip
TRIAGE = ["temperature", "heartrate", "resprate", "o2sat", "sbp", "dbp", "acuity"]
FRONTAL = ("PA", "AP")


def load_mimic4(
    root,
    task="in_hospital_mortality",
    *,
    labs="events",
    image_embeddings=None,
    cache=None,
    memory_limit="512MB",
    threads=None,
):
    """Build a data set from a folder of MIMIC-IV.

    Parameters
    ----------
    root : str, Path, list of these, or an Ibis connection
        Folders of MIMIC-IV and, below it or beside it in the list, of MIMIC-IV-Note, MIMIC-IV-ED
        and MIMIC-CXR-JPG, as released (``.csv.gz``), unpacked (``.csv``) or as Parquet. Layouts
        1.0 to 3.1. What is absent is left out and listed. A connection reads the same tables in a
        warehouse (extra ``warehouse``).
    task : str, Task or list of these, default="in_hospital_mortality"
        One of the ready tasks by name, with its defaults, or made by its function with others;
        several that share unit and hours become several columns of y.
    labs : {"events", "values"}, default="events"
        Whether `modalities` reads laboratory panels as events, or the latest value of every
        analyte (for estimators that read `Labs`). X holds both.
    image_embeddings : path or DataFrame, default=None
        Vectors of films, with columns ``dicom_id`` and ``embedding``: the modality ``cxr`` is then
        an `Embedding` instead of an `Image`.
    cache : path, default=None
        Folder that keeps finished inputs, without texts, for the next call.
    memory_limit : str, default="512MB"
        What the query engine may hold; it spills to disk beyond it.
    threads : int, default=None
        Threads of the query engine; by default all cores, at most four. They do not change X.

    Returns
    -------
    data : :class:`~sklearn.utils.Bunch`
        With the attributes

        X : DataFrame of shape (n_rows, n_columns)
            ``subject_id``, ``hadm_id``, ``stay_id`` and ``anchor_year_group`` (never inputs;
            the last serves validation on later years), static columns, an events column per
            panel (hours before the prediction), ``lab_...`` columns with the latest value of every
            analyte, ``medications`` (events), ``history`` (earlier admissions, days), texts and
            films.
        y : Series, or DataFrame with one column per label
            NaN where a label is not defined.
        groups : int array of shape (n_rows,)
            Patient.
        modalities : dict of str to Modality
            Ready for any estimator. No variable stands in two of them.
        landmark : array of shape (n_rows,)
            Prediction times on the clock of the source; no input.
        flow : DataFrame
            Cohort flow: rows and patients left out and left after every step of every task.
        found, missing : list of str
            Tables that were read, and those that are absent.
        train : bool array of shape (n_rows,)
            Only for tasks that choose their labels, such as `phenotyping`: the rows that they were
            chosen on.
        description : str
            Source, licence and what was built.

    Raises
    ------
    ImportError
        If DuckDB (extra ``cohort``) is not installed.
    FileNotFoundError
        If the folder, or a table that the task needs, is not there.
    ValueError
        If a table is not what it should be: columns, types, keys, or a file cut short.

    See Also
    --------
    load_mimic3, load_eicu, load_meds : Other sources with the same columns.
    to_parquet : Convert once, read many times faster.

    Notes
    -----
    Nothing that was stored after the prediction time is read; see the page on cohorts for the
    clocks. A discharge summary counts as a document of the discharge: it is an input of tasks made
    at discharge if it is dated by the day of discharge, although it may be stored later.

    The same files give the same X, bit for bit, whatever the threads.

    Examples
    --------
    >>> from ehrfuse.datasets import load_mimic4, readmission_30d
    >>> data = load_mimic4("mimic-iv", task=readmission_30d(planned=False))  # doctest: +SKIP
    """
    with open_tables(root, SCHEMA, memory_limit, threads) as tables:
        return build(Mimic4(tables, image_embeddings), task, labs, cache)


def open_tables(root, schema, memory_limit, threads):
    """Tables of a folder, or of a warehouse if a connection is given."""
    if hasattr(root, "list_tables"):
        from ehrfuse.datasets._warehouse import Warehouse

        return Warehouse(root, schema)
    return Tables(root, schema, memory_limit, threads)


class Mimic4(Mimic):
    """MIMIC-IV.

    Parameters
    ----------
    tables : Tables
    image_embeddings : path, DataFrame or None
    """

    about = ABOUT

    def __init__(self, tables, image_embeddings=None):
        super().__init__(tables)
        self.embeddings = _read_embeddings(image_embeddings)

    def options(self):
        """See `Source.options`."""
        if self.embeddings is None:
            return ()
        known = self.embeddings.sort_index()
        digest = hashlib.blake2b(repr(known.index.tolist()).encode(), digest_size=16)
        digest.update(np.stack(known.to_numpy()).tobytes())
        return digest.hexdigest()

    def _age(self, frame):
        people = self.patients.set_index("subject_id").reindex(frame["subject_id"])
        years = frame["start"].dt.year.to_numpy() - people["anchor_year"].to_numpy(dtype=float)
        return np.minimum(people["anchor_age"].to_numpy() + years, OLDEST)

    def _arrivals(self, hospital, unit):
        if not self.tables.has("edstays"):
            return super()._arrivals(hospital, unit)
        ed = self._unique("edstays", ["stay_id"])
        ed = ed.rename(columns={"stay_id": "ed_stay", "intime": "start", "outtime": "left"})
        hospital = hospital.drop(columns=["since", "subject_id", "race"])
        frame = ed.merge(hospital, on="hadm_id", how="left", validate="m:1")
        first = self._first_stays().drop_duplicates("hadm_id")
        frame = frame.merge(first, on="hadm_id", how="left", validate="m:1")
        # Who went home: the visit is the stay, and its disposition tells whether it ended in death.
        home = frame["hadm_id"].isna()
        expired = (frame["disposition"].str.upper() == "EXPIRED").astype(float)
        frame["admittime"] = frame["admittime"].where(~home, frame["start"])
        frame["dischtime"] = frame["dischtime"].where(~home, frame["left"])
        frame["died"] = frame["died"].where(~home, expired)
        frame["death"] = frame["death"].where(~(home & (expired == 1)), frame["left"])
        frame["since"] = frame["start"]
        return frame.sort_values(["subject_id", "start", "ed_stay"], ignore_index=True)

    def static(self, rows):
        """See `Source.static`."""
        X, modalities = super().static(rows)
        groups = self.patients.set_index("subject_id")["anchor_year_group"]
        X.insert(1, "anchor_year_group", rows.frame["subject"].map(groups))
        if self.tables.has("edstays") and self.tables.has("triage"):
            triage = self._triage(rows)
            X = X.assign(**{f"triage_{name}": triage[name].to_numpy() for name in TRIAGE})
            columns = [f"triage_{name}" for name in TRIAGE]
            modalities["triage"] = {"kind": "Tabular", "columns": columns}
        return X, modalities

    def _triage(self, rows):
        """Triage of the emergency visit that the row is, or that led to its admission."""
        table = self.tables.query(f"""
            SELECT k.row AS row, s.intime AS intime, t.*
            FROM {self.tables.table("edstays")} s
            JOIN {self.tables.table("triage")} t ON s.stay_id = t.stay_id
            JOIN keys k ON k.key = s.subject_id
            WHERE k.since <= s.intime AND s.intime <= k.landmark
            ORDER BY k.row, s.intime, s.stay_id""").to_pandas()
        latest = table.drop_duplicates("row", keep="last").set_index("row")
        return latest.reindex(range(rows.n))

    def body_facts(self):
        """See `Mimic.body_facts`."""
        parts = super().body_facts()
        if self.tables.has("omr"):
            value = "TRY_CAST(result_value AS DOUBLE)"
            parts.append(f"""
                SELECT subject_id AS key, {dated("chartdate")} AS time,
                       {dated("chartdate")} AS known,
                       CASE WHEN result_name LIKE 'Height%' THEN 'height' ELSE 'weight' END AS item,
                       {value} * CASE WHEN result_name LIKE 'Height%' THEN 2.54
                                      ELSE 0.45359237 END AS value
                FROM {self.tables.table("omr")} t
                WHERE result_name IN ('Height (Inches)', 'Height', 'Weight (Lbs)', 'Weight')""")
        return parts

    def measured(self):
        """See `Source.measured`."""
        parts = super().measured()
        if self.tables.has("vitalsign"):
            table = self.tables.table("vitalsign")
            facts = melted(table, "subject_id", "charttime", "charttime", list(VITALS))
            items = pd.DataFrame(
                {
                    "item": list(VITALS),
                    "code": [vocabulary.NAMES.index(name) for name in VITALS.values()],
                    "factor": [5 / 9 if c == "temperature" else 1.0 for c in VITALS],
                    "shift": [-160 / 9 if c == "temperature" else 0.0 for c in VITALS],
                }
            )
            parts.append((facts, items))
        return parts

    def drugs(self):
        """See `Source.drugs`."""
        if not self.tables.has("prescriptions"):
            return None
        return f"""(SELECT subject_id AS key, starttime AS time, starttime AS known,
            LOWER(TRIM(drug)) AS name FROM {self.tables.table("prescriptions")} t)"""

    def texts(self, rows, hidden):
        """See `Source.texts`."""
        found = {}
        if self.tables.has("radiology"):
            found["radiology"] = note_text(self, rows, f"""
                (SELECT subject_id AS key, charttime AS time, {stored("t")} AS known, text
                 FROM {self.tables.table("radiology")} t)""")  # fmt: skip
        if rows.unit == "discharge" and self.tables.has("discharge"):
            facts = f"""(SELECT hadm_id, subject_id AS key, charttime AS time, text
                         FROM {self.tables.table("discharge")} t)"""
            rule = f"e.hadm_id = k.hospital AND e.time < {dated('k.landmark')}"
            found["discharge_note"] = read_texts(self, facts, rule).reindex(range(rows.n))
        if self.tables.has("triage", "chiefcomplaint") and self.tables.has("edstays"):
            found["chief_complaint"] = self._triage(rows)["chiefcomplaint"]
        return {name: texts.astype(object).to_numpy() for name, texts in found.items()}

    def films(self, rows):
        """See `Source.films`."""
        if not self.tables.has("cxr_metadata"):
            return None, {}
        table = self.tables.query(f"""
            SELECT DISTINCT k.row AS row, m.subject_id AS subject_id, m.study_id AS study_id,
                   m.dicom_id AS dicom_id, m.viewposition AS view, m.studydate AS studydate,
                   m.studytime AS studytime, k.since AS since, k.landmark AS landmark
            FROM {self.tables.table("cxr_metadata")} m JOIN keys k ON k.key = m.subject_id
            """).to_pandas()
        table["time"] = _film_time(table["studydate"], table["studytime"])
        table = table[(table["since"] <= table["time"]) & (table["time"] <= table["landmark"])]
        table["frontal"] = table["view"].isin(FRONTAL)
        cells = self._vectors(table) if self.embeddings is not None else self._paths(table)
        if cells is None:
            self.remarks.append("Films are listed, but neither images nor embeddings were given.")
            return None, {}
        table = table.assign(cell=cells).dropna(subset="cell")
        table = table.sort_values(["row", "time", "frontal", "dicom_id"]).drop_duplicates(
            "row", keep="last"
        )
        column = table.set_index("row")["cell"].reindex(range(rows.n)).astype(object)
        kind = "Image" if self.embeddings is None else "Embedding"
        X = pd.DataFrame({"cxr": column.where(column.notna(), None)})
        return X, {"cxr": {"kind": kind, "columns": "cxr"}}

    def _vectors(self, table):
        return table["dicom_id"].map(self.embeddings)

    def _paths(self, table):
        """Paths of the images that are there; None if the folder ``files`` is not."""
        folder = Path(self.tables.files["cxr_metadata"]).parent / "files"
        if not folder.is_dir():
            return None

        def path(film):
            number = f"p{film.subject_id}"
            place = folder / number[:3] / number / f"s{film.study_id}" / f"{film.dicom_id}.jpg"
            return str(place) if place.exists() else None

        return pd.Series([path(film) for film in table.itertuples()], table.index, dtype=object)


def _film_time(date, clock):
    """When a film was taken, from 20310512 and 93045.2 (hours, minutes, seconds run together)."""
    seconds = clock.fillna(0)
    seconds = seconds // 10000 * 3600 + seconds // 100 % 100 * 60 + seconds % 100
    day = pd.to_datetime(date.astype("Int64").astype(str), format="%Y%m%d", errors="coerce")
    return day.astype("datetime64[us]") + pd.to_timedelta(seconds.round(), unit="s")


def _read_embeddings(given):
    """Series of vectors by film; None if none were given."""
    if given is None:
        return None
    frame = given if isinstance(given, pd.DataFrame) else pq.read_table(given).to_pandas()
    lost = {"dicom_id", "embedding"} - set(frame.columns)
    if lost:
        raise ValueError(
            f"image_embeddings has no columns {sorted(lost)}; it needs dicom_id and embedding."
        )
    frame = frame.drop_duplicates("dicom_id").set_index("dicom_id")["embedding"]
    return frame.map(lambda vector: np.asarray(vector, dtype="float32"))
