"""Records as other tools write them -> conversations: a prompt with its answer, and turns of `from` and `value`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from modekit.text.chat import Conversation, conversation_of, message_of

ASKED = ("prompt", "instruction", "question", "query")
GIVEN = ("input", "context")
ANSWERED = ("completion", "output", "response", "answer")
"""Keys of a prompt, of what it is about, and of its answer; of several the first that holds text counts."""
TURNS = "conversations"
"""Key of turns as ShareGPT has them."""
_ROLES: dict[object, str] = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}


class Exchange(Conversation):
    """A prompt and its answer as one document.

    The tokenizer's chat template writes it; where there is none, it is plain text: the prompt, an empty line, the answer.
    """

    @property
    def record(self) -> dict[str, str]:
        """The record that gives it back."""
        said = {message["role"]: message["content"] for message in self.messages}
        return {ASKED[0]: said["user"], ANSWERED[0]: said.get("assistant", "")}


def turns_of(record: Mapping[object, object]) -> Conversation | None:
    """The conversation of a record's `conversations`; None when they are no list of speakers with text."""
    turns = record.get(TURNS)
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        return None
    return conversation_of([_message(turn) for turn in turns])


def exchange_of(record: Mapping[object, object]) -> str | None:
    """The prompt and answer of a record; the messages of both where it has lists of them; None when it has no such keys."""
    asked, answered = record.get(ASKED[0]), record.get(ANSWERED[0])
    if isinstance(asked, list) and isinstance(answered, list):
        return conversation_of([*asked, *answered])
    prompts, answers = [*_first(record, ASKED), *_first(record, GIVEN)], [*_first(record, ANSWERED)]
    if not prompts or not answers:
        return None
    said = {"user": "\n\n".join(text for text in prompts if text.strip()), "assistant": answers[0]}
    if not said["user"]:
        return answers[0]
    return Exchange([message_of(role, text) for role, text in said.items() if text.strip()])


def _first(record: Mapping[object, object], keys: Sequence[str]) -> Iterator[str]:
    """The text of the first of the keys that holds any."""
    for key in keys:
        text = record.get(key)
        if isinstance(text, str):
            yield text.encode("utf-8", "replace").decode()  # an escaped half of a surrogate pair is no character
            return


def _message(turn: Mapping[object, object]) -> Mapping[object, object]:
    """A turn by the keys and roles of a chat template; one that has them already stays as it is."""
    speaker = turn.get("from")
    if not isinstance(speaker, str):
        return turn
    return {"role": _ROLES.get(speaker, speaker), "content": turn.get("value")}
