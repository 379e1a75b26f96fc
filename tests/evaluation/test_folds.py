"""Out-of-fold predictions: every row once, no patient on both sides, unknown labels welcome."""

import numpy as np
import pytest
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold, cross_val_predict

from ehrfuse import FusionClassifier
from ehrfuse.datasets import make_ehr
from ehrfuse.evaluation import bootstrap_scores, out_of_fold


def test_equals_cross_val_predict_on_plain_labels():
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(60, 2)), np.arange(60) % 2
    cv = KFold(3, shuffle=True, random_state=0)
    expected = cross_val_predict(LogisticRegression(), X, y, cv=cv, method="predict_proba")
    np.testing.assert_allclose(out_of_fold(LogisticRegression(), X, y, cv=cv), expected)


def test_patients_stay_on_one_side():
    seen = []

    class Spy(DummyClassifier):
        def fit(self, X, y, sample_weight=None):
            seen.append(set(X["mrn"]))
            return super().fit(X, y)

        def predict_proba(self, X):
            assert not seen[-1] & set(X["mrn"])
            return super().predict_proba(X)

    data = make_ehr(n_samples=90, random_state=0)[0].rename(columns={"subject_id": "mrn"})
    out_of_fold(Spy(), data, np.arange(90) % 2, cv=3, groups="mrn")
    assert len(seen) == 3


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")  # by cross_val_predict
def test_several_tasks_with_unknown_labels():
    data = make_ehr(n_samples=90, n_tasks=2, label_missing=0.2, random_state=0, as_bunch=True)
    clf = FusionClassifier({"vitals": data.modalities["vitals"]}, max_epochs=2, n_members=2)
    with pytest.raises(ValueError, match=r"use evaluation\.out_of_fold instead"):
        cross_val_predict(clf, data.X, data.y, cv=KFold(3), method="predict_proba")
    proba = out_of_fold(clf, data.X, data.y, cv=3, groups="subject_id")
    assert proba.shape == (90, 2)
    assert np.isfinite(proba).all()
    assert len(bootstrap_scores(data.y, proba, n_resamples=20)) == 6
