"""The cells of the sequence baselines, each by the equations of its paper.

Every encoder maps visits to one vector per patient and, where it has one, the attention it paid to
each visit. Visits are left-aligned: padding comes after them.

Axes: b - batch, v - visits, f - numbers, d - d_model.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ehrfuse.nn.attention import TransformerBlock, sinusoids
from ehrfuse.nn.fusion import blank_tokens
from ehrfuse.nn.timeline import Filled, TimeAwareBlock, Timeline, frequencies


class Visited(NamedTuple):
    """What an encoder gives: the patient's vector (b, n_outputs), attention (b, v) or None."""

    vector: Tensor
    attention: Tensor | None = None


# ---------------------------------------------------------------- helpers


def last_of(x: Tensor, mask: Tensor) -> Tensor:
    """State (b, d) at the last real visit of x (b, v, d); zero where there is none."""
    place = (mask.sum(1) - 1).clamp(min=0).view(-1, 1, 1).expand(-1, 1, x.shape[-1])
    return torch.where(mask.any(1)[:, None], x.gather(1, place)[:, 0], 0.0)


def reverse(x: Tensor, mask: Tensor) -> Tensor:
    """The real visits of x (b, v, ...) in reverse order, padding where it was."""
    length = mask.sum(1, keepdim=True)
    step = torch.arange(mask.shape[1], device=mask.device)
    place = torch.where(mask, length - 1 - step, step)
    return x.gather(1, place.view(*place.shape, *[1] * (x.dim() - 2)).expand_as(x))


def masked_softmax(score: Tensor, mask: Tensor) -> Tensor:
    """Softmax of score (b, v) over the real visits; all zero where there is none."""
    score = score.masked_fill(~mask, -torch.inf)
    empty = ~mask.any(1, keepdim=True)
    return score.masked_fill(empty, 0.0).softmax(1).masked_fill(~mask, 0.0)


