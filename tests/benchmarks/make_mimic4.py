"""Write tables with the layout of MIMIC-IV, of any size: no record in them is real.

    python make_mimic4.py OUT --labs 20000000

Columns, their order, types and date formats are those of release 2.2 with its modules hosp, icu,
note, ed and the metadata of MIMIC-CXR. Densities follow the open demo and the release: 290
laboratory rows an admission, a quarter of them without ``hadm_id``, stored some time after they
were taken, and a few never. Tables are drawn and written a block of patients at a
time, so that memory does not grow with size.
"""

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

LABS_PER_ADMISSION = 290
BLOCK = 4_000  # patients
# Item, median, spread (logarithmic), unit.
LABS = {
    50971: (4.2, 0.12, "mEq/L"), 50983: (139, 0.03, "mEq/L"), 50912: (1.0, 0.5, "mg/dL"),
    50902: (103, 0.05, "mEq/L"), 51006: (18, 0.6, "mg/dL"), 51221: (33, 0.15, "%"),
    50882: (25, 0.15, "mEq/L"), 50868: (14, 0.2, "mEq/L"), 51265: (210, 0.4, "K/uL"),
    51222: (11, 0.15, "g/dL"), 51301: (9, 0.45, "K/uL"), 51279: (3.7, 0.15, "m/uL"),
    51249: (33, 0.04, "g/dL"), 51250: (91, 0.07, "fL"), 51248: (30, 0.08, "pg"),
    51277: (15, 0.12, "%"), 50931: (125, 0.35, "mg/dL"), 50960: (2.0, 0.15, "mg/dL"),
    50893: (8.8, 0.08, "mg/dL"), 50970: (3.4, 0.3, "mg/dL"), 51275: (33, 0.35, "sec"),
    51237: (1.3, 0.3, ""), 51274: (14, 0.3, "sec"), 50885: (0.8, 0.8, "mg/dL"),
    50861: (26, 0.8, "IU/L"), 50878: (32, 0.8, "IU/L"), 50863: (90, 0.5, "IU/L"),
    50820: (7.38, 0.01, "units"), 50821: (100, 0.5, "mm Hg"), 50818: (41, 0.2, "mm Hg"),
    50813: (1.7, 0.6, "mmol/L"), 50862: (3.2, 0.2, "g/dL"), 51003: (0.05, 1.2, "ng/mL"),
    51244: (14, 0.6, "%"), 51256: (76, 0.2, "%"), 50954: (240, 0.5, "IU/L"),
}  # fmt: skip
N_OTHER = 200  # items that no vocabulary has
CHARTED = {
    220045: (86, 0.2, "bpm"), 220210: (19, 0.25, "insp/min"), 220277: (97, 0.02, "%"),
    220179: (118, 0.18, "mmHg"), 220180: (62, 0.2, "mmHg"), 220181: (77, 0.18, "mmHg"),
    223761: (98.4, 0.01, "°F"), 220739: (3, 0.2, None), 223835: (45, 0.2, None),
    226512: (80, 0.2, "kg"), 226730: (170, 0.06, "cm"), 220047: (60, 0.1, "bpm"),
}  # fmt: skip
DRUGS = [f"Drug {letter}{number}" for letter in "ABCDEFGH" for number in range(25)]
WORDS = (
    "patient", "admitted", "with", "shortness", "of", "breath", "chest", "pain", "fever", "cough",
    "history", "hypertension", "diabetes", "stable", "improved", "discharged", "home", "follow",
    "lungs", "clear", "no", "acute", "process", "effusion",
)  # fmt: skip


def main():
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("out", type=Path)
    options.add_argument("--labs", type=float, default=2e7, help="rows of labevents, about")
    options.add_argument("--format", choices=("parquet", "csv", "csv.gz"), default="parquet")
    options.add_argument("--charted", type=float, default=0, help="chart rows a stay, about")
    options.add_argument("--notes", action="store_true", help="the modules note, ed and cxr too")
    options.add_argument("--seed", type=int, default=0)
    args = options.parse_args()
    n = make_mimic4(args.out, int(args.labs), args.format, args.charted, args.notes, args.seed)
    print(f"{n} laboratory rows in {args.out}")


