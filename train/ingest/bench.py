"""`python -m train.ingest.bench`: ingest against what reading the same tars and decoding their pictures alone costs.

Both use the same number of worker processes of the same pool, in turn, after a warm-up that starts the fork server and
brings the tars into the page cache. The floor reads each tar once from front to back and decodes every picture with
Pillow; ingest is the whole program but for the start of Python: parsing, checks, hashes, MDS files made durable, ids,
ledger, index. Results go to a JSON file with the machine they were taken on.
"""

import io
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from mining.command_line import parse, run
from train.data.pair_store import PairStore
from train.ingest.__main__ import ingest_all
from train.ingest.config import IngestConfig
from train.ingest.decode import IMAGE_EXTENSIONS, IMAGE_FORMATS
from train.ingest.pool import run_on_shards
from train.ingest.reencode import encoder
from train.ingest.samples import Report
from train.ingest.sources import Source, expand_shards

PROGRAM = "python -m train.ingest.bench"
DESCRIPTION = "Time ingest against reading the same tars and decoding their pictures alone, in turn, with medians."
# Enough different pictures that the decoder's work varies; making each one takes longer than decoding it.
NUM_PATTERNS = 64


@dataclass(frozen=True)
class BenchConfig:
    shards: tuple[str, ...] = ()
    """Tars to use, as for train.ingest, local ones. Without it tars of JPEGs are made as the next three flags say."""

    num_pairs: int = 12_000
    """Pairs in the tars that are made."""

    pairs_per_shard: int = 1_000
    """Pairs in each tar that is made."""

    side: int = 256
    """Width and height of the JPEGs that are made, in pixels."""

    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    """Worker processes of both. Default: one a usable core."""

    rounds: int = 5
    """How often each runs, in turn."""

    folder: Path = Path(tempfile.gettempdir())
    """Where tars and stores are made for the time of the benchmark. Its disk is part of what is measured."""

    out: Path | None = None
    """JSON file for the results."""


def main(arguments: Sequence[str]) -> None:
    config = parse(BenchConfig, program=PROGRAM, description=DESCRIPTION, arguments=arguments)
    if min(config.num_pairs, config.pairs_per_shard, config.side, config.workers, config.rounds) < 1:
        raise ValueError("--num-pairs, --pairs-per-shard, --side, --workers and --rounds have to be at least 1")
    with tempfile.TemporaryDirectory(prefix="ingest-bench-", dir=config.folder) as folder:
        patterns = config.shards or (str(make_tars(Path(folder) / "tars", config)),)
        report = compare(patterns, Path(folder) / "store", config)
    print(describe(report))
    if config.out:
        config.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"written: {config.out}")


def compare(patterns: Sequence[str], store: Path, config: BenchConfig) -> dict[str, Any]:
    """Times of both in seconds, round by round. Raises ValueError when they do not see the same pictures."""
    sources = expand_shards(patterns)
    contenders: dict[str, Callable[[], int]] = {
        "read_and_decode": lambda: read_and_decode(sources, config.workers),
        "ingest": lambda: ingest(patterns, store, config.workers),
    }
    seconds = {name: [] for name in contenders}
    counts = {name: contender() for name, contender in contenders.items()}
    if len(set(counts.values())) != 1:
        raise ValueError(f"both are to see the same pictures, they saw {counts}; use tars without rejected samples")
    for round_number in range(config.rounds):
        # Every other round the other way about: neither always runs on what the other left in the caches.
        for name in list(contenders)[:: 1 if round_number % 2 else -1]:
            shutil.rmtree(store, ignore_errors=True)
            start_s = time.perf_counter()
            contenders[name]()
            seconds[name].append(time.perf_counter() - start_s)
    return make_report(sources, seconds, counts["ingest"], config)


def read_and_decode(sources: Sequence[Source], workers: int) -> int:
    counts = []
    jobs = list(enumerate(sources))
    run_on_shards(decode_tar, jobs, workers=workers, on_result=counts.append, description="read and decode")
    return sum(counts)


