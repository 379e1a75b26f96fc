"""Every cell against its equations, computed by hand with numpy on a small case."""

import numpy as np
import pytest
import torch

from ehrfuse.nn.recurrent import (
    DipoleEncoder,
    GRUDEncoder,
    HiTANetEncoder,
    LSTMEncoder,
    RETAINEncoder,
    TLSTMEncoder,
    TransformerEncoder,
    before_last,
    gaps,
    last_of,
    masked_softmax,
    reverse,
)
from ehrfuse.nn.timeline import Timeline, fill

D = 4


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def case(dtype=torch.float64):
    """Two patients of three and two visits, two numbers, no codes."""
    torch.manual_seed(0)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    time = torch.tensor([[-9.0, -4.0, -1.0], [-6.0, -5.0, 0.0]], dtype=dtype)
    observed = torch.tensor([[[1, 0], [0, 1], [1, 1]], [[0, 1], [1, 0], [0, 0]]]).bool()
    value = torch.where(observed, torch.randn(2, 3, 2, dtype=dtype), 0.0)
    line = Timeline(time, mask, value, observed, value.new_zeros(2, 3, 0))
    return torch.randn(2, 3, D, dtype=dtype), line, fill(line)


def made(kind, *args):
    torch.manual_seed(1)
    encoder = kind(*args).double().eval()
    return encoder


def weights(module):
    return {name: p.detach().numpy() for name, p in module.named_parameters()}


def linear(module, x):
    w = module.weight.detach().numpy()
    return x @ w.T + (0 if module.bias is None else module.bias.detach().numpy())


def gru(module, x):
    """torch's GRU, by its equations."""
    p = weights(module)
    h, out = np.zeros(D), []
    for step in x:
        i = p["weight_ih_l0"] @ step + p["bias_ih_l0"]
        s = p["weight_hh_l0"] @ h + p["bias_hh_l0"]
        r, z = sigmoid(i[:D] + s[:D]), sigmoid(i[D : 2 * D] + s[D : 2 * D])
        n = np.tanh(i[2 * D :] + r * s[2 * D :])
        h = (1 - z) * n + z * h
        out.append(h)
    return np.array(out)


def check(encoder, expected):
    """Both patients, the second also without its padding."""
    x, line, filled = case()
    with torch.no_grad():
        found = encoder(x, line, filled)
    for row, length in enumerate((3, 2)):
        cut = [part[row, :length].numpy() for part in (x, line.time, line.value, line.observed)]
        vector, attention = expected(*cut)
        np.testing.assert_allclose(found.vector[row].numpy(), vector, atol=1e-10)
        if attention is not None:
            np.testing.assert_allclose(found.attention[row, :length].numpy(), attention, atol=1e-10)
            assert (found.attention[row, length:] == 0).all()


def test_helpers():
    x, line, _ = case()
    torch.testing.assert_close(last_of(x, line.mask), torch.stack([x[0, 2], x[1, 1]]))
    assert (last_of(x, torch.zeros_like(line.mask)) == 0).all()
    torch.testing.assert_close(reverse(x, line.mask)[1], x[1, [1, 0, 2]])
    torch.testing.assert_close(reverse(reverse(x, line.mask), line.mask), x)
    assert gaps(line).tolist() == [[0, 5, 3], [0, 1, 0]]
    assert before_last(line).tolist() == [[8, 3, 0], [1, 0, 0]]
    weight = masked_softmax(torch.zeros(2, 3), torch.tensor([[True, True, False], [False] * 3]))
    assert weight.tolist() == [[0.5, 0.5, 0], [0, 0, 0]]


def test_lstm():
    encoder = made(LSTMEncoder, D)
    p = weights(encoder.lstm)

    def expected(x, time, value, observed):
        h = c = np.zeros(D)
        gap = np.log1p(np.diff(time, prepend=time[0]))
        for step in np.column_stack([x, gap]):
            g = p["weight_ih_l0"] @ step + p["bias_ih_l0"] + p["weight_hh_l0"] @ h + p["bias_hh_l0"]
            i, f, n, o = np.split(g, 4)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(n)
            h = sigmoid(o) * np.tanh(c)
        return h, None

    check(encoder, expected)


def test_retain():
    encoder = made(RETAINEncoder, D)

    def expected(x, time, value, observed):
        g = gru(encoder.visit_rnn, x[::-1])[::-1]
        h = gru(encoder.variable_rnn, x[::-1])[::-1]
        alpha = softmax(linear(encoder.visit, g)[:, 0])
        beta = np.tanh(linear(encoder.variable, h))
        return (alpha[:, None] * beta * x).sum(0), alpha

    check(encoder, expected)


def test_tlstm():
    encoder = made(TLSTMEncoder, D)
    cell = encoder.cell

    def expected(x, time, value, observed):
        h = c = np.zeros(D)
        for step, gap in zip(x, np.diff(time, prepend=time[0]), strict=True):
            short = np.tanh(linear(cell.short, c))
            c = c - short + short / np.log(np.e + gap)
            i, f, o, g = np.split(linear(cell.inputs, step) + linear(cell.state, h), 4)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
        return np.maximum(0, linear(encoder.hidden, h)), None

    check(encoder, expected)


