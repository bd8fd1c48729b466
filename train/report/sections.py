"""The report's sections as HTML: headline, results, curves, what was run, machine."""

import html
import math
from collections.abc import Sequence
from typing import Any

from train.report.charts import Interval, Series, forest_chart, line_chart
from train.report.compare import CLEAR_ERRORS, Difference, Row, Table, percent, verdict_sentence
from train.report.machine import machine_facts, package_versions
from train.report.runs import Run
from train.report.time_section import use_facts

KIND_TITLES = {"zeroshot": "Zero-shot classification", "retrieval": "Retrieval", "linear_probe": "Linear probe"}
HEADLINE_METRICS = ("top1", "image_to_text_r1", "text_to_image_r1")
MAX_HEADLINES = 8
# (field of metrics.jsonl, title, note)
CURVES = (
    ("loss", "Loss", "contrastive plus weighted margin; batches of hard pairs score higher by design"),
    ("contrastive", "Contrastive term", ""),
    ("margin", "Margin term (HNML)", "before its weight"),
    ("image_accuracy", "In-batch accuracy, image to text", ""),
    ("logit_scale", "Logit scale", ""),
    ("gradient_norm", "Gradient norm", ""),
    ("learning_rate", "Learning rate", ""),
    ("pairs_per_s", "Throughput, pairs/s", "all ranks together"),
    ("mfu", "MFU", "share of the device's peak, by counted operations"),
    ("data_wait_ms", "Wait for data, ms a step", ""),
)


def metric_label(metric: str) -> str:
    """ "zeroshot/name_within_subgroup/top1" -> "name within subgroup, top-1"."""
    kind, task, measure = metric.split("/", 2)
    words = measure.replace("_", " ")
    if kind == "retrieval":
        direction, _, recall = words.rpartition(" r")
        words = f"{direction} R@{recall}"
        return words if task == "retrieval" else f"{task.replace('_', ' ')}, {words}"
    return f"{task.replace('_', ' ')}, {words.replace('top', 'top-')}"


def full_label(metric: str) -> str:
    """The label where no heading tells a probe from zero-shot."""
    return metric_label(metric) + (" (probe)" if metric.startswith("linear_probe/") else "")


