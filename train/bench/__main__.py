"""`python -m train.bench`: our trainer against bare loops and against open_clip's trainer; what each method costs."""

import json
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from mining.command_line import parse, run
from train.bench.recipe_cost import chosen_recipes, compared, describe_recipes, measure_recipes
from train.ingest import bench as ingest_bench
from train.local_ranks import start_ranks, stop_ranks

PROGRAM = "python -m train.bench"
DESCRIPTION = f"""Pairs a second of our trainer and of others, in turn, with medians.

  memory   against the bare loop: the same model, the same batches in memory, DistributedDataParallel, torch's
           fused AdamW; and where the JSON shards, beside bare DeepSpeed with that JSON
  tars     against open_clip_train's train_one_epoch: the same model, the same tars, its own data pipeline
  checkpoint   ours alone: how long a step waits for a save's snapshot, and what the writing adds to the steps beside it

With --recipes instead: what methods cost, passes through the towers, pairs a second and memory, beside CLIP's.

Examples: {PROGRAM} --ranks 2 --out results/train_bench.json
          {PROGRAM} --recipes all --rounds 3 --out results/recipe_cost.json"""
PEERS = {"memory": "bare_loop", "tars": "open_clip"}


@dataclass(frozen=True)
class BenchConfig:
    """Flags of `python -m train.bench`."""

    parts: tuple[Literal["memory", "tars", "checkpoint"], ...] = ("memory", "tars")
    """what to measure"""
    recipes: tuple[str, ...] = ()
    """measure these recipes instead, each with its own model, the first is what the others are compared with; all: the pocket recipe of
    every method"""
    model: str = "pocket-rn"
    """model of all contenders"""
    ds_config: str = "ds_configs/cpu.json"
    """our memory regime; its precision is the others' too"""
    ranks: int = 2
    """processes on this machine"""
    threads: int = 1
    """CPU threads of each rank"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPUs when there are any"""
    batch_size: int = 128
    """pairs in a global batch"""
    steps: int = 12
    """steps of a round in memory"""
    rounds: int = 5
    """how often each runs, in turn"""
    workers: int = 1
    """data loading processes of each rank"""
    shards: tuple[str, ...] = ()
    """tars to use, local ones; without it tars of JPEGs are made as the next three flags say"""
    num_pairs: int = 2048
    """pairs in the tars that are made"""
    pairs_per_shard: int = 256
    """pairs in each tar that is made; open_clip wants as many tars as workers, over all ranks"""
    side: int = 96
    """width and height of the JPEGs that are made, in pixels"""
    folder: Path = Path(tempfile.gettempdir())
    """where tars and logs are made for the time of the benchmark"""
    out: Path | None = None
    """JSON file for the results"""


def main(arguments: Sequence[str]) -> None:
    """Raises ValueError for a user's mistake, and when a rank fails."""
    config = parse(BenchConfig, program=PROGRAM, description=DESCRIPTION, arguments=arguments)
    for name in ("ranks", "threads", "batch_size", "steps", "rounds", "num_pairs", "pairs_per_shard", "side"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(config, name)} must be at least 1")
    if config.batch_size % config.ranks:
        raise ValueError(
            f"--batch-size {config.batch_size} must be a multiple of --ranks {config.ranks}: all take equal parts"
        )
    with tempfile.TemporaryDirectory(prefix="train-bench-", dir=config.folder) as folder:
        report = measure_costs(Path(folder), config) if config.recipes else measure(Path(folder), config)
    print(describe_recipes(report["recipes"]) if config.recipes else describe(report))
    if config.out:
        config.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"written: {config.out}")


