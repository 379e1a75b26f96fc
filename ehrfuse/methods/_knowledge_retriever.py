"""KnowledgeRetriever: from findings in a row to facts, text and numbers of a knowledge graph."""

import hashlib
import warnings
from functools import lru_cache
from itertools import pairwise

import numpy as np
import pandas as pd
from scipy import sparse
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from ehrfuse._runtime import check_option, users_line
from ehrfuse.knowledge import CodeLinker, KnowledgeGraph, NoteLinker, Retriever
from ehrfuse.knowledge._tables import names_code

__all__ = ["KnowledgeRetriever"]

SLICE = 256  # rows whose walks are in memory at once


class KnowledgeRetriever(TransformerMixin, BaseEstimator):
    """Add what a knowledge graph knows of a patient's findings: a text column and numbers.

    Findings are what notes mention of the patient (neither denied nor said of relatives) and what
    codes stand for. From them a walk goes through the graph; facts and community summaries near
    them and alike in words are chosen under a budget of words. No label is read.

    Parameters
    ----------
    graph : KnowledgeGraph
    text : str, list of str or None, default="note"
        Columns of notes.
    codes : dict of str to str or None, default=None
        Columns of codes and their system, such as ``{"diagnoses": "ICD9CM"}``; None where every
        code states it (``"ICD9CM:4280"``). A cell is a code, a list of codes, or a list of records
        with a ``code`` or with lists of codes (visits).
    equivalence : DataFrame or path, default=None
        ICD-9-CM to ICD-10-CM, the general equivalence mapping, for codes that the graph lacks.
    maps : dict of str to dict, default=None
        Codes of other systems to ids of nodes: ``{"ATC": {"B01AA03": "DB00682"}}``.
    passages : list of (str, str), default=()
        Further texts that may be shown, with what identifies them, such as PMIDs.
    abbreviations : dict of str to str, default=None
        Short forms beside the built-in ones.
    fuzzy : float or None, default=None
        Similarity (of 100) from which on a misspelled word is mended; None takes words as they are.
    cutoff : str, int or date, default=None
        Facts known on that day or later are left out.
    budget : int, default=96
        Words of a row's knowledge at most.
    follow, hub_penalty, redundancy, coverage : float, default=0.5
        See `ehrfuse.knowledge.Retriever`.
    rankers : tuple of {"graph", "words"}, default=("graph", "words")
    encoder : str, default=None
        A Hugging Face text encoder that ranks too, by folder or hub name.
    cache : path, default=None
        Of its vectors, an sqlite file.
    n_communities : int, default=16
        Communities whose share of the walk becomes a number: those that vary most in `fit`.
    control : {None, "random", "shuffled"}, default=None
        For honest measurement. "random" shows as many words of facts drawn at random and counts
        from as many random nodes; "shuffled" joins every head to a random tail of its relation.
    prefix : str, default="knowledge"
        Name of the text column; numbers are called ``knowledge__...``.
    random_state : int, default=0
        Of communities and controls.

    Attributes
    ----------
    idf_ : array of shape (n_nodes,)
        Rarity of every node among the training rows.
    communities_ : array of int
        Communities that became numbers.
    columns_out_ : list of str
        The columns that are added, the text column first.

    See Also
    --------
    KnowledgeAugmentedRiskModel : Uses it in two stages.

    Notes
    -----
    Features: numbers of mentions, denials and relatives' findings, of codes known and unknown;
    ``links``, facts of every relation with both ends among the findings; ``mass``, the share of
    the walk at every type of node; ``community``, that in single communities.

    Learned in `fit`: `idf_` and `communities_`, from the rows given and without labels.

    Examples
    --------
    >>> import pandas as pd
    >>> from ehrfuse import KnowledgeGraph, KnowledgeRetriever
    >>> table = pd.DataFrame(
    ...     {"head": ["warfarin"], "relation": ["interacts_with"], "tail": ["amiodarone"]}
    ... )
    >>> X = pd.DataFrame({"note": ["On warfarin, started amiodarone.", "Well.", None]})
    >>> found = KnowledgeRetriever(KnowledgeGraph.from_triples(table)).fit_transform(X)
    >>> found["knowledge"].tolist()
    ['warfarin interacts with amiodarone.', '', nan]
    >>> found["knowledge__links_interacts_with"].tolist()
    [1.0, 0.0, nan]
    """

    def __init__(
        self,
        graph,
        *,
        text="note",
        codes=None,
        equivalence=None,
        maps=None,
        passages=(),
        abbreviations=None,
        fuzzy=None,
        cutoff=None,
        budget=96,
        follow=0.5,
        hub_penalty=0.5,
        redundancy=0.5,
        coverage=0.5,
        rankers=("graph", "words"),
        encoder=None,
        cache=None,
        n_communities=16,
        control=None,
        prefix="knowledge",
        random_state=0,
    ):
        self.graph = graph
        self.text = text
        self.codes = codes
        self.equivalence = equivalence
        self.maps = maps
        self.passages = passages
        self.abbreviations = abbreviations
        self.fuzzy = fuzzy
        self.cutoff = cutoff
        self.budget = budget
        self.follow = follow
        self.hub_penalty = hub_penalty
        self.redundancy = redundancy
        self.coverage = coverage
        self.rankers = rankers
        self.encoder = encoder
        self.cache = cache
        self.n_communities = n_communities
        self.control = control
        self.prefix = prefix
        self.random_state = random_state

    def fit(self, X, y=None):
        """Learn how rare findings are, and which communities vary, from training rows.

        Parameters
        ----------
        X : DataFrame of shape (n_samples, n_columns)
        y : ignored

        Returns
        -------
        self : KnowledgeRetriever
        """
        self._check()
        self.built_with_ = dict(self.get_params(deep=False))
        self._build()
        self.feature_names_in_ = np.asarray(X.columns, dtype=object)
        counts = self._findings(X).counts
        if not counts.nnz and self._known(X).any():
            warnings.warn(
                f"Nothing in the columns {self._columns()} of {len(X)} rows occurs in the graph, "
                "so no knowledge is added; compare its names with the language of the notes, and "
                "its equivalences with the codes' system.",
                UserWarning,
                stacklevel=users_line(),
            )
        seen = np.bincount(counts.indices, minlength=counts.shape[1])
        self.idf_ = np.log((1 + len(X)) / (1 + seen)) + 1
        members = self._engine.communities.members
        spread = np.zeros(members.shape[0])
        coarse = np.flatnonzero(self._engine.communities.level == 0)
        if len(coarse):
            share = [(members[coarse] @ mass.T).T for mass in self._walks(X)]
            spread[coarse] = np.concatenate(share).std(axis=0)
        best = np.argsort(-spread, kind="stable")[: self.n_communities]
        self.communities_ = np.sort(best[spread[best] > 0])
        self.columns_out_ = [self.prefix, *self._number_names()]
        return self

    def transform(self, X):
        """Add the columns.

        Parameters
        ----------
        X : DataFrame of shape (n_samples, n_columns)

        Returns
        -------
        X : DataFrame
            With the text column, null where a row has neither note nor codes, and the numbers.
        """
        check_is_fitted(self, "idf_")
        self._refuse_taken(X)
        texts, numbers = [], []
        for part in self._retrieved(X):
            texts += [" ".join(self._engine.retriever.texts[d] for d in docs) for docs in part.docs]
            numbers.append(self._numbers(part))
        numbers = np.concatenate(numbers or [np.zeros((0, len(self.columns_out_) - 1))])
        known = self._known(X)
        numbers[~known] = np.nan
        table = pd.DataFrame(numbers, columns=self.columns_out_[1:], index=X.index)
        column = pd.Series(texts, index=X.index, dtype=object).where(known, np.nan)
        table.insert(0, self.prefix, column)
        return pd.concat([X, table], axis=1)

    def explain(self, X):
        """Mentions and documents of every row.

        Parameters
        ----------
        X : DataFrame of shape (n_samples, n_columns)

        Returns
        -------
        found : list of (DataFrame, DataFrame)
            Mentions (column, start, end, text, id, name, negated, family), and documents in their
            order of choice (text, kind, triple_ids, sources, evidence, score).
        """
        check_is_fitted(self, "idf_")
        found = self._findings(X)
        graph, retriever = self._engine.graph, self._engine.retriever
        mentions = [[] for _ in range(len(X))]
        for column, notes, m in found.mentions:
            parts = zip(m.note, m.start, m.end, m.node, m.negated, m.family, strict=True)
            for row, a, b, node, negated, family in parts:
                mentions[row].append((column, int(a), int(b), notes[row][a:b],
                                      graph.node_ids[node], graph.node_names[node], bool(negated),
                                      bool(family)))  # fmt: skip
        told = []
        for part in self._retrieved(X):
            for docs, scores in zip(part.docs, part.scores, strict=True):
                some = [retriever.document(int(d)) for d in docs]
                told.append(pd.DataFrame({
                    "text": [d.text for d in some], "kind": [d.kind for d in some],
                    "triple_ids": [d.triple_ids.tolist() for d in some],
                    "sources": ["; ".join(d.sources) for d in some],
                    "evidence": ["; ".join(d.evidence) for d in some], "score": scores,
                }))  # fmt: skip
        names = ["column", "start", "end", "text", "id", "name", "negated", "family"]
        return [(pd.DataFrame(m, columns=names), d) for m, d in zip(mentions, told, strict=True)]

    def get_feature_names_out(self, input_features=None):
        """Names of the columns of `transform`.

        Parameters
        ----------
        input_features : ignored

        Returns
        -------
        names : array of str
        """
        check_is_fitted(self, "idf_")
        return np.asarray([*self.feature_names_in_, *self.columns_out_], dtype=object)

    # ------------------------------------------------------------ steps

    def _check(self):
        if not isinstance(self.graph, KnowledgeGraph):
            raise ValueError(
                f"graph is {type(self.graph).__name__}; it must be a KnowledgeGraph, for example "
                "KnowledgeGraph.from_triples('triples.csv')."
            )
        check_option(self.control, "control", (None, "random", "shuffled"))
        if not self._text_columns() and not self.codes:
            raise ValueError(
                "KnowledgeRetriever reads neither notes nor codes; give text or codes."
            )

    def _build(self):
        p = self.built_with_
        self._engine = _engine(
            p["graph"], p["cutoff"], p["control"] == "shuffled", p["random_state"],
            tuple(sorted((p["abbreviations"] or {}).items())), p["fuzzy"],
            tuple(map(tuple, p["passages"])), p["follow"], p["hub_penalty"], p["budget"],
            p["redundancy"], p["coverage"], tuple(p["rankers"]), p["encoder"],
            p.get("cache"),  # a folder is not saved
        )  # fmt: skip
        graph = self._engine.graph
        self._coder = CodeLinker(graph, equivalence=p["equivalence"], maps=p["maps"])
        self._types = sorted({t for t in graph.node_types if t})
        self._type_of = np.array([self._types.index(t) if t else -1 for t in graph.node_types])

    def __getstate__(self):
        """Leave out what can be built again from the graph."""
        state = dict(super().__getstate__())
        for name in ("_engine", "_coder", "_types", "_type_of"):
            state.pop(name, None)
        return state

    def __setstate__(self, state):
        """Build it again."""
        super().__setstate__(state)
        if "built_with_" in vars(self):
            self._build()

    def _text_columns(self):
        return [] if self.text is None else [self.text] if isinstance(self.text, str) else self.text

    def _columns(self):
        return [*self._text_columns(), *(self.codes or {})]

    def _known(self, X):
        return X[self._columns()].notna().any(axis=1).to_numpy()

    def _refuse_taken(self, X):
        taken = [c for c in self.columns_out_ if c in X.columns]
        if taken:
            raise ValueError(f"X has a column {taken[0]!r} already; choose another prefix.")

    def _findings(self, X):
        lost = [c for c in self._columns() if c not in X.columns]
        if lost:
            raise ValueError(
                f"X lacks the columns {lost} that findings are read from; add them, or name yours "
                "in KnowledgeRetriever(text=..., codes=...)."
            )
        return _Findings(self, X)

    def _seeds(self, found):
        seeds = found.counts.copy()
        seeds.data = (1 + np.log(seeds.data)) * self.idf_[seeds.indices]
        return seeds

    def _walks(self, X):
        seeds = self._seeds(self._findings(X))
        for start in range(0, len(X), SLICE):
            yield self._engine.retriever.walk(seeds[start : start + SLICE]).T

    def _retrieved(self, X):
        """Slices of rows with what was found for them."""
        found = self._findings(X)
        seeds = self._seeds(found)
        for start in range(0, len(X), SLICE):
            rows = slice(start, start + SLICE)
            some = seeds[rows]
            queries = self._queries(some)
            plain = self._engine.retriever.retrieve(some, queries)
            if self.built_with_["control"] == "random":
                yield self._random(plain, found, rows, some)
            else:
                yield _Part(plain.docs, plain.scores, plain.mass, found, rows, some)

    def _queries(self, seeds):
        names = self._engine.graph.node_names
        return [" ".join(names[seeds.indices[a:b]]) for a, b in pairwise(seeds.indptr)]

    def _random(self, plain, found, rows, seeds):
        """As many words, drawn at random; as many findings, drawn at random. Row by row alike."""
        retriever, n_nodes = self._engine.retriever, seeds.shape[1]
        docs, drawn = [], sparse.lil_array(seeds.shape)
        for i in range(seeds.shape[0]):
            own = seeds[[i]]
            # Of the whole row: two rows of the same findings must not share what is drawn, or a
            # draw would tell which findings they have.
            key = f"{self.built_with_['random_state']} {found.keys[rows][i]}".encode()
            seed = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest())
            rng = np.random.default_rng(seed)
            n_words = int(retriever.lengths[plain.docs[i]].sum())
            docs.append(retriever.random_documents(n_words, rng))
            nodes = rng.choice(n_nodes, size=min(own.nnz, n_nodes), replace=False)
            drawn[[i], nodes] = np.sort(own.data)[::-1][: len(nodes)]
        drawn = drawn.tocsr()
        mass = retriever.walk(drawn).T
        scores = [np.zeros(len(d)) for d in docs]
        return _Part(docs, scores, mass, found, rows, drawn)

    def _number_names(self):
        names = ["n_mentions", "n_denied", "n_family", "n_codes", "n_codes_unknown"]
        names += [f"links_{r}" for r in self._engine.graph.relations[self._engine.told]]
        names += [f"mass_{t}" for t in self._types]
        names += [f"community_{c}" for c in self.communities_]
        return [f"{self.prefix}__{name}" for name in names]

    def _numbers(self, part):
        engine = self._engine
        links = engine.links_among(part.seeds)
        by_type = np.zeros((len(self._types), part.mass.shape[1]))
        typed = np.flatnonzero(self._type_of >= 0)
        by_type[self._type_of[typed], typed] = 1
        members = engine.communities.members[self.communities_]
        return np.column_stack([
            part.found.tallies[part.rows], links, part.mass @ by_type.T, (members @ part.mass.T).T
        ])  # fmt: skip

    def __sklearn_tags__(self):
        """Tags: frames with text, no array checks."""
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.input_tags.string = True
        tags.no_validation = True
        return tags


