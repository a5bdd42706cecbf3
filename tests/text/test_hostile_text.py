"""Text that a stranger made to break or to stall: read within limits, or refused by domain and file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from conftest import character_tokenizer
from modekit.errors import TextError
from modekit.recipes.read import parse_recipe
from modekit.text import sequences
from modekit.text.documents import read_documents
from modekit.text.held_out import RecipeTexts
from modekit.text.sequences import encode
from mutations import limited

WORDS = "The court said that the licence was void; naïve clauses — 12,345 of them — don't bind 法律 anyone.\n\n\tNo (really) "
TEXTS = [WORDS * 200, WORDS.replace(" ", "") * 200, "a" * 30_000, "\n".join(WORDS) * 90]


def trained(kind: str) -> PreTrainedTokenizerFast:
    """An ordinary tokenizer: byte-level BPE, Unigram with marked spaces, WordPiece in lower case."""
    if kind == "bpe":
        tokenizer, trainer = Tokenizer(models.BPE()), trainers.BpeTrainer(vocab_size=300, show_progress=False)
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    elif kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(vocab_size=120, show_progress=False, unk_token="<unk>", special_tokens=["<unk>"])
        tokenizer.pre_tokenizer, tokenizer.normalizer = pre_tokenizers.Metaspace(), normalizers.NFKC()
    else:
        tokenizer, trainer = (
            Tokenizer(models.WordPiece(unk_token="<unk>")),
            trainers.WordPieceTrainer(vocab_size=150, show_progress=False, special_tokens=["<unk>"]),
        )
        tokenizer.pre_tokenizer, tokenizer.normalizer = pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer()
    tokenizer.train_from_iterator([WORDS] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=None if kind == "bpe" else "<unk>")


@pytest.mark.parametrize("kind", ["bpe", "unigram", "wordpiece", "characters"])
@pytest.mark.parametrize("text", TEXTS, ids=["words", "no blanks", "one letter", "a letter a line"])
def test_the_beginning_of_a_long_text_is_cut_into_the_same_sequences(
    kind: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = character_tokenizer() if kind == "characters" else trained(kind)
    for wanted in (2, 50, 700):
        whole = encode(tokenizer, [text, "and more of it"], max_tokens=wanted, sequence_length=64)
        monkeypatch.setattr(sequences, "_LONG", 2_000)
        assert encode(tokenizer, [text, "and more of it"], max_tokens=wanted, sequence_length=64) == whole
        monkeypatch.undo()


def test_twenty_megabytes_on_one_line_cost_what_is_wanted(tmp_path: Path) -> None:
    tokenizer = trained("bpe")
    for text in ("court waiver " * 1_600_000, "a" * 20_000_000):
        (tmp_path / "law.jsonl").write_text(f'{{"text": "{text}"}}\n')
        with limited():
            documents = read_documents(["law.jsonl"], root=tmp_path, where="law")
            found = encode(tokenizer, documents, max_tokens=500, sequence_length=128)
        assert sum(len(each.ids) for each in found) == 500


def test_pipes_and_devices_are_not_waited_for(tmp_path: Path) -> None:
    for suffix in (".txt", ".jsonl", ".parquet", ".md"):
        path = tmp_path / f"law{suffix}"
        os.mkfifo(path)
        with limited(), pytest.raises(TextError, match=f"law{suffix}"):
            read_documents([path.name], root=tmp_path, where="law")
        path.unlink()
        path.symlink_to("/dev/zero")
        with limited(), pytest.raises(TextError):
            read_documents([path.name], root=tmp_path, where="law")


def test_a_list_of_documents_that_cannot_be_read(tmp_path: Path) -> None:
    expert = {"name": "law", "model": "./law", "prompts": ["x"]}
    recipe = parse_recipe({"base_model": "./base", "experts": [expert], "mixture": {"router": {"fit": "random"}}})
    path = tmp_path / "trained-on.txt"
    assert RecipeTexts(recipe, tmp_path, models=[tmp_path])
    os.mkfifo(path)
    with limited(), pytest.raises(TextError, match=r"trained-on\.txt"):
        RecipeTexts(recipe, tmp_path, models=[tmp_path])
    path.unlink()
    path.write_bytes(b"\xff")
    with pytest.raises(TextError, match=r"trained-on\.txt"):
        RecipeTexts(recipe, tmp_path, models=[tmp_path])


def test_folders_that_lead_in_circles(tmp_path: Path) -> None:
    (tmp_path / "text" / "more").mkdir(parents=True)
    (tmp_path / "text" / "a.txt").write_text("court")
    (tmp_path / "text" / "more" / "b.md").write_text("waiver")
    (tmp_path / "text" / "more" / "round").symlink_to(tmp_path / "text")
    (tmp_path / "text" / "loop.txt").symlink_to("loop.txt")
    (tmp_path / "text" / "gone.txt").symlink_to("nowhere")
    (tmp_path / "text" / "c.txt").symlink_to(tmp_path / "text" / "a.txt")
    os.mkfifo(tmp_path / "text" / "pipe.txt")
    with limited():
        assert set(read_documents(["text"], root=tmp_path, where="law")) == {"court", "waiver"}
    (tmp_path / "round").symlink_to("round")
    for spec in ("round", "./round", "./round/x.txt"):
        with limited(), pytest.raises(TextError):
            read_documents([spec], root=tmp_path, where="law")


def test_folders_within_folders(tmp_path: Path) -> None:
    deepest = tmp_path.joinpath(*["d"] * 400)
    deepest.mkdir(parents=True)
    (deepest / "a.txt").write_text("court")
    with limited():
        assert read_documents(["."], root=tmp_path, where="law") == ["court"]


def test_a_pattern_that_finds_no_end_is_no_bug_of_modekit() -> None:
    tokenizer = character_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    with pytest.raises(TextError, match="cannot cut a text into tokens") as caught:
        encode(tokenizer, ["a" * 60 + "b"], max_tokens=500, sequence_length=128)
    assert "tokenizer.json" in str(caught.value)
