"""Models with different numbers of tokens in one mixture. Oracles: each model's own logits, and PEFT's merged models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from adapter_folders import quiet
from conftest import VOCAB, Workshop, character_tokenizer, logits_of, tiny_model, write_text
from members.test_come_and_go import check_same
from modekit.building.verify import is_proven, verify
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.open import open_checkpoint
from modekit.checkpoint.sources import why_not
from modekit.errors import MismatchError, ModekitError
from modekit.evaluation.evaluate import evaluate
from modekit.evaluation.rows import row_jobs
from modekit.loaded.experts import load_expert, load_expert_source
from modekit.loaded.load import load_model
from modekit.loaded.shapes import mixture_of
from modekit.members.change import write_change
from modekit.members.edits import NewExpert, add_expert, remove_expert, replace_expert
from modekit.planning.make import make_plan
from modekit.planning.plan import Plan
from modekit.recipes.read import parse_recipe
from modekit.routing.token_text import load_token_text
from modekit.run import QUIET

pytestmark = pytest.mark.usefixtures("short_tables")

CHAT = ("<|im_start|>", "<|im_end|>")
SAID = {"role": "user", "content": "what is fever"}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WHOLE: dict[str, Any] = {
    "modules": "all",
    "top_k": 1,
    "router": {"fit": "lexical", "orders": [1, 2], "buckets": 512, "chat": False},
}
RANDOM: dict[str, Any] = {"top_k": 1, "router": {"fit": "random"}}
SEEDS = {"base": 0, "law": 1, "code": 2}


def save(folder: Path, seed: int, tokens: tuple[str, ...] = (), rows: int | None = None, **overrides: Any) -> Path:
    """A model with these tokens behind the 96 that all have; `rows` of its embedding, as many as tokens by default."""
    rows = VOCAB + len(tokens) if rows is None else rows
    tiny_model(seed=seed, **{"num_hidden_layers": 1, "vocab_size": rows, **overrides}).save_pretrained(folder)
    tokenizer = character_tokenizer()
    if tokens:
        tokenizer.add_tokens([*tokens], special_tokens=True)
        tokenizer.eos_token = tokens[-1]
        tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(folder)
    return folder


def shop_of(root: Path, mixture: dict[str, Any], **models: dict[str, Any]) -> Workshop:
    """A base and two experts; who is not named has 96 tokens."""
    for name, seed in SEEDS.items():
        save(root / name, seed, **models.get(name, {}))
    write_text(root / "text", ("law", "code"))
    experts = [{"name": name, "model": f"./{name}", "text": f"./text/{name}.jsonl"} for name in ("law", "code")]
    return Workshop(root, {"base_model": "./base", "experts": experts, "mixture": mixture})


def planned(shop: Workshop, **changes: Any) -> Plan:
    return make_plan(parse_recipe({**shop.recipe, **changes}), shop.root)


def built(shop: Workshop, **changes: Any) -> Checkpoint:
    checkpoint = open_checkpoint(shop.build(**changes))
    assert is_proven(checks := verify(checkpoint)), checks
    return checkpoint


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("model*.safetensors") for name, tensor in load_file(file).items()}


def some_ids(rows: int) -> torch.Tensor:
    return torch.randint(3, rows, (2, 16), generator=torch.Generator().manual_seed(4))


def written(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Greedy text after prompts of two lengths, the shorter one padded on the left, with a cache."""
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    ids = ids.masked_fill(mask == 0, 0)
    made = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    return made[:, ids.shape[1] :]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("larger", ["base", "law", "code"])
def test_an_expert_forced_is_its_own_model_on_the_tokens_that_it_has(tmp_path: Path, larger: str, tied: bool) -> None:
    every = {name: {"tie_word_embeddings": tied} for name in SEEDS}
    shop = shop_of(tmp_path, WHOLE, **{**every, larger: {"tokens": CHAT, "tie_word_embeddings": tied}})
    checkpoint = built(shop)
    assert checkpoint.vocabulary == VOCAB + 2 and checkpoint.config["eos_token_id"] == [97, 2]
    assert len(AutoTokenizer.from_pretrained(checkpoint.folder)) == VOCAB + 2
    model = load_model(checkpoint.folder)
    for place, name in enumerate(("law", "code")):
        rows = VOCAB + 2 * (name == larger)
        ids = some_ids(rows)
        with mixture_of(model, checkpoint).forced(place):
            assert torch.equal(logits_of(model, ids)[..., :rows], logits_of(tmp_path / name, ids))
            if name == larger:
                assert torch.equal(written(model, ids), written(load_model(tmp_path / name), ids))


