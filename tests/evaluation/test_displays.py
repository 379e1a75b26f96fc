"""The picture shows the table: bars, dots, totals, rates; nothing is cut off."""

from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from ehrfuse.evaluation import MissingPatternDisplay, outcome_by_pattern

MODALITIES = {"vitals": "hr", "blood gas": "ph", "note": "note", "film": "film"}


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def frame(n=300, seed=0, columns=("hr", "ph", "note", "film")):
    rng = np.random.default_rng(seed)
    X = pd.DataFrame(rng.normal(size=(n, len(columns))), columns=list(columns))
    holes = rng.random(X.shape) < np.linspace(0.05, 0.7, len(columns))
    return X.mask(holes), pd.Series((rng.random(n) < 0.2).astype(int), name="in-hospital death")


def test_picture_shows_the_table():
    X, died = frame()
    display = MissingPatternDisplay.from_frame(X, MODALITIES, died, max_patterns=20)
    table = outcome_by_pattern(X, died, MODALITIES)
    pd.testing.assert_frame_equal(display.table, table)
    counts, rates = display.axes_["counts"], display.axes_["rates"]
    assert [bar.get_height() for bar in counts.patches] == table["n"].tolist()
    np.testing.assert_allclose(rates.containers[0].lines[0].get_ydata(), table["rate"])
    reference = rates.lines[0].get_ydata()
    np.testing.assert_allclose(reference, died.mean())
    totals = [bar.get_width() for bar in display.axes_["totals"].patches]
    np.testing.assert_allclose(totals, [X[c].notna().mean() for c in MODALITIES.values()])
    names = [label.get_text() for label in display.axes_["patterns"].get_yticklabels()]
    assert names == list(MODALITIES)
    assert counts.get_ylabel() == "stays"
    assert "in-hospital death" in rates.get_title(loc="left")


def test_dots_are_the_flags():
    X, _ = frame()
    display = MissingPatternDisplay.from_frame(X, MODALITIES, max_patterns=20)
    flags = display.table[list(MODALITIES)].to_numpy(dtype=bool)
    drawn = np.zeros_like(flags)
    for dots in display.axes_["patterns"].collections:
        if to_hex(dots.get_facecolor()[0]) == "#222222":
            for column, row in dots.get_offsets():
                drawn[int(column), int(row)] = True
    np.testing.assert_array_equal(drawn, flags)


def test_no_outcome_no_rates():
    X, died = frame()
    assert "rates" not in MissingPatternDisplay.from_frame(X, MODALITIES).axes_
    unknown = MissingPatternDisplay.from_frame(X, MODALITIES, died.astype(float) * np.nan)
    assert "rates" not in unknown.axes_


def test_long_tail_is_pooled():
    X, died = frame()
    full = outcome_by_pattern(X, died, MODALITIES)
    display = MissingPatternDisplay.from_frame(X, MODALITIES, died, max_patterns=4)
    assert len(display.table) == 5
    assert display.table["pattern"].iloc[-1] == f"other ({len(full) - 4} patterns)"
    assert display.table["n"].iloc[-1] == full["n"][4:].sum()
    ticks = [label.get_text() for label in display.axes_["patterns"].get_xticklabels()]
    assert ticks[-1] == f"other\n({len(full) - 4} patterns)"
    colours = [to_hex(bar.get_facecolor()) for bar in display.axes_["counts"].patches]
    assert len(set(colours[:-1])) == 1
    assert colours[-1] != colours[0]


def test_task_is_chosen_by_name():
    X, died = frame()
    Y = pd.DataFrame({"death": died, "return": 1 - died})
    display = MissingPatternDisplay.from_frame(X, MODALITIES, Y, task="return")
    assert display.overall_rate == pytest.approx(1 - died.mean())
    assert display.outcome == "return"
    one = MissingPatternDisplay.from_frame(X, MODALITIES, Y[["death"]])
    assert one.outcome == "death"
    with pytest.raises(ValueError, match=r"task=None is no column of y.*'death', 'return'"):
        MissingPatternDisplay.from_frame(X, MODALITIES, Y)


@pytest.mark.parametrize(
    "estimator",
    [
        SimpleNamespace(modalities=MODALITIES),
        SimpleNamespace(modalities=None, modalities_=MODALITIES),
        SimpleNamespace(modalities=None, estimator=SimpleNamespace(modalities=MODALITIES)),
    ],
)
def test_from_estimator_reads_its_modalities(estimator):
    X, died = frame()
    display = MissingPatternDisplay.from_estimator(estimator, X, died, max_patterns=20)
    pd.testing.assert_frame_equal(display.table, outcome_by_pattern(X, died, MODALITIES))


def test_estimator_without_modalities_is_told():
    with pytest.raises(ValueError, match="names no modalities; give them"):
        MissingPatternDisplay.from_estimator(SimpleNamespace(), frame()[0])


def test_bad_numbers_are_told():
    with pytest.raises(ValueError, match="max_patterns"):
        MissingPatternDisplay.from_frame(frame()[0], MODALITIES, max_patterns=0)


@pytest.mark.parametrize(
    ("n", "n_modalities", "outcome", "unit"),
    [
        (500, 12, "in-hospital death", "stays"),
        (500, 2, "in-hospital death", "stays"),
        (1, 1, "died", "ICU admissions"),
        (200, 3, "death or unplanned return to intensive care within thirty days", "admissions"),
        (200, 3, None, "stays"),
    ],
)
def test_no_text_is_cut_off(n, n_modalities, outcome, unit):
    columns = [f"panel number {k}" for k in range(n_modalities)]
    X, died = frame(n, columns=columns)
    died = None if outcome is None else died.rename(outcome)
    display = MissingPatternDisplay.from_frame(X, dict(zip(columns, columns, strict=True)), died,
                                               unit=unit)  # fmt: skip
    drawn = display.figure_.get_tightbbox()
    width, height = display.figure_.get_size_inches()
    assert -0.01 <= drawn.x0 < drawn.x1 <= width + 0.01
    assert -0.01 <= drawn.y0 < drawn.y1 <= height + 0.01


def test_draws_into_a_given_figure_again_and_without_pyplot():
    X, died = frame()
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subfigures(1, 2)
    display = MissingPatternDisplay.from_frame(X, MODALITIES, died, max_patterns=5, figure=left)
    assert display.figure_ is left
    assert display.plot(figure=right) is display
    assert display.figure_ is right
    figure.canvas.draw()
    assert plt.get_fignums() == []


def test_smallest_letters_can_be_read():
    X, died = frame()
    display = MissingPatternDisplay.from_frame(X, MODALITIES, died, max_patterns=5)
    texts = [
        text
        for ax in display.figure_.axes
        for text in [*ax.texts, *ax.get_xticklabels(), *ax.get_yticklabels()]
    ]
    sizes = [text.get_fontsize() for text in texts if text.get_text()]
    assert min(sizes) >= 9
