"""CLIP's objective: the loss of train/loss.py on the weak views, without heads."""

import torch

from train.distributed import RowLayout
from train.objectives.contrastive import weak_loss
from train.objectives.objective import Encoded, Objective, Outputs, Terms


class ClipObjective(Objective):
    """The contrastive or sigmoid loss of the recipe, HELIP's margin included."""

    def forward(self, encoded: Encoded, teacher: Outputs | None) -> Outputs:
        return {"image": encoded.image[0], "text": encoded.text[0]}

    def loss(
        self,
        outputs: Outputs,
        encoded_scalars: tuple[torch.Tensor, ...],
        teacher_outputs: Outputs | None,
        layout: RowLayout,
    ) -> Terms:
        return weak_loss(self.config, outputs, encoded_scalars, layout)
