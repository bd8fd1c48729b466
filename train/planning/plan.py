"""What a run would take, without training: memory of each rank and bytes on the wire. Needs no DeepSpeed, and no memory for the model.

In: a TrainConfig, a DeepSpeed JSON, numbers of ranks. Out: `RankPlan`s. The model is built on the meta device; its activations are counted
by the hooks through which autograd saves tensors, in a forward pass of fake tensors. Weights, gradients and optimizer states follow from
what DeepSpeed 0.19 allocates at each ZeRO stage. Not counted: the allocator's slack, library workspaces (cuDNN, NCCL: 1 to 2 GiB on a
GPU), and what one layer needs for a moment in its backward pass.

Terms: a gathered number is one of all ranks; W the number of ranks.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from train.config import TrainConfig
from train.ds_config import offload_device, precision, reduces_whole, zero_stage
from train.models.model import TwoTowers, attention_for, build_model
from train.objectives.towers_and_heads import TowersAndHeads, build_towers, example_inputs, forward_passes, has_teacher
from train.views import Views

FP32, HALF = 4, 2
# DeepSpeed's defaults where the JSON says nothing.
REDUCE_BUCKET, LIVE_PARAMETERS, PERSISTENCE_THRESHOLD = 500_000_000, 1_000_000_000, 100_000
# DeepSpeed sends gradients of these in the precision of torch_autocast (deepspeed.runtime.torch_autocast).
AUTOCAST_LAYERS = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
# fp32 arrays of a tile of the loss, and numbers that it keeps for each row: kernels' blockwise backend at its largest tile.
TILE_BYTES, ROW_BYTES = 4 * 512 * 1024 * FP32, 16 * FP32

ACTIVATIONS, GATHERED, GRADIENTS, GRADIENT_BUFFER, LOSS, STEP_COPIES = (
    "activations",
    "gathered weights, at most",
    "gradients",
    "gradients, in one buffer",
    "loss workspace",
    "copies for the optimizer's step",
)
TEACHER = "teacher's weights and average"
# What is not there at the end of a forward pass over all rows, and at the optimizer's step.
NOT_IN_FORWARD, NOT_IN_STEP = (GRADIENTS, STEP_COPIES), (ACTIVATIONS, GATHERED, LOSS)


@dataclass(frozen=True)
class ModelSize:
    """What the plan needs to know of a model. Counts are numbers, not bytes."""

    num_trained: int
    num_trained_autocast: int
    """those whose gradients travel in 16 bit under torch_autocast"""
    num_frozen: int
    num_small: int
    """those that ZeRO-3 leaves whole"""
    num_buffer_bytes: int
    embed_dim: int
    activation_bytes_per_row: int
    activation_bytes_fixed: int
    """16-bit copies of weights under torch_autocast"""
    input_bytes_per_row: int
    feature_widths: int
    """numbers of a pair that the towers hand to the loss, all views"""
    num_head: int = 0
    """weights of the objective's heads, among the trained ones"""
    passes: tuple[int, int] = (1, 1)
    """forward passes of a picture and of a text in a step"""
    has_teacher: bool = False


@dataclass(frozen=True)
class RankPlan:
    """Bytes that one of `world_size` ranks holds at its fullest, and sends each step; {what: bytes}."""

    world_size: int
    rows: int
    """pairs of this rank in a global batch"""
    num_chunks: int
    device: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)
    """offloaded to the node's memory or its NVMe drive"""
    wire: dict[str, int] = field(default_factory=dict)

    def fullest(self) -> tuple[str, int]:
        """The moment at which the device holds most, and how much."""
        moments = {"forward": NOT_IN_FORWARD, "step": NOT_IN_STEP}
        if self.num_chunks > 1:
            # Gradients of the micro-batches before are there already.
            moments["forward"] = (STEP_COPIES,)
        held = {when: sum(n for what, n in self.device.items() if what not in out) for when, out in moments.items()}
        return max(held.items(), key=lambda moment: moment[1])


