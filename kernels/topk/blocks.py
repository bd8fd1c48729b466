"""The sweep of the product top-k on a GPU, block by block of base rows.

Each launch of the kernel hands back the entries that may reach their query's threshold; between launches the survivors'
compaction raises the thresholds. A block that finds a buffer too small is done again in halves, so nothing is lost.
Guesses, thresholds and exact decisions are those of `search`, as for the blockwise sweep.

Shape letters: `Q` queries, `N` base pairs, `B` base rows of a block, `S` entries.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.launch import chip_of, require_triton
from kernels.rows.kernel import aligned_rows, numerics_for
from kernels.rows.precision import accumulation_dtype
from kernels.topk.exclusion import ExclusionCount
from kernels.topk.kernel_tile import NO_COLUMN
from kernels.topk.launches import Launch, launch_sweep
from kernels.topk.operands import check_rows
from kernels.topk.problem import NEAR, GroupPair, Problem
from kernels.topk.search import Answer, exact_score, search_all
from kernels.topk.survivors import OUTWARD, Chunk, Survivors
from kernels.topk.tile import TOWERS

QUERIES_TOGETHER = 16384
LARGEST_BLOCK = 262144
LEAST_CAPACITY = 512
# Matrix units truncate where they align summands, and may keep a bit less than float32 does.
SUM_ROUNDING = 2.0**-22
DOUBLE_ROUNDING = 2.0**-50
# Of a product of two float32 numbers that were each split into two of TF32's.
SPLIT_ROUNDING = 2.0**-19


def product_topk_triton(problem: Problem) -> tuple[Answer, ExclusionCount]:
    """The answer and what was excluded, for all queries. ValueError where Triton cannot run."""
    require_triton("product_topk", problem.device)
    return search_all(problem, sweep, QUERIES_TOGETHER)


def sweep(
    problem: Problem,
    threshold_Q: Tensor,
    excluded: ExclusionCount | None,
    *,
    largest_block: int = LARGEST_BLOCK,
    capacity: int | None = None,
) -> Survivors:
    """Every entry whose score may reach its query's threshold; see `search.Sweep`.

    `capacity`: entries of one query that one part of a block may yield; of more, the block is done again in halves.
    """
    survivors = Survivors(threshold_Q, problem.k)
    if problem.num_queries == 0:
        return survivors
    blocks = BlockSweep(problem, capacity or LEAST_CAPACITY + 2 * problem.k)
    start, size = 0, largest_block
    while start < problem.num_base:
        ids = slice(start, min(start + size, problem.num_base))
        found = blocks.offer(ids, survivors.threshold_Q, excluded)
        if found is None:
            size = max((ids.stop - ids.start) // 2, 1)
            continue
        survivors.append(found)
        if survivors.is_full:
            survivors.compact(lambda rows_S, ids_S: exact_score(problem, rows_S, ids_S)[2])
        start, size = ids.stop, min(2 * size, largest_block)
    return survivors


class BlockSweep:
    """Offers blocks of base rows to all queries of a problem."""

    def __init__(self, problem: Problem, capacity: int):
        self.problem, self.capacity = problem, capacity
        self.chip = chip_of(problem.device)
        self.dtype = problem.query_QD[0].dtype
        self.accumulator = accumulation_dtype(self.dtype)
        self.queries = [aligned_rows(rows_QD) for rows_QD in problem.query_QD]
        number_Q = torch.arange(problem.num_queries, device=problem.device)
        self.norms = [norms(rows_QD, number_Q, f"query {n}") for n, rows_QD in zip(TOWERS, self.queries, strict=True)]
        self.groups = [int32_groups(pair) for pair in problem.groups]

    def offer(self, ids: slice, threshold_Q: Tensor, excluded: ExclusionCount | None) -> Chunk | None:
        """The entries of the base rows `ids` that may reach their query's threshold, and counts of what is excluded;
        None, and nothing counted, where a buffer was too small."""
        base = [aligned_rows(rows_ND[ids]) for rows_ND in self.problem.base_ND]
        errors = self._errors(base, ids)
        found = self._launch(base, ids, threshold_Q, errors)
        if (found.count > self.capacity).any():
            return None
        if excluded is not None:
            lowest_QC = found.lowest.amin(2).T.long()
            lowest_QC = torch.where(lowest_QC == NO_COLUMN, self.problem.num_base, lowest_QC + ids.start)
            excluded.add_totals(found.excluded.sum(2).T, lowest_QC)
        is_entry = torch.arange(self.capacity, device=self.problem.device) < found.count[..., None]
        flat_S = is_entry.view(-1).nonzero()[:, 0]
        rows_S = flat_S // (found.columns.shape[1] * self.capacity)
        ids_S = found.columns.view(-1)[flat_S].long() + ids.start
        return self._bounded(rows_S, ids_S, found.upper.view(-1)[flat_S], errors, threshold_Q, excluded)

    def _errors(self, base: list[Tensor], ids: slice) -> "Errors":
        """Bounds on the kernel's errors for each query, from the longest row of the block."""
        numbers_B = torch.arange(ids.start, ids.stop, device=self.problem.device)
        present_B = None if self.problem.valid_N is None else self.problem.valid_N[ids]
        longest = [norms(r, numbers_B, f"base {n}", present_B).amax() for n, r in zip(TOWERS, base, strict=True)]
        numerics = numerics_for(self.dtype, self.chip, "precise")
        rounding = DOUBLE_ROUNDING if self.accumulator == torch.float64 else SUM_ROUNDING
        split = SPLIT_ROUNDING if numerics.cosine_precision == "tf32x3" else 0.0
        largest = [norm_Q * norm for norm_Q, norm in zip(self.norms, longest, strict=True)]
        # 32: what adding and multiplying bounds rounds, and a norm's own rounding.
        shares = [(rows.shape[1] + 32) * rounding + split for rows in base]
        return Errors(*(most_Q * share + 2.0**-40 for most_Q, share in zip(largest, shares, strict=True)), *largest)

    def _launch(self, base: list[Tensor], ids: slice, threshold_Q: Tensor, errors: "Errors") -> Launch:
        problem = self.problem
        # Above zero: scores of zero are no hard pairs.
        least_Q = (threshold_Q * (1 - 4 * OUTWARD)).clamp(min=2.0**-100)
        rows = torch.stack([least_Q.to(self.accumulator), errors.image_Q, errors.text_Q])
        own_Q = problem.query_ids_Q - ids.start
        inside_Q = (own_Q >= 0) & (own_Q < ids.stop - ids.start)
        return launch_sweep(
            self.queries,
            base,
            rows,
            problem.ceilings,
            own_Q.where(inside_Q, -1).int(),
            [None if pair is None else pair[0] for pair in self.groups],
            [None if pair is None else pair[1][ids] for pair in self.groups],
            None if problem.valid_N is None else problem.valid_N[ids],
            self.capacity,
            self.chip,
        )

    def _bounded(
        self,
        rows_S: Tensor,
        ids_S: Tensor,
        upper_S: Tensor,
        errors: "Errors",
        threshold_Q: Tensor,
        excluded: ExclusionCount | None,
    ) -> Chunk:
        """The entries with bounds on their scores; open ones decided."""
        lower_S = upper_S * (1 - 2 * OUTWARD) - errors.score_Q[rows_S]
        upper_S = upper_S * (1 + 2 * OUTWARD)
        kept_S = torch.ones_like(rows_S, dtype=torch.bool)
        open_S = (upper_S < 0).nonzero()[:, 0]
        if len(open_S):
            near_S, score_S = self._decided(rows_S[open_S], ids_S[open_S], excluded)
            lower_S[open_S] = (score_S * (1 - OUTWARD)).to(lower_S.dtype)
            upper_S[open_S] = (score_S * (1 + OUTWARD)).to(upper_S.dtype)
            kept_S[open_S] = ~near_S & (upper_S[open_S] >= threshold_Q[rows_S[open_S]])
        lower_S, upper_S = lower_S.float() * (1 - OUTWARD), upper_S.float() * (1 + OUTWARD)
        return Chunk(rows_S, ids_S, lower_S.clamp(min=0), upper_S).chosen(kept_S)

    def _decided(self, rows_S: Tensor, ids_S: Tensor, excluded: ExclusionCount | None) -> tuple[Tensor, Tensor]:
        """(bool_S whether a cosine is above its ceiling, exact score_S); counts the former."""
        *similarity, score_S = exact_score(self.problem, rows_S, ids_S)
        near_S = torch.zeros_like(rows_S, dtype=torch.bool)
        for tower, (similarity_S, ceiling) in enumerate(zip(similarity, self.problem.ceilings, strict=True)):
            if ceiling < 1:
                new_S = (similarity_S > ceiling) & ~near_S
                near_S |= new_S
                if excluded is not None:
                    excluded.add(NEAR + tower, rows_S[new_S], ids_S[new_S])
        return near_S, score_S


