"""Explanations: sensitivity by hand, silhouettes, pictures, and words without invented numbers."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin

from ehrfuse import RAPTClassifier, RAPTPretrainer, SequenceClassifier
from ehrfuse.datasets import make_prenatal
from ehrfuse.evaluation import (
    EmbeddingDisplay,
    TimelineDisplay,
    explain_in_words,
    sensitivity,
    silhouette_report,
)


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def women():
    return make_prenatal(72, random_state=0, as_bunch=True)


class Sum(RegressorMixin, BaseEstimator):
    """Adds up everything it finds."""

    def predict(self, X):
        return np.array([self.total(row) for _, row in X.iterrows()])

    def total(self, row):
        found = 0.0 if pd.isna(row["age"]) else row["age"]
        for visit in row["visits"] if isinstance(row["visits"], list) else []:
            found += (visit["sbp"] or 0) + 10 * len(visit["dx"])
        for event in row["events"] if isinstance(row["events"], list) else []:
            found += event["value"] or 1000
        return found


def one_patient():
    return pd.DataFrame({
        "age": [50.0, np.nan],
        "visits": [[{"time": -9.0, "sbp": 120.0, "dx": ["I10", "E11"]},
                    {"time": -1.0, "sbp": None, "dx": []}], None],
        "events": [[{"time": -3.0, "code": "HR", "value": 80.0},
                    {"time": -2.8, "code": "HR", "value": 90.0},
                    {"time": -0.5, "code": "ward", "value": None}], []],
    })  # fmt: skip


def test_sensitivity_by_hand():
    frame = sensitivity(Sum(), one_patient(), bin=1.0)
    assert set(frame["row"]) == {0}  # the second patient has nothing to take out
    effect = frame.set_index(["column", "feature"])["effect"]
    assert effect["age", "age"] == 50
    assert effect["visits", "sbp"] == 120
    assert effect["visits", "dx:I10"] == 10
    assert effect["events", "HR"] == 170  # one hour, both together
    assert effect["events", "ward"] == 1000
    hr = frame[frame["feature"] == "HR"].iloc[0]
    assert (hr["value"], hr["visit"]) == (85.0, 0)
    assert frame[frame["column"] == "age"]["visit"].tolist() == [-1]
    assert list(sensitivity(Sum(), one_patient(), ["age"])["feature"]) == ["age"]


def test_sensitivity_is_of_the_output_asked_for():
    class Two(ClassifierMixin, BaseEstimator):
        classes_ = np.array(["alive", "dead"])

        def predict_proba(self, X):
            p = X["age"].fillna(0).to_numpy() / 100
            return np.column_stack([1 - p, p])

    X = pd.DataFrame({"age": [40.0]})
    assert sensitivity(Two(), X)["effect"].tolist() == [0.4]
    assert sensitivity(Two(), X, output="alive")["effect"].tolist() == pytest.approx([-0.4])
    with pytest.raises(ValueError, match="output='gone'"):
        sensitivity(Two(), X, output="gone")
    with pytest.raises(ValueError, match="no columns"):
        sensitivity(Two(), X, ["sex"])


def test_sensitivity_of_a_network(women):
    clf = RAPTClassifier(
        women.modalities, d_model=8, n_members=2, max_epochs=2, groups="subject_id"
    )
    clf.fit(women.X, women.y)
    frame = sensitivity(clf, women.X.head(2))
    assert "subject_id" not in set(frame["column"])
    row = frame[(frame["row"] == 0) & (frame["feature"] == "weight")].iloc[0]
    changed = [dict(v) for v in women.X["visits"].iloc[0]]
    changed[row["visit"]]["weight"] = None
    without = women.X.head(1).assign(visits=[changed])
    expected = clf.predict_proba(women.X.head(1))[0, 1] - clf.predict_proba(without)[0, 1]
    assert row["effect"] == pytest.approx(expected, abs=1e-9)


# ---------------------------------------------------------------- representations


def test_silhouettes_of_the_stages(women):
    encoder = RAPTPretrainer(d_model=8, n_members=2, max_epochs=2)
    clf = RAPTClassifier(
        women.modalities, d_model=8, n_members=2, max_epochs=2, pretrained=encoder, random_state=0
    ).fit(women.X, women.y)
    report = silhouette_report(clf, women.y, women.X)
    assert list(report.index) == ["random", "pretrained", "fine-tuned"]
    assert report["silhouette"].between(-1, 1).all()
    assert (report["n"] == 72).all()
    display = EmbeddingDisplay.from_stages(clf, women.y, women.X, method="pca")
    assert list(display.axes_) == list(report.index)
    assert "silhouette" in display.axes_["random"].get_title()


def test_tsne_and_unknown_classes():
    rng = np.random.default_rng(0)
    y = np.repeat([0.0, 1.0, np.nan], 12)
    z = rng.normal(size=(36, 5)) + 6 * np.nan_to_num(y)[:, None]
    report = silhouette_report({"z": z}, y)
    assert report["n"].tolist() == [24]
    assert report.loc["z", "silhouette"] > 0.5
    display = EmbeddingDisplay.from_stages({"z": z}, y, max_rows=20)
    assert display.points["z"].shape == (20, 2)
    with pytest.raises(ValueError, match="method='lda'"):
        EmbeddingDisplay.from_stages({"z": z}, y, method="lda")


def test_bad_stages():
    with pytest.raises(ValueError, match="at least two"):
        silhouette_report({"z": np.zeros((4, 2))}, [1, 1, 1, 1])
    with pytest.raises(ValueError, match=r"stages\(X\)"):
        silhouette_report(Sum(), [0, 1])
    with pytest.raises(ValueError, match="rows"):
        silhouette_report({"z": np.zeros((4, 2))}, [0, 1])


# ---------------------------------------------------------------- timelines


def test_attention_as_a_picture(women):
    clf = SequenceClassifier(women.modalities, architecture="dipole", d_model=8, max_epochs=2)
    frame = clf.fit(women.X, women.y).explain(women.X)
    row = int(women.X["visits"].list.len().argmax())
    display = TimelineDisplay.from_explanation(frame, row=row, unit="w")
    assert display.table.shape == (1, women.X["visits"].list.len().iloc[row])
    assert display.ax_.get_xlabel() == "time (w)"
    np.testing.assert_allclose(display.table.sum(axis=1), 1)


def test_contributions_as_a_picture(women):
    clf = SequenceClassifier(women.modalities, architecture="retain", d_model=8, max_epochs=2)
    frame = clf.fit(women.X, women.y).explain(women.X.head(3))
    display = TimelineDisplay.from_explanation(frame, row=1, max_features=4)
    assert display.table.shape[0] == 4
    assert len(display.ax_.get_yticklabels()) == 4
    with pytest.raises(ValueError, match="no visit of row 9"):
        TimelineDisplay.from_explanation(frame, row=9)


# ---------------------------------------------------------------- words


def explanation():
    return pd.DataFrame({
        "row": [0, 0, 0, 1], "column": "visits", "visit": [0, 1, -1, 0],
        "time": [-8.0, -2.0, np.nan, 0.0],
        "feature": ["sbp", "T4", "sex", "sbp"], "value": [151.0, 4.4, "F", 99.0],
        "effect": [0.12, -0.03, 0.01, 0.5],
    })  # fmt: skip


TEXT = (
    "The predicted probability of hypertension is 31.0%. It is raised most by sbp 151 at -8 w "
    "(+12.0 points), sex F (+1.0 points). It is lowered most by T4 4.4 at -2 w (-3.0 points)."
)


def words(**options):
    return explain_in_words(explanation(), 0.31, outcome="hypertension", unit="w", **options)


def test_template():
    assert words() == TEXT
    assert "sex" not in words(top=1)


def test_every_column_may_have_a_unit_of_its_own():
    assert words() == explain_in_words(
        explanation(), 0.31, outcome="hypertension", unit={"visits": "w", "labs": "h"}
    )
    attention = explanation().rename(columns={"column": "modality", "effect": "weight"})
    assert "at -8 d (" in explain_in_words(attention, 0.31, unit={"visits": "d"})
    assert "at -8 (" in explain_in_words(attention, 0.31, unit={"other": "d"})


def test_a_language_model_sees_and_gives_no_number():
    seen = []

    def friendly(prompt):
        seen.append(prompt)
        return "Her <A> is put at <B>; mostly because of <C> and <D>, while <E> speaks against it."

    said = words(phrase=friendly)
    assert "151" not in seen[0]
    assert "T4" not in seen[0]
    assert said == (
        "Her hypertension is put at 31.0%; mostly because of sbp 151 at -8 w (+12.0 points) and "
        "sex F (+1.0 points), while T4 4.4 at -2 w (-3.0 points) speaks against it."
    )


@pytest.mark.parametrize(
    "text",
    [
        "Her <A> is <B>: <C>, <D>, <E>, and about 40% of such women fall ill.",
        "Her <A> is <B>: <C>, <D>, <E>; twice the usual risk.",
        "Her <A> is <B>: <C> and <D>.",
        "Her <A> is <B>: <C>, <C>, <D>, <E>.",
        "Her <A> is <B>: <C>, <D>, <E>, <F>.",
        "",
    ],
)
def test_what_a_language_model_invents_is_refused(text):
    with pytest.warns(UserWarning, match="template is returned"):
        assert words(phrase=lambda prompt: text) == TEXT


def test_a_pipeline_of_transformers_fits():
    said = "<A> <B> <C> <D> <E>"
    assert words(phrase=lambda p: [{"generated_text": p + said}]).startswith("hypertension 31.0%")


def test_words_of_attention_and_values():
    frame = pd.DataFrame({"row": 0, "visit": [0, 1], "time": [-5.0, -1.0], "feature": "(visit)",
                          "weight": [0.2, 0.8]})  # fmt: skip
    said = explain_in_words(frame, 12.5, outcome="days in hospital")
    assert said == (
        "The predicted value of days in hospital is 12.5. The model looked most at the visit at -1 "
        "(weight 0.8), the visit at -5 (weight 0.2)."
    )
    with pytest.raises(ValueError, match="'effect'"):
        explain_in_words(frame.drop(columns="weight"), 0.5)
