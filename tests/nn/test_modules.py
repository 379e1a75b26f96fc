"""Building blocks: masks, members, numbers with holes."""

import numpy as np
import pytest
import torch
from torch import nn

from ehrfuse.nn.attention import TransformerBlock
from ehrfuse.nn.encoders import EventEncoder, LabsEncoder, TableEncoder, VisitEncoder
from ehrfuse.nn.fusion import Absence, AttentionPool, blank, masked_mean
from ehrfuse.nn.members import MemberLinear, MemberScale
from ehrfuse.nn.numeric import NumericFeatures, smooth_clip

torch.manual_seed(0)


def test_blank_stops_nan_and_its_gradient():
    x = torch.tensor([[torch.nan], [2.0]], requires_grad=True)
    y = blank(x, torch.tensor([False, True])).sum()
    y.backward()
    assert y.item() == 2
    assert x.grad.tolist() == [[0.0], [1.0]]


def test_masked_mean_of_nothing_is_zero():
    x = torch.tensor([[[1.0], [3.0], [torch.nan]]])
    assert masked_mean(x, torch.tensor([[True, True, False]])).item() == 2
    assert masked_mean(x, torch.zeros(1, 3, dtype=torch.bool)).item() == 0


def test_attention_pool_is_a_weighted_mean_of_real_tokens():
    pool = AttentionPool(4)
    x, mask = torch.randn(2, 5, 4), torch.tensor([[1, 1, 0, 0, 0], [0] * 5], dtype=torch.bool)
    out = pool(x, mask)
    changed = x.clone()
    changed[~mask] = torch.nan
    torch.testing.assert_close(pool(changed, mask), out)
    assert (out[1] == 0).all()
    low, high = x[0, :2].amin(0), x[0, :2].amax(0)
    assert ((out[0] >= low - 1e-6) & (out[0] <= high + 1e-6)).all()


def test_absence_replaces_only_what_is_absent():
    absence = Absence(2, 3)
    pooled, present = torch.randn(4, 2, 3), torch.tensor([[True, False]] * 4)
    out = absence(pooled, present)
    torch.testing.assert_close(out[:, 0], pooled[:, 0])
    torch.testing.assert_close(out[:, 1], absence.vector[1].expand(4, -1))


def test_transformer_block_reads_real_tokens_only():
    block = TransformerBlock(8, 2, 16).eval()
    x, mask = torch.randn(3, 4, 8), torch.tensor([[1, 1, 0, 0]] * 2 + [[0] * 4], dtype=torch.bool)
    out = block(x, mask)
    changed = x.clone()
    changed[:, 2:] = 1e3
    torch.testing.assert_close(block(changed, mask)[:2, :2], out[:2, :2])
    assert out.isfinite().all()
    with pytest.raises(ValueError, match="d_model=8 cannot be split into n_heads=3"):
        TransformerBlock(8, 3, 16)


def test_members_do_not_see_each_other():
    linear = MemberLinear(3, 4, 2, bias=torch.tensor([5.0, -5.0]))
    x = torch.randn(6, 4)
    out = linear(x)
    for row in range(6):
        expected = x[row] @ linear.weight[row % 3] + linear.bias[row % 3]
        torch.testing.assert_close(out[row], expected)
    assert linear.bias.tolist() == [[5.0, -5.0]] * 3


def test_member_scale_repeats_rows_with_signs():
    scale = MemberScale(2, 3)
    x = torch.randn(4, 5, 3)
    out = scale(x)
    assert out.shape == (8, 5, 3)
    torch.testing.assert_close(out[2], x[1] * scale.scale[0])
    torch.testing.assert_close(out[3], x[1] * scale.scale[1])
    assert set(scale.scale.abs().flatten().tolist()) == {1.0}


def test_smooth_clip_is_near_identity_at_zero_and_bounded():
    x = torch.tensor([0.0, 0.1, 1e6, -1e6])
    out = smooth_clip(x)
    torch.testing.assert_close(out[:2], x[:2], rtol=1e-3, atol=0)
    assert out[2].item() == pytest.approx(3.0)
    assert out[3].item() == pytest.approx(-3.0)


