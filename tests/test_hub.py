"""The door to pretrained models: loading, chunks, batches, the row cache."""

import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import joblib
import numpy as np
import pytest
import tiny_models
import torch

from ehrfuse import _cache, _hub

pytest.importorskip("transformers")

NOTES = ["", "Chest pain.", "no fever " * 60, "cough", "The patient was normal, 37.5 C " * 5]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tiny_models.write_bert(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="module")
def info(bert):
    return _hub.inspect_model(bert)


@pytest.fixture(autouse=True)
def _empty_memory():
    _hub.RowCache.forget()


def encode(texts, info, **options):
    return _hub.encode_texts(texts, info, **{"chunk_length": 32, "device": "cpu"} | options)


# ---------------------------------------------------------------- loading


def test_a_folder_gives_the_same_vectors_as_transformers(bert, info):
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(bert), AutoModel.from_pretrained(bert).eval()
    inputs = tokenizer(NOTES[1], return_tensors="pt")
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state[0].numpy()
    np.testing.assert_allclose(encode(NOTES[1:2], info)[0][0], hidden.mean(0), atol=1e-6)
    np.testing.assert_allclose(encode(NOTES[1:2], info, pooling="cls")[0][0], hidden[0], atol=1e-6)


def test_bin_weights_are_loaded_where_there_are_no_safetensors(tmp_path, bert):
    other = tiny_models.write_bert(tmp_path / "bin", safe=False)
    assert not list(Path(other).glob("*.safetensors"))
    vectors, _ = encode(NOTES, _hub.inspect_model(other))
    np.testing.assert_allclose(vectors, encode(NOTES, _hub.inspect_model(bert))[0], atol=1e-6)


def test_a_pickle_that_runs_code_is_refused(tmp_path, bert):
    import pickle

    class Hostile:
        def __reduce__(self):
            return Path.touch, (tmp_path / "touched",)

    folder = Path(shutil.copytree(bert, tmp_path / "hostile"))
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Hostile()}))
    with pytest.raises(ValueError, match="could not be loaded"):
        encode(NOTES, _hub.inspect_model(str(folder)))
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (
            "config.json",
            r"configuration \(config.json\) of model .* could not be loaded .* offline",
        ),
        ("model.safetensors", "model of model .* could not be loaded"),
        ("tokenizer.json", "tokenizer of model .* could not be loaded"),
    ],
)
@pytest.mark.parametrize("how", ["absent", "damaged"])
def test_a_broken_folder_is_named(tmp_path, bert, broken, message, how):
    folder = Path(shutil.copytree(bert, tmp_path / "broken"))
    if how == "absent":
        (folder / broken).unlink()
        if broken == "tokenizer.json":
            (folder / "tokenizer_config.json").unlink()
    else:
        (folder / broken).write_text("{not what it should be")
    with pytest.raises(ValueError, match=message):
        encode(NOTES, _hub.inspect_model(str(folder)))


def test_an_absent_folder_and_an_unknown_name_are_named(tmp_path):
    with pytest.raises(ValueError, match="no folder on this machine"):
        _hub.inspect_model(str(tmp_path / "absent"))
    with pytest.raises(ValueError, match=r"'somebody/some-model' could not .* local folder"):
        _hub.inspect_model("somebody/some-model")


def test_weights_that_do_not_fit_the_config_are_refused(tmp_path, bert):
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(bert, tmp_path / "cut"))
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "layer.1" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"do not fit its config\.json: 16 tensors are missing"):
        encode(NOTES, _hub.inspect_model(str(folder)))


def test_the_global_random_stream_is_left_alone(tmp_path):
    folder = tiny_models.write_bert(tmp_path / "fresh", seed=3)
    before = torch.get_rng_state()
    fresh = _hub.inspect_model(folder)
    encode(NOTES, fresh)
    _hub.copy_model(fresh)
    _hub.build_model(fresh.config)
    assert torch.equal(before, torch.get_rng_state())


# ---------------------------------------------------------------- chunks and batches


def test_chunks_hold_every_token_once_up_to_max_length(info):
    tokenizer, frame = _hub.open_tokenizer(info, 12)
    full = tokenizer(NOTES[2], add_special_tokens=False)["input_ids"]
    (empty, chunks) = _hub.cut_texts(["", NOTES[2]], tokenizer, frame, 55, 12)
    assert empty == [[*frame.prefix, *frame.suffix]]
    assert all(chunk[0] == 2 and chunk[-1] == 3 and len(chunk) <= 12 for chunk in chunks)
    assert [token for chunk in chunks for token in chunk[1:-1]] == full[:55]


