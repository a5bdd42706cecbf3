"""Documents -> token sequences -> padded batches.

Shape legend: B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modekit.text.chat import ChatTemplate, Conversation, needed_template

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

_LONG = 2**20  # characters: a document that has no more is tokenised whole
_PAST = 256  # tokens: where a text is cut changes none that stands so far before
_THIN = 64  # characters: text with more of them per token, read so far, is not read on for tokens that may never come


@dataclass(frozen=True)
class TokenSequence:
    """A piece of one document: token ids, and the bytes of text that its second to last token cover.

    `start`: tokens before the first one that says something of the document, in a chat those of the template and system.
    """

    ids: tuple[int, ...]
    scored_bytes: int
    start: int = 0


@dataclass(frozen=True)
class Batch:
    """Right-padded token ids (B, S) int64 and the mask of real tokens (B, S) bool; `rows` are places in the input."""

    input_ids: torch.Tensor
    mask: torch.Tensor
    rows: tuple[int, ...]


def encode(
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[str],
    *,
    max_tokens: int,
    sequence_length: int,
    shortest_rest: int = 2,
) -> list[TokenSequence]:
    """Documents cut into sequences of at most `sequence_length` tokens, until there are `max_tokens`.

    A document is never joined to another. Pieces of a single token are dropped (nothing in them can be predicted), and
    so is what is left of a document when it is shorter than `shortest_rest`. A conversation is written by the tokenizer's chat
    template; TextError when there is none, or it does not take the messages.
    """
    sequences: list[TokenSequence] = []
    template: ChatTemplate | None = None
    total = 0
    for document in documents:
        opening = 0
        if isinstance(document, Conversation):
            template = template or needed_template(tokenizer, "messages")
            opening, written = template.opening(document.messages), template.text(document.messages)
            ids, offsets = _tokenise(tokenizer, written, max_tokens - total, whole=True)
            document = written
        else:
            ids, offsets = _tokenise(tokenizer, document, max_tokens - total)
        for start in range(0, len(ids), sequence_length):
            stop = min(start + sequence_length, len(ids), start + max_tokens - total)
            if stop - start < (shortest_rest if start else 2):
                continue
            if offsets is None:
                scored = len(tokenizer.decode(ids[start + 1 : stop]).encode())
            else:
                end = max(offset[1] for offset in offsets[start + 1 : stop])  # special tokens have (0, 0)
                scored = len(document[offsets[start + 1][0] : end].encode())
            sequences.append(TokenSequence(tuple(ids[start:stop]), scored, min(max(0, opening - start), stop - start - 1)))
            total += stop - start
        if total >= max_tokens - 1:
            break
    return sequences


def _tokenise(
    tokenizer: PreTrainedTokenizerBase, document: str, wanted: int, *, whole: bool = False
) -> tuple[list[int], list[tuple[int, int]] | None]:
    """Token ids and, of a fast tokenizer, their places in the document; of a very long one at least the first `wanted`.

    To a `whole` text the tokenizer adds no special tokens.

    A tokenizer takes hundreds of bytes per character, so that of a document that is far longer than what is wanted only
    its beginning is tokenised, up to white space and well past the last token that is wanted. Megabytes that make hardly any
    tokens (blanks, one endless word) are left where they are.
    """
    length, most = max(_LONG, wanted), max(4 * _LONG, _THIN * wanted)
    while True:
        end = len(document) if len(document) <= length else max(document.rfind(" ", 0, length), length // 2)
        encoded = tokenizer(
            document[:end], return_offsets_mapping=tokenizer.is_fast, verbose=False, add_special_tokens=not whole
        )
        ids: list[int] = encoded["input_ids"]
        offsets: list[tuple[int, int]] | None = encoded.get("offset_mapping")
        if end == len(document) or len(ids) >= wanted + _PAST:
            return ids, offsets
        if length >= most:
            return ids[:-_PAST], None if offsets is None else offsets[:-_PAST]
        length *= 4


def make_batches(sequences: Sequence[TokenSequence], *, tokens: int = 8_192, pad_id: int = 0) -> Iterator[Batch]:
    """Batches of about `tokens` padded tokens; sequences of similar length share one, so that little is padding."""
    import torch

    order = sorted(range(len(sequences)), key=lambda row: (-len(sequences[row].ids), row))
    while order:
        longest = len(sequences[order[0]].ids)
        rows, order = order[: max(1, tokens // longest)], order[max(1, tokens // longest) :]
        input_ids = torch.full((len(rows), longest), pad_id, dtype=torch.int64)
        mask = torch.zeros((len(rows), longest), dtype=torch.bool)
        for place, row in enumerate(rows):
            ids = sequences[row].ids
            input_ids[place, : len(ids)] = torch.tensor(ids)
            mask[place, : len(ids)] = True
        yield Batch(input_ids, mask, tuple(rows))
