"""Checks of the leak audit that look at X, y and the folds, and fit no estimator of the user."""

import numpy as np
import pandas as pd
from scipy.stats import binom, norm, rankdata, spearmanr
from sklearn.feature_selection import chi2
from sklearn.utils.parallel import Parallel, delayed

from ehrfuse.evaluation._audit_case import Finding
from ehrfuse.evaluation._audit_columns import (
    bins_of,
    read_column,
    token_matrix,
    tokens_of,
    told_by_bins,
    told_by_ridge,
    told_by_trees,
    weighted,
)

# A column, or ten terms, that order the outcome so well alone tell of it rather than predict it.
CERTAIN = 0.95
TOO_GOOD = 0.9
TERMS_TOO_GOOD = 0.8
FLAGS_TOO_GOOD = 0.8
SCORE = 0.72  # from here a column may be the output of a model ...
SCORE_EXPLAINED = 0.5  # ... if the others explain so much of it (R squared)
SCORE_MARGIN = 0.03  # ... and all of them together hardly do better,
STRONG = 0.8  # ... or if it is as good as this
FOLLOWS = 0.7  # rank correlation with a column that was found
PURE = 0.85  # lower bound of the outcome's rate in a level that names it
_RARE = 1e-4  # p-value of such a level by chance, for all levels together
_CODED = 5  # numbers of at most so many values are codes
_BOOTSTRAP = 200
_SURE = 5.0  # standard errors from chance, for all columns together
_N_TERMS = 10


class Columns:
    """Columns of a case as read, with out-of-fold scores by target; made once, used by checks."""

    def __init__(self, case):
        self.case = case
        rows = case.rows
        frame = case.frame.iloc[rows]
        self.codes = case.codes[rows]
        self.targets = [t._replace(values=t.values[rows]) for t in case.targets]
        parallel = Parallel(n_jobs=case.n_jobs)
        read = parallel(delayed(read_column)(frame[name]) for name in case.features)
        self.columns = dict(zip(case.features, read, strict=True))
        self.unread = [name for name, column in self.columns.items() if column.kind == "other"]
        self.tokens = {
            name: token_matrix(tokens_of(column), self.codes)
            for name, column in self.columns.items()
            if column.kind in ("text", "codes", "records")
        }
        jobs = [
            (n, c) for n, c in self.columns.items() if c.kind in ("number", "category", "vector")
        ]
        told = parallel(
            delayed(_told)(column, [t.values for t in self.targets], case.inner)
            for _, column in jobs
        )
        self.told = {name: scores for (name, _), scores in zip(jobs, told, strict=True)}

    def numbers(self, without=()):
        """Columns that trees read, side by side, but for some."""
        kept = {n: c for n, c in self.columns.items() if n not in without}
        parts = [
            np.where(np.isfinite(c.data), c.data, np.nan) if c.kind == "number" else c.data
            for c in kept.values()
            if c.kind in ("number", "category", "vector")
        ]
        return np.column_stack(parts).astype(float) if parts else np.empty((len(self.codes), 0))

    def low(self, target, scores):
        """Lower end of a 99 % bootstrap interval of the skill, patients resampled whole."""
        rng = self.case.rng(7)
        _, codes = np.unique(self.codes, return_inverse=True)
        order = np.argsort(codes, kind="stable")
        starts = np.searchsorted(codes[order], np.arange(codes.max() + 2))
        draws = []
        for _ in range(_BOOTSTRAP):
            drawn = rng.integers(codes.max() + 1, size=codes.max() + 1)
            rows = np.concatenate([order[starts[g] : starts[g + 1]] for g in drawn])
            draws.append(target.skill(scores[rows], rows))
        return float(np.nanquantile(draws, 0.005)) if np.isfinite(draws).any() else np.nan

    def sure(self, target, skill, n_tried):
        """Whether a skill is beyond chance for the number of patients and of columns tried."""
        known = ~np.isnan(target.values)
        if target.binary:
            ones = len(np.unique(self.codes[known & (target.values == 1)]))
            zeros = len(np.unique(self.codes[known & (target.values == 0)]))
            error = np.sqrt((ones + zeros + 1) / (12 * max(ones, 1) * max(zeros, 1)))
        else:
            error = 0.5 / np.sqrt(max(len(np.unique(self.codes[known])) - 3, 1))
        beyond = norm.isf(1e-3 / max(n_tried, 1))
        return bool((skill - 0.5) / error > max(_SURE - 1, beyond))


