"""Fusion that reads what is missing: CRL-MMNAR (Liang, Pan, Xiong; arXiv:2509.17228, EMNLP 2025).

Which modalities a clinician ordered depends on what she saw, so the pattern of presence is itself a
measurement. Three parts: (i) fusion conditioned on the pattern, (ii) leave-one-modality-out
reconstruction with a contrastive term, (iii) outcome heads on one shared representation, and a
rectifier for what is left of the patterns' bias (`ehrfuse.Rectifier`).

Axes: b - batch, e - ensemble members, m - modalities, d - d_model, h - width of the trunk,
k - outputs.
"""

from numbers import Integral, Real

import torch
from sklearn.base import clone
from sklearn.utils import check_scalar
from sklearn.utils.validation import check_is_fitted
from torch import nn

from ehrfuse._runtime import check_option
from ehrfuse.base import TorchClassifier, TorchEncoder, with_progress
from ehrfuse.nn.attention import TransformerBlock
from ehrfuse.nn.core import Core
from ehrfuse.nn.losses import info_nce
from ehrfuse.nn.members import MemberLinear
from ehrfuse.rectifier import Rectifier

__all__ = ["MMNARFusionClassifier", "MMNARPretrainer"]


class PatternFusion(nn.Module):
    """Part (i): modality vectors to one vector, given which of them are there.

    Shape: pooled (b * e, m, d), shown (b * e, m), pattern (b * e, m) -> (b * e, h).
    `shown` says which vectors may be read, `pattern` which the clinician had; they differ
    only where training hides a modality.

    NOTE[DIFF] The release averages the tokens; here they stand side by side, an absent one as a
    learned null vector, because the mean forgets whose value it was.
    NOTE[DIFF] The release hides a modality from the gates too. Here the gates go on reading the
    true pattern: a modality hidden by chance does not mean what one left out by a clinician means.
    """

    def __init__(self, n_modalities, d_model, n_members, n_heads, n_layers, use_pattern, dropout):
        super().__init__()
        self.use_pattern = use_pattern
        self.null = nn.Parameter(torch.randn(n_modalities, d_model) * 0.02)
        self.kind = nn.Parameter(torch.randn(n_modalities, d_model) * 0.02)
        width = n_modalities * d_model
        if use_pattern:
            self.pattern = MemberLinear(n_members, n_modalities, d_model)
            self.gate = MemberLinear(n_members, d_model, width)
            width += d_model
        self.blocks = nn.ModuleList(
            TransformerBlock(d_model, n_heads, 2 * d_model, dropout) for _ in range(n_layers)
        )
        self.hidden = MemberLinear(n_members, width, 2 * d_model)
        self.n_outputs = 2 * d_model

    def forward(self, pooled, shown, pattern):
        tokens = pooled
        if self.use_pattern:
            z = torch.relu(self.pattern(2.0 * pattern.to(pooled.dtype) - 1.0))
            # Twice a sigmoid: every gate starts near one and the vectors pass as they are.
            tokens = tokens * 2.0 * torch.sigmoid(self.gate(z)).view_as(tokens)
        tokens = torch.where(shown[..., None], tokens + self.kind, self.null)
        for block in self.blocks:
            # All tokens take part, the learned nulls too, so a row without any modality is no case
            # of its own.
            tokens = block(tokens, torch.ones_like(shown))
        row = tokens.flatten(1)
        return torch.relu(self.hidden(torch.cat([row, z], 1) if self.use_pattern else row))


