"""Modality: which columns, how cells become arrays, which encoder reads them."""

from numbers import Integral

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator
from torch import nn

from ehrfuse._data import Block
from ehrfuse._patterns import modality_columns


class Modality(BaseEstimator):
    """One kind of data: its columns, its arrays and its encoder.

    A new kind is a subclass with two hooks and an encoder: ``_learn(cells)`` sets what is learned
    from training rows, ``_read(cells, present)`` turns any rows into a `Block`, and
    ``make_encoder(d_model, n_members)`` builds the torch module that reads the block.

    Parameters
    ----------
    columns : str, list of str or callable
        Columns of X. A callable gets X and returns names, for example
        :func:`sklearn.compose.make_column_selector`.

    Attributes
    ----------
    columns_ : list of str
        The columns found in `fit`.
    seen_ : bool
        Whether any training row had this modality. One that no training row had stays absent at
        predict, because nobody trained its encoder.
    """

    _one_column = False

    def __init__(self, columns):
        self.columns = columns

    def fit(self, X, y=None):
        """Learn scales and vocabularies from training rows.

        Parameters
        ----------
        X : DataFrame of shape (n_samples, n_columns)
        y : ignored

        Returns
        -------
        self : Modality
        """
        self._check_params()
        self.columns_ = modality_columns(self, X)
        if len(set(self.columns_)) < len(self.columns_):
            raise ValueError(f"{self} names a column twice; name every column once.")
        cells = self._cells(X)
        self.seen_ = bool(cells.notna().any(axis=None))
        self._learn(cells)
        return self

    def transform(self, X):
        """Turn rows into arrays.

        Parameters
        ----------
        X : DataFrame of shape (n_samples, n_columns)

        Returns
        -------
        block : Block
        """
        cells = self._cells(X)
        present = cells.notna().any(axis=1).to_numpy(dtype=bool) & self.seen_
        return self._read(cells, present)

    def make_encoder(self, d_model: int, n_members: int = 1) -> nn.Module:
        """Build the torch module that reads the block.

        Parameters
        ----------
        d_model : int
            Width of a token.
        n_members : int, default=1
            Ensemble members of the core.

        Returns
        -------
        encoder : Module
            From the dict of `Block.take`, tensors (b, ...), to tokens (b, t, d_model) and their
            mask (b, t). One that knows of members states ``n_members`` and gives
            (b * n_members, t, d_model).
        """
        raise NotImplementedError

    def _check_params(self):
        """Raise for parameters out of range."""

    def _learn(self, cells: pd.DataFrame):
        raise NotImplementedError

    def _read(self, cells: pd.DataFrame, present: np.ndarray) -> Block:
        raise NotImplementedError

    def _cells(self, X):
        lost = [c for c in self.columns_ if c not in X.columns]
        if lost or not self.columns_:
            raise ValueError(
                f"{self} needs columns of X that are not there: {lost}; "
                f"X has {_some(X.columns)}. A modality nobody has is a column of nulls."
            )
        if self._one_column and len(self.columns_) != 1:
            raise ValueError(
                f"{type(self).__name__} reads one column, got {self.columns_}; "
                "declare one modality for each."
            )
        return X[self.columns_]

    def _only(self, cells: pd.DataFrame) -> pd.Series:
        return cells.iloc[:, 0]

    def _complain(self, row, got, needs, remedy):
        """One sentence on a cell that cannot be read."""
        raise ValueError(
            f"Column {self.columns_[0]!r} needs {needs}; row {row} holds {got}. {remedy}"
        )


def _some(names, limit=8):
    names = [repr(name) for name in names]
    return ", ".join(names[:limit]) + (
        f" and {len(names) - limit} more" if len(names) > limit else ""
    )


def check_count(value, name, minimum=1):
    """Raise unless `value` is a whole number of at least `minimum`."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {minimum}.")


def describe(cell) -> str:
    """Name the kind of a cell, never its content: a note must not end up in a log."""
    kind = type(cell).__name__
    if isinstance(cell, np.ndarray):
        return f"an array of shape {cell.shape} and dtype {cell.dtype}"
    if isinstance(cell, int | float | bool | np.number):
        return f"{kind} {cell}"
    try:
        return f"{kind} of length {len(cell)}"
    except TypeError:
        return kind
