"""The one training loop and the one inference pass: plain functions that know of no estimator."""

import copy
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from ehrfuse._checkpoint import Mean, NoCheckpoint, Run
from ehrfuse._data import Batch, Data, count_batches, iterate
from ehrfuse._distributed import Team
from ehrfuse._runtime import release, seeded, too_large
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
    checkpoint: NoCheckpoint | None = None,
    team: Team | None = None,
) -> list[dict]:
    """Fit `core` in place; return one dict per epoch.

    Batches come from one seeded generator. With a validation set, the same losses run in eval mode
    under a fixed seed after every epoch, and the weights of the best epoch are restored.
    Ctrl-C ends the fit with the best weights so far and a warning. With a checkpoint, a fit that
    was stopped goes on where it was and ends with the same weights.
    """
    team, keeper = team or Team(), checkpoint or NoCheckpoint()
    fused = device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(core.param_groups(lr, weight_decay), fused=fused)
    run = Run(core, optimizer, np.random.default_rng(seed), patience)
    n_steps = max_epochs * count_batches(len(data), batch_size)
    with seeded(seed + team.rank, device):
        try:
            if keeper.resume(run, team):
                return run.history
            while run.epoch < max_epochs and not run.stopped:
                core.train()
                core.on_epoch_start(run.epoch)
                for index in run.batches(data, batch_size):
                    run.set_lr(core.lr_scale_at(min(1.0, run.step / n_steps)))
                    run.count(_step(run, data, index, device, amp, team), len(index))
                    keeper.keep(run, team, within_epoch=True)
                team.align(core)
                record = {"epoch": run.epoch, **run.totals.means("train", team)}
                if validation is not None:
                    record |= evaluate(core, validation, batch_size, seed, device, run.epoch, amp)
                run.end_epoch(team.agree(record))  # before the report, which may be Ctrl-C
                if team.agree(report is not None and report(record)):
                    run.stopped = True
                keeper.keep(run, team)
            run.restore_best()
            keeper.finish(run, team)
        except KeyboardInterrupt:
            run.restore_best()
            warnings.warn(
                f"Training was interrupted after {len(run.history)} full epochs; the model keeps "
                f"the {'best' if run.best.state else 'latest'} weights so far. {keeper.advice()}",
                UserWarning,
                stacklevel=2,
            )
        except Exception as error:
            if keeper.advice():
                error.add_note(keeper.advice())
            raise
        finally:
            keeper.leave()
            team.leave(core)
    return run.history


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
    totals = Mean()
    core.eval()
    with seeded(seed, device), torch.no_grad():
        for index in iterate(len(data), batch_size, None, data.length):
            batch = data.batch(index).to(device)
            totals.add(_terms(core, core.losses, batch, epoch, amp)[1], len(index))
    return totals.means("val", Team())


def _step(
    run: Run, data: Data, index: np.ndarray, device: torch.device, amp: bool, team: Team
) -> dict[str, Tensor]:
    """One optimiser step; a batch too large for the memory is divided, and its parts add up."""
    core, mine, begun = run.core, team.own(index), False
    while True:
        parts = np.array_split(mine, min(run.parts, len(mine)))
        try:
            found = _gradient(run, data, parts, index, device, amp, team, begun)
            break
        except RuntimeError as error:
            if not too_large(error) or len(mine) < 2 * run.parts or team.size > 1:
                raise
        begun, run.parts = True, 2 * run.parts  # outside: the error holds on to the memory
        release(device)
        warnings.warn(
            f"A batch of {len(mine)} rows does not fit into the memory; from now on batches are "
            f"divided into {run.parts} parts whose gradients add up. Only what a core computes "
            "over a batch (batch norm, contrasts) changes; a smaller batch_size avoids it.",
            UserWarning,
            stacklevel=2,
        )
    nn.utils.clip_grad_norm_(core.parameters(), 1.0)
    run.optimizer.step()
    core.on_step_end()
    return found


def _gradient(
    run: Run,
    data: Data,
    parts: list[np.ndarray],
    index: np.ndarray,
    device: torch.device,
    amp: bool,
    team: Team,
    begun: bool,
) -> dict[str, Tensor]:
    """Gradient of the mean loss over the rows `index`, of which this process has `parts`."""
    core = run.core
    found: dict[str, Tensor] = {}
    run.optimizer.zero_grad(set_to_none=True)
    for part in parts:
        batch = data.batch(part).to(device)
        if not begun:
            core.on_step_begin(batch)
            begun = True
        share = None if len(part) == len(index) else team.share(data, part, index)
        total, terms = _terms(core, team.losses(core), batch, run.epoch, amp, share)
        (total * team.size).backward()  # a team averages
        found = {name: found[name] + t if name in found else t for name, t in terms.items()}
    return found


def _terms(
    core: Core,
    losses: Callable[[Batch], dict[str, Tensor]],
    batch: Batch,
    epoch: int,
    amp: bool,
    share: tuple[float, float] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and what is logged of it; `share` is what the batch is of a whole one."""
    with _autocast(next(core.parameters()).device, amp):
        terms = losses(batch)
        if share is not None:
            labels, rows = share
            terms = {
                name: term * (labels if name in core.supervised else rows)
                for name, term in terms.items()
            }
        total = torch.stack(list(terms.values())).sum()
        watched = core.monitor(terms)
    if not torch.isfinite(total):
        _name_bad_term(terms, epoch)
    return total, {"loss": watched.detach(), **{name: t.detach() for name, t in terms.items()}}


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
        part = _output(core, data, index, device, dtype)
        if found is None:
            found = np.empty((len(data), *part.shape[1:]), part.dtype)
        found[index] = part
    assert found is not None
    return found


def _output(
    core: Core, data: Data, index: np.ndarray, device: torch.device, dtype: torch.dtype | None
) -> np.ndarray:
    """Output for some rows; in halves where they do not fit into the memory."""
    try:
        out = core(data.batch(index).to(device, dtype))
        return out.to("cpu", dtype or torch.float32).numpy()
    except RuntimeError as error:
        if not too_large(error) or len(index) < 2:
            raise
    release(device)
    halves = np.array_split(index, 2)
    return np.concatenate([_output(core, data, half, device, dtype) for half in halves])
