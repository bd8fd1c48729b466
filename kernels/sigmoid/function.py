"""Autograd and the process-group composition of the sigmoid loss.

On the wire, forward only: both towers' rows all-gathered once and two sums. Backward: nothing.

Shape letters: `B` rows of this rank, `G` rows of all ranks, `D` embedding.
"""

from dataclasses import dataclass
from types import ModuleType

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.contrastive.blockwise import accumulation_dtype, row_dots, tiles
from kernels.rows.checks import positive_scale
from kernels.rows.function import Layout, gather_rows, reduce_vector, rows_of_all_ranks
from kernels.rows.precision import without_autocast
from kernels.sigmoid import blockwise
from kernels.sigmoid.reference import sigmoid_reference


@dataclass(frozen=True)
class Options:
    """The call's settings, checked."""

    backend: str = "blockwise"
    gradient_operand: str = "precise"

    @property
    def sweeps(self) -> ModuleType:
        """The module whose negative_sum and gradient_sweep do the work."""
        if self.backend == "triton":
            # Only who asks for Triton loads it.
            from kernels.sigmoid import kernel

            return kernel
        return blockwise

    @property
    def gradient_settings(self) -> dict[str, str]:
        """What only Triton's gradient sweep takes: the tiled one is always precise."""
        return {"gradient_operand": self.gradient_operand} if self.backend == "triton" else {}


@dataclass(frozen=True)
class ForwardState:
    """What the backward pass needs beside the features."""

    scale: float
    bias: float
    positive_B: Tensor


def forward(
    image_BD, text_BD, text_GD, scale: float, bias: float, options: Options, layout: Layout
) -> tuple[list[Tensor], ForwardState]:
    """Terms (loss, positive, negative) in float64 and the state. Collective: every rank calls."""
    positive_B = scale * row_dots(image_BD, text_BD, row_tile=blockwise.ROW_TILE) + bias
    negative = options.sweeps.negative_sum(
        image_BD,
        text_GD,
        scale=scale,
        bias=bias,
        offset=layout.offset,
        row_tile=blockwise.ROW_TILE,
        column_tile=blockwise.COLUMN_TILE,
    )
    own = torch.stack([-F.logsigmoid(positive_B).sum(), negative])
    positive, negative = reduce_vector(own, layout, dist.ReduceOp.SUM) / layout.total
    return [positive + negative, positive, negative], ForwardState(scale, bias, positive_B)


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
    want_scalars: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """World size times this rank's part of the gradient of the global loss by (image, text, scale, bias)."""
    settings = {
        "scale": state.scale,
        "bias": state.bias,
        "offset": layout.offset,
        "row_tile": blockwise.ROW_TILE,
        "column_tile": blockwise.COLUMN_TILE,
        **options.gradient_settings,
    }
    one_sweep = layout.world_size == 1
    d_image = d_text = cosine_sum = weight_sum = None
    if want_image or one_sweep or (want_scalars and not want_text):
        d_image, d_text, cosine_sum, weight_sum = options.sweeps.gradient_sweep(
            image_BD,
            text_GD,
            want_x=want_image,
            want_y=want_text and one_sweep,
            want_scalars=want_scalars,
            **settings,
        )
    if want_text and not one_sweep:
        d_text, _, *sums = options.sweeps.gradient_sweep(
            text_BD, image_GD, want_x=True, want_y=False, want_scalars=want_scalars and cosine_sum is None, **settings
        )
        cosine_sum, weight_sum = sums if cosine_sum is None else (cosine_sum, weight_sum)
    positive_weight_B = torch.sigmoid(-state.positive_B)
    factor = layout.world_size / layout.total
    d_scale = d_bias = None
    if want_scalars:
        positive_cosine_B = (state.positive_B - state.bias) / state.scale
        d_scale = factor * (cosine_sum - (positive_weight_B * positive_cosine_B).sum())
        d_bias = factor * (weight_sum - positive_weight_B.sum())
    for d_own, other_BD in ((d_image, text_BD), (d_text, image_BD)):
        if d_own is not None:
            _finish(d_own, other_BD, positive_weight_B, factor * state.scale)
    return d_image, d_text, d_scale, d_bias


