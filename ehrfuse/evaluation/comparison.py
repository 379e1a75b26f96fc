"""Several models on the same folds: the table of a paper, and what a difference is worth."""

import time
import warnings
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
from sklearn.base import clone
from sklearn.utils.parallel import Parallel, delayed

from ehrfuse._progress import progress_bar
from ehrfuse._runtime import check_option
from ehrfuse.evaluation._inputs import check_labels, check_proba, check_rows, group_codes
from ehrfuse.evaluation._resampling import bootstrap_draws, one_score
from ehrfuse.evaluation._tables import Comparison
from ehrfuse.evaluation.folds import hide_groups, make_splits, take
from ehrfuse.evaluation.metrics import check_settings, lead_summary, score_and_interval

MEAN = "(mean)"  # the row over all tasks


def compare(
    models,
    X,
    y,
    *,
    groups=None,
    cv=5,
    metrics=("auroc", "auprc", "brier"),
    seeds=(0,),
    reference=None,
    n_resamples=2000,
    confidence=0.95,
    n_jobs=None,
    on_error="raise",
    random_state=0,
    verbose=None,
):
    """Cross-validate models on the same folds and say how they differ.

    Parameters
    ----------
    models : dict of str to classifier with `predict_proba`
        Cloned and fitted once per seed and fold.
    X : DataFrame or array of shape (n_samples, n_columns)
    y : array-like of shape (n_samples,) or (n_samples, n_tasks)
        Yes/no outcomes, null where unknown. Rows of a 1-D `y` whose label is unknown are
        predicted and not trained on.
    groups : str or array-like of shape (n_samples,), default=None
        Patient of every row, or the column of X that holds it. No patient is on both sides of a
        fold, and the bootstrap draws patients. A column of X that is named here, that a Series
        given here is called like, or that holds the values given here, is hidden from models whose
        own `groups` parameter does not name it.
    cv : int or splitter, default=5
        A number of folds is shuffled by the seed, spread over the classes of a 1-D `y`, and split
        by patient with `groups`. A splitter is used as it is, for every seed.
    metrics : str or sequence of str, default=("auroc", "auprc", "brier")
        Names as in `bootstrap_scores`.
    seeds : int, sequence of int or None, default=(0,)
        One repetition per seed: it shuffles the folds and is set as every parameter
        `random_state` of every model, nested ones included. None leaves models as they are and
        does not shuffle.
    reference : str, default=None
        Model from which differences are taken; None is the first.
    n_resamples : int, default=2000
        Resamples of the patient bootstrap.
    confidence : float, default=0.95
    n_jobs : int, default=None
        Fits at a time, through joblib.
    on_error : {"raise", "warn"}, default="raise"
        What happens when a model fails in a fold: the comparison stops, or goes on without it.
    random_state : int, RandomState instance or None, default=0
        Of the bootstrap.
    verbose : bool, default=None
        None shows a progress bar at a terminal or in a notebook, True always, False never.

    Returns
    -------
    comparison : Comparison
        With `table`, `differences`, `predictions`, `fold_scores`, `to_markdown()` and
        `to_latex()`; it shows itself in a notebook.

    Raises
    ------
    RuntimeError
        If a model fails; the message names model, seed and fold.

    Notes
    -----
    Each score is told in two ways. *Mean and standard deviation over folds and seeds* is what
    papers print, and no measure of certainty, since folds share their training rows. *The pooled
    score* is that of all out-of-fold predictions together, averaged over the seeds, with the
    interval of a bootstrap of patients; differences are taken on the same resamples. Pooling
    compares predictions of models fitted on different folds, so that a model whose level drifts
    from fold to fold loses AUROC by it, and averaging over seeds makes a small ensemble. The
    interval leaves out the variation of fitting again.

    A model chosen by this table should be tested on other patients.

    Examples
    --------
    >>> from sklearn.datasets import make_classification
    >>> from sklearn.dummy import DummyClassifier
    >>> from sklearn.linear_model import LogisticRegression
    >>> from ehrfuse.evaluation import compare
    >>> X, y = make_classification(200, random_state=0)
    >>> models = {"nothing": DummyClassifier(), "logistic": LogisticRegression()}
    >>> found = compare(models, X, y, metrics="auroc", n_resamples=200)
    >>> print(found.to_markdown(differences=False))
    | | AUROC, mean ± SD over 5 folds | AUROC pooled (95 % interval) |
    | --- | --- | --- |
    | nothing | 0.500 ± 0.000 | 0.500 (0.500 to 0.500) |
    | logistic | 0.971 ± 0.028 | 0.960 (0.932 to 0.986) |
    """
    metrics = [metrics] if isinstance(metrics, str) else list(metrics)
    check_settings(metrics, n_resamples, confidence)
    check_option(on_error, "on_error", ("raise", "warn"))
    _check_models(models, reference)
    tasks = check_labels(y)
    check_rows(len(y), X=X)
    codes = group_codes(groups, len(y), X if hasattr(X, "columns") else None)
    fits = list(_plan(models, X, y, cv, groups, seeds, tasks))
    done = _run(fits, y, tasks, n_jobs, verbose)
    failures = _failures(fits, done, on_error)
    kept = [name for name in models if name not in failures]
    reference = kept[0] if reference is None or reference in failures else reference
    predictions, fold_scores = _gather(kept, fits, done, tasks, metrics)
    table, differences = _bootstrap(
        predictions, fold_scores, tasks, codes, metrics, reference,
        {"n_resamples": n_resamples, "random_state": random_state}, confidence,
    )  # fmt: skip
    return Comparison(
        table=table, differences=differences, fold_scores=fold_scores, failures=failures,
        predictions=_frame(predictions, tasks, X), reference=reference, confidence=confidence,
    )  # fmt: skip


