"""The charts of a report as SVG, coloured by the page's style. They are as wide as the page, from a phone's on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from modekit.evaluation.results import Kind, Results, Row

Points = Sequence[tuple[float, float]]
_SHOWN: tuple[Kind, ...] = ("average", "oracle", "mixture")
"""Rows of the table whose gaps are drawn; 0 is the base and 1 the own expert."""
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 400, 240, 52, 8, 8, 40
_LINE, _NAMES, _FIGURES = 17, 104, 84  # of bars: height of a line, room for names and for figures
_NOTHING = 0.02  # of the largest difference: less has no colour
_LONGEST = 17  # characters of a name that a picture has room for


@dataclass(frozen=True)
class Line:
    """A curve over steps. `look`: its class: raw, mean, or e0 to e7 of an expert."""

    title: str
    look: str
    points: Points


def shade(value: float | None, steps: int = 10) -> str:
    """Class of a share's colour: ten steps of one hue, dark is much."""
    return "" if value is None else f"q{min(steps - 1, max(0, int(value * steps)))}"


def tint(value: float | None) -> str:
    """Class of a difference's colour, from -1 to 1: five steps to each side of nothing."""
    if value is None:
        return ""
    return "d0" if abs(value) < _NOTHING else f"{'dp' if value > 0 else 'dn'}{math.ceil(min(1.0, abs(value)) * 5 - 1e-9)}"


def gap_chart(results: Results) -> Markup:
    """Per domain of which a gap is known, and for their mean: bars of weight average, oracle and mixture."""
    groups: list[tuple[str, list[tuple[Row, float, float | None]]]] = []
    for name in results.domains:
        scores = [(row, row.scores[name]) for row in results.rows if row.kind in _SHOWN and name in row.scores]
        known = [(row, score.gap_closed, score.gap_error) for row, score in scores if score.gap_closed is not None]
        groups += [(name, known)] if known else []
    if len(groups) > 1:
        means = [(row, row.mean_gap(results.domains)) for row in results.rows if row.kind in _SHOWN]
        of_mean = [(row, mean, row.mean_gap_error(results.domains)) for row, mean in means if mean is not None]
        groups.append(("mean", of_mean))
    ends = [value + sign * (error or 0.0) for _, known in groups for _, value, error in known for sign in (-1, 1)]
    low, high = max(-2.0, min([0.0, *ends])) - 0.03, min(3.0, max([1.0, *ends])) + 0.03
    parts, y = list[str](), 0
    for name, known in groups:
        parts.append(_text(0, y + 12, _short(name), "strong"))
        for row, value, error in known:
            y += _LINE
            said = f"{value:.2f}" + ("" if error is None else f" ±{error:.2f}")
            parts += [_text(8, y + 12, _short(row.name)), _text(_WIDTH - _FIGURES + 6, y + 12, said)]
            parts += _bar(y, value, error or 0.0, row.kind, (low, high))
        y += _LINE + 5
    return (
        _svg(y, parts, "Gap closed per domain, with standard errors; the table below has the figures") if parts else Markup("")
    )


def _bar(y: int, value: float, error: float, kind: str, span: tuple[float, float]) -> Iterator[str]:
    """A bar from 0, its marks at 0 and 1, and a whisker."""
    low, high = span

    def x(at: float) -> float:
        return _NAMES + (min(max(at, low), high) - low) / (high - low) * (_WIDTH - _NAMES - _FIGURES)

    left, right = sorted((x(0.0), x(value)))
    yield f'<rect class="of-{kind}" x="{left:.1f}" y="{y + 3}" width="{right - left:.1f}" height="10"/>'
    yield f'<path class="mark" d="M{x(0):.1f} {y}v16"/><path class="mark one" d="M{x(1):.1f} {y}v16"/>'
    if error > 0:
        yield f'<path class="whisker" d="M{x(value - error):.1f} {y + 5}v6m0 -3H{x(value + error):.1f}m0 -3v6"/>'


def line_chart(lines: Sequence[Line], title: str, across: str, up: str) -> Markup:
    """Curves, with titles of both axes, and a legend above."""
    points = [point for line in lines for point in line.points]
    if not points:
        return Markup("")
    at, parts = _axes(points)
    for line in lines:
        path = "L".join("{:.1f} {:.1f}".format(*at(point)) for point in line.points)
        parts.append(f'<path class="line {line.look}" d="M{path}"/>' if path else "")
    parts.append(_text((_LEFT + _WIDTH) // 2, _HEIGHT - 6, across, "axis"))
    middle = (_HEIGHT - _BOTTOM) // 2
    parts.append(f'<g transform="rotate(-90 10 {middle})">{_text(10, middle, up, "axis")}</g>')
    chip = Markup('<li><span class="chip {}">{}</span> {:.3f} to {:.3f}</li>')
    key = [chip.format(line.look, line.title, line.points[0][1], line.points[-1][1]) for line in lines if line.points]
    return Markup('<ul class="key" aria-label="Lines">{}</ul>').format(Markup("").join(key)) + _svg(_HEIGHT, parts, title)


def _axes(points: Points) -> tuple[Callable[[tuple[float, float]], tuple[float, float]], list[str]]:
    """Where a point lies in a chart, and its grid and ticks; horizontal ones are whole numbers."""
    (left, right), (low, high) = ((min(values), max(values)) for values in zip(*points, strict=True))
    pad = (high - low) * 0.06 or abs(high) * 0.01 or 1.0
    right, low, high = max(right, left + 1), low - pad, high + pad

    def at(point: tuple[float, float]) -> tuple[float, float]:
        x = _LEFT + (point[0] - left) / (right - left) * (_WIDTH - _LEFT - _RIGHT)
        return x, _TOP + (high - point[1]) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for tick in ticks(low, high):
        y = at((left, tick))[1]
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(_text(_LEFT - 5, y + 4, f"{tick:.6g}", "tick end"))
    for tick in ticks(left, right):
        if tick == int(tick):
            parts.append(_text(at((tick, low))[0], _HEIGHT - 24, f"{tick:.6g}", "tick"))
    return at, parts


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers within a span."""
    raw = (high - low) / about
    size = 10.0 ** math.floor(math.log10(raw))
    step = next((size * factor for factor in (1, 2, 5) if size * factor >= raw), size * 10)
    return [round(step * place, 10) for place in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _text(x: float, y: float, text: str, look: str = "") -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}">{}</text>').format(look, x, y, text)


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 7]}…{name[-6:]}"


def _svg(height: int, parts: Iterable[str], label: str) -> Markup:
    """A picture of what is markup already."""
    head = f'<svg class="chart" viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(label)}">'
    return Markup(head + "".join(parts) + "</svg>")
