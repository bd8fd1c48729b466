"""How a loss becomes operations of torch.library, so that torch.compile takes it whole: `hardpair::<name>`, forward,
and `hardpair::<name>_gradients`.

In: what one loss computes, as plain functions. Out: the forward operation, differentiable once. Between the two flows
what the gradients need: the rows of all ranks, O(B + G) numbers, and on the host the ranks' row counts. Numbers that come
from the device stay there: neither pass waits for it, except where ranks compare what they were given.

Shape letters: `B` rows of this rank, `G` rows of all ranks, `D` embedding, `W` ranks, `T` terms, `N` any number.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.rows.checks import choose_backend
from kernels.rows.function import (
    Layout,
    Towers,
    find_layout,
    gather_towers,
    group_named,
    known_layout,
    name_of,
    world_size_of,
)
from kernels.rows.gradient import Wanted
from kernels.rows.precision import accumulation_dtype, without_autocast
from kernels.rows.reference import reference_gradients, reference_terms
from kernels.rows.scalars import device_scalar, positive_or_nan

SCHEMA_TYPES = {int: "int", float: "float", str: "str"}
NAMESPACE = "hardpair"


@dataclass(frozen=True)
class Loss:
    """What `register` needs to know of a loss.

    scalars: names of its 0-d or [1] inputs, "logit_scale" first. num_terms: the loss and what is reported beside it.
    options: frozen dataclass of int, float and str fields, `backend` among them, with `group_rows` and `agreed`.
    definition(image_GD, text_GD, *scalars, options) -> T terms, for backend "reference".
    forward(towers, 0-d float64 scalars, options, layout) -> (T terms in float64, state_N float64).
    gradients(towers, state_N, options, layout, wanted) -> [d_image_BD, d_text_BD, one for each scalar], None where
        unwanted, in the accumulation dtype.
    state_length(B, G, options): length of what forward hands to gradients.
    """

    name: str
    scalars: tuple[str, ...]
    num_terms: int
    options: type
    definition: Callable[..., Sequence[Tensor]]
    forward: Callable[[Towers, list[Tensor], Any, Layout], tuple[list[Tensor], Tensor]]
    gradients: Callable[[Towers, Tensor, Any, Layout, Wanted], list[Tensor | None]]
    state_length: Callable[[int, int, Any], int]

    def layout(
        self, inputs: Sequence[Tensor], options: Any, process_group: Any, rows_per_rank: Sequence[int]
    ) -> Layout:
        """`find_layout` for the rows and scalars of a call. Collective: every rank calls."""
        scalars = dict(zip(self.scalars, inputs[2:], strict=True))
        return find_layout(inputs[0], scalars, options, process_group, rows_per_rank)


@dataclass(frozen=True)
class Operations:
    """A registered loss and its two operations."""

    loss: Loss
    forward: Callable[..., tuple[Tensor, ...]]
    gradients: Callable[..., list[Tensor]]

    def terms(
        self, inputs: Sequence[Tensor], options: Any, process_group: Any, rows_per_rank: Sequence[int]
    ) -> list[Tensor]:
        """The terms, the differentiable loss first; rows_per_rank may be empty, and the definition takes
        no notice of it. Collective: every rank calls."""
        if options.backend == "reference":
            layout = self.loss.layout(inputs, options, process_group, ())
            return reference_terms(*inputs, definition=partial(self.loss.definition, options=options), layout=layout)
        loss, details_T, *_ = self.forward(*inputs, *values_of(options), name_of(process_group), rows_per_rank)
        return [loss, *details_T.unbind()]

    def terms_and_gradients(
        self, inputs: Sequence[Tensor], options: Any, process_group: Any, rows_per_rank: Sequence[int]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The terms and the gradient by each input, without autograd. Collective: every rank calls."""
        inputs = [value.detach() for value in inputs]
        if options.backend == "reference":
            layout = self.loss.layout(inputs, options, process_group, ())
            definition = partial(self.loss.definition, options=options)
            return reference_gradients(*inputs, definition=definition, layout=layout)
        settings = (*values_of(options), name_of(process_group), rows_per_rank)
        loss, details_T, *kept = self.forward(*inputs, *settings)
        gradients = self.gradients(torch.ones_like(loss), *inputs[:2], *kept, True, True, True, *settings)
        return [loss, *details_T.unbind()], gradients


def values_of(options: Any) -> list[int | float | str]:
    return [getattr(options, field.name) for field in fields(options)]


def register(loss: Loss) -> Operations:
    """Define the operations of `loss`, once a process."""
    settings = [f"{SCHEMA_TYPES[field.type]} {field.name}" for field in fields(loss.options)]
    settings += ["str group_name", "SymInt[] rows_per_rank"]
    scalars = [f"Tensor {name}" for name in loss.scalars]
    forward = torch.library.custom_op(
        f"{NAMESPACE}::{loss.name}",
        _forward_of(loss),
        mutates_args=(),
        schema=f"({', '.join(['Tensor image_BD', 'Tensor text_BD', *scalars, *settings])}) -> "
        "(Tensor loss, Tensor details_T, Tensor image_GD, Tensor text_GD, Tensor state_N, Tensor counts_W)",
    )
    kept = ["Tensor d_loss", *(f"Tensor {name}" for name in ("image_BD", "text_BD", "image_GD", "text_GD"))]
    kept += ["Tensor state_N", "Tensor counts_W", "bool want_image", "bool want_text", "bool want_scalars"]
    gradients = torch.library.custom_op(
        f"{NAMESPACE}::{loss.name}_gradients",
        _gradients_of(loss),
        mutates_args=(),
        schema=f"({', '.join([*kept, *settings])}) -> Tensor[]",
    )
    forward.register_fake(_fake_forward_of(loss))
    gradients.register_fake(_fake_gradients_of(loss))
    forward.register_autograd(_backward_of(loss, gradients), setup_context=_keep_for_backward)
    gradients.register_autograd(_refuse_second_derivative(loss))
    return Operations(loss, forward, gradients)


