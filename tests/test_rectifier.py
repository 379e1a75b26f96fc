"""The rectifier: known offsets, no harm, no leak, and the scikit-learn contract."""

import inspect
import pickle

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit, logit
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeClassifier
from sklearn.utils.estimator_checks import parametrize_with_checks

from ehrfuse.rectifier import Rectifier

MODALITIES = {"labs": ["lab1", "lab2"], "note": "note", "film": "film"}
NAMES = list(MODALITIES)


class Given(ClassifierMixin, BaseEstimator):
    """Returns the probability that stands in column p: a base model known exactly."""

    def fit(self, X, y):
        self.classes_ = np.unique(y[~pd.isna(y)]) if np.ndim(y) == 1 else np.arange(np.shape(y)[1])
        self.many_ = np.ndim(y) == 2
        return self

    def predict_proba(self, X):
        P = X.filter(regex="^p").to_numpy()
        return P if P.shape[1] > 1 or self.many_ else np.column_stack([1 - P, P])


class Recorder(LogisticRegression):
    """Remembers which rows it was fitted on (column row) and which columns it saw."""

    def fit(self, X, y, sample_weight=None):
        self.rows_, self.columns_ = X["row"].to_numpy(), list(X.columns)
        self.weight_ = sample_weight
        return super().fit(X[["lab1"]].fillna(0), y, sample_weight)

    def predict_proba(self, X):
        self.last_rows_ = X["row"].to_numpy()
        return super().predict_proba(X[["lab1"]].fillna(0))


class Grouped(Recorder):
    """Has a parameter `groups` of its own, as the networks of this package do."""

    def __init__(self, groups=None, modalities=None):
        super().__init__()
        self.groups, self.modalities = groups, modalities


def given(p, flags, **columns):
    """Frame with a known p and modalities present where `flags` (n, 3) say so."""
    labs, note, film = np.where(flags, 1.0, np.nan).T
    cells = {"p": p, "lab1": labs, "lab2": np.nan, "note": note, "film": film}
    return pd.DataFrame({**cells, **columns})


def draw(n, rng, offset=None):
    """Rows with a known p, eight patterns, and labels whose log-odds are off by `offset`."""
    flags = rng.random((n, 3)) < [0.7, 0.5, 0.3]
    p = expit(rng.normal(-1, 1, n))
    code = flags @ [1, 2, 4]
    shift = np.zeros(n) if offset is None else offset[code]
    return given(p, flags), (rng.random(n) < expit(logit(p) + shift)).astype(int), code


def latent(n, rng, strength=1.0):
    """MNAR rows: u drives labels, values and (by `strength`) what was ordered."""
    u = rng.normal(size=n)
    X = pd.DataFrame({name: u + rng.normal(size=n) for name in ["lab1", "lab2", "note", "film"]})
    for columns in MODALITIES.values():
        absent = rng.random(n) > expit(0.5 + strength * u)
        X.loc[absent, columns if isinstance(columns, list) else [columns]] = np.nan
    X["age"] = rng.normal(size=n)
    return X, (rng.random(n) < expit(1.5 * u + 0.5 * X["age"] - 0.5)).astype(int)


def trees(**params):
    return HistGradientBoostingClassifier(
        max_iter=15, early_stopping=False, random_state=0, **params
    )


def plain(**params):
    """Rectifier around a known p, without calibration: only the offsets act."""
    return Rectifier(Given(), MODALITIES, **{"calibrate": None, "random_state": 0, **params})


def label(code):
    return "+".join(np.array(NAMES)[[bool(code & 1), bool(code & 2), bool(code & 4)]]) or "(none)"


def of_pattern(model, name):
    return model.table_.set_index("pattern").loc[name]


# The eight facts -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["crossfit", "holdout"])
def test_known_offsets_are_recovered(method):
    rng = np.random.default_rng(0)
    offset = np.array([0.8, -0.6, 0.5, 0.0, -1.0, 0.3, -0.3, 1.2])
    X, y, _ = draw(20000, rng, offset)
    model = plain(method=method).fit(X, y)
    table = model.table_.set_index("pattern")
    assert len(table) == 8
    for code, true in enumerate(offset):
        row = table.loc[label(code)]
        assert abs(row["tau_raw"] - true) < 3 * row["se"]
        assert abs(row["tau"] - true) < 3 * row["se"]
    assert table["se"].max() < (0.15 if method == "crossfit" else 0.35)
    assert (table["source"] == "pattern").all()


