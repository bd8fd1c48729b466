"""Counted floating-point operations of a step, and the fastest that a device could do them: what MFU is made of.

In: a model, before any engine takes its parameters. Out: FLOP of one pair, forward and backward, counted on the meta device, where nothing
is computed; FLOP of the loss by its definition; peak rates by the makers' data sheets, or as measured on a processor.

MFU counts what the mathematics needs: not the second forward pass of activation checkpointing or of feature caching.
"""

import copy
import logging
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from train.objectives.towers_and_heads import example_inputs, has_teacher

logger = logging.getLogger(__name__)

# Dense TFLOP/s of 16-bit and of 32-bit matrix products (TF32 where the device has it), by a part of torch's name for the device. The first
# match counts, so longer names come first.
PEAK_TFLOPS = (
    ("GB200", 2500.0, 1250.0),  # NVIDIA GB200 NVL72 data sheet, a GPU
    ("B200", 2250.0, 1125.0),  # NVIDIA HGX B200 data sheet
    ("H200", 989.4, 494.7),  # NVIDIA H200 data sheet
    ("H100 PCIe", 756.0, 378.0),  # NVIDIA H100 data sheet
    ("H100 NVL", 835.0, 417.5),  # NVIDIA H100 NVL product brief
    ("H100", 989.4, 494.7),  # NVIDIA H100 whitepaper, SXM5
    ("H800", 989.4, 494.7),  # as H100 SXM5, slower links
    ("A100", 312.0, 156.0),  # NVIDIA A100 whitepaper
    ("A800", 312.0, 156.0),  # as A100
    ("L40S", 362.0, 183.0),  # NVIDIA L40S data sheet
    ("L40", 181.0, 90.5),  # NVIDIA L40 data sheet
    ("L4", 121.0, 60.0),  # NVIDIA L4 data sheet
    ("A40", 149.7, 74.8),  # NVIDIA A40 data sheet
    ("A10", 125.0, 62.5),  # NVIDIA A10 data sheet
    ("RTX 4090", 165.2, 82.6),  # NVIDIA Ada whitepaper, fp32 accumulation
    ("RTX 3090", 71.0, 35.6),  # NVIDIA GA102 whitepaper, fp32 accumulation
    ("V100", 125.0, 15.7),  # NVIDIA V100 whitepaper, SXM2; no TF32
    ("T4", 65.0, 8.1),  # NVIDIA T4 data sheet; no TF32
    ("MI300X", 1307.4, 163.4),  # AMD MI300X data sheet
    ("MI250X", 383.0, 95.7),  # AMD MI250X data sheet, both dies
)
# The side of the products that a processor's rate is measured with: long enough to be out of the caches, short enough to be soon done.
MEASURED_SIDE, MEASURED_REPEATS = 768, 4


@dataclass(frozen=True)
class StepCost:
    """What a pair costs and what a rank could do. None: unknown."""

    pair_flop: float | None
    """forward and backward of one pair: both towers on all its views, heads, teacher"""
    embed_dim: int | None
    peak_tflops: float | None
    """of one rank's device, in the precision that it trains in"""
    peak_source: str

    def utilisation(self, pairs_per_s_per_rank: float, global_batch: float) -> dict[str, float | None]:
        """Model FLOP/s of a rank, and their share of the peak (MFU)."""
        if self.pair_flop is None or self.embed_dim is None:
            return {"tflops_per_rank": None, "mfu": None}
        flop = self.pair_flop + loss_flop_of_a_pair(global_batch, self.embed_dim)
        tflops = flop * pairs_per_s_per_rank / 1e12
        return {"tflops_per_rank": tflops, "mfu": tflops / self.peak_tflops if self.peak_tflops else None}


def step_cost(
    towers: torch.nn.Module, image_size: tuple[int, int], ds_config: dict[str, Any], device: torch.device
) -> StepCost:
    """Count and look up, on the rank that logs. The towers as train.models.model builds them, before an engine has them."""
    dtype = training_dtype(ds_config)
    peak, source = peak_tflops(device, dtype)
    clip = towers.clip
    context_length = getattr(clip, "context_length", None)
    pair_flop = None if context_length is None else flop_of_a_pair(towers, image_size, context_length)
    return StepCost(pair_flop, feature_width(clip), peak, f"{source}, {str(dtype).removeprefix('torch.')}")


