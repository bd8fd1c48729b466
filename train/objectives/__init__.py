"""What is minimised: one objective for each method, by its name in the recipe."""

from train.config import TrainConfig
from train.objectives.barlip import BarlipObjective
from train.objectives.cl2l import Cl2lObjective
from train.objectives.clip import ClipObjective
from train.objectives.declip import DeclipObjective
from train.objectives.objective import Encoded, Objective, Outputs, Terms, TowerWidths
from train.objectives.siamlip import ByolipObjective, SiamlipObjective
from train.objectives.slip import SlipObjective
from train.objectives.swalip import SwalipObjective

OBJECTIVES: dict[str, type[Objective]] = {
    "clip": ClipObjective,
    "slip": SlipObjective,
    "cl2l": Cl2lObjective,
    "siamlip": SiamlipObjective,
    "byolip": ByolipObjective,
    "barlip": BarlipObjective,
    "swalip": SwalipObjective,
    "declip": DeclipObjective,
}


def build_objective(config: TrainConfig, widths: TowerWidths) -> Objective:
    """The objective of `config.objective.name`, its heads freshly drawn from torch's generator, fp32.

    Raises ValueError for a name that is not there.
    """
    name = config.objective.name
    if name not in OBJECTIVES:
        raise ValueError(f"objective.name={name!r} is not one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name](config, widths)


__all__ = ["Encoded", "Objective", "Outputs", "Terms", "TowerWidths", "build_objective"]
