"""Models of pytorch-tabnet: the whole network of its zip files, read and written without it.

Axes: b - batch, p - columns, f - features, k - outputs.
"""

import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ehrfuse.nn.tabnet import (
    FeatureTransformer,
    GhostNorm,
    Sizes,
    TabNetDecoder,
    TabNetEncoder,
    plain_linear,
)
from ehrfuse.nn.tabnet_tables import TabNetInput

SIZES = set(Sizes._fields) - {"virtual_batch_size"}  # which the library does not store


class TabNet(nn.Module):
    """The networks of pytorch-tabnet, with the arguments of their constructors.

    Shape: (b, p) -> outputs (b, k), or one such tensor a task, and the mean of sum m log m; without
    `output_dim` the reconstruction (b, f) and the features (b, f).

    Parameters
    ----------
    input_dim : int
    output_dim : int, list of int or None
        None: a pretraining network, whose decoder stands in place of the outputs.
    cat_idxs, cat_dims : list of int
        Categorical columns and how many values each has.
    cat_emb_dim : int or list of int, default=1
    grouped_features : list of list of int
        Columns attended to together.
    n_shared_decoder, n_indep_decoder : int, default=1
    sizes : Sizes
    """

    order: Tensor
    numbers: Tensor

    def __init__(
        self,
        input_dim: int,
        output_dim: int | list[int] | None,
        *,
        cat_idxs: list[int] | None = None,
        cat_dims: list[int] | None = None,
        cat_emb_dim: int | list[int] = 1,
        grouped_features: list[list[int]] | None = None,
        n_shared_decoder: int = 1,
        n_indep_decoder: int = 1,
        sizes: Sizes | None = None,
    ) -> None:
        super().__init__()
        sizes = self.sizes = Sizes() if sizes is None else sizes
        self.cat_idxs, dims = list(cat_idxs or []), list(cat_dims or [])
        widths = [cat_emb_dim] * len(dims) if isinstance(cat_emb_dim, int) else list(cat_emb_dim)
        self.output_dim, self.input_dim = output_dim, input_dim
        words = set(self.cat_idxs)
        numbers = [j for j in range(input_dim) if j not in words]
        self.embedder = TabNetInput(len(numbers), dims, widths[: len(dims)])
        # The library leaves every feature at the place of its column.
        column = torch.tensor([*numbers, *self.cat_idxs])[self.embedder.column]
        order = torch.argsort(column, stable=True)
        self.register_buffer("numbers", torch.tensor(numbers, dtype=torch.long), persistent=False)
        self.register_buffer("order", order, persistent=False)
        group = _groups(grouped_features or [], input_dim)
        # Equal shares for the columns of a group, then for the features of a column.
        share = 1.0 / group.bincount()[group]
        share = (share / column.bincount(minlength=input_dim).clamp(min=1))[column[order]]
        self.encoder = TabNetEncoder(len(order), group[column[order]], sizes, share)
        self.decoder, self.heads = None, nn.ModuleList()
        if output_dim is None:
            self.decoder = TabNetDecoder(len(order), sizes, n_shared_decoder, n_indep_decoder)
        else:
            outputs = [output_dim] if isinstance(output_dim, int) else output_dim
            self.heads.extend(plain_linear(sizes.n_d, k) for k in outputs)

    def features(self, x: Tensor) -> Tensor:
        """The columns (b, p) with their categories embedded (b, f)."""
        codes = x[:, self.cat_idxs].long() if self.cat_idxs else None
        return self.embedder(x[:, self.numbers], codes)[:, self.order]

    def forward(self, x: Tensor) -> tuple[Any, Tensor]:
        x = self.features(x)
        outputs, entropy = self.encoder(x)
        if self.decoder is not None:
            return self.decoder(outputs), x
        row = torch.stack(outputs).sum(0)
        out = [head(row) for head in self.heads]
        return (out[0] if isinstance(self.output_dim, int) else out), entropy


def _groups(grouped: list[list[int]], input_dim: int) -> Tensor:
    """Group of every column: first those listed, then the others one by one."""
    group = torch.full((input_dim,), -1, dtype=torch.long)
    for number, columns in enumerate(grouped):
        group[columns] = number
    alone = group < 0
    group[alone] = len(grouped) + torch.arange(int(alone.sum()))
    return group


