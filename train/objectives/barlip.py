"""BarLIP: CLIP-rocket's loss and a cross-modal Barlow Twins, the cross-correlations of projected pictures and captions driven to identity.

Source: Fini et al. 2023 (arXiv:2305.08675); Barlow Twins, Zbontar et al. 2021 (arXiv:2103.03230), equation 1.
Shape letters: B rows of this rank, F features.
"""

import torch

from train.config import TrainConfig
from train.distributed import RowLayout, sum_over_group
from train.objectives.cl2l import Cl2lObjective
from train.objectives.heads import barlow_projector
from train.objectives.objective import Encoded, Outputs, TowerWidths

# Rows of the correlation matrix that exist at a time.
FEATURE_TILE = 1024


class BarlipObjective(Cl2lObjective):
    """Projectors are shared between weak and strong views unless objective.separate_heads."""

    own_name = "barlow"

    def __init__(self, config: TrainConfig, widths: TowerWidths) -> None:
        super().__init__(config, widths)
        settings = config.objective
        strengths = ("weak", "strong") if settings.separate_heads else ("weak",)
        trunks = {"image": widths.image_trunk, "text": widths.text_trunk}
        self.barlow_projectors = torch.nn.ModuleDict(
            {
                f"{tower}_{strength}": barlow_projector(width, settings.barlow_width, settings.barlow_dim)
                for tower, width in trunks.items()
                for strength in strengths
            }
        )

    def forward(self, encoded: Encoded, teacher: Outputs | None) -> Outputs:
        outputs = super().forward(encoded, teacher)
        for tower, trunks in (("image", encoded.image_trunk), ("text", encoded.text_trunk)):
            for number, trunk in enumerate(trunks):
                name = f"{tower}_strong" if number and f"{tower}_strong" in self.barlow_projectors else f"{tower}_weak"
                outputs[f"{tower}_projection_{number}"] = self.barlow_projectors[name](trunk)
        return outputs

    def own_term(self, outputs: Outputs, teacher_outputs: Outputs | None, layout: RowLayout) -> torch.Tensor:
        """barlow_scale times the mean over the weak pair and all pairs of strong views."""
        strong = range(1, 1 + self.num_views)
        pairs = [(0, 0), *((image, text) for image in strong for text in strong)]
        settings = self.config.objective
        losses = [
            barlow_twins(
                outputs[f"image_projection_{image}"],
                outputs[f"text_projection_{text}"],
                settings.barlow_off_diagonal,
                layout,
                legacy_gradients=settings.legacy_gradients,
            )
            for image, text in pairs
        ]
        return settings.barlow_scale * torch.stack(losses).mean()


def barlow_twins(
    x_BF: torch.Tensor, y_BF: torch.Tensor, off_diagonal: float, layout: RowLayout, *, legacy_gradients: bool = False
) -> torch.Tensor:
    """sum_i (C_ii - 1)^2 + off_diagonal * sum over i != j of C_ij^2 for C = x.T @ y / rows, over the rows of all ranks; 0-d.

    x_BF, y_BF: batch-normalised features. legacy_gradients: 1 / ranks of the exact gradient, as where the reduction of C passes none on.
    Memory: a strip of C, its gradients are formed with it. Collective, forward only: every rank calls.
    """
    return _BarlowTwins.apply(x_BF, y_BF, off_diagonal, layout, legacy_gradients)


class _BarlowTwins(torch.autograd.Function):
    """The gradient by a strip of C is known as soon as the strip is: C is formed and reduced once, and never whole."""

    @staticmethod
    def forward(ctx, x_BF, y_BF, off_diagonal, layout, legacy_gradients):
        with torch.autocast(x_BF.device.type, enabled=False):
            x_BF, y_BF = x_BF.detach(), y_BF.detach()
            d_x_BF, d_y_BF = torch.empty_like(x_BF), torch.zeros_like(y_BF)
            loss = x_BF.new_zeros(())
            for first in range(0, x_BF.shape[1], FEATURE_TILE):
                strip = slice(first, min(first + FEATURE_TILE, x_BF.shape[1]))
                correlation = sum_over_group(x_BF[:, strip].T @ y_BF, layout.group).div_(layout.total)
                own = correlation[:, strip].diagonal()
                error = own - 1
                loss += error.square().sum() + off_diagonal * (correlation.square().sum() - own.square().sum())
                correlation.mul_(2 * off_diagonal)
                own.copy_(2 * error)
                d_x_BF[:, strip] = y_BF @ correlation.T
                d_y_BF.addmm_(x_BF[:, strip], correlation)
            factor = (1 if legacy_gradients else layout.world_size) / layout.total
            ctx.save_for_backward(d_x_BF.mul_(factor), d_y_BF.mul_(factor))
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_loss):
        return *(d_loss * gradient for gradient in ctx.saved_tensors), None, None, None
