"""Write a PairStore again in another order: shards, ledger, checksums, index.

Each new shard is written by itself from the pairs that belong into it, read at random from the old ones, into a hidden folder that
is renamed when it is whole: shards that are there are never written again, and the number of threads changes nothing. Everything
after the shards writes the same bytes when it is repeated.

In: an opened store, the old id of every new one. Out: the files of train.data.pair_store below a new folder, but for its manifest.
"""

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mining.manifest import commit_folder
from mining.mds_files import PAIR_ID_BYTES
from train.data.pair_store import CHECKSUMS_NAME, INDEX_NAME, LEDGER_NAME, SHARDS_FOLDER, PairStore
from train.ingest.finish import CHECKSUM_TYPE, ROWS_PER_GROUP, GroupedWriter
from train.ingest.worker import LEDGER_SCHEMA

SHARD_NAME = "shard.00000.mds"
SCRATCH_NAME = ".reorder.ledger"
NUMBERS = ("width", "height")


def cut_shards(store: PairStore, old_ids_N: np.ndarray, shard_bytes: int) -> np.ndarray:
    """First new id of every shard and N at the end, int64 [S + 1]: as many pairs as fit into `shard_bytes`, at least one."""
    # Beside its bytes each sample has an offset.
    end_N = np.cumsum(store.stored_sizes()[old_ids_N].astype(np.int64) + 4)
    head = 8 + len(head_of(store))
    borders = [0]
    while borders[-1] < len(end_N):
        before = end_N[borders[-1] - 1] if borders[-1] else 0
        borders.append(max(borders[-1] + 1, int(np.searchsorted(end_N, before + shard_bytes - head, side="right"))))
    return np.array(borders)


def head_of(store: PairStore) -> bytes:
    """What an MDS file holds between its offsets and its first sample: the columns, as JSON."""
    with open(store.shard_file(0), "rb") as file:
        num_samples = int.from_bytes(file.read(4), "little")
        first = int.from_bytes(file.read(4), "little")
        file.seek(8 + 4 * num_samples)
        return file.read(first - file.tell())


def write_shards(
    store: PairStore,
    old_ids_N: np.ndarray,
    borders_S: np.ndarray,
    out: Path,
    workers: int,
    progress: Callable[[int], None],
) -> None:
    """Every shard that is not there yet; `progress` counts pairs, those of finished shards at once."""
    shards, head = out / SHARDS_FOLDER, head_of(store)
    shards.mkdir(exist_ok=True)
    for leftover in shards.glob(".*"):
        shutil.rmtree(leftover)

    def write(shard: int) -> int:
        first, stop = int(borders_S[shard]), int(borders_S[shard + 1])
        if not shard_folder(out, shard).is_dir():
            write_shard(store, old_ids_N[first:stop], first, head, shard_folder(out, shard))
        return stop - first

    with ThreadPoolExecutor(workers) as pool:
        running = [pool.submit(write, shard) for shard in range(len(borders_S) - 1)]
        try:
            for done in as_completed(running):
                progress(done.result())
        except BaseException:
            # Else the pool would write all other shards before the error is seen.
            pool.shutdown(cancel_futures=True)
            raise


def shard_folder(out: Path, shard: int) -> Path:
    return out / SHARDS_FOLDER / f"{shard:05d}"


def write_shard(store: PairStore, old_ids_B: np.ndarray, first_id: int, head: bytes, folder: Path) -> None:
    samples: list[bytes] = [b""] * len(old_ids_B)
    # In the old order: pairs that lay beside each other are read one after the other.
    for place in np.argsort(old_ids_B).tolist():
        data = store.stored_sample(int(old_ids_B[place]))
        samples[place] = data[:-PAIR_ID_BYTES] + (first_id + place).to_bytes(PAIR_ID_BYTES, "little")
    offsets = np.cumsum([0, *map(len, samples)]) + 8 + 4 * len(samples) + len(head)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    temporary.mkdir()
    with open(temporary / SHARD_NAME, "wb") as file:
        file.write(len(samples).to_bytes(4, "little") + offsets.astype("<u4").tobytes() + head)
        file.writelines(samples)
    commit_folder(temporary, folder)


