"""Devices, seeds, option checks and optional packages: what every layer may lean on."""

import importlib
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


_default: "ContextVar[str | torch.device | None]" = ContextVar("default device", default=None)


@contextmanager
def default_device(device: "str | torch.device | None") -> Iterator[None]:
    """Let `device` stand for None within the block; None changes nothing."""
    token = _default.set(_default.get() if device is None else device)
    try:
        yield
    finally:
        _default.reset(token)


INSIDE = ("ehrfuse.", "sklearn.", "joblib.")


def users_line() -> int:
    """`stacklevel` at which a warning points to the caller outside this package.

    How many calls lie between depends on the method, and on what scikit-learn wraps around `fit`.
    """
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals["__name__"].startswith(INSIDE):
        frame, level = frame.f_back, level + 1
    return level


def resolve_device(device: "str | torch.device | None") -> "torch.device":
    """Turn a user's `device` into one that exists; None means the best available.

    Asked at every call and never stored, so a model fitted on a GPU predicts on a laptop.
    """
    import torch

    device = _default.get() if device is None else device
    if device is not None:
        wanted = torch.device(device)
        if wanted.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                f"device={str(device)!r} was asked for, but torch finds no GPU here; "
                "use device=None (the best available) or device='cpu'."
            )
        return wanted
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


@contextmanager
def seeded(seed: int, device: "torch.device") -> Iterator[None]:
    """Run a block on a fresh torch stream and leave the global streams as they were."""
    import torch

    on_gpu = device.type == "cuda"
    with torch.random.fork_rng([device] if on_gpu else []):
        # Not torch.manual_seed: it also reseeds accelerators that fork_rng did not save.
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def world() -> tuple[int, int]:
    """Number of this process, and of how many, where torchrun has started several."""
    if multiprocessing.parent_process() is not None:  # a worker of one of them
        return 0, 1
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def too_large(error: RuntimeError) -> bool:
    """Whether torch found no memory, on a GPU or on the CPU."""
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return True
    signs = ("out of memory", "not enough memory", "can't allocate memory")
    return any(sign in str(error) for sign in signs)


def release(device: "torch.device") -> None:
    """Give back what a failed allocation left in the allocator of a GPU."""
    import torch

    if device.type == "cuda":
        torch.cuda.empty_cache()


def import_optional(name: str, extra: str) -> ModuleType:
    """Import a package that only an extra installs, or say which pip line brings it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{name.partition('.')[0]} is needed here and is not installed; "
            f"run: pip install 'ehrfuse[{extra}]'."
        ) from error


def check_option(value: Any, name: str, options: Sequence[Any]) -> None:
    """Raise unless `value` is one of `options`."""
    if not any(type(value) is type(option) and value == option for option in options):
        allowed = ", ".join(repr(option) for option in options)
        raise ValueError(f"{name}={value!r} is not known; choose one of {allowed}.")
