"""save and load: every estimator comes back equal to the bit, and nothing that stands in a cell."""

import inspect
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny_models
from checks import fit, outputs
from sklearn.base import BaseEstimator, clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import ColumnTransformer, make_column_selector
from sklearn.ensemble import (
    HistGradientBoostingClassifier,
    RandomForestClassifier,
    StackingClassifier,
)
from sklearn.impute import SimpleImputer
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import TunedThresholdClassifierCV
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.utils import Bunch
from test_common import NO_PAIR, SMALL, estimators

import ehrfuse
from ehrfuse import (
    ClinicalScoreClassifier,
    ClipEHRAligner,
    Embedding,
    Events,
    EventSummary,
    EventsToVisits,
    FusionClassifier,
    KnowledgeAugmentedRiskModel,
    KnowledgeGraph,
    KnowledgeRetriever,
    Labs,
    LabTextifier,
    MaskedLabPretrainer,
    MEDFuseClassifier,
    MMNARFusionClassifier,
    NoteSectionizer,
    RAPTPretrainer,
    Rectifier,
    TabNetClassifier,
    TabNetPretrainer,
    Tabular,
    Text,
    VisitGAN,
    VisitsToEvents,
)

FAST = {"d_model": 8, "n_members": 2, "max_epochs": 1, "random_state": 0, "device": "cpu"}
SECRET = "Zebediah Quillfeather of Ormskirk swallowed xylophone"
TREES = HistGradientBoostingClassifier(max_iter=3, random_state=0)


@pytest.fixture(scope="module")
def cohort():
    """A cohort in whose free text a name stands once."""
    data = make_ehr_with_a_secret(72)
    data.X["history_text"] = data.X["note"]
    return data


def make_ehr_with_a_secret(n):
    data = ehrfuse.datasets.make_ehr(n, missing="mnar", random_state=0, as_bunch=True)
    row = int(np.flatnonzero(data.X["note"].notna())[3])
    data.X["note"] = data.X["note"].astype(object)
    data.X.iloc[row, data.X.columns.get_loc("note")] += f" {SECRET}."
    return data


def parts(cohort, *names):
    return {name: cohort.modalities[name] for name in names}


def graph():
    table = pd.DataFrame({
        "head": ["sepsis", "fever", "sepsis", "cough"],
        "relation": ["causes", "suggests", "treated_by", "suggests"],
        "tail": ["fever", "sepsis", "fluids", "fever"],
        "date": ["2001", None, "2010-05-01", None],
        "evidence": ["pm1", "pm2", "pm3", "pm4"],
    })  # fmt: skip
    return KnowledgeGraph.from_triples(table)


def small(kind, cohort):
    """A public estimator on all the modalities that it reads."""
    known = inspect.signature(kind).parameters
    options = {key: value for key, value in (SMALL | FAST).items() if key in known}
    return kind({n: m for n, m in cohort.modalities.items() if isinstance(m, kind._accepts)},
                **options)  # fmt: skip


def numbers_of(X):
    return X[["age", "heart_rate"]].fillna(0.0)


def risk_model(cohort, **options):
    chosen = parts(cohort, "vitals", "course", "history", "note")
    options = {"n_splits": 2, "random_state": 0, "groups": "subject_id"} | options
    return KnowledgeAugmentedRiskModel(chosen, **options)


def fusion(cohort, *names, **options):
    return FusionClassifier(parts(cohort, *(names or ("vitals", "note"))), **FAST | options)


def numeric(estimator):
    """The numbers alone, whatever else is in the frame."""
    columns = ["age", "heart_rate"]
    return make_pipeline(ColumnTransformer([("numbers", StandardScaler(), columns)]), estimator)


