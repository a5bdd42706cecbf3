"""Bytes of text files, a piece at a time -> UTF-8 text; nothing of a file that is not of this size or kind is kept."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from itertools import count

from modekit.errors import TextError

LARGEST = 3 * 2**23
"""Of one document: bytes of a record, and of a value of a table; characters of a paragraph. Far more than a book has."""
_PIECE = 2**20  # bytes of a plain file in memory at once


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
        data = stream.read(_PIECE)
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
