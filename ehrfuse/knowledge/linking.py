"""From the record to the graph: mentions in notes, and codes in structured columns."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pandas as pd

from ehrfuse._runtime import import_optional
from ehrfuse.knowledge import _lexicon
from ehrfuse.knowledge._tables import read_table

__all__ = ["CodeLinker", "Mention", "NoteLinker"]

CHUNK = 2_000_000  # characters of notes that are looked through at once
SPACE, END = 32, 0x1E  # between words; between notes
SHORT = 3  # letters; a name this short counts only in capitals
BOUND = re.compile(r"[.;!?](?=\s|$)|\n\s*(?=[-*\u2022\d\n])")
HEADING = re.compile(r"\n[ \t]*\n|\n[ \t]*[A-Z][A-Za-z /]{2,40}:|\x1e")
_KINDS = ("node", "before", "after", "neither", "until", "relative", "family")
NODE, BEFORE, AFTER, NEITHER, UNTIL, RELATIVE, FAMILY = range(7)


@dataclass(frozen=True)
class Mention:
    """A name of a node in a note.

    Attributes
    ----------
    start, end : int
        Characters of the note.
    text : str
        What stands there.
    node : int
        Number of the node.
    negated : bool
        Whether the note denies it.
    family : bool
        Whether it is said of a relative.
    """

    start: int
    end: int
    text: str
    node: int
    negated: bool
    family: bool


@dataclass(frozen=True)
class Mentions:
    """All mentions in many notes, as arrays ordered by note and place."""

    note: np.ndarray
    start: np.ndarray
    end: np.ndarray
    node: np.ndarray
    negated: np.ndarray
    family: np.ndarray

    @property
    def own(self) -> np.ndarray:
        """Whether it is an affirmed finding of the patient."""
        return ~self.negated & ~self.family


class NoteLinker:
    """Find the nodes of a graph that notes mention.

    The longest name wins, names begin and end at words, case does not matter except for names of
    up to three letters, which count in capitals only.

    Parameters
    ----------
    graph : KnowledgeGraph
        Its names and aliases are looked for.
    abbreviations : dict of str to str or sequence of str, default=None
        Short forms and the names they stand for, beside the built-in ones (MI, CHF, COPD ...).
    ignore : sequence of str, default=()
        Names that are not looked for.
    reach : int, default=20
        Words that a denial reaches at most within its clause.
    fuzzy : float or None, default=None
        Similarity from which on an unknown word of at least six letters counts as a slip of a word
        in a name, say 92 of 100; needs rapidfuzz. None takes words as they stand: one letter
        separates *contusion* from *confusion*.

    Examples
    --------
    >>> import pandas as pd
    >>> from ehrfuse import KnowledgeGraph
    >>> from ehrfuse.knowledge import NoteLinker
    >>> table = pd.DataFrame({"head": ["pneumonia"], "relation": ["is_a"], "tail": ["infection"]})
    >>> linker = NoteLinker(KnowledgeGraph.from_triples(table))
    >>> [(m.text, m.negated) for m in linker.link("No pneumonia. Wound infection.")]
    [('pneumonia', True), ('infection', False)]
    """

    def __init__(self, graph, *, abbreviations=None, ignore=(), reach=20, fuzzy=None):
        if fuzzy is not None and not 50 <= fuzzy <= 100:
            raise ValueError(f"fuzzy={fuzzy} must be between 50 and 100, or None.")
        self.reach, self.fuzzy = reach, fuzzy
        names = _names_of(graph, abbreviations or {}, ignore)
        self._kind, self._node, keys = _entries(names)
        self._short = np.array([len(key) <= SHORT for key in keys], dtype=bool)
        self._short &= self._kind == NODE
        self._length = np.array([len(key) for key in keys], dtype="int64")
        self._keys = keys
        self._finder = _finder(keys)
        self._words = sorted({word for key in names for word in key.split() if len(word) > 5})
        self._slips: dict[str, str] = {}

    def link(self, note: str) -> list[Mention]:
        """List the mentions of one note.

        Parameters
        ----------
        note : str

        Returns
        -------
        mentions : list of Mention
        """
        m = self.link_many([note])
        parts = zip(m.start, m.end, m.node, m.negated, m.family, strict=True)
        return [
            Mention(int(a), int(b), note[a:b], int(n), bool(neg), bool(fam))
            for a, b, n, neg, fam in parts
        ]

    def link_many(self, notes: Sequence[str]) -> Mentions:
        """Find the mentions of many notes at once.

        Parameters
        ----------
        notes : sequence of str

        Returns
        -------
        mentions : Mentions
        """
        found = []
        for first, last in _chunks(notes):
            found.append(self._link_chunk(notes[first:last], first))
        if not found:
            found = [_no_mentions()]
        return Mentions(*(np.concatenate(parts) for parts in zip(*found, strict=True)))

    def _link_chunk(self, notes, first):
        text = " \x1e ".join(note.replace("\x1e", " ") for note in notes)
        raw = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="uint32")
        plain, place = _squeeze(raw)
        squeezed = plain.tobytes().decode("utf-32-le")
        if self.fuzzy is not None:
            squeezed, plain, place = self._mend(squeezed, place)
        start, entry = self._finder(squeezed)
        end = start + self._length[entry]
        keep = _capitals(raw, place, start, end) | ~self._short[entry]
        start, end, entry = _longest(start[keep], end[keep], entry[keep])
        if not len(start):
            return _no_mentions()
        kind, a, b = self._kind[entry], place[start], place[end - 1] + 1
        bounds = np.array([m.start() for m in BOUND.finditer(text)], dtype="int64")
        ends = np.flatnonzero(raw == END)
        word = np.cumsum(plain == SPACE)[start]
        clause = np.sort(np.concatenate([bounds, ends, a[kind == UNTIL]]))
        negated = _denied(kind, a, word, clause, self.reach)
        sentence = np.sort(np.concatenate([bounds, ends]))
        heads = np.array([m.start() for m in HEADING.finditer(text)], dtype="int64")
        family = _after(kind == RELATIVE, a, sentence) | _after(kind == FAMILY, a, heads)
        mine = kind == NODE
        note = np.searchsorted(ends, a[mine], side="right")
        offset = np.concatenate([[0], ends + 2])[note]
        return (note + first, a[mine] - offset, b[mine] - offset, self._node[entry[mine]],
                negated[mine], family[mine])  # fmt: skip

    def _mend(self, squeezed, place):
        """Put the word of a name in place of its misspelling; every character keeps its origin."""
        pieces, origins, at = [], [], 0
        for match in re.finditer(r"[^\W\d_]{6,}", squeezed):
            word = match.group()
            right = self._slips.get(word) or self._slips.setdefault(word, self._closest(word))
            if right != word:
                a, b = match.span()
                pieces += [squeezed[at:a], right]
                inside = np.linspace(place[a], place[b - 1], len(right)).astype("int64")
                origins += [place[at:a], inside]
                at = b
        squeezed = "".join([*pieces, squeezed[at:]])
        place = np.concatenate([*origins, place[at:]])
        return squeezed, np.frombuffer(squeezed.encode("utf-32-le"), dtype="uint32"), place

    def _closest(self, word):
        """The word of a name that is alike enough, or the word as it is."""
        place = np.searchsorted(self._words, word)
        if place < len(self._words) and self._words[place] == word:
            return word
        fuzz = import_optional("rapidfuzz", "graph")
        import rapidfuzz.process

        alike = rapidfuzz.process.extractOne(
            word, self._same_start(word), scorer=fuzz.distance.OSA.normalized_similarity,
            score_cutoff=self.fuzzy / 100,
        )  # fmt: skip
        return word if alike is None else alike[0]

    def _same_start(self, word):
        """Words with the first letter; too much and too little of something are never mixed up."""
        lo = np.searchsorted(self._words, word[0])
        hi = np.searchsorted(self._words, chr(ord(word[0]) + 1))
        side = re.match("hyper|hypo", word)
        same = self._words[lo:hi]
        if side:
            return [w for w in same if w.startswith(side.group())]
        return [w for w in same if not re.match("hyper|hypo", w)]


def _names_of(graph, abbreviations, ignore):
    """Plain form of every name to its node; own names win over aliases, then the smaller id."""
    names: dict[str, int] = {}
    table = graph.aliases
    dropped = {plain_form(word) for word in ignore} | _lexicon.EMPTY_NAMES
    for alias, node in zip(table["alias"], table["node"].tolist(), strict=True):
        key = plain_form(alias)
        if len(key) > 1 and not key.replace(" ", "").isdigit() and key not in dropped:
            names.setdefault(key, node)
    for short, full in (_lexicon.ABBREVIATIONS | dict(abbreviations)).items():
        full = [full] if isinstance(full, str) else full
        node = next((names[plain_form(f)] for f in full if plain_form(f) in names), None)
        if node is not None and plain_form(short) not in dropped:
            names.setdefault(plain_form(short), node)
    return names


def _entries(names):
    """Kind, node and key of everything that is looked for; a trigger wins over a name."""
    triggers: dict[str, int] = {}
    for kind, words in ((RELATIVE, _lexicon.RELATIVES), (FAMILY, _lexicon.FAMILY),
                        (UNTIL, _lexicon.UNTIL), (BEFORE, _lexicon.BEFORE),
                        (AFTER, _lexicon.AFTER), (NEITHER, _lexicon.NEITHER)):  # fmt: skip
        for word in words:
            triggers.setdefault(plain_form(word), kind)
    keys = [*triggers, *(name for name in names if name not in triggers)]
    kind = [triggers.get(key, NODE) for key in keys]
    node = [names[key] if k == NODE else -1 for key, k in zip(keys, kind, strict=True)]
    return np.array(kind, dtype="int8"), np.array(node, dtype="int32"), keys


# ---------------------------------------------------------------- plain text


def plain_form(text: str) -> str:
    """Lower case without accents; everything but letters and digits becomes one space."""
    raw = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="uint32")
    return _squeeze(raw)[0].tobytes().decode("utf-32-le").strip()


@lru_cache(maxsize=1)
def _plain_characters() -> np.ndarray:
    """What every character becomes: one character, so that places in the note stay known."""
    table = np.full(0x10000, SPACE, dtype="uint32")
    for code in range(0x10000):
        base = unicodedata.normalize("NFKD", chr(code))[0].lower()[0]
        if base.isalnum():
            table[code] = ord(base)
    table[END] = END
    return table


def _squeeze(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Plain characters with single spaces, one at either end, and where each came from."""
    table = _plain_characters()
    plain = table[np.minimum(raw, 0xFFFF)]
    keep = np.ones(len(plain), dtype=bool)
    keep[1:] = (plain[1:] != SPACE) | (plain[:-1] != SPACE)
    place = np.flatnonzero(keep)
    plain = plain[place]
    edge = np.array([SPACE], dtype="uint32")
    last = len(raw) - 1 if len(raw) else 0
    return np.concatenate([edge, plain, edge]), np.concatenate([[0], place, [last]])


