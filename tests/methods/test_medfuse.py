"""What is true of MEDFuse: the bound, the guard, disentangled parts, out-of-fold text, no leak."""

import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from sklearn.base import clone
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, roc_auc_score
from tiny_models import write_bert, write_llama
from torch.distributions import Normal

from ehrfuse import (
    Embedding,
    Events,
    Labs,
    LabTextifier,
    MEDFuseClassifier,
    NoteSectionizer,
    Text,
    Visits,
)
from ehrfuse.datasets import make_ehr
from ehrfuse.methods import _linear_path, medfuse
from ehrfuse.nn.disentangled import Disentangled, MutualInformation, collapse
from ehrfuse.nn.losses import gaussian_nll, vclub

SMALL = {"d_model": 8, "n_members": 2, "width": 16, "lab_layers": 1, "random_state": 0}
WORDS = ["cough", "fever", "pain", "clear", "stable", "nausea", "rash", "edema"]


def made(n=300, seed=0):
    """Labels from the text, from the labs, and from both; patients of two rows."""
    rng = np.random.default_rng(seed)
    word = rng.random((n, len(WORDS))) < 0.5
    labs = rng.normal(size=(n, 4))
    text = [" ".join(np.array(WORDS)[row]) for row in word]
    both = (word[:, 1] & (labs[:, 1] > 0)).astype(float)
    y = pd.DataFrame({"text": word[:, 0] * 1.0, "labs": (labs[:, 0] > 0) * 1.0, "both": both})
    X = pd.DataFrame(labs, columns=list("abcd")).assign(note=text, subject=np.arange(n) // 2)
    return X, y


def declared():
    return {"note": Text("note"), "labs": Labs(list("abcd"))}


@pytest.fixture(scope="module")
def fitted():
    X, y = made()
    return MEDFuseClassifier(declared(), max_epochs=3, **SMALL).fit(X, y)


# ---------------------------------------------------------------- the linear path


def test_linear_path_is_logistic_regression_on_tfidf_and_values():
    X, y = made(200)
    model = MEDFuseClassifier(declared(), max_epochs=1, **SMALL).fit(X, y)
    words = TfidfVectorizer(ngram_range=(1, 2), min_df=5, sublinear_tf=True)
    tfidf = words.fit_transform(X["note"]).toarray()
    labs = X[list("abcd")]
    score = np.column_stack([stats.norm.ppf((labs[c].rank() - 0.5) / len(X)) for c in labs])
    score = np.hstack([score, np.ones_like(score)])
    score *= _linear_path.LENGTH / np.sqrt((score**2).sum(1).mean())
    path, data = model.module_.linear, model._data(X)
    batch = data.batch(np.arange(200))
    found = path(batch.inputs, batch.present).numpy()
    for j, label in enumerate(y):
        line = LogisticRegression(C=_linear_path.STRENGTH, max_iter=500)
        exact = line.fit(np.hstack([tfidf, score]), y[label]).decision_function(
            np.hstack([tfidf, score])
        )
        assert np.corrcoef(exact, found[:, j])[0, 1] > 0.999
        assert np.median(np.abs(found[:, j] - exact)) < 0.05  # scores differ at the very ends


def test_linear_path_predicts_as_scikit_learn_would_with_several_classes():
    X, _ = made(150)
    y = np.array(["a", "b", "c"])[np.digitize(X["a"], [-0.5, 0.5])]
    model = MEDFuseClassifier({"labs": Labs(list("abcd"))}, max_epochs=1, **SMALL).fit(X, y)
    assert model.score(X, y) > 0.8
    assert np.allclose(model.predict_proba(X).sum(1), 1)


def test_network_starts_at_the_linear_path_and_can_do_without():
    X, y = made(100)
    model = MEDFuseClassifier(declared(), max_epochs=1, lr=1e-12, **SMALL).fit(X, y)
    batch = model._data(X).batch(np.arange(100))
    line = torch.sigmoid(model.module_.linear(batch.inputs, batch.present))
    np.testing.assert_allclose(model.predict_proba(X), line.numpy(), atol=1e-4)
    without = MEDFuseClassifier(declared(), linear=False, max_epochs=1, **SMALL).fit(X, y)
    assert without.module_.linear is None


def test_log_odds_of_a_training_row_never_saw_its_labels():
    X, y = made(120)
    seen = []
    for flip in (False, True):
        labels = y.copy()
        if flip:
            labels.iloc[:2] = 1 - labels.iloc[:2]  # the two rows of one patient
        model = MEDFuseClassifier(declared(), groups="subject", max_epochs=1, **SMALL)
        model.fit(X, labels)
        data = model._data(X, model.target_.encode(labels), np.ones(len(X), "float32"))
        seen.append(_linear_path.solve(model.module_.linear, data, model.target_, 0))
    np.testing.assert_array_equal(seen[0][:2], seen[1][:2])
    assert np.abs(seen[0][2:] - seen[1][2:]).max() > 0.01


def test_a_task_of_one_class_and_unknown_labels_have_a_line():
    X, y = made(80)
    y = y.assign(never=0.0)
    y.loc[::3, "text"] = np.nan
    with pytest.warns(UserWarning, match="'never' has one class only"):
        model = MEDFuseClassifier(declared(), max_epochs=1, **SMALL).fit(X, y)
    assert not model.module_.linear.weight[:, 3].any()
    assert np.isfinite(model.predict_proba(X)).all()


@pytest.mark.parametrize("share", [0.5, 0.99])
def test_values_left_out_are_random_and_one_stays(share):
    X, y = made(40)
    model = MEDFuseClassifier(declared(), value_dropout=share, max_epochs=1, **SMALL).fit(X, y)
    x = model._data(X).batch(np.arange(40)).inputs["labs"]
    thin = model.module_._thin(x)
    n = thin["code_mask"].sum(1)
    assert (n >= 1).all()
    assert n.float().mean() < (3 if share == 0.5 else 4.01)
    for row in range(40):
        kept = thin["code"][row][thin["code_mask"][row]].long()
        torch.testing.assert_close(
            thin["value"][row][thin["code_mask"][row]], x["value"][row][kept]
        )
    assert model.module_._thin({"ids": x["code"]}) == {"ids": x["code"]}


def test_streams_of_unequal_length_do_not_depend_on_their_batch():
    rng = np.random.default_rng(0)

    def stream(n):
        return [{"time": -float(t), "code": "abcde"[t % 5], "value": rng.normal()}
                for t in range(n)]  # fmt: skip

    lengths = np.r_[rng.integers(0, 8, 40), 60, 90]
    X = pd.DataFrame({"one": [stream(n) for n in lengths], "two": [stream(5) for _ in lengths]})
    modalities = {name: Events(name) for name in X}
    model = MEDFuseClassifier(modalities, max_epochs=1, **SMALL).fit(X, np.arange(42) % 2)
    rows = np.array([3, 40, 41])
    alone = np.vstack([model.predict_proba(X.iloc[[i]]) for i in rows])
    np.testing.assert_allclose(alone, model.predict_proba(X)[rows], atol=1e-6)


# ---------------------------------------------------------------- the bound


def test_closed_form_equals_all_pairs():
    torch.manual_seed(0)
    mean, log_variance, y = torch.randn(3, 40, 5).unbind()
    q = Normal(mean[:, None], (0.5 * log_variance).exp()[:, None])
    pairs = q.log_prob(y[None]).sum(-1)  # (i, j)
    torch.testing.assert_close(
        vclub(mean, log_variance, y), pairs.diagonal().mean() - pairs.mean(), atol=1e-5, rtol=1e-5
    )


def test_nll_is_that_of_a_normal():
    mean, log_variance, y = torch.randn(3, 40, 5).unbind()
    exact = -Normal(mean, (0.5 * log_variance).exp()).log_prob(y).sum(-1).mean()
    ours = gaussian_nll(mean, log_variance, y) + 2.5 * np.log(2 * np.pi)
    torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize("rho", [0.0, 0.7])
def test_bound_is_above_the_truth_and_near_zero_for_independent(rho):
    torch.manual_seed(0)
    d, net = 4, MutualInformation(4, 4)
    truth = -d / 2 * np.log(1 - rho**2)

    def draw(n):
        x = torch.randn(n, d)
        return x, rho * x + (1 - rho**2) ** 0.5 * torch.randn(n, d)

    for _ in range(150):
        x, y = draw(256)
        net.learn(x, y, 3)
    with torch.no_grad():
        found = float(net.bound(*draw(4000)))
    if rho:
        # Both are normalised row by row, which removes one axis and the length of every row.
        assert found >= 0.5 * truth
    else:
        assert abs(found) < 0.15


def test_bound_without_the_normalisation_is_above_the_truth():
    """With q exact, the closed form is at least the mutual information of the two."""
    torch.manual_seed(0)
    rho, d = 0.7, 4
    x = torch.randn(20_000, d)
    y = rho * x + (1 - rho**2) ** 0.5 * torch.randn(20_000, d)
    log_variance = torch.full_like(x, float(np.log(1 - rho**2)))
    assert vclub(rho * x, log_variance, y) >= -d / 2 * np.log(1 - rho**2) - 0.1


def test_gradients_of_bound_and_net_are_kept_apart():
    net = MutualInformation(6, 3)
    x, y = torch.randn(20, 6, requires_grad=True), torch.randn(20, 3, requires_grad=True)
    net.bound(x, y).backward()
    assert x.grad.any()
    assert y.grad.any()
    assert all(p.grad is None for p in net.parameters())
    x.grad = y.grad = None
    before = [p.detach().clone() for p in net.parameters()]
    net.learn(x, y, 2)
    assert x.grad is None
    assert y.grad is None
    assert any(not torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


def test_the_net_is_left_out_of_the_outer_optimiser(fitted):
    core = fitted.module_
    own = {id(p) for p in core.mutual.parameters()}
    groups = core.param_groups(1e-3, 0.1)
    held = {id(p) for group in groups for p in group["params"]}
    assert not held & own
    assert held | own == {id(p) for p in core.parameters()}


def test_weight_zero_is_the_term_removed():
    X, y = made(60)
    model = MEDFuseClassifier(declared(), mi_weight=0.0, max_epochs=1, **SMALL).fit(X, y)
    assert model.module_.mutual is None
    assert "train_mutual_information" not in model.history_[0]
    batch = model._data(X, model.target_.encode(y), np.ones(60, "float32")).batch(np.arange(60))
    parts = model.module_.eval()._parts(batch)
    terms = model.module_.losses(batch)
    assert set(terms) == {"outcome", "collapse"}
    loss = model.target_.loss(model.module_._predict(batch, parts), batch.y, batch.weight)
    torch.testing.assert_close(terms["outcome"], loss)


def test_guard_fires_on_a_constant_and_rests_otherwise():
    constant = torch.ones(50, 8) + torch.arange(8.0)
    assert collapse(constant) > 0.99
    assert collapse(torch.randn(500, 8)) == 0
    small = (0.01 * torch.randn(50, 8)).requires_grad_()
    collapse(small).backward()
    assert small.grad.any()


def test_guard_keeps_the_shared_part_alive():
    X, y = made(100)
    fallen = {}
    for guard in (0.0, 3.0):
        model = MEDFuseClassifier(
            declared(), mi_weight=3.0, guard_weight=guard, max_epochs=20, **SMALL
        ).fit(X, y)
        parts = model.module_.eval()._parts(model._data(X).batch(np.arange(100)))
        fallen[guard] = float(collapse(parts["shared"].detach()))
    assert fallen[3.0] < 0.5 * fallen[0.0]


# ---------------------------------------------------------------- fusion


@pytest.mark.parametrize("joint", ["kron", "lowrank", "none"])
def test_shapes_and_rows_without_a_branch(joint):
    torch.manual_seed(0)
    trunk = Disentangled(8, 2, 1, joint).eval()
    a, b = torch.randn(4, 3, 8), torch.randn(4, 5, 8)
    a_mask, b_mask = torch.ones(4, 3, dtype=torch.bool), torch.ones(4, 5, dtype=torch.bool)
    a_mask[0], b_mask[1] = False, False
    a_mask[2], b_mask[2] = False, False
    parts = trunk([(a, a_mask), (b, b_mask)])
    assert set(parts) == set(trunk.parts)
    assert all(p.shape == (4, 8) and p.isfinite().all() for p in parts.values())
    full = trunk([(a, torch.ones_like(a_mask)), (b, torch.ones_like(b_mask))])
    assert not torch.allclose(full["text"][0], parts["text"][0])
    torch.testing.assert_close(full["text"][3], parts["text"][3])
    noise = trunk([(torch.where(a_mask[..., None], a, 9.0), a_mask), (b, b_mask)])
    torch.testing.assert_close(noise["own_text"], parts["own_text"])


def test_kronecker_query_is_the_outer_product():
    trunk = Disentangled(8, 2, 1, "kron").eval()
    seen = []
    trunk.shared.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    a, b = torch.randn(2, 1, 8), torch.randn(2, 1, 8)
    mask = torch.ones(2, 1, dtype=torch.bool)
    trunk([(a, mask), (b, mask)])
    left, right = trunk.project[0](trunk.own[0](a, mask)[:, 0]), None
    right = trunk.project[1](trunk.own[1](b, mask)[:, 0])
    torch.testing.assert_close(seen[0][1], torch.outer(left[1], right[1]))


def test_a_branch_missing_changes_the_prediction(fitted):
    X, _ = made(20, seed=1)
    p = fitted.predict_proba(X)
    for column in (["note"], list("abcd")):
        other = fitted.predict_proba(X.assign(**dict.fromkeys(column)))
        assert np.isfinite(other).all()
        assert not np.allclose(other, p)


@pytest.mark.parametrize("part", ["note", "labs"])
def test_one_branch_alone_fits(part):
    X, y = made(80)
    model = MEDFuseClassifier({part: declared()[part]}, max_epochs=1, **SMALL).fit(X, y)
    assert np.isfinite(model.predict_proba(X)).all()


def test_full_is_above_each_part():
    X, y = made(800)
    train, test = np.arange(450), np.arange(450, 800)
    found = {}
    for name, modalities in {
        "full": declared(),
        "text": declared() | {"labs": "drop"},
        "labs": declared() | {"note": "drop"},
    }.items():
        model = MEDFuseClassifier(
            modalities, max_epochs=12, batch_size=16, weight_decay=0.01, **SMALL | {"d_model": 16}
        ).fit(X.iloc[train], y.iloc[train])
        p = model.predict_proba(X.iloc[test])
        found[name] = [roc_auc_score(y.iloc[test, k], p[:, k]) for k in range(3)]
    full, text, labs = (np.array(found[name]) for name in ("full", "text", "labs"))
    assert full[0] > 0.95
    assert full[1] > 0.95
    assert text[0] > 0.95
    assert labs[1] > 0.95
    assert text[1] < 0.6
    assert labs[0] < 0.6
    assert full[2] > max(text[2], labs[2]) + 0.03


def test_random_labels_are_a_coin():
    X, _ = made(700)
    y = pd.DataFrame(np.random.default_rng(1).integers(0, 2, (700, 4)) * 1.0)
    model = MEDFuseClassifier(declared(), cross_fit=2, max_epochs=4, **SMALL)
    p = model.fit(X.iloc[:300], y.iloc[:300]).predict_proba(X.iloc[300:])
    scores = [roc_auc_score(y.iloc[300:, k], p[:, k]) for k in range(4)]
    assert abs(np.mean(scores) - 0.5) < 0.05


# ---------------------------------------------------------------- two stages


def test_scores_of_training_rows_come_from_models_that_have_not_seen_the_patient(monkeypatch):
    X, y = made(80)
    seen = []
    inner = MEDFuseClassifier._fit

    def spy(self, X, *args, **options):
        seen.append((list(self.modalities), set(X["subject"])))
        return inner(self, X, *args, **options)

    monkeypatch.setattr(MEDFuseClassifier, "_fit", spy)
    model = MEDFuseClassifier(declared(), cross_fit=4, groups="subject", max_epochs=1, **SMALL)
    model.fit(X, y)
    folds = [subjects for names, subjects in seen[:4]]
    assert all(names == ["note"] for names, _ in seen[:5])
    assert seen[5][0] == ["note", "labs"]
    everybody = set(X["subject"])
    assert seen[4][1] == everybody
    held_out = [everybody - subjects for subjects in folds]
    assert sum(map(len, held_out)) == len(everybody) == len(set.union(*held_out))


def test_labels_of_a_row_do_not_reach_its_own_text_score(monkeypatch):
    X, y = made(80)
    scores = []

    def spy(self, X, p=None):
        if p is not None:
            scores.append(p.copy())
        return original(self, X, p)

    original = MEDFuseClassifier._with_scores
    monkeypatch.setattr(MEDFuseClassifier, "_with_scores", spy)
    model = MEDFuseClassifier(declared(), cross_fit=2, groups="subject", max_epochs=1, **SMALL)
    clone(model).fit(X, y)
    flipped = y.copy()
    rows = X["subject"] == X["subject"].iloc[0]
    flipped.loc[rows] = 1 - flipped.loc[rows]
    clone(model).fit(X, flipped)
    np.testing.assert_array_equal(scores[0][rows], scores[1][rows])
    assert not np.allclose(scores[0], scores[1])


def test_two_stages_predict_save_and_lack_a_note():
    X, y = made(100)
    model = MEDFuseClassifier(declared(), cross_fit=2, max_epochs=2, **SMALL).fit(X, y)
    p = model.predict_proba(X)
    assert p.shape == (100, 3)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(model)).predict_proba(X), p)
    np.testing.assert_array_equal(model.predict_proba(X[list(X)[::-1]].assign(more=1)), p)
    assert np.isfinite(model.predict_proba(X.assign(note=None))).all()
    assert model.predict(X).shape == (100, 3)
    binary = clone(model).fit(X, y["text"])
    assert binary.predict_proba(X).shape == (100, 2)
    with pytest.raises(ValueError, match="cross_fit needs a Text modality"):
        MEDFuseClassifier({"labs": Labs(["a"])}, cross_fit=2).fit(X, y)


