"""Ranks that stop together, fail with the first reason, and end when one hangs: real processes, real signals, a loop of all-reduces."""

import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch

from mining.stopping import EXIT_STOPPED, hearing_stop, run_stoppable
from tests.ranks import join_group
from train.data.reading import ReadingNotes
from train.distributed import Ranks, connected, sum_over_ranks
from train.loop import timed
from train.supervision.phases import BACKWARD, DATA, FORWARD, Phases
from train.supervision.supervisor import Stopped, supervised
from train.supervision.watchdog import EXIT_HANG, Place, hang_report

STEPS = 400


def loop(rank: int, world_size: int, folder: Path, fault: str, hang_timeout_s: float) -> None:
    """Steps of 10 ms that end in a collective. `fault` is what rank 1 does in step 30."""
    sys.stderr = os.fdopen(os.open(folder / f"stderr_{rank}", os.O_WRONLY | os.O_CREAT), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), 2)
    join_group(rank, world_size, folder)
    os.environ["RANK"] = str(rank)
    run_stoppable(
        lambda _: steps(Ranks(rank, world_size, rank, torch.device("cpu")), folder, fault, hang_timeout_s), []
    )


def steps(ranks: Ranks, folder: Path, fault: str, hang_timeout_s: float) -> None:
    phases = Phases()
    with supervised(ranks, phases, hang_timeout_s, saves=fault != "saves nothing") as supervisor:
        notes = ReadingNotes(1)
        supervisor.reading = notes.now
        for step in range(1, STEPS + 1):
            phases.begin_step(step)
            if step == 30 and ranks.rank == 1:
                do(fault, phases, notes)
            with phases(FORWARD):
                time.sleep(0.01 * (1 + ranks.rank))
            with phases(BACKWARD):
                sum_over_ranks(float(step))
            (folder / f"step_{ranks.rank}").write_text(str(step))
            if step < STEPS and supervisor.stops_after(step):
                (folder / f"stopped_{ranks.rank}").write_text(f"{step} {supervisor.reason}")
                raise Stopped


def do(fault: str, phases: Phases, notes: ReadingNotes) -> None:
    if fault == "error":
        raise RuntimeError("planted, on one rank")
    if fault == "mistake":
        raise ValueError("shard 7 is damaged, on one rank")
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if fault == "blocked":
        with phases(DATA):
            notes.note("data/00007.tar")
            time.sleep(60)


class Job:
    """`world_size` processes that run `loop`."""

    def __init__(self, folder: Path, fault: str = "", world_size: int = 3, hang_timeout_s: float = 60.0) -> None:
        self.folder = folder
        context = multiprocessing.get_context("forkserver")
        self.processes = [
            context.Process(target=loop, args=(rank, world_size, folder, fault, hang_timeout_s))
            for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + 60
        while not all(self.step(rank) >= step for rank in range(len(self.processes))):
            assert time.monotonic() < deadline, self.errors()
            time.sleep(0.01)

    def step(self, rank: int) -> int:
        path = self.folder / f"step_{rank}"
        return int(path.read_text() or 0) if path.exists() else 0

    def exit_codes(self, seconds: float = 60.0) -> list[int]:
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
            process.join()
        assert None not in codes, f"still running: {codes}\n{self.errors()}"
        return codes

    def errors(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("stderr_*")))


@pytest.mark.parametrize(("number", "rank"), [(signal.SIGTERM, 2), (signal.SIGUSR1, 0)])
def test_a_signal_to_any_rank_stops_all_after_the_same_step(tmp_path, number, rank):
    job = Job(tmp_path)
    job.wait_for_step(5)
    before = max(job.step(each) for each in range(3))
    os.kill(job.processes[rank].pid, number)
    # What a launcher does: it signals the others as well, in its own time.
    os.kill(job.processes[1].pid, signal.SIGTERM)
    assert job.exit_codes() == [EXIT_STOPPED] * 3
    stopped = {(tmp_path / f"stopped_{each}").read_text() for each in range(3)}
    assert len(stopped) == 1, stopped
    step, reason = stopped.pop().split(" ", 1)
    assert before <= int(step) < STEPS
    assert any(f"at rank {each} (process {job.processes[each].pid}" in reason for each in (rank, 1))
    assert job.errors().strip() == ""