def make_mimic4(out, n_labs, form="parquet", charted=0.0, notes=False, seed=0):
    """Write the tables; return how many laboratory rows there are.

    Parameters
    ----------
    out : path
    n_labs : int
        About how many; it sets the number of admissions.
    form : {"parquet", "csv", "csv.gz"}
    charted : float
        Chart rows of an intensive-care stay; 0 leaves the table out.
    notes : bool
        Whether to write notes, emergency visits and films.
    seed : int
    """
    n_patients = max(8, round(n_labs / LABS_PER_ADMISSION / 2))
    files, total = Files(Path(out), form), 0
    for block, begin in enumerate(range(0, n_patients, BLOCK)):
        rng = np.random.default_rng([seed, block])
        n = min(BLOCK, n_patients - begin)
        stays = _admissions(rng, begin, n, files)
        total += _labs(rng, stays, files)
        _codes_and_drugs(rng, stays, files)
        icu = _icu(rng, stays, files)
        if charted:
            _charted(rng, stays, icu, charted, files)
        if notes:
            _notes(rng, stays, files)
    files.close()
    return total


class Files:
    """One growing file per table."""

    def __init__(self, out, form):
        self.out, self.form, self.writers, self.streams = out, form, {}, []

    def add(self, name, columns):
        """Append rows to a table such as ``hosp/labevents``."""
        arrays = {key: _column(value) for key, value in columns.items()}
        table = pa.table(arrays)
        if name not in self.writers:
            self.writers[name] = self._open(name, table.schema)
        if self.form == "parquet":
            self.writers[name].write_table(table, row_group_size=250_000)
        else:
            self.writers[name].write_table(_as_text(table))

    def _open(self, name, schema):
        path = self.out / f"{name}.{self.form}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if self.form == "parquet":
            return pq.ParquetWriter(path, schema, compression="zstd")
        packed = self.form == "csv.gz"
        stream = pa.CompressedOutputStream(str(path), "gzip") if packed else path.open("wb")
        self.streams.append(stream)
        schema = pa.schema([pa.field(f.name, _text_type(f.type)) for f in schema])
        return pacsv.CSVWriter(stream, schema, write_options=pacsv.WriteOptions(
            quoting_style="needed"
        ))  # fmt: skip

    def close(self):
        """Finish all files."""
        for writer in self.writers.values():
            writer.close()
        for stream in self.streams:
            stream.close()


def _column(value):
    if isinstance(value, pa.Array):
        return value
    value = np.asarray(value)
    if value.dtype.kind == "M":
        return pa.array(value.astype("datetime64[us]"))
    return pa.array(value, from_pandas=True)


def _text_type(kind):
    return pa.string() if pa.types.is_timestamp(kind) else kind


def _as_text(table):
    """Times as the release writes them."""
    columns = [
        pa.compute.strftime(column, "%Y-%m-%d %H:%M:%S").cast(pa.string())
        if pa.types.is_timestamp(column.type)
        else column
        for column in (c.cast(pa.timestamp("s")) if pa.types.is_timestamp(c.type) else c
                       for c in table.columns)
    ]  # fmt: skip
    return pa.table(columns, names=table.column_names)


class Stays:
    """The admissions of a block, and what all tables need of them."""

    def __init__(self, subject, hadm, admit, hours, died, risk):
        self.subject, self.hadm, self.admit = subject, hadm, admit
        self.hours, self.died, self.risk = hours, died, risk
        self.n = len(hadm)

    def at(self, rows, hours):
        """Times so many hours after the admissions of some rows."""
        return self.admit[rows] + (hours * 3600).astype("timedelta64[s]")


