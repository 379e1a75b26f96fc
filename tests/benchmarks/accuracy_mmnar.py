"""How well MMNARFusionClassifier does, on real stays and where the truth is known.

Run ``python tests/benchmarks/accuracy_mmnar.py --help`` for the options; README.md says what every
section shows.
"""

# First of all: it sets the number of threads.
# ruff: isort: off
from _common import (
    Cohort, FilledAtRandom, PerTask, Store, Take, finish, one_split, parse, parser, row,
    two_folders,
)  # fmt: skip
import _eicu
# ruff: isort: on

from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats
from scipy.optimize import brentq
from scipy.special import expit, logit, rel_entr
from sklearn.ensemble import HistGradientBoostingClassifier, StackingClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.utils import Bunch

from ehrfuse import (
    Events,
    EventSummary,
    FusionClassifier,
    Image,
    MMNARFusionClassifier,
    MMNARPretrainer,
    Rectifier,
    Tabular,
    Text,
)  # fmt: skip
from ehrfuse._patterns import pattern_labels, presence
from ehrfuse.datasets import fetch_physionet2012, make_ehr
from ehrfuse.datasets.physionet2012 import PANELS, STATIC

SECTIONS = ("p12", "eicu", "ehr", "covid")
MMNAR, FUSION, TREES = "MMNARFusionClassifier", "FusionClassifier", "HistGradientBoosting"


def main():
    """Run the sections asked for and print one table."""
    options = parser(__doc__.splitlines()[0], SECTIONS)
    options.add_argument("--raw-stream", action="store_true", help="p12: the raw stream as well")
    options.add_argument("--models", nargs="+", help="p12: these models and no others, by name")
    args = parse(options)
    run = {"p12": p12, "eicu": eicu, "ehr": simulated, "covid": covid}
    finish(args, [r for section in args.only for r in run[section](args)])


def trees(seed, windows=0):
    """Boosted trees on summary features: the rival that every table here has."""
    return make_pipeline(
        EventSummary(windows=windows),
        HistGradientBoostingClassifier(
            learning_rate=0.03, max_iter=300, max_leaf_nodes=15, min_samples_leaf=30,
            l2_regularization=1.0, max_features=0.3, random_state=seed,
        ),
    )  # fmt: skip


def network(kind, modalities, **params):
    """Function of a seed to an unfitted network."""
    return lambda seed: kind(modalities, random_state=seed, **params)


def ablations(modalities):
    """Name of every part switched off or on, to a function of a seed to the network."""
    parts = {
        "no pattern": {"pattern": False},
        "no auxiliary loss": {"reconstruction_weight": 0.0, "contrastive_weight": 0.0},
        "no modality dropout": {"modality_dropout": 0.0},
        "one member": {"n_members": 1},
        "pretrained": {"pretrained": MMNARPretrainer()},
        "rectifier holdout": {"rectifier": "holdout"},
        "rectifier crossfit": {"rectifier": "crossfit"},
    }
    return {
        f"{MMNAR}({name})": network(MMNARFusionClassifier, modalities, **params)
        for name, params in parts.items()
    }


# ---------------------------------------------------------------- PhysioNet 2012


def p12(args):
    """Hospital death on set A, five folds; or fitted on all of set A, scored on sets B and C."""
    if args.test_data is None:
        data = fetch_physionet2012(args.data)
        keep = slice(None, None, 4) if args.quick else slice(None)
        X, y = data.X.iloc[keep], data.y.iloc[keep]
        folds = 2 if args.quick else 5

        def splits(seed):
            return list(StratifiedKFold(folds, shuffle=True, random_state=seed).split(X, y))

        name = "physionet-2012/set-a" + (", every 4th stay, 2 folds" if args.quick else "")
        return _p12_models(args, _cohort(args, name, "hospital_death", X, y, splits))
    rows = []
    for subset in "bc":
        places = (args.test_data, args.test_data / "physionet-2012")
        if any((place / f"Outcomes-{subset}.txt").exists() for place in places):
            there = fetch_physionet2012(args.test_data, subset)
            X, y, splits = two_folders(fetch_physionet2012(args.data), there)
            name = f"physionet-2012/set-a to set-{subset}"
            rows += _p12_models(args, _cohort(args, name, "hospital_death", X, y, splits))
    return rows


