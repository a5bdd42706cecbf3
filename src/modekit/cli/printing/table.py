"""Tables that can be read anywhere: nothing is ever cut off.

On a terminal a table that is too wide goes on in another one below, with the names of its rows again; names that are longer
than the room for them are folded. In a file or a pipe a table is as wide as it has to be.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment

from modekit.cli.printing.console import shows_bold, visible

_GAP = 2  # spaces between columns
_NARROW = 12  # a title is not folded to less than this
_PROSE = 24  # nor sentences in the last column
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
        signs, lines = not shows_bold(console), not console.soft_wrap
        columns = [
            _Column(title, [row.cells[place] for row in self.rows], signs=signs, flush_right=not self.prose, lines=lines)
            for place, title in enumerate(self.titles)
        ]
        named = [Cell(row.name, self.name_style) for row in self.rows]
        names = _Column(self.first, named, signs=False, flush_right=False, lines=lines)
        if lines:
            self._fit(names, columns, options.max_width)
        for number, block in enumerate(_blocks(names, columns, options.max_width if lines else None)):
            if number:
                yield Segment.line()
            yield from self._draw(console, [names, *block])

    def _fit(self, names: _Column, columns: Sequence[_Column], width: int) -> None:
        """Fold what is too long for a terminal of that width."""
        if not columns or names.width + sum(column.width + _GAP for column in columns) <= width:
            return
        if self.prose:
            *before, last = columns
            names.fold(max(width // 2, width - _GAP - _PROSE - sum(column.width + _GAP for column in before)))
            taken = names.width + sum(column.width + _GAP for column in before)
            last.fold(max(_PROSE, width - taken - _GAP))
        for column in columns:
            column.fold_title(max(_NARROW, column.width_of_cells))
        # Long names are folded, so that several columns stand side by side.
        names.fold(max(_NARROW, width // 3))
        for column in columns:
            column.fold(max(1, width - names.width - _GAP))

    def _draw(self, console: Console, columns: Sequence[_Column]) -> Iterator[Segment]:
        if any(any(column.title) for column in columns):
            yield from _lines(console, [(column, column.title, "") for column in columns], "bold")
        for place, row in enumerate(self.rows):
            yield from _lines(console, [(column, *column.cell(place)) for column in columns], row.style)


class _Column:
    """The lines of a title and of the cells under it, and the room they take; without `lines` each is a single one."""

    def __init__(self, title: str, cells: Sequence[Cell], *, signs: bool, flush_right: bool, lines: bool) -> None:
        self.title = _lines_of(title) if lines else [" ".join(_lines_of(title))]
        self.flush_right = flush_right
        self._styles = [f"bold {cell.style}".strip() if cell.own else cell.style for cell in cells]
        marked = signs and any(cell.own for cell in cells)
        # A space where others have the sign, so that figures stay one under the other.
        ends = [(OWN if cell.own else " ") if marked else "" for cell in cells]
        self._cells = [_marked(_lines_of(cell.text), end, lines) for cell, end in zip(cells, ends, strict=True)]

    @property
    def width_of_cells(self) -> int:
        """Of the widest line under the title."""
        return max((cell_len(line) for lines in self._cells for line in lines), default=0)

    @property
    def width(self) -> int:
        """Of the widest line."""
        return max(self.width_of_cells, *map(cell_len, self.title))

    def cell(self, row: int) -> tuple[list[str], str]:
        """The lines of a cell and its style."""
        return self._cells[row], self._styles[row]

    def fold_title(self, width: int) -> None:
        """Fold the title into lines of at most `width`."""
        self.title = _folded(self.title, width)

    def fold(self, width: int) -> None:
        """Fold title and cells into lines of at most `width`."""
        self.fold_title(width)
        self._cells = [_folded(lines, width) for lines in self._cells]


def _blocks(names: _Column, columns: Sequence[_Column], width: int | None) -> Iterator[Sequence[_Column]]:
    """Runs of columns that fit beside the names; all of them where there is no width to keep."""
    start = 0
    while start < len(columns):
        stop, taken = start + 1, names.width + columns[start].width + _GAP
        while stop < len(columns) and (width is None or taken + columns[stop].width + _GAP <= width):
            taken += columns[stop].width + _GAP
            stop += 1
        yield columns[start:stop]
        start = stop


def _lines(console: Console, cells: Iterable[tuple[_Column, Sequence[str], str]], style: str) -> Iterator[Segment]:
    """One row, as high as its highest cell; nothing stands behind the last cell of a line."""
    row = list(cells)
    of_row = console.get_style(style or "none")
    for number in range(max(len(lines) for _, lines, _ in row)):
        blank = 0
        for column, lines, own in row:
            text = lines[number] if number < len(lines) else ""
            spare = column.width - cell_len(text)
            before = spare if column.flush_right else 0
            if text:
                yield Segment(" " * (blank + before))
                yield Segment(text, of_row + console.get_style(own or "none"))
                blank = spare - before + _GAP
            else:
                blank += spare + _GAP
        yield Segment.line()


def _folded(lines: Sequence[str], width: int) -> list[str]:
    return [part for line in lines for part in _fold(line, width)]


def _fold(line: str, width: int) -> list[str]:
    """A line in parts of at most `width`, cut behind spaces; a longer word behind signs, else anywhere."""
    if cell_len(line) <= width:
        return [line]
    parts, current = [], ""
    for piece in _pieces(line, width, [r"\S*\s*", r"[^\s\-_/.,:;+]*[\s\-_/.,:;+]*", r"(?s)."]):
        if cell_len((current + piece).rstrip()) > width and current:
            parts.append(current.rstrip())
            current = ""
        current += piece
    return [*parts, *([current.rstrip()] if current.strip() else [])]


def _pieces(text: str, width: int, cuts: Sequence[str]) -> Iterator[str]:
    """Text cut by the first pattern; pieces that do not fit by the next one."""
    for piece in re.findall(cuts[0], text):
        fits = cell_len(piece.rstrip()) <= width or len(cuts) == 1
        yield from [piece] if fits else _pieces(piece, width, cuts[1:])


def _lines_of(text: str) -> list[str]:
    """Lines without what a terminal would obey."""
    return visible(text).split("\n")


def _marked(cell: list[str], end: str, lines: bool) -> list[str]:
    """The lines of a cell, or a single one, with its sign behind the first."""
    first, *rest = cell if lines else [" / ".join(cell)]
    return [first + end, *(line + " " * len(end) for line in rest)]
