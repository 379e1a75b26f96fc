"""Ensembles trained side by side: the members of a core are one batched matrix product.

Small networks of one's own for every member, as in packed ensembles (Laurent et al., ICLR 2023);
what is too large to repeat (text, image and stream encoders) is shared and only scaled per member,
as in BatchEnsemble (Wen et al., ICLR 2020) and TabM (Gorishniy et al., ICLR 2025).

Axes: b - batch, e - members, i - inputs, o - outputs.
"""

import math

import torch
from torch import Tensor, nn


class MemberScale(nn.Module):
    """Repeat every row once per member, each with a sign of its own.

    Shape: (b, ..., d) -> (b * e, ..., d); row i of member j becomes row i * e + j.
    """

    def __init__(self, n_members: int, width: int) -> None:
        super().__init__()
        self.n_members = n_members
        self.scale = nn.Parameter(torch.randint(0, 2, (n_members, width)) * 2.0 - 1.0)

    def forward(self, x: Tensor) -> Tensor:
        x = x.repeat_interleave(self.n_members, 0)
        scale = self.scale.repeat(len(x) // self.n_members, 1)
        return x * scale.view(len(x), *[1] * (x.dim() - 2), -1)


class MemberLinear(nn.Module):
    """One linear layer per member, all at once.

    Shape: (b * e, i) -> (b * e, o), member by member. `bias` (o,) is where all start.
    """

    def __init__(
        self, n_members: int, n_inputs: int, n_outputs: int, bias: Tensor | None = None
    ) -> None:
        super().__init__()
        self.n_members = n_members
        bound = 1 / math.sqrt(n_inputs)
        self.weight = nn.Parameter(
            torch.empty(n_members, n_inputs, n_outputs).uniform_(-bound, bound)
        )
        start = torch.zeros(n_outputs) if bias is None else bias
        self.bias = nn.Parameter(start.repeat(n_members, 1))

    def forward(self, x: Tensor) -> Tensor:
        split = x.view(-1, self.n_members, x.shape[-1]).transpose(0, 1)
        out = torch.baddbmm(self.bias[:, None], split, self.weight)
        return out.transpose(0, 1).flatten(0, 1)