def _chunks(notes):
    """Pairs (first, last) of notes that are looked through together."""
    first, size = 0, 0
    for i, note in enumerate(notes):
        if not isinstance(note, str):
            raise ValueError(
                f"Note {i} is a {type(note).__name__}; notes are str. Put '' where there is none."
            )
        if size and size + len(note) > CHUNK:
            yield first, i
            first, size = i, 0
        size += len(note)
    if first < len(notes):
        yield first, len(notes)


def _capitals(raw, place, start, end):
    """Whether what stands in the note is in capitals: no letter of it is lower case."""
    low = np.concatenate([[0], np.cumsum((raw >= 97) & (raw <= 122))])
    return low[place[end - 1] + 1] == low[place[start]]


def _longest(start, end, entry):
    """From left to right the longest, without overlap."""
    order = np.lexsort((-end, start))
    start, end, entry = start[order], end[order], entry[order]
    kept, free = [], -1
    for i, (a, b) in enumerate(zip(start.tolist(), end.tolist(), strict=True)):
        if a >= free:
            kept.append(i)
            free = b
    return start[kept], end[kept], entry[kept]


def _no_mentions():
    kinds = ("int64", "int64", "int64", "int32", "bool", "bool")
    return tuple(np.zeros(0, dtype=kind) for kind in kinds)


