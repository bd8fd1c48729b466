"""The two sweeps of the contrastive loss on Triton: the same calls, meaning and results as `blockwise`.

Both go strip by strip over the cosines, one tile of a strip per program. The forward kernel reduces its tile to what
its rows and its columns need; a second kernel, whose programs own the rows, folds a strip's parts into the running
statistics. The gradient kernel writes its tile of weights (gradients by cosines) to scratch memory, and two products
take them to the rows of both towers: one recomputed tile serves both. Nothing is atomic, every number has one writer
per launch.

Shape letters: `B` rows of this rank, `G` rows of all ranks, `D` embedding, `A` anchors, `S` rows or columns of a
strip, `K` blocks of a strip. In kernels `I` and `J` number a tile's rows and columns.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.contrastive.blockwise import (
    SHARED_EXPONENT_RANGE,
    Hinges,
    Statistics,
    accumulation_dtype,
    tiles,
)
from kernels.launch import Specialisation, blocks_for, chip_of, require_triton
from kernels.rows.kernel import (
    TRITON_DTYPES,
    Weights,
    cosine_tile,
    numerics_for,
    product_specialisations,
    store_weights,
    strips,
    tile_settings,
)

# A strip of the forward sweep: parts of 16 bytes for every row and column of a tile, 96 MiB at most, and launches
# long enough to hide the processor's work between them.
FORWARD_STRIP = 16384
SHARED_RANGE = tl.constexpr(SHARED_EXPONENT_RANGE)
# Contraction would replace a rounded product, whose bits are a statistic's reference, by an unrounded one.
COMPILE_OPTIONS = {"enable_fp_fusion": False}


@triton.jit
def _hinge(cosine, threshold):
    """max(0, excess), and where it is positive; NaN stays."""
    excess = cosine - threshold
    return tl.where(excess <= 0, 0.0, excess), tl.where(excess > 0, 1.0, 0.0)


@triton.jit
def _exclude_groups(cosine, i_first, j_first, group_rows, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr):
    """Takes the pairs of one group out of the hinge's reach; rows are counted over all ranks."""
    # Most tiles hold no such pair, and skip the comparison.
    i_group, j_group = i_first // group_rows, j_first // group_rows
    i_last, j_last = (i_first + BLOCK_I - 1) // group_rows, (j_first + BLOCK_J - 1) // group_rows
    if (i_group <= j_last) & (j_group <= i_last):
        i_groups = (tl.arange(0, BLOCK_I) + (i_first % group_rows).to(tl.int32)) // group_rows
        j_groups = (tl.arange(0, BLOCK_J) + (j_first % group_rows).to(tl.int32)) // group_rows
        i_groups += (i_group - j_group).to(tl.int32)
        cosine = tl.where(i_groups[:, None] == j_groups[None, :], float("-inf"), cosine)
    return cosine


