"""Copies of raw tables in which everything after the prediction is removed, or altered.

Written against the raw tables and their documentation, not against the loaders: what is after the
landmark is decided here once more, from the raw time columns.
"""

import numpy as np
import pandas as pd

DAY = pd.Timedelta(days=1)
SHIFT = pd.Timedelta(days=3)
# Time columns of event tables; ``+`` marks dates, which end with their day.
EVENTS = {
    "labevents": ("charttime", "storetime"),
    "chartevents": ("charttime", "storetime"),
    "outputevents": ("charttime", "storetime"),
    "prescriptions": ("starttime", "startdate+"),
    "omr": ("chartdate+",),
    "radiology": ("charttime", "storetime"),
    "noteevents": ("chartdate+", "charttime", "storetime"),
    "vitalsign": ("charttime",),
}
KEPT = ("patientunitstayid", "itemid", "hour", "seq_num", "icd_version", "error", "iserror")
CODED = ("diagnoses_icd", "procedures_icd", "drgcodes")


def read_raw(path):
    """Any table as text, with lower-case names."""
    frame = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path, dtype=str)
    return frame.rename(columns=str.lower)


def read_tables(folder, names):
    """The named tables of a folder, by lower-case name."""
    found = {}
    for path in sorted(folder.rglob("*")):
        stem = path.name.lower().split(".csv")[0].split(".parquet")[0]
        stem = "cxr_metadata" if stem == "mimic-cxr-2.0.0-metadata" else stem
        if path.is_file() and stem in names:
            found[stem] = read_raw(path)
    return found


def write_tables(tables, folder):
    folder.mkdir(parents=True, exist_ok=True)
    for name, frame in tables.items():
        name = "mimic-cxr-2.0.0-metadata" if name == "cxr_metadata" else name
        frame.to_csv(folder / f"{name}.csv", index=False)
    return folder


def _known(frame, columns):
    """When a row was known for sure: the latest of its times."""
    times = []
    for column in columns:
        date = column.endswith("+")
        column = column.rstrip("+")
        if column in frame:
            time = pd.to_datetime(frame[column])
            if date:
                time = time.dt.normalize() + DAY
                if "charttime" in frame:  # the date counts where no time is told
                    time = time.where(pd.to_datetime(frame["charttime"]).isna())
            times.append(time)
    return pd.concat(times, axis=1).max(axis=1)


def mixed(altered, removed, whose):
    """Of every second patient the altered rows, of the others what the removal left."""

    def every_second(frame):
        return whose(frame).map(lambda key: sum(map(ord, str(key))) % 2 == 0).to_numpy(dtype=bool)

    return pd.concat(
        [altered[every_second(altered)], removed[~every_second(removed)]], ignore_index=True
    )


def alter_cells(frame, at, keep=()):
    """Other numbers, codes and words in some rows; keys and times stay."""
    frame = frame.copy()
    for column in frame.columns:
        keyed = column.endswith(("_id", "time", "date", "offset")) or column in keep
        if keyed or column in KEPT:
            continue
        if frame[column].dtype.kind in "fi":
            frame.loc[at, column] = 77
        elif pd.to_numeric(frame[column], errors="coerce").notna().any():
            frame.loc[at, column] = "77"
        else:
            frame.loc[at, column] = "ALTERED"
    return frame