def decode_tar(number: int, source: Source, report: Report) -> int:
    count = 0
    with tarfile.open(source.url, "r|*") as tar:
        for member in tar:
            data = tar.extractfile(member).read()
            if member.name.rsplit(".", 1)[-1] in IMAGE_EXTENSIONS:
                with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
                    image.load()
                count += 1
    report(1, 1)
    return count


def ingest(patterns: Sequence[str], store: Path, workers: int) -> int:
    ingest_all(IngestConfig(shards=tuple(patterns), out=store, workers=workers), time.monotonic())
    return len(PairStore.open(store))


def make_tars(folder: Path, config: BenchConfig) -> Path:
    """Tars as img2dataset writes them, of pictures as large in pixels and bytes as photographs; returns their glob."""
    folder.mkdir()
    patterns = [jpeg(seed, config.side) for seed in range(min(NUM_PATTERNS, config.num_pairs))]
    for shard, start in enumerate(range(0, config.num_pairs, config.pairs_per_shard)):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(start, min(start + config.pairs_per_shard, config.num_pairs)):
                key = f"{shard:05d}{number - start:04d}"
                caption = f"picture number {number} of those that were made for a benchmark"
                # Bytes behind a JPEG's end belong to no picture: they make every file another one.
                image = patterns[number % len(patterns)] + number.to_bytes(8, "little")
                members = {"jpg": image, "txt": caption.encode(), "json": json.dumps({"key": key}).encode()}
                for extension, data in members.items():
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return folder / "*.tar"


def jpeg(seed: int, side: int) -> bytes:
    """Noise at every scale, weaker the finer it is, as in photographs."""
    generator = random.Random(seed)
    picture = Image.new("RGB", (side, side), (128, 128, 128))
    size, weight = 4, 0.6
    while size <= side:
        noise = Image.frombytes("RGB", (size, size), generator.randbytes(3 * size * size))
        picture = Image.blend(picture, noise.resize((side, side), Image.Resampling.BICUBIC), weight)
        size, weight = 2 * size, 0.6 * weight
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def make_report(
    sources: Sequence[Source], seconds: dict[str, list[float]], num_pairs: int, config: BenchConfig
) -> dict[str, Any]:
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "machine": machine(),
        "config": {**asdict(config), "folder": None, "out": None, "shards": len(config.shards) or "made"},
        "num_shards": len(sources),
        "num_pairs": num_pairs,
        "input_mib": sum(source.size for source in sources) / (1 << 20),
        "seconds": seconds,
        "median_s": medians,
        "pairs_per_s": {name: num_pairs / median for name, median in medians.items()},
        "ratio_of_medians": medians["ingest"] / medians["read_and_decode"],
        "median_of_ratios": statistics.median(
            ingest / floor for ingest, floor in zip(seconds["ingest"], seconds["read_and_decode"], strict=True)
        ),
    }


def machine() -> dict[str, Any]:
    """Where and with what the numbers were taken; commit is None outside a git checkout."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    processors = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    command = ["git", "describe", "--always", "--dirty"]
    git = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return {
        "processor": processors[0] if processors else platform.processor(),
        "num_processors": os.cpu_count(),
        "num_usable": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "pictures": encoder(),
        "streaming": version("mosaicml-streaming"),
        "commit": git.stdout.strip() or None,
    }


def describe(report: dict[str, Any]) -> str:
    lines = [
        f"{report['num_pairs']:,} pairs in {report['num_shards']} tars, {report['input_mib']:,.0f} MiB, "
        f"{report['config']['workers']} workers, {report['config']['rounds']} rounds"
    ]
    for name, median in report["median_s"].items():
        lines.append(f"  {name:16} {median:8.2f} s {report['pairs_per_s'][name]:10,.0f} pair/s")
    lines.append(
        f"  ingest takes {report['ratio_of_medians']:.2f} times as long (median of ratios {report['median_of_ratios']:.2f})"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    run(main, sys.argv[1:])
