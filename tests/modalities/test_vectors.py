"""Embedding and Image: reading cells, refusing wrong ones, learning from pictures."""

import pickle
import time
import tracemalloc

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import tiny_models
import torch
from sklearn.metrics import roc_auc_score

from ehrfuse import _hub
from ehrfuse.modalities.vectors import Embedding, Image


def frame(name, cells, dtype=object):
    column = pd.Series(cells, dtype=dtype) if not isinstance(cells, pd.Series) else cells
    return pd.DataFrame({name: column})


def arrow(cells, kind):
    return pd.Series(pd.arrays.ArrowExtensionArray(pa.array(cells, kind)))


def forms(cells):
    """The same vectors in every form that a cell may have."""
    yield frame("v", [None if c is None else np.array(c, "float32") for c in cells])
    yield frame("v", [None if c is None else np.array(c, "float64") for c in cells])
    yield frame("v", cells)
    yield frame("v", [None if c is None else tuple(c) for c in cells])
    for kind in (pa.list_(pa.float32()), pa.large_list(pa.float64()), pa.list_(pa.float32(), 3)):
        yield frame("v", arrow(cells, kind))


CELLS = [[1.0, 2.0, 3.0], None, [-1.0, 0.5, 0.0], [4.0, 4.0, 4.0], None]


@pytest.mark.parametrize("number", range(7))
def test_every_form_of_a_vector_reads_alike(number):
    X = list(forms(CELLS))[number]
    before = pickle.dumps(X)
    block = Embedding("v").fit(X).transform(X)
    assert block.present.tolist() == [True, False, True, True, False]
    expected = [[0.0] * 3 if cell is None else cell for cell in CELLS]
    np.testing.assert_array_equal(block.arrays["values"], np.array(expected, "float32"))
    assert pickle.dumps(X) == before
    part = Embedding("v").fit(X).transform(X.iloc[2:4])  # a slice of the Arrow array
    np.testing.assert_array_equal(part.arrays["values"], np.array(expected[2:4], "float32"))


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ([1.0, 2.0], "'v' needs vectors of length 3, as in fit; row 1 holds one of length 2"),
        (np.zeros(4), "row 1 holds one of length 4"),
        (np.zeros((1, 3)), "1-D vectors of numbers; row 1 holds an array of shape"),
        ([1.0, np.nan, 2.0], "finite numbers; row 1 holds NaN .* null cell"),
        ([1.0, None, 2.0], "finite numbers; row 1 holds NaN"),
        ([1.0, np.inf, 2.0], "finite numbers; row 1 holds NaN or infinity"),
        ([1e300, 0.0, 2.0], "finite numbers; row 1 holds NaN or infinity"),
        ("a secret text", "1-D vectors of numbers; row 1 holds str of length 13"),
        (["a", "b", "c"], "1-D vectors of numbers; row 1 holds list of length 3"),
        ([[1.0], [2.0, 3.0], [4.0]], "1-D vectors of numbers; row 1 holds list of length 3"),
        (5.0, "1-D vectors of numbers; row 1 holds float"),
        ([], "1-D vectors of numbers; row 1 holds list of length 0"),
        ({"a": 1.0}, "1-D vectors of numbers; row 1 holds dict of length 1"),
    ],
)
def test_a_wrong_vector_is_named(cell, message):
    X = frame("v", [[1.0, 2.0, 3.0], cell])
    embedding = Embedding("v").fit(X.iloc[:1])
    with pytest.raises(ValueError, match=message) as caught:
        embedding.transform(X)
    assert "secret" not in str(caught.value)
    with pytest.raises(ValueError, match="row 1 holds"):
        Embedding("v").fit(X)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([[1.0, 2.0, 3.0], [1.0, 2.0]], "row 1 holds one of length 2"),
        ([[1.0, 2.0, 3.0], [1.0, None, 2.0]], "row 1 holds NaN"),
    ],
)
def test_a_wrong_arrow_vector_is_named(cells, message):
    with pytest.raises(ValueError, match=message):
        Embedding("v").fit(frame("v", arrow(cells, pa.list_(pa.float32()))))


def test_two_columns_are_refused():
    with pytest.raises(ValueError, match="reads one column"):
        Embedding(["a", "b"]).fit(pd.DataFrame({"a": [[1.0]], "b": [[1.0]]}))


@pytest.mark.parametrize("kind", [object, pd.ArrowDtype(pa.list_(pa.float32()))])
def test_a_column_of_nulls_builds_and_stays_absent(kind):
    X = frame("v", [None, None], kind)
    embedding = Embedding("v").fit(X)
    assert embedding.size_ == 0
    later = frame("v", [[1.0, 2.0], None])
    block = embedding.transform(later)
    assert not block.present.any()
    tokens, mask = embedding.make_encoder(8)(block.take(np.arange(2)))
    assert tokens.shape == (2, 1, 8)
    assert mask.all()


