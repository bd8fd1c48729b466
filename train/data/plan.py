"""The order of an epoch: which pairs share a global batch, as a pure function of its inputs.

In: a seed, an epoch, the pairs' conflict groups, the mined lists of hard pairs. Out: for every step a table of groups, an anchor
and its hard pairs. Nothing here knows about ranks, workers or files, so a run resumes at the exact sample on any number of ranks.

Shape letters: N pairs in the data set, A anchors, S steps of an epoch, K mined neighbours, P hard pairs per anchor.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from train.config import Partners

NO_PAIR = -1


@dataclass(frozen=True)
class BatchPlan:
    """One global batch. Rows of the batch are `groups_AP` read row by row: an anchor, then its partners."""

    groups_AP: np.ndarray
    """int64 [groups, 1 + P], pair ids; column 0 holds the anchors."""
    is_substitute_AP: np.ndarray
    """bool [groups, P], True where a random pair stands in for a missing hard pair."""
    num_conflicts: int
    """Rows whose conflict group an earlier row of the batch has: more than 0 only when no other order exists."""

    @property
    def num_pairs(self) -> int:
        return self.groups_AP.size

    def rank_slice(self, rank: int, world_size: int) -> np.ndarray:
        """The groups of one rank, int64 [groups of the rank, 1 + P]: contiguous, sizes differ by at most one group."""
        num_groups = len(self.groups_AP)
        return self.groups_AP[rank * num_groups // world_size : (rank + 1) * num_groups // world_size]


class EpochPlan:
    """All global batches of one epoch: a partition of the anchors in which no batch holds two pairs of one conflict group.

    Batches are as equal as whole groups allow (sizes differ by at most one group, none exceeds `batch_size`), so the last batch of
    an epoch is no exception. Partners are drawn without replacement from the anchor's list, skipping those whose conflict group is in
    the batch already; when the list is used up a random pair stands in and is marked.

    Args:
        seed, epoch: together they fix every draw.
        conflict_group_N: int [N]; pairs of equal number never share a batch (same caption, same image). `np.arange(N)` keeps
            only the pairs themselves unique.
        batch_size: pairs in a global batch, a multiple of `1 + hard_per_anchor`.
        hard_per_anchor: P, partners per anchor; 0 for plain contrastive training.
        pair_ids_NK: int [N, K] mined hard pairs, -1 for none; needed for `partners="mined"`.
        similarities_NK: image and text similarity, each float [N, K]; when given, partners are drawn with probability proportional
            to their product, else uniformly.
        is_anchor_N: bool [N]; False for pairs that may be partners only (noise).
        partners: "mined", or "random" for the compute-matched control: same anchors, same steps, random partners.
        shuffle_block: 0 shuffles all anchors together. n shuffles the blocks of n anchors that follow each other in the order of
            their ids, and then the anchors within each block; and an anchor's partners are drawn from those in its own block, from
            others only when these are used up. So the pairs of a batch lie in one or two blocks, where the store is in mined-graph
            order (train.reorder); stand-ins and random partners still come from everywhere.

    Memory of a plan: `anchors_A` (8 bytes a pair), while it is built four times that; the arrays given are only indexed by the
    anchors of a batch, never read whole, so memory-mapped ones stay on disk.

    Raises ValueError when the batch can't be filled or the arrays do not fit each other.
    """

    def __init__(
        self,
        *,
        seed: int,
        epoch: int,
        conflict_group_N: np.ndarray,
        batch_size: int,
        hard_per_anchor: int = 0,
        pair_ids_NK: np.ndarray | None = None,
        similarities_NK: tuple[np.ndarray, np.ndarray] | None = None,
        is_anchor_N: np.ndarray | None = None,
        partners: Partners = "mined",
        shuffle_block: int = 0,
    ) -> None:
        self.seed, self.epoch = seed, epoch
        self.conflict_group_N = conflict_group_N
        self.hard_per_anchor = hard_per_anchor
        self.pair_ids_NK, self.similarities_NK = pair_ids_NK, similarities_NK
        self.partners = partners
        self._check(batch_size, is_anchor_N, shuffle_block)
        anchors_A = np.arange(self.num_pairs) if is_anchor_N is None else np.flatnonzero(is_anchor_N)
        groups_per_batch = batch_size // (1 + hard_per_anchor)
        self.num_steps = -(-len(anchors_A) // groups_per_batch)
        # S + 1 borders; batch s is anchors_A[borders[s]:borders[s + 1]].
        self.borders_S = np.arange(self.num_steps + 1) * len(anchors_A) // self.num_steps
        self.block_starts = anchors_A[::shuffle_block] if shuffle_block else None
        order_A = shuffled(anchors_A, np.random.default_rng([seed, epoch]), shuffle_block)
        self.anchors_A = keep_conflicts_apart(order_A, conflict_group_N, self.borders_S)

    def batch(self, step: int) -> BatchPlan:
        """The global batch of one step of the epoch, 0 <= step < num_steps."""
        anchors_A = self.anchors_A[self.borders_S[step] : self.borders_S[step + 1]]
        anchor_groups = self.conflict_group_N[anchors_A]
        used_groups = set(anchor_groups.tolist())
        num_conflicts = len(anchors_A) - len(used_groups)
        groups_AP = np.empty((len(anchors_A), 1 + self.hard_per_anchor), np.int64)
        groups_AP[:, 0] = anchors_A
        is_substitute_AP = np.zeros((len(anchors_A), self.hard_per_anchor), bool)
        if self.hard_per_anchor:
            rng = np.random.default_rng([self.seed, self.epoch, step])
            # A stand-in may only repeat a conflict group when the whole data set has too few of them.
            used_pairs = set(anchors_A.tolist())
            substitutes = self._random_pairs(rng, used_groups, used_pairs)
            for row, candidates in enumerate(self._shuffled_candidates(rng, anchors_A)):
                hard_pairs = self._draw(candidates, used_groups)
                used_pairs.update(hard_pairs)
                missing = self.hard_per_anchor - len(hard_pairs)
                hard_pairs.extend(next(substitutes) for _ in range(missing))
                groups_AP[row, 1:] = hard_pairs
                is_substitute_AP[row, self.hard_per_anchor - missing :] = self.partners == "mined"
            num_conflicts = groups_AP.size - len(np.unique(self.conflict_group_N[groups_AP]))
        return BatchPlan(groups_AP, is_substitute_AP, num_conflicts)

    @property
    def num_pairs(self) -> int:
        return len(self.conflict_group_N)

    def _check(self, batch_size: int, is_anchor_N: np.ndarray | None, shuffle_block: int) -> None:
        if shuffle_block < 0:
            raise ValueError(f"shuffle_block={shuffle_block} must be 0 (all anchors together) or a number of anchors")
        if self.partners not in ("mined", "random"):
            raise ValueError(f"partners={self.partners!r} is not one of mined, random")
        if batch_size < 1 or batch_size % (1 + self.hard_per_anchor):
            raise ValueError(
                f"batch_size={batch_size} must be a multiple of 1 + hard_per_anchor = {1 + self.hard_per_anchor}, "
                "so that whole groups fill it"
            )
        if batch_size > self.num_pairs:
            raise ValueError(
                f"batch_size={batch_size} is larger than the data set of {self.num_pairs} pairs; take a smaller batch"
            )
        if is_anchor_N is not None and not is_anchor_N.any():
            raise ValueError(
                "no pair may be an anchor: the pair table marks every pair as noise; mine again with a lower floor"
            )
        if self.hard_per_anchor and self.partners == "mined":
            if self.pair_ids_NK is None:
                raise ValueError(
                    f"hard_per_anchor={self.hard_per_anchor} needs a pair table; give --data.pairs or set it to 0"
                )
            if len(self.pair_ids_NK) != self.num_pairs:
                raise ValueError(
                    f"the pair table has {len(self.pair_ids_NK)} rows, the store {self.num_pairs} pairs: it was mined from another store"
                )

    def _shuffled_candidates(self, rng: np.random.Generator, anchors_A: np.ndarray) -> Iterator[list[int]]:
        """For every anchor its hard pairs in random order: uniform, or Gumbel top-k when scores weigh them."""
        if self.partners == "random":
            yield from ([] for _ in anchors_A)
            return
        candidates_AK = np.asarray(self.pair_ids_NK[anchors_A], np.int64)
        keys_AK = rng.random(candidates_AK.shape)
        if self.similarities_NK is not None:
            image_AK, text_AK = (
                np.asarray(similarity_NK[anchors_A], np.float64) for similarity_NK in self.similarities_NK
            )
            score_AK = np.maximum(image_AK * text_AK, 1e-12)
            keys_AK = -(np.log(score_AK) - np.log(-np.log(np.maximum(keys_AK, 1e-300))))
        keys_AK[candidates_AK == NO_PAIR] = np.inf
        order_AK = np.argsort(keys_AK, axis=1, kind="stable")
        if self.block_starts is not None:
            is_far_AK = self._block_of(candidates_AK) != self._block_of(anchors_A)[:, None]
            order_AK = np.lexsort((keys_AK, is_far_AK), axis=1)
        for row, order_K in zip(candidates_AK, order_AK, strict=True):
            yield [pair for pair in row[order_K].tolist() if pair != NO_PAIR]

    def _block_of(self, pair_ids: np.ndarray) -> np.ndarray:
        """A pair that is no anchor belongs to the block of the last anchor before it."""
        return np.searchsorted(self.block_starts, pair_ids, side="right")

    def _draw(self, candidates: list[int], used_groups: set[int]) -> list[int]:
        drawn = []
        for pair in candidates:
            if len(drawn) == self.hard_per_anchor:
                break
            group = int(self.conflict_group_N[pair])
            if group not in used_groups:
                used_groups.add(group)
                drawn.append(pair)
        return drawn

    def _random_pairs(self, rng: np.random.Generator, used_groups: set[int], used_pairs: set[int]) -> Iterator[int]:
        """An endless stream of random pairs in fresh conflict groups; of merely fresh pairs once no fresh group turns up."""
        misses = 0
        while True:
            pair = int(rng.integers(self.num_pairs))
            group = int(self.conflict_group_N[pair])
            fresh = group not in used_groups or (misses > 20 * self.num_pairs and pair not in used_pairs)
            if not fresh:
                misses += 1
                continue
            misses = 0
            used_groups.add(group)
            used_pairs.add(pair)
            yield pair


def shuffled(anchors_A: np.ndarray, rng: np.random.Generator, shuffle_block: int) -> np.ndarray:
    """All anchors in random order, or with `shuffle_block` the blocks of so many in random order, each shuffled by itself."""
    if not shuffle_block:
        return rng.permutation(anchors_A)
    order_A, position = np.empty_like(anchors_A), 0
    for block in rng.permutation(-(-len(anchors_A) // shuffle_block)):
        anchors_B = anchors_A[block * shuffle_block : (block + 1) * shuffle_block]
        order_A[position : position + len(anchors_B)] = rng.permutation(anchors_B)
        position += len(anchors_B)
    return order_A


def keep_conflicts_apart(order_A: np.ndarray, conflict_group_N: np.ndarray, borders_S: np.ndarray) -> np.ndarray:
    """Re-order `order_A` so that no batch `borders_S[s]:borders_S[s + 1]` holds two pairs of one conflict group.

    A pair whose group is in the batch already waits for the next one. Those that still wait when the stream has ended fill the last
    batches and then change places with pairs of earlier batches; only a group with more pairs than the epoch has steps stays in
    conflict.
    """
    arranged_A = np.empty_like(order_A)
    waiting, position = order_A[:0], 0
    for start, stop in itertools.pairwise(borders_S):
        size = stop - start
        pool, first = waiting, _first_of_each_group(conflict_group_N[waiting])
        while len(first) < size and position < len(order_A):
            end = min(position + size, len(order_A))
            pool = np.concatenate([pool, order_A[position:end]])
            position = end
            first = _first_of_each_group(conflict_group_N[pool])
        rest = np.setdiff1d(np.arange(len(pool)), first, assume_unique=True)
        chosen = np.concatenate([first, rest])[:size]
        arranged_A[start:stop] = pool[np.sort(chosen)]
        waiting = np.delete(pool, chosen)
    _swap_conflicts_away(arranged_A, conflict_group_N, borders_S)
    return arranged_A


def _swap_conflicts_away(arranged_A: np.ndarray, conflict_group_N: np.ndarray, borders_S: np.ndarray) -> None:
    """Exchange, in place, each surplus member of a group with a pair of the nearest earlier batch where both fit."""
    group_A = conflict_group_N[arranged_A]
    num_steps = len(borders_S) - 1
    has_too_many = np.bincount(group_A) > num_steps
    for step in range(num_steps - 1, -1, -1):
        here = slice(borders_S[step], borders_S[step + 1])
        surplus = np.setdiff1d(np.arange(here.start, here.stop), here.start + _first_of_each_group(group_A[here]))
        for position in surplus[~has_too_many[group_A[surplus]]]:
            for other in range(step - 1, -1, -1):
                there = slice(borders_S[other], borders_S[other + 1])
                if group_A[position] in group_A[there]:
                    continue
                fitting = np.flatnonzero(~np.isin(group_A[there], group_A[here]))
                if len(fitting):
                    swap, back = [position, there.start + fitting[0]], [there.start + fitting[0], position]
                    arranged_A[swap], group_A[swap] = arranged_A[back], group_A[back]
                    break


def _first_of_each_group(groups: np.ndarray) -> np.ndarray:
    """Positions of the first member of each group, ascending."""
    return np.sort(np.unique(groups, return_index=True)[1])


def conflict_groups(*groupings_N: np.ndarray) -> np.ndarray:
    """Merge several groupings of the pairs (equal captions, equal images), each int [N], into one: int32 [N], connected components.

    Components are numbered by their lowest pair id. Peak memory 20 bytes a pair beside the groupings.
    """
    lowest_N = np.arange(len(groupings_N[0]), dtype=np.int32)
    while True:
        before_N = lowest_N
        for grouping_N in groupings_N:
            lowest_of_group = np.full(int(grouping_N.max(initial=-1)) + 1, len(lowest_N), np.int32)
            np.minimum.at(lowest_of_group, grouping_N, lowest_N)
            lowest_N = lowest_of_group[grouping_N]
        # The pair that a pair points to may know a lower one: long chains take few rounds.
        lowest_N = lowest_N[lowest_N]
        if np.array_equal(before_N, lowest_N):
            break
    is_lowest_N = lowest_N == np.arange(len(lowest_N), dtype=np.int32)
    return (np.cumsum(is_lowest_N, dtype=np.int32) - 1)[lowest_N]
