"""Rows of the embedding arrays, read without keeping them: neither arrays nor file pages of size N x D stay in memory.

The arrays are memory maps. A page once touched counts as the process's until it is dropped, so rows that stay are copied, a
block of the base is dropped when the next one comes, and the system's page cache keeps them for the next pass.

Shape letters: N pairs, B rows of one block, D embedding width.
"""

import mmap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from mining.problem import SearchProblem

# Mapped at a time: beside the copy, so many bytes of pages are in memory.
COPY_BYTES = 16 << 20
# A touched page brings its neighbours, 64 KiB in all.
GATHER_ROWS = 512
BLOCK_BYTES = 256 << 20
# What a resident base may take of a GPU's free memory; the rest is for tiles and results.
DEVICE_SHARE = 0.6


def read_rows(rows_ND: np.ndarray, ids: slice | np.ndarray) -> np.ndarray:
    """A copy of the rows `ids` (a slice of step 1, or integers); pages of a memory map are dropped again."""
    if isinstance(ids, slice):
        start, stop, _ = ids.indices(len(rows_ND))
        copy_BD = np.empty((max(stop - start, 0), *rows_ND.shape[1:]), rows_ND.dtype)
        return read_into(copy_BD, rows_ND, start)
    copy_BD = np.empty((len(ids), *rows_ND.shape[1:]), rows_ND.dtype)
    for first in range(0, len(ids), GATHER_ROWS):
        copy_BD[first : first + GATHER_ROWS] = rows_ND[ids[first : first + GATHER_ROWS]]
        drop_pages(rows_ND)
    return copy_BD


def read_into(copy_BD: np.ndarray, rows_ND: np.ndarray, start: int) -> np.ndarray:
    """Fill `copy_BD` with the rows from `start` on; pages of a memory map are dropped again."""
    step = max(1, COPY_BYTES // max(1, row_bytes(rows_ND)))
    for first in range(0, len(copy_BD), step):
        part = copy_BD[first : first + step]
        part[:] = rows_ND[start + first : start + first + len(part)]
        drop_pages(rows_ND)
    return copy_BD


def drop_pages(rows_ND: np.ndarray) -> None:
    """Give the touched pages of a memory map back; what is no memory map stays as it is."""
    if isinstance(rows_ND, np.memmap) and rows_ND._mmap is not None:
        rows_ND._mmap.madvise(mmap.MADV_DONTNEED)


def announce(rows_ND: np.ndarray, start: int, stop: int) -> None:
    """Ask the system to read these rows ahead, from a disk while the processor works."""
    if not (isinstance(rows_ND, np.memmap) and rows_ND._mmap is not None) or stop <= start:
        return
    # The map begins at a page, the array `offset % page` bytes later.
    first = rows_ND.offset % mmap.ALLOCATIONGRANULARITY + start * row_bytes(rows_ND)
    aligned = first - first % mmap.PAGESIZE
    rows_ND._mmap.madvise(mmap.MADV_WILLNEED, aligned, first - aligned + (stop - start) * row_bytes(rows_ND))


def row_bytes(rows_ND: np.ndarray) -> int:
    return int(np.prod(rows_ND.shape[1:], dtype=np.int64)) * rows_ND.itemsize


@dataclass(frozen=True)
class BaseBlock:
    """Rows start..start+B of both towers, float16 on the stream's device, to be read only; valid until the next block is asked for."""

    start: int
    image_BD: torch.Tensor
    text_BD: torch.Tensor

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + len(self.image_BD))


class BaseStream:
    """The pairs of a problem in ascending blocks, as often as iterated. On a GPU they stay there when all fit."""

    def __init__(self, problem: SearchProblem, device: torch.device, *, block_rows: int | None = None):
        pair_bytes = row_bytes(problem.image_ND) + row_bytes(problem.text_ND)
        self.problem, self.device = problem, device
        self.block_rows = block_rows or max(1, BLOCK_BYTES // pair_bytes)
        self.buffers: list[torch.Tensor] | None = None
        self.resident: dict[int, BaseBlock] | None = None
        if device.type == "cuda":
            free_bytes, _ = torch.cuda.mem_get_info(device)
            if len(problem) * pair_bytes < DEVICE_SHARE * free_bytes:
                self.resident = {}

    def blocks(self, within: slice | None = None) -> Iterator[BaseBlock]:
        """Blocks of the pairs of `within` (all when None)."""
        first, last, _ = (within or slice(None)).indices(len(self.problem))
        for start in range(first, last, self.block_rows):
            stop = min(start + self.block_rows, last)
            following = (stop, min(stop + self.block_rows, last))
            if self.device.type == "cpu":
                yield self._mapped_block(start, stop, following)
            else:
                yield self._block(start, stop, following, stays=within is None)
        for array in self._arrays:
            drop_pages(array)

    def share_passed(self, block: BaseBlock, within: slice | None = None) -> float:
        """Of the pairs of `within`, those up to the end of `block`."""
        first, last, _ = (within or slice(None)).indices(len(self.problem))
        return (block.rows.stop - first) / (last - first)

    def _mapped_block(self, start: int, stop: int, following: tuple[int, int]) -> BaseBlock:
        """The rows where they are: pages that are read anyway need no copy. Those of earlier blocks are dropped."""
        for array in self._arrays:
            drop_pages(array)
            announce(array, *following)
        with warnings.catch_warnings():
            # That a map is read-only: nobody writes to a block.
            warnings.simplefilter("ignore", UserWarning)
            return BaseBlock(start, *(torch.from_numpy(array[start:stop]) for array in self._arrays))

    def _block(self, start: int, stop: int, following: tuple[int, int], *, stays: bool) -> BaseBlock:
        kept = None if self.resident is None else self.resident.get(start)
        if kept is not None and len(kept.image_BD) == stop - start:
            return kept
        if self.buffers is None:
            rows = min(self.block_rows, len(self.problem))
            # Pinned: copied to the GPU without another copy in between.
            self.buffers = [
                torch.empty(rows, array.shape[1], dtype=torch.float16, pin_memory=True) for array in self._arrays
            ]
        tensors = []
        for buffer, array in zip(self.buffers, self._arrays, strict=True):
            read_into(buffer[: stop - start].numpy(), array, start)
            announce(array, *following)
            tensors.append(buffer[: stop - start].to(self.device))
        block = BaseBlock(start, *tensors)
        # Blocks of a part begin elsewhere: kept as well, they would be there twice.
        if self.resident is not None and stays:
            self.resident[start] = block
        return block

    @property
    def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
        return self.problem.image_ND, self.problem.text_ND