def test_a_plain_checkpoint_has_the_rows_of_those_who_have_the_token(tmp_path: Path) -> None:
    shop = shop_of(tmp_path, {"top_k": 1, "router": {"fit": "lexical"}}, law={"tokens": CHAT}, code={"tokens": CHAT[:1]})
    shop.recipe["output"] = {"format": "plain", "carry": "ffn"}
    checkpoint = built(shop)
    assert checkpoint.shape.plain and checkpoint.vocabulary == VOCAB + 2
    found, base, law, code = (weights(shop.root / name) for name in ("OUT", "base", "law", "code"))
    for name in (EMBEDDING, HEAD):
        rows = found[name][:, :32]  # without the router's channels
        assert torch.equal(rows[:VOCAB], base[name]) and torch.equal(rows[97], law[name][97])
        both = (law[name][96].double() + code[name][96].double()) / 2
        assert torch.equal(rows[96], both.float())
    notes = " ".join(planned(shop).notes)
    assert "2 ('<|im_start|>' 96, '<|im_end|>' 97)" in notes and "mean of their rows" in notes
    assert "the tokenizer is that of experts[0] 'law'" in notes and "a text ends at '<|im_end|>' 97" in notes


def test_padding_rows_are_padding(tmp_path: Path) -> None:
    """The base has room for 104 tokens, of which it has 96; law uses 2 of it, in as few rows as that takes."""
    shop = shop_of(tmp_path, WHOLE, base={"rows": 104}, law={"tokens": CHAT}, code={"rows": 104})
    built(shop, mixture={**RANDOM})
    found, base, law = (weights(tmp_path / name) for name in ("OUT", "base", "law"))
    for name in (EMBEDDING, HEAD):
        assert torch.equal(found[name], torch.cat([base[name][:96], law[name][96:98], base[name][98:]]))
    checkpoint = built(shop)
    code, model, ids = weights(tmp_path / "code"), load_model(checkpoint.folder), some_ids(VOCAB)
    assert checkpoint.vocabulary == 104
    with mixture_of(model, checkpoint).forced(1):  # its padding gave way to law's tokens, and stays where nobody has one
        logits, own = logits_of(model, ids), logits_of(tmp_path / "code", ids)
        assert torch.equal(logits[..., :96], own[..., :96]) and torch.equal(logits[..., 98:], own[..., 98:])
    assert torch.equal(weights(checkpoint.folder)[f"{HEAD.removesuffix('.weight')}.experts.1.weight"][98:], code[HEAD][98:])


def test_padding_of_another_model_is_no_row_of_a_token(tmp_path: Path) -> None:
    shop = shop_of(tmp_path, RANDOM, law={"tokens": CHAT, "rows": 96}, code={"rows": 104})
    with pytest.raises(MismatchError, match="2 tokens that the model has no embedding for") as refused:
        planned(shop)
    assert "experts[0] 'law'" in str(refused.value)


def test_a_base_without_rows_for_special_tokens_of_its_own_is_as_it_was_published(tmp_path: Path) -> None:
    """As Gemma 3's of 1B, whose tokenizer has the token of pictures that its larger siblings read."""
    shop = shop_of(tmp_path, RANDOM, **{name: {"tokens": CHAT[:1], "rows": 96} for name in SEEDS})
    assert built(shop).vocabulary == 96
    path = tmp_path / "base" / "tokenizer.json"
    path.write_text(path.read_text().replace('"special": true', '"special": false'))
    with pytest.raises(MismatchError, match="1 tokens that the model has no embedding for"):
        planned(shop)


def test_more_rows_alone_change_neither_tokenizer_nor_end(tmp_path: Path) -> None:
    checkpoint = built(shop_of(tmp_path, RANDOM, law={"rows": 128}))
    assert checkpoint.vocabulary == 128 and checkpoint.config["eos_token_id"] == 2
    assert (checkpoint.folder / "tokenizer.json").read_bytes() == (tmp_path / "base" / "tokenizer.json").read_bytes()
    assert torch.equal(weights(checkpoint.folder)[EMBEDDING][96:], weights(tmp_path / "law")[EMBEDDING][96:])


