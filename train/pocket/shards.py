"""Writes drawings as img2dataset writes CC12M: `00000.tar` with picture, .json and .txt of each pair, `00000_stats.json`, and
`00000.parquet` with a row for every requested pair, also for those that failed and are not in the tar.
"""

import hashlib
import io
import json
import math
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from train.pocket.artists import Drawing
from train.pocket.render import Picture

NUM_SHARD_DIGITS = 5
# img2dataset cuts each input list into shards of its own, so every list ends in a short shard.
INPUT_LIST_SHARES = (0.4, 0.6)
# Every third shard is JPEG, so that both forms that img2dataset writes are exercised.
JPEG_EVERY = 3
PARQUET_SCHEMA = pa.schema(
    [
        *[(name, pa.string()) for name in ("name", "base_name", "group", "subgroup", "artist", "hexcode")],
        *[(name, pa.string()) for name in ("caption", "url", "key", "status", "error_message")],
        *[(name, pa.int32()) for name in ("width", "height", "original_width", "original_height")],
        *[(name, pa.string()) for name in ("exif", "sha256")],
    ]
)


@dataclass(frozen=True)
class ShardPlan:
    """The requested drawings of one shard, in key order, and the file form of its pictures."""

    shard_id: int
    drawings: list[Drawing]
    extension: str

    @property
    def name(self) -> str:
        return f"{self.shard_id:0{NUM_SHARD_DIGITS}d}"


def plan_shards(drawings: list[Drawing], *, drawings_per_shard: int, seed: int) -> list[ShardPlan]:
    """Spread the drawings over shards of unequal size, artists and concepts mixed.

    The order is by a hash of the picture's source, so that it depends on nothing but the data and the seed, and so that
    pictures which are byte-identical under several captions meet in one shard and one form: they stay byte-identical.
    """
    ordered = sorted(drawings, key=lambda drawing: order_key(drawing, seed))
    plans: list[ShardPlan] = []
    start = 0
    for list_end in input_list_ends(len(ordered)):
        for first in range(start, list_end, drawings_per_shard):
            extension = "jpg" if len(plans) % JPEG_EVERY == 1 else "webp"
            part = ordered[first : min(first + drawings_per_shard, list_end)]
            plans.append(ShardPlan(len(plans), part, extension))
        start = list_end
    return plans


def order_key(drawing: Drawing, seed: int) -> tuple[bytes, str]:
    source = drawing.source if drawing.source is not None else drawing.address.encode()
    return hashlib.sha256(b"%d:" % seed + source).digest(), drawing.address


def input_list_ends(count: int) -> list[int]:
    total, ends = 0.0, []
    for share in INPUT_LIST_SHARES:
        total += share
        ends.append(round(count * total))
    return ends


def shard_key(shard_id: int, index: int, drawings_per_shard: int) -> str:
    """img2dataset's key: 10^ceil(log10(drawings_per_shard)) * shard + index, zero padded."""
    digits = math.ceil(math.log10(drawings_per_shard))
    return f"{10**digits * shard_id + index:0{digits + NUM_SHARD_DIGITS}d}"


def write_shard(
    folder: Path, plan: ShardPlan, pictures: Iterator[Picture], *, side: int, drawings_per_shard: int
) -> Counter:
    """Write the tar, parquet and stats of one shard, taking one picture a drawing. Returns counts by (artist, status).

    The tar and the parquet are the same bytes on every run (modification times are 0); the stats hold real times.
    """
    start_time = time.time()
    rows = []
    with tarfile.open(folder / f"{plan.name}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
        for index, drawing in enumerate(plan.drawings):
            picture = next(pictures)
            key = shard_key(plan.shard_id, index, drawings_per_shard)
            row = metadata(drawing, picture, key, side)
            rows.append(row)
            if row["status"] == "success":
                add_member(archive, f"{key}.{plan.extension}", picture.encoded)
                add_member(archive, f"{key}.json", json.dumps(row, indent=4).encode())
                add_member(archive, f"{key}.txt", drawing.concept.caption.encode())
    pq.write_table(pa.Table.from_pylist(rows, schema=PARQUET_SCHEMA), folder / f"{plan.name}.parquet")
    write_stats(folder / f"{plan.name}_stats.json", rows, start_time)
    return Counter((row["artist"], row["status"]) for row in rows)


def metadata(drawing: Drawing, picture: Picture, key: str, side: int) -> dict[str, Any]:
    """img2dataset's fields, after the extra columns that its --save_additional_columns would carry along.

    `sha256` is that of the drawing before it was rendered, as img2dataset takes it of the bytes that it downloaded.
    """
    concept = drawing.concept
    drawn = picture.error is None
    return {
        "name": concept.label,
        "base_name": concept.base_label,
        "group": concept.group,
        "subgroup": concept.subgroup,
        "artist": drawing.artist,
        "hexcode": concept.hexcode,
        "caption": concept.caption,
        "url": drawing.address,
        "key": key,
        "status": "success" if drawn else "failed_to_download" if drawing.source is None else "failed_to_resize",
        "error_message": picture.error,
        "width": side if drawn else None,
        "height": side if drawn else None,
        "original_width": picture.original_width if drawn else None,
        "original_height": picture.original_height if drawn else None,
        "exif": "{}" if drawn else None,
        "sha256": hashlib.sha256(drawing.source).hexdigest() if drawn else None,
    }


def add_member(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    member.mode = 0o444
    archive.addfile(member, io.BytesIO(content))


def write_stats(path: Path, rows: list[dict[str, Any]], start_time: float) -> None:
    end_time = time.time()
    statuses = Counter(row["status"] for row in rows)
    reasons = Counter(row["error_message"] or "success" for row in rows)
    stats = {
        "count": len(rows),
        "successes": statuses["success"],
        "failed_to_download": statuses["failed_to_download"],
        "failed_to_resize": statuses["failed_to_resize"],
        "duration": end_time - start_time,
        "start_time": start_time,
        "end_time": end_time,
        "status_dict": dict(reasons),
    }
    path.write_text(json.dumps(stats, indent=4) + "\n", encoding="utf-8")
