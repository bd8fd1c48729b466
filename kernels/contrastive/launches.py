"""The two sweeps of the contrastive loss on Triton: the same calls, meaning and results as `blockwise`.

Both go strip by strip over the cosines. Parts of a strip's statistics are merged before the next; a strip's weights go
to scratch memory, and two products take them to the rows of both towers: one recomputed tile serves both.

Shape letters: `B` rows of this rank, `G` rows of all ranks, `D` embedding, `A` anchors.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.contrastive.blockwise import SHARED_EXPONENT_RANGE, Hinges, Statistics, tiles
from kernels.contrastive.kernel import merge_kernel, statistics_kernel, weights_kernel
from kernels.contrastive.settings import merge_settings, statistics_name, statistics_settings, weights_settings
from kernels.launch import blocks_for, chip_of, num_blocks, require_triton
from kernels.rows.kernel import aligned_rows, first_columns
from kernels.rows.precision import accumulation_dtype
from kernels.rows.scalars import device_scalar
from kernels.rows.strips import Weights, strips

# A strip of the forward sweep: parts of 16 bytes for every row and column of a tile, 96 MiB at most, and launches
# long enough to hide the processor's work between them.
FORWARD_STRIP = 16384


def forward_sweep(
    x_BD: Tensor,
    y_GD: Tensor,
    *,
    scale: float | Tensor,
    offset: int,
    hinges: Hinges,
    row_tile: int | None = None,
    column_tile: int | None = None,
) -> Statistics:
    """As `blockwise.forward_sweep`: one product. The tile arguments are not used, blocks come from `launch`'s table.

    Scratch memory: at most 96 MiB. ValueError where Triton cannot run.
    """
    require_triton("forward_sweep", x_BD.device)
    chip, dtype = chip_of(x_BD.device), accumulation_dtype(x_BD.dtype)
    x_BD, y_GD = aligned_rows(x_BD), aligned_rows(y_GD)
    diagonal_B = x_BD.new_zeros(len(x_BD), dtype=dtype)
    has_hinge = (hinges.row_A is not None, hinges.column_A is not None)
    blocks = blocks_for(statistics_name(*has_hinge), chip, x_BD.dtype, x_BD.shape[1])
    scale_1 = device_scalar(scale, x_BD.device).to(dtype).reshape(1)
    rows = _Axis.of(x_BD, blocks.rows, hinges.row_A, hinges.group_rows)
    columns = _Axis.of(y_GD, blocks.columns, hinges.column_A, hinges.group_rows)
    thresholds = _row_thresholds(hinges, len(x_BD), len(y_GD), scale_1)
    row_part, column_part = rows.parts(columns, dtype), columns.parts(rows, dtype)
    for i0, i1 in tiles(len(x_BD), FORWARD_STRIP, 1) if len(y_GD) else ():
        for j0, j1 in tiles(len(y_GD), FORWARD_STRIP, 1):
            grid = num_blocks(i1 - i0, blocks.rows), num_blocks(j1 - j0, blocks.columns)
            statistics_kernel[grid](
                x_BD,
                y_GD,
                scale_1,
                *thresholds,
                diagonal_B,
                row_part,
                column_part,
                i0,
                j0,
                offset,
                len(x_BD),
                len(y_GD),
                x_BD.shape[1],
                hinges.group_rows,
                rows.pitch,
                columns.pitch,
                **statistics_settings(chip, x_BD.dtype, x_BD.shape[1], rows.has_hinge, columns.has_hinge),
            )
            rows.merge(row_part, scale_1, i0, i1, grid[1], chip, x_BD.dtype)
            columns.merge(column_part, scale_1, j0, j1, grid[0], chip, x_BD.dtype)
    return Statistics(*rows.finished(), *columns.finished(), diagonal_B, *rows.margin, *columns.margin)


def gradient_sweep(
    x_BD: Tensor,
    y_GD: Tensor,
    *,
    scale: float | Tensor,
    offset: int,
    hinges: Hinges,
    row_lse_B: Tensor,
    column_lse_G: Tensor,
    hinge_weight: float | Tensor,
    want_x: bool,
    want_y: bool,
    want_scale: bool,
    cosine_origin: float | Tensor,
    row_tile: int | None = None,
    column_tile: int | None = None,
    row_weight_B: Tensor | None = None,
    column_weight_G: Tensor | None = None,
    gradient_operand: str = "precise",
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """As `blockwise.gradient_sweep`: one recomputed product, and one for each of d x_BD and d y_GD that is wanted.

    gradient_operand: "precise" multiplies 16-bit rows by weights split into two 16-bit numbers, "fast" by rounded ones.
    The tile arguments are not used, blocks come from `launch`'s table. Scratch memory: at most 128 MiB (64 for "fast").
    ValueError where Triton cannot run.
    """
    require_triton("gradient_sweep", x_BD.device)
    chip, dtype, width = chip_of(x_BD.device), accumulation_dtype(x_BD.dtype), x_BD.shape[1]
    x_BD, y_GD = aligned_rows(x_BD), aligned_rows(y_GD)
    dim = x_BD.shape[1]
    dx_BD = torch.zeros_like(x_BD, dtype=dtype) if want_x else None
    dy_GD = torch.zeros_like(y_GD, dtype=dtype) if want_y else None
    scale_parts = [torch.zeros(1, dtype=torch.float64, device=x_BD.device)]
    if len(x_BD) == 0 or len(y_GD) == 0 or not (want_x or want_y or want_scale):
        return first_columns(dx_BD, width), first_columns(dy_GD, width), scale_parts[0][0]
    terms = _softmax_terms(row_lse_B, column_lse_G, row_weight_B, column_weight_G, dtype)
    scalars = [device_scalar(value, x_BD.device).to(dtype).reshape(1) for value in (scale, cosine_origin, hinge_weight)]
    thresholds = _row_thresholds(hinges, len(x_BD), len(y_GD), scalars[0])
    blocks = blocks_for("contrastive_weights", chip, x_BD.dtype, dim)
    weights = Weights.scratch("contrastive_weights", x_BD, y_GD, chip, gradient_operand)
    has_hinge = (hinges.row_A is not None, hinges.column_A is not None)
    settings = weights_settings(chip, x_BD.dtype, dim, *has_hinge, want_scale, want_x or want_y, gradient_operand)
    for rows, columns in strips(len(x_BD), len(y_GD)):
        grid = (
            num_blocks(rows.stop - rows.start, blocks.rows),
            num_blocks(columns.stop - columns.start, blocks.columns),
        )
        scale_parts.append(torch.empty(grid[0] * grid[1], dtype=torch.float64, device=x_BD.device))
        weights_kernel[grid](
            x_BD,
            y_GD,
            *scalars,
            *terms,
            *thresholds,
            weights.high,
            weights.low,
            scale_parts[-1],
            rows.start,
            columns.start,
            offset,
            len(x_BD),
            len(y_GD),
            dim,
            hinges.group_rows,
            weights.stride,
            **settings,
        )
        if dx_BD is not None:
            weights.add_products(y_GD[columns], dx_BD[rows], transposed=False)
        if dy_GD is not None:
            weights.add_products(x_BD[rows], dy_GD[columns], transposed=True)
    scale_sum = torch.cat(scale_parts).sum() if want_scale else scale_parts[0][0]
    return first_columns(dx_BD, width), first_columns(dy_GD, width), scale_sum


@dataclass(frozen=True)
class _Axis:
    """The running float64 statistics of the rows (or of the columns), and how a strip's parts of them are laid out.

    pitch: rows of a strip, in whole blocks. margin: (hinge_A, active_A), empty without thresholds.
    """

    max: Tensor
    sum: Tensor
    margin: tuple[Tensor, Tensor]
    has_hinge: bool
    block: int
    pitch: int
    dim: int
    group_rows: int

    @classmethod
    def of(cls, features: Tensor, block: int, threshold_A: Tensor | None, group_rows: int) -> "_Axis":
        num_rows, num_anchors = len(features), 0 if threshold_A is None else len(threshold_A)
        zeros = [features.new_zeros(size, dtype=torch.float64) for size in (num_rows, num_anchors, num_anchors)]
        pitch = num_blocks(min(num_rows, FORWARD_STRIP), block) * block
        return cls(
            torch.full_like(zeros[0], -torch.inf),
            zeros[0],
            (zeros[1], zeros[2]),
            threshold_A is not None,
            block,
            pitch,
            features.shape[1],
            group_rows,
        )

    def parts(self, other: "_Axis", dtype: torch.dtype) -> Tensor:
        """Scratch memory: (max, sum, hinge, active) by each block of the other axis, for each row of a strip."""
        return self.max.new_empty((4 if self.has_hinge else 2) * (other.pitch // other.block) * self.pitch, dtype=dtype)

    def merge(self, part: Tensor, scale_1: Tensor, first: int, last: int, num_parts: int, chip: str, dtype) -> None:
        blocks = blocks_for("contrastive_merge", chip, dtype, self.dim)
        merge_kernel[(num_blocks(last - first, blocks.rows),)](
            part,
            scale_1,
            self.max,
            self.sum,
            *self.margin,
            first,
            num_parts,
            last - first,
            self.pitch,
            self.group_rows,
            **merge_settings(chip, dtype, self.dim, self.has_hinge),
        )

    def finished(self) -> tuple[Tensor, Tensor]:
        """(max, sum); a hardware maximum passes over NaN, a sum does not."""
        return self.max.masked_fill_(self.sum.isnan(), torch.nan), self.sum


def _row_thresholds(hinges: Hinges, num_rows: int, num_columns: int, unused: Tensor) -> tuple[Tensor, Tensor]:
    """A threshold for each row and column, infinite where it is no anchor, in the dtype of `unused`, which stands for
    none."""
    found = []
    for threshold_A, size in ((hinges.row_A, num_rows), (hinges.column_A, num_columns)):
        rows = unused if threshold_A is None else unused.new_full((size,), torch.inf)
        if threshold_A is not None:
            rows[:: hinges.group_rows] = threshold_A
        found.append(rows)
    return found[0], found[1]


def _softmax_terms(
    row_lse_B: Tensor,
    column_lse_G: Tensor,
    row_weight_B: Tensor | None,
    column_weight_G: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the weights need of the float64 log-sum-exps, in the accumulation dtype: ([3, B], [3, G], is_shared).

    Of a row: the log-sum-exp rounded, the factor that makes up for the rounding, exp(rounded - highest). Of a column:
    the same, but exp(highest - log-sum-exp). Weights enter the factor, of columns the last one too. is_shared: int32
    [1], whether those are within range, so that one exponential serves a row and a column.
    """
    row, column = row_lse_B.to(dtype).double(), column_lse_G.to(dtype).double()
    row_weight_B, column_weight_G = (1.0 if w is None else w for w in (row_weight_B, column_weight_G))
    highest = row.max()
    row_terms = torch.stack([row, torch.exp(row - row_lse_B) * row_weight_B, torch.exp(row - highest)])
    column_factors = [torch.exp(reference - column_lse_G) * column_weight_G for reference in (column, highest)]
    is_shared = (highest - column_lse_G.min() < SHARED_EXPONENT_RANGE).to(torch.int32)
    return row_terms.to(dtype), torch.stack([column, *column_factors]).to(dtype), is_shared.reshape(1)
