"""Masked lab-test modelling: the lab branch of MEDFuse (Phan et al.; arXiv:2407.12309, CIKM 2024).

Some of the measured values of a row are hidden, a transformer reads the others, and a decoder
guesses the hidden ones. What it learns serves as an embedding, as initial weights of a classifier,
and to fill values that nobody measured. The base is ReMasker (Du et al., ICLR 2024); masks that
copy other rows' holes are those of CACTI (Gorla et al., ICML 2025), masks in proportion to a
column's observed rate those of PMAE (Kim et al., AAAI 2025).

Axes: b - batch, t - measured values of a row, v - visible, h - hidden ones, q - questions,
c - analytes, m - modalities, d - d_model.
"""

import math
import warnings
from dataclasses import dataclass, replace
from numbers import Integral, Real

import numpy as np
import pandas as pd
import torch
from sklearn.utils import check_random_state, check_scalar
from sklearn.utils.validation import check_is_fitted
from torch import nn
from torch.nn import functional as F

from ehrfuse._runtime import check_option
from ehrfuse.base import TorchEncoder
from ehrfuse.modalities import Events, Labs
from ehrfuse.modalities._lab_tokens import lab_tokens
from ehrfuse.nn.core import Core
from ehrfuse.nn.fusion import Absence, masked_mean
from ehrfuse.nn.lab_transformer import LabDecoder, pack

__all__ = ["MaskedLabPretrainer"]

MASKINGS = ("uniform", "proportional", "copy")
SPREAD_WEIGHT = 0.1
DELTA = 3.0  # standard deviations from which on an error counts linearly
SCORED = 0.25  # share of values hidden where nothing is learned: validation rows, `score`


# ---------------------------------------------------------------- which values to hide


def hide(key, maskable, share):
    """Hide of every row the values with the highest keys, at least one stays visible.

    Shape: key, maskable (b, t), share (b,) or a number -> bool (b, t). Of n values that may be
    hidden, ceil((1 - share) n) stay.
    """
    n = maskable.sum(1)
    n_hidden = n - torch.ceil((1 - share) * n - 1e-6).clamp(min=1).long()
    rank = key.masked_fill(~maskable, -torch.inf).argsort(1, descending=True).argsort(1)
    return (rank < n_hidden.clamp(min=0)[:, None]) & maskable


def copied(code, mask, maskable, n_codes):
    """Hide what another row of the batch, drawn at random, does not have: bool (b, t)."""
    had = torch.zeros(len(code), n_codes, device=code.device)
    had.scatter_add_(1, code.long(), mask.to(had.dtype))
    other = had[torch.randperm(len(code), device=code.device)] > 0
    return maskable & ~other.gather(1, code.long())


# ---------------------------------------------------------------- the network


@dataclass(frozen=True)
class Part:
    """What `Core.encode` reads of a batch; here with the visible values only."""

    inputs: dict
    present: dict


def seen_of(part, name):
    """The visible values of a modality and the mask of those that rows have."""
    x = part.inputs[name]
    return x, x["code_mask"] & ~x["value"].isnan() & part.present[name][:, None]