def test_stopping_costs_at_most_the_step_that_was_begun(tmp_path):
    job = Job(tmp_path, world_size=2)
    job.wait_for_step(5)
    seen = [job.step(0), job.step(1)]
    os.kill(job.processes[1].pid, signal.SIGTERM)
    job.exit_codes()
    # Between the look and the signal lie a few steps of 20 ms, on a busy machine.
    assert int((tmp_path / "stopped_0").read_text().split()[0]) <= max(seen) + 20


def test_ranks_that_save_nothing_leave_at_once_with_the_same_code(tmp_path):
    job = Job(tmp_path, "saves nothing", world_size=2)
    job.wait_for_step(3)
    os.kill(job.processes[1].pid, signal.SIGUSR1)
    assert job.exit_codes(30) == [EXIT_STOPPED] * 2
    assert job.errors().count("stopped (SIGUSR1 at rank 1 (process ") == 1


def test_data_that_end_early_on_one_rank_are_an_error_there():
    batches = timed(iter(["first", "second"]), Phases(), 1, 3)
    assert [next(batches), next(batches)] == ["first", "second"]
    with pytest.raises(RuntimeError, match="the data of this rank end before step 3, the run has 3"):
        next(batches)
    assert list(timed(iter(["first", "second"]), Phases(), 1, 2)) == ["first", "second"]


@pytest.mark.parametrize(
    ("fault", "codes", "said"),
    [
        ("error", {1}, "rank 1 failed in other of step 30: RuntimeError: planted, on one rank"),
        ("mistake", {2}, "error (rank 1): shard 7 is damaged, on one rank"),
        ("killed", {1, -signal.SIGKILL}, "is gone without a word, last seen in "),
    ],
)
def test_a_rank_that_fails_takes_all_down_and_its_reason_is_all_that_is_said(tmp_path, fault, codes, said):
    job = Job(tmp_path, fault)
    began = time.monotonic()
    assert set(job.exit_codes(30)) == codes
    assert time.monotonic() - began < 30
    lines = [line for line in job.errors().splitlines() if line.strip()]
    assert said in lines[0], lines
    assert "gloo" not in job.errors()
    # The failing rank's own traceback follows, where it is no mistake of the user's; nobody else says anything.
    assert job.errors().count("Traceback") == (fault == "error")
    assert len(lines) == 1 or fault == "error", lines


def test_a_stopped_process_is_named_by_the_watchdog_and_ended(tmp_path):
    job = Job(tmp_path, "stopped", hang_timeout_s=2.0)
    assert job.exit_codes(40) == [EXIT_HANG, -signal.SIGKILL, EXIT_HANG]
    report = (tmp_path / "stderr_0").read_text().split("hang: no progress for ")[1].splitlines()
    assert f"rank 1 (process {job.processes[1].pid} on " in report[1]
    assert "has given no sign of life" in report[1]
    assert "of step " in report[1]
    assert "waiting for it: 2 ranks in backward of step 30" in report[2]


def test_the_shard_that_a_blocked_rank_reads_is_named(tmp_path):
    job = Job(tmp_path, "blocked", hang_timeout_s=2.0, world_size=2)
    assert job.exit_codes(40) == [EXIT_HANG] * 2
    report = (tmp_path / "stderr_0").read_text()
    assert "is in data_wait of step 30 (worker 0 reads data/00007.tar) for " in report
    assert "waiting for it: 1 rank in backward of step 30" in report


