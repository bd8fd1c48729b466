"""Whether a step is taken, decided on the device, where DeepSpeed would read the gradient's norm on the host before every step.

In: gradients as means over the ranks. Out: their norm; torch's fused AdamW clips by it in its own pass, and changes nothing when it is
not finite.
"""

from collections.abc import Iterable
from typing import Any

import torch

from train.distributed import sum_of_tensor


class ShardedGradients:
    """ZeRO-2 and 3, and ZeRO-1 with DeepSpeed's own reduction: each rank has the gradients of the range whose states it holds.

    `zero`: DeepSpeed's optimizer of that stage, without clipping, its states on the device.
    """

    reduces_once = False

    def __init__(self, zero: Any, max_norm: float, device: torch.device) -> None:
        self.zero, self.max_norm = zero, max_norm
        self.norm = torch.full((), torch.nan, device=device)
        """of the last step's gradient, before clipping; 0-d"""
        if hasattr(zero, "_get_norm_groups"):
            # ZeRO-3 has no setting for it: it will look at a number that is the host's already.
            zero._get_norm_groups = lambda: [0.0]

    def judge(self) -> torch.Tensor:
        """Will the step be taken? 0-d, bool, the same on every rank. Nothing is read from the device. Collective: every rank calls."""
        self.norm = sharded_norm(part for group in self.zero.averaged_gradients.values() for part in group)
        return leave_to(self.zero.optimizer, self.norm, self.max_norm)


def sharded_norm(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    """Norm of all ranks' tensors together, 0-d, float32. Collective: every rank calls."""
    norms = [torch.linalg.vector_norm(part, dtype=torch.float32) for part in parts]
    return sum_of_tensor(torch.stack(norms).square().sum()).sqrt()


def leave_to(optimizer: torch.optim.Optimizer, norm: torch.Tensor, max_norm: float) -> torch.Tensor:
    """Have torch's fused AdamW clip to `max_norm` (0: not at all), and leave out a step whose gradients' norm is not finite.

    Then it changes nothing, its count of steps included. Returns: will the step be taken? 0-d, bool.
    """
    finite = norm.isfinite()
    optimizer.found_inf = (~finite).float()
    if max_norm:
        # It divides each gradient by this while it reads it.
        optimizer.grad_scale = ((norm.float() + 1e-6) / max_norm).clamp(min=1.0)
    return finite