def cohort(n=60):
    """Patients of `make_ehr`, and a small model of two of their modalities."""
    X, y = make_ehr(n, random_state=0)
    model = MEDFuseClassifier(
        {"labs": Labs(["sodium", "lactate"]), "note": Text("note")}, max_epochs=1, **SMALL
    )
    return X, np.asarray(y), model


def scores_read(monkeypatch):
    """Log-odds of the text model that fusions were fitted to, as they come."""
    scores, original = [], MEDFuseClassifier._with_scores

    def spy(self, X, p=None):
        found = original(self, X, p)
        if p is not None:
            scores.append(found.filter(like="note_score").to_numpy())
        return found

    monkeypatch.setattr(MEDFuseClassifier, "_with_scores", spy)
    return scores


WAYS = [{"thresholds": "f1"}, {"cross_fit": 2}, {"cross_fit": 2, "thresholds": "f1"}]


def same(a, b, X):
    np.testing.assert_array_equal(a.predict_proba(X), b.predict_proba(X))
    np.testing.assert_array_equal(getattr(a, "thresholds_", 0), getattr(b, "thresholds_", 0))


@pytest.mark.parametrize("way", WAYS)
def test_rows_of_weight_zero_are_as_good_as_absent(way):
    X, y, model = cohort()
    model.set_params(**way)
    weight = np.where(np.arange(60) < 40, np.linspace(1, 2, 60), 0.0)
    flipped = np.where(weight > 0, y, 1 - y)
    one, other = (clone(model).fit(X, labels, weight) for labels in (y, flipped))
    same(one, other, X)
    unknown = np.where(weight > 0, y, np.nan)
    same(one, clone(model).fit(X, unknown, weight), X)
    if "cross_fit" in way:
        same(one, clone(model).fit(X[:40], y[:40], weight[:40]), X)


