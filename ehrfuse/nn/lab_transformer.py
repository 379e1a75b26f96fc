"""Masked tabular transformer: tokens of lab values that were measured, guesses of others.

Axes: b - batch, t - measured values of a row, v - visible ones, q - values asked for, c - codes
(analytes), w - width of the encoder, d - d_model.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ehrfuse.nn.attention import CrossBlock, TransformerBlock, check_heads, sinusoids
from ehrfuse.nn.encoders import Tokens

N_FREQUENCIES = 8
REACHES = (0.02, 0.1, 0.4, math.inf)  # shares of the longest history, see `Recall`
CELLS = 4_000_000  # pairs of question and value at once
CLIP = 6.0  # standard deviations of a value that answers rest on directly
LONG, RATIO = 32, 2.0  # values of a row from which on padding matters, see `similar`


def pack(chosen: Tensor, **parts: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Move the chosen of every row to the front and cut: parts (b, t, ...) -> (b, v, ...), mask."""
    n = chosen.sum(1)
    place = chosen.to(torch.int8).argsort(dim=1, descending=True, stable=True)[
        :, : max(1, int(n.max()))
    ]
    found = {}
    for name, part in parts.items():
        index = place.view(*place.shape, *[1] * (part.dim() - 2)).expand(-1, -1, *part.shape[2:])
        found[name] = part.gather(1, index)
    return found, torch.arange(place.shape[1], device=n.device) < n[:, None]


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
        check_heads(width, n_heads, "width")
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
        mask = x["code_mask"]
        parts = similar(mask)
        if len(parts) == 1:
            return self._read(x)
        size, tokens = 1 + int(mask.sum(1).max()), []
        for rows in parts:
            n = int(mask[rows].sum(1).max())
            token, _ = self._read({key: part[rows, :n] for key, part in x.items()})
            tokens.append(F.pad(token, (0, 0, 0, size - token.shape[1])))
        order = torch.cat(parts).argsort()
        return torch.cat(tokens)[order], F.pad(mask[:, : size - 1], (1, 0), value=True)

    def _read(self, x: dict[str, Tensor]) -> Tokens:
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


def similar(mask: Tensor) -> list[Tensor]:
    """Cut rows into parts of similar length, so that short ones are not padded to the longest.

    Shape: mask (b, t), its real cells first -> list of row numbers. Lengths within a part differ
    by a factor of `RATIO` at most; one part where padding is no matter.
    """
    n = mask.sum(1)
    if mask.shape[1] < LONG or n.sum() > 0.5 * mask.numel():
        return [torch.arange(len(n), device=n.device)]
    level = torch.log(n.clamp(min=LONG / RATIO)).div(math.log(RATIO)).ceil()
    return [torch.nonzero(level == one)[:, 0] for one in level.unique()]


class Recall(nn.Module):
    """What a row's visible values of the asked analyte say: their means, near in time and overall.

    One mean per reach (weights fall off by half over it), the last one over the whole row, and of
    each the log of its total weight. Attention finds the same analyte at another time only after
    many steps; a stay of a stream has many such pairs.

    Shape: code, time (b, q), and of the visible values code, standard, time, mask (b, t)
    -> means (b, q, r), in standard deviations, and log weights (b, q, r).
    """

    rate: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Shares of the longest history; 0 is no fall-off. Times are in units of that history.
        self.register_buffer("rate", math.log(2.0) / torch.tensor(REACHES))

    def forward(
        self, code: Tensor, time: Tensor | None, seen: dict[str, Tensor], mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        value = seen["standard"].nan_to_num().clamp(-CLIP, CLIP)
        step = max(1, CELLS // max(1, value.numel()))  # questions by visible values are many
        asked = (code,) if time is None or "time" not in seen else (code, time)
        parts = [
            self._mean(*part, value=value, seen=seen, mask=mask)
            for part in zip(*(x.split(step, 1) for x in asked), strict=True)
        ]
        return torch.cat([m for m, _ in parts], 1), torch.cat([w for _, w in parts], 1)

    def _mean(
        self,
        code: Tensor,
        time: Tensor | None = None,
        *,
        value: Tensor,
        seen: dict[str, Tensor],
        mask: Tensor,
    ) -> tuple[Tensor, Tensor]:
        same = ((code[:, :, None] == seen["code"][:, None]) & mask[:, None]).to(value.dtype)
        gap = None if time is None else (time[:, :, None] - seen["time"][:, None]).abs()
        means, totals = [], []
        for rate in self.rate:
            weight = same if gap is None else same * torch.exp(-gap * rate)
            totals.append(weight.sum(2))
            means.append(torch.einsum("bqt,bt->bq", weight, value) / totals[-1].clamp(min=1e-6))
        return torch.stack(means, -1), torch.log(torch.stack(totals, -1) + 1e-2)


class LabDecoder(nn.Module):
    """What is known of a row to the value of an analyte, one question at a time.

    A question is an analyte's vector (and a time); it reads the tokens of the row, not the other
    questions, so that an answer does not depend on what else is asked. With `recall` it is also
    told what the row's visible values of its analyte are, see `Recall`.

    Shape: code (b, q), time (b, q) or None, memory (b, t, d), mask (b, t) -> (b, q, 2), the value
    in standard deviations from the mean of training rows, and the log of how far it may be off.
    """

    frequencies: Tensor

    def __init__(
        self,
        n_codes: int,
        d_model: int,
        n_layers: int,
        n_heads: int,
        use_time: bool = False,
        recall: bool = False,
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
        self.recall = Recall() if recall else None
        if recall:
            self.told = nn.Linear(2 * len(REACHES), d_model)
            self.trust = nn.Embedding(n_codes, len(REACHES))
            nn.init.constant_(self.trust.weight, 1 / len(REACHES))

    def forward(
        self,
        code: Tensor,
        time: Tensor | None,
        memory: Tensor,
        mask: Tensor,
        seen: tuple[dict[str, Tensor], Tensor] | None = None,
    ) -> Tensor:
        x = self.what(code)
        if self.when is not None and time is not None:
            x = x + self.when(sinusoids(time, self.frequencies))
        means = None
        if self.recall is not None and seen is not None:
            means, weights = self.recall(code, time, *seen)
            x = x + self.told(torch.cat([means, weights], -1))
        for block in self.blocks:
            x = block(x, memory, mask)
        weight = self.read(code).unflatten(-1, (2, -1))
        found = torch.einsum("bqd,bqkd->bqk", self.norm(x), weight) + self.start(code)
        if means is None:
            return found
        return found + F.pad((means * self.trust(code)).sum(-1, keepdim=True), (0, 1))
