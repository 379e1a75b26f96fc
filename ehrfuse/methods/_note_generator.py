"""The torch side of `NoteGenerator`: a prefix that makes a frozen language model write a note.

Axes: b - batch, k - prefix vectors, t - tokens of a note, v - width of a token.
"""

from functools import cached_property

from torch import nn

from ehrfuse import _hub_causal
from ehrfuse.base import TorchEncoder
from ehrfuse.modalities import Embedding
from ehrfuse.modalities._note_tokens import NoteTokens
from ehrfuse.nn.core import Core

HIDDEN = 128  # NOTE[DIFF] ClipCap: half of the prefix's numbers, millions of weights for a cohort


class PrefixCore(Core):
    """Records to prefixes (b, k, v); the loss of the language model on the note that follows.

    The language model is no part of the module: it is neither trained, moved nor stored.
    """

    supervised = ()  # there are no labels

    def __init__(self, encoder, note, n_prefix):
        width = n_prefix * note.size_
        head = nn.Sequential(nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, width))
        super().__init__({"record": encoder}, heads=head)
        self.n_outputs = width
        # In the unit of the model's own words, or one learning rate would not suit all models.
        self.unit, self.size, self.note = note.unit_, note.size_, note

    @cached_property
    def info(self):
        """The language model; looked up when it is read, so that loading does without."""
        return self.note.info()

    def forward(self, batch):
        """What stands before a note (b, k, v)."""
        row = self.encode(batch).pooled[:, 0]
        return self.unit * self.heads(row).unflatten(1, (-1, self.size))

    def losses(self, batch):
        """Mean over notes, of the mean over their tokens."""
        ids, here = batch.inputs["note"]["ids"], batch.inputs["note"]["ids_mask"]
        each = _hub_causal.token_losses(self.info, self(batch), ids, here)
        return {"token": (each.sum(1) / here.sum(1).clamp(min=1)).mean()}


class PrefixWriter(TorchEncoder):
    """Prefixes for records, learned from frames of a vector and a note a row.

    Parameters
    ----------
    model, n_prefix, max_note_tokens, max_epochs, batch_size, lr, weight_decay : optional
    random_state, device, verbose : optional
        See `NoteGenerator`.
    """

    pretrained, freeze, memory = None, (), None
    patience = validation_fraction = groups = None
    amp = False
    _fit_only = (NoteTokens,)
    _nested = False

    def __init__(
        self, model, *, n_prefix, max_note_tokens, max_epochs, batch_size, lr, weight_decay,
        random_state, device, verbose,
    ):  # fmt: skip
        self.model = model
        self.n_prefix = n_prefix
        self.max_note_tokens = max_note_tokens
        self.max_epochs = max_epochs
        self.batch_size = batch_size
        self.lr = lr
        self.weight_decay = weight_decay
        self.random_state = random_state
        self.device = device
        self.verbose = verbose

    @property
    def modalities(self):
        """The vector of a record, and what is to be written."""
        return {
            "record": Embedding("record", dropout=0.0),
            "note": NoteTokens("note", self.model, self.max_note_tokens),
        }

    def _make_core(self, modalities, target):
        encoder = modalities["record"].make_encoder(HIDDEN)
        return PrefixCore(encoder, modalities["note"], self.n_prefix)
