"""What the benchmark scripts share: arguments, folds kept on disk, scores, rows and tables."""

import argparse
import ast
import hashlib
import json
import os
import pickle
import platform
import sys
import time
import warnings
from functools import cache
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy is loaded: one thread, one figure
os.environ.setdefault("MKL_NUM_THREADS", "1")

import numpy as np
import pandas as pd
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, TransformerMixin, clone

import ehrfuse
from ehrfuse.evaluation import METRICS, bootstrap_scores, paired_difference

METRIC_NAMES = ("auroc", "auprc", "brier")
ROOT = Path(__file__).resolve().parents[2]


# ---------------------------------------------------------------- arguments


def parser(description, sections=()):
    """The options that every benchmark takes; parse them with `parse`."""
    options = argparse.ArgumentParser(description=description)
    data = Path(os.environ.get("EHRFUSE_DATA") or ROOT.parent / "shared" / "data")
    options.add_argument("--json", type=Path, help="write the rows of the table to this file")
    options.add_argument("--quick", action="store_true", help="a subsample, under three minutes")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--seeds", type=int, nargs="+", help="several seeds, instead of --seed")
    options.add_argument("--data", type=Path, default=data, help="folder of the data sets")
    options.add_argument("--test-data", type=Path, help="folder of other patients: fit on --data")
    options.add_argument("--results", type=Path, default=ROOT / "results", help="finished folds")
    if sections:
        options.add_argument("--only", nargs="+", choices=sections, default=list(sections))
    return options


def parse(options):
    """Parsed arguments with `seeds` filled in; one torch thread, whatever the machine has."""
    args = options.parse_args()
    args.seeds = args.seeds or [args.seed]
    torch.set_num_threads(1)
    Cohort.n_resamples = 500 if args.quick else 2000
    # A network warns of what a frame of real stays always has; a benchmark prints figures.
    warnings.filterwarnings("ignore", category=UserWarning, module="ehrfuse")
    print(machine(), flush=True)
    return args


def machine():
    """One line on what the figures were made with."""
    names = ("ehrfuse", "torch", "scikit-learn", "pandas")
    packages = ", ".join(f"{name} {version(name)}" for name in names)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"# {_processor()}, {os.cpu_count()} cores, {device}; "
        f"Python {platform.python_version()}, {packages}"
    )


def _processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


# ---------------------------------------------------------------- folds kept on disk


class Store:
    """Predictions of finished folds, one .npz each, so that a rerun computes only what is absent.

    A file counts only if the model's parameters, the rows and the package's code are those that
    it was made with; otherwise the fold is computed again.

    Parameters
    ----------
    folder : path
    """

    def __init__(self, folder):
        self.folder = Path(folder)

    def get(self, name, stamp, compute):
        """Predictions from the file `name`, or from `compute()`, and the seconds they took."""
        path = self.folder / f"{_file_name(name)}.npz"
        stamp = _digest(stamp)
        if path.exists():
            with np.load(path) as kept:
                if str(kept["stamp"]) == stamp:
                    return kept["proba"], float(kept["seconds"])
        start = time.perf_counter()
        proba = np.asarray(compute())
        seconds = time.perf_counter() - start
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")  # a killed run leaves no half file under the real name
        with part.open("wb") as file:
            np.savez_compressed(file, proba=proba, stamp=stamp, seconds=seconds)
        part.replace(path)
        return proba, seconds


def _file_name(name):
    return "".join(c if c.isalnum() or c in "-_/." else "_" for c in name)


def _digest(stamp):
    return hashlib.blake2b(repr(stamp).encode(), digest_size=16).hexdigest()


def stamp_of(model, content, *rows):
    """What a prediction depends on: every parameter at any depth, the data, and the code."""
    params = sorted(model.get_params(deep=True).items())
    told = [(key, repr(value)) for key, value in params if not hasattr(value, "get_params")]
    kinds = [(key, type(value).__name__) for key, value in params if hasattr(value, "get_params")]
    found = [hashlib.blake2b(np.ascontiguousarray(r)).hexdigest() for r in rows]
    return type(model).__name__, told, kinds, content, found, _code()


