"""The page's own pictures, as SVG without any text of others. Bars go beside HTML text; curves carry their axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

if TYPE_CHECKING:
    from modekit.report.page import Figures

SHOWN_KINDS = ("average", "oracle", "mixture")
"""Rows of the table whose gaps are drawn; 0 is the base and 1 the own expert."""
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 720, 300, 52, 12, 12, 34


def gap_bars(results: dict[str, Any], figures: Figures, *prefix: str | int) -> list[dict[str, Any]]:
    """Per domain (and the mean) the gap closed of weight average, oracle and mixture: {name, bars: [{row, kind, bar, ...}]}."""
    at = prefix or ("results",)
    shown = [(place, row) for place, row in enumerate(results["rows"]) if row["kind"] in SHOWN_KINDS]
    groups: list[tuple[str, tuple[str, ...]]] = [(name, ("domains", name)) for name in results["domains"]]
    groups = [(name, path) for name, path in groups if any(_at(row, path, "gap_closed") is not None for _, row in shown)]
    if len(groups) > 1:
        groups.append(("mean", ("mean",)))
    low, high = _span([row for _, row in shown], [path for _, path in groups])
    drawn = []
    for name, path in groups:
        bars = []
        for place, row in shown:
            value, error = _at(row, path, "gap_closed"), _at(row, path, "gap_error")
            if value is not None:
                where = (*at, "rows", place, *path)
                bars.append(
                    {
                        "row": row["name"],
                        "kind": row["kind"],
                        "bar": _bar(value, error, low, high, row["kind"]),
                        "value": figures.number("gap", *where, "gap_closed"),
                        "error": figures.number("error", *where, "gap_error") if error is not None else "",
                    }
                )
        drawn.append({"name": name, "bars": bars})
    return drawn


def _at(row: dict[str, Any], path: Sequence[str], key: str) -> float | None:
    for part in path:
        row = row.get(part) or {}
    value: float | None = row.get(key)
    return value


def _span(rows: Sequence[dict[str, Any]], paths: Sequence[Sequence[str]]) -> tuple[float, float]:
    """Ends of the scale: 0 and 1 and whatever goes beyond, within reason."""
    ends = [0.0, 1.0]
    for row in rows:
        for path in paths:
            value, error = _at(row, path, "gap_closed"), _at(row, path, "gap_error") or 0.0
            if value is not None:
                ends += [value - error, value + error]
    return max(-2.0, min(ends)) - 0.03, min(3.0, max(ends)) + 0.03


def _bar(value: float, error: float | None, low: float, high: float, kind: str) -> Markup:
    def x(at: float) -> str:
        return f"{100 * (min(max(at, low), high) - low) / (high - low):.2f}"

    left, right = sorted((0.0, value))
    width = f"{float(x(right)) - float(x(left)):.2f}"
    whisker = ""
    if error is not None and error > 0:
        whisker = (
            f'<path class="whisker" d="M{x(value - error)} 7H{x(value + error)}M{x(value - error)} 3.5V10.5'
            f'M{x(value + error)} 3.5V10.5"/>'
        )
    return Markup(
        '<svg class="bar" viewBox="0 0 100 14" preserveAspectRatio="none" aria-hidden="true" focusable="false">'
        f'<rect class="of-{kind}" x="{x(left)}" y="2" width="{width}" height="10"/>'
        f'<path class="mark" d="M{x(0)} 0V14"/><path class="mark one" d="M{x(1)} 0V14"/>{whisker}</svg>'
    )


def line_chart(lines: Sequence[tuple[str, str, Any, Sequence[Sequence[float]]]], label: str) -> Markup:
    """Curves over steps: (title, class of its look, its place, [step, value] points) each; axes carry round numbers only."""
    points = [point for *_, line in lines for point in line]
    if not points:
        return Markup("")
    first, last = min(step for step, _ in points), max(step for step, _ in points)
    low, high = min(value for _, value in points), max(value for _, value in points)
    pad = (high - low) * 0.05 or abs(high) * 0.01 or 1.0
    low, high, last = low - pad, high + pad, max(last, first + 1)

    def x(step: float) -> float:
        return _LEFT + (step - first) / (last - first) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _TOP + (high - value) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for tick in ticks(low, high):
        parts.append(f'<path class="grid" d="M{_LEFT} {y(tick):.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.6g}</text>')
    for tick in ticks(first, last):
        if tick == int(tick):
            parts.append(f'<text class="tick" x="{x(tick):.1f}" y="{_HEIGHT - 14}" text-anchor="middle">{int(tick)}</text>')
    for _, look, _, line in lines:
        path = "M" + "L".join(f"{x(step):.1f} {y(value):.1f}" for step, value in line) if line else ""
        parts.append(f'<path class="line {look}" d="{path}"/>')
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        _WIDTH, _HEIGHT, label, Markup("".join(parts))
    )


def scatter_chart(points: Sequence[Sequence[float]], front: Sequence[Sequence[float]], label: str) -> Markup:
    """(active parameters, loss) of every variant as dots, and the front among them as a line; axes carry round numbers only."""
    if not points:
        return Markup("")
    (left, right), (low, high) = ((min(values), max(values)) for values in zip(*points, strict=True))
    pad, margin = (high - low) * 0.08 or abs(high) * 0.01 or 1.0, (right - left) * 0.05 or right * 0.05 or 1.0
    left, right, low, high = left - margin, right + margin, low - pad, high + pad

    def at(point: Sequence[float]) -> tuple[float, float]:
        x = _LEFT + (point[0] - left) / (right - left) * (_WIDTH - _LEFT - _RIGHT)
        return x, _TOP + (high - point[1]) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for tick in ticks(low, high):
        y = at((left, tick))[1]
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:.6g}</text>')
    unit, letter = (1e9, "B") if right >= 1e9 else (1e6, "M")
    for tick in ticks(left / unit, right / unit):
        x = at((tick * unit, low))[0]
        parts.append(f'<text class="tick" x="{x:.1f}" y="{_HEIGHT - 14}" text-anchor="middle">{tick:.6g}{letter}</text>')
    line = "L".join(f"{x:.1f} {y:.1f}" for x, y in map(at, front))
    parts.append(f'<path class="line front" d="M{line}"/>' if line else "")
    kept = {tuple(point) for point in front}
    for point in sorted(points, key=lambda point: tuple(point) in kept):  # the front last, on top
        x, y = at(point)
        look, radius = ("dot front", 5) if tuple(point) in kept else ("dot", 3.5)
        parts.append(f'<circle class="{look}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>')
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        _WIDTH, _HEIGHT, label, Markup("".join(parts))
    )


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers within a span."""
    raw = (high - low) / about
    size = 10.0 ** math.floor(math.log10(raw))
    step = next((size * factor for factor in (1, 2, 5) if size * factor >= raw), size * 10)
    return [round(step * place, 10) for place in range(math.ceil(low / step), math.floor(high / step) + 1)]
