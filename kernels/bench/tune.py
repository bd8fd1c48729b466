"""`python -m kernels.bench.tune`: block sizes of the Triton kernels by measurement, on the GPU at hand.

For each kernel of the block table in `kernels/launch.py` it puts one candidate after the other in the table's place,
runs an operation that uses the kernel, and reads the kernel's own time from torch's profiler. Candidates are compiled
beforehand by several processes at once, into Triton's cache. What is fastest is printed first; the table is edited by
hand.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kernels import contrastive_gradients, product_topk, sigmoid_contrastive_gradients
from kernels.bench.contrastive import paired_rows
from kernels.bench.topk import clustered_rows
from kernels.launch import ANY, BLOCKS, Blocks, chip_of

USER_ERROR_EXIT_CODE = 2
SMALL = 512
NUM_COMPILERS = 12
REPEATS = 5
# rows, columns, depth, warps, stages.
TILES = (
    (128, 128, 64, 4, 3),
    (128, 128, 64, 4, 2),
    (128, 128, 32, 4, 4),
    (128, 128, 64, 8, 3),
    (128, 128, 64, 8, 2),
    (64, 128, 64, 4, 4),
    (64, 128, 64, 4, 3),
    (128, 64, 64, 4, 4),
    (128, 64, 64, 4, 3),
)
PRODUCT_TILES = (
    (128, 128, 64, 4, 3),
    (128, 128, 64, 4, 2),
    (128, 128, 32, 4, 4),
    (128, 128, 32, 4, 6),
    (128, 128, 64, 8, 3),
    (128, 256, 64, 8, 3),
    (64, 256, 64, 4, 3),
)


@dataclass(frozen=True)
class Trial:
    """What runs a kernel: `operation(rows)` on `rows` base rows; products: of how many 2*B*G*D the kernel does."""

    kernel: str
    function: str
    dtype: torch.dtype
    operation: str
    products: int
    candidates: tuple[tuple[int, ...], ...]


TRIALS = {
    "statistics": Trial("contrastive_statistics", "statistics_kernel", torch.bfloat16, "contrastive", 1, TILES),
    "statistics-margin": Trial("contrastive_statistics_hinge", "statistics_kernel", torch.bfloat16, "margin", 1, TILES),
    "weights": Trial("contrastive_weights", "weights_kernel", torch.bfloat16, "contrastive", 1, TILES),
    "weights-fast": Trial("contrastive_weights", "weights_kernel", torch.bfloat16, "fast", 1, TILES),
    "weights-margin": Trial("contrastive_weights", "weights_kernel", torch.bfloat16, "margin", 1, TILES),
    "products": Trial("add_products", "add_products_kernel", torch.bfloat16, "contrastive", 4, PRODUCT_TILES),
    "products-fast": Trial("add_products", "add_products_kernel", torch.bfloat16, "fast", 2, PRODUCT_TILES),
    "sigmoid": Trial("sigmoid_negative_sum", "negative_sum_kernel", torch.bfloat16, "sigmoid", 1, TILES),
    "sigmoid-weights": Trial("sigmoid_weights", "sigmoid_weights_kernel", torch.bfloat16, "sigmoid", 1, TILES),
    "topk": Trial("topk_sweep", "sweep_kernel", torch.float16, "topk", 2, TILES),
    "topk-bf16": Trial("topk_sweep", "sweep_kernel", torch.bfloat16, "topk", 2, TILES),
    "statistics-fp32": Trial("contrastive_statistics", "statistics_kernel", torch.float32, "contrastive", 1, TILES),
}


def main() -> None:
    options = _parser().parse_args()
    if not torch.cuda.is_available():
        raise ValueError("kernels.bench.tune needs a GPU, and torch finds no CUDA device here")
    names = options.kernel or list(TRIALS)
    work = [(name, tile) for name in names for tile in candidates(name, options.candidate)]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(NUM_COMPILERS, mp_context=context) as pool:
        failures = dict(zip(work, pool.map(_compile, work), strict=True))
    results = []
    for name in names:
        tiles = [tile for tile in candidates(name, options.candidate) if not failures[name, tile]]
        found = list(measure(name, tiles, options.batch))
        results += sorted(found, key=lambda one: one["ms"])
        print(f"{name}, {TRIALS[name].kernel}, B = {options.batch}")
        for one in sorted(found, key=lambda one: one["ms"]):
            print(f"  {one['tile']!s:28}{one['ms']:9.3f} ms{one['tflops']:9.0f} TFLOP/s", flush=True)
    for (name, tile), failure in failures.items():
        if failure:
            print(f"  {name} {tile}: {failure}")
    if options.out:
        report = {"device": torch.cuda.get_device_name(), "results": results}
        Path(options.out).write_text(json.dumps(report, indent=1) + "\n")


def candidates(name: str, chosen: list[str]) -> list[tuple[int, ...]]:
    if chosen:
        return [tuple(int(number) for number in one.split(",")) for one in chosen]
    return list(TRIALS[name].candidates)


def _parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="python -m kernels.bench.tune", description=__doc__)
    result.add_argument("--kernel", action="append", choices=TRIALS, help="what to tune, repeatable; default all")
    result.add_argument(
        "--candidate", action="append", default=[], help="rows,columns,depth,warps,stages; repeatable; default a list"
    )
    result.add_argument("--batch", type=int, default=16384, help="rows (topk: queries; default 16384)")
    result.add_argument("--out", help="JSON file for the results")
    return result


def _operation(name: str, dtype: torch.dtype, batch: int) -> Callable[[], Any]:
    device = torch.device("cuda")
    if name == "topk":
        base = [clustered_rows(max(batch, 4096), seed).to(device, dtype) for seed in (1, 2)]
        queries = torch.arange(min(batch, 2048), device=device)
        return lambda: product_topk(base[0][queries], base[1][queries], *base, 100, query_ids_Q=queries)
    rows = paired_rows(batch, dtype, device)
    scale, bias = torch.tensor(100.0, device=device), torch.tensor(-10.0, device=device)
    if name == "sigmoid":
        return lambda: sigmoid_contrastive_gradients(*rows, scale / 10, bias)
    settings = {"fast": {"gradient_operand": "fast"}, "margin": {"hard_per_anchor": 1, "margin_weight": 1.0}}
    return lambda: contrastive_gradients(*rows, scale, **settings.get(name, {}))


def _use(name: str, tile: tuple[int, ...]) -> None:
    entry = ((ANY, Blocks(*tile)),)
    BLOCKS[TRIALS[name].kernel, chip_of(torch.device("cuda"))] = {"16bit": entry, "fp32": entry}


def _compile(work: tuple[str, tuple[int, ...]]) -> str:
    """Empty, or why the candidate doesn't compile."""
    name, tile = work
    _use(name, tile)
    try:
        _operation(TRIALS[name].operation, TRIALS[name].dtype, SMALL)()
        torch.cuda.synchronize()
    except Exception as error:  # Triton has no common class for what a chip cannot hold
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
    return ""


