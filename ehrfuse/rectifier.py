"""Rectifier: probabilities made right on average within every missing pattern, after the fact.

The third part of CRL-MMNAR (Liang, Pan and Xiong, 2025, arXiv 2509.17228), rebuilt on held-out
rows. Symbols: p a predicted probability, y its label, m the missing pattern, c the number of
modalities present, tau the offset that is added (on the logit scale unless asked otherwise).
"""

import warnings

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator, ClassifierMixin, MetaEstimatorMixin, clone
from sklearn.utils import assert_all_finite, check_random_state, column_or_1d, get_tags
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import (
    check_consistent_length,
    check_is_fitted,
    has_fit_parameter,
    validate_data,
)

from ehrfuse._offsets import EDGE, Calibration, Offsets, Rule
from ehrfuse._patterns import modality_columns, pattern_labels, presence
from ehrfuse._runtime import check_option

__all__ = ["Rectifier"]


class Rectifier(MetaEstimatorMixin, ClassifierMixin, BaseEstimator):
    """Classifier whose probabilities are calibrated within every pattern of missing modalities.

    Held-out rows first fix the global calibration, then one offset per missing pattern, shrunk
    towards the offset of the patterns with as many modalities and from there towards the global
    one. Only fit learns: predictions depend on nothing but their own row.

    Parameters
    ----------
    estimator : classifier with predict_proba
        Binary, multiclass, or several binary tasks whose ``predict_proba`` is (n, n_tasks).
    modalities : dict of str to Modality, str, list of str or "drop", default=None
        What a pattern is made of: a modality is present where any cell of its columns is not
        null. None reads ``estimator.modalities``; without those all rows are one pattern.
    groups : str, default=None
        Column of X (say, the patient) whose rows stay on one side of every split. It is hidden
        from the estimator, unless a parameter ``groups`` in there names the same column; predict
        does not need it. None reads ``estimator.groups`` where there is one.
    method : {"crossfit", "holdout"}, default="crossfit"
        "crossfit" keeps `n_splits` models, each with the calibration of the fold it did not see,
        and averages their corrected probabilities. "holdout" fits one model on the other rows.
    n_splits : int, default=5
        Folds of "crossfit"; with fewer rows (or groups) than that, every one is a fold.
    holdout_fraction : float, default=0.2
        Share of rows (or groups) that "holdout" keeps from the model.
    calibrate : {"platt", "temperature", None}, default="platt"
        Global calibration before the offsets: slope and intercept of the log-odds, slope, none.
    scale : {"logit", "probability"}, default="logit"
        Where offsets are added. "probability" is the form of the paper: ``clip(p + tau, 0, 1)``.
    shrink : bool, default=True
        Whether offsets are shrunk by empirical Bayes. If False, each pattern keeps its raw one.
    gate : (kappa, z) or None, default=None
        The paper's gate: a level counts only if ``abs(tau) - z * se > kappa``, else its parent's
        offset holds (pattern, count, global, 0).
    min_count : int, default=10
        Labelled rows that a pattern or a count needs for an offset of its own.
    random_state : int, RandomState or None, default=None
        Draws the splits. The estimator keeps its own.

    Attributes
    ----------
    classes_ : array of shape (n_classes,)
        ``arange(n_tasks)`` with several tasks.
    target_names_ : list
        What `table_` calls a task: the column of y with several tasks, the class with several
        classes, the second class of two.
    estimators_ : list of fitted estimators
    table_ : DataFrame
        One row per task and pattern seen in fit: ``task, pattern, n`` (labelled held-out rows),
        ``tau_raw, se`` (unshrunk offset, its standard error), ``tau`` (as applied), ``source``
        (level that gave it: "pattern", "count" or "global").
    parents_ : DataFrame
        The same columns for the levels above; ``pattern`` is "(global)" or "(k present)".
    calibration_ : DataFrame with columns fold, task, slope, intercept
    n_features_in_ : int
        Columns of X in fit, the groups column apart.
    feature_names_in_ : array of shape (`n_features_in_`,)
        Their names, where X is a frame of named columns.

    Notes
    -----
    *Offsets.* ``tau_raw`` solves ``mean(sigmoid(logit p + tau)) = mean(y)``. Where all labels of a
    pattern agree that has no finite root: half an event is assumed, and without shrinkage the
    parent's offset is applied. With it, the variance of a level around the one above comes from
    the method of moments [3]_ and tau is the posterior mode, so that offsets which noise explains
    become exactly their parents'. The global one is shrunk towards 0. Standard errors allow for
    repeated rows of a group.

    *Cross-fitting.* Every model is calibrated on the fold it did not see, gently pulled to the
    calibration of all folds. All models share the offsets, found on the pooled held-out rows, as
    in [2]_: every residual is of a model that did not see the row, and the average of the models
    has the average of their biases, which is what the pooled rows estimate. Offsets fold by fold
    would average to the same, noisier where a pattern has few rows per fold and shrunk too much.
    Probabilities are averaged, not log-odds, so that pattern means stay right.

    *Limits.* An offset repairs the mean within a pattern, not a bias that varies inside it, and
    keeps the order of one model's rows there. Several classes: one-versus-rest offsets, then
    divided by their sum, so that pattern means hold nearly.

    *New patterns* take the offset of the observed pattern with one modality more or less (of
    several, the most frequent), else that of their count, else the global one; predict warns.

    *Differences from the paper.* Residuals are always held out; logit scale by default; shrinkage
    by posterior mode; no ranking correction; no importance weights, which would read test rows.

    References
    ----------
    .. [1] Liang, Pan and Xiong (2025). Causal representation learning from multimodal clinical
       records under non-random modality missingness. arXiv 2509.17228.
    .. [2] Zrnic and Candes (2024). Cross-prediction-powered inference. PNAS 121.
    .. [3] DerSimonian and Laird (1986). Meta-analysis in clinical trials. Control Clin Trials 7.

    Examples
    --------
    >>> import numpy as np
    >>> import pandas as pd
    >>> from sklearn.ensemble import HistGradientBoostingClassifier
    >>> from ehrfuse.rectifier import Rectifier
    >>> rng = np.random.default_rng(0)
    >>> X = pd.DataFrame({"age": rng.normal(size=400), "lactate": rng.normal(size=400)})
    >>> X.loc[rng.random(400) < 0.5, "lactate"] = np.nan
    >>> y = (X["age"] + X["lactate"].notna() + rng.normal(size=400) > 1).astype(int)
    >>> model = HistGradientBoostingClassifier(max_iter=10, random_state=0)
    >>> modalities = {"static": "age", "gas": "lactate"}
    >>> rectified = Rectifier(model, modalities, random_state=0).fit(X, y)
    >>> sorted(rectified.table_["pattern"])
    ['static', 'static+gas']
    >>> rectified.predict_proba(X).shape
    (400, 2)
    """

    def __init__(
        self,
        estimator,
        modalities=None,
        groups=None,
        method="crossfit",
        *,
        n_splits=5,
        holdout_fraction=0.2,
        calibrate="platt",
        scale="logit",
        shrink=True,
        gate=None,
        min_count=10,
        random_state=None,
    ):
        self.estimator = estimator
        self.modalities = modalities
        self.groups = groups
        self.method = method
        self.n_splits = n_splits
        self.holdout_fraction = holdout_fraction
        self.calibrate = calibrate
        self.scale = scale
        self.shrink = shrink
        self.gate = gate
        self.min_count = min_count
        self.random_state = random_state

    def fit(self, X, y, sample_weight=None):
        """Fit the estimator on some rows and its correction on the others.

        Parameters
        ----------
        X : DataFrame or array of shape (n_samples, n_columns)
            As the estimator takes it, with the groups column where `groups` names one.
        y : array of shape (n_samples,) or (n_samples, n_tasks)
            Classes; or per task 0, 1 and NaN for unknown.
        sample_weight : array of shape (n_samples,), default=None
            Counts in the estimator, if its fit takes weights, and in the correction.

        Returns
        -------
        self : Rectifier
        """
        self._check_params()
        X, cluster = self._read_X(X)
        y, Y, code = self._read_y(y, X.shape[0])
        weight, inner_weight = self._read_weight(sample_weight, X.shape[0])
        present = self._present(X)
        kinds, first, kind = np.unique(
            present.to_numpy(), axis=0, return_index=True, return_inverse=True
        )
        kind = kind.ravel()
        parts = self._split(code, kind, cluster)
        models = [self._fit_one(X, y, inner_weight, train) for train, _ in parts]
        held = [rows for _, rows in parts]
        P = [self._inner(m, _take(X, rows)) for m, rows in zip(models, held, strict=True)]
        fold = np.repeat(np.arange(len(parts)), [len(rows) for rows in held])
        rows = np.concatenate(held)
        self._calibration = Calibration(self.calibrate, self._task_kind == "multiclass")
        self._calibration.fit(np.concatenate(P), Y[rows], weight[rows], fold)
        rule = Rule(self.scale, self.shrink, self.gate, self.min_count)
        base = np.concatenate([rule.base(self._calibration.apply(p, k)) for k, p in enumerate(P)])
        self._offsets = Offsets(rule, kinds)
        self._offsets.fit(base, Y[rows], weight[rows], cluster[rows], kind[rows])
        labels = pattern_labels(present[list(self._columns) or list(present)].iloc[first])
        self.table_, self.parents_ = self._offsets.tables(self.target_names_, labels)
        self.calibration_ = self._calibration.table(self.target_names_)
        self.estimators_ = models
        return self

    def predict_proba(self, X):
        """Corrected probabilities, averaged over the models.

        Parameters
        ----------
        X : DataFrame or array of shape (n_samples, n_columns)
            As in fit; the groups column may be absent.

        Returns
        -------
        P : array of shape (n_samples, n_classes), or (n_samples, n_tasks) with several tasks
        """
        check_is_fitted(self, "estimators_")
        if isinstance(X, pd.DataFrame) and self._hidden in X.columns:
            X = X.drop(columns=self._hidden)
        tau = self._tau_of_rows(X) if self._columns else self._offsets.tau_
        P = np.mean(
            [self._corrected(self._inner(m, X), k, tau) for k, m in enumerate(self.estimators_)],
            axis=0,
        )
        return np.column_stack([1 - P, P]) if self._task_kind == "binary" else P

    def predict(self, X):
        """Most probable class; with several tasks, whether each is more likely than not.

        Parameters
        ----------
        X : DataFrame or array of shape (n_samples, n_columns)
            As in fit; the groups column may be absent.

        Returns
        -------
        y : array of shape (n_samples,) or (n_samples, n_tasks)
        """
        P = self.predict_proba(X)
        if self._task_kind == "several":
            return (P > 0.5).astype(int)
        return self.classes_[P.argmax(axis=1)]

    def __sklearn_tags__(self):
        tags, inner = super().__sklearn_tags__(), get_tags(self.estimator)
        tags.input_tags, tags.target_tags = inner.input_tags, inner.target_tags
        tags.classifier_tags = inner.classifier_tags or tags.classifier_tags
        return tags

    def _check_params(self):
        check_option(self.method, "method", ["crossfit", "holdout"])
        check_option(self.calibrate, "calibrate", ["platt", "temperature", None])
        check_option(self.scale, "scale", ["logit", "probability"])
        if not hasattr(self.estimator, "predict_proba"):
            raise TypeError(
                f"{type(self.estimator).__name__} has no predict_proba; Rectifier needs a "
                "classifier with probabilities (CalibratedClassifierCV gives them to any)."
            )
        if self.method == "crossfit" and self.n_splits < 2:
            raise ValueError(f"n_splits={self.n_splits} is too few; use 2 or more.")
        if self.method == "holdout" and not 0 < self.holdout_fraction < 1:
            raise ValueError(
                f"holdout_fraction={self.holdout_fraction} leaves nothing on one side; "
                "use a number between 0 and 1."
            )
        if self.gate is not None and np.shape(self.gate) != (2,):
            raise ValueError(f"gate={self.gate!r} is not a pair (kappa, z); use one, or None.")

    def _read_X(self, X):
        """X as the estimator will see it, and the group code of every row."""
        given = getattr(self.estimator, "modalities", None)
        modalities = (given if self.modalities is None else self.modalities) or {}
        groups = self.groups
        if groups is None and isinstance(getattr(self.estimator, "groups", None), str):
            groups = self.estimator.groups
        if modalities or groups is not None:
            _check_frame(X)
        if not isinstance(X, pd.DataFrame):
            self._hidden, self._columns = None, {}
            X = validate_data(self, X, accept_sparse="csr", dtype=None, ensure_all_finite=False)
            return X, np.arange(X.shape[0])
        cluster = np.arange(len(X)) if groups is None else _codes(X, groups)
        self._hidden = None if groups is None or _sees(self.estimator, groups) else groups
        features = X if groups is None else X.drop(columns=groups)
        self._columns = {
            name: modality_columns(modality, features)
            for name, modality in modalities.items()
            if not (isinstance(modality, str) and modality == "drop")
        }
        validate_data(self, features, skip_check_array=True)
        return (features if self._hidden else X), cluster

    def _read_y(self, y, n_rows):
        """Return y for the estimator, 0/1/NaN of (n, n_tasks), and a code to stratify by."""
        if y is None:
            raise ValueError("Rectifier requires y to be passed, but the target y is None.")
        y = y if hasattr(y, "iloc") else np.asarray(y)
        check_consistent_length(y, np.empty(n_rows))
        if y.ndim == 2 and y.shape[1] > 1:
            return self._read_tasks(y)
        y = column_or_1d(y, warn=True)
        if (lost := pd.isna(y).sum()) > 0:
            raise ValueError(
                f"y contains NaN: {lost} labels are unknown; drop those rows "
                "(unknown labels are allowed where y has several tasks)."
            )
        assert_all_finite(y)
        check_classification_targets(y)
        self.classes_, code = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(
                f"y has one class only, {self.classes_.tolist()}; Rectifier needs two or more."
            )
        binary = len(self.classes_) == 2
        self._task_kind = "binary" if binary else "multiclass"
        self.target_names_ = self.classes_[int(binary) :].tolist()
        Y = (code[:, None] == np.arange(len(self.classes_))).astype(float)
        return y, Y[:, int(binary) :], code

    def _read_tasks(self, y):
        self._task_kind = "several"
        Y = pd.DataFrame(y).to_numpy(dtype=float, na_value=np.nan)
        if not np.isin(Y[~np.isnan(Y)], (0, 1)).all():
            raise ValueError("y with several tasks may hold 0, 1 and NaN (unknown); recode it.")
        self.classes_ = np.arange(Y.shape[1])
        self.target_names_ = pd.DataFrame(y).columns.tolist()
        code = np.full(len(Y), Y.shape[1])
        for task in np.argsort(-np.nansum(Y, axis=0), kind="stable"):
            code[Y[:, task] == 1] = task  # the rarest comes last and wins
        return y, Y, code

    def _read_weight(self, sample_weight, n_rows):
        """Weights of mean one for the correction; those for the estimator, or None."""
        if sample_weight is None:
            return np.ones(n_rows), None
        weight = np.asarray(sample_weight, dtype=float)
        if weight.shape != (n_rows,) or not (weight >= 0).all() or not 0 < weight.sum() < np.inf:
            raise ValueError(
                f"sample_weight of shape {weight.shape} does not fit; "
                f"give {n_rows} finite numbers, none negative and not all zero."
            )
        if has_fit_parameter(self.estimator, "sample_weight"):
            return weight / weight.mean(), weight
        warnings.warn(
            f"{type(self.estimator).__name__} takes no sample_weight; "
            "the weights serve the calibration and the offsets only.",
            stacklevel=3,
        )
        return weight / weight.mean(), None

    def _present(self, X):
        """Which modalities each row has, in an order that does not depend on the user's."""
        if not self._columns:
            return pd.DataFrame({"(all)": np.ones(X.shape[0], dtype=bool)})
        _check_frame(X)
        return presence(X, self._columns)[sorted(self._columns)]

    def _split(self, code, kind, cluster):
        """Pairs (training rows, held-out rows): groups dealt out in order of class and pattern."""
        noise = check_random_state(self.random_state).permutation(len(code))
        order = np.lexsort((noise, kind, code, np.bincount(code)[code]))
        # A group stands where its rarest label puts it.
        leaders = order[np.sort(np.unique(cluster[order], return_index=True)[1])]
        turn = np.empty(len(leaders), dtype=int)
        turn[cluster[leaders]] = np.arange(len(leaders))
        if self.method == "crossfit":
            part = turn[cluster] % min(self.n_splits, len(leaders))
            parts = [
                (np.flatnonzero(part != k), np.flatnonzero(part == k))
                for k in range(part.max() + 1)
            ]
        else:
            steps = np.floor(np.arange(len(leaders) + 1) * self.holdout_fraction + 0.5)
            held = (np.diff(steps) > 0)[turn[cluster]]
            parts = [(np.flatnonzero(~held), np.flatnonzero(held))]
        unit = "rows" if len(leaders) == len(code) else "groups"
        if any(len(train) == 0 or len(held) == 0 for train, held in parts):
            raise ValueError(
                f"{len(leaders)} {unit} cannot be split into training and held-out ones "
                f"(n_samples={len(code)}); give more."
            )
        for number, name in enumerate(
            self.classes_.tolist() if self._task_kind != "several" else ()
        ):
            alone = len(np.unique(cluster[code == number])) < 2
            if alone or any(number not in code[train] for train, _ in parts):
                raise ValueError(
                    f"Class {name!r} is in too few {unit} to be both trained on and held out; "
                    "give more of it, or leave it out."
                )
        return parts

    def _fit_one(self, X, y, weight, rows):
        extra = {} if weight is None else {"sample_weight": weight[rows]}
        return clone(self.estimator).fit(_take(X, rows), _take(y, rows), **extra)

    def _inner(self, model, X):
        """Probabilities of one fitted model, one column per task."""
        P = model.predict_proba(X)
        if isinstance(P, list):  # scikit-learn's own multi-output form
            P = np.column_stack(
                [(p * (c == 1)).sum(1) for p, c in zip(P, model.classes_, strict=True)]
            )
        P = np.asarray(P, dtype=float)
        P = P[:, 1:] if self._task_kind == "binary" else P
        if P.shape[1] != len(self.target_names_) or not np.isfinite(P).all():
            raise ValueError(
                f"{type(model).__name__}.predict_proba gave an array of shape {P.shape} with "
                f"{np.isnan(P).sum()} NaN; Rectifier needs finite probabilities of "
                f"{len(self.target_names_)} tasks."
            )
        return P

    def _corrected(self, P, model, tau):
        """Probabilities of one model, calibrated and moved by the offsets."""
        rule = self._offsets.rule
        P = rule.add(rule.base(self._calibration.apply(P, model)), tau)
        if self._task_kind != "multiclass":
            return P
        total = P.sum(axis=1, keepdims=True)
        return np.where(total > 0, P / np.maximum(total, EDGE**2), 1 / P.shape[1])

    def _tau_of_rows(self, X):
        """Offset of every row and task, by its pattern."""
        kinds, which = np.unique(self._present(X).to_numpy(), axis=0, return_inverse=True)
        found = [self._offsets.of(kind) for kind in kinds]
        new = [kind for kind, (_, known) in zip(kinds, found, strict=True) if not known]
        if new:
            flags = pd.DataFrame(new, columns=sorted(self._columns))
            labels = pattern_labels(flags[list(self._columns)])
            warnings.warn(
                f"Patterns not seen in fit take the offset of a near one: {', '.join(labels)}.",
                UserWarning,
                stacklevel=3,
            )
        return np.array([tau for tau, _ in found])[which.ravel()]


def _take(array, rows):
    return array.iloc[rows] if hasattr(array, "iloc") else array[rows]


def _check_frame(X):
    if not isinstance(X, pd.DataFrame):
        raise TypeError(
            f"X is a {type(X).__name__}, but modalities and groups name columns; "
            "give a pandas DataFrame."
        )
    if not X.columns.is_unique:
        twice = X.columns[X.columns.duplicated()].tolist()
        raise ValueError(f"X has columns of the same name: {twice}; give each its own.")


def _codes(X, groups):
    """Numbers 0, 1, ... for the values of the groups column."""
    if groups not in X.columns:
        raise ValueError(f"groups={groups!r} is no column of X; add it, or give its right name.")
    codes, _ = pd.factorize(X[groups])
    if (codes < 0).any():
        raise ValueError(
            f"Column {groups!r} (groups) has {(codes < 0).sum()} nulls; give every row its group."
        )
    return codes


def _sees(estimator, groups):
    """Whether the estimator, or a step in it, has a parameter `groups` naming that column."""
    params = estimator.get_params(deep=True).items()
    return any(
        k.split("__")[-1] == "groups" and isinstance(v, str) and v == groups for k, v in params
    )
