"""What is true of the text for MEDFuse: columns keep their names, headings, ranges, numbers."""

import time

import numpy as np
import pandas as pd
import pytest
from sklearn import config_context
from sklearn.compose import ColumnTransformer
from sklearn.pipeline import make_pipeline

from ehrfuse import Labs, LabTextifier, MEDFuseClassifier, NoteSectionizer, Text

TINY = {"d_model": 8, "n_members": 2, "width": 16, "lab_layers": 1, "max_epochs": 1,
        "random_state": 0}  # fmt: skip
RANGES = {"sodium": (135, 145), "lactate": (0.5, 2.0)}


def frame(n=4):
    rng = np.random.default_rng(0)
    return pd.DataFrame({
        "died": rng.integers(0, 2, n), "sodium": rng.normal(140, 9, n), "note": ["Fever."] * n,
        "lactate": rng.normal(2, 1, n), "subject": np.arange(n) // 2,
    })  # fmt: skip


def labs(**options):
    return LabTextifier(["sodium", "lactate"], reference_ranges=RANGES, **options)


def texts(X, **options):
    return LabTextifier(**options).fit_transform(X)["lab_text"].tolist()


def kept(note, **options):
    return NoteSectionizer(**options).fit_transform(pd.DataFrame({"note": [note]}))["note"][0]


# ---------------------------------------------------------------- columns


@pytest.mark.parametrize("setting", [None, "default", "pandas", "config"])
@pytest.mark.parametrize("make", [labs, NoteSectionizer])
def test_columns_are_those_of_fit_in_its_order_and_keep_their_names(make, setting):
    X = frame()
    step = make().set_output(transform=None if setting == "config" else setting)
    with config_context(transform_output="pandas" if setting == "config" else "default"):
        expected = step.fit_transform(X)
        assert list(expected) == list(step.get_feature_names_out())
        assert list(expected)[:5] == list(X)
        for other in (X[list(X)[::-1]], X.assign(more=1)[["more", *X]]):
            pd.testing.assert_frame_equal(step.transform(other), expected)
        without = step.transform(X.drop(columns=["died", "subject"])[::-1])
    pd.testing.assert_frame_equal(without, expected.drop(columns=["died", "subject"])[::-1])


def test_a_column_of_the_name_of_the_output_is_replaced_in_place():
    X = frame()
    X.insert(1, "lab_text", "old")
    step = labs().fit(X)
    out = step.transform(X)
    assert list(out) == list(X) == list(step.get_feature_names_out())
    assert "old" not in set(out["lab_text"])
    pd.testing.assert_frame_equal(step.transform(X.drop(columns="lab_text")), out)
    later = labs().fit(frame()).transform(X)
    assert list(later) == [*frame(), "lab_text"]


def test_the_result_is_a_frame_of_its_own():
    X = frame()
    before = X.copy()
    out = labs().fit(X).transform(X.assign(more=1))
    out["sodium"] = 0.0
    pd.testing.assert_frame_equal(X, before)
    with pytest.raises(ValueError, match="transform='polars' is not known; choose one of"):
        labs().set_output(transform="polars")


def test_a_subclass_keeps_the_names_too():
    class Own(LabTextifier):
        def transform(self, X):
            return super().transform(X)

    X = frame()
    step = Own(["sodium"]).set_output(transform="pandas").fit(X)
    assert list(step.transform(X.drop(columns="died"))) == [*list(X)[1:], "lab_text"]


@pytest.mark.parametrize("setting", ["default", "pandas"])
def test_a_pipeline_predicts_without_columns_that_nobody_reads(setting):
    X = frame(40)
    modalities = {"labs": Labs(["sodium", "lactate"]), "text": Text("lab_text")}
    model = make_pipeline(labs(), MEDFuseClassifier(modalities, groups="subject", **TINY))
    model.set_output(transform=setting).fit(X, X["died"])
    expected = model.predict_proba(X)
    for other in (X[list(X)[::-1]], X.assign(more=1), X.drop(columns=["died", "note"])):
        np.testing.assert_array_equal(model.predict_proba(other), expected)


def test_names_in_a_column_transformer():
    parts = ColumnTransformer([("text", labs(), ["sodium", "lactate"])], remainder="drop")
    out = parts.set_output(transform="pandas").fit(frame()).transform(frame())
    assert list(out) == ["text__sodium", "text__lactate", "text__lab_text"]


def test_the_column_of_notes_must_be_there_at_fit():
    with pytest.raises(ValueError, match="X has no column 'text'; name the column"):
        NoteSectionizer("text").fit(frame())


# ---------------------------------------------------------------- hidden terms


@pytest.mark.parametrize("gap", [" ", "  ", "\n", "\r\n", " \n\t ", "\N{NO-BREAK SPACE}"])
def test_terms_are_hidden_over_any_white_space(gap):
    note = f"Has Heart{gap}Failure today, heartfailure, heart failures"
    out = kept(note, hide_terms=("heart  failure", "heart", "", " "))
    assert out == "Has  today, heartfailure,  failures"


