"""Same gradient every way: under every ZeRO stage, precision, offload, number of micro-batches, world size and loss, the engine takes the
step of a plain fp32 program on the global batch (tests/same_gradient.py).

How equal. fp32: the whole update and the whole gradient (AdamW's first moment) to 1e-6 of their norm, the temperature and the bias to 1e-6;
a single weight tensor to 5e-6, since the plain fp32 step itself is 1e-6 to 3e-6 away from float64 there. bf16: a product has a relative
error of up to 2^-9, and a gradient passes through some ten of them and through a loss whose scale of 14 multiplies the features' errors, so
the yardstick is measured: a plain torch program of the same precision, on the same batch, against fp32. The engine may be as far away as
that, and half as much again (rounding falls differently by micro-batch, and ranks' gradients may be summed in bf16), plus 2^-8.
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import pytest
import torch

from tests.ranks import run_on_ranks
from tests.same_gradient import (
    LOSSES,
    NUM_MICRO_BATCHES,
    OFFLOADS,
    PRECISIONS,
    STAGES,
    WORLD_SIZES,
    Cell,
    all_cells,
    engine_steps,
    plain_steps,
)

AXES = {
    "stage": STAGES,
    "precision": PRECISIONS,
    "offload": OFFLOADS,
    "num_micro_batches": NUM_MICRO_BATCHES,
    "world_size": WORLD_SIZES,
    "loss": LOSSES,
}
Tensors = dict[str, torch.Tensor]
# ZeRO-1 with DeepSpeed's reduction; without it the gradients lie in one buffer.
OVERLAPPING = [Cell(1, "fp32", "none", micro, 2, "hnml", clip_norm=0.5, overlaps=True) for micro in NUM_MICRO_BATCHES]
# What composes with feature caching, under every stage.
LOCKED = [
    Cell(stage, "fp32", "cpu" if stage > 1 else "none", 4, 2, loss, locked, grad_checkpointing=True, clip_norm=0.5)
    for stage, loss, locked in zip(
        STAGES, ("contrastive", "sigmoid", "hnml", "contrastive"), ("image", "text") * 2, strict=True
    )
]
DROPPING = [
    Cell(stage, "fp32", "none", 4, 2, "contrastive", dropout=True, grad_checkpointing=stage in (1, 3))
    for stage in STAGES
]


def pairs_of(cell: Cell) -> set[tuple]:
    """Every two settings that the cell combines."""
    settings = [(name, getattr(cell, name)) for name in AXES]
    return set(itertools.combinations(settings, 2))


def thinned() -> list[Cell]:
    """Few cells that combine every two settings that can be combined: always the one next that brings the most, cheapest first."""
    cells = sorted((cell for cell in all_cells() if cell.exists), key=lambda cell: (cell.world_size, cell.stage))
    missing = set().union(*map(pairs_of, cells))
    chosen = []
    while missing:
        chosen.append(max(cells, key=lambda cell: len(pairs_of(cell) & missing)))
        missing -= pairs_of(chosen[-1])
    return chosen


def take_cells(rank: int, world_size: int, cells: Sequence[Cell]) -> list[dict[str, Tensors]]:
    # DeepSpeed remembers torch_autocast for the rest of a process, so those come last.
    order = sorted(range(len(cells)), key=lambda place: cells[place].precision == "autocast")
    found = {place: engine_steps(rank, world_size, cells[place]) for place in order}
    return [found[place] for place in range(len(cells))]


@cache
def plain(cell: Cell) -> dict[str, Tensors]:
    return plain_steps(cell)


def plain_of(cell: Cell, precision: str) -> dict[str, Tensors]:
    """The plain steps that `cell` should take; how it takes them makes no difference, but for dropout."""
    ways = {} if cell.dropout else {"num_micro_batches": 1, "world_size": 1}
    return plain(replace(cell, stage=0, offload="none", precision=precision, grad_checkpointing=False, **ways))


def distance(some: Tensors, other: Tensors, names: Sequence[str] | None = None) -> float:
    """Norm of the difference, relative to the norm of `other`, over all tensors (or those of `names`)."""
    names = list(other) if names is None else names
    flat = [torch.cat([tensors[name].double().flatten() for name in names]) for tensors in (some, other)]
    return ((flat[0] - flat[1]).norm() / flat[1].norm()).item()


def update(steps: dict[str, Tensors], start: Tensors) -> Tensors:
    return {name: weight.double() - start[name].double() for name, weight in steps["weights"].items()}


def assert_same(cell: Cell, found: dict[str, Tensors]) -> None:
    expected = plain_of(cell, "fp32")
    start = expected["start"]
    assert found["weights"].keys() == expected["weights"].keys(), cell
    assert found["moments"].keys() == expected["moments"].keys(), cell
    scalars = [name for name in ("logit_scale", "logit_bias") if name in expected["moments"]]
    assert ("logit_bias" in scalars) == (cell.loss == "sigmoid")
    # AdamW's first moment after the steps is the gradients' mean; the update is what the weights took.
    distances = {
        "gradient": distance(found["moments"], expected["moments"]),
        "update": distance(update(found, start), update(expected, start)),
        **{name: distance(found["moments"], expected["moments"], [name]) for name in scalars},
    }
    largest = max(distance(found["moments"], expected["moments"], [name]) for name in expected["moments"])
    if cell.precision == "fp32":
        # Some stages add 1e-6 to the norm, which is about 1, before they divide by it to clip, and some do not.
        assert max(distances.values()) <= (3e-6 if cell.clip_norm else 1e-6), (str(cell), distances)
        assert largest <= 5e-6, (str(cell), largest)
        return
    usual = plain_of(cell, cell.precision)
    yardstick = distance(usual["moments"], expected["moments"])
    assert yardstick < 0.05, "the plain program is close enough to fp32 to measure by"
    assert max(distances.values()) <= 1.5 * yardstick + 2**-8, (str(cell), distances, yardstick)


def assert_all_same(world_size: int, cells: Sequence[Cell], timeout_s: float) -> None:
    cells = [cell for cell in cells if cell.world_size == world_size]
    by_rank = run_on_ranks(take_cells, world_size, cells, timeout_s=timeout_s)
    for place, cell in enumerate(cells):
        assert_same(cell, by_rank[0][place])


def test_the_thinned_matrix_combines_every_two_settings_that_can_be_combined():
    existing = [cell for cell in all_cells() if cell.exists]
    assert len(all_cells()) == 4 * 3 * 2 * 2 * 3 * 3
    covered = set().union(*map(pairs_of, thinned()))
    assert covered == set().union(*map(pairs_of, existing))
    for name, values in AXES.items():
        assert {getattr(cell, name) for cell in thinned()} == set(values)
    assert len(thinned()) <= 20


@pytest.mark.slow
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_the_step_is_that_of_a_plain_fp32_program(world_size):
    assert_all_same(world_size, [*thinned(), *LOCKED, *DROPPING, *OVERLAPPING], timeout_s=300)


@pytest.mark.full
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_every_way_gives_the_step_of_a_plain_fp32_program(world_size):
    assert_all_same(world_size, [cell for cell in all_cells() if cell.exists], timeout_s=3600)


def test_a_wrong_gradient_would_be_noticed():
    cell = Cell(1, "fp32", "none", 1, 1, "contrastive")
    right = plain_of(cell, "fp32")
    for name in ("logit_scale", "visual.ln_pre.weight"):
        moments = {**right["moments"], name: right["moments"][name] * (1 + 1e-5)}
        with pytest.raises(AssertionError):
            assert_same(cell, {**right, "moments": moments})


def refusals(rank: int, world_size: int, cells: Sequence[Cell]) -> list[str]:
    messages = []
    for cell in cells:
        with pytest.raises(ValueError, match="ZeRO stage 0") as refused:
            engine_steps(rank, world_size, cell)
        messages.append(str(refused.value))
    return messages


@pytest.mark.slow
def test_what_cannot_exist_is_refused():
    impossible = [
        cell for cell in all_cells() if not cell.exists and cell.world_size == 1 and cell.num_micro_batches == 1
    ]
    messages = run_on_ranks(refusals, 1, impossible)[0]
    assert {(cell.precision, cell.offload) for cell in impossible} == {
        ("fp32", "cpu"),
        ("autocast", "cpu"),
        ("bf16", "cpu"),
        ("bf16", "none"),
    }
    for cell, message in zip(impossible, messages, strict=True):
        assert ("offload_optimizer needs sharded" if cell.offload == "cpu" else "use stage 1") in message
