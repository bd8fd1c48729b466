"""The off-diagonal log-sum-exps: against loops in float64, finite differences, one process on several ranks, NT-Xent as
SimCLR writes it, and bad input."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from kernels import off_diagonal_log_sum_exp
from tests.ranks import run_on_ranks


def unit_rows(num_rows: int, dim: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_rows, dim, generator=generator, dtype=torch.float64)
    return F.normalize(rows, dim=1).to(dtype).requires_grad_()


def log_sum_exp_loop(x: list[list[float]], y: list[list[float]], scale: float) -> tuple[list[float], list[float]]:
    def logit(i: int, j: int) -> float:
        return scale * math.fsum(a * b for a, b in zip(x[i], y[j], strict=True))

    every = range(len(x))
    rows = [math.log(math.fsum(math.exp(logit(i, j)) for j in every if j != i)) for i in every]
    columns = [math.log(math.fsum(math.exp(logit(i, j)) for i in every if j != i)) for j in every]
    return rows, columns


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
def test_values_equal_a_loop_over_pairs_in_float64(backend):
    x, y, scale = unit_rows(7, 5, 0), unit_rows(7, 5, 1), torch.tensor([9.0], dtype=torch.float64)
    found = off_diagonal_log_sum_exp(x, y, scale, backend=backend)
    expected = log_sum_exp_loop(x.tolist(), y.tolist(), 9.0)
    assert found.rows_B.tolist() == pytest.approx(expected[0], rel=1e-13)
    assert found.columns_B.tolist() == pytest.approx(expected[1], rel=1e-13)
    own = off_diagonal_log_sum_exp(x, None, scale, backend=backend)
    assert own.rows_B.tolist() == pytest.approx(log_sum_exp_loop(x.tolist(), x.tolist(), 9.0)[0], rel=1e-13)
    assert own.columns_B is own.rows_B


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
def test_gradients_pass_gradcheck_for_any_upstream_gradient(backend):
    x, y = unit_rows(6, 4, 2), unit_rows(6, 4, 3)
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)

    def of_two(*inputs):
        found = off_diagonal_log_sum_exp(*inputs, backend=backend)
        return found.rows_B, found.columns_B

    def of_itself(x_BD, scale):
        return off_diagonal_log_sum_exp(x_BD, None, scale, backend=backend).rows_B

    assert torch.autograd.gradcheck(of_two, (x, y, scale), eps=1e-7)
    assert torch.autograd.gradcheck(of_itself, (x, scale), eps=1e-7)


def weighed_sum(x, y, scale, weights, backend, group=None):
    """A loss with weights of both signs on rows, columns and the rows' own."""
    two = off_diagonal_log_sum_exp(x, y, scale, backend=backend, process_group=group)
    own = off_diagonal_log_sum_exp(x, None, scale, backend=backend, process_group=group)
    parts = (two.rows_B, two.columns_B, own.rows_B)
    return sum((weight * part).sum() for weight, part in zip(weights.to(parts[0].dtype), parts, strict=True))


def weights_of(num_rows: int) -> torch.Tensor:
    return torch.randn(3, num_rows, generator=torch.Generator().manual_seed(4), dtype=torch.float64) / num_rows


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)]
)
def test_tiles_equal_the_definition_in_float64_at_odd_shapes(dtype, tolerance):
    x, y = unit_rows(257, 33, 5, dtype), unit_rows(257, 33, 6, dtype)
    leaves = [rows.detach().double().requires_grad_() for rows in (x, y)]
    scale = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
    expected = weighed_sum(*leaves, scale, weights_of(257), "reference")
    expected_gradients = torch.autograd.grad(expected, [*leaves, scale])
    own_scale = torch.tensor(20.0, requires_grad=True)
    value = weighed_sum(x, y, own_scale, weights_of(257), "blockwise")
    gradients = torch.autograd.grad(value, [x, y, own_scale])
    assert value.item() == pytest.approx(expected.item(), abs=max(tolerance, 1e-10))
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        # Autograd rounds to the features' dtype at the end.
        rounding = 4e-3 if gradient.dtype == torch.bfloat16 else 1e-6
        assert (gradient.double() - wanted).norm() <= (tolerance + rounding) * wanted.norm()


COUNTS = {2: [5, 2], 3: [3, 0, 4]}


def weighed_sum_on_rank(rank: int, world_size: int) -> list[list[torch.Tensor]]:
    counts, results = COUNTS[world_size], []
    for backend in ("blockwise", "reference"):
        x, y = (unit_rows(7, 4, seed).split(counts)[rank].detach().requires_grad_() for seed in (9, 10))
        scale = torch.tensor(6.0, dtype=torch.float64, requires_grad=True)
        own_weights = weights_of(7).split(counts, dim=1)[rank]
        value = weighed_sum(x, y, scale, own_weights, backend, dist.group.WORLD)
        results.append([value.detach(), *torch.autograd.grad(value, [x, y, scale])])
    return results


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_with_unequal_rows_give_the_gradient_of_the_sum_of_their_losses(world_size):
    x, y = unit_rows(7, 4, 9), unit_rows(7, 4, 10)
    scale = torch.tensor(6.0, dtype=torch.float64, requires_grad=True)
    expected = weighed_sum(x, y, scale, weights_of(7), "reference")
    d_x, d_y, d_scale = torch.autograd.grad(expected, [x, y, scale])
    for ranks in zip(*run_on_ranks(weighed_sum_on_rank, world_size), strict=True):
        values, d_xs, d_ys, d_scales = zip(*ranks, strict=True)
        torch.testing.assert_close(sum(values), expected.detach(), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(torch.cat(d_xs), d_x, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(torch.cat(d_ys), d_y, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(sum(d_scales), d_scale, rtol=1e-10, atol=1e-13)


def test_bad_input_is_refused():
    x, scale = unit_rows(3, 4, 0), torch.tensor(5.0)
    for arguments, message in (
        ((x[:1], None, scale), "at least 2 rows"),
        ((x, x[:2], scale), "matrices of one shape"),
        ((x, None, -scale), "must be positive"),
        ((x, None, scale.repeat(2)), "shape \\[\\] or \\[1\\]"),
    ):
        with pytest.raises(ValueError, match=message):
            off_diagonal_log_sum_exp(*arguments)
    with pytest.raises(ValueError, match="backend='tiles'"):
        off_diagonal_log_sum_exp(x, None, scale, backend="tiles")


def test_a_compiled_function_around_it_gives_the_same():
    x_BD, y_BD = (F.normalize(torch.randn(5, 8), dim=1) for _ in range(2))

    def twice_the_sum(rows_BD):
        found = off_diagonal_log_sum_exp(2 * rows_BD / 2, y_BD, torch.tensor(5.0), backend="blockwise")
        return 2 * (found.rows_B + found.columns_B).sum()

    gradients = []
    for function in (twice_the_sum, torch.compile(twice_the_sum, backend="aot_eager")):
        leaf_BD = x_BD.clone().requires_grad_()
        function(leaf_BD).backward()
        gradients.append(leaf_BD.grad)
    assert torch.equal(*gradients)
