"""The temperature under 16-bit weights: forward uses the fp32 master, and the limit holds on the master."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ranks import run_on_ranks
from tests.tiny_world import TINY_VIT, tiny_store, train_here, training_flags, write_stages

# Below what the model starts with.
LIMIT = 13.7


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    tiny_store(folder, num_hues=12)
    (folder / "tiny-vit.json").write_text(json.dumps(TINY_VIT), encoding="utf-8")
    write_stages(folder, bf16={"enabled": True})
    # Its threshold would leave so small a model whole on every rank.
    sharded = {"stage": 3, "stage3_param_persistence_threshold": 0}
    (folder / "stage_sharded.json").write_text(json.dumps({"zero_optimization": sharded}), encoding="utf-8")
    offloaded = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    offloaded = {"zero_optimization": offloaded, "bf16": {"enabled": True}}
    (folder / "stage_offloaded.json").write_text(json.dumps(offloaded), encoding="utf-8")
    return folder


class Reads(TorchDispatchMode):
    """Counts how often the host asks for a tensor's number: on a GPU it would wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.num_reads = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.num_reads += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def used_and_master(
    rank: int, world_size: int, folder: Path, stages: list[str]
) -> dict[str, list[tuple[float, float]]]:
    """For each stage and step the scale that forward used and the fp32 master before it; fails when the clamp reads a number."""
    from deepspeed.utils import safe_get_full_fp32_param

    from train.engine import Engine
    from train.models.clip_library import open_clip

    open_clip.add_model_config(folder)
    original, clamp, found = Engine.forward, Engine._clamp_log_scales, {}

    def forward(self, *args):
        master = safe_get_full_fp32_param(self.module.clip.logit_scale).item()
        features = original(self, *args)
        found[stage].append((features[2].item(), master))
        return features

    def clamp_without_reading(self):
        with Reads() as reads:
            clamp(self)
        assert not reads.num_reads

    Engine.forward, Engine._clamp_log_scales = forward, clamp_without_reading
    settings = {"model__name": "tiny-vit", "max_steps": 5, "threads": 1, "optim__max_logit_scale": LIMIT}
    settings |= {"optim__lr": 0.01, "optim__warmup": 0}
    for stage in stages:
        found[stage] = []
        places = (folder / "store", folder / f"run_{stage}", folder / f"stage_{stage}.json")
        train_here(rank, world_size, training_flags(*places, **settings))
    return found


@pytest.mark.slow
def test_forward_uses_the_fp32_master_and_the_limit_holds_on_it(world):
    stages = ["1", "2", "3", "sharded", "offloaded"]
    for found in run_on_ranks(used_and_master, 2, world, stages, timeout_s=300):
        assert list(found) == stages
        for steps in found.values():
            assert len(steps) == 5
            for used, master in steps:
                assert used == pytest.approx(math.exp(master), rel=1e-6)
            # Its logarithm, 2.66, is a multiple of a 64th in bfloat16: a copy would be wrong in the third digit.
            copies = [torch.tensor(master).bfloat16().float().exp().item() for _, master in steps]
            assert max(abs(copy - used) for copy, (used, _) in zip(copies, steps, strict=True)) > 0.01
            assert steps[1][1] == pytest.approx(math.log(LIMIT), abs=1e-6)
            assert all(master <= math.log(LIMIT) + 1e-6 for _, master in steps[1:])
            assert len({master for _, master in steps}) > 2


def start_at_stage_0(rank: int, world_size: int, folder: Path) -> str:
    with pytest.raises(ValueError, match="ZeRO stage 0") as refused:
        used_and_master(rank, world_size, folder, ["0"])
    return str(refused.value)


@pytest.mark.slow
def test_16_bit_weights_at_stage_0_are_refused(world):
    assert "use stage 1, or torch_autocast" in run_on_ranks(start_at_stage_0, 1, world)[0]