def _admissions(rng, begin, n, files):
    subject = 10_000_000 + 7 * (begin + np.arange(n))
    age, risk = rng.integers(18, 91, n), rng.normal(0, 1, n)
    count = 1 + rng.poisson(1.0, n)
    who = np.repeat(np.arange(n), count)
    m = len(who)
    first = np.cumsum(count) - count
    place = np.arange(m) - first[who]
    year = rng.integers(2110, 2190, n)
    days = np.round(rng.gamma(1.0, 90, m)) + 12  # between admissions, longer than any stay
    days = np.cumsum(days) - (np.cumsum(days) - days)[first][who]
    start = (year[who] - 1970).astype("datetime64[Y]").astype("datetime64[s]")
    seconds = (days * 86400 + rng.integers(0, 86400, m)).astype("timedelta64[s]")
    admit = start + seconds
    hours = np.minimum(6 + rng.gamma(1.6, 60, m), 280)
    last = place == count[who] - 1
    died = last & (rng.random(m) < 1 / (1 + np.exp(3 - risk[who] - (age[who] - 60) / 25)))
    hadm = 20_000_000 + begin * 9 + np.arange(m)
    stays = Stays(subject[who], hadm, admit, hours, died, risk[who])
    leave = stays.at(np.arange(m), hours)
    gone = np.full(n, np.datetime64("NaT"), "datetime64[s]")
    gone[who[died]] = leave[died].astype("datetime64[D]").astype("datetime64[s]")
    later = (rng.random(n) < 0.05) & np.isnat(gone)
    wait = rng.integers(3, 200, n).astype("timedelta64[D]").astype("timedelta64[s]")
    gone[later] = leave[first + count - 1][later].astype("datetime64[D]") + wait[later]
    files.add("hosp/patients", {
        "subject_id": subject, "gender": rng.choice(["F", "M"], n), "anchor_age": age,
        "anchor_year": year, "anchor_year_group": rng.choice(["2008 - 2010", "2017 - 2019"], n),
        "dod": gone,
    })  # fmt: skip
    emergency = rng.random(m) < 0.6
    arrived = stays.at(np.arange(m), -rng.uniform(1, 8, m))
    ward = leave - np.timedelta64(1, "h")
    none = np.datetime64("NaT")
    files.add("hosp/admissions", {
        "subject_id": stays.subject, "hadm_id": hadm, "admittime": admit, "dischtime": leave,
        "deathtime": np.where(died, ward, none),
        "admission_type": np.where(emergency, "EW EMER.", rng.choice(["ELECTIVE", "URGENT"], m)),
        "admit_provider_id": np.full(m, "P0"),
        "admission_location": np.where(emergency, "EMERGENCY ROOM", "PHYSICIAN REFERRAL"),
        "discharge_location": np.where(died, "DIED", rng.choice(["HOME", "REHAB"], m)),
        "insurance": rng.choice(["Medicare", "Medicaid", "Other"], m),
        "language": rng.choice(["ENGLISH", "?"], m),
        "marital_status": rng.choice(["MARRIED", "SINGLE", "WIDOWED"], m),
        "race": rng.choice(["WHITE", "BLACK/AFRICAN AMERICAN", "ASIAN", "UNKNOWN"], m)[first][who],
        "edregtime": np.where(emergency, arrived, none), "edouttime": np.where(
            emergency, admit + np.timedelta64(1, "h"), none),
        "hospital_expire_flag": died.astype(int),
    })  # fmt: skip
    stays.emergency, stays.arrived, stays.leave, stays.first = emergency, arrived, leave, place == 0
    return stays


