"""Charts as inline SVG: dots with intervals, points, curves. Colours are the page's; marks also differ in shape."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from . import words

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
    ends = {k: found["mean"] if found[k] is None else found[k] for k in ("mean", "low", "high")}
    x, low, high = (left + PANEL * min(1.0, max(0.0, end)) for end in ends.values())
    y += OFFSETS.get(protocol, 0)
    said = f"{what}: {found['mean']:.3f} ({words.spread(found)}), n={found['n']}"
    whisker = f'<line class="whisker" x1="{low:.1f}" y1="{y}" x2="{high:.1f}" y2="{y}"/>'
    return f'<g class="{protocol}"><title>{escape(said)}</title>{whisker}{mark(protocol, x, y)}</g>'


def mark(protocol: str, x: float, y: float) -> str:
    """The shape that stands for a protocol: a ring, a triangle, a square."""
    if protocol == "forced":
        return f'<circle class="mark hollow" cx="{x:.1f}" cy="{y}" r="4.2"/>'
    if protocol == "compare":
        return f'<path class="mark" d="M{x:.1f} {y - 5}l5 9h-10z"/>'
    return f'<rect class="mark" x="{x - 4:.1f}" y="{y - 4}" width="8" height="8"/>'


def scatter(
    title: str, across: str, up: str, points: Sequence[tuple[str, float, float]], width: int = 372, height: int = 346
) -> str:
    """Named points (x, y) of two shares; the names stand at the right in the order of their points."""
    left, right, top, bottom = 40, 120, 46, 40

    def at(x: float, y: float) -> tuple[float, float]:
        return left + (width - left - right) * x, height - bottom - (height - top - bottom) * y

    parts = [_text(0, 14, escape(title), "strong")]
    for share in (0, 0.25, 0.5, 0.75, 1):
        (x, low), (far, y) = at(share, 0), at(1, share)
        parts.append(f'<path class="grid" d="M{left} {y:.1f}H{far:.1f}M{x:.1f} {top}V{low:.1f}"/>')
        parts.append(_text(left - 8, y + 4, f"{share:g}", "tick end") + _text(x, low + 16, f"{share:g}", "tick middle"))
    parts.append(
        _text(left, height - 4, f"{escape(across)} →", "tick") + _text(left, top - 4, f"↑ {escape(up)}", "tick")
    )
    ordered = sorted(points, key=lambda p: (-p[2], -p[1]))
    labels = _apart([at(x, y)[1] for _, x, y in ordered], height - 8)
    for i, ((name, x, y), label) in enumerate(zip(ordered, labels, strict=True)):
        (h, v), end = at(x, y), width - right + 14
        said = escape(f"{name}: {across} {x:.3f}, {up} {y:.3f}")
        parts.append(
            f'<g class="line c{i % 8}"><title>{said}</title>'
            f'<path class="leader" d="M{h:.1f} {v:.1f}L{end} {label:.1f}"/>'
            f'<circle cx="{h:.1f}" cy="{v:.1f}" r="4"/>{_text(end + 4, label + 4, escape(name), "name")}</g>'
        )
    return _svg(width, height, f"{title}: {up} against {across}", parts)


def curves(title: str, protocol: str, lines: Sequence[Line], width: int = 372, height: int = 200) -> str:
    """Shares over a count that grows by factors, with the interval as a band."""
    left, right, top, bottom = 40, 110, 30, 36
    last = max(x for line in lines for x, *_ in line.points)
    first = min(x for line in lines for x, *_ in line.points)
    span = math.log(last / first) or 1.0

    def at(x: float, y: float) -> tuple[float, float]:
        across = (width - left - right) * math.log(x / first) / span
        return left + across, height - bottom - (height - top - bottom) * min(1.0, max(0.0, y))

    head = f'{escape(title)} <tspan class="{protocol}">{protocol}</tspan>'
    parts = [_text(0, 14, head, "strong")]
    for share in (0, 0.5, 1):
        _, y = at(first, share)
        parts.append(f'<line class="grid" x1="{left}" y1="{y:.1f}" x2="{width - right}" y2="{y:.1f}"/>')
        parts.append(_text(left - 8, y + 4, f"{share:g}", "tick end"))
    for x in dict.fromkeys(x for line in lines for x, *_ in line.points):
        parts.append(_text(at(x, 0)[0], height - bottom + 18, f"{x:g}", "tick middle"))
    parts.append(_text(left, height - 2, "edits made", "tick"))
    names = _apart([at(*line.points[-1][:2])[1] for line in lines], height - 10)
    for i, (line, label) in enumerate(zip(lines, names, strict=True)):
        points = [at(x, mean) for x, mean, _, _ in line.points]
        band = [at(x, high) for x, _, _, high in line.points] + [at(x, low) for x, _, low, _ in reversed(line.points)]
        said = ", ".join(f"{x:g}: {mean:.3f}" for x, mean, _, _ in line.points)
        dash = f' stroke-dasharray="{("none", "7 3", "2 3")[i % 3]}"'
        parts.append(
            f'<g class="line c{i % 8}"><title>{escape(f"{title}, {line.name}: {said}")}</title>'
            f'<polygon class="band" points="{_points(band)}"/><polyline points="{_points(points)}"{dash}/>'
            + "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in points)
            + _text(width - right + 8, label + 4, escape(line.name), "name")
            + "</g>"
        )
    return _svg(width, height, f"{title}, {protocol}", parts)


def _apart(heights: Sequence[float], lowest: float, least: float = 14) -> list[float]:
    """Heights of labels near these, none on another and none below the lowest."""
    out, last = list(heights), -math.inf
    order = sorted(range(len(heights)), key=heights.__getitem__)
    for i in order:
        out[i] = last = max(heights[i], last + least)
    last = lowest
    for i in reversed(order):
        out[i] = min(out[i], last)
        last = out[i] - least
    return out


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
