"""TabNet (Arik and Pfister, AAAI 2021), equal to pytorch-tabnet 4.1 and faster.

Activations lie features first, (c, b): ghost batch norm is then a layer norm over stretches of the
last axis, without a copy or a loop. One attention step (sparsemax, masked input, next prior,
entropy) is one autograd node, and on the CPU its sort is NumPy's, which is many times faster.

Axes: b - batch, v - rows of a virtual batch, f - features, g - groups of features (columns),
d - n_d, c - any width, k - outputs.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROOT_HALF = 0.7071067690849304  # sqrt(1/2) in float32, as the library has it in every precision


class Sizes(NamedTuple):
    """What shapes a TabNet, by the names and defaults of pytorch-tabnet."""

    n_d: int = 8
    n_a: int = 8
    n_steps: int = 3
    gamma: float = 1.3
    n_independent: int = 2
    n_shared: int = 2
    virtual_batch_size: int = 128
    momentum: float = 0.02
    mask_type: str = "sparsemax"
    epsilon: float = 1e-15


# ---------------------------------------------------------------- masks


def sparsemax(z: Tensor) -> Tensor:
    """Euclidean projection of every column of z (g, b) onto the simplex.

    References
    ----------
    Martins and Astudillo, ICML 2016, algorithm 1.
    """
    return _Mask.apply(z, "sparsemax")


def entmax15(z: Tensor) -> Tensor:
    """1.5-entmax of every column of z (g, b), exact.

    References
    ----------
    Peters, Niculae, Martins, ACL 2019, algorithm 2.
    """
    return _Mask.apply(z, "entmax")


class _Mask(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, kind: str) -> Tensor:
        mask = _project(z, kind)
        ctx.save_for_backward(_slope(mask, kind))
        return mask

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _pull_back(grads[0].clone(), *ctx.saved_tensors), None


def _project(z: Tensor, kind: str) -> Tensor:
    z = z - z.amax(0)
    if kind == "entmax":
        z /= 2
        return (z - _threshold(z, _entmax_threshold)).clamp_(min=0).square_()
    return z.sub_(_threshold(z, _sparsemax_threshold)).clamp_(min=0)


def _slope(mask: Tensor, kind: str) -> Tensor:
    return mask.sqrt() if kind == "entmax" else mask.sign()


def _pull_back(grad: Tensor, slope: Tensor) -> Tensor:
    """Jacobian of both projections, symmetric: diag(s) - s s' / sum(s); writes into `grad`."""
    grad *= slope
    return grad.addcmul_(slope, grad.sum(0) / slope.sum(0), value=-1)


def _threshold(z: Tensor, rule: Any, k: int = 32) -> Tensor:
    """Threshold of every column (b,), from its k largest entries, or more where k are too few."""
    n = len(z)
    if z.device.type == "cpu":
        exact = z if z.dtype in (torch.float32, torch.float64) else z.float()
        rows = np.sort(exact.t().contiguous().numpy(), axis=1)
    while True:
        k = min(k, n)
        if z.device.type == "cpu":
            top = torch.from_numpy(rows[:, -k:][:, ::-1].copy()).to(z.dtype)
        else:
            top = torch.topk(z.t(), k, dim=1).values
        tau, support = rule(top)
        # Whether more are needed is not asked on a GPU: that would be a wait for it at every step.
        if k == n or (z.device.type == "cpu" and int(support.max()) < k):
            return tau
        k = 2 * k if z.device.type == "cpu" else n


def _sparsemax_threshold(top: Tensor) -> tuple[Tensor, Tensor]:
    rank = torch.arange(1, top.shape[1] + 1, dtype=top.dtype, device=top.device)
    excess = top.cumsum(1).sub_(1)
    support = (rank * top > excess).sum(1, keepdim=True)
    return (excess.gather(1, support - 1) / support).squeeze(1), support


