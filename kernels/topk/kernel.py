"""The kernel of the product top-k on Triton: a block of base rows against all queries, in one launch.

A program owns some queries and walks over a part of the block's columns: both products of a tile, upper bounds on the
cosines and on their clamped product, and the entries that may reach their query's threshold behind one another into the
query's part of a buffer, which it alone writes to. Duplicates are left out and counted on the way; a similarity
too close to a ceiling to tell is handed on as an open entry. A buffer counts on beyond its end, so that a launch that
needs a larger one shows.

Shape letters: `Q` queries, `N` base rows of the block, `C` causes, `P` parts of the block, `M` capacity. `I` and `J` number
a tile's queries and base rows.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import Specialisation, blocks_for
from kernels.rows.kernel import TRITON_DTYPES, aligned_arguments, cosine_tile, tile_settings
from kernels.rows.precision import accumulation_dtype
from kernels.topk.kernel_tile import FIRST_MARKER, count_marked, mark, mark_near, score, store_entries

# Of a program of `exact_kernel`.
EXACT_ENTRIES, EXACT_DEPTH, EXACT_WARPS = 16, 128, 4
FLAGS = ("IMAGE_GROUP", "TEXT_GROUP", "IMAGE_CEILING", "TEXT_CEILING", "VALID")


@triton.jit(do_not_specialize=["num_queries", "num_columns", "part_columns", "capacity"])
def sweep_kernel(
    query_image_ptr,
    query_text_ptr,
    base_image_ptr,
    base_text_ptr,
    row_ptr,
    ceilings_ptr,
    self_ptr,
    query_image_group_ptr,
    query_text_group_ptr,
    base_image_group_ptr,
    base_text_group_ptr,
    valid_ptr,
    columns_ptr,
    upper_ptr,
    count_ptr,
    excluded_ptr,
    lowest_ptr,
    num_queries,
    num_columns,
    part_columns,
    image_dim,
    text_dim,
    capacity,
    IMAGE_GROUP: tl.constexpr,
    TEXT_GROUP: tl.constexpr,
    IMAGE_CEILING: tl.constexpr,
    TEXT_CEILING: tl.constexpr,
    VALID: tl.constexpr,
    IMAGE_EVEN: tl.constexpr,
    TEXT_EVEN: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Entries of program (i, p)'s queries with part p of the columns: columns_ptr and upper_ptr [Q, P, M], count_ptr
    [Q, P] counts those that find no place too; excluded_ptr and lowest_ptr [C, Q, P]."""
    TILE: tl.constexpr = (ACC, PRECISION, INTERPRET, BLOCK_I, BLOCK_J, BLOCK_D)
    part = tl.program_id(1).to(tl.int64)
    i_first = tl.program_id(0).to(tl.int64) * BLOCK_I
    i_offsets, j_offsets = tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_J)
    i_count = tl.minimum(num_queries - i_first, BLOCK_I).to(tl.int32)
    i_mask, i_rows = i_offsets < i_count, tl.minimum(i_offsets, i_count - 1)
    row_ptr += i_first + i_offsets
    # No entry of a query beyond the end reaches infinity.
    threshold = tl.load(row_ptr, mask=i_mask, other=float("inf"))
    image_error = tl.load(row_ptr + num_queries, mask=i_mask, other=0.0)
    text_error = tl.load(row_ptr + 2 * num_queries, mask=i_mask, other=0.0)
    own_column = tl.load(self_ptr + i_first + i_offsets, mask=i_mask, other=-1)
    image_ceiling, text_ceiling = tl.load(ceilings_ptr), tl.load(ceilings_ptr + 1)
    if IMAGE_GROUP:
        query_image_group = tl.load(query_image_group_ptr + i_first + i_offsets, mask=i_mask, other=0)
    if TEXT_GROUP:
        query_text_group = tl.load(query_text_group_ptr + i_first + i_offsets, mask=i_mask, other=0)
    query_image_ptr += i_first * image_dim
    query_text_ptr += i_first * text_dim
    first_cell = (i_first * tl.num_programs(1) + part) * capacity
    columns_ptr += first_cell
    upper_ptr += first_cell
    # Within a program's cells int32 suffices: a thread holds many of them.
    first_place = i_offsets * (tl.num_programs(1) * capacity)
    count = tl.zeros([BLOCK_I], tl.int32)
    # Place in [Q, P], and the distance of causes.
    first_out = i_first * tl.num_programs(1) + part
    out = i_offsets * tl.num_programs(1)
    pitch = num_queries.to(tl.int64) * tl.num_programs(1)

    base_image_ptr += part * part_columns * image_dim
    base_text_ptr += part * part_columns * text_dim
    # Columns of a block are int32, cells of its rows may not be.
    first = tl.program_id(1) * part_columns
    end = tl.minimum(first + part_columns, num_columns)
    for j_first in range(first, end, BLOCK_J):
        j_count = tl.minimum(end - j_first, BLOCK_J)
        j_mask, j_rows = j_offsets < j_count, tl.minimum(j_offsets, j_count - 1)
        columns = j_first + j_offsets
        image = cosine_tile(query_image_ptr, base_image_ptr, i_rows, j_rows, image_dim, IMAGE_EVEN, *TILE)
        text = cosine_tile(query_text_ptr, base_text_ptr, i_rows, j_rows, text_dim, TEXT_EVEN, *TILE)
        image += image_error[:, None]
        text += text_error[:, None]
        present = j_mask
        if VALID:
            present = j_mask & (tl.load(valid_ptr + j_first + j_offsets, mask=j_mask, other=0) != 0)
        relevant = score(image, text) >= threshold[:, None]
        if IMAGE_GROUP:
            image_group = tl.load(base_image_group_ptr + j_first + j_offsets, mask=j_mask, other=0)
            same_image = query_image_group[:, None] == image_group[None, :]
            relevant = relevant | same_image
        if TEXT_GROUP:
            text_group = tl.load(base_text_group_ptr + j_first + j_offsets, mask=j_mask, other=0)
            same_text = query_text_group[:, None] == text_group[None, :]
            relevant = relevant | same_text
        if IMAGE_CEILING:
            relevant = relevant | (image > image_ceiling)
        if TEXT_CEILING:
            relevant = relevant | (text > text_ceiling)
        # Most tiles hold nothing of interest and end here.
        if tl.max(tl.max((relevant & present[None, :]).to(tl.int32), 1), 0) > 0:
            other = present[None, :] & i_mask[:, None] & (columns[None, :] != own_column[:, None])
            image = tl.where(other, image, float("-inf"))
            if IMAGE_GROUP:
                image = mark(image, same_image, FIRST_MARKER)
            if TEXT_GROUP:
                image = mark(image, same_text, 2 * FIRST_MARKER)
            image = mark_near(
                image, text, image_error, text_error, image_ceiling, text_ceiling, IMAGE_CEILING, TEXT_CEILING
            )
            if IMAGE_GROUP or TEXT_GROUP or IMAGE_CEILING or TEXT_CEILING:
                count_marked(image, columns, excluded_ptr + first_out, lowest_ptr + first_out, out, pitch, i_mask)
            count = store_entries(count, image, text, threshold, columns, columns_ptr, upper_ptr, first_place, capacity)
        base_image_ptr += BLOCK_J * image_dim
        base_text_ptr += BLOCK_J * text_dim

    tl.store(count_ptr + first_out + out, count, mask=i_mask)


