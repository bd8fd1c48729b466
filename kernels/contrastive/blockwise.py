"""Tiled sweeps over the cosines of this rank's rows `x` and all ranks' rows `y`: never more than one tile of them
exists.

`forward_sweep` (one product) yields log-sum-exp and hinge statistics of rows and columns, `gradient_sweep` (one
product again, plus one per wanted output) applies the finished statistics. The diagonal, positive pairs, is left out
of every tile product. Images as `x` and texts as `y`, or the other way round: both sweeps are symmetric in their
meaning.

Shape letters: `B` rows of this rank, `G` rows of all ranks, `D` embedding, `A` anchors among the rows at hand. Row i
of `x` is the partner of row `offset + i` of `y`. Statistics are float64: they are O(B + G), and float32 would cost
digits at scale 100.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.rows.precision import accumulation_dtype, bfloat16_units
from kernels.rows.scratch import Scratch
from kernels.rows.sums import WeightedSums

ROW_TILE, COLUMN_TILE = 1024, 1024
# A bfloat16 product W @ y takes twice as long with fewer rows.
BFLOAT16_ROW_TILE = 2048
PART_ROWS = 512
# How far apart two references may lie (in nats) for one exponential to serve rows and columns: what underflows in one
# is then nothing in the other either.
SHARED_EXPONENT_RANGE = 40.0
# exp is a hundred times slower where its result is denormal (-87 and below); exp(-80) is nothing beside a row's sum
# already.
LEAST_EXPONENT = -80.0


@dataclass(frozen=True)
class Hinges:
    """Thresholds of the margin loss in cosine units: a non-negative excess over them is what HNML punishes.

    row_A / column_A: threshold of each anchor among the rows / columns, None where that direction is off.
    Rows come in groups of `group_rows`, the anchor first; a group's own block has no hinge.
    """

    group_rows: int
    row_A: Tensor | None
    column_A: Tensor | None

    def of_columns(self, start: int, stop: int) -> Tensor:
        """Thresholds [1, stop - start] of all columns, infinite where none is an anchor: whole rows of a tile are faster
        to compare than every other number of them."""
        anchors = self.column_A[start // self.group_rows : stop // self.group_rows]
        others = anchors.new_full((len(anchors), self.group_rows - 1), torch.inf)
        return torch.cat([anchors[:, None], others], 1).reshape(1, -1)


@dataclass
class Statistics:
    """What one forward sweep knows; `*_max` in cosine units, `*_sum` of exp(scale * cosine - reference), all float64.

    The reference of a maximum is `reference_logit`: the same float32 number wherever it is formed.
    """

    row_max_B: Tensor
    row_sum_B: Tensor
    column_max_G: Tensor
    column_sum_G: Tensor
    tile_diagonal_B: Tensor
    row_hinge_A: Tensor
    row_active_A: Tensor
    column_hinge_A: Tensor
    column_active_A: Tensor


def row_tile_for(dtype: torch.dtype) -> int:
    return BFLOAT16_ROW_TILE if dtype == torch.bfloat16 else ROW_TILE


def tiles(num_rows: int, tile: int, group_rows: int) -> Iterator[tuple[int, int]]:
    """Half-open ranges of whole groups, about `tile` rows each."""
    step = max(tile // group_rows, 1) * group_rows
    for start in range(0, num_rows, step):
        yield start, min(start + step, num_rows)


def forward_sweep(
    x_BD: Tensor, y_GD: Tensor, *, scale: float | Tensor, offset: int, hinges: Hinges, row_tile: int, column_tile: int
) -> Statistics:
    """Statistics of x_BD @ y_GD.T off the diagonal. row_tile 0: what suits the dtype. `scale` as a tensor, 0-d, is waited
    for, which costs a CPU nothing."""
    scale, row_tile = float(scale), row_tile or row_tile_for(x_BD.dtype)
    stats = _empty_statistics(len(x_BD), len(y_GD), hinges, x_BD.device)
    dtype = accumulation_dtype(x_BD.dtype)
    stats.tile_diagonal_B = x_BD.new_zeros(len(x_BD), dtype=dtype)
    group = hinges.group_rows
    scratch = Scratch(x_BD.device)
    for i0, i1 in tiles(len(x_BD), row_tile, group):
        x_tile = scratch.rows_in(dtype, x_BD[i0:i1], "rows")
        for j0, j1 in tiles(len(y_GD), column_tile, group):
            y_tile = scratch.rows_in(dtype, y_GD[j0:j1], "columns")
            cosine = scratch.matrix("cosine", i1 - i0, j1 - j0, dtype)
            cosine_tile(x_tile, y_tile, out=cosine, exact_in_bfloat16=x_BD.dtype == torch.bfloat16)
            for r0, r1 in tiles(i1 - i0, PART_ROWS, group):
                part, rows = cosine[r0:r1], (i0 + r0, i0 + r1)
                work = scratch.matrix("work", *part.shape, dtype)
                band = _band(offset + rows[0], offset + rows[1], j0, j1)
                if band is not None:
                    diagonal = part[band].diagonal()
                    first = rows[0] + band[0].start
                    stats.tile_diagonal_B[first : first + len(diagonal)] = diagonal
                    diagonal.fill_(-torch.inf)
                _add_exponentials(stats, part, work, rows, (j0, j1), scale)
                if band is not None and (hinges.row_A is not None or hinges.column_A is not None):
                    _exclude_groups(part[band], group)
                _add_hinges(stats, hinges, part, work, rows, (j0, j1))
    return stats


def gradient_sweep(
    x_BD: Tensor,
    y_GD: Tensor,
    *,
    scale: float | Tensor,
    offset: int,
    hinges: Hinges,
    row_lse_B: Tensor,
    column_lse_G: Tensor,
    hinge_weight: float | Tensor,
    want_x: bool,
    want_y: bool,
    want_scale: bool,
    cosine_origin: float | Tensor,
    row_tile: int,
    column_tile: int,
    row_weight_B: Tensor | None = None,
    column_weight_G: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Off-diagonal part of (d x_BD, d y_GD, scale sum), unwanted ones None or 0 (float64).

    The gradient with respect to cosine (i, j) is row_weight_i * exp(s_ij - row_lse_i) + column_weight_j * exp(s_ij -
    column_lse_j), and outside the groups hinge_weight for exceeding the row's threshold, again for the column's.
    Weights of None are 1. row_tile 0: what suits the dtype.
    """
    row_tile = row_tile or row_tile_for(x_BD.dtype)
    scale, hinge_weight, cosine_origin = float(scale), float(hinge_weight), float(cosine_origin)
    dtype, group = accumulation_dtype(x_BD.dtype), hinges.group_rows
    scale_sum = torch.zeros((), dtype=torch.float64, device=x_BD.device)
    scratch = Scratch(x_BD.device)
    sums = WeightedSums(x_BD, y_GD, want_x=want_x, want_y=want_y, round_rest_sums=True, scratch=scratch)
    rows, columns = SoftmaxTerms(row_lse_B, row_weight_B), SoftmaxTerms(column_lse_G, column_weight_G)
    softmax = SoftmaxSum(rows, columns, scale, dtype) if len(x_BD) and len(y_GD) else None
    for i0, i1 in tiles(len(x_BD), row_tile, group):
        x_tile = scratch.rows_in(dtype, x_BD[i0:i1], "rows")
        for j0, j1 in tiles(len(y_GD), column_tile, group):
            y_tile = scratch.rows_in(dtype, y_GD[j0:j1], "columns")
            cosine = scratch.matrix("cosine", i1 - i0, j1 - j0, dtype)
            cosine_tile(x_tile, y_tile, out=cosine, exact_in_bfloat16=x_BD.dtype == torch.bfloat16)
            # In parts that stay in a processor's cache; a part's weights take the place of its cosines.
            for r0, r1 in tiles(i1 - i0, PART_ROWS, group):
                part = cosine[r0:r1]
                gradient, work = (scratch.matrix(name, *part.shape, dtype) for name in ("gradient", "work"))
                softmax.fill(part, slice(i0 + r0, i0 + r1), slice(j0, j1), gradient, work)
                band = _band(offset + i0 + r0, offset + i0 + r1, j0, j1)
                if band is not None:
                    gradient[band].diagonal().zero_()
                if want_scale:
                    # The origin keeps the sum from cancelling against the positives' as it would around zero.
                    scale_sum += torch.sub(part, cosine_origin, out=work).mul_(gradient).sum()
                _add_active_hinges(hinges, part, band, i0 + r0, (j0, j1), hinge_weight, gradient, work)
                sums.put(gradient, cosine, r0)
            sums.add(cosine, slice(i0, i1), slice(j0, j1), x_tile, y_tile)
    return *sums.finished(), scale_sum


