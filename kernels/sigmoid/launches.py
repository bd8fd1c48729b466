"""The sweeps of the sigmoid loss on Triton, over this rank's rows `x` and all ranks' rows `y`: the same calls, meaning
and results as `blockwise`.

Shape letters: `B` rows of this rank, `G` rows of all ranks, `D` embedding.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.launch import blocks_for, chip_of, num_blocks, require_triton
from kernels.rows.kernel import aligned_rows, first_columns
from kernels.rows.precision import accumulation_dtype
from kernels.rows.scalars import device_scalar
from kernels.rows.strips import Weights, strips
from kernels.sigmoid.kernel import negative_sum_kernel, sigmoid_weights_kernel, sum_settings, weight_settings


def negative_sum(
    x_BD: Tensor,
    y_GD: Tensor,
    *,
    scale: float | Tensor,
    bias: float | Tensor,
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
            **sum_settings(launch.chip, x_BD.dtype, launch.dim),
            **launch.options,
        )
        total += sums.sum()
    return total


def gradient_sweep(
    x_BD: Tensor,
    y_GD: Tensor,
    *,
    scale: float | Tensor,
    bias: float | Tensor,
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
    width = x_BD.shape[1]
    dx_BD = torch.zeros_like(launch.x_BD, dtype=dtype) if want_x else None
    dy_GD = torch.zeros_like(launch.y_GD, dtype=dtype) if want_y else None
    totals = torch.zeros(2, dtype=torch.float64, device=x_BD.device)
    if not (want_x or want_y or want_scalars) or 0 in (len(x_BD), len(y_GD)):
        return first_columns(dx_BD, width), first_columns(dy_GD, width), totals[0], totals[1]
    weights = Weights.scratch("sigmoid_weights", x_BD, y_GD, launch.chip, gradient_operand)
    settings = weight_settings(launch.chip, x_BD.dtype, launch.dim, gradient_operand)
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
    return first_columns(dx_BD, width), first_columns(dy_GD, width), totals[0], totals[1]


class _Launch:
    """What the launches of one sweep share."""

    def __init__(
        self, kernel: str, x_BD: Tensor, y_GD: Tensor, scale: float | Tensor, bias: float | Tensor, offset: int
    ):
        self.x_BD, self.y_GD = aligned_rows(x_BD), aligned_rows(y_GD)
        self.dim, self.offset, self.chip = self.x_BD.shape[1], offset, chip_of(x_BD.device)
        self.blocks = blocks_for(kernel, self.chip, x_BD.dtype, self.dim)
        self.options = {"num_warps": self.blocks.num_warps, "num_stages": self.blocks.num_stages}
        # As an argument a Python number would be a float32, also for float64 rows.
        scalars = torch.stack([device_scalar(value, x_BD.device) for value in (scale, bias)])
        self.scalars = scalars.to(accumulation_dtype(x_BD.dtype))

    def grid(self, rows: slice, columns: slice) -> tuple[int, int]:
        return (
            num_blocks(columns.stop - columns.start, self.blocks.columns),
            num_blocks(rows.stop - rows.start, self.blocks.rows),
        )

    def arguments(self, rows: slice, columns: slice, sums: Tensor) -> tuple[Any, ...]:
        """Of a strip: rows, scalars, sums, sizes."""
        x_rows, y_rows = self.x_BD[rows], self.y_GD[columns]
        offset = self.offset + rows.start - columns.start
        return x_rows, y_rows, self.scalars, sums, len(x_rows), len(y_rows), self.dim, offset