@triton.jit(do_not_specialize=["first_row", "first_column", "offset", "num_rows", "num_columns", "group_rows"])
def statistics_kernel(
    x_ptr,
    y_ptr,
    scale_ptr,
    row_threshold_ptr,
    column_threshold_ptr,
    diagonal_ptr,
    row_part_ptr,
    column_part_ptr,
    first_row,
    first_column,
    offset,
    num_rows,
    num_columns,
    dim,
    group_rows,
    row_pitch,
    column_pitch,
    ROW_HINGE: tl.constexpr,
    COLUMN_HINGE: tl.constexpr,
    EVEN: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A tile's (max, sum of exponentials, hinge, active) of each row into row_part[:, column block, row of the strip],
    of each column into column_part[:, row block, column of the strip]."""
    i_block, j_block = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i_offsets, j_offsets = tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_J)
    i_first, j_first = first_row + i_block * BLOCK_I, first_column + j_block * BLOCK_J
    # Numbers within the tile stay int32: a thread holds many of them.
    i_count = tl.minimum(num_rows - i_first, BLOCK_I).to(tl.int32)
    j_count = tl.minimum(num_columns - j_first, BLOCK_J).to(tl.int32)
    i_mask, j_mask = i_offsets < i_count, j_offsets < j_count
    # Rows beyond the end read the last one: their cosines are masked below.
    cosine = cosine_tile(
        x_ptr + i_first * dim,
        y_ptr + j_first * dim,
        tl.minimum(i_offsets, i_count - 1),
        tl.minimum(j_offsets, j_count - 1),
        dim,
        EVEN,
        ACC,
        PRECISION,
        INTERPRET,
        BLOCK_I,
        BLOCK_J,
        BLOCK_D,
    )
    partner = offset + i_first - j_first
    if (partner > -BLOCK_I) & (partner < BLOCK_J):
        partners = i_offsets + partner.to(tl.int32)
        is_partner = partners[:, None] == j_offsets[None, :]
        diagonal = tl.sum(tl.where(is_partner, cosine, 0.0), 1)
        inside = i_mask & (partners >= 0) & (partners < BLOCK_J)
        tl.store(diagonal_ptr + i_first + i_offsets, diagonal, mask=inside)
        cosine = tl.where(is_partner, float("-inf"), cosine)
    if (i_count < BLOCK_I) | (j_count < BLOCK_J):
        cosine = tl.where(i_mask[:, None] & j_mask[None, :], cosine, float("-inf"))

    scale = tl.load(scale_ptr)
    row_max, column_max = tl.max(cosine, 1), tl.max(cosine, 0)
    row_reference = tl.where(row_max == float("-inf"), 0.0, row_max * scale)
    column_reference = tl.where(column_max == float("-inf"), 0.0, column_max * scale)
    # The rows' exponentials serve the columns too, unless the references lie so far apart that something underflows.
    highest = tl.max(tl.where(row_max == float("-inf"), float("-inf"), row_reference), 0)
    lowest = tl.min(tl.where(column_max == float("-inf"), float("inf"), column_reference), 0)
    if highest - lowest < SHARED_RANGE:
        weight = tl.where(row_max == float("-inf"), 0.0, tl.exp(row_reference - highest))
        rescale = tl.where(column_max == float("-inf"), 0.0, tl.exp(highest - column_reference))
        exponential = tl.exp(tl.fma(cosine, scale, -row_reference[:, None]))
        row_sum = tl.sum(exponential, 1)
        column_sum = tl.sum(exponential * weight[:, None], 0) * rescale
    else:
        row_sum = tl.sum(tl.exp(tl.fma(cosine, scale, -row_reference[:, None])), 1)
        column_sum = tl.sum(tl.exp(tl.fma(cosine, scale, -column_reference[None, :])), 0)

    row_part_ptr += j_block * row_pitch + i_block * BLOCK_I
    column_part_ptr += i_block * column_pitch + j_block * BLOCK_J
    row_field = tl.num_programs(1).to(tl.int64) * row_pitch
    column_field = tl.num_programs(0).to(tl.int64) * column_pitch
    tl.store(row_part_ptr + i_offsets, row_max)
    tl.store(row_part_ptr + row_field + i_offsets, row_sum)
    tl.store(column_part_ptr + j_offsets, column_max)
    tl.store(column_part_ptr + column_field + j_offsets, column_sum)
    if ROW_HINGE or COLUMN_HINGE:
        cosine = _exclude_groups(cosine, offset + i_first, j_first, group_rows, BLOCK_I, BLOCK_J)
    if ROW_HINGE:
        threshold = tl.load(row_threshold_ptr + i_first + i_offsets, mask=i_mask, other=float("inf"))
        excess, active = _hinge(cosine, threshold[:, None])
        tl.store(row_part_ptr + 2 * row_field + i_offsets, tl.sum(excess, 1))
        tl.store(row_part_ptr + 3 * row_field + i_offsets, tl.sum(active, 1))
    if COLUMN_HINGE:
        threshold = tl.load(column_threshold_ptr + j_first + j_offsets, mask=j_mask, other=float("inf"))
        excess, active = _hinge(cosine, threshold[None, :])
        tl.store(column_part_ptr + 2 * column_field + j_offsets, tl.sum(excess, 0))
        tl.store(column_part_ptr + 3 * column_field + j_offsets, tl.sum(active, 0))


@triton.jit(do_not_specialize=["first", "num_parts", "num_rows", "group_rows"])
def merge_kernel(
    part_ptr,
    scale_ptr,
    max_ptr,
    sum_ptr,
    hinge_ptr,
    active_ptr,
    first,
    num_parts,
    num_rows,
    pitch,
    group_rows,
    HINGE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Fold a strip's parts of rows first, first + 1, ... into their float64 statistics."""
    strip_rows = tl.program_id(0).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)
    rows = first + strip_rows
    mask = strip_rows < num_rows
    field = num_parts.to(tl.int64) * pitch
    scale = tl.load(scale_ptr)
    part_ptr += strip_rows
    old_max = tl.load(max_ptr + rows, mask=mask, other=0.0).to(ACC)
    new_max = old_max
    for k in range(num_parts):
        new_max = tl.maximum(new_max, tl.load(part_ptr + k * pitch, mask=mask, other=0.0))
    reference = tl.where(new_max == float("-inf"), 0.0, new_max * scale)
    total = tl.load(sum_ptr + rows, mask=mask, other=0.0) * tl.exp(old_max * scale - reference).to(tl.float64)
    for k in range(num_parts):
        part_max = tl.load(part_ptr + k * pitch, mask=mask, other=0.0)
        part_sum = tl.load(part_ptr + k * pitch + field, mask=mask, other=0.0)
        total += part_sum.to(tl.float64) * tl.exp(part_max * scale - reference).to(tl.float64)
    tl.store(max_ptr + rows, new_max.to(tl.float64), mask=mask)
    tl.store(sum_ptr + rows, total, mask=mask)
    if HINGE:
        anchors = rows // group_rows
        mask = mask & (rows % group_rows == 0)
        hinge = tl.load(hinge_ptr + anchors, mask=mask, other=0.0)
        active = tl.load(active_ptr + anchors, mask=mask, other=0.0)
        for k in range(num_parts):
            hinge += tl.load(part_ptr + k * pitch + 2 * field, mask=mask, other=0.0).to(tl.float64)
            active += tl.load(part_ptr + k * pitch + 3 * field, mask=mask, other=0.0).to(tl.float64)
        tl.store(hinge_ptr + anchors, hinge, mask=mask)
        tl.store(active_ptr + anchors, active, mask=mask)


