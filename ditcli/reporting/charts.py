"""Line charts as inline SVG, in the colours of the page around them, readable on a phone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 440, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 30
MOST_POINTS = 300
LARGEST, TINY = 1e100, 1e-100
START = 0.1  # of a run: what losses fall by there would press the rest flat
LOG_FROM = 3.0  # a larger ratio of the ends is drawn on a logarithmic axis


@dataclass(frozen=True)
class Line:
    """(x, y) pairs, in order of x; y may be None or not finite, where the line has a gap."""

    name: str
    points: Sequence[tuple[float, float | None]]
    color: str = "var(--line)"
    faint: bool = False


def chart(
    title: str,
    lines: Sequence[Line],
    *,
    note: str = "",
    x_name: str = "step",
    zero: bool = False,
    settled: bool = False,
) -> str:
    """A figure with title, axes, lines and, where there are several, their names; empty where no line has a point.

    `zero` lets y begin at 0; `settled` gives the height to what follows the first part, whose values are cut off.
    """
    thinned = [(line, _thin(line.points)) for line in lines]
    known = [(x, y) for _, points in thinned for x, y in points if y is not None]
    if not known:
        return ""
    low_x, high_x = min(x for x, _ in known), max(x for x, _ in known)
    low, high = min(y for _, y in known), max(y for _, y in known)
    if settled:
        high = max((y for x, y in known if x > low_x + START * (high_x - low_x)), default=high)
    log = not zero and low > TINY and high > LOG_FROM * low
    if zero:
        low = min(low, 0.0)
    if _alike(low, high):
        margin = 0.1 * (abs(high) if abs(high) > TINY else 1)
        low, high = low - margin, high + margin
    elif not log:
        low, high = (low if zero else low - (high - low) * 0.05), high + (high - low) * 0.05
    if _alike(low_x, high_x):
        low_x, high_x = low_x - 1, high_x + 1

    def place_x(x: float) -> float:
        return LEFT + (x - low_x) / (high_x - low_x) * (WIDTH - LEFT - RIGHT)

    def place_y(y: float) -> float:
        y = min(y, high)
        if log:
            share = (math.log(y) - math.log(low)) / (math.log(high) - math.log(low))
        else:
            share = (y - low) / (high - low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    parts = []
    for y in _log_ticks(low, high) if log else _ticks(low, high, 5):
        at = place_y(y)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{number(y)}</text>')
    for x in _ticks(low_x, high_x, 4):
        at = place_x(x)
        if x == int(x) and at > LEFT + 20:
            anchor = "end" if at > WIDTH - RIGHT - 14 else "middle"
            parts.append(f'<text x="{at:.1f}" y="{HEIGHT - 10}" text-anchor="{anchor}">{number(x)}</text>')
    parts.append(f'<text x="{LEFT - 6}" y="{HEIGHT - 10}" text-anchor="end">{x_name}</text>')
    for line, points in thinned:
        style = f'style="stroke:{line.color}"' + (' class="faint"' if line.faint else "")
        for run in _runs(points):
            if len(run) == 1:
                (x, y), fill = run[0], f'style="fill:{line.color}"'
                parts.append(f'<circle class="point" cx="{place_x(x):.1f}" cy="{place_y(y):.1f}" r="3.5" {fill}/>')
            else:
                path = " ".join(f"{place_x(x):.1f},{place_y(y):.1f}" for x, y in run)
                parts.append(f'<polyline points="{path}" {style}/>')
    names = ""
    if len(lines) > 1:
        keys = [
            f'<span><i style="background:{line.color};opacity:{opacity}"></i>{escape(line.name)}</span>'
            for line in lines
            for opacity in [0.45 if line.faint else 1]
        ]
        names = f'<div class="legend">{"".join(keys)}</div>'
    head = f"<figcaption><b>{escape(title)}</b>{escape(' ' + note if note else '')}</figcaption>"
    label = escape(f"{title} against {x_name}", quote=True)
    return (
        f'<figure class="chart">{head}<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        f"{''.join(parts)}</svg>{names}</figure>"
    )


def number(value: float) -> str:
    """Short, and exact enough for an axis: 1.5k, 0.82, 2e-05."""
    if value and abs(value) < 1e-3:
        return f"{value:.0e}" if float(f"{value:.0e}") == value else f"{value:.1e}"
    if abs(value) >= 1e6:
        return f"{value / 1e6:.4g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:.4g}k"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _alike(low: float, high: float) -> bool:
    """Whether nothing could be told apart between the two: they leave no room for ticks."""
    return math.isclose(low, high, rel_tol=1e-9, abs_tol=TINY)


def _thin(points: Sequence[tuple[float, float | None]]) -> list[tuple[float, float | None]]:
    """At most MOST_POINTS: the means of as many equal parts."""
    clean = [(x, y if y is not None and abs(y) < LARGEST else None) for x, y in points]  # nor what is no number
    size = -(-len(clean) // MOST_POINTS) if clean else 1
    thin: list[tuple[float, float | None]] = []
    for start in range(0, len(clean), size):
        part = clean[start : start + size]
        values = [y for _, y in part if y is not None]
        thin.append((part[-1][0], sum(values) / len(values) if values else None))
    return thin


def _runs(points: Sequence[tuple[float, float | None]]) -> list[list[tuple[float, float]]]:
    """Neighbours without a gap between them."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if y is None:
            runs.append([])
        else:
            runs[-1].append((x, y))
    return [run for run in runs if run]


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers between the ends, 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [float(f"{k * step:.10g}") for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten, or powers alone where these are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = -(-len(powers) // 6)
    factors = (1, 2, 5) if len(powers) <= 3 else (1,)
    ticks = [factor * 10.0**power for power in powers[::every] for factor in factors]
    return [tick for tick in ticks if low <= tick <= high]
