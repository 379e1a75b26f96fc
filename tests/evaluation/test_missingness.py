"""Patterns are counted, rates covered, presence told from the rest and from nothing else."""

import decimal

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from scipy.stats import binomtest
from sklearn.model_selection import GroupKFold, KFold, ShuffleSplit

from ehrfuse.evaluation import _features as features
from ehrfuse.evaluation import outcome_by_pattern, presence_informativeness
from ehrfuse.evaluation._features import Rest, as_feature
from ehrfuse.evaluation.missingness import rate_interval

MODALITIES = {"vitals": ["hr", "bp"], "gas": "ph", "note": "note"}


def stays(n=400, seed=0, mnar=True):
    """Gas is drawn from the sick (mnar) or by lot; death follows severity."""
    rng = np.random.default_rng(seed)
    severity = rng.normal(size=n)
    X = pd.DataFrame(
        {
            "hr": 90 + 12 * severity + rng.normal(size=n),
            "bp": rng.normal(70, 10, n),
            "ph": 7.4 - 0.05 * severity,
            "note": np.where(rng.random(n) < 0.8, "stable overnight", None),
        }
    )
    drawn = severity > 0.3 if mnar else rng.random(n) < 0.4
    X["ph"] = X["ph"].where(drawn)
    return X, (rng.random(n) < 1 / (1 + np.exp(1.5 - 1.5 * severity))).astype(int)


# ---------------------------------------------------------------- rates


@pytest.mark.parametrize(("events", "n"), [(0, 7), (3, 10), (50, 50), (1, 1), (139, 1000)])
def test_interval_is_wilsons(events, n):
    labels = np.repeat([1.0, 0.0], [events, n - events])
    rate, lo, hi = rate_interval(labels, np.arange(n), 0.9)
    expected = binomtest(events, n).proportion_ci(0.9, method="wilson")
    assert rate == events / n
    assert (lo, hi) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_cluster_interval_covers_where_wilson_does_not():
    rng, covered, naive = np.random.default_rng(0), [], []
    for _ in range(400):
        groups = np.repeat(np.arange(50), rng.integers(1, 12, 50))
        risk = rng.beta(0.5, 1.5, 50)  # mean 1/4
        labels = (rng.random(len(groups)) < risk[groups]).astype(float)
        for kept, codes in ((covered, groups), (naive, np.arange(len(groups)))):
            _, lo, hi = rate_interval(labels, codes, 0.95)
            kept.append(lo <= 0.25 <= hi)
    assert 0.92 <= np.mean(covered) <= 0.985
    assert np.mean(naive) < 0.85


def test_cluster_interval_at_the_edges():
    ones = np.ones(12)
    one_patient = rate_interval(ones, np.zeros(12, dtype=int), 0.95)
    assert one_patient == pytest.approx((1, 0, 1))  # one patient says nothing
    six = rate_interval(ones, np.repeat(np.arange(6), 2), 0.95)
    twelve = rate_interval(ones, np.arange(12), 0.95)
    assert 0 < six[1] < twelve[1] < 1
    labels = np.tile([0.0, 1.0], 10)  # no patient differs from another
    alike = rate_interval(labels, np.repeat(np.arange(10), 2), 0.95)
    assert np.isfinite(alike).all()
    assert np.isnan(rate_interval(np.empty(0), np.empty(0, dtype=int), 0.95)).all()


# ---------------------------------------------------------------- outcome by pattern


def test_outcome_by_pattern_counts_every_row_once():
    X, died = stays()
    X.index = np.random.default_rng(1).integers(0, 9, len(X))  # repeated and shuffled
    before = X.copy()
    table = outcome_by_pattern(X, died, MODALITIES)
    assert list(table.columns) == [
        "pattern", "vitals", "gas", "note", "n", "share", "known", "rate", "lo", "hi",
    ]  # fmt: skip
    assert table["n"].sum() == len(X)
    assert table["share"].sum() == pytest.approx(1)
    assert table["n"].is_monotonic_decreasing
    for _, row in table.iterrows():
        inside = (X["ph"].notna() == row["gas"]) & (X["note"].notna() == row["note"])
        assert row["n"] == inside.sum()
        assert row["rate"] == pytest.approx(died[inside.to_numpy()].mean())
    weighted = np.average(table["rate"], weights=table["n"])
    assert weighted == pytest.approx(died.mean())
    pd.testing.assert_frame_equal(X, before)


