"""How well MEDFuseClassifier does on the ten-disease task, and where the truth is known.

Run ``python tests/benchmarks/accuracy_medfuse.py --help`` for the options; README.md says what
every section shows.
"""

# First of all: it sets the number of threads.
# ruff: isort: off
from _common import PerTask, Store, Take, finish, parse, parser, row, stamp_of
import _diseases
# ruff: isort: on

import hashlib
import re

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.feature_selection import VarianceThreshold
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.utils import Bunch

from ehrfuse import Labs, MaskedLabPretrainer, MEDFuseClassifier, NoteSectionizer, Text
from ehrfuse.evaluation import METRICS

SECTIONS = ("eicu", "mimic4", "mimic3", "synthetic")
OURS, TREES = "MEDFuseClassifier", "HistGradientBoosting"
N_BOOT = 1000


def main():
    """Run the sections asked for and print one table."""
    options = parser(__doc__.splitlines()[0], SECTIONS)
    options.add_argument("--text-model", help="a Hugging Face model (frozen), a name or a folder")
    options.add_argument("--inner", type=int, default=3, help="inner fits for thresholds, of 3")
    options.add_argument("--models", nargs="+", help="only these rows of the disease tables")
    args = parse(options)
    args.inner = 1 if args.quick else args.inner
    run = {"eicu": eicu, "mimic4": mimic4, "mimic3": mimic3, "synthetic": synthetic}
    finish(args, [r for section in args.only for r in run[section](args)])


# ---------------------------------------------------------------- models


def models(data, names, seed, args):
    """Name to unfitted classifier of the ten tasks; each chooses thresholds on training rows."""
    note = Text("note", model=args.text_model)
    parts = {"note": note, "labs": Labs(data.labs)}
    pretrainer = MaskedLabPretrainer(random_state=seed)

    def network(**params):
        model = MEDFuseClassifier(
            params.pop("modalities", parts), groups="subject", random_state=seed,
            memory=str(args.results / "pretrained"), **{"pretrained": pretrainer} | params,
        )  # fmt: skip
        return Tuned(model, seed, n_inner=args.inner)

    labs_only = Tuned(PerTask(make_pipeline(Take(data.labs), _trees(seed))), seed)
    words = Tuned(PerTask(_words()), seed)
    found = {
        "keyword": Keywords([_diseases.terms_of(name) for name in names]),
        "TF-IDF + logistic regression": words,
        f"{TREES}(labs)": labs_only,
        "late fusion of trees and TF-IDF": Late(labs_only, words),
        OURS: network(),
        f"{OURS}(text only)": network(modalities=parts | {"labs": "drop"}, pretrained=None),
        f"{OURS}(labs only)": network(modalities=parts | {"note": "drop"}),
        f"{OURS}(no mutual information)": network(mi_weight=0.0, guard_weight=0.0),
        f"{OURS}(no linear path)": network(linear=False),
        f"{OURS}(cross_fit)": network(cross_fit=3),
    }
    kept = args.models or list(found)
    if args.quick:
        kept = ("keyword", "TF-IDF + logistic regression", f"{TREES}(labs)", OURS)
    return {name: model for name, model in found.items() if name in kept}


def _trees(seed):
    model = HistGradientBoostingClassifier(
        learning_rate=0.05, max_iter=100, max_leaf_nodes=8, min_samples_leaf=20,
        l2_regularization=1.0, max_features=0.3, random_state=seed,
    )  # fmt: skip
    # Few rows leave columns of nothing but nulls, which scikit-learn's binning refuses.
    return make_pipeline(VarianceThreshold(), model)


def _words():
    return make_pipeline(
        Take("note"),
        TfidfVectorizer(min_df=3, ngram_range=(1, 2), sublinear_tf=True),
        LogisticRegression(C=3.0, max_iter=2000),
    )


class Keywords(ClassifierMixin, BaseEstimator):
    """1 where a note holds a word that names the disease: no probability, no training.

    Parameters
    ----------
    terms : list of list of str
    """

    def __init__(self, terms):
        self.terms = terms

    def fit(self, X, y):
        """Nothing is learned."""
        self.thresholds_ = np.full(len(self.terms), 0.5)
        return self

    def predict_proba(self, X):
        """0 or 1 by task."""
        notes = X["note"].fillna("").str.lower()
        patterns = ["|".join(rf"(?<!\w){re.escape(t)}(?!\w)" for t in ts) for ts in self.terms]
        return np.column_stack([notes.str.contains(p) for p in patterns]).astype(float)


