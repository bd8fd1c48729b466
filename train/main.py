"""Train a model: `deepspeed train/main.py RECIPE --ds_config ds_configs/FILE.json [flags]`.

Every field of the recipe is a flag; `python train/main.py RECIPE --help` lists them.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
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
    lines += [f"  {name:<24}{recipe.__doc__}" for name, recipe in RECIPES.items()]
    lines += [
        "",
        f"`python {PROGRAM} RECIPE --ds_config FILE --plan` says what a run would take (memory, steps), without training.",
    ]
    lines += ["", f"`python {PROGRAM} RECIPE --help` lists the flags of a recipe with their defaults."]
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        sys.exit(0 if arguments else 2)
    recipe = arguments[0]
    if recipe not in RECIPES:
        raise ValueError(f"unknown recipe {recipe!r}; {nearest(recipe, RECIPES)}")
    if "--plan" in arguments:
        plan(recipe, arguments[1:])
        return
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


@dataclass(frozen=True)
class CommandLine(TrainConfig):
    """A training run, or its plan."""

    plan: bool = False
    """print what the run would take, and do not train: memory of a rank, bytes on the wire, steps; needs neither data nor GPUs"""
    plan_world_size: tuple[int, ...] = (1, 8)
    """with plan: numbers of ranks, a column for each"""


def plan(recipe: str, arguments: Sequence[str]) -> None:
    """Print the plan of a run; where its data are and where it goes need not be known for it."""
    command = parse_command_line(recipe, arguments)
    config = replace(command, out=command.out or "(none)")
    if not (config.data.store or config.data.shards):
        config = replace(config, data=replace(config.data, store="(none)"))
    config.check()
    ds_config = read_ds_config(config.ds_config)
    from train.planning.table import print_plan

    print_plan(replace(config, data=command.data), recipe, ds_config, command.plan_world_size)


def parse_config(recipe: str, arguments: Sequence[str]) -> TrainConfig:
    """The recipe's defaults with the command line's flags over them."""
    command = parse_command_line(recipe, arguments)
    config = TrainConfig(**{field.name: getattr(command, field.name) for field in fields(TrainConfig)})
    config.check()
    return config


def parse_command_line(recipe: str, arguments: Sequence[str]) -> CommandLine:
    return parse(
        CommandLine,
        program=f"{PROGRAM} {recipe}",
        description=RECIPES[recipe].__doc__ or "",
        arguments=arguments,
        default=CommandLine(**RECIPES[recipe]()),
    )


if __name__ == "__main__":
    run_stoppable(main)
