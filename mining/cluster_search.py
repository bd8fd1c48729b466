"""Search of some clusters: each query among the pairs of the clusters that suit it best, exactly, read cluster by cluster from disk.

What is not looked at is bounded: of a cluster, no cosine with a query is above its centre's plus the query's length times the
cluster's radius, so that no score is above the product of both towers' bounds. Clusters whose bound lies below a query's k-th best
score are not looked at, they hold nothing; when that is true of all that were left out, the row is exact: certified. The clusters
of a query are those of the largest weighted sums of cosines with their centres, with a weight of the query's own once a first
quarter of them is searched.

Shape letters: Q queries, R queries of one cluster, L clusters, B rows of a cluster, D embedding width, K neighbours, C causes.
"""

from dataclasses import dataclass

import numpy as np
import torch

from kernels import product_topk
from mining.candidates import certified, group_lookups, own_weight, search_exactly
from mining.clusters import Clusters
from mining.duplicates import ExclusionCount, exclude
from mining.problem import CAUSES, NO_PAIR, SearchBackend, SearchProblem, TopK, nobody_listens
from mining.rows import read_rows
from mining.top_k import RunningTopK

# Of a query's clusters, before it gets a weight of its own.
FIRST_SHARE = 0.25
# Rows may be 5e-3 longer than one, and float16 rounding adds 2^-12.
LONGEST_ROW = 1.006
# Queries whose bounds with all clusters are held together.
BOUNDS_TOGETHER = 512
NEAR_CAUSES = tuple(CAUSES.index(cause) for cause in ("near_image", "near_text"))


@dataclass(frozen=True)
class ClusterBounds:
    """Of some queries with every cluster, float64: weighted sums with the centres; what no cosine of a tower and no score is above."""

    sum_QL: np.ndarray
    image_QL: np.ndarray
    text_QL: np.ndarray
    score_QL: np.ndarray


