"""`text: self`: what experts write, against what, and that it is kept, gone on with, and read like any other text."""

from __future__ import annotations

import base64
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from chatting import word_tokenizer
from command_line import ended
from conftest import DOMAINS, Workshop, logits_of, tiny_model
from modekit.building.text import write_texts
from modekit.checkpoint.open import open_checkpoint
from modekit.errors import OutputError, RecipeError, SourceError, TextError
from modekit.evaluation.evaluate import evaluate
from modekit.loaded.sampling import Script, Writer, read_texts
from modekit.planning.make import make_plan
from modekit.recipes.paths import from_folder
from modekit.recipes.read import load_recipe, parse_recipe
from modekit.routing import write_text
from modekit.routing.fit import refit
from modekit.routing.token_text import load_token_text
from modekit.run import QUIET, Run
from modekit.text import written
from modekit.text.held_out import RecipeTexts, fit_documents
from modekit.text.written import AGAINST, DOCUMENT_TOKENS, Written, read_written, texts_of, written_file
from refusal import tree

pytestmark = pytest.mark.usefixtures("short_tables")

BEGIN, END = 1, 2
LEXICAL = {"method": "routing", "top_k": 1, "router": {"fit": "lexical"}}


@pytest.fixture
def bench(tmp_path: Path, small_workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    """Three experts and the base, which write; few and short documents, eight at a time."""
    for name in ("_MOST_DOCUMENTS", "_FEWEST_DOCUMENTS"):
        monkeypatch.setattr(written, name, 40)
    monkeypatch.setattr(write_text, "rows_at_once", lambda model, tokens: 8)
    for name in ("base", *DOMAINS[:2]):
        shutil.copytree(small_workshop.root / name, tmp_path / name)
    experts = [{"name": name, "model": f"./{name}", "text": "self"} for name in DOMAINS[:2]]
    experts.append({"name": "general", "model": "base", "text": "self"})
    said = {"base_model": "./base", "experts": experts, "mixture": LEXICAL, "output": {"format": "plain"}}
    return Workshop(tmp_path, said)


def write(shop: Workshop, run: Run = QUIET, **changes: Any) -> dict[str, Path]:
    """Let the experts write; the files by their names."""
    recipe = load_recipe(shop.write(**changes))
    write_texts(make_plan(recipe, shop.root), run)
    return {expert.name: written_file(expert, shop.root) for expert in recipe.experts}


def made_of(file: Path) -> Written:
    known = read_written(file)
    assert known is not None
    return known


def expected_of(file: Path) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(made_of(file).expected)), dtype=torch.float32)


def sampled(model: Any, base: Any, against: float, tokens: int = 12, rows: int = 4) -> list[list[list[int]]]:
    writer = Writer(model, base, against, ends={END}, vocabulary=96)
    return writer.write(Script(((BEGIN,),), (tokens,)), rows, seed=3)


def test_a_text_is_drawn_by_the_formula_without_a_cache() -> None:
    model, base = tiny_model(num_hidden_layers=2), tiny_model(seed=1, num_hidden_layers=2)
    draw, ids = torch.Generator().manual_seed(3), torch.full((4, 1), BEGIN)
    for _ in range(12):
        own, of_base = (logits_of(each, ids)[:, -1].log_softmax(-1) for each in (model, base))
        mixed = (2 * own - of_base).masked_fill(own < own.amax(-1, keepdim=True) + math.log(0.01), -math.inf)
        ids = torch.cat([ids, torch.multinomial(mixed.softmax(-1), 1, generator=draw)], 1)
    rows = [row[1:] for row in ids.tolist()]
    assert [parts[0] for parts in sampled(model, base, 1.0)] == [row[: row.index(END)] if END in row else row for row in rows]


def test_what_a_model_expects_of_texts_is_its_probabilities_and_their_sum() -> None:
    model, ids = tiny_model(num_hidden_layers=1), torch.randint(50, 96, (6, 9), generator=torch.Generator().manual_seed(1))
    expected, found = read_texts(model, ids, 90)
    logs = logits_of(model, ids)[:, :-1].log_softmax(-1)
    torch.testing.assert_close(expected, logs.exp().sum((0, 1))[:90])
    torch.testing.assert_close(found, logs.gather(-1, ids[:, 1:, None])[..., 0])


