"""The whole story on the pocket data, each step the program that a user would call: `python -m train.pocket.quickstart`.

Run again after an interruption it goes on: finished stages are skipped while their command is the same, an unfinished one resumes
by itself. What the stages print goes to the terminal, less the launcher's own narration, and whole to `logs/`.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mining.command_line import parse, run
from mining.manifest import write_json_atomically
from train.local_ranks import free_port

PROGRAM = "train.pocket.quickstart"
ON_CPU = "--device cpu"
# The launcher's log lines and warnings about its own internals, which tell a newcomer nothing.
NARRATION = re.compile(
    rb"^\[\d{4}-\d\d-\d\d [\d:,]+\] \[(INFO|WARNING)\]|FutureWarning|UserWarning|^  (return func|warnings\.warn)\(|"
    rb"^DeepSpeed deepspeed\.ops|^\[Gloo\]|^\s*$"
)


@dataclass(frozen=True)
class QuickstartConfig:
    """Run the whole story on the pocket data."""

    out: str = "quickstart"
    """folder for data, runs and the report"""
    short: bool = False
    """a small set and few steps: shows in three minutes that everything runs, the numbers mean nothing"""
    ranks: int = 2
    """processes that train, embed and share the work"""


@dataclass(frozen=True)
class Stage:
    name: str
    command: tuple[str, ...]


def stages(config: QuickstartConfig) -> list[Stage]:
    """Every step of the pipeline in order: make the data, train, mine, refine beside a control, evaluate, report."""
    data, store = f"{config.out}/data", f"{config.out}/store"
    pairs, embeddings = f"{config.out}/pairs", f"{config.out}/embeddings"
    base, *_ = runs = [f"{config.out}/runs/{name}" for name in ("pretrain", "control", "refine")]
    mined = f"--model.pretrained {base} --data.pairs {pairs}"
    return [
        python("data", f"train.pocket.data --out {data} {'--short' if config.short else '--no-skin-tones'}"),
        python("ingest", f"train.ingest --shards {data}/train/*.tar --out {store} --workers {config.ranks}"),
        training(config, "pretrain", short_steps=16),
        deepspeed(
            config,
            "embed",
            f"--module train.embed --checkpoint {base} --store {store} --out {embeddings} {ON_CPU} --threads 1",
        ),
        python("mine", f"mining.main search --embeddings {embeddings} --out {pairs} --k 50"),
        python("gallery", f"mining.main gallery --pairs {pairs} --store {store} --out {config.out}/gallery.html"),
        training(config, "control", mined),
        training(config, "refine", mined),
        *(
            python(
                f"evaluate-{Path(run).name}",
                f"train.evaluate --checkpoint {run} --suite {data}/suite_noto.json {ON_CPU}",
            )
            # Three minutes have no room for the base as well; the report says that it was not evaluated.
            for run in (runs[1:] if config.short else runs)
        ),
        python(
            "report", f"train.report {' '.join(runs)} --pairs {pairs} --store {store} --out {config.out}/report.html"
        ),
    ]


def training(config: QuickstartConfig, name: str, flags: str = "", short_steps: int = 4) -> Stage:
    short = f"--max_steps {short_steps} --log_every_steps 2" if config.short else ""
    places = f"--ds_config ds_configs/cpu.json {ON_CPU} --data.store {config.out}/store --out {config.out}/runs/{name}"
    return deepspeed(config, name, f"train/main.py pocket-{name} {places} {flags} {short}")


def python(name: str, words: str) -> Stage:
    return Stage(name, (sys.executable, "-m", *words.split()))


def deepspeed(config: QuickstartConfig, name: str, words: str) -> Stage:
    launcher = str(Path(sys.executable).parent / "deepspeed")
    ranks = ("--num_accelerators", str(config.ranks), "--master_port", str(free_port()))
    return Stage(name, (launcher, *ranks, *words.split()))


def run_stages(config: QuickstartConfig) -> None:
    if config.out.split() != [config.out]:
        raise ValueError(
            f"out={config.out!r} must be a folder name without spaces: the commands below are meant to be copied"
        )
    out = Path(config.out)
    (out / "logs").mkdir(parents=True, exist_ok=True)
    marks = Marks(out / "stages.json")
    todo, began = stages(config), time.monotonic()
    for number, stage in enumerate(todo, start=1):
        title = f"[{number}/{len(todo)}] {stage.name}"
        if marks.is_done(stage):
            print(f"{title}: done before", flush=True)
            continue
        print(f"\n{title}\n$ {shlex.join(as_typed(stage.command))}", flush=True)
        started = time.monotonic()
        code = run_filtered(stage.command, out / "logs" / f"{stage.name}.log")
        if code:
            raise SystemExit(f"{title} failed with exit code {code}; its output is in {out}/logs/{stage.name}.log")
        seconds = time.monotonic() - started
        marks.set_done(stage, seconds)
        print(f"{title} took {seconds:.0f} s", flush=True)
    print(
        f"\nquickstart finished in {time.monotonic() - began:.0f} s (all stages together: {marks.total_seconds():.0f} s)"
    )
    print(f"report:  {out}/report.html\ngallery: {out}/gallery.html")


def as_typed(command: Sequence[str]) -> list[str]:
    """The command as a user with the environment activated would type it."""
    program = Path(command[0]).name
    return ["python" if program.startswith("python") else program, *command[1:]]


class Marks:
    """Which stages are finished, with their commands: a stage that changed, and all after it, run again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: list[dict] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        self.position = 0

    def is_done(self, stage: Stage) -> bool:
        same = self.position < len(self.done) and self.done[self.position]["command"] == self._key(stage)
        self.position += same
        return same

    def set_done(self, stage: Stage, seconds: float) -> None:
        self.done[self.position :] = [{"stage": stage.name, "command": self._key(stage), "seconds": round(seconds, 1)}]
        self.position += 1
        write_json_atomically(self.path, self.done)

    def total_seconds(self) -> float:
        return sum(mark["seconds"] for mark in self.done)

    def _key(self, stage: Stage) -> str:
        return re.sub(r"--master_port \d+ ", "", shlex.join(as_typed(stage.command)))


def run_filtered(command: Sequence[str], log_path: Path) -> int:
    """Run a stage, show its output without the launcher's narration, keep all of it in the log."""
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "PYTHONUNBUFFERED": "1",
        # The just-in-time build of DeepSpeed's shared-memory collectives looks for ninja on the path.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    with open(log_path, "wb") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
        assert process.stdout is not None, "the pipe was asked for"
        pending = b""
        while chunk := process.stdout.read1(65536):
            log.write(chunk)
            *lines, pending = re.split(rb"(?<=[\r\n])", pending + chunk)
            for line in lines:
                if line in (b"\r", b"\n") or not NARRATION.search(line.strip(b"\r")):
                    sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()
        sys.stdout.buffer.write(pending)
        sys.stdout.buffer.flush()
        return process.wait()


def main(arguments: Sequence[str]) -> None:
    run_stages(
        parse(QuickstartConfig, program=PROGRAM, description="The whole story on the pocket data.", arguments=arguments)
    )


if __name__ == "__main__":
    run(main)
