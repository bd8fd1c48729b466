"""One rank's part of a search: every world_size-th block of queries, and later what dead ranks left.

Shape letters: Q queries of one block.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
from tqdm import tqdm

from mining.array_folder import ArrayFolderWriter
from mining.ranks import POLL_S, Meeting, Wait

logger = logging.getLogger(__name__)

# From pair ids (int64 [Q]) to their rows of every array.
SearchRows = Callable[[np.ndarray], Mapping[str, np.ndarray]]


class Share:
    """The blocks of `queries`, searched by `search_rows` and committed by `writer`."""

    def __init__(
        self, writer: ArrayFolderWriter, meeting: Meeting, queries: range, block: int, search_rows: SearchRows
    ):
        self.writer, self.meeting, self.search_rows = writer, meeting, search_rows
        self.queries = queries
        self.ranges = [(start, min(start + block, queries.stop)) for start in range(queries.start, queries.stop, block)]
        self.bar: tqdm | None = None
        self.num_in_work = 0

    @contextmanager
    def progress(self, name: str, *, show: bool) -> Iterator[None]:
        """A bar over the rows of all ranks."""
        with tqdm(
            total=len(self.queries),
            initial=self._num_done(),
            desc=name,
            unit="pair",
            unit_scale=True,
            dynamic_ncols=True,
            mininterval=0.5,
            # A block of a large base takes minutes: how often to look must not be learned from the first ones.
            miniters=0,
            disable=not show,
        ) as self.bar:
            yield

    def search_own(self) -> None:
        place = self.meeting.place
        for start, stop in self.ranges[place.rank :: place.world_size]:
            if not self.writer.rows_done[start:stop].all():
                self._search(start, stop)
        self.meeting.tell(is_working=False)

    def search_abandoned(self) -> None:
        """Return once all rows are on disk: searched by their ranks, or here where a rank is not at work any more."""
        place, told = self.meeting.place, set()
        wait = Wait(self.meeting, "whose blocks are not searched yet")
        while True:
            rows_done = self.writer.refresh()
            if not self.writer.partial.is_dir():
                # Another rank was quick to finish: looked for here, its blocks would seem to be missing for as long as patience lasts.
                raise FileNotFoundError(f"{self.writer.partial} has become the table, or was removed")
            self._show()
            missing = [number for number, (a, b) in enumerate(self.ranges) if not rows_done[a:b].all()]
            if not missing:
                return
            at_work = self.meeting.ranks_at_work()
            abandoned = [number for number in missing if number % place.world_size not in at_work]
            if not abandoned:
                wait.tell({number % place.world_size for number in missing}, len(missing))
                time.sleep(POLL_S)
                continue
            owners = {number % place.world_size for number in abandoned} - {place.rank}
            if owners - told:
                self._tell_of(sorted(owners - told))
                told |= owners
            # Ranks that wait together begin at different blocks.
            self._search(*self.ranges[abandoned[place.rank % len(abandoned)]])

    def _search(self, start: int, stop: int) -> None:
        self.num_in_work = stop - start
        rows = self.search_rows(np.arange(start, stop))
        if self.meeting.place.world_size > 1 and self.writer.refresh()[start:stop].all():
            # Taken over by two ranks, and the other was faster.
            return
        self.writer.write_rows(start, rows)
        self._show()

    def _num_done(self) -> int:
        return int(self.writer.rows_done[self.queries.start : self.queries.stop].sum())

    def show_within_block(self, share: float) -> None:
        """The bar inside a block, of which this share is searched; nothing of it is committed yet."""
        self._show(int(share * self.num_in_work))

    def _show(self, ahead: int = 0) -> None:
        # Never back: an interrupted pass, or one of several over the same queries, says less than the one before.
        if self.bar is not None and (more := self._num_done() + ahead - self.bar.n) > 0:
            self.bar.update(more)

    def _tell_of(self, ranks: list[int]) -> None:
        place = self.meeting.place
        silent = [rank for rank in ranks if rank in self.meeting.silent_ranks()]
        if silent:
            logger.warning(
                "rank %d of %d has waited: no sign of life from rank %s for %g s, it searches their blocks itself (was the "
                "job started through a launcher? WORLD_SIZE=%d comes from the environment)",
                place.rank,
                place.world_size,
                ", ".join(map(str, silent)),
                self.meeting.patience_s,
                place.world_size,
            )
