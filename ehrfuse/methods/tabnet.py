"""TabNet: sequential attention over the columns of a table (Arik and Pfister, AAAI 2021).

Several decision steps each choose columns by a sparse mask and add what they find to one vector.
Pretraining hides columns and guesses them. The network is `ehrfuse.nn.tabnet`, equal to
pytorch-tabnet's; here are its estimators.

Axes: b - batch, m - tables, d - n_d, k - outputs.
"""

from numbers import Real

import torch
from sklearn.utils import check_scalar
from torch import nn

from ehrfuse.base import TorchClassifier, TorchEncoder, TorchRegressor
from ehrfuse.methods._tabnet import TABLES, TableCore, TabNetEstimator
from ehrfuse.nn.tabnet_tables import MaskedReconstruction

__all__ = ["TabNetClassifier", "TabNetPretrainer", "TabNetRegressor"]


class TabNetCore(TableCore):
    """TabNet for every table and a linear head on their vectors side by side.

    NOTE[DIFF] The head has a bias, which starts at the rate of the outcome.
    """

    def __init__(self, encoders, target, sparsity_weight, dropout):
        head = nn.Linear(sum(e.n_outputs for e in encoders.values()), target.n_outputs)
        with torch.no_grad():
            head.bias.copy_(torch.from_numpy(target.start))
        super().__init__(encoders, None, nn.Sequential(nn.Dropout(dropout), head))
        self.target, self.sparsity_weight = target, sparsity_weight

    def forward(self, batch):
        """Logits (b, k)."""
        return self.heads(self.read(batch)[0])

    def losses(self, batch):
        """The outcome, and the entropy of the masks."""
        row, entropy = self.read(batch, with_entropy=self.sparsity_weight > 0)
        terms = {"outcome": self.target.loss(self.heads(row), batch.y, batch.weight)}
        if self.sparsity_weight:
            terms["sparsity"] = -self.sparsity_weight * entropy
        return terms

    def monitor(self, terms):
        """The outcome alone chooses the epoch."""
        return terms["outcome"]


class TabNetPretrainerCore(TableCore):
    """TabNet for every table, and decoders that guess hidden columns."""

    def __init__(self, encoders, mask_ratio, sparsity_weight):
        guess = {name: MaskedReconstruction(e, mask_ratio) for name, e in encoders.items()}
        super().__init__(encoders, None, nn.ModuleDict(guess))
        self.sparsity_weight = sparsity_weight
        self.n_outputs = sum(e.n_outputs for e in encoders.values())

    def forward(self, batch):
        """The vectors of all tables (b, m * d)."""
        return self.read(batch)[0]

    def losses(self, batch):
        """Reconstruction, mean over tables, and the entropy of the masks."""
        asked = self.sparsity_weight > 0
        found = [self.heads[name](e, x, keep, asked) for name, e, x, keep in self.tables(batch)]
        loss, entropy = (torch.stack(part).mean() for part in zip(*found, strict=True))
        terms = {"reconstruction": loss}
        if self.sparsity_weight:
            terms["sparsity"] = -self.sparsity_weight * entropy
        return terms


class _TabNet(TabNetEstimator):
    """What classifier and regressor share."""

    _accepts = TABLES

    def _check_params(self):
        super()._check_params()
        check_scalar(self.lambda_sparse, "lambda_sparse", Real, min_val=0)

    def _make_core(self, modalities, target):
        encoders = self._table_encoders(modalities)
        return TabNetCore(encoders, target, self.lambda_sparse, self.dropout)


