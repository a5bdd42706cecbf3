"""The chart of a report as SVG, coloured by the page's style. It is as wide as the page, from a phone's on."""

from __future__ import annotations

import math
from collections.abc import Iterator

from markupsafe import Markup

from modekit.evaluation.results import Kind, Results, Row

_SHOWN: tuple[Kind, ...] = ("average", "oracle", "mixture")
"""Rows of the table whose gaps are drawn; 0 is the base and 1 the own expert."""
_WIDTH = 400
_LINE, _NAMES, _FIGURES = 17, 104, 84  # of bars: height of a line, room for names and for figures
_NOTHING = 0.02  # of the largest difference: less has no colour
_LONGEST = 17  # characters of a name that a picture has room for


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
    said = "Gap closed per domain, with standard errors; the table below has the figures"
    head = f'<svg class="chart" viewBox="0 0 {_WIDTH} {y}" role="img" aria-label="{said}">'
    return Markup(head + "".join(parts) + "</svg>") if parts else Markup("")


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


def _text(x: float, y: float, text: str, look: str = "") -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}">{}</text>').format(look, x, y, text)


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 7]}…{name[-6:]}"
