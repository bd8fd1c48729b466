"""One tar scanned for training: where picture and caption of each of its samples lie.

In: a local tar. Out: a part file for `shard_index`: SAMPLE [n] in the order of the tar and, as JSON, what was left out and what
is wrong with the tar as a whole. Samples are left out by ingest's rules, but for what only decoding the picture can tell.
"""

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from train.ingest.decode import (
    CAPTION_EXTENSION,
    MAX_MEMBER_MIB,
    Rejected,
    check_texts,
    read_once,
)
from train.ingest.samples import reason_category
from train.ingest.sources import DECOMPRESSORS, Source
from train.ingest.tar_index import Member, index_tar, read_member

SAMPLE = np.dtype([("image_offset", "<i8"), ("caption_offset", "<i8"), ("image_size", "<i4"), ("caption_size", "<i4")])
INGEST = "`python -m train.ingest --shards ... --out FOLDER` and --data.store FOLDER"


def identity(source: Source) -> list[Any]:
    """Name, path, size in bytes and modification time: a tar that was written again is another one."""
    status = os.stat(source.url)
    return [source.name, source.url, status.st_size, status.st_mtime_ns]


def write_part(source: Source, path: Path) -> None:
    """Index one tar into `path`: its samples and, as JSON, what else there is to say about it."""
    facts: dict[str, Any] = {"identity": identity(source), "problem": None, "left_out": {}}
    rows_N = np.empty(0, SAMPLE)
    try:
        with open(source.url, "rb") as file:
            facts["problem"] = compression(file)
            if facts["problem"] is None:
                rows_N, facts["left_out"], facts["problem"] = scan_tar(file)
    except OSError as error:
        facts["problem"] = f"cannot be read ({error})"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        np.savez(file, samples=rows_N, facts=np.array(json.dumps(facts)))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def compression(file: BinaryIO) -> str | None:
    packed = any(file.read(8).startswith(magic) for magic in DECOMPRESSORS if file.seek(0) == 0)
    file.seek(0)
    return f"is compressed, so it cannot be read in any order; unpack it, or ingest it: {INGEST}" if packed else None


def scan_tar(file: BinaryIO) -> tuple[np.ndarray, dict[str, int], str | None]:
    """Samples in the order of the tar, the number left out by reason, and what is wrong with the tar as a whole."""
    index = index_tar(file)
    if index.torn is not None:
        remedy = f"download it again, leave it out of --data.shards, or ingest what is before the tear: {INGEST}"
        return np.empty(0, SAMPLE), {}, f"is torn ({index.torn}); {remedy}"
    rows, left_out = [], Counter()
    for key, members in index.members.items():
        try:
            rows.append(sample_row(key, members, lambda member: read_member(file, member)))
        except Rejected as reason:
            left_out[reason_category(str(reason))] += 1
    return np.sort(np.array(rows, SAMPLE), order="image_offset"), dict(sorted(left_out.items())), None


def sample_row(
    key: str, members: dict[str, list[Member]], read: Callable[[Member], bytes]
) -> tuple[int, int, int, int]:
    """Where picture and caption of a key lie. Raises Rejected by ingest's rules, but for what only decoding can tell."""
    extension, _ = check_texts(key, members, read)
    if len(members[extension]) > 1 or members[extension][0].size > MAX_MEMBER_MIB << 20:
        read_once(members[extension], extension, read)
    image, caption = members[extension][0], members[CAPTION_EXTENSION][0]
    return image.offset, caption.offset, image.size, caption.size


def read_part(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """Samples and facts: identity, problem (None or what is wrong with the tar), left_out (counts by reason)."""
    with np.load(path, allow_pickle=False) as part:
        return part["samples"], json.loads(str(part["facts"]))
