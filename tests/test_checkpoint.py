"""Stopped fits go on and end as if nothing had been; nothing that goes wrong costs the state."""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from checks import Killed, killed_after
from safetensors import safe_open
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV

import ehrfuse
import ehrfuse._checkpoint
import ehrfuse._train
from ehrfuse import (
    FusionClassifier,
    KnowledgeAugmentedRiskModel,
    MEDFuseClassifier,
    MMNARFusionClassifier,
    MMNARPretrainer,
    Tabular,
    Text,
)
from ehrfuse._checkpoint import FINAL, STATES, Checkpoint, Run
from ehrfuse.datasets import make_ehr

VITALS = {"vitals": Tabular(["age", "heart_rate"], dropout=0.0, column_dropout=0.0)}
ALL = {**VITALS, "note": Text("note")}


@pytest.fixture(scope="module")
def cohort():
    return make_ehr(n_samples=64, random_state=0, as_bunch=True)


def model(checkpoint=None, **params):
    params = {"d_model": 8, "n_members": 2, "max_epochs": 3, "random_state": 0} | params
    return FusionClassifier(params.pop("modalities", ALL), checkpoint=checkpoint, **params)


def weights(estimator):
    return {name: t.numpy().copy() for name, t in estimator.module_.state_dict().items()}


def assert_equal(estimator, other):
    for name, array in weights(estimator).items():
        np.testing.assert_array_equal(array, weights(other)[name], err_msg=name)


@pytest.fixture(scope="module")
def whole(cohort):
    return model().fit(cohort.X, cohort.y)


def stop(estimator, cohort, n_steps=6):
    with killed_after(n_steps), pytest.raises(Killed):
        estimator.fit(cohort.X, cohort.y)
    return next(Path(estimator.checkpoint).glob(f"{type(estimator).__name__}-*"))


# ---------------------------------------------------------------- kill -9


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    script = Path(__file__).with_name("kill_fits.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path_factory.mktemp("kills"))],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills children that it forks")
@pytest.mark.parametrize(
    "name", ["fusion", "mmnar", "tabnet", "clip", "masked_labs", "rapt", "medfuse"]
)
def test_kill_9_at_any_moment_changes_no_bit(killed, name):
    found = killed[name]
    assert found["equal"]
    assert found["hits"]
    assert found["steps"] < found["whole"]  # it went on, it did not begin again


# ---------------------------------------------------------------- which fit it is


def test_the_end_of_a_fit_is_kept(cohort, whole, tmp_path):
    first = model(tmp_path).fit(cohort.X, cohort.y)
    (folder,) = tmp_path.iterdir()
    assert [path.name for path in folder.iterdir()] == [FINAL]
    with killed_after(1):  # no step is done
        second = model(tmp_path).fit(cohort.X, cohort.y)
    for fitted in (first, second):
        assert_equal(fitted, whole)
        assert fitted.history_ == whole.history_
        assert fitted.n_iter_ == whole.n_iter_


def test_none_writes_nothing(cohort, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ehrfuse._checkpoint, "save_file", None)
    monkeypatch.setattr(ehrfuse._checkpoint, "stamp", None)
    model().fit(cohort.X, cohort.y)
    assert not list(tmp_path.iterdir())


def test_folds_and_candidates_share_a_path(cohort, tmp_path):
    search = GridSearchCV(model(tmp_path), {"lr": [1e-3, 2e-2]}, cv=2, error_score="raise")
    search.fit(cohort.X, cohort.y)
    assert len(list(tmp_path.iterdir())) == 5  # four fits and the last
    plain = clone(search).set_params(estimator__checkpoint=None).fit(cohort.X, cohort.y)
    key = "mean_test_score"
    np.testing.assert_array_equal(search.cv_results_[key], plain.cv_results_[key])
    assert_equal(search.best_estimator_, plain.best_estimator_)
    with killed_after(1):  # a search that was stopped finds its fits done
        clone(search).fit(cohort.X, cohort.y)


