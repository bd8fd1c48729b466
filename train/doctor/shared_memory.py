"""Checks of /dev/shm: is it large enough for what workers hand over, and what have programs left there that are gone."""

import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from train.doctor.finding import Finding, broken, ok, warning

FOLDER = Path("/dev/shm")
MIB = 2**20
MAX_NAMED = 8
# Files that programs leave behind, and whose they are.
LEFTOVERS = (
    ("DeepSpeed", re.compile(r"deepspeed_")),
    (
        "MosaicML Streaming",
        re.compile(
            r"\d{6}_(locals|barrier|barrier_filelock|next_epoch|cache_usage|shard_states|shard_access_times|resume|epoch_\w+)"
        ),
    ),
    ("NCCL", re.compile(r"nccl-")),
    ("torch", re.compile(r"torch_(?P<pid>\d+)_")),
)


def size(needed_bytes: int, folder: Path = FOLDER) -> list[Finding]:
    """`needed_bytes`: what batches on their way from workers to ranks take at once."""
    if not folder.is_dir():
        return [broken("/dev/shm", f"{folder} is not there", "mount a tmpfs on it")]
    free = shutil.disk_usage(folder).free
    facts = (
        f"{free / MIB:,.0f} MiB free, batches on their way from data workers take up to {needed_bytes / MIB:,.0f} MiB"
    )
    if free < needed_bytes:
        return [
            broken("/dev/shm", facts, "docker run --shm-size=16g (or --ipc=host), fewer --data.workers, or clear it")
        ]
    if free < 2 * needed_bytes:
        return [warning("/dev/shm", facts, "docker run --shm-size=16g, or fewer --data.workers")]
    return [ok("/dev/shm", facts)]


def batches_in_flight_bytes(*, ranks: int, workers: int, batch_size: int, image_bytes: int, text_bytes: int) -> int:
    """Each worker has two batches of its rank ready and makes another (uint8 pictures, int64 tokens)."""
    return ranks * workers * 3 * -(-batch_size // max(1, ranks)) * (image_bytes + text_bytes)


def leftovers(folder: Path = FOLDER) -> list[Finding]:
    """Files of this user in /dev/shm that no running process has open."""
    if not folder.is_dir():
        return []
    in_use, stale = names_in_use(folder), dict[str, list[Path]]()
    for path in sorted(folder.iterdir()):
        whose = owner_of(path)
        if whose and path.name not in in_use and path.stat().st_uid == os.getuid():
            stale.setdefault(whose, []).append(path)
    findings = []
    for whose, paths in stale.items():
        mib = sum(path.stat().st_size for path in paths) / MIB
        # By name: a pattern could take the files of a run that is going on.
        names = " ".join(str(path) for path in paths[:MAX_NAMED])
        rest = f" (then {len(paths) - MAX_NAMED} more)" if len(paths) > MAX_NAMED else ""
        message = f"{len(paths)} files of {whose} that no process uses, {mib:,.0f} MiB"
        findings.append(warning("/dev/shm", message, f"rm {names}{rest}"))
    return findings or [ok("/dev/shm", "no leftovers")]


def owner_of(path: Path) -> str | None:
    for whose, pattern in LEFTOVERS:
        found = pattern.match(path.name)
        if found:
            return whose
    return None


def names_in_use(folder: Path) -> set[str]:
    """Names below `folder` that a process of this user has mapped or open."""
    prefix, names = f"{folder}/", set[str]()
    for process in Path("/proc").glob("[0-9]*"):
        for target in (*mapped(process), *opened(process)):
            if target.startswith(prefix):
                names.add(target.removeprefix(prefix).removesuffix(" (deleted)"))
    return names


def mapped(process: Path) -> Iterable[str]:
    try:
        lines = (process / "maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        # Another user's, or gone meanwhile.
        return []
    return [line.split(maxsplit=5)[5] for line in lines if line.count(" ") >= 5 and "/" in line]


def opened(process: Path) -> Iterable[str]:
    try:
        return [os.readlink(link) for link in (process / "fd").iterdir()]
    except OSError:
        return []
