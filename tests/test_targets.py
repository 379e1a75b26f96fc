"""y <-> tensor: losses in closed form, probabilities, weights, unknown labels."""

import warnings

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from sklearn.metrics import log_loss

from ehrfuse._targets import ClassTarget, TaskTarget, ValueTarget, classification_target


def as_tensor(x):
    return torch.from_numpy(np.asarray(x, "float32"))


def test_binary_loss_is_the_log_loss_of_its_probabilities():
    y = np.array(["dead", "alive", "alive", "dead", "alive"])
    target = ClassTarget(y)
    logits = np.array([[0.3], [-1.0], [0.2], [2.0], [-0.1]])
    weight = np.array([1.0, 2.0, 0.5, 0.5, 0.0])  # of mean one where they are not zero
    loss = target.loss(as_tensor(logits), as_tensor(target.encode(y)), as_tensor(weight))
    p = target.probabilities(logits)
    assert list(target.classes) == ["alive", "dead"]
    assert loss.item() == pytest.approx(log_loss(y, p, sample_weight=weight), rel=1e-5)


def test_multiclass_loss_is_the_log_loss_of_its_probabilities():
    y = np.array([0, 2, 1, 2])
    target = ClassTarget(y)
    logits = np.random.default_rng(0).normal(size=(4, 3))
    loss = target.loss(as_tensor(logits), as_tensor(target.encode(y)), torch.ones(4))
    assert loss.item() == pytest.approx(log_loss(y, target.probabilities(logits)), rel=1e-5)


def test_members_have_their_own_losses_and_share_the_probability():
    y = np.array([0, 1, 1])
    target = ClassTarget(y)
    logits = np.random.default_rng(0).normal(size=(3, 4, 1))
    ours = target.loss(as_tensor(logits), as_tensor(target.encode(y)), torch.ones(3))
    each = [
        target.loss(as_tensor(logits[:, e]), as_tensor(target.encode(y)), torch.ones(3))
        for e in range(4)
    ]
    assert ours.item() == pytest.approx(np.mean(each), rel=1e-5)
    mean = np.mean([target.probabilities(logits[:, e]) for e in range(4)], 0)
    np.testing.assert_allclose(target.probabilities(logits), mean)


def test_unknown_labels_weigh_nothing():
    y = np.array([[0.0, np.nan], [1.0, 1.0], [np.nan, 0.0], [1.0, np.nan]])
    target = TaskTarget(y)
    logits = np.random.default_rng(0).normal(size=(4, 2))
    loss = target.loss(as_tensor(logits), as_tensor(target.encode(y)), torch.ones(4))
    known = ~np.isnan(y)
    p = target.probabilities(logits)
    cells = -np.where(y == 1, np.log(p), np.log(1 - p))[known]
    assert loss.item() == pytest.approx(cells.mean(), rel=1e-5)


def test_batch_without_a_known_label_has_loss_zero_and_gradient_zero():
    target = TaskTarget(np.array([[0.0, 1.0], [1.0, 0.0]]))
    logits = torch.zeros(3, 2, requires_grad=True)
    loss = target.loss(logits, torch.full((3, 2), torch.nan), torch.ones(3))
    loss.backward()
    assert loss.item() == 0
    assert (logits.grad == 0).all()


def test_task_without_positives_predicts_its_rate_and_warns():
    y = pd.DataFrame({"death": [0, 1, 0], "dialysis": [0, 0, np.nan]})
    with pytest.warns(UserWarning, match=r"'dialysis' has one class only.*rate 0 is predicted"):
        target = classification_target(y)
    p = target.probabilities(np.full((2, 2), 3.0))
    assert (p[:, 1] == 0).all()
    assert (p[:, 0] > 0.9).all()
    assert target.task_names == ["death", "dialysis"]


def test_rows_set_aside_do_not_reach_what_is_counted():
    y = np.array([0, 0, 0, 1, 1, 1, 1, 1])
    target = ClassTarget(y, "balanced")
    target.relearn(target.encode(y), np.arange(4))
    np.testing.assert_allclose(target.class_weight, [4 / 6, 2.0], rtol=1e-6)
    plain = ClassTarget(y)
    plain.relearn(plain.encode(y), np.arange(4))
    assert 1 / (1 + np.exp(-plain.start[0])) == pytest.approx(0.25)
    tasks = TaskTarget(np.column_stack([y, 1 - y]))
    tasks.relearn(tasks.encode(np.column_stack([y, 1 - y])), np.arange(4))
    np.testing.assert_allclose(1 / (1 + np.exp(-tasks.start)), [0.25, 0.75], rtol=1e-5)
    values = ValueTarget(y * 1.0)
    values.relearn(values.encode(y * 1.0), np.arange(4))
    assert values.center == pytest.approx(0.25)


def test_class_weights_keep_the_size_of_the_loss():
    y = np.array([0] * 9 + [1])
    target = ClassTarget(y, {0: 1.0, 1: 100.0})
    assert target.class_weight @ [9, 1] == pytest.approx(10)
    assert target.class_weight[1] == pytest.approx(100 * target.class_weight[0])


def test_tasks_are_matched_by_name():
    y = pd.DataFrame({"death": [0, 1, 0], "dialysis": [0, 1, 1]})
    target = classification_target(y)
    np.testing.assert_array_equal(target.encode(y[["dialysis", "death"]]), y.to_numpy("float32"))
    with pytest.raises(ValueError, match=r"y has the tasks \['death', 'x'\], fit had"):
        target.encode(y.rename(columns={"dialysis": "x"}))