@cache
def _code():
    """Digest of the package's code without its docstrings and comments."""
    digest = hashlib.blake2b()
    for path in sorted(Path(ehrfuse.__file__).parent.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False):
                node.body[0].value.value = ""
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()


DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)


# ---------------------------------------------------------------- out-of-fold predictions


class Cohort:
    """Rows to predict, their labels and patients, and where fitted folds are kept.

    Parameters
    ----------
    dataset, task : str
        As they stand in the table.
    X : DataFrame
    y : Series, or DataFrame with one column per task
    groups : array or None
        Patient of every row, for the bootstrap.
    splits : function of a seed to a list of (train, test)
    store : Store
    """

    n_resamples = 2000  # of the bootstrap

    def __init__(self, dataset, task, X, y, groups, splits, store):
        self.dataset, self.task, self.X, self.y, self.groups = dataset, task, X, y, groups
        self.splits, self.store = splits, store
        self.proba = {}  # model -> array (seeds, rows, tasks)
        self.seeds = []
        self.scored = np.arange(len(X))
        self.content = hashlib.blake2b(pickle.dumps((X, y), protocol=5)).hexdigest()

    @property
    def names(self):
        """Task of every column of y."""
        return list(self.y.columns) if self.y.ndim == 2 else [self.task]

    def run(self, name, make, seeds):
        """Predict every row by a model that did not see it, once per seed; keeps the average too.

        Parameters
        ----------
        name : str
        make : function of a seed to an unfitted classifier
        seeds : list of int
        """
        self.seeds, found, seconds = list(seeds), [], 0.0
        for seed in seeds:
            proba = np.full((len(self.X), len(self.names)), np.nan)
            for fold, (train, test) in enumerate(self.splits(seed)):
                model = make(seed)
                key = f"{self.dataset}/{name}/seed{seed}-fold{fold}"
                stamp = stamp_of(model, self.content, train, test)
                part, took = self.store.get(key, stamp, lambda m=model, a=train, b=test: (
                    self._fit_predict(m, a, b)
                ))  # fmt: skip
                proba[test], seconds = part, seconds + took
            found.append(proba)
            self.scored = np.flatnonzero(~np.isnan(proba[:, 0]))
        self.proba[name] = np.array(found)
        self._say(name, seconds)

    def average(self, name, *parts):
        """The mean of the predictions of others, row by row and seed by seed."""
        self.proba[name] = np.mean([self.proba[part] for part in parts], axis=0)
        self._say(name, 0.0)

    def _labels(self):
        return np.asarray(self.y, dtype=float)

    def _fit_predict(self, model, train, test):
        model.fit(self.X.iloc[train], self.y.iloc[train])
        return positive(model.predict_proba(self.X.iloc[test]), len(self.names))

    def _say(self, name, seconds):
        tasks = []
        for task, p in enumerate(self.proba[name].mean(0)[self.scored].T):
            tasks.append(" ".join(f"{m} {self._score(m, task, p):.4f}" for m in METRIC_NAMES[:2]))
        print(f"  {self.dataset} {name}: {' | '.join(tasks)} ({seconds:.0f} s)", flush=True)

    def _score(self, metric, task, p, rows=None):
        rows = self.scored if rows is None else rows
        labels = self._labels().reshape(len(self.X), -1)[rows, task]
        known = ~np.isnan(labels)
        return float(METRICS[metric](labels[known], p[known]))

    # ------------------------------------------------------------ rows of the table

    def score_rows(self):
        """One row per model, task and metric.

        ``mean`` and ``sd`` are over folds and seeds (over seeds where there is one test set),
        ``lo`` and ``hi`` a patient bootstrap of the predictions averaged over seeds.
        """
        rows = []
        for name, proba in self.proba.items():
            spread = self._by_fold(proba)
            pooled = self._bootstrap(proba.mean(0)[self.scored])
            for task, label in enumerate(self.names):
                for metric in METRIC_NAMES:
                    values = spread[task, metric]
                    found = pooled.loc[(label, metric)]
                    rows.append(self._row(
                        label, name, metric, _mean(values),
                        _sd(values) if len(values) > 1 else None,
                        found["n"], found["lo"], found["hi"],
                    ))  # fmt: skip
        return rows

    def _by_fold(self, proba):
        values = {(t, m): [] for t in range(len(self.names)) for m in METRIC_NAMES}
        for seed, p in zip(self.seeds, proba, strict=True):
            for _, test in self.splits(seed):
                for task, metric in values:
                    values[task, metric].append(self._score(metric, task, p[test, task], test))
        return values

    def _frame(self):
        return pd.DataFrame(self._labels()[self.scored], columns=self.names)

    def _patients(self):
        return None if self.groups is None else np.asarray(self.groups)[self.scored]

    def _bootstrap(self, proba):
        return bootstrap_scores(
            self._frame(), proba, groups=self._patients(), metrics=METRIC_NAMES,
            n_resamples=self.n_resamples, random_state=0,
        )  # fmt: skip

    def pair_rows(self, pairs, metrics=METRIC_NAMES):
        """Rows of differences, a minus b, on the same rows with one paired bootstrap."""
        rows = []
        for a, b in pairs:
            if a not in self.proba or b not in self.proba:
                continue
            both = [self.proba[name].mean(0)[self.scored] for name in (a, b)]
            for metric in metrics:
                found = paired_difference(
                    self._frame(), *both, metric=metric, groups=self._patients(),
                    n_resamples=self.n_resamples, random_state=0,
                )  # fmt: skip
                for label in self.names:
                    r = found.loc[label]
                    rows.append(self._row(
                        label, f"{a} - {b}", f"{metric}_difference", r["difference"], None,
                        r["n"], r["lo"], r["hi"],
                    ))  # fmt: skip
        return rows

    def macro_rows(self):
        """Mean over tasks of the AUROC of all rows, by model; no interval."""
        rows = []
        for name, proba in self.proba.items():
            p = proba.mean(0)[self.scored]
            scores = [self._score("auroc", task, p[:, task]) for task in range(p.shape[1])]
            n = int((~np.isnan(self._labels()[self.scored])).any(1).sum())
            rows.append(self._row("macro", name, "auroc", _mean(scores), None, n, None, None))
        return rows

    def _row(self, task, model, metric, mean, sd, n, lo, hi):
        return row(self.dataset, task, model, metric, mean, sd, n, lo, hi, self.seeds)


