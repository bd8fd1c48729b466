"""Times contenders side by side: interleaved rounds, medians, peak extra memory, and agreement before any number is
shown."""

import ctypes
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

STATUS = Path("/proc/self/status")
CLEAR_PEAK = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Contender:
    """One way to do the work. `answer` tensors must agree with the first contender's; None where it computes less."""

    name: str
    run: Callable[[], Sequence[torch.Tensor] | None]
    tolerance: float = 0.0


@dataclass(frozen=True)
class Timing:
    """median_ms and quartiles of one contender; peak_extra_mib beyond what was there before, None where unknown."""

    name: str
    median_ms: float
    lower_ms: float
    upper_ms: float
    peak_extra_mib: float | None


def compare(contenders: Sequence[Contender], *, rounds: int, device: torch.device) -> list[Timing]:
    """Time every contender once a round, in turning order. Raises RuntimeError when their answers differ."""
    peaks = _warm_up_and_check(contenders, device)
    times_ms: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for turn in range(rounds):
        start = turn % len(contenders)
        for contender in (*contenders[start:], *contenders[:start]):
            times_ms[contender.name].append(_time_ms(contender.run, device))
    timings = []
    for contender in contenders:
        times = sorted(times_ms[contender.name])
        quartiles = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
        timings.append(Timing(contender.name, quartiles[1], quartiles[0], quartiles[2], peaks[contender.name]))
    return timings


def _warm_up_and_check(contenders: Sequence[Contender], device: torch.device) -> dict[str, float | None]:
    """Peak extra memory of each contender's first run, after its answer was compared with the first contender's."""
    peaks, expected = {}, None
    for contender in contenders:
        peaks[contender.name], answer = _peak_extra_mib(contender.run, device)
        if answer is None:
            continue
        expected = answer if expected is None else expected
        for position, (value, wanted) in enumerate(zip(answer, expected, strict=True)):
            difference = relative_difference(value, wanted)
            if not difference <= contender.tolerance:
                raise RuntimeError(
                    f"{contender.name} disagrees with {contenders[0].name}: answer {position} differs by {difference:.2g}, "
                    f"allowed {contender.tolerance:.2g}; no times are reported for wrong answers"
                )
    return peaks


def relative_difference(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of `expected`."""
    expected = expected.double()
    return ((value.double() - expected).norm() / expected.norm().clamp(min=1e-300)).item()


def _peak_extra_mib(run: Callable[[], Any], device: torch.device) -> tuple[float | None, Any]:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        answer = run()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20, answer
    if not (CLEAR_PEAK.exists() and STATUS.exists()):
        return None, run()
    # What earlier runs freed would otherwise be used again, and not count.
    ctypes.CDLL(None).malloc_trim(0)
    # Linux: 5 makes the peak of the resident set start from its present size.
    CLEAR_PEAK.write_text("5")
    before = _peak_resident_mib()
    answer = run()
    return _peak_resident_mib() - before, answer


def _peak_resident_mib() -> float:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def _time_ms(run: Callable[[], Any], device: torch.device) -> float:
    _synchronize(device)
    started = time.perf_counter()
    run()
    _synchronize(device)
    return (time.perf_counter() - started) * 1e3


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
