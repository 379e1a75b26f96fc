"""MEDFuse: labs and notes, fused by a disentangled transformer (Phan et al.; arXiv:2407.12309).

A text branch and a lab branch (`MaskedLabPretrainer`) are each refined by self-attention; a joint
of both, a Kronecker product, reads them by cross-attention and gives what they share. A bound of
the mutual information keeps the shared part apart from the specific ones, all parts together
predict several diseases. What the text branch may read is prepared in `lab_text.py`.
The network is in `_medfuse`.
"""

import copy
import warnings
from dataclasses import replace
from numbers import Integral, Real
from typing import NamedTuple

import numpy as np
import pandas as pd
from sklearn.base import clone
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from sklearn.utils import check_random_state, check_scalar

from ehrfuse._runtime import check_option
from ehrfuse.base import TorchClassifier, with_progress
from ehrfuse.methods._linear_path import linear_path, solve
from ehrfuse.methods._medfuse import PATH, MEDFuseCore
from ehrfuse.modalities import Embedding, Events, Labs, Tabular, Text
from ehrfuse.modalities._lab_tokens import Tokens, lab_tokens
from ehrfuse.nn.disentangled import JOINTS

SCORE = "note_score_"  # columns of the text model's scores, for the fusion

__all__ = ["MEDFuseClassifier"]


class NoteScores(Tabular):
    """Log-odds that a model of the notes gave: the text branch of a fit in two stages."""

    def __init__(self, columns):
        super().__init__(columns, n_bins=4, dropout=0.0, column_dropout=0.0)


class Rows(NamedTuple):
    """Rows that count, those of weight above 0, for the fits within a fit."""

    X: pd.DataFrame
    y: object  # as it came
    encoded: np.ndarray
    weight: np.ndarray

    def at(self, index):
        """Some of them."""
        y = self.y.iloc[index] if hasattr(self.y, "iloc") else np.asarray(self.y)[index]
        return Rows(self.X.iloc[index], y, self.encoded[index], self.weight[index])


