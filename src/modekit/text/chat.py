"""Conversations as documents, and the chat template of a tokenizer, which writes them.

A template is a program that came with a model. transformers runs it in jinja's sandbox; here it also has little time and little
memory, so that a stranger's cannot hang a fit.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from jinja2 import Environment

from modekit.errors import TextError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, str]
"""`role` (system, user, assistant, ...) and `content`."""
_SECONDS = 10.0  # for one text
_MEMORY = 2**31  # bytes more than there are now
_USER, _ANSWER = "⁂user⁂", "⁂answer⁂"  # stand for what is said, where only what lies around it is asked for


class Conversation(str):
    """Messages as one document.

    As a string it is what was said, which decides its split and what it is compared by; `encode` writes the messages as the
    tokenizer's template does.
    """

    messages: tuple[Message, ...]

    def __new__(cls, messages: Sequence[Message]) -> Conversation:
        """Of messages that are not empty."""
        made = super().__new__(cls, "\n\n".join(message["content"].strip() for message in messages).strip())
        made.messages = tuple(dict(message) for message in messages)
        return made

    @property
    def said(self) -> str:
        """Who said what, as one text."""
        return json.dumps(self.messages, ensure_ascii=False, sort_keys=True)

    def __getnewargs__(self) -> tuple[Any, ...]:
        return (self.messages,)


def conversation_of(value: object) -> Conversation | None:
    """The conversation of a record's `messages`; None when they are no list of roles with text."""
    if not isinstance(value, list) or not value:
        return None
    messages = []
    for each in value:
        role, content = (each.get("role"), _text_of(each.get("content"))) if isinstance(each, Mapping) else (None, None)
        if not isinstance(role, str) or not role or content is None:
            return None
        messages.append({"role": role, "content": content.encode("utf-8", "replace").decode()})
    return Conversation(messages)


def _text_of(content: object) -> str | None:
    """Text, or the text of parts that are all text."""
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, Mapping) and part.get("type") == "text"]
        known = [text for text in texts if isinstance(text, str)]
        return "".join(known) if known and len(known) == len(content) else None
    return content if isinstance(content, str) else None


class ChatTemplate:
    """What a tokenizer makes of messages."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._around = lru_cache(maxsize=64)(self._find_around)

    @property
    def source(self) -> str:
        """The template itself."""
        return str(self._tokenizer.get_chat_template())

    def text(self, messages: Sequence[Message], *, answer: bool = False) -> str:
        """The messages as the model reads them, and with `answer` the beginning of the answer. Raises TextError."""
        try:
            _check_operators(self.source)
            with _bounded():
                said = self._tokenizer.apply_chat_template(
                    [dict(message) for message in messages], tokenize=False, add_generation_prompt=answer
                )
        except Exception as error:  # a template raises what it likes
            raise TextError(
                "the tokenizer's chat template does not take these messages", where=self._where,
                found=f"{str(error)[:300] or type(error).__name__} (messages of {_shown(messages)})",
                remedy="correct the messages, or the template",
            ) from None  # fmt: skip
        return str(said).encode("utf-8", "replace").decode()  # half of a surrogate pair is no character

    def ids(self, text: str) -> list[int]:
        """Tokens of a text that the template wrote."""
        found: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return found

    def around(self, system: str | None) -> tuple[str, str] | None:
        """What stands before a first message of the user, and between it and the answer; None where that cannot be said.

        `system` None: without a message of the system, for which templates may put one of their own.
        """
        return self._around(system)

    def turn(self) -> str | None:
        """What stands between an answer and what the user says next; None where that cannot be said."""
        said = [message_of("user", "."), message_of("assistant", _ANSWER), message_of("user", _USER)]
        try:
            _, answer, rest = self.text(said).partition(_ANSWER)
        except TextError:
            return None
        between, user, _ = rest.partition(_USER)
        return between if answer and user else None

    def opening(self, messages: Sequence[Message]) -> int:
        """Tokens before what the user says first."""
        system = messages[0]["content"] if messages[0]["role"] == "system" else None
        found = self.around(system)
        return 0 if found is None else len(self.ids(found[0]))

    def _find_around(self, system: str | None) -> tuple[str, str] | None:
        above = [] if system is None else [message_of("system", system)]
        said = [*above, message_of("user", _USER), message_of("assistant", _ANSWER)]
        try:
            before, user, rest = self.text(said).partition(_USER)
        except TextError:
            return None
        between, answer, _ = rest.partition(_ANSWER)
        return (before, between) if user and answer else None

    @property
    def _where(self) -> str:
        return str(Path(str(self._tokenizer.name_or_path)))


def message_of(role: str, content: str) -> Message:
    """What somebody says."""
    return {"role": role, "content": content}


def _shown(messages: Sequence[Message]) -> str:
    """Roles, and how the first message begins, by which it can be found."""
    roles = ", ".join(message["role"] for message in messages[:4]) + (", ..." if len(messages) > 4 else "")
    return f"{roles}: {messages[0]['content'][:60]!r}" if messages else "nobody"


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
            "messages need a chat template, and the tokenizer has none", where=where, found=str(tokenizer.name_or_path),
            remedy="give plain text, or put a chat_template.jinja beside the base model's tokenizer",
        )  # fmt: skip
    return found


class _TooLongError(Exception):
    pass


@lru_cache(maxsize=8)
def _check_operators(source: str) -> None:
    """Raise for powers, one of which may take hours while no line of the template runs that could be stopped."""
    if any(kind == "operator" and value == "**" for _, kind, value in Environment().lex(source)):
        raise ValueError("it computes powers (**)")


@contextmanager
def _bounded() -> Iterator[None]:
    """While open, a template's loops end after some seconds, and its texts at some size where the system can say so.

    Lines of a template are Python's, whose tracing sees every one of them.
    """
    end = time.monotonic() + _SECONDS

    def watch(frame: FrameType, _event: str, _arg: object) -> Any:
        if time.monotonic() > end:
            raise _TooLongError(f"it did not end within {_SECONDS:.0f} seconds")
        return watch if frame.f_code.co_filename == "<template>" else None

    before = sys.gettrace()
    with _little_memory():
        sys.settrace(watch)
        try:
            yield
        finally:
            sys.settrace(before)


@contextmanager
def _little_memory() -> Iterator[None]:
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_bytes().split()[0])
    except (ImportError, OSError):  # not on this system
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = pages * resource.getpagesize() + _MEMORY
    if any(limit != resource.RLIM_INFINITY and limit < wanted for limit in (soft, hard)):
        yield
        return
    resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
