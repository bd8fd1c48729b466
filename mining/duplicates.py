"""Which pairs may not be each other's hard pair, and why: equal content by group, near-equal content by ceiling.

Excluded pairs are counted by cause and an example of each cause is kept, so that nothing disappears unseen. A pair
excluded for several causes counts under the first of CAUSES that applies.

Shape letters: Q queries, B base rows of a tile, N pairs, C causes, S selected (query, base) entries of a tile.
"""

import numpy as np
import torch

from mining.problem import SearchProblem
from mining.similarity import approximation_error, exact_entries

CAUSES = ("same_image", "same_caption", "near_image", "near_text")


class ExclusionCount:
    """Counts by cause and the lowest excluded id of each cause, for Q queries; ids must be offered in ascending tiles."""

    def __init__(self, num_queries: int):
        self.num_excluded_QC = np.zeros((num_queries, len(CAUSES)), np.int64)
        self.example_QC = np.full((num_queries, len(CAUSES)), -1, np.int64)

    def add(self, cause: str, rows_S: np.ndarray, ids_S: np.ndarray) -> None:
        """Count the entries (query number, base id) of one tile under `cause`, each given once."""
        column = CAUSES.index(cause)
        self.num_excluded_QC[:, column] += np.bincount(rows_S, minlength=len(self.num_excluded_QC))
        order = np.lexsort((ids_S, rows_S))
        first_rows, first = np.unique(rows_S[order], return_index=True)
        new = self.example_QC[first_rows, column] < 0
        self.example_QC[first_rows[new], column] = ids_S[order[first[new]]]


def exclude_tile(
    problem: SearchProblem,
    query_ids_Q: np.ndarray,
    base_ids_B: np.ndarray,
    query: tuple[torch.Tensor, torch.Tensor],
    base: tuple[torch.Tensor, torch.Tensor],
    approximate: tuple[torch.Tensor, torch.Tensor],
    excluded: ExclusionCount,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Entries (rows, columns) of the tile that may not be hard pairs: the queries themselves and their duplicates.

    query and base hold the tile's float16 image and text rows, approximate their float32 [Q, B] cosines. Duplicates are
    added to `excluded`.
    """
    entries = [own_entries(query_ids_Q, base_ids_B)]
    for group_N, cause in ((problem.image_group_N, "same_image"), (problem.caption_group_N, "same_caption")):
        if group_N is not None:
            found = group_entries(group_N[query_ids_Q], group_N[base_ids_B])
            found = without_invalid(problem, base_ids_B, found)
            entries.append(count_new(cause, found, entries, base_ids_B, excluded))
    ceilings = (problem.limits.image_ceiling, problem.limits.text_ceiling)
    for modality, cause in ((0, "near_image"), (1, "near_text")):
        if ceilings[modality] < 1.0:
            found = entries_above(approximate[modality], ceilings[modality], query[modality], base[modality])
            entries.append(count_new(cause, found, entries, base_ids_B, excluded))
    return [(torch.from_numpy(rows_S), torch.from_numpy(columns_S)) for rows_S, columns_S in entries]


Entries = tuple[np.ndarray, np.ndarray]


def own_entries(query_ids_Q: np.ndarray, base_ids_B: np.ndarray) -> Entries:
    """Self is excluded by id, never by similarity; base_ids_B is a contiguous ascending range."""
    columns_Q = query_ids_Q - base_ids_B[0]
    inside_Q = (columns_Q >= 0) & (columns_Q < len(base_ids_B))
    return np.flatnonzero(inside_Q), columns_Q[inside_Q]


def group_entries(query_group_Q: np.ndarray, base_group_B: np.ndarray) -> Entries:
    """All (query, base) entries with equal group numbers, by sorting the base: costs what it finds, not Q times B."""
    order = np.argsort(base_group_B, kind="stable")
    first_Q = np.searchsorted(base_group_B[order], query_group_Q, side="left")
    count_Q = np.searchsorted(base_group_B[order], query_group_Q, side="right") - first_Q
    rows_S = np.repeat(np.arange(len(query_group_Q)), count_Q)
    offset_S = np.arange(len(rows_S)) - np.repeat(count_Q.cumsum() - count_Q, count_Q)
    return rows_S, order[first_Q[rows_S] + offset_S]


def without_invalid(problem: SearchProblem, base_ids_B: np.ndarray, entries: Entries) -> Entries:
    """Rows without an embedding were never candidates, so they do not count as excluded."""
    rows_S, columns_S = entries
    kept_S = problem.valid_N[base_ids_B[columns_S]]
    return rows_S[kept_S], columns_S[kept_S]


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


def count_new(
    cause: str, found: Entries, earlier: list[Entries], base_ids_B: np.ndarray, excluded: ExclusionCount
) -> Entries:
    """Those of `found` that no earlier cause has claimed, after counting them under `cause`."""
    width = len(base_ids_B)
    claimed = np.concatenate([rows_S * width + columns_S for rows_S, columns_S in earlier])
    new_S = ~np.isin(found[0] * width + found[1], claimed)
    rows_S, columns_S = found[0][new_S], found[1][new_S]
    if len(rows_S):
        excluded.add(cause, rows_S, base_ids_B[columns_S])
    return rows_S, columns_S