class MEDFuseClassifier(TorchClassifier):
    """Disentangled fusion of notes and labs into one or several diagnoses.

    Parameters
    ----------
    modalities : dict of str to Modality, or None, default=None
        `Text` and `Embedding` are the text branch; `Labs`, `Events` and `Tabular` the other. Either
        branch may be missing, in some rows or in all. None takes all columns as one table.
    d_model : int, default=32
        Width of all tokens.
    n_members : int, default=8
        Last layers trained side by side; their probabilities are averaged.
    n_heads, n_layers : int, default=4 and 1
        Of the self-attention of each branch.
    width, lab_layers : int, default=64 and 3
        Of the transformer that reads `Labs` and `Events`; `MaskedLabPretrainer` calls the second
        ``n_layers``.
    use_time : bool, default=False
        Tell the lab transformer the time since every value of `Events` was drawn.
    joint : {"kron", "lowrank", "none"}, default="kron"
        What asks for the shared part: the outer product of both branches, read as `d_model` tokens;
        16 products of learned projections; or nothing, which leaves the shared part out.
    mi_weight : float, default=0.01
        Weight of the bound of the mutual information of the shared part with the specific ones; 0
        is without.
    mi_steps : int, default=3
        Steps of the bound's own net per step.
    guard_weight : float, default=0.1
        Weight of the guard against a constant shared part.
    modality_dropout : float, default=0.05
        Share of the rows with both branches of which training hides one.
    value_dropout : float, default=0.5
        Share of the values of `Labs` and `Events` that training leaves out of every row, at random;
        as in pretraining, this makes an epoch cheaper too.
    linear : bool, default=True
        Begin with a linear model of the words and values (`Text` and `Embedding`, but no text model
        that is trained; `Labs`, `Events`, `Tabular`): a logistic regression solved on the training
        rows before the first epoch. The network then learns what it leaves over.
    cross_fit : int or None, default=None
        None trains all parts together. A number of folds fits a text model first, and the fusion
        reads its log-odds, for every training row those of a model that has not seen the row, split
        by patient where `groups` is given: a text model is too sure of rows that it was tuned on.
        There are no more folds than patients, and no log-odds of a class that some fold has all of.
        `freeze` then means encoders of the text model by ``"encoders.note"``, if that is its name,
        and by all else parts of the fusion.
    thresholds : {"f1"} or None, default=None
        "f1" chooses for every task the threshold of `predict` with the best F1, rows weighed by
        `sample_weight`, on the validation rows, or, without any, on out-of-fold predictions of
        three further fits, with `cross_fit` of both stages each. None is one half, and so is a task
        without positives to choose by.
    dropout : float, default=0.2
        In the last layers.
    class_weight : dict, "balanced" or None, default=None
        Weights of the classes in the loss; probabilities shift with them.
    pretrained : MaskedLabPretrainer or None, default=None
        Fitted here on the training rows; see `ehrfuse.base.TorchEstimator`.
    pretrained_lr_scale : float, default=0.2
        Multiple of the learning rate for encoders that were taken over.
    max_epochs : int, default=10
        The learning rate falls along a cosine to zero over these epochs.
    batch_size : int or "auto", default=24
        Attention needs more steps than the other networks here; "auto" is a twelfth of the training
        rows, at least 16 and at most 256.
    freeze, lr, weight_decay, patience : optional
        See `ehrfuse.base.TorchEstimator`.
    validation_fraction, groups, memory, checkpoint, amp, random_state, device, verbose : optional
        See `ehrfuse.base.TorchEstimator`.

    Attributes
    ----------
    classes_ : array of shape (n_classes,)
    target_names_ : list of str
        Names of the tasks, if there are several.
    thresholds_ : array of shape (n_tasks,)
        Only with ``thresholds="f1"``.
    modalities_ : dict of fitted Modality
        Not with `cross_fit`: see those of `text_stage_` and `fusion_stage_`.
    module_ : torch module
        Not with `cross_fit`; the networks are then in ``text_stage_`` and ``fusion_stage_``.
    history_ : list of dict
        One entry per epoch; not with `cross_fit`.
    text_stage_, fusion_stage_ : MEDFuseClassifier
        Only with `cross_fit`.

    See Also
    --------
    MaskedLabPretrainer : Pretrains the lab branch.
    LabTextifier : Writes abnormal labs out as text.
    FusionClassifier : The plain baseline.

    Notes
    -----
    Written from the paper's abstract and summaries of it; no code of it is known. Differences
    (marked ``NOTE[DIFF]`` where they stand):

    * the shared part reads the tokens of both branches side by side, not their sum;
    * a branch that a row lacks is one learned token, and training hides branches at random;
    * the collapse guard: without it a constant shared part makes the bound zero;
    * all parts are trained together, or in two stages with out-of-fold scores of the text model;
      the paper tunes the text model on the labels of the rows whose embeddings it then reads;
    * the network begins with a linear model of the same words and values and learns what that
      leaves over, on training rows its log-odds without the row itself (``linear=False`` is the
      paper);
    * training leaves half of the lab values out, at random (``value_dropout=0`` is the paper);
    * the weight of the bound is 0.01 instead of 0.1: here it is a sum over the axes of a token;
    * eight small last layers side by side, whose probabilities are averaged.

    References
    ----------
    Phan et al.: MEDFuse: multimodal EHR data fusion with masked lab-test modeling and large
    language models. CIKM 2024; arXiv:2407.12309.
    Cheng et al.: CLUB: a contrastive log-ratio upper bound of mutual information. ICML 2020.

    Examples
    --------
    >>> from ehrfuse import Labs, MaskedLabPretrainer, MEDFuseClassifier, Text
    >>> from ehrfuse.datasets import make_ehr
    >>> X, y = make_ehr(n_samples=60, random_state=0)
    >>> modalities = {"labs": Labs(["sodium", "lactate"]), "note": Text("note")}
    >>> clf = MEDFuseClassifier(
    ...     modalities, pretrained=MaskedLabPretrainer(max_epochs=2), max_epochs=2, random_state=0
    ... )
    >>> clf.fit(X, y).predict_proba(X).shape
    (60, 2)
    """

    _accepts = (Text, Embedding, Labs, Events, Tabular)

    def __init__(
        self,
        modalities=None,
        *,
        d_model=32,
        n_members=8,
        n_heads=4,
        n_layers=1,
        width=64,
        lab_layers=3,
        use_time=False,
        joint="kron",
        mi_weight=0.01,
        mi_steps=3,
        guard_weight=0.1,
        modality_dropout=0.05,
        value_dropout=0.5,
        linear=True,
        cross_fit=None,
        thresholds=None,
        dropout=0.2,
        class_weight=None,
        pretrained=None,
        pretrained_lr_scale=0.2,
        freeze=(),
        max_epochs=10,
        batch_size=24,
        lr=2e-3,
        weight_decay=1.0,
        patience=None,
        validation_fraction=None,
        groups=None,
        memory=None,
        checkpoint=None,
        amp=False,
        random_state=None,
        device=None,
        verbose=None,
    ):
        super().__init__(
            modalities, pretrained=pretrained, freeze=freeze, max_epochs=max_epochs,
            batch_size=batch_size, lr=lr, weight_decay=weight_decay, patience=patience,
            validation_fraction=validation_fraction, groups=groups, memory=memory,
            checkpoint=checkpoint, amp=amp, random_state=random_state, device=device,
            verbose=verbose,
        )  # fmt: skip
        self.d_model = d_model
        self.n_members = n_members
        self.n_heads = n_heads
        self.n_layers = n_layers
        self.width = width
        self.lab_layers = lab_layers
        self.use_time = use_time
        self.joint = joint
        self.mi_weight = mi_weight
        self.mi_steps = mi_steps
        self.guard_weight = guard_weight
        self.modality_dropout = modality_dropout
        self.value_dropout = value_dropout
        self.linear = linear
        self.pretrained_lr_scale = pretrained_lr_scale
        self.cross_fit = cross_fit
        self.thresholds = thresholds
        self.dropout = dropout
        self.class_weight = class_weight

    def _check_params(self):
        super()._check_params()
        check_option(self.joint, "joint", JOINTS)
        check_option(self.thresholds, "thresholds", ("f1", None))
        for name in ("d_model", "n_members", "n_heads", "width", "lab_layers", "mi_steps"):
            check_scalar(getattr(self, name), name, Integral, min_val=1)
        check_scalar(self.n_layers, "n_layers", Integral, min_val=0)
        for name in ("mi_weight", "guard_weight", "pretrained_lr_scale"):
            check_scalar(getattr(self, name), name, Real, min_val=0)
        for name in ("modality_dropout", "value_dropout", "dropout"):
            check_scalar(
                getattr(self, name), name, Real, min_val=0, max_val=1, include_boundaries="left"
            )
        if self.cross_fit is not None:
            check_scalar(self.cross_fit, "cross_fit", Integral, min_val=2)

    def _fit_modalities(self, X, declared):
        # No dropout within attention: it leaves torch's fast path and costs three times the fit.
        sizes = self.width, self.lab_layers, self.n_heads, 0.0, self.use_time
        wrapped = {
            name: lab_tokens(m, *sizes) if isinstance(m, Labs | Events) else m
            for name, m in declared.items()
        }
        super()._fit_modalities(X, wrapped)
        for name, m in wrapped.items():
            if isinstance(m, Tokens):
                self.modalities_[name] = _same_sizes(name, m, self.modalities_[name])

    def _make_core(self, modalities, target):
        encoders = {name: m.make_encoder(self.d_model) for name, m in modalities.items()}
        is_text = [isinstance(m, Text | Embedding | NoteScores) for m in modalities.values()]
        linear = linear_path(modalities, target) if self.linear else None
        return MEDFuseCore(encoders, is_text, target, self, linear)

    def _prepare(self, core, data, validation, seed):
        if core.linear is None:
            return data, validation
        log_odds = solve(core.linear, data, self.target_, seed)
        held_out = replace(
            next(iter(data.blocks.values())), present=np.ones(len(log_odds), bool),
            arrays={"log_odds": log_odds}, ragged={},
        )  # fmt: skip
        return replace(data, blocks={**data.blocks, PATH: held_out}), validation

    def _take_over(self, core):
        super()._take_over(core)
        for part in self.transferred_:
            # A few labels would wash out at full steps what many rows have taught.
            core.get_submodule(part).lr_scale = self.pretrained_lr_scale

    # ------------------------------------------------------------ fit

    @with_progress
    def fit(self, X, y, sample_weight=None, *, X_val=None, y_val=None):
        """Fit to training rows.

        Parameters
        ----------
        X : DataFrame of shape (n_samples, n_columns), or array if `modalities` is None
            A missing modality is a null cell.
        y : array of shape (n_samples,), or array or DataFrame of shape (n_samples, n_tasks)
            Labels of any type; or 0, 1 and NaN (unknown) for several tasks.
        sample_weight : array of shape (n_samples,), optional
        X_val, y_val : as X and y, optional
            Validation rows of one's own instead of `validation_fraction`.

        Returns
        -------
        self : estimator
        """
        for name in [key for key in vars(self) if key.endswith("_")]:  # another fit's ways
            vars(self).pop(name)
        fit = self._fit if self.cross_fit is None else self._fit_in_stages
        fit(X, y, sample_weight, X_val, y_val)
        self.classes_ = self.target_.classes
        if self.target_.task_names is not None:
            self.target_names_ = self.target_.task_names
        if self.thresholds == "f1" and not hasattr(self, "thresholds_"):
            self.thresholds_ = self._held_out_thresholds(X, y, sample_weight)
        return self

    def _seed(self):
        return int(check_random_state(self.random_state).randint(2**31 - 1))

    def _make_target(self, y):
        whole = vars(self).pop("_whole", None)
        if whole is not None:  # the classes of the whole fit, counted among the rows of this part
            target = copy.copy(whole)
            target.relearn(target.encode(y), slice(None))
            return target
        target = super()._make_target(y)
        if self.thresholds == "f1" and target.task_names is None and target.n_outputs > 1:
            raise ValueError(
                f"thresholds='f1' needs yes-or-no outcomes; y has {target.n_outputs} classes. "
                "Use thresholds=None."
            )
        return target

    def _train(self, data, validation, seed, device):
        super()._train(data, validation, seed, device)
        if self.thresholds == "f1" and validation is not None:
            p = self.target_.probabilities(self._infer(self.module_, validation))
            rows = validation.rows
            self.thresholds_ = _best_thresholds(validation.y[rows], p, validation.weight[rows])
        return self

    def _held_out_thresholds(self, X, y, sample_weight):
        X = self._frame(X, reset=False)
        rows = self._counted(X, y, sample_weight, reset=False)
        model = clone(self).set_params(thresholds=None)
        # A fold that is cross-fitted itself needs two patients, beside the one that it leaves out.
        p = self._out_of_fold(model, rows, 3, at_least=2 if self.cross_fit is None else 3)
        return _best_thresholds(rows.encoded, p, rows.weight)

    # ------------------------------------------------------------ two stages

    def _fit_in_stages(self, X, y, sample_weight, X_val, y_val):
        """A text model, its scores of rows that it has not seen, and the fusion that reads them."""
        self._check_params()
        X = self._frame(X, y, reset=True)
        self._warn_of_idle_patience(X_val)
        texts = _texts_of(self._declared(X))
        _refuse_score_columns(X)
        others = {name: m for name, m in self.modalities.items() if name not in texts}
        rows = self._counted(X, y, sample_weight, reset=True)
        frozen = _frozen_parts(self.freeze, texts, others)
        alone = {"cross_fit": None, "thresholds": None, "random_state": self._seed()}
        text = clone(self).set_params(
            modalities=texts, pretrained=None, joint="none", freeze=frozen[0], **alone
        )
        inside, aside = np.arange(len(rows.X)), None
        if X_val is not None:
            X_val = self._frame(X_val, y_val, reset=False)
        else:  # both stages will set the same rows aside, by the same seed
            inside, aside = self._set_aside(rows.X, rows.encoded, rows.weight, text._seed())
            self.target_.relearn(rows.encoded, inside)
        p = self._fit_text_stage(text, rows, inside, aside, X_val=X_val, y_val=y_val)
        if X_val is not None or aside is not None:
            alone |= {"thresholds": self.thresholds}
        fusion = clone(self).set_params(
            modalities={next(iter(texts)): _note_scores(p), **others}, freeze=frozen[1], **alone
        )
        X_val = None if X_val is None else self._with_scores(X_val)
        rows = rows._replace(X=self._with_scores(rows.X, p))
        self.fusion_stage_ = self._fit_part(fusion, rows, X_val=X_val, y_val=y_val)
        self.target_ = fusion.target_
        if hasattr(fusion, "thresholds_"):
            self.thresholds_ = fusion.thresholds_

    def _fit_text_stage(self, text, rows, inside, aside, **validation):
        """Probabilities of positives: out of fold of training rows, as in predict of others."""
        p = np.empty(self._yes_or_no(rows.encoded).shape)
        p[inside] = self._out_of_fold(text, rows.at(inside), self.cross_fit, **validation)
        self.text_stage_ = self._fit_part(text, rows, **validation)
        if aside is not None:
            p[aside] = _positives(text, rows.X.iloc[aside])
        # Null for a part of the rows would tell which fold has all of a class.
        p[:, np.isnan(p).any(axis=0)] = np.nan
        return p

    def _with_scores(self, X, p=None):
        """X with the log-odds of the text model; null where a row has no note."""
        if p is None:
            p = _positives(self.text_stage_, X)
        p = np.clip(p, 1e-6, 1 - 1e-6)
        scores = np.log(p / (1 - p))
        notes = [c for m in self.text_stage_.modalities_.values() for c in m.columns_]
        scores[X[notes].isna().all(axis=1).to_numpy()] = np.nan
        return X.assign(**{f"{SCORE}{j}": column for j, column in enumerate(scores.T)})

    # ------------------------------------------------------------ fits within the fit

    def _counted(self, X, y, sample_weight, *, reset):
        encoded, weight = self._labels(X, y, sample_weight, reset=reset)
        return Rows(X, y, encoded, weight).at(np.flatnonzero(weight))

    def _fit_part(self, model, rows, **validation):
        """Fit a stage, or the model of a fold, to the classes of this whole fit."""
        model._whole = self.target_
        with warnings.catch_warnings():  # the whole fit has said so
            for told in (".*training rows are too few", "patience=.* does nothing"):
                warnings.filterwarnings("ignore", told, UserWarning)
            return model.fit(rows.X, rows.y, rows.weight, **validation)

    def _out_of_fold(self, model, rows, n_splits, at_least=2, **validation):
        """Probabilities (n, k) of positives from models that have not seen the row or its patient.

        NaN where such a model has seen one class only, for it says nothing.
        """
        labels = self._yes_or_no(rows.encoded)
        found = np.full(labels.shape, np.nan)
        for inside, outside in self._folds(rows, n_splits, at_least, model._seed()):
            fold = clone(model)
            with warnings.catch_warnings():  # fits of all rows say what matters
                warnings.simplefilter("ignore", UserWarning)
                self._fit_part(fold, rows.at(inside), **validation)
            seen = labels[inside]
            both = (seen == 0).any(axis=0) & (seen == 1).any(axis=0)
            found[outside] = np.where(both, _positives(fold, rows.X.iloc[outside]), np.nan)
        return found

    def _folds(self, rows, n_splits, at_least, seed):
        """Folds that keep patients whole, and spread classes, or labels where there are tasks."""
        known = ~np.isnan(rows.encoded).all(axis=1)
        people, kind = np.arange(len(known)), StratifiedKFold
        if self.groups is not None:
            people, kind = pd.factorize(rows.X[self.groups])[0], StratifiedGroupKFold
        n = len(np.unique(people[known]))
        if n < at_least:
            raise ValueError(
                f"cross_fit={self.cross_fit} with thresholds={self.thresholds!r} holds rows out, "
                f"so at least {at_least} patients (rows, without groups) need a label and a weight "
                f"above 0; there are {n}. Use more of them, or cross_fit=None and thresholds=None."
            )
        k, strata = min(n_splits, n), self.target_.strata(rows.encoded)
        strata = known if strata is None else strata
        if np.unique(strata, return_counts=True)[1].max() < k:
            strata = np.zeros(len(known))
        with warnings.catch_warnings():  # of classes that not every fold can have
            warnings.simplefilter("ignore", UserWarning)
            return list(kind(k, shuffle=True, random_state=seed).split(strata, strata, people))

    def _yes_or_no(self, encoded):
        """Labels (n, k): of the tasks, or of every class but the first whether it is that one."""
        if self.target_.task_names is not None:
            return encoded
        return (encoded == np.arange(1, len(self.target_.classes))).astype("float32")

    # ------------------------------------------------------------ predict

    def _predict(self, X):
        if hasattr(self, "fusion_stage_"):
            X = self._frame(X, reset=False)
            return self.fusion_stage_._predict(self._with_scores(X))
        return super()._predict(X)

    def predict(self, X):
        """Most probable class, or with `thresholds_` what is above them; 0 or 1 for several tasks.

        Parameters
        ----------
        X : DataFrame of shape (n_samples, n_columns), or array if `modalities` is None

        Returns
        -------
        y : array of shape (n_samples,) or (n_samples, n_tasks)
        """
        p = self.predict_proba(X)
        if not hasattr(self, "thresholds_"):
            return self.target_.decide(p)
        if self.target_.task_names is None:
            return self.classes_[(p[:, 1] > self.thresholds_[0]).astype(int)]
        return (p > self.thresholds_).astype(int)


