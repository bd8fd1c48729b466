"""Heads beside the exported model: written, taken over by their own objective, left by others, refused in other shapes."""

import json
from dataclasses import replace

import pytest
import torch

from train.config import ObjectiveConfig, TrainConfig
from train.models.model import CONFIG_FILE, WEIGHTS_FILE
from train.objectives import build_objective
from train.objectives.files import SETTINGS_FILE, save_objective, take_over_heads
from train.objectives.objective import Objective, TowerWidths

ROCKET = ObjectiveConfig(name="cl2l", head_width=8, head_dim=4)


def objective_of(config: ObjectiveConfig, seed: int) -> Objective:
    torch.manual_seed(seed)
    return build_objective(TrainConfig(objective=config), TowerWidths(6, 5, 3))


@pytest.fixture
def folder(tmp_path):
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (tmp_path / name).write_text("{}", encoding="utf-8")
    save_objective(tmp_path, ROCKET, objective_of(ROCKET, 0).state_dict())
    return tmp_path


def test_the_same_objective_takes_its_heads_over(folder):
    objective, saved = objective_of(ROCKET, 1), objective_of(ROCKET, 0).state_dict()
    said = take_over_heads(str(folder), objective, ROCKET)
    assert said == f"the heads of cl2l are those of {folder} ({len(saved)} tensors)"
    assert all(torch.equal(objective.state_dict()[name], tensor) for name, tensor in saved.items())
    assert json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))["head_dim"] == 4


def test_another_objective_leaves_them(folder):
    slip = replace(ROCKET, name="slip")
    objective = objective_of(slip, 1)
    before = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
    said = take_over_heads(str(folder), objective, slip)
    assert said == f"the heads of cl2l in {folder} are left there; the heads of slip are new"
    assert all(torch.equal(objective.state_dict()[name], tensor) for name, tensor in before.items())
    assert take_over_heads(str(folder), None, ObjectiveConfig()) == f"the heads of cl2l in {folder} are left there"


def test_heads_of_other_widths_are_refused_with_the_remedy(folder):
    wider = replace(ROCKET, head_width=16)
    with pytest.raises(ValueError, match=r"bn1.bias has shape \[8\] there, \[16\] here; give the --objective flags of"):
        take_over_heads(str(folder), objective_of(wider, 1), wider)


def test_weights_without_heads_say_that_those_are_new(folder):
    (folder / SETTINGS_FILE).unlink()
    assert (
        take_over_heads(str(folder), objective_of(ROCKET, 1), ROCKET) == f"the heads of cl2l are new: {folder} has none"
    )
    assert take_over_heads("laion2b", objective_of(ROCKET, 1), ROCKET) == "the heads of cl2l are new: laion2b has none"
    assert take_over_heads("", objective_of(ROCKET, 1), ROCKET) == ""
