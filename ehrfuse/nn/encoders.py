"""Encoders: the tensors of one modality become tokens and a mask.

Every encoder maps a dict of tensors (b, ...) to tokens (b, t, d) and a mask (b, t), where True is a
real token, and states `n_outputs` = d. One with ensemble members states `n_members` = e and gives
(b * e, t, d). Every row yields at least one token.

Axes: b - batch, e - members, t - tokens, p - numeric columns, c - categorical columns, d - d_model.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ehrfuse.nn.attention import sinusoids
from ehrfuse.nn.fusion import AttentionPool
from ehrfuse.nn.members import MemberScale
from ehrfuse.nn.numeric import FEATURES_AT_ONCE, NumericFeatures, smooth_clip

Tokens = tuple[Tensor, Tensor]


def single(token: Tensor) -> Tokens:
    """One token (b, d) for every row as tokens (b, 1, d) and their mask."""
    return token[:, None], torch.ones(len(token), 1, dtype=torch.bool, device=token.device)


class TableEncoder(nn.Module):
    """Numbers with holes and categories to one token, by a network of each member's own.

    Reads ``values`` (b, p) in scaled units with NaN for missing, and ``codes`` (b, c).

    Parameters
    ----------
    numbers : NumericFeatures
    sizes : list of int
        Number of codes of each categorical column; code 0 is null, code 1 unknown.
    d_model, n_members : int
    dropout : float, default=0.2
        On the token.
    column_dropout : float, default=0.5
        Share of columns hidden from every training row, all features of a column at once: a
        network on a few thousand rows otherwise leans on few of them.
    """

    column: Tensor

    def __init__(
        self,
        numbers: NumericFeatures,
        sizes: list[int],
        d_model: int,
        n_members: int = 1,
        dropout: float = 0.2,
        column_dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.numbers, self.column_dropout = numbers, column_dropout
        self.tables = nn.ModuleList(_category_table(size) for size in sizes)
        self.n_members, self.n_outputs = n_members, d_model
        widths = torch.tensor([table.embedding_dim for table in self.tables], dtype=torch.long)
        first = 1 + int(numbers.column.max()) if len(numbers.column) else 0
        words = torch.arange(first, first + len(sizes)).repeat_interleave(widths)
        self.register_buffer("column", torch.cat([numbers.column, words]))
        self.n_columns = first + len(sizes)
        # A modality that no training row had may have no feature at all; one zero stands in.
        self.first = nn.Linear(max(1, len(self.column)), n_members * d_model)
        self.drop = nn.Dropout(dropout)

    def features(self, x: dict[str, Tensor]) -> Tensor:
        """All features of a row side by side: (b, f)."""
        parts = [self.numbers(x["values"])] if "values" in x else []
        parts += [table(x["codes"][:, j]) for j, table in enumerate(self.tables)]
        features = self._hide_columns(torch.cat(parts, 1) if len(parts) > 1 else parts[0])
        return features if features.shape[1] else features.new_zeros(len(features), 1)

    def _hide_columns(self, features: Tensor) -> Tensor:
        if not (self.training and self.column_dropout):
            return features
        keep = 1 - self.column_dropout
        hidden = torch.rand(len(features), self.n_columns, device=features.device) >= keep
        # Filled, not multiplied (a product makes numbers of flags first), and strip by strip.
        for part in range(0, len(self.column), FEATURES_AT_ONCE):
            strip = slice(part, part + FEATURES_AT_ONCE)
            features[:, strip].masked_fill_(hidden[:, self.column[strip]], 0.0)
        return features.div_(keep)

    def forward(self, x: dict[str, Tensor]) -> Tokens:
        hidden = self.first(self.features(x)).view(-1, self.n_outputs)
        return single(self.drop(F.relu(hidden)))


def _category_table(size: int) -> nn.Embedding:
    table = nn.Embedding(size, min(16, max(2, round(1.6 * size**0.56))))
    with torch.no_grad():
        table.weight[1] = 0.0  # unknown in fit: never trained, so it should say nothing
    return table


class LabsEncoder(nn.Module):
    """One token per measured analyte: what it is plus what its value says.

    Reads ``values`` (b, p) in scaled units, NaN for not measured.
    """

    def __init__(self, numbers: NumericFeatures, n_analytes: int, d_model: int) -> None:
        super().__init__()
        self.numbers, self.n_outputs = numbers, d_model
        self.identity = nn.Parameter(torch.randn(n_analytes, d_model) * 0.1)
        scale = len(numbers.column) / max(1, n_analytes)
        self.weight = nn.Parameter(torch.randn(len(numbers.column), d_model) * scale**-0.5)
        self.mlp = nn.Sequential(nn.GELU(), nn.Linear(d_model, d_model))

    def forward(self, x: dict[str, Tensor]) -> Tokens:
        # Every feature adds its vector to the token of the analyte that it comes from.
        vectors = self.numbers(x["values"])[..., None] * self.weight
        token = self.identity.expand(len(vectors), -1, -1).index_add(
            1, self.numbers.column, vectors.to(self.identity.dtype)
        )
        return self.mlp(token), ~x["values"].isnan()


class EventEncoder(nn.Module):
    """A stream of (time, code, value) to one token; optionally a second one of its summary.

    Reads ``code`` (b, t), ``value`` (b, t) scaled with NaN for none, ``time`` (b, t) as time before
    `now` in units of `time_scale`, ``code_mask`` (b, t) and, with `summary`, what that reads.
    """

    frequencies: Tensor

    def __init__(
        self, n_codes: int, d_model: int, summary: TableEncoder | None, stream: bool
    ) -> None:
        super().__init__()
        self.summary, self.n_outputs = summary, d_model
        self.n_members = 1 if summary is None else summary.n_members
        self.stream = EventTokens(n_codes, d_model) if stream else None
        self.pool = AttentionPool(d_model) if stream else None
        if stream and self.n_members > 1:
            self.spread = MemberScale(self.n_members, d_model)

    def forward(self, x: dict[str, Tensor]) -> Tokens:
        parts = []
        if self.summary is not None:
            parts.append(self.summary({"values": x["summary"]})[0])
        if self.stream is not None and self.pool is not None:
            token = self.pool(*self.stream(x))[:, None]
            parts.append(self.spread(token) if self.n_members > 1 else token)
        tokens = torch.cat(parts, 1)
        return tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)


class EventTokens(nn.Module):
    """One token per event: code, value under that code, and how long ago.

    Shape: code, value, time (b, t) -> tokens (b, t, d), mask (b, t).
    """

    frequencies: Tensor

    def __init__(self, n_codes: int, d_model: int, n_frequencies: int = 8) -> None:
        super().__init__()
        self.what = nn.Embedding(n_codes, d_model)
        self.level = nn.Embedding(n_codes, d_model)
        self.register_buffer("frequencies", 2.0 ** torch.arange(n_frequencies) * torch.pi / 2)
        self.when = nn.Linear(2 * n_frequencies, d_model)
        self.mlp = nn.Sequential(
            nn.LayerNorm(d_model),
            nn.Linear(d_model, d_model),
            nn.GELU(),
            nn.Linear(d_model, d_model),
        )

    def forward(self, x: dict[str, Tensor]) -> Tokens:
        value = smooth_clip(x["value"].nan_to_num(0.0))
        token = self.what(x["code"]) + value[..., None] * self.level(x["code"])
        token = token + self.when(sinusoids(x["time"], self.frequencies))
        return self.mlp(token), x["code_mask"]


class VisitEncoder(nn.Module):
    """One token per visit from its numbers, its codes and its time; an empty history has one token.

    Reads ``numbers`` (b, v, f) scaled with NaN, ``time`` (b, v), ``time_mask`` (b, v), and for code
    lists ``code`` (b, c), ``code_visit`` (b, c), ``code_mask`` (b, c).
    """

    frequencies: Tensor

    def __init__(self, n_numbers: int, n_codes: int, d_model: int, n_frequencies: int = 8) -> None:
        super().__init__()
        self.n_outputs = d_model
        self.numbers = nn.Linear(2 * n_numbers, d_model) if n_numbers else None
        self.codes = nn.Embedding(n_codes, d_model) if n_codes else None
        self.register_buffer("frequencies", 2.0 ** torch.arange(n_frequencies) * torch.pi / 2)
        self.when = nn.Linear(2 * n_frequencies, d_model)
        self.mlp = nn.Sequential(
            nn.LayerNorm(d_model),
            nn.Linear(d_model, d_model),
            nn.GELU(),
            nn.Linear(d_model, d_model),
        )
        self.nothing = nn.Parameter(torch.zeros(d_model))

    def forward(self, x: dict[str, Tensor]) -> Tokens:
        token, mask = self.when(sinusoids(x["time"], self.frequencies)), x["time_mask"]
        if self.numbers is not None:
            missing = x["numbers"].isnan()
            clipped = smooth_clip(x["numbers"].nan_to_num(0.0))
            token = token + self.numbers(torch.cat([clipped, missing.to(clipped.dtype)], -1))
        if self.codes is not None:
            token = token + self._code_sum(x, token)
        token = self.mlp(token)
        empty = ~mask.any(1)
        first = torch.where(empty[:, None], self.nothing.to(token.dtype), token[:, 0])
        return torch.cat([first[:, None], token[:, 1:]], 1), torch.cat(
            [mask[:, :1] | empty[:, None], mask[:, 1:]], 1
        )

    def _code_sum(self, x: dict[str, Tensor], like: Tensor) -> Tensor:
        assert self.codes is not None
        words = torch.where(x["code_mask"][..., None], self.codes(x["code"]), 0.0)
        place = x["code_visit"].long()[..., None].expand_as(words)
        return torch.zeros_like(like).scatter_add(1, place, words.to(like.dtype))


class Standardize(nn.Module):
    """Features to mean 0 and spread 1 as measured in fit, clipped smoothly. Nothing is trained.

    Not a layer norm: that would take away how long a vector is, and all of a vector of length one.
    """

    center: Tensor
    scale: Tensor

    def __init__(self, center: Sequence[float], scale: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("center", torch.as_tensor(center, dtype=torch.float32).clone())
        self.register_buffer("scale", torch.as_tensor(scale, dtype=torch.float32).clone())

    def forward(self, x: Tensor) -> Tensor:
        return smooth_clip((x - self.center) / self.scale)


class VectorEncoder(nn.Module):
    """Precomputed vectors to one token. Reads ``values`` (b, size)."""

    def __init__(
        self, center: Sequence[float], scale: Sequence[float], d_model: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.n_outputs = d_model
        self.mlp = nn.Sequential(
            Standardize(center, scale), nn.Dropout(dropout), nn.Linear(len(center), d_model),
            nn.GELU(), nn.Linear(d_model, d_model),
        )  # fmt: skip

    def forward(self, x: dict[str, Tensor]) -> Tokens:
        return single(self.mlp(x["values"]))


class ChunkEncoder(nn.Module):
    """Vectors of the chunks of a note to one token per chunk. Reads ``chunks`` (b, t, size)."""

    def __init__(
        self, center: Sequence[float], scale: Sequence[float], d_model: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.n_outputs = d_model
        self.mlp = nn.Sequential(
            Standardize(center, scale), nn.Dropout(dropout), nn.Linear(len(center), d_model)
        )

    def forward(self, x: dict[str, Tensor]) -> Tokens:
        return self.mlp(x["chunks"]), x["chunks_mask"]


class WordEncoder(nn.Module):
    """Words to one token: a weighted sum of their vectors, linear so that few notes suffice.

    Reads ``ids`` (b, t), ``weights`` (b, t) and ``ids_mask`` (b, t).

    Parameters
    ----------
    n_words, d_model : int
    dropout : float
        Share of the words left out of a note in training.
    """

    # Weights of a note are small and a fit is short, so the vectors of words take large steps.
    LR_SCALE, GAIN = 10.0, 3.0

    def __init__(self, n_words: int, d_model: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.n_outputs, self.lr_scale, self.dropout = d_model, self.LR_SCALE, dropout
        # A plain parameter: weight decay at that step size would wipe out what rare words learn.
        self.words = nn.Parameter(torch.randn(n_words, d_model) * 0.02)

    def forward(self, x: dict[str, Tensor]) -> Tokens:
        table = self.words
        weight = torch.where(x["ids_mask"], x["weights"], torch.zeros_like(x["weights"]))
        weight = F.dropout(weight, self.dropout, self.training).to(table.dtype)
        if table.device.type == "mps":  # has no weighted embedding_bag in every torch
            bag = torch.einsum("bt,btd->bd", weight, F.embedding(x["ids"], table))
        else:  # half the time: no (b, t, d) array
            bag = F.embedding_bag(x["ids"], table, mode="sum", per_sample_weights=weight)
        return single(self.GAIN * bag)


class ImageEncoder(nn.Module):
    """A small convolutional network: one token per image. Reads ``pixels`` (b, h, w) of uint8."""

    def __init__(self, d_model: int, width: int = 16, dropout: float = 0.0) -> None:
        super().__init__()
        self.n_outputs = d_model
        layers: list[nn.Module] = []
        channels = 1
        for out in (width, 2 * width, 4 * width):
            convolution = nn.Conv2d(channels, out, 3, stride=2, padding=1)
            layers += [convolution, nn.GroupNorm(4, out), nn.GELU()]
            channels = out
        self.layers = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(2 * channels, d_model))

    def forward(self, x: dict[str, Tensor]) -> Tokens:
        pixels = x["pixels"].to(next(self.head.parameters()).dtype) / 127.5 - 1.0
        maps = self.layers(pixels[:, None])
        pooled = torch.cat([maps.mean((2, 3)), F.adaptive_max_pool2d(maps, 1).flatten(1)], 1)
        return single(self.head(pooled))