def test_empty_terms_hide_nothing():
    assert kept("a b, c", hide_terms=("", "  ")) == "a b, c"


# ---------------------------------------------------------------- headings


@pytest.mark.parametrize("heading", [
    "Hospital Course (ICU):", "Hospital Course (ICU, 10:30 - 11:30):", "* Hospital Course:",
    "- Hospital Course:", "\N{BULLET} Hospital Course:", "#Hospital Course:", "## Hospital Course:",
    "1. Hospital Course:", "2) Hospital Course:", "(3) Hospital Course:", "IV. Hospital Course:",
    "Hospital Course by #problem:", "Discharge Dx 1:", "Discharge Dx #1:", "**Hospital Course:**",
    "**Hospital Course**:", "__Hospital Course__ :", "[Hospital Course]:", "HOSPITAL COURSE:",
    "HOSPITAL COURSE, ICU:", "Hospital Course, by problem:", "Hosp. Course:", "D/C Diagnosis:",
    "Hospital Course (ICU:", "[10:30] Hospital Course:", "24 Hour Events:",
    "[**Hospital1**] Course:",
    "CONDITION OF THE PATIENT AT THE TIME OF DISCHARGE:", "FINDINGS, IMPRESSION:",
    "Discharge Dx 1:2",
])  # fmt: skip
def test_sections_that_are_not_wanted_are_left_out(heading):
    note = f"Medical History: stroke\n{heading} he died\nChief Complaint: pain"
    assert kept(note) == "Medical History: stroke\nChief Complaint: pain"
    assert kept(f"{heading} he died") == ""
    assert kept(note, sections=()) == note


@pytest.mark.parametrize("line", [
    "In the ED, vitals were: BP 120", "In ED, VS: BP 120", "On arrival, BP: 120",
    "Seen at 10:30", "He has pain. Vitals: 98", "stable with bp: 120",
    "See http://example.org", "He was seen by his doctor twice this week for: pain",
])  # fmt: skip
def test_sentences_are_no_headings(line):
    note = f"Present Illness: A man.\n{line}\nHe had pain."
    assert kept(note + "\nHospital Course: he died") == note


@pytest.mark.parametrize("note", ["In the ED, vitals were: BP 120", "Seen at 10:30", "", "plain"])
def test_a_note_of_unknown_layout_stays_whole(note):
    assert kept(note) == note


def test_notes_with_other_headings_alone_are_empty_and_null_stays_null():
    X = pd.DataFrame({"note": ["Hospital Course: he died", None, "Plan: home\nDiagnosis: flu"]})
    assert NoteSectionizer().fit_transform(X)["note"].tolist() == ["", None, ""]


def test_notes_in_small_letters_have_headings_too():
    note = "medical history: stroke\nhospital course: he died"
    assert kept(note) == "medical history: stroke"
    mixed = "Hospital Course: he died\nmedical history: stroke\nPlan: home"
    assert kept(mixed) == "medical history: stroke"


@pytest.mark.parametrize("section", ["Chief Complaint:", " chief  complaint ", "CHIEF COMPLAINT :"])
def test_sections_match_with_a_colon_and_spaces(section):
    note = "Chief Complaint: pain\nPlan: home\n1. Chief  complaint (ED): fever"
    assert kept(note, sections=(section,)) == (
        "Chief Complaint: pain\n1. Chief  complaint (ED): fever"
    )


def test_a_section_named_with_its_brackets_is_that_one_alone():
    note = "Labs (admission): a\nLabs (discharge): b\nOne, two; three. Four: c"
    assert kept(note, sections=("Labs (admission)",)) == ("Labs (admission): a")
    assert kept(note, sections=("one, two; three. four",)) == "One, two; three. Four: c"


@pytest.mark.parametrize("line", ["-" * 50_000, "(" * 50_000, "[(" * 25_000, "A " * 25_000])
def test_long_lines_take_no_time(line):
    start = time.perf_counter()
    assert kept(line) == line
    assert time.perf_counter() - start < 2


# ---------------------------------------------------------------- labs: parameters


@pytest.mark.parametrize(("columns", "X"), [([], frame()), (None, frame()[["note"]])])
def test_no_column_is_refused(columns, X):
    with pytest.raises(ValueError, match=r"columns=.* finds no numeric column in X; name one at"):
        LabTextifier(columns).fit(X)


def test_one_str_is_one_column_and_none_is_named_twice():
    X = pd.DataFrame({"na": [120.0], "n": [1.0], "a": [1.0]})
    assert LabTextifier("na").fit(X).columns_ == ["na"]
    with pytest.raises(ValueError, match="names a column twice; name every column once"):
        LabTextifier(["na", "na"]).fit(X)


