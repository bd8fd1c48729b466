"""`python -m train.data.bench`: pairs a second of our two loaders against open_clip's WebDataset pipeline, on the same tars.

Same tars, same tokenizer, same number of worker processes and batch size; in turn, several rounds, medians. Four run:

    tar_stream              train.data.tar_stream, as --data.shards trains
    pair_store              train.data.loader over a PairStore ingested from the tars, as --data.store trains
    open_clip_same_transform  open_clip_train.data.get_wds_dataset with our transform: uint8 pictures, as the two above
    open_clip               the same with open_clip's own transform of the same crop, normalised floats as its trainer takes them

The clock starts when as many batches have come as there are workers, so that starting processes and filling open_clip's
shuffle buffer for the first time count for nobody. Files are in the page cache: what is measured is the work, not a disk.
"""

import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mining.command_line import parse, run
from train.config import AugmentConfig, DataConfig
from train.data.augment import augment_picture
from train.data.loader import StepDataset, step_loader
from train.data.peers import open_clip_data
from train.data.shard_index import ShardIndex, build_index, local_tars
from train.data.tar_stream import TarStream
from train.ingest import bench as ingest_bench
from train.models.clip_library import open_clip
from train.models.model import architecture, build_tokenizer

PROGRAM = "python -m train.data.bench"
DESCRIPTION = (
    "Pairs a second of our loaders and of open_clip's WebDataset pipeline on the same tars, in turn, with medians."
)
OURS, PEER = ("tar_stream", "pair_store"), "open_clip_same_transform"
# The area that a random crop keeps, of open_clip's default and ours.
AUGMENT = AugmentConfig(scale=(0.9, 1.0))

Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class BenchConfig:
    shards: tuple[str, ...] = ()
    """Tars to use, as for train.ingest, local ones. Without it tars of JPEGs are made as the next three flags say."""

    num_pairs: int = 8_000
    """Pairs in the tars that are made."""

    pairs_per_shard: int = 1_000
    """Pairs in each tar that is made; open_clip wants as many tars as workers."""

    side: int = 256
    """Width and height of the JPEGs that are made, in pixels."""

    model: str = "ViT-B-16"
    """Model whose picture size and tokenizer are used."""

    batch_size: int = 128
    """Pairs in a batch."""

    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    """Worker processes of each loader. Default: one a usable core."""

    rounds: int = 5
    """How often each runs, in turn."""

    folder: Path = Path(tempfile.gettempdir())
    """Where tars and store are made for the time of the benchmark."""

    out: Path | None = None
    """JSON file for the results."""


@dataclass(frozen=True)
class Rate:
    """One epoch of one loader."""

    pairs_per_s: float
    first_batch_s: float
    """from the start of the worker processes"""


def main(arguments: Sequence[str]) -> None:
    config = parse(BenchConfig, program=PROGRAM, description=DESCRIPTION, arguments=arguments)
    sizes = (config.num_pairs, config.pairs_per_shard, config.side, config.batch_size, config.workers, config.rounds)
    if min(sizes) < 1:
        raise ValueError("--num-pairs, --pairs-per-shard, --side, --batch-size, --workers and --rounds are at least 1")
    with tempfile.TemporaryDirectory(prefix="loader-bench-", dir=config.folder) as folder:
        report = measure(Path(folder), config)
    print(describe(report))
    if config.out:
        config.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"written: {config.out}")


def measure(folder: Path, config: BenchConfig) -> dict[str, Any]:
    """Rates of all four, round by round. Raises ValueError when they do not give the same captions."""
    made = ingest_bench.BenchConfig(
        num_pairs=config.num_pairs, pairs_per_shard=config.pairs_per_shard, side=config.side
    )
    patterns = config.shards or (str(ingest_bench.make_tars(folder / "tars", made)),)
    index = build_index(local_tars(patterns), folder / "index", config.workers)
    num_batches = len(index) // config.batch_size
    if num_batches <= config.workers:
        raise ValueError(
            f"{len(index)} pairs are {num_batches} batches of {config.batch_size}, and the first {config.workers} are not "
            "timed; take more --num-pairs, a smaller --batch-size or fewer --workers"
        )
    ingest_bench.ingest(patterns, folder / "store", config.workers)
    loaders = make_loaders(index, folder / "store", config)
    # A first round warms the page cache and is looked at.
    refuse_different_captions({name: captions(loader(0), num_batches) for name, loader in loaders.items()})
    rates: dict[str, list[Rate]] = {name: [] for name in loaders}
    for number in range(config.rounds):
        # Every other round the other way about: nobody always runs on what another left in the caches.
        for name in list(loaders)[:: 1 if number % 2 else -1]:
            rates[name].append(timed_epoch(partial(loaders[name], number), num_batches, config.workers))
            rate = f"{rates[name][-1].pairs_per_s:,.0f} pairs/s"
            print(f"round {number + 1}/{config.rounds} {name}: {rate}", file=sys.stderr)
    return make_report(rates, len(index), num_batches, config)


