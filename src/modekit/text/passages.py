"""Plain text -> passages, its documents.

Where there are blank lines, a passage is one or more whole paragraphs. Where there are none, as in a file with a paragraph
per line, it is one or more whole lines; a line that is longer than a passage is cut at white space.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

_PASSAGE = 2_000  # characters after which a passage ends at the next place where it may be cut
# A line, or as much of a long one as goes to white space; without white space, as many characters as a passage has.
_PIECE = re.compile(rf"[^\n]{{0,{_PASSAGE - 1}}}\n|[^\n]{{1,{_PASSAGE}}}(?!\S)|[^\n]{{1,{_PASSAGE}}}")

WORD = re.compile(r"\S{1,24}\s*")
"""A word and the space behind it; scripts without spaces are cut."""


def passages(text: str) -> Iterator[str]:
    """Paragraphs joined in order until a passage has about 2,000 characters; without blank lines, lines likewise.

    A passage of lines has less than 4,000 characters, whatever the text; a paragraph is never cut.
    """
    text = text.replace("\r\n", "\n")
    if "\n\n" in text.strip():
        return _joined(paragraph + "\n\n" for paragraph in text.split("\n\n"))
    return _joined(_PIECE.findall(text))


def _joined(pieces: Iterable[str]) -> Iterator[str]:
    passage = ""
    for piece in pieces:
        passage += piece
        if len(passage) >= _PASSAGE:
            yield passage
            passage = ""
    yield passage