def test_a_stopped_rank_0_is_noticed_by_the_others(tmp_path):
    job = Job(tmp_path, world_size=2, hang_timeout_s=2.0)
    job.wait_for_step(5)
    os.kill(job.processes[0].pid, signal.SIGSTOP)
    job.processes[1].join(40)
    assert job.processes[1].exitcode == EXIT_HANG
    job.processes[0].kill()
    assert "rank 0 has given no sign of life" in (tmp_path / "stderr_1").read_text()


def test_a_killed_rank_0_is_named_by_another(tmp_path):
    job = Job(tmp_path, world_size=2)
    job.wait_for_step(5)
    os.kill(job.processes[0].pid, signal.SIGKILL)
    assert job.exit_codes(30) == [-signal.SIGKILL, 1]
    assert (tmp_path / "stderr_1").read_text().strip().startswith("rank 0 is gone without a word")


def test_a_start_may_take_longer_than_the_timeout_and_silence_may_not():
    starting = Place("start", 0, for_s=100.0)
    assert hang_report({"rank 0": (starting, 0.1), "rank 1": (starting, 0.1)}, 10.0) is None
    report = hang_report({"rank 0": (starting, 0.1), "rank 1": (None, 11.0)}, 10.0)
    assert report is not None
    assert report.silent == ["rank 1"]
    assert "rank 1 has given no sign of life for 11 s" in report.text


def test_of_many_waiting_ranks_only_those_behind_are_named():
    places = {f"rank {n}": (Place("reduce", 9, 50.0), 0.5) for n in range(1, 16)}
    places["rank 0"] = (Place("forward", 8, 55.0, detail="chunk 3"), 0.2)
    report = hang_report(places, 30.0)
    assert report.text.splitlines()[1:] == [
        "  rank 0 is in forward of step 8 (chunk 3) for 55 s",
        "  waiting for it: 15 ranks in reduce of step 9",
    ]


def test_a_rank_may_wait_for_others_that_move_on():
    places = {"rank 0": (Place("other", 40, 500.0), 0.5), "rank 1": (Place("forward", 12, 2.0), 0.5)}
    assert hang_report(places, 30.0) is None
    places["rank 1"] = (Place("forward", 12, 31.0), 0.5)
    assert hang_report(places, 30.0).text.splitlines()[1] == "  rank 1 is in forward of step 12 for 32 s"


def test_a_single_process_stops_as_well_and_heeds_no_stranger():
    with connected("cpu") as ranks, supervised(ranks, Phases(), 60.0) as supervisor:
        assert not supervisor.stops_after(0)
        for words in (b"GET / HTTP/1.0\r\n\r\n", b'{"kind": "stop", "reason": "a stranger"}\n', b"[1]\n"):
            with socket.create_connection(supervisor.line.socket.getpeername()) as stranger:
                stranger.settimeout(20)
                stranger.sendall(words)
                assert stranger.recv(1) == b""
        assert not supervisor.stops_after(1)
        os.kill(os.getpid(), signal.SIGTERM)
        step, deadline = 2, time.monotonic() + 20
        while not supervisor.stops_after(step):
            assert time.monotonic() < deadline
            step += 1
        assert supervisor.reason.startswith("SIGTERM at rank 0 (process ")


def told(reasons: list[str]) -> None:
    with hearing_stop(reasons.append):
        os.kill(os.getpid(), signal.SIGUSR1)
        deadline = time.monotonic() + 10
        while not reasons and time.monotonic() < deadline:
            time.sleep(0.01)


def test_a_signal_is_heard_inside_and_handlers_are_put_back():
    before, reasons = signal.getsignal(signal.SIGUSR1), []
    told(reasons)
    assert reasons == ["SIGUSR1"]
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_forked_data_worker_does_not_hear_what_is_meant_for_its_rank():
    reasons = []
    with hearing_stop(reasons.append):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
        child.start()
        time.sleep(0.2)
        os.kill(child.pid, signal.SIGTERM)
        child.join(0.5)
        assert child.is_alive()
        child.kill()
        child.join()
    assert reasons == []
