"""Texts from records by a prefix before a frozen language model."""

import pickle
import shutil
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from tiny_models import write_llama

import ehrfuse
from ehrfuse import ClipEHRAligner, NoteGenerator, Tabular, Text, _hub_causal
from ehrfuse.evaluation import text_scores

SENTENCES = (
    "patient with fever and cough . no chest pain",
    "pain of the left heart was there",
    "normal heart : no fever , no cough",
    "the right chest was normal",
)
COLUMNS = [f"v{j}" for j in range(4)]
ALIGNER = {"n_d": 8, "n_a": 8, "embed_dim": 8, "n_topics": 8, "max_epochs": 20, "batch_size": 64}
SMALL = {"n_prefix": 3, "max_note_tokens": 16, "max_new_tokens": 12, "max_epochs": 15,
         "batch_size": 16, "lr": 1e-2, "device": "cpu", "random_state": 0}  # fmt: skip


def planted(n, seed):
    """Records of four groups; the note says which, and every other one has a word more."""
    rng = np.random.default_rng(seed)
    group = rng.integers(4, size=n)
    x = np.eye(4)[group] * 2 + 0.5 * rng.normal(size=(n, 4))
    notes = [SENTENCES[g] + rng.choice(["", " . normal"]) for g in group]
    return pd.DataFrame(x, columns=COLUMNS, index=range(100, 100 + n)).assign(
        note=pd.Series(notes, dtype=object, index=range(100, 100 + n))
    )


