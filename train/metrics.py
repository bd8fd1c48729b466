"""What a run says about itself while it trains: metrics.jsonl, TensorBoard events, and a progress bar on the terminal.

metrics.jsonl is cut back to the checkpoint when a run goes on, so it has each step once.
"""

import json
import os
import resource
import sys
from pathlib import Path

from tqdm import tqdm

from train.phases import DATA, STEP_PHASES, Phases


class StepClock:
    """Where the time of the steps since the last report went, and their rate."""

    def __init__(self, phases: Phases, world_size: int) -> None:
        self.phases, self.world_size = phases, world_size
        self.num_steps, self.num_pairs = 0, 0

    def step_done(self, num_pairs: int) -> None:
        self.num_steps += 1
        self.num_pairs += num_pairs

    def take(self) -> dict[str, float]:
        """Figures of a step, as means since the last call. Checkpoints and evaluations are no step's time. On a GPU this waits for it."""
        seconds = self.phases.take()
        in_steps_s = sum(seconds.get(phase, 0.0) for phase in STEP_PHASES)
        steps = max(1, self.num_steps)
        figures = {
            "pairs_per_s": self.num_pairs / in_steps_s,
            "pairs_per_s_per_rank": self.num_pairs / in_steps_s / self.world_size,
            "step_ms": 1000 * in_steps_s / steps,
            **{f"{phase}_ms": 1000 * seconds.get(phase, 0.0) / steps for phase in STEP_PHASES},
            "data_wait_share": seconds.get(DATA, 0.0) / in_steps_s,
            "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
        self.num_steps, self.num_pairs = 0, 0
        return figures


class MetricsLog:
    """Writes on rank 0; on other ranks every call does nothing."""

    def __init__(self, run: Path, *, is_main: bool, name: str, first_step: int, num_steps: int) -> None:
        self.is_main = is_main
        if not is_main:
            return
        self.path = run / "metrics.jsonl"
        keep_steps_before(self.path, first_step)
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        # Imported here: the other ranks need not wait for it.
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=first_step)
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

    def write(self, row: dict[str, float]) -> None:
        if not self.is_main:
            return
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        for key, value in row.items():
            self.writer.add_scalar(key, value, int(row["step"]))
        self.bar.set_postfix_str(
            f"loss {row['loss']:.3f}, {row['pairs_per_s']:.0f} pairs/s, scale {row['logit_scale']:.1f}"
        )

    def say(self, message: str) -> None:
        if self.is_main:
            self.bar.write(message, file=sys.stderr)

    def close(self) -> None:
        if self.is_main:
            self.bar.close()
            self.writer.close()
            self.file.close()


def keep_steps_before(path: Path, first_step: int) -> None:
    """Drop the rows of steps that will be run again, and a line that a kill tore."""
    if not path.is_file():
        return
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row["step"] <= first_step:
            rows.append(line)
    # Renamed, not written over: a kill in between must not cost the rows.
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    os.replace(temporary, path)
