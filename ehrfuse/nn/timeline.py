"""Visits of several modalities as one timeline, and attention that knows the time between them.

Axes: b - batch, v - visits, f - numbers of a visit, h - heads, d - d_model, k - position width.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ehrfuse.nn.attention import sinusoids
from ehrfuse.nn.numeric import smooth_clip

# ---------------------------------------------------------------- from modalities to one timeline


class Timeline(NamedTuple):
    """Visits in time order, left-aligned; visits of equal time are one.

    Attributes
    ----------
    time : tensor (b, v)
        Rising; 0 where padded.
    mask : bool tensor (b, v)
    value : tensor (b, v, f)
        Clipped; the mean where several modalities or records measured at one time, 0 where none.
    observed : bool tensor (b, v, f)
    words : tensor (b, v, c)
        How often every code occurred in the visit.
    """

    time: Tensor
    mask: Tensor
    value: Tensor
    observed: Tensor
    words: Tensor


class Filled(NamedTuple):
    """What was known before each visit: shapes (b, v, f).

    `before` is the last value strictly before the visit (0 where there was none), `known` says
    whether there was one, `since` how long ago it was measured, or how long ago the first visit
    was.
    """

    before: Tensor
    known: Tensor
    since: Tensor


class Stream(NamedTuple):
    """One modality's records in a batch.

    `time` and `mask` are (b, r), `numbers` (b, r, f) with NaN; `codes` are for code lists the code,
    its record and its mask, each (b, c).
    """

    time: Tensor
    mask: Tensor
    numbers: Tensor
    codes: tuple[Tensor, Tensor, Tensor] | None = None


def place_visits(times: list[Tensor], masks: list[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Joint times and mask (b, v), and the place (b, r) of every record; v where padded."""
    mask = torch.cat(masks, 1)
    late = torch.cat(times, 1).masked_fill(~mask, torch.inf)
    ordered, order = late.sort(1)
    new = torch.ones_like(mask)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    new &= ordered < torch.inf
    rank = new.long().cumsum(1) - 1
    n_visits = new.sum(1)
    width = max(1, int(n_visits.max())) if len(mask) else 1
    rank = rank.masked_fill(ordered == torch.inf, width)
    place = torch.empty_like(rank).scatter_(1, order, rank)
    time = ordered.new_zeros(len(mask), width + 1).scatter_(
        1, rank, ordered.masked_fill(ordered == torch.inf, 0.0)
    )
    there = torch.arange(width, device=mask.device) < n_visits[:, None]
    return (
        time[:, :width].masked_fill(~there, 0.0),
        there,
        list(place.split([t.shape[1] for t in times], 1)),
    )


def merge(streams: list[Stream], n_codes: list[int]) -> Timeline:
    """All records of a batch as one timeline; numbers and codes of all streams side by side."""
    time, mask, places = place_visits([s.time for s in streams], [s.mask for s in streams])
    values, counts, words = [], [], []
    for stream, place, size in zip(streams, places, n_codes, strict=True):
        value, count = _spread(stream, place, mask.shape[1])
        values.append(value)
        counts.append(count)
        words.append(_count_words(stream, place, mask, size, value.dtype))
    value, count = torch.cat(values, -1), torch.cat(counts, -1)
    return Timeline(time, mask, value / count.clamp(min=1), count > 0, torch.cat(words, -1))


