"""Facts of the alignment of records and notes that hold of no other method."""

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.frozen import FrozenEstimator
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV
from tiny_models import write_bert, write_longformer, write_modernbert

from ehrfuse import ClipEHRAligner, TabNetClassifier, TabNetPretrainer, Tabular, Text, _estimator
from ehrfuse.methods import _clip_ehr

SMALL = {"n_d": 8, "n_a": 8, "max_epochs": 2, "random_state": 0}
ALIGNER = {"embed_dim": 8, "n_topics": 8, "batch_size": 64} | SMALL


def shared_latent(n, seed=0):
    """Records and notes share a latent state; the outcome depends on what the notes can tell."""
    rng = np.random.default_rng(seed)
    u = rng.normal(size=(n, 3))
    x = u @ rng.normal(size=(3, 6)) * 0.6 + rng.normal(size=(n, 6))
    words = [["fever", "cough", "chills"], ["pain", "chest", "pressure"], ["rash", "itch", "hives"]]
    notes = []
    for state in u:
        said = [w for j, group in enumerate(words) for w in rng.permutation(group)[: 2]
                if state[j] + 0.3 * rng.normal() > 0]  # fmt: skip
        notes.append(" ".join([*said, "patient", "seen"]))
    X = pd.DataFrame(x, columns=[f"v{j}" for j in range(6)])
    X["note"], X["patient"] = pd.Series(notes, dtype=object), np.arange(n) // 2
    y = (rng.random(n) < 1 / (1 + np.exp(-2.5 * u[:, 0]))).astype(int)
    return X, y


COLUMNS = [f"v{j}" for j in range(6)]
MODALITIES = {"table": Tabular(COLUMNS), "note": Text("note")}


@pytest.fixture(scope="module")
def data():
    return shared_latent(120)


@pytest.fixture(scope="module")
def aligner(data):
    return ClipEHRAligner(MODALITIES, **ALIGNER | {"max_epochs": 25}).fit(data[0])


# ---------------------------------------------------------------- both sides


def test_no_note_is_needed_afterwards(aligner, data):
    X, _ = data
    record = aligner.transform(X)
    np.testing.assert_array_equal(aligner.transform(X[COLUMNS]), record)
    np.testing.assert_allclose(np.linalg.norm(record, axis=1), 1, atol=1e-6)
    assert list(aligner.get_feature_names_out()[:2]) == ["clipehraligner0", "clipehraligner1"]
    assert record.shape[1] == len(aligner.get_feature_names_out())


def test_no_table_is_needed_for_a_note(aligner, data):
    X, _ = data
    note = aligner.transform_text(X)
    np.testing.assert_array_equal(aligner.transform_text(X[["note"]]), note)
    np.testing.assert_array_equal(aligner.transform_text(X["note"].tolist()), note)
    cosine = aligner.similarity(X.head(5), ["fever and cough", "rash"])
    assert cosine.shape == (5, 2)
    assert (np.abs(cosine) <= 1 + 1e-6).all()


def test_score_is_the_recall_of_both_directions(aligner, data):
    X, _ = data
    table = aligner.retrieval_scores(X)
    assert list(table.index) == ["record to note", "note to record"]
    assert table["recall_at_10"].mean() == pytest.approx(aligner.score(X))
    assert (table["recall_at_1"] <= table["recall_at_10"]).all()
    assert (table["n"] == len(X)).all()
    cosine = aligner.similarity(X, X)
    rank = 1 + (cosine > np.diag(cosine)[:, None]).sum(1)
    same = (cosine == np.diag(cosine)[:, None]).sum(1) - 1
    assert table.loc["record to note", "median_rank"] == np.median(rank + same / 2)


def test_aligned_pairs_are_found_better_than_by_chance():
    X, _ = shared_latent(500)
    fitted = ClipEHRAligner(MODALITIES, **ALIGNER | {"max_epochs": 20}).fit(X.iloc[:400])
    assert fitted.score(X.iloc[400:]) > 1.5 * 10 / 100


def test_search_over_the_aligner_needs_no_label(data):
    search = GridSearchCV(
        ClipEHRAligner(MODALITIES, **ALIGNER), {"loss": ["clip", "siglip"]}, cv=2,
        error_score="raise",
    ).fit(data[0])  # fmt: skip
    assert set(search.cv_results_["param_loss"]) == {"clip", "siglip"}


