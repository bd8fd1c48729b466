"""Estimates, not measurements: how near a chip's peak each compiled kernel can come.

In: `compiled.json` (registers, shared memory, matrix and special instructions) and the chips' rates. Out: for a program,
clocks of its matrix instructions, of the bytes it moves and of its arithmetic; how many programs fit on a processor; and
the share of the time in which the matrix units are busy. Too bright: uncovered latency, bank conflicts, the last wave of
programs and clocks below their maximum are left out. Too dark: arithmetic is counted in the text, so branches that most
tiles skip count in full.
"""

import math
from dataclasses import dataclass
from typing import Any

from kernels.bench.chips import CHIPS, Chip
from kernels.rows.strips import STRIP_COLUMNS, STRIP_ROWS

# Kernel -> how many products make its tile, and whether weights of the tile go to memory.
TILE_KERNELS = {
    "statistics": (1, False),
    "weights": (1, True),
    "sigmoid_negative_sum": (1, False),
    "sigmoid_weights": (1, True),
    "topk_sweep": (2, False),
}
# Kernels of no product: O(b + G) work beside the b x G of the others.
WITHOUT_PRODUCT = ("merge", "exact")
ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
# float16 rows have float32 weights.
WEIGHT_BYTES = {"bf16": 2, "fp16": 4, "fp32": 4}
# A 16-bit matrix unit takes one product for a product; of float32 on NVIDIA, TF32 makes one or three.
PASSES = {"ieee": 1, "tf32": 1, "tf32x3": 3}


@dataclass(frozen=True)
class Work:
    """Of one program. useful_flop: of the definition; executed_flop: with the products that accuracy costs."""

    useful_flop: float
    executed_flop: float
    cache_bytes: float
    memory_bytes: float


@dataclass(frozen=True)
class Estimate:
    """An estimate. Clocks of one program alone on a processor; programs: how many share one, limited by `limit`.

    slowest: which of the clocks is the largest. busy: share of the time in which matrix units work. useful_tflops: of
    the whole chip, 2*b*G*D for a product.
    """

    matrix_clocks: float
    cache_clocks: float
    memory_clocks: float
    special_clocks: float
    issue_clocks: float
    programs: int
    limit: str
    slowest: str
    busy: float
    useful_tflops: float
    matrix_instructions: int | None


def kernel_of(key: str) -> tuple[str, str, int, str, set[str]]:
    """(chip, dtype, D, kernel, flags) of a table's key."""
    chip, dtype, dim, variant = key.split("/")
    kernel, flags = variant.removesuffix("]").split("[")
    return chip, dtype, int(dim), kernel, set(flags.split(","))


def programs_per_processor(entry: dict[str, Any], chip: Chip) -> tuple[int, str]:
    """(how many programs of a kernel fit on a processor at once, what keeps out one more)."""
    threads = entry["warps"] * chip.warp
    grain = chip.register_granularity
    registers = math.ceil(entry["registers"] / grain) * grain * threads
    shared = entry["shared_bytes"] + chip.shared_reserved_bytes
    limits = {
        "registers": chip.registers // registers,
        "shared memory": chip.shared_bytes // shared if shared else chip.programs,
        "threads": chip.threads // threads,
        "programs": chip.programs,
    }
    limit = min(limits, key=limits.get)
    return limits[limit], limit


def work_of(key: str, entry: dict[str, Any]) -> Work:
    """ValueError for a kernel that this module has no arithmetic for."""
    _, dtype, dim, kernel, flags = kernel_of(key)
    size, weight_size = ELEMENT_BYTES[dtype], WEIGHT_BYTES[dtype]
    passes = next(number for name, number in PASSES.items() if f"PRECISION={name}" in flags)
    halves = 2 if "SPLIT" in flags else 1
    if kernel in TILE_KERNELS:
        rows, columns, depth = entry["blocks"]
        num_products, stores = TILE_KERNELS[kernel]
        executed = 2.0 * rows * columns * math.ceil(dim / depth) * depth * passes * num_products
        stored = rows * columns * weight_size * halves if stores else 0
        loaded = (rows + columns) * dim * size * num_products
        return Work(2.0 * rows * columns * dim * num_products, executed, loaded + stored, stored)
    if kernel == "add_products":
        rows, columns, _ = entry["blocks"]
        # Blocks that reach beyond the width compute what nobody reads.
        useful_columns = dim / math.ceil(dim / columns)
        inner = STRIP_ROWS if "TRANSPOSED" in flags else STRIP_COLUMNS
        weights, result = rows * inner * weight_size * halves, 2 * 4 * rows * useful_columns
        return Work(
            2.0 * rows * useful_columns * inner,
            2.0 * rows * columns * inner * halves * passes,
            weights + useful_columns * inner * size + result,
            # Programs side by side read the same weights, of which memory delivers one copy.
            weights / math.ceil(dim / columns) + result,
        )
    raise ValueError(f"no arithmetic for kernel {kernel!r}: add it to kernels/bench/roofline.py")


