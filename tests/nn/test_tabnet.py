"""TabNet: the same numbers as pytorch-tabnet in float64, its checkpoints, and what it lacks."""

import contextlib
import io
import json
import warnings
import zipfile

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ehrfuse.nn import tabnet as ours
from ehrfuse.nn.numeric import NumericFeatures
from ehrfuse.nn.tabnet_checkpoint import TabNet, load_tabnet, save_tabnet
from ehrfuse.nn.tabnet_tables import TabNetTableEncoder


@pytest.fixture(scope="module")
def library():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pytorch_tabnet import metrics, sparsemax, tab_model, tab_network, utils
        from pytorch_tabnet.pretraining import TabNetPretrainer
    from types import SimpleNamespace

    return SimpleNamespace(
        metrics=metrics, sparsemax=sparsemax, model=tab_model, network=tab_network, utils=utils,
        pretrainer=TabNetPretrainer,
    )  # fmt: skip


CASES = {
    "plain": {},
    "entmax": {"mask_type": "entmax"},
    "no shared layer": {"n_shared": 0},
    "no layer of its own": {"n_independent": 0, "n_steps": 2},
    "wide, other steps": {"n_d": 6, "n_a": 3, "n_steps": 4, "gamma": 1.7, "momentum": 0.3},
    "groups": {"grouped_features": [[0, 3], [2, 5, 6]]},
    "categories": {"cat_idxs": [1, 4], "cat_dims": [5, 7], "cat_emb_dim": [2, 3]},
    "both": {"cat_idxs": [1, 4], "cat_dims": [5, 7], "cat_emb_dim": [2, 3],
             "grouped_features": [[0, 4], [2, 5]]},
    "two tasks": {"output_dim": [2, 3]},
    "pretraining": {"output_dim": None},
    "pretraining with categories": {"output_dim": None, "cat_idxs": [1], "cat_dims": [5],
                                    "cat_emb_dim": [2], "grouped_features": [[0, 3]]},
}  # fmt: skip


def pair(library, seed=0, virtual_batch_size=16, **options):
    """The library's network and ours with its weights, both float64."""
    options = {"n_d": 4, "n_a": 5, "output_dim": 2, "grouped_features": []} | options
    grouped, output_dim = options.pop("grouped_features"), options.pop("output_dim")
    groups = library.utils.create_group_matrix(grouped, 8)
    kind = library.network.TabNetPretraining if output_dim is None else library.network.TabNet
    outputs = {} if output_dim is None else {"output_dim": output_dim}
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(seed)
        theirs = kind(
            8, group_attention_matrix=groups, virtual_batch_size=virtual_batch_size, **outputs,
            **options,
        ).double()  # fmt: skip
        for norm in (m for m in theirs.modules() if isinstance(m, torch.nn.BatchNorm1d)):
            torch.nn.init.normal_(norm.weight, 1.0, 0.3)
            torch.nn.init.normal_(norm.bias, 0.0, 0.3)
    _groups_to_double(theirs)
    sizes = {k: v for k, v in options.items() if k in ours.Sizes._fields}
    mine = TabNet(
        8, output_dim, grouped_features=grouped,
        sizes=ours.Sizes(virtual_batch_size=virtual_batch_size, **sizes),
        **{k: v for k, v in options.items() if k not in sizes},
    ).double()  # fmt: skip
    copy_weights(theirs, mine)
    return theirs, mine


def _groups_to_double(theirs):
    """What the library keeps as plain tensors does not follow `double`."""
    for module in theirs.modules():
        if isinstance(getattr(module, "group_attention_matrix", None), torch.Tensor):
            module.group_attention_matrix = module.group_attention_matrix.double()


def names_of(mine):
    from ehrfuse.nn import tabnet_checkpoint

    return dict(tabnet_checkpoint._names(mine))


def copy_weights(theirs, mine):
    state = theirs.state_dict()
    names = names_of(mine)
    mine.load_state_dict({name: state[known[0]] for name, known in names.items()})
    assert {name for known in names.values() for name in known} == set(state)


def rows(n, seed=1, categories=True):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 8)) * 3 + 1
    x[:, 1], x[:, 4] = (rng.integers(5, size=n), rng.integers(7, size=n)) if categories else (0, 0)
    return torch.from_numpy(x).float().double()  # beside categories the library rounds to float32


