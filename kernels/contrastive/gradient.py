"""The backward pass of the contrastive loss: from finished statistics to gradients of this rank's rows, without
communication.

Shape letters: `B` rows of this rank, `G` rows of all ranks, `D` embedding, `A` anchors of this rank, `AG` anchors of
all ranks.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kernels.contrastive import blockwise
from kernels.contrastive.hardest import HardRows, add_softmax_terms
from kernels.contrastive.state import ForwardState, Options, anchors_of, part_of
from kernels.rows.function import Layout, Towers
from kernels.rows.gradient import Wanted, sweep_towers


@dataclass(frozen=True)
class _Tower:
    """One tower and the finished statistics of its rows.

    partner_B, minimum_weight_B: the row of the other tower that a margin's minimum pairs with each row, and minus the
    weight that the pair gains.
    """

    own_BD: Tensor
    all_GD: Tensor
    lse_G: Tensor
    hardest_K: Tensor
    threshold_AG: Tensor | None
    partner_B: Tensor
    minimum_weight_B: Tensor


@dataclass(frozen=True)
class _Step:
    """What every part of one backward pass refers to.

    factor: turns a sweep's sums into derivatives by cosines. hinge_weight: derivative of the loss by one active hinge,
    both 0-d.
    positive_weight_B: minus the derivative by each positive cosine.
    """

    state: ForwardState
    options: Options
    layout: Layout
    factor: Tensor
    hinge_weight: Tensor
    positive_weight_B: Tensor

    @property
    def has_margin(self) -> bool:
        return self.options.margin_weight > 0


def gradients(
    towers: Towers, state: ForwardState, options: Options, layout: Layout, wanted: Wanted
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(d_image_BD, d_text_BD, d_logit_scale): world size times this rank's part of the gradient of the global loss, in
    the accumulation dtype (the scale's in float64), None where unwanted; no communication."""
    factor = state.scale / (2 * layout.total)
    unit = state.scale if options.margin_space == "logits" else torch.ones_like(state.scale)
    hinge_weight = unit * (options.margin_weight * options.hinge_weight(layout))
    both_directions = (state.image_off_B - state.positive_B, state.text_off_B - state.positive_B)
    positive_weight_B = factor * sum(torch.sigmoid(margin_B) for margin_B in both_directions)
    step = _Step(state, options, layout, factor, hinge_weight, positive_weight_B)
    image, text = _towers(towers, step)
    sweeps = (partial(_sweep, image, text, step), partial(_sweep, text, image, step))
    d_image, d_text, sums = sweep_towers(*sweeps, wanted, world_size=layout.world_size)
    for d_own_BD, own, other in ((d_image, image, text), (d_text, text, image)):
        if d_own_BD is not None:
            _finish(d_own_BD, own, other, step)
    return d_image, d_text, _scale_gradient(*sums, step) if wanted.scalars else None


def _towers(towers: Towers, step: _Step) -> tuple[_Tower, _Tower]:
    """(image, text) with the pairs that the margins' minima form.

    An anchor's minimum gains -weight times its number of active hinges. A row takes part in one minimum at most per
    direction as anchor or as hard pair, and the two directions never meet on one row, so plain indexed stores suffice.
    """
    state, num_rows = step.state, len(towers.image_BD)
    anchor_A = torch.arange(0, num_rows, step.options.group_rows, device=state.positive_B.device)
    partner = [torch.zeros(num_rows, dtype=torch.int64, device=anchor_A.device) for _ in range(2)]
    weight = [torch.zeros_like(state.positive_B) for _ in range(2)]
    directions = (
        (state.image_active_A, state.image_hard_row_A, 0, 1),
        (state.text_active_A, state.text_hard_row_A, 1, 0),
    )
    for active_A, hard_row_A, anchor_tower, hard_tower in directions:
        if hard_row_A is None:
            continue
        partner[anchor_tower][anchor_A], weight[anchor_tower][anchor_A] = hard_row_A, step.hinge_weight * active_A
        partner[hard_tower][hard_row_A], weight[hard_tower][hard_row_A] = anchor_A, step.hinge_weight * active_A
    image = (towers.image_BD, towers.image_GD, state.image_lse_G, state.image_hardest, state.image_threshold_AG)
    text = (towers.text_BD, towers.text_GD, state.text_lse_G, state.text_hardest, state.text_threshold_AG)
    return _Tower(*image, partner[0], weight[0]), _Tower(*text, partner[1], weight[1])


