"""Named checks that every public estimator passes, on frames with every kind of modality.

`checks_for(estimator)` yields (name, function) pairs; a function gets a fresh estimator and the
cohort, and fails by an assertion. Adding an estimator adds nothing here.
"""

import pickle
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone, is_classifier, is_regressor
from sklearn.model_selection import GridSearchCV
from sklearn.utils import Bunch

import ehrfuse
import ehrfuse._checkpoint
from ehrfuse._data import Data
from ehrfuse._train import predict
from ehrfuse.datasets import read_parquet, write_parquet

CPU = torch.device("cpu")


def checks_for(estimator):
    """Checks by name, chosen by what the estimator is."""
    for check in [
        check_one_modality_null_for_everyone,
        check_half_of_a_modality_null,
        check_row_without_anything,
        check_null_content_cannot_matter,
        check_rows_are_independent,
        check_other_indices_and_dtypes,
        check_parquet_round_trip,
        check_clone_and_nested_parameters,
        check_grid_search,
        check_seed,
        check_pickle,
        check_inputs_untouched,
        check_extra_columns_and_order,
        check_missing_column_is_named,
        check_failed_predict_loses_nothing,
        check_batch_on_the_best_device,
        check_stop_and_go_on,
    ]:
        yield check.__name__, check
    if is_classifier(estimator):
        yield "check_memorises", check_memorises


def fit(estimator, cohort, **options):
    """Fit to the cohort with what the estimator's face takes."""
    if is_classifier(estimator) or is_regressor(estimator):
        return estimator.fit(cohort.X, cohort.y, **options)
    return estimator.fit(cohort.X)


def outputs(estimator, X):
    """Probabilities, values or embedding."""
    for name in ("predict_proba", "transform", "predict"):
        if hasattr(estimator, name):
            return np.asarray(getattr(estimator, name)(X))
    raise AssertionError(f"{estimator} gives nothing")


def nested_parameter(estimator):
    """A whole-number parameter of one of the modalities, as name, parameter and another value."""
    for name, modality in estimator.modalities.items():
        for key in ("max_length", "n_bins", "max_visits"):
            if key in modality.get_params():
                return name, key, 7
    raise AssertionError("no modality has a parameter to set")


def needs_all_modalities(estimator):
    """Whether each kind is needed in fit, as both sides of an alignment are."""
    return getattr(estimator, "_needs_all", False)


def first_number(estimator):
    """A numeric column that the estimator reads, or None."""
    read = [c for m in estimator.modalities.values() for c in columns_of(m)]
    return next((c for c in ("age", "sodium") if c in read), None)


def columns_of(modality):
    return [modality.columns] if isinstance(modality.columns, str) else list(modality.columns)


def nulled(X, columns, rows=None):
    """A copy with null cells in some columns, of some rows or of all."""
    X = X.copy()
    for column in columns:
        keep = np.zeros(len(X), bool) if rows is None else ~rows
        X[column] = X[column].where(keep)
    return X


def assert_valid(estimator, out):
    assert np.isfinite(out).all()
    if is_classifier(estimator):
        assert (out >= 0).all()
        assert (out <= 1).all()


def check_one_modality_null_for_everyone(estimator, cohort):
    for modality in cohort.modalities.values():
        X = nulled(cohort.X, columns_of(modality))
        fitted = fit(clone(estimator), replace_X(cohort, X))
        out = outputs(fitted, X)
        assert_valid(estimator, out)
        # Never seen in fit stays absent at predict: nobody trained its encoder.
        np.testing.assert_allclose(outputs(fitted, cohort.X), out, atol=1e-6)


def check_half_of_a_modality_null(estimator, cohort):
    half = np.arange(len(cohort.X)) % 2 == 0
    X = cohort.X
    for modality in cohort.modalities.values():
        X = nulled(X, columns_of(modality), half)
    assert_valid(estimator, outputs(fit(estimator, replace_X(cohort, X)), X))


def check_row_without_anything(estimator, cohort):
    own = [c for m in cohort.modalities.values() for c in columns_of(m)]
    fit(estimator, cohort)
    assert_valid(estimator, outputs(estimator, nulled(cohort.X.head(3), own)))