class Tuned(ClassifierMixin, BaseEstimator):
    """A classifier of several tasks with thresholds of the best F1 on out-of-fold predictions.

    Parameters
    ----------
    estimator : classifier
    random_state : int
    n_inner : int, default=3
        Of the three thirds of the patients, how many are left out in turn.
    """

    def __init__(self, estimator, random_state, n_inner=3):
        self.estimator = estimator
        self.random_state = random_state
        self.n_inner = n_inner

    def fit(self, X, y):
        """The inner fits for the thresholds, split by patient, and one on all rows."""
        self.inner_ = np.full(y.shape, np.nan)
        cut = GroupKFold(3, shuffle=True, random_state=self.random_state)
        for train, test in list(cut.split(X, groups=X["subject"]))[: self.n_inner]:
            model = clone(self.estimator).fit(X.iloc[train], y.iloc[train])
            self.inner_[test] = model.predict_proba(X.iloc[test])
        held_out = ~np.isnan(self.inner_[:, 0])
        self.thresholds_ = thresholds(y[held_out], self.inner_[held_out])
        self.model_ = clone(self.estimator).fit(X, y)
        return self

    def predict_proba(self, X):
        """Of the model on all rows."""
        return self.model_.predict_proba(X)


class Late(ClassifierMixin, BaseEstimator):
    """Mean of two `Tuned` models, its thresholds chosen on the mean of their inner predictions.

    Parameters
    ----------
    one, other : Tuned
    """

    def __init__(self, one, other):
        self.one = one
        self.other = other

    def fit(self, X, y):
        """Fit both."""
        self.models_ = [clone(m).fit(X, y) for m in (self.one, self.other)]
        self.thresholds_ = thresholds(y, np.mean([m.inner_ for m in self.models_], axis=0))
        return self

    def predict_proba(self, X):
        """Mean of both."""
        return np.mean([m.predict_proba(X) for m in self.models_], axis=0)


def thresholds(y, p):
    """Of every task the candidate with the best F1."""
    found = []
    for label, score in zip(y.to_numpy().T, p.T, strict=True):
        candidates = np.unique(np.quantile(score, np.linspace(0.02, 0.99, 98)))
        hit = score[:, None] > candidates
        f1 = 2 * (label @ hit) / np.maximum(hit.sum(0) + label.sum(), 1)
        found.append(candidates[f1.argmax()])
    return np.array(found)


# ---------------------------------------------------------------- the ten-disease task


def eicu(args):
    """Ten disease groups of eICU stays, with the label's own terms in the text and without."""
    data = _diseases.eicu(args.data)
    there = None if args.test_data is None else _diseases.eicu(args.test_data)
    if data is None or (args.test_data is not None and there is None):
        return []
    rows = ten_diseases(data, there, args, masked=False)
    return rows + ten_diseases(data, there, args, masked=True)


def mimic4(args):
    """The same on the MIMIC-IV demo: 100 patients, no notes; that it runs, no claim."""
    return _mimic(args, 4)


def mimic3(args):
    """The same on the MIMIC-III demo."""
    return _mimic(args, 3)


def _mimic(args, version):
    data = _diseases.mimic(args.data, version)
    there = None if args.test_data is None else _diseases.mimic(args.test_data, version)
    if data is None or (args.test_data is not None and there is None):
        return []
    return ten_diseases(data, there, args, masked=False)


