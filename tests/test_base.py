"""The template: what it refuses, what it learns from which rows, what a pretrainer hands over."""

import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, GroupKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from tiny_models import write_bert

from ehrfuse import (
    Embedding,
    Events,
    FusionClassifier,
    FusionRegressor,
    Labs,
    MaskedLabPretrainer,
    MMNARFusionClassifier,
    MMNARPretrainer,
    Tabular,
    Text,
    _hub,
)
from ehrfuse.datasets import make_ehr

FAST = {"d_model": 8, "n_members": 2, "max_epochs": 3, "random_state": 0}


@pytest.fixture(scope="module")
def cohort():
    return make_ehr(n_samples=120, random_state=3, as_bunch=True)


@pytest.fixture
def modalities():
    return {"vitals": Tabular(["age", "heart_rate", "sex"]), "cxr": Embedding("cxr")}


def refuse(message, X, y, modalities=None, **options):
    with pytest.raises(ValueError, match=message):
        FusionClassifier(modalities, **FAST | options).fit(X, y)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"values": Tabular(["age"])}, "'values' cannot name a modality"),
        ({"lr": Tabular(["age"])}, "'lr' cannot name a modality"),
        ({"a__b": Tabular(["age"])}, "'a__b' cannot name a modality"),
        ({"a": "age"}, r"Modality 'a' is 'age'; it must be an object such as Tabular"),
        ({"a": Tabular(["weight"])}, r"not there: \['weight'\]; X has 'subject_id', 'age'"),
        ({"a": Tabular([])}, "needs columns of X"),
        ({"a": "drop"}, "all dropped"),
        ({"a": Text(["note", "sex"])}, r"Text reads one column, got \['note', 'sex'\]"),
        ({"a": Events("note")}, "Column 'note' holds .* a cell must be a list of records"),
        ({"a": Tabular(["events"])}, "Column 'events' holds list of length"),
        ({"a": Embedding("note")}, "note"),
        ({"a": Tabular(["age", "subject_id"])}, "names the patient"),
        (["age"], "modalities is list; it must be a dict"),
    ],
)
def test_wrong_declarations_are_explained(cohort, declared, message):
    refuse(message, cohort.X, cohort.y, declared, groups="subject_id")


