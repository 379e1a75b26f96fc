"""The simulated prenatal cohort: its tasks, its holes, and what may not be seen."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from ehrfuse.datasets import make_prenatal
from ehrfuse.datasets.prenatal import LABS, ROUTINE, TASKS


@pytest.fixture(scope="module")
def cohorts():
    return {task: make_prenatal(400, task=task, random_state=0, as_bunch=True) for task in TASKS}


def visits_of(data):
    rows = data.X["visits"].explode().dropna()
    return pd.DataFrame(rows.tolist(), index=rows.index)


def test_one_seed_one_cohort(cohorts):
    again = make_prenatal(400, task="diabetes", random_state=0)[0]
    pd.testing.assert_frame_equal(again, cohorts["diabetes"].X)
    other = make_prenatal(400, task="diabetes", random_state=1)[0]
    assert not other["bmi"].equals(again["bmi"])
    # The same women for every task.
    assert cohorts["hypertension"].X["bmi"].equals(cohorts["diabetes"].X["bmi"])


@pytest.mark.parametrize(("task", "until"), [("diabetes", 24), ("hypertension", 28)])
def test_nothing_after_the_prediction(cohorts, task, until):
    assert visits_of(cohorts[task])["time"].max() <= until
    assert 0.1 < cohorts[task].y.mean() < 0.35


def test_times_rise_and_fields_are_known(cohorts):
    data = cohorts["weekly_risk"]
    table = visits_of(data)
    assert set(table) == {"time", *ROUTINE, *LABS}
    steps = table["time"].diff()[table.index.to_series().diff().eq(0).to_numpy()]
    assert (steps >= 0).all()
    assert table["time"].between(6, 42).all()


def test_holes_tell_of_risk(cohorts):
    """Who is at risk of diabetes has glucose taken more often; the routine is hardly missing."""
    data = cohorts["diabetes"]
    taken = visits_of(data)["glucose"].notna().groupby(level=0).mean()
    risk = data.risk["diabetes_risk"].to_numpy()[taken.index]
    assert np.corrcoef(taken, risk)[0, 1] > 0.3
    assert visits_of(data)[list(ROUTINE)].notna().mean().min() > 0.9


def test_risk_shows_in_the_values(cohorts):
    data = cohorts["hypertension"]
    assert roc_auc_score(data.y, data.risk["hypertension_risk"]) > 0.75
    table = visits_of(data)
    late = table[table["time"] > 22].groupby(level=0)["sbp"].mean()
    assert roc_auc_score(data.y[late.index], late.fillna(late.mean())) > 0.55


def test_weekly_rows(cohorts):
    """One row per visit, its history up to that visit, none after the diagnosis."""
    data = cohorts["weekly_risk"]
    last = visits_of(data)["time"].groupby(level=0).max()
    assert last.min() >= 16
    by_woman = pd.DataFrame({"woman": data.groups, "last": last.to_numpy(), "y": data.y})
    assert (by_woman.groupby("woman")["last"].diff().dropna() >= 0).all()
    lengths = data.X["visits"].list.len().groupby(data.groups).diff().dropna()
    assert (lengths == 1).all()
    positive = by_woman.groupby("woman")["y"].apply(lambda y: y.is_monotonic_increasing)
    assert positive.all()  # within four weeks of a diagnosis all rows are positive
    assert 0 < data.y.mean() < 0.15


def test_last_visit_is_the_outcome_and_not_an_input(cohorts):
    data = cohorts["outcome"]
    assert list(data.y) == list(ROUTINE)
    assert data.y.notna().all(axis=None)
    whole = make_prenatal(400, task="weekly_risk", random_state=0, as_bunch=True)
    assert len(data.X) <= 400
    assert (data.X["visits"].list.len() >= 1).all()
    for row in range(5):
        measured = [v["weight"] for v in data.X["visits"].iloc[row]]
        assert data.y["weight"].iloc[row] not in measured
    assert whole.description


def test_bad_options():
    with pytest.raises(ValueError, match="task='twins'"):
        make_prenatal(10, task="twins")
    with pytest.raises(ValueError, match="n_samples=0"):
        make_prenatal(0)
