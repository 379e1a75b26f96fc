"""Scorers for scikit-learn's cross-validation and searches, greater is better."""

import copy
import warnings

import numpy as np
from sklearn.exceptions import UndefinedMetricWarning
from sklearn.utils import check_scalar
from sklearn.utils.metadata_routing import MetadataRequest

from ehrfuse._runtime import check_option
from ehrfuse.evaluation._inputs import (
    check_frame,
    check_labels,
    check_proba,
    estimator_modalities,
    find_patterns,
)
from ehrfuse.evaluation._resampling import LOSSES, as_weights, metric_function, one_score
from ehrfuse.evaluation.contribution import (
    MAX_EXACT,
    Coalitions,
    drop_steps,
    shapley_steps,
    share_matrix,
)
from ehrfuse.evaluation.slices import subgroup_slices


class _Routed:
    """Requests of metadata, as scikit-learn's own scorers make them."""

    def __init__(self):
        self._requests = MetadataRequest(owner=type(self).__name__)
        self._requests.score.add_request(param="sample_weight", alias=None)

    def set_score_request(self, *, sample_weight=None):
        """Ask for weights (True, or the name they are passed by), or refuse them (False)."""
        self._requests.score.add_request(param="sample_weight", alias=sample_weight)
        return self

    def get_metadata_routing(self):
        """What is asked for."""
        return copy.deepcopy(self._requests)


class _MaskedScorer(_Routed):
    """What `masked_scorer` returns; a class at module level, so that it can be pickled."""

    def __init__(self, metric, average):
        super().__init__()
        self.metric = metric
        self.average = average

    def __repr__(self):
        return f"masked_scorer({self.metric!r}, average={self.average!r})"

    def __call__(self, estimator, X, y, sample_weight=None):
        """Score `estimator` on X and y, higher is better."""
        classes = getattr(estimator, "classes_", None)
        tasks = check_labels(y, classes)
        proba = check_proba(estimator.predict_proba(X), tasks, classes)
        weights = as_weights(proba, sample_weight)
        scores = np.array(
            [
                one_score(self.metric, labels[known], p[known], weights[known])
                for labels, known, p in zip(tasks.labels.T, tasks.known.T, proba.T, strict=True)
            ]
        )
        scored = ~np.isnan(scores)
        if not scored.all():
            self._warn(tasks, scored)
        if not scored.any():
            return np.nan
        shares = tasks.known.sum(axis=0)[scored] if self.average == "weighted" else None
        sign = -1.0 if self.metric in LOSSES else 1.0
        return sign * float(np.average(scores[scored], weights=shares))

    def _warn(self, tasks, scored):
        names = [0] if tasks.names is None else tasks.names
        left_out = [name for name, has in zip(names, scored, strict=True) if not has]
        what = "y" if tasks.names is None else f"task(s) {left_out}"
        end = "they are left out of the average." if scored.any() else "the score is NaN."
        warnings.warn(
            f"{self.metric} needs known labels of both classes, which {what} lacks here; {end}",
            UndefinedMetricWarning,
            stacklevel=3,
        )


def masked_scorer(metric, average="macro"):
    """Scorer for yes/no outcomes of which some labels are unknown.

    Parameters
    ----------
    metric : str
        A name as in `bootstrap_scores`: ``"auroc"``, ``"auprc"``, ``"brier"``, ``"log_loss"``,
        ``"ece"``, ``"ece_uniform"`` or ``"net_benefit@T"``. Losses and calibration errors are
        returned negative, so that greater is better.
    average : {"macro", "weighted"}, default="macro"
        Mean over the tasks of `y`: plain, or weighted by their numbers of known labels.

    Returns
    -------
    scorer : callable
        ``scorer(estimator, X, y, sample_weight=None)`` gives a float. It can be pickled and works
        as `scoring` in scikit-learn's `cross_val_score`, `GridSearchCV` and the like.

    Raises
    ------
    ValueError
        If `metric` or `average` is not known.

    Notes
    -----
    `y` is one label per row (two classes, null where unknown), or one 0/1 column per task with NaN
    where unknown; unknown labels are left out task by task. A task whose known labels are of one
    class is skipped with a warning; if none is left the score is NaN.

    The estimator's ``predict_proba`` may be of shape (n_samples, 2), (n_samples, n_tasks), or a
    list of (n_samples, 2). With unknown labels pass `cv` as a splitter object that does not
    look at `y`, such as `KFold` or `GroupKFold`: an integer makes scikit-learn stratify by `y`.

    With metadata routing, ``masked_scorer("auroc").set_score_request(sample_weight=True)`` asks
    for weights, as any scorer of scikit-learn does.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.dummy import DummyClassifier
    >>> from ehrfuse.evaluation import masked_scorer
    >>> X, y = np.zeros((4, 1)), np.array([0.0, 1.0, np.nan, 1.0])
    >>> model = DummyClassifier(strategy="prior").fit(X[:2], [0, 1])
    >>> masked_scorer("auroc")(model, X, y)
    0.5
    """
    metric_function(metric)
    check_option(average, "average", ["macro", "weighted"])
    return _MaskedScorer(metric, average)


