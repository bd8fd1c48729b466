"""What a checkpoint costs a run: how long training stands still for the snapshot, and what the writing beside it adds to the steps.

In: our contender and batches in memory. Out: milliseconds, on every rank the slowest rank's.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

from train.checkpoints.checkpoint import CheckpointSaver, rank_file, step_folder
from train.distributed import Ranks, barrier, max_over_ranks
from train.engine import Engine
from train.models.clip_library import PreprocessCfg


def measure_checkpoints(
    engine: Engine,
    steps: Callable[[int], object],
    *,
    model_name: str,
    preprocess: PreprocessCfg,
    ranks: Ranks,
    folder: Path,
    steps_a_round: int,
    rounds: int,
) -> dict[str, float]:
    """Medians over rounds, ms. `steps(n)` takes n training steps. Collective: every rank calls.

    step_ms: a step while nothing is written; stall_ms: the call that copies the state to host memory; write_ms: from then until the
    checkpoint is complete on disk, training standing still; added_ms: what a round of steps right behind a save takes longer than one
    without; state_mib: this checkpoint's size.
    """
    saver = CheckpointSaver(folder, engine, ranks, model_name=model_name, preprocess=preprocess, recipe="bench", keep=1)
    taken: dict[str, list[float]] = {"step_ms": [], "stall_ms": [], "write_ms": [], "added_ms": []}
    for number in range(2 * rounds + 1):
        alone_ms = _milliseconds(lambda: steps(steps_a_round))
        began = time.perf_counter()
        saver.save(number + 1)
        stall_ms = max_over_ranks(1000 * (time.perf_counter() - began))
        if number % 2:
            beside_ms = _milliseconds(lambda: steps(steps_a_round))
            saver.wait()
            taken["added_ms"].append(beside_ms - alone_ms)
        else:
            taken["write_ms"].append(_milliseconds(saver.wait))
        taken["stall_ms"].append(stall_ms)
        taken["step_ms"].append(alone_ms / steps_a_round)
    # The first save makes the host's buffers, and the first steps warm up.
    found = {name: statistics.median(some if name == "added_ms" else some[1:]) for name, some in taken.items()}
    last = step_folder(folder, 2 * rounds + 1)
    state = sum((last / rank_file(rank)).stat().st_size for rank in range(ranks.world_size))
    return {**found, "stall_steps": found["stall_ms"] / found["step_ms"], "state_mib": state / 2**20}


def _milliseconds(work: Callable[[], object]) -> float:
    """Until all ranks are done. Collective: every rank calls."""
    barrier()
    began = time.perf_counter()
    work()
    barrier()
    return 1000 * (time.perf_counter() - began)