def _spread(stream: Stream, place: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Sum and count of every number at every visit: (b, v, f) twice."""
    seen = ~stream.numbers.isnan() & stream.mask[..., None]
    value = torch.where(seen, smooth_clip(stream.numbers.nan_to_num(0.0)), 0.0)
    where = place[..., None].expand_as(value)
    empty = value.new_zeros(len(value), width + 1, value.shape[-1])
    total = empty.scatter_add(1, where, value)
    count = empty.scatter_add(1, where, seen.to(value.dtype))
    return total[:, :width], count[:, :width]


def _count_words(
    stream: Stream, place: Tensor, mask: Tensor, size: int, dtype: torch.dtype
) -> Tensor:
    words = torch.zeros(*mask.shape, size, dtype=dtype, device=mask.device)
    if stream.codes is None or not size:
        return words
    code, record, keep = stream.codes
    visit = place.gather(1, record.long().clamp(max=place.shape[1] - 1)).clamp(
        max=mask.shape[1] - 1
    )
    cell = visit * size + code.long()
    return words.flatten(1).scatter_add(1, cell, keep.to(dtype)).view_as(words)


def fill(line: Timeline) -> Filled:
    """Carry the last value forward; never reads a visit's own values or later ones."""
    b, v, f = line.value.shape
    step = torch.arange(v, device=line.value.device)[:, None]
    latest = torch.where(line.observed, step, -1).cummax(1).values
    first = latest.new_full((b, 1, f), -1)
    previous = torch.cat([first, latest[:, :-1]], 1)
    known, source = previous >= 0, previous.clamp(min=0)
    before = torch.where(known, line.value.gather(1, source), 0.0)
    time = line.time[..., None].expand_as(line.value)
    since = torch.where(line.mask[..., None], time - time.gather(1, source), 0.0)
    return Filled(before, known, since)


class VisitInput(nn.Module):
    """Numbers and codes of one modality's visits to vectors: value, mask and time since last.

    A value that was not measured is the last one before; `since` says how old that is, on a
    logarithmic scale.

    Shape: value, observed, before, known, since (b, v, f), words (b, v, c) -> (b, v, d).
    """

    def __init__(self, n_numbers: int, n_codes: int, d_model: int) -> None:
        super().__init__()
        self.n_outputs = d_model
        self.numbers = nn.Linear(3 * n_numbers, d_model) if n_numbers else None
        self.codes = nn.Linear(n_codes, d_model, bias=False) if n_codes else None

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        """From `features` (b, v, 3 f) and words (b, v, c)."""
        parts = [] if self.numbers is None else [self.numbers(x)]
        parts += [] if self.codes is None else [self.codes(words)]
        if not parts:  # a modality that no training row had
            return x.new_zeros(*x.shape[:2], self.n_outputs)
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def features(line: Timeline, filled: Filled, scale: float | Tensor = 1.0) -> Tensor:
    """Value (carried forward), mask and time since last: (b, v, 3, f)."""
    value = torch.where(line.observed, line.value, filled.before)
    age = torch.log1p(filled.since / scale)
    return torch.stack([value, line.observed.to(value.dtype), age], 2)


# ---------------------------------------------------------------- time-aware attention

BLOCK_BYTES = 2**24  # of one slice of position differences


class PositionBias(torch.autograd.Function):
    """sum_k w[h, k] |p[i, k] - p[j, k]| for all pairs, without an array of all differences.

    Shape: p (b, t, k), w (h, k) -> (b, h, t, t). Both passes go through k in slices, so that memory
    is that of the result, not k times as much.
    """

    @staticmethod
    def forward(ctx: Any, p: Tensor, w: Tensor) -> Tensor:
        """The bias."""
        ctx.save_for_backward(p, w)
        b, t, k = p.shape
        out = p.new_zeros(b * t * t, len(w))
        for part in _slices(b * t * t, k, p.element_size()):
            out.addmm_(_differences(p[..., part]).abs_().view(len(out), -1), w[:, part].T)
        return out.view(b, t, t, len(w)).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Gradients to positions and weights."""
        p, w = ctx.saved_tensors
        b, t, k = p.shape
        flat = grads[0].permute(0, 2, 3, 1).reshape(-1, len(w))
        to_p = torch.zeros_like(p) if ctx.needs_input_grad[0] else None
        to_w = torch.zeros_like(w)
        for part in _slices(b * t * t, k, p.element_size()):
            gap = _differences(p[..., part])
            if to_p is not None:
                pull = (flat @ w[:, part]).view_as(gap) * gap.sign()
                to_p[..., part] = pull.sum(2) - pull.sum(1)
            to_w[:, part] = flat.T @ gap.abs_().view(len(flat), -1)
        return to_p, to_w


def _differences(p: Tensor) -> Tensor:
    return p[:, :, None] - p[:, None]


def _slices(n_pairs: int, k: int, size: int) -> list[slice]:
    step = max(1, min(k, BLOCK_BYTES // max(1, n_pairs * size)))
    return [slice(start, min(k, start + step)) for start in range(0, k, step)]


class TimeBias(nn.Module):
    """What the time between two visits adds to their attention score, by head.

    Parameters
    ----------
    kind : {"position", "release", "gap"}
        ``"position"``: w' |p_i - p_j| with sinusoids of real-valued time. ``"release"``: the same
        with a trainable table of 128 whole numbers of time and the release's growing frequencies.
        ``"gap"``: a slope times log(1 + |t_i - t_j|), which no shift of all times can change.
    n_heads : int
    width : int, default=32
        Width of a position, even.

    Notes
    -----
    Shape: time (b, t) -> (b, h, t, t).
    """

    frequencies: Tensor

    def __init__(self, kind: str, n_heads: int, width: int = 32) -> None:
        super().__init__()
        self.kind = kind
        sign = 1.0 if kind == "release" else -1.0
        self.register_buffer("frequencies", frequencies(width, sign))
        size = 1 if kind == "gap" else width
        self.weight = nn.Parameter(torch.empty(n_heads, size).uniform_(-1, 1) * size**-0.5)
        self.table = None
        if kind == "release":
            self.table = nn.Parameter(sinusoids(torch.arange(128.0), self.frequencies))

    def forward(self, time: Tensor) -> Tensor:
        if self.kind == "gap":
            gap = torch.log1p((time[:, :, None] - time[:, None]).abs())
            return gap[:, None] * self.weight.view(1, -1, 1, 1)
        clock, place = time.unique(return_inverse=True)
        if len(clock) ** 2 > time.numel() * time.shape[1] // 4:
            return self._of_positions(self._positions(time))
        # Binned times are few: every pair of different times once, then looked up.
        table = self._of_positions(self._positions(clock[None]))[0].permute(1, 2, 0)
        pair = place[:, :, None] * len(clock) + place[:, None]
        return F.embedding(pair, table.flatten(0, 1)).permute(0, 3, 1, 2)

    def _of_positions(self, position: Tensor) -> Tensor:
        return PositionBias.apply(position, self.weight)

    def _positions(self, time: Tensor) -> Tensor:
        if self.table is not None:
            return self.table[time.round().long().remainder(len(self.table))]
        return sinusoids(time, self.frequencies)


def frequencies(width: int, sign: float = -1.0) -> Tensor:
    """Half as many frequencies as `width`, from 1 down to about 1 / 10,000 per unit of time."""
    return 10_000.0 ** (sign * torch.arange(width // 2) / max(1, width // 2))


class TimeAwareBlock(nn.Module):
    """Post-norm self-attention whose scores also read the time between two tokens.

    Parameters
    ----------
    d_model, n_heads : int
    bias : {"position", "release", "gap", "none"}
        See `TimeBias`; ``"none"`` is the plain transformer, positions added to its input.
    head_width : int or None, default=None
        Width of a head; None divides `d_model` among them.
    dropout : float, default=0.0

    Notes
    -----
    Shape: x (b, t, d), time (b, t), mask (b, t) -> (b, t, d), weights (b, h, t, t) where asked for.
    A row without any token gives finite numbers.
    """

    frequencies: Tensor

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        bias: str,
        head_width: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if head_width is None and d_model % n_heads:
            raise ValueError(
                f"d_model={d_model} cannot be split into n_heads={n_heads}; choose a d_model that "
                "is a multiple of n_heads, or give head_width."
            )
        self.n_heads, self.dropout = n_heads, dropout
        self.width = head_width or d_model // n_heads
        self.qkv = nn.Linear(d_model, 3 * n_heads * self.width)
        self.out = nn.Linear(n_heads * self.width, d_model)
        self.bias = None if bias == "none" else TimeBias(bias, n_heads)
        self.register_buffer("frequencies", frequencies(d_model + d_model % 2))
        self.norm_attention, self.norm_hidden = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.hidden = nn.Sequential(
            nn.Linear(d_model, d_model), nn.ReLU(), nn.Linear(d_model, d_model)
        )

    def forward(self, x: Tensor, time: Tensor, mask: Tensor) -> Tensor:
        y = F.dropout(self._attend(x, time, mask), self.dropout, self.training)
        x = self.norm_attention(x + y)
        y = F.dropout(self.hidden(x), self.dropout, self.training)
        return self.norm_hidden(x + y)

    def _attend(self, x: Tensor, time: Tensor, mask: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self._heads(x, time)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self._added(time, mask, q.dtype))
        return self.out(y.transpose(1, 2).reshape(b, t, -1))

    def _heads(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, t, d = x.shape
        if self.bias is None:
            x = x + sinusoids(time, self.frequencies)[..., :d]
        q, k, v = self.qkv(x).view(b, t, 3, self.n_heads, self.width).permute(2, 0, 3, 1, 4)
        return q, k, v

    def _added(self, time: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
        """What is added to the scores (b, h, t, t): time, and minus infinity for padding."""
        # A row with no key at all attends everywhere: its output is never read, but stays finite.
        keys = (mask | ~mask.any(1, keepdim=True))[:, None, None, :]
        if self.bias is None:
            return torch.zeros(keys.shape, dtype=dtype, device=keys.device).masked_fill(
                ~keys, -torch.inf
            )
        return self.bias(time).to(dtype).masked_fill(~keys, -torch.inf)

    def weights(self, x: Tensor, time: Tensor, mask: Tensor) -> Tensor:
        """Attention weights (b, h, t, t)."""
        q, k, _ = self._heads(x, time)
        score = q @ k.mT / math.sqrt(self.width)
        return (score + self._added(time, mask, q.dtype)).softmax(-1)
