"""`modekit eval-chat` and `inspect --chat`: what is asked, who leads, and what is refused."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from chatting import make_chat_workshop, word_tokenizer
from command_line import modekit
from conftest import DOMAINS, Workshop
from modekit.checkpoint.checkpoint import Checkpoint, open_checkpoint
from modekit.errors import TextError
from modekit.evaluation import chat
from modekit.evaluation.chat import CHANGE, GREETINGS, REAL, REAL_CHANGE, SMALL_TALK, ChatResults, evaluate_chat
from modekit.evaluation.chat_questions import by_expert, read_questions
from modekit.evaluation.domains import held_out_texts
from modekit.evaluation.inspection.text import UserMessage, inspect_text
from modekit.loaded.load import load_model, load_tokenizer
from modekit.recipes.recipe import Expert
from modekit.text.chat import ChatTemplate, needed_template
from modekit.text.document import Conversation
from modekit.text.question_frames import QUESTION_FRAMES
from modekit.text.shipped import SMALL_TALK as FITTED


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return make_chat_workshop(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def checkpoint(shop: Workshop) -> Checkpoint:
    return open_checkpoint(shop.build("OUT", output={"format": "native"}))


@pytest.fixture(scope="module")
def results(checkpoint: Checkpoint) -> ChatResults:
    return evaluate_chat(checkpoint, questions=8)


def test_every_kind_is_asked_and_each_has_an_owner(results: ChatResults) -> None:
    rows = {row.name: row for row in results.rows}
    real = [REAL + name for name in ("medicine", "law", "code", "general")]
    assert list(rows) == [*DOMAINS, "general", CHANGE, SMALL_TALK, *real, REAL_CHANGE]
    assert [rows[name].expert for name in (*DOMAINS, "general", SMALL_TALK)] == [*DOMAINS, "general", "general"]
    assert [rows[name].expert for name in real] == ["medicine", "law", "code", "general"]
    assert [rows[name].questions for name in rows] == [8, 8, 8, 8, 8, len(GREETINGS), 8, 8, 8, 8, 12]
    for row in results.rows:
        assert sum(row.leaders.values()) == row.questions
        assert row.at_prompt is not None and row.after_answer is not None
        assert row.over_answer is not None and 0 <= row.over_answer <= 1
        # This tokenizer knows few words of real questions and of small talk. A change of domain is followed.
        least = 0.6 if row.name == SMALL_TALK else 0.9
        assert row.at_prompt >= least or row.name.startswith("real"), row
        if row.name in DOMAINS:
            assert row.at_prompt == row.leaders.get(row.name, 0) / row.questions


def test_a_router_that_knows_no_chats_is_seen_to_be_wrong(shop: Workshop, results: ChatResults) -> None:
    mixture = {"method": "routing", "top_k": 1, "router": {"fit": "lexical", "chat": False}}
    deaf = evaluate_chat(open_checkpoint(shop.build("DEAF", mixture=mixture)), questions=8, write=False)
    found, knows = ({row.name: row.at_prompt for row in each.rows}[SMALL_TALK] or 0.0 for each in (deaf, results))
    assert found < knows


def test_what_is_written_is_what_was_found(checkpoint: Checkpoint, results: ChatResults) -> None:
    said = json.loads((checkpoint.folder / "results" / "chat.json").read_text())
    assert said == json.loads(json.dumps(results.as_data())) and said["rows"][0]["name"] == "medicine"
    table = (checkpoint.folder / "results" / "chat.md").read_text().splitlines()
    assert table[0].startswith("|  | questions | last prompt token | after 16 tokens | over them | medicine |")
    assert len(table) == 2 + len(results.rows) + 1 + len(results.notes)


def test_questions_are_of_held_out_text_and_greetings_of_no_fit(checkpoint: Checkpoint) -> None:
    for text in held_out_texts(checkpoint):
        for question, answer in chat._said(text.documents, 12, 0):
            assert any(question in document and answer in document for document in text.documents)
            assert 8 <= len(question.split()) <= 24
    assert not {each.lower().strip("!?. ") for each in GREETINGS} & {each.lower().strip("!?. ") for each in FITTED}


def test_real_questions_are_many_in_every_domain_and_no_fit_has_them() -> None:
    questions = read_questions(None)
    counted = Counter(each.domain for each in questions)
    assert set(counted) == {"medicine", "law", "german", "french", "code", "science", "general"} and min(counted.values()) >= 40
    assert min(Counter(each.domain for each in questions if each.answer).values()) >= 6
    assert len({each.question for each in questions}) == len(questions)
    assert not {each.question for each in questions} & {*FITTED, *(f for frames in QUESTION_FRAMES.values() for f in frames)}


@pytest.mark.parametrize(
    ("experts", "found"),
    [
        (["medicine", "law"], {"medicine": 0, "law": 1}),
        (["lora-medical_7b", "Full-German", "base"], {"medicine": 0, "german": 1, "general": 2}),
        (["lawful", "other"], {}),
        (["science-2", "science"], {"science": 1}),
    ],
)
def test_domains_are_found_in_the_names_of_experts(experts: list[str], found: dict[str, int]) -> None:
    named = [Expert(name=name, model="base" if name == "base" else f"./{name}") for name in experts]
    assert by_expert(read_questions(None), named) == found


def test_questions_of_a_file_are_asked_in_place_of_the_shipped_ones(checkpoint: Checkpoint, tmp_path: Path) -> None:
    file = tmp_path / "ask.jsonl"
    file.write_text(
        '{"domain": "law", "question": "the court", "answer": "a deed"}\n\n'
        '{"domain": "code", "question": "what does def mean"}\n'
    )
    rows = {row.name: row for row in evaluate_chat(checkpoint, questions=4, ask=file, write=False).rows}
    asked = {name: (row.expert, row.questions) for name, row in rows.items() if name.startswith("real")}
    assert asked == {REAL + "law": ("law", 1), REAL + "code": ("code", 1), REAL_CHANGE: ("the last one's", 1)}
    assert rows[REAL + "code"].leaders == {"code": 1}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"domain": "law"}', "question"),
        ('{"domain": "law", "question": ""}', "question"),
        ("law", "Expecting value"),
        ('{"domain": "tax", "question": "why"}', "no expert has the name"),
    ],
)
def test_what_is_wrong_with_a_file_of_questions_is_said(checkpoint: Checkpoint, tmp_path: Path, line: str, said: str) -> None:
    file = tmp_path / "ask.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(TextError, match=said) as error:
        evaluate_chat(checkpoint, ask=file, write=False)
    assert "--ask" in str(error.value)
    with pytest.raises(TextError, match="the questions cannot be read"):
        read_questions(tmp_path / "none.jsonl")


def test_answers_are_the_greedy_ones_whatever_they_are_batched_with(checkpoint: Checkpoint) -> None:
    model, tokenizer = load_model(checkpoint.folder), load_tokenizer(checkpoint.folder)
    template = ChatTemplate(tokenizer)
    prompts = [
        template.ids(template.text([{"role": "user", "content": text}], answer=True)) for text in ("fever", "what is a deed")
    ]
    together = list(chat._answers(model, prompts, tokenizer))
    for prompt, answered in zip(prompts, together, strict=True):
        (alone,) = chat._answers(model, [prompt], tokenizer)
        assert alone == answered and answered.ids[: len(prompt)] == tuple(prompt)
        ids = torch.tensor([prompt])
        for token in answered.ids[len(prompt) :]:
            with torch.inference_mode():
                assert int(model(input_ids=ids).logits[0, -1].argmax()) == token
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)


def test_a_conversation_is_asked_as_it_was() -> None:
    talk = Conversation(
        [
            {"role": "system", "content": "x"},
            {"role": "user", "content": "what is fever"},
            {"role": "assistant", "content": "a thing"},
        ]
    )
    assert list(chat._said([talk], 1, 0)) == [("what is fever", "a thing")]


def test_who_says_nothing_asks_nothing() -> None:
    silent = [Conversation([{"role": "system", "content": "x"}]), Conversation([{"role": "assistant", "content": "hello"}])]
    late = Conversation(
        [{"role": "assistant", "content": "hello"}, {"role": "user", "content": ""}, {"role": "user", "content": "why"}]
    )
    endless = Conversation([{"role": "user", "content": "why " * 2_000}])
    assert list(chat._said([*silent, endless], 3, 0)) == []
    assert list(chat._said([*silent, late], 2, 0)) == [("why", ""), ("why", "")]


def test_a_long_document_is_read_where_it_is_cut() -> None:
    long = "The court heard a claim on a deed that nobody had signed. " * 40_000
    started = time.monotonic()
    found = list(chat._said([long], 32, 0))
    assert len({question for question, _ in found}) > 8 and all(8 <= len(question.split()) <= 24 for question, _ in found)
    assert time.monotonic() - started < 20  # it was minutes and gigabytes


def test_without_a_base_small_talk_has_no_owner(shop: Workshop) -> None:
    experts = shop.recipe["experts"][:3]
    without = evaluate_chat(open_checkpoint(shop.build("THREE", experts=experts)), questions=4, write=False)
    row = next(row for row in without.rows if row.name == SMALL_TALK)
    assert row.expert is None and row.at_prompt is None and any("model: base" in note for note in without.notes)
    assert "| - | - | - |" in without.markdown()


def test_without_a_template_there_is_no_chat(shared_workshop: Workshop) -> None:
    plain = open_checkpoint(shared_workshop.build("NO-CHAT"))
    with pytest.raises(TextError, match="messages need a chat template"):
        evaluate_chat(plain)
    with pytest.raises(TextError, match="messages need a chat template"):
        inspect_text(plain, UserMessage(None, "what is fever"))
    with pytest.raises(TextError, match="into that folder"):
        needed_template(load_tokenizer(plain.folder), "eval-chat")
    (plain.folder / "chat_template.jinja").write_text("{% for each in messages %}{{ each.content }} {% endfor %}")
    needed_template(load_tokenizer(plain.folder), "eval-chat")  # the remedy works


def test_a_template_without_a_system_prompt_says_so(shop: Workshop) -> None:
    checkpoint = open_checkpoint(shop.build("NO-SYSTEM"))
    template = "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
    word_tokenizer(template + "[{{ message['content'] }}]{% endfor %}").save_pretrained(checkpoint.folder)
    with pytest.raises(TextError, match="the chat template takes no system prompt"):
        evaluate_chat(checkpoint, system="Be brief")
    silent = "{% for message in messages if message['role'] != 'system' %}[{{ message['content'] }}]{% endfor %}"
    word_tokenizer(silent).save_pretrained(checkpoint.folder)
    with pytest.raises(TextError, match="the chat template takes no system prompt"):
        evaluate_chat(checkpoint, system="Be brief")


def test_inspect_shows_the_prompt_word_by_word(checkpoint: Checkpoint) -> None:
    said = inspect_text(checkpoint, UserMessage("Be brief", "what is a fever")).model_dump()
    assert said["text"].startswith("<|im_start|>system\nBe brief<|im_end|>") and said["text"].endswith(
        "<|im_start|>assistant\n"
    )
    assert max(zip(said["prompt_end"], checkpoint.names, strict=True))[1] == "medicine"
    assert inspect_text(checkpoint, "what is a fever").prompt_end is None


def test_the_command_line(shop: Workshop, checkpoint: Checkpoint) -> None:
    out = modekit("eval-chat", str(checkpoint.folder), "--questions", "4", "--system", "Be brief")
    assert "small talk" in out and "change of domain" in out and "chat.json, chat.md" in out
    assert json.loads(modekit("eval-chat", str(checkpoint.folder), "--questions", "4", "--json"))["system"] is None
    shown = modekit("inspect", str(checkpoint.folder), "--chat", "--text", "what does def mean")
    assert "the answer begins with code" in shown
