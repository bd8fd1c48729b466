"""Ranks and what follows from them: the one definition of "found among the first k" that every task uses.

The rank of a query is the number of wrong candidates that score at least as high as its best right one: an integer, 0
is first place. A tie with a wrong candidate counts as lost, so a model that scores everything alike gets nothing.

Legend: Q queries, N candidates, D embedding.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# A block of scores this large stays in cache-friendly territory and far below the features themselves.
SCORE_BLOCK_MIB = 64


@dataclass(frozen=True)
class Measurement:
    """values_U: float64, one per unit (picture, caption, class); the metric is their mean, `chance` a blind guess's."""

    values_U: np.ndarray
    chance: float | None
    unit: str

    @property
    def value(self) -> float:
        return float(self.values_U.mean())

    @property
    def standard_error(self) -> float:
        """sqrt(p(1-p)/n) for right-or-wrong values; the standard error of a mean, s/sqrt(n), for others."""
        num_units = len(self.values_U)
        if np.isin(self.values_U, (0.0, 1.0)).all():
            return float(np.sqrt(self.value * (1.0 - self.value) / num_units))
        return float(self.values_U.std(ddof=1) / np.sqrt(num_units))


def ranks_in_blocks(
    query_QD: Tensor, candidate_ND: Tensor, right_of: Callable[[int, int], Tensor], allowed_of: Callable | None = None
) -> np.ndarray:
    """Integer rank of every query, int64 [Q], from blocks of at most SCORE_BLOCK_MIB of scores.

    `right_of(start, stop)` gives the bool [stop-start, N] mask of right candidates, at least one a row; `allowed_of` in
    the same way the candidates that take part at all (right ones must be among them).
    """
    rows = max(1, int(SCORE_BLOCK_MIB * 2**20) // (4 * max(1, len(candidate_ND))))
    ranks = []
    for start in range(0, len(query_QD), rows):
        stop = min(start + rows, len(query_QD))
        # Best right score and competitors come from the same product, so equal features give equal bits.
        score_BN = query_QD[start:stop] @ candidate_ND.T
        right_BN = right_of(start, stop)
        assert bool(right_BN.any(dim=1).all()), "every query has a right candidate"
        best_B1 = score_BN.masked_fill(~right_BN, -torch.inf).amax(dim=1, keepdim=True)
        beaten_by_BN = (score_BN >= best_B1) & ~right_BN
        if allowed_of is not None:
            beaten_by_BN &= allowed_of(start, stop)
        ranks.append(beaten_by_BN.sum(dim=1))
    return torch.cat(ranks).numpy()


def hit_rate(ranks_Q: np.ndarray, k: int, *, num_candidates: np.ndarray | int, num_right: np.ndarray | int, unit: str):
    """Share of queries with rank < k, with the chance that k draws without replacement hold a right candidate."""
    chance = float(np.mean(chance_of_hit(k, np.asarray(num_candidates), np.asarray(num_right))))
    return Measurement((ranks_Q < k).astype(np.float64), chance, unit)


def chance_of_hit(k: int, num_candidates: np.ndarray, num_right: np.ndarray) -> np.ndarray:
    """1 - C(N-m, k) / C(N, k), elementwise: k draws without replacement, a factor (N-m-i)/(N-i) of missing each."""
    miss = np.ones(np.broadcast(num_candidates, num_right).shape)
    for drawn in range(k):
        miss *= np.maximum(num_candidates - num_right - drawn, 0) / np.maximum(num_candidates - drawn, 1)
    return 1.0 - miss


def class_means(correct_N: np.ndarray, labels: list[str]) -> Measurement:
    """Mean over classes of each class's accuracy, classes in name order: the standard for sets with unequal classes."""
    names, label_N = np.unique(np.asarray(labels), return_inverse=True)
    totals_C = np.bincount(label_N, minlength=len(names))
    return Measurement(np.bincount(label_N, weights=correct_N, minlength=len(names)) / totals_C, None, "class")


def has_unequal_classes(labels: list[str]) -> bool:
    counts = np.unique(np.asarray(labels), return_counts=True)[1]
    return len(set(counts.tolist())) > 1
