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

from kernels.contrastive.kernel_tile import (
    cosines,
    exclude_groups,
    exponential_sums,
    has_partner,
    hinge_sums,
    hinge_weights,
    is_partial,
    reaches,
    softmax_weights,
    store_pair,
    store_partners,
    tile_size,
)
from kernels.contrastive.settings import merge_settings, statistics_settings, weights_settings
from kernels.launch import Specialisation
from kernels.rows.kernel import TRITON_DTYPES, numerics_for, product_specialisations, store_weights
from kernels.rows.precision import accumulation_dtype


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
    TILE: tl.constexpr = (ACC, PRECISION, INTERPRET, BLOCK_I, BLOCK_J, BLOCK_D)
    i_block, j_block = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i_offsets, j_offsets = tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_J)
    i_first, j_first = first_row + i_block * BLOCK_I, first_column + j_block * BLOCK_J
    num_i, num_j = tile_size(i_first, j_first, num_rows, num_columns, BLOCK_I, BLOCK_J)
    i_mask, j_mask = i_offsets < num_i, j_offsets < num_j
    cosine = cosines(x_ptr, y_ptr, i_first, j_first, num_i, num_j, dim, EVEN, *TILE)
    partner = offset + i_first - j_first
    if has_partner(partner, BLOCK_I, BLOCK_J):
        cosine = store_partners(cosine, diagonal_ptr, i_first, partner, i_mask, BLOCK_I, BLOCK_J)
    if is_partial(num_i, num_j, BLOCK_I, BLOCK_J):
        cosine = tl.where(i_mask[:, None] & j_mask[None, :], cosine, float("-inf"))

    scale = tl.load(scale_ptr)
    row_max, column_max = tl.max(cosine, 1), tl.max(cosine, 0)
    row_sum, column_sum = exponential_sums(cosine, row_max, column_max, scale)
    row_part_ptr += j_block * row_pitch + i_block * BLOCK_I
    column_part_ptr += i_block * column_pitch + j_block * BLOCK_J
    row_field = tl.num_programs(1).to(tl.int64) * row_pitch
    column_field = tl.num_programs(0).to(tl.int64) * column_pitch
    store_pair(row_part_ptr, row_field, row_max, row_sum, 0, BLOCK_I)
    store_pair(column_part_ptr, column_field, column_max, column_sum, 0, BLOCK_J)
    if ROW_HINGE or COLUMN_HINGE:
        reached = 0
        row_excess, row_active = tl.zeros([BLOCK_I], ACC), tl.zeros([BLOCK_I], ACC)
        column_excess, column_active = tl.zeros([BLOCK_J], ACC), tl.zeros([BLOCK_J], ACC)
        if ROW_HINGE:
            row_threshold = tl.load(row_threshold_ptr + i_first + i_offsets, mask=i_mask, other=float("inf"))
            reached += reaches(row_max, row_sum, row_threshold)
        if COLUMN_HINGE:
            column_threshold = tl.load(column_threshold_ptr + j_first + j_offsets, mask=j_mask, other=float("inf"))
            reached += reaches(column_max, column_sum, column_threshold)
        if reached > 0:
            cosine = exclude_groups(cosine, offset + i_first, j_first, group_rows, BLOCK_I, BLOCK_J)
            if ROW_HINGE:
                row_excess, row_active = hinge_sums(cosine, row_threshold[:, None], 1)
            if COLUMN_HINGE:
                column_excess, column_active = hinge_sums(cosine, column_threshold[None, :], 0)
        if ROW_HINGE:
            store_pair(row_part_ptr, row_field, row_excess, row_active, 2, BLOCK_I)
        if COLUMN_HINGE:
            store_pair(column_part_ptr, column_field, column_excess, column_active, 2, BLOCK_J)


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
    TILE: tl.constexpr = (ACC, PRECISION, INTERPRET, BLOCK_I, BLOCK_J, BLOCK_D)
    i_block, j_block = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i_offsets, j_offsets = tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_J)
    i_first, j_first = first_row + i_block * BLOCK_I, first_column + j_block * BLOCK_J
    num_i, num_j = tile_size(i_first, j_first, num_rows, num_columns, BLOCK_I, BLOCK_J)
    i_mask, j_mask = i_offsets < num_i, j_offsets < num_j
    cosine = cosines(x_ptr, y_ptr, i_first, j_first, num_i, num_j, dim, EVEN, *TILE)
    scale = tl.load(scale_ptr)
    row_terms_ptr += i_first + i_offsets
    column_terms_ptr += j_first + j_offsets
    weight = softmax_weights(
        cosine, scale, row_terms_ptr, column_terms_ptr, shared_ptr, num_rows, num_columns, i_mask, j_mask
    )
    partner = offset + i_first - j_first
    if has_partner(partner, BLOCK_I, BLOCK_J):
        is_partner = (i_offsets + partner.to(tl.int32))[:, None] == j_offsets[None, :]
        weight = tl.where(is_partner, 0.0, weight)
    is_edge = is_partial(num_i, num_j, BLOCK_I, BLOCK_J)
    if is_edge:
        weight = tl.where(i_mask[:, None] & j_mask[None, :], weight, 0.0)
    if WANT_SCALE:
        moment = (cosine - tl.load(origin_ptr)) * weight
        moment = tl.sum(tl.sum(moment, 1).to(tl.float64), 0)
        tl.store(scale_part_ptr + i_block * tl.num_programs(1) + j_block, moment)
    if WANT_WEIGHTS:
        if ROW_HINGE or COLUMN_HINGE:
            hinge_weight = tl.load(hinge_weight_ptr)
            cosine = exclude_groups(cosine, offset + i_first, j_first, group_rows, BLOCK_I, BLOCK_J)
            # What lies beyond the end exceeds no threshold.
            if is_edge:
                cosine = tl.where(i_mask[:, None] & j_mask[None, :], cosine, float("-inf"))
        if ROW_HINGE:
            threshold = tl.load(row_threshold_ptr + i_first + i_offsets, mask=i_mask, other=float("inf"))
            weight += hinge_weights(cosine, threshold[:, None], hinge_weight)
        if COLUMN_HINGE:
            threshold = tl.load(column_threshold_ptr + j_first + j_offsets, mask=j_mask, other=float("inf"))
            weight += hinge_weights(cosine, threshold[None, :], hinge_weight)
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
