"""Errors say which of several texts it is, and what was meant; what plan refuses, build refuses, too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from conftest import Workshop
from modekit.errors import TextError
from modekit.text.documents import read_documents
from pair_models import pairs as few_words
from refusal import refuse, refuse_build
from text_files import write_records


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
