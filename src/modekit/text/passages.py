"""Plain text -> passages, its documents."""

from __future__ import annotations

from collections.abc import Iterator

_PASSAGE = 2_000  # characters of a passage


def passages(text: str) -> Iterator[str]:
    """Paragraphs (separated by blank lines) joined in order until a passage is about _PASSAGE characters."""
    passage = ""
    for paragraph in text.replace("\r\n", "\n").split("\n\n"):
        passage += paragraph + "\n\n"
        if len(passage) >= _PASSAGE:
            yield passage
            passage = ""
    yield passage
