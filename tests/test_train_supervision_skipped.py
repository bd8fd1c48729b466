"""A loss or a gradient that is not finite, planted on one rank: all skip the step, it is counted and named, and too many end the run."""

import json
import os
import traceback
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from tests.ranks import run_on_ranks
from tests.tiny_world import tiny_store, train_here, training_flags, write_stages
from train.config import DataConfig, TrainConfig
from train.data.loader import RankBatch

BAD_STEPS = (2, 3)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    tiny_store(folder, num_hues=12)
    write_stages(folder)
    return folder


def spoil(features: torch.Tensor, where: str) -> torch.Tensor:
    if where == "loss":
        return features * float("nan")
    # Finite forward, a gradient that is not.
    features.register_hook(lambda gradient: gradient * float("inf"))
    return features


def train_with_bad_steps(rank: int, world_size: int, folder: Path, where: str, stages: range, flags: dict) -> list[str]:
    """Train at each stage with `where` spoilt on rank 1 at BAD_STEPS; what the run died of, or nothing."""
    from train.engine import Engine

    original, calls = Engine.forward, []

    def forward(self, *args):
        calls.append(1)
        image_BD, text_BD, scale = original(self, *args)
        return spoil(image_BD, where) if rank == 1 and len(calls) in BAD_STEPS else image_BD, text_BD, scale

    Engine.forward, errors = forward, []
    for stage in stages:
        calls.clear()
        out = folder / f"{where}-{stage}-{len(flags)}"
        settings = {"max_steps": 4, "threads": 1, "save_every_steps": 1, "keep_checkpoints": 9, **flags}
        config = training_flags(folder / "store", out, folder / f"stage_{stage}.json", **settings)
        try:
            train_here(rank, world_size, config)
        except RuntimeError as error:
            errors.append(str(error))
    return errors


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def parameters(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Without BatchNorm's statistics, which follow every forward pass."""
    from train.models.model import load_model

    model = load_model(run / "checkpoints" / f"step_{step}").model
    return {name: value.detach() for name, value in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize(("where", "stages"), [("gradient", range(4)), ("loss", range(1))])
def test_steps_that_are_not_finite_change_no_weight_on_any_rank_and_are_named(world, where, stages):
    assert run_on_ranks(train_with_bad_steps, 2, world, where, stages, {}, timeout_s=300) == [[], []]
    for stage in stages:
        run = world / f"{where}-{stage}-0"
        weights = [parameters(run, step) for step in (1, 2, 3, 4)]
        same = [all(torch.equal(one[name], other[name]) for name in one) for one, other in pairwise(weights)]
        assert same == [True, True, False], stage
        assert all(value.isfinite().all() for value in weights[-1].values())
        metrics = rows(run / "metrics.jsonl")
        assert [row["skipped_steps"] for row in metrics] == [0, 1, 2, 2]
        assert metrics[3]["gradient_norm"] > 0
        for rank in range(2):
            named = rows(run / f"skipped_rank{rank}.jsonl")
            assert [(row["step"], row["not_finite"]) for row in named] == [(2, where), (3, where)]
            # 16 pairs a batch, half of them on each rank.
            assert [len(set(row["pair_ids"])) for row in named] == [8, 8]
            assert [row["rows_not_finite"] for row in named] == [8 if where == "loss" and rank == 1 else 0] * 2


@pytest.mark.slow
def test_too_many_in_a_row_end_the_run_on_every_rank_with_the_step_and_the_rank(world):
    errors = run_on_ranks(train_with_bad_steps, 2, world, "loss", range(1, 2), {"max_skipped_steps": 2})
    for found in errors:
        assert len(found) == 1
        assert "not finite for 2 steps in a row; the last is step 3, for its loss; rank 1's features" in found[0]


@pytest.mark.parametrize("planted", [1.0, float("nan"), float("inf")])
def test_a_step_asks_the_device_nothing_and_a_bad_loss_spoils_every_gradient(monkeypatch, planted):
    from train.config import TrainConfig
    from train.loop import train_step
    from train.supervision.phases import Phases

    weights = torch.nn.Parameter(torch.randn(5, 8))

    class Engine:
        phases = Phases()

        def forward(self, image_BCHW, text_BL):
            rows_BD = torch.nn.functional.normalize(weights, dim=1)
            return rows_BD * torch.tensor(planted), rows_BD, torch.ones(1)

        def backward_and_step(self, loss, rate):
            loss.backward()
            return torch.tensor(True)

    read = []

    def noting(name: str, original):
        def method(self, *arguments):
            caller = traceback.extract_stack(limit=2)[0]
            # The loss's operation reads its scalars and the ranks' row counts by itself.
            if f"{os.sep}train{os.sep}" in caller.filename:
                read.append((name, caller.filename, caller.lineno))
            return original(self, *arguments)

        return method

    for name in ("item", "__bool__", "__float__", "__int__", "tolist", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, noting(name, getattr(torch.Tensor, name)))
    batch = RankBatch(torch.empty(5), torch.empty(5), torch.arange(5), 5, 0)
    train_step(Engine(), TrainConfig(), batch, 1e-3)
    monkeypatch.undo()
    assert read == []
    assert weights.grad.isfinite().all() == (planted == 1.0)
    assert weights.grad.isnan().all() == (planted != 1.0)


def test_a_limit_below_one_skipped_step_is_refused():
    config = TrainConfig(ds_config="a.json", out="b", data=DataConfig(store="c"), max_skipped_steps=0)
    with pytest.raises(ValueError, match="max_skipped_steps=0 must be at least 1"):
        config.check()