def headline_cards(table: Table) -> str:
    """The first choice of every task, with its difference."""
    rows = [row for row in table.rows if row.metric.rsplit("/", 1)[1] in HEADLINE_METRICS][:MAX_HEADLINES]
    focus = table.runs.index(table.candidate) if table.candidate in table.runs else len(table.runs) - 1
    cards = []
    for row in rows:
        cell = row.cells[focus]
        value = "-" if cell is None else f"{percent(cell.value)} %"
        cards.append(
            f'<div class="card"><div class="what">{html.escape(full_label(row.metric))}</div>'
            f'<div class="big">{value}</div>{pill(row.difference, table.baseline)}</div>'
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def pill(difference: Difference | None, baseline: str | None) -> str:
    if difference is None:
        return ""
    kind = {"better": "better", "worse": "worse"}.get(difference.verdict, "same")
    text = (
        f"{100 * difference.value:+.2f} &plusmn; {percent(difference.standard_error)} vs {html.escape(str(baseline))}"
    )
    return f'<div class="pill {kind}">{text}</div>'


def results_section(tables: Sequence[Table], runs: Sequence[Run]) -> str:
    if not tables:
        return '<section id="results"><h2>Results</h2><p class="lack">No run has been evaluated yet.</p></section>'
    parts = []
    for table in tables:
        parts.append(f"<h3>{html.escape(table.suite)} <small>{table.num_images:,} pictures</small></h3>")
        if table.differences:
            parts.append(f'<p class="verdict">{html.escape(verdict_sentence(table))}</p>')
        parts += [headline_cards(table), html_table(table, runs), forest_of(table)]
    return f'<section id="results"><h2>Results</h2>{"".join(parts)}{how_to_read(tables)}</section>'


def html_table(table: Table, runs: Sequence[Run]) -> str:
    has_difference = bool(table.differences)
    head = "".join(
        f'<th><i class="key" style="background:var(--run-{index})"></i>{html.escape(run.name)}</th>'
        for index, run in enumerate(runs)
    )
    extra = (
        f"<th>{html.escape(str(table.candidate))} &minus; {html.escape(str(table.baseline))}</th><th></th>"
        if has_difference
        else ""
    )
    body, kind_before = [], ""
    width = 3 + len(runs) + (2 if has_difference else 0)
    for row in table.rows:
        kind = row.metric.split("/", 1)[0]
        if kind != kind_before:
            title = html.escape(KIND_TITLES.get(kind, kind))
            body.append(f'<tr class="kind"><th colspan="{width}" scope="colgroup">{title}</th></tr>')
            kind_before = kind
        body.append(html_row(row, has_difference))
    return (
        f'<div class="scroll"><table class="results"><thead><tr><th>metric, %</th><th>n</th><th>chance</th>{head}{extra}'
        f"</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def html_row(row: Row, has_difference: bool) -> str:
    cells = [
        f'<th scope="row" title="{html.escape(row.metric, quote=True)}">{html.escape(metric_label(row.metric))}</th>'
    ]
    cells.append(f'<td class="muted">{row.count:,}</td>')
    cells.append(f'<td class="muted">{"" if row.chance is None else percent(row.chance)}</td>')
    for cell in row.cells:
        shown = "-" if cell is None else f"{percent(cell.value)} <small>&plusmn; {percent(cell.standard_error)}</small>"
        cells.append(f"<td>{shown}</td>")
    if has_difference and row.difference is not None:
        difference = row.difference
        kind = {"better": "better", "worse": "worse"}.get(difference.verdict, "same")
        mark = "" if difference.is_paired else " (unpaired)"
        error = f"<small>&plusmn; {percent(difference.standard_error)}{mark}</small>"
        cells.append(f'<td class="{kind}">{100 * difference.value:+.2f} {error}</td>')
        cells.append(f'<td class="{kind} word">{difference.verdict}</td>')
    elif has_difference:
        cells.append("<td>-</td><td></td>")
    return f"<tr>{''.join(cells)}</tr>"


def forest_of(table: Table) -> str:
    rows = [
        Interval(
            metric_label(row.metric)
            if not row.metric.startswith("linear_probe")
            else f"{metric_label(row.metric)} (probe)",
            100 * row.difference.value,
            100 * row.difference.standard_error,
            row.difference.verdict,
        )
        for row in table.rows
        if row.difference is not None
    ]
    if not rows:
        return ""
    title = f"{table.candidate} minus {table.baseline}, percentage points, with twice the standard error"
    return f'<div class="scroll">{forest_chart(title, rows)}</div>'


def how_to_read(tables: Sequence[Table]) -> str:
    differences = [difference for table in tables for difference in table.differences]
    if not differences:
        return ""
    paired = all(difference.is_paired for difference in differences)
    how = (
        "Differences are taken picture by picture on the same pictures (paired)."
        if paired
        else "Where a difference is marked unpaired, values per picture were not at hand and the two errors add in squares."
    )
    return (
        f'<p class="note">{how} "Better" and "worse" mean a difference of more than {CLEAR_ERRORS:g} standard errors: of '
        "twenty metrics about one passes that by chance alone, and metrics of one suite move together. The errors tell how "
        "far the choice of test pictures matters; they do not contain the choice of the training seed, of which each run "
        "here is one.</p>"
    )


def curves_section(runs: Sequence[Run]) -> str:
    charts = []
    for field, title, note in CURVES:
        series = [
            Series(run.name, [row["step"] for row in rows], [float(row[field]) for row in rows], index)
            for index, run in enumerate(runs)
            if (rows := [row for row in run.rows if isinstance(row.get(field), int | float)])
        ]
        # A figure that no run has is no curve.
        if not any(line.x for line in series):
            continue
        if field == "margin" and not any(any(line.y) for line in series):
            continue
        charts.append(line_chart(title, series, note=note))
    keys = "".join(
        f'<span><i class="key" style="background:var(--run-{index})"></i>{html.escape(run.name)}</span>'
        for index, run in enumerate(runs)
        if run.rows
    )
    if not any(charts):
        return '<section id="curves"><h2>Training</h2><p class="lack">No run has metrics yet.</p></section>'
    return (
        f'<section id="curves"><h2>Training</h2><div class="keys">{keys}</div>'
        f'<div class="charts">{"".join(charts)}</div></section>'
    )


def setting(run: Run, path: str, default: str = "-") -> Any:
    value: Any = run.config
    for key in path.split("."):
        if not isinstance(value, dict) or key not in value:
            return default
        value = value[key]
    return value


def median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def partners_text(run: Run) -> str:
    count = setting(run, "config.data.hard_per_anchor", 0)
    return f"{count} {setting(run, 'config.data.partners')} per anchor" if count else "none"


def margin_text(run: Run) -> str:
    weight = setting(run, "config.loss.margin_weight", 0.0)
    place = f"{setting(run, 'config.loss.margin_space')}, {str(setting(run, 'config.loss.margin_direction')).replace('_', ' ')}"
    return f"{weight:g} ({place})" if weight else "none"


def run_facts(run: Run) -> list[tuple[str, str]]:
    rates = [row["pairs_per_s"] for row in run.rows if math.isfinite(row.get("pairs_per_s", math.nan))]
    memory = [row["peak_memory_mib"] for row in run.rows if "peak_memory_mib" in row]
    pairs = setting(run, "num_pairs", None)
    return [
        ("Recipe", run.recipe),
        ("Folder", str(run.path)),
        ("Model", str(setting(run, "config.model.name"))),
        ("Starts from", str(setting(run, "config.model.pretrained", "") or "scratch")),
        ("Pairs", f"{setting(run, 'config.data.store')}" + ("" if pairs is None else f", {pairs:,}")),
        ("Partners", partners_text(run)),
        ("Margin weight", margin_text(run)),
        ("Global batch", f"{setting(run, 'config.batch_size')} pairs on {setting(run, 'world_size')} ranks"),
        ("Steps", f"{run.last_step or 0:,} of {setting(run, 'num_steps')}"),
        ("Learning rate, decay", f"{setting(run, 'config.optim.lr')}, {setting(run, 'config.optim.wd')}"),
        ("Seed", str(setting(run, "config.seed"))),
        ("DeepSpeed", deepspeed_text(run)),
        ("Time in steps", duration(run.seconds)),
        ("Median throughput", f"{median(rates):,.0f} pairs/s" if rates else "-"),
        ("Peak memory", f"{max(memory):,.0f} MiB a process" if memory else "-"),
        *use_facts(run),
        ("Commit", str(setting(run, "commit"))[:12] + (" + changes" if setting(run, "dirty", False) is True else "")),
    ]


def deepspeed_text(run: Run) -> str:
    stage = setting(run, "deepspeed.zero_optimization.stage", 0)
    precisions = [
        str(setting(run, "deepspeed.torch_autocast.dtype"))
        if setting(run, "deepspeed.torch_autocast.enabled", False)
        else "",
        *(name for name in ("bf16", "fp16") if setting(run, f"deepspeed.{name}.enabled", False)),
    ]
    precision = next((name for name in precisions if name), "fp32")
    return f"ZeRO {stage}, {precision}, {setting(run, 'device')}"


def runs_section(runs: Sequence[Run]) -> str:
    columns = [run_facts(run) for run in runs]
    head = "".join(
        f'<th><i class="key" style="background:var(--run-{index})"></i>{html.escape(run.name)}</th>'
        for index, run in enumerate(runs)
    )
    rows = []
    for index, (label, _) in enumerate(columns[0]):
        values = [column[index][1] for column in columns]
        cells = "".join(f"<td>{html.escape(value)}</td>" for value in values)
        rows.append(f'<tr><th scope="row">{html.escape(label)}</th>{cells}</tr>')
    return (
        '<section id="runs"><h2>What was run</h2><div class="scroll"><table class="runs"><thead><tr><th></th>'
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def facts_list(facts: Sequence[tuple[str, str]]) -> str:
    items = "".join(f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>" for name, value in facts)
    return f'<dl class="facts">{items}</dl>'


def machine_section() -> str:
    return (
        f'<section id="machine"><h2>Machine and software</h2>{facts_list(machine_facts())}'
        f"{facts_list(package_versions())}</section>"
    )
