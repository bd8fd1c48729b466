"""CLIP-rocket's loss: CLIP's on the weak views, and the same between all strong views, with heads and a temperature of their own.

Source: Fini et al. 2023 (arXiv:2305.08675). L = (weak + A * strong) / (1 + A) for A strong views; strong: the mean over the A^2 pairs of an
image view and a text view.
"""

import math

import torch
import torch.nn.functional as F

from train.config import TrainConfig
from train.distributed import RowLayout
from train.objectives.contrastive import view_loss, weak_loss
from train.objectives.heads import simclr_head
from train.objectives.objective import Encoded, Objective, Outputs, Terms, TowerWidths
from train.views import Views


class Cl2lObjective(Objective):
    """Weak views through the model's projections, strong ones through heads on the trunks. Methods built on it add `own_term`."""

    temperatures = ("l2l_logit_scale",)
    own_name = ""
    """name of the own term in metrics"""

    def __init__(self, config: TrainConfig, widths: TowerWidths) -> None:
        super().__init__(config, widths)
        settings = config.objective
        self.num_views = settings.num_strong_views
        self.views = Views(self.num_views, self.num_views)
        self.l2l_image_projector = simclr_head(widths.image_trunk, settings.head_width, settings.head_dim)
        self.l2l_text_projector = simclr_head(widths.text_trunk, settings.head_width, settings.head_dim)
        self.l2l_logit_scale = torch.nn.Parameter(torch.tensor([-math.log(settings.strong_temperature)]))

    def forward(self, encoded: Encoded, teacher: Outputs | None) -> Outputs:
        outputs = {"image": encoded.image[0], "text": encoded.text[0], "strong_scale": self.scale("l2l_logit_scale")}
        towers = (
            ("image", self.l2l_image_projector, encoded.image_trunk),
            ("text", self.l2l_text_projector, encoded.text_trunk),
        )
        for tower, head, trunks in towers:
            for number, trunk in enumerate(trunks[1:], 1):
                outputs[f"strong_{tower}_{number}"] = F.normalize(head(trunk), dim=-1)
        return outputs

    def loss(
        self,
        outputs: Outputs,
        encoded_scalars: tuple[torch.Tensor, ...],
        teacher_outputs: Outputs | None,
        layout: RowLayout,
    ) -> Terms:
        settings = self.config.objective
        share = (2 if settings.reduction == "sum" else 1) / (1 + self.num_views)
        weak = weak_loss(self.config, outputs, encoded_scalars, layout, share)
        strong = self._strong(outputs, layout)
        loss = weak.loss + share * self.num_views * strong.loss
        values = {**weak.values, **strong.values}
        own = self.own_term(outputs, teacher_outputs, layout)
        if own is not None:
            loss, values[self.own_name] = loss + settings.ssl_weight * own, own.detach()
        return Terms(loss, {**values, "loss": loss.detach()})

    def own_term(self, outputs: Outputs, teacher_outputs: Outputs | None, layout: RowLayout) -> torch.Tensor | None:
        """What a method adds, before ssl_weight, 0-d, differentiable; None: nothing. Collective: every rank calls."""
        return None

    def strong_views(self, outputs: Outputs, tower: str) -> list[torch.Tensor]:
        """Unit rows [B, head_dim] of "image" or "text", a tensor for each strong view."""
        return [outputs[f"strong_{tower}_{number}"] for number in range(1, 1 + self.num_views)]

    def _strong(self, outputs: Outputs, layout: RowLayout) -> Terms:
        """The mean over pairs of strong views. Collective: every rank calls."""
        smoothing, scale = self.config.objective.strong_label_smoothing, outputs["strong_scale"]
        pairs = [
            view_loss(self.config, image_BD, text_BD, scale, smoothing, layout)
            for image_BD in self.strong_views(outputs, "image")
            for text_BD in self.strong_views(outputs, "text")
        ]
        values = {
            f"strong_{name}": torch.stack([pair.values[name] for pair in pairs]).mean()
            for name in ("contrastive", "image_accuracy", "text_accuracy")
        }
        return Terms(torch.stack([pair.loss for pair in pairs]).mean(), values)
