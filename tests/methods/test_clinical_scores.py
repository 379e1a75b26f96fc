"""Bedside scores: points as published, holes, probabilities."""

import numpy as np
import pandas as pd
import pytest

from ehrfuse import ClinicalScoreClassifier
from ehrfuse.methods.clinical_scores import charlson_points


def row(**parts):
    return pd.DataFrame({name: [value] for name, value in parts.items()})


@pytest.mark.parametrize(
    ("days", "points"),
    [(0.2, 0), (1, 1), (2.5, 2), (3, 3), (4, 4), (6.9, 4), (7, 5), (13, 5), (14, 7), (99, 7)],
)
def test_lace_length_of_stay(days, points):
    X = row(length_of_stay=days, acute=0, charlson=0, emergency_visits=0)
    assert ClinicalScoreClassifier("lace").points(X)[0] == points


def test_lace_parts():
    X = row(length_of_stay=0, acute=1, charlson=3, emergency_visits=2)
    assert ClinicalScoreClassifier("lace").points(X)[0] == 3 + 3 + 2
    X = row(length_of_stay=20, acute=True, charlson=11, emergency_visits=9)
    assert ClinicalScoreClassifier("lace").points(X)[0] == 19


def test_hospital_parts():
    best = row(hemoglobin=14, oncology=0, sodium=140, procedure=0, acute=0, admissions=0,
               length_of_stay=4.9)  # fmt: skip
    worst = row(hemoglobin=9, oncology=1, sodium=130, procedure=1, acute=1, admissions=6,
                length_of_stay=5)  # fmt: skip
    clf = ClinicalScoreClassifier("hospital")
    assert clf.points(best)[0] == 0
    assert clf.points(worst)[0] == 13
    assert clf.points(best.assign(admissions=5))[0] == 2
    assert clf.points(best.assign(hemoglobin=12.0, sodium=135.0))[0] == 0


def test_comorbidities():
    assert charlson_points() == 0
    assert charlson_points(["410.71"], ["I21.4"]) == 1  # the same disease once
    assert charlson_points(["4280"], ["C78.0"]) == 2 + 6
    assert charlson_points(["25000"]) == 1
    assert charlson_points(["25040"]) == 2
    assert charlson_points(codes_10=["N18.6", "F03.90"]) == 4 + 3
    assert charlson_points(["V5861"]) == 0


def test_probabilities_holes_and_names():
    rng = np.random.default_rng(0)
    X = pd.DataFrame({"SOFA": rng.integers(0, 20, 200).astype(float)})
    y = np.where(rng.random(200) < X["SOFA"] / 20, "dead", "alive")
    X.loc[:9, "SOFA"] = np.nan
    clf = ClinicalScoreClassifier("column", columns={"score": "SOFA"}).fit(X, y)
    proba = clf.predict_proba(X)
    assert (proba[:10, 1] == np.mean(y == "dead")).all()
    order = X["SOFA"][10:].argsort()
    assert (np.diff(proba[10:, 1][order]) >= 0).all()
    assert set(clf.predict(X)) == {"alive", "dead"}
    with pytest.raises(ValueError, match="needs the columns"):
        ClinicalScoreClassifier("lace").fit(X, y)
    with pytest.raises(ValueError, match="score='saps' is not known"):
        ClinicalScoreClassifier("saps").points(X)
    with pytest.raises(ValueError, match="needs two"):
        clf.fit(X, np.zeros(200))
