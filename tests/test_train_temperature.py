"""The temperature under 16-bit weights: forward uses the fp32 master, and the limit holds on the master."""

import json
import math
from pathlib import Path

import pytest
import torch

from tests.ranks import run_on_ranks
from tests.tiny_world import TINY_VIT, tiny_store, train_here, training_flags, write_stages

LIMIT = 14.2


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    tiny_store(folder, num_hues=12)
    (folder / "tiny-vit.json").write_text(json.dumps(TINY_VIT), encoding="utf-8")
    write_stages(folder, bf16={"enabled": True})
    return folder


def used_and_master(
    rank: int, world_size: int, folder: Path, stages: list[int]
) -> dict[int, list[tuple[float, float]]]:
    """For each stage and step the scale that forward used and the fp32 master before it."""
    from deepspeed.utils import safe_get_full_fp32_param

    from train.clip_library import open_clip
    from train.engine import Engine

    open_clip.add_model_config(folder)
    original, found = Engine.forward, {}

    def forward(self, *args):
        master = safe_get_full_fp32_param(self.module.clip.logit_scale).item()
        features = original(self, *args)
        found[self.stage].append((features[2].item(), master))
        return features

    Engine.forward = forward
    settings = {"model__name": "tiny-vit", "max_steps": 5, "threads": 1, "optim__max_logit_scale": LIMIT}
    settings |= {"optim__lr": 0.01, "optim__warmup": 0}
    for stage in stages:
        found[stage] = []
        places = (folder / "store", folder / f"run_{stage}", folder / f"stage_{stage}.json")
        train_here(rank, world_size, training_flags(*places, **settings))
    return found


@pytest.mark.slow
def test_forward_uses_the_fp32_master_and_the_limit_holds_on_it(world):
    for found in run_on_ranks(used_and_master, 2, world, [1, 2, 3], timeout_s=300):
        assert found.keys() == {1, 2, 3}
        for steps in found.values():
            assert len(steps) == 5
            for used, master in steps:
                assert used == pytest.approx(math.exp(master), rel=1e-6)
            # Its logarithm, 2.66, is a multiple of a 64th in bfloat16: a copy would be wrong in the third digit.
            copies = [torch.tensor(master).bfloat16().float().exp().item() for _, master in steps]
            assert max(abs(copy - used) for copy, (used, _) in zip(copies, steps, strict=True)) > 0.01
            assert all(master <= math.log(LIMIT) + 1e-6 for _, master in steps[1:])
            assert len({master for _, master in steps}) > 2


def start_at_stage_0(rank: int, world_size: int, folder: Path) -> str:
    with pytest.raises(ValueError, match="ZeRO stage 0") as refused:
        used_and_master(rank, world_size, folder, [0])
    return str(refused.value)


@pytest.mark.slow
def test_16_bit_weights_at_stage_0_are_refused(world):
    assert "use stage 1, or torch_autocast" in run_on_ranks(start_at_stage_0, 1, world)[0]
