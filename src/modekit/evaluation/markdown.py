"""Markdown for people to read in a file: tables, and text of others without markup."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

_ENDS = re.compile(r"[\r\n\v\f\x1c-\x1e\x85\u2028\u2029]+")
_MARKUP = re.compile(r"([\\`*_{}\[\]<>()#|!~&$])")
_ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}


def plain(text: str) -> str:
    """Text of others as text: no markup, no links, one line, nothing that cannot be seen."""
    one_line = "".join(character for character in " ".join(text.split()) if character.isprintable())
    return _MARKUP.sub(lambda found: _ENTITIES.get(found[1], f"\\{found[1]}"), one_line)


def _whole(cell: str) -> str:
    """A cell that neither a bar nor the end of a line ends."""
    return _ENDS.sub(" ", cell).replace("|", "\\|")


def markdown_table(header: Sequence[str], body: Sequence[Sequence[str]], escape: Callable[[str], str] = _whole) -> str:
    """A table without a line break at its end; `escape` makes text into a cell."""
    lines = ["| " + " | ".join(map(escape, cells)) + " |" for cells in [header, *body]]
    return "\n".join([lines[0], "|" + " --- |" * len(header), *lines[1:]])
