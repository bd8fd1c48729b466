"""Tar shards for tests, written as img2dataset writes them, and the ingest program called in this process."""

import io
import json
import random
import tarfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from mining.command_line import run
from train.data.pair_store import PairStore
from train.ingest.__main__ import main

Member = tuple[str, bytes]
# Unequal on purpose: ids that follow arrival order or a constant shard size would not survive.
SHARD_SIZES = [13, 1, 30, 0, 6]


def image_bytes(seed: int, image_format: str = "JPEG", size: tuple[int, int] = (24, 16)) -> bytes:
    """A noise image, another one for every seed."""
    buffer = io.BytesIO()
    pixels = random.Random(seed).randbytes(size[0] * size[1] * 3)
    Image.frombytes("RGB", size, pixels).save(buffer, image_format)
    return buffer.getvalue()


def sample(
    key: str, caption: str | bytes = "a caption", image: bytes | None = None, extension: str = "jpg"
) -> list[Member]:
    """The members of one sample: image, caption, json."""
    image = image_bytes(hash_of(key)) if image is None else image
    caption = caption.encode() if isinstance(caption, str) else caption
    return [(f"{key}.{extension}", image), (f"{key}.txt", caption), (f"{key}.json", json.dumps({"key": key}).encode())]


def hash_of(text: str) -> int:
    return int.from_bytes(text.encode(), "little")


def samples(keys: Iterable[str]) -> list[Member]:
    return [member for key in keys for member in sample(key, f"the picture {key}")]


def write_tar(path: Path, members: Sequence[Member], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def ingest(shards: str | Path | Sequence[str | Path], out: Path, *flags: str) -> PairStore:
    """Run `python -m train.ingest` without the process; returns the store."""
    patterns = [shards] if isinstance(shards, str | Path) else shards
    main(["--shards", *map(str, patterns), "--out", str(out), "--workers", "1", *flags])
    return PairStore.open(out)


def ingest_part(shards: str | Path | Sequence[str | Path], out: Path, part: str, *flags: str) -> None:
    """The same with `--part`: `out` is no store afterwards."""
    patterns = [shards] if isinstance(shards, str | Path) else shards
    main(["--shards", *map(str, patterns), "--out", str(out), "--workers", "1", "--part", part, *flags])


def merge(out: Path, *flags: str) -> PairStore:
    main(["--out", str(out), "--workers", "2", "--merge", *flags])
    return PairStore.open(out)


def wait_until(condition: Callable[[], Any], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def rejected(out: Path) -> list[tuple[str, str, str]]:
    return [(row["shard"], row["key"], row["reason"]) for row in pq.read_table(out / "rejected.parquet").to_pylist()]


def write_shards(folder: Path, *, shuffled: bool = False) -> list[Path]:
    """Shards 00000.tar ..; keys as img2dataset gives them."""
    paths = []
    for shard, size in enumerate(SHARD_SIZES):
        members = samples(f"{shard:05d}{number:04d}" for number in range(size))
        if shuffled:
            random.Random(shard).shuffle(members)
        paths.append(write_tar(folder / f"{shard:05d}.tar", members))
    return paths


def store_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of a store but the note of where it came from."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "ingest.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def fails_with(capsys, *arguments: str) -> str:
    """Run the program as a user does; returns its one line on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        run(main, list(arguments))
    assert caught.value.code == 2
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").split("\n") if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]
