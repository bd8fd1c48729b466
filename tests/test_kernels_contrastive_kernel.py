"""The contrastive loss's Triton kernels under the interpreter: against the tiled sweeps, the definition in float64,
finite differences, and hand calculation."""

import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from kernels import contrastive_gradients, contrastive_loss, off_diagonal_log_sum_exp
from kernels.contrastive import blockwise, hardest
from kernels.contrastive.blockwise import Hinges, accumulation_dtype
from tests.interpreted import interpreted

# Called in the interpreter's process only: importing the kernels decides how Triton runs.
FLAGS = [
    {},
    {"hard_per_anchor": 2},
    {"hard_per_anchor": 2, "margin_weight": 0.7, "label_smoothing": 0.1},
    {"hard_per_anchor": 1, "margin_weight": 0.7, "margin_space": "logits", "margin_direction": "image_to_text"},
    {"hard_per_anchor": 5, "margin_weight": 1.3, "margin_direction": "text_to_image", "label_smoothing": 0.3},
]
# b, G, offset, D, group: odd sizes, our rows anywhere among all, one column, one block and many.
SHAPES = [
    (1, 1, 0, 1, 1),
    (3, 3, 0, 123, 3),
    (1, 20, 19, 7, 1),
    (63, 63, 0, 33, 1),
    (21, 63, 21, 16, 3),
    (34, 70, 2, 17, 2),
    (10, 45, 35, 3, 5),
]


def rows_of(num_rows: int, dim: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(num_rows, dim, generator=generator, dtype=torch.float64), dim=1).to(dtype)