def test_zero_shot(aligner, data):
    X, _ = data
    p = aligner.zero_shot_proba(
        X[COLUMNS], {"sick": ["fever cough", "chills"], "rash": "hives itch"}
    )
    assert p.shape == (len(X), 2)
    np.testing.assert_allclose(p.sum(1), 1)
    turned = aligner.zero_shot_proba(X, ["hives itch", "fever"])
    np.testing.assert_allclose(aligner.zero_shot_proba(X, ["fever", "hives itch"]), turned[:, ::-1])
    with pytest.raises(ValueError, match="No word of the prompt 'zebra'"):
        aligner.zero_shot_proba(X, ["zebra", "rash"])
    with pytest.raises(ValueError, match="at least two"):
        aligner.zero_shot_proba(X, ["rash"])


def test_zero_shot_reads_the_state(data):
    X, _ = shared_latent(600)
    fitted = ClipEHRAligner(MODALITIES, **ALIGNER | {"max_epochs": 25}).fit(X.iloc[:450])
    test = X.iloc[450:]
    has_rash = test["note"].str.contains("rash|itch|hives")
    p = fitted.zero_shot_proba(test, ["patient seen rash itch hives", "patient seen"])[:, 0]
    assert roc_auc_score(has_rash, p) > 0.6


def test_retrieval_of_notes(aligner, data):
    X, _ = data
    memory = X.iloc[:40].copy()
    memory.loc[memory.index[3], "note"] = None
    found = aligner.retrieve(X.iloc[50:53], memory, k=4)
    assert len(found) == 12
    assert 3 not in set(found["memory_row"])
    assert found.groupby("row")["similarity"].is_monotonic_decreasing.all()
    np.testing.assert_array_equal(found["note"], memory["note"].to_numpy()[found["memory_row"]])
    assert not hasattr(aligner, "memory_")


def test_a_row_without_a_record_finds_no_note(aligner, data):
    X, _ = data
    asked = X.iloc[50:53].copy()
    asked.loc[asked.index[1], COLUMNS] = None
    found = aligner.retrieve(asked, X.iloc[:40], k=2)
    assert found["row"].tolist() == [0, 0, 2, 2]
    assert found["rank"].tolist() == [1, 2, 1, 2]
    assert not len(aligner.retrieve(asked.iloc[[1]], X.iloc[:40]))


def test_a_patient_finds_notes_of_others(data):
    X, _ = data
    X = X.iloc[:40].copy()
    X.loc[X.index[:2], "patient"] = None
    alone = ClipEHRAligner(MODALITIES, **ALIGNER).fit(X)
    assert len(alone.retrieve(X, X, k=40)) == 40 * 40
    grouped = ClipEHRAligner(MODALITIES, groups="patient", **ALIGNER).fit(X.iloc[2:])
    found = grouped.retrieve(X, X.iloc[::-1], k=40)
    patient = X["patient"].to_numpy()
    assert (patient[found["row"]] != patient[::-1][found["memory_row"]]).all()
    assert found["row"].value_counts().loc[[0, 1, 2, 39]].tolist() == [40, 40, 38, 38]
    assert np.isfinite(found["similarity"]).all()
    assert len(grouped.retrieve(X.drop(columns="patient"), X, k=40)) == 40 * 40
    with pytest.raises(ValueError, match="'patient' holds strings and other values"):
        grouped.retrieve(X, X.assign(patient=X["patient"].astype(str)))


def test_retrieval_of_sections(aligner, data):
    X, _ = data
    memory = pd.DataFrame({"note": ["COURSE: fever cough\nSKIN: rash hives", None, "CHEST: pain"]})
    found = aligner.retrieve(X.iloc[:2], memory, k=9, sections=r"\n(?=[A-Z]+:)")
    assert len(found) == 2 * 3
    one = found[found["row"] == 0].sort_values(["memory_row", "section"])
    assert list(one["note"]) == ["COURSE: fever cough", "SKIN: rash hives", "CHEST: pain"]
    assert list(one["memory_row"]) == [0, 0, 2]
    cosine = aligner.similarity(X.iloc[:1], list(one["note"]))[0]
    np.testing.assert_allclose(one["similarity"], cosine)
    with pytest.raises(ValueError, match="memory holds no note"):
        aligner.retrieve(X.head(1), memory.iloc[[1]])


def test_strings_stand_for_the_first_of_several_notes(data):
    X, _ = data
    X = X.iloc[:60].assign(second=X["note"].iloc[:60].str.upper())
    fitted = ClipEHRAligner(MODALITIES | {"more": Text("second")}, **ALIGNER).fit(X)
    first = fitted.transform_text(X.assign(second=None))
    np.testing.assert_allclose(fitted.transform_text(X["note"].tolist()), first)
    assert fitted.similarity(X.iloc[:2], ["fever", "rash"]).shape == (2, 2)
    assert len(fitted.retrieve(X.iloc[:2], X, k=3)) == 6
    assert fitted.zero_shot_proba(X.iloc[:2], ["fever", "rash"]).shape == (2, 2)


