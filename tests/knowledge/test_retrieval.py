"""Retrieval: the walk and BM25 against plain references, fusion, selection, determinism."""

import sys

import networkx as nx
import numpy as np
import pandas as pd
import pytest
import tiny_models
from scipy import sparse

from ehrfuse import KnowledgeGraph, _hub
from ehrfuse.knowledge import NoteLinker, Retriever
from ehrfuse.knowledge.retrieval import (
    Bm25,
    TfIdf,
    _column_stochastic,
    fuse_ranks,
    personalized_pagerank,
)


@pytest.fixture(scope="module")
def graph():
    rows = [("warfarin", "treats", "thrombosis"), ("thrombosis", "results_in", "embolism"),
            ("warfarin", "interacts_with", "amiodarone"), ("amiodarone", "treats", "arrhythmia"),
            ("biperiden", "not_indicated_for", "thrombosis"), ("arrhythmia", "is_a", "disease"),
            ("thrombosis", "is_a", "disease"), ("embolism", "is_a", "disease"),
            ("thrombosis", "has_mesh", "MESH:1")]  # fmt: skip
    table = pd.DataFrame(rows, columns=["head", "relation", "tail"])
    return KnowledgeGraph.from_triples(table.assign(evidence=[f"pm{i}" for i in range(9)]))


def seeds_of(graph, *rows):
    found = np.zeros((len(rows), graph.n_nodes))
    for i, names in enumerate(rows):
        found[i, [graph.node(name) for name in names]] = 1
    return sparse.csr_array(found)


def walk_of(edges, n):
    one = sparse.coo_array((np.ones(len(edges)), np.array(edges).T), shape=(n, n)).tocsr()
    both = (one + one.T).tocsr()
    return _column_stochastic(both, np.asarray(both.sum(axis=0)).ravel())


def test_walk_by_hand():
    walk = walk_of([(0, 1), (1, 2)], 3)  # a path
    seeds = sparse.csr_array(np.array([[2.0, 0, 0], [0, 0, 0]]))
    one = personalized_pagerank(walk, seeds, follow=0.5, n_steps=1)
    np.testing.assert_allclose(one[:, 0], [0.5, 0.5, 0.0])
    two = personalized_pagerank(walk, seeds, follow=0.5, n_steps=2)
    np.testing.assert_allclose(two[:, 0], [0.5 + 0.125, 0.25, 0.125])
    np.testing.assert_array_equal(two[:, 1], 0.0)  # no finding, no mass


def test_walk_equals_networkx():
    rng = np.random.default_rng(0)
    edges = np.unique(np.sort(rng.integers(60, size=(200, 2)), axis=1), axis=0)
    edges = edges[edges[:, 0] != edges[:, 1]]
    seeds = np.zeros((2, 60))
    seeds[0, edges[0, 0]], seeds[1, edges[5]] = 1, (1, 3)
    mass = personalized_pagerank(walk_of(edges, 60), sparse.csr_array(seeds), 0.5, 40)
    reference = nx.Graph()
    reference.add_nodes_from(range(60))
    reference.add_edges_from(edges.tolist())
    for row in range(2):
        start = dict(enumerate(seeds[row]))
        found = nx.pagerank(reference, alpha=0.5, personalization=start, tol=1e-12)
        np.testing.assert_allclose(mass[:, row], [found[i] for i in range(60)], atol=1e-6)


def bm25_reference(texts, query, k1=1.5, b=0.75):
    """The formula of Lucene, word by word."""
    tokens = [text.split() for text in texts]
    mean = np.mean([len(text) for text in tokens])
    scores = np.zeros(len(texts))
    for word in set(query.split()):
        holders = sum(word in text for text in tokens)
        idf = np.log(1 + (len(texts) - holders + 0.5) / (holders + 0.5))
        for i, text in enumerate(tokens):
            tf = text.count(word)
            scores[i] += idf * tf / (tf + k1 * (1 - b + b * len(text) / mean))
    return scores


def test_words_rank_as_the_formula():
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(30)]
    texts = [" ".join(rng.choice(words, size=rng.integers(3, 20))) for _ in range(40)]
    ranker = Bm25(texts)
    for _ in range(5):
        query = " ".join(rng.choice(words, size=6))
        np.testing.assert_allclose(ranker.scores(query), bm25_reference(texts, query), atol=1e-5)
    assert not ranker.scores("unheard of").any()
    assert not Bm25(["", ""]).scores("a").any()


