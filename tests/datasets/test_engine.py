"""Nested columns survive Parquet, and long arrays become an events column."""

import datetime
import os

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ehrfuse.datasets import read_parquet, write_parquet
from ehrfuse.datasets._engine import EVENTS_TYPE, events_series


def roundtrip(X, folder, columns=None):
    write_parquet(X, folder / "x.parquet")
    return read_parquet(folder / "x.parquet", columns)


def stream(seed=0, n_rows=6):
    rng = np.random.default_rng(seed)
    n_events = 20
    row = rng.choice([0, 1, 4], n_events)
    value = np.where(rng.random(n_events) < 0.3, np.nan, rng.normal(size=n_events))
    code = rng.choice(["HR", "MAP", "Lactate"], n_events)
    present = np.array([True, True, True, False, True, False])[:n_rows]
    return events_series(
        row, rng.normal(size=n_events), code, value, n_rows, present, name="events"
    )


# ---------------------------------------------------------------- Parquet


def test_roundtrip_of_a_frame_with_every_kind_of_column(tmp_path):
    days = pd.date_range("2020-01-01", periods=6).as_unit("us")
    visits = pd.array(
        [[{"time": -1.0, "sbp": 120.0, "codes": ["a"]}], [], None, None, [], []],
        dtype=pd.ArrowDtype(
            pa.list_(
                pa.struct(
                    [
                        ("time", pa.float32()),
                        ("sbp", pa.float32()),
                        ("codes", pa.list_(pa.string())),
                    ]
                )
            )
        ),
    )
    X = pd.DataFrame(
        {
            "age": [1.5, np.nan, 3, 4, 5, 6],
            "count": pd.array([1, None, 3, 4, 5, 6], dtype="Int16"),
            "small": np.arange(6, dtype=np.uint8),
            "flag": [True, False, True, True, False, True],
            "sex": pd.Categorical(["F", None, "M", "M", "F", "F"], categories=["M", "F", "X"]),
            "note": ["long", None, "", "text", "x", "y"],
            "day": days,
            "backed": pd.array([1, None, 3, 4, 5, 6], dtype=pd.ArrowDtype(pa.int32())),
            "seconds": pd.array(
                [datetime.datetime(2020, 1, 1)] * 6, dtype=pd.ArrowDtype(pa.timestamp("us", "UTC"))
            ),
            "events": stream(),
            "visits": visits,
        }
    )
    X.index = pd.Index([7, 7, 3, 1, 0, 2], name="RecordID")
    X["events"] = stream().set_axis(X.index)
    back = roundtrip(X, tmp_path)
    pd.testing.assert_frame_equal(back, X)
    assert back["events"].isna().tolist() == [False, False, False, True, False, True]
    assert back["events"].dtype.pyarrow_dtype == EVENTS_TYPE
    assert back["visits"].dtype == X["visits"].dtype  # its items are not called "element"
    assert back["visits"].iloc[0] == [{"time": -1.0, "sbp": 120.0, "codes": ["a"]}]
    assert back["visits"].iloc[1] == []


def test_plain_pandas_opens_our_files(tmp_path):
    X = pd.DataFrame({"events": stream(), "y": range(6)})
    write_parquet(X, tmp_path / "x.parquet")
    plain = pd.read_parquet(tmp_path / "x.parquet")
    assert plain["y"].tolist() == list(range(6))
    assert plain["events"].isna().tolist() == X["events"].isna().tolist()
    assert list(plain["events"][2]) == []


def test_files_of_pandas_whose_own_reader_may_refuse_them(tmp_path):
    X = pd.DataFrame({"y": range(6)}, index=pd.Index(list("abcdef"), name="id"))
    X["events"] = stream().set_axis(X.index)
    X.to_parquet(tmp_path / "x.parquet")
    back = read_parquet(tmp_path / "x.parquet")
    assert back["events"].isna().equals(X["events"].isna())
    assert back["events"].dropna().tolist() == X["events"].dropna().tolist()
    assert back.index.equals(X.index)


def test_files_without_pandas_metadata(tmp_path):
    cells = pa.array([[{"time": 1.0}], None, []])
    pq.write_table(pa.table({"visits": cells}), tmp_path / "x.parquet")
    back = read_parquet(tmp_path / "x.parquet")
    assert back.index.equals(pd.RangeIndex(3))
    assert back["visits"].isna().tolist() == [False, True, False]


