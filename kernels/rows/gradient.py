"""Which sweeps a backward pass needs, shared by the losses.

Shape letters: `B` rows of this rank, `G` rows of all ranks, `D` embedding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Wanted:
    """Which gradients a caller needs: nothing is computed for the others."""

    image: bool
    text: bool
    scalars: bool


def sweep_towers(
    image_sweep: Callable[..., tuple[Any, ...]],
    text_sweep: Callable[..., tuple[Any, ...]],
    wanted: Wanted,
    *,
    world_size: int,
) -> tuple[Tensor | None, Tensor | None, tuple[Tensor, ...]]:
    """(d_image_BD, d_text_BD, sums for the scalars), unwanted ones None or meaningless.

    A sweep takes want_x, want_y and want_sums, and returns (gradient of its own rows, gradient of all columns, *sums).
    With one rank a single recomputed product serves both towers; with more, each tower's own rows are swept on their
    own, which costs one more product and saves a reduction of G x D gradients.
    """
    one_sweep = world_size == 1
    d_image, d_text, sums = None, None, ()
    if wanted.image or (wanted.text and one_sweep) or (wanted.scalars and not wanted.text):
        d_image, d_text, *sums = image_sweep(
            want_x=wanted.image, want_y=wanted.text and one_sweep, want_sums=wanted.scalars
        )
    if wanted.text and not one_sweep:
        d_text, _, *text_sums = text_sweep(want_x=True, want_y=False, want_sums=wanted.scalars and not sums)
        sums = sums or text_sums
    return d_image, d_text, tuple(sums)
