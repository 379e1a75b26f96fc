"""Time of an epoch of TabNet against pytorch-tabnet: 20,000 x 105, 20 % missing, batch 1,024.

The library refuses holes, so it gets the column's mean in their place. Ours reads them as they are,
which doubles its input by a flag a column, and also what the library gets ("filled"). An epoch
lasts from its start to the start of the next; a fit has five. Ratios are of one run, processor time
of this process, turn about, best of each.
"""

# First of all: it sets the number of threads.
# ruff: isort: off
from _common import finish, parse, parser, row
# ruff: isort: on

import contextlib
import io
import time
import warnings

import numpy as np
import torch

from ehrfuse import TabNetClassifier, TabNetPretrainer, Tabular

N_COLUMNS, BATCH, VIRTUAL, EPOCHS = 105, 1024, 128, 5
CASES = [(8, False), (8, True), (64, False), (64, True)]  # width, means for holes
LIBRARY = {
    "n_steps": 3, "gamma": 1.3, "n_independent": 2, "n_shared": 2, "mask_type": "sparsemax",
    "momentum": 0.02,
}  # fmt: skip


def main():
    """Supervised and pretraining epochs, at the library's default width and at 64."""
    args = parse(parser(__doc__.splitlines()[0]))
    n_rows, turns = (6_000, 1) if args.quick else (20_000, 3)
    X, y = _rows(n_rows, args.seed)
    warnings.simplefilter("ignore")
    rows = []
    for width, filled in CASES[:1] if args.quick else CASES:
        for task in FITS:
            rows += _compare(task, width, filled, X, y, turns, args.seed)
    finish(args, rows)


def _rows(n_rows, seed):
    import pandas as pd

    rng = np.random.default_rng(seed)
    values = rng.normal(size=(n_rows, N_COLUMNS)).astype("float32")
    y = (values[:, :5].sum(1) + 0.5 * rng.normal(size=n_rows) > 0).astype(int)
    values[rng.random(values.shape) < 0.2] = np.nan
    return pd.DataFrame(values, columns=[f"x{j}" for j in range(N_COLUMNS)]), y


def _compare(task, width, filled, X, y, turns, seed):
    """Turn about, so that what else the machine does falls on both."""
    X_filled = X.fillna(X.mean())
    ours, theirs = FITS[task]
    runs = {"ours": (ours, X_filled if filled else X), "theirs": (theirs, X_filled.to_numpy())}
    whole, epoch, loss = {n: [] for n in runs}, {n: [] for n in runs}, {}
    for _ in range(turns):
        for name, (fit, table) in runs.items():
            STARTS.clear()
            start = time.process_time()
            loss[name] = fit(table, y, width, seed)
            whole[name].append(time.process_time() - start)
            epoch[name].extend(np.diff(STARTS))
    whole, epoch = ({n: float(min(v)) for n, v in found.items()} for found in (whole, epoch))
    print(f"  {task}, width {width}, filled {filled}: seconds an epoch {epoch}, a fit {whole}, "
          f"loss {loss}", flush=True)  # fmt: skip
    model = "TabNetClassifier" if task == "supervised" else "TabNetPretrainer"
    name = f"{task}, n_d = n_a = {width}" + (", filled" if filled else "")
    made = [
        ("speedup", epoch["theirs"] / epoch["ours"]),
        ("speedup_of_a_fit", whole["theirs"] / whole["ours"]),
        ("loss", loss["ours"]), ("loss_of_pytorch_tabnet", loss["theirs"]),
    ]  # fmt: skip
    return [row("simulated, 20 % missing", name, model, metric, value, None, len(X), seeds=[seed])
            for metric, value in made]  # fmt: skip


def _options(width, seed):
    return dict(
        n_d=width, n_a=width, virtual_batch_size=VIRTUAL, batch_size=BATCH, max_epochs=EPOCHS,
        lr=2e-2, weight_decay=0.0, random_state=seed, device="cpu", verbose=False, **LIBRARY,
    )  # fmt: skip


STARTS = []  # processor time at the start of every epoch


class Timed:
    """Notes when an epoch starts; its rate is constant."""

    def _make_core(self, modalities, target):
        core = super()._make_core(modalities, target)
        core.on_epoch_start = lambda epoch: STARTS.append(time.process_time())
        core.lr_scale_at = lambda progress: 1.0  # as in the library: no warm-up, no cosine
        return core


class TimedClassifier(Timed, TabNetClassifier):
    """`TabNetClassifier` that does."""


class TimedPretrainer(Timed, TabNetPretrainer):
    """`TabNetPretrainer` that does."""


def _our_classifier(X, y, width, seed):
    modalities = {"table": Tabular(list(X), n_bins=1)}
    fitted = TimedClassifier(modalities, lambda_sparse=1e-3, **_options(width, seed)).fit(X, y)
    return fitted.history_[-1]["train_loss"]


def _our_pretrainer(X, y, width, seed):
    modalities = {"table": Tabular(list(X), n_bins=1)}
    fitted = TimedPretrainer(modalities, mask_ratio=0.5, **_options(width, seed)).fit(X)
    return fitted.history_[-1]["train_loss"]


def _their_classifier(X, y, width, seed):
    from pytorch_tabnet.tab_model import TabNetClassifier as Theirs

    return _their_fit(Theirs, (X, y), {"compute_importance": False}, width, seed)


def _their_pretrainer(X, y, width, seed):
    from pytorch_tabnet.pretraining import TabNetPretrainer as Theirs

    return _their_fit(Theirs, (X,), {"pretraining_ratio": 0.5}, width, seed)


def _their_fit(kind, data, options, width, seed):
    from pytorch_tabnet.callbacks import Callback

    class Start(Callback):
        def on_epoch_begin(self, epoch, logs=None):
            STARTS.append(time.process_time())

    with contextlib.redirect_stdout(io.StringIO()), torch.random.fork_rng([]):
        model = kind(n_d=width, n_a=width, verbose=0, seed=seed, device_name="cpu")
        model.fit(
            *data, max_epochs=EPOCHS, batch_size=BATCH, virtual_batch_size=VIRTUAL,
            drop_last=False, callbacks=[Start()],
            **options,
        )  # fmt: skip
    return float(model.history["loss"][-1])


FITS = {
    "supervised": (_our_classifier, _their_classifier),
    "pretraining": (_our_pretrainer, _their_pretrainer),
}

if __name__ == "__main__":
    main()
