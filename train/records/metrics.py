"""What a run says about itself while it trains: metrics.jsonl, trackers (TensorBoard and others), and a progress bar on the terminal.

metrics.jsonl is cut back to the checkpoint when a run goes on, so it has each step once. What is unknown is null there.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from train.distributed import max_over_ranks
from train.planning.flops import StepCost
from train.records.run_manifest import read_starts
from train.records.trackers import build_trackers
from train.supervision.phases import DATA, STEP_PHASES, Phases

MIB = 2**20


class StepClock:
    """Where the time of the steps since the last report went, and their rate. `cost`: of a pair, for MFU; None on ranks that don't log.

    One rank that waits for data holds the others back, and in their own figures that looks like a slow loss: so the longest wait of all
    ranks is among the figures.
    """

    def __init__(self, phases: Phases, world_size: int, device: torch.device, cost: StepCost | None = None) -> None:
        self.phases, self.world_size, self.device, self.cost = phases, world_size, device, cost
        self.num_steps, self.num_pairs = 0, 0

    def step_done(self, num_pairs: int) -> None:
        self.num_steps += 1
        self.num_pairs += num_pairs

    def take(self) -> dict[str, float | None]:
        """Figures of a step, as means since the last call. Checkpoints and evaluations are no step's time. Waits for the GPU.

        Collective: every rank calls.
        """
        seconds = self.phases.take()
        in_steps_s = sum(seconds.get(phase, 0.0) for phase in STEP_PHASES)
        steps = max(1, self.num_steps)
        per_rank = self.num_pairs / in_steps_s / self.world_size
        figures = {
            "pairs_per_s": self.num_pairs / in_steps_s,
            "pairs_per_s_per_rank": per_rank,
            **(self.cost.utilisation(per_rank, self.num_pairs / steps) if self.cost else {}),
            "step_ms": 1000 * in_steps_s / steps,
            **{f"{phase}_ms": 1000 * seconds.get(phase, 0.0) / steps for phase in STEP_PHASES},
            "data_wait_share": seconds.get(DATA, 0.0) / in_steps_s,
            "slowest_data_wait_ms": 1000 * max_over_ranks(seconds.get(DATA, 0.0)) / steps,
            **memory(self.device),
        }
        self.num_steps, self.num_pairs = 0, 0
        return figures


def memory(device: torch.device) -> dict[str, float]:
    """Peaks of this process so far: resident memory; on a GPU what tensors had, what torch held, how often it had to free and retry."""
    figures = {"peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    if device.type == "cuda":
        figures |= {
            "gpu_peak_allocated_mib": torch.cuda.max_memory_allocated(device) / MIB,
            "gpu_peak_reserved_mib": torch.cuda.max_memory_reserved(device) / MIB,
            "gpu_alloc_retries": torch.cuda.memory_stats(device).get("num_alloc_retries", 0),
        }
    return figures


class Goodput:
    """How much of the time since a run's first start went into steps that count: not into starting, saving, or steps that were lost."""

    def __init__(self, run: Path, first_step: int, rows: Sequence[Mapping[str, float]]) -> None:
        starts = read_starts(run)
        self.restarts = max(0, len(starts) - 1)
        self.first_start_s = starts[0]["time_s"] if starts else time.time()
        self.last_step, self.useful_s = first_step, 0.0
        done = 0
        for row in rows:
            self.useful_s += (row["step"] - done) * row["step_ms"] / 1000
            done = row["step"]
        if rows:
            # The checkpoint may lie some steps after the last report.
            self.useful_s += (first_step - done) * rows[-1]["step_ms"] / 1000

    def take(self, step: int, step_ms: float) -> dict[str, float]:
        self.useful_s += (step - self.last_step) * step_ms / 1000
        self.last_step = step
        return {"restarts": self.restarts, "goodput": self.useful_s / max(1e-9, time.time() - self.first_start_s)}


class MetricsLog:
    """Writes on rank 0; on other ranks every call does nothing."""

    def __init__(
        self,
        run: Path,
        *,
        is_main: bool,
        name: str,
        first_step: int,
        num_steps: int,
        trackers: Sequence[str] = ("tensorboard",),
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.is_main = is_main
        if not is_main:
            return
        self.path = run / "metrics.jsonl"
        rows = keep_steps_before(self.path, first_step)
        self.goodput = Goodput(run, first_step, rows)
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self.trackers = build_trackers(trackers)
        for tracker in self.trackers:
            tracker.start(run, config or {}, first_step)
        self.bar = tqdm(
            total=num_steps,
            initial=first_step,
            desc=name,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5,
            file=sys.stderr,
        )

    def step_done(self) -> None:
        if self.is_main:
            self.bar.update()

    def write(self, row: dict[str, float | None]) -> None:
        if not self.is_main:
            return
        row = {**row, **self.goodput.take(int(row["step"]), row["step_ms"])}
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        values = {name: value for name, value in row.items() if value is not None}
        for tracker in self.trackers:
            tracker.log(int(row["step"]), values)
        self.bar.set_postfix_str(in_short(row))

    def say(self, message: str) -> None:
        if self.is_main:
            self.bar.write(message, file=sys.stderr)

    def close(self) -> None:
        if self.is_main:
            self.bar.close()
            for tracker in self.trackers:
                tracker.finish()
            self.file.close()


def in_short(row: Mapping[str, float | None]) -> str:
    """What the progress bar says of a row of metrics.jsonl."""
    parts = [f"loss {row['loss']:.3f}", f"{row['pairs_per_s']:.0f} pairs/s", f"scale {row['logit_scale']:.1f}"]
    if row.get("mfu") is not None:
        parts.append(f"MFU {100 * row['mfu']:.0f} %")
    if row.get("data_wait_share", 0) >= 0.05:
        parts.append(f"waits for data {100 * row['data_wait_share']:.0f} %")
    if row.get("skipped_steps"):
        parts.append(f"{row['skipped_steps']} skipped")
    return ", ".join(parts)


def keep_steps_before(path: Path, first_step: int) -> list[dict[str, float]]:
    """Drop the rows of steps that will be run again, and a line that a kill tore; the rows that stay."""
    if not path.is_file():
        return []
    rows, lines = [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row["step"] <= first_step:
            rows.append(row)
            lines.append(line)
    # Renamed, not written over: a kill in between must not cost the rows.
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    os.replace(temporary, path)
    return rows