@pytest.mark.parametrize("way", WAYS)
def test_one_outcome_in_a_frame_is_the_same_outcome(way):
    X, y, model = cohort()
    model.set_params(**way)
    same(clone(model).fit(X, y), clone(model).fit(X, pd.DataFrame({"died": y})), X)


def test_scores_have_a_column_for_every_class_whatever_a_fold_holds(monkeypatch):
    X, _, model = cohort()
    scores = scores_read(monkeypatch)
    names = np.array(["a", "b", "c", "d"])
    for rare in (0, 2, 3):  # two rows of a class in three folds, then one
        for count in (2, 1):
            place = np.arange(60) % 3
            place[place >= rare] += 1
            place[:count] = rare
            y = names[place]
            model.set_params(cross_fit=3, class_weight={names[rare]: 2.0}).fit(X, y)
            assert scores[-1].shape == (60, 3)
            p = model.predict_proba(X)
            assert p.shape == (60, 4)
            np.testing.assert_allclose(p.sum(1), 1, atol=1e-6)
            noted = X["note"].notna().to_numpy()
            known = ~np.isnan(scores[-1][noted])
            assert (known.all(0) | ~known.any(0)).all()  # or null would name a fold
            assert known.all(0).tolist() == [j != rare or count == 2 for j in (1, 2, 3)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("groups", [None, "subject_id"])
def test_one_rare_positive_and_few_patients_are_enough(way, groups):
    X, _, model = cohort()
    X = X.assign(subject_id=np.arange(60) // 20)
    y = (np.arange(60) == 7) * 1
    model.set_params(**way, groups=groups).fit(X, y)
    assert np.isfinite(model.predict_proba(X)).all()
    if "thresholds" in way:  # nothing that was taught a positive has scored one
        assert model.thresholds_ == 0.5


@pytest.mark.parametrize("way", WAYS)
def test_too_few_patients_are_counted_in_the_words_of_the_user(way):
    X, y, model = cohort()
    n = len(way)  # of both ways at once each fold of the one needs two patients for the other
    X = X.assign(subject_id=np.arange(60) % n)
    model.set_params(**way, groups="subject_id")
    with pytest.raises(ValueError, match=f"at least {n + 1} patients .* there are {n}. Use more"):
        clone(model).fit(X, y)
    X = X.assign(subject_id=np.arange(60) % (n + 1))
    assert np.isfinite(clone(model).fit(X, y).predict_proba(X)).all()
    tasks = pd.DataFrame({"a": y, "b": 1 - y}).where(X["subject_id"] == 0)  # others: unknown
    with pytest.raises(ValueError, match=r"need a label .* there are 1\."):
        clone(model).fit(X, tasks)


def test_the_only_positive_is_not_given_away_by_its_fold(monkeypatch):
    X, _, model = cohort()
    scores = scores_read(monkeypatch)
    model.set_params(cross_fit=3).fit(X, (np.arange(60) == 7) * 1)
    assert np.isnan(scores[0]).all()  # a fold without its positive says less than the others
    p = model.predict_proba(X)
    np.testing.assert_array_equal(model.predict_proba(X.assign(note="other words")), p)


def test_validation_rows_reach_no_score_of_training_rows(monkeypatch):
    X, y = made(120)
    scores, fits, inner = scores_read(monkeypatch), [], MEDFuseClassifier._fit_modalities

    def spy(self, X, declared):
        fits.append(set(X["subject"]))
        return inner(self, X, declared)

    monkeypatch.setattr(MEDFuseClassifier, "_fit_modalities", spy)
    model = MEDFuseClassifier(
        declared(), cross_fit=2, thresholds="f1", groups="subject", validation_fraction=0.25,
        max_epochs=1, **SMALL,
    )  # fmt: skip
    clone(model).fit(X, y)
    assert len(fits) == 4  # two folds, the text model, the fusion: both stages of the same rows
    assert fits[2] == fits[3]
    assert fits[0] | fits[1] <= fits[2]
    inside = X["subject"].isin(fits[3]).to_numpy()
    assert (~inside).sum() == 30
    flipped = y.copy()
    flipped.loc[~inside] = 1 - flipped.loc[~inside]
    clone(model).fit(X, flipped)
    np.testing.assert_array_equal(scores[0][inside], scores[1][inside])
    X_val, y_val = made(40, seed=1)
    clone(model).fit(X, y, X_val=X_val, y_val=y_val)  # these instead: no row leaves
    assert [len(f) for f in fits[-2:]] == [60, 60]


def test_thresholds_of_two_stages_never_saw_the_patient(monkeypatch):
    X, y = made(90)
    seen, inner = [], MEDFuseClassifier._fit_in_stages
    found, original = [], MEDFuseClassifier._out_of_fold

    def spy(self, X, *args):
        seen.append(set(X["subject"]))
        return inner(self, X, *args)

    def out(self, *args, **options):
        found.append(original(self, *args, **options))
        return found[-1]

    monkeypatch.setattr(MEDFuseClassifier, "_fit_in_stages", spy)
    monkeypatch.setattr(MEDFuseClassifier, "_out_of_fold", out)
    model = MEDFuseClassifier(
        declared(), cross_fit=2, thresholds="f1", groups="subject", max_epochs=1, **SMALL
    )
    clone(model).fit(X, y)
    everybody, *folds = seen
    assert sorted(set.union(*(everybody - f for f in folds))) == sorted(everybody)
    assert sum(len(everybody - f) for f in folds) == len(everybody)
    flipped = y.copy()
    flipped.iloc[:2] = 1 - flipped.iloc[:2]  # the two rows of one patient
    before = found[-1]
    clone(model).fit(X, flipped)
    np.testing.assert_array_equal(before[:2], found[-1][:2])
    assert not np.allclose(before, found[-1])


def test_two_stages_need_the_columns_of_one():
    X, y, model = cohort()
    model.set_params(cross_fit=2, groups="subject_id").fit(X, y)
    p = model.predict_proba(X)
    np.testing.assert_array_equal(model.predict_proba(X.drop(columns="subject_id")), p)
    with pytest.raises(ValueError, match=r"X lacks columns that fit has read: \['note'\]"):
        model.predict_proba(X.drop(columns="note"))
    plain = clone(model).set_params(cross_fit=None).fit(X, y)
    assert list(model.feature_names_in_) == list(plain.feature_names_in_)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_wrong_is_said_as_by_a_plain_fit(way):
    X, y, model = cohort()
    for params, labels, weight in [
        ({"groups": "nope"}, y, None), ({}, y, np.ones(7)), ({}, None, None), ({}, y[:50], None),
        ({}, y, -np.ones(60)), ({"thresholds": "f2"}, y, None), ({"freeze": "encoders"}, y, None),
    ]:  # fmt: skip
        said = []
        for more in ({}, way):
            with pytest.raises(ValueError) as error:  # noqa: PT011
                clone(model).set_params(**more | params).fit(X, labels, weight)
            said.append(str(error.value))
        assert said[0] == said[1]


def test_two_stages_list_what_they_do_not_read():
    X, y, model = cohort()
    model.set_params(modalities={"course": Visits("visits"), **model.modalities}, cross_fit=2)
    model.fit(X.assign(visits=None), y)
    assert model.ignored_modalities_ == ["course"]
    assert model.predict_proba(X).shape == (60, 2)


def test_every_stage_freezes_its_own_parts():
    X, y, model = cohort()
    model.set_params(cross_fit=2)
    model.set_params(freeze=("encoders.labs", "encoders.note", "trunk")).fit(X, y)
    assert model.text_stage_.freeze == ("encoders.note",)
    assert model.fusion_stage_.freeze == ("encoders.labs", "trunk")
    for part in ("encoders.notes", "trunks"):
        with pytest.raises(ValueError, match=f"freeze names '{part}', which this model does not"):
            clone(model).set_params(freeze=(part,)).fit(X, y)


def test_warnings_point_to_the_line_of_the_user():
    X, y, model = cohort(20)
    for cross_fit in (None, 2):
        model.set_params(validation_fraction=0.1, cross_fit=cross_fit)
        with pytest.warns(UserWarning, match="20 training rows are too few") as found:
            model.fit(X, y)
        assert [w.filename for w in found] == [__file__]


def test_test_labels_and_rows_leave_predictions_alone(fitted):
    X, _ = made(40, seed=3)
    p = fitted.predict_proba(X)
    np.testing.assert_allclose(fitted.predict_proba(X.iloc[10:20]), p[10:20], atol=1e-7)


# ---------------------------------------------------------------- thresholds


def test_best_threshold_is_the_best_of_all():
    rng = np.random.default_rng(0)
    for _ in range(20):
        y = (rng.random(30) < 0.3).astype(float)
        p = rng.integers(0, 12, 30) / 12
        y[0] = 1
        found = medfuse._best_threshold(y, p, np.ones(30))
        best = max(f1_score(y, p > t) for t in [-0.01, *np.unique(p)[:-1]])
        assert f1_score(y, p > found) == pytest.approx(best)
    y[:] = np.nan
    assert medfuse._best_threshold(y, p, np.ones(30)) == 0.5
    assert medfuse._best_threshold(np.zeros(30), p, np.ones(30)) == 0.5


def test_a_row_of_weight_two_is_two_rows_to_a_threshold():
    rng = np.random.default_rng(0)
    for _ in range(20):
        y, p = (rng.random(30) < 0.4).astype(float), rng.random(30)
        weight = rng.integers(0, 4, 30)
        found = medfuse._best_threshold(y, p, weight)
        rows = np.repeat(np.arange(30), weight)
        assert f1_score(y, p > found, sample_weight=weight) == pytest.approx(
            f1_score(y[rows], p[rows] > medfuse._best_threshold(y[rows], p[rows], rows * 0 + 1))
        )
    assert medfuse._best_threshold(np.ones(3), np.full(3, np.nan), np.ones(3)) == 0.5


@pytest.mark.parametrize("validation_fraction", [None, 0.3])
def test_weights_choose_thresholds_too(validation_fraction):
    X, y = made(120)
    model = MEDFuseClassifier(
        declared(), thresholds="f1", validation_fraction=validation_fraction, lr=1e-12,
        linear=False, max_epochs=1, **SMALL,
    )  # fmt: skip
    y = y["both"].to_numpy()
    equal, rare = (clone(model).fit(X, y, np.where(y > 0, w, 1)) for w in (1, 50))
    share = [(m.predict_proba(X)[:, 1] > m.thresholds_).mean() for m in (equal, rare)]
    assert share[1] > share[0]


@pytest.mark.parametrize("validation_fraction", [None, 0.3])
@pytest.mark.parametrize("cross_fit", [None, 2])
def test_thresholds_come_from_rows_that_are_held_out(validation_fraction, cross_fit):
    X, y = made(120)
    y["rare"] = (np.arange(120) % 10 == 0) * 1.0
    model = MEDFuseClassifier(
        declared(), thresholds="f1", validation_fraction=validation_fraction,
        cross_fit=cross_fit, max_epochs=1, **SMALL,
    ).fit(X, y)  # fmt: skip
    assert model.thresholds_.shape == (4,)
    p = model.predict_proba(X)
    np.testing.assert_array_equal(model.predict(X), (p > model.thresholds_).astype(int))
    assert model.thresholds_[3] < 0.5
    model.set_params(thresholds=None).fit(X, y)
    assert not hasattr(model, "thresholds_")


def test_thresholds_need_yes_or_no():
    X, _ = made(60)
    model = MEDFuseClassifier(declared(), thresholds="f1", max_epochs=1, **SMALL)
    with pytest.raises(ValueError, match="y has 3 classes"):
        model.fit(X, np.arange(60) % 3)
    model.fit(X, np.where(np.arange(60) % 2, "ill", "well"))
    assert set(model.predict(X)) <= {"ill", "well"}


# ---------------------------------------------------------------- text models


@pytest.mark.parametrize("write", [write_bert, write_llama])
def test_adapters_train_and_nothing_else_does(write, tmp_path):
    pytest.importorskip("peft")
    folder = write(tmp_path / "model")
    X, y = made(40)
    note = Text(
        "note", model=folder, trainable=True, lora_rank=2, pooling="last", chunk_length=32,
        max_length=32,
    )  # fmt: skip
    model = MEDFuseClassifier(
        {"note": note, "labs": Labs(list("abcd"))}, max_epochs=2, **SMALL
    ).fit(X, y)
    backbone = model.module_.encoders["note"].backbone
    moved = {name for name, p in backbone.named_parameters() if p.requires_grad}
    assert moved
    assert all("lora_" in name for name in moved)
    p = model.predict_proba(X)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(model)).predict_proba(X), p)
    rows = [model.predict_proba(X.iloc[[i]]) for i in range(3)]
    np.testing.assert_allclose(np.concatenate(rows), p[:3], atol=1e-7)


