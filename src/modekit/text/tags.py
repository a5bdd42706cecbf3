"""Tags: one reserved token per domain, written before a text, that tells a model which domain the text is of.

The label of a text is the name of a domain; a tag is how a model reads a label (arXiv 2407.01126 takes it as its baseline).
What a tag does to the tokens of a text, and that it is read and never predicted, is in sequences.py.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from modekit.errors import SourceError, TextError
from modekit.text.document import Conversation, Document, Pair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OPENS, _CLOSES = "<domain:", ">"
_SAMPLE = "Some text, of which a tag changes nothing"


def tag_of(label: str) -> str:
    """The reserved token of a label."""
    return f"{_OPENS}{label}{_CLOSES}"


def labels_of(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Labels that the tokenizer has a reserved token for, in the order of its vocabulary."""
    added: dict[str, int] = tokenizer.get_added_vocab()
    found = sorted((token for token in added if token.startswith(_OPENS) and token.endswith(_CLOSES)), key=added.__getitem__)
    return tuple(token[len(_OPENS) : -len(_CLOSES)] for token in found)


def tag_ids(tokenizer: PreTrainedTokenizerBase, labels: Iterable[str]) -> tuple[int, ...]:
    """The tags of labels that `labels_of` names, as token ids."""
    added: dict[str, int] = tokenizer.get_added_vocab()
    return tuple(added[tag_of(label)] for label in labels)


def tagged(document: Document, label: str, *, where: str | None = None) -> Document:
    """A document with the tag of a label before it, of a pair before its source. Raises TextError for a conversation, which has
    no place for one.
    """
    if isinstance(document, Conversation):
        raise TextError(
            "a conversation has no place for a tag: its template decides what comes first",
            where=where,
            expected="text, or pairs",
            remedy="leave --tags away, or give the conversations as text",
        )
    if isinstance(document, Pair):
        return Pair(f"{tag_of(label)} {document.source}", document.target)
    return f"{tag_of(label)} {document}"


def split_tag(tokenizer: PreTrainedTokenizerBase, document: str) -> tuple[int | None, str]:
    """The token id of the tag that a document, or a source, begins with, and the text behind it without the one space that
    `tagged` writes; None, and the document, where it begins with none that is known.
    """
    token, sign, text = document.partition(_CLOSES)
    tag: int | None = tokenizer.convert_tokens_to_ids(token + sign) if document.startswith(_OPENS) else None
    return (None, document) if tag in (None, tokenizer.unk_token_id) else (tag, text.removeprefix(" "))


def opening_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Special tokens that the tokenizer begins every text with."""
    whole: list[int] = tokenizer(_SAMPLE)["input_ids"]
    alone: list[int] = tokenizer(_SAMPLE, add_special_tokens=False)["input_ids"]
    for place in range(len(whole) - len(alone) + 1):
        if whole[place : place + len(alone)] == alone:
            return tuple(whole[:place])
    return ()


def place_of_tag(opening: tuple[int, ...], ids: Sequence[int]) -> int:
    """Where a tag stands among tokens: behind those that open a text, which later pieces of a document do not begin with."""
    return len(opening) if tuple(ids[: len(opening)]) == opening else 0


def add_tags(tokenizer: PreTrainedTokenizerBase, labels: Iterable[str]) -> tuple[int, ...]:
    """Give the tokenizer a reserved token for every label that it has none for; ids of the new ones, in order.

    No text is ever cut into a part of one. Where a tag and a space are written by hand before a text, what follows is cut as it
    would be without them, where the tokenizer can do that. Raises SourceError where it cannot keep a tag whole.
    """
    known = set(labels_of(tokenizer))
    new = [tag_of(label) for label in dict.fromkeys(labels) if label not in known]
    alone: list[int] = tokenizer(_SAMPLE)["input_ids"]
    strips = bool(new) and _cut_behind_tag(tokenizer, False) != alone == _cut_behind_tag(tokenizer, True)
    _add(tokenizer, new, strips)
    added: dict[str, int] = tokenizer.get_added_vocab()
    for tag in new:
        ids: list[int] = tokenizer(f"{tag} {_SAMPLE}")["input_ids"]
        if tag not in added or ids.count(added[tag]) != 1:
            raise SourceError(
                "the tokenizer has no place for a tag: it does not keep an added token whole",
                where="BASE",
                found=f"{tag} is read as {ids[:8]}",
                remedy="use a base with another tokenizer, or leave --tags away",
            )
    return tuple(added[tag] for tag in new)


def _add(tokenizer: PreTrainedTokenizerBase, tags: Sequence[str], strips: bool) -> None:
    from transformers import AddedToken

    tokenizer.add_tokens([AddedToken(tag, special=True, normalized=False, rstrip=strips) for tag in tags], special_tokens=True)


def _cut_behind_tag(tokenizer: PreTrainedTokenizerBase, strips: bool) -> list[int]:
    """Tokens of a text behind a tag, which takes the space along or not."""
    other, tag = copy.deepcopy(tokenizer), tag_of("any")
    _add(other, [tag], strips)
    return [each for each in other(f"{tag} {_SAMPLE}")["input_ids"] if each != other.get_added_vocab().get(tag)]
