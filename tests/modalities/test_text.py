"""Text: words learned in fit, frozen models, trained models."""

import pickle
import shutil
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import tiny_models
import torch
from sklearn.base import clone
from sklearn.feature_extraction.text import TfidfVectorizer

from ehrfuse import _hub
from ehrfuse.modalities._words import split
from ehrfuse.modalities.text import Text
from ehrfuse.nn.core import Core

NOTES = ["Chest pain, no fever.", "no chest pain", "", None, "fever " * 90, "cough and fever"]


def frame(notes, dtype=object):
    return pd.DataFrame({"note": pd.Series(notes, dtype=dtype)})


def batch(block, rows=None):
    return block.take(np.arange(len(block.present)) if rows is None else np.asarray(rows))


@pytest.fixture(autouse=True)
def _empty_memory():
    _hub.RowCache.forget()


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tiny_models.write_bert(tmp_path_factory.mktemp("models") / "bert")


# ---------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("note", "words"),
    [
        ("BP 120/80, T 37.5C; 2.5mg q6h.", "bp 120 80 t 37.5 c 2.5 mg q6h"),
        ("s/p CABG x3 (2009)", "s p cabg x3 2009"),
        ("Übelkeit, naïve T12-L1", "übelkeit naïve t12 l1"),
        ("pain.The 5% 1.", "pain the 5 1"),
        ("  \n", ""),
    ],
)
def test_clinical_text_is_cut_into_words(note, words):
    assert split(note, 100) == words.split()
    assert split(note, 2) == words.split()[:2]


def test_weights_are_tf_idf_times_the_root_of_the_share():
    rng = np.random.default_rng(0)
    notes = [" ".join(rng.choice(list("abcdefgh"), rng.integers(3, 20))) for _ in range(60)]
    X = frame(notes)
    text = Text("note", min_count=5).fit(X)
    reference = TfidfVectorizer(
        ngram_range=(1, 2), min_df=5, sublinear_tf=True, token_pattern=r"\S+"
    )
    expected = reference.fit_transform(notes)
    order = reference.get_feature_names_out()
    assert sorted(text.vocabulary_) == sorted(order)
    ids, offsets = text.transform(X).ragged["ids"]
    weights, _ = text.transform(X).ragged["weights"]
    found = np.zeros((60, len(text.vocabulary_) + 1))
    found[np.repeat(np.arange(60), np.diff(offsets)), ids] = weights
    columns = [text.vocabulary_.index(term) + 1 for term in order]
    share = (1 + (expected.toarray() > 0).sum(0)) / 61
    np.testing.assert_allclose(found[:, columns], expected.toarray() * np.sqrt(share), atol=1e-6)


def test_rare_words_are_not_kept():
    X = frame(["john smith has pain"] + ["pain and fever"] * 5)
    assert Text("note").fit(X).vocabulary_ == ["pain", "and", "fever", "and fever", "pain and"]
    assert Text("note", max_words=2).fit(X).vocabulary_ == ["pain", "and"]


def test_a_note_of_unknown_words_still_has_one_token():
    text = Text("note", min_count=2).fit(frame(NOTES))
    block = text.transform(frame(["", "xyz", None, "fever xyz"]))
    assert block.present.tolist() == [True, True, False, True]
    ids, offsets = block.ragged["ids"]
    assert np.diff(offsets).tolist() == [1, 1, 0, 1]
    assert ids[:2].tolist() == [0, 0]
    tokens, mask = text.make_encoder(8)(batch(block))
    assert tokens.shape == (4, 1, 8)
    assert mask.all()
    assert torch.isfinite(tokens).all()


def test_a_fit_without_frequent_words_works():
    text = Text("note").fit(frame(["a rare note"]))
    assert text.vocabulary_ == []
    block = text.transform(frame(["another", None]))
    assert block.ragged["ids"][0].tolist() == [0]
    assert text.make_encoder(8)(batch(block))[0].shape == (2, 1, 8)


@pytest.mark.parametrize("options", [{}, {"model": True}, {"model": True, "trainable": True}])
def test_a_column_of_nulls_builds_and_stays_absent(options, bert):
    options = {name: bert if name == "model" else value for name, value in options.items()}
    text = Text("note", chunk_length=16, **options).fit(frame([None, None]))
    block = text.transform(frame(["chest pain", None]))
    assert not block.present.any()
    tokens, mask = text.make_encoder(8)(batch(block))
    assert tokens.shape[0] == 2
    assert mask.shape == tokens.shape[:2]


@pytest.mark.parametrize("dtype", [object, "str", "string[pyarrow]", "category"])
def test_every_string_dtype_reads_alike(dtype):
    expected = Text("note", min_count=1).fit(frame(NOTES)).transform(frame(NOTES))
    X = frame(NOTES, dtype)
    found = Text("note", min_count=1).fit(X).transform(X)
    np.testing.assert_array_equal(found.present, expected.present)
    for name, (flat, offsets) in expected.ragged.items():
        np.testing.assert_array_equal(found.ragged[name][0], flat)
        np.testing.assert_array_equal(found.ragged[name][1], offsets)


