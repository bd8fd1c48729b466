"""Everything that a run needs before its first step: data, model, engine, the state of the newest checkpoint, log and saver.

In: a TrainConfig and this process's place among the ranks. Out: `RunParts`; `config.json` is on disk then.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from train.checkpoints.checkpoint import CheckpointSaver, find_checkpoint, restore, saved_steps
from train.checkpoints.random_state import seed_generators, seed_random_state
from train.config import TrainConfig
from train.data.loader import StepDataset
from train.data.replaced import ReplacedPictures
from train.data.shard_index import local_tars, prepare_index
from train.data.tar_stream import TarStream
from train.distributed import Ranks, barrier
from train.ds_config import read_ds_config, zero_stage
from train.engine import Engine, check_zero_section
from train.models.clip_library import PreprocessCfg
from train.models.compilation import check_compiles, compile_blocks
from train.models.model import TwoTowers, build_model, build_tokenizer, no_words, resolve
from train.models.published_heads import take_over_published_heads
from train.models.view_size import check_view_size
from train.objectives.files import take_over_heads
from train.objectives.teacher import Teacher
from train.objectives.towers_and_heads import build_towers, has_teacher
from train.planning.flops import step_cost
from train.records.metrics import MetricsLog, StepClock
from train.records.run_manifest import write_run_manifest
from train.records.same_run import check_ranks_agree, check_same_data, check_same_run
from train.supervision.phases import Phases
from train.supervision.skipped import SkippedSteps
from train.views import Views


@dataclass(frozen=True)
class RunParts:
    """A run that is ready for its step `first_step` + 1."""

    run: Path
    config: TrainConfig
    dataset: StepDataset | TarStream
    engine: Engine
    saver: CheckpointSaver
    log: MetricsLog
    clock: StepClock
    replaced: ReplacedPictures
    skipped: SkippedSteps
    first_step: int
    """steps that an earlier part of the run has taken"""
    last_step: int
    """where this part ends"""
    num_steps: int
    """where the schedule ends"""


def set_up(config: TrainConfig, recipe: str, ranks: Ranks, phases: Phases, stop_after: int) -> RunParts:
    """Raises ValueError for what a user can mend. stop_after: as in train.loop. Collective: every rank calls."""
    run, config = Path(config.out), replace(config, model=resolve(config.model))
    if config.threads:
        torch.set_num_threads(config.threads)
    seed_generators(config.seed)
    ds_config = _checked_regime(config, ranks)
    if saved_steps(run):
        check_same_run(run, config)
    towers, preprocess, heads = _towers(config, ranks)
    start = find_checkpoint(run, ranks, towers)
    first_step = start.step if start else 0
    dataset = _dataset(config, ranks, preprocess.size, towers)
    num_steps = config.num_steps(dataset.steps_per_epoch)
    if start:
        check_same_data(run, dataset.identity())
    barrier()  # every rank has read the run folder before rank 0 writes to it
    cost = step_cost(towers, dataset.image_size, ds_config, ranks.device) if ranks.is_main else None
    engine = _engine(config, ds_config, towers, ranks, phases)
    resumed = restore(start, engine, ranks, config.seed) if start else ""
    saver = _saver(config, recipe, engine, ranks, preprocess)
    if ranks.is_main:
        figures = {**(asdict(cost) if cost else {}), **dataset.identity()}
        steps = {"first_step": first_step, "num_steps": num_steps, "steps_per_epoch": dataset.steps_per_epoch}
        _write_manifest(config, recipe, engine, ranks, phases, **steps, **figures)
    parts = RunParts(
        run,
        config,
        dataset,
        engine,
        saver,
        _log(config, recipe, ranks, first_step, num_steps),
        StepClock(phases, ranks.world_size, ranks.device, cost),
        ReplacedPictures(run, ranks.rank, first_step),
        SkippedSteps(run, ranks.rank, config.max_skipped_steps, first_step),
        first_step,
        min(num_steps, stop_after or num_steps),
        num_steps,
    )
    if config.data.shards:
        parts.log.say(dataset.summary())
    # A run that goes on has its own heads.
    if resumed or heads:
        parts.log.say(resumed or heads)
    return parts


def _checked_regime(config: TrainConfig, ranks: Ranks) -> dict[str, Any]:
    """The DeepSpeed JSON. Raises ValueError where DeepSpeed would not take it, or ranks have other flags. Collective: every rank calls."""
    ds_config = read_ds_config(config.ds_config)
    check_zero_section(config.ds_config, ds_config)
    check_ranks_agree(config, ds_config, ranks)
    return ds_config


def _towers(config: TrainConfig, ranks: Ranks) -> tuple[TwoTowers, PreprocessCfg, str]:
    """The module to train, its pictures' preprocessing, and what to say about where its heads come from."""
    model, preprocess = build_model(config.model, config.loss.kind, say=print if ranks.is_main else no_words)
    towers = build_towers(model, preprocess, config)
    objective = getattr(towers, "objective", None)
    heads = take_over_published_heads(objective, config.model) or take_over_heads(
        config.model.pretrained, objective, config.objective
    )
    return towers, preprocess, heads