class Reconstruction(nn.Module):
    """Part (ii): guess the vector of a modality that was there from all the others.

    For every row one of its modalities is left out at random; rows with fewer than two do not
    take part. Two terms: squared error to the standing-still vector, and InfoNCE between the two
    with the batch's other rows as negatives.

    NOTE[DIFF] The release leaves out every modality in turn (one fusion pass each) and lets the
    target move; here one a row and a stopped gradient, so that the target cannot shrink to please.
    """

    def __init__(self, n_modalities, d_model, width, n_members, temperature):
        super().__init__()
        self.n_members, self.temperature = n_members, temperature
        self.guess = nn.ModuleList(
            nn.Sequential(MemberLinear(n_members, width, width), nn.ReLU(),
                          MemberLinear(n_members, width, d_model))
            for _ in range(n_modalities)
        )  # fmt: skip
        self.project = nn.ModuleList(nn.Linear(d_model, d_model) for _ in range(2 * n_modalities))

    def forward(self, encoded, trunk):
        e = self.n_members
        present = encoded.present[::e]
        left_out = self._choose(present)
        shown = present & ~nn.functional.one_hot(left_out, present.shape[1]).bool()
        row = trunk(encoded.pooled, shown.repeat_interleave(e, 0), encoded.present)
        row, truth = row.unflatten(0, (-1, e)), encoded.pooled.detach().unflatten(0, (-1, e))
        left_out = left_out.masked_fill(present.sum(1) < 2, -1)
        square, contrast = [row.sum() * 0.0], [row.sum() * 0.0]
        for m, guess in enumerate(self.guess):
            rows = (left_out == m).nonzero().squeeze(1)
            if len(rows):
                own, found = truth[rows, :, m], guess(row[rows].flatten(0, 1)).unflatten(0, (-1, e))
                square.append((found - own).square().mean() * len(rows))
                contrast.append(self._contrast(m, found, own) * len(rows))
        n_rows = (left_out >= 0).sum().clamp(min=1)
        return torch.stack(square).sum() / n_rows, torch.stack(contrast).sum() / n_rows

    def _choose(self, present):
        """One present modality of every row, the same for all members: (b,)."""
        noise = torch.rand(present.shape, device=present.device)
        return noise.masked_fill(~present, -1.0).argmax(1)

    def _contrast(self, m, found, truth):
        """InfoNCE within every member, whose vectors mean nothing to the others."""
        a, b = self.project[2 * m](found), self.project[2 * m + 1](truth)
        return info_nce(a.transpose(0, 1), b.transpose(0, 1), self.temperature)


class MMNARCore(Core):
    """Encoders, the pattern's fusion, reconstruction, and outcome heads if there is a target."""

    def __init__(self, encoders, target, p):
        n, d, e = len(encoders), p.d_model, p.n_members
        trunk = PatternFusion(n, d, e, p.n_heads, p.n_layers, p.pattern, p.dropout)
        heads = nn.ModuleDict()
        if target is not None:
            start = torch.from_numpy(target.start)
            head = MemberLinear(e, trunk.n_outputs, target.n_outputs, start)
            heads["outcome"] = nn.Sequential(nn.Dropout(p.dropout), head)
        self.weights = (p.reconstruction_weight, p.contrastive_weight)
        if any(self.weights):
            heads["auxiliary"] = Reconstruction(n, d, trunk.n_outputs, e, p.temperature)
        super().__init__(encoders, trunk, heads, e)
        self.target, self.modality_dropout = target, p.modality_dropout
        self.fade_epochs, self.fade = getattr(p, "fade_epochs", None), 1.0
        self.n_outputs = e * trunk.n_outputs

    def on_epoch_start(self, epoch):
        """The auxiliary terms fall to zero over `fade_epochs`; in pretraining they stay."""
        if self.fade_epochs is not None:
            self.fade = max(0.0, 1.0 - epoch / max(1, self.fade_epochs))

    def forward(self, batch):
        """Logits (b, e, k), or the representation (b, e * h) where there is no target."""
        row = self._represent(self.encode(batch))
        if self.target is None:
            return row.unflatten(0, (-1, self.n_members)).flatten(1)
        return self.heads["outcome"](row).unflatten(0, (-1, self.n_members))

    def _represent(self, encoded):
        shown = encoded.present
        if self.training and self.modality_dropout:
            shown = hide_some(shown, self.modality_dropout)
        return self.trunk(encoded.pooled, shown, encoded.present)

    def losses(self, batch):
        """Outcome, reconstruction and contrastive terms, as far as each has a weight."""
        encoded = self.encode(batch)
        terms = {}
        if self.target is not None:
            logits = self.heads["outcome"](self._represent(encoded))
            logits = logits.unflatten(0, (-1, self.n_members))
            terms["outcome"] = self.target.loss(logits, batch.y, batch.weight)
        if any(self.weights) and (self.fade > 0 or self.target is None):
            square, contrast = self.heads["auxiliary"](encoded, self.trunk)
            terms["reconstruction"] = self.fade * self.weights[0] * square
            terms["contrastive"] = self.fade * self.weights[1] * contrast
        return terms

    def monitor(self, terms):
        """The outcome alone where there is one: a fading weight must not choose the epoch."""
        return terms["outcome"] if "outcome" in terms else super().monitor(terms)