def check_null_content_cannot_matter(estimator, cohort):
    """Garbage and NaN under absent rows reach neither output nor gradient."""
    fit(estimator, cohort)
    blocks = {name: m.transform(cohort.X) for name, m in estimator.modalities_.items()}
    poisoned = {name: poison(block) for name, block in blocks.items()}
    assert any(not block.present.all() for block in blocks.values())
    rows = np.arange(len(cohort.X))
    core = estimator.module_
    clean = predict(core, Data(blocks, rows), 64, CPU)
    np.testing.assert_allclose(predict(core, Data(poisoned, rows), 64, CPU), clean, atol=1e-6)
    y = None if estimator.target_ is None else estimator.target_.encode(cohort.y)
    weight = np.ones(len(rows), "float32")
    batch = Data(poisoned, rows, y, weight, np.arange(len(rows))).batch(rows)
    core.train()
    core.zero_grad()
    torch.stack(list(core.losses(batch).values())).sum().backward()
    gradients = [p.grad for p in core.parameters() if p.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


def poison(block):
    """Another block that differs only under its absent rows."""
    gone = ~block.present
    arrays = {}
    for name, array in block.arrays.items():
        arrays[name] = array.copy()
        arrays[name][gone] = np.nan if array.dtype.kind == "f" else 1
    return replace(block, arrays=arrays)


def check_rows_are_independent(estimator, cohort):
    fit(estimator, cohort)
    out = outputs(estimator, cohort.X)
    order = np.random.default_rng(0).permutation(len(cohort.X))
    np.testing.assert_allclose(outputs(estimator, cohort.X.iloc[order]), out[order], atol=1e-7)
    for row in (0, 5, 11):
        alone = outputs(estimator, cohort.X.iloc[[row]])
        np.testing.assert_allclose(alone, out[[row]], atol=1e-7)


def check_other_indices_and_dtypes(estimator, cohort):
    fit(estimator, cohort)
    out = outputs(estimator, cohort.X)
    for index in (
        np.arange(len(cohort.X)) % 7,
        [f"row {i}" for i in range(len(cohort.X))],
        pd.MultiIndex.from_arrays([np.arange(len(cohort.X)) // 3, np.arange(len(cohort.X))]),
    ):
        np.testing.assert_array_equal(outputs(estimator, cohort.X.set_axis(index, axis=0)), out)
    arrow = cohort.X.copy()
    for column in ("age", "sodium", "note", "sex"):
        arrow[column] = arrow[column].convert_dtypes(dtype_backend="pyarrow")
    np.testing.assert_allclose(outputs(estimator, arrow), out, atol=1e-6)
    plain = cohort.X.copy()
    for column in ("events", "visits"):
        plain[column] = pd.Series(plain[column].tolist(), index=plain.index, dtype=object)
    for column in ("note", "sex"):
        plain[column] = plain[column].astype(object).where(plain[column].notna(), None)
    np.testing.assert_allclose(outputs(estimator, plain), out, atol=1e-6)


def check_parquet_round_trip(estimator, cohort, folder=None):
    fit(estimator, cohort)
    X = cohort.X.drop(columns="image")  # two-dimensional arrays do not go into Parquet cells
    path = folder / "cohort.parquet"
    write_parquet(X, path)
    back = read_parquet(path)
    back["image"] = cohort.X["image"].to_numpy()
    expected = outputs(estimator, cohort.X)
    np.testing.assert_allclose(outputs(estimator, back), expected, atol=1e-6)


def check_clone_and_nested_parameters(estimator, cohort):
    params = estimator.get_params()
    name, key, value = nested_parameter(estimator)
    assert params[f"{name}__{key}"] == getattr(estimator.modalities[name], key)
    twin = clone(estimator)
    assert not hasattr(twin, "module_")
    other = next((n for n in reversed(estimator.modalities) if n != name), None)
    twin.set_params(**{f"{name}__{key}": value} | ({other: "drop"} if other else {}))
    assert getattr(estimator.modalities[name], key) != value
    assert "drop" not in estimator.modalities.values()
    dropped = bool(other) and not needs_all_modalities(estimator)
    if other and not dropped:
        twin.set_params(**{other: estimator.modalities[other]})
    fit(twin, cohort)
    assert not dropped or other not in twin.modalities_
    assert getattr(twin.modalities_[name], key) == value


def check_grid_search(estimator, cohort):
    name, key, value = nested_parameter(estimator)
    changed = clone(estimator.modalities[name]).set_params(**{key: value})
    other = next((n for n in reversed(estimator.modalities) if n != name), None)
    grid = {name: [changed], "lr": [1e-3, 2e-3]}
    if other and not needs_all_modalities(estimator):
        grid |= {other: ["drop", estimator.modalities[other]], "lr": [1e-3]}
    search = GridSearchCV(estimator, grid, cv=2, error_score="raise")
    fit(search, cohort) if is_classifier(estimator) else search.fit(cohort.X, cohort.y)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    assert not hasattr(changed, "columns_")


def global_stream():
    return np.random.get_state()[1].copy()  # noqa: NPY002


def check_seed(estimator, cohort):
    numpy_state, torch_state = global_stream(), torch.get_rng_state()
    out = outputs(fit(clone(estimator), cohort), cohort.X)
    np.testing.assert_array_equal(numpy_state, global_stream())
    assert torch.equal(torch_state, torch.get_rng_state())
    np.testing.assert_array_equal(outputs(fit(clone(estimator), cohort), cohort.X), out)
    other = outputs(fit(clone(estimator).set_params(random_state=1), cohort), cohort.X)
    assert not np.allclose(other, out)


def check_pickle(estimator, cohort):
    fit(estimator, cohort)
    out = outputs(estimator, cohort.X)
    raw = pickle.dumps(estimator)
    revived = pickle.loads(raw)
    np.testing.assert_array_equal(outputs(revived, cohort.X), out)
    # A later set_params changes the next fit, not this model.
    width = next(name for name in ("d_model", "n_d") if name in estimator.get_params())
    estimator.set_params(**{width: 96})
    np.testing.assert_array_equal(outputs(pickle.loads(pickle.dumps(estimator)), cohort.X), out)
    secret = cohort.X["note"].dropna().iloc[0]
    assert secret.encode() not in raw


def check_inputs_untouched(estimator, cohort):
    before = cohort.X.copy(deep=True)
    params = repr(estimator.get_params(deep=False)["modalities"])
    fit(estimator, cohort)
    outputs(estimator, cohort.X)
    pd.testing.assert_frame_equal(cohort.X, before)
    assert repr(estimator.get_params(deep=False)["modalities"]) == params


def check_extra_columns_and_order(estimator, cohort):
    fit(estimator, cohort)
    out = outputs(estimator, cohort.X)
    shuffled = cohort.X[list(cohort.X.columns)[::-1]].assign(extra="x").drop(columns="subject_id")
    np.testing.assert_array_equal(outputs(estimator, shuffled), out)


def check_missing_column_is_named(estimator, cohort):
    fit(estimator, cohort)
    name = columns_of(next(iter(estimator.modalities.values())))[0]
    with pytest.raises(ValueError, match=name):
        outputs(estimator, cohort.X.drop(columns=name))


def check_failed_predict_loses_nothing(estimator, cohort):
    fit(estimator, cohort)
    out = outputs(estimator, cohort.X)
    broken = cohort.X.copy()
    name = first_number(estimator)
    if name is None:  # a list where no list belongs is as bad as an infinite number
        name = columns_of(next(iter(estimator.modalities.values())))[0]
        broken[name] = "broken"
    else:
        broken[name] = np.inf
    with pytest.raises(ValueError, match=name):
        outputs(estimator, broken)
    np.testing.assert_array_equal(outputs(estimator, cohort.X), out)


def check_batch_on_the_best_device(estimator, cohort):
    """Fitted on the best device, predicts on the CPU; the same device where there is no GPU."""
    fit(estimator, cohort)
    out = outputs(estimator, cohort.X)
    on_cpu = pickle.loads(pickle.dumps(estimator)).set_params(device="cpu")
    np.testing.assert_allclose(outputs(on_cpu, cohort.X), out, atol=1e-4)


class Killed(BaseException):
    """Stands for the end of the process."""


@contextmanager
def killed_after(n_steps):
    """Save after every step; end any fit after some, or let it run where that is None."""
    run, left = ehrfuse._checkpoint.Run, [n_steps]
    count = run.count

    def one_less(self, terms, rows):
        count(self, terms, rows)
        if left[0] is not None:
            left[0] -= 1
            if not left[0]:
                raise Killed

    with (
        mock.patch.object(run, "count", one_less),
        mock.patch.multiple(ehrfuse._checkpoint, EVERY=0.0, SHARE=np.inf),
    ):
        yield


def check_stop_and_go_on(estimator, cohort, folder=None):
    """Killed within epochs and between them, a fit ends with the weights of one that was not."""
    estimator.set_params(validation_fraction=0.2, batch_size=16)
    whole = fit(clone(estimator), cohort)
    stopped = clone(estimator).set_params(checkpoint=folder)
    for n_steps in (2, 3, 4):
        with killed_after(n_steps), pytest.raises(Killed):
            fit(stopped, cohort)
    for n_steps in (None, 1):  # the second finds that all is done
        with killed_after(n_steps):
            fit(stopped, cohort)
        assert stopped.history_ == whole.history_
        assert [list(record) for record in stopped.history_] == [list(r) for r in whole.history_]
        weights = whole.module_.state_dict()
        for name, tensor in stopped.module_.state_dict().items():
            assert torch.equal(tensor, weights[name]), name
        assert _saved(stopped, folder) == _saved(whole, folder)


def _saved(estimator, folder):
    """The bytes of a saved model; where it was fitted is no part of it."""
    ehrfuse.save(estimator, folder / "model.zip")
    return (folder / "model.zip").read_bytes()


def check_memorises(estimator, cohort):
    """Sixteen rows are learned by heart: gradients flow everywhere."""
    small = replace_X(cohort, cohort.X.head(16))
    y = np.arange(16) % 2
    options = {"max_epochs": 150, "batch_size": 16, "lr": 1e-2, "weight_decay": 0.0, "dropout": 0.0}
    known = estimator.get_params()
    options |= {key: 0.0 for key in known if key.endswith(("__column_dropout", "__dropout"))}
    options |= {"random_state": 0}
    estimator.set_params(**{name: value for name, value in options.items() if name in known})
    estimator.fit(small.X, y)
    history = pd.DataFrame(estimator.history_)["train_loss"]
    assert history.iloc[-5:].mean() < history.iloc[0] / 10


def replace_X(cohort, X):
    """The same cohort with another frame (and as many labels)."""
    return Bunch(**cohort | {"X": X, "y": cohort.y[: len(X)]})
