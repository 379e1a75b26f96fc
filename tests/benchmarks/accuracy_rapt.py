"""How well RAPT and the sequence baselines do: intensive care, visits, and a simulated cohort.

Run ``python tests/benchmarks/accuracy_rapt.py --help`` for the options; README.md says what every
section shows.
"""

# First of all: it sets the number of threads.
# ruff: isort: off
from _common import (
    Cohort, METRIC_NAMES, Store, finish, parse, parser, row, stamp_of, two_folders,
)  # fmt: skip
import _sequences
# ruff: isort: on

import hashlib
import io
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import logit
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.ensemble import HistGradientBoostingClassifier, StackingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import GroupKFold, KFold, StratifiedKFold, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from ehrfuse import (
    Events,
    EventSummary,
    RAPTClassifier,
    RAPTPretrainer,
    RAPTRegressor,
    SequenceClassifier,
    SequenceRegressor,
    Tabular,
    VisitGAN,
    VisitsToEvents,
)
from ehrfuse.datasets import fetch_physionet2012, make_prenatal
from ehrfuse.datasets.physionet2012 import PANELS, STATIC
from ehrfuse.datasets.prenatal import LAST_WEEK

SECTIONS = ("p12", "c", "e", "diabetes", "mimic", "synpuf", "prenatal")
RAPT, TREES, XGB = "RAPTClassifier", "HistGradientBoosting", "XGBoost"
BASELINES = ("lstm", "transformer", "retain", "tlstm", "dipole", "hitanet", "grud")
TASKS = ("similarity", "masked", "reasonability")
EPOCHS = 20  # on visits without a summary: as many as the baselines have


def main():
    """Run the sections asked for and print one table."""
    options = parser(__doc__.splitlines()[0], SECTIONS)
    options.add_argument("--models", nargs="+", help="only these models, by name or part of it")
    options.add_argument("--n-folds", type=int, help="only the first so many folds")
    options.add_argument(
        "--full", action="store_true", help="all models, stacking, protocols c and e, more patients"
    )
    options.add_argument("--splits", type=Path, help="c: folder of index files, phy12_split*.npy")
    args = parse(options)
    run = {
        "p12": p12, "c": protocol_c, "e": protocol_e, "diabetes": diabetes, "mimic": mimic,
        "synpuf": synpuf, "prenatal": prenatal,
    }  # fmt: skip
    if set(args.only) == set(SECTIONS) and not args.full:
        args.only = [section for section in args.only if section not in ("c", "e")]
    finish(args, [r for section in args.only for r in run[section](args)])


# ---------------------------------------------------------------- models


def trees(seed, now=0.0):
    """Boosted trees on summary features."""
    return make_pipeline(
        Summary(now=now),
        HistGradientBoostingClassifier(
            learning_rate=0.03, max_iter=300, max_leaf_nodes=15, min_samples_leaf=30,
            l2_regularization=1.0, max_features=0.3, random_state=seed,
        ),
    )  # fmt: skip


def xgboost(seed):
    """The other well-known boosted trees, on the same features."""
    from xgboost import XGBClassifier

    return make_pipeline(
        Summary(),
        XGBClassifier(
            n_estimators=300, learning_rate=0.03, max_depth=4, min_child_weight=5, subsample=0.8,
            colsample_bytree=0.3, reg_lambda=1.0, enable_categorical=True, random_state=seed,
            n_jobs=1,
        ),
    )  # fmt: skip


class Summary(TransformerMixin, BaseEstimator):
    """Last, mean, min, max, sd, first, count, slope and time since of every number of a history.

    Columns of visits become events first; a column that names the patient is dropped.

    Parameters
    ----------
    now : float
        Time that time since is measured from.
    """

    def __init__(self, now=0.0):
        self.now = now

    def fit(self, X, y=None):
        """Learn codes and statistics."""
        steps = [VisitsToEvents("visits")] if "visits" in X else []
        self.pipeline_ = make_pipeline(*steps, EventSummary(now=self.now)).fit(self._own(X))
        return self

    def transform(self, X):
        """The table."""
        return self.pipeline_.transform(self._own(X))

    def _own(self, X):
        return X.drop(columns=[c for c in ("patient", "subject_id") if c in X])


def rapt(modalities, seed, *, kind=RAPTClassifier, pretrain=True, tasks=TASKS, augment=None,
         groups=None, **params):  # fmt: skip
    """RAPT with its pretraining, some tasks or none."""
    pretrained = None
    if pretrain:
        shared = {k: v for k, v in params.items() if k not in ("summary", "dropout", "max_epochs")}
        off = {f"{task}_weight": 0.0 for task in TASKS if task not in tasks}
        pretrained = RAPTPretrainer(augment=augment, **shared, **off)
    return kind(modalities, pretrained=pretrained, groups=groups, random_state=seed, **params)


