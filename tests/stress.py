"""Exact resume under fire: `python -m tests.stress --kills 50`.

Trains tiny models on two gloo ranks through train/main.py, with data workers, augmentation, patch dropout, mined hard pairs or tars, and a
checkpoint every step. At random instants it kills one rank or all of them with SIGKILL, then gives the same command again. A run that
comes to its end must have the losses, the pair ids of every step and rank, the final weights, optimizer and random state of the run that
nobody killed, byte for byte. Exit code 0 only when all do.
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.tiny_world import TINY_VIT, free_port, tiny_store, tiny_table, training_flags

WORLD_SIZE = 2
PRELOADED = ["deepspeed", "train.loop", "train.main", "torch.utils.tensorboard", "tests.stress"]
# What differs between two runs of one program: the clock and the memory.
TIMELESS = ("step", "epoch", "samples_seen", "learning_rate", "loss", "contrastive", "margin", "image_accuracy")
TIMELESS += ("text_accuracy", "logit_scale", "gradient_norm", "substitutes")
# How long the other ranks may live on when one was killed, before the launcher would kill them.
GRACE_S = 5.0


def make_world(folder: Path) -> None:
    tiny_table(folder / "pairs", tiny_store(folder, num_hues=12))
    model = {**TINY_VIT, "vision_cfg": {**TINY_VIT["vision_cfg"], "patch_dropout": 0.25}}
    (folder / "tiny-vit.json").write_text(json.dumps(model), encoding="utf-8")
    (folder / "fp32.json").write_text('{"zero_optimization": {"stage": 2}}', encoding="utf-8")


def flags_of(kind: str, folder: Path, out: Path, steps: int) -> list[str]:
    """`kind`: "pairs" (a PairStore with mined pairs) or "tars" (the tars themselves)."""
    more = {"model__name": "tiny-vit", "max_steps": steps, "threads": 1, "save_every_steps": 1, "keep_checkpoints": 3}
    more |= {"data__workers": 2, "augment__color_jitter_prob": 0.5, "data__hard_per_anchor": 2 * (kind == "pairs")}
    more |= {"optim__warmup": 2, "batch_size": 18, "loss__margin_weight": 30.0 * (kind == "pairs")}
    if kind == "pairs":
        return [*training_flags(folder / "store", out, folder / "fp32.json", **more, data__pairs=folder / "pairs")]
    flags = training_flags("", out, folder / "fp32.json", **more, data__shards=folder / "shards" / "*.tar")
    place = flags.index("--data.store")
    return [*flags[:place], *flags[place + 2 :]]


def run_rank(rank: int, port: int, folder: str, flags: list[str], log: str) -> None:
    """One rank of train/main.py in a fresh process that has its imports; it notes the pair ids of every step before the step."""
    os.setpgid(0, 0)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD_SIZE), DS_ACCELERATOR="cpu")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    # A child of the fork server would start its data workers by another one, which takes long; a program forks them.
    multiprocessing.set_start_method("fork", force=True)
    import torch

    from train import loop
    from train.main import main
    from train.models.clip_library import open_clip

    torch.set_num_threads(1)
    open_clip.add_model_config(Path(folder))
    out, original = Path(flags[flags.index("--out") + 1]), loop.train_step

    def noting_train_step(engine, config, batch, *rest):
        step = engine.engine.global_steps + 1
        with open(out / f"pair_ids_rank{rank}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps([step, batch.pair_ids_B.tolist()]) + "\n")
        return original(engine, config, batch, *rest)

    loop.train_step = noting_train_step
    main(["pocket-pretrain", *flags])


class Attempt:
    """One start of the command."""

    def __init__(self, folder: Path, flags: list[str], log: Path) -> None:
        context, port = multiprocessing.get_context("forkserver"), free_port()
        self.processes = [
            context.Process(target=run_rank, args=(rank, port, str(folder), flags, str(log)))
            for rank in range(WORLD_SIZE)
        ]
        for process in self.processes:
            process.start()

    def wait(self, timeout_s: float) -> bool:
        """True when all ranks have ended by themselves within that time."""
        deadline = time.monotonic() + timeout_s
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        return not any(process.is_alive() for process in self.processes)

    def ended_well(self) -> bool:
        return all(process.exitcode == 0 for process in self.processes)

    def kill(self, ranks: Sequence[int]) -> None:
        for rank in ranks:
            if self.processes[rank].is_alive():
                # With its data workers, as a node's end would.
                try:
                    os.killpg(self.processes[rank].pid, signal.SIGKILL)
                except ProcessLookupError:
                    self.processes[rank].kill()
        self.wait(GRACE_S)
        for process in self.processes:
            process.kill()
            process.join()


def written_steps(run: Path) -> list[int]:
    names = [path.name.removeprefix("step_") for path in (run / "checkpoints").glob("step_*")]
    return sorted(int(name) for name in names)


def moment_of(run: Path) -> str:
    """What a kill now strikes."""
    if any((run / "checkpoints").glob(".step_*")):
        return "while a checkpoint was written"
    return "with a checkpoint to go on from" if written_steps(run) else "before the first checkpoint"


def differences(run: Path, whole: Path, steps: int) -> list[str]:
    """What of `run` is not what `whole` has."""
    found = []
    rows, expected = (
        [
            {name: row[name] for name in TIMELESS}
            for row in map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
        ]
        for path in (run, whole)
    )
    if rows != expected:
        found.append("metrics.jsonl")
    for rank in range(WORLD_SIZE):
        name = f"pair_ids_rank{rank}.jsonl"
        ids = dict(json.loads(line) for line in (whole / name).read_text().splitlines())
        again = [json.loads(line) for line in (run / name).read_text().splitlines()]
        # A step that was taken twice must have had the same pairs twice.
        if {step for step, _ in again} != set(range(1, steps + 1)) or any(ids[step] != pairs for step, pairs in again):
            found.append(name)
    last = f"checkpoints/step_{steps}"
    states = [f"{last}/state_rank{rank:05d}.safetensors" for rank in range(WORLD_SIZE)]
    for name in [*states, f"{last}/open_clip_model.safetensors", "export/open_clip_model.safetensors"]:
        if (run / name).read_bytes() != (whole / name).read_bytes():
            found.append(name)
    return found


def stress(folder: Path, kinds: Sequence[str], num_kills: int, steps: int, seed: int) -> int:
    """Returns how many finished runs differed."""
    rng, began = random.Random(seed), time.monotonic()
    struck, num_runs, num_bad, kills, start_s, whole_s = Counter(), 0, 0, 0, {}, {}
    for kind in kinds:
        started, log = time.monotonic(), folder / f"whole_{kind}.log"
        attempt = Attempt(folder, flags_of(kind, folder, folder / f"whole_{kind}", steps), log)
        while not written_steps(folder / f"whole_{kind}") and not attempt.wait(0.05):
            pass
        start_s[kind] = time.monotonic() - started
        attempt.wait(600)
        assert attempt.ended_well(), log.read_text()[-3000:]
        whole_s[kind] = time.monotonic() - started
        print(
            f"{kind}: without a kill the first checkpoint takes {start_s[kind]:.1f} s, all {steps} steps {whole_s[kind]:.1f} s",
            flush=True,
        )
    while kills < num_kills:
        kind = kinds[num_runs % len(kinds)]
        run, log = folder / f"killed_{num_runs}", folder / f"killed_{num_runs}.log"
        num_runs, kills_before = num_runs + 1, kills
        while True:
            attempt = Attempt(folder, flags_of(kind, folder, run, steps), log)
            # A start takes as long as many steps: most kills are to strike steps, which begin when they do, however busy the machine.
            is_early, before = rng.random() < 0.2, written_steps(run)[-1:]
            while not is_early and written_steps(run)[-1:] == before and not attempt.wait(0.05):
                pass
            delay = rng.uniform(0, start_s[kind] if is_early else whole_s[kind] - start_s[kind])
            if attempt.wait(delay if kills < num_kills else 600.0):
                break
            ranks = rng.choice([[0], [1], [0, 1]])
            struck[moment_of(run)] += 1
            struck["all ranks" if len(ranks) == 2 else "one rank"] += 1
            attempt.kill(ranks)
            kills += 1
        if not attempt.ended_well():
            print(f"run {num_runs} ended by itself with an error:\n{log.read_text()[-3000:]}", flush=True)
            return num_bad + 1
        found = differences(run, folder / f"whole_{kind}", steps)
        num_bad += bool(found)
        taken = len((run / "pair_ids_rank0.jsonl").read_text().splitlines())
        print(
            f"run {num_runs} ({kind}): {kills - kills_before} kills, {taken} steps taken for {steps}: "
            + (f"DIFFERS in {', '.join(found)}" if found else "equal"),
            flush=True,
        )
    where = ", ".join(f"{count} {what}" for what, count in sorted(struck.items()))
    print(f"{kills} kills in {num_runs} runs ({where}): {num_runs - num_bad} runs equal, {num_bad} differ, "
          f"{time.monotonic() - began:.0f} s")  # fmt: skip
    return num_bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="how often ranks are killed, over all runs (default: 50)")
    parser.add_argument("--steps", type=int, default=30, help="steps of each run (default: 30)")
    parser.add_argument("--seed", type=int, default=0, help="decides when and whom (default: 0)")
    parser.add_argument(
        "--kinds", nargs="+", choices=["pairs", "tars"], default=["pairs", "tars"], help="data of the runs"
    )
    parser.add_argument("--keep", type=Path, help="work in this folder and keep it, to look at a run that differs")
    options = parser.parse_args()
    multiprocessing.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory(prefix="hardpair-stress-") as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        make_world(folder)
        return 1 if stress(folder, options.kinds, options.kills, options.steps, options.seed) else 0


if __name__ == "__main__":
    sys.exit(main())
