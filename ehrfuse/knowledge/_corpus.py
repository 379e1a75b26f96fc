"""Triples out of abstracts: by what stands in one sentence, or by a language model."""

import hashlib
import json
import sqlite3
import warnings
from contextlib import closing
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from ehrfuse import _hub, _hub_causal
from ehrfuse.knowledge import _tables
from ehrfuse.knowledge.linking import BOUND, NoteLinker, plain_form

MAX_TRIPLES = 10  # of one abstract
PROMPT = (
    "Read the abstract and list the medical facts that it states, at most ten. Answer with JSON "
    'only: a list of objects with the text fields "head", "relation" and "tail".\n\n'
    "Abstract: {text}\n\nJSON:"
)
AGAIN = "\n\nThe last answer was not JSON of that form. Answer with the JSON list only.\n\nJSON:"


def read_abstracts(corpus, text, id, date, before) -> pd.DataFrame:
    """Columns text, id and date, without what is not known before a day."""
    table = _tables.read_table(corpus)
    names = [text] if isinstance(text, str) else list(text)
    parts = [_tables.column_of(table, name, "text").map(_as_text) for name in names]
    texts = [" ".join(words for words in row if words) for row in zip(*parts, strict=True)]
    ids = _tables.as_words(_tables.column_of(table, id, "id"))
    days = np.full(len(table), "NaT", dtype="datetime64[D]")
    if date is not None:
        days = _tables.known_by(_tables.column_of(table, date, "date"))
    keep = np.ones(len(table), dtype=bool)
    if before is not None:
        keep = np.isnat(days) | (days < _tables.first_day(before))
    abstracts = pd.DataFrame({"text": texts, "id": ids, "date": days})[keep]
    # In an order of its own, so that the order of the file cannot matter.
    return abstracts.sort_values(["id", "text"], kind="stable").reset_index(drop=True)


def _as_text(cell) -> str:
    if isinstance(cell, str):
        return cell
    if isinstance(cell, list | tuple | np.ndarray):
        return " ".join(str(part) for part in cell)
    return "" if pd.isna(cell) else str(cell)


# ---------------------------------------------------------------- co-occurrence


def cooccurring(abstracts, graph, min_count):
    """Pairs of nodes that stand in one sentence, in enough abstracts."""
    texts = abstracts["text"].tolist()
    found = NoteLinker(graph).link_many(texts)
    own = ~found.negated
    pairs = _pairs(texts, found.note[own], found.start[own], found.node[own])
    in_abstract = pairs.drop_duplicates(["a", "b", "abstract"])
    count = in_abstract.groupby(["a", "b"]).size()
    count = count[count >= min_count]
    single = pd.DataFrame({"node": found.node[own], "abstract": found.note[own]})
    single = single.drop_duplicates().groupby("node").size()
    kept = count.reset_index(name="count")
    n = max(1, len(texts))
    joint = kept["count"].to_numpy() / n
    apart = single.reindex(kept["a"]).to_numpy() * single.reindex(kept["b"]).to_numpy() / n**2
    with np.errstate(divide="ignore", invalid="ignore"):
        npmi = np.log(joint / apart) / -np.log(joint)
    npmi = np.where(joint >= 1, 1.0, np.minimum(npmi, 1.0))
    triples = pd.DataFrame({
        "head": graph.node_ids[kept["a"].to_numpy(dtype="int64")], "relation": "cooccurs_with",
        "tail": graph.node_ids[kept["b"].to_numpy(dtype="int64")], "weight": npmi,
    })  # fmt: skip
    known = pairs.merge(kept, on=["a", "b"])
    triples = triples.join(_evidence(known, abstracts, min_count, len(kept), kept))
    triples = triples[npmi > 0]  # met by chance, or less often
    ends = set(triples["head"]) | set(triples["tail"])
    nodes = graph._node_table()
    return nodes[nodes["id"].isin(ends)], triples


def _pairs(texts, note, start, node):
    """Rows (a, b, abstract, sentence, length, from, to) of two nodes in one sentence, a < b."""
    rows = []
    cuts = np.flatnonzero(np.diff(note)) + 1
    for part in np.split(np.arange(len(note)), cuts):
        if len(part) < 2:
            continue
        text = texts[note[part[0]]]
        ends = np.array([m.end() for m in BOUND.finditer(text)] + [len(text)])
        sentence = np.searchsorted(ends, start[part], side="right")
        for which in np.unique(sentence):
            nodes = np.unique(node[part[sentence == which]])
            first = int(ends[which - 1]) if which else 0
            span = (int(note[part[0]]), first, int(ends[which]))
            rows += [(int(a), int(b), *span) for a, b in combinations(nodes, 2)]
    return pd.DataFrame(rows, columns=["a", "b", "abstract", "from", "to"], dtype="int64")


