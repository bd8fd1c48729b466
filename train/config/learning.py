"""How a run learns: its optimizer, its loss, its objective."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

ObjectiveName = Literal["clip", "slip", "cl2l", "siamlip", "byolip", "barlip", "swalip", "declip"]


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule (open_clip's names)."""

    lr: float = 5e-4
    """peak learning rate"""
    beta1: float = 0.9
    """AdamW's decay of the first moment"""
    beta2: float = 0.98
    """AdamW's decay of the second moment"""
    eps: float = 1e-6
    """AdamW's epsilon"""
    wd: float = 0.2
    """weight decay; gains, biases and the logit scale do not decay"""
    warmup: int = 10000
    """steps of linear warm-up to lr"""
    lr_end: float = 0.0
    """learning rate that the cosine ends at"""
    grad_clip_norm: float = 0.0
    """clip the global gradient norm to this; 0: no clipping"""
    max_logit_scale: float = 100.0
    """the exponentiated logit scale is held below this"""

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"optim.lr={self.lr} must be positive")
        if self.warmup < 0:
            raise ValueError(f"optim.warmup={self.warmup} must be 0 or more steps")


@dataclass(frozen=True)
class LossConfig:
    """The contrastive loss and HELIP's hard-negative margin loss (HNML), or SigLIP's sigmoid loss."""

    kind: Literal["contrastive", "sigmoid"] = "contrastive"
    """contrastive: cross entropy over the batch (CLIP); sigmoid: each pair by itself (SigLIP), with a learned bias that starts at -10 and a
    scale that starts at 10 unless the weights bring a bias of their own"""
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

    def check(self) -> None:
        """Raises ValueError for a term that the sigmoid loss does not have."""
        for name in ("margin_weight", "label_smoothing"):
            if self.kind == "sigmoid" and getattr(self, name):
                raise ValueError(
                    f"loss.{name}={getattr(self, name)} belongs to --loss.kind contrastive; leave it 0 with --loss.kind sigmoid"
                )


