"""The training loop: step, report, checkpoint.

In: a TrainConfig and this process's place among the ranks. Out: a run folder (DESIGN: config.json, metrics.jsonl, checkpoints/,
export/). The state that a checkpoint needs is the step number, the engine's shards and the random state: the data's order is a
function of the step.
"""

import itertools
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from train.checkpoint import CheckpointSaver, find_checkpoint, restore, saved_steps, step_folder
from train.config import TrainConfig
from train.data.loader import RankBatch, StepDataset, step_loader
from train.data.replaced import ReplacedPictures
from train.data.shard_index import local_tars, prepare_index
from train.data.tar_stream import TarStream
from train.distributed import Ranks, barrier
from train.ds_config import read_ds_config
from train.engine import Engine, check_zero_section
from train.feature_cache import encode_in_chunks, replay_and_step
from train.flops import step_cost
from train.loss import Terms, batch_gradients, batch_loss, term_values
from train.metrics import MetricsLog, StepClock
from train.model import MODEL_FILES, SCALARS, TwoTowers, build_model, build_tokenizer
from train.phases import CHECKPOINT, DATA, LOGGING, LOSS, Phases
from train.random_state import seed_generators, seed_random_state
from train.run_manifest import write_run_manifest
from train.schedule import learning_rate
from train.skipped import SkippedSteps
from train.supervisor import Stopped, Supervisor, supervised


def train(config: TrainConfig, recipe: str, ranks: Ranks, stop_after: int = 0) -> Path:
    """Run a recipe to its last step, from the newest checkpoint when there is one. Collective: every rank calls.

    stop_after: end after so many steps of the same schedule; 0: the last one.

    Raises ValueError for what a user can mend (paths, sizes, a run folder of other settings), RuntimeError when loss or gradients stay
    non-finite, Stopped when told to stop: then the last step is saved.
    """
    with supervised(ranks, Phases(ranks.device), config.hang_timeout_s) as supervisor:
        return _train(config, recipe, ranks, supervisor, stop_after)


def _train(config: TrainConfig, recipe: str, ranks: Ranks, supervisor: Supervisor, stop_after: int) -> Path:
    run, phases = Path(config.out), supervisor.phases
    if config.threads:
        torch.set_num_threads(config.threads)
    seed_generators(config.seed)
    ds_config = read_ds_config(config.ds_config)
    check_zero_section(config.ds_config, ds_config)
    if saved_steps(run):
        check_same_run(run, config)
    model, preprocess = build_model(config.model, config.loss.kind)
    towers = TwoTowers(model, preprocess)
    start = find_checkpoint(run, ranks, towers)
    first_step = start.step if start else 0
    dataset = _dataset(config, ranks, preprocess.size)
    num_steps = config.num_steps(dataset.steps_per_epoch)
    last_step = min(num_steps, stop_after or num_steps)
    if start:
        check_same_data(run, dataset.identity())
    barrier()  # every rank has read the run folder before rank 0 writes to it
    cost = step_cost(towers, dataset.image_size, ds_config, ranks.device) if ranks.is_main else None
    engine = Engine(towers, ds_config, config.optim, batch_size=config.batch_size, ranks=ranks, phases=phases)
    # Weights were drawn alike on all ranks; what a step drops is each rank's own.
    seed_random_state(config.seed, 0, ranks.rank)
    resumed = restore(start, engine, ranks, config.seed) if start else ""
    saver = CheckpointSaver(
        run,
        engine,
        ranks,
        model_name=config.model.name,
        preprocess=preprocess,
        recipe=recipe,
        keep=config.keep_checkpoints,
        keep_every_steps=config.keep_every_steps,
    )
    if ranks.is_main:
        write_run_manifest(
            run,
            config,
            recipe=recipe,
            deepspeed=engine.config,
            world_size=ranks.world_size,
            device=str(ranks.device),
            first_step=first_step,
            began_s=phases.began_s,
            num_steps=num_steps,
            steps_per_epoch=dataset.steps_per_epoch,
            **(asdict(cost) if cost else {}),
            **dataset.identity(),
        )
    log = MetricsLog(
        run,
        is_main=ranks.is_main,
        name=recipe,
        first_step=first_step,
        num_steps=num_steps,
        trackers=config.trackers,
        config=asdict(config),
    )
    if config.data.shards:
        log.say(dataset.summary())
    if resumed:
        log.say(resumed)

    clock = StepClock(phases, ranks.world_size, ranks.device, cost)
    replaced = ReplacedPictures(run, ranks.rank, first_step)
    skipped = SkippedSteps(run, ranks.rank, config.max_skipped_steps, first_step)
    supervisor.reading = dataset.notes.now
    if first_step < last_step and supervisor.stops_after(first_step):
        raise Stopped
    batches = step_loader(
        dataset,
        start_step=first_step,
        stop_step=last_step,
        workers=config.data.workers,
        pin_memory=ranks.device.type == "cuda",
    )
    for done, batch in enumerate(timed(batches, phases, first_step + 1, last_step), start=first_step + 1):
        rate = learning_rate(config.optim, done - 1, num_steps)
        outcome = train_step(engine, config, batch, rate)
        if outcome.not_finite:
            skipped.skipped(done, outcome.not_finite, batch, outcome.features)
        else:
            skipped.took()
        clock.step_done(batch.global_batch_size)
        replaced.note(done, batch)
        if done % config.log_every_steps == 0 or done == last_step:
            with phases(LOGGING):
                log.write(
                    {
                        **position(done, dataset),
                        "learning_rate": rate,
                        **measurements(outcome, engine, batch),
                        "skipped_steps": skipped.num_steps,
                        **(replaced.take() if config.data.shards else {}),
                        **clock.take(),
                    }
                )
        saver.check()
        stops = done < last_step and supervisor.stops_after(done)
        if done % config.save_every_steps == 0 or done == last_step or stops:
            with phases(CHECKPOINT):
                saver.save(done)
        log.step_done()
        if stops:
            saver.wait()
            log.say(f"stopped after step {done}, which is saved ({supervisor.reason}); the same command goes on")
            log.close()
            raise Stopped

    saver.wait()
    log.close()
    if ranks.is_main:
        export(run, max(first_step, last_step))
    barrier()
    engine.close()
    return run


