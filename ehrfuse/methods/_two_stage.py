"""The parts of two cross-fitted stages: structured features, readers of notes, the second stage."""

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.special import expit, logit
from sklearn.base import BaseEstimator, TransformerMixin, clone
from sklearn.compose import ColumnTransformer
from sklearn.decomposition import TruncatedSVD
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.impute import SimpleImputer
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import precision_recall_curve, roc_curve
from sklearn.model_selection import (
    GroupKFold,
    KFold,
    StratifiedGroupKFold,
    StratifiedKFold,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from ehrfuse import _hub
from ehrfuse._runtime import import_optional
from ehrfuse.modalities import Events, EventSummary, Visits

KNOWLEDGE_WEIGHT = 0.3  # of its words beside those of the notes, in stage 1
MIN_ROWS, RARE = 5, "~(rare)"  # rows that must share a category, and the name of the others' column
EDGE = 1e-6  # probabilities are kept this far from 0 and 1 before their log-odds are taken


# ---------------------------------------------------------------- structured features


class StructuredFeatures(TransformerMixin, BaseEstimator):
    """Tables, labs, event streams and visits as numbers, NaN where nothing is known.

    Numbers as they are; categories one by one; of streams the statistics of `EventSummary`; of
    visits their number, the latest numbers and which codes there were. And what is there at all.

    Parameters
    ----------
    modalities : dict of str to Modality
    """

    def __init__(self, modalities):
        self.modalities = modalities

    def fit(self, X, y=None):
        """Learn categories and codes from training rows."""
        self.readers_ = {}
        for name, modality in self.modalities.items():
            if isinstance(modality, Events):
                summary = EventSummary(
                    modality.columns_, max_codes=modality.max_codes, now=modality.now,
                    min_count=modality.min_count, remainder="drop",
                )  # fmt: skip
                self.readers_[name] = summary.fit(X[modality.columns_])
            elif not isinstance(modality, Visits):
                self.readers_[name] = _Table().fit(X[modality.columns_])
        return self

    def transform(self, X):
        """Compute the numbers."""
        parts = []
        for name, modality in self.modalities.items():
            if isinstance(modality, Visits):
                parts.append(_visit_numbers(name, modality, X))
            else:
                table = self.readers_[name].transform(X[modality.columns_])
                parts.append(table.astype("float64"))
            if len(self.modalities) > 1 or len(modality.columns_) == 1:
                here = X[modality.columns_].notna().any(axis=1) & modality.seen_
                parts.append(here.astype("float64").rename(f"{name}__present").to_frame())
        return pd.concat(parts, axis=1) if parts else pd.DataFrame(index=X.index)


class _Table(TransformerMixin, BaseEstimator):
    """Numeric columns as they are, other columns one by one per category."""

    def fit(self, X, y=None):
        seen = [c for c in X if X[c].notna().any()]  # what no row had stays absent
        self.numeric_ = [c for c in seen if pd.api.types.is_numeric_dtype(X[c].dtype)]
        self.words_ = [c for c in seen if c not in self.numeric_]
        self.encoder_ = None
        if self.words_:
            self.common_ = {c: _common(words) for c, words in self._words(X).items()}
            self.encoder_ = OneHotEncoder(handle_unknown="ignore", sparse_output=False)
            self.encoder_.fit(self._as_words(X))
        return self

    def transform(self, X):
        parts = [_numbers(X[self.numeric_])]
        if self.encoder_ is not None:
            found = self.encoder_.transform(self._as_words(X))
            names = self.encoder_.get_feature_names_out(self.words_)
            parts.append(pd.DataFrame(found, columns=names, index=X.index))
        return pd.concat(parts, axis=1)

    def _words(self, X):
        table = X[self.words_].astype(object)
        return table.where(table.notna(), "(none)").astype(str)

    def _as_words(self, X):
        """Rare words as one; the encoder would keep them, and with them what one patient said."""
        return pd.DataFrame({
            c: words.where(words.isin(self.common_[c]), RARE)
            for c, words in self._words(X).items()
        })  # fmt: skip


def _common(words):
    return words.value_counts().loc[lambda count: count >= MIN_ROWS].index.tolist()


def _numbers(table):
    columns = {}
    for name in table:
        try:
            columns[name] = table[name].to_numpy(dtype="float64", na_value=np.nan)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"Column {name!r} held numbers in fit, now {table[name].dtype}; convert it."
            ) from error
        if np.isinf(columns[name]).any():
            raise ValueError(
                f"Column {name!r} holds infinity; replace it by a finite number or null."
            )
    return pd.DataFrame(columns, index=table.index)


