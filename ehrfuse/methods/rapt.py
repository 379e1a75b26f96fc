"""Pretraining of a time-aware transformer: RAPT (Ren, Wang, Zhao, Wu; KDD 2021).

Records of prenatal visits are few, short and full of holes. A transformer whose attention reads
the time between visits is pretrained by three tasks, one against each: tell patients alike from
patients apart, guess a masked visit from the others, and tell a real history from one with visits
of other patients in it. Then a head is put on it and all is trained on the outcome.

Axes: b - batch, e - ensemble members, v - visits, f - numbers, d - d_model, s - side vectors,
k - outputs.
"""

from numbers import Integral, Real

import numpy as np
import torch
from sklearn.base import clone
from sklearn.utils import check_scalar
from sklearn.utils.validation import check_is_fitted
from torch import nn
from torch.nn import functional as F

from ehrfuse._runtime import check_option
from ehrfuse.base import TorchClassifier, TorchEncoder, TorchRegressor
from ehrfuse.methods._timeline import TimelineCore, TimelineMixin, View
from ehrfuse.modalities import Events
from ehrfuse.nn.fusion import Absence
from ehrfuse.nn.losses import masked_mse
from ehrfuse.nn.members import MemberLinear, MemberScale
from ehrfuse.nn.timeline import TimeAwareBlock

__all__ = ["RAPTClassifier", "RAPTPretrainer", "RAPTRegressor"]

ATTENTION = ("position", "gap", "release", "plain")
# Of the transformer and its visits. The small networks beside it need few small steps; at the same
# rate the transformer had hardly begun when they were done.
LR_SCALE = 3.0
MAX_PAIRS = 200_000  # of training rows, whose distances set the thresholds


# ---------------------------------------------------------------- the encoder


class RAPTTrunk(nn.Module):
    """Time-aware transformer over an aggregation token, vectors without time, and visits.

    Shape: tokens (b, v, d), time (b, v), mask (b, v), side (b, s, d), there (b, s)
    -> z (b, d), and the visits after attention (b, v, d).

    NOTE[DIFF] The release's token is one vector in input space for both aggregating and masking;
    here two vectors of width d (``shared_token=True``: one). Side vectors stand at the time of the
    aggregation token, one unit after the last visit; the release repeats them in every visit.
    """

    def __init__(self, d_model, n_heads, n_layers, attention, head_width, shared_token):
        super().__init__()
        self.whole = nn.Parameter(torch.randn(d_model) * 0.1)
        self.gone = None if shared_token else nn.Parameter(torch.randn(d_model) * 0.1)
        bias = "none" if attention == "plain" else attention
        self.blocks = nn.ModuleList(
            TimeAwareBlock(d_model, n_heads, bias, head_width) for _ in range(n_layers)
        )

    @property
    def masked(self):
        """What stands for a masked visit."""
        return self.whole if self.gone is None else self.gone

    def sequence(self, tokens, time, mask, side, there):
        """All tokens in front of the visits, with their times and mask."""
        last = time.masked_fill(~mask, -torch.inf).amax(1)
        now = torch.where(mask.any(1), last + 1.0, 0.0)[:, None]
        front = torch.cat([self.whole.expand(len(tokens), 1, -1), side], 1)
        here = torch.cat([torch.ones_like(there[:, :0]).new_ones(len(tokens), 1), there], 1)
        x = torch.cat([front, tokens], 1)
        return x, torch.cat([now.expand(-1, front.shape[1]), time], 1), torch.cat([here, mask], 1)

    def forward(self, tokens, time, mask, side, there):
        x, when, keep = self.sequence(tokens, time, mask, side, there)
        for block in self.blocks:
            x = block(x, when, keep)
        return x[:, 0], x[:, 1 + side.shape[1] :]

    def visits(self, tokens, time, mask):
        """The visits among themselves, without the aggregation token: (b, v, d)."""
        for block in self.blocks:
            tokens = block(tokens, time, mask)
        return tokens

    def weights(self, tokens, time, mask, side, there):
        """Attention of the aggregation token to the visits, mean over heads, last layer: (b, v)."""
        x, when, keep = self.sequence(tokens, time, mask, side, there)
        for block in self.blocks[:-1]:
            x = block(x, when, keep)
        return self.blocks[-1].weights(x, when, keep)[:, :, 0, 1 + side.shape[1] :].mean(1)


