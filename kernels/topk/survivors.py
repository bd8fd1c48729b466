"""Entries (query, base id) that may still be among the k best, with bounds on their scores.

Shape letters: `Q` queries, `M` most entries of any query, `K` neighbours, `S` entries.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# One upward or downward step of a bound that was rounded to float32.
OUTWARD = 2.0**-23
# Of k, and beside it: so many new entries of a query pay for a higher threshold.
GROWTH_OF_K, GROWTH_BESIDE = 0.5, 16
# Where bounds leave more, memory needs exact scores.
MOST_OF_K, MOST_BESIDE = 1.5, 128


@dataclass(frozen=True)
class Chunk:
    """Entries of some base rows: query rows ascending, base ids ascending in each, bounds on the score (float32); [S]."""

    rows_S: Tensor
    ids_S: Tensor
    lower_S: Tensor
    upper_S: Tensor

    def __len__(self) -> int:
        return len(self.rows_S)

    def chosen(self, which_S: Tensor) -> "Chunk":
        keep = which_S.nonzero()[:, 0]
        return Chunk(*(column[keep] for column in (self.rows_S, self.ids_S, self.lower_S, self.upper_S)))


class Survivors:
    """Chunks in ascending order of base rows, and the score that an entry must reach; it rises with the k-th best bound found."""

    def __init__(self, threshold_Q: Tensor, k: int):
        self.threshold_Q, self.k = threshold_Q, k
        self.chunks: list[Chunk] = []
        self.num_entries = 0
        self.most = int(len(threshold_Q) * (MOST_OF_K * k + MOST_BESIDE))
        self.growth = int(len(threshold_Q) * (GROWTH_OF_K * k + GROWTH_BESIDE))
        self.capacity = len(threshold_Q) * k + self.growth

    def append(self, chunk: Chunk) -> None:
        if len(chunk):
            self.chunks.append(chunk)
            self.num_entries += len(chunk)

    @property
    def is_full(self) -> bool:
        return self.num_entries > self.capacity

    def compact(self, exact_score: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Raise thresholds, drop what is below; where bounds still leave too much, keep the exact k best of each."""
        self.threshold_Q = torch.maximum(self.threshold_Q, self.kth_lower_bound())
        self._keep([chunk.chosen(chunk.upper_S >= self.threshold_Q[chunk.rows_S]) for chunk in self.chunks])
        if self.num_entries > self.most:
            self._decide(exact_score)
        self.capacity = self.num_entries + self.growth

    def kth_lower_bound(self) -> Tensor:
        """float32 [Q]: at most the k-th best score; 0 where there are fewer entries."""
        dense = DenseRows(self.chunks, len(self.threshold_Q))
        if dense.width < self.k:
            return torch.zeros_like(self.threshold_Q)
        lower_QM = dense.filled([chunk.lower_S for chunk in self.chunks], 0.0)
        return lower_QM.topk(self.k, dim=1, sorted=False).values.amin(1)

    def _keep(self, chunks: list[Chunk]) -> None:
        self.chunks = [chunk for chunk in chunks if len(chunk)]
        self.num_entries = sum(len(chunk) for chunk in self.chunks)

    def _decide(self, exact_score: Callable[[Tensor, Tensor], Tensor]) -> None:
        scores = [exact_score(chunk.rows_S, chunk.ids_S) for chunk in self.chunks]
        dense = DenseRows(self.chunks, len(self.threshold_Q))
        score_QM = dense.filled(scores, -1.0)
        order_QK = best_first(score_QM, self.k)
        best = torch.zeros_like(score_QM, dtype=torch.bool).scatter_(1, order_QK, True)
        if order_QK.shape[1] == self.k:
            kth_Q = score_QM.gather(1, order_QK[:, -1:])[:, 0].clamp(min=0)
            self.threshold_Q = torch.maximum(self.threshold_Q, (kth_Q * (1 - OUTWARD)).float())
        kept = []
        for chunk, score_S, place_S in zip(self.chunks, scores, dense.places, strict=True):
            lower_S, upper_S = ((score_S * (1 + side * OUTWARD)).float() for side in (-1, 1))
            bounded = Chunk(chunk.rows_S, chunk.ids_S, lower_S, upper_S)
            kept.append(bounded.chosen(best.view(-1)[place_S]))
        self._keep(kept)


class DenseRows:
    """Where each entry of the chunks lies in a matrix [Q, M] of each query's entries, in the order of the chunks."""

    def __init__(self, chunks: list[Chunk], num_queries: int):
        self.num_queries = num_queries
        count_Q = torch.zeros(num_queries, dtype=torch.int64, device=chunks[0].rows_S.device if chunks else None)
        # Number of each entry among its query's, then its flat place.
        numbers = []
        for chunk in chunks:
            new_Q = torch.bincount(chunk.rows_S, minlength=num_queries)
            shift_Q = count_Q - (new_Q.cumsum(0) - new_Q)
            numbers.append(shift_Q[chunk.rows_S].add_(torch.arange(len(chunk), device=shift_Q.device)))
            count_Q = count_Q + new_Q
        self.width = int(count_Q.max()) if num_queries else 0
        self.places = [number.add_(chunk.rows_S * self.width) for chunk, number in zip(chunks, numbers, strict=True)]

    def filled(self, values: list[Tensor], fill: float) -> Tensor:
        """[Q, M] of one value for each entry, `fill` where there is none; needs a chunk."""
        dense = torch.full((self.num_queries * self.width,), fill, dtype=values[0].dtype, device=values[0].device)
        for values_S, place_S in zip(values, self.places, strict=True):
            dense.index_copy_(0, place_S, values_S)
        return dense.view(self.num_queries, self.width)


def best_first(score_QM: Tensor, k: int) -> Tensor:
    """Columns of at most k best of each row: descending score, ties by the earlier column."""
    return score_QM.sort(dim=1, descending=True, stable=True).indices[:, :k]
