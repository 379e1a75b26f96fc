"""The torch side of MEDFuse: branches, joint, linear path. The estimator is in `medfuse`.

Axes: b - batch, e - ensemble members, t - tokens, q - joint tokens, d - d_model, k - outputs.
"""

from dataclasses import replace

import torch
from torch import nn

from ehrfuse.nn.core import Core
from ehrfuse.nn.disentangled import Disentangled, MutualInformation, collapse
from ehrfuse.nn.lab_transformer import pack
from ehrfuse.nn.members import MemberLinear

PATH = "linear path"  # no identifier, so no modality is called so


class MEDFuseCore(Core):
    """Encoders of both branches, the disentangled transformer, one hidden layer per member.

    NOTE[DIFF] A linear path from words and values to the outputs stands below it, and the network
    learns what that leaves over: a few hundred rows teach a linear model more about rare words. On
    training rows it gives the log-odds of models that have not seen the row.
    """

    def __init__(self, encoders, is_text, target, p, linear):
        trunk = Disentangled(p.d_model, p.n_heads, p.n_layers, p.joint)
        width = len(trunk.parts) * p.d_model
        start = torch.from_numpy(target.start) * (linear is None)
        heads = nn.Sequential(
            nn.Dropout(p.dropout), MemberLinear(p.n_members, width, 2 * p.d_model), nn.ReLU(),
            nn.Dropout(p.dropout),
            MemberLinear(p.n_members, 2 * p.d_model, target.n_outputs, start),
        )  # fmt: skip
        super().__init__(encoders, trunk, heads)
        self.target, self.is_text, self.width = target, is_text, p.d_model
        self.members, self.modality_dropout = p.n_members, p.modality_dropout
        self.value_dropout = p.value_dropout
        self.linear = linear
        if linear is not None:  # begin with what the path says
            nn.init.zeros_(heads[-1].weight)
        self.mi_weight, self.mi_steps, self.guard_weight = p.mi_weight, p.mi_steps, p.guard_weight
        if p.joint == "none":
            self.mi_weight = self.guard_weight = 0.0
        self.mutual = MutualInformation(2 * p.d_model, p.d_model) if self.mi_weight else None
        self._seen = None

    def forward(self, batch):
        """Logits (b, e, k)."""
        return self._predict(batch, self._parts(batch))

    def _predict(self, batch, parts):
        row = torch.cat(list(parts.values()), -1).repeat_interleave(self.members, 0)
        logits = self.heads(row).unflatten(0, (-1, self.members))
        if self.linear is None:
            return logits
        if self.training and PATH in batch.inputs:
            return logits + batch.inputs[PATH]["log_odds"][:, None]
        return logits + self.linear(batch.inputs, batch.present)[:, None]

    def _parts(self, batch):
        if self.training and self.value_dropout:
            batch = replace(batch, inputs={n: self._thin(x) for n, x in batch.inputs.items()})
        encoded = self.encode(batch)
        branches = []
        for text in (True, False):
            mine = [m for m, kind in enumerate(self.is_text) if kind == text]
            tokens = [encoded.tokens[m] for m in mine]
            masks = [encoded.masks[m] for m in mine]
            if not mine:  # nobody has this branch: the learned token alone
                like = encoded.pooled
                tokens, masks = [like[:, :1] * 0.0], [torch.zeros_like(encoded.present[:, :1])]
            mask = torch.cat(masks, 1)
            # Several streams, each padded to its longest, would be attended to as mostly padding.
            found, mask = pack(mask, tokens=torch.cat(tokens, 1))
            branches.append((found["tokens"], mask))
        if self.training and self.modality_dropout:
            branches = self._hide_one(branches)
        return self.trunk(branches)

    def _thin(self, x):
        """Leave lab values out at random, as pretraining does; at least one of a row stays.

        NOTE[DIFF] The paper's summary names no such thing for the fused model.
        """
        if "code_mask" not in x:
            return x
        mask = x["code_mask"]
        keep = mask & (torch.rand(mask.shape, device=mask.device) >= self.value_dropout)
        keep |= mask & ~keep.any(1, keepdim=True)
        kept, mask = pack(keep, **{n: x[n] for n in ("code", "value", "time") if n in x})
        return kept | {"code_mask": mask}

    def _hide_one(self, branches):
        """Hide one branch of some rows that have both."""
        (a, a_mask), (b, b_mask) = branches
        both = a_mask.any(1) & b_mask.any(1)
        noise = torch.rand(len(a), device=a.device)
        half = self.modality_dropout / 2
        a_gone, b_gone = both & (noise < half), both & (noise > 1 - half)
        return [(a, a_mask & ~a_gone[:, None]), (b, b_mask & ~b_gone[:, None])]

    def losses(self, batch):
        """Outcome, mutual information of the shared part with the specific ones, collapse."""
        parts = self._parts(batch)
        logits = self._predict(batch, parts)
        terms = {"outcome": self.target.loss(logits, batch.y, batch.weight)}
        if self.mutual is not None:
            pair = _pair(parts)
            terms["mutual_information"] = self.mi_weight * self.mutual.bound(*pair)
            self._seen = tuple(x.detach() for x in pair) if self.training else self._seen
        if self.guard_weight and len(batch) > 1:
            terms["collapse"] = self.guard_weight * collapse(parts["shared"])
        return terms

    def monitor(self, terms):
        """The outcome alone: the bound is no bound while its net still learns."""
        return terms["outcome"]

    def on_step_begin(self, batch):
        """Fit the net of the bound to what the step before has seen, by its own optimiser."""
        if self.mutual is not None and self._seen is not None:
            self.mutual.learn(*self._seen, self.mi_steps)

    def loop_state(self):
        """What the bound's net saw last, and its optimiser."""
        if self._seen is None:
            return {}
        inner = self.mutual.optimizer_state()
        return {"own": self._seen[0], "shared": self._seen[1]} | inner

    def load_loop_state(self, state):
        """Put both back."""
        state = dict(state)
        if state:
            self._seen = state.pop("own"), state.pop("shared")
            self.mutual.load_optimizer_state(state)

    def param_groups(self, lr, weight_decay):
        """All parameters but those of the bound's net."""
        inner = () if self.mutual is None else self.mutual.parameters()
        own = {id(p) for p in inner}
        groups = super().param_groups(lr, weight_decay)
        kept = [g | {"params": [p for p in g["params"] if id(p) not in own]} for g in groups]
        return [g for g in kept if g["params"]]


def _pair(parts):
    """What is specific (b, 2 d), and what is shared (b, d)."""
    return torch.cat([parts["own_text"], parts["own_labs"]], 1), parts["shared"]
