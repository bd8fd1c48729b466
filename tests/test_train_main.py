"""The trainer through its real command: the same numbers as plain PyTorch, exact resume, and mistakes named in one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from open_clip.loss import ClipLoss

from tests.ranks import run_on_ranks
from tests.tiny_world import (
    deepspeed,
    program,
    python,
    tiny_store,
    tiny_table,
    train_here,
    training_flags,
    write_stages,
)
from train.data.augment import AugmentConfig
from train.data.loader import DataConfig, StepDataset
from train.main import parse_config
from train.models.model import ModelConfig, TwoTowers, build_model, build_tokenizer, load_model
from train.recipes import RECIPES
from train.schedule import OptimConfig, learning_rate, parameter_groups


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    store = tiny_store(folder)
    tiny_table(folder / "pairs", store)
    return folder


@pytest.fixture(scope="module")
def fp32_config(tmp_path_factory):
    path = tmp_path_factory.mktemp("ds") / "fp32.json"
    path.write_text('{"zero_optimization": {"stage": 1}}', encoding="utf-8")
    return path


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in metrics(run)]


def plain_pytorch_losses(store: Path, num_steps: int) -> tuple[list[float], torch.nn.Module]:
    """The same run written down with torch and open_clip alone, in one process."""
    recipe = RECIPES["pocket-pretrain"]()
    torch.manual_seed(0)
    model, preprocess = build_model(ModelConfig(name="pocket-rn"))
    towers, optim = TwoTowers(model, preprocess), recipe["optim"]
    dataset = StepDataset(
        DataConfig(store=str(store)),
        recipe["augment"],
        batch_size=16,
        seed=0,
        rank=0,
        world_size=1,
        image_size=(64, 64),
        tokenizer=build_tokenizer("pocket-rn"),
    )
    groups = parameter_groups(towers.named_parameters(), optim.wd)
    optimizer = torch.optim.AdamW(groups, betas=(optim.beta1, optim.beta2), eps=optim.eps)
    values = []
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(optim, step, num_steps)
        batch = dataset[step]
        image_features, text_features, scale = towers(batch.image_BCHW, batch.text_BL)
        loss = ClipLoss()(image_features, text_features, scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    return values, model


@pytest.mark.slow
def test_one_deepspeed_rank_trains_like_plain_pytorch(world, fp32_config, tmp_path):
    flags = training_flags(world / "store", tmp_path / "run", fp32_config, max_steps=6)
    program(*python("train/main.py", "pocket-pretrain", *flags))
    expected, model = plain_pytorch_losses(world / "store", 6)
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=2e-4)
    trained = load_model(tmp_path / "run").model.state_dict()
    for name, parameter in model.named_parameters():
        assert torch.allclose(trained[name], parameter, atol=3e-4), name


@pytest.mark.slow
def test_two_ranks_resume_to_the_same_losses_and_weights(world, tmp_path):
    def flags(name: str, **more: object) -> list[str]:
        return training_flags(
            world / "store",
            tmp_path / name,
            data__pairs=world / "pairs",
            batch_size=18,
            save_every_steps=4,
            max_steps=8,
            **more,
        )

    program(*deepspeed(2, "train/main.py", "pocket-refine", *flags("whole")))
    # The first half is taken from the whole run, as if it had been killed after its first checkpoint.
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step_8")
    (tmp_path / "cut" / "checkpoints" / ".step_8.tmp").mkdir()
    done = program(*deepspeed(2, "train/main.py", "pocket-refine", *flags("cut")))
    assert "going on from" in done.stderr
    assert [row["step"] for row in metrics(tmp_path / "cut")] == list(range(1, 9))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    whole, cut = (load_model(tmp_path / name).model.state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert {row["margin"] > 0 for row in metrics(tmp_path / "whole")} == {True}


def train_at_stages(rank: int, world_size: int, folder: Path, flags: list[str]) -> None:
    """Train the same few steps at every ZeRO stage, in this process of an existing group."""
    for stage in range(4):
        places = ["--ds_config", str(folder / f"stage_{stage}.json"), "--out", str(folder / f"run_{stage}")]
        train_here(rank, world_size, [*flags, *places])


@pytest.mark.slow
def test_every_zero_stage_trains_alike(world, tmp_path):
    write_stages(tmp_path)
    run_on_ranks(train_at_stages, 2, tmp_path, training_flags(world / "store", "-", "-", max_steps=4), timeout_s=300)
    plain, model = plain_pytorch_losses(world / "store", 4)
    first = load_model(tmp_path / "run_0").model.state_dict()
    for stage in range(4):
        # BatchNorm sees half a batch on each of two ranks, so the single process is near but not equal.
        assert losses(tmp_path / f"run_{stage}") == pytest.approx(plain, rel=0.1)
        assert losses(tmp_path / f"run_{stage}") == pytest.approx(losses(tmp_path / "run_0"), rel=1e-4)
        weights = load_model(tmp_path / f"run_{stage}").model.state_dict()
        assert weights.keys() == model.state_dict().keys()
        assert all(torch.allclose(weights[name], first[name], atol=3e-4) for name in first)


@pytest.mark.slow
def test_the_logit_scale_is_held_below_its_limit(world, tmp_path):
    flags = training_flags(world / "store", tmp_path / "run", max_steps=4, optim__max_logit_scale=14.0)
    program(*python("train/main.py", "pocket-pretrain", *flags))
    # The model starts at 1 / 0.07 = 14.3; from the second step on the forward pass sees the clamped value.
    assert [row["logit_scale"] <= 14.0001 for row in metrics(tmp_path / "run")] == [False, True, True, True]


@pytest.mark.slow
def test_a_run_folder_of_other_settings_is_refused(world, tmp_path):
    flags = training_flags(world / "store", tmp_path / "run", max_steps=1)
    program(*python("train/main.py", "pocket-pretrain", *flags))
    config = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert config["recipe"] == "pocket-pretrain"
    assert config["config"]["optim"]["lr"] == 1e-3
    assert config["deepspeed"]["train_batch_size"] == 16
    # A finished run is left as it is.
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    program(*python("train/main.py", "pocket-pretrain", *flags))
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    done = program(*python("train/main.py", "pocket-pretrain", *flags, "--seed", "5"), check=False)
    assert done.returncode == 2
    assert "was started with seed=0, now it is 5" in error_line(done)


def error_line(done) -> str:
    """The one line that a user's mistake gets; nothing of a traceback beside it."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(lines) == 1, done.stderr
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pocket-pretrian"], "unknown recipe 'pocket-pretrian'; did you mean pocket-pretrain?"),
        (["pocket-pretrain", "--modle.name", "x"], "does not know --modle.name; did you mean --model.name?"),
        (["pocket-pretrain"], "--ds_config is missing"),
        (["pocket-pretrain", "--ds_config", "ds_configs/cpu.json"], "--out is missing"),
        (["pocket-pretrain", "--ds_config", "ds_configs/cpu.json", "--out", "x"], "--data.store is missing"),
        (
            ["pocket-pretrain", "--ds_config", "ds_configs/none.json", "--out", "x", "--data.store", "y"],
            "ds_configs/none.json is no file",
        ),
        (
            ["pocket-pretrain", "--ds_config", "ds_configs/cpu.json", "--out", "x", "--data.store", "nowhere"],
            "nowhere",
        ),
        (
            ["pocket-refine", "--ds_config", "ds_configs/cpu.json", "--out", "x", "--data.store", "y"]
            + ["--data.hard_per_anchor", "0"],
            "loss.margin_weight",
        ),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(arguments, message, tmp_path):
    assert message in error_line(program(*python("train/main.py", *arguments), check=False))