def test_experts_write_and_the_base_as_it_is(bench: Workshop) -> None:
    files = write(bench)
    for name, file in files.items():
        known = made_of(file)
        assert known.documents == 40
        assert known.made.against == (0.0 if name == "general" else AGAINST)
        assert {key.partition("/")[0] for key in known.made.models} == ({"base"} if name == "general" else {"base", "expert"})
        documents = [json.loads(line)["text"] for line in file.read_text().splitlines()]
        assert 30 <= len(documents) <= 40 and max(map(len, documents)) < 2 * DOCUMENT_TOKENS  # a space between two
    before = tree(bench.root)
    write(bench)
    assert tree(bench.root) == before


def test_a_kill_costs_one_batch_and_changes_nothing(bench: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(bench)["law"]
    whole = file.read_bytes()
    file.unlink()
    kept = write_text.keep_written
    calls = 0

    def killed(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        kept(*args)

    monkeypatch.setattr(write_text, "keep_written", killed)
    with pytest.raises(KeyboardInterrupt):
        write(bench)
    assert made_of(file).documents == 16
    with file.open("a") as stream:  # of a kill between text and record
        stream.write('{"id": "16", "text": "not counted"}\n')
    calls = 10
    write(bench)
    assert file.read_bytes() == whole
    assert calls == 13


def test_another_model_writes_anew(bench: Workshop) -> None:
    files = write(bench)
    law, code = files["law"].read_bytes(), files["medicine"].read_bytes()
    weights = load_file(bench.root / "law" / "model.safetensors")
    save_file(
        {name: tensor * 1.5 for name, tensor in weights.items()}, bench.root / "law" / "model.safetensors", {"format": "pt"}
    )
    write(bench)
    assert files["law"].read_bytes() != law
    assert files["medicine"].read_bytes() == code


def test_the_routers_seed_is_that_of_the_text(bench: Workshop) -> None:
    files = write(bench)
    before = {name: (file.read_bytes(), expected_of(file)) for name, file in files.items()}
    write(bench, mixture={**LEXICAL, "router": {"fit": "lexical", "seed": 1}})
    for name, file in files.items():
        assert made_of(file).made.seed == 1
        assert file.read_bytes() != before[name][0]
        assert not torch.equal(expected_of(file), before[name][1])  # of what all read, which another seed draws, too
    write(bench)
    assert {name: file.read_bytes() for name, file in files.items()} == {name: text for name, (text, _) in before.items()}


def test_a_model_that_computes_no_numbers_ends_in_one_message(bench: Workshop) -> None:
    weights = load_file(bench.root / "law" / "model.safetensors")
    weights["model.norm.weight"].fill_(math.nan)
    save_file(weights, bench.root / "law" / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match="NaN") as raised:
        write(bench)
    assert "experts[1] 'law'" in str(raised.value) and "./law" in str(raised.value)


def test_a_folder_that_takes_nothing_ends_in_one_message(bench: Workshop) -> None:
    (bench.root / "self-text").symlink_to(bench.root / "law")
    with pytest.raises(OutputError, match="beside the recipe"):
        write(bench)
    assert not list((bench.root / "law").glob("*.jsonl"))


def make_chatting(bench: Workshop) -> None:
    for name in ("base", *DOMAINS[:2]):
        word_tokenizer().save_pretrained(bench.root / name)
        model = tiny_model(seed=len(name), num_hidden_layers=1, vocab_size=len(word_tokenizer()))
        model.save_pretrained(bench.root / name)


def test_a_quarter_is_chats_however_many_are_written_at_once(bench: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    make_chatting(bench)
    monkeypatch.setattr(write_text, "rows_at_once", lambda model, tokens: 40)
    lines = [json.loads(line) for line in write(bench)["law"].read_text().splitlines()]
    assert 5 <= sum("messages" in line for line in lines) <= 10 < len(lines)


def test_a_chat_model_writes_questions_with_answers(bench: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_text, "CHATS", 1)
    make_chatting(bench)
    lines = [json.loads(line) for line in write(bench)["law"].read_text().splitlines()]
    assert lines and all([each["role"] for each in line["messages"]] == ["user", "assistant"] for line in lines)
    assert not any("<|im" in message["content"] for line in lines for message in line["messages"])


def test_a_build_writes_fits_and_evaluates(bench: Workshop) -> None:
    assert any("text of medicine, law, general: the models write it" in note for note in bench.plan().notes)
    assert not (bench.root / "self-text").exists()
    checkpoint = open_checkpoint(bench.build())
    results = evaluate(checkpoint, tokens_per_domain=300, sequence_length=64, write=False)
    notes = " ".join(results.notes)
    assert "text written by medicine: " in notes and "no real text of medicine, law, general" in notes
    kept = {name: load_token_text(checkpoint.folder / "router" / f"{name}.safetensors", 96) for name in checkpoint.names}
    for name, expert in zip(checkpoint.names, checkpoint.record.recipe.experts, strict=True):
        text = kept[name]
        assert text is not None and text.expected_V is not None
        assert torch.equal(text.expected_V, expected_of(written_file(expert, bench.root)))
    own, base = results.row("law").scores["law"], results.row("base").scores["law"]
    assert own.loss < base.loss
    before = tree(bench.root / "self-text")
    shutil.rmtree(bench.root / "self-text")
    with pytest.raises(TextError, match="writes itself is not there"):
        evaluate(checkpoint, tokens_per_domain=300, sequence_length=64, write=False)
    refit(checkpoint, {"router": {"temperature": 0.5}})
    assert tree(bench.root / "self-text") == before


@pytest.mark.parametrize("kept", [3, 15])
def test_who_wrote_little_is_said(bench: Workshop, monkeypatch: pytest.MonkeyPatch, kept: int) -> None:
    """A model that ends most texts before their first word; with next to none no router is set."""
    calls = iter(range(40))

    def document(author: Any, parts: Any) -> str | None:
        place = next(calls) if author.name == "law" else 0
        return f"The licence {parts}" if place < kept else None

    monkeypatch.setattr(write_text._Author, "_document", document)
    code, after, before = ended("build", bench.write(), bench.root / "OUT")
    assert "law, general: the models write it" in before and "the models write it" not in after
    if kept < 8:
        assert code == 2 and "experts[1] 'law': text" in before and "3 of 40 documents have text" in before
        assert not (bench.root / "OUT").exists()
        return
    assert code == 0 and "note: law wrote only 15 of 40 documents, the others are empty" in after
    notes = " ".join(evaluate(open_checkpoint(bench.root / "OUT"), tokens_per_domain=64, write=False).notes)
    assert "text written by law: 15 documents" in notes and "text written by medicine: 40 documents" in notes


def test_what_was_written_is_split_like_any_text(bench: Workshop) -> None:
    files = write(bench)
    recipe = load_recipe(bench.write())
    texts = RecipeTexts(recipe, bench.root)
    own = texts.own(1)
    assert own is not None
    fit = fit_documents(recipe.experts[1], bench.root, 1)
    assert len(fit) < len(own.documents) == len(set(files["law"].read_text().splitlines()))
    assert not set(map(str, fit)) & set(map(str, own.split("report")))


def test_a_recipe_says_self_alone_and_keeps_it_elsewhere(tmp_path: Path) -> None:
    expert = {"name": "law", "adapter": "./law", "text": "self"}
    said = {"base_model": "./base", "experts": [expert]}
    (tmp_path / "self").mkdir()
    assert from_folder(said, tmp_path, tmp_path / "below")["experts"][0]["text"] == "self"
    recipe = parse_recipe(said, where="here")
    assert recipe.experts[0].writes_text and texts_of(recipe.experts[0])[0].startswith("./self-text/law-")
    with pytest.raises(RecipeError, match="cannot be combined"):
        parse_recipe({**said, "experts": [{**expert, "text": ["self", "./law.jsonl"]}]}, where="here")


@pytest.mark.parametrize(("begin", "wanted"), [(None, "<end>"), ("<end>", "<end>"), ("<begin>", "<begin>")])
def test_a_text_begins_with_a_beginning_that_is_no_end(begin: str | None, wanted: str) -> None:
    """A model that reads an end first has nothing to say."""
    words = Tokenizer(WordLevel({"<end>": 0, "<begin>": 1, "a": 2}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", bos_token=begin)
    assert write_text._beginning(tokenizer) == tokenizer.convert_tokens_to_ids(wanted)
