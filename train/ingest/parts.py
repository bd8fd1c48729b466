"""One data set ingested by n programs at once (`--part 0/n` ... `--part n-1/n`, a Slurm array), then `--merge`.

All parts write into the same --out folder: part i does shards i, i + n, i + 2n, ... in the order of their names, and the
merge finishes the folder as a single ingest does, so the store has the same bytes. `parts/` says what was started and
what is done; it goes when the store is complete. Parts that were ingested on disks of their own are copied into one
folder first: no two of them hold the same files, but the plan, which is equal.
"""

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mining.manifest import read_manifest, write_manifest
from train.data.pair_store import SHARDS_FOLDER
from train.ingest.plan import OTHER_FOLDER, Plan
from train.ingest.worker import fragment_folder

PART_KIND = "IngestPart"
PART_VERSION = 1
PARTS_FOLDER = "parts"
# How many of the missing parts or shards an error names.
NUM_NAMED = 8


@dataclass(frozen=True)
class Part:
    """Part `index` of `count`, counted from 0."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def folder_name(self) -> str:
        return f"{self.index:05d}-of-{self.count:05d}"

    def numbers(self, num_shards: int) -> range:
        """The shards of this part, by their place in the plan."""
        return range(self.index, num_shards, self.count)


def parse_part(text: str) -> Part:
    """Part of "i/n". Raises ValueError saying how parts are counted."""
    match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if match is None:
        raise ValueError(f"--part is {text!r}, it has to be i/n, as 0/8, 1/8, ... 7/8 for eight programs")
    index, count = int(match[1]), int(match[2])
    if index >= count:
        last = f"0/{count} to {count - 1}/{count}" if count else "0/1"
        raise ValueError(f"--part is {text}: parts are counted from 0, so it has to be {last}")
    return Part(index, count)


def begin_part(out: Path, part: Part, plan: Plan) -> None:
    """Note that `part` has begun. Raises ValueError when `out` is divided into another number of parts."""
    folder = out / PARTS_FOLDER
    folder.mkdir(exist_ok=True)
    path = folder / part.folder_name
    if not path.is_dir():
        write_part(path, plan, is_done=False)
    # After writing: of two that begin at once with different counts at least one sees the other.
    check_one_division(folder)
    check_plan(path, plan)


def end_part(out: Path, part: Part, plan: Plan) -> None:
    write_part(out / PARTS_FOLDER / part.folder_name, plan, is_done=True)


def write_part(path: Path, plan: Plan, *, is_done: bool) -> None:
    path.mkdir(exist_ok=True)
    write_manifest(path, PART_KIND, PART_VERSION, plan=plan.digest, is_done=is_done)


def read_part(path: Path) -> dict[str, Any]:
    return read_manifest(path, PART_KIND, PART_VERSION, remedy=f"delete {path} and run that part again")


def check_parts(out: Path, plan: Plan) -> None:
    """Every part of one division is done, belongs to this plan, and its fragments are there.

    Raises ValueError naming what is missing, doubled or foreign.
    """
    folder = out / PARTS_FOLDER
    count = check_one_division(folder)
    for path in part_folders(folder):
        check_plan(path, plan)
    parts = [Part(index, count) for index in range(count)]
    unfinished = [part for part in parts if not is_done(folder / part.folder_name)]
    if unfinished:
        raise ValueError(
            f"{len(unfinished)} of {count} parts of {out} are not done ({named(unfinished)}); run each with "
            f"--part, as --part {unfinished[0]}, then --merge again"
        )
    for part in parts:
        missing = [
            plan.shards[number][0]
            for number in part.numbers(len(plan.shards))
            if not fragment_folder(out / SHARDS_FOLDER, number).is_dir()
        ]
        if missing:
            raise ValueError(
                f"part {part} of {out} is done, but {len(missing)} of its shards are not in {out / SHARDS_FOLDER} "
                f"({named(missing)}); copy them there, or run --part {part} again"
            )


def check_one_division(folder: Path) -> int:
    """The number of parts."""
    counts = {}
    for path in part_folders(folder):
        counts.setdefault(int(path.name.split("-of-")[1]), path.name)
    if not counts:
        raise ValueError(f"{folder.parent} holds no part; run --part 0/n ... --part n-1/n into it first")
    if len(counts) > 1:
        first, second = sorted(counts.items())[:2]
        raise ValueError(
            f"{folder} holds parts of {first[0]} ({first[1]}) and of {second[0]} ({second[1]}): shards would be done twice; "
            f"delete {folder} and run all parts of one division again (finished shards are kept)"
        )
    return next(iter(counts))


def part_folders(folder: Path) -> list[Path]:
    return sorted(folder.glob("*-of-*"))


def check_plan(path: Path, plan: Plan) -> None:
    if read_part(path)["plan"] != plan.digest:
        raise ValueError(
            f"{path} is a part of another ingest (other shards or flags than {path.parent.parent} was started with); "
            f"{OTHER_FOLDER}"
        )


def is_done(path: Path) -> bool:
    return path.is_dir() and read_part(path)["is_done"]


def named(things: Sequence[Any]) -> str:
    more = f" and {len(things) - NUM_NAMED} more" if len(things) > NUM_NAMED else ""
    return ", ".join(map(str, things[:NUM_NAMED])) + more


def remove_parts(out: Path) -> None:
    """After the store is complete."""
    if (out / PARTS_FOLDER).is_dir():
        shutil.rmtree(out / PARTS_FOLDER)
