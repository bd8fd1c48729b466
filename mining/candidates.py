"""Search by candidates: lists of the best weighted sums, exact scores of what they hold, and a proof for every row.

A list of the M best sums w * a + b / w bounds every pair that is not on it: its sum is at most the list's last, sigma, and
since (w * a) * (b / w) = ab is at most the square of half the sum where both are positive, its score is at most
max(sigma, 0)^2 / 4. When the k-th best score on the list beats this bound (with the rounding of float32 added), the list
holds the exact top k: the row is certified. Other rows are asked again with a weight of their own and longer lists; what
stays open goes through an exact search, or is reported.

Shape letters: Q queries, R rows among them, N pairs, D embedding width, M list length, K neighbours, S (query, id) entries.
"""

import itertools
from typing import Protocol

import numpy as np
import torch

from mining.duplicates import Entries, ExclusionCount, GroupLookup, entries_above, exclude
from mining.problem import SearchBackend, SearchProblem, TopK, nobody_listens
from mining.rows import BaseStream, read_rows
from mining.similarity import (
    FLOAT32_ROUNDING,
    LENGTH_PRODUCT_BOUND,
    approximate_similarity,
    exact_cosines,
    load_rows,
)
from mining.top_k import RunningTopK

SHORTEST_LIST = 64
# Longer lists cost more than the exact search of the row, and a GPU index stops there.
LONGEST_LIST = 2048
LARGEST_WEIGHT = 8.0
# Base rows whose cosines are computed together.
TILE_ROWS = 8192


class CandidateLists(Protocol):
    """See mining.index."""

    def search(self, image_QD: np.ndarray, text_QD: np.ndarray, weight_Q: np.ndarray, length: int): ...


class CandidateSearch:
    """Search of a SearchProblem through `lists`; with `exact` rows that no list certifies are searched by that backend."""

    name = "faiss"
    queries_together = 1024

    def __init__(
        self,
        problem: SearchProblem,
        lists: CandidateLists,
        *,
        exact: SearchBackend | None,
        longest_list: int = LONGEST_LIST,
    ):
        self.problem, self.lists, self.exact, self.longest_list = problem, lists, exact, longest_list
        self.groups = group_lookups(problem)
        limits = problem.limits
        self.ceilings = {
            cause: (tower, ceiling)
            for tower, (cause, ceiling) in enumerate(
                (("near_image", limits.image_ceiling), ("near_text", limits.text_ceiling))
            )
            if ceiling < 1.0
        }
        # For the curious and for tests.
        self.num_rerun = 0
        self.tell = nobody_listens

    def search(self, query_ids_Q: np.ndarray) -> TopK:
        """Hard pairs of the pairs `query_ids_Q` (int64 [Q]); a row that is not certified may lack some."""
        live_Q = self.problem.valid_N[query_ids_Q]
        ids_Q = query_ids_Q[live_Q]
        state = RunningTopK(len(ids_Q), self.problem.limits.k, self.problem.limits.floor)
        excluded = ExclusionCount(len(ids_Q))
        barred = self._duplicates(ids_Q, excluded)
        certified_Q = self._search_lists_until_certified(ids_Q, barred, state, excluded)
        if self.exact is not None and not certified_Q.all():
            open_rows = np.flatnonzero(~certified_Q)
            search_exactly(self.exact, ids_Q, open_rows, state, excluded)
            self.num_rerun += len(open_rows)
            certified_Q[:] = True
        columns = (state.ids_QK, state.image_similarity_QK, state.text_similarity_QK)
        return TopK(*columns, excluded.num_excluded_QC, excluded.example_QC, certified_Q).spread(live_Q)

    def _search_lists_until_certified(
        self, ids_Q: np.ndarray, barred: np.ndarray, state: RunningTopK, excluded: ExclusionCount
    ) -> np.ndarray:
        # Duplicates take the first places of a list: a caption shared by hundreds would fill it.
        length_Q = list_length(2 * state.k + 1 + excluded.num_excluded_QC.sum(axis=1))
        if self.exact is None:
            length_Q = np.minimum(length_Q, self.longest_list)
        weight_Q = np.ones(len(ids_Q))
        certified_Q = np.zeros(len(ids_Q), bool)
        for attempt in itertools.count():
            # A list as long as the data set has seen everything.
            open_Q = ~certified_Q & ((length_Q <= self.longest_list) | (length_Q >= len(self.problem)))
            if not open_Q.any():
                break
            for length in np.unique(length_Q[open_Q]):
                rows = np.flatnonzero(open_Q & (length_Q == length))
                weight_R = weight_Q[rows]
                certified_Q[rows] = self._search_lists(ids_Q, rows, weight_R, int(length), barred, state)
                self.tell(float(certified_Q.mean()))
            weight_Q[open_Q] = own_weight(state, open_Q)
            if attempt:
                length_Q[open_Q & ~certified_Q] *= 2
        return certified_Q

    def _search_lists(
        self,
        ids_Q: np.ndarray,
        rows: np.ndarray,
        weight_R: np.ndarray,
        length: int,
        barred: np.ndarray,
        state: RunningTopK,
    ) -> np.ndarray:
        """Fill the top k of the queries `rows` from lists of `length`; returns which of them are certified."""
        problem, num_pairs = self.problem, len(self.problem)
        length = min(length, num_pairs)
        towers = [read_rows(rows_ND, ids_Q[rows]).astype(np.float32) for rows_ND in (problem.image_ND, problem.text_ND)]
        lists = self.lists.search(*towers, weight_R, length)
        rows_S, ids_S = np.repeat(rows, length), lists.ids_QM.ravel()
        allowed_S = (ids_S >= 0) & ~np.isin(rows_S * num_pairs + ids_S, barred)
        rows_S, ids_S = rows_S[allowed_S], ids_S[allowed_S]
        cosines = [
            exact_cosines(rows_ND, rows_ND, ids_Q, rows_S, ids_S) for rows_ND in (problem.image_ND, problem.text_ND)
        ]
        state.clear(rows)
        state.merge(rows_S, ids_S, *cosines)
        width = sum(tower.shape[1] for tower in towers)
        sigma_R = lists.sums_QM[:, -1] if length < num_pairs else np.full(len(rows), -np.inf)
        return certified(state.score_QK[rows, -1], unseen_bound(sigma_R, weight_R, width), state.floor)

    def _duplicates(self, ids_Q: np.ndarray, excluded: ExclusionCount) -> np.ndarray:
        """Sorted keys (row * N + id) of the entries that may not be hard pairs; adds them to `excluded`."""
        found = {cause: lookup.entries(group_N[ids_Q]) for cause, (group_N, lookup) in self.groups.items()}
        if self.ceilings:
            found |= near_entries(self.problem, self.ceilings, ids_Q)
        num_pairs = len(self.problem)
        entries = exclude(self.problem, ids_Q, 0, found, num_pairs, excluded)
        return np.sort(np.concatenate([rows_S * num_pairs + columns_S for rows_S, columns_S in entries]))


