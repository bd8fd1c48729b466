"""Gradients clipped as torch clips, a step that is not finite left out on the device; what a step asks of the device at each ZeRO stage."""

import math
import os
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.host_reads import Reads
from tests.ranks import run_on_ranks
from tests.same_gradient import NUM_ROWS, Cell, global_batches, tiny_model, whole_weights
from train.config import OptimConfig, TrainConfig
from train.whole_gradients import WholeGradients


def small_model() -> torch.nn.Module:
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8 * 4 * 4, 5)
    return torch.nn.Sequential(*layers).to(memory_format=torch.channels_last)


def stepped(model: torch.nn.Module, *, max_norm: float, factor: float, steps: int = 1) -> tuple[WholeGradients, list]:
    adam = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    whole, found = WholeGradients(model, adam, max_norm), []
    for _ in range(steps):
        whole.clear()
        for part in range(2):
            images = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(part))
            (factor * model(images).square().sum()).backward()
        found.append(bool(whole.judge()))
        adam.step()
        adam.zero_grad()
    return whole, found


@pytest.mark.parametrize("max_norm", [0.0, 0.5])
def test_two_backward_passes_are_summed_and_clipped_as_torch_does(max_norm):
    ours, plain = small_model(), small_model()
    whole, taken = stepped(ours, max_norm=max_norm, factor=1.0)
    adam = torch.optim.AdamW(plain.parameters(), lr=0.1)
    for part in range(2):
        plain(torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(part))).square().sum().backward()
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), max_norm or torch.inf)
    adam.step()
    assert taken == [True]
    torch.testing.assert_close(whole.norm, norm)
    for own, expected in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own, expected)


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_neither_weights_nor_moments_nor_their_count(factor):
    model, untouched = small_model(), small_model()
    whole, taken = stepped(model, max_norm=0.5, factor=factor, steps=2)
    assert taken == [False, False]
    assert not whole.norm.isfinite()
    for own, expected in zip(model.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(own, expected)
        state = whole.optimizer.state[own]
        assert state["step"] == 0
        assert state["exp_avg"].count_nonzero() == state["exp_avg_sq"].count_nonzero() == 0


def reads_of_a_step(rank: int, world_size: int, cells: list[Cell]) -> list[list[str]]:
    """What a step of each cell reads; after it, one whose gradients are not finite has to leave the weights as they are."""
    from train.data.loader import RankBatch
    from train.distributed import Ranks
    from train.engine import Engine
    from train.models.clip_library import PreprocessCfg
    from train.models.model import TwoTowers
    from train.step import train_step

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), DS_ACCELERATOR="cpu")
    ranks, optim = Ranks(rank, world_size, rank, torch.device("cpu")), OptimConfig(lr=1e-3, warmup=0)
    image_GCHW, text_GL = next(global_batches(1))
    batch = RankBatch(image_GCHW, text_GL, torch.arange(NUM_ROWS), NUM_ROWS, 0, rows_per_rank=(NUM_ROWS,))
    found = []
    for cell in cells:
        towers = TwoTowers(tiny_model(cell), PreprocessCfg())
        engine = Engine(
            towers,
            cell.ds_config(),
            replace(optim, grad_clip_norm=cell.clip_norm),
            batch_size=NUM_ROWS,
            ranks=ranks,
        )
        # DeepSpeed's own would synchronize with the device twice a step.
        assert not engine.engine.tput_timer.config.enabled
        # ZeRO-3 compares its plan of the layers among the ranks in the first two.
        for _ in range(3 if cell.stage == 3 else 1):
            train_step(engine, cell.train_config(), batch, optim.lr)
        with Reads() as reads:
            train_step(engine, cell.train_config(), batch, optim.lr)
        found.append(reads.found)
        if cell.stage == 3 and cell.offload == "none":
            # The number of the host that DeepSpeed looks at in the norm's place.
            assert engine.optimizer._get_norm_groups() == [0.0]
        if cell.num_micro_batches == 1:
            assert_left_out(engine, batch, optim.lr, str(cell))
        engine.close()
    return found