def _cohort(args, name, task, X, y, splits, groups=None):
    return Cohort(name, task, X, y, groups, splits, Store(args.results / "accuracy_mmnar"))


def _p12_models(args, cohort):
    # The raw stream costs most of the time; what it adds is a line of its own.
    modalities = _p12_modalities(stream=False)
    rivals = {
        TREES: trees,
        f"{TREES}+windows": lambda seed: trees(seed, windows=4),
        FUSION: network(FusionClassifier, modalities),
        f"{FUSION}(concat)": network(FusionClassifier, modalities, fusion="concat"),
        MMNAR: network(MMNARFusionClassifier, modalities),
    }
    parts = ablations(modalities)
    if args.quick:
        parts = {n: parts[n] for n in parts if n.endswith(("(no pattern)", "(rectifier holdout)"))}
    if args.raw_stream:
        parts[f"{MMNAR}(raw stream)"] = network(MMNARFusionClassifier, _p12_modalities(stream=True))
    others = {f"{TREES} other seed": lambda seed: trees(seed + 1000)}
    if not args.quick:
        others["stacking with trees"] = lambda seed: _stacking(modalities, seed)
    for name, make in (rivals | parts | others).items():
        if args.models is None or name in args.models:
            cohort.run(name, make, args.seeds)
    averages = {"average with trees": (MMNAR, TREES), "two trees": (TREES, f"{TREES} other seed")}
    for name, both in averages.items():
        if set(both) <= set(cohort.proba):
            cohort.average(name, *both)
    pairs = [
        (MMNAR, FUSION), (MMNAR, f"{FUSION}(concat)"), (MMNAR, TREES), (MMNAR, f"{TREES}+windows"),
        ("stacking with trees", TREES), ("stacking with trees", "two trees"),
        ("average with trees", TREES), ("average with trees", "two trees"),
    ]  # fmt: skip
    pairs += [(part, MMNAR) for part in parts]
    return cohort.score_rows() + cohort.pair_rows(pairs)


def _p12_modalities(stream):
    panels = {name: Events(name, time_unit="h", stream=stream) for name in PANELS}
    return {"static": Tabular(list(STATIC)), **panels}


def _stacking(modalities, seed):
    """Logistic regression on the log-odds of both, learned on three inner folds."""
    return StackingClassifier(
        [("trees", trees(seed)), ("mmnar", MMNARFusionClassifier(modalities, random_state=seed))],
        make_pipeline(FunctionTransformer(logit), LogisticRegression()),
        cv=StratifiedKFold(3, shuffle=True, random_state=seed),
        stack_method="predict_proba",
    )


# ---------------------------------------------------------------- eICU demo


def eicu(args):
    """Hospital death and later unit stay, two tasks of one model, patients on one side."""
    here = _eicu.load(_eicu.find(args.data))
    if args.test_data is None:
        keep = slice(None, None, 2) if args.quick else slice(None)
        X, y, groups = here.X.iloc[keep], here.y.iloc[keep], here.groups[keep]
        folds = 2 if args.quick else 5

        def splits(seed):
            cut = GroupKFold(folds, shuffle=True, random_state=seed)
            return list(cut.split(X, y, groups))

        name = "eicu-crd-demo" + (", every 2nd stay, 2 folds" if args.quick else "")
    else:
        folder = _eicu.find(args.test_data)
        if folder is None:
            return []
        there = _eicu.load(folder)
        X, y, splits = two_folders(here, there)
        groups, name = np.concatenate([here.groups, there.groups]), "eicu-crd-demo to test"
    cohort = _cohort(args, name, "two tasks", X, y, splits, groups)
    return _eicu_models(args, cohort, here.modalities)