def _labs(rng, stays, files):
    """Laboratory rows, sorted by patient and time as in the release, some before the admission."""
    items = np.array([*LABS, *(52000 + np.arange(N_OTHER))])
    weight = np.concatenate([np.full(len(LABS), 0.8 / len(LABS)), np.full(N_OTHER, 0.2 / N_OTHER)])
    count = rng.poisson(LABS_PER_ADMISSION * np.exp(0.2 * stays.risk - 0.02))
    row = np.repeat(np.arange(stays.n), count)
    size = len(row)
    taken = rng.random(size) * (stays.hours[row] + 24) - 20
    order = np.lexsort((taken, row))
    taken = taken[order]
    taken = np.round(taken * 60) / 60
    which = rng.choice(len(items), size, p=weight)
    median = np.array([v[0] for v in LABS.values()] + [1.0] * N_OTHER)
    spread = np.array([v[1] for v in LABS.values()] + [0.5] * N_OTHER)
    units = np.array([v[2] for v in LABS.values()] + ["u"] * N_OTHER, dtype=object)
    tilt = 0.15 * stays.risk[row] * np.where(np.isin(items[which], (50912, 51006, 50813)), 1, 0)
    value = median[which] * np.exp(spread[which] * rng.normal(size=size) * 0.6 + tilt)
    value = np.round(value, 2)
    value[rng.random(size) < 0.06] = np.nan  # answered in words
    charted = stays.at(row, taken)
    delay = rng.lognormal(0, 0.7, size)
    stored = stays.at(row, taken + delay)
    text = np.char.mod("%.2f", value).astype(object)
    text[np.isnan(value)] = "___"
    empty = pa.nulls(size, pa.string())
    begin = files.labs = getattr(files, "labs", 0)
    files.add("hosp/labevents", {
        "labevent_id": begin + np.arange(size), "subject_id": stays.subject[row],
        "hadm_id": pa.array(stays.hadm[row], mask=rng.random(size) < 0.25),
        "specimen_id": rng.integers(0, 10**8, size), "itemid": items[which],
        "order_provider_id": empty, "charttime": charted,
        "storetime": np.where(rng.random(size) < 0.02, np.datetime64("NaT"), stored),
        "value": pa.array(text, pa.string()), "valuenum": value,
        "valueuom": pa.array(units[which], pa.string()),
        "ref_range_lower": np.full(size, 1.0), "ref_range_upper": np.full(size, 2.0),
        "flag": pa.array(np.where(rng.random(size) < 0.4, "abnormal", None), pa.string()),
        "priority": pa.array(rng.choice(["ROUTINE", "STAT"], size), pa.string()),
        "comments": empty,
    })  # fmt: skip
    files.labs += size
    return size


def _codes_and_drugs(rng, stays, files):
    for name, mean, prefix in (("diagnoses_icd", 11, "I"), ("procedures_icd", 1.5, "0")):
        count = 1 + rng.poisson(mean - 1 + 0.1, stays.n)
        row = np.repeat(np.arange(stays.n), count)
        number = np.arange(len(row)) - (np.cumsum(count) - count)[row]
        code = np.minimum(rng.zipf(1.4, len(row)), 900)
        words = np.char.add(prefix, np.char.mod("%03d", code))
        columns = {"subject_id": stays.subject[row], "hadm_id": stays.hadm[row],
                   "seq_num": number + 1, "icd_code": words,
                   "icd_version": np.full(len(row), 10)}  # fmt: skip
        if name == "procedures_icd":
            columns["chartdate"] = stays.leave[row].astype("datetime64[D]").astype("datetime64[s]")
        files.add(f"hosp/{name}", columns)
    files.add("hosp/drgcodes", {
        "subject_id": stays.subject, "hadm_id": stays.hadm, "drg_type": np.full(stays.n, "HCFA"),
        "drg_code": np.char.mod("%d", rng.integers(1, 990, stays.n)),
        "description": np.full(stays.n, "GROUP"),
    })  # fmt: skip
    count = rng.poisson(20, stays.n)
    row = np.repeat(np.arange(stays.n), count)
    start = rng.random(len(row)) * stays.hours[row]
    files.add("hosp/prescriptions", {
        "subject_id": stays.subject[row], "hadm_id": stays.hadm[row],
        "pharmacy_id": rng.integers(0, 10**8, len(row)),
        "starttime": stays.at(row, np.floor(start)),
        "stoptime": stays.at(row, np.floor(start) + 24), "drug_type": np.full(len(row), "MAIN"),
        "drug": rng.choice(DRUGS, len(row)), "route": np.full(len(row), "PO"),
    })  # fmt: skip
    row = np.flatnonzero(rng.random(stays.n) < 0.5)
    day = stays.at(row, rng.random(len(row)) * stays.hours[row] - 24)
    files.add("hosp/omr", {
        "subject_id": stays.subject[row],
        "chartdate": day.astype("datetime64[D]").astype("datetime64[s]"),
        "seq_num": np.ones(len(row), int),
        "result_name": rng.choice(["Height (Inches)", "Weight (Lbs)", "BMI (kg/m2)"], len(row)),
        "result_value": np.char.mod("%.0f", rng.uniform(60, 75, len(row))),
    })  # fmt: skip


