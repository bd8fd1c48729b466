"""Exact cosines of single entries, summed in float64.

Every entry is a dot product by itself, in an order that depends on the width alone: one entry has the same bits whatever
it is computed with. For unit rows of float16 no addition rounds at all: products are multiples of 2^-48, sums below 2.

Shape letters: `Q` queries, `N` base pairs, `D` embedding, `S` entries.
"""

import warnings

import torch
from torch import Tensor

from kernels.rows.checks import automatic_backend
from kernels.rows.scratch import Scratch

# Converted together: what lies between stays in a processor's cache.
ROWS_AT_ONCE = 256
# Entries at a time where each needs a copy of its base row, and widest range of base rows that is copied as it is.
CHUNK = 16384
WIDEST_RANGE = 8192


def exact_similarity(
    query_QD: Tensor, base_ND: Tensor, rows_S: Tensor, ids_S: Tensor, scratch: Scratch | None = None
) -> Tensor:
    """float64 [S] dot products of query rows_S (ascending) with base row ids_S. `scratch`: of who calls many times."""
    if len(rows_S) == 0:
        return torch.zeros(0, dtype=torch.float64, device=rows_S.device)
    on_cpu = base_ND.device.type == "cpu"
    if not on_cpu and automatic_backend("product_topk", base_ND.device.type) == "triton":
        # Only who has a GPU loads it.
        from kernels.topk.kernel import exact_products

        return exact_products(query_QD, base_ND, rows_S, ids_S)
    chunk = len(rows_S) if on_cpu and int(ids_S.max() - ids_S.min()) < WIDEST_RANGE else CHUNK
    parts = zip(rows_S.split(chunk), ids_S.split(chunk), strict=True)
    if not on_cpu:
        return torch.cat([_gathered(query_QD, base_ND, rows, ids) for rows, ids in parts])
    scratch = scratch or Scratch(base_ND.device)
    return torch.cat([_sampled(query_QD, base_ND, rows, ids, scratch) for rows, ids in parts])


def _sampled(query_QD: Tensor, base_ND: Tensor, rows_S: Tensor, ids_S: Tensor, scratch: Scratch) -> Tensor:
    query_SD, row_S = _needed_rows(query_QD, rows_S, scratch, "query")
    base_SD, column_S = _needed_rows(base_ND, ids_S, scratch, "base")
    return sampled_products(query_SD, base_SD, row_S, column_S)


def sampled_products(query_QD: Tensor, base_BD: Tensor, rows_S: Tensor, columns_S: Tensor) -> Tensor:
    """[S] dot products of query rows_S (ascending) with base rows columns_S, in their dtype and summed in it. On a CPU as
    entries of a sparse matrix, which reads rows where they are, without a copy for each entry."""
    if query_QD.device.type != "cpu":
        return (query_QD.index_select(0, rows_S) * base_BD.index_select(0, columns_S)).sum(1)
    first_R = torch.zeros(len(query_QD) + 1, dtype=torch.int64)
    first_R[1:] = torch.bincount(rows_S, minlength=len(query_QD)).cumsum(0)
    zeros_S = torch.zeros(len(rows_S), dtype=query_QD.dtype)
    with warnings.catch_warnings():
        # Announces once a process that the sparse layout is young.
        warnings.simplefilter("ignore", UserWarning)
        shape = (len(query_QD), len(base_BD))
        pattern = torch.sparse_csr_tensor(first_R, columns_S, zeros_S, shape, check_invariants=False)
    return torch.sparse.sampled_addmm(pattern, query_QD, base_BD.T, beta=0.0).values()


def _needed_rows(rows_ND: Tensor, ids_S: Tensor, scratch: Scratch, name: str) -> tuple[Tensor, Tensor]:
    """float64 rows with all of `ids_S` among them, and the place of each: a range of rows, or where that is much wider
    than the entries are many, a row for each. They last until `name` is asked for again."""
    first, last = int(ids_S.min()), int(ids_S.max()) + 1
    if last - first > 2 * len(ids_S):
        return double_rows(rows_ND.index_select(0, ids_S)), torch.arange(len(ids_S))
    if rows_ND.dtype == torch.float64:
        return rows_ND[first:last], ids_S - first
    needed_SD = scratch.matrix(name, last - first, rows_ND.shape[1], torch.float64)
    for start in range(0, last - first, ROWS_AT_ONCE):
        needed_SD[start : start + ROWS_AT_ONCE] = rows_ND[
            first + start : min(first + start + ROWS_AT_ONCE, last)
        ].float()
    return needed_SD, ids_S - first


def double_rows(rows_BD: Tensor) -> Tensor:
    """The rows in float64; no copy where they are already."""
    # Sixteen bits to float64 directly is twice as slow.
    return (rows_BD if rows_BD.dtype == torch.float64 else rows_BD.float()).double()


def _gathered(query_QD: Tensor, base_ND: Tensor, rows_S: Tensor, ids_S: Tensor) -> Tensor:
    products_SD = double_rows(base_ND.index_select(0, ids_S)).mul_(double_rows(query_QD.index_select(0, rows_S)))
    return products_SD.sum(1)
