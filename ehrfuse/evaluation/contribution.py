"""What each modality adds to a score: leave it out, or share the score by Shapley's rule."""

import itertools
from math import factorial

import numpy as np
import pandas as pd
from sklearn.utils import check_random_state, check_scalar

from ehrfuse._patterns import modality_columns
from ehrfuse._runtime import check_option
from ehrfuse.evaluation._inputs import (
    check_labels,
    check_present,
    check_proba,
    estimator_modalities,
    group_codes,
)
from ehrfuse.evaluation._resampling import LOSSES, bootstrap_draws, one_score, percentile_interval
from ehrfuse.evaluation.metrics import check_settings

MAX_EXACT = 8  # modalities: 256 coalitions are all asked, beyond that orders are drawn


def modality_contribution(
    estimator,
    X,
    y,
    modalities=None,
    *,
    method="drop",
    metric="auroc",
    groups=None,
    n_permutations=20,
    n_resamples=200,
    confidence=0.95,
    random_state=None,
):
    """What each modality adds to the score of a fitted model, with patient-bootstrap intervals.

    Parameters
    ----------
    estimator : fitted classifier with `predict_proba`
        It must take nulls, since a modality is taken away by setting its cells to null.
    X : DataFrame of shape (n_samples, n_columns)
        Held-out rows.
    y : array-like of shape (n_samples,) or (n_samples, n_tasks)
        Yes/no outcomes, null where unknown. Scores of several tasks are averaged.
    modalities : dict of str to modality, str or list of str, default=None
        Columns of every modality; None takes those that the estimator names.
    method : {"drop", "shapley"}, default="drop"
        ``"drop"``: the score of all modalities minus that of all but this one; two modalities
        that tell the same both get nothing. ``"shapley"``: the mean gain over all orders in which
        modalities may arrive; the shares sum to what all of them add to none.
    metric : str, default="auroc"
        A name as in `bootstrap_scores`. Losses and calibration errors are counted negative, so
        that a modality that helps has a positive contribution.
    groups : str or array-like of shape (n_samples,), default=None
        Patient of every row, or the column of X that holds it; patients are resampled whole.
    n_permutations : int, default=20
        With ``"shapley"`` and more than 8 modalities: so many orders are drawn, each with its
        reverse. Up to 8 modalities all coalitions are asked, and this is not used.
    n_resamples : int, default=200
    confidence : float, default=0.95
    random_state : int, RandomState instance or None, default=None

    Returns
    -------
    table : DataFrame
        Indexed by `modality`, in units of the metric: `contribution`, `lo`, `hi`, and `present`
        (share of the rows that have it). With drawn orders also `sampling_error`, their standard
        error. The last row ``"(all)"`` is what all modalities together add to none.

    See Also
    --------
    contribution_scorer : The same inside cross-validation.
    sklearn.inspection.permutation_importance : Single columns, shuffled instead of taken away.

    Notes
    -----
    The model is not fitted again: the question is what this model makes of a modality, and how it
    does without. How a model does that never had the modality is asked by ``note="drop"`` in a grid
    search. A column that two modalities read is null as soon as one of them is away.

    References
    ----------
    Covert I, Lundberg S, Lee S-I. Understanding global feature contributions with additive
    importance measures. NeurIPS 2020.

    Mitchell R, Cooper J, Frank E, Holmes G. Sampling permutations for Shapley value estimation.
    J Mach Learn Res 2022;23:1-46.

    Examples
    --------
    >>> import numpy as np, pandas as pd
    >>> from sklearn.ensemble import HistGradientBoostingClassifier
    >>> from ehrfuse.evaluation import modality_contribution
    >>> X = pd.DataFrame(np.random.default_rng(0).normal(size=(300, 2)), columns=["ph", "age"])
    >>> y = (X["ph"] > 0).astype(int)
    >>> model = HistGradientBoostingClassifier(max_iter=10).fit(X[:200], y[:200])
    >>> table = modality_contribution(
    ...     model, X[200:], y[200:], {"gas": "ph", "static": "age"}, random_state=0
    ... )
    >>> table["contribution"].round(2).to_dict()
    {'gas': 0.5, 'static': 0.0, '(all)': 0.5}
    """
    check_option(method, "method", ("drop", "shapley"))
    check_settings([metric], n_resamples, confidence)
    check_scalar(n_permutations, "n_permutations", (int, np.integer), min_val=1)
    rng = check_random_state(random_state)
    tasks = check_labels(y, getattr(estimator, "classes_", None))
    codes = group_codes(groups, len(X), X)
    game = Coalitions(estimator, X, modalities, tasks)
    orders = draw_orders(game.n, n_permutations, rng) if method == "shapley" else []
    steps = drop_steps(game.n) if method == "drop" else shapley_steps(game.n, orders)
    members, shares = share_matrix(game.n, steps)
    probas = [game.proba(coalition) for coalition in members]
    scores = np.array([game.score(proba, metric) for proba in probas])
    draws = bootstrap_draws(tasks, probas, codes, [metric], n_resamples, rng)[:, :, 0]
    two = [len(np.unique(labels[~np.isnan(labels)])) == 2 for labels in tasks.labels.T]
    resampled = shares @ (sign_of(metric) * draws[:, two].mean(axis=1))
    bounds = [percentile_interval(row, confidence) for row in resampled]
    table = pd.DataFrame(bounds, columns=["lo", "hi"], index=[*game.present, "(all)"])
    table.insert(0, "contribution", shares @ scores)
    table["present"] = [*game.present.mean(), game.present.any(axis=1).mean()]
    if orders:
        table["sampling_error"] = [*_sampling_error(orders, members, scores), 0.0]
    return table.rename_axis("modality")


