"""The product top-k, as defined: the whole Q x N matrix in float64.

Shape letters: `Q` queries, `N` base pairs, `D` embedding, `K` neighbours, `C` causes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.topk.problem import Problem


def product_topk_reference(problem: Problem) -> tuple[Tensor, ...]:
    """(ids_QK, image_similarity_QK, text_similarity_QK, num_excluded_QC, excluded_example_QC)."""
    towers = zip(problem.query_QD, problem.base_ND, strict=True)
    similarities = [query_QD.double() @ base_ND.double().T for query_QD, base_ND in towers]
    score_QN = similarities[0].clamp(min=0) * similarities[1].clamp(min=0)
    barred_QN = problem.query_ids_Q[:, None] == torch.arange(problem.num_base, device=problem.device)
    if problem.valid_N is not None:
        barred_QN = barred_QN | ~problem.valid_N
    counts, examples = [], []
    for cause_QN in _causes(problem, similarities):
        # Neither the query itself nor pairs that take no part count, and each pair counts once.
        new_QN = cause_QN & ~barred_QN
        counts.append(new_QN.sum(1))
        ids_QN = torch.arange(problem.num_base, device=problem.device).where(new_QN, problem.num_base)
        lowest_Q = F.pad(ids_QN, (0, 1), value=problem.num_base).amin(1)
        examples.append(lowest_Q.masked_fill(lowest_Q == problem.num_base, -1))
        barred_QN = barred_QN | cause_QN
    allowed_QN = (score_QN > problem.floor_Q[:, None]) & ~barred_QN
    # A stable sort keeps the lower id first among equals.
    ranked = score_QN.masked_fill(~allowed_QN, -1).sort(dim=1, descending=True, stable=True)
    order_QK = ranked.indices[:, : problem.k]
    missing_QK = ~allowed_QN.gather(1, order_QK)
    padding = (0, problem.k - order_QK.shape[1])
    ids_QK = F.pad(order_QK.masked_fill(missing_QK, -1), padding, value=-1)
    values = [F.pad(matrix_QN.gather(1, order_QK).masked_fill(missing_QK, 0), padding) for matrix_QN in similarities]
    return ids_QK, *values, torch.stack(counts, dim=1), torch.stack(examples, dim=1)


def _causes(problem: Problem, similarities: list[Tensor]) -> list[Tensor]:
    """bool [Q, N] of each of CAUSES, overlaps included."""
    none_QN = torch.zeros_like(similarities[0], dtype=torch.bool)
    same = [none_QN if pair is None else pair[0][:, None] == pair[1][None, :] for pair in problem.groups]
    # A ceiling of 1 is off: rounded rows of equal content may have a cosine a little above 1.
    limits = zip(similarities, problem.ceilings, strict=True)
    return [*same, *(none_QN if ceiling == 1 else similarity_QN > ceiling for similarity_QN, ceiling in limits)]
