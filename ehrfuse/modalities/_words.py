"""Notes as weighted bags of words and word pairs: counting, choosing terms, weighing."""

import re
from collections.abc import Iterable

import numpy as np

# A number with its decimals, or a letter with letters and digits behind it (q6h, t12, covid19), so
# that "2.5mg" is a number and its unit, and "s/p" is the pair "s p".
_WORD = re.compile(r"\d+(?:\.\d+)?|[^\W\d_]\w*")

UNKNOWN = 0  # the one term of a note without known terms, the empty note among them


def split(note: str, max_length: int) -> list[str]:
    """Cut a note into words in lower case, and keep the first `max_length`."""
    return _WORD.findall(note.lower())[:max_length]


class Vocabulary:
    """The terms that are common enough, single words and pairs of neighbours, with their weights.

    Parameters
    ----------
    terms : list of str
        Words, and pairs written with a space; term i has the number i + 1, see `UNKNOWN`.
    idf : array of shape (len(terms),)
        Inverse document frequency.
    """

    def __init__(self, terms: list[str], idf: np.ndarray) -> None:
        self.terms, self.idf = terms, idf
        numbers = {term: i for i, term in enumerate(terms, start=1)}
        self._words = {term: i for term, i in numbers.items() if " " not in term}
        pairs = [(term.split(" "), i) for term, i in numbers.items() if " " in term]
        codes = np.array([self._words[a] * self._base + self._words[b] for (a, b), _ in pairs])
        order = np.argsort(codes)
        self._pair_codes = codes[order].astype("int64")
        self._pair_numbers = np.array([i for _, i in pairs])[order].astype("int64")

    @property
    def _base(self) -> int:
        return len(self.terms) + 1

    @classmethod
    def learn(cls, notes: Iterable[list[str]], min_count: int, max_words: int) -> "Vocabulary":
        """Keep the `max_words` terms found in most notes, none found in fewer than `min_count`."""
        found: dict[str, int] = {}
        notes = list(notes)
        flat, row = _flatten([found.setdefault(w, len(found)) for w in note] for note in notes)
        words, n_found, n_notes = list(found), len(found), len(notes)
        ids, n_with = _frequent(flat, row, min_count)
        common = np.zeros(n_found + 1, dtype=bool)
        common[ids] = True
        codes, n_with_pair = _frequent(*_pairs(flat, row, common[flat], n_found), min_count)
        names = [words[i] for i in ids]
        names += [f"{words[code // n_found]} {words[code % n_found]}" for code in codes]
        # A word comes before a pair as frequent, so that no pair is kept without its two words.
        rarity = -np.concatenate([n_with, n_with_pair])
        is_pair = [" " in name for name in names]
        ranked = sorted(zip(rarity, is_pair, names, strict=True))[:max_words]
        frequency = -np.array([negative for negative, _, _ in ranked], dtype="float64")
        idf = np.log((1 + n_notes) / (1 + frequency)) + 1
        return cls([name for _, _, name in ranked], idf.astype("float32"))

    def weigh(self, notes: Iterable[list[str]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Term numbers, weights and offsets: TF-IDF x the root of the share of notes with the term.

        TF-IDF is (1 + log count) x idf, of length 1 in every note. Adam moves the vector of a rare
        term as far as that of a common one, on much less evidence; the root makes up for it, as a
        gradient step would. Each note owns ``ids[offsets[i]:offsets[i + 1]]``, every term once.
        """
        get = self._words.get
        notes = [[get(word, UNKNOWN) for word in note] for note in notes]
        flat, row = _flatten(notes)
        known = flat != UNKNOWN
        codes, pair_row = _pairs(flat, row, known, self._base)
        place = np.searchsorted(self._pair_codes, codes)
        place[place == len(self._pair_codes)] = 0
        hit = self._pair_codes[place] == codes if len(self._pair_codes) else codes < 0
        ids = np.concatenate([flat[known], self._pair_numbers[place[hit]]])
        rows = np.concatenate([row[known], pair_row[hit]])
        empty = np.setdiff1d(np.arange(len(notes)), rows)
        ids = np.concatenate([ids, np.full(len(empty), UNKNOWN)])
        key, count = np.unique(np.concatenate([rows, empty]) * self._base + ids, return_counts=True)
        rows, ids = np.divmod(key, self._base)
        idf = np.concatenate([[1.0], self.idf])[ids]
        weight = (1 + np.log(count)) * idf
        norm = np.sqrt(np.bincount(rows, weight**2, minlength=len(notes)))
        weight *= np.exp((1 - idf) / 2) / norm[rows]
        offsets = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(notes)))])
        return ids.astype("int32"), weight.astype("float32"), offsets.astype("int64")


def _flatten(notes: Iterable[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Word numbers of all notes in one array, and the note of each."""
    parts = [np.array(note, dtype="int64") for note in notes]
    row = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    return np.concatenate([*parts, np.empty(0, "int64")]), row


def _pairs(
    flat: np.ndarray, row: np.ndarray, keep: np.ndarray, base: int
) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours within a note, both kept, as first x base + second, and the note of each."""
    both = keep[:-1] & keep[1:] & (row[:-1] == row[1:])
    return flat[:-1][both] * base + flat[1:][both], row[:-1][both]


def _frequent(codes: np.ndarray, row: np.ndarray, min_count: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes that occur in at least `min_count` notes, and in how many."""
    order = np.lexsort((row, codes))
    codes, row = codes[order], row[order]
    new = np.ones(len(codes), dtype=bool)
    new[1:] = (codes[1:] != codes[:-1]) | (row[1:] != row[:-1])
    found, n_notes = np.unique(codes[new], return_counts=True)
    return found[n_notes >= min_count], n_notes[n_notes >= min_count]
