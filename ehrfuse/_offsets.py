"""Calibration of probabilities and their offsets by pattern, as plain statistics.

Symbols: base a calibrated log-odds (or probability), tau the offset added to it, y its label.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.optimize import minimize
from scipy.special import expit, log_softmax, softmax

EDGE = 1e-5  # keeps logits within +-11.5 without the ties that clipping would make
TINY = 1e-12
# Prior precisions of (log slope, intercept): weak around no calibration at all, firmer around the
# calibration of all folds together, since models that share most of their rows differ little.
WEAK, FIRM = np.array([1.0, 0.01]), np.array([16.0, 16.0])


def log_odds(p: np.ndarray) -> np.ndarray:
    """Log-odds, drawn in by `EDGE` so that 0 and 1 stay finite."""
    q = EDGE + (1 - 2 * EDGE) * p
    return np.log(q) - np.log1p(-q)


class Calibration:
    """Global calibration of several models, each on the rows that it did not see.

    Parameters
    ----------
    kind : {"platt", "temperature", None}
    joint : bool
        Whether the tasks are the classes of one softmax, so that a temperature is theirs together.

    Attributes
    ----------
    coef_ : array of shape (n_models, n_tasks, 2)
        Log slope and intercept. A slope is positive by construction: calibration never turns a
        ranking round.
    """

    def __init__(self, kind: str | None, joint: bool) -> None:
        self.joint = joint and kind == "temperature"
        self.n_free = {"platt": 2, "temperature": 1, None: 0}[kind]

    def fit(
        self, P: np.ndarray, Y: np.ndarray, weight: np.ndarray, fold: np.ndarray
    ) -> "Calibration":
        """Learn from held-out P and Y (n, n_tasks); `fold` numbers the model of every row."""
        n_folds, n_tasks = int(fold.max()) + 1, P.shape[1]
        self.coef_ = np.zeros((n_folds, n_tasks, 2))
        tasks = [list(range(n_tasks))] if self.joint else [[task] for task in range(n_tasks)]
        for task in tasks if self.n_free else []:
            known = (weight > 0) & ~np.isnan(Y[:, task]).any(axis=1)
            if len(np.unique(Y[known][:, task])) < 2:
                continue
            p, y = P[:, task], Y[:, task]
            pooled = self._fit_one(p[known], y[known], weight[known], np.zeros(2), WEAK)
            self.coef_[:, task] = pooled
            for k in range(n_folds) if n_folds > 1 else ():
                own = known & (fold == k)
                self.coef_[k, task] = self._fit_one(p[own], y[own], weight[own], pooled, FIRM)
        return self

    def apply(self, P: np.ndarray, model: int) -> np.ndarray:
        """Calibrated log-odds (n, n_tasks) of one model's probabilities."""
        log_slope, intercept = np.moveaxis(self.coef_[model], -1, 0)
        if self.joint:
            return log_odds(softmax(np.exp(log_slope) * np.log(EDGE + P), axis=1))
        return np.exp(log_slope) * log_odds(P) + intercept

    def table(self, tasks: list) -> pd.DataFrame:
        """Tidy frame: fold, task, slope, intercept."""
        n_models = len(self.coef_)
        columns = {
            "fold": np.repeat(np.arange(n_models), len(tasks)),
            "task": tasks * n_models,
            "slope": np.exp(self.coef_[..., 0]).ravel(),
            "intercept": self.coef_[..., 1].ravel(),
        }
        return pd.DataFrame(columns)

    def _fit_one(
        self,
        p: np.ndarray,
        y: np.ndarray,
        weight: np.ndarray,
        centre: np.ndarray,
        precision: np.ndarray,
    ) -> np.ndarray:
        """Posterior mode of (log slope, intercept); what is not free stays at the centre."""
        n_free = self.n_free
        x = np.log(EDGE + p) if self.joint else log_odds(p)

        def objective(free: np.ndarray) -> float:
            log_slope, intercept = np.append(free, centre[n_free:])
            z = np.exp(np.clip(log_slope, -5, 5)) * x + intercept
            each = -y * log_softmax(z, axis=1) if self.joint else np.logaddexp(0, z) - y * z
            penalty = 0.5 * precision[:n_free] @ (free - centre[:n_free]) ** 2
            return float(weight @ each.sum(axis=1) + penalty) / max(weight.sum(), 1.0)

        return np.append(minimize(objective, centre[:n_free], method="BFGS").x, centre[n_free:])


