"""In which precision the losses compute: dtype of sums, no autocast, and products on bfloat16 units with float32 sums
where that rounds nothing (operands that bfloat16 holds exactly)."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of sums over rows of `dtype`, and of what a loss returns for them."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@contextmanager
def bfloat16_units(wanted: bool = True) -> Iterator[None]:
    """Lets float32 products use bfloat16 units, about twice as fast on CPUs that have them; restored on leaving."""
    before = torch.get_float32_matmul_precision()
    if wanted:
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def without_autocast(function):
    """Run `function`, whose first tensor argument names the device, as if no autocast were on: logits in bfloat16 are
    4 % wrong."""

    @functools.wraps(function)
    def call(*args, **keywords):
        device_type = next(
            value for value in (*args, *keywords.values()) if isinstance(value, torch.Tensor)
        ).device.type
        with torch.autocast(device_type, enabled=False):
            return function(*args, **keywords)

    return call