def test_object_cells_become_arrow_and_missing_numbers_null(tmp_path):
    cells = [[{"time": -2.0, "code": "HR", "value": np.nan}], [], None]
    X = pd.DataFrame({"events": pd.Series(cells, dtype=object)})
    back = roundtrip(X, tmp_path)
    assert isinstance(back["events"].dtype, pd.ArrowDtype)
    assert back["events"].isna().tolist() == [False, False, True]
    assert back["events"][0] == [{"time": -2.0, "code": "HR", "value": None}]
    again = roundtrip(back, tmp_path)
    pd.testing.assert_frame_equal(again, back)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 2, 2)])
@pytest.mark.parametrize("dtype", ["float32", "uint8", "float64"])
def test_array_cells(tmp_path, shape, dtype):
    rng = np.random.default_rng(0)
    cells = [rng.integers(0, 9, shape).astype(dtype), None, np.zeros(shape, dtype)]
    X = pd.DataFrame({"film": pd.Series(cells, dtype=object, index=[3, 3, 1])})
    kept = [None if c is None else c.copy() for c in cells]
    back = roundtrip(X, tmp_path)
    assert back.index.tolist() == [3, 3, 1]
    assert back["film"].isna().tolist() == [False, True, False]
    for i in (0, 2):
        cell = back["film"].iloc[i]
        assert cell.shape == shape
        assert cell.dtype == dtype
        np.testing.assert_array_equal(cell, kept[i])
        assert X["film"].iloc[i].shape == shape  # the caller's frame is as it was


def test_columns_are_chosen_and_ordered(tmp_path):
    X = pd.DataFrame({"a": range(6), "events": stream(), "b": list("uvwxyz")})
    X = X.set_axis(list("klmnop"))
    X["events"] = stream().set_axis(X.index)
    pd.testing.assert_frame_equal(roundtrip(X, tmp_path, ["b", "events"]), X[["b", "events"]])
    pd.testing.assert_frame_equal(roundtrip(X, tmp_path, ["events"]), X[["events"]])
    pd.testing.assert_frame_equal(roundtrip(X, tmp_path, ["a"]), X[["a"]])


def test_a_slice_is_written_compactly(tmp_path):
    X = pd.DataFrame({"events": stream()})
    back = roundtrip(X.iloc[3:5], tmp_path)
    pd.testing.assert_frame_equal(back, X.iloc[3:5])


def test_empty_frame(tmp_path):
    X = pd.DataFrame({"a": [1.0], "events": stream(n_rows=6)[:1]}).iloc[:0]
    pd.testing.assert_frame_equal(roundtrip(X, tmp_path), X)


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path, monkeypatch):
    path = tmp_path / "x.parquet"
    write_parquet(pd.DataFrame({"a": [1]}), path)

    def fail(table, where, **options):
        where.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(pq, "write_table", fail)
    with pytest.raises(OSError, match="disk full"):
        write_parquet(pd.DataFrame({"a": [2]}), path)
    monkeypatch.undo()
    assert read_parquet(path)["a"].tolist() == [1]
    assert os.listdir(tmp_path) == ["x.parquet"]


