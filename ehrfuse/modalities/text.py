"""Text: notes, read by words learned in fit or by a Hugging Face model."""

import numpy as np

from ehrfuse import _hub
from ehrfuse._data import Block
from ehrfuse._runtime import check_option, import_optional
from ehrfuse.modalities._base import Modality, check_count, describe
from ehrfuse.modalities._numbers import vector_scale
from ehrfuse.modalities._words import Vocabulary, split
from ehrfuse.nn.backbones import Backbone, BackboneEncoder
from ehrfuse.nn.encoders import ChunkEncoder, WordEncoder

__all__ = ["Text"]


class Text(Modality):
    """Notes: one string a row, null where there is none.

    By default nothing is downloaded: words and pairs of neighbours are learned in `fit` and
    weighed much as in TF-IDF. With `model` a Hugging Face text model reads notes in chunks, frozen
    (its vectors are computed once and cached) or trained through.

    Parameters
    ----------
    columns : str
        One column. Null: no note. Empty string: a note with nothing in it.
    model : str or None, default=None
        A model of the Hugging Face hub by name, for example ``"yikuan8/Clinical-Longformer"``, or a
        local folder with its files. Remote code is never run.
    revision : str or None, default=None
        Branch, tag or commit of a hub model. The commit found in `fit` is used ever after.
    trainable : bool, default=False
        Train the model with the rest. Its weights are then part of the fitted estimator.
    lora_rank : int or None, default=None
        Train low-rank adapters of this rank in all linear layers instead of the weights
        themselves; `trainable` only. Needs ``pip install 'ehrfuse[lora]'``.
    gradient_checkpointing : bool, default=False
        Compute the layers of a trainable model twice instead of keeping what they gave: less
        memory, about a third more time, the same weights.
    max_length : int, default=1024
        Tokens read of a note, from its start; words where `model` is None.
    chunk_length : int, default=256
        Tokens of a chunk, special tokens included; `model` only. Each chunk gives one token.
    pooling : {"mean", "cls", "last"}, default="mean"
        Vector of a chunk: mean over its tokens, its first token, or its last (for causal language
        models); `model` only.
    min_count : int, default=5
        A word or pair is kept when at least this many training notes hold it. It ends up in the
        fitted estimator, so a low count may store names of patients.
    max_words : int, default=20_000
        Words and pairs kept, those in most notes.
    cache : path or None, default=None
        Where the vectors of a frozen model are kept: an sqlite file, which several processes may
        share, or None for the memory of this process.
    n_jobs : int or None, default=None
        Workers of joblib that run a frozen `model` at once, also through another back-end
        (``joblib.parallel_config("dask")``). Notes are sent to them.
    dropout : float or None, default=None
        Share of the words of a note left out in training, or dropout on the vectors of `model`.
        None is 0.5 for words and 0.1 for vectors.
    lr_scale : float or None, default=None
        Multiple of the learning rate for a trainable model. None is 0.02, and 0.1 for adapters.

    Attributes
    ----------
    vocabulary_ : list of str
        Words, and pairs as two words with a space; by how many notes hold them. `model` None only.
    idf_ : array of shape (n_words,)
    fingerprint_ : str
        Identifies the weights of `model`.
    size_ : int
        Width of the vectors of `model`.

    Notes
    -----
    The cache stores hashes and vectors, no text. Vectors can be inverted and the hash of a short
    text guessed, so the file is to be protected like the notes.

    Examples
    --------
    >>> import pandas as pd
    >>> from ehrfuse.modalities import Text
    >>> X = pd.DataFrame({"note": ["Chest pain, no fever.", "No chest pain", "", None]})
    >>> text = Text("note", min_count=2).fit(X)
    >>> text.vocabulary_
    ['chest', 'no', 'pain', 'chest pain']
    >>> text.transform(X).present
    array([ True,  True,  True, False])
    """

    _one_column = True

    def __init__(
        self,
        columns,
        *,
        model=None,
        revision=None,
        trainable=False,
        lora_rank=None,
        gradient_checkpointing=False,
        max_length=1024,
        chunk_length=256,
        pooling="mean",
        min_count=5,
        max_words=20_000,
        cache=None,
        n_jobs=None,
        dropout=None,
        lr_scale=None,
    ):
        super().__init__(columns)
        self.model = model
        self.revision = revision
        self.trainable = trainable
        self.lora_rank = lora_rank
        self.gradient_checkpointing = gradient_checkpointing
        self.max_length = max_length
        self.chunk_length = chunk_length
        self.pooling = pooling
        self.min_count = min_count
        self.max_words = max_words
        self.cache = cache
        self.n_jobs = n_jobs
        self.dropout = dropout
        self.lr_scale = lr_scale

    def _check_params(self):
        for name in ("max_length", "chunk_length", "min_count", "max_words"):
            check_count(getattr(self, name), name)
        check_option(self.pooling, "pooling", ("mean", "cls", "last"))
        if self.trainable and self.model is None:
            raise ValueError(
                "trainable=True needs model=, a hub name or a folder; the words of model=None are "
                "always trained."
            )
        if self.gradient_checkpointing and not self.trainable:
            raise ValueError(
                "gradient_checkpointing needs trainable=True; a frozen model has no gradient."
            )
        if self.lora_rank is not None:
            check_count(self.lora_rank, "lora_rank")
            if not self.trainable:
                raise ValueError("lora_rank needs trainable=True; a frozen model has no adapters.")
            import_optional("peft", "lora")

    def _learn(self, cells):
        notes = self._notes(cells, cells.iloc[:, 0].notna().to_numpy(dtype=bool))
        if self.model is None:
            words = (split(note, self.max_length) for note in notes)
            self._keep(Vocabulary.learn(words, self.min_count, self.max_words))
            return
        info = _hub.inspect_model(self.model, self.revision)
        tokenizer, frame = _hub.open_tokenizer(info, self.chunk_length)
        self.fingerprint_, self.commit_ = info.fingerprint, info.revision
        self.size_ = _hub.text_size(info)
        if self.trainable:
            self.config_, self.pad_ = info.config, frame.pad
            self.tokenizer_ = _hub.tokenizer_json(tokenizer, self.model)
            self.prefix_, self.suffix_ = list(frame.prefix), list(frame.suffix)
            self._weights_at_hand = True
        else:
            self.scale_ = vector_scale(self._vectors(notes)[0])

    def _keep(self, vocabulary):
        self.vocabulary_, self.idf_ = vocabulary.terms, vocabulary.idf

    def __getstate__(self):
        """Leave the mark behind: a stored modality builds its network from `config_`."""
        state = dict(super().__getstate__())
        state.pop("_weights_at_hand", None)
        return state

    def _notes(self, cells, present):
        """List the present notes, all of them str."""
        column = self._only(cells)
        rows = np.flatnonzero(present)
        notes = column.to_numpy(dtype=object)[rows].tolist()
        for row, note in zip(rows, notes, strict=True):
            if not isinstance(note, str):
                self._complain(
                    row, describe(note), "text (str) or null",
                    "Convert the cell to str, or declare another modality.",
                )  # fmt: skip
        return notes

    def _read(self, cells, present):
        notes = self._notes(cells, present)
        if self.model is None:
            vocabulary = Vocabulary(self.vocabulary_, self.idf_)
            words = (split(note, self.max_length) for note in notes)
            ids, weights, offsets = vocabulary.weigh(words)
            offsets = _spread(offsets, present)
            return Block(present, ragged={"ids": (ids, offsets), "weights": (weights, offsets)})
        if self.trainable:
            return self._read_tokens(notes, present)
        vectors, offsets = self._vectors(notes)
        return Block(present, ragged={"chunks": (vectors, _spread(offsets, present))})

    def _vectors(self, notes):
        if not notes:
            return np.zeros((0, self.size_), "float32"), np.zeros(1, "int64")
        info = _hub.reopen(self.model, self.commit_ or self.revision, self.fingerprint_)
        return _hub.encode_texts(
            notes, info, max_length=self.max_length, chunk_length=self.chunk_length,
            pooling=self.pooling, cache=self.cache, n_jobs=self.n_jobs,
        )  # fmt: skip

    def _read_tokens(self, notes, present):
        frame = _hub.Frame(tuple(self.prefix_), tuple(self.suffix_), self.pad_)
        tokenizer = _hub.restore_tokenizer(self.tokenizer_)
        cut = _hub.cut_texts(notes, tokenizer, frame, self.max_length, self.chunk_length)
        lengths = [len(chunk) for note in cut for chunk in note]
        number = [i for note in cut for i in range(len(note))]
        ids = np.fromiter((t for note in cut for chunk in note for t in chunk), "int32")
        chunk = np.repeat(np.array(number, dtype="int32"), np.array(lengths, dtype="int64"))
        offsets = np.cumsum([0, *(sum(map(len, note)) for note in cut)], dtype="int64")
        offsets = _spread(offsets, present)
        return Block(present, ragged={"ids": (ids, offsets), "chunk": (chunk, offsets)})

    def make_encoder(self, d_model, n_members=1):
        if self.model is None:
            dropout = 0.5 if self.dropout is None else self.dropout
            return WordEncoder(len(self.vocabulary_) + 1, d_model, dropout)
        dropout = 0.1 if self.dropout is None else self.dropout
        if not self.trainable:
            return ChunkEncoder(*self.scale_, d_model, dropout)
        at_hand = getattr(self, "_weights_at_hand", False)
        if at_hand:
            network = _hub.copy_model(
                _hub.reopen(self.model, self.commit_ or self.revision, self.fingerprint_)
            )
        else:
            network = _hub.build_model(self.config_)
        if self.gradient_checkpointing:
            _hub.forget_layers(network)
        lr_scale = self.lr_scale
        if lr_scale is None:
            lr_scale = 0.02 if self.lora_rank is None else 0.1
        backbone = Backbone(network, self.pooling, lr_scale, pretrained=at_hand)
        if self.lora_rank is not None:
            _hub.add_lora(backbone.model, self.lora_rank)
        return BackboneEncoder(backbone, self.size_, d_model, self.pad_, dropout)


def _spread(offsets, present):
    """Offsets over the present rows as offsets over all rows; an absent row owns nothing."""
    lengths = np.zeros(len(present), "int64")
    lengths[present] = np.diff(offsets)
    return np.concatenate([[0], np.cumsum(lengths)]).astype("int64")
