"""Pretraining straight from WebDataset tars: every item of the data set is this rank's share of one global step, read from the
tars in place.

In: a `ShardIndex` and the order of `stream_order`. Out: the `RankBatch`es that `loader` gives from a PairStore, without hard
pairs; `pair_ids_B` are sample ids of the index. As there, a batch depends on the step alone.

A picture that can't be decoded is replaced by the next sample that can, and named in the batch: which one that is depends on
the tars alone, so ranks stay in step and a resumed run sees the same. Too many in a row, or a tar that is not as it was
indexed, stop the run with the shard's name.

Shape letters: B rows of this rank.
"""

import io
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset

from train.config import STRONG_AUGMENT, AugmentConfig, DataConfig
from train.data.augment import rgb
from train.data.loader import RankBatch
from train.data.pair_views import PairViews, Rows
from train.data.reading import ReadingNotes
from train.data.shard_index import ShardIndex
from train.data.stream_order import StreamOrder
from train.data.tar_files import TarFiles, damaged
from train.ingest.decode import IMAGE_FORMATS, describe
from train.views import WEAK_ONLY, Views

# Pillow's own limit and the default of ingest's --max-pixels.
MAX_PIXELS = 89_478_485
# A few undecodable pictures are the web's; so many neighbours mean that the tar is not what it was.
MAX_UNDECODABLE_IN_A_ROW = 16


class Undecodable(Exception):
    """Why a picture can't be decoded."""


class TarStream(Dataset[RankBatch]):
    """Map-style data set whose item `step` is this rank's share of that global step, counted from the start of the run."""

    def __init__(
        self,
        index: ShardIndex,
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
        self.index, self.config, self.tokenizer = index, config, tokenizer
        self.pair_views = PairViews(config, augment, strong_augment, views, image_size, seed)
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.image_size = image_size
        self.files, self.notes = TarFiles(index), ReadingNotes()
        self.order = self._order(0)
        self.steps_per_epoch = self.order.num_steps
        smallest = len(index) // self.steps_per_epoch
        if smallest < world_size:
            raise ValueError(
                f"batch_size={batch_size} gives {smallest} samples a step for {world_size} ranks; each rank needs at least one, "
                "so take a larger batch or fewer ranks"
            )

    def __getitem__(self, step: int) -> RankBatch:
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        if self.order.epoch != epoch:
            self.order = self._order(epoch)
        ids_B = self.order.batch(step_of_epoch, self.rank, self.world_size)
        num_samples = self.order.border(step_of_epoch + 1) - self.order.border(step_of_epoch)
        rows, undecodable = Rows(self.pair_views.views), []
        for row, sample_id in enumerate(ids_B.tolist()):
            picture, caption, ids_B[row] = self._load(sample_id, undecodable)
            rows.append(
                self.pair_views.images(picture, step, int(ids_B[row])),
                self.pair_views.texts(caption, step, int(ids_B[row])),
            )
        self.notes.note("")
        (image_BCHW, *strong_images), (text_BL, *strong_texts) = rows.stacked_images(), rows.tokens(self.tokenizer)
        return RankBatch(
            image_BCHW,
            text_BL,
            torch.from_numpy(ids_B),
            num_samples,
            0,
            tuple(undecodable),
            tuple(strong_images),
            tuple(strong_texts),
            self.order.rows_per_rank(step_of_epoch, self.world_size),
        )

    def samples_seen(self, num_steps: int) -> int:
        """Samples presented in the first `num_steps` steps of the run, all ranks."""
        epochs, steps = divmod(num_steps, self.steps_per_epoch)
        return epochs * len(self.index) + self.order.border(steps)

    def identity(self) -> dict[str, Any]:
        """What config.json says about the data."""
        return {
            "num_pairs": len(self.index),
            "shards_fingerprint": self.index.fingerprint,
            "num_shards": len(self.index.shards),
            "left_out": self.index.left_out,
        }

    def summary(self) -> str:
        left_out = ", ".join(f"{count:,} {reason}" for reason, count in self.index.left_out.items())
        return f"{len(self.index):,} samples in {len(self.index.shards):,} tars; left out: {left_out or 'none'}"

    def _load(self, sample_id: int, undecodable: list[str]) -> tuple[Image.Image, str, int]:
        """Picture, caption and id of the sample, or of the next one whose picture can be decoded."""
        for tried in range(MAX_UNDECODABLE_IN_A_ROW):
            candidate = (sample_id + tried) % len(self.index)
            self.notes.note(self.index.shards[self.index.shard_number(candidate)].path)
            data, caption = self.files.read(candidate)
            try:
                picture = decode(data)
            except Undecodable as error:
                reason = f"{self.files.name(candidate)}: {error}"
                if not tried:
                    undecodable.append(reason)
                continue
            return picture, caption, candidate
        shard = self.index.shards[self.index.shard_number(sample_id)]
        raise damaged(
            shard, f"holds {MAX_UNDECODABLE_IN_A_ROW} pictures in a row that can't be decoded, the last is {reason}"
        )

    def _order(self, epoch: int) -> StreamOrder:
        return StreamOrder(
            seed=self.seed,
            epoch=epoch,
            shard_sizes=self.index.shard_sizes,
            batch_size=self.batch_size,
            lanes=self.config.shard_lanes,
            block=self.config.shuffle_block,
        )


def decode(data: bytes) -> Image.Image:
    """A picture in RGB. Raises Undecodable."""
    try:
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        if image.width * image.height <= MAX_PIXELS:
            return rgb(image)
    except MemoryError:
        raise
    # Decoders meet corrupt bytes with any exception: OSError, SyntaxError, ValueError, struct.error, ...
    except Exception as error:
        raise Undecodable(describe(error)) from error
    raise Undecodable(f"too many pixels: {image.width} x {image.height}, the limit is {MAX_PIXELS}")
