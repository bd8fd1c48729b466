"""Strip by strip over the gradients: a strip's weights in scratch memory, and their products with rows.

Shape letters: `B` rows of x, `G` rows of y, `D` embedding, `I` rows of a result, `K` rows that a product sums over.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.launch import blocks_for, num_blocks
from kernels.rows.kernel import add_products_kernel, numerics_for, product_blocks, product_settings

# Rows of x and of y whose weights exist at once: 128 MiB for two 16-bit halves, and enough output tiles to fill a GPU.
# The strip's rows of x and y, 24 MiB at D = 1024, stay in the second-level cache meanwhile.
STRIP_ROWS = 4096
STRIP_COLUMNS = 8192


def strips(num_x: int, num_y: int) -> Iterator[tuple[slice, slice]]:
    """Rows of x and of y, strip by strip, in the order that fixes the bits of every sum."""
    for i0 in range(0, num_x, STRIP_ROWS):
        for j0 in range(0, num_y, STRIP_COLUMNS):
            yield slice(i0, min(i0 + STRIP_ROWS, num_x)), slice(j0, min(j0 + STRIP_COLUMNS, num_y))


@dataclass
class Weights:
    """Scratch memory for one strip's weights: [rows, columns], padded to whole tiles; `low` is `high` unless split."""

    high: Tensor
    low: Tensor
    chip: str
    gradient_operand: str

    @classmethod
    def scratch(cls, kernel: str, x_BD: Tensor, y_GD: Tensor, chip: str, gradient_operand: str) -> "Weights":
        """For the strips of x_BD and y_GD, whose weights `kernel` writes in whole tiles."""
        dtype, dim = x_BD.dtype, x_BD.shape[1]
        blocks, products = blocks_for(kernel, chip, dtype, dim), product_blocks(chip, dtype, dim)
        # Summed over, an axis is read as far as it was written; otherwise in blocks, whose surplus is not stored.
        shape = [
            num_blocks(min(len(rows), most), max(tile, products.rows)) * max(tile, products.rows)
            for rows, most, tile in ((x_BD, STRIP_ROWS, blocks.rows), (y_GD, STRIP_COLUMNS, blocks.columns))
        ]
        numerics = numerics_for(dtype, chip, gradient_operand)
        high = x_BD.new_empty(shape, dtype=numerics.weights)
        return cls(high, torch.empty_like(high) if numerics.split else high, chip, gradient_operand)

    @property
    def stride(self) -> int:
        return self.high.stride(0)

    def add_products(self, rows_KD: Tensor, out_ID: Tensor, *, transposed: bool) -> None:
        """out_ID += weights @ rows_KD, or the transposed weights, in place; out_ID in the accumulation dtype."""
        dim = rows_KD.shape[1]
        settings = product_settings(self.chip, rows_KD.dtype, dim, self.gradient_operand, transposed)
        blocks = product_blocks(self.chip, rows_KD.dtype, dim)
        grid = (num_blocks(dim, blocks.columns), num_blocks(len(out_ID), blocks.rows))
        add_products_kernel[grid](
            self.high,
            self.low,
            rows_KD,
            out_ID,
            len(out_ID),
            len(rows_KD),
            dim,
            self.stride,
            **settings,
            num_warps=blocks.num_warps,
            num_stages=blocks.num_stages,
        )
