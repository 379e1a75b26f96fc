"""Speed of MaskedLabPretrainer, in processor time: pretraining, and imputation in batches.

Run ``python tests/benchmarks/speed_masked_labs.py --help`` for the options; README.md says what
every line shows.
"""

# ruff: isort: off
from _common import finish, parse, parser, row  # first: it sets the number of threads
# ruff: isort: on

import time

import numpy as np
import pandas as pd
import torch
from torch import nn

from ehrfuse import Labs, MaskedLabPretrainer
from ehrfuse._train import train
from ehrfuse.nn.lab_transformer import LabTransformer

SECTIONS = ("pretraining", "impute", "streams")
ROWS, COLUMNS, MISSING, MASK = 10_000, 100, 0.6, 0.75
BATCH = 256
CPU = torch.device("cpu")
OURS = "MaskedLabPretrainer"


def main():
    """Run the sections asked for and print one table."""
    args = parse(parser(__doc__.splitlines()[0], SECTIONS))
    run = {"pretraining": pretraining, "impute": impute, "streams": streams}
    finish(args, [r for section in args.only for r in run[section](args)])


def _labs(n, seed):
    """Correlated labs, 60 % missing at random."""
    rng = np.random.default_rng(seed)
    table = rng.standard_normal((n, 10)) @ rng.standard_normal((10, COLUMNS))
    table[rng.random(table.shape) < MISSING] = np.nan
    return pd.DataFrame(table, columns=[f"lab{j}" for j in range(COLUMNS)])


def _line(task, model, metric, value, n, args):
    return row("synthetic 100 labs, 60 % missing", task, model, metric, value, None, n,
               seeds=args.seeds)  # fmt: skip


# ---------------------------------------------------------------- pretraining


class AllPositions(nn.Module):
    """A masked autoencoder as the stock modules give it: one token per column, every column.

    Parameters
    ----------
    encoder : ehrfuse.nn.lab_transformer.LabTransformer
        Whose sizes are taken.
    padded : bool
        Leave missing columns out of attention by a key-padding mask, or give them a learned token
        as the hidden ones have.
    """

    def __init__(self, encoder, padded):
        super().__init__()
        width, n_heads = encoder.what.embedding_dim, encoder.blocks[0].n_heads
        self.padded = padded
        self.what = nn.Parameter(torch.randn(COLUMNS, width) * 0.1)
        self.level = nn.Parameter(torch.randn(COLUMNS, width) * 0.1)
        self.hidden, self.missing = (nn.Parameter(torch.zeros(width)) for _ in range(2))
        layer = nn.TransformerEncoderLayer(
            width, n_heads, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, len(encoder.blocks), enable_nested_tensor=False)
        self.read = nn.Parameter(torch.randn(COLUMNS, width) * 0.1)

    def forward(self, value, known, hidden):
        """Guesses of all columns (b, p)."""
        token = self.what + value[..., None] * self.level
        token = torch.where(hidden[..., None], self.what + self.hidden, token)
        if not self.padded:
            token = torch.where(known[..., None], token, self.what + self.missing)
        token = self.blocks(token, src_key_padding_mask=~known if self.padded else None)
        return (token * self.read).sum(-1)


def pretraining(args):
    """Rows times epochs a second of both, in turns; loss, gradient and optimiser included."""
    n = 2_000 if args.quick else ROWS
    turns = 2 if args.quick else 3
    X = _labs(n, args.seeds[0])
    ours = MaskedLabPretrainer(
        {"labs": Labs(list(X))}, mask_ratio=MASK, max_epochs=1, batch_size=BATCH,
        random_state=args.seeds[0],
    ).fit(X)  # fmt: skip
    data = ours._data(X, None, np.ones(n, "float32"))
    core = ours.module_
    table = torch.from_numpy(((X - X.mean()) / X.std()).to_numpy("float32"))
    rivals = {
        f"nn.TransformerEncoder, all positions, {name}": AllPositions(core.encoders["labs"], padded)
        for name, padded in (("padding mask", True), ("learned missing token", False))
    }
    ways = {OURS: lambda: _our_epoch(core, data)}
    ways |= {name: lambda m=model: _their_epoch(m, table) for name, model in rivals.items()}
    seconds = dict.fromkeys(ways, np.inf)
    for _ in range(turns):  # in turns, so that a busy minute hits all of them
        for name, epoch in ways.items():
            seconds[name] = min(seconds[name], _seconds(epoch))
    task = "rows x epochs per second"
    rows = [_line(task, name, "rows_per_second", n / s, n, args) for name, s in seconds.items()]
    rival = min(rivals, key=seconds.get)
    return rows + [_line(task, OURS, "speedup", seconds[rival] / seconds[OURS], n, args)]


