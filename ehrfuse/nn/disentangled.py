"""Disentangled transformer of MEDFuse: what is specific to two branches and what they share.

Axes: b - batch, t - tokens, q - joint tokens, d - d_model, i, o - widths.
"""

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ehrfuse.nn.attention import CrossBlock, TransformerBlock
from ehrfuse.nn.encoders import Tokens
from ehrfuse.nn.fusion import masked_mean
from ehrfuse.nn.losses import gaussian_nll, vclub
from ehrfuse.nn.state import load_optimizer_state, optimizer_state

JOINTS = ("kron", "lowrank", "none")
RANK = 16  # joint tokens of "lowrank"
FLOOR = 0.5  # standard deviation over the batch below which the shared part counts as collapsed


class MutualInformation(nn.Module):
    """Variational net q(y | x), a diagonal normal, fitted by an optimiser of its own.

    Shape: x (b, i), y (b, o); both are normalised first, so that the bound cannot be lowered by
    making them small.
    """

    def __init__(self, n_inputs: int, n_outputs: int, n_hidden: int = 64) -> None:
        super().__init__()
        self.n_inputs, self.n_outputs = n_inputs, n_outputs
        self.mean = nn.Sequential(
            nn.Linear(n_inputs, n_hidden), nn.ReLU(), nn.Linear(n_hidden, n_outputs)
        )
        self.log_variance = nn.Sequential(
            nn.Linear(n_inputs, n_hidden), nn.ReLU(), nn.Linear(n_hidden, n_outputs), nn.Tanh()
        )
        self._optimizer: torch.optim.Optimizer | None = None

    def forward(self, x: Tensor, y: Tensor, bound: bool) -> Tensor:
        """The bound, or how badly q fits."""
        x = nn.functional.layer_norm(x, x.shape[-1:])
        y = nn.functional.layer_norm(y, y.shape[-1:])
        return (vclub if bound else gaussian_nll)(self.mean(x), self.log_variance(x), y)

    def bound(self, x: Tensor, y: Tensor) -> Tensor:
        """Mutual information at most; its gradient reaches x and y, never q."""
        fixed = {name: p.detach() for name, p in self.named_parameters()}
        return functional_call(self, fixed, (x, y, True))

    def learn(self, x: Tensor, y: Tensor, n_steps: int) -> None:
        """Fit q to x and y, whose gradient is not wanted."""
        optimizer = self._own_optimizer()
        for _ in range(n_steps):
            optimizer.zero_grad(set_to_none=True)
            self(x.detach(), y.detach(), False).backward()
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def optimizer_state(self) -> dict[str, Tensor]:
        """State of q's optimiser, for a fit that goes on later; empty before its first step."""
        return {} if self._optimizer is None else optimizer_state(self._optimizer)

    def load_optimizer_state(self, state: dict[str, Tensor]) -> None:
        """Put back what `optimizer_state` gave."""
        if state:
            load_optimizer_state(self._own_optimizer(), state)

    def _own_optimizer(self) -> torch.optim.Optimizer:
        if self._optimizer is None:
            self._optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.0)
        return self._optimizer


class Disentangled(nn.Module):
    """Tokens of notes and of labs to what is specific to each and what they share.

    Shape: two times tokens (b, t, d) and mask (b, t) -> dict of vectors (b, d).

    NOTE[DIFF] The summary of the paper leaves open whether the shared part reads the sum of both
    branches or both side by side; here the tokens of both, so that neither must have the other's
    length.
    NOTE[DIFF] A branch that a row lacks is one learned token; the paper needs both.
    """

    def __init__(self, d_model: int, n_heads: int, n_layers: int, joint: str) -> None:
        super().__init__()
        self.joint, self.d_model = joint, d_model
        self.null = nn.Parameter(torch.randn(2, d_model) * 0.02)
        self.n_layers = n_layers
        self.own = nn.ModuleList(
            TransformerBlock(d_model, n_heads, 2 * d_model) for _ in range(2 * n_layers)
        )
        self.specific = nn.ModuleList(nn.Linear(d_model, d_model) for _ in range(2))
        if joint != "none":
            width = d_model if joint == "kron" else RANK * d_model
            self.project = nn.ModuleList(
                nn.Sequential(nn.LayerNorm(d_model), nn.Linear(d_model, width)) for _ in range(2)
            )
            self.shared = CrossBlock(d_model, n_heads, 2 * d_model)
            # Not their mean: of an outer product that would leave one factor's mean.
            n_queries = d_model if joint == "kron" else RANK
            self.read = nn.Linear(n_queries * d_model, d_model)
            self.norm = nn.LayerNorm(d_model)

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the vectors that `forward` gives, in their order."""
        names = ("text", "labs", "own_text", "own_labs")
        return names if self.joint == "none" else (*names, "shared")

    def forward(self, branches: list[Tokens]) -> dict[str, Tensor]:
        """Skip connections, specific parts after self-attention, and the shared part."""
        found, context = {}, []
        for m, (name, (x, mask)) in enumerate(zip(("text", "labs"), branches, strict=True)):
            x, mask = self._fill(x, mask, m)
            found[name] = masked_mean(x, mask)
            for block in self.own[m * self.n_layers : (m + 1) * self.n_layers]:
                x = block(x, mask)
            found[f"own_{name}"] = torch.relu(self.specific[m](masked_mean(x, mask)))
            context.append((x, mask))
        if self.joint != "none":
            found["shared"] = self._share(context)
        return {name: found[name] for name in self.parts}

    def _fill(self, x: Tensor, mask: Tensor, m: int) -> Tokens:
        """Put the learned token where a row has none."""
        lacking = ~mask.any(1, keepdim=True)
        null = self.null[m].to(x.dtype).expand(len(x), 1, -1)
        return torch.cat([x, null], 1), torch.cat([mask, lacking], 1)

    def _share(self, context: list[Tokens]) -> Tensor:
        a, b = (
            project(masked_mean(x, mask))
            for project, (x, mask) in zip(self.project, context, strict=True)
        )
        if self.joint == "kron":
            query = a[:, :, None] * b[:, None, :]
        else:
            query = (a * b).unflatten(1, (RANK, self.d_model))
        tokens = torch.cat([x for x, _ in context], 1)
        mask = torch.cat([mask for _, mask in context], 1)
        return self.norm(self.read(self.shared(query, tokens, mask).flatten(1)))


def collapse(shared: Tensor) -> Tensor:
    """How far the spread of the shared part over the batch is below `FLOOR`, mean over its axes.

    A constant has no mutual information with anything, so the bound alone would welcome it.
    """
    return torch.relu(FLOOR - (shared.var(0, correction=0) + 1e-6).sqrt()).mean() / FLOOR
