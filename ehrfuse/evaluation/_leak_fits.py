"""Checks of the leak audit that fit the user's estimator on altered labels and rows."""

import numpy as np
import pandas as pd
from sklearn.frozen import FrozenEstimator

from ehrfuse.evaluation._audit_case import EstimatorFailed, Finding, take

BEYOND = 0.05  # skill above chance that counts, however many rows there are
SAME = 1e-4  # differences of predictions below this part of their spread are rounding
_SIGNED = ("monotonic_cst", "monotone_constraints", "positive")
_ALONE = 5  # rows that are predicted one by one


class Baseline:
    """The first fold's fit on true labels, and whether the same fit gives the same predictions."""

    def __init__(self, case):
        self.train, self.test = case.fold(0)
        self.model = case.fit(take(case.X, self.train), take(case.y, self.train))
        self.told = case.predict(self.model, take(case.X, self.test))
        self.spread = float(max(np.nanmax(np.nanstd(self.told, axis=0)), 1e-12))
        self.skill = np.nanmean(_skills(case, self.told, self.test))

    def change(self, told):
        """Largest difference to the baseline, in spreads of its predictions, by row."""
        difference = np.abs(np.asarray(told) - self.told)
        difference = np.where(np.isnan(told) & np.isnan(self.told), 0, difference)
        return np.nan_to_num(difference.max(axis=1), nan=np.inf) / self.spread


def _skills(case, told, rows):
    return np.array([t.skill(s, rows) for t, s in zip(case.targets, told.T, strict=True)])


def _mean_skill(case, told, rows):
    return float(np.nanmean(_skills(case, told, rows)))


def _chance(case, told, rows, rng):
    """How far the mean skill of these scores moves when labels mean nothing."""
    draws = []
    for _ in range(100):
        order = case.permuted(rng, rows)
        shuffled = [t._replace(values=t.values[order]) for t in case.targets]
        skills = [t.skill(s, rows) for t, s in zip(shuffled, told.T, strict=True)]
        draws.append(np.nanmean(skills) if np.isfinite(skills).any() else np.nan)
    return float(np.nanstd(draws)) if np.isfinite(draws).any() else np.nan


def _with_labels(case, order):
    """The case's outcomes in another order of rows, as targets."""
    return [t._replace(values=t.values[order]) for t in case.targets]


def permuted_labels(case, baseline):
    """Labels permuted before the cross-validation: the score must be chance."""
    rng, rows = case.rng(11), []
    for turn in range(case.n_permutations):
        order = case.permuted(rng)
        y = _same_index(take(case.y, order), case.y)
        targets = _with_labels(case, order)
        for number in range(min(2, len(case.folds))):
            train, test = case.fold(number)
            model = case.fit(take(case.X, train), take(y, train))
            told = case.predict(model, take(case.X, test))
            skills = [t.skill(s, test) for t, s in zip(targets, told.T, strict=True)]
            rows.append({"permutation": turn, "fold": number,
                         "skill": np.nanmean(skills) if np.isfinite(skills).any() else np.nan,
                         "chance sd": _chance(case, told, test, rng)})  # fmt: skip
    table = pd.DataFrame(rows)
    mean = table["skill"].mean()
    reach = 4 * np.sqrt((table["chance sd"] ** 2).sum()) / len(table)
    if mean - 0.5 > max(BEYOND, reach):
        return Finding(
            "permuted_labels",
            "leak",
            f"With permuted labels the cross-validation still reaches {mean:.2f} (chance is 0.50).",
            table,
            "Training tells the test labels by something else than X: look for copies or patients "
            "in both, and for anything that is kept from one fit to the next.",
        )
    text = f"With permuted labels the score is chance ({mean:.2f}), not {baseline.skill:.2f}."
    return Finding("permuted_labels", "pass", text, table)


