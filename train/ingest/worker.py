"""One source shard into one fragment: a folder of MDS files in the order of the keys, with the rows of its ledger.

In: a `Source`. Out: a folder beside `shards/<number>/`, which `commits` makes durable and gives that name:
    shard.*.mds        the pairs, pair_id still 0 (`numbering` fills it in)
    rows.parquet       the ledger's columns but pair_id, and each sample's checksum; not there without pairs
    rejected.parquet   shard, key, reason; not there when nothing was rejected
    manifest.json      counts, the MDS index, a digest of the content, a digest of the plan it belongs to
Memory: the tar's offsets, one sample, one MDS file being filled, one row group of the ledger.
"""

import os
import shutil
from collections import Counter
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from mining.manifest import read_manifest, write_manifest_for_commit
from mining.mds_files import sample_checksum
from train.data.pair_store import MDS_COLUMNS, REJECTED_NAME, caption_hash
from train.ingest.decode import Pair
from train.ingest.plan import Parameters
from train.ingest.samples import Outcome, Report, Samples, open_samples, printable, reason_category
from train.ingest.sources import Source

FRAGMENT_KIND = "IngestFragment"
FRAGMENT_VERSION = 2
ROWS_NAME = "rows.parquet"
# More rows than most tars hold; larger tars are written group by group.
ROWS_PER_GROUP = 16_384
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
REMEDY = "delete that folder and run the same command again"


class Written(NamedTuple):
    """A fragment that is whole, and becomes durable and visible when `temporary` is committed to `folder`."""

    temporary: Path
    folder: Path


class RowFile:
    """A parquet file that is written row by row and holds one row group in memory. No rows, no file."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path = path
        self.schema = schema
        self.num_rows = 0
        self._writer: pq.ParquetWriter | None = None
        self._rows: list[tuple[Any, ...]] = []

    def append(self, row: tuple[Any, ...]) -> None:
        self._rows.append(row)
        self.num_rows += 1
        if len(self._rows) == ROWS_PER_GROUP:
            self._flush()

    def _flush(self) -> None:
        columns = zip(*self._rows, strict=True)
        arrays = [pa.array(column, type=field.type) for column, field in zip(columns, self.schema, strict=True)]
        if self._writer is None:
            self._writer = pq.ParquetWriter(self.path, self.schema, compression="zstd")
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=self.schema))
        self._rows = []

    def __enter__(self) -> "RowFile":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._rows:
            self._flush()
        if self._writer is not None:
            self._writer.close()


class Fragment:
    """What is written beside the MDS files, outcome by outcome."""

    def __init__(self, folder: Path, shard: str) -> None:
        self.shard = shard
        self.folder = folder
        self.num_rejected: Counter[str] = Counter()
        self.num_shrunk = 0
        self.content = sha256()
        self._files = ExitStack()

    def __enter__(self) -> "Fragment":
        self.rows = self._files.enter_context(RowFile(self.folder / ROWS_NAME, ROWS_SCHEMA))
        self.rejected = self._files.enter_context(RowFile(self.folder / REJECTED_NAME, REJECTED_SCHEMA))
        return self

    def __exit__(self, *exception: object) -> None:
        self._files.close()

    def keep(self, pair: Pair, checksum: int) -> None:
        hashes = pair.image_sha256, caption_hash(pair.caption)
        self.rows.append((pair.key, self.shard, *hashes, pair.width, pair.height, checksum))
        self.num_shrunk += pair.shrunk
        stored = pair.image_sha256 + ("+" + sha256(pair.image).hexdigest() if pair.shrunk else "")
        for part in (pair.key.encode(), stored.encode(), pair.caption.encode()):
            # The length keeps ("ab", "c") and ("a", "bc") apart.
            self.content.update(len(part).to_bytes(8, "little") + part)

    def reject(self, key: str, reason: str) -> None:
        self.rejected.append((printable(self.shard), printable(key), printable(reason)))
        self.num_rejected[reason_category(reason)] += 1


def fragment_folder(shards: Path, number: int) -> Path:
    return shards / f"{number:05d}"


def read_fragment(folder: Path) -> dict[str, Any]:
    return read_manifest(folder, FRAGMENT_KIND, FRAGMENT_VERSION, remedy=REMEDY)


def make_fragment(
    number: int, source: Source, report: Report, *, shards: Path, parameters: Parameters, plan_digest: str
) -> Written:
    """`ingest_shard` as the pool calls it: in a worker process, for the shard of this number."""
    return ingest_shard(source, fragment_folder(shards, number), parameters, plan_digest, report)


def ingest_shard(source: Source, folder: Path, parameters: Parameters, plan_digest: str, report: Report) -> Written:
    """Write the fragment of one shard beside `folder`, to be committed there. `report(done, total)` counts its keys.

    Raises UnreadableShard when the shard cannot be opened; whatever is wrong inside it goes to rejected.parquet.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    spool = folder.with_name(f".{folder.name}.{os.getpid()}.spool")
    try:
        with open_samples(source, spool, parameters, report) as samples:
            write_fragment(samples, source.name, temporary, parameters.shard_size_mib << 20, plan_digest)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return Written(temporary, folder)


def write_fragment(samples: Samples, shard: str, folder: Path, size_limit: int, plan_digest: str) -> None:
    # Imported here: it takes seconds, and only the workers need it.
    from mining.mds import streaming

    writer = streaming.MDSWriter(columns=MDS_COLUMNS, out=str(folder), size_limit=size_limit)
    # Not its `finish`: that writes an index, which a fragment needs none of, and first sleeps a second whenever the thread
    # that would upload files, but has nothing to do here, has not come to run yet.
    with writer.executor, Fragment(folder, shard) as fragment:
        for outcome in samples:
            write_outcome(outcome, fragment, writer)
        if writer.new_samples:
            writer.flush_shard()
    write_manifest_for_commit(
        folder,
        FRAGMENT_KIND,
        FRAGMENT_VERSION,
        shard=shard,
        plan=plan_digest,
        num_pairs=fragment.rows.num_rows,
        num_rejected=dict(sorted(fragment.num_rejected.items())),
        num_shrunk=fragment.num_shrunk,
        content=fragment.content.hexdigest(),
        table=samples.table_report(),
        mds=kept_shards(folder, writer.shards),
    )


def write_outcome(outcome: Outcome, fragment: Fragment, writer: Any) -> None:
    if outcome.reason is not None:
        fragment.reject(outcome.key, outcome.reason)
    pair = outcome.pair
    if pair is not None:
        writer.write({"caption": pair.caption, "image": pair.image, "key": pair.key, "pair_id": 0})
        # The last of the samples that wait to be written is this one, as it will be stored.
        fragment.keep(pair, sample_checksum(writer.new_samples[-1]))


def kept_shards(folder: Path, shards: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """MDSWriter writes a file without samples before one that is larger than the size limit: drop those."""
    for shard in shards:
        if not shard["samples"]:
            (folder / shard["raw_data"]["basename"]).unlink()
    return [shard for shard in shards if shard["samples"]]