# What holds others, is no network, or is reached by a parameter alone: name -> fitted estimator.
OTHERS = {
    "rectifier of a network": lambda c: Rectifier(fusion(c), n_splits=2, random_state=0),
    "rectifier of trees": lambda c: make_pipeline(
        EventSummary("events"), ColumnTransformer([("n", "passthrough", ["age", "heart_rate"])]),
        Rectifier(TREES, n_splits=2, random_state=0),
    ),
    "rectified fusion": lambda c: MMNARFusionClassifier(
        parts(c, "vitals", "note", "cxr"), rectifier="crossfit", **FAST
    ),
    "event summary": lambda c: EventSummary("events"),
    "events to visits": lambda c: EventsToVisits("events"),
    "visits to events": lambda c: VisitsToEvents("visits"),
    "lab text": lambda c: LabTextifier(["sodium", "lactate"]),
    "note sections": lambda c: NoteSectionizer("note"),
    "retriever": lambda c: KnowledgeRetriever(graph()),
    "two stages": lambda c: risk_model(c, knowledge=graph()),
    "two stages, rationale": lambda c: risk_model(
        c, knowledge=KnowledgeRetriever(graph(), equivalence=equivalence()), stage2="lr",
        calibrate="isotonic", rationale="extractive", threshold="youden", rationale_dim=2,
    ),
    "two stages, xgboost": lambda c: risk_model(c, stage2="xgboost"),
    "score": lambda c: ClinicalScoreClassifier("column", columns={"score": "age"}),
    "generator of visits": lambda c: VisitGAN("visits", width=8, max_epochs=1, random_state=0),
    "pretrainer with generator": lambda c: RAPTPretrainer(
        parts(c, "history"), augment=VisitGAN("visits", width=8, max_epochs=1), **FAST
    ),
    "nested pretrainers": lambda c: TabNetClassifier(
        parts(c, "vitals", "note"), n_d=8, max_epochs=1, random_state=0,
        pretrained=ClipEHRAligner(
            parts(c, "vitals", "note"), n_d=8, max_epochs=1,
            pretrained=TabNetPretrainer(parts(c, "vitals"), n_d=8, max_epochs=1),
        ),
    ),
    "frozen pretrainer": lambda c: MEDFuseClassifier(
        parts(c, "labs", "note"), n_layers=1, lab_layers=1, width=16, **FAST,
        pretrained=FrozenEstimator(MaskedLabPretrainer(
            parts(c, "labs"), d_model=8, width=16, n_layers=1, n_heads=4, max_epochs=1,
            random_state=0,
        ).fit(c.X)),
    ),
    "text scores first": lambda c: MEDFuseClassifier(
        parts(c, "labs", "note"), n_layers=1, width=16, cross_fit=2, thresholds="f1",
        **FAST | {"n_members": 1},
    ),
    "pipeline": lambda c: make_pipeline(LabTextifier(["sodium"]), fusion(c)),
    "calibrated": lambda c: CalibratedClassifierCV(fusion(c), cv=2, ensemble=False),
    "calibrated, isotonic": lambda c: CalibratedClassifierCV(fusion(c), cv=2, method="isotonic"),
    "threshold": lambda c: TunedThresholdClassifierCV(fusion(c), cv=2, thresholds=5),
    "stacked": lambda c: StackingClassifier(
        [("net", fusion(c)), ("trees", numeric(TREES)),
         ("forest", numeric(RandomForestClassifier(3, random_state=0)))],
        LogisticRegression(), cv=2,
    ),
    "plain scikit-learn": lambda c: numeric(make_pipeline(SimpleImputer(), LogisticRegression())),
    "callable columns": lambda c: FusionClassifier(
        {"table": Tabular(make_column_selector("^(?:age|heart)"))}, **FAST
    ),
    "routed weights": lambda c: fusion(c).set_fit_request(sample_weight=False),
}  # fmt: skip


def equivalence():
    return pd.DataFrame({"icd_9": ["4280", "99591"], "icd_10": ["I509", "A419"],
                         "flags": ["00000", "10000"]}, dtype="str")  # fmt: skip


def everything():
    for estimator in estimators():
        yield pytest.param(lambda c, kind=type(estimator): small(kind, c),
                           id=type(estimator).__name__)  # fmt: skip
    for name, make in OTHERS.items():
        yield pytest.param(make, id=name)


def fitted(estimator, cohort):
    if isinstance(estimator, VisitGAN | EventSummary) or not hasattr(estimator, "predict"):
        return estimator.fit(cohort.X)
    return estimator.fit(cohort.X, cohort.y)


def results(estimator, X):
    """Whatever the estimator gives, as something to compare."""
    if isinstance(estimator, VisitGAN):
        return estimator.sample(7)
    for name in ("predict_proba", "transform", "predict"):
        if hasattr(estimator, name):
            return getattr(estimator, name)(X)
    raise AssertionError(f"{estimator} gives nothing")


def assert_same(one, other):
    if isinstance(one, pd.DataFrame):
        pd.testing.assert_frame_equal(one, other, check_exact=True)
    else:
        np.testing.assert_array_equal(one, other)


def same_parameters(one, other):
    one, other = one.get_params(), other.get_params()
    assert list(one) == list(other)
    assert _described(one) == _described(other)


def _described(params):
    return re.sub("at 0x[0-9a-f]+", "", repr(params))


@NO_PAIR
@pytest.mark.parametrize("make", list(everything()))
def test_round_trip(make, cohort, tmp_path):
    estimator = fitted(make(cohort), cohort)
    expected = results(estimator, cohort.X)
    first, second = tmp_path / "first.zip", tmp_path / "second.zip"
    ehrfuse.save(estimator, first)
    loaded = ehrfuse.load(first)
    assert type(loaded) is type(estimator)
    assert_same(results(loaded, cohort.X), expected)
    same_parameters(loaded, estimator)
    clone(loaded)
    ehrfuse.save(loaded, second)
    assert first.read_bytes() == second.read_bytes()
    pickled = pickle.dumps(loaded)
    assert_same(results(pickle.loads(pickled), cohort.X), expected)
    for raw in (first.read_bytes(), pickled):
        lowered = raw.lower()
        assert not [w for w in SECRET.lower().split() if len(w) > 3 and w.encode() in lowered]
        assert cohort.X["note"].dropna().iloc[0].encode() not in raw