def _same_sizes(name, ours, theirs):
    """The modality that a pretrainer fitted, without dropout; raise where its sizes are others."""
    sizes = ("width", "n_layers", "n_heads", "use_time")
    here, there = ({key: getattr(m, key) for key in sizes} for m in (ours, theirs))
    if here != there:
        raise ValueError(
            f"The lab transformer of {name!r} is {here} here and {there} in `pretrained` "
            "(n_layers is lab_layers here); give both the same sizes."
        )
    return copy.copy(theirs).set_params(dropout=ours.dropout)


def _texts_of(modalities):
    texts = {name: m for name, m in modalities.items() if isinstance(m, Text)}
    if not texts:
        raise ValueError(
            "cross_fit needs a Text modality, whose model is fitted first; "
            f"the modalities are {list(modalities)}. Use cross_fit=None."
        )
    return texts


def _refuse_score_columns(X):
    taken = [c for c in X.columns if str(c).startswith(SCORE)]
    if taken:
        raise ValueError(
            f"Columns {taken} begin with {SCORE!r}, which cross_fit calls its own; rename them."
        )


def _note_scores(p):
    """The columns with scores; without any, all, which then are absent in predict too."""
    known = ~np.isnan(p).any(axis=0)
    return NoteScores([f"{SCORE}{j}" for j in np.flatnonzero(known | ~known.any())])


