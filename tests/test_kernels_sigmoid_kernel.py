"""The Triton sweeps of the sigmoid loss, under the interpreter, against the float64 definition and the tiled sweeps."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from tests.interpreted import interpreted

# Several strips, of several blocks, in tests of a few dozen rows.
SMALL_STRIPS = {"STRIP_ROWS": 32, "STRIP_COLUMNS": 48}


def rows_of(num_rows: int, dim: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(num_rows, dim, generator=generator, dtype=torch.float64), dim=1).to(dtype)


def definition(x_BD, y_GD, scale: float, bias: float, offset: int) -> list[torch.Tensor]:
    """(sum of softplus, its gradient by x / scale, by y / scale, sum g * cosine, sum g) in float64, matrices whole."""
    x_BD, y_GD = x_BD.double(), y_GD.double()
    cosine = x_BD @ y_GD.T
    logits = scale * cosine + bias
    others = torch.arange(len(x_BD))[:, None] + offset != torch.arange(len(y_GD))[None, :]
    weight = torch.sigmoid(logits) * others
    total = F.softplus(logits, threshold=40)[others].sum()
    return [total, weight @ y_GD, weight.T @ x_BD, (weight * cosine).sum(), weight.sum()]


def kernel_results(x_BD, y_GD, scale: float, bias: float, offset: int, **settings) -> list[torch.Tensor]:
    from kernels.rows import strips
    from kernels.sigmoid import launches

    with mock.patch.multiple(strips, **SMALL_STRIPS):
        total = launches.negative_sum(x_BD, y_GD, scale=scale, bias=bias, offset=offset)
        wanted = dict.fromkeys(("want_x", "want_y", "want_scalars"), True) | settings
        sweep = launches.gradient_sweep(x_BD, y_GD, scale=scale, bias=bias, offset=offset, **wanted)
    return [total, *sweep]


def assert_close(values, expected, tolerance: float) -> None:
    for value, wanted in zip(values, expected, strict=True):
        difference = (value.double() - wanted).norm()
        assert difference <= tolerance * wanted.norm() + 1e-300, (difference / wanted.norm()).item()


@pytest.mark.parametrize(
    ("num_x", "num_y", "dim", "offset"),
    [
        (1, 1, 1, 0),
        (1, 2, 3, 1),
        (16, 16, 16, 0),
        (33, 49, 17, 0),
        (37, 101, 23, 20),
        (20, 63, 123, 43),
        (5, 9, 4, 100),
    ],
)
@interpreted
def test_sums_and_gradients_equal_the_definition_in_float64(num_x, num_y, dim, offset):
    x_BD, y_GD = rows_of(num_x, dim, torch.float64, 0), rows_of(num_y, dim, torch.float64, 1)
    values = kernel_results(x_BD, y_GD, 12.0, -3.0, offset)
    assert_close(values, definition(x_BD, y_GD, 12.0, -3.0, offset), 1e-13)


@pytest.mark.parametrize(("scale", "bias"), [(1.0, 0.0), (10.0, -10.0), (100.0, 20.0), (1000.0, -300.0)])
@interpreted
def test_float32_is_as_accurate_as_the_tiled_sweeps(scale, bias):
    from kernels.sigmoid import blockwise

    x_BD, y_GD = rows_of(37, 40, torch.float32, 0), rows_of(70, 40, torch.float32, 1)
    expected = definition(x_BD, y_GD, scale, bias, 20)
    settings = {"scale": scale, "bias": bias, "offset": 20, "row_tile": 64, "column_tile": 64}
    tiled = [
        blockwise.negative_sum(x_BD, y_GD, **settings),
        *blockwise.gradient_sweep(x_BD, y_GD, want_x=True, want_y=True, want_scalars=True, **settings),
    ]
    for value, peer, wanted in zip(kernel_results(x_BD, y_GD, scale, bias, 20), tiled, expected, strict=True):
        error, peer_error = ((other.double() - wanted).norm() / wanted.norm() for other in (value, peer))
        assert error <= peer_error + 2e-6


# float16 rows are multiplied with float32 weights, which the interpreter does not round to TF32.
@pytest.mark.parametrize(
    ("dtype", "gradient_operand", "tolerance"),
    [
        (torch.bfloat16, "precise", 5e-6),
        (torch.bfloat16, "fast", 2.5e-3),
        (torch.float16, "precise", 1e-6),
        (torch.float16, "fast", 1e-6),
    ],
)
@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (100.0, -60.0)])
@interpreted
def test_sixteen_bit_rows_keep_float32_accuracy_unless_fast(dtype, gradient_operand, tolerance, scale, bias):
    x_BD, y_GD = rows_of(37, 23, dtype, 0), rows_of(70, 23, dtype, 1)
    total, *sweep = kernel_results(x_BD, y_GD, scale, bias, 20, gradient_operand=gradient_operand)
    expected = definition(x_BD, y_GD, scale, bias, 20)
    assert sweep[0].dtype == torch.float32
    # Sums never see the rounded operand.
    assert_close([total, *sweep[2:]], [expected[0], *expected[3:]], 2e-6)
    assert_close(sweep[:2], expected[1:3], tolerance)


@interpreted
def test_gradcheck_of_the_loss_through_the_kernels():
    from kernels import sigmoid_contrastive_loss

    leaves = [rows_of(9, 5, torch.float64, seed).requires_grad_() for seed in (0, 1)]
    leaves += [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (7.0, -2.0)]

    def loss(*inputs):
        return sigmoid_contrastive_loss(*inputs, backend="triton").loss

    assert torch.autograd.gradcheck(loss, leaves, eps=1e-6, atol=1e-8, rtol=1e-6)


@interpreted
def test_loss_through_the_kernels_equals_the_reference():
    from kernels import sigmoid_contrastive_gradients

    leaves = [rows_of(33, 12, torch.float32, seed) for seed in (0, 1)] + [torch.tensor([10.0]), torch.tensor([-5.0])]
    ours, wanted = (sigmoid_contrastive_gradients(*leaves, backend=backend) for backend in ("triton", "reference"))
    torch.testing.assert_close(ours.terms.loss, wanted.terms.loss, rtol=1e-6, atol=0)
    for name in ("d_image_BD", "d_text_BD", "d_logit_scale", "d_logit_bias"):
        torch.testing.assert_close(getattr(ours, name), getattr(wanted, name), rtol=1e-5, atol=1e-7)


@interpreted
def test_unwanted_gradients_are_not_computed():
    x_BD, y_GD = rows_of(20, 8, torch.float64, 0), rows_of(40, 8, torch.float64, 1)
    expected = definition(x_BD, y_GD, 9.0, -2.0, 4)
    _, dx_BD, dy_GD, *sums = kernel_results(x_BD, y_GD, 9.0, -2.0, 4, want_y=False, want_scalars=False)
    assert_close([dx_BD], expected[1:2], 1e-13)
    assert dy_GD is None
    assert [value.item() for value in sums] == [0, 0]
    _, dx_BD, dy_GD, *sums = kernel_results(x_BD, y_GD, 9.0, -2.0, 4, want_x=False, want_y=False)
    assert dx_BD is None
    assert dy_GD is None
    assert_close(sums, expected[3:], 1e-13)


@pytest.mark.parametrize(("num_x", "num_y"), [(0, 5), (5, 0), (0, 0)])
@interpreted
def test_no_rows_give_zeros(num_x, num_y):
    x_BD, y_GD = rows_of(num_x, 8, torch.bfloat16, 0), rows_of(num_y, 8, torch.bfloat16, 1)
    total, dx_BD, dy_GD, *sums = kernel_results(x_BD, y_GD, 9.0, -2.0, 0)
    assert (dx_BD.shape, dy_GD.shape) == (x_BD.shape, y_GD.shape)
    assert all((value == 0).all() for value in (total, dx_BD, dy_GD, *sums))


@interpreted
def test_not_a_number_is_never_hidden_and_reaches_no_other_row():
    x_BD, y_GD = rows_of(40, 8, torch.float32, 0), rows_of(60, 8, torch.float32, 1)
    x_BD[39, 3] = torch.nan
    total, dx_BD, dy_GD, *sums = kernel_results(x_BD, y_GD, 9.0, -2.0, 0)
    assert total.isnan()
    assert all(value.isnan() for value in sums)
    assert dx_BD[39].isnan().all()
    assert not dx_BD[:39].isnan().any()
    # Every column sums over row 39.
    assert dy_GD.isnan().any(1).all()


@interpreted
def test_rows_with_gaps_equal_rows_without():
    x_BD, y_GD = rows_of(20, 24, torch.float64, 0), rows_of(30, 24, torch.float64, 1)
    spread = [torch.stack([rows, rows + 7], dim=2).flatten(1)[:, ::2] for rows in (x_BD, y_GD)]
    assert not spread[0].is_contiguous()
    for value, wanted in zip(
        kernel_results(*spread, 9.0, -2.0, 3), kernel_results(x_BD, y_GD, 9.0, -2.0, 3), strict=True
    ):
        assert torch.equal(value, wanted)


@interpreted
def test_same_bits_on_every_run_and_inputs_untouched():
    x_BD, y_GD = rows_of(37, 20, torch.bfloat16, 0), rows_of(70, 20, torch.bfloat16, 1)
    before = x_BD.clone(), y_GD.clone()
    first, second = (kernel_results(x_BD, y_GD, 30.0, -9.0, 11) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert torch.equal(before[0], x_BD)
    assert torch.equal(before[1], y_GD)


@interpreted
def test_memory_beside_results_does_not_grow_with_the_batch():
    from kernels.rows import strips
    from kernels.rows.strips import Weights

    with mock.patch.multiple(strips, **SMALL_STRIPS):
        sizes = [
            Weights.scratch(
                "sigmoid_weights", torch.empty(num, 8), torch.empty(2 * num, 8), "interpreter", "precise"
            ).high.shape
            for num in (100, 10_000)
        ]
    assert sizes[0] == sizes[1] == (32, 48)


def test_tensors_on_the_cpu_are_refused_outside_the_interpreter():
    from kernels.sigmoid import launches

    rows = torch.ones(2, 4)
    with pytest.raises(ValueError, match="needs tensors on a GPU, not on cpu"):
        launches.negative_sum(rows, rows, scale=1.0, bias=0.0, offset=0)


def test_a_kernels_blocks_fit_the_product_that_reads_its_weights():
    from kernels.launch import BLOCKS, blocks_for
    from kernels.rows.kernel import product_blocks

    for kernel, chip in BLOCKS:
        if not kernel.endswith("_weights"):
            continue
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            for dim in (1, 64, 128, 129, 640, 2048):
                tile, product = blocks_for(kernel, chip, dtype, dim), product_blocks(chip, dtype, dim)
                # Summed over, an axis is read in whole blocks of this depth, as far as the tiles were written.
                assert tile.rows % product.depth == tile.columns % product.depth == 0
