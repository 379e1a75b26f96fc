"""Any column as a feature: what the rest of a record tells about one modality."""

import numbers
from collections.abc import Hashable, Sized
from decimal import Decimal

import numpy as np
import pandas as pd

from ehrfuse._patterns import modality_columns
from ehrfuse.evaluation._inputs import group_values

_MAX_LEVELS = 32  # strings with more distinct values are text or identifiers, not categories


def as_feature(cells: pd.Series):
    """Numbers as they are, few-valued strings as codes, text and lists as their length.

    Returns (values, kind), kind one of "number", "category" and "length", or None where the
    cells are of a kind that says nothing beyond its presence.
    """
    kind = getattr(cells.dtype, "kind", "O")
    if kind in "biuf" or pd.api.types.is_numeric_dtype(cells.dtype):
        return cells.to_numpy(dtype=float, na_value=np.nan), "number"
    if kind in "mM":
        since = cells if kind == "m" else cells - cells.min()
        return since.dt.total_seconds().to_numpy(dtype=float, na_value=np.nan), "number"
    try:  # Arrow lists are measured where they lie, not cell by cell as Python objects.
        return cells.list.len().to_numpy(dtype=float, na_value=np.nan), "length"
    except (AttributeError, ImportError):
        return _object_feature(cells)


def _object_feature(cells: pd.Series):
    known = cells.notna().to_numpy()
    seen = cells.to_numpy(dtype=object)[known]
    values = np.full(len(cells), np.nan)
    if all(isinstance(cell, str) for cell in seen):
        codes, levels = pd.factorize(seen, sort=True)
        if len(levels) <= _MAX_LEVELS:
            values[known] = codes
            return values, "category"
    if all(isinstance(cell, numbers.Real | Decimal | np.bool_) for cell in seen):
        values[known] = seen.astype(float)
        return values, "number"
    if all(isinstance(cell, Sized) and getattr(cell, "ndim", 1) > 0 for cell in seen):
        values[known] = [len(cell) for cell in seen]
        return values, "length"
    return None


def is_same(cells, values):
    """Whether a column holds the very values of the groups; stops at the first that differs."""
    if values is None or cells.isna().any():
        return False
    pairs = zip(cells, values, strict=True)
    return all(isinstance(cell, Hashable) and cell == value for cell, value in pairs)


class Rest:
    """What is known of every row without one modality: features by column, never identifiers."""

    def __init__(self, X, modalities, groups, exclude):
        lost = [column for column in exclude if column not in X.columns]
        if lost:
            raise ValueError(f"exclude names {lost}, which are no columns of X; check the names.")
        hidden = set(exclude)
        hidden.update({groups} if isinstance(groups, str) else {getattr(groups, "name", None)})
        values = group_values(groups, X)
        self.columns = {}
        for name, modality in modalities.items():
            if not (isinstance(modality, str) and modality == "drop"):
                self.columns[name] = modality_columns(modality, X)
        read = {column for columns in self.columns.values() for column in columns} - hidden
        self.present = {column: X[column].notna().to_numpy() for column in read}
        features = {column: as_feature(X[column]) for column in read}
        self.features = {
            column: feature
            for column, feature in features.items()
            # The patient's number may also stand in X while groups came as an array.
            if feature and not is_same(X[column], values)
        }

    def without(self, name):
        """Feature matrix and mask of categories from all columns that modality lacks."""
        own = set(self.columns[name])
        matrix, categorical = [], []
        for columns in self.columns.values():
            # Shared columns go too: they would tell of the one modality through the other.
            left = [column for column in columns if column in self.present and column not in own]
            if not left:
                continue
            matrix.append(np.any([self.present[column] for column in left], axis=0))
            categorical.append(False)
            for column in left:
                if column in self.features:
                    values, kind = self.features[column]
                    matrix.append(np.where(np.isinf(values), np.nan, values))
                    categorical.append(kind == "category")
        return matrix, categorical
