"""The contrastive loss over a process group: against one process in float64, against open_clip, and the bytes that it
sends."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from kernels import contrastive_gradients, contrastive_loss
from kernels.bench.peers import open_clip_loss
from tests.ranks import run_on_ranks

UNEQUAL_COUNTS = {1: [12], 2: [9, 3], 3: [6, 0, 12], 4: [3, 9, 0, 6]}
MARGIN = {"hard_per_anchor": 2, "margin_weight": 0.7, "label_smoothing": 0.05}


def paired_features(num_rows: int, dim: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    image = torch.randn(num_rows, dim, generator=generator, dtype=torch.float64)
    text = image + torch.randn(num_rows, dim, generator=generator, dtype=torch.float64)
    return tuple(torch.nn.functional.normalize(rows, dim=1).to(dtype) for rows in (image, text))


def own_rows(counts: list[int], rank: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    towers = paired_features(sum(counts), 10, dtype)
    return [tower.split(counts)[rank].clone().requires_grad_() for tower in towers]


def losses_on_rank(rank: int, world_size: int, counts: list[int], cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    results = []
    for settings in cases:
        image, text = own_rows(counts, rank)
        scale = torch.tensor([20.0], dtype=torch.float64, requires_grad=True)
        output = contrastive_loss(image, text, scale, process_group=dist.group.WORLD, **settings)
        output.loss.backward()
        direct = contrastive_gradients(image, text, scale, process_group=dist.group.WORLD, **settings)
        terms = ("loss", "margin", "image_accuracy", "text_accuracy")
        results.append(
            {
                **{name: getattr(output, name).detach() for name in terms},
                **{"image": image.grad, "text": text.grad, "scale": scale.grad},
                "direct": [direct.d_image_BD, direct.d_text_BD, direct.d_logit_scale],
            }
        )
    return results


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_unequal_and_empty_ranks_match_one_float64_process(world_size):
    counts = UNEQUAL_COUNTS[world_size]
    cases = [
        {**MARGIN, "margin_space": space, "backend": backend}
        for space in ("cosine", "logits")
        for backend in ("blockwise", "reference")
    ]
    results = run_on_ranks(losses_on_rank, world_size, counts, cases)
    for settings, *ranks in zip(cases, *results, strict=True):
        leaves = [tower.requires_grad_() for tower in paired_features(sum(counts), 10)]
        scale = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
        expected = contrastive_loss(*leaves, scale, **{**settings, "backend": "reference"})
        expected.loss.backward()
        for name in ("loss", "margin", "image_accuracy", "text_accuracy"):
            for result in ranks:
                torch.testing.assert_close(result[name], getattr(expected, name).detach(), rtol=1e-12, atol=1e-15)
                assert result[name].equal(ranks[0][name]), "all ranks report the same bits"
        for name, leaf in zip(("image", "text"), leaves, strict=True):
            gathered = torch.cat([result[name] for result in ranks])
            torch.testing.assert_close(gathered, world_size * leaf.grad, rtol=1e-10, atol=1e-14)
        mean_scale = torch.cat([result["scale"] for result in ranks]).mean()
        torch.testing.assert_close(mean_scale, scale.grad, rtol=1e-10, atol=1e-14)
        for result in ranks:
            for direct, name in zip(result["direct"], ("image", "text", "scale"), strict=True):
                torch.testing.assert_close(direct.reshape(result[name].shape), result[name], rtol=1e-12, atol=1e-15)


def both_losses_on_rank(rank: int, world_size: int) -> list[list[torch.Tensor]]:
    results = []
    for peer in (True, False):
        image, text = own_rows([8] * world_size, rank)
        scale = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
        if peer:
            clip_loss = open_clip_loss().ClipLoss(
                local_loss=True, gather_with_grad=True, rank=rank, world_size=world_size
            )
            loss = clip_loss(image, text, scale)
        else:
            loss = contrastive_loss(image, text, scale, process_group=dist.group.WORLD, backend="blockwise").loss
        loss.backward()
        # What an engine that averages over ranks would see.
        reported = loss.detach().clone()
        for value in (reported, scale.grad):
            dist.all_reduce(value)
            value /= world_size
        results.append([reported, image.grad, text.grad, scale.grad])
    return results


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_loss_and_gradients_follow_open_clip_convention_under_mean_reduction(world_size):
    for peer, ours in run_on_ranks(both_losses_on_rank, world_size):
        for expected, value in zip(peer, ours, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-14)


def count_bytes_on_rank(rank: int, world_size: int, counts: list[int], dtype: torch.dtype) -> dict[str, int]:
    sent = {"features": 0, "forward": 0, "backward": 0}
    phase = "forward"

    def counting(collective, tensor_index):
        def call(*args, **keywords):
            tensor = args[tensor_index]
            is_feature = tensor.dtype == torch.uint8 and tensor.shape[1] == 10 * dtype.itemsize
            sent["features" if is_feature else phase] += tensor.numel() * tensor.element_size()
            return collective(*args, **keywords)

        return call

    for name in ("all_gather_single", "all_to_all_single", "broadcast"):
        setattr(dist, name, counting(getattr(dist, name), 0))
    for name in (
        "all_gather",
        "all_gather_into_tensor",
        "reduce_scatter",
        "reduce_scatter_tensor",
        "all_reduce",
        "send",
    ):
        setattr(dist, name, None)
    image, text = own_rows(counts, rank, dtype)
    scale = torch.tensor(20.0, requires_grad=True)
    loss = contrastive_loss(image, text, scale, process_group=dist.group.WORLD, **MARGIN).loss
    phase = "backward"
    loss.backward()
    return sent


@pytest.mark.slow
@pytest.mark.parametrize(("counts", "dtype"), [([6, 6, 6], torch.bfloat16), ([6, 0, 12], torch.float32)])
def test_forward_sends_features_once_and_backward_sends_nothing(counts, dtype):
    total = sum(counts)
    for rank, sent in enumerate(run_on_ranks(count_bytes_on_rank, 3, counts, dtype)):
        assert sent["features"] == 2 * total * 10 * dtype.itemsize, "each row of each tower exactly once"
        # Of each rank: rows, D, dtype, scale, and the five settings that must agree.
        header = 3 * 9 * 8
        thresholds, rows = 2 * (total // 3) * 4, total * 8 * 8
        # What three ranks know of this rank's columns: maximum and sum of each, two sums of a group of three.
        columns = 3 * (2 * counts[rank] + 2 * (counts[rank] // 3)) * 8
        assert sent["forward"] == header + thresholds + columns + rows
        assert sent["backward"] == 0


def low_loss_towers() -> list[torch.Tensor]:
    """Float32 rows of loss 6e-6 at scale 100: a few pairs carry it, and with it the gradients."""
    generator = torch.Generator().manual_seed(3)
    image = torch.randn(40, 64, generator=generator)
    text = image + 1.4 * torch.randn(40, 64, generator=generator)
    return [torch.nn.functional.normalize(rows, dim=1) for rows in (image, text)]


def low_loss_on_rank(rank: int, world_size: int, counts: list[int]) -> list[torch.Tensor]:
    own = [tower.split(counts)[rank] for tower in low_loss_towers()]
    found = contrastive_gradients(*own, torch.tensor(100.0), process_group=dist.group.WORLD)
    return [found.d_image_BD, found.d_text_BD, found.d_logit_scale[None], found.terms.loss[None]]


@pytest.mark.slow
def test_at_low_loss_float32_ranks_form_the_hardest_pairs_of_all_ranks_exactly():
    ranks = run_on_ranks(low_loss_on_rank, 3, [11, 0, 29])
    exact = [tower.double() for tower in low_loss_towers()]
    expected = contrastive_gradients(*exact, torch.tensor(100.0).double(), backend="reference")
    assert 3e-6 < expected.terms.loss.item() < 1e-5
    gathered = [torch.cat(parts) for parts in zip(*ranks, strict=True)]
    wanted = [3 * expected.d_image_BD, 3 * expected.d_text_BD]
    values = [*gathered[:2], gathered[2].mean(), gathered[3][0]]
    for value, exactly in zip(values, [*wanted, expected.d_logit_scale, expected.terms.loss], strict=True):
        # With float32 cosines alone the gradients are wrong by 2e-6 here.
        assert (value.double() - exactly).norm() <= 3e-7 * exactly.norm()


def frozen_image_on_rank(rank: int, world_size: int) -> list[torch.Tensor]:
    image, text = own_rows([6, 3], rank)
    scale = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
    contrastive_loss(image.detach(), text, scale, process_group=dist.group.WORLD, **MARGIN).loss.backward()
    return [text.grad, scale.grad]


@pytest.mark.slow
def test_scale_gradient_is_exact_when_only_the_text_tower_learns():
    image, text = (tower.requires_grad_() for tower in paired_features(9, 10))
    scale = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
    contrastive_loss(image, text, scale, backend="reference", **MARGIN).loss.backward()
    ranks = run_on_ranks(frozen_image_on_rank, 2)
    torch.testing.assert_close(torch.cat([d_text for d_text, _ in ranks]), 2 * text.grad, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(torch.stack([d_scale for _, d_scale in ranks]).mean(), scale.grad, rtol=1e-10, atol=0)


def errors_on_rank(rank: int, world_size: int, cases: list[tuple[list[int], list[int]]]) -> list[str]:
    messages = []
    for counts, dims in cases:
        features = torch.zeros(counts[rank], dims[rank])
        with pytest.raises(ValueError) as error:
            contrastive_loss(features, features, torch.tensor(1.0), hard_per_anchor=2, process_group=dist.group.WORLD)
        messages.append(str(error.value))
    return messages


@pytest.mark.slow
def test_every_rank_raises_when_one_rank_is_wrong():
    cases = [([3, 16], [4, 4]), ([3, 3], [4, 5]), ([0, 0], [4, 4])]
    first, second = run_on_ranks(errors_on_rank, 2, cases)
    assert first[0] == "hard_per_anchor=2 needs rows in groups of 3, but rank 1 has 16"
    assert second[0] == "hard_per_anchor=2 needs rows in groups of 3, but this rank has 16"
    assert (
        first[1]
        == second[1]
        == "D must be the same on all ranks, but rank 1 differs from rank 0: 4 on rank 0, 5 on rank 1"
    )
    assert all("at least one row" in messages[2] for messages in (first, second))


def fail_on_last_rank(rank: int, world_size: int) -> None:
    if rank == world_size - 1:
        raise ValueError("told to fail")
    dist.barrier()


@pytest.mark.slow
def test_a_failing_rank_takes_all_ranks_down_with_its_traceback():
    with pytest.raises(RuntimeError, match="told to fail"):
        run_on_ranks(fail_on_last_rank, 2)