@pytest.mark.parametrize("kind", ["timedelta64[ns]", "duration[ns][pyarrow]"])
def test_durations_are_no_labs(kind):
    X = pd.DataFrame({"a": [1.0, 2.0], "stay": pd.to_timedelta([1, 2], "D")})
    assert LabTextifier().fit(X.astype({"stay": kind})).columns_ == ["a"]


@pytest.mark.parametrize(("bounds", "expected"), [
    ((None, 145), ["", "Abnormal results: a 160 high (<145)."]),
    ((-np.inf, 145), ["", "Abnormal results: a 160 high (<145)."]),
    ((135, None), ["Abnormal results: a 120 low (>135).", ""]),
    ([135, np.inf], ["Abnormal results: a 120 low (>135).", ""]),
    ((None, None), ["", ""]),
])  # fmt: skip
def test_ranges_may_be_open(bounds, expected):
    assert texts(pd.DataFrame({"a": [120.0, 160.0]}), reference_ranges={"a": bounds}) == expected


def test_open_ranges_are_measured_by_their_bound():
    X = pd.DataFrame({"sodium": [150.0], "troponin": [0.4], "platelets": [100.0]})
    ranges = {"sodium": (None, 145), "troponin": (None, 0.04), "platelets": (150, None)}
    assert texts(X, reference_ranges=ranges) == [
        "Abnormal results: troponin 0.4 high (<0.04); platelets 100 low (>150); "
        "sodium 150 high (<145)."
    ]


@pytest.mark.parametrize("bounds", [(1, 2, 3), (1,), "ab", 5, None, ("1", "2")])
def test_what_is_no_range_is_refused(bounds):
    with pytest.raises(ValueError, match=r"reference_ranges\['a'\] is .*must be a pair of numbers"):
        LabTextifier(reference_ranges={"a": bounds}).fit(pd.DataFrame({"a": [1.0]}))


@pytest.mark.parametrize("bounds", [(2, 1), (np.nan, 1), (np.inf, np.inf), (-np.inf, -np.inf)])
def test_ranges_without_an_inside_are_refused(bounds):
    with pytest.raises(ValueError, match="the lowest normal value comes first"):
        LabTextifier(reference_ranges={"a": bounds}).fit(pd.DataFrame({"a": [1.0]}))


# ---------------------------------------------------------------- labs: numbers


@pytest.mark.parametrize(("value", "expected"), [
    (123456, "123456"), (123456.7, "123457"), (9999.6, "9999.6"), (99999.5, "99999.5"),
    (1234.56, "1235"), (6.1, "6.1"), (128.0, "128"), (0.2, "0.2"), (1e-4, "0.0001"),
    (0.00012346, "0.0001235"), (-20000.0, "-20000"), (1e15, "1000000000000000"),
    (123456789012.0, "123456789012"), (0.0, "0"), (2.5e16, "2.5e+16"), (3e-7, "3e-07"),
])  # fmt: skip
def test_numbers_are_written_plainly(value, expected):
    options = {"reference_ranges": {"a": (None, None)}, "abnormal_only": False}
    assert texts(pd.DataFrame({"a": [float(value)]}), **options) == [
        f"Normal results: a {expected}."
    ]


@pytest.mark.parametrize("bound", [123456.6, 99999.9, 145.0, 1e15, 1e-4, 0.3])
def test_a_value_beyond_a_bound_never_reads_as_the_bound(bound):
    above = np.nextafter(bound, np.inf)
    (text,) = texts(pd.DataFrame({"a": [above]}), reference_ranges={"a": (None, bound)})
    value, limit = text.removeprefix("Abnormal results: a ").removesuffix(").").split(" high (<")
    assert float(value) > float(limit)
    assert "e" not in value + limit


@pytest.mark.parametrize(
    "between",
    ["\n2.1. ", "\n1.2.3) ", "\nXVIII. ", "\r", "\r\n", "\u2028", "\x85", "\n- 2) "],
)
@pytest.mark.parametrize("colon", [":", "\uff1a"])
def test_numbered_headings_and_odd_line_ends(between, colon):
    note = f"Chief Complaint{colon} pain{between}Hospital Course{colon} he died"
    X = pd.DataFrame({"note": [note, note.replace("Chief", "1.1. Chief", 1)]})
    for kept in NoteSectionizer().fit_transform(X)["note"]:
        assert kept.endswith("Chief Complaint: pain")


def test_columns_may_have_names_that_are_no_words():
    X = pd.DataFrame({0: ["Chief Complaint: pain"], 1: [5.0]})
    assert NoteSectionizer(0).fit_transform(X)[0].tolist() == ["Chief Complaint: pain"]
    text = LabTextifier([1], output=3, reference_ranges={1: (1, 2)}, names={1: "a"}).fit(X)
    assert text.transform(X)[3].tolist() == ["Abnormal results: a 5 high (1-2)."]
    assert text.n_features_in_ == 2
