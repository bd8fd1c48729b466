"""Samples of indexed tars by id: one read for picture and caption, and what to say when a tar is not as it was indexed.

In: a `ShardIndex`. Out: bytes and captions. Each process has its own `TarFiles`.
"""

import os
import tarfile
from collections import OrderedDict
from io import FileIO
from typing import Any

from train.data.shard_index import Shard, ShardIndex

# A process reads the tars of its lanes, one or two a lane.
MAX_OPEN_TARS = 128
# Picture and caption are mostly neighbours, with a header and a little JSON between: one read for both up to this much more.
MAX_GAP_BYTES = 32 << 10
REMEDY = "run the same command again to index the tars as they are now; a run that began with others does not go on with them"


class TarFiles:
    """Reads samples by id; keeps the tars that were used last open."""

    def __init__(self, index: ShardIndex) -> None:
        self.index = index
        self._open: OrderedDict[int, FileIO] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"index": self.index, "_open": OrderedDict()}

    def read(self, sample_id: int) -> tuple[bytes, str]:
        """The picture's bytes as found, and the caption. Raises ValueError naming a tar that is damaged or has changed."""
        number = self.index.shard_number(sample_id)
        shard = self.index.shards[number]
        image_at, caption_at, image_size, caption_size = self.index.samples_N[sample_id].item()
        start, stop = min(image_at, caption_at), max(image_at + image_size, caption_at + caption_size)
        try:
            file = self._file(number)
            if stop - start <= image_size + caption_size + MAX_GAP_BYTES:
                span = os.pread(file, stop - start, start)
                image = span[image_at - start : image_at - start + image_size]
                caption = span[caption_at - start : caption_at - start + caption_size]
            else:
                image, caption = os.pread(file, image_size, image_at), os.pread(file, caption_size, caption_at)
            caption = caption.decode("utf-8")
        except OSError as error:
            raise damaged(shard, f"cannot be read ({error})") from error
        except UnicodeDecodeError as error:
            raise damaged(shard, f"holds another caption at byte {caption_at} than was indexed") from error
        if len(image) != image_size or len(caption) == 0:
            raise damaged(shard, f"ends before byte {stop}")
        return image, caption

    def name(self, sample_id: int) -> str:
        """Shard and member of a sample's picture, as a tar lists it."""
        number = self.index.shard_number(sample_id)
        at = int(self.index.samples_N[sample_id]["image_offset"])
        header = os.pread(self._file(number), tarfile.BLOCKSIZE, at - tarfile.BLOCKSIZE)
        try:
            member = tarfile.TarInfo.frombuf(header, "utf-8", "backslashreplace").name
        except tarfile.HeaderError:
            member = f"byte {at}"
        return f"{self.index.shards[number].name}: {member}"

    def _file(self, number: int) -> int:
        """Descriptor of a tar."""
        if number not in self._open:
            if len(self._open) == MAX_OPEN_TARS:
                self._open.popitem(last=False)[1].close()
            self._open[number] = open_unchanged(self.index.shards[number])
        self._open.move_to_end(number)
        return self._open[number].fileno()


def open_unchanged(shard: Shard) -> FileIO:
    """The tar, opened. Raises ValueError when its size or time is not what the index says."""
    file = FileIO(shard.path)
    status = os.fstat(file.fileno())
    if (status.st_size, status.st_mtime_ns) != (shard.size, shard.mtime_ns):
        file.close()
        raise damaged(shard, f"was changed since it was indexed ({shard.size} bytes then, {status.st_size} now)")
    return file


def damaged(shard: Shard, what: str) -> ValueError:
    return ValueError(f"shard {shard.path} {what}; {REMEDY}")