def test_piecewise_linear_bins_sum_to_the_position():
    edges = torch.tensor([[0.0, 1.0, 3.0], [0.0, 0.0, 2.0]])
    features = NumericFeatures(edges, torch.tensor([0]))
    assert features.column.tolist() == [0, 1, 0, 0, 1, 0]
    x = torch.tensor([[2.0, 1.0], [torch.nan, 5.0], [-4.0, torch.nan]])
    out = features(x)
    np.testing.assert_allclose(out[:, 2:5], [[1, 0.5, 0.5], [0, 0, 1], [0, 0, 0]])
    assert out[:, 5].tolist() == [0.0, 1.0, 0.0]  # the missing flag of column 0
    features.learn_center(x)
    np.testing.assert_allclose(features(x).mean(0), 0, atol=1e-6)


def make_table(n_members=3):
    numbers = NumericFeatures(torch.tensor([[-1.0, 0.0, 1.0]] * 2), torch.tensor([1]))
    return TableEncoder(numbers, [4], 8, n_members)


def test_table_encoder_hides_whole_columns_in_training_only():
    table = make_table()
    x = {"values": torch.tensor([[0.5, -0.5]] * 200), "codes": torch.full((200, 1), 3)}
    features = table.train().features(x)
    shown = features != 0
    assert torch.equal(shown[:, 0], shown[:, 2])  # value and first bin of column 0 go together
    hidden = 1 - shown[:, 0].float().mean().item()
    assert 0.25 < hidden < 0.55
    features = table.eval().features(x)
    assert (features == features[0]).all()
    tokens, mask = table(x)
    assert tokens.shape == (600, 1, 8)
    assert mask.all()


def test_unknown_category_starts_silent():
    table = make_table().eval()
    assert (table.tables[0].weight[1] == 0).all()


def test_labs_tokens_are_per_analyte():
    numbers = NumericFeatures(
        torch.tensor([[-1.0, 0.0, 1.0]] * 3), torch.tensor([], dtype=torch.long)
    )
    labs = LabsEncoder(numbers, 3, 8)
    x = torch.tensor([[0.1, torch.nan, 0.7]])
    tokens, mask = labs({"values": x})
    assert mask.tolist() == [[True, False, True]]
    moved, _ = labs({"values": torch.tensor([[0.1, torch.nan, -0.9]])})
    torch.testing.assert_close(moved[:, 0], tokens[:, 0])
    assert not torch.allclose(moved[:, 2], tokens[:, 2])


def test_event_encoder_ignores_padding_and_order_of_padding():
    encoder = EventEncoder(5, 8, None, True).eval()
    x = {
        "code": torch.tensor([[1, 2, 0]]), "value": torch.tensor([[0.3, torch.nan, 9.0]]),
        "time": torch.tensor([[0.5, 0.1, 0.0]]), "code_mask": torch.tensor([[True, True, False]]),
    }  # fmt: skip
    tokens, mask = encoder(x)
    short = {key: value[:, :2] for key, value in x.items()}
    torch.testing.assert_close(encoder(short)[0], tokens)
    swapped = {key: value[:, [1, 0]] for key, value in short.items()}
    torch.testing.assert_close(encoder(swapped)[0], tokens)
    assert mask.tolist() == [[True]]


def test_visit_encoder_gives_an_empty_history_one_token():
    encoder = VisitEncoder(2, 4, 8)
    x = {
        "time": torch.zeros(2, 3), "time_mask": torch.tensor([[True, True, False], [False] * 3]),
        "numbers": torch.full((2, 3, 2), torch.nan),
        "code": torch.tensor([[0, 3], [0, 0]]), "code_visit": torch.tensor([[1, 1], [0, 0]]),
        "code_mask": torch.tensor([[True, True], [False, False]]),
    }  # fmt: skip
    tokens, mask = encoder(x)
    assert mask.tolist() == [[True, True, False], [True, False, False]]
    torch.testing.assert_close(tokens[1, 0], encoder.nothing)
    more = x | {"code": torch.tensor([[0, 2], [0, 0]])}
    changed = encoder(more)[0]
    torch.testing.assert_close(changed[0, 0], tokens[0, 0])  # codes belong to the second visit
    assert not torch.allclose(changed[0, 1], tokens[0, 1])


def test_modules_have_no_parameter_without_a_gradient():
    for module in (TransformerBlock(8, 2, 16), make_table(1)):
        assert isinstance(module, nn.Module)
        assert all(p.requires_grad for p in module.parameters())