def test_other_data_or_parameters_are_another_fit_and_it_is_said(cohort, tmp_path):
    folder = stop(model(tmp_path), cohort)
    X = cohort.X.assign(age=cohort.X["age"] + 1.5 * (np.arange(64) == 3))
    text = f"{folder.name} holds a fit that was stopped and had other data; this fit starts anew"
    with pytest.warns(UserWarning, match=text):
        model(tmp_path).fit(X, cohort.y)
    note = {**VITALS, "note": Text("note", min_count=1)}
    with pytest.warns(UserWarning, match=r"had other parameters \(lr, note__min_count\)"):
        model(tmp_path, lr=1e-3, modalities=note).fit(cohort.X, cohort.y)
    assert len(list(tmp_path.iterdir())) == 3
    shutil.rmtree(folder)
    model(tmp_path).fit(X, cohort.y)  # now nothing is said


def test_a_foreign_file_is_refused(cohort, tmp_path):
    folder = stop(model(tmp_path / "a"), cohort)
    other = stop(model(tmp_path / "b", lr=1e-3), cohort)
    shutil.copy(other / STATES[0], folder / STATES[0])
    text = r"was made by a fit with other parameters \(lr\); delete it or choose another path"
    with pytest.raises(ValueError, match=text):
        model(tmp_path / "a").fit(cohort.X, cohort.y)


def test_another_version_is_refused(cohort, tmp_path, monkeypatch):
    stop(model(tmp_path), cohort)
    monkeypatch.setattr(ehrfuse._checkpoint, "version", lambda name: "99")
    with pytest.raises(ValueError, match=r"other versions \(ehrfuse 0\.\S+, torch \S+\); delete"):
        model(tmp_path).fit(cohort.X, cohort.y)


def test_bad_parameters_are_named(cohort, tmp_path):
    with pytest.raises(TypeError, match="checkpoint=3 must be a folder"):
        model(3).fit(cohort.X, cohort.y)
    with pytest.raises(ValueError, match="need a random_state, such as random_state=0"):
        model(tmp_path, random_state=None).fit(cohort.X, cohort.y)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot be written to .* give a folder"):
        model(tmp_path / "file").fit(cohort.X, cohort.y)


def test_no_text_and_no_row_is_in_the_files(cohort, tmp_path):
    X = cohort.X.assign(note="quinquefolium " + cohort.X["note"])
    kept = model(tmp_path)
    with killed_after(6), pytest.raises(Killed):
        kept.fit(X, cohort.y)
    (folder,) = tmp_path.iterdir()
    raw = b"".join((folder / name).read_bytes() for name in STATES)
    assert b"quinquefolium" not in raw
    assert np.asarray(cohort.X["heart_rate"].dropna(), "float32").tobytes()[:64] not in raw
    assert b"heart_rate" not in raw
    with safe_open(folder / STATES[0], framework="pt") as file:
        facts = json.loads(file.metadata()["facts"])
        parts = {name.partition("/")[0] for name in file.keys()}  # noqa: SIM118
    assert facts["step"] in (4, 5)
    assert {"core", "optimizer", "random"} <= parts <= {"core", "optimizer", "random", "totals"}


# ---------------------------------------------------------------- stages


def test_a_pretrainer_has_a_place_below(cohort, tmp_path):
    clf = MMNARFusionClassifier(
        VITALS, d_model=8, n_members=2, max_epochs=2, random_state=0, checkpoint=tmp_path,
        pretrained=MMNARPretrainer(d_model=8, n_members=2, max_epochs=2),
    ).fit(cohort.X, cohort.y)  # fmt: skip
    (below,) = (tmp_path / "pretrained").iterdir()
    assert below.name.startswith("MMNARPretrainer-")
    assert clf.pretrained.checkpoint is None
    shutil.rmtree(next(tmp_path.glob("MMNARFusionClassifier-*")))
    with killed_after(2 * 4 + 1):  # its own steps; the pretrainer does none
        clone(clf).fit(cohort.X, cohort.y)


