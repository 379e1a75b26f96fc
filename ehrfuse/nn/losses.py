"""Objectives as pure functions; every one has a closed-form test.

Axes: b - batch, k - outputs, d - width.
"""

from typing import Any

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


SAFE_SCALE = 40.0  # exp(scale), and a sum of thousands of it, is still a float32 number
KEPT_BYTES = 3 * 2**24  # of logits that the loss of pairs keeps between its two passes


def clip_loss(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    groups: Tensor | None = None,
    same_group: str = "positive",
    chunk: int = 192,
) -> Tensor:
    """Symmetric cross-entropy of pairs, exact; at most 48 MB of logits are kept for the gradient.

    Parameters
    ----------
    a, b : tensors (n, d)
        Unit vectors; row i of `a` belongs to row i of `b`. Fewer than two rows: zero.
    scale : scalar tensor
        Inverse temperature, may be learned.
    groups : integer tensor (n,) or None
        Rows of one patient carry the same number.
    same_group : {"positive", "ignore"}
        A patient's other rows are right answers too, or are left out; never wrong ones.
    chunk : int
        Rows of the n x n logits held at once.

    References
    ----------
    Radford et al., ICML 2021, figure 3. Several right answers: Khosla et al., NeurIPS 2020, eq. 2.
    """
    if len(a) < 2:
        return (a.sum() + b.sum()) * 0.0
    if groups is not None and len(groups.unique()) == len(groups):
        groups = None
    return _ClipLoss.apply(a, b, scale, groups, same_group, chunk)


class _ClipLoss(torch.autograd.Function):
    """Logits in pieces of `chunk` rows; those that `KEPT_BYTES` cannot hold are computed twice."""

    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        b: Tensor,
        scale: Tensor,
        groups: Tensor | None,
        same_group: str,
        chunk: int,
    ) -> Tensor:
        n, top = len(a), scale.detach()
        # Unit vectors: no logit exceeds the scale.
        ctx.once = bool(top <= SAFE_SCALE) and a.dtype != torch.float16
        row, col = a.new_empty(n), a.new_full((n,), 0.0 if ctx.once else -torch.inf)
        right, ctx.kept = a.new_empty(n), {}
        n_kept = KEPT_BYTES // (n * a.element_size()) if any(ctx.needs_input_grad) else 0
        for start in range(0, n, chunk):
            part = slice(start, start + chunk)
            logits = _logits(a, b, top, groups, same_group, part)
            mine = _target(a, groups, same_group, part)
            right[part] = (a[part] * b[part]).sum(1) * top if mine is None else (
                (logits.masked_fill(mine == 0, 0.0) * mine).sum(1)
            )  # fmt: skip
            if ctx.once:  # one exponential serves rows and columns
                logits.exp_()
                row[part] = logits.sum(1)
                col += logits.sum(0)
            else:
                row[part] = logits.logsumexp(1)
                col = torch.logaddexp(col, logits.logsumexp(0))
            if start + chunk <= n_kept:
                ctx.kept[start] = logits
        if ctx.once:
            row, col = row.log_(), col.log_()
        ctx.save_for_backward(a, b, top, row, col, groups)
        ctx.same_group, ctx.chunk = same_group, chunk
        return (row + col - 2 * right).mean() / 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        a, b, top, row, col, groups = ctx.saved_tensors
        n = len(a)
        grad_a, grad_b = torch.empty_like(a), torch.zeros_like(b)
        grad_scale = torch.zeros_like(top)
        weight = grads[0] / (2 * n)
        for start in range(0, n, ctx.chunk):
            part = slice(start, start + ctx.chunk)
            logits = ctx.kept.pop(start, None)  # a second pass through the graph computes it anew
            if logits is None:
                logits = _logits(a, b, top, groups, ctx.same_group, part)
                if ctx.once:
                    logits.exp_()
            mine = _target(a, groups, ctx.same_group, part)
            if ctx.once:
                p = logits.mul_(torch.exp(-row[part])[:, None] + torch.exp(-col))
            else:
                p = (logits - row[part, None]).exp_() + (logits - col).exp_()
            if mine is None:
                p.diagonal(start).sub_(2.0)
            else:
                p.sub_(mine, alpha=2.0)
            turned = p @ b
            grad_scale += (turned * a[part]).sum()
            grad_a[part] = turned
            grad_b.addmm_(p.t(), a[part])
        return (
            grad_a.mul_(weight * top),
            grad_b.mul_(weight * top),
            grad_scale * weight,
            *[None] * 3,
        )


def _logits(
    a: Tensor, b: Tensor, scale: Tensor, groups: Tensor | None, same_group: str, part: slice
) -> Tensor:
    """Some rows of the logits; -inf where a patient's other rows are left out."""
    logits = (a[part] * scale) @ b.t()
    if groups is None or same_group == "positive":
        return logits
    left_out = groups[part, None] == groups
    left_out.diagonal(part.start).fill_(False)
    return logits.masked_fill_(left_out, -torch.inf)


def _target(a: Tensor, groups: Tensor | None, same_group: str, part: slice) -> Tensor | None:
    """Some rows of the right answers' weights; None stands for the unit matrix."""
    if groups is None or same_group == "ignore":
        return None
    same = groups[part, None] == groups
    return same.to(a.dtype) / same.sum(1, keepdim=True)


def siglip_loss(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    bias: Tensor,
    groups: Tensor | None = None,
    same_group: str = "positive",
) -> Tensor:
    """Cross-entropy of every pair of rows by itself, whether the two belong together.

    Parameters are those of `clip_loss`, beside `bias`, a scalar that starts far below zero.

    References
    ----------
    Zhai et al., ICCV 2023, algorithm 1.
    """
    if len(a) < 2:
        return (a.sum() + b.sum()) * 0.0
    logits = scale * a @ b.t() + bias
    own = torch.eye(len(a), dtype=torch.bool, device=a.device)
    same = own if groups is None else groups[:, None] == groups
    yes = same if same_group == "positive" else own
    term = F.softplus(torch.where(yes, -logits, logits))
    return torch.where(same & ~yes, torch.zeros_like(term), term).sum() / len(a)


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
