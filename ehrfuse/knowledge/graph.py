"""KnowledgeGraph: facts as a directed multigraph in integer arrays, with their provenance."""

import hashlib
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from ehrfuse.knowledge import _tables
from ehrfuse.knowledge._communities import Communities, detect, summarise

__all__ = ["KnowledgeGraph"]

VERSION = 1
NODES = ("id", "name", "type")
TRIPLES = ("head", "relation", "tail", "weight", "source", "evidence", "date")


class KnowledgeGraph:
    """Facts about diseases, drugs and findings: a directed multigraph that never changes.

    Usually made by `from_triples`, `from_corpus` or `load`. Two graphs of the same facts are equal
    whatever the order of the rows; direction, parallel relations and sources are kept.

    Parameters
    ----------
    nodes : DataFrame with columns id, name, type
        Names and types may be empty.
    triples : DataFrame with columns head, relation, tail and any of weight, source, evidence, date
        `head` and `tail` are ids of nodes. `evidence` is what a reader can look up, such as a PMID.
        `date` is the day from which on the fact was known.
    aliases : DataFrame with columns alias, id, default=None
        Further names of nodes.

    Attributes
    ----------
    node_ids, node_names, node_types : arrays of str (n_nodes,)
    relations, sources : arrays of str
    head, relation, tail, source : integer arrays (n_triples,)
        Places in `node_ids`, `relations` and `sources`.
    weight : float array (n_triples,)
    evidence : array of str (n_triples,)
    date : datetime64 array (n_triples,)
        NaT where unknown.
    triple_id : integer array (n_triples,)
        Number of a triple, the same in every part that is cut out of this graph.
    negative : bool array (n_relations,)
        Relations that deny something (``not_indicated_for``). They are told as denials and lead
        nowhere in a walk.
    aliases : DataFrame with columns alias, node

    Examples
    --------
    >>> import pandas as pd
    >>> from ehrfuse import KnowledgeGraph
    >>> table = pd.DataFrame({
    ...     "head": ["warfarin", "biperiden"],
    ...     "relation": ["treats", "not_indicated_for"],
    ...     "tail": ["thrombosis", "dementia"],
    ... })
    >>> graph = KnowledgeGraph.from_triples(table)
    >>> graph.sentences()
    ['biperiden is not indicated for dementia.', 'warfarin treats thrombosis.']
    """

    def __init__(self, nodes, triples, aliases=None):
        nodes = _tables.filled(nodes, NODES)
        order = np.argsort(nodes["id"].to_numpy(dtype=object), kind="stable")
        nodes = nodes.iloc[order]
        if nodes["id"].duplicated().any():
            twice = nodes["id"][nodes["id"].duplicated()].iloc[0]
            raise ValueError(f"Node {twice!r} stands twice in `nodes`; give every id one row.")
        self.node_ids = nodes["id"].to_numpy(dtype=object)
        self.node_types = nodes["type"].to_numpy(dtype=object)
        named = nodes["name"].to_numpy(dtype=object)
        self.node_names = np.where(named == "", self.node_ids, named)
        self._place = {name: i for i, name in enumerate(self.node_ids)}
        self._set_triples(_tables.filled(triples, TRIPLES))
        self.aliases = self._alias_table(aliases)
        self._lock()

    def _set_triples(self, triples):
        triples = triples.drop_duplicates()
        keys = [triples[c].to_numpy(dtype=object).astype(str) for c in TRIPLES[:3]]
        rest = [triples[c].astype(str).to_numpy(dtype=object).astype(str) for c in TRIPLES[3:]]
        order = np.lexsort([*reversed(rest), keys[2], keys[1], keys[0]])
        triples = triples.iloc[order]
        self.head, self.tail = (self._nodes_of(triples[c], c) for c in ("head", "tail"))
        code, names = pd.factorize(triples["relation"], sort=True)
        self.relation, self.relations = code.astype("int32"), np.asarray(names, dtype=object)
        code, names = pd.factorize(triples["source"], sort=True)
        self.source, self.sources = code.astype("int32"), np.asarray(names, dtype=object)
        self.weight = triples["weight"].to_numpy(dtype="float64")
        if not np.isfinite(self.weight).all() or (self.weight <= 0).any():
            raise ValueError("Weights of triples must be finite and above 0; leave out the others.")
        self.evidence = triples["evidence"].to_numpy(dtype=object)
        self.date = triples["date"].to_numpy(dtype="datetime64[D]")
        self.triple_id = np.arange(len(triples), dtype="int64")
        self.negative = np.array([_tables.is_negative(r) for r in self.relations], dtype=bool)

    def _nodes_of(self, ids, part):
        found = np.fromiter((self._place.get(i, -1) for i in ids), "int32", count=len(ids))
        if (found < 0).any():
            lost = ids.iloc[int(np.argmax(found < 0))]
            raise ValueError(f"{part} names {lost!r}, which is no id of `nodes`; add its row.")
        return found

    def _alias_table(self, aliases):
        own = pd.DataFrame({"alias": self.node_names, "node": np.arange(self.n_nodes)})
        own = own[own["alias"].to_numpy() != self.node_ids]
        unnamed = pd.DataFrame({"alias": self.node_ids, "node": np.arange(self.n_nodes)})
        # An id that is a word is a name; one with a namespace is not.
        own = pd.concat([own, unnamed[(self.node_names == self.node_ids) & self._wordy()]])
        if aliases is not None and len(aliases):
            place = aliases["id"].map(self._place)
            more = pd.DataFrame({"alias": aliases["alias"], "node": place})[place.notna()]
            more = more.sort_values(["node", "alias"], kind="stable")
            own = pd.concat([own, more])  # names first: they win over synonyms
        own = own.assign(node=own["node"].astype("int32"), alias=own["alias"].astype(object))
        return own.drop_duplicates().reset_index(drop=True)

    def _wordy(self):
        return np.array([":" not in name for name in self.node_ids], dtype=bool)

    def _lock(self):
        for value in vars(self).values():
            if isinstance(value, np.ndarray):
                value.setflags(write=False)

    # ------------------------------------------------------------ making one

    @classmethod
    def from_triples(
        cls,
        table,
        head=None,
        relation=None,
        tail=None,
        source=None,
        *,
        preset=None,
        head_name=None,
        tail_name=None,
        head_type=None,
        tail_type=None,
        weight=None,
        evidence=None,
        date=None,
        nodes=None,
    ):
        """Read a table of triples.

        Parameters
        ----------
        table : DataFrame or path
            CSV, TSV, Parquet, or MRREL.RRF of UMLS; packed files too.
        head, relation, tail, source : str, default=None
            Columns with the ids of both ends, the relation, and where the triple is from. Without
            a preset those of the same name. Rows without one of the first three are left out.
        preset : {"primekg", "hetionet", "semmeddb", "umls"} or None, default=None
            Column names of a known source; arguments given beside it win.
        head_name, tail_name, head_type, tail_type : str, default=None
            Columns with the names and types of both ends. A type that is nowhere given is the
            namespace of the id (``DOID`` of ``DOID:1115``).
        weight, evidence, date : str, default=None
            Columns with a positive weight (else 1), what can be looked up, and when it was known.
        nodes : DataFrame or path, default=None
            Names of the nodes, where the table has ids only: columns id, name and any of type and
            aliases; Hetionet's ``id, name, kind`` and MRCONSO.RRF of UMLS are known.

        Returns
        -------
        graph : KnowledgeGraph
        """
        given = {
            "head": head, "relation": relation, "tail": tail, "source": source,
            "head_name": head_name, "tail_name": tail_name, "head_type": head_type,
            "tail_type": tail_type, "weight": weight, "evidence": evidence, "date": date,
        }  # fmt: skip
        table = _tables.read_table(table)
        columns = _tables.columns_of(table, given, preset)
        parts = {
            part: _tables.as_words(_tables.column_of(table, name, part))
            for part, name in columns.items()
            if part not in ("weight", "date")
        }
        if preset == "hetionet":
            words = parts["relation"]
            parts["relation"] = np.array([_tables.HETIONET.get(w, w) for w in words], dtype=object)
        triples = pd.DataFrame({c: parts[c] for c in TRIPLES if c in parts})
        if "weight" in columns:
            found = _tables.column_of(table, columns["weight"], "weight")
            triples["weight"] = pd.to_numeric(found, errors="coerce").to_numpy(dtype=float)
        if "date" in columns:
            triples["date"] = _tables.known_by(_tables.column_of(table, columns["date"], "date"))
        whole = (triples[["head", "relation", "tail"]] != "").all(axis=1).to_numpy()
        parts = {part: values[whole] for part, values in parts.items()}
        graph = cls(_tables.nodes_of_triples(parts), triples[whole])
        return graph if nodes is None else graph.with_nodes(nodes)

    @classmethod
    def from_corpus(
        cls,
        corpus,
        entities=None,
        *,
        text="text",
        id="id",
        date=None,
        before=None,
        source="corpus",
        min_count=3,
        extractor=None,
        max_retries=2,
        max_new_tokens=512,
        cache=None,
    ):
        """Read facts out of abstracts.

        Parameters
        ----------
        corpus : DataFrame or path
            JSON lines, Parquet or CSV, one abstract a row.
        entities : KnowledgeGraph, default=None
            Whose nodes are looked for. Two of them in one sentence, in at least `min_count`
            abstracts, give a triple ``cooccurs_with``; its weight is the normalised pointwise
            mutual information, its evidence the shortest such sentence and its abstract, and its
            date that of the abstract with which the count was reached.
        text : str or list of str, default="text"
            Columns that hold the text; a cell may be a list of paragraphs.
        id, date : str, default="id"
            Columns with what identifies an abstract (its PMID) and with its date.
        before : str, int or date, default=None
            Abstracts of that day and later are not read.
        source : str, default="corpus"
            Name of the corpus in the graph.
        min_count : int, default=3
            Abstracts that a pair needs.
        extractor : str, callable or None, default=None
            A causal language model (folder or hub name) that reads triples out of every abstract
            instead, or a function from a list of prompts to a list of answers. Answers must be
            JSON of the stated form; others are asked for again and then left out.
        max_retries : int, default=2
            Times that an answer of another form is asked for again.
        max_new_tokens : int, default=512
            Longest answer.
        cache : path or None, default=None
            An sqlite file that keeps answers by prompt and model, so that a rerun asks nothing.

        Returns
        -------
        graph : KnowledgeGraph
        """
        from ehrfuse.knowledge import _corpus

        abstracts = _corpus.read_abstracts(corpus, text, id, date, before)
        if extractor is not None:
            options = {"max_new_tokens": max_new_tokens, "max_retries": max_retries, "cache": cache}
            found = _corpus.extracted(abstracts, extractor, entities, **options)
        elif entities is None:
            raise ValueError(
                "from_corpus needs entities= (a KnowledgeGraph whose nodes are looked for) or "
                "extractor= (a language model)."
            )
        else:
            found = _corpus.cooccurring(abstracts, entities, min_count)
        nodes, triples = found
        aliases = None if entities is None else entities._alias_ids()
        return cls(nodes, triples.assign(source=source), aliases)

    @classmethod
    def merge(cls, *graphs):
        """Join graphs; nodes of the same id are one node.

        Parameters
        ----------
        *graphs : KnowledgeGraph

        Returns
        -------
        graph : KnowledgeGraph
        """
        first = _tables.first_words(pd.concat([g._node_table() for g in graphs]))
        triples = pd.concat([g._triple_table() for g in graphs])
        return cls(first, triples, pd.concat([g._alias_ids() for g in graphs]))

    def with_nodes(self, table, *, id=None, name=None, type=None, aliases=None, sep="|", prefix=""):
        """Return a graph whose nodes have the names, types and aliases of a table.

        Parameters
        ----------
        table : DataFrame or path
            Rows of ids that are not in the graph are left out.
        id, name, type, aliases : str, default=None
            Columns; None takes those of the usual names where they are there.
        sep : str, default="|"
            Between several aliases in one cell.
        prefix : str, default=""
            Goes before every id of the table, such as ``"ICD9CM:"``.

        Returns
        -------
        graph : KnowledgeGraph
        """
        table = _tables.read_table(table)
        usual = {"id": ("id", "CUI"), "name": ("name",), "type": ("type", "kind"),
                 "aliases": ("aliases", "synonyms", "STR")}  # fmt: skip
        given = {"id": id, "name": name, "type": type, "aliases": aliases}
        for part, names in usual.items():
            if given[part] is None:
                given[part] = next((n for n in names if n in table.columns), None)
        if given["id"] is None:
            _tables.column_of(table, "id", "id")
        parts = {p: _tables.as_words(_tables.column_of(table, n, p)) for p, n in given.items() if n}
        ids = np.array([prefix + word for word in parts["id"]], dtype=object)
        nodes = self._node_table().set_index("id")
        for part in ("name", "type"):
            if part in parts:
                found = pd.Series(parts[part], index=ids)
                found = found[(found != "") & found.index.isin(nodes.index)]
                found = found[~found.index.duplicated()]
                nodes.loc[found.index, part] = found
        more = [self._alias_ids()]
        if "aliases" in parts:
            words = pd.Series(parts["aliases"]).str.split(sep, regex=False)
            more.append(pd.DataFrame({"alias": words, "id": ids}).explode("alias"))
            more[-1]["alias"] = more[-1]["alias"].str.strip()
            more[-1] = more[-1][more[-1]["alias"].fillna("") != ""]
        return self._with(nodes=nodes.reset_index(), aliases=pd.concat(more))

    def _with(self, nodes=None, triples=None, aliases=None):
        nodes = self._node_table() if nodes is None else nodes
        aliases = self._alias_ids() if aliases is None else aliases
        if triples is not None:
            return KnowledgeGraph(nodes, triples, aliases)
        other = KnowledgeGraph(nodes, self._triple_table(), aliases)
        other.triple_id = self.triple_id
        return other

    # ------------------------------------------------------------ parts of it

    def before(self, cutoff, undated="keep"):
        """Facts known before a day, so that no literature newer than the cohort is used.

        Parameters
        ----------
        cutoff : str, int or date
            Facts of that day and later are left out; a year is its first day. A fact dated by its
            year alone counts from the end of that year.
        undated : {"keep", "drop"}, default="keep"
            What becomes of facts without a date, those of ontologies.

        Returns
        -------
        graph : KnowledgeGraph
            The nodes stay.
        """
        if undated not in ("keep", "drop"):
            raise ValueError(f"undated={undated!r} is not known; choose 'keep' or 'drop'.")
        unknown = np.isnat(self.date)
        keep = ~unknown & (self.date < _tables.first_day(cutoff))
        return self._cut(keep | (unknown if undated == "keep" else False))

    def without(self, *, relations=(), sources=()):
        """Return the graph without some relations and sources.

        Parameters
        ----------
        relations, sources : sequence of str, default=()

        Returns
        -------
        graph : KnowledgeGraph
        """
        for names, known, part in ((relations, self.relations, "relations"),
                                   (sources, self.sources, "sources")):  # fmt: skip
            lost = sorted(set(names) - set(known))
            if lost:
                raise ValueError(f"{part} {lost} are not in the graph; it has {list(known)}.")
        gone = np.isin(self.relations, list(relations))[self.relation]
        return self._cut(~(gone | np.isin(self.sources, list(sources))[self.source]))

    def _cut(self, keep):
        other = KnowledgeGraph.__new__(KnowledgeGraph)
        vars(other).update(
            {k: v for k, v in vars(self).items() if k not in ("fingerprint", "facts")}
        )
        for part in ("head", "relation", "tail", "source", "weight", "evidence", "date",
                     "triple_id"):  # fmt: skip
            setattr(other, part, getattr(self, part)[keep])
        for part in ("relation", "source"):  # names that nothing has any more go too
            left, code = np.unique(getattr(other, part), return_inverse=True)
            setattr(other, part, code.astype("int32"))
            setattr(other, f"{part}s", getattr(self, f"{part}s")[left])
        other.negative = self.negative[np.isin(self.relations, other.relations)]
        other._lock()
        return other

    def shuffled(self, random_state=0):
        """Return a control: every relation keeps its heads and its tails, but not which goes where.

        Parameters
        ----------
        random_state : int, default=0

        Returns
        -------
        graph : KnowledgeGraph
        """
        rng = np.random.default_rng(random_state)
        tail = self.tail.copy()
        for code in range(len(self.relations)):
            rows = np.flatnonzero(self.relation == code)
            tail[rows] = tail[rng.permutation(rows)]
        triples = self._triple_table()
        triples["tail"] = self.node_ids[tail]
        return self._with(triples=triples)

    # ------------------------------------------------------------ reading it

    @property
    def n_nodes(self):
        """Number of nodes."""
        return len(self.node_ids)

    @property
    def n_triples(self):
        """Number of triples."""
        return len(self.head)

    @property
    def triples(self):
        """All triples with names and provenance, as a DataFrame."""
        table = self._triple_table()
        table.insert(1, "head_name", self.node_names[self.head])
        table.insert(4, "tail_name", self.node_names[self.tail])
        return table.assign(triple_id=self.triple_id)

    def node(self, id):
        """Number of the node of an id, or -1.

        Parameters
        ----------
        id : str

        Returns
        -------
        node : int
        """
        return self._place.get(id, -1)

    @cached_property
    def facts(self):
        """Distinct (head, relation, tail): a frame with their weight and rows of triples.

        The columns head, relation and tail are numbers, `weight` is summed over sources, and
        `first` to `last` are the rows of the triples that state the fact.
        """
        same = np.ones(max(0, self.n_triples - 1), dtype=bool)
        for part in (self.head, self.relation, self.tail):
            same &= part[1:] == part[:-1]
        first = np.flatnonzero(np.concatenate([[self.n_triples > 0], ~same]))
        weight = np.add.reduceat(self.weight, first) if len(first) else np.zeros(0)
        return pd.DataFrame({
            "head": self.head[first], "relation": self.relation[first], "tail": self.tail[first],
            "weight": weight, "first": first, "last": np.append(first[1:], self.n_triples),
        })  # fmt: skip

    def sentences(self, rows=None):
        """Facts in words; a denial is told as one.

        Parameters
        ----------
        rows : integer array, default=None
            Rows of `facts`; None is all.

        Returns
        -------
        sentences : list of str
        """
        facts = self.facts if rows is None else self.facts.iloc[rows]
        phrases = [_tables.phrase_of(r) for r in self.relations]
        parts = zip(facts["head"], facts["relation"], facts["tail"], strict=True)
        names = self.node_names
        return [f"{names[h]} {phrases[r]} {names[t]}." for h, r, t in parts]

    def communities(self, max_size=50, random_state=0):
        """Find groups of nodes that hang together, at every level of a hierarchy.

        Parameters
        ----------
        max_size : int, default=50
            Larger groups are split further.
        random_state : int, default=0

        Returns
        -------
        communities : Communities
            Hierarchical Leiden with graspologic-native, else Louvain. Denials join nothing.
        """
        return detect(self, max_size, random_state)

    def summaries(self, communities: Communities, max_facts=8):
        """Tell every community by its weightiest facts.

        Parameters
        ----------
        communities : Communities
        max_facts : int, default=8

        Returns
        -------
        summaries : list of str
        """
        return summarise(self, communities, max_facts)

    # ------------------------------------------------------------ as a value

    @cached_property
    def fingerprint(self):
        """Digest of everything in the graph."""
        digest = hashlib.blake2b(digest_size=8)
        for name, array in _tables.arrays_of(self, VERSION).items():
            digest.update(name.encode() + array.tobytes())
        return digest.hexdigest()

    def save(self, path):
        """Write the graph into one ``.npz`` file, which holds numbers and text, and no code.

        Parameters
        ----------
        path : path
        """
        path = Path(path)
        part = path.with_name(path.name + ".part")
        with part.open("wb") as file:  # a killed run leaves no half file under the real name
            np.savez_compressed(file, **_tables.arrays_of(self, VERSION))
        part.replace(path)

    @classmethod
    def load(cls, path):
        """Read what `save` wrote.

        Parameters
        ----------
        path : path

        Returns
        -------
        graph : KnowledgeGraph
        """
        with np.load(path, allow_pickle=False) as file:
            if "ehrfuse_graph" not in file or int(file["ehrfuse_graph"]) != VERSION:
                raise ValueError(f"{path} holds no graph of this version; save it again.")
            columns = {key: file[key] for key in file.files if key != "ehrfuse_graph"}
        text = {k[:-5]: _tables.unpack(columns[k], columns[f"{k[:-5]}.ends"]) for k in columns
                if k.endswith(".utf8")}  # fmt: skip
        nodes = pd.DataFrame({c: text[f"nodes.{c}"] for c in NODES})
        ids = nodes["id"].to_numpy(dtype=object)
        triples = pd.DataFrame({
            "head": ids[columns["head"]], "relation": text["relations"][columns["relation"]],
            "tail": ids[columns["tail"]], "weight": columns["weight"],
            "source": text["sources"][columns["source"]], "evidence": text["evidence"],
            "date": columns["date"].astype("datetime64[D]"),
        })  # fmt: skip
        aliases = pd.DataFrame({"alias": text["aliases"], "id": ids[columns["alias_node"]]})
        graph = cls(nodes, triples, aliases)
        graph.triple_id = columns["triple_id"]
        return graph

    def _node_table(self):
        named = np.where(self.node_names == self.node_ids, "", self.node_names)
        return pd.DataFrame({"id": self.node_ids, "name": named, "type": self.node_types})

    def _triple_table(self):
        return pd.DataFrame({
            "head": self.node_ids[self.head], "relation": self.relations[self.relation],
            "tail": self.node_ids[self.tail], "weight": self.weight,
            "source": self.sources[self.source], "evidence": self.evidence, "date": self.date,
        })  # fmt: skip

    def _alias_ids(self):
        nodes = self.aliases["node"].to_numpy()
        return pd.DataFrame({"alias": self.aliases["alias"], "id": self.node_ids[nodes]})

    def __deepcopy__(self, memo):
        return self  # it never changes, so a clone of an estimator may share it

    def __eq__(self, other):
        return isinstance(other, KnowledgeGraph) and self.fingerprint == other.fingerprint

    def __hash__(self):
        return hash(self.fingerprint)

    def __repr__(self):
        return (
            f"KnowledgeGraph(n_nodes={self.n_nodes}, n_triples={self.n_triples}, "
            f"fingerprint={self.fingerprint!r})"
        )
