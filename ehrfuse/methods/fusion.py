"""Late fusion: the plain baseline that every system here is compared with.

Every modality is encoded by itself; one small network reads the mean of the vectors that are
present, or all of them side by side.

Axes: b - batch, e - ensemble members, m - modalities, d - d_model, k - outputs.
"""

import torch
from torch import nn

from ehrfuse._runtime import check_option
from ehrfuse.base import TorchClassifier, TorchRegressor
from ehrfuse.nn.core import Core
from ehrfuse.nn.fusion import Absence, masked_mean
from ehrfuse.nn.members import MemberLinear

__all__ = ["FusionClassifier", "FusionRegressor"]


class FusionTrunk(nn.Module):
    """Modality vectors to one vector: their mean, or all side by side, and a hidden layer.

    Shape: pooled (b * e, m, d), present (b * e, m) -> (b * e, 2 d).
    """

    def __init__(self, n_modalities, d_model, n_members, fusion):
        super().__init__()
        side_by_side = fusion == "concat"
        self.absence = Absence(n_modalities, d_model) if side_by_side else None
        # Before a mean, every modality turns its vector its own way: their units differ.
        each = () if side_by_side else range(n_modalities)
        self.turn = nn.ModuleList(MemberLinear(n_members, d_model, d_model) for _ in each)
        width = d_model * (n_modalities if side_by_side else 1)
        self.hidden = MemberLinear(n_members, width, 2 * d_model)

    def forward(self, pooled, present):
        if self.absence is not None:
            return torch.relu(self.hidden(self.absence(pooled, present).flatten(1)))
        turned = torch.stack([turn(pooled[:, m]) for m, turn in enumerate(self.turn)], 1)
        return torch.relu(self.hidden(masked_mean(turned, present)))


class FusionCore(Core):
    """Encoders, the trunk above, one linear head per member."""

    def __init__(self, encoders, target, d_model, n_members, fusion, dropout):
        trunk = FusionTrunk(len(encoders), d_model, n_members, fusion)
        start = torch.from_numpy(target.start)
        head = MemberLinear(n_members, 2 * d_model, target.n_outputs, start)
        super().__init__(encoders, trunk, nn.Sequential(nn.Dropout(dropout), head), n_members)
        self.target = target

    def forward(self, batch):
        """Logits (b, e, k)."""
        encoded = self.encode(batch)
        logits = self.heads(self.trunk(encoded.pooled, encoded.present))
        return logits.unflatten(0, (-1, self.n_members))

    def losses(self, batch):
        """One term: the outcome."""
        return {"outcome": self.target.loss(self(batch), batch.y, batch.weight)}


class _Fusion:
    """What classifier and regressor share: their own parameters and the core."""

    def _check_params(self):
        super()._check_params()
        check_option(self.fusion, "fusion", ("mean", "concat"))

    def _make_core(self, modalities, target):
        encoders = {
            name: m.make_encoder(self.d_model, self.n_members) for name, m in modalities.items()
        }
        return FusionCore(encoders, target, self.d_model, self.n_members, self.fusion, self.dropout)


class FusionClassifier(_Fusion, TorchClassifier):
    """Late fusion of any modalities into a classifier.

    Parameters
    ----------
    modalities : dict of str to Modality, or None, default=None
        What the columns of X are; ``"drop"`` leaves one out. None takes all columns as one table.
    d_model : int, default=32
        Width of a modality's vector.
    n_members : int, default=8
        Networks trained side by side; their probabilities are averaged.
    fusion : {"mean", "concat"}, default="mean"
        Average the vectors that are present, which says nothing of what is absent; or put all side
        by side, with a learned vector for an absent one.
    dropout : float, default=0.2
        Before the last layer.
    class_weight : dict, "balanced" or None, default=None
        Weights of the classes in the loss; probabilities shift with them.
    pretrained, freeze, max_epochs, batch_size, lr, weight_decay, patience : optional
        See `ehrfuse.base.TorchEstimator`.
    validation_fraction, groups, memory, checkpoint, amp, random_state, device, verbose : optional
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
    MMNARFusionClassifier : Fusion that reads what is missing.

    Examples
    --------
    >>> import numpy as np
    >>> from ehrfuse import FusionClassifier
    >>> X = np.array([[60.0, 1.0], [70.0, np.nan], [50.0, 0.0], [80.0, 1.0]] * 10)
    >>> y = np.array([0, 1, 0, 1] * 10)
    >>> clf = FusionClassifier(max_epochs=40, n_members=2, random_state=0).fit(X, y)
    >>> clf.predict_proba(X).shape
    (40, 2)
    """

    def __init__(
        self,
        modalities=None,
        *,
        d_model=32,
        n_members=8,
        fusion="mean",
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
        checkpoint=None,
        amp=False,
        random_state=None,
        device=None,
        verbose=None,
    ):
        super().__init__(
            modalities, pretrained=pretrained, freeze=freeze, max_epochs=max_epochs,
            batch_size=batch_size, lr=lr, weight_decay=weight_decay, patience=patience,
            validation_fraction=validation_fraction, groups=groups, memory=memory,
            checkpoint=checkpoint, amp=amp, random_state=random_state, device=device,
            verbose=verbose,
        )  # fmt: skip
        self.d_model = d_model
        self.n_members = n_members
        self.fusion = fusion
        self.dropout = dropout
        self.class_weight = class_weight


class FusionRegressor(_Fusion, TorchRegressor):
    """Late fusion of any modalities into a regressor.

    Parameters
    ----------
    modalities : dict of str to Modality, or None, default=None
        What the columns of X are; ``"drop"`` leaves one out. None takes all columns as one table.
    d_model : int, default=32
        Width of a modality's vector.
    n_members : int, default=8
        Networks trained side by side; their outputs are averaged.
    fusion : {"mean", "concat"}, default="mean"
        Average the vectors that are present, or put all side by side.
    dropout : float, default=0.2
        Before the last layer.
    pretrained, freeze, max_epochs, batch_size, lr, weight_decay, patience : optional
        See `ehrfuse.base.TorchEstimator`.
    validation_fraction, groups, memory, checkpoint, amp, random_state, device, verbose : optional
        See `ehrfuse.base.TorchEstimator`.

    Attributes
    ----------
    modalities_ : dict of fitted Modality
    module_ : torch module
    history_ : list of dict
        One entry per epoch.

    See Also
    --------
    FusionClassifier : The same for classes.

    Examples
    --------
    >>> import numpy as np
    >>> from ehrfuse import FusionRegressor
    >>> X = np.linspace(-1, 1, 40)[:, None]
    >>> reg = FusionRegressor(max_epochs=40, n_members=2, random_state=0).fit(X, 3 * X[:, 0])
    >>> reg.predict(X).shape
    (40,)
    """

    def __init__(
        self,
        modalities=None,
        *,
        d_model=32,
        n_members=8,
        fusion="mean",
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
        checkpoint=None,
        amp=False,
        random_state=None,
        device=None,
        verbose=None,
    ):
        super().__init__(
            modalities, pretrained=pretrained, freeze=freeze, max_epochs=max_epochs,
            batch_size=batch_size, lr=lr, weight_decay=weight_decay, patience=patience,
            validation_fraction=validation_fraction, groups=groups, memory=memory,
            checkpoint=checkpoint, amp=amp, random_state=random_state, device=device,
            verbose=verbose,
        )  # fmt: skip
        self.d_model = d_model
        self.n_members = n_members
        self.fusion = fusion
        self.dropout = dropout
