"""The picture of what changed in the importance of columns."""

import numpy as np
import pytest
from sklearn.ensemble import RandomForestClassifier

from ehrfuse.evaluation import AttentionChangeDisplay


def test_table_is_ordered_by_change_and_scaled():
    display = AttentionChangeDisplay.from_importances([2, 2, 0], [1, 1, 2], ["a", "b", "c"])
    assert list(display.table.index) == ["c", "a", "b"]
    np.testing.assert_allclose(display.table[["before", "after"]].sum(), 1)
    np.testing.assert_allclose(display.table["change"], [0.5, -0.25, -0.25])


def test_any_two_estimators_with_importances():
    pd = pytest.importorskip("pandas")
    rng = np.random.default_rng(0)
    X = pd.DataFrame(rng.normal(size=(80, 3)), columns=["a", "b", "c"])
    one = RandomForestClassifier(10, random_state=0).fit(X, X["a"] > 0)
    two = RandomForestClassifier(10, random_state=0).fit(X[["c", "b"]], X["b"] > 0)
    display = AttentionChangeDisplay.from_estimators(one, two, labels=("all", "two"))
    assert set(display.table.index) == {"b", "c"}
    assert display.table.loc["b", "change"] > 0


def test_picture():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    names = [f"c{j}" for j in range(30)]
    display = AttentionChangeDisplay.from_importances(
        np.arange(30), np.arange(30)[::-1], names, max_columns=4
    )
    assert len(display.ax_.get_yticks()) == 4
    assert display.figure_ is display.ax_.figure
    _, ax = pyplot.subplots()
    assert display.plot(ax=ax).ax_ is ax
    pyplot.close("all")


def test_refusals():
    with pytest.raises(ValueError, match="one importance a column"):
        AttentionChangeDisplay.from_importances([1, 2], [1, 2], ["a"])
    one = RandomForestClassifier(2, random_state=0)
    two = RandomForestClassifier(2, random_state=0)
    pd = pytest.importorskip("pandas")
    X = pd.DataFrame(np.eye(6), columns=list("abcdef"))
    one.fit(X[["a", "b"]], [0, 1] * 3)
    two.fit(X[["c", "d"]], [0, 1] * 3)
    with pytest.raises(ValueError, match="share no column"):
        AttentionChangeDisplay.from_estimators(one, two)