def hide_some(present, share):
    """Hide present modalities at random, at least one is left: (b, m) -> (b, m)."""
    noise = torch.rand(present.shape, device=present.device)
    shown = present & (noise >= share)
    best = noise.masked_fill(~present, -1.0).argmax(1, keepdim=True)
    return shown | (present & torch.zeros_like(present).scatter(1, best, True))


class _MMNAR:
    """What pretrainer and classifier share: checks and the core."""

    def _check_params(self):
        super()._check_params()
        for name in ("reconstruction_weight", "contrastive_weight", "modality_dropout"):
            check_scalar(getattr(self, name), name, Real, min_val=0)
        check_scalar(self.n_layers, "n_layers", Integral, min_val=0)
        check_scalar(self.temperature, "temperature", Real, min_val=1e-4)

    def _make_core(self, modalities, target):
        encoders = {
            name: m.make_encoder(self.d_model, self.n_members) for name, m in modalities.items()
        }
        return MMNARCore(encoders, target, self)


class MMNARPretrainer(_MMNAR, TorchEncoder):
    """Pretraining of encoders and fusion by guessing left-out modalities; needs no labels.

    Parameters
    ----------
    modalities : dict of str to Modality, or None, default=None
        What the columns of X are. As ``pretrained=`` of a classifier, None inherits the
        classifier's.
    d_model : int, default=32
        Width of a modality's vector.
    n_members : int, default=8
        Networks trained side by side.
    n_heads, n_layers : int, default=4 and 0
        Attention among the modality tokens; 0 layers is none.
    pattern : bool, default=True
        Condition the fusion on which modalities are there.
    reconstruction_weight, contrastive_weight : float, default=1.0 and 0.3
        Weights of the squared error and of InfoNCE.
    temperature : float, default=0.1
        Of InfoNCE.
    modality_dropout : float, default=0.0
        Unused rows of a modality while training, as a share.
    dropout : float, default=0.1
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
    MMNARFusionClassifier : Takes this as ``pretrained=``.

    Notes
    -----
    Differences from the paper's code are those of `MMNARFusionClassifier`. The release adds a term
    that decodes the pattern from a function of the pattern alone; it can be solved without looking
    at a patient, so it is left out.

    References
    ----------
    Liang, Pan, Xiong: Causal representation learning from multimodal clinical records under
    non-random modality missingness. EMNLP 2025; arXiv:2509.17228.

    Examples
    --------
    >>> from ehrfuse import Embedding, MMNARPretrainer, Tabular
    >>> from ehrfuse.datasets import make_ehr
    >>> X, _ = make_ehr(n_samples=60, random_state=0)
    >>> modalities = {"vitals": Tabular(["age", "heart_rate"]), "cxr": Embedding("cxr")}
    >>> encoder = MMNARPretrainer(modalities, d_model=8, n_members=2, max_epochs=2, random_state=0)
    >>> encoder.fit_transform(X).shape
    (60, 32)
    """

    def __init__(
        self,
        modalities=None,
        *,
        d_model=32,
        n_members=8,
        n_heads=4,
        n_layers=0,
        pattern=True,
        reconstruction_weight=1.0,
        contrastive_weight=0.3,
        temperature=0.1,
        modality_dropout=0.0,
        dropout=0.1,
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
        self.n_heads = n_heads
        self.n_layers = n_layers
        self.pattern = pattern
        self.reconstruction_weight = reconstruction_weight
        self.contrastive_weight = contrastive_weight
        self.temperature = temperature
        self.modality_dropout = modality_dropout
        self.dropout = dropout

    def _check_params(self):
        super()._check_params()
        if not (self.reconstruction_weight or self.contrastive_weight):
            raise ValueError(
                "reconstruction_weight and contrastive_weight are both 0: there is nothing to "
                "learn from; make one of them positive."
            )


class MMNARFusionClassifier(_MMNAR, TorchClassifier):
    """Fusion of any modalities under non-random missingness, with a rectifier on top.

    Parameters
    ----------
    modalities : dict of str to Modality, or None, default=None
        What the columns of X are; ``"drop"`` leaves one out. None takes all columns as one table.
        No modality is mandatory, and a row may lack all of them.
    d_model : int, default=32
        Width of a modality's vector.
    n_members : int, default=8
        Networks trained side by side; their probabilities are averaged.
    n_heads, n_layers : int, default=4 and 0
        Attention among the modality tokens; 0 layers is none.
    pattern : bool, default=True
        Part (i): condition the fusion on which modalities are there.
    reconstruction_weight, contrastive_weight : float, default=1.0 and 0.3
        Part (ii) as an auxiliary loss beside the outcome; 0 and 0 switch it off. As a stage of its
        own it is ``pretrained=MMNARPretrainer()``.
    fade_epochs : int, default=10
        Epochs over which the auxiliary terms fall to zero.
    temperature : float, default=0.1
        Of InfoNCE.
    modality_dropout : float, default=0.1
        Share of present modalities hidden from every training row; one always stays.
    rectifier : None, "holdout", "crossfit" or Rectifier, default=None
        Part (iii): correct every pattern's mean on rows that the network has not seen. "crossfit"
        fits five networks and averages them; a `Rectifier` brings its own settings, its estimator
        is replaced by this one.
    dropout : float, default=0.2
        In attention and before the last layer.
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
        Not with a rectifier; the networks are then in ``rectifier_.estimators_``.
    history_ : list of dict
        One entry per epoch; not with a rectifier.
    rectifier_ : Rectifier
        Fitted, with its ``table_``; only where `rectifier` is given.

    See Also
    --------
    FusionClassifier : The plain baseline.
    Rectifier : The correction by pattern around any classifier.

    Notes
    -----
    Differences from the paper's code (marked ``NOTE[DIFF]`` where they stand):

    * tokens stand side by side instead of being averaged, absent ones as learned null vectors;
    * a modality hidden in training stays in the pattern that the gates read;
    * one modality a row is left out per step, with a stopped gradient on the target;
    * all tasks share one representation (the release trains one network a task) with plain
      cross-entropy instead of focal loss, whose miscalibration a rectifier would only undo;
    * several small networks trained side by side replace test-time noise;
    * the rectifier works on the logit scale and never reads a row that it is judged on.

    References
    ----------
    Liang, Pan, Xiong: Causal representation learning from multimodal clinical records under
    non-random modality missingness. EMNLP 2025; arXiv:2509.17228.

    Examples
    --------
    >>> from ehrfuse import Embedding, MMNARFusionClassifier, Tabular
    >>> from ehrfuse.datasets import make_ehr
    >>> X, y = make_ehr(n_samples=60, random_state=0)
    >>> modalities = {"vitals": Tabular(["age", "heart_rate"]), "cxr": Embedding("cxr")}
    >>> clf = MMNARFusionClassifier(modalities, n_members=2, max_epochs=2, random_state=0)
    >>> clf.fit(X, y).predict_proba(X).shape
    (60, 2)
    """

    def __init__(
        self,
        modalities=None,
        *,
        d_model=32,
        n_members=8,
        n_heads=4,
        n_layers=0,
        pattern=True,
        reconstruction_weight=1.0,
        contrastive_weight=0.3,
        fade_epochs=10,
        temperature=0.1,
        modality_dropout=0.1,
        rectifier=None,
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
        self.n_heads = n_heads
        self.n_layers = n_layers
        self.pattern = pattern
        self.reconstruction_weight = reconstruction_weight
        self.contrastive_weight = contrastive_weight
        self.fade_epochs = fade_epochs
        self.temperature = temperature
        self.modality_dropout = modality_dropout
        self.rectifier = rectifier
        self.dropout = dropout
        self.class_weight = class_weight

    @with_progress
    def fit(self, X, y, sample_weight=None, *, X_val=None, y_val=None):
        """Fit to training rows.

        Parameters
        ----------
        X : DataFrame of shape (n_samples, n_columns), or array if `modalities` is None
            A missing modality is a null cell.
        y : array of shape (n_samples,), or array or DataFrame of shape (n_samples, n_tasks)
            Labels of any type; or 0, 1 and NaN (unknown) for several tasks.
        sample_weight : array of shape (n_samples,), optional
        X_val, y_val : as X and y, optional
            Validation rows of one's own instead of `validation_fraction`; not with a rectifier.

        Returns
        -------
        self : estimator
        """
        # A fit with a rectifier leaves other attributes than one without.
        for name in ("rectifier_", "module_", "history_", "n_iter_", "modalities_", "target_"):
            vars(self).pop(name, None)
        if self.rectifier is None:
            return super().fit(X, y, sample_weight, X_val=X_val, y_val=y_val)
        if X_val is not None:
            raise ValueError(
                "X_val cannot be combined with a rectifier, which splits the training rows itself; "
                "use validation_fraction."
            )
        self.rectifier_ = self._make_rectifier().fit(X, y, sample_weight=sample_weight)
        first = self.rectifier_.estimators_[0]
        for name in ("classes_", "target_names_", "feature_names_in_", "n_features_in_"):
            if hasattr(first, name):
                setattr(self, name, getattr(first, name))
        return self

    def _make_rectifier(self):
        if not isinstance(self.rectifier, Rectifier):
            check_option(self.rectifier, "rectifier", ("holdout", "crossfit", None))
        inner = clone(self).set_params(rectifier=None)
        if isinstance(self.rectifier, Rectifier):
            rectifier = clone(self.rectifier).set_params(estimator=inner)
            if rectifier.random_state is None:  # or random_state=0 would not fix the fit
                rectifier.set_params(random_state=self.random_state)
            return rectifier
        return Rectifier(
            inner, groups=self.groups, method=self.rectifier, random_state=self.random_state
        )

    def predict_proba(self, X):
        """Probability of every class, or of a positive in every task.

        Parameters
        ----------
        X : DataFrame of shape (n_samples, n_columns), or array if `modalities` is None

        Returns
        -------
        proba : array of shape (n_samples, n_classes) or (n_samples, n_tasks)
        """
        check_is_fitted(self)
        if hasattr(self, "rectifier_"):
            return self.rectifier_.predict_proba(X)
        return super().predict_proba(X)

    def predict(self, X):
        """Most probable class; with several tasks, 1 where the probability is above one half.

        Parameters
        ----------
        X : DataFrame of shape (n_samples, n_columns), or array if `modalities` is None

        Returns
        -------
        y : array of shape (n_samples,) or (n_samples, n_tasks)
        """
        check_is_fitted(self)
        if hasattr(self, "rectifier_"):
            return self.rectifier_.predict(X)
        return super().predict(X)
