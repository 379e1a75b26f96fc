"""Knowledge retrieval and the two stages: what leaks nowhere, what a planted fact must bring."""

import pickle
import sys
from itertools import pairwise

import checks
import numpy as np
import pandas as pd
import pytest
import tiny_models
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.utils import Bunch
from sklearn.utils.estimator_checks import parametrize_with_checks

import ehrfuse.methods._two_stage as two
from ehrfuse import (
    FusionClassifier,
    KnowledgeAugmentedRiskModel,
    KnowledgeGraph,
    KnowledgeRetriever,
    Tabular,
    Text,
)
from ehrfuse.datasets import make_ehr
from ehrfuse.methods._causal_notes import CausalNoteClassifier

WORDS = ["alpha", "beta", "gamma", "delta", "sigma", "kappa", "lambda", "omega"]


@pytest.fixture(scope="module")
def graph():
    """Forty conditions, any two of them joined or not, and one dated fact."""
    rng = np.random.default_rng(0)
    names = [f"{a}itis {b}" for a in WORDS for b in ("major", "minor", "acuta", "tarda", "mitis")]
    rows = [
        (names[i], "worsens" if rng.random() < 0.7 else "not_related_to", names[j], "base", None)
        for i in range(40)
        for j in range(40)
        if i != j and rng.random() < 0.12
    ]
    rows.append((names[0], "worsens", names[39], "late", "2020"))
    table = pd.DataFrame(rows, columns=["head", "relation", "tail", "source", "date"])
    return KnowledgeGraph.from_triples(table.assign(evidence=[f"pm{i}" for i in range(len(table))]))


def test_a_graph_in_another_language_is_told(graph):
    X = pd.DataFrame({"note": ["Fieber und Husten", None], "icd": [["X1"], None]})
    with pytest.warns(UserWarning, match=r"Nothing in the columns \['note', 'icd'\] of 2 rows"):
        KnowledgeRetriever(graph, codes={"icd": "ICD9CM"}).fit(X)
    with pytest.raises(ValueError, match=r"name yours in KnowledgeRetriever\(text="):
        KnowledgeRetriever(graph).fit(X[["icd"]])


