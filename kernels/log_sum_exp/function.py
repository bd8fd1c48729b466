"""The off-diagonal log-sum-exps over a process group, from the sweeps of the contrastive loss.

On the wire, forward: the rows of all ranks, and O(G) numbers of the columns. Backward: of each row its log-sum-exps and
their upstream gradients, four numbers. With those a rank forms the gradients of its own rows alone.

Shape letters: `B` rows of this rank, `G` rows of all ranks, `D` embedding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.contrastive import blockwise
from kernels.contrastive.function import reduce_columns
from kernels.contrastive.state import Options
from kernels.log_sum_exp.reference import log_sum_exp_reference
from kernels.rows.checks import choose_backend
from kernels.rows.function import (
    Layout,
    every_row,
    find_layout,
    gather_rows,
)
from kernels.rows.precision import accumulation_dtype, without_autocast
from kernels.rows.scalars import device_scalar, positive_or_nan


@dataclass(frozen=True)
class _Call:
    """What a sweep refers to beside rows."""

    scale: Tensor
    options: Options
    layout: Layout

    @property
    def settings(self) -> dict:
        return {
            "scale": self.scale,
            "offset": self.layout.offset,
            "hinges": blockwise.Hinges(1, None, None),
            "row_tile": self.options.row_tile,
            "column_tile": self.options.column_tile,
        }


@without_autocast
def log_sum_exps(
    x_BD: Tensor,
    y_BD: Tensor | None,
    logit_scale: Tensor,
    options: Options,
    process_group,
    rows_per_rank: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """(rows_B, columns_B); y_BD None: x_BD itself, and both are one tensor. rows_per_rank may be empty. Collective: every
    rank calls."""
    chosen = choose_backend("off_diagonal_log_sum_exp", options.backend, x_BD.device.type)
    layout = find_layout(x_BD, {"logit_scale": logit_scale}, options, process_group, rows_per_rank)
    call = _Call(positive_or_nan(device_scalar(logit_scale, x_BD.device)), options.on(chosen), layout)
    if layout.total < 2:
        raise ValueError("off_diagonal_log_sum_exp needs at least 2 rows over all ranks, but there is 1")
    if chosen == "reference":
        return _whole(x_BD, y_BD, logit_scale, layout)
    if y_BD is None:
        rows_B = _OfItself.apply(x_BD, logit_scale, call)
        return rows_B, rows_B
    return _OfTwo.apply(x_BD, y_BD, logit_scale, call)


# What torch.compiler.disable sets; calling it here would import the compiler, and Triton, with this module.
log_sum_exps._torchdynamo_disable = True


def _whole(x_BD: Tensor, y_BD: Tensor | None, logit_scale: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """By the definition over all rows, of which this rank's are returned."""
    x_GD = every_row(x_BD, layout)
    y_GD = x_GD if y_BD is None else every_row(y_BD, layout)
    rows_G, columns_G = log_sum_exp_reference(x_GD, y_GD, logit_scale)
    rows_B = rows_G[layout.own]
    return rows_B, rows_B if y_BD is None else columns_G[layout.own]


class _OfTwo(torch.autograd.Function):
    """(x_BD, y_BD, logit_scale, call) -> (rows_B, columns_B)."""

    @staticmethod
    def forward(ctx, x_BD, y_BD, logit_scale, call):
        x_BD, y_BD = x_BD.detach(), y_BD.detach()
        dtype, layout = accumulation_dtype(x_BD.dtype), call.layout
        y_GD = gather_rows(y_BD, layout)
        stats = call.options.sweeps.forward_sweep(x_BD, y_GD, **call.settings)
        rows_B = blockwise.log_sum_exp(stats.row_max_B, stats.row_sum_B, call.scale, dtype)
        columns_B = reduce_columns(stats, call.scale, layout, dtype)[0]
        ctx.call, ctx.scale_like = call, (logit_scale.dtype, logit_scale.shape)
        # One rank alone needs the gradient of all rows of y, which are its own, from the same sweep.
        x_GD = gather_rows(x_BD, layout) if layout.world_size > 1 and ctx.needs_input_grad[1] else None
        ctx.save_for_backward(x_BD, y_BD, x_GD, y_GD, rows_B, columns_B)
        return rows_B.to(dtype), columns_B.to(dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_rows_B, d_columns_B):
        x_BD, y_BD, x_GD, y_GD, rows_B, columns_B = ctx.saved_tensors
        call, one_rank = ctx.call, ctx.call.layout.world_size == 1
        want_x, want_y, want_scale = ctx.needs_input_grad[:3]
        rows = _Terms.of(rows_B, d_rows_B, call.layout)
        columns = _Terms.of(columns_B, d_columns_B, call.layout)
        d_x = d_y = d_scale = None
        if want_x or want_scale or (want_y and one_rank):
            wanted = (want_x, want_y and one_rank, want_scale)
            d_x, d_y, d_scale = _gradients(x_BD, y_GD, rows, columns, call, *wanted)
        if want_y and not one_rank:
            d_y, _, _ = _gradients(y_BD, x_GD, columns, rows, call, True, False, False)
        return (
            d_x.to(x_BD.dtype) if want_x else None,
            d_y.to(y_BD.dtype) if want_y else None,
            _like(d_scale, ctx.scale_like) if want_scale else None,
            None,
        )


