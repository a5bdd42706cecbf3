"""What a document is: plain text, a pair of parallel text, or a conversation; and which of them a model reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from modekit.errors import TextError
from modekit.sources.family import Reads

Message = Mapping[str, str]
"""`role` (system, user, assistant, ...) and `content`."""


@dataclass(frozen=True)
class Pair:
    """A source and its target, neither of them empty: what a model with an encoder reads, and what it is to write."""

    source: str
    target: str

    @property
    def text(self) -> str:
        """Both sides as one text, which decides the split and what the pair is compared by."""
        return f"{self.source}\n{self.target}"


@dataclass(frozen=True)
class Conversation:
    """Messages, which the tokenizer's chat template writes.

    `is_exchange`: a prompt and its answer, which are plain text where there is no template.
    """

    messages: Sequence[Message]
    is_exchange: bool = False

    @property
    def text(self) -> str:
        """The contents as one text, which decides the split and what the conversation is compared by."""
        return "\n\n".join(message["content"].strip() for message in self.messages).strip()

    @property
    def exchanges(self) -> list[tuple[str, str]]:
        """What the user says each time, and what the assistant answers, if anything."""
        found = list[tuple[str, str]]()
        for said, then in zip(self.messages, [*self.messages[1:], message_of("", "")], strict=True):
            if said["role"] == "user" and said["content"].strip():
                found.append((said["content"].strip(), then["content"].strip() if then["role"] == "assistant" else ""))
        return found


Document = str | Pair | Conversation
"""Plain text is itself."""


def text_of(document: Document) -> str:
    """A document as plain text."""
    return document if isinstance(document, str) else document.text


def reads_of(document: Document) -> Reads:
    """Which models read a document: those that read pairs, or the others."""
    return "pairs" if isinstance(document, Pair) else "text"


def message_of(role: str, content: str) -> Message:
    """A message of a conversation."""
    return {"role": role, "content": content}


def whole_pair(source: str, target: str, *, where: str) -> Pair:
    """The pair of two sides without the space around them. Raises TextError when one is empty."""
    pair = Pair(source.strip(), target.strip())
    if not (pair.source and pair.target):
        raise TextError(
            f"a pair has an empty {' and an empty '.join(name for name, side in vars(pair).items() if not side)}",
            where=where,
            found=f"{pair.source[:30]!r} and {pair.target[:30]!r}",
            expected="text on both sides",
            remedy="fill in what is missing, or remove the pair",
        )
    return pair


def both_kinds(*, where: str | None = None, found: str | None = None) -> TextError:
    """The error of pairs and other text that would be read together."""
    return TextError(
        "the text of one domain has pairs and plain text",
        where=where,
        found=found,
        expected="pairs alone, for models with an encoder, or plain text alone, for the others",
        remedy="leave out one kind: text files, records and prompts alike",
    )


def check_kind(documents: Iterable[Document], reads: Reads, *, where: str) -> None:
    """Raise TextError where a model that reads pairs is given plain text, or another one pairs."""
    odd = next((document for document in documents if reads_of(document) != reads), None)
    if odd is not None:
        raise other_kind(reads, where=where, found=repr(text_of(odd)[:60]))


def other_kind(reads: Reads, *, where: str | None = None, found: str | None = None) -> TextError:
    """The error of text that is not of the kind that a model reads."""
    if reads == "pairs":
        what, remedy = "a model with an encoder needs pairs of source and target, and this is plain text", "give parallel text"
        expected = '{"source": "...", "target": "..."} or {"translation": {"en": "...", "fr": "..."}} per line of a .jsonl, '
        expected += "without a 'text'; or such columns of a .tsv"
        return TextError(what, where=where, found=found, expected=expected, remedy=remedy)
    what, remedy = "a model without an encoder reads plain text, and these are pairs of source and target", "give plain text"
    return TextError(what, where=where, found=found, remedy=f"{remedy}, or write source and target of each pair into one text")
