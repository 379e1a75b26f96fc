"""What TabNet's pretrainers and predictors share: sizes, one TabNet for every table, its masks."""

from dataclasses import replace

import numpy as np
import torch
from sklearn.utils.validation import check_is_fitted
from torch import nn

from ehrfuse.base import TorchEstimator
from ehrfuse.modalities.labs import Labs
from ehrfuse.modalities.tabular import (
    TabNetTabular,
    Tabular,
    check_sizes,
    tabnet_columns,
    tabnet_encoder,
    tabnet_sizes,
)
from ehrfuse.nn.core import Core
from ehrfuse.nn.fusion import blank
from ehrfuse.nn.tabnet import Sizes

TABLES = (Tabular, Labs)
SIZES = tuple(name for name in Sizes._fields if name != "epsilon")
# Smaller and with softer masks than the library's: chosen on VAERS and PhysioNet, see the docs.
DEFAULTS = Sizes(
    n_d=64, n_a=16, n_steps=2, gamma=2.0, n_independent=1, n_shared=1, mask_type="entmax"
)
FROZEN_IN_THE_PAPER = ("embedder", "tabnet.norm", "tabnet.shared", "tabnet.splitter")


MAX_EXPLAINED = 4096  # training rows that the importance of columns is averaged over


class TableCore(Core):
    """Core whose tables are read by TabNet."""

    def tables(self, batch):
        """Name, encoder, blanked inputs and presence of every table; presence None is all."""
        for name, encoder in self.encoders.items():
            if hasattr(encoder, "tabnet"):
                keep, x = batch.present[name], batch.inputs[name]
                # Not asked on a GPU, which would have to be waited for.
                if keep.device.type == "cpu" and bool(keep.all()):
                    yield name, encoder, x, None
                else:
                    x = {key: blank(tensor, keep) for key, tensor in x.items()}
                    yield name, encoder, x, keep

    def read(self, batch, with_entropy=False):
        """One vector per row, tables side by side (b, m * d), and the mean of sum m log m."""
        rows, entropies = [], []
        for _, encoder, x, keep in self.tables(batch):
            outputs, entropy = encoder.outputs(x, with_entropy)
            row = torch.stack(outputs).sum(0)
            rows.append(row if keep is None else blank(row, keep))
            entropies.append(entropy)
        return torch.cat(rows, 1), torch.stack(entropies).mean()

    def freeze(self, prefixes):
        """Fix parts; "paper": the embeddings, the input norm, the splitter and its shared maps."""
        if prefixes == "paper":
            prefixes = [
                f"encoders.{name}.{part}"
                for name, encoder in self.encoders.items()
                if hasattr(encoder, "tabnet")
                for part in FROZEN_IN_THE_PAPER
            ]
        super().freeze(prefixes)


class Explainer(nn.Module):
    """Importance of every column and the masks of every step, side by side: (b, (1 + s) * g)."""

    def __init__(self, core):
        super().__init__()
        self.core = core

    def forward(self, batch):
        parts = []
        for _, encoder, x, keep in self.core.tables(batch):
            total, masks = encoder.tabnet.masks(encoder.features(x))
            both = torch.cat([total[None], masks])[..., : encoder.n_columns]
            both = both.transpose(0, 1)
            parts.append(both if keep is None else blank(both, keep))
        return torch.cat(parts, 2).flatten(1)


class TabNetEstimator(TorchEstimator):
    """TabNet's parameters, its encoders and what they attend to.

    A parameter of a pretrainer that is None is taken over from the estimator that it serves.
    """

    _inherits = (*TorchEstimator._inherits, *SIZES, "cat_emb_dim")

    def _check_params(self):
        super()._check_params()
        check_sizes(self)

    def _sizes(self):
        given = {name: getattr(self, name) for name in SIZES}
        return DEFAULTS._replace(**{k: v for k, v in given.items() if v is not None})

    def _table_encoders(self, modalities):
        """TabNet for every table, by name."""
        return {
            name: tabnet_encoder(modality, self._sizes_for(name, modality), self.cat_emb_dim)
            for name, modality in modalities.items()
            if isinstance(modality, TABLES)
        }

    def _sizes_for(self, name, modality):
        sizes = self._sizes()
        if isinstance(modality, TabNetTabular):
            theirs = tabnet_sizes(modality, sizes.n_d)
            odd = [key for key in SIZES if getattr(theirs, key) != getattr(sizes, key)]
            odd += ["cat_emb_dim"] if modality.cat_emb_dim != self.cat_emb_dim else []
            if odd:
                raise ValueError(
                    f"Modality {name!r} and {type(self).__name__} differ in {odd}: give both the "
                    "same values, or declare a plain Tabular, which leaves them to the estimator."
                )
        return sizes

    def _train(self, data, validation, seed, device):
        super()._train(data, validation, seed, device)
        some = replace(data, rows=data.rows[:: max(1, len(data) // MAX_EXPLAINED)])
        total = self._attention(some)[:, 0].sum(0)
        self.feature_importances_ = total / total.sum() if total.sum() > 0 else total
        return self

    def explain(self, X):
        """Tell which columns every row's output comes from.

        Parameters
        ----------
        X : DataFrame of shape (n_samples, n_columns), or array if `modalities` is None

        Returns
        -------
        importance : array of shape (n_samples, n_features_in_)
            Weight of each column of `fit` (``feature_names_in_``), every step counted by what it
            contributes; 0 for columns that are not read.
        masks : array of shape (n_steps, n_samples, n_features_in_)
            Weights of each decision step; they sum to one over the columns of a table.
        """
        check_is_fitted(self)
        found = self._attention(self._data(self._frame(X, reset=False)))
        return found[:, 0], found[:, 1:].swapaxes(0, 1)

    def _attention(self, data):
        """(n, 1 + n_steps, n_features_in_)."""
        named = {n: m for n, m in self.modalities_.items() if isinstance(m, TABLES)}
        tables = list(named.values())
        data = replace(data, blocks={name: data.blocks[name] for name in named})
        flat = self._infer(Explainer(self.module_), data)
        names = [c for m in tables for c in tabnet_columns(m)]
        found = flat.reshape(len(flat), -1, len(names))
        known = list(getattr(self, "feature_names_in_", tables[0].columns_))
        full = np.zeros((*found.shape[:2], len(known)))
        # A column may stand in several tables.
        np.add.at(full, (..., [known.index(name) for name in names]), found)
        return full