def test_tlstm_without_gaps_is_an_lstm():
    """At gap 0 the decay is 1 and the decomposition gives the memory back."""
    cell = made(TLSTMEncoder, D).cell
    x, h, c = (torch.randn(1, n, dtype=torch.float64) for n in (4 * D, D, D))
    found = cell(x, torch.zeros(1, dtype=torch.float64), h, c)[1]
    i, f, _, g = (x + cell.state(h)).chunk(4, 1)
    torch.testing.assert_close(found, f.sigmoid() * c + i.sigmoid() * g.tanh())


@pytest.mark.parametrize("score", ["location", "general", "concat"])
def test_dipole(score):
    encoder = made(DipoleEncoder, D, score)

    def expected(x, time, value, observed):
        h = np.hstack([gru(encoder.forth, x), gru(encoder.back, x[::-1])[::-1]])
        last, earlier = h[-1], h[:-1]
        if score == "location":
            e = linear(encoder.location, earlier)[:, 0]
        elif score == "general":
            e = np.array([last @ encoder.general.weight.detach().numpy() @ s for s in earlier])
        else:
            both = np.hstack([np.tile(last, (len(earlier), 1)), earlier])
            e = linear(encoder.direction, np.tanh(linear(encoder.joint, both)))[:, 0]
        alpha = softmax(e)
        vector = np.tanh(linear(encoder.out, np.append(alpha @ earlier, last)))
        return vector, np.append(alpha, 0.0)

    check(encoder, expected)


def test_hitanet():
    encoder = made(HiTANetEncoder, D, 2)
    encoder.span.fill_(10.0)

    def feature(part, gap):
        return linear(part.outside, 1 - np.tanh(linear(part.inside, gap[:, None]) ** 2))

    def expected(x, time, value, observed):
        gap = (time[-1] - time) / 10
        angle = np.arange(len(x))[:, None] * encoder.frequencies.numpy()
        place = np.hstack([np.sin(angle), np.cos(angle)])
        mask = torch.ones(1, len(x)).bool()
        v = torch.from_numpy(x + feature(encoder.when, gap) + place)[None]
        h = encoder.block(v, mask)[0].detach().numpy()
        local = softmax(linear(encoder.local, h)[:, 0])
        query = np.maximum(0, linear(encoder.query, h[-1]))
        key = np.maximum(0, feature(encoder.key, gap))
        overall = softmax(key @ query / 8)  # the square root of 64
        share = softmax(linear(encoder.mixture, h[-1]))
        weight = share[0] * overall + share[1] * local
        weight = weight / weight.sum()
        return weight @ h, weight

    check(encoder, expected)


def test_grud():
    encoder = made(GRUDEncoder, 2, 0, D)
    encoder.mean.copy_(torch.tensor([0.3, -0.2]))
    with torch.no_grad():
        encoder.shift_input.copy_(torch.tensor([0.05, -0.1]))

    def expected(x, time, value, observed):
        mean, h = np.array([0.3, -0.2]), np.zeros(D)
        last, delta = mean.copy(), np.zeros(2)
        for t, (step, m) in enumerate(zip(value, observed.astype(float), strict=True)):
            if t:  # the recursion of the paper
                delta = time[t] - time[t - 1] + delta * (1 - observed[t - 1])
            w, b = (p.detach().numpy() for p in (encoder.fade_input, encoder.shift_input))
            gamma = np.exp(-np.maximum(0, w * delta + b))
            filled = m * step + (1 - m) * (gamma * last + (1 - gamma) * mean)
            h = np.exp(-np.maximum(0, linear(encoder.fade_state, delta))) * h
            r, z, n = np.split(linear(encoder.inputs, filled) + linear(encoder.masks, m), 3)
            u = linear(encoder.gates, h)
            z, r = sigmoid(z + u[:D]), sigmoid(r + u[D:])
            n = np.tanh(n + linear(encoder.candidate, r * h))
            h = (1 - z) * h + z * n
            last = np.where(m > 0, step, last)
        return h, None

    check(encoder, expected)


def test_transformer_pads_and_attends():
    encoder = made(TransformerEncoder, D, 2)
    x, line, filled = case()
    found = encoder(x, line, filled)
    cut = Timeline(*(part[1:, :2] for part in line))
    alone = encoder(x[1:, :2], cut, fill(cut))
    torch.testing.assert_close(found.vector[1:], alone.vector)
    assert (found.attention[1, 2:] == 0).all()
    assert (found.attention.sum(1) < 1).all()  # the token also attends to itself


@pytest.mark.parametrize(
    "encoder",
    [LSTMEncoder(D), RETAINEncoder(D), TLSTMEncoder(D), DipoleEncoder(D), HiTANetEncoder(D, 2),
     TransformerEncoder(D, 2), GRUDEncoder(2, 0, D)],
    ids=lambda e: type(e).__name__,
)  # fmt: skip
def test_no_visits_and_gradients(encoder):
    x, line, filled = case(torch.float32)
    empty = line._replace(mask=torch.zeros_like(line.mask))
    out = encoder(x.requires_grad_(), empty, fill(empty)).vector
    assert out.isfinite().all()
    torch.testing.assert_close(out[0], out[1])
    (encoder(x, line, filled).vector ** 2).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())
