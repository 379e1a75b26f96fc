"""Linking: boundaries, the longest name, denials, relatives, slips, codes."""

import pickle
import sys

import numpy as np
import pandas as pd
import pytest

from ehrfuse import KnowledgeGraph
from ehrfuse.knowledge import CodeLinker, NoteLinker
from ehrfuse.knowledge.linking import plain_form

NAMES = ["adult respiratory distress syndrome", "card", "heart failure", "acute heart failure",
         "myocardial infarction", "pneumonia", "sepsis", "diabetes mellitus", "breast cancer",
         "stroke", "hyperkalemia", "non-small cell lung carcinoma", "sjögren's disease", "fever",
         "chronic obstructive pulmonary disease", "ra", "gram negative sepsis"]  # fmt: skip


@pytest.fixture(scope="module")
def graph():
    table = pd.DataFrame({"head": NAMES, "relation": "is_a", "tail": "disease"})
    nodes = pd.DataFrame({"id": ["heart failure"], "aliases": ["cardiac failure"]})
    return KnowledgeGraph.from_triples(table, nodes=nodes)


@pytest.fixture(scope="module", params=["pyahocorasick", "plain"])
def linker(graph, request):
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "plain":
            patch.setitem(sys.modules, "ahocorasick", None)
        linker = NoteLinker(graph)
        yield linker


def found(linker, graph, note):
    """Name of the node: + affirmed, - denied, * of a relative."""
    said = []
    for m in linker.link(note):
        sign = "*" if m.family else "-" if m.negated else "+"
        said.append(sign + graph.node_names[m.node])
        assert note[m.start : m.end] == m.text
    return said


@pytest.mark.parametrize(
    ("note", "expected"),
    [
        ("Acute heart failure.", ["+acute heart failure"]),
        ("Cards consulted; on the card: ARDS.", ["+card", "+adult respiratory distress syndrome"]),
        ("cards, discard", []),
        ("MI in 2001, took mi tablets", ["+myocardial infarction"]),
        ("Ra is fine. RA", ["+ra"]),
        ("heart\n  failure", ["+heart failure"]),
        ("Cardiac-failure", ["+heart failure"]),
        ("Sjogren's disease and SJÖGREN'S DISEASE", ["+sjögren's disease"] * 2),
        ("No evidence of pneumonia.", ["-pneumonia"]),
        ("Denies fever, pneumonia or stroke. Has sepsis.", ["-fever", "-pneumonia", "-stroke",
                                                            "+sepsis"]),
        ("No fever but pneumonia", ["-fever", "+pneumonia"]),
        ("No fever. Pneumonia", ["-fever", "+pneumonia"]),
        ("no fever\n- sepsis", ["-fever", "+sepsis"]),
        ("Stroke was ruled out, sepsis", ["-stroke", "+sepsis"]),
        ("Gram negative sepsis", ["+gram negative sepsis"]),
        ("gram negative rods, pneumonia", ["+pneumonia"]),
        ("non-small cell lung carcinoma", ["+non-small cell lung carcinoma"]),
        ("no increase in pneumonia", ["+pneumonia"]),
        ("Pneumonia cannot be ruled out", ["+pneumonia"]),
        ("Mother had breast cancer. COPD.", ["*breast cancer", "+chronic obstructive pulmonary "
                                             "disease"]),
        ("Family History: stroke. Breast cancer.\n\nSocial: sepsis", ["*stroke", "*breast cancer",
                                                                      "+sepsis"]),
        ("", []),
        ("\x1e pneumonia \U0001f600 sepsis", ["+pneumonia", "+sepsis"]),
    ],
)  # fmt: skip
def test_cases(linker, graph, note, expected):
    assert found(linker, graph, note) == expected


def test_notes_do_not_touch_each_other(linker):
    notes = ["no", "pneumonia", "heart", "failure", "mother", "stroke", "", "sepsis"]
    many = linker.link_many(notes)
    assert many.note.tolist() == [1, 5, 7]
    assert many.own.all()
    assert many.start.tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="Note 1 is a float"):
        linker.link_many(["a", np.nan])


def test_both_finders_agree(graph, monkeypatch):
    rng = np.random.default_rng(0)
    words = [w for name in NAMES for w in name.split()] + ["no", "but", "mother", "was", ".", "\n"]
    notes = [" ".join(rng.choice(words, size=200)) for _ in range(20)]
    fast = NoteLinker(graph).link_many(notes)
    monkeypatch.setitem(sys.modules, "ahocorasick", None)
    plain = NoteLinker(graph).link_many(notes)
    assert len(fast.note) > 200
    for part in vars(fast):
        np.testing.assert_array_equal(getattr(fast, part), getattr(plain, part))


