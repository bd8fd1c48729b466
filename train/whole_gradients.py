"""Gradients where every rank holds all of them, at ZeRO-0 and at ZeRO-1: one buffer, one reduction, and a verdict that stays on the device.

In: the parameters that are trained. Out: their gradients, views of the buffer, as means over the ranks; their norm; whether the optimizer
took them. Backward passes add to the buffer in place, so nothing is copied together for the reduction, nor back.
"""

from typing import Any

import torch

from train.distributed import add_over_ranks, add_to_owners
from train.sharded_gradients import leave_to, sharded_norm


class WholeGradients:
    """ZeRO-0. `optimizer`: torch's fused AdamW."""

    reduces_once = True
    """backward passes only add; losses are divided by the number of ranks"""

    def __init__(self, module: torch.nn.Module, optimizer: torch.optim.Optimizer, max_norm: float) -> None:
        self.optimizer, self.max_norm = optimizer, max_norm
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        first = self.parameters[0]
        self.buffer = torch.zeros(sum(p.numel() for p in self.parameters), dtype=first.dtype, device=first.device)
        self.norm = torch.full((), torch.nan, device=first.device)
        """of the last step's gradient, before clipping; 0-d"""
        pieces = self.buffer.split([parameter.numel() for parameter in self.parameters])
        # In the parameters' own order of memory: AdamW's pass goes through both side by side.
        self.parts = [
            piece.as_strided(parameter.shape, parameter.stride(), piece.storage_offset())
            for piece, parameter in zip(pieces, self.parameters, strict=True)
        ]

    def clear(self) -> None:
        """Before the first backward pass of a step."""
        self.buffer.zero_()
        for parameter, part in zip(self.parameters, self.parts, strict=True):
            parameter.grad = part

    def add_over_ranks(self) -> None:
        """After the last backward pass. Collective: every rank calls."""
        add_over_ranks(self.buffer)

    def judge(self) -> torch.Tensor:
        """Will the step be taken? 0-d, bool, the same on every rank. Nothing is read from the device."""
        self.norm = torch.linalg.vector_norm(self.buffer)
        return leave_to(self.optimizer, self.norm, self.max_norm)


class OwnedGradients:
    """ZeRO-1: the same buffer, laid out as DeepSpeed's flat weights, of which each rank gets the sums of the range whose states it holds.

    `zero`: DeepSpeed's optimizer of stage 1, told not to reduce by itself (`reduces_whole`).
    """

    reduces_once = True

    def __init__(self, zero: Any, max_norm: float, *, rank: int, world_size: int) -> None:
        self.zero, self.max_norm, flats = zero, max_norm, zero.bit16_groups_flat
        self.buffer = torch.zeros(sum(flat.numel() for flat in flats), dtype=flats[0].dtype, device=flats[0].device)
        self.norm = torch.full((), torch.nan, device=self.buffer.device)
        self.wholes = self.buffer.split([flat.numel() for flat in flats])
        self.owned = [whole.view(world_size, -1)[rank] for whole in self.wholes]
        self.parts = [
            (weight, whole[first : first + weight.numel()].view(weight.shape))
            for whole, flat, weights in zip(self.wholes, flats, zero.bit16_groups, strict=True)
            for weight in weights
            for first in [weight.storage_offset() - flat.storage_offset()]
        ]

    def clear(self) -> None:
        """Before the first backward pass of a step."""
        self.buffer.zero_()
        for weight, part in self.parts:
            weight.grad = part

    def add_over_ranks(self) -> None:
        """After the last backward pass. Collective: every rank calls."""
        add_to_owners(self.buffer, self.wholes, self.owned)
        for number, owned in enumerate(self.owned):
            self.zero.averaged_gradients[number] = FlatPartition(owned)

    def judge(self) -> torch.Tensor:
        """Will the step be taken? 0-d, bool, the same on every rank. Nothing is read from the device. Collective: every rank calls."""
        self.norm = sharded_norm(self.owned)
        return leave_to(self.zero.optimizer, self.norm, self.max_norm)


class FlatPartition(list):
    """A rank's gradients of one group as DeepSpeed's step takes them without a copy: a list of pieces that has them in one piece, too."""

    def __init__(self, flat_partition: torch.Tensor) -> None:
        super().__init__([flat_partition])
        self.flat_partition = flat_partition
