"""From the plan of an epoch to tensors: every item of the data set is this rank's share of one global step.

In: a PairStore, optionally a PairTable, the plan's parameters. Out: `RankBatch`es in step order. A batch depends on the step alone,
so the number of workers, a restart or prefetching change nothing.

Shape letters: B rows of this rank, G rows of all ranks, L text tokens, C H W image, N pairs, K neighbours.
"""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from mining import PairTable
from mining.stopping import end_with_parent
from train.config import STRONG_AUGMENT, AugmentConfig, DataConfig
from train.data.augment import rgb
from train.data.pair_store import PairStore
from train.data.pair_views import PairViews, Rows
from train.data.plan import EpochPlan, conflict_groups
from train.data.reading import ReadingNotes
from train.views import WEAK_ONLY, Views


@dataclass(frozen=True)
class RankBatch:
    """One rank's rows of a global batch."""

    image_BCHW: torch.Tensor
    """uint8 [B, 3, H, W]"""
    text_BL: torch.Tensor
    """int64 [B, L]"""
    pair_ids_B: torch.Tensor
    """int64 [B]; rows come in groups of an anchor and its hard pairs"""
    global_batch_size: int
    """G, rows of all ranks"""
    num_substitutes: int
    """random pairs that stand in for missing hard pairs, all ranks"""
    undecodable: tuple[str, ...] = ()
    """pictures of this rank's share that were replaced, since they can't be decoded: shard, member, reason"""
    strong_images: tuple[torch.Tensor, ...] = ()
    """uint8 [B, 3, H, W] each: strong views of the same pictures, in order; H and W may be others than the weak view's"""
    strong_texts: tuple[torch.Tensor, ...] = ()
    """int64 [B, L] each: strong views of the captions, in order"""
    rows_per_rank: tuple[int, ...] = ()
    """rows of every rank; empty where they are not known: then the loss asks, and waits for the device"""

    def pin_memory(self) -> "RankBatch":
        pinned = {name: getattr(self, name).pin_memory() for name in ("image_BCHW", "text_BL", "pair_ids_B")}
        strong = {
            name: tuple(view.pin_memory() for view in getattr(self, name)) for name in ("strong_images", "strong_texts")
        }
        return replace(self, **pinned, **strong)


