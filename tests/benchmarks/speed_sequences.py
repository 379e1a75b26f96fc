"""Speed of sequences: batches cut from flat arrays against a DataLoader that pads, and one fit.

Run ``python tests/benchmarks/speed_sequences.py --help`` for the options; README.md says what every
line shows.
"""

# ruff: isort: off
from _common import finish, parse, parser, row  # first: it sets the number of threads
# ruff: isort: on

import time
from itertools import pairwise

import numpy as np
import pandas as pd
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from ehrfuse import Events, FusionClassifier, RAPTClassifier, RAPTPretrainer, SequenceClassifier
from ehrfuse._data import Batch, Block, Data, iterate
from ehrfuse._runtime import seeded
from ehrfuse._targets import classification_target
from ehrfuse._train import train
from ehrfuse.datasets import fetch_physionet2012

SECTIONS = ("batches", "fit")
EVENTS, CODES, BATCH = 440, 37, 64
CPU = torch.device("cpu")


def main():
    """Run the sections asked for and print one table."""
    args = parse(parser(__doc__.splitlines()[0], SECTIONS))
    run = {"batches": batches, "fit": fit}
    finish(args, [r for section in args.only for r in run[section](args)])


def _line(dataset, task, model, metric, value, n, args):
    return row(dataset, task, model, metric, value, None, n, seeds=args.seeds)


def _seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


# ---------------------------------------------------------------- batches and epochs


def batches(args):
    """Time to produce the batches of an epoch, and to train for one, in both ways."""
    n = 3_000 if args.quick else 12_000
    data = _stays(n, np.random.default_rng(args.seeds[0]))
    ways = {"cut from flat arrays": lambda: _drain_cuts(data)}
    loaders = {
        f"{kind.__name__}, {workers} workers": _loader(kind(data), workers)
        for kind in (RowViews, RowTensors)
        for workers in (0, 2)
    }
    ways |= {way: lambda x=loader: _drain(x) for way, loader in loaders.items()}
    # The fastest turn: on a machine that others use too, the slow ones measure them.
    seconds = {w: min(_seconds(f) for _ in range(2 if args.quick else 4)) for w, f in ways.items()}
    task, ours = "batches of one epoch", seconds["cut from flat arrays"]
    rows = [_line("synthetic", task, way, "seconds", s, n, args) for way, s in seconds.items()]
    for kind in (RowViews, RowTensors):
        rival = min(s for way, s in seconds.items() if way.startswith(kind.__name__))
        name = f"cut against {kind.__name__}"
        rows.append(_line("synthetic", task, name, "speedup", rival / ours, n, args))
    return rows + _epochs(data, loaders[min(loaders, key=seconds.get)], n, args)


def _stays(n, rng):
    """Streams of about `EVENTS` events a stay, as long-tailed as those of intensive care."""
    length = np.maximum(1, rng.gamma(4, EVENTS / 4, n)).astype("int64")
    offsets = np.concatenate([[0], np.cumsum(length)])
    total = int(offsets[-1])
    ragged = {
        "code": (rng.integers(0, CODES, total).astype("int32"), offsets),
        "value": (rng.standard_normal(total, dtype="float32"), offsets),
        "time": (rng.random(total, dtype="float32"), offsets),
    }
    y = (rng.random((n, 1)) < 0.14).astype("float32")
    block = Block(np.ones(n, bool), ragged=ragged)
    return Data({"events": block}, np.arange(n), y, np.ones(n, "float32"))


def _drain_cuts(data):
    for index in iterate(len(data), BATCH, np.random.default_rng(0), data.length):
        data.batch(index)


def _drain(loader):
    for _ in loader:
        pass


class RowViews(Dataset):
    """One stay at a time as views of tensors in memory: the least that an item can cost."""

    def __init__(self, data):
        ragged = data.blocks["events"].ragged
        cuts = ragged["code"][1]
        self.y = torch.from_numpy(data.y)
        self.parts = {
            name: [torch.from_numpy(flat[a:b]) for a, b in pairwise(cuts)]
            for name, (flat, _) in ragged.items()
        }

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        return {name: self.cell(part[i]) for name, part in self.parts.items()}, self.y[i]

    def cell(self, part):
        """The stay as it is."""
        return part


