"""One rank of the benchmark: our trainer, bare loops of DDP and DeepSpeed, and open_clip's trainer, in turn, in the same process.

All have the same architecture, the same optimizer, the same precision and the same batch. Ours runs what train.loop runs in a step, with
metrics and TensorBoard every LOG_EVERY steps; a bare loop is what a script of twenty lines would be.

`python -m train.bench.contenders SETTINGS.json RESULT.json`, with what a launcher says in the environment.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

# What a launcher of DeepSpeed does not say, and Streaming reads when it is imported.
os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1"))

from train.bench.checkpoint_stall import measure_checkpoints
from train.config import AugmentConfig, DataConfig, ModelConfig, OptimConfig, TrainConfig
from train.data.loader import RankBatch, step_loader
from train.data.peers import open_clip_data, open_clip_train_one_epoch
from train.data.shard_index import ShardIndex, local_tars, prepare_index
from train.data.tar_stream import TarStream
from train.distributed import Ranks, barrier, connected
from train.ds_config import read_ds_config, zero_stage
from train.engine import Engine, deepspeed_config, initialize_deepspeed
from train.loop import measurements, timed, train_step
from train.models.clip_library import open_clip
from train.models.model import TwoTowers, build_model, build_tokenizer
from train.planning.flops import step_cost, training_dtype
from train.records.metrics import MetricsLog, StepClock
from train.schedule import learning_rate, parameter_groups
from train.supervision.phases import LOGGING, Phases
from train.supervision.skipped import SkippedSteps
from train.supervision.supervisor import Supervisor, supervised

LOG_EVERY = 10
HANG_TIMEOUT_S = 900.0
# Different ones, so that no cache holds a batch; as few as memory likes.
BATCHES_IN_MEMORY = 4
AUGMENT = AugmentConfig(scale=(0.9, 1.0))
OPTIM = OptimConfig(lr=1e-4, wd=0.1, warmup=100)


class Ours:
    """The trainer's own step, clock, log and bookkeeping."""

    def __init__(self, settings: dict[str, Any], ranks: Ranks, folder: Path, supervisor: Supervisor) -> None:
        ds_config = read_ds_config(settings["ds_config"])
        self.config = TrainConfig(model=ModelConfig(settings["model"]), batch_size=settings["batch_size"], optim=OPTIM)
        torch.manual_seed(0)
        model, preprocess = build_model(self.config.model)
        self.towers, self.phases = TwoTowers(model, preprocess), supervisor.phases
        self.preprocess, self.image_size = preprocess, image_size(preprocess.size)
        cost = step_cost(self.towers, self.image_size, ds_config, ranks.device) if ranks.is_main else None
        self.engine = Engine(
            self.towers, ds_config, OPTIM, batch_size=settings["batch_size"], ranks=ranks, phases=self.phases
        )
        self.log = MetricsLog(folder / "ours", is_main=ranks.is_main, name="ours", first_step=0, num_steps=0)
        self.clock = StepClock(self.phases, ranks.world_size, ranks.device, cost)
        self.skipped = SkippedSteps(folder / "ours", ranks.rank, 10, 0)
        self.supervisor = supervisor
        self.done, self.figures = 0, list[dict[str, Any]]()

    def run(self, batches: Iterator[RankBatch]) -> None:
        """As the loop of train.loop, without checkpoints."""
        # What the others did meanwhile is no time of ours.
        self.phases.take()
        for batch in timed(batches, self.phases, self.done + 1, 0):
            self.done += 1
            rate = learning_rate(OPTIM, self.done, 10**6)
            outcome = train_step(self.engine, self.config, batch, rate)
            self.skipped.note(self.done, outcome, batch)
            if self.supervisor.stops_after(self.done):
                raise RuntimeError("told to stop")
            self.clock.step_done(batch.global_batch_size)
            if self.done % LOG_EVERY == 0:
                with self.phases(LOGGING):
                    self.skipped.settle()
                    if self.skipped.num_steps:
                        raise RuntimeError("a loss or gradient is not finite: this measures nothing")
                    figures = self.clock.take()
                    self.figures.append(figures)
                    self.log.write({"step": self.done, **measurements(outcome, self.engine, batch), **figures})
        if self.clock.num_steps:
            self.figures.append(self.clock.take())

    def where_time_goes(self) -> dict[str, float]:
        """Medians of a step's parts, without the first report, which is the warm-up's."""
        rows = self.figures[1:]
        names = [name for name in rows[0] if name.endswith("_ms")]
        return {name: statistics.median(row[name] for row in rows) for name in names}


