"""Each picture shows its table, fits its words, and takes axes or a figure that it is given."""

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from sklearn.ensemble import HistGradientBoostingClassifier

from ehrfuse import FusionClassifier, KnowledgeGraph, KnowledgeRetriever
from ehrfuse.datasets import make_ehr
from ehrfuse.evaluation import (
    AttentionChangeDisplay,
    ComparisonDisplay,
    ContributionDisplay,
    DecisionCurveDisplay,
    EmbeddingDisplay,
    KnowledgeEvidenceDisplay,
    MissingPatternDisplay,
    PatternCalibrationDisplay,
    TimelineDisplay,
    TrainingHistoryDisplay,
    calibration_table,
    compare,
    decision_curve,
    modality_contribution,
)
from ehrfuse.evaluation._style import fitted, pattern_title


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def case(n=400, seed=0):
    rng = np.random.default_rng(seed)
    X = pd.DataFrame(rng.normal(size=(n, 2)), columns=["ph", "age"])
    y = (X["ph"] + rng.normal(size=n) > 0).astype(int)
    X["ph"] = X["ph"].mask(rng.random(n) < 0.4)
    return X, y


MODALITIES = {"gas": "ph", "static": "age"}


@pytest.fixture(scope="module")
def model():
    X, y = case()
    return HistGradientBoostingClassifier(max_iter=10).fit(X, y)


def assert_nothing_is_cut(figure):
    """Whatever is drawn lies within the picture."""
    figure.canvas.draw()
    box = figure.get_tightbbox(figure.canvas.get_renderer())
    width, height = figure.get_size_inches()
    assert min(box.x0, box.y0) > -0.02
    assert box.x1 < width + 0.02
    assert box.y1 < height + 0.02


def test_decision_curve(model):
    X, y = case(seed=1)
    options = {"thresholds": [0.1, 0.2, 0.4], "n_resamples": 20, "random_state": 0}
    display = DecisionCurveDisplay.from_estimator(model, X, y, **options)
    table = decision_curve(y, {"HistGradientBoostingClassifier": model.predict_proba(X)}, **options)
    pd.testing.assert_frame_equal(display.table, table)
    lines = {line.get_label(): line for line in display.ax_.lines}
    drawn = lines["HistGradientBoostingClassifier"].get_ydata()
    np.testing.assert_array_equal(drawn, table["net_benefit"])
    np.testing.assert_array_equal(lines["treat all"].get_ydata(), table["treat_all"])
    assert_nothing_is_cut(display.figure_)
    many = {f"a model with a very long name, number {i}": model for i in range(8)}
    display = DecisionCurveDisplay.from_estimator(many, X, y, **options)
    styles = {(line.get_color(), line.get_linestyle()) for line in display.ax_.lines}
    assert len(styles) == 8 + 2
    assert_nothing_is_cut(display.figure_)
    _, ax = plt.subplots()
    assert DecisionCurveDisplay(table).plot(ax=ax).ax_ is ax


def test_calibration_by_pattern(model):
    X, y = case(seed=1)
    display = PatternCalibrationDisplay.from_estimator(model, X, y, MODALITIES, n_bins=3)
    table = calibration_table(y, model.predict_proba(X), X, MODALITIES, n_bins=3)
    pd.testing.assert_frame_equal(display.table, table)
    for pattern, ax in display.axes_.items():
        own = table[table["pattern"] == pattern]
        np.testing.assert_array_equal(ax.lines[-1].get_ydata(), own["rate"])
        assert f"n = {own['n'].sum()}" in ax.get_title()
    assert display.axes_["gas+static"].get_title().startswith("everything present")
    assert display.axes_["static"].get_title().startswith("only static")
    assert_nothing_is_cut(display.figure_)
    one = PatternCalibrationDisplay.from_estimator(model, X, y, MODALITIES, max_patterns=1)
    assert list(one.axes_) == ["gas+static"]
    figure = plt.figure()
    assert one.plot(figure=figure).figure_ is figure


def test_training_history():
    data = make_ehr(n_samples=80, modalities=["vitals"], random_state=0, as_bunch=True)
    clf = FusionClassifier(
        data.modalities, max_epochs=3, n_members=2, validation_fraction=0.3, random_state=0
    ).fit(data.X, data.y)
    display = TrainingHistoryDisplay.from_estimator(clf)
    lines = {line.get_label(): line for line in display.axes_["loss"].lines}
    history = pd.DataFrame(clf.history_)
    np.testing.assert_array_equal(lines["training"].get_ydata(), history["train_loss"])
    np.testing.assert_array_equal(lines["validation"].get_ydata(), history["val_loss"])
    best = history["val_loss"].idxmin() + 1
    assert lines[f"best: epoch {best}"].get_xdata()[0] == best
    assert_nothing_is_cut(display.figure_)
    terms = [{"epoch": e, "train_loss": 1.0, "train_a": 0.5, "train_b_c": 0.5} for e in range(2)]
    display = TrainingHistoryDisplay(terms).plot()
    assert [ax.get_title() for ax in display.axes_.values()] == ["sum of the terms", "a", "b c"]
    with pytest.raises(ValueError, match="has no history_; pass a fitted estimator"):
        TrainingHistoryDisplay.from_estimator(FusionClassifier())


