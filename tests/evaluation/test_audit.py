"""The leak audit: planted leaks are found, clean look-alikes and clean cohorts stay silent."""

import ast
import re
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix
from sklearn.base import BaseEstimator, ClassifierMixin, TransformerMixin
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import KFold, PredefinedSplit
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import ehrfuse.evaluation
from ehrfuse import Events, FusionClassifier, Tabular
from ehrfuse.datasets import load_eicu, load_mimic4, make_ehr
from ehrfuse.evaluation import LeakageReport, audit_leakage
from ehrfuse.evaluation.audit import CHECKS, LeakageError
from ehrfuse.modalities.tabular import Tabular as TabularModality

pytest.importorskip("datasketch")
DATA = ["group_overlap", "duplicates", "time_order", "preparation", "single_columns", "terms",
        "missingness"]  # fmt: skip
FITS = [name for name in CHECKS if name not in DATA]
WORDS = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in "lmnrst"]


def world(n=500, seed=0, strength=0.8, n_numbers=5):
    """An honest world: numbers of which two tell something, a category, holes, patients."""
    rng = np.random.default_rng(seed)
    numbers = rng.normal(50, 10, (n, n_numbers))
    z = (numbers - 50) / 10
    y = (rng.random(n) < 1 / (1 + np.exp(-strength * (z[:, 0] + z[:, 1]) + 0.5))).astype(int)
    X = pd.DataFrame(numbers, columns=[f"v{i}" for i in range(n_numbers)])
    X.loc[rng.random(n) < 0.3, "v2"] = np.nan
    X["kind"] = rng.choice(["a", "b", "c"], n)
    return X, y, rng


def notes(n, rng, length=40):
    return [" ".join(rng.choice(WORDS, length)) for _ in range(n)]


def found(report, check):
    return report[check].verdict


def numeric(X):
    return X.select_dtypes("number").fillna(50.0)


# ---------------------------------------------------------------- planted in the data