def _visit_numbers(name, modality, X):
    """Number of visits, age of the last, its numbers, and how often every code stands in them."""
    block = modality.transform(X)
    n = len(block.present)
    _, offsets = block.ragged["time"]
    count = np.diff(offsets)
    last = np.maximum(offsets[1:] - 1, 0)
    columns = {f"{name}__n_visits": count.astype(float)}
    for part, names in (("time", ["last_visit"]), ("numbers", modality.numeric_fields_)):
        flat = np.asarray(block.ragged[part][0], dtype=float)
        flat = flat[:, None] if flat.ndim == 1 else flat
        for j, field in enumerate(names):
            values = np.full(n, np.nan)
            if len(flat):
                values = np.where(count > 0, flat[np.minimum(last, len(flat) - 1), j], np.nan)
            columns[f"{name}__{field}"] = values
    if "code" in block.ragged:
        code, code_offsets = block.ragged["code"]
        row = np.repeat(np.arange(n), np.diff(code_offsets))
        table = np.zeros((n, len(modality.codes_)))
        np.add.at(table, (row, code), 1.0)
        columns |= {f"{name}__{c}": table[:, j] for j, c in enumerate(modality.codes_)}
    return pd.DataFrame(columns, index=X.index)


# ---------------------------------------------------------------- readers of notes


class Words(TransformerMixin, BaseEstimator):
    """TF-IDF of one column of text; zeros where no word is common enough.

    Parameters
    ----------
    min_count, max_words : int
    """

    def __init__(self, min_count=3, max_words=20_000):
        self.min_count = min_count
        self.max_words = max_words

    def fit(self, X, y=None):
        """Learn words and pairs from training notes."""
        texts = _texts(X)
        self.vectorizer_ = TfidfVectorizer(
            ngram_range=(1, 2), sublinear_tf=True, min_df=self.min_count,
            max_features=self.max_words,
        )  # fmt: skip
        try:
            self.vectorizer_.fit(texts)
        except ValueError:  # no word is common enough, or there are fewer texts than that
            self.vectorizer_ = None
        return self

    def transform(self, X):
        """Weights, sparse."""
        texts = _texts(X)
        if self.vectorizer_ is None:
            return np.zeros((len(texts), 1))  # scikit-learn refuses tables without a column
        return self.vectorizer_.transform(texts)


def _texts(X):
    column = X.iloc[:, 0] if isinstance(X, pd.DataFrame) else X
    return column.astype(object).where(column.notna(), "").astype(str).tolist()


class EncodedText(TransformerMixin, BaseEstimator):
    """Mean vector of one column of text from a frozen Hugging Face encoder, zero where empty.

    Parameters
    ----------
    model : str
    cache : path or None
    """

    def __init__(self, model, cache=None):
        self.model = model
        self.cache = cache

    def fit(self, X, y=None):
        """Find the model."""
        info = _hub.inspect_model(self.model)
        self.fingerprint_, self.commit_ = info.fingerprint, info.revision
        return self

    def transform(self, X):
        """Vectors."""
        info = _hub.reopen(self.model, self.commit_, self.fingerprint_)
        texts = _texts(X)
        filled = [i for i, text in enumerate(texts) if text]
        found = np.zeros((len(texts), _hub.text_size(info)))
        if filled:
            vectors, offsets = _hub.encode_texts(
                [texts[i] for i in filled], info, chunk_length=_hub.longest_chunk(info, 256),
                cache=self.cache,
            )  # fmt: skip
            total = np.add.reduceat(vectors, offsets[:-1])
            found[filled] = total / np.diff(offsets)[:, None]
        return found