def test_adapters_start_at_zero(tmp_path):
    pytest.importorskip("peft")
    folder = write_bert(tmp_path / "bert", dropout=0.0)
    X, _ = made(10)
    encoders = []
    for rank in (None, 2):
        note = Text("note", model=folder, trainable=True, lora_rank=rank, chunk_length=32).fit(X)
        torch.manual_seed(0)
        encoders.append(note.make_encoder(8).eval().backbone)
    ids = torch.randint(5, 40, (3, 12))
    mask = torch.ones_like(ids).bool()
    torch.testing.assert_close(encoders[0](ids, mask), encoders[1](ids, mask))
    with pytest.raises(ValueError, match="lora_rank needs trainable=True"):
        Text("note", model=folder, lora_rank=2).fit(X)


def test_precomputed_note_vectors_are_a_text_branch():
    cohort = make_ehr(n_samples=60, random_state=0, as_bunch=True)
    modalities = {"labs": cohort.modalities["labs"], "cxr": Embedding("cxr")}
    model = MEDFuseClassifier(modalities, max_epochs=1, **SMALL).fit(cohort.X, cohort.y)
    assert model.module_.is_text == [False, True]


# ---------------------------------------------------------------- labs as text


def lab_frame():
    return pd.DataFrame({
        "sodium": [128.0, 140.0, None, 139.0], "lactate": [6.1, 1.0, None, 0.2],
        "sex": ["F", "M", "F", "M"],
    })  # fmt: skip