def test_wrong_frames_are_explained(cohort, modalities):
    X, y = cohort.X, cohort.y
    refuse("declare what it is, e.g. modalities=.*Text", X[["age", "note"]], y)
    refuse("same name: .*'age'", pd.concat([X, X[["age"]]], axis=1), y, modalities)
    refuse(
        "X is ndarray; with declared modalities it must be a pandas", X.to_numpy(), y, modalities
    )
    refuse(r"0 sample\(s\)", X.iloc[:0], y[:0], modalities)
    refuse("groups='patient' is no column", X, y, modalities, groups="patient")
    refuse("inconsistent numbers of samples", X, y[:-1], modalities)
    refuse("infinity", X.assign(age=np.inf), y, modalities)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_epochs": 0}, "max_epochs == 0, must be >= 1"),
        ({"lr": -1.0}, "lr == -1.0, must be > 0"),
        ({"validation_fraction": 1.5}, "validation_fraction == 1.5, must be < 1"),
        ({"fusion": "sum"}, "fusion='sum' is not known; choose one of 'mean', 'concat'"),
        ({"freeze": "encoders"}, r"freeze is one str; .*\('encoders',\)"),
        ({"freeze": ("encoders.lab",)}, r"freeze names 'encoders.lab'.*encoders.vitals"),
        ({"device": "cuda:7"}, "torch finds no GPU here|CUDA|invalid"),
    ],
)
def test_wrong_parameters_are_explained(cohort, modalities, options, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        FusionClassifier(modalities, **FAST | options).fit(cohort.X, cohort.y)


@pytest.mark.parametrize("weight", [-np.ones(120), np.full(120, np.nan), np.zeros(120)])
def test_wrong_weights_are_explained(cohort, modalities, weight):
    with pytest.raises(ValueError, match="weight"):
        FusionClassifier(modalities, **FAST).fit(cohort.X, cohort.y, sample_weight=weight)


def test_one_class_is_explained(cohort, modalities):
    refuse("one class only", cohort.X, np.zeros(120), modalities)


def test_kinds_an_estimator_does_not_read_are_listed(cohort, modalities):
    class TablesOnly(FusionClassifier):
        _accepts = (Tabular,)

    clf = TablesOnly(modalities, **FAST).fit(cohort.X, cohort.y)
    assert clf.ignored_modalities_ == ["cxr"]
    with pytest.raises(
        ValueError, match=r"TablesOnly reads Tabular; the modalities are .*Embedding"
    ):
        TablesOnly({"cxr": Embedding("cxr")}, **FAST).fit(cohort.X, cohort.y)


# ---------------------------------------------------------------- rows


def test_one_row_and_unseen_values_predict(cohort, modalities):
    clf = FusionClassifier(modalities, **FAST).fit(cohort.X, cohort.y)
    odd = cohort.X.iloc[[0]].assign(sex="never seen", age=900.0)
    assert np.isfinite(clf.predict_proba(odd)).all()


def test_validation_rows_share_no_patient_and_teach_nothing(cohort, modalities):
    clf = FusionClassifier(modalities, **FAST, groups="subject_id", validation_fraction=0.3)
    weight = np.ones(120, "float32")
    inside, aside = clf._set_aside(cohort.X, None, weight, seed=1)
    patients = cohort.X["subject_id"].to_numpy()
    assert len(aside) > 20
    assert not set(patients[inside]) & set(patients[aside])
    seen = []

    class Spy(Tabular):
        def _learn(self, cells):
            seen.extend(cells.index)
            super()._learn(cells)

    spied = {"vitals": Spy(["age", "heart_rate", "sex"])}
    X = cohort.X.reset_index(drop=True)
    clf = FusionClassifier(spied, **FAST, groups="subject_id", validation_fraction=0.3)
    clf.fit(X, cohort.y)
    assert "val_outcome" in clf.history_[0]
    assert len(seen) == len(set(seen)) < 120
    left_out = X.drop(index=seen)
    assert not set(left_out["subject_id"]) & set(X.loc[seen, "subject_id"])


def test_pretraining_sees_no_validation_patient(cohort, modalities, monkeypatch):
    seen = []
    inner = MMNARPretrainer.fit

    def spied(self, X, y=None):
        seen.extend(X["subject_id"])
        return inner(self, X, y)

    monkeypatch.setattr(MMNARPretrainer, "fit", spied)
    clf = pretrained(modalities, groups="subject_id", validation_fraction=0.3)
    clf.fit(cohort.X, cohort.y)
    left_out = ~cohort.X["subject_id"].isin(seen)
    assert left_out.sum() == 120 - len(seen) > 20


def test_validation_rows_without_groups_keep_the_classes(cohort, modalities):
    clf = FusionClassifier(modalities, **FAST, validation_fraction=0.25)
    clf.target_ = clf._make_target(cohort.y)
    y = clf.target_.encode(cohort.y)
    inside, aside = clf._set_aside(cohort.X, y, np.ones(120), seed=0)
    assert len(aside) == 30
    assert abs(y[inside].mean() - y[aside].mean()) < 0.05


def test_a_fit_too_small_to_split_says_so(cohort, modalities):
    clf = FusionClassifier(modalities, **FAST, validation_fraction=0.1)
    with pytest.warns(UserWarning, match="20 training rows are too few to set 10% aside"):
        clf.fit(cohort.X.head(20), np.arange(20) % 2)


def test_own_validation_rows(cohort, modalities):
    clf = FusionClassifier(modalities, **FAST)
    clf.fit(cohort.X[:80], cohort.y[:80], X_val=cohort.X[80:], y_val=cohort.y[80:])
    assert "val_outcome" in clf.history_[0]


def test_rows_of_weight_zero_are_as_good_as_absent(cohort, modalities):
    weight = (np.arange(120) < 90).astype(float)
    poisoned = cohort.X.copy()
    poisoned.loc[poisoned.index[90:], "age"] = 1e6
    a = FusionClassifier(modalities, **FAST).fit(cohort.X, cohort.y, sample_weight=weight)
    b = FusionClassifier(modalities, **FAST).fit(poisoned, cohort.y, sample_weight=weight)
    np.testing.assert_array_equal(a.predict_proba(cohort.X), b.predict_proba(cohort.X))


def test_test_rows_and_labels_cannot_reach_the_fit(cohort, modalities):
    """Whatever stands in the rows left out, the model is the same."""
    train = np.arange(120) < 90
    clf = MMNARFusionClassifier(modalities, **FAST, pretrained=MMNARPretrainer(**FAST))
    a = clone(clf).fit(cohort.X[train], cohort.y[train])
    other = cohort.X.copy()
    other.loc[other.index[~train], "heart_rate"] = 999.0
    b = clone(clf).fit(other[train], cohort.y[train])
    np.testing.assert_array_equal(a.predict_proba(cohort.X), b.predict_proba(cohort.X))


# ---------------------------------------------------------------- outcomes


def test_several_tasks_with_unknown_labels(modalities):
    data = make_ehr(n_samples=120, n_tasks=3, label_missing=0.3, random_state=0, as_bunch=True)
    clf = FusionClassifier(modalities, **FAST).fit(data.X, data.y)
    assert clf.predict_proba(data.X).shape == (120, 3)
    assert clf.target_names_ == list(data.y.columns)
    assert set(np.unique(clf.predict(data.X))) <= {0, 1}
    # A row whose labels are all unknown weighs nothing, whatever else is guessed for it.
    y = data.y.copy()
    y.iloc[:30] = np.nan
    weight = (np.arange(120) >= 30).astype(float)
    a = FusionClassifier(modalities, **FAST, batch_size=120).fit(data.X, y)
    assert np.isfinite(a.predict_proba(data.X)).all()
    assert weight.sum() == 90


def test_string_labels_and_several_classes(cohort, modalities):
    y = np.array(["home", "ward", "icu"])[np.arange(120) % 3]
    clf = FusionClassifier(modalities, **FAST).fit(cohort.X, y)
    assert list(clf.classes_) == ["home", "icu", "ward"]
    np.testing.assert_allclose(clf.predict_proba(cohort.X).sum(1), 1, rtol=1e-6)
    assert set(clf.predict(cohort.X)) <= set(y)


def test_score_names_unknown_labels(cohort, modalities):
    y = pd.DataFrame({"death": [0, 1, 1] * 40, "stay": [1, 0, pd.NA] * 40}, dtype="Int64")
    clf = FusionClassifier(modalities, **FAST).fit(cohort.X, y)
    for unknown in (y, y.to_numpy("float64", na_value=np.nan)):
        with pytest.raises(ValueError, match=r"score needs every label; .*masked_scorer"):
            clf.score(cohort.X, unknown)
    assert 0 <= clf.score(cohort.X, y.fillna(0)) <= 1


def test_regression_of_one_and_several_values(cohort, modalities):
    y = cohort.latent * 10 + 50
    reg = FusionRegressor(modalities, **FAST | {"max_epochs": 30}).fit(cohort.X, y)
    assert reg.predict(cohort.X).shape == (120,)
    assert reg.score(cohort.X, y) > 0.1
    two = FusionRegressor(modalities, **FAST).fit(cohort.X, np.column_stack([y, -y]))
    assert two.predict(cohort.X).shape == (120, 2)


def test_class_weight_lifts_the_rare_class(cohort, modalities):
    y = (cohort.latent > 1.2).astype(int)
    plain = FusionClassifier(modalities, **FAST).fit(cohort.X, y)
    balanced = FusionClassifier(modalities, **FAST, class_weight="balanced").fit(cohort.X, y)
    assert balanced.predict_proba(cohort.X)[:, 1].mean() > 0.35
    assert plain.predict_proba(cohort.X)[:, 1].mean() < 0.25


# ---------------------------------------------------------------- pretraining


def pretrained(modalities, **options):
    return MMNARFusionClassifier(modalities, **FAST, pretrained=MMNARPretrainer(**FAST), **options)


def test_pretrainer_inherits_modalities_and_hands_over_its_parts(cohort, modalities):
    clf = pretrained(modalities).fit(cohort.X, cohort.y)
    assert clf.transferred_ == ["encoders.vitals", "encoders.cxr", "spread.cxr", "trunk"]
    assert clf.modalities_["vitals"] is clf.pretrained_.modalities_["vitals"]
    assert not hasattr(clf.pretrained, "module_")  # the parameter itself stays unfitted


def test_frozen_parts_stay_as_they_came(cohort, modalities):
    clf = pretrained(modalities, freeze=("encoders.vitals",)).fit(cohort.X, cohort.y)
    ours = clf.module_.encoders["vitals"].state_dict()
    theirs = clf.pretrained_.module_.encoders["vitals"].state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    free = pretrained(modalities).fit(cohort.X, cohort.y).module_.encoders["vitals"].state_dict()
    assert not all(torch.equal(free[name], theirs[name]) for name in free)


def test_frozen_estimator_brings_a_larger_cohort(cohort, modalities):
    large = make_ehr(n_samples=300, random_state=9)[0]
    donor = MMNARPretrainer(modalities, **FAST).fit(large)
    clf = MMNARFusionClassifier(modalities, **FAST, pretrained=FrozenEstimator(donor))
    clf.fit(cohort.X, cohort.y)
    assert clf.modalities_["vitals"] is donor.modalities_["vitals"]
    scores = cross_val_score(clf, cohort.X, cohort.y, cv=2, scoring="roc_auc", error_score="raise")
    assert np.isfinite(scores).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pretrained__d_model": 4}, "encoders.vitals is built otherwise in `pretrained`"),
        (
            {"pretrained__modalities": {"other": Tabular(["age"])}},
            "at least one name must be shared",
        ),
        (
            {"pretrained__modalities": {"vitals": Tabular(["age"])}},
            "Modality 'vitals' is .* here but",
        ),
    ],
)
def test_pretrainers_that_do_not_fit_are_explained(cohort, modalities, options, message):
    clf = pretrained(modalities).set_params(**options)
    with pytest.raises(ValueError, match=message):
        clf.fit(cohort.X, cohort.y)


