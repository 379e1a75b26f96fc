"""How well MaskedLabPretrainer fills holes, and what pretraining is worth to a classifier.

Run ``python tests/benchmarks/accuracy_masked_labs.py --help`` for the options; README.md says what
every section shows.
"""

# First of all: it sets the number of threads.
# ruff: isort: off
from _common import Cohort, Store, finish, one_split, parse, parser, row, stamp_of
import _labs
# ruff: isort: on

import hashlib
import warnings

import numpy as np
import pandas as pd
from scipy import stats
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ehrfuse import Events, EventSummary, Labs, MaskedLabPretrainer, MEDFuseClassifier
from ehrfuse.datasets import fetch_physionet2012
from ehrfuse.datasets.physionet2012 import PANELS

SECTIONS = ("tables", "events", "downstream")
OURS, TREES = "MaskedLabPretrainer", "HistGradientBoosting"
TABLES = {
    "physionet-2012/set-a, last values": _labs.physionet2012,
    "eicu-crd-demo, hours": _labs.eicu,
    "support2": _labs.support2,
}
KINDS = {"random cells": _labs.hide_cells, "whole panels": _labs.hide_panels}
TEST_SHARE = 0.35
TRAIN_ROWS = 2000  # of a table; half as many rows are filled
STREAMS = 400  # stays of the events section
OTHERS = "bca"  # of PhysioNet's three sets, in a folder of test data
PRETRAINED = {}  # one fit a fold, whatever the share of the labels


def main():
    """Run the sections asked for and print one table."""
    options = parser(__doc__.splitlines()[0], SECTIONS)
    options.add_argument("--splits", type=int, default=5, help="splits of the imputation sections")
    options.add_argument("--rows", type=int, default=TRAIN_ROWS, help="training rows of a table")
    options.add_argument("--folds", type=int, default=3, help="of three, run (downstream)")
    args = parse(options)
    warnings.filterwarnings("ignore", category=ConvergenceWarning)
    run = {"tables": tables, "events": events, "downstream": downstream}
    finish(args, [r for section in args.only for r in run[section](args)])


# ---------------------------------------------------------------- holes in tables


def tables(args):
    """Hide cells or whole panels of rows that no imputer has seen, and compare with the truth."""
    rows = []
    for name, load in TABLES.items():
        data, there = load(args.data), None
        if args.test_data is not None:
            there = load(args.test_data, OTHERS)
            name = f"{name} to test"
        if data is None or (args.test_data is not None and there is None):
            continue
        found = []
        for seed in _seeds(args):
            train, test = _parts(data, there, seed, 500 if args.quick else args.rows)
            found += _table_errors(args, name, data.panels, train, test, seed)
        rows += _error_rows(name, found, args)
    return rows


def _seeds(args):
    splits = 1 if args.quick else args.splits
    return [args.splits * seed + i for seed in args.seeds for i in range(splits)]


