"""Cosines of float16 unit rows: a fast float32 tile with a proven error bound, and exact values in float64.

Why float64 is exact here: a float16 number is a multiple of 2^-24, so a product of two is a multiple of 2^-48; with
unit rows every partial sum stays below 2 (Cauchy-Schwarz). 49 bits hold such a sum and float64 has 53, so no addition
rounds, in whatever order it is done. Exact values make the search independent of block sizes, libraries and machines.

Shape letters: Q query rows, B base rows, D embedding width, S selected (query, base) entries of a tile.
"""

import numpy as np
import torch

from mining.rows import read_rows

# Rows may be 5e-3 longer than one, and float16 rounding adds 2^-12: the product of two lengths stays below this.
LENGTH_PRODUCT_BOUND = 1.02
FLOAT32_ROUNDING = 2.0**-24
# Entries of a tile that are cheaper to compute one by one than as a whole float64 tile: below one in this many.
SPARSE_SHARE = 32
# Entries whose cosines are computed together.
ENTRIES_TOGETHER = 65536
ROWS_TOGETHER = 4096


def load_rows(rows_ND: np.ndarray, ids: slice | np.ndarray) -> torch.Tensor:
    """float16 tensor of the rows `ids`, copied."""
    return torch.from_numpy(read_rows(rows_ND, ids))


def approximate_similarity(query_QD: torch.Tensor, base_BD: torch.Tensor) -> torch.Tensor:
    """float32 [Q, B] cosines of float16 rows, each within `approximation_error(D)` of the exact one."""
    assert torch.get_float32_matmul_precision() == "highest", "the error bound is that of full float32 products"
    return query_QD.float() @ base_BD.float().T


def approximation_error(width: int) -> float:
    """Bound on a float32 dot product of `width` terms in any order, terms exact: (D-1)u times the sum of |x_i y_i|."""
    return 1.01 * width * FLOAT32_ROUNDING * LENGTH_PRODUCT_BOUND


def product_error(image_error: float, text_error: float) -> float:
    """Bound on the clamped product of two approximate cosines, the product's own rounding and a cast included."""
    return LENGTH_PRODUCT_BOUND * (image_error + text_error) + image_error * text_error + 4 * FLOAT32_ROUNDING


def exact_tile(query_QD: torch.Tensor, base_BD: torch.Tensor) -> torch.Tensor:
    """float64 [Q, B], exact."""
    return query_QD.double() @ base_BD.double().T


def exact_entries(
    query_QD: torch.Tensor, base_BD: torch.Tensor, rows_S: torch.Tensor, columns_S: torch.Tensor
) -> torch.Tensor:
    """float64 [S], exact: the entries (rows_S ascending, columns_S) of the tile."""
    if len(rows_S) * SPARSE_SHARE > len(query_QD) * len(base_BD):
        return exact_tile(query_QD, base_BD)[rows_S, columns_S]
    return torch.from_numpy(exact_runs(query_QD.numpy(), base_BD.float().numpy(), rows_S.numpy(), columns_S.numpy()))


def exact_runs(query_QD: np.ndarray, base_BD: np.ndarray, rows_S: np.ndarray, columns_S: np.ndarray) -> np.ndarray:
    """float64 [S], exact cosines of query rows_S (equal numbers side by side) with base row columns_S.

    One small matrix-vector product for each query: a gather of both sides would move twice the bytes.
    """
    cosine_S = np.empty(len(rows_S))
    first = np.flatnonzero(np.diff(rows_S, prepend=-1))
    for start, stop in zip(first, np.append(first[1:], len(rows_S)), strict=True):
        base_RD = base_BD[columns_S[start:stop]].astype(np.float64)
        cosine_S[start:stop] = base_RD @ query_QD[rows_S[start]].astype(np.float64)
    return cosine_S


def exact_cosines(
    query_ND: np.ndarray, base_ND: np.ndarray, ids_Q: np.ndarray, rows_S: np.ndarray, ids_S: np.ndarray
) -> np.ndarray:
    """float64 [S], exact cosines of row ids_Q[rows_S] of `query_ND` with row ids_S of `base_ND`, float16 unit rows of one width;
    equal rows_S side by side."""
    cosine_S = np.empty(len(rows_S))
    for start in range(0, len(rows_S), ENTRIES_TOGETHER):
        part = slice(start, start + ENTRIES_TOGETHER)
        needed_ids, columns_S = np.unique(ids_S[part], return_inverse=True)
        queries, query_S = np.unique(rows_S[part], return_inverse=True)
        query_RD, base_BD = read_rows(query_ND, ids_Q[queries]), read_rows(base_ND, needed_ids)
        cosine_S[part] = exact_runs(query_RD, base_BD, query_S, columns_S)
    return cosine_S


def entry_cosines(
    query_ND: np.ndarray, base_ND: np.ndarray, query_ids_S: np.ndarray, base_ids_S: np.ndarray
) -> np.ndarray:
    """float64 [S], exact cosines of row query_ids_S of `query_ND` with row base_ids_S of `base_ND`, in any order."""
    cosine_S = np.empty(len(query_ids_S))
    for start in range(0, len(cosine_S), ROWS_TOGETHER):
        part = slice(start, start + ROWS_TOGETHER)
        query_RD, base_RD = read_rows(query_ND, query_ids_S[part]), read_rows(base_ND, base_ids_S[part])
        cosine_S[part] = np.einsum("rd,rd->r", query_RD.astype(np.float64), base_RD.astype(np.float64))
    return cosine_S


def score_(image_similarity: torch.Tensor, text_similarity: torch.Tensor) -> torch.Tensor:
    """max(s_image, 0) * max(s_text, 0), in the memory of its arguments: two dissimilarities never make a hard pair."""
    return image_similarity.clamp_(min=0).mul_(text_similarity.clamp_(min=0))
