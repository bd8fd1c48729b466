"""`python -m train.report`: compare runs on the terminal and in one self-contained HTML page."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from mining.command_line import parse, run
from train.report.compare import build_tables, choose_pair, text_table, verdict_sentence
from train.report.mining_section import mining_part
from train.report.page import report_html, write_page
from train.report.runs import read_runs

PROGRAM = "python -m train.report"
DESCRIPTION = f"""Results with standard errors, training curves, mined pairs and settings of one or several runs.

Example: {PROGRAM} runs/pretrain runs/control runs/refine --out report.html

The differences shown are those of the refine run from the control run, or of the last run from the one before it."""


@dataclass(frozen=True)
class ReportConfig:
    """Flags of `python -m train.report`."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """run folders in the order of the columns"""
    out: Path = Path("report.html")
    """the page to write"""
    baseline: str | None = None
    """run to take differences from (default: the one of a control recipe, else the last but one)"""
    candidate: str | None = None
    """run to take differences of (default: the one of a refine recipe, else the last)"""
    pairs: Path | None = None
    """pair table to show (default: the one that the runs were trained with)"""
    store: Path | None = None
    """store with the pictures of the pair table (default: the one that the runs were trained on)"""


def main(arguments: Sequence[str]) -> None:
    """Write the page, print the tables. Raises ValueError for a user's mistake."""
    config = parse(ReportConfig, program=PROGRAM, description=DESCRIPTION, arguments=arguments)
    runs = read_runs(config.runs)
    tables = build_tables(runs, choose_pair(runs, config.baseline, config.candidate))
    mining = mining_part(runs, config.pairs, config.store)
    write_page(config.out, report_html(runs, tables, mining))
    for table in tables:
        print(f"{table.suite}, {table.num_images} pictures, in percent, with standard errors")
        print(text_table(table))
        if table.differences:
            print(verdict_sentence(table))
        print()
    for lack in [lack for item in runs for lack in item.missing] + mining.missing:
        print(f"missing: {lack}")
    print(f"report: {config.out}")


if __name__ == "__main__":
    run(main)
