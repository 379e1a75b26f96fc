"""Cross-attention and the lab transformer: masks, independent questions, no position."""

import pytest
import torch

from ehrfuse.nn import lab_transformer
from ehrfuse.nn.attention import CrossBlock
from ehrfuse.nn.lab_transformer import LabDecoder, LabTransformer, Recall, similar


def some(b=3, t=5, d=8):
    torch.manual_seed(0)
    mask = torch.arange(t) < torch.tensor([5, 2, 0])[:, None]
    return torch.randn(b, 4, d), torch.randn(b, t, d), mask


def test_cross_attention_reads_what_is_there_and_questions_stand_alone():
    x, memory, mask = some()
    block = CrossBlock(8, 2, 16).eval()
    out = block(x, memory, mask)
    assert out.isfinite().all()  # the last row has no memory at all
    other = torch.where(mask[..., None], memory, 50.0)
    torch.testing.assert_close(block(x, other, mask)[:2], out[:2])
    torch.testing.assert_close(block(x[:, :1], memory, mask), out[:, :1])
    with pytest.raises(ValueError, match="multiple of n_heads"):
        CrossBlock(8, 3, 16)


@pytest.mark.parametrize("use_time", [False, True])
def test_tokens_have_no_order_and_padding_is_not_read(use_time):
    torch.manual_seed(0)
    encoder = LabTransformer(6, 8, 16, 2, 4, use_time=use_time).eval()
    code = torch.tensor([[0, 2, 5, 0]])
    x = {"code": code, "value": torch.randn(1, 4), "time": torch.rand(1, 4),
         "code_mask": torch.tensor([[True, True, True, False]])}  # fmt: skip
    tokens, mask = encoder(x)
    assert mask.tolist() == [[True, True, True, True, False]]
    order = [2, 0, 1, 3]
    turned, _ = encoder({key: part[:, order] for key, part in x.items()})
    torch.testing.assert_close(turned[:, 0], tokens[:, 0])
    torch.testing.assert_close(turned[:, 1:4], tokens[:, 1:][:, order[:3]])
    x["value"] = torch.where(x["code_mask"], x["value"], 9.0)
    torch.testing.assert_close(encoder(x)[0][:, :4], tokens[:, :4])


def test_an_empty_row_has_its_summary_token():
    encoder = LabTransformer(6, 8, 16, 1, 2).eval()
    x = {"code": torch.zeros(2, 1, dtype=torch.long), "value": torch.zeros(2, 1),
         "code_mask": torch.zeros(2, 1, dtype=torch.bool)}  # fmt: skip
    tokens, mask = encoder(x)
    assert mask.sum(1).tolist() == [1, 1]
    assert tokens.isfinite().all()
    decoder = LabDecoder(6, 8, 1, 2).eval()
    assert decoder(torch.tensor([[3, 4]] * 2), None, tokens, mask).shape == (2, 2, 2)


def test_short_rows_are_read_apart_from_long_ones_with_equal_results():
    torch.manual_seed(0)
    encoder = LabTransformer(9, 8, 16, 2, 2).double()
    n = torch.cat([torch.arange(12), torch.tensor([70, 90])])
    mask = torch.arange(90) < n[:, None]
    x = {"code": torch.randint(0, 9, mask.shape), "value": torch.randn(mask.shape).double()}
    x["code_mask"] = mask
    parts = similar(mask)
    assert sorted(torch.cat(parts).tolist()) == list(range(14))
    assert len(parts) > 1
    assert len(similar(mask[-2:])) == 1
    found, there = encoder(x)
    whole, all_there = encoder._read(x)
    assert torch.equal(there, all_there)
    torch.testing.assert_close(found[there], whole[there])


def test_recall_tells_the_mean_of_the_same_analyte_near_in_time_and_overall():
    recall = Recall()
    seen = {
        "code": torch.tensor([[1, 1, 2, 1]]),
        "standard": torch.tensor([[1.0, 3.0, 50.0, 99.0]]),
        "time": torch.tensor([[0.0, 1.0, 0.0, 0.0]]),
    }
    mask = torch.tensor([[True, True, True, False]])
    means, weights = recall(torch.tensor([[1, 0]]), torch.tensor([[0.0, 0.0]]), seen, mask)
    torch.testing.assert_close(means[0, 0, -1], torch.tensor(2.0))  # over the whole row
    torch.testing.assert_close(means[0, 0, 0], torch.tensor(1.0))  # the near one
    assert (means[0, 1] == 0).all()  # nothing of this analyte is visible
    assert (weights[0, 1] < weights[0, 0]).all()
    alone, _ = recall(torch.tensor([[1]]), None, seen, mask)
    torch.testing.assert_close(alone[0, 0], torch.full((len(recall.rate),), 2.0))


def test_recall_in_parts_is_the_same(monkeypatch):
    recall = Recall()
    seen = {"code": torch.randint(0, 4, (3, 20)), "standard": torch.randn(3, 20)}
    seen["time"] = torch.rand(3, 20)
    asked = torch.randint(0, 4, (3, 11)), torch.rand(3, 11)
    whole = recall(*asked, seen, torch.ones(3, 20, dtype=bool))
    monkeypatch.setattr(lab_transformer, "CELLS", 130)
    torch.testing.assert_close(recall(*asked, seen, torch.ones(3, 20, dtype=bool)), whole)
