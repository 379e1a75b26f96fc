"""The pretext tasks on timelines of visits: alike or apart, masked visits, visits of others.

Axes: b - batch, v - visits, f - numbers, c - codes, s - statistics, d - width of a patient vector.
"""

import torch
from torch import Tensor, nn

from ehrfuse.nn.timeline import Timeline

MAX_PAIRS = 200_000  # of training rows, whose distances set the thresholds


def statistics(line: Timeline) -> Tensor:
    """What is compared between patients: (b, 7 f + c), NaN where a number was never measured.

    Last, mean, sd, lowest, highest, slope and log count of every number, log count of every code.
    """
    seen = line.observed
    n = seen.sum(1)
    once, twice = n >= 1, n >= 2

    def mean(x: Tensor) -> Tensor:
        return torch.where(seen, x, 0.0).sum(1) / n.clamp(min=1)

    center = mean(line.value)
    time = line.time[..., None].expand_as(line.value)
    gap, off = time - mean(time)[:, None], line.value - center[:, None]
    sd = (mean(off**2) * n / (n - 1).clamp(min=1)).sqrt()
    slope = mean(gap * off) / mean(gap**2).clamp(min=1e-6)
    step = torch.arange(line.value.shape[1], device=n.device)[:, None]
    latest = torch.where(seen, step, 0).amax(1, keepdim=True)
    last = line.value.gather(1, latest)[:, 0]
    low = line.value.masked_fill(~seen, torch.inf).amin(1)
    high = line.value.masked_fill(~seen, -torch.inf).amax(1)
    parts = [(last, once), (center, once), (low, once), (high, once), (sd, twice), (slope, twice)]
    found = [x.masked_fill(~keep, torch.nan) for x, keep in parts]
    return torch.cat([*found, torch.log1p(n.to(center.dtype)), torch.log1p(line.words.sum(1))], 1)


class Similarity(nn.Module):
    """Task 1: patients whose statistics are close lie close, those far apart lie apart.

    `learn` sets from training rows how each statistic is standardised and, from the distances of
    random pairs, below which a pair is alike and above which it is not; pairs between do not count.

    Rows are paired at random. The release of RAPT compares four raw numbers of the last visit, has
    constants as thresholds, and pulls pairs back that are further apart than the margin
    (``hinge=False``).
    """

    center: Tensor
    scale: Tensor
    thresholds: Tensor

    def __init__(self, n_statistics: int, margin: float, hinge: bool, share: float) -> None:
        super().__init__()
        self.margin, self.hinge, self.share = margin, hinge, share
        self.register_buffer("center", torch.zeros(n_statistics))
        self.register_buffer("scale", torch.ones(n_statistics))
        self.register_buffer("thresholds", torch.tensor([0.0, torch.inf]))

    def standardised(self, table: Tensor) -> Tensor:
        """Statistics in standard deviations; zero where a patient has none."""
        return ((table - self.center) / self.scale).nan_to_num(0.0)

    def learn(self, table: Tensor, seed: int) -> None:
        """From the statistics of training rows (n, s)."""
        known = (~table.isnan()).sum(0).clamp(min=1)
        center = table.nan_to_num(0.0).sum(0) / known
        sd = ((table - center).square().nan_to_num(0.0).sum(0) / known).sqrt()
        self.center.copy_(center)
        self.scale.copy_(torch.where(sd > 1e-6, sd, torch.inf))  # a constant says nothing
        generator = torch.Generator().manual_seed(seed)
        n_pairs = min(MAX_PAIRS, 50 * len(table))
        pairs = torch.randint(len(table), (2, n_pairs), generator=generator)
        a, b = pairs[:, pairs[0] != pairs[1]].to(table.device)
        table = self.standardised(table)
        if len(a) and table.shape[1]:
            parts = zip(a.split(4096), b.split(4096), strict=True)
            distance = torch.cat([(table[i] - table[j]).norm(dim=1) for i, j in parts])
            ends = torch.tensor([self.share, 1 - self.share]).to(distance)
            self.thresholds.copy_(distance.quantile(ends))

    def forward(self, z: Tensor, line: Timeline) -> Tensor:
        order = torch.randperm(len(z), device=z.device)
        half = len(z) // 2
        a, b = order[:half], order[half : 2 * half]
        table = self.standardised(statistics(line))
        far = (table[a] - table[b]).norm(dim=1)
        counted = line.mask.any(1)[a] & line.mask.any(1)[b]
        alike, apart = far < self.thresholds[0], far > self.thresholds[1]
        return contrast((z[a] - z[b]), alike & counted, apart & counted, self.margin, self.hinge)