@pytest.mark.parametrize(
    "estimator",
    [
        MMNARFusionClassifier(ALL, d_model=8, n_members=2, max_epochs=2, rectifier="crossfit"),
        MEDFuseClassifier(
            ALL, d_model=8, n_members=2, width=16, max_epochs=2, cross_fit=2, thresholds="f1"
        ),
        KnowledgeAugmentedRiskModel(ALL, stage1=model(), stage2="lr", n_splits=3),
    ],
    ids=["rectifier", "cross_fit", "two_stages"],
)
def test_stages_that_were_done_are_not_done_again(estimator, cohort, tmp_path):
    estimator.set_params(random_state=0)
    plain = clone(estimator).fit(cohort.X, cohort.y).predict_proba(cohort.X)
    kept = clone(estimator).set_params(checkpoint=tmp_path)
    with killed_after(13), pytest.raises(Killed):
        kept.fit(cohort.X, cohort.y)
    np.testing.assert_array_equal(kept.fit(cohort.X, cohort.y).predict_proba(cohort.X), plain)
    with killed_after(1):
        again = clone(kept).fit(cohort.X, cohort.y)
    np.testing.assert_array_equal(again.predict_proba(cohort.X), plain)


# ---------------------------------------------------------------- what goes wrong


def test_a_torn_file_leaves_the_one_before(cohort, whole, tmp_path):
    folder = stop(model(tmp_path), cohort)
    newest = max((folder / name for name in STATES), key=lambda path: path.stat().st_mtime_ns)
    newest.write_bytes(newest.read_bytes()[:-100])
    with pytest.warns(UserWarning, match=f"{newest.name} is damaged"):
        assert_equal(model(tmp_path).fit(cohort.X, cohort.y), whole)


def test_a_changed_header_is_seen(cohort, whole, tmp_path):
    folder = stop(model(tmp_path), cohort)
    for name in STATES:
        raw = (folder / name).read_bytes()
        assert raw.count(b"batch_size") == 1
        (folder / name).write_bytes(raw.replace(b"batch_size", b"catch_size"))
    with pytest.warns(UserWarning, match="damaged") as caught:
        assert_equal(model(tmp_path).fit(cohort.X, cohort.y), whole)
    assert len(caught) == 2


def test_a_changed_bit_is_seen(cohort, whole, tmp_path):
    folder = stop(model(tmp_path), cohort)
    for name in STATES:
        raw = bytearray((folder / name).read_bytes())
        raw[-5] ^= 1
        (folder / name).write_bytes(bytes(raw))
    with pytest.warns(UserWarning, match="damaged") as caught:
        assert_equal(model(tmp_path).fit(cohort.X, cohort.y), whole)
    assert len(caught) == 2


def test_a_full_disk_stops_nothing(cohort, whole, tmp_path):
    resource = pytest.importorskip("resource")
    folder = stop(model(tmp_path), cohort)
    good = {name: (folder / name).read_bytes() for name in STATES}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    text = r"could not be written \(.*\); the fit goes on, tries again, and the last good state"
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with killed_after(None), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fitted = model(tmp_path).fit(cohort.X, cohort.y)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert_equal(fitted, whole)
    assert len(caught) == 1
    assert re.search(text, str(caught[0].message))
    assert {name: (folder / name).read_bytes() for name in STATES} == good
    assert sorted(path.name for path in folder.iterdir()) == sorted(STATES)
    assert_equal(model(tmp_path).fit(cohort.X, cohort.y), whole)


