"""The program `python -m train.reorder`: a PairStore in the order of its mined graph, and the PairTable for the new ids."""

import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mining.command_line import parse, run
from mining.manifest import MANIFEST_NAME, fingerprint, write_json_atomically, write_manifest
from mining.pair_table import PairTable
from train.data.pair_store import (
    CHECKSUMS_NAME,
    FORMAT_VERSION,
    INDEX_NAME,
    KIND,
    LEDGER_NAME,
    REJECTED_NAME,
    PairStore,
)
from train.ingest.finish import make_durable
from train.reorder.graph_order import graph_order
from train.reorder.pair_lists import inverse, renumber_table, share_in_stretch
from train.reorder.rewrite import cut_shards, save_whole, write_checksums, write_index, write_ledger, write_shards

PROGRAM = "python -m train.reorder"
DESCRIPTION = """Write a PairStore again so that hard pairs lie near each other: an anchor and most of its partners in one shard.
Training with hard pairs then reads a store from remote storage or slow disks almost in sequence, instead of everywhere at once.

  python -m train.reorder --store data/cc12m --pairs pairs/a --out data/cc12m-ordered

Pair ids are new: train with --data.store OUT --data.pairs OUT/pairs, and --data.store_shuffle_block so that the order of an epoch
keeps what is near together. OUT/old_ids.npy has the old id of every new one; `mining.main verify` checks OUT/pairs against the
embeddings of the store as it was. When the data grows, append to the old store and table, then reorder again. Needs the room of
the store once more. Killed? Run the same command again: shards that are written are kept."""
PLAN_NAME = "reorder.json"
PLAN_VERSION = 1
OLD_IDS_NAME = "old_ids.npy"
PAIRS_FOLDER = "pairs"
LOCK_NAME = ".reorder.lock"
OTHER_FOLDER = "give another --out, or delete this folder to start it anew"
# Of the store's manifest, what is as true of the reordered one.
INHERITED = ("num_rejected", "num_shrunk", "source_tables", "num_source_shards", "parameters")


@dataclass(frozen=True)
class ReorderConfig:
    store: str
    """PairStore: a folder, or a URL of remote storage with --cache."""
    pairs: Path
    """PairTable that was mined from that store."""
    out: Path
    """Folder of the new PairStore; its PairTable is OUT/pairs."""
    cache: Path | None = None
    """Local folder for what is fetched of a remote store: all of it."""
    shard_size_mib: int | None = None
    """Size of the MDS files, in MiB; left out: as in the store."""
    workers: int = field(default_factory=lambda: min(8, 2 * len(os.sched_getaffinity(0))))
    """Shards written at a time; each is held in memory once. The result does not depend on it."""


def main(arguments: Sequence[str]) -> None:
    start_s = time.monotonic()
    config = parse(ReorderConfig, program=PROGRAM, description=DESCRIPTION, arguments=arguments)
    for name in ("shard_size_mib", "workers"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}, it has to be at least 1")
    store, table = PairStore.open(config.store, cache=config.cache), PairTable.open(config.pairs)
    if table.manifest["store_fingerprint"] != store.fingerprint:
        raise ValueError(
            f"the pair table {config.pairs} was mined from a store with fingerprint {table.manifest['store_fingerprint'][:12]}, "
            f"but {config.store} has {store.fingerprint[:12]}; give the store that it was mined from"
        )
    shard_size_mib = config.shard_size_mib or store.manifest["parameters"]["shard_size_mib"]
    plan = {
        "format_version": PLAN_VERSION,
        "store_fingerprint": store.fingerprint,
        "pairs_fingerprint": table.fingerprint,
        "shard_size_mib": shard_size_mib,
    }
    with locked_folder(config.out):
        prepare_folder(config.out, plan)
        if not (config.out / MANIFEST_NAME).is_file():
            try:
                reorder(store, table, config.out, plan, config.workers)
            except OSError as error:
                raise ValueError(
                    f"writing to {config.out} failed ({error}); free space or mend the disk, then run the same command again"
                ) from error
    print(summary(config.out, time.monotonic() - start_s))


