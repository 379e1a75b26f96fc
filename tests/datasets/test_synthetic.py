"""The simulator's oracle is the truth: recomputed from the cells, calibrated, unbeaten."""

import time

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

import ehrfuse.datasets._simulated as cells
import ehrfuse.datasets.synthetic as source
from ehrfuse._patterns import pattern_labels, presence
from ehrfuse.datasets import make_ehr, read_parquet, write_parquet

NODES = np.linspace(-7, 7, 701)  # finer and wider than the simulator's own


@pytest.fixture(scope="module")
def mnar():
    return make_ehr(30_000, rows_per_patient=1, random_state=0, as_bunch=True)


def nodes_of(X):
    """Log-likelihood of everything in the rows of X, cell by cell with scipy's distributions."""
    return np.array([row_likelihood(row) for row in X.to_dict("records")])


def normal(x, loading):
    return stats.norm.logpdf(x, loading * NODES, np.sqrt(1 - loading**2))


def row_likelihood(row):
    known = normal((row["age"] - 61) / 12, source.AGE_LOADING)
    if not pd.isna(row["heart_rate"]):
        known = known + normal((row["heart_rate"] - 86) / 13, 0.4)
    for name, (centre, spread, loading, logarithmic) in cells.LABS.items():
        if not pd.isna(row[name]):
            x = np.log(row[name]) if logarithmic else row[name]
            known = known + normal((x - centre) / spread, loading)
    if isinstance(row["events"], list):
        known = known + stream_likelihood(row["events"])
    if isinstance(row["visits"], list):
        known = known + visits_likelihood(row["visits"])
    if isinstance(row["note"], str) and row["note"]:
        known = known + note_likelihood(row["note"])
    if isinstance(row["image"], np.ndarray):
        known = known + film_likelihood(row["image"])
    if isinstance(row["cxr"], np.ndarray):
        known = known + sum(normal(x, b) for x, b in zip(row["cxr"], cells.EMBEDDING, strict=True))
    return known


def stream_likelihood(events):
    name, level, slope = cells.DRUG
    given = sum(event["code"] == name for event in events)
    rate = np.exp(level + slope * NODES)
    if not events:
        mean = sum(how_many for *_, how_many in cells.STREAM.values())
        return np.log(cells.SILENT + (1 - cells.SILENT) * stats.poisson.pmf(0, mean + rate))
    known = stats.poisson.logpmf(given, rate)
    for event in events:
        if event["code"] == name:
            assert event["value"] is None
            continue
        centre, spread, start, rise, _ = cells.STREAM[event["code"]]
        loading = start + rise * (1 + event["time"] / 24)
        known = known + normal((event["value"] - centre) / spread, loading)
    return known


def visits_likelihood(visits):
    known = np.zeros_like(NODES)
    for visit in visits:
        for name, (centre, spread, loading) in cells.VISIT_FIELDS.items():
            if visit[name] is not None:
                known = known + normal((visit[name] - centre) / spread, loading)
        for code, (level, slope) in cells.DIAGNOSES.items():
            chance = expit(level + slope * NODES)
            known = known + stats.bernoulli.logpmf(int(code in visit["codes"]), chance)
    return known


def note_likelihood(note):
    closing = next(c for c in cells.CLOSINGS if note.endswith(c))
    opening = next(o for o in cells.OPENINGS if note.startswith(o))
    said = note.removeprefix(opening).removesuffix(closing).strip(" .").lower().split(", ")
    weights = {p: np.exp(0.45 * NODES) for p in cells.ALARMING}
    weights |= {p: np.exp(-0.45 * NODES) for p in cells.REASSURING}
    weights |= {p: np.ones_like(NODES) for p in cells.NEUTRAL}
    return sum(np.log(weights[phrase] / sum(weights.values())) for phrase in said)


def film_likelihood(film):
    assert film.shape == cells.IMAGE_SHAPE
    assert film.dtype == np.uint8
    known = np.zeros_like(NODES)
    pixel = stats.norm(cells.GREY + cells.NOISE * cells.OPACITY * NODES, cells.NOISE)
    for grey in film[cells._opacity()]:
        low = -np.inf if grey == 0 else grey - 0.5
        high = np.inf if grey == 255 else grey + 0.5
        known = known + np.log(pixel.cdf(high) - pixel.cdf(low))
    return known