def _parts(data, there, seed, limit):
    """Training and test rows, no group on both sides; or all of one folder and all of another."""
    rng = np.random.default_rng(seed)
    if there is not None:
        train, test = data.X, there.X.reindex(columns=data.X.columns)
    else:
        kinds = rng.permutation(np.unique(data.groups))
        inside = ~np.isin(data.groups, kinds[: int(TEST_SHARE * len(kinds))])
        train, test = data.X[inside], data.X[~inside]
    if limit is not None and len(train) > limit:
        train = train.sample(limit, random_state=seed)
        test = test.sample(min(len(test), limit // 2), random_state=seed)
    known = train.columns[train.notna().sum() >= _labs.MIN_KNOWN]
    return train[known], test[known]


def _table_errors(args, name, panels, train, test, seed):
    """Errors of every imputer for both kinds of holes, on the same holes."""
    panels = {n: [v for v in p if v in train] for n, p in panels.items()}
    models = _labs.rivals(seed) | {
        OURS: MaskedLabPretrainer({"labs": Labs(list(train))}, random_state=seed)
    }
    store = Store(args.results / "accuracy_masked_labs")
    content = hashlib.blake2b(pd.util.hash_pandas_object(train).to_numpy()).hexdigest()
    found = []
    for model_name, model in models.items():
        stamp = stamp_of(model, content, test.to_numpy())
        kept, seconds = store.get(
            f"{name}/{model_name}/split{seed}", stamp,
            lambda m=model: _impute_all(m, panels, train, test, seed),
        )  # fmt: skip
        print(f"  {name} split {seed} {model_name}: {kept.round(4).tolist()} ({seconds:.0f} s)",
              flush=True)  # fmt: skip
        for kind, (rmse, mae) in zip(KINDS, kept, strict=True):
            found.append((kind, model_name, seed, rmse, mae, len(test)))
    return found


def _impute_all(model, panels, train, test, seed):
    fitted = clone(model).fit(train.copy())
    scale = train.std().to_numpy()
    found = []
    for hide in KINDS.values():
        hidden = hide(test, panels, np.random.default_rng(seed))
        shown = test.mask(hidden)
        fill = fitted.impute if hasattr(fitted, "impute") else fitted.transform
        guess = np.asarray(fill(shown.copy()))
        found.append(_labs.errors(test.to_numpy(), guess, hidden, scale))
    return found


def _error_rows(name, found, args):
    """Mean over splits with a t interval, and differences to the best rival of each kind."""
    columns = ["kind", "model", "seed", "rmse", "mae", "n"]
    frame = pd.DataFrame(found, columns=columns)
    rows = []
    for kind in dict.fromkeys(frame["kind"]):
        part = frame[frame["kind"] == kind]
        for metric in ("rmse", "mae"):
            wide = part.pivot(index="seed", columns="model", values=metric)
            n = int(part["n"].iloc[0])
            for model in dict.fromkeys(part["model"]):
                rows.append(_mean_row(name, kind, model, metric, wide[model], n, wide.index))
            best = wide.drop(columns=OURS).mean().idxmin()
            rows.append(_mean_row(
                name, kind, f"{OURS} - {best}", f"{metric}_difference", wide[OURS] - wide[best],
                n, wide.index,
            ))  # fmt: skip
    return rows


def _mean_row(name, kind, model, metric, values, n, seeds):
    values = np.asarray(values)
    lo = hi = None
    if len(values) > 1:
        half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
        lo, hi = values.mean() - half, values.mean() + half
    return row(name, kind, model, metric, values.mean(), values.std(), n, lo, hi, seeds)


# ---------------------------------------------------------------- holes in streams


def events(args):
    """Hide values of a stream, single ones and whole panels; the rivals that time allows."""
    data = _labs.physionet2012_events(args.data, 200 if args.quick else STREAMS)
    there = None
    if args.test_data is not None:
        there = _labs.physionet2012_events(args.test_data, STREAMS, OTHERS)
    if data is None or (args.test_data is not None and there is None):
        return []
    name = "physionet-2012/set-a, events" + (" to test" if there else "")
    found = []
    for seed in _seeds(args):
        rng = np.random.default_rng(seed)
        if there is None:
            aside = rng.permutation(data.stays)[: int(TEST_SHARE * len(data.stays))]
            train = data.long[~data.long["RecordID"].isin(aside)]
            test = data.long[data.long["RecordID"].isin(aside)]
        else:
            train, test = data.long, there.long
        found += _stream_errors(args, name, data, train, test, seed)
    return _error_rows(name, found, args)


def _stream_errors(args, name, data, train, test, seed):
    store = Store(args.results / "accuracy_masked_labs")
    model = MaskedLabPretrainer(
        {"labs": Events("course", max_events=256)}, use_time=True, batch_size=16, random_state=seed
    )
    test = test.reset_index(drop=True)
    content = hashlib.blake2b(pd.util.hash_pandas_object(train).to_numpy()).hexdigest()
    names = ["mean", "last value", "IterativeImputer", f"{TREES} per column", OURS]
    kept, seconds = store.get(
        f"{name}/split{seed}", stamp_of(model, content, test["value"].to_numpy()),
        lambda: _stream_guesses(model, data, train, test, seed),
    )  # fmt: skip
    print(f"  {name} split {seed}: {kept.round(4).tolist()} ({seconds:.0f} s)", flush=True)
    return [
        (kind, model_name, seed, *kept[i, j], test["RecordID"].nunique())
        for i, kind in enumerate(KINDS)
        for j, model_name in enumerate(names)
    ]


def _stream_guesses(model, data, train, test, seed):
    """Errors (kinds of holes, models, 2)."""
    scale = train.groupby("variable")["value"].std()
    mean = train.groupby("variable")["value"].mean()
    stays = np.sort(train["RecordID"].unique())
    fitted = clone(model).fit(_labs.stream(train, stays, data.variables, train["value"]))
    imputers = [
        imputer.fit(_per_stay(train, train["value"], data.variables))
        for name, imputer in _labs.rivals(seed).items()
        if name in ("IterativeImputer", "HistGradientBoosting per column")
    ]
    found = []
    for hidden in _hidden_events(test, data.panels, seed):
        shown = test["value"].mask(hidden)
        keys = [test["RecordID"], test["variable"]]
        base = test["variable"].map(mean)
        guesses = [base, shown.groupby(keys).ffill().fillna(base)]
        table = _per_stay(test, shown, data.variables)
        for imputer in imputers:
            filled = pd.DataFrame(np.asarray(imputer.transform(table.copy())), table.index,
                                  table.columns).stack()  # fmt: skip
            guesses.append(pd.Series(filled.reindex(pd.MultiIndex.from_arrays(keys)).to_numpy()))
        guesses.append(_our_guess(fitted, data, test, shown))
        found.append([_stream_error(test, guess, hidden, scale) for guess in guesses])
    return np.array(found)


def _per_stay(long, value, variables):
    """Mean of what is shown of a variable in a stay, one row a stay."""
    table = value.groupby([long["RecordID"], long["variable"]]).mean().unstack()
    return table.reindex(columns=variables).astype("float64")


def _hidden_events(test, panels, seed):
    rng = np.random.default_rng(seed)
    yield rng.random(len(test)) < 0.2
    panel = {v: name for name, names in panels.items() for v in names}
    pair = test["RecordID"].astype(str) + test["variable"].map(panel)
    kinds = np.unique(pair)
    yield np.isin(pair, kinds[rng.random(len(kinds)) < 0.3])


def _our_guess(fitted, data, test, shown):
    """Values in the order of `test`, which is that of the stays and of time."""
    stays = np.sort(test["RecordID"].unique())
    filled = fitted.impute(_labs.stream(test, stays, data.variables, shown))
    flat = filled["course"].array._pa_array.combine_chunks().flatten()
    return pd.Series(flat.field("value").to_numpy(zero_copy_only=False).astype("float64"))


def _stream_error(test, guess, hidden, scale):
    e = (guess - test["value"]) / test["variable"].map(scale)
    groups = e[hidden].groupby(test["variable"][hidden])
    groups = [g for _, g in groups if len(g) >= _labs.MIN_KNOWN]
    return np.mean([[np.sqrt((g**2).mean()), g.abs().mean()] for g in groups], axis=0)


# ---------------------------------------------------------------- death, with few labels


class FewLabels(ClassifierMixin, BaseEstimator):
    """A classifier that gets a share of the training labels, and a pretrainer that gets all rows.

    Parameters
    ----------
    estimator : classifier
        Its `pretrained` is replaced by the fitted pretrainer.
    fraction : float
    pretrainer : encoder or None
    as_features : bool
        Give the classifier the embedding instead.
    random_state : int
    """

    def __init__(self, estimator, fraction, pretrainer=None, as_features=False, random_state=0):
        self.estimator = estimator
        self.fraction = fraction
        self.pretrainer = pretrainer
        self.as_features = as_features
        self.random_state = random_state

    def fit(self, X, y):
        """Pretrain on all rows, train on the labelled ones."""
        self.classes_ = np.unique(y)
        rows = np.arange(len(X))
        if self.fraction < 1:
            rows, _ = train_test_split(
                rows, train_size=self.fraction, stratify=y, random_state=self.random_state
            )
        model = clone(self.estimator)
        if self.pretrainer is not None:
            donor = FrozenEstimator(self._pretrain(X))
            if self.as_features:
                model = make_pipeline(donor, model)
            else:
                model.set_params(pretrained=donor)
        self.model_ = model.fit(X.iloc[rows], y.iloc[rows])
        return self

    def _pretrain(self, X):
        key = repr(self.pretrainer), hash(tuple(X.index))
        if key not in PRETRAINED:
            PRETRAINED[key] = clone(self.pretrainer).fit(X)
        return PRETRAINED[key]

    def predict_proba(self, X):
        """Of the model fitted last."""
        return self.model_.predict_proba(X)


def downstream(args):
    """Hospital death from labs and vitals, by share of the labels."""
    X, y, splits = _death(args)
    if X is None:
        return []
    rows = []
    fractions = (0.05, 1.0) if args.quick else (0.01, 0.05, 0.1, 0.25, 1.0)
    name = "physionet-2012/set-a" + (", every 4th stay" if args.quick else "")
    name += "" if args.test_data is None else " to test"
    cohorts = []
    for fraction in fractions:
        store = Store(args.results / "accuracy_masked_labs" / f"labels{fraction:g}")
        task = f"hospital_death, {fraction:.0%} of the labels"
        cohorts.append((fraction, Cohort(name, task, X, y, None, splits, store)))
    for kind in _downstream_models(list(X), 1.0, 0):
        for fraction, cohort in cohorts:  # the pretraining of a fold serves all fractions
            cohort.run(kind, _maker(kind, list(X), fraction), args.seeds)
    scratch, tuned = (f"MEDFuseClassifier(labs, {way})" for way in ("from scratch", "pretrained"))
    for _, cohort in cohorts:
        rows += cohort.score_rows()
        rows += cohort.pair_rows([(tuned, scratch), (tuned, f"{TREES} with flags")])
    return rows


def _death(args):
    """Last value and mean of every variable, deaths, and splits."""
    there = None if args.test_data is None else _subset(args.test_data, OTHERS)
    if _subset(args.data) != "a" or (args.test_data is not None and there is None):
        return None, None, None
    here = fetch_physionet2012(args.data)
    parts = [here]
    if args.test_data is not None:
        parts.append(fetch_physionet2012(args.test_data, there))
    X = pd.concat([part.X for part in parts])[list(PANELS)]
    y = pd.concat([part.y for part in parts])
    summary = EventSummary(statistics=("last", "mean"), remainder="drop").fit(X.iloc[: len(here.X)])
    X, n_here = summary.transform(X).astype("float64"), len(here.X)
    keep = np.arange(n_here)[:: 4 if args.quick else 1]
    if args.test_data is not None:
        rows = np.concatenate([keep, np.arange(n_here, len(X))])
        return X.iloc[rows], y.iloc[rows], one_split(len(keep), len(X) - n_here)
    X, y = X.iloc[keep], y.iloc[keep]
    folds = 2 if args.quick else 3

    def splits(seed):
        cut = StratifiedKFold(folds, shuffle=True, random_state=seed).split(X, y)
        return list(cut)[: args.folds]

    return X, y, splits


def _subset(folder, order="abc"):
    """The first of the three sets that a folder has the outcomes of, or None."""
    places = (folder, folder / "physionet-2012")
    found = [s for s in order if any((p / f"Outcomes-{s}.txt").exists() for p in places)]
    return found[0] if found else None


def _maker(kind, columns, fraction):
    return lambda seed: _downstream_models(columns, fraction, seed)[kind]


def _downstream_models(columns, fraction, seed):
    """Name to unfitted classifier."""
    labs = {"labs": Labs(columns)}
    pretrainer = MaskedLabPretrainer(labs, random_state=seed)
    network = MEDFuseClassifier(labs, random_state=seed)
    trees = HistGradientBoostingClassifier(
        learning_rate=0.03, max_iter=300, max_leaf_nodes=15, min_samples_leaf=30,
        l2_regularization=1.0, max_features=0.3, random_state=seed,
    )  # fmt: skip
    few = {"fraction": fraction, "random_state": seed}
    logistic = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=2000))
    frozen = clone(network).set_params(freeze=("encoders.labs",))
    return {
        f"{TREES} with flags": FewLabels(_Flags(trees), **few),
        "MEDFuseClassifier(labs, from scratch)": FewLabels(network, **few),
        "MEDFuseClassifier(labs, pretrained)": FewLabels(network, pretrainer=pretrainer, **few),
        "MEDFuseClassifier(labs, pretrained, frozen)": FewLabels(
            frozen, pretrainer=pretrainer, **few
        ),
        f"{OURS} + logistic regression": FewLabels(
            logistic, pretrainer=pretrainer, as_features=True, **few
        ),
    }


class _Flags(ClassifierMixin, BaseEstimator):
    """Trees on the table and on what is missing of it."""

    def __init__(self, estimator):
        self.estimator = estimator

    def _with_flags(self, X):
        flags = X.isna().astype(float).add_suffix("__missing")
        whole = pd.concat([X, flags], axis=1)
        return whole[self.columns_] if hasattr(self, "columns_") else whole

    def fit(self, X, y):
        """Fit the trees to the columns that vary: few rows lack whole analytes."""
        vars(self).pop("columns_", None)
        self.classes_ = np.unique(y)
        whole = self._with_flags(X)
        self.columns_ = list(whole.columns[whole.nunique() > 1])
        self.model_ = clone(self.estimator).fit(whole[self.columns_], y)
        return self

    def predict_proba(self, X):
        """Of the trees."""
        return self.model_.predict_proba(self._with_flags(X))


if __name__ == "__main__":
    main()