def test_standard_errors_have_the_right_size():
    z = []
    for seed in range(60):
        X, y, _ = draw(1500, np.random.default_rng(seed))
        table = plain(shrink=False).fit(X, y).table_
        z.append((table["tau_raw"] / table["se"])[table["n"] > 100])
    assert 0.8 < np.concatenate(z).std() < 1.2


def test_no_harm_where_there_is_nothing_to_correct():
    shrunk, raw, silent = [], [], []
    for seed in range(60):
        X, y, _ = draw(1500, np.random.default_rng(seed))
        fresh, _, _ = draw(4000, np.random.default_rng(1000 + seed))
        true = fresh["p"].to_numpy()  # so the expected change of the Brier score is the mean square
        for shrink, out in [(True, shrunk), (False, raw)]:
            model = plain(shrink=shrink).fit(X, y)
            out.append(np.mean((model.predict_proba(fresh)[:, 1] - true) ** 2))
            if shrink:
                silent.append((model.table_["tau"].abs() < 1e-9).all())
    assert np.mean(shrunk) < 4e-4  # beside a Brier score of about 0.18
    assert np.mean(shrunk) < 0.35 * np.mean(raw)
    assert np.mean(silent) > 0.2


@pytest.mark.parametrize("scale", ["logit", "probability"])
def test_order_within_a_pattern_is_kept(scale):
    rng = np.random.default_rng(1)
    X, y = latent(1500, rng)
    fresh, labels = latent(1500, rng)
    model = Rectifier(trees(), MODALITIES, method="holdout", scale=scale, random_state=0).fit(X, y)
    before = model.estimators_[0].predict_proba(fresh)[:, 1]
    after = model.predict_proba(fresh)[:, 1]
    present = fresh[["lab1", "note", "film"]].notna() | fresh[["lab2"]].notna().to_numpy() @ [
        [1, 0, 0]
    ]
    for _, rows in fresh.groupby(present.to_numpy() @ [1, 2, 4]).indices.items():
        auc = [roc_auc_score(labels.to_numpy()[rows], p[rows]) for p in (before, after)]
        assert auc[0] == pytest.approx(auc[1], abs=1e-12 if scale == "logit" else 0.01)
    assert not np.allclose(before, after)


def test_gain_of_the_brier_score_is_the_mean_square_of_the_offsets():
    rng = np.random.default_rng(2)
    tau = np.array([0.15, -0.1, 0.1, 0.0, -0.2, 0.05, -0.05, 0.2])

    def sample(n):
        flags = rng.random((n, 3)) < 0.5
        p, code = rng.uniform(0.3, 0.7, n), flags @ [1, 2, 4]
        return given(p, flags), (rng.random(n) < p + tau[code]).astype(int)

    X, y = sample(20000)
    fresh, labels = sample(100000)
    model = plain(scale="probability", shrink=False).fit(X, y)
    gain = (labels - fresh["p"]) ** 2 - (labels - model.predict_proba(fresh)[:, 1]) ** 2
    error = gain.std() / np.sqrt(len(gain))
    assert abs(gain.mean() - np.mean(tau**2)) < 3 * error + 8 / 20000
    np.testing.assert_allclose(model.table_["tau_raw"], model.table_["tau"])


@pytest.mark.parametrize("shrink", [True, False])
@pytest.mark.parametrize("scale", ["logit", "probability"])
def test_a_pattern_of_one_row_and_an_unseen_one_stay_near_their_parents(scale, shrink):
    rng = np.random.default_rng(3)
    flags = np.repeat([[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 1]], [300, 300, 300, 1], axis=0) > 0
    p = np.full(901, 0.3)
    y = np.r_[rng.random(900) < 0.5, True].astype(int)
    model = plain(scale=scale, shrink=shrink, min_count=10).fit(given(p, flags), y)
    lone = of_pattern(model, "film")
    assert lone["n"] == 1
    assert lone["source"] != "pattern"
    assert np.isfinite(model.table_[["tau_raw", "se", "tau"]].to_numpy()).all()
    new = given([0.3, 0.3], [[0, 0, 1], [1, 1, 1]])
    with pytest.warns(UserWarning, match=r"not seen in fit.*labs\+note\+film") as caught:
        P = model.predict_proba(new)[:, 1]
    assert len(caught) == 1
    assert np.isfinite(P).all()
    np.testing.assert_allclose(P, 0.5, atol=0.08)
    eager = plain(scale=scale, shrink=shrink, min_count=1).fit(given(p, flags), y)
    assert 0.3 < eager.predict_proba(new.iloc[:1])[0, 1] < 0.65


