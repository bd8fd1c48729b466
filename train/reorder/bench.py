"""`python -m train.reorder.bench`: what the order of a store does for training with hard pairs, from cold disks and caches.

Four ways through the same pairs, each read by one process through PairStore, the batches planned beforehand:
    sequential      ids 0, 1, 2, ... of the store as ingested: no shuffling, no hard pairs; the most a disk gives
    scattered       anchors and hard pairs of the store as ingested, all anchors shuffled together
    ordered         the same on the reordered store, still all anchors shuffled together
    ordered_blocks  the same on the reordered store, with --shuffle-block, as --data.store_shuffle_block does
local: a whole epoch from local disk, no page of any shard in memory at first, bytes only. remote: the first tenth of an epoch of a
store that is fetched shard by shard into an empty cache folder, bytes only. local_decoded, remote_decoded: the first tenth with what
the loader does to every picture, batch by batch in turn. Medians over the rounds.
"""

import os
import random
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mining.command_line import parse, run
from mining.manifest import write_json_atomically
from mining.pair_table import PairTable
from train.config import AugmentConfig
from train.data.augment import augment_image
from train.data.pair_store import PairStore
from train.data.plan import EpochPlan, conflict_groups
from train.ingest.__main__ import main as ingest
from train.ingest.bench import machine
from train.reorder.__main__ import main as reorder
from train.reorder.pair_lists import NO_PAIR, share_in_stretch

PROGRAM = "python -m train.reorder.bench"
DESCRIPTION = (
    "Time reading hard pairs from a store before and after train.reorder against reading it from front to back."
)
PICTURE_SIDE = 112
WAYS = ("local", "remote", "local_decoded", "remote_decoded")
# Height and width of a picture for the model.
MODEL_SIZE = (224, 224)


@dataclass(frozen=True)
class BenchConfig:
    out: Path
    """JSON file for the results."""
    store: Path | None = None
    """PairStore to measure; left out: one is made."""
    pairs: Path | None = None
    """PairTable of that store."""
    num_pairs: int = 12_000
    """Of the made store: pairs, of about 25 kB."""
    group_size: int = 30
    """Of the made store: pairs of a group; four of five hard pairs are of the anchor's group, the others from anywhere."""
    k: int = 20
    """Of the made store: hard pairs of a pair."""
    shard_size_mib: int = 4
    """Size of the shards of the made and of the reordered store."""
    batch_size: int = 512
    """Pairs of a batch, hard pairs included."""
    hard_per_anchor: int = 1
    """Hard pairs of an anchor in a batch."""
    shuffle_block: int = 1024
    """Anchors of a block of `ordered_blocks`."""
    rounds: int = 3
    """How often everything is measured."""
    shares_only: bool = False
    """Only how many hard pairs lie in their anchor's shuffle block and shard before and after; nothing is timed."""
    folder: Path | None = None
    """Where stores are made, a disk with room for three times the store; left out: the system's folder for temporary files."""


def main(arguments: Sequence[str]) -> None:
    config = parse(BenchConfig, program=PROGRAM, description=DESCRIPTION, arguments=arguments)
    if (config.store is None) != (config.pairs is None):
        raise ValueError("--store and --pairs go together: the table that was mined from that store")
    with tempfile.TemporaryDirectory(prefix="reorder-bench-", dir=config.folder) as name:
        folder = Path(name)
        store = config.store or make_store(config, folder)
        pairs = config.pairs or make_pairs(config, PairStore.open(store), folder / "pairs")
        ordered = folder / "ordered"
        flags = ["--store", store, "--pairs", pairs, "--out", ordered, "--shard-size-mib", config.shard_size_mib]
        reorder([str(flag) for flag in flags])
        report = shares(config, store, pairs, ordered)
        if not config.shares_only:
            report |= measure(config, store, pairs, ordered, folder)
    write_json_atomically(config.out, report)
    print(describe(report))


def shares(config: BenchConfig, store: Path, pairs: Path, ordered: Path) -> dict[str, Any]:
    """Sizes, and what share of the hard pairs the order brings together."""
    opened, table = PairStore.open(store), PairTable.open(pairs)
    return {
        "machine": machine(),
        "config": {
            **asdict(config),
            "out": None,
            "folder": None,
            "store": config.store and "given",
            "pairs": config.pairs and "given",
        },
        "num_pairs": len(opened),
        "hard_pairs_listed": int((np.asarray(table.pair_ids_NK) != NO_PAIR).sum()),
        "store_mib": sum(info["raw_data"]["bytes"] for info in opened.shard_infos) / (1 << 20),
        "partners_in_same_block": locality(table, PairTable.open(ordered / "pairs"), config),
        "partners_in_same_shard": PairStore.open(ordered).manifest["reordered"],
    }


