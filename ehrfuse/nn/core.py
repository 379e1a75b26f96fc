"""The torch side of a method: encoders by modality, a shared trunk, task heads.

Axes: b - batch, e - ensemble members, t - tokens, m - modalities, d - d_model, k - outputs.
"""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ehrfuse.nn.fusion import blank, masked_mean
from ehrfuse.nn.members import MemberScale


class BatchLike(Protocol):
    """What a core reads of a batch (`ehrfuse._data.Batch`)."""

    @property
    def inputs(self) -> dict[str, dict[str, Tensor]]: ...
    @property
    def present(self) -> dict[str, Tensor]: ...
    @property
    def y(self) -> Tensor | None: ...
    @property
    def weight(self) -> Tensor | None: ...
    @property
    def groups(self) -> Tensor | None: ...


class Encoded(NamedTuple):
    """What `Core.encode` returns; rows are (b * e) when the core has several members."""

    tokens: list[Tensor]  # m times (b, t, d)
    masks: list[Tensor]  # m times (b, t), False where padded or absent
    pooled: Tensor  # (b, m, d)
    present: Tensor  # (b, m)


class Core(nn.Module):
    """Encoders by modality name, a shared trunk, task heads. A paper adds `forward` and `losses`.

    Parameters
    ----------
    encoders : mapping of str to Module
        Each maps the dict of one modality's tensors to tokens (b, t, d) and their mask (b, t), or
        to (b * e, t, d) when its attribute `n_members` is e; `n_outputs` states d.
    trunk : Module or None
        What all tasks share; handed over from a pretrainer when it is built alike.
    heads : Module or None
        Everything tied to the task; never handed over.
    n_members : int, default=1
        Networks trained side by side with shared weights. An encoder that knows of no members is
        run once and its tokens are scaled per member.

    Attributes
    ----------
    supervised : tuple of str
        Loss terms that are means over known labels, the others over rows: what the loop weights
        the parts of a divided batch by.
    """

    supervised: tuple[str, ...] = ("outcome",)

    def __init__(
        self,
        encoders: Mapping[str, nn.Module],
        trunk: nn.Module | None = None,
        heads: nn.Module | None = None,
        n_members: int = 1,
    ) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict(encoders)
        self.trunk, self.heads, self.n_members = trunk, heads, n_members
        self.spread = nn.ModuleDict(
            {
                name: MemberScale(n_members, int(encoder.n_outputs))  # type: ignore[arg-type]
                for name, encoder in encoders.items()
                if members_of(encoder) != n_members
            }
        )
        self._frozen: list[nn.Module] = []

    def forward(self, batch: BatchLike) -> Tensor:
        """Logits (b, e, k) or (b, k), or embeddings (b, d) for an encoder."""
        raise NotImplementedError

    def losses(self, batch: BatchLike) -> dict[str, Tensor]:
        """Named scalar terms, already weighted; the loop sums them and logs each."""
        raise NotImplementedError

    def encode(self, batch: BatchLike) -> Encoded:
        """Run every encoder; what stands under a null cell reaches neither output nor gradient."""
        tokens, masks, here = [], [], []
        for name, encoder in self.encoders.items():
            keep = batch.present[name]
            # Inputs too: a NaN behind a blanked output still ruins the gradient of the weights.
            x, mask = encoder({key: blank(t, keep) for key, t in batch.inputs[name].items()})
            if name in self.spread:
                x, mask = self.spread[name](x), mask.repeat_interleave(self.n_members, 0)
            keep = keep.repeat_interleave(self.n_members, 0)
            tokens.append(blank(x, keep))
            masks.append(blank(mask, keep))
            here.append(keep)
        pooled = [masked_mean(x, mask) for x, mask in zip(tokens, masks, strict=True)]
        return Encoded(tokens, masks, torch.stack(pooled, 1), torch.stack(here, 1))

    def freeze(self, prefixes: Iterable[str]) -> None:
        """Fix the parts named, e.g. ``"encoders.vitals"``; dropout and norms stay in eval mode."""
        self._frozen = []
        if isinstance(prefixes, str):  # its letters would be read as parts
            raise ValueError(f"freeze is one str; give a tuple of parts, ({prefixes!r},).")
        for prefix in prefixes:
            try:
                self._frozen.append(self.get_submodule(prefix))
            except AttributeError as error:
                parts = [name for name, _ in self.named_modules() if name.count(".") < 2 and name]
                raise ValueError(
                    f"freeze names {prefix!r}, which this model does not have; "
                    f"choose from {', '.join(parts)}."
                ) from error
        for part in self._frozen:
            part.requires_grad_(False)

    def train(self, mode: bool = True) -> "Core":
        """Switch mode, except for the frozen parts."""
        super().train(mode)
        for part in self._frozen:
            part.eval()
        return self

    # Hooks of the loop. A schedule that belongs to one paper lives in that paper's core.

    def param_groups(self, lr: float, weight_decay: float) -> list[dict]:
        """Optimiser groups: weight matrices decay; biases, norms and learned tokens do not.

        A module may name its own multiple of the learning rate in an attribute `lr_scale`
        (a pretrained language model takes a smaller step than a fresh head).
        """
        scale: dict[int, float] = {}
        for module in self.modules():
            if hasattr(module, "lr_scale"):
                factor = float(module.lr_scale)  # type: ignore[arg-type]
                scale |= {id(p): factor for p in module.parameters()}
        groups: dict[tuple[float, float], list] = {}
        for name, p in self.named_parameters():
            if p.requires_grad:
                decays = p.ndim > 1 and name.endswith("weight")
                key = (lr * scale.get(id(p), 1.0), weight_decay if decays else 0.0)
                groups.setdefault(key, []).append(p)
        return [{"params": p, "lr": r, "weight_decay": w} for (r, w), p in groups.items()]

    def lr_scale_at(self, progress: float) -> float:
        """Multiple of the learning rate when a share `progress` of the steps is done.

        A short linear warm-up, then a cosine to zero: the last epochs average the noise away, so
        a fit needs no validation rows to know when to stop.
        """
        return min(1.0, (progress + 1e-3) / 0.15) * 0.5 * (1 + math.cos(math.pi * progress))

    def monitor(self, terms: dict[str, Tensor]) -> Tensor:
        """What early stopping compares; override when a term's weight changes over the epochs."""
        return torch.stack(list(terms.values())).sum()

    def on_epoch_start(self, epoch: int) -> None:
        """Curricula and fading weights; runs again for an epoch that goes on after a stop."""

    def on_step_begin(self, batch: BatchLike) -> None:
        """An inner optimiser, before the outer step."""

    def on_step_end(self) -> None:
        """Moving averages, after the outer step."""

    def loop_state(self) -> dict[str, Tensor]:
        """What a core keeps between steps beside its `state_dict`, for a fit that goes on later."""
        return {}

    def load_loop_state(self, state: dict[str, Tensor]) -> None:
        """Put back what `loop_state` gave."""


def members_of(encoder: nn.Module) -> int:
    """How many members an encoder already gives; 1 unless it says otherwise."""
    return int(getattr(encoder, "n_members", 1))
