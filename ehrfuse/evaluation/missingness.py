"""How informative is what is missing: outcome by pattern, and presence told from the rest.

Clinicians order what they find worth knowing. Where that is so, the presence of a modality can be
predicted from the rest of the record, and outcomes differ between missing patterns.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import norm, t
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from sklearn.utils import check_random_state, check_scalar

from ehrfuse.evaluation._features import Rest
from ehrfuse.evaluation._inputs import (
    check_labels,
    check_present,
    check_rows,
    find_patterns,
    group_codes,
)
from ehrfuse.evaluation.metrics import bootstrap_scores


def rate_interval(labels, codes, confidence):
    """Share of ones with Wilson's interval, widened for labels that come in clusters.

    The effective number of rows is n divided by the design effect of the cluster-robust variance
    (never above n), with Student's t for few clusters; where all labels agree it is the number of
    clusters. With one row per cluster this is the plain Wilson interval; one cluster of several
    rows says nothing, and the interval is all of 0 to 1.
    """
    n = len(labels)
    if n == 0:
        return np.nan, np.nan, np.nan
    rate, z = labels.mean(), norm.ppf((1 + confidence) / 2)
    _, members = np.unique(codes, return_inverse=True)
    n_clusters = members.max() + 1
    effective = float(n)
    if n_clusters == 1 < n:
        effective = 0.0
    elif n_clusters < n:
        residuals = np.bincount(members, weights=labels - rate)
        variance = n_clusters / (n_clusters - 1) * (residuals**2).sum() / n**2
        binomial = rate * (1 - rate)
        effective = min(n, binomial / variance) if variance > 0 else float(n)
        effective = effective if binomial > 0 else float(n_clusters)
        effective *= (z / t.ppf((1 + confidence) / 2, n_clusters - 1)) ** 2
    centre = (rate * effective + z**2 / 2) / (effective + z**2)
    half = z / (effective + z**2) * np.sqrt(rate * (1 - rate) * effective + z**2 / 4)
    return rate, max(0.0, centre - half), min(1.0, centre + half)


def _check_confidence(confidence):
    check_scalar(
        confidence, "confidence", float, min_val=0, max_val=1, include_boundaries="neither"
    )


def pattern_table(X, modalities, *, y=None, groups=None, min_count=1, max_patterns=None,
                  bands=1, confidence=0.95):  # fmt: skip
    """Table of `outcome_by_pattern`, without the outcome's columns where y is None."""
    _check_confidence(confidence)
    patterns = find_patterns(
        X, modalities, min_count=min_count, max_patterns=max_patterns, bands=bands
    )
    counts = np.bincount(patterns.rows, minlength=len(patterns.kinds))
    table = patterns.kinds.assign(n=counts, share=counts / len(X))
    if y is None:
        return table
    tasks = check_labels(y)
    check_rows(len(X), y=y)
    codes = group_codes(groups, len(X), X)
    parts = []
    for labels, known in zip(tasks.labels.T, tasks.known.T, strict=True):
        rows = [known & (patterns.rows == kind) for kind in range(len(table))]
        rates = [rate_interval(labels[row], codes[row], confidence) for row in rows]
        rates = pd.DataFrame(rates, columns=["rate", "lo", "hi"])
        parts.append(table.assign(known=[int(row.sum()) for row in rows]).join(rates))
    if tasks.names is None:
        return parts[0]
    for part, name in zip(parts, tasks.names, strict=True):
        part.insert(0, "task", name)
    return pd.concat(parts, ignore_index=True)


def outcome_by_pattern(X, y, modalities, *, groups=None, confidence=0.95, min_count=1):
    """Outcome rate of every missing pattern, with intervals.

    Parameters
    ----------
    X : DataFrame of shape (n_samples, n_columns)
    y : array-like of shape (n_samples,) or (n_samples, n_tasks)
        Yes/no outcomes: two classes (the second in sorted order is the event), or one 0/1 column
        per task. Null means unknown.
    modalities : dict of str to modality, str or list of str
        Columns of every modality; a modality is present where any of its cells is not null.
    groups : str or array-like of shape (n_samples,), default=None
        Patient of every row, or the column of X that holds it. Without groups the interval takes
        the rows for independent and is too narrow where patients repeat.
    confidence : float, default=0.95
    min_count : int, default=1
        Patterns with fewer rows are pooled into one last row ``"other (k patterns)"``; a single
        rare pattern keeps its name.

    Returns
    -------
    table : DataFrame
        One row per pattern (and per `task` if `y` has one column per task), the most frequent
        first: `pattern`, one bool column per modality (null in the pooled row), `n` (rows),
        `share` of all rows, `known` (rows with a known outcome), `rate` of the event among
        these, and `lo`, `hi`.

    See Also
    --------
    presence_informativeness : Is presence itself predictable.
    MissingPatternDisplay : The same as a picture.

    Notes
    -----
    The interval is Wilson's. With `groups` its number of rows is divided by the design effect
    of the patients (cluster-robust variance), and Student's t allows for few patients [1]_.

    References
    ----------
    .. [1] Korn EL, Graubard BI. Confidence intervals for proportions with small expected number
       of positive counts estimated from survey data. Surv Methodol 1998;24:193-201.

    Examples
    --------
    >>> import pandas as pd
    >>> from ehrfuse.evaluation import outcome_by_pattern
    >>> X = pd.DataFrame({"lactate": [2.1, None, 4.0, None, None], "note": list("abcde")})
    >>> died = [0, 0, 1, 0, 0]
    >>> table = outcome_by_pattern(X, died, {"labs": "lactate", "note": ["note"]})
    >>> table[["pattern", "labs", "note", "n", "rate"]]
         pattern   labs  note  n  rate
    0       note  False  True  3   0.0
    1  labs+note   True  True  2   0.5
    """
    if y is None:
        raise ValueError("y is None; pass one outcome per row.")
    return pattern_table(
        X, modalities, y=y, groups=groups, min_count=min_count, confidence=confidence
    )