@dataclass(frozen=True)
class ObjectiveConfig:
    """Which method is trained: its heads, its views of each pair, and the weights of its terms. CLIP's loss on the weak views stays that of
    `loss` in all of them, so that HELIP's hard pairs and margin go with every method."""

    name: ObjectiveName = "clip"
    """clip: the loss alone; slip: with SimCLR on two strong image views; cl2l: weak and strong views of both towers, each with own heads
    (CLIP-rocket); siamlip, byolip, barlip, swalip: cl2l with cross-modal SimSiam, BYOL, Barlow Twins, SwAV; declip: a second view of each
    picture and text, a queue of near texts, SimSiam between pictures, and hidden words (DeCLIP)"""
    num_strong_views: int = 2
    """strong views of each pair, beside the weak one (of its picture alone for slip)"""
    ssl_weight: float = 1.0
    """weight of the method's own term beside the contrastive ones: SimCLR's of slip, SimSiam's of siamlip and byolip, Barlow Twins' of
    barlip (times barlow_scale), the swapped assignments' of swalip (times swap_scale)"""
    strong_label_smoothing: float = 0.1
    """label smoothing of the contrastive targets between strong views (cl2l and what is built on it)"""
    strong_temperature: float = 0.1
    """temperature of the strong views' own scale at the start; it is learned"""
    reduction: Literal["avg", "sum"] = "avg"
    """cl2l: the weak term and the strong ones as a mean over views, or twice that"""
    text_dropout: float = 0.0
    """dropout of the strong texts alone, on what enters each block of the text tower; that tower is then not recomputed under
    model.grad_checkpointing"""
    text_drop_path: float = 0.0
    """stochastic depth of the strong texts alone: how often a block of the text tower is passed by; else as text_dropout"""
    head_width: int = 4096
    """hidden width of SimCLR's head and of the strong heads"""
    head_dim: int = 256
    """width of what those heads give"""
    simclr_temperature: float = 0.1
    """slip: temperature of SimCLR's loss, fixed"""
    siam_width: int = 2048
    """siamlip, byolip: hidden width of projectors and predictors"""
    siam_dim: int = 128
    """siamlip, byolip: width of what those give"""
    barlow_width: int = 3000
    """barlip: hidden width of the projectors"""
    barlow_dim: int = 8192
    """barlip: width of what they give"""
    barlow_scale: float = 0.025
    """barlip: factor of Barlow Twins' loss"""
    barlow_off_diagonal: float = 0.005
    """barlip: weight of the off-diagonal correlations"""
    sinkhorn_epsilon: float = 0.05
    """swalip: temperature of the assignments"""
    sinkhorn_iterations: int = 3
    """swalip: normalisations of rows and columns"""
    swap_scale: float = 0.2
    """swalip: factor of the swapped assignments' loss"""
    mvs_weight: float = 0.4
    """declip: weight of the mean contrastive loss over the four pairs of views; ssl_weight is SimSiam's there (published: 0.2)"""
    nns_weight: float = 0.2
    """declip: weight of the contrastive loss with the nearest texts of the queue"""
    mlm_weight: float = 0.2
    """declip: weight of the masked language model on the weak texts; 0: none"""
    mlm_probability: float = 0.15
    """declip: share of the words that are hidden and guessed"""
    queue_length: int = 65536
    """declip: texts of all ranks in the queue"""
    declip_dim: int = 1024
    """declip: width of SimSiam's projector and of what its predictor gives"""
    declip_width: int = 512
    """declip: hidden width of SimSiam's predictor"""
    separate_heads: bool = False
    """siamlip, byolip, barlip: heads of their own for weak and for strong views, instead of shared weights"""
    teacher_momentum: float = 0.99
    """byolip: share of the teacher's weights that a step keeps; the rest comes from the trained ones"""
    legacy_gradients: Annotated[bool, tyro.conf.arg(aliases=["--legacy-gradients"])] = False
    """the published implementations' gradients on several ranks, for comparison: gathers without gradient in all terms between images and
    texts, Barlow Twins' divided by the number of ranks"""

    @property
    def towers_alone(self) -> bool:
        """CLIP as it is: no heads, no views, no gradients but exact ones."""
        return self.name == "clip" and not self.legacy_gradients

    def check(self) -> None:
        """Raises ValueError for a value that has no meaning, naming its flag."""
        if self.num_strong_views < 1:
            raise ValueError(f"objective.num_strong_views={self.num_strong_views} must be at least 1")
        if self.name in ("slip", "swalip") and self.num_strong_views != 2:
            raise ValueError(
                f"objective.num_strong_views={self.num_strong_views} does not go with --objective.name {self.name}, which compares two"
            )
        if self.name == "declip" and self.num_strong_views != 1:
            raise ValueError(
                f"objective.num_strong_views={self.num_strong_views} does not go with --objective.name declip, which has one beside the "
                "weak view; make it 1"
            )
        if not self.mvs_weight > 0:
            raise ValueError(f"objective.mvs_weight={self.mvs_weight} must be positive")
        for name in ("strong_label_smoothing", "text_dropout", "text_drop_path", "teacher_momentum", "mlm_probability"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"objective.{name}={getattr(self, name)} must be from 0 to less than 1")
        for name in ("strong_temperature", "simclr_temperature", "sinkhorn_epsilon"):
            if not getattr(self, name) > 0:
                raise ValueError(f"objective.{name}={getattr(self, name)} must be positive")
        if self.strong_temperature > 1:
            raise ValueError(
                f"objective.strong_temperature={self.strong_temperature} must be at most 1: scales stay above 1"
            )
        for name in (
            "ssl_weight",
            "barlow_scale",
            "barlow_off_diagonal",
            "swap_scale",
            "nns_weight",
            "mlm_weight",
        ):
            if not getattr(self, name) >= 0:
                raise ValueError(f"objective.{name}={getattr(self, name)} must be 0 or more")
        widths = (
            "head_width",
            "head_dim",
            "siam_width",
            "siam_dim",
            "barlow_width",
            "barlow_dim",
            "sinkhorn_iterations",
            "queue_length",
            "declip_dim",
            "declip_width",
        )
        for name in widths:
            if getattr(self, name) < 1:
                raise ValueError(f"objective.{name}={getattr(self, name)} must be at least 1")
        if self.name == "swalip" and self.strong_label_smoothing:
            raise ValueError(
                f"objective.strong_label_smoothing={self.strong_label_smoothing} does not go with --objective.name swalip; make it 0"
            )
