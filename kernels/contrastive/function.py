"""Autograd and the process-group composition of the contrastive loss.

In: this rank's rows. On the wire, forward only: both towers' rows all-gathered once, then O(G) floats (thresholds,
column statistics reduced MAX then SUM, row statistics gathered). Backward: nothing, every rank can form the exact
gradient of its own rows.

Shape letters: `B` rows of this rank, `G` rows of all ranks, `D` embedding, `A` anchors (of this rank, or of all: `AG`).
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.contrastive import blockwise
from kernels.contrastive.reference import contrastive_reference

FEATURE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Options:
    """The loss's settings as the public call took them, checked."""

    hard_per_anchor: int = 0
    margin_weight: float = 0.0
    margin_space: str = "cosine"
    margin_direction: str = "both"
    label_smoothing: float = 0.0
    row_tile: int = blockwise.ROW_TILE
    column_tile: int = blockwise.COLUMN_TILE

    @property
    def group_rows(self) -> int:
        return 1 + self.hard_per_anchor

    def has_hinge(self, direction: str) -> bool:
        return self.hard_per_anchor > 0 and self.margin_direction in (direction, "both")

    def hinge_weight(self, layout: "Layout") -> float:
        """Share of one unit of cosine excess in the margin term."""
        num_anchors = layout.total // self.group_rows
        return (0.5 if self.margin_direction == "both" else 1.0) / (num_anchors * layout.total)

    def definition(self) -> dict:
        names = ("hard_per_anchor", "margin_weight", "margin_space", "margin_direction", "label_smoothing")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Layout:
    """How many rows each rank of the group has, and which are ours."""

    counts: tuple[int, ...]
    rank: int
    process_group: dist.ProcessGroup | None

    @property
    def world_size(self) -> int:
        return len(self.counts)

    @property
    def total(self) -> int:
        return sum(self.counts)

    @property
    def offset(self) -> int:
        return sum(self.counts[: self.rank])

    @property
    def own(self) -> slice:
        return slice(self.offset, self.offset + self.counts[self.rank])


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


def exchange_layout(image_BD: Tensor, group_rows: int, process_group: dist.ProcessGroup | None) -> Layout:
    """Row counts of all ranks. Collective: every rank calls. Every rank raises the same ValueError when one rank is
    wrong."""
    num_rows, dim = image_BD.shape
    headers = [[num_rows, dim, FEATURE_DTYPES.index(image_BD.dtype)]]
    rank = 0
    if process_group is not None:
        rank = dist.get_rank(process_group)
        own = torch.tensor(headers, dtype=torch.int64, device=image_BD.device)
        every = own.new_empty(dist.get_world_size(process_group), 3)
        dist.all_gather_into_tensor(every, own, group=process_group)
        headers = every.tolist()
    for other, (rows, other_dim, dtype) in enumerate(headers):
        name = "this rank" if other == rank else f"rank {other}"
        if rows % group_rows:
            raise ValueError(
                f"hard_per_anchor={group_rows - 1} needs rows in groups of {group_rows}, but {name} has {rows}"
            )
        if (other_dim, FEATURE_DTYPES[dtype]) != (dim, image_BD.dtype):
            raise ValueError(
                f"features need one width and dtype on all ranks: {name} has D={other_dim} {FEATURE_DTYPES[dtype]}, "
                f"this rank D={dim} {image_BD.dtype}"
            )
    if sum(rows for rows, _, _ in headers) == 0:
        raise ValueError("the contrastive loss needs at least one row, but no rank has any")
    return Layout(tuple(rows for rows, _, _ in headers), rank, process_group)