def test_balanced_classes_weigh_the_same():
    y = np.array([0] * 9 + [1])
    target = ClassTarget(y, "balanced")
    assert target.class_weight[0] * 9 == pytest.approx(target.class_weight[1])
    assert target.start[0] == pytest.approx(0.0, abs=1e-6)
    tasks = TaskTarget(np.column_stack([y, 1 - y]), "balanced")
    np.testing.assert_allclose(tasks.start, 0.0, atol=1e-6)


def test_heads_start_at_the_rates():
    y = np.array([0] * 3 + [1])
    assert 1 / (1 + np.exp(-ClassTarget(y).start[0])) == pytest.approx(0.25)
    start = ClassTarget(np.array([0, 0, 1, 2])).start
    np.testing.assert_allclose(np.exp(start) / np.exp(start).sum(), [0.5, 0.25, 0.25], rtol=1e-5)


def test_values_come_back_in_their_unit():
    y = np.array([10.0, 20.0, 60.0])
    target = ValueTarget(y)
    encoded = target.encode(y)
    assert encoded.mean() == pytest.approx(0, abs=1e-6)
    np.testing.assert_allclose(target.values(encoded), y, rtol=1e-5)
    several = ValueTarget(np.array([[1.0, np.nan], [3.0, 5.0]]))
    loss = several.loss(
        torch.zeros(2, 2), as_tensor(several.encode([[1, np.nan], [3, 5]])), torch.ones(2)
    )
    assert loss.item() == pytest.approx((1 + 1 + 0) / 3, rel=1e-5)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        ([1, 1, 1], "one class only, .*1.*; a classifier needs at least two classes"),
        ([0.0, np.nan, 1.0], "Input y contains NaN"),
        ([0.1, 0.7, 0.3], "Unknown label type"),
        ([[0, 2], [1, 0]], r"must hold 0, 1 or NaN \(unknown class\), got 2"),
        ([["a", "b"], ["b", "a"]], "must hold 0, 1 or NaN"),
        ([[np.nan, np.nan], [np.nan, np.nan]], "no known label at all"),
    ],
)
def test_bad_y_is_explained(y, message):
    with pytest.raises(ValueError, match=message):
        classification_target(np.array(y))


@pytest.mark.parametrize(
    "y",
    [
        pd.Series(["a", None, "b"], dtype=object),
        pd.Series(["a", None, "b"], dtype="string"),
        pd.Series(["a", None, "b"], dtype="category"),
        pd.Series([True, None, False], dtype="boolean"),
        pd.array([1, None, 0], dtype="Int64"),
    ],
)
def test_unknown_labels_of_any_type_are_explained(y):
    with pytest.raises(ValueError, match="Input y contains NaN: 1 labels are unknown; leave"):
        classification_target(y)


def test_label_unseen_in_fit_is_explained():
    target = ClassTarget(np.array(["a", "b"]))
    with pytest.raises(ValueError, match="'c', which was not among the classes of fit"):
        target.encode(np.array(["a", "c"]))


def test_one_named_task_is_a_plain_outcome():
    target = classification_target(pd.DataFrame({"death": [0, 1, 1]}))
    assert isinstance(target, ClassTarget)


def test_values_of_nullable_frames():
    y = pd.DataFrame({"a": pd.array([1, None, 5], dtype="Int64"), "b": [1.0, 2.0, 6.0]})
    target = ValueTarget(y)
    np.testing.assert_allclose(target.center, [3, 3])
    assert np.isnan(target.encode(y)).tolist() == [[False, False], [True, False], [False, False]]
    with pytest.raises(ValueError, match="Input y contains NaN"):
        ValueTarget(y["a"])
    anything = y.astype(object).where(y.notna(), pd.NA)
    np.testing.assert_array_equal(ValueTarget(anything).encode(anything), target.encode(y))
    assert ValueTarget(pa.array([1.0, 3.0])).center == [2.0]
    tasks = pd.DataFrame({"a": [1, pd.NA, 0], "b": [True, False, None]}, dtype=object)
    known = TaskTarget(tasks).encode(tasks)
    np.testing.assert_array_equal(known, [[1, 1], [np.nan, 0], [0, np.nan]])


def test_values_of_which_none_is_known_are_told():
    y = pd.DataFrame({"a": [1.0, 3.0], "b": [np.nan, np.nan]})
    with pytest.warns(UserWarning, match=r"No value of \['b'\] is known in y; NaN is predicted"):
        target = ValueTarget(y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoded = target.relearn(target.encode(y), np.array([0, 1]))
    np.testing.assert_allclose(encoded, [[-1, np.nan], [1, np.nan]])
    assert np.isnan(target.values(np.zeros((3, 2)))).tolist() == [[False, True]] * 3


def test_task_of_which_nothing_is_known_is_a_coin():
    y = np.array([[0.0, np.nan], [1.0, np.nan]])
    with pytest.warns(UserWarning, match=r"'1' has no known label.*0\.5 is predicted.*a coin"):
        target = TaskTarget(y)
    assert (target.probabilities(np.zeros((3, 2)))[:, 1] == 0.5).all()
