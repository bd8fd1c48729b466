"""Scalars of a loss where its rows are: a Python number would have to wait for a GPU."""

import torch
from torch import Tensor


def device_scalar(value: float | Tensor, device: torch.device) -> Tensor:
    """0-d float64; neither a number nor a tensor, 0-d or [1], makes the host wait."""
    if isinstance(value, Tensor):
        return value.detach().reshape(()).to(device, torch.float64)
    return torch.full((), value, dtype=torch.float64, device=device)


def positive_or_nan(scale: Tensor) -> Tensor:
    """A scale that is not positive shows in the loss, where nobody could look at it before."""
    return torch.where(scale <= 0, torch.nan, scale)


def is_at_hand(value: Tensor) -> bool:
    """Whether the host may look at the numbers without waiting for a device."""
    return value.device.type == "cpu"
