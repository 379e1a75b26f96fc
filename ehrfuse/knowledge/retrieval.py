"""Which facts of a graph matter to a patient: walks, words and vectors, fused under a budget."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from ehrfuse._runtime import import_optional
from ehrfuse.knowledge._communities import Communities, affirmed
from ehrfuse.knowledge._tables import names_code
from ehrfuse.knowledge.linking import plain_form

__all__ = ["Retrieved", "Retriever", "personalized_pagerank"]

RANK_OFFSET = 60  # of reciprocal rank fusion (Cormack et al., SIGIR 2009)
CANDIDATES = 48  # that every ranker puts forward
QUERY_WORDS = 48  # the rarest of a note that are looked up
BATCH = 64


@dataclass(frozen=True)
class Retrieved:
    """What was found for some rows.

    Attributes
    ----------
    docs : list of integer arrays
        Documents of the retriever that were chosen, in their order of choice.
    scores : list of float arrays
        Their fused score.
    mass : float array (n_rows, n_nodes)
        Where the walk from the row's seeds stays.
    """

    docs: list[np.ndarray]
    scores: list[np.ndarray]
    mass: np.ndarray


@dataclass(frozen=True)
class Document:
    """Something that can be shown, and where it comes from.

    Attributes
    ----------
    text : str
    kind : {"fact", "community", "passage"}
    nodes : integer array
    triple_ids : integer array
        Triples that state it.
    sources, evidence : tuple of str
        Their sources, and what can be looked up, such as PMIDs.
    """

    text: str
    kind: str
    nodes: np.ndarray
    triple_ids: np.ndarray
    sources: tuple[str, ...]
    evidence: tuple[str, ...]


class Retriever:
    """Find what a graph knows of a patient's findings. Nothing is learned from patients.

    Facts (every fact in words), community summaries and passages are ranked by a walk from the
    seeds, by BM25, and by vectors if there is an encoder; ranks are fused, and documents are chosen
    one by one for what they add, until the budget is used up.

    Parameters
    ----------
    graph : KnowledgeGraph
    communities : Communities, default=None
        Their summaries are documents too.
    passages : sequence of (str, str), default=()
        Pairs of a text and what identifies it, such as a PMID.
    linker : NoteLinker, default=None
        Finds the nodes in passages; needed with these.
    follow : float, default=0.5
        Probability that the walk goes on instead of returning to the seeds.
    n_steps : int, default=12
        Steps of the walk; what is left out is ``follow ** n_steps``.
    hub_penalty : float, default=0.5
        Mass is divided by the degree to this power before facts are ranked.
    budget : int, default=96
        Words chosen for a row at most.
    redundancy : float, default=0.5
        What an overlap with a chosen document costs, against the best fused score of 1.
    coverage : float, default=0.5
        What a document earns that touches all seeds not yet touched.
    rankers : sequence of {"graph", "words"}, default=("graph", "words")
    encoder : str, default=None
        A Hugging Face text encoder, by folder or hub name. Documents are encoded once.
    cache : path, default=None
        Where vectors are kept, an sqlite file; None is the memory of this process.
    """

    def __init__(
        self,
        graph,
        *,
        communities: Communities | None = None,
        passages: Sequence[tuple[str, str]] = (),
        linker=None,
        follow=0.5,
        n_steps=12,
        hub_penalty=0.5,
        budget=96,
        redundancy=0.5,
        coverage=0.5,
        rankers=("graph", "words"),
        encoder=None,
        cache=None,
    ):
        self.graph, self.budget = graph, budget
        self.follow, self.n_steps = follow, n_steps
        self.redundancy, self.coverage, self.rankers = redundancy, coverage, tuple(rankers)
        adjacency = affirmed(graph)
        degree = np.asarray(adjacency.sum(axis=0)).ravel()
        self._walk = _column_stochastic(adjacency, degree)
        self._penalty = (np.maximum(degree, 1.0) ** -hub_penalty).astype("float32")
        self._collect(communities, passages, linker)
        self._words = None
        if "words" in self.rankers:
            self._words = _word_ranker(self.texts)
        self._dense = _Dense(encoder, cache, self.texts) if encoder is not None else None

    def _collect(self, communities, passages, linker):
        """Documents in a fixed order: facts, communities, passages."""
        graph, facts = self.graph, self.graph.facts
        shown = ~np.array([names_code(r) for r in graph.relations], dtype=bool)
        self._facts = np.flatnonzero(shown[facts["relation"].to_numpy()])
        told = facts.iloc[self._facts]
        self._head, self._tail = told["head"].to_numpy(), told["tail"].to_numpy()
        # Weights are counts or scores of very different sources: only their order of size counts.
        self._strength = np.log1p(told["weight"].to_numpy()).astype("float32")
        self.texts = graph.sentences(self._facts)
        nodes = [np.unique(pair) for pair in zip(self._head, self._tail, strict=True)]
        self._summarised, self._member_share = np.zeros(0, dtype="int64"), None
        if communities is not None:
            summaries = graph.summaries(communities)
            # One that tells a single fact would say it twice.
            single = {"", *self.texts}
            several = [i for i, s in enumerate(summaries) if s not in single]
            self._summarised = np.array(several, dtype="int64")
            members = communities.members[self._summarised]
            size = sparse.diags_array(1 / np.maximum(communities.size[self._summarised], 1))
            self._member_share = (size @ members).tocsr().astype("float32")
            self.texts += [summaries[i] for i in self._summarised]
            nodes += np.split(members.indices, members.indptr[1:-1]) if len(members.data) else []
        self._passage_ids = [name for _, name in passages]
        self.texts += [text for text, _ in passages]
        nodes += _nodes_in([text for text, _ in passages], linker)
        self._nodes = nodes
        self.lengths = np.array([len(text.split()) for text in self.texts], dtype="int64")

    def document(self, doc: int) -> Document:
        """Tell a document and where it comes from.

        Parameters
        ----------
        doc : int

        Returns
        -------
        document : Document
        """
        kind, rows, evidence = "fact", np.zeros(0, dtype="int64"), ()
        if doc < len(self._facts):
            fact = self.graph.facts.iloc[self._facts[doc]]
            rows = np.arange(int(fact["first"]), int(fact["last"]))
        elif doc < len(self._facts) + len(self._summarised):
            kind = "community"
        else:
            kind = "passage"
            name = self._passage_ids[doc - len(self._facts) - len(self._summarised)]
            evidence = (str(name),)
        graph = self.graph
        found = (str(graph.evidence[r]) for r in rows if graph.evidence[r])
        sources = (str(graph.sources[graph.source[r]]) for r in rows)
        return Document(
            self.texts[doc], kind, np.asarray(self._nodes[doc]), graph.triple_id[rows],
            tuple(sorted(set(sources) - {""})), evidence or tuple(sorted(set(found))),
        )  # fmt: skip

    # ------------------------------------------------------------ finding

    def retrieve(self, seeds, queries: Sequence[str]) -> Retrieved:
        """Choose documents for every row.

        Parameters
        ----------
        seeds : sparse array (n_rows, n_nodes)
            Weights of the row's findings.
        queries : sequence of str
            Its words.

        Returns
        -------
        retrieved : Retrieved
        """
        seeds = sparse.csr_array(seeds)
        docs, scores, mass = [], [], []
        for start in range(0, len(queries), BATCH):
            rows = seeds[start : start + BATCH]
            part = self.walk(rows)
            lists = self._ranked(part, rows, queries[start : start + BATCH])
            for i in range(rows.shape[0]):
                d, s = self._choose([ranked[i] for ranked in lists], rows[[i]])
                docs.append(d)
                scores.append(s)
            mass.append(part.T)
        empty = np.zeros((0, self.graph.n_nodes), dtype="float32")
        return Retrieved(docs, scores, np.concatenate(mass or [empty]))

    def walk(self, seeds) -> np.ndarray:
        """Where walks from every row's seeds stay.

        Parameters
        ----------
        seeds : sparse array (n_rows, n_nodes)

        Returns
        -------
        mass : float32 array (n_nodes, n_rows)
        """
        return personalized_pagerank(self._walk, seeds, self.follow, self.n_steps)

    def _ranked(self, mass, seeds, queries):
        """For every ranker, the best documents of every row, best first."""
        lists = []
        if "graph" in self.rankers:
            damped = mass * self._penalty[:, None]
            score = np.sqrt(damped[self._head] * damped[self._tail]) * self._strength[:, None]
            lists.append([_best(score[:, i], 0) for i in range(score.shape[1])])
            if self._member_share is not None and self._member_share.shape[0]:
                score = self._member_share @ damped
                first = len(self._facts)
                lists.append([_best(score[:, i], first) for i in range(score.shape[1])])
        if self._words is not None:
            lists.append([_best(self._words.scores(query), 0) for query in queries])
        if self._dense is not None:
            score = self._dense.scores(queries)
            lists.append([_best(row, 0) for row in score])
        return lists

    def _choose(self, ranked, seeds):
        """Candidates by fused rank; then one after the other the one that adds most."""
        docs, fused = fuse_ranks(ranked)
        if not len(docs):
            return docs, fused
        touched, overlap = self._relations_of(docs, seeds)
        left, free = touched.copy(), self.budget
        worst = np.zeros(len(docs))  # overlap with what is chosen
        open_, chosen = np.ones(len(docs), dtype=bool), []
        scale = fused / fused.max()
        while True:
            gain = scale + self.coverage * left.sum(axis=1) - self.redundancy * worst
            gain[~open_ | (self.lengths[docs] > free)] = -np.inf
            best = int(np.argmax(gain))
            if not gain[best] > 0:
                break
            chosen.append(best)
            open_[best], free = False, free - self.lengths[docs[best]]
            left[:, left[best] > 0] = 0.0
            worst = np.maximum(worst, overlap[best])
        return docs[chosen], fused[chosen]

    def _relations_of(self, docs, seeds):
        """Seed weight that every candidate touches (c, s), and overlap of nodes (c, c)."""
        nodes = [self._nodes[d] for d in docs]
        row = np.repeat(np.arange(len(docs)), [len(n) for n in nodes])
        flat = np.concatenate(nodes).astype("int64")
        known, place = np.unique(np.concatenate([flat, seeds.indices]), return_inverse=True)
        holds = np.zeros((len(docs), len(known)), dtype="float32")
        holds[row, place[: len(flat)]] = 1
        common = holds @ holds.T
        size = np.maximum(np.diag(common), 1)
        overlap = common / np.maximum(size[:, None] + size - common, 1)
        weight = seeds.data / max(seeds.data.sum(), 1e-12)
        return holds[:, place[len(flat) :]] * weight, overlap

    def random_documents(self, n_words: int, rng: np.random.Generator) -> np.ndarray:
        """Documents drawn at random until as many words are together: the control of equal length.

        Parameters
        ----------
        n_words : int
        rng : Generator

        Returns
        -------
        docs : integer array
        """
        chosen, least = [], self.lengths.min(initial=1)
        for doc in rng.permutation(len(self.texts)):
            if self.lengths[doc] <= n_words:
                chosen.append(doc)
                n_words -= self.lengths[doc]
            if n_words < least:
                break
        return np.array(chosen, dtype="int64")


def _nodes_in(texts, linker):
    if not texts:
        return []
    if linker is None:
        raise ValueError("Passages need linker=, which finds the nodes in them.")
    found = linker.link_many(texts)
    cuts = np.searchsorted(found.note, np.arange(1, len(texts)))
    return [np.unique(part) for part in np.split(found.node, cuts)]


# ---------------------------------------------------------------- the walk


def _column_stochastic(adjacency, degree):
    scale = np.divide(1.0, degree, out=np.zeros_like(degree), where=degree > 0)
    return (adjacency @ sparse.diags_array(scale)).tocsr().astype("float32")


def personalized_pagerank(walk, seeds, follow=0.5, n_steps=12) -> np.ndarray:
    """Where walks from every row's seeds stay: ``p <- follow * walk @ p + (1 - follow) * s``.

    Parameters
    ----------
    walk : sparse array (n_nodes, n_nodes)
        Columns sum to one.
    seeds : sparse array (n_rows, n_nodes)
        Weights of at least 0; every row is scaled to sum to one.
    follow : float, default=0.5
        Probability to go on at every step.
    n_steps : int, default=12

    Returns
    -------
    mass : float32 array (n_nodes, n_rows)
    """
    start = np.ascontiguousarray(sparse.csr_array(seeds).T.toarray(), dtype="float32")
    total = start.sum(axis=0)
    start /= np.where(total > 0, total, 1)
    back, mass = (1 - follow) * start, start
    for _ in range(n_steps):
        mass = walk @ mass
        mass *= np.float32(follow)
        mass += back
    return mass


# ---------------------------------------------------------------- ranks


def _best(score, first):
    """Documents with a positive score, best first; equals by number."""
    if len(score) > CANDIDATES:
        # Equal scores at the edge are all taken before they are cut by number.
        edge = np.partition(score, len(score) - CANDIDATES)[len(score) - CANDIDATES]
        place = np.flatnonzero((score >= edge) & (score > 0))
    else:
        place = np.flatnonzero(score > 0)
    order = place[np.argsort(-score[place], kind="stable")[:CANDIDATES]]
    return order + first


def fuse_ranks(ranked: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Reciprocal rank fusion.

    Parameters
    ----------
    ranked : sequence of integer arrays
        Documents, best first.

    Returns
    -------
    docs, scores : arrays
        Every document once, best first; equals by number.
    """
    docs = np.concatenate([*ranked, np.zeros(0, dtype="int64")])
    rank = np.concatenate([*(np.arange(1, len(r) + 1) for r in ranked), np.zeros(0)])
    found, place = np.unique(docs, return_inverse=True)
    score = np.bincount(place, 1 / (RANK_OFFSET + rank), minlength=len(found))
    order = np.argsort(-score, kind="stable")
    return found[order], score[order]