def reorder(store: PairStore, table: PairTable, out: Path, plan: dict[str, Any], workers: int) -> None:
    """Write everything that is not in `out` yet, the manifest last."""
    old_ids_N = order_of(table, out)
    borders_S = cut_shards(store, old_ids_N, plan["shard_size_mib"] << 20)
    with bar("pairs written", len(store), "pair") as progress:
        write_shards(store, old_ids_N, borders_S, out, workers, progress.update)
    write_index(store, borders_S, out)
    write_checksums(store, old_ids_N, out)
    write_ledger(store, old_ids_N, out)
    shutil.copyfile(store.path / REJECTED_NAME, out / REJECTED_NAME)
    new_fingerprint = fingerprint(
        KIND, FORMAT_VERSION, "reordered", store.fingerprint, memoryview(np.ascontiguousarray(old_ids_N)).cast("B")
    )
    renumber_table(table, old_ids_N, out / PAIRS_FOLDER, store_fingerprint=new_fingerprint)
    names = [INDEX_NAME, LEDGER_NAME, REJECTED_NAME, CHECKSUMS_NAME, OLD_IDS_NAME]
    make_durable([out / name for name in names])
    shards_N = np.repeat(np.arange(len(borders_S) - 1), np.diff(borders_S))
    before_S = np.repeat(np.arange(len(store.shard_infos)), [info["samples"] for info in store.shard_infos])
    identity_N = np.arange(len(store))
    inherited = {name: store.manifest[name] for name in INHERITED if name in store.manifest}
    write_manifest(
        out,
        KIND,
        FORMAT_VERSION,
        **{**inherited, "parameters": {**inherited["parameters"], "shard_size_mib": plan["shard_size_mib"]}},
        num_pairs=len(store),
        fingerprint=new_fingerprint,
        reordered={
            **plan,
            "partners_in_same_shard_before": round(share_in_stretch(table.pair_ids_NK, identity_N, before_S), 4),
            "partners_in_same_shard": round(share_in_stretch(table.pair_ids_NK, inverse(old_ids_N), shards_N), 4),
        },
        files={name: (out / name).stat().st_size for name in names},
    )


def order_of(table: PairTable, out: Path) -> np.ndarray:
    """Old id of every new one, int64 [N], memory-mapped: from `out`, or computed and put there."""
    path = out / OLD_IDS_NAME
    if not path.is_file():
        with bar("ordering", None, "pair") as progress:
            save_whole(path, graph_order(table.pair_ids_NK, progress.update))
    return np.load(path, mmap_mode="r", allow_pickle=False)


def bar(what: str, total: int | None, unit: str) -> tqdm:
    return tqdm(desc=what, total=total, unit=unit, unit_scale=True, dynamic_ncols=True, mininterval=0.5)


def prepare_folder(out: Path, plan: dict[str, Any]) -> None:
    """Put the plan into `out`, or check that the plan in it is this one. Raises ValueError saying what differs."""
    path = out / PLAN_NAME
    if not path.is_file():
        if any(not entry.name.startswith(".reorder") for entry in out.iterdir()):
            raise ValueError(f"--out {out} is not empty and holds no reordered store; give another --out")
        write_json_atomically(path, plan)
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); {OTHER_FOLDER}") from error
    for name, value in plan.items():
        if before.get(name) != value:
            raise ValueError(f"{out} was started with {name}={before.get(name)}, now it is {value}; {OTHER_FOLDER}")


@contextmanager
def locked_folder(out: Path) -> Iterator[None]:
    """Create `out` and hold it for this process; the lock goes with the process, however that ends."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written ({error}); give another --out") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another {PROGRAM} is writing to {out}; wait for it, or give another --out") from error
        yield
    finally:
        os.close(descriptor)


def summary(out: Path, seconds: float) -> str:
    store = PairStore.open(out)
    reordered = store.manifest["reordered"]
    return (
        f"{out}: {len(store):,} pairs in {len(store.shard_infos):,} shards, in {seconds:.1f} s; of the hard pairs "
        f"{reordered['partners_in_same_shard']:.1%} lie in their anchor's shard, "
        f"{reordered['partners_in_same_shard_before']:.1%} did before. Train with "
        f"--data.store {out} --data.pairs {out / PAIRS_FOLDER} --data.store_shuffle_block N"
    )


def main_or_interrupted() -> None:
    try:
        run(main)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main_or_interrupted()