def measure(folder: Path, config: BenchConfig) -> dict[str, Any]:
    """Start the ranks and wait for them."""
    settings = {**asdict(config), "folder": str(folder), "out": None}
    if "tars" in config.parts and not config.shards:
        made = ingest_bench.BenchConfig(
            num_pairs=config.num_pairs, pairs_per_shard=config.pairs_per_shard, side=config.side
        )
        settings["shards"] = [str(ingest_bench.make_tars(folder / "tars", made))]
    (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    command = ["-m", "train.bench.contenders", str(folder / "settings.json"), str(folder / "result.json")]
    processes = start_ranks(command, config.ranks, threads=config.threads, stdout=subprocess.DEVNULL)
    try:
        codes = [process.wait() for process in processes]
    finally:
        stop_ranks(processes)
    if any(codes):
        raise ValueError(f"ranks ended with exit codes {codes}; what they said is above")
    found = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    report = make_report(found["rounds"], found["ours_ms_a_step"], config)
    return {**report, "checkpoint": found["checkpoint"]} if found["checkpoint"] else report


def measure_costs(folder: Path, config: BenchConfig) -> dict[str, Any]:
    """The same of recipes, each in ranks of its own."""
    found = measure_recipes(folder, {**asdict(config), "folder": None, "out": None}, chosen_recipes(config.recipes))
    return {"machine": machine(), "config": asdict(config) | {"folder": None, "out": None}, "recipes": compared(found)}


def machine() -> dict[str, Any]:
    packages = ("torch", "deepspeed", "open_clip_torch", "webdataset")
    return {**ingest_bench.machine(), **{name: version(name) for name in packages}}


def make_report(
    rounds: dict[str, dict[str, list[float]]], where: dict[str, dict[str, float]], config: BenchConfig
) -> dict[str, Any]:
    parts = {part: part_report(rates, PEERS[part], where[part], config.batch_size) for part, rates in rounds.items()}
    return {
        "machine": machine(),
        "config": {**asdict(config), "folder": None, "out": None, "shards": len(config.shards) or "made"},
        **parts,
    }


def part_report(rates: dict[str, list[float]], peer: str, where: dict[str, float], batch_size: int) -> dict[str, Any]:
    """ratio: ours to the peer's; above 1 ours is faster. Both of medians, and the median of each round's; beside: to other peers'."""
    medians = {name: statistics.median(some) for name, some in rates.items()}
    return {
        "pairs_per_s": rates,
        "median_pairs_per_s": medians,
        "median_step_ms": {name: 1000 * batch_size / median for name, median in medians.items()},
        **ratios(rates, peer),
        "beside": {name: ratios(rates, name) for name in rates if name not in ("ours", peer)},
        "ours_ms_a_step": where,
    }


def ratios(rates: dict[str, list[float]], peer: str) -> dict[str, float]:
    return {
        "ratio_of_medians": statistics.median(rates["ours"]) / statistics.median(rates[peer]),
        "median_of_ratios": statistics.median(a / b for a, b in zip(rates["ours"], rates[peer], strict=True)),
    }


def describe(report: dict[str, Any]) -> str:
    config = report["config"]
    lines = [
        f"{config['model']}, batch {config['batch_size']} on {config['ranks']} ranks, {config['rounds']} rounds; medians"
    ]
    for part, peer in PEERS.items():
        if part not in report:
            continue
        found = report[part]
        for name, median in found["median_pairs_per_s"].items():
            lines.append(f"  {part:8}{name:16}{median:9,.0f} pairs/s {found['median_step_ms'][name]:9.1f} ms a step")
        for name, ratio in {peer: found, **found["beside"]}.items():
            lines.append(
                f"  {part:8}ours / {name}: {ratio['ratio_of_medians']:.3f} (median of rounds {ratio['median_of_ratios']:.3f})"
            )
        spent = [
            f"{name.removesuffix('_ms')} {ms:.1f}"
            for name, ms in found["ours_ms_a_step"].items()
            if name != "slowest_data_wait_ms"
        ]
        lines.append(f"  {'':8}our step, ms: {', '.join(spent)}")
    if "checkpoint" in report:
        found = report["checkpoint"]
        lines.append(
            f"  checkpoint of {found['state_mib']:,.0f} MiB: a step takes {found['step_ms']:.1f} ms, a save stops training for "
            f"{found['stall_ms']:.1f} ms ({found['stall_steps']:.2f} steps)"
        )
        lines.append(
            f"  {'':8}written in {found['write_ms']:,.0f} ms, adding {found['added_ms']:,.0f} ms to the {config['steps']} steps beside"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
