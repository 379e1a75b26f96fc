"""Our estimators inside the tools that people use: scikit-learn's own here, others if installed.

Those with third packages carry the marker `ecosystem`; `.ci/ecosystem` runs them in an
environment of their own.
"""

import warnings

import numpy as np
import pandas as pd
import pytest
from sklearn import config_context
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.ensemble import HistGradientBoostingClassifier, StackingClassifier
from sklearn.inspection import permutation_importance
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import make_scorer
from sklearn.model_selection import (
    GridSearchCV,
    GroupKFold,
    TunedThresholdClassifierCV,
    cross_validate,
)
from sklearn.pipeline import make_pipeline

from ehrfuse import EventSummary, FusionClassifier, MMNARFusionClassifier, Tabular
from ehrfuse.datasets import make_ehr
from ehrfuse.evaluation import ConformalByPattern, masked_scorer, net_benefit

TINY = {"max_epochs": 2, "n_members": 2, "d_model": 8, "random_state": 0}


@pytest.fixture(scope="module")
def data():
    kinds = ["vitals", "labs", "course", "note"]
    return make_ehr(n_samples=160, modalities=kinds, random_state=0, as_bunch=True)


@pytest.fixture(scope="module")
def fitted(data):
    return FusionClassifier(data.modalities, **TINY).fit(data.X, data.y)


@pytest.fixture(scope="module")
def table(data):
    """The numeric part alone, for tools that know numbers only."""
    return data.X[["age", "heart_rate", "sodium", "lactate"]].astype(float)


@pytest.fixture(scope="module")
def on_table(data, table):
    modalities = {"vitals": Tabular(["age", "heart_rate"]), "labs": Tabular(["sodium", "lactate"])}
    return FusionClassifier(modalities, **TINY).fit(table, data.y)


# ---------------------------------------------------------------- scikit-learn


def test_calibration(data):
    clf = FusionClassifier(data.modalities, groups="subject_id", **TINY)
    calibrated = CalibratedClassifierCV(clf, method="sigmoid", cv=2).fit(data.X, data.y)
    p = calibrated.predict_proba(data.X)
    np.testing.assert_allclose(p.sum(axis=1), 1)
    assert abs(p[:, 1].mean() - data.y.mean()) < 0.1


def test_calibration_of_a_frozen_model(data, fitted):
    frozen = pytest.importorskip("sklearn.frozen").FrozenEstimator(fitted)
    calibrated = CalibratedClassifierCV(frozen, method="isotonic").fit(data.X, data.y)
    assert calibrated.predict_proba(data.X[:3]).shape == (3, 2)


def test_tuned_threshold_by_net_benefit(data):
    clf = FusionClassifier(data.modalities, **TINY)
    scorer = make_scorer(net_benefit, threshold=0.2)  # of the decision itself
    tuned = TunedThresholdClassifierCV(clf, scoring=scorer, cv=2, random_state=0)
    tuned.fit(data.X, data.y)
    assert 0 < tuned.best_threshold_ < 1
    expected = tuned.predict_proba(data.X)[:, 1] >= tuned.best_threshold_
    np.testing.assert_array_equal(tuned.predict(data.X) == 1, expected)


def test_permutation_importance_of_a_frame_with_notes_and_events(data, fitted):
    columns = ["age", "events", "note", "subject_id"]
    found = permutation_importance(
        fitted, data.X[[*fitted.feature_names_in_, "subject_id"]], data.y,
        scoring=masked_scorer("brier"), n_repeats=2, random_state=0,
    )  # fmt: skip
    mean = dict(zip([*fitted.feature_names_in_, "subject_id"], found.importances_mean, strict=True))
    assert mean["subject_id"] == 0  # never a feature
    assert any(mean[c] != 0 for c in columns[:3])