def test_a_pretrainer_that_reads_none_of_the_modalities_is_not_fitted(cohort, monkeypatch):
    monkeypatch.setattr(MaskedLabPretrainer, "fit", lambda *args: pytest.fail("it was fitted"))
    clf = FusionClassifier({"vitals": Tabular(["age"])}, pretrained=MaskedLabPretrainer(), **FAST)
    with pytest.raises(ValueError, match=r"MaskedLabPretrainer, which reads Labs or Events; the "):
        clf.fit(cohort.X, cohort.y)


def test_patience_without_rows_to_watch_is_told(cohort, modalities):
    with pytest.warns(UserWarning, match="patience=1 does nothing") as told:
        FusionClassifier(modalities, patience=1, **FAST).fit(cohort.X, cohort.y)
    assert told[0].filename == __file__


def test_warnings_point_to_the_line_of_the_user(cohort, modalities, tmp_path):
    few = {"validation_fraction": 0.01} | FAST
    for clf in (
        FusionClassifier(modalities, **few),
        make_pipeline(FusionClassifier(modalities, **few)),
        FusionClassifier(
            modalities, pretrained=MMNARPretrainer(**few), memory=str(tmp_path), **FAST
        ),
    ):
        with pytest.warns(UserWarning, match="too few to set") as told:
            clf.fit(cohort.X, cohort.y)
        assert {w.filename for w in told} == {__file__}


