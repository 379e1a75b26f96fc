"""Risk from notes, retrieved knowledge and structured data, in two cross-fitted stages.

After Datta, Cui, Guan et al., "Improving hospital risk prediction with knowledge-augmented
multimodal EHR modeling" (KAMELEON; arXiv 2508.01970; JMIR AI 2026;5:e88356). Stage 1 reads notes,
helped by facts that are retrieved from a medical graph. Stage 2 joins its score with structured
features. No label reaches a feature of the row that it belongs to: see the Notes of the class.
"""

import numpy as np
import pandas as pd
from sklearn.base import clone
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

import ehrfuse.methods._two_stage as two
from ehrfuse._runtime import check_option
from ehrfuse.base import TorchClassifier
from ehrfuse.knowledge import KnowledgeGraph
from ehrfuse.knowledge.linking import BOUND
from ehrfuse.methods._causal_notes import CausalNoteClassifier
from ehrfuse.methods._explanation import Explanation, Explanations, group_shares
from ehrfuse.methods._knowledge_retriever import KnowledgeRetriever, notes_of
from ehrfuse.modalities import Events, Labs, Tabular, Text, Visits

__all__ = ["KnowledgeAugmentedRiskModel", "KnowledgeRetriever"]

STAGE1 = (None, "tfidf", "hf-encoder", "hf-causal")
STAGE2 = ("hgb", "xgboost", "brf", "lr")


