"""Tables that can be read anywhere: nothing is ever cut off.

On a terminal a table that is too wide goes on in another one below, with the names of its rows again; names that are longer
than the room for them are folded. In a file or a pipe a table is as wide as it has to be.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment
from rich.table import Table as Drawn
from rich.text import Text

from modekit.cli.printing.console import shows_bold, visible

_GAP = 2  # spaces between columns
_NARROW = 12  # names and titles are not folded to less than this
_SPACE = "\ue000"  # which is not cut off at the end of a cell; no text of others has it (`visible`)
OWN = "*"
"""The sign of a cell that is bold where bold can be seen."""


@dataclass(frozen=True)
class Cell:
    """What stands in one place of a table. `own` marks a figure among its neighbours: bold, or by a sign."""

    text: str
    style: str = ""
    own: bool = False


@dataclass(frozen=True)
class TableRow:
    """A name, the cells beside it, and the style of all of them."""

    name: str
    cells: Sequence[Cell]
    style: str


@dataclass
class Table:
    """Rows with a name and cells under titles; lines within a title or cell are parted by newlines (in a file: a slash).

    Attributes:
        first: title of the names.
        titles: of the other columns; a table whose titles are all empty has no header.
        prose: the last column holds sentences, which are wrapped into the room that is left; cells are then flush left.
        name_style: of every row's name.
    """

    first: str
    titles: Sequence[str]
    prose: bool = False
    name_style: str = ""
    rows: list[TableRow] = field(default_factory=list)

    def add(self, name: str, *cells: str | Cell, style: str = "") -> None:
        """Add a row with a cell for every title."""
        if len(cells) != len(self.titles):
            raise ValueError(f"{len(cells)} cells for {len(self.titles)} titles")
        self.rows.append(TableRow(name, [cell if isinstance(cell, Cell) else Cell(cell) for cell in cells], style))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw it, as wide as the console or, where lines are not wrapped, as it needs."""
        lines = not console.soft_wrap
        names = [_said(row.name, lines) for row in self.rows]
        columns = [self._column(place, lines, signs=not shows_bold(console)) for place in range(len(self.titles))]
        titles = [_said(title, lines) for title in self.titles]
        cells = [[text.plain for text in column] for column in columns]
        whole = [_width([*column, title]) for column, title in zip(cells, titles, strict=True)]
        folded = [_width([*column, *_words(title)]) for column, title in zip(cells, titles, strict=True)]
        own = _width([*names, _said(self.first, lines)])
        room = options.max_width if lines else own + sum(width + _GAP for width in whole)
        if own + sum(width + _GAP for width in folded) > room:
            own = min(own, max(_NARROW, room // 3))
        for number, block in enumerate([range(len(columns))] if self.prose else _blocks(folded, room - own)):
            if number:
                yield Segment.line()
            fits = own + sum(whole[place] + _GAP for place in block) <= room
            drawn = Drawn(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), show_header=any(titles))
            drawn.add_column(Text(_said(self.first, lines)), overflow="fold", width=own)
            for place in block:
                width = min(whole[place] if fits else folded[place], room - own - _GAP)
                justify: Literal["left", "right"] = "left" if self.prose else "right"
                sentences = self.prose and place == len(columns) - 1
                drawn.add_column(Text(titles[place]), justify=justify, overflow="fold", width=None if sentences else width)
            for at, row in enumerate(self.rows):
                drawn.add_row(Text(names[at], self.name_style), *(columns[place][at] for place in block), style=row.style)
            yield from _without_ends(console.render_lines(drawn, options.update(width=room, no_wrap=False), pad=False))

    def _column(self, place: int, lines: bool, *, signs: bool) -> list[Text]:
        """The cells of a column; a space where others have the sign, so that figures stay one under the other."""
        cells = [row.cells[place] for row in self.rows]
        marked = signs and any(cell.own for cell in cells)
        found = []
        for cell in cells:
            first, *rest = _said(cell.text, lines).split("\n")
            end = (OWN if cell.own else _SPACE) if marked else ""
            text = "\n".join([first + end, *(line + _SPACE * len(end) for line in rest)])
            found.append(Text(text, f"bold {cell.style}".strip() if cell.own else cell.style))
        return found


def _said(text: str, lines: bool) -> str:
    """A text without what a terminal would obey, in one line where lines are not to be broken."""
    return visible(text) if lines else visible(text).replace("\n", " / ")


def _words(title: str) -> list[str]:
    """A title as far as it cannot be folded."""
    return [word[:_NARROW] for word in title.split()]


def _width(texts: Sequence[str]) -> int:
    """Of the widest line."""
    return max((cell_len(line) for text in texts for line in text.split("\n")), default=0)


def _blocks(widths: Sequence[int], room: int) -> Iterator[range]:
    """Runs of columns that fit beside the names."""
    start = 0
    while start < len(widths):
        stop, taken = start + 1, widths[start] + _GAP
        while stop < len(widths) and taken + widths[stop] + _GAP <= room:
            taken += widths[stop] + _GAP
            stop += 1
        yield range(start, stop)
        start = stop


def _without_ends(lines: Sequence[Sequence[Segment]]) -> Iterator[Segment]:
    """Lines without the spaces at their ends."""
    for line in lines:
        kept = [Segment(part.text.replace(_SPACE, " "), part.style) for part in line]
        while kept and not kept[-1].text.strip():
            kept.pop()
        yield from kept[:-1]
        if kept:
            yield Segment(kept[-1].text.rstrip(), kept[-1].style)
        yield Segment.line()