def by_hand(X, with_pattern, present, strength, rate, prevalence=0.3):
    known = nodes_of(X) - NODES**2 / 2
    if with_pattern:
        for name, slope in source.PRESENCE_SLOPES.items():
            level = source._solve(1 - rate, strength * slope)
            chance = expit(level + strength * slope * NODES)
            there = present[name].to_numpy()[:, None]
            known += np.log(np.where(there, chance, 1 - chance))
    posterior = np.exp(known - known.max(axis=1, keepdims=True))
    posterior /= posterior.sum(axis=1, keepdims=True)
    level, beta, gamma = source._task(0, prevalence)
    risk = expit(level + beta * NODES + gamma * ((X[["age"]].to_numpy() - 61) / 12))
    return (posterior * risk).sum(axis=1)


def standard_error(p):
    """Of a sum of outcomes whose chances are p."""
    return np.sqrt((p * (1 - p)).sum())


# ---------------------------------------------------------------- the oracle


def test_the_oracle_follows_from_the_cells_of_x():
    data = make_ehr(250, random_state=3, as_bunch=True)
    assert (data.X["events"].list.len() == 0).any()
    expected = by_hand(data.X, True, data.present, 1.0, 0.3)
    np.testing.assert_allclose(data.oracle, expected, atol=2e-6)
    expected = by_hand(data.X, False, data.present, 1.0, 0.3)
    np.testing.assert_allclose(data.oracle_no_pattern, expected, atol=2e-6)


def test_the_oracle_is_calibrated_overall_and_by_decile(mnar):
    assert abs((mnar.y - mnar.oracle).sum()) < 3 * standard_error(mnar.oracle)
    decile = pd.qcut(mnar.oracle, 10, labels=False)
    z = [
        (mnar.y - mnar.oracle)[decile == k].sum() / standard_error(mnar.oracle[decile == k])
        for k in range(10)
    ]
    assert stats.chi2.sf(np.sum(np.square(z)), 10) > 0.001


def test_the_oracle_is_calibrated_in_every_pattern_and_without_the_pattern_it_is_not(mnar):
    def misfit(p):
        frame = pd.DataFrame({"error": mnar.y - p, "variance": p * (1 - p)})
        sums = frame.groupby(pattern_labels(mnar.present)).sum()
        z = sums["error"] / np.sqrt(sums["variance"])
        return stats.chi2.sf((z**2).sum(), len(z)), z.abs().max()

    p_value, largest = misfit(mnar.oracle)
    assert p_value > 0.001
    assert largest < 4  # the largest of 64
    assert misfit(mnar.oracle_no_pattern)[0] < 1e-10


def test_the_errors_of_the_oracle_follow_nothing_that_can_be_seen(mnar):
    seen = pd.DataFrame(
        {
            "age": mnar.X["age"],
            "heart_rate": mnar.X["heart_rate"],
            "lactate": np.log(mnar.X["lactate"]),
            "words": mnar.X["note"].str.len(),
            "grey": mnar.X["image"].map(np.mean, na_action="ignore").astype(float),
            "cxr": mnar.X["cxr"].map(lambda v: v @ cells.EMBEDDING, na_action="ignore"),
            "events": mnar.X["events"].list.len().astype(float),
        }
    ).astype(float)
    spread = np.sqrt(mnar.oracle * (1 - mnar.oracle))
    for name, x in seen.items():
        x = ((x - x.mean()) / x.std()).fillna(0).to_numpy()
        z = ((mnar.y - mnar.oracle) * x).sum() / np.sqrt(((spread * x) ** 2).sum())
        assert abs(z) < 4, name


def test_nothing_beats_the_oracle(mnar):
    best = log_loss(mnar.y, mnar.oracle)
    half = len(mnar.y) // 2
    numbers = mnar.X[["age", "heart_rate", *cells.LABS]].copy()
    numbers = numbers.fillna(numbers.mean())
    table = np.column_stack([numbers, mnar.present, mnar.X["note"].str.count("dyspnea").fillna(0)])
    table = (table - table.mean(axis=0)) / (table.std(axis=0) + 1e-9)
    model = LogisticRegression().fit(table[:half], mnar.y[:half])
    guess = model.predict_proba(table[half:])[:, 1]
    assert log_loss(mnar.y[half:], mnar.oracle[half:]) < log_loss(mnar.y[half:], guess) - 0.01
    assert best < log_loss(mnar.y, mnar.oracle_no_pattern) - 0.002
    for factor in (0.9, 1.1):  # neither bolder nor shyer is better
        bent = expit(factor * np.log(mnar.oracle / (1 - mnar.oracle)))
        assert best < log_loss(mnar.y, bent)
    assert best < log_loss(mnar.y, np.full(len(mnar.y), mnar.y.mean())) - 0.1