class Bare:
    """The same model under DistributedDataParallel, torch's fused AdamW and open_clip's loss: forward, backward, step."""

    def __init__(self, settings: dict[str, Any], ranks: Ranks) -> None:
        torch.manual_seed(0)
        towers = TwoTowers(*build_model(ModelConfig(settings["model"]))).to(ranks.device)
        dtype = training_dtype(read_ds_config(settings["ds_config"]))
        self.cast = nullcontext if dtype == torch.float32 else lambda: torch.autocast(ranks.device.type, dtype)
        self.device, self.scale = ranks.device, towers.clip.logit_scale
        self.optimizer = adamw(towers)
        self.model = torch.nn.parallel.DistributedDataParallel(towers, broadcast_buffers=False)
        self.loss = clip_loss(ranks)

    def run(self, batches: Iterator[RankBatch]) -> None:
        for batch in batches:
            images, texts = (rows.to(self.device, non_blocking=True) for rows in (batch.image_BCHW, batch.text_BL))
            self.optimizer.zero_grad()
            with self.cast():
                features = self.model(images, texts)
            self.loss(*features).backward()
            self.optimizer.step()
            with torch.no_grad():
                self.scale.clamp_(0, math.log(100))


class BareDeepSpeed:
    """The same model, loss and AdamW in DeepSpeed's own engine, with the JSON as it is: forward, backward, step."""

    def __init__(self, settings: dict[str, Any], ranks: Ranks) -> None:
        torch.manual_seed(0)
        towers = TwoTowers(*build_model(ModelConfig(settings["model"])))
        ds_config = read_ds_config(settings["ds_config"])
        config = {**ds_config, **deepspeed_config(ds_config, OPTIM, settings["batch_size"], ranks)}
        self.engine, _ = initialize_deepspeed(towers, config, OPTIM)
        self.device, self.scale, self.loss = ranks.device, towers.clip.logit_scale, clip_loss(ranks)

    def run(self, batches: Iterator[RankBatch]) -> None:
        for batch in batches:
            images, texts = (rows.to(self.device, non_blocking=True) for rows in (batch.image_BCHW, batch.text_BL))
            self.engine.backward(self.loss(*self.engine(images, texts)))
            self.engine.step()
            with torch.no_grad():
                self.scale.clamp_(0, math.log(100))


