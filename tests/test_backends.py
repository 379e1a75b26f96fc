"""Searches through other back-ends of joblib, as docs/scaling.md shows; each needs its package."""

import joblib
import numpy as np
import pytest
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV

from ehrfuse import FusionClassifier, Tabular, Text
from ehrfuse.datasets import make_ehr

pytestmark = [pytest.mark.optional, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def search():
    """A search with notes and a checkpoint to come, and its scores in this process."""
    X, y = make_ehr(n_samples=80, random_state=0)
    modalities = {"vitals": Tabular(["age", "heart_rate"]), "note": Text("note")}
    model = FusionClassifier(modalities, d_model=8, n_members=2, max_epochs=2, random_state=0)
    grid = {"lr": [1e-3, 1e-2], "note": ["drop", Text("note", min_count=3)]}
    search = GridSearchCV(model, grid, cv=2, scoring="neg_log_loss", error_score="raise")
    return search, X, y, clone(search).fit(X, y).cv_results_["mean_test_score"]


def assert_same_scores(search, folder):
    search, X, y, scores = search
    search = clone(search).set_params(estimator__checkpoint=str(folder), n_jobs=2)
    search.fit(X, y)
    np.testing.assert_allclose(search.cv_results_["mean_test_score"], scores, atol=1e-6)
    assert len(list(folder.glob("FusionClassifier-*/final.safetensors"))) == 9  # 8 fits, the last


def test_dask(search, tmp_path):
    distributed = pytest.importorskip("distributed")
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with distributed.Client(**options), joblib.parallel_config("dask"):
        assert_same_scores(search, tmp_path)


def test_ray(search, tmp_path):
    ray = pytest.importorskip("ray")
    from ray.util.joblib import register_ray

    register_ray()
    ray.init(num_cpus=2, include_dashboard=False)
    try:
        with joblib.parallel_config("ray"):
            assert_same_scores(search, tmp_path)
    finally:
        ray.shutdown()