def test_a_stored_tokenizer_cuts_alike(info):
    tokenizer, frame = _hub.open_tokenizer(info, 12)
    again = _hub.restore_tokenizer(_hub.tokenizer_json(tokenizer, "tiny"))
    assert _hub.cut_texts(NOTES, again, frame, 100, 12) == _hub.cut_texts(
        NOTES, tokenizer, frame, 100, 12
    )


def test_chunks_that_the_model_cannot_read_are_refused(info):
    with pytest.raises(ValueError, match=r"chunk_length=65 is more than .* choose at most 64"):
        encode(NOTES, info, chunk_length=65)
    with pytest.raises(ValueError, match=r"leaves no room .* choose at least 3"):
        encode(NOTES, info, chunk_length=2)


@pytest.mark.parametrize("write", ["write_bert", "write_longformer", "write_modernbert"])
def test_vectors_do_not_depend_on_the_batch(tmp_path, monkeypatch, write):
    info = _hub.inspect_model(getattr(tiny_models, write)(tmp_path / "model"))
    together, offsets = encode(NOTES, info)
    _hub.RowCache.forget()
    monkeypatch.setattr(_hub, "TOKENS_PER_BATCH", 1)
    for i, note in enumerate(NOTES):
        alone, _ = encode([note], info)
        np.testing.assert_allclose(together[offsets[i] : offsets[i + 1]], alone, atol=1e-5)
        _hub.RowCache.forget()


@pytest.mark.parametrize("backend", ["threading", "loky"])
def test_workers_give_the_same_vectors(info, backend, monkeypatch):
    texts = [f"no fever {'chest pain ' * (i % 7)} {i}" for i in range(23)]
    vectors, offsets = encode(texts, info)
    _hub.RowCache.forget()
    with joblib.parallel_config(backend):
        shared, places = encode(texts, info, n_jobs=2)
    np.testing.assert_array_equal(places, offsets)
    np.testing.assert_allclose(shared, vectors, atol=1e-6)
    monkeypatch.setattr(_hub, "Parallel", None)  # what is known is sent to nobody
    again, _ = encode(texts, info, n_jobs=2)
    np.testing.assert_array_equal(again, shared)


def test_no_text_gives_no_vector(info):
    vectors, offsets = encode([], info)
    assert vectors.shape == (0, 16)
    assert offsets.tolist() == [0]


# ---------------------------------------------------------------- cache


@pytest.mark.parametrize("durable", [False, True])
def test_only_unseen_texts_are_encoded(info, tmp_path, durable):
    cache = tmp_path / "rows.sqlite" if durable else None
    before = _hub.encoded["texts"]
    first, _ = encode(NOTES + NOTES, info, cache=cache)
    assert _hub.encoded["texts"] - before == len(NOTES)
    again, offsets = encode(["new", *NOTES], info, cache=cache)
    assert _hub.encoded["texts"] - before == len(NOTES) + 1
    np.testing.assert_array_equal(again[offsets[1] :], first[: len(again) - 1])


def test_the_key_holds_everything_that_the_vector_depends_on(info, tmp_path):
    cache = tmp_path / "rows.sqlite"
    other = _hub.inspect_model(tiny_models.write_bert(tmp_path / "other", seed=1))
    before = _hub.encoded["texts"]
    variants = [
        {}, {"pooling": "cls"}, {"chunk_length": 16}, {"max_length": 8},
    ]  # fmt: skip
    for options in variants:
        encode(NOTES, info, cache=cache, **options)
    encode(NOTES, other, cache=cache)
    assert _hub.encoded["texts"] - before == len(NOTES) * (len(variants) + 1)


def test_new_weights_in_the_same_folder_have_a_new_fingerprint(tmp_path):
    folder = tiny_models.write_bert(tmp_path / "model")
    before = _hub.inspect_model(folder)
    first, _ = encode(NOTES, before)
    assert _hub.reopen(folder, None, before.fingerprint) == before
    tiny_models.write_bert(tmp_path / "model", seed=1)
    after = _hub.inspect_model(folder)
    assert after.fingerprint != before.fingerprint
    assert np.abs(encode(NOTES, after)[0] - first).max() > 0.1
    with pytest.raises(ValueError, match="holds other files than in fit"):
        _hub.reopen(folder, None, before.fingerprint)


def test_a_copied_folder_has_the_same_fingerprint(tmp_path, bert, info):
    copied = shutil.copytree(bert, tmp_path / "elsewhere")
    assert _hub.inspect_model(str(copied)).fingerprint == info.fingerprint


def test_no_text_is_stored(info, tmp_path):
    encode(["the secret patient"], info, cache=tmp_path / "rows.sqlite")
    for path in tmp_path.iterdir():
        assert b"secret" not in path.read_bytes()


