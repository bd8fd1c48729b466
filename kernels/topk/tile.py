"""Some base rows, prepared for the screening products of many queries.

Shape letters: `N` base pairs, `B` base rows of the tile, `D` embedding, `E` embedding and bound, padded.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.topk.exclusion import GroupLookup
from kernels.topk.operands import Operand, base_operand, check_rows, query_operand
from kernels.topk.problem import Problem

# Entries are sought through maxima of this many: comparing every entry costs more than the screening product.
MAXIMUM_OF = 8
TOWERS = ("image", "text")


@dataclass(frozen=True)
class BaseTile:
    """Rows `ids_B` (ascending), and each tower's operand, padded with zeros to `width` columns of the product.

    Maxima run over entries that are far apart in the product, which is faster; so operands lie in an order that makes
    them neighbours in ids: those of maximum m are the ids from MAXIMUM_OF * m on.
    """

    ids_B: Tensor
    operands: tuple[Operand, Operand]
    lookups: tuple[GroupLookup | None, GroupLookup | None]

    @property
    def width(self) -> int:
        return len(self.operands[0].rows_BE)

    def columns(self, place_S: Tensor) -> Tensor:
        """Columns of the product for places in ids_B."""
        return place_S % MAXIMUM_OF * (self.width // MAXIMUM_OF) + place_S // MAXIMUM_OF


def base_tile(problem: Problem, ids: slice | Tensor) -> BaseTile:
    """The base rows `ids`, ascending. ValueError for a row that is not finite."""
    ids_B = torch.arange(ids.start, ids.stop, device=problem.device) if isinstance(ids, slice) else ids
    absent_B = None if problem.valid_N is None else ~problem.valid_N[ids]
    lookups = tuple(None if pair is None else GroupLookup(pair[1][ids]) for pair in problem.groups)
    some_absent = absent_B is not None and bool(absent_B.any())
    operands = []
    for name, base_ND in zip(TOWERS, problem.base_ND, strict=True):
        rows_BD = base_ND[ids].masked_fill(absent_B[:, None], 0) if some_absent else base_ND[ids]
        operands.append(base_operand(rows_BD, MAXIMUM_OF))
        check_rows(operands[-1].first_B, ids_B, f"base {name}")
    tile = BaseTile(ids_B, tuple(operands), lookups)
    if some_absent:
        # With a bound of zero too, so that they reach no threshold.
        for operand in operands:
            operand.rows_BE[tile.columns(absent_B.nonzero()[:, 0])] = 0
    return tile


def query_operands(problem: Problem) -> list[Operand]:
    """Both towers'. ValueError for a row that is not finite."""
    operands = [query_operand(rows_QD) for rows_QD in problem.query_QD]
    for name, operand in zip(TOWERS, operands, strict=True):
        check_rows(operand.second_B, torch.arange(problem.num_queries, device=problem.device), f"query {name}")
    return operands


def self_entries(problem: Problem, rows: slice, ids_B: Tensor) -> tuple[Tensor, Tensor]:
    """(rows_S, places_S) of the queries themselves among the base rows ids_B; rows_S count from the first of `rows`."""
    ids_Q = problem.query_ids_Q[rows]
    place_Q = torch.searchsorted(ids_B, ids_Q).clamp(max=max(len(ids_B) - 1, 0))
    rows_S = (ids_B[place_Q] == ids_Q).nonzero()[:, 0]
    return rows_S, place_Q[rows_S]
