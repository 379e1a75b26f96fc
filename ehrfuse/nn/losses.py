"""Objectives as pure functions; every one has a closed-form test.

Axes: b - batch, k - outputs, d - width.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def weighted_mean(term: Tensor, weight: Tensor) -> Tensor:
    """Mean of `term` under `weight` of the same shape; zero, not 0 / 0, where nothing weighs."""
    weight = weight.to(term.dtype)
    total = weight.sum()
    return torch.where(weight > 0, term * weight, torch.zeros_like(term)).sum() / torch.where(
        total > 0, total, torch.ones_like(total)
    )


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


def gaussian_nll(mean: Tensor, log_variance: Tensor, y: Tensor) -> Tensor:
    """Mean negative log-likelihood of rows of y (b, d) under N(mean, exp(log_variance)).

    Without the constant d / 2 log(2 pi).
    """
    return 0.5 * ((y - mean).square() * torch.exp(-log_variance) + log_variance).sum(-1).mean()


def vclub(mean: Tensor, log_variance: Tensor, y: Tensor) -> Tensor:
    """Upper bound of the mutual information of x and y, from q(y | x) = N(mean, exp(log_variance)).

    The mean of log q(y_i | x_i) over rows less its mean over all pairs (i, j), in closed form: of a
    normal density, the mean over j of (y_j - m_i)^2 is var(y) + (mean(y) - m_i)^2, so that nothing
    of size b^2 is built. Shape: all (b, d) -> scalar.

    References
    ----------
    Cheng et al.: CLUB: a contrastive log-ratio upper bound of mutual information. ICML 2020,
    section 3.2 (vCLUB).
    """
    center = y.mean(0)
    pairs = y.var(0, correction=0) + (center - mean).square()
    return 0.5 * ((pairs - (y - mean).square()) * torch.exp(-log_variance)).sum(-1).mean()
