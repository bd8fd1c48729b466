"""The comparison table: every metric of every run with its standard error, and one run's difference from another.

Both runs saw the same pictures, so the difference is taken picture by picture where the values per picture are at hand:
its standard error is that of the mean of the differences, s(d)/sqrt(n). That is smaller than the two errors suggest
when the runs mostly agree. Without them, errors add in squares, and the table says so.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from train.report.runs import Evaluation, Run

# "Clear" means beyond twice the standard error: about one such difference in twenty arises by chance alone.
CLEAR_ERRORS = 2.0


@dataclass(frozen=True)
class Cell:
    value: float
    standard_error: float


@dataclass(frozen=True)
class Difference:
    """candidate - baseline, as shares."""

    value: float
    standard_error: float
    is_paired: bool

    @property
    def is_clear(self) -> bool:
        """More than twice its standard error."""
        return abs(self.value) > CLEAR_ERRORS * self.standard_error

    @property
    def verdict(self) -> str:
        if not self.is_clear:
            return "within 2 s.e."
        return "better" if self.value > 0 else "worse"


@dataclass(frozen=True)
class Row:
    metric: str
    chance: float | None
    count: int
    unit: str
    cells: list[Cell | None]
    difference: Difference | None


@dataclass(frozen=True)
class Table:
    """One suite. `cells` of a row follow `runs`; differences are candidate - baseline, if there are two runs to compare."""

    suite: str
    runs: list[str]
    baseline: str | None
    candidate: str | None
    num_images: int
    rows: list[Row]

    @property
    def differences(self) -> list[Difference]:
        return [row.difference for row in self.rows if row.difference is not None]


def choose_pair(runs: Sequence[Run], baseline: str | None, candidate: str | None) -> tuple[Run, Run] | None:
    """(baseline, candidate): as named, else the control and the refine recipe, else the last two runs; None for one run.

    Raises ValueError for a name that is none of the runs'.
    """
    by_name = {run.name: run for run in runs}
    for flag, name in (("baseline", baseline), ("candidate", candidate)):
        if name is not None and name not in by_name:
            raise ValueError(f"--{flag} {name} is none of the runs {', '.join(by_name)}")
    if len(runs) < 2:
        return None
    controls = [run for run in runs if "control" in run.recipe]
    refined = [run for run in runs if "refine" in run.recipe]
    first = by_name[baseline] if baseline else (controls[-1] if controls and refined else runs[-2])
    second = by_name[candidate] if candidate else (refined[-1] if controls and refined else runs[-1])
    return None if first is second else (first, second)


def build_tables(runs: Sequence[Run], pair: tuple[Run, Run] | None) -> list[Table]:
    """One table for each suite that any of the runs was evaluated on."""
    suites = dict.fromkeys(suite for run in runs for suite in run.evaluations)
    return [build_table(suite, runs, pair) for suite in suites]


def build_table(suite: str, runs: Sequence[Run], pair: tuple[Run, Run] | None) -> Table:
    evaluations = [run.evaluations.get(suite) for run in runs]
    present = [evaluation for evaluation in evaluations if evaluation is not None]
    metrics = dict.fromkeys(name for evaluation in present for name in evaluation.metrics)
    compared = None if pair is None else (pair[0].evaluations.get(suite), pair[1].evaluations.get(suite))
    rows = []
    for name in metrics:
        example = next(evaluation.metrics[name] for evaluation in present if name in evaluation.metrics)
        cells = [cell_of(evaluation, name) for evaluation in evaluations]
        difference = None if compared is None or None in compared else difference_of(name, *compared)
        rows.append(Row(name, example.get("chance"), example["count"], example.get("unit", "image"), cells, difference))
    names = (None, None) if pair is None else (pair[0].name, pair[1].name)
    num_images = max(evaluation.content.get("num_images", 0) for evaluation in present)
    return Table(suite, [run.name for run in runs], names[0], names[1], num_images, rows)


def cell_of(evaluation: Evaluation | None, name: str) -> Cell | None:
    if evaluation is None or name not in evaluation.metrics:
        return None
    metric = evaluation.metrics[name]
    return Cell(metric["value"], metric["standard_error"])


def difference_of(name: str, baseline: Evaluation, candidate: Evaluation) -> Difference | None:
    first, second = cell_of(baseline, name), cell_of(candidate, name)
    if first is None or second is None:
        return None
    paired = paired_values(name, baseline, candidate)
    if paired is None:
        return Difference(
            second.value - first.value, float(np.hypot(first.standard_error, second.standard_error)), False
        )
    return paired_difference(*paired)


def paired_values(name: str, baseline: Evaluation, candidate: Evaluation) -> tuple[np.ndarray, np.ndarray] | None:
    """Values per unit of both, if both have them for the same pictures in the same order."""
    first, second = baseline.per_unit, candidate.per_unit
    if first is None or second is None or name not in first or name not in second:
        return None
    if not np.array_equal(first["keys"], second["keys"]) or len(first[name]) != len(second[name]):
        return None
    return first[name].astype(np.float64), second[name].astype(np.float64)


def paired_difference(baseline_U: np.ndarray, candidate_U: np.ndarray) -> Difference:
    """Mean of the differences per unit and its standard error s(d)/sqrt(n); float64 [U] each."""
    difference_U = candidate_U - baseline_U
    spread = float(difference_U.std(ddof=1)) if len(difference_U) > 1 else float("inf")
    return Difference(float(difference_U.mean()), spread / float(np.sqrt(len(difference_U))), True)


def verdict_sentence(table: Table) -> str:
    """What the differences amount to, in plain words."""
    differences = table.differences
    if not differences:
        return "There are not two evaluated runs to compare."
    better = sum(difference.verdict == "better" for difference in differences)
    worse = sum(difference.verdict == "worse" for difference in differences)
    rest = len(differences) - better - worse
    return (
        f"{table.candidate} against {table.baseline}: {better} of {len(differences)} metrics better by "
        f"more than twice the standard error, {worse} worse, {rest} without a clear difference."
    )


def text_table(table: Table) -> str:
    """Aligned plain text, in percent."""
    has_difference = bool(table.differences)
    head = ["metric", "chance", *table.runs]
    if has_difference:
        head += [f"{table.candidate} - {table.baseline}", ""]
    lines = [head]
    for row in table.rows:
        line = [row.metric, "" if row.chance is None else percent(row.chance)]
        line += [
            "-" if cell is None else f"{percent(cell.value)} +- {percent(cell.standard_error)}" for cell in row.cells
        ]
        if has_difference:
            line += ["-", ""] if row.difference is None else [signed(row.difference), row.difference.verdict]
        lines.append(line)
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    last = len(head) - 1 if has_difference else len(head)
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in (0, last) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def percent(share: float) -> str:
    return f"{100 * share:.2f}"


def signed(difference: Difference) -> str:
    mark = "" if difference.is_paired else " (unpaired)"
    return f"{100 * difference.value:+.2f} +- {percent(difference.standard_error)}{mark}"
