"""Pretrained networks that train with the rest: a language model over the chunks of a note.

Axes: b - batch, t - tokens, c - chunks of a note, n - chunks of the batch, l - tokens of a chunk,
d - d_model.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ehrfuse.nn.fusion import masked_mean


class Backbone(nn.Module):
    """A pretrained network that gives one vector per chunk and takes smaller steps than the rest.

    Shape: ids (n, l), mask (n, l) -> (n, size).

    Parameters
    ----------
    model : Module
        Called with ``input_ids`` and ``attention_mask``, returns an object with
        ``last_hidden_state`` (n, l, size).
    pooling : {"mean", "cls", "last"}
    lr_scale : float
        Multiple of the learning rate.
    pretrained : bool
        Whether the weights are there already. A network that was built from its configuration
        refuses to run until `load_state_dict` has brought them.
    """

    def __init__(self, model: nn.Module, pooling: str, lr_scale: float, pretrained: bool) -> None:
        super().__init__()
        self.model, self.pooling, self.lr_scale = model, pooling, lr_scale
        self.ready = pretrained
        for name, parameter in model.named_parameters():
            if "pooler" in name:  # not part of the output, so it would never get a gradient
                parameter.requires_grad_(False)
        self.register_load_state_dict_post_hook(_now_ready)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        if not self.ready:
            raise RuntimeError(
                "This text backbone has random weights: it was rebuilt from a stored estimator "
                "without them; load the estimator as a whole, or fit again."
            )
        hidden = self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        if self.pooling == "last":
            return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
        return hidden[:, 0] if self.pooling == "cls" else masked_mean(hidden, mask)


def _now_ready(module: Any, keys: Any) -> None:
    module.ready = True


class BackboneEncoder(nn.Module):
    """Token numbers of a chunked note to one token per chunk.

    Reads ``ids`` (b, t), ``chunk`` (b, t), the number of the chunk that a token belongs to, and
    ``ids_mask`` (b, t). Chunks of all notes are rows of one batch for the backbone.
    """

    def __init__(
        self, backbone: Backbone, size: int, d_model: int, pad: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.backbone, self.pad, self.n_outputs = backbone, pad, d_model
        self.norm = nn.LayerNorm(size)
        self.out = nn.Sequential(nn.Dropout(dropout), nn.Linear(size, d_model))

    def forward(self, x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        ids, mask, here = self._pack(x["ids"], x["chunk"].long(), x["ids_mask"])
        if not len(ids):  # no row of the batch has a note
            return self.norm.weight.new_zeros(*here.shape, self.n_outputs), here
        vectors = self.out(self.norm(self.backbone(ids, mask)))
        return vectors.new_zeros(*here.shape, self.n_outputs).index_put((here,), vectors), here

    def _pack(self, ids: Tensor, chunk: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Chunks as rows: ids (n, l), mask (n, l), and which chunks there are (b, c)."""
        n_chunks = int(chunk.max()) + 1
        length = torch.zeros(len(ids), n_chunks, dtype=torch.long, device=ids.device)
        length.scatter_add_(1, chunk, keep.long())
        here = length > 0
        row = (here.flatten().cumsum(0) - 1).view_as(here).gather(1, chunk)
        start = length.cumsum(1) - length
        place = torch.arange(ids.shape[1], device=ids.device) - start.gather(1, chunk)
        mask = torch.arange(int(length.max()), device=ids.device) < length[here][:, None]
        packed = torch.full(mask.shape, self.pad, dtype=torch.long, device=ids.device)
        packed[row[keep], place[keep]] = ids[keep].long()
        return packed, mask, here
