"""Tags: one reserved token per domain, written before a text, that tells a model which domain the text is of.

The label of a text is the name of a domain; a tag is how a model reads a label (arXiv 2407.01126 takes it as its baseline).
What a tag does to the tokens of a text, and that it is read and never predicted, is in sequences.py.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from modekit.errors import SourceError, TextError
from modekit.files.typed import shortened
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


def tagged(document: Document, label: str | None) -> Document:
    """A document with the tag of a label before it, of a pair before its source; as it is without a label.

    Conversations stay as they are: their template decides what stands first.
    """
    if label is None or isinstance(document, Conversation):
        return document
    if isinstance(document, Pair):
        return Pair(f"{tag_of(label)} {document.source}", document.target)
    return f"{tag_of(label)} {document}"


def all_tagged(tokenizer: PreTrainedTokenizerBase, documents: Iterable[Document], label: str, *, where: str) -> list[Document]:
    """Documents with the tag of a label. Raises TextError for a conversation, which has no place for one, and for text that
    begins with a tag already: two could say different things.
    """
    found = list(documents)
    if any(_source_of(document) is None for document in found):
        raise TextError(
            "a conversation has no place for a tag: its template decides what comes first",
            where=where,
            expected="text, or pairs",
            remedy="leave --tags away, or give the conversations as text",
        )
    remedy = f"take the tags out of the text: {tag_of(label)} is put before it"
    _check_untagged(tokenizer, found, "a text begins with a tag already", where=where, remedy=remedy)
    return [tagged(document, label) for document in found]


def none_tagged(tokenizer: PreTrainedTokenizerBase, documents: Iterable[Document], *, where: str) -> list[Document]:
    """Documents of no domain as they are. Raises TextError for text that begins with a tag: it is read without one."""
    found, remedy = list(documents), "take the tags out of the text, or give it as text of its domain"
    _check_untagged(tokenizer, found, "text of no domain begins with a tag", where=where, remedy=remedy)
    return found


def _check_untagged(
    tokenizer: PreTrainedTokenizerBase, documents: Iterable[Document], what: str, *, where: str, remedy: str
) -> None:
    """Raise TextError for a text, or source, that begins with a tag, also behind special tokens of the tokenizer."""
    opening = [*map(str, tokenizer.convert_ids_to_tokens(list(opening_ids(tokenizer))))]
    for document in documents:
        rest = source = _source_of(document) or ""
        for token in opening:
            rest = rest.removeprefix(token).lstrip()
        if leading_tag(tokenizer, rest) is not None:
            raise TextError(what, where=where, found=shortened(source), expected="text without its tag", remedy=remedy)


def _source_of(document: Document) -> str | None:
    """What a tag stands before; None of a conversation, which has no place for one."""
    return document.source if isinstance(document, Pair) else document if isinstance(document, str) else None


def leading_tag(tokenizer: PreTrainedTokenizerBase, document: str) -> int | None:
    """The token id of the tag that a document, or a source, begins with; None where it begins with none that is known."""
    if not document.startswith(_OPENS):
        return None
    token, sign, _ = document.partition(_CLOSES)
    found: int | None = tokenizer.convert_tokens_to_ids(token + sign)
    return None if found is None or found == tokenizer.unk_token_id else found


def without_tag(document: str) -> str:
    """The text behind a leading tag: of the white space before it the one space that `tagged` writes is taken away."""
    return document.partition(_CLOSES)[2].removeprefix(" ")


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


def add_tags(tokenizer: PreTrainedTokenizerBase, labels: Iterable[str], *, where: str) -> tuple[int, ...]:
    """Give the tokenizer a reserved token for every label that it has none for; ids of the new ones, in order.

    No text is ever cut into a part of one. Where a tag and a space are written by hand before a text that begins with no white
    space, what follows is cut as it would be without them, where the tokenizer can do that; what modekit reads never depends
    on it (sequences.py). Raises SourceError where the tokenizer cannot keep a tag whole.
    """
    known = set(labels_of(tokenizer))
    new = [tag_of(label) for label in dict.fromkeys(labels) if label not in known]
    if new:
        _add(tokenizer, new, strips=_strips(tokenizer))
    for tag in new:
        _check_whole(tokenizer, tag, where)
    return tuple(tokenizer.get_added_vocab()[tag] for tag in new)


def _add(tokenizer: PreTrainedTokenizerBase, tags: Sequence[str], *, strips: bool) -> None:
    from transformers import AddedToken

    added = [AddedToken(tag, special=True, normalized=False, rstrip=strips) for tag in tags]
    tokenizer.add_tokens(added, special_tokens=True)


def _strips(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether tags are to take the space behind them along: where a text is cut so as it is without one, and only so."""
    alone: list[int] = tokenizer(_SAMPLE)["input_ids"]
    tag = tag_of("any")
    for strips in (False, True):
        other = copy.deepcopy(tokenizer)
        _add(other, [tag], strips=strips)
        ids: list[int] = other(f"{tag} {_SAMPLE}")["input_ids"]
        if [each for each in ids if each != other.get_added_vocab().get(tag)] == alone:
            return strips
    return False


def _check_whole(tokenizer: PreTrainedTokenizerBase, tag: str, where: str) -> None:
    found = tokenizer.get_added_vocab().get(tag)
    ids: list[int] = tokenizer(f"{tag} {_SAMPLE}")["input_ids"]
    if found is None or ids.count(found) != 1:
        raise SourceError(
            "the tokenizer has no place for a tag: it does not keep an added token whole",
            where=where,
            found=f"{tag} is read as {ids[:8]}",
            remedy="use a base with another tokenizer, or leave --tags away",
        )