def planted(graph, n, seed, risk=(0.15, 0.75)):
    """Notes of two conditions; the risk is high where the graph joins them. Alone, none tells."""
    rng = np.random.default_rng(seed)
    facts = graph.facts[~graph.negative[graph.facts["relation"]]]
    linked = set(zip(facts["head"], facts["tail"], strict=True))
    linked |= {(b, a) for a, b in linked}
    pick = facts.iloc[rng.integers(len(facts), size=n)]
    head, tail = pick["head"].to_numpy(), pick["tail"].to_numpy().copy()
    apart = np.flatnonzero(rng.random(n) < 0.5)
    tail[apart] = tail[rng.permutation(apart)]  # the same conditions as often, in other company
    joined = np.array([pair in linked for pair in zip(head, tail, strict=True)])
    names = graph.node_names
    notes = [f"Seen for {names[a]}. Also has {names[b]}." for a, b in zip(head, tail, strict=True)]
    X = pd.DataFrame({"note": notes, "age": rng.normal(60, 10, n), "pid": np.arange(n) // 2})
    return X, (rng.random(n) < np.where(joined, risk[1], risk[0])).astype(int)


def model(graph=None, **options):
    modalities = {"table": Tabular(["age"]), "note": Text("note", min_count=2)}
    options = {"stage2": "lr", "n_splits": 3, "groups": "pid", "random_state": 0} | options
    return KnowledgeAugmentedRiskModel(modalities, knowledge=graph, **options)


def features_of(fitted, X):
    """Everything that stage 2 sees of rows."""
    frame, numbers = fitted._inputs(fitted._frame(X, reset=False))
    return fitted.tasks_[0].join(numbers, *fitted.tasks_[0].read(frame, fitted._sentences))


# ---------------------------------------------------------------- common checks


@pytest.mark.filterwarnings("ignore:.*training rows are too few:UserWarning")
@parametrize_with_checks(
    [KnowledgeAugmentedRiskModel(n_splits=2, stage2="lr", random_state=0)],
    expected_failed_checks=lambda _: {
        "check_class_weight_classifiers": "probabilities are calibrated, which undoes the weights"
    },
)
def test_sklearn_checks(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def cohort():
    return make_ehr(n_samples=72, missing="mnar", random_state=0, as_bunch=True)


CHECKS = (
    checks.check_one_modality_null_for_everyone, checks.check_half_of_a_modality_null,
    checks.check_row_without_anything, checks.check_rows_are_independent,
    checks.check_other_indices_and_dtypes, checks.check_inputs_untouched,
    checks.check_extra_columns_and_order, checks.check_missing_column_is_named,
    checks.check_failed_predict_loses_nothing, checks.check_seed,
)  # fmt: skip


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__[6:])
def test_multimodal_checks(check, cohort):
    accepted = {
        name: m for name, m in cohort.modalities.items()
        if isinstance(m, KnowledgeAugmentedRiskModel._accepts)
    }  # fmt: skip
    estimator = KnowledgeAugmentedRiskModel(
        accepted, groups="subject_id", n_splits=2, stage2="lr", random_state=0
    )
    check(estimator, Bunch(**cohort | {"modalities": accepted}))


def test_other_kinds_are_ignored_and_listed(cohort):
    fitted = KnowledgeAugmentedRiskModel(cohort.modalities, n_splits=2, stage2="lr").fit(
        cohort.X, cohort.y
    )
    assert set(fitted.ignored_modalities_) == {"cxr", "film"}
    assert {"structured", "notes"} == set(fitted.feature_groups_)
    assert any("n_visits" in name for name in fitted.feature_groups_["structured"])


# ---------------------------------------------------------------- the planted fact


def test_true_knowledge_gains_shuffled_random_and_absent_do_not(graph):
    X, y = planted(graph, 700, seed=0)
    new, truth = planted(graph, 500, seed=1)

    def auroc(knowledge):
        fitted = model(knowledge).fit(X, y)
        return roc_auc_score(truth, fitted.predict_proba(new)[:, 1])

    assert auroc(KnowledgeRetriever(graph)) > 0.72
    for control in ("shuffled", "random"):
        assert abs(auroc(KnowledgeRetriever(graph, control=control)) - 0.5) < 0.1
    assert abs(auroc(None) - 0.5) < 0.1


def test_random_knowledge_is_as_long(graph):
    X, _ = planted(graph, 60, seed=2)
    true = KnowledgeRetriever(graph).fit_transform(X)
    other = KnowledgeRetriever(graph, control="random").fit_transform(X)
    words = true["knowledge"].str.split().str.len(), other["knowledge"].str.split().str.len()
    assert (words[0] - words[1]).between(0, 4).all()  # less than one fact
    assert (true["knowledge"] != other["knowledge"]).mean() > 0.9
    np.testing.assert_array_equal(true["knowledge__n_mentions"], other["knowledge__n_mentions"])
    again = KnowledgeRetriever(graph, control="random").fit(X).transform(X.iloc[::-1])
    pd.testing.assert_frame_equal(again.iloc[::-1], other)  # a row's draw is its own


# ---------------------------------------------------------------- no leak


def test_permuted_test_labels_leave_every_test_feature_bit_equal(graph):
    X, y = planted(graph, 200, seed=3)
    test = X["pid"].to_numpy() % 4 == 0
    other = y.copy()
    other[test] = np.random.default_rng(0).permutation(y[test])
    assert (other != y).any()
    fits = [
        model(KnowledgeRetriever(graph), rationale="extractive").fit(X[~test], labels[~test])
        for labels in (y, other)
    ]
    np.testing.assert_array_equal(*(features_of(fitted, X[test]) for fitted in fits))
    np.testing.assert_array_equal(*(fitted.predict_proba(X[test]) for fitted in fits))


def test_permuted_training_labels_give_chance(graph):
    X, y = planted(graph, 600, seed=4)
    new, truth = planted(graph, 800, seed=5)
    shuffled = np.random.default_rng(1).permutation(y)
    fitted = model(KnowledgeRetriever(graph), groups=None).fit(X, shuffled)
    assert abs(roc_auc_score(truth, fitted.predict_proba(new)[:, 1]) - 0.5) < 0.06


def test_a_row_s_own_label_never_reaches_its_stage_1_features(graph):
    X, y = planted(graph, 120, seed=6)
    fitted = model(KnowledgeRetriever(graph)).fit(X, y)
    frame, _ = fitted._inputs(X)
    groups = X["pid"].to_numpy()
    folds = two.folds_of(y, groups, 3, 0)
    test = folds[0][1]
    other = y.copy()
    other[test] = 1 - y[test]
    scores = []
    for labels in (y, other):
        task = clone_task(fitted, labels)
        task.fit_reader(frame, labels, folds, fitted._sentences)
        scores.append(task.held_out[0])
    np.testing.assert_array_equal(scores[0][test], scores[1][test])
    assert (scores[0] != scores[1]).any()


def clone_task(fitted, labels):
    from ehrfuse.methods.knowledge_risk import _Task

    return _Task(fitted._reader(0), 2, None, 4, 0)


class Watcher(ClassifierMixin, BaseEstimator):
    """Complains when asked about a patient whom it has seen in fit."""

    asked = 0

    def fit(self, X, y):
        self.classes_, self.seen_ = np.unique(y), set(X["age"])
        return self

    def predict_proba(self, X):
        Watcher.asked += len(X)
        assert not self.seen_ & set(X["age"])
        return np.full((len(X), 2), 0.5)


def test_no_fold_separates_rows_of_a_patient(graph):
    X, y = planted(graph, 90, seed=7)
    X["age"] = X["pid"].astype(float)  # so that the watcher knows who it is
    Watcher.asked = 0
    model(stage1=Watcher()).fit(X, y)
    assert Watcher.asked == len(X)
    with pytest.raises(AssertionError):
        model(stage1=Watcher(), groups=None).fit(X, y)


def test_facts_after_the_cutoff_change_nothing(graph):
    late = f"{graph.node_names[graph.head[graph.sources[graph.source] == 'late'][0]]}"
    X, _ = planted(graph, 100, seed=8)
    X.loc[::2, "note"] = f"{late}. {graph.node_names[-1]}."
    never = graph.without(sources=["late"])
    cut, without, full = (
        KnowledgeRetriever(g, cutoff=c).fit_transform(X)
        for g, c in ((graph, "2020-06-01"), (never, None), (graph, None))
    )
    pd.testing.assert_frame_equal(cut, without)
    assert not cut["knowledge"].equals(full["knowledge"])
    assert not any("late" in f["sources"].tolist() for _, f in KnowledgeRetriever(
        graph, cutoff=2020).fit(X).explain(X.head(4)))  # fmt: skip


def test_retrieval_learns_from_training_rows_and_nothing_else(graph):
    X, y = planted(graph, 80, seed=9)
    fitted = KnowledgeRetriever(graph).fit(X.head(40), y[:40])
    again = KnowledgeRetriever(graph).fit(X.head(40), 1 - y[:40])
    np.testing.assert_array_equal(fitted.idf_, again.idf_)
    np.testing.assert_array_equal(fitted.communities_, again.communities_)
    many = fitted.transform(X)
    pd.testing.assert_frame_equal(fitted.transform(X.iloc[[50, 3]]), many.iloc[[50, 3]])
    other = KnowledgeRetriever(graph).fit(X)
    assert (other.idf_ != fitted.idf_).any()


# ---------------------------------------------------------------- outcomes and options


def test_tasks_with_unknown_labels_and_one_without_positives(graph):
    X, y = planted(graph, 200, seed=10)
    rng = np.random.default_rng(0)
    tasks = pd.DataFrame({"event": np.where(rng.random(200) < 0.3, np.nan, y), "never": 0.0})
    with pytest.warns(UserWarning, match="'never' has one class"):
        fitted = model(KnowledgeRetriever(graph)).fit(X, tasks)
    proba = fitted.predict_proba(X)
    assert proba.shape == (200, 2)
    assert fitted.target_names_ == ["event", "never"]
    np.testing.assert_array_equal(proba[:, 1], 0)
    alone = model(KnowledgeRetriever(graph)).fit(
        X[tasks["event"].notna()], y[tasks["event"].notna()]
    )
    assert np.corrcoef(proba[:, 0], alone.predict_proba(X)[:, 1])[0, 1] > 0.95
    assert set(np.unique(fitted.predict(X)[:, 0])) == {0, 1}


def test_three_classes(graph):
    X, y = planted(graph, 150, seed=11)
    labels = np.where(X["age"] > 65, "old", np.where(y, "sick", "well"))
    fitted = model(KnowledgeRetriever(graph), stage2="hgb").fit(X, labels)
    proba = fitted.predict_proba(X)
    np.testing.assert_allclose(proba.sum(axis=1), 1)
    assert (fitted.predict(X) == labels).mean() > 0.6


@pytest.mark.parametrize("calibrate", ["sigmoid", "isotonic"])
def test_balancing_is_undone_by_calibration(graph, calibrate):
    X, y = planted(graph, 600, seed=12, risk=(0.02, 0.15))
    options = {"class_weight": "balanced", "stage1": None}
    raw = model(KnowledgeRetriever(graph), calibrate=None, **options).fit(X, y)
    fixed = model(KnowledgeRetriever(graph), calibrate=calibrate, **options).fit(X, y)
    assert raw.predict_proba(X)[:, 1].mean() > 2 * y.mean()
    assert abs(fixed.predict_proba(X)[:, 1].mean() - y.mean()) < 0.02


@pytest.mark.parametrize(
    ("rule", "least"), [("youden", 0), ("f1", 0), (("sensitivity", 0.9), 0.85)]
)
def test_thresholds(graph, rule, least):
    X, y = planted(graph, 400, seed=13)
    fitted = model(KnowledgeRetriever(graph), threshold=rule).fit(X, y)
    new, truth = planted(graph, 600, seed=14)
    guess = fitted.predict(new)
    assert guess[truth == 1].mean() > max(least, guess[truth == 0].mean())
    assert 0 < fitted.thresholds_[0] < 1


@pytest.mark.parametrize("stage2", ["hgb", "xgboost", "lr", RandomForestClassifier(20)])
def test_second_stages(graph, stage2):
    X, y = planted(graph, 250, seed=15)
    fitted = model(KnowledgeRetriever(graph), stage2=stage2, n_splits=2).fit(X, y)
    assert roc_auc_score(y, fitted.predict_proba(X)[:, 1]) > 0.7
    again = model(KnowledgeRetriever(graph), stage2=stage2, n_splits=2).fit(X, y)
    np.testing.assert_array_equal(fitted.predict_proba(X), again.predict_proba(X))


def test_balanced_forest_or_its_pip_line(graph):
    X, y = planted(graph, 120, seed=16)
    try:
        import imblearn  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match=r"pip install 'ehrfuse\[boost\]'"):
            model(stage2="brf").fit(X, y)
    else:
        assert model(stage2="brf").fit(X, y).predict_proba(X).shape == (120, 2)


def test_nested_parameters_in_a_search(graph):
    X, y = planted(graph, 120, seed=17)
    search = GridSearchCV(
        model(KnowledgeRetriever(graph), n_splits=2),
        {"knowledge__control": [None, "shuffled"], "note__min_count": [3], "rationale": [None]},
        cv=2, scoring="roc_auc",
    ).fit(X, y)  # fmt: skip
    assert search.best_params_["knowledge__control"] is None


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"stage1": "gpt"}, "stage1='gpt' is not known"),
        ({"stage1": "hf-encoder"}, "needs model="),
        ({"stage2": "svm"}, "stage2='svm' is not known"),
        ({"threshold": "best"}, "threshold='best' is not known"),
        ({"n_splits": 1}, "too few"),
        ({"rationale": "generate"}, "needs a stage 1 that writes"),
        ({"knowledge": "graph.csv"}, "knowledge is str"),
    ],
)
def test_bad_options_are_named(graph, options, match):
    X, y = planted(graph, 60, seed=18)
    with pytest.raises(ValueError, match=match):
        model().set_params(**options).fit(X, y)


