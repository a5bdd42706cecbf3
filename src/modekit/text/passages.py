"""Plain text -> passages, its documents.

Where there are blank lines, a passage is one or more whole paragraphs. Where there are none, as in a file with a paragraph
per line, it is one or more whole lines; a line that is longer than a passage is cut at white space. The text comes in pieces,
of which few are in memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

from modekit.text.plain import LARGEST

_PASSAGE = 2_000  # characters after which a passage ends at the next place where it may be cut
# A line, or as much of a long one as goes to white space; without white space, as many characters as a passage has.
_PIECE = re.compile(rf"[^\n]{{0,{_PASSAGE - 1}}}\n|[^\n]{{1,{_PASSAGE}}}(?!\S)|[^\n]{{1,{_PASSAGE}}}")
_BLANK_LINE = "\n\n"

WORD = re.compile(r"\S{1,24}\s*")
"""A word and the space behind it; scripts without spaces are cut."""


def passages(read: Callable[[], Iterable[str]]) -> Iterator[str]:
    """Paragraphs joined in order until a passage has about 2,000 characters; without blank lines, lines likewise.

    A passage of lines has less than 4,000 characters, whatever the text; a paragraph is cut, as lines are, only where it is
    larger than any document. `read` gives the pieces of the text, from its beginning; it is called twice.
    """
    cut = _paragraphs if _has_blank_lines(_with_unix_lines(read())) else _lines
    return _joined(cut(_with_unix_lines(read())))


def _with_unix_lines(pieces: Iterable[str]) -> Iterator[str]:
    r"""The same with \n in place of \r\n."""
    held = ""
    for piece in pieces:
        piece = held + piece
        held = "\r" if piece.endswith("\r") else ""
        yield piece.removesuffix("\r").replace("\r\n", "\n")
    yield held


def _has_blank_lines(pieces: Iterable[str]) -> bool:
    """Whether a blank line stands between two words."""
    last, is_blank = "", False  # the last character since the first word; whether a blank line came behind that word
    for piece in pieces:
        text = last + piece if last else piece.lstrip()
        if is_blank:
            text = piece
        elif _BLANK_LINE in text:
            is_blank, text = True, text.partition(_BLANK_LINE)[2]
        if is_blank and text.strip():
            return True
        last = text[-1:] or last
    return False


def _paragraphs(pieces: Iterable[str]) -> Iterator[str]:
    rest = ""
    for piece in pieces:
        *whole, rest = (rest + piece).split(_BLANK_LINE)
        yield from (paragraph + _BLANK_LINE for paragraph in whole)
        if len(rest) > LARGEST:
            lines, rest = _cut(rest)
            yield from lines
    yield rest + _BLANK_LINE


def _lines(pieces: Iterable[str]) -> Iterator[str]:
    rest = ""
    for piece in pieces:
        lines, rest = _cut(rest + piece)
        yield from lines
    yield from _PIECE.findall(rest)


def _cut(text: str) -> tuple[list[str], str]:
    """Lines, and parts of long ones, which no further text would change; and what is left of the text."""
    lines, end = [], 0
    for found in _PIECE.finditer(text):
        if found.start() + _PASSAGE >= len(text):
            break
        lines.append(found[0])
        end = found.end()
    return lines, text[end:]


def _joined(pieces: Iterable[str]) -> Iterator[str]:
    passage = ""
    for piece in pieces:
        passage += piece
        if len(passage) >= _PASSAGE:
            yield passage
            passage = ""
    yield passage
