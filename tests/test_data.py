"""Blocks, batches and their order: cut from memory, padded right, nothing lost."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ehrfuse._data import Batch, Block, Data, iterate


def ragged(lengths, rng):
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype("int64")
    return rng.normal(size=offsets[-1]).astype("float32"), offsets


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(0, 6), min_size=1, max_size=12), seed=st.integers(0, 99))
def test_ragged_rows_come_back_whole(lengths, seed):
    rng = np.random.default_rng(seed)
    flat, offsets = ragged(lengths, rng)
    block = Block(np.ones(len(lengths), bool), ragged={"x": (flat, offsets)})
    rows = rng.permutation(len(lengths))[: rng.integers(1, len(lengths) + 1)]
    got = block.take(rows)
    assert got["x"].shape[1] == max(1, max(lengths[i] for i in rows))
    for k, i in enumerate(rows):
        real = got["x"][k][got["x_mask"][k]].numpy()
        np.testing.assert_array_equal(real, flat[offsets[i] : offsets[i + 1]])
        assert (got["x"][k][~got["x_mask"][k]] == 0).all()


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 70), size=st.integers(1, 20), shuffled=st.booleans(), sized=st.booleans())
def test_iterate_visits_every_row_once(n, size, shuffled, sized):
    length = np.arange(n)[::-1] if sized else None
    rng = np.random.default_rng(0) if shuffled else None
    batches = list(iterate(n, size, rng, length))
    assert sorted(np.concatenate(batches)) == list(range(n))
    assert all(len(batch) <= size + 1 for batch in batches)
    if n > 1 and size > 1:
        assert min(map(len, batches)) > 1  # batch norm cannot train on one row


def test_batches_are_alike_in_length():
    length = np.random.default_rng(0).integers(1, 500, 4000)
    padded = sum(
        length[b].max() * len(b) for b in iterate(4000, 64, np.random.default_rng(1), length)
    )
    plain = sum(length[b].max() * len(b) for b in iterate(4000, 64, np.random.default_rng(1)))
    assert padded < 0.65 * plain


def test_data_is_a_view():
    values = np.arange(12, dtype="float32").reshape(6, 2)
    block = Block(np.array([1, 1, 0, 1, 1, 1], bool), {"values": values})
    data = Data({"a": block}, np.array([5, 2, 0]), y=np.arange(6, dtype="float32")[:, None])
    batch = data.batch(np.array([1, 2]))
    assert batch.inputs["a"]["values"].tolist() == [[4.0, 5.0], [0.0, 1.0]]
    assert batch.present["a"].tolist() == [False, True]
    assert batch.y.tolist() == [[2.0], [0.0]]
    assert len(batch) == 2
    assert block.arrays["values"] is values


def test_recast_touches_floats_only():
    block = Block(
        np.ones(2, bool), {"x": np.ones((2, 1), "float32"), "c": np.ones((2, 1), "int32")}
    )
    batch = Data({"a": block}, np.arange(2)).batch(np.arange(2))
    moved = batch.to(torch.device("cpu"), torch.float64)
    assert moved.inputs["a"]["x"].dtype == torch.float64
    assert moved.inputs["a"]["c"].dtype == torch.int32
    assert batch.inputs["a"]["x"].dtype == torch.float32


def test_parts_that_disagree_are_refused():
    with pytest.raises(ValueError, match="other lengths"):
        Block(np.ones(3, bool), {"x": np.ones((2, 1))})
    with pytest.raises(ValueError, match="disagree"):
        Batch({"a": {"x": torch.ones(3, 1)}}, {"a": torch.ones(2, dtype=torch.bool)})


def test_a_set_followed_by_another():
    """Rows, flat parts and offsets line up; the rows of the other set are other patients."""
    offsets = np.array([0, 2, 3])
    block = Block(np.array([True, False]), {"x": np.arange(2.0)}, {"t": (np.arange(3), offsets)})
    one = Data({"a": block}, np.array([1]), weight=np.ones(2, "float32"), groups=np.array([4, 7]))
    other = Data({"a": block}, np.array([0, 1]), weight=np.zeros(2, "float32"))
    both = one.followed_by(other)
    assert both.rows.tolist() == [1, 2, 3]
    assert both.groups.tolist() == [4, 7, 8, 9]
    assert both.weight.tolist() == [1, 1, 0, 0]
    batch = both.batch(np.arange(3))
    assert batch.inputs["a"]["t"].tolist() == [[2, 0], [0, 1], [2, 0]]
    assert batch.inputs["a"]["x"].tolist() == [1, 0, 1]
