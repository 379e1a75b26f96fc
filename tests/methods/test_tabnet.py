"""Facts of TabNet's estimators that hold of no other method."""

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.frozen import FrozenEstimator
from sklearn.model_selection import GridSearchCV

from ehrfuse import (
    FusionClassifier,
    Labs,
    TabNetClassifier,
    TabNetPretrainer,
    TabNetRegressor,
    TabNetTabular,
    Tabular,
)
from ehrfuse.datasets import make_ehr

SMALL = {"n_d": 8, "n_a": 8, "max_epochs": 2, "random_state": 0}


@pytest.fixture(scope="module")
def cohort():
    return make_ehr(n_samples=90, random_state=0, as_bunch=True)


@pytest.fixture(scope="module")
def table():
    rng = np.random.default_rng(0)
    X = pd.DataFrame(rng.normal(size=(160, 3)), columns=["a", "b", "c"])
    X["kind"] = rng.choice(["u", "v", "w"], 160)
    X.loc[::5, "a"] = np.nan
    y = ((X["b"] > 0) | (X["kind"] == "w")).astype(int)
    return X, y


def test_importance_finds_the_columns_that_count(table):
    X, y = table
    clf = TabNetClassifier(
        {"table": Tabular(list(X))}, n_d=8, n_a=8, max_epochs=60, lr=1e-2, random_state=0
    ).fit(X, y)
    assert clf.feature_importances_.shape == (4,)
    assert clf.feature_importances_.sum() == pytest.approx(1)
    assert set(np.argsort(clf.feature_importances_)[-2:]) == {1, 3}
    importance, masks = clf.explain(X)
    assert importance.shape == X.shape
    assert masks.shape == (2, *X.shape)
    np.testing.assert_allclose(masks.sum(2), 1, atol=1e-6)
    total = importance.sum(0)
    np.testing.assert_allclose(total / total.sum(), clf.feature_importances_, atol=1e-6)