def measure(name: str, tiles: list[tuple[int, ...]], batch: int) -> Iterator[dict[str, Any]]:
    trial = TRIALS[name]
    run = _operation(trial.operation, trial.dtype, batch)
    original = BLOCKS[trial.kernel, chip_of(torch.device("cuda"))]
    for tile in tiles:
        _use(name, tile)
        try:
            ms, launches = kernel_ms(run, trial.function)
        except Exception as error:  # as above: a larger problem may need what the small one did not
            print(f"  {name} {tile}: {type(error).__name__}: {str(error)[:120]}")
            continue
        flop = trial.products * useful(trial.operation, batch)
        result = {"name": name, "tile": tile, "ms": ms, "launches": launches, "tflops": flop / ms / 1e9}
        yield {**asdict(trial), "dtype": str(trial.dtype), **result}
    BLOCKS[trial.kernel, chip_of(torch.device("cuda"))] = original


def useful(operation: str, batch: int) -> float:
    if operation == "topk":
        return 2.0 * min(batch, 2048) * max(batch, 4096) * 512
    return 2.0 * batch**2 * 512


def kernel_ms(run: Callable[[], Any], function: str) -> tuple[float, int]:
    """(milliseconds on the device, launches) of one run's kernels of this name."""
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(REPEATS):
            run()
        torch.cuda.synchronize()
    found = [event for event in profile.key_averages() if event.key == function]
    total_us = sum(event.device_time_total for event in found)
    return total_us / REPEATS / 1e3, sum(event.count for event in found) // REPEATS


def all_kernels_ms(run: Callable[[], Any]) -> dict[str, tuple[float, int]]:
    """{kernel: (milliseconds, launches)} of one run, all kernels, slowest first."""
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(REPEATS):
            run()
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda event: -event.device_time_total)
    return {event.key: (event.device_time_total / REPEATS / 1e3, event.count // REPEATS) for event in events}


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR_EXIT_CODE)
