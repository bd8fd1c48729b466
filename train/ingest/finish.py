"""From fragments to a PairStore: ids, ledger, checksums, index, and last the manifest, whose presence says "complete".

In: one fragment a source shard, in the order of the shard names. Out: the files of train.data.pair_store. Everything
here writes the same bytes when it is repeated, so a kill in the middle only means to run it again.
"""

import json
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from mining.manifest import MANIFEST_NAME, fingerprint, fsync_folder, write_manifest
from train.data.pair_store import (
    CHECKSUMS_NAME,
    FORMAT_VERSION,
    INDEX_NAME,
    KIND,
    LEDGER_NAME,
    PAIR_ID_BYTES,
    REJECTED_NAME,
    SHARDS_FOLDER,
)
from train.ingest.plan import Parameters
from train.ingest.worker import (
    LEDGER_SCHEMA,
    REJECTED_SCHEMA,
    ROWS_NAME,
    fragment_folder,
    read_fragment,
)


def finish_store(out: Path, num_shards: int, parameters: Parameters, workers: int) -> None:
    """Turn the fragments below `out` into a complete PairStore.

    Raises ValueError when no pair was kept, or a fragment is not what its worker wrote.
    """
    folders = [fragment_folder(out / SHARDS_FOLDER, number) for number in range(num_shards)]
    fragments = [read_fragment(folder) for folder in folders]
    write_rejected(out, folders)
    check_any_kept(out, fragments)
    first_ids = np.concatenate([[0], np.cumsum([fragment["num_pairs"] for fragment in fragments])]).tolist()
    number_samples(folders, fragments, first_ids, workers)
    write_ledger(out, folders, first_ids)
    write_index(out, folders, fragments)
    names = [INDEX_NAME, LEDGER_NAME, REJECTED_NAME, CHECKSUMS_NAME]
    make_durable([out / name for name in names])
    write_manifest(
        out,
        KIND,
        FORMAT_VERSION,
        num_pairs=first_ids[-1],
        num_rejected=count_rejected(fragments),
        num_source_shards=num_shards,
        parameters=asdict(parameters),
        fingerprint=store_fingerprint(fragments),
        files={name: (out / name).stat().st_size for name in names},
    )


def store_fingerprint(fragments: Sequence[dict[str, Any]]) -> str:
    """Of the pairs themselves: equal for every way to the same pairs under the same ids."""
    contents = [[fragment["shard"], fragment["num_pairs"], fragment["content"]] for fragment in fragments]
    return fingerprint(KIND, FORMAT_VERSION, [content for content in contents if content[1]])


def count_rejected(fragments: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Rejected rows by category, most frequent first."""
    counts = sum((Counter(fragment["num_rejected"]) for fragment in fragments), Counter())
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def describe_rejected(counts: dict[str, int]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in counts.items())


def check_any_kept(out: Path, fragments: Sequence[dict[str, Any]]) -> None:
    if any(fragment["num_pairs"] for fragment in fragments):
        return
    counts = count_rejected(fragments)
    if not counts:
        raise ValueError(f"no sample in {len(fragments)} shards; members are to be called KEY.jpg, KEY.txt, KEY.json")
    raise ValueError(
        f"every sample was rejected ({describe_rejected(counts)}); {out / REJECTED_NAME} says why for each; "
        "nothing to train on, so no store was made"
    )


def number_samples(
    folders: Sequence[Path], fragments: Sequence[dict[str, Any]], first_ids: Sequence[int], workers: int
) -> None:
    """Fill in the pair_id of every sample, several files at a time."""
    jobs = []
    for folder, fragment, first_id in zip(folders, fragments, first_ids[:-1], strict=True):
        for info in fragment["mds"]:
            jobs.append((folder / info["raw_data"]["basename"], info, first_id))
            first_id += info["samples"]
    with ThreadPoolExecutor(workers) as pool:
        results = pool.map(lambda job: number_file(*job), jobs)
        for _ in tqdm(results, "ids", len(jobs), unit="file", dynamic_ncols=True, mininterval=0.5):
            pass


def number_file(file: Path, info: dict[str, Any], first_id: int) -> None:
    """Write first_id, first_id + 1, ... into the last eight bytes of the samples of one MDS file."""
    if not file.is_file() or file.stat().st_size != info["raw_data"]["bytes"]:
        raise ValueError(f"{file} is not as it was written; delete {file.parent} and run the same command again")
    mapped = np.memmap(file, np.uint8, "r+")
    num_samples = info["samples"]
    # MDS: uint32 count, then count + 1 uint32 offsets, the end of each sample being the start of the next.
    ends = mapped[8 : 8 + 4 * num_samples].view("<u4").astype(np.int64)
    places = ends[:, None] - PAIR_ID_BYTES + np.arange(PAIR_ID_BYTES)
    mapped[places] = np.arange(first_id, first_id + num_samples, dtype="<i8").view(np.uint8).reshape(-1, PAIR_ID_BYTES)
    mapped.flush()


def write_ledger(out: Path, folders: Sequence[Path], first_ids: Sequence[int]) -> None:
    """Ledger and checksums, one row group a source shard, so that memory holds one shard's rows."""
    checksums_N = np.lib.format.open_memmap(out / CHECKSUMS_NAME, "w+", np.uint32, (first_ids[-1],))
    with pq.ParquetWriter(out / LEDGER_NAME, LEDGER_SCHEMA, compression="zstd") as writer:
        for folder, start, stop in zip(folders, first_ids, first_ids[1:], strict=False):
            if start == stop:
                continue
            rows = pq.read_table(folder / ROWS_NAME)
            checksums_N[start:stop] = rows["checksum"].to_numpy()
            pair_ids = pa.array(np.arange(start, stop, dtype=np.int64))
            writer.write_table(rows.drop_columns("checksum").add_column(0, "pair_id", pair_ids))
    checksums_N.flush()


def write_rejected(out: Path, folders: Sequence[Path]) -> None:
    with pq.ParquetWriter(out / REJECTED_NAME, REJECTED_SCHEMA, compression="zstd") as writer:
        for folder in folders:
            rejected = pq.read_table(folder / REJECTED_NAME)
            if rejected.num_rows:
                writer.write_table(rejected)


def write_index(out: Path, folders: Sequence[Path], fragments: Sequence[dict[str, Any]]) -> None:
    """One MDS index over the files of all fragments, in the order of the ids."""
    shards = []
    for folder, fragment in zip(folders, fragments, strict=True):
        for info in fragment["mds"]:
            basename = f"{SHARDS_FOLDER}/{folder.name}/{info['raw_data']['basename']}"
            shards.append({**info, "raw_data": {**info["raw_data"], "basename": basename}})
    text = json.dumps({"version": 2, "shards": shards}, sort_keys=True)
    (out / INDEX_NAME).write_text(text, encoding="utf-8")


def make_durable(files: Sequence[Path]) -> None:
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    fsync_folder(files[0].parent)


def remove_fragment_files(out: Path, num_shards: int) -> None:
    """After the manifest: what only `finish_store` needed, so that the store holds each fact once."""
    for number in range(num_shards):
        folder = fragment_folder(out / SHARDS_FOLDER, number)
        for name in (ROWS_NAME, REJECTED_NAME, MANIFEST_NAME, INDEX_NAME):
            (folder / name).unlink(missing_ok=True)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
