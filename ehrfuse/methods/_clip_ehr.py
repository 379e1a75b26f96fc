"""The torch side of `ClipEHRAligner`: two readers, one space, and what draws them together.

Axes: b - batch, w - width of a note's vector, j - joint space.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ehrfuse.methods._tabnet import TableCore
from ehrfuse.nn.fusion import blank
from ehrfuse.nn.losses import clip_loss, masked_mse, siglip_loss
from ehrfuse.nn.tabnet_tables import MaskedReconstruction


class ClipCore(TableCore):
    """TabNet for the tables, a reader of the note, and their projections to one space."""

    def __init__(self, tables, notes, p):
        width = sum(e.n_outputs for e in tables.values())
        w = sum(n.n_outputs for n in notes.values())
        heads = nn.ModuleDict({
            "table": nn.Sequential(nn.Linear(width, p.embed_dim), nn.GELU(),
                                   nn.Linear(p.embed_dim, p.embed_dim)),
        })  # fmt: skip
        if notes:
            heads["note"] = nn.Sequential(nn.Linear(w, p.embed_dim), nn.GELU(),
                                          nn.Linear(p.embed_dim, p.embed_dim))  # fmt: skip
            heads["guess"] = nn.Linear(width, w)
        if p.reconstruction_weight:
            heads["reconstruction"] = nn.ModuleDict(
                {name: MaskedReconstruction(e, p.mask_ratio) for name, e in tables.items()}
            )
        super().__init__(tables, None, heads)
        self.notes = nn.ModuleDict(notes)
        self.log_scale = nn.Parameter(torch.tensor(1 / p.temperature).log())
        self.bias = nn.Parameter(torch.tensor(-10.0))
        self.loss, self.same_patient = p.loss, p.same_patient
        self.weights = (p.contrastive_weight, p.regression_weight, p.reconstruction_weight)
        self.n_outputs = p.embed_dim

    def forward(self, batch):
        """Unit vectors of records and notes side by side (b, 2 j); zero where a side is absent."""
        row, _ = self.read(batch)
        here = torch.stack([batch.present[name] for name in self.encoders], 1).any(1)
        record = blank(F.normalize(self.heads["table"](row), dim=1), here)
        if not self.notes:
            return torch.cat([record, torch.zeros_like(record)], 1)
        note, written = self.read_notes(batch)
        note = F.normalize(self.heads["note"](note), dim=1)
        return torch.cat([record, blank(note, written)], 1)

    def read_notes(self, batch):
        """Vector of a row's notes (b, w), and which rows have any (b,)."""
        found, here = [], []
        for name, reader in self.notes.items():
            keep = batch.present[name]
            x = {key: blank(tensor, keep) for key, tensor in batch.inputs[name].items()}
            found.append(blank(reader(x), keep))
            here.append(keep)
        return torch.cat(found, 1), torch.stack(here, 1).any(1)

    def losses(self, batch):
        """Contrast and regression on rows with both sides, reconstruction on all."""
        terms = {}
        contrast, regression, reconstruction = self.weights
        row, _ = self.read(batch)
        if self.notes:
            note, written = self.read_notes(batch)
            tables = torch.stack([batch.present[name] for name in self.encoders], 1).any(1)
            both = (written & tables).nonzero().squeeze(1)
            row, note = row[both], note[both]
            # NOTE[DIFF] Rows of one patient are no wrong answers for each other.
            if contrast:
                groups = None if batch.groups is None else batch.groups[both]
                terms["contrastive"] = contrast * self.contrast(row, note, groups)
            # NOTE[DIFF] The contrast alone learns what tells rows apart; this term, what notes say.
            if regression:
                known = torch.ones_like(note, dtype=torch.bool)
                guess = self.heads["guess"](row)
                terms["regression"] = regression * masked_mse(guess, note, known)
        else:
            terms["contrastive"] = row.sum() * 0.0
        if reconstruction:
            guess = self.heads["reconstruction"]
            found = [guess[name](e, x, keep, False)[0] for name, e, x, keep in self.tables(batch)]
            terms["reconstruction"] = reconstruction * torch.stack(found).mean()
        return terms

    def contrast(self, row, note, groups):
        """The loss that draws the two sides of a stay together."""
        a = F.normalize(self.heads["table"](row), dim=1)
        b = F.normalize(self.heads["note"](note), dim=1)
        scale = self.log_scale.clamp(max=np.log(100.0)).exp()
        if self.loss == "siglip":
            return siglip_loss(a, b, scale, self.bias, groups, self.same_patient)
        return clip_loss(a, b, scale, groups, self.same_patient)
