"""The samples of one source shard in the order of their keys: what is kept, and what is not and why.

In: a `Source`. Out: `Outcome`s, one sample in memory at a time, after the tar's offsets (about 1 KiB a key). Used by
`worker`, which writes them, and by `survey`, which only counts.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from train.ingest.decode import Pair, Rejected, read_pair
from train.ingest.plan import Parameters
from train.ingest.source_table import SourceTable, read_source_table
from train.ingest.sources import Source, plain_path, plain_tar
from train.ingest.tar_index import TarIndex, index_tar, read_member

# report(done, total): keys of the shard that are done.
Report = Callable[[int, int], None]


class Outcome(NamedTuple):
    """A pair to keep, a reason to list in rejected.parquet under `key`, or both."""

    key: str
    pair: Pair | None
    reason: str | None


def reason_category(reason: str) -> str:
    return reason.split(":")[0]


@dataclass
class Samples:
    """One opened shard. Iterate it once."""

    file: BinaryIO
    index: TarIndex
    table: SourceTable | None
    parameters: Parameters
    report: Report

    def __iter__(self) -> Iterator[Outcome]:
        if self.index.torn is not None:
            yield Outcome("", None, f"torn tar: {self.index.torn}; nothing after that was read")
        lost = self.table.lost(self.index.members) if self.table else set()
        # Keys are told apart, and ordered, as rejected.parquet spells them.
        keys = sorted([*self.index.members, *lost], key=lambda key: (printable(key), key))
        for done, key in enumerate(keys, start=1):
            if key in lost:
                yield Outcome(key, None, "not in the tar: img2dataset's table says success")
            else:
                yield self.outcome(key)
            self.report(done, len(keys))

    def outcome(self, key: str) -> Outcome:
        members = self.index.members[key]
        try:
            pair = read_pair(key, members, lambda member: read_member(self.file, member), self.parameters)
        except Rejected as reason:
            return Outcome(key, None, str(reason))
        copies = max(len(places) for places in members.values())
        return Outcome(key, pair, f"duplicate key: {copies} equal copies, one is kept" if copies > 1 else None)

    def table_report(self) -> dict[str, Any] | None:
        return None if self.table is None else self.table.report(self.index.members)


@contextmanager
def open_samples(source: Source, spool: Path, parameters: Parameters, report: Report) -> Iterator[Samples]:
    """Open a shard, fetching or unpacking it to `spool` when it is no plain local tar.

    Raises UnreadableShard when it cannot be opened; whatever is wrong inside it becomes outcomes.
    """
    try:
        with open(plain_tar(source, spool), "rb") as file:
            yield Samples(file, index_tar(file), read_source_table(source), parameters, report)
    finally:
        for leftover in (spool, plain_path(spool)):
            leftover.unlink(missing_ok=True)


def printable(text: str) -> str:
    """UTF-8 text as it is; what is no UTF-8 with backslashes, so that it can be named."""
    return text.encode("utf-8", "backslashreplace").decode()