def test_calibration_holds_with_offsets_and_for_several_tasks():
    data = make_ehr(
        20_000, n_tasks=3, pattern_effect=1.0, rows_per_patient=1, random_state=5, as_bunch=True
    )
    assert data.y.columns.tolist() == ["death", "readmission", "icu_transfer"]
    labels = pattern_labels(data.present)
    for task in data.y:
        p, y = data.oracle[task], data.y[task]
        sums = pd.DataFrame({"error": y - p, "variance": p * (1 - p)}).groupby(labels).sum()
        chi2 = (sums["error"] ** 2 / sums["variance"]).sum()
        assert stats.chi2.sf(chi2, len(sums)) > 0.001
        assert log_loss(y, p) < log_loss(y, data.oracle_no_pattern[task]) - 0.02


@pytest.mark.parametrize("modality", source.MODALITIES[1:])
def test_every_modality_helps(modality):
    def loss(names):
        data = make_ehr(20_000, modalities=names, missing="none", random_state=1, as_bunch=True)
        return log_loss(data.y, data.oracle)

    assert loss([modality]) < loss([]) - 0.015


# ---------------------------------------------------------------- missingness


@pytest.mark.parametrize(
    "options",
    [
        {"missing": "none"},
        {"missing": "mcar"},
        {"missing": "mar", "strength": 2.0},
        {"missing": "mnar", "strength": 0.0},
    ],
)
def test_where_the_pattern_is_ignorable_it_adds_nothing(options):
    data = make_ehr(500, random_state=0, as_bunch=True, **options)
    np.testing.assert_allclose(data.oracle, data.oracle_no_pattern, atol=1e-12)


def test_the_pattern_is_worth_more_as_strength_grows():
    gains = []
    for strength in (0, 1, 2, 4):
        data = make_ehr(10_000, strength=strength, random_state=0, as_bunch=True)
        gains.append(log_loss(data.y, data.oracle_no_pattern) - log_loss(data.y, data.oracle))
    assert gains[0] == pytest.approx(0, abs=1e-12)
    assert all(np.diff(gains) > 0.003)


@pytest.mark.parametrize("missing", ["mcar", "mar", "mnar"])
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_missing_rates_are_as_asked(missing, rate):
    data = make_ehr(
        20_000, missing=missing, strength=2, missing_rate=rate, rows_per_patient=1,
        random_state=0, as_bunch=True,
    )  # fmt: skip
    absent = 1 - data.present.drop(columns="vitals").mean()
    assert (absent - rate).abs().max() < 4 * np.sqrt(rate * (1 - rate) / 20_000)


def test_mechanisms_depend_on_what_they_should(mnar):
    def correlations(missing):
        data = make_ehr(20_000, missing=missing, rows_per_patient=1, random_state=2, as_bunch=True)
        present = data.present.drop(columns="vitals").astype(float)
        age = (data.X["age"].to_numpy() - 61) / 12
        rest = data.latent - source.AGE_LOADING * age  # what age does not say of severity
        return present.corrwith(pd.Series(rest)), present.corrwith(pd.Series(age))

    signs = np.sign(list(source.PRESENCE_SLOPES.values()))
    rest, age = correlations("mnar")
    assert (rest * signs > 0.1).all()
    rest, age = correlations("mar")
    assert rest.abs().max() < 0.03
    assert (age * signs > 0.1).all()
    rest, age = correlations("mcar")
    assert max(rest.abs().max(), age.abs().max()) < 0.03


def test_presence_read_from_x_is_the_pattern_drawn(mnar):
    X = make_ehr(3000, cell_missing=0.8, random_state=0, as_bunch=True)
    for data in (mnar, X):
        pd.testing.assert_frame_equal(presence(data.X, data.modalities), data.present)