class _Part:
    """Some rows: documents, their scores, the walk, the findings and where they are among all."""

    def __init__(self, docs, scores, mass, found, rows, seeds):
        self.docs, self.scores, self.mass = docs, scores, mass
        self.found, self.rows, self.seeds = found, rows, seeds


class _Engine:
    """What depends on the graph and the parameters alone: built once in a process."""

    def __init__(self, graph, linker, communities, retriever):
        self.graph, self.linker, self.communities = graph, linker, communities
        self.retriever = retriever
        self.told = np.array([not names_code(r) for r in graph.relations], dtype=bool)
        shape = (graph.n_nodes, graph.n_nodes)
        facts = graph.facts
        code, head, tail = (facts[c].to_numpy() for c in ("relation", "head", "tail"))
        self.links = [
            sparse.csr_array(
                (np.ones((code == r).sum()), (head[code == r], tail[code == r])), shape
            )
            for r in np.flatnonzero(self.told)
        ]

    def links_among(self, seeds):
        """Facts of every relation with both ends among the findings of a row."""
        has = sparse.csr_array(seeds, copy=True)
        has.data[:] = 1
        found = [np.asarray((has @ link).multiply(has).sum(axis=1)).ravel() for link in self.links]
        return np.column_stack(found) if found else np.zeros((seeds.shape[0], 0))


