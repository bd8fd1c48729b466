"""The heads of the objectives: multilayer perceptrons with batch normalisation over all ranks' rows.

Layers are called layer1, bn1, layer2, ... as in the published checkpoints.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch

from train.objectives.batch_norm import BatchNormOverRanks


class Head(torch.nn.Module):
    """Linear layers with BatchNorm and ReLU between them; last_norm: BatchNorm behind the last one, too."""

    def __init__(
        self, widths: Sequence[int], *, bias: bool = True, last_bias: bool = True, last_norm: bool = False
    ) -> None:
        super().__init__()
        self.num_layers = len(widths) - 1
        for number, (width, next_width) in enumerate(pairwise(widths), 1):
            is_last = number == self.num_layers
            has_bias = last_bias if is_last else bias
            self.add_module(f"layer{number}", torch.nn.Linear(width, next_width, bias=has_bias))
            if not is_last or last_norm:
                self.add_module(f"bn{number}", BatchNormOverRanks(next_width))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[B, widths[0]] -> [B, widths[-1]], float32 (fp64 under fp64 weights). Collective in training: every rank calls."""
        for number in range(1, self.num_layers + 1):
            layer, norm = getattr(self, f"layer{number}"), getattr(self, f"bn{number}", None)
            rows = layer(rows.to(layer.weight.dtype))
            rows = rows if norm is None else norm(rows)
            rows = rows if number == self.num_layers else torch.relu(rows)
        return rows.to(torch.promote_types(rows.dtype, torch.float32))


def simclr_head(width: int, hidden: int, dim: int) -> Head:
    """SLIP's head on pictures, and CLIP-rocket's on strong views of both towers."""
    return Head([width, hidden, hidden, dim])


def siam_projector(width: int, hidden: int, dim: int) -> Head:
    """SimSiam's, without its last BatchNorm, of which weak and strong views have one each."""
    return Head([width, hidden, dim], bias=False, last_bias=False)


def siam_predictor(hidden: int, dim: int) -> Head:
    return Head([dim, hidden, dim], bias=False)


def barlow_projector(width: int, hidden: int, dim: int) -> Head:
    return Head([width, hidden, hidden, dim], last_norm=True)
