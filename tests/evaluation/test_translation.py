"""`modekit eval-translation`: what is written, how it is scored, what is shown, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sacrebleu.metrics import BLEU, CHRF
from tokenizers import decoders, processors
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from command_line import modekit
from conftest import Workshop
from damage import load_with_nan
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.open import open_checkpoint
from modekit.cli.mixtures import show_build
from modekit.errors import CheckpointError, MismatchError, ModekitError, TextError
from modekit.evaluation.domains import held_out_texts
from modekit.evaluation.translation.evaluate import Scorer, evaluate_translation, first_token, translated
from modekit.evaluation.translation.results import Decoding, TranslationResults, TranslationScore
from modekit.loaded.load import load_model, load_tokenizer
from modekit.text.sequences import encode
from pair_models import pair_model, pair_tokenizer, pairs

EXPERTS = ("news", "law", "songs")
SHORT = Decoding(beams=2, batch=3, max_new_tokens=8)


def write_pairs(path: Path, number: int, *, unseen: bool = False) -> None:
    said = pairs(4) if unseen else pairs(24)
    lines = [json.dumps({"source": f"{number} {pair.source}", "target": f"{number} {pair.target}"}) for pair in said]
    path.write_text("\n".join(lines) + "\n")


def tokenizer_of() -> PreTrainedTokenizerFast:
    """The pairs' tokenizer, that writes characters without blanks between them."""
    tokenizer = pair_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    return tokenizer


def writer(model_type: str, seed: int) -> PreTrainedModel:
    """A random model that does not say one token for ever, whose sources matter, and that ends sometimes."""
    model = pair_model(model_type, seed, tie_word_embeddings=False, decoder_start_token_id=1)
    with torch.no_grad():
        head = model.lm_head.weight
        head.copy_(torch.randn(head.shape, generator=torch.Generator().manual_seed(seed)) * 0.5)
        head[2] *= 1.5
        for name, parameter in model.named_parameters():
            if ("encoder_attn" in name or "EncDecAttention" in name) and parameter.ndim == 2:
                parameter.mul_(4.0)
    return model


def make_shop(root: Path, model_type: str = "t5") -> Workshop:
    """Base and three experts, each with pairs, and one domain without an expert."""
    for seed, name in enumerate(("base", *EXPERTS)):
        # Files of Bart and its like hold one embedding for source and target alone where the head is the same, too.
        model = writer(model_type, seed) if model_type == "t5" else pair_model(model_type, seed)
        model.save_pretrained(root / name)
        tokenizer_of().save_pretrained(root / name)
        write_pairs(root / f"{name}.jsonl", seed, unseen=name == "base")
    experts = [{"name": name, "model": f"./{name}"} for name in EXPERTS]
    experts[-1]["text"] = "./songs.jsonl"
    return Workshop(
        root,
        {
            "base_model": "./base",
            "experts": experts,
            "eval": {"news": "./news.jsonl", "law": "./law.jsonl", "mail": "./base.jsonl"},
            "mixture": {"method": "routing", "top_k": 1, "router": {"fit": "random", "seed": 1}},
        },
    )


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return make_shop(tmp_path_factory.mktemp("translate"))


@pytest.fixture(scope="module")
def checkpoint(shop: Workshop) -> Checkpoint:
    return open_checkpoint(shop.build("OUT"))


@pytest.fixture(scope="module")
def results(checkpoint: Checkpoint) -> TranslationResults:
    return evaluate_translation(checkpoint, pairs=5, decoding=SHORT)


def by_hand(checkpoint: Checkpoint, domain: str, expert: int | None, base: Path | None = None) -> tuple[list[str], list[str]]:
    """Translations one by one with `generate` itself, and their references."""
    model, tokenizer = load_model(base or checkpoint.folder), load_tokenizer(checkpoint.folder)
    if expert is not None:
        model.use_expert(expert)
    (held,) = (each for each in held_out_texts(checkpoint) if each.name == domain)
    texts, references = [], []
    for pair in held.documents[:5]:
        ids = torch.tensor([tokenizer(pair.source)["input_ids"]])
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), num_beams=2, max_new_tokens=8)
        texts.append(tokenizer.decode(out[0], skip_special_tokens=True).strip())
        references.append(pair.target)
    return texts, references


