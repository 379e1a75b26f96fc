"""Events cut into visits, in the networks and as frames, and the way back."""

import numpy as np
import pandas as pd
import pytest

from ehrfuse import Events, EventsToVisits, VisitsToEvents
from ehrfuse.datasets import make_ehr, read_parquet, write_parquet
from ehrfuse.modalities.sequences import EventVisits

STAY = [
    {"time": -7.5, "code": "HR", "value": 80.0},
    {"time": -7.1, "code": "HR", "value": 90.0},
    {"time": -7.1, "code": "ward", "value": None},
    {"time": -2.0, "code": "MAP", "value": 65.0},
    {"time": 0.0, "code": "HR", "value": 70.0},
]


def frame(*cells):
    return pd.DataFrame({"events": list(cells)})


def read(modality, X):
    block = modality.fit(X).transform(X)
    return block, block.ragged["time"], block.ragged["numbers"]


def test_bins_by_hand():
    modality = EventVisits("events", bin=2.0)
    block, (age, offsets), (numbers, _) = read(modality, frame(STAY, None, []))
    assert offsets.tolist() == [0, 3, 3, 3]
    # Bins end at 0, -2, -4, -6: what was at -7.5 and -7.1 is known by -6.
    assert age.tolist() == [6, 2, 0]
    center, scale = modality.value_scale_
    value = numbers * scale + center
    assert modality.codes_ == ["HR", "MAP", "ward"]
    np.testing.assert_allclose(value[:, 0], [85, np.nan, 70])
    np.testing.assert_allclose(value[:, 1], [np.nan, 65, np.nan])
    np.testing.assert_allclose(numbers[:, 2], [1, np.nan, np.nan])  # no values: 1 where it happened
    assert block.present.tolist() == [True, False, True]


def test_the_latest_bins_are_kept():
    _, (age, offsets), _ = read(EventVisits("events", max_visits=2), frame(STAY, STAY[:2]))
    assert age.tolist() == [2, 0, 7]
    assert offsets.tolist() == [0, 2, 3]


def test_minutes_fall_into_their_bin():
    """Times such as 20 minutes are not exact in float32, and 20 minutes before is not 19."""
    times = -np.arange(0, 300, 20) / 60
    cell = [{"time": float(np.float32(t)), "code": "HR", "value": 1.0} for t in times]
    _, (age, _), _ = read(EventVisits("events", bin=1 / 3), frame(cell, cell))
    np.testing.assert_allclose(age[:15], np.arange(14, -1, -1) / 3, atol=1e-5)


def test_absent_rows_have_no_visits():
    X = make_ehr(n_samples=40, modalities=["course"], random_state=0)[0]
    modality = EventVisits("events", bin=6.0)
    block = modality.fit(X).transform(X)
    assert (block.length[~block.present] == 0).all()
    never = X.assign(events=None)
    block = EventVisits("events").fit(never).transform(X)
    assert not block.present.any()
    assert (block.length == 0).all()


def test_it_takes_the_parameters_of_events():
    plain = Events("events", windows=2, max_codes=3)
    assert set(plain.get_params()) == set(EventVisits("events").get_params()) - {
        "bin",
        "max_visits",
    }
    with pytest.raises(ValueError, match="bin=0"):
        EventVisits("events", bin=0).fit(frame(STAY))


# ---------------------------------------------------------------- converters


def test_events_to_visits_units():
    cut = EventsToVisits("events", bin=24.0, visit_unit="d")
    days = [{"time": -30.0, "code": "HR", "value": 60.0}, {"time": -1.0, "code": "dx:I50"}]
    found = cut.fit_transform(frame(days))["events"][0]
    assert found == [{"time": -1.0, "HR": 60.0, "dx": []}, {"time": 0.0, "HR": None, "dx": ["I50"]}]


