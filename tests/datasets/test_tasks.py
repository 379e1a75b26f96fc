"""Tasks: labels and rules on candidates that can be read at a glance, and the flow table."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from ehrfuse.datasets import (
    Task,
    critical_outcome,
    icu_admission_90d,
    in_hospital_mortality,
    later_icu_stay,
    length_of_stay,
    mimic4,
    mortality_post_discharge,
    phenotyping,
    readmission_30d,
)
from ehrfuse.datasets._cohort import Rows
from ehrfuse.datasets.tasks import READY, resolve, select

NAN = float("nan")


def candidates(**columns):
    n = len(next(iter(columns.values())))
    table = {
        "subject": np.arange(n), "admission": np.arange(n), "stay": np.arange(n),
        "age": np.full(n, 60.0), "hospital_in": np.zeros(n), "hospital_out": np.full(n, 100.0),
        "icu_in": np.zeros(n), "icu_out": np.full(n, 80.0), "death": np.full(n, NAN),
        "died_in_hospital": np.zeros(n), "died_in_icu": np.zeros(n), "later_icu": np.full(n, NAN),
        "next_admission": np.full(n, NAN), "next_unplanned": np.full(n, NAN),
        "next_icu": np.full(n, NAN), "number": np.ones(n, int),
    }  # fmt: skip
    return pd.DataFrame(table | columns)


def labels(task, **columns):
    rows, y, flow = select(candidates(**columns), [task])
    return rows.tolist(), y.tolist(), flow


def test_death_at_a_landmark_needs_life_and_a_bed_at_the_landmark():
    rows, y, flow = labels(
        in_hospital_mortality(48),
        died_in_hospital=[0.0, 1.0, 1.0, NAN, 0.0, 0.0, 0.0],
        death=[NAN, 60, 40, NAN, NAN, NAN, 47.9],
        icu_out=[80, 60, 40, 80, 47, 80, 80],
        age=[60, 60, 60, 60, 60, 17, 60],
    )
    assert rows == [True, True, False, False, False, False, False]
    assert y == [0, 1]
    assert flow["excluded"].tolist() == [0, 1, 0, 3, 1]
    assert flow["rows"].tolist() == [7, 6, 6, 3, 2]


def test_first_stay_is_the_first_of_the_patient():
    columns = {"number": [1, 2, 1]}
    assert labels(in_hospital_mortality(24), **columns)[0] == [True, False, True]
    assert all(labels(in_hospital_mortality(24, first_stay=False), **columns)[0])


def test_readmission_leaves_deaths_out_and_counts_days_exactly():
    rows, y, _ = labels(
        readmission_30d(),
        next_admission=[24 * 30.0, 24 * 30 + 0.1, NAN, 5.0, 0.0],
        died_in_hospital=[0.0, 0, 0, 1, 0],
    )
    assert rows == [True, True, True, False, True]
    assert y == [1, 0, 0, 0]


def test_planned_readmissions_can_be_left_out():
    columns = {"next_admission": [100.0, 100.0], "next_unplanned": [NAN, 100.0]}
    assert labels(readmission_30d(), **columns)[1] == [1, 1]
    assert labels(readmission_30d(planned=False), **columns)[1] == [0, 1]


def test_after_discharge():
    assert labels(icu_admission_90d(), next_icu=[24 * 90.0, 24 * 91.0, NAN])[1] == [1, 0, 0]
    assert labels(mortality_post_discharge(), death=[24 * 180.0, 24 * 181.0, NAN])[1] == [1, 0, 0]


def test_a_later_stay_is_undefined_for_who_dies_in_this_one():
    rows, y, _ = labels(
        later_icu_stay(), later_icu=[90, NAN, NAN], died_in_icu=[0, 0, 1], death=[NAN, NAN, 70.0]
    )
    assert rows == [True, True, False]
    assert y == [1, 0]


def test_length_of_stay_in_days_or_above_a_threshold():
    columns = {"icu_out": [48.0, 24 * 8.0]}
    assert labels(length_of_stay(), **columns)[1] == [2.0, 8.0]
    assert labels(length_of_stay(longer_than=7), **columns)[1] == [0, 1]


def test_critical_outcome():
    columns = {
        "icu_in": [11.0, 13.0, NAN, 0.5, NAN], "death": [NAN, NAN, 200.0, NAN, NAN],
        "died_in_hospital": [0.0, 0, 1, 0, 0],
    }  # fmt: skip
    rows, y, _ = labels(critical_outcome(), **columns)
    assert rows == [True, True, True, False, True]
    assert y == [1, 0, 1, 0]
    assert labels(critical_outcome(death_within=12), **columns)[1] == [1, 0, 0, 0]


def test_phenotypes_are_counted_on_the_training_part_only():
    codes = [["A", "B"], ["A"], ["B", "B", "B"], ["C"], ["C"], ["C"], []]
    task = phenotyping(k=2, train=[0, 1, 2])
    rows, y, _ = select(candidates(codes=codes), [task])
    assert list(y.columns) == ["A", "B"]  # C is the most frequent, but not in training
    assert y.to_numpy().tolist() == [[1, 1], [1, 0], [0, 1], [0, 0], [0, 0], [0, 0]]
    assert rows.tolist() == [True] * 6 + [False]  # nobody coded the last one
    assert task.train(candidates(codes=codes)).tolist() == [True] * 3 + [False] * 4


def test_held_out_codes_do_not_move_the_choice():
    rng = np.random.default_rng(0)
    codes = [list(rng.choice(list("ABCDEFGH"), 3)) for _ in range(200)]
    task = phenotyping(k=3)
    before = candidates(codes=codes)
    train = task.train(before).to_numpy()
    assert 0.6 < train.mean() < 0.95
    after = before.copy()
    after["codes"] = [c if t else ["Z"] for c, t in zip(codes, train, strict=True)]
    assert list(select(before, [task])[1]) == list(select(after, [task])[1])


def test_several_tasks_have_nan_where_one_is_undefined():
    tasks = resolve([in_hospital_mortality(24, first_stay=False), later_icu_stay()])
    frame = candidates(died_in_hospital=[0.0, 1.0, NAN], died_in_icu=[0.0, 1.0, 0.0])
    rows, y, flow = select(frame, tasks)
    assert rows.all()
    np.testing.assert_array_equal(y.to_numpy(), [[0, 0], [1, NAN], [NAN, 0]])
    assert flow["task"].unique().tolist() == ["in_hospital_mortality", "later_icu_stay"]


def test_a_task_of_ones_own():
    task = Task(
        name="long", unit="icu", hours=24, label=lambda c: (c["icu_out"] > 100).astype(float)
    )
    assert labels(task, icu_out=[80.0, 120.0])[1] == [0, 1]


def test_names_give_the_defaults_and_a_source_may_have_others():
    assert resolve("readmission_30d")[0].unit == "discharge"
    assert resolve("in_hospital_mortality", {"in_hospital_mortality": {"hours": 24}})[0].hours == 24
    assert all(resolve(name)[0].name == name for name in READY)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("sepsis", "task='sepsis' is not known"),
        ([], "task is empty"),
        (["in_hospital_mortality", "readmission_30d"], "different times"),
        ([in_hospital_mortality(24), in_hospital_mortality(48)], "different times"),
    ],
)
def test_what_cannot_be_asked(given, words):
    with pytest.raises(ValueError, match=words):
        resolve(given)


def test_bad_tasks():
    with pytest.raises(TypeError, match="holds a int"):
        resolve([3])
    with pytest.raises(ValueError, match="unit="):
        in_hospital_mortality(unit="discharge")
    with pytest.raises(ValueError, match="hours=-1"):
        length_of_stay(hours=-1)
    with pytest.raises(ValueError, match="made at discharge"):
        Task("x", "discharge", 24, len)


def test_a_stay_that_outlasts_its_discharge_does_not_see_its_own_codes(shared_data):
    """Discharge recorded before the patient leaves the unit: the admission is not past yet."""
    with mimic4.open_tables(shared_data / "mimic-iv-demo-2.2", mimic4.SCHEMA, "512MB", 1) as tables:
        source = mimic4.Mimic4(tables)
        candidates = source.candidates("icu")
        early = (candidates["hospital_out"] < candidates["icu_out"]).to_numpy()
        assert early.sum() > 10
        for hours in (24, 48, 72):
            rows = Rows(source, candidates.reset_index(drop=True), "icu", hours)
            past = source._past(rows)
            own = rows.frame["admission"].to_numpy()[past["row"]]
            assert not (past["id"].to_numpy() == own).any()


def test_nobody_dies_in_hospital_after_leaving_it(shared_data):
    with mimic4.open_tables(shared_data / "mimic-iv-demo-2.2", mimic4.SCHEMA, "512MB", 1) as tables:
        dead = mimic4.Mimic4(tables).candidates("icu").query("died_in_hospital == 1")
    assert len(dead) > 10
    assert (dead["death"] <= dead["hospital_out"]).all()


def test_two_windows_of_one_task_need_names_of_their_own():
    pair = [readmission_30d(30), readmission_30d(7)]
    with pytest.raises(ValueError, match="Several tasks have the name 'readmission_30d'"):
        resolve(pair)
    other = dataclasses.replace(pair[1], name="readmission_7d")
    assert [task.name for task in resolve([pair[0], other])] == ["readmission_30d", other.name]