class OpenClip:
    """`open_clip_train.train.train_one_epoch` on its own data pipeline."""

    def __init__(self, settings: dict[str, Any], ranks: Ranks, index: ShardIndex) -> None:
        torch.manual_seed(0)
        model, _ = build_model(ModelConfig(settings["model"]))
        model.output_dict = True
        dtype = training_dtype(read_ds_config(settings["ds_config"]))
        size = model.visual.image_size
        self.optimizer = adamw(model)
        self.arguments = argparse.Namespace(
            device=str(ranks.device),
            precision="amp_bf16" if dtype == torch.bfloat16 else "fp32",
            batch_size=settings["batch_size"] // ranks.world_size,
            world_size=ranks.world_size,
            rank=ranks.rank,
            local_rank=ranks.local_rank,
            log_local=False,
            accum_freq=1,
            skip_scheduler=True,
            distill=False,
            horovod=False,
            grad_clip_norm=None,
            log_every_n_steps=LOG_EVERY,
            wandb=False,
        )
        self.data = open_clip_data(
            [shard.path for shard in index.shards],
            num_samples=len(index),
            batch_size=self.arguments.batch_size,
            workers=settings["workers"],
            seed=0,
            transform=open_clip.image_transform(size, is_train=True, aug_cfg={"scale": AUGMENT.scale}),
            tokenizer=build_tokenizer(settings["model"]),
            world_size=ranks.world_size,
        )
        self.model = torch.nn.parallel.DistributedDataParallel(model.to(ranks.device))
        self.loss, self.epoch, self.train_one_epoch = clip_loss(ranks), 0, open_clip_train_one_epoch()

    def run(self, watch: Callable[[Iterable], "Watched"]) -> "Watched":
        watched = watch(self.data.dataloader)
        watched.num_batches, watched.num_samples = self.data.dataloader.num_batches, self.data.dataloader.num_samples
        data = argparse.Namespace(dataloader=watched, set_epoch=self.data.set_epoch)
        self.train_one_epoch(
            self.model, {"train": data}, self.loss, self.epoch, self.optimizer, None, None, None, self.arguments
        )
        self.epoch += 1
        return watched


class Watched:
    """Passes batches on and notes when the first one came and how many there were."""

    def __init__(self, batches: Iterable) -> None:
        self.batches, self.first_s, self.count = batches, 0.0, 0

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            if not self.count:
                self.first_s = time.perf_counter()
            self.count += 1
            yield batch


def adamw(module: torch.nn.Module) -> torch.optim.AdamW:
    groups = parameter_groups(module.named_parameters(), OPTIM.wd)
    return torch.optim.AdamW(groups, lr=OPTIM.lr, betas=(OPTIM.beta1, OPTIM.beta2), eps=OPTIM.eps, fused=True)


def clip_loss(ranks: Ranks) -> torch.nn.Module:
    return open_clip.ClipLoss(local_loss=True, gather_with_grad=True, rank=ranks.rank, world_size=ranks.world_size)


