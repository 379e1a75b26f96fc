"""Numbers with holes as features: smooth clipping, piecewise-linear bins, missing flags.

Axes: b - batch, p - columns, q - bins, f - features, d - d_model.
"""

import torch
from torch import Tensor, nn

FEATURES_AT_ONCE = 1024  # of a wide table, so that no temporary array is as large as the batch


def smooth_clip(x: Tensor, limit: float = 3.0) -> Tensor:
    """Squeeze x into (-limit, limit), close to x near zero: x / sqrt(1 + (x / limit)^2)."""
    x = x.clamp(-1e6, 1e6)  # beyond, the square overflows
    return x / torch.sqrt(1 + (x / limit) ** 2)


class NumericFeatures(nn.Module):
    """Numbers to features: clipped value, how far it reaches into each bin, missing flags.

    Holds what `fit` measured; nothing is trained. A missing number has zero value and bins.

    Parameters
    ----------
    edges : tensor (p, q + 1)
        Bin edges of every column in scaled units, rising. Between equal edges there is no bin.
    flags : integer tensor
        Columns whose missing flag is a feature; of columns missing together one is enough.

    Attributes
    ----------
    column : integer tensor (f,)
        The column that every feature comes from.
    center : tensor (f,)
        Training means, subtracted; see `learn_center`.

    Notes
    -----
    Shape: (b, p) with NaN -> (b, f). Smooth clipping is that of RealMLP (Holzmüller et al., NeurIPS
    2024), the bins are the piecewise-linear encoding of Gorishniy et al. (NeurIPS 2022).
    """

    low: Tensor
    width: Tensor
    bin_column: Tensor
    flags: Tensor
    column: Tensor
    center: Tensor

    def __init__(self, edges: Tensor, flags: Tensor) -> None:
        super().__init__()
        width = edges.diff(dim=1)
        real = width > 0
        self.register_buffer("bin_column", real.nonzero()[:, 0])
        self.register_buffer("low", edges[:, :-1][real])
        self.register_buffer("width", width[real])
        self.register_buffer("flags", flags)
        self.register_buffer(
            "column", torch.cat([torch.arange(len(edges)), self.bin_column, flags])
        )
        self.register_buffer("center", torch.zeros(len(self.column)))

    @torch.no_grad()
    def learn_center(self, table: Tensor, max_rows: int = 4096) -> None:
        """Set `center` to the mean features of training rows (n, p), at most `max_rows` of them."""
        self.center.zero_()
        table = table[:: max(1, len(table) // max_rows)]
        rows_at_once = max(1, 2**18 // max(1, len(self.center)))
        total = torch.stack([self(part).sum(0) for part in table.split(rows_at_once)]).sum(0)
        self.center.copy_(total / max(1, len(table)))

    def forward(self, x: Tensor) -> Tensor:
        # As numbers: on the CPU, torch is many times slower with bools.
        seen = torch.eq(x, x, out=torch.empty_like(x))  # NaN is not itself
        x = x.nan_to_num(0.0)
        # Written into one array, bins in strips: on thousands of columns every copy counts.
        features = x.new_empty(len(x), len(self.column))
        start, stop = x.shape[1], x.shape[1] + len(self.bin_column)
        features[:, :start] = smooth_clip(x)
        for i in range(0, len(self.bin_column), FEATURES_AT_ONCE):
            part = slice(i, i + FEATURES_AT_ONCE)
            column = self.bin_column[part]
            share = x[:, column].sub_(self.low[part]).div_(self.width[part]).clamp_(0, 1)
            features[:, start + i : start + i + len(column)] = share.mul_(seen[:, column])
        torch.sub(1, seen[:, self.flags], out=features[:, stop:])
        return features.sub_(self.center)