def loss_of(out, entropy, y):
    parts = out if isinstance(out, list) else [out]
    return sum(F.cross_entropy(part, y) for part in parts) - 1e-2 * entropy


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
@pytest.mark.parametrize("n_rows", [64, 53])
def test_equals_pytorch_tabnet(library, options, n_rows):
    theirs, mine = pair(library, **options)
    x, y = rows(n_rows), torch.arange(n_rows) % 2
    if options.get("output_dim", 2) is None:
        a, truth, hidden, b = obfuscated(library, theirs, mine, x)
        losses = [library.metrics.UnsupervisedLoss(a, truth, hidden.double()),
                  ours.reconstruction_loss(b, mine.features(x), hidden)]  # fmt: skip
    else:
        (a, m1), (b, m2) = theirs(x), mine(x)
        losses = [loss_of(a, m1, y), loss_of(b, m2, y)]
    for one, other in zip(*([v] if torch.is_tensor(v) else v for v in (a, b)), strict=True):
        torch.testing.assert_close(other, one, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(losses[1], losses[0], atol=1e-10, rtol=1e-10)
    for loss in losses:
        loss.backward()
    gradients = dict(theirs.named_parameters())
    statistics = theirs.state_dict()
    for name, known in names_of(mine).items():
        first = next((k for k in known if k in gradients), None)
        if first is not None:
            torch.testing.assert_close(
                mine.get_parameter(name).grad, gradients[first].grad, atol=1e-10, rtol=1e-9
            )
        else:
            torch.testing.assert_close(
                mine.state_dict()[name], statistics[known[0]], atol=1e-10, rtol=1e-10
            )
    theirs.eval(), mine.eval()
    a, b = theirs(x)[0], mine(x)[0]
    for one, other in zip(*([v] if torch.is_tensor(v) else v for v in (a, b)), strict=True):
        torch.testing.assert_close(other, one, atol=1e-10, rtol=1e-10)


def obfuscated(library, theirs, mine, x):
    """Both pretraining networks under the library's own mask."""
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(3)
        a, truth, hidden = theirs(x)
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(3)
        share = torch.full((len(x), theirs.masker.num_groups), theirs.pretraining_ratio)
        groups = torch.bernoulli(share)
    features = mine.features(x)
    torch.testing.assert_close(groups @ theirs.masker.group_matrix, hidden)
    outputs, _ = mine.encoder(features * (1 - hidden), 1 - groups.double())
    return a, truth, hidden, mine.decoder(outputs)


@pytest.mark.parametrize("options", [CASES["plain"], CASES["groups"]], ids=["plain", "groups"])
def test_importance_equals_pytorch_tabnet(library, options):
    theirs, mine = pair(library, **options)
    theirs.eval(), mine.eval()
    x = rows(20)
    with pytest.MonkeyPatch.context() as patch:  # its constants are float32 whatever x is
        for name in ("ones", "zeros"):
            plain = getattr(torch, name)
            patch.setattr(torch, name, lambda *a, f=plain, **k: f(*a, **k).double())
        total, steps = theirs.forward_masks(x)
    mine_total, mine_steps = mine.encoder.masks(mine.features(x))
    groups = mine.encoder.groups
    spread = (
        mine_total
        if groups is None
        else groups.widen(mine_total.t(), torch.ones(8, 20).double()).t()
    )
    torch.testing.assert_close(spread, total, atol=1e-10, rtol=1e-10)
    first = (
        mine_steps[0]
        if groups is None
        else groups.widen(mine_steps[0].t(), torch.ones(8, 20).double()).t()
    )
    torch.testing.assert_close(first, steps[0], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("n_groups", [1, 7, 105, 700])
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_masks_equal_the_reference_projections(library, n_groups, scale):
    z = torch.from_numpy(np.random.default_rng(0).normal(size=(n_groups, 40)) * scale)
    for mine, theirs in (
        (ours.sparsemax, library.sparsemax.sparsemax), (ours.entmax15, library.sparsemax.entmax15)
    ):  # fmt: skip
        a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
        p, q = mine(a), theirs(b.t() * 1, -1).t()
        torch.testing.assert_close(p, q, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(p.sum(0), torch.ones(40).double())
        assert (p >= 0).all()
        weight = torch.linspace(-1, 1, z.numel()).view_as(z).double()
        (p * weight).sum().backward(), (q * weight).sum().backward()
        torch.testing.assert_close(a.grad, b.grad, atol=1e-10, rtol=1e-10)


def test_gradients_of_the_masks_and_of_a_step():
    z = torch.from_numpy(np.random.default_rng(1).normal(size=(6, 3))).requires_grad_()
    assert torch.autograd.gradcheck(ours.sparsemax, z)
    assert torch.autograd.gradcheck(ours.entmax15, z)
    group = torch.tensor([0, 1, 1, 2])
    x = torch.from_numpy(np.random.default_rng(2).normal(size=(4, 3))).requires_grad_()
    prior = torch.rand(3, 3).double().requires_grad_()
    score = torch.from_numpy(np.random.default_rng(3).normal(size=(3, 3))).requires_grad_()
    for kind in ("sparsemax", "entmax"):
        sizes = ours.Sizes(mask_type=kind, epsilon=1e-12)
        for groups in (ours.Groups(group), None):
            wide = x if groups is not None else x[:3].detach().requires_grad_()
            torch.autograd.gradcheck(
                lambda s, p, w, g=groups, n=sizes: ours._Attend.apply(s, p, w, g, n, True),
                (score, prior, wide),
            )


def test_a_feature_used_up_has_prior_zero():
    """With gamma 1, what one step attended to in full has logit 0 at the next, not -inf."""
    score = torch.tensor([[9.0], [0.0], [0.0]])
    _, prior, _ = ours._Attend.apply(
        score, None, torch.ones(3, 1), None, ours.Sizes(gamma=1.0), True
    )
    torch.testing.assert_close(prior, torch.tensor([[0.0], [1.0], [1.0]]))


def test_reconstruction_counts_hidden_cells_alone():
    torch.manual_seed(0)
    truth = torch.randn(4000, 5)
    hidden = torch.rand(4000, 5) < 0.5
    mean = truth.mean(0).expand_as(truth)
    assert abs(float(ours.reconstruction_loss(mean, truth, hidden)) - 1) < 0.05
    spoiled = torch.where(hidden, mean, torch.full_like(mean, 1e6))
    torch.testing.assert_close(
        ours.reconstruction_loss(spoiled, truth, hidden),
        ours.reconstruction_loss(mean, truth, hidden),
    )
    assert float(ours.reconstruction_loss(mean, truth, torch.zeros_like(hidden))) == 0


def test_a_constant_column_has_no_unit_of_rounding_errors():
    """The mean of 256 times 0.3 is not 0.3 in float32; its square must not divide an error."""
    truth = torch.full((256, 1), 0.3)
    assert float((truth - truth.sum(0) / 256).abs().max()) < 1e-5
    loss = ours.reconstruction_loss(truth + 0.1, truth, torch.ones(256, 1))
    assert float(loss) == pytest.approx(0.01 / 0.3, rel=1e-3)
    odd = torch.full((253, 40), 0.1) * torch.arange(1, 41)
    assert float(ours.reconstruction_loss(odd + 0.1, odd, torch.ones(253, 40))) < 1


@pytest.mark.parametrize("n_rows", [1, 2, 17, 33, 49])
def test_no_virtual_batch_of_one_row(n_rows):
    norm = ours.GhostNorm(3, 16, 0.1)
    out = norm(torch.randn(3, n_rows))
    assert out.isfinite().all()
    assert norm.running_var.isfinite().all()
    assert 1 not in ours._chunks(max(2, n_rows), -(-n_rows // 16))


def test_buffers_follow_and_global_stream_is_left_alone():
    network = TabNet(8, 2, grouped_features=[[0, 1]], cat_idxs=[2], cat_dims=[3], cat_emb_dim=2)
    moved = network.to("meta")
    assert {t.device.type for t in (*moved.parameters(), *moved.buffers())} == {"meta"}
    before = torch.get_rng_state()
    TabNet(8, 2).eval()(torch.zeros(2, 8))
    assert not torch.equal(before, torch.get_rng_state())  # drawn from, never reseeded
    assert torch.initial_seed() == torch.initial_seed()


def test_missing_numbers_reach_no_gradient():
    numbers = NumericFeatures(torch.zeros(3, 2), torch.tensor([1]))
    encoder = TabNetTableEncoder(numbers, [4], ours.Sizes(n_d=4, n_a=4))
    values = torch.tensor([[0.1, torch.nan, 2.0], [1.0, 0.0, torch.nan]] * 4)
    x = {"values": values, "codes": torch.tensor([[0], [3]] * 4)}
    token, mask = encoder(x)
    token.sum().backward()
    assert token.isfinite().all()
    assert mask.all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in encoder.parameters())
    features = encoder.features(x)
    assert features[0, 1] == 0
    assert features[0, 3] == 1  # its flag
    known = encoder.known(x)
    np.testing.assert_array_equal(known[0, :3], [1, 0, 1])  # the flag tells nothing of a value
    assert not known[0, 3:].any()
    assert known[1, 3:].all()
    np.testing.assert_array_equal(encoder.told(features)[:, :3].detach(), features[:, :3].detach())
    np.testing.assert_array_equal(encoder.told(features)[:, 3:].detach(), features[:, 4:].detach())


def test_hidden_columns_are_gone_with_all_their_features():
    numbers = NumericFeatures(torch.tensor([[0.0, 1.0, 2.0], [0, 0, 0]]), torch.tensor([0]))
    encoder = TabNetTableEncoder(numbers, [5], ours.Sizes(n_d=4, n_a=4))
    x = {"values": torch.rand(50, 2) + 0.5, "codes": torch.randint(2, 5, (50, 1))}
    features = encoder.features(x)
    hidden, prior, gone = encoder.hide(features, 0.5)
    assert prior.shape == (50, 3)
    torch.testing.assert_close(gone, 1 - encoder.told(prior[:, encoder.embedder.column]))
    for feature, column in enumerate(encoder.embedder.column):
        torch.testing.assert_close(hidden[:, feature], features[:, feature] * prior[:, column])
    assert 0.3 < gone.float().mean() < 0.7


# ---------------------------------------------------------------- checkpoints


def fitted(library, kind, tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(120, 6)).astype("float32")
    x[:, 2] = rng.integers(4, size=120)
    options = {"n_d": 4, "n_a": 4, "n_steps": 2, "verbose": 0, "cat_idxs": [2], "cat_dims": [4],
               "cat_emb_dim": 2, "grouped_features": [[0, 1]]}  # fmt: skip
    with warnings.catch_warnings(), torch.random.fork_rng([]):
        warnings.simplefilter("ignore")
        model = kind(**options)
        y = (x[:, 0] > 0).astype(int)
        targets = () if kind is library.pretrainer else (y if kind is library.model.TabNetClassifier
                                                         else x[:, :1],)  # fmt: skip
        model.fit(x, *targets, max_epochs=2, batch_size=32, virtual_batch_size=16)
        with contextlib.redirect_stdout(io.StringIO()):
            path = model.save_model(str(tmp_path / "model"))
    return model, x, path


@pytest.mark.parametrize("name", ["classifier", "regressor", "pretrainer"])
def test_checkpoints_both_ways(library, name, tmp_path):
    kind = {"classifier": library.model.TabNetClassifier, "pretrainer": library.pretrainer,
            "regressor": library.model.TabNetRegressor}[name]  # fmt: skip
    model, x, path = fitted(library, kind, tmp_path)
    network, saved = load_tabnet(path)
    with torch.no_grad():
        out = network(torch.from_numpy(x))[0]
        expected = model.network(torch.from_numpy(x))[0]
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    save_tabnet(network, saved, tmp_path / "back.zip")
    with warnings.catch_warnings(), torch.random.fork_rng([]):
        warnings.simplefilter("ignore")
        twin = kind(verbose=0)
        twin.load_model(str(tmp_path / "back.zip"))
    with torch.no_grad():
        torch.testing.assert_close(twin.network(torch.from_numpy(x))[0], expected)
    if name == "classifier":
        np.testing.assert_array_equal(twin.predict(x), model.predict(x))


def test_a_hostile_checkpoint_runs_nothing(tmp_path):
    import pickle

    class Bad:
        def __reduce__(self):
            return (open, (str(tmp_path / "touched"), "w"))

    path = tmp_path / "bad.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("model_params.json", json.dumps({"init_params": {"input_dim": 1}}))
        file.writestr("network.pt", pickle.dumps(Bad(), protocol=2))
    with pytest.raises(pickle.UnpicklingError):
        load_tabnet(path)
    assert not (tmp_path / "touched").exists()
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("other", "")
    with pytest.raises(ValueError, match="no model of pytorch-tabnet"):
        load_tabnet(path)
