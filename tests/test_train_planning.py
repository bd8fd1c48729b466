"""The plan of a run: what it says of memory is what a run holds, by counting and by the process's resident memory."""

import ctypes
import gc
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.ranks import run_on_ranks
from tests.tiny_world import TINY_VIT
from train.config import ModelConfig, ObjectiveConfig, TrainConfig
from train.planning.plan import RankPlan, attention, model_size, plan_rank, saved_bytes

# Large enough that what is planned outweighs what a process has besides: 15 M weights, 0.4 GB of activations.
MIDDLE = {
    "embed_dim": 256,
    "vision_cfg": {"image_size": 64, "layers": 3, "width": 448, "head_width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 8192, "width": 448, "heads": 7, "layers": 3},
}
MIB = 2**20
ZERO_1 = {"zero_optimization": {"stage": 1}}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    add_models(folder)
    return folder


def add_models(folder: Path) -> None:
    from train.models.clip_library import open_clip

    for name, model in (("tiny-vit", TINY_VIT), ("middle-vit", MIDDLE)):
        (folder / f"{name}.json").write_text(json.dumps(model), encoding="utf-8")
    open_clip.add_model_config(folder)


def config_of(**fields: object) -> TrainConfig:
    return TrainConfig(**{"model": ModelConfig(name="tiny-vit"), "batch_size": 64, "device": "cpu", **fields})


def test_weights_and_states_of_a_published_model_are_those_of_hand_calculation(models):
    # ViT-B-16 has 149,620,737 weights (open_clip's docs/model_profile.csv: 149.62 M).
    size = model_size(config_of(model=ModelConfig(name="ViT-B-16")), ZERO_1, flash_attention=True)
    assert size.num_trained == 149_620_737
    assert size.embed_dim == 512
    config = config_of(batch_size=4096, device="cuda")
    plan = plan_rank(size, config, ZERO_1, 8)
    share = -(-149_620_737 // 8)
    assert plan.rows == 512
    assert plan.device["weights"] == 4 * 149_620_737 + size.num_buffer_bytes
    assert plan.device["optimizer"] == 12 * share
    # Reduced to its owner and gathered again: 7/8 of 4 bytes a weight, each.
    assert plan.wire["gradients"] == plan.wire["weights"] == int(7 / 8 * 4 * 149_620_737)
    assert plan.wire["features"] == 7 * 512 * 2 * 512 * 4
    alone = plan_rank(size, config, ZERO_1, 1)
    assert sum(alone.wire.values()) == 0
    # Gradients lie in one buffer; with buckets that overlap the backward pass a rank has its share once more, in fp32 again for the step.
    assert plan.device["gradients, in one buffer"] == 4 * 149_620_737
    assert not {"gradients", "reduce buckets", "copies for the optimizer's step"} & plan.device.keys()
    buckets = {"zero_optimization": {"stage": 1, "overlap_comm": True, "reduce_bucket_size": 1000}}
    overlapping = plan_rank(size, config, buckets, 8)
    assert overlapping.device["gradients"] == 4 * 149_620_737 + 4 * share
    assert overlapping.device["reduce buckets"] == 2 * 4000
    stage_0 = plan_rank(size, config, {"zero_optimization": {"stage": 0}}, 8)
    assert stage_0.wire["gradients"] == pytest.approx(2 * plan.wire["gradients"], abs=1)
    assert stage_0.device["optimizer"] == 8 * 149_620_737
    halved = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}, "bf16": {"enabled": True}}
    stage_3 = plan_rank(replace(size, num_small=0), config, halved, 8)
    assert stage_3.device["weights"] == 2 * share
    assert stage_3.wire["weights"] == int(7 / 8 * 2 * 2 * 149_620_737)


def test_micro_batches_divide_activations_and_offload_moves_states_to_the_host(models):
    config = config_of(batch_size=256)
    size = model_size(config, ZERO_1, flash_attention=False)
    whole, cached = (plan_rank(size, replace(config, micro_batch_size=micro), ZERO_1, 2) for micro in (0, 16))
    assert (whole.num_chunks, cached.num_chunks) == (1, 8)
    assert cached.device["activations"] - size.activation_bytes_fixed == (
        (whole.device["activations"] - size.activation_bytes_fixed) // 8
    )
    offload = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    moved = plan_rank(size, config, offload, 2)
    assert moved.host["optimizer"] == whole.device["optimizer"]
    assert "optimizer" not in moved.device
    checkpointed = model_size(
        config_of(model=ModelConfig(name="tiny-vit", grad_checkpointing=True)), ZERO_1, flash_attention=False
    )
    assert checkpointed.activation_bytes_per_row < size.activation_bytes_per_row / 2
    locked = model_size(config_of(model=ModelConfig(name="tiny-vit", lock_image=True)), ZERO_1, flash_attention=False)
    assert locked.num_trained + locked.num_frozen == size.num_trained
    assert locked.activation_bytes_per_row < size.activation_bytes_per_row