def test_rare_patterns_are_pooled_with_null_flags():
    X, died = stays()
    X.loc[:2, "hr":"bp"] = np.nan
    full = outcome_by_pattern(X, died, MODALITIES)
    rare = full["n"] < 20
    table = outcome_by_pattern(X, died, MODALITIES, min_count=20)
    last = table.iloc[-1]
    assert rare.sum() > 1
    assert last["pattern"] == f"other ({rare.sum()} patterns)"
    assert last["n"] == full.loc[rare, "n"].sum()
    assert table[["vitals", "gas", "note"]].iloc[-1].isna().all()
    assert last["rate"] == pytest.approx(np.average(full["rate"][rare], weights=full["n"][rare]))
    assert table["n"].sum() == len(X)


def test_a_lone_rare_pattern_keeps_its_name():
    X = pd.DataFrame({"a": [1, 1, 1, None]})
    assert outcome_by_pattern(X, [0, 1, 0, 1], {"a": "a"}, min_count=2)["pattern"].tolist() == [
        "a",
        "(none)",
    ]


def test_unknown_outcomes_and_several_tasks():
    X, died = stays()
    gone = X["note"].isna().to_numpy()
    Y = pd.DataFrame({"death": died, "return": np.where(gone, np.nan, died)})
    table = outcome_by_pattern(X, Y, MODALITIES).set_index(["task", "pattern"])
    assert table.loc["death", "known"].sum() == len(X)
    assert table.loc[("return", "vitals"), "known"] == 0
    assert table.loc[("return", "vitals"), "n"] == table.loc[("death", "vitals"), "n"]
    assert table.loc[("return", "vitals"), ["rate", "lo", "hi"]].isna().all()


def test_groups_by_column_name_equal_groups_by_value():
    X, died = stays()
    X["patient"] = np.random.default_rng(0).integers(0, 60, len(X))
    named = outcome_by_pattern(X, died, MODALITIES, groups="patient")
    given = outcome_by_pattern(X, died, MODALITIES, groups=X["patient"].to_numpy())
    pd.testing.assert_frame_equal(named, given)
    assert not named["lo"].equals(outcome_by_pattern(X, died, MODALITIES)["lo"])


def test_one_row_and_one_class():
    X = pd.DataFrame({"a": [None], "b": [1.0]})
    table = outcome_by_pattern(X, [0], {"a": "a", "b": "b"})
    assert table.iloc[0][["pattern", "n", "rate"]].tolist() == ["b", 1, 0]


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"X": np.zeros((2, 2))}, TypeError, "X is a ndarray"),
        ({"X": pd.DataFrame({"a": []})}, ValueError, "X has no rows"),
        ({"X": pd.DataFrame([[1, 2]] * 2, columns=["a", "a"])}, ValueError, "more than once"),
        ({"y": None}, ValueError, "y is None"),
        ({"y": [0, 1, 1]}, ValueError, "y has 3 rows, but 2 are needed"),
        ({"modalities": {}}, ValueError, "modalities is empty"),
        ({"modalities": {"a": "drop"}}, ValueError, "modalities is empty"),
        ({"modalities": ["a"]}, TypeError, "modalities is a list"),
        ({"modalities": {"a": "b"}}, ValueError, r"needs columns \['b'\]"),
        ({"modalities": {"rate": "a"}}, ValueError, r"Modalities are named \['rate'\]"),
        ({"modalities": {"pattern": "a"}}, ValueError, r"Modalities are named \['pattern'\]"),
        ({"confidence": 95.0}, ValueError, "confidence"),
        ({"groups": [1]}, ValueError, "groups has 1 rows"),
    ],
)
def test_bad_input_gets_one_clear_sentence(change, error, match):
    good = {"X": pd.DataFrame({"a": [1.0, None]}), "y": [0, 1], "modalities": {"a": "a"}}
    with pytest.raises(error, match=match):
        outcome_by_pattern(**(good | change))


