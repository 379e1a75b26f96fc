"""KnowledgeGraph: what is read, that nothing is lost or turned round, dates, communities."""

import copy
import gzip
import json
import pickle
import sys

import numpy as np
import pandas as pd
import pytest
import tiny_models

from ehrfuse import KnowledgeGraph
from ehrfuse.knowledge import _corpus, _tables

TRIPLES = pd.DataFrame(
    [
        ("DB1", "treats", "D1", "a", "pmid:1", "2001"),
        ("DB1", "not_indicated_for", "D2", "a", "pmid:2", "2005"),
        ("D1", "cooccurs_with", "D2", "b", "pmid:3", "2010-06"),
        ("D2", "cooccurs_with", "D1", "b", "pmid:4", "2012-03-01"),
        ("D1", "has_symptom", "S1", "b", "", None),
        ("D1", "cooccurs_with", "D2", "c", "pmid:5", "2020"),
    ],
    columns=["head", "relation", "tail", "source", "evidence", "date"],
)
NODES = pd.DataFrame({
    "id": ["D1", "D2", "S1", "DB1"], "name": ["gout", "dementia", "pain", "colchicine"],
    "aliases": ["gouty arthritis|podagra", "", None, "colcrys"],
})  # fmt: skip


@pytest.fixture
def graph():
    return KnowledgeGraph.from_triples(TRIPLES, nodes=NODES)


def test_direction_parallel_relations_and_sources_are_kept(graph):
    table = graph.triples
    assert len(table) == len(TRIPLES)
    both = table[table["relation"] == "cooccurs_with"]
    assert sorted(zip(both["head"], both["tail"], both["source"], strict=True)) == [
        ("D1", "D2", "b"), ("D1", "D2", "c"), ("D2", "D1", "b"),
    ]  # fmt: skip
    assert set(table["evidence"]) == {"pmid:1", "pmid:2", "pmid:3", "pmid:4", "pmid:5", ""}
    assert len(graph.facts) == 5
    assert graph.facts["weight"].sum() == len(TRIPLES)


def test_order_of_rows_does_not_matter(graph):
    other = KnowledgeGraph.from_triples(TRIPLES.sample(frac=1, random_state=1), nodes=NODES[::-1])
    assert other == graph
    assert other.sentences() == graph.sentences()


def test_denials_are_told_as_denials(graph):
    told = [s for s in graph.sentences() if "colchicine" in s]
    assert told == ["colchicine is not indicated for dementia.", "colchicine treats gout."]
    assert graph.relations[graph.negative].tolist() == ["not_indicated_for"]
    assert _tables.phrase_of("NEG_TREATS") == "does NOT (treats)"
    assert _tables.is_negative("NEG_TREATS")
    assert _tables.is_negative("contraindication")
    assert not _tables.is_negative("notable_for")
    assert not _tables.is_negative("cooccurs_with")


def test_cutoff_keeps_what_was_known_before(graph):
    def evidence(cutoff, **options):
        return sorted(graph.before(cutoff, **options).evidence)

    assert evidence(2005) == ["", "pmid:1"]  # dated 2005: known at the end of it at the latest
    assert evidence(2006, undated="drop") == ["pmid:1", "pmid:2"]
    assert evidence("2010-06-30", undated="drop") == ["pmid:1", "pmid:2"]
    assert evidence("2010-07-01", undated="drop") == ["pmid:1", "pmid:2", "pmid:3"]
    assert evidence("2012-03-01", undated="drop") == ["pmid:1", "pmid:2", "pmid:3"]
    early = graph.before(2006)
    numbers = dict(zip(graph.evidence, graph.triple_id, strict=True))
    for word, number in zip(early.evidence, early.triple_id, strict=True):
        assert numbers[word] == number  # a triple keeps its number
    with pytest.raises(ValueError, match="no date"):
        graph.before("soon")


