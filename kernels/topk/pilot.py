"""A first threshold for each query, from a sample of the base: a guess, which the search proves or mends.

Shape letters: `Q` queries, `B` sampled base rows, `D` embedding.
"""

import math

import torch
from torch import Tensor

from kernels.topk.exclusion import group_entries
from kernels.topk.operands import screening_product
from kernels.topk.problem import Problem
from kernels.topk.tile import MAXIMUM_OF, TOWERS, BaseTile, base_tile, query_operands, self_entries

SMALLEST_SAMPLE, LARGEST_SAMPLE = 4096, 65536
ONE_SAMPLED_OF = 128
# As for the conversion of operands; on a GPU 256 MiB for the scores of the largest sample.
QUERIES_AT_ONCE, GPU_QUERIES_AT_ONCE = 512, 2048
# Standard deviations of the number of a query's k best in a sample, and a few where that number is small.
SAFETY, SAFETY_BESIDE = 4.5, 3


def guessed_thresholds(problem: Problem) -> Tensor:
    """float32 [Q]: a score that somewhat more than k base pairs of each query reach, most likely; 0 without a guess.

    ValueError for a sampled row that is not finite.
    """
    threshold_Q = torch.zeros(problem.num_queries, device=problem.device)
    size = sample_size(problem.num_base)
    rank = sample_rank(problem.k, size, problem.num_base)
    if problem.num_queries == 0 or 2 * rank > size:
        return threshold_Q
    operands = query_operands(problem)
    tile = base_tile(problem, sample(problem.num_base, size).to(problem.device))
    step = QUERIES_AT_ONCE if problem.device.type == "cpu" else GPU_QUERIES_AT_ONCE
    for start in range(0, problem.num_queries, step):
        rows = slice(start, min(start + step, problem.num_queries))
        score_QB = _sampled_scores(problem, rows, [operand.rows_BE[rows] for operand in operands], tile)
        threshold_Q[rows] = _ranked(score_QB, rank)
    return threshold_Q.clamp(min=0)


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


def _sampled_scores(problem: Problem, rows: slice, queries: list[Tensor], tile: BaseTile) -> Tensor:
    """bfloat16 [Q, B] approximate scores, what is excluded at most 0."""
    cosines = []
    for tower in range(len(TOWERS)):
        # Without the columns that make it an upper bound.
        dim = problem.base_ND[tower].shape[1]
        out = torch.empty(len(queries[0]), tile.width, dtype=torch.bfloat16, device=problem.device)
        screening_product(queries[tower][:, :dim], tile.operands[tower].rows_BE[:, :dim], out)
        ceiling = problem.ceilings[tower]
        cosines.append(out.masked_fill_(out > ceiling, 0) if ceiling < 1 else out)
    image, text = cosines
    entries = [self_entries(problem, rows, tile.ids_B)]
    entries += [found[1:3] for found in group_entries(problem, rows, tile.lookups, tile.ids_B)]
    for rows_S, places_S in entries:
        image[rows_S, tile.columns(places_S)] = 0
    return image.relu_().mul_(text)


def _ranked(score_QB: Tensor, rank: int) -> Tensor:
    """float32 [Q], at most the score of that rank: selected among maxima of a few, where that leaves enough of them."""
    few = MAXIMUM_OF
    while score_QB.shape[1] // few < 4 * rank and few > 1:
        few //= 2
    maxima = score_QB.view(len(score_QB), few, -1).amax(1)
    return maxima.topk(rank, dim=1, sorted=False).values.amin(1).float()