def towers(num_rows: int, dim: int, noise: float, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    image = rows_of(num_rows, dim)
    return [rows.to(dtype) for rows in (image, F.normalize(image + noise * rows_of(num_rows, dim, seed=1), dim=1))]


def sweep_inputs(shape: tuple[int, ...], dtype: torch.dtype, *, row_hinge: bool = True, column_hinge: bool = True):
    num_rows, num_columns, offset, dim, group = shape
    x_BD, y_GD = rows_of(num_rows, dim, dtype, 2), rows_of(num_columns, dim, dtype, 3)
    generator = torch.Generator().manual_seed(4)
    thresholds = [
        torch.rand(size // group, generator=generator, dtype=torch.float64).to(accumulation_dtype(dtype)) * 0.4
        for size in (num_rows, num_columns)
    ]
    hinges = Hinges(group, thresholds[0] if row_hinge else None, thresholds[1] if column_hinge else None)
    tiles = {"row_tile": 512, "column_tile": 2048}
    return x_BD, y_GD, {"scale": 20.0, "offset": offset, "hinges": hinges, **tiles}


def gradient_inputs(shape: tuple[int, ...], dtype: torch.dtype, spread: float = 0.0, **hinges: bool):
    """`spread`: how far, in nats, the rows' log-sum-exps reach beyond the columns'."""
    x_BD, y_GD, settings = sweep_inputs(shape, dtype, **hinges)
    generator = torch.Generator().manual_seed(5)
    row_lse_B = 3 + torch.rand(len(x_BD), generator=generator, dtype=torch.float64) * (1 + spread)
    column_lse_G = 3 + torch.rand(len(y_GD), generator=generator, dtype=torch.float64)
    settings |= {"row_lse_B": row_lse_B, "column_lse_G": column_lse_G, "hinge_weight": 0.37, "cosine_origin": 0.1}
    return x_BD, y_GD, settings | {"want_x": True, "want_y": True, "want_scale": True}


def relative_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())


def assert_same_statistics(ours, expected, tolerance: float):
    for name, value in vars(expected).items():
        torch.testing.assert_close(
            getattr(ours, name),
            value,
            rtol=tolerance,
            atol=tolerance,
            equal_nan=True,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize("shape", SHAPES)
@interpreted
def test_statistics_equal_the_tiled_sweep_in_float64(shape):
    from kernels.contrastive import launches

    x_BD, y_GD, settings = sweep_inputs(shape, torch.float64)
    ours = launches.forward_sweep(x_BD, y_GD, **settings)
    assert_same_statistics(ours, blockwise.forward_sweep(x_BD, y_GD, **settings), 1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spread", [0.0, 60.0])
@interpreted
def test_gradient_sweep_equals_the_tiled_sweep_in_float64(shape, spread):
    from kernels.contrastive import launches

    x_BD, y_GD, settings = gradient_inputs(shape, torch.float64, spread)
    ours = launches.gradient_sweep(x_BD, y_GD, **settings)
    for value, expected in zip(ours, blockwise.gradient_sweep(x_BD, y_GD, **settings), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("row_hinge", [False, True])
@pytest.mark.parametrize("column_hinge", [False, True])
@interpreted
def test_a_direction_of_the_hinge_that_is_off_has_no_statistics(row_hinge, column_hinge):
    from kernels.contrastive import launches

    shape, hinges = (18, 36, 18, 5, 3), {"row_hinge": row_hinge, "column_hinge": column_hinge}
    x_BD, y_GD, settings = sweep_inputs(shape, torch.float64, **hinges)
    ours = launches.forward_sweep(x_BD, y_GD, **settings)
    assert (len(ours.row_hinge_A), len(ours.column_hinge_A)) == (6 * row_hinge, 12 * column_hinge)
    assert_same_statistics(ours, blockwise.forward_sweep(x_BD, y_GD, **settings), 1e-12)
    x_BD, y_GD, settings = gradient_inputs(shape, torch.float64, **hinges)
    ours = launches.gradient_sweep(x_BD, y_GD, **settings)
    for value, expected in zip(ours, blockwise.gradient_sweep(x_BD, y_GD, **settings), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("want", [(x, y, s) for x in (0, 1) for y in (0, 1) for s in (0, 1)])
@interpreted
def test_only_what_is_wanted_is_computed(want):
    from kernels.contrastive import launches
    from kernels.rows.strips import Weights

    x_BD, y_GD, settings = gradient_inputs((20, 37, 4, 9, 1), torch.float64)
    names = ("want_x", "want_y", "want_scale")
    with mock.patch.object(Weights, "add_products", autospec=True, side_effect=Weights.add_products) as products:
        ours = launches.gradient_sweep(x_BD, y_GD, **settings | dict(zip(names, map(bool, want), strict=True)))
    assert products.call_count == want[0] + want[1]
    for value, wanted, full in zip(ours, want, launches.gradient_sweep(x_BD, y_GD, **settings), strict=True):
        if wanted:
            assert torch.equal(value, full)
        else:
            assert value is None or value == 0


@interpreted
def test_strips_change_no_result_beyond_rounding():
    from kernels.contrastive import launches
    from kernels.rows import strips

    x_BD, y_GD, forward = sweep_inputs((45, 99, 9, 11, 3), torch.float64)
    _, _, backward = gradient_inputs((45, 99, 9, 11, 3), torch.float64)
    whole = launches.forward_sweep(x_BD, y_GD, **forward)
    gradients = launches.gradient_sweep(x_BD, y_GD, **backward)
    sizes = {"STRIP_ROWS": 16, "STRIP_COLUMNS": 32}
    with mock.patch.object(launches, "FORWARD_STRIP", 32), mock.patch.multiple(strips, **sizes):
        assert_same_statistics(launches.forward_sweep(x_BD, y_GD, **forward), whole, 1e-12)
        for value, expected in zip(launches.gradient_sweep(x_BD, y_GD, **backward), gradients, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("flags", FLAGS)
@interpreted
def test_loss_and_gradients_equal_the_definition_in_float64(flags):
    results = {}
    for backend in ("reference", "triton"):
        image, text = (rows.requires_grad_() for rows in towers(30, 13, 1.5))
        scale = torch.tensor(14.0, dtype=torch.float64, requires_grad=True)
        output = contrastive_loss(image, text, scale, backend=backend, **flags)
        gradients = torch.autograd.grad(output.loss, (image, text, scale))
        results[backend] = [*(term.detach() for term in vars(output).values()), *gradients]
    for ours, exact in zip(results["triton"], results["reference"], strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("flags", FLAGS)
@interpreted
def test_gradcheck_of_the_kernels_in_float64(flags):
    image, text = (rows.requires_grad_() for rows in towers(18, 19, 1.5))
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)

    def loss(*leaves):
        return contrastive_loss(*leaves, backend="triton", **flags).loss

    assert torch.autograd.gradcheck(loss, (image, text, scale), eps=1e-6, atol=1e-8, rtol=1e-6, fast_mode=True)


@interpreted
def test_full_gradcheck_of_a_small_batch():
    image, text = (rows.requires_grad_() for rows in towers(6, 3, 1.5))
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)

    def loss(*leaves):
        return contrastive_loss(*leaves, backend="triton", hard_per_anchor=2, margin_weight=0.7).loss

    assert torch.autograd.gradcheck(loss, (image, text, scale), eps=1e-6, atol=1e-8, rtol=1e-6)


def lattice(num_rows: int, dim: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-2, 3, (num_rows, dim), generator=generator) / 4).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@interpreted
def test_lattice_hinges_are_exact_ties_and_exact_hits_included(dtype):
    from kernels.contrastive import launches

    num_rows, num_columns, offset, group = 30, 60, 15, 3
    x_BD, y_GD = lattice(num_rows, 6, dtype, 0), lattice(num_columns, 6, dtype, 1)
    cosine = x_BD.double() @ y_GD.double().T
    # Thresholds on the lattice of cosines: many entries lie exactly on them.
    thresholds = [torch.full((size // group,), 0.25) for size in (num_rows, num_columns)]
    row_group = (offset + torch.arange(num_rows)) // group
    outside = row_group[:, None] != (torch.arange(num_columns) // group)[None, :]
    excess = (cosine - 0.25).relu() * outside
    assert int((cosine == 0.25).sum()) > 100
    ours = launches.forward_sweep(x_BD, y_GD, scale=10.0, offset=offset, hinges=Hinges(group, *thresholds))
    assert torch.equal(ours.row_hinge_A, excess[::group].sum(1))
    assert torch.equal(ours.row_active_A, (excess[::group] > 0).double().sum(1))
    assert torch.equal(ours.column_hinge_A, excess[:, ::group].sum(0))
    assert torch.equal(ours.column_active_A, (excess[:, ::group] > 0).double().sum(0))
    diagonal = torch.arange(num_rows)
    others = cosine.clone()
    others[diagonal, offset + diagonal] = -torch.inf
    assert torch.equal(ours.tile_diagonal_B.double(), cosine[diagonal, offset + diagonal])
    assert torch.equal(ours.row_max_B, others.amax(1))
    assert torch.equal(ours.column_max_G, others.amax(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@interpreted
def test_lattice_margin_gradient_is_exact(dtype):
    from kernels.contrastive import launches

    num_rows, group = 24, 2
    x_BD, y_GD = lattice(num_rows, 6, dtype, 2), lattice(num_rows, 6, dtype, 3)
    thresholds = [torch.full((num_rows // group,), 0.125 * sign) for sign in (1, -1)]
    # Infinite log-sum-exps leave the hinge alone, and the weight is a power of two.
    settings = {
        "row_lse_B": torch.full((num_rows,), 1e6).double(),
        "column_lse_G": torch.full((num_rows,), 1e6).double(),
    }
    settings |= {"hinge_weight": 0.25, "want_x": True, "want_y": True, "want_scale": True, "cosine_origin": 0.0}
    dx_BD, dy_GD, scale_sum = launches.gradient_sweep(
        x_BD, y_GD, scale=10.0, offset=0, hinges=Hinges(group, *thresholds), **settings
    )
    cosine, groups = x_BD.double() @ y_GD.double().T, torch.arange(num_rows) // group
    weight = torch.zeros(num_rows, num_rows, dtype=torch.float64)
    weight[::group] += 0.25 * (cosine[::group] > 0.125)
    weight[:, ::group] += 0.25 * (cosine[:, ::group] > -0.125)
    weight[groups[:, None] == groups[None, :]] = 0
    assert torch.equal(dx_BD.double(), weight @ y_GD.double())
    assert torch.equal(dy_GD.double(), weight.T @ x_BD.double())
    assert scale_sum == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("direction", ["image_to_text", "text_to_image", "both"])
@pytest.mark.parametrize("hard_per_anchor", [1, 3, 7])
@interpreted
def test_the_public_call_agrees_bit_for_bit_with_the_definition_on_a_lattice(hard_per_anchor, direction, dtype):
    # Counts and weights are powers of two, so that means are exact too; equal rows tie every minimum of their group.
    image, text = lattice(64, 6, torch.float64, 5), lattice(64, 6, torch.float64, 6)
    text[9:12], image[17:20] = text[8], image[16]
    cosine = image @ text.T
    anchors = torch.arange(0, 64, 1 + hard_per_anchor)
    hard = anchors[:, None] + torch.arange(1, 1 + hard_per_anchor)
    assert (cosine[anchors] == cosine[anchors[:, None], hard].amin(1, keepdim=True)).sum() > 2 * len(anchors), "hits"
    settings = {"hard_per_anchor": hard_per_anchor, "margin_weight": 1.0, "margin_direction": direction}
    found = []
    for backend, kind in (("reference", torch.float64), ("triton", dtype)):
        # A tiny scale makes the contrastive gradient vanish beside the margin's multiples of 1 / (G * A).
        scale = torch.tensor(2.0**-100, dtype=torch.float64 if kind == torch.float64 else torch.float32)
        rows = [tower.to(kind) for tower in (image, text)]
        assert all(torch.equal(own.double(), exact) for own, exact in zip(rows, (image, text), strict=True))
        found.append(contrastive_gradients(*rows, scale, backend=backend, **settings))
        # Autograd's way to the same numbers.
        leaves = [own.requires_grad_() for own in rows]
        through = torch.autograd.grad(contrastive_loss(*leaves, scale, backend=backend, **settings).loss, leaves)
        assert all(
            torch.equal(d.to(kind), direct.to(kind))
            for d, direct in zip(through, (found[-1].d_image_BD, found[-1].d_text_BD), strict=True)
        )
    exact, ours = found
    for name in ("margin", "image_accuracy", "text_accuracy"):
        assert getattr(ours.terms, name).item() == getattr(exact.terms, name).item(), name
    assert ours.terms.loss.item() == exact.terms.loss.float().item()
    for name in ("d_image_BD", "d_text_BD"):
        assert torch.equal((getattr(ours, name).double() * 2**30).round(), (getattr(exact, name) * 2**30).round()), name
        assert getattr(exact, name).abs().max() > 2**-12


# Goals for float32 outputs at every loss level; scale 100, loss from 9 to 6e-8.
ERRORS = {
    (torch.float32, "precise"): 6e-6,
    (torch.float16, "precise"): 5e-6,
    (torch.bfloat16, "precise"): 6e-6,
    (torch.bfloat16, "fast"): 3e-3,
}


@pytest.mark.parametrize(("dtype", "gradient_operand"), ERRORS)
@pytest.mark.parametrize("noise", [4.0, 2.0, 1.3, 1.0])
@interpreted
def test_accuracy_at_every_loss_level(dtype, gradient_operand, noise):
    image, text = towers(96, 64, noise, dtype)
    scale = torch.tensor(100.0)
    # What the kernels do by themselves: nothing left to float64 products.
    with mock.patch.object(hardest, "LEAST_SHARE", 1.0):
        ours = contrastive_gradients(image, text, scale, backend="triton", gradient_operand=gradient_operand)
    exact = contrastive_gradients(image.double(), text.double(), scale.double(), backend="reference")
    assert relative_error(ours.terms.loss, exact.terms.loss) <= 2e-6
    for name in ("d_image_BD", "d_text_BD"):
        assert getattr(ours, name).dtype == torch.float32
        assert relative_error(getattr(ours, name), getattr(exact, name)) <= ERRORS[dtype, gradient_operand]
    # The split pays: the plain operand's error is hundreds of times the precise one's.
    assert relative_error(ours.d_image_BD, exact.d_image_BD) >= (1e-4 if gradient_operand == "fast" else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@interpreted
def test_at_low_loss_the_kernels_leave_the_hardest_rows_to_exact_products(dtype):
    image, text = towers(96, 64, 1.3, dtype)
    settings = {"hard_per_anchor": 1, "margin_weight": 1e-6}
    ours = contrastive_gradients(image, text, torch.tensor(100.0), backend="triton", **settings)
    exact = [image.double(), text.double(), torch.tensor(100.0).double()]
    exact = contrastive_gradients(*exact, backend="reference", **settings)
    for name in ("d_image_BD", "d_text_BD", "d_logit_scale"):
        assert relative_error(getattr(ours, name), getattr(exact, name)) <= 5e-7


@interpreted
def test_a_large_margin_weight_does_not_overflow_float16_rows():
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [0.8, 0.6]], dtype=torch.float16)
    arguments = {"hard_per_anchor": 1, "margin_weight": 30.0, "margin_space": "logits"}
    ours = contrastive_gradients(image, image.flip(0), torch.tensor(10.0), backend="triton", **arguments)
    exact = [rows.double() for rows in (image, image.flip(0), torch.tensor(10.0))]
    exact = contrastive_gradients(*exact, backend="reference", **arguments)
    assert relative_error(ours.d_image_BD, exact.d_image_BD) <= 1e-6


@pytest.mark.parametrize("scale", [1.0, 1000.0])
@interpreted
def test_equal_rows_have_the_closed_form_at_any_scale(scale):
    image = torch.tensor([0.6, 0.8]).expand(33, 2)
    ours = contrastive_gradients(image, image, torch.tensor(scale), backend="triton")
    assert float(ours.terms.loss) == pytest.approx(math.log(33), rel=2e-6)
    assert float(ours.terms.image_accuracy) == 0
    assert float(ours.d_image_BD.abs().max()) <= 1e-6 * scale


@interpreted
def test_a_column_with_no_other_row_stays_empty_beside_large_logits():
    """Our one row's partner has no entry off the diagonal, while the tile's other logits exceed float32's exponents."""
    from kernels.contrastive import launches

    x_BD, y_GD = torch.ones(1, 1), torch.ones(3, 1)
    stats = launches.forward_sweep(x_BD, y_GD, scale=500.0, offset=1, hinges=Hinges(1, None, None))
    assert stats.column_sum_G.tolist() == [1.0, 0.0, 1.0]
    assert stats.column_max_G.tolist() == [1.0, -math.inf, 1.0]
    assert stats.row_sum_B.tolist() == [2.0]


@interpreted
def test_references_far_apart_lose_no_column():
    """Column 1 lies 90 nats below the others: its sum must not underflow with them."""
    from kernels.contrastive import launches

    x_BD, y_GD = torch.ones(5, 1), torch.tensor([[1.0], [0.1], [1.0], [1.0], [1.0], [1.0], [1.0]])
    stats = launches.forward_sweep(x_BD, y_GD, scale=100.0, offset=2, hinges=Hinges(1, None, None))
    assert stats.column_sum_G.tolist() == pytest.approx([5, 5, 4, 4, 4, 4, 4], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@interpreted
def test_nan_shows_in_loss_and_gradients(dtype):
    image, text = towers(20, 8, 1.0, dtype)
    image[17, 3] = torch.nan
    ours = contrastive_gradients(image, text, torch.tensor(10.0), backend="triton")
    assert ours.terms.loss.isnan()
    assert ours.d_image_BD[17].isnan().all()
    assert ours.d_text_BD.isnan().all()


@interpreted
def test_nan_in_one_row_shows_in_its_statistics_alone_and_in_every_column():
    from kernels.contrastive import launches

    x_BD, y_GD, settings = sweep_inputs((20, 20, 0, 8, 1), torch.float32)
    x_BD[3, 0] = torch.nan
    stats = launches.forward_sweep(x_BD, y_GD, **settings)
    assert stats.row_sum_B.isnan().nonzero().tolist() == [[3]]
    assert stats.row_max_B.isnan().nonzero().tolist() == [[3]]
    assert stats.column_sum_G.isnan().sum() == 19
    assert stats.row_hinge_A.isnan().nonzero().tolist() == [[3]]


@interpreted
def test_an_empty_rank_has_empty_statistics_and_zero_gradients():
    from kernels.contrastive import launches

    x_BD, y_GD, settings = sweep_inputs((0, 12, 4, 5, 2), torch.float32)
    assert_same_statistics(
        launches.forward_sweep(x_BD, y_GD, **settings), blockwise.forward_sweep(x_BD, y_GD, **settings), 0
    )
    x_BD, y_GD, settings = gradient_inputs((0, 12, 4, 5, 2), torch.float32)
    dx_BD, dy_GD, scale_sum = launches.gradient_sweep(x_BD, y_GD, **settings)
    assert dx_BD.shape == (0, 5)
    assert not dy_GD.any()
    assert scale_sum == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@interpreted
def test_same_bits_on_every_run_for_strided_rows_and_inputs_untouched(dtype):
    from kernels.contrastive import launches

    x_BD, y_GD, settings = gradient_inputs((21, 40, 6, 23, 1), dtype)
    wide_x, wide_y = torch.zeros(21, 50, dtype=dtype), torch.zeros(23, 40, dtype=dtype).T
    wide_x[:, 4:27], wide_y[:] = x_BD, y_GD
    before = [value.clone() for value in (wide_x, wide_y, settings["row_lse_B"], settings["hinges"].row_A)]
    first = launches.gradient_sweep(x_BD, y_GD, **settings)
    second = launches.gradient_sweep(wide_x[:, 4:27], wide_y, **settings)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    settings = {name: settings[name] for name in ("scale", "offset", "hinges")}
    runs = [vars(launches.forward_sweep(x, y, **settings)) for x, y in ((x_BD, y_GD), (wide_x[:, 4:27], wide_y))]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    after = (wide_x, wide_y, settings["hinges"].row_A)
    assert all(torch.equal(a, b) for a, b in zip(after, (before[0], before[1], before[3]), strict=True))


def test_tensors_on_the_processor_are_refused_without_the_interpreter():
    image, text = towers(4, 3, 1.0)
    with pytest.raises(ValueError, match=r"needs tensors on a GPU.*backend='blockwise'"):
        contrastive_loss(image, text, torch.tensor(10.0), backend="triton")


def test_refused_sweeps_name_the_remedy():
    from kernels.contrastive import launches

    x_BD, y_GD, settings = sweep_inputs((4, 4, 0, 3, 1), torch.float32)
    with pytest.raises(ValueError, match="forward_sweep needs tensors on a GPU"):
        launches.forward_sweep(x_BD, y_GD, **settings)
    x_BD, y_GD, settings = gradient_inputs((4, 4, 0, 3, 1), torch.float32)
    with pytest.raises(ValueError, match="gradient_sweep needs tensors on a GPU"):
        launches.gradient_sweep(x_BD, y_GD, **settings)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("chip", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_specialisations_give_every_argument_a_type_or_a_constant(chip, dtype):
    from kernels.contrastive import kernel

    for one in kernel.specialisations(chip, dtype, 640):
        assert list(one.function.arg_names) == [*one.signature, *one.constexprs], one.kernel
        assert set(one.aligned) <= set(one.signature)


@interpreted
def test_log_sum_exps_on_these_sweeps_equal_their_definition_in_float64():
    x, y = (rows.requires_grad_() for rows in towers(35, 17, 1.0))
    scale = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
    # Of both signs, as no mean's gradients are.
    weights = torch.linspace(-1, 2, 35, dtype=torch.float64)
    found = []
    for backend in ("reference", "triton"):
        two = off_diagonal_log_sum_exp(x, y, scale, backend=backend)
        own = off_diagonal_log_sum_exp(x, None, scale, backend=backend)
        value = (weights * two.rows_B + weights.flip(0) * two.columns_B - weights * own.rows_B).sum()
        found.append([value.detach(), *torch.autograd.grad(value, [x, y, scale])])
    for value, wanted in zip(*found, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-10, atol=1e-12)