def _scaled(matrix):
    spread = matrix.std(axis=0)
    return (matrix - matrix.mean(axis=0)) / np.where(spread > 0, spread, 1)


def _told(column, targets, folds):
    if column.kind == "vector":
        matrix = _scaled(column.data)
        return [told_by_ridge(matrix, target, folds, alpha=len(matrix) / 4) for target in targets]
    codes = bins_of(column)
    return [told_by_bins(codes, target, folds) for target in targets]


def _table(rows, by=None):
    table = pd.DataFrame(rows)
    return table.sort_values(by, ascending=False, ignore_index=True) if len(rows) and by else table


def _names(values, most=5):
    values = [repr(str(value)) for value in values]
    more = f" and {len(values) - most} more" if len(values) > most else ""
    return ", ".join(values[:most]) + more


# ---------------------------------------------------------------- single columns


def single_columns(case, columns):
    """Columns that alone tell the outcome: nearly surely, by a level, or as a score of others."""
    if not columns.told:
        return Finding("single_columns", "skipped", "X has no column of numbers or categories.")
    rows, found = [], {}
    for place, target in enumerate(columns.targets):
        skills = {n: target.skill(s[place]) for n, s in columns.told.items()}
        skills = {n: s for n, s in skills.items() if not np.isnan(s)}
        middle = np.median(list(skills.values())) if skills else np.nan
        spread = max(1.4826 * np.median(np.abs(np.array(list(skills.values())) - middle)), 0.02)
        for name, skill in skills.items():
            outlying = len(skills) < 5 or skill > middle + 3 * spread
            why, low = "", np.nan
            if skill >= SCORE and columns.sure(target, skill, len(skills) * len(columns.targets)):
                low = columns.low(target, columns.told[name][place])
                if low >= TOO_GOOD and (skill >= CERTAIN or outlying):
                    why = "tells the outcome alone"
            level = _pure_level(columns, name, target)
            if not why and level:
                why = level
            rows.append({"column": name, "target": target.name, "skill": skill, "low": low,
                         "middle": middle, "spread": spread, "why": why})  # fmt: skip
            if why:
                found[name] = "leak"
    _find_scores(columns, rows, found)
    _find_followers(columns, rows, found)
    table = _table(rows, "skill")
    table = table[(table["why"] != "") | (table.index < 10)].drop(columns="spread")
    if not found:
        best = table.iloc[0] if len(table) else {"column": "-", "skill": np.nan}
        text = f"No column alone tells the outcome; the best reaches {best['skill']:.2f}."
        return Finding("single_columns", "pass", text, table)
    sure = [name for name, verdict in found.items() if verdict == "leak"]
    told = sure or list(found)
    what = "alone tell(s) the outcome" if sure else "look(s) like a score made for the outcome"
    return Finding(
        "single_columns",
        "leak" if sure else "warn",
        f"{len(told)} column(s) {what}: {_names(told)}.",
        table,
        "Find out when and from what these columns are filled; drop what is written after the "
        "prediction, and what a model made that saw these patients.",
    )


def _pure_level(columns, name, target):
    """A level of a category (or of few numbers) in which the outcome is nearly certain."""
    column = columns.columns[name]
    if not target.binary or column.kind == "vector":
        return ""
    codes = bins_of(column)
    if column.kind == "number" and len(np.unique(column.data[column.present])) > _CODED:
        return ""  # the ends of an honest scale may be nearly certain
    known = ~np.isnan(target.values) & column.present
    return _pure(codes[known], target.values[known], columns.codes[known], target.values)