# ---------------------------------------------------------------- rows of all kinds


def test_null_empty_and_unknown(graph):
    X, y = planted(graph, 60, seed=19)
    X["codes"] = [["X:1"], "X:2", None, [], [{"time": -1.0, "code": ["X:1", "X:9"]}]] * 12
    X.loc[[0, 2], "note"] = None
    X.loc[1, "note"] = ""
    retriever = KnowledgeRetriever(
        graph, codes={"codes": None}, maps={"X": {"1": graph.node_ids[3], "2": graph.node_ids[4:6]}}
    )
    found = retriever.fit(X).transform(X)
    assert found["knowledge"].isna().tolist()[:5] == [False, False, True, False, False]
    assert found.loc[2, retriever.columns_out_].isna().all()
    assert found["knowledge__n_codes"].tolist()[:5] == [
        1,
        1,
        pytest.approx(np.nan, nan_ok=True),
        0,
        1,
    ]
    assert found["knowledge__n_codes_unknown"].tolist()[4] == 1
    fitted = model(retriever).fit(X, y)
    nothing = X.head(2).assign(note=[None, "zzz"], age=np.nan, codes=None)
    assert np.isfinite(fitted.predict_proba(nothing)).all()
    with pytest.raises(ValueError, match="Column 'note' needs text"):
        fitted.predict_proba(X.assign(note=1.5))
    with pytest.raises(ValueError, match="already; choose another prefix"):
        retriever.transform(found)


