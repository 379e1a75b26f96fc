"""Write a draft of a note from the structured record, by a frozen language model with a prefix.

What Ketabi and Ramachandram (arXiv:2505.17643) leave open: text from the aligned record. A small
network turns the record's place in the joint space into vectors that stand before the first word,
as ClipCap does for images (Mokady et al., arXiv:2111.09734). The language model stays as it is.

Axes: b - batch, j - joint space, k - prefix vectors, t - tokens of a note, v - width of a token.
"""

from numbers import Integral, Real

import numpy as np
import pandas as pd
import torch
from sklearn.base import BaseEstimator, clone
from sklearn.utils import check_random_state, check_scalar
from sklearn.utils.validation import check_is_fitted
from torch import nn
from torch.nn import functional as F

from ehrfuse import _hub, _hub_causal
from ehrfuse._data import Block, Data
from ehrfuse._patterns import modality_columns
from ehrfuse._progress import ProgressMixin, with_progress
from ehrfuse._runtime import resolve_device, seeded
from ehrfuse._train import evaluate, train
from ehrfuse.methods.clip_ehr import ClipEHRAligner
from ehrfuse.modalities import Text
from ehrfuse.modalities._base import describe
from ehrfuse.nn.core import Core

__all__ = ["NoteGenerator"]

LONG = 1 << 20  # tokens; more than any model reads
HIDDEN = 128  # NOTE[DIFF] ClipCap: half of the prefix's numbers, millions of weights for a cohort


class PrefixCore(Core):
    """Records (b, j) to prefixes (b, k, v); the loss of the language model on what follows.

    The language model is no part of the module: it is neither trained, moved nor stored.
    """

    supervised = ()  # there are no labels

    def __init__(self, model, start, width, n_prefix):
        super().__init__({})
        embed = model.get_input_embeddings()
        n_words, self.size = embed.weight.shape
        place = embed.weight.device
        self.outside = (model, embed(torch.tensor(start, dtype=torch.long, device=place)))
        # In the unit of the model's own words, or one rate would not suit all models.
        self.unit = float(embed(torch.arange(min(n_words, 1000), device=place)).std())
        self.heads = nn.Sequential(
            nn.Linear(width, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, n_prefix * self.size)
        )
        self.register_buffer("center", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))

    def forward(self, batch):
        """What stands before a note: the tokenizer's own start and the prefix."""
        x = (batch.inputs["record"]["x"] - self.center) / self.scale
        prefix = self.unit * self.heads(x).unflatten(1, (-1, self.size))
        start = self.outside[1]
        return torch.cat([start.expand(len(x), *start.shape), prefix], 1)

    def losses(self, batch):
        """Mean over notes, of the mean over their tokens."""
        model = self.outside[0]
        ids, here = batch.inputs["note"]["ids"], batch.inputs["note"]["ids_mask"]
        prefix = self(batch)
        before = torch.ones(prefix.shape[:2], dtype=torch.bool, device=here.device)
        logits = model(
            inputs_embeds=torch.cat([prefix, model.get_input_embeddings()(ids)], 1),
            attention_mask=torch.cat([before, here], 1).long(),
            logits_to_keep=ids.shape[1] + 1, use_cache=False,
        ).logits  # fmt: skip
        each = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids, reduction="none")
        return {"token": ((each * here).sum(1) / here.sum(1).clamp(min=1)).mean()}


