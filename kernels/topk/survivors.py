"""Entries (query, base id) in coordinate form, and what is decided on them.

Shape letters: `Q` queries of a tile, `M` most entries of any query, `N` base pairs, `D` embedding, `K` neighbours, `S`
entries.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

EXACT_CHUNK = 1024


@dataclass(frozen=True)
class Survivors:
    """Entries that may be among the k best: query row, base id, bounds on the score (float64), [S] each."""

    rows_S: Tensor
    ids_S: Tensor
    lower_S: Tensor
    upper_S: Tensor

    @classmethod
    def none(cls, device: torch.device) -> "Survivors":
        integers, floats = (
            torch.zeros(0, dtype=torch.int64, device=device),
            torch.zeros(0, dtype=torch.float64, device=device),
        )
        return cls(integers, integers, floats, floats)

    def __len__(self) -> int:
        return len(self.rows_S)

    def columns(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.rows_S, self.ids_S, self.lower_S, self.upper_S

    def joined(self, other: "Survivors") -> "Survivors":
        return Survivors(*(torch.cat(pair) for pair in zip(self.columns(), other.columns(), strict=True)))

    def chosen(self, which_S: Tensor) -> "Survivors":
        return Survivors(*(column[which_S] for column in self.columns()))

    def sorted(self) -> "Survivors":
        """By query, then by base id, so that stable sorts by score leave ties in ascending id."""
        key_S = self.rows_S * (int(self.ids_S.max()) + 1 if len(self) else 1) + self.ids_S
        return self.chosen(torch.argsort(key_S))

    def dense(self, values_S: Tensor, num_queries: int, fill: float = -1.0) -> Tensor:
        """[Q, M] of each query's values in this order, `fill` after them; needs rows in ascending order."""
        count_Q = torch.bincount(self.rows_S, minlength=num_queries)
        width = int(count_Q.max()) if num_queries else 0
        first_Q = count_Q.cumsum(0) - count_Q
        position_S = torch.arange(len(self.rows_S), device=self.rows_S.device) - first_Q[self.rows_S]
        dense_QM = torch.full((num_queries, width), fill, dtype=values_S.dtype, device=values_S.device)
        dense_QM[self.rows_S, position_S] = values_S
        return dense_QM


class GroupLookup:
    """Finds the base rows of equal group number by one sort, so that a query costs what it finds."""

    def __init__(self, group_N: Tensor):
        self.sorted_N, self.order_N = torch.sort(group_N, stable=True)

    def entries(self, group_Q: Tensor) -> tuple[Tensor, Tensor]:
        """(query rows_S, base ids_S) of all entries of equal group number."""
        group_Q = group_Q.contiguous()
        first_Q = torch.searchsorted(self.sorted_N, group_Q, side="left")
        count_Q = torch.searchsorted(self.sorted_N, group_Q, side="right") - first_Q
        rows_S = torch.repeat_interleave(count_Q)
        offset_S = torch.arange(len(rows_S), device=rows_S.device) - (count_Q.cumsum(0) - count_Q)[rows_S]
        return rows_S, self.order_N[first_Q[rows_S] + offset_S]


def best_of_rows(survivors: Survivors, score_S: Tensor, num_queries: int, k: int) -> tuple[Tensor, Tensor]:
    """(bool_S of the k best of each query, ties by lower id; k-th best score_Q or -1), for sorted survivors."""
    score_QM = survivors.dense(score_S, num_queries)
    order_QK = score_QM.sort(dim=1, descending=True, stable=True).indices[:, :k]
    kept_QM = torch.zeros_like(score_QM, dtype=torch.bool).scatter_(1, order_QK, True)
    count_Q = torch.bincount(survivors.rows_S, minlength=num_queries)
    is_entry_QM = torch.arange(score_QM.shape[1], device=score_S.device) < count_Q[:, None]
    kth_Q = (
        score_QM.gather(1, order_QK[:, -1:])[:, 0] if order_QK.shape[1] == k else score_S.new_full((num_queries,), -1)
    )
    # Row-major order of the dense matrix is the survivors' own.
    return kept_QM[is_entry_QM], kth_Q


def exact_similarity(query_QD: Tensor, base_ND: Tensor, rows_S: Tensor, ids_S: Tensor) -> Tensor:
    """float64 [S] dot products, each summed by itself in a fixed order: exact for float16 unit rows."""
    similarity_S = torch.zeros(len(rows_S), dtype=torch.float64, device=rows_S.device)
    # float32 holds a product of two 16-bit numbers exactly; wider rows are multiplied in float64.
    dtype = torch.float32 if base_ND.dtype in (torch.float16, torch.bfloat16) else torch.float64
    query_QD = query_QD.to(dtype)
    for start in range(0, len(rows_S), EXACT_CHUNK):
        part = slice(start, start + EXACT_CHUNK)
        base_SD = base_ND.index_select(0, ids_S[part]).to(dtype)
        similarity_S[part] = base_SD.mul_(query_QD.index_select(0, rows_S[part])).sum(1, dtype=torch.float64)
    return similarity_S
