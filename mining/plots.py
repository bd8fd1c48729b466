"""Bar charts as inline SVG for the gallery: nothing is loaded, colours are the page's CSS variables."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH, HEIGHT = 300, 190
LEFT, RIGHT, TOP, BOTTOM = 4, 4, 22, 34
# Labels that fit below the bars side by side.
MOST_LABELS = 12

STYLE = """
.gallery .charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(270px, 100%), 1fr)); gap: 14px; margin: 22px 0 0; }
.gallery .chart { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 14px; }
.gallery .chart h3 { font-size: 13px; margin: 0; }
.gallery .chart p { font-size: 12px; margin: 0 0 4px; }
.gallery .chart svg { display: block; width: 100%; height: auto; font-size: 9px; font-variant-numeric: tabular-nums; }
.gallery .chart rect { fill: var(--image); }
.gallery .chart text { fill: var(--muted); text-anchor: middle; }
.gallery .chart text.count { fill: var(--ink); }
.gallery .chart line { stroke: var(--line); }
"""


def charts_html(summary: Mapping[str, Any]) -> str:
    """The charts of a PairTable's summary; those whose numbers it does not have are left out."""
    histogram = summary["score"]["histogram"]
    width = 1.0 / len(histogram)
    scores = [(f"{number * width:.2f} to {(number + 1) * width:.2f}", count) for number, count in enumerate(histogram)]
    edges = {0: "0", len(histogram) // 2: "0.5", len(histogram): "1"}
    coverage, lists = (ranges(summary[part].get("bars", [])) for part in ("coverage", "hubs"))
    out = left_out_bars(summary)
    charts = [
        bar_chart("Scores of all hard pairs", "hard pairs by image cosine x text cosine", scores, edges=edges),
        bar_chart("Coverage", f"pairs by number of hard pairs (k = {summary['k']})", coverage),
        bar_chart("Lists a pair is in", "pairs by lists they are in, hubs right", lists),
        bar_chart("Left out", "pairs of an anchor and another, by cause", out),
    ]
    return f'<div class="charts">{"".join(charts)}</div>'


def left_out_bars(summary: Mapping[str, Any]) -> list[tuple[str, int]]:
    excluded, dropped = summary["excluded"], summary.get("dropped", {})
    names = {"same_image": "image", "same_caption": "caption", "near_image": "near image", "near_text": "near text"}
    bars = [(label, excluded[cause]) for cause, label in names.items()]
    names = {"false_negative": "false neg.", "hub_capped": "hubs"}
    return bars + [(label, dropped[mask]) for mask, label in names.items() if mask in dropped]


def ranges(bars: Sequence[Sequence[int]]) -> list[tuple[str, int]]:
    """[first, last, count] with a label for each."""
    return [(compact(low) if low == high else f"{compact(low)}-{compact(high)}", count) for low, high, count in bars]


def compact(number: int) -> str:
    """At most four characters."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= 10 * size or (number >= size and number % size == 0):
            return f"{number // size}{unit}"
    return str(number)


def bar_chart(title: str, note: str, bars: Sequence[tuple[str, int]], *, edges: Mapping[int, str] | None = None) -> str:
    """A figure of one bar for each (label, count); `edges` labels places between bars instead. "" without a count."""
    most = max((count for _, count in bars), default=0)
    if most == 0:
        return ""
    step = (WIDTH - LEFT - RIGHT) / len(bars)
    floor = HEIGHT - BOTTOM
    parts = []
    for number, (label, count) in enumerate(bars):
        height = (floor - TOP) * count / most
        # A bar of few is still seen.
        height = max(height, 1.0) if count else 0.0
        left = LEFT + number * step
        parts.append(
            f'<rect x="{left + 0.08 * step:.1f}" y="{floor - height:.1f}" width="{0.84 * step:.1f}" height="{height:.1f}" rx="1.5">'
            f"<title>{html.escape(label)}: {count:,}</title></rect>"
        )
        middle = left + step / 2
        if edges is None and len(bars) <= MOST_LABELS:
            parts.append(f'<text class="count" x="{middle:.1f}" y="{floor - height - 4:.1f}">{compact(count)}</text>')
        if edges is None:
            # Long labels of narrow bars stand on two lines in turn.
            row = number % 2 if len(bars) > 5 else 0
            parts.append(f'<text x="{middle:.1f}" y="{floor + 14 + 12 * row}">{html.escape(label)}</text>')
    for place, label in (edges or {}).items():
        anchor = "start" if place == 0 else "end" if place == len(bars) else "middle"
        x = LEFT + place * step
        parts.append(f'<text x="{x:.1f}" y="{floor + 14}" style="text-anchor:{anchor}">{html.escape(label)}</text>')
    if edges is not None:
        parts.append(f'<text x="{LEFT}" y="12" style="text-anchor:start">highest bar: {most:,}</text>')
    axis = f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}"></line>'
    return (
        f'<div class="chart"><h3>{html.escape(title)}</h3><p>{html.escape(note)}</p>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title, quote=True)}">{axis}{"".join(parts)}'
        "</svg></div>"
    )
