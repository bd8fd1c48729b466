"""What the passes of the contrastive loss share: the checked settings, and what forward hands to backward.

Shape letters: `B` rows of this rank, `G` rows of all ranks, `A` anchors of this rank, `AG` anchors of all ranks.
"""

from dataclasses import dataclass
from types import ModuleType

from torch import Tensor

from kernels.contrastive import blockwise
from kernels.rows.function import Layout


@dataclass(frozen=True)
class Options:
    """The loss's settings as the public call took them, checked."""

    hard_per_anchor: int = 0
    margin_weight: float = 0.0
    margin_space: str = "cosine"
    margin_direction: str = "both"
    label_smoothing: float = 0.0
    backend: str = "blockwise"
    gradient_operand: str = "precise"
    row_tile: int = blockwise.ROW_TILE
    column_tile: int = blockwise.COLUMN_TILE

    @property
    def sweeps(self) -> ModuleType:
        """The module whose forward_sweep and gradient_sweep do the work."""
        if self.backend == "triton":
            # Only who asks for Triton loads it.
            from kernels.contrastive import kernel

            return kernel
        return blockwise

    @property
    def gradient_settings(self) -> dict[str, str]:
        """What only Triton's gradient sweep takes: the tiled one is always precise."""
        return {"gradient_operand": self.gradient_operand} if self.backend == "triton" else {}

    @property
    def group_rows(self) -> int:
        return 1 + self.hard_per_anchor

    def has_hinge(self, direction: str) -> bool:
        return self.hard_per_anchor > 0 and self.margin_direction in (direction, "both")

    def hinge_weight(self, layout: Layout) -> float:
        """Share of one unit of cosine excess in the margin term."""
        num_anchors = layout.total // self.group_rows
        return (0.5 if self.margin_direction == "both" else 1.0) / (num_anchors * layout.total)

    def definition(self) -> dict:
        names = ("hard_per_anchor", "margin_weight", "margin_space", "margin_direction", "label_smoothing")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class ForwardState:
    """What the backward pass needs beside the features: O(b + G) numbers, float64 where not said."""

    scale: float
    positive_B: Tensor
    image_off_B: Tensor
    text_off_B: Tensor
    image_lse_G: Tensor
    text_lse_G: Tensor
    image_threshold_AG: Tensor | None
    text_threshold_AG: Tensor | None
    image_active_A: Tensor
    text_active_A: Tensor
    image_hard_row_A: Tensor
    text_hard_row_A: Tensor
    margin_cosine: Tensor
    smoothing_cosine: Tensor
    mean_positive_cosine: float


def anchors_of(rows: slice, options: Options) -> slice:
    return slice(rows.start // options.group_rows, rows.stop // options.group_rows)


def part_of(vector: Tensor | None, part: slice) -> Tensor | None:
    """The slice, where the vector has anything: a direction that is off has none."""
    return None if vector is None else vector[part]
