"""The sweep of the product top-k in torch: tiles of both products from rounded rows, bounded, sought by integer maxima.

A tile's cosines are upper bounds (operands.py), rounded to bfloat16, and so is their product. Positive bfloat16 numbers are
ordered as their 16-bit patterns, negative ones have negative patterns: one maximum of integers over eight entries tells
which few are looked at in full. Those become survivors when their score may reach the query's threshold. So no tile size
shows in the result, and memory is O(N + QK) and a tile.

Shape letters: `Q` queries, `R` queries of a tile, `B` base rows of a tile, `D` embedding, `S` entries.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.topk.exact import exact_similarity
from kernels.topk.exclusion import ExclusionCount, group_entries, may_count, same_group
from kernels.topk.operands import BFLOAT16_ROUNDING, full_float32_products, screening_product
from kernels.topk.problem import NEAR, Problem
from kernels.topk.search import Answer, exact_score, search_all
from kernels.topk.survivors import OUTWARD, Chunk, Survivors
from kernels.topk.tile import MAXIMUM_OF, BaseTile, base_tile, query_operands, self_entries

# Queries searched together, so that base rows are prepared for many; and the tile of one screening product.
QUERIES_TOGETHER = 4096
QUERY_TILE = 512
BASE_TILE = 2048
UPWARD = (1 + BFLOAT16_ROUNDING) * (1 + 4 * OUTWARD)
DOWNWARD = (1 - BFLOAT16_ROUNDING) * (1 - 4 * OUTWARD)


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
    screen = Screen(problem, survivors, excluded, tiles)
    for start in range(0, problem.num_base if problem.num_queries else 0, tiles.base_tile):
        screen.offer(slice(start, min(start + tiles.base_tile, problem.num_base)))
    return survivors


class Screen:
    """Offers base rows, a tile at a time, to all queries of a problem."""

    def __init__(self, problem: Problem, survivors: Survivors, excluded: ExclusionCount | None, tiles: Tiles):
        self.problem, self.survivors, self.excluded, self.tiles = problem, survivors, excluded, tiles
        self.operands = query_operands(problem)
        size = min(tiles.query_tile, problem.num_queries) * -(-tiles.base_tile // MAXIMUM_OF) * MAXIMUM_OF
        # Image, text, product.
        self.buffers = [torch.empty(size, dtype=torch.bfloat16, device=problem.device) for _ in range(3)]

    def offer(self, ids: slice) -> None:
        """Screen the base rows `ids` and keep what could still be among the k best."""
        tile = base_tile(self.problem, ids)
        # What its factors and it itself lost by rounding.
        limit_Q = pattern_below(self.survivors.threshold_Q / UPWARD**3)
        parts = []
        for start in range(0, self.problem.num_queries, self.tiles.query_tile):
            rows = slice(start, min(start + self.tiles.query_tile, self.problem.num_queries))
            parts.append(TileScreen(self, tile, rows).candidates(limit_Q[rows, None]))
        rows_S, places_S, image_S, text_S = (torch.cat(columns) for columns in zip(*parts, strict=True))
        upper_S = image_S.float() * text_S.float() * UPWARD**2
        lower_S = self.lower(tile, 0, image_S, rows_S) * self.lower(tile, 1, text_S, rows_S) * DOWNWARD
        self.survivors.append(Chunk(rows_S, tile.ids_B[places_S], lower_S, upper_S))
        if self.survivors.is_full:
            self.survivors.compact(lambda rows_S, ids_S: exact_score(self.problem, rows_S, ids_S)[2])

    def lower(self, tile: BaseTile, tower: int, upper_S: Tensor, rows_S: Tensor) -> Tensor:
        """float32 [S]: at most the true cosine, or zero, from the upper bound in the product."""
        query, base = self.operands[tower], tile.operands[tower]
        error_Q = query.first_B * base.first_B.max() + query.second_B * base.second_B.max()
        doubled_Q = error_Q * (2 * (1 + 4 * OUTWARD))
        return (upper_S.float() * DOWNWARD).sub_(doubled_Q[rows_S]).clamp_(min=0)


class TileScreen:
    """One tile of queries against one of base rows: bounded cosines, and what follows from them."""

    def __init__(self, screen: Screen, tile: BaseTile, rows: slice):
        self.screen, self.problem, self.tile, self.rows = screen, screen.problem, tile, rows
        self.shape = (rows.stop - rows.start, tile.width)
        *self.cosines, self.scores = (flat[: math.prod(self.shape)].view(self.shape) for flat in screen.buffers)
        for query, base, out in zip(screen.operands, tile.operands, self.cosines, strict=True):
            screening_product(query.rows_BE[rows], base.rows_BE, out)

    def candidates(self, limit_R1: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(rows_S ascending, places_S ascending in each row, upper bounds of both cosines) of the entries that may
        reach their query's threshold."""
        image, text = self.cosines
        for rows_S, places_S in self._excluded():
            image[rows_S, self.tile.columns(places_S)] = 0
        # A negative cosine counts as zero; in one factor that is enough. A negative number has a negative pattern.
        image.view(torch.int16).clamp_(min=0)
        torch.mul(image, text, out=self.scores)
        rows_S, places_S, flat_S = entries_above(self.scores.view(torch.int16), limit_R1)
        return rows_S + self.rows.start, places_S, image.view(-1)[flat_S], text.view(-1)[flat_S]

    def _excluded(self) -> list[tuple[Tensor, Tensor]]:
        """(rows_S, places_S) of what is no candidate; counted by cause where counts are wanted."""
        entries = [self_entries(self.problem, self.rows, self.tile.ids_B)]
        found = list(group_entries(self.problem, self.rows, self.tile.lookups, self.tile.ids_B))
        for cause, rows_S, places_S, counted_S in [*found, *self._near()]:
            entries.append((rows_S, places_S))
            if self.screen.excluded is not None:
                rows_S, ids_S = rows_S[counted_S] + self.rows.start, self.tile.ids_B[places_S[counted_S]]
                self.screen.excluded.add(cause, rows_S, ids_S)
        return entries

    def _near(self) -> list[tuple[int, Tensor, Tensor, Tensor]]:
        """(cause, rows_S, places_S, counted_S) of the entries above a ceiling."""
        entries, earlier = [], None
        for tower, ceiling in enumerate(self.problem.ceilings):
            if ceiling == 1:
                continue
            rows_S, places_S = self._above_ceiling(tower, ceiling)
            queries_S, ids_S = rows_S + self.rows.start, self.tile.ids_B[places_S]
            counted_S = may_count(self.problem, queries_S, ids_S) & ~same_group(self.problem, queries_S, ids_S)
            key_S = rows_S * self.tile.width + places_S
            if earlier is not None:
                counted_S &= ~torch.isin(key_S, earlier)
            earlier = key_S
            entries.append((NEAR + tower, rows_S, places_S, counted_S))
        return entries

    def _above_ceiling(self, tower: int, ceiling: float) -> tuple[Tensor, Tensor]:
        """(rows_S, places_S) of the entries whose cosine is above `ceiling`, decided exactly where bounds do not."""
        cosine = self.cosines[tower]
        limit = pattern_below(torch.tensor([ceiling / UPWARD], device=self.problem.device))[:, None]
        rows_S, places_S, flat_S = entries_above(cosine.view(torch.int16), limit)
        queries_S = rows_S + self.rows.start
        above_S = self.screen.lower(self.tile, tower, cosine.view(-1)[flat_S], queries_S) > ceiling
        open_S = (~above_S).nonzero()[:, 0]
        if len(open_S):
            ids_S = self.tile.ids_B[places_S[open_S]]
            query_QD, base_ND = self.problem.query_QD[tower], self.problem.base_ND[tower]
            above_S[open_S] = exact_similarity(query_QD, base_ND, queries_S[open_S], ids_S) > ceiling
        return rows_S[above_S], places_S[above_S]


