"""The one training loop and the one inference pass: plain functions that know of no estimator."""

import copy
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from ehrfuse._data import Data, count_batches, iterate
from ehrfuse._runtime import seeded
from ehrfuse.nn.core import Core

EXACT_BELOW = 5_000_000  # parameters; smaller models predict in float64 on the CPU

Report = Callable[[dict], bool]  # gets the record of an epoch, answers whether to stop


def train(
    core: Core,
    data: Data,
    *,
    validation: Data | None,
    max_epochs: int,
    batch_size: int,
    lr: float,
    weight_decay: float,
    patience: int | None,
    seed: int,
    device: torch.device,
    amp: bool = False,
    report: Report | None = None,
) -> list[dict]:
    """Fit `core` in place; return one dict per epoch.

    Batches come from one seeded generator. With a validation set, the same losses run in eval mode
    under a fixed seed after every epoch, and the weights of the best epoch are restored.
    Ctrl-C ends the fit with the best weights so far and a warning.
    """
    rng = np.random.default_rng(seed)
    fused = device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(core.param_groups(lr, weight_decay), fused=fused)
    base_lr = [group["lr"] for group in optimizer.param_groups]
    n_steps = max_epochs * count_batches(len(data), batch_size)
    history: list[dict] = []
    best = _Best(patience)
    step = 0
    with seeded(seed, device):
        try:
            for epoch in range(max_epochs):
                core.train()
                core.on_epoch_start(epoch)
                totals = _Mean()
                for index in iterate(len(data), batch_size, rng, data.length):
                    scale = core.lr_scale_at(min(1.0, step / n_steps))
                    for group, value in zip(optimizer.param_groups, base_lr, strict=True):
                        group["lr"] = value * scale
                    totals.add(_step(core, data, index, device, epoch, optimizer, amp), len(index))
                    step += 1
                record = {"epoch": epoch, **totals.means("train")}
                if validation is not None:
                    record |= evaluate(core, validation, batch_size, seed, device, epoch, amp)
                history.append(record)
                stop = best.see(core, record) if validation is not None else False
                if (report is not None and report(record)) or stop:
                    break
        except KeyboardInterrupt:
            warnings.warn(
                f"Training was interrupted after {len(history)} full epochs; the model keeps the "
                f"{'best' if best.state else 'latest'} weights so far.",
                UserWarning,
                stacklevel=2,
            )
    best.restore(core)
    return history


def evaluate(
    core: Core,
    data: Data,
    batch_size: int,
    seed: int,
    device: torch.device,
    epoch: int = 0,
    amp: bool = False,
) -> dict[str, float]:
    """Mean losses over `data`, always under the same seed: random masks add no noise."""
    totals = _Mean()
    core.eval()
    with seeded(seed, device), torch.no_grad():
        for index in iterate(len(data), batch_size, None, data.length):
            totals.add(_step(core, data, index, device, epoch, None, amp), len(index))
    return totals.means("val")


def _step(
    core: Core,
    data: Data,
    index: np.ndarray,
    device: torch.device,
    epoch: int,
    optimizer: torch.optim.Optimizer | None,
    amp: bool,
) -> dict[str, Tensor]:
    """One batch: its loss terms, and an optimiser step when there is an optimiser."""
    batch = data.batch(index).to(device)
    if optimizer is not None:
        core.on_step_begin(batch)
    with _autocast(device, amp):
        terms = core.losses(batch)
        total = torch.stack(list(terms.values())).sum()
        watched = core.monitor(terms)
    if not torch.isfinite(total):
        _name_bad_term(terms, epoch)
    if optimizer is not None:
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(core.parameters(), 1.0)
        optimizer.step()
        core.on_step_end()
    return {"loss": watched.detach(), **{name: term.detach() for name, term in terms.items()}}


def _autocast(device: torch.device, amp: bool) -> AbstractContextManager:
    return torch.autocast(device.type, torch.bfloat16) if amp else nullcontext()


def _name_bad_term(terms: dict[str, Tensor], epoch: int) -> None:
    for name, term in terms.items():
        if not torch.isfinite(term):
            raise FloatingPointError(
                f"Loss term '{name}' is {term.item()} in epoch {epoch}; try a smaller lr, and look "
                "for extreme values in the inputs."
            )
    raise FloatingPointError(
        f"The sum of the loss terms overflows in epoch {epoch}; scale them down."
    )


class _Mean:
    """Mean of every term over the rows of an epoch, without a wait for the device at each step."""

    def __init__(self) -> None:
        self.rows = 0
        self.sums: dict[str, Tensor] = {}

    def add(self, terms: dict[str, Tensor], rows: int) -> None:
        self.rows += rows
        for name, term in terms.items():
            self.sums[name] = self.sums.get(name, torch.zeros_like(term)) + term * rows

    def means(self, prefix: str) -> dict[str, float]:
        return {f"{prefix}_{name}": float(t) / self.rows for name, t in self.sums.items()}


class _Best:
    """Remembers the weights of the best epoch and says when patience is out."""

    def __init__(self, patience: int | None) -> None:
        self.patience, self.waited, self.score = patience, 0, np.inf
        self.state: dict[str, Tensor] = {}

    def see(self, core: Core, record: dict) -> bool:
        self.waited += 1
        if record["val_loss"] < self.score:
            self.score, self.waited = record["val_loss"], 0
            self.state = {name: t.detach().clone() for name, t in core.state_dict().items()}
        return self.patience is not None and self.waited >= self.patience

    def restore(self, core: Core) -> None:
        if self.state:
            core.load_state_dict(self.state)


@torch.inference_mode()
def predict(core: Core, data: Data, batch_size: int, device: torch.device) -> np.ndarray:
    """Output of `core` for every row, in order.

    On the CPU, models of less than five million parameters run in float64, so that a row's
    prediction does not depend on which other rows are asked for (float32 matrix products of
    different sizes differ in the last digits).
    """
    core = core.to(device).eval()
    dtype = None
    if device.type == "cpu" and sum(p.numel() for p in core.parameters()) < EXACT_BELOW:
        core, dtype = copy.deepcopy(core).double(), torch.float64
    found: np.ndarray | None = None
    for index in iterate(len(data), batch_size, None, data.length):
        out = core(data.batch(index).to(device, dtype))
        part = out.to("cpu", dtype or torch.float32).numpy()
        if found is None:
            found = np.empty((len(data), *part.shape[1:]), part.dtype)
        found[index] = part
    assert found is not None
    return found