class ClusterSearch:
    """Search of a SearchProblem in `nprobe` of its clusters for each query; with `exact` rows that are not certified are searched
    by that backend.

    Near-duplicates are left out and counted as far as the clusters that are looked at hold them.
    """

    name = "faiss"
    queries_together = 8192

    def __init__(
        self,
        problem: SearchProblem,
        clusters: Clusters,
        *,
        nprobe: int,
        exact: SearchBackend | None,
        device: torch.device | str = "cpu",
    ):
        self.problem, self.clusters, self.exact = problem, clusters, exact
        self.nprobe = min(nprobe, len(clusters))
        self.device = torch.device(device)
        self.groups = group_lookups(problem)
        self.tell = nobody_listens
        # In float64, so that hardly an order of summation shows in the choice of clusters.
        image_dim = problem.image_ND.shape[1]
        self.centroids = [
            clusters.centroids_LE[:, tower].astype(np.float64)
            for tower in (slice(None, image_dim), slice(image_dim, None))
        ]

    def search(self, query_ids_Q: np.ndarray) -> TopK:
        """Hard pairs of the pairs `query_ids_Q` (int64 [Q]); a row that is not certified may lack some."""
        problem, limits = self.problem, self.problem.limits
        live_Q = problem.valid_N[query_ids_Q]
        ids_Q = query_ids_Q[live_Q]
        towers = [read_rows(rows_ND, ids_Q) for rows_ND in (problem.image_ND, problem.text_ND)]
        state, excluded = RunningTopK(len(ids_Q), limits.k, limits.floor), ExclusionCount(len(ids_Q))
        same = {cause: lookup.entries(group_N[ids_Q]) for cause, (group_N, lookup) in self.groups.items()}
        exclude(problem, ids_Q, 0, same, len(problem), excluded)
        looked_at_QL = self._search_clusters(ids_Q, towers, state, excluded)
        certified_Q = self._certified(towers, looked_at_QL, state)
        if self.exact is not None and not certified_Q.all():
            search_exactly(self.exact, ids_Q, np.flatnonzero(~certified_Q), state, excluded)
            certified_Q[:] = True
        columns = (state.ids_QK, state.image_similarity_QK, state.text_similarity_QK)
        return TopK(*columns, excluded.num_excluded_QC, excluded.example_QC, certified_Q).spread(live_Q)

    def _search_clusters(
        self, ids_Q: np.ndarray, towers: list[np.ndarray], state: RunningTopK, excluded: ExclusionCount
    ) -> np.ndarray:
        """bool [Q, L]: the clusters that were looked at; the best found in them is in `state`."""
        looked_at_QL = np.zeros((len(ids_Q), len(self.clusters)), bool)
        weight_Q = np.ones(len(ids_Q))
        first = int(np.ceil(FIRST_SHARE * self.nprobe))
        on_device = [torch.from_numpy(rows_QD).to(self.device) for rows_QD in towers]
        for before, number in ((0, first), (first, self.nprobe - first)):
            chosen_QL = self._chosen(towers, weight_Q, number, looked_at_QL, state.threshold_Q)
            # Cluster by cluster: each is read once for all of its queries.
            read = np.flatnonzero(chosen_QL.any(axis=0))
            for place, cluster in enumerate(read, start=1):
                rows = np.flatnonzero(chosen_QL[:, cluster])
                for ids_B, *base in self.clusters.parts(cluster):
                    self._offer(ids_Q, rows, on_device, ids_B, base, state, excluded)
                self.tell((before + number * place / len(read)) / self.nprobe)
            looked_at_QL |= chosen_QL
            weight_Q = own_weight(state, slice(None))
        return looked_at_QL

    def _chosen(
        self,
        towers: list[np.ndarray],
        weight_Q: np.ndarray,
        number: int,
        looked_at_QL: np.ndarray,
        threshold_Q: np.ndarray,
    ) -> np.ndarray:
        """bool [Q, L]: the `number` clusters of largest sums among those that may hold something and were not looked at."""
        chosen_QL = np.zeros_like(looked_at_QL)
        for part in query_parts(len(weight_Q) if number else 0):
            bounds = self._bounds([rows_QD[part] for rows_QD in towers], weight_Q[part])
            # Sums that differ in their last bits alone are equal: then the lower cluster.
            sum_QL = bounds.sum_QL.astype(np.float32)
            # Of an equal score the lower id counts, which may be there.
            sum_QL[looked_at_QL[part] | (bounds.score_QL < threshold_Q[part, None]) | (bounds.score_QL == 0)] = -np.inf
            best_QP = np.argsort(-sum_QL, axis=1, kind="stable")[:, :number]
            np.put_along_axis(chosen_QL[part], best_QP, np.take_along_axis(sum_QL, best_QP, 1) > -np.inf, 1)
        return chosen_QL

    def _bounds(self, towers: list[np.ndarray], weight_Q: np.ndarray) -> ClusterBounds:
        centre_QL = [
            rows_QD.astype(np.float64) @ centre.T for rows_QD, centre in zip(towers, self.centroids, strict=True)
        ]
        sum_QL = weight_Q[:, None] * centre_QL[0] + centre_QL[1] / weight_Q[:, None]
        image_QL, text_QL = (
            np.maximum(cosine_QL + LONGEST_ROW * radius_L, 0.0)
            for cosine_QL, radius_L in zip(centre_QL, self.clusters.radius_ML, strict=True)
        )
        return ClusterBounds(sum_QL, image_QL, text_QL, image_QL * text_QL)

    def _offer(
        self,
        ids_Q: np.ndarray,
        rows: np.ndarray,
        queries: list[torch.Tensor],
        ids_B: np.ndarray,
        base: list[torch.Tensor],
        state: RunningTopK,
        excluded: ExclusionCount,
    ) -> None:
        """Search the queries `rows` among some rows of a cluster, and keep what is better than before."""
        problem, limits = self.problem, self.problem.limits
        ids_R = ids_Q[rows]
        place_R = np.searchsorted(ids_B, ids_R).clip(max=len(ids_B) - 1)
        threshold_R = state.threshold_Q[rows]
        # The k-th best itself included: an equal score of a lower id goes before it.
        floor_R = np.where(threshold_R > limits.floor, np.nextafter(threshold_R, 0.0), limits.floor)
        groups = {}
        for name, group_N in (("image", problem.image_group_N), ("text", problem.caption_group_N)):
            if group_N is not None:
                groups |= {f"{name}_group_Q": self._on_device(group_N[ids_R])}
                groups |= {f"{name}_group_N": self._on_device(group_N[ids_B])}
        rows_R = self._on_device(rows)
        top = product_topk(
            *(rows_QD[rows_R] for rows_QD in queries),
            *(rows_BD.to(self.device) for rows_BD in base),
            limits.k,
            query_ids_Q=self._on_device(np.where(ids_B[place_R] == ids_R, place_R, NO_PAIR)),
            image_ceiling=limits.image_ceiling,
            text_ceiling=limits.text_ceiling,
            floor=self._on_device(floor_R),
            **groups,
        )
        found_RK = (top.ids_QK >= 0).cpu().numpy()
        found = [
            values.cpu().numpy()[found_RK] for values in (top.ids_QK, top.image_similarity_QK, top.text_similarity_QK)
        ]
        state.merge(np.repeat(rows, found_RK.sum(axis=1)), ids_B[found[0]], *found[1:])
        if min(limits.image_ceiling, limits.text_ceiling) < 1.0:
            self._count_near(rows, ids_B, top.num_excluded_QC, top.excluded_example_QC, excluded)

    def _count_near(
        self,
        rows: np.ndarray,
        ids_B: np.ndarray,
        count_RC: torch.Tensor,
        example_RC: torch.Tensor,
        excluded: ExclusionCount,
    ) -> None:
        """Near-duplicates of one part of a cluster; those of equal content are counted already."""
        count_RC, example_RC = count_RC.cpu().numpy(), example_RC.cpu().numpy()
        for column in NEAR_CAUSES:
            some = np.flatnonzero(count_RC[:, column])
            excluded.num_excluded_QC[rows[some], column] += count_RC[some, column]
            new, before = ids_B[example_RC[some, column]], excluded.example_QC[rows[some], column]
            excluded.example_QC[rows[some], column] = np.where(before == NO_PAIR, new, np.minimum(new, before))

    def _certified(self, towers: list[np.ndarray], looked_at_QL: np.ndarray, state: RunningTopK) -> np.ndarray:
        """bool [Q]: nothing in the other clusters can enter, and no near-duplicate is among it."""
        limits, certified_Q = self.problem.limits, np.zeros(len(looked_at_QL), bool)
        for part in query_parts(len(looked_at_QL)):
            bounds = self._bounds([rows_QD[part] for rows_QD in towers], np.ones(part.stop - part.start))
            other_QL = ~looked_at_QL[part]
            rest_Q = np.where(other_QL, bounds.score_QL, 0.0).max(axis=1)
            certified_Q[part] = certified(state.score_QK[part, -1], rest_Q, limits.floor)
            for bound_QL, ceiling in (
                (bounds.image_QL, limits.image_ceiling),
                (bounds.text_QL, limits.text_ceiling),
            ):
                if ceiling < 1.0:
                    certified_Q[part] &= ~(other_QL & (bound_QL > ceiling)).any(axis=1)
        return certified_Q

    def _on_device(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self.device)


def query_parts(num_queries: int) -> list[slice]:
    return [slice(start, min(start + BOUNDS_TOGETHER, num_queries)) for start in range(0, num_queries, BOUNDS_TOGETHER)]
