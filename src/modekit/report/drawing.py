"""The pictures of a report as SVG: in the page, whose style colours them light or dark, and as files, by colours of their own.

Text of others stands in files only, escaped and cut; in the page it is HTML beside the picture.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

from markupsafe import Markup

from modekit.evaluation.results import Results
from modekit.report.content import Content, LossCurves, gap_of

if TYPE_CHECKING:
    from modekit.report.page import Figures

Points = Sequence[Sequence[float]]
SHOWN_KINDS = {"average": "avg", "oracle": "orc", "mixture": "mix"}
"""Rows of the table whose gaps are drawn, and their colours; 0 is the base and 1 the own expert."""
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 720, 300, 52, 12, 12, 34
_LINE, _NAMES = 18, 180  # of lists: height of a line, room for names
_DASHES = ("", "7 3", "2 3", "10 3 2 3", "14 4", "", "7 3", "2 3")  # of e0 to e7, as page.css has them
_LONGEST_NAME = 24  # characters that a picture has room for
_MOST_ROWS = 64  # of a picture that is still to be read on paper
_NOTHING = 0.02  # of the largest difference: less has no colour


def shade(value: float | None, steps: int = 10) -> str:
    """Class of a share's colour: ten steps of one hue, dark is much."""
    return "" if value is None else f"q{min(steps - 1, max(0, int(value * steps)))}"


def tint(value: float | None, largest: float) -> str:
    """Class of a difference's colour: five steps to each side of nothing."""
    if value is None or largest <= 0:
        return ""
    share = min(1.0, abs(value) / largest)
    return "d0" if share < _NOTHING else f"{'dp' if value > 0 else 'dn'}{math.ceil(share * 5 - 1e-9)}"


@dataclass(frozen=True)
class GapBar:
    """A row's bar, and its figures as HTML."""

    row: str
    kind: str
    bar: Markup
    value: Markup
    error: Markup


def gap_bars(results: Results, figures: Figures) -> list[tuple[str, list[GapBar]]]:
    """Per domain (and the mean) the gap closed of weight average, oracle and mixture."""
    gaps = _gaps(results)
    span, found = _span(gaps), []
    for domain, known in gaps:
        bars = []
        for place, value, error in known:
            row, at = results.rows[place], ("results", "rows", place, *(("mean",) if domain is None else ("domains", domain)))
            shown = Markup("") if error is None else figures.number("error", *at, "gap_error")
            bar = _bar(value, error, span, row.kind)
            bars.append(GapBar(row.name, row.kind, bar, figures.number("gap", *at, "gap_closed"), shown))
        found.append(("mean" if domain is None else domain, bars))
    return found


def _gaps(results: Results) -> list[tuple[str | None, list[tuple[int, float, float | None]]]]:
    """Per domain of which a gap is known, and for their mean (None): place of a row, gap closed, standard error."""
    shown = [(place, row) for place, row in enumerate(results.rows) if row.kind in SHOWN_KINDS]
    found: list[tuple[str | None, list[tuple[int, float, float | None]]]] = []
    for domain in [*results.domains, None]:
        gaps = [(place, *gap_of(results, row, domain)) for place, row in shown]
        known = [(place, value, error) for place, value, error in gaps if value is not None]
        if known and (domain is not None or len(found) > 1):
            found.append((domain, known))
    return found


def _span(gaps: Sequence[tuple[str | None, Sequence[tuple[int, float, float | None]]]]) -> tuple[float, float]:
    """Ends of the scale: 0 and 1 and whatever goes beyond, within reason."""
    ends = [value + sign * (error or 0.0) for _, known in gaps for _, value, error in known for sign in (-1, 1)]
    return max(-2.0, min([0.0, *ends])) - 0.03, min(3.0, max([1.0, *ends])) + 0.03


def _bar(value: float, error: float | None, span: tuple[float, float], kind: str, place: str = "") -> Markup:
    """A bar from 0, its marks at 0 and 1, and a whisker; `place` has its attributes within a larger picture."""
    low, high = span

    def x(at: float) -> str:
        return f"{100 * (min(max(at, low), high) - low) / (high - low):.2f}"

    left, right = sorted((0.0, value))
    line, ink = (f'fill="none" stroke="{_light()[name]}" vector-effect="non-scaling-stroke"' for name in ("mark", "ink"))
    whisker = ""
    if error is not None and error > 0:
        ends = x(value - error), x(value + error)
        whisker = f'<path class="whisker" {ink} d="M{ends[0]} 7H{ends[1]}M{ends[0]} 3.5V10.5M{ends[1]} 3.5V10.5"/>'
    return Markup(
        f'<svg class="bar" {place}viewBox="0 0 100 14" preserveAspectRatio="none" aria-hidden="true" focusable="false">'
        f'<rect class="of-{kind}" fill="{_light()[SHOWN_KINDS[kind]]}" x="{x(left)}" y="2" '
        f'width="{float(x(right)) - float(x(left)):.2f}" height="10"/><path class="mark" {line} d="M{x(0)} 0V14"/>'
        f'<path class="mark one" {line} stroke-dasharray="3 2" d="M{x(1)} 0V14"/>{whisker}</svg>'
    )


