"""The product top-k in tiles: screened in low precision with a proven bound, decided on exact float64 products.

A tile's cosines come from bfloat16-rounded rows. With e and f bounds on their errors, (a + e)(b + f) is never below
the true score and (a - e)(b - f) never above it: an entry whose upper bound does not beat the k-th best lower bound
can be dropped; all others are kept and computed exactly in the end. So no tile size shows in the result, and memory is
O(N + QK) and a tile.

Shape letters: `Q` queries of a tile, `B` base rows of a tile, `N` base pairs, `D` embedding, `K` neighbours, `S`
entries.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.rows.precision import bfloat16_units
from kernels.topk.survivors import GroupLookup, Survivors, best_of_rows, exact_similarity

QUERY_TILE = 1024
BASE_TILE = 2048
# Entries are sought through maxima of this many: comparing every entry costs as much as a product.
MAXIMUM_OF = 8
FLOAT32_ROUNDING = 2.0**-24
# Times k: more than this and the bounds cannot tell the entries apart (equal rows, say), so that memory needs exact
# scores.
MOST_SURVIVORS = 8
EXCLUDED = -1.0


@dataclass(frozen=True)
class Problem:
    """One call's inputs, checked: image and text tower of queries and base, and what is excluded."""

    query_QD: tuple[Tensor, Tensor]
    base_ND: tuple[Tensor, Tensor]
    k: int
    query_ids_Q: Tensor
    groups: tuple[tuple[Tensor, Tensor], ...]
    ceilings: tuple[float, float]
    floor: float