def linear_reader(notes, knowledge, *, encoder, class_weight, random_state):
    """Logistic regression on words (or vectors) of the notes and of the knowledge.

    `notes` maps a column to its `Text`; `knowledge` is a column or None. Numbers of the retrieval
    go to stage 2 alone: here they are learned by heart.
    """
    parts = [("(one)", Ones(), [*notes, knowledge][:1])]
    for column, text in notes.items():
        if encoder is None:
            parts.append((column, Words(text.min_count, text.max_words), [column]))
        else:
            vectors = make_pipeline(EncodedText(encoder, text.cache), StandardScaler())
            parts.append((column, vectors, [column]))
    if knowledge is not None:
        one = Words(5) if encoder is None else make_pipeline(EncodedText(encoder), StandardScaler())
        parts.append(("(knowledge)", one, [knowledge]))
    model = LogisticRegression(
        C=3.0 if encoder is None else 0.01, max_iter=2000, class_weight=class_weight,
        random_state=random_state,
    )  # fmt: skip
    columns = ColumnTransformer(
        parts, sparse_threshold=1.0, transformer_weights={"(knowledge)": KNOWLEDGE_WEIGHT}
    )
    return make_pipeline(columns, model)


class Ones(TransformerMixin, BaseEstimator):
    """One column of ones, so that a reader of notes without a known word still reads something."""

    def fit(self, X, y=None):
        """Nothing is learned."""
        return self

    def transform(self, X):
        """Ones."""
        return np.ones((len(X), 1))

    def __sklearn_is_fitted__(self):
        return True


class RationaleVectors:
    """Rationales as a few numbers: TF-IDF and its leading directions, from training rows alone."""

    def __init__(self, n_dims, random_state):
        self.n_dims, self.random_state = n_dims, random_state

    def fit(self, texts):
        """Learn words and directions."""
        self.words = Words(3).fit(pd.Series(texts, dtype=object))
        table = self.words.transform(pd.Series(texts, dtype=object))
        n = min(self.n_dims, table.shape[1] - 1, table.shape[0] - 1)
        self.svd = None
        if n >= 1:
            self.svd = TruncatedSVD(n, random_state=self.random_state).fit(table)
        return self

    def transform(self, texts):
        """Numbers (n, n_dims or fewer)."""
        table = self.words.transform(pd.Series(texts, dtype=object))
        return np.zeros((len(texts), 0)) if self.svd is None else self.svd.transform(table)


# ---------------------------------------------------------------- folds


def folds_of(y, groups, n_splits, seed):
    """Folds of known labels: classes in proportion, patients whole, where there are enough."""
    counts = np.unique(y, return_counts=True)[1]
    n_groups = len(y) if groups is None else len(np.unique(groups))
    k = min(n_splits, n_groups)
    if k < 2:
        raise ValueError(
            f"n_splits={n_splits} folds need at least 2 rows (or patients) with a known label; "
            f"there are {n_groups}."
        )
    rows = np.zeros(len(y))
    stratified = counts.min() >= k
    if groups is None:
        kind = StratifiedKFold if stratified else KFold
        return list(kind(k, shuffle=True, random_state=seed).split(rows, y))
    kind = StratifiedGroupKFold if stratified else GroupKFold
    return list(kind(k, shuffle=True, random_state=seed).split(rows, y, groups))


def log_odds(proba):
    """Of two classes one column, of more the centred logarithms."""
    logs = np.log(np.clip(proba, EDGE, 1 - EDGE))
    if proba.shape[1] == 2:
        return logs[:, [1]] - logs[:, [0]]
    return logs - logs.mean(axis=1, keepdims=True)


def aligned(model, proba, n_classes):
    """Columns for all classes, also those that the model's fold lacked."""
    full = np.zeros((len(proba), n_classes))
    full[:, np.asarray(model.classes_, dtype=int)] = proba
    return full


class Constant(BaseEstimator):
    """Stands in where a fold holds one class only."""

    def fit(self, X, y):
        """Remember the class."""
        self.classes_ = np.unique(y)
        return self

    def predict_proba(self, X):
        """Certainty."""
        return np.ones((len(X), 1))


def fit_one(estimator, X, y):
    """A fitted clone, or a constant where there is one class."""
    model = clone(estimator) if len(np.unique(y)) > 1 else Constant()
    return model.fit(X, y)


# ---------------------------------------------------------------- the second stage


class Seen(TransformerMixin, BaseEstimator):
    """The columns of which some training row knows something; boosted trees trip over the rest."""

    def fit(self, X, y=None):
        """Find them."""
        self.kept_ = np.flatnonzero((~np.isnan(X)).any(axis=0))
        self.kept_ = self.kept_ if len(self.kept_) else np.arange(X.shape[1])
        return self

    def transform(self, X):
        """Cut them out."""
        return X[:, self.kept_]