def sign_of(metric):
    """-1 for what should be low."""
    return -1 if metric in LOSSES else 1


class Coalitions:
    """Predictions of one estimator when only some of the modalities are left."""

    def __init__(self, estimator, X, modalities, tasks):
        modalities = estimator_modalities(estimator) if modalities is None else modalities
        self.present = check_present(X, modalities)
        self.columns = {name: modality_columns(modalities[name], X) for name in self.present}
        self.estimator, self.X, self.tasks = estimator, X, tasks
        self.n = len(self.columns)

    def proba(self, members):
        """Probabilities when only `members` (places of modalities) are there."""
        away = [name for place, name in enumerate(self.columns) if place not in members]
        X = without(self.X, [column for name in away for column in self.columns[name]])
        try:
            proba = self.estimator.predict_proba(X)
        except Exception as error:
            self.estimator.predict_proba(self.X)  # where this fails too, it is about something else
            raise ValueError(
                f"{type(self.estimator).__name__} does not predict without {away}: {error} "
                "Use an estimator that takes nulls, or put an imputer before it."
            ) from error
        return check_proba(proba, self.tasks, getattr(self.estimator, "classes_", None))

    def score(self, proba, metric):
        """Score, greater is better, averaged over the tasks that have both classes."""
        scores = [
            one_score(metric, labels[known], p[known])
            for labels, known, p in zip(
                self.tasks.labels.T, self.tasks.known.T, proba.T, strict=True
            )
        ]
        scores = [score for score in scores if not np.isnan(score)]
        return sign_of(metric) * np.mean(scores) if scores else np.nan


def without(X, columns):
    """X with null in all cells of `columns`; a shallow copy."""
    X = X.copy(deep=False)
    for column in dict.fromkeys(columns):
        cells = X[column]
        # Whole numbers and truth values of NumPy have no null of their own.
        if isinstance(cells.dtype, np.dtype) and cells.dtype.kind in "iub":
            cells = cells.astype(float)
        X[column] = cells.where(np.zeros(len(X), dtype=bool))
    return X


def drop_steps(n):
    """Each player arrives last: (player, coalition before, coalition after, weight)."""
    everyone = frozenset(range(n))
    return [(player, everyone - {player}, everyone, 1.0) for player in range(n)]


def draw_orders(n, n_permutations, rng):
    """Orders of arrival, each with its reverse; none where all coalitions can be asked."""
    if n <= MAX_EXACT:
        return []
    drawn = [rng.permutation(n).tolist() for _ in range(n_permutations)]
    return [order for one in drawn for order in (one, one[::-1])]


def shapley_steps(n, orders=()):
    """Every arrival and its weight: in the orders given, else in all there are."""
    if orders:
        return [
            (order[k], frozenset(order[:k]), frozenset(order[: k + 1]), 1 / len(orders))
            for order in orders
            for k in range(n)
        ]
    return [
        (player, frozenset(before), frozenset(before) | {player},
         factorial(size) * factorial(n - size - 1) / factorial(n))
        for size in range(n)
        for before in itertools.combinations(range(n), size)
        for player in set(range(n)) - set(before)
    ]  # fmt: skip


def share_matrix(n, steps):
    """Coalitions that occur, and weights whose product with their scores gives the shares.

    The last row of the weights is all players against none.
    """
    ends = (frozenset(), frozenset(range(n)))
    members = list(dict.fromkeys([*ends, *(c for step in steps for c in step[1:3])]))
    place = {coalition: i for i, coalition in enumerate(members)}
    shares = np.zeros((n + 1, len(members)))
    for player, before, after, weight in steps:
        shares[player, place[after]] += weight
        shares[player, place[before]] -= weight
    shares[n, :2] = -1, 1
    return members, shares


def _sampling_error(orders, members, scores):
    """Standard error of every share over the pairs of an order and its reverse."""
    place = {coalition: i for i, coalition in enumerate(members)}
    gains = np.empty((len(orders), len(orders[0])))
    for row, order in enumerate(orders):
        path = scores[[place[frozenset(order[:k])] for k in range(len(order) + 1)]]
        gains[row, order] = np.diff(path)
    pairs = gains.reshape(-1, 2, gains.shape[1]).mean(axis=1)
    if len(pairs) < 2:
        return np.full(gains.shape[1], np.nan)
    return pairs.std(axis=0, ddof=1) / np.sqrt(len(pairs))