def test_pickle_is_equal_and_holds_no_note(graph):
    X, y = planted(graph, 80, seed=20)
    X["note"] = X["note"] + " seen by dr who in room twelve"
    fitted = model(KnowledgeRetriever(graph)).fit(X, y)
    raw = pickle.dumps(fitted)
    np.testing.assert_array_equal(pickle.loads(raw).predict_proba(X), fitted.predict_proba(X))
    assert X["note"].iloc[0].encode() not in raw
    assert clone(fitted).knowledge.graph is graph


def test_retriever_in_a_pipeline(graph):
    X, y = planted(graph, 120, seed=21)
    pipe = make_pipeline(
        KnowledgeRetriever(graph),
        FusionClassifier({
            "facts": Text("knowledge", min_count=2),
            "numbers": Tabular(lambda X: [c for c in X if c.startswith("knowledge__")]),
        }, n_members=2, max_epochs=2, random_state=0),
    )  # fmt: skip
    assert cross_val_predict(pipe, X, y, cv=2, method="predict_proba").shape == (120, 2)
    names = pipe[0].fit(X).get_feature_names_out()
    assert list(names) == list(pipe[0].transform(X).columns)


# ---------------------------------------------------------------- explanations


def test_explanations_add_up_and_show_where_facts_come_from(graph):
    X, y = planted(graph, 200, seed=22)
    X.loc[0, "note"] = (
        "<script>alert(1)</script> No alphaitis major. Mother has betaitis minor. "
        + (X.loc[0, "note"])
    )
    fitted = model(KnowledgeRetriever(graph)).fit(X, y)
    found = fitted.explain(X.head(3))
    proba = fitted.predict_proba(X.head(3))[:, 1]
    reference = fitted.tasks_[0].proba(fitted.tasks_[0].reference[None])
    for e, p in zip(found, proba, strict=True):
        assert e.proba == p
        base = two.log_odds(reference)[0, 0]
        assert e.shares.sum() == pytest.approx(np.log(p / (1 - p)) - base)
        assert set(e.shares.index) == {"structured", "notes", "knowledge"}
        assert e.knowledge["evidence"].str.startswith("pm").any()
        assert e.mentions["negated"].dtype == bool
    np.testing.assert_allclose([e.stage1 for e in found], fitted.stage1_proba(X.head(3))[:, 0])
    first = found[0].mentions
    assert first.loc[first["text"] == "alphaitis major", "negated"].any()
    assert first.loc[first["text"] == "betaitis minor", "family"].any()
    page = found.to_html()
    assert "<script>" not in page
    assert "(denied)" in page
    assert "(relative)" in page
    assert found[0].knowledge["text"].iloc[0].rstrip(".") in page


