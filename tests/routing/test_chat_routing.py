"""Routers that know chats: what the template and its system prompt say weighs nothing, and small talk is the base's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import modekit
from chatting import make_chat_workshop, word_tokenizer
from conftest import DOMAINS, Workshop
from modekit.building.verify import is_proven, verify
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.open import open_checkpoint
from modekit.checkpoint.record import STATISTICS_FOLDER
from modekit.errors import RecipeError, TextError
from modekit.loaded.load import load_model, load_tokenizer
from modekit.loaded.shapes import mixture_of
from modekit.planning.make import make_plan
from modekit.recipes.read import parse_recipe
from modekit.routing.fit import refit
from modekit.routing.token_text import load_token_text
from modekit.text.chat import ChatTemplate
from modekit.text.shipped import POLITE_FRAMES, SMALL_TALK, SYSTEM_PROMPTS

QUESTIONS = ["what is a fever of the artery", "what does the clause of a licence mean", "what does def return self mean"]
TALK = ["Good afternoon", "How have you been?", "Thanks so much!", "No thanks"]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return make_chat_workshop(tmp_path_factory.mktemp("chat"))


def build(shop: Workshop, name: str, form: str = "modekit", **router: Any) -> Checkpoint:
    mixture = {"method": "routing", "top_k": 1, "router": router}
    return open_checkpoint(shop.build(name, mixture=mixture, output={"format": form}))


def leaders(checkpoint: Checkpoint, said: Sequence[str], system: str | None = None) -> list[str]:
    """The expert with the largest mean weight at the last token of each prompt."""
    model, tokenizer = load_model(checkpoint.folder), load_tokenizer(checkpoint.folder)
    above = [] if system is None else [{"role": "system", "content": system}]
    found = []
    for text in said:
        prompt = ChatTemplate(tokenizer).text([*above, {"role": "user", "content": text}], answer=True)
        ids = torch.tensor([ChatTemplate(tokenizer).ids(prompt)])
        with torch.inference_mode(), mixture_of(model, checkpoint).traced() as trace:
            model(input_ids=ids)
            mean_E = torch.stack([each.reshape(ids.shape[1], -1)[-1].softmax(-1) for each in trace]).mean(0)
        found.append(checkpoint.names[int(mean_E.argmax())])
    return found


@pytest.mark.parametrize("form", ["plain", "modekit"])
def test_a_lexical_router_knows_chats(shop: Workshop, form: str) -> None:
    checkpoint = build(shop, f"LEXICAL-{form}", form, fit="lexical")
    assert leaders(checkpoint, QUESTIONS, "Answer with the law of the court") == list(DOMAINS)
    for system in (None, "You are a helpful assistant."):
        assert leaders(checkpoint, QUESTIONS, system) == list(DOMAINS), system
        assert leaders(checkpoint, TALK, system) == ["general"] * len(TALK), system
    report = checkpoint.record.router.report
    *own, base = report["chats"]
    assert base > 1.5 * max(own), report  # small talk besides its own text
    assert is_proven(verify(checkpoint))


def test_without_chats_the_system_prompt_decides(shop: Workshop) -> None:
    """The fault that is mended: were it not one, the tests above would show nothing."""
    checkpoint = build(shop, "DEAF", fit="lexical", chat=False)
    assert "chats" not in checkpoint.record.router.report
    assert leaders(checkpoint, TALK) != ["general"] * len(TALK)


def test_politeness_around_a_question_of_a_conversation_is_not_the_bases(shop: Workshop) -> None:
    """Where text is conversations, which teach an expert as little of greetings as documents do."""
    texts = {each.stem: each.read_bytes() for each in (shop.root / "text").glob("*.jsonl")}
    for name in DOMAINS:
        documents = [json.loads(line)["text"].split() for line in texts[name].decode().splitlines()]
        talks = [[("user", words[:8]), ("assistant", words[8:])] for words in documents]
        lines = [{"messages": [{"role": role, "content": " ".join(said)} for role, said in talk]} for talk in talks]
        (shop.root / "text" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    try:
        checkpoint = build(shop, "POLITE", fit="lexical")
    finally:
        for name, content in texts.items():
            (shop.root / "text" / f"{name}.jsonl").write_bytes(content)
    asked = [
        (frame.replace("{}", question), name)
        for frame in POLITE_FRAMES["en"]
        for question, name in zip(QUESTIONS, DOMAINS, strict=True)
    ]
    found, talk = (leaders(checkpoint, said, SYSTEM_PROMPTS[1]) for said in ([each for each, _ in asked], SMALL_TALK[:160:4]))
    assert sum(name == own for name, (_, own) in zip(found, asked, strict=True)) > 0.85 * len(asked)
    assert talk.count("general") > 0.8 * len(talk)


@pytest.mark.parametrize(
    ("router", "decay"),
    [
        ({"fit": "lexical"}, [0.91]),
        ({"fit": "lexical", "orders": [1, 2]}, [0.91]),
        ({"fit": "lexical", "decay": [0.98]}, [0.98]),
        ({"fit": "lexical", "chat": False}, None),
    ],
)
def test_a_plan_says_the_decay_that_chats_give(shop: Workshop, router: dict[str, Any], decay: list[float] | None) -> None:
    mixture = {"method": "routing", "top_k": 1, "router": router}
    recipe = parse_recipe({**shop.recipe, "mixture": mixture, "output": {}}, where="recipe")
    plan = make_plan(recipe, shop.root)
    assert plan.recipe.mixture.router.decay == decay
    assert make_plan(plan.recipe, shop.root).recipe == plan.recipe


def test_without_a_template_evidence_fades_slowly(workshop: Workshop) -> None:
    mixture = {"method": "routing", "router": {"fit": "lexical"}}
    recipe = {**workshop.recipe, "mixture": mixture, "output": {"format": "plain"}}
    plan = make_plan(parse_recipe(recipe, where="recipe"), workshop.root)
    assert plan.recipe.mixture.router.decay is None and plan.shape.channels.decays == (0.98,)


def test_a_mixture_keeps_its_decay(shop: Workshop) -> None:
    """That of the default is in its record, and those who come and go, or fit it anew, leave it as it is."""
    built = build(shop, "DECAY", "plain", fit="lexical")
    assert decays_of(built) == [0.91] and built.record.recipe.mixture.router.decay == [0.91]
    assert decays_of(refit(built, {"router": {"temperature": 2.0}})) == [0.91]
    fewer = modekit.remove(built.folder, "law")
    assert decays_of(fewer) == [0.91]
    text = str(shop.root / "text" / "law.jsonl")
    more = modekit.add(built.folder, {"name": "law", "model": str(shop.root / "law"), "text": text})
    assert decays_of(more) == [0.91] and is_proven(verify(more))


def decays_of(checkpoint: Checkpoint) -> list[float | None]:
    channels = open_checkpoint(checkpoint.folder).shape.channels
    if channels is not None:
        return list(channels.decays)
    return [average.decay for average in open_checkpoint(checkpoint.folder).shape.routing.averages]


@pytest.mark.slow
def test_chats_are_kept_and_another_setting_reads_the_text_again(shop: Workshop) -> None:
    checkpoint = build(shop, "KEPT", fit="lexical")
    path = checkpoint.folder / STATISTICS_FOLDER / "law.safetensors"
    kept, before = load_token_text(path, 10_000), path.read_bytes()
    assert kept is not None and 0 < int((kept.starts > 0).sum()) < len(kept.starts)
    again = refit(checkpoint, {"router": {"fit": "lexical"}})
    assert path.read_bytes() == before and again.record.router.sha256 == checkpoint.record.router.sha256
    without = refit(checkpoint, {"router": {"fit": "lexical", "chat": False}})
    alone = load_token_text(path, 10_000)
    assert alone is not None and not alone.starts.any() and len(alone.starts) < len(kept.starts)
    assert without.record.router.sha256 != checkpoint.record.router.sha256
    decays = [each.record.recipe.mixture.router.decay for each in (checkpoint, again, without)]
    assert decays == [[0.91], [0.91], None]  # which follows chats goes with them
    back = refit(open_checkpoint(checkpoint.folder), {"router": {"chat": True}})
    assert back.record.recipe.mixture.router.decay == [0.91] and is_proven(verify(back, reload=False))  # and comes


@pytest.mark.slow
def test_the_decay_of_a_plain_checkpoint_does_not_follow_chats_in_silence(shop: Workshop) -> None:
    """It is in the attention: another one is another build."""
    for name, chat, there in (("FADES", {}, 0.91), ("LASTS", {"chat": False}, 0.98)):
        built = build(shop, name, "plain", fit="lexical", **chat)
        toggled = {"chat": bool(chat)}
        with pytest.raises(RecipeError, match=rf"part of the attention(.|\n)*build again, or keep .*: decay=\[{there}\]"):
            refit(built, {"router": toggled})
        kept = refit(built, {"router": {**toggled, "decay": [there]}})
        assert decays_of(kept) == [there] and is_proven(verify(kept, reload=False))


def test_a_router_that_is_to_know_chats_needs_a_template(shop: Workshop) -> None:
    for name in ("base", *DOMAINS):
        (shop.root / name / "chat_template.jinja").unlink()
    try:
        with pytest.raises(RecipeError, match="the base model has no chat template"):
            build(shop, "NONE", fit="lexical", chat=True)
        assert not (shop.root / "NONE").exists()
        plain = build(shop, "NONE", fit="lexical")
        with pytest.raises(TextError, match="the tokenizer has no chat template"):
            refit(plain, {"router": {"fit": "lexical", "chat": True}})
    finally:
        for name in ("base", *DOMAINS):
            word_tokenizer().save_pretrained(shop.root / name)


@pytest.mark.parametrize(
    "router",
    [{"fit": "lexical", "orders": [1, 2], "buckets": 512}, {"fit": "logistic"}],
    ids=["bigrams", "logistic"],
)
def test_what_was_kept_before_there_were_chats_does_without_them(shop: Workshop, router: dict[str, Any]) -> None:
    """The text is gone: what is kept of it has none in the template, and half of it would be worse than none."""
    checkpoint = build(shop, f"OLD-{router['fit']}", **router, chat=False)
    text = shop.root / "text" / "law.jsonl"
    kept = text.read_bytes()
    text.unlink()
    try:
        with pytest.raises(TextError, match="does not exist"):
            refit(checkpoint, {"router": {**router, "chat": True}})
        again = refit(checkpoint, {"router": {**router, "chat": False}})
    finally:
        text.write_bytes(kept)
    assert again.record.router.sha256 == checkpoint.record.router.sha256
