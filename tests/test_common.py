"""Every public estimator: scikit-learn's own checks on tables, ours on multimodal frames."""

import inspect

import pytest
from checks import checks_for
from sklearn.linear_model import LogisticRegression
from sklearn.utils import Bunch
from sklearn.utils.estimator_checks import parametrize_with_checks

import ehrfuse
from ehrfuse.base import TorchEstimator
from ehrfuse.datasets import make_ehr

SMALL = {
    "d_model": 8, "n_d": 8, "n_a": 8, "n_members": 2, "max_epochs": 2, "groups": "subject_id",
    "random_state": 0,
}  # fmt: skip
MINIBATCHES = (
    "minibatches, dropout and members draw random numbers per row, so a row of weight two and the "
    "same row twice take different paths"
)
EXPECTED_FAILURES = {"check_sample_weight_equivalence_on_dense_data": MINIBATCHES}


def has_core(kind):
    """Whether it trains one network; the others have checks of their own."""
    return kind._make_core is not TorchEstimator._make_core


def estimators():
    """Every public estimator with a torch core, as it comes."""
    for name in ehrfuse.__all__:
        kind = getattr(ehrfuse, name)
        if inspect.isclass(kind) and issubclass(kind, TorchEstimator) and has_core(kind):
            yield kind(random_state=0)


def expected_failures(estimator):
    """Pinned: a check that starts or stops failing is a red test."""
    return EXPECTED_FAILURES if hasattr(estimator, "predict") else {}


# Arrays hold no note, and one check has no note in any row: an aligner then says so.
NO_PAIR = pytest.mark.filterwarnings("ignore:No training row has both a table and a note")


@NO_PAIR
@pytest.mark.filterwarnings("ignore:.*training rows are too few:UserWarning")
@parametrize_with_checks(list(estimators()), expected_failed_checks=expected_failures)
def test_sklearn_checks(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def cohort():
    return make_ehr(n_samples=72, missing="mnar", random_state=0, as_bunch=True)


def multimodal():
    for estimator in estimators():
        for name, check in checks_for(estimator):
            yield pytest.param(estimator, check, id=f"{type(estimator).__name__}-{name[6:]}")


@NO_PAIR
@pytest.mark.parametrize(("estimator", "check"), list(multimodal()))
def test_multimodal_checks(estimator, check, cohort, tmp_path):
    known = inspect.signature(type(estimator)).parameters
    small = {key: value for key, value in SMALL.items() if key in known}
    accepted = {n: m for n, m in cohort.modalities.items() if isinstance(m, estimator._accepts)}
    cohort = Bunch(**cohort | {"modalities": accepted})
    estimator = type(estimator)(accepted, **small)
    options = {"folder": tmp_path} if "folder" in inspect.signature(check).parameters else {}
    check(estimator, cohort, **options)


def test_every_public_estimator_is_covered():
    covered = {type(estimator).__name__ for estimator in estimators()}
    others = {
        "ClinicalScoreClassifier",
        "EventSummary",
        "EventsToVisits",
        "KnowledgeAugmentedRiskModel",
        "KnowledgeGraph",
        "KnowledgeRetriever",
        "LabTextifier",
        "Modality",
        "NoteGenerator",
        "NoteSectionizer",
        "Rectifier",
        "VisitGAN",
        "VisitsToEvents",
    }
    others |= {"LoadError", "load", "save"}
    kinds = {name for name in ehrfuse.__all__ if name not in covered | others}
    assert all(issubclass(getattr(ehrfuse, name), ehrfuse.Modality) for name in kinds)


def test_html_repr(cohort):
    clf = ehrfuse.MMNARFusionClassifier(cohort.modalities)
    assert "MMNARFusionClassifier" in clf._repr_html_()
    assert "Events" in repr(clf)


def test_rectifier_takes_any_classifier(cohort):
    clf = ehrfuse.Rectifier(LogisticRegression())
    X = cohort.X[["age", "heart_rate"]].fillna(0)
    assert clf.fit(X, cohort.y).predict_proba(X).shape == (len(X), 2)