@pytest.mark.parametrize("kind", ["fp32", "torch_autocast"])
def test_activations_are_what_autograd_keeps(models, kind):
    from train.models.model import TwoTowers, build_model

    torch.manual_seed(0)
    towers = TwoTowers(*build_model(ModelConfig(name="tiny-vit")))
    kept = {}
    weights = {weight.untyped_storage().data_ptr() for weight in (*towers.parameters(), *towers.buffers())}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with (
        torch.autocast("cpu", torch.bfloat16, enabled=kind == "torch_autocast"),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        features = towers(torch.zeros(6, 3, 32, 32, dtype=torch.uint8), torch.ones(6, 24, dtype=torch.int64))
    assert features[0].shape == (6, 32)
    meta = TwoTowers(*build_model(ModelConfig(name="tiny-vit"), device="meta"))
    planned = saved_bytes(meta, 6, (3, 32, 32), 24, kind).saved
    found = sum(storage.nbytes() for storage in kept.values())
    # torch_autocast keeps 16-bit copies of some weights twice, or once.
    assert planned == (found if kind == "fp32" else pytest.approx(found, rel=0.01))


@pytest.mark.parametrize("objective", ["clip", "slip"])
def test_a_gpus_attention_keeps_less(models, objective):
    from train.models import model
    from train.objectives import towers_and_heads

    modules = (model, towers_and_heads)
    config = config_of(objective=ObjectiveConfig(name=objective, head_width=8, head_dim=4))
    small, large = (
        model_size(config, ZERO_1, flash_attention=flash).activation_bytes_per_row for flash in (True, False)
    )
    assert small < large
    before = [module.attention_for for module in modules]
    with attention(flash=True):
        assert all(module.attention_for is not own for module, own in zip(modules, before, strict=True))
    assert [module.attention_for for module in modules] == before


def resident(name: str) -> int:
    """VmRSS or VmHWM (its high-water mark) of this process, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def held_by_a_run(rank: int, world_size: int, folder: Path, stage: int, micro: int, plan: RankPlan) -> dict[str, float]:
    """Most resident memory above what the process had before its model, MiB; and the optimizer's numbers."""
    from train.data.loader import RankBatch
    from train.distributed import Ranks
    from train.engine import Engine
    from train.loop import train_step
    from train.models.model import TwoTowers, build_model

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), DS_ACCELERATOR="cpu")
    add_models(folder)
    import deepspeed

    # Freed memory goes back at once instead of staying with the process.
    M_MMAP_THRESHOLD = -3
    ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 65536)
    gc.collect()
    before = resident("VmRSS")
    config = config_of(model=ModelConfig(name="middle-vit"), micro_batch_size=micro)
    assert deepspeed.__version__
    ranks = Ranks(rank, world_size, rank, torch.device("cpu"))
    towers = TwoTowers(*build_model(config.model))
    engine = Engine(towers, small_buckets(stage), config.optim, batch_size=config.batch_size, ranks=ranks)
    batch = RankBatch(
        torch.zeros(plan.rows, 3, 64, 64, dtype=torch.uint8),
        torch.ones(plan.rows, 16, dtype=torch.int64),
        torch.arange(plan.rows),
        config.batch_size,
        0,
    )
    # Resets the high-water mark.
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(2):
        train_step(engine, config, batch, 1e-4)
    most = resident("VmHWM") - before
    states = [tensor for state in engine.optimizer.state.values() for tensor in state.values() if tensor.ndim]
    engine.close()
    return {"mib": most / MIB, "moments": sum(state.numel() for state in states)}


def small_buckets(stage: int) -> dict:
    return {"zero_optimization": {"stage": stage, "reduce_bucket_size": 1_000_000, "allgather_bucket_size": 1_000_000}}


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "micro", "fullest"), [(0, 0, "forward"), (1, 4, "forward"), (2, 4, "step")])
def test_resident_memory_is_what_was_planned(models, stage, micro, fullest):
    """To 15 %: pages that the allocator keeps, DeepSpeed's own tables, and one layer's gradients are not in the plan."""
    config = config_of(model=ModelConfig(name="middle-vit"), micro_batch_size=micro)
    ds_config = small_buckets(stage)
    size = model_size(config, ds_config, flash_attention=False)
    plan = plan_rank(size, config, ds_config, 1)
    when, planned = plan.fullest()
    assert when == fullest
    found = run_on_ranks(held_by_a_run, 1, models, stage, micro, plan)[0]
    assert found["moments"] == pytest.approx(2 * size.num_trained, abs=64)
    print(f"stage {stage}, micro-batch {micro}: {found['mib']:.0f} MiB resident, {planned / MIB:.0f} MiB planned")
    assert found["mib"] == pytest.approx(planned / MIB, rel=0.15)


def test_the_program_prints_a_plan_without_data_and_refuses_ranks_without_pairs(models, capsys):
    from train.main import main

    flags = [
        "pocket-pretrain",
        "--ds_config",
        "ds_configs/zero2_offload.json",
        "--device",
        "cpu",
        "--plan",
        "--max_steps",
        "77",
    ]
    main([*flags, "--plan_world_size", "2", "4", "--micro_batch_size", "16"])
    text = capsys.readouterr().out
    rows = {line[:34].strip(): line[34:].split() for line in text.splitlines()}
    assert rows["ranks"] == ["2", "4"]
    assert rows["pairs of a rank"] == ["64", "32"]
    assert rows["micro-batches of them"] == ["4", "2"]
    assert float(rows["optimizer"][0]) == pytest.approx(2 * float(rows["optimizer"][1]), abs=0.001)
    assert "offloaded to the node's memory" in text
    assert "steps: 77" in text
    assert "ZeRO 2, torch_autocast" in text
    with pytest.raises(ValueError, match="plan_world_size=300 must be 1 to batch_size=128 ranks"):
        main([*flags, "--plan_world_size", "300"])
    with pytest.raises(ValueError, match="--ds_config is missing"):
        main(["pocket-pretrain", "--plan"])
