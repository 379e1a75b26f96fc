"""What is true of masked lab modelling: nothing missing is shown or scored, no order, no batch."""

import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline

from ehrfuse import (
    Events,
    FusionClassifier,
    Labs,
    MaskedLabPretrainer,
    MEDFuseClassifier,
    MMNARFusionClassifier,
    Text,
)
from ehrfuse._data import Data
from ehrfuse.datasets import make_ehr
from ehrfuse.methods.masked_labs import copied, hide, pack
from ehrfuse.modalities._lab_tokens import QuantileScale

LABS = ["bun", "creatinine", "sodium", "potassium", "lactate"]
SMALL = {"width": 16, "n_layers": 2, "max_epochs": 3, "random_state": 0}


def low_rank(n=300, seed=0, missing=0.4):
    """Five analytes that follow two hidden numbers, with holes."""
    rng = np.random.default_rng(seed)
    table = rng.normal(size=(n, 2)) @ rng.normal(size=(2, 5)) + 0.1 * rng.normal(size=(n, 5))
    truth = pd.DataFrame(table * [5, 0.5, 4, 0.4, 1] + [20, 1, 140, 4, 2], columns=LABS)
    return truth.mask(rng.random(truth.shape) < missing), truth


@pytest.fixture(scope="module")
def fitted():
    X, _ = low_rank()
    return MaskedLabPretrainer({"labs": Labs(LABS)}, **SMALL).fit(X)


def streams(n=40, seed=0):
    rng = np.random.default_rng(seed)
    cells = []
    for _i in range(n):
        level = rng.normal()
        cells.append([
            {"time": float(-t), "code": code, "value": None if k % 5 == 4 else level * size + k / 9}
            for k, (t, code, size) in enumerate(
                zip(range(6), ["bun", "crea", "na"] * 2, [5, 1, 3] * 2, strict=True)
            )
        ])  # fmt: skip
    cells[3], cells[4] = [], None
    return pd.DataFrame({"stream": cells})


# ---------------------------------------------------------------- masks


def test_as_many_stay_as_the_ratio_says_and_at_least_one():
    torch.manual_seed(0)
    n = torch.tensor([0, 1, 2, 4, 9, 20])
    maskable = torch.arange(20) < n[:, None]
    hidden = hide(torch.rand(6, 20), maskable, 0.75)
    assert (maskable & ~hidden).sum(1).tolist() == [0, 1, 1, 1, 3, 5]  # ceil(n / 4)
    assert not (hidden & ~maskable).any()


def test_a_share_per_row():
    maskable = torch.ones(3, 10, dtype=torch.bool)
    hidden = hide(torch.rand(3, 10), maskable, torch.tensor([0.2, 0.5, 1.0]))
    assert hidden.sum(1).tolist() == [2, 5, 9]


def test_copied_masks_are_the_holes_of_other_rows():
    torch.manual_seed(0)
    code = torch.arange(4).expand(50, 4)
    has_all = torch.arange(50) % 2 == 0
    mask = has_all[:, None] | (code < 2)
    hidden = copied(code, mask, mask, 4)
    assert not (hidden & ~mask).any()
    kinds = {tuple(row) for row in hidden[has_all].tolist()}
    assert kinds == {(False,) * 4, (False, False, True, True)}
    assert not hidden[~has_all].any()  # what they have, everybody has


def test_proportional_masks_hide_common_analytes_more_often():
    X, _ = low_rank(600)
    X.loc[np.arange(600) % 5 > 0, "lactate"] = np.nan
    shares = {}
    for masking in ("uniform", "proportional"):
        model = MaskedLabPretrainer(
            {"labs": Labs(LABS)}, masking=masking, mask_ratio=0.5, **SMALL | {"max_epochs": 1}
        ).fit(X)
        rows = np.flatnonzero(X.notna().all(axis=1))
        x = model._data(X).batch(np.arange(600)).inputs["labs"]
        mask = x["code_mask"]
        model.module_.train()
        torch.manual_seed(0)
        hidden = [model.module_._choose("labs", x["code"], mask, mask) for _ in range(30)]
        hidden = torch.stack(hidden).float().mean(0)[rows]
        shares[masking] = hidden[:, 4].mean() / hidden[:, :4].mean()
    assert shares["proportional"] < 0.8 * shares["uniform"]


