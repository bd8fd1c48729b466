"""Exact search through the product top-k of `kernels`: blocks of the base stream past, each query's best so far goes
along.

Of every block the kernel lists only what scores strictly above the query's k-th best so far, exactly and with counts of
what it excluded. Blocks come in ascending ids, so that an equal score of a later block is rightly left out.

Shape letters: Q queries, K neighbours, N pairs, C causes of exclusion.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels import product_topk
from mining.problem import NO_PAIR, SearchProblem, TopK, nobody_listens
from mining.rows import BaseBlock, BaseStream, read_rows

# Queries that one pass over the base serves: the more, the less a block's reading and preparing costs.
CPU_QUERIES, GPU_QUERIES = 4096, 65536


class FusedSearch:
    """Exact search of a SearchProblem; host memory is one block of the base, whatever N."""

    name = "fused"

    def __init__(self, problem: SearchProblem, *, device: str | torch.device = "cpu", block_rows: int | None = None):
        self.problem = problem
        self.device = torch.device(device)
        self.stream = BaseStream(problem, self.device, block_rows=block_rows)
        self.queries_together = CPU_QUERIES if self.device.type == "cpu" else GPU_QUERIES
        self.tell = nobody_listens

    def search(self, query_ids_Q: np.ndarray, *, base: slice | None = None, known: TopK | None = None) -> TopK:
        """Hard pairs of the pairs `query_ids_Q` (int64 [Q]) among all pairs; queries without an embedding get none.

        `base`: search only these pairs. `known`: an exact answer for the same queries among pairs before `base`, to go
        on from.
        """
        live_Q = self.problem.valid_N[query_ids_Q]
        queries = Queries.of(self.problem, query_ids_Q[live_Q], self.device)
        state = BestSoFar(queries, self.problem.limits.k, self.problem.limits.floor)
        if known is not None:
            state.start_from(known.of_queries(live_Q))
        for block in self.stream.blocks(base) if live_Q.any() else ():
            state.add(self._search_block(queries, block, state.floor_Q), block.start)
            self.tell(self.stream.share_passed(block, base))
        return state.answer().spread(live_Q)

    def _search_block(self, queries: "Queries", block: BaseBlock, floor_Q: Tensor) -> TopK:
        limits = self.problem.limits
        inside_Q = (queries.ids_Q >= block.start) & (queries.ids_Q < block.rows.stop)
        groups = {}
        for name, group_Q, group_N in queries.groups:
            groups |= {f"{name}_group_Q": group_Q, f"{name}_group_N": self._on_device(group_N[block.rows])}
        return product_topk(
            queries.image_QD,
            queries.text_QD,
            block.image_BD,
            block.text_BD,
            limits.k,
            query_ids_Q=torch.where(inside_Q, queries.ids_Q - block.start, NO_PAIR),
            image_ceiling=limits.image_ceiling,
            text_ceiling=limits.text_ceiling,
            floor=floor_Q,
            valid_N=self._on_device(self.problem.valid_N[block.rows]),
            **groups,
        )

    def _on_device(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.device)


@dataclass(frozen=True)
class Queries:
    """ids_Q int64, rows of both towers float16, and (name, group_Q, group_N) of each kind of duplicate group."""

    ids_Q: Tensor
    image_QD: Tensor
    text_QD: Tensor
    groups: tuple[tuple[str, Tensor, np.ndarray], ...]

    @classmethod
    def of(cls, problem: SearchProblem, ids_Q: np.ndarray, device: torch.device) -> "Queries":
        known = (("image", problem.image_group_N), ("text", problem.caption_group_N))
        groups = tuple(
            (name, torch.from_numpy(group_N[ids_Q]).to(device), group_N)
            for name, group_N in known
            if group_N is not None
        )
        towers = [torch.from_numpy(read_rows(rows, ids_Q)).to(device) for rows in (problem.image_ND, problem.text_ND)]
        return cls(torch.from_numpy(ids_Q).to(device), *towers, groups)


class BestSoFar:
    """The k best of each query over the blocks seen, and what was excluded there."""

    def __init__(self, queries: Queries, k: int, floor: float):
        num_queries, device = len(queries.ids_Q), queries.ids_Q.device
        self.k, self.floor = k, floor
        self.ids_QK = torch.full((num_queries, k), NO_PAIR, dtype=torch.int64, device=device)
        self.image_QK, self.text_QK = (
            torch.zeros(num_queries, k, dtype=torch.float64, device=device) for _ in range(2)
        )
        self.num_excluded_QC: Tensor | int = 0
        self.example_QC: Tensor | None = None

    @property
    def floor_Q(self) -> Tensor:
        """float64 [Q]: a later pair must score strictly more than this to enter."""
        return (self.image_QK[:, -1] * self.text_QK[:, -1]).clamp(min=self.floor)

    def start_from(self, known: TopK) -> None:
        device = self.ids_QK.device
        self.ids_QK, self.image_QK, self.text_QK, self.num_excluded_QC, self.example_QC = (
            torch.from_numpy(values).to(device)
            for values in (
                known.ids_QK,
                known.image_similarity_QK,
                known.text_similarity_QK,
                known.num_excluded_QC,
                known.excluded_example_QC,
            )
        )

    def add(self, found: TopK, start: int) -> None:
        """Take in what a block that begins at `start` lists; its ids are above all earlier ones."""
        ids = torch.cat([self.ids_QK, shifted(found.ids_QK, start)], dim=1)
        image = torch.cat([self.image_QK, found.image_similarity_QK], dim=1)
        text = torch.cat([self.text_QK, found.text_similarity_QK], dim=1)
        # Listed pairs have two positive cosines; places without a pair score 0 and stay last. Stable: lower ids first.
        order_QK = (image * text).sort(dim=1, descending=True, stable=True).indices[:, : self.k]
        self.ids_QK, self.image_QK, self.text_QK = (values.gather(1, order_QK) for values in (ids, image, text))
        self.num_excluded_QC = self.num_excluded_QC + found.num_excluded_QC
        example_QC = shifted(found.excluded_example_QC, start)
        if self.example_QC is not None:
            example_QC = torch.where(self.example_QC >= 0, self.example_QC, example_QC)
        self.example_QC = example_QC

    def answer(self) -> TopK:
        num_queries = len(self.ids_QK)
        if self.example_QC is None:
            return TopK.none(num_queries, self.k)
        columns = (self.ids_QK, self.image_QK, self.text_QK, self.num_excluded_QC, self.example_QC)
        return TopK(*(values.cpu().numpy() for values in columns), np.ones(num_queries, bool))


def shifted(ids: Tensor, start: int) -> Tensor:
    """Ids that count from `start`, as ids of the whole base; -1 stays."""
    return torch.where(ids >= 0, ids + start, NO_PAIR)