def search_exactly(
    exact: SearchBackend, ids_Q: np.ndarray, rows: np.ndarray, state: RunningTopK, excluded: ExclusionCount
) -> None:
    """Put the answer of `exact` for the queries `rows` in place of what is known of them."""
    top = exact.search(ids_Q[rows])
    state.clear(rows)
    listed_RK = top.ids_QK >= 0
    columns = (top.ids_QK, top.image_similarity_QK, top.text_similarity_QK)
    state.merge(np.repeat(rows, listed_RK.sum(axis=1)), *(values[listed_RK] for values in columns))
    excluded.num_excluded_QC[rows] = top.num_excluded_QC
    excluded.example_QC[rows] = top.excluded_example_QC


def group_lookups(problem: SearchProblem) -> dict[str, tuple[np.ndarray, GroupLookup]]:
    """Of each kind of duplicate group that the problem has, by cause."""
    groups = {"same_image": problem.image_group_N, "same_caption": problem.caption_group_N}
    return {cause: (group_N, GroupLookup(group_N)) for cause, group_N in groups.items() if group_N is not None}


def unseen_bound(sigma_R: np.ndarray, weight_R: np.ndarray, width: int) -> np.ndarray:
    """float64 bound on the score of every pair that is not on a list whose last float32 sum is sigma_R.

    The rounding of the sum of `width` products and of the scaled query is added to sigma.
    """
    rounding = 1.01 * (width + 3) * FLOAT32_ROUNDING * LENGTH_PRODUCT_BOUND * (weight_R + 1.0 / weight_R)
    return np.maximum(sigma_R.astype(np.float64) + rounding, 0.0) ** 2 / 4.0 * (1.0 + 1e-12)


def certified(kth_score_R: np.ndarray, bound_R: np.ndarray, floor: float) -> np.ndarray:
    """bool: no unseen pair can enter. Strict, since an unseen pair of equal score and lower id would."""
    # An incomplete list has kth -inf: then nothing unseen may score above the floor at all.
    return (kth_score_R > bound_R) | (bound_R <= floor)


def own_weight(state: RunningTopK, rows_Q: np.ndarray) -> np.ndarray:
    """float64 weight that balances both cosines over the best found so far: there the bound is tightest."""
    image = state.image_similarity_QK[rows_Q].sum(axis=1)
    text = state.text_similarity_QK[rows_Q].sum(axis=1)
    some = (image > 0) & (text > 0)
    ratio = np.divide(text, image, out=np.ones_like(text), where=some)
    return np.clip(np.sqrt(ratio), 1.0 / LARGEST_WEIGHT, LARGEST_WEIGHT)


def list_length(needed_Q: np.ndarray) -> np.ndarray:
    """Powers of two, so that queries of similar need share one search."""
    return 2 ** np.ceil(np.log2(np.maximum(needed_Q, SHORTEST_LIST))).astype(np.int64)


def near_entries(
    problem: SearchProblem, ceilings: dict[str, tuple[int, float]], ids_Q: np.ndarray
) -> dict[str, Entries]:
    """Entries (query number, id) above a ceiling by cause, in a pass of plain products over the base."""
    found = {cause: [] for cause in ceilings}
    query = [load_rows(rows_ND, ids_Q) for rows_ND in (problem.image_ND, problem.text_ND)]
    for block in BaseStream(problem, torch.device("cpu"), block_rows=TILE_ROWS).blocks():
        for cause, (tower, ceiling) in ceilings.items():
            base_BD = (block.image_BD, block.text_BD)[tower]
            similarity_QB = approximate_similarity(query[tower], base_BD)
            rows_S, columns_S = entries_above(similarity_QB, ceiling, query[tower], base_BD)
            found[cause].append((rows_S, columns_S + block.start))
    return {cause: tuple(map(np.concatenate, zip(*parts, strict=True))) for cause, parts in found.items()}
