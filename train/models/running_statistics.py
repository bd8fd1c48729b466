"""BatchNorm's running statistics, where rows pass a layer more often than once a step."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def kept_running_statistics(module: torch.nn.Module) -> Iterator[None]:
    """BatchNorm normalises by its batch inside and leaves its running statistics alone: the first pass has updated them."""
    norms = [layer for layer in module.modules() if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm)]
    tracked = [layer.track_running_stats for layer in norms]
    for layer in norms:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer, before in zip(norms, tracked, strict=True):
            layer.track_running_stats = before


@contextmanager
def statistics_of_first_pass(module: torch.nn.Module) -> Iterator[None]:
    """Around a backward pass that recomputes activations: BatchNorm's running statistics stay as the forward pass left them.

    The batch gets no weight. Layers still track: torch compares what both passes save, and without tracking a layer saves less.
    """
    norms = [layer for layer in module.modules() if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm)]
    norms = [layer for layer in norms if layer.track_running_stats]
    before = [(layer.momentum, layer.num_batches_tracked) for layer in norms]
    for layer in norms:
        layer.momentum, layer.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for layer, (momentum, number) in zip(norms, before, strict=True):
            layer.momentum, layer.num_batches_tracked = momentum, number
