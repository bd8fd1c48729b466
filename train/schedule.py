"""Learning numbers of the optimizer: AdamW's, which parameters decay, and the learning rate of a step."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule (open_clip's names)."""

    lr: float = 5e-4
    """peak learning rate"""
    beta1: float = 0.9
    """AdamW's decay of the first moment"""
    beta2: float = 0.98
    """AdamW's decay of the second moment"""
    eps: float = 1e-6
    """AdamW's epsilon"""
    wd: float = 0.2
    """weight decay; gains, biases and the logit scale do not decay"""
    warmup: int = 10000
    """steps of linear warm-up to lr"""
    lr_end: float = 0.0
    """learning rate that the cosine ends at"""
    grad_clip_norm: float = 0.0
    """clip the global gradient norm to this; 0: no clipping"""
    max_logit_scale: float = 100.0
    """the exponentiated logit scale is held below this"""

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"optim.lr={self.lr} must be positive")
        if self.warmup < 0:
            raise ValueError(f"optim.warmup={self.warmup} must be 0 or more steps")


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
