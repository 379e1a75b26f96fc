"""Events, Visits and EventSummary: every form of a cell, time order, statistics by hand."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.pipeline import make_pipeline

from ehrfuse import Events, EventSummary, Visits
from ehrfuse.datasets import make_ehr

KIND = pa.list_(pa.struct([("time", pa.float32()), ("code", pa.string()), ("value", pa.float32())]))


def event(time, code, value=None):
    return {"time": time, "code": code, "value": value}


CELLS = [
    [event(-5.0, "HR", 80.0), event(-1.0, "HR", 90.0), event(-3.0, "shock")],
    None,
    [],
    [event(-2.0, "BP", 100.0)],
]


def frame(cells, arrow=True, name="course"):
    if arrow:
        return pd.DataFrame({name: pd.array(cells, dtype=pd.ArrowDtype(KIND))})
    return pd.DataFrame({name: pd.Series(cells, dtype=object)})


def test_null_and_empty_differ():
    block = Events("course").fit(frame(CELLS)).transform(frame(CELLS))
    assert block.present.tolist() == [True, False, True, True]


def test_statistics_by_hand():
    table = EventSummary().fit_transform(frame(CELLS))
    row = table.iloc[0]
    assert row["course__HR__last"] == 90
    assert row["course__HR__first"] == 80
    assert row["course__HR__mean"] == 85
    assert row["course__HR__sd"] == pytest.approx(np.std([80, 90], ddof=1))
    assert row["course__HR__slope"] == pytest.approx(2.5)
    assert row["course__HR__time_since"] == 1
    assert row["course__shock__count"] == 1
    assert row["course__shock__time_since"] == 3
    assert "course__shock__last" not in table  # it never carried a value
    assert table.filter(like="count").iloc[1].tolist() == [0, 0, 0]
    assert np.isnan(table.loc[3, "course__HR__slope"])
    assert list(table) == list(EventSummary().fit(frame(CELLS)).get_feature_names_out())


def test_codes_that_few_rows_hold():
    twice = [event(-1.0, "HR", 80.0), event(-2.0, "HR", 81.0), event(-1.0, "RR", 12.0)]
    X = frame([twice, [event(-1.0, "RR", 14.0)], None])
    assert Events("course").fit(X).codes_ == ["HR", "RR"]
    assert Events("course", min_count=2).fit(X).codes_ == ["RR"]  # rows, not records
    assert all("RR" in name for name in EventSummary(min_count=2).fit(X).get_feature_names_out())
    visits = [{"time": -1.0, "dx": ["a", "b"]}, {"time": -2.0, "dx": ["a"]}]
    X = pd.DataFrame({"v": pd.Series([visits, [{"time": -1.0, "dx": ["b"]}], None], dtype=object)})
    assert Visits("v").fit(X).codes_ == ["dx:a", "dx:b"]
    assert Visits("v", min_count=2).fit(X).codes_ == ["dx:b"]
    assert Visits("v", min_count=3).fit(X).codes_ == []


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 3), st.integers(-48, 0), st.sampled_from("abc"), st.integers(-9, 9)
        ),
        max_size=40,
    )
)
def test_statistics_equal_those_of_pandas(rows):
    long = pd.DataFrame(rows, columns=["row", "time", "code", "value"]).astype({"value": float})
    cells = [
        [event(float(r.time), r.code, r.value) for r in part.itertuples()]
        for part in (long[long.row == i] for i in range(4))
    ]
    X = frame(cells)
    table = EventSummary().fit(X).transform(X)
    long = long.sort_values("time", kind="stable")
    nothing = pd.Series(np.nan, index=table.index)  # left out where no row has it
    for (row, code), part in long.groupby(["row", "code"]):
        got = {
            name: table.get(f"course__{code}__{name}", nothing)[row]
            for name in ("last", "sd", "slope")
        }
        assert got["last"] == part["value"].iloc[-1]
        sd = part["value"].std()
        assert got["sd"] == pytest.approx(sd, nan_ok=True, abs=1e-5)
        if part["time"].nunique() > 1:
            slope = np.polyfit(part["time"], part["value"], 1)[0]
            assert got["slope"] == pytest.approx(slope, abs=1e-4)
        else:
            assert np.isnan(got["slope"])


def variants():
    dict_of_arrays = {"time": np.array([-5.0, -1.0]), "code": ["HR", "HR"], "value": [80, 90.5]}
    records = [event(-5, "HR", 80), event(-1, "HR", 90.5)]
    yield "list of dicts", records
    yield "array of dicts", np.array(records, dtype=object)
    yield "tuple", tuple(records)
    yield "dict of arrays", dict_of_arrays
    yield "frame", pd.DataFrame(dict_of_arrays)
    yield "other order", records[::-1]


@pytest.mark.parametrize("cell", [pytest.param(c, id=n) for n, c in variants()])
def test_every_form_of_a_cell_is_the_same(cell):
    expected = frame([[], [event(-5.0, "HR", 80.0), event(-1.0, "HR", 90.5)]])
    expected = EventSummary().fit_transform(expected)
    cells = np.empty(2, dtype=object)
    cells[0], cells[1] = [], cell
    got = EventSummary().fit_transform(pd.DataFrame({"course": pd.Series(cells)}))
    pd.testing.assert_frame_equal(got, expected)


def test_slices_chunks_and_dictionaries_of_arrow():
    X = frame(CELLS * 3)
    expected = EventSummary().fit(X).transform(X)
    part = X.iloc[4:9]
    got = EventSummary().fit(X).transform(part)
    pd.testing.assert_frame_equal(got, expected.iloc[4:9])
    chunked = pd.concat([X.iloc[:5], X.iloc[5:]])
    pd.testing.assert_frame_equal(EventSummary().fit(X).transform(chunked), expected)
    kind = pa.list_(
        pa.struct(
            [("time", pa.float32()), ("code", pa.dictionary(pa.int32(), pa.string())),
             ("value", pa.float32())]
        )
    )  # fmt: skip
    coded = pd.DataFrame({"course": pd.array(CELLS * 3, dtype=pd.ArrowDtype(kind))})
    pd.testing.assert_frame_equal(EventSummary().fit(X).transform(coded), expected)


def test_unknown_codes_are_left_out_and_equal_times_keep_their_order():
    fitted = Events("course", stream=True).fit(frame([[event(-1.0, "HR", 80.0)]]))
    cell = [event(-1.0, "new", 1.0), event(-1.0, "HR", 70.0), event(-1.0, "HR", 75.0)]
    block = fitted.transform(frame([cell]))
    values, _ = block.ragged["value"]
    assert len(values) == 2
    assert values[0] < values[1]


def test_the_latest_events_are_kept():
    cells = [[event(float(-t), "HR", float(t)) for t in range(10)]]
    block = Events("course", max_events=3, stream=True).fit(frame(cells)).transform(frame(cells))
    time, offsets = block.ragged["time"]
    assert offsets.tolist() == [0, 3]
    np.testing.assert_allclose(time * 9, [2, 1, 0], atol=1e-6)


def test_absent_rows_have_no_events():
    fitted = Events("course", stream=True).fit(frame(CELLS))
    block = fitted.transform(frame(CELLS))
    _, offsets = block.ragged["code"]
    assert np.diff(offsets).tolist() == [3, 0, 0, 1]
    assert np.isnan(block.arrays["summary"][1]).all()


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (["a note"], "holds str of length 6; a cell must be a list of records"),
        ([[{"code": "HR", "value": 1.0}]], r"records with the fields \['code', 'value'\]"),
        ([[{"time": None, "code": "HR", "value": 1.0}]], "time of type null|time is null"),
        ([[{"time": pd.Timestamp("2020"), "code": "HR"}]], "time of type timestamp"),
        ([[{"time": float("inf"), "code": "HR"}]], "null or not finite"),
        ([[{"time": 0.0, "code": "HR", "value": float("inf")}]], "infinite value"),
        ([[1, 2]], "a list whose items are no records"),
        ([{"time": [0.0], "code": ["a", "b"]}], "arrays of unequal length"),
    ],
)
def test_cells_that_are_no_events_are_explained(cells, message):
    with pytest.raises(ValueError, match=message):
        Events("course").fit(frame(cells, arrow=False))


def test_content_of_a_wrong_cell_stays_out_of_the_message():
    with pytest.raises(ValueError, match="str of length") as caught:
        Events("course").fit(frame(["John Doe, HIV"], arrow=False))
    assert "Doe" not in str(caught.value)


def test_wrong_options_are_explained():
    with pytest.raises(ValueError, match="time_unit='years' is not known; choose one of 'h'"):
        Events("course", time_unit="years").fit(frame(CELLS))
    with pytest.raises(ValueError, match="reads nothing"):
        Events("course", summary=False).fit(frame(CELLS))
    with pytest.raises(ValueError, match=r"statistics.*median.*not known"):
        EventSummary(statistics=("median",)).fit(frame(CELLS))


def visit(time, **fields):
    return {"time": time, **fields}


def test_visits_of_numbers_and_codes():
    cells = [
        [visit(-30.0, sbp=120.0, icd=["I10", "E11"]), visit(-2.0, sbp=None, icd=[])],
        [],
        None,
        [visit(-7.0, sbp=140.0, icd=["I10"])],
    ]
    X = pd.DataFrame({"history": pd.Series(cells, dtype=object)})
    fitted = Visits("history").fit(X)
    assert fitted.numeric_fields_ == ["sbp"]
    assert fitted.codes_ == ["icd:E11", "icd:I10"]
    block = fitted.transform(X)
    assert block.present.tolist() == [True, True, False, True]
    time, offsets = block.ragged["time"]
    assert offsets.tolist() == [0, 2, 2, 2, 3]
    np.testing.assert_allclose(time * 30, [30, 2, 7], rtol=1e-6)
    code, code_offsets = block.ragged["code"]
    assert code_offsets.tolist() == [0, 2, 2, 2, 3]
    assert code.tolist() == [1, 0, 1]
    assert block.ragged["code_visit"][0].tolist() == [0, 0, 0]


def test_visits_keep_the_latest_and_their_codes():
    cells = [[visit(float(-t), icd=[f"c{t}"]) for t in range(5, 0, -1)]]
    X = pd.DataFrame({"history": pd.Series(cells, dtype=object)})
    fitted = Visits("history", max_visits=2).fit(X)
    block = fitted.transform(X)
    names = [fitted.codes_[j] for j in block.ragged["code"][0]]
    assert names == ["icd:c2", "icd:c1"]
    assert block.ragged["code_visit"][0].tolist() == [0, 1]


def test_summary_is_learned_from_training_rows_only():
    train = frame(CELLS)
    summary = EventSummary().fit(train)
    later = frame([[event(-1.0, "new", 5.0)]])
    assert not any("new" in name for name in summary.transform(later))


def test_window_means_by_hand():
    cells = [
        [event(-8.0, "HR", 60.0), event(-7.0, "HR", 70.0), event(-1.0, "HR", 90.0)],
        [event(-4.0, "HR", 50.0)],
    ]
    table = EventSummary(statistics=("last",), windows=2).fit_transform(frame(cells))
    assert list(table) == [
        f"course__HR__{name}"
        for name in (
            "last", "mean_1of2", "mean_2of2", "recent_mean", "recent_min", "recent_max",
            "last_minus_first", "last_minus_mean", "recent_minus_mean",
        )
    ]  # fmt: skip
    nan, mean = np.nan, (60 + 70 + 90) / 3
    np.testing.assert_allclose(
        table,
        [
            [90, 65, 90, 90, 90, 90, 30, 90 - mean, 90 - mean],
            [50, nan, 50, nan, nan, nan, 0, 0, nan],
        ],
        rtol=1e-5,
    )
    late = frame([[event(-99.0, "HR", 1.0), event(-1.0, "HR", 5.0), event(0.0, "HR", 3.0)]])
    fitted = EventSummary(statistics=("last",), windows=2).fit(frame(cells))
    outside = fitted.transform(late)  # what lies outside counts as the ends
    np.testing.assert_allclose(outside, [[3, 1, 4, 4, 3, 5, 2, 0, 1]], atol=1e-6)


def test_numbers_that_no_training_row_has_are_left_out():
    single = frame([[event(-1.0, "HR", 80.0)]] * 3)  # one value a row: no spread, no slope
    names = list(EventSummary().fit_transform(single))
    assert "course__HR__last" in names
    assert "course__HR__sd" not in names
    assert "course__HR__slope" not in names


def test_records_after_the_prediction_are_refused():
    fitted = Events("course").fit(frame(CELLS))
    later = frame([[event(5.0, "DEATH")]])
    for reader in (fitted.transform, Events("course").fit, EventSummary().fit):
        with pytest.raises(ValueError, match="'course' has 1 records after the prediction time"):
            reader(later)
    Events("course", now=6.0).fit(later)
    visits = pd.DataFrame({"history": pd.Series([[visit(2.0, sbp=120.0)]], dtype=object)})
    with pytest.raises(ValueError, match="after the prediction time"):
        Visits("history").fit(visits)
    Visits("history", now=40.0).fit(visits)


def test_slips_of_a_single_record_are_explained():
    cells = np.empty(1, dtype=object)
    cells[0] = {"time": -1.0, "code": "HR", "value": 80.0}
    with pytest.raises(ValueError, match="one record outside a list"):
        Events("course").fit(pd.DataFrame({"course": pd.Series(cells)}))
    words = frame([[{"time": -1.0, "code": "HR", "value": "high"}]], arrow=False)
    with pytest.raises(ValueError, match="'value' is string; it must be a number or null"):
        Events("course").fit(words)


LIST_OF_NUMBERS = pd.ArrowDtype(pa.list_(pa.float32()))


def test_summary_takes_events_alone_and_passes_on_what_trees_can_read():
    event = [{"time": -1.0, "code": "HR", "value": 80.0}]
    X = pd.DataFrame(
        {
            "vitals": [event, None] * 150,
            "empty": [[]] * 300,
            "history": [[{"time": -3.0, "length_of_stay": 2.0}]] * 300,
            "vector": [np.zeros(3)] * 300,
            "note": [f"note {i}" for i in range(300)],
            "sex": ["f", "m"] * 150,
            "age": np.arange(300.0),
            "never": np.full(300, np.nan),
        }
    )
    summary = EventSummary(["vitals"]).fit(X)
    assert summary.left_out_ == ["empty", "history", "vector", "note", "never"]
    assert list(summary.transform(X).columns[:2]) == ["sex", "age"]
    assert list(summary.transform(X).columns) == list(summary.get_feature_names_out())
    assert EventSummary().fit(X).columns_ == ["vitals", "empty"]
    kept = X[["vector"]].assign(vector=pd.Series([[0.5, 1.0]] * 300, dtype=LIST_OF_NUMBERS))
    assert EventSummary().fit(kept).left_out_ == ["vector"]
    for odd in (["HR", "RR"], (("a", 1.0),), np.array([True]), [None, 1.0], {1, 2}):
        assert "vitals" in EventSummary().fit(X.assign(vitals=[odd] * 300)).left_out_
    words = pd.Series([["HR"]] * 300, dtype=pd.ArrowDtype(pa.list_(pa.string())))
    assert EventSummary().fit(pd.DataFrame({"codes": words})).left_out_ == ["codes"]
    kinds = pd.Categorical(["lo", "hi"] * 150, categories=["lo", "hi", "no"], ordered=True)
    assert EventSummary().fit_transform(X.assign(sex=kinds))["sex"].dtype == kinds.dtype
    with pytest.raises(ValueError, match=r"X lacks the columns \['nope'\]"):
        EventSummary(["nope"]).fit(X)


def test_summary_feeds_boosting_from_a_frame_of_every_kind():
    data = make_ehr(n_samples=120, random_state=0, as_bunch=True)
    trees = HistGradientBoostingClassifier(max_iter=5, categorical_features="from_dtype")
    for X in (data.X, data.X.assign(sex=data.X["sex"].astype("string"))):
        X = X.assign(sex=X["sex"].where(np.arange(120) > 10))
        p = make_pipeline(EventSummary(), trees).fit(X, data.y).predict_proba(X)
        assert np.isfinite(p).all()
