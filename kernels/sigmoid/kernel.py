"""Triton sweeps of the sigmoid loss over this rank's rows `x` and all ranks' rows `y`, positives left out.

The same calls as `blockwise`'s. A program forms one tile of logits; its sums leave it as float64, one number for a
program, and its gradient weights go through scratch memory (`kernels.rows.kernel`).

Shape letters: `B` rows of this rank, `G` rows of all ranks, `D` embedding. Row i of `x` is the partner of row `offset
+ i` of `y`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import Specialisation, blocks_for, chip_of, require_triton
from kernels.rows.kernel import (
    TRITON_DTYPES,
    Weights,
    aligned_arguments,
    cosine_tile,
    numerics_for,
    product_specialisations,
    store_weights,
    strips,
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
    cosine = cosine_tile(
        x_ptr + row * dim,
        y_ptr + column * dim,
        tl.minimum(i_offsets, num_x - row - 1).to(tl.int32),
        tl.minimum(j_offsets, num_y - column - 1).to(tl.int32),
        dim,
        EVEN,
        ACC,
        PRECISION,
        INTERPRET,
        BLOCK_I,
        BLOCK_J,
        BLOCK_D,
    )
    bias = tl.where(j_offsets < num_y - column, tl.load(scalars_ptr + 1), float("-inf"))
    logit = cosine * tl.load(scalars_ptr) + bias[None, :]
    # Outside the tile where no row has its partner inside.
    partner = tl.minimum(tl.maximum(offset + row - column, -BLOCK_I), BLOCK_J).to(tl.int32)
    logit = tl.where((i_offsets + partner)[:, None] == j_offsets[None, :], float("-inf"), logit)
    return cosine, logit, i_offsets < num_x - row


@triton.jit
def _total(values, is_row):
    return tl.sum(tl.where(is_row, tl.sum(values, 1), 0.0).to(tl.float64), 0)


@triton.jit
def _program_number():
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


def negative_sum(
    x_BD: Tensor,
    y_GD: Tensor,
    *,
    scale: float,
    bias: float,
    offset: int,
    row_tile: int | None = None,
    column_tile: int | None = None,
) -> Tensor:
    """float64 0-d sum of softplus over the logits off the diagonal; tile sizes come from `kernels.launch` instead."""
    require_triton("sigmoid_contrastive_loss", x_BD.device)
    launch = _Launch("sigmoid_negative_sum", x_BD, y_GD, scale, bias, offset)
    total = torch.zeros((), dtype=torch.float64, device=x_BD.device)
    for rows, columns in strips(len(x_BD), len(y_GD)):
        grid = launch.grid(rows, columns)
        sums = total.new_empty(grid[0] * grid[1])
        negative_sum_kernel[grid](
            *launch.arguments(rows, columns, sums),
            **_sum_settings(launch.chip, x_BD.dtype, launch.dim),
            **launch.options,
        )
        total += sums.sum()
    return total


def gradient_sweep(
    x_BD: Tensor,
    y_GD: Tensor,
    *,
    scale: float,
    bias: float,
    offset: int,
    want_x: bool,
    want_y: bool,
    want_scalars: bool,
    gradient_operand: str = "precise",
    row_tile: int | None = None,
    column_tile: int | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """(sum_j g_ij y_j, sum_i g_ij x_i, sum g_ij cosine_ij, sum g_ij) with g = sigmoid(logit) off the diagonal.

    Unwanted ones are None, or 0 (float64). gradient_operand: "precise" multiplies 16-bit rows with g as the sum of two
    16-bit numbers, "fast" with g rounded to one. Tile sizes come from `kernels.launch` instead.
    """
    require_triton("sigmoid_contrastive_loss", x_BD.device)
    launch = _Launch("sigmoid_weights", x_BD, y_GD, scale, bias, offset)
    dtype = accumulation_dtype(x_BD.dtype)
    dx_BD = launch.x_BD.new_zeros(x_BD.shape, dtype=dtype) if want_x else None
    dy_GD = launch.y_GD.new_zeros(y_GD.shape, dtype=dtype) if want_y else None
    totals = torch.zeros(2, dtype=torch.float64, device=x_BD.device)
    if not (want_x or want_y or want_scalars) or 0 in (len(x_BD), len(y_GD)):
        return dx_BD, dy_GD, totals[0], totals[1]
    weights = Weights.scratch("sigmoid_weights", x_BD, y_GD, launch.chip, gradient_operand)
    settings = _weight_settings(launch.chip, x_BD.dtype, launch.dim, gradient_operand)
    for rows, columns in strips(len(x_BD), len(y_GD)):
        grid = launch.grid(rows, columns)
        sums = totals.new_empty(grid[0] * grid[1], 2)
        x_rows, y_rows, *rest = launch.arguments(rows, columns, sums)
        scalars_and_sums, sizes = rest[:2], rest[2:]
        sigmoid_weights_kernel[grid](
            x_rows,
            y_rows,
            *scalars_and_sums,
            weights.high,
            weights.low,
            *sizes,
            weights.stride,
            **settings,
            **launch.options,
        )
        if want_scalars:
            totals += sums.sum(0)
        if dx_BD is not None:
            weights.add_products(y_rows, dx_BD[rows], transposed=False)
        if dy_GD is not None:
            weights.add_products(x_rows, dy_GD[columns], transposed=True)
    return dx_BD, dy_GD, totals[0], totals[1]


class _Launch:
    """What the launches of one sweep share."""

    def __init__(self, kernel: str, x_BD: Tensor, y_GD: Tensor, scale: float, bias: float, offset: int):
        # Kernels address rows without gaps.
        self.x_BD, self.y_GD = x_BD.contiguous(), y_GD.contiguous()
        self.dim, self.offset, self.chip = x_BD.shape[1], offset, chip_of(x_BD.device)
        self.blocks = blocks_for(kernel, self.chip, x_BD.dtype, self.dim)
        self.options = {"num_warps": self.blocks.num_warps, "num_stages": self.blocks.num_stages}
        # As an argument a Python number would be a float32, also for float64 rows.
        self.scalars = x_BD.new_tensor([scale, bias], dtype=accumulation_dtype(x_BD.dtype))

    def grid(self, rows: slice, columns: slice) -> tuple[int, int]:
        return (
            triton.cdiv(columns.stop - columns.start, self.blocks.columns),
            triton.cdiv(rows.stop - rows.start, self.blocks.rows),
        )

    def arguments(self, rows: slice, columns: slice, sums: Tensor) -> tuple[Any, ...]:
        """Of a strip: rows, scalars, sums, sizes."""
        x_rows, y_rows = self.x_BD[rows], self.y_GD[columns]
        offset = self.offset + rows.start - columns.start
        return x_rows, y_rows, self.scalars, sums, len(x_rows), len(y_rows), self.dim, offset


def _sum_settings(chip: str, dtype: torch.dtype, dim: int) -> dict[str, Any]:
    terms = SERIES_TERMS[accumulation_dtype(dtype)]
    return {"TERMS": terms, **tile_settings("sigmoid_negative_sum", chip, dtype, dim)}


def _weight_settings(chip: str, dtype: torch.dtype, dim: int, gradient_operand: str) -> dict[str, Any]:
    numerics = numerics_for(dtype, chip, gradient_operand)
    return {
        "SPLIT": numerics.split,
        **tile_settings("sigmoid_weights", chip, dtype, dim),
    }


def specialisations(chip: str, dtype: torch.dtype, dim: int) -> list[Specialisation]:
    """What `negative_sum` and `gradient_sweep`, precise and fast, compile for rows of width `dim`."""
    rows, total = (f"*{TRITON_DTYPES[kind]}" for kind in (dtype, accumulation_dtype(dtype)))
    pointers = {"x_ptr": rows, "y_ptr": rows, "scalars_ptr": total, "sum_ptr": "*fp64"}
    sizes = dict.fromkeys(("num_x", "num_y", "dim", "offset"), "i32")
    sum_signature = pointers | sizes
    weights = f"*{TRITON_DTYPES[numerics_for(dtype, chip, 'precise').weights]}"
    weight_signature = pointers | {"high_ptr": weights, "low_ptr": weights} | sizes | {"stride": "i32"}
    found = [_specialisation(negative_sum_kernel, sum_signature, _sum_settings(chip, dtype, dim), chip, dtype, dim)]
    for gradient_operand in ("precise", "fast"):
        settings = _weight_settings(chip, dtype, dim, gradient_operand)
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
