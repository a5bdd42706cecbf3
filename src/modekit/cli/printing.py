"""What the command line writes: results on the standard output, progress and errors beside it.

What is written comes from others as often as from here: names, labels, paths, messages. None of it is obeyed: a console knows
no markup (what has a style is `Text.assemble(("name", "bold"), ": rest")`), and writes control characters out.

Tables can be read anywhere: on a terminal, one that is too wide goes on in another one below, with the names of its rows again;
in a file or a pipe it is as wide as it has to be.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any
from unicodedata import category

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from modekit.evaluation.tables import MIXTURE, Cell, ResultTable, cells_of
from modekit.processes import prints

if TYPE_CHECKING:
    from modekit.evaluation.results_folder import Result

_PLAIN = "\n\u00ad\u200c\u200d\u2060"
_GAP = 2  # spaces between columns
_NARROW = 12  # names and titles are not folded to less than this
OWN = "*"
"""The sign of a cell that stands out, where bold cannot be seen."""


def visible(text: str) -> str:
    """Text without what a terminal would obey: control and format characters are written out. Ends of lines stay, and what
    scripts need: spaces of any kind, and what joins signs or keeps them apart.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in _PLAIN or category(c) == "Zs" else c.encode("unicode_escape").decode() for c in text
    )


class VerbatimConsole(Console):
    """A console on which text is text."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, **settings)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The segments of what is drawn, all that is written among them; only rich's own may move the cursor."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


def console_for(*, stderr: bool = False, **settings: Any) -> Console:
    """A console that wraps and colours on a terminal alone; of processes that share a command, that of the first prints."""
    console = VerbatimConsole(stderr=stderr, quiet=not prints(), **settings)
    console.soft_wrap = not console.is_terminal
    return console


out = console_for()
err = console_for(stderr=True)


def print_json(value: object) -> None:
    """On the standard output, as it is whatever a terminal is."""
    if prints():
        sys.stdout.write(json.dumps(value, indent=2) + "\n")


def print_result(result: Result) -> None:
    """Draw the tables of a result, but for its details, and what has to be said of them."""
    for shown in result.tables():
        if not shown.detail:
            print_table(shown)
    print_notes(result.notes)


def print_notes(notes: Iterable[str], *, before: bool = False) -> None:
    """Draw what has to be said of a result; of work that is yet to be done, beside its progress."""
    for note in notes:
        (err if before else out).print(Text.assemble(("note:", "yellow"), f" {note}"))


def print_done(what: object, said: str) -> None:
    """Say what has been made: its folder, and what is in it."""
    out.print(Text.assemble((str(what), "bold"), f": {said}"))


def print_next(folder: Path, *commands: str) -> None:
    """Say which commands, of OUT, go on from here, as they are typed whatever the folder is called."""
    out.print(f"next: {', '.join(f'modekit {each}' for each in commands)}".replace("OUT", quote(str(folder))))


def print_table(shown: ResultTable) -> None:
    """Draw a table and what its figures are; the mixture's row stands out."""
    rows = [cells_of(row) for row in shown.rows]
    if shown.title:
        out.print(Text(shown.title, style="bold"))
    if shown.caption:
        how = "in bold" if out.color_system is not None else f"marked {OWN}"
        out.print(Text(shown.caption + (f" Each domain's own is {how}." if any(c.own for row in rows for c in row) else "")))
    for drawn in _parts(shown, rows):
        out.print(drawn)


@dataclass(frozen=True)
class _Wide:
    """A table of a width that its console need not have, without spaces at the ends of its lines."""

    table: Table
    width: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for line in console.render_lines(self.table, options.update(width=self.width, no_wrap=False), pad=False):
            kept = list(line)
            while kept and not kept[-1].text.strip():
                kept.pop()
            yield from kept[:-1]
            yield from (Segment(last.text.rstrip(), last.style) for last in kept[-1:])
            yield Segment.line()


def _parts(shown: ResultTable, rows: Sequence[Sequence[Cell]]) -> Iterator[_Wide | str]:
    """The table, or the tables that it is drawn as where it is too wide, with empty lines between them."""
    header = [_text(Cell(title if shown.prose or out.soft_wrap else title.replace(" ", "\n"))) for title in shown.header]
    columns = list(zip(*([_text(cell) for cell in row] for row in rows), strict=True)) or [()] * len(header)
    widths = [max(_folded(title), *map(_width, column), 0) + _GAP for title, column in zip(header, columns, strict=True)]
    room = sum(widths) if out.soft_wrap else out.width
    names = widths[0] if sum(widths) <= room else min(widths[0], max(_NARROW, room // 3))
    for number, block in enumerate([range(1, len(widths))] if shown.prose else _blocks(widths, room - names)):
        if number:
            yield ""
        table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), show_header=any(shown.header))
        table.add_column(header[0], overflow="fold", width=names - _GAP)
        for place in block:
            wide = None if shown.prose and place == block[-1] else min(widths[place], room - names) - _GAP
            table.add_column(header[place], justify="left" if shown.prose else "right", overflow="fold", width=wide)
        for row in zip(*(columns[place] for place in (0, *block)), strict=True):
            table.add_row(*row, style="bold green" if row[0].plain == MIXTURE else "")
        yield _Wide(table, room)


def _text(cell: Cell) -> Text:
    """Of a cell, in one line where lines are not to be broken."""
    sign = OWN if cell.own and out.color_system is None else ""
    said = sign + visible(cell.text)
    return Text(said.replace("\n", " / ") if out.soft_wrap else said, "bold" if cell.own else "")


def _width(text: Text) -> int:
    return max((cell_len(line) for line in text.plain.split("\n")), default=0)


def _folded(title: Text) -> int:
    """Of a title, which may be folded on a terminal."""
    return _width(title) if out.soft_wrap else min(_NARROW, _width(title))


def _blocks(widths: Sequence[int], room: int) -> Iterator[range]:
    """Runs of columns that fit beside the names."""
    start = 1
    while start < len(widths):
        stop, taken = start + 1, widths[start]
        while stop < len(widths) and taken + widths[stop] <= room:
            taken += widths[stop]
            stop += 1
        yield range(start, stop)
        start = stop
