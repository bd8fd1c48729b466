"""A thousand shards: memory that does not grow with them, SIGKILL in the middle, parts against one ingest."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import train.ingest.finish as finish
from tests.tar_shards import ingest, ingest_part, merge, samples, store_bytes, wait_until, write_tar
from train.ingest.worker import ROWS_PER_GROUP, ROWS_SCHEMA, RowFile

NUM_SHARDS = 1000
PAIRS_PER_SHARD = 3
MIB = 1 << 20


@pytest.fixture(scope="module")
def thousand(tmp_path_factory):
    """1,000 tars as img2dataset writes them."""
    folder = tmp_path_factory.mktemp("thousand")
    for shard in range(NUM_SHARDS):
        write_tar(folder / f"{shard:05d}.tar", samples(f"{shard:05d}{number:04d}" for number in range(PAIRS_PER_SHARD)))
    yield folder
    shutil.rmtree(folder)


@contextmanager
def peak_memory_mib():
    """Peak of anonymous memory of this process ("main") and of its descendants ("worker", the largest), by sampling."""
    peaks = {"main": 0.0, "worker": 0.0}
    over = threading.Event()

    def sample():
        while not over.wait(0.02):
            for pid in descendants(os.getpid()):
                role = "main" if pid == os.getpid() else "worker"
                peaks[role] = max(peaks[role], anonymous_mib(pid))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield peaks
    finally:
        over.set()
        thread.join()


def descendants(pid: int) -> list[int]:
    try:
        below = [
            int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()
        ]
    except OSError:
        return [pid]
    return [pid, *(descendant for child in below for descendant in descendants(child))]


def anonymous_mib(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon")), 0.0)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_shards_and_a_killed_part_costs_nothing(thousand, tmp_path):
    """One test, since a thousand shards take a while: ten times the shards, then the same as two parts, one of them killed."""
    ingest(thousand / "000*.tar", tmp_path / "warm", "--workers", "2")
    with peak_memory_mib() as hundred_shards:
        ingest(thousand / "000*.tar", tmp_path / "hundred", "--workers", "2")
    with peak_memory_mib() as thousand_shards:
        single = ingest(thousand / "*.tar", tmp_path / "single", "--workers", "2")
    # Ten times the shards and pairs; a list of futures, tables or manifests would be 15 MiB and more.
    assert thousand_shards["main"] < hundred_shards["main"] + 32
    assert thousand_shards["worker"] < hundred_shards["worker"] + 16
    expected = [f"{shard:05d}{number:04d}" for shard in range(NUM_SHARDS) for number in range(PAIRS_PER_SHARD)]
    assert single.ledger["key"].to_pylist() == expected

    out = tmp_path / "parts"
    command = [sys.executable, "-m", "train.ingest", "--shards", str(thousand / "*.tar"), "--out", str(out)]
    process = subprocess.Popen([*command, "--part", "0/2", "--workers", "2"], stderr=subprocess.DEVNULL)
    wait_until(lambda: len(list(out.glob("shards/[0-9]*"))) >= 100, 120)
    process.send_signal(signal.SIGKILL)
    process.wait()
    # Workers end by themselves; until then they may finish the shard that they hold.
    time.sleep(1)
    finished = {path: path.stat().st_ino for path in out.rglob("shards/[0-9]*/*.mds")}
    assert 100 <= len(finished) < NUM_SHARDS // 2
    ingest_part(thousand / "*.tar", out, "1/2", "--workers", "2")
    ingest_part(thousand / "*.tar", out, "0/2", "--workers", "2")
    assert {path: path.stat().st_ino for path in finished} == finished
    assert store_bytes(merge(out).path) == store_bytes(single.path)
    assert (out / "ingest.json").read_bytes() == (single.path / "ingest.json").read_bytes()


def test_rows_of_one_huge_shard_are_not_held_in_memory(tmp_path):
    row = ("k" * 12, "00000.tar", "a" * 64, "b" * 64, 640, 480, 7)
    peaks = []
    for num_groups in (1, 6):
        tracemalloc.start()
        try:
            with RowFile(tmp_path / "rows.parquet", ROWS_SCHEMA) as rows:
                for number in range(num_groups * ROWS_PER_GROUP):
                    rows.append((str(number), *row[1:]))
            peaks.append(tracemalloc.get_traced_memory()[1] / MIB)
        finally:
            tracemalloc.stop()
        assert pq.read_metadata(tmp_path / "rows.parquet").num_rows == num_groups * ROWS_PER_GROUP
    assert peaks[1] < 1.2 * peaks[0] + 1


def test_ledger_is_written_in_groups_of_one_size_with_one_group_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(finish, "ROWS_PER_GROUP", 1000)
    schema = pa.schema([("pair_id", pa.int64()), ("key", pa.string())])
    sizes = [0, 1, 7, 999, 2500, 1000, 3, 0] * 40
    baseline, peak, start = pa.total_allocated_bytes(), 0, 0
    with finish.GroupedWriter(tmp_path / "ledger.parquet", schema) as writer:
        for size in sizes:
            ids = np.arange(start, start + size)
            writer.write(pa.table({"pair_id": ids, "key": [f"{number:060d}" for number in ids]}, schema=schema))
            peak = max(peak, pa.total_allocated_bytes() - baseline)
            start += size
    file = pq.ParquetFile(tmp_path / "ledger.parquet")
    groups = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    assert file.read()["pair_id"].to_pylist() == list(range(sum(sizes)))
    assert groups[:-1] == [1000] * (len(groups) - 1)
    # 180,400 rows of 76 bytes are 13 MiB; what is held is a group, the largest table and their sum.
    assert peak < 2 * MIB


def test_memory_of_the_offsets_of_a_tar_is_as_documented(tmp_path):
    """About 1 KiB a key, whatever the pictures weigh."""
    from train.ingest.tar_index import index_tar

    num_keys = 3000
    members = [(f"{number:09d}.{ending}", b"") for number in range(num_keys) for ending in ("jpg", "json", "txt")]
    tar = write_tar(tmp_path / "0.tar", members)
    with open(tar, "rb") as file:
        tracemalloc.start()
        try:
            index = index_tar(file)
            size = tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
    assert len(index.members) == num_keys
    assert size / num_keys < 1200
