"""Random frames: whatever comes, an answer of the right shape or one clear sentence.

The short profile runs with the suite. The long one, 2,000 frames: ``EHRFUSE_EXAMPLES=2000 pytest
tests/test_properties.py``.
"""

import os
import re
import warnings

import numpy as np
import pandas as pd
import pyarrow as pa
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

import ehrfuse
from ehrfuse import Embedding, Events, Labs, Tabular, Text, Visits

EXAMPLES = int(os.environ.get("EHRFUSE_EXAMPLES", "40"))
SMALL = {"max_epochs": 1, "random_state": 0, "verbose": False, "device": "cpu"}
KINDS = {
    "FusionClassifier": {"d_model": 4, "n_members": 1},
    "MMNARFusionClassifier": {"d_model": 4, "n_members": 1},
    "MEDFuseClassifier": {"d_model": 8},
    "RAPTClassifier": {"d_model": 4, "n_members": 1, "n_heads": 1},
    "SequenceClassifier": {"d_model": 4},
    "TabNetClassifier": {},
    "FusionRegressor": {"d_model": 4, "n_members": 1},
    "MMNARPretrainer": {"d_model": 4, "n_members": 1},
    "MaskedLabPretrainer": {"d_model": 8},
}
NUMBERS = ("float64", "float32", "object", "Float64", "double[pyarrow]", "Int64", "bool")
FIELDS = {
    "code": pa.string(), "value": pa.float64(), "sbp": pa.float64(), "drugs": pa.list_(pa.string()),
}  # fmt: skip
# What a library says when it was handed something that should have been refused at the door.
INTERNAL = re.compile(
    r"mat1|size mismatch|out of bounds|out of range|broadcast|must match the size|Expected all|"
    r"zero-size|NoneType|object is not|has no attribute|cannot reshape|invalid literal|ambiguous"
)

number = st.one_of(
    st.none(),
    st.floats(-1e6, 1e6, width=32),
    st.integers(-5, 5).map(float),
    st.sampled_from([0.0, -0.0, 1e-30, 1e30, 123456789.0]),
)
word = st.sampled_from(["a", "b", "ä", "", " ", "0", "nan", "None", "x" * 40])


def holes(strategy):
    return st.one_of(st.none(), strategy)


@st.composite
def cells(draw, strategy, n):
    """A list of n cells; sometimes all null, sometimes one value for all."""
    how = draw(st.sampled_from(["any", "any", "any", "null", "same"]))
    if how == "null":
        return [None] * n
    if how == "same":
        return [draw(strategy)] * n
    return draw(st.lists(holes(strategy), min_size=n, max_size=n))


@st.composite
def numbers(draw, n):
    """A numeric column of any dtype that can hold it."""
    dtype = draw(st.sampled_from(NUMBERS))
    if dtype == "bool":
        return pd.Series(draw(st.lists(st.booleans(), min_size=n, max_size=n)), dtype=bool)
    if dtype == "Int64":
        return pd.Series(draw(cells(st.integers(-100, 100), n)), dtype="Int64")
    values = draw(cells(number, n))
    if dtype == "object":
        return pd.Series(values, dtype=object)
    return pd.Series([np.nan if v is None else v for v in values], dtype="float64").astype(dtype)


@st.composite
def words(draw, n):
    dtype = draw(st.sampled_from(["object", "category", "string", "str"]))
    return pd.Series(draw(cells(word, n)), dtype=object).astype(dtype)


@st.composite
def records(draw, n, fields):
    """Events or visits: lists of dicts, as objects or as one Arrow column."""
    time = st.floats(-100, 0, width=32)
    item = st.builds(lambda t, rest: {"time": t, **rest}, time, st.fixed_dictionaries(fields))
    column = pd.Series(draw(cells(st.lists(item, max_size=4), n)), dtype=object)
    if draw(st.booleans()):
        parts = [("time", pa.float64()), *((name, FIELDS[name]) for name in fields)]
        kind = pa.list_(pa.struct(parts))
        return pd.Series(pd.array(list(column), dtype=pd.ArrowDtype(kind)))
    return column


@st.composite
def vectors(draw, n):
    vector = st.lists(st.floats(-100, 100, width=32), min_size=3, max_size=3)
    as_array = draw(st.booleans())
    found = draw(cells(vector, n))
    made = [np.asarray(v, "float32") if as_array and v is not None else v for v in found]
    return pd.Series(made + [None], dtype=object).iloc[:n]