def _icu(rng, stays, files):
    """Intensive-care stays: of some admissions one, of few two."""
    one = np.flatnonzero(rng.random(stays.n) < 0.35)
    begin = rng.random(len(one)) * stays.hours[one] * 0.3
    end = np.maximum(begin + 2, begin + rng.random(len(one)) * (stays.hours[one] - begin))
    end = np.where(stays.died[one], stays.hours[one], np.minimum(end, stays.hours[one]))
    again = (rng.random(len(one)) < 0.15) & ~stays.died[one] & (end + 4 < stays.hours[one])
    row = np.concatenate([one, one[again]])
    inn = np.concatenate([begin, end[again] + 1])
    out = np.concatenate([end, np.minimum(stays.hours[one[again]], end[again] + 40)])
    order = np.lexsort((inn, row))
    row, inn, out = row[order], inn[order], out[order]
    files.add("icu/icustays", {
        "subject_id": stays.subject[row], "hadm_id": stays.hadm[row],
        "stay_id": 30_000_000 + 2 * (stays.hadm[row] - 20_000_000) + _repeat(row),
        "first_careunit": rng.choice(["MICU", "SICU", "CCU"], len(row)),
        "last_careunit": rng.choice(["MICU", "SICU", "CCU"], len(row)),
        "intime": stays.at(row, inn), "outtime": stays.at(row, out), "los": (out - inn) / 24,
    })  # fmt: skip
    return row, inn, out


def _repeat(row):
    return np.concatenate([[0], (np.diff(row) == 0).astype(int)]) if len(row) else row


def _charted(rng, stays, icu, mean, files):
    row, inn, out = icu
    count = rng.poisson(mean, len(row))
    which = np.repeat(np.arange(len(row)), count)
    item = rng.choice(len(CHARTED), len(which))
    median, spread, unit = (np.array(c, dtype=object) for c in zip(*CHARTED.values(), strict=True))
    noise = np.exp(spread.astype(float)[item] * rng.normal(size=len(which)))
    value = np.round(median.astype(float)[item] * noise, 1)
    time = inn[which] + rng.random(len(which)) * (out - inn)[which]
    at = stays.at(row[which], time)
    common = {
        "subject_id": stays.subject[row][which], "hadm_id": stays.hadm[row][which],
        "stay_id": 30_000_000 + 2 * (stays.hadm[row][which] - 20_000_000) + _repeat(row)[which],
        "caregiver_id": np.full(len(which), 1), "charttime": at,
        "storetime": at + (rng.exponential(1800, len(which))).astype("timedelta64[s]"),
    }  # fmt: skip
    files.add("icu/chartevents", common | {
        "itemid": np.array(list(CHARTED))[item], "value": np.char.mod("%.1f", value),
        "valuenum": value, "valueuom": pa.array(unit[item], pa.string()),
        "warning": np.zeros(len(which), int),
    })  # fmt: skip
    files.add("icu/outputevents", common | {
        "itemid": rng.choice([226559, 226560, 226588], len(which)),
        "value": np.round(rng.gamma(2, 60, len(which))),
        "valueuom": pa.array(["ml"] * len(which), pa.string()),
    })  # fmt: skip


