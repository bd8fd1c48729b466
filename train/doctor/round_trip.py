"""Ranks that meet, add a number up and part: gloo, or NCCL where there are GPUs.

`check` starts this module once for each rank, with what a launcher would say in the environment.
"""

import subprocess
import sys
import time

from train.doctor.finding import Finding, broken, ok
from train.local_ranks import start_ranks, stop_ranks

TIMEOUT_S = 120.0
ROUNDS, FLOATS = 5, 2**20


def check(ranks: int, device: str) -> list[Finding]:
    """`ranks` processes on this machine all-reduce 4 MiB. device: "cpu" or "cuda"."""
    backend = "NCCL" if device == "cuda" else "gloo"
    name = f"{backend} round trip"
    processes = start_ranks(
        ["-m", "train.doctor.round_trip", device], ranks, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline_s = time.monotonic() + TIMEOUT_S
    outputs = []
    try:
        for process in processes:
            outputs.append(process.communicate(timeout=max(1.0, deadline_s - time.monotonic())))
    except subprocess.TimeoutExpired:
        remedy = (
            "export NCCL_DEBUG=INFO and look for the interface"
            if backend == "NCCL"
            else "export GLOO_SOCKET_IFNAME=lo (one node)"
        )
        return [broken(name, f"{ranks} ranks did not meet within {TIMEOUT_S:.0f} s", remedy)]
    finally:
        stop_ranks(processes)
    for rank, (process, (_, errors)) in enumerate(zip(processes, outputs, strict=True)):
        if process.returncode:
            lines = errors.strip().splitlines() or [f"exit code {process.returncode}"]
            return [
                broken(
                    name,
                    f"rank {rank}: {lines[-1]}",
                    "see the rank's whole output with `python -m train.doctor.round_trip` under your launcher",
                )
            ]
    return [ok(name, outputs[0][0].strip().splitlines()[-1])]


def main(device: str) -> None:
    """One rank."""
    import torch

    from train.distributed import connected, sum_of_tensor

    with connected(device, timeout_minutes=TIMEOUT_S / 60) as ranks:
        rows = torch.full((FLOATS,), float(ranks.rank + 1), device=ranks.device)
        expected = ranks.world_size * (ranks.world_size + 1) / 2
        seconds = []
        for _ in range(ROUNDS):
            began_s = time.perf_counter()
            total = sum_of_tensor(rows)[0].item()
            seconds.append(time.perf_counter() - began_s)
            if total != expected:
                raise RuntimeError(f"the sum over {ranks.world_size} ranks is {total}, not {expected}")
        if ranks.is_main:
            print(f"{ranks.world_size} ranks add 4 MiB up in {1000 * min(seconds):.1f} ms")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "auto")
