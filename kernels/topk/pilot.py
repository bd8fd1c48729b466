"""What a sample of the base tells of each query: a first threshold, which the search proves or mends, and how its two
similarities compare where its best pairs lie.

Shape letters: `Q` queries, `B` sampled base rows, `D` embedding.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.topk.exclusion import group_entries
from kernels.topk.operands import operand_dtype, screening_product
from kernels.topk.problem import Problem
from kernels.topk.tile import MAXIMUM_OF, group_lookups, present_rows, self_entries

SMALLEST_SAMPLE, LARGEST_SAMPLE = 4096, 65536
ONE_SAMPLED_OF = 128
# Enough for a ratio of similarities, from as many of the best pairs among them.
SCALE_SAMPLE, SCALE_BEST = 1024, 4
LARGEST_RATIO = 16.0
# On a GPU 256 MiB for the scores of the largest sample.
QUERIES_AT_ONCE, GPU_QUERIES_AT_ONCE = 512, 2048
# Standard deviations of the number of a query's k best in a sample, and a few where that number is small.
SAFETY, SAFETY_BESIDE = 4.5, 3


def guessed_thresholds(problem: Problem) -> Tensor:
    """float32 [Q]: a score that somewhat more than k base pairs of each query reach, most likely; 0 without a guess."""
    threshold_Q = torch.zeros(problem.num_queries, device=problem.device)
    size = sample_size(problem.num_base)
    rank = sample_rank(problem.k, size, problem.num_base)
    if 2 * rank <= size:
        for rows, image_QB, text_QB in sampled_cosines(problem, size):
            threshold_Q[rows] = _ranked(image_QB.mul_(text_QB), rank)
    return threshold_Q.clamp(min=0)


def guessed_ratios(problem: Problem) -> Tensor:
    """float32 [Q]: about the image similarity by the text similarity of a query's best pairs."""
    ratio_Q = torch.ones(problem.num_queries, device=problem.device)
    for rows, image_QB, text_QB in sampled_cosines(problem, min(SCALE_SAMPLE, problem.num_base)):
        best_Q4 = (image_QB * text_QB).topk(min(SCALE_BEST, image_QB.shape[1]), dim=1, sorted=False).indices
        # Not zero, so that ratios are numbers.
        image_Q, text_Q = (cosine.gather(1, best_Q4).float().sum(1) + 2.0**-10 for cosine in (image_QB, text_QB))
        ratio_Q[rows] = image_Q / text_Q
    # A row that is not finite is found where all rows are looked at.
    return ratio_Q.nan_to_num(1.0).clamp(1 / LARGEST_RATIO, LARGEST_RATIO)


def sample_size(num_base: int) -> int:
    return min(num_base, max(SMALLEST_SAMPLE, min(num_base // ONE_SAMPLED_OF, LARGEST_SAMPLE)))


def sample_rank(k: int, size: int, num_base: int) -> int:
    """A rank in the sample that stands for rank k or more in the base, but for bad luck."""
    expected = k * size / max(num_base, 1)
    deviation = math.sqrt(expected * (1 - size / max(num_base, 1)))
    return math.ceil(expected + SAFETY * deviation + SAFETY_BESIDE)


def sample(num_base: int, size: int) -> Tensor:
    """Ascending row numbers, one from each of `size` equal ranges: fair whatever the order of the base."""
    generator = torch.Generator().manual_seed(0)
    place = torch.arange(size, dtype=torch.float64) + torch.rand(size, generator=generator, dtype=torch.float64)
    return (place * (num_base / size)).long().clamp(max=num_base - 1)


def sampled_cosines(problem: Problem, size: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(queries, image, text) with approximate cosines, bfloat16 [Q, B], at least 0; image 0 where excluded."""
    if problem.num_queries == 0 or size == 0:
        return
    dtype = operand_dtype(problem.device.type)
    ids_B = sample(problem.num_base, size).to(problem.device)
    absent_B = None if problem.valid_N is None else (~problem.valid_N[ids_B]).nonzero()[:, 0]
    base = [present_rows(base_ND, ids_B, absent_B).float().to(dtype) for base_ND in problem.base_ND]
    base = [F.pad(rows_BD, (0, 0, 0, -size % MAXIMUM_OF)) for rows_BD in base]
    lookups = group_lookups(problem, ids_B)
    step = QUERIES_AT_ONCE if problem.device.type == "cpu" else GPU_QUERIES_AT_ONCE
    for start in range(0, problem.num_queries, step):
        rows = slice(start, min(start + step, problem.num_queries))
        queries = [query_QD[rows].float().to(dtype) for query_QD in problem.query_QD]
        cosines = [_cosines(*pair, ceiling) for *pair, ceiling in zip(queries, base, problem.ceilings, strict=True)]
        found = group_entries(problem, rows, lookups, ids_B)
        for rows_S, places_S in [self_entries(problem, rows, ids_B), *(entries[1:3] for entries in found)]:
            cosines[0][rows_S, places_S] = 0
        yield rows, *cosines


def _cosines(query_QD: Tensor, base_BD: Tensor, ceiling: float) -> Tensor:
    """bfloat16, 0 below zero and above the ceiling."""
    out = torch.empty(len(query_QD), len(base_BD), dtype=torch.bfloat16, device=query_QD.device)
    screening_product(query_QD, base_BD, out).relu_()
    return out.masked_fill_(out > ceiling, 0) if ceiling < 1 else out


def _ranked(score_QB: Tensor, rank: int) -> Tensor:
    """float32 [Q], at most the score of that rank: selected among maxima of a few, where that leaves enough of them."""
    few = MAXIMUM_OF
    while score_QB.shape[1] // few < 4 * rank and few > 1:
        few //= 2
    maxima = score_QB.view(len(score_QB), few, -1).amax(1)
    return maxima.topk(rank, dim=1, sorted=False).values.amin(1).float()
