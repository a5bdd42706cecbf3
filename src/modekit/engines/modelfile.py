"""The Modelfile beside an exported GGUF: with it Ollama writes conversations as the model's own chat template does.

A template is described here by what stands between messages (`Seams`), said in Go's template language, and taken only where it
writes some conversations as the tokenizer's own does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from modekit.engines.sampling import Sampling
from modekit.errors import TextError
from modekit.text.chat import ChatTemplate, chat_template_of
from modekit.text.document import Message, message_of

MODELFILE = "Modelfile"
_LONGEST = 8_192  # tokens: the memory of a context grows with it; users may ask for more
_SYSTEM = "⁂system⁂"


@dataclass(frozen=True)
class Seams:
    """What a chat template writes between messages.

    Attributes:
        system, user: before a first message of the system, or of the user. Where a template has no place for the system's, it
            begins the user's.
        separator: between the system's message and the user's.
        answer, prompt: between the user's and the answer: one that was given, and one that is to come.
        again: between an answer and the user's next message.
    """

    system: str
    user: str
    separator: str
    answer: str
    prompt: str
    again: str

    @classmethod
    def of(cls, template: ChatTemplate) -> Seams | None:
        """What a template writes; None where it writes anything else, too."""
        first, under, again = template.around(None), template.around(_SYSTEM), template.turn()
        if first is None or again is None:
            return None
        user, answer = first
        system, shown, separator = (user, "", "\n\n") if under is None else under[0].partition(_SYSTEM)
        asked = _written(template, [message_of("user", _SYSTEM)])
        if asked is None or (under is not None and not shown):
            return None
        found = cls(system, user, separator, answer, asked.rpartition(_SYSTEM)[2], again)
        return found if all(found.text(each) == _written(template, each) for each in _tried(under is not None)) else None

    @property
    def default_system(self) -> str:
        """The system prompt that the template has of its own."""
        long_enough = len(self.user) >= len(self.system) + len(self.separator)
        shown = long_enough and self.user.startswith(self.system) and self.user.endswith(self.separator)
        return self.user[len(self.system) : len(self.user) - len(self.separator)] if shown else ""

    def text(self, messages: Sequence[Message]) -> str:
        """A conversation, up to where the answer begins."""
        before, parts = "", []
        for message in messages:
            role = message["role"]
            opening = {"": self.user, "system": self.separator}.get(before, self.again)
            parts += [{"system": self.system, "user": opening, "assistant": self.answer}[role], message["content"]]
            before = role
        return "".join([*parts, self.prompt])

    def go(self, begin: str) -> str:
        """The same as a template of Ollama, which puts `begin`, if anything, before every text by itself."""
        system, user = (_literal(each.removeprefix(begin)) for each in (self.system, self.user))
        separator, answer, prompt, again = map(_literal, (self.separator, self.answer, self.prompt, self.again))
        return (
            '{{ $before := "" }}{{ range .Messages }}'
            f'{{{{ if eq .Role "system" }}}}{system}{{{{ .Content }}}}'
            f'{{{{ else if eq .Role "user" }}}}{{{{ if eq $before "" }}}}{user}'
            f'{{{{ else if eq $before "system" }}}}{separator}{{{{ else }}}}{again}{{{{ end }}}}{{{{ .Content }}}}'
            f'{{{{ else if eq .Role "assistant" }}}}{answer}{{{{ .Content }}}}{{{{ end }}}}'
            f'{{{{ $before = .Role }}}}{{{{ end }}}}{{{{ if eq $before "user" }}}}{prompt}{{{{ end }}}}'
        )


def modelfile(folder: Path, tokenizer: PreTrainedTokenizerBase, gguf: str, context: int, adapter: str | None = None) -> str:
    """The Modelfile of a GGUF in its folder, with an adapter or without.

    `folder`: the mixture, whose generation_config.json says how it samples; `context`: tokens that it was trained to read.
    """
    sampling, template = Sampling.of(folder), chat_template_of(tokenizer)
    seams = None if template is None else Seams.of(template)
    lines = [f"FROM ./{gguf}", *([] if adapter is None else [f"ADAPTER ./{adapter}"])]
    if seams is not None:
        begin = str(tokenizer.bos_token or "") if tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] else ""
        lines += [f"TEMPLATE {_quoted(seams.go(begin))}"]
        if seams.default_system and '"""' not in seams.default_system:
            lines += [f"SYSTEM {_quoted(seams.default_system)}"]
    elif template is not None:
        lines += ["# The chat template cannot be said in Ollama's language: what users say is sent as Ollama guesses."]
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in _stops(tokenizer, sampling, seams)]
    settings = {"num_ctx": min(context, _LONGEST), **sampling.for_ollama()}
    return "\n".join([*lines, *(f"PARAMETER {name} {value:g}" for name, value in settings.items()), ""])


def ends_of(tokenizer: PreTrainedTokenizerBase, sampling: Sampling, turn: str | None) -> frozenset[int]:
    """Tokens with which an answer ends: the model's, the tokenizer's, and special ones that stand before the next turn."""
    behind = [] if turn is None else tokenizer(turn, add_special_tokens=False, verbose=False)["input_ids"][:1]
    special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    ends = {*sampling.ends, tokenizer.eos_token_id, *(token for token in behind if token in special)}
    return frozenset(token for token in ends if token is not None)


def _stops(tokenizer: PreTrainedTokenizerBase, sampling: Sampling, seams: Seams | None) -> Iterator[str]:
    for token in sorted(ends_of(tokenizer, sampling, seams.again if seams else None)):
        text = str(tokenizer.decode([token]))
        if text.strip() and '"""' not in text:
            yield text


def _tried(system: bool) -> Iterator[list[Message]]:
    """Conversations that a template is tried with; with the system's word where there is room for it."""
    turns = [
        message_of(role, word)
        for role, word in zip(("user", "assistant") * 3, ["One", "two", "three", "four", "five", "six"], strict=True)
    ]
    for end in (1, 3, 5):
        yield turns[:end]
        if system:
            yield [message_of("system", "Be brief."), *turns[:end]]


def _written(template: ChatTemplate, messages: Sequence[Message]) -> str | None:
    try:
        return template.text(messages, answer=True)
    except TextError:
        return None


def _literal(text: str) -> str:
    """Text as a Go template has it: as it is, or quoted where it would be read as something else, or be lost."""
    if all(sign.isprintable() or sign == "\n" for sign in text) and not any(sign in text for sign in ("{{", '"""')):
        return text
    signs = {"\n": "\\n", "\t": "\\t", "\r": "\\r", '"': '\\"', "\\": "\\\\"}
    quoted = "".join(signs.get(sign) or (sign if sign.isprintable() else f"\\U{ord(sign):08x}") for sign in text)
    return f'{{{{ "{quoted}" }}}}'


def _quoted(text: str) -> str:
    return f'"""{text}"""'
