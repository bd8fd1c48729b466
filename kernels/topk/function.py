"""The product top-k as an operation of torch.library, `hardpair::product_topk`, so that torch.compile takes it whole:
how long its lists of candidates are is known only as it runs.

Shape letters: `Q` queries, `N` base pairs, `D` embedding, `K` neighbours, `C` causes.
"""

import torch
from torch import Tensor

from kernels.rows.checks import choose_backend
from kernels.rows.precision import without_autocast
from kernels.rows.registration import NAMESPACE
from kernels.topk.blockwise import product_topk_blockwise
from kernels.topk.problem import CAUSES, Problem
from kernels.topk.reference import product_topk_reference

SCHEMA = (
    "(Tensor query_image_QD, Tensor query_text_QD, Tensor base_image_ND, Tensor base_text_ND, SymInt k, "
    "Tensor query_ids_Q, Tensor? image_group_Q, Tensor? image_group_N, Tensor? text_group_Q, Tensor? text_group_N, "
    "float image_ceiling, float text_ceiling, float floor, Tensor? floor_Q, Tensor? valid_N, str backend) -> "
    "(Tensor ids_QK, Tensor image_similarity_QK, Tensor text_similarity_QK, Tensor num_excluded_QC, "
    "Tensor excluded_example_QC)"
)


def search(problem: Problem, backend: str) -> tuple[Tensor, ...]:
    """(ids_QK, image_similarity_QK, text_similarity_QK, num_excluded_QC, excluded_example_QC) of a checked problem."""
    groups = [group for pair in problem.groups for group in (pair or (None, None))]
    floor, floor_Q = (0.0, problem.floor) if isinstance(problem.floor, Tensor) else (float(problem.floor), None)
    limits = (*map(float, problem.ceilings), floor, floor_Q, problem.valid_N)
    return OPERATION(*problem.query_QD, *problem.base_ND, problem.k, problem.query_ids_Q, *groups, *limits, backend)


@without_autocast
def _search(
    query_image_QD,
    query_text_QD,
    base_image_ND,
    base_text_ND,
    k,
    query_ids_Q,
    image_group_Q,
    image_group_N,
    text_group_Q,
    text_group_N,
    image_ceiling,
    text_ceiling,
    floor,
    floor_Q,
    valid_N,
    backend,
):
    if floor_Q is not None and not (floor_Q >= 0).all():
        raise ValueError("floor holds a negative number or NaN; scores are products of cosines, at least 0")
    groups = ((image_group_Q, image_group_N), (text_group_Q, text_group_N))
    problem = Problem(
        (query_image_QD, query_text_QD),
        (base_image_ND, base_text_ND),
        k,
        query_ids_Q,
        tuple(None if pair[0] is None else pair for pair in groups),
        (image_ceiling, text_ceiling),
        floor if floor_Q is None else floor_Q,
        valid_N,
    )
    chosen = choose_backend("product_topk", backend, query_image_QD.device.type)
    if chosen == "reference":
        return product_topk_reference(problem)
    answer, excluded = _search_of(chosen)(problem)
    similarity = (answer.image_similarity_QK, answer.text_similarity_QK)
    return answer.ids_QK, *similarity, excluded.num_excluded_QC, excluded.excluded_example_QC


def _search_of(backend: str):
    if backend == "blockwise":
        return product_topk_blockwise
    # Only who asks for Triton loads it.
    from kernels.topk.blocks import product_topk_triton

    return product_topk_triton


def _fake(query_image_QD, query_text_QD, base_image_ND, base_text_ND, k, query_ids_Q, *_):
    ids_QK = query_ids_Q.new_empty(len(query_ids_Q), k)
    similarity = [torch.empty_like(ids_QK, dtype=torch.float64) for _ in range(2)]
    return ids_QK, *similarity, *(query_ids_Q.new_empty(len(query_ids_Q), len(CAUSES)) for _ in range(2))


OPERATION = torch.library.custom_op(f"{NAMESPACE}::product_topk", _search, mutates_args=(), schema=SCHEMA)
OPERATION.register_fake(_fake)
