"""Plain text is cut where its author cut it: at blank lines, and without any at line ends; nothing is lost or too long."""

from __future__ import annotations

import json
import re
from io import BufferedReader, BytesIO, StringIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modekit.errors import TextError
from modekit.text.documents import read_documents
from modekit.text.plain import lines_of, passages
from modekit.text.splits import digest_of
from mutations import limited

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


def read(path: Path) -> list[str]:
    return read_documents([path.name], root=path.parent, where="law")


@pytest.mark.parametrize("name", ["law.txt", "law.md", "law.jsonl", "law.csv"])
def test_a_file_of_twenty_gigabytes_of_nothing(tmp_path: Path, name: str) -> None:
    with (tmp_path / name).open("wb") as stream:
        stream.truncate(20 * 2**30)
    with limited(), pytest.raises(TextError, match="NUL"):
        read(tmp_path / name)


def test_a_paragraph_larger_than_any_document_is_cut_at_line_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modekit.text.plain.LARGEST", 20_000)
    text = "Title\n\n" + "".join(f"{number} word and word\n" for number in range(10_000)) + "\nEnd"
    (tmp_path / "law.txt").write_text(text)
    found = read(tmp_path / "law.txt")
    assert len(found) > 5 and max(map(len, found)) < 30_000
    assert sorted("\n".join(found).split()) == sorted(text.split())


def test_of_more_text_than_is_kept_the_first_by_their_hashes_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"document {number} " + "word " * (number % 40) for number in range(2_000)]
    ordered = sorted(texts, key=digest_of)
    monkeypatch.setattr("modekit.text.documents.MOST_TEXT", 100_000)
    found = []
    for order in (texts, texts[::-1], [*texts, *texts[:500]]):
        (tmp_path / "law.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in order))
        found.append(read(tmp_path / "law.jsonl"))
    assert found[0] == found[1] == found[2] == [text.strip() for text in ordered[: len(found[0])]]
    assert 100 < len(found[0]) < 1_000


RECORDS = [
    ("law.jsonl", '{"text": "', "word " * 2_000, '"}\n'),
    ("law.csv", "text\n", "word " * 2_000, "\n"),
]


@pytest.mark.parametrize(("name", "begin", "more", "end"), RECORDS)
def test_a_record_larger_than_any_document(tmp_path: Path, name: str, begin: str, more: str, end: str) -> None:
    with (tmp_path / name).open("w") as stream:
        stream.write(begin)
        for _ in range(6_000):
            stream.write(more)
        stream.write(end)
    with limited(), pytest.raises(TextError, match="too large to be read") as caught:
        read(tmp_path / name)
    assert f"{name}:" in str(caught.value) and "25,165,824 bytes" in str(caught.value)
