"""A tokenizer of all domains: fewer tokens on code than an English one has, every byte back, the same one every time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from command_line import ended, modekit
from modekit.demo.text import GENERAL, LANGUAGES, unpack_text
from modekit.experts.corpus.texts import GivenTexts
from modekit.experts.corpus.tokenizer import byte_level_bpe, train_tokenizer
from modekit.run import Run
from modekit.text.documents import read_documents
from modekit.text.splits import documents_of_split
from refusal import refuse, tree

VOCABULARY = 2_000
DATA = ["general", "french", "german", "code"]


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shipped text, a tokenizer of English alone, and one of all."""
    root = tmp_path_factory.mktemp("tokenizers")
    unpack_text(root, (*LANGUAGES, GENERAL, "code"))
    for out, names in (("ENGLISH", ["general"]), ("ALL", DATA)):
        texts = {name: [f"{name}.jsonl"] for name in names}
        train_tokenizer(GivenTexts(texts, root), VOCABULARY, root / out, run=Run(sync=False))
    return root


def held_out(root: Path, name: str) -> list[str]:
    return documents_of_split(read_documents([f"{name}.jsonl"], root=root, where=""), "report")


def typed(root: Path, out: str, *words: str, names: list[str] = DATA) -> list[str]:
    texts = [word for name in names for word in ("--text", f"{name}={root / name}.jsonl")]
    return ["data", "tokenizer", str(root / out), *texts, *words]


def test_python_takes_a_fifth_fewer_tokens_than_with_an_english_tokenizer(room: Path) -> None:
    counts = {}
    for out in ("ENGLISH", "ALL"):
        tokenizer = AutoTokenizer.from_pretrained(room / out)
        assert len(tokenizer) == VOCABULARY
        counts[out] = {
            name: sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in held_out(room, name))
            for name in DATA
        }
    assert counts["ALL"]["code"] <= 0.8 * counts["ENGLISH"]["code"]
    assert counts["ALL"]["french"] < counts["ENGLISH"]["french"] and counts["ALL"]["german"] < counts["ENGLISH"]["german"]


def test_every_byte_comes_back(room: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(room / "ALL")
    texts = [text for name in DATA for text in held_out(room, name)]
    for text in [*texts, "\t tabs\r\n  and \u2028 what ' s . not , a word !", "法律 🙂 e\u0301", "\x00\x7f"]:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_the_same_text_gives_the_same_tokenizer_in_whatever_order(room: Path, tmp_path: Path) -> None:
    for name in DATA:
        lines = (room / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines[::-1]) + lines[0])
    texts = {name: [f"{name}.jsonl"] for name in DATA}
    train_tokenizer(GivenTexts(texts, tmp_path), VOCABULARY, tmp_path / "AGAIN", run=Run(sync=False))
    assert (tmp_path / "AGAIN" / "tokenizer.json").read_bytes() == (room / "ALL" / "tokenizer.json").read_bytes()


def test_a_small_domain_weighs_as_much_as_a_large_one(room: Path, tmp_path: Path) -> None:
    """With a tenth of the German text, German is read about as well as French, and better than where it has its own weight."""
    (tmp_path / "french.jsonl").write_text((room / "french.jsonl").read_text())
    german = (room / "german.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "german.jsonl").write_text("".join(german[:60]))
    texts = {name: [f"{name}.jsonl"] for name in ("french", "german")}
    train_tokenizer(GivenTexts(texts, tmp_path), VOCABULARY, tmp_path / "EVEN", run=Run(sync=False))
    fit = [
        text for name in texts for text in documents_of_split(read_documents([f"{name}.jsonl"], root=tmp_path, where=""), "fit")
    ]
    uneven = byte_level_bpe(fit, VOCABULARY)
    even = AutoTokenizer.from_pretrained(tmp_path / "EVEN")
    text = " ".join(json.loads(line)["text"] for line in german[60:])
    assert len(even(text)["input_ids"]) < 0.99 * len(uneven(text)["input_ids"])


def test_the_command_compares_with_another(room: Path) -> None:
    against = ("--vocabulary", str(VOCABULARY), "--against", str(room / "ENGLISH"))
    said = modekit(*typed(room, "NEW", *against))
    assert "1,000" in said and "a tokenizer of 2,000 tokens" in said
    data: dict[str, Any] = json.loads((room / "NEW" / "fertility.json").read_text())
    changes = {each["name"]: each["change"] for each in data["domains"]}
    assert changes["code"] < -0.2 < 0 < changes["general"]


def test_bad_input_is_one_clear_error(room: Path, tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text('{"text": "a single document"}\n')
    before = tree(tmp_path)
    assert "is in the" in refuse(*typed(tmp_path, "OUT", names=["one"]))
    assert "does not exist" in refuse(*typed(tmp_path, "OUT", names=["nothing"]))
    for size in ("100", "259", "9999999"):
        code, _, said = ended(*typed(tmp_path, "OUT", "--vocabulary", size, names=["one"]))
        assert code == 2 and "Invalid value for '--vocabulary': must be" in said
    assert "does not exist" in refuse(*typed(tmp_path, "OUT", "--against", "./nowhere", names=["one"]))
    assert tree(tmp_path) == before
    assert "the output folder exists" in refuse(*typed(room, "ALL"))
