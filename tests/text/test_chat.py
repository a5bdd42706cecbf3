"""Conversations as documents, and a chat template that is not to be trusted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chatting import TEMPLATE, word_tokenizer
from modekit.errors import TextError
from modekit.text.chat import ChatTemplate, chat_template_of
from modekit.text.document import Conversation, Document, text_of
from modekit.text.documents import read_documents
from modekit.text.records import conversation_of
from modekit.text.sequences import NO_LABEL, encode, make_batches, none_fits
from modekit.text.splits import digest_of, split_of, text_record
from text_files import write_records

SAID: list[dict[str, str]] = [
    {"role": "user", "content": "what is fever"},
    {"role": "assistant", "content": "fever is a thing"},
]


def read(tmp_path: Path, name: str, lines: list[Any]) -> list[Document]:
    return read_documents([write_records(tmp_path / name, lines)], root=tmp_path, where="text")


def test_a_record_of_messages_is_one_document_by_what_was_said(tmp_path: Path) -> None:
    (found,) = read(tmp_path, "a.jsonl", [{"messages": SAID}, {"messages": [dict(each) for each in SAID], "id": 2}])
    assert isinstance(found, Conversation) and list(found.messages) == SAID
    assert found.text == "what is fever\n\nfever is a thing"
    assert digest_of(found) == digest_of(found.text) and split_of(found) == split_of(found.text)


def test_who_said_it_decides_what_a_fit_remembers_but_not_the_split() -> None:
    """The same words by others are other tokens: what was kept of them must not be used."""
    other = Conversation([{**SAID[0], "role": "system"}, SAID[1]])
    same = [Conversation(SAID), other, other.text]
    assert len({split_of(each) for each in same}) == 1
    assert len({text_record([each], 0)["sha256"] for each in same}) == 3
    assert text_record(["the court"], 0) == text_record([" the court\n"], 0)


def test_parts_of_text_are_joined(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "what is "}, {"type": "text", "text": "fever"}]
    (found,) = read(tmp_path, "a.jsonl", [{"messages": [{"role": "user", "content": parts}]}])
    assert text_of(found) == "what is fever"


def test_a_column_of_messages(tmp_path: Path) -> None:
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    parquet.write_table(arrow.table({"messages": [SAID, []], "id": [1, 2]}), tmp_path / "a.parquet")
    (found,) = read_documents([str(tmp_path / "a.parquet")], root=tmp_path, where="text")
    assert isinstance(found, Conversation) and list(found.messages) == SAID
    both = {"messages": [SAID, None], "text": [None, "a deed"]}
    parquet.write_table(arrow.table(both), tmp_path / "a.parquet")
    again = read_documents([str(tmp_path / "a.parquet")], root=tmp_path, where="text")
    assert sorted(again, key=text_of) == ["a deed", found]


@pytest.mark.parametrize(
    "messages",
    [
        "hello",
        [1],
        [{"role": 1, "content": "x"}],
        [{"role": "", "content": "x"}],
        [{"role": "user", "content": [{"type": "image", "url": "x"}]}],
        {"role": "user"},
    ],
)
def test_what_is_no_conversation_is_refused_by_its_line(tmp_path: Path, messages: Any) -> None:
    assert conversation_of(messages) is None
    with pytest.raises(TextError) as error:
        read(tmp_path, "a.jsonl", [{"text": "the court"}, {"messages": messages}])
    assert "a.jsonl:2" in str(error.value) and '"messages"' in str(error.value)


def test_tokens_are_those_of_the_template_and_none_is_added() -> None:
    tokenizer = word_tokenizer()
    (sequence,) = encode(tokenizer, [Conversation(SAID)], max_tokens=1_000, sequence_length=512)
    assert list(sequence.ids) == tokenizer.apply_chat_template(SAID)["input_ids"]
    parts = sequence.ids[: sequence.start], sequence.ids[sequence.start :]
    before, said = ("".join(str(tokenizer.decode(part)).split()) for part in parts)
    assert before == "<|im_start|>systemYouhelpwithcourtandfever<|im_end|><|im_start|>user"
    assert said.startswith("whatisfever<|im_end|><|im_start|>assistantfeverisathing")


def test_without_a_template_messages_are_refused() -> None:
    tokenizer = word_tokenizer(None)
    assert chat_template_of(tokenizer) is None
    with pytest.raises(TextError, match="messages need a chat template, and the tokenizer has none"):
        encode(tokenizer, [Conversation(SAID)], max_tokens=100, sequence_length=64)


def test_what_lies_around() -> None:
    template = ChatTemplate(word_tokenizer())
    before, between = template.around(None) or ("", "")
    assert before.endswith("fever<|im_end|>\n<|im_start|>user\n") and between == "<|im_end|>\n<|im_start|>assistant\n"
    assert template.around("Be brief") == ("<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\n", between)
    assert template.turn() == "<|im_end|>\n<|im_start|>user\n"
    assert (
        template.text([*SAID, SAID[0]], answer=True)
        == before + "what is fever" + between + "fever is a thing" + (template.turn() or "") + "what is fever" + between
    )


def test_a_template_that_takes_no_system_prompt() -> None:
    text = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system prompt') }}{% endif %}" + "".join(
        "{% for message in messages %}[{{ message['content'] }}]{% endfor %}"
    )
    template = ChatTemplate(word_tokenizer(text))
    assert template.around("Be brief") is None and template.around(None) == ("[", "][")
    with pytest.raises(TextError, match="no system prompt"):
        template.text([{"role": "system", "content": "x"}, *SAID])


def test_of_named_templates_the_default_counts() -> None:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = {"tool_use": "x", "default": TEMPLATE}
    found = chat_template_of(tokenizer)
    assert found is not None and found.source == TEMPLATE
    tokenizer.chat_template = {"tool_use": "x", "rag": "y"}
    assert chat_template_of(tokenizer) is None


def test_half_a_character_is_none() -> None:
    template = ChatTemplate(word_tokenizer())
    assert template.ids(template.text([{"role": "user", "content": "a\udcff"}]))


TALK = [*SAID, {"role": "user", "content": "and a nerve"}, {"role": "assistant", "content": "one more thing"}]
MARKED = TEMPLATE.replace(
    "{{ message['content'] }}<|im_end|>\n",
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}\n",
)


@pytest.mark.parametrize("template", [TEMPLATE, MARKED], ids=["as it stands", "generation marked"])
def test_of_a_conversation_only_what_the_assistant_says_is_predicted(template: str) -> None:
    tokenizer = word_tokenizer(template)
    (sequence,) = encode(tokenizer, [Conversation(TALK)], max_tokens=500, sequence_length=200, answers=True)
    (batch,) = make_batches([sequence])
    said = "fever is a thing <|im_end|> one more thing <|im_end|>"
    assert tokenizer.decode(batch.labels[batch.labels != NO_LABEL]) == said
    assert sequence.scored == batch.scored == 9
    (read,) = encode(tokenizer, [Conversation(TALK)], max_tokens=500, sequence_length=200)
    assert read.ids == sequence.ids and read.scored == len(read.ids) - 1  # routers read all of it


def test_pieces_in_which_no_assistant_speaks_are_left_out_and_a_text_of_them_is_refused() -> None:
    tokenizer, long = word_tokenizer(), {"role": "user", "content": "what is fever " * 20}
    pieces = encode(tokenizer, [Conversation([long, SAID[1]])], max_tokens=500, sequence_length=16, answers=True)
    assert pieces and all(piece.scored for piece in pieces) and sum(piece.scored for piece in pieces) == 5
    asked: list[Document] = [Conversation([long])]
    assert encode(tokenizer, asked, max_tokens=500, sequence_length=16, answers=True) == []
    assert "no assistant says anything" in str(none_fits(asked, 16, where="text"))


def test_a_template_that_drops_what_was_thought_still_shows_where_answers_are() -> None:
    """As Qwen3's and DeepSeek's do in all turns but the last."""
    thinking = TEMPLATE.replace("message['content'] }}<|im_end|>", "message['content'].split('</think>')[-1] }}<|im_end|>")
    messages = [TALK[0], {**TALK[1], "content": "<think>a nerve</think>fever is a thing"}, *TALK[2:]]
    tokenizer = word_tokenizer(thinking)
    (sequence,) = encode(tokenizer, [Conversation(messages)], max_tokens=500, sequence_length=200, answers=True)
    assert sequence.scored == 9
