"""Both towers' rows side by side as the screening product takes them: rounded, with the rounding's bound and the query's
limit as more columns of the same product.

With r, s the rounded rows of x, y: <x, y> - <r, s> = <x - r, s> + <x, y - s>, at most |x - r| |s| + |x| |y - s| by
Cauchy-Schwarz. Of each tower a query row carries (|x - r|, |x|), a base row (|s|, |y - s| and the share of the sum's own
rounding). A query row also carries minus its limit, a base row ones. So one product gives <r, s> plus the bound minus the
limit: positive wherever the true sum of cosines reaches the limit, and at most twice the bound too high.

Shape letters: `Q` queries, `B` base rows, `D` embedding, `E` embeddings and more columns, padded.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

FLOAT32_ROUNDING = 2.0**-24
BFLOAT16_ROUNDING = 2.0**-8
# Matrix units take this many products at a time.
DEPTH_MULTIPLE = 32
# Rounded together: copies that stay in a processor's cache, of a size that allocators keep at hand.
ROWS_AT_ONCE = 512
# Bounds are never less: what underflows in squares and on matrix units lies below its square.
SMALLEST_BOUND = 2.0**-24
# Of a row that a bound is proven for; unit rows are far below.
LARGEST_NORM = 2.0**16
# A limit in two bfloat16 numbers, then the bounds of each tower.
LIMIT_COLUMNS = 2


@dataclass(frozen=True)
class Operand:
    """Rows for the screening product, and each tower's numbers in its two bound columns, upper bounds float32 [B]."""

    rows_BE: Tensor
    dims: tuple[int, ...]
    bounds: tuple[tuple[Tensor, Tensor], ...]

    def set_limit(self, limit_B: Tensor) -> None:
        """Of query rows, float64: the product is positive wherever the sum of cosines, each times its scale, reaches it."""
        high_B = _rounded_down(limit_B, self.rows_BE.dtype)
        low_B = _rounded_down(limit_B - high_B.double(), self.rows_BE.dtype)
        first = sum(self.dims)
        self.rows_BE[:, first] = -high_B
        self.rows_BE[:, first + 1] = -low_B

    def of_tower(self, tower: int) -> "Operand":
        """One tower's alone, limits as they are."""
        width, first = sum(self.dims), sum(self.dims[:tower])
        bounds = width + LIMIT_COLUMNS + 2 * tower
        parts = (
            self.rows_BE[:, first : first + self.dims[tower]],
            self.rows_BE[:, width : width + LIMIT_COLUMNS],
            self.rows_BE[:, bounds : bounds + 2],
        )
        rows_BE = torch.cat(parts, dim=1)
        rows_BE = F.pad(rows_BE, (0, -rows_BE.shape[1] % DEPTH_MULTIPLE))
        return Operand(rows_BE, (self.dims[tower],), (self.bounds[tower],))


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


def query_operand(towers: Sequence[Tensor], scales: Sequence[Tensor]) -> Operand:
    """Of float32 rows [Q, D], each tower times its scale [Q]; limits are not set yet."""
    order_QE, norms, residuals = _rounded([r * s[:, None] for r, s in zip(towers, scales, strict=True)], 1)
    return _with_bounds(order_QE, towers, list(zip(residuals, norms, strict=True)))


def base_operand(towers: Sequence[Tensor], interleave: int) -> Operand:
    """Of float32 rows [B, D]. Padded with zeros to n rows, a multiple of `interleave`; row i lies at i % interleave *
    (n / interleave) + i // interleave."""
    order_BE, norms, residuals = _rounded(towers, interleave)
    # Any order of summation, and truncation in place of rounding; 2.1 for what limits and bound columns add to a sum of
    # cosines, 40 for these columns and for what rows lost when they were made float32 and scaled.
    summation = 2 * 2.1 * (sum(rows.shape[1] for rows in towers) + 40) * FLOAT32_ROUNDING
    pairs = [(norm_B + lost_B, lost_B + summation * norm_B) for norm_B, lost_B in zip(norms, residuals, strict=True)]
    operand = _with_bounds(order_BE, towers, pairs)
    width = sum(operand.dims)
    operand.rows_BE[:, width : width + LIMIT_COLUMNS] = 1
    return operand


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


