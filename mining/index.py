"""Search through faiss: candidates from a flat index over [image; text], exact scores, and a proof for every row.

The only module that imports faiss. One index serves both modalities: with the query scaled to [w * I_i; T_i / w] the
inner product with row j is w * a + b / w for the two cosines a and b. A row's list of the m best by that sum bounds
every pair that is not on it: its sum is at most the list's last, sigma, and since (w * a) * (b / w) = ab is at most
the square of half the sum where both are positive, its score is at most max(sigma, 0)^2 / 4. When the k-th best score
on the list beats this bound (with the rounding of float32 added) the list holds the exact top k. Other rows are asked
again with a weight of their own and longer lists, and in the end go through the exact search.

Shape letters: Q queries, N pairs, D embedding width, M list length, K neighbours, S selected (query, id) entries.
"""

import numpy as np
import torch  # noqa: F401

# isort: split
# After torch: the other way round the CUDA libraries of both collide (crashes, or wrong results on a GPU).
import faiss

from mining.duplicates import Entries, ExclusionCount, GroupLookup, exclude
from mining.problem import SearchProblem, TopK
from mining.reference import ReferenceSearch, spread
from mining.similarity import (
    FLOAT32_ROUNDING,
    LENGTH_PRODUCT_BOUND,
    approximation_error,
    exact_runs,
)
from mining.top_k import RunningTopK

ADD_ROWS = 65536
SHORTEST_LIST = 64
# Longer lists cost more than the exact search of the row, and a GPU index stops at 2048.
LONGEST_LIST = 2048
LARGEST_WEIGHT = 8.0


