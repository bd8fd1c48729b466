"""Everything that a run is made of, as frozen dataclasses: the one home of every learning number."""

from dataclasses import dataclass, field
from typing import Literal

from train.data.augment import AugmentConfig
from train.data.loader import DataConfig
from train.model import ModelConfig
from train.schedule import OptimConfig


@dataclass(frozen=True)
class LossConfig:
    """The contrastive loss and HELIP's hard-negative margin loss (HNML)."""

    margin_weight: float = 0.0
    """weight of the margin loss (HELIP Eq. 7: gamma); 0: contrastive loss alone"""
    margin_space: Literal["cosine", "logits"] = "cosine"
    """what the margin loss compares: cosines, or logits (cosines times the logit scale)"""
    margin_direction: Literal["image_to_text", "text_to_image", "both"] = "both"
    """anchors on the image side, on the text side, or the mean of both"""
    label_smoothing: float = 0.0
    """label smoothing of the contrastive targets"""
    backend: Literal["auto", "reference", "blockwise", "triton"] = "auto"
    """which implementation of the loss runs; auto logs its choice"""


@dataclass(frozen=True)
class TrainConfig:
    """A training run."""

    ds_config: str = ""
    """DeepSpeed JSON of the memory regime, for example ds_configs/zero1_bf16.json"""
    out: str = ""
    """run folder to write; a run that is there already goes on from its newest checkpoint"""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    batch_size: int = 4096
    """pairs in a global batch, over all ranks, hard pairs included"""
    epochs: float = 32
    """passes over the anchors; with hard pairs, one pass presents 1 + hard_per_anchor pairs for each"""
    max_steps: int = 0
    """end (and end the schedule) after so many steps; 0: epochs decide"""
    seed: int = 0
    """seed of the weights, the order of the data and the augmentation"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPUs when there are any"""
    threads: int = 0
    """CPU threads of each rank; 0 leaves the choice to torch"""
    log_every_steps: int = 20
    """steps between two lines of metrics.jsonl"""
    save_every_steps: int = 1000
    """steps between two checkpoints; the last step is always saved"""
    keep_checkpoints: int = 2
    """how many of the newest checkpoints stay on disk"""
    max_skipped_steps: int = 10
    """stop after so many steps in a row whose loss is not finite"""

    def check(self) -> None:
        """Raises ValueError for a missing or senseless value, naming its flag."""
        for name in ("ds_config", "out"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is missing; see --help")
        if not self.data.store:
            raise ValueError("--data.store is missing: the PairStore folder that `python -m train.ingest` wrote")
        if self.epochs <= 0 and self.max_steps <= 0:
            raise ValueError(
                f"epochs={self.epochs} and max_steps={self.max_steps} leave nothing to do; give one of them"
            )
        for name in ("batch_size", "log_every_steps", "save_every_steps", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.loss.margin_weight and not self.data.hard_per_anchor:
            raise ValueError(
                f"loss.margin_weight={self.loss.margin_weight} needs hard pairs in the batch; give --data.hard_per_anchor and --data.pairs"
            )

    def num_steps(self, steps_per_epoch: int) -> int:
        return self.max_steps or max(1, round(self.epochs * steps_per_epoch))