def networks(modalities, groups=None, **epochs):
    """Name to function of a seed: RAPT, its ablations, and the baselines."""

    def of(**params):
        return lambda seed: rapt(modalities, seed, groups=groups, **epochs | params)

    def baseline(name):
        return lambda seed: SequenceClassifier(
            modalities, architecture=name, groups=groups, random_state=seed
        )

    models = {RAPT: of(), f"{RAPT}(no pretraining)": of(pretrain=False)}
    for task in TASKS:
        models[f"{RAPT}(no {task})"] = of(tasks=[t for t in TASKS if t != task])
    models |= {
        f"{RAPT}(plain attention)": of(attention="plain"),
        f"{RAPT}(gap attention)": of(attention="gap"),
        f"{RAPT}(release attention)": of(attention="release"),
        f"{RAPT}(no summary)": of(summary=False, max_epochs=EPOCHS),
        f"{RAPT}(no summary, no pretraining)": of(summary=False, pretrain=False, max_epochs=EPOCHS),
    }
    return models | {f"SequenceClassifier({name})": baseline(name) for name in BASELINES}


def _chosen(models, args):
    """Models by name; --quick takes one of each kind, --full also what takes hours."""
    if args.models:
        exact = set(args.models) & set(models)
        parts = set(args.models) - exact
        return {
            n: m for n, m in models.items() if n in exact or any(part in n for part in parts)
        }  # fmt: skip
    if args.quick:
        keep = (TREES, RAPT, f"{RAPT}(no pretraining)", "SequenceClassifier(grud)")
        return {n: m for n, m in models.items() if n in keep}
    slow = ("attention", "no summary", "stacking", "generated")
    return {n: m for n, m in models.items() if args.full or not any(word in n for word in slow)}


def _run(args, cohort, models, extra=()):
    """Fit the models and give their scores, and the differences to RAPT and to the trees."""
    for name, make in _chosen(models, args).items():
        cohort.run(name, make, args.seeds)
    have = cohort.proba
    if RAPT in have and TREES in have:
        cohort.average("RAPT averaged with trees", RAPT, TREES)
    pairs = [(RAPT, other) for other in have if other != RAPT]
    pairs += [(name, TREES) for name in ("RAPT averaged with trees", *extra)]
    return cohort.score_rows() + cohort.pair_rows(pairs)


def _first_folds(splits, args):
    """The same splits, cut to the first --n-folds."""
    return splits if args.n_folds is None else lambda seed: splits(seed)[: args.n_folds]


def _cohort(args, name, task, X, y, splits, groups=None):
    if args.n_folds:
        name += f", first {args.n_folds} folds"
    store = Store(args.results / "accuracy_rapt")
    return Cohort(name, task, X, y, groups, _first_folds(splits, args), store)


# ---------------------------------------------------------------- PhysioNet 2012


def p12_modalities():
    """Static facts, and one stream of hourly bins for every panel."""
    panels = {name: Events(name, time_unit="h") for name in PANELS}
    return {"static": Tabular(list(STATIC)), **panels}


def _p12_models():
    models = {TREES: trees, XGB: xgboost} | networks(p12_modalities())
    models["stacking with trees"] = _stacking
    return models


def _stacking(seed):
    """Logistic regression on the log-odds of both, learned on three inner folds."""
    return StackingClassifier(
        [("trees", trees(seed)), ("rapt", rapt(p12_modalities(), seed))],
        make_pipeline(FunctionTransformer(logit), LogisticRegression()),
        cv=StratifiedKFold(3, shuffle=True, random_state=seed),
        stack_method="predict_proba",
    )


def p12(args):
    """Protocol A1: death in hospital on set A, five folds; or fitted on A and scored on B and C."""
    if args.test_data is None:
        data = fetch_physionet2012(args.data)
        keep = slice(None, None, 4) if args.quick else slice(None)
        X, y = data.X.iloc[keep], data.y.iloc[keep]
        folds = 2 if args.quick else 5

        def splits(seed):
            return list(StratifiedKFold(folds, shuffle=True, random_state=seed).split(X, y))

        name = "physionet-2012/set-a" + (", every 4th stay, 2 folds" if args.quick else "")
        cohort = _cohort(args, name, "hospital_death", X, y, splits)
        return _run(args, cohort, _p12_models(), ["stacking with trees"])
    rows = []
    for subset in "bc":
        if _has(args.test_data, subset):
            there = fetch_physionet2012(args.test_data, subset)
            X, y, splits = two_folders(fetch_physionet2012(args.data), there)
            name = f"physionet-2012/set-a to set-{subset}"
            cohort = _cohort(args, name, "hospital_death", X, y, splits)
            rows += _run(args, cohort, _p12_models(), ["stacking with trees"])
    return rows