class Mimic:
    """The future of MIMIC patients, each after a landmark of its own."""

    tables = (*EVENTS, *CODED, "patients", "admissions", "icustays", "discharge", "edstays",
              "triage", "cxr_metadata")  # fmt: skip

    def __init__(self, tables, landmark):
        self.raw = tables
        self.landmark = landmark  # Series by subject, as text
        adm = tables["admissions"]
        self.left = pd.to_datetime(adm.set_index("hadm_id")["dischtime"])
        self.owner = adm.set_index("hadm_id")["subject_id"]

    def rewrite(self, mode):
        """All tables with the future removed, altered, or both (``mixed``)."""
        return {name: self._some(name, frame, mode) for name, frame in self.raw.items()}

    def _some(self, name, frame, mode):
        if mode != "mixed":
            return self._one(name, frame, mode)
        both = self._one(name, frame, "alter"), self._one(name, frame, "remove")
        return mixed(*both, self._whose)

    def _whose(self, frame):
        return frame["subject_id"] if "subject_id" in frame else frame["hadm_id"].map(self.owner)

    def _one(self, name, frame, mode):
        if name == "patients":
            return self._shift(frame, ["dod", "dod_hosp", "dod_ssn"], frame["subject_id"])
        if name == "admissions":
            return self._stays(frame, "admittime", ["dischtime", "deathtime"], mode)
        if name == "icustays":
            return self._stays(frame, "intime", ["outtime"], mode)
        if name == "edstays":
            return self._stays(frame, "intime", ["outtime"], mode)
        after = self._after(name, frame)
        return frame[~after] if mode == "remove" else alter_cells(frame, after)

    def _after(self, name, frame):
        if name in CODED:
            subject = frame["hadm_id"].map(self.owner)
            return self.left.reindex(frame["hadm_id"]).to_numpy() > self._at(subject)
        if name == "triage":
            came = pd.to_datetime(self.raw["edstays"].set_index("stay_id")["intime"])
            came = came.reindex(frame["stay_id"])
            return came.to_numpy() > self._at(frame["subject_id"])
        if name == "discharge":
            left = self.left.reindex(frame["hadm_id"]).to_numpy()
            dated = pd.to_datetime(frame["charttime"]).dt.normalize().to_numpy()
            at = self._at(frame["subject_id"])
            return (left > at) | (dated > at)
        if name == "cxr_metadata":
            clock = frame["studytime"].astype(float).astype(int).astype(str).str.zfill(6)
            time = pd.to_datetime(frame["studydate"] + clock, format="%Y%m%d%H%M%S")
            return time.to_numpy() > self._at(frame["subject_id"])
        return _known(frame, EVENTS[name]).to_numpy() > self._at(frame["subject_id"])

    def _at(self, subject):
        return self.landmark.reindex(subject).to_numpy()

    def _shift(self, frame, columns, subject):
        frame, at = frame.copy(), self._at(subject)
        for column in columns:
            if column in frame:
                time = pd.to_datetime(frame[column])
                late = (time.where(time != time.dt.normalize(), time + DAY)).to_numpy() > at
                frame.loc[late, column] = (time[late] + SHIFT).astype(str)
        return frame

    def _stays(self, frame, start, ends, mode):
        at = self._at(frame["subject_id"])
        begun = pd.to_datetime(frame[start]).to_numpy() <= at
        open_ = pd.to_datetime(frame[ends[0]]).to_numpy() > at
        out = self._shift(frame, ends, frame["subject_id"])
        for column in ("discharge_location", "last_careunit", "los", "disposition"):
            if column in out:
                out.loc[open_, column] = "9"
        if "hospital_expire_flag" in out:
            flipped = (1 - out["hospital_expire_flag"].astype(int)).astype(str)
            out["hospital_expire_flag"] = out["hospital_expire_flag"].where(~open_, flipped)
        kept = begun
        if "edregtime" in frame:  # who has arrived is there, whatever becomes of it
            kept = begun | (pd.to_datetime(frame["edregtime"]).to_numpy() <= at)
        if mode == "remove":
            out, begun = out[kept].copy(), begun[kept]
        later = {"admission_type": "ELECTIVE", "first_careunit": "OTHER", "race": "OTHER"}
        for column, value in later.items():
            if column in out:
                out.loc[~begun, column] = value
        return out