class RAPTBase(TimelineCore):
    """What pretraining and fine-tuning share: a batch becomes z and its side vectors."""

    def __init__(self, modalities, p, heads):
        trunk = RAPTTrunk(
            p.d_model, p.n_heads, p.n_layers, p.attention, p.head_width, p.shared_token
        )
        super().__init__(modalities, p.d_model, p.n_members, trunk, heads)
        for part in (self.trunk, *(self.encoders[track.name] for track in self.tracks)):
            part.lr_scale = LR_SCALE

    def shared_side(self, side, there):
        """Side vectors for the trunk, which all members share: their mean (b, s, d), (b, s)."""
        e = self.n_members
        return side.unflatten(0, (-1, e)).mean(1), there[::e]

    def represent(self, line, side, there, filled=None):
        """The patient vector z (b, d)."""
        tokens = self.embed(line, filled)
        return self.trunk(tokens, line.time, line.mask, *self.shared_side(side, there))[0]


# ---------------------------------------------------------------- pretraining


def statistics(line):
    """What is compared between patients: (b, 7 f + c), NaN where a number was never measured.

    Last, mean, sd, lowest, highest, slope and log count of every number, log count of every code.
    """
    seen = line.observed
    n = seen.sum(1)
    once, twice = n >= 1, n >= 2

    def mean(x):
        return torch.where(seen, x, 0.0).sum(1) / n.clamp(min=1)

    center = mean(line.value)
    time = line.time[..., None].expand_as(line.value)
    gap, off = time - mean(time)[:, None], line.value - center[:, None]
    sd = (mean(off**2) * n / (n - 1).clamp(min=1)).sqrt()
    slope = mean(gap * off) / mean(gap**2).clamp(min=1e-6)
    step = torch.arange(line.value.shape[1], device=n.device)[:, None]
    latest = torch.where(seen, step, 0).amax(1, keepdim=True) if seen.shape[1] else None
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

    NOTE[DIFF] The release compares four raw numbers of the last visit, and its thresholds are
    constants of its authors' data. It also pulls pairs back that are further apart than the margin
    (``hinge=False``).
    """

    def __init__(self, n_statistics, margin, hinge, share):
        super().__init__()
        self.margin, self.hinge, self.share = margin, hinge, share
        self.register_buffer("center", torch.zeros(n_statistics))
        self.register_buffer("scale", torch.ones(n_statistics))
        self.register_buffer("thresholds", torch.tensor([0.0, torch.inf]))

    def standardised(self, table):
        """Statistics in standard deviations; zero where a patient has none."""
        return ((table - self.center) / self.scale).nan_to_num(0.0)

    def learn(self, table, seed):
        """From the statistics of training rows (n, s)."""
        known = (~table.isnan()).sum(0).clamp(min=1)
        center = table.nan_to_num(0.0).sum(0) / known
        sd = ((table - center).square().nan_to_num(0.0).sum(0) / known).sqrt()
        self.center.copy_(center)
        self.scale.copy_(torch.where(sd > 1e-6, sd, torch.inf))  # a constant says nothing
        rng = np.random.default_rng(seed)
        a, b = rng.integers(len(table), size=(2, min(MAX_PAIRS, 50 * len(table))))
        a, b = torch.from_numpy(a[a != b]), torch.from_numpy(b[a != b])
        table = self.standardised(table)
        if len(a) and table.shape[1]:
            pairs = zip(a.split(4096), b.split(4096), strict=True)
            distance = torch.cat([(table[i] - table[j]).norm(dim=1) for i, j in pairs])
            ends = torch.tensor([self.share, 1 - self.share])
            self.thresholds.copy_(distance.quantile(ends.to(distance.dtype)))

    def forward(self, z, line):
        """The loss; rows are paired at random."""
        order = torch.randperm(len(z), device=z.device)
        half = len(z) // 2
        a, b = order[:half], order[half : 2 * half]
        table = self.standardised(statistics(line))
        far = (table[a] - table[b]).norm(dim=1)
        counted = line.mask.any(1)[a] & line.mask.any(1)[b]
        alike, apart = far < self.thresholds[0], far > self.thresholds[1]
        return contrast((z[a] - z[b]), alike & counted, apart & counted, self.margin, self.hinge)


def contrast(gap, alike, apart, margin, hinge):
    """Mean over counted pairs: D^2 where alike, (margin - D)^2 where apart; 0 without pairs."""
    square = gap.square().sum(1) + 1e-12
    short = margin - square.sqrt()
    short = short.clamp(min=0) if hinge else short
    term = torch.where(alike, square, short.square())
    counted = alike | apart
    return torch.where(counted, term, 0.0).sum() / counted.sum().clamp(min=1)


def hide_visits(line, share):
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


def swap_visits(line, patient, share=0.5):
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


class RAPTPretrainCore(RAPTBase):
    """The encoder and the three tasks; each has its own forward pass."""

    def __init__(self, modalities, p):
        super().__init__(modalities, p, nn.ModuleDict())
        f, c = sum(self.widths), sum(len(track.codes) for track in self.tracks)
        self.heads["similarity"] = Similarity(7 * f + c, p.margin, p.hinge, p.similar_share)
        for name, size in {"numbers": f, "codes": c}.items():
            if size:
                self.heads[name] = nn.Linear(p.d_model, size)
        self.heads["reasonable"] = nn.Linear(p.d_model, 1)
        self.task_weights = (p.similarity_weight, p.masked_weight, p.reasonability_weight)
        self.mask_share, self.n_outputs = p.mask_share, p.d_model

    def forward(self, batch):
        """The patient vector z (b, d)."""
        return self.represent(self.timeline(batch), *self.side(batch))

    def losses(self, batch):
        """The three terms, as far as each has a weight."""
        line, (side, there) = self.timeline(batch), self.side(batch)
        tasks = (self._similarity, self._masked, self._reasonability)
        names = ("similarity", "masked", "reasonability")
        patient = torch.arange(len(line.mask), device=line.mask.device)
        patient = patient if batch.groups is None else batch.groups
        return {
            name: weight * task(line, side, there, patient)
            for name, weight, task in zip(names, self.task_weights, tasks, strict=True)
            if weight
        }

    def _similarity(self, line, side, there, patient):
        return self.heads["similarity"](self.represent(line, side, there), line)

    def _masked(self, line, side, there, patient):
        """Guess what was measured in masked visits; none of it is carried forward either.

        NOTE[DIFF] The release guesses four routine numbers; here all, and which codes there were.
        """
        shown, hidden = hide_visits(line, self.mask_share)
        tokens = torch.where(hidden[..., None], self.trunk.masked, self.embed(shown))
        found = self.trunk.visits(tokens, line.time, line.mask)
        loss = found.sum() * 0.0
        if "numbers" in self.heads:
            hit = line.observed & hidden[..., None]
            loss = loss + masked_mse(self.heads["numbers"](found), line.value, hit)
        if "codes" in self.heads:
            loss = loss + self._codes(found, line.words, hidden)
        return loss

    def _codes(self, found, words, hidden):
        """Cross-entropy to the codes of a visit; 1 is a guess that takes all codes alike."""
        share = words / words.sum(-1, keepdim=True).clamp(min=1)
        term = -(share * self.heads["codes"](found).log_softmax(-1)).sum(-1)
        hit = hidden & (words.sum(-1) > 0)
        mean = torch.where(hit, term, 0.0).sum() / hit.sum().clamp(min=1)
        return mean / np.log(max(2, words.shape[-1]))

    def _reasonability(self, line, side, there, patient):
        """Tell real histories from those with visits of other patients.

        NOTE[DIFF] Donors in the release may be padding or the patient's own visits.
        """
        changed, swapped = swap_visits(line, patient)
        logit = self.heads["reasonable"](self.represent(changed, side, there))[:, 0]
        term = F.binary_cross_entropy_with_logits(logit, swapped.to(logit.dtype), reduction="none")
        some = line.mask.any(1)
        return torch.where(some, term, 0.0).sum() / some.sum().clamp(min=1)


# ---------------------------------------------------------------- fine-tuning


class RAPTHead(nn.Module):
    """One small network per member on z and the vectors beside it.

    Shape: z (b, d), vectors (b * e, n, d), there (b * e, n) -> (b * e, k).
    """

    def __init__(self, d_model, n_vectors, n_members, dropout, start):
        super().__init__()
        self.drop = nn.Dropout(dropout)
        self.members = MemberScale(n_members, d_model)
        self.absence = Absence(n_vectors, d_model)
        self.hidden = MemberLinear(n_members, (1 + n_vectors) * d_model, 2 * d_model)
        self.out = MemberLinear(n_members, 2 * d_model, len(start), start)

    def forward(self, z, vectors, there):
        row = [self.members(self.drop(z)), self.absence(vectors, there).flatten(1)]
        return self.out(F.dropout(torch.relu(self.hidden(torch.cat(row, 1))), 0.2, self.training))


def hide_numbers(line, share):
    """Hide a share of the numbers from each row, from all its visits alike."""
    rows, n_numbers = line.value.shape[::2]
    shown = torch.rand(rows, 1, n_numbers, device=line.value.device) >= share
    observed = line.observed & shown
    return line._replace(observed=observed, value=torch.where(observed, line.value, 0.0))


class RAPTCore(RAPTBase):
    """The encoder with an outcome head.

    NOTE[DIFF] The paper's head is linear on z. Here it also reads the vectors of what has no time
    and, with ``summary=True``, the summary token of every `Events`: on 4,000 stays a table of
    statistics carries most of what any network can use.
    """

    def __init__(self, modalities, target, p):
        heads = nn.ModuleDict()
        super().__init__(modalities, p, heads)
        encoders = {
            name: m.make_summary_encoder(p.d_model, p.n_members)
            for name, m in modalities.items()
            if isinstance(m, Events) and m.summary and p.summary
        }
        heads["summary"] = nn.ModuleDict(encoders)
        heads["outcome"] = RAPTHead(
            p.d_model, self.n_side + len(encoders), p.n_members, p.dropout,
            torch.from_numpy(target.start),
        )  # fmt: skip
        self.target, self.dropout, self.n_outputs = target, p.dropout, p.d_model

    def patient(self, batch):
        """The patient vector z (b, d)."""
        return self.represent(self.timeline(batch), *self.side(batch))

    def attention(self, batch):
        """The timeline of a batch, and the attention of the aggregation token (b, v)."""
        line = self.timeline(batch)
        side = self.shared_side(*self.side(batch))
        return line, self.trunk.weights(self.embed(line), line.time, line.mask, *side)

    def forward(self, batch):
        """Logits (b, e, k)."""
        side, there = self.side(batch)
        line = self.timeline(batch)
        if self.training and self.dropout:
            line = hide_numbers(line, self.dropout)
        z = self.represent(line, side, there)
        vectors, here = [side], [there]
        for name, encoder in self.heads["summary"].items():
            vector, keep = self.one_vector(encoder, batch, name, "summary")
            vectors.append(vector[:, None])
            here.append(keep[:, None])
        logits = self.heads["outcome"](z, torch.cat(vectors, 1), torch.cat(here, 1))
        return logits.unflatten(0, (-1, self.n_members))

    def losses(self, batch):
        """One term: the outcome."""
        return {"outcome": self.target.loss(self(batch), batch.y, batch.weight)}


# ---------------------------------------------------------------- estimators


class _RAPT(TimelineMixin):
    """What pretrainer, classifier and regressor share: checks of the encoder's parameters."""

    def _check_params(self):
        super()._check_params()
        check_option(self.attention, "attention", ATTENTION)
        for name in ("d_model", "n_members", "n_heads", "n_layers"):
            check_scalar(getattr(self, name), name, Integral, min_val=1)
        if self.head_width is not None:
            check_scalar(self.head_width, "head_width", Integral, min_val=1)