def _check_models(models, reference):
    if not isinstance(models, Mapping) or not models:
        raise ValueError(
            f"models is {type(models).__name__ if models else 'empty'}; pass a dict of name to "
            "estimator, such as {'logistic': LogisticRegression()}."
        )
    for name, model in models.items():
        if not hasattr(model, "fit") or not hasattr(model, "predict_proba"):
            raise ValueError(
                f"Model {name!r} ({type(model).__name__}) has no predict_proba; these scores need "
                "probabilities. CalibratedClassifierCV gives them to a classifier without."
            )
    if reference is not None and reference not in models:
        raise ValueError(f"reference={reference!r} is no model; choose one of {list(models)}.")


class _Fit(NamedTuple):
    """One model to fit on one fold of one repetition."""

    name: str
    model: object
    X: object
    train: np.ndarray
    test: np.ndarray
    seed: int | None
    fold: int
    n_folds: int

    @property
    def where(self):
        seed = "" if self.seed is None else f", seed {self.seed}"
        return f"fold {self.fold + 1} of {self.n_folds}{seed}"


def _plan(models, X, y, cv, groups, seeds, tasks):
    """All fits, those of one fold together."""
    seeds = [seeds] if seeds is None or np.ndim(seeds) == 0 else list(seeds)
    if not seeds or (any(seed is None for seed in seeds) and len(seeds) > 1):
        raise ValueError(f"seeds={seeds!r} must be one or several whole numbers, or None.")
    seen = {name: hide_groups(model, X, groups) for name, model in models.items()}
    values = next(iter(seen.values()))[1]
    known = tasks.known.all(axis=1) if tasks.names is None else np.ones(len(y), dtype=bool)
    for seed in seeds:
        splits = make_splits(y, cv, values, seed)
        for fold, (train, test) in enumerate(splits):
            train = train[known[train]]
            for name, model in models.items():
                model = _seeded(model, seed)
                yield _Fit(name, model, seen[name][0], train, test, seed, fold, len(splits))


def _seeded(model, seed):
    """A clone whose random states are the seed."""
    model = clone(model)
    if seed is None:
        return model
    names = [n for n in model.get_params(deep=True) if n.split("__")[-1] == "random_state"]
    return model.set_params(**dict.fromkeys(sorted(names), seed))


def _run(fits, y, tasks, n_jobs, verbose):
    """Probabilities and seconds of every fit, or the sentence that says why there are none."""
    bar = progress_bar(len(fits), "compare", "fit", verbose)
    done = [None] * len(fits)
    jobs = (
        delayed(_fit_one)(place, fit.model, take(fit.X, fit.train), take(y, fit.train),
                          take(fit.X, fit.test), tasks._replace(labels=tasks.labels[fit.test]))
        for place, fit in enumerate(fits)
    )  # fmt: skip
    try:
        for place, *found in Parallel(n_jobs, return_as="generator_unordered")(jobs):
            done[place] = found
            if bar is not None:
                bar.set_postfix_str(fits[place].name, refresh=False)
                bar.update()
    finally:
        if bar is not None:
            bar.close()
    return done


def _fit_one(place, model, X_train, y_train, X_test, tasks):
    start = time.perf_counter()
    try:
        model.fit(X_train, y_train)
        proba = model.predict_proba(X_test)
        proba = check_proba(proba, tasks, getattr(model, "classes_", None))
    except Exception as error:
        return place, None, error
    return place, proba, time.perf_counter() - start


def _failures(fits, done, on_error):
    """Sentence by name of each model that failed."""
    failures = {}
    for fit, (proba, error) in zip(fits, done, strict=True):
        if proba is not None or fit.name in failures:
            continue
        sentence = f"Model {fit.name!r} failed in {fit.where}: {type(error).__name__}: {error}"
        if on_error == "raise":
            raise RuntimeError(sentence) from error
        failures[fit.name] = sentence
        warnings.warn(f"{sentence} The comparison goes on without it.", UserWarning, stacklevel=3)
    if len(failures) == len({fit.name for fit in fits}):
        raise RuntimeError("No model could be fitted. " + next(iter(failures.values())))
    return failures