def estimate(key: str, entry: dict[str, Any]) -> Estimate:
    """Of one entry. With two programs or more on a processor one's arithmetic runs beside another's products."""
    chip_name, dtype, _, kernel, _ = kernel_of(key)
    chip, work = CHIPS[chip_name], work_of(key, entry)
    processor_hz = chip.clock_ghz * 1e9 * chip.num_processors
    # The rate of 16-bit numbers is that of bfloat16; float16's weights are float32.
    is_short = dtype == "bf16" or (dtype == "fp16" and kernel != "add_products")
    operands = "bf16" if is_short else next(name for name in ("tf32", "fp32") if name in chip.matrix_tflops)
    matrix = work.executed_flop / (chip.matrix_tflops[operands] * 1e12 / processor_hz)
    cache = work.cache_bytes / chip.cache_bytes_per_clock
    memory = work.memory_bytes / (chip.memory_gb_per_s * 1e9 / processor_hz)
    lanes = entry["warps"] * chip.warp
    special = entry["special_count"] * lanes / chip.special_per_clock
    issue = entry["instruction_count"] * lanes / chip.lanes_per_clock
    programs, limit = programs_per_processor(entry, chip)
    parts = {"matrix": matrix, "cache": cache, "memory": memory, "special": special, "arithmetic": issue}
    moving, arithmetic = max(matrix, cache, memory), max(special, issue)
    clocks = max(moving, arithmetic) if programs > 1 else moving + arithmetic
    return Estimate(
        matrix_clocks=matrix,
        cache_clocks=cache,
        memory_clocks=memory,
        special_clocks=special,
        issue_clocks=issue,
        programs=programs,
        limit=limit,
        slowest=max(parts, key=parts.get),
        busy=matrix / clocks,
        useful_tflops=work.useful_flop / clocks * processor_hz / 1e12,
        matrix_instructions=matrix_instructions(entry, work),
    )


def matrix_instructions(entry: dict[str, Any], work: Work) -> int | None:
    """How many a program executes; None where the instruction's name doesn't tell its shape."""
    flop = {flop_of(name) for name in entry["matrix"]}
    if len(flop) != 1 or None in flop:
        return None
    return round(work.executed_flop / flop.pop())


def flop_of(instruction: str) -> int | None:
    """2*m*n*k of a matrix instruction by its name: m64n128k16, m16n8k16, or 32x32x8."""
    digits = "".join(character if character.isdigit() else " " for character in instruction)
    numbers = [int(number) for number in digits.split()]
    if "wgmma" in instruction or "mma.sync" in instruction:
        name = next(part for part in instruction.split(".") if part.startswith("m") and part[1:2].isdigit())
        m, n, k = (int(part) for part in name.replace("m", " ").replace("n", " ").replace("k", " ").split())
        return 2 * m * n * k
    if "mfma" in instruction:
        m, n, k = numbers[1:4]
        return 2 * m * n * k
    return None


def estimates_table(table: dict[str, Any], chips: list[str] | None = None) -> str:
    """Text for a terminal."""
    lines = [
        "ESTIMATE from compiled code and the makers' peak rates, not a measurement.",
        f"{'kernel':64}{'matrix/program':>15}{'programs':>9}  {'limited by':15}{'slowest':12}{'busy':>5}"
        f"{'useful TFLOP/s':>16}",
    ]
    previous = None
    for key, entry in sorted(table["entries"].items(), key=_order):
        chip, dtype, dim, kernel, _ = kernel_of(key)
        if kernel in WITHOUT_PRODUCT or (chips and chip not in chips):
            continue
        if (chip, dtype, dim) != previous:
            previous = (chip, dtype, dim)
            lines.append(f"{chip} ({CHIPS[chip].board}), {dtype}, D = {dim}")
        one = estimate(key, entry)
        count = "-" if one.matrix_instructions is None else one.matrix_instructions
        name = key.split("/")[-1].replace("PRECISION=", "").replace("WANT_SCALE,WANT_WEIGHTS,", "")
        lines.append(
            f"  {name:62}{count:>15}{one.programs:>9}  {one.limit:15}{one.slowest:12}{one.busy:>5.0%}"
            f"{one.useful_tflops:>16.0f}"
        )
    return "\n".join(lines)


def _order(item: tuple[str, Any]) -> tuple[int, str, int, str]:
    chip, dtype, dim, _, _ = kernel_of(item[0])
    return list(CHIPS).index(chip), dtype, dim, item[0]