def test_stacking_with_boosting(data):
    boosting = make_pipeline(EventSummary(["events"]), HistGradientBoostingClassifier(max_iter=5))
    fusion = FusionClassifier(data.modalities, **TINY)
    stack = StackingClassifier(
        [("fusion", fusion), ("boosting", boosting)], LogisticRegression(), cv=2
    ).fit(data.X, data.y)
    assert stack.predict_proba(data.X).shape == (160, 2)
    assert stack.final_estimator_.coef_.shape == (1, 2)


def test_routing_of_weights_and_groups(data):
    weight = np.where(np.arange(160) < 120, 1.0, 0.0)
    with config_context(enable_metadata_routing=True):
        clf = FusionClassifier(data.modalities, **TINY).set_fit_request(sample_weight=True)
        clf.set_score_request(sample_weight=True)
        for scoring in (None, masked_scorer("brier").set_score_request(sample_weight=True)):
            found = cross_validate(
                clf, data.X, data.y, cv=GroupKFold(2), scoring=scoring, return_estimator=True,
                params={"sample_weight": weight, "groups": data.X["subject_id"]},
            )  # fmt: skip
            assert np.isfinite(found["test_score"]).all()
        # Weights arrive: a fit without the rows that weigh nothing is the same.
        folds = GroupKFold(2).split(data.X, data.y, data.X["subject_id"])
        train, test = next(folds)
        kept = train[weight[train] > 0]
        alone = clone(clf).fit(data.X.iloc[kept], data.y[kept])
        routed = found["estimator"][0].predict_proba(data.X.iloc[test])
        np.testing.assert_allclose(routed, alone.predict_proba(data.X.iloc[test]), atol=1e-6)
        scorer = masked_scorer("auroc")  # asks for nothing, and says so when given
        told = r"sample_weight'?\] are passed (to cross validation )?but are not explicitly"
        with pytest.raises(Exception, match=told):
            cross_validate(clf, data.X, data.y, cv=2, scoring=scorer,
                           params={"sample_weight": weight})  # fmt: skip


def test_routing_in_a_search_over_patients(data):
    with config_context(enable_metadata_routing=True):
        clf = FusionClassifier(data.modalities, **TINY).set_fit_request(sample_weight=True)
        search = GridSearchCV(
            clf,
            {"fusion": ["mean", "concat"]},
            cv=GroupKFold(2),
            scoring=masked_scorer("auroc").set_score_request(sample_weight=False),
        )
        search.fit(data.X, data.y, groups=data.X["subject_id"], sample_weight=np.ones(160))
        assert search.best_params_["fusion"] in ("mean", "concat")


# ---------------------------------------------------------------- other packages


@pytest.mark.ecosystem
@pytest.mark.filterwarnings("ignore")
def test_shap(data, table, on_table):
    shap = pytest.importorskip("shap")

    def risk(X):
        return on_table.predict_proba(pd.DataFrame(X, columns=table.columns))[:, 1]

    known = table.fillna(table.median()).to_numpy()
    values = shap.KernelExplainer(risk, known[:10], silent=True).shap_values(known[:2], nsamples=16)
    np.testing.assert_allclose(
        values.sum(axis=1), risk(known[:2]) - risk(known[:10]).mean(), atol=1e-6
    )
    found = shap.PermutationExplainer(risk, known[:10], seed=0)(known[:2], max_evals=20)
    np.testing.assert_allclose(
        found.values.sum(axis=1) + found.base_values, risk(known[:2]), atol=1e-6
    )


@pytest.mark.ecosystem
@pytest.mark.filterwarnings("ignore:X does not have valid feature names")
def test_mapie_on_one_table(data, table):
    mapie = pytest.importorskip("mapie.classification")
    clf = FusionClassifier(**TINY).fit(table[:80], data.y[:80])
    conformal = mapie.SplitConformalClassifier(clf, 0.9, prefit=True)
    conformal.conformalize(table[80:], data.y[80:])
    labels, sets = conformal.predict_set(table[:5])
    assert sets.shape == (5, 2, 1)
    np.testing.assert_array_equal(labels, clf.predict(table[:5]))


