"""The process-group composition of the contrastive loss, and its operations in torch.library.

In: this rank's rows. On the wire, forward only: both towers' rows all-gathered once, then O(G) floats (thresholds,
column statistics reduced MAX then SUM, row statistics gathered). Backward: nothing, every rank can form the exact
gradient of its own rows.

Shape letters: `B` rows of this rank, `G` rows of all ranks, `D` embedding, `A` anchors of this rank, `AG` anchors of
all ranks.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from kernels.contrastive import blockwise
from kernels.contrastive.gradient import gradients
from kernels.contrastive.hardest import choose_hardest, refine_hardest
from kernels.contrastive.reference import contrastive_reference
from kernels.contrastive.state import ForwardState, Options, anchors_of, part_of, state_length
from kernels.rows.function import Layout, Towers, gather_rows, reduce_vector, start_gather
from kernels.rows.gradient import Wanted
from kernels.rows.precision import accumulation_dtype
from kernels.rows.registration import Loss, register


def forward(towers: Towers, scale: Tensor, options: Options, layout: Layout) -> tuple[list[Tensor], ForwardState]:
    """Terms (loss, contrastive, margin, image_accuracy, text_accuracy) in float64 and the state. Collective: every
    rank calls."""
    image_BD, text_BD, image_GD, text_GD = towers.image_BD, towers.text_BD, towers.image_GD, towers.text_GD
    dtype = accumulation_dtype(image_BD.dtype)
    group, own_anchors = options.group_rows, anchors_of(layout.own, options)
    image_threshold_AG, image_hard_row_A = _thresholds(image_BD, text_BD, options, layout, "image_to_text")
    text_threshold_AG, text_hard_row_A = _thresholds(text_BD, image_BD, options, layout, "text_to_image")
    stats = options.sweeps.forward_sweep(
        image_BD,
        text_GD,
        scale=scale,
        offset=layout.offset,
        hinges=blockwise.Hinges(group, part_of(image_threshold_AG, own_anchors), text_threshold_AG),
        row_tile=options.row_tile,
        column_tile=options.column_tile,
    )
    text_off_G, text_max_G, text_hinge_AG, text_active_AG = reduce_columns(stats, scale, layout, dtype)
    positive_B = scale * blockwise.row_dots(image_BD, text_BD, row_tile=options.row_tile)
    image_off_B = blockwise.log_sum_exp(stats.row_max_B, stats.row_sum_B, scale, dtype)
    settings = {"scale": scale, "offset": layout.offset, "column_tile": options.column_tile}
    exact_image_off_B = refine_hardest(image_off_B, positive_B, image_BD, text_GD, **settings)
    exact_text_off_B = refine_hardest(text_off_G[layout.own], positive_B, text_BD, image_GD, **settings)
    own_loss = (_softplus(exact_image_off_B - positive_B) + _softplus(exact_text_off_B - positive_B)).sum() / 2
    # A tie with another row counts as wrong: features that have collapsed to one point score 0, not 1.
    image_correct_B = stats.tile_diagonal_B > stats.row_max_B
    text_correct_B = stats.tile_diagonal_B > text_max_G[layout.own]
    own_rows = torch.stack([positive_B, image_off_B, exact_image_off_B, exact_text_off_B], 1)
    gathered_rows = start_gather(own_rows, layout)
    own_sums = [own_loss, image_correct_B.double().sum(), text_correct_B.double().sum(), stats.row_hinge_A.sum()]
    sums = reduce_vector(torch.stack(own_sums), layout, dist.ReduceOp.SUM)
    loss_sum, image_correct, text_correct, image_hinge = sums
    positive_G, image_off_G, *exact_off_G = gathered_rows().unbind(1)
    mean_positive_cosine = positive_G.mean() / scale
    # Gradients keep the sweep's sums for the rows that they take from the sweep: a row's softmax must sum to one.
    image_off_G, image_hardest = choose_hardest(image_off_G, exact_off_G[0], positive_G, image_BD.dtype)
    text_off_G, text_hardest = choose_hardest(text_off_G, exact_off_G[1], positive_G, image_BD.dtype)
    smoothing_cosine = _smoothing_cosine(image_GD, text_GD, mean_positive_cosine, options)
    contrastive = loss_sum / layout.total + scale * smoothing_cosine
    margin_cosine = (image_hinge + text_hinge_AG.sum()) * options.hinge_weight(layout)
    margin = margin_cosine * scale if options.margin_space == "logits" else margin_cosine
    state = ForwardState(
        scale=scale,
        image_hardest=image_hardest,
        text_hardest=text_hardest,
        positive_B=positive_B,
        image_off_B=image_off_G[layout.own],
        text_off_B=text_off_G[layout.own],
        image_lse_G=positive_G + _softplus(image_off_G - positive_G),
        text_lse_G=positive_G + _softplus(text_off_G - positive_G),
        image_threshold_AG=image_threshold_AG,
        text_threshold_AG=text_threshold_AG,
        image_active_A=stats.row_active_A,
        text_active_A=part_of(text_active_AG, own_anchors),
        image_hard_row_A=image_hard_row_A,
        text_hard_row_A=text_hard_row_A,
        margin_cosine=margin_cosine,
        smoothing_cosine=smoothing_cosine,
        mean_positive_cosine=mean_positive_cosine,
    )
    loss = contrastive + options.margin_weight * margin
    return [loss, contrastive, margin, image_correct / layout.total, text_correct / layout.total], state


def _thresholds(
    anchor_BD: Tensor, hard_BD: Tensor, options: Options, layout: Layout, direction: str
) -> tuple[Tensor | None, Tensor | None]:
    """Thresholds of all ranks' anchors and the rows of our own minima. Collective: every rank calls."""
    if not options.has_hinge(direction):
        return None, None
    own_A, row_A = blockwise.hard_minimum(anchor_BD, hard_BD, options.group_rows, row_tile=options.row_tile)
    return gather_rows(own_A[:, None], layout, rows_per_item=options.group_rows)[:, 0], row_A