def cosine_tile(x_BD: Tensor, y_BD: Tensor, *, out: Tensor, exact_in_bfloat16: bool) -> None:
    """x_BD @ y_BD.T into `out`, on bfloat16 units where the rows are bfloat16 numbers: the sums stay float32."""
    with bfloat16_units(exact_in_bfloat16):
        torch.mm(x_BD, y_BD.T, out=out)


def row_dots(x_BD: Tensor, y_BD: Tensor, *, block_rows: int) -> Tensor:
    """float64 [B] dot products of matching rows: the positive pairs."""
    dots_B = x_BD.new_zeros(len(x_BD), dtype=torch.float64)
    for i0, i1 in tiles(len(x_BD), block_rows, 1):
        torch.sum(x_BD[i0:i1].double() * y_BD[i0:i1].double(), dim=1, out=dots_B[i0:i1])
    return dots_B


def mean_row(x_GD: Tensor, *, block_rows: int) -> Tensor:
    """float64 [D] mean over the rows."""
    sum_D = x_GD.new_zeros(x_GD.shape[1], dtype=torch.float64)
    for i0, i1 in tiles(len(x_GD), block_rows, 1):
        sum_D += x_GD[i0:i1].double().sum(0)
    return sum_D / len(x_GD)


def hard_minimum(anchor_BD: Tensor, hard_BD: Tensor, group_rows: int, *, block_rows: int) -> tuple[Tensor, Tensor]:
    """Smallest cosine of each group's anchor (taken from the first tensor) with its hard rows (from the second), and
    its row.

    Returns (threshold_A in the accumulation dtype, row_A int64: the first row that attains it).
    """
    dtype = accumulation_dtype(anchor_BD.dtype)
    num_groups = len(anchor_BD) // group_rows
    threshold_A = anchor_BD.new_zeros(num_groups, dtype=dtype)
    row_A = torch.zeros(num_groups, dtype=torch.int64, device=anchor_BD.device)
    for i0, i1 in tiles(len(anchor_BD), block_rows, group_rows):
        a0, a1 = i0 // group_rows, i1 // group_rows
        anchors = anchor_BD[i0:i1:group_rows].to(dtype)
        hard = hard_BD[i0:i1].unflatten(0, (-1, group_rows))[:, 1:].to(dtype)
        cosine = torch.bmm(hard, anchors[:, :, None])[:, :, 0]
        index = cosine.argmin(1)
        threshold_A[a0:a1] = cosine.gather(1, index[:, None])[:, 0]
        row_A[a0:a1] = torch.arange(i0, i1, group_rows, device=index.device) + 1 + index
    return threshold_A, row_A


