"""Documents -> token sequences -> padded batches.

Shape legend: B batch, S sequence (of a pair the source), T target of a pair, P predicted tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from modekit.errors import TextError
from modekit.text.chat import ChatTemplate, chat_template_of, needed_template
from modekit.text.document import Conversation, Document, Pair, both_kinds, reads_of
from modekit.text.plain import token_ids
from modekit.text.tags import opening_ids, place_of_tag, split_tag

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

_LONG = 2**20  # characters: a document that has no more is tokenised whole
_CHARACTERS = 64  # of a longer one so many are tokenised for each token that is wanted
NO_LABEL = -100  # where nothing is predicted, as losses of torch and transformers have it


@dataclass(frozen=True)
class TokenSequence:
    """A piece of one document as token ids.

    `start`: tokens before the first one that says something of the document, in a chat those of the template and system.
    `target`: of a pair the tokens that are predicted, with the end token; `ids` are the source's.
    `tag`: where among `ids` a domain's tag stands, if there is one. It is read and never predicted: what counts is what
    would count without it.
    `unsaid`: places among `ids` behind the first that are not predicted either, as no assistant says what stands there.
    """

    ids: tuple[int, ...]
    start: int = 0
    target: tuple[int, ...] = ()
    tag: int | None = None
    unsaid: frozenset[int] = frozenset()

    @property
    def places(self) -> int:
        """How many tokens stand where a model says the next one: all but the first, of a pair those of the target."""
        return len(self.target) if self.target else len(self.ids) - 1

    @property
    def silent(self) -> frozenset[int]:
        """Those of `ids` that are not predicted besides the first: `unsaid`, a tag, the token behind one that is the first."""
        return self.unsaid if self.tag is None or self.target else frozenset([max(self.tag, 1)])

    @property
    def scored(self) -> int:
        """How many tokens are predicted: of `places` all but the silent ones."""
        return self.places - len(self.silent)

    def with_tag(self, tag: int | None, place: int = 0) -> TokenSequence:
        """The same with a tag, a token id, in the place of its own, if it has one, else at `place`; None takes it out."""
        place = place if self.tag is None else self.tag
        behind = self.ids[place + (self.tag is not None) :]
        ids = (*self.ids[:place], *(() if tag is None else (tag,)), *behind)
        return replace(self, ids=ids, tag=None if tag is None else place)

    @property
    def size(self) -> int:
        """How many tokens there are altogether."""
        return len(self.ids) + len(self.target)


@dataclass(frozen=True)
class Batch:
    """Right-padded token ids (B, S) int64 and the mask of real tokens (B, S) bool; `rows` are places in the input.

    `target`: of pairs the labels (B, T) int64, -100 behind their end; None for plain text. `silent`: tokens (B, S) bool that
    are not predicted; None where all are.
    """

    input_ids: torch.Tensor
    mask: torch.Tensor
    rows: tuple[int, ...]
    target: torch.Tensor | None = None
    silent: torch.Tensor | None = None

    @property
    def labels(self) -> torch.Tensor:
        """What is predicted (B, P) int64, -100 where nothing is: the next tokens, P = S - 1, or those of the target, P = T."""
        if self.target is not None:
            return self.target
        counts = self.mask if self.silent is None else self.mask & ~self.silent
        return self.input_ids[:, 1:].masked_fill(~counts[:, 1:], NO_LABEL)

    @property
    def target_mask(self) -> torch.Tensor:
        """Real tokens of the targets (B, T) bool; (B, 0) for plain text."""
        return self.mask[:, :0] if self.target is None else self.target != NO_LABEL

    @property
    def tokens(self) -> int:
        """Real tokens altogether."""
        return int(self.mask.sum()) + int(self.target_mask.sum())

    @property
    def scored(self) -> int:
        """How many tokens are predicted."""
        return int((self.labels != NO_LABEL).sum())

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        return replace(self, **{name: each.to(device) for name, each in vars(self).items() if hasattr(each, "to")})


def encode(
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[Document],
    *,
    max_tokens: int,
    sequence_length: int,
    shortest_rest: int = 2,
    answers: bool = False,
) -> list[TokenSequence]:
    """Documents cut into sequences of at most `sequence_length` tokens, until there are `max_tokens`.

    A document is never joined to another. Pieces of a single token are dropped (nothing in them can be predicted), and
    so is what is left of a document when it is shorter than `shortest_rest`. A conversation is written by the tokenizer's chat
    template; TextError when there is none, or it does not take the messages. A prompt with its answer is plain text then.
    `answers`: of a conversation only what the assistant says is to be predicted, and pieces without that are left out.

    A pair is never cut: one with a side of more than `sequence_length` tokens is left out, and reading ends with the first that
    no longer fits into `max_tokens`.

    Where a document begins with a tag that the tokenizer knows (text/tags.py), every piece of it does: the text behind it is
    written as it would be without it, and the tag put before.
    """
    sequences: list[TokenSequence] = []
    writer = _Writer(tokenizer, answers)
    total = 0
    for document in documents:
        if isinstance(document, Pair):
            pair = writer.pair(document, sequence_length)
            total += 0 if pair is None else pair.size
            if total > max_tokens:
                break
            sequences += [] if pair is None else [pair]
            continue
        written = writer.written(document, max_tokens - total)
        room = int(written.tag is not None)
        longest = sequence_length - room
        for start in range(0, len(written.ids), longest):
            stop = min(start + longest, len(written.ids), start + max_tokens - total - room)
            if stop - start < (shortest_rest if start else 2):
                continue
            piece = writer.piece(written, start, stop)
            total += piece.size
            sequences += [piece] if piece.scored else []
        if total >= max_tokens - 1:
            break
    return sequences


def none_fits(documents: Sequence[Document], sequence_length: int, *, where: str, found: str | None = None) -> TextError:
    """The error of documents that `encode` has made no sequence of."""
    if any(isinstance(document, Conversation) for document in documents):
        return TextError(
            "no assistant says anything in these conversations",
            where=where,
            found=found,
            expected="messages of the role assistant",
            remedy="give conversations with answers, or plain text",
        )
    if "pairs" not in map(reads_of, documents):
        return TextError("the text is shorter than two tokens", where=where, found=found, remedy="give more text")
    return TextError(
        "no pair is short enough to be read",
        where=where,
        found=found or f"{len(documents)} longer pairs",
        expected=f"sides of at most {sequence_length} tokens",
        remedy="give shorter pairs, or ask for more tokens and a longer sequence_length, up to the model's positions",
    )


@dataclass(frozen=True)
class _Written:
    """A document as tokens; `opening` as `start` of TokenSequence; `tag` the token it began with, if any, not among `ids`;
    `said`: the places of what the assistant says, None where everything is predicted.
    """

    ids: list[int]
    opening: int = 0
    tag: int | None = None
    said: frozenset[int] | None = None


class _Writer:
    """Documents of many kinds as tokens. What it asks the tokenizer for is the same for all of them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, answers: bool) -> None:
        self.tokenizer = tokenizer
        self._answers = answers

    @cached_property
    def _template(self) -> ChatTemplate | None:
        return chat_template_of(self.tokenizer)

    @cached_property
    def _opening(self) -> tuple[int, ...]:
        return opening_ids(self.tokenizer)

    def _with_tag(self, sequence: TokenSequence, tag: int | None) -> TokenSequence:
        """With its document's tag, if there is one, behind the special tokens that it begins with."""
        return sequence if tag is None else sequence.with_tag(tag, place_of_tag(self._opening, sequence.ids))

    def piece(self, written: _Written, start: int, stop: int) -> TokenSequence:
        """Some of the tokens as a sequence, with the tag where there is one: in later pieces in front of all."""
        opening = min(max(0, written.opening - start), stop - start - 1)
        said = range(start, stop) if written.said is None else written.said
        unsaid = frozenset(place - start for place in range(start + 1, stop) if place not in said)
        return self._with_tag(TokenSequence(tuple(written.ids[start:stop]), opening, unsaid=unsaid), written.tag)

    def written(self, document: str | Conversation, wanted: int) -> _Written:
        """Of a long one at least the first `wanted` tokens. Raises TextError for messages without a template."""
        if isinstance(document, Conversation):
            if self._template is not None or not document.is_exchange:
                template = self._template or needed_template(self.tokenizer, "messages")
                text = template.text(document.messages)
                ids = self._ids(text, wanted, special=False)
                said = template.answered(document.messages, text) if self._answers else None
                return _Written(ids, template.opening(document.messages), said=said)
            document = document.text
        tag, text = split_tag(self.tokenizer, document)
        return _Written(self._ids(text, wanted), tag=tag)

    def _ids(self, text: str, wanted: int, *, special: bool = True) -> list[int]:
        """Tokens; of a very long text those of its beginning, as a tokenizer takes hundreds of bytes per character."""
        return token_ids(self.tokenizer, text[: max(_LONG, _CHARACTERS * wanted)], special=special)

    def pair(self, pair: Pair, longest: int) -> TokenSequence | None:
        """A pair as the tokenizer writes sources and targets; None when a side has no token, or more than `longest`."""
        if max(len(pair.source), len(pair.target)) > _LONG:  # longer than any sequence
            return None
        tag, source = split_tag(self.tokenizer, pair.source)
        ids = token_ids(self.tokenizer, source)
        target: list[int] = self.tokenizer(text_target=pair.target, verbose=False)["input_ids"]
        if not 0 < min(len(ids), len(target)) <= max(len(ids) + (tag is not None), len(target)) <= longest:
            return None
        return self._with_tag(TokenSequence(tuple(ids), target=tuple(target)), tag)


