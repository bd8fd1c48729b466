"""`python -m kernels.bench`: each operation against its peer and the bare products it needs, in one run."""

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from kernels.bench import contrastive, topk
from kernels.bench.measure import Timing, compare

OPERATIONS = {"contrastive": contrastive, "topk": topk}
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
    for name in options.op or list(OPERATIONS):
        operation = OPERATIONS[name]
        for description, contenders in operation.cases(options.batch, device):
            timings = compare(contenders, rounds=options.rounds, device=device)
            results.append({"operation": name, **description, "timings": rows(timings, operation)})
            print(table(results[-1]), flush=True)
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


def rows(timings: Sequence[Timing], operation) -> list[dict]:
    medians = {timing.name: timing.median_ms for timing in timings}
    return [
        {
            **dataclasses.asdict(timing),
            "ratio_to_peer": timing.median_ms / medians[operation.PEER],
            "ratio_to_floor": timing.median_ms / medians[operation.FLOOR],
        }
        for timing in timings
    ]


def table(result: dict) -> str:
    description = ", ".join(f"{key} {value}" for key, value in result.items() if key != "timings")
    lines = [description, f"{'':32}{'median ms':>12}{'of peer':>10}{'of floor':>10}{'extra MiB':>12}"]
    for row in result["timings"]:
        memory = "-" if row["peak_extra_mib"] is None else f"{row['peak_extra_mib']:.0f}"
        numbers = f"{row['median_ms']:>12.1f}{row['ratio_to_peer']:>10.2f}{row['ratio_to_floor']:>10.2f}{memory:>12}"
        lines.append(f"  {row['name']:30}{numbers}")
    return "\n".join(lines)


def machine(device: torch.device) -> dict:
    """Where and with what the numbers were taken; commit is None outside a git checkout."""
    processor = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        processor = names[0] if names else processor
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    return {
        "processor": processor,
        "num_processors": os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": git.stdout.strip() or None,
    }


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR_EXIT_CODE)
