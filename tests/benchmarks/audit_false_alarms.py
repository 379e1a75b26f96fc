"""False alarms of `audit_leakage`: random worlds without a leak, each with an honest estimator.

A world draws its size, number of columns, strength of effects, rate of the outcome, patients,
missingness (at random, by illness, by value), notes with honest words, events, composite scores,
and one of seven estimators. Every finding of verdict "warn" or "leak" is a false alarm.
"""

# First of all: it sets the number of threads.
# ruff: isort: off
from _common import finish, parse, parser, row
# ruff: isort: on

import time
from collections import Counter, defaultdict

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.ensemble import (
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
)
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ehrfuse.evaluation import audit_leakage
from ehrfuse.evaluation.audit import CHECKS

WORDS = np.array([f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in "lmnrst"])


class Numbers(TransformerMixin, BaseEstimator):
    """The numeric columns."""

    def fit(self, X, y=None):
        """Nothing to learn."""
        self.fitted_ = True
        return self

    def transform(self, X):
        """Numbers only."""
        return X.select_dtypes("number").drop(columns="who", errors="ignore")


def make_world(seed):
    """X, y, groups, and what was drawn."""
    rng = np.random.default_rng([seed, 2026])
    n = int(rng.choice([150, 300, 600, 1200, 2000]))
    d = int(rng.integers(3, 25))
    n_groups = n if rng.random() < 0.5 else max(30, n // 3)
    groups = np.sort(rng.integers(0, n_groups, n))
    own = rng.normal(size=(n_groups, d))[groups]
    z = 0.6 * own + 0.8 * rng.normal(size=(n, d))
    z[:, 1:] += rng.random() * z[:, :1]
    effects = np.where(np.arange(d) < rng.integers(1, 5), rng.normal(0, 1, d), 0)
    effects *= rng.uniform(0, 1.2) / max(np.abs(effects).max(), 1e-9)
    risk = z @ effects
    kind = "number" if rng.random() < 0.15 else "class"
    if kind == "number":
        y = np.exp(0.5 * risk + rng.normal(0, 1, n))
    else:
        cut = np.quantile(risk, 1 - rng.uniform(0.05, 0.5))
        y = (rng.random(n) < 1 / (1 + np.exp(cut - risk) ** 1.5)).astype(int)
    return _frame(rng, z, risk, y, groups), y, groups, kind


def _frame(rng, z, risk, y, groups):
    n, d = z.shape
    X = pd.DataFrame(z * rng.uniform(0.5, 20, d) + rng.normal(0, 50, d))
    X.columns = [f"v{i}" for i in range(d)]
    X["v0"] = X["v0"].round()
    X["sex"] = rng.choice(["f", "m"], n)
    X["ward"] = rng.choice([f"w{i}" for i in range(12)], n, p=rng.dirichlet(np.ones(12)))
    X["rare"] = np.where(rng.random(n) < 0.02, "yes", "no")
    if rng.random() < 0.3:
        X["sum"] = risk + rng.normal(0, 1.5 * risk.std() + 0.1, n)  # a score with its own error
    if rng.random() < 0.3:
        X["number"] = rng.permutation(n) + 10_000
    for name in X.columns[rng.random(len(X.columns)) < 0.4]:
        by = rng.choice(["random", "illness", "value"])
        pull = {"random": 0 * risk, "illness": risk, "value": z[:, 0]}[by]
        X.loc[rng.random(n) < 1 / (1 + np.exp(1 - 1.2 * pull)), name] = None
    if rng.random() < 0.4:
        form = " ".join(rng.choice(WORDS, 12))
        common = rng.choice(WORDS, (n, 20))
        word = np.where(rng.random(n) < 1 / (1 + np.exp(-risk)), "worse", "")
        X["note"] = [f"{form} {w} {' '.join(c)}" for w, c in zip(word, common, strict=True)]
    if rng.random() < 0.4:
        X["events"] = [
            [{"time": -rng.exponential(10), "code": c, "value": rng.normal()}
             for c in rng.choice(WORDS[:30], k)]
            for k in rng.poisson(3, n)
        ]  # fmt: skip
    return X


def make_estimator(seed, kind):
    """One of a few honest estimators."""
    if kind == "number":
        choice = [
            make_pipeline(Numbers(), SimpleImputer(), StandardScaler(), Ridge()),
            make_pipeline(Numbers(), HistGradientBoostingRegressor(max_iter=20)),
        ]
    else:
        filled = (Numbers(), SimpleImputer(keep_empty_features=True), StandardScaler())
        choice = [
            make_pipeline(*filled, LogisticRegression(max_iter=500)),
            make_pipeline(*filled, LogisticRegression(class_weight="balanced", max_iter=500)),
            make_pipeline(*filled, KNeighborsClassifier(15)),
            make_pipeline(*filled, RandomForestClassifier(30, max_depth=6)),
            make_pipeline(Numbers(), HistGradientBoostingClassifier(max_iter=20)),
        ]
    return choice[seed % len(choice)]


def main():
    """Count alarms by check."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--worlds", type=int, default=100)
    options.add_argument("--checks", nargs="+", choices=list(CHECKS), default=list(CHECKS),
                         help="run these alone; the others are missing from the table")  # fmt: skip
    args = parse(options)
    n_worlds = 12 if args.quick else args.worlds
    seeds = range(args.seed * 100_000, args.seed * 100_000 + n_worlds)
    alarms, ran, seconds, worst = defaultdict(Counter), Counter(), [], Counter()
    for seed in seeds:
        X, y, groups, kind = make_world(seed)
        start = time.perf_counter()
        estimator = make_estimator(seed, kind)
        report = audit_leakage(estimator, X, y, groups=groups, checks=args.checks)
        seconds.append(time.perf_counter() - start)
        worst[report.verdict] += 1
        for finding in report.findings:
            ran[finding.check] += finding.verdict != "skipped"
            alarms[finding.check][finding.verdict] += 1
            if finding.verdict in ("warn", "leak"):
                print(f"world {seed} ({kind}, {len(X)} rows): {finding.verdict}: "
                      f"{finding.check}: {finding.sentence}", flush=True)  # fmt: skip
    print(f"{'check':<20}{'ran':>6}{'warn':>6}{'leak':>6}")
    rows = []
    for check in args.checks:
        found = alarms[check]
        print(f"{check:<20}{ran[check]:>6}{found['warn']:>6}{found['leak']:>6}")
        rows.append(_rate(check, found["warn"] + found["leak"], ran[check], args.seed))
    any_of = "any" if len(args.checks) == len(CHECKS) else "any of " + ", ".join(args.checks)
    rows.append(_rate(any_of, worst["warn"] + worst["leak"], n_worlds, args.seed))
    print(f"any alarm: {worst['warn'] + worst['leak']} of {n_worlds} worlds; "
          f"median {np.median(seconds):.1f} s, slowest {max(seconds):.1f} s")  # fmt: skip
    finish(args, rows)


def _rate(check, n_alarms, n_ran, seed):
    rate = n_alarms / max(n_ran, 1)
    return row("clean worlds", check, "audit_leakage", "false_alarms", rate, None, n_ran,
               seeds=[seed])  # fmt: skip


if __name__ == "__main__":
    main()
