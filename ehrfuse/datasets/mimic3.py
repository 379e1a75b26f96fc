"""MIMIC-III: the older sibling, with date-only prescriptions, and notes in one table."""

import numpy as np
import pandas as pd

from ehrfuse.datasets._cohort import build, read_texts
from ehrfuse.datasets._mimic import COMMON, OLDEST, Mimic, dated, note_text
from ehrfuse.datasets.mimic4 import open_tables

SCHEMA = (
    COMMON
    + """
noteevents: subject_id BIGINT, hadm_id BIGINT?, chartdate TIMESTAMP, charttime TIMESTAMP?, \
storetime TIMESTAMP?, category VARCHAR, iserror BIGINT?, text VARCHAR
"""
)
ABOUT = """MIMIC-III (https://physionet.org/content/mimiciii/). The data are under the licence of
their release (full: PhysioNet Credentialed Health Data License; demo: Open Database License 1.0).
Please cite Johnson AEW et al., Scientific Data 2016;3:160035, and Goldberger AL et al., Circulation
2000;101:e215-e220."""
DISCHARGE, RADIOLOGY = "discharge summary", "radiology"


def load_mimic3(
    root,
    task="in_hospital_mortality",
    *,
    labs="events",
    cache=None,
    memory_limit="512MB",
    threads=None,
):
    """Build a data set from a folder of MIMIC-III.

    Parameters
    ----------
    root : str, Path, list of these, or an Ibis connection
        Folder of the release, ``.csv.gz``, ``.csv`` or Parquet, headers in any case. What is absent
        is left out and listed. A connection reads the same tables in a warehouse (extra
        ``warehouse``).
    task : str, Task or list of these, default="in_hospital_mortality"
        As in `load_mimic4`. Emergency arrivals are those that ended in an admission.
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
        As `load_mimic4` gives it. Notes that are neither discharge summaries nor radiology reports
        are in ``notes``.

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
    load_mimic4 : The same columns from MIMIC-IV, and the contents described.

    Notes
    -----
    Laboratory results have no time of storage here and count from their ``charttime``, which is
    when the specimen was taken: results of the last hour or two before the prediction may not
    have been known. Prescriptions have dates only and count from the end of the day.

    Examples
    --------
    >>> from ehrfuse.datasets import load_mimic3
    >>> data = load_mimic3("mimic-iii", task="readmission_30d")  # doctest: +SKIP
    """
    with open_tables(root, SCHEMA, memory_limit, threads) as tables:
        return build(Mimic3(tables), task, labs, cache)


class Mimic3(Mimic):
    """MIMIC-III."""

    about = ABOUT

    def _age(self, frame):
        born = self.patients.set_index("subject_id")["dob"].reindex(frame["subject_id"])
        # Days first: patients above 89 were born 300 years before, which nanoseconds cannot hold.
        days = (frame["start"] - pd.Series(born.to_numpy(), frame.index)).dt.days
        return np.minimum((days / 365.2425).to_numpy(), OLDEST)

    def drugs(self):
        """See `Source.drugs`."""
        if not self.tables.has("prescriptions"):
            return None
        day = dated("starttime")
        return f"""(SELECT subject_id AS key, {day} AS time, {day} AS known,
            LOWER(TRIM(drug)) AS name FROM {self.tables.table("prescriptions")} t)"""

    def texts(self, rows, hidden):
        """See `Source.texts`."""
        if not self.tables.has("noteevents"):
            return {}
        time = f"COALESCE(charttime, {dated('chartdate')})"
        facts = f"""(SELECT hadm_id, subject_id AS key, {time} AS time,
            GREATEST({time}, COALESCE(storetime, {time})) AS known, chartdate,
            LOWER(TRIM(category)) AS category, text
            FROM {self.tables.table("noteevents")} t WHERE COALESCE(iserror, 0) = 0)"""
        found = {
            "radiology": note_text(self, rows, f"(SELECT * FROM {facts} n "
                                               f"WHERE category = '{RADIOLOGY}')"),
            "notes": note_text(self, rows, f"(SELECT * FROM {facts} n WHERE category NOT IN "
                                           f"('{RADIOLOGY}', '{DISCHARGE}'))"),
        }  # fmt: skip
        if rows.unit == "discharge":
            chosen = f"(SELECT * FROM {facts} n WHERE category = '{DISCHARGE}')"
            rule = f"e.hadm_id = k.hospital AND e.chartdate < {dated('k.landmark')}"
            found["discharge_note"] = read_texts(self, chosen, rule).reindex(range(rows.n))
        return {name: texts.astype(object).to_numpy() for name, texts in found.items()}