def _finish(d_own_BD: Tensor, other_BD: Tensor, positive_weight_B: Tensor, factor: float) -> None:
    """In place: add the positives, which the sweep left out, and scale."""
    for i0, i1 in tiles(len(d_own_BD), blockwise.ROW_TILE, 1):
        weight = positive_weight_B[i0:i1, None].to(d_own_BD.dtype)
        d_own_BD[i0:i1].sub_(other_BD[i0:i1].to(d_own_BD.dtype) * weight).mul_(factor)


class SigmoidFunction(torch.autograd.Function):
    """(image_BD, text_BD, logit_scale, logit_bias) -> three 0-d terms, of which the first, the loss, is
    differentiable."""

    @staticmethod
    @without_autocast
    def forward(ctx, image_BD, text_BD, logit_scale, logit_bias, options, layout):
        image_GD, text_GD = gather_rows(image_BD, layout), gather_rows(text_BD, layout)
        scale, bias = positive_scale(logit_scale), float(logit_bias.detach())
        terms, ctx.state = forward(image_BD, text_BD, text_GD, scale, bias, options, layout)
        ctx.save_for_backward(image_BD, text_BD, image_GD, text_GD)
        ctx.options, ctx.layout = options, layout
        ctx.scalars = [(value.dtype, value.shape) for value in (logit_scale, logit_bias)]
        terms = [term.to(accumulation_dtype(image_BD.dtype)) for term in terms]
        ctx.mark_non_differentiable(*terms[1:])
        return tuple(terms)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, d_loss, *_):
        need_image, need_text, need_scale, need_bias = ctx.needs_input_grad[:4]
        want = {"want_image": need_image, "want_text": need_text, "want_scalars": need_scale or need_bias}
        *features, d_scale, d_bias = gradients(*ctx.saved_tensors, ctx.state, ctx.options, ctx.layout, **want)
        dtype = ctx.saved_tensors[0].dtype
        features = [None if d is None else d.mul_(d_loss).to(dtype) for d in features]
        scalars = [
            (d * d_loss).to(scalar_dtype).reshape(shape) if need else None
            for d, need, (scalar_dtype, shape) in zip(
                (d_scale, d_bias), (need_scale, need_bias), ctx.scalars, strict=True
            )
        ]
        return *features, *scalars, None, None


@without_autocast
def reference_terms(
    image_BD, text_BD, logit_scale, logit_bias, options: Options, layout: Layout
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition over all ranks' rows, formed whole on every rank. Collective: every rank calls."""
    positive_scale(logit_scale)
    towers = [rows_of_all_ranks(own_BD, layout) for own_BD in (image_BD, text_BD)]
    loss, positive, negative = sigmoid_reference(*towers, logit_scale, logit_bias)
    return loss, positive.detach(), negative.detach()


@without_autocast
def blockwise_gradients(
    image_BD, text_BD, logit_scale, logit_bias, options: Options, layout: Layout
) -> tuple[list, list]:
    """(three terms, four gradients) without autograd. Collective: every rank calls."""
    dtype = accumulation_dtype(image_BD.dtype)
    image_GD, text_GD = gather_rows(image_BD, layout), gather_rows(text_BD, layout)
    terms, state = forward(image_BD, text_BD, text_GD, positive_scale(logit_scale), float(logit_bias), options, layout)
    want = {"want_image": True, "want_text": True, "want_scalars": True}
    results = gradients(image_BD, text_BD, image_GD, text_GD, state, options, layout, **want)
    return [term.to(dtype) for term in terms], [value.to(dtype) for value in results]


@without_autocast
def reference_gradients(
    image_BD, text_BD, logit_scale, logit_bias, options: Options, layout: Layout
) -> tuple[list, list]:
    """As `blockwise_gradients`, by autograd through the definition. Collective: every rank calls."""
    dtype = accumulation_dtype(image_BD.dtype)
    with torch.enable_grad():
        leaves = [leaf.to(dtype).requires_grad_() for leaf in (image_BD, text_BD, logit_scale, logit_bias)]
        terms = reference_terms(*leaves, options, layout)
        d_image, d_text, d_scale, d_bias = torch.autograd.grad(terms[0], leaves)
    return [term.detach() for term in terms], [d_image, d_text, d_scale.reshape(()), d_bias.reshape(())]