def test_contribution(model):
    X, y = case(seed=1)
    options = {"n_resamples": 10, "random_state": 0}
    display = ContributionDisplay.from_estimator(model, X, y, MODALITIES, metric="brier", **options)
    table = modality_contribution(model, X, y, MODALITIES, metric="brier", **options)
    order = table.drop(index="(all)").sort_values("contribution")
    bars = [bar.get_width() for bar in display.ax_.patches]
    np.testing.assert_allclose(bars, order["contribution"])
    labels = [label.get_text() for label in display.ax_.get_yticklabels()]
    assert labels == [f"{name} ({share:.0%})" for name, share in order["present"].items()]
    assert display.ax_.get_xlabel() == "reduction of Brier score"
    assert_nothing_is_cut(display.figure_)


def test_comparison():
    X, y = case()
    models = {
        name: HistGradientBoostingClassifier(max_iter=i + 1)
        for i, name in enumerate(["one", "two", "a third one with a name that needs two lines"])
    }
    found = compare(models, X, y, cv=2, n_resamples=20)
    display = ComparisonDisplay.from_comparison(found)
    for metric, ax in display.axes_.items():
        own = found.differences.xs(metric, level="metric")["difference"]
        np.testing.assert_array_equal(ax.lines[-1].get_xdata(), own[::-1])
    assert_nothing_is_cut(display.figure_)
    with pytest.raises(ValueError, match="one model only"):
        ComparisonDisplay.from_comparison(compare({"m": models["one"]}, X, y, n_resamples=2))


def test_knowledge_evidence():
    triples = pd.DataFrame(
        {"head": ["warfarin", "aspirin", "aspirin"], "relation": ["interacts_with"] * 3,
         "tail": ["aspirin", "ibuprofen", "heparin"], "source": ["DrugBank"] * 3}
    )  # fmt: skip
    retriever = KnowledgeRetriever(KnowledgeGraph.from_triples(triples))
    X = pd.DataFrame({"note": ["Takes aspirin and warfarin.", "Nothing."]})
    retriever.fit(X)
    display = KnowledgeEvidenceDisplay.from_estimator(retriever, X, max_facts=2)
    told = retriever.explain(X)[0][1].head(2)
    pd.testing.assert_frame_equal(display.knowledge, told)
    labels = [label.get_text() for label in display.ax_.get_yticklabels()][::-1]
    for label, text in zip(labels, told["text"], strict=True):
        assert label.replace("\n", " ").startswith(text)
    assert_nothing_is_cut(display.figure_)
    with pytest.raises(ValueError, match="Nothing was retrieved for row 1"):
        KnowledgeEvidenceDisplay.from_estimator(retriever, X, row=1)
    with pytest.raises(ValueError, match="does not explain itself"):
        KnowledgeEvidenceDisplay.from_estimator(HistGradientBoostingClassifier(), X)


# ---------------------------------------------------------------- patterns of many modalities


def diffuse(n=900, k=16):
    rng = np.random.default_rng(0)
    ill = rng.normal(size=(n, 1))
    there = rng.random((n, k)) < 1 / (1 + np.exp(-(2.5 + 1.5 * ill - 0.35 * np.arange(k))))
    X = pd.DataFrame(np.where(there, 1.0, np.nan), columns=[f"a long name of column {j}" for j in
                                                          range(k)])  # fmt: skip
    return X, {f"a long name of modality {j}": c for j, c in enumerate(X)}


def test_sixteen_modalities_are_pooled_by_how_many_a_row_has():
    X, modalities = diffuse()
    display = MissingPatternDisplay.from_frame(X, modalities, X.notna().sum(axis=1) > 8)
    table = display.table
    pools = table[table.iloc[:, 1:17].isna().all(axis=1)]
    assert table["n"].sum() == 900
    assert len(table) - len(pools) == 8
    assert 4 <= len(pools) <= 6
    assert pools["n"].max() < 0.3 * 900
    bounds = pools["pattern"].str.extract(r"other \((\d+) patterns?, (\d+)(?: to (\d+))? of 16\)")
    assert bounds[[0, 1]].notna().all(axis=None)
    low, high = bounds[1].astype(int), bounds[2].fillna(bounds[1]).astype(int)
    assert (low.to_numpy()[:-1] > high.to_numpy()[1:]).all()
    assert (display.pooled_shares.sum(axis=1).to_numpy() >= low.to_numpy()).all()
    assert (display.pooled_shares.sum(axis=1).to_numpy() <= high.to_numpy()).all()
    assert_nothing_is_cut(display.figure_)


