"""Solve for the linear path of a core: logistic regression on the training rows."""

import warnings

import numpy as np
import torch
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold

from ehrfuse.modalities import Embedding, Tabular, Text
from ehrfuse.modalities._lab_tokens import Tokens
from ehrfuse.nn.linear_path import LinearPath, TableBag, ValueBag, VectorBag, WordBag

STRENGTH = 2.0  # inverse of the penalty on the weights, as in `LogisticRegression`
N_FOLDS = 5
LENGTH = 0.5  # of a row's values, beside the length one of a row's words
ROWS_AT_ONCE = 512


def linear_path(modalities, target):
    """A path that starts at the rates; None where no modality can be read linearly."""
    bags = {name: _bag(m) for name, m in modalities.items()}
    bags = {name: bag for name, bag in bags.items() if bag is not None}
    return LinearPath(bags, torch.from_numpy(target.start)) if bags else None


def _bag(modality):
    """Reader of one modality, None for a text model that is trained with the rest."""
    if isinstance(modality, Tokens):
        return ValueBag(modality.n_codes)
    if isinstance(modality, Tabular):
        sizes = [len(known) + 2 for known in modality.categories_.values()]
        return TableBag(len(modality.numeric_), sizes) if modality.numeric_ or sizes else None
    if isinstance(modality, Text) and modality.model is None:
        # Plain TF-IDF: the root of the share of notes with a term is there for Adam.
        idf = np.concatenate([[1.0], modality.idf_])
        return WordBag(torch.from_numpy(np.exp((idf - 1) / 2).astype("float32")))
    if isinstance(modality, Embedding) or (isinstance(modality, Text) and not modality.trainable):
        return VectorBag(*(torch.as_tensor(part, dtype=torch.float32) for part in modality.scale_))
    return None


def solve(path, data, target, seed):
    """Fit the path to the rows of `data`, in place; give every row's log-odds without itself.

    Parameters
    ----------
    path : LinearPath
    data : Data
        Training rows, with encoded labels and weights.
    target : ClassTarget or TaskTarget
    seed : int
        Of the folds, which part no rows of one patient.

    Returns
    -------
    log_odds : float32 array of shape (rows of the blocks, k)
        Of the training rows, each by a model that was fitted without its fold; 0 elsewhere.
    """
    features = _features(path, data)
    y, weight = data.y[data.rows], data.weight[data.rows].astype("float64")
    log_odds = np.zeros((len(data.y), len(path.bias)), "float32")
    for inside, outside in _folds(data, seed):
        coef, bias = _solve(features[inside], y[inside], weight[inside], target)
        log_odds[data.rows[outside]] = features[outside] @ coef + bias
    coef, bias = _solve(features, y, weight, target)
    path.weight.copy_(torch.from_numpy(coef))
    path.bias.copy_(torch.from_numpy(bias))
    return log_odds


def _folds(data, seed):
    groups = np.arange(len(data)) if data.groups is None else data.groups[data.rows]
    n = min(N_FOLDS, len(np.unique(groups)))
    if n < 2:
        return []
    return GroupKFold(n, shuffle=True, random_state=seed).split(groups, groups=groups)


def _solve(features, y, weight, target):
    """Weights (f, k) and where they start (k,); those of a task of one class are zero."""
    several = target.task_names is not None
    coef, bias = np.zeros((features.shape[1], y.shape[1])), target.start.astype("float64")
    if not several:
        coef = np.zeros((features.shape[1], target.n_outputs))
    for j in range(y.shape[1]):
        known = ~np.isnan(y[:, j])
        label = y[known, j].astype(int)
        classes = np.unique(label)
        if len(classes) < 2:
            continue
        table = target.class_weight[j] if several else target.class_weight
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model = LogisticRegression(C=STRENGTH, max_iter=500)
            model.fit(features[known], label, weight[known] * table[label])
        places = [j] if several or target.n_outputs == 1 else classes
        # Of more classes two may be left among the rows: half the log-odds for, half against.
        sign = np.ones(1) if len(model.coef_) == len(places) else np.array([-0.5, 0.5])
        coef[:, places], bias[places] = model.coef_.T * sign, model.intercept_ * sign
    return coef, bias


def _features(path, data):
    """Bags of all rows as a sparse array, after the gain of every modality is set."""
    parts = []
    for start in range(0, len(data), ROWS_AT_ONCE):
        rows = np.arange(start, min(start + ROWS_AT_ONCE, len(data)))
        batch = data.batch(rows).to(path.weight.device)
        ids, weights = path.features(batch.inputs, batch.present)
        ids, weights = ids.cpu().numpy(), weights.cpu().numpy()
        row, place = np.nonzero(weights)
        cells = weights[row, place].astype("float64"), (row, ids[row, place])
        parts.append(sparse.csr_array(cells, shape=(len(ids), len(path.weight))))
    features = sparse.csr_array(sparse.vstack(parts))
    gain = np.ones(len(path.weight))
    for m, (first, bag) in enumerate(zip(path.first, path.bags.values(), strict=True)):
        if not isinstance(bag, WordBag):
            mine = features[:, first : first + bag.n_features]
            length = np.sqrt(mine.multiply(mine).sum() / len(data))
            path.gain[m] = LENGTH / max(length, 1e-6)
            gain[first : first + bag.n_features] = float(path.gain[m])
    return features.multiply(gain[None]).tocsr()