def measure(config: BenchConfig, store: Path, pairs: Path, ordered: Path, folder: Path) -> dict[str, Any]:
    places = {"sequential": store, "scattered": store, "ordered": ordered, "ordered_blocks": ordered}
    tables = {store: PairTable.open(pairs), ordered: PairTable.open(ordered / "pairs")}
    plans = {
        name: plan(
            config, PairStore.open(place), tables[place], config.shuffle_block if name == "ordered_blocks" else 0
        )
        for name, place in places.items()
        if name != "sequential"
    }
    batches = {name: [plan.batch(step) for step in range(plan.num_steps)] for name, plan in plans.items()}
    ids = {name: [batch.groups_AP.ravel() for batch in some] for name, some in batches.items()}
    num_pairs = len(PairStore.open(store))
    ids["sequential"] = np.array_split(np.arange(num_pairs), -(-num_pairs // config.batch_size))
    tenths = {name: some[: -(-len(some) // 10)] for name, some in ids.items()}
    seconds: dict[str, dict[str, list[float]]] = {way: {} for way in WAYS}
    fetched: dict[str, int] = {}
    for number in range(config.rounds):
        for way in WAYS:
            readers = {}
            for name, place in places.items():
                opened = PairStore.open(place)
                if way.startswith("remote"):
                    opened = PairStore.open(f"file://{place.resolve()}", cache=folder / f"{way}-{number}-{name}")
                readers[name] = Reader(opened, place, ids[name] if way == "local" else tenths[name])
            for name, taken_s in seconds_to_read(readers, decode=way.endswith("decoded")).items():
                seconds[way].setdefault(name, []).append(taken_s)
                if way.startswith("remote"):
                    fetched[name] = len(list((folder / f"{way}-{number}-{name}").glob("shards/**/*.mds")))
    counts = {
        way: {name: sum(map(len, some)) for name, some in (ids if way == "local" else tenths).items()} for way in WAYS
    }
    rates = {
        way: {name: counts[way][name] / statistics.median(times) for name, times in some.items()}
        for way, some in seconds.items()
    }
    return {
        "num_shards": {name: len(PairStore.open(place).shard_infos) for name, place in places.items()},
        "stand_ins": {name: share_of_stand_ins(some) for name, some in batches.items()},
        "seconds": seconds,
        "pairs_per_s": rates,
        "of_sequential": {
            way: {name: rate / some["sequential"] for name, rate in some.items()} for way, some in rates.items()
        },
        "shards_fetched_for_a_tenth": fetched,
    }


def plan(config: BenchConfig, store: PairStore, table: PairTable, shuffle_block: int) -> EpochPlan:
    return EpochPlan(
        seed=0,
        epoch=0,
        conflict_group_N=conflict_groups(store.caption_group_N, store.image_group_N),
        batch_size=config.batch_size,
        hard_per_anchor=config.hard_per_anchor,
        pair_ids_NK=table.pair_ids_NK,
        is_anchor_N=~table.noise_N,
        shuffle_block=shuffle_block,
    )


def share_of_stand_ins(batches: Sequence[Any]) -> float:
    return float(np.concatenate([batch.is_substitute_AP.ravel() for batch in batches]).mean())


def locality(before: PairTable, after: PairTable, config: BenchConfig) -> dict[str, dict[str, float]]:
    """Share of the hard pairs in the block of their anchor, for blocks of several sizes, all lists and their first ten."""
    identity_N, shares = np.arange(len(before)), {}
    for block in sorted({256, 1024, 4096, config.shuffle_block}):
        for k in sorted({10, before.k}):
            shares[f"block {block}, first {k}"] = {
                name: round(share_in_stretch(table.pair_ids_NK[:, :k], identity_N, identity_N // block), 4)
                for name, table in (("before", before), ("after", after))
            }
    return shares


@dataclass(frozen=True)
class Reader:
    store: PairStore
    place: Path
    batches: Sequence[np.ndarray]


def seconds_to_read(readers: dict[str, Reader], *, decode: bool) -> dict[str, float]:
    """Time of each reader for every pair of its batches in order, none of the stores' shards in the page cache at first.

    Bytes only: one reader after the other, each from a cold store. With decoding, which takes a hundred times as long and goes with
    the machine's speed of the moment: batch by batch in turn.
    """
    turns = [list(readers)] if decode else [[name] for name in readers]
    seconds = dict.fromkeys(readers, 0.0)
    for reader in readers.values():
        augment_image(reader.store[0].image, AugmentConfig(), MODEL_SIZE, 0)  # imports Streaming
    for names in turns:
        for name in names:
            for file in {readers[name].place, readers[name].store.path}:
                drop_from_page_cache(file)
        for step in range(max(len(readers[name].batches) for name in names)):
            for name in names:
                if step < len(readers[name].batches):
                    seconds[name] += seconds_of_batch(readers[name].store, readers[name].batches[step], decode=decode)
    return seconds


def seconds_of_batch(store: PairStore, pair_ids: np.ndarray, *, decode: bool) -> float:
    start_s = time.perf_counter()
    store.prefetch(pair_ids)
    for pair_id in pair_ids.tolist():
        pair = store[pair_id]
        if decode:
            augment_image(pair.image, AugmentConfig(), MODEL_SIZE, pair_id)
    return time.perf_counter() - start_s


def drop_from_page_cache(folder: Path) -> None:
    for file in folder.glob("shards/**/*.mds"):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def make_store(config: BenchConfig, folder: Path) -> Path:
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for name, data in members(config.num_pairs):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, BytesIO(data))
    flags = ["--shards", folder / "00000.tar", "--out", folder / "store", "--shard-size-mib", config.shard_size_mib]
    ingest([str(flag) for flag in flags])
    (folder / "00000.tar").unlink()
    return folder / "store"


def members(num_pairs: int) -> Iterator[tuple[str, bytes]]:
    for number in range(num_pairs):
        buffer, pixels = BytesIO(), random.Random(number).randbytes(3 * PICTURE_SIDE**2)
        Image.frombytes("RGB", (PICTURE_SIDE, PICTURE_SIDE), pixels).save(buffer, "JPEG", quality=95)
        yield f"{number:08d}.jpg", buffer.getvalue()
        yield f"{number:08d}.txt", f"picture {number}".encode()


def make_pairs(config: BenchConfig, store: PairStore, path: Path) -> Path:
    """Groups whose members have ids from anywhere; a fifth of the hard pairs from other groups."""
    rng, num_pairs = np.random.default_rng(0), len(store)
    scattered_N = rng.permutation(num_pairs)
    first_N = np.arange(num_pairs) // config.group_size * config.group_size
    size_N = np.minimum(config.group_size, num_pairs - first_N)
    # One of the others of the group: a step of 1 .. size - 1 around it.
    step_NK = 1 + (rng.random((num_pairs, config.k)) * (size_N - 1)[:, None]).astype(np.int64)
    inside_NK = first_N[:, None] + (np.arange(num_pairs)[:, None] - first_N[:, None] + step_NK) % size_N[:, None]
    anywhere_NK = (np.arange(num_pairs)[:, None] + rng.integers(1, num_pairs, (num_pairs, config.k))) % num_pairs
    lists_NK = np.where(rng.random((num_pairs, config.k)) < 0.8, inside_NK, anywhere_NK)
    pair_ids_NK = np.empty_like(lists_NK)
    pair_ids_NK[scattered_N] = scattered_N[lists_NK]
    similarity_NK = np.tile(np.linspace(0.9, 0.5, config.k), (num_pairs, 1))
    PairTable.write(path, pair_ids_NK, similarity_NK, similarity_NK, store_fingerprint=store.fingerprint)
    return path


def describe(report: dict[str, Any]) -> str:
    lines = [f"{report['num_pairs']:,} pairs, {report['store_mib']:,.0f} MiB; hard pairs in their anchor's block:"]
    lines += [
        f"  {where}: {shares['before']:.1%} -> {shares['after']:.1%}"
        for where, shares in report["partners_in_same_block"].items()
    ]
    moved = report["partners_in_same_shard"]
    lines.append(f"  shard: {moved['partners_in_same_shard_before']:.1%} -> {moved['partners_in_same_shard']:.1%}")
    for way, rates in report.get("pairs_per_s", {}).items():
        for name, rate in rates.items():
            share = report["of_sequential"][way][name]
            more = f", {report['shards_fetched_for_a_tenth'][name]} shards fetched" if way.startswith("remote") else ""
            lines.append(f"  {way:14} {name:15} {rate:9,.0f} pair/s {share:6.2f} of sequential{more}")
    lines += [f"  stand-ins of {name}: {share:.2%}" for name, share in report.get("stand_ins", {}).items()]
    return "\n".join(lines)


if __name__ == "__main__":
    run(main, sys.argv[1:])
