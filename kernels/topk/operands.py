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
import torch.nn.functional as F
from torch import Tensor

FLOAT32_ROUNDING = 2.0**-24
BFLOAT16_ROUNDING = 2.0**-8
# Matrix units take this many products at a time.
DEPTH_MULTIPLE = 32
# Converted together: copies that stay in a processor's cache, of a size that allocators keep at hand. A GPU is better
# served by few launches.
ROWS_AT_ONCE, GPU_ROWS_AT_ONCE = 512, 65536
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
    order_QE, norm_Q, residual_Q = _rounded(rows_QD, 1)
    return _bounded(order_QE, rows_QD.shape[1], residual_Q, norm_Q)


def base_operand(rows_BD: Tensor, interleave: int) -> Operand:
    """Padded with zeros to n rows, a multiple of `interleave`; row i lies at i % interleave * (n / interleave) + i //
    interleave."""
    order_BE, norm_B, residual_B = _rounded(rows_BD, interleave)
    # Any order of summation, and truncation in place of rounding; 2 for what the bound columns add.
    summation = 2 * 1.02 * (rows_BD.shape[1] + DEPTH_MULTIPLE) * FLOAT32_ROUNDING
    norm_B = norm_B + residual_B
    return _bounded(order_BE, rows_BD.shape[1], norm_B, residual_B + summation * norm_B)


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


def _rounded(rows_BD: Tensor, interleave: int) -> tuple[Tensor, Tensor, Tensor]:
    """(rows in their order [-1, interleave, E], norm_B, norm of what rounding took away_B); bound columns undefined."""
    num_rows, dim = rows_BD.shape
    num_groups = -(-num_rows // interleave)
    depth = -(-(dim + 2) // DEPTH_MULTIPLE) * DEPTH_MULTIPLE
    dtype, device = operand_dtype(rows_BD.device.type), rows_BD.device
    order_BE = torch.empty(interleave, num_groups, depth, dtype=dtype, device=device).transpose(0, 1)
    order_BE[:, :, dim:].zero_()
    norms, residuals = ([torch.zeros(0, device=device)] for _ in range(2))
    step = (ROWS_AT_ONCE if device.type == "cpu" else GPU_ROWS_AT_ONCE) // interleave
    for start in range(0, num_groups, step):
        exact_BD = rows_BD[start * interleave : (start + step) * interleave]
        exact_BD = exact_BD if exact_BD.dtype == torch.float64 else exact_BD.float()
        norms.append(torch.linalg.vector_norm(exact_BD, dim=1).float())
        # Rounded in their own order first: what follows is faster on rows without gaps.
        rounded_BD = exact_BD.to(dtype)
        # Exact: a number and its neighbour on a coarser grid.
        difference_BD = rounded_BD.to(exact_BD.dtype, copy=True)
        torch.sub(exact_BD, difference_BD, out=difference_BD)
        residuals.append(torch.linalg.vector_norm(difference_BD, dim=1).float())
        rounded_BD = F.pad(rounded_BD, (0, 0, 0, -len(exact_BD) % interleave))
        order_BE[start : start + step, :, :dim] = rounded_BD.view(-1, interleave, dim)
    return order_BE, torch.cat(norms), torch.cat(residuals)


def _bounded(order_BE: Tensor, dim: int, first_B: Tensor, second_B: Tensor) -> Operand:
    # Covers the rounding of norms and of the cast below.
    upward = 1 + 2 * BFLOAT16_ROUNDING + 2 * dim * FLOAT32_ROUNDING
    first_B, second_B = ((values_B * upward).clamp(min=SMALLEST_BOUND) for values_B in (first_B, second_B))
    num_groups, interleave, depth = order_BE.shape
    padding = (0, num_groups * interleave - len(first_B))
    for column, values_B in ((dim, first_B), (dim + 1, second_B)):
        order_BE[:, :, column] = F.pad(values_B, padding).view(num_groups, interleave)
    rows_BE = order_BE.transpose(0, 1).view(num_groups * interleave, depth)
    # The cast may have rounded either way, by less than this.
    return Operand(rows_BE, first_B * (1 + BFLOAT16_ROUNDING), second_B * (1 + BFLOAT16_ROUNDING))
