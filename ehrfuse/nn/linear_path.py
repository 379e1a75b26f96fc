"""A linear path from what modalities hold to the outputs, beside a deep network.

Every modality is read as a weighted bag: numbers of features and their values, a few of many. One
table of weights, an embedding bag, maps all bags to outputs.

Axes: b - batch, t - entries of a bag, f - features, p - columns, k - outputs.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ehrfuse.nn.fusion import blank, masked_mean

LIMIT = 4.0  # standard deviations at most: a linear model follows an outlier anywhere
Bag = tuple[Tensor, Tensor]  # numbers of features (b, t), their values (b, t)


class WordBag(nn.Module):
    """Words of a note. Reads ``ids``, ``weights`` and ``ids_mask`` (b, t).

    Parameters
    ----------
    scale : tensor of shape (f,)
        What a term's weight is multiplied by.
    """

    scale: Tensor

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.n_features = len(scale)
        self.register_buffer("scale", scale)

    def forward(self, x: dict[str, Tensor]) -> Bag:
        ids = x["ids"].long()
        return ids, (x["weights"] * self.scale[ids]).masked_fill(~x["ids_mask"], 0.0)


class ValueBag(nn.Module):
    """Mean value of every analyte, and whether it was measured.

    Reads ``code`` (b, t), ``value`` (b, t) as normal scores with NaN for none, and
    ``code_mask`` (b, t).
    """

    def __init__(self, n_codes: int) -> None:
        super().__init__()
        self.n_codes, self.n_features = n_codes, 2 * n_codes

    def forward(self, x: dict[str, Tensor]) -> Bag:
        code, mask = x["code"].long(), x["code_mask"]
        value = x["value"].nan_to_num()
        count = value.new_zeros(len(code), self.n_codes).scatter_add_(1, code, mask.to(value))
        share = torch.where(mask, 1.0 / count.gather(1, code).clamp(min=1), 0.0)
        return torch.cat([code, code + self.n_codes], 1), torch.cat([value * share, share], 1)


class VectorBag(nn.Module):
    """A vector, or the mean of the vectors of chunks. Reads ``values`` (b, f) or ``chunks``."""

    center: Tensor
    scale: Tensor

    def __init__(self, center: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.n_features = len(center)
        self.register_buffer("center", center)
        self.register_buffer("scale", scale)

    def forward(self, x: dict[str, Tensor]) -> Bag:
        values = masked_mean(x["chunks"], x["chunks_mask"]) if "chunks" in x else x["values"]
        values = ((values - self.center) / self.scale).clamp(-LIMIT, LIMIT)
        return torch.arange(self.n_features, device=values.device).expand_as(values), values


class TableBag(nn.Module):
    """Numbers, whether they are known, and categories. Reads ``values`` (b, p), ``codes`` (b, p).

    Parameters
    ----------
    n_numbers : int
    sizes : list of int
        Number of codes of each categorical column.
    """

    first: Tensor

    def __init__(self, n_numbers: int, sizes: list[int]) -> None:
        super().__init__()
        self.n_numbers = n_numbers
        self.register_buffer("first", 2 * n_numbers + torch.tensor([0, *sizes]).cumsum(0)[:-1])
        self.n_features = 2 * n_numbers + sum(sizes)

    def forward(self, x: dict[str, Tensor]) -> Bag:
        ids, weights = [], []
        if self.n_numbers:
            known = ~x["values"].isnan()
            values = x["values"].nan_to_num().clamp(-LIMIT, LIMIT)
            weights += [values, known.to(values)]
            ids.append(torch.arange(2 * self.n_numbers, device=values.device).repeat(len(known), 1))
        if len(self.first):
            ids.append(x["codes"].long() + self.first)
            like = weights[0] if weights else self.first.to(torch.get_default_dtype())
            weights.append(like.new_ones(ids[-1].shape))
        return torch.cat(ids, 1), torch.cat(weights, 1)


class LinearPath(nn.Module):
    """Bags of all modalities to outputs (b, k): a generalised linear model.

    Its weights are buffers: they are solved for and not stepped to.

    Parameters
    ----------
    bags : dict of str to Module
        Reader of every modality; those of other modalities are left out.
    start : tensor of shape (k,)
    """

    gain: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self, bags: dict[str, nn.Module], start: Tensor) -> None:
        super().__init__()
        self.bags = nn.ModuleDict(bags)
        sizes = [int(bag.n_features) for bag in bags.values()]  # type: ignore[arg-type]
        self.first = [sum(sizes[:m]) for m in range(len(sizes))]
        self.register_buffer("gain", torch.ones(len(bags)))  # of every modality
        self.register_buffer("weight", torch.zeros(sum(sizes), len(start)))
        self.register_buffer("bias", start.clone())

    def features(self, inputs: dict[str, dict[str, Tensor]], present: dict[str, Tensor]) -> Bag:
        """Bags of all modalities side by side; those of an absent one are zero."""
        found = []
        for m, (name, bag) in enumerate(self.bags.items()):
            x = {key: blank(part, present[name]) for key, part in inputs[name].items()}
            ids, weights = bag(x)
            found.append((ids + self.first[m], blank(weights, present[name]) * self.gain[m]))
        return torch.cat([ids for ids, _ in found], 1), torch.cat([w for _, w in found], 1)

    def forward(self, inputs: dict[str, dict[str, Tensor]], present: dict[str, Tensor]) -> Tensor:
        ids, weights = self.features(inputs, present)
        if ids.device.type == "mps":  # has no weighted embedding_bag in every torch
            return self.bias + torch.einsum("bt,btk->bk", weights, F.embedding(ids, self.weight))
        return self.bias + F.embedding_bag(
            ids, self.weight, mode="sum", per_sample_weights=weights.to(self.weight.dtype)
        )
