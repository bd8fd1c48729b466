"""Sums of rows under tiles of weights: against float64 products, for every dtype, ragged tiles, and weights that are no
numbers."""

import pytest
import torch

from kernels.contrastive.blockwise import tiles
from kernels.rows.precision import accumulation_dtype
from kernels.rows.scratch import Scratch
from kernels.rows.sums import WeightedSums

ROW_TILE, COLUMN_TILE, PART = 32, 40, 12


def sums_of(weight_BG: torch.Tensor, x_BD: torch.Tensor, y_GD: torch.Tensor, **settings) -> list[torch.Tensor | None]:
    scratch, dtype = Scratch(x_BD.device), accumulation_dtype(x_BD.dtype)
    settings = {"want_x": True, "want_y": True, "round_rest_sums": False, **settings}
    sums = WeightedSums(x_BD, y_GD, scratch=scratch, **settings)
    for i0, i1 in tiles(len(x_BD), ROW_TILE, 1):
        for j0, j1 in tiles(len(y_GD), COLUMN_TILE, 1):
            tile = scratch.matrix("tile", i1 - i0, j1 - j0, dtype)
            for r0, r1 in tiles(i1 - i0, PART, 1):
                sums.put(weight_BG[i0 + r0 : i0 + r1, j0:j1].clone(), tile, r0)
            sums.add(tile, slice(i0, i1), slice(j0, j1), x_BD[i0:i1].to(dtype), y_GD[j0:j1].to(dtype))
    return sums.finished()


def operands(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    x_BD, y_GD = (torch.randn(rows, 33, generator=generator).to(dtype) for rows in (70, 101))
    # Of one sign and of very different size, as exponentials are.
    weight_BG = torch.exp(6 * torch.randn(70, 101, generator=generator)).to(accumulation_dtype(dtype))
    return weight_BG, x_BD, y_GD


@pytest.mark.parametrize(
    ("dtype", "round_rest_sums", "tolerance"),
    [
        (torch.float64, False, 1e-14),
        (torch.float32, False, 1e-6),
        (torch.float16, True, 1e-6),
        (torch.bfloat16, False, 4e-6),
        (torch.bfloat16, True, 6e-6),
    ],
)
def test_both_products_match_float64(dtype, round_rest_sums, tolerance):
    weight_BG, x_BD, y_GD = operands(dtype)
    expected = weight_BG.double() @ y_GD.double(), weight_BG.double().T @ x_BD.double()
    for value, wanted in zip(sums_of(weight_BG, x_BD, y_GD, round_rest_sums=round_rest_sums), expected, strict=True):
        assert (value.double() - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_what_is_wanted_is_summed(dtype):
    weight_BG, x_BD, y_GD = operands(dtype)
    both = sums_of(weight_BG, x_BD, y_GD)
    assert sums_of(weight_BG, x_BD, y_GD, want_x=False)[0] is None
    assert sums_of(weight_BG, x_BD, y_GD, want_x=False)[1].equal(both[1])
    assert sums_of(weight_BG, x_BD, y_GD, want_y=False)[1] is None
    assert sums_of(weight_BG, x_BD, y_GD, want_y=False)[0].equal(both[0])


@pytest.mark.parametrize("round_rest_sums", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_is_not_a_number_shows_in_its_row_and_column_alone(dtype, round_rest_sums):
    weight_BG, x_BD, y_GD = operands(dtype)
    weight_BG[50, 77] = torch.nan
    dx_BD, dy_GD = sums_of(weight_BG, x_BD, y_GD, round_rest_sums=round_rest_sums)
    assert dx_BD.isnan().any(1).nonzero()[:, 0].tolist() == [50]
    assert dy_GD.isnan().any(1).nonzero()[:, 0].tolist() == [77]
