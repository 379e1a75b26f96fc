"""What a pretrainer hands over: fitted on the training rows, encoders by name, heads never."""

from pathlib import Path

from sklearn.base import clone
from sklearn.utils.validation import check_memory

from ehrfuse._patterns import kind_names, modality_columns

INHERITED = ("random_state", "groups", "device")  # where a pretrainer leaves them None


class Handover:
    """The part of `TorchEstimator` that fits ``pretrained=`` and takes over what it learned."""

    _inherits: tuple[str, ...] = INHERITED

    def _fit_pretrained(self, X, declared, seed):
        self.pretrained_ = None
        if self.pretrained is None:
            return
        donor = clone(self.pretrained)  # a FrozenEstimator comes back as it is, fitted
        params = donor.get_params(deep=False)
        # What it leaves open it inherits, or random_state=0 would not fix the fit.
        wanted = getattr(donor, "_inherits", INHERITED)
        own = self.get_params(deep=False) | {"random_state": seed}
        inherit = {name: own[name] for name in wanted if name in own}
        # What this estimator ignores may be what the pretrainer learns from: a note, say.
        offered = declared | {n: self.modalities[n] for n in self.ignored_modalities_}
        kinds = getattr(donor, "_accepts", ())
        inherit["modalities"] = {n: m for n, m in offered.items() if isinstance(m, kinds)} or None
        unset = {name for name in inherit if name in params and params[name] is None}
        if kinds and "modalities" in unset and inherit["modalities"] is None:
            raise ValueError(  # it would take all columns of X, undeclared ones too
                f"`pretrained` is {type(donor).__name__}, which reads {kind_names(kinds)}; the "
                f"modalities {list(offered)} are none of these. Declare one that it reads."
            )
        donor.set_params(**{name: inherit[name] for name in unset})
        if self.checkpoint is not None and params.get("checkpoint", 0) is None:
            donor.set_params(checkpoint=Path(self.checkpoint) / "pretrained")
        donor = check_memory(self.memory).cache(_fit_donor)(donor, X)
        self._check_shared(X, declared, donor.modalities_)
        self.pretrained_ = donor

    def _check_shared(self, X, declared, fitted):
        shared = [name for name in declared if name in fitted]
        if not shared:
            raise ValueError(
                f"`pretrained` has the modalities {list(fitted)}, this estimator {list(declared)}; "
                "at least one name must be shared for anything to be taken over."
            )
        for name in shared:
            # Silently preferring either side would make `name__param` a dead axis of a grid.
            here, there = _described(declared[name], X), _described(fitted[name], X)
            if here != there:
                ours, theirs = (getattr(m[name], "declared", m[name]) for m in (declared, fitted))
                raise ValueError(
                    f"Modality {name!r} is {ours} here but {theirs} in "
                    "`pretrained`; give both the same columns and parameters."
                )

    def _take_over(self, core):
        """Encoders by name, the trunk if it is built alike, heads never."""
        self.transferred_ = []
        if self.pretrained_ is None:
            return
        donor = self.pretrained_.module_
        parts = [f"encoders.{name}" for name in core.encoders if name in donor.encoders]
        parts += [f"spread.{name}" for name in core.spread if name in donor.spread]
        # Names in the same order too: a trunk has a place for every modality.
        alike = list(core.encoders) == list(donor.encoders)
        if alike and core.trunk is not None and _build(core.trunk) == _build(donor.trunk):
            parts.append("trunk")
        for part in parts:
            ours, theirs = core.get_submodule(part), donor.get_submodule(part)
            if _build(ours) != _build(theirs):
                raise ValueError(
                    f"{part} is built otherwise in `pretrained` (another d_model, n_members or "
                    "encoder); give both estimators the same sizes."
                )
            ours.load_state_dict(theirs.state_dict())
        self.transferred_ = parts


def _fit_donor(donor, X):
    return donor.fit(X, None)


def _described(modality, X):
    """Class, parameters and resolved columns: what must agree for weights to move."""
    modality = getattr(modality, "declared", modality)  # a pretrainer may wrap what was declared
    params = modality.get_params() | {"columns": modality_columns(modality, X)}
    return type(modality), params


def _build(module):
    """What must agree for weights to move: the class and every shape."""
    shapes = {} if module is None else {k: tuple(v.shape) for k, v in module.state_dict().items()}
    return type(module).__name__, shapes
