"""Records of a .jsonl, a table or a hub data set -> documents: text, messages, a pair, or a prompt and its answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from modekit.text.document import Conversation, Document, Pair, message_of, whole_pair

TEXT, MESSAGES, ID = "text", "messages", "id"
SOURCE, TARGET, TRANSLATION = "source", "target", "translation"
ASKED = ("prompt", "instruction", "question", "query")
GIVEN = ("input", "context")
ANSWERED = ("completion", "output", "response", "answer")
"""Keys of a prompt, of what it is about, and of its answer; of several the first that holds text counts."""
TURNS = "conversations"
"""Key of turns of `from` and `value`, as ShareGPT has them."""
_ROLES: dict[object, str] = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}
_Data: TypeAlias = Mapping[object, object]


@dataclass(frozen=True)
class TextRecord:
    """A document, and the `id` that its record gives it, or None."""

    document: Document
    id: str | None = None


def data_of(document: Document) -> dict[str, object]:
    """A document as the data of a record that gives it back."""
    match document:
        case str():
            return {TEXT: document}
        case Pair(source, target):
            return {SOURCE: source, TARGET: target}
        case Conversation(messages, False):
            return {MESSAGES: list(messages)}
        case Conversation(messages):
            contents = {message["role"]: message["content"] for message in messages}
            return {ASKED[0]: contents["user"], ANSWERED[0]: contents.get("assistant", "")}


def record_of(data: object, *, where: str) -> TextRecord | None:
    """None for what is no record of any kind. Raises TextError for a pair of which a side is empty."""
    if not isinstance(data, Mapping):
        return None
    document = _document_of(data, where)
    return None if document is None else TextRecord(document, _id_of(data.get(ID)))


def _document_of(data: _Data, where: str) -> Document | None:
    """The text of a record, or else its conversation, its pair, or its prompt and answer; None when it has none of them."""
    text = data.get(TEXT)
    if isinstance(text, str):
        return _whole(text)
    return conversation_of(data.get(MESSAGES)) or pair_of(data, where=where) or _turns_of(data) or _exchange_of(data)


def _id_of(value: object) -> str | None:
    """Text or a whole number as text; anything else names nothing."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _whole(value) if isinstance(value, str) and value else None


def _whole(text: str) -> str:
    """The text without escaped halves of surrogate pairs, which are no characters."""
    return text.encode("utf-8", "replace").decode()


def pair_of(data: _Data, *, where: str) -> Pair | None:
    """The pair of a record: its `source` and `target`, or the two languages of its `translation`, of which the first is the
    source; None when it has neither. A side that is null, as tables have it, is empty.

    Raises TextError when a side is empty.
    """
    sides: list[object] = [data[SOURCE], data[TARGET]] if SOURCE in data and TARGET in data else []
    translation = data.get(TRANSLATION)
    if isinstance(translation, Mapping) and not (sides and all(isinstance(side, str) for side in sides)):
        sides = list(translation.values())
        if len(sides) > 2:  # of several languages, the two that are there
            sides = [side for side in sides if side is not None]
    texts = ["" if side is None else _whole(side) for side in sides if isinstance(side, str | None)]
    return whole_pair(texts[0], texts[1], where=where) if len(texts) == len(sides) == 2 else None


def conversation_of(value: object) -> Conversation | None:
    """The conversation of a record's `messages`; None when they are no list of roles with text."""
    if not isinstance(value, list) or not value:
        return None
    messages = []
    for each in value:
        role, content = (each.get("role"), _content_of(each.get("content"))) if isinstance(each, Mapping) else (None, None)
        if not isinstance(role, str) or not role or content is None:
            return None
        messages.append(message_of(role, _whole(content)))
    return Conversation(messages)


def _content_of(content: object) -> str | None:
    """Text, or the text of parts that are all text."""
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, Mapping) and part.get("type") == "text"]
        known = [text for text in texts if isinstance(text, str)]
        return "".join(known) if known and len(known) == len(content) else None
    return content if isinstance(content, str) else None


def _turns_of(data: _Data) -> Conversation | None:
    """The conversation of a record's `conversations`; None when they are no list of speakers with text."""
    turns = data.get(TURNS)
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        return None
    return conversation_of([_turn(turn) for turn in turns])


def _turn(turn: _Data) -> Mapping[object, object] | Mapping[str, object]:
    """A turn by the keys and roles of a chat template; one that has them already stays as it is."""
    speaker = turn.get("from")
    return {"role": _ROLES.get(speaker, speaker), "content": turn.get("value")} if isinstance(speaker, str) else turn


def _exchange_of(data: _Data) -> Document | None:
    """The prompt and answer of a record; the messages of both where it has lists of them; None when it has no such keys."""
    asked, answered = data.get(ASKED[0]), data.get(ANSWERED[0])
    if isinstance(asked, list) and isinstance(answered, list):
        return conversation_of([*asked, *answered])
    prompts, answers = [*_first(data, ASKED), *_first(data, GIVEN)], [*_first(data, ANSWERED)]
    if not prompts or not answers:
        return None
    contents = {"user": "\n\n".join(text for text in prompts if text.strip()), "assistant": answers[0]}
    if not contents["user"]:
        return answers[0]
    return Conversation([message_of(role, text) for role, text in contents.items() if text.strip()], is_exchange=True)


def _first(data: _Data, keys: Sequence[str]) -> list[str]:
    """The text of the first of the keys that holds any; an empty one where none does."""
    texts = [_whole(text) for text in map(data.get, keys) if isinstance(text, str)]
    return [text for text in texts if text.strip()][:1] or texts[:1]
