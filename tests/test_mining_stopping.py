"""Programs that are told to stop: real signals to a process, to the launcher above it and to what started that."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mining.backends import BackendChoice
from mining.problem import SearchLimits
from mining.search import search_pairs
from mining.stopping import EXIT_STOPPED
from tests.embeddings import array_bytes, random_store
from tests.tiny_world import ROOT, program, program_environment, python

# Stand-ins for `deepspeed` and its launch.py by name and behaviour: neither passes a signal on, both end with their child's code.
LAUNCHER = """
import subprocess, sys
sys.exit(subprocess.Popen([sys.executable, *sys.argv[1:]]).wait())
"""
RANK = """
import os, pathlib, sys, time
from mining.stopping import run_stoppable

def main(arguments):
    folder = pathlib.Path(arguments[0])
    launcher = os.getppid()
    above = pathlib.Path(f"/proc/{launcher}/stat").read_text().rpartition(")")[2].split()[1]
    (folder / "pids.part").write_text(f"{os.getpid()} {launcher} {above}")
    os.rename(folder / "pids.part", folder / "pids")
    time.sleep(60)

run_stoppable(main)
"""


def start(folder: Path) -> tuple[subprocess.Popen, list[int]]:
    """The chain, and the ids of rank, launcher and runner."""
    (folder / "deepspeed").write_text(LAUNCHER)
    (folder / "deepspeed.launcher.launch").write_text(LAUNCHER)
    (folder / "rank.py").write_text(RANK)
    chain = [str(folder / name) for name in ("deepspeed", "deepspeed.launcher.launch", "rank.py")]
    process = subprocess.Popen(
        [sys.executable, *chain, str(folder)],
        stderr=subprocess.PIPE,
        text=True,
        env=program_environment(PYTHONPATH=str(ROOT)),
    )
    deadline = time.monotonic() + 60
    while not (folder / "pids").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process, [int(number) for number in (folder / "pids").read_text().split()]


def ends(process: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_process_ends_it_at_once_with_the_documented_code(tmp_path, number):
    process, (rank, _, _) = start(tmp_path)
    os.kill(rank, number)
    assert process.wait(10) == EXIT_STOPPED
    assert process.stderr.read().strip() == (f"stopped ({number.name}); what is done is kept, the same command goes on")


@pytest.mark.parametrize(
    ("whom", "number"),
    [(1, signal.SIGKILL), (1, signal.SIGUSR1), (2, signal.SIGTERM), (2, signal.SIGKILL)],
    ids=["launcher killed", "launcher USR1", "runner TERM", "runner killed"],
)
def test_no_rank_outlives_its_launcher_or_what_started_that(tmp_path, whom, number):
    process, pids = start(tmp_path)
    os.kill(pids[whom], number)
    try:
        assert ends(pids[0], 10), "the rank lives on as an orphan"
        assert ends(pids[1], 10), "the launcher lives on as an orphan"
    finally:
        for pid in pids[:2]:
            if not ends(pid, 0.1):
                os.kill(pid, signal.SIGKILL)
    process.wait(10)
    process.stderr.close()


def test_a_rank_whose_output_nobody_reads_any_more_goes_on(tmp_path):
    code = f"""
import pathlib, sys, time
from mining.stopping import run_stoppable

def main(_):
    for number in range(100):
        print("line", number, file=sys.stderr)
        print("line", number)
        time.sleep(0.01)
    pathlib.Path({str(tmp_path / "done")!r}).touch()

run_stoppable(main, [])
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=program_environment(PYTHONPATH=str(ROOT), RANK="0", WORLD_SIZE="2"),
    )
    assert process.stderr.readline() == b"line 0\n"
    process.stderr.close()
    process.stdout.close()
    assert process.wait(30) == 0
    assert (tmp_path / "done").exists()


def test_a_search_that_is_told_to_stop_goes_on_to_the_same_table(tmp_path):
    store = random_store(tmp_path / "embeddings", 3000)
    flags = ["--embeddings", str(store.path), "--k", "4", "--backend", "reference", "--block", "8", "--device", "cpu"]
    search = python("-m", "mining.main", "search", *flags, "--out", str(tmp_path / "stopped"))
    process = subprocess.Popen(search, cwd=ROOT, env=program_environment(), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (blocks := rows_done(tmp_path / "stopped")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == EXIT_STOPPED
    assert "the same command goes on" in process.stderr.read()
    process.stderr.close()
    assert not (tmp_path / "stopped").exists()
    assert blocks <= rows_done(tmp_path / "stopped") < 3000
    program(*search)
    whole = search_pairs(
        store, tmp_path / "whole", SearchLimits(4), choice=BackendChoice(backend="reference", device="cpu")
    )
    assert array_bytes(tmp_path / "stopped") == array_bytes(whole.path)


def rows_done(out: Path) -> int:
    """Rows of an unfinished table that are committed."""
    names = [marker.stem.split("-") for marker in out.parent.glob(f".{out.name}.partial-*/blocks/*-*.json")]
    return sum(int(stop) - int(start) for start, stop in names)