def _mean(values):
    """Mean over the folds that hold both classes."""
    values = np.asarray(values)
    return values[~np.isnan(values)].mean() if (~np.isnan(values)).any() else np.nan


def _sd(values):
    values = np.asarray(values)
    return values[~np.isnan(values)].std() if (~np.isnan(values)).any() else np.nan


def one_split(n_train, n_test):
    """Splits of a cohort whose last rows are the test rows, whatever the seed."""
    rows = np.arange(n_train + n_test)
    return lambda seed: [(rows[:n_train], rows[n_train:])]


def two_folders(here, there):
    """X, y and splits of two Bunches: fitted on all of the first, scored on the second."""
    X, y = (pd.concat([here[part], there[part]]) for part in ("X", "y"))
    return X, y, one_split(len(here.X), len(there.X))


def positive(proba, n_tasks):
    """Probability of the positive class, (n, n_tasks), from a predict_proba of either shape."""
    proba = np.asarray(proba)
    return proba[:, [1]] if n_tasks == 1 and proba.shape[1] == 2 else proba


class Take(TransformerMixin, BaseEstimator):
    """Some columns of a frame; one column by name as strings, empty where null.

    Parameters
    ----------
    columns : str or list of str
    """

    def __init__(self, columns):
        self.columns = columns

    def fit(self, X, y=None):
        """Nothing is learned."""
        return self

    def transform(self, X):
        """The columns."""
        one = isinstance(self.columns, str)
        return X[self.columns].fillna("") if one else X[list(self.columns)]

    def __sklearn_is_fitted__(self):
        return True


