"""Reproducing a run: what differs is named with its remedy, and its first steps come out the same to the last bit."""

import json
import math
import re
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.tiny_world import program, python, tiny_store, training_flags
from train.config import AugmentConfig, TrainConfig
from train.reproduce import compare, config_from_json, differences, read_manifest
from train.run_manifest import code_state, package_versions


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of three steps, as a user makes it."""
    folder = tmp_path_factory.mktemp("reproduce")
    store = tiny_store(folder, num_hues=8)
    program(*python("train/main.py", "pocket-pretrain", *training_flags(store.path, folder / "run", max_steps=3)))
    return folder / "run"


@pytest.mark.slow
def test_the_manifest_says_what_the_run_was_made_of(run):
    manifest = json.loads((run / "config.json").read_text(encoding="utf-8"))
    store = json.loads((run.parent / "store" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["store_fingerprint"] == store["fingerprint"]
    assert manifest["versions"]["torch"].startswith("2.")
    assert re.fullmatch("[0-9a-f]{40}", manifest["commit"])
    assert manifest["command"][:2] == ["train/main.py", "pocket-pretrain"]
    assert manifest["seeds"]["data_order"] == 0
    assert manifest["deepspeed"]["gradient_accumulation_steps"] == 1
    (start,) = [json.loads(line) for line in (run / "starts.jsonl").read_text(encoding="utf-8").splitlines()]
    assert (start["step"], start["world_size"], start["commit"]) == (0, 1, manifest["commit"])


@pytest.mark.slow
def test_the_first_steps_come_out_equal_to_the_last_bit_and_another_loss_is_found(run):
    done = program(*python("-m", "train.reproduce", str(run), "--check", "2"))
    assert "nothing differs" in done.stdout
    assert "reproduced: equal to the last bit" in done.stdout
    assert not list(run.parent.glob("run-again"))
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    edited = {**json.loads(lines[0]), "loss": 3.0}
    (run / "metrics.jsonl").write_text("\n".join([json.dumps(edited), *lines[1:]]) + "\n", encoding="utf-8")
    done = program(*python("-m", "train.reproduce", str(run), "--check", "1"), check=False)
    assert done.returncode == 1
    assert "not reproduced: largest relative difference" in done.stdout


def manifest_of(folder: Path, **changes) -> dict:
    """A manifest of a run that differs in nothing from today, but for `changes`."""
    (folder / "ds.json").write_text('{"zero_optimization": {"stage": 1}}', encoding="utf-8")
    (folder / "store").mkdir()
    (folder / "store" / "manifest.json").write_text('{"fingerprint": "aaaa"}', encoding="utf-8")
    return {
        "config": {"ds_config": str(folder / "ds.json"), "data": {"store": str(folder / "store"), "pairs": ""}},
        "deepspeed": {"zero_optimization": {"stage": 1}, "train_batch_size": 16},
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