@pytest.mark.parametrize("backbone", ["average", {"expert": "code"}])
def test_a_merged_backbone_has_rows_for_all(tmp_path: Path, backbone: Any) -> None:
    shop = shop_of(tmp_path, {**RANDOM, "backbone": backbone}, law={"tokens": CHAT, "rows": 104})
    checkpoint = built(shop)
    found, law, code = (weights(shop.root / name) for name in ("OUT", "law", "code"))
    assert checkpoint.vocabulary == 104
    for name in (EMBEDDING, HEAD):
        assert torch.allclose(found[name][96:], law[name][96:])
        if backbone == "average":
            assert torch.allclose(found[name][:96], (law[name][:96] + code[name]) / 2)


def adapter(base: Path, folder: Path, config: peft.PeftConfig, tokens: tuple[str, ...] = ()) -> PreTrainedModel:
    """An adapter that PEFT trains, with all that it learns random, beside its tokenizer; PEFT's merged model."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), character_tokenizer()
    if tokens:
        model.resize_token_embeddings(VOCAB + len(tokens), mean_resizing=False)
        tokenizer.add_tokens([*tokens], special_tokens=True)
    generator = torch.Generator().manual_seed(3)
    with quiet(), torch.no_grad():
        trained = peft.get_peft_model(model, config)
        for name, parameter in trained.named_parameters():
            if parameter.requires_grad or "lora_B" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
        trained.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return trained.merge_and_unload().eval()


def lora(**settings: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=4, target_modules=settings.pop("target_modules", ["up_proj"]), **settings)


ADAPTERS: dict[str, tuple[peft.LoraConfig, tuple[str, ...], bool]] = {
    "embedding and head saved": (lora(modules_to_save=["embed_tokens", "lm_head"]), CHAT, False),
    "embedding saved, one with the head": (lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True), CHAT, True),
    "resized alone": (lora(), CHAT, False),
    "low rank on head and embedding": (lora(target_modules=["up_proj", "lm_head", "embed_tokens"]), (), False),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_is_pefts_model(tmp_path: Path, case: str) -> None:
    """Beside an expert that has a third token, so that every adapter gets more rows than it has."""
    config, tokens, tied = ADAPTERS[case]
    ties = {"tie_word_embeddings": tied}
    shop = shop_of(tmp_path, WHOLE, base=ties, law={"tokens": (*CHAT, "<t>"), **ties})
    shutil.rmtree(tmp_path / "code")
    merged = adapter(tmp_path / "base", tmp_path / "code", config, tokens)
    shop.recipe["experts"][1] = {"name": "code", "adapter": "./code", "text": "./text/code.jsonl"}
    checkpoint = built(shop)
    rows = VOCAB + len(tokens)
    ids = some_ids(rows)
    expected, model = logits_of(merged, ids), load_model(checkpoint.folder)
    with mixture_of(model, checkpoint).forced(1):
        assert torch.allclose(logits_of(model, ids)[..., :rows], expected, atol=1e-4)
    alone = load_expert(tmp_path / "base", tmp_path / "code")
    assert torch.allclose(logits_of(alone, ids), expected, atol=1e-4)
    own = load_expert_source(checkpoint, 1)
    assert torch.allclose(logits_of(own, ids)[..., :rows], expected, atol=1e-4) and own.config.vocab_size == VOCAB + 3


def test_a_larger_expert_in_bits(tmp_path: Path) -> None:
    """Its rows are those after all models have theirs; the base on disk stays the one that was opened."""
    shop = shop_of(tmp_path, WHOLE, law={"tokens": CHAT})
    law, other = shop.recipe["experts"]
    checkpoint = built(shop, experts=[{**law, "bits": 8}, other])
    model = load_model(checkpoint.folder)
    for place, (name, rows) in enumerate((("law", VOCAB + 2), ("code", VOCAB))):
        assert why_not(checkpoint, place) is None
        with mixture_of(model, checkpoint).forced(place):
            assert torch.allclose(
                logits_of(model, some_ids(rows))[..., :rows], logits_of(tmp_path / name, some_ids(rows)), atol=0.05
            )


def test_a_plain_checkpoint_carries_whole_experts_that_have_more_tokens(tmp_path: Path) -> None:
    """The base, which the build runs, has fewer rows than the text that a checkpoint keeps may need."""
    shop = shop_of(tmp_path, {"top_k": 1, "router": {"fit": "lexical"}}, law={"tokens": CHAT})
    write_text(tmp_path / "text", ("medicine",))
    law = tmp_path / "text" / "law.jsonl"
    law.write_text(law.read_text().replace("licence", CHAT[1]))
    checkpoint = built(shop, output={"format": "plain", "carry": "all", "rank": 128})
    assert checkpoint.shape.plain and checkpoint.vocabulary == VOCAB + 2
    model, base = load_model(checkpoint.folder), load_model(tmp_path / "base")
    for place, name in enumerate(("law", "code")):
        own, ids = load_model(tmp_path / name), some_ids(VOCAB)
        with mixture_of(model, checkpoint).forced(place):
            forced = logits_of(model, ids)[..., :VOCAB]
        own_V, base_V = (logits_of(each, ids)[..., :VOCAB] for each in (own, base))
        assert (forced - own_V).square().mean() < 0.02 * (base_V - own_V).square().mean()
    law.unlink()
    kept = load_token_text(checkpoint.folder / "router" / "law.safetensors", checkpoint.vocabulary)
    assert kept is not None and any(97 in sequence.ids for sequence in kept.beginning(1000))
    save(tmp_path / "medicine", 3, num_hidden_layers=1)
    new = NewExpert({"model": "./medicine", "text": ["./text/medicine.jsonl"]}, tmp_path)
    grown = write_change(checkpoint, add_expert(checkpoint, "medicine", new), tmp_path / "GROWN")
    assert is_proven(checks := verify(grown)), checks


def test_an_adapter_of_which_a_native_mixture_keeps_the_tokens(tmp_path: Path) -> None:
    shop = shop_of(tmp_path, {**RANDOM, "backbone": {"expert": "code"}})
    shutil.rmtree(tmp_path / "code")
    adapter(tmp_path / "base", tmp_path / "code", lora(modules_to_save=["embed_tokens", "lm_head"]), CHAT)
    shop.recipe["experts"][1] = {"name": "code", "adapter": "./code"}
    built(shop, output={"format": "plain"})
    own = load_file(tmp_path / "code" / "adapter_model.safetensors")
    assert torch.equal(weights(tmp_path / "OUT")[EMBEDDING], own["base_model.model.model.embed_tokens.weight"])


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (lora(target_modules=["up_proj", "lm_head"]), ("different numbers of tokens", "modules_to_save")),
        (lora(target_modules=["up_proj", "embed_tokens", "lm_head"]), ("low-rank change", "merge_and_unload")),
    ],
)
def test_an_adapter_that_cannot_be_said_names_the_way_out(
    tmp_path: Path, config: peft.LoraConfig, words: tuple[str, ...]
) -> None:
    shop = shop_of(tmp_path, RANDOM)
    shutil.rmtree(tmp_path / "code")
    adapter(tmp_path / "base", tmp_path / "code", config, CHAT)
    shop.recipe["experts"][1] = {"name": "code", "adapter": "./code"}
    with pytest.raises(ModekitError) as caught:
        planned(shop)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("base", "law", "code", "words"),
    [
        ((), CHAT, ("<tool>", "<|im_end|>"), ("'<|im_start|>' (experts[0] 'law' 96", "'<tool>'", "leave one")),
        ((), CHAT, CHAT[::-1], ("'<|im_end|>' (experts[0] 'law' 97, expert 96)", "leave one")),
        (CHAT, ("<tool>",), (), ("differs from the base model's in 2 tokens", "'<|im_start|>' (base 96, expert -)")),
    ],
)
def test_one_id_with_two_tokens_is_named(
    tmp_path: Path, base: tuple[str, ...], law: tuple[str, ...], code: tuple[str, ...], words: tuple[str, ...]
) -> None:
    shop = shop_of(tmp_path, RANDOM, base={"tokens": base}, law={"tokens": law}, code={"tokens": code})
    with pytest.raises(MismatchError) as caught:
        planned(shop)
    for word in words:
        assert word in str(caught.value)


def test_tokens_in_a_file_of_their_own(tmp_path: Path) -> None:
    """A slow tokenizer's folder: no tokenizer.json, and the added tokens in added_tokens.json."""
    shop = shop_of(tmp_path, RANDOM, law={"tokens": CHAT})
    (tmp_path / "law" / "tokenizer.json").unlink()
    (tmp_path / "law" / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 96, "<|im_end|>": 97}))
    assert "'<|im_end|>' 97" in " ".join(planned(shop).notes)