@lru_cache(maxsize=8)
def _engine(graph, cutoff, shuffled, seed, abbreviations, fuzzy, passages, follow, hub_penalty,
            budget, redundancy, coverage, rankers, encoder, cache):  # fmt: skip
    graph = graph if cutoff is None else graph.before(cutoff)
    graph = graph.shuffled(seed) if shuffled else graph
    linker = NoteLinker(graph, abbreviations=dict(abbreviations), fuzzy=fuzzy)
    communities = graph.communities(random_state=seed)
    retriever = Retriever(
        graph, communities=communities, passages=passages, linker=linker, follow=follow,
        hub_penalty=hub_penalty, budget=budget, redundancy=redundancy, coverage=coverage,
        rankers=rankers, encoder=encoder, cache=cache,
    )  # fmt: skip
    return _Engine(graph, linker, communities, retriever)


class _Findings:
    """Findings of all rows: counts by node, tallies, and the mentions in every column of notes."""

    def __init__(self, retriever, X):
        engine = retriever._engine
        n, self.mentions, rows, nodes = len(X), [], [], []
        self.keys = _row_keys(X) if retriever.built_with_["control"] == "random" else None
        self.tallies = np.zeros((n, 5))
        for column in retriever._text_columns():
            notes = notes_of(X[column])
            m = engine.linker.link_many(notes)
            self.mentions.append((column, notes, m))
            for j, which in enumerate((m.own, m.negated, m.family)):
                self.tallies[:, j] += np.bincount(m.note[which], minlength=n)
            rows.append(m.note[m.own])
            nodes.append(m.node[m.own])
        for column, system in (retriever.built_with_["codes"] or {}).items():
            for row, cell in enumerate(X[column].to_numpy(dtype=object)):
                for code in codes_in(cell):
                    found = retriever._coder.nodes_of(code, system)
                    self.tallies[row, 3 if found else 4] += 1
                    rows.append([row] * len(found))
                    nodes.append(found)
        place = (np.concatenate([*rows, []]).astype(int), np.concatenate([*nodes, []]).astype(int))
        shape = (n, engine.graph.n_nodes)
        self.counts = sparse.coo_array((np.ones(len(place[0])), place), shape).tocsr()
        self.counts.sum_duplicates()