@pytest.mark.parametrize(
    ("cell", "kind"), [(["a", "secret"], "list of length 2"), (b"secret", "bytes"), (3.5, "float")]
)
def test_a_cell_that_is_no_text_is_named_but_not_shown(cell, kind):
    text = Text("note").fit(frame(["a note", None]))
    with pytest.raises(ValueError, match=f"'note' needs text .* row 1 holds {kind}") as caught:
        text.transform(frame(["a note", cell]))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 0}, "max_length=0 must be"),
        ({"chunk_length": 1.5}, "chunk_length=1.5 must be"),
        ({"min_count": 0}, "min_count=0 must be"),
        ({"max_words": "all"}, "max_words='all' must be"),
        ({"pooling": "max"}, "pooling='max' is not known"),
        ({"trainable": True}, "trainable=True needs model="),
        ({"gradient_checkpointing": True}, "gradient_checkpointing needs trainable=True"),
    ],
)
def test_parameters_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Text("note", **options).fit(frame(NOTES))


def test_words_are_read_fast():
    rng = np.random.default_rng(0)
    words = np.array([f"word{i}" for i in rng.zipf(1.3, 500_000) % 20_000])
    notes = [" ".join(part) for part in np.split(words, 1000)]
    start = time.process_time()
    Text("note").fit(frame(notes)).transform(frame(notes))
    assert time.process_time() - start < 8  # 3.5 MB of notes, twice; about 1.2 s on an idle core


def test_words_find_the_signal():
    from ehrfuse.methods.fusion import FusionClassifier

    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 600)
    filler = [" ".join(rng.choice([f"w{i}" for i in range(300)], 30)) for _ in y]
    # The pair says it, its words do not: both notes hold "no", "pain" and "fever".
    told = np.where(y == 1, "no fever pain", "no pain fever")
    X = frame([f"{a} {b}" for a, b in zip(filler, told, strict=True)])
    clf = FusionClassifier({"note": Text("note")}, random_state=0).fit(X[:400], y[:400])
    assert (clf.predict(X[400:]) == y[400:]).mean() > 0.95


# ---------------------------------------------------------------- frozen


def test_a_frozen_model_is_not_part_of_the_modality(bert):
    text = Text("note", model=bert, chunk_length=16).fit(frame(NOTES))
    block = text.transform(frame(NOTES))
    chunks, offsets = block.ragged["chunks"]
    assert chunks.shape[1] == text.size_ == 16
    assert np.diff(offsets).tolist() == [1, 1, 1, 0, 7, 1]
    tokens, mask = text.make_encoder(8)(batch(block))
    assert tokens.shape == (6, 7, 8)
    assert mask.sum(1).tolist() == [1, 1, 1, 0, 7, 1]
    assert not any("transformers" in type(m).__module__ for m in text.make_encoder(8).modules())
    assert len(pickle.dumps(text)) < 2000


def test_the_second_fold_pays_nothing(bert):
    X = frame(NOTES)
    before = _hub.encoded["texts"]
    for rows in ([0, 1, 2, 3], [2, 3, 4, 5], [0, 1, 4, 5]):
        clone(Text("note", model=bert, chunk_length=16)).fit(X.iloc[rows]).transform(X)
    assert _hub.encoded["texts"] - before == 5


def test_other_weights_than_in_fit_are_refused(tmp_path):
    folder = tiny_models.write_bert(tmp_path / "bert")
    text = Text("note", model=folder, chunk_length=16).fit(frame(NOTES))
    text.transform(frame(NOTES))
    tiny_models.write_bert(tmp_path / "bert", seed=1)
    with pytest.raises(ValueError, match="holds other files than in fit"):
        text.transform(frame(NOTES))
    assert not text.transform(frame([None])).present.any()  # nothing to encode: no model needed
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match="no folder on this machine"):
        text.transform(frame(NOTES))


# ---------------------------------------------------------------- trained


def trained(bert, **options):
    options = {"model": bert, "trainable": True, "chunk_length": 16, "dropout": 0.0} | options
    return Text("note", **options).fit(frame(NOTES))


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_trainable_model_starts_where_the_frozen_one_stands(bert, pooling):
    text = trained(bert, pooling=pooling)
    frozen = Text("note", model=bert, chunk_length=16, pooling=pooling).fit(frame(NOTES))
    encoder = text.make_encoder(8).eval()
    seen = []
    encoder.backbone.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        tokens, mask = encoder(batch(text.transform(frame(NOTES))))
    vectors, offsets = frozen.transform(frame(NOTES)).ragged["chunks"]
    np.testing.assert_allclose(seen[0].numpy(), vectors, atol=1e-5)
    np.testing.assert_array_equal(mask.sum(1).numpy(), np.diff(offsets))
    expected = encoder.out(encoder.norm(torch.from_numpy(vectors)))
    torch.testing.assert_close(tokens[mask], expected, atol=1e-5, rtol=0)