def test_scores_are_those_of_sacrebleu(checkpoint: Checkpoint, shop: Workshop, results: TranslationResults) -> None:
    wanted = [("base", "news", None, shop.root / "base"), ("law", "mail", 1, None), ("mixture", "law", None, None)]
    for name, domain, expert, base in wanted:
        texts, references = by_hand(checkpoint, domain, expert, base)
        bleu, chrf = BLEU(), CHRF()
        expected = TranslationScore(bleu.corpus_score(texts, [references]).score, chrf.corpus_score(texts, [references]).score)
        assert results.row(name).scores[domain] == expected, name
        assert results.signature == f"{bleu.get_signature()}; {chrf.get_signature()}"
    assert len({json.dumps(row["domains"]["law"]) for row in results.as_data()["rows"]}) > 3  # every row is another model
    near = ["the court hears both of the parties today", "nobody signed that deed"]
    said = ["the court hears both parties of the claim today", "nobody has signed that deed"]
    score = Scorer().corpus(near, said)
    assert score.bleu == BLEU().corpus_score(near, [said]).score > 20 and score.chrf == CHRF().corpus_score(near, [said]).score


def test_the_oracle_is_every_domains_own_expert(checkpoint: Checkpoint, results: TranslationResults) -> None:
    oracle = results.row("oracle")
    assert set(oracle.scores) == set(EXPERTS) == set(results.domains) and results.unseen == ["mail"]
    for name in EXPERTS:
        assert oracle.scores[name] == results.row(name).scores[name]
    assert [row.name for row in results.rows] == ["base", *EXPERTS, "oracle", "mixture"]
    mixture = results.row("mixture")
    assert (mixture.total_parameters, mixture.active_parameters) == (checkpoint.parameters.total, checkpoint.parameters.active)
    assert results.row("base").total_parameters == results.row("law").active_parameters == checkpoint.parameters.dense


@pytest.mark.parametrize("beams", [1, 3])
def test_neither_batch_nor_padding_changes_a_translation(beams: int) -> None:
    model, tokenizer = writer("t5", 3), tokenizer_of()
    read = encode(tokenizer, pairs(9), max_tokens=10_000, sequence_length=512)
    assert len({len(each.ids) for each in read}) > 3
    alone = [translated(model, tokenizer, [each], Decoding(beams, 1, 12))[0] for each in read]
    assert len(set(alone)) > 3
    for batch in (4, 9):
        assert translated(model, tokenizer, read, Decoding(beams, batch, 12)) == alone


def asked(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, begins: int | None) -> GenerationConfig:
    """How a model was made to write."""
    found: list[GenerationConfig] = []
    real = type(model)._prepare_generation_config
    kept = lambda self, *some, **more: (found.append((made := real(self, *some, **more))[0]), made)[1]  # noqa: E731
    monkeypatch.setattr(type(model), "_prepare_generation_config", kept)
    read = encode(tokenizer_of(), pairs(2), max_tokens=999, sequence_length=99)
    assert all(translated(model, tokenizer_of(), read, Decoding(1, 2, 7), begins=begins))
    return found[0]


def test_a_models_own_settings_are_left_aside_but_for_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pair_model("marian")
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=9.0,
        min_length=9,
        num_beams=4,
        bad_words_ids=[[4]],
        forced_eos_token_id=2,
        max_length=3,
        pad_token_id=0,
        eos_token_id=[2, 3],
        decoder_start_token_id=0,
        length_penalty=5.0,
        no_repeat_ngram_size=1,
    )
    settings = asked(model, monkeypatch, 6)
    assert settings.bad_words_ids == [[4]] and settings.eos_token_id == [2, 3] and settings.forced_eos_token_id == 2
    assert (settings.do_sample, settings.num_beams, settings.max_new_tokens, settings.min_length) == (False, 1, 7, 0)
    assert (settings.length_penalty, settings.no_repeat_ngram_size) == (1.0, 0) and settings.forced_bos_token_id == 6
    model.generation_config.forced_bos_token_id = 7
    assert asked(model, monkeypatch, 8).forced_bos_token_id == 7


