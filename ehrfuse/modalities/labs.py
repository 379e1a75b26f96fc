"""Labs: one column per analyte, one value at most per row."""

from ehrfuse._data import Block
from ehrfuse.modalities._base import Modality, check_count
from ehrfuse.modalities._numbers import (
    RobustScale,
    build_features,
    numeric_features,
    read_numbers,
    read_origin,
)
from ehrfuse.nn.encoders import LabsEncoder

__all__ = ["Labs"]


class Labs(Modality):
    """Laboratory values, one column per analyte; each measured one becomes a token.

    Parameters
    ----------
    columns : list of str or callable
        Numeric columns, one unit each.
    n_bins : int, default=8
        Bins of the piecewise-linear encoding.

    Attributes
    ----------
    scale_ : RobustScale
        Median and robust spread of every analyte.
    """

    def __init__(self, columns, *, n_bins=8):
        super().__init__(columns)
        self.n_bins = n_bins

    def _check_params(self):
        check_count(self.n_bins, "n_bins")

    def _learn(self, cells):
        self.origin_ = read_origin(cells, self.columns_)
        table = read_numbers(cells, self.columns_, self.origin_)
        self.scale_ = RobustScale.learn(table)
        self.features_ = numeric_features(
            self.scale_.apply(table, out=table), self.n_bins, cells.notna().any(axis=1).to_numpy()
        )

    def _read(self, cells, present):
        table = read_numbers(cells, self.columns_, self.origin_)
        return Block(present, {"values": self.scale_.apply(table, out=table)})

    def make_encoder(self, d_model, n_members=1):
        return LabsEncoder(build_features(self.features_), len(self.columns_), d_model)
