"""Target: y <-> tensor, loss, probabilities. One class per kind of outcome.

Axes: n - rows, b - batch, e - ensemble members, k - outputs.
Logits are (b, k), or (b, e, k) when a core has members: the loss is then the mean of the members'
own losses, the prediction the mean of their probabilities. `start` (k,) is the output that knows
nothing but the rates: where a head begins.
"""

import warnings

import numpy as np
import pandas as pd
import torch
from sklearn.utils import assert_all_finite, column_or_1d
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.multiclass import check_classification_targets
from torch import Tensor
from torch.nn import functional as F

from ehrfuse._runtime import users_line
from ehrfuse.nn.losses import weighted_loss


def spread(logits: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Logits as (b * e, k), and tensors of b rows repeated to match."""
    if logits.dim() == 2:
        return logits, *others
    e = logits.shape[1]
    return logits.flatten(0, 1), *(t.repeat_interleave(e, 0) for t in others)


class ClassTarget:
    """One outcome out of two or more classes; labels of any type.

    Parameters
    ----------
    y : array of shape (n,)
    class_weight : dict, "balanced" or None
    """

    task_names = None

    def __init__(self, y, class_weight=None):
        y = column_or_1d(y, warn=True)
        unknown = pd.isna(y)  # None and pd.NA too, or sorting the classes would fail
        if unknown.any():
            raise ValueError(
                f"Input y contains NaN: {int(unknown.sum())} labels are unknown; leave those "
                "rows out (unknown labels are allowed where y has several tasks)."
            )
        assert_all_finite(y, input_name="y")
        check_classification_targets(y)
        self.classes = np.unique(y)
        if len(self.classes) < 2:
            raise ValueError(
                f"y holds one class only, {self.classes.tolist()[0]!r}; a classifier needs at "
                "least two classes. Look at the cohort or the split that left the others out."
            )
        self.n_outputs = 1 if len(self.classes) == 2 else len(self.classes)
        compute_class_weight(class_weight, classes=self.classes, y=y)  # complains of bad values
        self.asked_weight = class_weight
        self._count(self.encode(y))

    def _count(self, y):
        """Class weights, of mean one over the rows, and where a head starts."""
        count = np.bincount(y[:, 0].astype(int), minlength=len(self.classes))
        if isinstance(self.asked_weight, str):  # "balanced"
            weight = count.sum() / (len(count) * count.clip(1))
        else:
            asked = self.asked_weight or {}
            weight = np.array([asked.get(c, 1.0) for c in self.classes.tolist()], dtype=float)
        weight = weight * count.sum() / max(weight @ count, 1e-12)
        self.class_weight = weight.astype("float32")
        share = (weight * count).clip(1e-6)
        start = np.log(share) if self.n_outputs > 1 else np.log(share[1:] / share[:1])
        self.start = (start - start.mean() * (self.n_outputs > 1)).astype("float32")

    def relearn(self, y: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Take what is counted from some rows of encoded y alone; returns y, encoded anew."""
        self._count(y[rows])
        return y

    def encode(self, y):
        """Class numbers as float32 (n, 1)."""
        y = column_or_1d(y)
        y = np.asarray(y)
        place = np.searchsorted(self.classes, y).clip(max=len(self.classes) - 1)
        unknown = y[self.classes[place] != y]
        if len(unknown):
            raise ValueError(
                f"y holds {unknown.tolist()[0]!r}, which was not among the classes of fit: "
                f"{self.classes.tolist()}."
            )
        return place[:, None].astype("float32")

    def loss(self, logits: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        """Cross-entropy, weighted by row and class."""
        logits, y, weight = spread(logits, y[:, 0], weight)
        weight = weight * torch.from_numpy(self.class_weight).to(y.device, y.dtype)[y.long()]
        if self.n_outputs == 1:
            term = F.binary_cross_entropy_with_logits(logits[:, 0], y, reduction="none")
        else:
            term = F.cross_entropy(logits, y.long(), reduction="none")
        return weighted_loss(term, weight)

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """(n, number of classes)."""
        if self.n_outputs == 1:
            logits = np.concatenate([np.zeros_like(logits), logits], -1)
        logits = logits - logits.max(-1, keepdims=True)
        p = np.exp(logits)
        p /= p.sum(-1, keepdims=True)
        return p.mean(1) if p.ndim == 3 else p

    def decide(self, p: np.ndarray) -> np.ndarray:
        """The most probable class of every row."""
        return self.classes[p.argmax(1)]

    def strata(self, y: np.ndarray) -> np.ndarray | None:
        """What a split should keep in proportion, from encoded y."""
        return y[:, 0]


class TaskTarget:
    """Several yes-or-no outcomes, NaN where nobody knows the answer.

    Parameters
    ----------
    y : array or DataFrame of shape (n, k)
    class_weight : "balanced" or None
    """

    def __init__(self, y, class_weight=None):
        self.task_names = [str(name) for name in getattr(y, "columns", range(np.shape(y)[1]))]
        y = self.encode(y)
        self.n_outputs = y.shape[1]
        self.classes = np.arange(self.n_outputs)
        if not (class_weight is None or class_weight == "balanced"):
            raise ValueError(
                f"class_weight={class_weight!r} does not fit several outcomes; use 'balanced', "
                "None or sample_weight."
            )
        self.balanced = class_weight == "balanced"
        self.constant = np.full(self.n_outputs, np.nan)
        self._count(y)

    def _count(self, y):
        """Tasks of one class, class weights, and where a head starts."""
        known, positive = (~np.isnan(y)).sum(0), np.nansum(y, 0)
        before = self.constant
        self.constant = np.where(
            (positive == 0) | (positive == known), positive / known.clip(1), np.nan
        )
        self.constant[known == 0] = 0.5
        self._warn_constant(known, np.isnan(before))
        pair = np.stack([known - positive, positive], 1)
        weight = known[:, None] / (2 * pair.clip(1)) if self.balanced else np.ones_like(pair)
        self.class_weight = weight.astype("float32")
        odds = (positive * weight[:, 1]).clip(0.5) / ((known - positive) * weight[:, 0]).clip(0.5)
        self.start = np.log(odds).astype("float32")

    def relearn(self, y: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Take what is counted from some rows of encoded y alone; returns y, encoded anew."""
        self._count(y[rows])
        return y

    def _warn_constant(self, known, new):
        if not known.any():
            raise ValueError("y holds no known label at all; at least one row needs a class.")
        for j in np.flatnonzero(~np.isnan(self.constant) & new):
            got = "one class only" if known[j] else "no known label"
            warnings.warn(
                f"Task {self.task_names[j]!r} has {got} among the training rows; its rate "
                f"{self.constant[j]:g} is predicted for every row"
                f"{'' if known[j] else ' (a coin, for nothing is known)'}.",
                UserWarning,
                stacklevel=users_line(),
            )

    def encode(self, y):
        """Float32 (n, k) of 0, 1 and NaN."""
        y = by_name(y, self.task_names)
        try:
            y = _floats(y)
        except (TypeError, ValueError) as error:
            raise ValueError(
                "y of several tasks must hold 0, 1 or NaN (unknown); it holds other things. "
                "Several classes of one outcome are a 1-D y."
            ) from error
        bad = y[~(np.isnan(y) | (y == 0) | (y == 1))]
        if len(bad):
            raise ValueError(
                f"y of several tasks must hold 0, 1 or NaN (unknown class), got {bad[0]:g}. If NaN "
                "was in y, cross_val_predict has numbered it as a class: use "
                "evaluation.out_of_fold instead."
            )
        if y.shape[1] != len(self.task_names):
            raise ValueError(f"y has {y.shape[1]} tasks, fit had {len(self.task_names)}.")
        return y.astype("float32")

    def loss(self, logits: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        """Binary cross-entropy over the known labels; zero where a batch has none."""
        logits, y, weight = spread(logits, y, weight)
        table = torch.from_numpy(self.class_weight).to(y.device, y.dtype)
        learned = torch.from_numpy(np.isnan(self.constant)).to(y.device)
        known = ~y.isnan() & learned
        y = y.nan_to_num()
        term = F.binary_cross_entropy_with_logits(logits, y, reduction="none")
        return weighted_loss(
            term, weight[:, None] * known * torch.where(y > 0, table[:, 1], table[:, 0])
        )

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """(n, k): the probability of a positive, task by task."""
        p = 1 / (1 + np.exp(-logits))
        p = p.mean(1) if p.ndim == 3 else p
        return np.where(np.isnan(self.constant), p, np.nan_to_num(self.constant))

    def decide(self, p: np.ndarray) -> np.ndarray:
        """0 or 1, task by task."""
        return (p > 0.5).astype(int)

    def strata(self, y: np.ndarray) -> np.ndarray | None:
        """Nothing: many tasks cannot all be kept in proportion."""
        return None


class ValueTarget:
    """One or several real numbers, standardised for the network.

    Parameters
    ----------
    y : array of shape (n,) or (n, k)
        NaN where unknown, if there are several.
    """

    def __init__(self, y):
        self.task_names = [str(name) for name in getattr(y, "columns", [])] or None
        y = _floats(y)
        y = column_or_1d(y, warn=True) if y.ndim == 2 and y.shape[1] == 1 else y
        self.flat = y.ndim == 1
        y = self._numbers(y)
        self.n_outputs = y.shape[1]
        unknown = np.flatnonzero(np.isnan(y).all(0))
        if len(unknown):
            names = [self.task_names[k] if self.task_names else k for k in unknown]
            warnings.warn(
                f"No value of {names} is known in y; NaN is predicted there.",
                UserWarning,
                stacklevel=users_line(),
            )
        self._learn(y)
        self.start = np.zeros(self.n_outputs, "float32")

    def _learn(self, y):
        known = ~np.isnan(y).all(0)  # of nothing there is no mean
        self.center, self.scale = np.full(len(known), np.nan), np.ones(len(known))
        self.center[known] = np.nanmean(y[:, known], 0)
        scale = np.nanstd(y[:, known], 0)
        self.scale[known] = np.where(scale > 0, scale, 1.0)

    def _numbers(self, y):
        y = _floats(y)
        assert_all_finite(y, input_name="y", allow_nan=y.ndim == 2 and y.shape[1] > 1)
        return y[:, None] if y.ndim == 1 else y

    def encode(self, y):
        """Standardised float32 (n, k)."""
        y = by_name(y, self.task_names)
        return ((self._numbers(y) - self.center) / self.scale).astype("float32")

    def relearn(self, y: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Take centre and scale from some rows of encoded y alone; returns y, encoded anew."""
        raw = y * self.scale + self.center
        self._learn(raw[rows])
        return ((raw - self.center) / self.scale).astype("float32")

    def loss(self, guess: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        """Mean squared error over the known values, in standard deviations."""
        guess, y, weight = spread(guess, y, weight)
        known = ~y.isnan()
        return weighted_loss((guess - y.nan_to_num()) ** 2, weight[:, None] * known)

    def values(self, guess: np.ndarray) -> np.ndarray:
        """In the unit of y: (n,) or (n, k)."""
        guess = guess.mean(1) if guess.ndim == 3 else guess
        y = guess * self.scale + self.center
        return y[:, 0] if self.flat else y

    def strata(self, y: np.ndarray) -> np.ndarray | None:
        """Nothing."""
        return None


def _floats(y):
    """Numbers as float64, NaN for every kind of null."""
    if isinstance(y, pd.DataFrame | pd.Series | pd.Index):
        y = y.astype(object).where(y.notna(), np.nan)  # a null of any kind
    return np.asarray(y, dtype="float64")


def by_name(y, names):
    """A frame of outcomes in the order of fit, whatever order its columns come in."""
    if names is None or not hasattr(y, "columns"):
        return y
    found = [str(name) for name in y.columns]
    if found == names:
        return y
    if sorted(found) != sorted(names):
        raise ValueError(f"y has the tasks {found}, fit had {names}; give those of fit.")
    return y.iloc[:, [found.index(name) for name in names]]


def classification_target(y, class_weight=None):
    """Pick the kind of target: a 2-D y of several columns is several yes-or-no outcomes."""
    y = y if hasattr(y, "columns") else np.asarray(y)
    if y.ndim == 2 and y.shape[1] > 1:
        return TaskTarget(y, class_weight)
    if hasattr(y, "columns"):
        y = y.iloc[:, 0]  # one named task: scikit-learn's 1-D convention, probabilities (n, 2)
    return ClassTarget(y, class_weight)
