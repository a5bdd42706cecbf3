"""Gap closed against active parameters and against bytes, side by side, as an SVG with numbers that a list explains."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from peers.measured import BASE, measured
from peers.row import Row
from pictures import BLUE, INK, LINE, SOFT, Drawing

_LEFT, _TOP, _WIDTH, _HEIGHT, _NEXT, _STEP, _LIST = 60, 60, 330, 560, 420, 15, 880
_LOWEST = -0.25
"""Gaps below are drawn there."""
COLOURS = {"modekit": BLUE, "bound": INK}
OTHERS = "#c95700"


@dataclass(frozen=True)
class Point:
    """A way to put experts together; active parameters and bytes over the base's."""

    name: str
    gap: float
    active: float
    stored: float
    colour: str


def points(rows: Iterable[Row], kind: str) -> list[Point]:
    """The best first."""
    peers = measured(rows, kind)
    found = []
    for name, each in peers.items():
        row, base = each.first, peers[BASE].first
        of = next((word for word in COLOURS if name.startswith(word) or row.source.startswith(word)), "")
        colour, gap = COLOURS.get(of, OTHERS), statistics.fmean(each.gaps())
        found.append(Point(name, gap, row.active / base.active, row.nbytes / base.nbytes, colour))
    return sorted(found, key=lambda point: -point.gap)


def picture(rows: Iterable[Row], kind: str) -> str:
    """Two panels and the list."""
    found = points(rows, kind)
    height = max(_TOP + _HEIGHT + 60, _TOP + _STEP * len(found) + 30)
    drawing = Drawing(1_190, height, f"Gap closed against active parameters and bytes, experts: {kind}.")
    drawing.text(20, 30, f"Experts: {kind}. Blue: modekit; black: bounds.", anchor="start", look='font-weight="600"')
    _panel(drawing, _LEFT, "active parameters over the base's", [(each.active, each) for each in found])
    _panel(drawing, _LEFT + _NEXT, "bytes over the base's", [(each.stored, each) for each in found])
    for place, point in enumerate(found):
        y = _TOP + _STEP * place
        drawing.text(_LIST, y, f"{place + 1}", point.colour, "end", 'font-size="12" font-weight="600"')
        drawing.text(_LIST + 8, y, f"{point.gap:.2f} {point.name}", INK, "start", 'font-size="12"')
    return drawing.svg()


def _panel(drawing: Drawing, left: float, title: str, found: list[tuple[float, Point]]) -> None:
    most = max(value for value, _ in found)
    steps = max(math.log2(most), 1)
    for gap in (_LOWEST, 0, 0.25, 0.5, 0.75, 1):
        y = _y(gap)
        drawing.line(f"M{left} {y:g}H{left + _WIDTH}", LINE, 1, "")
        drawing.text(left - 8, y + 4, f"{gap:g}", SOFT, "end", 'font-size="12"')
    for power in range(int(steps) + 1):
        drawing.text(left + _WIDTH * power / steps, _TOP + _HEIGHT + 20, f"{2**power}", SOFT, look='font-size="12"')
    drawing.text(left + _WIDTH / 2, _TOP + _HEIGHT + 42, title, SOFT, look='font-size="13"')
    taken: list[tuple[float, float]] = []
    for place, (value, point) in enumerate(found):
        x, y = left + _WIDTH * max(math.log2(value), 0) / steps, _y(point.gap)
        drawing.box(x - 2, y - 2, 4, 4, point.colour)
        at = x + 11
        while any(abs(at - other) < 16 and abs(y - height) < 9 for other, height in taken):
            at += 16
        taken.append((at, y))
        drawing.text(at, y + 4, f"{place + 1}", point.colour, look='font-size="11"')


def _y(gap: float) -> float:
    return _TOP + _HEIGHT * (1.05 - max(gap, _LOWEST)) / (1.05 - _LOWEST)
