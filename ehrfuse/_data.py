"""Rows in memory: a Block per modality, a Data set of blocks, and the Batch a core sees.

Nothing is parsed again after `Modality.transform`: a batch is cut from whole arrays by index.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Block:
    """One modality, all rows.

    Attributes
    ----------
    present : bool array of shape (n,)
    arrays : dict of arrays (n, ...)
    ragged : dict of (flat, offsets)
        ``flat[offsets[i]:offsets[i + 1]]`` belongs to row i; flat may have further axes.
    """

    present: np.ndarray
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    ragged: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n_rows = len(self.present)
        sizes = {name: len(array) for name, array in self.arrays.items()}
        sizes |= {name: len(offsets) - 1 for name, (_, offsets) in self.ragged.items()}
        wrong = {name: size for name, size in sizes.items() if size != n_rows}
        if wrong:
            raise ValueError(f"A Block of {n_rows} rows got parts of other lengths: {wrong}.")

    @property
    def length(self) -> np.ndarray | None:
        """Longest ragged part of every row, or None where all parts are rectangular."""
        lengths = [np.diff(offsets) for _, offsets in self.ragged.values()]
        return np.maximum.reduce(lengths) if lengths else None

    def take(self, rows: np.ndarray) -> dict[str, Tensor]:
        """Tensors of some rows; a ragged `x` comes padded (b, t, ...), with its `x_mask` (b, t)."""
        tensors = {name: torch.from_numpy(array[rows]) for name, array in self.arrays.items()}
        places: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # parts of one stream share offsets
        for name, (flat, offsets) in self.ragged.items():
            if id(offsets) not in places:
                places[id(offsets)] = _places(offsets, rows)
            mask, source = places[id(offsets)]
            padded = np.zeros(mask.shape + flat.shape[1:], flat.dtype)
            padded[mask] = flat[source]
            tensors[name] = torch.from_numpy(padded)
            tensors[f"{name}_mask"] = torch.from_numpy(mask)
        return tensors

    def followed_by(self, other: "Block") -> "Block":
        """The rows of this block, then those of another with the same parts."""
        pairs = {name: (flat, other.ragged[name]) for name, flat in self.ragged.items()}
        return Block(
            np.concatenate([self.present, other.present]),
            {name: np.concatenate([a, other.arrays[name]]) for name, a in self.arrays.items()},
            {
                name: (np.concatenate([a, b]), np.concatenate([start, start[-1] + end[1:]]))
                for name, ((a, start), (b, end)) in pairs.items()
            },
        )


def _places(offsets: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mask (b, t) of real cells and, in the same order, where they lie in the flat array."""
    start = offsets[rows]
    length = offsets[rows + 1] - start
    position = np.arange(max(1, length.max(initial=0)))
    mask = position < length[:, None]
    return mask, (start[:, None] + position)[mask]


@dataclass(frozen=True)
class Batch:
    """All modalities, some rows.

    Attributes
    ----------
    inputs : dict of dict of tensors
        ``inputs[name][key]`` has shape (b, ...).
    present : dict of bool tensors (b,)
    y : tensor (b, k) or None
        NaN where a label is unknown.
    weight : tensor (b,) or None
    groups : integer tensor (b,) or None
        Rows of one patient carry the same number.
    """

    inputs: dict[str, dict[str, Tensor]]
    present: dict[str, Tensor]
    y: Tensor | None = None
    weight: Tensor | None = None
    groups: Tensor | None = None

    def __post_init__(self) -> None:
        parts = [t for x in self.inputs.values() for t in x.values()]
        parts += list(self.present.values())
        parts += [t for t in (self.y, self.weight, self.groups) if t is not None]
        if len({len(t) for t in parts}) != 1 or self.inputs.keys() != self.present.keys():
            raise ValueError(f"Batch parts disagree: rows {[len(t) for t in parts]}.")

    def __len__(self) -> int:
        return len(next(iter(self.present.values())))

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> "Batch":
        """Move to a device; `dtype` recasts the floating-point inputs."""

        def move(tensor: Tensor) -> Tensor:
            cast = dtype if dtype is not None and tensor.is_floating_point() else None
            return tensor.to(device=device, dtype=cast, non_blocking=True)

        return Batch(
            {name: {key: move(t) for key, t in x.items()} for name, x in self.inputs.items()},
            {name: t.to(device) for name, t in self.present.items()},
            None if self.y is None else move(self.y),
            None if self.weight is None else move(self.weight),
            None if self.groups is None else self.groups.to(device),
        )


