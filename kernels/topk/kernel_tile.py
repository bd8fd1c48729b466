"""What the kernel of the product top-k does with a tile of both cosines, step by step.

Entries are what may reach their query's threshold. Excluded ones have a marker in place of their image cosine, those
too close to a ceiling to tell, inf: they are open.

Shape letters: `I` queries and `J` base rows of a tile.
"""

import triton
import triton.language as tl

from kernels.topk.problem import CAUSES

# Stored in place of a bound: to be decided exactly against the ceilings.
OPEN = -1.0
NO_COLUMN = 2**31 - 1
NOWHERE = tl.constexpr(NO_COLUMN)
IS_OPEN = tl.constexpr(OPEN)
NUM_CAUSES = tl.constexpr(len(CAUSES))
# In place of an excluded entry's image cosine: this for the first cause, twice that for the next, and so on; -inf for
# what is no candidate and does not count. Above MARKED lie cosines.
FIRST_MARKER = tl.constexpr(-(2.0**100))
MARKED = tl.constexpr(-(2.0**99))


@triton.jit
def score(image, text):
    """The clamped product, of cosines or of their upper bounds."""
    return tl.maximum(image, 0.0) * tl.maximum(text, 0.0)


@triton.jit
def mark(image, found, marker: tl.constexpr):
    """The marker in place of the image cosine of entries that are found, and not marked yet."""
    return tl.where(found & (image > MARKED), marker, image)


@triton.jit
def count_marked(image, columns, excluded_ptr, lowest_ptr, out, pitch, mask):
    """Adds a tile's marked entries to the counts of their causes, and to the lowest column of each."""
    # In memory, and in a loop that is not unrolled: registers would be held in tiles that exclude nothing, too.
    marker = FIRST_MARKER
    for _ in range(NUM_CAUSES):
        found = image == marker
        total = tl.load(excluded_ptr + out, mask=mask, other=0) + tl.sum(found.to(tl.int32), 1)
        lowest = tl.load(lowest_ptr + out, mask=mask, other=0)
        lowest = tl.minimum(lowest, tl.min(tl.where(found, columns[None, :], NOWHERE), 1))
        # Rows are a program's own, but several of its threads may hold the same one.
        tl.debug_barrier()
        tl.store(excluded_ptr + out, total, mask=mask)
        tl.store(lowest_ptr + out, lowest, mask=mask)
        tl.debug_barrier()
        excluded_ptr += pitch
        lowest_ptr += pitch
        marker *= 2


@triton.jit
def first_kept(image, text, threshold, columns):
    """Of each query: the first column that may reach the threshold, or is open (an image cosine of inf)."""
    kept = (score(image, text) >= threshold[:, None]) | (image == float("inf"))
    return tl.min(tl.where(kept, columns[None, :], NOWHERE), 1)


@triton.jit
def mark_near(
    image,
    text,
    image_error,
    text_error,
    image_ceiling,
    text_ceiling,
    IMAGE_CEILING: tl.constexpr,
    TEXT_CEILING: tl.constexpr,
):
    """Marks what lies above a ceiling for certain, and opens what may; returns the image bounds."""
    if IMAGE_CEILING:
        image = mark(image, image - 2 * image_error[:, None] > image_ceiling, 4 * FIRST_MARKER)
        image = tl.where(image > image_ceiling, float("inf"), image)
    if TEXT_CEILING:
        # Under which cause an entry counts is open while the earlier cause is.
        near = (text - 2 * text_error[:, None] > text_ceiling) & (image < float("inf"))
        image = mark(image, near, 8 * FIRST_MARKER)
        image = tl.where((text > text_ceiling) & (image > MARKED), float("inf"), image)
    return image


@triton.jit
def store_entries(count, image, text, threshold, columns, columns_ptr, upper_ptr, first_place, capacity):
    """Appends every query's entries to its buffer, as far as that has room; returns the new counts."""
    # One entry of every query at a time: few queries have a second one, and nothing else is as small.
    column = first_kept(image, text, threshold, columns)
    while tl.min(column, 0) < NOWHERE:
        is_chosen = columns[None, :] == column[:, None]
        value = tl.where(image == float("inf"), IS_OPEN, score(image, text))
        value = tl.max(tl.where(is_chosen, value, float("-inf")), 1)
        stored = (column < NOWHERE) & (count < capacity)
        tl.store(columns_ptr + first_place + count, column, mask=stored)
        tl.store(upper_ptr + first_place + count, value, mask=stored)
        count += (column < NOWHERE).to(tl.int32)
        image = tl.where(is_chosen, float("-inf"), image)
        column = first_kept(image, text, threshold, columns)
    return count