def assert_left_out(engine: Any, batch: Any, rate: float, where: str) -> None:
    before = whole_weights(engine)
    image_BD, *_ = engine.forward(batch.image_BCHW, batch.text_BL)
    taken = engine.backward_and_step(image_BD.sum() * float("inf"), rate)
    assert not taken, where
    assert not math.isfinite(engine.gradient_norm()), where
    after = whole_weights(engine)
    assert all(torch.equal(before[name], after[name]) for name in before), where


@pytest.mark.slow
def test_a_step_reads_nothing_from_the_device_unless_the_optimizer_is_on_the_host():
    whole = Cell(0, "autocast", "none", 1, 1, "contrastive", clip_norm=1.0)
    cells = [whole, replace(whole, num_micro_batches=4), replace(whole, loss="sigmoid"), replace(whole, loss="hnml")]
    cells += [replace(whole, stage=1), replace(whole, stage=1, overlaps=True), replace(whole, stage=2)]
    cells += [replace(whole, stage=stage, precision="bf16") for stage in (1, 2)]
    assert run_on_ranks(reads_of_a_step, 1, cells)[0] == [[]] * len(cells)


@pytest.mark.slow
def test_what_deepspeed_reads_in_a_step_is_what_the_readme_says():
    """ds_configs/README.md, "What the host waits for"."""
    sharded = Cell(3, "fp32", "none", 1, 1, "contrastive", clip_norm=1.0)
    cells = [sharded, replace(sharded, offload="cpu"), replace(sharded, stage=2, offload="cpu", clip_norm=0.0)]
    num_weights = len(list(tiny_model(sharded).parameters()))
    # At ZeRO-3 of its own number, which the host has already; with offload of every group's norm, and at ZeRO 1 and 2 of every gradient.
    found = run_on_ranks(reads_of_a_step, 1, cells)[0]
    # It also makes tensors of numbers of its own.
    read = [[name for name in reads if name.startswith("_local_scalar_dense")] for reads in found]
    assert [len(reads) for reads in read] == [1, 3, 2 * num_weights + 3], found


def shares_of_a_sum(rank: int, world_size: int) -> list[list[list[float]]]:
    """By gloo's way and by the other backends'."""
    from train import distributed

    found = []
    for backend in ("gloo", "nccl"):
        distributed.dist.get_backend = lambda backend=backend: backend
        rows = torch.arange(12.0) * 10**rank
        parts = rows.split([8, 4])
        owned = [part.view(world_size, -1)[rank] for part in parts]
        distributed.add_to_owners(rows, parts, owned)
        found.append([own.tolist() for own in owned])
    return found


def test_every_rank_gets_the_sum_of_its_share_of_each_part():
    first, last = run_on_ranks(shares_of_a_sum, 2)
    assert first == [[[0, 11, 22, 33], [88, 99]]] * 2
    assert last == [[[44, 55, 66, 77], [110, 121]]] * 2


def same_flags(rank: int, world_size: int, other: str) -> str:
    from train.records.same_run import check_ranks_agree

    # What a node may have of its own does not count.
    config = TrainConfig(threads=rank)
    if other == "flags" and rank == 1:
        config = replace(config, seed=7)
    drive = {"device": "nvme", "nvme_path": f"/drive-of-node-{rank}"}
    ds_config = {"zero_optimization": {"stage": int(other == "json" and rank == 1), "offload_optimizer": drive}}
    try:
        check_ranks_agree(config, ds_config, SimpleNamespace(rank=rank))
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("other", ["", "flags", "json"])
def test_a_rank_that_was_started_with_other_flags_is_named(other):
    said = run_on_ranks(same_flags, 2, other)
    assert said[0] == ""
    assert said[1] == (
        "rank 1 has other flags than rank 0, or another DeepSpeed JSON; start all ranks with the same command"
        if other
        else ""
    )