def reference_logit(max_B: Tensor, scale: float | Tensor, dtype: torch.dtype) -> Tensor:
    """float64 of the float32 product scale * maximum; a fused multiply-add then subtracts it without another
    rounding."""
    return (max_B.to(dtype) * scale).double()


def log_sum_exp(max_B: Tensor, sum_B: Tensor, scale: float | Tensor, dtype: torch.dtype) -> Tensor:
    """Logit units; -inf where nothing was summed, NaN where something was not a number."""
    return reference_logit(_finite_or_zero(max_B), scale, dtype) + sum_B.log()


def rescale(old_max_B: Tensor, new_max_B: Tensor, scale: float | Tensor, dtype: torch.dtype) -> Tensor:
    """What turns a sum under the old maximum into one under the new, 0 where nothing was summed."""
    return torch.exp(
        reference_logit(old_max_B, scale, dtype) - reference_logit(_finite_or_zero(new_max_B), scale, dtype)
    )


def _empty_statistics(num_rows: int, num_columns: int, hinges: Hinges, device: torch.device) -> Statistics:
    def full(size: int, value: float) -> Tensor:
        return torch.full((size,), value, dtype=torch.float64, device=device)

    row_anchors, column_anchors = num_rows // hinges.group_rows, num_columns // hinges.group_rows
    return Statistics(
        row_max_B=full(num_rows, -torch.inf),
        row_sum_B=full(num_rows, 0.0),
        column_max_G=full(num_columns, -torch.inf),
        column_sum_G=full(num_columns, 0.0),
        tile_diagonal_B=full(num_rows, 0.0),
        row_hinge_A=full(row_anchors if hinges.row_A is not None else 0, 0.0),
        row_active_A=full(row_anchors if hinges.row_A is not None else 0, 0.0),
        column_hinge_A=full(column_anchors if hinges.column_A is not None else 0, 0.0),
        column_active_A=full(column_anchors if hinges.column_A is not None else 0, 0.0),
    )


