"""What the Triton kernels share: may they run here, on which chip, in which blocks; and how a launch is compiled.

Block sizes come from one table, keyed by kernel, chip, dtype and D. Importing this module imports Triton; the rest of
`kernels` imports it only when Triton is asked for.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import triton

CHIPS = ("sm_80", "sm_90", "sm_100", "gfx942")
INTERPRETER = "interpreter"


@dataclass(frozen=True)
class Blocks:
    """A program's tile: rows x columns of the result, `depth` of the summed axis at a time."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Specialisation:
    """One kernel as a launch compiles it: argument types, compile-time constants, arguments that are multiples of 16."""

    kernel: str
    function: triton.JITFunction
    signature: dict[str, str]
    constexprs: dict[str, Any]
    aligned: tuple[str, ...]
    num_warps: int
    num_stages: int
    options: dict[str, Any] = field(default_factory=dict)


@triton.jit
def _probe():
    pass


def is_interpreted() -> bool:
    """Whether TRITON_INTERPRET=1 was in force when this module, and so the kernels, were imported."""
    return not isinstance(_probe, triton.JITFunction)


def require_triton(operation: str, device: torch.device) -> None:
    """Refuse what Triton cannot run: ValueError unless the tensors are on a GPU it knows or it interprets."""
    if is_interpreted():
        return
    if device.type != "cuda":
        raise ValueError(
            f"backend='triton' of {operation} needs tensors on a GPU, not on {device}: move them, use "
            "backend='blockwise', or set TRITON_INTERPRET=1 before Triton is imported (slow; for tests)"
        )
    chip_of(device)


def chip_of(device: torch.device) -> str:
    """Name in the block table: "sm_80", "sm_90", "sm_100", "gfx942" or "interpreter"; ValueError for an older GPU.

    A chip that has no column of its own takes the nearest lower one whose shared memory it has.
    """
    if is_interpreted():
        return INTERPRETER
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise ValueError(
            f"the Triton kernels need compute capability 8.0 or higher, but {device} has {major}.{minor}: "
            "use backend='blockwise'"
        )
    # Capability 12 is above 10, but has neither its matrix unit nor its shared memory: it is 8.x grown.
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def blocks_for(kernel: str, chip: str, dtype: torch.dtype, dim: int) -> Blocks:
    """The table's entry for features of this dtype and D = dim; ValueError for a kernel or chip that it lacks."""
    if chip == INTERPRETER:
        return INTERPRETED_PRODUCT if kernel == "add_products" else INTERPRETED
    if (kernel, chip) not in BLOCKS:
        raise ValueError(f"no blocks for kernel={kernel!r} on chip={chip!r}: known are {sorted(BLOCKS)}")
    table = BLOCKS[kernel, chip]
    entries = table.get(str(dtype).removeprefix("torch."), table.get(_width(dtype), DOUBLE))
    return next(blocks for max_dim, blocks in entries if dim <= max_dim)


def num_blocks(size: int, block: int) -> int:
    return triton.cdiv(size, block)


def _width(dtype: torch.dtype) -> str:
    """Sixteen-bit dtypes share their blocks, but where one has its own under its name."""
    return {torch.float32: "fp32", torch.float64: "fp64"}.get(dtype, "16bit")


