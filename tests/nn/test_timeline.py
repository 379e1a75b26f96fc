"""Timelines by hand, and time-aware attention against the plain formula."""

import numpy as np
import pytest
import torch

from ehrfuse.nn import timeline as module
from ehrfuse.nn.attention import sinusoids
from ehrfuse.nn.timeline import (
    PositionBias,
    Stream,
    TimeAwareBlock,
    TimeBias,
    Timeline,
    features,
    fill,
    frequencies,
    merge,
    place_visits,
)

NAN = float("nan")


def stream(time, numbers, mask=None, codes=None):
    time = torch.tensor(time)
    mask = torch.ones_like(time).bool() if mask is None else torch.tensor(mask)
    return Stream(time, mask, torch.tensor(numbers), codes)


def two_streams():
    """One patient: vitals at -3, -1, -1 and a lab at -3 and -2."""
    vitals = stream([[-3.0, -1.0, -1.0]], [[[1.0], [0.5], [1.5]]])
    labs = stream([[-3.0, -2.0]], [[[NAN, 0.2], [0.4, NAN]]])
    return [vitals, labs]


def clip(x):
    return x / np.sqrt(1 + (x / 3) ** 2)


def test_streams_are_one_timeline():
    line = merge(two_streams(), [0, 0])
    assert line.time.tolist() == [[-3.0, -2.0, -1.0]]
    assert line.mask.all()
    assert line.observed.tolist() == [
        [[True, False, True], [False, True, False], [True] + [False] * 2]
    ]
    mean = (clip(0.5) + clip(1.5)) / 2  # two records of one time are one visit
    expected = [[clip(1.0), 0, clip(0.2)], [0, clip(0.4), 0], [mean, 0, 0]]
    torch.testing.assert_close(line.value[0], torch.tensor(expected).float())


def test_fill_by_hand():
    filled = fill(merge(two_streams(), [0, 0]))
    first, lab = clip(1.0), clip(0.2)
    expected = torch.tensor([[0, 0, 0], [first, 0, lab], [first, clip(0.4), lab]])
    torch.testing.assert_close(filled.before[0], expected.float())
    assert filled.known[0].tolist() == [[False] * 3, [True, False, True], [True] * 3]
    # Time since the last measurement before; since the first visit where there was none.
    assert filled.since[0].tolist() == [[0, 0, 0], [1, 1, 1], [2, 1, 2]]


def test_features_are_value_mask_and_time_since():
    line = merge(two_streams(), [0, 0])
    x = features(line, fill(line))[0]
    torch.testing.assert_close(x[1, :, 0], torch.tensor([clip(1.0), 0.0, np.log(2.0)]).float())
    torch.testing.assert_close(x[1, :, 1], torch.tensor([clip(0.4), 1.0, np.log(2.0)]).float())


def test_order_of_records_and_padding_do_not_matter():
    vitals, labs = two_streams()
    turned = Stream(vitals.time.flip(1), vitals.mask, vitals.numbers.flip(1))
    padded = Stream(
        torch.tensor([[-3.0, 9.0, -2.0]]),
        torch.tensor([[True, False, True]]),
        torch.tensor([[[NAN, 0.2], [7.0, 7.0], [0.4, NAN]]]),
    )
    for part, other in zip(
        merge([vitals, labs], [0, 0]), merge([turned, padded], [0, 0]), strict=True
    ):
        torch.testing.assert_close(part, other)


def test_codes_are_counted_at_their_visit():
    codes = (
        torch.tensor([[0, 2, 2, 1]]),
        torch.tensor([[0, 1, 2, 0]]),
        torch.tensor([[1, 1, 1, 0]]).bool(),
    )
    history = stream([[-3.0, -1.0, -1.0]], np.zeros((1, 3, 0), "float32"), codes=codes)
    assert merge([history], [3]).words.tolist() == [[[1, 0, 0], [0, 0, 2]]]


def test_a_row_without_visits():
    time, mask = (
        torch.tensor([[1.0, 2.0], [0.0, 0.0]]),
        torch.tensor([[True, True], [False, False]]),
    )
    joint, there, places = place_visits([time], [mask])
    assert there.tolist() == [[True, True], [False, False]]
    assert joint.tolist() == [[1, 2], [0, 0]]
    assert places[0].tolist() == [[0, 1], [2, 2]]


# ---------------------------------------------------------------- attention


def plain_bias(p, w):
    return torch.einsum("bijk,hk->bhij", (p[:, :, None] - p[:, None]).abs(), w)


