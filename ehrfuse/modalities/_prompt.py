"""Notes and retrieved knowledge as one prompt for a causal language model."""

import numpy as np

from ehrfuse import _hub, _hub_causal
from ehrfuse._data import Block
from ehrfuse.modalities._base import Modality

PARTS = ("Knowledge: ", "\nNote: ", "\nQuestion: ", "\nAnswer:")
NOTHING = "none"
KNOWLEDGE_SHARE = 0.35  # of the room in a prompt


class Prompt(Modality):
    """Notes and knowledge as the token numbers of one prompt a row.

    A row without a note or knowledge says so in words: nothing of a null cell is in the prompt.

    Parameters
    ----------
    columns : list of str
        Columns of notes.
    knowledge : str or None
        Column of retrieved knowledge.
    teacher : str or None
        Column of rationales, read in fit alone.
    model, question : str
    max_length : int
        Tokens of a prompt; of what is too long the first and the last are kept.
    max_rationale : int
        Tokens of a rationale.
    labels : tuple of str
        What answers the question, one word per class.
    """

    def __init__(self, columns, knowledge, teacher, model, question, max_length, max_rationale,
                 labels):  # fmt: skip
        super().__init__(columns)
        self.knowledge = knowledge
        self.teacher = teacher
        self.model = model
        self.question = question
        self.max_length = max_length
        self.max_rationale = max_rationale
        self.labels = labels

    def fit(self, X, y=None):
        """Open the tokenizer; nothing is learned from rows."""
        info = _hub.inspect_model(self.model)
        self.fingerprint_, self.commit_ = info.fingerprint, info.revision
        self.columns_, self.seen_ = list(self.columns), True
        self.length_ = _hub.longest_chunk(info, self.max_length)
        self.label_ids_ = self._label_ids(self._tokenizer())
        return self

    def transform(self, X):
        """One prompt a row, and its rationale where there is one."""
        tokenizer = self._tokenizer()
        fixed = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in PARTS]
        fixed[2] = [*fixed[2], *tokenizer(self.question, add_special_tokens=False)["input_ids"]]
        start = list(_hub.open_tokenizer(self._info(), self.length_)[1].prefix)
        room = self.length_ - len(start) - sum(map(len, fixed)) - self.max_rationale
        if room < 8:
            raise ValueError(
                f"max_length={self.max_length} leaves {room} tokens for the note beside the "
                "question; choose more."
            )
        notes = self._ids(self._notes(X), tokenizer)
        facts = self._ids(self._cells_of(X, self.knowledge), tokenizer)
        rows = []
        for note, fact in zip(notes, facts, strict=True):
            fact = fact[: max(int(room * KNOWLEDGE_SHARE), room - len(note))]
            note = _hub_causal.cut_prompt(note, room - len(fact))
            rows.append([*start, *fixed[0], *fact, *fixed[1], *note, *fixed[2], *fixed[3]])
        ragged = {"ids": _flat(rows)}
        if self.teacher is not None:
            said = self._ids(self._cells_of(X, self.teacher, ""), tokenizer)
            ragged["rationale"] = _flat([ids[: self.max_rationale] for ids in said])
        return Block(np.ones(len(X), dtype=bool), ragged=ragged)

    def _info(self):
        return _hub.reopen(self.model, self.commit_, self.fingerprint_)

    def _tokenizer(self):
        return _hub.open_tokenizer(self._info(), self.length_)[0]

    def _notes(self, X):
        cells = [self._cells_of(X, column, "") for column in self.columns_]
        return ["\n".join(t for t in row if t) or NOTHING for row in zip(*cells, strict=True)]

    def _cells_of(self, X, column, empty=NOTHING):
        if column is None:
            return [empty] * len(X)
        cells = X[column]
        known = cells.notna().to_numpy()
        words = cells.to_numpy(dtype=object)
        return [str(w) if k and str(w) else empty for w, k in zip(words, known, strict=True)]

    def _ids(self, texts, tokenizer):
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def _label_ids(self, tokenizer):
        """First token of every label after the answer's colon."""
        bare = len(tokenizer(PARTS[3], add_special_tokens=False)["input_ids"])
        full = [
            tokenizer(f"{PARTS[3]} {label}", add_special_tokens=False)["input_ids"]
            for label in self.labels
        ]
        ids = [row[bare] for row in full]
        if len(set(ids)) < len(ids) or tokenizer.unk_token_id in ids:
            raise ValueError(
                f"labels={self.labels} do not begin with different tokens of model "
                f"{self.model!r}; choose other words, one per class."
            )
        return ids


def _flat(rows):
    offsets = np.cumsum([0, *map(len, rows)], dtype="int64")
    return np.fromiter((i for row in rows for i in row), "int64", count=offsets[-1]), offsets