@dataclass(frozen=True)
class Rows:
    """Held-out rows of one task: base, 0/1 label, weight, group code; each of shape (n,)."""

    base: np.ndarray
    y: np.ndarray
    weight: np.ndarray
    cluster: np.ndarray

    def take(self, rows: np.ndarray) -> "Rows":
        return Rows(self.base[rows], self.y[rows], self.weight[rows], self.cluster[rows])


@dataclass(frozen=True)
class Rule:
    """How offsets are made; the parameters of the rectifier of the same names."""

    scale: str
    shrink: bool
    gate: tuple[float, float] | None
    min_count: int

    def base(self, log_odds: np.ndarray) -> np.ndarray:
        """Turn log-odds into what offsets are added to."""
        return log_odds if self.scale == "logit" else expit(log_odds)

    def add(self, base: np.ndarray, tau: np.ndarray) -> np.ndarray:
        """Probabilities after the offset."""
        return expit(base + tau) if self.scale == "logit" else np.clip(base + tau, 0, 1)

    def mean(self, rows: Rows, tau: float) -> np.ndarray:
        return expit(rows.base + tau) if self.scale == "logit" else rows.base + tau

    def score(self, rows: Rows, tau: float) -> tuple[float, float]:
        """Weighted sum of residuals at an offset, and how fast it falls with the offset."""
        mean = self.mean(rows, tau)
        steep = mean * (1 - mean) if self.scale == "logit" else np.ones_like(mean)
        return float(rows.weight @ (rows.y - mean)), max(float(rows.weight @ steep), TINY)

    def variance(self, rows: Rows, tau: float) -> float:
        """Variance of the score: binomial, or as the groups show it where that is larger."""
        mean = self.mean(rows, tau)
        bounded = np.clip(mean, 0, 1)
        _, cluster = np.unique(rows.cluster, return_inverse=True)
        by_group = np.bincount(cluster, rows.weight * (rows.y - mean))
        binomial = rows.weight**2 @ (bounded * (1 - bounded))
        return max(float(binomial), float(by_group @ by_group), TINY)

    def solve(self, rows: Rows, centre: float = 0.0, ridge: float = 0.0) -> float:
        """Offset at which observed and expected events agree, pulled to `centre` by `ridge`."""
        surplus = 0.0
        if ridge == 0:  # without a prior, labels that all agree have no finite root: half an event
            half, events = 0.5 * rows.weight.mean(), rows.weight @ rows.y
            surplus = np.clip(events, half, rows.weight.sum() - half) - events
        tau = centre
        for _ in range(100):
            score, slope = self.score(rows, tau)
            step = (score + surplus - ridge * (tau - centre)) / (slope + ridge)
            # q(1 - q) changes at most e-fold over a step of 1, so capped Newton converges.
            tau += float(np.clip(step, -1, 1))
            if abs(step) < 1e-10:
                break
        return tau


@dataclass(frozen=True)
class Node:
    """Offset of one pattern, one count of modalities, or all rows; a line of the table."""

    n: int = 0
    tau_raw: float = np.nan
    se: float = np.inf
    tau: float = 0.0
    source: str = "global"


def between(parts: Mapping, parents: Mapping, rule: Rule, anchored: bool) -> float:
    """Variance of offsets around their parents' by the method of moments.

    `anchored`: the parent is a fixed number and not estimated from the same rows.
    """
    keys = [key for key, part in parts.items() if len(part.y)]
    if not keys:
        return 0.0
    tau, precision = np.empty(len(keys)), np.empty(len(keys))
    for i, key in enumerate(keys):
        at = 0.0 if anchored else parents[key].tau_raw
        score, slope = rule.score(parts[key], at)
        tau[i], precision[i] = score / slope, slope**2 / rule.variance(parts[key], at)
    if anchored:
        return max(0.0, float(precision @ tau**2 - len(keys)) / precision.sum())
    seen: dict[int, int] = {}
    family = np.array([seen.setdefault(id(parents[key]), len(seen)) for key in keys])
    total = np.bincount(family, precision)
    centre = np.bincount(family, precision * tau) / total
    excess = precision @ (tau - centre[family]) ** 2 - (len(keys) - len(total))
    room = (total - np.bincount(family, precision**2) / total).sum()
    return max(0.0, float(excess / room)) if room > TINY * total.sum() else 0.0


