"""`python -m kernels.bench.tune`: block sizes of the Triton kernels by measurement, on the GPU at hand.

For each kernel it puts one candidate after the other in the place of its entry in the block table of `kernels/launch.py`,
runs an operation that uses the kernel, and reads the kernel's own time from torch's profiler. Candidates are compiled
beforehand by several processes at once, into Triton's cache. The fastest is printed first; the table is edited by hand.
`--profile OPERATION` prints the times of all kernels of one call instead.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kernels import contrastive_gradients, product_topk, sigmoid_contrastive_gradients
from kernels.bench.contrastive import DIM, paired_rows
from kernels.bench.topk import NUM_QUERIES, K, clustered_rows
from kernels.bench.units import useful_flop
from kernels.launch import ANY, BLOCKS, Blocks, chip_of

USER_ERROR_EXIT_CODE = 2
# Rows on which a candidate is compiled.
SMALL = 512
NUM_COMPILERS = 12
REPEATS = 5
SETTINGS = {
    "contrastive": {},
    "fast": {"gradient_operand": "fast"},
    "margin": {"hard_per_anchor": 1, "margin_weight": 1.0},
}
OPERATIONS = (*SETTINGS, "sigmoid", "topk")
# rows, columns, depth, warps, stages.
Tile = tuple[int, int, int, int, int]
TILES = (
    (128, 128, 64, 4, 3),
    (128, 128, 64, 4, 2),
    (128, 128, 64, 8, 3),
    (128, 128, 64, 8, 4),
    (128, 128, 32, 4, 4),
    (64, 128, 64, 4, 3),
    (64, 128, 64, 4, 4),
    (128, 64, 64, 4, 3),
    (128, 64, 64, 4, 4),
    (128, 256, 64, 8, 3),
    (256, 128, 64, 8, 3),
)


@dataclass(frozen=True)
class Trial:
    """A kernel by its names in the block table and in Triton, and what runs it.

    products: how many products of all rows with all rows it executes in one call of the operation.
    """

    table: str
    function: str
    operation: str
    products: int
    dtype: torch.dtype = torch.bfloat16


TRIALS = {
    "statistics": Trial("contrastive_statistics", "statistics_kernel", "contrastive", 1),
    "statistics-hinge": Trial("contrastive_statistics_hinge", "statistics_kernel", "margin", 1),
    "weights": Trial("contrastive_weights", "weights_kernel", "contrastive", 1),
    "weights-fast": Trial("contrastive_weights", "weights_kernel", "fast", 1),
    "weights-hinge": Trial("contrastive_weights", "weights_kernel", "margin", 1),
    "products": Trial("add_products", "add_products_kernel", "contrastive", 4),
    "products-fast": Trial("add_products", "add_products_kernel", "fast", 2),
    "sigmoid": Trial("sigmoid_negative_sum", "negative_sum_kernel", "sigmoid", 1),
    "sigmoid-weights": Trial("sigmoid_weights", "sigmoid_weights_kernel", "sigmoid", 1),
    "topk": Trial("topk_sweep", "sweep_kernel", "topk", 2, torch.float16),
}


def main(arguments: Sequence[str]) -> None:
    options = _parser().parse_args(arguments)
    if not torch.cuda.is_available():
        raise ValueError("kernels.bench.tune needs a GPU, but torch finds no CUDA device here")
    if options.profile:
        run = operation(
            options.profile, TRIALS["topk" if options.profile == "topk" else "weights"].dtype, options.batch
        )
        for name, (ms, launches) in kernel_times(run).items():
            print(f"{ms:9.3f} ms{launches:6}  {name[:100]}")
        return
    names = options.kernel or list(TRIALS)
    tiles = [parse_tile(text) for text in options.candidate] or list(TILES)
    failures = compile_all([(name, tile) for name in names for tile in tiles])
    results = []
    for name in names:
        found = list(measure(name, [tile for tile in tiles if not failures[name, tile]], options.batch))
        results += sorted(found, key=lambda one: one["ms"])
        print(f"{name}, B = {options.batch}, D = {DIM}, {TRIALS[name].dtype}")
        for one in sorted(found, key=lambda one: one["ms"]):
            print(f"  {one['tile']!s:28}{one['ms']:9.3f} ms{one['tflops']:9.0f} TFLOP/s", flush=True)
    for (name, tile), failure in failures.items():
        if failure:
            print(f"  {name} {tile} does not compile: {failure}")
    if options.out:
        report = {"device": torch.cuda.get_device_name(), "results": results}
        Path(options.out).write_text(json.dumps(report, indent=1) + "\n")


def _parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="python -m kernels.bench.tune", description=__doc__)
    result.add_argument("--kernel", action="append", choices=TRIALS, help="what to tune, repeatable; default all")
    result.add_argument(
        "--candidate", action="append", default=[], help="rows,columns,depth,warps,stages; repeatable; default a list"
    )
    result.add_argument("--batch", type=int, default=16384, help="rows, or base pairs of the top-k (default 16384)")
    result.add_argument("--profile", choices=OPERATIONS, help="times of all kernels of one call instead")
    result.add_argument("--out", help="JSON file for the results")
    return result


def parse_tile(text: str) -> Tile:
    """ValueError unless it is five positive numbers with commas between."""
    numbers = [int(part) if part.isdecimal() else 0 for part in text.split(",")]
    if len(numbers) != 5 or min(numbers) < 1:
        raise ValueError(f"--candidate {text} must be five positive numbers: rows,columns,depth,warps,stages")
    return tuple(numbers)


def operation(name: str, dtype: torch.dtype, batch: int) -> Callable[[], Any]:
    """A call of the operation on `batch` rows (base pairs of the top-k) of the GPU."""
    device = torch.device("cuda")
    if name == "topk":
        base = [clustered_rows(batch, seed).to(device, dtype) for seed in (1, 2)]
        queries = torch.arange(min(batch, NUM_QUERIES), device=device)
        k = min(K, batch)
        return lambda: product_topk(base[0][queries], base[1][queries], *base, k, query_ids_Q=queries)
    rows = paired_rows(batch, dtype, device)
    if name == "sigmoid":
        scalars = [torch.tensor(value, device=device) for value in (10.0, -10.0)]
        return lambda: sigmoid_contrastive_gradients(*rows, *scalars)
    scale = torch.tensor(100.0, device=device)
    return lambda: contrastive_gradients(*rows, scale, **SETTINGS[name])


def flop_of(trial: Trial, batch: int) -> float:
    """That the trial's kernel executes in one call."""
    if trial.operation == "topk":
        return useful_flop("topk", {"queries": min(batch, NUM_QUERIES), "pairs": batch, "dim": f"{DIM}+{DIM}"})
    return trial.products * 2.0 * batch**2 * DIM