@pytest.mark.parametrize("form", ["array", "arrow"])
def test_many_vectors_are_read_fast_and_without_copies(form):
    values = np.random.default_rng(0).normal(size=(20_000, 768)).astype("float32")
    X = frame("v", list(values))
    if form == "arrow":
        flat = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), 768)
        X = frame("v", pd.Series(pd.arrays.ArrowExtensionArray(flat)))
    embedding = Embedding("v").fit(X.iloc[:10])
    tracemalloc.start()
    start = time.process_time()
    block = embedding.transform(X)
    seconds, (_, peak) = time.process_time() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    np.testing.assert_array_equal(block.arrays["values"], values)
    assert seconds < 1.5
    assert peak < 1.5 * values.nbytes


# ---------------------------------------------------------------- pictures


def picture(seed=0, shape=(40, 30, 3)):
    return np.random.default_rng(seed).integers(0, 256, shape).astype("uint8")


def save(path, array, **options):
    pillow = pytest.importorskip("PIL.Image")
    pillow.fromarray(array).save(path, **options)
    return path


def test_paths_and_arrays_read_alike(tmp_path):
    grey = picture(shape=(40, 30))
    path = save(tmp_path / "film.png", grey)
    X = frame("film", [str(path), path, grey, grey[..., None], None, np.stack([grey] * 3, 2)])
    block = Image("film", size=16).fit(X).transform(X)
    pixels = block.arrays["pixels"]
    assert pixels.shape == (6, 16, 16)
    assert pixels.dtype == np.uint8
    assert block.present.tolist() == [True] * 4 + [False, True]
    for i in (1, 2, 3, 5):
        np.testing.assert_allclose(pixels[i].astype(int), pixels[0], atol=1)
    rooted = Image("film", size=16, root=tmp_path).fit(frame("film", ["film.png"]))
    np.testing.assert_array_equal(
        rooted.transform(frame("film", ["film.png"])).arrays["pixels"][0], pixels[0]
    )


def test_numbers_of_any_width_become_eight_bits(tmp_path):
    ramp = np.linspace(0, 255, 64).round().reshape(8, 8)
    wide = (ramp * 16).astype("uint16")  # 12 bits
    cells = [ramp.astype("uint8"), ramp / 255, wide, wide.astype("int64"), ramp > 127]
    cells.append(save(tmp_path / "wide.png", wide))
    X = frame("film", cells)
    pixels = Image("film", size=8).fit(X).transform(X).arrays["pixels"].astype(int)
    for i in (0, 1, 2, 3, 5):
        np.testing.assert_allclose(pixels[i], ramp, atol=1)
    np.testing.assert_array_equal(pixels[4], 255 * (ramp > 127))


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (np.zeros((3, 8, 8), "uint8"), r"array of pixels .* row 1 holds an array of shape \(3, 8"),
        (np.zeros(8), "row 1 holds an array of shape"),
        (np.full((8, 8), 255.0), "uint8 pixels or floats from 0 to 1; row 1 holds pixels outside"),
        (np.full((8, 8), np.nan), "row 1 holds pixels outside 0 to 1, or NaN"),
        (np.array([["a"]]), "row 1 holds an array of shape"),
        ([[1, 2], [3, 4]], "row 1 holds list of length 2"),
        (7, "row 1 holds int"),
        ("absent.png", r"row 1 names 'absent.png', which cannot be read \(FileNotFoundError\)"),
    ],
)
def test_a_wrong_picture_is_named(cell, message):
    X = frame("film", [picture(shape=(8, 8)), None])
    X.iat[1, 0] = cell
    with pytest.raises(ValueError, match=message):
        Image("film", size=8).fit(X).transform(X)


def test_a_damaged_file_is_named(tmp_path):
    path = save(tmp_path / "cut.png", picture())
    path.write_bytes(path.read_bytes()[:500])
    (tmp_path / "text.png").write_text("no picture")
    for name in ("cut.png", "text.png"):
        with pytest.raises(ValueError, match=rf"row 0 names .*{name}', which cannot be read"):
            Image("film", root=tmp_path).fit(frame("film", [name])).transform(frame("film", [name]))


def test_the_extra_is_named_where_pillow_is_absent(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "PIL.Image", None)
    X = frame("film", [picture(shape=(8, 8))])
    assert Image("film", size=8).fit(X).transform(X).present.all()  # nothing to resize
    with pytest.raises(ImportError, match=r"pip install 'ehrfuse\[image\]'"):
        Image("film", size=16).fit(X).transform(X)


