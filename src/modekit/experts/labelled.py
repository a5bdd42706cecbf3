"""What an expert is made of: text of one domain, or of several that are read with their tags, and text of no domain besides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from modekit.evaluation.domains import Domain
from modekit.loaded.text_training import ReadInPass, Training, training_sequences
from modekit.text.document import Document
from modekit.text.held_out import read_text
from modekit.text.sequences import TokenSequence, encode
from modekit.text.splits import text_record
from modekit.text.tags import labels_of, tag_ids, tagged
from modekit.training.batches import DomainSequences, drawn_label
from modekit.training.losses import GENERIC
from modekit.training.settings import RandomiseTo


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
    share: float


@dataclass(frozen=True)
class Reading:
    """What is read: by which tokenizer, from where, and how long and fast."""

    tokenizer: PreTrainedTokenizerBase
    root: Path
    training: Training


@dataclass
class Material:
    """What an expert is made of.

    Attributes:
        fit: documents that it is trained on.
        corpora: what is read in training, by text, as often as it stands here.
        held_out: what the loss is shown on, per label; one domain of no name without labels.
        labels, generic: what specialist.json says of tags, and of generic text.
    """

    fit: list[Document] = field(default_factory=list)
    corpora: list[DomainSequences] = field(default_factory=list)
    held_out: list[Domain] = field(default_factory=list)
    labels: dict[str, object] | None = None
    generic: dict[str, object] | None = None

    @property
    def sequences(self) -> list[TokenSequence]:
        """All that is read in training."""
        return [sequence for corpus in self.corpora for sequence in corpus.sequences]

    @property
    def record(self) -> dict[str, object]:
        """What specialist.json says of the text."""
        found = {"labels": self.labels, "generic": self.generic}
        of_text = text_record(self.fit, sum(corpus.tokens for corpus in self.corpora))
        return {"text": of_text, **{name: each for name, each in found.items() if each is not None}}

    def as_asked(self) -> list[object]:
        """The same, and all that is held out: what was measured on it before the first step is not measured again."""
        return [self.record, [[domain.name, [each.ids for each in domain.sequences]] for domain in self.held_out]]


def read_material(
    texts: Sequence[str] | Labelled, generic: Generic | None, reading: Reading, *, apart: bool = False
) -> Material:
    """Read the fit split of all texts, and what is held out of those of a domain; `apart`: each text is a domain.

    Raises TextError where one has nothing left, or is to have a tag and is a conversation.
    """
    found = Material()
    if isinstance(texts, Labelled):
        for label, specs in texts.texts.items():
            _read_domain(found, specs, reading, f"--text {label}=...", label)
        drawn = {"randomise": texts.randomise, "randomise_to": texts.randomise_to} if texts.randomise else {}
        found.labels = {"tags": list(texts.texts), **drawn}
    else:
        for specs in [[text] for text in texts] if apart else [texts]:
            _read_domain(found, specs, reading, f"--text {specs[0]}" if apart else "--text")
    if generic is not None:
        beside = Material()
        _read_domain(beside, generic.texts, reading, "--generic")
        added = generic_share(found.sequences, beside.sequences, generic.share, reading.training.seed)
        tokens, of_domains = (sum(each.size for each in sequences) for sequences in (added, found.sequences))
        found.generic = {**text_record(beside.fit, tokens), "share": tokens / (tokens + of_domains)}
        found.corpora.append(DomainSequences("--generic", GENERIC, added))
        found.fit += beside.fit
    return found


def _read_domain(into: Material, specs: Sequence[str], reading: Reading, where: str, label: str | None = None) -> None:
    """Add documents of a text, with the tag of a label, if there is one. Raises TextError when nothing is left."""
    text, training = read_text(specs, root=reading.root, where=where), reading.training
    fit = text.split("fit")

    def written(documents: list[Document]) -> list[Document]:
        return documents if label is None else [tagged(each, label, where=where) for each in documents]

    sequences = training_sequences(reading.tokenizer, written(fit), training)
    if not fit:
        raise text.nothing_left("no document is left for training after the held-out split")
    if not sequences:
        raise text.none_fits(fit, training.sequence_length)
    bounds = {"max_tokens": training.held_out_tokens, "sequence_length": training.sequence_length}
    into.fit.extend(fit)
    into.corpora.append(DomainSequences(label or where, len(into.corpora), sequences))
    into.held_out.append(
        Domain(label or where, None, encode(reading.tokenizer, written(text.split("report")), answers=True, **bounds))
    )


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


def relabelled(sequences: Sequence[TokenSequence], asked: Labelled, reading: Reading) -> ReadInPass:
    """Sequences with tags, which every pass reads under labels that are drawn for it: each with its label's tag, or none."""
    tags = tag_ids(reading.tokenizer, labels_of(reading.tokenizer))
    places = {tag: place for place, tag in enumerate(tags)}
    own = [GENERIC if each.tag is None else places.get(each.ids[each.tag], GENERIC) for each in sequences]
    generator, passes = torch.Generator().manual_seed(reading.training.seed), list[list[int]]()

    def read(number: int, place: int) -> TokenSequence:
        while len(passes) <= number:
            passes.append([drawn_label(each, asked.randomise, asked.randomise_to, len(tags), generator) for each in own])
        sequence, label = sequences[place], passes[number][place]
        if sequence.tag is None or (label != GENERIC and tags[label] == sequence.ids[sequence.tag]):
            return sequence
        return sequence.with_tag(None if label == GENERIC else tags[label])

    return read