def _seconds(function):
    start = time.process_time()
    function()
    return time.process_time() - start


def _our_epoch(core, data):
    train(
        core, data, validation=None, max_epochs=1, batch_size=BATCH, lr=1e-3, weight_decay=0.05,
        patience=None, seed=0, device=CPU,
    )  # fmt: skip


def _their_epoch(model, table):
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05, fused=True)
    model.train()
    for part in torch.randperm(len(table)).split(BATCH):
        value = table[part]
        known = ~value.isnan()
        value = value.nan_to_num()
        hidden = known & (torch.rand(value.shape) < MASK)
        guess = model(value, known, hidden)
        loss = nn.functional.huber_loss(guess[hidden], value[hidden], delta=3.0)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


# ---------------------------------------------------------------- imputation


def impute(args):
    """All rows at once against one after the other (timed on some of them), and the difference."""
    n, alone = (2_000, 40) if args.quick else (ROWS, 100)
    X = _labs(n, args.seeds[0])
    model = MaskedLabPretrainer(
        {"labs": Labs(list(X))}, max_epochs=1, random_state=args.seeds[0]
    ).fit(X.iloc[:1000])  # fmt: skip
    batched, single = np.inf, np.inf
    for _ in range(2):
        start = time.process_time()
        whole = model.impute(X)
        batched = min(batched, time.process_time() - start)
        start = time.process_time()
        rows = [model.impute(X.iloc[[i]]) for i in range(alone)]
        single = min(single, time.process_time() - start)
    worst = float(np.abs(pd.concat(rows) - whole.iloc[:alone]).max(axis=None))
    task = "impute"
    return [
        _line(task, f"{OURS}, all rows", "rows_per_second", n / batched, n, args),
        _line(task, f"{OURS}, row by row", "rows_per_second", alone / single, alone, args),
        _line(task, OURS, "speedup", (n / batched) / (alone / single), n, args),
        _line(task, OURS, "largest_difference", worst, alone, args),
    ]


# ---------------------------------------------------------------- streams of unequal length


def streams(args):
    """Forward and backward of the lab transformer on rows of unequal length, cut or padded."""
    n, turns = 64, 2 if args.quick else 5
    rng = np.random.default_rng(args.seeds[0])
    torch.manual_seed(args.seeds[0])
    length = np.minimum(rng.lognormal(3.0, 1.3, n), 512).astype(int)  # median 20, as in MIMIC-IV
    mask = torch.arange(length.max()) < torch.from_numpy(length)[:, None]
    x = {
        "code": torch.randint(0, COLUMNS, mask.shape), "value": torch.randn(mask.shape),
        "code_mask": mask,
    }  # fmt: skip
    encoder = LabTransformer(COLUMNS, 32, 64, 3, 4)

    def step(read):
        tokens, _ = read(x)
        tokens[nn.functional.pad(mask, (1, 0), value=True)].sum().backward()

    seconds = {}
    ways = {OURS: encoder, f"{OURS}, padded to the longest": encoder._read}
    for _ in range(turns):
        for name, read in ways.items():
            seconds[name] = min(seconds.get(name, np.inf), _seconds(lambda r=read: step(r)))
    ours, padded = seconds.values()
    task = "streams of unequal length"
    rows = [_line(task, name, "rows_per_second", n / s, n, args) for name, s in seconds.items()]
    return [*rows, _line(task, OURS, "speedup", padded / ours, n, args)]


if __name__ == "__main__":
    main()
