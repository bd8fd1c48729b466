"""The ranking of HELIP's released miner, for comparison with the definition: not exact, and not meant for training.

Per query, over a random subset of the base: image cosines above 0.98 become 0, text cosines above 0.995 become -1 and above
0.98 become 0, and the plain product is ranked, also that of two negative cosines. So a pair of the same caption and an
image cosine of -0.2 scores +0.2. One deviation: a pair is never its own hard pair; there its score is -0.

Source: haonan3/HELIP-NAACL-2025 at 65e5e9b, hard_pair_mining.py, described, not copied. Its subset is redrawn every 300,000
queries without a seed; here the draw follows from the seed and the query's number, so that it is the same on every run.

Shape letters: Q queries, B base rows of a tile, K neighbours, C subset.
"""

import numpy as np
import torch

from mining.problem import NO_PAIR, SearchProblem, TopK, nobody_listens
from mining.similarity import exact_tile, load_rows

IMAGE_CUT, TEXT_CUT, TEXT_SELF_CUT = 0.98, 0.98, 0.995
QUERIES_PER_DRAW = 300_000
TILE_ROWS = 8192


class HelipSearch:
    """Ranks a subset of `subset` pairs, or all when there are no more; no row is certified."""

    name = "helip"
    queries_together = 1024

    def __init__(self, problem: SearchProblem, *, subset: int, seed: int, device: torch.device):
        self.problem, self.subset, self.seed, self.device = problem, subset, seed, device
        self._drawn: tuple[int, np.ndarray] | None = None
        self.tell = nobody_listens

    def search(self, query_ids_Q: np.ndarray) -> TopK:
        """The k best by the released score of the pairs `query_ids_Q` (int64 [Q], ascending)."""
        whole = TopK.none(len(query_ids_Q), self.problem.limits.k)
        draw_Q = query_ids_Q // QUERIES_PER_DRAW
        for draw in np.unique(draw_Q):
            rows = np.flatnonzero((draw_Q == draw) & self.problem.valid_N[query_ids_Q])
            ids_RK, image_RK, text_RK = self._rank(query_ids_Q[rows], self._subset(int(draw)))
            whole.ids_QK[rows] = ids_RK
            whole.image_similarity_QK[rows], whole.text_similarity_QK[rows] = image_RK, text_RK
        whole.certified_Q[:] = False
        return whole

    def _subset(self, draw: int) -> np.ndarray:
        """int64 ids, ascending, of the pairs ranked for one draw's queries."""
        if self._drawn is None or self._drawn[0] != draw:
            valid_ids = np.flatnonzero(self.problem.valid_N)
            if len(valid_ids) > self.subset:
                rng = np.random.default_rng((self.seed, draw))
                valid_ids = np.sort(rng.choice(valid_ids, self.subset, replace=False))
            self._drawn = (draw, valid_ids)
        return self._drawn[1]

    def _rank(self, ids_Q: np.ndarray, base_ids: np.ndarray) -> tuple[np.ndarray, ...]:
        problem, k = self.problem, self.problem.limits.k
        query = [load_rows(rows_ND, ids_Q).to(self.device) for rows_ND in (problem.image_ND, problem.text_ND)]
        query_ids_Q1 = torch.from_numpy(ids_Q).to(self.device)[:, None]
        columns = [torch.empty(len(ids_Q), 0, dtype=torch.float64, device=self.device) for _ in range(3)]
        ids_QK = torch.empty(len(ids_Q), 0, dtype=torch.int64, device=self.device)
        for start in range(0, len(base_ids), TILE_ROWS):
            tile_ids = base_ids[start : start + TILE_ROWS]
            base = [load_rows(rows_ND, tile_ids).to(self.device) for rows_ND in (problem.image_ND, problem.text_ND)]
            image_QB, text_QB = (exact_tile(*towers) for towers in zip(query, base, strict=True))
            ids_1B = torch.from_numpy(tile_ids).to(self.device)[None, :]
            score_QB = released_score(image_QB, text_QB).masked_fill(ids_1B == query_ids_Q1, -torch.inf)
            ids_QK = torch.cat([ids_QK, ids_1B.expand(len(ids_Q), -1)], dim=1)
            columns = [torch.cat(pair, dim=1) for pair in zip(columns, (score_QB, image_QB, text_QB), strict=True)]
            # Stable: ties by the lower id, as the tiles ascend.
            order_QK = columns[0].sort(dim=1, descending=True, stable=True).indices[:, :k]
            ids_QK, *columns = (values.gather(1, order_QK) for values in (ids_QK, *columns))
            self.tell((start + len(tile_ids)) / len(base_ids))
        absent_QK = columns[0] == -torch.inf
        answer = (ids_QK.masked_fill(absent_QK, NO_PAIR), *(column.masked_fill(absent_QK, 0) for column in columns[1:]))
        fills = (NO_PAIR, 0.0, 0.0)
        return tuple(
            np.pad(values.cpu().numpy(), ((0, 0), (0, k - values.shape[1])), constant_values=fill)
            for values, fill in zip(answer, fills, strict=True)
        )


def released_score(image_QB: torch.Tensor, text_QB: torch.Tensor) -> torch.Tensor:
    """float64 [Q, B]: the released score of two exact cosines."""
    image_QB = image_QB.masked_fill(image_QB > IMAGE_CUT, 0.0)
    text_QB = text_QB.masked_fill(text_QB > TEXT_SELF_CUT, -1.0)
    return image_QB * text_QB.masked_fill_(text_QB > TEXT_CUT, 0.0)
