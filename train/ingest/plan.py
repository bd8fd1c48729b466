"""What an --out folder was started with: `ingest.json`, so that only the same shards and parameters go on with it.

Also the folder's lock: two ingests into one folder would delete each other's fragments.
"""

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mining.manifest import write_json_atomically
from train.data.pair_store import SHARDS_FOLDER
from train.ingest.sources import Source

PLAN_NAME = "ingest.json"
LOCK_NAME = ".ingest.lock"
PLAN_VERSION = 1
OTHER_FOLDER = "give another --out, or delete this folder to start it anew"


@dataclass(frozen=True)
class Parameters:
    """What decides the content of the store, beside the shards."""

    max_pixels: int
    shard_size_mib: int


def prepare_folder(out: Path, sources: Sequence[Source], parameters: Parameters) -> None:
    """Create `out` with its plan, or check that the plan in it is this one.

    Raises ValueError, saying what differs and the remedy.
    """
    plan = make_plan(sources, parameters)
    path = out / PLAN_NAME
    if path.is_file():
        check_same_plan(out, read_plan(path), plan)
    elif any(entry.name != LOCK_NAME for entry in out.iterdir()):
        raise ValueError(f"--out {out} is not empty and holds no ingest; give another --out")
    else:
        write_json_atomically(path, plan)
    shards = out / SHARDS_FOLDER
    shards.mkdir(exist_ok=True)
    for leftover in shards.glob(".*"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def make_plan(sources: Sequence[Source], parameters: Parameters) -> dict[str, Any]:
    return {
        "format_version": PLAN_VERSION,
        "parameters": asdict(parameters),
        # The place is a digest: commands and URLs may carry credentials.
        "shards": [[source.name, source.size, source.identity()] for source in sources],
    }


def read_plan(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); {OTHER_FOLDER}") from error


def check_same_plan(out: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    if old.get("format_version") != new["format_version"]:
        raise ValueError(f"{out} was started by another version of train.ingest; {OTHER_FOLDER}")
    for name, value in new["parameters"].items():
        before = old["parameters"].get(name)
        if before != value:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{out} was started with {flag} {before}, now it is {value}; {OTHER_FOLDER}")
    before, now = old["shards"], new["shards"]
    if [shard[0] for shard in before] != [shard[0] for shard in now]:
        raise ValueError(
            f"{out} was started with other --shards ({describe_shards(before)}; now {describe_shards(now)}); {OTHER_FOLDER}"
        )
    for (name, size_before, place_before), (_, size, place) in zip(before, now, strict=True):
        if place_before != place:
            raise ValueError(f"{out} was started with {name} from another place; {OTHER_FOLDER}")
        if size_before != size:
            raise ValueError(f"{name} has {size} bytes, it had {size_before} when {out} was started; {OTHER_FOLDER}")


def describe_shards(shards: list[list[Any]]) -> str:
    return f"{len(shards)} from {shards[0][0]} to {shards[-1][0]}"


@contextmanager
def locked_folder(out: Path) -> Iterator[None]:
    """Create `out` and hold it for this process; the lock goes with the process, however that ends.

    Raises ValueError when another ingest holds it, or when `out` cannot be a folder.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written ({error}); give another --out") from error
    try:
        lock(descriptor, out)
        try:
            yield
        finally:
            (out / LOCK_NAME).unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def lock(descriptor: int, out: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"another train.ingest is writing to {out}; wait for it, or give another --out") from error
    except OSError as error:
        # Some cluster file systems have no locks.
        logging.getLogger(__name__).warning("%s cannot be locked (%s); start only one ingest into it", out, error)