# ---------------------------------------------------------------- features


LISTS = [[{"time": -1.0, "code": "hr"}], None, [], [{"time": 0.0, "code": "hr"}] * 3]
EVENTS = pa.list_(pa.struct([("time", pa.float64()), ("code", pa.string())]))
LENGTHS = [1, np.nan, 0, 3]


@pytest.mark.parametrize(
    ("cells", "expected", "kind"),
    [
        (pd.Series(LISTS), LENGTHS, "length"),
        (pd.Series(LISTS, dtype=pd.ArrowDtype(EVENTS)), LENGTHS, "length"),
        (pd.Series([[1], None, [], [1, 2, 3]], dtype=pd.ArrowDtype(pa.large_list(pa.int64()))),
         LENGTHS, "length"),
        (pd.Series([np.zeros(1), None, np.zeros(0), np.zeros(3)]), LENGTHS, "length"),
        (pd.Series([[[1], [1, 2]], None, [], [[1]] * 3]), [2, np.nan, 0, 3], "length"),
        (pd.Series([{"a": 1}, None, {}, {"a": 1, "b": 2, "c": 3}]), LENGTHS, "length"),
        (pd.Series([1.5, np.nan, np.inf, 3]), [1.5, np.nan, np.inf, 3], "number"),
        (pd.Series([1, None, 0, 3], dtype="Int64"), LENGTHS, "number"),
        (pd.Series([1, None, 0, 3], dtype=pd.ArrowDtype(pa.int32())), LENGTHS, "number"),
        (pd.Series([True, None, False, True], dtype="boolean"), [1, np.nan, 0, 1], "number"),
        (pd.Series([True, None, False, True], dtype=pd.ArrowDtype(pa.bool_())),
         [1, np.nan, 0, 1], "number"),
        (pd.Series([True, None, False, True]), [1, np.nan, 0, 1], "number"),
        (pd.Series([decimal.Decimal(1), None, 0, 3]), LENGTHS, "number"),
        (pd.Series(["b", None, "a", "c"]), [1, np.nan, 0, 2], "category"),
        (pd.Series(["b", None, "a", "c"], dtype="category"), [1, np.nan, 0, 2], "category"),
        (pd.Series(["b", None, "a", "c"], dtype=pd.ArrowDtype(pa.string())),
         [1, np.nan, 0, 2], "category"),
        (pd.Series(pd.to_timedelta([1, None, 0, 3], unit="s")), LENGTHS, "number"),
        (pd.Series(pd.to_datetime([1, None, 0, 3], unit="s")), LENGTHS, "number"),
        (pd.Series(pd.to_datetime([1, None, 0, 3], unit="s", utc=True)), LENGTHS, "number"),
        (pd.Series(pd.to_datetime([1, None, 0, 3], unit="s"),
                   dtype=pd.ArrowDtype(pa.timestamp("us"))), LENGTHS, "number"),
    ],
)  # fmt: skip
def test_cells_of_every_kind_become_numbers(cells, expected, kind):
    values, found = as_feature(cells)
    np.testing.assert_array_equal(values, expected)
    assert found == kind


def test_many_valued_strings_become_lengths_and_strange_cells_nothing():
    text = pd.Series(["x" * k for k in range(features._MAX_LEVELS + 1)])
    values, kind = as_feature(text)
    assert kind == "length"
    np.testing.assert_array_equal(values, range(len(text)))
    assert as_feature(pd.Series([object(), object()])) is None
    assert as_feature(pd.Series([np.array(1.0), [1]], dtype=object)) is None


# ---------------------------------------------------------------- presence


def test_mnar_presence_is_told_from_the_rest():
    X, died = stays(mnar=True)
    table = presence_informativeness(X, MODALITIES, y=died, n_resamples=200, random_state=0)
    gas = table.loc["gas"]
    assert gas["share"] == X["ph"].notna().mean()
    assert gas["lo"] > 0.95
    assert gas["difference_lo"] > 0.1
    assert gas["difference"] == pytest.approx(gas["rate_present"] - gas["rate_absent"])
    assert table.loc["(all flags)", "lo"] > 0.6
    assert table.loc["vitals", "note"] == "one class only"
    assert table.loc["vitals", ["auroc", "lo", "hi", "difference"]].isna().all()


