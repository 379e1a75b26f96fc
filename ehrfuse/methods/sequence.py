"""The sequence networks that the field compares with, behind one estimator.

LSTM; the transformer; RETAIN (Choi et al. 2016); T-LSTM (Baytas et al. 2017); Dipole (Ma et al.
2017); GRU-D (Che et al. 2018); HiTANet (Luo et al. 2020). All read the same visits with value, mask
and time since last, and the same head; they differ in the cell.

Axes: b - batch, v - visits, f - numbers, d - d_model, k - outputs.
"""

from numbers import Integral

import numpy as np
import pandas as pd
import torch
from sklearn.utils import check_scalar
from sklearn.utils.validation import check_is_fitted
from torch import nn
from torch.nn import functional as F

from ehrfuse._runtime import check_option
from ehrfuse.base import TorchClassifier, TorchRegressor
from ehrfuse.methods._timeline import TimelineCore, TimelineMixin, visit_frame
from ehrfuse.nn.recurrent import (
    DipoleEncoder,
    GRUDEncoder,
    HiTANetEncoder,
    LSTMEncoder,
    RETAINEncoder,
    TLSTMEncoder,
    TransformerEncoder,
    Visited,
    before_last,
)
from ehrfuse.nn.timeline import features, fill

__all__ = ["SequenceClassifier", "SequenceRegressor"]

ARCHITECTURES = ("lstm", "transformer", "retain", "tlstm", "dipole", "hitanet", "grud")
WITHOUT_ATTENTION = ("lstm", "tlstm", "grud")


class NoVisits(nn.Module):
    """Stands in where no modality has visits: the vector is zero."""

    def __init__(self, d_model):
        super().__init__()
        self.n_outputs = d_model

    def forward(self, x, line, filled):
        return Visited(x.new_zeros(len(x), self.n_outputs))


class SequenceCore(TimelineCore):
    """Visits to one vector by the cell; a linear head on it and on what has no time."""

    def __init__(self, modalities, target, p):
        super().__init__(modalities, p.d_model, 1, None, nn.ModuleDict())
        self.trunk = self._cell(p)
        width = self.trunk.n_outputs + self.n_side * p.d_model
        self.heads["outcome"] = nn.Linear(width, target.n_outputs)
        with torch.no_grad():
            self.heads["outcome"].bias.copy_(torch.from_numpy(target.start))
        self.target, self.dropout, self.n_outputs = target, p.dropout, target.n_outputs

    def _cell(self, p):
        if not self.tracks:
            return NoVisits(p.d_model)
        if p.architecture == "grud":
            n_codes = sum(len(track.codes) for track in self.tracks)
            return GRUDEncoder(sum(self.widths), n_codes, p.d_model)
        return {
            "lstm": lambda: LSTMEncoder(p.d_model),
            "transformer": lambda: TransformerEncoder(p.d_model, p.n_heads, p.n_layers),
            "retain": lambda: RETAINEncoder(p.d_model),
            "tlstm": lambda: TLSTMEncoder(p.d_model),
            "dipole": lambda: DipoleEncoder(p.d_model, p.dipole_score),
            "hitanet": lambda: HiTANetEncoder(p.d_model, p.n_heads),
        }[p.architecture]()

    def read(self, batch):
        """Timeline, what was known before each visit, and what the cell makes of them."""
        line = self.timeline(batch)
        filled = fill(line)
        x = line.time.new_zeros(*line.time.shape, self.d_model)
        if not isinstance(self.trunk, GRUDEncoder):
            x = self.embed(line, filled)
        return line, filled, x, self.trunk(x, line, filled)

    def forward(self, batch):
        """Logits (b, k)."""
        *_, visited = self.read(batch)
        side, there = self.side(batch)
        side = torch.where(there[..., None], side, 0.0).flatten(1)
        row = F.dropout(torch.cat([visited.vector, side], 1), self.dropout, self.training)
        return self.heads["outcome"](row)

    def losses(self, batch):
        """One term: the outcome."""
        return {"outcome": self.target.loss(self(batch), batch.y, batch.weight)}

    def attention(self, batch):
        """The timeline of a batch, and the attention to its visits (b, v) or None."""
        line, *_, visited = self.read(batch)
        return line, visited.attention

    def contributions(self, batch):
        """RETAIN's share of every input in the logits, and all that is not of a visit.

        Returns the timeline, what each number adds (b, v, f, k), what each code adds (b, v, c, k),
        what a visit adds whatever it holds (b, v, k), and the rest (b, k): side vectors and bias.
        """
        line, filled, x, _ = self.read(batch)
        alpha, beta = self.trunk.attentions(x, line.mask)
        head = self.heads["outcome"]
        d = self.trunk.n_outputs
        # How much a unit along each direction of a visit's vector adds to each logit.
        pull = torch.einsum("bv,bvd,kd->bvdk", alpha, beta, head.weight[:, :d])
        parts = features(line, filled).split(self.widths, -1)
        words = line.words.split([len(track.codes) for track in self.tracks], -1)
        numbers, codes = [], []
        always = line.time.new_zeros(*line.time.shape, self.n_outputs)
        for track, part, said in zip(self.tracks, parts, words, strict=True):
            encoder = self.encoders[track.name]
            if encoder.numbers is not None:
                weight = encoder.numbers.weight.view(d, 3, -1)
                numbers.append(torch.einsum("bvif,dif,bvdk->bvfk", part, weight, pull))
                always = always + torch.einsum("d,bvdk->bvk", encoder.numbers.bias, pull)
            if encoder.codes is not None:
                codes.append(torch.einsum("bvc,dc,bvdk->bvck", said, encoder.codes.weight, pull))
        empty = pull[:, :, :0]
        side, there = self.side(batch)
        side = torch.where(there[..., None], side, 0.0).flatten(1)
        rest = side @ head.weight[:, d:].T + head.bias
        return (
            line, torch.cat([empty, *numbers], 2), torch.cat([empty, *codes], 2), always, rest
        )  # fmt: skip


