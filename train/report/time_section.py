"""Where a step's time went: for each run one bar of its parts, and the same as numbers.

In: the `*_ms` fields of metrics.jsonl (train/supervision/phases.py says what each part is). Medians over the logged rows,
so that a slow first report or a disturbed one moves nothing.
"""

import html
import math
import statistics
from collections.abc import Sequence

from train.report.runs import Run

# (field of metrics.jsonl, label); the order is that of a step.
PARTS = (
    ("data_wait_ms", "data wait"),
    ("forward_ms", "forward"),
    ("loss_ms", "loss"),
    ("backward_ms", "backward"),
    ("reduce_ms", "reduce"),
    ("optimizer_step_ms", "optimizer"),
    ("logging_ms", "logging"),
    ("other_ms", "other"),
)
WIDTH, ROW, BAR, LABEL, TOTAL = 820, 34, 20, 150, 90
NOTE = (
    "Medians of the logged steps of rank 0. Waiting for another rank counts where the two meet: in the loss, in the "
    "reduction, or in the optimizer's step. On a GPU a part is what it adds to the step: what runs beside another part counts "
    "for nothing."
)


def step_parts(run: Run) -> dict[str, float]:
    """Median milliseconds of each part; empty for a run of an earlier version, which has none."""
    rows = [row for row in run.rows if "forward_ms" in row]
    return {field: statistics.median(row[field] for row in rows) for field, _ in PARTS} if rows else {}


def time_section(runs: Sequence[Run]) -> str:
    """The section, "" when no run has parts."""
    parts = [(run, step_parts(run)) for run in runs]
    shown = [(run, part) for run, part in parts if part]
    if not shown:
        return ""
    keys = "".join(
        f'<span><i class="key" style="background:var(--part-{index})"></i>{label}</span>'
        for index, (_, label) in enumerate(PARTS)
    )
    return (
        f'<section id="time"><h2>Where a step\'s time goes</h2><div class="keys">{keys}</div>'
        f'<div class="scroll">{bars(shown)}</div><div class="scroll">{table(shown)}</div><p class="note">{NOTE}</p></section>'
    )


def bars(shown: Sequence[tuple[Run, dict[str, float]]]) -> str:
    """One bar for each run, to one scale of milliseconds."""
    longest = max(sum(part.values()) for _, part in shown) or 1.0
    height, span = ROW * len(shown) + 8, WIDTH - LABEL - TOTAL
    drawn = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="Parts of a step by run">']
    for row, (run, part) in enumerate(shown):
        y, x, total = 8 + ROW * row, float(LABEL), sum(part.values())
        drawn.append(
            f'<text class="row" x="{LABEL - 12}" y="{y + 15}" text-anchor="end">{html.escape(run.name)}</text>'
        )
        for index, (field, label) in enumerate(PARTS):
            width = span * part[field] / longest
            tip = f"<title>{html.escape(run.name)}, {label}: {part[field]:.1f} ms</title>"
            drawn.append(
                f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BAR}" style="fill:var(--part-{index})">{tip}</rect>'
            )
            x += width
        drawn.append(f'<text class="tick" x="{x + 8:.1f}" y="{y + 15}">{milliseconds(total)} ms</text>')
    return f'<figure class="chart wide">{"".join(drawn)}</svg></figure>'


def table(shown: Sequence[tuple[Run, dict[str, float]]]) -> str:
    head = "".join(f"<th>{html.escape(run.name)}</th>" for run, _ in shown)
    body = []
    for field, label in PARTS:
        cells = "".join(
            f"<td>{milliseconds(part[field])} <small>{100 * part[field] / max(1e-9, sum(part.values())):.1f} %</small></td>"
            for _, part in shown
        )
        body.append(f'<tr><th scope="row">{label}</th>{cells}</tr>')
    return f"<table><thead><tr><th>ms a step</th>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def milliseconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def use_facts(run: Run) -> list[tuple[str, str]]:
    """How well the machine was used, for the table of runs: "-" where a run does not say."""
    last = run.rows[-1] if run.rows else {}
    return [
        ("Median MFU", share(middle(run, "mfu"))),
        ("Waiting for data", share(middle(run, "data_wait_share"))),
        ("Goodput", share(last.get("goodput"))),
        ("Restarts", str(last["restarts"]) if "restarts" in last else "-"),
        ("Skipped steps", str(last["skipped_steps"]) if "skipped_steps" in last else "-"),
    ]


def middle(run: Run, field: str) -> float | None:
    values = [row[field] for row in run.rows if isinstance(row.get(field), int | float) and math.isfinite(row[field])]
    return statistics.median(values) if values else None


def share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"