class KnowledgeAugmentedRiskModel(TorchClassifier):
    """Two-stage risk model: notes with retrieved knowledge, then everything together.

    Stage 1 reads the notes and what a knowledge graph says of the findings in them. Stage 2 joins
    its log-odds, the numbers of the retrieval and structured features.

    Parameters
    ----------
    modalities : dict of str to Modality, or None, default=None
        `Text` is read by stage 1, all else by stage 2. None takes all columns as one table.
    knowledge : KnowledgeRetriever, KnowledgeGraph or None, default=None
        A graph is read for the notes; give a retriever for codes and options. None: no knowledge.
    stage1 : {"tfidf", "hf-encoder", "hf-causal"}, classifier or None, default="tfidf"
        "tfidf": logistic regression on words, nothing is downloaded. "hf-encoder": on vectors of
        a frozen Hugging Face encoder. "hf-causal": a causal language model with LoRA
        (`ehrfuse.methods.knowledge_risk.CausalNoteClassifier`; give one for its parameters). Any
        classifier that reads the frame with the columns of knowledge will do. None: no stage 1.
    model : str or None, default=None
        Language model of "hf-encoder" and "hf-causal": a folder or a hub name.
    rationale : {None, "extractive", "generate"}, default=None
        A text whose leading TF-IDF directions go to stage 2: sentences with findings and their
        knowledge, or what the causal model of another fold writes.
    rationale_dim : int, default=16
        Directions kept.
    stage2 : {"hgb", "xgboost", "brf", "lr"} or classifier, default="hgb"
        Boosted trees of scikit-learn or of xgboost, a balanced random forest
        (imbalanced-learn), a logistic regression, or any classifier of numbers with holes in.
    n_splits : int, default=5
        Folds of the cross-fitting.
    class_weight : dict, "balanced" or None, default=None
        For the built-in parts of both stages but "xgboost". Calibration undoes the shift of
        probabilities.
    calibrate : {"sigmoid", "isotonic", None}, default="sigmoid"
        Learned from out-of-fold predictions of stage 2.
    threshold : float, "youden", "f1" or ("sensitivity", float), default=0.5
        From which probability on `predict` says the second class (or 1), found on the same
        predictions; with several classes the most probable is taken.
    groups : str or None, default=None
        Column of X that names the patient: never a feature; no fold separates rows of one patient.
    checkpoint : str, path or None, default=None
        Of a stage 1 that trains a network, "hf-causal" among them: fits of folds that were done are
        not done again. See `ehrfuse.base.TorchEstimator`.
    random_state : int, RandomState or None, default=None
    device : str, torch.device or None, default=None
        Of "hf-causal".

    Attributes
    ----------
    classes_ : array of shape (n_classes,)
    target_names_ : list of str
        Names of the tasks, if there are several.
    knowledge_ : KnowledgeRetriever
        Fitted to the training rows.
    tasks_ : list
        The fitted stages of every task.
    thresholds_ : array of shape (n_tasks,)
    feature_groups_ : dict of str to list of str
        Features of stage 2 by where they come from.
    ignored_modalities_ : list of str
        Modalities of kinds that are not read.

    See Also
    --------
    KnowledgeRetriever : The retrieval alone, for any pipeline.

    Notes
    -----
    *No leak by construction.* Stage 1 is fitted `n_splits` times, without a fold of patients each
    time. What stage 2 sees of a training row comes from the model that did not see it; of a new
    row, it sees the mean log-odds of all models. Teacher texts are training targets of stage 1
    alone. Retrieval reads no label, and its statistics are learned from training rows. Calibration
    and threshold use stage 2's own out-of-fold predictions; as stage 1's scores of the other folds
    were learned with the labels of the fold left out, they are a little optimistic, which
    predictions of new rows are not.

    *Differences from the paper.*

    * Out-of-fold stage-1 features, for test rows too; the paper's public relative writes
      rationales with the label in view.
    * Stage 1 gives log-odds from the label tokens' logits, never parsed text.
    * Retrieval by a walk in the graph, words and vectors together under a budget; the paper's
      relative takes the nearest community summary.
    * The rationale is off by default, and what is embedded is out of fold.
    * Similar patients are not shown: their labels would be.

    References
    ----------
    .. [1] Datta, Cui, Guan, Silwal, Eby, Madden and Vullikanti (2025). Improving hospital risk
       prediction with knowledge-augmented multimodal EHR modeling. arXiv 2508.01970.

    Examples
    --------
    >>> import pandas as pd
    >>> from ehrfuse import KnowledgeAugmentedRiskModel, KnowledgeGraph, Tabular, Text
    >>> table = pd.DataFrame(
    ...     {"head": ["warfarin"], "relation": ["interacts_with"], "tail": ["amiodarone"]}
    ... )
    >>> X = pd.DataFrame({
    ...     "age": [50.0, 61.0, 72.0, 83.0] * 10,
    ...     "note": ["On warfarin.", "On amiodarone.", "On warfarin and amiodarone.", None] * 10,
    ... })
    >>> y = [0, 0, 1, 0] * 10
    >>> model = KnowledgeAugmentedRiskModel(
    ...     {"table": Tabular(["age"]), "note": Text("note", min_count=1)},
    ...     knowledge=KnowledgeGraph.from_triples(table), stage2="lr", random_state=0,
    ... )
    >>> model.fit(X, y).predict_proba(X).shape
    (40, 2)
    """

    _accepts = (Tabular, Labs, Events, Visits, Text)
    pretrained = None

    def __init__(
        self,
        modalities=None,
        *,
        knowledge=None,
        stage1="tfidf",
        model=None,
        rationale=None,
        rationale_dim=16,
        stage2="hgb",
        n_splits=5,
        class_weight=None,
        calibrate="sigmoid",
        threshold=0.5,
        groups=None,
        checkpoint=None,
        random_state=None,
        device=None,
    ):
        self.modalities = modalities
        self.knowledge = knowledge
        self.stage1 = stage1
        self.model = model
        self.rationale = rationale
        self.rationale_dim = rationale_dim
        self.stage2 = stage2
        self.n_splits = n_splits
        self.class_weight = class_weight
        self.calibrate = calibrate
        self.threshold = threshold
        self.groups = groups
        self.checkpoint = checkpoint
        self.random_state = random_state
        self.device = device

    # ------------------------------------------------------------ fit

    def fit(self, X, y):
        """Fit both stages to training rows.

        Parameters
        ----------
        X : DataFrame of shape (n_samples, n_columns), or array if `modalities` is None
        y : array of shape (n_samples,), or array or DataFrame of shape (n_samples, n_tasks)
            Labels of any type; or 0, 1 and NaN (unknown) for several tasks.

        Returns
        -------
        self : KnowledgeAugmentedRiskModel
        """
        vars(self).pop("target_names_", None)
        self._check_params()
        X = self._frame(X, y, reset=True)
        declared = self._declared(X)
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        y, _ = self._labels(X, y, None, reset=True)
        self.classes_ = self.target_.classes
        if self.target_.task_names is not None:
            self.target_names_ = self.target_.task_names
        self.modalities_ = {name: _located(m, X) for name, m in declared.items()}
        self._notes = [m.columns_[0] for m in self.modalities_.values() if isinstance(m, Text)]
        self._fit_knowledge(X)
        structured = {n: m for n, m in self.modalities_.items() if not isinstance(m, Text)}
        self.structured_ = two.StructuredFeatures(structured).fit(X)
        frame, numbers = self._inputs(X)
        groups = None if self.groups is None else pd.factorize(X[self.groups])[0]
        self._n_classes = 2 if self.target_.task_names is not None else len(self.classes_)
        self.tasks_ = [
            self._fit_task(frame, numbers, y[:, j], groups, seed) for j in range(y.shape[1])
        ]
        self.thresholds_ = np.array([0.5 if t is None else t.threshold for t in self.tasks_])
        first = next((t for t in self.tasks_ if t is not None), None)
        self.feature_groups_ = {} if first is None else first.groups
        return self

    def _check_params(self):
        options = {
            "rationale": (None, "extractive", "generate"),
            "calibrate": (None, "sigmoid", "isotonic"),
        }
        for name, allowed in options.items():
            check_option(getattr(self, name), name, allowed)
        if not hasattr(self.stage1, "fit"):
            check_option(self.stage1, "stage1", STAGE1)
        if not hasattr(self.stage2, "fit"):
            check_option(self.stage2, "stage2", STAGE2)
        if isinstance(self.stage1, str) and self.stage1.startswith("hf-") and self.model is None:
            raise ValueError(f"stage1={self.stage1!r} needs model=, a folder or a hub name.")
        if self.n_splits < 2:
            raise ValueError(f"n_splits={self.n_splits} is too few; use 2 or more.")
        self._check_checkpoint()
        rule = self.threshold
        named = isinstance(rule, tuple | list) and len(rule) == 2 and rule[0] == "sensitivity"
        rate = rule[1] if named else rule
        if rule not in ("youden", "f1") and not (
            isinstance(rate, int | float | np.number) and 0 <= rate <= 1
        ):
            raise ValueError(
                f"threshold={rule!r} is not known; use a number from 0 to 1, 'youden', 'f1' or "
                "('sensitivity', 0.8)."
            )

    def _class_weight(self):
        """Weights by number of the class, as the parts of both stages see them."""
        if not isinstance(self.class_weight, dict):
            return self.class_weight
        return {i: self.class_weight.get(c, 1.0) for i, c in enumerate(self.classes_)}

    def _make_target(self, y):
        target = super()._make_target(y)  # says what is wrong with weights
        if target.task_names is not None and isinstance(self.class_weight, dict):
            raise ValueError("class_weight of several tasks is 'balanced' or None.")
        return target

    def _fit_knowledge(self, X):
        self.knowledge_ = None
        if self.knowledge is None:
            return
        found = self.knowledge
        if isinstance(found, KnowledgeGraph):
            if not self._notes:
                raise ValueError(
                    "knowledge is a graph, and no modality is Text; declare one, or give a "
                    "KnowledgeRetriever with codes=."
                )
            # NOTE[DIFF] A walk and words under a budget, not the nearest community summary; no
            # similar patients, whose labels would be shown.
            found = KnowledgeRetriever(found, text=self._notes)
        if not isinstance(found, KnowledgeRetriever):
            raise ValueError(
                f"knowledge is {type(found).__name__}; give a KnowledgeRetriever, a KnowledgeGraph "
                "or None."
            )
        self.knowledge_ = clone(found).fit(X)

    def _own_columns(self, X, reset):
        """Besides those of the modalities, the columns that the retriever reads."""
        own = super()._own_columns(X, reset)
        if reset and isinstance(self.knowledge, KnowledgeRetriever):
            more = [c for c in self.knowledge._columns() if c in X.columns and c not in own]
            own = X[[*own.columns, *more]]
        return own

    def _inputs(self, X):
        """The frame that stage 1 reads, and the features by group that need no label."""
        for column in self._notes:
            notes_of(X[column])  # says what is wrong in the user's words
        frame, numbers = X, {"structured": self.structured_.transform(X)}
        if self.knowledge_ is not None:
            frame = self.knowledge_.transform(X)
            numbers["knowledge"] = frame[self.knowledge_.columns_out_[1:]]
        return frame, numbers

    def _fit_task(self, frame, numbers, y, groups, seed):
        """Both stages of one outcome; None where the training labels are all alike."""
        known = np.flatnonzero(~np.isnan(y))
        if len(np.unique(y[known])) < 2:
            return None  # TaskTarget has warned; its rate is predicted
        frame = frame.iloc[known]
        numbers = {name: table.iloc[known] for name, table in numbers.items()}
        y = y[known].astype(int)
        groups = None if groups is None else groups[known]
        folds = two.folds_of(y, groups, self.n_splits, seed)
        task = _Task(self._reader(seed), self._n_classes, self.rationale, self.rationale_dim, seed)
        task.fit_reader(frame, y, folds, self._sentences)
        Z = task.join(numbers, *vars(task).pop("held_out"))  # of training rows: not to be kept
        stage2 = two.second_stage(self.stage2, self._class_weight(), seed)
        held_out = np.zeros((len(y), self._n_classes))
        if self.calibrate is not None or isinstance(self.threshold, str | tuple | list):
            for train, test in folds:
                model = two.fit_one(stage2, Z[train], y[train])
                proba = model.predict_proba(Z[test])
                held_out[test] = two.aligned(model, proba, self._n_classes)
        task.calibrator = two.Calibrator(self.calibrate).fit(held_out, y)
        task.threshold = 0.5
        if self._n_classes == 2:
            p = task.calibrator.apply(held_out)[:, 1]
            task.threshold = two.pick_threshold(self.threshold, y, p)
        task.stage2 = two.fit_one(stage2, Z, y)
        with np.errstate(all="ignore"):
            task.reference = np.array([np.nanmedian(c) if (~np.isnan(c)).any() else np.nan
                                       for c in Z.T])  # fmt: skip
        return task

    def _reader(self, seed):
        """Stage 1, unfitted; None where there is nothing to read."""
        facts = None if self.knowledge_ is None else self.knowledge_.columns_out_[0]
        if self.stage1 is None or (not self._notes and facts is None):
            return None
        if not isinstance(self.stage1, str):
            reader = clone(self.stage1)
            params = reader.get_params()
            inherit = {"random_state": seed, "groups": self.groups, "device": self.device,
                       "checkpoint": self.checkpoint}  # fmt: skip
            unset = {n: v for n, v in inherit.items() if n in params and params[n] is None}
            if isinstance(reader, CausalNoteClassifier) and reader.knowledge is None:
                unset["knowledge"] = facts
            return reader.set_params(**unset)
        if self.stage1 == "hf-causal":
            return CausalNoteClassifier(
                self.model, notes=tuple(self._notes), knowledge=facts, random_state=seed,
                labels=("no", "yes") if self._n_classes == 2
                else tuple(map(str, range(self._n_classes))),
                class_weight=self._class_weight(), device=self.device, checkpoint=self.checkpoint,
            )  # fmt: skip
        texts = {m.columns_[0]: m for m in self.modalities_.values() if isinstance(m, Text)}
        return two.linear_reader(
            texts, facts, encoder=self.model if self.stage1 == "hf-encoder" else None,
            class_weight=self._class_weight(), random_state=seed,
        )  # fmt: skip

    def _sentences(self, frame):
        """Sentences with the patient's own findings, and the knowledge found for them."""
        texts = [[] for _ in range(len(frame))]
        if self.knowledge_ is not None:
            linker = self.knowledge_._engine.linker
            for column in self.knowledge_._text_columns():
                notes = notes_of(frame[column])
                found = linker.link_many(notes)
                for row, start in zip(found.note[found.own], found.start[found.own], strict=True):
                    texts[row].append(_sentence_at(notes[row], start))
            facts = frame[self.knowledge_.columns_out_[0]]
            for row, fact in enumerate(facts.fillna("")):
                texts[row].append(fact)
        return [" ".join(dict.fromkeys(parts)) for parts in texts]

    # ------------------------------------------------------------ predict

    def predict_proba(self, X):
        """Probability of every class, or of a positive in every task.

        Parameters
        ----------
        X : DataFrame of shape (n_samples, n_columns), or array if `modalities` is None

        Returns
        -------
        proba : array of shape (n_samples, n_classes) or (n_samples, n_tasks)
        """
        check_is_fitted(self)
        frame, numbers = self._inputs(self._frame(X, reset=False))
        found = [self._task_proba(t, frame, numbers) for t in self.tasks_]
        if self.target_.task_names is None:
            return found[0]
        rates = self.target_.constant
        columns = [rates[j] * np.ones(len(frame)) if p is None else p[:, 1]
                   for j, p in enumerate(found)]  # fmt: skip
        return np.column_stack(columns)

    def _task_proba(self, task, frame, numbers):
        if task is None:
            return None
        return task.proba(task.join(numbers, *task.read(frame, self._sentences)))

    def predict(self, X):
        """Class of every row, or 0 and 1 task by task, by `thresholds_`.

        Parameters
        ----------
        X : DataFrame of shape (n_samples, n_columns), or array if `modalities` is None

        Returns
        -------
        y : array of shape (n_samples,) or (n_samples, n_tasks)
        """
        proba = self.predict_proba(X)
        if self.target_.task_names is not None:
            return (proba >= self.thresholds_).astype(int)
        if len(self.classes_) > 2:
            return self.classes_[proba.argmax(axis=1)]
        return self.classes_[(proba[:, 1] >= self.thresholds_[0]).astype(int)]

    def stage1_proba(self, X):
        """What stage 1 alone reads from the notes: the mean of its models on the logit scale.

        Parameters
        ----------
        X : DataFrame of shape (n_samples, n_columns)

        Returns
        -------
        proba : array of shape (n_samples, n_tasks)
            Of the second class, or of a positive in every task.
        """
        check_is_fitted(self)
        frame, _ = self._inputs(self._frame(X, reset=False))
        found = [np.full(len(frame), np.nan) if t is None or t.reader is None
                 else 1 / (1 + np.exp(-t.read(frame, self._sentences)[0][:, -1]))
                 for t in self.tasks_]  # fmt: skip
        return np.column_stack(found)

    def explain(self, X, task=0):
        """Tell what every prediction rests on.

        Parameters
        ----------
        X : DataFrame of shape (n_samples, n_columns)
        task : int, default=0
            Which of several tasks.

        Returns
        -------
        explanations : list of Explanation
            Probability, stage-1 score, the share of every group of features in the log-odds,
            mentions, and retrieved facts with their provenance. ``.to_html()`` renders it.
        """
        check_is_fitted(self)
        X = self._frame(X, reset=False)
        frame, numbers = self._inputs(X)
        fitted = self.tasks_[task]
        if fitted is None or self._n_classes != 2:
            raise ValueError("explain needs an outcome of two classes with both in training.")
        score, rationale = fitted.read(frame, self._sentences)
        Z = fitted.join(numbers, score, rationale)
        shares = group_shares(
            lambda z: two.log_odds(fitted.proba(z))[:, 0], Z, fitted.reference, fitted.places
        )
        found = [(None, None)] * len(X)
        if self.knowledge_ is not None:
            found = self.knowledge_.explain(X)
        proba = fitted.proba(Z)[:, 1]
        said = None if score is None else 1 / (1 + np.exp(-score[:, -1]))
        return Explanations(
            Explanation(
                float(proba[i]), None if said is None else float(said[i]), shares.iloc[i], *found[i]
            )
            for i in range(len(X))
        )


