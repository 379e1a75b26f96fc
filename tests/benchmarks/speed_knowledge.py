"""Speed of the knowledge layer: index, communities, linking, retrieval, and two ratios.

Run ``python tests/benchmarks/speed_knowledge.py --help`` for the options; README.md says what every
line shows.
"""

# ruff: isort: off
from _common import finish, parse, parser, row  # first: it sets the number of threads
import accuracy_knowledge
# ruff: isort: on

import importlib
import sys
import time

import networkx as nx
import numpy as np
import pandas as pd
from scipy import sparse

from ehrfuse import KnowledgeGraph
from ehrfuse.knowledge import NoteLinker, Retriever
from ehrfuse.knowledge.retrieval import Bm25

SECTIONS = ("graph", "linking", "retrieval", "ratios")
TRIPLES, NODES = 100_000, 40_000


def main():
    """Run the sections asked for and print one table."""
    args = parse(parser(__doc__.splitlines()[0], SECTIONS))
    graph, rows = made_graph(args.seeds[0], args.quick), []
    run = {"graph": index, "linking": linking, "retrieval": retrieval, "ratios": ratios}
    for section in args.only:
        rows += run[section](args, graph)
    finish(args, rows)


def made_table(seed, quick):
    """Triples with hubs: both ends are drawn by a power law, as in real graphs."""
    n, size = (TRIPLES // 5, NODES // 5) if quick else (TRIPLES, NODES)
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(1, size + 1) ** 0.7
    # Names of two or three words of a made-up vocabulary, no two alike.
    begins = ("kar", "mel", "tox", "ner", "pul", "ost", "der", "gas", "hep", "ren")
    ends = ("itis", "osis", "emia", "oma", "pathy", "algia", "ism", "ectasia")
    parts = [f"{a}{b}" for a in begins for b in ends]
    tail = [f"{a}{b}" for a in parts for b in ("", "nova")]
    names = [f"{parts[i % 80]} {tail[i // 80 % 160]} {i // 12_800}".removesuffix(" 0")
             for i in range(size)]  # fmt: skip
    ends = rng.choice(size, size=(n, 2), p=share / share.sum())
    relation = rng.choice(
        ["treats", "causes", "is_a", "not_indicated_for"], n, p=[0.4, 0.3, 0.2, 0.1]
    )
    return pd.DataFrame({
        "head": [f"N:{i}" for i in ends[:, 0]], "head_name": [names[i] for i in ends[:, 0]],
        "relation": relation, "tail": [f"N:{i}" for i in ends[:, 1]],
        "tail_name": [names[i] for i in ends[:, 1]],
    })  # fmt: skip


def read(table):
    """A graph of the made-up table."""
    return KnowledgeGraph.from_triples(table, head_name="head_name", tail_name="tail_name")


def made_graph(seed, quick):
    """The graph that all sections share."""
    return read(made_table(seed, quick))


def line(task, model, metric, values, n, args):
    """One row of the table."""
    values = np.atleast_1d(values)
    sd = values.std() if len(values) > 1 else None
    return row("synthetic", task, model, metric, values.mean(), sd, n, seeds=args.seeds)


def best(function, turns=3):
    """Processor seconds of the fastest of several turns: on one thread, whoever else computes."""
    found = []
    for _ in range(turns):
        start = time.process_time()
        function()
        found.append(time.process_time() - start)
    return min(found)


# ---------------------------------------------------------------- graph and communities


def index(args, graph):
    """From a table to a graph, its names, its documents, and its communities."""
    table = made_table(args.seeds[0], args.quick)
    start = time.process_time()
    graph = read(table)
    read_in = time.process_time()
    communities = graph.communities()
    grouped = time.process_time()
    Retriever(graph, communities=communities)
    NoteLinker(graph)
    done = time.process_time()
    task, n = f"index of {graph.n_triples} triples", graph.n_triples
    parts = {"from_triples": read_in - start, "communities": grouped - read_in,
             "documents and names": done - grouped, "all": done - start}  # fmt: skip
    return [line(task, part, "seconds", s, n, args) for part, s in parts.items()]


# ---------------------------------------------------------------- linking


PLAIN = np.array(
    [
        "the",
        "patient",
        "was",
        "seen",
        "today",
        "and",
        "reports",
        "that",
        "pain",
        "has",
        "been",
        "stable",
        "since",
        "last",
        "visit",
        "on",
        "exam",
        "lungs",
        "are",
        "clear",
        "heart",
        "regular",
        "abdomen",
        "soft",
        "plan",
        "continue",
        "current",
        "dose",
        "follow",
        "up",
        "in",
        "two",
        "weeks",
        "with",
        "labs",
        "before",
        "then",
        "discussed",
        "with",
        "family",
        "and",
        "nursing",
        "staff",
    ]
)


def made_notes(graph, n_notes, seed):
    """Notes of everyday words in which one word in twelve begins a finding, often denied."""
    rng = np.random.default_rng(seed)
    names, notes = graph.node_names, []
    for _ in range(n_notes):
        words = rng.choice(PLAIN, size=400).astype(object)
        for place in rng.choice(400, size=33, replace=False):
            name = names[rng.integers(len(names))]
            words[place] = f"no {name}" if rng.random() < 0.3 else name
        words[::15] = [f"{word}." for word in words[::15]]
        notes.append(" ".join(words))
    return notes


def linking(args, graph):
    """Megabytes of notes a second, with negation, with the package and without."""
    made = made_notes(graph, 400 if args.quick else 2000, args.seeds[0])
    rows = _linked(args, "made-up notes, a finding in twelve words", graph, made)
    folder = args.data / "mtsamples" / "mtsamples.parquet"
    real = accuracy_knowledge.shared_graph(args.data)
    if real is None or not folder.exists():
        return rows
    notes = pd.read_parquet(folder)["transcription"].dropna().tolist()
    return rows + _linked(args, "mtsamples, the shared graph", real, notes)


def _linked(args, task, graph, notes):
    size = sum(len(note.encode()) for note in notes) / 1e6
    rows, found, kept = [], [], importlib.import_module("ahocorasick")
    for name in ("pyahocorasick", "without the package"):
        if name != "pyahocorasick":
            sys.modules["ahocorasick"] = None
        linker = NoteLinker(graph)
        sys.modules["ahocorasick"] = kept
        speed = size / best(lambda k=linker: k.link_many(notes))
        found.append(linker.link_many(notes))
        per_note = len(found[-1].note) / len(notes)
        rows.append(line(task, name, "megabytes_per_second", speed, len(notes), args))
        rows.append(line(task, name, "mentions_per_note", per_note, len(notes), args))
    assert (found[0].node == found[1].node).all()
    return rows


# ---------------------------------------------------------------- retrieval


def made_seeds(graph, n, seed):
    """Eight findings a patient."""
    rng = np.random.default_rng(seed)
    place = rng.integers(graph.n_nodes, size=(n, 8))
    rows = np.repeat(np.arange(n), 8)
    shape = (n, graph.n_nodes)
    return sparse.coo_array((np.ones(8 * n), (rows, place.ravel())), shape).tocsr(), place


def retrieval(args, graph):
    """Patients a second at batches of 64: walk, words, fusion and choice."""
    retriever = Retriever(graph, communities=graph.communities())
    n = 128
    seeds, place = made_seeds(graph, n, args.seeds[0])
    queries = [" ".join(graph.node_names[nodes]) for nodes in place]
    seconds = best(lambda: retriever.retrieve(seeds, queries))
    return [
        line("retrieval, batches of 64", "Retriever", "patients_per_second", n / seconds, n, args)
    ]


# ---------------------------------------------------------------- ratios


def ratios(args, graph):
    """The walk against networkx, the words against rank-bm25, in one run."""
    retriever = Retriever(graph)
    n = 64
    seeds, place = made_seeds(graph, n, args.seeds[0])
    ours = best(lambda: retriever.walk(seeds)) / n
    walk = nx.Graph()
    walk.add_nodes_from(range(graph.n_nodes))
    links = sparse.coo_array(retriever._walk)
    walk.add_edges_from(zip(links.row.tolist(), links.col.tolist(), strict=True))
    start = {int(i): 1.0 for i in place[0]}

    def reference():
        nx.pagerank(walk, alpha=retriever.follow, personalization=start, tol=1e-6)

    theirs = best(reference, 2)
    rows = [
        line("personalised PageRank", "networkx", "seconds_per_patient", theirs, 1, args),
        line("personalised PageRank", "Retriever", "seconds_per_patient", ours, n, args),
        line("personalised PageRank", "Retriever", "speedup", theirs / ours, n, args),
    ]
    return rows + _words(args, graph, retriever, place)


def _words(args, graph, retriever, place):
    try:
        from rank_bm25 import BM25Okapi
    except ImportError:
        print("rank-bm25 is not installed: its ratio is left out (pip install rank-bm25).")
        return []
    queries = [" ".join(graph.node_names[nodes]) for nodes in place[:8]]
    ranker, reference = Bm25(retriever.texts), BM25Okapi([t.split() for t in retriever.texts])
    ours = best(lambda: [ranker.scores(query) for query in queries]) / len(queries)
    theirs = best(lambda: [reference.get_scores(query.split()) for query in queries], 2)
    theirs /= len(queries)
    n = len(retriever.texts)
    return [
        line("BM25", "rank-bm25", "seconds_per_query", theirs, n, args),
        line("BM25", "Retriever", "seconds_per_query", ours, n, args),
        line("BM25", "Retriever", "speedup", theirs / ours, n, args),
    ]


if __name__ == "__main__":
    main()
