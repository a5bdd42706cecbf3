"""Tables in Markdown, for people to read in a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def _whole(cell: str) -> str:
    """A cell whose bars do not end it."""
    return cell.replace("|", "\\|")


def markdown_table(header: Sequence[str], body: Sequence[Sequence[str]], escape: Callable[[str], str] = _whole) -> str:
    """A table without a line break at its end; `escape` makes text into a cell."""
    lines = ["| " + " | ".join(map(escape, cells)) + " |" for cells in [header, *body]]
    return "\n".join([lines[0], "|" + " --- |" * len(header), *lines[1:]])