class _Task:
    """Both stages of one outcome."""

    def __init__(self, reader, n_classes, rationale, rationale_dim, seed):
        self.reader, self.n_classes, self.rationale = reader, n_classes, rationale
        self.rationale_dim, self.seed = rationale_dim, seed

    def fit_reader(self, frame, y, folds, sentences):
        """Stage 1 without every fold in turn; its scores and rationales are those of others."""
        self.models, self.vectors = [], None
        score = texts = None
        if self.reader is not None:
            score = np.zeros((len(y), 1 if self.n_classes == 2 else self.n_classes))
            texts = [""] * len(y)
            # NOTE[DIFF] Out of fold, where the paper's public relative sees the label.
            for train, test in folds:
                model = two.fit_one(self.reader, frame.iloc[train], y[train])
                self.models.append(model)
                score[test] = self._score(model, frame.iloc[test])
                if self.rationale == "generate":
                    for i, text in zip(test, self._write(model, frame.iloc[test]), strict=True):
                        texts[i] = text
        rationale = None
        # NOTE[DIFF] None by default; what is embedded is out of fold and blind to the label.
        if self.rationale is not None:
            texts = sentences(frame) if self.rationale == "extractive" else texts
            if texts is None:
                raise ValueError("rationale='generate' needs a stage 1 that writes: 'hf-causal'.")
            self.vectors = two.RationaleVectors(self.rationale_dim, self.seed).fit(texts)
            rationale = self.vectors.transform(texts)
        self.held_out = (score, rationale)

    def _score(self, model, frame):
        # NOTE[DIFF] Log-odds, never a label parsed from text.
        return two.log_odds(two.aligned(model, model.predict_proba(frame), self.n_classes))

    def _write(self, model, frame):
        if not hasattr(model, "write_rationales"):
            raise ValueError(
                "rationale='generate' needs a stage 1 that writes, such as 'hf-causal'; use "
                "'extractive' or None with this one."
            )
        return model.write_rationales(frame)

    def read(self, frame, sentences):
        """Score and rationale of new rows: the mean over the models."""
        score = rationale = None
        if self.reader is not None:
            score = np.mean([self._score(m, frame) for m in self.models], axis=0)
        if self.rationale == "extractive":
            rationale = self.vectors.transform(sentences(frame))
        elif self.rationale == "generate":
            each = [self.vectors.transform(self._write(m, frame)) for m in self.models]
            rationale = np.mean(each, axis=0)
        return score, rationale

    def join(self, numbers, score, rationale):
        """Features of stage 2, group by group."""
        n = len(next(iter(numbers.values())))
        tables = {"structured": numbers["structured"]}
        if score is not None:
            names = [f"stage1_{j}" for j in range(score.shape[1])]
            tables["notes"] = pd.DataFrame(score, columns=names)
        if "knowledge" in numbers:
            tables["knowledge"] = numbers["knowledge"]
        if rationale is not None and rationale.shape[1]:
            names = [f"rationale_{j}" for j in range(rationale.shape[1])]
            tables["rationale"] = pd.DataFrame(rationale, columns=names)
        tables = {name: table for name, table in tables.items() if table.shape[1]}
        if not tables:
            raise ValueError("No feature is left for stage 2; declare a modality that holds some.")
        self.groups = {name: [str(c) for c in table] for name, table in tables.items()}
        ends = np.cumsum([0, *(table.shape[1] for table in tables.values())])
        self.places = {
            name: np.arange(a, b) for name, a, b in zip(tables, ends[:-1], ends[1:], strict=True)
        }
        parts = [table.to_numpy(dtype="float64", na_value=np.nan) for table in tables.values()]
        return np.concatenate([part.reshape(n, -1) for part in parts], axis=1)

    def proba(self, Z):
        """Calibrated probabilities of stage 2."""
        found = two.aligned(self.stage2, self.stage2.predict_proba(Z), self.n_classes)
        return self.calibrator.apply(found)


def _located(modality, X):
    """A modality that knows its columns; visits learn their codes as well."""
    modality = clone(modality)
    if isinstance(modality, Visits):
        return modality.fit(X)
    modality._check_params()
    columns = modality.columns(X) if callable(modality.columns) else modality.columns
    modality.columns_ = [columns] if isinstance(columns, str) else list(columns)
    modality.seen_ = bool(modality._cells(X).notna().any(axis=None))
    return modality


def _sentence_at(note, start):
    ends = [m.end() for m in BOUND.finditer(note)]
    first = max((end for end in ends if end <= start), default=0)
    last = min((end for end in ends if end > start), default=len(note))
    return note[first:last].strip()
