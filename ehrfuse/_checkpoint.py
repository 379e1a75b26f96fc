"""Stop and go on: what changes while a fit runs, and the files that hold it.

Every fit has a folder of its own, named by a digest of its parameters, its data and its first
weights. Two generations take turns in it, each one safetensors file whose header holds the rest as
JSON: a write that a crash or a full disk cuts short leaves the other one good. No row of the data
and no text is in them.
"""

import hashlib
import json
import os
import socket
import time
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ehrfuse._data import Data, iterate
from ehrfuse._distributed import Team
from ehrfuse.nn.core import Core
from ehrfuse.nn.state import load_optimizer_state, optimizer_state

EVERY = 60.0  # seconds between two saves within an epoch, at least
SHARE = 0.01  # of the time of a fit that saves may take
FIRST = 0.02  # seconds that the first save is thought to take
FORMAT = 1
STATES = ("state-0.safetensors", "state-1.safetensors")
FINAL = "final.safetensors"
# Parameters that do not change what a fit gives; random_state enters as the seed drawn from it.
IDLE = {"cache", "checkpoint", "device", "memory", "n_jobs", "random_state", "verbose"}


# ---------------------------------------------------------------- what changes while a fit runs


class Mean:
    """Mean of every term over the rows of an epoch, without a wait for the device at each step."""

    def __init__(self) -> None:
        self.rows = 0
        self.sums: dict[str, Tensor] = {}

    def add(self, terms: dict[str, Tensor], rows: int) -> None:
        """Count the terms of a batch."""
        self.rows += rows
        for name, term in terms.items():
            self.sums[name] = self.sums.get(name, torch.zeros_like(term)) + term * rows

    def means(self, prefix: str, team: Team) -> dict[str, float]:
        """Means by ``{prefix}_{name}``."""
        return {f"{prefix}_{name}": t / self.rows for name, t in team.sum(self.sums).items()}


class Best:
    """Remembers the weights of the best epoch and says when patience is out."""

    def __init__(self, patience: int | None) -> None:
        self.patience, self.waited, self.score = patience, 0, np.inf
        self.state: dict[str, Tensor] = {}

    def see(self, state: Mapping[str, Tensor], record: dict) -> bool:
        """Compare an epoch; answer whether to stop."""
        self.waited += 1
        if record["val_loss"] < self.score:
            self.score, self.waited = record["val_loss"], 0
            self.state = {name: t.detach().clone() for name, t in state.items()}
        return self.patience is not None and self.waited >= self.patience


