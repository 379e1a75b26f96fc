"""Tables of triples as others publish them: which column is what, dates, and words."""

import re
from pathlib import Path

import numpy as np
import pandas as pd

# Column of every part, by source. A pair of names: the second where the first is null.
PRESETS: dict[str, dict] = {
    "primekg": {
        "head": "x_id", "relation": "display_relation", "tail": "y_id", "head_name": "x_name",
        "tail_name": "y_name", "head_type": "x_type", "tail_type": "y_type", "source": "x_source",
    },
    "hetionet": {"head": "source", "relation": "metaedge", "tail": "target"},
    "semmeddb": {
        "head": "SUBJECT_CUI", "relation": "PREDICATE", "tail": "OBJECT_CUI",
        "head_name": "SUBJECT_NAME", "tail_name": "OBJECT_NAME", "head_type": "SUBJECT_SEMTYPE",
        "tail_type": "OBJECT_SEMTYPE", "evidence": "PMID",
    },
    # MRREL states what CUI2 is to CUI1, so CUI2 is the head.
    "umls": {"head": "CUI2", "relation": ("RELA", "REL"), "tail": "CUI1", "source": "SAB"},
}  # fmt: skip

HETIONET = {
    "CtD": "treats", "CpD": "palliates", "CcSE": "causes", "CrC": "resembles", "CbG": "binds",
    "CuG": "upregulates", "CdG": "downregulates", "DpS": "has_symptom", "DlA": "located_in",
    "DrD": "resembles", "DaG": "associates_with", "DuG": "upregulates", "DdG": "downregulates",
    "GiG": "interacts_with", "GcG": "covaries_with", "Gr>G": "regulates", "AeG": "expresses",
    "AuG": "upregulates", "AdG": "downregulates", "GpBP": "participates_in",
    "GpCC": "participates_in", "GpMF": "participates_in", "GpPW": "participates_in",
    "PCiC": "includes",
}  # fmt: skip

MRREL = ["CUI1", "AUI1", "STYPE1", "REL", "CUI2", "AUI2", "STYPE2", "RELA", "RUI", "SRUI", "SAB",
         "SL", "RG", "DIR", "SUPPRESS", "CVF"]  # fmt: skip
MRCONSO = ["CUI", "LAT", "TS", "LUI", "STT", "SUI", "ISPREF", "AUI", "SAUI", "SCUI", "SDUI", "SAB",
           "TTY", "CODE", "STR", "SRL", "SUPPRESS", "CVF"]  # fmt: skip
RRF = {"MRREL": MRREL, "MRCONSO": MRCONSO}

PHRASES = {
    "is_a": "is a kind of",
    "cooccurs_with": "occurs together with",
    "has_symptom": "has the symptom",
    "located_in": "is located in",
    "transmitted_by": "is transmitted by",
    "has_material_basis_in": "is caused by",
    "not_indicated_for": "is not indicated for",
    "contraindication": "is contraindicated in",
    "contraindicated_with": "is contraindicated in",
    "indication": "is indicated for",
    "off-label use": "is used off label for",
    "phenotype absent": "lacks the sign",
    "has_icd9cm": "has the ICD-9-CM code",
    "has_icd10cm": "has the ICD-10-CM code",
    "has_mesh": "has the MeSH term",
}
_NEGATIVE = re.compile(
    r"^(not|no|neg|non|never|lacks|absence|excludes|rules_out)([_\s-]|$)|"
    r"contraindicat|_not_|\bnot\b|does_not|\babsent\b",
    re.IGNORECASE,
)
_CODES = re.compile(r"(^|_)(mesh|icd\d*\w*|xref|snomed\w*|umls|loinc|atc|same_as|mapped_to)($|_)")
_NEGATED = re.compile(r"^(not|no|neg|non)[_\s-]+", re.IGNORECASE)


def is_negative(relation: str) -> bool:
    """Whether a relation denies what its name without the denial would state."""
    return bool(_NEGATIVE.search(relation))


def names_code(relation: str) -> bool:
    """Whether a relation only says what code something has: it leads on, and tells nothing."""
    return bool(_CODES.search(relation.lower()))


