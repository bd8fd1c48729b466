"""Joins the sections into one HTML file without any reference outside itself."""

import html
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from train.report.compare import Table
from train.report.mining_section import GALLERY_STYLE, MiningPart
from train.report.mixed_section import mixed_section
from train.report.runs import Run
from train.report.sections import curves_section, facts_list, machine_section, results_section, runs_section
from train.report.style import STYLE
from train.report.time_section import time_section

NAVIGATION = (
    ("results", "Results"),
    ("mixed", "Weak and strong"),
    ("curves", "Training"),
    ("time", "Time"),
    ("runs", "What was run"),
    ("mining", "Mined pairs"),
)


def report_html(runs: Sequence[Run], tables: Sequence[Table], mining: MiningPart) -> str:
    """The whole page."""
    names = ", ".join(run.name for run in runs)
    times, mixed = time_section(runs), mixed_section(runs)
    links = "".join(
        f'<a href="#{anchor}">{title}</a>'
        for anchor, title in (*NAVIGATION, ("machine", "Machine"))
        if {"time": times, "mixed": mixed}.get(anchor, True)
    )
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Hardpair: {html.escape(names)}</title>
<style>{GALLERY_STYLE}{STYLE}</style>
</head>
<body>
<header>
<h1>Hardpair report</h1>
<div class="lead">{html.escape(names)} &middot; {made}</div>
<nav>{links}</nav>
{missing_part([lack for run in runs for lack in run.missing] + mining.missing)}
</header>
<main>
{results_section(tables, runs)}
{mixed}
{curves_section(runs)}
{times}
{runs_section(runs)}
{mining_html(mining)}
{machine_section()}
</main>
</body>
</html>
"""


def missing_part(missing: Sequence[str]) -> str:
    if not missing:
        return ""
    items = "".join(f"<li>{html.escape(item)}</li>" for item in missing)
    return f'<div class="missing"><h2>Missing from this report</h2><ul>{items}</ul></div>'


def mining_html(mining: MiningPart) -> str:
    shown = f"{facts_list(mining.facts)}{mining.html}" if mining.facts else '<p class="lack">Nothing to show.</p>'
    return f'<section id="mining"><h2>Mined pairs</h2>{shown}</section>'


def write_page(out: Path, page: str) -> None:
    """Write the file whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, out)
