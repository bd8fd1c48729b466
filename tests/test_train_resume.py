"""Going on from a checkpoint: byte-equal with the same ranks and ZeRO stage, the same pairs and losses to reduction order with others, and
under random kills."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.ranks import run_on_ranks
from tests.tiny_world import TINY_VIT, program, python, tiny_store, train_here, training_flags
from train.data.replaced import ReplacedPictures

REGIMES = {
    "stage_0": {"zero_optimization": {"stage": 0}},
    "stage_1": {"zero_optimization": {"stage": 1}},
    "stage_3": {"zero_optimization": {"stage": 3}},
    # 16-bit weights are made from the restored masters.
    "bf16_stage_2": {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}},
    "bf16_stage_3": {
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 200},
        "bf16": {"enabled": True},
    },
}
# Written by the first, gone on with by the second.
CHANGES = [("stage_0", "stage_3"), ("stage_3", "stage_1"), ("stage_1", "stage_0"), ("bf16_stage_2", "bf16_stage_3")]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    tiny_store(folder, num_hues=12)
    (folder / "tiny-vit.json").write_text(json.dumps(TINY_VIT), encoding="utf-8")
    dropping = {**TINY_VIT, "vision_cfg": {**TINY_VIT["vision_cfg"], "patch_dropout": 0.25}}
    (folder / "tiny-vit-dropping.json").write_text(json.dumps(dropping), encoding="utf-8")
    for name, regime in REGIMES.items():
        (folder / f"{name}.json").write_text(json.dumps(regime), encoding="utf-8")
    return folder


def cut_copy(run: Path, step: int, copy: Path) -> Path:
    """The run as it would be, had it been killed right after the checkpoint of `step`."""
    shutil.copytree(run, copy)
    for folder in (copy / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step_")) > step:
            shutil.rmtree(folder)
    shutil.rmtree(copy / "export")
    return copy


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def train_in_turn(rank: int, world_size: int, world: Path, plan: list[dict]) -> list[dict[int, list[int]]]:
    """The trainings of `plan` one after the other in this process; for each, this rank's pair ids by step."""
    from train import loop
    from train.distributed import barrier
    from train.models.clip_library import open_clip

    open_clip.add_model_config(world)
    original, ids = loop.train_step, []

    def noting_train_step(engine, config, batch, *rest):
        ids[-1][engine.engine.global_steps + 1] = batch.pair_ids_B.tolist()
        return original(engine, config, batch, *rest)

    loop.train_step = noting_train_step
    for entry in plan:
        ids.append({})
        if "cut" in entry and rank == 0:
            cut_copy(entry["cut"], 2, entry["out"])
        barrier()
        flags = {"threads": 1, "save_every_steps": 2, "keep_checkpoints": 9, "optim__warmup": 0, **entry["flags"]}
        train_here(
            rank, world_size, training_flags(world / "store", entry["out"], world / f"{entry['regime']}.json", **flags)
        )
    return ids


@pytest.mark.slow
def test_every_regime_goes_on_byte_equal_and_takes_over_the_checkpoints_of_others(world, tmp_path):
    flags = {"model__name": "tiny-vit-dropping", "max_steps": 3}
    plan = [{"out": tmp_path / name, "regime": name, "flags": flags} for name in REGIMES]
    goes_on = [(name, name) for name in REGIMES] + CHANGES
    for then, now in goes_on:
        plan.append({"out": tmp_path / f"{then}-{now}", "cut": tmp_path / then, "regime": now, "flags": flags})
    run_on_ranks(train_in_turn, 2, world, plan, timeout_s=400)
    for then, now in goes_on:
        whole, run = tmp_path / then, tmp_path / f"{then}-{now}"
        if then != now:
            rounding = 1e-2 if then.startswith("bf16") else 1e-5
            assert losses(run) == pytest.approx(losses(whole), rel=rounding), (then, now)
            continue
        assert losses(run) == losses(whole), then
        for rank in range(2):
            # Masters, moments and random state.
            file = f"checkpoints/step_3/state_rank{rank:05d}.safetensors"
            assert (run / file).read_bytes() == (whole / file).read_bytes(), then
        exported = "export/open_clip_model.safetensors"
        assert (run / exported).read_bytes() == (whole / exported).read_bytes()


@pytest.mark.slow
def test_a_run_goes_on_on_four_ranks_and_then_on_two_with_the_same_pairs_and_losses(world, tmp_path):
    flags = {"model__name": "tiny-vit", "max_steps": 6}
    whole = {"out": tmp_path / "one", "regime": "stage_1", "flags": flags}
    ((expected,),) = run_on_ranks(train_in_turn, 1, world, [whole])
    four = {"out": cut_copy(tmp_path / "one", 2, tmp_path / "four"), "regime": "stage_3", "flags": flags}
    of_four = run_on_ranks(train_in_turn, 4, world, [four], timeout_s=300)
    # Two ranks, another stage, and half of a rank's rows at a time.
    two = {"out": cut_copy(tmp_path / "four", 4, tmp_path / "two"), "regime": "stage_0"}
    of_two = run_on_ranks(train_in_turn, 2, world, [{**two, "flags": {**flags, "micro_batch_size": 4}}], timeout_s=300)
    for results, steps in ((of_four, (3, 4, 5, 6)), (of_two, (5, 6))):
        for step in steps:
            assert [pair_id for (ids,) in results for pair_id in ids[step]] == expected[step]
        assert all(ids.keys() == set(steps) for (ids,) in results)
    assert len(losses(tmp_path / "two")) == 6
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=2e-5)
    weights = [load_file(tmp_path / name / "export" / "open_clip_model.safetensors") for name in ("one", "two")]
    halfway = load_file(tmp_path / "one" / "checkpoints" / "step_2" / "open_clip_model.safetensors")
    moved = max((weights[0][name] - halfway[name]).abs().max().item() for name in halfway)
    assert moved > 1e-3
    for name, weight in weights[0].items():
        assert torch.allclose(weights[1][name], weight, atol=1e-4), name


@pytest.mark.slow
def test_five_random_kills_leave_no_trace():
    done = program(*python("-m", "tests.stress", "--kills", "5", "--steps", "12", "--kinds", "pairs"), timeout=900)
    assert "5 kills in" in done.stdout
    assert " 0 differ" in done.stdout


def test_pictures_replaced_after_the_checkpoint_are_named_once(tmp_path):
    path = tmp_path / "undecodable_rank1.tsv"
    path.write_text("2\ta.tar/7: torn\n4\tb.tar/9: torn\n5\tc.tar/1: torn\n6\tc.t", encoding="utf-8")
    ReplacedPictures(tmp_path, 1, first_step=4)
    assert path.read_text(encoding="utf-8") == "2\ta.tar/7: torn\n4\tb.tar/9: torn\n"
