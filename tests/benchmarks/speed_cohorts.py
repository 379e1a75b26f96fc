"""Cohorts from raw tables: time and memory against plain pandas and against PyHealth.

    python speed_cohorts.py --json cohorts.json --like DIR --pyhealth PYTHON

Every run is a process of its own; memory is its peak above what imports need. The reference reads
only the columns that it uses, filters before it joins, and does less: it stops at the table of
latest values and a sorted long table, without events columns. ``--like`` is a folder of MIMIC-IV
shape with notes and films in CSV; ``--pyhealth`` the interpreter of an environment with PyHealth.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
from _common import finish, parse, parser, row
from make_mimic4 import make_mimic4

HOURS = 48
TURNS = 3
TABLES = ("hosp/patients", "hosp/admissions", "hosp/labevents")
PYHEALTH = """
import json, logging, resource, sys, tempfile, time
begin = time.perf_counter()
from pyhealth.datasets import MIMIC4Dataset
from pyhealth.tasks import InHospitalMortalityMIMIC4
logging.disable(logging.CRITICAL)
loaded = time.perf_counter()
with tempfile.TemporaryDirectory() as cache:
    data = MIMIC4Dataset(ehr_root=sys.argv[1], cache_dir=cache, num_workers=1, ehr_tables=[
        "diagnoses_icd", "procedures_icd", "prescriptions", "labevents"])
    data.global_event_df
    n = len(data.set_task(InHospitalMortalityMIMIC4()))
whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
peak = max(resource.getrusage(w).ru_maxrss for w in whose)
print(json.dumps({"seconds": time.perf_counter() - loaded, "import": loaded - begin,
                  "peak": peak / 1024, "rows": n}))
"""


def main():
    options = parser(__doc__.partition("\n")[0], sections=("scale", "like", "demo"))
    options.add_argument("--rows", type=float, default=2e7, help="laboratory rows of the scale run")
    options.add_argument("--scratch", type=Path, help="where to keep generated tables")
    options.add_argument("--like", type=Path, help="MIMIC-IV-shaped CSV with notes and films")
    options.add_argument("--pyhealth", type=Path, help="python of an environment with PyHealth")
    options.add_argument("--child", nargs="+", help="internal: what to time in this process")
    args = parse(options)
    if args.child:
        print(json.dumps(CHILDREN[args.child[0]](Path(args.child[1]))))
        return
    sections = {"scale": scale, "like": like, "demo": demo}
    rows = []
    for name in args.only:
        rows += sections[name](args)
    finish(args, rows)


def scale(args):
    """The 48-hour death cohort from Parquet, at a tenth of the rows and at all of them."""
    with tempfile.TemporaryDirectory() as temporary:
        scratch = args.scratch or Path(temporary)
        big = 2_000_000 if args.quick else int(args.rows)
        found = {}
        for n in (big // 10, big):
            folder = scratch / f"labs-{n}-{args.seeds[0]}"
            if not (folder / "hosp" / "labevents.parquet").exists():
                make_mimic4(folder, n, seed=args.seeds[0])
            folder = _only(folder, Path(temporary) / f"linked-{n}", TABLES)
            found[n] = _turns(["ours", "pandas"], folder, args)
    rows = []
    for n, runs in found.items():
        rows += _against("synthetic", f"48-hour death cohort, {n} labs", runs, "pandas", args)
    growth = found[big]["ours"]["seconds"] / found[big // 10]["ours"]["seconds"]
    rows.append(_row("synthetic", "48-hour death cohort", "time_growth", growth, big, args))
    return rows


def like(args):
    """All inputs of MIMIC-IV-shaped CSV with notes and films, against the same by hand."""
    if args.like is None or not args.like.is_dir():
        print("  --like was not given: no run on tables with notes and films")
        return []
    runs = _turns(["everything", "by_hand"], args.like, args)
    return _against("mimic4-like", "all inputs at 48 hours", runs, "by_hand", args)


def demo(args):
    """The demo: seconds, and PyHealth's pipeline on the same tables."""
    folder = args.data / "mimic-iv-demo-2.2"
    if not folder.is_dir():
        return []
    runs = _turns(["everything"], folder, args)
    if args.pyhealth is None:
        print("  --pyhealth was not given: no comparison")
        ours = runs["everything"]
        return [
            _row("mimic-iv-demo-2.2", "all inputs", "seconds", ours["seconds"], ours["rows"], args)
        ]
    for _ in range(1 if args.quick else 2):
        found = _run([str(args.pyhealth), "-c", PYHEALTH, str(folder)])
        _keep_best(runs, "PyHealth", found)
    return _against("mimic-iv-demo-2.2", "48-hour death cohort", runs, "PyHealth", args)


