"""Everything that a run is made of, as frozen dataclasses: the one home of every learning number.

Nothing heavy is imported here, so that `--help` and a mistake in a flag answer at once.
"""

from train.config.data import STRONG_AUGMENT, AugmentConfig, DataConfig, Partners
from train.config.learning import LossConfig, ObjectiveConfig, ObjectiveName, OptimConfig
from train.config.model import ModelConfig
from train.config.run import TrainConfig

__all__ = [
    "STRONG_AUGMENT",
    "AugmentConfig",
    "DataConfig",
    "LossConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "ObjectiveName",
    "OptimConfig",
    "Partners",
    "TrainConfig",
]