def _pure(codes, values, patients, everything):
    """Words on the first level whose outcome is nearly certain, beyond chance; else nothing."""
    base = np.nanmean(everything)
    levels = np.unique(codes)
    for level in levels:
        inside = codes == level
        n = len(np.unique(patients[inside]))
        if n < 10 or inside.mean() > 0.6:
            continue
        for wanted, rate in ((1, base), (0, 1 - base)):
            if rate > 0.5:  # the common outcome fills levels by itself
                continue
            share = (values[inside] == wanted).mean()
            hits = round(share * n)
            chance = binom.sf(hits - 1, n, rate) * len(levels)
            if _wilson_low(hits, n) >= PURE and chance < _RARE:
                return f"one level ({inside.sum()} rows) has the outcome in {share:.0%}"
    return ""


def _wilson_low(hits, n, z=1.645):
    share = hits / n
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    return middle - z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))


def _find_scores(columns, rows, found):
    """Columns as good as all others together, and explained by them: outputs of a model."""
    for place, target in enumerate(columns.targets):
        likely = [
            row for row in rows
            if row["target"] == target.name and not row["why"] and not np.isnan(row["low"])
        ]  # fmt: skip
        if not likely or len(columns.told) < 3:
            continue
        shares = {row["column"]: _explained(columns, row["column"], place) for row in likely}
        # All strong columns leave: a score must not be hidden by another, nor by what it follows.
        out = {*shares, *found}
        rest = [scores[place] for name, scores in columns.told.items() if name not in out]
        if max(shares.values()) < SCORE_EXPLAINED or not rest:
            continue
        # A sum, no trees: what the rest tells by interactions may be a leak that is left in it.
        rest = _scaled(np.column_stack(rest))
        told = told_by_ridge(rest, target.values, columns.case.inner, alpha=len(rest) / 4)
        joint = target.skill(told)
        enough = min(joint - SCORE_MARGIN, STRONG)
        for row in likely:
            share = shares[row["column"]]
            good = row["skill"] > row["middle"] + row["spread"]
            if share >= SCORE_EXPLAINED and good and row["skill"] >= enough:
                row["why"] = (
                    f"{share:.0%} explained by other columns, and near what {rest.shape[1]} "
                    f"others tell together ({joint:.2f})"
                )
                found.setdefault(row["column"], "warn")


def _explained(columns, name, place):
    """Share of a column's variance, as risk of a target, that all other columns explain."""
    told = rankdata(columns.told[name][place])
    rows = columns.case.inner[0]
    others = columns.numbers(without=[name])
    guess = told_by_trees(others, told, False, [rows], 0)[rows]
    return 1 - np.mean((told[rows] - guess) ** 2) / np.var(told[rows])


def _find_followers(columns, rows, found):
    """Columns that go with a found one: another horizon, another unit, the day it was set."""
    heads = [n for n in found if columns.columns[n].kind == "number"]
    for row in rows:
        column = columns.columns[row["column"]]
        if row["why"] or column.kind != "number" or row["skill"] < 0.65:
            continue
        for head in heads:
            other = columns.columns[head]
            both = np.isfinite(column.data) & np.isfinite(other.data)
            if both.sum() < 50 or np.ptp(column.data[both]) == 0 or np.ptp(other.data[both]) == 0:
                continue
            if abs(spearmanr(column.data[both], other.data[both]).statistic) >= FOLLOWS:
                row["why"] = f"goes with {str(head)!r}"
                found.setdefault(row["column"], "warn")
                break


# ---------------------------------------------------------------- terms