def test_rows_that_the_base_lacks_make_another_base_of_it(tmp_path: Path) -> None:
    """They are other experts': what was scored beside one is not what it scores beside another."""
    found = []
    for seed in (2, 7):
        shop = shop_of(tmp_path / str(seed), WHOLE, code={"tokens": CHAT})
        save(shop.root / "code", seed, CHAT)
        (base, *_), _ = row_jobs(built(shop), run=QUIET)
        found.append(base.identity)
    assert found[0] != found[1]


def test_it_is_evaluated_with_the_rows_that_models_lack(tmp_path: Path) -> None:
    shop = shop_of(tmp_path, WHOLE, law={"tokens": CHAT})
    with (tmp_path / "text" / "law.jsonl").open("a") as stream:
        stream.writelines(json.dumps({"text": f"<|im_start|>{number} court<|im_end|>"}) + "\n" for number in range(60))
    checkpoint = built(shop)
    results = evaluate(checkpoint, tokens_per_domain=2_000)
    losses = {row.name: {name: score.loss for name, score in row.scores.items()} for row in results.rows}
    assert {"base", "law", "code", "weight average", "oracle", "mixture"} <= losses.keys()
    assert losses["oracle"] == pytest.approx({name: losses[name][name] for name in ("law", "code")}, abs=1e-4)
    shutil.move(tmp_path / "law", tmp_path / "gone")
    left = evaluate(checkpoint, tokens_per_domain=2_000, write=False)
    assert {row.name for row in left.rows}.isdisjoint({"law", "weight average"})


