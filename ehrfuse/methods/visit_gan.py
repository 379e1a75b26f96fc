"""A small generative adversarial network of visit histories, for pretraining on more patients.

Two recurrent networks: one makes histories from noise, the other tells them from real ones.

Axes: b - batch, v - visits, f - numbers.
"""

from numbers import Integral, Real

import numpy as np
import pandas as pd
import torch
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state, check_scalar
from sklearn.utils.validation import check_is_fitted
from torch import nn
from torch.nn import functional as F

from ehrfuse._runtime import resolve_device, seeded
from ehrfuse.modalities import Visits
from ehrfuse.modalities._convert import visits_column
from ehrfuse.modalities._streams import read_records
from ehrfuse.nn.recurrent import last_of

__all__ = ["VisitGAN"]

LIMIT = 4.0  # scaled values beyond are cut: a generator cannot learn from outliers


class Generator(nn.Module):
    """Noise (b, v, n) to scaled numbers, log-odds of each being taken (b, v, f) and log gaps."""

    def __init__(self, n_numbers, width, n_noise):
        super().__init__()
        self.n_noise = n_noise
        self.register_buffer("longest", torch.tensor(101.0).log())
        self.rnn = nn.GRU(2 * n_noise, width, batch_first=True)
        self.numbers, self.taken = nn.Linear(width, n_numbers), nn.Linear(width, n_numbers)
        self.gap = nn.Linear(width, 1)

    def forward(self, length, n_visits):
        b, like = len(length), self.gap.weight
        patient = torch.randn(b, 1, self.n_noise, device=like.device).expand(-1, n_visits, -1)
        visit = torch.randn(b, n_visits, self.n_noise, device=like.device)
        h, _ = self.rnn(torch.cat([patient, visit], -1))
        odds = self.taken(h)
        soft = torch.sigmoid(odds)
        hard = (torch.rand_like(soft) < soft).to(soft.dtype)
        taken = hard + soft - soft.detach()  # zeros and ones, with the gradient of the odds
        numbers = LIMIT * torch.tanh(self.numbers(h) / LIMIT)
        gap = self.longest * torch.sigmoid(self.gap(h))
        return torch.cat([numbers * hard, taken, gap], -1)

    @torch.no_grad()
    def start_at(self, rate, gap):
        """Start at the share of visits that took each number (f,) and at the mean log gap."""
        self.taken.bias.copy_(rate.clamp(0.01, 0.99).logit())
        self.gap.bias.fill_(float((gap / self.longest).clamp(0.01, 0.99).logit()))


class Critic(nn.Module):
    """Histories (b, v, 2 f + 1) and their mask to a score of being real (b,)."""

    def __init__(self, n_numbers, width):
        super().__init__()
        self.rnn = nn.GRU(2 * n_numbers + 1, width, batch_first=True)
        self.out = nn.Sequential(nn.Linear(width, width), nn.LeakyReLU(0.2), nn.Linear(width, 1))

    def forward(self, x, mask):
        return self.out(last_of(self.rnn(x)[0], mask))[:, 0]