def _gather(names, fits, done, tasks, metrics):
    """Predictions averaged over repetitions, and the scores of every fold."""
    total = {name: np.zeros(tasks.labels.shape) for name in names}
    count = {name: np.zeros((len(tasks.labels), 1)) for name in names}
    scores = []
    for fit, (proba, seconds) in zip(fits, done, strict=True):
        if fit.name not in total:
            continue
        total[fit.name][fit.test] += proba
        count[fit.name][fit.test] += 1
        head = {"model": fit.name, "seed": fit.seed, "fold": fit.fold, "n": len(fit.test)}
        scores += [head | row | {"seconds": seconds} for row in
                   _scores_of(proba, fit.test, tasks, metrics)]  # fmt: skip
    with np.errstate(invalid="ignore"):
        predictions = {name: total[name] / count[name] for name in names}
    return predictions, pd.DataFrame(scores)


def _scores_of(proba, rows, tasks, metrics):
    names = [None] if tasks.names is None else tasks.names
    table = []
    for place, name in enumerate(names):
        known = tasks.known[rows, place]
        labels = tasks.labels[rows, place][known]
        found = {metric: one_score(metric, labels, proba[known, place]) for metric in metrics}
        table.append({"task": name} | found)
    if len(names) > 1:
        means = pd.DataFrame(table)[metrics].mean()
        table.append({"task": MEAN} | means.to_dict())
    return table


def _bootstrap(predictions, fold_scores, tasks, codes, metrics, reference, settings, confidence):
    """Pooled scores and paired differences, all models on the same resamples."""
    names = list(predictions)
    # Rows that no fold held out have no prediction of any model: the folds are the same.
    tested = ~np.isnan(predictions[names[0]]).any(axis=1)
    tasks = tasks._replace(labels=np.where(tested[:, None], tasks.labels, np.nan))
    probas = [np.nan_to_num(predictions[name]) for name in names]
    draws = bootstrap_draws(tasks, probas, codes, metrics, **settings)
    keys = [None] if tasks.names is None else list(tasks.names)
    found, estimates = {}, {}
    for model, name in enumerate(names):
        for place, task in enumerate(keys):
            rows = tasks.known[:, place]
            labels, p = tasks.labels[rows, place], probas[model][rows, place]
            for which, metric in enumerate(metrics):
                some = draws[model, place, which]
                score = score_and_interval(metric, labels, p, some, confidence)
                found[name, task, metric] = (*score, int(rows.sum()))
                estimates[name, task, metric] = score[0], some
        for metric in metrics if len(keys) > 1 else ():
            found[name, MEAN, metric], estimates[name, MEAN, metric] = _over_tasks(
                [estimates[name, task, metric] for task in keys], confidence, tasks
            )
    return (
        _table(found, fold_scores),
        _differences(found, estimates, reference, confidence),
    )


def _over_tasks(parts, confidence, tasks):
    """Mean over the tasks that have a score, with its interval."""
    parts = [part for part in parts if not np.isnan(part[0])]
    n = int(tasks.known.any(axis=1).sum())
    if not parts:
        return (np.nan, np.nan, np.nan, n), (np.nan, np.array([np.nan]))
    estimate, draws = np.mean([part[0] for part in parts]), np.mean([p[1] for p in parts], axis=0)
    lo, hi = np.nanquantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return (estimate, lo, hi, n), (estimate, draws)


def _table(found, fold_scores):
    """Per model, task and metric: over folds, and pooled."""
    model, of_task = fold_scores["model"], fold_scores["task"]
    rows = []
    for (name, task, metric), pooled in found.items():
        here = of_task.isna() if task is None else of_task == task
        own = fold_scores.loc[(model == name) & here, metric]
        spread = own.std(ddof=1) if own.count() > 1 else np.nan
        rows.append((name, task, metric, own.mean(), spread, int(own.count()), *pooled))
    columns = ["model", "task", "metric", "mean", "sd", "folds", "estimate", "lo", "hi", "n"]
    return _indexed(pd.DataFrame(rows, columns=columns))


def _differences(found, estimates, reference, confidence):
    rows = []
    for (name, task, metric), (estimate, draws) in estimates.items():
        if name == reference:
            continue
        base, base_draws = estimates[reference, task, metric]
        lead = estimate - base
        lo, hi, share = lead_summary(lead, draws - base_draws, metric, confidence)
        n = found[name, task, metric][-1]
        rows.append((name, task, metric, lead, lo, hi, share, n))
    columns = ["model", "task", "metric", "difference", "lo", "hi", "share_better", "n"]
    return _indexed(pd.DataFrame(rows, columns=columns))


def _indexed(table):
    """Index by model and metric, and by task where there are several."""
    keys = ["model", "metric"]
    if table["task"].isna().all():
        return table.drop(columns="task").set_index(keys)
    return table.set_index(["model", "task", "metric"])


def _frame(predictions, tasks, X):
    """Out-of-fold probabilities, one column per model, or per model and task."""
    index = getattr(X, "index", None)
    if tasks.names is None:
        return pd.DataFrame({name: p[:, 0] for name, p in predictions.items()}, index=index)
    columns = pd.MultiIndex.from_product([list(predictions), tasks.names], names=["model", "task"])
    return pd.DataFrame(np.hstack(list(predictions.values())), index=index, columns=columns)