# ---------------------------------------------------------------- what is denied


def _denied(kind, at, word, bounds, reach):
    """Whether a denial before or after it, in the same clause, reaches each."""
    clause = np.searchsorted(bounds, at, side="right")
    before = _nearest(kind == BEFORE, len(kind))
    after = _nearest((kind == AFTER)[::-1], len(kind))[::-1]
    after = np.where(after < 0, -1, len(kind) - 1 - after)
    denied = np.zeros(len(kind), dtype=bool)
    for other in (before, after):
        has = other >= 0
        near = np.abs(word - word[other]) <= reach
        denied |= has & near & (clause == clause[other])
    return denied


def _after(is_trigger, at, bounds):
    """Whether a trigger stands before each without a bound between."""
    part = np.searchsorted(bounds, at, side="right")
    last = _nearest(is_trigger, len(at))
    return (last >= 0) & (part == part[last])


def _nearest(is_trigger, n):
    """Place of the last trigger up to here, or -1."""
    return np.maximum.accumulate(np.where(is_trigger, np.arange(n), -1))


# ---------------------------------------------------------------- finding names


def _finder(keys):
    """A function from squeezed text to the starts and entries of all names in it."""
    try:
        return AhoCorasick(keys)
    except ImportError:
        return WordTrie(keys)


