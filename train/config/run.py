"""A run: all of its parts, and its length."""

from dataclasses import dataclass, field
from typing import Literal

from train.config.data import STRONG_AUGMENT, AugmentConfig, DataConfig
from train.config.learning import LossConfig, ObjectiveConfig, OptimConfig
from train.config.model import ModelConfig
from train.records.trackers import check_trackers


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
    strong_augment: AugmentConfig = STRONG_AUGMENT
    """augmentation of the strong views, for objectives that have them; weak views, and CLIP, take `augment`"""
    loss: LossConfig = field(default_factory=LossConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    batch_size: int = 4096
    """pairs in a global batch, over all ranks, hard pairs included"""
    micro_batch_size: int = 0
    """pairs that a rank holds the activations of (about); 0: all of its own. Loss and gradients stay those of the global batch, at the
    price of a second forward pass; BatchNorm, if the model has any, normalises each micro-batch by itself"""
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
    compile: bool = False
    """torch.compile for the towers' blocks; a minute or more before the first step. Not with ZeRO stage 3; on a CPU it needs g++ and
    does not pay"""
    log_every_steps: int = 20
    """steps between two lines of metrics.jsonl"""
    trackers: tuple[str, ...] = ("tensorboard",)
    """where figures go besides metrics.jsonl: tensorboard, wandb, mlflow, or package.module:Class of your own
    (see train/records/trackers.py); --trackers alone: nowhere"""
    save_every_steps: int = 1000
    """steps between two checkpoints; the last step is always saved"""
    keep_checkpoints: int = 2
    """how many of the newest checkpoints stay on disk"""
    keep_every_steps: int = 0
    """also keep the checkpoints of steps that this divides, for good; 0: none"""
    max_skipped_steps: int = 10
    """stop after so many steps in a row whose loss or gradient is not finite; noticed when a step is logged, or after so many steps"""
    hang_timeout_s: float = 900.0
    """end the job (exit code 86) when a rank makes no progress for so long, and say which, where, and what it reads; longer than the
    longest step, checkpoint or wait for a remote store"""

    def check(self) -> None:
        """Raises ValueError for a missing or senseless value, naming its flag."""
        for name in ("ds_config", "out"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is missing; see --help")
        self.data.check()
        check_trackers(self.trackers)
        self.augment.check("augment")
        self.strong_augment.check("strong_augment")
        if self.augment.size:
            raise ValueError(
                f"augment.size={self.augment.size} must be 0, as weak views have the model's own size; give --strong_augment.size"
            )
        self.loss.check()
        self.objective.check()
        if self.objective.name == "declip" and self.loss.kind != "contrastive":
            raise ValueError(f"--objective.name declip has no --loss.kind {self.loss.kind}; its pairs share one scale")
        if self.objective.legacy_gradients and (self.loss.kind != "contrastive" or self.loss.margin_weight):
            raise ValueError(
                f"--objective.legacy_gradients is for the published contrastive losses, not for loss.kind={self.loss.kind} with "
                f"loss.margin_weight={self.loss.margin_weight}; leave one of them out"
            )
        self.model.check()
        if self.epochs <= 0 and self.max_steps <= 0:
            raise ValueError(
                f"epochs={self.epochs} and max_steps={self.max_steps} leave nothing to do; give one of them"
            )
        for name in ("batch_size", "log_every_steps", "save_every_steps", "keep_checkpoints", "max_skipped_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.keep_every_steps < 0:
            raise ValueError(f"keep_every_steps={self.keep_every_steps} must be 0 (keep none for good) or more")
        if not self.hang_timeout_s > 0:
            raise ValueError(f"hang_timeout_s={self.hang_timeout_s} must be positive seconds")
        if self.micro_batch_size < 0 or self.micro_batch_size == 1:
            raise ValueError(f"micro_batch_size={self.micro_batch_size} must be 0 (all pairs of a rank) or 2 and more")
        if self.loss.margin_weight and not self.data.hard_per_anchor:
            raise ValueError(
                f"loss.margin_weight={self.loss.margin_weight} needs hard pairs in the batch; give --data.hard_per_anchor and --data.pairs"
            )

    def num_steps(self, steps_per_epoch: int) -> int:
        return self.max_steps or max(1, round(self.epochs * steps_per_epoch))
