"""`--dry-run`: what an ingest of these shards would keep and reject, and how large its store would be, writing nothing.

In: the shards. Out: a `Survey`. Every picture is decoded, and shrunk when asked for, as ingest does.
"""

import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mining.mds_files import PAIR_ID_BYTES
from train.data.pair_store import MDS_COLUMNS
from train.ingest.decode import Pair
from train.ingest.finish import describe_rejected, in_order_of_frequency
from train.ingest.plan import Parameters
from train.ingest.pool import run_on_shards
from train.ingest.samples import Report, open_samples, reason_category
from train.ingest.source_table import add_up, describe
from train.ingest.sources import Source

# MDS: a uint32 length for each column but the number, and a uint32 offset for each sample.
SAMPLE_OVERHEAD_BYTES = 4 * (len(MDS_COLUMNS) - 1) + PAIR_ID_BYTES + 4
# Header of an MDS file (columns, encodings, size limit) and its entry in index.json.
FILE_OVERHEAD_BYTES = 800
# Ledger and checksums: two digests that do not compress, key, size, CRC.
LEDGER_BYTES_PER_PAIR = 88
MIB = 1 << 20


@dataclass
class Survey:
    """Counts of one shard, or of several added up."""

    num_pairs: int = 0
    num_shrunk: int = 0
    image_bytes: int = 0
    caption_bytes: int = 0
    store_bytes: int = 0
    num_rejected: Counter[str] = field(default_factory=Counter)
    tables: list[dict[str, Any] | None] = field(default_factory=list)

    def keep(self, pair: Pair) -> None:
        caption_bytes = len(pair.caption.encode())
        self.num_pairs += 1
        self.num_shrunk += pair.shrunk
        self.image_bytes += len(pair.image)
        self.caption_bytes += caption_bytes
        sample_bytes = len(pair.image) + caption_bytes + len(pair.key.encode()) + SAMPLE_OVERHEAD_BYTES
        self.store_bytes += sample_bytes + LEDGER_BYTES_PER_PAIR

    def add(self, other: "Survey") -> None:
        for name in ("num_pairs", "num_shrunk", "image_bytes", "caption_bytes", "store_bytes"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.num_rejected.update(other.num_rejected)
        self.tables += other.tables


def survey_shards(jobs: Sequence[tuple[int, Source]], parameters: Parameters, workers: int) -> Survey:
    """Decode every shard of `jobs` in worker processes and add their counts up.

    Raises ValueError when shards cannot be read.
    """
    total = Survey()
    work = partial(survey_shard, parameters=parameters)
    run_on_shards(
        work,
        jobs,
        workers=workers,
        on_result=total.add,
        description="dry run",
        remedy="run it again",
        # Nothing is written: Streaming, which takes seconds to import, is not needed.
        preloaded=[__name__],
    )
    return total


def survey_shard(number: int, source: Source, report: Report, *, parameters: Parameters) -> Survey:
    survey = Survey()
    with (
        tempfile.TemporaryDirectory(prefix="ingest-") as folder,
        open_samples(source, Path(folder) / "spool", parameters, report) as samples,
    ):
        for outcome in samples:
            if outcome.reason is not None:
                survey.num_rejected[reason_category(outcome.reason)] += 1
            if outcome.pair is not None:
                survey.keep(outcome.pair)
        survey.tables.append(samples.table_report())
    num_files = -(-survey.store_bytes // (parameters.shard_size_mib * MIB))
    survey.store_bytes += num_files * FILE_OVERHEAD_BYTES
    return survey


def describe_survey(survey: Survey, sources: Sequence[Source], seconds: float) -> str:
    """What the terminal shows, a line each for input, what is kept, what is rejected, tables, and the store's size."""
    rejected = in_order_of_frequency(survey.num_rejected)
    sizes = [source.size for source in sources if source.size is not None]
    read = f" of {sum(sizes) / MIB:,.1f} MiB" if len(sizes) == len(sources) else ""
    images = f"images {survey.image_bytes / MIB:,.1f} MiB"
    if survey.num_shrunk:
        images += f" after shrinking {survey.num_shrunk:,} of them"
    lines = [
        f"dry run, nothing was written: read {len(sources):,} shards{read} in {seconds:.1f} s",
        f"would keep {survey.num_pairs:,} pairs: {images}, captions {survey.caption_bytes / MIB:,.1f} MiB",
        f"would reject {sum(rejected.values()):,}" + (f": {describe_rejected(rejected)}" if rejected else ""),
    ]
    tables = add_up(survey.tables)
    if tables is not None:
        lines.append(describe(tables))
    lines.append(f"the store would take about {survey.store_bytes / MIB:,.1f} MiB")
    return "\n".join(lines)