def test_importance_stands_in_the_order_of_the_columns(table):
    X, y = table
    X = X.assign(patient=np.arange(len(X)) // 2)[["kind", "patient", "c", "b", "a"]]
    modalities = {"one": Tabular(["a", "kind"]), "two": Labs(["b", "c"])}
    clf = TabNetClassifier(modalities, groups="patient", **SMALL).fit(X, y)
    assert list(clf.feature_names_in_) == ["a", "kind", "b", "c", "patient"]
    assert clf.feature_importances_.shape == (5,)
    assert clf.feature_importances_[4] == 0
    nothing = clf.explain(X.assign(a=np.nan, kind=None))[0]
    assert (nothing[:, :2] == 0).all()  # an absent table is attended to by nobody


def test_several_outcomes_and_numbers(table):
    X, y = table
    both = pd.DataFrame({"one": y.astype(float), "two": 1.0 - y})
    both.loc[::3, "two"] = np.nan
    modalities = {"table": Tabular(list(X))}
    assert TabNetClassifier(modalities, **SMALL).fit(X, both).predict_proba(X).shape == (160, 2)
    numbers = np.column_stack([X["b"], -X["b"]])
    assert TabNetRegressor(modalities, **SMALL).fit(X, numbers).predict(X).shape == (160, 2)


def test_pretrainer_hands_over_and_inherits_sizes(table):
    X, y = table
    clf = TabNetClassifier(
        {"table": Tabular(list(X))}, pretrained=TabNetPretrainer(max_epochs=2), n_steps=2, **SMALL
    ).fit(X, y)
    assert clf.transferred_ == ["encoders.table"]
    assert clf.pretrained_.n_steps == 2
    assert clf.pretrained_.n_d == 8
    assert clf.pretrained_.random_state is not None


def test_sizes_are_an_axis_of_a_search_with_pretraining(table):
    X, y = table
    clf = TabNetClassifier({"table": Tabular(list(X))}, **SMALL)
    grid = {"n_d": [4, 8], "pretrained": [None, TabNetPretrainer(max_epochs=1)]}
    search = GridSearchCV(clf, grid, cv=2, error_score="raise").fit(X, y)
    assert len(search.cv_results_["params"]) == 4


def test_pretraining_learns_to_guess(table):
    rng = np.random.default_rng(0)
    first = rng.normal(size=(400, 1))
    X = np.hstack([first, first + 0.1 * rng.normal(size=(400, 3))])
    history = TabNetPretrainer(
        n_d=16, n_a=16, max_epochs=40, lr=1e-2, random_state=0
    ).fit(X).history_  # fmt: skip
    assert history[-1]["train_reconstruction"] < 0.6 * history[0]["train_reconstruction"]


def test_unobserved_cells_are_not_guessed(table):
    X, _ = table
    modalities = {"table": Tabular(list(X), n_bins=1)}
    fitted = TabNetPretrainer(modalities, **SMALL).fit(X)
    encoder = fitted.module_.encoders["table"]
    block = fitted.modalities_["table"].transform(X)
    batch = block.take(np.arange(len(X)))
    known = encoder.known(batch)
    assert not known[::5, 0].any()
    assert known[1, 0]


# ---------------------------------------------------------------- freezing


def state(module):
    return {name: t.clone() for name, t in module.state_dict().items()}


def frozen_pair(table, freeze):
    X, y = table
    modalities = {"table": Tabular(list(X))}
    donor = TabNetPretrainer(modalities, **SMALL).fit(X)
    clf = TabNetClassifier(modalities, pretrained=FrozenEstimator(donor), freeze=freeze, **SMALL)
    clf.fit(X, y)
    before, after = state(donor.module_.encoders["table"]), state(clf.module_.encoders["table"])
    learned = {name for name in before if "numbers." not in name}  # bins are measured, not trained
    return {name for name in learned if torch.equal(before[name], after[name])}, learned


def test_paper_freezes_embeddings_splitter_shared_maps_and_statistics(table):
    kept, every = frozen_pair(table, "paper")
    frozen = ("embedder.", "tabnet.norm.", "tabnet.splitter.", "tabnet.shared.")
    assert {name for name in every if name.startswith(frozen)} == kept
    assert any("running_mean" in name for name in kept)


def test_splitter_alone_leaves_the_shared_maps_free(table):
    kept, every = frozen_pair(table, ("encoders.table.tabnet.splitter",))
    assert {name for name in every if name.startswith("tabnet.splitter.")} == kept


def test_whole_encoder_frozen_is_bitwise_the_same(table):
    kept, every = frozen_pair(table, ("encoders",))
    assert kept == every


# ---------------------------------------------------------------- as a modality


def test_tabnet_as_an_encoder_of_any_estimator(cohort):
    columns = cohort.modalities["vitals"].columns
    clf = FusionClassifier({"vitals": Tabular(columns)}, d_model=8, n_members=2, max_epochs=2,
                           random_state=0)  # fmt: skip
    grid = {"vitals": [Tabular(columns), TabNetTabular(columns, n_steps=2)]}
    search = GridSearchCV(clf, grid, cv=2, error_score="raise").fit(cohort.X, cohort.y)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()


def test_a_pretrainer_serves_a_fusion_model(cohort):
    vitals = TabNetTabular(cohort.modalities["vitals"].columns)
    donor = TabNetPretrainer(n_d=8, n_a=8, max_epochs=1)
    clf = FusionClassifier(
        {"vitals": vitals, "note": cohort.modalities["note"]}, pretrained=donor, d_model=8,
        n_members=2, max_epochs=1, random_state=0,
    ).fit(cohort.X, cohort.y)  # fmt: skip
    assert "encoders.vitals" in clf.transferred_


def test_other_sizes_under_one_name_raise(cohort):
    vitals = TabNetTabular(cohort.modalities["vitals"].columns, n_steps=5)
    with pytest.raises(ValueError, match="n_steps"):
        TabNetClassifier({"vitals": vitals}, **SMALL).fit(cohort.X, cohort.y)


# ---------------------------------------------------------------- input


def test_predicts_unseen_categories_holes_and_single_rows(table):
    X, y = table
    clf = TabNetClassifier({"table": Tabular(list(X))}, **SMALL).fit(X, y)
    odd = X.head(6).copy()
    odd.loc[0, "kind"] = "never seen"
    odd.loc[1, ["a", "b", "c"]] = np.nan
    whole = clf.predict_proba(odd)
    assert np.isfinite(whole).all()
    for size in (1, 2, 5):
        clf.set_params(batch_size=size)
        np.testing.assert_allclose(clf.predict_proba(odd), whole, atol=1e-7)
    np.testing.assert_allclose(clf.predict_proba(odd.iloc[[1]]), whole[[1]], atol=1e-7)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"n_d": 0}, "n_d=0"),
        ({"gamma": 0.5}, "gamma=0.5"),
        ({"gamma": np.inf}, "gamma=inf"),
        ({"mask_type": "softmax"}, "mask_type"),
        ({"n_shared": 0, "n_independent": 0}, "needs a layer"),
        ({"lambda_sparse": -1.0}, "lambda_sparse"),
        ({"freeze": ("encoders.tables",)}, "does not have"),
    ],
)
def test_bad_parameters(table, params, message):
    X, y = table
    with pytest.raises(ValueError, match=message):
        TabNetClassifier({"table": Tabular(list(X))}, **SMALL | params).fit(X, y)


def test_bad_mask_ratio(table):
    with pytest.raises(ValueError, match="mask_ratio"):
        TabNetPretrainer(mask_ratio=1.0).fit(table[0][["a", "b"]])
