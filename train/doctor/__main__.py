"""`python -m train.doctor`: check a machine, and a run's settings when they are given, before training."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated

import tyro

from mining.command_line import nearest, parse, run
from train.config import TrainConfig
from train.doctor import machine, round_trip, shared_memory, training
from train.doctor.finding import Finding
from train.recipes import RECIPES

PROGRAM = "python -m train.doctor"
DESCRIPTION = f"""What is wrong here, one line for each check, with the remedy: packages, programs, limits, shared memory, ranks that
meet; and with the flags of a run its memory regime, model, data and disk.

Example: {PROGRAM}

Example: {PROGRAM} pocket-pretrain --ds-config ds_configs/cpu.json --data.store data/cc12m --out runs/a --ranks 2

Exit code 1 when something is broken, 0 with warnings alone."""
BROKEN_EXIT_CODE = 1
# Tokens of a caption where no model is named: CLIP's.
CONTEXT_LENGTH, IMAGE_SIDE = 77, 224


@dataclass(frozen=True)
class DoctorConfig:
    """Flags of `python -m train.doctor`; the others are those of train/main.py."""

    ranks: int = 0
    """ranks of the run on this machine; 0: one a GPU, or two without"""
    training: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)


def main(arguments: Sequence[str]) -> None:
    """Print a line a check; exit code 1 when something is broken."""
    recipe = {}
    if arguments and not arguments[0].startswith("-"):
        if arguments[0] not in RECIPES:
            raise ValueError(f"unknown recipe {arguments[0]!r}; {nearest(arguments[0], RECIPES)}")
        recipe, arguments = RECIPES[arguments[0]](), arguments[1:]
    default = DoctorConfig(training=TrainConfig(**recipe))
    flags = parse(DoctorConfig, program=PROGRAM, description=DESCRIPTION, arguments=arguments, default=default)
    if flags.ranks < 0:
        raise ValueError(f"--ranks {flags.ranks} must be 0 (one a GPU) or more")
    findings = examine(
        flags.training, flags.ranks, with_settings=bool(arguments or recipe), show=lambda one: print(one, flush=True)
    )
    levels = [finding.level for finding in findings]
    print(f"\n{levels.count('ok')} ok, {levels.count('warning')} warnings, {levels.count('broken')} broken")
    sys.exit(BROKEN_EXIT_CODE if "broken" in levels else 0)


def examine(config: TrainConfig, ranks: int, *, with_settings: bool, show: Callable[[Finding], None]) -> list[Finding]:
    """Every finding, each shown as soon as it is there."""
    import torch

    device = "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"
    ranks = ranks or (torch.cuda.device_count() if device == "cuda" else 2)
    seen: list[Finding] = []

    def note(findings: Sequence[Finding]) -> None:
        for finding in findings:
            show(finding)
        seen.extend(findings)

    regime, ds_config = training.memory_regime(config.ds_config)
    places = training.offloads(ds_config)
    for check in (
        machine.packages,
        machine.import_order,
        partial(machine.programs, builds_operations=bool(places), uses_nvme="nvme" in places),
        machine.open_files,
        partial(machine.environment, os.environ),
        machine.host_name,
        machine.gpus,
        partial(machine.threads, ranks, config.threads, os.environ),
        partial(shared_memory.size, in_flight(config, ranks)),
        shared_memory.leftovers,
        partial(round_trip.check, ranks, device),
    ):
        note(check())
    if with_settings:
        note(training.settings(config))
        note(regime)
        found, num_parameters = training.model(config)
        note(found)
        note(training.data(config, ranks))
        note(training.run_folder(config, num_parameters))
    return seen


def in_flight(config: TrainConfig, ranks: int) -> int:
    """Bytes of batches between workers and ranks, with the picture size of the model where it is known."""
    from train.models.model import architecture

    side, length = IMAGE_SIDE, CONTEXT_LENGTH
    try:
        model = architecture(config.model.name)
    except ValueError:
        # The check of the model says so.
        model = {}
    size = model.get("vision_cfg", {}).get("image_size", side)
    height, width = (size, size) if isinstance(size, int) else size
    length = model.get("text_cfg", {}).get("context_length", length)
    return shared_memory.batches_in_flight_bytes(
        ranks=ranks,
        workers=config.data.workers,
        batch_size=config.batch_size,
        image_bytes=3 * height * width,
        text_bytes=8 * length,
    )


if __name__ == "__main__":
    run(main)