def make_batches(sequences: Sequence[TokenSequence], *, tokens: int = 8_192) -> Iterator[Batch]:
    """Batches of about `tokens` padded tokens, of sources and targets together; sequences of similar length share one, so that
    little is padding.
    """
    order = sorted(range(len(sequences)), key=lambda row: (-sequences[row].size, row))
    start = 0
    while start < len(order):
        rows, ids, target = [order[start]], len(sequences[order[start]].ids), len(sequences[order[start]].target)
        for row in (order[place] for place in range(start + 1, len(order))):
            longer = max(ids, len(sequences[row].ids)), max(target, len(sequences[row].target))
            if sum(longer) * (len(rows) + 1) > tokens:
                break
            ids, target = longer
            rows.append(row)
        start += len(rows)
        yield _padded([sequences[row] for row in rows], tuple(rows))


def _padded(sequences: Sequence[TokenSequence], rows: tuple[int, ...]) -> Batch:
    """A batch of the sequences of these rows."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    def padded(values: Iterable[Sequence[int]], filler: int = 0) -> torch.Tensor:
        return pad_sequence([torch.tensor(each, dtype=torch.int64) for each in values], batch_first=True, padding_value=filler)

    if len({bool(each.target) for each in sequences}) > 1:
        raise both_kinds()
    mask = padded([1] * len(each.ids) for each in sequences).bool()
    silent = None
    if any(each.silent for each in sequences):
        silent = padded([place in each.silent for place in range(len(each.ids))] for each in sequences).bool()
    target = padded((each.target for each in sequences), NO_LABEL) if sequences[0].target else None
    return Batch(padded(each.ids for each in sequences), mask, rows, target, silent)