# ---------------------------------------------------------------- language models


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_models.write_llama(tmp_path_factory.mktemp("llama"))


def worded(n, seed):
    """Notes that say it plainly, in words of the tiny model."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2
    fill = np.array(tiny_models.WORDS[:8])
    notes = [
        " ".join([*rng.choice(fill, 4), "fever" if label else "normal", *rng.choice(fill, 3)])
        for label in y
    ]
    return pd.DataFrame({"note": notes, "age": 50.0, "pid": np.arange(n)}), y


def causal(llama, **options):
    options = {"max_epochs": 12, "lr": 2e-2, "max_length": 64, "max_rationale": 4, "lora_rank": 4,
               "lora_alpha": 8.0, "random_state": 0} | options  # fmt: skip
    return CausalNoteClassifier(llama, **options)


def test_lora_trains_adapters_alone_and_learns(llama):
    X, y = worded(48, 0)
    fitted = causal(llama).fit(X, y)
    new, truth = worded(30, 1)
    assert roc_auc_score(truth, fitted.predict_proba(new)[:, 1]) > 0.9
    moving = [n for n, p in fitted.module_.named_parameters() if p.requires_grad]
    assert moving
    assert all("lora_" in name for name in moving)
    state = fitted.module_.state_dict()
    assert sorted(state) == sorted(moving)  # the model itself stays in its folder
    raw = pickle.dumps(fitted)
    np.testing.assert_array_equal(pickle.loads(raw).predict_proba(new), fitted.predict_proba(new))
    assert X["note"].iloc[0].encode() not in raw


def test_loss_is_on_the_completion_alone(llama):
    """The term equals the cross-entropy of the label's token after the prompt, by hand."""
    X, y = worded(4, 2)
    fitted = causal(llama, max_epochs=1).fit(X, y)
    core, prompt = fitted.module_.eval(), fitted.modalities_["prompt"]
    data = fitted._data(X, y[:, None].astype("float32"), np.ones(4, "float32"))
    terms = core.losses(data.batch(np.arange(4)))
    assert set(terms) == {"label"}
    ids, offsets = prompt.transform(X).ragged["ids"]
    each = []
    for row in range(4):
        tokens = torch.tensor(ids[offsets[row] : offsets[row + 1]])[None]
        logits = core.encoders["prompt"].model(input_ids=tokens).logits[0, -1]
        each.append(-logits.log_softmax(0)[prompt.label_ids_[y[row]]].item())
        odds = logits[prompt.label_ids_[1]] - logits[prompt.label_ids_[0]]
        proba = fitted.predict_proba(X.iloc[[row]])[0, 1]
        assert proba == pytest.approx(torch.sigmoid(odds).item(), abs=1e-5)
    assert terms["label"].item() == pytest.approx(np.mean(each), abs=1e-5)