class NoteGenerator(ProgressMixin, BaseEstimator):
    """Write a draft of the note that a record would have.

    `fit` reads records and notes; `generate` needs no note. What it writes is **no medical fact**:
    a language model fills in what usually stands in such notes, true of this patient or not.

    Parameters
    ----------
    aligner : ClipEHRAligner, or FrozenEstimator of a fitted one
        Gives the record's place. It is fitted here on the same training rows, unless it is frozen;
        a frozen one must not have seen the rows that the texts are judged on.
    model : str
        A causal language model: a folder, or a name of the Hugging Face hub. Its weights are never
        changed or stored; the fitted generator finds it again by its content.
    note : str or None, default=None
        Column of the text to write. None is that of the aligner's first `Text`.
    n_prefix : int, default=10
        Vectors that stand for the record.
    max_note_tokens : int, default=256
        Tokens of a note that are learned, from its start.
    max_new_tokens : int, default=256
        Tokens that are written at most.
    max_epochs : int, default=20
    batch_size : int, default=16
    lr : float, default=2e-3
    weight_decay : float, default=0.01
    random_state : int, RandomState or None, default=None
        Also of an aligner that leaves it open.
    device : str, torch.device or None, default=None
        None is the best available: cuda, mps, cpu.
    verbose : bool or None, default=None
        As in `ehrfuse.base.TorchEstimator`.

    Attributes
    ----------
    aligner_ : fitted aligner
    weights_ : dict of arrays
        Of the map from a record to its prefix, with the scale of the training rows.
    note_ : str
        Column that was learned.
    n_rows_ : int
        Training rows that have both a record and a note.
    history_ : list of dict
        One entry per epoch.

    See Also
    --------
    ClipEHRAligner.retrieve : Notes that somebody wrote, of the nearest other patients.
    ehrfuse.evaluation.text_scores : BLEU, chrF and ROUGE of what is written.

    Notes
    -----
    Differences from ClipCap (marked ``NOTE[DIFF]`` where they stand):

    * the hidden layer has 128 units, because cohorts are smaller than collections of images;
    * the language model is always frozen.

    No note is kept in the fitted generator. A language model can repeat what it was trained on, and
    the prefix was trained on notes: texts are to be protected like the notes themselves.

    References
    ----------
    Mokady, Hertz, Bermano: ClipCap: CLIP prefix for image captioning. arXiv:2111.09734.

    Examples
    --------
    >>> from ehrfuse import ClipEHRAligner, NoteGenerator, Tabular, Text
    >>> modalities = {"vitals": Tabular(["age", "heart_rate"]), "note": Text("note")}
    >>> generator = NoteGenerator(ClipEHRAligner(modalities), "gpt2", random_state=0)
    >>> generator.fit(X).generate(X_new)  # doctest: +SKIP
    """

    def __init__(
        self,
        aligner,
        model,
        *,
        note=None,
        n_prefix=10,
        max_note_tokens=256,
        max_new_tokens=256,
        max_epochs=20,
        batch_size=16,
        lr=2e-3,
        weight_decay=0.01,
        random_state=None,
        device=None,
        verbose=None,
    ):
        self.aligner = aligner
        self.model = model
        self.note = note
        self.n_prefix = n_prefix
        self.max_note_tokens = max_note_tokens
        self.max_new_tokens = max_new_tokens
        self.max_epochs = max_epochs
        self.batch_size = batch_size
        self.lr = lr
        self.weight_decay = weight_decay
        self.random_state = random_state
        self.device = device
        self.verbose = verbose

    def _check_params(self):
        for name in ("n_prefix", "max_note_tokens", "max_new_tokens", "max_epochs", "batch_size"):
            check_scalar(getattr(self, name), name, Integral, min_val=1)
        check_scalar(self.lr, "lr", Real, min_val=0, include_boundaries="neither")
        check_scalar(self.weight_decay, "weight_decay", Real, min_val=0)
        check_scalar(self.model, "model", str)
        if not isinstance(getattr(self.aligner, "estimator", self.aligner), ClipEHRAligner):
            raise ValueError(
                f"aligner is {type(self.aligner).__name__}; it must be a ClipEHRAligner, or a "
                "FrozenEstimator around a fitted one."
            )

    # ------------------------------------------------------------ fit

    @with_progress
    def fit(self, X, y=None):
        """Fit the aligner, then the prefix, to training rows.

        Parameters
        ----------
        X : DataFrame of shape (n_samples, n_columns)
            Rows without a note, or without a record, teach the prefix nothing.
        y : ignored

        Returns
        -------
        self : NoteGenerator

        Raises
        ------
        ValueError
            If no row has both, or the model cannot be loaded or has no room for the tokens.
        """
        self._check_params()
        info = _hub.inspect_model(self.model)
        self.fingerprint_, self.commit_ = info.fingerprint, info.revision
        self._check_room(info, max(self.max_note_tokens, self.max_new_tokens))
        self.note_ = self._note_column(X)
        _refuse_none(_notes(X, self.note_)[1], self.note_)
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        self.aligner_ = self._fit_aligner(X, seed)
        data = self._pairs(X, info)
        self.n_rows_, device = len(data), resolve_device(self.device)
        x = data.blocks["record"].arrays["x"][data.rows]
        with seeded(seed, device):
            core = self._make_core(info, x.shape[1], self.n_prefix).to(device)
        core.center.copy_(torch.from_numpy(x.mean(0)))
        core.scale.copy_(torch.from_numpy(np.maximum(x.std(0), 1e-6)))
        with self._progress() as report:
            self.history_ = train(
                core, data, validation=None, max_epochs=self.max_epochs,
                batch_size=self.batch_size, lr=self.lr, weight_decay=self.weight_decay,
                patience=None, seed=seed, device=device, report=report,
            )  # fmt: skip
        self.weights_ = {name: t.cpu().numpy() for name, t in core.state_dict().items()}
        return self

    def _check_room(self, info, n_tokens):
        room = _hub.longest_chunk(info, LONG) - len(_open(info)[1].prefix) - self.n_prefix
        if n_tokens > room:
            raise ValueError(
                f"n_prefix={self.n_prefix} leaves room for {max(room, 0)} tokens in model "
                f"{self.model!r}; choose max_note_tokens and max_new_tokens of at most that."
            )

    def _note_column(self, X):
        if self.note is None:
            inner = getattr(self.aligner, "estimator", self.aligner)
            texts = [m for m in inner._named().values() if isinstance(m, Text)]
            if not texts:
                raise ValueError(
                    "The aligner declares no Text, so there is no note to learn; add one to its "
                    "modalities, or name the column in note=."
                )
            return modality_columns(texts[0], X)[0]
        return self.note

    def _fit_aligner(self, X, seed):
        aligner = clone(self.aligner)  # a FrozenEstimator comes back as it is, fitted
        if isinstance(aligner, ClipEHRAligner):
            own = {"random_state": seed, "device": self.device}
            aligner.set_params(**{k: v for k, v in own.items() if getattr(aligner, k) is None})
        return aligner.fit(X, None)

    def _records(self, X):
        """Places of the records (n, j), and which rows have one."""
        x = self.aligner_.transform(X).astype("float32")
        return x, (x != 0).any(1)

    def _pairs(self, X, info):
        """Rows that have a record and a note, with the numbers of the note's tokens."""
        x, here = self._records(X)
        notes, written = _notes(X, self.note_)
        rows = np.flatnonzero(here & written)
        _refuse_none(here & written, self.note_)
        tokenizer = _open(info)[0]
        ids = tokenizer(
            [notes[row] for row in rows], add_special_tokens=False, verbose=False
        )["input_ids"]  # fmt: skip
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        ids = [[*note, *end][: self.max_note_tokens] for note in ids]  # a cut note has no end
        offsets = np.cumsum([0, *map(len, ids)], dtype="int64")
        flat = np.fromiter((i for note in ids for i in note), "int64", count=offsets[-1])
        here = np.ones(len(rows), bool)
        blocks = {"record": Block(here, {"x": x[rows]}),
                  "note": Block(here, ragged={"ids": (flat, offsets)})}  # fmt: skip
        return Data(blocks, np.arange(len(rows)))

    def _make_core(self, info, width, n_prefix):
        model = _hub_causal.open_causal(info, self.device)
        return PrefixCore(model, _open(info)[1].prefix, width, n_prefix)

    # ------------------------------------------------------------ write

    def _reopen(self):
        """The core of fit, in eval mode; the language model is asked for by its content."""
        check_is_fitted(self, "weights_")
        info = _hub.reopen(self.model, self.commit_, self.fingerprint_)
        size = _hub_causal.open_causal(info, self.device).get_input_embeddings().weight.shape[1]
        n_prefix = len(self.weights_["heads.2.bias"]) // size
        core = self._make_core(info, len(self.weights_["center"]), n_prefix)
        core.load_state_dict({k: torch.tensor(a) for k, a in self.weights_.items()})
        return info, core.to(resolve_device(self.device)).eval()

    def generate(self, X):
        """Write a text for every record, always the most likely next token.

        Parameters
        ----------
        X : DataFrame of shape (n_samples, n_columns)
            No note is needed, and none is read.

        Returns
        -------
        texts : Series of str
            With the index of X; null where a row has no record.
        """
        info, core = self._reopen()
        self._check_room(info, self.max_new_tokens)
        tokenizer, frame = _open(info)
        x, here = self._records(X)
        said = np.full(len(X), None, dtype=object)
        if here.any():
            records = Data({"record": Block(here, {"x": x})}, np.flatnonzero(here))
            with torch.no_grad():
                vectors = core(records.batch(np.arange(len(records))).to(core.center.device))
            said[here] = _hub_causal.continue_vectors(
                core.outside[0], vectors, tokenizer, frame.pad, self.max_new_tokens
            )
        return pd.Series(said, index=X.index, name=self.note_, dtype=object)

    def score(self, X, y=None):
        """Negative loss per token on the notes of these rows, for grid search.

        It needs no text to be written, and moves with every parameter of the aligner and the
        prefix. It compares generators of one `model` and one `max_note_tokens` alone; for others
        write the texts and take `ehrfuse.evaluation.text_scores`.

        Parameters
        ----------
        X : DataFrame of shape (n_samples, n_columns)
            With notes; rows that lack a side are left out.
        y : ignored

        Returns
        -------
        score : float
        """
        info, core = self._reopen()
        data = self._pairs(X, info)
        device = resolve_device(self.device)
        return -evaluate(core, data, self.batch_size, 0, device)["val_loss"]


def _open(info):
    """Tokenizer and frame of a model, whatever its length."""
    return _hub.open_tokenizer(info, _hub.longest_chunk(info, LONG))


def _notes(X, column):
    """Cells of a column of notes, and which of them say anything."""
    if not isinstance(X, pd.DataFrame) or column not in X.columns:
        raise ValueError(f"X must be a DataFrame with the notes in a column {column!r}.")
    cells, known = X[column].to_numpy(dtype=object), X[column].notna().to_numpy(bool, copy=True)
    for row in np.flatnonzero(known):
        if not isinstance(cells[row], str):
            raise ValueError(
                f"Column {column!r} needs text (str) or null; row {row} holds "
                f"{describe(cells[row])}. Convert the cell to str."
            )
        known[row] = bool(cells[row].strip())
    return cells, known


def _refuse_none(found, column):
    if not found.any():
        raise ValueError(
            f"No row has both a record and a note in column {column!r}; give rows with both."
        )
