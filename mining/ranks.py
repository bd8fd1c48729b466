"""How the ranks of a search meet: through files in the folder they write, so that any launcher or job array will do.

Every block has the same bytes whoever computes it, so that nothing here guards correctness, only against double work: each
rank gives a sign of life by touching its file, a rank that has given none for `patience_s` seconds is silent, and the
others take over its blocks. Times are the file system's own, not those of the nodes' clocks.
"""

import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from mining.manifest import write_json_atomically

logger = logging.getLogger(__name__)

RANKS_FOLDER = "ranks"
LOCK_NAME = "finish.lock"
SIGNS_IN_PATIENCE = 6
LONGEST_PAUSE_S = 5.0
POLL_S = 0.5


@dataclass(frozen=True)
class RankPlace:
    """This process's number among those of the job, and among those of its node."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "RankPlace":
        """From RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, as torchrun and deepspeed set them.

        Raises ValueError for one of the first two without the other, or numbers that do not fit.
        """
        given = {name: environment[name] for name in ("RANK", "WORLD_SIZE") if environment.get(name)}
        if not given:
            return cls()
        shown = " ".join(f"{name}={value}" for name, value in given.items())
        remedy = "start through deepspeed or torchrun, set both by hand, or unset both for one process"
        if len(given) == 1:
            raise ValueError(
                f"{shown} is set in the environment without its companion (RANK with WORLD_SIZE); {remedy}"
            )
        try:
            rank, world_size = int(given["RANK"]), int(given["WORLD_SIZE"])
            local_rank = int(environment.get("LOCAL_RANK") or 0)
            local_world_size = int(environment.get("LOCAL_WORLD_SIZE") or 1)
        except ValueError as error:
            raise ValueError(f"{shown} in the environment are not numbers ({error}); {remedy}") from error
        if not 0 <= rank < world_size:
            raise ValueError(f"{shown} in the environment do not fit: RANK must lie in 0..WORLD_SIZE-1; {remedy}")
        return cls(rank, world_size, local_rank, local_world_size)


class Meeting:
    """One rank's view of the others; a context manager, inside of which this rank gives signs of life."""

    def __init__(self, folder: Path, place: RankPlace, patience_s: float):
        if patience_s <= 0:
            raise ValueError(f"patience_s={patience_s} seconds must be positive")
        self.folder, self.place, self.patience_s = folder / RANKS_FOLDER, place, patience_s
        self.pause_s = min(LONGEST_PAUSE_S, patience_s / SIGNS_IN_PATIENCE)
        self._own = self._file(place.rank)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._give_signs, name="signs of life", daemon=True)

    def __enter__(self) -> "Meeting":
        self.folder.mkdir(exist_ok=True)
        self.tell(is_working=True)
        self.entered_s = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()

    def tell(self, *, is_working: bool) -> None:
        """Say whether this rank still has blocks of its own to search."""
        about = {"rank": self.place.rank, "host": socket.gethostname(), "process": os.getpid(), "works": is_working}
        write_json_atomically(self._own, about)

    def _file(self, rank: int) -> Path:
        return self.folder / f"rank-{rank:05d}.json"

    def _give_signs(self) -> None:
        while not self._stop.wait(self.pause_s):
            try:
                os.utime(self._own)
            except FileNotFoundError:
                # Another rank has finished, and with it the folder's name is gone.
                return

    def silent_ranks(self) -> list[int]:
        """The other ranks without a sign of life for longer than the patience."""
        others = [rank for rank in range(self.place.world_size) if rank != self.place.rank]
        return [rank for rank in others if self._silence_s(rank) > self.patience_s]

    def ranks_at_work(self) -> set[int]:
        """The other ranks that are alive and search blocks of their own."""
        others = set(range(self.place.world_size)) - {self.place.rank} - set(self.silent_ranks())
        return {rank for rank in others if self._works(rank)}

    def _works(self, rank: int) -> bool:
        try:
            return json.loads(self._file(rank).read_text(encoding="utf-8"))["works"]
        except FileNotFoundError:
            # It may be starting; silence decides.
            return True

    def _silence_s(self, rank: int) -> float:
        try:
            # Two times of one file system; this rank's own is at most a pause old.
            apart_s = self._own.stat().st_mtime - self._file(rank).stat().st_mtime
        except FileNotFoundError:
            return time.monotonic() - self.entered_s
        # A file of an earlier run says nothing about a rank that is only starting.
        return min(apart_s, time.monotonic() - self.entered_s)

    def should_finish(self) -> bool:
        """No rank of lower number is there to do it."""
        return not self.ranks_to_finish()

    def ranks_to_finish(self) -> set[int]:
        """The ranks of lower number that are alive: the lowest of them finishes."""
        return set(range(self.place.rank)) - set(self.silent_ranks())

    def whereabouts(self, rank: int) -> str:
        """Number, host and process, as far as the rank has told."""
        try:
            about = json.loads(self._file(rank).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return f"rank {rank} (not seen yet)"
        return f"rank {rank} (process {about['process']} on {about['host']})"


class Wait:
    """Says what a rank waits for: when nothing has changed for as long as its patience, and then each time after twice as long."""

    def __init__(self, meeting: Meeting, what: str):
        self.meeting, self.what = meeting, what
        self.state: object = None
        self._begin()

    def _begin(self) -> None:
        self.since_s, self.next_s = time.monotonic(), self.meeting.patience_s

    def tell(self, ranks: Collection[int], state: object = None) -> None:
        """`ranks`: who is waited for, alive. `state`: what shows progress."""
        if state != self.state:
            self.state = state
            self._begin()
        waited_s = time.monotonic() - self.since_s
        if waited_s < self.next_s:
            return
        self.next_s = 2 * waited_s
        place = self.meeting.place
        whom = ", ".join(self.meeting.whereabouts(rank) for rank in sorted(ranks))
        logger.warning(
            "rank %d of %d has waited for %.0f s: it needs %s %s; they give signs of life, stop this run if they hang",
            place.rank,
            place.world_size,
            waited_s,
            whom,
            self.what,
        )


@contextmanager
def finishing_alone(folder: Path, patience_s: float) -> Iterator[None]:
    """Waits until no other process finishes this folder; the lock goes with its process, also when that is killed."""
    # Not emptied before it is locked: it says who holds it.
    with open(folder / LOCK_NAME, "a+", encoding="utf-8") as file:
        since_s = told_s = time.monotonic()
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() - told_s > patience_s:
                    told_s = time.monotonic()
                    _tell_of_lock(file, told_s - since_s)
                time.sleep(POLL_S)
            except OSError as error:
                logger.warning("%s: this file system has no locks (%s), finishing without one", folder, error)
                break
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _tell_of_lock(file: TextIO, waited_s: float) -> None:
    file.seek(0)
    holder = file.read() or "another process"
    logger.warning("waited for %.0f s: %s finishes this table and holds %s", waited_s, holder, file.name)