def test_a_poisoned_teacher_reaches_no_feature_of_new_rows(llama):
    X, y = worded(24, 3)
    X["teacher"] = np.where(y == 1, "yes yes risk", "no no normal")
    options = {"teacher": "teacher", "max_epochs": 2}
    fitted = causal(llama, **options).fit(X, y)
    assert "train_rationale" in fitted.history_[0]
    new, truth = worded(10, 4)
    poisoned = new.assign(teacher=np.where(truth == 1, "yes yes risk", "no no normal"))
    blank = new.assign(teacher=None)
    for other in (blank, new):  # the column need not even be there
        np.testing.assert_array_equal(fitted.predict_proba(poisoned), fitted.predict_proba(other))
        assert fitted.write_rationales(poisoned) == fitted.write_rationales(other)
    # Nor does it reach the features of training rows: their model never saw their teacher's text.
    whole = {"stage1": causal(llama, **options), "rationale": "generate", "rationale_dim": 2}
    X["pid"] = np.arange(24)
    folds = two.folds_of(y, X["pid"].to_numpy(), 2, 0)
    held_out = []
    for text in (X["teacher"], X["teacher"].where(~X.index.isin(folds[0][1]), "heart heart")):
        task = _task(model(n_splits=2, **whole), X.assign(teacher=text), y, folds)
        held_out.append(task.held_out[0])
    np.testing.assert_array_equal(held_out[0][folds[0][1]], held_out[1][folds[0][1]])
    assert (held_out[0] != held_out[1]).any()


