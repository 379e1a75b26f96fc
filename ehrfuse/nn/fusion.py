"""Masked reductions and the parts that fuse modality vectors.

Axes: b - batch, t - tokens, m - modalities, d - d_model.
"""

import torch
from torch import Tensor, nn


def blank(x: Tensor, keep: Tensor) -> Tensor:
    """Zero the rows of x (b, ...) not kept (b,). By torch.where, because NaN * 0 is NaN."""
    return torch.where(keep.view(-1, *[1] * (x.dim() - 1)), x, torch.zeros_like(x))


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over axis 1 of x (b, t, d) where mask (b, t); zero where nothing is left."""
    total = torch.where(mask[..., None], x, torch.zeros_like(x)).sum(1)
    return total / mask.sum(1, keepdim=True).clamp(min=1)


class AttentionPool(nn.Module):
    """Weighted mean of tokens under one learned query.

    Shape: (b, t, d), mask (b, t) -> (b, d); zero where the mask is empty.
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.score = nn.Linear(d_model, 1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        score = self.score(x).squeeze(-1).masked_fill(~mask, -torch.inf)
        # An empty row would be softmax of -inf only: NaN. Its weights are set to zero instead.
        empty = ~mask.any(1, keepdim=True)
        weight = score.masked_fill(empty, 0.0).softmax(1).masked_fill(empty, 0.0)
        return torch.einsum("bt,btd->bd", weight, blank_tokens(x, mask))


def blank_tokens(x: Tensor, mask: Tensor) -> Tensor:
    """Zero the tokens of x (b, t, d) outside mask (b, t)."""
    return torch.where(mask[..., None], x, torch.zeros_like(x))


class Absence(nn.Module):
    """A learned vector for every modality that a row lacks.

    Shape: pooled (b, m, d), present (b, m) -> (b, m, d).
    """

    def __init__(self, n_modalities: int, d_model: int) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.randn(n_modalities, d_model) * 0.02)

    def forward(self, pooled: Tensor, present: Tensor) -> Tensor:
        return torch.where(present[..., None], pooled, self.vector.expand_as(pooled))
