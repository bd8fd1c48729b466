"""What a method costs: passes through the towers, pairs a second and memory of a step, each recipe's against CLIP's.

Every measurement is fresh ranks of their own, so that memory is that recipe's alone; recipes take turns, round by round. Batches are random
and in memory: what decoding and augmenting more views costs is `python -m train.data.bench --views`.

`python -m train.bench.recipe_cost SETTINGS.json RESULT.json` is one rank, with what a launcher says in the environment.
"""

import ctypes
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from train.config import TrainConfig
from train.local_ranks import start_ranks, stop_ranks
from train.recipes import METHODS, RECIPES

# The recipe that the others are compared with.
BASE = "pocket-pretrain"
ALL = (BASE, "pocket-siglip", *(f"pocket-{method}" for method in METHODS))
WARM_UP_STEPS = 2
BATCHES_IN_MEMORY = 4


def chosen_recipes(names: Sequence[str]) -> tuple[str, ...]:
    """Recipes by name, the first is compared with; "all": the pocket recipe of each method. Raises ValueError for an unknown one."""
    names = ALL if tuple(names) == ("all",) else tuple(dict.fromkeys(names))
    for name in names:
        if name not in RECIPES:
            raise ValueError(f"--recipes {name} is no recipe; take all, or some of: {', '.join(RECIPES)}")
    return names


