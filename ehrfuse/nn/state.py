"""The state of an optimiser as a flat dict of tensors, and back."""

import torch
from torch import Tensor


def optimizer_state(optimizer: torch.optim.Optimizer, prefix: str = "") -> dict[str, Tensor]:
    """Tensors by ``{prefix}{number of the parameter}/{name}``; none before the first step."""
    state = optimizer.state_dict()["state"]
    return {
        f"{prefix}{number}/{name}": torch.as_tensor(value)
        for number, parts in state.items()
        for name, value in parts.items()
    }


def load_optimizer_state(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_state` gave, its prefix taken off; rates stay as they are."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        number, _, name = key.partition("/")
        state.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
