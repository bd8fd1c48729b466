"""No step of any objective reads from the device at ZeRO-0, on one rank and on two with unequal rows, in one piece and feature-cached."""

import os
from dataclasses import replace
from typing import Any

import pytest
import torch

import kernels
from tests.host_reads import Reads
from tests.ranks import run_on_ranks
from tests.same_gradient import NUM_ROWS, Cell, global_batches, rows_of_rank, tiny_model
from train.config import ObjectiveConfig, OptimConfig, TrainConfig
from train.distributed import row_layout

TINY = ObjectiveConfig(
    head_width=8,
    head_dim=4,
    siam_width=8,
    siam_dim=4,
    barlow_width=8,
    barlow_dim=4,
    declip_dim=8,
    declip_width=4,
    queue_length=32,
)
OBJECTIVES = {
    "clip": TINY,
    "slip": replace(TINY, name="slip"),
    "cl2l": replace(TINY, name="cl2l"),
    "legacy": replace(TINY, name="cl2l", legacy_gradients=True),
    "siamlip": replace(TINY, name="siamlip"),
    "byolip": replace(TINY, name="byolip"),
    "barlip": replace(TINY, name="barlip"),
    "swalip": replace(TINY, name="swalip", strong_label_smoothing=0.0),
    "declip": replace(TINY, name="declip", num_strong_views=1),
    "dropout": replace(TINY, name="cl2l", text_dropout=0.1, text_drop_path=0.1),
}
HOSTS_OWN = "nonzero train/objectives/hidden_words.py"
# (objective, micro-batches)
ALONE = [(name, 1) for name in OBJECTIVES] + [("byolip", 4), ("declip", 4)]
TOGETHER = [("slip", 1), ("legacy", 1), ("byolip", 1), ("barlip", 1), ("swalip", 1), ("declip", 1), ("declip", 4)]


def reads_of_steps(rank: int, world_size: int, cases: list[tuple[str, int]]) -> dict[str, list[str]]:
    import train.objectives.towers_and_heads
    from train.step import train_step

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), DS_ACCELERATOR="cpu")
    # Words are hidden before the forward, while the texts are in the host's memory; there their number may be read.
    train.objectives.towers_and_heads.hide_words = None
    found = {}
    for name, number in cases:
        cell = Cell(0, "autocast", "none", number, world_size, "contrastive", clip_norm=1.0)
        config = replace(cell.train_config(), objective=OBJECTIVES[name])
        engine = engine_of(cell, config, rank)
        batch = batch_of(config, rank, world_size)
        with Reads() as reads:
            outcome = train_step(engine, config, batch, 1e-3)
        assert not outcome.not_finite
        found[f"{name} {number}"] = [read for read in reads.found if not read.startswith(HOSTS_OWN)]
        engine.close()
    return found


def engine_of(cell: Cell, config: TrainConfig, rank: int) -> Any:
    from train.distributed import Ranks
    from train.engine import Engine
    from train.models.clip_library import PreprocessCfg
    from train.objectives.teacher import Teacher
    from train.objectives.towers_and_heads import build_towers, has_teacher

    towers = build_towers(tiny_model(cell), PreprocessCfg(), config)
    teacher = Teacher(towers, towers.objective.teacher_momentum) if has_teacher(towers) else None
    ranks, optim = Ranks(rank, cell.world_size, rank, torch.device("cpu")), OptimConfig(lr=1e-3, warmup=0)
    return Engine(towers, cell.ds_config(), optim, batch_size=NUM_ROWS, ranks=ranks, teacher=teacher)


def batch_of(config: TrainConfig, rank: int, world_size: int) -> Any:
    from train.data.loader import RankBatch

    image_GCHW, text_GL = next(global_batches(1))
    mine, strong = rows_of_rank(rank, world_size), config.objective
    parts = [rows_of_rank(other, world_size) for other in range(world_size)]
    images = () if strong.towers_alone else (image_GCHW[mine].flip(3),) * max(strong.num_strong_views, 2)
    texts = () if strong.towers_alone or strong.name == "slip" else (text_GL[mine],) * strong.num_strong_views
    if strong.name == "declip":
        images = images[:1]
    return RankBatch(
        image_GCHW[mine],
        text_GL[mine],
        torch.arange(NUM_ROWS)[mine],
        NUM_ROWS,
        0,
        strong_images=images,
        strong_texts=texts,
        rows_per_rank=tuple(part.stop - part.start for part in parts),
    )


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "cases"), [(1, ALONE), (2, TOGETHER)], ids=["1 rank", "2 ranks"])
def test_no_step_of_an_objective_reads_from_the_device(world_size, cases):
    for found in run_on_ranks(reads_of_steps, world_size, cases):
        assert found == {f"{name} {number}": [] for name, number in cases}


def test_a_batch_that_does_not_say_its_rows_makes_ranks_ask():
    with Reads() as reads:
        row_layout((), 3, None)
    assert reads.found == []
    assert run_on_ranks(asked_layout, 2) == [((2, 5), True)] * 2


def asked_layout(rank: int, world_size: int) -> tuple[tuple[int, ...], bool]:
    with Reads() as reads:
        layout = row_layout((), (2, 5)[rank], torch.distributed.group.WORLD)
    return layout.counts, bool(reads.found)


@pytest.mark.parametrize("counts", [(4,), (3, 3)])
def test_counts_of_other_rows_or_ranks_are_refused(counts):
    with pytest.raises(ValueError, match=r"rows_per_rank=\[.* must name the rows of 1 ranks, and 3 of them for rank 0"):
        row_layout(counts, 3, None)


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (lambda rows: float(rows[0, 0]), "_local_scalar_dense"),
        (lambda rows: rows.tolist(), "tolist"),
        (lambda rows: rows[rows > 0], "index"),
        (lambda rows: rows.new_tensor(3.0), "lift_fresh"),
        (lambda rows: kernels.contrastive_loss(rows, rows, rows.new_ones(1)), "rows"),
    ],
)
def test_a_read_is_found(read, name):
    with Reads() as reads:
        read(torch.eye(3))
    assert [found.split()[0] for found in reads.found] == [name]