def test_nan_keeps_the_last_good_state(cohort, whole, tmp_path, monkeypatch):
    core, n_calls = ehrfuse.methods.fusion.FusionCore, [0]
    losses = core.losses

    def once_nan(self, batch):
        n_calls[0] += 1
        factor = torch.nan if n_calls[0] == 8 else 1.0
        return {name: term * factor for name, term in losses(self, batch).items()}

    monkeypatch.setattr(core, "losses", once_nan)
    with killed_after(None), pytest.raises(FloatingPointError, match="is nan in epoch 1") as error:
        model(tmp_path).fit(cohort.X, cohort.y)
    assert "Its state in epoch 1 is in" in error.value.__notes__[0]
    assert_equal(model(tmp_path).fit(cohort.X, cohort.y), whole)


def test_weights_that_are_not_finite_are_never_saved(cohort, tmp_path, monkeypatch):
    core = ehrfuse.methods.fusion.FusionCore

    def ruin(self):
        if ehrfuse._checkpoint.EVERY == 0.0 and self.training:
            self.steps = getattr(self, "steps", 0) + 1
            if self.steps == 6:
                with torch.no_grad():
                    next(self.parameters()).fill_(torch.nan)

    monkeypatch.setattr(core, "on_step_end", ruin)
    with killed_after(None), pytest.raises(FloatingPointError):
        model(tmp_path).fit(cohort.X, cohort.y)
    (folder,) = tmp_path.iterdir()
    steps = []
    for name in STATES:
        with safe_open(folder / name, framework="pt") as file:
            steps.append(json.loads(file.metadata()["facts"])["step"])
            assert all(file.get_tensor(k).isfinite().all() for k in file.keys() if "core/" in k)  # noqa: SIM118
    assert sorted(steps) == [4, 5]


def test_ctrl_c_keeps_the_state(cohort, whole, tmp_path):
    count = Run.count

    def interrupt(self, terms, rows):
        count(self, terms, rows)
        if self.step == 6:
            raise KeyboardInterrupt

    with killed_after(None), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "count", interrupt)
        text = r"interrupted after 1 full epochs.*Its state in epoch 1 is in .*: the same fit again"
        with pytest.warns(UserWarning, match=text):
            early = model(tmp_path).fit(cohort.X, cohort.y)
    assert early.n_iter_ == 1
    assert_equal(model(tmp_path).fit(cohort.X, cohort.y), whole)


def test_saves_take_a_small_share_of_the_time(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(ehrfuse._checkpoint.time, "monotonic", lambda: clock[0])
    keeper = Checkpoint(tmp_path, {"estimator": "A"})
    due = []
    for seconds in (1.5, 0.6, 0.6, 70.0):
        clock[0] += seconds
        due.append((keeper.due(within_epoch=False), keeper.due(within_epoch=True)))
    assert due == [(False, False), (True, False), (True, False), (True, True)]
    keeper.last, keeper.cost = clock[0], 10.0  # a large model on a slow disk: 1,000 s between two
    clock[0] += 999
    assert not keeper.due(within_epoch=False)
    clock[0] += 2
    assert keeper.due(within_epoch=True)


# ---------------------------------------------------------------- too little memory


def fails_above(n_rows, error, monkeypatch):
    """No memory for batches of more than so many rows; the sizes that were asked for."""
    core, sizes = ehrfuse.methods.fusion.FusionCore, []
    losses, forward = core.losses, core.forward

    def small(self, batch):
        sizes.append(len(batch))
        if len(batch) > n_rows:
            raise error
        return losses(self, batch)

    def small_forward(self, batch):
        if len(batch) > n_rows:
            raise error
        return forward(self, batch)

    monkeypatch.setattr(core, "losses", small)
    monkeypatch.setattr(core, "forward", small_forward)
    return sizes


NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
]


