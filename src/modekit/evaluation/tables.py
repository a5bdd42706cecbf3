"""What every result shows, said once as tables: Markdown draws them here, the terminal in cli/printing.py, HTML in report."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

MIXTURE = "mixture"
"""Name of the row that stands out."""
_ENDS = re.compile(r"[\r\n\v\f\x1c-\x1e\x85\u2028\u2029]+")
_MARKUP = re.compile(r"([\\`*_{}\[\]<>()#|!~&$])")
_ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}


@dataclass(frozen=True)
class Cell:
    """A figure as text, with a second one behind a newline where there are two.

    Attributes:
        own: it stands out among its neighbours, as a domain's own expert.
        share: colour of a share, from 0 to 1.
        change: colour of a difference, from -1 (better) to 1 (worse).
    """

    text: str
    own: bool = False
    share: float | None = None
    change: float | None = None


@dataclass(frozen=True)
class ResultTable:
    """Rows of cells, the first of which names the row, under titles.

    Attributes:
        caption: what the figures are; a sentence or a few.
        detail: too much for a terminal; a page shows it when asked to.
        prose: the last column holds words, not figures.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    caption: str = ""
    detail: bool = False
    prose: bool = False


def cells_of(row: Iterable[str | Cell]) -> list[Cell]:
    """All of a row as cells."""
    return [each if isinstance(each, Cell) else Cell(each) for each in row]


def plain(text: str) -> str:
    """Text of others as text: no markup, no links, one line, nothing that cannot be seen."""
    one_line = "".join(character for character in " ".join(text.split()) if character.isprintable())
    return _MARKUP.sub(lambda found: _ENTITIES.get(found[1], f"\\{found[1]}"), one_line)


def _whole(cell: str) -> str:
    """A cell that neither a bar nor the end of a line ends."""
    return _ENDS.sub(" ", cell).replace("|", "\\|")


def as_markdown(table: ResultTable, escape: Callable[[str], str] = _whole) -> str:
    """Without a line break at its end; two figures in a cell are separated by ` / `; `escape` makes text into a cell."""
    rows = [[cell.text for cell in cells_of(row)] for row in (table.header, *table.rows)]
    lines = ["| " + " | ".join(escape(" / ".join(text.split("\n"))) for text in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(table.header), *lines[1:]])


def markdown_page(tables: Iterable[ResultTable], notes: Iterable[str]) -> str:
    """Tables under their titles, and notes as a list."""
    parts = []
    for table in tables:
        parts += [f"## {_whole(table.title)}", *([table.caption] if table.caption else []), as_markdown(table)]
    said = [f"* {_ENDS.sub(' ', note)}" for note in notes]
    return "\n\n".join([*parts, *(["\n".join(said)] if said else [])]) + "\n"
