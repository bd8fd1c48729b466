"""The mined pairs: numbers of the search, the distribution of scores, and some anchors with their hard pairs.

Pictures and cards are those of the gallery (mining.gallery); this is an excerpt of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mining.gallery import MdsPictures, gallery_sections, refuse_another_store
from mining.gallery_page import CAUSE_LABELS, STYLE, sections_html
from mining.pair_table import PairTable
from mining.summary import SUMMARY_NAME, read_summary
from train.report.charts import histogram_chart
from train.report.runs import Run

GALLERY_STYLE = STYLE
ANCHORS_A_SECTION = 3
PAIRS_AN_ANCHOR = 8
# The hardest anchors and some at random; the gallery has more.
NUM_SECTIONS = 2
LEGEND = (
    '<div class="legend"><span><i style="background:var(--image)"></i>image cosine</span>'
    '<span><i style="background:var(--text)"></i>text cosine</span>'
    "<span>bold: their product, the score</span></div>"
)


@dataclass(frozen=True)
class MiningPart:
    """facts: label and value; html: charts and gallery, trusted; missing: what could not be shown and why."""

    facts: list[tuple[str, str]]
    html: str
    missing: list[str]


def named_by_runs(runs: Sequence[Run], field: str) -> Path | None:
    """The folder that the last run with a pair table names in `data.<field>` of its config."""
    for run in reversed(runs):
        data = run.config.get("config", {}).get("data", {})
        if data.get("pairs") and data.get(field):
            return Path(data[field])
    return None


def mining_part(runs: Sequence[Run], pairs: Path | None, store: Path | None) -> MiningPart:
    """Read the pair table and the store: those given, else those that the runs name.

    Raises ValueError for a folder given on the command line that is none, or a table of another store. Where only a
    run's config names the folder, the same finding is reported as missing: the run may have been moved here.
    """
    table_path = pairs or named_by_runs(runs, "pairs")
    store_path = store or named_by_runs(runs, "store")
    if table_path is None:
        return MiningPart([], "", ["No run uses a pair table and none was given (--pairs), so mining is not shown."])
    try:
        table = PairTable.open(table_path)
        facts, charts, missing = numbers_of(table)
        if store_path is None:
            return MiningPart(facts, charts, [*missing, "No store was given (--store), so mined pairs are not shown."])
        pictures = MdsPictures(store_path)
        refuse_another_store(table, pictures)
        sections = gallery_sections(table, pictures, ANCHORS_A_SECTION, PAIRS_AN_ANCHOR, 0)
    except ValueError as error:
        if pairs is not None or store is not None:
            raise
        return MiningPart([], "", [f"The mined pairs that the runs name cannot be shown: {error}."])
    cards = sections_html(sections[:NUM_SECTIONS])
    return MiningPart(facts, f'{charts}<div class="gallery">{LEGEND}{cards}</div>', missing)


def numbers_of(table: PairTable) -> tuple[list[tuple[str, str]], str, list[str]]:
    """(facts, chart, missing) from the table's summary.json."""
    facts = [("Pair table", str(table.path)), ("Pairs", f"{len(table):,}"), ("Hard pairs kept (k)", str(table.k))]
    if not (table.path / SUMMARY_NAME).is_file():
        return facts, "", [f"{table.path} has no {SUMMARY_NAME}, so the numbers of the search are not shown."]
    summary = read_summary(table.path)
    chart = histogram_chart(
        "Scores of all hard pairs", summary["score"]["histogram"], note="image cosine x text cosine"
    )
    return [*facts, *summary_facts(summary)], f'<div class="charts">{chart}</div>', []


def summary_facts(summary: dict[str, Any]) -> list[tuple[str, str]]:
    total = summary["pairs"]
    excluded, noise = summary["excluded"], summary["noise"]
    causes = [
        (f"of these: {label}", f"{excluded[cause]:,}") for cause, label in CAUSE_LABELS.items() if excluded.get(cause)
    ]
    median = (summary["score"]["best_of_pair"] or {}).get("0.5")
    facts = [
        ("With a hard pair", share_of(summary["coverage"]["with_a_hard_pair"], total)),
        ("With all k", share_of(summary["coverage"]["with_k_hard_pairs"], total)),
        ("Rows proven exact", share_of(summary["certified"], total)),
        ("Left out as duplicates", f"{excluded['total']:,}"),
        *causes,
        *dropped_facts(summary),
        ("Noise, not used as anchors", share_of(noise["total"], total)),
        ("Median best score", "none" if median is None else f"{median:.3f}"),
    ]
    if "seconds" in summary:
        facts.append(("Search time", f"{summary['seconds']:.1f} s"))
    return facts


def dropped_facts(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """What pruning took out of the lists, where it was asked to; tables of earlier versions do not say."""
    dropped, parameters = summary.get("dropped", {}), summary.get("parameters", {})
    facts = []
    if "false_negative" in dropped:
        margin = parameters.get("false_negative_margin")
        facts.append((f"Taken out as likely false negatives (margin {margin})", f"{dropped['false_negative']:,}"))
    if "hub_capped" in dropped:
        facts.append((f"Taken out of hubs (at most {parameters.get('hub_cap')} lists)", f"{dropped['hub_capped']:,}"))
    if facts:
        facts.append(("Left without hard pairs by that", f"{dropped['left_without']:,}"))
    return facts


def share_of(count: int, total: int) -> str:
    return f"{count:,} ({100 * count / max(1, total):.1f} %)"