def test_a_clean_world_passes_every_check():
    X, y, rng = world()
    X["note"] = notes(len(X), rng)
    X["events"] = [[{"time": -1.0, "code": rng.choice(["x", "y"]), "value": 1.0}] for _ in y]
    model = make_pipeline(Numbers(), HistGradientBoostingClassifier(max_iter=20))
    report = audit_leakage(model, X, y, groups=np.arange(len(y)) // 2)
    assert report.verdict == "pass", str(report)
    assert [f.check for f in report.findings] == list(CHECKS)
    report.raise_if_leaky(warnings=True)


class Numbers(BaseEstimator, TransformerMixin):
    def fit(self, X, y=None):
        self.fitted_ = True
        return self

    def transform(self, X):
        return numeric(X)


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_the_outcome_in_a_column(noise):
    X, y, rng = world()
    X["v9"] = y + noise * rng.normal(size=len(y)) + 0.1 * rng.normal(size=len(y))
    report = audit_leakage(None, X, y, checks=["single_columns"])
    assert found(report, "single_columns") == "leak"
    assert "'v9'" in report["single_columns"].sentence
    assert "'v0'" not in report["single_columns"].sentence


def test_a_number_in_a_column():
    X, _, rng = world()
    cost = X["v0"] + rng.normal(0, 5, len(X))
    X["v9"] = np.exp(cost / 10) + rng.normal(size=len(X))
    report = audit_leakage(Ridge(), numeric(X), cost, checks=["single_columns", *FITS])
    assert found(report, "single_columns") == "leak"
    report = audit_leakage(Ridge(), numeric(X).drop(columns="v9"), cost, checks=FITS)
    assert report.verdict == "pass", str(report)


def test_one_class_of_several_in_a_column():
    X, y, rng = world()
    y = np.array(["alive", "home", "died"])[y + (rng.random(len(y)) < 0.2)]
    X["ward"] = np.where(y == "died", "z", rng.choice(["x", "y"], len(y)))
    report = audit_leakage(None, X, y, checks=["single_columns"])
    assert found(report, "single_columns") == "leak"
    assert set(report["single_columns"].evidence.query("why != ''")["target"]) >= {"died"}


def test_a_level_that_names_some_of_the_cases():
    X, y, rng = world()
    X["place"] = np.where(
        (y == 1) & (rng.random(len(y)) < 0.3), "m", rng.choice(["u", "w"], len(y))
    )
    assert found(audit_leakage(None, X, y, checks=["single_columns"]), "single_columns") == "leak"


def test_the_output_of_a_model_of_other_columns():
    X, y, rng = world(1500, strength=1.4)
    z = (X[["v0", "v1"]].to_numpy() - 50) / 10
    X["index"] = z.sum(axis=1) + 0.2 * rng.normal(size=len(y))
    report = audit_leakage(None, X, y, checks=["single_columns"])
    assert found(report, "single_columns") == "warn"
    assert "'index'" in report["single_columns"].sentence
    clean = audit_leakage(None, X.drop(columns="index"), y, checks=["single_columns"])
    assert clean.verdict == "pass", str(clean)


def test_an_embedding_that_holds_the_outcome():
    X, y, rng = world()
    vectors = rng.normal(size=(len(y), 8)) + 5 * np.outer(y, rng.normal(size=8))
    X["cxr"] = list(vectors)
    assert found(audit_leakage(None, X, y, checks=["single_columns"]), "single_columns") == "leak"
    X["cxr"] = list(rng.normal(size=(len(y), 8)))
    assert found(audit_leakage(None, X, y, checks=["single_columns"]), "single_columns") == "pass"


@pytest.mark.parametrize("seed", range(3))
def test_honest_look_alikes_of_columns(seed):
    """A strong predictor, its square, a rare category, an identifier; also few rows."""
    X, y, rng = world(600, seed, strength=0)
    age = rng.normal(60, 15, len(y))
    y = (rng.random(len(y)) < 1 / (1 + np.exp(-(age - 70) / 7))).astype(int)
    X["age"], X["rare"] = age, np.where(rng.random(len(y)) < 0.01, "r", "s")
    X["number"] = [f"id{i}" for i in range(len(y))]
    for rows in (slice(None), slice(0, 60)):
        report = audit_leakage(None, X[rows], y[rows], checks=DATA)
        assert report.verdict == "pass", str(report)
        assert report["single_columns"].evidence["skill"].max() > 0.7


def test_notes_that_name_the_outcome():
    X, y, rng = world()
    told = [f"{t} zorv {t[:9]}" if c and rng.random() < 0.8 else t
            for t, c in zip(notes(len(y), rng), y, strict=True)]  # fmt: skip
    report = audit_leakage(None, X.assign(remark=told), y, checks=["terms"])
    assert found(report, "terms") == "leak"
    evidence = report["terms"].evidence
    assert evidence.iloc[0]["term"] == "zorv"
    assert evidence.iloc[0]["rows"] == sum("zorv" in t for t in told)
    assert (
        audit_leakage(None, X.assign(remark=notes(len(y), rng)), y, checks="terms").verdict
        == "pass"
    )


def test_codes_that_name_the_outcome():
    X, y, rng = world()
    lists = [list(rng.choice(WORDS, 5)) + ["Q1"] * int(c and rng.random() < 0.9) for c in y]
    as_list = audit_leakage(None, X.assign(codes=lists), y, checks="terms")
    records = [[{"time": -2.0, "diagnoses": cell}] for cell in lists]
    as_records = audit_leakage(None, X.assign(visits=records), y, checks="terms")
    for report in (as_list, as_records):
        assert found(report, "terms") == "leak"
        assert report["terms"].evidence["term"].iloc[0].endswith("Q1")


def test_no_rare_term_is_shown():
    X, y, rng = world()
    text = notes(len(y), rng)
    events = np.flatnonzero(y)
    for row in events[:4]:  # a name in the notes of four patients, a fifth row of one of them
        text[row] += " smithfield"
    text[events[4]] += " smithfield"
    text = [t + (" zorv" if c else "") for t, c in zip(text, y, strict=True)]
    groups = np.arange(len(y))
    groups[events[4]] = groups[events[3]]
    report = audit_leakage(None, X.assign(note=text), y, groups=groups, checks=DATA)
    page = report.to_html() + str(report)
    assert "zorv" in page
    assert "smithfield" not in page
    assert not any(t in page for t in text)


def test_missingness_set_after_the_outcome():
    X, y, rng = world()
    X["day"] = np.where((y == 1) & (rng.random(len(y)) < 0.5), rng.normal(size=len(y)), np.nan)
    report = audit_leakage(None, X, y, checks=["missingness"])
    assert found(report, "missingness") == "leak"
    assert "'day'" in report["missingness"].sentence
    assert "'v2'" not in report["missingness"].sentence


@pytest.mark.parametrize(("rate", "verdict"), [(0.97, "leak"), (0.85, "warn")])
def test_a_flag_is_a_leak_only_where_it_surely_tells(rate, verdict):
    """The lower end of the interval decides; a point estimate above 0.80 alone is a warning."""
    rng = np.random.default_rng(0)
    y = (rng.random(300) < 0.3).astype(int)
    X = pd.DataFrame({"v0": rng.normal(size=300)})
    X["v1"] = np.where(rng.random(300) < np.where(y == 1, rate, 1.03 - rate), 1.5, np.nan)
    finding = audit_leakage(None, X, y, checks=["missingness"])["missingness"]
    row = finding.evidence.iloc[0]
    assert finding.verdict == verdict
    assert "'v1'" in finding.sentence
    assert row["low"] < row["skill"]
    assert row["skill"] >= 0.8
    assert (row["low"] >= 0.8) == (verdict == "leak")


def test_many_flags_that_tell_only_together():
    X, y, rng = world(1500)
    for name in [f"w{i}" for i in range(8)]:
        X[name] = np.where(
            rng.random(len(y)) < np.where(y == 1, 0.7, 0.3), rng.normal(size=len(y)), np.nan
        )
    assert found(audit_leakage(None, X, y, checks=["missingness"]), "missingness") == "warn"


def test_informative_missingness_is_no_leak():
    X, y, rng = world(1500)
    sick = (X["v0"] - 50) / 10
    X["gas"] = np.where(rng.random(len(y)) < 1 / (1 + np.exp(-2 * sick)), sick, np.nan)
    assert found(audit_leakage(None, X, y, checks=["missingness"]), "missingness") == "pass"


def test_events_after_the_prediction():
    X, y, _ = world(60)
    events = [[{"time": -3.0, "code": "a", "value": 1.0}] for _ in y]
    assert audit_leakage(None, X.assign(course=events), y, checks="time_order").verdict == "pass"
    events[7] = [*events[7], {"time": 0.5, "code": "b", "value": 1.0}]
    for column in (events, pd.array(events, dtype=arrow_events())):
        report = audit_leakage(None, X.assign(course=column), y, checks="time_order")
        assert found(report, "time_order") == "leak"
        assert report["time_order"].evidence["rows"].tolist() == [1]


def arrow_events():
    import pyarrow as pa

    fields = {"time": pa.float32(), "code": pa.string(), "value": pa.float32()}
    return pd.ArrowDtype(pa.list_(pa.struct(list(fields.items()))))


def test_dates_after_the_prediction():
    X, y, _ = world(60)
    now = pd.to_datetime("2020-01-01") + pd.to_timedelta(np.arange(60), "D")
    X["now"], X["seen"] = now, now - pd.Timedelta(days=1)
    X["stream"] = [[{"time": t - pd.Timedelta(hours=1), "code": "a"}] for t in now]
    assert audit_leakage(None, X, y, time="now", checks="time_order").verdict == "pass"
    late = X.copy()
    late.loc[4, "seen"] = now[4] + pd.Timedelta(hours=1)
    assert audit_leakage(None, late, y, time="now", checks="time_order").verdict == "leak"
    X.at[5, "stream"] = [{"time": now[5] + pd.Timedelta(hours=1), "code": "a"}]
    assert audit_leakage(None, X, y, time="now", checks="time_order").verdict == "leak"


def test_later_rows_of_a_patient_that_predict_an_earlier_one():
    X, y, _ = world(200)
    groups, time = np.arange(200) // 4, np.tile(np.arange(4.0), 50)
    split = {"groups": groups, "time": time, "checks": ["time_order", "group_overlap"]}
    assert audit_leakage(None, X, y, **split).verdict == "pass"
    report = audit_leakage(None, X, y, cv=KFold(5, shuffle=True, random_state=0), **split)
    assert found(report, "time_order") == found(report, "group_overlap") == "leak"
    first, last = np.flatnonzero(time < 3), np.flatnonzero(time == 3)
    report = audit_leakage(None, X, y, cv=[(first, last)], **split)
    assert found(report, "time_order") == "pass"
    assert found(report, "group_overlap") == "leak"


def test_folds_that_overlap():
    X, y, _ = world(100)
    rows = np.arange(100)
    report = audit_leakage(None, X, y, cv=[(rows[:60], rows[55:])], checks="group_overlap")
    assert found(report, "group_overlap") == "leak"
    assert report["group_overlap"].evidence["rows on both sides"].tolist() == [5]


def test_a_column_that_is_known_in_one_class_alone_is_found_in_silence():
    X, y, rng = world(600)
    X["died_by"] = np.where(y == 1, rng.normal(size=600), np.nan)
    X["told"] = np.where(y == 1, 1.0, np.where(rng.random(600) < 0.5, 0.0, np.nan))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = audit_leakage(None, X, y, checks=["single_columns", "missingness"])
    assert report.verdict == "leak"


def test_a_patient_number_among_the_columns():
    X, y, rng = world(300)
    patient = rng.permutation(np.repeat(np.arange(1000, 1100), 3))
    X["who"] = patient
    X["sex"] = np.where(pd.util.hash_array(patient) % 2, "f", "m")
    X["born"] = 1920 + (pd.util.hash_array(patient) % 70).astype(int)
    report = audit_leakage(None, X, y, checks="group_overlap")
    assert found(report, "group_overlap") == "warn"
    assert "groups='who'" in report["group_overlap"].fix
    assert audit_leakage(None, X, y, groups="who", checks="group_overlap").verdict == "pass"
    # Ages and their classes repeat too, and are no numbers of patients.
    X = X.drop(columns=["who", "born"]).assign(age=rng.integers(20, 90, 300))
    X["decade"], X["old"] = X["age"] // 10, X["age"] > 65
    assert audit_leakage(None, X, y, checks="group_overlap").verdict == "pass"


def typos(text, rng, n=3):
    letters = list(text)
    for place in rng.choice(len(letters), n, replace=False):
        letters[place] = "x"
    return "".join(letters)


def test_copied_notes_with_typos():
    X, y, rng = world(400)
    text = notes(len(y), rng)
    text[350:] = [typos(t, rng) for t in text[:50]]
    y[350:] = y[:50]
    report = audit_leakage(None, X.assign(note=text), y, checks="duplicates")
    assert found(report, "duplicates") == "leak"
    evidence = report["duplicates"].evidence.set_index("what")
    assert 70 <= evidence.loc["text of note", "test rows"] <= 100
    groups = np.arange(len(y))
    groups[350:] = groups[:50]
    report = audit_leakage(None, X.assign(note=text), y, groups=groups, checks="duplicates")
    assert found(report, "duplicates") == "pass"


@pytest.mark.parametrize("jitter", [0.0, 0.01])
def test_copied_rows(jitter):
    """Oversampling or augmentation before the split."""
    X, y, rng = world(400, n_numbers=8)
    copies = rng.choice(np.flatnonzero(y), 100)
    more = X.iloc[copies].copy()
    more.iloc[:, :8] += jitter * rng.normal(size=(100, 8))
    X, y = pd.concat([X, more], ignore_index=True), np.concatenate([y, y[copies]])
    assert found(audit_leakage(None, X, y, checks="duplicates"), "duplicates") == "leak"


def test_coarse_rows_and_templates_are_no_copies():
    _, y, rng = world(800)
    X = pd.DataFrame({f"f{i}": rng.integers(0, 3, 800) for i in range(6)})
    forms = notes(6, rng)
    X["note"] = [f"{forms[i]} {' '.join(rng.choice(WORDS, 3))}" for i in rng.integers(6, size=800)]
    assert found(audit_leakage(None, X, y, checks="duplicates"), "duplicates") == "pass"


@pytest.mark.parametrize("smooth", [0, 10])
def test_target_encoding_over_all_rows(smooth):
    X, y, rng = world()
    ward = rng.integers(0, 20, len(y))
    counts, sums = np.bincount(ward), np.bincount(ward, weights=y)
    X["ward"] = ((sums + smooth * y.mean()) / (counts + smooth))[ward]
    report = audit_leakage(None, X, y, checks="preparation")
    assert found(report, "preparation") == "leak"
    assert "'ward'" in report["preparation"].sentence
    X["ward"] = rng.random(20)[ward]
    assert audit_leakage(None, X, y, checks="preparation").verdict == "pass"


def test_scaling_and_filling_over_all_rows():
    X, y, _ = world()
    scaled = pd.DataFrame(StandardScaler().fit_transform(numeric(X)), columns=numeric(X).columns)
    assert found(audit_leakage(None, scaled, y, checks="preparation"), "preparation") == "warn"
    filled = X.fillna({"v2": X["v2"].mean()})
    report = audit_leakage(None, filled, y, checks="preparation")
    assert report["preparation"].evidence["column"].tolist() == ["v2"]
    scaled_on_some = StandardScaler().fit(numeric(X)[:400]).transform(numeric(X))
    assert audit_leakage(None, scaled_on_some, y, checks="preparation").verdict == "pass"


# ---------------------------------------------------------------- planted in the estimator

SHELF = {}  # what leaky estimators keep outside of themselves


class BatchScaled(LogisticRegression):
    """Scales a batch by its own mean, at predict too."""

    def predict_proba(self, X):
        X = np.asarray(X)
        return super().predict_proba(X - X.mean(axis=0) + self.mean_)

    def fit(self, X, y):
        self.mean_ = np.asarray(X).mean(axis=0)
        return super().fit(np.asarray(X), y)


class OneRowFails(LogisticRegression):
    def predict_proba(self, X):
        if len(X) == 1:
            raise ValueError("Expected more than 1 value per channel")
        return super().predict_proba(X)


class KnowsLabels(ClassifierMixin, BaseEstimator):
    """Reads the labels of any row from a module's variable, by the index."""

    def fit(self, X, y):
        self.classes_ = np.unique(y)
        self.inner_ = LogisticRegression(max_iter=500).fit(X, y)
        return self

    def predict_proba(self, X):
        told = 0.5 * self.inner_.predict_proba(X)[:, 1] + 0.5 * SHELF["y"][X.index]
        return np.column_stack([1 - told, told])


class Remembers(KNeighborsClassifier):
    """Keeps every label that any fit has seen."""

    def fit(self, X, y):
        seen = SHELF.setdefault("rows", {})
        seen.update({row.tobytes(): label for row, label in zip(np.asarray(X), y, strict=True)})
        return super().fit(X, y)

    def predict_proba(self, X):
        told = super().predict_proba(X)
        for place, row in enumerate(np.asarray(X)):
            label = SHELF["rows"].get(row.tobytes())
            if label is not None:
                told[place] = self.classes_ == label
        return told


class Restless(LogisticRegression):
    def predict_proba(self, X):
        noise = np.random.default_rng().normal(size=len(X))
        told = 1 / (1 + np.exp(-self.decision_function(X) - noise))
        return np.column_stack([1 - told, told])


def fits(estimator, X, y, **options):
    return audit_leakage(estimator, X, y, checks=FITS, **options)


def verdicts(report):
    return {f.check: f.verdict for f in report.findings if f.verdict != "pass"}


def test_a_transductive_normaliser():
    X, y, _ = world()
    assert verdicts(fits(BatchScaled(max_iter=500), numeric(X), y)) == {"other_rows": "leak"}


def test_labels_in_a_module_variable():
    X, y, _ = world()
    SHELF["y"] = y
    report = fits(KnowsLabels(), numeric(X), y)
    assert verdicts(report) == {"permuted_training": "leak"}
    SHELF["y"] = np.zeros(len(y))
    assert verdicts(fits(KnowsLabels(), numeric(X), y)) == {}


def test_a_memory_from_one_fit_to_the_next():
    X, y, _ = world()
    SHELF.pop("rows", None)
    report = fits(Remembers(), numeric(X), y)
    assert {"held_out_labels": "leak", "permuted_labels": "leak"}.items() <= verdicts(
        report
    ).items()


def test_patients_on_both_sides_show_in_permuted_labels():
    rng = np.random.default_rng(0)
    patient = np.repeat(np.arange(120), 4)
    X = pd.DataFrame(rng.normal(size=(120, 6))[patient] + 0.05 * rng.normal(size=(480, 6)))
    y = rng.integers(0, 2, 120)[patient]
    model = KNeighborsClassifier(3)
    cv = KFold(5, shuffle=True, random_state=0)
    assert verdicts(fits(model, X, y, groups=patient, cv=cv))["permuted_labels"] == "leak"
    assert verdicts(fits(model, X, y, groups=patient)) == {}


def test_a_frozen_model_is_named_and_no_leak():
    X, y, _ = world()
    model = FrozenEstimator(LogisticRegression(max_iter=500).fit(numeric(X), y))
    assert verdicts(fits(model, numeric(X), y)) == {"permuted_training": "warn"}


def test_a_model_of_fixed_signs_is_named_and_no_leak():
    X, y, _ = world(strength=2.0)
    model = HistGradientBoostingClassifier(max_iter=10, monotonic_cst={"v0": 1, "v1": 1})
    assert set(verdicts(fits(model, numeric(X), y)).values()) <= {"warn"}


def test_random_fits_and_predictions():
    X, y, _ = world()
    assert verdicts(fits(Restless(max_iter=500), numeric(X), y))["other_rows"] == "warn"
    assert verdicts(fits(OneRowFails(max_iter=500), numeric(X), y)) == {"other_rows": "warn"}


@pytest.mark.parametrize("kind", ["frame", "array", "sparse", "classes", "regressor", "tasks"])
def test_honest_estimators_pass(kind):
    X, y, rng = world(400)
    X, model = numeric(X), make_pipeline(StandardScaler(with_mean=False), LogisticRegression())
    if kind == "array":
        X = X.to_numpy()
    if kind == "sparse":
        X = csr_matrix(X.to_numpy())
    if kind == "classes":
        y = np.array(["a", "b", "c"])[y + (X["v3"] > 55)]
    if kind == "regressor":
        model, y = HistGradientBoostingRegressor(max_iter=20), X["v0"] + rng.normal(0, 5, len(X))
    if kind == "tasks":
        y = pd.DataFrame({"one": y.astype(float), "two": (X["v3"] > 55).astype(float)})
        y.iloc[::7, 1] = np.nan
        X["age"] = X.pop("v0")
        model = FusionClassifier({"t": Tabular(list(X.columns))}, max_epochs=1, random_state=0)
    report = fits(model, X, y, n_permutations=2)
    assert report.verdict == "pass", str(report)


def test_text_pipelines_pass():
    _, y, rng = world(300)
    text = [
        t + (" mild" if rng.random() < (0.6 if c else 0.25) else "")
        for t, c in zip(notes(300, rng), y, strict=True)
    ]
    text = pd.Series(text).to_frame("note")
    model = make_pipeline(Cut(), TfidfVectorizer(), LogisticRegression())
    report = audit_leakage(model, text, y)
    assert report.verdict == "pass", str(report)


class Cut(BaseEstimator, TransformerMixin):
    def fit(self, X, y=None):
        self.fitted_ = True
        return self

    def transform(self, X):
        return X["note"]


# ---------------------------------------------------------------- our own guards


def fused(X, **options):
    modalities = {"vitals": Tabular(["age", "heart_rate", "sodium"]), "course": Events("events")}
    return FusionClassifier(modalities, max_epochs=2, random_state=0, **options)


def test_our_fusion_is_clean_and_without_a_guard_it_is_not(monkeypatch):
    """Scales taken from the rows at hand, instead of those of fit, are found."""
    X, y = make_ehr(n_samples=300, random_state=0)
    report = fits(fused(X), X, y, groups="subject_id", n_permutations=1)
    assert report.verdict == "pass", str(report)
    read = TabularModality._read

    def batchwise(self, cells, present):
        if len(cells) > 1:
            self._learn(cells)
        return read(self, cells, present)

    monkeypatch.setattr(TabularModality, "_read", batchwise)
    report = audit_leakage(fused(X), X, y, groups="subject_id", checks="other_rows")
    assert found(report, "other_rows") == "leak"


# ---------------------------------------------------------------- real cohorts


@pytest.fixture(scope="module")
def support(shared_data):
    table = pd.read_csv(shared_data / "support2" / "support2.csv.gz").sample(2000, random_state=0)
    later = ["row", "death", "d.time", "slos", "sfdm2", "charges"]
    X = table.drop(columns=["hospdead", *later])
    # Neither names nor order may matter.
    X = X.sample(frac=1, axis=1, random_state=1)
    names = {name: f"c{i}" for i, name in enumerate(X.columns)}
    return X.rename(columns=names), table["hospdead"].to_numpy(), names


def test_outputs_of_models_in_support2(support):
    X, y, names = support
    report = audit_leakage(None, X, y, checks=DATA)
    assert found(report, "single_columns") == "warn"
    told = report["single_columns"].evidence.query("why != ''")["column"]
    leaks = ["surv2m", "surv6m", "prg2m", "prg6m", "aps", "sps", "dnr", "dnrday", "totcst",
             "totmcst", "avtisst"]  # fmt: skip
    leaks = {names[name] for name in leaks}
    assert set(told) <= leaks
    assert {names["surv2m"], names["surv6m"], names["avtisst"]} <= set(told)
    clean = audit_leakage(None, X.drop(columns=list(leaks)), y, checks=DATA)
    assert clean.verdict == "pass", str(clean)


def test_narratives_of_vaers(shared_data):
    reports = pd.read_csv(
        shared_data / "vaers" / "1999VAERSDATA.csv.gz", encoding="latin-1", low_memory=False
    )
    reports = reports.sample(3000, random_state=0).reset_index(drop=True)
    y = reports["HOSPITAL"].eq("Y").to_numpy(int)
    X = pd.DataFrame({"a": reports["AGE_YRS"], "b": reports["SEX"], "c": reports["STATE"]})
    clean = audit_leakage(None, X, y, checks=DATA)
    assert clean.verdict == "pass", str(clean)
    X["d"], X["e"] = reports["SYMPTOM_TEXT"], reports["HOSPDAYS"]
    report = audit_leakage(None, X, y, checks=DATA)
    assert found(report, "terms") == found(report, "missingness") == "leak"
    assert {"hospital", "admitted"} & set(report["terms"].evidence["term"])
    assert "'e'" in report["missingness"].sentence


def test_discharge_fields_of_eicu(shared_data):
    pytest.importorskip("duckdb")
    folder = shared_data / "eicu-crd-demo-2.0.1"
    data = load_eicu(folder)
    X = data.X.reset_index(drop=True)
    y = data.y["in_hospital_mortality"].to_numpy()
    clean = audit_leakage(None, X, y, groups="subject_id", checks=DATA)
    assert clean.verdict == "pass", str(clean)
    table = pd.read_csv(folder / "patient.csv.gz").set_index("patientunitstayid")
    fields = ["unitdischargestatus", "unitdischargelocation", "hospitaldischargelocation"]
    for name in fields:
        leaky = X.iloc[:, :25].assign(q=table.loc[X["patientunitstayid"], name].to_numpy())
        report = audit_leakage(None, leaky, y, groups="subject_id", checks="single_columns")
        assert found(report, "single_columns") == "leak", name
        assert "'q'" in report["single_columns"].sentence


def test_later_visits_and_discharge_items_of_mimic(shared_data):
    pytest.importorskip("duckdb")
    folder = shared_data / "mimic-iv-demo-2.2"
    for task in ("in_hospital_mortality", "readmission_30d"):
        data = load_mimic4(folder, task)
        y = np.asarray(data.y)
        clean = audit_leakage(None, data.X, y, groups="subject_id", checks=DATA)
        assert clean.verdict == "pass", str(clean)
    admissions = pd.read_csv(
        folder / "hosp" / "admissions.csv.gz", parse_dates=["admittime", "dischtime"]
    )
    codes = (
        pd.read_csv(folder / "hosp" / "diagnoses_icd.csv.gz")
        .groupby("hadm_id")["icd_code"]
        .agg(list)
    )
    stays = admissions[admissions["hospital_expire_flag"] == 0].set_index("hadm_id")
    stays = stays.loc[data.X["hadm_id"]]
    visits = []
    for stay in stays.itertuples():
        own = admissions[admissions["subject_id"] == stay.subject_id].sort_values("admittime")
        days = (own["admittime"] - stay.dischtime) / pd.Timedelta(days=1)
        visits.append(
            [
                {"time": t, "diagnoses": codes.get(h, [])}
                for t, h in zip(days, own["hadm_id"], strict=True)
            ]
        )
    report = audit_leakage(
        None, data.X.assign(all=visits), y, groups="subject_id", checks="time_order"
    )
    assert found(report, "time_order") == "leak"
    died = admissions["hospital_expire_flag"]
    X = admissions[["admission_type", "insurance", "subject_id"]].assign(
        q=admissions["discharge_location"], r=admissions["deathtime"]
    )
    report = audit_leakage(None, X, died, groups="subject_id", checks=DATA)
    assert found(report, "single_columns") == found(report, "missingness") == "leak"
    # A codes column of the stay itself, dated at its discharge, is read before it.
    hours = (admissions["dischtime"] - admissions["admittime"]) / pd.Timedelta(hours=1) - 48
    coded = [
        [{"time": t, "code": c} for c in codes.get(h, [])]
        for t, h in zip(hours, admissions["hadm_id"], strict=True)
    ]
    report = audit_leakage(
        None, X.assign(coded=coded), died, groups="subject_id", checks="time_order"
    )
    assert found(report, "time_order") == "leak"


# ---------------------------------------------------------------- the report


def test_report(tmp_path):
    X, y, _ = world(200)
    X["<b>&"] = y * 1.0
    report = audit_leakage(None, X, y, checks=["single_columns", "missingness", "other_rows"])
    assert isinstance(report, LeakageReport)
    assert report.to_frame().index.tolist() == ["single_columns", "missingness", "other_rows"]
    assert report.to_frame().loc["other_rows", "verdict"] == "skipped"
    assert all(len(line) <= 100 for line in str(report).splitlines())
    page = report.to_html(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page
    assert "<b>&<" not in page
    assert "&lt;b&gt;&amp;" in page
    assert not re.search(r"(src|href)=", page)
    assert "width=device-width" in page
    with pytest.raises(LeakageError, match="single_columns"):
        report.raise_if_leaky()
    with pytest.raises(KeyError, match="was not run"):
        report["terms"]


def test_the_same_twice_and_nothing_is_changed():
    X, y, _ = world(200)
    before, state = X.copy(deep=True), np.random.get_state()[1].copy()  # noqa: NPY002
    model = HistGradientBoostingClassifier(max_iter=5)
    first = audit_leakage(model, numeric(X), y, n_permutations=1)
    second = audit_leakage(model, numeric(X), y, n_permutations=1)
    assert str(first) == str(second)
    for a, b in zip(first.findings, second.findings, strict=True):
        pd.testing.assert_frame_equal(a.evidence, b.evidence)
    pd.testing.assert_frame_equal(X, before)
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002
    assert model.random_state is None
    assert not hasattr(model, "classes_")


def test_fits_are_as_many_as_the_docstring_says(monkeypatch):
    calls = []
    fit = HistGradientBoostingClassifier.fit
    monkeypatch.setattr(
        HistGradientBoostingClassifier,
        "fit",
        lambda self, X, y: calls.append(len(X)) or fit(self, X, y),
    )
    X, y, _ = world(600)
    report = audit_leakage(
        HistGradientBoostingClassifier(max_iter=3), numeric(X), y, checks=FITS, max_rows=200
    )
    assert len(calls) == 19
    assert max(calls) <= 170
    assert "sample of 200 rows" in report.about


def test_unknown_outcomes_and_odd_inputs():
    X, y, _ = world(300)
    y = y.astype(float)
    y[::5] = np.nan
    X.index = [0] * len(X)
    X["empty"], X["same"], X["image"] = np.nan, 1, [np.zeros((4, 4))] * len(X)
    report = audit_leakage(None, X, y)
    assert "240 rows" in report.about
    assert report.verdict == "pass", str(report)
    with pytest.raises(ValueError, match="'cheques' is not known"):
        audit_leakage(None, X, y, checks="cheques")
    with pytest.raises(ValueError, match="at least two"):
        audit_leakage(None, X, np.ones(len(X)))
    with pytest.raises(ValueError, match="3 rows"):
        audit_leakage(None, X, [0, 1, 0])
    with pytest.raises(ValueError, match="no column"):
        audit_leakage(None, X, y, groups="nobody")
    with pytest.raises(ValueError, match="could not convert"):
        audit_leakage(LogisticRegression(), X[["kind"]], y)


@pytest.mark.parametrize(
    "cell",
    [{"a": 1}, [[1.0]], [1.0, "x"], [{"time": 1.0}, None], [{"time": 1.0}, "x"], np.eye(2)],
    ids=["mapping", "nested", "mixed", "null among records", "word among records", "matrix"],
)
def test_columns_that_cannot_be_read_are_named(cell):
    X, y, _ = world(100)
    X["odd <b>"] = pd.Series([cell] * len(X))
    report = audit_leakage(None, X, y, checks="missingness")
    assert "Columns not read, their cells being of no known kind: 'odd <b>'." in report.about
    assert "Columns not read" in str(report)
    assert "not read" in report.to_html()
    assert "odd <b>" not in report.to_html()
    fine = audit_leakage(None, X.drop(columns="odd <b>"), y, checks="missingness")
    assert "not read" not in str(fine)


def test_unknown_labels_of_one_column_are_left_out():
    X, y, _ = world(200)
    X = numeric(X)
    y = np.where(np.arange(200) < 20, np.nan, y)
    vector = audit_leakage(LogisticRegression(), X, y, checks=["single_columns", "other_rows"])
    for frame in (pd.DataFrame({"died": y}), y[:, None]):
        report = audit_leakage(LogisticRegression(), X, frame, checks=list(CHECKS)[4:5] + FITS[-1:])
        assert str(report) == str(vector)
        assert "180 rows" in report.about


def test_tasks_that_an_estimator_does_not_take_are_named():
    X, y, _ = world(100)
    tasks = pd.DataFrame({"a": y, "b": np.where(np.arange(100) < 9, np.nan, 1 - y)})
    with pytest.raises(ValueError, match="1d array") as caught:
        audit_leakage(LogisticRegression(), numeric(X), tasks, checks="other_rows")
    assert "y with 2 tasks" in caught.value.__notes__[0]
    with pytest.raises(ValueError, match="y has 0 dimensions; pass one label per row"):
        audit_leakage(None, X, None)


def test_time_is_named_by_its_own_name():
    X, y, _ = world(100)
    with pytest.raises(ValueError, match="time='nope' names no column here"):
        audit_leakage(None, X, y, time="nope")
    with pytest.raises(ValueError, match="time has 2 dimensions"):
        audit_leakage(None, X, y, time=X[["v0"]])


def test_an_estimator_that_fails_on_altered_labels_is_skipped():
    class Picky(LogisticRegression):
        def fit(self, X, y):
            if not np.array_equal(y, SHELF["labels"][: len(y)]) and SHELF["fits"]:
                raise RuntimeError("a note that must not be shown")
            SHELF["fits"] += 1
            return super().fit(X, y)

    X, y, _ = world(200)
    SHELF.update(labels=y[40:], fits=0)
    rows = np.arange(200)
    report = audit_leakage(
        Picky(max_iter=500), numeric(X), y, checks="permuted_training", cv=[(rows[40:], rows[:40])]
    )
    assert found(report, "permuted_training") == "skipped"
    assert "RuntimeError" in str(report)
    assert "a note" not in str(report)


def test_no_data_set_column_or_outcome_term_stands_in_the_code():
    folder = Path(ehrfuse.evaluation.__file__).parent
    words = {"hosp", "died", "death", "expired", "surv", "mimic", "eicu", "vaers", "support2",
             "mortality", "subject_id", "narrative", "dnr"}  # fmt: skip
    for path in [folder / "audit.py", *folder.glob("_leak_*.py"), *folder.glob("_audit_*.py")]:
        strings = [n.value.lower() for n in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                   if isinstance(n, ast.Constant) and isinstance(n.value, str)]  # fmt: skip
        hits = {w for w in words for text in strings if re.search(rf"\b{w}", text)}
        assert not hits, f"{path.name}: {hits}"


def test_codes_that_are_numbers_and_names_that_are_no_columns():
    rng = np.random.default_rng(0)
    y = (rng.random(300) < 0.4).astype(int)
    events = [
        [{"time": -1.0, "code": int(c)} for c in rng.integers(100, 104, 2)]
        + [{"time": -0.5, "code": 798}] * int(v)
        for v in y
    ]
    report = audit_leakage(None, pd.DataFrame({"course": events}), y)
    assert found(report, "terms") == "leak"
    X = pd.DataFrame({"a": rng.normal(size=300), "told": y.astype(float)})
    others = pd.Series(np.arange(300) // 2, name="told")
    assert audit_leakage(None, X, y, groups=others).verdict == "leak"


def test_unknown_outcomes_and_a_splitter_of_row_numbers():
    X, y, _ = world(300)
    holes = np.asarray(y, dtype=float)
    holes[::7] = np.nan
    cv = PredefinedSplit(np.arange(300) % 3)
    assert audit_leakage(None, X, holes, cv=cv).verdict in ("pass", "warn")