def test_save_and_load(graph, tmp_path):
    graph.before(2011).save(tmp_path / "graph.npz")
    back = KnowledgeGraph.load(tmp_path / "graph.npz")
    assert back == graph.before(2011)
    assert back.sentences() == graph.before(2011).sentences()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["graph.npz"]
    with np.load(tmp_path / "graph.npz", allow_pickle=False) as file:
        assert all(file[name].dtype != object for name in file.files)
    assert pickle.loads(pickle.dumps(graph)) == graph
    assert copy.deepcopy(graph) is graph


def test_files_and_presets(tmp_path):
    prime = pd.DataFrame({
        "relation": ["indication"], "display_relation": ["indication"], "x_id": ["9"],
        "x_type": ["drug"], "x_name": ["aspirin"], "x_source": ["DrugBank"], "y_id": ["8"],
        "y_type": ["disease"], "y_name": ["headache"], "y_source": ["MONDO"],
    })  # fmt: skip
    prime.to_csv(tmp_path / "kg.csv.gz", index=False)
    graph = KnowledgeGraph.from_triples(tmp_path / "kg.csv.gz", preset="primekg")
    assert graph.sentences() == ["aspirin is indicated for headache."]
    assert sorted(graph.node_types) == ["disease", "drug"]
    sif = tmp_path / "hetionet.sif.gz"
    with gzip.open(sif, "wt") as file:
        file.write("source\tmetaedge\ttarget\nCompound::DB1\tCtD\tDisease::D1\n")
    names = pd.DataFrame({
        "id": ["Compound::DB1", "Disease::D1"], "name": ["aspirin", "gout"],
        "kind": ["Compound", "Disease"],
    })  # fmt: skip
    graph = KnowledgeGraph.from_triples(sif, preset="hetionet", nodes=names)
    assert graph.sentences() == ["aspirin treats gout."]
    semmed = pd.DataFrame({
        "PMID": [7], "SUBJECT_CUI": ["C1"], "SUBJECT_NAME": ["Aspirin"], "SUBJECT_SEMTYPE": ["x"],
        "PREDICATE": ["NEG_TREATS"], "OBJECT_CUI": ["C2"], "OBJECT_NAME": ["Gout"],
        "OBJECT_SEMTYPE": ["y"],
    })  # fmt: skip
    graph = KnowledgeGraph.from_triples(semmed, preset="semmeddb")
    assert graph.evidence.tolist() == ["7"]
    assert graph.negative.all()


def test_umls_states_what_the_second_concept_is_to_the_first(tmp_path):
    (tmp_path / "MRREL.RRF").write_text(
        "C1|A|CUI|RO|C2|A|CUI|treats|R||MSH|MSH||N|N||\nC1|A|CUI|CHD|C3|A|CUI||R||MSH|MSH||N|N||\n"
    )
    (tmp_path / "MRCONSO.RRF").write_text("".join(
        f"{cui}|ENG|P|L|PF|S|Y|A||||MSH|MH|X|{name}|0|N||\n"
        for cui, name in (("C1", "Gout"), ("C2", "Colchicine"), ("C3", "Tophus"))
    ))  # fmt: skip
    graph = KnowledgeGraph.from_triples(tmp_path / "MRREL.RRF", preset="umls")
    graph = graph.with_nodes(tmp_path / "MRCONSO.RRF", name="STR")
    assert graph.sentences() == ["Colchicine treats Gout.", "Tophus chd Gout."]


def test_bad_tables_are_named():
    with pytest.raises(ValueError, match="relation='relation' is no column"):
        KnowledgeGraph.from_triples(TRIPLES.drop(columns="relation"))
    with pytest.raises(ValueError, match="preset='wiki' is not known"):
        KnowledgeGraph.from_triples(TRIPLES, preset="wiki")
    with pytest.raises(ValueError, match="finite and above 0"):
        KnowledgeGraph.from_triples(TRIPLES.assign(weight=-1), weight="weight")
    with pytest.raises(ValueError, match="no file"):
        KnowledgeGraph.from_triples("nowhere.csv")