def test_words_without_the_package(graph, monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    retriever = Retriever(graph, rankers=("words",))
    assert isinstance(retriever._words, TfIdf)
    found = retriever.retrieve(seeds_of(graph, ["warfarin"]), ["warfarin"])
    assert {"warfarin" in retriever.texts[d] for d in found.docs[0]} == {True}


def test_fused_ranks():
    docs, scores = fuse_ranks([np.array([4, 2, 9]), np.array([2, 7])])
    assert docs.tolist() == [2, 4, 7, 9]
    np.testing.assert_allclose(scores, [1 / 62 + 1 / 61, 1 / 61, 1 / 62, 1 / 63])
    docs, _ = fuse_ranks([np.array([5]), np.array([3])])
    assert docs.tolist() == [3, 5]  # equals by number
    assert not len(fuse_ranks([])[0])


def test_facts_near_the_findings_come_first_with_provenance(graph):
    retriever = Retriever(graph, budget=20)
    found = retriever.retrieve(seeds_of(graph, ["warfarin", "amiodarone"]), ["", ""][:1])
    first = retriever.document(found.docs[0][0])
    assert first.text == "warfarin interacts with amiodarone."
    assert first.evidence == ("pm2",)
    assert graph.evidence[graph.triple_id == first.triple_ids[0]] == ["pm2"]
    total = sum(len(retriever.texts[d].split()) for d in found.docs[0])
    assert 0 < total <= 20
    assert not any("MESH" in retriever.texts[d] for d in found.docs[0])


def test_denials_lead_nowhere_and_are_shown_as_such(graph):
    retriever = Retriever(graph, budget=200)
    found = retriever.retrieve(seeds_of(graph, ["biperiden"]), ["biperiden"])
    assert found.mass[0, graph.node("thrombosis")] == 0
    told = [retriever.texts[d] for d in found.docs[0]]
    assert told == ["biperiden is not indicated for thrombosis."]  # by its words alone


def test_no_finding_gives_nothing(graph):
    found = Retriever(graph).retrieve(seeds_of(graph, []), [""])
    assert not len(found.docs[0])
    assert not found.mass.any()


def test_rows_do_not_depend_on_each_other_nor_on_the_order_of_triples(graph):
    table = graph.triples[["head", "relation", "tail", "evidence"]]
    other = KnowledgeGraph.from_triples(table.sample(frac=1, random_state=3))
    rows = [["warfarin"], ["embolism", "arrhythmia"], [], ["thrombosis"]]
    queries = [" ".join(row) for row in rows]
    a = Retriever(graph, communities=graph.communities(max_size=3))
    b = Retriever(other, communities=other.communities(max_size=3))
    found = a.retrieve(seeds_of(graph, *rows), queries)
    again = b.retrieve(seeds_of(other, *rows), queries)
    for i, row in enumerate(rows):
        alone = a.retrieve(seeds_of(graph, row), [queries[i]])
        np.testing.assert_array_equal(alone.docs[0], found.docs[i])
        np.testing.assert_array_equal(alone.mass[0], found.mass[i])
        np.testing.assert_array_equal(again.docs[i], found.docs[i])


def test_redundancy_is_avoided():
    rows = [("a", f"r{i}", "b") for i in range(6)] + [("a", "r0", "c")]
    graph = KnowledgeGraph.from_triples(pd.DataFrame(rows, columns=["head", "relation", "tail"]))
    seeds = seeds_of(graph, ["a", "b"])

    def second(redundancy):
        retriever = Retriever(
            graph, budget=6, redundancy=redundancy, coverage=0, rankers=("graph",)
        )
        return retriever.texts[retriever.retrieve(seeds, [""]).docs[0][1]]

    assert second(0.0).endswith("b.")
    assert second(2.0).endswith("c.")


def test_passages_keep_their_identifier(graph):
    linker = NoteLinker(graph)
    passages = [("Warfarin after embolism.", "123"), ("Nothing.", "9")]
    retriever = Retriever(graph, passages=passages, linker=linker, rankers=("words",), budget=4)
    found = retriever.retrieve(seeds_of(graph, ["embolism"]), ["after embolism"])
    doc = retriever.document(found.docs[0][0])
    assert (doc.kind, doc.evidence) == ("passage", ("123",))
    assert set(graph.node_ids[doc.nodes]) == {"warfarin", "embolism"}
    with pytest.raises(ValueError, match="need linker="):
        Retriever(graph, passages=passages)


def test_documents_are_encoded_once(graph, tmp_path):
    model = tiny_models.write_bert(tmp_path / "bert")
    before = _hub.encoded["texts"]
    retriever = Retriever(graph, encoder=model, rankers=("graph",))
    assert _hub.encoded["texts"] - before == len(retriever.texts)
    before = _hub.encoded["texts"]
    found = retriever.retrieve(seeds_of(graph, ["warfarin"], []), ["warfarin pain", "no fever"])
    assert _hub.encoded["texts"] - before == 2  # the queries alone
    assert len(found.docs[0])


def test_random_documents_fill_the_same_length(graph):
    retriever = Retriever(graph)
    docs = retriever.random_documents(12, np.random.default_rng(0))
    assert 8 <= sum(retriever.lengths[docs]) <= 12
    assert not len(retriever.random_documents(0, np.random.default_rng(0)))