def test_null_empty_and_unknown_codes():
    cut = EventsToVisits("events").fit(frame(STAY))
    assert cut.numbers_ == ["HR", "MAP"]
    assert cut.fields_ == {"codes": ["ward"]}
    other = [{"time": -1.0, "code": "unseen", "value": 3.0}]
    found = cut.transform(frame(None, [], other))["events"]
    assert found.isna().tolist() == [True, False, False]
    assert found[1] == []
    assert found[2] == []


def test_cap_keeps_the_latest():
    found = EventsToVisits("events", max_visits=1).fit_transform(frame(STAY))["events"][0]
    assert [visit["time"] for visit in found] == [0.0]
    events = VisitsToEvents("events", max_events=2).fit_transform(
        EventsToVisits("events").fit_transform(frame(STAY))
    )["events"][0]
    assert [event["time"] for event in events] == [-2.0, 0.0]


def visits():
    return pd.DataFrame({"visits": [
        [{"time": -9.0, "sbp": 120.0, "dx": ["I10", "E11"], "codes": ["ward"]},
         {"time": -2.0, "sbp": None, "dx": [], "codes": []},
         {"time": 0.0, "sbp": 131.0, "dx": ["I10"], "codes": []}],
        None,
        [],
    ]})  # fmt: skip


def test_there_and_back():
    """A visit in which nothing was noted leaves no event; all else comes back."""
    X = visits()
    back = EventsToVisits("visits", time_unit="d").fit_transform(
        VisitsToEvents("visits").fit_transform(X)
    )["visits"]
    expected = [dict(v, dx=sorted(v["dx"])) for v in X["visits"][0] if v["sbp"] or v["dx"]]
    found = [{key: visit[key] for key in expected[0]} for visit in back[0]]
    assert [dict(v, dx=sorted(v["dx"])) for v in found] == expected
    assert back.isna().tolist() == [False, True, False]
    assert back[2] == []


def test_units_there_and_back():
    events = VisitsToEvents("visits", time_unit="h", visit_unit="d").fit_transform(visits())
    assert min(event["time"] for event in events["visits"][0]) == -9 * 24
    cut = EventsToVisits("visits", bin=24.0, time_unit="h", visit_unit="d")
    assert [v["time"] for v in cut.fit_transform(events)["visits"][0]] == [-9.0, 0.0]


def test_simulated_histories_survive(tmp_path):
    X = make_ehr(n_samples=60, modalities=["history"], random_state=0)[0]
    events = VisitsToEvents("visits").fit_transform(X)
    write_parquet(events, tmp_path / "x.parquet")
    back = EventsToVisits("visits", time_unit="d", bin=1e-3).fit_transform(
        read_parquet(tmp_path / "x.parquet")
    )["visits"]
    numbers = [name for name in X["visits"].dropna().iloc[0][0] if name != "time"]
    for before, after in zip(X["visits"], back, strict=True):
        if isinstance(before, list):
            for name in numbers:
                values = [
                    v[name] for v in before if v[name] is not None and not isinstance(v[name], list)
                ]
                kept = [v.get(name) for v in after if not isinstance(v.get(name), list)]
                np.testing.assert_allclose([v for v in kept if v is not None], values, rtol=1e-5)


def test_other_rows_do_not_matter():
    """Codes come from the rows of fit; a converter is a plain transformer."""
    cut = EventsToVisits("events").fit(frame(STAY))
    alone = cut.transform(frame(STAY))["events"][0]
    assert cut.transform(frame(STAY[:1], STAY))["events"][1] == alone
    assert list(cut.get_feature_names_out()) == ["events"]
    with pytest.raises(ValueError, match="no column 'labs'"):
        EventsToVisits("labs").fit(frame(STAY))
    with pytest.raises(ValueError, match="time_unit"):
        EventsToVisits("events", time_unit="s").fit(frame(STAY))
    with pytest.raises(ValueError, match="after the prediction"):
        EventsToVisits("events", now=-3.0).fit(frame(STAY))