def pattern_below(numbers_X: Tensor) -> Tensor:
    """int16: that of the largest bfloat16 number below the float32 number, at least 0."""
    below_X = torch.nextafter(numbers_X, torch.zeros_like(numbers_X))
    return (below_X.clamp(min=0).view(torch.int32) >> 16).to(torch.int16)


def entries_above(values_RB: Tensor, limit_R1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(rows_S ascending, places_S ascending in each row, flat numbers_S) of the entries of a product with a BaseTile
    that are strictly above their row's limit."""
    num_rows, width = values_RB.shape
    stride = width // MAXIMUM_OF
    hit = values_RB.view(num_rows, MAXIMUM_OF, stride).amax(1) > limit_R1
    hit_H = hit.view(-1).nonzero()[:, 0]
    row_H = hit_H // stride
    # Flat number of the first of each maximum's entries.
    first_H = hit_H + row_H * (width - stride)
    flat_HM = first_H[:, None] + stride * torch.arange(MAXIMUM_OF, device=hit_H.device)
    limit_R = limit_R1.expand(num_rows, 1)[:, 0]
    above_S = (values_RB.view(-1)[flat_HM] > limit_R[row_H, None]).view(-1).nonzero()[:, 0]
    hit_S = above_S // MAXIMUM_OF
    rows_S, flat_S = row_H[hit_S], flat_HM.view(-1)[above_S]
    # A maximum's number in its row times what it is of, and the number within it.
    places_S = (hit_H[hit_S] - rows_S * stride) * MAXIMUM_OF + above_S % MAXIMUM_OF
    return rows_S, places_S, flat_S