def contrast(gap: Tensor, alike: Tensor, apart: Tensor, margin: float, hinge: bool) -> Tensor:
    """Mean over counted pairs: D^2 where alike, (margin - D)^2 where apart; 0 without pairs."""
    square = gap.square().sum(1) + 1e-12
    short = margin - square.sqrt()
    short = short.clamp(min=0) if hinge else short
    term = torch.where(alike, square, short.square())
    counted = alike | apart
    return torch.where(counted, term, 0.0).sum() / counted.sum().clamp(min=1)


def hide_visits(line: Timeline, share: float) -> tuple[Timeline, Tensor]:
    """Mask visits at random: the timeline without what they said, and which they are (b, v)."""
    hidden = (torch.rand(line.mask.shape, device=line.mask.device) < share) & line.mask
    keep = ~hidden[..., None]
    observed = line.observed & keep
    shown = line._replace(
        observed=observed,
        value=torch.where(observed, line.value, 0.0),
        words=torch.where(keep, line.words, 0.0),
    )
    return shown, hidden


def swap_visits(line: Timeline, patient: Tensor, share: float = 0.5) -> tuple[Timeline, Tensor]:
    """In a share of the rows put visits of other patients: the timeline, and which rows (b,).

    Between half and all of a row's visits are replaced; times stay. Donors are real visits of the
    batch, each as likely, of rows with another number in `patient` (b,).
    """
    length = line.mask.sum(1)
    row, visit = line.mask.nonzero().unbind(1)
    order = torch.argsort(patient[row], stable=True)
    _, code, size = torch.unique(patient[row][order], return_inverse=True, return_counts=True)
    # Of every row: where its patient's own visits stand in that order, and how many they are.
    own = torch.zeros_like(length).scatter(0, row[order], size[code])
    start = torch.zeros_like(length).scatter(0, row[order], (size.cumsum(0) - size)[code])
    others = len(row) - own
    swapped = (torch.rand(len(length), device=length.device) < share) & (length > 0) & (others > 0)
    low = (length + 1) // 2
    n = low + (torch.rand(len(low), device=low.device) * (length - low + 1)).long()
    noise = torch.rand(line.mask.shape, device=row.device).masked_fill(~line.mask, 2.0)
    chosen = (noise.argsort(1).argsort(1) < n[:, None]) & line.mask & swapped[:, None]
    i, j = chosen.nonzero().unbind(1)
    draw = (torch.rand(len(i), device=i.device, dtype=torch.float64) * others[i]).long()
    draw = order[torch.where(draw < start[i], draw, draw + own[i])]
    donor = row[draw], visit[draw]
    parts = {
        name: getattr(line, name).index_put((i, j), getattr(line, name)[donor])
        for name in ("value", "observed", "words")
    }
    return line._replace(**parts), swapped


def hide_numbers(line: Timeline, share: float) -> Timeline:
    """Hide a share of the numbers from each row, from all its visits alike."""
    rows, n_numbers = line.value.shape[::2]
    shown = torch.rand(rows, 1, n_numbers, device=line.value.device) >= share
    observed = line.observed & shown
    return line._replace(observed=observed, value=torch.where(observed, line.value, 0.0))
