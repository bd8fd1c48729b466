"""The rows of largest loss, from float64 products.

A float32 cosine is off by about 1e-7, a logit at scale 100 by 1e-5. As long as many rows carry the loss these errors
average out; at low loss a handful of rows carry it, and their softmax terms are formed here instead of in the sweeps.

Shape letters: `B` rows of this rank, `G` rows of all ranks, `D` embedding, `K` hardest rows of all ranks, `H` those at
hand, `R` any rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.contrastive.blockwise import tiles

REFINED_ROWS = 64
# Small batches keep the proportion.
ONE_REFINED_OF = 8
# Of the squares of all rows' gradient weights: below, the hardest rows are too few to matter.
LEAST_SHARE = 0.25


@dataclass(frozen=True)
class HardRows:
    """Rows whose softmax terms are left to `add_softmax_terms`.

    own_H: their numbers in the tensor that a sweep calls its rows (or columns). partner_H: of their partners among the
    other tower's rows at hand, which may lie outside of these. lse_H: float64 log-sum-exps.
    """

    own_H: Tensor
    partner_H: Tensor
    lse_H: Tensor

    @classmethod
    def of(cls, own: list[int], to_partner: int, lse_R: Tensor) -> "HardRows":
        """Rows `own` of those whose log-sum-exps are lse_R; partners are numbered `to_partner` higher."""
        own_H = torch.tensor(own, dtype=torch.int64, device=lse_R.device)
        return cls(own_H, own_H + to_partner, lse_R[own_H])

    def weight(self, num_rows: int) -> Tensor | None:
        """float64: of each row's softmax term in a sweep."""
        if len(self.own_H) == 0:
            return None
        return torch.ones(num_rows, dtype=torch.float64, device=self.own_H.device).index_fill_(0, self.own_H, 0)


def num_refined(num_all_rows: int, dtype: torch.dtype) -> int:
    return 0 if dtype == torch.float64 else min(REFINED_ROWS, -(-num_all_rows // ONE_REFINED_OF))


def refine_hardest(
    off_B: Tensor, positive_B: Tensor, x_BD: Tensor, y_GD: Tensor, *, scale: float, offset: int, column_tile: int
) -> Tensor:
    """off_B with the log-sum-exps of the rows of largest loss computed anew, from float64 products."""
    if x_BD.dtype == torch.float64 or len(x_BD) == 0:
        return off_B
    rows_K = torch.topk(off_B - positive_B, min(REFINED_ROWS, len(off_B))).indices
    hard_KD, parts = x_BD[rows_K].double(), []
    for j0, j1 in tiles(len(y_GD), column_tile, 1):
        columns = y_GD[j0:j1].double()
        logits = (hard_KD @ columns.T).mul_(scale)
        fill_partners(logits, rows_K + offset - j0, -torch.inf)
        parts.append(logits.logsumexp(1))
    return off_B.index_copy(0, rows_K, torch.stack(parts).logsumexp(0))


@dataclass(frozen=True)
class Candidates:
    """The rows of largest loss of all ranks, and their share of the squares of all rows' gradient weights.

    numbers: [1 + K] share and rows in float64, to be brought to the host with
    others' numbers at once.
    """

    rows_K: Tensor
    numbers: Tensor

    @classmethod
    def of(cls, margin_G: Tensor, dtype: torch.dtype) -> "Candidates":
        """margin_G: a row's loss is its softplus. dtype: of the features."""
        rows_K = torch.topk(margin_G, num_refined(len(margin_G), dtype)).indices
        square_G = torch.sigmoid(margin_G).square_()
        share = square_G[rows_K].sum() / square_G.sum()
        return cls(rows_K, torch.cat([share[None], rows_K.double()]))

    def choose(self, numbers: list[float], off_G: Tensor, exact_off_G: Tensor) -> tuple[Tensor, list[int]]:
        """(off_G, in which the hardest rows are exact, and their numbers), or (off_G, []) where they do not matter."""
        share, *rows = numbers
        if not share > LEAST_SHARE:
            return off_G, []
        return off_G.index_copy(0, self.rows_K, exact_off_G[self.rows_K]), [int(row) for row in rows]


def add_softmax_terms(
    hard: HardRows,
    hard_HD: Tensor,
    rows_RD: Tensor,
    *,
    scale: float,
    cosine_origin: float,
    d_hard: Tensor | None,
    d_rows: Tensor | None,
    row_tile: int,
) -> Tensor:
    """What the sweep left out: the terms p = exp(s - lse) of `hard` with all rows_RD but their partners.

    d_hard[own_H] += p @ rows and d_rows += p.T @ hard_HD, where not None. Returns the float64 sum of p * (cosine -
    cosine_origin).
    """
    hard_HD = hard_HD.double()
    d_hard_HD, total = torch.zeros_like(hard_HD), hard_HD.new_zeros(())
    for r0, r1 in tiles(len(rows_RD), row_tile, 1):
        rows = rows_RD[r0:r1].double()
        cosine = hard_HD @ rows.T
        softmax = torch.exp(scale * cosine - hard.lse_H[:, None])
        fill_partners(softmax, hard.partner_H - r0, 0.0)
        total += cosine.sub_(cosine_origin).mul_(softmax).sum()
        if d_hard is not None:
            d_hard_HD.addmm_(softmax, rows)
        if d_rows is not None:
            d_rows[r0:r1] += (softmax.T @ hard_HD).to(d_rows.dtype)
    if d_hard is not None:
        d_hard[hard.own_H] += d_hard_HD.to(d_hard.dtype)
    return total


def fill_partners(matrix_HR: Tensor, partner_H: Tensor, value: float) -> None:
    """Puts `value`, in place, at each row's partner where that is among the columns; the device is not waited for."""
    num_columns = matrix_HR.shape[1]
    inside_H = (partner_H >= 0) & (partner_H < num_columns)
    place_H = partner_H.clamp(0, num_columns - 1)[:, None]
    before_H = matrix_HR.gather(1, place_H)
    matrix_HR.scatter_(1, place_H, before_H.masked_fill_(inside_H[:, None], value))
