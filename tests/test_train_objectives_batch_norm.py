"""BatchNorm over ranks: against torch.nn.BatchNorm1d of one process, running statistics, 16-bit modules, and bad input."""

import pytest
import torch

from tests.ranks import run_on_ranks
from train.models.running_statistics import kept_running_statistics
from train.objectives.batch_norm import BatchNormOverRanks

COUNTS = {1: [7], 2: [2, 5], 3: [3, 0, 4]}
WIDTH = 3


def with_weights(norm: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, -1.5, 2.0]))
        norm.bias.copy_(torch.tensor([0.1, 0.0, -3.0]))
    return norm.double()


def two_steps(norm: torch.nn.Module, part: slice = slice(None)) -> list[torch.Tensor]:
    """Outputs, gradients by rows, weight and bias of two steps, then the state and an output in eval mode."""
    generator = torch.Generator().manual_seed(3)
    results = []
    for _ in range(2):
        # Far from zero: a variance from the sum of squares alone would lose digits.
        rows = 1000 + torch.randn(7, WIDTH, generator=generator, dtype=torch.float64)
        upstream = torch.randn(7, WIDTH, generator=generator, dtype=torch.float64)
        own = rows[part].requires_grad_()
        output = norm(own)
        gradients = torch.autograd.grad((output * upstream[part]).sum(), [own, *norm.parameters()])
        results += [output.detach(), *gradients]
    with torch.no_grad():
        return [*results, *norm.state_dict().values(), norm.eval()(rows[part])]


def two_steps_on_rank(rank: int, world_size: int) -> list[torch.Tensor]:
    first = sum(COUNTS[world_size][:rank])
    return two_steps(with_weights(BatchNormOverRanks(WIDTH)), slice(first, first + COUNTS[world_size][rank]))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_with_unequal_rows_equal_torch_on_all_rows(world_size):
    wanted = two_steps(with_weights(torch.nn.BatchNorm1d(WIDTH)))
    ranks = [two_steps(with_weights(BatchNormOverRanks(WIDTH)))] if world_size == 1 else None
    ranks = ranks or run_on_ranks(two_steps_on_rank, world_size)
    close = {"rtol": 1e-9, "atol": 1e-9}
    for place, value in enumerate(wanted):
        found = [rank[place] for rank in ranks]
        if value.dim() == 2:
            torch.testing.assert_close(torch.cat(found), value, **close)
        elif place in (2, 3, 6, 7):
            # Of weight and bias a rank has its rows' part.
            torch.testing.assert_close(sum(found), value, **close)
        else:
            for own in found:
                torch.testing.assert_close(own, value, **close)


def test_statistics_stay_as_they_are_where_rows_pass_a_second_time():
    norm = BatchNormOverRanks(WIDTH)
    rows = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))
    first = norm(rows)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    with kept_running_statistics(norm):
        torch.testing.assert_close(norm(rows), first, rtol=0, atol=0)
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    norm(rows)
    assert norm.num_batches_tracked == 2


def test_sixteen_bit_modules_normalise_and_keep_statistics_in_float32():
    rows = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()
    norm = BatchNormOverRanks(WIDTH)
    with torch.no_grad():
        norm.running_mean += 0.123456
    norm = norm.bfloat16()
    assert norm.weight.dtype == torch.bfloat16
    wanted = torch.nn.BatchNorm1d(WIDTH)
    wanted.running_mean += 0.123456
    torch.testing.assert_close(norm(rows), wanted(rows.float()), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.running_mean, wanted.running_mean)
    torch.testing.assert_close(norm.running_var, wanted.running_var)


def test_without_gains_only_statistics_are_state():
    norm = BatchNormOverRanks(WIDTH, affine=False)
    rows = torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(norm.double()(rows), torch.nn.BatchNorm1d(WIDTH, affine=False).double()(rows))
    assert list(norm.state_dict()) == ["running_mean", "running_var", "num_batches_tracked"]


def test_rows_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"takes rows \[B, 3\], not \[2, 4\]"):
        BatchNormOverRanks(WIDTH)(torch.zeros(2, 4))