@dataclass(frozen=True)
class Errors:
    """For each query: bounds on the errors of both cosines, and the largest that these may be; [Q]."""

    image_Q: Tensor
    text_Q: Tensor
    largest_image_Q: Tensor
    largest_text_Q: Tensor

    @property
    def score_Q(self) -> Tensor:
        """By how much an upper bound on the score may exceed the score."""
        return 2.01 * (
            self.image_Q * (self.largest_text_Q + 2 * self.text_Q)
            + self.text_Q * (self.largest_image_Q + 2 * self.image_Q)
        )


def norms(rows_BD: Tensor, ids_B: Tensor, name: str, present_B: Tensor | None = None) -> Tensor:
    """[B] in the accumulation dtype, 0 for rows that are not present; ValueError as in `check_rows`."""
    norm_B = torch.linalg.vector_norm(rows_BD, dim=1, dtype=accumulation_dtype(rows_BD.dtype))
    norm_B = norm_B if present_B is None else norm_B.where(present_B, 0)
    check_rows(norm_B, ids_B, name)
    return norm_B


def int32_groups(pair: GroupPair | None) -> GroupPair | None:
    """Equal numbers where the pair's are equal: 64-bit comparisons cost the kernel its registers."""
    if pair is None:
        return None
    both = torch.cat(pair)
    limits = torch.iinfo(torch.int32)
    if len(both) and (both.min() < limits.min or both.max() > limits.max):
        both = torch.unique(both, return_inverse=True)[1]
    both = both.int()
    return both[: len(pair[0])], both[len(pair[0]) :]
