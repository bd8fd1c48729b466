"""The training loop: step, report, checkpoint.

In: a TrainConfig and this process's place among the ranks. Out: a run folder (DESIGN: config.json, metrics.jsonl, checkpoints/,
export/). The state that a checkpoint needs is the step number, the engine's shards and the random state: the data's order is a
function of the step.
"""

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

from train.checkpoints.checkpoint import step_folder
from train.config import TrainConfig
from train.data.loader import RankBatch, StepDataset, step_loader
from train.data.tar_stream import TarStream
from train.distributed import Ranks, barrier
from train.engine import Engine
from train.models.model import MODEL_FILES, SCALARS
from train.objectives.files import OBJECTIVE_FILES
from train.run_setup import RunParts, set_up
from train.schedule import learning_rate
from train.step import StepOutcome, train_step
from train.supervision.phases import CHECKPOINT, DATA, LOGGING, Phases
from train.supervision.supervisor import Stopped, Supervisor, supervised


def train(config: TrainConfig, recipe: str, ranks: Ranks, stop_after: int = 0) -> Path:
    """Run a recipe to its last step, from the newest checkpoint when there is one. Collective: every rank calls.

    stop_after: end after so many steps of the same schedule; 0: the last one.

    Raises ValueError for what a user can mend (paths, sizes, a run folder of other settings), RuntimeError when loss or gradients stay
    non-finite, Stopped when told to stop: then the last step is saved.
    """
    with supervised(ranks, Phases(ranks.device), config.hang_timeout_s) as supervisor:
        return _train(config, recipe, ranks, supervisor, stop_after)


def _train(config: TrainConfig, recipe: str, ranks: Ranks, supervisor: Supervisor, stop_after: int) -> Path:
    parts = set_up(config, recipe, ranks, supervisor.phases, stop_after)
    run, engine, log, saver = parts.run, parts.engine, parts.log, parts.saver
    supervisor.reading = parts.dataset.notes.now
    if parts.first_step < parts.last_step and supervisor.stops_after(parts.first_step):
        raise Stopped
    for done, batch in enumerate(_batches(parts, supervisor.phases, ranks), start=parts.first_step + 1):
        rate = learning_rate(config.optim, done - 1, parts.num_steps)
        outcome = train_step(engine, config, batch, rate)
        parts.skipped.note(done, outcome, batch)
        parts.clock.step_done(batch.global_batch_size)
        parts.replaced.note(done, batch)
        if done % config.log_every_steps == 0 or done == parts.last_step:
            with supervisor.phases(LOGGING):
                log.write(_row(parts, done, rate, outcome, batch))
        saver.check()
        stops = done < parts.last_step and supervisor.stops_after(done)
        if done % config.save_every_steps == 0 or done == parts.last_step or stops:
            with supervisor.phases(CHECKPOINT):
                parts.skipped.settle()
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
        export(run, max(parts.first_step, parts.last_step))
    barrier()
    engine.close()
    return run


def _batches(parts: RunParts, phases: Phases, ranks: Ranks) -> Iterator[RankBatch]:
    batches = step_loader(
        parts.dataset,
        start_step=parts.first_step,
        stop_step=parts.last_step,
        workers=parts.config.data.workers,
        pin_memory=ranks.device.type == "cuda",
    )
    return timed(batches, phases, parts.first_step + 1, parts.last_step)


def _row(parts: RunParts, step: int, rate: float, outcome: StepOutcome, batch: RankBatch) -> dict[str, float | None]:
    """A line of metrics.jsonl. Collective: every rank calls."""
    parts.skipped.settle()
    return {
        **position(step, parts.dataset),
        "learning_rate": rate,
        **measurements(outcome, parts.engine, batch),
        "skipped_steps": parts.skipped.num_steps,
        **(parts.replaced.take() if parts.config.data.shards else {}),
        **parts.clock.take(),
    }


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
        **outcome.values(),
        **{name: scalar.item() for name, scalar in zip(SCALARS, outcome.scalars, strict=False)},
        "gradient_norm": engine.gradient_norm(),
        "substitutes": batch.num_substitutes,
    }


def export(run: Path, step: int) -> None:
    """Copy a checkpoint's model to `export/`, as plain open_clip loads it, and beside it the heads that open_clip does not know."""
    folder, saved = run / "export", step_folder(run, step)
    folder.mkdir(exist_ok=True)
    for name in (*MODEL_FILES, *OBJECTIVE_FILES):
        if (saved / name).is_file():
            shutil.copyfile(saved / name, folder / name)
