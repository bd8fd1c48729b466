"""What the passes of the contrastive loss share: the checked settings, and what forward hands to backward.

Shape letters: `B` rows of this rank, `G` rows of all ranks, `A` anchors of this rank, `AG` anchors of all ranks, `N`
any number.
"""

from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from kernels.contrastive import blockwise
from kernels.contrastive.hardest import REFINED_ROWS, num_refined
from kernels.rows.function import Layout
from kernels.rows.options import SweepOptions


@dataclass(frozen=True)
class Options(SweepOptions):
    """The loss's settings as the public call took them, checked."""

    package: ClassVar[str] = "kernels.contrastive"

    hard_per_anchor: int = 0
    margin_weight: float = 0.0
    margin_space: str = "cosine"
    margin_direction: str = "both"
    label_smoothing: float = 0.0
    row_tile: int = 0
    column_tile: int = blockwise.COLUMN_TILE

    @property
    def group_rows(self) -> int:
        return 1 + self.hard_per_anchor

    def has_hinge(self, direction: str) -> bool:
        return self.hard_per_anchor > 0 and self.margin_direction in (direction, "both")

    def hinge_weight(self, layout: Layout) -> float:
        """Share of one unit of cosine excess in the margin term."""
        num_anchors = layout.total // self.group_rows
        return (0.5 if self.margin_direction == "both" else 1.0) / (num_anchors * layout.total)

    @property
    def agreed(self) -> dict[str, float | str]:
        """What defines the loss, the same on all ranks."""
        names = ("hard_per_anchor", "margin_weight", "margin_space", "margin_direction", "label_smoothing")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class ForwardState:
    """What the backward pass needs beside the features: O(b + G) numbers, float64 where not said.

    scale, mean_positive_cosine, margin_cosine, smoothing_cosine: 0-d.
    *_hardest: int64 [REFINED_ROWS], rows of all ranks whose softmax terms the sweeps leave out, -1 where there is none.
    *_threshold_AG: in the accumulation dtype, None where that direction has no margin. *_hard_row_A: int64.
    """

    scale: Tensor
    mean_positive_cosine: Tensor
    image_hardest: Tensor
    text_hardest: Tensor
    positive_B: Tensor
    image_off_B: Tensor
    text_off_B: Tensor
    image_lse_G: Tensor
    text_lse_G: Tensor
    image_threshold_AG: Tensor | None
    text_threshold_AG: Tensor | None
    image_active_A: Tensor
    text_active_A: Tensor
    image_hard_row_A: Tensor | None
    text_hard_row_A: Tensor | None
    margin_cosine: Tensor
    smoothing_cosine: Tensor

    def packed(self) -> Tensor:
        """Everything in one float64 vector, exactly."""
        values = (getattr(self, field.name) for field in fields(self))
        return torch.cat([value.double().reshape(-1) for value in values if value is not None])

    @classmethod
    def unpacked(cls, state_N: Tensor, options: Options, layout: Layout, dtype: torch.dtype) -> "ForwardState":
        """Undoes `packed`; `dtype` is that of the thresholds."""
        lengths = _lengths(layout.counts[layout.rank], layout.total, options)
        parts = dict(zip(lengths, state_N.split(list(lengths.values())), strict=True))
        for direction, tower in (("image_to_text", "image"), ("text_to_image", "text")):
            has_hinge = options.has_hinge(direction)
            for name, part_dtype in ((f"{tower}_threshold_AG", dtype), (f"{tower}_hard_row_A", torch.int64)):
                parts[name] = parts[name].to(part_dtype) if has_hinge else None
            parts[f"{tower}_hardest"] = parts[f"{tower}_hardest"][: num_refined(layout.total, dtype)].long()
        for name in ("scale", "mean_positive_cosine", "margin_cosine", "smoothing_cosine"):
            parts[name] = parts[name].reshape(())
        return cls(**parts)


def state_length(num_rows: int, num_all_rows: int, options: Options) -> int:
    """Length of a packed state."""
    return sum(_lengths(num_rows, num_all_rows, options).values())


def _lengths(num_rows: int, num_all_rows: int, options: Options) -> dict[str, int]:
    """Of each tensor of the state, in order."""
    lengths = {"scale": 1, "mean_positive_cosine": 1, "image_hardest": REFINED_ROWS, "text_hardest": REFINED_ROWS}
    lengths |= dict.fromkeys(("positive_B", "image_off_B", "text_off_B"), num_rows)
    lengths |= dict.fromkeys(("image_lse_G", "text_lse_G"), num_all_rows)
    own, every = num_rows // options.group_rows, num_all_rows // options.group_rows
    has_hinge = {"image": options.has_hinge("image_to_text"), "text": options.has_hinge("text_to_image")}
    for name, length in (("threshold_AG", every), ("active_A", own), ("hard_row_A", own)):
        lengths |= {f"{tower}_{name}": length if has_hinge[tower] else 0 for tower in ("image", "text")}
    return lengths | {"margin_cosine": 1, "smoothing_cosine": 1}


def anchors_of(rows: slice, options: Options) -> slice:
    return slice(rows.start // options.group_rows, rows.stop // options.group_rows)


def part_of(vector: Tensor | None, part: slice) -> Tensor | None:
    """The slice, where the vector has anything: a direction that is off has none."""
    return None if vector is None else vector[part]