def _finite_or_zero(max_B: Tensor) -> Tensor:
    return torch.where(max_B == -torch.inf, 0.0, max_B)


def _band(i0: int, i1: int, j0: int, j1: int) -> tuple[slice, slice] | None:
    """The tile's square of rows and columns that are partners, or None."""
    low, high = max(i0, j0), min(i1, j1)
    return (slice(low - i0, high - i0), slice(low - j0, high - j0)) if low < high else None


def _add_exponentials(
    stats: Statistics, cosine: Tensor, work: Tensor, rows: tuple[int, int], columns: tuple[int, int], scale: float
) -> None:
    """Fold part of a tile into the running (max, sum) of its rows and columns, each by its own reference: an exponent's
    rounding grows with its distance from it."""
    row_max, column_max = cosine.amax(1), cosine.amax(0)
    row_reference = reference_logit(_finite_or_zero(row_max), scale, cosine.dtype)
    column_reference = reference_logit(_finite_or_zero(column_max), scale, cosine.dtype)
    row_sum = _exponentials(cosine, row_reference[:, None], scale, work).sum(1)
    highest = row_reference.max()
    # The rows' exponentials serve the columns too: a weighted sum in place of another exponential of the whole tile.
    if (highest - column_reference.min()) < SHARED_EXPONENT_RANGE:
        weight = torch.exp(row_reference - highest).masked_fill_(row_max == -torch.inf, 0)
        column_sum = torch.mv(work.T, weight.to(work.dtype)).double() * torch.exp(highest - column_reference)
    else:
        column_sum = _exponentials(cosine, column_reference[None, :], scale, work).sum(0)
    own, others = slice(*rows), slice(*columns)
    _merge(stats.row_max_B[own], stats.row_sum_B[own], row_max, row_sum, scale)
    _merge(stats.column_max_G[others], stats.column_sum_G[others], column_max, column_sum, scale)


def _exponentials(cosine: Tensor, reference: Tensor, scale: float, out: Tensor) -> Tensor:
    """exp(scale * cosine - reference) into `out`; `reference` float64, exactly a number of the tile's dtype."""
    return torch.add(-reference.to(out.dtype), cosine, alpha=scale, out=out).clamp_(min=LEAST_EXPONENT).exp_()


def _merge(max_B: Tensor, sum_B: Tensor, tile_max_B: Tensor, tile_sum_B: Tensor, scale: float) -> None:
    dtype, tile_max_B = tile_max_B.dtype, tile_max_B.double()
    new_max_B = torch.maximum(max_B, tile_max_B)
    added_B = tile_sum_B.double() * rescale(tile_max_B, new_max_B, scale, dtype)
    sum_B.mul_(rescale(max_B, new_max_B, scale, dtype)).add_(added_B)
    max_B.copy_(new_max_B)


@dataclass(frozen=True)
class SoftmaxTerms:
    """Of rows or columns, float64: weight * exp(s - lse); a weight of None is 1."""

    lse_B: Tensor
    weight_B: Tensor | None

    def factor(self, reference: Tensor) -> Tensor:
        """What turns exp(s - reference) into the term."""
        factor_B = torch.exp(reference - self.lse_B)
        return factor_B if self.weight_B is None else factor_B * self.weight_B


