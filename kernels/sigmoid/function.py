"""The process-group composition of the sigmoid loss, and its operations in torch.library.

On the wire, forward only: both towers' rows all-gathered once and two sums. Backward: nothing.

Shape letters: `B` rows of this rank, `G` rows of all ranks, `D` embedding.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from kernels.contrastive.blockwise import row_dots, tiles
from kernels.rows.function import Layout, Towers, reduce_vector
from kernels.rows.gradient import Wanted, sweep_towers
from kernels.rows.options import SweepOptions
from kernels.rows.precision import accumulation_dtype
from kernels.rows.registration import Loss, register
from kernels.sigmoid import blockwise
from kernels.sigmoid.reference import sigmoid_reference


@dataclass(frozen=True)
class Options(SweepOptions):
    """The call's settings, checked."""

    row_tile: int = blockwise.ROW_TILE
    column_tile: int = blockwise.COLUMN_TILE

    package: ClassVar[str] = "kernels.sigmoid"
    # Rows stand alone here, and no setting changes what the loss means.
    group_rows: ClassVar[int] = 1
    agreed: ClassVar[dict[str, float | str]] = {}


def forward(towers: Towers, scalars: list[Tensor], options: Options, layout: Layout) -> tuple[list[Tensor], Tensor]:
    """(terms loss, positive and negative in float64; scale, bias and the positive logits of this rank's B rows).
    Collective: every rank calls."""
    scale, bias = scalars
    positive_B = scale * row_dots(towers.image_BD, towers.text_BD, block_rows=options.block_rows) + bias
    negative = options.sweeps.negative_sum(
        towers.image_BD,
        towers.text_GD,
        scale=scale,
        bias=bias,
        offset=layout.offset,
        row_tile=options.row_tile,
        column_tile=options.column_tile,
    )
    own = torch.stack([-F.logsigmoid(positive_B).sum(), negative])
    positive, negative = reduce_vector(own, layout, dist.ReduceOp.SUM) / layout.total
    return [positive + negative, positive, negative], torch.cat([torch.stack(scalars), positive_B])


def gradients(towers: Towers, state_N: Tensor, options: Options, layout: Layout, wanted: Wanted) -> list[Tensor | None]:
    """[d_image_BD, d_text_BD, d_logit_scale, d_logit_bias]: world size times this rank's part of the gradient of the
    global loss, in the accumulation dtype, None where unwanted; no communication."""
    scale, bias, positive_B = state_N[0], state_N[1], state_N[2:]
    sweeps = [
        partial(_sweep, own_BD, every_GD, (scale, bias), options, layout)
        for own_BD, every_GD in ((towers.image_BD, towers.text_GD), (towers.text_BD, towers.image_GD))
    ]
    d_image, d_text, sums = sweep_towers(*sweeps, wanted, world_size=layout.world_size)
    positive_weight_B = torch.sigmoid(-positive_B)
    factor = layout.world_size / layout.total
    for d_own_BD, other_BD in ((d_image, towers.text_BD), (d_text, towers.image_BD)):
        if d_own_BD is not None:
            _finish(d_own_BD, other_BD, positive_weight_B, factor * scale, options.block_rows)
    if not wanted.scalars:
        return [d_image, d_text, None, None]
    cosine_sum, weight_sum = sums
    d_scale = factor * (cosine_sum - (positive_weight_B * (positive_B - bias) / scale).sum())
    d_bias = factor * (weight_sum - positive_weight_B.sum())
    dtype = accumulation_dtype(towers.image_BD.dtype)
    return [d_image, d_text, d_scale.to(dtype), d_bias.to(dtype)]


def _sweep(
    x_BD: Tensor,
    y_GD: Tensor,
    scalars: tuple[Tensor, Tensor],
    options: Options,
    layout: Layout,
    *,
    want_x: bool,
    want_y: bool,
    want_sums: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    scale, bias = scalars
    return options.sweeps.gradient_sweep(
        x_BD,
        y_GD,
        scale=scale,
        bias=bias,
        offset=layout.offset,
        want_x=want_x,
        want_y=want_y,
        want_scalars=want_sums,
        row_tile=options.row_tile,
        column_tile=options.column_tile,
        **options.gradient_settings,
    )


def _finish(d_own_BD: Tensor, other_BD: Tensor, positive_weight_B: Tensor, factor: Tensor, block_rows: int) -> None:
    """In place: add the positives, which the sweep left out, and scale."""
    for i0, i1 in tiles(len(d_own_BD), block_rows, 1):
        weight = positive_weight_B[i0:i1, None].to(d_own_BD.dtype)
        d_own_BD[i0:i1].sub_(other_BD[i0:i1].to(d_own_BD.dtype) * weight).mul_(factor)


def _definition(image_GD: Tensor, text_GD: Tensor, *scalars: Tensor, options: Options) -> tuple[Tensor, ...]:
    return sigmoid_reference(image_GD, text_GD, *scalars)


OPERATIONS = register(
    Loss(
        name="sigmoid_contrastive_loss",
        scalars=("logit_scale", "logit_bias"),
        num_terms=3,
        options=Options,
        definition=_definition,
        forward=forward,
        gradients=gradients,
        state_length=lambda num_rows, num_all_rows, options: 2 + num_rows,
    )
)
