"""What the host waits for: with known row counts neither pass of a loss reads a number from the device. No GPU is at hand,
so tensors that have no numbers (torch's fake ones) stand for a GPU's: whoever looks at one raises."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from kernels import (
    contrastive_gradients,
    contrastive_loss,
    off_diagonal_log_sum_exp,
    sigmoid_contrastive_gradients,
    sigmoid_contrastive_loss,
)
from kernels.contrastive.function import OPERATIONS as CONTRASTIVE
from kernels.contrastive.state import Options
from kernels.log_sum_exp.function import _Call as Call
from kernels.log_sum_exp.function import _OfItself, _OfTwo
from kernels.rows.function import find_layout
from kernels.rows.registration import _forward_of, _gradients_of, values_of
from kernels.rows.scalars import device_scalar, positive_or_nan
from kernels.sigmoid.function import OPERATIONS as SIGMOID
from kernels.sigmoid.function import Options as SigmoidOptions
from tests.ranks import run_on_ranks

MARGIN = {"hard_per_anchor": 1, "margin_weight": 0.5, "label_smoothing": 0.1}
LOSSES = (contrastive_loss, sigmoid_contrastive_loss)


class NoKernel:
    """Launches nothing: a fake tensor has nothing to write to."""

    def __getitem__(self, grid):
        return lambda *arguments, **settings: None


@pytest.fixture
def launches_without_a_gpu(monkeypatch):
    for name in ("statistics_kernel", "merge_kernel", "weights_kernel"):
        monkeypatch.setattr(f"kernels.contrastive.launches.{name}", NoKernel())
    for name in ("negative_sum_kernel", "sigmoid_weights_kernel"):
        monkeypatch.setattr(f"kernels.sigmoid.launches.{name}", NoKernel())
    monkeypatch.setattr("kernels.rows.strips.add_products_kernel", NoKernel())
    for module in ("kernels.contrastive.launches", "kernels.sigmoid.launches"):
        monkeypatch.setattr(f"{module}.require_triton", lambda *_: None)
        monkeypatch.setattr(f"{module}.chip_of", lambda *_: "sm_90")
    monkeypatch.setattr("kernels.rows.checks._require_triton", lambda *_: None)


def both_passes(operations: Any, options: Any, rows_per_rank: list[int], dtype: torch.dtype) -> list[torch.Tensor]:
    """Gradients of fake rows on a fake GPU, by what the operations of torch.library run."""
    loss, counts_W = operations.loss, torch.tensor([96])
    with FakeTensorMode(allow_non_fake_inputs=True):
        towers = [torch.empty(96, 32, device="cuda", dtype=dtype) for _ in range(2)]
        scalars = [torch.empty((), device="cuda") for _ in loss.scalars]
        settings = (*values_of(options), "", rows_per_rank)
        value, _, *kept = _forward_of(loss)(*towers, *scalars, *settings)
        return _gradients_of(loss)(torch.ones_like(value), *towers, *kept[:3], counts_W, True, True, True, *settings)


CASES = [
    (CONTRASTIVE, Options(backend="triton")),
    (CONTRASTIVE, Options(backend="triton", margin_space="logits", **MARGIN)),
    (SIGMOID, SigmoidOptions(backend="triton")),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("operations", "options"), CASES, ids=["contrastive", "margin", "sigmoid"])
def test_with_known_row_counts_neither_pass_waits_for_a_gpu(operations, options, dtype, launches_without_a_gpu):
    gradients = both_passes(operations, options, [96], dtype)
    assert [(d.device.type, d.shape) for d in gradients[:2]] == [("cuda", (96, 32))] * 2


@pytest.mark.parametrize(("operations", "options"), CASES, ids=["contrastive", "margin", "sigmoid"])
def test_without_them_the_scale_is_looked_at(operations, options, launches_without_a_gpu):
    with pytest.raises(DataDependentOutputException):
        both_passes(operations, options, [], torch.float32)


@pytest.mark.parametrize(("operation", "num_towers"), [(_OfTwo, 2), (_OfItself, 1)])
def test_with_known_row_counts_no_log_sum_exp_waits_for_a_gpu(operation, num_towers, launches_without_a_gpu):
    options = Options(backend="triton")
    with FakeTensorMode(allow_non_fake_inputs=True):
        towers = [torch.empty(96, 32, device="cuda") for _ in range(num_towers)]
        scale = torch.empty(1, device="cuda")
        layout = find_layout(towers[0], {"logit_scale": scale}, options, None, [96])
        call = Call(positive_or_nan(device_scalar(scale, scale.device)), options, layout)
        kept = SimpleNamespace(
            needs_input_grad=(True,) * (num_towers + 1), save_for_backward=lambda *tensors: saved.extend(tensors)
        )
        saved = kept.saved_tensors = []
        found = operation.forward(kept, *towers, scale, call)
        gradients = operation.backward(kept, *([found] if num_towers == 1 else found))
    assert [d.shape for d in gradients[:-1]] == [(96, 32)] * num_towers + [(1,)]


def low_loss_rows() -> list[torch.Tensor]:
    """Of loss 6e-6 at scale 100: a few pairs carry it, and with it the gradients."""
    generator = torch.Generator().manual_seed(3)
    image = torch.randn(40, 64, generator=generator)
    text = image + 1.4 * torch.randn(40, 64, generator=generator)
    return [torch.nn.functional.normalize(rows, dim=1) for rows in (image, text)]


def hardest_rows_unseen_on_rank(rank: int, world_size: int, counts: list[int]) -> list[torch.Tensor]:
    """The gradients as a GPU's are formed, where nobody looks which of the hardest rows are this rank's."""
    import kernels.contrastive.hardest

    kernels.contrastive.hardest.is_at_hand = lambda value: False
    own = [tower.split(counts)[rank] for tower in low_loss_rows()]
    settings = {"process_group": dist.group.WORLD, "rows_per_rank": counts}
    found = contrastive_gradients(*own, torch.tensor(100.0), **settings)
    return [found.d_image_BD, found.d_text_BD, found.d_logit_scale[None], found.terms.loss[None]]


@pytest.mark.slow
def test_hardest_rows_that_nobody_looks_at_give_the_exact_gradients():
    ranks = run_on_ranks(hardest_rows_unseen_on_rank, 3, [11, 0, 29])
    exact = [tower.double() for tower in low_loss_rows()]
    expected = contrastive_gradients(*exact, torch.tensor(100.0).double(), backend="reference")
    d_image, d_text, d_scale, loss = (torch.cat(parts) for parts in zip(*ranks, strict=True))
    wanted = [3 * expected.d_image_BD, 3 * expected.d_text_BD, expected.d_logit_scale, expected.terms.loss]
    for value, exactly in zip([d_image, d_text, d_scale.mean(), loss[0]], wanted, strict=True):
        # With float32 cosines alone the gradients are wrong by 2e-6 here.
        assert (value.double() - exactly).norm() <= 3e-7 * exactly.norm()


def test_at_ordinary_loss_unseen_hardest_rows_change_nothing(monkeypatch):
    generator = torch.Generator().manual_seed(5)
    rows = [torch.nn.functional.normalize(torch.randn(70, 24, generator=generator), dim=1) for _ in range(2)]
    expected = contrastive_gradients(*(tower.double() for tower in rows), torch.tensor(20.0), backend="reference")
    monkeypatch.setattr("kernels.contrastive.hardest.is_at_hand", lambda value: False)
    found = contrastive_gradients(*rows, torch.tensor(20.0), rows_per_rank=[70])
    for name in ("d_image_BD", "d_text_BD", "d_logit_scale"):
        value, wanted = getattr(found, name).double(), getattr(expected, name)
        assert (value - wanted).norm() <= 1e-6 * wanted.norm()


def inputs_of(loss: Callable[..., Any], scale: float = 9.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.nn.functional.normalize(torch.randn(6, 5, generator=generator), dim=1) for _ in range(2)]
    return [*rows, torch.tensor(scale), *([torch.tensor(-4.0)] if "sigmoid" in loss.__name__ else [])]


@pytest.mark.parametrize("call", [contrastive_gradients, sigmoid_contrastive_gradients])
def test_known_row_counts_change_no_bit(call):
    found, expected = call(*inputs_of(call), rows_per_rank=(6,)), call(*inputs_of(call))
    for name in ("d_image_BD", "d_text_BD", "d_logit_scale"):
        assert getattr(found, name).equal(getattr(expected, name))
    assert found.terms.loss.equal(expected.terms.loss)


def test_known_row_counts_change_no_bit_of_log_sum_exps():
    found, expected = (
        off_diagonal_log_sum_exp(*inputs_of(contrastive_loss), **k) for k in ({"rows_per_rank": [6]}, {})
    )
    assert found.rows_B.equal(expected.rows_B)
    assert found.columns_B.equal(expected.columns_B)


@pytest.mark.parametrize("loss", [*LOSSES, off_diagonal_log_sum_exp])
@pytest.mark.parametrize("rows_per_rank", [[5], [6, 6]])
def test_row_counts_of_other_rows_or_ranks_are_refused(loss, rows_per_rank):
    with pytest.raises(ValueError, match=r"rows_per_rank=\[.* must name the rows of 1 ranks, and 6 of them for rank 0"):
        loss(*inputs_of(loss), rows_per_rank=rows_per_rank)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_scale_that_nobody_looked_at_and_is_not_positive_shows_in_the_loss(loss):
    with pytest.raises(ValueError, match="must be positive"):
        loss(*inputs_of(loss, scale=-2.0))
    assert math.isnan(loss(*inputs_of(loss, scale=-2.0), rows_per_rank=[6]).loss.item())


def test_known_row_counts_of_any_number_compile_into_one_graph():
    torch._dynamo.reset()

    def forward(image_BD, text_BD, scale):
        rows = torch.nn.functional.normalize(image_BD, dim=1), torch.nn.functional.normalize(text_BD, dim=1)
        return 2 * contrastive_loss(*rows, scale, rows_per_rank=[len(image_BD)]).loss

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager", dynamic=True)
    for num_rows in (6, 9):
        inputs = [torch.randn(num_rows, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        value, expected = (called(*inputs, torch.tensor(9.0)) for called in (compiled, forward))
        for found, wanted in zip(
            torch.autograd.grad(value, inputs), torch.autograd.grad(expected, inputs), strict=True
        ):
            torch.testing.assert_close(found, wanted)