def _evidence(pairs, abstracts, min_count, n, kept):
    """Shortest sentence and its abstract, and the day on which the count was reached."""
    days = abstracts["date"].to_numpy(dtype="datetime64[D]")
    texts, ids = abstracts["text"].tolist(), abstracts["id"].tolist()
    pairs = pairs.assign(length=pairs["to"] - pairs["from"], day=days[pairs["abstract"]])
    groups = dict(list(pairs.groupby(["a", "b"], sort=False)))
    found = []
    for a, b in zip(kept["a"], kept["b"], strict=True):
        rows = groups[a, b]
        each = np.sort(rows.drop_duplicates("abstract")["day"].to_numpy(dtype="datetime64[D]"))
        reached = each[min_count - 1] if not np.isnat(each[:min_count]).any() else each[-1]
        if not np.isnat(reached):  # nothing is shown that was not known then
            rows = rows[rows["day"].to_numpy(dtype="datetime64[D]") <= reached]
        best = rows.sort_values(["length", "abstract"], kind="stable").iloc[0]
        words = texts[best["abstract"]][best["from"] : best["to"]].strip()
        found.append((f"{ids[best['abstract']]}: {words}", reached))
    return pd.DataFrame({
        "evidence": [words for words, _ in found],
        "date": np.array([day for _, day in found], dtype="datetime64[D]"),
    }, index=pd.RangeIndex(n))  # fmt: skip


# ---------------------------------------------------------------- a language model


def extracted(abstracts, extractor, entities, *, max_new_tokens, max_retries, cache):
    """Triples that a model reads out of every abstract; names known to `entities` are its nodes."""
    ask, tag = _asker(extractor, max_new_tokens)
    answers = _answers(abstracts["text"].tolist(), ask, max_retries, cache, tag)
    known = {} if entities is None else _known_names(entities)
    triples, names = [], {}
    for answer, id, day in zip(answers, abstracts["id"], abstracts["date"], strict=True):
        for fact in answer or ():
            ends = []
            for part in ("head", "tail"):
                name = " ".join(fact[part].split())
                place = known.get(plain_form(name), name.lower())
                names.setdefault(place, name if place == name.lower() else "")
                ends.append(place)
            relation = "_".join(fact["relation"].lower().split())
            triples.append((ends[0], relation, ends[1], id, day))
    lost = sum(answer is None for answer in answers)
    if lost:
        warnings.warn(
            f"{lost} of {len(answers)} abstracts gave no JSON of the stated form in "
            f"{max_retries + 1} attempts and are left out.",
            UserWarning,
            stacklevel=4,
        )
    columns = ["head", "relation", "tail", "evidence", "date"]
    nodes = pd.DataFrame({"id": list(names), "name": list(names.values())}, dtype=object)
    if entities is not None:
        table = entities._node_table()
        known_nodes = table[table["id"].isin(names)]
        nodes = pd.concat([nodes[~nodes["id"].isin(table["id"])], known_nodes])
    return nodes, pd.DataFrame(triples, columns=columns)


def _known_names(graph):
    table = graph.aliases
    found: dict[str, str] = {}
    for alias, node in zip(table["alias"], table["node"], strict=True):
        found.setdefault(plain_form(alias), graph.node_ids[node])
    return found


def _asker(extractor, max_new_tokens):
    """A function from prompts to answers, and what its answers depend on."""
    if callable(extractor):
        return extractor, None
    info = _hub.inspect_model(extractor)
    tag = f"{info.fingerprint} {max_new_tokens}"
    return lambda prompts: _hub_causal.continue_texts(
        prompts, info, max_new_tokens=max_new_tokens
    ), tag


def _answers(texts, ask, max_retries, cache, tag):
    """Checked answer to every text, None where no attempt gave one."""
    if cache is not None and tag is None:
        raise ValueError(
            "cache= needs extractor= by name: what a function answers cannot be told from its name."
        )
    found: list[list[dict] | None] = [None] * len(texts)
    store = _Answers(cache)
    for attempt in range(max_retries + 1):
        todo = [i for i, answer in enumerate(found) if answer is None]
        prompts = [PROMPT.format(text=texts[i]) + AGAIN * attempt for i in todo]
        keys = [hashlib.blake2b(f"{tag}\0{p}".encode(), digest_size=16).digest() for p in prompts]
        kept = store.get(keys)
        new = [j for j, key in enumerate(keys) if key not in kept]
        if new:
            said = ask([prompts[j] for j in new])
            store.put({keys[j]: words for j, words in zip(new, said, strict=True)}, kept)
        for i, key in zip(todo, keys, strict=True):
            found[i] = read_answer(kept[key])
    return found


def read_answer(words: str) -> list[dict] | None:
    """Triples of an answer, or None unless it starts with a JSON list of the stated form."""
    start = words.find("[")
    if start < 0:
        return None
    try:
        value, _ = json.JSONDecoder().raw_decode(words[start:])
    except json.JSONDecodeError:
        return None
    parts = ("head", "relation", "tail")
    for fact in value:
        if not isinstance(fact, dict) or set(fact) != set(parts):
            return None
        if not all(isinstance(fact[p], str) and 0 < len(fact[p].strip()) <= 200 for p in parts):
            return None
    return value[:MAX_TRIPLES]


class _Answers:
    """Answers by key in one sqlite file, or nowhere."""

    def __init__(self, path):
        self.path = None if path is None else Path(path).expanduser()

    def get(self, keys):
        """Those that are known."""
        if self.path is None:
            return {}
        with closing(self._open()) as file:
            found = {}
            for key in keys:
                row = file.execute("select words from answers where key = ?", (key,)).fetchone()
                if row:
                    found[key] = row[0]
        return found

    def put(self, new, known):
        """Keep new ones, here and in the file."""
        known.update(new)
        if self.path is not None:
            with closing(self._open()) as file, file:
                file.executemany("insert or replace into answers values (?, ?)", new.items())

    def _open(self):
        file = sqlite3.connect(self.path, timeout=60)
        file.execute("create table if not exists answers (key blob primary key, words text)")
        return file
