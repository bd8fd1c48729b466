"""The Triton kernels of the sigmoid loss over rows `x` and `y`, positives left out; `launches` makes sweeps of them.

A program forms one tile of logits; its sums leave it as float64, one number for a program, and its gradient weights go
through scratch memory (`kernels.rows.strips`). Row i of `x` is the partner of row `offset + i` of `y`.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from kernels.launch import Specialisation, blocks_for
from kernels.rows.kernel import (
    TRITON_DTYPES,
    aligned_arguments,
    cosine_tile,
    numerics_for,
    product_specialisations,
    store_weights,
    tile_settings,
)
from kernels.rows.precision import accumulation_dtype

# Of log1p's series in z = u / (2 + u) <= 1/3: what is left out is below a float32's, or a float64's, last digit.
SERIES_TERMS = {torch.float32: 8, torch.float64: 17}


@triton.jit
def _log1p(u, TERMS: tl.constexpr):
    """log(1 + u) for u in [0, 1] to full relative accuracy: 2 artanh(u / (2 + u))."""
    z = u / (2.0 + u)
    square = z * z
    series = square * 0.0 + 1.0 / (2 * TERMS - 1)
    for term in tl.static_range(1, TERMS):
        series = series * square + 1.0 / (2 * (TERMS - term) - 1)
    return 2.0 * z * series


@triton.jit
def _logit_tile(
    x_ptr,
    y_ptr,
    scalars_ptr,
    num_x,
    num_y,
    dim,
    offset,
    EVEN: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(cosine, logit, whether a row exists) of this program's tile, the logit -inf where the loss doesn't count the
    column."""
    row = tl.program_id(1).to(tl.int64) * BLOCK_I
    column = tl.program_id(0).to(tl.int64) * BLOCK_J
    i_offsets, j_offsets = tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_J)
    # Beyond the last row the last one is read again, and not counted.
    x_ptr, y_ptr = x_ptr + row * dim, y_ptr + column * dim
    i_rows = tl.minimum(i_offsets, num_x - row - 1).to(tl.int32)
    j_rows = tl.minimum(j_offsets, num_y - column - 1).to(tl.int32)
    cosine = cosine_tile(x_ptr, y_ptr, i_rows, j_rows, dim, EVEN, ACC, PRECISION, INTERPRET, BLOCK_I, BLOCK_J, BLOCK_D)
    bias = tl.where(j_offsets < num_y - column, tl.load(scalars_ptr + 1), float("-inf"))
    logit = cosine * tl.load(scalars_ptr) + bias[None, :]
    # Outside the tile where no row has its partner inside.
    partner = tl.minimum(tl.maximum(offset + row - column, -BLOCK_I), BLOCK_J).to(tl.int32)
    logit = tl.where((i_offsets + partner)[:, None] == j_offsets[None, :], float("-inf"), logit)
    return cosine, logit, i_offsets < num_x - row


@triton.jit
def _total(values, is_row):
    """Sum over the rows that exist, of rows in float64."""
    return tl.sum(tl.where(is_row, tl.sum(values, 1), 0.0).to(tl.float64), 0)


@triton.jit
def _program_number():
    """Of this program in the launch, its tiles counted row by row."""
    return tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)


