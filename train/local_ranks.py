"""Starts a module of this repository as several ranks on this machine: what a launcher does, for programs that start their own."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from train.records.run_manifest import ROOT


def free_port() -> int:
    """A TCP port of this machine that nobody listens on: for ranks to meet at, where a fixed one may be another job's."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_ranks(
    arguments: Sequence[str], num_ranks: int, *, threads: int = 1, **streams: Any
) -> list[subprocess.Popen]:
    """`python ARGUMENTS` once for each rank; streams: stdout and stderr as subprocess.Popen takes them."""
    port = free_port()
    return [_start(arguments, rank, num_ranks, port, threads, streams) for rank in range(num_ranks)]


def _start(
    arguments: Sequence[str], rank: int, num_ranks: int, port: int, threads: int, streams: dict[str, Any]
) -> subprocess.Popen:
    environment = {
        **os.environ,
        **{
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(num_ranks),
            "LOCAL_WORLD_SIZE": str(num_ranks),
        },
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": str(threads)},
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
    }
    command = [sys.executable, *arguments]
    return subprocess.Popen(command, env=environment, text=True, **streams)


def stop_ranks(processes: Sequence[subprocess.Popen]) -> None:
    for process in processes:
        process.kill()
        process.wait()