def test_memory_pretrains_once(cohort, modalities, tmp_path, monkeypatch):
    calls = []
    inner = MMNARPretrainer.fit

    def counted(self, X, y=None):
        calls.append(len(X))
        return inner(self, X, y)

    monkeypatch.setattr(MMNARPretrainer, "fit", counted)
    clf = pretrained(modalities, memory=str(tmp_path))
    grid = GridSearchCV(clf, {"dropout": [0.0, 0.1]}, cv=2, refit=False, error_score="raise")
    grid.fit(cohort.X, cohort.y)
    assert len(calls) == 2  # one a fold, not one a candidate


def test_embedding_in_a_pipeline(cohort, modalities):
    pipe = make_pipeline(MMNARPretrainer(modalities, **FAST), LogisticRegression())
    assert cross_val_score(pipe, cohort.X, cohort.y, cv=2, error_score="raise").mean() > 0.5
    table = pipe[0].set_output(transform="pandas").fit_transform(cohort.X)
    assert list(table)[:2] == ["mmnarpretrainer0", "mmnarpretrainer1"]
    assert (table.index == cohort.X.index).all()


def test_score_of_a_pretrainer_is_repeatable_and_tunes(cohort, modalities):
    encoder = MMNARPretrainer(modalities, **FAST).fit(cohort.X)
    assert encoder.score(cohort.X) == encoder.score(cohort.X) < 0
    grid = GridSearchCV(MMNARPretrainer(modalities, **FAST), {"lr": [1e-4, 1e-2]}, cv=2)
    assert grid.fit(cohort.X).best_params_["lr"] in (1e-4, 1e-2)