def line_chart(lines: Sequence[tuple[str, str, object, Points]], label: str) -> Markup:
    """Curves over steps: (title, class of its look, its place, [step, value] points) each; axes carry round numbers only."""
    return _svg(_WIDTH, _HEIGHT, _curves([(look, points) for _, look, _, points in lines]), label)


def _curves(lines: Sequence[tuple[str, Points]]) -> Iterator[str]:
    points = [point for _, line in lines for point in line]
    if not points:
        return
    at, axes = _axes(points, margin=0, unit=1, letter="")
    yield from axes
    for look, line in lines:
        path = "M" + "L".join("{:.1f} {:.1f}".format(*at(point)) for point in line) if line else ""
        colour, width, dash = _look(look)
        drawn = f'stroke="{colour}" stroke-width="{width}"' + (f' stroke-dasharray="{dash}"' if dash else "")
        yield f'<path class="line {look}" fill="none" {drawn} d="{path}"/>'


def _look(look: str) -> tuple[str, float, str]:
    """Colour, width and dashes of a curve: raw, mean, or e0 to e7 of an expert."""
    if look in ("raw", "mean"):
        return (_light()["mark"], 1, "") if look == "raw" else (_light()["ink"], 2.5, "")
    return _light()[look], 2, _DASHES[int(look[1:])]


def scatter_chart(points: Points, front: Points, label: str) -> Markup:
    """(active parameters, loss) of every variant as dots, and the front among them as a line; axes carry round numbers only."""
    return _svg(_WIDTH, _HEIGHT, _dots(points, front), label)


def _dots(points: Points, front: Points) -> Iterator[str]:
    if not points:
        return
    unit, letter = (1e9, "B") if max(x for x, _ in points) >= 1e9 else (1e6, "M")
    at, axes = _axes(points, margin=0.05, unit=unit, letter=letter)
    yield from axes
    blue, grey = _light()["mix"], _light()["mark"]
    line = "L".join("{:.1f} {:.1f}".format(*at(point)) for point in front)
    yield f'<path class="line front" fill="none" stroke="{blue}" stroke-width="1.5" d="M{line}"/>' if line else ""
    kept = {tuple(point) for point in front}
    for point in sorted(points, key=lambda point: tuple(point) in kept):  # the front last, on top
        x, y = at(point)
        look, colour, radius = ("dot front", blue, 5) if tuple(point) in kept else ("dot", grey, 3.5)
        yield f'<circle class="{look}" fill="{colour}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>'