def _eicu_models(args, cohort, modalities):
    structured = {**modalities, "note": "drop"}
    text = {"note": modalities["note"]}
    columns = [c for m in list(modalities.values())[:-1] for c in np.atleast_1d(m.columns)]
    words, late = "TF-IDF + logistic regression", "late fusion of trees and TF-IDF"
    fused = {"groups": "uniquepid"}
    models = {
        f"{TREES}(structured)": lambda seed: PerTask(make_pipeline(Take(columns), trees(seed))),
        words: lambda seed: PerTask(_words()),
        MMNAR: network(MMNARFusionClassifier, modalities, **fused),
        f"{MMNAR}(structured only)": network(MMNARFusionClassifier, structured, **fused),
        f"{MMNAR}(text only)": network(MMNARFusionClassifier, text, **fused),
        FUSION: network(FusionClassifier, modalities, **fused),
    }
    for name, make in models.items():
        cohort.run(name, make, args.seeds)
    cohort.average(late, f"{TREES}(structured)", words)
    cohort.average(f"{MMNAR} averaged with late fusion", MMNAR, late)
    pairs = [(MMNAR, other) for other in (*list(models)[3:], late, f"{TREES}(structured)", words)]
    pairs += [(f"{MMNAR} averaged with late fusion", late)]
    return cohort.score_rows() + cohort.pair_rows(pairs)


def _words():
    return make_pipeline(
        Take("note"),
        TfidfVectorizer(min_df=3, ngram_range=(1, 2), sublinear_tf=True),
        LogisticRegression(C=3.0, max_iter=2000),
    )


# ---------------------------------------------------------------- simulated records


def simulated(args):
    """Distance to the best possible prediction, and the rectifier where the offsets are known."""
    n_worlds = 2 if args.quick else 5
    sizes = (1000, 2000) if args.quick else (4000, 8000)
    worlds = [100 * seed + i for seed in args.seeds for i in range(n_worlds)]
    strengths = (0, 4) if args.quick else (0, 1, 2, 4)
    return _distances(args, worlds, strengths, sizes) + _rectified(args, worlds, sizes)


SIMULATED = ("labs", "note", "cxr")  # beside the vitals; the cheap ones


def _world(world, n_train, n_test, **options):
    """Records of patients of one row each, and where the training rows end."""
    return make_ehr(
        n_train + n_test, modalities=list(SIMULATED), rows_per_patient=1, random_state=world,
        as_bunch=True, **options,
    )  # fmt: skip


def _distances(args, worlds, strengths, sizes):
    """Excess log-loss and squared distance to the oracle, by strength, and their slopes."""
    found = []
    store = Store(args.results / "accuracy_mmnar")
    for world in worlds:
        for strength in strengths:
            data = _world(world, *sizes, strength=strength)
            models = {
                MMNAR: MMNARFusionClassifier(data.modalities, random_state=world),
                f"{MMNAR}(no pattern)": MMNARFusionClassifier(
                    data.modalities, pattern=False, random_state=world
                ),
                FUSION: FusionClassifier(data.modalities, random_state=world),
                # Nothing that it reads tells a cell that was there from one that was not.
                f"{FUSION}(blind: holes filled at random)": make_pipeline(
                    FilledAtRandom(random_state=world),
                    FusionClassifier(data.modalities, random_state=world),
                ),
            }
            name = f"make_ehr/{sizes[0]}/{strength}"
            y, splits = pd.Series(data.y), one_split(*sizes)
            cohort = Cohort(name, "y", data.X, y, None, splits, store)
            for name, model in models.items():
                cohort.run(name, lambda seed, m=model: m, [world])
                p = cohort.proba[name][0, sizes[0] :, 0]
                found.append((world, strength, name, *_distance(data.oracle[sizes[0] :], p)))
            # What looking away from the pattern costs at the least.
            blind = _distance(data.oracle[sizes[0] :], data.oracle_no_pattern[sizes[0] :])
            found.append((world, strength, "oracle without the pattern", *blind))
    columns = ["world", "strength", "model", "excess_log_loss", "squared_distance"]
    return _distance_rows(pd.DataFrame(found, columns=columns), sizes[1])