def _has(folder, subset):
    places = (Path(folder), Path(folder) / "physionet-2012")
    return any((place / f"Outcomes-{subset}.txt").exists() for place in places)


def _all_sets(args):
    """X and y of all sets that lie in the folder, in the order a, b, c, and their letters."""
    found = [subset for subset in "abc" if _has(args.data, subset)]
    sets = [fetch_physionet2012(args.data, subset) for subset in found]
    X, y = (pd.concat([data[part] for data in sets]) for part in ("X", "y"))
    if args.quick:
        X, y = X.iloc[::4], y.iloc[::4]
    return X, y, "".join(found) + (", every 4th stay" if args.quick else "")


def protocol_c(args):
    """Five unstratified splits of 80, 10 and 10 % over the stays that have a time series.

    With --splits, the index files of that protocol; else splits by the same rule, seeds 0 to 4.
    Nothing is learned from the validation part.
    """
    X, y, sets = _all_sets(args)
    measured = X[list(PANELS)].notna().any(axis=1).to_numpy()
    X, y = X[measured], y[measured]
    parts = _index_files(args.splits, len(X)) if args.splits else _by_rule(len(X))
    rule = "index files" if args.splits else "by its rule"
    name = f"physionet-2012/sets {sets}, protocol C {rule}"
    cohort = _cohort(args, name, "hospital_death", X, y, lambda seed: parts)
    return _run(args, cohort, _p12_models(), ["stacking with trees"])


def _by_rule(n):
    parts = []
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(n)
        parts.append((order[: int(0.8 * n)], order[int(0.9 * n) :]))
    return parts


def _index_files(folder, n):
    """Training and test rows of every file; the order of the stays is a, b, c by RecordID."""
    parts = []
    for path in sorted(Path(folder).glob("phy12_split*.npy")):
        train, _, test = (np.asarray(part).astype(int) for part in read_object_array(path))
        if max(train.max(), test.max()) >= n:
            raise SystemExit(
                f"{path.name} numbers stays up to {max(train.max(), test.max())}, but there are "
                f"{n}; protocol C needs the sets a, b and c."
            )
        parts.append((train, test))
    if not parts:
        raise SystemExit(f"{str(folder)!r} holds no phy12_split*.npy.")
    return parts


class _ArraysOnly(pickle.Unpickler):
    """Unpickles numpy arrays and refuses everything else: such files could run code."""

    ALLOWED = frozenset({
        ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"), ("numpy", "dtype"),
    })  # fmt: skip

    def find_class(self, module, name):
        """The few names that an array of arrays needs."""
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not part of an array.")
        return super().find_class(module, name)


def read_object_array(path):
    """An .npy file of arrays of unequal length, without running what it holds."""
    raw = io.BytesIO(Path(path).read_bytes())
    version = np.lib.format.read_magic(raw)
    reader = {(1, 0): np.lib.format.read_array_header_1_0,
              (2, 0): np.lib.format.read_array_header_2_0}[version]  # fmt: skip
    reader(raw)
    return _ArraysOnly(raw).load()


def protocol_e(args):
    """One stratified split of 70, 15 and 15 % of all stays, several training seeds."""
    X, y, sets = _all_sets(args)
    rows = np.arange(len(X))
    train, rest = train_test_split(rows, train_size=0.7, stratify=y, random_state=0)
    test = train_test_split(rest, train_size=0.5, stratify=y.iloc[rest], random_state=0)[1]
    name = f"physionet-2012/sets {sets}, protocol E"
    cohort = _cohort(args, name, "hospital_death", X, y, lambda seed: [(train, test)])
    return _run(args, cohort, _p12_models(), ["stacking with trees"])


# ---------------------------------------------------------------- cohorts of visits