def test_single_numbers_are_missing_at_the_rate_asked():
    X, _ = make_ehr(20_000, missing="none", cell_missing=0.2, random_state=0)
    assert X["heart_rate"].isna().mean() == pytest.approx(0.2, abs=0.015)
    assert X["sodium"].isna().mean() == pytest.approx(0.2, abs=0.015)
    assert X["age"].notna().all()
    visits = [visit for cell in X["visits"].head(2000) for visit in cell]
    assert np.mean([v["sbp"] is None for v in visits]) == pytest.approx(0.2, abs=0.03)


def test_empty_is_not_null(mnar):
    assert (mnar.X["note"] == "").sum() > 50
    for column in ("events", "visits"):
        assert (mnar.X[column].list.len() == 0).sum() > 0
    assert mnar.X["visits"].isna().sum() > 5000


# ---------------------------------------------------------------- the frame


def test_the_line_of_the_readme():
    X, y = make_ehr(n_samples=2000, random_state=0)
    assert {"age", "heart_rate", "sodium", "lactate", "events", "note", "cxr"} <= set(X.columns)
    assert len(X) == len(y) == 2000
    assert set(np.unique(y)) == {0, 1}
    assert y.mean() == pytest.approx(0.3, abs=0.05)


def test_columns_hold_what_the_modalities_read(mnar):
    used = []
    for modality in mnar.modalities.values():
        used += [modality.columns] if isinstance(modality.columns, str) else modality.columns
    assert ["subject_id", *used] == mnar.X.columns.tolist()
    assert mnar.modalities["course"].time_unit == "h"
    assert mnar.modalities["history"].time_unit == "d"
    assert mnar.X["age"].between(0, 120).all()
    events = [e for cell in mnar.X["events"].dropna().head(300) for e in cell]
    assert all(-24 <= e["time"] <= 0 for e in events)
    for column in ("events", "visits"):
        for cell in mnar.X[column].dropna().head(300):
            assert sorted(r["time"] for r in cell) == [r["time"] for r in cell]


def test_no_variable_stands_in_two_modalities(mnar):
    names = [c for c in mnar.X if c not in ("events", "visits", "note", "image", "cxr")]
    names += [*cells.STREAM, cells.DRUG[0], *cells.VISIT_FIELDS, *cells.DIAGNOSES]
    lowered = [name.lower() for name in names]
    assert len(set(lowered)) == len(lowered)
    assert not {"hr", "heart_rate"} <= set(lowered)


def test_rows_of_a_patient_share_what_is_the_patients():
    data = make_ehr(4000, rows_per_patient=2.0, random_state=0, as_bunch=True)
    grouped = data.X.groupby("subject_id")
    assert (grouped["age"].nunique() == 1).all()
    assert (grouped["sex"].nunique() == 1).all()
    assert np.array_equal(data.groups, data.X["subject_id"])
    assert 1.8 < len(data.X) / grouped.ngroups < 2.2
    u = pd.Series(data.latent)
    pairs = u.groupby(data.groups)
    first, second, many = pairs.first(), pairs.last(), pairs.size() > 1
    assert np.corrcoef(first[many], second[many])[0, 1] == pytest.approx(0.7, abs=0.06)
    alone = make_ehr(500, rows_per_patient=1, random_state=0, as_bunch=True)
    assert alone.X["subject_id"].is_unique


def test_latent_is_standard_normal(mnar):
    assert stats.kstest(mnar.latent, "norm").pvalue > 0.001


def test_parquet_roundtrip(tmp_path):
    X, _ = make_ehr(60, random_state=0)
    write_parquet(X, tmp_path / "x.parquet")
    back = read_parquet(tmp_path / "x.parquet")
    assert_same(back, X)
    for name in ("image", "cxr"):
        assert {a.dtype for a in X[name].dropna()} == {a.dtype for a in back[name].dropna()}


# ---------------------------------------------------------------- seeds and options


def assert_same(a, b):
    assert a.columns.equals(b.columns)
    for column in a:
        assert a[column].dtype == b[column].dtype
        if column in ("image", "cxr"):
            assert all(map(np.array_equal, a[column], b[column]))
        elif column in ("events", "visits"):
            cells = (x.array.__arrow_array__().to_pylist() for x in (a[column], b[column]))
            assert next(cells) == next(cells)
        else:
            pd.testing.assert_series_equal(a[column], b[column])