@pytest.mark.parametrize("error", NO_MEMORY, ids=["cuda", "windows", "linux"])
def test_out_of_memory_divides_the_batch_and_changes_nothing(cohort, error, monkeypatch):
    plain = {"dropout": 0.0, "modalities": VITALS, "validation_fraction": None}
    whole = model(**plain).fit(cohort.X, cohort.y)
    expected = whole.predict_proba(cohort.X)
    sizes = fails_above(5, error, monkeypatch)
    with pytest.warns(UserWarning, match="does not fit into the memory; .* divided into") as caught:
        divided = model(**plain).fit(cohort.X, cohort.y)
    assert [str(w.message).split("divided into ")[1][0] for w in caught] == ["2", "4"]
    assert sizes == [16, 8] + [4] * 48  # 12 steps of 16 rows in parts of 4
    for name, array in weights(whole).items():
        np.testing.assert_allclose(weights(divided)[name], array, atol=2e-5, err_msg=name)
    for one, other in zip(whole.history_, divided.history_, strict=True):
        assert one["train_outcome"] == pytest.approx(other["train_outcome"], abs=1e-6)
    np.testing.assert_allclose(divided.predict_proba(cohort.X), expected, atol=1e-5)


def test_parts_are_weighted_by_known_labels(cohort, monkeypatch):
    Y = np.column_stack([cohort.y, 1 - cohort.y]).astype(float)
    Y[np.random.default_rng(0).random(Y.shape) < 0.4] = np.nan
    plain = {"dropout": 0.0, "modalities": VITALS}
    whole = model(**plain).fit(cohort.X, Y)
    fails_above(8, NO_MEMORY[0], monkeypatch)
    with pytest.warns(UserWarning, match="does not fit"):
        divided = model(**plain).fit(cohort.X, Y)
    for name, array in weights(whole).items():
        np.testing.assert_allclose(weights(divided)[name], array, atol=2e-5, err_msg=name)


def test_one_row_that_does_not_fit_is_an_error(cohort, monkeypatch):
    fails_above(0, NO_MEMORY[0], monkeypatch)
    with pytest.warns(UserWarning, match="parts") as caught, pytest.raises(torch.OutOfMemoryError):
        model().fit(cohort.X, cohort.y)
    assert len(caught) == 4  # 2, 4, 8 and 16 parts


def test_other_errors_pass(cohort, monkeypatch):
    fails_above(5, RuntimeError("expected scalar type Float"), monkeypatch)
    with pytest.raises(RuntimeError, match="scalar type"):
        model().fit(cohort.X, cohort.y)


def test_divided_batches_go_on_after_a_kill(cohort, tmp_path, monkeypatch):
    fails_above(8, NO_MEMORY[0], monkeypatch)
    with pytest.warns(UserWarning, match="does not fit"):
        whole = model().fit(cohort.X, cohort.y)
    with pytest.warns(UserWarning, match="does not fit"):
        stop(model(tmp_path), cohort)
    again = model(tmp_path).fit(cohort.X, cohort.y)  # no warning: the parts are remembered
    assert_equal(again, whole)


# ---------------------------------------------------------------- what is saved in the end


@pytest.mark.parametrize("n_steps", [1, 3])
def test_a_resumed_fit_is_saved_as_the_same_bytes(cohort, tmp_path, n_steps):
    """Several terms of the loss, whose order a file of tensors does not keep."""
    plain = MMNARFusionClassifier(ALL, d_model=8, n_members=2, max_epochs=2, random_state=0)
    whole = clone(plain).fit(cohort.X, cohort.y)
    resumed = clone(plain).set_params(checkpoint=tmp_path / "fits")
    stop(resumed, cohort, n_steps)
    resumed.fit(cohort.X, cohort.y)
    by_string = clone(plain).set_params(checkpoint=str(tmp_path / "fits"))
    done = by_string.fit(cohort.X, cohort.y)  # finds that all is done
    ehrfuse.save(whole, tmp_path / "whole.zip")
    for name, fitted in {"resumed": resumed, "done": done}.items():
        assert [list(r) for r in fitted.history_] == [list(r) for r in whole.history_], name
        ehrfuse.save(fitted, tmp_path / f"{name}.zip")
        assert (tmp_path / f"{name}.zip").read_bytes() == (tmp_path / "whole.zip").read_bytes()
