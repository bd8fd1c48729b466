"""The program `python -m train.ingest`: tar shards of image-text pairs into a PairStore."""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mining.command_line import parse, run
from mining.manifest import MANIFEST_NAME
from train.data.pair_store import REJECTED_NAME, PairStore
from train.ingest.finish import describe_rejected, finish_store, remove_fragment_files
from train.ingest.plan import Parameters, locked_folder, prepare_folder
from train.ingest.pool import ingest_shards
from train.ingest.sources import Source, expand_shards

PROGRAM = "python -m train.ingest"
DESCRIPTION = """Turn tar shards of image-text pairs (as img2dataset writes CC3M, CC12M, YFCC15M) into a PairStore.

A sample is KEY.jpg (or .jpeg, .png, .webp) with its caption in KEY.txt and, if you have it, KEY.json. Image bytes and
captions are kept as found. Samples that cannot be used are left out and listed in OUT/rejected.parquet with the reason.
Killed or interrupted? Run the same command again: finished shards are not done again.

  python -m train.ingest --shards 'cc12m/{00000..01242}.tar' --out data/cc12m --workers 16"""
INTERRUPTED_EXIT_CODE = 130
# The MDS format's offsets are 32 bits wide, and a worker holds one shard in memory about twice.
MAX_SHARD_SIZE_MIB = 2048


@dataclass(frozen=True)
class IngestConfig:
    shards: tuple[str, ...]
    """Source shards: paths, ranges such as 'cc12m/{00000..01242}.tar', globs, http(s):// URLs, 'pipe:COMMAND' whose output
    is the tar. Quote them. Several are given one after the other. Every shard of a range must be there."""

    out: Path
    """Folder of the PairStore. A new one, or one that the same command began."""

    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    """Worker processes, each on one source shard at a time. Ids do not depend on it. Default: one a usable core."""

    max_pixels: int = 89_478_485
    """Reject images of more pixels (width x height in the header), before they are decoded."""

    shard_size_mib: int = 64
    """Size of the MDS files written, in MiB."""


def main(arguments: Sequence[str]) -> None:
    start_s = time.monotonic()
    config = parse(IngestConfig, program=PROGRAM, description=DESCRIPTION, arguments=arguments)
    check_config(config)
    sources = expand_shards(config.shards)
    parameters = Parameters(config.max_pixels, config.shard_size_mib)
    with locked_folder(config.out):
        prepare_folder(config.out, sources, parameters)
        complete = (config.out / MANIFEST_NAME).exists()
        if not complete:
            make_store(config, sources, parameters)
        remove_fragment_files(config.out, len(sources))
        print(summary(PairStore.open(config.out), None if complete else time.monotonic() - start_s))


def make_store(config: IngestConfig, sources: list[Source], parameters: Parameters) -> None:
    try:
        ingest_shards(sources, config.out, parameters, config.workers)
        finish_store(config.out, len(sources), parameters, config.workers)
    except OSError as error:
        raise ValueError(
            f"writing to {config.out} failed ({error}); free space or mend the disk, then run the same command again"
        ) from error


def check_config(config: IngestConfig) -> None:
    limits = {
        "workers": (1, None),
        "max_pixels": (1, None),
        "shard_size_mib": (1, MAX_SHARD_SIZE_MIB),
    }
    for name, (low, high) in limits.items():
        value = getattr(config, name)
        if value < low or (high is not None and value > high):
            allowed = f"at least {low}" if high is None else f"{low} to {high}"
            raise ValueError(f"--{name.replace('_', '-')} is {value}, it has to be {allowed}")


def summary(store: PairStore, seconds: float | None) -> str:
    rejected = store.manifest["num_rejected"]
    reasons = f" ({describe_rejected(rejected)})" if rejected else ""
    when = "already complete" if seconds is None else f"in {seconds:.1f} s"
    return (
        f"{store.path}: kept {len(store):,} pairs, rejected {sum(rejected.values()):,}{reasons}, {when}; "
        f"rejected rows are in {store.path / REJECTED_NAME}"
    )


def main_or_interrupted() -> None:
    try:
        run(main)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(INTERRUPTED_EXIT_CODE)


if __name__ == "__main__":
    main_or_interrupted()
