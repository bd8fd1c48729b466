"""img2dataset's parquet beside a tar (00000.parquet beside 00000.tar): what its download says about each row.

It holds a row for every link that was tried, in the order in which downloads ended, so its row count is not the tar's.
The members of the tar decide what is kept; the table only serves to report the download's status counts and the
difference between both: rows of success whose members are not in the tar (it was cut, or members are gone), and keys of
the tar without such a row (the table is of another download). Captions, sizes and hashes in it are not used.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from train.ingest.sources import TAR_ENDINGS, Source

SUCCESS = "success"
COLUMNS = ["key", "status"]


@dataclass(frozen=True)
class SourceTable:
    """Rows by status and the keys that were downloaded; `unreadable` says why a table that is there was not used."""

    status: dict[str, int] = field(default_factory=dict)
    successes: frozenset[str] = frozenset()
    unreadable: str | None = None

    def lost(self, keys: Iterable[str]) -> set[str]:
        """Keys that were downloaded and are not among `keys`."""
        return self.successes.difference(keys)

    def report(self, keys: Iterable[str]) -> dict[str, Any]:
        """The counts for the manifest, `keys` being those of the tar."""
        if self.unreadable is not None:
            return {"unreadable": self.unreadable}
        keys = set(keys)
        return {
            "status": self.status,
            "lost": len(self.successes - keys),
            "unlisted": len(keys - self.successes),
        }


def table_path(source: Source) -> Path | None:
    """Where the table of a local tar would lie; None for others."""
    ending = next((ending for ending in TAR_ENDINGS if source.url.endswith(ending)), None)
    return Path(source.url.removesuffix(ending) + ".parquet") if source.local and ending else None


def read_source_table(source: Source) -> SourceTable | None:
    """The table beside `source`, or None without one. A table that cannot be used is no error: it decides nothing."""
    path = table_path(source)
    if path is None or not path.is_file():
        return None
    try:
        missing = [name for name in COLUMNS if name not in pq.read_schema(path).names]
        if missing:
            return SourceTable(unreadable=f"{path.name} has no column {missing[0]}")
        table = pq.read_table(path, columns=COLUMNS)
        keys, status = table["key"].cast(pa.string()).to_pylist(), table["status"].cast(pa.string()).to_pylist()
    except (pa.ArrowException, OSError) as error:
        return SourceTable(unreadable=f"{path.name}: {' '.join(str(error).split())}")
    downloaded = frozenset(key for key, state in zip(keys, status, strict=True) if state == SUCCESS and key is not None)
    return SourceTable(dict(Counter(str(state) for state in status)), downloaded)


def add_up(reports: Iterable[dict[str, Any] | None]) -> dict[str, Any] | None:
    """The reports of many shards as one; None when no shard has a table."""
    status, total = Counter(), Counter()
    for report in reports:
        total["without"] += report is None
        if report is None:
            continue
        total["shards"] += 1
        total["unreadable"] += "unreadable" in report
        status.update(report.get("status", {}))
        total.update({name: report.get(name, 0) for name in ("lost", "unlisted")})
    if not total["shards"]:
        return None
    return {
        "num_tables": total["shards"],
        "num_shards_without": total["without"],
        "num_unreadable": total["unreadable"],
        "num_rows": status.total(),
        "status": dict(sorted(status.items(), key=lambda item: (-item[1], item[0]))),
        "num_success_not_in_tar": total["lost"],
        "num_in_tar_without_success": total["unlisted"],
    }


def describe(tables: dict[str, Any]) -> str:
    """One line of `add_up`'s counts for the terminal."""
    states = ", ".join(f"{state} {count:,}" for state, count in tables["status"].items())
    line = (
        f"img2dataset's tables beside {tables['num_tables']:,} shards: {tables['num_rows']:,} rows ({states}); "
        f"{tables['num_success_not_in_tar']:,} successes are not in their tar, "
        f"{tables['num_in_tar_without_success']:,} samples have no row of success"
    )
    if tables["num_shards_without"]:
        line += f"; {tables['num_shards_without']:,} shards have no table"
    if tables["num_unreadable"]:
        line += f"; {tables['num_unreadable']:,} tables cannot be read"
    return line
