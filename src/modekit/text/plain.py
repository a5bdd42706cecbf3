"""Bytes of text files, a piece at a time -> UTF-8 text -> passages, the documents of plain text.

Nothing of a file that is not of this size or kind is kept, and few pieces are in memory. Where there are blank lines, a passage
is one or more whole paragraphs. Where there are none, as in a file with a paragraph per line, it is one or more whole lines; a
line that is longer than a passage is cut at white space.
"""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import count

from modekit.errors import TextError

LARGEST = 3 * 2**23
"""Of one document: bytes of a record, and of a value of a table; characters of a paragraph. Far more than a book has."""
_READ = 2**20  # bytes of a plain file in memory at once


def decode(data: bytes, *, where: str, start: int = 0) -> str:
    """UTF-8 as text, without a byte order mark. Raises TextError for anything else; `start`: where in its file it stands."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(error, start + len(data), where) from None


def plain_text(data: bytes, *, where: str, start: int = 0) -> str:
    """As `decode`. Raises TextError for NUL characters, too, which no text has."""
    return _without_nul(decode(data, where=where, start=start), where)


def text_pieces(stream: io.FileIO, *, where: str, most: int | None = None) -> Iterator[str]:
    """The text of an open file from its beginning, piece by piece; of at most about `most` bytes.

    Raises OSError, and TextError for what is not UTF-8 text.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    read = stream.seek(0)
    while most is None or read < most:
        data = stream.read(_READ)
        read += len(data)
        try:
            yield _without_nul(decoder.decode(data, final=not data), where)
        except UnicodeDecodeError as error:
            raise _not_utf8(error, read, where) from None
        if not data:
            return


def lines_of(stream: io.FileIO, *, where: str) -> Iterator[bytes]:
    """The lines of an open file, of which one is in memory; cut at \\n alone, not at U+2028.

    Raises OSError, and TextError for a line that is larger than any document.
    """
    lines = io.BufferedReader(stream)
    for number in count(1):
        line = lines.readline(LARGEST + 1)
        if not line:
            return
        if len(line) > LARGEST:
            raise _binary(where) if b"\x00" in line else too_large("a line", where=f"{where}:{number}")
        yield line


def too_large(what: str, *, where: str, found: str | None = None, most: int = LARGEST) -> TextError:
    """The error of what takes more memory than a document should."""
    return TextError(
        f"{what} is too large to be read",
        where=where,
        found=found or f"more than {most:,} bytes",
        expected=f"at most {most:,} bytes",
        remedy="cut it into several documents; if it should not be this large, the file is damaged or made to fill the memory",
    )


def _without_nul(text: str, where: str) -> str:
    if "\x00" in text:
        raise _binary(where)
    return text


def _binary(where: str) -> TextError:
    return TextError("the text holds NUL characters (binary file?)", where=where, remedy="give plain text")


def _not_utf8(error: UnicodeDecodeError, read: int, where: str) -> TextError:
    """The error of bytes that end where `read` bytes of their file have been read."""
    place = read - len(error.object) + error.start
    old = "UTF-16" if place == 0 and error.object[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "ISO-8859-1"
    return TextError(
        "the text is not UTF-8 (binary file?)",
        where=where,
        found=f"byte {place}: {error.reason}",
        remedy=f"save it as UTF-8: `iconv -f {old} -t UTF-8 OLD > NEW` if it is {old}",
    )


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