def _task(estimator, X, y, folds):
    from ehrfuse.methods.knowledge_risk import _Task

    reader = clone(estimator.stage1).set_params(groups="pid", random_state=0)
    task = _Task(reader, 2, "generate", 2, 0)
    task.fit_reader(X, y, folds, None)
    return task


@pytest.mark.filterwarnings("ignore:Nothing in the columns")
def test_both_stages_with_a_causal_model(llama, graph):
    X, y = worded(24, 5)
    stage1 = causal(llama, max_epochs=2)
    fitted = model(graph, stage1=stage1, rationale="generate", n_splits=2, stage2="lr").fit(X, y)
    assert fitted.tasks_[0].models[0].knowledge == "knowledge"
    assert fitted.predict_proba(X).shape == (24, 2)
    raw = pickle.dumps(fitted)
    np.testing.assert_array_equal(pickle.loads(raw).predict_proba(X), fitted.predict_proba(X))


def test_by_name_and_without_adapters(llama):
    X, y = worded(24, 6)
    by_name = model(stage1="hf-causal", model=llama, n_splits=2)
    assert isinstance(by_name.fit(X, y).tasks_[0].models[0], CausalNoteClassifier)
    fitted = causal(llama, lora_rank=0, max_epochs=1).fit(X, y)
    assert "encoders.prompt.model.lm_head.weight" in fitted.module_.state_dict()
    np.testing.assert_array_equal(
        pickle.loads(pickle.dumps(fitted)).predict_proba(X), fitted.predict_proba(X)
    )


def test_long_notes_keep_both_ends_and_null_notes_say_so(llama):
    X = pd.DataFrame(
        {"note": ["fever " * 100 + "cough", None, ""], "knowledge": ["pain", None, ""]}
    )
    prompt = causal(llama, knowledge="knowledge").modalities["prompt"].fit(X)
    ids, offsets = prompt.transform(X).ragged["ids"]
    tokenizer = prompt._tokenizer()
    said = [tokenizer.decode(ids[a:b]) for a, b in pairwise(offsets)]
    assert max(np.diff(offsets)) <= 64 - 4
    assert said[0].count("fever") > 5
    assert "cough" in said[0]
    assert "pain" in said[0]
    assert said[1] == said[2]
    with pytest.raises(ValueError, match="do not begin with different tokens"):
        causal(llama, labels=("no", "no")).modalities["prompt"].fit(X)


def test_without_peft_the_message_says_what_to_install(llama, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    X, y = worded(8, 7)
    with pytest.raises(ImportError, match=r"pip install 'ehrfuse\[lora\]'"):
        causal(llama).fit(X, y)


@pytest.mark.filterwarnings("ignore:Nothing in the columns")
def test_encoder_stage(tmp_path, graph):
    bert = tiny_models.write_bert(tmp_path / "bert")
    X, y = worded(30, 8)
    X.loc[0, "note"] = None
    fitted = model(graph, stage1="hf-encoder", model=bert, n_splits=2).fit(X, y)
    assert np.isfinite(fitted.predict_proba(X)).all()
    assert isinstance(fitted.tasks_[0].models[0][-1], LogisticRegression)


def test_calibration_never_turns_the_order_round():
    """Held out, a constant model predicts the rate of the others, which runs against its own."""
    rng = np.random.default_rng(0)
    y = (rng.random(200) < 0.2).astype(int)
    against = np.where(y == 1, 0.19, 0.21)
    map_ = two.Calibrator("sigmoid").fit(np.column_stack([1 - against, against]), y)
    p = map_.apply(np.array([[0.8, 0.2], [0.7, 0.3]]))[:, 1]
    assert p[0] < p[1]
    constant = map_.apply(np.column_stack([1 - against, against]))[:, 1]
    assert constant.mean() == pytest.approx(y.mean(), abs=1e-6)