ANY = 1 << 62
# Small, so that small tests cross the edges of blocks; deeper than rows' widths are multiples of, so that a depth has one.
INTERPRETED = Blocks(16, 16, 32, num_warps=4, num_stages=1)
# As deep as a tile has columns: a product reads whole tiles of weights.
INTERPRETED_PRODUCT = Blocks(16, 16, 16, num_warps=4, num_stages=1)
DOUBLE = ((ANY, Blocks(32, 32, 16, num_warps=4, num_stages=2)),)
# kernel, chip -> width of the dtype -> (largest D, blocks), in ascending order of D. float64 takes DOUBLE everywhere.
BLOCKS: dict[tuple[str, str], dict[str, tuple[tuple[int, Blocks], ...]]] = {
    ("contrastive_statistics", "sm_80"): {
        "16bit": ((ANY, Blocks(128, 128, 32, num_warps=8, num_stages=3)),),
        "fp32": ((ANY, Blocks(128, 64, 32, num_warps=8, num_stages=3)),),
    },
    ("contrastive_statistics", "sm_90"): {
        "16bit": ((ANY, Blocks(128, 128, 64, num_warps=4, num_stages=3)),),
        # The faster four warps spill, by a few registers.
        "float16": ((ANY, Blocks(128, 128, 64, num_warps=8, num_stages=3)),),
        "fp32": ((ANY, Blocks(128, 64, 32, num_warps=8, num_stages=3)),),
    },
    ("contrastive_statistics", "sm_100"): {
        "16bit": ((ANY, Blocks(128, 64, 128, num_warps=8, num_stages=2)),),
        "fp32": ((ANY, Blocks(128, 64, 32, num_warps=8, num_stages=4)),),
    },
    ("contrastive_statistics", "gfx942"): {
        "16bit": ((ANY, Blocks(128, 128, 64, num_warps=8, num_stages=2)),),
        "fp32": ((ANY, Blocks(128, 64, 32, num_warps=8, num_stages=2)),),
    },
    ("contrastive_statistics_hinge", "sm_80"): {
        "16bit": ((ANY, Blocks(128, 128, 32, num_warps=8, num_stages=3)),),
        "fp32": ((ANY, Blocks(128, 64, 32, num_warps=8, num_stages=3)),),
    },
    ("contrastive_statistics_hinge", "sm_90"): {
        "16bit": ((ANY, Blocks(128, 64, 64, num_warps=4, num_stages=3)),),
        "fp32": ((ANY, Blocks(128, 64, 32, num_warps=8, num_stages=3)),),
    },
    ("contrastive_statistics_hinge", "sm_100"): {
        "16bit": ((ANY, Blocks(128, 64, 128, num_warps=8, num_stages=2)),),
        "fp32": ((ANY, Blocks(128, 64, 32, num_warps=8, num_stages=4)),),
    },
    ("contrastive_statistics_hinge", "gfx942"): {
        "16bit": ((ANY, Blocks(128, 128, 64, num_warps=8, num_stages=2)),),
        "fp32": ((ANY, Blocks(128, 64, 32, num_warps=8, num_stages=2)),),
    },
    ("contrastive_weights", "sm_80"): {
        "16bit": ((ANY, Blocks(128, 128, 32, num_warps=8, num_stages=3)),),
        "fp32": ((ANY, Blocks(128, 64, 32, num_warps=8, num_stages=3)),),
    },
    ("contrastive_weights", "sm_90"): {
        "16bit": ((ANY, Blocks(64, 128, 64, num_warps=4, num_stages=4)),),
        # Its weights are float32, which takes more registers.
        "float16": ((ANY, Blocks(128, 64, 64, num_warps=8, num_stages=3)),),
        "fp32": ((ANY, Blocks(128, 64, 32, num_warps=8, num_stages=3)),),
    },
    ("contrastive_weights", "sm_100"): {
        "16bit": ((ANY, Blocks(128, 64, 64, num_warps=8, num_stages=4)),),
        "fp32": ((ANY, Blocks(128, 64, 32, num_warps=8, num_stages=4)),),
    },
    ("contrastive_weights", "gfx942"): {
        "16bit": ((ANY, Blocks(128, 128, 64, num_warps=8, num_stages=2)),),
        "fp32": ((ANY, Blocks(128, 64, 32, num_warps=8, num_stages=2)),),
    },
    # Weights are stored in whole tiles, whose sides are multiples of add_products' depth.
    ("sigmoid_negative_sum", "sm_80"): {
        "16bit": ((ANY, Blocks(128, 128, 32, num_warps=8, num_stages=3)),),
        "fp32": ((ANY, Blocks(128, 64, 32, num_warps=8, num_stages=3)),),
    },
    ("sigmoid_negative_sum", "sm_90"): {
        "16bit": ((ANY, Blocks(128, 128, 64, num_warps=8, num_stages=3)),),
        "fp32": ((ANY, Blocks(128, 64, 32, num_warps=8, num_stages=3)),),
    },
    ("sigmoid_negative_sum", "sm_100"): {
        "16bit": ((ANY, Blocks(128, 128, 64, num_warps=8, num_stages=3)),),
        "fp32": ((ANY, Blocks(128, 64, 32, num_warps=8, num_stages=3)),),
    },
    ("sigmoid_negative_sum", "gfx942"): {
        "16bit": ((ANY, Blocks(128, 128, 32, num_warps=8, num_stages=2)),),
        "fp32": ((ANY, Blocks(128, 64, 32, num_warps=8, num_stages=2)),),
    },
    ("sigmoid_weights", "sm_80"): {
        "16bit": ((ANY, Blocks(128, 128, 32, num_warps=8, num_stages=3)),),
        "fp32": ((ANY, Blocks(128, 64, 32, num_warps=8, num_stages=3)),),
    },
    ("sigmoid_weights", "sm_90"): {
        "16bit": ((ANY, Blocks(64, 128, 64, num_warps=4, num_stages=3)),),
        "fp32": ((ANY, Blocks(128, 64, 32, num_warps=8, num_stages=3)),),
    },
    ("sigmoid_weights", "sm_100"): {
        "16bit": ((ANY, Blocks(128, 128, 64, num_warps=8, num_stages=3)),),
        "fp32": ((ANY, Blocks(128, 64, 32, num_warps=8, num_stages=3)),),
    },
    ("sigmoid_weights", "gfx942"): {
        "16bit": ((ANY, Blocks(128, 128, 32, num_warps=8, num_stages=2)),),
        "fp32": ((ANY, Blocks(128, 64, 32, num_warps=8, num_stages=2)),),
    },
    ("add_products", "sm_80"): {
        "16bit": ((ANY, Blocks(128, 128, 32, num_warps=8, num_stages=4)),),
        "fp32": ((ANY, Blocks(128, 64, 16, num_warps=8, num_stages=3)),),
    },
    ("add_products", "sm_90"): {
        "16bit": (
            (64, Blocks(128, 64, 64, num_warps=8, num_stages=3)),
            (ANY, Blocks(128, 128, 64, num_warps=8, num_stages=3)),
        ),
        "fp32": ((ANY, Blocks(128, 64, 32, num_warps=8, num_stages=3)),),
    },
    ("add_products", "sm_100"): {
        "16bit": ((ANY, Blocks(128, 128, 64, num_warps=8, num_stages=3)),),
        "fp32": ((ANY, Blocks(128, 64, 32, num_warps=8, num_stages=3)),),
    },
    ("add_products", "gfx942"): {
        "16bit": ((ANY, Blocks(128, 128, 32, num_warps=8, num_stages=2)),),
        "fp32": ((ANY, Blocks(128, 64, 32, num_warps=8, num_stages=2)),),
    },
    ("topk_sweep", "sm_80"): {
        "16bit": ((ANY, Blocks(128, 64, 32, num_warps=8, num_stages=3)),),
        "fp32": ((ANY, Blocks(64, 64, 32, num_warps=8, num_stages=3)),),
    },
    ("topk_sweep", "sm_90"): {
        "16bit": ((ANY, Blocks(128, 128, 32, num_warps=8, num_stages=3)),),
        # The wider tile spills, by a few registers.
        "float16": ((ANY, Blocks(128, 64, 64, num_warps=8, num_stages=3)),),
        "fp32": ((ANY, Blocks(64, 64, 32, num_warps=8, num_stages=3)),),
    },
    ("topk_sweep", "sm_100"): {
        "16bit": ((ANY, Blocks(128, 64, 64, num_warps=8, num_stages=3)),),
        "fp32": ((ANY, Blocks(64, 64, 32, num_warps=8, num_stages=3)),),
    },
    ("topk_sweep", "gfx942"): {
        "16bit": ((ANY, Blocks(128, 64, 32, num_warps=8, num_stages=2)),),
        "fp32": ((ANY, Blocks(64, 64, 32, num_warps=8, num_stages=2)),),
    },
    ("topk_sweep_excluding", "sm_80"): {
        "16bit": ((ANY, Blocks(128, 64, 32, num_warps=8, num_stages=3)),),
        "fp32": ((ANY, Blocks(64, 64, 16, num_warps=8, num_stages=3)),),
    },
    ("topk_sweep_excluding", "sm_90"): {
        "16bit": ((ANY, Blocks(128, 64, 64, num_warps=8, num_stages=3)),),
        "fp32": ((ANY, Blocks(64, 64, 32, num_warps=8, num_stages=3)),),
    },
    ("topk_sweep_excluding", "sm_100"): {
        "16bit": ((ANY, Blocks(64, 64, 64, num_warps=8, num_stages=3)),),
        "fp32": ((ANY, Blocks(64, 64, 32, num_warps=8, num_stages=3)),),
    },
    ("topk_sweep_excluding", "gfx942"): {
        "16bit": ((ANY, Blocks(128, 64, 32, num_warps=8, num_stages=2)),),
        "fp32": ((ANY, Blocks(64, 64, 32, num_warps=8, num_stages=2)),),
    },
    **{
        ("contrastive_merge", chip): dict.fromkeys(
            ("16bit", "fp32"), ((ANY, Blocks(64, 1, 1, num_warps=2, num_stages=1)),)
        )
        for chip in CHIPS
    },
}
