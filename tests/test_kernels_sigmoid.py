"""The sigmoid loss against its definition, open_clip's SigLipLoss and float64, on one process and over ranks."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import kernels.sigmoid
from kernels import sigmoid_contrastive_gradients, sigmoid_contrastive_loss
from kernels.bench.peers import open_clip_loss
from kernels.sigmoid.function import Options
from tests.ranks import run_on_ranks


def leaves_of(num_rows: int, dim: int, dtype: torch.dtype = torch.float64, *, scale: float = 12.0, bias: float = -9.0):
    generator = torch.Generator().manual_seed(3)
    image = torch.randn(num_rows, dim, generator=generator, dtype=torch.float64)
    text = image + torch.randn(num_rows, dim, generator=generator, dtype=torch.float64)
    rows = [F.normalize(tower, dim=1).to(dtype) for tower in (image, text)]
    scalars = [torch.tensor(value, dtype=torch.promote_types(dtype, torch.float32)) for value in (scale, bias)]
    return [leaf.requires_grad_() for leaf in (*rows, *scalars)]


def gradients_of(leaves, **settings):
    loss = sigmoid_contrastive_loss(*leaves, **settings).loss
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
def test_loss_and_gradients_equal_open_clip_on_one_process(backend):
    leaves = leaves_of(23, 9)
    loss = open_clip_loss().SigLipLoss()(*leaves)
    expected = [loss.detach(), *torch.autograd.grad(loss, leaves)]
    for value, wanted in zip(gradients_of(leaves, backend=backend), expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (63, 123), (257, 16)])
@pytest.mark.parametrize("tiles", [(512, 2048), (7, 32), (64, 5)])
def test_blockwise_equals_reference_whatever_the_tiles(shape, tiles, monkeypatch):
    options = partial(Options, row_tile=tiles[0], column_tile=tiles[1])
    monkeypatch.setattr(kernels.sigmoid, "Options", options)
    leaves = leaves_of(*shape)
    for value, wanted in zip(gradients_of(leaves), gradients_of(leaves, backend="reference"), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-10, atol=1e-13)


def test_gradients_pass_gradcheck():
    leaves = leaves_of(9, 4)
    assert torch.autograd.gradcheck(lambda *inputs: sigmoid_contrastive_loss(*inputs).loss, leaves, eps=1e-7)


@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (100.0, -20.0), (1000.0, -300.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accuracy_against_float64(scale, bias, dtype):
    leaves = leaves_of(512, 256, dtype, scale=scale, bias=bias)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    direct = sigmoid_contrastive_gradients(*leaves)
    values = [direct.terms.loss, direct.d_image_BD, direct.d_text_BD, direct.d_logit_scale, direct.d_logit_bias]
    plain = gradients_of([leaf.detach().float().requires_grad_() for leaf in leaves], backend="reference")
    for value, wanted, peer in zip(values, gradients_of(exact, backend="reference"), plain, strict=True):
        assert value.dtype == torch.float32
        error, peer_error = ((other.double() - wanted).norm() / wanted.norm() for other in (value, peer))
        assert error <= peer_error + 2e-6


@pytest.mark.parametrize(
    "learning", [(True, False, False, False), (False, True, False, True), (False, False, True, False)]
)
def test_frozen_inputs_get_no_gradient(learning):
    leaves = leaves_of(12, 4)
    expected = gradients_of(leaves)[1:]
    wanted = [leaf.detach().requires_grad_(needs) for leaf, needs in zip(leaves, learning, strict=True)]
    (2 * sigmoid_contrastive_loss(*wanted).loss).backward()
    for leaf, gradient, needs in zip(wanted, expected, learning, strict=True):
        torch.testing.assert_close(leaf.grad, 2 * gradient if needs else None)


def test_not_a_number_shows():
    leaves = leaves_of(12, 4)
    leaves[0].data[3, 1] = torch.nan
    assert all(value.isnan().any() for value in gradients_of(leaves))


def test_nothing_of_the_size_of_the_matrix_is_kept_for_backward():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        sigmoid_contrastive_loss(*leaves_of(3000, 4, torch.float32))
    assert max(kept) == 3000 * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logit_bias": torch.zeros(2)}, "logit_bias must be a floating-point tensor"),
        ({"logit_scale": torch.tensor(-1.0)}, "logit_scale=-1.0 must be positive"),
        ({"text_BD": torch.zeros(3, 4)}, "matrices of one shape"),
        ({"backend": "triton"}, "(?i)triton.*(TRITON_INTERPRET|GPU)"),
    ],
)
def test_bad_input_is_refused(changes, message):
    arguments = {
        "image_BD": torch.zeros(4, 4),
        "text_BD": torch.zeros(4, 4),
        "logit_scale": torch.tensor(1.0),
        "logit_bias": torch.tensor(0.0),
        **changes,
    }
    with pytest.raises(ValueError, match=message):
        sigmoid_contrastive_loss(**arguments)


def losses_on_rank(rank: int, world_size: int, cases: list) -> list:
    results = []
    for counts, backend in cases:
        image, text, scale, bias = leaves_of(sum(counts), 10)
        rows = [tower.detach().split(counts)[rank].clone().requires_grad_() for tower in (image, text)]
        if backend == "open_clip":
            loss = open_clip_loss().SigLipLoss(rank=rank, world_size=world_size)(*rows, scale, bias)
        else:
            loss = sigmoid_contrastive_loss(*rows, scale, bias, process_group=dist.group.WORLD, backend=backend).loss
        loss.backward()
        reported = loss.detach().clone()
        for value in (reported, scale.grad, bias.grad):
            dist.all_reduce(value)
            value /= world_size
        results.append([reported, *(leaf.grad for leaf in (*rows, scale, bias))])
    return results


@pytest.mark.slow
@pytest.mark.parametrize("counts", [[5, 4], [3, 0, 6], [4, 1, 0, 3]])
def test_ranks_match_one_float64_process_and_open_clip(counts):
    world_size = len(counts)
    cases = [
        (counts, "blockwise"),
        (counts, "reference"),
        ([4] * world_size, "blockwise"),
        ([4] * world_size, "open_clip"),
    ]
    ranks = run_on_ranks(losses_on_rank, world_size, cases)
    for case, (case_counts, _) in enumerate(cases):
        leaves = leaves_of(sum(case_counts), 10)
        loss, d_image, d_text, d_scale, d_bias = gradients_of(leaves, backend="reference")
        results = [rank[case] for rank in ranks]
        for value in results:
            for got, wanted in ((value[0], loss), (value[3], d_scale), (value[4], d_bias)):
                torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-14)
        for place, wanted in ((1, d_image), (2, d_text)):
            gathered = torch.cat([value[place] for value in results])
            torch.testing.assert_close(gathered, world_size * wanted, rtol=1e-10, atol=1e-14)