class _Probe(NamedTuple):
    """How predictability is measured: out of fold, patients whole."""

    codes: np.ndarray
    grouped: bool
    cv: object
    n_resamples: int
    confidence: float
    rng: np.random.RandomState

    def auroc(self, matrix, categorical, target, rows):
        """AUROC of telling `target` from feature columns, its interval, why there is none."""
        target, codes = target[rows], self.codes[rows]
        matrix = np.column_stack([np.zeros(len(target)), *(column[rows] for column in matrix)])
        varies = np.array([len(np.unique(column)) > 1 for column in matrix.T])
        categorical = np.array([False, *categorical])[varies]
        splits, note = self._folds(target, codes, varies.any())
        if note:
            return np.nan, np.nan, np.nan, note
        told = _out_of_fold(matrix[:, varies], categorical, target, splits, self._seed())
        scores = bootstrap_scores(
            target,
            told,
            groups=codes,
            metrics=["auroc"],
            n_resamples=self.n_resamples,
            confidence=self.confidence,
            random_state=self.rng,
        )
        return *scores.loc["auroc", ["estimate", "lo", "hi"]], ""

    def _folds(self, target, codes, varies):
        """Train and test rows of every fold, or the reason why there are none."""
        if len(np.unique(target)) < 2:
            return [], "one class only" if len(target) else "nothing is known"
        if not varies:
            return [], "nothing else varies"
        rows = np.zeros((len(target), 1))
        groups = codes if self.grouped else None
        if hasattr(self.cv, "split"):
            splits = list(self.cv.split(rows, target, groups))
            tested = np.sort(np.concatenate([test for _, test in splits]))
            if not np.array_equal(tested, np.arange(len(target))):
                raise ValueError(
                    f"cv={self.cv!r} does not hold out every row exactly once; "
                    "pass a number of folds or a K-fold splitter."
                )
            return splits, ""
        least = min(len(np.unique(codes[target == value])) for value in (0, 1))
        if least < 2:
            return [], f"only one {'group' if self.grouped else 'row'} in a class"
        kind = StratifiedGroupKFold if self.grouped else StratifiedKFold
        folds = kind(n_splits=min(self.cv, least), shuffle=True, random_state=self._seed())
        return list(folds.split(rows, target, groups)), ""

    def _seed(self):
        return self.rng.randint(np.iinfo(np.int32).max)


def _out_of_fold(matrix, categorical, target, splits, seed):
    told = np.empty(len(target))
    for train, test in splits:
        if target[train].min() == target[train].max():
            told[test] = target[train][0]
            continue
        model = HistGradientBoostingClassifier(
            max_iter=50,
            max_leaf_nodes=6,
            early_stopping=False,
            categorical_features=categorical,
            random_state=seed,
        )
        told[test] = model.fit(matrix[train], target[train]).predict_proba(matrix[test])[:, 1]
    return told


def _rate_difference(labels, flags, codes, confidence):
    """Outcome rates with and without, and their difference with Newcombe's interval."""
    with_, lo_1, hi_1 = rate_interval(labels[flags], codes[flags], confidence)
    without, lo_0, hi_0 = rate_interval(labels[~flags], codes[~flags], confidence)
    lo = with_ - without - np.hypot(with_ - lo_1, hi_0 - without)
    hi = with_ - without + np.hypot(hi_1 - with_, without - lo_0)
    return with_, without, with_ - without, lo, hi