def grow(rows: Rows, keys: np.ndarray, parents: Mapping, rule: Rule, level: str) -> dict:
    """Nodes of one level, {key: Node}, for every key of `parents`, {key: Node above}."""
    parts = {key: rows.take(np.flatnonzero(keys == key)) for key in parents}
    spread = between(parts, parents, rule, level == "global") if rule.shrink else np.inf
    return {key: _node(part, parents[key], spread, rule, level) for key, part in parts.items()}


def _node(rows: Rows, parent: Node, spread: float, rule: Rule, level: str) -> Node:
    n = len(rows.y)
    if n == 0:
        return Node(tau=parent.tau, source=parent.source)
    raw = rule.solve(rows)
    se = np.sqrt(rule.variance(rows, raw)) / rule.score(rows, raw)[1]
    inherited = Node(n, raw, se, parent.tau, parent.source)
    few = level != "global" and n < rule.min_count
    one_class = rows.y.min() == rows.y.max() and (level == "global" or not rule.shrink)
    if spread == 0 or few or one_class:
        return inherited
    tau, error = raw, se
    if rule.shrink:
        slope, variance = rule.score(rows, parent.tau)[1], rule.variance(rows, parent.tau)
        # Repeated rows inform less than their number: the prior weighs more by that factor.
        tau = rule.solve(rows, parent.tau, ridge=variance / slope / spread)
        error = np.sqrt(1 / (slope**2 / variance + 1 / spread))
    if rule.gate is not None and abs(tau) - rule.gate[1] * error <= rule.gate[0]:
        return inherited
    return Node(n, raw, se, tau, level)


class Offsets:
    """Offsets of all tasks by pattern, by count of modalities and overall.

    Parameters
    ----------
    rule : Rule
    kinds : bool array of shape (n_patterns, n_modalities)
        All patterns that are known, also those without rows in fit.
    """

    def __init__(self, rule: Rule, kinds: np.ndarray) -> None:
        self.rule, self.kinds = rule, kinds

    def fit(
        self,
        base: np.ndarray,
        Y: np.ndarray,
        weight: np.ndarray,
        cluster: np.ndarray,
        kind: np.ndarray,
    ) -> "Offsets":
        """Learn from held-out rows: base and Y are (n, n_tasks), `kind` numbers the patterns."""
        count = self.kinds.sum(axis=1)
        self.top_, self.counts_, self.patterns_ = [], [], []
        for task in range(base.shape[1]):
            known = np.flatnonzero(~np.isnan(Y[:, task]) & (weight > 0))
            rows = Rows(base[:, task], Y[:, task], weight, cluster).take(known)
            top = grow(rows, np.zeros(len(known)), {0: Node()}, self.rule, "global")[0]
            above = {int(c): top for c in np.unique(count)}
            counts = grow(rows, count[kind[known]], above, self.rule, "count")
            above = {m: counts[int(c)] for m, c in enumerate(count)}
            self.top_.append(top)
            self.counts_.append(counts)
            self.patterns_.append(grow(rows, kind[known], above, self.rule, "pattern"))
        self.size_ = np.bincount(kind, minlength=len(count))
        self.tau_ = np.array(
            [[nodes[m].tau for nodes in self.patterns_] for m in range(len(count))]
        )
        return self

    def of(self, kind: np.ndarray) -> tuple[np.ndarray, bool]:
        """Offsets (n_tasks,) of one pattern, and whether it was known."""
        away = (self.kinds != kind).sum(axis=1)
        if (away == 0).any():
            return self.tau_[away.argmin()], True
        near = np.flatnonzero(away == 1)  # one modality more or less
        if len(near):
            return self.tau_[near[self.size_[near].argmax()]], False
        count = int(kind.sum())
        nodes = [
            counts.get(count, top) for counts, top in zip(self.counts_, self.top_, strict=True)
        ]
        return np.array([node.tau for node in nodes]), False

    def tables(self, tasks: list, labels: np.ndarray) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Tidy frames of the patterns, most frequent first, and of the levels above them."""
        order = np.argsort(-self.size_, kind="stable")
        below, above = [], []
        for task, top, counts, patterns in zip(
            tasks, self.top_, self.counts_, self.patterns_, strict=True
        ):
            below += [(task, labels[m], *vars(patterns[m]).values()) for m in order]
            above += [(task, "(global)", *vars(top).values())]
            above += [(task, f"({c} present)", *vars(node).values()) for c, node in counts.items()]
        names = ["task", "pattern", *Node.__annotations__]
        return pd.DataFrame(below, columns=names), pd.DataFrame(above, columns=names)
