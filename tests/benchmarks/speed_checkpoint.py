"""What a checkpoint costs, and that the loop costs nothing without one.

Run ``python tests/benchmarks/speed_checkpoint.py --help`` for the options; README.md says what
every line shows.
"""

# ruff: isort: off
from _common import finish, parse, parser, row  # first: it sets the number of threads
# ruff: isort: on

import tempfile
import time

import numpy as np
import torch
from torch import nn

import ehrfuse._checkpoint as files
from ehrfuse import FusionClassifier, Tabular
from ehrfuse._data import Block, Data, count_batches, iterate
from ehrfuse._runtime import seeded
from ehrfuse._targets import classification_target
from ehrfuse._train import train
from ehrfuse.datasets import make_ehr

SECTIONS = ("loop", "checkpoint", "digest")
CPU = torch.device("cpu")
OPTIONS = {"lr": 2e-3, "weight_decay": 1.0}


def main():
    """Run the sections asked for and print one table."""
    args = parse(parser(__doc__.splitlines()[0], SECTIONS))
    run = {"loop": loop, "checkpoint": checkpoint, "digest": digest}
    finish(args, [r for section in args.only for r in run[section](args)])


def _line(args, task, model, metric, values, n):
    values = np.atleast_1d(values)
    sd = values.std() if len(values) > 1 else None
    return row("synthetic", task, model, metric, values.mean(), sd, n, seeds=args.seeds)


def _fresh(n, seed):
    """A core of the usual size before its first epoch, and its data."""
    X, y = make_ehr(n_samples=n, random_state=seed)
    modalities = {"vitals": Tabular(["age", "heart_rate"]).fit(X)}
    blocks = {name: m.transform(X) for name, m in modalities.items()}
    target = classification_target(y)
    data = Data(blocks, np.arange(n), target.encode(y), np.ones(n, "float32"))
    with seeded(seed, CPU):
        core = FusionClassifier()._make_core(modalities, target)
    return core, data


# ---------------------------------------------------------------- the loop


def loop(args):
    """Seconds of an epoch by `train` without a checkpoint, against the bare statements of one."""
    n, n_epochs, repeats = (2_000, 4, 5) if args.quick else (4_000, 6, 9)
    times = {"bare loop": [], "train": []}
    for _ in range(repeats):
        for name, way in (("bare loop", _bare), ("train", _train)):
            core, data = _fresh(n, args.seeds[0])
            start = time.perf_counter()
            way(core, data, n_epochs, args.seeds[0])
            times[name].append((time.perf_counter() - start) / n_epochs)
    ratio = np.median(times["bare loop"]) / np.median(times["train"])
    task = "one epoch, 64 rows a batch"
    rows = [_line(args, task, name, "seconds", np.median(found), n)
            for name, found in times.items()]  # fmt: skip
    return [*rows, _line(args, task, "train", "speedup", ratio, n)]


def _train(core, data, n_epochs, seed):
    train(core, data, validation=None, max_epochs=n_epochs, batch_size=64, patience=None,
          seed=seed, device=CPU, **OPTIONS)  # fmt: skip


def _bare(core, data, n_epochs, seed):
    """The same steps with nothing around them."""
    optimizer = torch.optim.AdamW(core.param_groups(*OPTIONS.values()), fused=True)
    base = [group["lr"] for group in optimizer.param_groups]
    rng, step, n_steps = np.random.default_rng(seed), 0, n_epochs * count_batches(len(data), 64)
    with seeded(seed, CPU):
        for _ in range(n_epochs):
            core.train()
            for index in iterate(len(data), 64, rng, data.length):
                scale = core.lr_scale_at(step / n_steps)
                for group, rate in zip(optimizer.param_groups, base, strict=True):
                    group["lr"] = rate * scale
                loss = torch.stack(list(core.losses(data.batch(index)).values())).sum()
                if not torch.isfinite(loss):
                    raise FloatingPointError
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(core.parameters(), 1.0)
                optimizer.step()
                step += 1


# ---------------------------------------------------------------- with a checkpoint


def checkpoint(args):
    """Share of the time of a fit that goes into writing, at the defaults."""
    n, n_epochs = (2_000, 60) if args.quick else (4_000, 150)
    spent, keep, n_saves = [0.0], files.Checkpoint.keep, [0]

    def timed(self, *arguments, **options):
        start, before = time.perf_counter(), self.saved
        keep(self, *arguments, **options)
        spent[0] += time.perf_counter() - start
        n_saves[0] += self.saved - before

    files.Checkpoint.keep = timed
    X, y = make_ehr(n_samples=n, random_state=args.seeds[0])
    modalities = {"vitals": Tabular(["age", "heart_rate"])}
    with tempfile.TemporaryDirectory() as folder:
        clf = FusionClassifier(
            modalities, max_epochs=n_epochs, batch_size=64, random_state=args.seeds[0],
            checkpoint=folder,
        )  # fmt: skip
        start = time.perf_counter()
        clf.fit(X, y)
        whole = time.perf_counter() - start
        start = time.perf_counter()
        clf.fit(X, y)
        again = time.perf_counter() - start
    files.Checkpoint.keep = keep
    task = f"fit of {n_epochs} epochs"
    found = {
        "seconds": whole, "seconds_again": again, "saves": n_saves[0],
        "share_of_saves": spent[0] / whole,
    }  # fmt: skip
    return [_line(args, task, "FusionClassifier", name, v, n) for name, v in found.items()]


def digest(args):
    """Seconds to hash a gigabyte of rows, which a checkpoint does once."""
    n = 10_000 if args.quick else 100_000
    values = np.random.default_rng(args.seeds[0]).random((n, 1000), "float32")
    data = Data({"table": Block(np.ones(n, bool), {"values": values})}, np.arange(n))
    start = time.perf_counter()
    files._hash_data((data, None))
    seconds = (time.perf_counter() - start) / (values.nbytes / 1e9)
    return [_line(args, "digest of the data", "Checkpoint", "seconds_per_gb", seconds, n)]


if __name__ == "__main__":
    main()
