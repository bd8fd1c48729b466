"""Tiled sweeps of the sigmoid loss over this rank's rows `x` and all ranks' rows `y`, positives left out.

Shape letters: `B` rows of this rank, `G` rows of all ranks, `D` embedding. Row i of `x` is the partner of row `offset
+ i` of `y`.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.contrastive.blockwise import cosine_tile, tiles
from kernels.rows.precision import accumulation_dtype
from kernels.rows.scratch import Scratch
from kernels.rows.sums import WeightedSums

ROW_TILE = 512
COLUMN_TILE = 1024
# Above, softplus is its argument to float64's last digit; torch's own threshold of 20 is not.
SOFTPLUS_THRESHOLD = 40


def negative_sum(
    x_BD: Tensor,
    y_GD: Tensor,
    *,
    scale: float | Tensor,
    bias: float | Tensor,
    offset: int,
    row_tile: int,
    column_tile: int,
) -> Tensor:
    """float64 0-d sum of softplus over the logits off the diagonal. Scalars that are tensors, 0-d, are waited for, which
    costs a CPU nothing."""
    scale, bias = float(scale), float(bias)
    total = torch.zeros((), dtype=torch.float64, device=x_BD.device)
    for logits, diagonal, _, _ in _logit_tiles(x_BD, y_GD, scale, bias, offset, row_tile, column_tile):
        if diagonal is not None:
            diagonal.fill_(-torch.inf)
        total += F.softplus(logits, threshold=SOFTPLUS_THRESHOLD).sum(1).double().sum()
    return total


def gradient_sweep(
    x_BD: Tensor,
    y_GD: Tensor,
    *,
    scale: float | Tensor,
    bias: float | Tensor,
    offset: int,
    want_x: bool,
    want_y: bool,
    want_scalars: bool,
    row_tile: int,
    column_tile: int,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """(sum_j g_ij y_j, sum_i g_ij x_i, sum g_ij cosine_ij, sum g_ij) with g = sigmoid(logit) off the diagonal.

    Unwanted ones are None, or 0 (float64).
    """
    scale, bias = float(scale), float(bias)
    dtype = accumulation_dtype(x_BD.dtype)
    logit_sum, weight_sum = (torch.zeros((), dtype=torch.float64, device=x_BD.device) for _ in range(2))
    scratch = Scratch(x_BD.device)
    sums = WeightedSums(x_BD, y_GD, want_x=want_x, want_y=want_y, round_rest_sums=False, scratch=scratch)
    for logits, diagonal, (rows, x_tile), (columns, y_tile) in _logit_tiles(
        x_BD, y_GD, scale, bias, offset, row_tile, column_tile
    ):
        weight = torch.sigmoid(logits, out=scratch.matrix("weight", *logits.shape, dtype))
        if diagonal is not None:
            low = max(offset + rows.start, columns.start)
            weight[low - offset - rows.start :, low - columns.start :].diagonal()[: len(diagonal)].zero_()
        if want_scalars:
            weight_sum += weight.sum(1).double().sum()
            logit_sum += logits.mul_(weight).sum(1).double().sum()
        if sums.is_split:
            sums.put(weight, logits, 0)
        sums.add(logits if sums.is_split else weight, rows, columns, x_tile, y_tile)
    return *sums.finished(), (logit_sum - bias * weight_sum) / scale, weight_sum


def _logit_tiles(
    x_BD: Tensor, y_GD: Tensor, scale: float, bias: float, offset: int, row_tile: int, column_tile: int
) -> Iterator[tuple[Tensor, Tensor | None, tuple[slice, Tensor], tuple[slice, Tensor]]]:
    """Each tile of logits in one reused buffer, the view of its partners or None, and the rows and columns it is made
    of."""
    dtype = accumulation_dtype(x_BD.dtype)
    scratch = Scratch(x_BD.device)
    for i0, i1 in tiles(len(x_BD), row_tile, 1):
        x_tile = scratch.rows_in(dtype, x_BD[i0:i1], "rows")
        for j0, j1 in tiles(len(y_GD), column_tile, 1):
            y_tile = scratch.rows_in(dtype, y_GD[j0:j1], "columns")
            logits = scratch.matrix("logits", i1 - i0, j1 - j0, dtype)
            cosine_tile(x_tile, y_tile, out=logits, exact_in_bfloat16=x_BD.dtype == torch.bfloat16)
            logits.mul_(scale).add_(bias)
            low, high = max(offset + i0, j0), min(offset + i1, j1)
            square = logits[low - offset - i0 : high - offset - i0, low - j0 : high - j0] if low < high else None
            diagonal = square.diagonal() if square is not None else None
            yield logits, diagonal, (slice(i0, i1), x_tile), (slice(j0, j1), y_tile)
