"""Charts as inline SVG: dots with intervals, curves, bars. Colours are the page's; marks also differ in shape."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

ROW, GAP = 34, 14
"""Height of a row of dots, and the space between runs of different methods."""
LABEL, PANEL, SPACE = 190, 210, 40
"""Widths: of the names at the left, of a metric's panel, between panels."""
OFFSETS = {"forced": -9, "compare": 0, "generated": 9}


@dataclass(frozen=True)
class Line:
    """One line of a chart of curves: points (x, mean, low, high)."""

    name: str
    points: Sequence[tuple[float, float, float, float]]


def dots(runs: Sequence[tuple[str, str, Mapping[str, Any]]], metrics: Sequence[str]) -> str:
    """Every metric of every run, a mark for each protocol with its interval.

    Args:
        runs: method, regime and summary.
        metrics: a panel for each.
    """
    places, height = _rows([method for method, _, _ in runs])
    width = LABEL + len(metrics) * (PANEL + SPACE)
    parts = []
    for i, (metric, left) in enumerate(zip(metrics, range(LABEL, width, PANEL + SPACE), strict=False)):
        parts.append(_scale(left, height, metric, first=i == 0))
        for (method, regime, summary), y in zip(runs, places, strict=True):
            for protocol, found in summary.get(metric, {}).items():
                if protocol not in OFFSETS:
                    continue
                parts.append(_dot(left, y, protocol, found, f"{method}, {regime}: {metric}, {protocol}"))
    previous, names = "", []
    for (method, regime, _), y in zip(runs, places, strict=True):
        name = f'<tspan class="strong">{escape(method)}</tspan>' if method != previous else ""
        names.append(f'<line class="guide" x1="{LABEL}" y1="{y}" x2="{width - SPACE}" y2="{y}"/>')
        names.append(_text(0, y + 4, name) + _text(LABEL - 16, y + 4, escape(regime), "label end"))
        previous = method
    return _svg(width, height + 8, "Means with intervals, by method, regime, metric and protocol", [*names, *parts])


def _rows(methods: Sequence[str]) -> tuple[list[int], int]:
    """The middle of each row, and the height of all."""
    y, places = 40, []
    for i, method in enumerate(methods):
        y += GAP if i and method != methods[i - 1] else 0
        places.append(y + ROW // 2)
        y += ROW
    return places, y + 6


def _scale(left: int, height: int, metric: str, first: bool) -> str:
    lines = [_text(left, 14, escape(metric), "strong")]
    for share in (0, 0.5, 1):
        x = left + share * PANEL
        lines.append(f'<line class="grid" x1="{x}" y1="36" x2="{x}" y2="{height}"/>')
        lines.append(_text(x, 30, f"{share:g}", "tick middle"))
    return "".join(lines)


def _dot(left: int, y: int, protocol: str, found: Mapping[str, Any], what: str) -> str:
    if found["mean"] is None:
        return ""
    x, low, high = (left + PANEL * min(1.0, max(0.0, found[k])) for k in ("mean", "low", "high"))
    y += OFFSETS.get(protocol, 0)
    said = f"{what}: {found['mean']:.3f} ({found['low']:.3f} to {found['high']:.3f}), n={found['n']}"
    whisker = f'<line class="whisker" x1="{low:.1f}" y1="{y}" x2="{high:.1f}" y2="{y}"/>'
    return f'<g class="{protocol}"><title>{escape(said)}</title>{whisker}{mark(protocol, x, y)}</g>'


def mark(protocol: str, x: float, y: float) -> str:
    """The shape that stands for a protocol: a ring, a triangle, a square."""
    if protocol == "forced":
        return f'<circle class="mark hollow" cx="{x:.1f}" cy="{y}" r="4.2"/>'
    if protocol == "compare":
        return f'<path class="mark" d="M{x:.1f} {y - 5}l5 9h-10z"/>'
    return f'<rect class="mark" x="{x - 4:.1f}" y="{y - 4}" width="8" height="8"/>'


def curves(title: str, lines: Sequence[Line], width: int = 372, height: int = 250) -> str:
    """Shares over a count that grows by factors, with the interval as a band."""
    left, right, top, bottom = 40, 110, 34, 36
    last = max(x for line in lines for x, *_ in line.points)
    first = min(x for line in lines for x, *_ in line.points)
    span = math.log(last / first) or 1.0

    def at(x: float, y: float) -> tuple[float, float]:
        across = (width - left - right) * math.log(x / first) / span
        return left + across, height - bottom - (height - top - bottom) * min(1.0, max(0.0, y))

    parts = [_text(0, 14, escape(title), "strong")]
    for share in (0, 0.25, 0.5, 0.75, 1):
        _, y = at(first, share)
        parts.append(f'<line class="grid" x1="{left}" y1="{y:.1f}" x2="{width - right}" y2="{y:.1f}"/>')
        parts.append(_text(left - 8, y + 4, f"{share:g}", "tick end"))
    for x in dict.fromkeys(x for line in lines for x, *_ in line.points):
        parts.append(_text(at(x, 0)[0], height - bottom + 18, f"{x:g}", "tick middle"))
    parts.append(_text(left, height - 4, "edits made", "tick"))
    names = _apart([at(*line.points[-1][:2])[1] for line in lines])
    for i, (line, label) in enumerate(zip(lines, names, strict=True)):
        points = [at(x, mean) for x, mean, _, _ in line.points]
        band = [at(x, high) for x, _, _, high in line.points] + [at(x, low) for x, _, low, _ in reversed(line.points)]
        said = ", ".join(f"{x:g}: {mean:.3f}" for x, mean, _, _ in line.points)
        dash = f' stroke-dasharray="{("none", "7 3", "2 3", "9 3 2 3")[i // 8 % 4]}"'
        parts.append(
            f'<g class="line c{i % 8}"><title>{escape(f"{line.name}: {said}")}</title>'
            f'<polygon class="band" points="{_points(band)}"/><polyline points="{_points(points)}"{dash}/>'
            + "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in points)
            + _text(width - right + 8, label + 4, escape(line.name), "name")
            + "</g>"
        )
    return _svg(width, height, title, parts)


def _apart(heights: Sequence[float], least: float = 14) -> list[float]:
    """Heights of labels near these, none on another."""
    out, lowest = list(heights), -math.inf
    for i in sorted(range(len(heights)), key=heights.__getitem__):
        out[i] = lowest = max(heights[i], lowest + least)
    over = max(0.0, max(out, default=0.0) - 226)
    return [y - over for y in out]


def bars(title: str, values: Sequence[tuple[str, float | None, str]], width: int = 372) -> str:
    """A bar for each name, with its value in words; None is not known."""
    most = max((v for _, v, _ in values if v), default=1.0)
    left, right, row = 140, 92, 24
    parts = [_text(0, 14, escape(title), "strong")]
    for i, (name, value, said) in enumerate(values):
        y = 30 + i * row
        parts.append(_text(left - 10, y + 12, escape(name), "label end"))
        length = (width - left - right) * (value or 0) / most
        parts.append(f'<rect class="bar" x="{left}" y="{y}" width="{max(length, 1):.1f}" height="15" rx="2"/>')
        parts.append(_text(left + length + 6, y + 12, escape(said), "tick"))
    return _svg(width, 36 + len(values) * row, title, parts)


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _text(x: float, y: float, inside: str, kind: str = "label") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{inside}</text>' if inside else ""


def _svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    inside = "".join(parts)
    return (
        f'<svg role="img" aria-label="{escape(title)}" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}">{inside}</svg>'
    )
