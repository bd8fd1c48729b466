"""Phases of a step: what time is booked to which, and what another thread may read meanwhile."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch

from train.supervision.phases import BACKWARD, DATA, FORWARD, OTHER, REDUCE, START, Phases, book_reductions


def test_time_goes_to_the_innermost_phase_and_the_whole_is_the_wall_clock():
    phases = Phases()
    began_s = time.perf_counter()
    phases.begin_step(1)
    with phases(BACKWARD):
        time.sleep(0.02)
        with phases(REDUCE):
            time.sleep(0.05)
    seconds = phases.take()
    wall_s = time.perf_counter() - began_s
    assert 0.02 <= seconds[BACKWARD] < wall_s - 0.05 + 0.001
    assert 0.05 <= seconds[REDUCE] < wall_s - 0.02 + 0.001
    assert sum(seconds.values()) - seconds[START] == pytest.approx(wall_s, abs=0.005)


def test_a_second_take_starts_from_the_first():
    phases = Phases()
    with phases(FORWARD):
        time.sleep(0.02)
    assert phases.take()[FORWARD] >= 0.02
    assert FORWARD not in phases.take()


def test_a_failure_inside_a_phase_leaves_the_outer_one():
    phases = Phases()
    phases.begin_step(3)
    with pytest.raises(RuntimeError), phases(FORWARD):
        raise RuntimeError("planted")
    assert (phases.now.phase, phases.now.step) == (OTHER, 3)


def test_another_thread_reads_phase_step_and_detail_while_it_lasts():
    phases, seen, entered, read = Phases(), [], threading.Event(), threading.Event()

    def watch() -> None:
        entered.wait(5)
        seen.append(phases.now)
        read.set()

    thread = threading.Thread(target=watch)
    thread.start()
    phases.begin_step(7)
    with phases(DATA):
        phases.note("shard.00003.mds")
        entered.set()
        assert read.wait(5)
    thread.join()
    assert (seen[0].phase, seen[0].step, seen[0].detail) == (DATA, 7, "shard.00003.mds")
    assert str(seen[0]).startswith("data_wait of step 7 (shard.00003.mds), for 0.")
    assert phases.now.detail == ""


def test_reductions_inside_and_after_a_backward_pass_are_taken_out_of_it():
    def slow(*_arguments) -> str:
        time.sleep(0.02)
        return "done"

    optimizer = SimpleNamespace(reduce_ipg_grads=slow)
    engine, phases = SimpleNamespace(optimizer=optimizer, allreduce_gradients=slow), Phases()
    book_reductions(engine, phases)
    with phases(BACKWARD):
        assert engine.optimizer.reduce_ipg_grads() == "done"
        assert engine.allreduce_gradients(5) == "done"
    seconds = phases.take()
    assert seconds[REDUCE] >= 0.04
    assert seconds[BACKWARD] < 0.01


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_time_is_that_of_its_kernels_not_of_their_launch():
    device = torch.device("cuda", 0)
    phases, rows = Phases(device), torch.randn(8192, 8192, device=device)
    torch.cuda.synchronize()
    phases.take()
    launch_s = time.perf_counter()
    with phases(FORWARD):
        for _ in range(20):
            rows @ rows
    launch_s = time.perf_counter() - launch_s
    seconds = phases.take()
    # 20 products of 2 * 8192^3 FLOP: no GPU does them faster than 4 PFLOP/s.
    assert seconds[FORWARD] > 20 * 2 * 8192**3 / 4e15
    assert seconds[FORWARD] > launch_s
