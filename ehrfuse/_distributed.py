"""Several processes, started by torchrun, that fit one model: HF Accelerate does the work.

Every process has all rows and shuffles alike; of every batch it reads its share. Nothing here is
reached outside `fit`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from ehrfuse._data import Batch
from ehrfuse.nn.core import Core


class Team:
    """One process alone; what `train` asks of a team of any size."""

    rank, size = 0, 1

    @property
    def leads(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def agree(self, value: Any) -> Any:
        """What the leader says."""
        return value

    def losses(self, core: Core) -> Callable[[Batch], dict[str, Tensor]]:
        """How the loss terms of a batch are computed."""
        return core.losses

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        return tensor

    def own(self, index: np.ndarray) -> np.ndarray:
        """The rows of a batch that are this process's."""
        return index

    def each(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of all processes, by rank."""
        return {f"0/{name}": tensor for name, tensor in state.items()}

    def own_of(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of what `each` gave, the part of this process."""
        prefix = f"{self.rank}/"
        return {k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)}
