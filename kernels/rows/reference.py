"""A loss's definition over the rows of all ranks, formed whole on every rank: terms by autograd's own rules.

Shape letters: `B` rows of this rank, `G` rows of all ranks, `D` embedding.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels.rows.function import Layout, rows_of_all_ranks
from kernels.rows.precision import accumulation_dtype, without_autocast


@without_autocast
def reference_terms(
    image_BD: Tensor, text_BD: Tensor, *scalars: Tensor, definition: Callable[..., Sequence[Tensor]], layout: Layout
) -> list[Tensor]:
    """definition(image_GD, text_GD, *scalars), all but the loss detached. Collective: every rank calls."""
    towers = [rows_of_all_ranks(own_BD, layout) for own_BD in (image_BD, text_BD)]
    loss, *others = definition(*towers, *scalars)
    return [loss, *(term.detach() for term in others)]


@without_autocast
def reference_gradients(
    image_BD: Tensor, text_BD: Tensor, *scalars: Tensor, definition: Callable[..., Sequence[Tensor]], layout: Layout
) -> tuple[list[Tensor], list[Tensor]]:
    """(terms, gradient by each input) in the accumulation dtype. Collective: every rank calls."""
    dtype = accumulation_dtype(image_BD.dtype)
    with torch.enable_grad():
        leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in (image_BD, text_BD, *scalars)]
        terms = reference_terms(*leaves, definition=definition, layout=layout)
        d_image, d_text, *d_scalars = torch.autograd.grad(terms[0], leaves)
    return [term.detach() for term in terms], [d_image, d_text, *(d.reshape(()) for d in d_scalars)]
