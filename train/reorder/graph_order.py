"""A linear order of the pairs in which hard pairs are near each other: clusters of clusters of clusters.

Label propagation with a size limit groups the pairs into clusters of at most GROWTH pairs; the clusters, with the links between
them added up, are grouped in turn into clusters of at most GROWTH^2 pairs, and so on until nothing is left to join. Read as a
tree, from left to right, that is the order: on every scale from a batch to thousands of shards, what belongs together is one
stretch of it. (Size-constrained label propagation: Meyerhenke, Sanders, Schulz 2014; grouping of groups: Louvain.)

In: the mined lists, memory-mapped. Out: the order. A pure function of the lists: no randomness, no number of processes.

Shape letters: N pairs, U units (pairs, later clusters), K neighbours, C units of one chunk.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

NO_PAIR = -1
# Each level's clusters hold up to so many times the pairs of the level below.
GROWTH = 128
PASSES_PER_LEVEL = 12
# Of a cluster: its strongest ones. Bounds the memory of the upper levels.
MAX_LINKS = 48
CHUNK_UNITS = 65_536


@dataclass(frozen=True)
class Links:
    """Neighbours of the units of one level, and how many listed hard pairs each link stands for."""

    units_UK: np.ndarray
    """int [U, K], NO_PAIR where there is none; may be memory-mapped"""
    weights_UK: np.ndarray | None
    """float32 [U, K], None for 1 everywhere"""

    def __len__(self) -> int:
        return len(self.units_UK)


def graph_order(pair_ids_NK: np.ndarray, progress: Callable[[int], None] = lambda done: None) -> np.ndarray:
    """Pair ids in the order of the mined graph, int64 [N]: position -> pair id.

    Args:
        pair_ids_NK: int [N, K], -1 for none; read by rows, never whole.
        progress: told how many units of a pass were done, for a bar.

    Memory beside the lists, which are read from their pages: 110 bytes a pair were measured at 2 million pairs with K = 50, and nothing
    in it grows with K. 11 million pairs take 1.2 GB.
    """
    links = Links(pair_ids_NK, None)
    sizes_U = np.ones(len(links), np.int64)
    # Of every level: the cluster of each unit of the level below.
    parents, limit = [], GROWTH
    while len(links) > 1:
        labels_U = propagate_labels(links, sizes_U, limit, progress)
        clusters, labels_U = np.unique(labels_U, return_inverse=True)
        if len(clusters) < len(links):
            parents.append(labels_U.astype(np.int64))
            links = join_links(links, parents[-1], len(clusters), progress)
            sizes_U = np.bincount(parents[-1], weights=sizes_U).astype(np.int64)
        elif limit >= len(pair_ids_NK):
            break
        limit *= GROWTH
    return read_tree(parents, len(pair_ids_NK))


def propagate_labels(links: Links, sizes_U: np.ndarray, limit: int, progress: Callable[[int], None]) -> np.ndarray:
    """Cluster of every unit, int64 [U], clusters of at most `limit` pairs (or one unit): each joins where most of its links go."""
    labels_U = np.arange(len(links))
    totals_U = sizes_U.copy()
    for number in range(PASSES_PER_LEVEL):
        num_moved = 0
        for start in range(0, len(links), CHUNK_UNITS):
            units_C = np.arange(start, min(start + CHUNK_UNITS, len(links)))
            # Every other unit stays, so that two neighbours do not change places for ever.
            units_C = units_C[(scramble(units_C, number) & 1) == 0]
            wanted_C = best_labels(links, units_C, labels_U, totals_U, sizes_U, limit)
            num_moved += move(units_C, wanted_C, labels_U, totals_U, sizes_U, limit)
            progress(len(units_C))
        if num_moved < len(links) // 200:
            break
    return labels_U


def scramble(numbers: np.ndarray, salt: int) -> np.ndarray:
    """A bit pattern for every number that looks random and is the same everywhere (splitmix64's mixing)."""
    x = (numbers.astype(np.uint64) + np.uint64(salt + 1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    return x ^ (x >> np.uint64(31))


def link_table(links: Links, units_C: np.ndarray, labels_U: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Links of a chunk by label: rows [E] (0..C-1, ascending), labels [E] (ascending in a row), summed weights [E]."""
    from scipy.sparse import csr_array

    neighbours_CK = np.asarray(links.units_UK[units_C])
    is_link_CK = neighbours_CK != NO_PAIR
    weights = (
        np.ones(int(is_link_CK.sum()), np.float32)
        if links.weights_UK is None
        else links.weights_UK[units_C][is_link_CK]
    )
    ends_C = np.concatenate([[0], np.cumsum(is_link_CK.sum(axis=1))])
    table = csr_array((weights, labels_U[neighbours_CK[is_link_CK]], ends_C), shape=(len(units_C), len(links)))
    table.sum_duplicates()
    return np.repeat(np.arange(len(units_C)), np.diff(table.indptr)), table.indices, table.data


def best_labels(
    links: Links, units_C: np.ndarray, labels_U: np.ndarray, totals_U: np.ndarray, sizes_U: np.ndarray, limit: int
) -> np.ndarray:
    """The label that most of each unit's links have, among those with room for it; its own when none is better. int64 [C]."""
    rows, labels, weights = link_table(links, units_C, labels_U)
    own_C = labels_U[units_C]
    is_own = labels == own_C[rows]
    has_room = totals_U[labels] + sizes_U[units_C][rows] <= limit
    weights = np.where(is_own | has_room, weights, 0.0)
    best_C = np.zeros(len(units_C), np.float32)
    np.maximum.at(best_C, rows, weights)
    own_weight_C = np.zeros(len(units_C), np.float32)
    own_weight_C[rows[is_own]] = weights[is_own]
    wanted_C = own_C.copy()
    # The first of equally good labels: reversed, since the last assignment to a row stays.
    found = np.flatnonzero((weights == best_C[rows]) & (weights > own_weight_C[rows]))[::-1]
    wanted_C[rows[found]] = labels[found]
    return wanted_C


def move(
    units_C: np.ndarray,
    wanted_C: np.ndarray,
    labels_U: np.ndarray,
    totals_U: np.ndarray,
    sizes_U: np.ndarray,
    limit: int,
) -> int:
    """Give the units of a chunk the labels they want, in place and in order, as long as those have room. Number of moves."""
    moving = np.flatnonzero(wanted_C != labels_U[units_C])
    moving = moving[np.argsort(wanted_C[moving], kind="stable")]
    targets, sizes = wanted_C[moving], sizes_U[units_C[moving]]
    before = np.cumsum(sizes) - sizes
    is_first = np.concatenate([[True], targets[1:] != targets[:-1]])[: len(targets)]
    # Sizes that earlier arrivals of the same target bring along.
    arrived = before - np.repeat(before[is_first], np.diff(np.append(np.flatnonzero(is_first), len(targets))))
    fits = totals_U[targets] + arrived + sizes <= limit
    units, targets, sizes = units_C[moving][fits], targets[fits], sizes[fits]
    np.subtract.at(totals_U, labels_U[units], sizes)
    np.add.at(totals_U, targets, sizes)
    labels_U[units] = targets
    return len(units)


def join_links(links: Links, parents_U: np.ndarray, num_clusters: int, progress: Callable[[int], None]) -> Links:
    """The links between clusters: each one's MAX_LINKS strongest, its inner ones left out."""
    from scipy.sparse import csr_array

    units_UK = np.full((num_clusters, MAX_LINKS), NO_PAIR, np.int32 if num_clusters < 2**31 else np.int64)
    weights_UK = np.zeros((num_clusters, MAX_LINKS), np.float32)
    order_U = np.argsort(parents_U, kind="stable")
    first_C = np.concatenate([[0], np.cumsum(np.bincount(parents_U, minlength=num_clusters))])
    start = 0
    while start < num_clusters:
        stop = max(start + 1, int(np.searchsorted(first_C, first_C[start] + CHUNK_UNITS, side="right")) - 1)
        units = order_U[first_C[start] : first_C[stop]]
        rows, labels, weights = link_table(links, units, parents_U)
        table = csr_array((weights, (parents_U[units][rows] - start, labels)), shape=(stop - start, num_clusters))
        table.sum_duplicates()
        rows = np.repeat(np.arange(stop - start), np.diff(table.indptr))
        outer = table.indices != rows + start
        rows, labels, weights = rows[outer], table.indices[outer], table.data[outer]
        strongest = np.lexsort((labels, -weights, rows))
        rank = np.arange(len(rows)) - np.searchsorted(rows, rows, side="left")
        kept = rank < MAX_LINKS
        into = (start + rows[kept], rank[kept])
        units_UK[into], weights_UK[into] = labels[strongest][kept], weights[strongest][kept]
        progress(len(units))
        start = stop
    return Links(units_UK, weights_UK)


def read_tree(parents: list[np.ndarray], num_pairs: int) -> np.ndarray:
    """The leaves from left to right, int64 [N]: units of one cluster follow each other, on every level."""
    order_U = np.arange(len(np.unique(parents[-1]))) if parents else np.arange(num_pairs)
    for parents_U in reversed(parents):
        position_C = np.empty(len(order_U), np.int64)
        position_C[order_U] = np.arange(len(order_U))
        order_U = np.argsort(position_C[parents_U], kind="stable")
    return order_U
