"""Communities of a graph: hierarchical Leiden by graspologic-native, or a plain Louvain."""

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from ehrfuse._runtime import import_optional
from ehrfuse.knowledge._tables import names_code


@dataclass(frozen=True)
class Communities:
    """Groups of nodes at every level of a hierarchy.

    Attributes
    ----------
    members : sparse array (n_communities, n_nodes)
        1 where a node belongs to a community.
    level : integer array (n_communities,)
        0 is the coarsest.
    parent : integer array (n_communities,)
        The community that it is a part of, -1 at level 0.
    """

    members: sparse.csr_array
    level: np.ndarray
    parent: np.ndarray

    def __len__(self):
        return len(self.level)

    @property
    def size(self) -> np.ndarray:
        """Nodes of every community."""
        return np.diff(self.members.indptr)

    def facts_within(self, head: np.ndarray, tail: np.ndarray) -> list[np.ndarray]:
        """Rows of facts with both ends in a community, for every community."""
        by_node = self.members.T.tocsr()
        ends = [by_node[part] for part in (head, tail)]
        both = (ends[0] * ends[1]).T.tocsr()  # community x fact
        both.sort_indices()
        return np.split(both.indices, both.indptr[1:-1])


def detect(graph, max_size: int, seed: int) -> Communities:
    """Communities of the affirmed facts of a graph."""
    if max_size < 2:
        raise ValueError(f"max_size={max_size} is too small; a community has 2 nodes or more.")
    adjacency = affirmed(graph)
    upper = sparse.triu(adjacency, 1).tocoo()
    if not upper.nnz:
        empty = np.zeros(0, dtype="int64")
        return Communities(sparse.csr_array((0, graph.n_nodes)), empty, empty)
    try:
        native = import_optional("graspologic_native", "graph")
    except ImportError:
        levels = _louvain_levels(adjacency, max_size, seed)
    else:
        levels = _leiden_levels(native, upper, max_size, seed)
    return _ordered(levels, graph.n_nodes)


def summarise(graph, communities: Communities, max_facts: int) -> list[str]:
    """The weightiest facts of every community, in words."""
    facts = graph.facts
    told = ~np.array([names_code(r) for r in graph.relations], dtype=bool)
    told = told[facts["relation"].to_numpy()]
    head, tail = facts["head"].to_numpy(), facts["tail"].to_numpy()
    degree = np.bincount(head, minlength=graph.n_nodes) + np.bincount(tail, minlength=graph.n_nodes)
    weight = facts["weight"].to_numpy() * np.log1p(degree[head])
    said = []
    for rows in communities.facts_within(head, tail):
        rows = rows[told[rows]]
        best = rows[np.argsort(-weight[rows], kind="stable")[:max_facts]]
        said.append(" ".join(graph.sentences(np.sort(best))))
    return said


def affirmed(graph) -> sparse.csr_array:
    """Weights between nodes, both ways, of all facts that are no denials."""
    keep = ~graph.negative[graph.relation] & (graph.head != graph.tail)
    head, tail, weight = graph.head[keep], graph.tail[keep], graph.weight[keep]
    shape = (graph.n_nodes, graph.n_nodes)
    one_way = sparse.coo_array((weight, (head, tail)), shape=shape).tocsr()
    both = (one_way + one_way.T).tocsr()
    both.sort_indices()
    return both


def _leiden_levels(native, upper, max_size, seed):
    """Triples (node, community, level, parent) as arrays."""
    names = [f"{i}" for i in range(upper.shape[0])]
    edges = [
        (names[a], names[b], float(w))
        for a, b, w in zip(upper.row, upper.col, upper.data, strict=True)
    ]
    found = native.hierarchical_leiden(edges, max_cluster_size=max_size, seed=seed)
    rows = [
        (int(c.node), c.cluster, c.level, -1 if c.parent_cluster is None else c.parent_cluster)
        for c in found
    ]
    return np.array(rows, dtype="int64")


def _ordered(levels, n_nodes) -> Communities:
    """Number communities by level and smallest node, so that a name means the same in every run."""
    node, label, level, parent = levels.T
    order = np.lexsort((node, label))
    node, label, level, parent = node[order], label[order], level[order], parent[order]
    first = np.flatnonzero(np.diff(label, prepend=label[0] - 1))
    rank = np.lexsort((node[first], level[first]))
    new = np.empty(len(first), dtype="int64")
    new[rank] = np.arange(len(first))
    number = dict(zip(label[first], new, strict=True))
    row = np.repeat(new, np.diff(np.append(first, len(label))))
    ones = np.ones(len(node), dtype="float64")
    members = sparse.coo_array((ones, (row, node)), shape=(len(first), n_nodes)).tocsr()
    members.sort_indices()
    up = np.array([number.get(p, -1) for p in parent[first[rank]]], dtype="int64")
    return Communities(members, level[first[rank]], up)


# ---------------------------------------------------------------- without the package


def _louvain_levels(adjacency, max_size, seed):
    """Split the whole, then every part that is too large, by modularity."""
    rng = np.random.default_rng(seed)
    linked = np.flatnonzero(np.diff(adjacency.indptr))
    rows, todo, next_label = [], [(linked, 0, -1)], 0
    while todo:
        nodes, level, parent = todo.pop()
        label = _louvain(adjacency[nodes][:, nodes], rng)
        if level and len(np.unique(label)) < 2:
            continue  # cannot be split further
        for number in range(int(label.max()) + 1):
            part = nodes[label == number]
            block = np.full((len(part), 4), (0, next_label, level, parent))
            block[:, 0] = part
            rows.append(block)
            if len(part) > max_size:
                todo.append((part, level + 1, next_label))
            next_label += 1
    return np.concatenate(rows)


def _louvain(adjacency, rng) -> np.ndarray:
    """Community of every node: local moves and merging until modularity gains nothing."""
    label = np.arange(adjacency.shape[0])
    graph = sparse.csr_array(adjacency)
    while True:
        moved = _local_moves(graph, rng)
        found, moved = np.unique(moved, return_inverse=True)
        label = moved[label]
        if len(found) == graph.shape[0]:
            return label
        shape = (graph.shape[0], len(found))
        place = (np.arange(shape[0]), moved)
        member = sparse.csr_array((np.ones(shape[0]), place), shape=shape)
        graph = (member.T @ graph @ member).tocsr()


def _local_moves(graph, rng) -> np.ndarray:
    """One node after the other joins the neighbouring community that raises modularity most."""
    n, label = graph.shape[0], list(range(graph.shape[0]))
    degree = np.asarray(graph.sum(axis=1)).ravel().tolist()
    total, twice = list(degree), sum(degree) or 1.0
    starts, ends, weight = graph.indptr.tolist(), graph.indices.tolist(), graph.data.tolist()
    for _ in range(20):
        moves = 0
        for node in rng.permutation(n).tolist():
            links: dict[int, float] = {}
            for place in range(starts[node], starts[node + 1]):
                if ends[place] != node:
                    other = label[ends[place]]
                    links[other] = links.get(other, 0.0) + weight[place]
            here = label[node]
            total[here] -= degree[node]
            best, gain = here, links.get(here, 0.0) - degree[node] * total[here] / twice
            for other, link in links.items():
                value = link - degree[node] * total[other] / twice
                if value > gain + 1e-12:
                    best, gain = other, value
            total[best] += degree[node]
            label[node] = best
            moves += best != here
        if not moves:
            break
    return np.asarray(label)
