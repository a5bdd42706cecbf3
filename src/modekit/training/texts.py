"""Text of a training as sequences: what moves the mixture, and what its states are compared by (text/held_out.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.errors import TextError, TrainingError
from modekit.evaluation.domains import Domain, recipe_texts
from modekit.loaded.load import load_tokenizer
from modekit.run import Run
from modekit.text.document import Document, check_kind
from modekit.text.documents import find_text
from modekit.text.held_out import MORE, DomainText, read_text
from modekit.text.sequences import TokenSequence, encode
from modekit.text.splits import digest_of, mark_of, text_record
from modekit.text.tags import labels_of, tag_ids, tagged
from modekit.training.batches import DomainSequences
from modekit.training.losses import GENERIC
from modekit.training.settings import TrainSettings

GENERIC_NAME = "(generic)"  # no expert can be named so
_SHORTEST = 4  # a rest of a document shorter than a quarter of a sequence would mostly be padding


@dataclass(frozen=True)
class TrainingText:
    """Documents of one domain that are trained on and selected by, as sequences; digests of both, and what the record says."""

    corpus: DomainSequences
    select: Sequence[TokenSequence]
    trained_on: list[str]
    selected_by: list[str]
    record: Mapping[str, Any]

    @property
    def held_out(self) -> Domain:
        """What states are compared on."""
        return Domain(self.corpus.name, self.corpus.expert, self.select)


def check_given(checkpoint: Checkpoint, texts: Mapping[str, Sequence[str]], root: Path) -> None:
    """Raise TextError where a given text is of no expert, or is not there; nothing is read."""
    for name, specs in texts.items():
        if name not in checkpoint.names:
            raise TextError(
                "there is no expert for this domain",
                where=f"--text {name}=...",
                expected=", ".join(checkpoint.names),
                remedy="name a domain of the mixture; text of no domain goes under generic",
            )
        find_text(specs, root=root, where=f"--text {name}")


def read_texts(
    checkpoint: Checkpoint, settings: TrainSettings, texts: Mapping[str, Sequence[str]], root: Path, *, run: Run
) -> list[TrainingText]:
    """Text of every domain, in recipe order, then generic text.

    `texts`, relative to `root`, counts more than the recipe's. Experts with neither are left out. Raises TextError, also for
    text of another kind than the mixture reads, and for pairs that go another way than those of the other texts.
    """
    check_given(checkpoint, texts, root)
    names, own = checkpoint.names, recipe_texts(checkpoint)
    given: list[tuple[str, int, DomainText]] = []
    for place, name in enumerate(names):
        text = read_text(texts[name], root=root, where=f"--text {name}") if name in texts else own.own(place)
        given += [(name, place, text)] if text is not None else []
    if not given:
        raise TextError(
            "there is no text to train on", where="experts[].text, --text", remedy="give --text domain=FILE for every domain"
        )
    if settings.generic:
        given.append((GENERIC_NAME, GENERIC, read_text(settings.generic, root=root, where="generic")))
    for _, _, text in given:
        check_kind(text.documents, checkpoint.shape.family.reads, where=text.where)
    tokenizer = load_tokenizer(checkpoint.folder, run=run)
    tags = _tags(tokenizer, names) if settings.tags else ()
    corpora = (DomainSequences(name, expert, [], tags if expert != GENERIC else ()) for name, expert, _ in given)
    return [
        _in_sequences(tokenizer, corpus, text, own.select_of(text), settings)
        for corpus, (_, _, text) in zip(corpora, given, strict=True)
    ]


def _tags(tokenizer: PreTrainedTokenizerBase, names: Sequence[str]) -> tuple[int, ...]:
    """Ids of all experts' tags. Raises TrainingError where one has none."""
    known = labels_of(tokenizer)
    without = [name for name in names if name not in known]
    if without:
        raise TrainingError(
            f"the mixture's tokenizer has no tag for {', '.join(without)}",
            where="tags",
            found=f"tags for {', '.join(known)}" if known else "no tags at all",
            expected="a tag for the name of every expert",
            remedy="leave it out, or mix experts of a base that knows tags: modekit specialize --tags",
        )
    return tag_ids(tokenizer, names)


def _in_sequences(
    tokenizer: PreTrainedTokenizerBase,
    corpus: DomainSequences,
    text: DomainText,
    select: Sequence[Document],
    settings: TrainSettings,
) -> TrainingText:
    """What moves, as far as it belongs to the share, and what states are compared on. Raises TextError without either."""
    # By hash alone, of other digits than those of the splits.
    fit = [document for document in text.split("fit") if int(digest_of(document)[8:16], 16) < settings.share * 2**32]

    def encoded(documents: Sequence[Document], **bounds: int) -> list[TokenSequence]:
        if corpus.tags:
            documents = [tagged(each, corpus.name, where=f"text of {corpus.name}") for each in documents]
        return encode(tokenizer, documents, sequence_length=settings.sequence_length, answers=True, **bounds)

    sequences = encoded(fit, max_tokens=2**62, shortest_rest=settings.sequence_length // _SHORTEST)
    held_out = encoded(select, max_tokens=settings.select_tokens)
    for documents, found, what in ((fit, sequences, "training"), (select, held_out, "comparing states")):
        if not found and documents:
            raise text.none_fits(documents, settings.sequence_length)
        if not found:
            raise text.nothing_left(
                f"no document is left for {what}",
                expected="eight in ten are trained on, one in ten is for comparing, one in ten for the tables",
                remedy=MORE if settings.share == 1.0 else f"{MORE}; or raise share",
            )
    corpus = replace(corpus, sequences=sequences)
    return TrainingText(corpus, held_out, list(map(mark_of, fit)), list(map(mark_of, select)), text_record(fit, corpus.tokens))


def silent_domains(checkpoint: Checkpoint, texts: Sequence[TrainingText]) -> list[str]:
    """Experts of whose domain there is no text."""
    known = {text.corpus.expert for text in texts}
    return [name for place, name in enumerate(checkpoint.names) if place not in known]