@triton.jit(do_not_specialize=["num_x", "num_y", "offset"])
def negative_sum_kernel(
    x_ptr,
    y_ptr,
    scalars_ptr,
    sum_ptr,
    num_x,
    num_y,
    dim,
    offset,
    TERMS: tl.constexpr,
    EVEN: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """sum[program] = sum of softplus(logit) over the pairs of the program's tile that the loss counts."""
    _, logit, is_row = _logit_tile(
        x_ptr, y_ptr, scalars_ptr, num_x, num_y, dim, offset, EVEN, ACC, PRECISION, INTERPRET, BLOCK_I, BLOCK_J, BLOCK_D
    )
    softplus = tl.maximum(logit, 0.0) + _log1p(tl.exp(-tl.abs(logit)), TERMS)
    tl.store(sum_ptr + _program_number(), _total(softplus, is_row))


@triton.jit(do_not_specialize=["num_x", "num_y", "offset"])
def sigmoid_weights_kernel(
    x_ptr,
    y_ptr,
    scalars_ptr,
    sum_ptr,
    high_ptr,
    low_ptr,
    num_x,
    num_y,
    dim,
    offset,
    stride,
    SPLIT: tl.constexpr,
    EVEN: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Stores sigmoid(logit), 0 for columns that are not counted, and (sum of weight * cosine, sum of weight) of the program's tile."""
    cosine, logit, is_row = _logit_tile(
        x_ptr, y_ptr, scalars_ptr, num_x, num_y, dim, offset, EVEN, ACC, PRECISION, INTERPRET, BLOCK_I, BLOCK_J, BLOCK_D
    )
    # exp of what is not positive never overflows.
    small = tl.exp(-tl.abs(logit))
    weight = tl.where(logit >= 0, 1.0, small) / (1.0 + small)
    program = _program_number()
    tl.store(sum_ptr + 2 * program, _total(weight * cosine, is_row))
    tl.store(sum_ptr + 2 * program + 1, _total(weight, is_row))
    row, column = tl.program_id(1).to(tl.int64) * BLOCK_I, tl.program_id(0).to(tl.int64) * BLOCK_J
    store_weights(weight, high_ptr, low_ptr, row, column, stride, SPLIT, INTERPRET, BLOCK_I, BLOCK_J)


def sum_settings(chip: str, dtype: torch.dtype, dim: int) -> dict[str, Any]:
    terms = SERIES_TERMS[accumulation_dtype(dtype)]
    return {"TERMS": terms, **tile_settings("sigmoid_negative_sum", chip, dtype, dim)}


def weight_settings(chip: str, dtype: torch.dtype, dim: int, gradient_operand: str) -> dict[str, Any]:
    numerics = numerics_for(dtype, chip, gradient_operand)
    return {
        "SPLIT": numerics.split,
        **tile_settings("sigmoid_weights", chip, dtype, dim),
    }


def specialisations(chip: str, dtype: torch.dtype, dim: int) -> list[Specialisation]:
    """What both sweeps, precise and fast, compile for rows of width `dim`."""
    rows, total = (f"*{TRITON_DTYPES[kind]}" for kind in (dtype, accumulation_dtype(dtype)))
    pointers = {"x_ptr": rows, "y_ptr": rows, "scalars_ptr": total, "sum_ptr": "*fp64"}
    sizes = dict.fromkeys(("num_x", "num_y", "dim", "offset"), "i32")
    sum_signature = pointers | sizes
    weights = f"*{TRITON_DTYPES[numerics_for(dtype, chip, 'precise').weights]}"
    weight_signature = pointers | {"high_ptr": weights, "low_ptr": weights} | sizes | {"stride": "i32"}
    found = [_specialisation(negative_sum_kernel, sum_signature, sum_settings(chip, dtype, dim), chip, dtype, dim)]
    for gradient_operand in ("precise", "fast"):
        settings = weight_settings(chip, dtype, dim, gradient_operand)
        found.append(_specialisation(sigmoid_weights_kernel, weight_signature, settings, chip, dtype, dim))
    return [*found, *product_specialisations(chip, dtype, dim)]


def _specialisation(function, signature, constexprs, chip, dtype, dim) -> Specialisation:
    kernel = "sigmoid_negative_sum" if function is negative_sum_kernel else "sigmoid_weights"
    blocks = blocks_for(kernel, chip, dtype, dim)
    return Specialisation(
        kernel=kernel,
        function=function,
        signature=signature,
        constexprs=constexprs,
        aligned=aligned_arguments(signature, dim),
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
    )
