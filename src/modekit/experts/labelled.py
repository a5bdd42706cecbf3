"""What an expert is made of: text of one domain, or of several that are read with their tags, and text of no domain besides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from modekit.errors import TextError
from modekit.evaluation.domains import Domain
from modekit.experts.specialist import TagsUsed, TextUsed
from modekit.loaded.text_training import Training, training_sequences
from modekit.text.document import Document
from modekit.text.held_out import read_text
from modekit.text.sequences import TokenSequence, encode
from modekit.text.splits import text_record
from modekit.text.tags import all_tagged, labels_of, none_tagged, tag_ids
from modekit.training.batches import drawn_label
from modekit.training.losses import GENERIC
from modekit.training.settings import RandomiseTo

SHARE = 0.3
"""Of generic text, when nothing is said."""


@dataclass(frozen=True)
class Labelled:
    """Texts by label, each of which is read with the tag of its label.

    `randomise`: probability that a sequence is read under a label that was drawn anew, in training alone and every time that it
    is read; `randomise_to` says which (training/settings.py), among all labels that the tokenizer has a tag for.
    """

    texts: Mapping[str, Sequence[str]]
    randomise: float = 0.0
    randomise_to: RandomiseTo = "all"


@dataclass(frozen=True)
class Generic:
    """Text of no domain, read without a tag, and its share of the tokens."""

    texts: Sequence[str]
    share: float = SHARE


@dataclass(frozen=True)
class Reading:
    """What is read: by which tokenizer, from where, and how long and fast."""

    tokenizer: PreTrainedTokenizerBase
    root: Path
    training: Training


@dataclass(frozen=True)
class Material:
    """What an expert is made of.

    Attributes:
        fit: documents that it is trained on.
        sequences: what is read in training, as often as it stands here.
        held_out: what the loss is shown on, per label; one domain of no name without labels.
        tokens: of `sequences`, each once.
        labels, generic: what specialist.json says of tags, and of generic text.
    """

    fit: list[Document]
    sequences: Sequence[TokenSequence]
    held_out: list[Domain]
    tokens: int
    labels: TagsUsed | None = None
    generic: TextUsed | None = None

    def as_data(self) -> dict[str, object]:
        """What specialist.json says of labels and generic text, where there are any."""
        found = {"labels": self.labels, "generic": self.generic}
        return {name: each.model_dump(mode="json", exclude_unset=True) for name, each in found.items() if each is not None}

    def as_asked(self) -> list[object]:
        """The same, and all that is held out: what was measured on it before the first step is not measured again."""
        return [self.as_data(), [[domain.name, [each.ids for each in domain.sequences]] for domain in self.held_out]]


def read_material(texts: Sequence[str] | Labelled, generic: Generic | None, reading: Reading) -> Material:
    """Read the fit split of all texts, and what is held out of those of a domain.

    Raises TextError where one has nothing left, or is to have a tag and is a conversation.
    """
    named = texts.texts if isinstance(texts, Labelled) else {None: texts}
    fit: list[Document] = []
    sequences: list[TokenSequence] = []
    held_out: list[Domain] = []
    for label, specs in named.items():
        documents, of_these, domain = read_domain(label, specs, reading)
        fit += documents
        sequences += of_these
        held_out.append(domain)
    labels = of_generic = None
    if isinstance(texts, Labelled):
        drawn = {"randomise": texts.randomise, "randomise_to": texts.randomise_to} if texts.randomise else {}
        labels = TagsUsed.model_validate({"tags": list(texts.texts), **drawn})
    if generic is not None:
        documents, of_these, _ = read_domain(None, generic.texts, reading, where="--generic", tags=isinstance(texts, Labelled))
        added = generic_share(sequences, of_these, generic.share, reading.training.seed)
        tokens = sum(sequence.size for sequence in added)
        share = tokens / (tokens + sum(sequence.size for sequence in sequences))
        of_generic = TextUsed(**text_record(documents, tokens), share=share)
        fit, sequences = fit + documents, sequences + added
    tokens = sum(sequence.size for sequence in sequences)
    return Material(fit, sequences, held_out, tokens, labels, of_generic)


def read_domain(
    label: str | None, specs: Sequence[str], reading: Reading, where: str = "--text", *, tags: bool = False
) -> tuple[list[Document], list[TokenSequence], Domain]:
    """Documents to train on, the same as sequences, and sequences that are held out; with the tag of a label, if there is one.

    Raises TextError when nothing is left, and for text of no label that has a tag of its own where others are read with
    `tags`.
    """
    where = where if label is None else f"{where} {label}=..."
    text = read_text(specs, root=reading.root, where=where)
    fit, report, training = text.fit(), text.report(), reading.training

    def written(documents: list[Document]) -> list[Document]:
        if label is not None:
            return all_tagged(reading.tokenizer, documents, label, where=where)
        return none_tagged(reading.tokenizer, documents, where=where) if tags else documents

    sequences = training_sequences(reading.tokenizer, written(fit), training)
    if not fit:
        raise text.nothing_left("no document is left for training after the held-out split")
    if not sequences:
        raise text.none_fits(fit, training.sequence_length)
    held_out = encode(
        reading.tokenizer, written(report), max_tokens=training.held_out_tokens, sequence_length=training.sequence_length
    )
    return fit, sequences, Domain(label or where, None, held_out)


def generic_share(
    domains: Sequence[TokenSequence], generic: Sequence[TokenSequence], share: float, seed: int
) -> list[TokenSequence]:
    """So many sequences of no domain that they have a share of all tokens, as near as whole sequences come to it.

    They are repeated or left out for it, in an order drawn from the seed.
    """
    wanted = sum(sequence.size for sequence in domains) * share / (1.0 - share)
    generator = torch.Generator().manual_seed(seed)
    found: list[TokenSequence] = []
    pending: list[int] = []
    tokens = 0
    while True:
        pending = pending or torch.randperm(len(generic), generator=generator).tolist()
        following = generic[pending.pop()]
        if found and tokens + following.size / 2 > wanted:
            return found
        found.append(following)
        tokens += following.size


class RelabelledPasses:
    """Sequences with their tags, each of which every pass reads under a label that is drawn for it."""

    def __init__(self, sequences: Sequence[TokenSequence], asked: Labelled, reading: Reading) -> None:
        """Raises TextError where there is no other label."""
        self._sequences, self._asked = sequences, asked
        self._tags = tag_ids(reading.tokenizer, labels_of(reading.tokenizer))
        if asked.randomise_to in ("all", "others") and len(self._tags) == 1:
            raise TextError(
                "there is no other label",
                where="randomise_to",
                found=f"{asked.randomise_to}, and one label",
                remedy="write generic",
            )
        places = {tag: place for place, tag in enumerate(self._tags)}
        self._own = [GENERIC if each.tag is None else places.get(each.ids[each.tag], GENERIC) for each in sequences]
        self._generator = torch.Generator().manual_seed(reading.training.seed)
        self._drawn: list[list[int]] = []

    def labels(self, number: int) -> list[int]:
        """Labels of all sequences in a pass: places among those that the tokenizer has tags for, GENERIC for none."""
        while len(self._drawn) <= number:
            randomise, to = self._asked.randomise, self._asked.randomise_to
            self._drawn.append([drawn_label(each, randomise, to, len(self._tags), self._generator) for each in self._own])
        return self._drawn[number]

    def read(self, number: int, place: int) -> TokenSequence:
        """A sequence with the tag of the label that it has in a pass, or without one."""
        sequence, label = self._sequences[place], self.labels(number)[place]
        if sequence.tag is None or (label != GENERIC and self._tags[label] == sequence.ids[sequence.tag]):
            return sequence
        return sequence.with_tag(None if label == GENERIC else self._tags[label])
