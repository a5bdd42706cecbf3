"""Text -> documents -> splits -> sequences -> batches."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import Workshop, character_tokenizer
from modekit.errors import TextError
from modekit.text.documents import read_documents
from modekit.text.sequences import TokenSequence, encode, make_batches
from modekit.text.splits import digest_of, documents_of_split, split_of
from pair_models import pairs as few_words
from refusal import refuse, refuse_build
from text_files import write_records


def read(path: Path, *names: str) -> list[str]:
    return read_documents([str(path / name) for name in names] or [str(path)], root=path, where="text")


def test_the_same_text_in_any_format_is_the_same_documents(tmp_path: Path) -> None:
    texts = [f"document {number}" for number in range(30)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text, "id": 1}) for text in texts))
    parquet.write_table(pa.table({"text": texts[::-1]}), tmp_path / "b.parquet")
    folder = tmp_path / "c"
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text + "\n")
    assert read(tmp_path, "a.jsonl") == read(tmp_path, "b.parquet") == read(tmp_path, "c")
    assert read(tmp_path, "a.jsonl", "b.parquet") == read(tmp_path, "a.jsonl")  # exact duplicates once


@given(st.text(min_size=1))
def test_a_split_depends_on_the_text_alone(text: str) -> None:
    assert split_of(text) == split_of(f"  {text.strip()}\n")
    assert digest_of(text) == digest_of(text + " ")


def test_splits_are_disjoint_and_about_eight_to_one_to_one() -> None:
    documents = [f"text {number}" for number in range(3_000)]
    parts = [documents_of_split(documents, split) for split in ("fit", "select", "report")]
    assert sorted(document for part in parts for document in part) == sorted(documents)
    assert [round(len(part) / 300) for part in parts] == [8, 1, 1]


def test_encode_keeps_documents_apart_and_obeys_both_limits() -> None:
    tokenizer = character_tokenizer()
    sequences = encode(tokenizer, ["a" * 25, "b" * 7, "c" * 50], max_tokens=40, sequence_length=10)
    assert [len(sequence.ids) for sequence in sequences] == [10, 10, 5, 7, 8]
    assert all(len(set(sequence.ids)) == 1 for sequence in sequences)


@settings(deadline=None)
@given(st.lists(st.integers(2, 40), min_size=1, max_size=30), st.integers(1, 200))
def test_batches_hold_every_token_once(lengths: list[int], tokens: int) -> None:
    sequences = [TokenSequence(tuple(range(1000 * row, 1000 * row + length))) for row, length in enumerate(lengths)]
    seen: dict[int, torch.Tensor] = {}
    for batch in make_batches(sequences, tokens=tokens):
        assert batch.input_ids.shape == batch.mask.shape
        assert len(batch.rows) == 1 or batch.input_ids.numel() <= tokens
        for place, row in enumerate(batch.rows):
            assert row not in seen
            seen[row] = batch.input_ids[place][batch.mask[place]]
            assert (batch.input_ids[place][~batch.mask[place]] == 0).all()
    assert {row: tuple(ids.tolist()) for row, ids in seen.items()} == {row: s.ids for row, s in enumerate(sequences)}


def test_which_text_is_of_the_other_kind(tmp_path: Path) -> None:
    pairs = write_records(tmp_path / "pairs.jsonl", few_words(3))
    plain = write_records(tmp_path / "plain.jsonl", ["some plain words"])
    for specs in ([pairs, plain], [plain, pairs]):
        with pytest.raises(TextError, match="pairs and plain text") as caught:
            read_documents(specs, root=tmp_path, where="--text")
        assert f"pairs in {pairs}, plain text in {plain}: " in str(caught.value.found)


def test_a_damaged_table_is_not_told_to_name_its_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": ["some words"] * 2_000}), path, compression="none", use_dictionary=False)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TextError, match="cannot be read") as caught:
        read_documents(["a.parquet"], root=tmp_path, where="--text")
    assert "damaged" in str(caught.value.remedy)
    parquet.write_table(pa.table({"body": ["some words"]}), path)
    with pytest.raises(TextError, match="no 'text'") as caught:
        read_documents(["a.parquet"], root=tmp_path, where="--text")
    assert caught.value.found == "the columns body" and "such columns" in str(caught.value.expected)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda recipe: recipe["experts"][1].update(text="./gone.jsonl"), "experts[1] 'law': text"),
        (lambda recipe: recipe.update(eval={"news": "./gone.jsonl"}), "eval.news"),
    ],
)
def test_plan_and_build_refuse_the_same_text(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Any]], None], where: str
) -> None:
    """Also one that the router does not read: an evaluation would."""
    change(workshop.recipe)
    monkeypatch.setattr("modekit.building.build.staging", None)
    for message in (refuse("plan", workshop.write()), refuse_build(workshop)):
        assert "the text does not exist" in message and where in message
