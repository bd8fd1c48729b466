"""From fragments to a PairStore: ids, ledger, checksums, index, and last the manifest, whose presence says "complete".

In: one fragment a source shard, in the order of the shard names. Out: the files of train.data.pair_store. Fragments are
read one after the other, so memory does not grow with their number. Everything here writes the same bytes when it is
repeated, so a kill in the middle only means to run it again.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mining.manifest import MANIFEST_NAME, fingerprint, fsync_folder, write_manifest
from train.data.pair_store import (
    CHECKSUMS_NAME,
    FORMAT_VERSION,
    INDEX_NAME,
    KIND,
    LEDGER_NAME,
    REJECTED_NAME,
    SHARDS_FOLDER,
)
from train.ingest.numbering import NUMBERED_NAME, each_fragment, number_all
from train.ingest.plan import Plan
from train.ingest.source_table import add_up
from train.ingest.worker import LEDGER_SCHEMA, REJECTED_SCHEMA, ROWS_NAME, fragment_folder

# Of ledger and rejected.parquet: about 10 MiB in memory.
ROWS_PER_GROUP = 65_536
# How many tables are gathered before they become one.
MAX_TABLES = 64
CHECKSUM_TYPE = np.dtype("<u4")


def finish_store(out: Path, plan: Plan, workers: int) -> None:
    """Turn the fragments below `out` into a complete PairStore.

    Raises ValueError when no pair was kept, or a fragment is not what its worker wrote.
    """
    write_rejected(out, plan)
    num_pairs, counts = count_fragments(out, plan)
    check_any_kept(out, len(plan.shards), num_pairs, counts["num_rejected"])
    number_all(out, plan, workers)
    write_ledger(out, plan, num_pairs)
    write_index(out, plan)
    names = [INDEX_NAME, LEDGER_NAME, REJECTED_NAME, CHECKSUMS_NAME]
    make_durable([out / name for name in names])
    write_manifest(
        out,
        KIND,
        FORMAT_VERSION,
        num_pairs=num_pairs,
        **counts,
        num_source_shards=len(plan.shards),
        parameters=asdict(plan.parameters),
        files={name: (out / name).stat().st_size for name in names},
    )


def count_fragments(out: Path, plan: Plan) -> tuple[int, dict]:
    """Number of pairs, and the manifest's fields that are added up over all fragments."""
    num_rejected, num_shrunk, contents, tables = Counter(), 0, [], []
    next_id = 0
    for _, fragment, first_id in each_fragment(out, plan):
        next_id = first_id + fragment["num_pairs"]
        num_rejected.update(fragment["num_rejected"])
        num_shrunk += fragment["num_shrunk"]
        tables.append(fragment["table"])
        if fragment["num_pairs"]:
            contents.append([fragment["shard"], fragment["num_pairs"], fragment["content"]])
    return next_id, {
        "num_rejected": in_order_of_frequency(num_rejected),
        "num_shrunk": num_shrunk,
        "source_tables": add_up(tables),
        # Of the pairs themselves: equal for every way to the same pairs under the same ids.
        "fingerprint": fingerprint(KIND, FORMAT_VERSION, contents),
    }


def in_order_of_frequency(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def describe_rejected(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in counts.items())


def check_any_kept(out: Path, num_shards: int, num_pairs: int, rejected: Mapping[str, int]) -> None:
    if num_pairs:
        return
    if not rejected:
        raise ValueError(f"no sample in {num_shards} shards; members are to be called KEY.jpg, KEY.txt, KEY.json")
    raise ValueError(
        f"every sample was rejected ({describe_rejected(rejected)}); {out / REJECTED_NAME} says why for each; "
        "nothing to train on, so no store was made"
    )


class GroupedWriter:
    """A parquet file of row groups of one size, whatever the tables that come in: each group costs memory until the end."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._writer = pq.ParquetWriter(path, schema, compression="zstd")
        self._tables: list[pa.Table] = []
        self._num_rows = 0

    def write(self, table: pa.Table) -> None:
        self._tables.append(table)
        self._num_rows += table.num_rows
        if self._num_rows < ROWS_PER_GROUP and len(self._tables) < MAX_TABLES:
            return
        # A small table takes ten times what is in it.
        rows = pa.concat_tables(self._tables).combine_chunks()
        whole = self._num_rows - self._num_rows % ROWS_PER_GROUP
        if whole:
            self._writer.write_table(rows.slice(0, whole), row_group_size=ROWS_PER_GROUP)
            # A copy: a slice would keep all rows in memory.
            rows = rows.take(pa.array(np.arange(whole, self._num_rows)))
        self._tables = [rows]
        self._num_rows -= whole

    def __enter__(self) -> "GroupedWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._num_rows:
            self._writer.write_table(pa.concat_tables(self._tables), row_group_size=ROWS_PER_GROUP)
        self._writer.close()


def write_ledger(out: Path, plan: Plan, num_pairs: int) -> None:
    """Ledger and checksums, one row group in memory at a time."""
    header = {"descr": CHECKSUM_TYPE.str, "fortran_order": False, "shape": (num_pairs,)}
    with open(out / CHECKSUMS_NAME, "wb") as checksums, GroupedWriter(out / LEDGER_NAME, LEDGER_SCHEMA) as ledger:
        np.lib.format.write_array_header_1_0(checksums, header)
        for folder, fragment, first_id in each_fragment(out, plan):
            for rows in row_groups(folder / ROWS_NAME) if fragment["num_pairs"] else ():
                checksums.write(rows["checksum"].to_numpy().astype(CHECKSUM_TYPE).tobytes())
                pair_ids = pa.array(np.arange(first_id, first_id + rows.num_rows, dtype=np.int64))
                ledger.write(rows.drop_columns("checksum").add_column(0, "pair_id", pair_ids))
                first_id += rows.num_rows


def write_rejected(out: Path, plan: Plan) -> None:
    with GroupedWriter(out / REJECTED_NAME, REJECTED_SCHEMA) as writer:
        for folder, fragment, _ in each_fragment(out, plan):
            for rows in row_groups(folder / REJECTED_NAME) if fragment["num_rejected"] else ():
                writer.write(rows)


def row_groups(path: Path) -> Iterator[pa.Table]:
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            yield file.read_row_group(group)


def write_index(out: Path, plan: Plan) -> None:
    """One MDS index over the files of all fragments, in the order of the ids."""
    separator = ""
    with open(out / INDEX_NAME, "w", encoding="utf-8") as file:
        file.write('{"shards": [')
        for folder, fragment, _ in each_fragment(out, plan):
            for info in fragment["mds"]:
                basename = f"{SHARDS_FOLDER}/{folder.name}/{info['raw_data']['basename']}"
                entry = {**info, "raw_data": {**info["raw_data"], "basename": basename}}
                file.write(separator + json.dumps(entry, sort_keys=True))
                separator = ", "
        file.write('], "version": 2}')


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
        # An index is only in fragments of earlier versions.
        for name in (ROWS_NAME, REJECTED_NAME, MANIFEST_NAME, INDEX_NAME, NUMBERED_NAME):
            (folder / name).unlink(missing_ok=True)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