class StepDataset(Dataset[RankBatch]):
    """Map-style data set whose item `step` is this rank's share of that global step, counted from the start of the run."""

    def __init__(
        self,
        config: DataConfig,
        augment: AugmentConfig,
        *,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        image_size: tuple[int, int],  # height, width
        tokenizer: Callable[[list[str]], torch.Tensor],
        views: Views = WEAK_ONLY,
        strong_augment: AugmentConfig = STRONG_AUGMENT,
    ) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.pair_views = PairViews(config, augment, strong_augment, views, image_size, seed)
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.store = PairStore.open(config.store, cache=config.cache or None)
        self.table = open_pair_table(config, self.store)
        self.image_size, self.notes = image_size, ReadingNotes()
        self.conflict_group_N = (
            conflict_groups(self.store.caption_group_N, self.store.image_group_N)
            if config.keep_duplicates_apart
            else np.arange(len(self.store))
        )
        self.plan = self._plan_epoch(0)
        self.steps_per_epoch = self.plan.num_steps
        smallest = int(np.diff(self.plan.borders_S).min())
        if smallest < world_size:
            raise ValueError(
                f"batch_size={batch_size} gives {smallest} groups a step for {world_size} ranks; each rank needs at least one, "
                "so take a larger batch or fewer ranks"
            )

    def __getitem__(self, step: int) -> RankBatch:
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        if self.plan.epoch != epoch:
            self.plan = self._plan_epoch(epoch)
        batch = self.plan.batch(step_of_epoch)
        pair_ids = batch.rank_slice(self.rank, self.world_size).ravel()
        self.notes.note(f"the shards of step {step + 1}")
        self.store.prefetch(pair_ids)
        rows = Rows(self.pair_views.views)
        for pair_id in pair_ids.tolist():
            rows.append(*self._load(step, pair_id))
        self.notes.note("")
        (image_BCHW, *strong_images), (text_BL, *strong_texts) = rows.stacked_images(), rows.tokens(self.tokenizer)
        return RankBatch(
            image_BCHW,
            text_BL,
            torch.from_numpy(pair_ids),
            batch.num_pairs,
            int(batch.is_substitute_AP.sum()),
            strong_images=tuple(strong_images),
            strong_texts=tuple(strong_texts),
            rows_per_rank=tuple(batch.rank_slice(rank, self.world_size).size for rank in range(self.world_size)),
        )

    def samples_seen(self, num_steps: int) -> int:
        """Pairs presented in the first `num_steps` steps of the run, hard pairs included, all ranks."""
        epochs, steps = divmod(num_steps, self.steps_per_epoch)
        anchors = epochs * self.plan.borders_S[-1] + self.plan.borders_S[steps]
        return int(anchors) * (1 + self.config.hard_per_anchor)

    def identity(self) -> dict[str, Any]:
        """What config.json says about the data."""
        return {
            "num_pairs": len(self.store),
            "store_fingerprint": self.store.fingerprint,
            "pairs_fingerprint": self.table.manifest.get("fingerprint") if self.table else None,
        }

    def _load(self, step: int, pair_id: int) -> tuple[list[torch.Tensor], list[str]]:
        """The views of one pair's picture and of its caption."""
        self.notes.note(self.store.place_of(pair_id))
        sample = self.store[pair_id]
        try:
            picture = rgb(Image.open(io.BytesIO(sample.image)))
        except OSError as error:
            # Ingest decoded every picture, so this one was damaged since: stop rather than change the data silently.
            raise ValueError(
                f"the picture of pair {pair_id} (key {sample.key}) in {self.store.path} can't be decoded: {error}; ingest it again"
            ) from error
        return self.pair_views.images(picture, step, pair_id), self.pair_views.texts(sample.caption, step, pair_id)

    def _plan_epoch(self, epoch: int) -> EpochPlan:
        table, columns = self.table, self.config.num_candidates or None
        return EpochPlan(
            seed=self.seed,
            epoch=epoch,
            conflict_group_N=self.conflict_group_N,
            batch_size=self.batch_size,
            hard_per_anchor=self.config.hard_per_anchor,
            pair_ids_NK=None if table is None else table.pair_ids_NK[:, :columns],
            similarities_NK=(
                (table.image_similarity_NK[:, :columns], table.text_similarity_NK[:, :columns])
                if table is not None and self.config.weigh_by_score
                else None
            ),
            is_anchor_N=None if table is None else ~table.noise_N,
            partners=self.config.partners,
            shuffle_block=self.config.store_shuffle_block,
        )


def open_pair_table(config: DataConfig, store: PairStore) -> PairTable | None:
    """The pair table of the config, or None. Raises ValueError when it was mined from another store."""
    if not config.pairs:
        return None
    table = PairTable.open(config.pairs)
    mined_from = table.manifest.get("store_fingerprint")
    if mined_from != store.fingerprint:
        raise ValueError(
            f"the pair table {config.pairs} was mined from a store with fingerprint {str(mined_from)[:12]}, but {config.store} has "
            f"{store.fingerprint[:12]}: its ids would name other pairs; embed and mine this store"
        )
    return table


class _ErrorsAsItems(Dataset[RankBatch | ValueError]):
    """A worker hands a ValueError over as it is: torch would put its traceback into the message."""

    def __init__(self, dataset: Dataset[RankBatch]) -> None:
        self.dataset = dataset

    def __getitem__(self, step: int) -> RankBatch | ValueError:
        try:
            return self.dataset[step]
        except ValueError as error:
            return ValueError(str(error))


def step_loader(
    dataset: Dataset[RankBatch], *, start_step: int, stop_step: int, workers: int, pin_memory: bool
) -> Iterator[RankBatch]:
    """Batches of the steps `start_step .. stop_step - 1`, in order, of a data set with reading notes. Raises ValueError where it does."""
    dataset.notes.make_room(workers)
    loader = DataLoader(
        _ErrorsAsItems(dataset) if workers else dataset,
        batch_size=None,
        sampler=range(start_step, stop_step),
        num_workers=workers,
        # Forked workers share the reading notes and have all imports already.
        multiprocessing_context="fork" if workers else None,
        pin_memory=pin_memory,
        prefetch_factor=2 if workers else None,
        persistent_workers=False,
        worker_init_fn=end_with_parent,
        # Without one it draws from torch's own generator, and dropout after a restart would not be what it was without.
        generator=torch.Generator(),
    )
    for batch in loader:
        if isinstance(batch, ValueError):
            raise batch
        yield batch
