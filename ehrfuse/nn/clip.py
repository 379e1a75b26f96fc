"""The note's side of an alignment: one vector per note, whatever reads it.

Axes: b - batch, t - terms of a note, c - chunks, w - width of a note's vector.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ehrfuse.nn.backbones import BackboneEncoder
from ehrfuse.nn.fusion import AttentionPool, masked_mean


class TopicEncoder(nn.Module):
    """Weighted words to their place on fixed topics (b, w); nothing is trained.

    Reads ``ids`` and ``weights`` (b, t), or ``vector`` (b, w) where it is computed already.

    Parameters
    ----------
    n_words, n_topics : int

    Attributes
    ----------
    topics : tensor (n_words, w)
        Set by whoever has seen the training notes.
    center : tensor (w,)
        Their mean place, subtracted.
    """

    topics: Tensor
    center: Tensor

    def __init__(self, n_words: int, n_topics: int) -> None:
        super().__init__()
        self.n_outputs = n_topics
        self.register_buffer("topics", torch.zeros(n_words, n_topics))
        self.register_buffer("center", torch.zeros(n_topics))

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        if "vector" in x:
            return x["vector"]
        weights = x["weights"].to(self.topics.dtype)
        place = [w @ self.topics[i] for w, i in zip(weights, x["ids"], strict=True)]
        return torch.stack(place) - self.center


class ChunkPool(nn.Module):
    """Tokens of a note's chunks to one vector (b, w): their mean, or weighted by attention."""

    def __init__(self, encoder: nn.Module, pooling: str) -> None:
        super().__init__()
        self.encoder, self.n_outputs = encoder, int(encoder.n_outputs)  # type: ignore[arg-type]
        self.pool = AttentionPool(self.n_outputs) if pooling == "attention" else None

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        tokens, mask = self.encoder(x)
        return masked_mean(tokens, mask) if self.pool is None else self.pool(tokens, mask)


class _Reached(Exception):
    """Carries what arrives at a layer out of the forward pass that it ends."""