def _axes(
    points: Points, *, margin: float, unit: float, letter: str
) -> tuple[Callable[[Sequence[float]], tuple[float, float]], list[str]]:
    """Where a point lies in a chart, and its grid and ticks; without a letter the horizontal ones are whole numbers."""
    (left, right), (low, high) = ((min(values), max(values)) for values in zip(*points, strict=True))
    side, pad = margin * ((right - left) or right or 1), (high - low) * 0.06 or abs(high) * 0.01 or 1.0
    left, right, low, high = left - side, max(right + side, left + 1), low - pad, high + pad

    def at(point: Sequence[float]) -> tuple[float, float]:
        x = _LEFT + (point[0] - left) / (right - left) * (_WIDTH - _LEFT - _RIGHT)
        return x, _TOP + (high - point[1]) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    look, parts = f'class="tick" fill="{_light()["soft"]}"', []
    for tick in ticks(low, high):
        y = at((left, tick))[1]
        parts.append(f'<path class="grid" fill="none" stroke="{_light()["line"]}" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text {look} x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:.6g}</text>')
    for tick in ticks(left / unit, right / unit):
        if letter or tick == int(tick):
            x = at((tick * unit, low))[0]
            parts.append(f'<text {look} x="{x:.1f}" y="{_HEIGHT - 14}" text-anchor="middle">{tick:.6g}{letter}</text>')
    return at, parts


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers within a span."""
    raw = (high - low) / about
    size = 10.0 ** math.floor(math.log10(raw))
    step = next((size * factor for factor in (1, 2, 5) if size * factor >= raw), size * 10)
    return [round(step * place, 10) for place in range(math.ceil(low / step), math.floor(high / step) + 1)]


def make_pictures(content: Content) -> dict[str, bytes]:
    """File name -> an SVG for papers, of everything that there is data for and that can be read on paper."""
    search = content.search
    drawn = {
        "gap": _gap_picture(content.results) if content.results is not None else "",
        "training": _curve_picture(content.curves, content.experts) if content.curves is not None else "",
    }
    if search is not None and len(search.points) > 1:
        dots = [*_dots(search.points, search.front)]
        drawn["pareto"] = _captioned(_WIDTH, _HEIGHT, dots, "loss on the select split, nats per token, by active parameters")
    head = '<svg xmlns="http://www.w3.org/2000/svg" '
    return {f"{name}.svg": f"{head}{picture[5:]}\n".encode() for name, picture in drawn.items() if picture}


def _gap_picture(results: Results) -> Markup:
    gaps = _gaps(results)
    if len(gaps) > _MOST_ROWS:
        return Markup("")
    span, parts, y = _span(gaps), list[str](), 4
    for domain, known in gaps:
        parts.append(_text(0, y + 12, "mean" if domain is None else _short(domain), "bold"))
        for place, value, error in known:
            y += _LINE
            row, at = results.rows[place], f'x="{_NAMES}" y="{y}" width="{_WIDTH - _NAMES - 60}" height="14" '
            figure = f"{value:.2f}" + ("" if error is None else f" ±{error:.2f}")
            parts += [_text(8, y + 12, _short(row.name)), _bar(value, error, span, row.kind, at)]
            parts.append(_text(_WIDTH - 56, y + 12, figure))
        y += _LINE + 6
    return _captioned(_WIDTH + 20, y + 8, parts, "gap closed: 0 is the base model, 1 the own expert")


def _curve_picture(curves: LossCurves, experts: Sequence[str]) -> Markup:
    lines = [("training text", "raw", curves.training), ("held-out mean", "mean", curves.mean)]
    for name, points in curves.domains.items():
        place = experts.index(name) if name in experts else 7
        lines.append((f"held-out {_short(name)}", f"e{place % 8}", points))
    if len(lines) > _MOST_ROWS or not any(points for *_, points in lines):
        return Markup("")
    parts = [*_curves([(look, points) for _, look, points in lines])]
    for place, (name, look, _) in enumerate(lines):
        x, y, (colour, width, dash) = _LEFT, _HEIGHT + place * _LINE, _look(look)
        parts.append(
            f'<path stroke="{colour}" stroke-width="{width}" stroke-dasharray="{dash or "none"}" d="M{x} {y}H{x + 40}"/>'
        )
        parts.append(_text(x + 48, y + 4, name))
    return _captioned(_WIDTH, _HEIGHT + len(lines) * _LINE, parts, "loss, nats per token, by step")


def _captioned(width: int, height: int, parts: Sequence[str], caption: str) -> Markup:
    """A picture that says below itself what it shows; nothing for nothing."""
    return _svg(width, height + _LINE, [*parts, _text(0, height + 8, caption)] if parts else parts, caption)


def _text(x: float, y: float, text: str, weight: str = "normal") -> Markup:
    """Text, without what cannot be seen."""
    shown = "".join(character for character in text if character.isprintable())
    return Markup('<text x="{}" y="{}" font-weight="{}" fill="{}">{}</text>').format(x, y, weight, _light()["ink"], shown)


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 9]}...{name[-6:]}"


def _svg(width: int, height: int, parts: Iterator[str] | Sequence[str], label: str) -> Markup:
    """A picture of what is markup already; nothing for nothing."""
    drawn = Markup("".join(parts))
    if not drawn:
        return Markup("")
    return Markup(
        '<svg class="chart" viewBox="0 0 {} {}" font-family="sans-serif" font-size="12" role="img" aria-label="{}">{}</svg>'
    ).format(width, height, label, drawn)


@cache
def _light() -> dict[str, str]:
    """The page's light colours by name."""
    style = files("modekit.report").joinpath("page.css").read_text(encoding="utf-8")
    return dict(re.findall(r"--(\w+):(#[0-9a-f]+)", style.partition("@media")[0]))