def write_index(store: PairStore, borders_S: np.ndarray, out: Path) -> None:
    like = store.shard_infos[0]
    with open(out / INDEX_NAME, "w", encoding="utf-8") as file:
        file.write('{"shards": [')
        for shard, num_pairs in enumerate(np.diff(borders_S).tolist()):
            path = shard_folder(out, shard) / SHARD_NAME
            raw = {**like["raw_data"], "basename": str(path.relative_to(out)), "bytes": path.stat().st_size}
            file.write(
                (", " if shard else "") + json.dumps({**like, "raw_data": raw, "samples": num_pairs}, sort_keys=True)
            )
        file.write('], "version": 2}')


def write_checksums(store: PairStore, old_ids_N: np.ndarray, out: Path) -> None:
    header = {"descr": CHECKSUM_TYPE.str, "fortran_order": False, "shape": (len(store),)}
    with open(out / CHECKSUMS_NAME, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for rows in chunks(len(store)):
            file.write(store.checksums_N[old_ids_N[rows]].astype(CHECKSUM_TYPE).tobytes())


def write_ledger(store: PairStore, old_ids_N: np.ndarray, out: Path) -> None:
    """The ledger in the new order, one row group in memory at a time: its rows lie in a scratch file that is mapped."""
    with (
        rows_on_disk(store.path / LEDGER_NAME, out / SCRATCH_NAME) as (rows_N, shard_names),
        GroupedWriter(out / LEDGER_NAME, LEDGER_SCHEMA) as ledger,
    ):
        for part in chunks(len(store)):
            rows = rows_N[old_ids_N[part]]
            columns: dict[str, Any] = {"pair_id": np.arange(part.start, part.start + len(rows))}
            columns["shard"] = pa.array(shard_names).take(pa.array(rows["shard"]))
            for name in rows.dtype.names:
                if name not in columns:
                    is_text = rows.dtype[name].kind == "S"
                    columns[name] = pa.array([text.decode() for text in rows[name]] if is_text else rows[name])
            ledger.write(pa.table({name: columns[name] for name in LEDGER_SCHEMA.names}, schema=LEDGER_SCHEMA))


@contextmanager
def rows_on_disk(ledger: Path, scratch: Path) -> Iterator[tuple[np.ndarray, list[str]]]:
    """The ledger as a memory-mapped structured array [N] (texts as UTF-8, `shard` as a number) and the names of the shards."""
    texts = [field.name for field in LEDGER_SCHEMA if pa.types.is_string(field.type) and field.name != "shard"]
    widths, shard_numbers = dict.fromkeys(texts, 1), {}
    for part in row_groups(ledger):
        for name in texts:
            widths[name] = max(widths[name], max(len(text.encode()) for text in part[name].to_pylist()))
        for shard in part["shard"].unique().to_pylist():
            shard_numbers.setdefault(shard, len(shard_numbers))
    row = [(name, f"S{width}") for name, width in widths.items()]
    row += [(name, "<i4") for name in ("shard", *NUMBERS)]
    try:
        rows_N = np.memmap(scratch, dtype=row, mode="w+", shape=pq.read_metadata(ledger).num_rows)
        start = 0
        for part in row_groups(ledger):
            rows = rows_N[start : start + part.num_rows]
            for name in texts:
                rows[name] = [text.encode() for text in part[name].to_pylist()]
            rows["shard"] = [shard_numbers[shard] for shard in part["shard"].to_pylist()]
            for name in NUMBERS:
                rows[name] = part[name].to_numpy()
            start += part.num_rows
        yield rows_N, list(shard_numbers)
    finally:
        scratch.unlink(missing_ok=True)


def row_groups(path: Path) -> Iterator[pa.Table]:
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            yield file.read_row_group(group)


def chunks(num_rows: int) -> Iterator[slice]:
    for start in range(0, num_rows, ROWS_PER_GROUP):
        yield slice(start, min(start + ROWS_PER_GROUP, num_rows))


def save_whole(path: Path, array: np.ndarray) -> None:
    """A .npy file, whole or not at all."""
    temporary = path.with_name(f".reorder.{path.name}")
    with open(temporary, "wb") as file:
        np.save(file, array, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
