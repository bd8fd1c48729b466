"""The rows of largest loss, from float64 products.

A float32 cosine is off by about 1e-7, a logit at scale 100 by 1e-5. As long as many rows carry the loss these errors
average out; at low loss a handful of rows carry it, and their softmax terms are formed here instead of in the sweeps.

Shape letters: `B` rows of this rank, `G` rows of all ranks, `D` embedding, `K` hardest rows of all ranks, `H` those at
hand, `R` any rows.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.contrastive.blockwise import tiles
from kernels.rows.scalars import is_at_hand

REFINED_ROWS = 64
# Small batches keep the proportion.
ONE_REFINED_OF = 8
# Of the squares of all rows' gradient weights: below, the hardest rows are too few to matter.
LEAST_SHARE = 0.25


@dataclass(frozen=True)
class HardRows:
    """Rows whose softmax terms are left to `add_softmax_terms`.

    own_H: their numbers in the tensor that a sweep calls its rows (or columns). partner_H: of their partners among the
    other tower's rows at hand, which may lie outside of these. lse_H: float64 log-sum-exps. left_out_H: float64, 1, or 0
    for a row of no terms (and an infinite log-sum-exp), there because nobody waited to see whether it belongs.
    """

    own_H: Tensor
    partner_H: Tensor
    lse_H: Tensor
    left_out_H: Tensor

    @classmethod
    def of(cls, hardest_K: Tensor, first: int, to_partner: int, lse_R: Tensor) -> "HardRows":
        """Those of `hardest_K`, numbered over all ranks, that are among the R rows from `first` on, whose log-sum-exps are
        lse_R; partners are numbered `to_partner` higher."""
        own_K = hardest_K - first
        inside_K = (hardest_K >= 0) & (own_K >= 0) & (own_K < len(lse_R))
        if is_at_hand(hardest_K):
            own_K, inside_K = own_K[inside_K], inside_K[inside_K]
        elif len(lse_R) == 0:
            own_K, inside_K = own_K[:0], inside_K[:0]
        own_H = own_K.clamp(0, max(len(lse_R) - 1, 0))
        return cls(own_H, own_H + to_partner, lse_R[own_H].masked_fill_(~inside_K, torch.inf), inside_K.double())

    def weight(self, num_rows: int) -> Tensor | None:
        """float64: of each row's softmax term in a sweep."""
        if len(self.own_H) == 0:
            return None
        ones = torch.ones(num_rows, dtype=torch.float64, device=self.own_H.device)
        return ones.index_add_(0, self.own_H, self.left_out_H, alpha=-1)


def num_refined(num_all_rows: int, dtype: torch.dtype) -> int:
    return 0 if dtype == torch.float64 else min(REFINED_ROWS, -(-num_all_rows // ONE_REFINED_OF))


def refine_hardest(
    off_B: Tensor, positive_B: Tensor, x_BD: Tensor, y_GD: Tensor, *, scale: Tensor, offset: int, block_rows: int
) -> Tensor:
    """off_B with the log-sum-exps of the rows of largest loss computed anew, from float64 products."""
    if x_BD.dtype == torch.float64 or len(x_BD) == 0:
        return off_B
    rows_K = torch.topk(off_B - positive_B, min(REFINED_ROWS, len(off_B))).indices
    hard_KD, parts = x_BD[rows_K].double(), []
    for j0, j1 in tiles(len(y_GD), block_rows, 1):
        columns = y_GD[j0:j1].double()
        logits = (hard_KD @ columns.T).mul_(scale)
        fill_partners(logits, rows_K + offset - j0, -torch.inf)
        parts.append(logits.logsumexp(1))
    return off_B.index_copy(0, rows_K, torch.stack(parts).logsumexp(0))


def choose_hardest(off_G: Tensor, exact_off_G: Tensor, positive_G: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(off_G, in which the hardest rows of all ranks are exact, their numbers, padded to REFINED_ROWS by -1).

    dtype: of the features. On a CPU there are none where they do not matter; a GPU would have to be waited for to
    know, for longer than their products take.
    """
    margin_G = off_G - positive_G
    rows_K = torch.topk(margin_G, num_refined(len(margin_G), dtype)).indices
    if is_at_hand(off_G) and not _share(margin_G, rows_K) > LEAST_SHARE:
        rows_K = rows_K[:0]
    hardest = F.pad(rows_K, (0, REFINED_ROWS - len(rows_K)), value=-1)
    return off_G.index_copy(0, rows_K, exact_off_G[rows_K]), hardest


def _share(margin_G: Tensor, rows_K: Tensor) -> Tensor:
    """Of these rows in the squares of all rows' gradient weights."""
    square_G = torch.sigmoid(margin_G).square_()
    return square_G[rows_K].sum() / square_G.sum()


def add_softmax_terms(
    hard: HardRows,
    hard_HD: Tensor,
    rows_RD: Tensor,
    *,
    scale: Tensor,
    cosine_origin: Tensor,
    d_hard: Tensor | None,
    d_rows: Tensor | None,
    block_rows: int,
) -> Tensor:
    """What the sweep left out: the terms p = exp(s - lse) of `hard` with all rows_RD but their partners.

    d_hard[own_H] += p @ rows and d_rows += p.T @ hard_HD, where not None. Returns the float64 sum of p * (cosine -
    cosine_origin).
    """
    hard_HD = hard_HD.double()
    d_hard_HD, total = torch.zeros_like(hard_HD), hard_HD.new_zeros(())
    for r0, r1 in tiles(len(rows_RD), block_rows, 1):
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
        # A row without terms may share its number with one that has some.
        d_hard.index_add_(0, hard.own_H, d_hard_HD.to(d_hard.dtype))
    return total


def fill_partners(matrix_HR: Tensor, partner_H: Tensor, value: float) -> None:
    """Puts `value`, in place, at each row's partner where that is among the columns; the device is not waited for."""
    num_columns = matrix_HR.shape[1]
    inside_H = (partner_H >= 0) & (partner_H < num_columns)
    place_H = partner_H.clamp(0, num_columns - 1)[:, None]
    before_H = matrix_HR.gather(1, place_H)
    matrix_HR.scatter_(1, place_H, before_H.masked_fill_(inside_H[:, None], value))
