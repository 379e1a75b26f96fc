"""Columns of any kind as features of the leak audit, and small models of one column out of fold."""

import re
from collections import Counter
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from scipy.sparse import csr_matrix
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.linear_model import Ridge

MAX_LEVELS = 50  # strings of more words and more distinct values than this are text
MAX_CODES = 5_000  # kinds of whole numbers that may still be codes
MIN_PATIENTS = 5  # a term of fewer patients is neither used nor shown: it may be a name
_WORD = re.compile(r"[^\W\d_]{2,}")
_BINS = 20
_MAX_LENGTH = 4096  # of a vector that is read as numbers
_PRIOR = 5.0  # rows that the mean of all counts for, in a bin


class Column(NamedTuple):
    """One column: its kind, which cells are filled, and what a small model reads."""

    kind: str  # number, category, text, records, vector, other
    present: np.ndarray
    data: object = None  # values, codes, token lists, flat records or a matrix


def read_column(cells):
    """Tell what a column holds and take out what can be learned from."""
    present = cells.notna().to_numpy()
    flat = _records_of(cells)
    if flat is not None:
        return Column("records", present, flat)
    if isinstance(cells.dtype, pd.ArrowDtype) and pa.types.is_nested(cells.dtype.pyarrow_dtype):
        return _read_lists(cells.to_numpy(dtype=object, na_value=None), present)
    if isinstance(cells.dtype, pd.CategoricalDtype):
        return Column("category", present, cells.cat.codes.to_numpy())
    if pd.api.types.is_bool_dtype(cells.dtype) or pd.api.types.is_numeric_dtype(cells.dtype):
        return Column("number", present, cells.to_numpy(dtype=float, na_value=np.nan))
    if pd.api.types.is_datetime64_any_dtype(cells.dtype):
        seconds = (cells - cells.min()).dt.total_seconds().to_numpy(dtype=float, na_value=np.nan)
        return Column("number", present, seconds)
    if getattr(cells.dtype, "kind", "O") == "m":
        seconds = cells.dt.total_seconds().to_numpy(dtype=float, na_value=np.nan)
        return Column("number", present, seconds)
    values = cells.to_numpy(dtype=object)
    seen = values[present]
    if len(seen) and all(isinstance(value, str) for value in seen):
        return _read_strings(values, present)
    if len(seen) and all(isinstance(value, list | tuple | np.ndarray) for value in seen):
        return _read_lists(values, present)
    numbers = pd.to_numeric(pd.Series(values), errors="coerce").to_numpy(dtype=float)
    if np.isfinite(numbers[present]).all():
        return Column("number", present, numbers)
    if all(np.ndim(value) == 0 and not isinstance(value, dict) for value in seen):
        return Column("category", present, pd.factorize(pd.Series(values).astype(str))[0])
    return Column("other", present)


def _records_of(cells):
    """Flat records, where the cells may be lists at all."""
    plain = cells.dtype != object and not isinstance(cells.dtype, pd.ArrowDtype)
    return None if plain else flat_records(cells)


def _read_strings(values, present):
    words = [_WORD.findall(v.lower()) if p else [] for v, p in zip(values, present, strict=True)]
    few = len(set(values[present])) <= MAX_LEVELS
    if few or np.mean([len(words[i]) for i in np.flatnonzero(present)]) <= 2:
        codes = pd.factorize(np.where(present, values, None))[0]
        return Column("category", present, codes)
    return Column("text", present, words)


def _read_lists(values, present):
    first = next((c[0] for c in values[present] if len(c)), None)
    if isinstance(first, str):
        empty = [[f"{v}" for v in c] if p else [] for c, p in zip(values, present, strict=True)]
        return Column("codes", present, empty)
    lengths = {np.shape(cell) for cell in values[present]}
    if first is not None and len(lengths) == 1 and np.isscalar(first):
        (shape,) = lengths
        if shape[0] <= _MAX_LENGTH:
            matrix = np.zeros((len(values), shape[0]))
            try:
                matrix[present] = np.stack([np.asarray(c, dtype=float) for c in values[present]])
            except (TypeError, ValueError):  # not numbers alone
                return Column("other", present)
            return Column("vector", present, np.nan_to_num(matrix))
    return Column("other", present)


def flat_records(cells):
    """One line per record of a column: `row` and the fields; None if it holds no records."""
    if isinstance(cells.dtype, pd.ArrowDtype):
        return _flat_arrow(pa.array(cells))
    values, present = cells.to_numpy(dtype=object), cells.notna().to_numpy()
    filled = [row for row in np.flatnonzero(present) if isinstance(values[row], list | np.ndarray)]
    first = next((values[row][0] for row in filled if len(values[row])), None)
    if not isinstance(first, dict):
        return None
    records = [record for row in filled for record in values[row]]
    if not all(isinstance(record, dict) for record in records):
        return None
    flat = pd.DataFrame.from_records(records)
    flat.insert(0, "row", [row for row in filled for _ in values[row]], allow_duplicates=True)
    return flat


def _flat_arrow(lists):
    """The same of an Arrow column, without a Python object per record."""
    lists = lists.combine_chunks() if isinstance(lists, pa.ChunkedArray) else lists
    is_list = pa.types.is_list(lists.type) or pa.types.is_large_list(lists.type)
    if not is_list or not pa.types.is_struct(lists.type.value_type):
        return None
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    records = lists.flatten()
    names = [field.name for field in lists.type.value_type]
    fields = {name: part.to_pandas() for name, part in zip(names, records.flatten(), strict=True)}
    return pd.DataFrame({"row": np.repeat(np.arange(len(lists)), lengths), **fields})