def test_mcar_presence_is_told_from_nothing():
    aurocs, differences = [], []
    for seed in range(6):
        X, died = stays(seed=seed, mnar=False)
        row = presence_informativeness(
            X, MODALITIES, y=died, confidence=0.99, n_resamples=200, random_state=seed
        ).loc["gas"]
        aurocs.append(row["auroc"])
        differences.append(row["difference_lo"] <= 0 <= row["difference_hi"])
    assert np.mean(aurocs) == pytest.approx(0.5, abs=0.04)
    assert sum(differences) >= 5


def test_one_mcar_interval_holds_one_half():
    X, _ = stays(n=600, seed=3, mnar=False)
    row = presence_informativeness(X, MODALITIES, n_resamples=200, random_state=0).loc["gas"]
    assert row["lo"] < 0.5 < row["hi"]


def test_difference_interval_is_newcombes():
    # Newcombe 1998, table II, example (a): 56/70 against 48/80, method 10.
    flags = np.repeat([1.0, np.nan], [70, 80])
    y = np.concatenate([np.repeat([1, 0], [56, 14]), np.repeat([1, 0], [48, 32])])
    X = pd.DataFrame({"a": flags, "b": 1.0})
    row = presence_informativeness(
        X, {"a": "a", "b": "b"}, y=y, n_resamples=10, random_state=0
    ).loc["a"]
    assert row["difference"] == pytest.approx(0.2)
    assert row["difference_lo"] == pytest.approx(0.0524, abs=5e-5)
    assert row["difference_hi"] == pytest.approx(0.3339, abs=5e-5)


def test_presence_model_never_sees_the_modalitys_own_columns():
    rng = np.random.default_rng(0)
    X = pd.DataFrame({"own": rng.normal(size=200), "twin": 1.0, "other": rng.normal(size=200)})
    X["own"] = X["own"].mask(rng.random(200) < 0.5)
    X["twin"] = X["own"] * 2
    modalities = {"a": ["own", "twin"], "shares": ["twin", "other"]}
    matrix, _ = Rest(X, modalities, None, ()).without("a")
    # Only the flag of `other` (always present) and `other` itself; nothing of `twin`.
    assert len(matrix) == 2
    np.testing.assert_array_equal(matrix[0], True)
    np.testing.assert_array_equal(matrix[1], X["other"])
    row = presence_informativeness(X, modalities, n_resamples=50, random_state=0).loc["a"]
    assert row["auroc"] < 0.65
    # The same column under another modality's name alone is the rest, and tells all.
    copied = {"a": "own", "copy": "twin"}
    row = presence_informativeness(X, copied, n_resamples=50, random_state=0).loc["a"]
    assert row["auroc"] > 0.99


@pytest.mark.parametrize("how", ["name", "series", "array", "exclude"])
def test_identifiers_are_never_features(how):
    rng = np.random.default_rng(0)
    patients = np.repeat(rng.permutation(60), 6)
    X = pd.DataFrame({"patient": patients, "hr": rng.normal(size=360), "ph": 7.4})
    X["ph"] = X["ph"].where(patients < 30)  # the number of the patient tells everything
    modalities = {"static": ["patient", "hr"], "gas": "ph"}
    options = {
        "name": {"groups": "patient"},
        "series": {"groups": X["patient"]},
        "array": {"groups": patients},
        "exclude": {"exclude": ["patient"]},
    }[how]
    run = {"n_resamples": 50, "random_state": 0}
    hidden = presence_informativeness(X, modalities, **options, **run).loc["gas", "auroc"]
    assert hidden < 0.75
    seen = presence_informativeness(X, modalities, **run).loc["gas", "auroc"]
    assert seen > 0.99


