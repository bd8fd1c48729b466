"""Learning rate and parameter groups, against values worked out by hand."""

import math

import pytest
import torch

from train.schedule import OptimConfig, learning_rate, parameter_groups


def test_warm_up_is_linear_and_reaches_the_peak():
    config = OptimConfig(lr=1.0, warmup=4)
    assert [learning_rate(config, step, 20) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_the_cosine_halves_in_the_middle_and_ends_low():
    config = OptimConfig(lr=2.0, warmup=0, lr_end=0.0)
    assert learning_rate(config, 0, 100) == 2.0
    assert learning_rate(config, 50, 100) == pytest.approx(1.0)
    assert learning_rate(config, 99, 100) == pytest.approx(1 - math.cos(math.pi / 100), rel=1e-9)


def test_lr_end_is_the_floor():
    config = OptimConfig(lr=2.0, warmup=0, lr_end=0.5)
    assert learning_rate(config, 50, 100) == pytest.approx(1.25)


def test_a_run_shorter_than_its_warm_up_only_warms_up():
    config = OptimConfig(lr=1.0, warmup=100)
    assert learning_rate(config, 9, 10) == pytest.approx(0.1)


def test_gains_biases_and_scales_do_not_decay():
    names = {
        "visual.conv.weight": 2,
        "visual.bn.weight": 1,
        "fc.bias": 1,
        "logit_scale": 1,
        "ln_final.weight": 1,
        "proj": 2,
    }
    parameters = [(name, torch.nn.Parameter(torch.zeros([2] * ndim))) for name, ndim in names.items()]
    decaying, fixed = parameter_groups(parameters, 0.3)
    assert [id(p) for p in decaying["params"]] == [id(parameters[0][1]), id(parameters[5][1])]
    assert len(fixed["params"]) == 4
    assert (decaying["weight_decay"], fixed["weight_decay"]) == (0.3, 0.0)


def test_frozen_parameters_are_in_no_group():
    frozen = torch.nn.Parameter(torch.zeros(2, 2), requires_grad=False)
    assert all(not group["params"] for group in parameter_groups([("w", frozen)], 0.1))


@pytest.mark.parametrize(("field", "value"), [("lr", 0.0), ("lr", float("nan")), ("warmup", -1)])
def test_senseless_numbers_are_refused(field, value):
    with pytest.raises(ValueError, match=f"optim.{field}"):
        OptimConfig(**{field: value})