def test_shuffling_keeps_heads_and_tails_of_every_relation():
    rng = np.random.default_rng(0)
    table = pd.DataFrame({
        "head": [f"a{i}" for i in rng.integers(30, size=200)], "relation": "treats",
        "tail": [f"b{i}" for i in rng.integers(30, size=200)],
    }).drop_duplicates()  # fmt: skip
    graph = KnowledgeGraph.from_triples(table)
    other = graph.shuffled(0)
    assert other != graph
    assert other == graph.shuffled(0)
    true = set(zip(graph.head, graph.tail, strict=True))
    false = set(zip(other.head, other.tail, strict=True))
    assert len(true & false) < len(true) / 2
    np.testing.assert_array_equal(np.unique(graph.head), np.unique(other.head))


def test_merge_and_without(graph):
    more = KnowledgeGraph.from_triples(
        pd.DataFrame({"head": ["D2"], "relation": ["is_a"], "tail": ["D9"], "source": ["z"]})
    )
    both = KnowledgeGraph.merge(graph, more)
    assert both.n_triples == graph.n_triples + 1
    assert "dementia is a kind of D9." in both.sentences()
    assert both.without(sources=["z"]).n_triples == graph.n_triples
    with pytest.raises(ValueError, match="are not in the graph"):
        graph.without(relations=["cures"])


# ---------------------------------------------------------------- communities


def planted_groups():
    """Four groups of eight, dense inside, a thread between neighbours; denials across."""
    rows = [(f"g{g}n{i}", "x", f"g{g}n{j}") for g in range(4) for i in range(8) for j in range(i)]
    rows += [(f"g{g}n0", "x", f"g{g + 1}n0") for g in range(3)]
    rows += [(f"g0n{i}", "not_x", f"g3n{j}") for i in range(8) for j in range(8)]
    return KnowledgeGraph.from_triples(pd.DataFrame(rows, columns=["head", "relation", "tail"]))


@pytest.mark.parametrize("without_package", [False, True])
def test_communities_find_planted_groups(without_package, monkeypatch):
    if without_package:
        monkeypatch.setitem(sys.modules, "graspologic_native", None)
    graph = planted_groups()
    found = graph.communities(max_size=10)
    groups = {
        frozenset(name[:2] for name in graph.node_ids[row.indices])
        for row, level in zip(_rows(found.members), found.level, strict=True)
        if level == 0
    }
    assert groups == {frozenset([f"g{g}"]) for g in range(4)}
    again = graph.communities(max_size=10)
    assert (found.members != again.members).nnz == 0


def _rows(members):
    return [members[[i]] for i in range(members.shape[0])]


def test_large_communities_are_split_and_know_their_parent():
    rng = np.random.default_rng(0)
    pairs = rng.integers(300, size=(900, 2))
    table = pd.DataFrame({"head": [f"n{a}" for a, _ in pairs], "relation": "x",
                          "tail": [f"n{b}" for _, b in pairs]})  # fmt: skip
    found = KnowledgeGraph.from_triples(table).communities(max_size=12)
    assert found.level.max() > 0
    for number in np.flatnonzero(found.parent >= 0):
        inside = set(found.members[[number]].indices)
        assert inside <= set(found.members[[found.parent[number]]].indices)
        assert found.level[number] == found.level[found.parent[number]] + 1


def test_summaries_tell_facts_of_the_community_only(graph):
    found = graph.communities()
    assert len(graph.summaries(found)) == len(found)
    sentences = set(graph.sentences())
    for text in graph.summaries(found):
        assert all(f"{part}." in sentences for part in text.rstrip(".").split(". ") if part)


# ---------------------------------------------------------------- corpora

