"""The flags of `python -m train.ingest`: their help, their limits, and which of them go together."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from train.ingest.plan import Parameters
from train.ingest.reencode import encoder

# The MDS format's offsets are 32 bits wide, and a worker holds one shard in memory about twice.
MAX_SHARD_SIZE_MIB = 2048
DEFAULT_MAX_SIDE = 512
# Below it a picture has fewer pixels than any model looks at.
MIN_MAX_SIDE = 32
DEFAULT_QUALITY = 90
# Above it JPEG files grow and pictures do not get better.
MAX_QUALITY = 95


@dataclass(frozen=True)
class IngestConfig:
    shards: tuple[str, ...] = ()
    """Source shards, quoted: paths, ranges such as 'cc12m/{00000..01242}.tar', globs, http(s):// URLs, 'pipe:COMMAND'
    that writes the tar to its output. Several are given one after the other. Every shard of a range must be there."""

    out: Path | None = None
    """Folder of the PairStore. A new one, or one that the same command began. Not needed for --dry-run."""

    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    """Worker processes, each on one source shard at a time. Ids do not depend on it. Default: one a usable core."""

    max_pixels: int = 89_478_485
    """Reject images of more pixels (width x height in the header), before they are decoded."""

    shard_size_mib: int = 64
    """Size of the MDS files written, in MiB. None is larger, unless one pair is; the last one of each source shard is smaller."""

    reencode: bool = False
    """Shrink pictures whose longer side is over --max-side to that side, keeping the aspect ratio. Each keeps its format:
    JPEG and WebP are written at --quality, PNG without loss. Pictures that are small enough keep their bytes. In the
    ledger image_sha256 is of the bytes as found either way, width and height are of what is stored."""

    max_side: int | None = None
    """For --reencode: the longest side, in pixels. 512 unless given."""

    quality: int | None = None
    """For --reencode: JPEG and WebP quality, 1 to 95. 90 unless given."""

    dry_run: bool = False
    """Read and decode everything, print what would be kept and rejected and about how large the store would be, write
    nothing. Takes about as long as the ingest."""

    part: str | None = None
    """i/n: do only part i of n (0/n to n-1/n), for n programs at once into the same --out, or into folders of their own
    that are copied into one afterwards (rsync -a). Then --merge."""

    merge: bool = False
    """Make the store of all parts; the same bytes as one ingest of everything. Shards and flags are those of the parts."""


def check_config(config: IngestConfig) -> None:
    """Raises ValueError for a value out of its range, a missing flag, and flags that exclude each other."""
    check_ranges(config)
    if config.merge and (config.dry_run or config.part is not None):
        other = "--dry-run" if config.dry_run else "--part"
        raise ValueError(f"{other} and --merge exclude each other; give --merge alone, when all parts are done")
    if not config.shards and not config.merge:
        raise ValueError("--shards is missing: the tars to ingest, for example --shards 'cc12m/{00000..01242}.tar'")
    if config.out is None and not config.dry_run:
        raise ValueError("--out is missing: the folder of the PairStore, for example --out data/cc12m")
    if not config.reencode and (config.max_side, config.quality) != (None, None):
        flag = "--max-side" if config.max_side is not None else "--quality"
        raise ValueError(f"{flag} is for shrunk pictures; add --reencode, or leave {flag} out")


def check_ranges(config: IngestConfig) -> None:
    limits = {
        "workers": (1, None),
        "max_pixels": (1, None),
        "shard_size_mib": (1, MAX_SHARD_SIZE_MIB),
        "max_side": (MIN_MAX_SIDE, None),
        "quality": (1, MAX_QUALITY),
    }
    for name, (low, high) in limits.items():
        value = getattr(config, name)
        if value is not None and (value < low or (high is not None and value > high)):
            allowed = f"at least {low}" if high is None else f"{low} to {high}"
            raise ValueError(f"--{name.replace('_', '-')} is {value}, it has to be {allowed}")


def parameters_of(config: IngestConfig) -> Parameters:
    """What of the flags decides the store's content."""
    if not config.reencode:
        return Parameters(config.max_pixels, config.shard_size_mib)
    max_side = DEFAULT_MAX_SIDE if config.max_side is None else config.max_side
    quality = DEFAULT_QUALITY if config.quality is None else config.quality
    return Parameters(config.max_pixels, config.shard_size_mib, max_side, quality, encoder())
