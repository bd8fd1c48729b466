"""Rows as the screening product takes them: rounded, with the rounding's bound as two more columns of the product.

With r, s the rounded rows of x, y: <x, y> - <r, s> = <x - r, s> + <x, y - s>, at most |x - r| |s| + |x| |y - s| by
Cauchy-Schwarz. A query row carries (|x - r|, |x|), a base row (|s|, |y - s| and the share of the sum's own rounding), so
that one product gives <r, s> plus the bound: never below the true cosine, and at most twice the bound above it.

Shape letters: `Q` queries, `B` base rows, `D` embedding, `E` embedding and bound, padded.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

FLOAT32_ROUNDING = 2.0**-24
BFLOAT16_ROUNDING = 2.0**-8
# Matrix units take this many products at a time.
DEPTH_MULTIPLE = 32
# Bounds are never less: what underflows in squares and on matrix units lies below its square.
SMALLEST_BOUND = 2.0**-24
# Of a row that a bound is proven for; unit rows are far below.
LARGEST_NORM = 2.0**16


@dataclass(frozen=True)
class Operand:
    """One tower's rows for the screening product, and the numbers in its bound columns, upper bounds [B] float32."""

    rows_BE: Tensor
    first_B: Tensor
    second_B: Tensor


@functools.cache
def operand_dtype(device_type: str) -> torch.dtype:
    """bfloat16 where the CPU multiplies it natively, at several times the rate of float32."""
    if device_type != "cpu":
        return torch.float32
    capabilities = torch.cpu.get_capabilities()
    fast = any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16", "sve_bf16"))
    return torch.bfloat16 if fast else torch.float32


@contextmanager
def full_float32_products() -> Iterator[None]:
    """The bounds are those of float32 products that round nothing beforehand."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def query_operand(rows_QD: Tensor) -> Operand:
    rounded_QD, norm_Q, residual_Q = _rounded(rows_QD)
    return _operand(rounded_QD, residual_Q, norm_Q)


def base_operand(rows_BD: Tensor) -> Operand:
    rounded_BD, norm_B, residual_B = _rounded(rows_BD)
    # Any order of summation, and truncation in place of rounding; 2 for what the bound columns add.
    summation = 2 * 1.02 * (rows_BD.shape[1] + DEPTH_MULTIPLE) * FLOAT32_ROUNDING
    norm_B = norm_B + residual_B
    return _operand(rounded_BD, norm_B, residual_B + summation * norm_B)


def screening_product(query_RE: Tensor, base_BE: Tensor, out: Tensor) -> Tensor:
    """Fills the bfloat16 `out`: the product in float32, rounded once."""
    if query_RE.dtype == out.dtype:
        return torch.mm(query_RE, base_BE.T, out=out)
    return out.copy_(torch.mm(query_RE, base_BE.T))


def check_rows(norm_B: Tensor, ids_B: Tensor, name: str) -> None:
    """ValueError for a row with NaN or infinity, or far from a unit row."""
    # Not a comparison from above, which NaN would pass.
    bad_B = ~(norm_B <= LARGEST_NORM)
    if bad_B.any():
        raise ValueError(
            f"{name} features must be finite unit rows, but row {int(ids_B[bad_B][0])} holds NaN or infinity, or is longer "
            f"than {LARGEST_NORM:.0f}: leave such pairs out"
        )


def _rounded(rows_BD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(rounded_BD, norm_B, norm of what rounding took away_B)."""
    exact_BD = rows_BD if rows_BD.dtype == torch.float64 else rows_BD.float()
    rounded_BD = exact_BD.to(operand_dtype(rows_BD.device.type))
    norm_B = torch.linalg.vector_norm(exact_BD, dim=1)
    # Exact: a number and its neighbour on a coarser grid. In place, since fresh memory costs more than the difference.
    residual_BD = rounded_BD.to(exact_BD.dtype, copy=True)
    torch.sub(exact_BD, residual_BD, out=residual_BD)
    return rounded_BD, norm_B.float(), torch.linalg.vector_norm(residual_BD, dim=1).float()


def _operand(rounded_BD: Tensor, first_B: Tensor, second_B: Tensor) -> Operand:
    num_rows, dim = rounded_BD.shape
    # Covers the rounding of norms and of the cast below.
    upward = 1 + 2 * BFLOAT16_ROUNDING + 2 * dim * FLOAT32_ROUNDING
    depth = -(-(dim + 2) // DEPTH_MULTIPLE) * DEPTH_MULTIPLE
    rows_BE = rounded_BD.new_zeros(num_rows, depth)
    rows_BE[:, :dim] = rounded_BD
    first_B, second_B = ((values_B * upward).clamp(min=SMALLEST_BOUND) for values_B in (first_B, second_B))
    rows_BE[:, dim], rows_BE[:, dim + 1] = first_B, second_B
    # The cast may have rounded either way, by less than this.
    return Operand(rows_BE, first_B * (1 + BFLOAT16_ROUNDING), second_B * (1 + BFLOAT16_ROUNDING))
