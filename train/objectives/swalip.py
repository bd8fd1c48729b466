"""SwALIP: CLIP-rocket's loss and swapped assignments between its strong views, with the other modality's rows as prototypes.

A view's softmax over all rows of the other modality is held against the balanced assignment (Sinkhorn) of the other views.
Source: Fini et al. 2023 (arXiv:2305.08675); SwAV, Caron et al. 2020 (arXiv:2006.09882), section 3.

Shape letters: B rows of this rank, G rows of all ranks, D embedding.
"""

from typing import Any

import torch

from train.distributed import RowLayout, mean_over_rows, rows_of_all_ranks, sum_over_group
from train.objectives.cl2l import Cl2lObjective
from train.objectives.contrastive import has_legacy_gradients, softmaxes
from train.objectives.objective import Outputs


class SwalipObjective(Cl2lObjective):
    """Adds swap_scale times the swapped assignments' cross entropy; assignments carry no gradient. No heads of its own."""

    own_name = "swapped"

    def own_term(self, outputs: Outputs, teacher_outputs: Outputs | None, layout: RowLayout) -> torch.Tensor:
        """Holds 2 * A^2 matrices [B, G]: the assignments, for the backward pass."""
        views = {tower: self.strong_views(outputs, tower) for tower in ("image", "text")}
        every = {tower: [self._every_row(rows, layout) for rows in views[tower]] for tower in views}
        numbers, scale, losses = range(self.num_views), outputs["strong_scale"], []
        for image in numbers:
            for text in numbers:
                other_image, other_text = self.num_views - 1 - image, self.num_views - 1 - text
                found = softmaxes(self.config, views["image"][image], views["text"][text], scale, layout)
                of_images_BG = self._assignments(views["image"][other_image], every["text"][other_text], layout.group)
                of_texts_BG = self._assignments(views["text"][other_text], every["image"][other_image], layout.group)
                # Cross entropy of an assignment q: log-sum-exp - sum_j q_j * logit_j, since q sums to one.
                image_mean_BD, text_mean_BD = of_texts_BG @ every["image"][image], of_images_BG @ every["text"][text]
                losses += [
                    torch.logaddexp(found.image_off_B, found.image_positive_B)
                    - scale * (views["image"][image] * text_mean_BD).sum(1),
                    torch.logaddexp(found.text_off_B, found.text_positive_B)
                    - scale * (views["text"][text] * image_mean_BD).sum(1),
                ]
        return self.config.objective.swap_scale * mean_over_rows(torch.stack(losses).mean(0), layout)

    def _every_row(self, rows_BD: torch.Tensor, layout: RowLayout) -> torch.Tensor:
        """Collective: every rank calls."""
        rows_GD = rows_of_all_ranks(rows_BD, layout)
        return rows_GD.detach() if has_legacy_gradients(self.config, layout) else rows_GD

    @torch.no_grad()
    def _assignments(self, rows_BD: torch.Tensor, prototypes_GD: torch.Tensor, group: Any) -> torch.Tensor:
        settings = self.config.objective
        return sinkhorn(rows_BD @ prototypes_GD.T, settings.sinkhorn_epsilon, settings.sinkhorn_iterations, group)


def sinkhorn(cosine_BG: torch.Tensor, epsilon: float, iterations: int, group: Any) -> torch.Tensor:
    """Assignments [B, G] of this rank's rows: exp(cosine / epsilon), its columns (over all ranks) and rows scaled to equal sums in turn.

    Each row sums to one; columns do so too in the limit. cosine_BG is overwritten. Collective: every rank calls.
    """
    assignment_BG = cosine_BG.sub_(1).div_(epsilon).exp_()
    for _ in range(iterations):
        assignment_BG /= sum_over_group(assignment_BG.sum(0), group)
        assignment_BG /= assignment_BG.sum(1, keepdim=True)
    return assignment_BG
