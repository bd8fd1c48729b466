"""Reproducing a run: what differs is named with its remedy, and its first steps come out the same to the last bit."""

import json
import math
import re
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.ranks import run_on_ranks
from tests.tiny_world import program_environment, tiny_store, train_here, training_flags
from train.config import AugmentConfig, TrainConfig
from train.records.run_manifest import ROOT, code_state, command, package_versions, read_starts
from train.reproduce import compare, config_from_json, differences, main, read_manifest


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of three steps."""
    folder = tmp_path_factory.mktemp("reproduce")
    store = tiny_store(folder, num_hues=8)
    flags = training_flags(store.path, folder / "run", max_steps=3, trackers="", threads=1)
    run_on_ranks(train_here, 1, [flag for flag in flags if flag])
    return folder / "run"


@pytest.mark.slow
def test_the_manifest_says_what_the_run_was_made_of(run):
    manifest = json.loads((run / "config.json").read_text(encoding="utf-8"))
    store = json.loads((run.parent / "store" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["store_fingerprint"] == store["fingerprint"]
    assert manifest["versions"]["torch"].startswith("2.")
    assert re.fullmatch("[0-9a-f]{40}", manifest["commit"])
    assert manifest["seeds"]["data_order"] == 0
    assert manifest["deepspeed"]["gradient_accumulation_steps"] == 1
    assert manifest["pair_flop"] > 1e6
    (start,) = read_starts(run)
    assert (start["step"], start["world_size"], start["commit"]) == (0, 1, manifest["commit"])
    assert not (run / "tensorboard").exists(), "--trackers alone: nowhere"


def test_the_command_is_without_what_a_launcher_adds(monkeypatch):
    program = str(ROOT / "train" / "main.py")
    monkeypatch.setattr(sys, "argv", [program, "--local_rank=1", "pocket-pretrain", "--out", "x"])
    assert command() == ["train/main.py", "pocket-pretrain", "--out", "x"]


@pytest.mark.slow
def test_first_steps_come_out_equal_to_the_last_bit_and_another_loss_is_found(run, capsys, monkeypatch):
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    edited = {**json.loads(lines[1]), "loss": 3.0}
    (run / "metrics.jsonl").write_text("\n".join([lines[0], json.dumps(edited), lines[2]]) + "\n", encoding="utf-8")
    for name, value in program_environment().items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        main([str(run), "--check", "2"])
    printed = capsys.readouterr().out
    assert ended.value.code == 1
    assert "nothing differs" in printed
    assert re.search(r"^ +1 +\S+ +\S+ +0\.0e\+00$", printed, re.MULTILINE)
    assert "not reproduced: largest relative difference" in printed
    assert sorted(path.name for path in run.parent.iterdir()) == ["run", "shards", "store"]


def manifest_of(folder: Path, **changes) -> dict:
    """A manifest of a run that differs in nothing from today, but for `changes`."""
    (folder / "ds.json").write_text('{"zero_optimization": {"stage": 1}}', encoding="utf-8")
    (folder / "store").mkdir()
    (folder / "store" / "manifest.json").write_text('{"fingerprint": "aaaa"}', encoding="utf-8")
    return {
        "config": {"ds_config": str(folder / "ds.json"), "data": {"store": str(folder / "store"), "pairs": ""}},
        # What the JSON has, and what the engine adds to it.
        "deepspeed": {"zero_optimization": {"stage": 1}, "train_batch_size": 16, "timers": {}},
        "store_fingerprint": "aaaa",
        "versions": package_versions(),
        "starts": [],
        **code_state(),
        **changes,
    }


def test_nothing_differs_from_today(tmp_path):
    assert differences(manifest_of(tmp_path)) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"starts": [{"commit": "b" * 40}]}, "commit bbbbbbbbbbbb, now .*git checkout bbbb"),
        ({"diff_sha256": "c"}, "changes that were not committed"),
        ({"versions": {"torch": "1.0"}}, r"torch 1\.0, now .*; pip install torch==1\.0"),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, r'ds\.json is not what the run used.*"stage": 3'),
        ({"store_fingerprint": "dddd"}, "data.store .* has the fingerprint aaaa, the run's had dddd"),
    ],
)
def test_each_difference_is_named_with_its_remedy(tmp_path, changes, message):
    found = differences(manifest_of(tmp_path, **changes))
    assert any(re.search(message, line) for line in found), found


def test_a_config_comes_back_from_its_json_as_it_was():
    config = TrainConfig(augment=AugmentConfig(scale=(0.3, 0.7)), seed=5, trackers=("wandb",))
    assert config_from_json(TrainConfig, json.loads(json.dumps(asdict(config)))) == config
    with pytest.raises(ValueError, match="does not know: colour; use its commit"):
        config_from_json(AugmentConfig, {"colour": 1})


@pytest.mark.parametrize(
    ("again", "tolerance", "agrees"),
    [(2.0, 0.0, True), (2.0 + 1e-9, 0.0, False), (2.0 + 1e-9, 1e-8, True), (math.nan, 0.1, False)],
)
def test_losses_agree_within_the_tolerance(again, tolerance, agrees):
    assert compare({1: 3.0, 2: 2.0}, {1: 3.0, 2: again}, [1, 2], tolerance) is agrees
    assert compare({1: 3.0, 2: 2.0}, {1: again, 2: 2.0}, [2], tolerance)


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json, so it is no run folder"):
        read_manifest(tmp_path)
