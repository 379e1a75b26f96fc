"""Several processes, started by torchrun, that fit one model: HF Accelerate does the work.

Every process has all rows and shuffles alike; of every batch it reads its share, and the gradients
add up to those of the whole batch. Nothing here is reached outside `fit`.
"""

import atexit
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ehrfuse._data import Batch, Data
from ehrfuse._runtime import import_optional, world
from ehrfuse.nn.core import Core


class Team:
    """One process alone; what `train` asks of a team of any size."""

    rank, size = 0, 1

    @property
    def leads(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def losses(self, core: Core) -> Callable[[Batch], dict[str, Tensor]]:
        """What computes the loss terms of a batch, ready for their gradient."""
        return core.losses

    def own(self, index: np.ndarray) -> np.ndarray:
        """The rows of a batch that are this process's, at least one."""
        return index

    def share(self, data: Data, part: np.ndarray, index: np.ndarray) -> tuple[float, float]:
        """What a part is of a batch, by known labels and by rows."""
        return data.share(part, index)

    def align(self, core: Core) -> None:
        """Give all processes what steps have left different: running means, inner networks."""

    def agree(self, value: Any) -> Any:
        """What the leader says."""
        return value

    def everyone(self, value: Any) -> list[Any]:
        """What each process has, by rank."""
        return [value]

    def sum(self, terms: dict[str, Tensor]) -> dict[str, float]:
        """Sums over all processes; a term may lack in some."""
        total: dict[str, float] = {}
        for found in self.everyone({name: float(term) for name, term in terms.items()}):
            for name, value in found.items():
                total[name] = total.get(name, 0.0) + value
        return total

    def each(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of all processes, by rank and name."""
        found = enumerate(self.everyone({name: tensor.cpu() for name, tensor in state.items()}))
        return {f"{rank}/{name}": tensor for rank, some in found for name, tensor in some.items()}

    def own_of(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of what `each` gave, the part of this process."""
        prefix = f"{self.rank}/"
        return {k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)}

    def leave(self, core: Core) -> None:
        """The fit is over."""


class Processes(Team):
    """What torchrun has started."""

    def __init__(self, cpu: bool) -> None:
        accelerate = import_optional("accelerate", "distributed")
        self.utils = accelerate.utils
        # A step may leave out parts of a core: a modality that its rows lack, a term that faded.
        handler = accelerate.DistributedDataParallelKwargs(find_unused_parameters=True)
        self.accelerator = accelerate.Accelerator(cpu=cpu, kwargs_handlers=[handler])
        kind = str(self.accelerator.distributed_type.value)
        if not kind.startswith("MULTI_"):
            raise ValueError(
                f"Accelerate is set to {kind}, which would split the model itself; ehrfuse splits "
                "batches only. Unset ACCELERATE_USE_FSDP and its like, and start with torchrun."
            )
        self.rank, self.size = self.accelerator.process_index, self.accelerator.num_processes
        self._core: Core | None = None
        atexit.register(_close)

    def losses(self, core: Core) -> Callable[[Batch], dict[str, Tensor]]:
        """Through Accelerate, which averages the gradients over the processes."""
        if self._core is not core:
            self._core = core
            self._model = self.accelerator.prepare_model(Losses(core))
        return self._model

    def own(self, index: np.ndarray) -> np.ndarray:
        """Every so many rows; where there are too few, one that counts nothing."""
        return index[self.rank :: self.size] if self.rank < len(index) else index[:1]

    def share(self, data: Data, part: np.ndarray, index: np.ndarray) -> tuple[float, float]:
        """As alone, but for a row that counts nothing."""
        return data.share(part, index) if self.rank < len(index) else (0.0, 0.0)

    def align(self, core: Core) -> None:
        """Give all processes what the leader has."""
        with torch.no_grad():
            for tensor in core.state_dict().values():
                if tensor.numel():
                    tensor.copy_(self.utils.broadcast(tensor.contiguous()))

    def agree(self, value: Any) -> Any:
        """What the leader says."""
        return self.utils.broadcast_object_list([value])[0]

    def everyone(self, value: Any) -> list[Any]:
        """What each process has, by rank."""
        return self.utils.gather_object([value])

    def leave(self, core: Core) -> None:
        """Let go of the core, on the CPU and without its wrapper."""
        self._core = self._model = None
        self.accelerator.free_memory()
        core.to("cpu")


class Losses(nn.Module):
    """The loss terms of a core as a forward pass, where wrappers of modules look."""

    def __init__(self, core: Core) -> None:
        super().__init__()
        self.core = core

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Named terms."""
        return self.core.losses(batch)


def join(device: torch.device) -> Team:
    """The processes that torchrun has started; this one alone otherwise."""
    return Team() if world()[1] == 1 else _processes(device.type == "cpu")


@lru_cache(maxsize=1)
def _processes(cpu: bool) -> Processes:
    return Processes(cpu)


def _close() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
