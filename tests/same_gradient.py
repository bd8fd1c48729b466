"""Steps of a tiny CLIP, plain and under the engine, so that tests can compare their weights.

`plain_steps` is the definition: one process, fp32 (or float64, or as a plain bf16 program would), whole batch, losses as their papers write
them, torch's AdamW. `engine_steps` takes the same steps under DeepSpeed on one of several ranks.

Shape letters: G rows of all ranks, D embedding.
"""

import os
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath

from train.config import DataConfig, LossConfig, OptimConfig, TrainConfig

STAGES = (0, 1, 2, 3)
# "autocast": fp32 weights, products in bf16, as in ds_configs/. "bf16": bf16 weights over fp32 masters.
PRECISIONS = ("fp32", "autocast", "bf16")
OFFLOADS = ("none", "cpu")
NUM_MICRO_BATCHES = (1, 4)
WORLD_SIZES = (1, 2, 4)
LOSSES = ("contrastive", "sigmoid", "hnml")
# Groups of an anchor and two hard pairs; nine do not divide by 2 or 4, so ranks have unequal numbers of rows.
NUM_GROUPS, HARD_PER_ANCHOR, NUM_ROWS = 9, 2, 27
NUM_STEPS = 2
# Adam divides a gradient by its own size; beside a large epsilon the update follows the gradient, its scale included.
OPTIM = OptimConfig(lr=1.0, wd=0.1, eps=1.0, warmup=0)
MARGIN_WEIGHT = 3.0
SEED = 100
IMAGE_SIZE, CONTEXT, VOCABULARY = 16, 8, 64
TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": IMAGE_SIZE, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": 32, "heads": 2, "layers": 1},
}