class _OfItself(torch.autograd.Function):
    """(x_BD, logit_scale, call) -> rows_B: columns are rows, one product forward, and two back on any number of ranks."""

    @staticmethod
    def forward(ctx, x_BD, logit_scale, call):
        x_BD = x_BD.detach()
        dtype, layout = accumulation_dtype(x_BD.dtype), call.layout
        x_GD = gather_rows(x_BD, layout)
        stats = call.options.sweeps.forward_sweep(x_BD, x_GD, **call.settings)
        rows_B = blockwise.log_sum_exp(stats.row_max_B, stats.row_sum_B, call.scale, dtype)
        ctx.call, ctx.scale_like = call, (logit_scale.dtype, logit_scale.shape)
        ctx.save_for_backward(x_BD, x_GD, rows_B)
        return rows_B.to(dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_rows_B):
        x_BD, x_GD, rows_B = ctx.saved_tensors
        want_x, want_scale = ctx.needs_input_grad[:2]
        terms = _Terms.of(rows_B, d_rows_B, ctx.call.layout)
        d_x, _, d_scale = _gradients(x_BD, x_GD, terms, terms, ctx.call, want_x, False, want_scale)
        # Over all ranks the sum meets each log-sum-exp twice, as a row and as a column.
        return (
            d_x.to(x_BD.dtype) if want_x else None,
            _like(d_scale / 2, ctx.scale_like) if want_scale else None,
            None,
        )


@dataclass(frozen=True)
class _Terms:
    """Log-sum-exps of this rank's and of all ranks' rows (or columns), and the loss's derivatives by them, float64."""

    own_B: Tensor
    all_G: Tensor
    weight_B: Tensor
    weight_G: Tensor

    @classmethod
    def of(cls, lse_B: Tensor, d_lse_B: Tensor, layout: Layout) -> "_Terms":
        """Collective: every rank calls."""
        every_G2 = gather_rows(torch.stack([lse_B, d_lse_B.double()], 1), layout)
        # About one for a mean over rows: small numbers would be lost in 16-bit weights.
        weight_G = every_G2[:, 1] * layout.total
        return cls(every_G2[layout.own, 0], every_G2[:, 0].contiguous(), weight_G[layout.own], weight_G)


def _gradients(
    own_BD: Tensor,
    all_GD: Tensor,
    rows: _Terms,
    columns: _Terms,
    call: _Call,
    want_x: bool,
    want_y: bool,
    want_sum: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    d_x, d_y, moment = call.options.sweeps.gradient_sweep(
        own_BD,
        all_GD,
        **call.settings,
        row_lse_B=rows.own_B,
        column_lse_G=columns.all_G,
        row_weight_B=rows.weight_B,
        column_weight_G=columns.weight_G,
        hinge_weight=0.0,
        want_x=want_x,
        want_y=want_y,
        want_scale=want_sum,
        cosine_origin=0.0,
        **call.options.gradient_settings,
    )
    for gradient in (d_x, d_y):
        if gradient is not None:
            gradient.mul_(call.scale / call.layout.total)
    return d_x, d_y, moment / call.layout.total


def _like(value: Tensor, like: tuple[torch.dtype, torch.Size]) -> Tensor:
    dtype, shape = like
    return value.to(dtype).reshape(shape)