def ten_diseases(data, there, args, masked):
    """Scores of all models: per label, macro and micro, mean over folds."""
    name = data.name + (", every 2nd row, one fold" if args.quick else "")
    name += " to test" if there is not None else ""
    task = "ten diseases" + (", label terms masked" if masked else "")
    folds = _folds(data, there, args)
    parts = []
    for seed in args.seeds:
        for number, (X, sets, groups, train, test) in enumerate(folds(seed)):
            names = _diseases.top(sets, train)
            y = _diseases.labels(sets, names)
            if masked:
                terms = [t for disease in names for t in _diseases.terms_of(disease)]
                X = NoteSectionizer(sections=(), hide_terms=tuple(terms)).fit_transform(X)
            made = models(Bunch(labs=data.labs), names, seed, args)
            if "mimic" in data.name:
                made.pop("keyword", None)  # codes have no words to look for
            if masked:
                kept = ("keyword", "TF-IDF + logistic regression", OURS, f"{TREES}(labs)",
                        "late fusion of trees and TF-IDF")  # fmt: skip
                made = {k: made[k] for k in kept if k in made}
            for model_name, model in made.items():
                key = f"{name}/{task}/{model_name}/seed{seed}-fold{number}"
                p, cut = _predict(args, key, model, X, y, train, test)
                parts.append(Bunch(
                    model=model_name, seed=seed, fold=number, names=names, p=p, cut=cut,
                    y=y.iloc[test].to_numpy(), groups=groups[test],
                ))  # fmt: skip
    return _score_rows(name, task, parts, args) if parts else []


def _folds(data, there, args):
    """Function of a seed to (X, sets, groups, train, test); two folders are one fold."""
    keep = np.arange(len(data.X))[:: 2 if args.quick else 1]
    X = data.X.iloc[keep].reset_index(drop=True)
    sets, groups = [data.sets[i] for i in keep], data.groups[keep]
    if there is not None:
        n, X = len(X), pd.concat([X, there.X.reindex(columns=X.columns)], ignore_index=True)
        groups, rows = np.concatenate([groups, there.groups]), np.arange(len(X))
        return lambda seed: [(X, sets + there.sets, groups, rows[:n], rows[n:])]

    def split(seed):
        cut = GroupKFold(2 if args.quick else 3, shuffle=True, random_state=seed)
        found = [(X, sets, groups, a, b) for a, b in cut.split(X, groups=groups)]
        return found[:1] if args.quick else found

    return split


def _predict(args, key, model, X, y, train, test):
    """Probabilities and thresholds, from a finished fold where there is one."""
    store = Store(args.results / "accuracy_medfuse")
    content = hashlib.blake2b(pd.util.hash_pandas_object(X).to_numpy()).hexdigest()
    stamp = stamp_of(model, (content, list(y)), train, test, y.to_numpy())

    def compute():
        fitted = model.fit(X.iloc[train], y.iloc[train])
        return np.vstack([fitted.predict_proba(X.iloc[test]), fitted.thresholds_])

    both, seconds = store.get(key, stamp, compute)
    p, cut = both[:-1], both[-1]
    scores = _scores(y.iloc[test].to_numpy(), p, cut)
    told = ", ".join(f"{name} {value[0]:.3f}" for name, value in scores.items())
    print(f"  {key}: {told} ({seconds:.0f} s)", flush=True)
    return p, cut


def _scores(y, p, cut, weights=None):
    """Macro and micro scores, one of each a resample; labels that a resample lacks do not count."""
    weights = np.ones((1, len(y))) if weights is None else weights
    hit, y = p > cut, y.astype(float)
    true, said, real = weights @ (y * hit), weights @ hit, weights @ y
    there = (real > 0) & (real < weights.sum(1, keepdims=True))
    found = {
        f"macro_{name}": np.nanmean(
            [METRICS[name](a, b, weights) for a, b in zip(y.T, p.T, strict=True)], axis=0
        )
        for name in ("auroc", "auprc")
    }
    f1 = 2 * true / np.maximum(said + real, 1)
    found["macro_f1"] = np.nanmean(np.where(there, f1, np.nan), axis=1)
    true, both = ((part * there).sum(1) for part in (true, said + real))
    return found | {"micro_f1": 2 * true / np.maximum(both, 1)}


