"""Train a model: `deepspeed train/main.py RECIPE --ds_config ds_configs/FILE.json [flags]`.

Every field of the recipe is a flag; `python train/main.py RECIPE --help` lists them.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

# `deepspeed train/main.py` puts train/ first on the path, where its modules would shadow others; the root belongs there.
ROOT = str(Path(__file__).resolve().parent.parent)
sys.path[:] = [ROOT, *(entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent)]
# DeepSpeed's launcher says LOCAL_SIZE, MosaicML Streaming reads LOCAL_WORLD_SIZE when it is imported (streaming issue 717).
os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1"))

from mining.command_line import nearest, parse
from mining.stopping import run_stoppable
from train.config import TrainConfig
from train.data.pair_store import PairStore
from train.ds_config import read_ds_config
from train.recipes import RECIPES

PROGRAM = "train/main.py"


def usage() -> str:
    lines = [
        f"usage: deepspeed {PROGRAM} RECIPE --ds_config ds_configs/FILE.json --out runs/NAME [flags]",
        "",
        "recipes:",
    ]
    lines += [f"  {name:<18}{recipe.__doc__}" for name, recipe in RECIPES.items()]
    lines += ["", f"`python {PROGRAM} RECIPE --help` lists the flags of a recipe with their defaults."]
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        sys.exit(0 if arguments else 2)
    recipe = arguments[0]
    if recipe not in RECIPES:
        raise ValueError(f"unknown recipe {recipe!r}; {nearest(recipe, RECIPES)}")
    config = parse_config(recipe, arguments[1:])
    read_ds_config(config.ds_config)
    if config.data.store:
        PairStore.open(config.data.store, cache=config.data.cache or None)
    run_training(config, recipe)


def run_training(config: TrainConfig, recipe: str, stop_after: int = 0) -> None:
    """Join the other ranks and train; `stop_after` as in train.loop."""
    # Imported here: torch, DeepSpeed and open_clip take seconds, which a mistake in a flag or a path need not wait for.
    from train.distributed import connected
    from train.loop import train

    with connected(config.device) as ranks:
        train(config, recipe, ranks, stop_after)


def parse_config(recipe: str, arguments: Sequence[str]) -> TrainConfig:
    """The recipe's defaults with the command line's flags over them."""
    config = parse(
        TrainConfig,
        program=f"{PROGRAM} {recipe}",
        description=RECIPES[recipe].__doc__ or "",
        arguments=arguments,
        default=TrainConfig(**RECIPES[recipe]()),
    )
    config.check()
    return config


if __name__ == "__main__":
    run_stoppable(main)