def test_most_abnormal_first_with_units_direction_and_range():
    ranges = {"sodium": (135, 145), "lactate": (0.5, 2.0)}
    text = LabTextifier(reference_ranges=ranges, units={"lactate": "mmol/L"})
    out = text.fit_transform(lab_frame())["lab_text"].tolist()
    assert out == [
        "Abnormal results: lactate 6.1 mmol/L high (0.5-2); sodium 128 low (135-145).",
        "",
        None,
        "Abnormal results: lactate 0.2 mmol/L low (0.5-2).",
    ]
    assert list(text.get_feature_names_out()) == ["sodium", "lactate", "sex", "lab_text"]


def test_what_lies_beyond_a_bound_is_written_beyond_it():
    X = pd.DataFrame({"a": [1.50391, 1.50397, 2.0]})
    text = LabTextifier(reference_ranges={"a": (1.50394, 1.9)}, units={"a": "u"})
    assert text.fit_transform(X)["lab_text"].tolist() == [
        "Abnormal results: a 1.50391 u low (1.50394-1.9).",
        "",
        "Abnormal results: a 2 u high (1.504-1.9).",
    ]


@pytest.mark.parametrize("option", ["reference_ranges", "units", "names"])
def test_options_for_no_column_are_refused(option):
    with pytest.raises(ValueError, match=rf"{option} speaks of \['lactat'\], which X has no col"):
        LabTextifier(["lactate"], **{option: {"lactat": (0, 1)}}).fit(lab_frame())