def _distance(oracle, p):
    """Expected log-loss above the oracle's (no noise of labels in it), and squared distance."""
    p = np.clip(p, 1e-7, 1 - 1e-7)
    excess = rel_entr(oracle, p) + rel_entr(1 - oracle, 1 - p)
    return float(excess.mean()), float(((oracle - p) ** 2).mean())


def _distance_rows(found, n):
    """Mean over the simulated worlds with a t interval, and the slope over strength."""
    worlds = sorted(found["world"].unique())
    rows = []
    for metric in ("excess_log_loss", "squared_distance"):
        slopes = {}
        for model, part in found.groupby("model", sort=False):
            table = part.pivot(index="world", columns="strength", values=metric)
            for strength in table:
                values = table[strength].to_numpy()
                rows.append(_mean_row(f"strength {strength}", model, metric, values, n, worlds))
            slopes[model] = np.polyfit(table.columns.to_numpy(float), table.to_numpy().T, 1)[0]
        for model, slope in slopes.items():
            rows.append(_mean_row("slope over strength", model, metric, slope, n, worlds))
        for other in list(slopes)[1:]:
            rows.append(_mean_row(
                "slope over strength", f"{other} - {MMNAR}", f"{metric}_difference",
                slopes[other] - slopes[MMNAR], n, worlds,
            ))  # fmt: skip
    return sorted(rows, key=lambda r: r["task"])


def _mean_row(task, model, metric, values, n, worlds):
    """Mean and sd over simulated worlds; the interval is the t interval of the mean."""
    values = np.asarray(values)
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    mean, sd = values.mean(), values.std()
    return row("make_ehr", task, model, metric, mean, sd, n, mean - half, mean + half, worlds)


def _rectified(args, worlds, sizes):
    """The rectifier around a model that cannot see the pattern, with and without planted offsets.

    Everything is missing completely at random; the model reads the vitals alone, which everybody
    has, so that what a pattern adds to the log-odds is all that the rectifier can find.
    """
    worlds = [10 * world + i for world in worlds for i in range(1 if args.quick else 4)]
    rows = []
    for effect in (0.0, 1.0):
        found = pd.DataFrame([_rectify_once(world, effect, sizes) for world in worlds])
        for metric in found:
            rows.append(_mean_row(
                f"pattern_effect {effect:g}", "Rectifier(logistic regression on vitals)", metric,
                found[metric].dropna(), sizes[1], worlds,
            ))  # fmt: skip
    return rows


def _rectify_once(world, effect, sizes):
    """Offsets found against those planted, and what they do to the Brier score of other rows."""
    data = _world(world, *sizes, missing="mcar", pattern_effect=effect)
    train, test = np.arange(sizes[0]), np.arange(sizes[0], sum(sizes))
    plain = make_pipeline(
        Take(["age", "heart_rate"]), SimpleImputer(), StandardScaler(), LogisticRegression()
    )
    X, y = data.X.iloc[train], data.y[train]
    before = plain.fit(X, y).predict_proba(data.X.iloc[test])[:, 1]
    rectifier = Rectifier(plain, data.modalities, random_state=world).fit(X, y)
    after = rectifier.predict_proba(data.X.iloc[test])[:, 1]
    oracle = data.oracle[test]
    # Against the oracle, not the labels: the same in expectation, without their noise.
    gain = ((after - oracle) ** 2).mean() - ((before - oracle) ** 2).mean()
    labelled = ((after - data.y[test]) ** 2).mean() - ((before - data.y[test]) ** 2).mean()
    scores = {"brier_difference": labelled, "expected_brier_difference": gain}
    return scores | _offsets(rectifier, data, test, before, effect)