@pytest.mark.parametrize("mixture", [WHOLE, RANDOM, {"router": {"fit": "logistic", "tokens_per_domain": 500}}])
def test_experts_with_more_tokens_come_and_go(tmp_path: Path, mixture: dict[str, Any]) -> None:
    """Added and removed again, it is built with and built without, byte for byte."""
    shop = shop_of(tmp_path, mixture, law={"tokens": CHAT})
    law, code = shop.recipe["experts"]
    shop.recipe["output"] = {"format": "modekit" if "modules" in mixture else "plain"}
    others = [code, {"name": "general", "model": "base", "text": "./text/code.jsonl"}]
    without = open_checkpoint(shop.build("WITHOUT", experts=others))
    joint = built(shop, experts=[*others, law])
    assert without.vocabulary == VOCAB and joint.vocabulary == VOCAB + 2
    said = NewExpert({"model": "./law", "text": [law["text"]]}, tmp_path)
    more = write_change(without, add_expert(without, "law", said), tmp_path / "MORE")
    check_same(more.folder, joint.folder)
    less = write_change(joint, remove_expert(joint, "law"), joint.folder)
    check_same(less.folder, without.folder)
    assert is_proven(verify(less)) and less.record.tokens is None and not (less.folder / "chat_template.jinja").exists()


def test_another_model_in_the_folder_of_one_that_gave_rows(tmp_path: Path) -> None:
    shop = shop_of(tmp_path, RANDOM, law={"tokens": CHAT})
    checkpoint = built(shop)
    shutil.rmtree(tmp_path / "law")
    save(tmp_path / "law", 9, CHAT)
    said = NewExpert({"model": "./law"}, tmp_path)
    changed = write_change(checkpoint, replace_expert(checkpoint, "law", said), tmp_path / "CHANGED")
    assert torch.equal(weights(changed.folder)[EMBEDDING][96:], weights(tmp_path / "law")[EMBEDDING][96:])
    assert is_proven(verify(changed))


def change_tokenizer(folder: Path, **parts: Any) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **parts}))


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "Whitespace"}},
    ],
    ids=str,
)
def test_a_tokenizer_that_cuts_text_otherwise_is_refused(tmp_path: Path, parts: dict[str, Any]) -> None:
    """Though every token has the same id."""
    shop = shop_of(tmp_path, RANDOM)
    change_tokenizer(tmp_path / "law", **parts)
    with pytest.raises(MismatchError, match="cuts text otherwise") as caught:
        planned(shop)
    assert "experts[0] 'law'" in str(caught.value)


