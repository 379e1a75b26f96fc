"""Everything between a DataFrame and `train`: the template of every estimator with a torch core."""

import os
import warnings
from importlib.metadata import version
from numbers import Integral, Real

import numpy as np
import pandas as pd
import torch
from sklearn.base import BaseEstimator, clone
from sklearn.model_selection import GroupShuffleSplit, ShuffleSplit, StratifiedShuffleSplit
from sklearn.utils import check_random_state, check_scalar
from sklearn.utils.validation import check_consistent_length, check_is_fitted

from ehrfuse._checkpoint import open_checkpoint
from ehrfuse._data import Data
from ehrfuse._distributed import join
from ehrfuse._frames import Frames, dropped
from ehrfuse._handover import Handover
from ehrfuse._progress import ProgressMixin
from ehrfuse._runtime import default_device, resolve_device, seeded, users_line, world
from ehrfuse._train import predict, train
from ehrfuse.modalities import Modality

MIN_VALIDATION = 5  # rows; fewer say nothing about when to stop


class TorchEstimator(ProgressMixin, Handover, Frames, BaseEstimator):
    """Template of every estimator with a torch core.

    Parameters
    ----------
    modalities : dict of str to Modality, or None, default=None
        What the columns of X are. An entry ``"drop"`` leaves a modality out. None takes all columns
        as one `Tabular` named ``"table"``; arrays work then too.
    pretrained : estimator or None, default=None
        A pretrainer, fitted here on the training rows; encoders of shared modality names, and the
        trunk if it is built alike, are taken over. ``FrozenEstimator(fitted)`` brings one fitted
        elsewhere.
    freeze : tuple of str, default=()
        Parts kept as they came, e.g. ``("encoders.note",)``.
    max_epochs : int, default=10
        The learning rate falls along a cosine to zero over these epochs.
    batch_size : int or "auto", default="auto"
        "auto" is a twelfth of the training rows, at least 16 and at most 256.
    lr : float, default=2e-3
        Highest learning rate of AdamW.
    weight_decay : float, default=1.0
        Of weight matrices, decoupled (AdamW): high, because clinical cohorts are small.
    patience : int or None, default=None
        Epochs without a better validation loss before the fit stops; None never stops early.
    validation_fraction : float or None, default=None
        Share of the training rows (of the patients, with `groups`) set aside to choose the epoch,
        before anything is learned. None trains on all rows for `max_epochs`.
    groups : str or None, default=None
        Column of X that names the patient: never a feature; no split inside the fit separates rows
        of one patient. It need not be there at predict.
    memory : str, joblib.Memory or None, default=None
        Cache of fitted pretrainers, as in :class:`sklearn.pipeline.Pipeline`.
    checkpoint : str, path or None, default=None
        Folder that keeps the state of a fit: one that was stopped, and begins again with the same
        parameters and data, goes on where it was and ends with the same weights; one that was done
        ends at once. Every fit has a folder of its own in it, so that folds and candidates of a
        search may share the path. Needs a `random_state`. None keeps nothing.
    amp : bool, default=False
        bfloat16 autocast; for GPUs, on CPUs it is usually slower.
    random_state : int, RandomState or None, default=None
    device : str, torch.device or None, default=None
        None is the best available: cuda, mps, cpu.
    verbose : bool or None, default=None
        None shows a progress bar on long fits at a terminal or in a notebook, True prints a line
        an epoch, False nothing.
    """

    _accepts: tuple[type, ...] = (Modality,)
    _fit_only: tuple[type, ...] = ()  # kinds whose columns need not be there at predict
    _nested = True  # whether parameters of modalities are its own too
    checkpoint = None  # of a method whose constructor leaves it out

    def __init__(
        self,
        modalities=None,
        *,
        pretrained=None,
        freeze=(),
        max_epochs=10,
        batch_size="auto",
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
        self.modalities = modalities
        self.pretrained = pretrained
        self.freeze = freeze
        self.max_epochs = max_epochs
        self.batch_size = batch_size
        self.lr = lr
        self.weight_decay = weight_decay
        self.patience = patience
        self.validation_fraction = validation_fraction
        self.groups = groups
        self.memory = memory
        self.checkpoint = checkpoint
        self.amp = amp
        self.random_state = random_state
        self.device = device
        self.verbose = verbose

    # ------------------------------------------------------------ parameters

    def get_params(self, deep=True):
        """Parameters, those of each modality under its own name included.

        Parameters
        ----------
        deep : bool, default=True

        Returns
        -------
        params : dict
        """
        params = super().get_params(deep)
        for name, modality in self._named().items() if deep and self._nested else ():
            params[name] = modality
            if isinstance(modality, Modality):
                params |= {f"{name}__{key}": v for key, v in modality.get_params().items()}
        return params

    def _named(self):
        # Nonsense is reported by fit; reading parameters must never fail.
        return self.modalities if isinstance(self.modalities, dict) else {}

    def set_params(self, **params):
        """Set parameters, e.g. ``note__max_length=64`` or ``note="drop"``.

        Parameters
        ----------
        **params : dict

        Returns
        -------
        self : estimator
        """
        # Outermost first, as in Pipeline: the dict, then its entries, then their parameters.
        if "modalities" in params:
            self.modalities = params.pop("modalities")
        entries = {name: params.pop(name) for name in self._named() if name in params}
        if entries:
            self.modalities = self.modalities | entries  # a new dict; the caller's stays as it is
        for name in params:
            if dropped(self._named().get(name.partition("__")[0])):
                raise ValueError(
                    f"{name!r} cannot be set while that modality is 'drop'; in a search, give a "
                    "list of two grids, one for 'drop' and one with its parameters."
                )
        return super().set_params(**params)

    def _check_params(self):
        check_scalar(self.max_epochs, "max_epochs", Integral, min_val=1)
        if self.batch_size != "auto":
            check_scalar(self.batch_size, "batch_size", Integral, min_val=1)
        check_scalar(self.lr, "lr", Real, min_val=0, include_boundaries="neither")
        check_scalar(self.weight_decay, "weight_decay", Real, min_val=0)
        if self.patience is not None:
            check_scalar(self.patience, "patience", Integral, min_val=1)
        if self.validation_fraction is not None:
            check_scalar(
                self.validation_fraction, "validation_fraction", Real,
                min_val=0, max_val=1, include_boundaries="left",
            )  # fmt: skip
        self._check_checkpoint()

    def _check_checkpoint(self):
        if not isinstance(self.checkpoint, str | os.PathLike | None):
            raise TypeError(
                f"checkpoint={self.checkpoint!r} must be a folder, as str or path, or None."
            )
        if self.random_state is None and (self.checkpoint is not None or world()[1] > 1):
            raise ValueError(
                "A checkpoint, and several processes, need a random_state, such as "
                "random_state=0: with None every fit is another one."
            )

    # ------------------------------------------------------------ what a method supplies

    def _make_core(self, modalities, target):
        """Build the torch core from fitted modalities; reads parameters that are plain values."""
        raise NotImplementedError

    def _make_target(self, y):
        """Turn y into a `Target`; None where there is none."""
        return None

    def _prepare(self, core, data, validation, seed):
        """Before the first epoch: measure the training rows, compute what stays the same.

        What the core measures goes into its buffers. Returns both sets, changed or not.
        """
        return data, validation

    # ------------------------------------------------------------ fit

    def _fit(self, X, y=None, sample_weight=None, X_val=None, y_val=None):
        self._check_params()
        X = self._frame(X, y, reset=True)
        declared = self._declared(X)
        join(resolve_device(self.device))  # before the device: of several each has its own
        device = resolve_device(self.device)
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        y, weight = self._labels(X, y, sample_weight, reset=True)
        self._warn_of_idle_patience(X_val)
        if X_val is not None:
            X_val = self._frame(X_val, y_val, reset=False)
            rows, rows_val = np.flatnonzero(weight > 0), None
        else:
            # Validation rows leave first, so no scaler, vocabulary or pretrainer ever sees them.
            rows, rows_val = self._set_aside(X, y, weight, seed)
            if rows_val is not None and y is not None:
                y = self.target_.relearn(y, rows)
        X_train = X if len(rows) == len(X) else X.iloc[rows]
        self._fit_pretrained(X_train, declared, seed)
        self._fit_modalities(X_train, declared)
        del X_train
        data = self._data(X, y, weight, rows)
        validation = None if rows_val is None else Data(**vars(data) | {"rows": rows_val})
        if X_val is not None:
            validation = self._data(X_val, *self._labels(X_val, y_val, None, reset=False))
        return self._train(data, self._worth_watching(validation), seed, device)

    def _warn_of_idle_patience(self, X_val):
        if self.patience is not None and not self.validation_fraction and X_val is None:
            warnings.warn(
                f"patience={self.patience} does nothing without rows to watch; give "
                "validation_fraction, or X_val to fit.",
                UserWarning,
                stacklevel=users_line(),
            )

    def _worth_watching(self, validation):
        """The validation rows, or None where no label of theirs is known."""
        if validation is None or validation.y is None:
            return validation
        if not np.isnan(validation.y[validation.rows]).all():
            return validation
        warnings.warn(
            f"None of the {len(validation)} validation rows has a known label; the fit runs all "
            f"{self.max_epochs} epochs without early stopping.",
            UserWarning,
            stacklevel=users_line(),
        )
        return None

    def _train(self, data, validation, seed, device):
        with seeded(seed, device):
            core = self._make_core(self.modalities_, self.target_).to(device)
        self._take_over(core)
        core.freeze(self.freeze)
        data, validation = self._prepare(core, data, validation, seed)
        size, team = self._batch_size(len(data)), join(device)
        checkpoint = open_checkpoint(self, core, (data, validation), seed, size, team)
        with self._progress() as report:
            self.history_ = train(
                core, data, validation=validation, max_epochs=self.max_epochs,
                batch_size=size, lr=self.lr, weight_decay=self.weight_decay,
                patience=self.patience, seed=seed, device=device, amp=self.amp, report=report,
                checkpoint=checkpoint, team=team,
            )  # fmt: skip
        self.n_iter_, self.module_ = len(self.history_), core
        self._snapshot()
        return self

    def _labels(self, X, y, sample_weight, *, reset):
        """Encoded y and row weights: the one place where both are checked."""
        check_consistent_length(X, y, sample_weight)
        weight = (
            np.ones(len(X)) if sample_weight is None else np.asarray(sample_weight, dtype=float)
        )
        if weight.ndim != 1 or not np.isfinite(weight).all() or (weight < 0).any():
            raise ValueError("sample_weight must be one finite number of at least 0 for every row.")
        if not weight.any():
            raise ValueError("All sample weights are zero; at least one row must count.")
        kept = weight > 0  # what weighs nothing teaches nothing, the scale of y included
        weight = weight / weight[kept].mean()
        known = y if y is None or kept.all() else _rows_of(y, kept)
        if reset:
            self.target_ = self._make_target(known)
        if y is None:
            return None, weight.astype("float32")
        encoded = self.target_.encode(known)
        full = np.zeros((len(X), encoded.shape[1]), "float32")
        full[kept] = encoded
        return full, weight.astype("float32")

    def _set_aside(self, X, y, weight, seed):
        """Training and validation rows; all rows of one patient land on the same side."""
        rows = np.flatnonzero(weight > 0)  # weight 0 is as good as absent, in scalers too
        share = self.validation_fraction
        if not share:
            return rows, None
        strata = None if y is None else self.target_.strata(y)
        if self.groups is not None:
            groups = pd.factorize(X[self.groups])[0][rows]
            enough = len(np.unique(groups)) * share >= MIN_VALIDATION
            cut = GroupShuffleSplit(1, test_size=share, random_state=seed).split
            split = cut(rows, groups=groups) if enough else None
        else:
            enough = len(rows) * share >= MIN_VALIDATION
            counts = np.unique(strata[rows], return_counts=True)[1] if strata is not None else [0]
            n_val = int(np.ceil(len(rows) * share))
            if min(counts) >= 2 and n_val >= len(counts) and len(rows) - n_val >= len(counts):
                cut = StratifiedShuffleSplit(1, test_size=share, random_state=seed).split
                split = cut(rows, strata[rows]) if enough else None
            else:
                cut = ShuffleSplit(1, test_size=share, random_state=seed).split
                split = cut(rows) if enough else None
        if split is None:
            warnings.warn(
                f"{len(rows)} training rows are too few to set {share:.0%} aside; the fit runs all "
                f"{self.max_epochs} epochs without early stopping.",
                UserWarning,
                stacklevel=users_line(),
            )
            return rows, None
        inside, aside = next(split)
        return rows[inside], rows[aside]

    def _fit_modalities(self, X, declared):
        taken = {} if self.pretrained_ is None else self.pretrained_.modalities_
        with default_device(self.device):
            self.modalities_ = {
                name: taken[name] if name in taken else clone(modality).fit(X)
                for name, modality in declared.items()
            }

    def _data(self, X, y=None, weight=None, rows=None):
        with default_device(self.device):  # frozen models encode in transform
            blocks = {name: m.transform(X) for name, m in self.modalities_.items()}
        groups = None
        if self.groups is not None and self.groups in X.columns:
            groups = pd.factorize(X[self.groups])[0].astype("int64")
            # Rows whose patient is not told are patients of their own, not one and the same.
            nobody = groups < 0
            groups[nobody] = groups.max(initial=-1) + 1 + np.arange(nobody.sum())
        return Data(blocks, np.arange(len(X)) if rows is None else rows, y, weight, groups)

    # ------------------------------------------------------------ predict

    def _predict(self, X, core=None):
        """Output for every row; of another view of the module where one is given."""
        check_is_fitted(self)
        X = self._frame(X, reset=False)
        return self._infer(core or self.module_, self._data(X))

    def _infer(self, core, data):
        """Output of `core` for every row of `data`, in order."""
        return predict(core, data, self._batch_size(len(data)), resolve_device(self.device))

    def _batch_size(self, n_rows):
        return min(256, max(16, n_rows // 12)) if self.batch_size == "auto" else self.batch_size

    def __sklearn_tags__(self):
        """Tags: holes, strings and categories are welcome."""
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.input_tags.categorical = True
        tags.input_tags.string = self.modalities is not None
        return tags

    # ------------------------------------------------------------ persistence

    def _snapshot(self):
        """Plain parameters at fit time: what `_make_core` may read, whatever is set later."""
        simple = (int, float, str, bool, tuple, type(None), np.generic)
        params = self.get_params(deep=False)
        self.built_with_ = {k: v for k, v in params.items() if isinstance(v, simple)}
        self.versions_ = {name: version(name) for name in ("ehrfuse", "torch", "scikit-learn")}

    def __getstate__(self):
        """Weights as plain arrays: no torch object in the pickle, no device in the file."""
        state = dict(super().__getstate__())
        if "module_" in state:
            weights = state.pop("module_").state_dict()
            state["weights_"] = {name: tensor.cpu().numpy() for name, tensor in weights.items()}
        return state

    def __setstate__(self, state):
        """Rebuild the module from the parameters of fit time."""
        weights = state.pop("weights_", {})
        super().__setstate__(state)
        if weights:
            builder = type(self)(**self.built_with_)
            with seeded(0, torch.device("cpu")):
                self.module_ = builder._make_core(self.modalities_, self.target_)
            tensors = {name: torch.from_numpy(np.array(a)) for name, a in weights.items()}
            self.module_.load_state_dict(tensors)
            _warn_other_version(self.versions_)


def _warn_other_version(stamped):
    now = version("ehrfuse")
    if stamped["ehrfuse"] != now:
        warnings.warn(
            f"The model was fitted with ehrfuse {stamped['ehrfuse']}, this is {now}; "
            "compare a few predictions before relying on it.",
            UserWarning,
            stacklevel=3,
        )


def _rows_of(y, kept):
    return y[kept] if hasattr(y, "iloc") else np.asarray(y)[kept]