def test_normal_results_follow_and_the_count_is_held():
    ranges = {"sodium": (135, 145), "lactate": (0.5, 2.0)}
    options = {"reference_ranges": ranges, "abnormal_only": False, "names": {"sodium": "Na"}}
    out = LabTextifier(**options).fit_transform(lab_frame())["lab_text"]
    assert out[1] == "Normal results: Na 140; lactate 1."
    assert out[3] == "Abnormal results: lactate 0.2 low (0.5-2). Normal results: Na 139."
    short = LabTextifier(max_items=1, **options).fit_transform(lab_frame())["lab_text"]
    assert short[0] == "Abnormal results: lactate 6.1 high (0.5-2)."


def test_ranges_are_learned_from_training_rows_only():
    rng = np.random.default_rng(0)
    X = pd.DataFrame({"a": rng.normal(size=2000)})
    text = LabTextifier(coverage=0.9).fit(X)
    np.testing.assert_allclose(text.ranges_["a"], stats.norm.ppf([0.05, 0.95]), atol=0.1)
    before = dict(text.ranges_)
    text.transform(X * 100)
    assert text.ranges_ == before
    with pytest.raises(ValueError, match="the lowest normal value comes first"):
        LabTextifier(reference_ranges={"a": (2, 1)}).fit(X)
    with pytest.raises(ValueError, match="lacks columns"):
        text.transform(X.rename(columns={"a": "b"}))