def test_bad_frames(tmp_path):
    path = tmp_path / "x.parquet"
    with pytest.raises(TypeError, match="takes a pandas DataFrame"):
        write_parquet({"a": [1]}, path)
    with pytest.raises(TypeError, match=r"\[3\] are not strings"):
        write_parquet(pd.DataFrame({3: [1]}), path)
    with pytest.raises(ValueError, match=r"\['a'\] occur more than once"):
        write_parquet(pd.DataFrame([[1, 2]], columns=["a", "a"]), path)
    with pytest.raises(ValueError, match="Column 'mixed' holds cells that Parquet cannot take"):
        write_parquet(pd.DataFrame({"a": [1, 2], "mixed": [[{"time": 1.0}], 3.0]}), path)
    ragged = pd.Series([np.zeros((2, 2)), np.zeros((3, 2))], dtype=object)
    with pytest.raises(ValueError, match="Column 'film' mixes arrays of shapes"):
        write_parquet(pd.DataFrame({"film": ragged}), path)
    assert os.listdir(tmp_path) == []


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="No file at"):
        read_parquet(tmp_path / "absent.parquet")
    (tmp_path / "text.parquet").write_text("not parquet")
    with pytest.raises(ValueError, match="not a readable Parquet file"):
        read_parquet(tmp_path / "text.parquet")
    write_parquet(pd.DataFrame({"a": [1]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"has no columns \['b'\]; it has 'a'"):
        read_parquet(tmp_path / "x.parquet", ["a", "b"])
    with pytest.raises(TypeError, match="one string"):
        read_parquet(tmp_path / "x.parquet", "a")


EVENT = st.fixed_dictionaries(
    {
        "time": st.floats(-100, 0, width=32),
        "code": st.sampled_from(["HR", "MAP", "", "Ünit"]) | st.none(),
        "value": st.floats(-1e6, 1e6, width=32) | st.none(),
    }
)


@settings(max_examples=60, deadline=None)
@given(cells=st.lists(st.none() | st.lists(EVENT, max_size=4), max_size=8))
def test_any_stream_survives(cells, tmp_path_factory):
    column = pd.Series(pd.array(cells, dtype=pd.ArrowDtype(EVENTS_TYPE)))
    back = roundtrip(pd.DataFrame({"events": column}), tmp_path_factory.mktemp("any"))["events"]
    assert back.dtype == column.dtype
    assert [None if cell is pd.NA else cell for cell in back] == cells


# ---------------------------------------------------------------- long arrays to cells


def by_hand(row, time, code, value, n_rows):
    cells = [[] for _ in range(n_rows)]
    for i in sorted(range(len(row)), key=lambda i: time[i]):
        number = None if np.isnan(value[i]) else float(np.float32(value[i]))
        event = {"time": float(np.float32(time[i])), "code": code[i], "value": number}
        cells[row[i]].append(event)
    return cells


@pytest.mark.parametrize("seed", range(5))
def test_events_series_equals_a_loop(seed):
    rng = np.random.default_rng(seed)
    row = rng.integers(0, 7, 60)
    time = rng.integers(-5, 0, 60)  # many ties: they stay in the order given
    code = rng.choice(["HR", "MAP"], 60)
    value = np.where(rng.random(60) < 0.2, np.nan, rng.normal(size=60))
    column = events_series(row, time, code, value, 9, index=list("abcdefghi"), name="e")
    expected = [cell or None for cell in by_hand(row, time, code, value, 9)]
    assert [None if cell is pd.NA else cell for cell in column] == expected
    assert column.index.tolist() == list("abcdefghi")
    assert column.name == "e"
    assert column.dtype.pyarrow_dtype == EVENTS_TYPE


def test_present_tells_empty_from_null():
    column = events_series([1], [0.0], ["HR"], [1.0], 4, present=[True, True, False, True])
    assert column.isna().tolist() == [False, False, True, False]
    assert column[0] == []
    assert column[3] == []


def test_categories_become_the_dictionary_in_their_order():
    code = pd.Categorical(["b", None], categories=["c", "b", "a"])
    column = events_series([0, 0], [0, 1], code, [1, 2], 1)
    flat = column.array.__arrow_array__().combine_chunks().flatten()
    assert flat.field("code").dictionary.to_pylist() == ["c", "b", "a"]
    assert flat.field("code").to_pylist() == ["b", None]


def test_no_observations_at_all():
    column = events_series([], [], [], [], 3, present=[True, False, True])
    assert column.isna().tolist() == [False, True, False]
    assert column.dtype.pyarrow_dtype == EVENTS_TYPE


def test_arguments_are_not_modified():
    row, time, value = np.array([1, 0]), np.array([2.0, 1.0]), np.array([5.0, np.nan])
    events_series(row, time, np.array(["a", "b"]), value, 2)
    assert row.tolist() == [1, 0]
    assert time.tolist() == [2.0, 1.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0], [0.0, 1.0], ["a"], [1.0], 1), "have 1, 2, 1 and 1 items"),
        (([2], [0.0], ["a"], [1.0], 2), "with n_rows=2 only 0 to 1 are allowed"),
        (([-1], [0.0], ["a"], [1.0], 2), "numbers from -1 to -1"),
        (([0], [np.nan], ["a"], [1.0], 2), "1 times are not finite"),
        (([0], [0.0], ["a"], [1.0], 2, [False, True]), "1 rows have events though present"),
        (([0], [0.0], ["a"], [1.0], 2, [True]), r"present has shape \(1,\)"),
    ],
)
def test_bad_long_tables(arguments, message):
    with pytest.raises(ValueError, match=message):
        events_series(*arguments)