def phrase_of(relation: str) -> str:
    """Words of a relation, with the denial in capitals where there is no phrase for it."""
    known = PHRASES.get(relation) or PHRASES.get(relation.lower())
    if known:
        return known
    denied = _NEGATED.match(relation)
    words = relation[denied.end() :] if denied else relation
    words = re.sub(r"[_\s]+", " ", words).strip().lower()
    return f"does NOT ({words})" if denied else words


def read_table(table) -> pd.DataFrame:
    """Read a frame, or a file: CSV, TSV, Parquet, JSON lines or UMLS RRF, packed or not."""
    if isinstance(table, pd.DataFrame):
        return table
    path = Path(table).expanduser()
    if not path.is_file():
        raise ValueError(f"{str(table)!r} is no file; give a DataFrame or the path of a table.")
    kinds = [suffix.lower().lstrip(".") for suffix in path.suffixes]
    if "parquet" in kinds:
        return pd.read_parquet(path)
    if "jsonl" in kinds or "ndjson" in kinds:
        return pd.read_json(path, lines=True, dtype=False)
    if "rrf" in kinds:
        names = RRF.get(path.name.split(".")[0].upper())
        if names is None:
            raise ValueError(f"Of UMLS only MRREL.RRF and MRCONSO.RRF are read, not {path.name}.")
        # Every line ends in a bar, which opens a column without a name.
        return pd.read_csv(path, sep="|", names=[*names, "_"], dtype=str, quoting=3)
    if "tsv" in kinds or "sif" in kinds:
        return pd.read_csv(path, sep="\t", dtype=str)
    if "csv" in kinds:
        return pd.read_csv(path, dtype=str)
    raise ValueError(f"{path.name} is no CSV, TSV, Parquet, JSON lines or RRF file.")


def column_of(table: pd.DataFrame, name, part: str) -> pd.Series:
    """A column by name, or by a pair of names of which the second fills the first."""
    names = [name] if isinstance(name, str) else list(name)
    lost = [n for n in names if n not in table.columns]
    if lost:
        raise ValueError(
            f"{part}={name!r} is no column of the table, which has "
            f"{[str(c) for c in table.columns][:12]}; name its columns, or a preset of "
            f"{sorted(PRESETS)}."
        )
    column = table[names[0]]
    for other in names[1:]:
        column = column.where(column.notna(), table[other])
    return column


def as_words(column: pd.Series) -> np.ndarray:
    """Strings, empty where null; whole numbers without a point."""
    if pd.api.types.is_float_dtype(column.dtype):
        whole = pd.to_numeric(column).dropna()
        column = column.astype("Int64") if (whole == whole.round()).all() else column
    words = column.astype(object).where(column.notna(), "")
    return np.array([str(word).strip() for word in words], dtype=object)


def known_by(column) -> np.ndarray:
    """Day from which on a fact was known; a year or month counts from its end. NaT: unknown."""
    words = as_words(pd.Series(column))
    days = np.full(len(words), "NaT", dtype="datetime64[D]")
    distinct, which = np.unique(words, return_inverse=True)
    found = np.array([_last_day(word) for word in distinct], dtype="datetime64[D]")
    return found[which] if len(words) else days


def _last_day(word: str) -> np.datetime64:
    if not word:
        return np.datetime64("NaT")
    if re.fullmatch(r"\d{4}", word):
        return np.datetime64(f"{word}-12-31")
    if re.fullmatch(r"\d{4}-\d{2}", word):
        return np.datetime64(word, "D") + (np.datetime64(word) + 1 - np.datetime64(word, "D")) - 1
    try:
        return np.datetime64(pd.Timestamp(word).date(), "D")
    except (ValueError, TypeError):
        raise ValueError(
            f"{word!r} is no date; give a year, YYYY-MM, YYYY-MM-DD or null."
        ) from None


def first_day(cutoff) -> np.datetime64:
    """The day that a cut-off stands for; a year is its first day."""
    word = str(cutoff)
    if re.fullmatch(r"\d{4}(-\d{2})?", word):
        return np.datetime64(word, "D")
    try:
        return np.datetime64(pd.Timestamp(cutoff).date(), "D")
    except (ValueError, TypeError):
        raise ValueError(f"cutoff={cutoff!r} is no date; give a year or YYYY-MM-DD.") from None