def model_size(config: TrainConfig, ds_config: dict[str, Any], *, flash_attention: bool) -> ModelSize:
    """Build the model without memory and count. flash_attention: as GPUs run it, else the plain products that a CPU runs."""
    clip, preprocess = build_model(config.model, config.loss.kind, device="meta")
    with torch.device("meta"):
        towers = build_towers(clip, preprocess, config)
    trained = [weight for weight in towers.parameters() if weight.requires_grad]
    autocast = {
        id(w) for layer in towers.modules() if type(layer) in AUTOCAST_LAYERS for w in layer.parameters(recurse=False)
    }
    threshold = ds_config.get("zero_optimization", {}).get("stage3_param_persistence_threshold", PERSISTENCE_THRESHOLD)
    side = preprocess.size
    height, width = (side, side) if isinstance(side, int) else side
    shape, length = (3, height, width), clip.context_length
    with attention(flash_attention):
        few, more = (saved_bytes(towers, rows, shape, length, precision(ds_config)) for rows in (2, 4))
    per_row = (more.saved - few.saved) // 2
    return ModelSize(
        num_trained=sum(weight.numel() for weight in trained),
        num_trained_autocast=sum(weight.numel() for weight in trained if id(weight) in autocast),
        num_frozen=sum(weight.numel() for weight in towers.parameters() if not weight.requires_grad),
        num_small=sum(weight.numel() for weight in towers.parameters() if weight.numel() <= threshold),
        num_buffer_bytes=sum(buffer.numel() * buffer.element_size() for buffer in towers.buffers()),
        embed_dim=few.embed_dim,
        activation_bytes_per_row=per_row,
        activation_bytes_fixed=max(0, few.saved - 2 * per_row),
        input_bytes_per_row=input_bytes_per_row(config, towers, (height, width), length),
        num_head=sum(weight.numel() for weight in getattr(towers, "objective", torch.nn.Module()).parameters()),
        feature_widths=few.feature_widths,
        passes=forward_passes(towers),
        has_teacher=has_teacher(towers),
    )


def input_bytes_per_row(config: TrainConfig, towers: TwoTowers, side: tuple[int, int], length: int) -> int:
    """Pictures of uint8 and tokens of int64, of all views of a pair."""
    views = getattr(towers, "views", Views())
    height, width = (config.strong_augment.size,) * 2 if config.strong_augment.size else side
    return 3 * (side[0] * side[1] + views.strong_images * height * width) + 8 * length * views.num_texts


@dataclass(frozen=True)
class Saved:
    saved: int
    embed_dim: int
    feature_widths: int