def test_predictions_depend_on_their_own_row_only():
    rng = np.random.default_rng(4)
    X, y = latent(600, rng)
    fresh, labels = latent(80, rng)
    model = Rectifier(trees(), MODALITIES, n_splits=3, random_state=0).fit(X, y)
    P = model.predict_proba(fresh)
    order = rng.permutation(len(fresh))
    np.testing.assert_array_equal(model.predict_proba(fresh.iloc[order]), P[order])
    shuffled = fresh.assign(outcome=labels.sample(frac=1, random_state=0).to_numpy())
    named = Rectifier(_cut(trees()), MODALITIES, n_splits=3, random_state=0).fit(X, y)
    np.testing.assert_array_equal(named.predict_proba(shuffled), named.predict_proba(fresh))


def _only(columns):
    return ColumnTransformer([("own", "passthrough", columns)])


def _cut(model):
    return make_pipeline(_only(["lab1", "lab2", "note", "film", "age"]), model)


def test_in_sample_residuals_correct_too_little_and_held_out_ones_do_not():
    rng = np.random.default_rng(5)
    offset = np.array([1.5, -1, -1, 1, -1, 1, 1, -1.5])

    def sample(n):
        X, _, code = draw(n, rng)
        X["age"] = rng.normal(size=n)
        return X, (rng.random(n) < expit(X["age"] + offset[code])).astype(int), code

    X, y, code = sample(4000)
    fresh, labels, kind = sample(40000)
    # Blind to the pattern, and overfitted: its own rows look nearly right in every pattern.
    forest = make_pipeline(_only(["age"]), RandomForestClassifier(20, random_state=0))
    model = Rectifier(forest, MODALITIES, random_state=0).fit(X, y)
    alone = clone(forest).fit(X, y)
    naive = alone.predict_proba(fresh)[:, 1]
    naive += _means(y - alone.predict_proba(X)[:, 1], code)[kind]
    gaps = [_means(labels - p, kind) for p in (alone.predict_proba(fresh)[:, 1], naive)]
    left = _means(labels - model.predict_proba(fresh)[:, 1], kind)
    assert np.abs(gaps[0]).mean() > 0.15
    assert np.abs(gaps[1]).mean() > 0.4 * np.abs(gaps[0]).mean()
    assert np.abs(left).mean() < 0.15 * np.abs(gaps[0]).mean()


def _means(values, code):
    return np.bincount(code, values, 8) / np.bincount(code, minlength=8)


def _filled(model):
    return make_pipeline(SimpleImputer(strategy="constant", fill_value=0.0), model)


def test_order_of_modalities_and_columns_does_not_matter():
    rng = np.random.default_rng(6)
    X, y = latent(500, rng)
    turned = dict(reversed(MODALITIES.items()))
    one = Rectifier(_cut(trees()), MODALITIES, n_splits=3, random_state=0).fit(X, y)
    two = Rectifier(_cut(trees()), turned, n_splits=3, random_state=0).fit(X[X.columns[::-1]], y)
    np.testing.assert_array_equal(one.predict_proba(X), two.predict_proba(X))
    pd.testing.assert_frame_equal(
        one.table_.drop(columns="pattern"), two.table_.drop(columns="pattern")
    )


# The three published leaks -------------------------------------------------------------------


