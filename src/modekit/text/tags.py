"""Tags: one reserved token per domain, written before a text, that tells a model which domain the text is of.

The label of a text is the name of a domain; a tag is how a model reads a label (arXiv 2407.01126 takes it as its baseline).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from modekit.text.chat import Conversation
from modekit.text.pairs import Pair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OPENS, _CLOSES = "<domain:", ">"


def tag_of(label: str) -> str:
    """The reserved token of a label."""
    return f"{_OPENS}{label}{_CLOSES}"


def labels_of(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Labels that the tokenizer has a reserved token for, in the order of its vocabulary."""
    added: dict[str, int] = tokenizer.get_added_vocab()
    found = sorted((token for token in added if token.startswith(_OPENS) and token.endswith(_CLOSES)), key=added.__getitem__)
    return tuple(token[len(_OPENS) : -len(_CLOSES)] for token in found)


def tagged(document: str, label: str | None) -> str:
    """A document with the tag of a label before it, of a pair before its source; as it is without a label.

    Conversations stay as they are: their template decides what stands first.
    """
    if label is None or isinstance(document, Conversation):
        return document
    if isinstance(document, Pair):
        return Pair(f"{tag_of(label)} {document.source}", document.target)
    return f"{tag_of(label)} {document}"