# ---------------------------------------------------------------- runs


def _turns(names, folder, args):
    """Best of several turns of each, in turn, so that a busy machine is fair to all."""
    runs = {}
    for _ in range(1 if args.quick else TURNS):
        for name in names:
            command = [sys.executable, __file__, "--child", name, str(folder)]
            _keep_best(runs, name, _run(command))
    return runs


def _run(command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{command[:4]} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _keep_best(runs, name, found):
    print(f"  {name}: {found['seconds']:.2f} s, {found['peak']:.0f} MiB, {found['rows']} rows")
    best = runs.setdefault(name, found)
    best["seconds"] = min(best["seconds"], found["seconds"])
    best["peak"] = min(best["peak"], found["peak"])


def _against(dataset, task, runs, reference, args):
    name = next(iter(runs))
    ours, other = runs[name], runs[reference]
    values = {
        "seconds": ours["seconds"],
        "memory_mib": ours["peak"],
        "reference_seconds": other["seconds"],
        "speedup": other["seconds"] / ours["seconds"],
    }
    if reference != "PyHealth":  # its figure is that of a whole process, imports included
        values["reference_memory_mib"] = other["peak"]
        values["memory_ratio"] = ours["peak"] / other["peak"]
    task = f"{task}, against {reference}"
    return [_row(dataset, task, m, value, ours["rows"], args) for m, value in values.items()]


def _row(dataset, task, metric, value, n, args):
    return row(dataset, task, "load_mimic4", metric, value, None, n, seeds=args.seeds)


def _only(folder, place, tables):
    """A folder with links to some tables, so that both sides read the same ones."""
    for table in tables:
        link = place / f"{table}.parquet"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to((folder / f"{table}.parquet").resolve())
    return place


# ---------------------------------------------------------------- what a process does


def _measured(work):
    """Seconds of some work, and its peak memory above the process after import, in MiB."""
    baseline, peak, done = _resident(), [0.0], threading.Event()

    def watch():
        while not done.wait(0.005):
            peak[0] = max(peak[0], _resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin = time.perf_counter()
    n = work()
    seconds = time.perf_counter() - begin
    peak[0] = max(peak[0], _resident())
    done.set()
    watcher.join()
    return {"seconds": seconds, "peak": peak[0] - baseline, "rows": n}


def _resident():
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE") / 2**20


def ours(folder):
    """The loader."""
    import ehrfuse.modalities  # noqa: F401
    from ehrfuse.datasets import in_hospital_mortality, load_mimic4

    task = in_hospital_mortality(HOURS, "admission", first_stay=False)
    return _measured(lambda: len(load_mimic4(folder, task).X))


def pandas(folder):
    """Plain pandas on Parquet: the latest value of every analyte at 48 hours, and a long table."""
    from ehrfuse.datasets.vocabulary import items_of

    items = set(items_of("mimic")["item"])

    def work():
        hosp = folder / "hosp"
        people = pd.read_parquet(hosp / "patients.parquet")
        adm = _cohort(people, pd.read_parquet(hosp / "admissions.parquet"))
        columns = ["subject_id", "itemid", "charttime", "storetime", "valuenum"]
        labs = pd.read_parquet(hosp / "labevents.parquet", columns=columns)
        return len(_latest(labs, adm, items)[0])

    return _measured(work)


def _cohort(people, adm):
    """Adults alive and in hospital at 48 hours."""
    window = pd.Timedelta(hours=HOURS)
    adm = adm.merge(people[["subject_id", "anchor_age", "anchor_year"]], on="subject_id")
    age = adm["anchor_age"] + adm["admittime"].dt.year - adm["anchor_year"]
    adm["landmark"] = adm["admittime"] + window
    adm["since"] = adm["admittime"]
    if "edregtime" in adm:
        adm["since"] = adm[["admittime", "edregtime"]].min(axis=1)
    gone = (adm["deathtime"] <= adm["landmark"]) if "deathtime" in adm else False
    return adm[(age >= 18) & (adm["dischtime"] >= adm["landmark"]) & ~gone]


def _latest(labs, adm, items):
    """Latest values in a wide table, and the long table that they come from."""
    labs = labs[labs["itemid"].isin(items) & labs["valuenum"].notna()]
    labs = labs.merge(adm[["subject_id", "hadm_id", "since", "landmark"]], on="subject_id")
    counts = (labs["charttime"] >= labs["since"]) & (labs["charttime"] <= labs["landmark"])
    labs = labs[counts & ~(labs["storetime"] > labs["landmark"])]
    labs = labs.sort_values(["hadm_id", "charttime"], kind="stable")
    last = labs.drop_duplicates(["hadm_id", "itemid"], keep="last")
    wide = last.pivot(index="hadm_id", columns="itemid", values="valuenum")
    return wide.reindex(adm["hadm_id"]), labs


def everything(folder):
    """The loader on all tables of a folder."""
    return ours(folder)


def by_hand(folder):
    """The same inputs by hand: labs, drugs, codes of earlier admissions, reports, films."""
    from ehrfuse.datasets.vocabulary import items_of

    items = set(items_of("mimic")["item"])

    def read(name, columns, dates=()):
        return pd.read_csv(folder / name, usecols=columns, parse_dates=list(dates))

    def work():
        times = ["admittime", "dischtime"]
        people = read("hosp/patients.csv", ["subject_id", "anchor_age", "anchor_year", "gender"])
        static = ["subject_id", "hadm_id", "admission_type", "insurance", "marital_status", "race",
                  "hospital_expire_flag"]  # fmt: skip
        every = read("hosp/admissions.csv", static + times, times)
        adm = _cohort(people, every.copy())
        stored = ["charttime", "storetime"]
        labs = read("hosp/labevents.csv", ["subject_id", "itemid", "valuenum", *stored], stored)
        X, _ = _latest(labs, adm, items)
        return len(X.join(_rest(read, every, adm)))

    return _measured(work)


def _rest(read, every, adm):
    """Drugs, codes of earlier admissions, reports and the latest film, a cell per admission."""
    key = adm.set_index("hadm_id")
    drugs = read("hosp/prescriptions.csv", ["subject_id", "starttime", "drug"], ["starttime"])
    drugs = drugs.merge(adm[["subject_id", "hadm_id", "since", "landmark"]], on="subject_id")
    drugs = drugs[
        (drugs["starttime"] >= drugs["since"]) & (drugs["starttime"] <= drugs["landmark"])
    ]
    parts = [drugs.sort_values("starttime").groupby("hadm_id")["drug"].agg(list)]
    past = adm[["subject_id", "hadm_id", "landmark"]].merge(
        every[["subject_id", "hadm_id", "dischtime"]].rename(columns={"hadm_id": "earlier"}),
        on="subject_id",
    )
    past = past[past["dischtime"] <= past["landmark"]]
    for name in ("diagnoses_icd", "procedures_icd"):
        codes = read(f"hosp/{name}.csv", ["hadm_id", "icd_code"])
        codes = codes.rename(columns={"hadm_id": "earlier"})
        parts.append(past.merge(codes, on="earlier").groupby("hadm_id")["icd_code"].agg(list))
        parts[-1].name = name
    notes = read("note/radiology.csv", ["hadm_id", "storetime", "text"], ["storetime"])
    notes = notes[notes["storetime"] <= notes["hadm_id"].map(key["landmark"])]
    parts.append(notes.sort_values("storetime").groupby("hadm_id")["text"].agg("\n\n".join))
    films = read("cxr/mimic-cxr-2.0.0-metadata.csv.gz",
                 ["subject_id", "study_id", "dicom_id", "StudyDate", "StudyTime"])  # fmt: skip
    clock = films["StudyTime"].astype(int).astype(str).str.zfill(6)
    films["time"] = pd.to_datetime(films["StudyDate"].astype(str) + clock, format="%Y%m%d%H%M%S")
    films = films.merge(adm[["subject_id", "hadm_id", "since", "landmark"]], on="subject_id")
    films = films[(films["time"] >= films["since"]) & (films["time"] <= films["landmark"])]
    last = films.sort_values("time").drop_duplicates("hadm_id", keep="last").set_index("hadm_id")
    number = last["subject_id"].astype(str)
    path = "files/p" + number.str[:2] + "/p" + number + "/s" + last["study_id"].astype(str)
    parts.append((path + "/" + last["dicom_id"] + ".jpg").rename("film"))
    return pd.concat(parts, axis=1)


CHILDREN = {"ours": ours, "pandas": pandas, "everything": everything, "by_hand": by_hand}

if __name__ == "__main__":
    np.seterr(all="ignore")
    main()
