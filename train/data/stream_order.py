"""The order in which an epoch goes through the samples of many tars: a pure function of its inputs.

In: seed, epoch, samples per shard. Out: sample ids of every global batch, and of every rank's share of it. Shards are
shuffled and laid end to end; that sequence is cut into `lanes` of equal length, which are read side by side, each in
shuffled blocks of `block` samples. Every global batch takes equally from all lanes, so it mixes samples of as many shards,
while a rank reads only its own lanes, each a few tens of MiB at a time, from front to back.

Nothing here knows about workers or files, ranks only cut a batch: a run resumes at the exact sample on any number of ranks.
Memory is O(shards + lanes * block), not O(samples).
"""

import itertools

import numpy as np


class StreamOrder:
    """All global batches of one epoch: each sample once, batches as equal as whole samples allow, none above `batch_size`.

    Args:
        seed, epoch: together they fix the order.
        shard_sizes: int [shards], samples of each shard; ids count through the shards as given.
        batch_size: samples in a global batch.
        lanes: shards that are read at the same time, over all ranks.
        block: samples that are shuffled together within a lane.

    Raises ValueError when the samples do not fill one batch.
    """

    def __init__(
        self, *, seed: int, epoch: int, shard_sizes: np.ndarray, batch_size: int, lanes: int, block: int
    ) -> None:
        self.seed, self.epoch, self.lanes, self.block = seed, epoch, lanes, block
        sizes = np.asarray(shard_sizes, np.int64)
        self.num_samples = int(sizes.sum())
        if not 1 <= batch_size <= self.num_samples:
            raise ValueError(
                f"batch_size={batch_size} does not fit the {self.num_samples} samples of the shards; take at least 1 and at most that"
            )
        self.num_steps = -(-self.num_samples // batch_size)
        self.order_S = np.random.default_rng([seed, epoch]).permutation(len(sizes))
        self.starts_S = np.concatenate([[0], np.cumsum(sizes[self.order_S])])
        self.first_ids_S = np.concatenate([[0], np.cumsum(sizes)[:-1]])[self.order_S]
        self._blocks: dict[int, tuple[int, np.ndarray]] = {}

    def border(self, step: int) -> int:
        """Samples of the epoch before this step, 0 <= step <= num_steps."""
        return step * self.num_samples // self.num_steps

    def rows_per_rank(self, step: int, world_size: int) -> tuple[int, ...]:
        num_rows = self.border(step + 1) - self.border(step)
        borders = [rank * num_rows // world_size for rank in range(world_size + 1)]
        return tuple(last - first for first, last in itertools.pairwise(borders))

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        """Sample ids of this rank's rows of the step, int64. Sizes of ranks differ by at most one."""
        positions = np.arange(self.border(step), self.border(step + 1))
        # Ordered by lane: a rank's share is a few lanes.
        positions = positions[np.argsort(positions % self.lanes, kind="stable")]
        first = sum(self.rows_per_rank(step, world_size)[:rank])
        positions = positions[first : first + self.rows_per_rank(step, world_size)[rank]]
        # Position p of the epoch is place p // lanes of lane p % lanes; the first lanes are longer by one where it does not come out even.
        lanes, places = positions % self.lanes, positions // self.lanes
        sequence = np.empty_like(positions)
        for lane in np.unique(lanes).tolist():
            in_lane = lanes == lane
            sequence[in_lane] = self._shuffled(lane, places[in_lane])
        shards = np.searchsorted(self.starts_S, sequence, side="right") - 1
        return self.first_ids_S[shards] + sequence - self.starts_S[shards]

    def lane_range(self, lane: int) -> tuple[int, int]:
        """Where a lane lies in the sequence of all shards."""
        length, longer = divmod(self.num_samples, self.lanes)
        return lane * length + min(lane, longer), (lane + 1) * length + min(lane + 1, longer)

    def _shuffled(self, lane: int, places: np.ndarray) -> np.ndarray:
        """Places in a lane's reading order -> places in the sequence of all shards."""
        start, _ = self.lane_range(lane)
        result = np.empty_like(places)
        blocks = places // self.block
        for block in np.unique(blocks).tolist():
            in_block = blocks == block
            first = block * self.block
            result[in_block] = start + first + self._permutation(lane, block)[places[in_block] - first]
        return result

    def _permutation(self, lane: int, block: int) -> np.ndarray:
        """Kept for each lane: batches that follow each other are in the same block."""
        known = self._blocks.get(lane)
        if known is None or known[0] != block:
            start, stop = self.lane_range(lane)
            length = min(self.block, stop - start - block * self.block)
            # Zeros at the end of a seed are no part of it, so lanes count from 1.
            rng = np.random.default_rng([self.seed, self.epoch, 1 + lane, block])
            known = self._blocks[lane] = (block, rng.permutation(length))
        return known[1]
