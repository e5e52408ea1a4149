"""Charts as standalone SVG text: curves and bars with intervals, readable on light and dark pages.

The text can be written to a file, shown by an `<img>`, or placed in an HTML page; it needs no script and no
font file. Lengths are SVG user units, one CSS pixel at natural size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np

Numbers = Sequence[float] | np.ndarray
Series = Numbers | tuple[Numbers, Numbers]

COLOURS = 6
CHARACTER = 7.2  # mean advance of 12-unit letters in a wide sans-serif (DejaVu), for layout only
_STYLE = """<style>
.chart {
  --ink: #24292f; --faint: #656d76; --grid: #d8dee4;
  --c0: #2f6db5; --c1: #c4622d; --c2: #3d8f5f; --c3: #8a5aab; --c4: #a8842c; --c5: #5f7480;
  font: 12px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif;
  max-width: 100%; height: auto;
}
.chart text { fill: var(--ink) } .chart .faint { fill: var(--faint) }
.chart .grid { stroke: var(--grid) } .chart .axis { stroke: var(--faint) } .chart .mark { stroke: var(--ink) }
@media (prefers-color-scheme: dark) {
  .chart {
    --ink: #e6edf3; --faint: #9198a1; --grid: #3d444d;
    --c0: #6ea8ea; --c1: #e8925f; --c2: #6fbf8f; --c3: #b78fd6; --c4: #d3b054; --c5: #9bb0bb;
  }
}
</style>"""


class Bar(NamedTuple):
    """One row of a bar chart: a value, the ends of its interval if any, the group that picks its colour."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    group: str = ""


def svg_curve(
    series: Mapping[str, Series],
    xlabel: str,
    ylabel: str,
    *,
    log_y: bool = False,
    width: int = 640,
    height: int = 320,
) -> str:
    """Draw one line per series and return the SVG text.

    A series is its y values, or a tuple `(x, y)`; lines break where y is not finite. With `log_y` the y axis
    is logarithmic and values at or below zero break the line too.
    Raises ValueError when x and y differ in length or there is nothing to draw.
    """
    lines = {name: _points(name, values, log_y) for name, values in series.items()}
    drawn = np.concatenate(list(lines.values()) or [np.zeros((0, 2))])
    drawn = drawn[np.isfinite(drawn).all(axis=1)]
    if not len(drawn):
        raise ValueError("series: expected at least one finite point to draw, got none")
    legend, legend_height = _legend(list(lines) if len(lines) > 1 else [], 56, 38, width - 12)
    top, bottom, left, right = 34 + legend_height, height - 44, 56, width - 16
    x_ticks = _ticks(*_range(drawn[:, 0]))
    low, high = _range(drawn[:, 1])
    y_ticks = _log_ticks(low, high) if log_y else _ticks(low, high, outward=True)
    place_x = _scale(*_range(drawn[:, 0]), left, right)
    place_y = _scale(y_ticks[0][0], y_ticks[-1][0], bottom, top)
    parts = [_text(left, 18, ylabel, "start"), legend]
    parts += [_rule("grid", left, place_y(at), right, place_y(at)) for at, _ in y_ticks]
    parts += [_text(left - 8, place_y(at) + 4, label, "end", "faint") for at, label in y_ticks]
    parts += [_rule("axis", place_x(at), bottom, place_x(at), bottom + 4) for at, _ in x_ticks]
    parts += [_text(place_x(at), bottom + 18, label, "middle", "faint") for at, label in x_ticks]
    parts += [_rule("axis", left, bottom, right, bottom)]
    parts += [_text((left + right) / 2, height - 6, xlabel, "middle")]
    for index, points in enumerate(lines.values()):
        parts.append(_line(points, index, place_x, place_y))
    return _svg(width, height, f"{ylabel} over {xlabel}", parts)


def svg_bars(
    rows: Sequence[Bar | tuple[Any, ...]],
    xlabel: str = "",
    *,
    reference: tuple[str, float] | None = None,
    width: int = 640,
) -> str:
    """Draw horizontal bars with interval whiskers and return the SVG text.

    `rows` are `Bar`s or tuples of the same order; `reference` is a named vertical line, ("chance", 0.25).
    Raises ValueError when there are no rows or a value is not finite.
    """
    bars = [row if isinstance(row, Bar) else Bar(*row) for row in rows]
    ends = [end for bar in bars for end in bar[1:4] if end is not None] + (
        [reference[1]] if reference else []
    )
    if not bars or not all(math.isfinite(end) for end in ends):
        raise ValueError(
            f"rows: expected one or more bars with finite values, got {len(bars)} bars and {ends}"
        )
    groups = list(dict.fromkeys(bar.group for bar in bars))
    left = min(0.45 * width, 16 + CHARACTER * max(len(bar.label) for bar in bars))
    values = [_value_text(bar) for bar in bars]
    right = width - 28 - CHARACTER * max(len(value) for value in values)
    legend, top = _legend(groups if len(groups) > 1 else [], left, 16, width - 12)
    top += 30 if reference else 4
    bottom, ticks = top + 26 * len(bars), _ticks(min(0.0, *ends), max(0.0, *ends), outward=True)
    place = _scale(ticks[0][0], ticks[-1][0], left, right)
    parts = [legend, *(_rule("grid", place(at), top, place(at), bottom) for at, _ in ticks)]
    parts += [_text(place(at), bottom + 16, label, "middle", "faint") for at, label in ticks]
    for index, (bar, value) in enumerate(zip(bars, values, strict=True)):
        parts.append(_bar(bar, top + 26 * index, left, place, groups.index(bar.group)))
        parts.append(_text(right + 12, top + 26 * index + 17, value, "start", "faint"))
    parts.append(_rule("axis", place(0.0), top, place(0.0), bottom))
    if reference:
        at = place(reference[1])
        parts.append(_rule("mark", at, top - 4, at, bottom, dashes=True))
        parts.append(_text(at, top - 7, f"{reference[0]} {reference[1]:.3g}", "middle", "faint"))
    parts.append(_text((left + right) / 2, bottom + 34, xlabel, "middle"))
    return _svg(width, round(bottom + (42 if xlabel else 24)), xlabel or "bars", parts)


