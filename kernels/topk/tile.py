"""Some base rows, prepared for the screening products of many queries.

Shape letters: `N` base pairs, `B` base rows of the tile, `D` embedding, `E` embeddings and more columns, padded.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.rows.scratch import Scratch
from kernels.topk.exclusion import GroupLookup
from kernels.topk.operands import Operand, base_operand, check_rows
from kernels.topk.problem import Problem

# Entries are sought through maxima of this many: comparing every entry costs more than the screening product.
MAXIMUM_OF = 8
TOWERS = ("image", "text")


@dataclass(frozen=True)
class BaseTile:
    """Rows `ids_B` (ascending), both towers in float32, and the operand, padded with zeros to `width` columns of the
    product.

    Maxima run over entries that are far apart in the product, which is faster; so the operand lies in an order that makes
    them neighbours in ids: those of maximum m are the ids from MAXIMUM_OF * m on.
    """

    ids_B: Tensor
    towers: tuple[Tensor, Tensor]
    operand: Operand
    lookups: tuple[GroupLookup | None, ...]

    @property
    def width(self) -> int:
        return len(self.operand.rows_BE)

    def columns(self, place_S: Tensor) -> Tensor:
        """Columns of the product for places in ids_B."""
        return place_S % MAXIMUM_OF * (self.width // MAXIMUM_OF) + place_S // MAXIMUM_OF


def base_tile(problem: Problem, ids: slice, scratch: Scratch) -> BaseTile:
    """The base rows `ids`, valid until the next call with the same scratch. ValueError for a row that is not finite."""
    ids_B = torch.arange(ids.start, ids.stop, device=problem.device)
    absent_B = None if problem.valid_N is None else (~problem.valid_N[ids]).nonzero()[:, 0]
    towers = tuple(
        scratch.rows_in(torch.float32, present_rows(base_ND, ids, absent_B), name)
        for name, base_ND in zip(TOWERS, problem.base_ND, strict=True)
    )
    operand = base_operand(towers, MAXIMUM_OF)
    for name, (first_B, _) in zip(TOWERS, operand.bounds, strict=True):
        check_rows(first_B, ids_B, f"base {name}")
    tile = BaseTile(ids_B, towers, operand, group_lookups(problem, ids))
    if absent_B is not None:
        # With a bound of zero too, so that they reach no limit.
        operand.rows_BE[tile.columns(absent_B)] = 0
    return tile


def present_rows(base_ND: Tensor, ids: slice | Tensor, absent_B: Tensor | None) -> Tensor:
    """The base rows `ids`, zeros in place of those that take no part: these may hold anything."""
    if absent_B is None or len(absent_B) == 0:
        return base_ND[ids]
    return base_ND[ids].index_fill(0, absent_B, 0)


def group_lookups(problem: Problem, ids: slice | Tensor) -> tuple[GroupLookup | None, ...]:
    return tuple(None if pair is None else GroupLookup(pair[1][ids]) for pair in problem.groups)


def self_entries(problem: Problem, rows: slice, ids_B: Tensor) -> tuple[Tensor, Tensor]:
    """(rows_S, places_S) of the queries themselves among the base rows ids_B; rows_S count from the first of `rows`."""
    ids_Q = problem.query_ids_Q[rows]
    place_Q = torch.searchsorted(ids_B, ids_Q).clamp(max=max(len(ids_B) - 1, 0))
    rows_S = (ids_B[place_Q] == ids_Q).nonzero()[:, 0]
    return rows_S, place_Q[rows_S]