def _mirrored(case, y):
    """Labels turned round: what pointed up points down, so that pairs of fits are fair."""
    if case.tasks and not case.regression:
        return 1 - y
    values = np.asarray(y)
    if case.regression:
        turned = np.nanmax(values, axis=0) + np.nanmin(values, axis=0) - values
    else:
        classes, codes = np.unique(values.ravel(), return_inverse=True)
        turned = classes[(codes.ravel() + 1) % len(classes)].reshape(values.shape)
    if isinstance(y, pd.Series):
        return pd.Series(turned, index=y.index, name=y.name).astype(y.dtype)
    if isinstance(y, pd.DataFrame):
        return pd.DataFrame(turned, index=y.index, columns=y.columns)
    return turned.astype(values.dtype)


def permuted_training(case, baseline):
    """Training labels permuted: what is fitted on them must not tell the true test labels."""
    rng, rows, apart = case.rng(12), [], 0.0
    train, test = baseline.train, baseline.test
    for turn in range(case.n_permutations):
        order = case.permuted(rng, train)
        y = _same_index(take(case.y, order[train]), take(case.y, train))
        n_ways = 2 if len(case.targets) < 3 or case.tasks or case.regression else len(case.targets)
        for way in range(n_ways):
            y = _mirrored(case, y) if way else y
            told = case.predict(case.fit(take(case.X, train), y), take(case.X, test))
            apart = max(apart, float(baseline.change(told).max()))
            rows.append({"permutation": turn, "turned": way, "skill": _mean_skill(case, told, test),
                         "chance sd": _chance(case, told, test, rng)})  # fmt: skip
    table = pd.DataFrame(rows)
    pairs = table.groupby("permutation")["skill"].mean()
    reach = 4 * np.sqrt((table["chance sd"] ** 2).mean() / len(pairs))
    if pairs.mean() - 0.5 <= max(BEYOND, reach) or pairs.min() - 0.5 < BEYOND / 2:
        text = f"Fitted on permuted labels it tells nothing of the true ones ({pairs.mean():.2f})."
        return Finding("permuted_training", "pass", text, table)
    mean, fix = pairs.mean(), "Look for labels that reach the estimator otherwise than through y."
    if _is_frozen(case.estimator) or (apart <= SAME and mean < 0.95):
        text = f"It tells the outcome ({mean:.2f}) whatever labels it is fitted on: a fixed model."
        fix = "Honest only if it was made on other patients; see to it."
        return Finding("permuted_training", "warn", text, table, fix)
    if _is_signed(case.estimator) and mean < 0.95:
        text = (
            f"It tells the outcome ({mean:.2f}) from permuted labels; signs of effects are fixed."
        )
        fix = "Run the audit once without these constraints."
        return Finding("permuted_training", "warn", text, table, fix)
    text = f"Fitted on permuted labels it still tells the true test labels ({mean:.2f})."
    return Finding("permuted_training", "leak", text, table, fix)


def _same_index(y, like):
    """Permuted labels under the index of the rows they now stand for."""
    return y.set_axis(like.index) if hasattr(y, "set_axis") else y


def _is_frozen(estimator):
    parts = [estimator, *estimator.get_params(deep=True).values()]
    return any(isinstance(part, FrozenEstimator) for part in parts)


def _is_signed(estimator):
    params = estimator.get_params(deep=True).items()
    return any(n.split("__")[-1] in _SIGNED and v is not None and v is not False for n, v in params)