def flop_of_a_pair(towers: torch.nn.Module, image_size: tuple[int, int], context_length: int) -> float | None:
    """FLOP of forward and backward of all views of one pair, heads and teacher included; None for a model that can't run without memory.

    image_size: height, width in pixels. What is frozen costs no backward pass. A multiplication and an addition are two FLOP; only products
    and convolutions count.
    """
    twin = meta_twin(towers)
    twin.clip.set_grad_checkpointing(False)
    # Two pairs: BatchNorm can't normalise one.
    image_BCHW = torch.empty(2, 3, *image_size, dtype=torch.uint8, device="meta")
    text_BL = torch.empty(2, context_length, dtype=torch.int64, device="meta")
    try:
        # Patch dropout draws on the CPU: one rank counts, and must stay where the others are.
        with torch.random.fork_rng(devices=[]), FlopCounterMode(display=False) as counter:
            outputs = tree_leaves(twin(*example_inputs(twin, image_BCHW, text_BL)))
            sum(output.sum() for output in outputs if output.requires_grad).backward()
            if has_teacher(twin):
                with torch.no_grad():
                    twin(*example_inputs(twin, image_BCHW, text_BL)[:-1], None)
    except RuntimeError as error:
        # A tower that looks at values (a text tower of another library, for example) has none there.
        logger.warning("MFU will not be known, the model can't be counted without memory: %s", error)
        return None
    return counter.get_total_flops() / 2


def meta_twin(module: torch.nn.Module) -> torch.nn.Module:
    """A copy without memory: parameters and buffers on the meta device."""
    memo: dict[int, Any] = {
        id(tensor): torch.nn.Parameter(tensor.to("meta"), tensor.requires_grad)
        if isinstance(tensor, torch.nn.Parameter)
        else tensor.to("meta")
        for tensor in (*module.parameters(), *module.buffers())
    }
    return copy.deepcopy(module, memo)


def feature_width(clip: torch.nn.Module) -> int | None:
    projection = getattr(clip, "text_projection", None)
    if projection is None:
        projection = getattr(getattr(clip, "text", None), "text_projection", None)
    weight = getattr(projection, "weight", None)
    if weight is not None:
        return int(weight.shape[0])
    return int(projection.shape[1]) if isinstance(projection, torch.Tensor) else None


def loss_flop_of_a_pair(global_batch: float, embed_dim: int) -> float:
    """A row's share of the loss by its definition: one product forward and two backward, of G x D each."""
    return 3 * 2 * global_batch * embed_dim


def training_dtype(ds_config: dict[str, Any]) -> torch.dtype:
    """What a run's matrix products are in, by its DeepSpeed JSON."""
    autocast = ds_config.get("torch_autocast", {})
    if autocast.get("enabled"):
        return (
            torch.float16
            if "16" in str(autocast.get("dtype")) and "b" not in str(autocast.get("dtype"))
            else torch.bfloat16
        )
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if ds_config.get(name, {}).get("enabled"):
            return dtype
    return torch.float32


def peak_tflops(device: torch.device, dtype: torch.dtype) -> tuple[float | None, str]:
    """Peak rate of a device in TFLOP/s and where it comes from; measured on a processor, (None, ...) for an unknown GPU."""
    if device.type == "cpu":
        return measured_tflops(dtype), "measured product rate"
    name = torch.cuda.get_device_name(device)
    for part, half, single in PEAK_TFLOPS:
        if part in name:
            return (single if dtype == torch.float32 else half), f"data sheet of {part}"
    return None, f"no data sheet of {name} in train/planning/flops.py"


def measured_tflops(dtype: torch.dtype) -> float:
    """The best of a few products of square matrices on this process's threads, in TFLOP/s."""
    left, right = (torch.ones(MEASURED_SIDE, MEASURED_SIDE, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(MEASURED_REPEATS):
        began_s = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - began_s)
    return 2 * MEASURED_SIDE**3 / min(seconds) / 1e12