def _frozen_parts(freeze, texts, others):
    """What to freeze in the text model and in the fusion; a name that neither has is refused there.

    Trunk and heads are those of the fusion: to the text model nothing is handed over.
    """
    if isinstance(freeze, str):
        return freeze, freeze
    text, fusion = [], []
    for part in freeze:
        kind, name = (part + "..").split(".")[:2]
        if kind == "encoders" and name not in others:
            text.append(part)
        if kind != "encoders" or name not in texts:
            fusion.append(part)
    return tuple(text), tuple(fusion)


def _positives(model, X):
    """Probability of a positive in every task, or of every class but the first: (n, k)."""
    p = model.predict_proba(X)
    return p if model.target_.task_names else p[:, 1:]


def _best_thresholds(y, p, weight):
    """The threshold of every task with the best F1; one half where a task has no positive.

    Parameters
    ----------
    y : array (n, k) of 0, 1 and NaN
    p : array (n, k) or, for one outcome of two classes, (n, 2); NaN where nobody knows
    weight : array (n,)
    """
    p = p[:, 1:] if y.shape[1] == 1 and p.shape[1] == 2 else p
    return np.array([_best_threshold(y[:, j], p[:, j], weight) for j in range(y.shape[1])])


def _best_threshold(y, p, weight):
    known = np.flatnonzero(~np.isnan(y) & ~np.isnan(p))
    order = known[np.argsort(-p[known], kind="stable")]
    y, p, weight = y[order], p[order], weight[order].astype("float64")
    hits = np.cumsum(weight * y)
    if not len(hits) or hits[-1] == 0:
        return 0.5
    f1 = 2 * hits / (np.cumsum(weight) + hits[-1])
    falling = np.append(np.diff(p) < 0, True)  # a threshold cannot part equal probabilities
    best = int(np.argmax(np.where(falling, f1, -1.0)))
    below = p[best + 1] if best + 1 < len(y) else p[best] - 0.01
    return float((p[best] + below) / 2)
