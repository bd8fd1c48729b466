"""Everything that a run is made of, as frozen dataclasses: the one home of every learning number.

Nothing heavy is imported here, so that `--help` and a mistake in a flag answer at once.
"""

import math
from dataclasses import dataclass, field, fields
from typing import Literal

from train.trackers import check_trackers

Partners = Literal["mined", "random"]
ObjectiveName = Literal["clip", "slip", "cl2l", "siamlip", "byolip", "barlip", "swalip", "declip"]


@dataclass(frozen=True)
class ModelConfig:
    """Which model to train and where its weights come from."""

    name: str = "ViT-B-16"
    """an open_clip model name, one of train/model_configs, or the JSON file of an open_clip config; with pretrained, the default takes the
    architecture of the weights, and any other name is checked against them"""
    pretrained: str = ""
    """start from these weights: a run, checkpoint or export folder; a file of open_clip, OpenAI, SLIP, LaCLIP, CLIP-rocket or DeCLIP,
    recognised by the names of its tensors; or an open_clip pretrained tag; empty: from scratch"""
    grad_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, about a third more time"""
    lock_image: bool = False
    """keep the image tower's weights as they are (LiT); give them with pretrained"""
    lock_image_unlocked_groups: int = 0
    """with lock_image: still train the last so many groups of the image tower (the projection; the last block; the one before; ...)"""
    lock_text: bool = False
    """keep the text tower's weights as they are"""
    lock_text_unlocked_layers: int = 0
    """with lock_text: still train the last so many groups of the text tower (the projection; the last block; the one before; ...)"""
    patch_dropout: float = 0.0
    """leave out this share of a picture's patches in training (vision transformers; FLIP): faster, less memory; 0: the config's"""
    lora_rank: int = 0
    """train adapters of this rank in the towers' linear layers instead of the towers (LoRA; needs peft); they are merged in what is saved
    for others; 0: train the towers"""
    lora_alpha: float = 0.0
    """with lora_rank: adapters count lora_alpha / lora_rank; 0: twice the rank"""
    lora_dropout: float = 0.0
    """with lora_rank: dropout of what enters an adapter"""
    lora_layers: Literal["all", "attention"] = "all"
    """with lora_rank: adapters in attention and MLP, or in attention alone"""

    def check(self) -> None:
        """Raises ValueError for what has no meaning, or leaves nothing to train."""
        if self.lora_rank < 0 or self.lora_alpha < 0 or not 0 <= self.lora_dropout < 1:
            raise ValueError(
                f"model.lora_rank={self.lora_rank}, lora_alpha={self.lora_alpha} must be 0 or more, lora_dropout={self.lora_dropout} from "
                "0 to less than 1"
            )
        if self.lora_rank and (self.lock_image_unlocked_groups or self.lock_text_unlocked_layers):
            raise ValueError(
                f"model.lora_rank={self.lora_rank} keeps towers frozen; leave out the unlocked groups and layers"
            )
        for tower, count in (("image", "lock_image_unlocked_groups"), ("text", "lock_text_unlocked_layers")):
            number, locked = getattr(self, count), getattr(self, f"lock_{tower}")
            if number < 0 or (number and not locked):
                raise ValueError(f"model.{count}={number} must be 0 or more groups, and needs --model.lock_{tower}")
        if not 0 <= self.patch_dropout < 1:
            raise ValueError(f"model.patch_dropout={self.patch_dropout} must be from 0 to less than 1")
        unlocked = self.lock_image_unlocked_groups or self.lock_text_unlocked_layers
        if self.lock_image and self.lock_text and not unlocked:
            raise ValueError("model.lock_image and model.lock_text leave no tower to train; lock one of them")


