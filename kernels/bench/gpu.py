"""`make gpu`, that is `python -m kernels.bench.gpu`: everything that only a GPU can show, in one command.

Checks every kernel against float64, runs compute-sanitizer over the small ones, two NCCL ranks, and the benchmarks, and
writes one JSON. Needs torch, Triton and this repository; no network, no data. Ends with exit code 1 when anything
failed, 2 when it could not start. What was skipped is said, with the reason.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from kernels.bench.checks import SHAPES, Check, Errors, all_checks, long_rows_check

FAILURE_EXIT_CODE = 1
USER_ERROR_EXIT_CODE = 2
SMALL_ROWS = 300
LONG_ROWS_BYTES = 12 << 30
SANITIZER = "compute-sanitizer"
SANITIZER_PLACES = ("/usr/local/cuda/bin", "/opt/cuda/bin")
SANITIZER_SECONDS = 150
# Rows of the losses, base pairs of the top-k.
BENCH_BATCHES, BENCH_PAIRS = (8192, 16384, 32768), (50_000, 500_000)
BENCH_ROUNDS = 5


@dataclass
class Outcome:
    """One step: "passed", "failed" or "skipped" with the reason; errors as {quantity: [error, limit]}."""

    name: str
    status: str
    seconds: float = 0.0
    detail: str = ""
    errors: dict[str, list[float]] = field(default_factory=dict)


def main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    device = _device_of(options)
    deadline = time.monotonic() + options.budget_s
    outcomes = [_shown(run_check(check)) for check in _checks(options, device)]
    results: list[dict[str, Any]] = []
    if not options.checks_only:
        outcomes += map(_shown, _further_steps(options, device, deadline))
        outcome, results = benchmarks(options, device, deadline)
        outcomes.append(_shown(outcome))
    report = {"machine": _machine(device), "backend": options.backend, "outcomes": [asdict(one) for one in outcomes]}
    report["benchmarks"] = results
    report["counts"] = {
        status: sum(one.status == status for one in outcomes) for status in ("passed", "failed", "skipped")
    }
    if options.out:
        Path(options.out).write_text(json.dumps(report, indent=1) + "\n")
        print(f"written: {options.out}")
    print("\n".join(summary(outcomes)))
    return FAILURE_EXIT_CODE if report["counts"]["failed"] else 0


def _parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="python -m kernels.bench.gpu", description=__doc__)
    result.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu is a rehearsal (default cuda)")
    result.add_argument(
        "--backend", choices=("triton", "blockwise"), default="triton", help="what runs (default triton)"
    )
    result.add_argument("--small", action="store_true", help=f"only checks of at most {SMALL_ROWS} rows")
    result.add_argument("--checks-only", action="store_true", help="no sanitizer, ranks or benchmarks")
    result.add_argument("--only", default="", help="only checks whose name holds this text")
    result.add_argument("--budget-s", type=float, default=540.0, help="steps that would start later are skipped")
    result.add_argument("--out", help="JSON file for the results")
    return result


def _device_of(options: argparse.Namespace) -> torch.device:
    """ValueError where the run cannot be: no GPU, or Triton asked for on the CPU without its interpreter."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "make gpu needs a GPU, but torch finds no CUDA device here; rehearse its checks with "
            "--device cpu --backend blockwise --small"
        )
    device = torch.device(options.device)
    if options.backend == "triton":
        # Only who asks for Triton loads it.
        from kernels.launch import require_triton

        require_triton("the checks", device)
    return device


def _checks(options: argparse.Namespace, device: torch.device) -> Iterator[Check]:
    for check in all_checks(device, options.backend, max_rows=SMALL_ROWS if options.small else SHAPES[-1][0]):
        if options.only in check.name:
            yield check


def run_check(check: Check) -> Outcome:
    """Passed when every error is at most its limit; an exception is a failure like any other."""
    return _timed(check.name, check.run)


def _timed(name: str, run: Callable[[], Errors]) -> Outcome:
    started = time.monotonic()
    try:
        errors = run()
    except Exception as error:  # a failure of one step must not hide the others'
        traceback.print_exc()
        return Outcome(name, "failed", time.monotonic() - started, f"{type(error).__name__}: {error}")
    # Written so that NaN, which compares as False, is over every limit.
    over = [f"{key} {value:.2g} > {limit:.2g}" for key, (value, limit) in errors.items() if not value <= limit]
    numbers = {key: [float(value), float(limit)] for key, (value, limit) in errors.items()}
    return Outcome(name, "failed" if over else "passed", time.monotonic() - started, ", ".join(over), numbers)


def _further_steps(options: argparse.Namespace, device: torch.device, deadline: float) -> Iterator[Outcome]:
    for name, step in (
        ("rows beyond 2^31 elements", lambda: long_rows(options, device)),
        (SANITIZER, lambda: sanitizer(options, device)),
        ("two ranks over NCCL", lambda: nccl_ranks(options, device)),
    ):
        if time.monotonic() > deadline:
            yield Outcome(name, "skipped", detail=f"{options.budget_s:.0f} s are used up")
        else:
            yield step()


