"""Speed of the alignment: the loss in pieces, and epochs over a text model whose lower layers ran.

Every figure is a ratio within one run.
"""

# First of all: it sets the number of threads.
# ruff: isort: off
from _common import finish, parse, parser, row
# ruff: isort: on

import json
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F

from ehrfuse import ClipEHRAligner, Tabular, Text
from ehrfuse.nn.losses import clip_loss

WIDTH = 256


def main():
    """Time and memory of the loss; time of a contrastive epoch."""
    options = parser(__doc__.splitlines()[0], ("loss", "text"))
    options.add_argument("--one-loss", nargs=2, help="internal: form and batch size")
    args = parse(options)
    if args.one_loss:
        print(json.dumps(_one_loss(args.one_loss[0], int(args.one_loss[1]))))
        return
    warnings.simplefilter("ignore")
    rows = []
    if "loss" in args.only:
        for size in (1024,) if args.quick else (1024, 4096, 8192):
            rows += _loss(size)
    if "text" in args.only:
        rows += _text(args)
    finish(args, rows)


# ---------------------------------------------------------------- loss


def _loss(size):
    """Each form in a process of its own, whose memory nothing else has touched."""
    found = {form: _in_process(form, size) for form in ("plain", "tiled")}
    plain, tiled = found["plain"], found["tiled"]
    if abs(plain["loss"] - tiled["loss"]) > 1e-4 * abs(plain["loss"]):
        raise AssertionError(f"the two forms differ: {found}")
    print(f"  loss, batch {size}: {found}", flush=True)
    name = f"batch {size}, width {WIDTH}"
    return [
        row("simulated", name, "clip_loss", "speedup", plain["ms"] / tiled["ms"], None, size),
        row("simulated", name, "clip_loss", "memory_ratio", plain["mb"] / tiled["mb"], None, size),
    ]


def _in_process(form, size):
    command = [sys.executable, __file__, "--one-loss", form, str(size)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _one_loss(form, size):
    """Milliseconds and megabytes of a forward and backward pass, beyond what was there before."""
    torch.manual_seed(0)
    a, b = (torch.randn(size, WIDTH, requires_grad=True) for _ in range(2))
    log_scale = torch.tensor(2.65, requires_grad=True)
    run = {"plain": _plain, "tiled": _tiled}[form]
    run(a[:4], b[:4], log_scale).backward()
    before, times = _peak(), []
    for _ in range(5):
        a.grad = b.grad = log_scale.grad = None
        start = time.process_time()
        loss = run(a, b, log_scale)
        loss.backward()
        times.append(time.process_time() - start)
    return {"ms": 1e3 * min(times), "mb": (_peak() - before) / 1024, "loss": float(loss.detach())}


def _peak():
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _plain(a, b, log_scale):
    logits = log_scale.exp() * F.normalize(a, dim=1) @ F.normalize(b, dim=1).t()
    own = torch.arange(len(a))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.t(), own)) / 2


def _tiled(a, b, log_scale):
    return clip_loss(F.normalize(a, dim=1), F.normalize(b, dim=1), log_scale.exp())


# ---------------------------------------------------------------- text


def _text(args):
    """Epochs over what the fixed layers gave once, against reading every note in every epoch."""
    with tempfile.TemporaryDirectory() as folder:
        # Half as wide as BERT's base; in narrow layers everything else would be timed.
        layers, width, n_notes = (6, 128, 64) if args.quick else (12, 384, 128)
        model = _write_bert(Path(folder), layers, width)
        X = _notes(n_notes, args.seed)
        rows = []
        for name, layers in (("frozen", 0), ("one layer trains", 1), ("two layers train", 2)):
            ours = _epoch(ClipEHRAligner, X, model, layers, args.seed)
            anew = _epoch(EveryEpoch, X, model, layers, args.seed)
            print(f"  text, {name}: cached {ours:.2f} s an epoch, anew {anew:.2f} s", flush=True)
            rows.append(row("simulated notes, BERT", name, "ClipEHRAligner", "speedup",
                            anew / ours, None, len(X), seeds=[args.seed]))  # fmt: skip
    return rows


def _epoch(kind, X, model, layers, seed):
    """Seconds of one epoch: three less one, divided by two, so that what runs once drops out."""
    inside = bool(layers) or kind is EveryEpoch
    note = Text("note", model=model, trainable=inside, max_length=250, chunk_length=64,
                pooling="cls")  # fmt: skip
    whole = ("notes.note.encoder.encoder.backbone",) if inside and not layers else ()

    def fit(epochs):
        aligner = kind(
            {"table": Tabular(["a", "b", "c"]), "note": note}, trainable_layers=max(1, layers),
            freeze=whole, n_d=16, n_a=8, embed_dim=32, batch_size=32, max_epochs=epochs,
            random_state=seed,
        )  # fmt: skip
        start = time.process_time()
        aligner.fit(X)
        return time.process_time() - start

    fit(1)  # the model is read from disk, and a frozen one fills its cache
    return max(1e-3, (fit(3) - fit(1)) / 2)


class EveryEpoch(ClipEHRAligner):
    """Reads every note anew in every epoch, the fixed layers without a gradient."""

    def _read_once(self, core, blocks):
        return blocks


def _write_bert(folder, layers, width):
    """A BERT with random weights."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import tiny_models
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=len(tiny_models._vocabulary()), hidden_size=width, num_hidden_layers=layers,
        num_attention_heads=width // 32, intermediate_size=4 * width, max_position_embeddings=128,
    )  # fmt: skip
    return tiny_models._write(BertModel, config, folder, 0, 128, True)


def _notes(n, seed):
    """Tables of three columns and notes of 40 to 240 tokens."""
    rng = np.random.default_rng(seed)
    words = "the no pain chest fever patient with of and was cough normal left right heart"
    X = pd.DataFrame(rng.normal(size=(n, 3)), columns=["a", "b", "c"])
    lengths = np.clip(rng.lognormal(4.5, 0.5, n), 20, 240).astype(int)
    X["note"] = [" ".join(rng.choice(words.split(), k)) for k in lengths]
    return X


if __name__ == "__main__":
    main()