def test_labs_that_are_no_numbers_are_refused():
    X = lab_frame()
    text = LabTextifier(["sodium", "lactate"]).fit(X)
    when = X.assign(lactate=pd.Timestamp("2020-01-01"))
    for bad, message in [
        (X.assign(lactate=np.inf), r"\['lactate'\] hold infinity"),
        (when, "'lactate' is read as numbers, but row 0 holds Timestamp"),
        (X.assign(lactate="Ada Lovelace"), "row 0 holds str of length 12"),
        (pd.concat([X, X[["lactate"]]], axis=1), "columns of the same name"),
        (X.to_numpy(), "ndarray; it must be a pandas DataFrame"),
    ]:
        for call in (text.transform, LabTextifier(["sodium", "lactate"]).fit):
            with pytest.raises(ValueError, match=message):
                call(bad)


def test_notes_that_are_no_text_are_refused():
    X = pd.DataFrame({"note": ["fever", None, 7]})
    with pytest.raises(ValueError, match=r"row 2 holds int 7\. Convert"):
        NoteSectionizer().fit(X).transform(X)
    with pytest.raises(ValueError, match="must be a pandas DataFrame"):
        NoteSectionizer().fit(X.to_numpy())


NOTE = """Chief Complaint: Chest pain
History of Present Illness:
A man with pain. Seen at 10:30.

Hospital Course: died of sepsis
PAST MEDICAL HISTORY: Sepsis, heart failure
Discharge Diagnosis: sepsis"""