def terms(case, columns):
    """Words of notes and codes of records that name the outcome."""
    if not columns.tokens:
        return Finding("terms", "skipped", "X has no text and no records with codes.")
    evidence, found, best = [], {}, 0.0
    for name, (matrix, words) in columns.tokens.items():
        if matrix.shape[1] < 2:
            continue
        heavy = weighted(matrix)
        for target in columns.targets:
            whole_told = told_by_ridge(heavy, target.values, case.inner)
            few_told = _told_by_terms(matrix, target.values, case.inner)
            whole, few = target.skill(whole_told), target.skill(few_told)
            best = np.nanmax([best, whole])
            tried = 2 * len(columns.tokens) * len(columns.targets)
            leak = False
            if few >= TERMS_TOO_GOOD and columns.sure(target, few, tried):
                leak = columns.low(target, few_told) >= TERMS_TOO_GOOD - 0.05
            if not leak and whole >= TOO_GOOD and columns.sure(target, whole, tried):
                leak = columns.low(target, whole_told) >= TOO_GOOD - 0.05
            pure = "" if leak else _pure_terms(columns, matrix, words, target)
            if leak or pure:
                found[name] = True
                evidence += _term_rows(name, matrix, words, target, whole, few, pure)
    if not found:
        text = f"No few terms tell the outcome; text and codes alone reach at most {best:.2f}."
        return Finding("terms", "pass", text)
    table = pd.DataFrame(evidence)
    shown = _names(dict.fromkeys(table["term"]))
    return Finding(
        "terms",
        "leak",
        f"{_names(found)} name(s) the outcome, in terms such as {shown}.",
        table,
        "Cut what was written after the prediction time, or use this text for training only "
        "(align with it, predict without it).",
    )


def _best_terms(matrix, values):
    high = values > np.median(values) if len(np.unique(values)) > 2 else values == values.max()
    if high.all() or not high.any():
        return np.arange(0)
    strength = np.nan_to_num(chi2(matrix, high)[0])
    return np.argsort(-strength, kind="stable")[:_N_TERMS]


def _told_by_terms(matrix, target, folds):
    """Out-of-fold score from the few terms that go best with the outcome elsewhere."""
    told = np.full(len(target), np.nan)
    for rows in folds:
        train = np.setdiff1d(np.flatnonzero(~np.isnan(target)), rows)
        best = _best_terms(matrix[train], target[train])
        if len(best):
            x = matrix[:, best].toarray()
            told[rows] = told_by_ridge_once(x[train], target[train], x[rows])
    return told


def told_by_ridge_once(x, y, other):
    """Ridge on a few columns, centred."""
    middle = x.mean(axis=0)
    gram = (x - middle).T @ (x - middle) + np.eye(x.shape[1])
    return (other - middle) @ np.linalg.solve(gram, (x - middle).T @ (y - y.mean()))


def _pure_terms(columns, matrix, words, target):
    """A term after which the outcome is nearly certain, and that many cases hold."""
    if not target.binary:
        return ""
    known = ~np.isnan(target.values)
    values, cells = target.values[known], matrix[known]
    base = values.mean()
    wanted = 1.0 if base <= 0.5 else 0.0
    hits = np.asarray(cells[values == wanted].sum(axis=0)).ravel()
    counts = np.asarray(cells.sum(axis=0)).ravel()
    chance = binom.sf(hits - 1, counts, min(base, 1 - base)) * len(words)
    cases = (values == wanted).sum()
    low = np.array([_wilson_low(h, n) if n else 0.0 for h, n in zip(hits, counts, strict=True)])
    pure = (counts >= 20) & (chance < _RARE) & (low >= PURE) & (hits >= 0.2 * cases)
    return str(words[np.argmax(pure)]) if pure.any() else ""


def _term_rows(name, matrix, words, target, whole, few, pure):
    known = ~np.isnan(target.values)
    values, cells = target.values[known], matrix[known]
    best = list(_best_terms(cells, values))
    if pure:
        best = [int(np.flatnonzero(words == pure)[0]), *best][:_N_TERMS]
    high = values > np.median(values) if not target.binary else values == 1
    rows = []
    for term in dict.fromkeys(best):
        has = np.asarray(cells[:, [term]].todense()).ravel() > 0
        rows.append({
            "column": name, "target": target.name, "term": str(words[term]),
            "rows": int(has.sum()), "with outcome": int((has & high).sum()),
            "rate with": high[has].mean(), "rate without": high[~has].mean(),
            "skill of ten terms": few, "skill of all terms": whole,
        })  # fmt: skip
    return rows