def held_out_labels(case, baseline):
    """Other labels of the test rows, wherever they were seen before: the same predictions."""
    train, test = baseline.train, baseline.test
    again = case.fit(take(case.X, train), take(case.y, train))
    noise = float(baseline.change(case.predict(again, take(case.X, test))).max())
    changed = _changed_labels(case, test)
    rows = [{"what": "the same again", "largest change": noise}]
    if len(case.folds) > 1:
        other, _ = case.fold(1)
        for name, y in (("after a fit with the labels", case.y), ("with other labels", changed)):
            case.fit(take(case.X, other), take(y, other))
            model = case.fit(take(case.X, train), take(y, train))
            change = baseline.change(case.predict(model, take(case.X, test))).max()
            rows.append({"what": name, "largest change": float(change)})
    model = case.fit(take(case.X, train), take(changed, train))
    change = baseline.change(case.predict(model, take(case.X, test))).max()
    rows.append({"what": "other labels of test rows", "largest change": float(change)})
    table = pd.DataFrame(rows)
    change = table["largest change"][1:].max()
    if noise > SAME and change <= 3 * noise + SAME:
        text = "Two fits on the same rows differ; other test labels change no more than that."
        fix = "Give the estimator a random_state to make this check sharp."
        return Finding("held_out_labels", "pass", text, table, fix)
    if change > SAME:
        text = "Predictions of test rows change with their labels, which no fit may see."
        fix = "Look for anything kept between fits (caches, module variables), and for y in X."
        return Finding("held_out_labels", "leak", text, table, fix)
    return Finding("held_out_labels", "pass", "Other labels of test rows change nothing.", table)


def _changed_labels(case, test):
    """Labels of all rows, those of the test rows turned round."""
    turned = _mirrored(case, take(case.y, test))
    if hasattr(case.y, "iloc"):
        y = case.y.copy()
        y.iloc[test] = np.asarray(turned)
        return y
    y = np.array(case.y)
    y[test] = turned
    return y


def other_rows(case, baseline):
    """The same rows predicted alone, in halves, in another order, beside others."""
    test, model = baseline.test, baseline.model
    n, rng = len(test), case.rng(13)
    mixed = rng.permutation(n)
    half = np.sort(mixed[: max(1, n // 2)])
    views = {"again": np.arange(n), "another order": mixed, "a half": half}
    views |= {f"row {row} alone": np.array([row]) for row in np.sort(mixed[:_ALONE])}
    rows = [_view(case, baseline, model, name, view) for name, view in views.items()]
    extra = baseline.train[: min(len(baseline.train), n)]
    try:
        told = case.predict(model, take(case.X, np.concatenate([test, extra])))[:n]
        change = float(baseline.change(told).max())
        rows.append({"what": "beside training rows", "rows": n, "largest change": change})
    except EstimatorFailed as error:
        rows.append({"what": "beside training rows", "rows": n, "failed": str(error)})
    table = pd.DataFrame(rows)
    table["what"] = table["what"].str.replace(r"row \d+ alone", "a row alone", regex=True)
    worst = table["largest change"].max()
    random = table.loc[table["what"] == "again", "largest change"].max()
    if random > SAME:
        text = "Two predictions of the same rows differ; nothing can be said of other rows."
        fix = "Make predict deterministic; sampling at prediction needs a fixed seed."
        return Finding("other_rows", "warn", text, table, fix)
    if worst > SAME:
        what = table.loc[table["largest change"].idxmax(), "what"]
        text = f"Predictions change with the rows predicted beside them (most: {what})."
        fix = "Learn means, ranks and vocabularies in fit, and only use them in predict."
        return Finding("other_rows", "leak", text, table, fix)
    if table.get("failed", pd.Series(dtype=object)).notna().any():
        text = "Some views of the same rows could not be predicted; those that could are the same."
        fix = "predict should take one row as well as many."
        return Finding("other_rows", "warn", text, table, fix)
    text = "Predictions of a row do not depend on the rows beside it."
    return Finding("other_rows", "pass", text, table)


def _view(case, baseline, model, name, view):
    row = {"what": name, "rows": len(view)}
    try:
        told = case.predict(model, take(case.X, baseline.test[view]))
    except EstimatorFailed as error:
        return row | {"largest change": np.nan, "failed": str(error)}
    whole = baseline.told.copy()
    whole[view] = told
    return row | {"largest change": float(baseline.change(whole).max())}