def _score_rows(name, task, parts, args):
    rows = []
    kinds = list(dict.fromkeys(part.model for part in parts))
    n = sum(len(part.y) for part in parts if part.model == kinds[0]) // len(args.seeds)
    frame = pd.concat([pd.DataFrame(_scores(part.y, part.p, part.cut)) for part in parts])
    of = np.array([part.model for part in parts])
    resampled = {kind: _resample([p for p in parts if p.model == kind]) for kind in kinds}
    for kind in kinds:
        for metric in frame:
            values = frame.loc[of == kind, metric]
            lo, hi = np.quantile(resampled[kind][metric], [0.025, 0.975])
            rows.append(row(name, task, kind, metric, values.mean(), values.std(ddof=0), n, lo, hi,
                            args.seeds))  # fmt: skip
    for kind in kinds:
        if kind != OURS and OURS in kinds:
            for metric in frame:
                gap = resampled[OURS][metric] - resampled[kind][metric]
                mean = frame.loc[of == OURS, metric].mean() - frame.loc[of == kind, metric].mean()
                rows.append(row(name, task, f"{OURS} - {kind}", f"{metric}_difference", mean, None,
                                n, *np.quantile(gap, [0.025, 0.975]), args.seeds))  # fmt: skip
    return rows + _label_rows(name, task, parts, args)


def _resample(parts):
    """Scores of `N_BOOT` resamples of patients, the same draws for every model; mean over folds."""
    found = []
    for part in parts:
        kinds, place = np.unique(part.groups, return_inverse=True)
        rng = np.random.default_rng(part.fold)
        weights = rng.multinomial(len(kinds), np.full(len(kinds), 1 / len(kinds)), size=N_BOOT)
        found.append(pd.DataFrame(_scores(part.y, part.p, part.cut, weights[:, place])))
    return sum(found) / len(found)


def _label_rows(name, task, parts, args):
    """AUROC and AUPRC of every disease, mean over the folds that count it among their ten."""
    found = []
    for part in parts:
        for j, disease in enumerate(part.names):
            y, p = part.y[:, j], part.p[:, j]
            if 0 < y.sum() < len(y):
                auroc, auprc = roc_auc_score(y, p), average_precision_score(y, p)
                found.append((disease, part.model, auroc, auprc, len(y)))
    frame = pd.DataFrame(found, columns=["disease", "model", "auroc", "auprc", "n"])
    rows = []
    for (disease, kind), part in frame.groupby(["disease", "model"], sort=False):
        for metric in ("auroc", "auprc"):
            values = part[metric]
            rows.append(row(name, f"{task}: {disease}", kind, metric, values.mean(),
                            values.std(ddof=0), part["n"].sum(), seeds=args.seeds))  # fmt: skip
    return rows


# ---------------------------------------------------------------- where the truth is known


def synthetic(args):
    """Labels from the text, from the labs, from both together, and from nothing."""
    rows = []
    n = 500 if args.quick else 2000
    for seed in args.seeds:
        X, y = _world(2 * n, seed)
        parts = {"note": Text("note"), "labs": Labs(list("abcd"))}
        kinds = {
            OURS: parts,
            f"{OURS}(text only)": {"note": parts["note"]},
            f"{OURS}(labs only)": {"labs": parts["labs"]},
        }
        for name, modalities in kinds.items():
            model = MEDFuseClassifier(
                modalities, max_epochs=20, weight_decay=0.01, random_state=seed
            ).fit(X.iloc[:n], y.iloc[:n])
            p = model.predict_proba(X.iloc[n:])
            for k, label in enumerate(y):
                auroc = roc_auc_score(y[label].iloc[n:], p[:, k])
                task = f"labels from {label}"
                rows.append(row("synthetic", task, name, "auroc", auroc, None, n, seeds=[seed]))
    return rows


def _world(n, seed):
    """Notes of eight words, four labs; which words and which labs make which label."""
    rng = np.random.default_rng(seed)
    words = np.array(["cough", "fever", "pain", "clear", "stable", "nausea", "rash", "edema"])
    said, labs = rng.random((n, 8)) < 0.5, rng.normal(size=(n, 4))
    X = pd.DataFrame(labs, columns=list("abcd")).assign(note=[" ".join(words[r]) for r in said])
    y = {
        "text": said[:, 0], "labs": labs[:, 0] > 0, "both": said[:, 1] & (labs[:, 1] > 0),
        "nothing": rng.random(n) < 0.5,
    }  # fmt: skip
    return X, pd.DataFrame(y).astype(float)


if __name__ == "__main__":
    main()