def _notes(rng, stays, files):
    def text(n, words):
        drawn = rng.choice(WORDS, (n, words))
        return [" ".join(line) + ',\nsaid "nothing else".' for line in drawn]

    def note(name, row, hours, words, kind):
        at = stays.at(row, hours)
        if kind == "DS":  # a date only, and stored days later
            at = stays.leave[row].astype("datetime64[D]").astype("datetime64[s]")
        files.add(f"note/{name}", {
            "note_id": np.char.add(np.char.mod("%d", stays.subject[row]), f"-{kind}-1"),
            "subject_id": stays.subject[row], "hadm_id": stays.hadm[row],
            "note_type": np.full(len(row), kind), "note_seq": np.arange(len(row)),
            "charttime": at, "storetime": at + np.timedelta64(50 if kind == "DS" else 2, "h"),
            "text": text(len(row), words),
        })  # fmt: skip

    some = np.flatnonzero(rng.random(stays.n) < 0.7)
    note("discharge", some, stays.hours[some], 60, "DS")
    some = np.sort(rng.choice(stays.n, stays.n))
    note("radiology", some, np.floor(rng.random(len(some)) * stays.hours[some]), 20, "RR")
    _emergency(rng, stays, files)
    some = np.sort(rng.choice(stays.n, stays.n // 2))
    at = stays.at(some, np.floor(rng.random(len(some)) * stays.hours[some]))
    day = at.astype("datetime64[D]")
    clock = (at - day).astype(int)
    clock = clock // 3600 * 10000 + clock // 60 % 60 * 100 + clock % 60
    study = 50_000_000 + stays.hadm[some] * 3 + np.arange(len(some))
    files.add("cxr/mimic-cxr-2.0.0-metadata", {
        "dicom_id": np.char.add("film-", np.char.mod("%d", study)),
        "subject_id": stays.subject[some], "study_id": study,
        "PerformedProcedureStepDescription": np.full(len(some), "CHEST"),
        "ViewPosition": rng.choice(["PA", "AP", "LATERAL"], len(some)),
        "Rows": np.full(len(some), 64), "Columns": np.full(len(some), 64),
        "StudyDate": np.char.replace(day.astype(str), "-", "").astype(int),
        "StudyTime": clock + 0.5,
    })  # fmt: skip


def _emergency(rng, stays, files):
    """Visits that ended in an admission, and some that ended at home."""
    row = np.flatnonzero(stays.emergency)
    home = np.flatnonzero(rng.random(stays.n) < 0.2)
    who = np.concatenate([row, home])
    came = np.concatenate([stays.arrived[row], stays.leave[home] + np.timedelta64(3, "D")])
    stay = (
        40_000_000 + 2 * (stays.hadm[who] - 20_000_000) + np.repeat([0, 1], [len(row), len(home)])
    )
    files.add("ed/edstays", {
        "subject_id": stays.subject[who],
        "hadm_id": pa.array(stays.hadm[who], mask=np.arange(len(who)) >= len(row)),
        "stay_id": stay, "intime": came, "outtime": came + np.timedelta64(5, "h"),
        "gender": np.full(len(who), "F"), "race": rng.choice(["WHITE", "ASIAN"], len(who)),
        "arrival_transport": np.full(len(who), "AMBULANCE"),
        "disposition": np.where(np.arange(len(who)) < len(row), "ADMITTED", "HOME"),
    })  # fmt: skip
    vitals = {
        "temperature": 98.6, "heartrate": 88.0, "resprate": 18.0, "o2sat": 97.0, "sbp": 130.0,
        "dbp": 75.0,
    }  # fmt: skip
    drawn = {
        k: np.round(v * np.exp(0.05 * rng.normal(size=len(who))), 1) for k, v in vitals.items()
    }
    files.add("ed/triage", {"subject_id": stays.subject[who], "stay_id": stay, **drawn,
        "pain": np.full(len(who), "5"), "acuity": rng.integers(1, 6, len(who)),
        "chiefcomplaint": rng.choice(["CHEST PAIN", "FEVER, COUGH"], len(who)),
    })  # fmt: skip
    at = came + (rng.random(len(who)) * 4 * 3600).astype("timedelta64[s]")
    files.add("ed/vitalsign", {"subject_id": stays.subject[who], "stay_id": stay, "charttime": at,
        **drawn, "rhythm": pa.nulls(len(who), pa.string()), "pain": np.full(len(who), "3"),
    })  # fmt: skip


if __name__ == "__main__":
    main()
