"""Speed and memory: rows sliced from memory against a DataLoader, and a text cache at work.

Run ``python tests/benchmarks/speed_batching.py --help`` for the options; README.md says what every
line shows.
"""

# ruff: isort: off
from _common import finish, parse, parser, row  # first: it sets the number of threads
# ruff: isort: on

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from sklearn.model_selection import KFold, cross_val_score
from torch.utils.data import DataLoader, Dataset

from ehrfuse import (
    Embedding,
    FusionClassifier,
    MMNARFusionClassifier,
    Tabular,
    Text,
    _hub,
)
from ehrfuse._data import Batch, Block, Data, iterate
from ehrfuse._runtime import seeded
from ehrfuse._targets import classification_target
from ehrfuse._train import train

SECTIONS = ("batches", "memory", "text")
COLUMNS = 5_000
VECTORS = {"note": 768, "report": 768, "film": 1376}  # widths of precomputed embeddings
BATCH = 256
CPU = torch.device("cpu")
MMNAR = "MMNARFusionClassifier"


def main():
    """Run the sections asked for and print one table."""
    options = parser(__doc__.splitlines()[0], SECTIONS)
    options.add_argument("--peak-of", help="internal: fit this class and print the memory it took")
    options.add_argument("--rows", type=int, default=1000, help="internal: rows of the fit")
    options.add_argument("--bins", type=int, default=8, help="internal: bins of the table")
    args = parse(options)
    if args.peak_of:
        print(json.dumps(_peak(args.peak_of, args.rows, args.bins, args.seeds[0])))
        return
    run = {"batches": batches, "memory": memory, "text": text}
    finish(args, [r for section in args.only for r in run[section](args)])


def _line(task, model, metric, values, n, args):
    values = np.atleast_1d(values)
    sd = values.std() if len(values) > 1 else None
    return row("synthetic", task, model, metric, values.mean(), sd, n, seeds=args.seeds)


# ---------------------------------------------------------------- batches and epochs


def batches(args):
    """Time to produce the batches of an epoch, and to train for one, in both ways."""
    n = 4_000 if args.quick else 20_000
    rng = np.random.default_rng(args.seeds[0])
    blocks = {"table": Block(np.ones(n, bool), {"values": _random(rng, n, COLUMNS)})}
    for name, width in VECTORS.items():
        blocks[name] = Block(rng.random(n) < 0.7, {"values": _random(rng, n, width)})
    y = (rng.random((n, 1)) < 0.3).astype("float32")
    data = Data(blocks, np.arange(n), y, np.ones(n, "float32"))
    task, repeats = "batches of one epoch", 2 if args.quick else 4
    ways = {"sliced from arrays": lambda: _drain_slices(data)}
    loaders = {
        f"{kind.__name__}, {workers} workers": _loader(kind(data), workers)
        for kind in (ArrayRows, TensorRows)
        for workers in (0, 2)
    }
    ways |= {way: lambda x=loader: _drain(x) for way, loader in loaders.items()}
    # The fastest turn: on a machine that others use too, the slow ones measure them.
    seconds = {way: min(_seconds(f) for _ in range(repeats)) for way, f in ways.items()}
    rows = [_line(task, way, "seconds", s, n, args) for way, s in seconds.items()]
    for kind in (ArrayRows, TensorRows):
        rival = min((way for way in loaders if way.startswith(kind.__name__)), key=seconds.get)
        speedup = seconds[rival] / seconds["sliced from arrays"]
        name = f"sliced against {kind.__name__}"
        rows.append(_line(task, name, "speedup", speedup, n, args))
    fastest = loaders[min(loaders, key=seconds.get)]
    return rows + _epochs(data, fastest, n, args, 1 if args.quick else 2)


def _random(rng, n, width):
    return rng.standard_normal((n, width), dtype="float32")


def _seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _drain_slices(data):
    for index in iterate(len(data), BATCH, np.random.default_rng(0), data.length):
        data.batch(index)


def _drain(loader):
    for _ in loader:
        pass


