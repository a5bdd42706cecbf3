"""The chat template of a tokenizer, which writes conversations. transformers runs it in its sandbox."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

from modekit.errors import TextError
from modekit.text.document import Message, message_of
from modekit.text.plain import in_common, token_ids, whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_USER, _ANSWER = "⁂user⁂", "⁂answer⁂"  # stand for what is said, where only what lies around it is asked for

_GENERATED = re.compile(r"\{%-?\s*generation\b")


class ChatTemplate:
    """What a tokenizer makes of messages."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.around = lru_cache(maxsize=64)(self._around)

    @property
    def source(self) -> str:
        """The template itself."""
        return str(self._tokenizer.get_chat_template())

    def text(self, messages: Sequence[Message], *, answer: bool = False) -> str:
        """The messages as the model reads them, and with `answer` the beginning of the answer. Raises TextError."""
        try:
            written = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answer)
        except Exception as error:  # a template raises what it likes
            raise TextError(
                "the tokenizer's chat template does not take these messages",
                where=str(self._tokenizer.name_or_path),
                found=f"{str(error)[:300]} (in {str(messages)[:100]})",
                remedy="correct the messages, or the template",
            ) from None
        return whole(str(written))

    def ids(self, text: str) -> list[int]:
        """Tokens of a text that the template wrote."""
        return token_ids(self._tokenizer, text, special=False)

    def answered(self, messages: Sequence[Message], text: str) -> frozenset[int]:
        """Which tokens of the text of these messages the assistant says: what the template marks as generated, or else the
        answers, each with what closes it.
        """
        if self._tokenizer.is_fast and _GENERATED.search(self.source):
            written = self._tokenizer.apply_chat_template(
                list(messages), return_dict=True, return_assistant_tokens_mask=True, tokenizer_kwargs={"verbose": False}
            )
            return frozenset(place for place, said in enumerate(written["assistant_masks"]) if said)
        spans, ids = [*self._answers(messages, text)], self.ids(text)
        if self._tokenizer.is_fast:
            offsets = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            begins, ends = ([each[side] for each in offsets["offset_mapping"]] for side in (0, 1))
            found = ((bisect_right(ends, begin), bisect_left(begins, end)) for begin, end in spans)
        else:
            found = ((in_common(self.ids(text[:begin]), ids), in_common(self.ids(text[:end]), ids)) for begin, end in spans)
        return frozenset(place for first, last in found for place in range(first, last))

    def _answers(self, messages: Sequence[Message], text: str) -> Iterator[tuple[int, int]]:
        """Begin and end of each answer in the text. Where a template changes what is said, it ends with what closes it."""
        last = 0
        for place, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, content = self._tried(messages[:place], answer=True), message["content"].strip()
            same = in_common(before, text)
            begin = same if 0 < same == len(before) else text.find(content, max(last, same))
            if begin < 0:
                continue
            said = text.find(content, begin)
            last = begin if said < 0 else said + len(content)
            end = text.find(self._closing, last)
            last = last if end < 0 else end + len(self._closing)
            yield begin, last

    def _tried(self, messages: Sequence[Message], *, answer: bool = False) -> str:
        """As `text`; nothing where the template does not take the messages."""
        try:
            return self.text(messages, answer=answer)
        except TextError:
            return ""

    @cached_property
    def _closing(self) -> str:
        """What stands behind an answer that is the last message."""
        return self._tried([message_of("user", "."), message_of("assistant", _ANSWER)]).rpartition(_ANSWER)[2]

    def turn(self) -> str | None:
        """What stands between an answer and what the user says next; None where that cannot be said."""
        said = [message_of("user", "."), message_of("assistant", _ANSWER), message_of("user", _USER)]
        found = self._parts(said, _ANSWER, _USER)
        return None if found is None else found[1]

    def opening(self, messages: Sequence[Message]) -> int:
        """Tokens before what the user says first."""
        found = self.around(messages[0]["content"] if messages[0]["role"] == "system" else None)
        return 0 if found is None else len(self.ids(found[0]))

    def _around(self, system: str | None) -> tuple[str, str] | None:
        """What stands before a first message of the user, and between it and the answer; None where that cannot be said.

        `system` None: without a message of the system, for which templates may put one of their own.
        """
        above = [] if system is None else [message_of("system", system)]
        return self._parts([*above, message_of("user", _USER), message_of("assistant", _ANSWER)], _USER, _ANSWER)

    def _parts(self, said: Sequence[Message], first: str, second: str) -> tuple[str, str] | None:
        """What stands before the first of two contents, and between them."""
        before, one, rest = self._tried(said).partition(first)
        between, other, _ = rest.partition(second)
        return (before, between) if one and other else None


def chat_template_of(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate | None:
    """The tokenizer's template; None when it has none, or several of which none is the default."""
    try:
        return ChatTemplate(tokenizer) if tokenizer.get_chat_template() else None
    except ValueError:
        return None


def needed_template(tokenizer: PreTrainedTokenizerBase, where: str) -> ChatTemplate:
    """The tokenizer's template. Raises TextError when it has none."""
    found = chat_template_of(tokenizer)
    if found is None:
        raise TextError(
            "messages need a chat template, and the tokenizer has none",
            where=where,
            found=str(tokenizer.name_or_path),
            remedy="put a chat_template.jinja into that folder, or use plain text",
        )
    return found
