"""The loop's guarantees, on a core of three lines."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

from ehrfuse._data import Block, Data
from ehrfuse._train import evaluate, predict, train
from ehrfuse.nn.core import Core
from ehrfuse.nn.encoders import VectorEncoder

CPU = torch.device("cpu")
OPTIONS = {"max_epochs": 8, "batch_size": 8, "lr": 1e-2, "weight_decay": 0.0, "patience": None}


class Stub(Core):
    """A linear layer on vectors; counts what the loop calls."""

    def __init__(self, fail_at=None, interrupt_at=None):
        super().__init__({"x": VectorEncoder([0.0] * 3, [1.0] * 3, 4)}, heads=nn.Linear(4, 1))
        self.fail_at, self.interrupt_at = fail_at, interrupt_at
        self.calls, self.sizes = [], []

    def forward(self, batch):
        return self.heads(self.encode(batch).pooled[:, 0])

    def losses(self, batch):
        self.sizes.append(len(batch.weight))
        noise = torch.rand(()) * 0.0
        error = (self(batch) - batch.y).square().mean() + noise
        if self.fail_at is not None and self.training and len(self.sizes) > self.fail_at:
            error = error * torch.nan
        if self.interrupt_at is not None and len(self.sizes) > self.interrupt_at:
            raise KeyboardInterrupt
        return {"fit": error, "extra": error * 0.1}

    def on_epoch_start(self, epoch):
        self.calls.append(epoch)


def make_data(n=41, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 3)).astype("float32")
    y = x.sum(1, keepdims=True).astype("float32")
    blocks = {"x": Block(np.ones(n, bool), {"values": x})}
    return Data(blocks, np.arange(n), y, np.ones(n, "float32"))


def fitted(seed=0, **options):
    torch.manual_seed(0)
    core = Stub(**{k: options.pop(k) for k in ("fail_at", "interrupt_at") if k in options})
    history = train(
        core, make_data(), seed=seed, device=CPU, **OPTIONS | {"validation": None} | options
    )
    return core, history


def test_same_seed_same_weights_and_global_stream_untouched():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    core, _ = fitted()
    torch.set_rng_state(state)
    twin, _ = fitted()
    torch.set_rng_state(state)
    other, _ = fitted(seed=1)
    same = [torch.equal(a, b) for a, b in zip(core.parameters(), twin.parameters(), strict=True)]
    assert all(same)
    assert not torch.equal(core.heads.weight, other.heads.weight)


def test_training_leaves_the_torch_stream_alone():
    core = Stub()
    state = torch.get_rng_state()
    train(core, make_data(), seed=0, device=CPU, **OPTIONS, validation=None)
    assert torch.equal(state, torch.get_rng_state())


def test_no_batch_of_one_row():
    core, _ = fitted()  # 41 rows in batches of 8 would leave one over
    assert min(core.sizes) > 1
    assert core.calls == list(range(8))


def test_history_is_a_tidy_list():
    _, history = fitted(validation=make_data(seed=1))
    assert len(history) == 8
    assert set(history[0]) == {
        "epoch", "train_loss", "train_fit", "train_extra", "val_loss", "val_fit", "val_extra",
    }  # fmt: skip
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    assert history[0]["train_loss"] == pytest.approx(
        history[0]["train_fit"] + history[0]["train_extra"], rel=1e-5
    )


def test_best_weights_come_back():
    validation = make_data(seed=1)
    core, history = fitted(validation=validation, lr=0.5, max_epochs=12)
    best = min(record["val_loss"] for record in history)
    assert evaluate(core, validation, 8, 0, CPU)["val_loss"] == pytest.approx(best, rel=1e-5)


def test_patience_stops():
    validation = make_data(seed=1)
    validation = Data(validation.blocks, validation.rows, -validation.y, validation.weight)
    _, history = fitted(validation=validation, patience=2, max_epochs=50)
    assert len(history) < 50


def test_bad_loss_names_its_term_and_epoch():
    with pytest.raises(FloatingPointError, match=r"'fit' is nan in epoch 1; try a smaller lr"):
        fitted(fail_at=6)


def test_interrupt_keeps_the_best_so_far():
    with pytest.warns(UserWarning, match=r"interrupted after 2 full epochs.*latest"):
        core, history = fitted(interrupt_at=12)
    assert len(history) == 2
    assert np.isfinite(predict(core, make_data(), 8, CPU)).all()


def test_interrupt_with_validation_restores_the_best_epoch():
    validation = make_data(seed=1)
    with pytest.warns(UserWarning, match="keeps the best"):
        core, history = fitted(interrupt_at=28, validation=validation)
    core.interrupt_at = None
    best = min(record["val_loss"] for record in history)
    assert evaluate(core, validation, 8, 0, CPU)["val_loss"] == pytest.approx(best, rel=1e-5)


def test_report_can_stop():
    seen = []
    _, history = fitted(report=lambda record: seen.append(record) or len(seen) == 3)
    assert len(history) == 3


def test_frozen_parts_stay_and_keep_eval_mode():
    torch.manual_seed(0)
    core = Stub()
    before = {name: p.clone() for name, p in core.encoders.named_parameters()}
    core.freeze(["encoders.x"])
    train(core, make_data(), seed=0, device=CPU, **OPTIONS, validation=None)
    core.train()
    assert not core.encoders["x"].training
    assert core.heads.training
    for name, p in core.encoders.named_parameters():
        assert torch.equal(p, before[name])
    with pytest.raises(ValueError, match=r"encoders\.y.*does not have; choose from .*encoders\.x"):
        core.freeze(["encoders.y"])


def test_only_weight_matrices_decay():
    groups = Stub().param_groups(1e-3, 0.5)
    decays = {p.ndim: group["weight_decay"] for group in groups for p in group["params"]}
    assert decays == {2: 0.5, 1: 0.0}


def test_learning_rate_warms_up_and_ends_at_zero():
    rates = [Stub().lr_scale_at(p) for p in np.linspace(0, 1, 101)]
    assert rates[0] < 0.02
    assert max(rates) > 0.9
    assert rates[-1] == pytest.approx(0.0, abs=1e-9)
    assert np.argmax(rates) < 20


def test_prediction_keeps_the_order_whatever_the_batch():
    core, _ = fitted()
    data = make_data()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = predict(core, data, 1000, CPU)
    np.testing.assert_allclose(predict(core, data, 3, CPU), whole, atol=1e-12)
    assert whole.dtype == np.float64
    assert next(core.parameters()).dtype == torch.float32


def test_amp_runs_on_the_cpu():
    _, history = fitted(amp=True)
    assert history[-1]["train_loss"] < history[0]["train_loss"]


def test_the_last_step_is_the_last_of_the_schedule():
    seen = []

    class Watched(Stub):
        def lr_scale_at(self, progress):
            seen.append(progress)
            return 1.0

    train(Watched(), make_data(), seed=0, device=CPU, **OPTIONS, validation=None)
    assert max(seen) < 1
    assert max(seen) > 1 - 2 / len(seen) - 0.15
    assert seen == sorted(seen)
