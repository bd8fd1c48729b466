"""The process-group composition of the contrastive loss, and its operations in torch.library.

In: this rank's rows. On the wire, forward only: both towers' rows all-gathered once, then O(G) floats (thresholds; every
column's statistics to the rank that has its row; statistics of rows gathered). Backward: nothing, every rank can form
the exact gradient of its own rows.

Shape letters: `B` rows of this rank, `G` rows of all ranks, `D` embedding, `A` anchors of this rank, `AG` anchors of
all ranks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.contrastive import blockwise
from kernels.contrastive.gradient import gradients
from kernels.contrastive.hardest import choose_hardest, refine_hardest
from kernels.contrastive.reference import contrastive_reference
from kernels.contrastive.state import ForwardState, Options, anchors_of, part_of, state_length
from kernels.rows.function import Layout, Towers, gather_rows, send_to_owners
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
    text_off_B, text_max_B, text_hinge_A, text_active_A = reduce_columns(stats, scale, layout, dtype, group_rows=group)
    positive_B = scale * blockwise.row_dots(image_BD, text_BD, block_rows=options.block_rows)
    image_off_B = blockwise.log_sum_exp(stats.row_max_B, stats.row_sum_B, scale, dtype)
    settings = {"scale": scale, "offset": layout.offset, "block_rows": options.block_rows}
    exact_image_off_B = refine_hardest(image_off_B, positive_B, image_BD, text_GD, **settings)
    exact_text_off_B = refine_hardest(text_off_B, positive_B, text_BD, image_GD, **settings)
    # A tie with another row counts as wrong: features that have collapsed to one point score 0, not 1.
    correct = [stats.tile_diagonal_B > off_max_B for off_max_B in (stats.row_max_B, text_max_B)]
    hinge_B = torch.zeros_like(positive_B)
    for hinge_A in (stats.row_hinge_A, text_hinge_A):
        # A direction without a margin has none.
        hinge_B[: len(hinge_A) * group : group] += hinge_A
    columns = [positive_B, image_off_B, text_off_B, exact_image_off_B, exact_text_off_B, *correct, hinge_B]
    # Sums are formed from all ranks' rows: another reduction would take longer than its bytes.
    every_row = gather_rows(torch.stack([column.double() for column in columns], 1), layout)
    positive_G, image_off_G, text_off_G, *exact_off_G, image_correct_G, text_correct_G, hinge_G = every_row.unbind(1)
    loss_sum = sum(_softplus(off_G - positive_G) for off_G in exact_off_G).sum() / 2
    mean_positive_cosine = positive_G.mean() / scale
    # Gradients keep the sweep's sums for the rows that they take from the sweep: a row's softmax must sum to one.
    image_off_G, image_hardest = choose_hardest(image_off_G, exact_off_G[0], positive_G, image_BD.dtype)
    text_off_G, text_hardest = choose_hardest(text_off_G, exact_off_G[1], positive_G, image_BD.dtype)
    smoothing_cosine = _smoothing_cosine(image_GD, text_GD, mean_positive_cosine, options)
    contrastive = loss_sum / layout.total + scale * smoothing_cosine
    margin_cosine = hinge_G.sum() * options.hinge_weight(layout)
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
        text_active_A=text_active_A,
        image_hard_row_A=image_hard_row_A,
        text_hard_row_A=text_hard_row_A,
        margin_cosine=margin_cosine,
        smoothing_cosine=smoothing_cosine,
        mean_positive_cosine=mean_positive_cosine,
    )
    loss = contrastive + options.margin_weight * margin
    return [loss, contrastive, margin, image_correct_G.mean(), text_correct_G.mean()], state


def _thresholds(
    anchor_BD: Tensor, hard_BD: Tensor, options: Options, layout: Layout, direction: str
) -> tuple[Tensor | None, Tensor | None]:
    """Thresholds of all ranks' anchors and the rows of our own minima. Collective: every rank calls."""
    if not options.has_hinge(direction):
        return None, None
    own_A, row_A = blockwise.hard_minimum(anchor_BD, hard_BD, options.group_rows, block_rows=options.block_rows)
    return gather_rows(own_A[:, None], layout, rows_per_item=options.group_rows)[:, 0], row_A


def reduce_columns(
    stats: blockwise.Statistics, scale: Tensor, layout: Layout, dtype: torch.dtype, *, group_rows: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log-sum-exp_B, max_B, hinge_A, active_A) over all ranks of the columns that are this rank's rows; no anchors
    without a margin. Collective: every rank calls."""
    max_B, sum_B, *hinges = stats.column_max_G, stats.column_sum_G, stats.column_hinge_A, stats.column_active_A
    if layout.world_size > 1:
        # Together, one item for an anchor and its hard pairs: a second exchange would take longer than its bytes.
        items = [item.view(layout.total // group_rows, -1) for item in (max_B, sum_B, *hinges) if len(item)]
        parts_WAX = send_to_owners(torch.cat(items, 1), layout, rows_per_item=group_rows)
        max_WB, sum_WB, *hinges_WA = (part.flatten(1) for part in parts_WAX.split([item.shape[1] for item in items], 2))
        max_B = max_WB.amax(0)
        sum_B = (sum_WB * blockwise.rescale(max_WB, max_B, scale, dtype)).sum(0)
        hinges = [hinge_WA.sum(0) for hinge_WA in hinges_WA] or hinges
    return blockwise.log_sum_exp(max_B, sum_B, scale, dtype), max_B, *hinges


def _softplus(x: Tensor) -> Tensor:
    # F.softplus turns linear at 20, which is wrong by 2e-9 there.
    return -F.logsigmoid(-x)


def _smoothing_cosine(image_GD: Tensor, text_GD: Tensor, mean_positive: Tensor, options: Options) -> Tensor:
    """Label smoothing's part of the loss over the scale: the uniform target needs only the two mean rows, no sweep."""
    if not options.label_smoothing:
        return torch.zeros_like(mean_positive)
    means = [blockwise.mean_row(rows, block_rows=options.block_rows) for rows in (image_GD, text_GD)]
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
