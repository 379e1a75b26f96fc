"""Notes before they reach a network: sections of a text, chunks of a block, topics of words."""

import re

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.decomposition import TruncatedSVD


def cut_sections(notes, pattern):
    """Texts of a column of notes, cut at a pattern, with their row and their number within it."""
    rows, numbers, texts = [], [], []
    for row, note in enumerate(notes.to_numpy(dtype=object)):
        if isinstance(note, str):
            parts = [note] if pattern is None else re.split(pattern, note)
            parts = [part for part in parts if part and part.strip()]  # None: a group unmatched
            rows += [row] * len(parts)
            numbers += range(len(parts))
            texts += parts
    return np.array(rows, dtype=int), np.array(numbers, dtype=int), texts


def word_counts(block, n_words):
    (ids, offsets), (weights, _) = block.ragged["ids"], block.ragged["weights"]
    return csr_matrix((weights, ids, offsets), shape=(len(offsets) - 1, n_words))


def chunk_lengths(offsets, chunk):
    """Tokens of every chunk, in order, from the chunk's number within its note."""
    row = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    new = np.ones(len(chunk), bool)
    new[1:] = (chunk[1:] != chunk[:-1]) | (row[1:] != row[:-1])
    return np.diff(np.append(np.flatnonzero(new), len(chunk)))


def learn_topics(block, rows, modality, n_topics, seed):
    """Latent semantic analysis of the training notes.

    Word vectors ``topics`` (n_words + 1, n_topics), and the mean place ``center`` (n_topics,).
    """
    # `Text` weighs rare words down for the sake of Adam; here TF-IDF itself is wanted.
    idf = np.concatenate([[1.0], modality.idf_])
    rare = np.exp((idf - 1) / 2)
    counts = word_counts(block, len(idf))[rows[block.present[rows]]].multiply(rare[None]).tocsr()
    topics, center = np.zeros((len(idf), n_topics), "float32"), np.zeros(n_topics, "float32")
    rank = min(n_topics, min(counts.shape) - 1)
    if rank > 0:
        found = TruncatedSVD(rank, random_state=seed)
        with np.errstate(divide="ignore", invalid="ignore"):  # its share of a variance of zero
            place = found.fit_transform(counts)
        # One unit for all topics, so that the common ones count most. Equal notes differ by
        # rounding alone, which is no unit.
        spread = place.var(0).sum()
        unit = np.sqrt(spread / n_topics) if spread > 1e-9 * (place**2).mean(0).sum() else 1.0
        topics[:, :rank] = (found.components_ * rare / unit).T
        center[:rank] = place.mean(0) / unit
    return {"topics": topics, "center": center}
