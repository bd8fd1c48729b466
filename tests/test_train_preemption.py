"""Programs told to stop, by signals to them or to their launchers, and the trainer with a shard that blocks: real runs."""

import importlib
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

import numpy as np
import pytest
import torch

from mining import EmbeddingStore
from mining.manifest import write_manifest
from mining.stopping import EXIT_STOPPED, run_stoppable
from tests.ranks import join_group, run_on_ranks
from tests.test_mining_stopping import ends
from tests.tiny_world import ROOT, deepspeed, program_environment, tiny_store, train_here, training_flags, write_shards
from train.embed import main as embed_program
from train.evaluate.__main__ import main as evaluate_program
from train.models.folder import FORMAT_VERSION, KIND
from train.models.model import ModelConfig, build_model, save_model
from train.supervision.watchdog import EXIT_HANG

NUM_STEPS = 36


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
    flags = {"max_steps": NUM_STEPS, "threads": 1, "data__workers": 0}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    command = deepspeed(2, "train/main.py", "pocket-pretrain", *training_flags(store.path, cut, **flags))
    launched = start(command)
    wait_for_step(cut, 3, lambda: launched.poll() is None)
    # It dies of that at once and passes nothing on; its launch.py and the ranks are left to themselves.
    launched.send_signal(signal.SIGTERM)
    stopped_at = stopped_step(launched, cut, 3, f"exits with return code = {EXIT_STOPPED}")
    assert launched.returncode == -signal.SIGTERM
    launched = start(command)
    wait_for_step(cut, stopped_at + 2, lambda: launched.poll() is None)
    # This one tells its ranks one after the other, each once the one before has left: the first must be enough. What it ends with is
    # written in DeepSpeed's handler, whatever its ranks left with, and slurm/README.md says whom to signal instead.
    os.kill(child_of(launched.pid), signal.SIGTERM)
    stopped_step(launched, cut, stopped_at + 2, "Main process received SIGTERM, exiting")
    assert launched.returncode == 1
    for run in (cut, whole):
        run_on_ranks(train_here, 2, training_flags(store.path, run, **flags), timeout_s=300)
    assert [row["loss"] for row in rows(cut)] == [row["loss"] for row in rows(whole)]


def start(command: list[str]) -> subprocess.Popen:
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=program_environment(), **output)


def child_of(process: int) -> int:
    return int(Path(f"/proc/{process}/task/{process}/children").read_text().split()[0])


def stopped_step(launched: subprocess.Popen, run: Path, first: int, launchers_word: str) -> int:
    """The step after which the ranks have stopped, all of them, with that step saved."""
    output = launched.communicate(timeout=60)[0]
    processes = [int(number) for number in re.findall(r"process (\d+) spawned with command", output)]
    assert len(processes) == 2
    assert all(ends(process, 30) for process in processes)
    assert launchers_word in output
    stopped_at = int(re.search(r"stopped after step (\d+), which is saved", output)[1])
    assert first <= stopped_at < NUM_STEPS
    assert [row["step"] for row in rows(run)] == list(range(1, stopped_at + 1))
    assert f"step_{stopped_at}" in [folder.name for folder in (run / "checkpoints").iterdir()]
    return stopped_at


def run_as_program(module: str, flags: list[str], log: Path) -> None:
    os.environ.update(program_environment())
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    run_stoppable(importlib.import_module(module).main, flags)


def stop_once(module: str, flags: list[str], log: Path, has_begun: Callable[[], bool]) -> None:
    """Run the program, send it SIGTERM as soon as `has_begun`; it leaves with the documented code and word."""
    process = multiprocessing.get_context("forkserver").Process(target=run_as_program, args=(module, flags, log))
    process.start()
    deadline = time.monotonic() + 120
    while not has_begun():
        assert process.is_alive(), log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGTERM)
    process.join(20)
    assert process.exitcode == EXIT_STOPPED, log.read_text()
    assert re.search(r"stopped \(SIGTERM.*\); what is done is kept, the same command goes on", log.read_text())


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    step = tmp_path_factory.mktemp("run") / "checkpoints" / "step_1"
    step.mkdir(parents=True)
    torch.manual_seed(0)
    model, preprocess = build_model(ModelConfig(name="pocket-rn"))
    save_model(step, "pocket-rn", model.state_dict(), preprocess)
    write_manifest(step, KIND, FORMAT_VERSION, files={})
    return step.parent.parent


def test_an_embedding_that_is_told_to_stop_keeps_its_blocks_and_goes_on(store, run_folder, tmp_path):
    flags = ["--checkpoint", run_folder, "--store", store.path, "--device", "cpu", "--threads", 1, "--batch_size", 1]
    flags, out = [str(flag) for flag in flags], tmp_path / "stopped"

    def blocks() -> list[Path]:
        return sorted(tmp_path.glob(".stopped.partial*/blocks/*"))

    stop_once("train.embed", [*flags, "--out", str(out)], tmp_path / "log", lambda: len(blocks()) > 1)
    done = {path: path.stat().st_mtime_ns for path in blocks()}
    assert 2 <= len(done) < len(store)
    assert not out.exists()
    for name in ("stopped", "whole"):
        embed_program([*flags, "--out", str(tmp_path / name)])
    found, expected = (EmbeddingStore.open(tmp_path / name) for name in ("stopped", "whole"))
    for name in ("image_ND", "text_ND", "alignment_N"):
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name


def has_said(log: Path, word: str) -> bool:
    return log.exists() and word in log.read_text(encoding="utf-8")


def test_an_evaluation_that_is_told_to_stop_leaves_no_half_result_and_its_command_gives_the_whole(run_folder, tmp_path):
    write_shards(tmp_path / "shapes", num_hues=60)
    flags = ["--checkpoint", run_folder, "--data", tmp_path / "shapes", "--tasks", "retrieval", "--batch-size", 1]
    flags = [str(flag) for flag in (*flags, "--device", "cpu", "--num-workers", 1)]
    log, results = tmp_path / "log", {name: tmp_path / name / "shapes.json" for name in ("stopped", "whole")}
    stop_once(
        "train.evaluate.__main__", [*flags, "--out", str(results["stopped"])], log, lambda: has_said(log, "shapes:")
    )
    assert not list(tmp_path.glob("stopped/*"))
    for out in results.values():
        evaluate_program([*flags, "--out", str(out)])
    found, expected = (json.loads(out.read_text(encoding="utf-8"))["metrics"] for out in results.values())
    assert found == expected
    assert found["retrieval/txt/image_to_text_r1"]["count"] == 240


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
