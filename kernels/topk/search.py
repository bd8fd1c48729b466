"""A search whatever the screening: guess a threshold for each query, sweep the base for what reaches it, decide that
exactly, and repeat where the guess was too high.

A sweep returns every entry whose score may reach its query's threshold. If the k-th best exact score among them reaches
it too, nothing unseen can be among the k best: the answer is proven, however the guess came about.

Shape letters: `Q` queries, `K` neighbours, `M` most entries of any query, `S` entries.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.rows.scratch import Scratch
from kernels.topk.exact import double_rows, exact_similarity
from kernels.topk.exclusion import ExclusionCount
from kernels.topk.pilot import guessed_thresholds
from kernels.topk.problem import Problem
from kernels.topk.survivors import OUTWARD, Chunk, DenseRows, Survivors, best_first

# Exact scores are computed for at least this many entries at a time.
DECIDED_TOGETHER = 8192
# (problem, thresholds float32 [Q], where to count exclusions or None) -> survivors, complete above their thresholds.
Sweep = Callable[[Problem, Tensor, ExclusionCount | None], Survivors]


@dataclass(frozen=True)
class Answer:
    """ids_QK int64, -1 where there is none; similarities and score float64, 0 there."""

    ids_QK: Tensor
    image_similarity_QK: Tensor
    text_similarity_QK: Tensor
    score_QK: Tensor

    def columns(self) -> tuple[Tensor, ...]:
        return self.ids_QK, self.image_similarity_QK, self.text_similarity_QK, self.score_QK


def search_all(problem: Problem, sweep: Sweep, queries_together: int) -> tuple[Answer, ExclusionCount]:
    """The answer and what was excluded for all queries, searched `queries_together` at a time."""
    answers, excluded = [], ExclusionCount.none(problem.num_queries, problem.num_base, problem.device)
    for start in range(0, max(problem.num_queries, 1), queries_together):
        rows = slice(start, min(start + queries_together, problem.num_queries))
        answers.append(search(problem.of_queries(rows), sweep, excluded.of_queries(rows)))
    columns = zip(*(answer.columns() for answer in answers), strict=True)
    return Answer(*(torch.cat(parts) for parts in columns)), excluded


def search(problem: Problem, sweep: Sweep, excluded: ExclusionCount) -> Answer:
    """The exact answer for all queries of the problem; fills `excluded`."""
    least_Q = (problem.floor_Q * (1 - OUTWARD)).float()
    threshold_Q = least_Q
    if not (isinstance(problem.floor, Tensor) and (least_Q > 0).all()):
        # A floor of each query's own comes from another part of the base, and is a better guess than a sample's.
        threshold_Q = torch.maximum(guessed_thresholds(problem), least_Q)
    survivors = sweep(problem, threshold_Q, excluded)
    answer = decide(problem, survivors)
    # A later sweep starts from the k-th best found, which is proven to be below the k-th best there is.
    kth_Q = answer.score_QK[:, -1]
    missed = ((survivors.threshold_Q > kth_Q) & (survivors.threshold_Q > least_Q)).nonzero()[:, 0]
    if len(missed):
        again = problem.of_queries(missed)
        lower_Q = torch.maximum((kth_Q[missed] * (1 - OUTWARD)).float(), least_Q[missed])
        found = decide(again, sweep(again, lower_Q, None))
        answer = Answer(*(a.index_copy(0, missed, b) for a, b in zip(answer.columns(), found.columns(), strict=True)))
    return answer


def decide(problem: Problem, survivors: Survivors) -> Answer:
    """The k best of the survivors by exact score, ties by the lower id."""
    # Once, in place of for every chunk.
    problem = replace(problem, query_QD=tuple(double_rows(rows_QD) for rows_QD in problem.query_QD))
    # Fresh memory for every chunk's rows costs page faults, more than their conversion.
    scratch = Scratch(problem.device)
    survivors.compact(lambda rows_S, ids_S: exact_score(problem, rows_S, ids_S, scratch)[2])
    chunks, similarity = [], []
    for chunk in joined(survivors.chunks):
        *exact, score_S = exact_score(problem, chunk.rows_S, chunk.ids_S, scratch)
        chunks.append(Chunk(chunk.rows_S, chunk.ids_S, score_S, score_S))
        similarity.append(exact)
    num_queries, k = problem.num_queries, problem.k
    if not chunks:
        zeros_QK = torch.zeros(num_queries, k, dtype=torch.float64, device=problem.device)
        return Answer(torch.full_like(zeros_QK, -1, dtype=torch.int64), zeros_QK, zeros_QK, zeros_QK)
    dense = DenseRows(chunks, num_queries)
    score_QM = dense.filled([chunk.lower_S for chunk in chunks], -1.0)
    order_QK = best_first(score_QM, k)
    # Numbers of the chosen entries; what there is none of has a score below the floor.
    numbers = torch.arange(survivors.num_entries, device=problem.device).split([len(chunk) for chunk in chunks])
    number_QK = dense.filled(list(numbers), 0).gather(1, order_QK)
    score_QK = score_QM.gather(1, order_QK)
    missing_QK = score_QK <= problem.floor_Q[:, None]
    padding = (0, k - order_QK.shape[1])
    columns = [torch.cat(parts) for parts in ([chunk.ids_S for chunk in chunks], *zip(*similarity, strict=True))]
    ids_QK, *values = (column_S[number_QK] for column_S in columns)
    ids_QK = F.pad(ids_QK.masked_fill(missing_QK, -1), padding, value=-1)
    return Answer(ids_QK, *(F.pad(value.masked_fill(missing_QK, 0), padding) for value in (*values, score_QK)))


def exact_score(
    problem: Problem, rows_S: Tensor, ids_S: Tensor, scratch: Scratch | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """float64 (image similarity, text similarity, score), [S] each."""
    towers = zip(problem.query_QD, problem.base_ND, strict=True)
    image_S, text_S = (exact_similarity(query_QD, base_ND, rows_S, ids_S, scratch) for query_QD, base_ND in towers)
    return image_S, text_S, image_S.clamp(min=0) * text_S.clamp(min=0)


def joined(chunks: list[Chunk]) -> list[Chunk]:
    """Neighbouring chunks as one until there is enough to decide together, rows ascending again."""
    together, waiting = [], []
    for number, chunk in enumerate(chunks):
        waiting.append(chunk)
        if sum(map(len, waiting)) >= DECIDED_TOGETHER or number == len(chunks) - 1:
            columns = [
                torch.cat(c) for c in zip(*((c.rows_S, c.ids_S, c.lower_S, c.upper_S) for c in waiting), strict=True)
            ]
            order_S = columns[0].argsort(stable=True)
            together.append(Chunk(*(column[order_S] for column in columns)) if len(waiting) > 1 else chunk)
            waiting = []
    return together