def _points(name: str, values: Series, log_y: bool) -> np.ndarray:
    """Bring a series to points [N, 2]; the y of a point that cannot be drawn is nan."""
    x, y = values if isinstance(values, tuple) and len(values) == 2 and np.ndim(values[0]) else (None, values)
    y = np.asarray(y, dtype=np.float64)
    x = np.arange(len(y), dtype=np.float64) if x is None else np.asarray(x, dtype=np.float64)
    if x.shape != y.shape or y.ndim != 1:
        raise ValueError(
            f"series[{name!r}]: expected x and y of one length, got shapes {x.shape} and {y.shape}"
        )
    drawable = np.isfinite(x) & np.isfinite(y) & ((y > 0) | (not log_y))
    y = np.where(drawable, y, np.nan)
    return np.stack([x, np.log10(y) if log_y else y], axis=1)


def _range(values: np.ndarray) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    if high - low > 1e-9 * max(abs(low), abs(high)):
        return low, high
    margin = 0.5 * abs(low) or 0.5  # a flat line gets room on both sides
    return low - margin, high + margin


def _ticks(low: float, high: float, count: int = 6, outward: bool = False) -> list[tuple[float, str]]:
    """Return positions and labels at steps of 1, 2 or 5 times a power of ten, about `count` in the range.

    They lie inside the range, or surround it when `outward`.
    """
    raw = (high - low) / count or 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    if outward:
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [(index * step, _tick_text(index * step, decimals)) for index in range(first, last + 1)]


def _tick_text(value: float, decimals: int) -> str:
    return f"{value:.1e}" if decimals > 6 or abs(value) >= 1e9 else f"{value + 0.0:,.{decimals}f}"


def _log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Return ticks on powers of ten that surround the range; `low` and `high` are already logarithms."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    factors = (1, 2, 5) if len(powers) <= 3 else (1,)
    ticks = [
        (power + math.log10(factor), f"{factor * 10.0**power:g}") for power in powers for factor in factors
    ]
    return [tick for tick in ticks if tick[0] <= powers[-1]]


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def _line(points: np.ndarray, index: int, place_x: Callable, place_y: Callable) -> str:
    """Draw one series; each unbroken run is a path, a lone point a dot."""
    colour = f"var(--c{index % COLOURS})"
    breaks = np.flatnonzero(np.isnan(points[:, 1]))
    runs = [run[np.isfinite(run[:, 1])] for run in np.split(points, breaks)]
    parts = []
    for run in (run for run in runs if len(run)):
        places = [f"{place_x(x):.1f},{place_y(y):.1f}" for x, y in run]
        if len(places) == 1:
            x, y = places[0].split(",")
            parts.append(f'<circle cx="{x}" cy="{y}" r="2.5" fill="{colour}"/>')
        else:
            path = " ".join(places)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
    return "".join(parts)


def _bar(bar: Bar, top: float, left: float, place: Callable, colour: int) -> str:
    start, end = sorted((place(0.0), place(bar.value)))
    middle = top + 13
    parts = [
        _text(left - 8, middle + 4, bar.label, "end"),
        f'<rect x="{start:.1f}" y="{top + 5:.1f}" width="{end - start:.1f}" height="16" '
        f'fill="var(--c{colour % COLOURS})"/>',
    ]
    if bar.low is not None and bar.high is not None:
        low, high = place(bar.low), place(bar.high)
        parts += [_rule("mark", low, middle, high, middle)]
        parts += [_rule("mark", at, middle - 4, at, middle + 4) for at in (low, high)]
    return "".join(parts)


def _value_text(bar: Bar) -> str:
    text = f"{bar.value:.3g}"
    return text if bar.low is None or bar.high is None else f"{text} [{bar.low:.3g}, {bar.high:.3g}]"


def _legend(names: Sequence[str], left: float, top: float, right: float) -> tuple[str, float]:
    """Lay names with colour keys into lines between `left` and `right`; return the SVG and its height."""
    parts, x, y = [], left, top
    for index, name in enumerate(names):
        advance = 34 + CHARACTER * len(name)
        if x + advance > right and x > left:
            x, y = left, y + 18
        key = f'x="{x:.1f}" y="{y - 6:.1f}" width="14" height="4" fill="var(--c{index % COLOURS})"'
        parts.append(f"<rect {key}/>{_text(x + 20, y, name, 'start')}")
        x += advance
    return "".join(parts), (y - top + 20 if names else 0)


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    style = f' class="{kind}"' if kind else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{style}>{escape(text)}</text>' if text else ""
    )


def _rule(kind: str, x1: float, y1: float, x2: float, y2: float, dashes: bool = False) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    pattern = ' stroke-dasharray="4 3"' if dashes else ""
    return f'<line class="{kind}" {ends}{pattern}/>'


def _svg(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {width} {height}" '
    head += f'width="{width}" height="{height}" role="img"><title>{escape(title)}</title>'
    return "\n".join([head + _STYLE, *(part for part in parts if part), "</svg>"])