def product_topk_blockwise(
    problem: Problem, *, query_tile: int = QUERY_TILE, base_tile: int = BASE_TILE
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(ids_QK, image_similarity_QK, text_similarity_QK, num_excluded_Q) of all queries, a tile of them at a time."""
    lookups = [GroupLookup(group_N) for _, group_N in problem.groups]
    base_norms = [row_norms(rows, base_tile) for rows in problem.base_ND]
    results = []
    for q0 in range(0, max(len(problem.query_ids_Q), 1), query_tile):
        search = TileSearch(problem, slice(q0, q0 + query_tile), lookups, base_norms, base_tile)
        with bfloat16_units():
            for b0 in range(0, len(problem.base_ND[0]), base_tile):
                search.offer(b0)
        results.append((*search.finish(), search.num_excluded_Q))
    return tuple(torch.cat(parts) for parts in zip(*results, strict=True))


class TileSearch:
    """The running state of one tile of queries: entries that may be among the k best, and each query's threshold."""

    def __init__(
        self,
        problem: Problem,
        rows: slice,
        lookups: list[GroupLookup],
        base_norms: list[tuple[Tensor, Tensor]],
        base_tile: int,
    ):
        self.problem, self.base_norms, self.base_tile = problem, base_norms, base_tile
        self.query_QD = [tower[rows] for tower in problem.query_QD]
        self.rounded_QD = [rounded(tower) for tower in self.query_QD]
        self.query_norms = [row_norms(tower, base_tile) for tower in self.query_QD]
        self.ids_Q = problem.query_ids_Q[rows]
        self.num_queries = len(self.ids_Q)
        # A later entry must beat this; it rises with the k-th best score found.
        self.threshold_Q = torch.full_like(self.ids_Q, 0, dtype=torch.float64) + problem.floor
        self.survivors = Survivors.none(self.ids_Q.device)
        self.capacity = 2 * self.num_queries * problem.k
        groups = [group_Q[rows] for group_Q, _ in problem.groups]
        self._exclude_groups([lookup.entries(group) for lookup, group in zip(lookups, groups, strict=True)])
        size = self.num_queries * -(-base_tile // MAXIMUM_OF) * MAXIMUM_OF
        self.buffers = [torch.empty(size, device=self.ids_Q.device) for _ in range(3)]

    def _exclude_groups(self, entries: list[tuple[Tensor, Tensor]]) -> None:
        """List each entry that is the query itself or of its groups, once, ascending by base id; count the latter."""
        num_base = len(self.problem.base_ND[0])
        self_rows = ((self.ids_Q >= 0) & (self.ids_Q < num_base)).nonzero()[:, 0]
        rows_S = torch.cat([self_rows, *(rows for rows, _ in entries)])
        ids_S = torch.cat([self.ids_Q[self_rows], *(ids for _, ids in entries)])
        flat_S = torch.unique(ids_S * max(self.num_queries, 1) + rows_S)
        self.excluded_rows_S = flat_S % max(self.num_queries, 1)
        self.excluded_ids_S = flat_S // max(self.num_queries, 1)
        others_S = self.excluded_ids_S != self.ids_Q[self.excluded_rows_S]
        self.num_excluded_Q = torch.bincount(self.excluded_rows_S[others_S], minlength=self.num_queries)

    def offer(self, b0: int) -> None:
        """Screen the tile of base rows from `b0` and keep what could still be among the k best."""
        b1 = min(b0 + self.base_tile, len(self.problem.base_ND[0]))
        padded = -(-(b1 - b0) // MAXIMUM_OF) * MAXIMUM_OF
        image, text, score = (flat[: self.num_queries * padded].view(self.num_queries, padded) for flat in self.buffers)
        errors = [self._upper_cosine(tower, b0, b1, out) for tower, out in enumerate((image, text))]
        first, last = torch.searchsorted(self.excluded_ids_S, torch.tensor([b0, b1], device=self.ids_Q.device)).tolist()
        rows_S, columns_S = self.excluded_rows_S[first:last], self.excluded_ids_S[first:last] - b0
        for upper in (image, text):
            upper[:, b1 - b0 :] = EXCLUDED
            upper[rows_S, columns_S] = EXCLUDED
        self._exclude_near(image, text, b0)
        if len(self.survivors) == 0:
            self._raise_threshold(image, text, errors, score)
        # One factor clamped is enough: a negative product is no survivor either.
        torch.mul(image.relu_(), text, out=score)
        # The product and its factors were rounded a few times. Not below 0, where what is excluded lies.
        slack_Q = (self.threshold_Q * (1 - 16 * FLOAT32_ROUNDING) - 2.0**-60).clamp(min=0)
        rows_S, columns_S = entries_above(score, slack_Q.float())
        lower = [
            (tower[rows_S, columns_S].double() - 2 * e[rows_S]).clamp(min=0)
            for tower, e in ((image, errors[0]), (text, errors[1]))
        ]
        upper_S = score[rows_S, columns_S].double() * (1 + 16 * FLOAT32_ROUNDING)
        lower_S = lower[0] * lower[1] * (1 - 16 * FLOAT32_ROUNDING)
        self.survivors = self.survivors.joined(Survivors(rows_S, columns_S + b0, lower_S, upper_S))
        if len(self.survivors) > self.capacity:
            self._compact()
            self.capacity = max(self.capacity, 2 * len(self.survivors))

    def _upper_cosine(self, tower: int, b0: int, b1: int, out: Tensor) -> Tensor:
        """Fill `out` with upper bounds of the cosines; returns the bound e of each query: the true one is within 2e
        below."""
        base_BD = self.problem.base_ND[tower][b0:b1]
        rounded_BD = torch.nn.functional.pad(rounded(base_BD), (0, 0, 0, out.shape[1] - len(base_BD)))
        torch.mm(self.rounded_QD[tower], rounded_BD.T, out=out)
        query_norm_Q, query_residual_Q = self.query_norms[tower]
        norm, residual = (values_N[b0:b1].max() for values_N in self.base_norms[tower])
        # <x, y> - <r, s> = <x - r, s> + <x, y - s>, by Cauchy-Schwarz; then the float32 sum of D terms.
        error_Q = query_residual_Q * (norm + residual) + query_norm_Q * residual
        error_Q = error_Q + 1.01 * (base_BD.shape[1] + 4) * FLOAT32_ROUNDING * (query_norm_Q + query_residual_Q) * (
            norm + residual
        )
        # Cast up, so that the float32 bound is one too.
        out.add_((error_Q * (1 + 4 * FLOAT32_ROUNDING)).float()[:, None])
        return error_Q * (1 + 8 * FLOAT32_ROUNDING)

    def _exclude_near(self, image: Tensor, text: Tensor, b0: int) -> None:
        """Exclude and count near-duplicates; entries whose bound passes a ceiling are decided exactly."""
        found = []
        for upper, ceiling in zip((image, text), self.problem.ceilings, strict=True):
            if ceiling < 1:
                limit_Q = torch.full((self.num_queries,), ceiling * (1 - 4 * FLOAT32_ROUNDING), device=upper.device)
                found.append(torch.stack(entries_above(upper, limit_Q)))
        if not found:
            return
        rows_S, columns_S = torch.unique(torch.cat(found, dim=1), dim=1)
        exact = self._exact(rows_S, columns_S + b0)
        near_S = torch.zeros_like(rows_S, dtype=torch.bool)
        for similarity_S, ceiling in zip(exact, self.problem.ceilings, strict=True):
            near_S |= (similarity_S > ceiling) & (ceiling < 1)
        self.num_excluded_Q += torch.bincount(rows_S[near_S], minlength=self.num_queries)
        image[rows_S[near_S], columns_S[near_S]] = EXCLUDED

    def _raise_threshold(self, image: Tensor, text: Tensor, errors: list[Tensor], work: Tensor) -> None:
        """The first tile has no k-th best yet: the k-th of maxima of lower bounds, each over other entries, is below
        it."""
        stride = image.shape[1] // MAXIMUM_OF
        if stride < self.problem.k:
            return
        below = [(2 * error_Q * (1 + 4 * FLOAT32_ROUNDING)).float()[:, None] for error_Q in errors]
        torch.sub(image, below[0], out=work).relu_().mul_((text - below[1]).relu_())
        maxima = work.view(self.num_queries, MAXIMUM_OF, stride).amax(1)
        kth_Q = maxima.topk(self.problem.k, dim=1).values[:, -1].double()
        self.threshold_Q = torch.maximum(self.threshold_Q, kth_Q * (1 - 16 * FLOAT32_ROUNDING))

    def _compact(self) -> None:
        """Drop entries that cannot be among the k best; where bounds leave too many, decide exactly."""
        survivors, k = self.survivors.sorted(), self.problem.k
        lower_QM = survivors.dense(survivors.lower_S, self.num_queries)
        if lower_QM.shape[1] >= k:
            kth_Q = lower_QM.topk(k, dim=1).values[:, -1]
            self.threshold_Q = torch.maximum(self.threshold_Q, kth_Q)
        survivors = survivors.chosen(survivors.upper_S >= self.threshold_Q[survivors.rows_S])
        if len(survivors) > MOST_SURVIVORS * self.num_queries * k:
            similarity = self._exact(survivors.rows_S, survivors.ids_S)
            score_S = similarity[0].clamp(min=0) * similarity[1].clamp(min=0)
            kept_S, kth_Q = best_of_rows(survivors, score_S, self.num_queries, k)
            self.threshold_Q = torch.maximum(self.threshold_Q, kth_Q)
            survivors = Survivors(survivors.rows_S, survivors.ids_S, score_S, score_S).chosen(kept_S)
        self.survivors = survivors

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """(ids_QK, image_similarity_QK, text_similarity_QK) of this tile's queries, from exact scores."""
        self._compact()
        survivors, k = self.survivors, self.problem.k
        similarity = self._exact(survivors.rows_S, survivors.ids_S)
        score_S = similarity[0].clamp(min=0) * similarity[1].clamp(min=0)
        above_S = score_S > self.problem.floor
        survivors, score_S = survivors.chosen(above_S), score_S[above_S]
        order_QM = survivors.dense(score_S, self.num_queries).sort(dim=1, descending=True, stable=True).indices[:, :k]
        columns = [survivors.ids_S, *(values_S[above_S] for values_S in similarity)]
        fills = (-1, 0.0, 0.0)
        dense = [survivors.dense(values, self.num_queries, fill) for values, fill in zip(columns, fills, strict=True)]
        taken = [values_QM.gather(1, order_QM) for values_QM in dense]
        missing = k - order_QM.shape[1]
        return tuple(
            torch.nn.functional.pad(values, (0, missing), value=fill) for values, fill in zip(taken, fills, strict=True)
        )

    def _exact(self, rows_S: Tensor, ids_S: Tensor) -> list[Tensor]:
        pairs = zip(self.query_QD, self.problem.base_ND, strict=True)
        return [exact_similarity(query_QD, base_ND, rows_S, ids_S) for query_QD, base_ND in pairs]


def entries_above(values_QB: Tensor, limit_Q: Tensor) -> tuple[Tensor, Tensor]:
    """(rows_S, columns_S) of the entries strictly above their row's limit, rows ascending; width a multiple of
    MAXIMUM_OF."""
    stride = values_QB.shape[1] // MAXIMUM_OF
    hit = values_QB.view(len(values_QB), MAXIMUM_OF, stride).amax(1) > limit_Q[:, None]
    rows_S, column_S = hit.nonzero(as_tuple=True)
    members = column_S[:, None] + stride * torch.arange(MAXIMUM_OF, device=column_S.device)
    above = values_QB[rows_S[:, None], members] > limit_Q[rows_S, None]
    return rows_S[:, None].expand_as(members)[above], members[above]


def rounded(rows_BD: Tensor) -> Tensor:
    """float32 rows with bfloat16 values: products of these are exact on bfloat16 units, sums are float32's."""
    return rows_BD.bfloat16().float()


def row_norms(rows_ND: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """float64 (norm_N, norm of what rounding to bfloat16 takes away_N). ValueError for a row that is not finite."""
    norm_N = torch.zeros(len(rows_ND), dtype=torch.float64, device=rows_ND.device)
    residual_N = torch.zeros_like(norm_N)
    for start in range(0, len(rows_ND), tile):
        exact = rows_ND[start : start + tile].double()
        norm_N[start : start + tile] = exact.norm(dim=1)
        residual_N[start : start + tile] = (exact - rounded(rows_ND[start : start + tile])).norm(dim=1)
    if not norm_N.isfinite().all():
        row = int((~norm_N.isfinite()).nonzero()[0])
        raise ValueError(f"features must be finite, but row {row} holds NaN or infinity: leave such pairs out")
    return norm_N, residual_N
