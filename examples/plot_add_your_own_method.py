"""
Add a method of your own
========================

A method is a torch core of two functions and a thin estimator with one hook. Cross-validation, grid
search, missing modalities, patient-wise validation rows, pickling and several outcomes come with
the base class.
"""

import torch
from sklearn.model_selection import cross_val_score
from torch import nn

from ehrfuse.base import TorchClassifier
from ehrfuse.datasets import make_ehr
from ehrfuse.nn.core import Core
from ehrfuse.nn.fusion import masked_mean

torch.set_num_threads(1)


# %%
# The core says what a batch predicts and what it should be judged by. ``encode`` has blanked what
# stands under null cells; terms of the loss have names and end up in ``history_``.


class MaxCore(Core):
    """Takes the largest value of every feature over the modalities that are there."""

    def __init__(self, encoders, target, d_model):
        super().__init__(encoders, heads=nn.Linear(2 * d_model, target.n_outputs))
        self.target = target

    def forward(self, batch):
        encoded = self.encode(batch)
        hidden = encoded.pooled.masked_fill(~encoded.present[..., None], -10.0)
        largest = hidden.amax(1).clamp(min=-10.0)
        return self.heads(torch.cat([largest, masked_mean(encoded.pooled, encoded.present)], 1))

    def losses(self, batch):
        return {"outcome": self.target.loss(self(batch), batch.y, batch.weight)}


# %%
# The estimator has the shared parameters and its own.


class MaxClassifier(TorchClassifier):
    """Classifier around MaxCore."""

    def __init__(
        self, modalities=None, *, d_model=16, pretrained=None, freeze=(), max_epochs=10,
        batch_size="auto", lr=5e-3, weight_decay=0.1, patience=None, validation_fraction=None,
        groups=None, memory=None, amp=False, random_state=None, device=None, verbose=None,
    ):  # fmt: skip
        super().__init__(
            modalities, pretrained=pretrained, freeze=freeze, max_epochs=max_epochs,
            batch_size=batch_size, lr=lr, weight_decay=weight_decay, patience=patience,
            validation_fraction=validation_fraction, groups=groups, memory=memory, amp=amp,
            random_state=random_state, device=device, verbose=verbose,
        )  # fmt: skip
        self.d_model = d_model

    def _make_core(self, modalities, target):
        encoders = {name: m.make_encoder(self.d_model) for name, m in modalities.items()}
        return MaxCore(encoders, target, self.d_model)


# %%
# It takes every kind of data at once.

data = make_ehr(n_samples=400, random_state=0, as_bunch=True)
clf = MaxClassifier(data.modalities, groups="subject_id", random_state=0)
scores = cross_val_score(clf, data.X, data.y, cv=3, scoring="roc_auc", error_score="raise")
print(f"AUROC {scores.mean():.3f}")