# ---------------------------------------------------------------- estimators


class _Sequence(TimelineMixin):
    """What classifier and regressor share."""

    def _check_params(self):
        super()._check_params()
        check_option(self.architecture, "architecture", ARCHITECTURES)
        check_option(self.dipole_score, "dipole_score", ("location", "general", "concat"))
        for name in ("d_model", "n_heads", "n_layers"):
            check_scalar(getattr(self, name), name, Integral, min_val=1)

    def _make_core(self, modalities, target):
        return SequenceCore(modalities, target, self)

    def _prepare(self, core, data, validation, seed):
        device = next(core.parameters()).device
        cell = core.trunk
        if not isinstance(cell, GRUDEncoder | HiTANetEncoder):
            return data, validation
        total, count, span = 0.0, 0.0, 0.0
        with torch.no_grad():
            for cut in np.array_split(np.arange(len(data)), max(1, len(data) // 256)):
                line = core.timeline(data.batch(cut).to(device))
                total = total + torch.where(line.observed, line.value, 0.0).sum((0, 1))
                count = count + line.observed.sum((0, 1))
                span = max(span, float(before_last(line).max()))
        if isinstance(cell, GRUDEncoder):
            cell.mean.copy_(total / count.clamp(min=1))
        else:
            cell.span.fill_(span or 1.0)
        return data, validation

    def explain(self, X, output=0):
        """What the network looked at: attention to visits, or with RETAIN what each input adds.

        Parameters
        ----------
        X : DataFrame of shape (n_samples, n_columns)
        output : int, default=0
            With RETAIN: which logit (class or task; a two-class outcome has one) or value.

        Returns
        -------
        frame : DataFrame
            One line per row, visit and feature, with columns ``row`` (position in X), ``visit``
            (position in the history, first is 0), ``time``, ``modality``, ``feature`` and
            ``weight``. Attention is that to the whole visit, with the feature ``"(visit)"``, and
            sums to one over a row's visits. With RETAIN weights are parts of the logit: they add
            up to it exactly together with ``"(rest)"``, the line of what is no visit's.

        Raises
        ------
        ValueError
            If the architecture has no attention; `evaluation.sensitivity` explains any.
        """
        check_is_fitted(self)
        architecture = self.built_with_["architecture"]
        if architecture in WITHOUT_ATTENTION or not self.module_.tracks:
            raise ValueError(
                f"architecture={architecture!r} pays no attention to visits that could be shown; "
                "use evaluation.sensitivity, which asks any model what changes without a value."
            )
        if architecture != "retain":
            return self._attention_frame(X)
        check_scalar(output, "output", Integral, min_val=0, max_val=self.module_.n_outputs - 1)
        tracks = self.module_.tracks
        frames = []
        for rows, found in self._views(X, "contributions"):
            line, numbers, codes, always, rest = found
            names = [(t.name, number) for t in tracks for number in t.numbers]
            names += [(t.name, code) for t in tracks for code in t.codes]
            names += [("", "(visit)")]
            parts = torch.cat([numbers, codes, always[:, :, None]], 2)[..., output]
            frames.append(visit_frame(rows, line, parts, names, tracks[0].now))
            frames.append(pd.DataFrame({
                "row": rows, "visit": -1, "time": np.nan, "modality": "", "feature": "(rest)",
                "weight": rest[:, output].numpy(),
            }))  # fmt: skip
        frame = pd.concat(frames, ignore_index=True)
        return frame.sort_values(["row", "visit"], kind="stable", ignore_index=True)


class SequenceClassifier(_Sequence, TorchClassifier):
    """One of seven well-known sequence networks over the visits of a patient, for classes.

    Parameters
    ----------
    modalities : dict of str to Modality, or None, default=None
        `Visits` and `Events` give the visits, merged into one timeline; `Tabular` and `Labs` stand
        beside them. ``"drop"`` leaves one out. None takes all columns as one table.
    architecture : str, default="lstm"
        One of ``"lstm"``, ``"transformer"``, ``"retain"``, ``"tlstm"``, ``"dipole"``,
        ``"hitanet"`` and ``"grud"``.
    d_model : int, default=64
        Width of a visit's vector, of the cell's state and of the patient vector.
    n_heads, n_layers : int, default=4 and 1
        Of the transformer; HiTANet takes the heads.
    dipole_score : {"location", "general", "concat"}, default="general"
        How Dipole compares the last visit with those before.
    bin : float or None, default=None
        Width of the bins that make visits of `Events`, in their `time_unit`; None is 1.
    max_visits : int or None, default=None
        Latest bins kept of an `Events`; None is 64. `Visits` have a parameter of their own.
    dropout : float, default=0.5
        Before the last layer.
    class_weight : dict, "balanced" or None, default=None
        Weights of the classes in the loss; probabilities shift with them.
    max_epochs : int, default=20
        The learning rate falls along a cosine to zero over these epochs.
    weight_decay : float, default=0.1
        Of weight matrices, decoupled (AdamW).
    pretrained, freeze, batch_size, lr, patience, validation_fraction, groups : optional
        See `ehrfuse.base.TorchEstimator`.
    memory, checkpoint, amp, random_state, device, verbose : optional
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
    RAPTClassifier : The time-aware transformer with pretraining.

    Notes
    -----
    The equations stand in the docstrings of `ehrfuse.nn.recurrent`. All cells but GRU-D read visit
    vectors that are linear in value (the last one before where it was not measured), mask and time
    since last; GRU-D reads the raw numbers. Times are in the `time_unit` of the first modality that
    has visits. Differences:

    * T-LSTM takes 1 / log(e + gap) for all gaps, which its authors give for long ones;
    * HiTANet divides times by the longest training history (the release: days by 180), scales its
      time attention by the square root of the query's width (the release by that of a part of it),
      and has its norms before attention and hidden layer;
    * Dipole takes the whole history for one prediction, and has none before a first visit;
    * GRU-D has neither batch norm nor dropout of the state.

    References
    ----------
    Choi et al., RETAIN, NeurIPS 2016. Baytas et al., T-LSTM, KDD 2017. Ma et al., Dipole, KDD 2017.
    Che et al., GRU-D, Scientific Reports 2018. Luo et al., HiTANet, KDD 2020.

    Examples
    --------
    >>> from ehrfuse import SequenceClassifier, Tabular, Visits
    >>> from ehrfuse.datasets import make_ehr
    >>> X, y = make_ehr(n_samples=60, random_state=0)
    >>> modalities = {"vitals": Tabular(["age", "heart_rate"]), "history": Visits("visits")}
    >>> clf = SequenceClassifier(modalities, architecture="retain", d_model=8, max_epochs=2)
    >>> clf.fit(X, y).predict_proba(X).shape
    (60, 2)
    >>> list(clf.explain(X.head(3)))
    ['row', 'visit', 'time', 'modality', 'feature', 'weight']
    """

    def __init__(
        self,
        modalities=None,
        *,
        architecture="lstm",
        d_model=64,
        n_heads=4,
        n_layers=1,
        dipole_score="general",
        bin=None,
        max_visits=None,
        dropout=0.5,
        class_weight=None,
        pretrained=None,
        freeze=(),
        max_epochs=20,
        batch_size="auto",
        lr=2e-3,
        weight_decay=0.1,
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
        self.architecture = architecture
        self.d_model = d_model
        self.n_heads = n_heads
        self.n_layers = n_layers
        self.dipole_score = dipole_score
        self.bin = bin
        self.max_visits = max_visits
        self.dropout = dropout
        self.class_weight = class_weight


class SequenceRegressor(_Sequence, TorchRegressor):
    """One of seven well-known sequence networks over the visits of a patient, for numbers.

    Parameters
    ----------
    modalities : dict of str to Modality, or None, default=None
        `Visits` and `Events` give the visits, merged into one timeline; `Tabular` and `Labs` stand
        beside them. ``"drop"`` leaves one out. None takes all columns as one table.
    architecture : str, default="lstm"
        One of ``"lstm"``, ``"transformer"``, ``"retain"``, ``"tlstm"``, ``"dipole"``,
        ``"hitanet"`` and ``"grud"``.
    d_model : int, default=64
        Width of a visit's vector, of the cell's state and of the patient vector.
    n_heads, n_layers : int, default=4 and 1
        Of the transformer; HiTANet takes the heads.
    dipole_score : {"location", "general", "concat"}, default="general"
        How Dipole compares the last visit with those before.
    bin : float or None, default=None
        Width of the bins that make visits of `Events`, in their `time_unit`; None is 1.
    max_visits : int or None, default=None
        Latest bins kept of an `Events`; None is 64. `Visits` have a parameter of their own.
    dropout : float, default=0.5
        Before the last layer.
    max_epochs : int, default=20
        The learning rate falls along a cosine to zero over these epochs.
    weight_decay : float, default=0.1
        Of weight matrices, decoupled (AdamW).
    pretrained, freeze, batch_size, lr, patience, validation_fraction, groups : optional
        See `ehrfuse.base.TorchEstimator`.
    memory, checkpoint, amp, random_state, device, verbose : optional
        See `ehrfuse.base.TorchEstimator`.

    Attributes
    ----------
    modalities_ : dict of fitted Modality
    module_ : torch module
    history_ : list of dict
        One entry per epoch.

    See Also
    --------
    SequenceClassifier : The same for classes, with notes and references.

    Examples
    --------
    >>> from ehrfuse import SequenceRegressor, Visits
    >>> from ehrfuse.datasets import make_ehr
    >>> X, _ = make_ehr(n_samples=60, random_state=0)
    >>> reg = SequenceRegressor({"history": Visits("visits")}, architecture="grud", max_epochs=2)
    >>> reg.fit(X, X["age"].fillna(60)).predict(X).shape
    (60,)
    """

    def __init__(
        self,
        modalities=None,
        *,
        architecture="lstm",
        d_model=64,
        n_heads=4,
        n_layers=1,
        dipole_score="general",
        bin=None,
        max_visits=None,
        dropout=0.5,
        pretrained=None,
        freeze=(),
        max_epochs=20,
        batch_size="auto",
        lr=2e-3,
        weight_decay=0.1,
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
        self.architecture = architecture
        self.d_model = d_model
        self.n_heads = n_heads
        self.n_layers = n_layers
        self.dipole_score = dipole_score
        self.bin = bin
        self.max_visits = max_visits
        self.dropout = dropout