def test_columns_of_no_modality_are_not_used():
    X, _ = stays(mnar=False)
    X["ordered"] = X["ph"].notna()
    row = presence_informativeness(X, MODALITIES, n_resamples=50, random_state=0).loc["gas"]
    assert row["auroc"] < 0.65


def test_patients_stay_on_one_side_of_every_split():
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(60), 8)
    trait = rng.normal(size=60)[patients]  # names the patient, tells nothing else
    X = pd.DataFrame({"trait": trait, "ph": np.where((rng.random(60) < 0.5)[patients], 7.4, None)})
    modalities = {"static": "trait", "gas": "ph"}
    run = {"n_resamples": 50, "random_state": 0}
    grouped = presence_informativeness(X, modalities, groups=patients, **run).loc["gas"]
    mixed = presence_informativeness(X, modalities, **run).loc["gas"]
    assert mixed["auroc"] > 0.85
    assert grouped["auroc"] < 0.7


def test_interval_of_repeated_patients_is_that_of_patients():
    X, _ = stays(100)
    X["ph"] = X["ph"].mask(np.random.default_rng(0).random(100) < 0.4)
    repeated = X.loc[np.repeat(X.index, 6)]
    run = {"n_resamples": 300, "random_state": 0, "groups": np.repeat(np.arange(100), 6)}
    one = presence_informativeness(X, MODALITIES, **run | {"groups": np.arange(100)}).loc["gas"]
    six = presence_informativeness(repeated, MODALITIES, **run).loc["gas"]
    assert six["hi"] - six["lo"] > 0.6 * (one["hi"] - one["lo"])  # not 1 / sqrt(6)


def test_splitters_and_repeatability():
    X, died = stays(200)
    run = {"y": died, "n_resamples": 50}
    first = presence_informativeness(X, MODALITIES, random_state=1, **run)
    pd.testing.assert_frame_equal(
        first, presence_informativeness(X, MODALITIES, random_state=1, **run)
    )
    groups = np.repeat(np.arange(50), 4)
    table = presence_informativeness(
        X, MODALITIES, groups=groups, cv=GroupKFold(3), random_state=0, n_resamples=50
    )
    assert table.loc["gas", "auroc"] > 0.9
    plain = presence_informativeness(X, MODALITIES, cv=KFold(3), random_state=0, n_resamples=50)
    assert plain.loc["gas", "auroc"] > 0.9
    with pytest.raises(ValueError, match="does not hold out every row exactly once"):
        presence_informativeness(X, MODALITIES, cv=ShuffleSplit(2, random_state=0))


def test_cells_of_every_kind_in_one_frame():
    X, died = stays(120)
    n = len(X)
    rng = np.random.default_rng(0)
    X["events"] = [LISTS[k] for k in rng.integers(0, 4, n)]
    X["arrow"] = pd.Series([LISTS[k] for k in rng.integers(0, 4, n)], dtype=pd.ArrowDtype(EVENTS))
    X["ward"] = pd.Series(rng.choice(["icu", "ed", None], n), dtype="category")
    X["age"] = pd.Series(rng.integers(20, 90, n), dtype=pd.ArrowDtype(pa.int64()))
    X["vector"] = [np.zeros(8) if keep else None for keep in rng.random(n) < 0.5]
    X.index = rng.integers(0, 5, n)
    modalities = MODALITIES | {
        "events": "events", "arrow": "arrow", "static": ["ward", "age"], "vector": "vector",
        "unused": "drop",
    }  # fmt: skip
    before = X.copy(deep=True)
    table = presence_informativeness(X, modalities, y=died, cv=3, n_resamples=20, random_state=0)
    assert table.index.tolist() == [*list(modalities)[:-1], "(all flags)"]
    assert table.loc[["gas", "note", "events", "arrow", "vector"], "auroc"].between(0, 1).all()
    assert X.equals(before) or X.astype(str).equals(before.astype(str))