def test_same_seed_same_data_and_other_seed_other_data():
    a, b, c = (make_ehr(80, random_state=seed, as_bunch=True) for seed in (1, 1, 2))
    assert_same(a.X, b.X)
    np.testing.assert_array_equal(a.y, b.y)
    np.testing.assert_array_equal(a.oracle, b.oracle)
    assert not np.array_equal(a.latent, c.latent)
    generator = np.random.RandomState(1)
    assert np.array_equal(make_ehr(80, random_state=generator, as_bunch=True).latent, a.latent)


def test_global_generators_are_untouched():
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    make_ehr(50, random_state=0)
    assert np.array_equal(np.random.get_state()[1], before)  # noqa: NPY002


def test_options_change_only_what_they_say():
    base = make_ehr(300, missing="none", random_state=0, as_bunch=True)
    holes = make_ehr(300, strength=3, random_state=0, as_bunch=True)
    fewer = make_ehr(300, missing="none", modalities=["note", "cxr"], random_state=0)
    np.testing.assert_array_equal(base.latent, holes.latent)
    np.testing.assert_array_equal(base.y, holes.y)
    kept = holes.present["labs"].to_numpy()
    pd.testing.assert_frame_equal(
        base.X.loc[kept, list(cells.LABS)], holes.X.loc[kept, list(cells.LABS)]
    )
    columns = ["subject_id", "age", "heart_rate", "sex", "note", "cxr"]
    assert fewer[0].columns.tolist() == columns
    assert_same(fewer[0], base.X[columns])
    np.testing.assert_array_equal(fewer[1], base.y)
    more = make_ehr(300, missing="none", n_tasks=7, random_state=0)[1]
    assert more.columns.tolist() == [*source.TASKS, "task_6", "task_7"]
    np.testing.assert_array_equal(more["death"], base.y)


def test_missing_labels():
    y = make_ehr(5000, n_tasks=2, label_missing=0.2, random_state=0)[1]
    assert y.isna().mean().tolist() == pytest.approx([0.2, 0.2], abs=0.02)
    assert set(y["death"].dropna()) == {0.0, 1.0}


def test_prevalence():
    y = make_ehr(20_000, prevalence=0.08, random_state=0)[1]
    assert y.mean() == pytest.approx(0.08, abs=0.01)


def test_planted_offsets_are_what_the_pattern_says():
    data = make_ehr(300, pattern_effect=2.0, random_state=0, as_bunch=True)
    expected = sum(
        2.0 * effect * (data.present[name] - 0.7) for name, effect in source.PATTERN_OFFSETS.items()
    )
    np.testing.assert_allclose(data.pattern_offset, expected, atol=1e-12)
    plain = make_ehr(300, random_state=0, as_bunch=True)
    assert (plain.pattern_offset == 0).all()
    everything = make_ehr(300, missing="none", pattern_effect=2.0, random_state=0, as_bunch=True)
    assert (everything.pattern_offset == 0).all()


def test_one_row():
    X, y = make_ehr(1, random_state=0)
    assert X.shape == (1, 13)
    assert y.shape == (1,)


def test_two_thousand_rows_take_less_than_a_second():
    make_ehr(10, random_state=0)
    times = []
    for _ in range(3):
        start = time.process_time()
        make_ehr(2000, random_state=0)
        times.append(time.process_time() - start)
    assert min(times) < 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"missing": "sometimes"}, "missing='sometimes' is not known; choose one of 'mnar'"),
        ({"n_samples": 0}, "n_samples=0; give a whole number of at least 1"),
        ({"n_tasks": 1.5}, r"n_tasks=1\.5; give a whole number"),
        ({"missing_rate": 1.0}, r"missing_rate=1\.0; give a share from 0 to below 1"),
        ({"cell_missing": -0.1}, r"cell_missing=-0\.1; give a share"),
        ({"prevalence": 0}, "prevalence=0; give a share above 0"),
        ({"rows_per_patient": 0.5}, r"rows_per_patient=0\.5; give a number of at least 1"),
        ({"label_missing": 0.1}, r"label_missing=0\.1 needs n_tasks of at least 2"),
        ({"modalities": ["labs", "ecg"]}, "modalities='ecg' is not known; choose one of 'vitals'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        make_ehr(**({"n_samples": 10} | options))
