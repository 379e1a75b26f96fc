"""The torch side of RAPT: encoder, pretraining core, outcome core. The estimators are in `rapt`.

Axes: b - batch, e - ensemble members, v - visits, f - numbers, d - d_model, s - side vectors,
k - outputs.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ehrfuse.methods._timeline import TimelineCore
from ehrfuse.modalities import Events
from ehrfuse.nn.fusion import Absence
from ehrfuse.nn.losses import masked_mse
from ehrfuse.nn.members import MemberLinear, MemberScale
from ehrfuse.nn.timeline import TimeAwareBlock
from ehrfuse.nn.visit_tasks import Similarity, hide_numbers, hide_visits, swap_visits

# Of the transformer and its visits. The small networks beside it need few small steps; at the same
# rate the transformer had hardly begun when they were done.
LR_SCALE = 3.0


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


class RAPTPretrainCore(RAPTBase):
    """The encoder and the three tasks; each has its own forward pass.

    NOTE[DIFF] The release compares patients by four raw numbers of the last visit, with constants
    of its authors' data as thresholds; see `Similarity`.
    """

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