def sweep_settings(chip: str, dtype: torch.dtype, image_dim: int, text_dim: int, **flags: bool) -> dict[str, Any]:
    """Constexprs and options of `sweep_kernel`."""
    # Exclusions need registers, so their tiles are smaller.
    name = "topk_sweep_excluding" if any(flags[flag] for flag in FLAGS[:-1]) else "topk_sweep"
    blocks = blocks_for(name, chip, dtype, max(image_dim, text_dim))
    settings = tile_settings(name, chip, dtype, max(image_dim, text_dim))
    del settings["EVEN"]
    even = {"IMAGE_EVEN": image_dim % blocks.depth == 0, "TEXT_EVEN": text_dim % blocks.depth == 0}
    return {**flags, **even, **settings, "num_warps": blocks.num_warps, "num_stages": blocks.num_stages}


@triton.jit(do_not_specialize=["num_entries"])
def exact_kernel(
    query_ptr,
    base_ptr,
    row_ptr,
    id_ptr,
    out_ptr,
    num_entries,
    dim,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[s] = <query[row[s]], base[id[s]]> in float64, summed in an order that depends on the width alone."""
    entries = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    mask = entries < num_entries
    query_ptr += tl.load(row_ptr + entries, mask=mask, other=0)[:, None] * dim
    base_ptr += tl.load(id_ptr + entries, mask=mask, other=0)[:, None] * dim
    d_offsets = tl.arange(0, BLOCK_D)[None, :]
    total = tl.zeros([BLOCK_S, BLOCK_D], tl.float64)
    for d in range(0, dim, BLOCK_D):
        d_mask = d_offsets < dim - d
        query = _double(tl.load(query_ptr + d + d_offsets, mask=d_mask, other=0.0))
        total += query * _double(tl.load(base_ptr + d + d_offsets, mask=d_mask, other=0.0))
    tl.store(out_ptr + entries, tl.sum(total, 1), mask=mask)


@triton.jit
def _double(values):
    # The interpreter converts 16 bits to float64 by way of their pattern.
    if values.dtype == tl.float64:
        return values
    return values.to(tl.float32).to(tl.float64)


def exact_products(query_QD: Tensor, base_ND: Tensor, rows_S: Tensor, ids_S: Tensor) -> Tensor:
    """float64 [S] dot products of query rows_S with base row ids_S, both int64; any float dtypes."""
    out_S = torch.empty(len(rows_S), dtype=torch.float64, device=rows_S.device)
    exact_kernel[(triton.cdiv(len(rows_S), EXACT_ENTRIES),)](
        query_QD.contiguous(),
        base_ND.contiguous(),
        rows_S,
        ids_S,
        out_S,
        len(rows_S),
        query_QD.shape[1],
        BLOCK_S=EXACT_ENTRIES,
        BLOCK_D=EXACT_DEPTH,
        num_warps=EXACT_WARPS,
        num_stages=1,
    )
    return out_S


def specialisations(chip: str, dtype: torch.dtype, dim: int) -> list[Specialisation]:
    """What a search compiles for towers of this width: with nothing but the query itself excluded, and with
    everything."""
    rows, total = (f"*{TRITON_DTYPES[kind]}" for kind in (dtype, accumulation_dtype(dtype)))
    names = sweep_kernel.arg_names
    pointers = dict.fromkeys((name for name in names if name.endswith("_ptr")), "*i32")
    pointers |= dict.fromkeys(names[:4], rows) | {"row_ptr": total, "ceilings_ptr": total, "upper_ptr": total}
    found = []
    for everything in (False, True):
        settings = sweep_settings(chip, dtype, dim, dim, **dict.fromkeys(FLAGS, everything))
        numbers = ("num_queries", "num_columns", "part_columns", "image_dim", "text_dim", "capacity")
        signature = pointers | {"valid_ptr": "*i8" if everything else "*i32"} | dict.fromkeys(numbers, "i32")
        dims = ("image_dim", "text_dim") if dim % 16 == 0 else ()
        found.append(
            Specialisation(
                kernel="topk_sweep",
                function=sweep_kernel,
                signature=signature,
                constexprs={name: value for name, value in settings.items() if name in names},
                aligned=aligned_arguments(signature, dim=1) + dims,
                num_warps=settings["num_warps"],
                num_stages=settings["num_stages"],
            )
        )
    exact = {"query_ptr": rows, "base_ptr": rows, "row_ptr": "*i64", "id_ptr": "*i64", "out_ptr": "*fp64"}
    exact |= {"num_entries": "i32", "dim": "i32"}
    return [
        *found,
        Specialisation(
            kernel="exact",
            function=exact_kernel,
            signature=exact,
            constexprs={"BLOCK_S": EXACT_ENTRIES, "BLOCK_D": EXACT_DEPTH},
            aligned=aligned_arguments(exact, dim),
            num_warps=EXACT_WARPS,
            num_stages=1,
        ),
    ]