class FaissSearch:
    """Exact search of a SearchProblem through an IndexFlatIP; holds all embeddings in float32."""

    name = "faiss"

    def __init__(self, problem: SearchProblem, *, longest_list: int = LONGEST_LIST):
        self.problem = problem
        self.longest_list = longest_list
        self.exact = ReferenceSearch(problem)
        self.joint = flat_index([problem.image_ND, problem.text_ND])
        limits = problem.limits
        self.near = {
            cause: (flat_index([rows_ND]), rows_ND, ceiling)
            for cause, rows_ND, ceiling in (
                ("near_image", problem.image_ND, limits.image_ceiling),
                ("near_text", problem.text_ND, limits.text_ceiling),
            )
            if ceiling < 1.0
        }
        groups = {"same_image": problem.image_group_N, "same_caption": problem.caption_group_N}
        self.groups = {
            cause: (group_N, GroupLookup(group_N)) for cause, group_N in groups.items() if group_N is not None
        }
        # How many rows needed the exact search, for the curious and for tests.
        self.num_rerun = 0

    def search(self, query_ids_Q: np.ndarray) -> TopK:
        """Hard pairs of the pairs `query_ids_Q` (int64 [Q]); every row is certified or was searched exactly."""
        live_Q = self.problem.valid_N[query_ids_Q]
        ids_Q = query_ids_Q[live_Q]
        state = RunningTopK(len(ids_Q), self.problem.limits.k, self.problem.limits.floor)
        excluded = ExclusionCount(len(ids_Q))
        barred = self.duplicates(ids_Q, excluded)
        # Duplicates take the first places of a list: a caption shared by hundreds would fill it.
        length_Q = list_length(2 * state.k + 1 + excluded.num_excluded_QC.sum(axis=1))
        weight_Q = np.ones(len(ids_Q))
        open_Q = np.ones(len(ids_Q), bool)
        first = True
        while open_Q.any():
            # A list as long as the data set has seen everything.
            exact_Q = open_Q & (length_Q > self.longest_list) & (length_Q < len(self.problem))
            self.rerun(ids_Q, exact_Q, state)
            open_Q &= ~exact_Q
            for length in np.unique(length_Q[open_Q]):
                rows = np.flatnonzero(open_Q & (length_Q == length))
                open_Q[rows] = ~self.search_lists(ids_Q, rows, weight_Q[rows], int(length), barred, state)
            weight_Q[open_Q] = own_weight(state, open_Q)
            if not first:
                length_Q[open_Q] *= 2
            first = False
        return spread(state, excluded, live_Q)

    def duplicates(self, ids_Q: np.ndarray, excluded: ExclusionCount) -> np.ndarray:
        """Sorted keys (row * N + id) of the entries that may not be hard pairs; adds them to `excluded`."""
        found = {cause: lookup.entries(group_N[ids_Q]) for cause, (group_N, lookup) in self.groups.items()}
        found |= {cause: near_entries(*near, ids_Q) for cause, near in self.near.items()}
        num_pairs = len(self.problem)
        entries = exclude(self.problem, ids_Q, 0, found, num_pairs, excluded)
        return np.sort(np.concatenate([rows_S * num_pairs + columns_S for rows_S, columns_S in entries]))

    def search_lists(
        self,
        ids_Q: np.ndarray,
        rows: np.ndarray,
        weight_R: np.ndarray,
        length: int,
        barred: np.ndarray,
        state: RunningTopK,
    ) -> np.ndarray:
        """Fill the top k of the queries `rows` from lists of `length`; returns which of them are certified."""
        num_pairs = len(self.problem)
        length = min(length, num_pairs)
        image_RD = np.asarray(self.problem.image_ND[ids_Q[rows]], np.float32) * weight_R[:, None]
        text_RD = np.asarray(self.problem.text_ND[ids_Q[rows]], np.float32) / weight_R[:, None]
        sums_RM, list_RM = self.joint.search(np.hstack([image_RD, text_RD]).astype(np.float32), length)
        rows_S, ids_S = np.repeat(rows, length), list_RM.ravel()
        allowed_S = ~np.isin(rows_S * num_pairs + ids_S, barred)
        rows_S, ids_S = rows_S[allowed_S], ids_S[allowed_S]
        image_S = exact_runs(self.problem.image_ND, self.problem.image_ND, ids_Q[rows_S], ids_S)
        text_S = exact_runs(self.problem.text_ND, self.problem.text_ND, ids_Q[rows_S], ids_S)
        state.clear(rows)
        state.merge(rows_S, ids_S, image_S, text_S)
        width = self.joint.d
        bound_R = unseen_bound(sums_RM[:, -1], weight_R, width) if length < num_pairs else np.zeros(len(rows))
        return certified(state.score_QK[rows, -1], bound_R, state.floor)

    def rerun(self, ids_Q: np.ndarray, exact_Q: np.ndarray, state: RunningTopK) -> None:
        if not exact_Q.any():
            return
        rows = np.flatnonzero(exact_Q)
        top = self.exact.search(ids_Q[rows])
        state.clear(rows)
        listed_RK = top.ids_QK >= 0
        state.merge(
            np.repeat(rows, listed_RK.sum(axis=1)),
            top.ids_QK[listed_RK],
            top.image_similarity_QK[listed_RK],
            top.text_similarity_QK[listed_RK],
        )
        self.num_rerun += len(rows)


def flat_index(parts: list[np.ndarray]) -> faiss.IndexFlatIP:
    """Inner-product index over the float16 rows of `parts`, side by side, in float32."""
    index = faiss.IndexFlatIP(sum(rows_ND.shape[1] for rows_ND in parts))
    for start in range(0, len(parts[0]), ADD_ROWS):
        block = [np.asarray(rows_ND[start : start + ADD_ROWS], np.float32) for rows_ND in parts]
        index.add(np.hstack(block))
    return index


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


def near_entries(index: faiss.IndexFlatIP, rows_ND: np.ndarray, ceiling: float, ids_Q: np.ndarray) -> Entries:
    """Entries (query number, id) whose exact cosine is above `ceiling`."""
    error = approximation_error(rows_ND.shape[1]) + 1e-7
    query_QD = np.asarray(rows_ND[ids_Q], np.float32)
    first_Q, _, ids_S = index.range_search(query_QD, ceiling - error)
    rows_S = np.repeat(np.arange(len(ids_Q)), np.diff(first_Q.astype(np.int64)))
    above_S = exact_runs(rows_ND, rows_ND, ids_Q[rows_S], ids_S) > ceiling
    return rows_S[above_S], ids_S[above_S]
