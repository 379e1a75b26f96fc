"""Tabular: numbers, booleans and categories of one row, any of them missing."""

import datetime

import numpy as np
import pandas as pd

from ehrfuse._data import Block
from ehrfuse.modalities._base import Modality, check_count, describe
from ehrfuse.modalities._numbers import (
    RobustScale,
    build_features,
    is_number_column,
    numeric_features,
    read_numbers,
    read_origin,
)
from ehrfuse.nn.encoders import TableEncoder

__all__ = ["Tabular"]

NULL, UNKNOWN = 0, 1  # category codes; the known ones follow


class Tabular(Modality):
    """Numbers, booleans and categories, one column each.

    Numbers are scaled robustly, clipped smoothly and encoded piecewise-linearly, with a flag for
    missing cells; categories are embedded, with a code for null and one for values unseen in fit.

    Parameters
    ----------
    columns : str, list of str or callable
        One or many columns. Numeric and boolean dtypes, and object columns of numbers, are
        numbers; everything else is a category.
    n_bins : int, default=8
        Bins of the piecewise-linear encoding.
    dropout : float, default=0.2
        On the token.
    column_dropout : float, default=0.5
        Share of the columns hidden from every training row.

    Attributes
    ----------
    numeric_ : list of str
    categories_ : dict of str to Index
        Known values of every categorical column.
    """

    def __init__(self, columns, *, n_bins=8, dropout=0.2, column_dropout=0.5):
        super().__init__(columns)
        self.n_bins = n_bins
        self.dropout = dropout
        self.column_dropout = column_dropout

    def _check_params(self):
        check_count(self.n_bins, "n_bins")

    def _learn(self, cells):
        self.numeric_ = [c for c in cells if is_number_column(cells[c])]
        words = {c: cells[c].dropna() for c in cells if c not in self.numeric_}
        for column in words.values():
            _refuse_containers(column)
        self.categories_ = {
            c: pd.Index(sorted(found.astype(object).unique(), key=str), dtype=object)
            for c, found in words.items()
        }
        self.origin_ = read_origin(cells, self.numeric_)
        table = read_numbers(cells, self.numeric_, self.origin_)
        self.scale_ = RobustScale.learn(table)
        self.features_ = numeric_features(
            self.scale_.apply(table, out=table), self.n_bins, cells.notna().any(axis=1).to_numpy()
        )

    def _read(self, cells, present):
        arrays = {}
        if self.numeric_:
            table = read_numbers(cells, self.numeric_, self.origin_)
            arrays["values"] = self.scale_.apply(table, out=table)
        if self.categories_:
            arrays["codes"] = np.stack(
                [_codes(cells[c], known) for c, known in self.categories_.items()], axis=1
            )
        return Block(present, arrays)

    def make_encoder(self, d_model, n_members=1):
        sizes = [len(known) + 2 for known in self.categories_.values()]
        return TableEncoder(
            build_features(self.features_), sizes, d_model, n_members,
            self.dropout, self.column_dropout,
        )  # fmt: skip


def _codes(column, known):
    codes = known.get_indexer(column.astype(object)) + 2
    codes = np.where(codes < 2, UNKNOWN, codes)
    return np.where(column.isna(), NULL, codes).astype("int32")


def _refuse_containers(column):
    """A list, array or time stamp in a table cell is a modality that was not declared."""
    first = next(iter(column.dropna().head(1)), None)
    if isinstance(first, datetime.date | datetime.timedelta | datetime.time | pd.Period):
        raise ValueError(
            f"Column {column.name!r} holds times or dates; Tabular reads numbers, booleans and "
            "categories. Give the time relative to the prediction as a number."
        )
    for cell in column.head(1000):
        if isinstance(cell, list | tuple | dict | set | np.ndarray | pd.DataFrame):
            raise ValueError(
                f"Column {column.name!r} holds {describe(cell)}; Tabular reads numbers, booleans "
                "and categories. Declare it as Events, Visits or Embedding."
            )