def _offsets(rectifier, data, test, p, effect):
    """Fitted offsets against the planted ones and against those that are right for this model."""
    labels = pattern_labels(presence(data.X.iloc[test], data.modalities))
    rows = pd.DataFrame({"pattern": labels, "p": p, "oracle": data.oracle[test],
                         "planted": data.pattern_offset[test]})  # fmt: skip
    by = rows.groupby("pattern")
    true = by[["p", "oracle"]].apply(_true_tau)
    truth = pd.DataFrame({"planted": by["planted"].first(), "true": true})
    table = rectifier.table_.set_index("pattern").join(truth, how="inner")
    weight = table["n"] / table["n"].sum()
    found = {
        "rmse_tau": np.sqrt(weight @ (table["tau"] - table["true"]) ** 2),
        "rmse_no_tau": np.sqrt(weight @ table["true"] ** 2),
    }
    if effect:
        found["correlation_planted"] = _correlation(table["tau"], table["planted"], weight)
        found["correlation_true"] = _correlation(table["tau"], table["true"], weight)
    return found


def _true_tau(part):
    """The offset with which a pattern's mean prediction is its mean true risk."""
    base, risk = logit(part["p"].to_numpy()), part["oracle"].mean()
    return brentq(lambda tau: expit(base + tau).mean() - risk, -10, 10)


def _correlation(a, b, weight):
    a, b = a - weight @ a, b - weight @ b
    return (weight @ (a * b)) / np.sqrt((weight @ a**2) * (weight @ b**2))


# ---------------------------------------------------------------- COVID chest films


COVID_TASKS = {
    "died": ("survival", "N"),
    "went_icu": ("went_icu", "Y"),
    "intubated": ("intubated", "Y"),
    "oxygen": ("needed_supplemental_O2", "Y"),
}
COVID_NUMBERS = (
    "age", "offset", "temperature", "pO2_saturation", "leukocyte_count", "neutrophil_count",
    "lymphocyte_count",
)  # fmt: skip
COVID_TABLE = (*COVID_NUMBERS, "sex", "view", "modality")


def covid(args):
    """Table, note and film with holes in all three, four outcomes with unknown labels."""
    here = _covid(args.data)
    if args.test_data is None:
        X, y, groups = here.X, here.y, here.groups
        folds = 2 if args.quick else 5

        def splits(seed):
            cut = GroupKFold(folds, shuffle=True, random_state=seed)
            return list(cut.split(X, y, groups))

        name = "covid-cxr" + (", 2 folds" if args.quick else "")
    else:
        if not (args.test_data / "covid-cxr" / "metadata.csv.gz").exists():
            return []
        there = _covid(args.test_data)
        X, y, splits = two_folders(here, there)
        groups, name = np.concatenate([here.groups, there.groups]), "covid-cxr to test"
    cohort = _cohort(args, name, "four outcomes", X, y, splits, groups)
    models = {
        MMNAR: network(MMNARFusionClassifier, here.modalities, groups="patientid"),
        FUSION: network(FusionClassifier, here.modalities, groups="patientid"),
    }
    for model, make in models.items():
        cohort.run(model, make, args.seeds)
    pairs = cohort.pair_rows([(MMNAR, FUSION)], ["auroc"])
    return cohort.score_rows() + cohort.macro_rows() + pairs


def _covid(folder):
    """Rows are films; many have no file, a third no note, most lack most laboratory values."""
    folder = Path(folder).resolve() / "covid-cxr"
    X = pd.read_csv(folder / "metadata.csv.gz")
    known = {task: X[column].isin(["Y", "N"]) for task, (column, _) in COVID_TASKS.items()}
    y = {task: (X[column] == yes).astype(float) for task, (column, yes) in COVID_TASKS.items()}
    y = pd.DataFrame(y).where(pd.DataFrame(known))
    for column in COVID_NUMBERS:  # a few cells are ranges or lists of values: read as unknown
        X[column] = pd.to_numeric(X[column], errors="coerce")
    # Whole paths, so that the films of two folders can stand in one frame.
    X["image_file"] = X["image_file"].map(lambda name: str(folder / name), na_action="ignore")
    modalities = {
        "table": Tabular(list(COVID_TABLE)),
        "notes": Text("clinical_notes"),
        "film": Image("image_file"),
    }
    return Bunch(X=X, y=y, groups=X["patientid"].to_numpy(), modalities=modalities)


if __name__ == "__main__":
    main()