class RAPTPretrainer(_RAPT, TorchEncoder):
    """Pretraining of a time-aware transformer on visits, without labels.

    Parameters
    ----------
    modalities : dict of str to Modality, or None, default=None
        `Visits` and `Events` give the visits; `Tabular` and `Labs` stand beside them. As
        ``pretrained=`` of a classifier, None inherits the classifier's.
    d_model : int, default=32
        Width of a visit's vector and of the patient vector.
    n_members : int, default=8
        Networks of `Tabular` modalities, trained side by side; as in the classifier.
    n_heads, n_layers : int, default=4 and 1
    head_width : int or None, default=None
        Width of an attention head; None divides `d_model` among them, the paper's is `d_model`.
    attention : {"position", "gap", "release", "plain"}, default="position"
        How attention reads time: by the difference of position encodings (the paper), by a slope
        times log(1 + gap), by the release's table of positions, or as in the plain transformer.
    shared_token : bool, default=False
        One learned vector for aggregating and masking, as in the release.
    bin : float or None, default=None
        Width of the bins that make visits of `Events`, in their `time_unit`; None is 1, or what
        the classifier has.
    max_visits : int or None, default=None
        Latest bins kept of an `Events`; None is 64, or what the classifier has. `Visits` have a
        parameter of their own.
    similarity_weight, masked_weight, reasonability_weight : float, default=0.2, 0.3 and 0.5
        Weights of the tasks; 0 leaves one out.
    margin : float, default=3.0
        Distance beyond which patients that are not alike need not be moved apart.
    hinge : bool, default=True
        False also pulls back pairs beyond the margin, as the release does.
    similar_share : float, default=0.15
        Share of the training pairs, the closest, that count as alike; the same of the furthest
        count as apart.
    mask_share : float, default=0.3
        Share of the visits masked.
    augment : object with ``sample(n)``, or None, default=None
        Gives n generated rows with the columns of X, for example `VisitGAN`; cloned and fitted to
        the training rows where it has ``fit``. They are pretrained on beside the real ones.
    n_generated : int or None, default=None
        Generated rows; None is as many as there are training rows.
    max_epochs : int, default=5
        The learning rate falls along a cosine to zero over these epochs; each has three passes.
    pretrained, freeze, batch_size, lr, weight_decay, patience, validation_fraction : optional
        See `ehrfuse.base.TorchEstimator`.
    groups, memory, amp, random_state, device, verbose : optional
        See `ehrfuse.base.TorchEstimator`.

    Attributes
    ----------
    modalities_ : dict of fitted Modality
    similarity_thresholds_ : tuple of float
        Distances of statistics below which training pairs count as alike, above which as apart.
    augment_ : object
        What gave the generated rows.
    module_ : torch module
    history_ : list of dict
        One entry per epoch.

    See Also
    --------
    RAPTClassifier : Takes this as ``pretrained=``.
    VisitGAN : Makes generated patients.

    Notes
    -----
    Differences from the paper's release are those of `RAPTClassifier`, and of the tasks
    (marked ``NOTE[DIFF]`` where they stand):

    * patients are compared by statistics of all their numbers, with thresholds learned from the
      training rows, instead of by four raw numbers and constants;
    * masked visits are guessed in everything that was measured, not in four routine numbers;
    * donors of the reasonability task are real visits of other patients.

    Without `Visits` or `Events` there is nothing to pretrain on, and the patient vector is that of
    an untrained network.

    References
    ----------
    Ren, Wang, Zhao, Wu: RAPT: Pre-training of time-aware transformer for learning robust healthcare
    representation. KDD 2021, 3503-3511; doi:10.1145/3447548.3467069.

    Examples
    --------
    >>> from ehrfuse import RAPTPretrainer, Tabular, Visits
    >>> from ehrfuse.datasets import make_ehr
    >>> X, _ = make_ehr(n_samples=60, random_state=0)
    >>> modalities = {"vitals": Tabular(["age", "heart_rate"]), "history": Visits("visits")}
    >>> encoder = RAPTPretrainer(modalities, d_model=8, max_epochs=2, random_state=0)
    >>> encoder.fit_transform(X).shape
    (60, 8)
    """

    def __init__(
        self,
        modalities=None,
        *,
        d_model=32,
        n_members=8,
        n_heads=4,
        n_layers=1,
        head_width=None,
        attention="position",
        shared_token=False,
        bin=None,
        max_visits=None,
        similarity_weight=0.2,
        masked_weight=0.3,
        reasonability_weight=0.5,
        margin=3.0,
        hinge=True,
        similar_share=0.15,
        mask_share=0.3,
        augment=None,
        n_generated=None,
        pretrained=None,
        freeze=(),
        max_epochs=5,
        batch_size="auto",
        lr=2e-3,
        weight_decay=1.0,
        patience=None,
        validation_fraction=None,
        groups=None,
        memory=None,
        amp=False,
        random_state=None,
        device=None,
        verbose=None,
    ):
        super().__init__(
            modalities, pretrained=pretrained, freeze=freeze, max_epochs=max_epochs,
            batch_size=batch_size, lr=lr, weight_decay=weight_decay, patience=patience,
            validation_fraction=validation_fraction, groups=groups, memory=memory, amp=amp,
            random_state=random_state, device=device, verbose=verbose,
        )  # fmt: skip
        self.d_model = d_model
        self.n_members = n_members
        self.n_heads = n_heads
        self.n_layers = n_layers
        self.head_width = head_width
        self.attention = attention
        self.shared_token = shared_token
        self.bin = bin
        self.max_visits = max_visits
        self.similarity_weight = similarity_weight
        self.masked_weight = masked_weight
        self.reasonability_weight = reasonability_weight
        self.margin = margin
        self.hinge = hinge
        self.similar_share = similar_share
        self.mask_share = mask_share
        self.augment = augment
        self.n_generated = n_generated

    def _check_params(self):
        super()._check_params()
        weights = ("similarity_weight", "masked_weight", "reasonability_weight")
        for name in (*weights, "margin"):
            check_scalar(getattr(self, name), name, Real, min_val=0)
        if not any(getattr(self, name) for name in weights):
            raise ValueError(
                f"{', '.join(weights)} are all 0: there is nothing to learn from; make one of them "
                "positive."
            )
        check_scalar(self.similar_share, "similar_share", Real, min_val=0, max_val=0.5)
        check_scalar(
            self.mask_share, "mask_share", Real, min_val=0, max_val=1, include_boundaries="neither"
        )
        if self.augment is not None and not hasattr(self.augment, "sample"):
            raise ValueError(
                f"augment={self.augment!r} has no method sample(n); give an object that makes n "
                "rows with the columns of X, such as VisitGAN, or None."
            )

    def _make_core(self, modalities, target):
        return RAPTPretrainCore(modalities, self)

    def _fit_modalities(self, X, declared):
        super()._fit_modalities(X, declared)
        self.augment_ = self.augment
        if hasattr(self.augment, "fit"):
            self.augment_ = clone(self.augment)
            params = self.augment_.get_params(deep=False)
            if "random_state" in params and params["random_state"] is None:
                self.augment_.set_params(random_state=self.random_state)
            self.augment_.fit(X, None)

    def _train(self, data, validation, seed, device):
        if self.augment_ is not None:
            n = len(data) if self.n_generated is None else self.n_generated
            made = self.augment_.sample(n)
            made = made.reindex(columns=list(self.feature_names_in_))
            data = data.followed_by(self._data(made, weight=np.ones(n, "float32")))
        return super()._train(data, validation, seed, device)

    def _prepare(self, core, data, seed):
        device = next(core.parameters()).device
        part = core.heads["similarity"]
        with torch.no_grad():
            cuts = np.array_split(np.arange(len(data)), max(1, len(data) // 256))
            tables = [statistics(core.timeline(data.batch(cut).to(device))).cpu() for cut in cuts]
            part.learn(torch.cat(tables).to(device), seed)
        self.similarity_thresholds_ = tuple(part.thresholds.tolist())


class _RAPTOutcome(_RAPT):
    """What classifier and regressor share: the core, and views of its parts."""

    def _make_core(self, modalities, target):
        return RAPTCore(modalities, target, self)

    def represent(self, X):
        """Patient vectors of the fitted network.

        Parameters
        ----------
        X : DataFrame of shape (n_samples, n_columns), or array if `modalities` is None

        Returns
        -------
        z : array of shape (n_samples, d_model)
        """
        check_is_fitted(self)
        return self._predict(X, View(self.module_, "patient"))

    def explain(self, X):
        """Attention that the patient vector pays to the visits.

        Parameters
        ----------
        X : DataFrame of shape (n_samples, n_columns)

        Returns
        -------
        frame : DataFrame
            One line per row and visit: ``row`` (position in X), ``visit`` (position in the
            history), ``time``, ``modality``, ``feature`` and ``weight``, the mean over heads in the
            last layer. The rest to one is attention to what has no time.

        Raises
        ------
        ValueError
            If no modality has visits.

        See Also
        --------
        ehrfuse.evaluation.sensitivity : What changes without a value; holds for any model.
        """
        check_is_fitted(self)
        if not self.module_.tracks:
            raise ValueError(
                "No modality has visits, so there is no attention to show; "
                "declare Visits or Events."
            )
        return self._attention_frame(X)

    def stages(self, X):
        """Patient vectors before training, after pretraining and after fine-tuning.

        Parameters
        ----------
        X : DataFrame of shape (n_samples, n_columns), or array if `modalities` is None

        Returns
        -------
        vectors : dict of str to array of shape (n_samples, d_model)
            ``"random"``, ``"pretrained"`` (where there was pretraining) and ``"fine-tuned"``.
        """
        fitted = self.represent(X)
        fresh = type(self)(**self.built_with_)._make_core(self.modalities_, self.target_)
        found = {"random": self._predict(X, View(fresh, "patient"))}
        if self.pretrained_ is not None:
            found["pretrained"] = self.pretrained_.transform(X)
        return found | {"fine-tuned": fitted}


class RAPTClassifier(_RAPTOutcome, TorchClassifier):
    """Time-aware transformer over the visits of a patient, for classes.

    Parameters
    ----------
    modalities : dict of str to Modality, or None, default=None
        `Visits` and `Events` give the visits, merged into one timeline; `Tabular` and `Labs` stand
        beside them. ``"drop"`` leaves one out. None takes all columns as one table.
    d_model : int, default=32
        Width of a visit's vector and of the patient vector.
    n_members : int, default=8
        Small networks on the patient vector and on what stands beside it, trained side by side;
        their probabilities are averaged. The transformer is one.
    n_heads, n_layers : int, default=4 and 1
    head_width : int or None, default=None
        Width of an attention head; None divides `d_model` among them, the paper's is `d_model`.
    attention : {"position", "gap", "release", "plain"}, default="position"
        How attention reads time: by the difference of position encodings (the paper), by a slope
        times log(1 + gap), by the release's table of positions, or as in the plain transformer.
    shared_token : bool, default=False
        One learned vector for aggregating and masking, as in the release.
    summary : bool, default=True
        The head also reads the summary statistics of every `Events`.
    bin : float or None, default=None
        Width of the bins that make visits of `Events`, in their `time_unit`; None is 1.
    max_visits : int or None, default=None
        Latest bins kept of an `Events`; None is 64. `Visits` have a parameter of their own.
    dropout : float, default=0.2
        On the patient vector before the head, and share of a visit's numbers hidden from every
        training row: a network on a few thousand rows otherwise leans on few of them.
    class_weight : dict, "balanced" or None, default=None
        Weights of the classes in the loss; probabilities shift with them.
    pretrained, freeze, max_epochs, batch_size, lr, weight_decay, patience : optional
        See `ehrfuse.base.TorchEstimator`.
    validation_fraction, groups, memory, amp, random_state, device, verbose : optional
        See `ehrfuse.base.TorchEstimator`.

    Attributes
    ----------
    classes_ : array of shape (n_classes,)
    target_names_ : list of str
        Names of the tasks, if there are several.
    modalities_ : dict of fitted Modality
    module_ : torch module
    history_ : list of dict
        One entry per epoch.

    See Also
    --------
    RAPTPretrainer : Goes into `pretrained`.
    SequenceClassifier : The baselines.

    Notes
    -----
    The attention score between tokens i and j has the summand ``w' |p_i - p_j|`` with p the
    sinusoids of their times and w learned for every head. A visit's vector is linear in the value
    (the last one before where it was not measured), in whether it was measured and in the time
    since it was measured last, on a logarithmic scale.

    Differences from the paper's release (marked ``NOTE[DIFF]`` where they stand):

    * separate vectors for aggregating and masking, and what has no time stands beside the
      aggregation token instead of in every visit;
    * the head also reads the vectors of what has no time and, with ``summary=True``, the summary
      statistics of every `Events`; several small heads are averaged;
    * time is a real number and the frequencies fall (the release's grow to 10,000 per week, its
      table of 128 whole weeks is trained: ``attention="release"``);
    * equal times are one visit, so the order of records of one time cannot matter;
    * holes come as value, mask and time since last instead of imputed values.

    References
    ----------
    Ren, Wang, Zhao, Wu: RAPT: Pre-training of time-aware transformer for learning robust healthcare
    representation. KDD 2021, 3503-3511; doi:10.1145/3447548.3467069.

    Examples
    --------
    >>> from ehrfuse import RAPTClassifier, RAPTPretrainer, Tabular, Visits
    >>> from ehrfuse.datasets import make_ehr
    >>> X, y = make_ehr(n_samples=60, random_state=0)
    >>> modalities = {"vitals": Tabular(["age", "heart_rate"]), "history": Visits("visits")}
    >>> encoder = RAPTPretrainer(d_model=8, n_members=2, max_epochs=2)
    >>> clf = RAPTClassifier(
    ...     modalities, d_model=8, n_members=2, max_epochs=2, pretrained=encoder, random_state=0
    ... )
    >>> clf.fit(X, y).predict_proba(X).shape
    (60, 2)
    >>> clf.transferred_
    ['encoders.vitals', 'encoders.history', 'trunk']
    """

    def __init__(
        self,
        modalities=None,
        *,
        d_model=32,
        n_members=8,
        n_heads=4,
        n_layers=1,
        head_width=None,
        attention="position",
        shared_token=False,
        summary=True,
        bin=None,
        max_visits=None,
        dropout=0.2,
        class_weight=None,
        pretrained=None,
        freeze=(),
        max_epochs=10,
        batch_size="auto",
        lr=2e-3,
        weight_decay=1.0,
        patience=None,
        validation_fraction=None,
        groups=None,
        memory=None,
        amp=False,
        random_state=None,
        device=None,
        verbose=None,
    ):
        super().__init__(
            modalities, pretrained=pretrained, freeze=freeze, max_epochs=max_epochs,
            batch_size=batch_size, lr=lr, weight_decay=weight_decay, patience=patience,
            validation_fraction=validation_fraction, groups=groups, memory=memory, amp=amp,
            random_state=random_state, device=device, verbose=verbose,
        )  # fmt: skip
        self.d_model = d_model
        self.n_members = n_members
        self.n_heads = n_heads
        self.n_layers = n_layers
        self.head_width = head_width
        self.attention = attention
        self.shared_token = shared_token
        self.summary = summary
        self.bin = bin
        self.max_visits = max_visits
        self.dropout = dropout
        self.class_weight = class_weight


class RAPTRegressor(_RAPTOutcome, TorchRegressor):
    """Time-aware transformer over the visits of a patient, for numbers.

    Parameters
    ----------
    modalities : dict of str to Modality, or None, default=None
        `Visits` and `Events` give the visits, merged into one timeline; `Tabular` and `Labs` stand
        beside them. ``"drop"`` leaves one out. None takes all columns as one table.
    d_model : int, default=32
        Width of a visit's vector and of the patient vector.
    n_members : int, default=8
        Small networks on the patient vector and on what stands beside it, trained side by side;
        their outputs are averaged. The transformer is one.
    n_heads, n_layers : int, default=4 and 1
    head_width : int or None, default=None
        Width of an attention head; None divides `d_model` among them, the paper's is `d_model`.
    attention : {"position", "gap", "release", "plain"}, default="position"
        How attention reads time: by the difference of position encodings (the paper), by a slope
        times log(1 + gap), by the release's table of positions, or as in the plain transformer.
    shared_token : bool, default=False
        One learned vector for aggregating and masking, as in the release.
    summary : bool, default=True
        The head also reads the summary statistics of every `Events`.
    bin : float or None, default=None
        Width of the bins that make visits of `Events`, in their `time_unit`; None is 1.
    max_visits : int or None, default=None
        Latest bins kept of an `Events`; None is 64. `Visits` have a parameter of their own.
    dropout : float, default=0.2
        On the patient vector before the head, and share of a visit's numbers hidden from every
        training row: a network on a few thousand rows otherwise leans on few of them.
    pretrained, freeze, max_epochs, batch_size, lr, weight_decay, patience : optional
        See `ehrfuse.base.TorchEstimator`.
    validation_fraction, groups, memory, amp, random_state, device, verbose : optional
        See `ehrfuse.base.TorchEstimator`.

    Attributes
    ----------
    modalities_ : dict of fitted Modality
    module_ : torch module
    history_ : list of dict
        One entry per epoch.

    See Also
    --------
    RAPTClassifier : The same for classes, with notes on the paper.

    References
    ----------
    Ren, Wang, Zhao, Wu: RAPT: Pre-training of time-aware transformer for learning robust healthcare
    representation. KDD 2021, 3503-3511; doi:10.1145/3447548.3467069.

    Examples
    --------
    >>> from ehrfuse import RAPTRegressor, Visits
    >>> from ehrfuse.datasets import make_ehr
    >>> X, _ = make_ehr(n_samples=60, random_state=0)
    >>> reg = RAPTRegressor({"history": Visits("visits")}, d_model=8, max_epochs=2, random_state=0)
    >>> reg.fit(X, X["age"].fillna(60)).predict(X).shape
    (60,)
    """

    def __init__(
        self,
        modalities=None,
        *,
        d_model=32,
        n_members=8,
        n_heads=4,
        n_layers=1,
        head_width=None,
        attention="position",
        shared_token=False,
        summary=True,
        bin=None,
        max_visits=None,
        dropout=0.2,
        pretrained=None,
        freeze=(),
        max_epochs=10,
        batch_size="auto",
        lr=2e-3,
        weight_decay=1.0,
        patience=None,
        validation_fraction=None,
        groups=None,
        memory=None,
        amp=False,
        random_state=None,
        device=None,
        verbose=None,
    ):
        super().__init__(
            modalities, pretrained=pretrained, freeze=freeze, max_epochs=max_epochs,
            batch_size=batch_size, lr=lr, weight_decay=weight_decay, patience=patience,
            validation_fraction=validation_fraction, groups=groups, memory=memory, amp=amp,
            random_state=random_state, device=device, verbose=verbose,
        )  # fmt: skip
        self.d_model = d_model
        self.n_members = n_members
        self.n_heads = n_heads
        self.n_layers = n_layers
        self.head_width = head_width
        self.attention = attention
        self.shared_token = shared_token
        self.summary = summary
        self.bin = bin
        self.max_visits = max_visits
        self.dropout = dropout