def test_no_crash_where_nothing_can_be_told():
    run = {"n_resamples": 10, "random_state": 0}
    one = presence_informativeness(pd.DataFrame({"a": [1.0], "b": [None]}), {"a": "a", "b": "b"})
    assert one["note"].tolist() == ["one class only"] * 2
    X = pd.DataFrame({"a": [1.0, None, 1.0, None]})
    alone = presence_informativeness(X, {"a": "a"}, **run)
    assert alone.loc["a", "note"] == "nothing else varies"
    X = pd.DataFrame({"a": [1.0, None, None, None], "b": [1.0, 2.0, 3.0, 4.0]})
    rare = presence_informativeness(X, {"a": "a", "b": "b"}, y=[np.nan] * 4, **run)
    assert rare.loc["a", "note"] == "only one row in a class"
    assert rare.loc["(all flags)", "note"] == "nothing is known"
    grouped = presence_informativeness(X, {"a": "a", "b": "b"}, groups=[0, 1, 1, 1], **run)
    assert grouped.loc["a", "note"] == "only one group in a class"
    two = presence_informativeness(
        pd.DataFrame({"a": [1.0, 1.0, None, None], "b": [1.0, 2.0, 3.0, None]}),
        {"a": "a", "b": "b"}, y=[0, 1, 0, 1], **run,
    )  # fmt: skip
    assert np.isfinite(two.loc["a", "auroc"])
    same = presence_informativeness(X[["b"]], {"b": "b"}, y=[0, 1, 0, 1], **run)
    assert same.loc["(all flags)", "note"] == "nothing else varies"


def test_string_outcome_and_unknown_labels():
    X, died = stays(200)
    named = pd.Series(np.where(died == 1, "dead", "alive"), dtype=object)
    named[:20] = None
    table = presence_informativeness(X, MODALITIES, y=named, n_resamples=20, random_state=0)
    drawn = X["ph"].notna().to_numpy()[20:]
    assert table.loc["gas", "rate_present"] == pytest.approx(died[20:][drawn].mean())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"y": np.zeros((400, 2))}, "y has 2 tasks; pass one outcome at a time"),
        ({"y": [0, 1]}, "y has 2 rows, but 400 are needed"),
        ({"exclude": ["patient"]}, r"exclude names \['patient'\]"),
        ({"groups": "patient"}, "groups='patient' names no column"),
        ({"cv": 1}, "cv"),
        ({"n_resamples": 0}, "n_resamples"),
        ({"confidence": 0.0}, "confidence"),
    ],
)
def test_presence_names_what_is_wrong(change, match):
    X, _ = stays()
    options = {"n_resamples": 10, "cv": 2, "random_state": 0} | change
    with pytest.raises(ValueError, match=match):
        presence_informativeness(X, MODALITIES, **options)


# ---------------------------------------------------------------- real stays


PANELS = {
    "bedside vitals": ["HR", "Temp", "NISysABP"],
    "arterial line": ["SysABP", "DiasABP", "MAP"],
    "blood gas": ["pH", "PaCO2", "PaO2"],
    "liver panel": ["ALT", "AST", "Bilirubin"],
    "lactate": ["Lactate"],
}


def test_ordering_is_informative_in_real_stays(shared_data):
    folder = shared_data / "physionet-2012"
    long = pd.read_parquet(folder / "set-a.parquet")
    long["variable"] = long["variable"].astype(str)
    wanted = [name for names in PANELS.values() for name in names]
    outcome = pd.read_csv(folder / "Outcomes-a.txt").set_index("RecordID")["In-hospital_death"]
    X = long[long["variable"].isin(wanted)].groupby(["RecordID", "variable"])["value"].mean()
    X = X.unstack().reindex(outcome.index)
    table = outcome_by_pattern(X, outcome, PANELS, min_count=50)
    assert table["n"].sum() == 4000
    assert np.average(table["rate"], weights=table["n"]) == pytest.approx(0.1385)
    assert table["lo"].max() > 0.1385 > table["hi"].min()
    told = presence_informativeness(X, PANELS, y=outcome, cv=2, n_resamples=50, random_state=0)
    assert told.loc["lactate", "lo"] > 0.7
    assert told.loc["lactate", "difference_lo"] > 0.04  # who gets a lactate dies more often
    assert told.loc["(all flags)", "lo"] > 0.6
