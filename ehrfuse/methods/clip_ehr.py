"""Align structured records with their notes, then predict without notes.

Ketabi and Ramachandram, "Bridging electronic health records and clinical texts: contrastive
learning for enhanced clinical tasks" (arXiv:2505.17643). A TabNet reads the record, a text model
the note; both are drawn together as in CLIP. What the record has learned from the note then serves
predictions for which there is none.
"""

import warnings
from dataclasses import replace
from numbers import Integral, Real

import numpy as np
import pandas as pd
import torch
from sklearn.utils import check_scalar
from sklearn.utils.validation import check_is_fitted

from ehrfuse._runtime import check_option, users_line
from ehrfuse.base import TorchEncoder
from ehrfuse.methods._clip_ehr import ClipCore
from ehrfuse.methods._note_vectors import chunk_lengths, cut_sections, learn_topics, word_counts
from ehrfuse.methods._tabnet import TABLES, TabNetEstimator
from ehrfuse.modalities.text import Text
from ehrfuse.nn.clip import ChunkPool, SplitEncoder, TopicEncoder

__all__ = ["ClipEHRAligner"]


class ClipEHRAligner(TabNetEstimator, TorchEncoder):
    """Draw structured records and their notes together; afterwards no note is needed.

    `fit` reads tables and notes; `transform` gives the record's vector without any note. As
    ``pretrained=`` of `TabNetClassifier` it hands over its TabNet.

    Parameters
    ----------
    modalities : dict of str to Modality, or None, default=None
        Tables (`Tabular`, `Labs`) and notes (`Text`). The notes' columns are needed in `fit` alone.
        As ``pretrained=`` of a classifier, None inherits the classifier's, the notes that it does
        not read included.
    embed_dim : int, default=128
        Width of the joint space.
    loss : {"clip", "siglip"}, default="clip"
        One question a row, which note of the batch is its own; or one question a pair.
    temperature : float, default=0.07
        At the start; it is learned.
    contrastive_weight, regression_weight : float, default=1.0 and 1.0
        Of the contrast, and of guessing the note's vector from the record's.
    reconstruction_weight : float, default=0.0
        Of masked reconstruction beside the alignment, the one term that rows without a note serve;
        as a stage of its own it is ``pretrained=TabNetPretrainer()``.
    mask_ratio : float, default=0.5
        Share of the columns hidden for reconstruction.
    same_patient : {"positive", "ignore"}, default="positive"
        With `groups`: other rows of a patient are right answers too, or are left out of the
        contrast. Wrong answers they never are.
    n_topics : int, default=128
        Notes read by words (``Text(model=None)``) become this many topics, by latent semantic
        analysis of the training notes.
    pooling : {"mean", "attention"}, default="mean"
        Over the chunks of a note, where `Text` has a model.
    trainable_layers : int, default=2
        Layers of a trainable text model that are trained, from the top. Those below run once for
        every chunk, and what they give is kept for all epochs.
    n_d, n_a, n_steps, gamma, n_independent, n_shared : optional
        See `TabNetClassifier`. None inherits the classifier's, or is its default.
    virtual_batch_size, momentum, mask_type, cat_emb_dim : optional
        See `TabNetClassifier`. None inherits the classifier's, or is its default.
    pretrained : estimator or None, default=None
        A `TabNetPretrainer` for the masked phase before this one.
    max_epochs : int, default=20
    batch_size : int or "auto", default="auto"
        Every other note of a batch is a wrong answer. Notes are read once and the loss never holds
        all pairs, so that thousands are cheap.
    lr : float, default=2e-2
    weight_decay : float, default=1e-4
    freeze, patience, validation_fraction, groups, memory, checkpoint : optional
        See `ehrfuse.base.TorchEstimator`.
    amp, random_state, device, verbose : optional
        See `ehrfuse.base.TorchEstimator`.

    Attributes
    ----------
    modalities_ : dict of fitted Modality
    module_ : torch module
    feature_importances_ : array of shape (`n_features_in_`,)
        Share of the attention that every column gets, over the training rows.
    history_ : list of dict
        One entry per epoch.

    See Also
    --------
    TabNetClassifier : Takes this as ``pretrained=``.
    TabNetPretrainer : The masked phase.
    NoteGenerator : Writes a text from the record.

    Notes
    -----
    Differences from the paper (marked ``NOTE[DIFF]`` where they stand):

    * the note's vector is also guessed from the record, because the contrast alone learns what
      tells rows apart, and that is not all that a note says;
    * by default notes are read by words, as topics of the training notes: nothing is downloaded;
      the paper's is ``Text("note", model="yikuan8/Clinical-Longformer", trainable=True)``;
    * rows of one patient are never each other's wrong answers, and cells may be missing;
    * the temperature is learned, and the masked phase is an estimator of its own.

    No note, and no word of one beyond the vocabulary of `Text`, is kept in the fitted estimator.

    References
    ----------
    Ketabi, Ramachandram: Bridging electronic health records and clinical texts: contrastive
    learning for enhanced clinical tasks. arXiv:2505.17643.

    Radford et al.: Learning transferable visual models from natural language supervision. ICML
    2021.

    Examples
    --------
    >>> from ehrfuse import ClipEHRAligner, Tabular, Text
    >>> from ehrfuse.datasets import make_ehr
    >>> X, _ = make_ehr(n_samples=80, random_state=0)
    >>> modalities = {"vitals": Tabular(["age", "heart_rate"]), "note": Text("note")}
    >>> aligner = ClipEHRAligner(modalities, n_d=8, n_a=8, max_epochs=2, random_state=0).fit(X)
    >>> aligner.transform(X.drop(columns="note")).shape
    (80, 128)
    """

    _accepts = (*TABLES, Text)
    _fit_only = (Text,)
    _needs_all = True

    def __init__(
        self,
        modalities=None,
        *,
        embed_dim=128,
        loss="clip",
        temperature=0.07,
        contrastive_weight=1.0,
        regression_weight=1.0,
        reconstruction_weight=0.0,
        mask_ratio=0.5,
        same_patient="positive",
        n_topics=128,
        pooling="mean",
        trainable_layers=2,
        n_d=None,
        n_a=None,
        n_steps=None,
        gamma=None,
        n_independent=None,
        n_shared=None,
        virtual_batch_size=None,
        momentum=None,
        mask_type=None,
        cat_emb_dim=None,
        pretrained=None,
        freeze=(),
        max_epochs=20,
        batch_size="auto",
        lr=2e-2,
        weight_decay=1e-4,
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
        self.embed_dim = embed_dim
        self.loss = loss
        self.temperature = temperature
        self.contrastive_weight = contrastive_weight
        self.regression_weight = regression_weight
        self.reconstruction_weight = reconstruction_weight
        self.mask_ratio = mask_ratio
        self.same_patient = same_patient
        self.n_topics = n_topics
        self.pooling = pooling
        self.trainable_layers = trainable_layers
        self.n_d = n_d
        self.n_a = n_a
        self.n_steps = n_steps
        self.gamma = gamma
        self.n_independent = n_independent
        self.n_shared = n_shared
        self.virtual_batch_size = virtual_batch_size
        self.momentum = momentum
        self.mask_type = mask_type
        self.cat_emb_dim = cat_emb_dim

    def _check_params(self):
        super()._check_params()
        check_option(self.loss, "loss", ("clip", "siglip"))
        check_option(self.same_patient, "same_patient", ("positive", "ignore"))
        check_option(self.pooling, "pooling", ("mean", "attention"))
        for name in ("embed_dim", "n_topics"):
            check_scalar(getattr(self, name), name, Integral, min_val=1)
        for name in ("contrastive_weight", "regression_weight", "reconstruction_weight"):
            check_scalar(getattr(self, name), name, Real, min_val=0)
        if not self.contrastive_weight + self.regression_weight + self.reconstruction_weight:
            raise ValueError(
                "contrastive_weight, regression_weight and reconstruction_weight are all 0, so "
                "there is nothing to learn; give one of them a weight."
            )
        check_scalar(self.trainable_layers, "trainable_layers", Integral, min_val=1)
        check_scalar(self.temperature, "temperature", Real, min_val=1e-2)
        check_scalar(
            self.mask_ratio, "mask_ratio", Real, min_val=0, max_val=1, include_boundaries="neither"
        )

    def _make_core(self, modalities, target):
        notes = {n: self._reader(m) for n, m in modalities.items() if isinstance(m, Text)}
        return ClipCore(self._table_encoders(modalities), notes, self)

    def _reader(self, modality):
        if modality.model is None:  # NOTE[DIFF] The paper reads notes by Clinical-Longformer.
            return TopicEncoder(len(modality.vocabulary_) + 1, self.n_topics)
        encoder = modality.make_encoder(self.embed_dim)
        if modality.trainable:
            encoder = SplitEncoder(encoder, self.trainable_layers)
        return ChunkPool(encoder, self.pooling)

    def _prepare(self, core, data, validation, seed):
        """Run once what no epoch changes: words to topics, chunks through the frozen layers."""
        if not self._count_pairs(data):
            declared = any(isinstance(m, Text) for m in self.modalities_.values())
            remedy = (
                "look at the columns of the Text modality"
                if declared
                else "no Text modality is declared: add the note, with `pretrained=` to those of "
                "the classifier (it is needed in fit alone)"
            )
            warnings.warn(
                f"No training row has both a table and a note, so nothing is aligned; {remedy}.",
                UserWarning,
                stacklevel=users_line(),
            )
        for name, modality in self.modalities_.items():
            if isinstance(modality, Text) and modality.model is None:
                found = learn_topics(data.blocks[name], data.rows, modality, self.n_topics, seed)
                for part, learned in found.items():
                    getattr(core.notes[name], part).copy_(torch.from_numpy(learned))
        sets = [s for s in (data, validation) if s is not None]
        done = {id(s.blocks): self._read_once(core, s.blocks) for s in sets}
        data, *rest = (replace(s, blocks=done[id(s.blocks)]) for s in sets)
        return data, (rest[0] if rest else None)

    def _count_pairs(self, data):
        tables, notes = np.zeros(len(data.rows), bool), np.zeros(len(data.rows), bool)
        for name, modality in self.modalities_.items():
            side = notes if isinstance(modality, Text) else tables
            side |= data.blocks[name].present[data.rows]
        return int((tables & notes).sum())

    def _read_once(self, core, blocks):
        """Blocks whose notes are the vectors that stay the same in every epoch."""
        blocks = dict(blocks)
        for name, reader in core.notes.items():
            block = blocks[name]
            if isinstance(reader, TopicEncoder):
                place = word_counts(block, len(reader.topics)) @ reader.topics.cpu().numpy()
                place = place - reader.center.cpu().numpy()
                blocks[name] = replace(block, arrays={"vector": place}, ragged={})
            elif isinstance(reader.encoder, SplitEncoder):
                (ids, offsets), (chunk, _) = block.ragged["ids"], block.ragged["chunk"]
                lengths = torch.from_numpy(chunk_lengths(offsets, chunk))
                hidden = reader.encoder.read_once(torch.from_numpy(ids), lengths).numpy()
                ragged = {"hidden": (hidden, offsets), "chunk": (chunk, offsets)}
                blocks[name] = replace(block, ragged=ragged)
        return blocks

    # ------------------------------------------------------------ both sides

    def transform(self, X):
        """Place records in the joint space; no note is needed.

        Parameters
        ----------
        X : DataFrame of shape (n_samples, n_columns), or array if `modalities` is None

        Returns
        -------
        embedding : array of shape (n_samples, embed_dim)
            Of unit length; zero where a row has no table.
        """
        check_is_fitted(self)
        if isinstance(X, pd.DataFrame):  # a note that is there would be read for nothing
            X = X.drop(columns=getattr(self, "fit_only_columns_", []), errors="ignore")
        return self._predict(X)[:, : self.module_.n_outputs]

    def transform_text(self, X):
        """Place notes in the joint space; no table is needed.

        Parameters
        ----------
        X : DataFrame of shape (n_samples, n_columns), or list of str
            Strings stand for notes of the first `Text`.

        Returns
        -------
        embedding : array of shape (n_samples, embed_dim)
            Of unit length; zero where a row has no note.
        """
        check_is_fitted(self)
        columns = self._note_columns()
        if isinstance(X, str):
            raise ValueError("X is one str; give a list of texts, such as [text].")
        if not isinstance(X, pd.DataFrame):
            notes = pd.Series(list(X), dtype=object)
            X = pd.DataFrame({columns[0]: notes} | dict.fromkeys(columns[1:]))
        lost = [c for c in columns if c not in X.columns]
        if lost:
            raise ValueError(f"X lacks the columns of the notes {lost}; add them.")
        X = X.reindex(columns=self.feature_names_in_)
        return self._predict(X)[:, self.module_.n_outputs :]

    def similarity(self, X, notes):
        """Cosine of every record to every note.

        Parameters
        ----------
        X : DataFrame of shape (n_samples, n_columns)
        notes : DataFrame of shape (n_notes, n_columns), or list of str

        Returns
        -------
        cosine : array of shape (n_samples, n_notes)
        """
        return self.transform(X) @ self.transform_text(notes).T

    def zero_shot_proba(self, X, prompts):
        """Probability of each of several descriptions, by their closeness to the record.

        Parameters
        ----------
        X : DataFrame of shape (n_samples, n_columns)
        prompts : list of str, or dict of str to str or list of str
            What the note of such a patient would say, one entry a class; several phrasings of a
            class are averaged.

        Returns
        -------
        proba : array of shape (n_samples, n_classes)
            In the order of `prompts`. Not calibrated: the alignment never saw an outcome.
        """
        check_is_fitted(self)
        classes = _phrasings(prompts)
        self._refuse_unknown_words([text for phrasings in classes for text in phrasings])
        place = np.stack([self.transform_text(phrasings).mean(0) for phrasings in classes])
        place /= np.linalg.norm(place, axis=1, keepdims=True).clip(1e-12)
        scale = float(self.module_.log_scale.detach().clamp(max=np.log(100.0)).exp())
        logits = scale * self.transform(X) @ place.T
        p = np.exp(logits - logits.max(1, keepdims=True))
        return p / p.sum(1, keepdims=True)

    def _refuse_unknown_words(self, texts):
        """A prompt of words that no training note had would be answered by chance."""
        modality = next(m for m in self.modalities_.values() if isinstance(m, Text))
        if modality.model is None:
            column = modality.columns_[0]
            (ids, offsets), _ = modality.transform(
                pd.DataFrame({column: pd.Series(texts, dtype=object)})
            ).ragged.values()
            known = np.add.reduceat(ids != 0, offsets[:-1]) if len(ids) else np.zeros(len(texts))
            for text, n_known in zip(texts, known, strict=True):
                if not n_known:
                    raise ValueError(
                        f"No word of the prompt {text!r} was learned in fit; use words of the "
                        "notes (see vocabulary_ of the Text modality)."
                    )

    def _note_columns(self):
        notes = [m for m in self.modalities_.values() if isinstance(m, Text)]
        if not notes:
            raise ValueError(
                "This aligner was fitted without notes; declare them, e.g. modalities={'table': "
                "Tabular([...]), 'note': Text('note')}."
            )
        return [c for m in notes for c in m.columns_]

    def retrieval_scores(self, X, k=(1, 5, 10)):
        """How well records find their notes among those of all rows, and notes their records.

        Parameters
        ----------
        X : DataFrame of shape (n_samples, n_columns)
            Rows that lack a side are left out.
        k : int or tuple of int, default=(1, 5, 10)

        Returns
        -------
        table : DataFrame
            One row a direction; recall at each k, the median rank, and the number of rows. Ties
            count half.
        """
        check_is_fitted(self)
        self._note_columns()
        both = self._predict(X)
        record, note = np.split(both, 2, axis=1)
        here = (record != 0).any(1) & (note != 0).any(1)
        record, note = record[here], note[here]
        rows, k = {}, np.atleast_1d(k)
        for name, a, b in (("record to note", record, note), ("note to record", note, record)):
            rank = _ranks(a, b)
            rows[name] = {f"recall_at_{n}": _mean(rank <= n) for n in k}
            rows[name] |= {"median_rank": np.median(rank) if len(rank) else np.nan, "n": len(rank)}
        return pd.DataFrame(rows).T

    def score(self, X, y=None):
        """Recall at 10, mean over both directions, for grid search.

        Parameters
        ----------
        X : DataFrame of shape (n_samples, n_columns)
            With notes.
        y : ignored

        Returns
        -------
        score : float
            0 where there is no pair to find.
        """
        check_is_fitted(self)
        if not self.module_.notes:
            self._predict(X)  # which complains of a frame that does not fit
            return 0.0
        return float(self.retrieval_scores(X, k=(10,))["recall_at_10"].fillna(0.0).mean())

    def retrieve(self, X, memory, k=3, sections=None):
        r"""Find the nearest notes of other rows, or sections of them, as a draft of its own.

        Parameters
        ----------
        X : DataFrame of shape (n_samples, n_columns)
        memory : DataFrame of shape (n_notes, n_columns)
            Rows with notes, those of the training patients. Notes are never kept in the estimator.
            With `groups`, and its column in X and here, a patient's own notes are not found.
        k : int, default=3
        sections : str or None, default=None
            Regular expression that notes are cut at, e.g. ``r"\n(?=[A-Z ]+:)"`` before every
            heading; None takes notes whole.

        Returns
        -------
        found : DataFrame
            Columns ``row`` (place in X), ``rank`` (from 1), ``similarity``, ``memory_row`` (place
            in `memory`), ``section`` (its number in the note) and ``note``, its text. A row without
            a record finds nothing.
        """
        check_scalar(k, "k", Integral, min_val=1)
        check_is_fitted(self)
        column = self._note_columns()[0]
        if not isinstance(memory, pd.DataFrame) or column not in memory.columns:
            raise ValueError(f"memory must be a DataFrame with the notes in a column {column!r}.")
        memory_row, section, texts = cut_sections(memory[column], sections)
        if not len(texts):
            raise ValueError("memory holds no note; give rows with notes.")
        k = min(k, len(texts))
        places = self.transform(X)
        rows = np.flatnonzero(places.any(1))
        cosine = places[rows] @ self.transform_text(texts).T
        cosine[self._same_patient(X, memory, rows, memory_row)] = -np.inf
        best = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
        found = best.ravel()
        table = pd.DataFrame({
            "row": np.repeat(rows, k),
            "rank": np.tile(np.arange(1, k + 1), len(best)),
            "similarity": np.take_along_axis(cosine, best, 1).ravel(),
            "memory_row": memory_row[found],
            "section": section[found],
            "note": np.array(texts, dtype=object)[found],
        })  # fmt: skip
        return table[np.isfinite(table["similarity"])].reset_index(drop=True)

    def _same_patient(self, X, memory, rows, memory_rows):
        """Which notes are of the row's own patient, (n_rows, n_notes); none where nobody says."""
        if self.groups is None or any(self.groups not in frame.columns for frame in (X, memory)):
            return np.zeros((len(rows), len(memory_rows)), dtype=bool)
        both = pd.concat([X[self.groups].astype(object), memory[self.groups].astype(object)])
        if len({isinstance(patient, str) for patient in both.dropna()}) > 1:
            raise ValueError(
                f"Column {self.groups!r} holds strings and other values in X and memory, so equal "
                "patients would not be seen; give both the same type."
            )
        codes = pd.factorize(both)[0]
        mine, theirs = codes[: len(X)][rows], codes[len(X) :][memory_rows]
        return (mine[:, None] == theirs) & (mine >= 0)[:, None]


def _phrasings(prompts):
    """Texts of every class, from one or several a class."""
    if isinstance(prompts, str):
        raise ValueError("prompts is one str; give a list of texts, one a class.")
    classes = list(prompts.values()) if isinstance(prompts, dict) else list(prompts)
    if len(classes) < 2:
        raise ValueError(f"prompts holds {len(classes)} class; give at least two.")
    classes = [[c] if isinstance(c, str) else c for c in classes]
    for number, texts in enumerate(classes):
        known = isinstance(texts, list | tuple) and all(isinstance(text, str) for text in texts)
        if not (known and texts):
            raise ValueError(f"Class {number} of prompts needs a text (str), or a list of texts.")
    return classes


def _ranks(a, b):
    """Rank of b's row i among all rows of b as seen from a's row i; ties count half."""
    ranks = []
    for start in range(0, len(a), 1024):
        cosine = a[start : start + 1024] @ b.T
        own = cosine[np.arange(len(cosine)), start + np.arange(len(cosine))][:, None]
        ranks.append(1 + (cosine > own).sum(1) + ((cosine == own).sum(1) - 1) / 2)
    return np.concatenate(ranks) if ranks else np.zeros(0)


def _mean(values):
    return float(values.mean()) if len(values) else np.nan