def load_tabnet(path: str | Path) -> tuple[TabNet, dict[str, Any]]:
    """Read a zip file that pytorch-tabnet's ``save_model`` wrote; weights only, no code is run.

    Parameters
    ----------
    path : path

    Returns
    -------
    network : TabNet
        In eval mode, on the CPU.
    saved : dict
        The library's ``init_params`` and ``class_attrs``, the classes of a classifier among them.
    """
    try:
        with zipfile.ZipFile(path) as file:
            saved = json.loads(file.read("model_params.json"))
            weights = torch.load(
                io.BytesIO(file.read("network.pt")), map_location="cpu", weights_only=True
            )
    except (KeyError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{str(path)!r} is no model of pytorch-tabnet ({error}); give the .zip file that its "
            "save_model wrote."
        ) from error
    params = saved["init_params"]
    network = TabNet(
        params["input_dim"],
        None if any(name.startswith("decoder.") for name in weights) else params["output_dim"],
        **{name: params[name] for name in _ARGUMENTS if name in params},
        sizes=Sizes(**{name: params[name] for name in SIZES if name in params}),
    )
    names = dict(_names(network))
    network.load_state_dict({ours: weights[theirs[0]] for ours, theirs in names.items()})
    return network.eval(), saved


_ARGUMENTS = (
    "cat_idxs", "cat_dims", "cat_emb_dim", "grouped_features", "n_shared_decoder",
    "n_indep_decoder",
)  # fmt: skip


def save_tabnet(network: TabNet, saved: dict[str, Any], path: str | Path) -> None:
    """Write a zip file that pytorch-tabnet's ``load_model`` reads.

    Parameters
    ----------
    network : TabNet
    saved : dict
        ``init_params`` and ``class_attrs`` as `load_tabnet` gives them.
    path : path
        Ends in ``.zip``.
    """
    state = network.state_dict()
    weights: dict[str, Tensor] = {}
    for ours, theirs in _names(network):
        weights |= {name: state[ours].cpu() for name in theirs}
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("model_params.json", json.dumps(saved))
        file.writestr("network.pt", buffer.getvalue())


Names = Iterator[tuple[str, list[str]]]


def _names(network: TabNet) -> Names:
    """Every tensor of ours with its names in the library; shared weights have many there."""
    for i in range(len(network.embedder.embeddings)):
        yield f"embedder.embeddings.{i}.weight", [f"embedder.embeddings.{i}.weight"]
    inside = "encoder" if network.decoder is not None else "tabnet.encoder"
    for name, names in _norm_names("encoder.norm", f"{inside}.initial_bn"):
        # The library has a second one that nothing reads.
        yield name, names + [n.replace(".encoder.", ".") for n in names if ".encoder." in n]
    encoder = network.encoder
    parts = [("encoder.splitter", f"{inside}.initial_splitter", encoder.splitter)]
    for i, step in enumerate(encoder.steps):
        parts.append((f"encoder.steps.{i}.transformer", f"{inside}.feat_transformers.{i}",
                      step.transformer))  # type: ignore[arg-type]  # fmt: skip
        there = f"{inside}.att_transformers.{i}"
        yield f"encoder.steps.{i}.score.weight", [f"{there}.fc.weight"]
        yield from _norm_names(f"encoder.steps.{i}.norm", f"{there}.bn.bn")
    yield from _transformer_names(parts, "encoder.shared", len(encoder.shared))
    if network.decoder is not None:
        decoder = network.decoder
        parts = [
            (f"decoder.steps.{i}", f"decoder.feat_transformers.{i}", step)  # type: ignore[misc]
            for i, step in enumerate(decoder.steps)
        ]
        yield from _transformer_names(parts, "decoder.shared", len(decoder.shared))
        yield "decoder.out.weight", ["decoder.reconstruction_layer.weight"]
    else:
        single = isinstance(network.output_dim, int)
        yield from (
            (f"heads.{i}.weight", ["tabnet.final_mapping.weight" if single else
                                   f"tabnet.multi_task_mappings.{i}.weight"])
            for i in range(len(network.heads))
        )  # fmt: skip


def _transformer_names(
    parts: list[tuple[str, str, FeatureTransformer]], shared: str, n_shared: int
) -> Names:
    for i in range(n_shared):
        there = [f"{theirs}.shared" for _, theirs, _ in parts]
        names = [f"{name}.shared_layers.{i}.weight" for name in there]
        yield f"{shared}.{i}.weight", names + [f"{name}.glu_layers.{i}.fc.weight" for name in there]
    for ours, theirs, part in parts:
        for i in range(len(part.norms)):
            block, place = ("shared", i) if i < n_shared else ("specifics", i - n_shared)
            layer = f"{theirs}.{block}.glu_layers.{place}"
            yield from _norm_names(f"{ours}.norms.{i}", f"{layer}.bn.bn")
            if i >= n_shared:
                yield f"{ours}.independent.{place}.weight", [f"{layer}.fc.weight"]


def _norm_names(ours: str, theirs: str) -> Names:
    for name in GhostNorm(1, None, 0.1).state_dict():
        yield f"{ours}.{name}", [f"{theirs}.{name}"]
