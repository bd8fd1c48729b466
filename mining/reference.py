"""Exact search in tiles, plain torch on any device's CPU: the definition that the other backends must reproduce.

A tile of float32 products finds every entry that could enter a query's top k (its error is bounded), float64 decides:
exact after every tile, so block sizes never show in the result. Shape letters: Q queries, B base rows, N pairs, K
neighbours.
"""

import numpy as np
import torch

from mining.duplicates import ExclusionCount, exclude, find_in_tile
from mining.problem import SearchProblem, TopK, nobody_listens
from mining.rows import BaseStream
from mining.similarity import (
    SPARSE_SHARE,
    approximate_similarity,
    approximation_error,
    exact_entries,
    exact_tile,
    load_rows,
    product_error,
    score_,
)
from mining.top_k import RunningTopK

BASE_BLOCK = 8192
# Scores are at least 0, so that this marks an entry of a tile that may not be a hard pair.
EXCLUDED = -1.0


class ReferenceSearch:
    """Exact search of a SearchProblem; the base streams past each block of queries in tiles of `base_block` rows."""

    name = "reference"
    queries_together = 1024

    def __init__(self, problem: SearchProblem, *, base_block: int = BASE_BLOCK):
        if base_block < 1:
            raise ValueError(f"base_block={base_block}, but a tile needs at least 1 row")
        self.problem = problem
        self.stream = BaseStream(problem, torch.device("cpu"), block_rows=base_block)
        self.tell = nobody_listens

    def search(self, query_ids_Q: np.ndarray, *, base: slice | None = None, known: TopK | None = None) -> TopK:
        """Hard pairs of the pairs `query_ids_Q` (int64 [Q]) among all pairs; queries without an embedding get none.

        `base`: search only these pairs. `known`: an exact answer for the same queries among pairs before `base`, to go
        on from.
        """
        problem, limits = self.problem, self.problem.limits
        live_Q = problem.valid_N[query_ids_Q]
        live_ids_Q = query_ids_Q[live_Q]
        before = TopK.none(len(live_ids_Q), limits.k) if known is None else known.of_queries(live_Q)
        state = RunningTopK.of(before, limits.floor)
        excluded = ExclusionCount.of(before)
        query = (load_rows(problem.image_ND, live_ids_Q), load_rows(problem.text_ND, live_ids_Q))
        for block in self.stream.blocks(base) if len(live_ids_Q) else ():
            search_tile(problem, live_ids_Q, block.rows, query, (block.image_BD, block.text_BD), state, excluded)
            self.tell(self.stream.share_passed(block, base))
        return top_k(state, excluded).spread(live_Q)


def search_tile(
    problem: SearchProblem,
    query_ids_Q: np.ndarray,
    base_rows: slice,
    query: tuple[torch.Tensor, torch.Tensor],
    base: tuple[torch.Tensor, torch.Tensor],
    state: RunningTopK,
    excluded: ExclusionCount,
) -> None:
    """Offer every candidate of one tile to the running top k, and count the tile's duplicates."""
    approximate = tuple(approximate_similarity(query[modality], base[modality]) for modality in (0, 1))
    found = find_in_tile(problem, query_ids_Q, base_rows, query, base, approximate)
    score_QB = score_(*approximate)
    num_base = score_QB.shape[1]
    for rows_S, columns_S in exclude(problem, query_ids_Q, base_rows.start, found, num_base, excluded):
        score_QB[rows_S, columns_S] = EXCLUDED
    error = product_error(*(approximation_error(rows.shape[1]) for rows in query))
    threshold_Q = torch.from_numpy(state.threshold_Q)
    candidate_QB = score_QB > (threshold_Q - error).clamp(min=EXCLUDED).float()[:, None]
    if is_dense(candidate_QB):
        # An entry this far below the tile's k-th best cannot be among the tile's k best.
        kth_Q1 = score_QB.topk(min(state.k, num_base), dim=1).values[:, -1:]
        candidate_QB &= score_QB >= kth_Q1 - 2 * error
    if is_dense(candidate_QB):
        candidate_QB = narrow_exactly(query, base, score_QB != EXCLUDED, threshold_Q, state.k)
    rows_S, columns_S = candidate_QB.nonzero(as_tuple=True)
    if not len(rows_S):
        return
    exact = [exact_entries(query[modality], base[modality], rows_S, columns_S).numpy() for modality in (0, 1)]
    state.merge(rows_S.numpy(), base_rows.start + columns_S.numpy(), *exact)


def top_k(state: RunningTopK, excluded: ExclusionCount) -> TopK:
    """The answer as it stands, every row certified."""
    certified_Q = np.ones(len(state.ids_QK), bool)
    columns = (state.ids_QK, state.image_similarity_QK, state.text_similarity_QK)
    return TopK(*columns, excluded.num_excluded_QC, excluded.example_QC, certified_Q)


def is_dense(entry_QB: torch.Tensor) -> bool:
    """So many entries that the whole tile in float64 is cheaper than one entry after the other."""
    return int(entry_QB.sum()) * SPARSE_SHARE > entry_QB.numel()


def narrow_exactly(
    query: tuple[torch.Tensor, torch.Tensor],
    base: tuple[torch.Tensor, torch.Tensor],
    allowed_QB: torch.Tensor,
    threshold_Q: torch.Tensor,
    k: int,
) -> torch.Tensor:
    """bool [Q, B]: at most the k best of each row of the tile, ties by lower column, all above the row's threshold.

    For tiles full of ties, or of queries with fewer than k pairs above the floor.
    """
    score_QB = score_(exact_tile(query[0], base[0]), exact_tile(query[1], base[1]))
    score_QB[~allowed_QB] = EXCLUDED
    kept = min(k, score_QB.shape[1])
    kth_Q1 = score_QB.topk(kept, dim=1).values[:, -1:]
    above_QB = score_QB > kth_Q1
    tie_QB = score_QB == kth_Q1
    tie_QB &= tie_QB.cumsum(dim=1) <= kept - above_QB.sum(dim=1, keepdim=True)
    return (above_QB | tie_QB) & (score_QB > threshold_Q[:, None])