CORPUS = [
    {"pmid": 1, "year": 2001, "contexts": ["Gout causes pain.", "Dementia does not."]},
    {"pmid": 2, "year": 2003, "contexts": ["Severe pain is the mark of podagra."]},
    {"pmid": 3, "year": 2009, "contexts": ["Pain in gout. Colchicine was given."]},
    {"pmid": 4, "year": 2015, "contexts": ["We found pain and gout and dementia."]},
    {"pmid": 5, "year": 2016, "contexts": ["Nothing of note."]},
]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write("\n".join(json.dumps(row) for row in CORPUS))
    return path


def test_cooccurrence_counts_abstracts_and_shows_the_sentence(graph, corpus):
    names = {"text": "contexts", "id": "pmid", "date": "year"}
    found = KnowledgeGraph.from_corpus(corpus, graph, min_count=3, source="pm", **names)
    assert found.sentences() == ["gout occurs together with pain."]
    assert found.evidence.tolist() == ["3: Pain in gout."]
    assert str(found.date[0]) == "2009-12-31"  # the third abstract of the pair
    assert 0 < found.weight[0] <= 1
    two = KnowledgeGraph.from_corpus(corpus, graph, min_count=2, before=2005, **names)
    assert two.evidence.tolist() == ["1: Gout causes pain."]
    none = KnowledgeGraph.from_corpus(corpus, graph, min_count=3, before=2005, **names)
    assert none.n_triples == 0
    frame = pd.DataFrame(CORPUS[::-1])
    assert KnowledgeGraph.from_corpus(frame, graph, min_count=3, source="pm", **names) == found


def test_extraction_checks_the_schema_asks_again_and_leaves_out(graph):
    asked = []

    def model(prompts):
        asked.extend(prompts)
        said = []
        for prompt in prompts:
            if "Severe" in prompt and "not JSON" not in prompt:
                said.append('[{"head": "gout"}]')  # not of the form: asked again
            elif "Nothing" in prompt:
                said.append("I cannot say")
            else:
                said.append('Sure: [{"head": "Podagra", "relation": "Has symptom", "tail": "Pain, '
                            'severe"}] as asked')  # fmt: skip
        return said

    frame = pd.DataFrame(CORPUS).assign(text=lambda t: t["contexts"].str.join(" "))
    with pytest.warns(UserWarning, match="1 of 5 abstracts gave no JSON"):
        found = KnowledgeGraph.from_corpus(frame, graph, id="pmid", extractor=model, max_retries=1)
    assert len(asked) == 5 + 2
    assert set(found.sentences()) == {"gout has the symptom Pain, severe."}  # podagra is gout
    assert sorted(found.evidence) == ["1", "2", "3", "4"]


@pytest.mark.parametrize("answer", [
    "no list", "[", '[{"head": "a", "relation": "b"}]',
    '[{"head": 1, "relation": "b", "tail": "c"}]',
    '[["a", "b", "c"]]', '[{"head": " ", "relation": "b", "tail": "c"}]',
])  # fmt: skip
def test_answers_of_another_form_are_refused(answer):
    assert _corpus.read_answer(answer) is None
    assert _corpus.read_answer("[]") == []


def test_extraction_by_a_local_model_is_cached(tmp_path, monkeypatch):
    model = tiny_models.write_llama(tmp_path / "llama")
    cache = tmp_path / "answers.sqlite"
    frame = pd.DataFrame({"id": ["1", "2"], "text": ["chest pain", "fever"]})
    options = {"extractor": model, "max_new_tokens": 4, "max_retries": 0, "cache": cache}
    with pytest.warns(UserWarning, match="2 of 2 abstracts"):  # random weights write no JSON
        assert KnowledgeGraph.from_corpus(frame, **options).n_triples == 0

    def refuse(*args, **options):
        raise AssertionError("asked again")

    monkeypatch.setattr(_corpus._hub_causal, "continue_texts", refuse)
    with pytest.warns(UserWarning, match="2 of 2 abstracts"):
        KnowledgeGraph.from_corpus(frame, **options)