@contextmanager
def blocks_in_place(table: str, tile: Tile) -> Iterator[None]:
    """The tile in place of a kernel's entry in the block table."""
    key = table, chip_of(torch.device("cuda"))
    before = BLOCKS[key]
    BLOCKS[key] = dict.fromkeys(("16bit", "fp32"), ((ANY, Blocks(*tile)),))
    try:
        yield
    finally:
        BLOCKS[key] = before


def compile_all(work: list[tuple[str, Tile]]) -> dict[tuple[str, Tile], str]:
    """Of each trial and tile: "", or why the chip cannot run it."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(NUM_COMPILERS, mp_context=context) as pool:
        return dict(zip(work, pool.map(_compile, work), strict=True))


def _compile(work: tuple[str, Tile]) -> str:
    name, tile = work
    trial = TRIALS[name]
    with blocks_in_place(trial.table, tile):
        try:
            operation(trial.operation, trial.dtype, SMALL)()
            torch.cuda.synchronize()
        except Exception as error:  # Triton has no common class for what a chip cannot hold
            return f"{type(error).__name__}: {str(error)[:100]}"
    return ""


def measure(name: str, tiles: Sequence[Tile], batch: int) -> Iterator[dict[str, Any]]:
    """{name, tile, ms, launches, tflops} of each tile."""
    trial = TRIALS[name]
    run = operation(trial.operation, trial.dtype, batch)
    for tile in tiles:
        with blocks_in_place(trial.table, tile):
            ms, launches = kernel_times(run)[trial.function]
        tflops = flop_of(trial, batch) / ms / 1e9
        yield {"name": name, "tile": tile, "ms": ms, "launches": launches, "tflops": tflops}


def kernel_times(run: Callable[[], Any]) -> dict[str, tuple[float, int]]:
    """{kernel: (milliseconds on the GPU, launches)} of one call, the slowest first."""
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(REPEATS):
            run()
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda event: -event.device_time_total)
    # What the processor did to launch them is listed too, without a time of its own.
    return {
        one.key: (one.device_time_total / REPEATS / 1e3, one.count // REPEATS)
        for one in events
        if one.device_time_total
    }


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR_EXIT_CODE)