# ---------------------------------------------------------------- missingness


def missingness(case, columns):
    """Columns whose being there tells the outcome, alone or together."""
    flags = {n: c.present for n, c in columns.columns.items() if 0 < c.present.mean() < 1}
    if not flags:
        return Finding("missingness", "skipped", "No column has missing cells.")
    rows = [
        _flag(columns, name, present, place, len(flags))
        for place in range(len(columns.targets))
        for name, present in flags.items()
    ]
    table = _table(rows, "skill")
    leaks, hints = (table["column"][table["verdict"] == v].unique() for v in ("leak", "warn"))
    together = _flags_together(columns, flags, {*leaks, *hints})
    if not len(leaks) and not len(hints) and not together:
        best = table["skill"].max()
        text = f"Being there tells little: the best single flag reaches {best:.2f}."
        return Finding("missingness", "pass", text, table.head(10).drop(columns="verdict"))
    told = together
    if len(leaks):
        told = f"{_names(leaks)}: being there tells the outcome."
    elif len(hints):
        told = f"{_names(hints)}: being there may tell the outcome. {together}".strip()
    return Finding(
        "missingness",
        "leak" if len(leaks) else "warn",
        told,
        table[(table["why"] != "") | (table.index < 5)].drop(columns="verdict"),
        "Ask who fills these cells and when; if it is after the outcome, or because of it, leave "
        "the columns out.",
    )


def _flag(columns, name, present, place, n_flags):
    """What being there tells of a target: figures, and a verdict beyond chance."""
    target = columns.targets[place]
    told = told_by_bins(present.astype(int), target.values, columns.case.inner)
    skill = target.skill(told)
    row = {"column": name, "target": target.name, "skill": skill, "low": np.nan, "why": "",
           "present": present.mean(), "verdict": ""}  # fmt: skip
    if skill >= FLAGS_TOO_GOOD and columns.sure(target, skill, n_flags):
        row["low"] = columns.low(target, told)
        sure = row["low"] >= FLAGS_TOO_GOOD
        row["verdict"] = "leak" if sure else "warn"
        row["why"] = f"being there {'tells' if sure else 'may tell'} the outcome"
    if not target.binary:
        return row
    known = ~np.isnan(target.values)
    for word, side in (("present", present), ("absent", ~present)):
        own = target.values[side & known]
        row[f"rate {word}"] = own.mean() if len(own) else np.nan
    pure = _pure(present[known].astype(int), target.values[known], columns.codes[known],
                 target.values)  # fmt: skip
    return row | {"verdict": "leak", "why": pure} if pure else row


def _flags_together(columns, flags, found):
    """Words on the whole pattern, if it tells the outcome better than the values do."""
    left = [present for name, present in flags.items() if name not in found]
    if len(left) < 2:
        return ""
    matrix = np.column_stack(left).astype(float)
    for target in columns.targets:
        told = told_by_trees(matrix, target.values, target.binary, columns.case.inner, 0)
        skill = target.skill(told)
        if skill < FLAGS_TOO_GOOD or not columns.sure(target, skill, 1):
            continue
        values = _drawn(columns.numbers(), columns.case.rng(9))
        filled = 0.5
        if values.shape[1]:
            told = told_by_trees(values, target.values, target.binary, columns.case.inner, 0)
            filled = target.skill(told)
        if skill > filled:
            return (
                f"Which cells are filled tells the outcome ({skill:.2f}), better than the values "
                f"do ({filled:.2f})."
            )
    return ""


def _drawn(matrix, rng):
    """Missing cells filled with values of other rows, so that nothing tells them apart."""
    matrix = matrix.copy()
    for column in matrix.T:
        lost = np.isnan(column)
        column[lost] = rng.choice(column[~lost], lost.sum()) if not lost.all() else 0.0
    return matrix
