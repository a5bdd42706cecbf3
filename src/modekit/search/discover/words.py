"""The words of a text, whatever its script: what groups of documents are named by, and by default grouped by."""

from __future__ import annotations

import regex

READ = 16_384
"""Characters of a document that decide where it belongs; it is written whole."""
_WITHOUT_SPACES = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_WORD = regex.compile(rf"(?V1)[[\p{{L}}\p{{M}}]--[{_WITHOUT_SPACES}]]{{2,24}}")
_PAIR = regex.compile(rf"[{_WITHOUT_SPACES}]{{2}}")


def words_of(text: str) -> list[str]:
    """Runs of letters in lower case, one by one; where a script has no spaces, every two signs that are neighbours."""
    beginning = text[:READ].lower()
    return [*_WORD.findall(beginning), *_PAIR.findall(beginning, overlapped=True)]
