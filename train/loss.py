"""The loss of a step over the rows of all ranks, as the recipe names it.

In: this rank's features and the scalars that the model learns, as `TwoTowers` gives them. Out: terms, or terms and gradients of features
and scalars (for feature caching), from `kernels`.

Shape letters: B rows of this rank, D embedding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

import kernels
from train.config import TrainConfig
from train.distributed import world_group

Terms = kernels.ContrastiveOutput | kernels.SigmoidOutput


@dataclass(frozen=True)
class BatchGradients:
    """A step's terms, and the gradients of `terms.loss` by this rank's features [B, D] (times the world size) and by each scalar."""

    terms: Terms
    d_image_BD: torch.Tensor
    d_text_BD: torch.Tensor
    d_scalars: tuple[torch.Tensor, ...]


def batch_loss(
    config: TrainConfig,
    image_BD: torch.Tensor,
    text_BD: torch.Tensor,
    scalars: Sequence[torch.Tensor],
    rows_per_rank: Sequence[int] = (),
) -> Terms:
    """The differentiable loss of all ranks' rows; scalars: scale, and bias with the sigmoid loss; rows_per_rank as in `RankBatch`.

    Collective: every rank calls.
    """
    operation = kernels.sigmoid_contrastive_loss if config.loss.kind == "sigmoid" else kernels.contrastive_loss
    return operation(image_BD, text_BD, *scalars, rows_per_rank=rows_per_rank, **_options(config))


def batch_gradients(
    config: TrainConfig,
    image_BD: torch.Tensor,
    text_BD: torch.Tensor,
    scalars: Sequence[torch.Tensor],
    rows_per_rank: Sequence[int] = (),
) -> BatchGradients:
    """The same loss with its gradients, without autograd. Collective: every rank calls."""
    options = {"rows_per_rank": rows_per_rank, **_options(config)}
    if config.loss.kind == "sigmoid":
        found = kernels.sigmoid_contrastive_gradients(image_BD, text_BD, *scalars, **options)
        d_scalars = (found.d_logit_scale, found.d_logit_bias)
    else:
        found = kernels.contrastive_gradients(image_BD, text_BD, *scalars, **options)
        d_scalars = (found.d_logit_scale,)
    return BatchGradients(found.terms, found.d_image_BD, found.d_text_BD, d_scalars)


def term_tensors(terms: Terms) -> dict[str, torch.Tensor]:
    """Every term by its name, 0-d, detached."""
    return {field.name: getattr(terms, field.name).detach() for field in fields(terms)}


def term_values(terms: Terms) -> dict[str, float]:
    """Every term by its name."""
    return {name: tensor.item() for name, tensor in term_tensors(terms).items()}


def _options(config: TrainConfig) -> dict[str, Any]:
    common = {"process_group": world_group(), "backend": config.loss.backend}
    if config.loss.kind == "sigmoid":
        return common
    return {
        **common,
        "hard_per_anchor": config.data.hard_per_anchor,
        "margin_weight": config.loss.margin_weight,
        "margin_space": config.loss.margin_space,
        "margin_direction": config.loss.margin_direction,
        "label_smoothing": config.loss.label_smoothing,
    }