@dataclass(frozen=True)
class Data:
    """Some rows of some blocks, with what is known of them; a view, never a copy.

    Attributes
    ----------
    blocks : dict of Block, each of n rows
    rows : integer array
        The rows of the blocks that belong to this set.
    y, weight, groups : arrays of n rows or None
    """

    blocks: Mapping[str, Block]
    rows: np.ndarray
    y: np.ndarray | None = None
    weight: np.ndarray | None = None
    groups: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, index: np.ndarray) -> Batch:
        """The rows numbered `index` within this set."""
        rows = self.rows[index]

        def cut(array: np.ndarray | None) -> Tensor | None:
            return None if array is None else torch.from_numpy(array[rows])

        return Batch(
            {name: block.take(rows) for name, block in self.blocks.items()},
            {name: torch.from_numpy(block.present[rows]) for name, block in self.blocks.items()},
            cut(self.y),
            cut(self.weight),
            cut(self.groups),
        )

    def share(self, part: np.ndarray, whole: np.ndarray) -> tuple[float, float]:
        """What some of the rows `whole` are of them all: by known labels, and by rows."""
        rows = len(part) / len(whole)
        if self.y is None:
            return rows, rows
        known = int((~np.isnan(self.y[self.rows[whole]])).sum())
        mine = int((~np.isnan(self.y[self.rows[part]])).sum())
        return (mine / known if known else rows), rows

    def followed_by(self, other: "Data") -> "Data":
        """Both sets without labels; rows of the other one are other patients."""
        n = len(next(iter(self.blocks.values())).present)
        groups = self.groups
        if groups is not None:
            new = groups.max(initial=-1) + 1 + np.arange(len(other))
            groups = np.concatenate([groups, new])
        weight = None
        if self.weight is not None and other.weight is not None:
            weight = np.concatenate([self.weight, other.weight])
        blocks = {name: b.followed_by(other.blocks[name]) for name, b in self.blocks.items()}
        return Data(blocks, np.concatenate([self.rows, n + other.rows]), None, weight, groups)

    @property
    def length(self) -> np.ndarray | None:
        """Padded length that every row asks for, or None where nothing is padded."""
        lengths = [block.length for block in self.blocks.values()]
        known = [length[self.rows] for length in lengths if length is not None]
        return np.maximum.reduce(known) if known else None


POOL = 16  # batches that are sorted by length together; larger pads less and shuffles less


def iterate(
    n_rows: int,
    batch_size: int,
    rng: np.random.Generator | None = None,
    length: np.ndarray | None = None,
) -> Iterator[np.ndarray]:
    """Row numbers batch by batch: shuffled when a generator is given, neighbours alike in length.

    Shuffled batches are sorted by length within pools of `POOL` batches, so that little is padded
    and batches still differ from epoch to epoch; without a generator the whole order is sorted.
    """
    order = np.arange(n_rows) if rng is None else rng.permutation(n_rows)
    if length is not None:
        pool = n_rows if rng is None else batch_size * POOL
        order = np.concatenate(
            [part[np.argsort(length[part], kind="stable")] for part in _cut(order, pool)]
        )
    batches = _cut(order, batch_size)
    turns = np.arange(len(batches))
    if rng is not None and length is not None:
        turns = rng.permutation(len(batches))
    return (batches[turn] for turn in turns)


def count_batches(n_rows: int, batch_size: int) -> int:
    """How many batches `iterate` makes."""
    return len(_cut(np.arange(n_rows), batch_size))


def _cut(order: np.ndarray, size: int) -> list[np.ndarray]:
    cuts = list(range(size, len(order), size))
    if cuts and len(order) - cuts[-1] == 1:
        cuts.pop()  # batch norm cannot train on one row, so a tail of one joins its neighbour
    return np.split(order, cuts)
