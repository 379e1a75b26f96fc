"""Masked tabular transformer: tokens of lab values that were measured, guesses of others.

Axes: b - batch, t - measured values of a row, v - visible ones, q - values asked for, c - codes
(analytes), w - width of the encoder, d - d_model.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ehrfuse.nn.attention import CrossBlock, TransformerBlock, sinusoids
from ehrfuse.nn.encoders import Tokens

N_FREQUENCIES = 8


class LabTransformer(nn.Module):
    """Measured values of a row to tokens, by self-attention among those that were measured.

    Reads ``code`` (b, t), ``value`` (b, t) as normal scores with NaN for none, ``code_mask``
    (b, t) and, with `use_time`, ``time`` (b, t). A token is its analyte's own vector plus its
    value along a direction of the analyte's own; there is no position, so columns have no order.
    Gives (b, 1 + t, d): a summary token first, which is all that a row without values has.

    Parameters
    ----------
    n_codes, d_model : int
    width, n_layers, n_heads : int
        Of the transformer; its tokens are then mapped to `d_model`.
    dropout : float, default=0.0
    use_time : bool, default=False
    n_bins : int, default=8
        Of the piecewise-linear encoding of a value.
    """

    frequencies: Tensor
    low: Tensor
    span: Tensor

    def __init__(
        self,
        n_codes: int,
        d_model: int,
        width: int,
        n_layers: int,
        n_heads: int,
        dropout: float = 0.0,
        use_time: bool = False,
        n_bins: int = 8,
    ) -> None:
        super().__init__()
        self.n_outputs = d_model
        self.what = nn.Embedding(n_codes, width)
        self.level = nn.Embedding(n_codes, width)
        self.summary = nn.Parameter(torch.randn(width) * 0.02)
        self.register_buffer("frequencies", 2.0 ** torch.arange(N_FREQUENCIES) * torch.pi / 2)
        self.when = nn.Linear(2 * N_FREQUENCIES, width) if use_time else None
        # Equal parts of a normal score are equal shares of the values, whatever the analyte.
        edges = torch.special.ndtri(torch.linspace(0, 1, n_bins + 1)).clamp(-3, 3)
        self.register_buffer("low", edges[:-1].clone())
        self.register_buffer("span", edges.diff())
        self.bins = nn.Linear(n_bins, width, bias=False)
        self.mlp = nn.Sequential(nn.GELU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(
            TransformerBlock(width, n_heads, 2 * width, dropout) for _ in range(n_layers)
        )
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, d_model))

    def forward(self, x: dict[str, Tensor]) -> Tokens:
        value = x["value"].nan_to_num()[..., None]
        token = self.what(x["code"]) + value * self.level(x["code"])
        share = ((value - self.low) / self.span).clamp(0, 1) - 0.5
        token = token + torch.where(x["value"].isnan()[..., None], 0.0, self.bins(share))
        if self.when is not None:
            token = token + self.when(sinusoids(x["time"], self.frequencies))
        token = token + self.mlp(token)
        first = self.summary.to(token.dtype).expand(len(token), 1, -1)
        token = torch.cat([first, token], 1)
        mask = F.pad(x["code_mask"], (1, 0), value=True)
        for block in self.blocks:
            token = block(token, mask)
        return self.out(token), mask


class LabDecoder(nn.Module):
    """What is known of a row to the value of an analyte, one question at a time.

    A question is an analyte's vector (and a time); it reads the tokens of the row, not the other
    questions, so that an answer does not depend on what else is asked.

    Shape: code (b, q), time (b, q) or None, memory (b, t, d), mask (b, t) -> (b, q, 2), the value
    in standard deviations from the mean of training rows, and the log of how far it may be off.
    """

    frequencies: Tensor

    def __init__(
        self, n_codes: int, d_model: int, n_layers: int, n_heads: int, use_time: bool = False
    ) -> None:
        super().__init__()
        self.what = nn.Embedding(n_codes, d_model)
        self.register_buffer("frequencies", 2.0 ** torch.arange(N_FREQUENCIES) * torch.pi / 2)
        self.when = nn.Linear(2 * N_FREQUENCIES, d_model) if use_time else None
        self.blocks = nn.ModuleList(
            CrossBlock(d_model, n_heads, 2 * d_model) for _ in range(n_layers)
        )
        self.norm = nn.LayerNorm(d_model)
        self.read = nn.Embedding(n_codes, 2 * d_model)
        self.start = nn.Embedding(n_codes, 2)
        nn.init.normal_(self.read.weight, std=d_model**-0.5)
        nn.init.zeros_(self.start.weight)

    def forward(self, code: Tensor, time: Tensor | None, memory: Tensor, mask: Tensor) -> Tensor:
        x = self.what(code)
        if self.when is not None and time is not None:
            x = x + self.when(sinusoids(time, self.frequencies))
        for block in self.blocks:
            x = block(x, memory, mask)
        weight = self.read(code).unflatten(-1, (2, -1))
        return torch.einsum("bqd,bqkd->bqk", self.norm(x), weight) + self.start(code)
