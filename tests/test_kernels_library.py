"""The losses as operations of torch.library: compiled without a graph break, checked by torch, exact about what needs
a gradient, and the choice of sweeps."""

import contextlib
import logging
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch._functorch.config
import torch._inductor.config
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import kernels.contrastive.blockwise
import kernels.sigmoid.blockwise
from kernels import (
    contrastive_gradients,
    contrastive_loss,
    sigmoid_contrastive_gradients,
    sigmoid_contrastive_loss,
)
from kernels.contrastive.function import OPERATIONS as CONTRASTIVE
from kernels.contrastive.state import Options
from kernels.rows.checks import automatic_backend
from kernels.rows.registration import values_of
from kernels.sigmoid.function import OPERATIONS as SIGMOID
from kernels.sigmoid.function import Options as SigmoidOptions
from tests.ranks import run_on_ranks

ROOT = Path(__file__).resolve().parent.parent
MARGIN = {"hard_per_anchor": 2, "margin_weight": 0.7, "margin_space": "logits", "label_smoothing": 0.1}
CASES = [(contrastive_loss, {}), (contrastive_loss, MARGIN), (sigmoid_contrastive_loss, {})]
NAMES = ["contrastive", "margin", "sigmoid"]
BLOCKWISE = {contrastive_loss: kernels.contrastive.blockwise, sigmoid_contrastive_loss: kernels.sigmoid.blockwise}


def leaves_for(loss: Callable[..., Any], num_rows: int = 12, dim: int = 5, dtype=torch.float64) -> list[torch.Tensor]:
    """Rows before normalisation and scalars, all of which learn."""
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(num_rows, dim, generator=generator, dtype=torch.float64)
    text = image + torch.randn(num_rows, dim, generator=generator, dtype=torch.float64)
    scalars = [torch.tensor(9.0)] + ([torch.tensor(-4.0)] if loss is sigmoid_contrastive_loss else [])
    return [leaf.to(dtype).requires_grad_() for leaf in (image, text, *scalars)]


def model(loss: Callable[..., Any], settings: dict[str, Any]) -> Callable[..., torch.Tensor]:
    """Something differentiable before and after the loss, for torch.compile to fuse with."""

    def forward(image, text, *scalars):
        output = loss(F.normalize(image, dim=1), F.normalize(text, dim=1), *scalars, **settings)
        return 3 * output.loss

    return forward


def gradients_of(function: Callable[..., torch.Tensor], leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    value = function(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


@pytest.mark.parametrize(("loss", "settings"), CASES, ids=NAMES)
def test_compiled_model_has_one_graph_and_the_same_values(loss, settings):
    forward = model(loss, settings)
    for dynamic in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(forward, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for num_rows in (12, 18):
            leaves = leaves_for(loss, num_rows)
            expected = gradients_of(model(loss, {**settings, "backend": "reference"}), leaves)
            for value, wanted in zip(gradients_of(compiled, leaves), expected, strict=True):
                torch.testing.assert_close(value, wanted, rtol=1e-10, atol=1e-13)


@contextlib.contextmanager
def without_graphs_on_disk() -> Iterator[None]:
    """Inductor's cache of graphs knows operations by name, and brings back those of their earlier shapes. Compiled C++ goes
    by its content and may stay."""
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield


def test_a_batch_of_another_size_is_not_compiled_anew():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model(contrastive_loss, MARGIN), fullgraph=True, backend=counter, dynamic=True)
    frames = []
    for num_rows in (12, 18, 33):
        gradients_of(compiled, leaves_for(contrastive_loss, num_rows))
        frames.append(counter.frame_count)
    assert frames[0] > 0
    assert frames == frames[:1] * 3


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "settings"), CASES[1:], ids=NAMES[1:])
def test_inductor_compiles_the_whole_step_to_the_same_values(loss, settings):
    torch._dynamo.reset()
    leaves = leaves_for(loss)
    expected = gradients_of(model(loss, {**settings, "backend": "reference"}), leaves)
    compiled = torch.compile(model(loss, settings), fullgraph=True)
    with without_graphs_on_disk():
        values = gradients_of(compiled, leaves)
    for value, wanted in zip(values, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-10, atol=1e-13)


