"""Pair ids into the MDS files of fragments, in place: the number of pairs in all earlier shards decides the first one.

A single ingest numbers a fragment as soon as all earlier shards are there, while its pages are still in memory; a merge
numbers all of them at the end. Either way a note beside the files says what they were numbered with, once that is on
the disk: nothing is done twice, and a kill costs one fragment.
"""

import itertools
import mmap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mining.mds_files import PAIR_ID_BYTES
from train.data.pair_store import SHARDS_FOLDER
from train.ingest.plan import Plan
from train.ingest.worker import REMEDY, fragment_folder, read_fragment

NUMBERED_NAME = "first_id"
ROUND_FRAGMENTS_PER_WORKER = 8


def fragment_at(out: Path, plan: Plan, number: int) -> tuple[Path, dict[str, Any]]:
    """Folder and manifest of one shard's fragment. Raises ValueError when it is missing or belongs to another ingest."""
    name = plan.shards[number][0]
    folder = fragment_folder(out / SHARDS_FOLDER, number)
    fragment = read_fragment(folder)
    if (fragment["shard"], fragment["plan"]) != (name, plan.digest):
        raise ValueError(
            f"{folder} is another ingest's: it was made from {fragment['shard']} with other --shards or flags than {out} was "
            f"started with, where it belongs to {name}; {REMEDY}"
        )
    return folder, fragment


def each_fragment(out: Path, plan: Plan) -> Iterator[tuple[Path, dict[str, Any], int]]:
    """Folder, manifest and first pair id of every fragment, in the order of the shards."""
    first_id = 0
    for number in range(len(plan.shards)):
        folder, fragment = fragment_at(out, plan, number)
        yield folder, fragment, first_id
        first_id += fragment["num_pairs"]


class Numbering:
    """Numbers fragments from the first on, as far as they are there, each time `advance` is called."""

    def __init__(self, out: Path, plan: Plan) -> None:
        self.out, self.plan = out, plan
        self._next_shard = self._next_id = 0

    def advance(self) -> None:
        while self._next_shard < len(self.plan.shards):
            if not fragment_folder(self.out / SHARDS_FOLDER, self._next_shard).is_dir():
                return
            folder, fragment = fragment_at(self.out, self.plan, self._next_shard)
            number_fragment(folder, fragment, self._next_id)
            self._next_shard += 1
            self._next_id += fragment["num_pairs"]


def number_all(out: Path, plan: Plan, workers: int) -> None:
    """Fill in the pair_id of every sample that has none yet, several fragments at a time."""
    fragments = each_fragment(out, plan)
    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(desc="ids", total=len(plan.shards), unit="shard", dynamic_ncols=True, mininterval=0.5) as bar,
    ):
        # In rounds: handed over all at once, their manifests would all be in memory.
        while some := list(itertools.islice(fragments, ROUND_FRAGMENTS_PER_WORKER * workers)):
            for _ in pool.map(lambda fragment: number_fragment(*fragment), some):
                bar.update()


def number_fragment(folder: Path, fragment: dict[str, Any], first_id: int) -> None:
    """Number the pairs of one fragment first_id, first_id + 1, ...

    Raises ValueError when one of its files is not of the size that was written.
    """
    files = [(folder / info["raw_data"]["basename"], info) for info in fragment["mds"]]
    for file, info in files:
        if not file.is_file() or file.stat().st_size != info["raw_data"]["bytes"]:
            raise ValueError(f"{file} is not as it was written; delete {folder} and run the same command again")
    note = folder / NUMBERED_NAME
    if note.is_file() and note.read_text(encoding="utf-8") == str(first_id):
        return
    next_id = first_id
    for file, info in files:
        number_file(file, info["samples"], next_id)
        next_id += info["samples"]
    note.write_text(str(first_id), encoding="utf-8")


def number_file(file: Path, num_samples: int, first_id: int) -> None:
    """Write first_id, first_id + 1, ... into the last eight bytes of the samples of one MDS file."""
    with open(file, "r+b") as opened, mmap.mmap(opened.fileno(), 0) as mapping:
        # One page a sample: reading ahead would fetch the whole file.
        mapping.madvise(mmap.MADV_RANDOM)
        write_ids(np.frombuffer(mapping, np.uint8), num_samples, first_id)
        mapping.flush()


def write_ids(mapped: np.ndarray, num_samples: int, first_id: int) -> None:
    # MDS: uint32 count, then count + 1 uint32 offsets, the end of each sample being the start of the next.
    ends = mapped[8 : 8 + 4 * num_samples].view("<u4").astype(np.int64)
    places = ends[:, None] - PAIR_ID_BYTES + np.arange(PAIR_ID_BYTES)
    mapped[places] = np.arange(first_id, first_id + num_samples, dtype="<i8").view(np.uint8).reshape(-1, PAIR_ID_BYTES)
