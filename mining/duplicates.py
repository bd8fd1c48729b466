"""Which pairs may not be each other's hard pair, and why: equal content by group, near-equal content by ceiling.

Excluded pairs are counted by cause and an example of each cause is kept, so that nothing disappears unseen.

Shape letters: Q queries, B base rows of a tile, N pairs, C causes, S selected (query, base) entries of a tile.
"""

from collections.abc import Mapping

import numpy as np
import torch

from mining.problem import CAUSES, SearchProblem, TopK
from mining.similarity import approximation_error, exact_entries

# Row numbers of queries and of base rows, int64 each.
Entries = tuple[np.ndarray, np.ndarray]


class ExclusionCount:
    """Counts by cause and the lowest excluded id of each cause, for Q queries; ids must be offered in ascending tiles."""

    def __init__(self, num_queries: int):
        self.num_excluded_QC = np.zeros((num_queries, len(CAUSES)), np.int64)
        self.example_QC = np.full((num_queries, len(CAUSES)), -1, np.int64)

    @classmethod
    def of(cls, known: TopK) -> "ExclusionCount":
        """Goes on from an earlier answer."""
        count = cls(len(known.ids_QK))
        count.num_excluded_QC += known.num_excluded_QC
        count.example_QC[:] = known.excluded_example_QC
        return count

    def add(self, cause: str, rows_S: np.ndarray, ids_S: np.ndarray) -> None:
        """Count the entries (query number, base id) of one tile under `cause`, each given once."""
        column = CAUSES.index(cause)
        self.num_excluded_QC[:, column] += np.bincount(rows_S, minlength=len(self.num_excluded_QC))
        order = np.lexsort((ids_S, rows_S))
        first_rows, first = np.unique(rows_S[order], return_index=True)
        new = self.example_QC[first_rows, column] < 0
        self.example_QC[first_rows[new], column] = ids_S[order[first[new]]]


class GroupLookup:
    """Finds the rows of equal group number by sorting once: a query costs what it finds, not N."""

    def __init__(self, base_group_B: np.ndarray):
        self.order_B = np.argsort(base_group_B, kind="stable")
        self.sorted_group_B = base_group_B[self.order_B]

    def entries(self, query_group_Q: np.ndarray) -> Entries:
        """All (query, base row) entries with equal group numbers."""
        first_Q = np.searchsorted(self.sorted_group_B, query_group_Q, side="left")
        count_Q = np.searchsorted(self.sorted_group_B, query_group_Q, side="right") - first_Q
        rows_S = np.repeat(np.arange(len(query_group_Q)), count_Q)
        offset_S = np.arange(len(rows_S)) - np.repeat(count_Q.cumsum() - count_Q, count_Q)
        return rows_S, self.order_B[first_Q[rows_S] + offset_S]


def exclude(
    problem: SearchProblem,
    query_ids_Q: np.ndarray,
    first_id: int,
    found: Mapping[str, Entries],
    num_base: int,
    excluded: ExclusionCount,
) -> list[Entries]:
    """Entries (rows, columns) that may not be hard pairs among the base rows first_id..first_id+num_base.

    `found` maps causes, in the order of CAUSES, to the entries they apply to. The queries themselves come first, by
    id and never by similarity; they, and rows without an embedding, were never candidates and do not count as
    excluded.
    """
    columns_Q = query_ids_Q - first_id
    inside_Q = (columns_Q >= 0) & (columns_Q < num_base)
    entries = [(np.flatnonzero(inside_Q), columns_Q[inside_Q])]
    claimed = entries[0][0] * num_base + entries[0][1]
    for cause, (rows_S, columns_S) in found.items():
        key_S = rows_S * num_base + columns_S
        new_S = ~np.isin(key_S, claimed) & problem.valid_N[first_id + columns_S]
        entries.append((rows_S[new_S], columns_S[new_S]))
        claimed = np.concatenate([claimed, key_S[new_S]])
        if new_S.any():
            excluded.add(cause, rows_S[new_S], first_id + columns_S[new_S])
    return entries


def find_in_tile(
    problem: SearchProblem,
    query_ids_Q: np.ndarray,
    base_rows: slice,
    query: tuple[torch.Tensor, torch.Tensor],
    base: tuple[torch.Tensor, torch.Tensor],
    approximate: tuple[torch.Tensor, torch.Tensor],
) -> dict[str, Entries]:
    """The duplicates in one tile, by cause and with overlaps; columns count from the tile's first row.

    query and base hold the tile's float16 image and text rows, approximate their float32 [Q, B] cosines.
    """
    found = {}
    for group_N, cause in ((problem.image_group_N, "same_image"), (problem.caption_group_N, "same_caption")):
        if group_N is not None:
            found[cause] = GroupLookup(group_N[base_rows]).entries(group_N[query_ids_Q])
    ceilings = (problem.limits.image_ceiling, problem.limits.text_ceiling)
    for modality, cause in ((0, "near_image"), (1, "near_text")):
        if ceilings[modality] < 1.0:
            found[cause] = entries_above(approximate[modality], ceilings[modality], query[modality], base[modality])
    return found


def entries_above(
    similarity_QB: torch.Tensor, ceiling: float, query_QD: torch.Tensor, base_BD: torch.Tensor
) -> Entries:
    """Entries whose exact cosine is above `ceiling`; only those that float32 rounding leaves open are recomputed."""
    error = approximation_error(query_QD.shape[1]) + 1e-7
    rows_S, columns_S = (similarity_QB > ceiling - error).nonzero(as_tuple=True)
    sure_S = similarity_QB[rows_S, columns_S] > ceiling + error
    open_S = (~sure_S).nonzero()[:, 0]
    if len(open_S):
        sure_S[open_S] = exact_entries(query_QD, base_BD, rows_S[open_S], columns_S[open_S]) > ceiling
    return rows_S[sure_S].numpy(), columns_S[sure_S].numpy()
