"""Does a note that was there in training help to predict where there is none?

Run ``python tests/benchmarks/accuracy_clip.py --help`` for the options; README.md says what every
section shows. Labels are few, records and notes of all training rows are known; every test row is
predicted from its record alone.
"""

# First of all: it sets the number of threads.
# ruff: isort: off
from _common import Cohort, Store, Take, finish, parse, parser, two_folders
import _diabetes
import _eicu
import _vaers
# ruff: isort: on

import warnings
from functools import cache

import numpy as np
import pandas as pd
from scipy.special import expit
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.compose import make_column_selector, make_column_transformer
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.feature_selection import VarianceThreshold
from sklearn.frozen import FrozenEstimator
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import (
    GridSearchCV,
    GroupKFold,
    StratifiedKFold,
    StratifiedShuffleSplit,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import KBinsDiscretizer, OneHotEncoder, OrdinalEncoder, StandardScaler

from ehrfuse import (
    ClipEHRAligner,
    EventSummary,
    TabNetClassifier,
    TabNetPretrainer,
    TabNetRegressor,
    Tabular,
    Text,
)

SECTIONS = ("vaers", "eicu", "diabetes")
FRACTIONS = (0.01, 0.05, 0.1, 0.25, 1.0)
VARIANTS = (
    "scratch", "masked", "masked_probe", "aligned", "aligned_shuffled", "distilled",
    "distilled_hgb", "hgb", "xgboost",
)  # fmt: skip


def main():
    """Run the sections asked for and print one table."""
    options = parser(__doc__.splitlines()[0], SECTIONS)
    options.add_argument(
        "--folds", type=int, default=3, help="score the first folds of five (default 3)"
    )
    options.add_argument("--fractions", type=float, nargs="+", default=list(FRACTIONS))
    options.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    options.add_argument("--text-model", help="a Hugging Face text model instead of words")
    args = parse(options)
    # The record has columns of few values, whose bins coincide.
    warnings.filterwarnings("ignore", message="Bins whose width are too small")
    run = {"vaers": vaers, "eicu": eicu, "diabetes": diabetes}
    finish(args, [r for section in args.only for r in run[section](args)])


# ---------------------------------------------------------------- few labels, many records


class FewLabels(ClassifierMixin, BaseEstimator):
    """A classifier that sees the labels of a share of its rows; its pretrainer sees all records.

    Parameters
    ----------
    estimator : classifier
    fraction : float
        Share of the rows whose labels are known, drawn within the classes.
    pretrainer : estimator or None
        Fitted once for all fractions.
    shuffle_note : bool
        Whether notes are dealt out anew among the rows: the control.
    seed : int
    """

    def __init__(self, estimator, fraction, pretrainer=None, shuffle_note=False, seed=0):
        self.estimator = estimator
        self.fraction = fraction
        self.pretrainer = pretrainer
        self.shuffle_note = shuffle_note
        self.seed = seed

    def fit(self, X, y):
        """Pretrain on all rows, then fit to those with a label."""
        model = clone(self.estimator)
        if self.pretrainer is not None:
            donor = pretrained_once(Rows(X), repr_of(self.pretrainer), self.shuffle_note, self.seed)
            model.set_params(pretrained=FrozenEstimator(donor))
        rows = labelled(np.asarray(y), self.fraction, self.seed)
        if isinstance(model, Distilled):
            self.model_ = model.fit(X, y, rows)
        else:
            self.model_ = model.fit(X.iloc[rows], y.iloc[rows])
        self.classes_ = self.model_.classes_
        return self

    def predict_proba(self, X):
        """From the record alone: the note is not there."""
        return self.model_.predict_proba(X.drop(columns="narrative"))


class Probe(ClassifierMixin, BaseEstimator):
    """A logistic regression on the record and on what fitted encoders of it give, with few labels.

    Parameters
    ----------
    encoders : list of encoders
        Fitted to all rows, once for all fractions, each with a seed of its own; their vectors
        stand side by side, beside the record.
    table : list of str
        Columns of the record.
    fraction, shuffle_note, seed
        As in `FewLabels`; the notes are shuffled for every encoder that reads them.
    """

    def __init__(self, encoders, table, fraction, shuffle_note=False, seed=0):
        self.encoders = encoders
        self.table = table
        self.fraction = fraction
        self.shuffle_note = shuffle_note
        self.seed = seed

    def fit(self, X, y):
        """Pretrain on all rows, then fit the regression to those with a label."""
        rows, X = Rows(X), X.drop(columns="narrative")
        self.donors_ = []
        for number, encoder in enumerate(self.encoders):
            shuffle = self.shuffle_note and isinstance(encoder, ClipEHRAligner)
            # Far apart, so that no two runs of a table share a draw.
            seed = self.seed + 1000 * number
            self.donors_.append(pretrained_once(rows, repr_of(encoder), shuffle, seed))
        self.record_ = record(X[self.table]).fit(X)
        self.scaler_ = StandardScaler().fit(self._vectors(X))
        known = labelled(np.asarray(y), self.fraction, self.seed)
        self.model_ = LogisticRegression(C=C, max_iter=1000)
        self.model_.fit(self.scaler_.transform(self._vectors(X.iloc[known])), y.iloc[known])
        self.classes_ = self.model_.classes_
        return self

    def _vectors(self, X):
        return np.hstack([self.record_.transform(X), *(d.transform(X) for d in self.donors_)])

    def predict_proba(self, X):
        """From the record alone: the note is not there."""
        X = X.drop(columns="narrative")
        return self.model_.predict_proba(self.scaler_.transform(self._vectors(X)))


def record(table):
    """Columns of the record as a linear model reads them: bins, dummies, and what is missing."""
    number = [c for c in table if pd.api.types.is_numeric_dtype(table[c])]
    many = [c for c in number if table[c].nunique() > 12]
    bins = KBinsDiscretizer(8, encode="onehot-dense", quantile_method="averaged_inverted_cdf")
    return make_column_transformer(
        (OneHotEncoder(handle_unknown="ignore", min_frequency=20, sparse_output=False),
         [c for c in table if c not in number]),
        (make_pipeline(SimpleImputer(strategy="median", add_indicator=True), bins), many),
        (SimpleImputer(strategy="constant", fill_value=-1), [c for c in number if c not in many]),
    )  # fmt: skip


def labelled(y, fraction, seed):
    """Rows whose label is known; at least two of each class."""
    if fraction >= 1:
        return np.arange(len(y))
    share = max(fraction, 4 / max(1, y.sum()))
    cut = StratifiedShuffleSplit(1, train_size=min(share, 0.5), random_state=seed)
    return np.sort(next(cut.split(y, y))[0])


class Rows:
    """A frame by what it holds, so that a pretrainer is fitted to it once."""

    def __init__(self, X):
        self.X, self.key = X, (len(X), int(pd.util.hash_array(X.index.to_numpy()).sum() % 2**62))

    def __hash__(self):
        return hash(self.key)

    def __eq__(self, other):
        return self.key == other.key


PRETRAINERS = {}


def repr_of(pretrainer):
    """Name under which a pretrainer is found again: every parameter of it."""
    name = repr(sorted((k, repr(v)) for k, v in pretrainer.get_params().items()))
    PRETRAINERS[name] = pretrainer
    return name


@cache
def pretrained_once(rows, name, shuffle_note, seed):
    """Fit a pretrainer to the training rows of a fold; the label is not among its columns."""
    X = rows.X
    if shuffle_note:
        order = np.random.default_rng(seed).permutation(len(X))
        X = X.assign(narrative=X["narrative"].to_numpy(dtype=object)[order])
    return clone(PRETRAINERS[name]).set_params(random_state=seed).fit(X)


class Distilled(ClassifierMixin, BaseEstimator):
    """A reader of records that learns what a text classifier says of the notes of all rows.

    Parameters
    ----------
    student : regressor
    """

    def __init__(self, student):
        self.student = student

    def fit(self, X, y, rows):
        """Fit the reader of notes to the labelled rows and the student to its log-odds."""
        reader = make_pipeline(
            Take("narrative"),
            TfidfVectorizer(min_df=2, ngram_range=(1, 2), sublinear_tf=True, max_features=20_000),
            LogisticRegression(C=3.0, max_iter=1000),
        )
        reader.fit(X.iloc[rows], y.iloc[rows])
        told = np.clip(reader.decision_function(X), -8, 8)
        self.model_ = clone(self.student).fit(X, told)
        self.classes_ = np.array([0, 1])
        return self

    def predict_proba(self, X):
        """Probability of both classes."""
        p = expit(self.model_.predict(X))
        return np.column_stack([1 - p, p])


def variants(modalities, table, text, args):
    """Name to a function of fraction and seed to an unfitted classifier."""
    both = {**modalities, "note": text}

    def network(**params):
        return TabNetClassifier(modalities, **params)

    masked, aligner = TabNetPretrainer(modalities), ClipEHRAligner(both)

    def probe(encoder, fraction, seed, **params):
        return Probe(
            [encoder] * (1 if args.quick else N_ENCODERS), table, fraction, seed=seed, **params
        )

    made = {
        "scratch": lambda f, s: FewLabels(network(random_state=s, **WHOLE), f, seed=s),
        "masked": lambda f, s: FewLabels(network(random_state=s, **WHOLE), f, masked, seed=s),
        "masked_probe": lambda f, s: probe(masked, f, s),
        "aligned": lambda f, s: probe(aligner, f, s),
        "aligned_shuffled": lambda f, s: probe(aligner, f, s, shuffle_note=True),
        "distilled": lambda f, s: FewLabels(
            Distilled(TabNetRegressor(modalities, random_state=s)), f, seed=s
        ),
        "distilled_hgb": lambda f, s: FewLabels(
            Distilled(make_pipeline(Take(table), hgb_regressor(s))), f, seed=s
        ),
        "hgb": lambda f, s: FewLabels(make_pipeline(Take(table), hgb(s)), f, seed=s),
        "xgboost": lambda f, s: FewLabels(make_pipeline(Take(table), xgboost(s)), f, seed=s),
    }
    return {name: made[name] for name in args.variants}


# Chosen on seeds from 100: what is aligned keeps its encoders, the others move theirs.
WHOLE = {"max_epochs": 10, "lr": 5e-3}
N_ENCODERS, C = 3, 0.001


def _ordinal():
    """Categories as numbers, each unseen one as missing; whatever is a number stays."""
    words = make_column_selector(dtype_include=[object, "str", "string", "category"])
    encode = OrdinalEncoder(
        handle_unknown="use_encoded_value", unknown_value=np.nan, encoded_missing_value=np.nan
    )
    return make_column_transformer((encode, words), remainder="passthrough")


def _tuned(model, grid, seed):
    inner = StratifiedKFold(3, shuffle=True, random_state=seed)
    return GridSearchCV(model, grid, cv=inner, scoring="neg_log_loss")


def hgb(seed):
    """Boosted trees of scikit-learn, tuned on three inner folds."""
    model = HistGradientBoostingClassifier(
        max_iter=150, l2_regularization=1.0, max_features=0.3, random_state=seed
    )
    grid = {"histgradientboostingclassifier__learning_rate": [0.02, 0.06],
            "histgradientboostingclassifier__max_leaf_nodes": [4, 16],
            "histgradientboostingclassifier__min_samples_leaf": [5, 20]}  # fmt: skip
    # Few labels leave columns of nothing but nulls, which scikit-learn's binning refuses.
    steps = EventSummary(), _ordinal(), VarianceThreshold(), model
    return _tuned(make_pipeline(*steps), grid, seed)


def hgb_regressor(seed):
    """Boosted trees for a number that all rows have: untuned, for it has many rows."""
    model = HistGradientBoostingRegressor(
        max_iter=150, min_samples_leaf=20, max_features=0.3, random_state=seed
    )
    return make_pipeline(EventSummary(), _ordinal(), model)


def xgboost(seed):
    """XGBoost, tuned on three inner folds."""
    from xgboost import XGBClassifier

    model = XGBClassifier(
        n_estimators=150, subsample=0.8, colsample_bytree=0.3, n_jobs=1, random_state=seed
    )
    grid = {"xgbclassifier__learning_rate": [0.02, 0.06], "xgbclassifier__max_depth": [2, 5],
            "xgbclassifier__min_child_weight": [1, 5]}  # fmt: skip
    return _tuned(make_pipeline(EventSummary(), _ordinal(), model), grid, seed)


def curve(args, name, task, data, splits):
    """All variants at all label fractions on one outcome."""
    fractions = [0.1] if args.quick else args.fractions
    table = [c for m in data.modalities.values() if not isinstance(m, Text)
             for c in np.atleast_1d(m.columns)]  # fmt: skip
    tables = {n: m for n, m in data.modalities.items() if not isinstance(m, Text)}
    text = Text("narrative", model=args.text_model) if args.text_model else Text("narrative")
    made = variants(tables, table, text, args)
    rows = []
    for fraction in fractions:
        cohort = Cohort(
            f"{name}/{fraction:g}", f"{task} {fraction:.0%}", data.X, data.y, data.groups, splits,
            Store(args.results / "accuracy_clip"),
        )  # fmt: skip
        for variant, make in made.items():
            cohort.run(variant, lambda seed, m=make, f=fraction: m(f, seed), args.seeds)
        cohort.dataset = name
        if {"aligned", "hgb"} <= set(made):
            cohort.average("aligned+hgb", "aligned", "hgb")
        pairs = [("aligned", v) for v in made if v != "aligned"]
        pairs += [("aligned_shuffled", "masked_probe"), ("aligned+hgb", "hgb")]
        rows += cohort.score_rows() + cohort.pair_rows(pairs, ["auroc", "auprc"])
    return rows


def folds_of(args, data, n_folds=5):
    """Groups on one side; the first `--folds` of the folds."""

    def splits(seed):
        cut = GroupKFold(n_folds, shuffle=True, random_state=seed)
        found = list(cut.split(data.X, data.y, data.groups))
        return found[: 1 if args.quick else args.folds]

    return splits


def thin(data, keep):
    """Leave some of the rows."""
    data.X, data.y = data.X[keep].reset_index(drop=True), data.y[keep].reset_index(drop=True)
    data.groups = data.groups[keep]


def between(here, there):
    """One cohort of two folders: fitted on the first, scored on the second."""
    X, y, splits = two_folders(here, there)
    groups = np.concatenate([here.groups, here.groups.max() + 1 + there.groups])
    here.X, here.y, here.groups = X.reset_index(drop=True), y.reset_index(drop=True), groups
    return here, splits


# ---------------------------------------------------------------- data sets


def vaers(args):
    """Hospital stay after vaccination, from what was known at the onset."""
    folder = _vaers.find(args.data)
    if folder is None:
        return []
    data, name = _vaers.load(folder), "vaers"
    if args.quick:
        name += ", every 4th report, one encoder"
        thin(data, np.arange(len(data.X)) % 4 == 0)
    splits = folds_of(args, data)
    if args.test_data is not None:
        there = _vaers.find(args.test_data)
        if there is None:
            return []
        data, splits = between(data, _vaers.load(there, data.columns))
        name += " to test"
    return curve(args, name, "hospitalised", data, splits)


def eicu(args):
    """Hospital death and later unit stay, from the table of the first 24 hours."""
    folder = _eicu.find(args.data)
    if folder is None:
        return []
    here = _eicu.load(folder)
    there = None
    if args.test_data is not None:
        place = _eicu.find(args.test_data)
        if place is None:
            return []
        there = _eicu.load(place)
    rows = []
    for task in _eicu.TASKS[:1] if args.quick else _eicu.TASKS:
        # It learns which variables were ever measured, to name the columns; no value enters.
        summary = EventSummary().fit(here.X[list(_eicu.PANELS)])
        data, name = _eicu_task(here, task, summary), "eicu-crd-demo"
        if args.quick:
            name += ", every 2nd patient, one encoder"
            thin(data, data.groups % 2 == 0)
        splits = folds_of(args, data)
        if there is not None:
            data, splits = between(data, _eicu_task(there, task, summary))
            name += " to test"
        rows += curve(args, name, task, data, splits)
    return rows


def _eicu_task(data, task, summary):
    """Rows whose label is known, with the panels as columns of one table."""
    from sklearn.utils import Bunch

    known = data.y[task].notna().to_numpy()
    panels = summary.transform(data.X[list(_eicu.PANELS)])
    panels.columns = [f"s{j}" for j in range(panels.shape[1])]
    static = data.X[list(_eicu.STATIC)]
    X = pd.concat([static, panels.set_axis(static.index)], axis=1)
    X["narrative"] = data.X["note"]
    modalities = {"table": Tabular([c for c in X if c != "narrative"]), "note": Text("narrative")}
    groups = pd.factorize(data.groups[known])[0]
    X, y = X[known].reset_index(drop=True), data.y[task][known].astype(int).reset_index(drop=True)
    return Bunch(X=X, y=y, groups=groups, modalities=modalities)


def diabetes(args):
    """Readmission within 30 days; the note is made of columns that the table does not have."""
    folder = _diabetes.find(args.data)
    if folder is None:
        return []
    every, name = 2, "diabetes-130, every 2nd patient"
    if args.quick:
        every, name = 16, "diabetes-130, every 16th patient, one encoder"
    data = _diabetes.load(folder, every=every)
    splits = folds_of(args, data)
    if args.test_data is not None:
        there = _diabetes.find(args.test_data)
        if there is None:
            return []
        data, splits = between(data, _diabetes.load(there))
        name += " to test"
    return curve(args, name, "readmitted_30d", data, splits)


if __name__ == "__main__":
    main()