def measure_recipes(folder: Path, settings: Mapping[str, Any], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """{recipe: its passes, and of each round pairs/s and MiB}. Raises ValueError when a rank fails."""
    found: dict[str, dict[str, Any]] = {}
    for number in range(settings["rounds"]):
        for name in names[:: -1 if number % 2 else 1]:
            one = measure_once(folder, {**settings, "recipe": name})
            row = found.setdefault(name, {"image_passes": 0, "text_passes": 0, "pairs_per_s": [], "memory_mib": []})
            row.update(image_passes=one["image_passes"], text_passes=one["text_passes"], objective=one["objective"])
            row["pairs_per_s"].append(one["pairs_per_s"])
            row["memory_mib"].append(one["memory_mib"])
            print(
                f"{name}: {one['pairs_per_s']:,.0f} pairs/s, {one['memory_mib']:,.0f} MiB", file=sys.stderr, flush=True
            )
    return {name: found[name] for name in names}


def measure_once(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    (folder / "recipe.json").write_text(json.dumps(settings), encoding="utf-8")
    command = ["-m", "train.bench.recipe_cost", str(folder / "recipe.json"), str(folder / "cost.json")]
    processes = start_ranks(command, settings["ranks"], threads=settings["threads"], stdout=subprocess.DEVNULL)
    try:
        codes = [process.wait() for process in processes]
    finally:
        stop_ranks(processes)
    if any(codes):
        raise ValueError(f"{settings['recipe']}: ranks ended with exit codes {codes}; what they said is above")
    return json.loads((folder / "cost.json").read_text(encoding="utf-8"))


def compared(found: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Medians, and their ratios to the first recipe's."""
    medians = {
        name: {kind: statistics.median(row[kind]) for kind in ("pairs_per_s", "memory_mib")}
        for name, row in found.items()
    }
    base = medians[next(iter(medians))]
    return {
        name: {
            **found[name],
            **{f"median_{kind}": value for kind, value in median.items()},
            **{f"{kind}_of_first": value / base[kind] for kind, value in median.items()},
        }
        for name, median in medians.items()
    }


def describe_recipes(rows: Mapping[str, Mapping[str, Any]]) -> str:
    first = next(iter(rows))
    width = max(len(name) for name in rows) + 2
    lines = [
        f"{'recipe':{width}}{'objective':11}{'image/text passes':>18}{'pairs/s':>10}{'of first':>10}{'MiB a rank':>12}{'of first':>10}"
    ]
    for name, row in rows.items():
        passes = f"{row['image_passes']} / {row['text_passes']}"
        lines.append(
            f"{name:{width}}{row['objective']:11}{passes:>18}{row['median_pairs_per_s']:10,.0f}{row['pairs_per_s_of_first']:10.2f}"
            f"{row['median_memory_mib']:12,.0f}{row['memory_mib_of_first']:10.2f}"
        )
    return "\n".join([*lines, f"first: {first}; steps alone, without decoding and augmenting"])


def config_of(settings: Mapping[str, Any]) -> TrainConfig:
    """The recipe at the benchmark's batch size and memory regime; hard pairs are rows like others here."""
    config = TrainConfig(**RECIPES[settings["recipe"]](), ds_config=settings["ds_config"], device=settings["device"])
    return replace(config, batch_size=settings["batch_size"])


def main(settings_path: str, result_path: str) -> None:
    """One rank."""
    settings = json.loads(Path(settings_path).read_text(encoding="utf-8"))
    # What a launcher of DeepSpeed does not say, and Streaming reads when it is imported.
    os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1"))
    from train.distributed import connected

    with connected(settings["device"]) as ranks:
        figures = step_figures(settings, ranks)
        if ranks.is_main:
            Path(result_path).write_text(json.dumps(figures), encoding="utf-8")


def step_figures(settings: Mapping[str, Any], ranks: Any) -> dict[str, Any]:
    """Build, warm up, time the steps. Collective: every rank calls."""
    import torch

    from train.distributed import barrier

    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    trainer = _Trainer(config_of(settings), settings, ranks)
    trainer.steps(WARM_UP_STEPS)
    barrier()
    began = time.perf_counter()
    trainer.steps(settings["steps"])
    if ranks.device.type == "cuda":
        torch.cuda.synchronize(ranks.device)
    barrier()
    seconds = time.perf_counter() - began
    memory_bytes = trainer.memory_bytes()
    trainer.engine.close()
    image_passes, text_passes = trainer.passes
    return {
        "objective": "sigmoid" if trainer.config.loss.kind == "sigmoid" else trainer.config.objective.name,
        "image_passes": image_passes,
        "text_passes": text_passes,
        "pairs_per_s": settings["batch_size"] * settings["steps"] / seconds,
        "memory_mib": memory_bytes / 2**20,
    }


class _Trainer:
    """The trainer's own step on batches in memory."""

    def __init__(self, config: TrainConfig, settings: Mapping[str, Any], ranks: Any) -> None:
        import torch

        from train.ds_config import read_ds_config
        from train.engine import Engine
        from train.models.model import build_model
        from train.objectives.teacher import Teacher
        from train.objectives.towers_and_heads import build_towers, forward_passes, has_teacher

        self.config, self.device = config, ranks.device
        self.before = _resident_bytes()
        model, preprocess = build_model(config.model, config.loss.kind)
        towers = build_towers(model, preprocess, config)
        self.passes = forward_passes(towers)
        teacher = Teacher(towers, towers.objective.teacher_momentum) if has_teacher(towers) else None
        self.batches = _batches(towers, preprocess.size, config, ranks.world_size)
        self.engine = Engine(
            towers,
            read_ds_config(config.ds_config),
            config.optim,
            batch_size=config.batch_size,
            ranks=ranks,
            teacher=teacher,
        )
        if ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(ranks.device)

    def steps(self, number: int) -> None:
        from train.step import train_step

        for step in range(number):
            outcome = train_step(self.engine, self.config, self.batches[step % len(self.batches)], 1e-4)
            if outcome.not_finite:
                raise RuntimeError(f"the {outcome.not_finite} is not finite: this measures nothing")

    def memory_bytes(self) -> int:
        """The most that the GPU has held, or that this process has grown by since the imports."""
        import torch

        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return _resident_bytes("VmHWM") - self.before


def _batches(towers: Any, size: int | tuple[int, int], config: TrainConfig, world_size: int) -> list[Any]:
    import torch

    from train.data.loader import RankBatch
    from train.views import WEAK_ONLY

    views, rows = getattr(towers, "views", WEAK_ONLY), config.batch_size // world_size
    weak = (size, size) if isinstance(size, int) else tuple(size)
    strong = (config.strong_augment.size,) * 2 if config.strong_augment.size else weak

    def images(shape: tuple[int, int]) -> torch.Tensor:
        return torch.randint(0, 256, (rows, 3, *shape), dtype=torch.uint8)

    def texts() -> torch.Tensor:
        return torch.randint(1, towers.clip.vocab_size, (rows, towers.clip.context_length))

    return [
        RankBatch(
            images(weak),
            texts(),
            torch.arange(rows),
            config.batch_size,
            0,
            rows_per_rank=(rows,) * world_size,
            strong_images=tuple(images(strong) for _ in range(views.strong_images)),
            strong_texts=tuple(texts() for _ in range(views.strong_texts)),
        )
        for _ in range(BATCHES_IN_MEMORY)
    ]


def _resident_bytes(which: str = "VmRSS") -> int:
    # What the imports have freed would hide what the steps take.
    ctypes.CDLL(None).malloc_trim(0)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(rf"^{which}:\s+(\d+) kB", status, re.MULTILINE)[1]) * 1024


if __name__ == "__main__":
    main(*sys.argv[1:])
