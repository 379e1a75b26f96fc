"""Objectives against their closed forms."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ehrfuse.nn.losses import (
    clip_loss,
    focal_bce,
    info_nce,
    masked_mse,
    siglip_loss,
    weighted_loss,
)


def test_weighted_loss_ignores_what_weighs_nothing():
    term = torch.tensor([1.0, torch.nan, 3.0], requires_grad=True)
    mean = weighted_loss(term, torch.tensor([1.0, 0.0, 3.0]))
    mean.backward()
    assert mean.item() == pytest.approx((1 + 9) / 2)
    assert term.grad.isfinite().all()
    assert weighted_loss(torch.ones(3), torch.zeros(3)).item() == 0


def test_a_heavy_row_counts_more_than_a_light_one_in_a_batch_of_its_own():
    term = torch.tensor([2.0])
    heavy, light = (weighted_loss(term, torch.tensor([w])).item() for w in (1.5, 0.5))
    assert heavy == pytest.approx(3 * light)


def test_masked_mse():
    guess, truth = torch.tensor([[1.0, 9.0]]), torch.tensor([[3.0, torch.nan]])
    mask = torch.tensor([[True, False]])
    assert masked_mse(guess, truth, mask).item() == 4
    assert masked_mse(guess, truth, torch.zeros_like(mask)).item() == 0


def test_info_nce_closed_forms():
    n, temperature = 5, 0.1
    eye = torch.eye(n)
    best = math.log(1 + (n - 1) * math.exp(-1 / temperature))
    assert info_nce(eye, eye, temperature).item() == pytest.approx(best, abs=1e-6)
    same = torch.ones(n, 3)
    assert info_nce(same, same).item() == pytest.approx(math.log(n), rel=1e-5)


def test_info_nce_is_symmetric_and_blind_to_length_and_order():
    torch.manual_seed(0)
    a, b = torch.randn(6, 4), torch.randn(6, 4)
    order = torch.randperm(6)
    loss = info_nce(a, b)
    for other in (info_nce(b, a), info_nce(3 * a, b), info_nce(a[order], b[order])):
        torch.testing.assert_close(other, loss)
    scores = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T / 0.1
    own = torch.arange(6)
    torch.testing.assert_close(
        loss, (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2
    )
    both = info_nce(torch.stack([a, b]), torch.stack([b, a]))
    torch.testing.assert_close(both, loss)


def test_info_nce_without_a_negative_is_zero():
    a = torch.randn(1, 4, requires_grad=True)
    loss = info_nce(a, a)
    loss.backward()
    assert loss.item() == 0
    assert (a.grad == 0).all()


def test_focal_is_cross_entropy_at_gamma_zero_and_less_where_sure():
    logits, y = torch.tensor([3.0, -2.0, 0.0]), torch.tensor([1.0, 0.0, 1.0])
    plain = F.binary_cross_entropy_with_logits(logits, y, reduction="none")
    torch.testing.assert_close(focal_bce(logits, y, 0.0), plain)
    p = torch.exp(-plain)
    torch.testing.assert_close(focal_bce(logits, y, 2.0), plain * (1 - p) ** 2)


def plain_clip(a, b, scale, groups, same_group):
    """The whole matrix of logits, as in the paper."""
    logits = scale * a @ b.t()
    same, own = groups[:, None] == groups, torch.eye(len(a), dtype=torch.bool)
    if same_group == "ignore":
        logits, same = logits.masked_fill(same & ~own, -torch.inf), own
    target = same.double() / same.sum(1, keepdim=True)
    right = (torch.where(same, logits, 0.0) * target).sum(1)
    return ((logits.logsumexp(1) - right).mean() + (logits.logsumexp(0) - right).mean()) / 2


@pytest.mark.parametrize("scale", [5.0, 70.0])
@pytest.mark.parametrize("same_group", ["positive", "ignore"])
@pytest.mark.parametrize("size", [1, 3])
def test_clip_loss_in_pieces_is_the_whole(scale, same_group, size):
    results = []
    for loss in (plain_clip, lambda *args: clip_loss(*args, chunk=7)):
        torch.manual_seed(0)
        a, b = (torch.randn(40, 6).double().requires_grad_() for _ in range(2))
        s = torch.tensor(scale).double().requires_grad_()
        value = loss(F.normalize(a, dim=1), F.normalize(b, dim=1), s,
                     torch.arange(40) // size, same_group)  # fmt: skip
        value.backward()
        results.append((value.detach(), a.grad, b.grad, s.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-10)


def test_clip_loss_closed_forms():
    unit = torch.eye(8)
    assert float(clip_loss(unit, unit, torch.tensor(100.0))) == pytest.approx(0, abs=1e-6)
    equal = torch.ones(8, 4) / 2
    assert float(clip_loss(equal, equal, torch.tensor(14.0))) == pytest.approx(np.log(8), abs=1e-5)
    a, b = (F.normalize(torch.randn(9, 4), dim=1) for _ in range(2))
    t = torch.tensor(9.0)
    torch.testing.assert_close(clip_loss(a, b, t), clip_loss(b, a, t))
    two = F.normalize(torch.tensor([[1.0, 0.0], [0.6, 0.8]]), dim=1)
    # By hand: logits [[1, .6], [.6, 1]], so every row and column is log(1 + exp(-.4)).
    expected = np.log1p(np.exp(-0.4))
    assert float(clip_loss(two, two, torch.tensor(1.0))) == pytest.approx(expected, abs=1e-6)
    assert float(clip_loss(unit[:1], unit[:1], torch.tensor(1.0))) == 0


def test_siglip_loss():
    a, b = (F.normalize(torch.randn(5, 3), dim=1) for _ in range(2))
    t, bias = torch.tensor(3.0), torch.tensor(-2.0)
    sign = 2 * torch.eye(5) - 1
    expected = -F.logsigmoid(sign * (t * a @ b.t() + bias)).sum() / 5
    torch.testing.assert_close(siglip_loss(a, b, t, bias), expected)
    together = torch.zeros(5, dtype=torch.long)
    alone = siglip_loss(a, b, t, bias, together, "ignore")
    torch.testing.assert_close(alone, -F.logsigmoid(t * (a * b).sum(1) + bias).mean())


@pytest.mark.parametrize("scale", [10.0, 60.0])
@pytest.mark.parametrize("kept", [0, 4 * 8 * 20, 10**6])
def test_clip_loss_is_the_same_whatever_is_kept(monkeypatch, kept, scale):
    """Logits kept for the gradient, some of them or none; and a second pass through the graph."""
    from ehrfuse.nn import losses

    monkeypatch.setattr(losses, "KEPT_BYTES", kept)
    torch.manual_seed(0)
    a, b = (F.normalize(torch.randn(20, 6).double(), dim=1).requires_grad_() for _ in range(2))
    top, own = torch.tensor(scale).double().requires_grad_(), torch.arange(20)
    logits = top * a @ b.t()
    plain = (F.cross_entropy(logits, own) + F.cross_entropy(logits.t(), own)) / 2
    wanted = torch.autograd.grad(plain, (a, b, top))
    loss = losses.clip_loss(a, b, top, chunk=4)
    torch.testing.assert_close(loss, plain)
    for _ in range(2):
        found = torch.autograd.grad(loss, (a, b, top), retain_graph=True)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other)
