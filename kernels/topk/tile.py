"""Some base rows, prepared for the screening products of many queries.

Shape letters: `N` base pairs, `B` base rows of the tile, `D` embedding, `E` embedding and bound, padded.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.topk.exclusion import GroupLookup
from kernels.topk.operands import Operand, base_operand, check_rows, query_operand
from kernels.topk.problem import Problem

# Entries are sought through maxima of this many: comparing every entry costs more than the screening product.
MAXIMUM_OF = 8
TOWERS = ("image", "text")


@dataclass(frozen=True)
class BaseTile:
    """ids_B: the rows' numbers, ascending. Each tower's operand, its rows padded with zeros to `width`."""

    ids_B: Tensor
    width: int
    operands: tuple[Operand, Operand]
    lookups: tuple[GroupLookup | None, GroupLookup | None]


def base_tile(problem: Problem, ids: slice | Tensor) -> BaseTile:
    """The base rows `ids`, ascending. ValueError for a row that is not finite."""
    ids_B = torch.arange(ids.start, ids.stop, device=problem.device) if isinstance(ids, slice) else ids
    width = -(-len(ids_B) // MAXIMUM_OF) * MAXIMUM_OF
    absent_B = None if problem.valid_N is None else ~problem.valid_N[ids]
    operands = []
    for name, base_ND in zip(TOWERS, problem.base_ND, strict=True):
        operand = _present_operand(base_ND[ids], absent_B)
        check_rows(operand.first_B, ids_B, f"base {name}")
        rows_BE = F.pad(operand.rows_BE, (0, 0, 0, width - len(ids_B))) if width > len(ids_B) else operand.rows_BE
        operands.append(replace(operand, rows_BE=rows_BE))
    lookups = tuple(None if pair is None else GroupLookup(pair[1][ids]) for pair in problem.groups)
    return BaseTile(ids_B, width, tuple(operands), lookups)


def query_operands(problem: Problem) -> list[Operand]:
    """Both towers'. ValueError for a row that is not finite."""
    operands = [query_operand(rows_QD) for rows_QD in problem.query_QD]
    for name, operand in zip(TOWERS, operands, strict=True):
        check_rows(operand.second_B, torch.arange(problem.num_queries, device=problem.device), f"query {name}")
    return operands


def _present_operand(rows_BD: Tensor, absent_B: Tensor | None) -> Operand:
    """Rows that take no part become zero with a bound of zero, so that they reach no threshold."""
    if absent_B is None or not absent_B.any():
        return base_operand(rows_BD)
    operand = base_operand(rows_BD.masked_fill(absent_B[:, None], 0))
    operand.rows_BE.masked_fill_(absent_B[:, None], 0)
    return operand


def self_entries(problem: Problem, rows: slice, ids_B: Tensor) -> tuple[Tensor, Tensor]:
    """(rows_S, columns_S) of the queries themselves among the base rows ids_B, counted from the first query of
    `rows`."""
    ids_Q = problem.query_ids_Q[rows]
    columns_Q = torch.searchsorted(ids_B, ids_Q).clamp(max=max(len(ids_B) - 1, 0))
    rows_S = (ids_B[columns_Q] == ids_Q).nonzero()[:, 0]
    return rows_S, columns_Q[rows_S]
