"""Pairs: read from records and aligned files, told from plain text, encoded whole, and put into batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch

from modekit.errors import TextError
from modekit.recipes.recipe import Expert
from modekit.text.document import Document, Pair, text_of
from modekit.text.documents import read_documents
from modekit.text.held_out import fit_documents
from modekit.text.records import data_of, record_of
from modekit.text.sequences import TokenSequence, encode, make_batches
from modekit.text.splits import digest_of, text_record
from pair_models import pair_tokenizer, pairs
from text_files import write_records

SAID = [("good day", "bonjour"), ("one, two", "un, deux"), ("where?", "où ?")]
PAIRS = [Pair(*sides) for sides in SAID]


def read(root: Path, *specs: str) -> list[Document]:
    return read_documents(specs, root=root, where="text")


def test_a_pair_is_both_sides() -> None:
    pair = Pair("good day", "bonjour")
    assert pair.text == "good day\nbonjour" and (pair.source, pair.target) == SAID[0]
    one, other = Pair("good\nday", "bonjour"), Pair("good", "day\nbonjour")
    assert digest_of(other) == digest_of(one) == digest_of(one.text)
    assert len({text_record([each], 1)["sha256"] for each in (one, other, one.text)}) == 3
    assert data_of(pair) == {"source": "good day", "target": "bonjour"}


@pytest.mark.parametrize(
    "record",
    [
        {"source": "a", "target": 1},
        {"source": "a"},
        {"translation": {"en": "a"}},
        {"translation": ["a", "b"]},
        {"translation": {"en": "a", "fr": "b", "de": "c"}},
        {},
    ],
)
def test_what_is_no_pair(record: dict[object, object]) -> None:
    with pytest.raises(TextError, match="no pair of texts"):
        record_of(record, where="text")


def test_the_same_pairs_in_any_format_are_the_same_documents(tmp_path: Path) -> None:
    write_records(tmp_path / "a.jsonl", [{"source": f" {source} ", "target": target, "id": 7} for source, target in SAID])
    write_records(tmp_path / "b.jsonl", [{"translation": {"en": source, "fr": target}} for source, target in SAID])
    sides = {"source": [source for source, _ in SAID], "target": [target for _, target in SAID]}
    parquet.write_table(pa.table(sides), tmp_path / "c.parquet")
    parquet.write_table(pa.table({"translation": [{"en": s, "fr": t} for s, t in SAID]}), tmp_path / "d.parquet")
    rows = "".join(f"{source}\t{target}\n" for source, target in SAID)
    (tmp_path / "news.tsv").write_text(f"source\ttarget\n{rows}\n")  # and a blank line
    found = [read(tmp_path, spec) for spec in ("a.jsonl", "b.jsonl", "c.parquet", "d.parquet", "news.tsv")]
    assert all(documents == found[0] and all(isinstance(each, Pair) for each in documents) for documents in found)
    assert set(found[0]) == set(PAIRS)
    assert len(read(tmp_path, "a.jsonl", "news.tsv")) == 3


def test_text_counts_before_a_source_that_says_where_it_is_from(tmp_path: Path) -> None:
    record = {"text": "plain", "source": "the web", "target": "nobody"}
    write_records(tmp_path / "a.jsonl", [record])
    parquet.write_table(pa.table({key: [value] for key, value in record.items()}), tmp_path / "b.parquet")
    for name in ("a.jsonl", "b.parquet"):
        (document,) = read(tmp_path, name)
        assert document == "plain" and not isinstance(document, Pair)


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"source": ["a", "b"], "target": ["c", None]}, r"empty target[\s\S]*row 2"),
        ({"source": [None, "b"], "target": ["c", "d"]}, r"empty source[\s\S]*row 1"),
        ({"translation": [{"en": "a", "fr": "b"}, {"en": None, "fr": "d"}]}, r"empty source[\s\S]*row 2"),
        ({"translation": [{"en": "a", "fr": "b"}, {"en": "c", "fr": None}]}, r"empty target[\s\S]*row 2"),
        ({"translation": [{"en": "a", "fr": "b"}, {"en": "c", "fr": "  "}]}, r"empty target[\s\S]*row 2"),
    ],
)
def test_a_side_that_a_table_lacks_is_no_row_to_skip(tmp_path: Path, columns: dict[str, Any], says: str) -> None:
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(TextError, match=says):
        read(tmp_path, "a.parquet")
    rows = [{name: values[row] for name, values in columns.items()} for row in range(2)]
    write_records(tmp_path / "a.jsonl", rows)
    with pytest.raises(TextError, match=says.replace("row ", "a.jsonl:")):
        read(tmp_path, "a.jsonl")


def test_of_several_languages_the_two_that_are_there(tmp_path: Path) -> None:
    rows = [{"en": "a", "fr": "b", "de": None}, {"en": None, "fr": "c", "de": "d"}]
    parquet.write_table(pa.table({"translation": rows}), tmp_path / "a.parquet")
    assert sorted(read(tmp_path, "a.parquet"), key=text_of) == [Pair("a", "b"), Pair("c", "d")]


def test_one_domain_has_pairs_or_plain_text(tmp_path: Path) -> None:
    write_records(tmp_path / "a.jsonl", [{"source": "a", "target": "b"}, {"text": "c"}])
    with pytest.raises(TextError, match=r"pairs and plain text[\s\S]*here"):
        read_documents(["a.jsonl"], root=tmp_path, where="here")
    with pytest.raises(TextError, match="pairs and plain text"):
        list(make_batches([TokenSequence((1, 2)), TokenSequence((1, 2), target=(3,))]))
    write_records(tmp_path / "b.jsonl", [{"source": f"{number}", "target": "b"} for number in range(20)])
    with pytest.raises(TextError, match=r"prompts are plain text[\s\S]*experts\[0\] 'one': prompts[\s\S]*'a question'"):
        fit_documents(Expert(name="one", model="x", text=["b.jsonl"], prompts=["a question"]), tmp_path, 0)


def test_encode_keeps_pairs_whole() -> None:
    tokenizer = pair_tokenizer()
    found = encode(tokenizer, [Pair("abc", "de"), Pair("a" * 20, "b"), Pair("a", "bé")], max_tokens=100, sequence_length=10)
    assert [(len(each.ids), len(each.target)) for each in found] == [(4, 3), (2, 3)]
    assert [each.target[-1] for each in found] == [tokenizer.eos_token_id] * 2
    assert [(each.size, each.scored) for each in found] == [(7, 3), (5, 3)]
    assert encode(tokenizer, [Pair("abc", "de"), Pair("a", "bc")], max_tokens=11, sequence_length=10) == found[:1]
    plain = TokenSequence((1, 2, 3))
    assert (plain.size, plain.scored) == (3, 2)


@pytest.mark.parametrize("tokens", [1, 60, 200, 10_000])
def test_batches_hold_every_pair_once(tokens: int) -> None:
    sequences = encode(pair_tokenizer(), pairs(40), max_tokens=10_000, sequence_length=64)
    seen: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    for batch in make_batches(sequences, tokens=tokens):
        assert batch.target is not None
        assert len(batch.rows) == 1 or batch.input_ids.numel() + batch.target.numel() <= tokens
        assert batch.tokens == sum(sequences[row].size for row in batch.rows)
        assert batch.scored == sum(sequences[row].scored for row in batch.rows)
        for place, row in enumerate(batch.rows):
            ids, target = batch.input_ids[place][batch.mask[place]], batch.target[place][batch.target_mask[place]]
            seen[row] = tuple(ids.tolist()), tuple(target.tolist())
            assert (batch.target[place][~batch.target_mask[place]] == -100).all()
    assert seen == {row: (sequence.ids, sequence.target) for row, sequence in enumerate(sequences)}


def test_the_labels_of_plain_text_are_its_next_tokens() -> None:
    (batch,) = make_batches([TokenSequence((4, 5, 6)), TokenSequence((7, 8))])
    assert batch.target is None and torch.equal(batch.labels, torch.tensor([[5, 6], [8, -100]]))
    assert (batch.tokens, batch.scored) == (5, 3)
