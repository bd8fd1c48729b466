"""Commits in the background: a kill in the middle of one, errors of the disk in it, what is under way and its order."""

import os
import signal
import subprocess
import sys
import threading

import pytest

import train.ingest.commits as commits
from mining.manifest import commit_folder
from tests.tar_shards import fails_with, ingest, store_bytes, wait_until, write_shards
from train.ingest.commits import AHEAD_PER_THREAD, Commits
from train.ingest.worker import Written

# The program, whose commit of shard 2 holds before a sync, and that of shard 4 between its syncs and its rename.
HELD_COMMITS = """
import os, sys, time
from pathlib import Path
from train.ingest.__main__ import main

fsync, replace = os.fsync, os.replace

def held_fsync(descriptor):
    name = os.readlink(f"/proc/self/fd/{descriptor}")
    if "/.00002." in name and name.endswith("rows.parquet"):
        hold("sync")
    fsync(descriptor)

def held_replace(source, target):
    if Path(target).name == "00004":
        hold("rename")
    replace(source, target)

def hold(name):
    (Path(sys.argv[1]) / name).touch()
    time.sleep(1000)

if __name__ == "__main__":
    os.fsync, os.replace = held_fsync, held_replace
    main(sys.argv[2:])
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder)
    return folder


@pytest.fixture(scope="module")
def reference(shards, tmp_path_factory):
    return ingest(shards / "*.tar", tmp_path_factory.mktemp("reference") / "store").path


@pytest.mark.slow
def test_commits_under_way_at_a_kill_are_done_again_and_give_the_same_store(shards, reference, tmp_path):
    """SIGKILL while one fragment is half synced and another is synced but has not got its name."""
    out = tmp_path / "store"
    (tmp_path / "held").mkdir()
    (tmp_path / "program.py").write_text(HELD_COMMITS)
    flags = ["--shards", str(shards / "*.tar"), "--out", str(out), "--workers", "3"]
    command = [sys.executable, str(tmp_path / "program.py"), str(tmp_path / "held"), *flags]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment)
    try:
        wait_until(lambda: sorted(path.name for path in (tmp_path / "held").iterdir()) == ["rename", "sync"], 120)
        wait_until(lambda: all((out / f"shards/{number:05d}").is_dir() for number in (0, 1, 3)), 20)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    present = {path.name for path in (out / "shards").iterdir()}
    assert {name for name in present if name.isdigit()} == {"00000", "00001", "00003"}
    whole = [out / "shards" / name / "manifest.json" for name in present if name.startswith((".00002.", ".00004."))]
    assert len(whole) == 2
    assert all(path.is_file() for path in whole)
    finished = {path: path.stat().st_ino for path in out.rglob("*.mds") if path.parent.name.isdigit()}
    ingest(shards / "*.tar", out, "--workers", "2")
    # A shard that is done again would lie in a new file; ids are filled into the old one.
    assert {path: path.stat().st_ino for path in finished} == finished
    assert store_bytes(out) == store_bytes(reference)


def test_full_disk_in_a_commit_gives_one_line_and_the_rerun_goes_on(shards, reference, tmp_path, capsys, monkeypatch):
    def full(temporary, folder):
        if folder.name == "00002":
            raise OSError(28, "No space left on device", str(folder))
        commit_folder(temporary, folder)

    monkeypatch.setattr(commits, "commit_folder", full)
    flags = ["--shards", str(shards / "*.tar"), "--out", str(tmp_path / "store"), "--workers", "1"]
    line = fails_with(capsys, *flags)
    assert f"No space left on device: '{tmp_path}/store/shards/00002'" in line
    assert "then run the same command again" in line
    monkeypatch.undo()
    assert store_bytes(ingest(shards / "*.tar", tmp_path / "store").path) == store_bytes(reference)


def written(tmp_path, name):
    (tmp_path / f".{name}").mkdir()
    (tmp_path / f".{name}" / "file").write_text(name)
    return Written(tmp_path / f".{name}", tmp_path / name)


def test_commits_under_way_are_bounded_and_the_end_waits_for_all(tmp_path, monkeypatch):
    gate, started, done = threading.Event(), [], []

    def gated(temporary, folder):
        started.append(folder.name)
        assert gate.wait(20)
        commit_folder(temporary, folder)

    monkeypatch.setattr(commits, "commit_folder", gated)
    limit = AHEAD_PER_THREAD * 2
    with Commits(2, lambda: done.append(1)) as committing:
        for number in range(limit):
            committing.add(written(tmp_path, str(number)))
        # Nothing has ended, and nobody has waited.
        assert not done
        threading.Timer(0.2, gate.set).start()
        committing.add(written(tmp_path, str(limit)))
        assert gate.is_set()
        assert done
    assert len(done) == limit + 1
    assert sorted(started) == sorted(path.name for path in tmp_path.iterdir()) == [str(n) for n in range(limit + 1)]


def test_the_first_error_in_the_order_of_adding_is_the_one_that_is_raised(tmp_path, monkeypatch):
    second_failed = threading.Event()

    def fail(temporary, folder):
        if folder.name == "first":
            assert second_failed.wait(20)
        if folder.name == "second":
            second_failed.set()
        raise OSError(5, "Input/output error", folder.name)

    monkeypatch.setattr(commits, "commit_folder", fail)

    def commit_two():
        with Commits(2, lambda: None) as committing:
            committing.add(written(tmp_path, "first"))
            committing.add(written(tmp_path, "second"))

    with pytest.raises(OSError, match="first"):
        commit_two()


def test_what_is_written_is_committed_although_a_later_shard_fails(tmp_path):
    def fail_after_one():
        with Commits(1, lambda: None) as committing:
            committing.add(written(tmp_path, "whole"))
            raise ValueError("unreadable")

    with pytest.raises(ValueError, match="unreadable"):
        fail_after_one()
    assert (tmp_path / "whole" / "file").read_text() == "whole"