class Eicu:
    """The future of unit stays: their rows after the landmark, and later stays whole."""

    times = {  # noqa: RUF012
        "hourly_labs_vitals": None,
        "lab": ("labresultoffset", "labresultrevisedoffset"),
        "vitalaperiodic": ("observationoffset",),
        "respiratorycharting": ("respchartoffset", "respchartentryoffset"),
        "intakeoutput": ("intakeoutputoffset", "intakeoutputentryoffset"),
        "medication": ("drugstartoffset", "drugorderoffset"),
        "infusiondrug": ("infusionoffset",),
        "note": ("noteoffset", "noteenteredoffset"),
        "physicalexam": ("physicalexamoffset",),
        "pasthistory": ("pasthistoryoffset", "pasthistoryenteredoffset"),
        "treatment": ("treatmentoffset",),
        "diagnosis": ("diagnosisoffset",),
        "admissiondx": ("admitdxenteredoffset",),
        "careplangeneral": ("cplitemoffset",),
    }
    tables = ("patient", *times)

    def __init__(self, tables, chosen, minutes):
        self.raw, self.minutes = tables, minutes
        p = tables["patient"]
        number = p["unitvisitnumber"].astype(int)
        mine = p["patientunitstayid"].isin(chosen)
        place = number[mine].groupby(p.loc[mine, "patienthealthsystemstayid"]).first()
        later = number > p["patienthealthsystemstayid"].map(place).fillna(10**6)
        self.chosen, self.later = set(chosen), set(p.loc[later, "patientunitstayid"])

        self.whole = p.set_index("patientunitstayid")["patienthealthsystemstayid"]

    def rewrite(self, mode):
        """All tables with the future removed, altered, or both (``mixed``)."""
        return {name: self._some(name, frame, mode) for name, frame in self.raw.items()}

    def _some(self, name, frame, mode):
        if mode != "mixed":
            return self._one(name, frame, mode)
        both = self._one(name, frame, "alter"), self._one(name, frame, "remove")
        return mixed(*both, lambda f: f["patientunitstayid"].map(self.whole))

    def _one(self, name, frame, mode):
        key = frame["patientunitstayid"]
        later = key.isin(self.later)
        if name == "patient":
            out = frame[~later].copy() if mode == "remove" else frame.copy()
            now = out["patientunitstayid"].isin(self.chosen | self.later)
            for column in ("unitdischargeoffset", "hospitaldischargeoffset"):
                out.loc[now, column] = (out.loc[now, column].astype(float) + 777).astype(str)
            for column in ("unitdischargelocation", "hospitaldischargelocation", "dischargeweight"):
                out.loc[now, column] = "9"
            turned = {"Alive": "Expired", "Expired": "Alive"}
            column = "hospitaldischargestatus"
            out.loc[now, column] = out.loc[now, column].map(turned)
            return out
        if self.times[name] is None:
            known = 60 * frame["hour"].astype(float) + 60
        else:
            columns = [c for c in self.times[name] if c in frame]
            known = frame[columns].astype(float).max(axis=1)
        after = later | (key.isin(self.chosen) & (known > self.minutes))
        return frame[~after] if mode == "remove" else alter_cells(frame, after)


class Meds:
    """The future of MEDS subjects."""

    ends = ("HOSPITAL_DISCHARGE", "ICU_DISCHARGE")

    def __init__(self, events, landmark, arrivals=False):
        self.events, self.landmark = events, landmark
        if arrivals:  # who has arrived is there, whatever becomes of it
            self.ends = (*self.ends, "HOSPITAL_ADMISSION")

    def rewrite(self, mode):
        """Events with the future removed, altered, or both; ends of what is going on are moved."""
        if mode == "mixed":
            both = self.rewrite("alter"), self.rewrite("remove")
            events = mixed(*both, lambda f: f["subject_id"])
            return events.sort_values(["subject_id", "time"], kind="stable", na_position="first")
        events = self.events.copy()
        after = events["time"].to_numpy() > self.landmark.reindex(events["subject_id"]).to_numpy()
        kind = events["code"].str.split("//").str[0]
        first = np.zeros(len(events), bool)
        for end in self.ends:
            at = after & (kind == end).to_numpy()
            found = events[at].drop_duplicates("subject_id").index
            first |= events.index.isin(found)
        # Everything of the landmark's day may follow; the ends move by days.
        events.loc[first & (kind != "HOSPITAL_ADMISSION").to_numpy(), "time"] += SHIFT
        events.loc[first, "code"] = kind[first] + "//ALTERED"
        other = after & ~first
        if mode == "remove":
            events = events[~other]
        else:
            coded = (
                other & kind.isin(("LAB", "MEDICATION", "DIAGNOSIS", "PROCEDURE", "DRG")).to_numpy()
            )
            events.loc[coded, "code"] = kind[coded] + "//ICD//10//ALTERED"
            events.loc[other, "numeric_value"] = 77.0
        return events.sort_values(["subject_id", "time"], kind="stable", na_position="first")