class VisitGAN(BaseEstimator):
    """Makes histories like those of a `Visits` column; for ``RAPTPretrainer(augment=...)``.

    Parameters
    ----------
    column : str
        Column of visits; its numbers and times are learned, code lists are not.
    max_visits : int, default=32
        The latest visits of a history are learned from.
    width, n_noise : int, default=64 and 16
        Width of both networks, and of the noise per patient and per visit.
    max_epochs : int, default=60
    batch_size : int, default=64
    lr : float, default=1e-3
    random_state : int, RandomState or None, default=None
    device : str, torch.device or None, default=None
        None is the best available: cuda, mps, cpu.

    Attributes
    ----------
    visits_ : Visits
        Fields and scales of the column.
    weights_ : dict of arrays
        Of the generator.
    history_ : list of dict
        Loss of both networks per epoch.

    See Also
    --------
    RAPTPretrainer : Fits it on its training rows.

    Notes
    -----
    Adversarial hinge loss. Lengths and last times are drawn from the training rows. Generated rows
    have nulls in all other columns. A GAN can repeat a training patient: its rows are to be
    protected like the records that it was fitted to.

    Examples
    --------
    >>> from ehrfuse import VisitGAN
    >>> from ehrfuse.datasets import make_prenatal
    >>> X, _ = make_prenatal(80, random_state=0)
    >>> made = VisitGAN("visits", max_epochs=2, random_state=0).fit(X).sample(5)
    >>> len(made), sorted(made["visits"][0][0])[:2]
    (5, ['alt', 'dbp'])
    """

    def __init__(
        self,
        column,
        *,
        max_visits=32,
        width=64,
        n_noise=16,
        max_epochs=60,
        batch_size=64,
        lr=1e-3,
        random_state=None,
        device=None,
    ):
        self.column = column
        self.max_visits = max_visits
        self.width = width
        self.n_noise = n_noise
        self.max_epochs = max_epochs
        self.batch_size = batch_size
        self.lr = lr
        self.random_state = random_state
        self.device = device

    def fit(self, X, y=None):
        """Learn from training rows.

        Parameters
        ----------
        X : DataFrame of shape (n_samples, n_columns)
        y : ignored

        Returns
        -------
        self : VisitGAN
        """
        for name in ("max_visits", "width", "n_noise", "max_epochs", "batch_size"):
            check_scalar(getattr(self, name), name, Integral, min_val=1)
        check_scalar(self.lr, "lr", Real, min_val=0, include_boundaries="neither")
        # Times may lie anywhere: `now` only says where ages count from.
        self.visits_ = Visits(self.column, now=_latest(X, self.column), max_visits=self.max_visits)
        block = self.visits_.fit(X).transform(X)
        rows = np.flatnonzero(block.present & (block.length > 0))
        if len(rows) < 2:
            raise ValueError(
                f"Column {self.column!r} has {len(rows)} rows with visits; at least two are needed."
            )
        self.lengths_ = block.length[rows]
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        device = resolve_device(self.device)
        table = _table(block.take(rows)).to(device)
        self.ends_ = (self.visits_.now - _last_age(block, rows) * self.visits_.time_scale_).astype(
            "float32"
        )
        with seeded(seed, device):
            generator = self._fit_networks(table, device, np.random.default_rng(seed))
        self.weights_ = {k: t.cpu().numpy() for k, t in generator.state_dict().items()}
        self.seed_ = seed
        return self

    def _generator(self):
        return Generator(len(self.visits_.numeric_fields_), self.width, self.n_noise)

    def _fit_networks(self, table, device, rng):
        n_numbers = len(self.visits_.numeric_fields_)
        generator = self._generator().to(device)
        critic = Critic(n_numbers, self.width).to(device)
        steps = [torch.optim.Adam(m.parameters(), self.lr, (0.5, 0.9)) for m in (generator, critic)]
        length = torch.from_numpy(self.lengths_).to(device)
        n_visits = length.sum()
        gap = table[..., -1].sum() / (n_visits - len(length)).clamp(min=1)
        generator.start_at(table[..., n_numbers:-1].sum((0, 1)) / n_visits, gap)
        self.history_ = []
        for epoch in range(self.max_epochs):
            losses = []
            order = rng.permutation(len(table))
            for rows in np.array_split(order, max(1, len(order) // self.batch_size)):
                losses.append(self._step(generator, critic, steps, table[rows], length[rows]))
            mean = np.mean(losses, 0)
            self.history_.append({"epoch": epoch, "critic": mean[0], "generator": mean[1]})
        return generator

    def _step(self, generator, critic, steps, real, length):
        """One update of the critic, one of the generator; their losses."""
        mask = torch.arange(real.shape[1], device=real.device) < length[:, None]
        made = torch.where(mask[..., None], generator(length, real.shape[1]), 0.0)
        against = F.relu(1 - critic(real, mask)) + F.relu(1 + critic(made.detach(), mask))
        steps[1].zero_grad()
        against.mean().backward()
        steps[1].step()
        fooled = -critic(made, mask).mean()
        steps[0].zero_grad()
        fooled.backward()
        steps[0].step()
        return float(against.detach().mean()), float(fooled.detach())

    def sample(self, n):
        """Make rows.

        Parameters
        ----------
        n : int

        Returns
        -------
        X : DataFrame of shape (n, 1)
            The column of visits; the same rows at every call.
        """
        check_is_fitted(self, "weights_")
        check_scalar(n, "n", Integral, min_val=1)
        rng = np.random.default_rng(self.seed_)
        drawn = rng.integers(len(self.lengths_), size=n)
        length, end = self.lengths_[drawn], self.ends_[drawn]
        generator = self._generator()
        generator.load_state_dict({k: torch.tensor(a) for k, a in self.weights_.items()})
        with seeded(self.seed_, torch.device("cpu")), torch.no_grad():
            made = generator(torch.from_numpy(length), int(length.max())).numpy()
        return pd.DataFrame({self.column: self._cells(made, length, end)})

    def _cells(self, made, length, end):
        f = len(self.visits_.numeric_fields_)
        keep = np.arange(made.shape[1]) < length[:, None]
        gap = np.expm1(made[..., -1])  # of the first visit: before the history, so not used
        gap[:, 0] = 0
        time = np.cumsum(np.where(keep, gap, 0), 1) * self.visits_.time_scale_ / 100
        time = time - time.max(1, keepdims=True) + end[:, None]
        scale = self.visits_.scale_
        numbers = made[..., :f] * scale.scale + scale.center
        numbers[made[..., f : 2 * f] < 0.5] = np.nan
        return visits_column(time[keep], numbers[keep], self.visits_.numeric_fields_, length)


def _latest(X, column):
    """The latest time of a column of visits."""
    if column not in X:
        raise ValueError(f"X has no column {column!r}; it has {list(X.columns)[:8]}.")
    return float(read_records(X[column], ("time",)).time.max(initial=0.0))


def _last_age(block, rows):
    age, offsets = block.ragged["time"]
    return age[offsets[rows + 1] - 1]


def _table(x):
    """Real histories (b, v, 2 f + 1): numbers with zero for none, taken, log of the gap."""
    numbers, mask = x["numbers"], x["time_mask"]
    taken = ~numbers.isnan() & mask[..., None]
    values = torch.where(taken, numbers.nan_to_num(0.0).clamp(-LIMIT, LIMIT), 0.0)
    gap = torch.zeros_like(x["time"])
    # In hundredths of the longest history, so that the logarithm tells short gaps apart.
    gap[:, 1:] = 100 * (x["time"][:, :-1] - x["time"][:, 1:])
    gap = torch.log1p(torch.where(mask, gap, 0.0).clamp(min=0))
    return torch.cat([values, taken.to(values.dtype), gap[..., None]], -1)