def test_sections_are_kept_whatever_their_case():
    out = NoteSectionizer().fit_transform(pd.DataFrame({"note": [NOTE, "plain", "", None]}))
    first, plain, empty, absent = out["note"].tolist()
    assert first.splitlines() == [
        "Chief Complaint: Chest pain", "History of Present Illness:",
        "A man with pain. Seen at 10:30.", "PAST MEDICAL HISTORY: Sepsis, heart failure",
    ]  # fmt: skip
    assert (plain, empty, absent) == ("plain", "", None)


def test_terms_are_hidden_as_whole_words_and_long_notes_cut_in_the_middle():
    X = pd.DataFrame({"note": ["Sepsis and asepsis, heart failure, SEPSIS", "a b c d e f g"]})
    out = NoteSectionizer(hide_terms=("sepsis", "heart failure"), max_words=5).fit_transform(X)
    assert out["note"].tolist() == ["and asepsis, , ", "a b c f g"] or out["note"][0].split() == [
        "and", "asepsis,", ",",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="must be a tuple of str"):
        NoteSectionizer(hide_terms="sepsis").fit(X)


def test_columns_that_look_like_scores_are_refused_in_two_stages():
    X, y = made(60)
    X = X.assign(note_score_0=1.0)
    parts = {"note": Text("note"), "labs": Labs(["a", "note_score_0"])}
    with pytest.raises(ValueError, match=r"\['note_score_0'\] begin with 'note_score_'"):
        MEDFuseClassifier(parts, cross_fit=2, max_epochs=1, **SMALL).fit(X, y)


def test_idle_patience_is_told_once_in_two_stages():
    X, y = made(60)
    with pytest.warns(UserWarning, match="does nothing") as told:
        MEDFuseClassifier(declared(), cross_fit=2, patience=1, max_epochs=1, **SMALL).fit(X, y)
    idle = [w for w in told if "does nothing" in str(w.message)]
    assert [w.filename for w in idle] == [__file__]
