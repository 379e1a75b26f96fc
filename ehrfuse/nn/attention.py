"""Masked transformer blocks: self-attention, and cross-attention to a memory.

Axes: b - batch, t - tokens, d - d_model, h - heads.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and feed-forward over the tokens that are there.

    Shape: x (b, t, d), mask (b, t) -> (b, t, d). A row without any token gives finite numbers.
    """

    def __init__(self, d_model: int, n_heads: int, d_hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        check_heads(d_model, n_heads)
        self.n_heads, self.dropout = n_heads, dropout
        self.norm_attention, self.norm_hidden = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.qkv, self.out = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)
        self.hidden = nn.Sequential(
            nn.Linear(d_model, d_hidden), nn.GELU(), nn.Linear(d_hidden, d_model)
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self._drop(self.out(self._attend(self.norm_attention(x), mask)))
        return x + self._drop(self.hidden(self.norm_hidden(x)))

    def _attend(self, x: Tensor, mask: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.n_heads, d // self.n_heads).unbind(2)
        # A row with no key at all attends everywhere: its output is never read, but stays finite.
        keys = (mask | ~mask.any(1, keepdim=True))[:, None, None, :]
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=keys,
            dropout_p=dropout,
        )
        return y.transpose(1, 2).reshape(b, t, d)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class CrossBlock(nn.Module):
    """Pre-norm cross-attention and feed-forward: queries read a memory, not each other.

    Shape: x (b, q, d), memory (b, t, d), mask (b, t) of the memory -> (b, q, d). A row whose memory
    is empty gives finite numbers.
    """

    def __init__(self, d_model: int, n_heads: int, d_hidden: int) -> None:
        super().__init__()
        check_heads(d_model, n_heads)
        self.n_heads = n_heads
        self.norm_query, self.norm_memory = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.norm_hidden = nn.LayerNorm(d_model)
        self.query, self.out = nn.Linear(d_model, d_model), nn.Linear(d_model, d_model)
        self.key_value = nn.Linear(d_model, 2 * d_model)
        self.hidden = nn.Sequential(
            nn.Linear(d_model, d_hidden), nn.GELU(), nn.Linear(d_hidden, d_model)
        )

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        b, n, d = x.shape
        size = d // self.n_heads
        q = self.query(self.norm_query(x)).view(b, n, self.n_heads, size).transpose(1, 2)
        pair = self.key_value(self.norm_memory(memory)).view(b, -1, 2, self.n_heads, size)
        k, v = (part.transpose(1, 2) for part in pair.unbind(2))
        keys = (mask | ~mask.any(1, keepdim=True))[:, None, None, :]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=keys)
        x = x + self.out(y.transpose(1, 2).reshape(b, n, d))
        return x + self.hidden(self.norm_hidden(x))


def check_heads(width: int, n_heads: int, name: str = "d_model") -> None:
    """Raise where the width, a parameter called `name`, cannot be shared out among the heads."""
    if width % n_heads:
        raise ValueError(
            f"{name}={width} cannot be split into n_heads={n_heads}; "
            f"choose a {name} that is a multiple of n_heads."
        )


def sinusoids(time: Tensor, frequencies: Tensor) -> Tensor:
    """Sine and cosine of time (...,) at each of `frequencies` (f,): (..., 2 f)."""
    angle = time[..., None] * frequencies
    return torch.cat([angle.sin(), angle.cos()], -1)