class Run:
    """All that changes while a fit runs: a stopped fit goes on from it as if nothing had been."""

    def __init__(
        self,
        core: Core,
        optimizer: torch.optim.Optimizer,
        rng: np.random.Generator,
        patience: int | None,
    ) -> None:
        self.core, self.optimizer, self.rng = core, optimizer, rng
        self.base_lr = [group["lr"] for group in optimizer.param_groups]
        self.epoch = self.done = self.step = 0  # done: batches of this epoch
        self.parts = 1  # a batch is divided into, after it was too large for the memory
        self.stopped = False
        self.shuffle = rng.bit_generator.state  # before the batches of this epoch were drawn
        self.history: list[dict] = []
        self.totals, self.best = Mean(), Best(patience)

    def batches(self, data: Data, batch_size: int) -> Iterator[np.ndarray]:
        """Row numbers of the batches of this epoch that are still to do."""
        self.shuffle = self.rng.bit_generator.state
        return islice(iterate(len(data), batch_size, self.rng, data.length), self.done, None)

    def set_lr(self, scale: float) -> None:
        """Rates of the next step, as multiples of those at the start."""
        for group, value in zip(self.optimizer.param_groups, self.base_lr, strict=True):
            group["lr"] = value * scale

    def count(self, terms: dict[str, Tensor], rows: int) -> None:
        """A step is done."""
        self.totals.add(terms, rows)
        self.step += 1
        self.done += 1

    def end_epoch(self, record: dict) -> None:
        """An epoch is done; its validation loss may make it the best, or the last."""
        self.history.append(record)
        enough = "val_loss" in record and self.best.see(self.core.state_dict(), record)
        self.epoch, self.done, self.stopped = self.epoch + 1, 0, bool(enough)
        self.totals, self.shuffle = Mean(), self.rng.bit_generator.state

    def restore_best(self) -> None:
        """Bring back the weights of the best epoch, where there was a choice."""
        if self.best.state:
            self.core.load_state_dict(self.best.state)

    def pack(self, team: Team) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors, and the rest as JSON has it."""
        parts = {
            "core": self.core.state_dict(), "best": self.best.state, "totals": self.totals.sums,
            "optimizer": optimizer_state(self.optimizer), "loop": self.core.loop_state(),
            "random": team.each(_random_state(self.core)),
        }  # fmt: skip
        tensors = {f"{part}/{key}": t for part, some in parts.items() for key, t in some.items()}
        plain = ("epoch", "done", "step", "parts", "stopped", "shuffle", "history")
        facts = {name: getattr(self, name) for name in plain}
        facts |= {"rows": self.totals.rows, "best": [self.best.score, self.best.waited]}
        facts |= {"terms": list(self.totals.sums)}  # files of tensors keep no order
        return tensors, facts

    def unpack(self, tensors: dict[str, Tensor], facts: dict[str, Any], team: Team) -> None:
        """Go on from what `pack` gave."""
        parts: dict[str, dict[str, Tensor]] = {}
        device = next(self.core.parameters()).device
        for key, tensor in tensors.items():
            part, _, name = key.partition("/")
            place = "cpu" if part == "random" else device
            parts.setdefault(part, {})[name] = tensor.to(place)
        for name in ("epoch", "done", "step", "parts", "stopped", "shuffle", "history"):
            setattr(self, name, facts[name])
        self.rng.bit_generator.state = self.shuffle
        self.core.load_state_dict(parts["core"])
        load_optimizer_state(self.optimizer, parts.get("optimizer", {}))
        self.core.load_loop_state(parts.get("loop", {}))
        sums = parts.get("totals", {})
        self.totals.rows = facts["rows"]
        self.totals.sums = {name: sums[name] for name in facts.get("terms", sums)}
        self.best.score, self.best.waited = facts["best"]
        self.best.state = parts.get("best", {})
        _set_random_state(team.own_of(parts["random"]), device)


def _random_state(core: Core) -> dict[str, Tensor]:
    device = next(core.parameters()).device
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


# ---------------------------------------------------------------- which fit it is


def stamp(
    estimator: Any, core: Core, sets: tuple[Data | None, ...], seed: int, size: int, team: Team
) -> dict[str, Any]:
    """What makes a fit the one it is, as hashes, so that nothing can be read from the file."""
    device = next(core.parameters()).device.type
    return {
        "format": FORMAT,
        "estimator": type(estimator).__name__,
        "parameters": {name: _hash(text) for name, text in _parameters(estimator).items()},
        "loop": [seed, size, device, team.size],
        "data": _hash_data(sets),
        "start": _hash_weights(estimator, core),
        "versions": {name: version(name) for name in ("ehrfuse", "torch")},
    }


def _parameters(estimator: Any) -> dict[str, str]:
    """Parameters that change what a fit gives, those of its parts included."""
    params = estimator.get_params(deep=True)
    return {k: _text(v) for k, v in sorted(params.items()) if k.rpartition("__")[2] not in IDLE}


def _text(value: Any) -> str:
    """The same for the same value in another process; the parameters of objects come by name."""
    if isinstance(value, dict):
        return str({_text(k): _text(v) for k, v in value.items()})
    if isinstance(value, list | tuple):
        return str([_text(v) for v in value])
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, np.ndarray):
        return _hash(value.tobytes())
    if isinstance(value, str | int | float | bool | None | os.PathLike):
        return str(value)
    return getattr(value, "__qualname__", type(value).__qualname__)


def _hash(content: "str | bytes") -> str:
    raw = content.encode() if isinstance(content, str) else content
    return hashlib.blake2b(raw, digest_size=8).hexdigest()


def _hash_data(sets: tuple[Data | None, ...]) -> str:
    found, seen = hashlib.blake2b(digest_size=16), set()
    for data in sets:
        if data is None:
            found.update(b"none")
            continue
        for name, array in _arrays(data):
            if id(array) not in seen:  # training and validation rows share their blocks
                seen.add(id(array))
                found.update(f"{name} {array.dtype} {array.shape}".encode())
                found.update(np.ascontiguousarray(array).reshape(-1).view("uint8").data)
    return found.hexdigest()


def _arrays(data: Data) -> Iterator[tuple[str, np.ndarray]]:
    for name in ("rows", "y", "weight", "groups"):
        if getattr(data, name) is not None:
            yield name, getattr(data, name)
    for name, block in data.blocks.items():
        yield name, block.present
        yield from ((f"{name} {key}", array) for key, array in block.arrays.items())
        for key, (flat, offsets) in block.ragged.items():
            yield f"{name} {key}", flat
            yield f"{name} {key} offsets", offsets


def _hash_weights(estimator: Any, core: Core) -> str:
    """First weights, taken over from a pretrainer or not, and the names of frozen models."""
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in core.state_dict().items():
        found.update(f"{name} {tuple(tensor.shape)}".encode())
        found.update(_bytes(tensor))
    for name, modality in estimator.modalities_.items():
        found.update(f"{name} {getattr(modality, 'fingerprint_', None)}".encode())
    return found.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().reshape(-1)
    if flat.stride(0) != 1:  # of one element, any stride counts as contiguous
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).numpy().data


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """What two fits do not share, in words."""
    names = {*ours["parameters"], *theirs["parameters"]}
    odd = sorted(
        n for n in names if ours["parameters"].get(n) != theirs["parameters"].get(n)
    )  # fmt: skip
    found = ["parameters (" + ", ".join(odd[:6]) + ")"] if odd else []
    found += ["data"] if ours["data"] != theirs["data"] else []
    if ours["loop"] != theirs["loop"]:
        found.append("seed, batch size, kind of device or number of processes")
    if not found and ours["start"] != theirs["start"]:
        found.append("first weights")
    return " and ".join(found) or "nothing that is known"


# ---------------------------------------------------------------- the files


class Damaged(Exception):
    """A file that no finished write has left."""


class NoCheckpoint:
    """Keeps nothing."""

    def resume(self, run: Run, team: Team) -> bool:
        """Nothing to go on from."""
        return False

    def keep(self, run: Run, team: Team, within_epoch: bool = False) -> None:
        """Nothing is saved."""

    def finish(self, run: Run, team: Team) -> None:
        """Nothing is saved."""

    def leave(self) -> None:
        """Nothing is there."""

    def advice(self) -> str:
        """Nothing to say."""
        return ""


class Checkpoint(NoCheckpoint):
    """The folder of one fit; `stamp` says which.

    A save is due after every epoch, and within one after `EVERY` seconds, but never sooner than its
    own cost is the share `SHARE` of the time since the last one.
    """

    def __init__(self, path: "str | os.PathLike[str]", stamp: dict[str, Any]) -> None:
        own = {k: v for k, v in stamp.items() if k != "versions"}
        self.stamp, self.name = stamp, f"{stamp['estimator']}-{_hash(json.dumps(own))}"
        self.folder = Path(path).expanduser() / self.name
        self.last, self.cost, self.saved, self.complained = time.monotonic(), FIRST, 0, False
        self.epoch: int | None = None  # of the last good state

    # ------------------------------------------------------------ read

    def resume(self, run: Run, team: Team) -> bool:
        """Put `run` where the last good state was; answer whether that was the end of the fit."""
        found = team.agree(self._open() if team.leads else None)
        if found is None:
            return False
        tensors, facts = found
        if facts["final"]:
            run.core.load_state_dict({k.removeprefix("core/"): t for k, t in tensors.items()})
            run.history = facts["history"]
            return True
        run.unpack(tensors, facts, team)
        self.epoch = run.epoch
        return False

    def _open(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Make the folder, or read the newest good file of it."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "running").write_text(_process(), encoding="utf-8")
        except OSError as error:
            raise ValueError(
                f"checkpoint={str(self.folder.parent)!r} cannot be written to ({error}); give a "
                "folder that may be."
            ) from error
        found = self._newest()
        if found is None:
            self._warn_of_others()
        return found

    def _newest(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        good = []
        for place, name in enumerate((*STATES, FINAL)):
            if (self.folder / name).exists():
                try:
                    tensors, facts = self._read(self.folder / name)
                except Damaged as error:
                    warnings.warn(
                        f"{self.folder / name} is damaged ({error}) and left out; the fit goes on "
                        "from an older state, or starts anew where there is none.",
                        UserWarning,
                        stacklevel=2,
                    )
                    continue
                good.append((facts["saved"], place, tensors, facts))
        if not good:
            return None
        self.saved, place, tensors, facts = max(good, key=lambda found: found[0])
        return tensors, facts

    def _read(self, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        facts = _facts(path)
        tensors = load_file(path)
        if facts.pop("checksum", None) != _checksum(tensors, facts):
            raise Damaged("its checksum is another")
        self._refuse_foreign(facts["stamp"])
        return tensors, facts

    def _refuse_foreign(self, theirs: dict[str, Any]) -> None:
        if theirs == self.stamp:
            return
        odd = [k for k, v in self.stamp["versions"].items() if theirs["versions"].get(k) != v]
        what = differences(self.stamp, theirs)
        if odd and what.startswith("nothing"):
            what = "versions (" + ", ".join(f"{k} {theirs['versions'].get(k)}" for k in odd) + ")"
        raise ValueError(
            f"The checkpoint in {self.folder} was made by a fit with other {what}; delete it or "
            "choose another path."
        )

    def _warn_of_others(self) -> None:
        """Say that a fit was stopped here which this one is not."""
        for folder in sorted(self.folder.parent.glob(f"{self.stamp['estimator']}-*")):
            files = [folder / name for name in STATES if (folder / name).exists()]
            if folder != self.folder and files and not _runs(folder / "running"):
                try:
                    theirs = _facts(files[0])["stamp"]
                except (Damaged, KeyError):
                    continue
                warnings.warn(
                    f"{folder} holds a fit that was stopped and had other "
                    f"{differences(self.stamp, theirs)}; this fit starts anew. Delete the folder "
                    "if it is not wanted.",
                    UserWarning,
                    stacklevel=2,
                )

    # ------------------------------------------------------------ write

    def due(self, within_epoch: bool) -> bool:
        """Whether a save is worth its time now."""
        wait = max(EVERY if within_epoch else 0.0, self.cost / SHARE)
        return time.monotonic() - self.last >= wait

    def keep(self, run: Run, team: Team, within_epoch: bool = False) -> None:
        """Save, if it is due."""
        if not team.agree(self.due(within_epoch)):
            return
        start = time.monotonic()
        tensors, facts = run.pack(team)
        if team.leads and all(p.isfinite().all() for p in run.core.parameters()):
            self._save(STATES[self.saved % 2], tensors, facts | {"final": False})
            self.epoch = run.epoch
        self.last = time.monotonic()
        self.cost = self.last - start

    def finish(self, run: Run, team: Team) -> None:
        """Replace the states by the weights that the fit ended with."""
        if not team.leads:
            return
        tensors = {f"core/{name}": t for name, t in run.core.state_dict().items()}
        if self._save(FINAL, tensors, {"final": True, "history": run.history}):
            for name in STATES:
                (self.folder / name).unlink(missing_ok=True)

    def leave(self) -> None:
        """The fit ends, however it ends: others need not think that it runs."""
        with suppress(OSError):
            (self.folder / "running").unlink()

    def advice(self) -> str:
        """One sentence for somebody whose fit has stopped."""
        if self.epoch is None:
            return f"No state was saved yet in {self.folder}."
        return (
            f"Its state in epoch {self.epoch} is in {self.folder}: the same fit again goes on "
            "from there."
        )

    def _save(self, name: str, tensors: dict[str, Tensor], facts: dict[str, Any]) -> bool:
        """Write beside, then rename; a failure is a warning, and the good files stay."""
        tensors = _own_memory(tensors)
        facts = facts | {"stamp": self.stamp, "saved": self.saved + 1}
        facts = json.loads(json.dumps(facts))  # as it will be read
        facts["checksum"] = _checksum(tensors, facts)
        beside = self.folder / f".{name}.{os.getpid()}"
        try:
            save_file(tensors, beside, metadata={"facts": json.dumps(facts)})
            _to_disk(beside)
            beside.replace(self.folder / name)
            _folder_to_disk(self.folder)
        except (OSError, SafetensorError) as error:
            if not self.complained:
                self.complained = True
                warnings.warn(
                    f"The checkpoint in {self.folder} could not be written ({error}); the fit goes "
                    "on, tries again, and the last good state is kept.",
                    UserWarning,
                    stacklevel=2,
                )
            return False
        finally:
            beside.unlink(missing_ok=True)
        self.saved += 1
        return True


def _facts(path: Path) -> dict[str, Any]:
    """What stands in the header."""
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads(file.metadata()["facts"])
    except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise Damaged(str(error) or type(error).__name__) from error


def open_checkpoint(
    estimator: Any, core: Core, sets: tuple[Data | None, ...], seed: int, size: int, team: Team
) -> NoCheckpoint:
    """The checkpoint of the fit that is about to begin, in batches of `size` rows.

    Raise unless all processes have the same fit before them.
    """
    if estimator.checkpoint is None and team.size == 1:
        return NoCheckpoint()
    own = stamp(estimator, core, sets, seed, size, team)
    for rank, other in enumerate(team.everyone(own)):
        if other != own:
            raise ValueError(
                f"Processes {team.rank} and {rank} fit with other {differences(own, other)}; give "
                "all the same rows in the same order, the same parameters and random_state."
            )
    return NoCheckpoint() if estimator.checkpoint is None else Checkpoint(estimator.checkpoint, own)


def _own_memory(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors on the CPU that share no memory, as the file format wants them."""
    found, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        found[name] = tensor
    return found


def _checksum(tensors: dict[str, Tensor], facts: dict[str, Any]) -> int:
    found = zlib.crc32(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(tensors):
        found = zlib.crc32(_bytes(tensors[name]), zlib.crc32(name.encode(), found))
    return found


def _to_disk(path: Path) -> None:
    """Wait until a new file and its name are on the disk."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def _folder_to_disk(folder: Path) -> None:
    if os.name == "posix":  # elsewhere folders cannot be opened
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _process() -> str:
    return f"{socket.gethostname()} {os.getpid()}"


def _runs(path: Path) -> bool:
    """Whether the process that this file names may still be there."""
    try:
        host, _, number = path.read_text(encoding="utf-8").partition(" ")
        if host == socket.gethostname():
            os.kill(int(number), 0)
    except PermissionError:  # it is another user's
        return True
    except (OSError, ValueError):
        return False
    return True
