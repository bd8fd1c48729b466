"""SLIP: CLIP's loss on the weak views, and SimCLR's between two strong views of each picture.

Source: Mu et al. 2021 (arXiv:2112.12750), section 3; SimCLR, Chen et al. 2020 (arXiv:2002.05709), equation 1.
Shape letters: B rows of this rank, D embedding.
"""

import torch
import torch.nn.functional as F

import kernels
from train.config import TrainConfig
from train.distributed import RowLayout, mean_over_rows
from train.objectives.contrastive import over_ranks, softplus, weak_loss
from train.objectives.heads import simclr_head
from train.objectives.objective import Encoded, Objective, Outputs, Terms, TowerWidths
from train.views import Views


class SlipObjective(Objective):
    """Loss: weak contrastive + ssl_weight * NT-Xent."""

    views = Views(strong_images=2)

    def __init__(self, config: TrainConfig, widths: TowerWidths) -> None:
        super().__init__(config, widths)
        self.image_mlp = simclr_head(widths.image_trunk, config.objective.head_width, config.objective.head_dim)

    def forward(self, encoded: Encoded, teacher: Outputs | None) -> Outputs:
        heads = [F.normalize(self.image_mlp(trunk), dim=-1) for trunk in encoded.image_trunk[1:]]
        views = {f"strong_image_{number}": head for number, head in enumerate(heads, 1)}
        return {"image": encoded.image[0], "text": encoded.text[0], **views}

    def loss(
        self,
        outputs: Outputs,
        encoded_scalars: tuple[torch.Tensor, ...],
        teacher_outputs: Outputs | None,
        layout: RowLayout,
    ) -> Terms:
        settings = self.config.objective
        weak = weak_loss(self.config, outputs, encoded_scalars, layout)
        simclr = nt_xent(
            outputs["strong_image_1"],
            outputs["strong_image_2"],
            settings.simclr_temperature,
            layout,
            backend=self.config.loss.backend,
        )
        loss = weak.loss + settings.ssl_weight * simclr
        return Terms(loss, {**weak.values, "loss": loss.detach(), "simclr": simclr.detach()})


def nt_xent(
    a_BD: torch.Tensor, b_BD: torch.Tensor, temperature: float, layout: RowLayout, *, backend: str = "auto"
) -> torch.Tensor:
    """Mean over all ranks' rows of both views of the cross entropy of a row's other view among all rows of both but itself, in nats, 0-d.

    a_BD, b_BD: unit rows, one for each picture of this rank. Collective, backward too: every rank calls.
    """
    # Filled on the device: a copy of a number would make the host wait.
    scale = a_BD.new_full((), 1 / temperature)
    options = over_ranks(layout, backend)
    across = kernels.off_diagonal_log_sum_exp(a_BD, b_BD, scale, **options)
    within_a_B, within_b_B = (
        kernels.off_diagonal_log_sum_exp(rows_BD, None, scale, **options).rows_B for rows_BD in (a_BD, b_BD)
    )
    positive_B = scale * (a_BD * b_BD).sum(1)
    of_a_B = softplus(torch.logaddexp(across.rows_B, within_a_B) - positive_B)
    of_b_B = softplus(torch.logaddexp(across.columns_B, within_b_B) - positive_B)
    return mean_over_rows((of_a_B + of_b_B) / 2, layout)