class _WorstGroupScorer(_MaskedScorer):
    """What `worst_group_scorer` returns."""

    def __init__(self, metric, by, min_count):
        super().__init__(metric, "macro")
        self.by = by
        self.min_count = min_count

    def __repr__(self):
        return f"worst_group_scorer({self.metric!r}, by={self.by!r}, min_count={self.min_count})"

    def __call__(self, estimator, X, y, sample_weight=None):
        """Lowest score of any subgroup, higher is better."""
        classes = getattr(estimator, "classes_", None)
        tasks = check_labels(y, classes)
        proba = check_proba(estimator.predict_proba(X), tasks, classes)
        weights = as_weights(proba, sample_weight)
        places = self._places(estimator, check_frame(X))
        sign = -1.0 if self.metric in LOSSES else 1.0
        scores = [
            sign * one_score(self.metric, labels[rows & known], p[rows & known],
                             weights[rows & known])
            for labels, known, p in zip(tasks.labels.T, tasks.known.T, proba.T, strict=True)
            for rows in (places == place for place in np.unique(places))
        ]  # fmt: skip
        scores = [score for score in scores if not np.isnan(score)]
        if not scores:
            self._warn(tasks, np.zeros(len(tasks.known.T), dtype=bool))
        return min(scores) if scores else np.nan

    def _places(self, estimator, X):
        """Number of the part of every row."""
        if self.by != "pattern" and isinstance(self.by, str):
            if self.by not in X:
                raise ValueError(
                    f"by={self.by!r} is no column of X; name one, or pass 'pattern' or a dict of "
                    "modalities."
                )
            return subgroup_slices(X[self.by], self.by, self.min_count).rows
        modalities = estimator_modalities(estimator) if self.by == "pattern" else self.by
        return find_patterns(X, modalities, min_count=self.min_count).rows


def worst_group_scorer(metric, by="pattern", *, min_count=50):
    """Scorer that gives the lowest score of any subgroup or missing pattern.

    Parameters
    ----------
    metric : str
        A name as in `bootstrap_scores`; losses are returned negative.
    by : str or dict of modalities, default="pattern"
        A column of X, such as the hospital; a dict divides by the missing patterns of its
        modalities, and ``"pattern"`` by those of the estimator's own.
    min_count : int, default=50
        Parts with fewer rows are pooled, since the lowest of many noisy scores says nothing.

    Returns
    -------
    scorer : callable
        ``scorer(estimator, X, y, sample_weight=None)`` gives a float, greater is better.

    See Also
    --------
    score_by_pattern, score_by_subgroup : All of the scores, with intervals.

    Examples
    --------
    >>> import pandas as pd
    >>> from sklearn.linear_model import LogisticRegression
    >>> from sklearn.model_selection import cross_val_score
    >>> from ehrfuse.evaluation import worst_group_scorer
    >>> X = pd.DataFrame({"age": range(60), "male": [0, 1] * 30})
    >>> scorer = worst_group_scorer("brier", by="male", min_count=5)
    >>> cross_val_score(LogisticRegression(), X, X["age"] > 30, cv=3, scoring=scorer).shape
    (3,)
    """
    metric_function(metric)
    check_scalar(min_count, "min_count", (int, np.integer), min_val=1)
    return _WorstGroupScorer(metric, by, min_count)


class _ContributionScorer(_Routed):
    """What `contribution_scorer` returns."""

    def __init__(self, metric, modalities, method):
        super().__init__()
        self.metric = metric
        self.modalities = modalities
        self.method = method

    def __repr__(self):
        return f"contribution_scorer({self.metric!r}, method={self.method!r})"

    def __call__(self, estimator, X, y):
        """Contribution of every modality, by name."""
        tasks = check_labels(y, getattr(estimator, "classes_", None))
        game = Coalitions(estimator, X, self.modalities, tasks)
        if self.method == "shapley" and game.n > MAX_EXACT:
            raise ValueError(
                f"There are {game.n} modalities; a scorer shares exactly, up to {MAX_EXACT}. Use "
                "method='drop', or modality_contribution, which samples."
            )
        steps = drop_steps(game.n) if self.method == "drop" else shapley_steps(game.n)
        members, shares = share_matrix(game.n, steps)
        scores = [game.score(game.proba(coalition), self.metric) for coalition in members]
        return dict(zip([*game.columns, "(all)"], (shares @ scores).tolist(), strict=True))


def contribution_scorer(metric="auroc", modalities=None, *, method="drop"):
    """Scorer that gives the contribution of every modality, for `cross_validate`.

    Parameters
    ----------
    metric : str, default="auroc"
        A name as in `bootstrap_scores`.
    modalities : dict of str to modality, str or list of str, default=None
        None takes those that the estimator names.
    method : {"drop", "shapley"}, default="drop"
        As in `modality_contribution`; ``"shapley"`` is exact here, for at most 8 modalities.

    Returns
    -------
    scorer : callable
        ``scorer(estimator, X, y)`` gives a dict of modality name to float, which
        :func:`sklearn.model_selection.cross_validate` reports as ``test_<modality>``.

    See Also
    --------
    modality_contribution : The same on one set of rows, with intervals.

    Examples
    --------
    >>> import pandas as pd
    >>> from sklearn.ensemble import HistGradientBoostingClassifier
    >>> from sklearn.model_selection import cross_validate
    >>> from ehrfuse.evaluation import contribution_scorer
    >>> X = pd.DataFrame({"age": range(100), "hr": [80, 90] * 50})
    >>> scorer = contribution_scorer("auroc", {"static": "age", "vitals": "hr"})
    >>> model = HistGradientBoostingClassifier(max_iter=5)
    >>> sorted(cross_validate(model, X, X["age"] > 50, cv=3, scoring=scorer))[2:]
    ['test_(all)', 'test_static', 'test_vitals']
    """
    metric_function(metric)
    check_option(method, "method", ("drop", "shapley"))
    return _ContributionScorer(metric, modalities, method)