class MaskedLabCore(Core):
    """Encoders of measured values, and a decoder per modality that reads the tokens of all.

    NOTE[DIFF] ReMasker decodes all positions by self-attention; here a question reads the visible
    tokens only, so that the cost is that of the hidden values.
    NOTE[DIFF] It has one value projection and a sine position for all columns.
    NOTE[DIFF] It keeps a fixed number of values a row, missing ones among them.
    NOTE[DIFF] It scales by the range of the training rows and squashes the output into it.
    """

    def __init__(self, modalities, p):
        encoders = {name: m.make_encoder(p.d_model) for name, m in modalities.items()}
        # As wide as the heads of the encoder.
        n_heads = math.gcd(max(1, p.n_heads * p.d_model // p.width), p.d_model)
        decoders = {
            name: LabDecoder(m.n_codes, p.d_model, p.decoder_layers, n_heads, p.use_time, m.repeats)
            for name, m in modalities.items()
        }
        heads = nn.ModuleDict(
            {"decoders": nn.ModuleDict(decoders), "absence": Absence(len(encoders), p.d_model)}
        )
        super().__init__(encoders, None, heads)
        self.n_codes = {name: m.n_codes for name, m in modalities.items()}
        self.masking, self.mask_ratio = p.masking, p.mask_ratio
        self.visible_weight, self.empty_share = p.visible_weight, p.empty_share
        self.n_outputs = 2 * p.d_model * len(encoders)
        for name, m in modalities.items():
            rate = torch.as_tensor(m.rate_, dtype=torch.float32)
            self.register_buffer(f"rate_{name}", rate, persistent=False)

    def forward(self, batch):
        """Embedding (b, m * 2 d): of a modality its summary token and the mean of the others."""
        encoded = self.encode(batch)
        parts = []
        for m, (x, mask) in enumerate(zip(encoded.tokens, encoded.masks, strict=True)):
            both = torch.stack([x[:, 0], masked_mean(x[:, 1:], mask[:, 1:])], 1)
            nothing = self.heads["absence"].vector[m].expand_as(both)
            parts.append(torch.where(encoded.present[:, m, None, None], both, nothing).flatten(1))
        return torch.cat(parts, 1)

    def remember(self, part):
        """All tokens of a row side by side, and their mask; an absent modality has one."""
        encoded = self.encode(part)
        memory, masks = [], []
        for m, (x, mask) in enumerate(zip(encoded.tokens, encoded.masks, strict=True)):
            nothing = self.heads["absence"].vector[m].to(x.dtype).expand(len(x), 1, -1)
            first = torch.where(encoded.present[:, m, None, None], x[:, :1], nothing)
            memory.append(torch.cat([first, x[:, 1:]], 1))
            masks.append(F.pad(mask[:, 1:], (1, 0), value=True))
        return torch.cat(memory, 1), torch.cat(masks, 1)

    def answer(self, name, code, time, memory, mask, seen):
        """Guess (b, q) and log of its likely error (b, q), in standard deviations.

        NOTE[DIFF] In a stream, a question is told the visible values of its own analyte.
        """
        return self.heads["decoders"][name](code, time, memory, mask, seen).unbind(-1)

    def losses(self, batch):
        """Error of the hidden values, of the likely error, and of the visible values."""
        shown, asked = Part({}, dict(batch.present)), {}
        for name in self.encoders:
            self._split(name, batch.inputs[name], shown, asked)
        memory, mask = self.remember(shown)
        terms = [
            self._errors(name, *parts, memory, mask, seen_of(shown, name))
            for name, parts in asked.items()
        ]
        weights = {"reconstruction": 1.0, "spread": SPREAD_WEIGHT, "visible": self.visible_weight}
        return {
            name: weight * torch.stack([term[name] for term in terms if name in term]).mean()
            for name, weight in weights.items()
            if any(name in term for term in terms)
        }

    def monitor(self, terms):
        """The guesses of hidden values alone."""
        return terms["reconstruction"]

    def _split(self, name, x, shown, asked):
        """Put the visible values of a modality into `shown`, and what to guess into `asked`."""
        mask = x["code_mask"]
        maskable = mask & ~x["value"].isnan()
        hidden = self._choose(name, x["code"], mask, maskable)
        here = shown.present[name]
        if self.training and self.empty_share:
            emptied = torch.rand(len(here), device=here.device) < self.empty_share
            hidden = torch.where(emptied[:, None], maskable, hidden)
            shown.present[name] = here & ~emptied
        keys = [key for key in ("code", "value", "standard", "time") if key in x]
        parts = {key: x[key].long() if key == "code" else x[key] for key in keys}
        found, mask = pack(mask & ~hidden, **parts)
        shown.inputs[name] = found | {"code_mask": mask}
        asked[name] = pack(hidden, **parts), (found, mask & ~found["value"].isnan())

    def _choose(self, name, code, mask, maskable):
        """Which values to hide: bool (b, t)."""
        noise = torch.rand(code.shape, device=code.device)
        if not self.training:
            # NOTE[DIFF] Always the same task, or `score` could not compare ways of masking. One
            # value at least, or rows of two or three would count for nothing.
            return hide(noise, maskable, (1 / maskable.sum(1).clamp(min=1)).clamp(min=SCORED))
        if self.masking == "proportional":  # Gumbel noise: the highest keys are drawn by rate
            rate = self.get_buffer(f"rate_{name}")
            noise = rate[code.long()].log() - torch.log(-torch.log(noise.clamp(1e-9, 1 - 1e-7)))
        hidden = hide(noise, maskable, self.mask_ratio)
        if self.masking == "copy":
            other = copied(code, mask, maskable, self.n_codes[name])
            useful = other.any(1) & (maskable & ~other).any(1)
            hidden = torch.where(useful[:, None], other, hidden)
        return hidden

    def _errors(self, name, hidden, visible, memory, mask, seen):
        """Errors of one modality: of hidden values, of their likely errors, of visible ones."""
        sets = {"reconstruction": hidden}
        told = self.heads["decoders"][name].recall is not None  # of itself, if it is visible
        if self.training and self.visible_weight and not told:
            sets["visible"] = visible
        parts = [part for part, _ in sets.values()]
        code, truth = (torch.cat([p[key] for p in parts], 1) for key in ("code", "standard"))
        time = torch.cat([p["time"] for p in parts], 1) if "time" in parts[0] else None
        guess, spread = self.answer(name, code, time, memory, mask, seen)
        widths = [part["code"].shape[1] for part in parts]
        errors, start = {}, 0
        for (key, (_, known)), width in zip(sets.items(), widths, strict=True):
            here = slice(start, start + width)
            start += width
            error = torch.where(known, guess[:, here] - truth[:, here], 0.0)
            n = known.sum().clamp(min=1)
            size = F.huber_loss(error, torch.zeros_like(error), reduction="sum", delta=DELTA)
            errors[key] = size / n
            if key == "reconstruction":  # of a Laplace distribution, whose scale it is
                scale = torch.where(known, spread[:, here], 0.0)
                errors["spread"] = (error.detach().abs() * torch.exp(-scale) + scale).sum() / n
        return errors


class Answers(nn.Module):
    """What a `MaskedLabCore` guesses for the questions of a batch: (b, m * q, 2)."""

    def __init__(self, core):
        super().__init__()
        self.core = core

    def forward(self, batch):
        """Guesses and the logs of their likely errors."""
        memory, mask = self.core.remember(batch)
        found = []
        for name in self.core.encoders:
            x = batch.inputs[name]
            seen = seen_of(batch, name)
            guess = self.core.answer(name, x["ask_code"], x.get("ask_time"), memory, mask, seen)
            found.append(torch.stack(guess, -1))
        return torch.cat(found, 1)


# ---------------------------------------------------------------- the estimator


class MaskedLabPretrainer(TorchEncoder):
    """Pretraining on lab values by guessing hidden ones; needs no labels, fills what is missing.

    Works on `Labs` (one value per analyte) and on `Events` (a stream of coded values with their
    times), which needs no pivot. With several modalities the guesses of one read the values of all.

    Parameters
    ----------
    modalities : dict of str to Modality, or None, default=None
        `Labs` and `Events`; others are left out. None takes all columns as `Labs`, or as
        ``pretrained=`` of a classifier inherits the classifier's. Of the parameters of a modality
        those of the summary table have no effect here.
    d_model : int, default=32
        Width of the tokens handed on; the embedding is twice as wide.
    width, n_layers, n_heads : int, default=64, 3 and 4
        Of the transformer over the visible values.
    decoder_layers : int, default=1
        Of the decoder that guesses the hidden ones.
    mask_ratio : float, default=0.75
        Share of the measured values of a row that training hides; at least one stays visible.
    masking : {"uniform", "proportional", "copy"}, default="uniform"
        Which: any; those of analytes that are measured often, in proportion to their rate; or
        those which another row, drawn at random, does not have (where that hides nothing or all,
        uniform).
    visible_weight : float, default=0.1
        Weight of the error on the visible values; `Labs` only.
    empty_share : float, default=0.02
        Share of the rows that training shows as if nothing had been measured, so that such rows get
        a learned vector and guesses of their own.
    use_time : bool, default=False
        Tell the time since every value of `Events` was drawn. The cells of `Labs` have none.
    dropout : float, default=0.0
    max_epochs : int, default=20
        The learning rate falls along a cosine to zero over these epochs.
    batch_size : int or "auto", default=64
        "auto" is a twelfth of the training rows, at least 16 and at most 256.
    weight_decay : float, default=0.05
    pretrained, freeze, lr, patience, validation_fraction, groups, memory, checkpoint : optional
        See `ehrfuse.base.TorchEstimator`.
    amp, random_state, device, verbose : optional
        See `ehrfuse.base.TorchEstimator`.

    Attributes
    ----------
    modalities_ : dict of fitted Modality
        Each wrapped in one whose encoder is the transformer. A classifier that takes this estimator
        as ``pretrained=`` reads them instead of its own.
    module_ : torch module
    history_ : list of dict
        One entry per epoch.

    See Also
    --------
    MEDFuseClassifier : Fuses the lab branch with notes.

    Notes
    -----
    Differences from the papers and their code (marked ``NOTE[DIFF]`` where they stand):

    * a missing value is no token at all, so nothing missing is ever shown or scored; ReMasker keeps
      a fixed number of values a row and shows missing ones as zeros;
    * every analyte has vectors of its own and no position, so columns have no order;
    * the decoder answers single questions by cross-attention; answers do not depend on what else
      is asked, nor on the batch;
    * values enter as normal scores (their quantiles among the training rows) and leave in standard
      deviations, unbounded; ReMasker squashes both into the range of the training rows;
    * validation rows and `score` hide a quarter at random, at least one value of two, whatever
      `masking` says, so that candidates of a grid search are compared on the same task;
    * in a stream, a question is told the visible values of its own analyte, near in time and
      overall, and visible values are not asked for;
    * MEDFuse names no sizes, no scaling and no embedding; those here are ours.

    References
    ----------
    Phan et al.: MEDFuse: multimodal EHR data fusion with masked lab-test modeling and large
    language models. CIKM 2024; arXiv:2407.12309.
    Du, Melis, Wang: ReMasker: imputing tabular data with masked autoencoding. ICLR 2024;
    arXiv:2309.13793.
    Gorla et al.: CACTI, ICML 2025; arXiv:2506.02306. Kim et al.: PMAE, AAAI 2025; arXiv:2412.19152.

    Examples
    --------
    >>> import numpy as np
    >>> import pandas as pd
    >>> from ehrfuse import Labs, MaskedLabPretrainer
    >>> rng = np.random.default_rng(0)
    >>> bun = rng.normal(20, 5, 80)
    >>> X = pd.DataFrame({"bun": bun, "creatinine": 0.05 * bun})
    >>> X.loc[::4, "creatinine"] = np.nan
    >>> encoder = MaskedLabPretrainer({"labs": Labs(["bun", "creatinine"])}, width=16,
    ...                               max_epochs=2, random_state=0).fit(X)
    >>> encoder.transform(X).shape
    (80, 64)
    >>> int(encoder.impute(X).isna().sum().sum())
    0
    """

    _accepts = (Labs, Events)

    def __init__(
        self,
        modalities=None,
        *,
        d_model=32,
        width=64,
        n_layers=3,
        n_heads=4,
        decoder_layers=1,
        mask_ratio=0.75,
        masking="uniform",
        visible_weight=0.1,
        empty_share=0.02,
        use_time=False,
        dropout=0.0,
        pretrained=None,
        freeze=(),
        max_epochs=20,
        batch_size=64,
        lr=2e-3,
        weight_decay=0.05,
        patience=None,
        validation_fraction=None,
        groups=None,
        memory=None,
        checkpoint=None,
        amp=False,
        random_state=None,
        device=None,
        verbose=None,
    ):
        super().__init__(
            modalities, pretrained=pretrained, freeze=freeze, max_epochs=max_epochs,
            batch_size=batch_size, lr=lr, weight_decay=weight_decay, patience=patience,
            validation_fraction=validation_fraction, groups=groups, memory=memory,
            checkpoint=checkpoint, amp=amp, random_state=random_state, device=device,
            verbose=verbose,
        )  # fmt: skip
        self.d_model = d_model
        self.width = width
        self.n_layers = n_layers
        self.n_heads = n_heads
        self.decoder_layers = decoder_layers
        self.mask_ratio = mask_ratio
        self.masking = masking
        self.visible_weight = visible_weight
        self.empty_share = empty_share
        self.use_time = use_time
        self.dropout = dropout

    def _check_params(self):
        super()._check_params()
        check_option(self.masking, "masking", MASKINGS)
        for name in ("d_model", "width", "n_layers", "n_heads", "decoder_layers"):
            check_scalar(getattr(self, name), name, Integral, min_val=1)
        check_scalar(
            self.mask_ratio, "mask_ratio", Real,
            min_val=0, max_val=1, include_boundaries="neither",
        )  # fmt: skip
        for name in ("empty_share", "dropout"):
            check_scalar(
                getattr(self, name), name, Real, min_val=0, max_val=1, include_boundaries="left"
            )
        check_scalar(self.visible_weight, "visible_weight", Real, min_val=0)

    def _declared(self, X):
        declared = super()._declared(X)
        if self.modalities is None:
            return {"table": Labs(declared["table"].columns)}
        return declared

    def _fit_modalities(self, X, declared):
        sizes = self.width, self.n_layers, self.n_heads, self.dropout, self.use_time
        super()._fit_modalities(X, {name: lab_tokens(m, *sizes) for name, m in declared.items()})

    def _make_core(self, modalities, target):
        return MaskedLabCore(modalities, self)

    def impute(self, X, *, n_imputations=1, return_std=False):
        """Fill null values of the modalities; what was measured stays as it is.

        Null cells of `Labs` and null values of `Events` records are filled. A null cell of `Events`
        stays null: nobody knows what was drawn and when.

        Parameters
        ----------
        X : DataFrame of shape (n_samples, n_columns), or array if `modalities` is None
        n_imputations : int, default=1
            More than one repeats the guess with a quarter of the measured values hidden at random,
            another quarter each time, and averages. The order of the rows then matters a little.
        return_std : bool, default=False
            Return the likely error of every guess as well.

        Returns
        -------
        filled : DataFrame
            With the columns of X; records of `Events` in time order.
        std : DataFrame
            Columns of the modalities: the standard deviation of a filled value (that of the values
            around the guess, and that of the repeated guesses around their mean), 0 where it was
            measured. Only if `return_std`.
        """
        check_is_fitted(self)
        check_scalar(n_imputations, "n_imputations", Integral, min_val=1)
        frame = self._frame(X, reset=False)
        cells = {name: m._cells(frame) for name, m in self.modalities_.items()}
        holes = {name: m.holes(cells[name]) for name, m in self.modalities_.items()}
        self._warn_of_unseen(cells)
        guess, std = self._repeat(self._data(frame), holes, n_imputations)
        filled = X.copy() if hasattr(X, "columns") else frame.copy()
        spread = pd.DataFrame(index=frame.index)
        for name, m in self.modalities_.items():
            row, code, _ = holes[name]
            value = m.restore(code, guess[name])
            for column, whole in m.fill(cells[name], row, code, value).items():
                filled[column] = whole
            error = std[name] * m.values_.unit(code)
            for column, whole in m.fill(cells[name], row, code, error, measured=0.0).items():
                spread[column] = whole
        return (filled, spread) if return_std else filled

    def _warn_of_unseen(self, cells):
        lost = [c for name, m in self.modalities_.items() for c in m.never_seen(cells[name])]
        if lost:
            warnings.warn(
                f"No training row had a value of {lost}; their null cells stay null.",
                UserWarning,
                stacklevel=3,
            )

    def _repeat(self, data, holes, n_imputations):
        """Mean guess and standard deviation of every hole by modality."""
        if n_imputations == 1:
            return self._guess(data, holes)
        rng = np.random.default_rng(check_random_state(self.random_state).randint(2**31 - 1))
        found = []
        for _ in range(n_imputations):
            thinned = {name: _thin(block, rng) for name, block in data.blocks.items()}
            found.append(self._guess(replace(data, blocks=thinned), holes))
        guesses = {name: np.stack([guess[name] for guess, _ in found]) for name in holes}
        within = {name: np.mean([std[name] ** 2 for _, std in found], axis=0) for name in holes}
        return (
            {name: guess.mean(0) for name, guess in guesses.items()},
            {name: np.sqrt(within[name] + guess.var(0)) for name, guess in guesses.items()},
        )

    def _guess(self, data, holes):
        """Guess of every hole and its standard deviation, by modality, in standard deviations."""
        asks = {name: _questions(len(data), *found) for name, found in holes.items()}
        blocks = {
            name: replace(block, arrays=block.arrays | asks[name][0])
            for name, block in data.blocks.items()
        }
        found = self._infer(Answers(self.module_), replace(data, blocks=blocks))
        guess, std, start = {}, {}, 0
        for name, (arrays, place) in asks.items():
            mine = found[holes[name][0], start + place]
            # Of a Laplace distribution whose scale is the likely (absolute) error.
            guess[name], std[name] = mine[:, 0], np.sqrt(2) * np.exp(mine[:, 1])
            start += arrays["ask_code"].shape[1]
        return guess, std


def _questions(n_rows, row, code, time):
    """Holes, by row, as padded arrays (n, q), and the place of every hole within its row."""
    counts = np.bincount(row, minlength=n_rows)
    place = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    shape = n_rows, max(1, counts.max(initial=0))
    codes, times = np.zeros(shape, "int64"), np.zeros(shape, "float32")
    codes[row, place], times[row, place] = code, time
    return {"ask_code": codes, "ask_time": times}, place


def _thin(block, rng):
    """A block without a quarter of its values, drawn at random."""
    offsets = block.ragged["code"][1]
    keep = (rng.random(offsets[-1]) >= SCORED) | np.isnan(block.ragged["value"][0])
    kept = np.concatenate([[0], np.cumsum(keep)])[offsets].astype("int64")
    return replace(block, ragged={k: (flat[keep], kept) for k, (flat, _) in block.ragged.items()})