def _visits(args, name, task, load, n_folds=5):
    """A cohort of visits, patients on one side of every split."""
    here = load(args.data)
    if here is None:
        return []
    X, y, groups = here.X, here.y, here.groups
    if args.test_data is not None:
        there = load(args.test_data)
        if there is None:
            return []
        X, y, splits = two_folders(here, there)
        groups, name = np.concatenate([groups, there.groups]), f"{name} to test"
    else:
        n_folds = 2 if args.quick else n_folds

        def splits(seed):
            return list(GroupKFold(n_folds, shuffle=True, random_state=seed).split(X, y, groups))

    X, y = X.reset_index(drop=True), y.reset_index(drop=True)
    cohort = _cohort(args, name, task, X, y, splits, groups)
    models = networks(here.modalities, groups="patient", max_epochs=EPOCHS)
    models = {n: m for n, m in models.items() if "summary" not in n}  # there are no events
    return _run(args, cohort, {TREES: trees} | models)


def diabetes(args):
    """Readmission within 30 days, a sample of patients with all their encounters."""
    n = 5_000 if args.full else 1_000 if args.quick else 2_000
    name = f"diabetes-130, {n:,} patients" + (", 2 folds" if args.quick else "")
    return _visits(args, name, "readmitted within 30 days", lambda f: _sequences.diabetes(f, n))


def mimic(args):
    """MIMIC-IV demo: that dated visits run end to end; 100 patients are too few for a claim."""
    name = "mimic-iv-demo" + (", 2 folds" if args.quick else "")
    return _visits(args, name, "readmitted within 30 days", _sequences.mimic4)


def synpuf(args):
    """Negative control: claims in which nothing follows from what was before."""
    n = 4_000 if args.full else 1_000
    name = f"cms-synpuf (synthetic), {n:,} beneficiaries" + (", 2 folds" if args.quick else "")
    return _visits(args, name, "readmitted within 30 days", lambda f: _sequences.synpuf(f, n))


# ---------------------------------------------------------------- simulated prenatal visits


def prenatal(args):
    """The paper's four tasks on simulated women: 0.7, 0.1 and 0.2 in five folds."""
    n = 1_500 if args.full else 300 if args.quick else 600
    tasks = ("hypertension",) if args.quick else ("diabetes", "hypertension", "weekly_risk")
    rows = [r for task in tasks for r in _prenatal_task(args, task, n)]
    return rows + _last_week(args, n)


def _parts(seed, fold, groups):
    """Training, validation and test rows of a fold; a woman is on one side."""
    women = np.unique(groups)
    cut = list(KFold(5, shuffle=True, random_state=seed).split(women))[fold]
    rest, test = (women[part] for part in cut)
    train, validation = train_test_split(rest, test_size=0.125, random_state=seed)
    return [np.flatnonzero(np.isin(groups, part)) for part in (train, validation, test)]


def _simulated(task, n, seed):
    """Women; a quarter of them for one row per week. Worlds are numbered from 1000 up."""
    n = n // 4 if task == "weekly_risk" else n
    return make_prenatal(n, task=task, random_state=1000 + seed, as_bunch=True)


def _prenatal_models(data):
    """The models, and RAPT pretrained on generated women too."""
    few = networks(data.modalities, groups="subject_id", max_epochs=EPOCHS)
    few = {n: m for n, m in few.items() if "summary" not in n}  # there are no events
    few[f"{RAPT}(generated patients too)"] = lambda seed: rapt(
        data.modalities, seed, groups="subject_id", augment=VisitGAN("visits"), max_epochs=EPOCHS
    )
    return {TREES: lambda seed: trees(seed, LAST_WEEK)} | few


def _prenatal_task(args, task, n):
    """AUROC, AUPRC and Brier with intervals, and F1 at a threshold of the validation part."""
    data = _simulated(task, n, args.seeds[0])
    folds = 2 if args.quick else 5
    groups = data.groups

    def splits(seed):
        parts = [_parts(seed, fold, groups) for fold in range(folds)]
        return [(train, np.concatenate([validation, test])) for train, validation, test in parts]

    name = f"make_prenatal, {len(np.unique(groups)):,} women" + (", 2 folds" if args.quick else "")
    cohort = PrenatalCohort(
        name, task, data.X, data.y, groups, _first_folds(splits, args),
        Store(args.results / "accuracy_rapt"), lambda seed, fold: _parts(seed, fold, groups),
    )  # fmt: skip
    for model, make in _chosen(_prenatal_models(data), args).items():
        cohort.run(model, make, args.seeds)
    pairs = [(RAPT, other) for other in cohort.proba if other != RAPT]
    return cohort.score_rows() + cohort.f1_rows() + cohort.pair_rows(pairs)


