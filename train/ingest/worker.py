"""One source shard into one fragment: a folder of MDS files in the order of the keys, with the rows of its ledger.

In: a `Source`. Out: `shards/<number>/`, complete or absent:
    shard.*.mds, index.json   the pairs, pair_id still 0 (`finish` fills it in)
    rows.parquet              the ledger's columns but pair_id, and each sample's checksum
    rejected.parquet          shard, key, reason
    manifest.json             counts, the MDS index, a digest of the content
Memory: the tar's offsets, one sample, one MDS file being filled.
"""

import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from mining.manifest import commit_folder, read_manifest, write_manifest
from train.data.pair_store import MDS_COLUMNS, REJECTED_NAME, caption_hash, sample_checksum
from train.ingest.decode import Pair, Rejected, read_pair
from train.ingest.plan import Parameters
from train.ingest.sources import Source, plain_path, plain_tar
from train.ingest.tar_index import TarIndex, index_tar, read_member

FRAGMENT_KIND = "IngestFragment"
FRAGMENT_VERSION = 1
ROWS_NAME = "rows.parquet"
LEDGER_FIELDS = [
    ("key", pa.string()),
    ("shard", pa.string()),
    ("image_sha256", pa.string()),
    ("caption_hash", pa.string()),
    ("width", pa.int32()),
    ("height", pa.int32()),
]
LEDGER_SCHEMA = pa.schema([("pair_id", pa.int64()), *LEDGER_FIELDS])
ROWS_SCHEMA = pa.schema([*LEDGER_FIELDS, ("checksum", pa.uint32())])
REJECTED_SCHEMA = pa.schema([("shard", pa.string()), ("key", pa.string()), ("reason", pa.string())])


@dataclass
class FragmentRows:
    """What a fragment says about its pairs beside the MDS files, filled pair by pair."""

    shard: str
    rows: list[tuple[Any, ...]] = field(default_factory=list)
    rejected: list[tuple[str, str, str]] = field(default_factory=list)
    content: Any = field(default_factory=sha256)

    def keep(self, pair: Pair, checksum: int) -> None:
        image_sha256 = sha256(pair.image).hexdigest()
        self.rows.append(
            (pair.key, self.shard, image_sha256, caption_hash(pair.caption), pair.width, pair.height, checksum)
        )
        for part in (pair.key.encode(), image_sha256.encode(), pair.caption.encode()):
            # The length keeps ("ab", "c") and ("a", "bc") apart.
            self.content.update(len(part).to_bytes(8, "little") + part)

    def reject(self, key: str, reason: str) -> None:
        printable = (self.shard, key, reason)
        # A key that is no UTF-8 is still named in rejected.parquet.
        self.rejected.append(tuple(text.encode("utf-8", "backslashreplace").decode() for text in printable))


def fragment_folder(shards: Path, number: int) -> Path:
    return shards / f"{number:05d}"


def read_fragment(folder: Path) -> dict[str, Any]:
    remedy = "delete that folder and run the same command again"
    return read_manifest(folder, FRAGMENT_KIND, FRAGMENT_VERSION, remedy=remedy)


def ingest_shard(
    source: Source, folder: Path, parameters: Parameters, report: Callable[[int, int], None] = lambda done, total: None
) -> None:
    """Write the fragment of one shard to `folder`. `report(done, total)` counts its keys.

    Raises UnreadableShard when the shard cannot be opened; whatever is wrong inside it goes to rejected.parquet.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    spool = folder.with_name(f".{folder.name}.{os.getpid()}.spool")
    try:
        with open(plain_tar(source, spool), "rb") as file:
            write_fragment(file, source.name, temporary, parameters, report)
        commit_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for leftover in (spool, plain_path(spool)):
            leftover.unlink(missing_ok=True)


def write_fragment(
    file: BinaryIO, shard: str, folder: Path, parameters: Parameters, report: Callable[[int, int], None]
) -> None:
    # Imported here: it takes seconds, and only the workers need it.
    from streaming import MDSWriter

    index = index_tar(file)
    rows = FragmentRows(shard)
    size_limit = parameters.shard_size_mib << 20
    with MDSWriter(columns=MDS_COLUMNS, out=str(folder), size_limit=size_limit) as writer:
        for done, key in enumerate(sorted(index.members), start=1):
            write_sample(file, key, index, rows, writer, parameters.max_pixels)
            report(done, len(index.members))
    if index.torn is not None:
        rows.reject("", f"torn tar: {index.torn}; nothing after that was read")
    write_rows(folder, rows, kept_shards(folder, writer.shards))


def write_sample(file: BinaryIO, key: str, index: TarIndex, rows: FragmentRows, writer: Any, max_pixels: int) -> None:
    members = index.members[key]
    try:
        pair = read_pair(key, members, lambda member: read_member(file, member), max_pixels)
    except Rejected as reason:
        rows.reject(key, str(reason))
        return
    copies = max(len(places) for places in members.values())
    if copies > 1:
        rows.reject(key, f"duplicate key: {copies} equal copies, one is kept")
    sample = {"caption": pair.caption, "image": pair.image, "key": key, "pair_id": 0}
    writer.write(sample)
    rows.keep(pair, sample_checksum(writer.encode_sample(sample)))


def kept_shards(folder: Path, shards: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """MDSWriter writes a file without samples before one that is larger than the size limit: drop those."""
    for shard in shards:
        if not shard["samples"]:
            (folder / shard["raw_data"]["basename"]).unlink()
    return [shard for shard in shards if shard["samples"]]


def write_rows(folder: Path, rows: FragmentRows, shards: list[dict[str, Any]]) -> None:
    columns = list(zip(*rows.rows, strict=True)) or [()] * len(ROWS_SCHEMA)
    write_table(folder / ROWS_NAME, columns, ROWS_SCHEMA)
    rejected = sorted(rows.rejected)
    write_table(folder / REJECTED_NAME, list(zip(*rejected, strict=True)) or [()] * 3, REJECTED_SCHEMA)
    write_manifest(
        folder,
        FRAGMENT_KIND,
        FRAGMENT_VERSION,
        shard=rows.shard,
        num_pairs=len(rows.rows),
        num_rejected=dict(sorted(Counter(reason.split(":")[0] for _, _, reason in rejected).items())),
        content=rows.content.hexdigest(),
        mds=shards,
    )


def write_table(path: Path, columns: list[Any], schema: pa.Schema) -> None:
    arrays = [pa.array(column, type=field.type) for column, field in zip(columns, schema, strict=True)]
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), path, compression="zstd")