def _word_ranker(texts):
    try:
        return Bm25(texts)
    except ImportError:
        return TfIdf(texts)


class Bm25:
    """BM25 by bm25s."""

    def __init__(self, texts):
        bm25s = import_optional("bm25s", "retrieval")
        tokens = [plain_form(text).split() for text in texts]
        self.vocabulary: dict[str, int] = {}
        for word in (word for text in tokens for word in text):
            self.vocabulary.setdefault(word, len(self.vocabulary))
        holders = np.zeros(len(self.vocabulary))
        for text in tokens:
            holders[[self.vocabulary[word] for word in set(text)]] += 1
        self.idf = np.log(1 + (len(texts) - holders + 0.5) / (holders + 0.5))
        self.model = None
        if self.vocabulary:
            ids = [[self.vocabulary[word] for word in text] for text in tokens]
            self.model = bm25s.BM25()
            self.model.index((ids, self.vocabulary), show_progress=False)
        self.n_texts = len(texts)

    def scores(self, query):
        """Score of every document."""
        words = self.rarest(query)
        if self.model is None or not words:
            return np.zeros(self.n_texts, dtype="float32")
        return self.model.get_scores(words)

    def rarest(self, query):
        """Known words of a query, each once, the rarest first; equals by alphabet."""
        known = {word for word in plain_form(query).split() if word in self.vocabulary}
        ranked = sorted(known, key=lambda word: (-self.idf[self.vocabulary[word]], word))
        return ranked[:QUERY_WORDS]


