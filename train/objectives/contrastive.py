"""The contrastive terms that the objectives are put together from: the weak views' (CLIP's and HELIP's), and one between two views.

Shape letters: B rows of this rank, D embedding.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

import kernels
from train.config import TrainConfig
from train.distributed import RowLayout, mean_over_rows, sum_over_group
from train.loss import batch_loss, term_tensors
from train.objectives.objective import Outputs, Terms


@dataclass(frozen=True)
class Softmaxes:
    """Of each image over all texts and each text over all images, [B], logits: log-sum-exp without the positive, and the positive."""

    image_off_B: torch.Tensor
    text_off_B: torch.Tensor
    image_positive_B: torch.Tensor
    text_positive_B: torch.Tensor

    def cross_entropy_B(self) -> torch.Tensor:
        """Mean of both directions for each pair."""
        both = (self.image_off_B - self.image_positive_B, self.text_off_B - self.text_positive_B)
        return sum(softplus(margin_B) for margin_B in both) / 2


def softmaxes(
    config: TrainConfig, image_BD: torch.Tensor, text_BD: torch.Tensor, scale: torch.Tensor, layout: RowLayout
) -> Softmaxes:
    """Differentiable; with objective.legacy_gradients on several ranks, by each row as an anchor alone. Collective: every rank calls."""
    options = over_ranks(layout, config.loss.backend)
    if not has_legacy_gradients(config, layout):
        found = kernels.off_diagonal_log_sum_exp(image_BD, text_BD, scale, **options)
        positive_B = scale * (image_BD * text_BD).sum(1)
        return Softmaxes(found.rows_B, found.columns_B, positive_B, positive_B)
    # The other tower's rows were gathered without gradient.
    of_images = kernels.off_diagonal_log_sum_exp(image_BD, text_BD.detach(), scale, **options)
    of_texts = kernels.off_diagonal_log_sum_exp(image_BD.detach(), text_BD, scale, **options)
    image_positive_B = scale * (image_BD * text_BD.detach()).sum(1)
    text_positive_B = scale * (image_BD.detach() * text_BD).sum(1)
    return Softmaxes(of_images.rows_B, of_texts.columns_B, image_positive_B, text_positive_B)


def over_ranks(layout: RowLayout, backend: str) -> dict[str, Any]:
    """What an operation of `kernels` is told about the ranks; knowing their rows, it reads nothing from the device."""
    return {"process_group": layout.group, "rows_per_rank": layout.counts, "backend": backend}


def has_legacy_gradients(config: TrainConfig, layout: RowLayout) -> bool:
    """A single process never gathered, and had the exact gradient."""
    return config.objective.legacy_gradients and layout.world_size > 1


def view_loss(
    config: TrainConfig,
    image_BD: torch.Tensor,
    text_BD: torch.Tensor,
    scale: torch.Tensor,
    label_smoothing: float,
    layout: RowLayout,
) -> Terms:
    """The symmetric contrastive loss between a view of the images and one of the texts. Collective: every rank calls."""
    options = {"label_smoothing": label_smoothing, **over_ranks(layout, config.loss.backend)}
    if not has_legacy_gradients(config, layout):
        found = kernels.contrastive_loss(image_BD, text_BD, scale, **options)
        return Terms(found.loss, term_tensors(found))
    with torch.no_grad():
        values = term_tensors(kernels.contrastive_loss(image_BD, text_BD, scale, **options))
    return Terms(legacy_loss(config, image_BD, text_BD, scale, label_smoothing, layout), values)


def legacy_loss(
    config: TrainConfig,
    image_BD: torch.Tensor,
    text_BD: torch.Tensor,
    scale: torch.Tensor,
    label_smoothing: float,
    layout: RowLayout,
) -> torch.Tensor:
    """The same loss whose gradient by a row leaves out what it does as a candidate of others. Collective: every rank calls."""
    found = softmaxes(config, image_BD, text_BD, scale, layout)
    loss = mean_over_rows(found.cross_entropy_B(), layout)
    if not label_smoothing:
        return loss
    positives_B = (found.image_positive_B + found.text_positive_B) / 2
    uniform_B = scale * (image_BD @ mean_row(text_BD, layout) + text_BD @ mean_row(image_BD, layout)) / 2
    return loss + label_smoothing * mean_over_rows(positives_B - uniform_B, layout)


def mean_row(rows_BD: torch.Tensor, layout: RowLayout) -> torch.Tensor:
    """[D], without gradient. Collective: every rank calls."""
    return sum_over_group(rows_BD.detach().sum(0), layout.group) / layout.total


def weak_loss(
    config: TrainConfig, outputs: Outputs, scalars: tuple[torch.Tensor, ...], layout: RowLayout, share: float = 1.0
) -> Terms:
    """`share` times the recipe's loss of the weak views, and HELIP's margin with its whole weight: loss of the method + gamma * margin.

    Collective: every rank calls.
    """
    image_BD, text_BD = outputs["image"], outputs["text"]
    if has_legacy_gradients(config, layout):
        found = view_loss(config, image_BD, text_BD, scalars[0], config.loss.label_smoothing, layout)
        return Terms(share * found.loss, found.values)
    whole_margin = replace(config.loss, margin_weight=config.loss.margin_weight / share)
    found = batch_loss(replace(config, loss=whole_margin), image_BD, text_BD, scalars, layout.counts)
    return Terms(share * found.loss, term_tensors(found))


def softplus(x: torch.Tensor) -> torch.Tensor:
    # F.softplus turns linear at 20, which is wrong by 2e-9 there.
    return -F.logsigmoid(-x)
