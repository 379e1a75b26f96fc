"""Tabular and Labs: what is learned, what a cell becomes, what is refused."""

import numpy as np
import pandas as pd
import pytest

from ehrfuse import Labs, Tabular
from ehrfuse.modalities._numbers import RobustScale, distinct_flags, quantiles, vector_scale


def test_quantiles_agree_with_numpy_on_the_known_cells():
    rng = np.random.default_rng(0)
    table = rng.normal(size=(200, 130)).astype("float32")
    table[rng.random(table.shape) < 0.3] = np.nan
    table[:, 7] = np.nan
    levels = np.array([0, 0.1, 0.5, 0.99, 1])
    got = quantiles(table, levels)
    with np.errstate(invalid="ignore"):
        expected = np.nanquantile(np.delete(table, 7, 1), levels, axis=0)
    np.testing.assert_allclose(np.delete(got, 7, 1), expected, rtol=1e-5)
    assert np.isnan(got[:, 7]).all()


def test_robust_scale_has_fallbacks():
    n = 1000
    rng = np.random.default_rng(0)
    normal = rng.normal(5, 2, n)
    mostly_zero = np.where(rng.random(n) < 0.8, 0.0, 10.0)
    rare = np.where(np.arange(n) == 3, 8.0, 0.0)
    table = np.column_stack([normal, mostly_zero, rare, np.ones(n), np.full(n, np.nan)])
    scale = RobustScale.learn(table.astype("float32"))
    assert scale.center[0] == pytest.approx(5, abs=0.2)
    assert scale.scale[0] == pytest.approx(2, rel=0.1)
    np.testing.assert_allclose(scale.scale[1:], [10 / 3.29, 2.0, 1.0, 1.0], rtol=1e-5)


def test_scaled_values_stay_finite():
    """Tiny values in training and a huge one at predict: a number, and no warning."""
    scale = RobustScale.learn(np.array([[0.0], [1e-30]], "float32"))
    found = scale.apply(np.array([[1e30], [-1e30], [np.nan], [0.0]], "float32"))
    assert np.isfinite(found[[0, 1, 3]]).all()
    assert found[0] > 1e29
    assert found[1] < -1e29
    assert np.isnan(found[2])


def test_vectors_that_hardly_differ_are_constant():
    vectors = np.array([[0, 0], [1e-45, 0]], "float32")
    mean, scale = vector_scale(vectors)
    np.testing.assert_array_equal(scale, [1, 1])
    assert np.isfinite((vectors - mean) / scale).all()


def test_flags_are_kept_once_per_pattern_of_holes():
    nan = np.nan
    table = np.array([[1, nan, nan, 1], [1, 2, 2, nan], [1, 2, 2, 4.0]])
    assert distinct_flags(table).tolist() == [1, 3]


@pytest.fixture
def frame():
    return pd.DataFrame(
        {
            "age": [50.0, np.nan, 70.0, 60.0],
            "smoker": pd.array([True, False, pd.NA, True], dtype="boolean"),
            "sex": ["F", "M", None, "F"],
            "unit": pd.Categorical(["a", "b", "a", None]),
            "odd": pd.Series([1, None, 2.5, 3], dtype=object),
        }
    )


def test_kinds_of_columns(frame):
    tabular = Tabular(list(frame), min_count=1).fit(frame)
    assert tabular.numeric_ == ["age", "smoker", "odd"]
    assert list(tabular.categories_) == ["sex", "unit"]
    block = tabular.transform(frame)
    assert np.isnan(block.arrays["values"][1, 0])
    assert block.arrays["codes"].tolist() == [[2, 2], [3, 3], [0, 2], [2, 0]]
    assert block.present.tolist() == [True] * 4


def test_unseen_category_is_unknown_and_null_is_null(frame):
    tabular = Tabular(["sex"], min_count=1).fit(frame)
    other = pd.DataFrame({"sex": ["X", None, "M"]})
    block = tabular.transform(other)
    assert block.arrays["codes"].ravel().tolist() == [1, 0, 3]
    assert block.present.tolist() == [True, False, True]


