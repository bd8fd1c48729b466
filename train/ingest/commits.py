"""Fragments that workers have written become durable and get their names, in threads of the main process.

In: `Written` folders, in the order in which workers finish them. Out: fragments, each complete or absent. A commit waits
for the disk and hardly computes: meanwhile the worker decodes its next shard, and several commits share the disk's
journal. Few are under way at a time, so a kill costs the shards in flight and these.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from mining.manifest import commit_folder
from train.ingest.worker import Written

AHEAD_PER_THREAD = 2
# Threads only wait for the disk, which takes several syncs for hardly more time than one.
NUM_THREADS = 8


class Commits:
    """Commits what is added; leaving the `with` block waits for the rest, whether or not there was an error in it.

    Errors are those of the oldest commit that failed, from `add` or at the end of the block.
    """

    def __init__(self, num_threads: int, on_commit: Callable[[], None]) -> None:
        self._threads = ThreadPoolExecutor(num_threads)
        self._limit = AHEAD_PER_THREAD * num_threads
        self._on_commit = on_commit
        self._pending: deque[Future] = deque()

    def add(self, written: Written) -> None:
        """Begin to commit one fragment; `on_commit` is called here, after each commit that is found to be done."""
        self._pending.append(self._threads.submit(commit_folder, written.temporary, written.folder))
        self._collect(self._limit)

    def _collect(self, num_left: int) -> None:
        """Take off what is done, and wait until at most `num_left` are not."""
        while self._pending and (len(self._pending) > num_left or self._pending[0].done()):
            self._pending.popleft().result()
            self._on_commit()

    def __enter__(self) -> "Commits":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        try:
            # An error on its way out is older than what is still pending, and stays the one that is raised.
            if kind is None:
                self._collect(0)
        finally:
            self._threads.shutdown()