def second_stage(kind, class_weight, seed):
    """The classifier that joins all features."""
    if not isinstance(kind, str):
        estimator = clone(kind)
        names = [n for n in estimator.get_params() if n.split("__")[-1] == "random_state"]
        unset = {n: seed for n in names if estimator.get_params()[n] is None}
        return make_pipeline(Seen(), estimator.set_params(**unset))
    if kind == "hgb":
        trees = HistGradientBoostingClassifier(
            learning_rate=0.05, max_iter=120, max_leaf_nodes=7, min_samples_leaf=20,
            l2_regularization=1.0, max_features=0.3, class_weight=class_weight, random_state=seed,
        )  # fmt: skip
        return make_pipeline(Seen(), trees)
    if kind == "xgboost":
        xgboost = import_optional("xgboost", "boost")
        return xgboost.XGBClassifier(
            n_estimators=200, learning_rate=0.05, max_depth=4, subsample=0.8, colsample_bytree=0.3,
            n_jobs=1, random_state=seed,
        )  # fmt: skip
    if kind == "brf":
        ensemble = import_optional("imblearn.ensemble", "boost")
        forest = ensemble.BalancedRandomForestClassifier(
            n_estimators=300, sampling_strategy="all", replacement=True, bootstrap=False,
            min_samples_leaf=2, random_state=seed,
        )  # fmt: skip
        return make_pipeline(_filled(), forest)
    return make_pipeline(
        _filled(), StandardScaler(),
        LogisticRegression(C=0.1, max_iter=2000, class_weight=class_weight, random_state=seed),
    )  # fmt: skip


def _filled():
    return SimpleImputer(strategy="median", keep_empty_features=True)


class Calibrator:
    """Map of held-out probabilities to rates: Platt's slope and intercept, or isotonic.

    Where held-out rows ask for a slope below zero (a constant model does, since every fold predicts
    the rate of the others) the order is kept and the log-odds are shifted to the observed rate.
    """

    def __init__(self, kind):
        self.kind = kind

    def fit(self, proba, y):
        """Learn from held-out rows."""
        n_classes = proba.shape[1]
        self.maps = []
        if self.kind is None or len(np.unique(y)) < n_classes:
            return self
        columns = [1] if n_classes == 2 else range(n_classes)
        for j in columns:
            hit = (y == j).astype(int)
            if self.kind == "isotonic":
                fitted = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip")
                self.maps.append(fitted.fit(proba[:, j], hit))
            else:
                self.maps.append(_platt(_log_odds(proba[:, j]), hit))
        return self

    def apply(self, proba):
        """Calibrated probabilities."""
        if not self.maps:
            return proba
        if proba.shape[1] == 2:
            p = self._one(self.maps[0], proba[:, 1])
            return np.column_stack([1 - p, p])
        p = np.column_stack([self._one(m, proba[:, j]) for j, m in enumerate(self.maps)])
        return p / np.maximum(p.sum(axis=1, keepdims=True), EDGE)

    def _one(self, fitted, p):
        if self.kind == "isotonic":
            return fitted.predict(p)
        slope, intercept = fitted
        return expit(slope * _log_odds(p) + intercept)


def _log_odds(p):
    return logit(np.clip(p, EDGE, 1 - EDGE))


def _platt(odds, hit):
    """Slope, never below zero, and intercept."""
    fitted = LogisticRegression(C=1e3).fit(odds[:, None], hit)
    slope, intercept = float(fitted.coef_[0, 0]), float(fitted.intercept_[0])
    if slope > 0:
        return slope, intercept
    return 1.0, float(brentq(lambda b: expit(odds + b).mean() - hit.mean(), -50, 50))


def pick_threshold(rule, y, p):
    """Probability from which on a row counts as positive, from held-out rows."""
    if not isinstance(rule, str | tuple | list):
        return float(rule)
    if len(np.unique(y)) < 2:
        return 0.5
    if rule == "youden":
        fpr, tpr, cuts = roc_curve(y, p)
        return float(min(cuts[np.argmax(tpr - fpr)], 1.0))
    if rule == "f1":
        precision, recall, cuts = precision_recall_curve(y, p)
        f1 = 2 * precision * recall / np.maximum(precision + recall, EDGE)
        return float(cuts[np.argmax(f1[:-1])])
    wanted = rule[1]
    _, tpr, cuts = roc_curve(y, p)
    return float(min(cuts[np.argmax(tpr >= wanted)], 1.0))
