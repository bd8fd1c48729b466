"""Sums of rows under tiles of weights, the two outputs of a gradient sweep: at float32's rate, or faster where the rows
are bfloat16 numbers.

In: tiles of weights W [B, G], a few rows of one at a time. Out: W @ y and W.T @ x, in the accumulation dtype.

Shape letters: `B` rows of this rank, `G` rows of all ranks, `D` embedding, `R` rows of a tile, `C` its columns, `S`
some of its rows.
"""

import functools

import torch
from torch import Tensor

from kernels.rows.precision import accumulation_dtype, bfloat16_units
from kernels.rows.scratch import Scratch

ROWS_AT_ONCE = 512
HALF_OF_LAST_BIT, LEADING_BITS = 0x8000, -0x10000


@functools.cache
def has_matrix_tiles() -> bool:
    """Whether this processor multiplies bfloat16 matrices several times as fast as float32 ones (Intel AMX)."""
    return torch.cpu.get_capabilities().get("amx_bf16", False)


class WeightedSums:
    """dx_BD += W @ y and dy_GD += W.T @ x, where wanted.

    For bfloat16 rows a weight is split where that pays. Rounded to bfloat16 it multiplies exactly on bfloat16 units,
    with float32 sums; the rest, rounded by those units, leaves an error of 2^-18 of each weight. `round_rest_sums`: the
    rest's sum over one tile is rounded to bfloat16 too, which is faster, at another 2^-18 of that sum.
    """

    def __init__(
        self, x_BD: Tensor, y_GD: Tensor, *, want_x: bool, want_y: bool, round_rest_sums: bool, scratch: Scratch
    ) -> None:
        self.x_BD, self.y_GD, self.scratch = x_BD, y_GD, scratch
        self.dtype, self.dim = accumulation_dtype(x_BD.dtype), x_BD.shape[1]
        self.is_split = x_BD.dtype == torch.bfloat16 and x_BD.device.type == "cpu" and has_matrix_tiles()
        self.rest_dtype = torch.bfloat16 if round_rest_sums else self.dtype
        self.dx_BD = x_BD.new_zeros(x_BD.shape, dtype=self.dtype) if want_x else None
        # Of each tile of columns [D, C]: products with a transposed tile of weights take longer.
        self.dy_flat = y_GD.new_zeros(y_GD.numel(), dtype=self.dtype) if want_y else None
        self.column_tiles: dict[int, int] = {}
        self.x_rows = None

    def put(self, weight_SC: Tensor, tile_RC: Tensor, first: int) -> None:
        """Fill rows `first` onwards of the tile; `weight_SC` is used up."""
        place_SC = tile_RC[first : first + len(weight_SC)]
        if not self.is_split:
            place_SC.copy_(weight_SC)
            return
        # On the bits. A weight that is not a number stays one in the rest.
        torch.add(weight_SC.view(torch.int32), HALF_OF_LAST_BIT, out=place_SC.view(torch.int32))
        place_SC.view(torch.int32).bitwise_and_(LEADING_BITS)
        self._rest(tile_RC)[first : first + len(weight_SC)].copy_(weight_SC.sub_(place_SC))

    def add(self, tile_RC: Tensor, rows: slice, columns: slice, x_RD: Tensor, y_CD: Tensor) -> None:
        """Add the products of a filled tile; x_RD, y_CD: its rows and columns in the accumulation dtype."""
        with bfloat16_units(self.is_split):
            self._add_products(tile_RC, rows, columns, x_RD, y_CD)
            if self.is_split and self.rest_dtype == self.dtype:
                self._add_products(self._rest(tile_RC), rows, columns, x_RD, y_CD)
        if self.is_split and self.rest_dtype != self.dtype:
            self._add_rounded_products(self._rest(tile_RC), rows, columns)

    def finished(self) -> tuple[Tensor | None, Tensor | None]:
        """(dx_BD, dy_GD), unwanted ones None."""
        if self.dy_flat is None:
            return self.dx_BD, None
        dy_GD = self.dy_flat.view(self.y_GD.shape)
        for start, stop in self.column_tiles.items():
            dy_GD[start:stop] = self._columns(slice(start, stop)).T.clone(memory_format=torch.contiguous_format)
        return self.dx_BD, dy_GD

    def _add_products(self, weight_RC: Tensor, rows: slice, columns: slice, x_RD: Tensor, y_CD: Tensor) -> None:
        if self.dx_BD is not None:
            self.dx_BD[rows].addmm_(weight_RC, y_CD)
        if self.dy_flat is not None:
            self._columns(columns).addmm_(x_RD.T, weight_RC)

    def _add_rounded_products(self, rest_RC: Tensor, rows: slice, columns: slice) -> None:
        num_rows, num_columns = rest_RC.shape
        if self.dx_BD is not None:
            product = self.scratch.matrix("dx rest", num_rows, self.dim, torch.bfloat16)
            self._add_rounded(self.dx_BD[rows], torch.mm(rest_RC, self.y_GD[columns], out=product))
        if self.dy_flat is not None:
            product = self.scratch.matrix("dy rest", self.dim, num_columns, torch.bfloat16)
            self._add_rounded(self._columns(columns), torch.mm(self._transposed(rows), rest_RC, out=product))

    def _add_rounded(self, sums: Tensor, product: Tensor) -> None:
        # A sum of two dtypes takes twice as long as a copy and a sum; in parts that stay in a processor's cache.
        for sums_part, part in zip(sums.split(ROWS_AT_ONCE), product.split(ROWS_AT_ONCE), strict=True):
            sums_part.add_(self.scratch.matrix("product", *part.shape, self.dtype).copy_(part))

    def _columns(self, columns: slice) -> Tensor:
        """[D, C] sums of a tile of columns."""
        self.column_tiles[columns.start] = columns.stop
        part = self.dy_flat[columns.start * self.dim : columns.stop * self.dim]
        return part.view(self.dim, columns.stop - columns.start)

    def _rest(self, tile_RC: Tensor) -> Tensor:
        return self.scratch.matrix("rest of weights", *tile_RC.shape, self.rest_dtype)

    def _transposed(self, rows: slice) -> Tensor:
        """bfloat16 [D, R] of these rows of x, kept while they are the same."""
        place = self.scratch.matrix("transposed rows", self.dim, rows.stop - rows.start, torch.bfloat16)
        if self.x_rows != rows:
            self.x_rows = rows
            place.copy_(self.x_BD[rows].T)
        return place