@dataclass(frozen=True)
class DataConfig:
    """Where the pairs come from and how batches are put together."""

    store: str = ""
    """PairStore that `python -m train.ingest` wrote: a folder, or a URL of remote storage (s3://, gs://, sftp://, ...; needs cache)"""
    cache: str = ""
    """with a remote store: local folder for what is fetched of it, shared by all processes of a node; kept for the next run"""
    store_shuffle_block: int = 0
    """shuffle blocks of so many consecutive anchors of the store, then the anchors within a block, so that a batch reads few shards; for
    stores that `train.reorder` wrote, and several global batches long; 0: shuffle all anchors together"""
    shards: tuple[str, ...] = ()
    """train straight from these WebDataset tars instead, without ingest: paths, brace ranges, globs, all local and uncompressed; no hard
    pairs, and equal captions or pictures are not kept apart"""
    shard_index: str = ""
    """with shards: folder for the index of the tars, which several runs may share; empty: inside the run folder"""
    shard_lanes: int = 64
    """with shards: how many places of the data are read side by side, over all ranks; every global batch mixes them"""
    shuffle_block: int = 2048
    """with shards: samples that are shuffled together within a lane"""
    pairs: str = ""
    """PairTable folder, as `mining.main search` writes it; needed for hard pairs"""
    hard_per_anchor: int = 0
    """hard pairs that join each anchor in a batch (p); 0 trains without hard pairs"""
    partners: Partners = "mined"
    """where partners come from: the pair table, or random pairs for a compute-matched control"""
    num_candidates: int = 0
    """draw partners from the first so many neighbours of the pair table; 0: from all of them"""
    weigh_by_score: bool = False
    """draw partners in proportion to their score instead of uniformly"""
    keep_duplicates_apart: bool = True
    """never put two pairs with the same caption or the same picture into one global batch"""
    caption_sampling: Literal["whole", "single", "multi"] = "whole"
    """whole: a sample's text is one caption. Otherwise its lines are captions of their own (YFCC: a title and a description), and every
    step draws one of them: single: one for all views of a pair; multi: one for each view"""
    clean_captions: bool = False
    """mend broken encodings (ftfy), resolve HTML entities and lower-case before captions are augmented; CLIP's tokenizer does it afterwards
    in any case, so this matters where words are dropped or replaced"""
    workers: int = 4
    """data loading processes of each rank"""

    def check(self) -> None:
        """Raises ValueError unless there is exactly one source of pairs that can give what is asked of it."""
        if not self.store and not self.shards:
            raise ValueError(
                "--data.store is missing: the PairStore folder that `python -m train.ingest` wrote "
                "(or --data.shards: tars to train from without ingest)"
            )
        if self.store_shuffle_block < 0:
            raise ValueError(f"data.store_shuffle_block={self.store_shuffle_block} must be 0 or more anchors")
        if not self.shards:
            return
        if self.store:
            raise ValueError(
                f"--data.store {self.store} and --data.shards {' '.join(self.shards)} are two sources; give one"
            )
        if self.pairs or self.hard_per_anchor:
            raise ValueError(
                f"--data.pairs {self.pairs or '(missing)'} and data.hard_per_anchor={self.hard_per_anchor} need --data.store: mined "
                "pairs are named by the pair ids that ingest gives, which tars alone do not have; ingest the tars first"
            )
        for name in ("shard_lanes", "shuffle_block"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name}={getattr(self, name)} must be at least 1")


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation of pictures and captions during training."""

    scale: tuple[float, float] = (0.9, 1.0)
    """range of the area that a random crop keeps (open_clip: aug_cfg.scale)"""
    ratio: tuple[float, float] = (0.75, 1.3333)
    """range of the crop's aspect ratio"""
    horizontal_flip_prob: float = 0.0
    """probability of mirroring a picture; keep 0 where captions speak of left and right"""
    color_jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """strength of brightness, contrast, saturation and hue jitter"""
    color_jitter_prob: float = 0.0
    """probability of the color jitter"""
    gray_scale_prob: float = 0.0
    """probability of dropping the colours"""
    gaussian_blur_prob: float = 0.0
    """probability of blurring a picture"""
    gaussian_blur_sigma: tuple[float, float] = (0.1, 2.0)
    """range of the blur's standard deviation, in pixels of the cut picture"""
    solarize_prob: float = 0.0
    """probability of inverting every channel's upper half (values of 128 and more)"""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """how a crop is scaled (CLIP and CLIP-rocket: bicubic; SLIP: bilinear)"""
    size: int = 0
    """height and width of a strong view, for models that take pictures of several sizes (CLIP-rocket on 29M pairs: 192); 0: as the model
    says; only for --strong_augment"""
    phrase_separator: str = ""
    """captions are lists of phrases joined by this (for example "; "): train on a random selection; empty: captions as they are"""
    lead_phrase_drop_prob: float = 0.1
    """with phrase_separator: how often the first phrase is left out in favour of the others"""
    stop_words_prob: float = 0.0
    """probability of dropping the function words of a caption ("the", "of", ...; those of train/data/words/stop_words.py). Prompts of an
    evaluation keep theirs"""
    synonym_weight: float = 0.0
    """after that, each caption is changed in one way, drawn by these weights (EDA; all 0: none): one word becomes a synonym (WordNet)"""
    swap_weight: float = 0.0
    """... two words change places"""
    delete_weight: float = 0.0
    """... every word is dropped with probability delete_word_prob"""
    identity_weight: float = 0.0
    """... nothing is changed"""
    delete_word_prob: float = 0.1
    """probability of each word's being dropped, where words are dropped"""

    @property
    def edit_weights(self) -> tuple[float, float, float, float]:
        """Weights of the synonym, the swap, the deletion and the identity."""
        return self.synonym_weight, self.swap_weight, self.delete_weight, self.identity_weight

    def check(self, flag: str) -> None:
        """Raises ValueError for a value that is no probability, weight or range; flag: the name of this group, "augment"."""
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name.endswith("_prob") and not 0 <= value <= 1:
                raise ValueError(f"{flag}.{item.name}={value} is a probability: between 0 and 1")
            if item.name.endswith("_weight") and not 0 <= value < math.inf:
                raise ValueError(f"{flag}.{item.name}={value} is a weight: 0 or more")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(
                f"{flag}.scale={self.scale} must be two shares of the area, above 0 and at most 1, the smaller first"
            )
        for name in ("ratio", "gaussian_blur_sigma"):
            low, high = getattr(self, name)
            if not 0 < low <= high < math.inf:
                raise ValueError(f"{flag}.{name}={(low, high)} must be two positive numbers, the smaller first")
        if min(self.color_jitter) < 0 or self.color_jitter[3] > 0.5:
            raise ValueError(
                f"{flag}.color_jitter={self.color_jitter} must be 0 or more, and the hue's (the last) at most 0.5"
            )
        if self.size < 0:
            raise ValueError(f"{flag}.size={self.size} must be 0 (as the model says) or pixels")


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
    legacy_gradients: bool = False
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


# CLIP-rocket's strong views, pictures and captions; the pictures are SLIP's, MoCo v2's list, as well.
STRONG_AUGMENT = AugmentConfig(
    scale=(0.08, 1.0),
    horizontal_flip_prob=0.5,
    color_jitter=(0.4, 0.4, 0.4, 0.1),
    color_jitter_prob=0.8,
    gray_scale_prob=0.2,
    gaussian_blur_prob=0.5,
    stop_words_prob=0.8,
    synonym_weight=0.4,
    swap_weight=0.4,
    delete_weight=0.2,
)


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
    """where figures go besides metrics.jsonl: tensorboard, wandb, mlflow, or package.module:Class of your own (see train/trackers.py);
    --trackers alone: nowhere"""
    save_every_steps: int = 1000
    """steps between two checkpoints; the last step is always saved"""
    keep_checkpoints: int = 2
    """how many of the newest checkpoints stay on disk"""
    keep_every_steps: int = 0
    """also keep the checkpoints of steps that this divides, for good; 0: none"""
    max_skipped_steps: int = 10
    """stop after so many steps in a row whose loss is not finite"""
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
        for name in ("batch_size", "log_every_steps", "save_every_steps", "keep_checkpoints"):
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