# ---------------------------------------------------------------- scikit-learn


def test_everyday_use_with_patients(cohort):
    declared = {
        "vitals": Tabular(["age"]),
        "labs": Labs(["sodium", "lactate"]),
        "note": Text("note"),
    }
    clf = FusionClassifier(declared, **FAST, groups="subject_id")
    scores = cross_val_score(
        clf, cohort.X, cohort.y, cv=GroupKFold(3), groups=cohort.groups, scoring="roc_auc",
        error_score="raise",
    )  # fmt: skip
    assert scores.shape == (3,)


def test_grid_search_in_two_processes(cohort, modalities):
    clf = FusionClassifier(modalities | {"note": Text("note")}, **FAST)
    grid = {"note__max_length": [4, 64], "vitals": ["drop", modalities["vitals"]]}
    search = GridSearchCV(clf, grid, cv=2, n_jobs=2, scoring="roc_auc", error_score="raise")
    search.fit(cohort.X, cohort.y)
    assert len(set(search.cv_results_["mean_test_score"].round(6))) == 4


def test_progress_is_silent_unless_asked(cohort, modalities, capsys):
    FusionClassifier(modalities, **FAST).fit(cohort.X, cohort.y)
    assert capsys.readouterr() == ("", "")
    FusionClassifier(modalities, **FAST, verbose=True).fit(cohort.X, cohort.y)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("FusionClassifier epoch 0: train_loss")


def test_sklearn_callbacks_see_every_epoch_and_can_stop(cohort, modalities):
    pytest.importorskip("sklearn.callback")

    class Recorder:
        def __init__(self):
            self.tasks = []

        def setup(self, estimator, context):
            pass

        def on_fit_task_begin(self, estimator, context, **kwargs):
            self.tasks.append(context.task_name)

        def on_fit_task_end(self, estimator, context, **kwargs):
            return self.tasks.count("epoch") == 2

        def teardown(self, estimator, context):
            pass

    recorder = Recorder()
    clf = FusionClassifier(modalities, **FAST).set_callbacks(recorder)
    clf.fit(cohort.X, cohort.y)
    assert recorder.tasks == ["fit", "epoch", "epoch"]
    assert clf.n_iter_ == 2


def test_interrupted_fit_is_a_fitted_model(cohort, modalities, monkeypatch):
    clf = FusionClassifier(modalities, **FAST)
    report = []

    def interrupt(record):
        report.append(record)
        if len(report) == 2:
            raise KeyboardInterrupt
        return False

    from contextlib import contextmanager

    @contextmanager
    def progress(self):
        yield interrupt

    monkeypatch.setattr(FusionClassifier, "_progress", progress)
    with pytest.warns(UserWarning, match="interrupted after 2 full epochs"):
        clf.fit(cohort.X, cohort.y)
    assert clf.n_iter_ == 2
    assert np.isfinite(clf.predict_proba(cohort.X)).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_agrees_with_cpu(cohort, modalities):
    gpu = FusionClassifier(modalities, **FAST).fit(cohort.X, cohort.y)
    p = gpu.predict_proba(cohort.X)
    np.testing.assert_allclose(gpu.set_params(device="cpu").predict_proba(cohort.X), p, atol=1e-4)