def test_real_films_are_decoded(shared_data):
    folder = shared_data / "covid-cxr" / "images"
    names = sorted(path.name for path in folder.iterdir())[:40]
    X = frame("film", names)
    pixels = Image("film", root=folder).fit(X).transform(X).arrays["pixels"]
    assert pixels.shape == (40, 64, 64)
    assert (pixels.std((1, 2)) > 10).all()


def test_the_default_learns_from_real_films(shared_data):
    from ehrfuse.methods.fusion import FusionClassifier

    data = np.load(shared_data / "pneumoniamnist" / "pneumoniamnist_trainval.npz")
    train, val = (frame("film", list(data[f"{part}_images"])) for part in ("train", "val"))
    clf = FusionClassifier({"film": Image("film", size=28)}, random_state=0)
    clf.fit(train, data["train_labels"].ravel())
    assert roc_auc_score(data["val_labels"].ravel(), clf.predict_proba(val)[:, 1]) > 0.95


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return tiny_models.write_vit(tmp_path_factory.mktemp("models") / "vit")


def test_a_vision_model_reads_pictures_once(tmp_path, vit):
    path = save(tmp_path / "film.png", picture())
    X = frame("film", [path, picture(), None, picture(1, (50, 60))])
    image = Image("film", model=vit, cache=tmp_path / "rows.sqlite")
    before = _hub.encoded["images"]
    block = image.fit(X).transform(X)
    assert block.arrays["values"].shape == (4, 16)
    np.testing.assert_array_equal(block.arrays["values"][0], block.arrays["values"][1])
    assert not block.arrays["values"][2].any()
    pickle.loads(pickle.dumps(image)).transform(X)
    assert _hub.encoded["images"] - before == 2
    tokens, _ = image.make_encoder(8)(block.take(np.arange(4)))
    assert tokens.shape == (4, 1, 8)


def test_a_vision_model_gets_the_colours(vit):
    red, blue = np.zeros((32, 32, 3), "uint8"), np.zeros((32, 32, 3), "uint8")
    red[..., 0], blue[..., 2] = 255, 255
    values = (
        Image("film", model=vit)
        .fit(frame("film", [red]))
        .transform(frame("film", [red, blue, np.zeros((32, 32), "uint8")]))
    )
    vectors = values.arrays["values"]
    assert np.abs(vectors[0] - vectors[1]).max() > 0.01
    assert np.isfinite(vectors).all()


def test_other_weights_than_in_fit_are_refused(tmp_path):
    folder = tiny_models.write_vit(tmp_path / "vit")
    X = frame("film", [picture()])
    image = Image("film", model=folder).fit(X)
    tiny_models.write_vit(tmp_path / "vit", seed=1)
    with pytest.raises(ValueError, match="holds other files than in fit"):
        image.transform(X)


def test_the_network_of_pictures_keeps_types_and_gradients():
    encoder = Image("film").fit(frame("film", [picture()])).make_encoder(8)
    tokens, mask = encoder({"pixels": torch.from_numpy(picture(shape=(3, 64, 64)))})
    assert tokens.shape == (3, 1, 8)
    assert mask.all()
    tokens.sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())
    assert encoder.double()({"pixels": torch.zeros(2, 64, 64, dtype=torch.uint8)})[0].dtype == (
        torch.float64
    )


def test_the_length_of_a_vector_says_something():
    """Vectors of length one, and parallel ones, are told apart; a layer norm would not."""
    X = pd.DataFrame({"v": [np.array([float(i)]) for i in range(30)]})
    modality = Embedding("v", dropout=0.0).fit(X)
    block = modality.transform(X)
    torch.manual_seed(0)
    tokens, _ = modality.make_encoder(8)(block.take(np.arange(30)))
    assert len(np.unique(tokens[:, 0, 0].detach().numpy().round(6))) == 30


def test_the_scale_of_vectors_is_learned_in_fit_and_steady_features_stay_quiet():
    rng = np.random.default_rng(0)
    vectors = np.column_stack([rng.normal(5, 2, 5000), 1e-9 * rng.normal(size=5000)])
    X = pd.DataFrame({"v": list(vectors)})
    center, scale = Embedding("v").fit(X).scale_
    np.testing.assert_allclose(center[0], vectors[:, 0].mean(), rtol=1e-5)
    np.testing.assert_allclose(scale[0], vectors[:, 0].std(), rtol=1e-5)
    assert scale[1] > 0.1
    assert np.isfinite(Embedding("v").fit(X.head(0)).scale_).all()
