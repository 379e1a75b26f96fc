"""Write a draft of a note from the structured record, by a frozen language model with a prefix.

What Ketabi and Ramachandram (arXiv:2505.17643) leave open: text from the aligned record. A small
network turns the record's place in the joint space into vectors that stand before the first word,
as ClipCap does for images (Mokady et al., arXiv:2111.09734). The language model stays as it is.
"""

from numbers import Integral

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator, clone
from sklearn.utils import check_random_state, check_scalar
from sklearn.utils.validation import check_is_fitted

from ehrfuse import _hub, _hub_causal
from ehrfuse.base import TorchEncoder
from ehrfuse.methods._note_generator import PrefixWriter
from ehrfuse.modalities import Text
from ehrfuse.modalities._base import describe

__all__ = ["NoteGenerator"]


class NoteGenerator(BaseEstimator):
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
    writer_ : fitted encoder
        From a record's place to its prefix, in the scale of the training rows.
    note_ : str
        Column that was learned.
    n_rows_ : int
        Training rows that have both a record and a note.
    history_ : list of dict
        One entry per epoch of the prefix.

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

    # ------------------------------------------------------------ fit

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
        if not isinstance(getattr(self.aligner, "estimator", self.aligner), TorchEncoder):
            raise ValueError(
                f"aligner is {type(self.aligner).__name__}; it must be a ClipEHRAligner, or a "
                "FrozenEstimator around a fitted one."
            )
        for name in ("n_prefix", "max_note_tokens", "max_new_tokens"):
            check_scalar(getattr(self, name), name, Integral, min_val=1)
        check_scalar(self.model, "model", str)
        check_scalar(self.note, "note", (str, type(None)))
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        options = self.get_params(deep=False) | {"random_state": seed}
        names = PrefixWriter._get_param_names()
        writer = PrefixWriter(**{name: options[name] for name in names})
        writer._check_params()
        self._check_room(_hub.inspect_model(self.model), self.max_note_tokens, self.max_new_tokens)
        self.note_ = self._note_column(X)
        self._written(X)  # before the aligner, which may take long
        self.aligner_ = self._fit_aligner(X, seed)
        pairs = self._pairs(X)
        self.writer_ = writer.fit(pairs)
        self.n_rows_, self.history_ = len(pairs), self.writer_.history_
        return self

    def _check_room(self, info, *wanted):
        room = _hub_causal.room_after(info, self.n_prefix)
        if max(wanted) > room:
            raise ValueError(
                f"n_prefix={self.n_prefix} leaves room for {max(room, 0)} tokens in model "
                f"{self.model!r}; choose max_note_tokens and max_new_tokens of at most that."
            )

    def _note_column(self, X):
        if self.note is not None:
            return self.note
        inner = getattr(self.aligner, "estimator", self.aligner)
        texts = [m for m in inner._named().values() if isinstance(m, Text)]
        if not texts:
            raise ValueError(
                "The aligner declares no Text, so there is no note to learn; add one to its "
                "modalities, or name the column in note=."
            )
        columns = texts[0].columns
        columns = columns(X) if callable(columns) else columns
        return columns if isinstance(columns, str) else columns[0]

    def _fit_aligner(self, X, seed):
        aligner = clone(self.aligner)  # a FrozenEstimator comes back as it is, fitted
        if isinstance(aligner, TorchEncoder):
            own = {"random_state": seed, "device": self.device}
            aligner.set_params(**{k: v for k, v in own.items() if getattr(aligner, k) is None})
        return aligner.fit(X, None)

    def _written(self, X):
        """Which rows have a note; raises where none has."""
        if not isinstance(X, pd.DataFrame) or self.note_ not in X.columns:
            raise ValueError(f"X must be a DataFrame with the notes in a column {self.note_!r}.")
        cells, known = X[self.note_].to_numpy(dtype=object), X[self.note_].notna().to_numpy()
        for row in np.flatnonzero(known):
            if not isinstance(cells[row], str):
                raise ValueError(
                    f"Column {self.note_!r} needs text (str) or null; row {row} holds "
                    f"{describe(cells[row])}. Convert the cell to str."
                )
        written = [k and bool(cell.strip()) for cell, k in zip(cells, known, strict=True)]
        return self._some(np.array(written, dtype=bool))

    def _some(self, here):
        if not here.any():
            raise ValueError(
                f"No row has both a record and a note in column {self.note_!r}; give rows with "
                "both."
            )
        return here

    def _records(self, X):
        """One column of places in the joint space, and which rows have one."""
        x = self.aligner_.transform(X)
        return pd.DataFrame({"record": pd.Series(list(x), dtype=object)}), (x != 0).any(1)

    def _pairs(self, X):
        """Rows that have a record and a note."""
        written = self._written(X)
        records, here = self._records(X)
        both = self._some(here & written)
        notes = X[self.note_].to_numpy(dtype=object)
        return records.assign(note=pd.Series(notes, dtype=object))[both]

    # ------------------------------------------------------------ write

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
        check_is_fitted(self, "writer_")
        check_scalar(self.max_new_tokens, "max_new_tokens", Integral, min_val=1)
        info = self.writer_.modalities_["note"].info()
        self._check_room(info, self.max_new_tokens)
        records, here = self._records(X)
        said = np.full(len(X), None, dtype=object)
        if here.any():
            said[here] = _hub_causal.continue_vectors(
                self.writer_.transform(records[here]), info,
                max_new_tokens=self.max_new_tokens, device=self.device,
            )  # fmt: skip
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
        check_is_fitted(self, "writer_")
        return self.writer_.score(self._pairs(X))
