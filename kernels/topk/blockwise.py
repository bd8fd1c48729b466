"""The sweep of the product top-k in torch: tiles of one product of rounded rows, bounded, whose sign tells what is looked at.

Of two positive cosines, a * s_image + b * s_text >= 2 sqrt(a b s_image s_text), with equality where both summands are equal.
So what reaches a score reaches a sum of cosines that one product gives for both towers; a and b make the summands about
equal where a query's best pairs lie. The product is an upper bound less the query's limit (operands.py), rounded to bfloat16:
positive where an entry may reach its threshold, and a positive bfloat16 number is a positive 16-bit integer, whose maxima over
eight entries tell which few are looked at in full. Those are multiplied again in float32, which bounds their scores closely.
So no tile size shows in the result, and memory is O(N + QK) and a tile.

Shape letters: `Q` queries, `R` queries of a tile, `B` base rows of a tile, `D` embedding, `S` entries.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.rows.scratch import Scratch
from kernels.topk.exact import exact_similarity, sampled_products
from kernels.topk.exclusion import ExclusionCount, group_entries, may_count, same_group
from kernels.topk.operands import (
    BFLOAT16_ROUNDING,
    FLOAT32_ROUNDING,
    Operand,
    check_rows,
    full_float32_products,
    query_operand,
    screening_product,
)
from kernels.topk.pilot import guessed_ratios
from kernels.topk.problem import NEAR, Problem
from kernels.topk.search import Answer, exact_score, search_all
from kernels.topk.survivors import OUTWARD, Chunk, Survivors
from kernels.topk.tile import MAXIMUM_OF, TOWERS, BaseTile, base_tile, self_entries

# Queries searched together, so that base rows are prepared for many; and the tile of one screening product.
QUERIES_TOGETHER = 4096
QUERY_TILE = 2048
BASE_TILE = 1024
# Scores below are none; and more than all terms of a float32 product lose that underflow.
SMALLEST_SCORE, UNDERFLOW = 2.0**-100, 2.0**-108


@dataclass(frozen=True)
class Tiles:
    """How many queries are searched together, and the rows of a screening product."""

    queries_together: int = QUERIES_TOGETHER
    query_tile: int = QUERY_TILE
    base_tile: int = BASE_TILE


def product_topk_blockwise(problem: Problem, tiles: Tiles = Tiles()) -> tuple[Answer, ExclusionCount]:
    """The answer and what was excluded, for all queries."""
    with full_float32_products():
        return search_all(problem, lambda *arguments: sweep(*arguments, tiles), tiles.queries_together)


def sweep(problem: Problem, threshold_Q: Tensor, excluded: ExclusionCount | None, tiles: Tiles) -> Survivors:
    """Every entry whose score may reach its query's threshold; see `search.Sweep`."""
    survivors = Survivors(threshold_Q, problem.k)
    if problem.num_queries:
        screen = Screen(problem, survivors, excluded, tiles)
        for start in range(0, problem.num_base, tiles.base_tile):
            screen.offer(slice(start, min(start + tiles.base_tile, problem.num_base)))
    return survivors