# ---------------------------------------------------------------- nodes and triples


def columns_of(table, given, preset):
    """Column of every part that the table has."""
    if preset is not None and preset not in PRESETS:
        raise ValueError(
            f"preset={preset!r} is not known; choose one of {sorted(PRESETS)}, or name the columns."
        )
    known = dict(PRESETS.get(preset, {}))
    if preset is None:
        known = {part: part for part in given if part in table.columns}
        known |= {part: part for part in ("head", "relation", "tail")}
    return known | {part: name for part, name in given.items() if name is not None}


def nodes_of_triples(parts):
    """Every end of a triple once, with the first name and type that it is given."""
    ends = []
    for end in ("head", "tail"):
        empty = np.full(len(parts[end]), "", dtype=object)
        ends.append(pd.DataFrame({
            "id": parts[end], "name": parts.get(f"{end}_name", empty),
            "type": parts.get(f"{end}_type", empty),
        }))  # fmt: skip
    nodes = first_words(pd.concat(ends))
    bare = (nodes["type"] == "").to_numpy()
    nodes.loc[bare, "type"] = [namespace(i) for i in nodes.loc[bare, "id"]]
    return nodes


def first_words(nodes):
    """One row per id: name and type are the first in the alphabet, whatever the order of rows."""
    table = pd.DataFrame({"id": np.unique(nodes["id"].to_numpy(dtype=object).astype(object))})
    for part in ("name", "type"):
        known = nodes.loc[nodes[part] != "", ["id", part]].drop_duplicates()
        known = known.sort_values(["id", part]).drop_duplicates("id")
        table[part] = table["id"].map(known.set_index("id")[part]).astype(object)
        table[part] = table[part].where(table[part].notna(), "")
    return table


def namespace(id):
    name = id.partition("::")[0] if "::" in id else id.partition(":")[0]
    if name != id:
        return name
    letters = id.rstrip("0123456789")
    return letters if letters != id and letters.isupper() else ""


def filled(table, columns):
    """The columns asked for, in that order, with what stands for unknown."""
    fill = {"weight": 1.0, "date": np.datetime64("NaT", "D")}
    table = pd.DataFrame(table).reset_index(drop=True)
    full = pd.DataFrame(index=table.index)
    for name in columns:
        if name not in table:
            empty = fill.get(name, "")
            full[name] = pd.Series(empty, index=table.index, dtype=None if name in fill else object)
        elif name in fill:
            full[name] = table[name]
        else:
            full[name] = table[name].astype(object).where(table[name].notna(), "")
    if "weight" in full:
        full["weight"] = full["weight"].astype(float).fillna(1.0)
    return full


def pack(words):
    """Strings as one array of bytes and the ends of the words in it."""
    raw = [str(word).encode() for word in words]
    ends = np.cumsum([len(part) for part in raw], dtype="int64")
    return np.frombuffer(b"".join(raw), dtype="uint8"), ends


def unpack(raw, ends):
    text, starts = raw.tobytes(), np.concatenate([[0], ends[:-1]]) if len(ends) else ends
    words = [text[a:b].decode() for a, b in zip(starts, ends, strict=True)]
    return np.array(words, dtype=object)


def arrays_of(graph, version) -> dict[str, np.ndarray]:
    """Everything in a graph as arrays of numbers: what is written and what is hashed."""
    named = np.where(graph.node_names == graph.node_ids, "", graph.node_names)
    text = {"nodes.id": graph.node_ids, "nodes.name": named, "nodes.type": graph.node_types,
            "relations": graph.relations, "sources": graph.sources, "evidence": graph.evidence,
            "aliases": graph.aliases["alias"].to_numpy(dtype=object)}  # fmt: skip
    arrays = {"ehrfuse_graph": np.array(version)}
    for name, words in text.items():
        arrays[f"{name}.utf8"], arrays[f"{name}.ends"] = pack(words)
    return arrays | {
        "head": graph.head, "relation": graph.relation, "tail": graph.tail, "weight": graph.weight,
        "source": graph.source, "date": graph.date.astype("int64"), "triple_id": graph.triple_id,
        "alias_node": graph.aliases["node"].to_numpy(),
    }  # fmt: skip