@triton.jit(do_not_specialize=["first_row", "first_column", "offset", "num_rows", "num_columns", "group_rows"])
def weights_kernel(
    x_ptr,
    y_ptr,
    scale_ptr,
    origin_ptr,
    hinge_weight_ptr,
    row_terms_ptr,
    column_terms_ptr,
    shared_ptr,
    row_threshold_ptr,
    column_threshold_ptr,
    high_ptr,
    low_ptr,
    scale_part_ptr,
    first_row,
    first_column,
    offset,
    num_rows,
    num_columns,
    dim,
    group_rows,
    stride,
    ROW_HINGE: tl.constexpr,
    COLUMN_HINGE: tl.constexpr,
    WANT_SCALE: tl.constexpr,
    WANT_WEIGHTS: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A tile's gradients by cosines into scratch memory, zero outside the matrix and on the diagonal, and the sum of
    (cosine - origin) * softmax gradient into scale_part[program]."""
    i_block, j_block = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i_offsets, j_offsets = tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_J)
    i_first, j_first = first_row + i_block * BLOCK_I, first_column + j_block * BLOCK_J
    # Numbers within the tile stay int32: a thread holds many of them.
    i_count = tl.minimum(num_rows - i_first, BLOCK_I).to(tl.int32)
    j_count = tl.minimum(num_columns - j_first, BLOCK_J).to(tl.int32)
    i_mask, j_mask = i_offsets < i_count, j_offsets < j_count
    cosine = cosine_tile(
        x_ptr + i_first * dim,
        y_ptr + j_first * dim,
        tl.minimum(i_offsets, i_count - 1),
        tl.minimum(j_offsets, j_count - 1),
        dim,
        EVEN,
        ACC,
        PRECISION,
        INTERPRET,
        BLOCK_I,
        BLOCK_J,
        BLOCK_D,
    )
    scale = tl.load(scale_ptr)
    row_terms_ptr += i_first + i_offsets
    column_terms_ptr += j_first + j_offsets
    row_reference = tl.load(row_terms_ptr, mask=i_mask, other=0.0)
    row_correction = tl.load(row_terms_ptr + num_rows, mask=i_mask, other=0.0)
    weight = tl.exp(tl.fma(cosine, scale, -row_reference[:, None]))
    if tl.load(shared_ptr) != 0:
        row_factor = tl.load(row_terms_ptr + 2 * num_rows, mask=i_mask, other=0.0)
        column_factor = tl.load(column_terms_ptr + 2 * num_columns, mask=j_mask, other=0.0)
        weight *= tl.fma(row_factor[:, None], column_factor[None, :], row_correction[:, None])
    else:
        column_reference = tl.load(column_terms_ptr, mask=j_mask, other=0.0)
        column_correction = tl.load(column_terms_ptr + num_columns, mask=j_mask, other=0.0)
        column_weight = tl.exp(tl.fma(cosine, scale, -column_reference[None, :])) * column_correction[None, :]
        weight = tl.fma(weight, row_correction[:, None], column_weight)

    partner = offset + i_first - j_first
    if (partner > -BLOCK_I) & (partner < BLOCK_J):
        is_partner = (i_offsets + partner.to(tl.int32))[:, None] == j_offsets[None, :]
        weight = tl.where(is_partner, 0.0, weight)
    is_edge = (i_count < BLOCK_I) | (j_count < BLOCK_J)
    if is_edge:
        weight = tl.where(i_mask[:, None] & j_mask[None, :], weight, 0.0)
    if WANT_SCALE:
        moment = (cosine - tl.load(origin_ptr)) * weight
        moment = tl.sum(tl.sum(moment, 1).to(tl.float64), 0)
        tl.store(scale_part_ptr + i_block * tl.num_programs(1) + j_block, moment)
    if WANT_WEIGHTS:
        if ROW_HINGE or COLUMN_HINGE:
            hinge_weight = tl.load(hinge_weight_ptr)
            cosine = _exclude_groups(cosine, offset + i_first, j_first, group_rows, BLOCK_I, BLOCK_J)
            # What lies beyond the end exceeds no threshold.
            if is_edge:
                cosine = tl.where(i_mask[:, None] & j_mask[None, :], cosine, float("-inf"))
        if ROW_HINGE:
            threshold = tl.load(row_threshold_ptr + i_first + i_offsets, mask=i_mask, other=float("inf"))
            weight += tl.where(cosine > threshold[:, None], hinge_weight, 0.0)
        if COLUMN_HINGE:
            threshold = tl.load(column_threshold_ptr + j_first + j_offsets, mask=j_mask, other=float("inf"))
            weight += tl.where(cosine > threshold[None, :], hinge_weight, 0.0)
        store_weights(
            weight, high_ptr, low_ptr, i_block * BLOCK_I, j_block * BLOCK_J, stride, SPLIT, INTERPRET, BLOCK_I, BLOCK_J
        )


def forward_sweep(
    x_BD: Tensor,
    y_GD: Tensor,
    *,
    scale: float,
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
    x_BD, y_GD = x_BD.contiguous(), y_GD.contiguous()
    diagonal_B = x_BD.new_zeros(len(x_BD), dtype=dtype)
    blocks = blocks_for("contrastive_statistics", chip, x_BD.dtype, x_BD.shape[1])
    scale_1 = torch.full((1,), scale, dtype=dtype, device=x_BD.device)
    rows = _Axis.of(x_BD, blocks.rows, hinges.row_A, hinges.group_rows)
    columns = _Axis.of(y_GD, blocks.columns, hinges.column_A, hinges.group_rows)
    thresholds = _row_thresholds(hinges, len(x_BD), len(y_GD), scale_1)
    row_part, column_part = rows.parts(columns, dtype), columns.parts(rows, dtype)
    for i0, i1 in tiles(len(x_BD), FORWARD_STRIP, 1) if len(y_GD) else ():
        for j0, j1 in tiles(len(y_GD), FORWARD_STRIP, 1):
            grid = triton.cdiv(i1 - i0, blocks.rows), triton.cdiv(j1 - j0, blocks.columns)
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
                **_statistics_settings(chip, x_BD.dtype, x_BD.shape[1], rows.has_hinge, columns.has_hinge),
            )
            rows.merge(row_part, scale_1, i0, i1, grid[1], chip, x_BD.dtype)
            columns.merge(column_part, scale_1, j0, j1, grid[0], chip, x_BD.dtype)
    return Statistics(*rows.finished(), *columns.finished(), diagonal_B, *rows.margin, *columns.margin)


def gradient_sweep(
    x_BD: Tensor,
    y_GD: Tensor,
    *,
    scale: float,
    offset: int,
    hinges: Hinges,
    row_lse_B: Tensor,
    column_lse_G: Tensor,
    hinge_weight: float,
    want_x: bool,
    want_y: bool,
    want_scale: bool,
    cosine_origin: float,
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
    chip, dtype, dim = chip_of(x_BD.device), accumulation_dtype(x_BD.dtype), x_BD.shape[1]
    x_BD, y_GD = x_BD.contiguous(), y_GD.contiguous()
    dx_BD = torch.zeros_like(x_BD, dtype=dtype) if want_x else None
    dy_GD = torch.zeros_like(y_GD, dtype=dtype) if want_y else None
    scale_sum = torch.zeros((), dtype=torch.float64, device=x_BD.device)
    if len(x_BD) == 0 or len(y_GD) == 0 or not (want_x or want_y or want_scale):
        return dx_BD, dy_GD, scale_sum
    terms = _softmax_terms(row_lse_B, column_lse_G, row_weight_B, column_weight_G, dtype)
    # Filled on the device: a tensor made of Python numbers would wait for it.
    scalars = [
        torch.full((1,), value, dtype=dtype, device=x_BD.device) for value in (scale, cosine_origin, hinge_weight)
    ]
    thresholds = _row_thresholds(hinges, len(x_BD), len(y_GD), scalars[0])
    blocks = blocks_for("contrastive_weights", chip, x_BD.dtype, dim)
    weights = Weights.scratch("contrastive_weights", x_BD, y_GD, chip, gradient_operand)
    has_hinge = (hinges.row_A is not None, hinges.column_A is not None)
    settings = _weights_settings(chip, x_BD.dtype, dim, *has_hinge, want_scale, want_x or want_y, gradient_operand)
    for rows, columns in strips(len(x_BD), len(y_GD)):
        grid = (
            triton.cdiv(rows.stop - rows.start, blocks.rows),
            triton.cdiv(columns.stop - columns.start, blocks.columns),
        )
        scale_part = torch.empty(grid, dtype=torch.float64, device=x_BD.device)
        weights_kernel[grid](
            x_BD,
            y_GD,
            *scalars,
            *terms,
            *thresholds,
            weights.high,
            weights.low,
            scale_part,
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
        if want_scale:
            scale_sum += scale_part.sum()
        if dx_BD is not None:
            weights.add_products(y_GD[columns], dx_BD[rows], transposed=False)
        if dy_GD is not None:
            weights.add_products(x_BD[rows], dy_GD[columns], transposed=True)
    return dx_BD, dy_GD, scale_sum


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
        pitch = triton.cdiv(min(num_rows, FORWARD_STRIP), block) * block
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
        merge_kernel[(triton.cdiv(last - first, blocks.rows),)](
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
            **_merge_settings(chip, dtype, self.dim, self.has_hinge),
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


def specialisations(chip: str, dtype: torch.dtype, dim: int) -> list[Specialisation]:
    """What the two sweeps compile on a chip for rows of this dtype and width: with and without hinges, precise and
    fast."""
    weights = numerics_for(dtype, chip, "precise").weights
    kinds = tuple(TRITON_DTYPES[one] for one in (dtype, weights, accumulation_dtype(dtype)))
    operands = ("precise", "fast")
    found = []
    for has_hinge in (False, True):
        both = (has_hinge, has_hinge)
        found.append(_specialise(statistics_kernel, _statistics_settings(chip, dtype, dim, *both), kinds, dim))
        found.append(_specialise(merge_kernel, _merge_settings(chip, dtype, dim, has_hinge), kinds, dim))
        for operand in operands if dtype != torch.float64 else operands[:1]:
            settings = _weights_settings(chip, dtype, dim, *both, True, True, operand)
            found.append(_specialise(weights_kernel, settings, kinds, dim))
    return found + product_specialisations(chip, dtype, dim)


def _specialise(kernel, settings: dict[str, Any], kinds: tuple[str, ...], dim: int) -> Specialisation:
    """`kinds`: of features, weights, and what is summed, which most pointers lead to."""
    features, weights, total = kinds
    other_kinds = {"x_ptr": features, "y_ptr": features, "high_ptr": weights, "low_ptr": weights, "shared_ptr": "i32"}
    other_kinds |= dict.fromkeys(("scale_part_ptr", "max_ptr", "sum_ptr", "hinge_ptr", "active_ptr"), "fp64")
    names = [name for name in kernel.arg_names if name not in settings]
    signature = {name: f"*{other_kinds.get(name, total)}" if name.endswith("_ptr") else "i32" for name in names}
    options = dict(settings)
    return Specialisation(
        kernel=kernel.fn.__name__.removesuffix("_kernel"),
        function=kernel,
        signature=signature,
        constexprs={name: options.pop(name) for name in kernel.arg_names if name in settings},
        # Multiples of 16, as scratch memory and pitches in whole blocks always are.
        aligned=tuple(
            name for name in names if name.endswith(("_ptr", "pitch", "stride")) or (name == "dim" and dim % 16 == 0)
        ),
        num_warps=options.pop("num_warps"),
        num_stages=options.pop("num_stages"),
        options=options,
    )


def _statistics_settings(
    chip: str, dtype: torch.dtype, dim: int, row_hinge: bool, column_hinge: bool
) -> dict[str, Any]:
    return {
        "ROW_HINGE": row_hinge,
        "COLUMN_HINGE": column_hinge,
        **tile_settings("contrastive_statistics", chip, dtype, dim),
        **_launch_settings("contrastive_statistics", chip, dtype, dim),
    }


def _merge_settings(chip: str, dtype: torch.dtype, dim: int, has_hinge: bool) -> dict[str, Any]:
    return {
        "HINGE": has_hinge,
        "ACC": numerics_for(dtype, chip, "precise").accumulator,
        "BLOCK_I": blocks_for("contrastive_merge", chip, dtype, dim).rows,
        **_launch_settings("contrastive_merge", chip, dtype, dim),
    }


def _weights_settings(
    chip: str,
    dtype: torch.dtype,
    dim: int,
    row_hinge: bool,
    column_hinge: bool,
    want_scale: bool,
    want_weights: bool,
    gradient_operand: str,
) -> dict[str, Any]:
    numerics = numerics_for(dtype, chip, gradient_operand)
    return {
        "ROW_HINGE": row_hinge,
        "COLUMN_HINGE": column_hinge,
        "WANT_SCALE": want_scale,
        "WANT_WEIGHTS": want_weights,
        "SPLIT": numerics.split,
        **tile_settings("contrastive_weights", chip, dtype, dim),
        **_launch_settings("contrastive_weights", chip, dtype, dim),
    }


def _launch_settings(kernel: str, chip: str, dtype: torch.dtype, dim: int) -> dict[str, Any]:
    blocks = blocks_for(kernel, chip, dtype, dim)
    return {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages, **COMPILE_OPTIONS}
