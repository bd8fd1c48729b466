"""The trainer told to stop through its launcher, and the trainer with a shard that blocks: real runs of the tiny model."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mining.stopping import EXIT_STOPPED, run_stoppable
from tests.ranks import join_group, run_on_ranks
from tests.test_mining_stopping import ends
from tests.tiny_world import ROOT, deepspeed, program_environment, tiny_store, train_here, training_flags
from train.watchdog import EXIT_HANG


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tiny_store(tmp_path_factory.mktemp("world"))


def rows(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def wait_for_step(run: Path, step: int, is_running: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not any(row["step"] >= step for row in rows(run)):
        assert time.monotonic() < deadline
        assert is_running()
        time.sleep(0.02)


@pytest.mark.slow
def test_a_run_whose_launcher_is_told_to_stop_saves_leaves_nobody_behind_and_goes_on(store, tmp_path):
    flags = {"max_steps": 24, "threads": 1, "data__workers": 0}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    launched = subprocess.Popen(
        deepspeed(2, "train/main.py", "pocket-pretrain", *training_flags(store.path, cut, **flags)),
        cwd=ROOT,
        env=program_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for_step(cut, 3, lambda: launched.poll() is None)
    # It dies of that at once and passes nothing on; its launch.py and the ranks are left to themselves.
    launched.send_signal(signal.SIGTERM)
    output = launched.communicate(timeout=60)[0]
    processes = [int(number) for number in re.findall(r"process (\d+) spawned with command", output)]
    assert len(processes) == 2
    assert all(ends(process, 30) for process in processes)
    assert f"exits with return code = {EXIT_STOPPED}" in output
    stopped_at = int(re.search(r"stopped after step (\d+), which is saved", output)[1])
    assert 3 <= stopped_at < 24
    assert [row["step"] for row in rows(cut)] == list(range(1, stopped_at + 1))
    assert [folder.name for folder in (cut / "checkpoints").iterdir()] == [f"step_{stopped_at}"]
    for run in (cut, whole):
        run_on_ranks(train_here, 2, training_flags(store.path, run, **flags), timeout_s=300)
    assert [row["loss"] for row in rows(cut)] == [row["loss"] for row in rows(whole)]


def train_as_program(rank: int, world_size: int, folder: Path, flags: list[str]) -> None:
    sys.stderr = os.fdopen(os.open(folder / f"stderr_{rank}", os.O_WRONLY | os.O_CREAT), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), 2)
    join_group(rank, world_size, folder)
    run_stoppable(lambda _: train_here(rank, world_size, flags), [])


@pytest.mark.slow
def test_a_data_worker_that_blocks_is_reported_with_its_shard_and_ends_the_job(tmp_path):
    store, run = tiny_store(tmp_path / "world", num_hues=12), tmp_path / "run"
    flags = training_flags(store.path, run, max_steps=1000, threads=1, data__workers=1, hang_timeout_s=20)
    context = multiprocessing.get_context("forkserver")
    ranks = [context.Process(target=train_as_program, args=(rank, 2, tmp_path, flags)) for rank in range(2)]
    for process in ranks:
        process.start()
    wait_for_step(run, 2, lambda: all(process.is_alive() for process in ranks))
    # A named pipe that nobody writes to: the next open of this shard does not return.
    shard = store.shard_file(0)
    os.mkfifo(tmp_path / "pipe")
    os.replace(tmp_path / "pipe", shard)
    for process in ranks:
        process.join(90)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    report = (tmp_path / "stderr_0").read_text()
    assert codes == [EXIT_HANG] * 2, report
    assert re.search(rf"rank \d \(process \d+ on .*\) is in data_wait of step \d+ \(worker 0 reads {shard}\)", report)