def test_compiled_call_returns_every_term_and_only_the_loss_is_differentiable():
    torch._dynamo.reset()
    leaves = leaves_for(contrastive_loss)
    compiled = torch.compile(contrastive_loss, fullgraph=True, backend="aot_eager")
    output, expected = compiled(*leaves, **MARGIN), contrastive_loss(*leaves, **MARGIN)
    for name in ("loss", "contrastive", "margin", "image_accuracy", "text_accuracy"):
        value, wanted = getattr(output, name), getattr(expected, name)
        assert value.equal(wanted)
        assert value.requires_grad == wanted.requires_grad == (name == "loss")


@pytest.mark.parametrize("call", [contrastive_gradients, sigmoid_contrastive_gradients])
def test_gradients_without_autograd_compile_too(call):
    torch._dynamo.reset()
    loss = sigmoid_contrastive_loss if call is sigmoid_contrastive_gradients else contrastive_loss
    leaves = leaves_for(loss, dtype=torch.bfloat16)
    compiled, eager = torch.compile(call, fullgraph=True, backend="aot_eager")(*leaves), call(*leaves)
    for name in ("d_image_BD", "d_text_BD", "d_logit_scale"):
        value = getattr(compiled, name)
        assert value.dtype == torch.float32
        assert value.equal(getattr(eager, name))