def test_nothing_to_learn_is_refused(data):
    none = dict.fromkeys(("contrastive_weight", "regression_weight", "reconstruction_weight"), 0)
    with pytest.raises(ValueError, match="reconstruction_weight are all 0"):
        ClipEHRAligner(MODALITIES, **ALIGNER | none).fit(data[0])


def test_one_k_will_do(aligner, data):
    table = aligner.retrieval_scores(data[0], k=5)
    assert list(table) == ["recall_at_5", "median_rank", "n"]


def test_texts_that_are_no_list_are_refused(aligner, data):
    """One str is a list of letters: without a word it would be read as so many notes."""
    X, _ = data
    with pytest.raises(ValueError, match="X is one str; give a list"):
        aligner.transform_text("fever cough")
    with pytest.raises(ValueError, match="prompts is one str"):
        aligner.zero_shot_proba(X, "fever cough")
    for odd in (["fever", 3], {"a": "fever", "b": []}, [["fever"], ["rash", None]]):
        with pytest.raises(ValueError, match="Class 1 of prompts needs a text"):
            aligner.zero_shot_proba(X, odd)
    for memory in (X[COLUMNS], X["note"], list(X["note"])):
        with pytest.raises(ValueError, match="DataFrame with the notes in a column 'note'"):
            aligner.retrieve(X.head(1), memory)
    memory = pd.DataFrame({"note": ["a fever. rash"]})
    found = aligner.retrieve(X.head(1), memory, sections="(z)?[.]")
    assert sorted(found["note"]) == [" rash", "a fever"]


# ---------------------------------------------------------------- topics


def test_topics_are_the_latent_semantic_analysis_of_the_notes(aligner, data):
    """Reading a note's words gives what was computed once for training."""
    X, _ = data
    core, block = aligner.module_, aligner.modalities_["note"].transform(X)
    once = aligner._read_once(core, {"note": block})["note"].arrays["vector"]
    words = core.notes["note"](block.take(np.arange(len(X))))
    np.testing.assert_allclose(once, words.numpy(), atol=1e-5)
    assert np.ptp(once.std(0)) > 0.1  # not whitened: common topics count most
    assert once.std() == pytest.approx(1, abs=0.1)


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_equal_notes_have_no_topics_of_rounding(data):
    X = data[0].assign(note="fever and cough for days")
    found = ClipEHRAligner(MODALITIES, **ALIGNER).fit(X)
    assert found.module_.notes["note"].topics.abs().max() < 100
    assert np.isfinite(found.history_[-1]["train_loss"])


# ---------------------------------------------------------------- fine-tuning


AXIS = {
    "scratch": None,
    "masked": TabNetPretrainer(max_epochs=1),
    "aligned": ClipEHRAligner(embed_dim=8, n_topics=8, max_epochs=1),
    "both": ClipEHRAligner(
        embed_dim=8, n_topics=8, max_epochs=1, pretrained=TabNetPretrainer(max_epochs=1)
    ),
}


def test_the_ablation_is_one_axis(data):
    X, y = data
    clf = TabNetClassifier(MODALITIES, groups="patient", **SMALL)
    search = GridSearchCV(clf, {"pretrained": list(AXIS.values())}, cv=2, error_score="raise")
    search.fit(X, y)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    assert search.best_estimator_.ignored_modalities_ == ["note"]


def test_what_is_handed_over(data):
    X, y = data
    clf = TabNetClassifier(MODALITIES, pretrained=AXIS["both"], **SMALL).fit(X, y)
    assert clf.transferred_ == ["encoders.table"]
    assert clf.pretrained_.transferred_ == ["encoders.table"]
    assert list(clf.pretrained_.modalities_) == ["table", "note"]
    assert list(clf.pretrained_.pretrained_.modalities_) == ["table"]
    assert clf.pretrained_.pretrained_.n_d == 8
    with_note = clf.predict_proba(X)
    np.testing.assert_array_equal(clf.predict_proba(X[COLUMNS]), with_note)


def test_an_aligner_fitted_elsewhere(data, aligner):
    X, y = data
    clf = TabNetClassifier({"table": Tabular(COLUMNS)}, pretrained=FrozenEstimator(aligner),
                           freeze=("encoders",), **SMALL).fit(X[COLUMNS], y)  # fmt: skip
    theirs = aligner.module_.encoders["table"].state_dict()
    for name, tensor in clf.module_.encoders["table"].state_dict().items():
        assert torch.equal(tensor, theirs[name])