@pytest.mark.parametrize("block", [1, 2**24])
def test_position_bias_is_the_formula(monkeypatch, block):
    monkeypatch.setattr(module, "BLOCK_BYTES", block)
    torch.manual_seed(0)
    p = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(PositionBias.apply(p, w), plain_bias(p, w))
    assert torch.autograd.gradcheck(PositionBias.apply, (p, w))


def test_no_array_of_all_differences_is_kept():
    """Memory of the bias is that of its result: what backward keeps are positions and weights."""
    kept = []
    p, w = torch.randn(4, 50, 32), torch.randn(4, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        PositionBias.apply(p, w)
    assert max(kept) <= p.numel()


def test_looked_up_bias_is_the_direct_one():
    torch.manual_seed(0)
    bias = TimeBias("position", 2, 8)
    time = torch.randint(0, 4, (6, 12)).float()  # few different times: the table
    direct = plain_bias(sinusoids(time, bias.frequencies), bias.weight)
    torch.testing.assert_close(bias(time), direct)
    rare = torch.rand(2, 3)  # many: pair by pair
    torch.testing.assert_close(
        bias(rare), plain_bias(sinusoids(rare, bias.frequencies), bias.weight)
    )


def test_equal_times_add_nothing():
    for kind in ("position", "gap", "release"):
        assert (TimeBias(kind, 2)(torch.full((1, 4), 3.0)) == 0).all()


def test_frequencies_fall_and_those_of_the_release_grow():
    assert frequencies(32)[0] == 1
    assert frequencies(32)[-1] < 1e-3
    assert TimeBias("release", 2).frequencies[-1] > 1e3
    assert TimeBias("release", 2).table.requires_grad


def some_tokens():
    torch.manual_seed(0)
    time = torch.rand(2, 6).cumsum(1) * 5
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    return torch.randn(2, 6, 8), time, mask


@pytest.mark.parametrize(("kind", "moves"), [("gap", False), ("position", True), ("none", True)])
def test_shift_of_all_times(kind, moves):
    torch.manual_seed(1)
    block = TimeAwareBlock(8, 2, kind)
    x, time, mask = some_tokens()
    shifted = block(x, time + 3.0, mask)
    assert torch.allclose(shifted[mask], block(x, time, mask)[mask], atol=1e-5) != moves


@pytest.mark.parametrize("kind", ["gap", "position", "release", "none"])
def test_permutation_and_padding(kind):
    torch.manual_seed(1)
    block = TimeAwareBlock(8, 2, kind)
    x, time, mask = some_tokens()
    out = block(x, time, mask)
    order = torch.tensor([2, 0, 1, 3, 5, 4])
    torch.testing.assert_close(block(x[:, order], time[:, order], mask[:, order]), out[:, order])
    torch.testing.assert_close(block(x[1:, :4], time[1:, :4], mask[1:, :4]), out[1:, :4])
    assert block(x, time, torch.zeros_like(mask)).isfinite().all()


@pytest.mark.parametrize("kind", ["gap", "position", "none"])
def test_weights_are_those_of_the_forward_pass(kind):
    torch.manual_seed(1)
    block = TimeAwareBlock(8, 2, kind)
    x, time, mask = some_tokens()
    weight = block.weights(x, time, mask)
    torch.testing.assert_close(weight.sum(-1), torch.ones(2, 2, 6))
    assert (weight[1, :, :, 4:] == 0).all()
    v = block._heads(x, time)[2]
    by_hand = block.out((weight @ v).transpose(1, 2).reshape(2, 6, -1))
    torch.testing.assert_close(block._attend(x, time, mask), by_hand)


def test_wide_heads():
    block = TimeAwareBlock(8, 3, "position", head_width=8)
    assert block.qkv.out_features == 3 * 3 * 8
    with pytest.raises(ValueError, match="multiple of n_heads"):
        TimeAwareBlock(8, 3, "position")


def test_scores_are_the_equation():
    """e_ij = q_i k_j / sqrt(width) + w |p_i - p_j|."""
    torch.manual_seed(2)
    block = TimeAwareBlock(4, 1, "position")
    x, time = torch.randn(1, 3, 4), torch.tensor([[0.0, 2.0, 5.0]])
    q, k, _ = block.qkv(x).chunk(3, -1)
    p = sinusoids(time, block.bias.frequencies)
    score = q @ k.mT / 2 + plain_bias(p, block.bias.weight)[0]
    weight = block.weights(x, time, torch.ones(1, 3).bool())
    torch.testing.assert_close(weight[0], score.softmax(-1))


def test_timeline_fields():
    assert Timeline._fields == ("time", "mask", "value", "observed", "words")