class TabNetPretrainer(TabNetEstimator, TorchEncoder):
    """Masked pretraining of TabNet on tables: guess hidden columns from the others; no labels.

    Parameters
    ----------
    modalities : dict of str to Modality, or None, default=None
        What the columns of X are; `Tabular` and `Labs` are read. As ``pretrained=`` of a
        classifier, None inherits the classifier's.
    mask_ratio : float, default=0.5
        Share of the columns hidden from every row.
    n_d, n_a, n_steps, gamma, n_independent, n_shared : optional
        See `TabNetClassifier`. None inherits the classifier's, or is its default.
    virtual_batch_size, momentum, mask_type, cat_emb_dim : optional
        See `TabNetClassifier`. None inherits the classifier's, or is its default.
    lambda_sparse : float, default=0.0
        Weight of the entropy of the masks.
    max_epochs : int, default=20
    lr : float, default=2e-2
    weight_decay : float, default=1e-4
    pretrained, freeze, batch_size, patience, validation_fraction : optional
        See `ehrfuse.base.TorchEstimator`.
    groups, memory, checkpoint : optional
        See `ehrfuse.base.TorchEstimator`.
    amp, random_state, device, verbose : optional
        See `ehrfuse.base.TorchEstimator`.

    Attributes
    ----------
    modalities_ : dict of fitted Modality
    module_ : torch module
    feature_importances_ : array of shape (`n_features_in_`,)
        Share of the attention that every column gets, over the training rows.
    history_ : list of dict
        One entry per epoch.

    See Also
    --------
    TabNetClassifier : Takes this as ``pretrained=``.
    ClipEHRAligner : Learns from notes beside the table.

    Notes
    -----
    Differences from the paper and from pytorch-tabnet (marked ``NOTE[DIFF]`` where they stand):

    * only observed cells are guessed, and a hole is a value with a flag;
    * the vector of a category is a target that stands still.

    References
    ----------
    Arik, Pfister: TabNet: attentive interpretable tabular learning. AAAI 2021; arXiv:1908.07442.

    Examples
    --------
    >>> import numpy as np
    >>> from ehrfuse import TabNetPretrainer
    >>> X = np.random.default_rng(0).normal(size=(60, 4))
    >>> X[::7, 2] = np.nan
    >>> TabNetPretrainer(n_d=8, n_a=8, max_epochs=2, random_state=0).fit_transform(X).shape
    (60, 8)
    """

    _accepts = TABLES

    def __init__(
        self,
        modalities=None,
        *,
        mask_ratio=0.5,
        n_d=None,
        n_a=None,
        n_steps=None,
        gamma=None,
        n_independent=None,
        n_shared=None,
        virtual_batch_size=None,
        momentum=None,
        mask_type=None,
        cat_emb_dim=None,
        lambda_sparse=0.0,
        pretrained=None,
        freeze=(),
        max_epochs=20,
        batch_size="auto",
        lr=2e-2,
        weight_decay=1e-4,
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
        self.mask_ratio = mask_ratio
        self.n_d = n_d
        self.n_a = n_a
        self.n_steps = n_steps
        self.gamma = gamma
        self.n_independent = n_independent
        self.n_shared = n_shared
        self.virtual_batch_size = virtual_batch_size
        self.momentum = momentum
        self.mask_type = mask_type
        self.cat_emb_dim = cat_emb_dim
        self.lambda_sparse = lambda_sparse

    def _check_params(self):
        super()._check_params()
        check_scalar(self.lambda_sparse, "lambda_sparse", Real, min_val=0)
        check_scalar(
            self.mask_ratio, "mask_ratio", Real, min_val=0, max_val=1, include_boundaries="neither"
        )

    def _make_core(self, modalities, target):
        encoders = self._table_encoders(modalities)
        return TabNetPretrainerCore(encoders, self.mask_ratio, self.lambda_sparse)


class TabNetClassifier(_TabNet, TorchClassifier):
    """TabNet on tables with holes: one outcome of several classes, or several outcomes.

    Parameters
    ----------
    modalities : dict of str to Modality, or None, default=None
        What the columns of X are; `Tabular` and `Labs` are read, each by a TabNet of its own, and
        other kinds are left to `pretrained`. None takes all columns as one table.
    n_d, n_a : int, default=64 and 16
        Width of the output and of the attention.
    n_steps : int, default=2
        Decision steps.
    gamma : float, default=2.0
        How freely a later step may attend to a column again; 1 is not at all.
    n_independent, n_shared : int, default=1 and 1
        Gated layers of each step's own, and shared by all steps.
    virtual_batch_size : int, default=128
        Rows that are normalised together in training.
    momentum : float, default=0.02
        Of the running statistics.
    mask_type : {"sparsemax", "entmax"}, default="entmax"
        What makes the weights of a step sparse; "entmax" less so.
    cat_emb_dim : int or None, default=None
        Width of a category's vector; None grows with the number of categories, to at most 16.
    lambda_sparse : float, default=1e-3
        Weight of the entropy of the masks: how few columns a step attends to.
    dropout : float, default=0.0
        Before the last layer.
    class_weight : dict, "balanced" or None, default=None
        Weights of the classes in the loss; probabilities shift with them.
    pretrained : estimator or None, default=None
        `TabNetPretrainer`, `ClipEHRAligner`, or the second with the first inside: fitted on the
        training rows, its TabNet is the start. ``FrozenEstimator(fitted)`` brings one from
        elsewhere.
    freeze : tuple of str or "paper", default=()
        Parts kept as they came. "paper" is the embeddings, the input norm, and the splitter with
        the maps that it shares with all steps, norm statistics included.
    max_epochs : int, default=20
    lr : float, default=2e-2
    weight_decay : float, default=1e-4
    batch_size, patience, validation_fraction, groups, memory, checkpoint : optional
        See `ehrfuse.base.TorchEstimator`.
    amp, random_state, device, verbose : optional
        See `ehrfuse.base.TorchEstimator`.

    Attributes
    ----------
    classes_ : array of shape (n_classes,)
    target_names_ : list of str
        Names of the tasks, if there are several.
    modalities_ : dict of fitted Modality
    module_ : torch module
    feature_importances_ : array of shape (`n_features_in_`,)
        Share of the attention that every column gets, over the training rows.
    history_ : list of dict
        One entry per epoch.

    See Also
    --------
    TabNetRegressor : The same for numbers.
    TabNetPretrainer, ClipEHRAligner : What `pretrained` may be.

    Notes
    -----
    Differences from the paper and from pytorch-tabnet (marked ``NOTE[DIFF]`` where they stand):

    * the head has a bias, which starts at the rate of the outcome;
    * a hole is zero with a flag, attended to as one with its column; the library refuses holes;
    * numbers are scaled robustly and clipped smoothly first.

    Freezing the splitter alone (``"encoders.table.tabnet.splitter"``) leaves the maps that it
    shares with the steps free. In pytorch-tabnet the parameters of ``initial_splitter`` include
    them, so that freezing it there freezes half of every step; ``freeze="paper"`` does the same.

    References
    ----------
    Arik, Pfister: TabNet: attentive interpretable tabular learning. AAAI 2021; arXiv:1908.07442.

    Examples
    --------
    >>> import numpy as np
    >>> from ehrfuse import TabNetClassifier
    >>> X = np.random.default_rng(0).normal(size=(80, 4))
    >>> y = (X[:, 1] > 0).astype(int)
    >>> clf = TabNetClassifier(n_d=8, n_a=8, max_epochs=40, random_state=0).fit(X, y)
    >>> int(clf.feature_importances_.argmax())
    1
    """

    def __init__(
        self,
        modalities=None,
        *,
        n_d=64,
        n_a=16,
        n_steps=2,
        gamma=2.0,
        n_independent=1,
        n_shared=1,
        virtual_batch_size=128,
        momentum=0.02,
        mask_type="entmax",
        cat_emb_dim=None,
        lambda_sparse=1e-3,
        dropout=0.0,
        class_weight=None,
        pretrained=None,
        freeze=(),
        max_epochs=20,
        batch_size="auto",
        lr=2e-2,
        weight_decay=1e-4,
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
        self.n_d = n_d
        self.n_a = n_a
        self.n_steps = n_steps
        self.gamma = gamma
        self.n_independent = n_independent
        self.n_shared = n_shared
        self.virtual_batch_size = virtual_batch_size
        self.momentum = momentum
        self.mask_type = mask_type
        self.cat_emb_dim = cat_emb_dim
        self.lambda_sparse = lambda_sparse
        self.dropout = dropout
        self.class_weight = class_weight


class TabNetRegressor(_TabNet, TorchRegressor):
    """TabNet on tables with holes: one or several real numbers.

    Parameters
    ----------
    modalities : dict of str to Modality, or None, default=None
        What the columns of X are; `Tabular` and `Labs` are read, other kinds are left to
        `pretrained`. None takes all columns as one table.
    n_d, n_a, n_steps, gamma, n_independent, n_shared : optional
        See `TabNetClassifier`.
    virtual_batch_size, momentum, mask_type, cat_emb_dim : optional
        See `TabNetClassifier`.
    lambda_sparse : float, default=1e-3
        Weight of the entropy of the masks.
    dropout : float, default=0.0
        Before the last layer.
    pretrained : estimator or None, default=None
        See `TabNetClassifier`.
    freeze : tuple of str or "paper", default=()
        See `TabNetClassifier`.
    max_epochs : int, default=20
    lr : float, default=2e-2
    weight_decay : float, default=1e-4
    batch_size, patience, validation_fraction, groups, memory, checkpoint : optional
        See `ehrfuse.base.TorchEstimator`.
    amp, random_state, device, verbose : optional
        See `ehrfuse.base.TorchEstimator`.

    Attributes
    ----------
    modalities_ : dict of fitted Modality
    module_ : torch module
    feature_importances_ : array of shape (`n_features_in_`,)
        Share of the attention that every column gets, over the training rows.
    history_ : list of dict
        One entry per epoch.

    See Also
    --------
    TabNetClassifier : The same for classes.

    Examples
    --------
    >>> import numpy as np
    >>> from ehrfuse import TabNetRegressor
    >>> X = np.random.default_rng(0).normal(size=(80, 4))
    >>> reg = TabNetRegressor(n_d=8, n_a=8, max_epochs=2, random_state=0).fit(X, 3 * X[:, 0])
    >>> reg.predict(X).shape
    (80,)
    """

    def __init__(
        self,
        modalities=None,
        *,
        n_d=64,
        n_a=16,
        n_steps=2,
        gamma=2.0,
        n_independent=1,
        n_shared=1,
        virtual_batch_size=128,
        momentum=0.02,
        mask_type="entmax",
        cat_emb_dim=None,
        lambda_sparse=1e-3,
        dropout=0.0,
        pretrained=None,
        freeze=(),
        max_epochs=20,
        batch_size="auto",
        lr=2e-2,
        weight_decay=1e-4,
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
        self.n_d = n_d
        self.n_a = n_a
        self.n_steps = n_steps
        self.gamma = gamma
        self.n_independent = n_independent
        self.n_shared = n_shared
        self.virtual_batch_size = virtual_batch_size
        self.momentum = momentum
        self.mask_type = mask_type
        self.cat_emb_dim = cat_emb_dim
        self.lambda_sparse = lambda_sparse
        self.dropout = dropout