@dataclass(frozen=True)
class Cell:
    """One way to take the steps."""

    stage: int
    precision: str
    offload: str
    num_micro_batches: int
    world_size: int
    loss: str
    locked: str = ""
    """ "image" or "text": that tower is not trained"""
    grad_checkpointing: bool = False
    clip_norm: float = 0.0
    dropout: bool = False
    """patch dropout, dropout and stochastic depth in the image tower"""
    overlaps: bool = False
    """DeepSpeed reduces gradients in buckets during the backward pass"""

    def __str__(self) -> str:
        extras = [self.locked and f"locked-{self.locked}", self.grad_checkpointing and "checkpointing"]
        extras += [self.clip_norm and f"clip-{self.clip_norm}", self.dropout and "dropout"]
        extras += [self.overlaps and "overlapping"]
        names = [f"zero{self.stage}", self.precision, f"offload-{self.offload}", f"{self.num_micro_batches}-micro"]
        return " ".join([*names, f"world-{self.world_size}", self.loss, *(extra for extra in extras if extra)])

    @property
    def micro_batch_size(self) -> int:
        """0, or the rows whose activations a rank holds so that there are `num_micro_batches` of them."""
        return 0 if self.num_micro_batches == 1 else -(-NUM_ROWS // (self.world_size * self.num_micro_batches))

    @property
    def exists(self) -> bool:
        """ZeRO-0 has no sharded optimizer to offload, and hides the fp32 masters of 16-bit weights."""
        return self.stage > 0 or (self.offload == "none" and self.precision != "bf16")

    def ds_config(self) -> dict[str, Any]:
        zero: dict[str, Any] = {"stage": self.stage}
        if self.stage == 3:
            # DeepSpeed leaves small weights whole; here each one is sharded, the temperature of one element too.
            zero["stage3_param_persistence_threshold"] = 0
        if self.overlaps:
            zero["overlap_comm"] = True
        config: dict[str, Any] = {"zero_optimization": zero}
        if self.offload == "cpu":
            zero["offload_optimizer"] = {"device": "cpu"}
            # torch's AdamW; DeepSpeed's own needs minutes to compile.
            config["zero_force_ds_cpu_optimizer"] = False
            if self.stage == 3:
                zero["offload_param"] = {"device": "cpu"}
        if self.precision == "autocast":
            config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
        if self.precision == "bf16":
            config["bf16"] = {"enabled": True}
        return config

    def train_config(self) -> TrainConfig:
        hnml = self.loss == "hnml"
        return TrainConfig(
            data=DataConfig(hard_per_anchor=HARD_PER_ANCHOR if hnml else 0),
            loss=LossConfig(
                kind="sigmoid" if self.loss == "sigmoid" else "contrastive",
                margin_weight=MARGIN_WEIGHT if hnml else 0.0,
            ),
            batch_size=NUM_ROWS,
            micro_batch_size=self.micro_batch_size,
        )


def tiny_model(cell: Cell) -> torch.nn.Module:
    """The same weights in every process."""
    from train.models.clip_library import open_clip
    from train.models.model import fit_scalars

    torch.manual_seed(3)
    vision = {**TINY["vision_cfg"], "patch_dropout": 0.5 if cell.dropout else 0.0}
    clip = open_clip.model.CLIP(TINY["embed_dim"], vision, TINY["text_cfg"], nonscalar_logit_scale=True)
    fit_scalars(clip, "sigmoid" if cell.loss == "sigmoid" else "contrastive")
    if cell.dropout:
        clip.visual.ln_post = torch.nn.Sequential(clip.visual.ln_post, torch.nn.Dropout(0.2), DropPath(0.2))
    if cell.locked:
        getattr(clip, f"lock_{cell.locked}_tower")()
    clip.set_grad_checkpointing(cell.grad_checkpointing)
    return clip.train()


def global_batches(num_steps: int = NUM_STEPS) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """uint8 images [G, 3, H, W] and tokens [G, L] of each step."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(num_steps):
        # Patches of one colour each: pictures of noise would all have nearly the same features, and cosines that cancel.
        patches = torch.randint(0, 256, (NUM_ROWS, 3, 2, 2), generator=generator, dtype=torch.uint8)
        image_GCHW = patches.repeat_interleave(IMAGE_SIZE // 2, 2).repeat_interleave(IMAGE_SIZE // 2, 3)
        text_GL = torch.randint(1, VOCABULARY - 1, (NUM_ROWS, CONTEXT), generator=generator)
        text_GL[:, -1] = VOCABULARY - 1  # the end token, which CLIP reads the text's features from
        yield image_GCHW, text_GL


def rows_of_rank(rank: int, world_size: int) -> slice:
    """Whole groups, one more on the first ranks when they do not divide."""
    borders = [NUM_GROUPS * r // world_size * (1 + HARD_PER_ANCHOR) for r in range(world_size + 1)]
    return slice(borders[rank], borders[rank + 1])


def plain_loss(cell: Cell, image_GD: torch.Tensor, text_GD: torch.Tensor, clip: torch.nn.Module) -> torch.Tensor:
    """CLIP's cross entropy, SigLIP's equation 1, or the first with HELIP's margin, over all rows."""
    cosine_GG = image_GD @ text_GD.T
    dtype = cosine_GG.dtype
    logits_GG = clip.logit_scale.to(dtype).exp() * cosine_GG
    own_G = torch.arange(len(cosine_GG))
    if cell.loss == "sigmoid":
        sign_GG = 2 * torch.eye(len(cosine_GG), dtype=dtype) - 1
        return -F.logsigmoid(sign_GG * (logits_GG + clip.logit_bias.to(dtype))).sum() / len(cosine_GG)
    loss = (F.cross_entropy(logits_GG, own_G) + F.cross_entropy(logits_GG.T, own_G)) / 2
    if cell.loss == "hnml":
        loss = loss + MARGIN_WEIGHT * (plain_margin(cosine_GG) + plain_margin(cosine_GG.T)) / 2
    return loss


def plain_margin(cosine_GG: torch.Tensor) -> torch.Tensor:
    """Every anchor's hinge of the normal negatives over the least similar of its hard pairs."""
    terms = []
    for anchor in range(0, len(cosine_GG), 1 + HARD_PER_ANCHOR):
        group = range(anchor, anchor + 1 + HARD_PER_ANCHOR)
        least = cosine_GG[anchor, list(group)[1:]].min()
        others = [column for column in range(len(cosine_GG)) if column not in group]
        terms.append((cosine_GG[anchor, others] - least).clamp(min=0).sum() / len(cosine_GG))
    return torch.stack(terms).mean()


def plain_steps(cell: Cell, dtype: torch.dtype = torch.float32) -> dict[str, dict[str, torch.Tensor]]:
    """Weights and AdamW's first moments after the steps of one process without an engine.

    With a precision of 16 bit: what a plain program of that precision has, fp32 masters included.
    """
    master = tiny_model(cell).to(dtype)
    trained = {name: weight for name, weight in master.named_parameters() if weight.requires_grad}
    groups = [
        {"params": [w for w in trained.values() if w.ndim >= 2], "weight_decay": OPTIM.wd},
        {"params": [w for w in trained.values() if w.ndim < 2], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=OPTIM.lr, betas=(OPTIM.beta1, OPTIM.beta2), eps=OPTIM.eps)
    clip = tiny_model(cell).bfloat16() if cell.precision == "bf16" else master
    copies = dict(clip.named_parameters())
    random_states: dict[int, torch.Tensor] = {}
    for image_GCHW, text_GL in global_batches():
        adam.zero_grad()
        clip.zero_grad()
        with torch.autocast("cpu", torch.bfloat16) if cell.precision == "autocast" else nullcontext():
            features = plain_features(cell, clip, pixels(image_GCHW, dtype), text_GL, random_states)
        unit = [F.normalize(rows.to(dtype), dim=-1) for rows in features]
        plain_loss(cell, *unit, master).backward()
        if cell.precision == "bf16":
            for name in trained.keys() - {"logit_scale", "logit_bias"}:
                trained[name].grad = copies[name].grad.to(dtype)
        if cell.clip_norm:
            torch.nn.utils.clip_grad_norm_(trained.values(), cell.clip_norm)
        adam.step()
        with torch.no_grad():
            for name, weight in trained.items():
                copies[name].copy_(weight)
    return {
        "start": dict(tiny_model(cell).named_parameters()),
        "weights": {name: weight.detach().clone() for name, weight in master.named_parameters()},
        "moments": {name: adam.state[weight]["exp_avg"] for name, weight in trained.items()},
    }


def plain_features(
    cell: Cell,
    clip: torch.nn.Module,
    image_GCHW: torch.Tensor,
    text_GL: torch.Tensor,
    random_states: dict[int, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both towers' outputs [G, D], in one piece; with dropout by rank and micro-batch, from each rank's own random state."""
    image_GCHW = image_GCHW.to(clip.logit_scale.dtype)
    if not cell.dropout:
        return clip.encode_image(image_GCHW), clip.encode_text(text_GL)
    images, texts = [], []
    for rank in range(cell.world_size):
        mine = rows_of_rank(rank, cell.world_size)
        if rank in random_states:
            torch.set_rng_state(random_states[rank])
        else:
            torch.manual_seed(SEED + rank)
        pieces = (torch.tensor_split(rows[mine], cell.num_micro_batches) for rows in (image_GCHW, text_GL))
        for image_BCHW, text_BL in zip(*pieces, strict=True):
            images.append(clip.encode_image(image_BCHW))
            texts.append(clip.encode_text(text_BL))
        random_states[rank] = torch.get_rng_state()
    return torch.cat(images), torch.cat(texts)


def pixels(image_GCHW: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    from train.models.clip_library import PreprocessCfg

    mean, std = (
        torch.tensor(v, dtype=dtype).view(1, 3, 1, 1) * 255 for v in (PreprocessCfg().mean, PreprocessCfg().std)
    )
    return (image_GCHW.to(dtype) - mean) / std


def engine_steps(rank: int, world_size: int, cell: Cell) -> dict[str, dict[str, torch.Tensor]]:
    """The same of this rank's engine, all of its weights and moments; collective."""
    from train.data.loader import RankBatch
    from train.distributed import Ranks
    from train.engine import Engine
    from train.loop import train_step
    from train.models.clip_library import PreprocessCfg
    from train.models.model import TwoTowers

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), DS_ACCELERATOR="cpu")
    ranks = Ranks(rank, world_size, rank, torch.device("cpu"))
    towers = TwoTowers(tiny_model(cell), PreprocessCfg())
    optim = replace(OPTIM, grad_clip_norm=cell.clip_norm)
    engine = Engine(towers, cell.ds_config(), optim, batch_size=NUM_ROWS, ranks=ranks)
    torch.manual_seed(SEED + rank)
    try:
        for image_GCHW, text_GL in global_batches():
            mine = rows_of_rank(rank, world_size)
            ids = torch.arange(NUM_ROWS)[mine]
            batch = RankBatch(image_GCHW[mine], text_GL[mine], ids, NUM_ROWS, 0)
            outcome = train_step(engine, cell.train_config(), batch, OPTIM.lr)
            assert not outcome.not_finite
        return {"weights": whole_weights(engine), "moments": whole_moments(engine)}
    finally:
        engine.close()


def whole_weights(engine: Any) -> dict[str, torch.Tensor]:
    """Every parameter's fp32 value, on every rank; collective."""
    from deepspeed import zero
    from deepspeed.utils import safe_get_full_fp32_param

    found = {}
    for name, weight in engine.module.clip.named_parameters():
        if engine.stage and weight.requires_grad:
            found[name] = safe_get_full_fp32_param(weight).detach().cpu().clone()
        else:
            with zero.GatheredParameters([weight], enabled=engine.stage == 3):
                found[name] = weight.detach().cpu().clone()
    return found


def whole_moments(engine: Any) -> dict[str, torch.Tensor]:
    """AdamW's first moment of every trained parameter, on every rank; collective."""
    from deepspeed.utils import safe_get_full_optimizer_state

    trained = {name: weight for name, weight in engine.module.clip.named_parameters() if weight.requires_grad}
    if not engine.stage:
        return {name: engine.optimizer.state[weight]["exp_avg"].clone() for name, weight in trained.items()}
    if engine.stage < 3:
        # DeepSpeed links the states after the first parameter group's step, when the second group has none yet.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    moments = {name: safe_get_full_optimizer_state(weight, "exp_avg") for name, weight in trained.items()}
    shapes = {name: getattr(weight, "ds_shape", weight.shape) for name, weight in trained.items()}
    return {name: moment.reshape(shapes[name]).cpu().clone() for name, moment in moments.items()}


def all_cells() -> list[Cell]:
    """Every combination, those that cannot exist too."""
    return [
        Cell(stage, precision, offload, micro, world_size, loss)
        for stage in STAGES
        for precision in PRECISIONS
        for offload in OFFLOADS
        for micro in NUM_MICRO_BATCHES
        for world_size in WORLD_SIZES
        for loss in LOSSES
    ]
