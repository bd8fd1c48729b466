"""SiamLIP: CLIP-rocket's loss and a cross-modal SimSiam; BYOLIP: the same with an averaged teacher's targets.

Each view of a picture predicts the projected views of its caption, and the other way round: the weak ones each other, and every strong one
every strong one. Source: Fini et al. 2023 (arXiv:2305.08675); SimSiam, Chen & He 2020 (arXiv:2011.10566); BYOL, Grill et al. 2020
(arXiv:2006.07733).
"""

import torch
import torch.nn.functional as F

from train.config import TrainConfig
from train.distributed import RowLayout, mean_over_rows
from train.objectives.batch_norm import BatchNormOverRanks
from train.objectives.cl2l import Cl2lObjective
from train.objectives.heads import siam_predictor, siam_projector
from train.objectives.objective import Encoded, Outputs, TowerWidths

TOWERS = ("image", "text")


class SiamlipObjective(Cl2lObjective):
    """Projectors share weights between weak and strong views unless objective.separate_heads; their last BatchNorm never does."""

    own_name = "simsiam"

    def __init__(self, config: TrainConfig, widths: TowerWidths) -> None:
        super().__init__(config, widths)
        settings = config.objective
        width, dim = settings.siam_width, settings.siam_dim
        strengths = ("weak", "strong") if settings.separate_heads else ("weak",)
        trunks = {"image": widths.image_trunk, "text": widths.text_trunk}
        self.siam_projectors = torch.nn.ModuleDict(
            {
                f"{tower}_{strength}": siam_projector(trunks[tower], width, dim)
                for tower in TOWERS
                for strength in strengths
            }
        )
        self.siam_norms = torch.nn.ModuleDict(
            {
                f"{tower}_{strength}": BatchNormOverRanks(dim, affine=False)
                for tower in TOWERS
                for strength in ("weak", "strong")
            }
        )
        self.image_text_predictor = siam_predictor(width, dim)
        self.text_image_predictor = siam_predictor(width, dim)

    def forward(self, encoded: Encoded, teacher: Outputs | None) -> Outputs:
        projections = {**self._project("image", encoded.image_trunk), **self._project("text", encoded.text_trunk)}
        if self.teacher_momentum is not None and teacher is None:
            # The teacher itself is asked for targets alone.
            return projections
        predictors = {"image": self.image_text_predictor, "text": self.text_image_predictor}
        predictions = {
            name.replace("projection", "prediction"): predictors[name.split("_")[0]](rows)
            for name, rows in projections.items()
        }
        return {**super().forward(encoded, teacher), **projections, **predictions}

    def _project(self, tower: str, trunks: tuple[torch.Tensor, ...]) -> Outputs:
        found = {}
        for number, trunk in enumerate(trunks):
            strength = "strong" if number else "weak"
            head = strength if f"{tower}_{strength}" in self.siam_projectors else "weak"
            rows = self.siam_projectors[f"{tower}_{head}"](trunk)
            found[f"{tower}_projection_{number}"] = self.siam_norms[f"{tower}_{strength}"](rows)
        return found

    def own_term(self, outputs: Outputs, teacher_outputs: Outputs | None, layout: RowLayout) -> torch.Tensor:
        """Mean of 2 - 2 cos(prediction, target without gradient) over rows, directions, the weak pair and all strong pairs."""
        targets = outputs if teacher_outputs is None else teacher_outputs
        cosine_B = 0
        for tower, other in (TOWERS, TOWERS[::-1]):
            predicted = self._unit_rows(outputs, f"{tower}_prediction")
            target = [rows.detach() for rows in self._unit_rows(targets, f"{other}_projection")]
            # The sum over all pairs of strong views is the product of the sums.
            strong_B = (sum(predicted[1:]) * sum(target[1:])).sum(1)
            cosine_B = cosine_B + (predicted[0] * target[0]).sum(1) + strong_B
        return mean_over_rows(2 - 2 * cosine_B / (2 + 2 * self.num_views**2), layout)

    def _unit_rows(self, outputs: Outputs, name: str) -> list[torch.Tensor]:
        return [F.normalize(outputs[f"{name}_{number}"], dim=-1) for number in range(1 + self.num_views)]


class ByolipObjective(SiamlipObjective):
    """SiamLIP whose targets come from an exponential average of towers and heads, in train mode, without gradient."""

    own_name = "byol"

    def __init__(self, config: TrainConfig, widths: TowerWidths) -> None:
        super().__init__(config, widths)
        self.teacher_momentum = config.objective.teacher_momentum

    def own_term(self, outputs: Outputs, teacher_outputs: Outputs | None, layout: RowLayout) -> torch.Tensor:
        assert teacher_outputs is not None, "an objective with a teacher_momentum is given its teacher's outputs"
        return super().own_term(outputs, teacher_outputs, layout)