def test_notes_help_where_labels_are_few_and_shuffled_notes_do_not():
    size = {"n_d": 16, "n_a": 8, "random_state": 0}
    tables, scores = {"table": Tabular(COLUMNS)}, {"aligned": [], "shuffled": [], "scratch": []}
    for seed in range(3):
        X, y = shared_latent(1100, seed)
        train, test, few = X.iloc[:700], X.iloc[700:], np.arange(35)
        mixed = train.assign(note=train["note"].sample(frac=1, random_state=seed).to_numpy())
        starts = {"scratch": TabNetClassifier(tables, **size)}
        for name, rows in (("aligned", train), ("shuffled", mixed)):
            donor = ClipEHRAligner(MODALITIES, embed_dim=8, n_topics=8, batch_size=64, **size)
            starts[name] = TabNetClassifier(
                tables, pretrained=FrozenEstimator(donor.fit(rows)), freeze=("encoders",), **size
            )
        for name, clf in starts.items():
            clf.fit(X.iloc[few], y[few])
            scores[name].append(roc_auc_score(y[700:], clf.predict_proba(test)[:, 1]))
    mean = {name: np.mean(values) for name, values in scores.items()}
    assert mean["aligned"] > mean["scratch"] + 0.02
    assert mean["aligned"] > mean["shuffled"] + 0.05


# ---------------------------------------------------------------- what is held out


def altered(X, rows):
    """Other values and other notes in some rows."""
    X = X.copy()
    X.loc[X.index[rows], COLUMNS] = 99.0
    X.loc[X.index[rows], "note"] = "leak leak leak fever"
    return X


def test_rows_set_aside_reach_no_phase(data):
    """Altering the patients that the fit sets aside changes no weight, scale or word learned."""
    X, y = data
    clf = TabNetClassifier(
        MODALITIES, pretrained=AXIS["both"], groups="patient", validation_fraction=0.3, **SMALL
    )
    seen = clone(clf).fit(X, y)
    seed = int(np.random.RandomState(0).randint(2**31 - 1))
    probe = clone(clf)
    probe._check_params()
    frame = probe._frame(X, y, reset=True)
    labels, weight = probe._labels(frame, y, None, reset=True)
    inside, aside = probe._set_aside(frame, labels, weight, seed)
    assert not set(X["patient"].iloc[inside]) & set(X["patient"].iloc[aside])
    other = clone(clf).fit(altered(X, aside), y)
    for one, two in ((seen.pretrained_, other.pretrained_),
                     (seen.pretrained_.pretrained_, other.pretrained_.pretrained_)):  # fmt: skip
        for name, tensor in one.module_.state_dict().items():
            assert torch.equal(tensor, two.module_.state_dict()[name]), name
    assert "leak" not in other.pretrained_.modalities_["note"].vocabulary_


def test_every_phase_reads_training_patients_alone(data, monkeypatch):
    """Instrumented: which patients are in the frames and batches of each phase."""
    X, y = data
    frames, batches = [], []
    fit_table, fit_note = Tabular.fit, Text.fit

    def watched(real):
        def fit(self, frame, y=None):
            frames.append(set(frame["patient"]))
            return real(self, frame)

        return fit

    monkeypatch.setattr(Tabular, "fit", watched(fit_table))
    monkeypatch.setattr(Text, "fit", watched(fit_note))
    real = _estimator.train

    def train(core, data, **options):
        batches.append(len(data))
        return real(core, data, **options)

    monkeypatch.setattr(_estimator, "train", train)
    train_rows = X["patient"] < 40
    clf = TabNetClassifier(MODALITIES, pretrained=AXIS["both"], groups="patient", **SMALL)
    clf.fit(X[train_rows], y[train_rows])
    assert len(batches) == 3  # masked, contrastive, supervised
    assert batches == [int(train_rows.sum())] * 3
    assert frames
    assert all(patients <= set(range(40)) for patients in frames)


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_the_contrast_knows_the_patient_of_every_row(data, monkeypatch, loss):
    X, _ = data
    told = []
    inner = getattr(_clip_ehr, f"{loss}_loss")

    def spied(*args):
        told.append(next(a for a in args[3:] if a is None or a.dtype == torch.int64))
        return inner(*args)

    monkeypatch.setattr(_clip_ehr, f"{loss}_loss", spied)
    options = ALIGNER | {"max_epochs": 1, "loss": loss, "batch_size": 200}
    ClipEHRAligner(MODALITIES, groups="patient", **options).fit(X)
    ids, counts = torch.unique(told[0], return_counts=True)
    assert len(ids) == 60
    assert (counts == 2).all()  # two rows of every patient


