"""Text of any size in little memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from modekit.errors import TextError
from modekit.text.documents import read_documents
from modekit.text.splits import digest_of
from mutations import limited


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