def test_what_a_tokenizer_puts_around_a_text_is_noted(tmp_path: Path) -> None:
    shop = shop_of(tmp_path, RANDOM)
    around = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    template = {"type": "TemplateProcessing", "single": around, "pair": around, "special_tokens": special}
    change_tokenizer(tmp_path / "law", post_processor=template)
    assert any("other special tokens around a text (<s>" in note for note in planned(shop).notes)
    change_tokenizer(tmp_path / "law", post_processor=None, truncation=None, padding=None)
    assert not any("special tokens around" in note for note in planned(shop).notes)


@pytest.mark.parametrize("larger", [False, True])
def test_what_a_token_does_to_the_text_beside_it_is_noted(tmp_path: Path, larger: bool) -> None:
    """The mixture has one of the two tokenizers: the base's, or the larger one."""
    shop = shop_of(tmp_path, RANDOM, base={"tokens": CHAT[:1]}, law={"tokens": CHAT[: 1 + larger]}, code={"tokens": CHAT[:1]})
    added = json.loads((tmp_path / "law" / "tokenizer.json").read_text())["added_tokens"]
    change_tokenizer(tmp_path / "law", added_tokens=[{**each, "rstrip": True} for each in added])
    (note,) = (note for note in planned(shop).notes if "beside" in note)
    assert "experts[0] 'law'" in note and "the mixture has one of the two" in note
    change_tokenizer(tmp_path / "law", added_tokens=added)
    assert not any("beside" in note for note in planned(shop).notes)


def test_of_several_chat_templates_the_default_is_the_mixture_s(tmp_path: Path) -> None:
    """As transformers 4 keeps them in tokenizer_config.json."""
    shop = shop_of(tmp_path, RANDOM, law={"tokens": CHAT})
    (tmp_path / "law" / "chat_template.jinja").unlink()
    path = tmp_path / "base" / "tokenizer_config.json"
    several = [{"name": "tool_use", "template": "{{ 'tools' }}"}, {"name": "default", "template": "{{ 'chat' }}"}]
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": several}))
    checkpoint = built(shop)
    assert AutoTokenizer.from_pretrained(checkpoint.folder).apply_chat_template([SAID], tokenize=False) == "chat"


def test_an_expert_whose_texts_end_elsewhere_is_noted(tmp_path: Path) -> None:
    """As those of a chat model of the base's tokens do: the mixture would go on."""
    shop = shop_of(tmp_path, RANDOM, **{name: {"tokens": CHAT} for name in SEEDS})
    assert not any("go on there" in note for note in planned(shop).notes)
    path = tmp_path / "base" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": "</s>"}))
    notes = [note for note in planned(shop).notes if "go on there" in note]
    assert len(notes) == 2 and "experts[0] 'law': its texts end at '<|im_end|>' 97" in notes[0]


def test_rows_come_by_the_names_of_the_class(tmp_path: Path) -> None:
    """A model that is loaded to be evaluated has the mixture's rows, whatever its class calls its embedding."""
    for name, seed in SEEDS.items():
        more = CHAT if name == "law" else ()
        save(tmp_path / name, seed, more)
        sizes = {"vocab_size": VOCAB + len(more), "n_embd": 32, "n_head": 4, "n_layer": 1, "n_positions": 64}
        torch.manual_seed(seed)
        GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path / name)
    experts = [{"name": name, "model": f"./{name}"} for name in ("law", "code")]
    checkpoint = built(Workshop(tmp_path, {"base_model": "./base", "experts": experts, "mixture": RANDOM}))
    rows = weights(checkpoint.folder)["transformer.wte.weight"]
    assert torch.equal(load_expert_source(checkpoint, None).get_input_embeddings().weight, rows)


def test_a_base_without_a_tokenizer_is_noted(tmp_path: Path) -> None:
    shop = shop_of(tmp_path, RANDOM)
    for name in SEEDS:
        for file in (tmp_path / name).glob("*token*"):
            file.unlink()
    assert any("no tokenizer, which fit, eval, chat and serve need" in note for note in planned(shop).notes)