def weighted(weight: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """Sum over visits of weight (b, v) times x (b, v, d)."""
    return torch.einsum("bv,bvd->bd", weight, blank_tokens(x, mask))


def gaps(line: Timeline) -> Tensor:
    """Time since the visit before (b, v), zero at the first one."""
    gap = torch.zeros_like(line.time)
    gap[:, 1:] = line.time[:, 1:] - line.time[:, :-1]
    return torch.where(line.mask, gap, 0.0)


def before_last(line: Timeline) -> Tensor:
    """How long before the last visit each one was (b, v)."""
    last = line.time.masked_fill(~line.mask, -torch.inf).amax(1, keepdim=True)
    return torch.where(line.mask, last - line.time, 0.0)


# ---------------------------------------------------------------- LSTM and transformer


class LSTMEncoder(nn.Module):
    """LSTM over visit vectors and the time since the visit before; the last real state."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.n_outputs = d_model
        self.lstm = nn.LSTM(d_model + 1, d_model, batch_first=True)

    def forward(self, x: Tensor, line: Timeline, filled: Filled) -> Visited:
        gap = torch.log1p(gaps(line))[..., None]
        return Visited(last_of(self.lstm(torch.cat([x, gap], -1))[0], line.mask))


class TransformerEncoder(nn.Module):
    """Plain transformer: sinusoids of time added to what queries, keys and values read.

    The vector is that of an aggregation token, its attention that of the last layer, mean over
    heads.
    """

    def __init__(self, d_model: int, n_heads: int, n_layers: int = 1) -> None:
        super().__init__()
        self.n_outputs = d_model
        self.whole = nn.Parameter(torch.randn(d_model) * 0.1)
        self.blocks = nn.ModuleList(
            TimeAwareBlock(d_model, n_heads, "none") for _ in range(n_layers)
        )

    def forward(self, x: Tensor, line: Timeline, filled: Filled) -> Visited:
        last = line.time.masked_fill(~line.mask, -torch.inf).amax(1, keepdim=True)
        now = torch.where(line.mask.any(1, keepdim=True), last + 1.0, 0.0)
        x = torch.cat([self.whole.expand(len(x), 1, -1), x], 1)
        time = torch.cat([now, line.time], 1)
        mask = torch.cat([torch.ones_like(line.mask[:, :1]), line.mask], 1)
        weight = None
        for block in self.blocks:
            assert isinstance(block, TimeAwareBlock)
            weight = None if self.training else block.weights(x, time, mask)[:, :, 0, 1:].mean(1)
            x = block(x, time, mask)
        return Visited(x[:, 0], weight)


# ---------------------------------------------------------------- RETAIN


class RETAINEncoder(nn.Module):
    """RETAIN (Choi et al., NeurIPS 2016): two recurrent attentions in reverse time.

    alpha = softmax over visits of w' g + b, beta = tanh(W h + b), c = sum of alpha beta * v, with g
    and h the states of two GRUs that read the visits backwards. The vector is linear in the
    visits given the attentions, so that contributions to a linear head are exact.
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.n_outputs = d_model
        self.visit_rnn = nn.GRU(d_model, d_model, batch_first=True)
        self.variable_rnn = nn.GRU(d_model, d_model, batch_first=True)
        self.visit = nn.Linear(d_model, 1)
        self.variable = nn.Linear(d_model, d_model)

    def attentions(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Alpha (b, v) and beta (b, v, d)."""
        backwards = reverse(x, mask)
        g = reverse(self.visit_rnn(backwards)[0], mask)
        h = reverse(self.variable_rnn(backwards)[0], mask)
        return masked_softmax(self.visit(g)[..., 0], mask), self.variable(h).tanh()

    def forward(self, x: Tensor, line: Timeline, filled: Filled) -> Visited:
        alpha, beta = self.attentions(x, line.mask)
        return Visited(weighted(alpha, beta * x, line.mask), alpha)


# ---------------------------------------------------------------- T-LSTM


class TLSTMCell(nn.Module):
    """One step of T-LSTM (Baytas et al., KDD 2017): the short-term memory fades with the gap.

    C_S = tanh(W_d C + b_d); C* = C - C_S + g(gap) C_S, g = 1 / log(e + gap); then an LSTM on C*.
    """

    def __init__(self, n_inputs: int, d_model: int) -> None:
        super().__init__()
        self.inputs = nn.Linear(n_inputs, 4 * d_model)
        self.state = nn.Linear(d_model, 4 * d_model, bias=False)
        self.short = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor, gap: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """From inputs (b, 4 d) already projected, gap (b,), states (b, d) to the next states."""
        short = self.short(c).tanh()
        fade = 1.0 / torch.log(math.e + gap)[:, None]
        faded = c - short + fade * short
        i, f, o, g = (x + self.state(h)).chunk(4, 1)
        c = torch.sigmoid(f) * faded + torch.sigmoid(i) * g.tanh()
        return torch.sigmoid(o) * c.tanh(), c


class TLSTMEncoder(nn.Module):
    """T-LSTM over visit vectors; a hidden layer on the last real state."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.n_outputs = d_model
        self.cell, self.hidden = TLSTMCell(d_model, d_model), nn.Linear(d_model, d_model)

    def states(self, x: Tensor, gap: Tensor) -> Tensor:
        """Hidden states (b, v, d)."""
        h = c = x.new_zeros(len(x), self.n_outputs)
        found = []
        for step, since in zip(self.cell.inputs(x).unbind(1), gap.unbind(1), strict=True):
            h, c = self.cell(step, since, h, c)
            found.append(h)
        return torch.stack(found, 1)

    def forward(self, x: Tensor, line: Timeline, filled: Filled) -> Visited:
        return Visited(F.relu(self.hidden(last_of(self.states(x, gaps(line)), line.mask))))


# ---------------------------------------------------------------- Dipole


class DipoleEncoder(nn.Module):
    """Dipole (Ma et al., KDD 2017): attention of the last visit to those before, in a two-way GRU.

    Parameters
    ----------
    d_model : int
    score : {"location", "general", "concat"}
        w' h_i + b; h_T' W h_i; or v' tanh(W [h_T; h_i]).

    Notes
    -----
    A patient with one visit has none before it: the context is zero.
    """

    def __init__(self, d_model: int, score: str = "general") -> None:
        super().__init__()
        self.n_outputs, self.score = d_model, score
        self.forth = nn.GRU(d_model, d_model, batch_first=True)
        self.back = nn.GRU(d_model, d_model, batch_first=True)
        width = 2 * d_model
        self.location = nn.Linear(width, 1) if score == "location" else None
        self.general = nn.Linear(width, width, bias=False) if score == "general" else None
        self.joint = self.direction = None
        if score == "concat":
            self.joint = nn.Linear(2 * width, d_model, bias=False)
            self.direction = nn.Linear(d_model, 1, bias=False)
        self.out = nn.Linear(2 * width, d_model)

    def states(self, x: Tensor, mask: Tensor) -> Tensor:
        """States of both directions (b, v, 2 d)."""
        back = reverse(self.back(reverse(x, mask))[0], mask)
        return torch.cat([self.forth(x)[0], back], -1)

    def scores(self, h: Tensor, last: Tensor) -> Tensor:
        """Score of every visit (b, v) from states (b, v, 2 d) and the last one (b, 2 d)."""
        if self.location is not None:
            return self.location(h)[..., 0]
        if self.general is not None:
            return torch.einsum("bd,bvd->bv", last, self.general(h))
        assert self.joint is not None
        assert self.direction is not None
        both = torch.cat([last[:, None].expand_as(h), h], -1)
        return self.direction(self.joint(both).tanh())[..., 0]

    def forward(self, x: Tensor, line: Timeline, filled: Filled) -> Visited:
        h = self.states(x, line.mask)
        last = last_of(h, line.mask)
        step = torch.arange(line.mask.shape[1], device=x.device)
        earlier = step < line.mask.sum(1, keepdim=True) - 1
        weight = masked_softmax(self.scores(h, last), earlier)
        context = weighted(weight, h, earlier)
        return Visited(self.out(torch.cat([context, last], 1)).tanh(), weight)


# ---------------------------------------------------------------- HiTANet


class TimeFeature(nn.Module):
    """W_2 (1 - tanh((W_1 gap + b_1)^2)) + b_2: (b, v) -> (b, v, n_outputs)."""

    def __init__(self, n_outputs: int, width: int = 64) -> None:
        super().__init__()
        self.inside, self.outside = nn.Linear(1, width), nn.Linear(width, n_outputs)

    def forward(self, gap: Tensor) -> Tensor:
        return self.outside(1 - torch.tanh(self.inside(gap[..., None]).square()))


class HiTANetEncoder(nn.Module):
    """HiTANet (Luo et al., KDD 2020): attention to visits by content, by time, and their mixture.

    Parameters
    ----------
    d_model, n_heads : int
    n_query : int, default=64
        Width of the time query; its scores are divided by the square root (the release divides by
        that of a head's share).

    Notes
    -----
    `span` is the time by which distances to the last visit are divided: the longest history of the
    training rows (the release divides days by 180).
    """

    frequencies: Tensor
    span: Tensor

    def __init__(self, d_model: int, n_heads: int, n_query: int = 64) -> None:
        super().__init__()
        self.n_outputs, self.scale = d_model, n_query**-0.5
        self.register_buffer("frequencies", frequencies(d_model + d_model % 2))
        self.register_buffer("span", torch.ones(()))
        self.when = TimeFeature(d_model)
        self.block = TransformerBlock(d_model, n_heads, 4 * d_model)
        self.local = nn.Linear(d_model, 1)
        self.query, self.key = nn.Linear(d_model, n_query), TimeFeature(n_query)
        self.mixture = nn.Linear(d_model, 2)

    def attentions(self, h: Tensor, gap: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Local and global attention (b, v), and the weights of the two (b, 2): global, local."""
        last = last_of(h, mask)
        local = masked_softmax(self.local(h)[..., 0], mask)
        query = F.relu(self.query(last))
        score = torch.einsum("bq,bvq->bv", query, F.relu(self.key(gap))) * self.scale
        return local, masked_softmax(score, mask), self.mixture(last).softmax(1)

    def forward(self, x: Tensor, line: Timeline, filled: Filled) -> Visited:
        gap = before_last(line) / self.span
        step = torch.arange(x.shape[1], device=x.device, dtype=x.dtype)
        place = sinusoids(step, self.frequencies)[:, : x.shape[-1]]
        h = self.block(x + self.when(gap) + place, line.mask)
        local, overall, share = self.attentions(h, gap, line.mask)
        weight = share[:, :1] * overall + share[:, 1:] * local
        weight = weight / weight.sum(1, keepdim=True).clamp(min=1e-12)
        return Visited(weighted(weight, h, line.mask), weight)


# ---------------------------------------------------------------- GRU-D


class GRUDEncoder(nn.Module):
    """GRU-D (Che et al., Sci Rep 2018): what was last seen fades to the mean, the state to zero.

    gamma = exp(-max(0, W delta + b)), diagonal for inputs and full for the state;
    x^ = m x + (1 - m)(gamma_x x_last + (1 - gamma_x) mean); h <- gamma_h h; then a GRU whose gates
    read x^, h and m. Codes are inputs that are always observed.

    Parameters
    ----------
    n_numbers, n_codes, d_model : int

    Notes
    -----
    `mean` holds the training means.
    """

    mean: Tensor

    def __init__(self, n_numbers: int, n_codes: int, d_model: int) -> None:
        super().__init__()
        self.n_outputs = d_model
        self.register_buffer("mean", torch.zeros(n_numbers))
        self.fade_input = nn.Parameter(torch.rand(n_numbers) * 0.1)
        self.shift_input = nn.Parameter(torch.zeros(n_numbers))
        self.fade_state = nn.Linear(max(1, n_numbers), d_model)
        # One zero stands in where there is no number and no code.
        self.inputs = nn.Linear(max(1, n_numbers + n_codes), 3 * d_model)
        self.masks = nn.Linear(max(1, n_numbers), 3 * d_model, bias=False)
        self.gates = nn.Linear(d_model, 2 * d_model, bias=False)
        self.candidate = nn.Linear(d_model, d_model, bias=False)

    def imputed(self, line: Timeline, filled: Filled) -> Tensor:
        """x^ (b, v, f)."""
        gamma = torch.exp(-F.relu(self.fade_input * filled.since + self.shift_input))
        last = torch.where(filled.known, filled.before, self.mean)
        return torch.where(line.observed, line.value, gamma * last + (1 - gamma) * self.mean)

    def states(self, line: Timeline, filled: Filled) -> Tensor:
        """Hidden states (b, v, d)."""
        x = _never_empty(torch.cat([self.imputed(line, filled), line.words], -1))
        mask = _never_empty(line.observed.to(x.dtype))
        fade = torch.exp(-F.relu(self.fade_state(_never_empty(filled.since))))
        inputs = self.inputs(x) + self.masks(mask)
        h = x.new_zeros(len(x), self.n_outputs)
        found = []
        for step, gamma in zip(inputs.unbind(1), fade.unbind(1), strict=True):
            h = gamma * h
            r, z, n = step.chunk(3, 1)
            z_h, r_h = self.gates(h).chunk(2, 1)
            z = torch.sigmoid(z + z_h)
            n = torch.tanh(n + self.candidate(torch.sigmoid(r + r_h) * h))
            h = (1 - z) * h + z * n
            found.append(h)
        return torch.stack(found, 1)

    def forward(self, x: Tensor, line: Timeline, filled: Filled) -> Visited:
        return Visited(last_of(self.states(line, filled), line.mask))


def _never_empty(x: Tensor) -> Tensor:
    return x if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)
