"""Contenders for `product_topk` from float16 rows: the plain torch way (two products, clamp, multiply, topk) in blocks of
queries, and on the CPU a flat faiss index over both towers side by side."""

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.bench.measure import Contender
from kernels.bench.peers import flat_faiss_search
from kernels.topk import product_topk

PEER = "plain torch"
FLOOR = "bare products"
DIM = 512
BATCHES = (50_000,)
NUM_QUERIES = 2048
K = 100
BLOCK = 512
# What an approximate miner lists by the sum of both similarities, to rank by their product later.
FAISS_CANDIDATES = 256


def cases(batches: list[int], device: torch.device) -> Iterator[tuple[dict, list[Contender]]]:
    """(description, contenders); `batches` are base sizes."""
    for num_pairs in batches or BATCHES:
        num_queries = min(NUM_QUERIES, num_pairs)
        description = {"pairs": num_pairs, "queries": num_queries, "dim": f"{DIM}+{DIM}", "k": K, "dtype": "float16"}
        yield description, contenders(num_pairs, num_queries, device)


def contenders(num_pairs: int, num_queries: int, device: torch.device) -> list[Contender]:
    base = [clustered_rows(num_pairs, seed).to(device) for seed in (1, 2)]
    queries = torch.arange(num_queries, device=device)

    def ours() -> list[Tensor]:
        top = product_topk(base[0][queries], base[1][queries], *base, min(K, num_pairs), query_ids_Q=queries)
        return [top.image_similarity_QK * top.text_similarity_QK]

    def plain() -> list[Tensor]:
        # Once, which is faster than in every block; the copies are part of its memory.
        rows = [tower.float() for tower in base]
        return [
            torch.cat([_plain_block(rows, queries[start : start + BLOCK]) for start in range(0, num_queries, BLOCK)])
        ]

    def floor() -> None:
        rows = [tower.float() for tower in base]
        for start in range(0, num_queries, BLOCK):
            for tower in rows:
                torch.mm(tower[start : start + BLOCK], tower.T)

    found = [Contender("product_topk", ours), Contender(PEER, plain, tolerance=1e-5)]
    if device.type == "cpu":
        both = torch.cat(base, 1).float()
        search = flat_faiss_search(both, both[:num_queries], min(FAISS_CANDIDATES, num_pairs))
        # Its lists are candidates, of another order: no answer to compare. Rows are float32 before it starts.
        found += [] if search is None else [Contender(f"faiss IndexFlatIP, {FAISS_CANDIDATES} candidates", search)]
    return [*found, Contender(FLOOR, floor)]


def clustered_rows(num_pairs: int, seed: int) -> Tensor:
    """float16 unit rows around a common direction and cluster centres, clusters alike in both towers, as captions make
    them."""
    generator = torch.Generator().manual_seed(0)
    cluster_N = torch.randint(max(num_pairs // 40, 1), (num_pairs,), generator=generator)
    generator = torch.Generator().manual_seed(seed)
    common, centres = (
        torch.randn(1, DIM, generator=generator),
        torch.randn(max(num_pairs // 40, 1), DIM, generator=generator),
    )
    rows = 0.7 * common + 0.8 * centres[cluster_N] + torch.randn(num_pairs, DIM, generator=generator)
    return torch.nn.functional.normalize(rows, dim=1).half()


def _plain_block(base: list[Tensor], queries: Tensor) -> Tensor:
    score = (base[0][queries] @ base[0].T).clamp_(min=0)
    score.mul_((base[1][queries] @ base[1].T).clamp_(min=0))
    score[torch.arange(len(queries), device=queries.device), queries] = -1
    return score.topk(min(K, score.shape[1]), dim=1).values