def test_a_denial_reaches_only_so_far(graph):
    note = "No " + "word " * 12 + "pneumonia"
    assert NoteLinker(graph, reach=20).link(note)[0].negated
    assert not NoteLinker(graph, reach=5).link(note)[0].negated


def test_slips_are_mended_only_when_asked(graph):
    note = "Acute myocardial infarctoin, hypokalemia, confusion"
    assert found(NoteLinker(graph), graph, note) == []
    mended = NoteLinker(graph, fuzzy=85)
    assert found(mended, graph, note) == ["+myocardial infarction"]  # hypo is never read as hyper
    with pytest.raises(ValueError, match="between 50 and 100"):
        NoteLinker(graph, fuzzy=0.9)


def test_own_abbreviations_and_ignored_names(graph):
    linker = NoteLinker(graph, abbreviations={"LRTI": "pneumonia"}, ignore=["stroke"])
    assert found(linker, graph, "LRTI, stroke") == ["+pneumonia"]


def test_pickle(graph):
    linker = pickle.loads(pickle.dumps(NoteLinker(graph)))
    assert found(linker, graph, "sepsis") == ["+sepsis"]


def test_plain_form():
    assert plain_form("  Crohn's  DISEASE, ileïtis\t2 ") == "crohn s disease ileitis 2"


def test_missing_package_is_named(graph, monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidfuzz", None)
    with pytest.raises(ImportError, match=r"pip install 'ehrfuse\[graph\]'"):
        NoteLinker(graph, fuzzy=92).link("pneumonja")


# ---------------------------------------------------------------- codes


@pytest.fixture(scope="module")
def coded():
    rows = [("flu", "has_icd9cm", "ICD9CM:487"), ("chf", "has_icd9cm", "ICD9CM:428.0"),
            ("copd", "has_icd10cm", "ICD10CM:J44"), ("D", "treated_by", "DB00682")]  # fmt: skip
    return KnowledgeGraph.from_triples(pd.DataFrame(rows, columns=["head", "relation", "tail"]))


def test_codes(coded):
    gem = pd.DataFrame({"icd_9": ["4280", "49121"], "icd_10": ["I509", "J441"]})
    linker = CodeLinker(coded, equivalence=gem)

    def ids(code, system=None):
        return coded.node_ids[linker.nodes_of(code, system)].tolist()

    assert ids("428.0", "ICD9CM") == ids("4280", "icd9cm") == ["ICD9CM:428.0"]
    assert ids("ICD9CM:4871") == ["ICD9CM:487"]  # the heading above
    assert ids("I50.9", "ICD10CM") == ["ICD9CM:428.0"]  # the other revision
    assert ids("49121", "ICD9CM") == ["ICD10CM:J44"]  # the heading of the other revision
    assert ids("Z99", "ICD10CM") == []
    assert ids("", "ICD10CM") == []
    with pytest.raises(ValueError, match="does not say of which system"):
        linker.nodes_of("4280")


def test_other_systems_by_a_map(coded):
    maps = {"ATC": {"B01AA03": "DB00682"}, "LAB": {50912: ["chf", "flu"]}}
    maps["LAB"] = {str(k): v for k, v in maps["LAB"].items()}
    linker = CodeLinker(coded, maps=maps)
    assert coded.node_ids[linker.nodes_of("b01aa03", "ATC")].tolist() == ["DB00682"]
    assert coded.node_ids[linker.nodes_of("LAB:50912")].tolist() == ["chf", "flu"]
    with pytest.raises(ValueError, match="the graph does not have"):
        CodeLinker(coded, maps={"ATC": {"X": "nobody"}})


def test_shared_tables(shared_data):
    folder = shared_data / "knowledge"
    graph = KnowledgeGraph.from_triples(
        folder / "triples.parquet", head_name="head_name", tail_name="tail_name"
    )
    linker = CodeLinker(graph, equivalence=folder / "codes" / "gem_icd9cm_to_icd10cm.csv.gz")
    assert graph.node_ids[linker.nodes_of("I21.3", "ICD10CM")].tolist()[0].startswith("ICD")
    assert linker.nodes_of("41071", "ICD9CM")