def long_rows(options: argparse.Namespace, device: torch.device) -> Outcome:
    name = "rows beyond 2^31 elements"
    if device.type != "cuda" or options.backend != "triton":
        return Outcome(name, "skipped", detail="it is about the Triton kernels on a GPU")
    free, _ = torch.cuda.mem_get_info(device)
    if free < LONG_ROWS_BYTES:
        return Outcome(
            name, "skipped", detail=f"needs {LONG_ROWS_BYTES >> 30} GiB of GPU memory, {free >> 30} are free"
        )
    return run_check(long_rows_check(device))


def find_sanitizer() -> str | None:
    return shutil.which(SANITIZER) or shutil.which(SANITIZER, path=os.pathsep.join(SANITIZER_PLACES))


def sanitizer(options: argparse.Namespace, device: torch.device) -> Outcome:
    """memcheck over the small checks, in a process of its own."""
    tool = find_sanitizer()
    if device.type != "cuda":
        return Outcome(SANITIZER, "skipped", detail="there is no GPU code to watch on the CPU")
    if tool is None:
        return Outcome(SANITIZER, "skipped", detail=f"not on PATH nor in {', '.join(SANITIZER_PLACES)}")
    # Calls by which torch asks what the driver can do are answered with errors that mean nothing.
    command = [tool, "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "9"]
    command += [sys.executable, "-m", "kernels.bench.gpu"]
    command += ["--checks-only", "--small", "--only", "B = 257", "--backend", options.backend]
    started = time.monotonic()
    # Freed memory that torch keeps for later would hide accesses beyond the end of a tensor.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=SANITIZER_SECONDS, env=environment
        )
    except subprocess.TimeoutExpired:
        return Outcome(SANITIZER, "failed", SANITIZER_SECONDS, f"not done within {SANITIZER_SECONDS} s")
    seconds = time.monotonic() - started
    if run.returncode == 0:
        return Outcome(SANITIZER, "passed", seconds)
    last = (run.stdout + run.stderr).strip().splitlines()[-8:]
    return Outcome(SANITIZER, "failed", seconds, f"exit code {run.returncode}: " + " | ".join(last))


def nccl_ranks(options: argparse.Namespace, device: torch.device) -> Outcome:
    name = "two ranks over NCCL"
    if device.type != "cuda":
        return Outcome(name, "skipped", detail="NCCL needs GPUs")
    if torch.cuda.device_count() < 2:
        return Outcome(name, "skipped", detail=f"needs two GPUs, {torch.cuda.device_count()} is here")
    # Loads torch.distributed, which nothing else here needs.
    from kernels.bench.ranks import two_ranks

    return _timed(name, lambda: two_ranks("nccl", "cuda", options.backend))


def benchmarks(
    options: argparse.Namespace, device: torch.device, deadline: float
) -> tuple[Outcome, list[dict[str, Any]]]:
    """`python -m kernels.bench --device cuda`, case by case while there is time."""
    if device.type != "cuda":
        return Outcome("benchmarks", "skipped", detail="times of the CPU are python -m kernels.bench"), []
    # Its parts import open_clip's loss where that is installed.
    from kernels.bench.__main__ import OPERATIONS, measure_all, roofline_beside, table

    started, results, left_out = time.monotonic(), [], []
    try:
        for operation in OPERATIONS:
            for batch in BENCH_PAIRS if operation == "topk" else BENCH_BATCHES:
                if time.monotonic() > deadline:
                    left_out.append(f"{operation} {batch}")
                    continue
                for result in measure_all([operation], [batch], BENCH_ROUNDS, device):
                    results.append(result)
                    print(table(result), flush=True)
        print(roofline_beside(device))
    except Exception as error:  # what was measured before is kept
        traceback.print_exc()
        return Outcome("benchmarks", "failed", time.monotonic() - started, f"{type(error).__name__}: {error}"), results
    detail = f"left out, {options.budget_s:.0f} s are used up: {', '.join(left_out)}" if left_out else ""
    status = "passed" if results else "skipped"
    return Outcome("benchmarks", status, time.monotonic() - started, detail), results


def summary(outcomes: Sequence[Outcome]) -> list[str]:
    """Failures, skipped steps with their reasons, and counts."""
    lines = [f"FAILED  {one.name}: {one.detail}" for one in outcomes if one.status == "failed"]
    lines += [f"skipped {one.name}: {one.detail}" for one in outcomes if one.status == "skipped"]
    counts = {status: sum(one.status == status for one in outcomes) for status in ("passed", "failed", "skipped")}
    return [*lines, ", ".join(f"{number} {status}" for status, number in counts.items())]


def _shown(outcome: Outcome) -> Outcome:
    print(f"{outcome.status:8}{outcome.seconds:7.1f} s  {outcome.name}  {outcome.detail}", flush=True)
    return outcome


def _machine(device: torch.device) -> dict[str, Any]:
    # The benchmark program's description, and what the kernels were compiled with and for.
    import triton

    from kernels.bench.__main__ import machine

    found = {**machine(device), "triton": triton.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"num_gpus": torch.cuda.device_count(), "memory_mib": properties.total_memory >> 20}
        found["capability"] = f"{properties.major}.{properties.minor}"
    return found


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR_EXIT_CODE)