def test_a_language_that_begins_every_target_begins_every_translation(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_of()
    read = encode(tokenizer, pairs(4), max_tokens=999, sequence_length=99)
    assert first_token(tokenizer, read) is None
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("</s>", 2), ("<s>", 1)]
    )
    begins = first_token(tokenizer, encode(tokenizer, pairs(4), max_tokens=999, sequence_length=99))
    assert begins == 1 and asked(pair_model("m2m_100"), monkeypatch, begins).forced_bos_token_id == 1


def test_what_is_written_is_what_was_found(checkpoint: Checkpoint, results: TranslationResults) -> None:
    said = json.loads((checkpoint.folder / "results" / "translate.json").read_text())
    assert said == json.loads(json.dumps(results.as_data())) and said["checkpoint"] == checkpoint.identity
    assert said["decoding"]["beams"] == 2
    table = (checkpoint.folder / "results" / "translate.md").read_text()
    assert "translated with 2 beams, at most 8 tokens each" in table and "| model | news |" in table
    assert "pairs: news 5, law 5, songs" in table and "mail 4" in table


def test_pairs_that_are_too_long_are_left_out(tmp_path: Path) -> None:
    shop = make_shop(tmp_path, "bart")
    long = [{"source": "a" * 200, "target": "b"}, {"source": "a", "target": "b"}]
    (tmp_path / "base.jsonl").write_text("\n".join(map(json.dumps, long)))
    checkpoint = open_checkpoint(shop.build("OUT"))
    found = evaluate_translation(checkpoint, pairs=2, decoding=Decoding(1, 2, 999))
    assert found.decoding.max_new_tokens == 128
    assert any("mail: 1 pairs left out" in note for note in found.notes)
    (tmp_path / "base.jsonl").write_text(json.dumps(long[0]))
    with pytest.raises(TextError, match="no held-out pair fits into the model"):
        evaluate_translation(checkpoint, pairs=2)


def test_what_is_refused(shop: Workshop, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "plain.jsonl").write_text("\n".join(json.dumps({"text": f"plain {number}"}) for number in range(9)))
    plain = open_checkpoint(shop.build("PLAIN", eval={"mail": str(tmp_path / "plain.jsonl"), "law": "./law.jsonl"}))
    with pytest.raises(TextError, match="must be pairs of source and target"):
        evaluate_translation(plain)
    bare: list[dict[str, Any]] = [{"name": name, "model": f"./{name}"} for name in EXPERTS]
    with pytest.raises(TextError, match="there is no text to evaluate on"):
        evaluate_translation(open_checkpoint(shop.build("BARE", experts=bare, eval={})))
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(ModekitError, match=r"pip install 'modekit\[translation\]'"):
        evaluate_translation(checkpoint)


def test_a_mixture_without_an_encoder_translates_nothing(small_workshop: Workshop) -> None:
    with pytest.raises(MismatchError, match="only a model with an encoder translates"):
        evaluate_translation(open_checkpoint(small_workshop.build("NO-ENCODER")))


def test_the_command_line(checkpoint: Checkpoint) -> None:
    folder = str(checkpoint.folder)
    options = ("--pairs", "2", "--max-new-tokens", "4", "--batch", "2")
    shown = modekit("eval-translation", folder, *options)
    assert "translated greedily, at most 4 tokens" in shown and "oracle" in shown and "nrefs:1" in shown
    assert "translate.json, translate.md" in shown
    data = json.loads(modekit("eval-translation", folder, *options, "--beams", "2", "--json"))
    assert data["decoding"]["beams"] == 2 and len(data["rows"]) == 6


def test_what_comes_next_is_what_runs_a_model_with_an_encoder(
    checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    show_build(checkpoint.folder, lambda _run: checkpoint)
    said = " ".join(capsys.readouterr().out.split())
    assert f"modekit eval-translation {checkpoint.folder}" in said and "modekit chat" not in said


def test_a_model_of_nan_has_no_score(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modekit.evaluation.rows.load_model", load_with_nan)
    with pytest.raises(CheckpointError, match="not finite"):
        evaluate_translation(checkpoint, pairs=2, decoding=SHORT)