class FilledAtRandom(TransformerMixin, BaseEstimator):
    """Null cells replaced by those of a random training row, column by column (hot deck).

    Parameters
    ----------
    random_state : int
    """

    def __init__(self, random_state=0):
        self.random_state = random_state

    def fit(self, X, y=None):
        """Keep the cells that are there."""
        self.cells_ = {c: X[c].dropna().to_numpy(dtype=object) for c in X}
        return self

    def transform(self, X):
        """A frame without nulls."""
        rng = np.random.default_rng(self.random_state)
        return X.assign(**{c: self._fill(X[c], cells, rng) for c, cells in self.cells_.items()})

    def _fill(self, column, cells, rng):
        holes = np.flatnonzero(column.isna())
        filled = column.to_numpy(dtype=object, copy=True)
        filled[holes] = cells[rng.integers(len(cells), size=len(holes))]
        return pd.Series(filled, index=column.index).infer_objects()


class PerTask(ClassifierMixin, BaseEstimator):
    """One copy of a classifier per task, each fitted to the rows whose label is known.

    Parameters
    ----------
    estimator : classifier
    """

    def __init__(self, estimator):
        self.estimator = estimator

    def fit(self, X, y):
        """Fit to a frame of labels with NaN where unknown."""
        self.models_ = []
        for task in y:
            known = y[task].notna().to_numpy()
            model = clone(self.estimator)
            self.models_.append(model.fit(X[known], y.loc[known, task].astype(int)))
        return self

    def predict_proba(self, X):
        """Probability of a positive in every task, (n, n_tasks)."""
        return np.column_stack([model.predict_proba(X)[:, 1] for model in self.models_])


# ---------------------------------------------------------------- rows and tables


def row(dataset, task, model, metric, mean, sd, n, lo=None, hi=None, seeds=()):
    """One row of the table and of the JSON file; what is not known is None, never NaN."""
    return {
        "dataset": dataset, "task": task, "model": model, "metric": metric, "mean": _number(mean),
        "sd": _number(sd), "n": int(n), "lo": _number(lo), "hi": _number(hi),
        "seeds": [int(seed) for seed in seeds],
    }  # fmt: skip


def _number(value):
    return None if value is None or not np.isfinite(value) else float(value)


def finish(args, rows):
    """Print all rows, and write them where --json says."""
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    show(rows)
    if not rows:
        sys.exit("Nothing was measured: the data folders asked for are not there.")


def show(rows):
    """Print one line per model, under a heading for every data set and task, differences last."""
    tasks = {}
    for r in rows:
        models = tasks.setdefault((r["dataset"], r["task"]), ({}, {}))
        is_difference = r["metric"].endswith("_difference")
        models[is_difference].setdefault(r["model"], []).append(r)
    for (dataset, task), parts in tasks.items():
        print(f"\n== {dataset}: {task}")
        for models in parts:
            for model, cells in models.items():
                print(f"{model:<50} n {cells[0]['n']:<6}", "  ".join(map(_cell, cells)))
    sys.stdout.flush()


def _cell(r):
    metric = r["metric"].removesuffix("_difference")
    sign = "+" if metric != r["metric"] else ""
    known = [abs(r[key]) for key in ("mean", "lo", "hi") if r[key] is not None]
    digits = 5 if max(known, default=1) < 0.02 else 4
    value = "-" if r["mean"] is None else f"{r['mean']:{sign}.{digits}f}"
    sd = "" if r["sd"] is None else f" sd {r['sd']:.{digits}f}"
    ends = [f"{r[key]:{sign}.{digits}f}" for key in ("lo", "hi") if r[key] is not None]
    return f"{metric} {value}{sd}" + (f" [{', '.join(ends)}]" if ends else "")
