"""Small inline SVG charts whose colours are CSS variables, so that one drawing serves light and dark pages."""

import html
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 460, 250
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 12, 34
# More points than pixels show nothing more; a longer series is drawn as means of equal stretches.
MAX_POINTS = 400
FOREST_ROW, FOREST_LABEL, FOREST_WIDTH = 24, 250, 820


@dataclass(frozen=True)
class Series:
    """A line: x and y of equal length (not finite = a gap), drawn in the colour --run-INDEX."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2, 5 times a power of ten) inside [low, high], about `count` of them."""
    span = high - low
    assert span > 0, "an axis has two ends"
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def number(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 10000:
        return f"{value / 1000:g}k"
    return f"{value:.4g}"


def tick_label(value: float, values: Sequence[float]) -> str:
    """As many decimals as the distance between ticks needs: neighbours never read the same."""
    distance = values[1] - values[0] if len(values) > 1 else abs(value)
    if not distance or abs(value) >= 10000:
        return number(value)
    decimals = max(0, -math.floor(math.log10(distance) + 1e-9))
    return f"{value:.{decimals}f}" if value else "0"


def signed(value: float) -> str:
    return "0" if abs(value) < 1e-12 else f"{value:+.3g}"


def thinned(series: Series) -> Series:
    num_points = len(series.x)
    if num_points <= MAX_POINTS:
        return series
    bounds = [round(index * num_points / MAX_POINTS) for index in range(MAX_POINTS + 1)]
    pieces = [slice(start, stop) for start, stop in itertools.pairwise(bounds)]
    x = [sum(series.x[piece]) / len(series.x[piece]) for piece in pieces]
    y = [sum(series.y[piece]) / len(series.y[piece]) for piece in pieces]
    return Series(series.name, x, y, series.colour)


def line_chart(title: str, series: Sequence[Series], *, note: str = "") -> str:
    """A figure with one line for each series over training steps; "" when there is nothing to draw."""
    drawn = [thinned(line) for line in series]
    points = [(x, y) for line in drawn for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)]
    if not points:
        return ""
    x_high = max(x for x, _ in points)
    y_low, y_high = padded(min(y for _, y in points), max(y for _, y in points))
    to_x = scale(0.0, max(x_high, 1.0), LEFT, WIDTH - RIGHT)
    to_y = scale(y_low, y_high, HEIGHT - BOTTOM, TOP)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title, quote=True)} by step">']
    y_ticks, x_ticks = ticks(y_low, y_high), ticks(0.0, max(x_high, 1.0))
    for value in y_ticks:
        y = to_y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{tick_label(value, y_ticks)}</text>'
        )
    for value in x_ticks:
        parts.append(
            f'<text class="tick" x="{to_x(value):.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{tick_label(value, x_ticks)}</text>'
        )
    parts.append(f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">step</text>')
    parts.extend(line_path(line, to_x, to_y) for line in drawn)
    caption = f'<span class="note">{html.escape(note)}</span>' if note else ""
    return (
        f'<figure class="chart"><figcaption>{html.escape(title)}{caption}</figcaption>{"".join(parts)}</svg></figure>'
    )


def line_path(line: Series, to_x, to_y) -> str:
    commands, pen_down = [], False
    for x, y in zip(line.x, line.y, strict=True):
        if math.isfinite(y):
            commands.append(f"{'L' if pen_down else 'M'}{to_x(x):.1f} {to_y(y):.1f}")
        pen_down = math.isfinite(y)
    last = next((f"{number(y)}" for y in reversed(line.y) if math.isfinite(y)), "nothing")
    tip = f"<title>{html.escape(line.name)}: last {last}</title>"
    if len(commands) == 1:
        x, y = commands[0][1:].split()
        return f'<circle class="dot" cx="{x}" cy="{y}" r="3" style="fill:var(--run-{line.colour})">{tip}</circle>'
    return f'<path class="line" d="{"".join(commands)}" style="stroke:var(--run-{line.colour})">{tip}</path>'


def padded(low: float, high: float) -> tuple[float, float]:
    """Ends of an axis: a little beyond the data, from zero when the data is near it."""
    if low >= 0 and low < 0.4 * high:
        return 0.0, high * 1.06
    margin = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
    return low - margin, high + margin


def scale(low: float, high: float, start: float, stop: float):
    return lambda value: start + (value - low) / (high - low) * (stop - start)


@dataclass(frozen=True)
class Interval:
    """A row of a forest chart, in percent: the value with twice its standard error on either side."""

    label: str
    value: float
    standard_error: float
    verdict: str


def forest_chart(title: str, rows: Sequence[Interval]) -> str:
    """Differences around a zero line, each with an interval of two standard errors."""
    reach = max(max(abs(row.value) + 2 * row.standard_error for row in rows), 0.1) * 1.05
    height = FOREST_ROW * len(rows) + 34
    to_x = scale(-reach, reach, FOREST_LABEL, FOREST_WIDTH - 16)
    label = html.escape(title, quote=True)
    parts = [f'<svg viewBox="0 0 {FOREST_WIDTH} {height}" role="img" aria-label="{label}" class="forest">']
    for value in ticks(-reach, reach, 10):
        x = to_x(value)
        kind = "axis" if abs(value) < 1e-12 else "grid"
        parts.append(f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="6" y2="{height - 26}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{height - 9}" text-anchor="middle">{signed(value)}</text>')
    for index, row in enumerate(rows):
        y = 6 + FOREST_ROW * (index + 0.5)
        low, high = to_x(row.value - 2 * row.standard_error), to_x(row.value + 2 * row.standard_error)
        kind = {"better": "better", "worse": "worse"}.get(row.verdict, "same")
        tip = f"<title>{html.escape(row.label)}: {row.value:+.2f} +- {row.standard_error:.2f}</title>"
        parts.append(
            f'<text class="row" x="{FOREST_LABEL - 14}" y="{y + 4:.1f}" text-anchor="end">{html.escape(row.label)}</text>'
        )
        parts.append(
            f'<line class="whisker {kind}" x1="{low:.1f}" x2="{high:.1f}" y1="{y:.1f}" y2="{y:.1f}">{tip}</line>'
        )
        parts.append(f'<circle class="mark {kind}" cx="{to_x(row.value):.1f}" cy="{y:.1f}" r="4.5">{tip}</circle>')
    return f'<figure class="chart wide"><figcaption>{html.escape(title)}</figcaption>{"".join(parts)}</svg></figure>'


def histogram_chart(title: str, counts: Sequence[int], *, note: str = "") -> str:
    """Bars over [0, 1] in equal bins, counts on the y axis."""
    high = max(counts) * 1.06 or 1.0
    to_x, to_y = scale(0.0, 1.0, LEFT, WIDTH - RIGHT), scale(0.0, high, HEIGHT - BOTTOM, TOP)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title, quote=True)}">']
    for value in ticks(0.0, high):
        y = to_y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>')
    for value in ticks(0.0, 1.0):
        parts.append(
            f'<text class="tick" x="{to_x(value):.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{number(value)}</text>'
        )
    bin_width = 1.0 / len(counts)
    for index, count in enumerate(counts):
        x, y = to_x(index * bin_width) + 1, to_y(count)
        width = to_x((index + 1) * bin_width) - x - 1
        tip = f"<title>{index * bin_width:.2f} to {(index + 1) * bin_width:.2f}: {count:,}</title>"
        bottom = HEIGHT - BOTTOM
        parts.append(
            f'<rect class="bar" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{bottom - y:.1f}">{tip}</rect>'
        )
    caption = f'<span class="note">{html.escape(note)}</span>' if note else ""
    return (
        f'<figure class="chart"><figcaption>{html.escape(title)}{caption}</figcaption>{"".join(parts)}</svg></figure>'
    )
