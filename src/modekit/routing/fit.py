"""Fit a checkpoint's router: read each domain's text once under its own expert, then solve for the gates.

Statistics are kept per domain; a second fit with the same text reads none of it again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from modekit.checkpoint.checkpoint import Checkpoint, Gates, RouterRecord
from modekit.errors import TextError
from modekit.loaded.models import ExpertView, expert_view, load_tokenizer
from modekit.processes import processes
from modekit.progress import Progress, silent
from modekit.recipes.recipe import DATA_FREE, Expert, Recipe, Router
from modekit.routing.capture import Read, capture_domain
from modekit.routing.closed_form import fit_gates
from modekit.routing.low_rank import adapter_gates
from modekit.routing.ngram import count_domain, load_ngram_statistics, ngram_gate, source_of
from modekit.routing.phatgoose import train_gates
from modekit.routing.statistics import DomainStatistics, load_statistics
from modekit.text.documents import TokenSequence, digest_of, documents_of_split, encode, read_documents, text_record


@dataclass(frozen=True)
class FittedRouter:
    """The gate of every router and the record for modekit.json."""

    gates: Gates
    record: RouterRecord


def fit_router(
    checkpoint: Checkpoint,
    recipe: Recipe,
    root: Path,
    statistics_folder: Path,
    *,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> FittedRouter:
    """Fit the gates that `recipe.mixture.router` asks for, on text found relative to `root`.

    Statistics in `statistics_folder` that were made from the same text and settings are used as they are; missing ones
    are made and written there. Under a launcher the processes share the text, and the main one solves: the others' gates are
    empty. Raises TextError.
    """
    settings = recipe.mixture.router
    if not processes().is_main and not settings.fit_is_shared:
        return FittedRouter([], RouterRecord.unfitted(recipe))
    if settings.fit in DATA_FREE:
        record = RouterRecord(status="fitted", settings=settings, sha256="", text={}, report={})
        return FittedRouter(adapter_gates(checkpoint, settings), record)
    if settings.fit == "ngram":
        return fit_ngram(checkpoint, recipe, root, statistics_folder, trust_remote_code=trust_remote_code, progress=progress)
    if settings.fit == "phatgoose":
        return _trained(checkpoint, recipe, root, trust_remote_code, progress)
    reader = _Reader(checkpoint, settings, statistics_folder, trust_remote_code, progress)
    # All text is looked at before any is read through the model: what is wrong with the last shows at once.
    readings = [reader.prepare(place, expert, root) for place, expert in enumerate(recipe.experts)]
    reader.expect(readings)
    domains = [reader.read(reading) for reading in readings]
    if not processes().is_main:
        return FittedRouter([], RouterRecord.unfitted(recipe))
    slots = checkpoint.slots
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(f"solve {settings.fit}", done, len(slots))

    whole = [domain for domain in domains if domain is not None]  # all of them, in the process that solves
    solved = fit_gates(settings, whole, advance)
    # A gate with one decision per output feature starts as one decision for all of them.
    gates = [gate.repeat(max(1, slot.features), 1).numpy() for gate, slot in zip(solved, slots, strict=True)]
    text = {expert.name: domain.source["text"] for expert, domain in zip(recipe.experts, whole, strict=True)}
    record = RouterRecord(
        status="fitted", settings=settings, sha256="", text=text, report={"tokens": [d.tokens for d in whole]}
    )
    return FittedRouter(gates, record)


def read_statistics(
    checkpoint: Checkpoint, recipe: Recipe, root: Path, routers: Mapping[Path, Router], *, trust_remote_code: bool = False,
    progress: Progress = silent,
) -> None:  # fmt: skip
    """Make the statistics of several routers, folder -> settings, that differ only in what they average, in one reading.

    `fit_router` finds them in those folders. Raises TextError.
    """
    readers = [_Reader(checkpoint, settings, folder, trust_remote_code, progress) for folder, settings in routers.items()]
    for place, expert in enumerate(recipe.experts):
        readings = [(reader, reader.prepare(place, expert, root)) for reader in readers]
        missing = [(reader, reading) for reader, reading in readings if not reading.known]
        if missing:
            readers[0].read_together(missing)


def fit_ngram(
    checkpoint: Checkpoint, recipe: Recipe, root: Path, folder: Path, *, trust_remote_code: bool, progress: Progress
) -> FittedRouter:
    """The table of an n-gram router, from kept counts where text and settings are still the same."""
    settings = recipe.mixture.router
    tokenizer = load_tokenizer(checkpoint.folder, trust_remote_code=trust_remote_code)
    domains = []
    for place, expert in enumerate(recipe.experts):
        path = folder / f"{expert.name}.safetensors"
        kept = load_ngram_statistics(path)
        try:
            documents = fit_documents(expert, root, place)
        except TextError:
            if kept is None or kept.source["how"] != source_of([], expert, settings)["how"]:
                raise
            domains.append(kept)  # the text is gone, and its counts are what they would be
            continue
        source = source_of(documents, expert, settings)
        if kept is None or kept.source != source:
            kept = count_domain(tokenizer, documents, settings, source, where=f"experts[{place}] '{expert.name}'")
            kept.save(path)
        domains.append(kept)
        progress("count n-grams", place + 1, len(recipe.experts))
    (slot,) = checkpoint.slots
    gate = ngram_gate(domains, settings)
    text = {
        e.name: {**domain.source["text"], "tokens": domain.tokens} for e, domain in zip(recipe.experts, domains, strict=True)
    }
    record = RouterRecord(
        status="fitted", settings=settings, sha256="", text=text, report={"tokens": [domain.tokens for domain in domains]}
    )
    assert gate.shape == slot.shape
    return FittedRouter([gate.numpy()], record)


def _trained(checkpoint: Checkpoint, recipe: Recipe, root: Path, trust_remote_code: bool, progress: Progress) -> FittedRouter:
    """Gates trained expert by expert on the fit split of their text."""
    settings = recipe.mixture.router
    tokenizer = load_tokenizer(checkpoint.folder, trust_remote_code=trust_remote_code)
    texts = [fit_documents(expert, root, place) for place, expert in enumerate(recipe.experts)]
    sequences = [
        encode(
            tokenizer, documents, max_tokens=settings.tokens_per_domain, sequence_length=settings.sequence_length,
        )
        for documents in texts
    ]  # fmt: skip
    for place, expert in enumerate(recipe.experts):
        _check_length(place, expert, sequences[place])
    counts = [sum(len(sequence.ids) for sequence in own) for own in sequences]
    gates = train_gates(checkpoint, settings, sequences, progress=progress)
    text = {
        name: text_record(documents, count) for name, documents, count in zip(recipe.names, texts, counts, strict=True)
    }  # fmt: skip
    return FittedRouter(
        gates, RouterRecord(status="trained", settings=settings, sha256="", text=text, report={"tokens": counts})
    )


def _check_length(place: int, expert: Expert, sequences: Sequence[TokenSequence]) -> None:
    if not sequences:
        raise TextError(
            "the text is shorter than two tokens", where=f"experts[{place}] '{expert.name}'", remedy="give more text"
        )


@dataclass(frozen=True)
class _Reading:
    """A domain whose statistics the main process has (`known`; `kept` here, if this process sees them), or the text they will
    be made from.
    """

    place: int
    name: str
    path: Path
    kept: DomainStatistics | None
    known: bool = False
    sequences: Sequence[TokenSequence] = ()
    negatives: Sequence[TokenSequence] = ()
    source: Mapping[str, Any] = field(default_factory=dict)


class _Reader:
    """Statistics of domains: from disk where they are still right, else read under the domain's own expert.

    The model is loaded when the first domain has to be read, and not at all when none has.
    """

    def __init__(
        self, checkpoint: Checkpoint, settings: Router, folder: Path, trust_remote_code: bool, progress: Progress
    ) -> None:
        self._checkpoint = checkpoint
        self._settings = settings
        self._folder = folder
        self._progress = progress
        self._tokenizer = load_tokenizer(checkpoint.folder, trust_remote_code=trust_remote_code)
        self._view: ExpertView | None = None
        self._done = self._total = 0
        self._reads: dict[str, Any] = {
            "averages": settings.averages,
            "prefix": settings.prefix_tokens,
            "routers": [[slot.name, slot.width] for slot in checkpoint.slots],
        }
        if checkpoint.record.trained:  # what routers read is no longer what the build made
            self._reads["trained"] = sorted(checkpoint.record.trained.values())

    def prepare(self, place: int, expert: Expert, root: Path) -> _Reading:
        """What has to be read for the expert at `place`: nothing when kept statistics fit text and settings.

        Text that is gone is not needed when its statistics fit the settings. Raises TextError.
        """
        path = self._folder / f"{expert.name}.safetensors"
        kept = load_statistics(path)
        how = {
            "negatives": [digest_of(prompt) for prompt in expert.negative_prompts or []],
            **self._settings.model_dump(
                mode="json", include={"sequence_length", "tokens_per_domain", "keep_tokens", "compute_dtype"}
            ),
            **self._reads,
        }
        try:
            documents = fit_documents(expert, root, place)
        except TextError:
            if kept is not None and kept.source["how"] == how:
                return _Reading(place, expert.name, path, kept, processes().agree(True))
            raise
        sequences = self._encode(documents, self._settings.tokens_per_domain)
        tokens = sum(len(sequence.ids) for sequence in sequences)
        _check_length(place, expert, sequences)
        source = {"text": text_record(documents, tokens), "how": how}
        if processes().agree(kept is not None and kept.source == source):
            return _Reading(place, expert.name, path, kept, known=True)
        negatives = [
            sequence
            for prompt in expert.negative_prompts or []
            for sequence in self._encode([prompt], self._settings.sequence_length)
        ]
        return _Reading(place, expert.name, path, None, False, sequences, negatives, source)

    def expect(self, readings: Sequence[_Reading]) -> None:
        """Say beforehand what will be read one by one, so that progress is that of all of it."""
        self._total = sum(len(sequence.ids) for reading in readings for sequence in reading.sequences)

    def read(self, reading: _Reading) -> DomainStatistics | None:
        """Run the text through the backbone with the domain's own expert, and keep the statistics on disk."""
        if reading.known:
            return reading.kept
        self.read_together([(self, reading)])
        # What is on disk (float32 sums) is what every later fit will read, so the first fit reads it too.
        return load_statistics(reading.path) if processes().is_main else None

    def read_together(self, others: Sequence[tuple[_Reader, _Reading]]) -> None:
        """Read one domain's text once for readers that differ in how they average, and keep what each of them wants."""
        readings = [reading for _, reading in others]
        first = readings[0]
        total = self._total or sum(len(sequence.ids) for sequence in first.sequences)
        done = self._done if self._total else 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            self._done = done
            self._progress(f"read {first.name}", done, total)

        reads = [Read(r._settings.averages, r._settings.prefix_tokens, reading.source) for r, reading in others]
        found = capture_domain(
            self._view_of(first.place), first.sequences, first.negatives, reads=reads,
            keep_tokens=self._settings.keep_tokens, advance=advance,
        )  # fmt: skip
        if processes().is_main:
            for reading, statistics in zip(readings, found, strict=True):
                statistics.save(reading.path)

    def _encode(self, documents: list[str], max_tokens: int) -> list[TokenSequence]:
        return encode(self._tokenizer, documents, max_tokens=max_tokens, sequence_length=self._settings.sequence_length)

    def _view_of(self, place: int) -> ExpertView:
        if self._view is None:
            dtype = torch.float32 if self._settings.compute_dtype == "float32" else torch.bfloat16
            self._view = expert_view(self._checkpoint, dtype=dtype)
        self._view.use_expert(place)
        return self._view


def fit_documents(expert: Expert, root: Path, place: int) -> list[str]:
    """The documents that may set the router for an expert: the fit split of its text, and its prompts.

    Raises TextError when none are left.
    """
    where = f"experts[{place}] '{expert.name}': text"
    documents = documents_of_split(read_documents(expert.text, root=root, where=where), "fit") if expert.text else []
    documents = [*(expert.prompts or []), *documents]
    if not documents:
        raise TextError("no document is left for the fit after the held-out split", where=where, remedy="give more documents")
    return documents