def _row_keys(X):
    """A number for the content of every row: its numbers and words, whatever else is in X."""
    plain = [c for c in X if not any(isinstance(v, list | dict | np.ndarray) for v in X[c].head(9))]
    table = X[plain].astype(object)
    table = table.where(table.notna(), "").astype(str)
    return pd.util.hash_pandas_object(table, index=False).to_numpy()


def notes_of(column):
    """Notes as strings, empty where null."""
    cells = column.to_numpy(dtype=object)
    known = column.notna().to_numpy()
    for row in np.flatnonzero(known):
        if not isinstance(cells[row], str):
            raise ValueError(
                f"Column {column.name!r} needs text (str) or null; row {row} holds "
                f"{type(cells[row]).__name__}. Convert the cell to str."
            )
    return [cell if here else "" for cell, here in zip(cells, known, strict=True)]


def codes_in(cell):
    """Codes of a cell: one, a list, or records with codes."""
    if isinstance(cell, str):
        return [cell] if cell else []
    if cell is None or (np.isscalar(cell) and pd.isna(cell)):
        return []
    if isinstance(cell, int | float | np.number):
        return [f"{cell:g}" if isinstance(cell, float) else str(cell)]
    if isinstance(cell, dict):
        values = [v for k, v in cell.items() if k not in ("time", "value")]
        listed = [v for v in values if isinstance(v, str | list | tuple | np.ndarray)]
        return [code for v in listed for code in codes_in(v)]
    return [code for part in cell for code in codes_in(part)]