def test_compiled_autocast_around_the_call_changes_no_bit():
    torch._dynamo.reset()
    leaves = leaves_for(contrastive_loss, 24, 16, torch.float32)
    expected = gradients_of(contrastive_loss_alone, leaves)

    def under_autocast(*inputs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return contrastive_loss_alone(*inputs)

    compiled = torch.compile(under_autocast, fullgraph=True, backend="aot_eager")
    for value, wanted in zip(gradients_of(compiled, leaves), expected, strict=True):
        assert value.equal(wanted)


def contrastive_loss_alone(*inputs: torch.Tensor) -> torch.Tensor:
    return contrastive_loss(*inputs).loss


def operation_arguments(operations: Any, options: Any, dtype: torch.dtype, group_name: str = "") -> list[Any]:
    loss = contrastive_loss if operations is CONTRASTIVE else sigmoid_contrastive_loss
    return [*leaves_for(loss, dtype=dtype), *values_of(options), group_name, []]


OPTIONS = [
    (CONTRASTIVE, Options()),
    (CONTRASTIVE, Options(hard_per_anchor=2, margin_weight=0.5, margin_space="logits", label_smoothing=0.1)),
    (CONTRASTIVE, Options(hard_per_anchor=1, margin_weight=0.5, margin_direction="text_to_image")),
    (SIGMOID, SigmoidOptions()),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("operations", "options"), OPTIONS)
def test_torch_finds_nothing_wrong_with_the_operations(operations, options, dtype):
    arguments = operation_arguments(operations, options, dtype)
    verdicts = [torch.library.opcheck(operations.forward, arguments)]
    loss, _, *kept = operations.forward(*arguments)
    settings = arguments[2 + len(operations.loss.scalars) :]
    features = [rows.detach() for rows in arguments[:2]]
    for wanted in ((True, True, True), (False, True, False)):
        inputs = (torch.ones_like(loss), *features, *kept, *wanted, *settings)
        verdicts.append(torch.library.opcheck(operations.gradients, inputs))
    assert {verdict for each in verdicts for verdict in each.values()} == {"SUCCESS"}


class Multiplications(TorchDispatchMode):
    """Counts those of all matrix products, in place and out of it."""

    total = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if "mm" in function.overloadpacket.__name__:
            left, right = arguments[-2:]
            self.total += left.numel() * right.shape[-1]
        return function(*arguments, **(keywords or {}))


@contextlib.contextmanager
def counted_products(loss: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """For each gradient sweep, how many products of the size rows x columns x D it forms."""
    module, products = BLOCKWISE[loss], []
    sweep = module.gradient_sweep

    def counting(x_BD, y_GD, **settings):
        with Multiplications() as multiplications:
            result = sweep(x_BD, y_GD, **settings)
        products.append(multiplications.total / (x_BD.numel() * len(y_GD)))
        return result

    with monkeypatch.context() as patch:
        patch.setattr(module, "gradient_sweep", counting)
        yield products


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    ("learning", "num_products"),
    [
        ((True, True, True), 3),
        ((True, False, False), 2),
        ((False, True, False), 2),
        ((False, False, True), 1),
        ((False, True, True), 2),
    ],
)
@pytest.mark.parametrize("loss", [contrastive_loss, sigmoid_contrastive_loss], ids=["contrastive", "sigmoid"])
def test_only_products_that_a_learning_input_needs_are_formed(loss, learning, num_products, compiled, monkeypatch):
    torch._dynamo.reset()
    forward = model(loss, {})
    leaves = leaves_for(loss)
    expected = gradients_of(forward, leaves)[1:]
    learns = [*learning, *learning[2:]][: len(leaves)]
    frozen = [leaf.detach().requires_grad_(needs) for leaf, needs in zip(leaves, learns, strict=True)]
    called = torch.compile(forward, fullgraph=True, backend="aot_eager") if compiled else forward
    with counted_products(loss, monkeypatch) as products:
        called(*frozen).backward()
    assert products == [num_products]
    for leaf, gradient, needs in zip(frozen, expected, learns, strict=True):
        torch.testing.assert_close(leaf.grad, gradient if needs else None)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("loss", [contrastive_loss, sigmoid_contrastive_loss], ids=["contrastive", "sigmoid"])
def test_features_used_twice_collect_every_gradient(loss, compiled):
    torch._dynamo.reset()

    def twice(features, other, *scalars, backend="blockwise"):
        first = loss(features, features, *scalars, backend=backend).loss
        return first + 2 * loss(features, other, *scalars, backend=backend).loss

    leaves = leaves_for(loss)
    called = torch.compile(twice, fullgraph=True, backend="aot_eager") if compiled else twice
    expected = gradients_of(lambda *inputs: twice(*inputs, backend="reference"), leaves)
    for value, wanted in zip(gradients_of(called, leaves), expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(("loss", "settings"), CASES, ids=NAMES)
def test_a_second_backward_of_a_kept_graph_gives_the_same_bits(loss, settings):
    leaves = leaves_for(loss)
    value = model(loss, settings)(*leaves)
    first = torch.autograd.grad(value, leaves, retain_graph=True)
    second = torch.autograd.grad(value, leaves)
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("loss", "settings"), CASES, ids=NAMES)
def test_a_loss_times_zero_has_zero_gradients(loss, settings):
    leaves = leaves_for(loss)
    gradients = torch.autograd.grad(0 * model(loss, settings)(*leaves), leaves)
    assert all(not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(("loss", "settings"), CASES, ids=NAMES)
def test_evaluation_gives_the_same_value_and_no_graph(loss, settings, compiled, mode):
    torch._dynamo.reset()
    leaves, forward = leaves_for(loss), model(loss, settings)
    called = torch.compile(forward, fullgraph=True, backend="aot_eager") if compiled else forward
    with mode():
        value = called(*leaves)
    assert not value.requires_grad
    assert value.item() == forward(*leaves).item()


@pytest.mark.parametrize(("loss", "settings"), CASES, ids=NAMES)
def test_a_second_derivative_is_refused_with_its_remedy(loss, settings):
    leaves = leaves_for(loss)
    first = torch.autograd.grad(model(loss, settings)(*leaves), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=r"can be differentiated once.*backend='reference'"):
        first[0].sum().backward()


def test_backward_keeps_features_and_a_few_numbers_per_row_only():
    kept = []
    leaves = leaves_for(contrastive_loss, 3000, 4, torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        contrastive_loss(*leaves, hard_per_anchor=1, margin_weight=1.0)
    assert sum(kept) < 2 * 3000 * 4 + 9 * 3000


def test_importing_and_running_blockwise_loads_no_triton():
    code = (
        "import sys, torch, kernels\n"
        "rows = torch.eye(3)\n"
        "kernels.contrastive_loss(rows, rows, torch.tensor(2.0))\n"
        "assert 'kernels.launch' not in sys.modules and 'kernels.contrastive.kernel' not in sys.modules\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def recording_kernel(loss: Callable[..., Any], calls: list[tuple[str, Any]]) -> types.ModuleType:
    """A launches.py that notes its calls and computes blockwise."""
    kernel = types.ModuleType("kernel")

    def recorded(name):
        def sweep(*rows, gradient_operand=None, **settings):
            calls.append((name, gradient_operand))
            return getattr(BLOCKWISE[loss], name)(*rows, **settings)

        return sweep

    for name in ("forward_sweep", "negative_sum", "gradient_sweep"):
        setattr(kernel, name, recorded(name))
    return kernel


@pytest.mark.parametrize("gradient_operand", ["precise", "fast"])
@pytest.mark.parametrize(
    ("loss", "folder", "forward"),
    [(contrastive_loss, "contrastive", "forward_sweep"), (sigmoid_contrastive_loss, "sigmoid", "negative_sum")],
)
def test_backend_triton_sweeps_with_its_kernels_alone(loss, folder, forward, gradient_operand, monkeypatch):
    calls: list[tuple[str, Any]] = []
    name = f"kernels.{folder}.launches"
    monkeypatch.setitem(sys.modules, name, recording_kernel(loss, calls))
    monkeypatch.setattr("kernels.rows.checks._require_triton", lambda *_: None)
    leaves = leaves_for(loss)
    values = gradients_of(model(loss, {"backend": "triton", "gradient_operand": gradient_operand}), leaves)
    assert calls == [(forward, None), ("gradient_sweep", gradient_operand)]
    for value, wanted in zip(values, gradients_of(model(loss, {"backend": "blockwise"}), leaves), strict=True):
        assert value.equal(wanted)


@pytest.mark.parametrize(
    ("device_type", "refusal", "chosen"),
    [("cpu", None, "blockwise"), ("cuda", None, "triton"), ("cuda", "has compute capability 7.5", "blockwise")],
)
def test_automatic_choice_takes_triton_where_it_runs_and_says_why_not(
    device_type, refusal, chosen, monkeypatch, caplog
):
    def require(*_):
        if refusal:
            raise ValueError(refusal)

    monkeypatch.setattr("kernels.rows.checks._require_triton", require)
    automatic_backend.cache_clear()
    with caplog.at_level(logging.INFO, logger="kernels"):
        assert automatic_backend("contrastive_loss", device_type) == chosen
    automatic_backend.cache_clear()
    message = f"contrastive_loss on {device_type}: backend 'auto' takes '{chosen}'"
    assert [record.message for record in caplog.records] == [message + (f": {refusal}" if refusal else "")]


@pytest.mark.parametrize("loss", [contrastive_loss, sigmoid_contrastive_loss], ids=["contrastive", "sigmoid"])
def test_an_unknown_gradient_operand_is_refused(loss):
    with pytest.raises(ValueError, match="gradient_operand='half' must be one of precise, fast"):
        loss(*leaves_for(loss), gradient_operand="half")


def rows_of_rank(loss: Callable[..., Any], counts: list[int], rank: int) -> list[torch.Tensor]:
    image, text, *scalars = leaves_for(loss, sum(counts))
    own = [tower.detach().split(counts)[rank].clone().requires_grad_() for tower in (image, text)]
    return [*own, *scalars]


def compiled_and_eager_on_rank(rank: int, world_size: int, counts: list[int], backend: str) -> list[Any]:
    calls: list[tuple[str, int]] = []
    for name in ("all_gather_single", "all_reduce", "broadcast"):
        setattr(dist, name, noting_bytes(name, getattr(dist, name), calls))
    results = []
    for loss, settings in CASES[1:]:
        forward = model(loss, {**settings, "process_group": dist.group.WORLD})
        for called in (forward, torch.compile(forward, fullgraph=True, backend=backend)):
            with without_graphs_on_disk():
                values = gradients_of(called, rows_of_rank(loss, counts, rank))
            results.append((values, list(calls)))
            calls.clear()
    return results


def noting_bytes(name: str, collective: Callable[..., Any], calls: list[tuple[str, int]]) -> Callable[..., Any]:
    def call(*args, **keywords):
        calls.append((name, args[0].numel() * args[0].element_size()))
        return collective(*args, **keywords)

    return call


@pytest.mark.slow
@pytest.mark.parametrize(("counts", "backend"), [([3, 0, 9], "aot_eager"), ([9, 3], "inductor")], ids=str)
def test_compiled_over_ranks_equals_eager_with_the_same_collectives(counts, backend):
    ranks = run_on_ranks(compiled_and_eager_on_rank, len(counts), counts, backend)
    for case, (loss, settings) in enumerate(CASES[1:]):
        whole = gradients_of(model(loss, {**settings, "backend": "reference"}), leaves_for(loss, sum(counts)))
        for mode in (2 * case, 2 * case + 1):
            results = [rank[mode] for rank in ranks]
            for values, calls in results:
                torch.testing.assert_close(values[0], whole[0], rtol=1e-10, atol=1e-13)
                assert calls == results[0][1], "every rank makes the same calls"
            for place in (1, 2):
                gathered = torch.cat([values[place] for values, _ in results])
                torch.testing.assert_close(gathered, len(counts) * whole[place], rtol=1e-10, atol=1e-13)
            for place in range(3, len(whole)):
                mean = torch.stack([values[place] for values, _ in results]).mean()
                torch.testing.assert_close(mean, whole[place], rtol=1e-10, atol=1e-13)
        eager_calls, compiled_calls = ranks[0][2 * case][1], ranks[0][2 * case + 1][1]
        assert len(eager_calls) > 2
        assert compiled_calls == eager_calls


def checks_and_products_on_rank(rank: int, world_size: int) -> list[list[float]]:
    for operations, options in OPTIONS[1::2]:
        arguments = operation_arguments(operations, options, torch.float64, dist.group.WORLD.group_name)
        # Torch's dynamic-shape check runs an operation as often as the rank's shapes ask for: ranks must have the same.
        torch.library.opcheck(operations.forward, arguments)
    products = []
    for learning in ((True, True, True), (True, False, True), (False, False, True)):
        leaves = rows_of_rank(contrastive_loss, [6, 3], rank)
        leaves = [leaf.detach().requires_grad_(needs) for leaf, needs in zip(leaves, learning, strict=True)]
        forward = model(contrastive_loss, {"process_group": dist.group.WORLD})
        with counted_products(contrastive_loss, pytest.MonkeyPatch()) as counts:
            forward(*leaves).backward()
        products.append(counts)
    return products


@pytest.mark.slow
def test_over_ranks_torch_finds_nothing_wrong_and_a_frozen_tower_is_not_swept():
    for products in run_on_ranks(checks_and_products_on_rank, 2):
        assert products == [[2, 2], [2], [1]]


DISAGREEMENTS = [
    ({"logit_scale": 5.0}, "logit_scale must be the same on all ranks, but rank 1 differs from rank 0: 4 on rank 0"),
    ({"logit_scale": float("nan")}, "logit_scale must be the same on all ranks, but rank 1 differs from rank 0"),
    ({"hard_per_anchor": 1}, "hard_per_anchor must be the same on all ranks, but rank 1 differs from rank 0: 2 on"),
    ({"margin_weight": 0.5}, "margin_weight must be the same on all ranks, but rank 1 differs from rank 0: 0.7 on"),
    ({"margin_space": "cosine"}, "margin_space must be the same on all ranks, but rank 1 differs from rank 0"),
    ({"margin_direction": "both"}, "margin_direction must be the same on all ranks, but rank 1 differs from"),
    ({"label_smoothing": 0.2}, "label_smoothing must be the same on all ranks, but rank 1 differs from rank 0"),
    ({"dtype": torch.float16}, "the features' dtype must be the same on all ranks, but rank 1 differs from rank 0"),
    ({"logit_scale": 0.0, "everywhere": True}, "logit_scale=0.0 must be positive"),
]


def disagreements_on_rank(rank: int, world_size: int) -> list[str]:
    messages = []
    for changes, _ in DISAGREEMENTS:
        arguments = {**MARGIN, "margin_direction": "image_to_text", "logit_scale": 4.0, "dtype": torch.float32}
        if rank == 1 or "everywhere" in changes:
            arguments |= {name: value for name, value in changes.items() if name != "everywhere"}
        rows = torch.eye(6, dtype=arguments.pop("dtype"))
        scale = torch.tensor(arguments.pop("logit_scale"))
        for call in (contrastive_loss, contrastive_gradients):
            with pytest.raises(ValueError) as error:
                call(rows, rows, scale, process_group=dist.group.WORLD, **arguments)
            messages.append(str(error.value))
    # The ranks are still in step, and a scale that is not a number anywhere shows in the loss.
    rows, scale = torch.eye(6), torch.tensor(float("nan"))
    assert contrastive_loss(rows, rows, scale, process_group=dist.group.WORLD).loss.isnan()
    bias = torch.tensor(-3.0 - rank)
    with pytest.raises(ValueError) as error:
        sigmoid_contrastive_loss(rows, rows, torch.tensor(4.0), bias, process_group=dist.group.WORLD)
    return [*messages, str(error.value)]


@pytest.mark.slow
def test_ranks_that_disagree_are_all_told_the_same():
    first, second = run_on_ranks(disagreements_on_rank, 2)
    assert first == second
    for (_, expected), *messages in zip(DISAGREEMENTS, first[:-1:2], first[1:-1:2], strict=True):
        assert all(message.startswith(expected) for message in messages)
    assert first[-1].startswith("logit_bias must be the same on all ranks, but rank 1 differs from rank 0: -3 on rank")