def _engine(config: TrainConfig, ds_config: dict[str, Any], towers: TwoTowers, ranks: Ranks, phases: Phases) -> Engine:
    """The engine with its teacher, blocks compiled where asked, random state as before the first step. Collective: every rank calls."""
    # The teacher is a copy of what is not compiled yet.
    teacher = Teacher(towers, towers.objective.teacher_momentum) if has_teacher(towers) else None
    if config.compile:
        check_compiles(stage=zero_stage(ds_config), config=config.objective)
        compile_blocks(towers.clip, ranks.device.type)
    engine = Engine(
        towers, ds_config, config.optim, batch_size=config.batch_size, ranks=ranks, phases=phases, teacher=teacher
    )
    # Weights were drawn alike on all ranks; what a step drops is each rank's own.
    seed_random_state(config.seed, 0, ranks.rank)
    return engine


def _write_manifest(
    config: TrainConfig, recipe: str, engine: Engine, ranks: Ranks, phases: Phases, **figures: Any
) -> None:
    """`config.json`. figures: steps, cost and data of the run."""
    write_run_manifest(
        Path(config.out),
        config,
        recipe=recipe,
        deepspeed=engine.config,
        world_size=ranks.world_size,
        device=str(ranks.device),
        began_s=phases.began_s,
        **figures,
    )


def _saver(
    config: TrainConfig, recipe: str, engine: Engine, ranks: Ranks, preprocess: PreprocessCfg
) -> CheckpointSaver:
    return CheckpointSaver(
        Path(config.out),
        engine,
        ranks,
        model_name=config.model.name,
        preprocess=preprocess,
        recipe=recipe,
        keep=config.keep_checkpoints,
        keep_every_steps=config.keep_every_steps,
        objective=config.objective,
    )


def _log(config: TrainConfig, recipe: str, ranks: Ranks, first_step: int, num_steps: int) -> MetricsLog:
    return MetricsLog(
        Path(config.out),
        is_main=ranks.is_main,
        name=recipe,
        first_step=first_step,
        num_steps=num_steps,
        trackers=config.trackers,
        config=asdict(config),
    )


def _dataset(
    config: TrainConfig, ranks: Ranks, image_size: int | tuple[int, int], towers: TwoTowers
) -> StepDataset | TarStream:
    """The pairs of a store, or of tars, which are indexed first. Collective: every rank calls."""
    settings = {
        "batch_size": config.batch_size,
        "seed": config.seed,
        "rank": ranks.rank,
        "world_size": ranks.world_size,
        "image_size": (image_size, image_size) if isinstance(image_size, int) else tuple(image_size),
        "tokenizer": build_tokenizer(config.model.name),
        "views": getattr(towers, "views", Views()),
        "strong_augment": config.strong_augment,
    }
    if settings["views"].strong_images:
        check_view_size(towers, config.model.name, settings["image_size"], config.strong_augment.size)
    if not config.data.shards:
        return StepDataset(config.data, config.augment, **settings)
    folder = Path(config.data.shard_index or Path(config.out) / "shard_index")
    index = prepare_index(local_tars(config.data.shards), folder, ranks, config.data.workers)
    return TarStream(index, config.data, config.augment, **settings)