def test_rows_do_not_depend_on_their_neighbours(bert):
    text = trained(bert)
    block, encoder = text.transform(frame(NOTES)), text.make_encoder(8).eval()
    with torch.no_grad():
        together, mask = encoder(batch(block))
        for row in range(len(NOTES)):
            alone, there = encoder(batch(block, [row]))
            torch.testing.assert_close(together[row][mask[row]], alone[0][there[0]])


def test_gradients_reach_the_model_and_its_steps_are_smaller(bert):
    encoder = trained(bert, lr_scale=0.1).make_encoder(8)
    encoder(batch(trained(bert).transform(frame(NOTES))))[0].square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert (parameter.grad is not None) == ("pooler" not in name), name
    groups = Core({"note": encoder}).param_groups(1.0, 0.0)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert {rates[id(p)] for p in encoder.backbone.parameters() if p.requires_grad} == {0.1}
    assert {rates[id(p)] for p in encoder.out.parameters()} == {1.0}


def test_dropout_of_the_model_works_in_train_mode_only(bert):
    text = trained(bert)
    encoder, inputs = text.make_encoder(8), batch(text.transform(frame(NOTES)))
    with torch.no_grad():
        assert not torch.equal(encoder.train()(inputs)[0], encoder(inputs)[0])
        assert torch.equal(encoder.eval()(inputs)[0], encoder(inputs)[0])


def test_every_encoder_has_its_own_copy(bert):
    text = trained(bert)
    one, other = text.make_encoder(8), text.make_encoder(8)
    with torch.no_grad():
        next(one.backbone.parameters()).zero_()
    assert next(other.backbone.parameters()).any()
    assert next(text.make_encoder(8).backbone.parameters()).any()


def test_a_rebuilt_model_waits_for_its_weights(bert):
    text = trained(bert)
    inputs, encoder = batch(text.transform(frame(NOTES))), text.make_encoder(8).eval()
    again = pickle.loads(pickle.dumps(text)).make_encoder(8).eval()
    with pytest.raises(RuntimeError, match="random weights"):
        again(inputs)
    again.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(again(inputs)[0], encoder(inputs)[0])


def test_a_fitted_estimator_predicts_without_the_folder(tmp_path):
    from ehrfuse.methods.fusion import FusionClassifier

    folder = tiny_models.write_bert(tmp_path / "bert")
    X, y = frame(NOTES * 4), np.arange(24) % 2
    modalities = {"note": Text("note", model=folder, trainable=True, chunk_length=16)}
    clf = FusionClassifier(modalities, n_members=2, max_epochs=2, random_state=0, device="cpu")
    expected = clf.fit(X, y).predict_proba(X)
    (tmp_path / "clf.pkl").write_bytes(pickle.dumps(clf))
    X.to_pickle(tmp_path / "X.pkl")
    shutil.rmtree(folder)
    code = (
        "import pickle, sys, numpy as np, pandas as pd, torch; torch.set_num_threads(1)\n"
        "clf = pickle.load(open(sys.argv[1] + '/clf.pkl', 'rb'))\n"
        "np.save(sys.argv[1] + '/p.npy', clf.predict_proba(pd.read_pickle(sys.argv[1] + '/X.pkl')))"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True)
    np.testing.assert_allclose(np.load(tmp_path / "p.npy"), expected, atol=1e-6)


def test_a_trained_model_learns(bert):
    from ehrfuse.methods.fusion import FusionClassifier

    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 200)
    X = frame([f"the patient {'was' if label else 'no'} cough" for label in y])
    text = Text("note", model=bert, trainable=True, chunk_length=16, lr_scale=1.0)
    clf = FusionClassifier({"note": text}, n_members=1, random_state=0, device="cpu").fit(X, y)
    moved = clf.module_.encoders["note"].backbone.state_dict()
    start = clf.modalities_["note"].make_encoder(8).backbone.state_dict()
    assert any(not torch.equal(moved[name], start[name]) for name in moved)
    assert clf.score(X, y) == 1.0


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_layers_computed_twice_give_the_same_weights(bert, lora_rank):
    from ehrfuse.methods.fusion import FusionClassifier

    X, y = frame(NOTES * 4), np.arange(24) % 2
    found = []
    for twice in (False, True):
        text = Text(
            "note", model=bert, trainable=True, chunk_length=16, lora_rank=lora_rank, lr_scale=1.0,
            gradient_checkpointing=twice,
        )  # fmt: skip
        clf = FusionClassifier({"note": text}, n_members=1, max_epochs=2, random_state=0)
        clf.fit(X, y)
        layers = clf.module_.encoders["note"].backbone.model.modules()
        assert any(getattr(layer, "gradient_checkpointing", False) for layer in layers) is twice
        found.append(clf.module_.state_dict())
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, atol=1e-6, rtol=0)


def test_a_tokenizer_without_a_stored_form_is_refused():
    with pytest.raises(ValueError, match="written in Python and cannot be stored"):
        _hub.tokenizer_json(object(), "some/model")