@st.composite
def index(draw, n):
    kind = draw(st.sampled_from(["range", "shuffled", "same", "words", "dates", "pairs", "floats"]))
    return {
        "range": pd.RangeIndex(n),
        "shuffled": pd.Index(np.random.default_rng(n).permutation(n) + 7),
        "same": pd.Index([3] * n),
        "words": pd.Index([f"row {i}" for i in range(n)]),
        "dates": pd.date_range("2020-01-01", periods=n),
        "pairs": pd.MultiIndex.from_arrays([[0] * n, range(n)]),
        "floats": pd.Index(np.arange(n) / 3),
    }[kind]


@st.composite
def frame(draw, n):
    """All columns that the modalities below read, and one that nobody does."""
    X = pd.DataFrame(
        {
            "age": draw(numbers(n)),
            "bmi": draw(numbers(n)),
            "sex": draw(words(n)),
            "sodium": draw(numbers(n)),
            "lactate": draw(numbers(n)),
            "course": draw(
                records(n, {"code": st.sampled_from(["hr", "ph", "ü"]), "value": number})
            ),
            "history": draw(
                records(n, {"sbp": number, "drugs": holes(st.lists(word.filter(bool), max_size=2))})
            ),
            "note": draw(words(n)),
            "film": draw(vectors(n)),
            "patient": np.arange(n) // 2,
            "other": draw(words(n)),
        }
    )
    X.index = draw(index(n))
    return X


MODALITIES = {
    "person": Tabular(["age", "bmi", "sex"]),
    "labs": Labs(["sodium", "lactate"]),
    "course": Events("course"),
    "history": Visits("history"),
    "note": Text("note", min_count=1),
    "film": Embedding("film"),
}


@st.composite
def case(draw):
    """An estimator, rows to fit and their outcomes, rows to predict."""
    name = draw(st.sampled_from(sorted(KINDS)))
    kind = getattr(ehrfuse, name)
    readable = [k for k, m in MODALITIES.items() if isinstance(m, kind._accepts)]
    chosen = draw(st.lists(st.sampled_from(readable), min_size=1, unique=True))
    n = draw(st.integers(1, 14))
    estimator = kind({k: MODALITIES[k] for k in chosen}, **KINDS[name], **SMALL)
    if draw(st.booleans()):
        estimator.set_params(groups="patient")
    if "Regressor" in name:
        y = np.array(draw(st.lists(st.floats(-50, 50, width=32), min_size=n, max_size=n)))
    elif draw(st.booleans()) and name != "TabNetClassifier":
        task = st.lists(st.sampled_from([0.0, 1.0, np.nan]), min_size=n, max_size=n)
        y = np.array([draw(task), draw(task)]).T
    else:
        labels = draw(st.sampled_from([[0, 1], ["no", "yes"], [False, True], [3, 5, 9]]))
        y = np.array(draw(st.lists(st.sampled_from(labels), min_size=n, max_size=n)))
    return estimator, draw(frame(n)), y, draw(frame(draw(st.integers(1, 9))))


def answer(estimator, X):
    """What the estimator says of every row."""
    for name in ("predict_proba", "transform", "predict"):
        if hasattr(estimator, name):
            return np.asarray(getattr(estimator, name)(X), dtype=float)
    raise AssertionError("no answer")


def or_one_sentence(call, *args):
    """The result, or None where a clear sentence was raised."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return call(*args)
    except (ValueError, TypeError) as error:
        said = str(error)
    note(said)
    assert len(said) > 20, said
    assert not INTERNAL.search(said), said
    return None


@settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
@given(case())
def test_an_answer_or_a_sentence(drawn):
    estimator, X, y, new = drawn
    note(repr(estimator))
    before = X.copy(deep=True)
    encoder = hasattr(estimator, "transform")
    fitted = or_one_sentence(estimator.fit, X) if encoder else or_one_sentence(estimator.fit, X, y)
    pd.testing.assert_frame_equal(X, before)
    if fitted is None:
        return
    for rows in (X, new):
        out = or_one_sentence(answer, fitted, rows)
        if out is None:
            continue
        assert len(out) == len(rows)
        assert np.isfinite(out).all()
        if hasattr(fitted, "predict_proba"):
            assert ((out >= 0) & (out <= 1)).all()
            width = out.shape[1]
            assert width == (2 if np.ndim(y) == 2 else len(fitted.classes_))
            if np.ndim(y) == 1:
                np.testing.assert_allclose(out.sum(1), 1, atol=1e-6)
        # The order and the names of rows say nothing, nor does who else is asked for.
        turned = rows.iloc[::-1].reset_index(drop=True)
        np.testing.assert_allclose(answer(fitted, turned)[::-1], out, atol=1e-6)
        np.testing.assert_allclose(answer(fitted, rows.iloc[:1]), out[:1], atol=1e-6)
