"""Tabular: numbers, booleans and categories of one row, any of them missing.

`TabNetTabular` reads the same cells with another encoder.
"""

import datetime

import numpy as np
import pandas as pd

from ehrfuse._data import Block
from ehrfuse._runtime import check_option
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
from ehrfuse.nn.tabnet import Sizes
from ehrfuse.nn.tabnet_tables import TabNetTableEncoder

__all__ = ["TabNetTabular", "Tabular"]

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
    min_count : int, default=2
        A category is kept when at least this many training rows hold it; the others share the code
        of values unseen in fit. It ends up in the fitted estimator, so raise this where cells are
        typed by hand.

    Attributes
    ----------
    numeric_ : list of str
    categories_ : dict of str to Index
        Known values of every categorical column.
    """

    def __init__(self, columns, *, n_bins=8, dropout=0.2, column_dropout=0.5, min_count=2):
        super().__init__(columns)
        self.n_bins = n_bins
        self.dropout = dropout
        self.column_dropout = column_dropout
        self.min_count = min_count

    def _check_params(self):
        check_count(self.n_bins, "n_bins")
        check_count(self.min_count, "min_count")

    def _learn(self, cells):
        self.numeric_ = [c for c in cells if is_number_column(cells[c])]
        words = {c: cells[c].dropna() for c in cells if c not in self.numeric_}
        for column in words.values():
            _refuse_containers(column)
        self.categories_ = {
            c: pd.Index(sorted(_common(found, self.min_count), key=str), dtype=object)
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


class TabNetTabular(Tabular):
    """Numbers, booleans and categories, read by TabNet: the encoder as a part of any estimator.

    `TabNetClassifier` and its family read a plain `Tabular` by TabNet; this is for the others,
    where the width ``n_d`` is their ``d_model``.

    Parameters
    ----------
    columns : str, list of str or callable
        One or many columns, as in `Tabular`.
    n_a : int or None, default=None
        Width of the attention; None is that of the output.
    n_bins : int, default=8
        Bins of the piecewise-linear encoding, as in `Tabular`; 1 is none, as in the paper.
    n_steps : int, default=2
        Decision steps.
    gamma : float, default=2.0
        How freely a later step may attend to a column again; 1 is not at all.
    n_independent, n_shared : int, default=1
        Gated layers of each step's own, and shared by all.
    virtual_batch_size : int, default=128
        Rows that are normalised together.
    momentum : float, default=0.02
        Of the running statistics.
    mask_type : {"sparsemax", "entmax"}, default="entmax"
    cat_emb_dim : int or None, default=None
        Width of a category's vector; None grows with the number of categories, to at most 16.
    min_count : int, default=2
        Training rows that must hold a category, as in `Tabular`.

    Attributes
    ----------
    numeric_ : list of str
    categories_ : dict of str to Index
        Known values of every categorical column.
    """

    def __init__(
        self,
        columns,
        *,
        n_bins=8,
        n_a=None,
        n_steps=2,
        gamma=2.0,
        n_independent=1,
        n_shared=1,
        virtual_batch_size=128,
        momentum=0.02,
        mask_type="entmax",
        cat_emb_dim=None,
        min_count=2,
    ):
        super().__init__(
            columns, n_bins=n_bins, dropout=0.0, column_dropout=0.0, min_count=min_count
        )
        self.n_a = n_a
        self.n_steps = n_steps
        self.gamma = gamma
        self.n_independent = n_independent
        self.n_shared = n_shared
        self.virtual_batch_size = virtual_batch_size
        self.momentum = momentum
        self.mask_type = mask_type
        self.cat_emb_dim = cat_emb_dim

    def _check_params(self):
        super()._check_params()
        check_sizes(self)

    def make_encoder(self, d_model, n_members=1):
        return tabnet_encoder(self, tabnet_sizes(self, d_model), self.cat_emb_dim)


def tabnet_sizes(modality, n_d):
    """The shape of the network of a `TabNetTabular`, with `n_d` as its width."""
    own = {name: getattr(modality, name) for name in Sizes._fields if hasattr(modality, name)}
    return Sizes(**own | {"n_d": n_d, "n_a": modality.n_a or n_d})


def tabnet_encoder(modality, sizes, cat_emb_dim=None):
    """TabNet for the cells of a fitted `Tabular` or `Labs`."""
    n_codes = [len(known) + 2 for known in getattr(modality, "categories_", {}).values()]
    return TabNetTableEncoder(build_features(modality.features_), n_codes, sizes, cat_emb_dim)


def tabnet_columns(modality):
    """Columns of a fitted `Tabular` or `Labs` in the order in which TabNet attends to them."""
    words = list(getattr(modality, "categories_", {}))
    return [c for c in modality.columns_ if c not in words] + words


def check_sizes(params):
    """Raise for sizes out of range; None is allowed, for it is filled in elsewhere."""
    for name in ("n_d", "n_a", "n_steps", "virtual_batch_size", "cat_emb_dim"):
        if getattr(params, name, None) is not None:
            check_count(getattr(params, name), name)
    for name in ("n_independent", "n_shared"):
        if getattr(params, name) is not None:
            check_count(getattr(params, name), name, 0)
    if params.n_independent == params.n_shared == 0:
        raise ValueError("n_independent and n_shared are both 0; TabNet needs a layer.")
    for name, low, high in (("gamma", 1.0, np.inf), ("momentum", 0.0, 1.0)):
        value = getattr(params, name)
        if value is not None and not (low <= value <= high and np.isfinite(value)):
            raise ValueError(f"{name}={value!r} must lie between {low:g} and {high:g}.")
    if params.mask_type is not None:
        check_option(params.mask_type, "mask_type", ("sparsemax", "entmax"))


def _common(column, min_count):
    """Values that enough rows hold; what one patient alone has is not stored."""
    count = column.astype(object).value_counts()
    return count.index[count >= min_count]


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