class ArrayRows(Dataset):
    """One row at a time as views of the arrays in memory: the least that an item can cost."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        blocks = self.data.blocks.items()
        return {
            "inputs": {n: {key: self.cell(a[i]) for key, a in b.arrays.items()} for n, b in blocks},
            "present": {name: block.present[i] for name, block in blocks},
            "y": self.cell(self.data.y[i]),
            "weight": self.data.weight[i],
        }

    def cell(self, row):
        """The row as it is."""
        return row


class TensorRows(ArrayRows):
    """The same with a tensor made for every cell, as most code that one meets has it."""

    def cell(self, row):
        """A tensor of its own."""
        return torch.tensor(row)


def _loader(rows, workers):
    generator = torch.Generator().manual_seed(0)
    return DataLoader(
        rows, BATCH, shuffle=True, num_workers=workers, generator=generator,
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
        return Batch(**found)


def _epochs(data, loader, n, args, repeats):
    ways = {"sliced from arrays": data, "DataLoader": Served(data, loader)}
    _train_one(data, Data(**vars(data) | {"rows": data.rows[:BATCH]}))  # torch wakes up here
    seconds = {
        way: np.mean([_train_one(data, source) for _ in range(repeats)])
        for way, source in ways.items()
    }
    rows = [_line("training epoch", way, "seconds", s, n, args) for way, s in seconds.items()]
    speedup = seconds["DataLoader"] / seconds["sliced from arrays"]
    return [*rows, _line("training epoch", "sliced from arrays", "speedup", speedup, n, args)]


def _train_one(data, source):
    """Seconds of one epoch of the one loop, from either source of batches."""
    core = _core(data)
    return _seconds(lambda: train(
        core, source, validation=None, max_epochs=1, batch_size=BATCH, lr=1e-3, weight_decay=0.0,
        patience=None, seed=0, device=CPU,
    ))  # fmt: skip


def _core(data):
    """A small core, so that the epoch is not all arithmetic: 8 wide, one member."""
    few = np.arange(200)
    frame = pd.DataFrame(data.blocks["table"].arrays["values"][few])
    frame.columns = [f"c{j}" for j in frame]
    modalities = {"table": Tabular(list(frame.columns), n_bins=1).fit(frame)}
    for name in VECTORS:
        cells = list(data.blocks[name].arrays["values"][few])
        modalities[name] = Embedding(name).fit(pd.DataFrame({name: cells}))
    target = classification_target(data.y[:, 0].astype(int), None)
    estimator = FusionClassifier(d_model=8, n_members=1)
    with seeded(0, CPU):
        return estimator._make_core(modalities, target)


# ---------------------------------------------------------------- memory


def memory(args):
    """Peak memory of a fit above the import baseline, over the bytes of the frame."""
    n = 4_000 if args.quick else 20_000
    rows = []
    for name, bins in (("FusionClassifier", 2), (MMNAR, 2), (MMNAR, 8)):
        command = [sys.executable, __file__, "--peak-of", name, "--rows", str(n)]
        command += ["--bins", str(bins), "--seed", str(args.seeds[0])]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = json.loads(out.splitlines()[-1])
        ratio = found["peak"] / found["input"]
        size, name = found["input"] / 2**20, f"{name}(n_bins={bins})"
        rows.append(_line("memory of a fit", name, "memory_ratio", ratio, n, args))
        rows.append(_line("memory of a fit", name, "input_mb", size, n, args))
    return rows


def _peak(name, n, bins, seed):
    """Fit in this process; bytes of the frame, and of the peak above the process after import."""
    baseline = _status("VmRSS")
    rng = np.random.default_rng(seed)
    X = pd.DataFrame(_random(rng, n, COLUMNS), columns=[f"c{j}" for j in range(COLUMNS)])
    y = (rng.random(n) < 0.3).astype(int)
    modalities = {"table": Tabular(list(X.columns), n_bins=bins)}
    vectors = {vector: _vectors(rng, n, width) for vector, width in VECTORS.items()}
    X = pd.concat([X, pd.DataFrame(vectors)], axis=1)
    modalities |= {vector: Embedding(vector) for vector in VECTORS}
    size = int(X.memory_usage(index=False, deep=True).sum())
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is that of making the frame
    kind = MMNARFusionClassifier if name == MMNAR else FusionClassifier
    model = kind(
        modalities, d_model=8, n_members=1, max_epochs=1, batch_size=BATCH, random_state=seed
    )
    model.fit(X, y)
    return {"input": size, "peak": _status("VmHWM") - baseline}


def _vectors(rng, n, width):
    """Arrow lists, null in three of ten rows."""
    offsets = np.arange(n + 1, dtype="int32") * width
    flat = pa.array(rng.standard_normal(n * width, dtype="float32"))
    cells = pa.ListArray.from_arrays(pa.array(offsets), flat, mask=pa.array(rng.random(n) < 0.3))
    return pd.Series(pd.arrays.ArrowExtensionArray(cells))


def _status(field):
    """Bytes of this process: VmRSS is now, VmHWM the peak since it was last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ---------------------------------------------------------------- a cached text column


def text(args):
    """Encoding time of two cross-validations over a frozen encoder, the second from the cache."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import tiny_models

    n, length = (300, 150) if args.quick else (1_000, 300)
    rng = np.random.default_rng(args.seeds[0])
    notes = [" ".join(rng.choice(tiny_models.WORDS, length)) for _ in range(n)]
    X, y = pd.DataFrame({"note": notes}), (rng.random(n) < 0.4).astype(int)
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_models.write_bert(Path(folder) / "model", hidden=128)
        note = Text("note", model=model, chunk_length=64, cache=Path(folder) / "cache.sqlite")
        clf = FusionClassifier({"note": note}, n_members=1, max_epochs=2, random_state=0)
        first, second = (_encoding_seconds(clf, X, y) for _ in range(2))
    task = "frozen text encoder, two cross-validations"
    return [
        _line(task, "first", "encoding_seconds", first, n, args),
        _line(task, "second", "encoding_seconds", second, n, args),
        _line(task, "second", "share_of_first", second / first, n, args),
    ]


def _encoding_seconds(clf, X, y):
    """Seconds of a cross-validation that go into turning notes into vectors."""
    spent, encode = [], _hub.encode_texts

    def timed(*args, **options):
        start = time.perf_counter()
        found = encode(*args, **options)
        spent.append(time.perf_counter() - start)
        return found

    _hub.encode_texts = timed
    try:
        cross_val_score(clf, X, y, cv=KFold(3), error_score="raise")
    finally:
        _hub.encode_texts = encode
    return sum(spent)


if __name__ == "__main__":
    main()