def _entmax_threshold(top: Tensor) -> tuple[Tensor, Tensor]:
    rank = torch.arange(1, top.shape[1] + 1, dtype=top.dtype, device=top.device)
    mean = top.cumsum(1) / rank
    spread = rank * ((top**2).cumsum(1) / rank - mean**2)
    tau = mean - ((1 - spread) / rank).clamp(min=0).sqrt()
    support = (tau <= top).sum(1, keepdim=True)
    return tau.gather(1, support - 1).squeeze(1), support


class _Attend(torch.autograd.Function):
    """One attention step: scores, prior and input to masked input, next prior and entropy.

    As one node, so that what is as wide as the input is neither kept twice nor read again. The
    entropy is zero, and costs nothing, where it is not asked for.
    """

    @staticmethod
    def forward(
        ctx: Any,
        score: Tensor,
        prior: Tensor | None,
        x: Tensor,
        groups: "Groups | None",
        sizes: Sizes,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        mask = _project(score if prior is None else score * prior, sizes.mask_type)
        left = torch.sub(sizes.gamma, mask)
        log, entropy = None, mask.new_zeros(())
        if with_entropy:
            log = torch.log(mask + sizes.epsilon)
            entropy = torch.dot(mask.flatten(), log.flatten()) / mask.shape[1]
        ctx.save_for_backward(score, prior, x, mask, left, log)
        ctx.groups, ctx.sizes = groups, sizes
        ctx.set_materialize_grads(False)
        masked = mask * x if groups is None else groups.widen(mask, x)
        return masked, left if prior is None else left * prior, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        masked, after, entropy = grads
        score, prior, x, mask, left, log = ctx.saved_tensors
        if masked is None:
            masked = torch.zeros_like(x)
        if ctx.groups is None:
            grad, grad_x = masked * x, masked * mask
        else:
            grad, grad_x = ctx.groups.narrow(masked, x), ctx.groups.widen(mask, masked)
        if after is not None:
            grad = grad.sub_(after) if prior is None else grad.addcmul_(after, prior, value=-1)
        if entropy is not None and log is not None:
            # On the support the derivative of m log m is log m + 1; elsewhere the mask is flat.
            grad.add_((log + 1).mul_(entropy / mask.shape[1]))
        grad = _pull_back(grad, _slope(mask, ctx.sizes.mask_type))
        if prior is None:
            return grad, None, grad_x, None, None, None
        grad_prior = grad * score if after is None else (left * after).addcmul_(grad, score)
        return grad * prior, grad_prior, grad_x, None, None, None


class Groups(nn.Module):
    """Features that are attended to together.

    Parameters
    ----------
    group : integer tensor (f,)
        Group of every feature.
    share : tensor (f,) or None
        Share of its group's weight; None: the same for all.
    """

    group: Tensor
    share: Tensor

    def __init__(self, group: Tensor, share: Tensor | None = None) -> None:
        super().__init__()
        share = 1.0 / group.bincount()[group] if share is None else share
        self.n_groups = int(group.max()) + 1
        # Numbers, then a flag for each: the groups come in order again and again, and a view does.
        times, rest = divmod(len(group), self.n_groups)
        in_turn = not rest and torch.equal(group, torch.arange(self.n_groups).repeat(times))
        self.times, self.whole = times if in_turn else 0, bool((share == 1).all())
        self.register_buffer("group", group, persistent=False)
        self.register_buffer("share", share, persistent=False)

    def widen(self, mask: Tensor, x: Tensor) -> Tensor:
        """Weights of groups (g, b), handed to their features, times x (f, b)."""
        if self.times:
            wide = (x.view(self.times, *mask.shape) * mask).view_as(x)
        else:
            wide = mask.index_select(0, self.group).mul_(x)
        return wide if self.whole else wide.mul_(self.share.to(mask.dtype)[:, None])

    def copy(self, rows: Tensor) -> Tensor:
        """What is given for groups (b, g), repeated for their features (b, f)."""
        return rows.repeat(1, self.times) if self.times else rows.index_select(1, self.group)

    def narrow(self, grad: Tensor, x: Tensor) -> Tensor:
        """The transpose of `widen` for its first argument: grad (f, b) to (g, b)."""
        if self.times and self.whole:
            shape = (self.times, self.n_groups, grad.shape[1])
            grads, parts = grad.view(shape), x.view(shape)
            total = grads[0] * parts[0]
            for i in range(1, self.times):
                total.addcmul_(grads[i], parts[i])
            return total
        cells = grad * x
        if not self.whole:
            cells.mul_(self.share.to(grad.dtype)[:, None])
        total = grad.new_zeros(self.n_groups, grad.shape[1])
        return total.index_add_(0, self.group, cells)


# ---------------------------------------------------------------- layers


class GhostNorm(nn.Module):
    """Batch norm over virtual batches; statistics move once for every virtual batch.

    Shape: (c, b) -> (c, b). A virtual batch of one row joins its neighbour.

    Parameters
    ----------
    size : int
    virtual_batch_size : int or None
        None: the whole batch is one.
    momentum : float

    References
    ----------
    Hoffer, Hubara, Soudry, NeurIPS 2017.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    eps = 1e-5

    def __init__(self, size: int, virtual_batch_size: int | None, momentum: float) -> None:
        super().__init__()
        self.virtual_batch_size, self.momentum = virtual_batch_size, momentum
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.register_buffer("running_mean", torch.zeros(size))
        self.register_buffer("running_var", torch.ones(size))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            scale = self.weight * torch.rsqrt(self.running_var + self.eps)
            return torch.addcmul(
                (self.bias - self.running_mean * scale)[:, None], x, scale[:, None]
            )
        n_rows = x.shape[1]
        n_parts = 1 if self.virtual_batch_size is None else -(-n_rows // self.virtual_batch_size)
        if n_rows % n_parts == 0:
            return self._normalise(x, n_parts)
        sizes = _chunks(n_rows, n_parts)
        return torch.cat([self._normalise(part, 1) for part in x.split(sizes, 1)], 1)

    def _normalise(self, x: Tensor, n_parts: int) -> Tensor:
        v = x.shape[1] // n_parts
        parts = x.reshape(len(x), n_parts, v)
        out, mean, rstd = torch.native_layer_norm(parts, (v,), None, None, self.eps)
        with torch.no_grad():
            self._track(mean.squeeze(2), rstd.squeeze(2), v)
        return torch.addcmul(self.bias[:, None], out.view_as(x), self.weight[:, None])

    def _track(self, mean: Tensor, rstd: Tensor, v: int) -> None:
        """Running statistics after one update for every virtual batch in turn."""
        n_parts, dtype = mean.shape[1], self.running_var.dtype
        keep, scale = (1 - self.momentum) ** n_parts, v / max(1, v - 1)
        weight = _turns(n_parts, self.momentum, dtype, mean.device)
        self.running_mean.addmv_(mean.to(dtype), weight, beta=keep)
        self.running_var.addmv_(rstd.to(dtype).pow(-2), weight, beta=keep, alpha=scale)
        self.running_var.sub_(scale * self.eps * (1 - keep))
        self.num_batches_tracked += n_parts


@lru_cache(maxsize=64)
def _turns(n: int, momentum: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What each of n updates in turn still weighs after the last."""
    turns = [momentum * (1 - momentum) ** i for i in reversed(range(n))]
    return torch.tensor(turns, dtype=dtype, device=device)


def _chunks(n_rows: int, n_parts: int) -> list[int]:
    """Sizes as `torch.chunk` cuts them, except that a last one of a single row joins the others."""
    size = -(-n_rows // n_parts)
    sizes = [size] * (n_rows // size) + [n_rows % size] * (n_rows % size > 0)
    if len(sizes) > 1 and sizes[-1] == 1:
        sizes[-2:] = [sizes[-2] + 1]
    return sizes


def _linear(n_in: int, n_out: int, gain: float) -> nn.Linear:
    layer = nn.Linear(n_in, n_out, bias=False)
    nn.init.xavier_normal_(layer.weight, gain=gain)
    return layer


def glu_linear(n_in: int, n_out: int) -> nn.Linear:
    """Linear layer before a gated unit, started as the library does."""
    return _linear(n_in, n_out, math.sqrt((n_in + n_out) / math.sqrt(n_in)))


def plain_linear(n_in: int, n_out: int) -> nn.Linear:
    """Linear layer elsewhere, started as the library does."""
    return _linear(n_in, n_out, math.sqrt((n_in + n_out) / math.sqrt(4 * n_in)))


class FeatureTransformer(nn.Module):
    """Gated layers with a residual: first the shared linear maps, then this one's own.

    Shape: (n_in, b) -> (width, b). Every layer has a norm of its own; the shared maps are passed
    to `forward` by the owner, so that freezing this part leaves them free.
    """

    def __init__(self, n_in: int, width: int, n_shared: int, n_independent: int, s: Sizes) -> None:
        super().__init__()
        own = [n_in if n_shared == i == 0 else width for i in range(n_independent)]
        self.independent = nn.ModuleList(glu_linear(size, 2 * width) for size in own)
        self.norms = nn.ModuleList(
            GhostNorm(2 * width, s.virtual_batch_size, s.momentum)
            for _ in range(n_shared + n_independent)
        )

    def forward(self, x: Tensor, shared: nn.ModuleList) -> Tensor:
        for i, (linear, norm) in enumerate(
            zip([*shared, *self.independent], self.norms, strict=True)
        ):
            out = F.glu(norm(linear.weight @ x), 0)
            x = out if i == 0 else (x + out) * ROOT_HALF
        return x


class AttentiveStep(nn.Module):
    """What one decision step owns: the scores of its attention and its feature transformer."""

    def __init__(self, n_features: int, n_groups: int, s: Sizes) -> None:
        super().__init__()
        self.score = plain_linear(s.n_a, n_groups)
        self.norm = GhostNorm(n_groups, s.virtual_batch_size, s.momentum)
        self.transformer = FeatureTransformer(
            n_features, s.n_d + s.n_a, s.n_shared, s.n_independent, s
        )


class TabNetEncoder(nn.Module):
    """The decision steps over a matrix of features.

    Parameters
    ----------
    n_features : int
    group : integer tensor (f,) or None
        Features attended to together; None: each by itself.
    sizes : Sizes
    share : tensor (f,) or None
        Share of every feature in its group's weight; None: the same for all.
    """

    def __init__(
        self, n_features: int, group: Tensor | None, sizes: Sizes, share: Tensor | None = None
    ) -> None:
        super().__init__()
        s = self.sizes = sizes
        if s.n_steps < 1 or s.n_shared + s.n_independent < 1:
            raise ValueError(
                f"n_steps={s.n_steps}, n_shared={s.n_shared}, n_independent={s.n_independent}: "
                "TabNet needs a step, and a shared or independent layer."
            )
        alone = group is None or torch.equal(group, torch.arange(n_features))
        self.groups = None if alone or group is None else Groups(group, share)
        n_groups = n_features if alone or group is None else int(group.max()) + 1
        self.n_groups, width = n_groups, s.n_d + s.n_a
        self.norm = GhostNorm(n_features, None, 0.01)
        self.shared = nn.ModuleList(
            glu_linear(width if i else n_features, 2 * width) for i in range(s.n_shared)
        )
        self.splitter = FeatureTransformer(n_features, width, s.n_shared, s.n_independent, s)
        self.steps = nn.ModuleList(AttentiveStep(n_features, n_groups, s) for _ in range(s.n_steps))

    def forward(
        self, x: Tensor, prior: Tensor | None = None, with_entropy: bool = True
    ) -> tuple[list[Tensor], Tensor]:
        """Outputs of the steps (b, d) and the mean of sum m log m over rows and steps.

        Parameters
        ----------
        x : tensor (b, f)
        prior : tensor (b, g) or None
            How far each group may be attended to; None is one everywhere.
        with_entropy : bool, default=True
            False: zero in the place of the second.
        """
        s, x = self.sizes, self.norm(x.t().contiguous())
        prior = None if prior is None else prior.t().contiguous()
        attention = self.splitter(x, self.shared)[s.n_d :]
        outputs, entropies = [], []
        for step in cast("list[AttentiveStep]", self.steps):
            score = step.norm(step.score.weight @ attention)
            masked, prior, entropy = _Attend.apply(score, prior, x, self.groups, s, with_entropy)
            out = step.transformer(masked, self.shared)
            outputs.append(F.relu(out[: s.n_d]).t())
            attention = out[s.n_d :]
            entropies.append(entropy)
        return outputs, torch.stack(entropies).mean()

    @torch.no_grad()
    def masks(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Importance of every group for every row (b, g), and the masks of the steps (n, b, g)."""
        s, x = self.sizes, self.norm(x.t().contiguous())
        attention, prior = self.splitter(x, self.shared)[s.n_d :], None
        total, masks = x.new_zeros(self.n_groups, x.shape[1]), []
        for step in cast("list[AttentiveStep]", self.steps):
            score = step.norm(step.score.weight @ attention)
            mask = _project(score if prior is None else score * prior, s.mask_type)
            prior = (s.gamma - mask) * (1 if prior is None else prior)
            masked = mask * x if self.groups is None else self.groups.widen(mask, x)
            out = step.transformer(masked, self.shared)
            total += mask * F.relu(out[: s.n_d]).sum(0)
            attention = out[s.n_d :]
            masks.append(mask.t())
        return total.t(), torch.stack(masks)


class TabNetDecoder(nn.Module):
    """Outputs of the steps (b, d) back to features (b, f)."""

    def __init__(
        self, n_features: int, sizes: Sizes, n_shared: int = 1, n_independent: int = 1
    ) -> None:
        super().__init__()
        n_d = sizes.n_d
        self.shared = nn.ModuleList(glu_linear(n_d, 2 * n_d) for _ in range(n_shared))
        self.steps = nn.ModuleList(
            FeatureTransformer(n_d, n_d, n_shared, n_independent, sizes)
            for _ in range(sizes.n_steps)
        )
        self.out = plain_linear(n_d, n_features)

    def forward(self, outputs: Sequence[Tensor]) -> Tensor:
        parts = [step(x.t(), self.shared) for step, x in zip(self.steps, outputs, strict=True)]
        return (self.out.weight @ torch.stack(parts).sum(0)).t()


def reconstruction_loss(
    guess: Tensor, truth: Tensor, hidden: Tensor, known: Tensor | None = None
) -> Tensor:
    """Squared error on hidden cells in units of the feature's variance, mean over hidden cells.

    Parameters
    ----------
    guess, truth : tensors (b, f)
    hidden : bool or float tensor (b, f)
        Cells that were hidden, and of which the truth is known.
    known : bool tensor (b, f) or None
        Cells that the variance is taken from; None is all.

    References
    ----------
    Arik and Pfister, AAAI 2021, "Tabular self-supervised learning". That the mean is taken row by
    row, and that a feature constant in the batch has its mean (or 1) as unit, is pytorch-tabnet's.
    """
    hidden = hidden.to(truth.dtype)
    weight = torch.ones_like(truth) if known is None else known.to(truth.dtype)
    count = weight.sum(0)
    mean = (truth * weight).sum(0) / count.clamp(min=1)
    spread = ((truth - mean).square() * weight).sum(0) / (count - 1).clamp(min=1)
    # NOTE[DIFF] The library takes the mean with its sign, which turns an error into a gain.
    # A constant column has a spread of rounding errors, which is no unit either.
    unit = torch.where(spread <= 1e-10 * mean.square(), mean.abs(), spread)
    unit = torch.where(unit == 0, torch.ones_like(unit), unit)
    share = hidden / (hidden.sum(1, keepdim=True) + 1e-9) / unit
    return ((guess - truth).square() * share).sum() / len(truth)
