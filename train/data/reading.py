"""What each data worker of a rank is reading at this moment, in memory that workers and rank share.

A worker that is blocked in a read can't answer; the rank that waits for it reads its note.
"""

import mmap

from torch.utils.data import get_worker_info

# Of a longer path the end is kept, which tells shards apart.
NOTE_BYTES = 512


class ReadingNotes:
    """One note a worker, and one for a rank that reads by itself."""

    def __init__(self, workers: int = 0) -> None:
        self.make_room(workers)

    def __reduce__(self) -> tuple[type["ReadingNotes"], tuple[int]]:
        # In a process that was not forked, notes reach nobody.
        return ReadingNotes, (self.workers,)

    def make_room(self, workers: int) -> None:
        """For so many workers, which are forked after this call. What was noted is gone."""
        self.workers = workers
        self._memory = mmap.mmap(-1, NOTE_BYTES * max(1, workers))

    def note(self, what: str) -> None:
        """Called by whoever reads, before the read; "" after it."""
        worker = get_worker_info()
        start = NOTE_BYTES * (worker.id if worker else 0)
        self._memory[start : start + NOTE_BYTES] = what.encode()[-NOTE_BYTES:].ljust(NOTE_BYTES, b"\0")

    def now(self) -> list[str]:
        """What each worker reads; "" for one that does not."""
        slots = range(0, len(self._memory), NOTE_BYTES)
        return [self._memory[start : start + NOTE_BYTES].rstrip(b"\0").decode(errors="replace") for start in slots]
