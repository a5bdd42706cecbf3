"""Plain text is cut where its author cut it: at blank lines, and without any at line ends; nothing is lost or too long."""

from __future__ import annotations

import re
from io import BufferedReader, BytesIO, StringIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modekit.text.documents import read_documents
from modekit.text.plain import lines_of, passages
from modekit.text.splits import digest_of

PARAGRAPH = "one paragraph per line, as many exports have it; "


def at_blank_lines(text: str) -> list[str]:
    """How texts with blank lines have always been cut; their documents, and so their splits, must stay."""
    found, passage = [], ""
    for paragraph in text.replace("\r\n", "\n").split("\n\n"):
        passage += paragraph + "\n\n"
        if len(passage) >= 2_000:
            found.append(passage)
            passage = ""
    return [*found, passage]


@given(st.lists(st.text("ab \n\r", max_size=900), min_size=2, max_size=12))
def test_text_with_blank_lines_is_cut_as_ever(paragraphs: list[str]) -> None:
    text = "a" + "\n\n".join(paragraphs) + "b"
    stream = BufferedReader(BytesIO(text.encode()))  # type: ignore[arg-type]
    assert list(passages(lambda: lines_of(stream, where="text"))) == at_blank_lines(text)


def test_a_paragraph_per_line_gives_many_documents(tmp_path: Path) -> None:
    lines = [f"{number} {PARAGRAPH * 10}" for number in range(100)]
    (tmp_path / "book.txt").write_text("\n".join(lines) + "\n\n")
    documents = read_documents(["book.txt"], root=tmp_path, where="law")
    assert len(documents) == 20
    found = [line.strip() for document in documents for line in document.split("\n")]
    assert sorted(found) == sorted(line.strip() for line in lines)  # no line was cut


def test_a_short_text_without_blank_lines_is_one_document_as_ever(tmp_path: Path) -> None:
    text = "\n".join(f"{number} {PARAGRAPH}" for number in range(30))
    (tmp_path / "short.md").write_text(text)
    assert [digest_of(document) for document in read_documents(["short.md"], root=tmp_path, where="law")] == [digest_of(text)]


@given(st.text("ab \n", max_size=600))
def test_without_blank_lines_nothing_is_lost_and_nothing_too_long(text: str) -> None:
    text = re.sub("\n+", "\n", text * 20).strip()
    found = list(passages(lambda: StringIO(text, newline="\n")))
    assert "".join(found) == text
    assert all(len(passage) < 4_000 for passage in found) and all(len(passage) >= 2_000 for passage in found[:-1])


@pytest.mark.parametrize("word", ["word ", "longer words\t", "\u8a9e"])
def test_a_single_gigantic_line_is_cut_too_at_white_space(word: str) -> None:
    text = word * 100_000
    found = list(passages(lambda: StringIO(text, newline="\n")))
    assert "".join(found) == text and max(map(len, found)) < 4_000
    if word.strip() != word:
        assert {piece for passage in found for piece in passage.split()} == set(word.split())
