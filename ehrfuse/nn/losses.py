"""Objectives as pure functions; every one has a closed-form test.

Axes: b - batch, k - outputs, d - width.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def weighted_loss(term: Tensor, weight: Tensor) -> Tensor:
    """Sum of `term` x `weight` over the number of cells that weigh anything; zero where none does.

    Not over the sum of the weights: that would make a batch of heavy rows count as much as a batch
    of light ones, and at one row a batch weights would do nothing. Weights of mean one over the
    training rows keep the size of the loss.
    """
    counts = weight > 0
    total = torch.where(counts, term * weight.to(term.dtype), torch.zeros_like(term)).sum()
    return total / counts.sum().clamp(min=1)


def masked_mse(guess: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error over the cells where `mask`; zero where it is empty."""
    error = torch.where(mask, guess - truth, torch.zeros_like(truth))
    return error.square().sum() / mask.sum().clamp(min=1)


def info_nce(a: Tensor, b: Tensor, temperature: float = 0.1) -> Tensor:
    """Symmetric InfoNCE: row i of `a` belongs to row i of `b`, all other rows are negatives.

    Parameters
    ----------
    a, b : tensors (..., n, d)
        Normalised here. Leading axes are independent problems, averaged. Fewer than two rows have
        no negative: zero.
    temperature : float, default=0.1

    References
    ----------
    van den Oord et al., arXiv:1807.03748, eq. 4, in both directions.
    """
    if a.shape[-2] < 2:
        return (a.sum() + b.sum()) * 0.0
    score = F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).mT / temperature
    own = score.diagonal(dim1=-2, dim2=-1)
    both = score.logsumexp(-1) + score.logsumexp(-2)
    return (0.5 * both - own).mean()


def focal_bce(logits: Tensor, y: Tensor, gamma: float = 2.0) -> Tensor:
    """Binary cross-entropy times (1 - p of the truth) ** gamma, cell by cell; gamma 0 is plain.

    References
    ----------
    Lin et al., ICCV 2017, eq. 4.
    """
    term = F.binary_cross_entropy_with_logits(logits, y, reduction="none")
    return term * (1 - torch.exp(-term)) ** gamma
