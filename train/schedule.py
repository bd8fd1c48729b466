"""The optimizer's schedule: the learning rate of a step, and which parameters decay."""

import math
from collections.abc import Iterable
from typing import Any

import torch

from train.config import OptimConfig


def learning_rate(config: OptimConfig, step: int, num_steps: int) -> float:
    """Learning rate of step 0 <= step < num_steps: linear warm-up, then a half cosine to lr_end (as in open_clip)."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, num_steps - config.warmup)
    return config.lr_end + (config.lr - config.lr_end) * 0.5 * (1 + math.cos(math.pi * progress))


def parameter_groups(named_parameters: Iterable[tuple[str, torch.nn.Parameter]], wd: float) -> list[dict[str, Any]]:
    """Two groups, decaying and not: vectors and scalars (gains, biases, scales, class tokens) do not decay, as in open_clip."""
    decaying, fixed = [], []
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            no_decay = parameter.ndim < 2 or "bn" in name or "ln" in name or "bias" in name or "logit_scale" in name
            (fixed if no_decay else decaying).append(parameter)
    return [{"params": decaying, "weight_decay": wd}, {"params": fixed, "weight_decay": 0.0}]