def test_patients_without_a_name_are_refused(cohort, modalities):
    X = cohort.X.copy()
    X["subject_id"] = X["subject_id"].astype("Int64").where(np.arange(120) > 2)
    refuse(r"'subject_id' \(groups\) has 3 nulls", X, cohort.y, modalities, groups="subject_id")


def test_parameters_of_a_dropped_modality_are_explained(cohort, modalities):
    clf = FusionClassifier(modalities, **FAST)
    with pytest.raises(ValueError, match="cannot be set while that modality is 'drop'"):
        clf.set_params(vitals="drop", vitals__n_bins=3)


def test_numpy_numbers_are_numbers(cohort, modalities):
    """As `np.arange` and `np.logspace` give them to a grid search."""
    clf = FusionClassifier(modalities, max_epochs=np.int64(2), d_model=np.int64(8), random_state=0)
    clf.set_params(lr=np.float64(1e-3), n_members=np.int64(2)).fit(cohort.X, cohort.y)
    revived = pickle.loads(pickle.dumps(clf))
    np.testing.assert_array_equal(revived.predict_proba(cohort.X), clf.predict_proba(cohort.X))


def test_trunk_moves_only_between_equal_modalities_in_equal_order(cohort, modalities):
    turned = {name: modalities[name] for name in ("cxr", "vitals")}
    donor = FrozenEstimator(MMNARPretrainer(turned, **FAST).fit(cohort.X))
    clf = MMNARFusionClassifier(modalities, **FAST, pretrained=donor).fit(cohort.X, cohort.y)
    assert "trunk" not in clf.transferred_
    assert "encoders.vitals" in clf.transferred_


def test_values_of_weight_zero_do_not_set_the_scale(cohort, modalities):
    y, weight = cohort.latent.copy(), np.ones(120)
    y[:5], weight[:5] = 1e6, 0.0
    reg = FusionRegressor(modalities, **FAST).fit(cohort.X, y, sample_weight=weight)
    assert np.abs(reg.predict(cohort.X)).max() < 10