def _sweep(
    x: _Tower, y: _Tower, step: _Step, *, want_x: bool, want_y: bool, want_sums: bool
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    options, layout = step.options, step.layout
    own_anchors = anchors_of(layout.own, options)
    # Without weight the margin is only reported, and needs no pass over the tiles here.
    thresholds = (part_of(x.threshold_AG, own_anchors), y.threshold_AG) if step.has_margin else (None, None)
    x_hard = HardRows.of(x.hardest_K, layout.offset, layout.offset, x.lse_G[layout.own])
    y_hard = HardRows.of(y.hardest_K, 0, -layout.offset, y.lse_G)
    dx_BD, dy_GD, scale_sum = options.sweeps.gradient_sweep(
        x.own_BD,
        y.all_GD,
        scale=step.state.scale,
        offset=layout.offset,
        hinges=blockwise.Hinges(options.group_rows, *thresholds),
        row_lse_B=x.lse_G[layout.own],
        column_lse_G=y.lse_G,
        hinge_weight=step.hinge_weight / step.factor,
        want_x=want_x,
        want_y=want_y,
        want_scale=want_sums,
        cosine_origin=step.state.mean_positive_cosine,
        row_tile=options.row_tile,
        column_tile=options.column_tile,
        row_weight_B=x_hard.weight(len(x.own_BD)),
        column_weight_G=y_hard.weight(len(y.all_GD)),
        **options.gradient_settings,
    )
    shared = {"scale": step.state.scale, "cosine_origin": step.state.mean_positive_cosine}
    shared["block_rows"] = options.block_rows
    for hard, rows_RD, others_RD, d_hard, d_rows in (
        (x_hard, x.own_BD, y.all_GD, dx_BD, dy_GD),
        (y_hard, y.all_GD, x.own_BD, dy_GD, dx_BD),
    ):
        if len(hard.own_H):
            moment = add_softmax_terms(hard, rows_RD[hard.own_H], others_RD, d_hard=d_hard, d_rows=d_rows, **shared)
            scale_sum = scale_sum + moment
    return dx_BD, dy_GD, scale_sum


def _finish(d_own_BD: Tensor, own: _Tower, other: _Tower, step: _Step) -> None:
    """Scale the sweep's sums and add, in place, what stays outside the tile product: positives, minima, smoothing."""
    options, dtype = step.options, d_own_BD.dtype
    smoothing, mean_D = 2 * step.factor * options.label_smoothing, None
    if options.label_smoothing:
        mean_D = blockwise.mean_row(other.all_GD, block_rows=options.block_rows).to(dtype)
    for i0, i1 in blockwise.tiles(len(d_own_BD), options.block_rows, 1):
        rows, positive = d_own_BD[i0:i1].mul_(step.factor), other.own_BD[i0:i1].to(dtype)
        rows.sub_(positive * step.positive_weight_B[i0:i1, None].to(dtype))
        if step.has_margin:
            minimum = other.own_BD[own.partner_B[i0:i1]].to(dtype)
            rows.sub_(minimum * own.minimum_weight_B[i0:i1, None].to(dtype))
        if mean_D is not None:
            rows.add_((positive - mean_D) * smoothing)
        rows.mul_(step.layout.world_size)


def _scale_gradient(d_cosine: Tensor, step: _Step) -> Tensor:
    """World size times this rank's part: its rows' softmax terms, and an equal share of the terms known on every
    rank."""
    state, options, layout = step.state, step.options, step.layout
    positive = step.positive_weight_B * (state.positive_B / state.scale - state.mean_positive_cosine)
    softmax = d_cosine / (2 * layout.total) - positive.sum() / state.scale
    shared = state.smoothing_cosine
    if options.margin_space == "logits":
        shared = shared + options.margin_weight * state.margin_cosine
    return layout.world_size * softmax + shared