def image_size(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def seconds_of(steps: Callable[[], Watched], device: torch.device) -> tuple[float, int]:
    """Seconds from the first batch's arrival to the end of all ranks' work, and how many steps. Collective: every rank calls."""
    barrier()
    watched = steps()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    barrier()
    return time.perf_counter() - watched.first_s, watched.count


def batches_in_memory(settings: dict[str, Any], ranks: Ranks, ours: Ours) -> list[RankBatch]:
    rows = settings["batch_size"] // ranks.world_size
    length, vocabulary = ours.towers.clip.context_length, ours.towers.clip.vocab_size
    torch.manual_seed(ranks.rank)
    return [
        RankBatch(
            torch.randint(0, 256, (rows, 3, *ours.image_size), dtype=torch.uint8),
            torch.randint(1, vocabulary, (rows, length)),
            torch.arange(rows),
            settings["batch_size"],
            0,
            rows_per_rank=(rows,) * ranks.world_size,
        )
        for _ in range(BATCHES_IN_MEMORY)
    ]


def in_memory(settings: dict[str, Any], ranks: Ranks, ours: Ours, note: Callable[[str, float], None]) -> None:
    """Ours against bare loops on batches that are in memory; pairs/s of each round to `note`."""
    batches = batches_in_memory(settings, ranks, ours)
    contenders = {"ours": ours, "bare_loop": Bare(settings, ranks)}
    if zero_stage(read_ds_config(settings["ds_config"])):
        contenders["bare_deepspeed"] = BareDeepSpeed(settings, ranks)

    def steps(name: str, count: int) -> Watched:
        watched = Watched(batches[number % len(batches)] for number in range(count))
        contenders[name].run(iter(watched))
        return watched

    for number in range(-1, settings["rounds"]):
        for name in in_turn(contenders, number):
            # The round before the first warms up: buckets, autotuned products, the allocator.
            count = settings["steps"] if number >= 0 else max(2, settings["steps"] // 4)
            seconds, count = seconds_of(partial(steps, name, count), ranks.device)
            if number >= 0:
                note(name, settings["batch_size"] * count / seconds)


def from_tars(
    settings: dict[str, Any], ranks: Ranks, ours: Ours, folder: Path, note: Callable[[str, float], None]
) -> None:
    """Ours against open_clip's trainer, an epoch of the same tars each round; pairs/s of each round to `note`."""
    index = prepare_index(local_tars(settings["shards"]), folder / "index", ranks, settings["workers"])
    peer = OpenClip(settings, ranks, index)
    stream = TarStream(
        index,
        DataConfig(shards=tuple(settings["shards"])),
        AUGMENT,
        batch_size=settings["batch_size"],
        seed=0,
        rank=ranks.rank,
        world_size=ranks.world_size,
        image_size=ours.image_size,
        tokenizer=build_tokenizer(settings["model"]),
    )

    def epoch(number: int) -> Watched:
        first = number * stream.steps_per_epoch
        watched = Watched(
            step_loader(
                stream,
                start_step=first,
                stop_step=first + stream.steps_per_epoch,
                workers=settings["workers"],
                pin_memory=ranks.device.type == "cuda",
            )
        )
        ours.run(iter(watched))
        return watched

    contenders = {"ours": epoch, "open_clip": lambda number: peer.run(Watched)}
    for number in range(-1, settings["rounds"]):
        for name in in_turn(contenders, number):
            seconds, count = seconds_of(partial(contenders[name], number + 1), ranks.device)
            if number >= 0:
                note(name, settings["batch_size"] * count / seconds)


def checkpoint_stall(settings: dict[str, Any], ranks: Ranks, ours: Ours, folder: Path) -> dict[str, float]:
    batches = batches_in_memory(settings, ranks, ours)
    return measure_checkpoints(
        ours.engine,
        lambda count: ours.run(iter([batches[number % len(batches)] for number in range(count)])),
        model_name=settings["model"],
        preprocess=ours.preprocess,
        ranks=ranks,
        folder=folder / "saved",
        steps_a_round=settings["steps"],
        rounds=settings["rounds"],
    )


def in_turn(names: Iterable[str], number: int) -> list[str]:
    """Every other round the other way about: nobody always runs on what another left in the caches."""
    return list(names)[:: 1 if number % 2 else -1]


def main(settings_path: str, result_path: str) -> None:
    settings = json.loads(Path(settings_path).read_text(encoding="utf-8"))
    rates: dict[str, dict[str, list[float]]] = {}
    where: dict[str, dict[str, float]] = {}
    stall: dict[str, float] = {}
    with (
        connected(settings["device"]) as ranks,
        tempfile.TemporaryDirectory(prefix="train-bench-") as own,
        supervised(ranks, Phases(ranks.device), HANG_TIMEOUT_S) as supervisor,
    ):
        torch.set_num_threads(settings["threads"])
        folder = Path(settings["folder"])
        (folder / "ours").mkdir(exist_ok=True)
        ours = Ours(settings, ranks, folder if ranks.is_main else Path(own), supervisor)
        for part in settings["parts"]:
            if part == "checkpoint":
                stall = checkpoint_stall(settings, ranks, ours, folder)
                continue
            rates[part], ours.figures = {}, []

            def note(name: str, pairs_per_s: float, part: str = part) -> None:
                rates[part].setdefault(name, []).append(pairs_per_s)
                if ranks.is_main:
                    print(f"{part} {name}: {pairs_per_s:,.0f} pairs/s", file=sys.stderr, flush=True)

            if part == "memory":
                in_memory(settings, ranks, ours, note)
            else:
                from_tars(settings, ranks, ours, folder, note)
            where[part] = ours.where_time_goes()
        ours.log.close()
        barrier()
        ours.engine.close()
        if ranks.is_main:
            found = {"rounds": rates, "ours_ms_a_step": where, "checkpoint": stall}
            Path(result_path).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
