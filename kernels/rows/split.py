"""Products of a float32 tile of weights with rows: at float32's rate, or faster where the rows are bfloat16 numbers."""

import functools

import torch
from torch import Tensor

from kernels.rows.precision import bfloat16_units

HALF_OF_LAST_BIT, LEADING_BITS = 0x8000, -0x10000


@functools.cache
def has_matrix_tiles() -> bool:
    """Whether this processor multiplies bfloat16 matrices several times as fast as float32 ones (Intel AMX)."""
    return torch.cpu.get_capabilities().get("amx_bf16", False)


class WeightTile:
    """Weights [R, C] float32 to multiply rows with. They are used up: `weight` and `work` are overwritten.

    For bfloat16 rows the weight is split where that pays: rounded to bfloat16 it multiplies exactly on bfloat16 units,
    with float32 sums; the rest, rounded by those units, leaves an error of 2^-18 of each weight.
    """

    def __init__(self, weight: Tensor, work: Tensor, rows_dtype: torch.dtype) -> None:
        self.terms = [weight]
        if rows_dtype == torch.bfloat16 and weight.device.type == "cpu" and has_matrix_tiles():
            # On the bits, in one buffer. A weight that is not a number stays one in the rest.
            torch.add(weight.view(torch.int32), HALF_OF_LAST_BIT, out=work.view(torch.int32)).bitwise_and_(LEADING_BITS)
            self.terms = [work, weight.sub_(work)]

    def add_product(self, out: Tensor, rows_CD: Tensor) -> None:
        """out [R, D] += weights @ rows, all float32."""
        with bfloat16_units(len(self.terms) > 1):
            for term in self.terms:
                out.addmm_(term, rows_CD)

    def add_transposed_product(self, out: Tensor, rows_RD: Tensor) -> None:
        """out [C, D] += weights.T @ rows, all float32."""
        with bfloat16_units(len(self.terms) > 1):
            for term in self.terms:
                out.addmm_(term.T, rows_RD)