def test_pack_keeps_order_and_content():
    chosen = torch.tensor([[True, False, True, True], [False, False, False, True]])
    value = torch.arange(8).view(2, 4)
    found, mask = pack(chosen, value=value)
    assert mask.tolist() == [[True, True, True], [True, False, False]]
    assert found["value"][mask].tolist() == [0, 2, 3, 7]


# ---------------------------------------------------------------- defects of ReMasker


def test_content_of_missing_entries_never_enters(fitted):
    """Defect 1: ReMasker shows missing entries as zeros and trains on them."""
    X, _ = low_rank(40, seed=1)
    data = fitted._data(X)
    block = data.blocks["labs"]
    assert len(block.ragged["code"][0]) == X.notna().sum().sum()
    batch = data.batch(np.arange(40))
    x = batch.inputs["labs"]
    for key in ("value", "standard"):  # whatever stands behind the mask
        x[key] = torch.where(x["code_mask"], x[key], 77.0)
    core = fitted.module_.train()
    grads = []
    for dirty in (False, True):
        clean = data.batch(np.arange(40))
        torch.manual_seed(0)
        core.zero_grad()
        sum(core.losses(batch if dirty else clean).values()).backward()
        grads.append([p.grad.clone() for p in core.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_loss_of_rows_without_values_has_no_gradient(fitted):
    X = pd.DataFrame(np.nan, index=range(5), columns=LABS)
    core = fitted.module_.train()
    core.zero_grad()
    losses = core.losses(fitted._data(X).batch(np.arange(5)))
    assert float(losses["reconstruction"].detach()) == 0
    sum(losses.values()).backward()
    assert all(p.grad is None or not p.grad.any() for p in core.parameters())


def test_rows_do_not_depend_on_their_batch(fitted):
    """Defect 2: in a batch, ReMasker drops values of rows that have more than others."""
    X, _ = low_rank(30, seed=2)
    X.iloc[0, 1:] = np.nan  # one value only
    whole = fitted.impute(X)
    alone = pd.concat([fitted.impute(X.iloc[[i]]) for i in range(30)])
    np.testing.assert_allclose(alone, whole, rtol=1e-5)
    np.testing.assert_allclose(fitted.transform(X.iloc[[7]]), fitted.transform(X)[[7]], atol=1e-7)


def test_values_outside_the_training_range_stay_and_work(fitted):
    """Defect 3: ReMasker can represent nothing outside the range of its training rows."""
    X, _ = low_rank(10, seed=3)
    X.iloc[0] = [500.0, np.nan, 139.0, np.nan, 1.0]
    filled = fitted.impute(X)
    assert filled.loc[0, "bun"] == 500.0
    assert np.isfinite(filled.to_numpy()).all()
    assert np.isfinite(fitted.transform(X)).all()
    scale = fitted.modalities_["labs"].values_
    top = scale.standardise(np.array([0]), np.array([1e4], "float32"))
    assert scale.restore(np.array([0]), top)[0] == pytest.approx(1e4)


def test_columns_have_no_order():
    """Defect 4: permuted columns and their vectors give the same embedding."""
    X, _ = low_rank()
    model = MaskedLabPretrainer({"labs": Labs(LABS)}, **SMALL).fit(X)
    before = model.transform(X)
    order = [3, 0, 4, 1, 2]
    core, tokens = model.module_, model.modalities_["labs"]
    with torch.no_grad():
        for table in (core.encoders["labs"].what, core.encoders["labs"].level):
            table.weight.copy_(table.weight[order])
    scale = tokens.values_
    tokens.values_ = QuantileScale(scale.knots[order], scale.center[order], scale.scale[order])
    tokens.columns_, tokens.origin_ = [LABS[j] for j in order], tokens.origin_[order]
    np.testing.assert_allclose(model.transform(X), before, atol=1e-6)


def test_weight_decay_decays():
    """Defect 5: ReMasker parses the option and never uses it."""
    X, _ = low_rank(60)
    models = [
        MaskedLabPretrainer({"labs": Labs(LABS)}, weight_decay=w, **SMALL).fit(X) for w in (0, 10)
    ]
    norms = [m.module_.encoders["labs"].blocks[0].qkv.weight.norm() for m in models]
    assert norms[1] < norms[0]


def test_an_analyte_nobody_had_is_left_alone_and_named():
    """Defect 6: a column without any value made everything NaN."""
    X, _ = low_rank(60)
    X["lactate"] = np.nan
    model = MaskedLabPretrainer({"labs": Labs(LABS)}, **SMALL).fit(X)
    with pytest.warns(UserWarning, match=r"No training row had a value of \['lactate'\]"):
        filled = model.impute(X)
    assert filled["lactate"].isna().all()
    assert filled.drop(columns="lactate").notna().all(axis=None)
    later = X.assign(lactate=2.0)  # nobody trained its vector
    np.testing.assert_array_equal(model.transform(later), model.transform(X))


def test_scales_come_from_training_rows_only():
    """Defect 7: ReMasker fits and imputes one table."""
    X, _ = low_rank(200)
    model = MaskedLabPretrainer({"labs": Labs(LABS)}, validation_fraction=0.3, **SMALL)
    first = clone(model).fit(X)
    seen = first.modalities_["labs"].values_.knots
    # The rows that were set aside: whatever they hold, nothing that was learned changes.
    seed = int(np.random.RandomState(0).randint(2**31 - 1))
    _, aside = model.set_params(validation_fraction=0.3)._set_aside(X, None, np.ones(200), seed)
    other = X.copy()
    other.iloc[aside] = other.iloc[aside] * 3 + 1
    again = clone(model).fit(other)
    np.testing.assert_array_equal(again.modalities_["labs"].values_.knots, seen)
    best = [h["train_loss"] for h in first.history_]
    assert best == [h["train_loss"] for h in again.history_]


# ---------------------------------------------------------------- what it can


def test_guesses_are_better_than_the_mean():
    X, truth = low_rank(600)
    train, test = X.iloc[:400], X.iloc[400:]
    model = MaskedLabPretrainer(
        {"labs": Labs(LABS)}, **SMALL | {"max_epochs": 25, "mask_ratio": 0.5}
    ).fit(train)
    hole = test.isna() & test.notna().sum(axis=1).ge(2).to_numpy()[:, None]
    error = ((model.impute(test) - truth.iloc[400:]) / truth.std()).where(hole)
    mean = ((train.mean() - truth.iloc[400:]) / truth.std()).where(hole)
    assert (error**2).stack().mean() < 0.6 * (mean**2).stack().mean()


def test_what_was_measured_stays_exactly(fitted):
    X, _ = low_rank(20, seed=5)
    X["note"] = "as it was"
    filled, std = fitted.impute(X, return_std=True)
    assert list(filled.columns) == list(X.columns)
    measured = X[LABS].notna()
    pd.testing.assert_frame_equal(filled[LABS].where(measured), X[LABS])
    assert (filled["note"] == "as it was").all()
    assert (std[LABS].to_numpy()[measured] == 0).all()
    assert (std[LABS].to_numpy()[~measured] > 0).all()


def test_a_constant_column_is_filled_with_its_constant():
    X, _ = low_rank(60)
    X["lactate"] = X["lactate"].where(X["lactate"].isna(), 1e-3)
    model = MaskedLabPretrainer({"labs": Labs(LABS)}, **SMALL).fit(X)
    filled, std = model.impute(X, return_std=True)
    np.testing.assert_allclose(filled["lactate"], 1e-3)
    assert (std["lactate"] == 0).all()


def test_numbers_far_from_zero_are_told_apart():
    X = pd.DataFrame({"seconds": 1.7e9 + np.arange(60.0), "a": np.arange(60.0)})
    X.loc[::5, "seconds"] = np.nan
    model = MaskedLabPretrainer({"labs": Labs(["seconds", "a"])}, **SMALL).fit(X)
    block = model.modalities_["labs"].transform(X)
    code, value = (block.ragged[name][0] for name in ("code", "value"))
    assert len(np.unique(value[code == 0])) == 48
    filled = model.impute(X)
    pd.testing.assert_series_equal(filled["seconds"].where(X["seconds"].notna()), X["seconds"])
    assert filled["seconds"].between(1.7e9 - 200, 1.7e9 + 260).all()


def test_measured_events_stay_exactly():
    records = [{"time": -2.0, "code": "pH", "value": 7.35}, {"time": -1.0, "code": "pH"}]
    X = pd.DataFrame({"course": [records, [{"time": -1.0, "code": "pH", "value": 16777217.0}]] * 9})
    model = MaskedLabPretrainer({"course": Events("course")}, **SMALL).fit(X)
    filled, std = model.impute(X, return_std=True)
    assert filled["course"][0][0]["value"] == 7.35
    assert filled["course"][1][0]["value"] == 16777217.0
    assert np.isfinite(filled["course"][0][1]["value"])
    assert std["course"][0][0]["value"] == 0.0


def test_a_model_of_before_the_origin_was_learned_predicts(fitted):
    X, _ = low_rank(5)
    old = pickle.loads(pickle.dumps(fitted))
    del old.modalities_["labs"].origin_
    assert np.isfinite(old.transform(X)).all()
    assert old.impute(X).notna().all(axis=None)


def test_heads_that_do_not_fit_are_named_as_they_were_given():
    with pytest.raises(ValueError, match="width=10 cannot be split into n_heads=4"):
        MaskedLabPretrainer({"labs": Labs(LABS)}, width=10, n_heads=4).fit(low_rank(30)[0])


def test_repeated_masks_average_and_say_how_sure_they_are():
    X, truth = low_rank(400)
    model = MaskedLabPretrainer({"labs": Labs(LABS)}, **SMALL | {"max_epochs": 25}).fit(X)
    filled, std = model.impute(X, n_imputations=5, return_std=True)
    again = model.impute(X, n_imputations=5)
    pd.testing.assert_frame_equal(filled, again)
    hole = X.isna().to_numpy()
    error = np.abs((filled - truth).to_numpy()[hole] / truth.std().to_numpy()[np.nonzero(hole)[1]])
    told = std.to_numpy()[hole] / truth.std().to_numpy()[np.nonzero(hole)[1]]
    assert np.corrcoef(error, told)[0, 1] > 0.1
    inside = (np.abs((filled - truth).to_numpy()[hole]) < 2 * std.to_numpy()[hole]).mean()
    assert 0.85 < inside <= 1.0


def test_streams_need_no_pivot():
    X = streams()
    model = MaskedLabPretrainer({"labs": Events("stream")}, use_time=True, **SMALL).fit(X)
    filled = model.impute(X)
    cells = filled["stream"].tolist()
    assert cells[3] == []
    assert filled["stream"].isna().tolist() == X["stream"].isna().tolist()
    for before, after in zip(X["stream"], cells, strict=True):
        for record in before or []:
            same = [r for r in after if r["time"] == record["time"]]
            assert same[0]["code"] == record["code"]
            if record["value"] is not None:
                assert same[0]["value"] == pytest.approx(record["value"], rel=1e-6)
            assert np.isfinite(same[0]["value"])


@pytest.mark.parametrize("use_time", [False, True])
def test_streams_recall_what_the_same_analyte_was(use_time):
    """A patient's level is seen in the visible values of the analyte, and only there."""
    rng = np.random.default_rng(0)
    level = rng.normal(size=(80, 3))
    cells = [
        [
            {"time": -float(t), "code": f"lab{c}", "value": patient[c] + 0.1 * rng.normal()}
            for t in range(8)
            for c in range(3)
        ]
        for patient in level
    ]
    holes = [[r | ({"value": None} if r["time"] == -3 else {}) for r in cell] for cell in cells]
    X, hidden = pd.DataFrame({"stream": cells}), pd.DataFrame({"stream": holes})
    sizes = {**SMALL, "max_epochs": 10, "batch_size": 16}
    model = MaskedLabPretrainer({"labs": Events("stream")}, use_time=use_time, **sizes).fit(X)
    filled = model.impute(hidden)["stream"].tolist()
    guess = [[r["value"] for r in sorted(c, key=lambda r: r["code"]) if r["time"] == -3]
             for c in filled]  # fmt: skip
    assert np.sqrt(((np.array(guess) - level) ** 2).mean()) < 0.4 * level.std()
    assert "train_visible" not in model.history_[0]


def test_time_matters_only_where_it_is_asked_for():
    X = streams()
    later = X.copy()
    later["stream"] = [cell and [r | {"time": r["time"] / 3} for r in cell] for cell in X["stream"]]
    for use_time in (False, True):
        model = MaskedLabPretrainer({"labs": Events("stream")}, use_time=use_time, **SMALL).fit(X)
        assert np.allclose(model.transform(X), model.transform(later)) != use_time


def test_one_modality_helps_to_guess_another():
    rng = np.random.default_rng(0)
    a = rng.normal(size=500)
    X = pd.DataFrame({"a": a, "b": -a + 0.1 * rng.normal(size=500)})
    model = MaskedLabPretrainer(
        {"one": Labs(["a"]), "two": Labs(["b"])}, empty_share=0.3, **SMALL | {"max_epochs": 25}
    ).fit(X[:400])
    filled = model.impute(X[400:].assign(b=np.nan))
    assert np.corrcoef(filled["b"], X["b"][400:])[0, 1] > 0.8


def test_rows_without_labs_have_a_learned_vector(fitted):
    X = pd.DataFrame(np.nan, index=range(3), columns=LABS)
    out = fitted.transform(X)
    assert np.isfinite(out).all()
    assert (out == out[0]).all()
    filled = fitted.impute(X)
    labs = fitted.modalities_["labs"]
    center = labs.restore(np.arange(5), np.zeros(5))
    assert (np.abs(filled.to_numpy() - center) < 2 * labs.values_.scale).all()


def test_score_compares_ways_of_masking_on_one_task():
    X, _ = low_rank(200)
    search = GridSearchCV(
        MaskedLabPretrainer({"labs": Labs(LABS)}, **SMALL),
        {"masking": ["uniform", "copy"], "mask_ratio": [0.1, 0.9]},
        cv=2,
    ).fit(X)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    model = search.best_estimator_
    assert model.score(X) == model.score(X)
    assert model.module_.masking == model.masking


def test_small_panels_are_scored():
    """A quarter of two or three values is none: the score would be 0, whatever was learned."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=120)
    X = pd.DataFrame({"a": x, "b": x + 0.1 * rng.normal(size=120)})
    options = {"width": 16, "n_layers": 1, "random_state": 0}
    good, poor = (
        MaskedLabPretrainer(**options, lr=lr, max_epochs=8, validation_fraction=0.2).fit(X)
        for lr in (3e-2, 1e-6)
    )
    assert poor.score(X) < good.score(X) < 0
    assert good.history_[-1]["val_reconstruction"] > 0


def test_as_features_in_a_pipeline():
    X, truth = low_rank(200)
    y = (truth["bun"] > 20).astype(int)
    pipe = make_pipeline(
        MaskedLabPretrainer({"labs": Labs(LABS)}, **SMALL), LogisticRegression(max_iter=1000)
    ).fit(X, y)
    assert pipe.score(X, y) > 0.7


@pytest.mark.parametrize("masking", ["uniform", "proportional", "copy"])
def test_learning_lowers_the_loss(masking):
    X, _ = low_rank(200)
    model = MaskedLabPretrainer(
        {"labs": Labs(LABS)}, masking=masking, **SMALL | {"max_epochs": 12}
    ).fit(X)
    loss = [h["train_reconstruction"] for h in model.history_]
    assert np.mean(loss[-3:]) < 0.95 * loss[0]


# ---------------------------------------------------------------- handing over


@pytest.fixture(scope="module")
def cohort():
    return make_ehr(n_samples=120, random_state=0, as_bunch=True)


@pytest.mark.parametrize("kind", [FusionClassifier, MMNARFusionClassifier, MEDFuseClassifier])
@pytest.mark.parametrize("part", ["labs", "course"])
def test_classifiers_take_the_encoder_over(kind, part, cohort):
    modalities = {part: cohort.modalities[part], "note": Text("note")}
    donor = MaskedLabPretrainer(**SMALL | {"width": 64, "n_layers": 3})
    clf = kind(modalities, pretrained=donor, max_epochs=1, n_members=2, random_state=0)
    clf.set_params(freeze=(f"encoders.{part}",)).fit(cohort.X, cohort.y)
    assert clf.transferred_ == [f"encoders.{part}"]
    ours, theirs = (m.module_.encoders[part].state_dict() for m in (clf, clf.pretrained_))
    for name, weight in theirs.items():
        assert torch.equal(ours[name], weight)
    p = clf.predict_proba(cohort.X)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(clf)).predict_proba(cohort.X), p)


def test_pretraining_elsewhere_is_frozen_in(cohort):
    modalities = {"labs": cohort.modalities["labs"]}
    donor = MaskedLabPretrainer(modalities, **SMALL).fit(cohort.X[:60])
    clf = FusionClassifier(modalities, pretrained=FrozenEstimator(donor), max_epochs=1)
    clf.fit(cohort.X[60:], cohort.y[60:])
    assert clf.pretrained_.module_ is donor.module_


def test_what_was_pretrained_takes_smaller_steps(cohort):
    modalities = {"labs": cohort.modalities["labs"]}
    clf = MEDFuseClassifier(
        modalities, pretrained=MaskedLabPretrainer(max_epochs=1), max_epochs=1, random_state=0
    ).fit(cohort.X, cohort.y)
    own = {id(p) for p in clf.module_.encoders.parameters()}
    groups = clf.module_.param_groups(1.0, 0.0)
    rates = {g["lr"] for g in groups for p in g["params"] if id(p) in own}
    assert rates == {0.2}
    assert {g["lr"] for g in groups} == {0.2, 1.0}


def test_other_sizes_are_named(cohort):
    modalities = {"labs": cohort.modalities["labs"]}
    clf = MEDFuseClassifier(modalities, pretrained=MaskedLabPretrainer(**SMALL), lab_layers=4)
    with pytest.raises(ValueError, match="n_layers is lab_layers here"):
        clf.fit(cohort.X, cohort.y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"masking": "blocks"}, "masking='blocks' is not known"),
        ({"mask_ratio": 1.0}, "mask_ratio"),
        ({"n_layers": 0}, "n_layers"),
        ({"width": 30}, "multiple of n_heads"),
    ],
)
def test_parameters_out_of_range_are_named(options, message):
    X, _ = low_rank(30)
    with pytest.raises(ValueError, match=message):
        MaskedLabPretrainer({"labs": Labs(LABS)}, **SMALL | options).fit(X)


def test_scale_of_equal_and_of_extreme_values():
    code = np.array([0] * 50 + [1] * 50)
    value = np.concatenate([np.full(50, 3.0), np.arange(50.0)]).astype("float32")
    scale = QuantileScale.learn(code, value, 3)
    scores = scale.scores(code, value)
    assert (scores[:50] == 0).all()
    assert (np.diff(scores[50:]) > 0).all()
    assert abs(scores[50:].mean()) < 0.05
    far = scale.scores(np.array([1, 1]), np.array([1e9, -1e9], "float32"))
    assert far.tolist() == [4.0, -4.0]


def test_batches_read_from_data_hold_no_missing_value(fitted):
    X, _ = low_rank(50, seed=9)
    data = fitted._data(X)
    assert isinstance(data, Data)
    assert not np.isnan(data.blocks["labs"].ragged["value"][0]).any()