@pytest.mark.ecosystem
def test_mapie_on_frames_with_notes_needs_our_wrapper(data, fitted):
    mapie = pytest.importorskip("mapie.classification")
    conformal = mapie.SplitConformalClassifier(fitted, 0.9, prefit=True)
    # It tries the estimator on an array of zeros; with declared modalities X is a frame.
    with pytest.raises(UserWarning, match="failed a minimal prediction test"):
        conformal.conformalize(data.X[80:], data.y[80:])
    ours = ConformalByPattern(fitted, min_count=20).conformalize(data.X[80:], data.y[80:])
    assert ours.predict_set(data.X[:5]).shape == (5, 2)


@pytest.mark.ecosystem
@pytest.mark.filterwarnings("ignore")
def test_fairlearn(data, fitted):
    fairlearn = pytest.importorskip("fairlearn.metrics")
    found = fairlearn.MetricFrame(
        metrics={"net benefit": lambda y, p: net_benefit(y, p, threshold=0.2)},
        y_true=data.y, y_pred=fitted.predict_proba(data.X)[:, 1],
        sensitive_features=data.X["sex"].astype(str),
    )  # fmt: skip
    assert found.by_group.shape[0] == data.X["sex"].astype(str).nunique()
    assert np.isfinite(found.difference()["net benefit"])


@pytest.mark.ecosystem
@pytest.mark.filterwarnings("ignore")
def test_optuna(data):
    optuna = pytest.importorskip("optuna")
    integration = pytest.importorskip("optuna_integration")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    search = integration.OptunaSearchCV(
        FusionClassifier(data.modalities, groups="subject_id", **TINY),
        {
            "lr": optuna.distributions.FloatDistribution(1e-4, 1e-2, log=True),
            "note__max_length": optuna.distributions.IntDistribution(16, 64),
        },
        cv=GroupKFold(2), n_trials=2, scoring=masked_scorer("auroc"), random_state=0,
        error_score="raise",
    )  # fmt: skip
    search.fit(data.X, data.y, groups=data.X["subject_id"])
    assert set(search.best_params_) == {"lr", "note__max_length"}
    assert search.predict_proba(data.X[:3]).shape == (3, 2)


@pytest.mark.ecosystem
@pytest.mark.filterwarnings("ignore")
def test_skore(data):
    skore = pytest.importorskip("skore")
    half = 80
    report = skore.EstimatorReport(
        FusionClassifier(data.modalities, **TINY),
        X_train=data.X[:half], y_train=data.y[:half], X_test=data.X[half:], y_test=data.y[half:],
    )  # fmt: skip
    frame = report.metrics.summarize().frame()
    assert frame.map(np.isfinite).to_numpy().any()
    crossed = skore.CrossValidationReport(
        FusionClassifier(data.modalities, **TINY), data.X, data.y, splitter=2
    )
    assert "roc_auc" in crossed.metrics.summarize().frame().index


@pytest.mark.ecosystem
@pytest.mark.filterwarnings("ignore")
def test_mlflow(data, fitted, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow.sklearn")
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mlflow.save_model(fitted, str(tmp_path / "model"), serialization_format="cloudpickle")
        again = mlflow.load_model(str(tmp_path / "model"))
    np.testing.assert_array_equal(again.predict_proba(data.X), fitted.predict_proba(data.X))


@pytest.mark.ecosystem
@pytest.mark.filterwarnings("ignore")
def test_skops_model_card(data, tmp_path):
    skops = pytest.importorskip("skops.card")
    clf = MMNARFusionClassifier(data.modalities, **TINY).fit(data.X, data.y)
    card = skops.Card(clf)
    card.add_metrics(auroc=0.8)
    card.save(tmp_path / "README.md")
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "MMNARFusionClassifier" in text
    assert "auroc" in text
