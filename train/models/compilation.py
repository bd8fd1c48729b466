"""torch.compile for the towers, block by block: one short compilation serves every block of a kind, names of weights stay as they are, and
what sits outside of blocks (hooks on the trunks, ZeRO's own, the loss) is not in it.
"""

import shutil
from typing import Any

import torch
from torch import nn

from train.config import ObjectiveConfig

# Where open_clip and timm keep their blocks.
CONTAINERS = ("resblocks", "blocks", "layer1", "layer2", "layer3", "layer4", "stages")
AVX2_BITS = 256


def compile_blocks(model: nn.Module, device_type: str, *, backend: str = "inductor") -> int:
    """Compile the blocks of both towers in place, when they first run. Returns how many there are.

    Raises ValueError for towers without known blocks, and on a CPU without a C++ compiler.
    """
    if backend == "inductor" and device_type == "cpu" and shutil.which("g++") is None:
        raise ValueError("--compile on a CPU needs g++ on PATH (apt install g++); leave it out")
    containers = [module for name, module in model.named_modules() if name.rpartition(".")[2] in CONTAINERS]
    blocks = [block for container in containers for block in container if not _holds(block, containers)]
    if not blocks:
        raise ValueError(f"--compile finds no blocks in {type(model.visual).__name__}; leave it out")
    options = compiler_options(device_type) if backend == "inductor" else None
    for block in blocks:
        # In place: a wrapper would put its name in front of every weight's.
        block.compile(backend=backend, options=options)
    return len(blocks)


def compiler_options(device_type: str) -> dict[str, Any] | None:
    """Inductor's options with which the blocks' gradients are right.

    With 512-bit vectors the gradient of an attention's queries, keys and values goes through one loop that transposes bfloat16 tiles in a
    local array. g++ 12.2 at -O3 (its -ftree-slp-vectorize; -O2 and clang are right) lets that loop read the array before it is written:
    infinite or wrong gradients of the keys. Torch 2.14 leaves out -ftree-loop-vectorize for faults of this kind (pytorch/pytorch#115261),
    not this one. With 256-bit vectors such tiles don't arise.
    """
    if device_type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX512":
        return {"cpp.simdlen": AVX2_BITS}
    return None


def _holds(block: nn.Module, containers: list[nn.Module]) -> bool:
    """Whether a stage holds blocks of its own."""
    inside = {id(module) for module in block.modules()}
    return any(id(container) in inside for container in containers)


def check_compiles(*, stage: int, config: ObjectiveConfig) -> None:
    """Raises ValueError for what compiled blocks would not see: ZeRO-3's hooks in them, an objective's on them."""
    if stage == 3:
        raise ValueError(
            "--compile does not go with ZeRO stage 3, whose hooks fetch weights inside of blocks; take a JSON of a lower stage"
        )
    if config.text_dropout or config.text_drop_path:
        raise ValueError(
            "--compile does not go with objective.text_dropout and text_drop_path, which are hooks on blocks; leave it out"
        )