def test_patient_column_may_be_absent_at_predict_without_modalities():
    X = pd.DataFrame({"a": np.arange(40.0), "pid": np.arange(40) // 2, "b": 1.0})
    clf = FusionClassifier(groups="pid", **FAST).fit(X, np.arange(40) % 2)
    a, b = clf.predict_proba(X), clf.predict_proba(X.drop(columns="pid"))
    np.testing.assert_array_equal(a, b)


def test_names_of_columns(cohort, modalities):
    refuse("must be strings, got 7", cohort.X.rename(columns={"wbc": 7}), cohort.y, modalities)
    refuse("names a column twice", cohort.X, cohort.y, {"a": Tabular(["age", "age"])})


def test_validation_rows_do_not_set_the_scale_of_y(cohort, modalities):
    reg = FusionRegressor(modalities, **FAST, validation_fraction=0.25)
    reg.target_ = reg._make_target(cohort.latent)
    _, aside = reg._set_aside(cohort.X, None, np.ones(120), _first_seed(0))
    y = cohort.latent.copy()
    y[aside] += 1e4
    fitted = reg.fit(cohort.X, y)
    assert abs(fitted.target_.center[0]) < 1
    assert fitted.target_.scale[0] < 10


def _first_seed(random_state):
    return int(np.random.RandomState(random_state).randint(2**31 - 1))


def test_weights_count_at_one_row_a_batch(cohort, modalities):
    """A row that weighs next to nothing teaches next to nothing, whatever the batch."""
    y = cohort.y
    light = np.where(y == 1, 1e-6, 1.0)
    options = FAST | {"batch_size": 1, "max_epochs": 2}
    plain = FusionClassifier(modalities, **options).fit(cohort.X, y)
    fitted = FusionClassifier(modalities, **options).fit(cohort.X, y, sample_weight=light)
    means = [clf.predict_proba(cohort.X)[:, 1].mean() for clf in (fitted, plain)]
    assert means[0] < 0.6 * means[1]


def test_validation_labels_start_no_head(cohort, modalities):
    clf = FusionClassifier(modalities, groups="subject_id", validation_fraction=0.3, **FAST)
    clf.fit(cohort.X, cohort.y)
    aside = clf._set_aside(cohort.X, None, np.ones(len(cohort.X)), _seed_of(FAST))[1]
    y = cohort.y.copy()
    y[aside] = 1 - y[aside]
    other = clone(clf).fit(cohort.X, y)
    np.testing.assert_array_equal(other.target_.start, clf.target_.start)
    assert other.history_[0]["train_loss"] == clf.history_[0]["train_loss"]


def _seed_of(options):
    return int(np.random.RandomState(options["random_state"]).randint(2**31 - 1))


def test_validation_rows_of_unknown_label_choose_no_epoch(cohort, modalities):
    y = pd.DataFrame({"a": cohort.y, "b": 1 - cohort.y}).astype(float)
    unknown = y * np.nan
    clf = FusionClassifier(modalities, patience=1, **FAST)
    with pytest.warns(UserWarning, match="None of the 120 validation rows has a known label"):
        clf.fit(cohort.X, y, X_val=cohort.X, y_val=unknown)
    assert clf.n_iter_ == FAST["max_epochs"]


def test_tasks_of_own_validation_rows_are_matched_by_name(cohort, modalities):
    y = pd.DataFrame({"a": cohort.y, "b": np.arange(len(cohort.y)) % 2})
    fits = [
        FusionClassifier(modalities, **FAST).fit(cohort.X, y, X_val=cohort.X, y_val=y_val)
        for y_val in (y, y[["b", "a"]])
    ]
    assert fits[0].history_ == fits[1].history_


def test_device_reaches_frozen_models(cohort, monkeypatch, tmp_path):
    """A Text or Image without a device of its own encodes where the estimator runs."""
    seen, model = [], _hub._model

    def watched(info, device):
        seen.append(device)
        return model(info, device)

    monkeypatch.setattr(_hub, "_model", watched)
    text = Text("note", model=write_bert(tmp_path / "bert"), chunk_length=16, max_length=16)
    clf = FusionClassifier({"note": text}, device="cpu", **FAST)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    clf.fit(cohort.X.head(40), cohort.y[:40]).predict_proba(cohort.X.tail(10))
    assert set(seen) == {"cpu"}


def test_scores_match_outcomes_by_name(cohort, modalities):
    y = pd.DataFrame({"a": cohort.X["age"], "b": -cohort.X["age"]}).fillna(0.0)
    reg = FusionRegressor(modalities, **FAST).fit(cohort.X, y)
    assert reg.score(cohort.X, y[["b", "a"]]) == reg.score(cohort.X, y)
    tasks = pd.DataFrame({"a": cohort.y, "b": 1 - cohort.y})
    clf = FusionClassifier(modalities, **FAST).fit(cohort.X, tasks)
    assert clf.score(cohort.X, tasks[["b", "a"]]) == clf.score(cohort.X, tasks)


def test_rows_whose_patient_is_not_told_are_patients_of_their_own(cohort, modalities):
    clf = FusionClassifier(modalities, groups="subject_id", **FAST).fit(cohort.X, cohort.y)
    X = cohort.X.assign(subject_id=np.nan)
    groups = clf._data(clf._frame(X, reset=False)).groups
    assert len(np.unique(groups)) == len(X)


def test_an_array_after_a_frame_is_read_by_position():
    rng = np.random.default_rng(0)
    X = pd.DataFrame(rng.normal(size=(60, 2)), columns=["age", "hr"])
    clf = FusionClassifier(max_epochs=1, n_members=2, random_state=0).fit(X, np.arange(60) % 2)
    with pytest.warns(UserWarning, match="does not have valid feature names"):
        proba = clf.predict_proba(X.to_numpy())
    np.testing.assert_array_equal(proba, clf.predict_proba(X))
