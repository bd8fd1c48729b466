"""What a rank is doing at this moment, and how long it did what: one object for the time breakdown and for the watchdog.

In: marks where the loop passes from data to forward to loss and so on. Out: seconds by phase since the last report, and `now`, which
another thread may read at any time.

A phase's time is what it adds to the step. On a GPU the marks are CUDA events on the compute stream: work that runs while another phase
keeps that stream busy (prefetched batches, reductions on a stream of their own) counts for nothing, as it should. Events are recorded
without waiting and read by `take` alone, when the loop logs. Waiting for another rank counts where the two meet: in the loss (features
are gathered), in "reduce", or in the optimizer's step.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch

START, DATA, FORWARD, LOSS, BACKWARD, REDUCE, STEP, LOGGING, CHECKPOINT, EVALUATION, OTHER = (
    "start",
    "data_wait",
    "forward",
    "loss",
    "backward",
    "reduce",
    "optimizer_step",
    "logging",
    "checkpoint",
    "evaluation",
    "other",
)
# What a training step is made of; the others interrupt training and are no step's time.
STEP_PHASES = (DATA, FORWARD, LOSS, BACKWARD, REDUCE, STEP, LOGGING, OTHER)


@dataclass(frozen=True)
class Now:
    """Where a rank is. `since_s` is of time.monotonic(); `detail` says more, for example which shard is read."""

    phase: str
    step: int
    since_s: float
    detail: str = ""

    def __str__(self) -> str:
        where = f"{self.phase} of step {self.step}" + (f" ({self.detail})" if self.detail else "")
        return f"{where}, for {time.monotonic() - self.since_s:.1f} s"


class Phases:
    """Phases of one rank, nested like calls: inside `with phases("backward")`, `with phases("reduce")` takes its time out of it."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._marks = CudaMarks(device) if device is not None and device.type == "cuda" else HostMarks()
        self.now = Now(START, 0, time.monotonic())
        self.began_s = time.time()
        """seconds since the epoch, when this process turned to the run"""

    @contextmanager
    def __call__(self, phase: str, detail: str = "") -> Iterator[None]:
        before = self.now
        self._switch(phase, before.step, detail)
        try:
            yield
        finally:
            # The step may have been counted on meanwhile; an exception leaves the outer phase as it was.
            self._switch(before.phase, self.now.step, before.detail)

    def begin_step(self, step: int) -> None:
        """The loop turns to `step`; what is no phase of its own is "other" from here on."""
        self._switch(OTHER, step, "")

    def note(self, detail: str) -> None:
        """Say more about the present phase, from the thread that is in it."""
        self.now = Now(self.now.phase, self.now.step, self.now.since_s, detail)

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call. On a GPU this waits for it."""
        self._marks.mark(self.now.phase)
        return self._marks.take()

    def _switch(self, phase: str, step: int, detail: str) -> None:
        self._marks.mark(self.now.phase)
        # One assignment: a reader in another thread sees the old state or the new one.
        self.now = Now(phase, step, time.monotonic(), detail)


class HostMarks:
    """Wall-clock time between marks."""

    def __init__(self) -> None:
        self.last_s, self.seconds = time.perf_counter(), dict[str, float]()

    def mark(self, ended: str) -> None:
        now_s = time.perf_counter()
        self.seconds[ended] = self.seconds.get(ended, 0.0) + now_s - self.last_s
        self.last_s = now_s

    def take(self) -> dict[str, float]:
        taken, self.seconds = self.seconds, {}
        return taken


class CudaMarks:
    """Time between events on the current stream of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.current_stream(device)
        self.spare: list[torch.cuda.Event] = []
        self.ended: list[tuple[str, torch.cuda.Event]] = []
        self.last = self._record()

    def mark(self, ended: str) -> None:
        self.ended.append((ended, self._record()))

    def take(self) -> dict[str, float]:
        seconds: dict[str, float] = {}
        if self.ended:
            self.ended[-1][1].synchronize()
        for phase, event in self.ended:
            seconds[phase] = seconds.get(phase, 0.0) + self.last.elapsed_time(event) / 1000
            self.spare.append(self.last)
            self.last = event
        self.ended = []
        return seconds

    def _record(self) -> torch.cuda.Event:
        event = self.spare.pop() if self.spare else torch.cuda.Event(enable_timing=True)
        event.record(self.stream)
        return event


# Where DeepSpeed reduces gradients: at the end of a backward pass, and (ZeRO-1 and 2, then ZeRO-3) when a bucket is full during it.
ENGINE_REDUCES = "allreduce_gradients"
OPTIMIZER_REDUCES = ("reduce_ipg_grads", "_DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads")


def book_reductions(engine: Any, phases: Phases) -> None:
    """Let the time in which DeepSpeed's `engine` reduces gradients count as "reduce"."""
    _book(engine, ENGINE_REDUCES, phases)
    for name in OPTIMIZER_REDUCES:
        if hasattr(engine.optimizer, name):
            _book(engine.optimizer, name, phases)


def _book(owner: Any, name: str, phases: Phases) -> None:
    method: Callable[..., Any] = getattr(owner, name)

    @wraps(method)
    def booked(*arguments: Any, **keywords: Any) -> Any:
        with phases(REDUCE):
            return method(*arguments, **keywords)

    setattr(owner, name, booked)
