"""What the Triton kernels of the contrastive loss do with a tile of cosines, step by step.

Shape letters: `I` and `J` number a tile's rows and columns, `D` is the embedding.
"""

import triton
import triton.language as tl

from kernels.contrastive.blockwise import SHARED_EXPONENT_RANGE
from kernels.rows.kernel import cosine_tile

SHARED_RANGE = tl.constexpr(SHARED_EXPONENT_RANGE)


@triton.jit
def tile_size(i_first, j_first, num_rows, num_columns, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr):
    """How many of the tile's rows exist, and of its columns."""
    # Numbers within the tile stay int32: a thread holds many of them.
    num_i = tl.minimum(num_rows - i_first, BLOCK_I).to(tl.int32)
    num_j = tl.minimum(num_columns - j_first, BLOCK_J).to(tl.int32)
    return num_i, num_j


@triton.jit
def cosines(
    x_ptr,
    y_ptr,
    i_first,
    j_first,
    num_i,
    num_j,
    dim,
    EVEN: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The tile of x's rows from i_first on and y's from j_first on; beyond the end the last one is read again."""
    x_ptr, y_ptr = x_ptr + i_first * dim, y_ptr + j_first * dim
    i_rows, j_rows = tl.minimum(tl.arange(0, BLOCK_I), num_i - 1), tl.minimum(tl.arange(0, BLOCK_J), num_j - 1)
    return cosine_tile(x_ptr, y_ptr, i_rows, j_rows, dim, EVEN, ACC, PRECISION, INTERPRET, BLOCK_I, BLOCK_J, BLOCK_D)


@triton.jit
def has_partner(partner, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr):
    """Whether the tile holds partners: row i has its own in column partner + i, which may lie outside."""
    return (partner > -BLOCK_I) & (partner < BLOCK_J)


@triton.jit
def store_partners(cosine, diagonal_ptr, i_first, partner, i_mask, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr):
    """Stores the partners' cosines, and takes them out of the tile."""
    i_offsets = tl.arange(0, BLOCK_I)
    partners = i_offsets + partner.to(tl.int32)
    is_partner = partners[:, None] == tl.arange(0, BLOCK_J)[None, :]
    diagonal = tl.sum(tl.where(is_partner, cosine, 0.0), 1)
    inside = i_mask & (partners >= 0) & (partners < BLOCK_J)
    tl.store(diagonal_ptr + i_first + i_offsets, diagonal, mask=inside)
    return tl.where(is_partner, float("-inf"), cosine)


@triton.jit
def is_partial(num_i, num_j, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr):
    """Whether rows or columns of the tile do not exist."""
    return (num_i < BLOCK_I) | (num_j < BLOCK_J)


@triton.jit
def exponentials(cosine, scale, reference):
    """exp(scale * cosine - reference), the exponent rounded once."""
    return tl.exp(tl.fma(cosine, scale, -reference))


@triton.jit
def _reference(maximum, scale):
    """The logit that exponentials are relative to: the greatest; 0 where there is none."""
    return tl.where(maximum == float("-inf"), 0.0, maximum * scale)


@triton.jit
def exponential_sums(cosine, row_max, column_max, scale):
    """(of each row, of each column) the sum of exponentials relative to its own maximum."""
    row_reference, column_reference = _reference(row_max, scale), _reference(column_max, scale)
    # The rows' exponentials serve the columns too, unless the references lie so far apart that something underflows.
    highest = tl.max(tl.where(row_max == float("-inf"), float("-inf"), row_reference), 0)
    lowest = tl.min(tl.where(column_max == float("-inf"), float("inf"), column_reference), 0)
    if highest - lowest < SHARED_RANGE:
        weight = tl.where(row_max == float("-inf"), 0.0, tl.exp(row_reference - highest))
        rescale = tl.where(column_max == float("-inf"), 0.0, tl.exp(highest - column_reference))
        exponential = exponentials(cosine, scale, row_reference[:, None])
        row_sum = tl.sum(exponential, 1)
        column_sum = tl.sum(exponential * weight[:, None], 0) * rescale
    else:
        row_sum = tl.sum(exponentials(cosine, scale, row_reference[:, None]), 1)
        column_sum = tl.sum(exponentials(cosine, scale, column_reference[None, :]), 0)
    return row_sum, column_sum


@triton.jit
def exclude_groups(cosine, i_first, j_first, group_rows, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr):
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


@triton.jit
def reaches(maximum, total, threshold):
    """1 where a threshold may be exceeded: maxima tell of most tiles of a trained model that none is, and sums that no
    NaN hides."""
    return tl.max(tl.where((maximum <= threshold) & (total == total), 0, 1), 0)


@triton.jit
def hinge_sums(cosine, threshold, AXIS: tl.constexpr):
    """(sum of max(0, excess), number of positive ones) along an axis; NaN stays."""
    excess = cosine - threshold
    hinge, active = tl.where(excess <= 0, 0.0, excess), tl.where(excess > 0, 1.0, 0.0)
    return tl.sum(hinge, AXIS), tl.sum(active, AXIS)


@triton.jit
def store_pair(part_ptr, field, first, second, NUMBER: tl.constexpr, BLOCK: tl.constexpr):
    """Two neighbouring fields of the tile's part, from field NUMBER on."""
    offsets = tl.arange(0, BLOCK)
    tl.store(part_ptr + NUMBER * field + offsets, first)
    tl.store(part_ptr + (NUMBER + 1) * field + offsets, second)


@triton.jit
def softmax_weights(cosine, scale, row_terms_ptr, column_terms_ptr, shared_ptr, num_rows, num_columns, i_mask, j_mask):
    """Gradients of both softmaxes by the cosines; the terms of the tile's first row and column lie at the pointers."""
    row_reference = tl.load(row_terms_ptr, mask=i_mask, other=0.0)
    row_correction = tl.load(row_terms_ptr + num_rows, mask=i_mask, other=0.0)
    weight = exponentials(cosine, scale, row_reference[:, None])
    if tl.load(shared_ptr) != 0:
        row_factor = tl.load(row_terms_ptr + 2 * num_rows, mask=i_mask, other=0.0)
        column_factor = tl.load(column_terms_ptr + 2 * num_columns, mask=j_mask, other=0.0)
        weight *= tl.fma(row_factor[:, None], column_factor[None, :], row_correction[:, None])
    else:
        column_reference = tl.load(column_terms_ptr, mask=j_mask, other=0.0)
        column_correction = tl.load(column_terms_ptr + num_columns, mask=j_mask, other=0.0)
        column_weight = exponentials(cosine, scale, column_reference[None, :]) * column_correction[None, :]
        weight = tl.fma(weight, row_correction[:, None], column_weight)
    return weight


@triton.jit
def hinge_weights(cosine, threshold, hinge_weight):
    """The hinge's gradient by the cosines: its weight where the threshold is exceeded."""
    return tl.where(cosine > threshold, hinge_weight, 0.0)
