"""`python -m kernels.bench`: each operation against its peer and the bare products it needs, in one run."""

import argparse
import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from kernels.bench import contrastive, sigmoid, topk
from kernels.bench.measure import Timing, compare
from kernels.bench.units import matmul_peak_tflops, rates, useful_flop

OPERATIONS = {"contrastive": contrastive, "sigmoid": sigmoid, "topk": topk}
USER_ERROR_EXIT_CODE = 2


def main(arguments: Sequence[str]) -> None:
    options = parser().parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch finds no CUDA device here; use --device cpu")
    if min([options.rounds, options.threads, *options.batch]) < 1:
        raise ValueError("--rounds, --threads and --batch must be at least 1")
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    results = []
    for result in measure_all(options.op or list(OPERATIONS), options.batch, options.rounds, device):
        results.append(result)
        print(table(result), flush=True)
    if device.type == "cuda":
        print(roofline_beside(device))
    report = {"machine": machine(device), "rounds": options.rounds, "threads": options.threads, "results": results}
    if options.out:
        Path(options.out).write_text(json.dumps(report, indent=1) + "\n")
        print(f"written: {options.out}")


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__)
    result.add_argument("--op", action="append", choices=OPERATIONS, help="operation to time, repeatable; default all")
    result.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run (default cpu)")
    result.add_argument(
        "--batch",
        type=int,
        action="append",
        default=[],
        help="rows (topk: base pairs), repeatable; default the full list",
    )
    result.add_argument("--rounds", type=int, default=7, help="times each contender runs, in turn (default 7)")
    result.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads (default all)")
    result.add_argument("--out", help="JSON file for the results")
    return result


def measure_all(
    names: Sequence[str], batches: Sequence[int], rounds: int, device: torch.device
) -> Iterator[dict[str, Any]]:
    """One result a case: operation, description, timings; on a GPU with useful rates beside the measured product
    peak."""
    peaks_tflops: dict[str, float] = {}
    for name in names:
        for description, contenders in OPERATIONS[name].cases(list(batches), device):
            timings = rows(compare(contenders, rounds=rounds, device=device), OPERATIONS[name])
            result = {"operation": name, **description, "timings": timings}
            if device.type == "cuda":
                dtype = description["dtype"]
                if dtype not in peaks_tflops:
                    peaks_tflops[dtype] = matmul_peak_tflops(getattr(torch, dtype), device)
                result["matmul_peak_tflops"] = round(peaks_tflops[dtype], 1)
                flop = useful_flop(name, description)
                for row in timings:
                    row.update(rates(flop, row["median_ms"], peaks_tflops[dtype]))
            yield result


def rows(timings: Sequence[Timing], operation: ModuleType) -> list[dict[str, Any]]:
    """Timings with ratios, of ours to each too; None beside a peer that is not installed."""
    medians = {timing.name: timing.median_ms for timing in timings}
    ours_ms = timings[0].median_ms
    return [
        {
            **dataclasses.asdict(timing),
            "ratio_to_peer": timing.median_ms / medians[operation.PEER] if operation.PEER in medians else None,
            "ratio_to_floor": timing.median_ms / medians[operation.FLOOR],
            "ratio_of_ours": ours_ms / timing.median_ms,
        }
        for timing in timings
    ]


def table(result: dict[str, Any]) -> str:
    description = ", ".join(f"{key} {value}" for key, value in result.items() if key != "timings")
    on_gpu = "matmul_peak_tflops" in result
    head = f"{'':38}{'median ms':>12}{'of peer':>10}{'of floor':>10}{'ours of it':>12}{'extra MiB':>12}"
    lines = [description, head + (f"{'useful TFLOP/s':>16}{'of peak':>9}" if on_gpu else "")]
    for row in result["timings"]:
        memory = "-" if row["peak_extra_mib"] is None else f"{row['peak_extra_mib']:.0f}"
        of_peer = "-" if row["ratio_to_peer"] is None else f"{row['ratio_to_peer']:.2f}"
        ratios = f"{of_peer:>10}{row['ratio_to_floor']:>10.2f}{row['ratio_of_ours']:>12.2f}"
        numbers = f"{row['median_ms']:>12.1f}{ratios}{memory:>12}"
        if on_gpu:
            numbers += f"{row['useful_tflops']:>16.1f}{row['percent_of_matmul_peak']:>8.0f}%"
        lines.append(f"  {row['name']:36}{numbers}")
    return "\n".join(lines)


def roofline_beside(device: torch.device) -> str:
    """The estimates for this GPU's compiled kernels, marked as such."""
    # Triton's parts are loaded where a GPU is.
    from kernels.bench.compiled import read_table
    from kernels.bench.roofline import estimates_table
    from kernels.launch import chip_of

    return estimates_table(read_table(), [chip_of(device)])


def machine(device: torch.device) -> dict[str, Any]:
    """Where and with what the numbers were taken; commit is None outside a git checkout and without git."""
    processor = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        processor = names[0] if names else processor
    return {
        "processor": processor,
        "num_processors": os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
    }


def _commit() -> str | None:
    if shutil.which("git") is None:
        return None
    command = ["git", "describe", "--always", "--dirty"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return run.stdout.strip() or None


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR_EXIT_CODE)