def test_rare_categories_share_the_code_of_unknown_ones(frame):
    tabular = Tabular(["sex"]).fit(frame)
    assert tabular.categories_["sex"].tolist() == ["F"]  # one row alone has "M"
    assert tabular.transform(frame).arrays["codes"].ravel().tolist() == [2, 1, 0, 2]


def test_selector_of_columns(frame):
    from sklearn.compose import make_column_selector

    tabular = Tabular(make_column_selector(pattern="^age$|^sex$")).fit(frame)
    assert tabular.columns_ == ["age", "sex"]


def test_number_that_turns_into_a_word_is_explained(frame):
    tabular = Tabular(["age"]).fit(frame)
    with pytest.raises(
        ValueError, match=r"Column 'age' is read as numbers, but row 1 holds str of length"
    ):
        tabular.transform(pd.DataFrame({"age": pd.Series([1.0, "unknown"], dtype=object)}))


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([[1, 2], [3]], "holds list of length 2; Tabular reads numbers.*Declare it as Events"),
        (pd.to_datetime(["2020-01-01", None]), "holds times or dates"),
        ([np.inf, 1.0], "infinity in row 0"),
        ([1e300, 1.0], "infinity in row 0.*float32"),
    ],
)
def test_cells_that_are_no_table_are_explained(cells, message):
    X = pd.DataFrame({"x": pd.Series(cells)})
    with pytest.raises(ValueError, match=message):
        Tabular(["x"]).fit(X).transform(X)


def test_lacking_column_is_named():
    with pytest.raises(ValueError, match=r"not there: \['b'\]; X has 'a'"):
        Tabular(["a", "b"]).fit(pd.DataFrame({"a": [1.0]}))


def test_parameter_out_of_range_is_named():
    with pytest.raises(ValueError, match="n_bins=0 must be a whole number of at least 1"):
        Tabular(["a"], n_bins=0).fit(pd.DataFrame({"a": [1.0]}))


def test_labs_are_tokens_of_what_was_measured():
    X = pd.DataFrame({"na": [140.0, np.nan, 150], "k": [4.0, np.nan, np.nan]})
    labs = Labs(["na", "k"]).fit(X)
    block = labs.transform(X)
    assert block.present.tolist() == [True, False, True]
    assert np.isnan(block.arrays["values"]).tolist() == [[False] * 2, [True] * 2, [False, True]]
    encoder = labs.make_encoder(4)
    _, mask = encoder(block.take(np.arange(3)))
    assert mask.tolist() == [[True, True], [False, False], [True, False]]


def test_learned_from_the_rows_given_only():
    rng = np.random.default_rng(0)
    X = pd.DataFrame({"a": rng.normal(size=100), "c": rng.choice(["u", "v"], 100)})
    twin = X.copy()
    twin.loc[50:, "a"] = 1e6
    twin.loc[50:, "c"] = "w"
    a, b = (Tabular(["a", "c"]).fit(frame.iloc[:50]) for frame in (X, twin))
    np.testing.assert_array_equal(a.scale_.center, b.scale_.center)
    np.testing.assert_array_equal(a.features_["edges"], b.features_["edges"])
    assert list(a.categories_["c"]) == list(b.categories_["c"])


@pytest.mark.parametrize("kind", [Tabular, Labs])
def test_large_numbers_keep_their_last_digits(kind):
    """Seconds since 1970 differ by minutes: float32 alone would round them together."""
    start = 1_700_000_000
    X = pd.DataFrame({"clock": start + np.arange(0.0, 60.0)})
    values = kind(["clock"]).fit(X).transform(X).arrays["values"][:, 0]
    assert len(np.unique(values)) == 60
    np.testing.assert_allclose(np.diff(values), np.diff(values).mean(), rtol=1e-4)