def teach(folder, notes):
    """Teach the tiny model the language of the notes, or no prefix could make it say them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    steps = torch.optim.AdamW(model.parameters(), 1e-2)
    notes = [[0, *ids, 1] for ids in tokenizer(notes, add_special_tokens=False)["input_ids"]]
    longest = max(map(len, notes))
    ids = torch.tensor([note + [-100] * (longest - len(note)) for note in notes])
    for _ in range(60):
        steps.zero_grad()
        model(input_ids=ids.clamp(min=0), labels=ids).loss.backward()
        steps.step()
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with torch.random.fork_rng([]):
        path = write_llama(tmp_path_factory.mktemp("lm") / "llama", hidden=32)
        teach(path, planted(48, 7)["note"].tolist())
    return path


@pytest.fixture(scope="module")
def rows():
    return planted(120, 0), planted(60, 1)


def make(folder, **options):
    modalities = {"table": Tabular(COLUMNS), "note": Text("note", min_count=2)}
    return NoteGenerator(ClipEHRAligner(modalities, **ALIGNER), folder, **SMALL | options)


@pytest.fixture(scope="module")
def generator(folder, rows):
    return make(folder).fit(rows[0])


@pytest.fixture(scope="module")
def frozen(generator):
    return FrozenEstimator(generator.aligner_)


# ---------------------------------------------------------------- what is written


def test_a_text_fits_its_own_record(generator, rows):
    """Better than the text of another record of the same hospital, on rows that fit never saw."""
    X = rows[1]
    texts = generator.generate(X[COLUMNS])
    own = text_scores(X["note"], texts)["rougeL"]
    shuffled = [text_scores(X["note"].sample(frac=1, random_state=seed), texts)["rougeL"]
                for seed in range(5)]  # fmt: skip
    assert own > 0.8
    assert own - max(shuffled) > 0.25
    assert texts.nunique() >= 4
    assert generator.history_[-1]["train_loss"] < 0.5 * generator.history_[0]["train_loss"]


def test_notes_of_others_teach_nothing(folder, rows, frozen, generator):
    """The control: taught with notes of other rows, it writes what fits no better than chance."""
    X = rows[0].assign(note=rows[0]["note"].sample(frac=1, random_state=3).to_numpy())
    control = make(folder).set_params(aligner=frozen).fit(X)
    own, others = (text_scores(rows[1]["note"], g.generate(rows[1])) for g in (generator, control))
    assert all(own[name] > others[name] + 0.2 for name in own)
    assert control.score(rows[1]) < generator.score(rows[1]) - 0.1


def test_no_note_is_read_and_the_index_stays(generator, rows):
    X = rows[1].head(9)
    texts = generator.generate(X[COLUMNS])
    assert texts.index.equals(X.index)
    assert texts.name == "note"
    other = X.assign(note=["pain pain pain"] * len(X))
    pd.testing.assert_series_equal(generator.generate(other), texts)
    pd.testing.assert_series_equal(generator.generate(X.iloc[::-1]).iloc[::-1], texts)


def test_one_row_or_many(generator, rows, monkeypatch):
    X = rows[1].head(12)
    texts = generator.generate(X)
    single = [generator.generate(X.iloc[[i]]).iloc[0] for i in range(len(X))]
    assert texts.tolist() == single
    score = generator.score(X)
    monkeypatch.setattr(_hub_causal, "TOKENS_PER_BATCH", 40)
    assert generator.generate(X).tolist() == single
    assert clone_with_weights(generator, batch_size=5).score(X) == pytest.approx(score, abs=1e-5)


def clone_with_weights(generator, **params):
    return pickle.loads(pickle.dumps(generator)).set_params(**params)


def test_a_text_ends_where_notes_end(generator, rows):
    """The end is learned: what follows the last word is not filled up to max_new_tokens."""
    lengths = generator.generate(rows[1]).str.split().str.len()
    assert lengths.max() < SMALL["max_new_tokens"]
    generator = clone_with_weights(generator, max_new_tokens=2)
    assert (generator.generate(rows[1]).str.split().str.len() == 2).all()


def test_a_row_without_a_record_gets_none(generator, rows):
    X = rows[1].head(4).copy()
    X.loc[X.index[1], COLUMNS] = np.nan
    texts = generator.generate(X)
    assert texts.isna().tolist() == [False, True, False, False]
    nobody = X.iloc[[1]]
    assert generator.generate(nobody).isna().all()


# ---------------------------------------------------------------- fit


def test_the_same_seed_gives_the_same_weights(folder, rows, generator):
    again = make(folder).fit(rows[0])
    assert_same_weights(again, generator)
    other = make(folder, random_state=1).fit(rows[0])
    assert not torch.equal(weights_of(other)["heads.1.weight"], weights_of(again)["heads.1.weight"])


def weights_of(generator):
    return generator.writer_.module_.state_dict()


def assert_same_weights(one, other):
    assert one.history_ == other.history_
    for name, weights in weights_of(one).items():
        torch.testing.assert_close(weights_of(other)[name], weights, rtol=0, atol=0)


def test_rows_without_a_side_teach_nothing(folder, rows, frozen):
    X = rows[0].head(40)
    without_note = rows[1].assign(note=[None, "  "] * 30)
    without_record = rows[1].assign(**dict.fromkeys(COLUMNS, np.nan))
    few = make(folder, max_epochs=2).set_params(aligner=frozen)
    a = clone(few).fit(X)
    b = clone(few).fit(pd.concat([X, without_note, without_record]))
    assert a.n_rows_ == b.n_rows_ == 40
    assert_same_weights(a, b)


def test_the_scale_is_that_of_the_training_rows(generator, rows):
    x = generator.aligner_.transform(rows[0])
    center, scale = generator.writer_.modalities_["record"].scale_
    np.testing.assert_allclose(center, x.mean(0), atol=1e-6)
    np.testing.assert_allclose(scale, np.maximum(x.std(0), 0.1 * np.sqrt(x.var(0).mean())), 1e-4)
    before = pickle.dumps(generator)
    generator.score(rows[1])
    generator.generate(rows[1])
    assert pickle.dumps(generator) == before


def test_the_language_model_stays_as_it_is(generator, folder):
    from transformers import AutoModelForCausalLM

    fresh = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    used = _hub_causal.open_causal(ehrfuse._hub.inspect_model(folder), "cpu")
    assert not any(p.requires_grad or p.grad is not None for p in used.parameters())
    for name, tensor in used.state_dict().items():
        torch.testing.assert_close(tensor, fresh[name], rtol=0, atol=0)
    assert all(name.startswith(("heads", "encoders.record")) for name in weights_of(generator))
    trainable = _hub_causal.copy_causal(ehrfuse._hub.inspect_model(folder))
    assert all(p.requires_grad for p in trainable.parameters())


def test_a_frozen_aligner_is_not_fitted_again(folder, rows, frozen, generator):
    found = make(folder, max_epochs=1).set_params(aligner=frozen).fit(rows[0])
    assert found.aligner_.estimator is generator.aligner_


def test_another_column_to_write(folder, rows, frozen):
    X = rows[0].head(30).rename(columns={"note": "summary"})
    X["note"] = None
    found = make(folder, max_epochs=1, note="summary").set_params(aligner=frozen).fit(X)
    assert (found.note_, found.n_rows_) == ("summary", 30)


def test_in_a_search(folder, rows, frozen):
    base = make(folder).set_params(aligner=frozen)
    search = GridSearchCV(base, {"lr": [1e-5, 1e-2]}, cv=2).fit(rows[0].head(60))
    assert search.best_params_ == {"lr": 1e-2}
    nested = make(folder).set_params(aligner__embed_dim=4, aligner__note__min_count=3)
    assert nested.aligner.embed_dim == 4
    assert nested.get_params()["aligner__note__min_count"] == 3


# ---------------------------------------------------------------- kept and refused


def test_saved_and_pickled(generator, folder, rows, tmp_path):
    X = rows[1].head(6)
    ehrfuse.save(generator, tmp_path / "m.zip")
    for again in (ehrfuse.load(tmp_path / "m.zip"), pickle.loads(pickle.dumps(generator))):
        pd.testing.assert_series_equal(again.generate(X), generator.generate(X))
        assert again.score(X) == generator.score(X)
        assert again.get_params()["n_prefix"] == 3
        ehrfuse.save(again, tmp_path / "again.zip")
        assert (tmp_path / "again.zip").read_bytes() == (tmp_path / "m.zip").read_bytes()


def test_the_language_model_is_not_stored(generator, folder, tmp_path):
    ehrfuse.save(generator, tmp_path / "folder")
    raws = [(tmp_path / "folder" / "model.safetensors").read_bytes(), pickle.dumps(generator)]
    model = _hub_causal.open_causal(ehrfuse._hub.inspect_model(folder), "cpu")
    for raw in raws:
        assert weights_of(generator)["heads.1.weight"].numpy().tobytes() in raw
        for tensor in model.state_dict().values():
            row = tensor.flatten()[:16].numpy().tobytes()
            assert row not in raw


def test_no_text_of_a_note_is_kept(folder, rows, tmp_path):
    X = rows[0].head(40).copy()
    secret = "Zebediah Quillfeather of Ormskirk"
    X.iloc[5, X.columns.get_loc("note")] += f" {secret}"
    found = make(folder, max_epochs=1).fit(X)
    ehrfuse.save(found, tmp_path / "m.zip")
    ehrfuse.save(found, tmp_path / "folder")
    raws = [pickle.dumps(found), (tmp_path / "m.zip").read_bytes(),
            (tmp_path / "folder" / "manifest.json").read_bytes()]  # fmt: skip
    for raw in raws:
        for part in (*secret.lower().split(), secret, *SENTENCES):
            if part != "of":
                assert part.encode() not in raw.lower(), part


def test_another_model_in_the_folder(rows, frozen, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    found = make(str(copy), max_epochs=1).set_params(aligner=frozen).fit(rows[0].head(20))
    write_llama(copy, hidden=32, seed=5)
    with pytest.raises(ValueError, match="holds other files than in fit"):
        found.generate(rows[1])


def test_without_the_language_model(rows, frozen, folder, tmp_path):
    """Loading needs no model; writing says where it is looked for, and goes on once it is there."""
    copy, X = shutil.copytree(folder, tmp_path / "copy"), rows[1].head(3)
    found = make(str(copy), max_epochs=1).set_params(aligner=frozen).fit(rows[0].head(20))
    texts = found.generate(X)
    ehrfuse.save(found, tmp_path / "m.zip")
    copy.rename(tmp_path / "elsewhere")
    loaded = ehrfuse.load(tmp_path / "m.zip"), pickle.loads(pickle.dumps(found))
    for again in loaded:
        for call in (again.generate, again.score):
            with pytest.raises(ValueError, match=r"'.*copy' is no folder on this machine"):
                call(X)
    (tmp_path / "elsewhere").rename(copy)
    for again in loaded:
        pd.testing.assert_series_equal(again.generate(X), texts)
        assert again.score(X) == found.score(X)


@pytest.mark.filterwarnings("ignore:No training row has both a table and a note")
def test_refusals(folder, rows, frozen, generator):
    X = rows[0].head(20)
    good = make(folder, max_epochs=1).set_params(aligner=frozen)
    nothing = X.assign(note=None)
    for bad in (nothing, X.assign(note="  "), X.assign(**dict.fromkeys(COLUMNS, np.nan))):
        with pytest.raises(
            ValueError, match="No row has both a record and a note in column 'note'"
        ):
            clone(good).fit(bad)
    with pytest.raises(ValueError, match="No row has both"):
        generator.score(nothing)
    with pytest.raises(ValueError, match="DataFrame with the notes in a column 'note'"):
        clone(good).fit(X[COLUMNS])
    with pytest.raises(ValueError, match=r"row 3 holds .*int.* Convert"):
        clone(good).fit(X.assign(note=["fever", None, "cough", 7] * 5))
    with pytest.raises(NotFittedError):
        good.generate(X)
    with pytest.raises(ValueError, match="must be a ClipEHRAligner"):
        make(folder).set_params(aligner=LogisticRegression()).fit(X)
    with pytest.raises(ValueError, match="declares no Text"):
        make(folder).set_params(aligner=ClipEHRAligner({"table": Tabular(COLUMNS)})).fit(X)
    with pytest.raises(ValueError, match="leaves room for 253 tokens"):
        clone(good).set_params(max_new_tokens=254).fit(X)
    with pytest.raises(ValueError, match="n_prefix == 0"):
        clone(good).set_params(n_prefix=0).fit(X)
    for name, value in [("model", None), ("note", ["note"])]:
        with pytest.raises(TypeError, match=f"{name} must be an instance of"):
            clone(good).set_params(**{name: value}).fit(X)
    with pytest.raises(TypeError, match="max_new_tokens must be an instance of"):
        clone_with_weights(generator, max_new_tokens=2.5).generate(X)
    with pytest.raises(ValueError, match="max_epochs == 0"):
        make(folder, max_epochs=0).fit(nothing)  # said before anything is fitted
    with pytest.raises(ValueError, match="is no folder on this machine"):
        make("./nowhere").fit(X)
    with pytest.raises(ValueError, match="X lacks columns that fit has read"):
        generator.generate(X[["v0"]])


# ---------------------------------------------------------------- scores of texts


def test_text_scores_are_those_of_the_libraries():
    written = ["fever and cough for two days", "no pain at all in the left arm"]
    said = ["fever and cough since monday", "pain in the left arm"]
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    found = text_scores(written, said)
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(said, [written]).score / 100)
    assert found["chrf"] == pytest.approx(sacrebleu.corpus_chrf(said, [written]).score / 100)
    scorer = RougeScorer(["rougeL"])
    rouge = [scorer.score(r, p)["rougeL"].fmeasure for r, p in zip(written, said, strict=True)]
    assert found["rougeL"] == pytest.approx(np.mean(rouge))
    assert found["rouge1"] == pytest.approx((2 * 3 / 11 + 2 * 5 / 13) / 2)
    assert text_scores(written, written) == pytest.approx(dict.fromkeys(found, 1.0))
    assert max(text_scores(written, [None, ""]).values()) == 0


def test_text_scores_and_nulls():
    written, said = (
        ["fever and cough for days", None, np.nan],
        ["fever and cough for days", "x", "y"],
    )
    assert text_scores(pd.Series(written), pd.Series(said))["rougeL"] == 1
    with pytest.raises(ValueError, match="references holds no text"):
        text_scores([None], ["x"])
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        text_scores(["x"], ["x", "y"])
    with pytest.raises(ValueError, match="Row 1 holds int"):
        text_scores(["x", 3], ["x", "y"])


@pytest.mark.parametrize("package", ["sacrebleu", "rouge_score"])
def test_text_scores_without_the_extra(monkeypatch, package):
    gone = [name for name in sys.modules if name.partition(".")[0] == package]
    for name in (package, *gone):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"{package} is needed .*ehrfuse\[textscores\]"):
        text_scores(["x"], ["x"])
