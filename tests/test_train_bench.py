"""The trainer's benchmark: every contender runs, figures are those of the rounds, mistakes are named."""

import json
import os

import pytest
import torch

from tests.ranks import run_on_ranks
from train.bench.__main__ import BenchConfig, describe, main, make_report, part_report
from train.bench.recipe_cost import ALL, chosen_recipes, compared, describe_recipes
from train.config import ModelConfig, ObjectiveConfig
from train.ingest import bench as ingest_bench
from train.models.model import build_model
from train.recipes import RECIPES


def test_ratios_are_of_medians_and_of_rounds():
    rates = {"ours": [100.0, 120.0, 90.0], "bare_loop": [110.0, 100.0, 100.0]}
    found = part_report(rates, "bare_loop", {"step_ms": 1.0}, 50)
    assert found["ratio_of_medians"] == pytest.approx(1.0)
    # 0.909, 1.2, 0.9
    assert found["median_of_ratios"] == pytest.approx(100 / 110)
    assert found["median_step_ms"] == {"ours": 500.0, "bare_loop": 500.0}
    assert found["beside"] == {}
    # 2, 1.2, 0.9
    third = part_report({**rates, "bare_deepspeed": [50.0, 100.0, 100.0]}, "bare_loop", {}, 50)["beside"]
    assert third == {"bare_deepspeed": {"ratio_of_medians": pytest.approx(1.0), "median_of_ratios": pytest.approx(1.2)}}


def test_the_report_has_no_paths_and_its_text_names_both():
    where = {"step_ms": 10.0, "forward_ms": 4.0, "slowest_data_wait_ms": 9.0}
    rounds = {"memory": {"ours": [99.0], "bare_loop": [100.0], "bare_deepspeed": [90.0]}}
    report = make_report(rounds, {"memory": where}, BenchConfig(shards=("/secret/a.tar",)))
    assert "/secret" not in json.dumps(report)
    text = describe(report)
    assert "ours / bare_loop: 0.990 (median of rounds 0.990)" in text
    assert "ours / bare_deepspeed: 1.100 (median of rounds 1.100)" in text
    assert "our step, ms: step 10.0, forward 4.0\n" in text + "\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-size", "7"], "--batch-size 7 must be a multiple of --ranks 2"),
        (["--rounds", "0"], "--rounds 0 must be at least 1"),
        (
            ["--recipes", "pocket-pretrain", "pocket-sleep"],
            "--recipes pocket-sleep is no recipe; take all, or some of: pocket-pretrain",
        ),
    ],
)
def test_senseless_sizes_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        main(flags)


@pytest.mark.slow
def test_every_contender_trains_on_one_rank(tmp_path, monkeypatch):
    """In this process, a group of its own: what several ranks do is each the same."""
    from train.bench import contenders

    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    made = ingest_bench.BenchConfig(num_pairs=24, pairs_per_shard=12, side=32)
    settings = {
        **{
            "parts": ["memory", "tars", "checkpoint"],
            "model": "pocket-rn",
            "ds_config": "ds_configs/cpu.json",
            "device": "cpu",
        },
        **{"threads": 1, "batch_size": 8, "steps": 2, "rounds": 1, "workers": 0},
        **{"folder": str(tmp_path), "shards": [str(ingest_bench.make_tars(tmp_path / "tars", made))]},
    }
    (tmp_path / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    contenders.main(str(tmp_path / "settings.json"), str(tmp_path / "result.json"))
    found = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert {part: sorted(rates) for part, rates in found["rounds"].items()} == {
        "memory": ["bare_deepspeed", "bare_loop", "ours"],
        "tars": ["open_clip", "ours"],
    }
    assert all(rate > 0 for rates in found["rounds"].values() for rounds in rates.values() for rate in rounds)
    saved = found["checkpoint"]
    assert 0 < saved["stall_ms"] < saved["stall_ms"] + saved["write_ms"]
    assert saved["stall_steps"] == pytest.approx(saved["stall_ms"] / saved["step_ms"])
    # Weights and two moments of 2.8 million parameters, and little else.
    assert saved["state_mib"] == pytest.approx(12 * 2_827_033 / 2**20, rel=0.02)
    for where in found["ours_ms_a_step"].values():
        parts = [ms for name, ms in where.items() if name not in ("step_ms", "slowest_data_wait_ms")]
        assert sum(parts) == pytest.approx(where["step_ms"], rel=0.05)


def test_recipes_are_compared_with_the_first_by_their_medians():
    passes = {"image_passes": 1, "text_passes": 1, "objective": "clip"}
    found = {
        "plain": {**passes, "pairs_per_s": [90.0, 100.0, 500.0], "memory_mib": [50.0, 40.0, 60.0]},
        "other": {**passes, "pairs_per_s": [10.0, 25.0, 30.0], "memory_mib": [100.0, 110.0, 75.0]},
    }
    rows = compared(found)
    assert [row["pairs_per_s_of_first"] for row in rows.values()] == [1.0, 0.25]
    assert [row["memory_mib_of_first"] for row in rows.values()] == [1.0, 2.0]
    assert describe_recipes(rows).splitlines()[2].split() == [
        "other",
        "clip",
        "1",
        "/",
        "1",
        "25",
        "0.25",
        "100",
        "2.00",
    ]


def test_all_recipes_are_one_of_each_method_behind_clips():
    assert chosen_recipes(["all"]) == ALL
    objectives = [RECIPES[name]().get("objective", ObjectiveConfig()).name for name in ALL]
    assert objectives == ["clip", "clip", "slip", "cl2l", "siamlip", "byolip", "barlip", "swalip", "declip"]
    assert RECIPES[ALL[1]]()["loss"].kind == "sigmoid"


def figures_of(rank: int, world_size: int, settings: dict) -> dict:
    from train.bench.recipe_cost import step_figures
    from train.distributed import Ranks

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), DS_ACCELERATOR="cpu")
    return step_figures(settings, Ranks(rank, world_size, rank, torch.device("cpu")))


@pytest.mark.slow
def test_a_recipes_cost_counts_the_passes_of_its_views_and_of_its_teacher():
    """BYOLIP: a weak and two strong views of both towers, each through the trained model and its average (published: 6 and 6)."""
    settings = {"recipe": "pocket-byolip", "ds_config": "ds_configs/cpu.json", "device": "cpu", "threads": 1}
    [found] = run_on_ranks(figures_of, 1, {**settings, "batch_size": 4, "steps": 1})
    assert (found["objective"], found["image_passes"], found["text_passes"]) == ("byolip", 6, 6)
    assert found["pairs_per_s"] > 0
    # Weights, gradients, two moments and the average, fp32, are less than what the steps were measured to take.
    num_weights = sum(weight.numel() for weight in build_model(ModelConfig("pocket-rn"))[0].parameters())
    assert found["memory_mib"] * 2**20 > 5 * 4 * num_weights