class AhoCorasick:
    """All names in one pass, by pyahocorasick."""

    def __init__(self, keys):
        self.keys = keys
        self.length = np.array([len(key) for key in keys], dtype="int64")
        self._build()

    def _build(self):
        self.automaton = import_optional("ahocorasick", "graph").Automaton()
        for entry, key in enumerate(self.keys):
            # The spaces make sure that a name begins and ends at a word.
            self.automaton.add_word(f" {key} ", entry)
        self.automaton.make_automaton()

    def __call__(self, text):
        """Starts and entries."""
        found = np.fromiter(
            (n for pair in self.automaton.iter(text) for n in pair), dtype="int64"
        ).reshape(-1, 2)
        end, entry = found[:, 0], found[:, 1]
        return end - self.length[entry], entry

    def __getstate__(self):
        """Leave the automaton behind: it is built again from the names."""
        return {key: value for key, value in vars(self).items() if key != "automaton"}

    def __setstate__(self, state):
        vars(self).update(state)
        self._build()


class WordTrie:
    """The same without the package: names by their first word."""

    def __init__(self, keys):
        self.entry = {key: i for i, key in enumerate(keys)}
        self.widths: dict[str, list[int]] = {}
        for key in keys:
            words = key.split()
            widths = self.widths.setdefault(words[0], [])
            if len(words) not in widths:
                widths.append(len(words))

    def __call__(self, text):
        """Starts and entries."""
        words = text.split(" ")
        start = np.concatenate([[0], np.cumsum([len(word) + 1 for word in words])])
        found = []
        for i, word in enumerate(words):
            for width in self.widths.get(word, ()):
                key = word if width == 1 else " ".join(words[i : i + width])
                entry = self.entry.get(key)
                if entry is not None:
                    found.append((start[i], entry))
        both = np.array(found, dtype="int64").reshape(-1, 2)
        return both[:, 0], both[:, 1]


# ---------------------------------------------------------------- codes


