"""Runs a function on several ranks, each a fresh process with a gloo process group, and returns what each rank
returned.

In: a module-level function(rank, world_size, *args). Out: the list of results in rank order. A rank that fails takes
all ranks down, and its traceback is in the error.
"""

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any


def run_on_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120.0, backend: str = "gloo"
) -> list[Any]:
    """Call `function(rank, world_size, *args)` in `world_size` fresh processes of one process group.

    `function` and `args` must be picklable, `function` at the top level of its module, its result picklable too. Raises
    RuntimeError with the failing rank's traceback, TimeoutError after `timeout_s` seconds.
    """
    # Forked from a server that has imported torch and run nothing (tests/conftest.py): fresh processes without the imports.
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory(prefix="hardpair_ranks_") as folder:
        processes = [
            context.Process(
                target=_run_rank, args=(function, rank, world_size, args, folder, timeout_s, backend, dict(os.environ))
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            _wait(processes, Path(folder), time.monotonic() + timeout_s)
        finally:
            for process in processes:
                process.kill()
                process.join()
        return [pickle.loads((Path(folder) / f"result_{rank}").read_bytes()) for rank in range(world_size)]


def _run_rank(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    args: Sequence[Any],
    folder: str,
    timeout_s: float,
    backend: str,
    environment: dict[str, str],
) -> None:
    import torch.distributed

    # The server's environment is that of the first call; this call's counts.
    os.environ.clear()
    os.environ.update(environment)
    try:
        join_group(rank, world_size, folder, timeout_s, backend)
        result = pickle.dumps(function(rank, world_size, *args))
    except Exception:
        # Only passed on: the parent shows the text, and learns of the failure by the exit code that raising gives.
        (Path(folder) / f"failure_{rank}").write_text(traceback.format_exc())
        raise
    (Path(folder) / f"result_{rank}").write_bytes(result)
    # The group goes away only when every rank is done with it.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def join_group(rank: int, world_size: int, folder: str | Path, timeout_s: float = 120.0, backend: str = "gloo") -> None:
    """Make this process a rank of the group that meets in `folder`."""
    import torch
    import torch.distributed

    # Several ranks share the test machine's few cores.
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        backend,
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )


def _wait(processes: Sequence[Any], folder: Path, deadline: float) -> None:
    while any(process.is_alive() for process in processes):
        if any(process.exitcode not in (None, 0) for process in processes):
            break
        if time.monotonic() > deadline:
            raise TimeoutError(f"ranks still running: {[r for r, p in enumerate(processes) if p.is_alive()]}")
        time.sleep(0.02)
    failed = [rank for rank, process in enumerate(processes) if process.exitcode not in (None, 0)]
    if failed:
        raise RuntimeError(f"rank {failed[0]} failed:\n{_failures(folder)}")


def _failures(folder: Path) -> str:
    texts = [f"[{path.name}] {path.read_text()}" for path in sorted(folder.glob("failure_*"))]
    return "\n".join(texts) or "no traceback: the process was killed or exited by itself"