class PrenatalCohort(Cohort):
    """Predictions of test rows, with those of validation rows kept aside for the threshold."""

    def __init__(self, *args):
        *args, self.parts = args
        super().__init__(*args)
        self.f1 = {}

    def run(self, name, make, seeds):
        """As in `Cohort`; validation rows are taken out again after they gave the threshold."""
        self.seeds, found, self.f1[name] = list(seeds), [], []
        for seed in seeds:
            proba = np.full((len(self.X), 1), np.nan)
            for fold, (train, other) in enumerate(self.splits(seed)):
                model = make(seed)
                key = f"{self.dataset}/{self.task}/{name}/seed{seed}-fold{fold}"
                stamp = stamp_of(model, self.content, train, other)
                part, _ = self.store.get(key, stamp, lambda m=model, a=train, b=other: (
                    self._fit_predict(m, a, b)
                ))  # fmt: skip
                _, validation, test = self.parts(seed, fold)
                proba[test] = part[len(validation) :]
                cut = _best_threshold(self.y.iloc[validation], part[: len(validation), 0])
                self.f1[name].append(f1_score(self.y.iloc[test], proba[test, 0] >= cut))
            found.append(proba)
            self.scored = np.flatnonzero(~np.isnan(proba[:, 0]))
        self.proba[name] = np.array(found)
        self._say(name, 0.0)

    def _by_fold(self, proba):
        values = {(0, metric): [] for metric in METRIC_NAMES}
        for seed, p in zip(self.seeds, proba, strict=True):
            for fold in range(len(self.splits(seed))):
                test = self.parts(seed, fold)[2]
                for _, metric in values:
                    values[0, metric].append(self._score(metric, 0, p[test, 0], test))
        return values

    def f1_rows(self):
        """F1 over folds; the threshold is that of the best F1 on the validation rows."""
        return [
            row(self.dataset, self.task, name, "f1", np.mean(v), np.std(v), len(self.scored),
                seeds=self.seeds)
            for name, v in self.f1.items()
        ]  # fmt: skip


def _best_threshold(y, p):
    cuts = np.unique(p)
    return cuts[np.argmax([f1_score(y, p >= cut) for cut in cuts])]


def _last_week(args, n):
    """The routine measurements of the last visit: RMSE in standard deviations, R2, explained."""
    data = make_prenatal(n, task="outcome", random_state=1000 + args.seeds[0], as_bunch=True)
    store, folds = Store(args.results / "accuracy_rapt"), 2 if args.quick else 5
    content = hashlib.blake2b(pickle.dumps((data.X, data.y), protocol=5)).hexdigest()
    name = f"make_prenatal, {len(data.X):,} women"
    models = {
        "RAPTRegressor": lambda seed: rapt(
            data.modalities, seed, kind=RAPTRegressor, max_epochs=EPOCHS
        ),
        "RAPTRegressor(no pretraining)": lambda seed: rapt(
            data.modalities, seed, kind=RAPTRegressor, pretrain=False, max_epochs=EPOCHS
        ),
    }
    models |= {
        f"SequenceRegressor({a})": lambda seed, a=a: SequenceRegressor(
            data.modalities, architecture=a, random_state=seed
        )
        for a in BASELINES
    }
    if args.quick:
        models = {n: m for n, m in models.items() if "(" not in n or "grud" in n}
    if args.models:
        models = {n: m for n, m in models.items() if any(part in n for part in args.models)}
    rows = []
    for model_name, make in models.items():
        scores = []
        for fold in range(min(folds, args.n_folds or folds)):
            train, _, test = _parts(args.seeds[0], fold, data.groups)
            model = make(args.seeds[0])
            stamp = stamp_of(model, content, train, test)
            key = f"{name}/outcome/{model_name}/seed{args.seeds[0]}-fold{fold}"
            guess, _ = store.get(key, stamp, lambda m=model, a=train, b=test: (
                m.fit(data.X.iloc[a], data.y.iloc[a]).predict(data.X.iloc[b])
            ))  # fmt: skip
            scores.append(_regression(data.y.iloc[test].to_numpy(), guess))
        for metric in scores[0]:
            values = [score[metric] for score in scores]
            mean, sd, n_rows = np.mean(values), np.std(values), len(data.X)
            task, seeds = "outcome of the last visit", args.seeds[:1]
            rows.append(row(name, task, model_name, metric, mean, sd, n_rows, seeds=seeds))
    return rows


def _regression(y, guess):
    """Means over the four measurements, each in its own standard deviation."""
    error, spread = y - guess, y.std(0)
    return {
        "rmse": float(np.mean(np.sqrt((error**2).mean(0)) / spread)),
        "r2": float(np.mean(1 - (error**2).mean(0) / spread**2)),
        "explained_variance": float(np.mean(1 - error.var(0) / spread**2)),
    }


if __name__ == "__main__":
    main()
