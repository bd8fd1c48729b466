"""What an --out folder was started with: `ingest.json`, so that only the same shards and parameters go on with it.

Also the folder's locks: two ingests into one folder would delete each other's fragments. The parts of one ingest share
the folder, each holding its own lock.
"""

import fcntl
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mining.manifest import fingerprint, write_json_atomically
from train.data.pair_store import SHARDS_FOLDER
from train.ingest.sources import Source

PLAN_NAME = "ingest.json"
# What an ingest keeps in its folder beside the store.
PRIVATE_PREFIX = ".ingest"
LOCK_NAME = ".ingest.lock"
PLAN_VERSION = 1
OTHER_FOLDER = "give another --out, or delete this folder to start it anew"


@dataclass(frozen=True)
class Parameters:
    """What decides the content of the store, beside the shards. The last three are None when pictures stay as found."""

    max_pixels: int
    shard_size_mib: int
    max_side: int | None = None
    quality: int | None = None
    encoder: str | None = None


@dataclass(frozen=True)
class Plan:
    """Everything that decides the store: parameters, and name, size and a digest of the place of every shard, by name."""

    parameters: Parameters
    shards: tuple[tuple[str, int | None, str], ...]

    @cached_property
    def digest(self) -> str:
        """Says in every fragment and part which plan it belongs to."""
        return fingerprint(self.to_json())

    def to_json(self) -> dict[str, Any]:
        return {
            "format_version": PLAN_VERSION,
            "parameters": asdict(self.parameters),
            "shards": [list(shard) for shard in self.shards],
        }


def make_plan(sources: Sequence[Source], parameters: Parameters) -> Plan:
    # The place is a digest: commands and URLs may carry credentials.
    return Plan(parameters, tuple((source.name, source.size, source.identity()) for source in sources))


def read_plan(out: Path) -> Plan:
    """The plan that `out` was started with. Raises ValueError when it is damaged or another version's."""
    path = out / PLAN_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format_version"] != PLAN_VERSION:
            raise ValueError(f"{out} was started by another version of train.ingest; {OTHER_FOLDER}")
        return Plan(Parameters(**content["parameters"]), tuple(tuple(shard) for shard in content["shards"]))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); {OTHER_FOLDER}") from error


def prepare_folder(out: Path, plan: Plan) -> None:
    """Put the plan into `out`, or check that the plan in it is this one.

    Raises ValueError, saying what differs and the remedy.
    """
    path = out / PLAN_NAME
    if not path.is_file():
        if any(not is_private(entry) for entry in out.iterdir()):
            raise ValueError(f"--out {out} is not empty and holds no ingest; give another --out")
        write_new_plan(path, plan)
    # Also after writing: another part may have started the folder in the meantime.
    check_same_plan(out, read_plan(out), plan)
    (out / SHARDS_FOLDER).mkdir(exist_ok=True)


def is_private(entry: Path) -> bool:
    """Locks, and what is being written before it gets its name."""
    return entry.name.startswith(".") and entry.name.lstrip(".").startswith(PRIVATE_PREFIX.lstrip("."))


def remove_private(out: Path) -> None:
    """What killed runs left beside the store; the lock goes when it is given back."""
    for entry in out.iterdir():
        if is_private(entry) and entry.name != LOCK_NAME:
            entry.unlink(missing_ok=True)


def write_new_plan(path: Path, plan: Plan) -> None:
    """Whole or not at all, the first of several parts wins. Process ids of several nodes may be equal, so no part of names."""
    temporary = path.with_name(f"{PRIVATE_PREFIX}.{uuid.uuid4().hex}")
    write_json_atomically(temporary, plan.to_json())
    try:
        os.link(temporary, path)
    except FileExistsError:
        return
    except OSError:
        # A file system without hard links.
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(out: Path, numbers: Iterable[int]) -> None:
    """What killed runs left of the shards with these numbers."""
    mine = {f"{number:05d}" for number in numbers}
    for leftover in (out / SHARDS_FOLDER).glob(".*"):
        if leftover.name.split(".")[1] not in mine:
            continue
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def check_same_plan(out: Path, old: Plan, new: Plan) -> None:
    check_same_parameters(out, old.parameters, new.parameters)
    before, now = old.shards, new.shards
    if [shard[0] for shard in before] != [shard[0] for shard in now]:
        raise ValueError(
            f"{out} was started with other --shards ({describe_shards(before)}; now {describe_shards(now)}); {OTHER_FOLDER}"
        )
    for (name, size_before, place_before), (_, size, place) in zip(before, now, strict=True):
        if place_before != place:
            raise ValueError(f"{out} was started with {name} from another place; {OTHER_FOLDER}")
        if size_before != size:
            raise ValueError(f"{name} has {size} bytes, it had {size_before} when {out} was started; {OTHER_FOLDER}")


def check_same_parameters(out: Path, old: Parameters, new: Parameters) -> None:
    if (old.max_side is None) != (new.max_side is None):
        first, now = ("without", "with") if old.max_side is None else ("with", "without")
        raise ValueError(f"{out} was started {first} --reencode, now it is {now}; {OTHER_FOLDER}")
    for name, value in asdict(new).items():
        before = getattr(old, name)
        if before == value:
            continue
        if name == "encoder":
            raise ValueError(f"{out} was started with {before}, here is {value}: install the former, or {OTHER_FOLDER}")
        flag = "--" + name.replace("_", "-")
        raise ValueError(f"{out} was started with {flag} {before}, now it is {value}; {OTHER_FOLDER}")


def describe_shards(shards: Sequence[tuple[str, int | None, str]]) -> str:
    return f"{len(shards)} from {shards[0][0]} to {shards[-1][0]}"


@contextmanager
def locked_folder(out: Path, part: str | None = None) -> Iterator[None]:
    """Create `out` and hold it for this process, or only the part "i/n"; locks go with the process, however that ends.

    Raises ValueError when another ingest holds it, or when `out` cannot be a folder.
    """
    with ExitStack() as locks:
        try:
            out.mkdir(parents=True, exist_ok=True)
            locks.enter_context(locked_file(out / LOCK_NAME, str(out), shared=part is not None))
            if part is not None:
                path = out / f"{LOCK_NAME}.{part.replace('/', '-of-')}"
                locks.enter_context(locked_file(path, f"part {part} of {out}", shared=False))
        except OSError as error:
            raise ValueError(f"--out {out} cannot be written ({error}); give another --out") from error
        yield


@contextmanager
def locked_file(path: Path, what: str, *, shared: bool) -> Iterator[None]:
    descriptor = open_locked(path, what, shared)
    try:
        yield
    finally:
        if not shared:
            path.unlink(missing_ok=True)
        os.close(descriptor)


def open_locked(path: Path, what: str, shared: bool) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            lock(descriptor, what, shared)
            if is_same_file(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        # Its last holder removed it between opening and locking.
        os.close(descriptor)


def is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def lock(descriptor: int, what: str, shared: bool) -> None:
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"another train.ingest is writing to {what}; wait for it, or give another --out") from error
    except OSError as error:
        # Some cluster file systems have no locks.
        logging.getLogger(__name__).warning("%s cannot be locked (%s); start only one ingest into it", what, error)