def _rounded(towers: Sequence[Tensor], interleave: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """(rows in their order [-1, interleave, E], of each tower norm_B, and norm of what rounding took away_B); more columns
    are zero."""
    num_rows, width = len(towers[0]), sum(rows.shape[1] for rows in towers)
    num_groups = -(-num_rows // interleave)
    depth = width + LIMIT_COLUMNS + 2 * len(towers)
    depth += -depth % DEPTH_MULTIPLE
    dtype, device = operand_dtype(towers[0].device.type), towers[0].device
    order_BE = torch.empty(interleave, num_groups, depth, dtype=dtype, device=device).transpose(0, 1)
    order_BE[:, :, width:].zero_()
    norms, residuals, first = [], [], 0
    for rows_BD in towers:
        dim = rows_BD.shape[1]
        found = _rounded_into(order_BE[:, :, first : first + dim], rows_BD, interleave)
        norms.append(found[0])
        residuals.append(found[1])
        first += dim
    return order_BE, norms, residuals


def _rounded_into(order_BD: Tensor, rows_BD: Tensor, interleave: int) -> tuple[Tensor, Tensor]:
    """(norm_B, norm of what rounding took away_B)."""
    norms, residuals = ([torch.zeros(0, device=rows_BD.device)] for _ in range(2))
    step = ROWS_AT_ONCE // interleave
    for start in range(0, len(order_BD), step):
        exact_BD = rows_BD[start * interleave : (start + step) * interleave]
        norms.append(torch.linalg.vector_norm(exact_BD, dim=1))
        # Rounded in their own order first: what follows is faster on rows without gaps.
        rounded_BD = exact_BD.to(order_BD.dtype)
        # Exact: a number and its neighbour on a coarser grid.
        difference_BD = rounded_BD.to(exact_BD.dtype, copy=True)
        torch.sub(exact_BD, difference_BD, out=difference_BD)
        residuals.append(torch.linalg.vector_norm(difference_BD, dim=1))
        rounded_BD = F.pad(rounded_BD, (0, 0, 0, -len(exact_BD) % interleave))
        order_BD[start : start + step] = rounded_BD.view(-1, interleave, rows_BD.shape[1])
    return torch.cat(norms), torch.cat(residuals)


def _with_bounds(order_BE: Tensor, towers: Sequence[Tensor], pairs: Sequence[tuple[Tensor, Tensor]]) -> Operand:
    dims = tuple(rows.shape[1] for rows in towers)
    # Covers the rounding of norms and of the cast below.
    upward = 1 + 2 * BFLOAT16_ROUNDING + 2 * max(dims) * FLOAT32_ROUNDING
    num_groups, interleave, depth = order_BE.shape
    column, bounds = sum(dims) + LIMIT_COLUMNS, []
    for pair in pairs:
        pair = tuple((values_B * upward).clamp(min=SMALLEST_BOUND) for values_B in pair)
        for values_B in pair:
            padding = (0, num_groups * interleave - len(values_B))
            order_BE[:, :, column] = F.pad(values_B, padding).view(num_groups, interleave)
            column += 1
        # The cast may have rounded either way, by less than this.
        bounds.append(tuple(values_B * (1 + BFLOAT16_ROUNDING) for values_B in pair))
    return Operand(order_BE.transpose(0, 1).view(num_groups * interleave, depth), dims, tuple(bounds))


def _rounded_down(values_B: Tensor, dtype: torch.dtype) -> Tensor:
    """Of numbers of at least zero, the largest of the dtype that are not above."""
    near_B = values_B.to(dtype)
    below_B = torch.nextafter(near_B, torch.zeros_like(near_B))
    return torch.where(near_B.double() > values_B, below_B, near_B)