class CodeLinker:
    """Find the nodes of a graph that codes stand for.

    An ICD code that the graph does not have is looked for in the other revision, by the general
    equivalence mapping, and then one level up after the other, down to three characters.

    Parameters
    ----------
    graph : KnowledgeGraph
        Nodes with ids such as ``"ICD9CM:428.0"`` and ``"ICD10CM:I50.9"``.
    equivalence : DataFrame or path, default=None
        ICD-9-CM to ICD-10-CM: the columns ``icd_9`` and ``icd_10`` of the general equivalence
        mapping.
    maps : dict of str to dict, default=None
        Nodes of other systems: ``{"ATC": {"B01AA03": "DB00682"}, "LAB": {"50912": ["DOID:1"]}}``;
        ids that the graph lacks are an error.

    Examples
    --------
    >>> import pandas as pd
    >>> from ehrfuse import KnowledgeGraph
    >>> from ehrfuse.knowledge import CodeLinker
    >>> table = pd.DataFrame(
    ...     {"head": ["flu"], "relation": ["has_icd9cm"], "tail": ["ICD9CM:487"]}
    ... )
    >>> graph = KnowledgeGraph.from_triples(table)
    >>> graph.node_ids[CodeLinker(graph).nodes_of("4871", "ICD9CM")].tolist()
    ['ICD9CM:487']
    """

    def __init__(self, graph, *, equivalence=None, maps=None):
        self._codes: dict[tuple[str, str], tuple[int, ...]] = {}
        for node, name in enumerate(graph.node_ids):
            system, colon, code = name.partition(":")
            if colon:
                self._codes[system.upper(), _bare(code)] = (node,)
        for system, mapping in (maps or {}).items():
            for code, ids in mapping.items():
                ids = [ids] if isinstance(ids, str) else list(ids)
                lost = [i for i in ids if graph.node(i) < 0]
                if lost:
                    raise ValueError(
                        f"maps[{system!r}] sends {code!r} to {lost}, which the graph does not have."
                    )
                self._codes[system.upper(), _bare(code)] = tuple(graph.node(i) for i in ids)
        self._other = {} if equivalence is None else _equivalents(read_table(equivalence))

    def nodes_of(self, code: str, system: str | None = None) -> list[int]:
        """Nodes of a code, none where it is unknown.

        Parameters
        ----------
        code : str
            With or without the point; ``"ICD9CM:4280"`` states its system.
        system : str, default=None
            Such as ``"ICD9CM"``; needed where the code does not state it.

        Returns
        -------
        nodes : list of int
        """
        stated, colon, rest = str(code).partition(":")
        if colon:
            system, code = stated, rest
        if system is None:
            raise ValueError(
                f"Code {code!r} does not say of which system it is; name one, or write it as "
                "'ICD9CM:4280'."
            )
        return list(self._nodes_of(_bare(str(code)), system.upper()))

    def _nodes_of(self, code, system):
        found = self._codes.get((system, code))
        if found is None and system in ("ICD9CM", "ICD10CM"):
            found = self._near(code, system)
        return found or ()

    def _near(self, code, system):
        for short in [code[:n] for n in range(len(code), 2, -1)]:
            found = self._codes.get((system, short))
            if found is None:
                others = self._other.get((system, short), ())
                found = next((self._codes[o] for o in others if o in self._codes), None)
            if found is not None:
                return found
        return None


def _bare(code: str) -> str:
    return code.replace(".", "").strip().upper()


def _equivalents(table: pd.DataFrame):
    """Code of one revision to codes of the other, both ways."""
    lost = {"icd_9", "icd_10"} - set(table.columns)
    if lost:
        raise ValueError(f"equivalence lacks the columns {sorted(lost)}; give the GEM table.")
    found: dict[tuple[str, str], list[tuple[str, str]]] = {}
    pairs = zip(table["icd_9"].astype(str), table["icd_10"].astype(str), strict=True)
    for nine, ten in pairs:
        a, b = ("ICD9CM", _bare(nine)), ("ICD10CM", _bare(ten))
        # The heading of either side too: graphs of diseases rarely hold the finest codes.
        for target in (b, (b[0], b[1][:4]), (b[0], b[1][:3])):
            if target not in found.setdefault(a, []):
                found[a].append(target)
        for target in (a, (a[0], a[1][:4]), (a[0], a[1][:3])):
            if target not in found.setdefault(b, []):
                found[b].append(target)
    return found
