"""What makes the files of a PairStore right, for everyone who reads them: the loader, the gallery. A cache holds nothing less.

In: files of MDS shards, their entry in index.json, CRC-32 sums of their samples. Out: nothing, or a ValueError that says what is
wrong.
"""

import itertools
import json
import mmap
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from mining.remote_folder import RemoteFolder, RetryPolicy, is_remote

INDEX_NAME = "index.json"
CHECKSUMS_NAME = "checksums.npy"
# streaming writes columns in the order of their names: pair_id is last and eight bytes wide, so every stored sample ends in it.
PAIR_ID_BYTES = 8
CACHE_FLAGS = "--cache FOLDER, in training --data.cache FOLDER"


def check_shard(file: Path, info: dict[str, Any], first_id: int, checksums_B: np.ndarray) -> None:
    """ValueError unless `file` has the size of `info` (its entry in the index), pair ids from first_id on, and these checksums."""
    check_fetched_size(file, info["raw_data"]["bytes"])
    num_pairs = info["samples"]
    with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        # MDS: uint32 count, then count + 1 uint32 offsets.
        offsets = np.frombuffer(data[4 : 8 + 4 * num_pairs], "<u4").tolist()
        for place, (begin, end) in enumerate(itertools.pairwise(offsets)):
            sample = data[begin:end]
            if sample_checksum(sample) != checksums_B[place]:
                raise ValueError(f"the checksum of pair_id {first_id + place} differs in it")
            if int.from_bytes(sample[-PAIR_ID_BYTES:], "little") != first_id + place:
                raise ValueError(f"it holds another pair in the place of pair_id {first_id + place}")


def sample_checksum(data: bytes) -> int:
    """CRC-32 of a stored sample without its last eight bytes, the pair_id, which ingest fills in afterwards."""
    return zlib.crc32(memoryview(data)[:-PAIR_ID_BYTES])


def check_size(path: Path, size: int, remedy: str) -> None:
    if not path.is_file():
        raise ValueError(f"{path} is missing; copy it back or {remedy}")
    if path.stat().st_size != size:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, {size} were written; copy it again or {remedy}")


def check_fetched_size(path: Path, size: int) -> None:
    if path.stat().st_size != size:
        raise ValueError(f"it has {path.stat().st_size} bytes, {size} were written")


def check_is_json(path: Path) -> None:
    json.loads(path.read_bytes())


def open_remote(path: str | Path, cache: str | Path | None, retry: RetryPolicy | None) -> RemoteFolder | None:
    """The remote folder of a URL, None for a local path. Raises ValueError when `cache` is missing or makes no sense."""
    if not is_remote(path):
        if cache:
            raise ValueError(f"the store {path} is a local folder and needs no cache folder; leave {cache} out")
        return None
    if isinstance(path, Path):
        raise ValueError(f"{path} was a URL and has become a path; give the store's place as text")
    if not cache:
        raise ValueError(f"the store {path} is remote: give a cache folder on a local disk ({CACHE_FLAGS})")
    return RemoteFolder(path, cache, retry)
