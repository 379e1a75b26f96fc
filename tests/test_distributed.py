"""Two processes under torchrun end where one does."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import two_processes

import ehrfuse._distributed
from ehrfuse._data import Block, Data
from ehrfuse._distributed import Team, join

pytest.importorskip("accelerate")


def run(folder, *command):
    """Run the script; what it printed."""
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command, two_processes.__file__, str(folder)],
        capture_output=True, text=True, check=False, env=env,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def fits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fits")
    two_processes.main(folder)
    if not torch.distributed.is_available():
        pytest.skip("torch was built without torch.distributed")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    (folder / "printed").write_text(run(folder, *torchrun))
    return folder


def weights(fits, name, size=2, rank=0):
    with np.load(fits / f"{name}-{size}-{rank}.npz") as found:
        return dict(found)


@pytest.mark.parametrize("name", [name for name, _ in two_processes.cases()])
def test_two_processes_equal_one(fits, name):
    one, two = weights(fits, name, 1), weights(fits, name, 2)
    assert one.keys() == two.keys()
    for key, array in one.items():
        np.testing.assert_allclose(two[key], array, atol=1e-4, rtol=0, err_msg=key)


@pytest.mark.parametrize("name", ["fusion", "tabnet", "whole", "kept"])
def test_all_processes_end_with_the_same_module(fits, name):
    first, second = weights(fits, name), weights(fits, name, rank=1)
    for key, array in first.items():
        np.testing.assert_array_equal(second[key], array, err_msg=key)


def test_a_stopped_fit_of_two_goes_on(fits):
    whole, kept = weights(fits, "whole"), weights(fits, "kept")
    for key, array in whole.items():
        np.testing.assert_array_equal(kept[key], array, err_msg=key)
    (folder,) = (fits / "kept").iterdir()
    assert [path.name for path in folder.iterdir()] == ["final.safetensors"]


def test_cross_validation_runs_in_step(fits):
    assert (fits / "scores-0").read_text() == (fits / "scores-1").read_text()


def test_only_one_prints(fits):
    lines = (fits / "printed").read_text().splitlines()
    assert [line[:25] for line in lines] == [f"TabNetClassifier epoch {i}:" for i in range(2)]


def test_one_process_is_a_team_of_one(monkeypatch):
    monkeypatch.setattr(ehrfuse._distributed, "_processes", None)
    assert type(join(torch.device("cpu"))) is Team


def test_shares_add_up():
    y = np.array([[1.0, np.nan], [np.nan, np.nan], [0.0, 1.0], [1.0, 0.0]])
    data = Data({"x": Block(np.ones(4, bool))}, np.arange(4)[::-1], y)
    index = np.array([0, 1, 2])  # of the set in reverse order: rows 3, 2, 1
    parts = [data.share(part, index) for part in (index[::2], index[1::2])]
    assert parts == [(0.5, pytest.approx(2 / 3)), (0.5, pytest.approx(1 / 3))]
    assert data.share(np.array([2]), np.array([2, 2])) == (0.5, 0.5)  # no label is known