def test_a_misspelt_deepspeed_key_is_refused_before_any_work(world, tmp_path):
    config = tmp_path / "typo.json"
    config.write_text('{"zero_optimisation": {"stage": 2}}', encoding="utf-8")
    flags = training_flags(world / "store", tmp_path / "run", config)
    line = error_line(program(*python("train/main.py", "pocket-pretrain", *flags), check=False))
    assert "typo.json: unknown key zero_optimisation, did you mean zero_optimization?" in line
    assert not (tmp_path / "run").exists()


def test_more_accelerators_than_there_are_is_named(world, tmp_path):
    flags = training_flags(world / "store", tmp_path / "run", device="cuda")
    line = error_line(
        program(*python("train/main.py", "pocket-pretrain", *flags), check=False, CUDA_VISIBLE_DEVICES="")
    )
    assert "rank 0 wants GPU 0, this machine has 0" in line


@pytest.mark.slow
def test_a_mistake_under_the_launcher_is_said_once_and_ends_the_job(world, tmp_path):
    other = tmp_path / "other"
    tiny_table(other / "pairs", tiny_store(other, num_hues=6))
    flags = training_flags(world / "store", tmp_path / "run", data__pairs=other / "pairs", batch_size=18)
    done = program(*deepspeed(2, "train/main.py", "pocket-refine", *flags), check=False)
    assert "mined from a store with fingerprint" in error_line(done)


def test_help_lists_the_recipes_and_their_flags():
    assert all(name in program(*python("train/main.py", "--help")).stdout for name in RECIPES)
    flags = program(*python("train/main.py", "pocket-refine", "--help")).stdout
    for flag in ("--ds-config", "--model.name", "--data.hard-per-anchor", "--loss.margin-weight", "--optim.lr"):
        assert flag in flags


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_are_complete(recipe):
    config = parse_config(recipe, ["--ds_config", "a.json", "--out", "b", "--data.store", "c", "--data.pairs", "d"])
    assert isinstance(config.optim, OptimConfig)
    assert isinstance(config.augment, AugmentConfig)
    assert config.batch_size % (1 + config.data.hard_per_anchor) == 0