def reduce_columns(
    stats: blockwise.Statistics, scale: Tensor, layout: Layout, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log-sum-exp_G, max_G, hinge_AG, active_AG) of the columns over all ranks. Collective: every rank calls."""
    if layout.world_size == 1:
        off_G = blockwise.log_sum_exp(stats.column_max_G, stats.column_sum_G, scale, dtype)
        return off_G, stats.column_max_G, stats.column_hinge_A, stats.column_active_A
    max_G = reduce_vector(stats.column_max_G.clone(), layout, dist.ReduceOp.MAX)
    sum_G = stats.column_sum_G * blockwise.rescale(stats.column_max_G, max_G, scale, dtype)
    packed = reduce_vector(torch.cat([sum_G, stats.column_hinge_A, stats.column_active_A]), layout, dist.ReduceOp.SUM)
    sum_G, hinge_AG, active_AG = packed.split([len(max_G), len(stats.column_hinge_A), len(stats.column_active_A)])
    return blockwise.log_sum_exp(max_G, sum_G, scale, dtype), max_G, hinge_AG, active_AG


def _softplus(x: Tensor) -> Tensor:
    # F.softplus turns linear at 20, which is wrong by 2e-9 there.
    return -F.logsigmoid(-x)


def _smoothing_cosine(image_GD: Tensor, text_GD: Tensor, mean_positive: Tensor, options: Options) -> Tensor:
    """Label smoothing's part of the loss over the scale: the uniform target needs only the two mean rows, no sweep."""
    if not options.label_smoothing:
        return torch.zeros_like(mean_positive)
    means = [blockwise.mean_row(rows, row_tile=options.row_tile) for rows in (image_GD, text_GD)]
    return options.label_smoothing * (mean_positive - torch.dot(*means))


def _forward(towers: Towers, scalars: list[Tensor], options: Options, layout: Layout) -> tuple[list[Tensor], Tensor]:
    terms, state = forward(towers, *scalars, options, layout)
    return terms, state.packed()


def _gradients(
    towers: Towers, state_N: Tensor, options: Options, layout: Layout, wanted: Wanted
) -> list[Tensor | None]:
    dtype = accumulation_dtype(towers.image_BD.dtype)
    state = ForwardState.unpacked(state_N, options, layout, dtype)
    return [None if d is None else d.to(dtype) for d in gradients(towers, state, options, layout, wanted)]


def _definition(image_GD: Tensor, text_GD: Tensor, logit_scale: Tensor, *, options: Options) -> tuple[Tensor, ...]:
    return contrastive_reference(image_GD, text_GD, logit_scale, **options.agreed)


OPERATIONS = register(
    Loss(
        name="contrastive_loss",
        scalars=("logit_scale",),
        num_terms=5,
        options=Options,
        definition=_definition,
        forward=_forward,
        gradients=_gradients,
        state_length=state_length,
    )
)