class Screen:
    """Offers base rows, a tile at a time, to all queries of a problem."""

    def __init__(self, problem: Problem, survivors: Survivors, excluded: ExclusionCount | None, tiles: Tiles):
        self.problem, self.survivors, self.excluded, self.tiles = problem, survivors, excluded, tiles
        self.scratch = Scratch(problem.device)
        self.towers = [rows_QD.float() for rows_QD in problem.query_QD]
        for name, rows_QD in zip(TOWERS, self.towers, strict=True):
            norm_Q = torch.linalg.vector_norm(rows_QD, dim=1)
            check_rows(norm_Q, torch.arange(problem.num_queries, device=problem.device), f"query {name}")
        root_Q = guessed_ratios(problem).sqrt()
        self.scales = (1 / root_Q, root_Q)
        self.operand = query_operand(self.towers, self.scales)
        self.norms = [torch.linalg.vector_norm(rows_QD, dim=1) for rows_QD in self.towers]
        self.set_limit()

    def set_limit(self) -> None:
        """Of the sum of cosines, from the thresholds reached."""
        image_Q, text_Q = (scale_Q.double() for scale_Q in self.scales)
        threshold_Q = self.survivors.threshold_Q.double()
        self.operand.set_limit(2 * (1 - OUTWARD) * (image_Q * text_Q * threshold_Q).sqrt())

    def offer(self, ids: slice) -> None:
        """Screen the base rows `ids` and keep what could still be among the k best."""
        tile = base_tile(self.problem, ids, self.scratch)
        starts = range(0, self.problem.num_queries, self.tiles.query_tile)
        parts = [
            self.candidates(tile, slice(s, min(s + self.tiles.query_tile, self.problem.num_queries))) for s in starts
        ]
        rows_S, places_S = (torch.cat(columns) for columns in zip(*parts, strict=True))
        self.survivors.append(self.bounded(tile, rows_S, places_S))
        if self.survivors.is_full:
            self.survivors.compact(lambda rows_S, ids_S: exact_score(self.problem, rows_S, ids_S)[2])
            self.set_limit()

    def candidates(self, tile: BaseTile, rows: slice) -> tuple[Tensor, Tensor]:
        """(rows_S ascending, places_S ascending in each row) of the entries that may reach their query's threshold."""
        excluded = self._excluded(tile, rows)
        sum_RB = self.product(self.operand, tile.operand, rows)
        for rows_S, places_S in excluded:
            sum_RB[rows_S, tile.columns(places_S)] = 0
        rows_S, places_S, _ = positive_entries(sum_RB)
        return rows_S + rows.start, places_S

    def product(self, query: Operand, base: Operand, rows: slice) -> Tensor:
        out = self.scratch.matrix("product", rows.stop - rows.start, len(base.rows_BE), torch.bfloat16)
        return screening_product(query.rows_BE[rows], base.rows_BE, out)

    def bounded(self, tile: BaseTile, rows_S: Tensor, places_S: Tensor) -> Chunk:
        """The entries whose score, by a product in float32, may reach their threshold."""
        lower_S, upper_S = (torch.ones(len(rows_S), device=rows_S.device) for _ in range(2))
        for tower, (query_QD, base_BD) in enumerate(zip(self.towers, tile.towers, strict=True)):
            cosine_S = sampled_products(query_QD, base_BD, rows_S, places_S)
            error_S = self.float32_error(tile, tower)[rows_S]
            lower_S.mul_((cosine_S - error_S).clamp_(min=0))
            upper_S.mul_((cosine_S + error_S).clamp_(min=0))
        chunk = Chunk(rows_S, tile.ids_B[places_S], lower_S.mul_(1 - 4 * OUTWARD), upper_S.mul_(1 + 4 * OUTWARD))
        return chunk.chosen((upper_S >= self.survivors.threshold_Q[rows_S]) & (upper_S > SMALLEST_SCORE))

    def float32_error(self, tile: BaseTile, tower: int) -> Tensor:
        """float32 [Q]: bound on the error of a float32 product with any row of the tile, whatever the order of its sum."""
        # 8: for rows that lost something when they were made float32, and the rounding of norms and bounds.
        share = 1.02 * (tile.towers[tower].shape[1] + 8) * FLOAT32_ROUNDING
        return self.norms[tower] * (share * tile.operand.bounds[tower][0].max()) + UNDERFLOW

    def _excluded(self, tile: BaseTile, rows: slice) -> list[tuple[Tensor, Tensor]]:
        """(rows_S, places_S) of what is no candidate; counted by cause where counts are wanted."""
        entries = [self_entries(self.problem, rows, tile.ids_B)]
        found = list(group_entries(self.problem, rows, tile.lookups, tile.ids_B))
        for cause, rows_S, places_S, counted_S in [*found, *self._near(tile, rows)]:
            entries.append((rows_S, places_S))
            if self.excluded is not None:
                self.excluded.add(cause, rows_S[counted_S] + rows.start, tile.ids_B[places_S[counted_S]])
        return entries

    def _near(self, tile: BaseTile, rows: slice) -> list[tuple[int, Tensor, Tensor, Tensor]]:
        """(cause, rows_S, places_S, counted_S) of the entries above a ceiling."""
        entries, earlier = [], None
        for tower, ceiling in enumerate(self.problem.ceilings):
            if ceiling == 1:
                continue
            rows_S, places_S = self._above_ceiling(tile, rows, tower, ceiling)
            queries_S, ids_S = rows_S + rows.start, tile.ids_B[places_S]
            counted_S = may_count(self.problem, queries_S, ids_S) & ~same_group(self.problem, queries_S, ids_S)
            key_S = rows_S * tile.width + places_S
            if earlier is not None:
                counted_S &= ~torch.isin(key_S, earlier)
            earlier = key_S
            entries.append((NEAR + tower, rows_S, places_S, counted_S))
        return entries

    def _above_ceiling(self, tile: BaseTile, rows: slice, tower: int, ceiling: float) -> tuple[Tensor, Tensor]:
        """(rows_S, places_S) of the entries whose cosine is above `ceiling`, decided exactly where bounds do not."""
        query, base = self.operand.of_tower(tower), tile.operand.of_tower(tower)
        query.set_limit(self.scales[tower].double() * (ceiling * (1 - OUTWARD)))
        above_RB = self.product(query, base, rows)
        rows_S, places_S, flat_S = positive_entries(above_RB)
        queries_S, ids_S = rows_S + rows.start, tile.ids_B[places_S]
        # The bound above the cosine, and what a limit of two bfloat16 numbers lacks.
        (first_Q, second_Q), (first_B, second_B) = query.bounds[0], base.bounds[0]
        doubt_Q = 2 * (1 + 4 * OUTWARD) * (first_Q * first_B.max() + second_Q * second_B.max())
        doubt_Q += BFLOAT16_ROUNDING**2 * 4 * self.scales[tower]
        is_above_S = above_RB.view(-1)[flat_S].float() * (1 - BFLOAT16_ROUNDING) > doubt_Q[queries_S]
        open_S = (~is_above_S).nonzero()[:, 0]
        if len(open_S):
            query_QD, base_ND = self.problem.query_QD[tower], self.problem.base_ND[tower]
            is_above_S[open_S] = exact_similarity(query_QD, base_ND, queries_S[open_S], ids_S[open_S]) > ceiling
        return rows_S[is_above_S], places_S[is_above_S]


def positive_entries(values_RB: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(rows_S ascending, places_S ascending in each row, flat numbers_S) of the positive entries of a product with a
    BaseTile, bfloat16."""
    num_rows, width = values_RB.shape
    stride = width // MAXIMUM_OF
    pattern_RMT = values_RB.view(torch.int16).view(num_rows, MAXIMUM_OF, stride)
    hit_H = (pattern_RMT.amax(1) > 0).view(-1).nonzero()[:, 0]
    row_H = hit_H // stride
    # Of each maximum, its entries.
    first_H = hit_H + row_H * (width - stride)
    windows = values_RB.view(torch.int16).as_strided((values_RB.numel() - width + stride, MAXIMUM_OF), (1, stride))
    above_S = (windows[first_H] > 0).view(-1).nonzero()[:, 0]
    hit_S, number_S = above_S // MAXIMUM_OF, above_S % MAXIMUM_OF
    rows_S = row_H[hit_S]
    # A maximum's number in its row times what it is of, and the number within it.
    places_S = (hit_H[hit_S] - rows_S * stride) * MAXIMUM_OF + number_S
    return rows_S, places_S, first_H[hit_S] + number_S * stride