@dataclass(frozen=True)
class StepOutcome:
    """What a step's loss was, and whether the weights took it."""

    terms: Terms
    scalars: tuple[torch.Tensor, ...]
    """the scale, and the bias of a model that learns one"""
    features: tuple[torch.Tensor, torch.Tensor]
    not_finite: str
    """"loss" or "gradient" when that was not finite, then nothing has changed; empty when the step was taken"""


def train_step(engine: Engine, config: TrainConfig, batch: RankBatch, rate: float) -> StepOutcome:
    """Forward, loss over all ranks' rows, backward, optimizer step. What is not finite changes nothing.

    The loss is the same number on every rank, and so is what a reduced gradient holds, so all skip together. Nothing is read from the
    device here. What waits for it all the same, once a step: the loss's operation, for its scalars and the ranks' row counts; DeepSpeed,
    for its answer, finite or not, before it steps; the clamp of the temperature. Collective: every rank calls.
    """
    if config.micro_batch_size:
        return cached_train_step(engine, config, batch, rate)
    image_BD, text_BD, *scalars = engine.forward(batch.image_BCHW, batch.text_BL)
    with engine.phases(LOSS):
        terms = batch_loss(config, image_BD, text_BD, scalars)
    taken = engine.backward_and_step(terms.loss * one_if_finite(terms.loss), rate)
    detached = tuple(scalar.detach() for scalar in scalars)
    return StepOutcome(
        terms, detached, (image_BD.detach(), text_BD.detach()), "" if taken else what_is_not_finite(terms)
    )


def cached_train_step(engine: Engine, config: TrainConfig, batch: RankBatch, rate: float) -> StepOutcome:
    """The same step with the activations of about `micro_batch_size` rows at a time. Collective: every rank calls."""
    chunks = encode_in_chunks(engine, batch, config.micro_batch_size)
    image_BD, text_BD = (torch.cat([getattr(chunk, name) for chunk in chunks]) for name in ("image_BD", "text_BD"))
    scalars = chunks[0].scalars
    with engine.phases(LOSS):
        gradients = batch_gradients(config, image_BD, text_BD, scalars)
    one = one_if_finite(gradients.terms.loss)
    scaled = replace(gradients, d_image_BD=gradients.d_image_BD * one, d_text_BD=gradients.d_text_BD * one)
    taken = replay_and_step(engine, chunks, scaled, rate)
    return StepOutcome(
        gradients.terms, scalars, (image_BD, text_BD), "" if taken else what_is_not_finite(gradients.terms)
    )


def one_if_finite(loss: torch.Tensor) -> torch.Tensor:
    """1, or NaN for a loss that is not finite: as its factor it makes every gradient NaN, which the optimizer's own check finds.

    Reading the loss instead would let the GPU run dry in the middle of every step.
    """
    return torch.where(loss.detach().isfinite(), 1.0, math.nan)


