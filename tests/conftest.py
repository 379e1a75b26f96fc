"""Fixtures and settings of the whole suite: one thread, no network, real data where it lies."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the open data sets: ``EHRFUSE_DATA``, else ``../shared/data``."""
    default = Path(__file__).parents[1].parent / "shared" / "data"
    folder = Path(os.environ.get("EHRFUSE_DATA", default))
    if not folder.is_dir():
        message = f"no shared data at {folder}; set EHRFUSE_DATA"
        if os.environ.get("EHRFUSE_REQUIRE_DATA") == "1":
            pytest.fail(message)
        pytest.skip(message)
    return folder
