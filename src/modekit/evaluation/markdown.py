"""Tables in Markdown, for people to read in a file."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

_ENDS = re.compile(r"[\r\n\v\f\x1c-\x1e\x85\u2028\u2029]+")


def _whole(cell: str) -> str:
    """A cell that neither a bar nor the end of a line ends."""
    return _ENDS.sub(" ", cell).replace("|", "\\|")


def markdown_table(header: Sequence[str], body: Sequence[Sequence[str]], escape: Callable[[str], str] = _whole) -> str:
    """A table without a line break at its end; `escape` makes text into a cell."""
    lines = ["| " + " | ".join(map(escape, cells)) + " |" for cells in [header, *body]]
    return "\n".join([lines[0], "|" + " --- |" * len(header), *lines[1:]])


def parameters_of(count: int) -> str:
    """A number of parameters, in millions or billions."""
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.2f}M"
