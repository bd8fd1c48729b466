"""Exact top-k by the product of image and text similarity: checks, choice of backend, call."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.rows.checks import check_backend
from kernels.rows.function import FEATURE_DTYPES
from kernels.topk.function import search
from kernels.topk.problem import CAUSES, GroupPair, Problem

__all__ = ["CAUSES", "TopK", "product_topk"]


@dataclass(frozen=True)
class TopK:
    """Hard pairs of each query in descending score, ties by the lower id.

    ids_QK: int64, rows of the base, -1 where there are fewer than k. image_similarity_QK, text_similarity_QK: float64,
    exact for float16 rows, 0 where there is no pair. num_excluded_Q: int64, base pairs excluded as duplicates (self
    not counted). num_excluded_QC: int64, the same by cause, in the order of CAUSES; a pair with several counts under
    the first. excluded_example_QC: int64, the lowest excluded id of each cause, or -1.
    """

    ids_QK: Tensor
    image_similarity_QK: Tensor
    text_similarity_QK: Tensor
    num_excluded_Q: Tensor
    num_excluded_QC: Tensor
    excluded_example_QC: Tensor


@torch.no_grad()
def product_topk(
    query_image_QD: Tensor,
    query_text_QD: Tensor,
    base_image_ND: Tensor,
    base_text_ND: Tensor,
    k: int,
    *,
    query_ids_Q: Tensor,
    image_ceiling: float = 1.0,
    text_ceiling: float = 1.0,
    floor: float | Tensor = 0.0,
    image_group_Q: Tensor | None = None,
    image_group_N: Tensor | None = None,
    text_group_Q: Tensor | None = None,
    text_group_N: Tensor | None = None,
    valid_N: Tensor | None = None,
    backend: str = "auto",
) -> TopK:
    """The k base pairs of highest max(s_image, 0) * max(s_text, 0) for each query, exact, without the Q x N matrix.

    query_*_QD, base_*_ND: unit rows, float16, bfloat16, float32 or float64; the two towers may differ in width. The
        base is read in tiles, so a memory-mapped array stays on disk.
    query_ids_Q: int64, each query's own row in the base, never its hard pair; -1 for a query from elsewhere.
    image_ceiling, text_ceiling: in (0, 1]; a base pair of greater similarity is a near-duplicate, excluded and
    counted. 1 is off.
    floor: in [0, 1), or float64 [Q], one for each query; hard pairs score strictly above it. The k-th best score of an
        earlier part of the base as floor goes on with a search: what it lists and what this call lists hold the k best.
    image_group_Q with image_group_N, text_group_Q with text_group_N: int64 or int32 group numbers of duplicates; base
        pairs of the query's number are excluded and counted.
    valid_N: bool; base pairs that are False are nobody's hard pair and not counted, and may hold anything.
    backend: "blockwise" (tiled torch, any device), "triton" (a GPU), "reference" (the definition), or "auto", which
    logs its choice once.

    Similarities and order are decided in float64 on the rows as given. The base is prepared once for thousands of
    queries: few large calls are faster than many small ones. No gradient flows through it; torch.compile takes the
    call whole. Raises ValueError for a wrong shape, dtype, device, limit, or a row that is not finite.
    Source: HELIP (arXiv 2305.05208), hard pair mining, with the product clamped: two dissimilarities make no hard pair.
    """
    problem = Problem(
        (query_image_QD, query_text_QD),
        (base_image_ND, base_text_ND),
        k,
        query_ids_Q,
        (_group_pair(image_group_Q, image_group_N, "image"), _group_pair(text_group_Q, text_group_N, "text")),
        (image_ceiling, text_ceiling),
        floor,
        valid_N,
    )
    check_backend(backend)
    _check(problem)
    ids_QK, image_QK, text_QK, num_excluded_QC, example_QC = search(problem, backend)
    return TopK(ids_QK, image_QK, text_QK, num_excluded_QC.sum(1), num_excluded_QC, example_QC)


def _group_pair(group_Q: Tensor | None, group_N: Tensor | None, name: str) -> GroupPair | None:
    if (group_Q is None) != (group_N is None):
        raise ValueError(f"{name}_group_Q and {name}_group_N belong together: give both or neither")
    return None if group_Q is None else (group_Q.long(), group_N.long())


def _check(problem: Problem) -> None:
    num_queries, num_base = len(problem.query_ids_Q), len(problem.base_ND[0])
    for name, query_QD, base_ND in zip(("image", "text"), problem.query_QD, problem.base_ND, strict=True):
        if query_QD.dim() != 2 or base_ND.dim() != 2 or query_QD.shape[1] != base_ND.shape[1] or query_QD.shape[1] == 0:
            raise ValueError(
                f"query_{name}_QD and base_{name}_ND must be matrices of one width, "
                f"not {list(query_QD.shape)} and {list(base_ND.shape)}"
            )
        if (len(query_QD), len(base_ND)) != (num_queries, num_base):
            raise ValueError(
                f"{name} rows do not match: {len(query_QD)} queries and {len(base_ND)} base pairs, "
                f"but {num_queries} query_ids_Q and {num_base} base images"
            )
        if query_QD.dtype not in FEATURE_DTYPES or query_QD.dtype != base_ND.dtype:
            raise ValueError(f"{name} features must share one floating dtype, not {query_QD.dtype} and {base_ND.dtype}")
    if problem.query_ids_Q.dtype != torch.int64 or problem.query_ids_Q.dim() != 1:
        raise ValueError(f"query_ids_Q must be an int64 vector, not {problem.query_ids_Q.dtype}")
    pairs = [pair for pair in problem.groups if pair is not None]
    for group_Q, group_N in pairs:
        if group_Q.shape != (num_queries,) or group_N.shape != (num_base,):
            raise ValueError(
                f"group numbers need one for each pair: {list(group_Q.shape)} and {list(group_N.shape)} "
                f"for {num_queries} queries and {num_base} base pairs"
            )
    valid = [] if problem.valid_N is None else [problem.valid_N]
    if valid and (valid[0].dtype != torch.bool or valid[0].shape != (num_base,)):
        raise ValueError(
            f"valid_N must be a bool vector of the {num_base} base pairs, not {valid[0].dtype} {list(valid[0].shape)}"
        )
    floor = [problem.floor] if isinstance(problem.floor, Tensor) else []
    groups = [group for pair in pairs for group in pair]
    tensors = (*problem.query_QD, *problem.base_ND, problem.query_ids_Q, *groups, *valid, *floor)
    if len({tensor.device for tensor in tensors}) > 1:
        raise ValueError(f"all tensors must be on one device, not {sorted({str(t.device) for t in tensors})}")
    _check_limits(problem)


def _check_limits(problem: Problem) -> None:
    if isinstance(problem.k, bool) or not isinstance(problem.k, int) or problem.k < 1:
        raise ValueError(f"k={problem.k!r} must be an int of at least 1")
    for name, ceiling in zip(("image_ceiling", "text_ceiling"), problem.ceilings, strict=True):
        if not 0 < ceiling <= 1:
            raise ValueError(f"{name}={ceiling} is a cosine limit, it must lie in (0, 1]; 1 switches it off")
    if isinstance(problem.floor, Tensor):
        if problem.floor.shape != (problem.num_queries,) or problem.floor.dtype != torch.float64:
            raise ValueError(
                f"floor must be one number, or float64 with one for each of {problem.num_queries} queries, "
                f"not {problem.floor.dtype} {list(problem.floor.shape)}"
            )
    elif not 0 <= problem.floor < 1:
        raise ValueError(f"floor={problem.floor} is a product of two cosines, it must lie in [0, 1)")
