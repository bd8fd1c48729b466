"""The Triton kernels of the contrastive loss, a tile of a strip of cosines per program; `launches` makes sweeps of them.

The forward kernel reduces its tile to what its rows and its columns need; a second kernel, whose programs own the
rows, folds a strip's parts into the running statistics. The gradient kernel writes its tile of weights (gradients by
cosines) to scratch memory. Nothing is atomic, every number has one writer per launch.

`I` and `J` number a tile's rows and columns, `D` is the embedding.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from kernels.contrastive.blockwise import SHARED_EXPONENT_RANGE
from kernels.contrastive.settings import merge_settings, statistics_settings, weights_settings
from kernels.launch import Specialisation
from kernels.rows.kernel import TRITON_DTYPES, cosine_tile, numerics_for, product_specialisations, store_weights
from kernels.rows.precision import accumulation_dtype

SHARED_RANGE = tl.constexpr(SHARED_EXPONENT_RANGE)


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
        # Maxima tell of most tiles of a trained model that no threshold is exceeded, and sums that no NaN hides.
        reached = 0
        row_excess, row_active = tl.zeros([BLOCK_I], ACC), tl.zeros([BLOCK_I], ACC)
        column_excess, column_active = tl.zeros([BLOCK_J], ACC), tl.zeros([BLOCK_J], ACC)
        if ROW_HINGE:
            row_threshold = tl.load(row_threshold_ptr + i_first + i_offsets, mask=i_mask, other=float("inf"))
            reached += tl.max(tl.where((row_max <= row_threshold) & (row_sum == row_sum), 0, 1), 0)
        if COLUMN_HINGE:
            column_threshold = tl.load(column_threshold_ptr + j_first + j_offsets, mask=j_mask, other=float("inf"))
            reached += tl.max(tl.where((column_max <= column_threshold) & (column_sum == column_sum), 0, 1), 0)
        if reached > 0:
            cosine = _exclude_groups(cosine, offset + i_first, j_first, group_rows, BLOCK_I, BLOCK_J)
            if ROW_HINGE:
                excess, active = _hinge(cosine, row_threshold[:, None])
                row_excess, row_active = tl.sum(excess, 1), tl.sum(active, 1)
            if COLUMN_HINGE:
                excess, active = _hinge(cosine, column_threshold[None, :])
                column_excess, column_active = tl.sum(excess, 0), tl.sum(active, 0)
        if ROW_HINGE:
            tl.store(row_part_ptr + 2 * row_field + i_offsets, row_excess)
            tl.store(row_part_ptr + 3 * row_field + i_offsets, row_active)
        if COLUMN_HINGE:
            tl.store(column_part_ptr + 2 * column_field + j_offsets, column_excess)
            tl.store(column_part_ptr + 3 * column_field + j_offsets, column_active)


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


def specialisations(chip: str, dtype: torch.dtype, dim: int) -> list[Specialisation]:
    """What the two sweeps compile on a chip for rows of this dtype and width: with and without hinges, precise and
    fast."""
    weights = numerics_for(dtype, chip, "precise").weights
    kinds = tuple(TRITON_DTYPES[one] for one in (dtype, weights, accumulation_dtype(dtype)))
    operands = ("precise", "fast")
    found = []
    for has_hinge in (False, True):
        both = (has_hinge, has_hinge)
        found.append(_specialise(statistics_kernel, statistics_settings(chip, dtype, dim, *both), kinds, dim))
        found.append(_specialise(merge_kernel, merge_settings(chip, dtype, dim, has_hinge), kinds, dim))
        for operand in operands if dtype != torch.float64 else operands[:1]:
            settings = weights_settings(chip, dtype, dim, *both, True, True, operand)
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