# ---------------------------------------------------------------- rows without a side


def test_rows_without_a_note_change_nothing_in_the_contrast(data):
    X, _ = data
    X = X.copy()
    X.loc[X.index[::3], "note"] = None
    core_of = ClipEHRAligner(MODALITIES, **ALIGNER).fit(X)
    rows = np.arange(len(X))
    whole = core_of._data(core_of._frame(X, reset=False))
    both = X["note"].notna().to_numpy()
    core = core_of.module_.eval()
    a = core.losses(whole.batch(rows))
    b = core.losses(whole.batch(rows[both]))
    for name in a:
        torch.testing.assert_close(a[name], b[name])


def test_rows_without_a_note_serve_the_reconstruction(data):
    X, _ = data
    fitted = ClipEHRAligner(MODALITIES, reconstruction_weight=1.0, **ALIGNER)
    history = fitted.fit(X.assign(note=X["note"].where(X.index % 2 == 0, None))).history_
    assert history[0]["train_reconstruction"] > 0


def test_no_pair_at_all_warns(data):
    X, _ = data
    with pytest.warns(UserWarning, match="both a table and a note"):
        ClipEHRAligner(MODALITIES, **ALIGNER).fit(X.assign(note=None))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone = ClipEHRAligner({"table": Tabular(COLUMNS)}, **ALIGNER).fit(X)
    with pytest.raises(ValueError, match="without notes"):
        alone.transform_text(X)


# ---------------------------------------------------------------- text models


@pytest.mark.parametrize("write", [write_bert, write_longformer, write_modernbert])
def test_upper_layers_train_on_what_the_lower_ones_gave(write, tmp_path, data):
    X, _ = data
    X = X.head(24)
    note = Text("note", model=write(tmp_path / "m"), trainable=True, chunk_length=12, dropout=0.0,
                lr_scale=1.0)  # fmt: skip
    aligner = ClipEHRAligner({"table": Tabular(COLUMNS), "note": note}, trainable_layers=1,
                             **ALIGNER).fit(X)  # fmt: skip
    core, block = aligner.module_.eval(), aligner.modalities_["note"].transform(X)
    once = aligner._read_once(core, {"note": block})["note"]
    assert once.ragged["hidden"][0].dtype == np.float16
    rows = np.arange(len(X))
    with torch.no_grad():
        cached = core.notes["note"](once.take(rows))
        plain = core.notes["note"](block.take(rows))
    torch.testing.assert_close(cached, plain, atol=2e-2, rtol=2e-2)
    model = core.notes["note"].encoder.encoder.backbone.model
    fresh = Text("note", model=note.model, trainable=True, chunk_length=12).fit(X)
    theirs = fresh.make_encoder(8).backbone.model.state_dict()
    moved = {n.split(".")[0] + str([p for p in n.split(".") if p.isdigit()][:1])
             for n, t in model.state_dict().items() if not torch.equal(t, theirs[n])}  # fmt: skip
    assert moved  # the upper layer
    assert not any(name.startswith("embeddings") or "['0']" in name for name in moved)


def test_frozen_text_models_pool_over_chunks(tmp_path, data):
    X, _ = data
    for pooling in ("mean", "attention"):
        note = Text("note", model=write_bert(tmp_path / pooling), chunk_length=6)
        aligner = ClipEHRAligner({"table": Tabular(COLUMNS), "note": note}, pooling=pooling,
                                 **ALIGNER).fit(X.head(30))  # fmt: skip
        assert aligner.transform_text(["chest pain", "fever"]).shape == (2, 8)


def test_too_many_trainable_layers(tmp_path, data):
    note = Text("note", model=write_bert(tmp_path / "m"), trainable=True, chunk_length=12)
    with pytest.raises(ValueError, match="trainable_layers=2"):
        ClipEHRAligner({"table": Tabular(COLUMNS), "note": note}, **ALIGNER).fit(data[0].head(20))


@pytest.mark.parametrize(
    ("params", "message"),
    [({"loss": "triplet"}, "loss"), ({"same_patient": "negative"}, "same_patient"),
     ({"embed_dim": 0}, "embed_dim"), ({"temperature": 0.0}, "temperature")],
)  # fmt: skip
def test_bad_parameters(data, params, message):
    with pytest.raises(ValueError, match=message):
        ClipEHRAligner(MODALITIES, **ALIGNER | params).fit(data[0])
