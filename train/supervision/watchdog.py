"""When does a job hang, and who is it that the others wait for?

In: where each rank is and how long ago it said so. Out: a report that names the rank, its phase, its step and the shard it reads.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from train.supervision.phases import CHECKPOINT, DATA, START

EXIT_HANG = 86
NAMED_RANKS = 8
# A rank that keeps still for so many times its pause between signs of life is stopped, not late.
SILENT_BEATS = 3


@dataclass(frozen=True)
class Place:
    """Where a rank is, since when (seconds before it said so), and what its data workers read."""

    phase: str
    step: int
    for_s: float
    detail: str = ""
    reading: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        shards = [shard or "nothing" for shard in self.reading]
        more = [self.detail] if self.detail else []
        more += [f"worker {number} reads {shard}" for number, shard in enumerate(shards)] if self.phase == DATA else []
        return f"{self.phase} of step {self.step}" + (f" ({'; '.join(more)})" if more else "")


@dataclass(frozen=True)
class HangReport:
    text: str
    silent: list[str]
    """ranks that give no sign of life and can't end by themselves"""


def beat_pause_s(hang_timeout_s: float) -> float:
    """Seconds between two signs of life."""
    return min(2.0, hang_timeout_s / 8)


def hang_report(places: Mapping[str, tuple[Place | None, float]], hang_timeout_s: float) -> HangReport | None:
    """None while all is well. `places`: for each rank its last word and the seconds since then.

    A rank that still starts up may take its time, and one may wait for others as long as any of them moves on; silence counts from the
    first moment.
    """
    stuck = {
        name: place.for_s + ago_s
        for name, (place, ago_s) in places.items()
        if place is not None and place.phase != START and place.for_s + ago_s > hang_timeout_s
    }
    silent = [name for name, (_, ago_s) in places.items() if ago_s > hang_timeout_s]
    moves = [place for place, _ in places.values() if place is not None and place.phase != START]
    if not silent and (not stuck or len(stuck) < len(moves)):
        return None
    silent_s = SILENT_BEATS * beat_pause_s(hang_timeout_s)
    silent = [name for name, (_, ago_s) in places.items() if ago_s > silent_s]
    culprits = silent or waited_for({name: place for name, (place, _) in places.items() if place is not None})
    lines = [
        f"hang: no progress for {max([*stuck.values(), *(places[name][1] for name in silent)]):.0f} s, the job ends"
    ]
    for name in culprits[:NAMED_RANKS]:
        place, ago_s = places[name]
        if name in silent:
            last = f", last seen in {place}" if place else ""
            lines.append(f"  {name} has given no sign of life for {ago_s:.0f} s (stopped, or out of reach){last}")
        elif place:
            lines.append(f"  {name} is in {place} for {place.for_s + ago_s:.0f} s")
    if len(culprits) > NAMED_RANKS:
        lines.append(f"  and {len(culprits) - NAMED_RANKS} more like these")
    others = Counter(str(place) for name, (place, _) in places.items() if name not in culprits)
    lines += [f"  waiting for it: {count} rank{'s'[: count > 1]} in {where}" for where, count in others.items()]
    return HangReport("\n".join(lines), silent)


def waited_for(places: Mapping[str, Place]) -> list[str]:
    """The ranks that the others wait for: those furthest behind, at one step those in what a rank does alone."""
    if not places:
        return []
    last_step = min(place.step for place in places.values())
    behind = {name: place for name, place in places.items() if place.step == last_step}
    alone = [name for name, place in behind.items() if place.phase == DATA]
    return alone or [name for name, place in behind.items() if place.phase != CHECKPOINT] or list(behind)
