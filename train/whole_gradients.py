"""Gradients at ZeRO-0, where every rank holds all of them: one buffer, one reduction, and a verdict that stays on the device.

In: the parameters that are trained. Out: their gradients, views of the buffer, as means over the ranks; their norm; whether the optimizer
took them. Backward passes add to the buffer in place, so nothing is copied together for the reduction, nor back.
"""

import torch

from train.distributed import add_over_ranks


class WholeGradients:
    """`optimizer`: torch's fused AdamW, which looks at `found_inf` itself and then changes nothing, its count of steps included."""

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
        """After the last backward pass, of losses that were divided by the number of ranks. Collective: every rank calls."""
        add_over_ranks(self.buffer)

    def judge(self) -> torch.Tensor:
        """Clip the gradients to `max_norm` (0: not at all), and have the optimizer leave out a step whose gradients are not finite.

        Returns: will the step be taken? 0-d, bool, the same on every rank. Nothing is read from the device.
        """
        self.norm = torch.linalg.vector_norm(self.buffer)
        finite = self.norm.isfinite()
        self.optimizer.found_inf = (~finite).to(self.buffer.dtype)
        if self.max_norm:
            self.buffer.mul_((self.max_norm / (self.norm + 1e-6)).clamp(max=1.0))
        return finite