def what_is_not_finite(terms: Terms) -> str:
    return "gradient" if math.isfinite(terms.loss.item()) else "loss"


def timed(batches: Iterator[RankBatch], phases: Phases, first_step: int, last_step: int) -> Iterator[RankBatch]:
    """Pass the batches on, the first of them as `first_step`, and book the wait for each.

    Raises RuntimeError when they end before `last_step`: the other ranks would wait for this one for ever.
    """
    for step in itertools.count(first_step):
        phases.begin_step(step)
        with phases(DATA):
            batch = next(batches, None)
        if batch is None and step <= last_step:
            raise RuntimeError(f"the data of this rank end before step {step}, the run has {last_step}")
        if batch is None:
            return
        yield batch


def position(step: int, dataset: StepDataset | TarStream) -> dict[str, float]:
    return {"step": step, "epoch": step / dataset.steps_per_epoch, "samples_seen": dataset.samples_seen(step)}


def measurements(outcome: StepOutcome, engine: Engine, batch: RankBatch) -> dict[str, float]:
    return {
        **term_values(outcome.terms),
        **{name: scalar.item() for name, scalar in zip(SCALARS, outcome.scalars, strict=False)},
        "gradient_norm": engine.gradient_norm(),
        "substitutes": batch.num_substitutes,
    }


def _dataset(config: TrainConfig, ranks: Ranks, image_size: int | tuple[int, int]) -> StepDataset | TarStream:
    """The pairs of a store, or of tars, which are indexed first. Collective: every rank calls."""
    settings = {
        "batch_size": config.batch_size,
        "seed": config.seed,
        "rank": ranks.rank,
        "world_size": ranks.world_size,
        "image_size": (image_size, image_size) if isinstance(image_size, int) else tuple(image_size),
        "tokenizer": build_tokenizer(config.model.name),
    }
    if not config.data.shards:
        return StepDataset(config.data, config.augment, **settings)
    folder = Path(config.data.shard_index or Path(config.out) / "shard_index")
    index = prepare_index(local_tars(config.data.shards), folder, ranks, config.data.workers)
    return TarStream(index, config.data, config.augment, **settings)


# Fields that may change between the parts of one run.
FREE_FIELDS = {
    "out",
    "ds_config",
    "device",
    "threads",
    "log_every_steps",
    "trackers",
    "save_every_steps",
    "keep_checkpoints",
    "keep_every_steps",
    "micro_batch_size",
    "max_skipped_steps",
    "hang_timeout_s",
}


# The same of `data`.
FREE_DATA_FIELDS = {"workers", "shard_index", "cache"}
# What `identity` of a data set says that decides its content.
DATA_IDENTITY = ("store_fingerprint", "shards_fingerprint", "pairs_fingerprint")


def check_same_run(run: Path, config: TrainConfig) -> None:
    """Raises ValueError when `run` was started with settings that would give other numbers, naming the first that differs."""
    path = run / "config.json"
    if not path.is_file():
        return
    now, defaults = to_json(asdict(config)), to_json(asdict(TrainConfig()))
    # A run of an earlier version does not name every field.
    before = {**defaults, **json.loads(path.read_text(encoding="utf-8"))["config"]}
    for name in now:
        then = {**defaults[name], **before[name]} if isinstance(now[name], dict) else before[name]
        same = then == now[name]
        if name == "data":
            same = all(then[field] == now["data"][field] for field in now["data"] if field not in FREE_DATA_FIELDS)
        if not same and name not in FREE_FIELDS:
            raise ValueError(
                f"{run} was started with {name}={before[name]}, now it is {now[name]}; keep the settings or give another --out"
            )


def check_same_data(run: Path, identity: dict[str, Any]) -> None:
    """Raises ValueError when the data are no longer what `run` was started with."""
    path = run / "config.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for name in DATA_IDENTITY:
        then, now = before.get(name), identity.get(name)
        if then and now and then != now:
            raise ValueError(
                f"{run} was started with {name}={then[:12]}, the data have {now[:12]} now: they were changed since; "
                "put the old ones back or give another --out"
            )


def to_json(value: Any) -> Any:
    """The value as it comes back from JSON: tuples are lists there."""
    return json.loads(json.dumps(value))


def export(run: Path, step: int) -> None:
    """Copy the model of a checkpoint to `export/`, in the form that plain open_clip loads."""
    folder, saved = run / "export", step_folder(run, step)
    folder.mkdir(exist_ok=True)
    for name in MODEL_FILES:
        if (saved / name).is_file():
            shutil.copyfile(saved / name, folder / name)
