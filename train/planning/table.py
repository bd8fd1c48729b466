"""`train/main.py RECIPE --plan`: the plan of a run as a table on stdout, a column for each number of ranks."""

from collections.abc import Sequence
from typing import Any

from train.config import TrainConfig
from train.data.pair_store import PairStore
from train.ds_config import offload_device, precision, zero_stage
from train.planning.plan import ModelSize, RankPlan, model_size, plan_rank

GIB, MIB = 2**30, 2**20


def print_plan(config: TrainConfig, recipe: str, ds_config: dict[str, Any], world_sizes: Sequence[int]) -> None:
    """Raises ValueError for a number of ranks that leaves a rank without a pair."""
    for world_size in world_sizes:
        if not 1 <= world_size <= config.batch_size:
            raise ValueError(f"plan_world_size={world_size} must be 1 to batch_size={config.batch_size} ranks")
    on_cpu = config.device == "cpu"
    size = model_size(config, ds_config, flash_attention=not on_cpu)
    plans = [plan_rank(size, config, ds_config, world_size) for world_size in world_sizes]
    print("\n".join(plan_lines(config, recipe, ds_config, size, plans)))


def plan_lines(
    config: TrainConfig, recipe: str, ds_config: dict[str, Any], size: ModelSize, plans: Sequence[RankPlan]
) -> list[str]:
    """The whole text."""
    lines = [*_heading(config, recipe, ds_config, size), ""]
    lines += _row("ranks", [str(plan.world_size) for plan in plans])
    lines += _row("pairs of a rank", [f"{plan.rows:,}" for plan in plans])
    if config.micro_batch_size:
        lines += _row("  micro-batches of them", [str(plan.num_chunks) for plan in plans])
    device = [{**plan.device, "together at the fullest moment": plan.fullest()[1]} for plan in plans]
    where = offload_device(ds_config, "optimizer")
    lines += _section("memory of a rank, GiB", device, GIB, "{:,.3f}")
    lines += _row("  which is", [plan.fullest()[0] for plan in plans])
    if any(plan.host for plan in plans):
        title = "offloaded to the NVMe drive" if where == "nvme" else "offloaded to the node's memory"
        lines += _section(f"{title}, GiB a rank", [_with_total(plan.host) for plan in plans], GIB, "{:,.3f}")
    wire = [_with_total(plan.wire) for plan in plans]
    lines += _section("sent by a rank each step, MiB", wire, MIB, "{:,.1f}")
    lines += ["", steps_line(config), "", *FOOTNOTE]
    return lines


FOOTNOTE = (
    "Fullest moment: the end of the (last) forward pass, with all activations, or the optimizer's step, with gradients and their copies",
    "but no activations. Not in it: the allocator's slack, library workspaces (1 to 2 GiB on a GPU), what a layer needs for a moment. A",
    "smaller --micro_batch_size divides the activations at the price of a second forward pass; --model.grad_checkpointing keeps only the",
    "input of each block.",
)


def _heading(config: TrainConfig, recipe: str, ds_config: dict[str, Any], size: ModelSize) -> list[str]:
    total = size.num_trained + size.num_frozen
    frozen = f", {size.num_frozen / 1e6:,.1f} M of them frozen" if size.num_frozen else ""
    micro = (
        f"micro-batches of {config.micro_batch_size:,}" if config.micro_batch_size else "all pairs of a rank at once"
    )
    heads = f", {size.num_head / 1e6:,.1f} M of them in heads" if size.num_head else ""
    weights = f"{config.model.name}, {total / 1e6:,.1f} M weights{frozen}{heads}"
    return [
        f"{recipe}: {weights}; {config.loss.kind} loss; batch of {config.batch_size:,}, {micro}",
        *_passes(config, size),
        f"{config.ds_config}: ZeRO {zero_stage(ds_config)}, {precision(ds_config)}"
        + (", activation checkpointing" if config.model.grad_checkpointing else ""),
    ]


def _passes(config: TrainConfig, size: ModelSize) -> list[str]:
    """What the views cost, for objectives that have some."""
    if config.objective.name == "clip":
        return []
    image, text = size.passes
    teacher = ", the teacher's included" if size.has_teacher else ""
    return [
        f"{config.objective.name}: {image} forward passes of each picture and {text} of each text in a step{teacher}"
    ]


def _row(name: str, cells: Sequence[str]) -> list[str]:
    return [f"{name:<34}" + "".join(f"{cell:>11}" for cell in cells)]


def _section(title: str, columns: Sequence[dict[str, int]], unit: int, form: str) -> list[str]:
    lines = ["", title]
    for name in columns[0]:
        lines += _row(f"  {name}", [form.format(column[name] / unit) for column in columns])
    return lines


def _with_total(column: dict[str, int]) -> dict[str, int]:
    return {**column, "total": sum(column.values())}


def steps_line(config: TrainConfig) -> str:
    """How many optimizer steps the run takes, where that can be said without reading the data."""
    if config.max_steps:
        return f"steps: {config.max_steps:,}"
    if not config.data.store:
        return "steps: give --data.store or --max_steps to know"
    num_pairs = len(PairStore.open(config.data.store, cache=config.data.cache or None))
    per_epoch = -(-num_pairs // (config.batch_size // (1 + config.data.hard_per_anchor)))
    # A pair table names noise, which is no anchor.
    bound = "at most " if config.data.pairs else ""
    return f"steps: {bound}{config.num_steps(per_epoch):,} ({config.epochs:g} epochs of {bound}{per_epoch:,}; {num_pairs:,} pairs)"