def make_loaders(index: ShardIndex, store_folder: Path, config: BenchConfig) -> dict[str, Callable[[int], Batches]]:
    """Every loader as a function of the epoch. Raises ValueError when store and tars do not hold as many pairs."""
    size = architecture(config.model)["vision_cfg"].get("image_size", 224)
    tokenizer = build_tokenizer(config.model)
    settings = {
        "batch_size": config.batch_size,
        "seed": 0,
        "rank": 0,
        "world_size": 1,
        "image_size": (size, size),
        "tokenizer": tokenizer,
    }
    store = StepDataset(DataConfig(store=str(store_folder)), AUGMENT, **settings)
    # Importing MosaicML Streaming takes seconds: workers inherit it.
    store.store[0]
    stream = TarStream(index, DataConfig(), AUGMENT, **settings)
    if len(index) != len(store.store):
        raise ValueError(
            f"the tars hold {len(index)} samples and the store {len(store.store)}; use tars without rejected samples"
        )

    def ours(dataset: StepDataset | TarStream, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        first = epoch * dataset.steps_per_epoch
        stop = first + dataset.steps_per_epoch
        for batch in step_loader(dataset, start_step=first, stop_step=stop, workers=config.workers, pin_memory=False):
            yield batch.image_BCHW, batch.text_BL

    def peer(transform: Callable[[Any], torch.Tensor], epoch: int) -> Batches:
        return open_clip_data(
            [shard.path for shard in index.shards],
            num_samples=len(index),
            batch_size=config.batch_size,
            workers=config.workers,
            seed=epoch,
            transform=transform,
            tokenizer=tokenizer,
        ).dataloader

    def same_transform(picture: Any) -> torch.Tensor:
        return augment_picture(picture, AUGMENT, (size, size), random.getrandbits(63))

    own_transform = open_clip.image_transform(size, is_train=True, aug_cfg={"scale": AUGMENT.scale})
    return {
        "tar_stream": partial(ours, stream),
        "pair_store": partial(ours, store),
        PEER: partial(peer, same_transform),
        "open_clip": partial(peer, own_transform),
    }


def timed_epoch(loader: Callable[[], Batches], num_batches: int, num_untimed: int) -> Rate:
    start_s = timed_from_s = time.perf_counter()
    num_pairs, first_batch_s = 0, 0.0
    batches = iter(loader())
    for number in range(num_batches):
        image_BCHW, _ = next(batches)
        if number == 0:
            first_batch_s = time.perf_counter() - start_s
        if number == num_untimed - 1:
            timed_from_s, num_pairs = time.perf_counter(), -len(image_BCHW)
        num_pairs += len(image_BCHW)
    return Rate(num_pairs / (time.perf_counter() - timed_from_s), first_batch_s)


def captions(batches: Batches, num_batches: int) -> set[bytes]:
    """The token rows of an epoch."""
    found: set[bytes] = set()
    for _, (_, text_BL) in zip(range(num_batches), batches, strict=False):
        found.update(row.tobytes() for row in text_BL.numpy())
    return found


def refuse_different_captions(found: dict[str, set[bytes]]) -> None:
    """Raises ValueError when a loader gives captions that another does not have, or only few of them."""
    everything = set().union(*found.values())
    for name, some in found.items():
        # open_clip fills an epoch up with repeated samples, so it may leave others out.
        if len(some) < 0.8 * len(everything):
            raise ValueError(f"{name} gave {len(some)} of {len(everything)} different captions: not the same work")


def make_report(rates: dict[str, list[Rate]], num_pairs: int, num_batches: int, config: BenchConfig) -> dict[str, Any]:
    rounds = {name: [rate.pairs_per_s for rate in some] for name, some in rates.items()}
    medians = {name: statistics.median(some) for name, some in rounds.items()}
    return {
        "machine": {
            **ingest_bench.machine(),
            **{name: version(name) for name in ("torch", "torchvision", "webdataset", "open_clip_torch")},
        },
        "config": {**asdict(config), "folder": None, "out": None, "shards": len(config.shards) or "made"},
        "num_pairs": num_pairs,
        "num_batches": num_batches,
        "pairs_per_s": rounds,
        "median_pairs_per_s": medians,
        "median_first_batch_s": {
            name: statistics.median(rate.first_batch_s for rate in some) for name, some in rates.items()
        },
        "ratio_of_medians": {name: medians[name] / medians[PEER] for name in medians},
        "median_of_ratios": {
            name: statistics.median(ours / peer for ours, peer in zip(rounds[name], rounds[PEER], strict=True))
            for name in medians
        },
    }


def describe(report: dict[str, Any]) -> str:
    config = report["config"]
    lines = [
        f"{report['num_pairs']:,} pairs, batches of {config['batch_size']}, {config['workers']} workers, "
        f"{config['rounds']} rounds; medians, and times {PEER}"
    ]
    for name, median in report["median_pairs_per_s"].items():
        lines.append(f"  {name:26}{median:9,.0f} pairs/s {report['ratio_of_medians'][name]:7.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main, sys.argv[1:])