def _forward_of(loss: Loss) -> Callable[..., tuple[Tensor, ...]]:
    @without_autocast
    def forward(image_BD, text_BD, *rest):
        scalars, (*values, group_name, rows_per_rank) = rest[: len(loss.scalars)], rest[len(loss.scalars) :]
        options = _chosen(loss, values, image_BD)
        layout = loss.layout((image_BD, text_BD, *scalars), options, group_named(group_name), rows_per_rank)
        towers = gather_towers(image_BD, text_BD, layout)
        scale, *others = (device_scalar(value, image_BD.device) for value in scalars)
        terms, state_N = loss.forward(towers, [positive_or_nan(scale), *others], options, layout)
        terms_T = torch.stack(terms).to(accumulation_dtype(image_BD.dtype))
        # An operation must not return its own input: without a group, nothing stands for the rows of all ranks.
        gathered = (towers.image_GD, towers.text_GD) if group_name else (image_BD.new_empty(0) for _ in range(2))
        counts_W = torch.tensor(layout.counts, dtype=torch.int64, device="cpu")
        return terms_T[0].clone(), terms_T[1:].clone(), *gathered, state_N, counts_W

    return forward


def _fake_forward_of(loss: Loss) -> Callable[..., tuple[Tensor, ...]]:
    def fake(image_BD, text_BD, *rest):
        *values, group_name, rows_per_rank = rest[len(loss.scalars) :]
        terms_T = image_BD.new_empty(loss.num_terms, dtype=accumulation_dtype(image_BD.dtype))
        num_rows, dim = image_BD.shape
        if group_name and not rows_per_rank:
            # Other ranks may have other numbers of rows: known when the operation runs.
            context = torch.library.get_ctx()
            num_all, length = context.new_dynamic_size(), context.new_dynamic_size()
        else:
            num_all = sum(rows_per_rank) if rows_per_rank else num_rows
            length = loss.state_length(num_rows, num_all, loss.options(*values))
        gathered = [image_BD.new_empty((num_all, dim) if group_name else 0) for _ in range(2)]
        state_N = image_BD.new_empty(length, dtype=torch.float64)
        counts_W = torch.empty(world_size_of(group_name), dtype=torch.int64, device="cpu")
        return terms_T.new_empty(()), terms_T[1:].clone(), *gathered, state_N, counts_W

    return fake


def _gradients_of(loss: Loss) -> Callable[..., list[Tensor]]:
    @without_autocast
    def gradients(d_loss, image_BD, text_BD, image_GD, text_GD, state_N, counts_W, *rest):
        wanted, (*values, group_name, _) = Wanted(*rest[:3]), rest[3:]
        options = _chosen(loss, values, image_BD)
        layout = known_layout(tuple(counts_W.tolist()), group_name)
        gathered = (image_GD, text_GD) if group_name else (image_BD, text_BD)
        results = loss.gradients(Towers(image_BD, text_BD, *gathered), state_N, options, layout, wanted)
        return [d.mul_(d_loss) for d in results if d is not None]

    return gradients


def _fake_gradients_of(loss: Loss) -> Callable[..., list[Tensor]]:
    def fake(d_loss, image_BD, text_BD, image_GD, text_GD, state_N, counts_W, *rest):
        want_image, want_text, want_scalars = rest[:3]
        shapes = [image_BD.shape] * (want_image + want_text) + [()] * (len(loss.scalars) * want_scalars)
        return [image_BD.new_empty(shape, dtype=accumulation_dtype(image_BD.dtype)) for shape in shapes]

    return fake


def _keep_for_backward(ctx, inputs, output) -> None:
    _, details_T, *kept = output
    ctx.mark_non_differentiable(details_T, *kept)
    # The default would make zeros of the size of all ranks' rows.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:2], *kept)
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    ctx.inputs_like = [(value.dtype, value.shape) for value in tensors]
    ctx.settings = inputs[len(tensors) :]


def _backward_of(loss: Loss, operation: Callable[..., list[Tensor]]) -> Callable[..., tuple[Tensor | None, ...]]:
    def backward(ctx, d_loss, *_):
        if d_loss is None:
            return (None,) * (len(ctx.inputs_like) + len(ctx.settings))
        needs = ctx.needs_input_grad[: len(ctx.inputs_like)]
        flags = (*needs[:2], any(needs[2:]))
        results = operation(d_loss, *ctx.saved_tensors, *flags, *ctx.settings)[::-1]
        gradients = []
        for flag, need, (dtype, shape) in zip(
            (*flags[:2], *flags[2:] * len(loss.scalars)), needs, ctx.inputs_like, strict=True
        ):
            # One at a time, so that at most one is there in two dtypes.
            value = results.pop() if flag else None
            # A scalar may be [1]; the features' gradients are in shape, and stay no view of anything.
            gradients.append((value if value.dim() else value.reshape(shape)).to(dtype) if need else None)
        return *gradients, *(None for _ in ctx.settings)

    return backward


def _refuse_second_derivative(loss: Loss) -> Callable[..., None]:
    def backward(ctx, *_):
        raise RuntimeError(
            f"{loss.name} can be differentiated once: its gradients have no derivative. "
            "For second derivatives use backend='reference'"
        )

    return backward


def _chosen(loss: Loss, values: Sequence[Any], image_BD: Tensor) -> Any:
    """The options with the backend that runs in place of "auto"."""
    options = loss.options(*values)
    return options.on(choose_backend(loss.name, options.backend, image_BD.device.type))
