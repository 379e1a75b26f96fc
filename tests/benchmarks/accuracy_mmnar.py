"""How well MMNARFusionClassifier does, on real stays and where the truth is known.

Run ``python tests/benchmarks/accuracy_mmnar.py --help`` for the options; README.md says what every
section shows.
"""

# ruff: isort: off
from _common import (
    Cohort, PerTask, Store, Take, finish, flat_scores, parse, parser, row, split_in_two, stack,
)  # fmt: skip  (first: it sets the number of threads)
import _eicu
# ruff: isort: on

from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats
from scipy.special import expit, logit, rel_entr
from sklearn.ensemble import HistGradientBoostingClassifier, StackingClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from ehrfuse import (
    Events, EventSummary, FusionClassifier, Image, MMNARFusionClassifier, MMNARPretrainer,
    Rectifier, Tabular, Text,
)  # fmt: skip
from ehrfuse.datasets import fetch_physionet2012, make_ehr

SECTIONS = ("p12", "eicu", "ehr", "covid")
MMNAR, FUSION, TREES = "MMNARFusionClassifier", "FusionClassifier", "HistGradientBoosting"


def main():
    """Run the sections asked for and print one table."""
    args = parse(parser(__doc__.splitlines()[0], SECTIONS))
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
            here, there = fetch_physionet2012(args.data), fetch_physionet2012(args.test_data, subset)
            X, y, splits = split_in_two(here, there)
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
    others = {
        f"{TREES} other seed": lambda seed: trees(seed + 1000),
        "stacking with trees": lambda seed: _stacking(modalities, seed),
    }
    for name, make in (rivals | parts | others).items():
        cohort.run(name, make, args.seeds)
    cohort.average("average with trees", MMNAR, TREES)
    cohort.average("two trees", TREES, f"{TREES} other seed")
    pairs = [
        (MMNAR, FUSION), (MMNAR, f"{FUSION}(concat)"), (MMNAR, TREES), (MMNAR, f"{TREES}+windows"),
        ("stacking with trees", TREES), ("stacking with trees", "two trees"),
        ("average with trees", TREES), ("average with trees", "two trees"),
    ]  # fmt: skip
    pairs += [(part, MMNAR) for part in parts]
    return cohort.score_rows() + cohort.pair_rows(pairs)


def _p12_modalities(stream):
    from ehrfuse.datasets.physionet2012 import PANELS, STATIC

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
        X, y, splits = split_in_two(here, there)
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
            }
            splits = split_in_two_rows(*sizes)
            cohort = Cohort(f"make_ehr/{strength}", "y", data.X, pd.Series(data.y), None, splits, store)
            for name, model in models.items():
                cohort.run(name, lambda seed, m=model: m, [world])
                p = cohort.proba[name][0, sizes[0] :, 0]
                excess, squared = _distance(data.oracle[sizes[0] :], p)
                found.append((world, strength, name, excess, squared))
    columns = ["world", "strength", "model", "excess_log_loss", "squared_distance"]
    return _distance_rows(pd.DataFrame(found, columns=columns), sizes[1])
