"""The backward pass of the contrastive loss: from finished statistics to gradients of this rank's rows, without
communication.

Shape letters: `B` rows of this rank, `G` rows of all ranks, `D` embedding, `A` anchors of this rank, `AG` anchors of
all ranks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.contrastive import blockwise
from kernels.contrastive.state import ForwardState, Options, anchors_of, part_of
from kernels.rows.function import Layout


def gradients(
    image_BD: Tensor,
    text_BD: Tensor,
    image_GD: Tensor,
    text_GD: Tensor,
    state: ForwardState,
    options: Options,
    layout: Layout,
    *,
    want_image: bool,
    want_text: bool,
    want_scale: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """World size times this rank's part of the gradient of the global loss, in the accumulation dtype; no
    communication.

    With one rank a single recomputed product serves both towers; with more, each tower's own rows are swept on their
    own, which costs one more product and saves a reduction of G x D gradients.
    """
    # The sweeps yield sums that this factor turns into derivatives by cosines.
    factor = state.scale / (2 * layout.total)
    hinge_weight = options.margin_weight * options.hinge_weight(layout)
    hinge_weight *= state.scale if options.margin_space == "logits" else 1.0
    image = _Tower(image_BD, image_GD, state.image_lse_G, state.image_threshold_AG)
    text = _Tower(text_BD, text_GD, state.text_lse_G, state.text_threshold_AG)
    one_sweep = layout.world_size == 1
    d_image = d_text = d_cosine = None
    if want_image or one_sweep or (want_scale and not want_text):
        d_image, d_text, d_cosine = _sweep(
            image,
            text,
            state,
            options,
            layout,
            hinge_weight / factor,
            want_image,
            want_text and one_sweep,
            want_scale,
        )
    if want_text and not one_sweep:
        d_text, _, text_d_cosine = _sweep(
            text,
            image,
            state,
            options,
            layout,
            hinge_weight / factor,
            True,
            False,
            want_scale and d_cosine is None,
        )
        d_cosine = text_d_cosine if d_cosine is None else d_cosine
    positive_weight_B = factor * (
        torch.sigmoid(state.image_off_B - state.positive_B) + torch.sigmoid(state.text_off_B - state.positive_B)
    )
    partner_B, minimum_weight_B = _minima(state, options, layout, hinge_weight)
    return (
        _finish(
            d_image, text_BD, text_GD, factor, positive_weight_B, partner_B[0], minimum_weight_B[0], options, layout
        ),
        _finish(
            d_text, image_BD, image_GD, factor, positive_weight_B, partner_B[1], minimum_weight_B[1], options, layout
        ),
        _scale_gradient(d_cosine, positive_weight_B, state, options, layout) if want_scale else None,
    )


@dataclass(frozen=True)
class _Tower:
    own_BD: Tensor
    all_GD: Tensor
    lse_G: Tensor
    threshold_AG: Tensor | None


def _sweep(
    x: _Tower,
    y: _Tower,
    state: ForwardState,
    options: Options,
    layout: Layout,
    hinge_weight: float,
    want_x: bool,
    want_y: bool,
    want_scale: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    own_anchors = anchors_of(layout.own, options)
    # Without weight the margin is only reported, and needs no pass over the tiles here.
    thresholds = (part_of(x.threshold_AG, own_anchors), y.threshold_AG) if hinge_weight > 0 else (None, None)
    return options.sweeps.gradient_sweep(
        x.own_BD,
        y.all_GD,
        scale=state.scale,
        offset=layout.offset,
        hinges=blockwise.Hinges(options.group_rows, *thresholds),
        row_lse_B=x.lse_G[layout.own],
        column_lse_G=y.lse_G,
        hinge_weight=hinge_weight,
        want_x=want_x,
        want_y=want_y,
        want_scale=want_scale,
        cosine_origin=state.mean_positive_cosine,
        row_tile=options.row_tile,
        column_tile=options.column_tile,
        **options.gradient_settings,
    )


def _minima(
    state: ForwardState, options: Options, layout: Layout, hinge_weight: float
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """For image and text rows: the row of the other tower that is paired with it by a margin's minimum, and minus the
    weight.

    An anchor's minimum gains -weight times its number of active hinges. A row takes part in one minimum at most per
    direction as anchor or as hard pair, and the two directions never meet on one row, so plain indexed stores suffice.
    """
    num_rows = layout.counts[layout.rank]
    anchor_A = torch.arange(0, num_rows, options.group_rows, device=state.positive_B.device)
    partner = [torch.zeros(num_rows, dtype=torch.int64, device=anchor_A.device) for _ in range(2)]
    weight = [torch.zeros_like(state.positive_B) for _ in range(2)]
    directions = (
        (state.image_threshold_AG, state.image_active_A, state.image_hard_row_A, 0, 1),
        (state.text_threshold_AG, state.text_active_A, state.text_hard_row_A, 1, 0),
    )
    for threshold_AG, active_A, hard_row_A, anchor_tower, hard_tower in directions:
        if threshold_AG is None:
            continue
        partner[anchor_tower][anchor_A], weight[anchor_tower][anchor_A] = hard_row_A, hinge_weight * active_A
        partner[hard_tower][hard_row_A], weight[hard_tower][hard_row_A] = anchor_A, hinge_weight * active_A
    return (partner[0], partner[1]), (weight[0], weight[1])


def _finish(
    d_own_BD: Tensor | None,
    other_BD: Tensor,
    other_GD: Tensor,
    factor: float,
    positive_weight_B: Tensor,
    partner_B: Tensor,
    minimum_weight_B: Tensor,
    options: Options,
    layout: Layout,
) -> Tensor | None:
    """Scale the sweep's sums and add, in place, what stays outside the tile product: positives, minima, smoothing."""
    if d_own_BD is None:
        return None
    dtype = d_own_BD.dtype
    smoothing = 2 * factor * options.label_smoothing
    mean_D = blockwise.mean_row(other_GD, row_tile=options.row_tile).to(dtype) if smoothing else None
    for i0, i1 in blockwise.tiles(len(d_own_BD), options.row_tile, 1):
        rows, positive = d_own_BD[i0:i1].mul_(factor), other_BD[i0:i1].to(dtype)
        rows.sub_(positive * positive_weight_B[i0:i1, None].to(dtype))
        if options.hard_per_anchor and options.margin_weight:
            rows.sub_(other_BD[partner_B[i0:i1]].to(dtype) * minimum_weight_B[i0:i1, None].to(dtype))
        if mean_D is not None:
            rows.add_(positive - mean_D, alpha=smoothing)
        rows.mul_(layout.world_size)
    return d_own_BD


def _scale_gradient(
    d_cosine: Tensor, positive_weight_B: Tensor, state: ForwardState, options: Options, layout: Layout
) -> Tensor:
    """World size times this rank's part: its rows' softmax terms, and an equal share of the terms known on every
    rank."""
    positive = positive_weight_B * (state.positive_B / state.scale - state.mean_positive_cosine)
    softmax = d_cosine / (2 * layout.total) - positive.sum() / state.scale
    shared = state.smoothing_cosine
    if options.margin_space == "logits":
        shared = shared + options.margin_weight * state.margin_cosine
    return layout.world_size * softmax + shared