def saved_bytes(towers: TwoTowers, rows: int, shape: tuple[int, int, int], length: int, kind: str) -> Saved:
    """Bytes that autograd keeps for the backward pass of `rows` pairs, each storage once, weights left out."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(kind, torch.float32)
    kept: dict[int, torch.UntypedStorage] = {}
    with FakeTensorMode():
        tensors = {
            name: torch.empty(weight.shape, dtype=dtype).requires_grad_(weight.requires_grad)
            for name, weight in towers.named_parameters()
        }
        tensors |= {name: torch.empty(buffer.shape, dtype=buffer.dtype) for name, buffer in towers.named_buffers()}
        weights = {tensor.untyped_storage()._cdata for tensor in tensors.values()}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                kept[storage._cdata] = storage
            return tensor

        images = torch.empty(rows, *shape, dtype=torch.uint8)
        texts = torch.ones(rows, length, dtype=torch.int64)
        context = torch.autocast("cpu", torch.bfloat16) if kind == "torch_autocast" else nullcontext()
        with context, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            features = torch.func.functional_call(towers, tensors, example_inputs(towers, images, texts))
    saved = sum(storage.nbytes() for storage in kept.values())
    if not isinstance(towers, TowersAndHeads):
        return Saved(saved, features[0].shape[1], 2 * features[0].shape[1])
    # What the heads give is a row for each pair; scales are one number.
    outputs = [output for output in features[0].values() if output.ndim == 2]
    return Saved(saved, features[-1].shape[1], sum(output.shape[1] for output in outputs))


@contextmanager
def attention(flash: bool) -> Iterator[None]:
    """Let the model's own choice of attention on a CPU stand, or take the flash kernel there that keeps what a GPU's keeps."""
    if not flash:
        yield
        return
    import train.models.model
    import train.objectives.towers_and_heads

    # Whoever runs towers has the name.
    modules = (train.models.model, train.objectives.towers_and_heads)
    for module in modules:
        module.attention_for = lambda _: nullcontext()
    try:
        yield
    finally:
        for module in modules:
            module.attention_for = attention_for


def plan_rank(size: ModelSize, config: TrainConfig, ds_config: dict[str, Any], world_size: int) -> RankPlan:
    """One rank of `world_size`."""
    rows = -(-config.batch_size // world_size)
    num_chunks = -(-rows // config.micro_batch_size) if config.micro_batch_size else 1
    return RankPlan(
        world_size,
        rows,
        num_chunks,
        *_states(size, ds_config, world_size, num_chunks, _batch(size, config, rows, num_chunks)),
        _wire(size, config, ds_config, world_size, rows, num_chunks),
    )


def _batch(size: ModelSize, config: TrainConfig, rows: int, num_chunks: int) -> dict[str, int]:
    """What grows with the batch."""
    features = rows * size.feature_widths * FP32
    gathered = 2 * config.batch_size * size.embed_dim * FP32
    at_once = -(-rows // num_chunks)
    return {
        "pictures and tokens": rows * size.input_bytes_per_row,
        ACTIVATIONS: size.activation_bytes_fixed + at_once * size.activation_bytes_per_row,
        # Their gradients are as large.
        "features and their gradients": 2 * features,
        LOSS: gathered + TILE_BYTES + (rows + config.batch_size) * ROW_BYTES,
    }


def _states(
    size: ModelSize,
    ds_config: dict[str, Any],
    world_size: int,
    num_chunks: int,
    batch: dict[str, int],
) -> tuple[dict[str, int], dict[str, int]]:
    """What the model itself takes on the device and in the host's memory."""
    stage, kind = zero_stage(ds_config), precision(ds_config)
    width = HALF if kind in ("bf16", "fp16") else FP32
    share = -(-size.num_trained // world_size)
    num_weights = size.num_trained + size.num_frozen
    # ZeRO keeps fp32 masters of its share, also of weights that are fp32 already; AdamW two moments.
    optimizer = 2 * FP32 * size.num_trained if stage == 0 else 3 * FP32 * share
    zero = ds_config.get("zero_optimization", {})
    device, host = {}, {}
    if stage < 3:
        device["weights"] = width * num_weights + size.num_buffer_bytes
    else:
        sharded = width * (-(-(num_weights - size.num_small) // world_size)) + width * size.num_small
        (host if offload_device(ds_config, "param") != "none" else device)["weights"] = sharded
        live = min(num_weights - size.num_small, zero.get("stage3_max_live_parameters", LIVE_PARAMETERS))
        device[GATHERED] = (width * live if world_size > 1 or "weights" in host else 0) + size.num_buffer_bytes
    away = host if offload_device(ds_config, "optimizer") != "none" else device
    away["optimizer"] = optimizer
    if reduces_whole(ds_config):
        # Kept from step to step (train.whole_gradients).
        device[GRADIENT_BUFFER] = width * size.num_trained
    else:
        # A step of several micro-batches sums whole gradients before it reduces them once. ZeRO averages into its share.
        device[GRADIENTS] = width * (size.num_trained if stage < 2 or num_chunks > 1 else 0) + width * share
    if not reduces_whole(ds_config) or width != FP32:
        # ZeRO copies its share to fp32. AdamW is fused and needs nothing more.
        away[STEP_COPIES] = FP32 * share
    if size.has_teacher:
        # Its average lies as the masters do; what forward uses is whole on every rank.
        device[TEACHER] = width * num_weights + (FP32 * share if stage else 0)
    if not reduces_whole(ds_config):
        device["reduce buckets"] = reduce_bytes(size, ds_config, width)
    return {**device, **batch}, host


def reduce_bytes(size: ModelSize, ds_config: dict[str, Any], width: int) -> int:
    """Buckets in which gradients travel: one, or two when reducing overlaps the backward pass, of each precision that is sent."""
    zero = ds_config.get("zero_optimization", {})
    widths = {FP32, HALF} if precision(ds_config) == "torch_autocast" and size.num_trained_autocast else {width}
    overlaps = zero.get("overlap_comm", zero_stage(ds_config) == 3)
    return int(zero.get("reduce_bucket_size", REDUCE_BUCKET)) * sum(widths) * (2 if overlaps else 1)


def _wire(
    size: ModelSize, config: TrainConfig, ds_config: dict[str, Any], world_size: int, rows: int, num_chunks: int
) -> dict[str, int]:
    """Bytes that a rank sends each step, by rings: of what all ranks hold in the end, each sends a share of (W - 1) / W."""
    stage, kind = zero_stage(ds_config), precision(ds_config)
    width = HALF if kind in ("bf16", "fp16") else FP32
    halved = size.num_trained_autocast if kind == "torch_autocast" and not reduces_whole(ds_config) else 0
    gradients = width * (size.num_trained - halved) + HALF * halved
    weights = width * (size.num_trained + size.num_frozen - size.num_small if stage == 3 else size.num_trained)
    # ZeRO-3 gathers for each forward and each backward pass; feature caching has a second forward.
    passes = {0: 0, 1: 1, 2: 1, 3: 2 if num_chunks == 1 else 3 * num_chunks}[stage]
    part = (world_size - 1) / world_size
    return {
        # Reduced to its owner; at ZeRO-0 to everyone, which is twice as much.
        "gradients": int(part * gradients * (2 if stage == 0 else 1)),
        "weights": int(part * weights * passes),
        "features": rows * size.feature_widths * FP32 * (world_size - 1),
        # A sum over ranks of what each holds a share of.
        **({"teacher's weights": int(2 * part * width * size.num_trained)} if size.has_teacher and stage else {}),
        # Two numbers of a column to the rank that has its row, eight of a row to all, in float64.
        "loss": int(part * config.batch_size * (2 + 8) * 2 * FP32),
    }
