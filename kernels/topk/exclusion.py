"""Entries of a tile that are nobody's hard pair: the query itself, equal content by group, near-equal by ceiling.

Shape letters: `Q` queries, `B` base rows of a tile, `C` causes, `S` entries.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.topk.problem import CAUSES, Problem


class ExclusionCount:
    """How many base pairs each query lost by cause, and the lowest id of each cause or -1: int64 [Q, C] both."""

    def __init__(self, num_excluded_QC: Tensor, lowest_QC: Tensor, num_base: int):
        self.num_excluded_QC, self._lowest_QC, self.num_base = num_excluded_QC, lowest_QC, num_base

    @classmethod
    def none(cls, num_queries: int, num_base: int, device: torch.device) -> "ExclusionCount":
        zeros_QC = torch.zeros(num_queries, len(CAUSES), dtype=torch.int64, device=device)
        return cls(zeros_QC, torch.full_like(zeros_QC, num_base), num_base)

    def of_queries(self, rows: slice) -> "ExclusionCount":
        """The same counts, for some of the queries: what is added there is added here."""
        return ExclusionCount(self.num_excluded_QC[rows], self._lowest_QC[rows], self.num_base)

    def add(self, cause: int, rows_S: Tensor, ids_S: Tensor) -> None:
        """Count entries (query, base id), each given once."""
        if len(rows_S):
            self.num_excluded_QC[:, cause] += torch.bincount(rows_S, minlength=len(self.num_excluded_QC))
            self._lowest_QC[:, cause] = self._lowest_QC[:, cause].scatter_reduce(0, rows_S, ids_S, "amin")

    def add_totals(self, num_excluded_QC: Tensor, lowest_QC: Tensor) -> None:
        """Count what was counted elsewhere; `lowest_QC` at least num_base where there is none."""
        self.num_excluded_QC += num_excluded_QC
        torch.minimum(self._lowest_QC, lowest_QC, out=self._lowest_QC)

    @property
    def excluded_example_QC(self) -> Tensor:
        return self._lowest_QC.masked_fill(self._lowest_QC >= self.num_base, -1)


class GroupLookup:
    """Finds the base rows of equal group number by one sort, so that a query costs what it finds."""

    def __init__(self, group_B: Tensor):
        self.sorted_B, self.order_B = torch.sort(group_B, stable=True)

    def entries(self, group_Q: Tensor) -> tuple[Tensor, Tensor]:
        """(rows_S, places_S) of all entries of equal group number, rows ascending."""
        group_Q = group_Q.contiguous()
        first_Q = torch.searchsorted(self.sorted_B, group_Q, side="left")
        count_Q = torch.searchsorted(self.sorted_B, group_Q, side="right") - first_Q
        rows_S = torch.repeat_interleave(count_Q)
        offset_S = torch.arange(len(rows_S), device=rows_S.device) - (count_Q.cumsum(0) - count_Q)[rows_S]
        return rows_S, self.order_B[first_Q[rows_S] + offset_S]


def same_group(problem: Problem, rows_S: Tensor, ids_S: Tensor, towers: tuple[int, ...] = (0, 1)) -> Tensor:
    """bool [S]: equal group number in any of these towers."""
    same_S = torch.zeros_like(rows_S, dtype=torch.bool)
    for tower in towers:
        if problem.groups[tower] is not None:
            group_Q, group_N = problem.groups[tower]
            same_S |= group_Q[rows_S] == group_N[ids_S]
    return same_S


def group_entries(
    problem: Problem, rows: slice, lookups: tuple[GroupLookup | None, ...], ids_B: Tensor
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """(cause, rows_S, places_S in ids_B, counted_S) of the base rows ids_B for queries `rows`, which rows_S count from the
    first of; counted once, under the first cause, and neither the query itself nor pairs that take no part."""
    for cause, lookup in enumerate(lookups):
        if lookup is None:
            continue
        rows_S, places_S = lookup.entries(problem.groups[cause][0][rows])
        if len(rows_S) == 0:
            continue
        ids_S, queries_S = ids_B[places_S], rows_S + rows.start
        counted_S = may_count(problem, queries_S, ids_S)
        if cause > 0:
            counted_S &= ~same_group(problem, queries_S, ids_S, tuple(range(cause)))
        yield cause, rows_S, places_S, counted_S


def may_count(problem: Problem, rows_S: Tensor, ids_S: Tensor) -> Tensor:
    """bool [S]: an entry of another pair, that takes part."""
    other_S = problem.query_ids_Q[rows_S] != ids_S
    return other_S if problem.valid_N is None else other_S & problem.valid_N[ids_S]