def test_a_damaged_cache_file_is_named(info, tmp_path):
    path = tmp_path / "rows.sqlite"
    path.write_bytes(b"this is no database" * 100)
    with pytest.raises(
        ValueError, match=r"rows.sqlite' cannot be used .* delete it if it is damaged"
    ):
        encode(NOTES, info, cache=path)
    with pytest.raises(ValueError, match="a folder that exists"):
        encode(NOTES, info, cache=tmp_path / "absent" / "rows.sqlite")


def test_a_row_cut_short_is_named(info, tmp_path):
    path = tmp_path / "rows.sqlite"
    encode(NOTES, info, cache=path)
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE rows SET data = substr(data, 1, 7)")
    connection.close()
    with pytest.raises(ValueError, match="delete it if it is damaged"):
        encode(NOTES, info, cache=path)


def test_what_was_done_before_a_kill_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(_hub.RowCache, "GROUP", 2)
    cache = _hub.RowCache(tmp_path / "rows.sqlite")
    items = [bytes([i]) for i in range(6)]
    calls = []

    def compute(places):
        calls.append(places)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return [np.full((1, 3), i, "float32") for i in places]

    with pytest.raises(KeyboardInterrupt):
        cache.map("tag", items, compute)
    calls.clear()
    rows = cache.map("tag", items, compute)
    assert calls == [[4, 5]]
    np.testing.assert_array_equal(np.concatenate(rows)[:, 0], np.arange(6))


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(_hub.RowCache, "MEMORY", 1000)
    cache, calls = _hub.RowCache(), []

    def compute(places):
        calls.append(len(places))
        return [np.zeros((1, 25), "float32") for _ in places]  # 100 bytes each

    items = [bytes([i]) for i in range(20)]
    assert len(cache.map("tag", items, compute)) == 20
    assert _hub.RowCache._bytes == 1000
    cache.map("tag", items[10:], compute)
    cache.map("tag", items[:10], compute)
    assert calls == [20, 10]


FILL = """
import importlib.util, sys
import numpy as np
spec = importlib.util.spec_from_file_location("cache", sys.argv[1])  # without torch: starts fast
cache = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cache)
start = int(sys.argv[3])
items = [str(start + i).encode() for i in range(400)]
compute = lambda places: [np.full((1, 4), start + i, "float32") for i in places]
cache.RowCache.GROUP = 10
rows = cache.RowCache(sys.argv[2]).map("tag", items, compute)
print(int(np.concatenate(rows)[:, 0].sum()))
"""


def test_several_processes_write_at_once(tmp_path):
    path = tmp_path / "rows.sqlite"
    starts = [0, 200, 400, 600]  # neighbours share half of their items
    commands = [[sys.executable, "-c", FILL, _cache.__file__, path, str(start)] for start in starts]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    sums = [int(process.communicate()[0]) for process in running]
    assert sums == [sum(range(start, start + 400)) for start in starts]
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT count(*) FROM rows").fetchone() == (1000,)
    connection.close()


# ---------------------------------------------------------------- images


def pictures(n):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (40 + i, 50, 3)).astype("uint8") for i in range(n)]


def test_images_give_the_same_vectors_as_transformers(tmp_path):
    from transformers import AutoImageProcessor, AutoModel

    folder = tiny_models.write_vit(tmp_path / "vit")
    vit = _hub.inspect_model(folder)
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    with torch.no_grad():
        found = AutoModel.from_pretrained(folder).eval()(
            **processor(pictures(2), return_tensors="pt")
        )
    vectors = _hub.encode_images(pictures(2), vit, device="cpu")
    np.testing.assert_allclose(vectors, found.pooler_output, atol=1e-5)
    assert _hub.image_size(vit, "cpu") == 16


def test_a_pooler_without_weights_is_not_read(tmp_path):
    from transformers import AutoImageProcessor, AutoModel

    folder = tiny_models.write_vit(tmp_path / "vit", pooler=False)
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    model = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
    with torch.no_grad():
        hidden = model(**processor(pictures(2), return_tensors="pt")).last_hidden_state
    vectors = _hub.encode_images(pictures(2), _hub.inspect_model(folder), device="cpu")
    np.testing.assert_allclose(vectors, hidden.mean(1), atol=1e-5)


def test_images_are_encoded_once(tmp_path):
    vit = _hub.inspect_model(tiny_models.write_vit(tmp_path / "vit"))
    before = _hub.encoded["images"]
    first = _hub.encode_images(pictures(5), vit, device="cpu", cache=tmp_path / "rows.sqlite")
    again = _hub.encode_images(pictures(5)[::-1], vit, device="cpu", cache=tmp_path / "rows.sqlite")
    assert _hub.encoded["images"] - before == 5
    np.testing.assert_array_equal(first, again[::-1])