def presence_informativeness(
    X,
    modalities,
    *,
    y=None,
    groups=None,
    exclude=(),
    cv=5,
    n_resamples=1000,
    confidence=0.95,
    random_state=None,
):
    """How well the rest of the record tells whether a modality is present.

    Parameters
    ----------
    X : DataFrame of shape (n_samples, n_columns)
    modalities : dict of str to modality, str or list of str
        Columns of every modality; a modality is present where any of its cells is not null.
    y : array-like of shape (n_samples,), default=None
        One yes/no outcome, null where unknown. If given, the table also says how the outcome
        differs with presence.
    groups : str or array-like of shape (n_samples,), default=None
        Patient of every row, or the column of X that holds it: patients are kept on one side
        of every split and resampled whole. It is never a feature.
    exclude : sequence of str, default=()
        Further columns of X that are never features, such as identifiers.
    cv : int or splitter, default=5
        Folds, stratified by presence and split by group; a splitter must hold out every row once.
        With a rare class there are fewer folds.
    n_resamples : int, default=1000
        Resamples of the patient bootstrap.
    confidence : float, default=0.95
    random_state : int, RandomState instance or None, default=None

    Returns
    -------
    table : DataFrame
        Indexed by `modality`: `share` of the rows in which it is present; `auroc`, `lo`, `hi` of
        predicting its presence out of fold; `note`, which says why a score is NaN. With `y` also
        `rate_present`, `rate_absent`, `difference`, `difference_lo`, `difference_hi` of the
        outcome, and a last row ``"(all flags)"`` whose `auroc` is that of predicting `y`
        from all presence flags together.

    See Also
    --------
    outcome_by_pattern : Outcome rates of every pattern.

    Notes
    -----
    Features are the columns of the *other* modalities: numbers, booleans, categories (strings of
    at most 32 distinct values), the length of text and of list-like cells, and the other
    modalities' presence. Columns that no modality reads, and those that it shares with another,
    are not used. The model is `HistGradientBoostingClassifier` with 50 small trees. An AUROC near
    0.5 means that nothing recorded here tells who has the modality, which is no proof of
    missingness at random; one near 1 means that presence itself describes the patient, or that
    two modalities come and go together by design.

    The interval of an AUROC is that of fixed out-of-fold predictions and leaves out the noise of
    fitting again. Near 0.5 it is too narrow for that reason: of simulated frames missing completely
    at random, a 95 % interval held 0.5 in about 85 of 100.

    The interval of the difference is Newcombe's from two Wilson intervals, which are cluster-robust
    with `groups`; where patients have rows with and without the modality it is conservative.

    References
    ----------
    Newcombe RG. Interval estimation for the difference between independent proportions. Stat Med
    1998;17:873-890.

    Examples
    --------
    >>> import numpy as np, pandas as pd
    >>> from ehrfuse.evaluation import presence_informativeness
    >>> heart_rate = np.random.default_rng(0).normal(90, 15, 300)
    >>> X = pd.DataFrame({"hr": heart_rate, "gas": np.where(heart_rate > 95, 7.3, np.nan)})
    >>> modalities = {"vitals": "hr", "blood_gas": "gas"}
    >>> table = presence_informativeness(X, modalities, random_state=0, n_resamples=50)
    >>> table.loc["blood_gas", ["auroc", "note"]].to_dict()
    {'auroc': 1.0, 'note': ''}
    >>> table.loc["vitals", ["auroc", "note"]].to_dict()
    {'auroc': nan, 'note': 'one class only'}
    """
    _check_confidence(confidence)
    check_scalar(n_resamples, "n_resamples", (int, np.integer), min_val=1)
    if not hasattr(cv, "split"):
        check_scalar(cv, "cv", (int, np.integer), min_val=2)
    present = check_present(X, modalities)
    codes = group_codes(groups, len(X), X)
    rng = check_random_state(random_state)
    probe = _Probe(codes, groups is not None, cv, n_resamples, confidence, rng)
    rest = Rest(X, modalities, groups, exclude)
    flags = present.to_numpy(dtype=float)
    found = [
        probe.auroc(*rest.without(name), flag, slice(None))
        for name, flag in zip(present.columns, flags.T, strict=True)
    ]
    index = pd.Index(present.columns, name="modality")
    table = pd.DataFrame(found, columns=["auroc", "lo", "hi", "note"], index=index)
    table.insert(0, "share", flags.mean(axis=0))
    return table if y is None else _with_outcome(table, flags, y, probe)


def _with_outcome(table, flags, y, probe):
    """Add the outcome's rates by presence and the row of all flags together."""
    labels = _one_outcome(y, len(flags))
    known = ~np.isnan(labels)
    rates = pd.DataFrame(
        [
            _rate_difference(labels[known], flag == 1, probe.codes[known], probe.confidence)
            for flag in flags[known].T
        ],
        columns=["rate_present", "rate_absent", "difference", "difference_lo", "difference_hi"],
        index=table.index,
    )
    table = pd.concat([table.drop(columns="note"), rates, table["note"]], axis=1)
    *score, note = probe.auroc(list(flags.T), [False] * flags.shape[1], labels, known)
    table.loc["(all flags)", ["auroc", "lo", "hi"]] = score
    table.loc["(all flags)", "note"] = note
    return table


def _one_outcome(y, n_rows):
    check_rows(n_rows, y=y)
    tasks = check_labels(y)
    if tasks.labels.shape[1] != 1:
        raise ValueError(
            f"y has {tasks.labels.shape[1]} tasks; pass one outcome at a time, such as y['death']."
        )
    return tasks.labels[:, 0]
