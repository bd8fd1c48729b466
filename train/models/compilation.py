"""torch.compile for the towers, block by block: one short compilation serves every block of a kind, names of weights stay as they are, and
what sits outside of blocks (hooks on the trunks, ZeRO's own, the loss) is not in it.
"""

import shutil

from torch import nn

from train.config import ObjectiveConfig

# Where open_clip and timm keep their blocks.
CONTAINERS = ("resblocks", "blocks", "layer1", "layer2", "layer3", "layer4", "stages")


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
    for block in blocks:
        # In place: a wrapper would put its name in front of every weight's.
        block.compile(backend=backend)
    return len(blocks)


def _holds(block: nn.Module, containers: list[nn.Module]) -> bool:
    """Whether a stage holds blocks of its own."""
    inside = {id(module) for module in block.modules()}
    return any(id(container) in inside for container in containers)


def check_compiles(*, stage: int, precision: str, device_type: str, config: ObjectiveConfig) -> None:
    """Raises ValueError for what compiled blocks would not see (ZeRO-3's hooks in them, an objective's on them), and where they are wrong.

    precision: as train.ds_config.precision names it.
    """
    if device_type == "cpu" and precision != "fp32":
        raise ValueError(
            "--compile on a CPU goes with fp32 alone: under bfloat16 autocast torch 2.14's compiled backward gave an infinite gradient "
            "where the plain one is finite; leave it out (it brings no speed on a CPU)"
        )
    if stage == 3:
        raise ValueError(
            "--compile does not go with ZeRO stage 3, whose hooks fetch weights inside of blocks; take a JSON of a lower stage"
        )
    if config.text_dropout or config.text_drop_path:
        raise ValueError(
            "--compile does not go with objective.text_dropout and text_drop_path, which are hooks on blocks; leave it out"
        )