def tokens_of(column):
    """What may name an outcome: words of text, codes of lists, field=value of records."""
    if column.kind in ("text", "codes"):
        return column.data
    tokens = [[] for _ in column.present]
    for name, cells in column.data.items():
        if name in ("row", "time"):
            continue
        if pd.api.types.is_numeric_dtype(cells.dtype):
            cells = _as_codes(name, cells)
        for row, cell in zip(column.data["row"], cells, strict=bool(len(cells))):
            if isinstance(cell, str):
                tokens[row].append(cell)
            elif isinstance(cell, list | tuple | np.ndarray):
                tokens[row].extend(f"{name}: {value}" for value in cell)
    return tokens


def _as_codes(name, cells):
    """Whole numbers of few kinds may be codes (798 is one of ICD-9): name=value, else nothing."""
    values = cells.to_numpy(dtype=float, na_value=np.nan)
    known = np.isfinite(values)
    whole = known.any() and (values[known] == np.round(values[known])).all()
    if not whole or len(np.unique(values[known])) > MAX_CODES:
        return []
    return [f"{name}: {value:.0f}" if ok else None for value, ok in zip(values, known, strict=True)]


def token_matrix(tokens, codes):
    """Rows by terms, 1 where a term occurs; terms of at least `MIN_PATIENTS` patients only."""
    sets = [set(found) for found in tokens]
    patients = Counter()
    for _, members in pd.Series(range(len(sets))).groupby(np.asarray(codes)):
        patients.update(set().union(*(sets[row] for row in members)))
    names = sorted(term for term, count in patients.items() if count >= MIN_PATIENTS)
    place = {term: column for column, term in enumerate(names)}
    pairs = [(row, place[t]) for row, found in enumerate(sets) for t in found if t in place]
    rows, columns = np.array(pairs, dtype=int).reshape(-1, 2).T
    shape = (len(sets), len(names))
    return csr_matrix((np.ones(len(rows)), (rows, columns)), shape=shape), np.array(names)


# ---------------------------------------------------------------- models of one column


def bins_of(column):
    """Bin of every row of a number or a category, 0 where it is missing."""
    if column.kind == "category":
        return np.where(column.present, column.data + 1, 0)
    values = np.where(np.isfinite(column.data), column.data, np.nan)
    known = ~np.isnan(values)
    levels = np.unique(values[known])
    if len(levels) > _BINS:
        levels = np.unique(np.quantile(values[known], np.linspace(0, 1, _BINS + 1)[:-1]))
    codes = np.zeros(len(values), dtype=int)
    codes[known] = np.searchsorted(levels, values[known], side="right")
    return codes


def told_by_bins(codes, target, folds):
    """Mean outcome of a row's bin in the other folds, drawn to the mean of all in small bins."""
    fold = np.zeros(len(codes), dtype=int)
    for number, rows in enumerate(folds):
        fold[rows] = number
    known = ~np.isnan(target)
    values = np.where(known, target, 0.0)
    shape = (len(folds), int(codes.max()) + 1)
    place = fold * shape[1] + codes
    counts = np.bincount(place, weights=known, minlength=np.prod(shape)).reshape(shape)
    sums = np.bincount(place, weights=values, minlength=np.prod(shape)).reshape(shape)
    counts, sums = counts.sum(axis=0) - counts, sums.sum(axis=0) - sums
    mean = sums.sum(axis=1) / np.maximum(counts.sum(axis=1), 1)
    told = (sums + _PRIOR * mean[:, None]) / (counts + _PRIOR)
    # Means of folds differ against their labels; taken from the mean, chance is chance again.
    return (told - mean[:, None])[fold, codes]


def told_by_ridge(matrix, target, folds, alpha=1.0):
    """Out-of-fold predictions of ridge regression on a dense or sparse matrix."""
    told = np.full(len(target), np.nan)
    for rows in folds:
        train = np.setdiff1d(np.flatnonzero(~np.isnan(target)), rows)
        mean = target[train].mean()
        model = Ridge(alpha=alpha, solver="lsqr").fit(matrix[train], target[train] - mean)
        told[rows] = model.predict(matrix[rows])
    return told


def weighted(matrix):
    """Terms weighted by rarity, rows of length one: what ridge reads of a bag of terms."""
    rarity = np.log((1 + matrix.shape[0]) / (1 + np.asarray(matrix.sum(axis=0)).ravel())) + 1
    heavy = matrix.multiply(rarity).tocsr()
    length = np.sqrt(np.asarray(heavy.multiply(heavy).sum(axis=1)).ravel())
    return csr_matrix(heavy.multiply(1 / np.maximum(length, 1e-9)[:, None]))


def told_by_trees(matrix, target, binary, folds, seed):
    """Out-of-fold predictions of small boosted trees."""
    told = np.full(len(target), np.nan)
    kind = HistGradientBoostingClassifier if binary else HistGradientBoostingRegressor
    for rows in folds:
        train = np.setdiff1d(np.flatnonzero(~np.isnan(target)), rows)
        if len(np.unique(target[train])) < 2:
            continue
        x, other = matrix[train], matrix[rows]
        varied = [len(np.unique(column[~np.isnan(column)])) > 1 for column in x.T]
        if not any(varied):
            continue
        model = kind(max_iter=50, max_leaf_nodes=6, early_stopping=False, random_state=seed)
        model.fit(x[:, varied], target[train])
        other = other[:, varied]
        told[rows] = model.predict_proba(other)[:, 1] if binary else model.predict(other)
    return told