def gather_rows(rows_BX: Tensor, layout: Layout, *, rows_per_item: int = 1) -> Tensor:
    """Rows of all ranks in rank order, [G, X] from this rank's [B, X]. Collective: every rank calls.

    `rows_per_item` > 1 gathers one item for that many rows. Without a process group the input itself comes back.
    """
    if layout.process_group is None:
        return rows_BX
    counts = [count // rows_per_item for count in layout.counts]
    gathered = rows_BX.new_empty(sum(counts), rows_BX.shape[1])
    # Bytes, since not every communication library knows every dtype.
    wire, own = gathered.view(torch.uint8), rows_BX.contiguous().view(torch.uint8)
    if len(set(counts)) == 1:
        dist.all_gather_into_tensor(wire, own, group=layout.process_group)
        return gathered
    # Unequal shards: one broadcast each into its place, so that nothing is padded and a rank may have no row.
    pending = []
    for rank, part in enumerate(wire.split(counts)):
        if rank == layout.rank:
            part.copy_(own)
        if len(part):
            pending.append(dist.broadcast(part, group_src=rank, group=layout.process_group, async_op=True))
    for work in pending:
        work.wait()
    return gathered


def reduce_vector(vector: Tensor, layout: Layout, operation: dist.ReduceOp) -> Tensor:
    """All-reduced in place and returned. Collective: every rank calls."""
    if layout.process_group is not None:
        dist.all_reduce(vector, operation, group=layout.process_group)
    return vector


def forward(
    image_BD: Tensor, text_BD: Tensor, image_GD: Tensor, text_GD: Tensor, scale: float, options: Options, layout: Layout
) -> tuple[list[Tensor], ForwardState]:
    """Terms (loss, contrastive, margin, image_accuracy, text_accuracy) in float64 and the state. Collective: every
    rank calls."""
    group, own_anchors = options.group_rows, _anchors(layout.own, options)
    image_threshold_AG, image_hard_row_A = _thresholds(image_BD, text_BD, options, layout, "image_to_text")
    text_threshold_AG, text_hard_row_A = _thresholds(text_BD, image_BD, options, layout, "text_to_image")
    stats = blockwise.forward_sweep(
        image_BD,
        text_GD,
        scale=scale,
        offset=layout.offset,
        hinges=blockwise.Hinges(group, _part(image_threshold_AG, own_anchors), text_threshold_AG),
        row_tile=options.row_tile,
        column_tile=options.column_tile,
    )
    text_off_G, text_max_G, text_hinge_AG, text_active_AG = _reduce_columns(stats, scale, layout)
    positive_B = scale * blockwise.row_dots(image_BD, text_BD, row_tile=options.row_tile)
    image_off_B = blockwise.log_sum_exp(stats.row_max_B, stats.row_sum_B, scale)
    positive_G, image_off_G = gather_rows(torch.stack([positive_B, image_off_B], 1), layout).unbind(1)
    # A tie with another row counts as wrong: features that have collapsed to one point score 0, not 1.
    image_correct_B = stats.tile_diagonal_B > stats.row_max_B
    text_correct_B = stats.tile_diagonal_B > text_max_G[layout.own]
    own_sums = torch.stack([image_correct_B.double().sum(), text_correct_B.double().sum(), stats.row_hinge_A.sum()])
    image_correct, text_correct, image_hinge = reduce_vector(own_sums, layout, dist.ReduceOp.SUM)
    image_loss_G, text_loss_G = _softplus(image_off_G - positive_G), _softplus(text_off_G - positive_G)
    smoothing_cosine = _smoothing_cosine(image_GD, text_GD, positive_G.mean() / scale, options)
    contrastive = (image_loss_G.mean() + text_loss_G.mean()) / 2 + scale * smoothing_cosine
    margin_cosine = (image_hinge + text_hinge_AG.sum()) * options.hinge_weight(layout)
    margin = margin_cosine * scale if options.margin_space == "logits" else margin_cosine
    state = ForwardState(
        scale=scale,
        positive_B=positive_B,
        image_off_B=image_off_B,
        text_off_B=text_off_G[layout.own],
        image_lse_G=positive_G + image_loss_G,
        text_lse_G=positive_G + text_loss_G,
        image_threshold_AG=image_threshold_AG,
        text_threshold_AG=text_threshold_AG,
        image_active_A=stats.row_active_A,
        text_active_A=_part(text_active_AG, own_anchors),
        image_hard_row_A=image_hard_row_A,
        text_hard_row_A=text_hard_row_A,
        margin_cosine=margin_cosine,
        smoothing_cosine=smoothing_cosine,
    )
    loss = contrastive + options.margin_weight * margin
    return [loss, contrastive, margin, image_correct / layout.total, text_correct / layout.total], state


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
            state.scale,
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
            state.scale,
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
    scale: float,
    options: Options,
    layout: Layout,
    hinge_weight: float,
    want_x: bool,
    want_y: bool,
    want_scale: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    own_anchors = _anchors(layout.own, options)
    # Without weight the margin is only reported, and needs no pass over the tiles here.
    thresholds = (_part(x.threshold_AG, own_anchors), y.threshold_AG) if hinge_weight > 0 else (None, None)
    return blockwise.gradient_sweep(
        x.own_BD,
        y.all_GD,
        scale=scale,
        offset=layout.offset,
        hinges=blockwise.Hinges(options.group_rows, *thresholds),
        row_lse_B=x.lse_G[layout.own],
        column_lse_G=y.lse_G,
        hinge_weight=hinge_weight,
        want_x=want_x,
        want_y=want_y,
        want_scale=want_scale,
        row_tile=options.row_tile,
        column_tile=options.column_tile,
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
    softmax = d_cosine / (2 * layout.total) - (positive_weight_B * state.positive_B).sum() / state.scale**2
    shared = state.smoothing_cosine
    if options.margin_space == "logits":
        shared = shared + options.margin_weight * state.margin_cosine
    return layout.world_size * softmax + shared


def _anchors(rows: slice, options: Options) -> slice:
    return slice(rows.start // options.group_rows, rows.stop // options.group_rows)


def _part(vector: Tensor | None, part: slice) -> Tensor | None:
    """The slice, where the vector has anything: a direction that is off has none."""
    return None if vector is None else vector[part]


def _thresholds(
    anchor_BD: Tensor, hard_BD: Tensor, options: Options, layout: Layout, direction: str
) -> tuple[Tensor | None, Tensor | None]:
    """Thresholds of all ranks' anchors and the rows of our own minima. Collective: every rank calls."""
    if not options.has_hinge(direction):
        return None, None
    own_A, row_A = blockwise.hard_minimum(anchor_BD, hard_BD, options.group_rows, row_tile=options.row_tile)
    return gather_rows(own_A[:, None], layout, rows_per_item=options.group_rows)[:, 0], row_A


def _reduce_columns(stats: blockwise.Statistics, scale: float, layout: Layout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log-sum-exp_G, max_G, hinge_AG, active_AG) of the columns over all ranks. Collective: every rank calls."""
    max_G = reduce_vector(stats.column_max_G.clone(), layout, dist.ReduceOp.MAX)
    sum_G = stats.column_sum_G * blockwise.rescale(stats.column_max_G, max_G, scale)
    packed = reduce_vector(torch.cat([sum_G, stats.column_hinge_A, stats.column_active_A]), layout, dist.ReduceOp.SUM)
    sum_G, hinge_AG, active_AG = packed.split([len(max_G), len(stats.column_hinge_A), len(stats.column_active_A)])
    return blockwise.log_sum_exp(max_G, sum_G, scale), max_G, hinge_AG, active_AG


def _softplus(x: Tensor) -> Tensor:
    # F.softplus turns linear at 20, which is wrong by 2e-9 there.
    return -F.logsigmoid(-x)


def _smoothing_cosine(image_GD: Tensor, text_GD: Tensor, mean_positive: Tensor, options: Options) -> Tensor:
    """Label smoothing's part of the loss over the scale: the uniform target needs only the two mean rows, no sweep."""
    if not options.label_smoothing:
        return torch.zeros_like(mean_positive)
    means = [blockwise.mean_row(rows, row_tile=options.row_tile) for rows in (image_GD, text_GD)]
    return options.label_smoothing * (mean_positive - torch.dot(*means))


class ContrastiveFunction(torch.autograd.Function):
    """(image_BD, text_BD, logit_scale) -> five 0-d terms, of which the first, the loss, is differentiable."""

    @staticmethod
    def forward(ctx, image_BD, text_BD, logit_scale, options, layout):
        image_GD, text_GD = gather_rows(image_BD, layout), gather_rows(text_BD, layout)
        terms, ctx.state = forward(image_BD, text_BD, image_GD, text_GD, positive_scale(logit_scale), options, layout)
        ctx.save_for_backward(image_BD, text_BD, image_GD, text_GD)
        ctx.options, ctx.layout, ctx.scale_like = (
            options,
            layout,
            logit_scale.new_empty(logit_scale.shape, device="meta"),
        )
        terms = [term.to(blockwise.accumulation_dtype(image_BD.dtype)) for term in terms]
        ctx.mark_non_differentiable(*terms[1:])
        return tuple(terms)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss, *_):
        want = dict(zip(("want_image", "want_text", "want_scale"), ctx.needs_input_grad[:3], strict=True))
        image_BD = ctx.saved_tensors[0]
        d_image, d_text, d_scale = gradients(*ctx.saved_tensors, ctx.state, ctx.options, ctx.layout, **want)
        features = [None if d is None else d.mul_(d_loss).to(image_BD.dtype) for d in (d_image, d_text)]
        if d_scale is not None:
            d_scale = (d_scale * d_loss).to(ctx.scale_like.dtype).reshape(ctx.scale_like.shape)
        return *features, d_scale, None, None


class _WorldTimesGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied by the world size."""

    @staticmethod
    def forward(ctx, features, world_size):
        ctx.world_size = world_size
        return features.view_as(features)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.world_size, None


def reference_terms(image_BD: Tensor, text_BD: Tensor, logit_scale: Tensor, options: Options, layout: Layout) -> tuple:
    """The definition over all ranks' rows, formed whole on every rank. Collective: every rank calls."""
    positive_scale(logit_scale)
    towers = []
    for own_BD in (image_BD, text_BD):
        parts = list(gather_rows(own_BD.detach(), layout).split(layout.counts))
        parts[layout.rank] = _WorldTimesGradient.apply(own_BD, layout.world_size)
        towers.append(torch.cat(parts))
    terms = contrastive_reference(*towers, logit_scale, **options.definition())
    return terms[0], *(term.detach() for term in terms[1:])


def positive_scale(logit_scale: Tensor) -> float:
    """The scale as a number. NaN passes, so that it shows in the loss."""
    scale = float(logit_scale.detach())
    if scale <= 0:
        raise ValueError(f"logit_scale={scale} must be positive: pass the exponentiated scale, logit_scale.exp()")
    return scale


def blockwise_gradients(
    image_BD: Tensor, text_BD: Tensor, logit_scale: Tensor, options: Options, layout: Layout
) -> tuple:
    """(five terms, (d_image_BD, d_text_BD, d_logit_scale)) without autograd. Collective: every rank calls."""
    dtype = blockwise.accumulation_dtype(image_BD.dtype)
    features = (image_BD, text_BD, gather_rows(image_BD, layout), gather_rows(text_BD, layout))
    terms, state = forward(*features, positive_scale(logit_scale), options, layout)
    d_image, d_text, d_scale = gradients(
        *features, state, options, layout, want_image=True, want_text=True, want_scale=True
    )
    return [term.to(dtype) for term in terms], (d_image, d_text, d_scale.to(dtype))


def reference_gradients(
    image_BD: Tensor, text_BD: Tensor, logit_scale: Tensor, options: Options, layout: Layout
) -> tuple:
    """As `blockwise_gradients`, by autograd through the definition. Collective: every rank calls."""
    dtype = blockwise.accumulation_dtype(image_BD.dtype)
    with torch.enable_grad():
        leaves = [leaf.to(dtype).requires_grad_() for leaf in (image_BD, text_BD, logit_scale)]
        terms = reference_terms(*leaves, options, layout)
        d_image, d_text, d_scale = torch.autograd.grad(terms[0], leaves)
    return [term.detach() for term in terms], (d_image, d_text, d_scale.reshape(()))