def test_concentrated_patterns_are_drawn_for_four_rows_in_five():
    rng = np.random.default_rng(0)
    X = pd.DataFrame(np.ones((500, 6)), columns=list("abcdef"))
    X = X.mask(rng.random(X.shape) < [0.02, 0.02, 0.1, 0.2, 0.3, 0.4])
    display = MissingPatternDisplay.from_frame(X, {c: c for c in X})
    single = display.table[~display.table["pattern"].str.startswith("other")]
    assert single["share"].sum() >= 0.8
    few = MissingPatternDisplay.from_frame(X[["e", "f"]], {c: c for c in "ef"})
    assert not few.table["pattern"].str.startswith("other").any()


def test_words_that_fit():
    assert fitted("short", 10) == "short"
    assert fitted("a_column_without_any_space_in_it", 12, 1) == "a_col...n_it"
    assert fitted("one two three four five six", 9, 2) == "one two\nthree..."
    assert pattern_title("a+b", list("abc")) == "without c"
    assert pattern_title("a", list("abc")) == "only a"
    assert pattern_title("other (3 patterns)", list("abc")) == "other (3 patterns)"
    assert pattern_title("(none)", list("abc")) == "nothing present"


def boxes(figure, artists):
    figure.canvas.draw()
    return [artist.get_window_extent() for artist in artists]


def test_long_titles_of_patterns_are_whole_and_no_bar_runs_through_one():
    rng = np.random.default_rng(0)
    names = ["vital signs", "laboratory values", "discharge note", "chest radiograph", "drugs"]
    X = pd.DataFrame(rng.normal(size=(1500, 5))).mask(rng.random((1500, 5)) < 0.4)
    X.columns = [f"c{i}" for i in range(5)]
    p = rng.uniform(0.02, 0.6, 1500)
    display = PatternCalibrationDisplay.from_predictions(
        (rng.random(1500) < p).astype(int), p, X, dict(zip(names, X, strict=True)), min_count=20
    )
    assert_nothing_is_cut(display.figure_)
    titles = boxes(display.figure_, [ax.title for ax in display.axes_.values()])
    panels = boxes(display.figure_, [ax.patch for ax in display.axes_.values()])
    assert not any(a.overlaps(b) for a in titles for b in titles if a is not b)
    assert not any(title.overlaps(panel) for title in titles for panel in panels)
    for ax in display.axes_.values():
        (bars,) = ax.collections
        assert bars.get_clip_on()


def test_a_legend_covers_no_curve(model):
    X, y = case(seed=1)
    p = model.predict_proba(X)
    few = DecisionCurveDisplay.from_predictions(y, {"a": p, "b": p}, n_resamples=5)
    change = AttentionChangeDisplay.from_importances([1, 2], [2, 1], ["a", "b"])
    for ax in (few.ax_, change.ax_):
        box, panel, label = boxes(ax.figure, [ax.get_legend(), ax.patch, ax.xaxis.label])
        assert not box.overlaps(panel)
        assert not box.overlaps(label)
        assert_nothing_is_cut(ax.figure)
    one = DecisionCurveDisplay.from_predictions(y, p, thresholds=[0.2], n_resamples=5)
    assert {line.get_marker() for line in one.ax_.lines[:2]} == {"o"}  # a line would not be seen


def test_classes_differ_by_shape_too():
    rng = np.random.default_rng(0)
    y = np.arange(80) % 8
    display = EmbeddingDisplay.from_stages({"z": rng.normal(size=(80, 3))}, y, method="pca")
    ax = display.axes_["z"]
    shapes = {tuple(part.get_paths()[0].vertices.ravel()) for part in ax.collections[:7]}
    assert len(shapes) == 7
    looks = {
        (*part.get_paths()[0].vertices.ravel(), *part.get_facecolor()[0]) for part in ax.collections
    }
    assert len(looks) == 8
    box, panel = boxes(display.figure_, [ax.get_legend(), ax.patch])
    assert not box.overlaps(panel)
    assert_nothing_is_cut(display.figure_)


@pytest.mark.parametrize("n_visits", [12, 90])
def test_times_of_many_visits_do_not_overlap(n_visits):
    visits = np.repeat(np.arange(n_visits), 2)
    told = pd.DataFrame({"row": 0, "visit": visits, "time": (visits - n_visits) * 1234.56,
                         "feature": ["systolic blood pressure at home, left",
                                     "systolic blood pressure at home, right"] * n_visits,
                         "weight": 1.0})  # fmt: skip
    display = TimelineDisplay.from_explanation(told, unit="hours")
    ax = display.ax_
    labels = boxes(display.figure_, ax.get_xticklabels())
    assert len(labels) > 2
    assert not any(a.overlaps(b) for a, b in itertools.pairwise(labels))
    assert len({label.get_text() for label in ax.get_yticklabels()}) == 2
    assert_nothing_is_cut(display.figure_)
    own = told[told["feature"] == told["feature"].iloc[0]].copy()
    own.loc[own.index[-1], "time"] = own["time"].iloc[-2] + 0.001  # two visits in one minute
    bars = TimelineDisplay.from_explanation(own).ax_.patches
    assert min(bar.get_width() for bar in bars) > np.ptp(own["time"]) / 500