class SoftmaxSum:
    """The sum of row and column terms, for a part of all rows and columns at a time."""

    def __init__(self, rows: SoftmaxTerms, columns: SoftmaxTerms, scale: float, dtype: torch.dtype) -> None:
        self.scale = scale
        self.row_reference = rows.lse_B.max().to(dtype).double()
        least = torch.minimum(rows.lse_B.min(), columns.lse_B.min())
        # exp(s_ij - origin) * (exp(origin - row_lse_i) + exp(origin - column_lse_j)): one exponential for both.
        self.column_reference = None if self.row_reference - least < SHARED_EXPONENT_RANGE else columns.lse_B.to(dtype)
        if self.column_reference is not None:
            # The exponent's reference must be a number of the tile's dtype; a factor near one makes up for its rounding.
            self.row_reference = rows.lse_B.to(dtype).double()[:, None]
            self.column_reference = self.column_reference.double()
        column_reference = self.row_reference if self.column_reference is None else self.column_reference
        self.row_factor = rows.factor(self.row_reference.reshape(-1)).to(dtype)[:, None]
        self.column_factor = columns.factor(column_reference).to(dtype)[None, :]

    def fill(self, cosine: Tensor, rows: slice, columns: slice, out: Tensor, work: Tensor) -> None:
        """The terms of `rows` and `columns`, whose cosines these are, into `out`."""
        if self.column_reference is None:
            _exponentials(cosine, self.row_reference, self.scale, out)
            out.mul_(torch.add(self.row_factor[rows], self.column_factor[:, columns], out=work))
            return
        _exponentials(cosine, self.row_reference[rows], self.scale, out)
        _exponentials(cosine, self.column_reference[None, columns], self.scale, work)
        out.mul_(self.row_factor[rows]).addcmul_(work, self.column_factor[:, columns])


def _add_active_hinges(
    hinges: Hinges,
    cosine: Tensor,
    band: tuple[slice, slice] | None,
    first_row: int,
    columns: tuple[int, int],
    hinge_weight: float,
    gradient: Tensor,
    work: Tensor,
) -> None:
    """Add the weight of every hinge that is active to the gradient of some rows; excludes the groups from `cosine`."""
    group = hinges.group_rows
    if band is not None and (hinges.row_A is not None or hinges.column_A is not None):
        _exclude_groups(cosine[band], group)
    if hinges.row_A is not None:
        threshold = hinges.row_A[first_row // group : (first_row + len(cosine)) // group, None]
        active = torch.gt(cosine[::group], threshold, out=work[::group])
        gradient[::group].add_(active, alpha=hinge_weight)
    if hinges.column_A is not None:
        active = torch.gt(cosine, hinges.of_columns(*columns), out=work)
        gradient.add_(active, alpha=hinge_weight)


def _exclude_groups(block: Tensor, group_rows: int) -> None:
    """Take the blocks of each group with itself out of the hinge's reach."""
    own = block.unflatten(0, (-1, group_rows)).unflatten(2, (-1, group_rows)).diagonal(dim1=0, dim2=2)
    own.fill_(-torch.inf)


def _add_hinges(
    stats: Statistics, hinges: Hinges, cosine: Tensor, work: Tensor, rows: tuple[int, int], columns: tuple[int, int]
) -> None:
    group = hinges.group_rows
    if hinges.row_A is not None:
        own, threshold = (
            slice(rows[0] // group, rows[1] // group),
            hinges.row_A[rows[0] // group : rows[1] // group, None],
        )
        stats.row_hinge_A[own] += torch.sub(cosine[::group], threshold, out=work[::group]).relu_().sum(1)
        stats.row_active_A[own] += torch.gt(cosine[::group], threshold, out=work[::group]).sum(1)
    if hinges.column_A is not None:
        own, threshold = slice(columns[0] // group, columns[1] // group), hinges.of_columns(*columns)
        stats.column_hinge_A[own] += torch.sub(cosine, threshold, out=work).relu_().sum(0)[::group]
        stats.column_active_A[own] += torch.gt(cosine, threshold, out=work).sum(0)[::group]