class _Given(nn.Module):
    """Stands in for embeddings when their place is taken by hidden states."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, input_ids: Any = None, inputs_embeds: Any = None, **_: Any) -> Tensor:
        if inputs_embeds is not None:
            return inputs_embeds
        return torch.zeros(*input_ids.shape, self.size, device=input_ids.device)  # padding


class SplitEncoder(nn.Module):
    """A text model of which the upper layers train, and the lower ones run once per chunk.

    Reads ``ids`` (b, t), or ``hidden`` (b, t, size), what arrives at the upper layers; further
    ``chunk`` and the mask, as `BackboneEncoder`, whose tokens (b, c, w) it gives.

    Parameters
    ----------
    encoder : BackboneEncoder
    n_upper : int
        Layers that train.
    """

    def __init__(self, encoder: BackboneEncoder, n_upper: int) -> None:
        super().__init__()
        self.encoder, self.n_outputs = encoder, encoder.n_outputs
        model = encoder.backbone.model
        self.holder, self.name = _layers_of(model)
        layers = self._layers()
        if n_upper >= len(layers):
            raise ValueError(
                f"trainable_layers={n_upper}, but the text model has {len(layers)} layers, of "
                "which at least one must stay fixed; choose fewer."
            )
        self.n_upper = n_upper
        for part in (model.embeddings, *layers[:-n_upper]):
            part.requires_grad_(False)  # type: ignore[operator]

    def _layers(self) -> nn.ModuleList:
        holder = self.encoder.backbone.model.get_submodule(self.holder)
        return getattr(holder, self.name)

    def train(self, mode: bool = True) -> "SplitEncoder":
        """Switch mode, except for the fixed layers."""
        super().train(mode)
        model = self.encoder.backbone.model
        for part in (model.embeddings, *self._layers()[: -self.n_upper]):
            part.eval()  # type: ignore[operator]
        return self

    def forward(self, x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        if "hidden" not in x:
            return self.encoder(x)
        encoder, hidden = self.encoder, x["hidden"]
        place = torch.arange(hidden.shape[0] * hidden.shape[1], device=hidden.device)
        place, mask, here = encoder._pack(
            place.view(hidden.shape[:2]), x["chunk"].long(), x["hidden_mask"]
        )
        if not len(place):
            return encoder.norm.weight.new_zeros(*here.shape, self.n_outputs), here
        packed = hidden.flatten(0, 1)[place * mask].to(encoder.norm.weight.dtype)
        with self._upper_only():
            model = encoder.backbone.model
            out = model(inputs_embeds=packed, attention_mask=mask.long()).last_hidden_state
        cls = encoder.backbone.pooling == "cls"
        vectors = encoder.out(encoder.norm(out[:, 0] if cls else masked_mean(out, mask)))
        return vectors.new_zeros(*here.shape, self.n_outputs).index_put((here,), vectors), here

    @contextmanager
    def _upper_only(self) -> Iterator[None]:
        """The model without embeddings and lower layers, for the time of a forward pass."""
        model = self.encoder.backbone.model
        holder, layers, embeddings = (
            model.get_submodule(self.holder),
            self._layers(),
            model.embeddings,
        )
        try:
            setattr(holder, self.name, layers[-self.n_upper :])
            model.embeddings = _Given(self.encoder.norm.normalized_shape[0])
            yield
        finally:
            setattr(holder, self.name, layers)
            model.embeddings = embeddings

    def read_once(self, ids: Tensor, lengths: Tensor, n_tokens: int = 8192) -> Tensor:
        """What arrives at the upper layers for chunks end to end, in half precision.

        Parameters
        ----------
        ids : integer tensor (t,)
        lengths : integer tensor (n,)
            Tokens of each chunk; they add up to t.
        n_tokens : int
            Padded tokens read at a time, chunks alike in length together.

        Returns
        -------
        hidden : float16 tensor (t, size), on the CPU
        """
        device, size = self.encoder.norm.weight.device, self.encoder.norm.normalized_shape[0]
        hidden = torch.empty(len(ids), size, dtype=torch.float16)
        starts, order = lengths.cumsum(0) - lengths, lengths.argsort(descending=True)
        while len(order):
            longest = int(lengths[order[0]])
            n = max(1, n_tokens // longest)
            some, order = order[:n], order[n:]
            mask = torch.arange(longest) < lengths[some][:, None]
            place = (starts[some][:, None] + torch.arange(longest))[mask]
            packed = torch.full(mask.shape, self.encoder.pad, dtype=torch.long)
            packed[mask] = ids[place].long()
            hidden[place] = self.arrive(packed.to(device), mask.to(device)).cpu().half()[mask]
        return hidden

    @torch.no_grad()
    def arrive(self, ids: Tensor, mask: Tensor) -> Tensor:
        """What arrives at the upper layers (n, l, size), in eval mode."""
        model, was = self.encoder.backbone.model, self.encoder.backbone.model.training

        def stop(_: nn.Module, args: tuple, kwargs: dict) -> None:
            raise _Reached(args[0] if args else kwargs["hidden_states"])

        handle = self._layers()[-self.n_upper].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            model.eval()
            model(input_ids=ids, attention_mask=mask.long())
        except _Reached as reached:
            return reached.args[0][:, : ids.shape[1]]
        finally:
            handle.remove()
            model.train(was)
        raise RuntimeError("The text model ended before its upper layers were reached.")


def _layers_of(model: nn.Module) -> tuple[str, str]:
    """Where a text model keeps its list of layers."""
    for holder, name in (("encoder", "layer"), ("", "layers"), ("transformer", "layer"),
                         ("encoder", "layers")):  # fmt: skip
        try:
            if isinstance(getattr(model.get_submodule(holder), name), nn.ModuleList):
                return holder, name
        except AttributeError:
            continue
    raise ValueError(
        f"The layers of a {type(model).__name__} are not where BERT, Longformer, ModernBERT or "
        "DistilBERT keep theirs; use a frozen Text(model=..., trainable=False)."
    )
