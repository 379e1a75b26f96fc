"""Notes as what a causal language model is to write."""

import numpy as np

from ehrfuse import _hub, _hub_causal
from ehrfuse._data import Block
from ehrfuse.modalities._base import Modality
from ehrfuse.modalities._prompt import _flat


class NoteTokens(Modality):
    """Token numbers of notes (str or null), and the end of the text behind those that are not cut.

    Parameters
    ----------
    columns : str
    model : str
        A causal language model.
    max_length : int
        Tokens of a note, from its start.
    """

    _one_column = True

    def __init__(self, columns, model, max_length):
        super().__init__(columns)
        self.model = model
        self.max_length = max_length

    def info(self):
        """The model of fit; raises where its name now stands for another."""
        return _hub.reopen(self.model, self.commit_, self.fingerprint_)

    def _learn(self, cells):
        info = _hub.inspect_model(self.model)
        self.fingerprint_, self.commit_ = info.fingerprint, info.revision
        self.size_, self.unit_ = _hub_causal.word_unit(info)

    def _read(self, cells, present):
        notes = self._only(cells).to_numpy(dtype=object)
        ids = [[] for _ in notes]
        if present.any():
            written = _hub_causal.note_ids(self.info(), notes[present].tolist(), self.max_length)
            for row, note in zip(np.flatnonzero(present), written, strict=True):
                ids[row] = note
        return Block(present, ragged={"ids": _flat(ids)})
