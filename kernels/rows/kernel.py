"""Triton pieces that sweeps share: a tile of cosines, and the product of stored gradient weights with rows.

A gradient sweep goes strip by strip: one kernel of the operation writes the strip's weights (gradients by the cosines)
to scratch memory, `add_products` multiplies them with rows (`strips`). Every element of a result belongs to one program of a
launch, and strips follow one another, so the same bits come out on every run.

Shape letters in comments: `I` rows of x, `J` rows of y, `D` embedding. Row numbers inside a tile and cells inside a
strip are int32, everything that grows with the batch is int64.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import INTERPRETER, Blocks, Specialisation, blocks_for
from kernels.rows.precision import accumulation_dtype

# Of numbers in a row: a compiler knows of such rows that every one starts where a wide load may.
WIDTH_MULTIPLE = 16
TRITON_DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}


@dataclass(frozen=True)
class Numerics:
    """How products are formed on a chip for rows of one dtype.

    accumulator: what sums are kept in. cosine_precision, weight_precision: of float32 products, in Triton's words.
    weights: what weights are stored as. split: whether a weight is the sum of two such numbers.
    """

    accumulator: tl.dtype
    cosine_precision: str
    weight_precision: str
    weights: torch.dtype
    split: bool


def numerics_for(dtype: torch.dtype, chip: str, gradient_operand: str) -> Numerics:
    """Of float32 operands, NVIDIA's matrix units make three TF32 products (one, if "fast"); AMD's multiply float32.

    float16 rows get float32 weights: small weights lie below float16's exponents, and large ones beyond.
    """
    is_precise, on_nvidia = gradient_operand == "precise", chip.startswith("sm_")
    weights = torch.float32 if dtype == torch.float16 else dtype
    return Numerics(
        accumulator=tl.float64 if dtype == torch.float64 else tl.float32,
        cosine_precision="tf32x3" if on_nvidia and dtype == torch.float32 else "ieee",
        weight_precision=("tf32x3" if is_precise else "tf32") if on_nvidia and weights == torch.float32 else "ieee",
        weights=weights,
        split=is_precise and weights == torch.bfloat16,
    )


@triton.jit
def cosine_tile(
    x_ptr,
    y_ptr,
    x_rows,
    y_rows,
    dim,
    EVEN: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """x[x_rows] @ y[y_rows].T as [BLOCK_I, BLOCK_J] in ACC; the rows are int32, counted from the pointers, and exist."""
    cosine = tl.zeros([BLOCK_I, BLOCK_J], ACC)
    d_offsets = tl.arange(0, BLOCK_D)
    x_cells = x_rows[:, None] * dim + d_offsets[None, :]
    y_cells = y_rows[:, None] * dim + d_offsets[None, :]
    for d in range(0, dim, BLOCK_D):
        if EVEN:
            x_block = tl.load(x_ptr + x_cells)
            y_block = tl.load(y_ptr + y_cells)
        else:
            d_mask = (d_offsets < dim - d)[None, :]
            x_block = tl.load(x_ptr + x_cells, mask=d_mask, other=0.0)
            y_block = tl.load(y_ptr + y_cells, mask=d_mask, other=0.0)
        # The interpreter multiplies the bit patterns of bfloat16 operands.
        if INTERPRET:
            x_block, y_block = x_block.to(ACC), y_block.to(ACC)
        cosine = tl.dot(x_block, tl.trans(y_block), cosine, input_precision=PRECISION, out_dtype=ACC)
        x_ptr += BLOCK_D
        y_ptr += BLOCK_D
    return cosine


@triton.jit
def _halves(tile, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr):
    """A tile's columns in two parts."""
    return tl.split(tl.permute(tl.reshape(tile, (BLOCK_I, 2, BLOCK_J // 2)), (0, 2, 1)))


@triton.jit
def quarters(tile, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr):
    """A tile's columns in four parts: what is formed of one part at a time needs a quarter of the registers."""
    left, right = _halves(tile, BLOCK_I, BLOCK_J)
    first, second = _halves(left, BLOCK_I, BLOCK_J // 2)
    third, fourth = _halves(right, BLOCK_I, BLOCK_J // 2)
    return first, second, third, fourth


@triton.jit
def _rounded(weight, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """To the nearest number of the dtype, on the interpreter too."""
    # The interpreter cuts bfloat16 off where a GPU rounds to nearest even; of a number without the bits that it cuts
    # off, nothing is lost.
    if INTERPRET and dtype == tl.bfloat16:
        bits = weight.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        weight = bits.to(tl.float32, bitcast=True)
    return weight.to(dtype)


@triton.jit
def store_weights(
    weight, high_ptr, low_ptr, row, column, stride, SPLIT: tl.constexpr, INTERPRET: tl.constexpr, BLOCK_I, BLOCK_J
):
    """A tile of weights to scratch memory, as one number or as a rounded one and the rest of it."""
    first = row * stride + column
    cells = tl.arange(0, BLOCK_I)[:, None] * stride + tl.arange(0, BLOCK_J)[None, :]
    high = _rounded(weight, high_ptr.dtype.element_ty, INTERPRET)
    tl.store(high_ptr + first + cells, high)
    if SPLIT:
        tl.store(low_ptr + first + cells, _rounded(weight - high.to(weight.dtype), high.dtype, INTERPRET))


@triton.jit
def _add_in_quarters(
    total, out_ptr, first, num_out, dim, EVEN: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Adds this program's columns of `total` to the rows of `out` from `first` on."""
    i_offsets = tl.arange(0, BLOCK_I)
    out_ptr += first * dim
    parts = quarters(total, BLOCK_I, BLOCK_D)
    for part in tl.static_range(4):
        d_part = tl.program_id(0) * BLOCK_D + part * (BLOCK_D // 4) + tl.arange(0, BLOCK_D // 4)
        out_cells = i_offsets[:, None] * dim + d_part[None, :]
        out_mask = (i_offsets < num_out - first)[:, None]
        if not EVEN:
            out_mask = out_mask & (d_part < dim)[None, :]
        before = tl.load(out_ptr + out_cells, mask=out_mask, other=0.0)
        tl.store(out_ptr + out_cells, before + parts[part], mask=out_mask)


@triton.jit(do_not_specialize=["num_out", "num_inner"])
def add_products_kernel(
    high_ptr,
    low_ptr,
    rows_ptr,
    out_ptr,
    num_out,
    num_inner,
    dim,
    stride,
    TRANSPOSED: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[i, :] += sum over k of weight[i, k] (weight[k, i] if TRANSPOSED) * rows[k, :]; weights are zero-padded."""
    first = tl.program_id(1).to(tl.int64) * BLOCK_I
    i_offsets = tl.arange(0, BLOCK_I)
    k_offsets = tl.arange(0, BLOCK_K)
    d_offsets = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    row_cells = k_offsets[:, None] * dim + d_offsets[None, :]
    if TRANSPOSED:
        cells = k_offsets[:, None] * stride + i_offsets[None, :]
        first_cell, step = first, stride * BLOCK_K
    else:
        cells = i_offsets[:, None] * stride + k_offsets[None, :]
        first_cell, step = first * stride, BLOCK_K
    high_ptr += first_cell
    low_ptr += first_cell
    # From zero in every strip: a matrix unit that cuts its sums off would shrink what is there at every step.
    total = tl.zeros([BLOCK_I, BLOCK_D], ACC)
    for k in range(0, num_inner, BLOCK_K):
        # Rows beyond the strip are masked although their weights are zero: zero times NaN is not.
        mask = (k_offsets < num_inner - k)[:, None]
        if not EVEN:
            mask = mask & (d_offsets < dim)[None, :]
        rows = tl.load(rows_ptr + row_cells, mask=mask, other=0.0)
        high = tl.load(high_ptr + cells)
        rows = rows.to(high.dtype)
        if INTERPRET:
            rows, high = rows.to(ACC), high.to(ACC)
        if TRANSPOSED:
            high = tl.trans(high)
        total = tl.dot(high, rows, total, input_precision=PRECISION, out_dtype=ACC)
        if SPLIT:
            low = tl.load(low_ptr + cells)
            if INTERPRET:
                low = low.to(ACC)
            if TRANSPOSED:
                low = tl.trans(low)
            total = tl.dot(low, rows, total, input_precision=PRECISION, out_dtype=ACC)
        rows_ptr += BLOCK_K * dim
        high_ptr += step
        low_ptr += step
    _add_in_quarters(total, out_ptr, first, num_out, dim, EVEN, BLOCK_I, BLOCK_D)


def aligned_rows(rows_ND: Tensor) -> Tensor:
    """The rows without gaps, zeros appended up to a multiple of WIDTH_MULTIPLE columns: they change no product, and other
    widths cost a kernel its wide loads and its registers."""
    missing = -rows_ND.shape[1] % WIDTH_MULTIPLE
    return F.pad(rows_ND, (0, missing)) if missing else rows_ND.contiguous()


def first_columns(rows_ND: Tensor | None, width: int) -> Tensor | None:
    """What belongs to the rows before `aligned_rows`; None stays None."""
    return None if rows_ND is None else rows_ND[:, :width].contiguous()


def tile_settings(kernel: str, chip: str, dtype: torch.dtype, dim: int) -> dict[str, Any]:
    """Constexprs of a kernel that forms cosine tiles."""
    blocks, numerics = blocks_for(kernel, chip, dtype, dim), numerics_for(dtype, chip, "precise")
    return {
        "EVEN": dim % blocks.depth == 0,
        "ACC": numerics.accumulator,
        "PRECISION": numerics.cosine_precision,
        "INTERPRET": chip == INTERPRETER,
        "BLOCK_I": blocks.rows,
        "BLOCK_J": blocks.columns,
        "BLOCK_D": blocks.depth,
    }


def product_blocks(chip: str, dtype: torch.dtype, dim: int) -> Blocks:
    """For rows of this dtype; what counts is what their weights are stored as."""
    return blocks_for("add_products", chip, numerics_for(dtype, chip, "precise").weights, dim)


def product_settings(
    chip: str, dtype: torch.dtype, dim: int, gradient_operand: str, transposed: bool
) -> dict[str, Any]:
    """Constexprs of `add_products_kernel`."""
    blocks, numerics = product_blocks(chip, dtype, dim), numerics_for(dtype, chip, gradient_operand)
    return {
        "TRANSPOSED": transposed,
        "SPLIT": numerics.split,
        "EVEN": dim % blocks.columns == 0,
        "ACC": numerics.accumulator,
        "PRECISION": numerics.weight_precision,
        "INTERPRET": chip == INTERPRETER,
        "BLOCK_I": blocks.rows,
        "BLOCK_D": blocks.columns,
        "BLOCK_K": blocks.depth,
    }


def product_specialisations(chip: str, dtype: torch.dtype, dim: int) -> list[Specialisation]:
    """What `Weights.add_products` compiles: own rows and the other tower's, precise and fast."""
    kinds = (dtype, numerics_for(dtype, chip, "precise").weights, accumulation_dtype(dtype))
    rows, weights, total = (f"*{TRITON_DTYPES[kind]}" for kind in kinds)
    signature = {"high_ptr": weights, "low_ptr": weights, "rows_ptr": rows, "out_ptr": total}
    signature |= dict.fromkeys(("num_out", "num_inner", "dim", "stride"), "i32")
    blocks = product_blocks(chip, dtype, dim)
    return [
        Specialisation(
            kernel="add_products",
            function=add_products_kernel,
            signature=signature,
            constexprs=product_settings(chip, dtype, dim, gradient_operand, transposed),
            aligned=aligned_arguments(signature, dim),
            num_warps=blocks.num_warps,
            num_stages=blocks.num_stages,
        )
        for gradient_operand in ("precise", "fast")
        for transposed in (False, True)
    ]


def aligned_arguments(signature: dict[str, str], dim: int) -> tuple[str, ...]:
    """Pointers from torch's allocator, the scratch memory's stride, and a width that is a multiple of 16."""
    names = [name for name, kind in signature.items() if kind.startswith("*") or name == "stride"]
    return tuple(names + ["dim"] * (dim % 16 == 0))