class TfIdf:
    """The same by cosine of TF-IDF, without the package."""

    def __init__(self, texts):
        from sklearn.feature_extraction.text import TfidfVectorizer

        self.vectorizer = TfidfVectorizer(
            preprocessor=plain_form, tokenizer=str.split, token_pattern=None, sublinear_tf=True
        )
        self.table = None
        if any(plain_form(text) for text in texts):
            self.table = self.vectorizer.fit_transform(texts)
        self.n_texts = len(texts)

    def scores(self, query):
        """Score of every document."""
        if self.table is None:
            return np.zeros(self.n_texts)
        return (self.table @ self.vectorizer.transform([query]).T).toarray().ravel()


class _Dense:
    """Cosine of vectors of an encoder; documents are encoded once, queries as they come."""

    def __init__(self, encoder, cache, texts):
        self.encoder, self.cache = encoder, cache
        self.vectors = self._encode(texts)

    def scores(self, queries):
        """Cosine of every query and document, at least 0."""
        return np.maximum(self._encode(queries) @ self.vectors.T, 0.0)

    def _encode(self, texts):
        from ehrfuse import _hub

        info = _hub.inspect_model(self.encoder)
        vectors, offsets = _hub.encode_texts(
            list(texts), info, max_length=256, chunk_length=_hub.longest_chunk(info, 256),
            cache=self.cache,
        )  # fmt: skip
        means = np.add.reduceat(vectors, offsets[:-1]) if len(texts) else vectors
        return means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
