"""Text files, line by line -> UTF-8 text -> passages, the documents of plain text.

Where there are blank lines, a passage is one or more whole paragraphs. Where there are none, as in a file with a paragraph per
line, it is one or more whole lines; a line that is longer than a passage is cut at white space.
"""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from typing import TYPE_CHECKING

from modekit.errors import TextError
from modekit.files.typed import said_by

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LARGEST = 3 * 2**23
"""Bytes of a line, characters of a paragraph: far more than a book has."""
_PASSAGE = 2_000  # characters after which a passage ends at the next place where it may be cut
# A line, or as much of a long one as goes to white space; without white space, as many characters as a passage has.
_PIECE = re.compile(rf"[^\n]{{0,{_PASSAGE - 1}}}\n|[^\n]{{1,{_PASSAGE}}}(?!\S)|[^\n]{{1,{_PASSAGE}}}")

WORD = re.compile(r"\S{1,24}\s*")
"""A word and the space behind it; scripts without spaces are cut."""


def whole(text: str) -> str:
    """The text without halves of surrogate pairs, which are no characters."""
    return text.encode("utf-8", "replace").decode()


def in_common(one: Sequence[object], other: Sequence[object]) -> int:
    """How much both texts, or lists of tokens, begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = True) -> list[int]:
    """Tokens of a text. Raises TextError where a pattern of the tokenizer finds no end in it."""
    try:
        ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    except BaseException as error:  # a library in Rust panics by a class of its own, which is no Exception
        if type(error).__name__ != "PanicException":
            raise
        raise TextError(
            "the tokenizer cannot cut a text into tokens",
            where=str(tokenizer.name_or_path),
            found=f"{said_by(error)} (in {text[:60]!r})",
            remedy="correct the patterns in tokenizer.json, or leave the text out",
        ) from None
    return ids


def decode(data: bytes, *, where: str, start: int = 0) -> str:
    """UTF-8 as text, without a byte order mark. Raises TextError for anything else; `start`: where in its file it stands."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        old = "UTF-16" if start == 0 and data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "ISO-8859-1"
        raise TextError(
            "the text is not UTF-8 (binary file?)",
            where=where,
            found=f"byte {start + len(data) - len(error.object) + error.start}: {error.reason}",
            remedy=f"save it as UTF-8: `iconv -f {old} -t UTF-8 OLD > NEW` if it is {old}",
        ) from None


def lines_of(stream: io.BufferedReader, *, where: str) -> Iterator[str]:
    r"""The lines of an open file from its beginning, each with a \n at its end; one is in memory. Cut there, not at U+2028.

    Raises OSError, and TextError for what is no UTF-8 text, and for a line that is larger than any document.
    """
    stream.seek(0)
    read = 0
    for number in count(1):
        line, place = stream.readline(LARGEST + 1), f"{where}:{number}"
        if not line:
            return
        if b"\x00" in line:
            decode(line.partition(b"\x00")[0], where=where, start=read)  # of UTF-16 that is what is wrong
            raise TextError("the text holds NUL characters (binary file?)", where=place, remedy="give plain text")
        if len(line) > LARGEST:
            raise TextError(
                "a line is too large to be read",
                where=place,
                found=f"more than {LARGEST:,} bytes",
                expected=f"at most {LARGEST:,} bytes",
                remedy="cut it into several documents, or lines (`fold -s`)",
            )
        text = decode(line, where=place, start=read)
        yield f"{text[:-2]}\n" if text.endswith("\r\n") else text
        read += len(line)


def passages(lines: Callable[[], Iterable[str]]) -> Iterator[str]:
    """Paragraphs joined in order until a passage has about 2,000 characters; without blank lines, lines likewise.

    A passage of lines has less than 4,000 characters, whatever the text. `lines` gives the lines of the text with their ends,
    from its beginning; it is called twice.
    """
    cut = _paragraphs if _has_blank_line(lines()) else _short_lines
    passage = ""
    for piece in cut(lines()):
        passage += piece
        if len(passage) >= _PASSAGE:
            yield passage
            passage = ""
    yield passage


def _has_blank_line(lines: Iterable[str]) -> bool:
    """Whether a blank line stands between two words."""
    words = blank = False
    for line in lines:
        if line.strip() and blank:
            return True
        blank = blank or (words and line == "\n")
        words = words or bool(line.strip())
    return False


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    paragraph = ""
    for line in lines:
        paragraph += line
        if paragraph.endswith("\n\n") or len(paragraph) > LARGEST:
            yield paragraph
            paragraph = ""
    yield f"{paragraph}\n\n"


def _short_lines(lines: Iterable[str]) -> Iterator[str]:
    return (piece for line in lines for piece in _PIECE.findall(line))