class RowTensors(RowViews):
    """The same with a tensor made for every stay, as most code that one meets has it."""

    def cell(self, part):
        """A tensor of its own."""
        return torch.tensor(part.numpy())


def pad(items):
    """Collate: every part padded to the batch's longest, with one mask for all."""
    parts = {n: pad_sequence([x[n] for x, _ in items], batch_first=True) for n in items[0][0]}
    length = torch.tensor([len(x["code"]) for x, _ in items])
    mask = torch.arange(int(length.max())) < length[:, None]
    parts |= {f"{name}_mask": mask for name in list(parts)}
    return parts, torch.stack([y for _, y in items])


def _loader(rows, workers):
    generator = torch.Generator().manual_seed(0)
    return DataLoader(
        rows, BATCH, shuffle=True, num_workers=workers, collate_fn=pad, generator=generator,
        persistent_workers=workers > 0,
    )  # fmt: skip


class Served:
    """A loader in the clothes of `Data`, so that the very same loop trains from it."""

    length = None

    def __init__(self, data, loader):
        self.data, self.loader, self.batches = data, loader, iter(())

    def __len__(self):
        return len(self.data)

    def batch(self, index):
        """The next batch of the loader, which shuffles by itself."""
        found = next(self.batches, None)
        if found is None:
            self.batches = iter(self.loader)
            found = next(self.batches)
        parts, y = found
        here = {"events": torch.ones(len(y), dtype=torch.bool)}
        return Batch({"events": parts}, here, y, torch.ones(len(y)))


def _epochs(data, loader, n, args):
    ways = {"cut from flat arrays": data, "DataLoader": Served(data, loader)}
    _train_one(data, Data(**vars(data) | {"rows": data.rows[:BATCH]}))  # torch wakes up here
    seconds = {
        way: min(_train_one(data, source) for _ in range(1 if args.quick else 2))
        for way, source in ways.items()
    }
    task = "training epoch"
    rows = [_line("synthetic", task, way, "seconds", s, n, args) for way, s in seconds.items()]
    speedup = seconds["DataLoader"] / seconds["cut from flat arrays"]
    return [*rows, _line("synthetic", task, "cut from flat arrays", "speedup", speedup, n, args)]


def _train_one(data, source):
    """Seconds of one epoch of the one loop, from either source of batches."""
    core = _core(data)
    return _seconds(lambda: train(
        core, source, validation=None, max_epochs=1, batch_size=BATCH, lr=1e-3, weight_decay=0.0,
        patience=None, seed=0, device=CPU,
    ))  # fmt: skip


def _core(data):
    """The network of the raw stream, 16 wide, one member."""
    cell = [{"time": -1.0 - j, "code": f"c{j:02d}", "value": float(j)} for j in range(CODES)]
    stream = Events("events", summary=False, stream=True)
    modalities = {"events": stream.fit(pd.DataFrame({"events": [cell, cell]}))}
    target = classification_target(data.y[:, 0].astype(int), None)
    with seeded(0, CPU):
        return FusionClassifier(d_model=16, n_members=1)._make_core(modalities, target)


# ---------------------------------------------------------------- one fit


def fit(args):
    """Seconds of one fit on 3,200 stays with the defaults, pretraining apart."""
    data = fetch_physionet2012(args.data)
    n = 800 if args.quick else 3_200
    X, y, modalities = data.X.iloc[:n], data.y.iloc[:n], data.modalities
    models = {
        "RAPTClassifier(no pretraining)": RAPTClassifier(modalities, random_state=0),
        "RAPTClassifier": RAPTClassifier(modalities, pretrained=RAPTPretrainer(), random_state=0),
    }
    for name in ("lstm", "retain", "grud"):
        models[f"SequenceClassifier({name})"] = SequenceClassifier(
            modalities, architecture=name, random_state=0
        )
    name = "physionet-2012/set-a"
    return [
        _line(name, "one fit", model, "seconds", _seconds(lambda m=m: m.fit(X, y)), n, args)
        for model, m in models.items()
    ]


if __name__ == "__main__":
    main()