@pytest.mark.parametrize("method", ["crossfit", "holdout"])
def test_leak_corrections_come_from_rows_their_model_did_not_see(method):
    X, y = latent(400, np.random.default_rng(7))
    X = X.assign(row=np.arange(400), patient=np.arange(400) // 2)
    model = Rectifier(Recorder(), MODALITIES, "patient", method, random_state=0).fit(X, y)
    scored = np.concatenate([m.last_rows_ for m in model.estimators_])
    assert len(set(scored)) == len(scored) == (400 if method == "crossfit" else 80)
    for inner in model.estimators_:
        assert not set(inner.rows_ // 2) & set(inner.last_rows_ // 2)
        assert len(inner.rows_) + len(inner.last_rows_) == 400
    assert model.table_["n"].sum() == len(scored)


def test_leak_pure_noise_does_not_look_predictable():
    rng = np.random.default_rng(8)
    X, _ = latent(1000, rng)
    y = (rng.random(1000) < 0.3).astype(int)
    memory = _filled(KNeighborsClassifier(1))
    P = Rectifier(memory, MODALITIES, random_state=0).fit(X, y).predict_proba(latent(500, rng)[0])
    assert abs(P[:, 1] - 0.3).max() < 0.15  # the memoriser alone says 0 or 1


def test_leak_no_transduction_at_predict():
    rng = np.random.default_rng(9)
    X, y = latent(400, rng)
    model = Rectifier(trees(), MODALITIES, n_splits=2, random_state=0).fit(X, y)
    fresh, _ = latent(50, rng)
    state = pickle.dumps(model)
    P = model.predict_proba(fresh)
    company = pd.concat([fresh.iloc[[7]], fresh.iloc[[8]] * 1e3, fresh.iloc[[9]] * -1e3])
    np.testing.assert_array_equal(model.predict_proba(company)[0], P[7])
    np.testing.assert_array_equal(model.predict_proba(fresh.iloc[[7]])[0], P[7])
    assert pickle.dumps(model) == state


def test_leak_labels_cannot_reach_a_prediction():
    for method in (Rectifier.predict_proba, Rectifier.predict):
        assert list(inspect.signature(method).parameters) == ["self", "X"]
    assert list(inspect.signature(Rectifier.fit).parameters) == ["self", "X", "y", "sample_weight"]
    rng = np.random.default_rng(10)
    X, y = latent(300, rng)
    seen = []
    for flip in (False, True):  # labels of the test rows differ, those of the training rows do not
        labels = np.where(np.arange(300) >= 200, 1 - y, y) if flip else y.to_numpy()

        def keep(model, X, y):
            seen.append(model.predict_proba(X))
            return 0.0

        model = Rectifier(trees(), MODALITIES, n_splits=2, random_state=0)
        cross_val_score(model, X, labels, cv=[(np.arange(200), np.arange(200, 300))], scoring=keep)
    np.testing.assert_array_equal(*seen)


# How offsets and calibration are found -------------------------------------------------------


@pytest.mark.parametrize("scale", ["logit", "probability"])
def test_pattern_means_are_exact_without_shrinkage(scale):
    rng = np.random.default_rng(11)
    X, y, code = draw(1000, rng, rng.normal(size=8) / 3)
    weight = rng.uniform(0.5, 2, 1000)
    with pytest.warns(UserWarning, match="Given takes no sample_weight"):
        model = plain(shrink=False, min_count=1, scale=scale).fit(X, y, sample_weight=weight)
    rows = model._offsets.rule.base(model._calibration.apply(X[["p"]].to_numpy(), 0))[:, 0]
    for m in range(8):
        tau = of_pattern(model, label(m))["tau"]
        mean = expit(rows + tau) if scale == "logit" else rows + tau
        assert weight[code == m] @ (y - mean)[code == m] == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("calibrate", ["platt", "temperature"])
def test_calibration_undoes_a_distortion(calibrate):
    rng = np.random.default_rng(12)
    X, y, _ = draw(20000, rng)
    shift = 0.7 if calibrate == "platt" else 0.0
    X["p"] = expit(2 * logit(X["p"]) + shift)  # overconfident
    model = plain(calibrate=calibrate).fit(X, y)
    assert model.calibration_["slope"].mean() == pytest.approx(0.5, abs=0.03)
    assert model.calibration_["intercept"].mean() == pytest.approx(-shift / 2, abs=0.06)
    assert list(model.calibration_["fold"]) == [0, 1, 2, 3, 4]


def test_temperature_of_several_classes_is_one():
    rng = np.random.default_rng(13)
    Z = rng.normal(size=(6000, 3))
    true = np.exp(Z) / np.exp(Z).sum(1, keepdims=True)
    y = (true.cumsum(1) < rng.random((6000, 1))).sum(1)
    sharp = np.exp(3 * Z) / np.exp(3 * Z).sum(1, keepdims=True)
    X = pd.DataFrame(sharp, columns=["p0", "p1", "p2"])
    model = Rectifier(Given(), calibrate="temperature", random_state=0).fit(X, y)
    assert model.calibration_["slope"].mean() == pytest.approx(1 / 3, abs=0.015)
    assert abs(model.predict_proba(X) - true).mean() < 0.02


def test_repeated_rows_of_a_patient_widen_the_standard_error():
    X, y, _ = draw(400, np.random.default_rng(14))
    again = pd.concat([X.assign(patient=np.arange(400))] * 4, ignore_index=True)
    once, naive, aware = (
        plain(groups=groups, shrink=False).fit(frame, labels).table_.set_index("pattern")["se"]
        for frame, labels, groups in [
            (X, y, None),
            (again.drop(columns="patient"), np.tile(y, 4), None),
            (again, np.tile(y, 4), "patient"),
        ]
    )
    # The rows repeat nothing but themselves, so grouped errors are those of the single rows.
    np.testing.assert_allclose(aware, once, rtol=0.2)
    np.testing.assert_allclose(naive, once[naive.index] / 2, rtol=0.2)


def test_shrinkage_follows_the_levels():
    rng = np.random.default_rng(15)
    X, y, _ = draw(20000, rng, np.full(8, 0.5))
    model = plain().fit(X, y)
    assert set(model.table_["source"]) <= {"global", "count", "pattern"}
    assert abs(model.table_["tau"] - 0.5).max() < 0.1
    by_count = np.array([0.8, -0.4, -0.4, 0.4, -0.4, 0.4, 0.4, -0.8])
    X, y, _ = draw(20000, rng, by_count)
    model = plain().fit(X, y)
    counts = model.parents_.set_index("pattern")["tau"]
    for k, true in enumerate([0.8, -0.4, 0.4, -0.8]):
        assert counts[f"({k} present)"] == pytest.approx(true, abs=0.2)


def test_gate_and_min_count_fall_back():
    rng = np.random.default_rng(16)
    offset = np.array([0, 0.05, 0, 1.5, 0, 0, 0, 0])
    X, y, _ = draw(6000, rng, offset)
    gated = plain(scale="probability", shrink=False, gate=(0.1, 1.0)).fit(X, y)
    table = gated.table_.set_index("pattern")
    assert table.loc["labs+note", "source"] == "pattern"
    assert table.loc["labs", "tau"] == 0
    assert table.loc["labs", "source"] == "global"
    timid = plain(min_count=10**6).fit(X, y)
    assert (timid.table_["source"] == "global").all()
    closed = plain(gate=(100.0, 1.0)).fit(X, y)
    np.testing.assert_allclose(closed.predict_proba(X)[:, 1], X["p"], atol=2e-5)


def test_unseen_pattern_goes_to_relative_then_count_then_global():
    rng = np.random.default_rng(17)

    def fitted(patterns, rates):
        flags = np.repeat(patterns, 400, axis=0) > 0
        y = (rng.random(len(flags)) < np.repeat(rates, 400)).astype(int)
        return plain(shrink=False).fit(given(np.full(len(flags), 0.5), flags), y)

    def predicted(model, pattern):
        with pytest.warns(UserWarning, match="not seen"):
            return model.predict_proba(given([0.5], [pattern]))[0, 1]

    model = fitted([[1, 0, 0], [0, 1, 1]], [0.2, 0.8])
    assert predicted(model, [1, 1, 0]) == pytest.approx(0.2, abs=0.07)  # equal sizes: the first
    assert predicted(model, [1, 1, 1]) == pytest.approx(0.8, abs=0.07)
    model = fitted([[1, 0, 0], [1, 1, 1]], [0.2, 0.8])
    assert predicted(model, [0, 1, 0]) == pytest.approx(0.2, abs=0.07)  # same count
    model = fitted([[1, 0, 0], [0, 1, 0]], [0.2, 0.4])
    assert predicted(model, [1, 1, 1]) == pytest.approx(0.3, abs=0.07)  # global


# Targets -------------------------------------------------------------------------------------


def test_several_classes_and_string_labels():
    rng = np.random.default_rng(18)
    n = 6000
    flags = rng.random((n, 3)) < 0.5
    Z = rng.normal(size=(n, 3))
    tilt = np.where(flags[:, :1], [[1.0, 0.0, -1.0]], [[0.0, 0.0, 0.0]])
    base, true = (np.exp(z) / np.exp(z).sum(1, keepdims=True) for z in (Z, Z + tilt))
    y = np.array(["home", "ward", "icu"])[(true.cumsum(1) < rng.random((n, 1))).sum(1)]
    X = given(0.0, flags).drop(columns="p").assign(p0=base[:, 0], p1=base[:, 2], p2=base[:, 1])
    model = plain().fit(X, y)  # classes in sorted order: home, icu, ward
    P = model.predict_proba(X)
    np.testing.assert_allclose(P.sum(axis=1), 1)
    assert list(model.classes_) == ["home", "icu", "ward"]
    assert set(model.predict(X)) <= set(model.classes_)
    assert list(model.table_["task"].unique()) == ["home", "icu", "ward"]
    wanted = true[:, [0, 2, 1]]
    assert ((P - wanted) ** 2).mean() < 0.25 * ((base[:, [0, 2, 1]] - wanted) ** 2).mean()
    both = plain(scale="probability", calibrate="platt").fit(X, y).predict_proba(X)
    np.testing.assert_allclose(both.sum(axis=1), 1)


def test_several_tasks_with_unknown_labels():
    rng = np.random.default_rng(19)
    X, death, code = draw(4000, rng, np.array([1.0, 0, 0, 0, 0, 0, 0, -1.0]))
    X = X.rename(columns={"p": "p0"}).assign(p1=0.2)
    y = pd.DataFrame({"death": death, "icu": rng.random(4000) < 0.2}).astype(float)
    y.loc[rng.random(4000) < 0.5, "icu"] = np.nan
    y.loc[code == 5, "death"] = np.nan  # a pattern without any known label
    model = plain().fit(X, y)
    assert model.target_names_ == ["death", "icu"]
    np.testing.assert_array_equal(model.classes_, [0, 1])
    assert model.predict_proba(X).shape == model.predict(X).shape == (4000, 2)
    table = model.table_.set_index(["task", "pattern"])
    assert len(table) == 16
    assert table.loc[("death", "labs+film"), "n"] == 0
    assert table.loc[("death", "labs+film"), "source"] != "pattern"
    assert table.loc[("death", "(none)"), "tau"] == pytest.approx(1.0, abs=0.4)
    assert table.loc["icu", "n"].sum() == y["icu"].notna().sum()
    assert np.isfinite(model.predict_proba(X)).all()


def test_a_task_without_events_is_left_alone():
    rng = np.random.default_rng(20)
    X, death, _ = draw(400, rng)
    X = X.rename(columns={"p": "p0"}).assign(p1=0.01)
    model = plain(calibrate="platt").fit(X, np.column_stack([death, np.zeros(400)]))
    np.testing.assert_allclose(model.predict_proba(X)[:, 1], 0.01, atol=1e-4)


def test_scikit_learn_multi_output_form():
    X, y = latent(300, np.random.default_rng(21))
    Y = np.column_stack([y, 1 - y])
    model = Rectifier(
        _filled(RandomForestClassifier(10, random_state=0)), MODALITIES, random_state=0
    )
    P = model.fit(X, Y).predict_proba(X)
    assert P.shape == (300, 2)
    assert roc_auc_score(Y, P) > 0.8


# Groups, splits, weights ---------------------------------------------------------------------


def test_groups_column_is_hidden_unless_the_estimator_asks_for_it():
    X, y = latent(200, np.random.default_rng(22))
    X = X.assign(row=np.arange(200), patient=np.arange(200) // 4)
    hidden = Rectifier(Recorder(), MODALITIES, groups="patient", random_state=0).fit(X, y)
    assert "patient" not in hidden.estimators_[0].columns_
    assert "patient" not in hidden.feature_names_in_
    P = hidden.predict_proba(X)
    np.testing.assert_array_equal(hidden.predict_proba(X.drop(columns="patient")), P)
    for inner in (Grouped("patient"), make_pipeline("passthrough", Grouped("patient"))):
        shown = Rectifier(inner, MODALITIES, groups="patient", random_state=0).fit(X, y)
        last = shown.estimators_[0] if isinstance(inner, Grouped) else shown.estimators_[0][-1]
        assert "patient" in last.columns_
        shown.predict_proba(X.drop(columns="patient"))


def test_none_reads_modalities_and_groups_of_the_estimator():
    X, y = latent(200, np.random.default_rng(23))
    X = X.assign(row=np.arange(200), patient=np.arange(200) // 4)
    modalities = {"labs": "lab1", "note": ["note"], "film": "drop"}
    model = Rectifier(Grouped("patient", modalities), random_state=0).fit(X, y)
    assert set(model.table_["pattern"]) <= {"(none)", "labs", "note", "labs+note"}
    for inner in model.estimators_:
        assert not set(inner.rows_ // 4) & set(inner.last_rows_ // 4)
    alone = Rectifier(trees(), random_state=0).fit(X, y)
    assert list(alone.table_["pattern"]) == ["(all)"]


def test_splits_are_balanced_by_class_and_pattern():
    rng = np.random.default_rng(24)
    X, y = latent(1000, rng)
    y = (rng.random(1000) < 0.04).astype(int)
    X = X.assign(row=np.arange(1000))
    for method, share in [("crossfit", 0.2), ("holdout", 0.2), ("holdout", 0.3)]:
        model = Rectifier(
            Recorder(), MODALITIES, method=method, holdout_fraction=share, random_state=0
        )
        for inner in model.fit(X, y).estimators_:
            held = inner.last_rows_
            assert abs(len(held) - 1000 * share) <= 1
            assert abs(y[held].sum() - y.sum() * share) <= 1
            film = (X["film"].notna().to_numpy() & (y == 0)).sum()
            assert abs((X["film"].notna().to_numpy() & (y == 0))[held].sum() - share * film) <= 5


def test_weights_reach_estimator_and_offsets():
    X, y = latent(300, np.random.default_rng(25))
    X = X.assign(row=np.arange(300))
    weight = np.where(y == 1, 3.0, 1.0)
    model = Rectifier(Recorder(), MODALITIES, random_state=0).fit(X, y, sample_weight=weight)
    inner = model.estimators_[0]
    np.testing.assert_array_equal(inner.weight_, weight[inner.rows_])
    rate = np.average(y, weights=weight)
    assert np.average(model.predict_proba(X)[:, 1], weights=weight) == pytest.approx(rate, abs=0.03)


@pytest.mark.parametrize("method", ["crossfit", "holdout"])
@pytest.mark.parametrize("calibrate", ["platt", "temperature", None])
def test_tiny_data_gives_finite_probabilities(method, calibrate):
    X = pd.DataFrame({"lab1": [0.1, 0.2, 0.9, 1.0, np.nan, 0.5], "note": [1, np.nan] * 3})
    y = ["no", "no", "yes", "yes", "no", "no"]
    modalities = {"labs": "lab1", "note": "note"}
    model = Rectifier(_filled(GaussianNB()), modalities, method=method, calibrate=calibrate)
    model.set_params(random_state=0).fit(X, y)
    assert np.isfinite(model.predict_proba(X)).all()
    assert len(model.estimators_) == (5 if method == "crossfit" else 1)


# Errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "match"),
    [
        ({"method": "both"}, "method='both' is not known; choose one of 'crossfit', 'holdout'"),
        ({"calibrate": "isotonic"}, "calibrate='isotonic' is not known"),
        ({"scale": "odds"}, "scale='odds' is not known"),
        ({"n_splits": 1}, "n_splits=1 is too few"),
        ({"method": "holdout", "holdout_fraction": 1.0}, "holdout_fraction=1.0 leaves nothing"),
        ({"gate": 0.1}, "not a pair"),
        ({"groups": "doctor"}, "groups='doctor' is no column of X"),
        ({"modalities": {"ecg": "ecg"}}, "'ecg' needs columns"),
    ],
)
def test_wrong_parameters_are_named(params, match):
    X, y = latent(60, np.random.default_rng(26))
    with pytest.raises(ValueError, match=match):
        Rectifier(trees()).set_params(**params).fit(X, y)


def test_wrong_input_is_named():
    X, y = latent(60, np.random.default_rng(27))
    model = Rectifier(trees(), MODALITIES, random_state=0)
    with pytest.raises(TypeError, match="RidgeClassifier has no predict_proba"):
        Rectifier(RidgeClassifier()).fit(X, y)
    with pytest.raises(TypeError, match="give a pandas DataFrame"):
        model.fit(X.to_numpy(), y)
    with pytest.raises(ValueError, match=r"columns of the same name: \['note'\]"):
        model.fit(pd.concat([X, X[["note"]]], axis=1), y)
    with pytest.raises(ValueError, match="one class only"):
        model.fit(X, np.ones(60))
    with pytest.raises(ValueError, match=r"y contains NaN: 1 labels are unknown"):
        model.fit(X, np.where(np.arange(60) == 3, np.nan, y))
    with pytest.raises(ValueError, match=r"Class 2.* is in too few rows"):
        model.fit(X, np.where(np.arange(60) == 3, 2, y))
    with pytest.raises(ValueError, match="may hold 0, 1 and NaN"):
        model.fit(X, np.column_stack([y, y + 1]))
    by_patient = Rectifier(trees(), MODALITIES, groups="patient")
    with pytest.raises(ValueError, match="1 groups cannot be split"):
        by_patient.fit(X.assign(patient=0), y)
    patient = np.where(np.arange(60) == 5, np.nan, np.arange(60))
    with pytest.raises(ValueError, match=r"'patient' \(groups\) has 1 nulls"):
        by_patient.fit(X.assign(patient=patient), y)
    with pytest.raises(ValueError, match="sample_weight"):
        model.fit(X, y, sample_weight=-np.ones(60))
    frame = given(np.full(60, np.nan), np.ones((60, 3)))
    with pytest.raises(ValueError, match="finite probabilities"):
        plain().fit(frame, y)
    fitted = model.fit(X, y)
    with pytest.raises(ValueError, match="needs columns"):
        fitted.predict_proba(X.drop(columns="note"))
    with pytest.raises(TypeError, match="give a pandas DataFrame"):
        fitted.predict_proba(X.to_numpy())
    assert np.isfinite(fitted.predict_proba(X)).all()


# The scikit-learn contract -------------------------------------------------------------------

WHY = "A row of weight two stays whole in a split, two equal rows may be parted."
EXPECTED = {
    "check_sample_weight_equivalence_on_dense_data": WHY,
    "check_sample_weight_equivalence_on_sparse_data": WHY,
}


@parametrize_with_checks(
    [Rectifier(LogisticRegression()), Rectifier(LogisticRegression(), method="holdout")],
    expected_failed_checks=lambda estimator: EXPECTED,
)
def test_scikit_learn_checks(estimator, check):
    check(estimator)


def test_everyday_uses():
    X, y = latent(300, np.random.default_rng(28))
    words = np.where(y == 1, "dead", "alive")
    model = Rectifier(_filled(LogisticRegression()), MODALITIES, n_splits=2, random_state=0)
    assert cross_val_score(model, X, words, cv=3, scoring="roc_auc").mean() > 0.75
    model = Rectifier(
        DecisionTreeClassifier(random_state=0), MODALITIES, n_splits=2, random_state=0
    )
    grid = GridSearchCV(model, {"estimator__max_depth": [1, 4], "shrink": [True, False]}, cv=2)
    best = grid.fit(X, words).best_estimator_
    assert set(best.predict(X)) <= {"alive", "dead"}
    again = pickle.loads(pickle.dumps(best))
    np.testing.assert_array_equal(again.predict_proba(X), best.predict_proba(X))
    np.testing.assert_array_equal(clone(best).fit(X, words).predict_proba(X), best.predict_proba(X))
    scaled = make_pipeline(StandardScaler().set_output(transform="pandas"), model).fit(X, y)
    assert np.isfinite(scaled.predict_proba(X)).all()
    assert "Rectifier" in best._repr_html_()
    state = np.random.mtrand._rand.get_state()[1].copy()
    model.set_params(random_state=0).fit(X, y)
    np.testing.assert_array_equal(state, np.random.mtrand._rand.get_state()[1])


def test_parameters_changed_after_fit_change_nothing():
    X, y = latent(300, np.random.default_rng(29))
    model = Rectifier(trees(), MODALITIES, n_splits=2, random_state=0).fit(X, y)
    P = model.predict_proba(X)
    model.set_params(scale="probability", calibrate=None, modalities=None, groups="age")
    np.testing.assert_array_equal(model.predict_proba(X), P)
