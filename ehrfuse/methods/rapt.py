"""Pretraining of a time-aware transformer: RAPT (Ren, Wang, Zhao, Wu; KDD 2021).

Records of prenatal visits are few, short and full of holes. A transformer whose attention reads
the time between visits is pretrained by three tasks, one against each: tell patients alike from
patients apart, guess a masked visit from the others, and tell a real history from one with visits
of other patients in it. Then a head is put on it and all is trained on the outcome.

The torch side is in `_rapt`, the tasks are in `ehrfuse.nn.visit_tasks`.
"""

from numbers import Integral, Real

import numpy as np
import torch
from sklearn.base import clone
from sklearn.utils import check_scalar
from sklearn.utils.validation import check_is_fitted

from ehrfuse._runtime import check_option
from ehrfuse.base import TorchClassifier, TorchEncoder, TorchRegressor
from ehrfuse.methods._rapt import RAPTCore, RAPTPretrainCore
from ehrfuse.methods._timeline import TimelineMixin, View
from ehrfuse.nn.visit_tasks import statistics

__all__ = ["RAPTClassifier", "RAPTPretrainer", "RAPTRegressor"]

ATTENTION = ("position", "gap", "release", "plain")


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
    groups, memory, checkpoint, amp, random_state, device, verbose : optional
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

    def _prepare(self, core, data, validation, seed):
        device = next(core.parameters()).device
        part = core.heads["similarity"]
        with torch.no_grad():
            cuts = np.array_split(np.arange(len(data)), max(1, len(data) // 256))
            tables = [statistics(core.timeline(data.batch(cut).to(device))).cpu() for cut in cuts]
            part.learn(torch.cat(tables).to(device), seed)
        self.similarity_thresholds_ = tuple(part.thresholds.tolist())
        return data, validation


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
            history), ``time`` (in the unit of the first modality that has visits), ``modality``,
            ``feature`` and ``weight``, the mean over heads in the last layer. The rest to one is
            attention to what has no time.

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
        self.head_width = head_width
        self.attention = attention
        self.shared_token = shared_token
        self.summary = summary
        self.bin = bin
        self.max_visits = max_visits
        self.dropout = dropout
