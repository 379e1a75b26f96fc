"""The note's side of an alignment: one vector per note, whatever reads it.

Axes: b - batch, t - terms of a note, c - chunks, w - width of a note's vector.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ehrfuse.nn.fusion import AttentionPool, masked_mean


class TopicEncoder(nn.Module):
    """Weighted words to their place on fixed topics (b, w), of unit length; nothing is trained.

    Reads ``ids`` and ``weights`` (b, t), or ``vector`` (b, w) where it is computed already.

    Parameters
    ----------
    n_words, n_topics : int

    Attributes
    ----------
    topics : tensor (n_words, w)
        Set by whoever has seen the training notes.
    """

    topics: Tensor

    def __init__(self, n_words: int, n_topics: int) -> None:
        super().__init__()
        self.n_outputs = n_topics
        self.register_buffer("topics", torch.zeros(n_words, n_topics))

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        if "vector" in x:
            return x["vector"]
        weights = x["weights"].to(self.topics.dtype)
        place = torch.stack([w @ self.topics[i] for w, i in zip(weights, x["ids"], strict=True)])
        return F.normalize(place, dim=1)


class ChunkPool(nn.Module):
    """Tokens of a note's chunks to one vector (b, w): their mean, or weighted by attention."""

    def __init__(self, encoder: nn.Module, pooling: str) -> None:
        super().__init__()
        self.encoder, self.n_outputs = encoder, int(encoder.n_outputs)  # type: ignore[arg-type]
        self.pool = AttentionPool(self.n_outputs) if pooling == "attention" else None

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        tokens, mask = self.encoder(x)
        return masked_mean(tokens, mask) if self.pool is None else self.pool(tokens, mask)
