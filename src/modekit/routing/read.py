"""Statistics of what routers read: from disk where they are still right, else read under each domain's own expert.

They are kept per domain; a second fit with the same text reads none of it again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.loaded.load import load_tokenizer
from modekit.loaded.mixture import ExpertView
from modekit.loaded.shapes import expert_view
from modekit.processes import processes
from modekit.recipes.recipe import Expert, Recipe
from modekit.recipes.router import Router
from modekit.routing.capture import GateInput, capture_domain
from modekit.routing.examples import chats_of, examples_of
from modekit.routing.fitting import Fitting
from modekit.routing.kept import Provenance, documents_to_read
from modekit.routing.statistics import DomainStatistics, load_statistics
from modekit.run import QUIET, Run
from modekit.text.sequences import TokenSequence, encode
from modekit.text.splits import digest_of, text_record


def read_statistics(
    checkpoint: Checkpoint, recipe: Recipe, root: Path, routers: Mapping[Path, Router], *, run: Run = QUIET
) -> None:
    """Make the statistics of several routers, folder -> settings, that differ only in what they average, in one reading.

    `fit_router` finds them in those folders. Raises TextError.
    """
    readers = []
    for folder, settings in routers.items():
        one = recipe.model_copy(update={"mixture": recipe.mixture.model_copy(update={"router": settings})})
        readers.append(StatisticsReader(Fitting(checkpoint, one, root, folder, run)))
    for place, expert in enumerate(recipe.experts):
        domains = [(reader, reader.look_at(place, expert)) for reader in readers]
        missing = [(reader, domain) for reader, domain in domains if not domain.known]
        if missing:
            readers[0].read_together(missing)


@dataclass(frozen=True)
class DomainToRead:
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
    source: Provenance = field(default_factory=dict)


class StatisticsReader:
    """Reads the domains of one fit.

    The model is loaded when the first domain has to be read, and not at all when none has.
    """

    def __init__(self, fitting: Fitting) -> None:
        self._fitting = fitting
        self._settings = fitting.settings
        self._tokenizer = load_tokenizer(fitting.checkpoint.folder, run=fitting.run)
        self._view: ExpertView | None = None
        self._done = self._total = 0

    def expect(self, domains: Sequence[DomainToRead]) -> None:
        """Say beforehand what will be read one by one, so that progress is that of all of it."""
        self._total = sum(sequence.size for domain in domains for sequence in domain.sequences)

    def look_at(self, place: int, expert: Expert) -> DomainToRead:
        """What has to be read for the expert at `place`: nothing when kept statistics fit text and settings.

        Text that is gone is not needed when its statistics fit the settings. Raises TextError.
        """
        path = self._fitting.statistics_file(expert.name)
        kept, how = load_statistics(path), self._how(expert)
        if kept is not None and not kept.is_of([slot.shape[1] for slot in self._fitting.checkpoint.slots]):
            kept = None
        documents = documents_to_read(self._fitting, place, None if kept is None else kept.source, how)
        if documents is None:
            return DomainToRead(place, expert.name, path, kept, processes().agree(True))
        sequences = examples_of(self._tokenizer, documents, (place, expert), self._settings)
        source = {"text": text_record(documents, sum(sequence.size for sequence in sequences)), "how": how}
        domain = DomainToRead(place, expert.name, path, kept, known=True)
        if processes().agree(kept is not None and kept.source == source):
            return domain
        negatives = [
            sequence
            for prompt in expert.negative_prompts or []
            for sequence in encode(
                self._tokenizer,
                [prompt],
                max_tokens=self._settings.sequence_length,
                sequence_length=self._settings.sequence_length,
            )
        ]
        return replace(domain, kept=None, known=False, sequences=sequences, negatives=negatives, source=source)

    def read(self, domain: DomainToRead) -> DomainStatistics | None:
        """Run the text through the backbone with the domain's own expert, and keep the statistics on disk."""
        if domain.known:
            return domain.kept
        self.read_together([(self, domain)])
        return load_statistics(domain.path) if processes().is_main else None

    def read_together(self, others: Sequence[tuple[StatisticsReader, DomainToRead]]) -> None:
        """Read one domain's text once for readers that differ in how they average, and keep what each of them wants."""
        domains = [domain for _, domain in others]
        first = domains[0]
        total = self._total or sum(sequence.size for sequence in first.sequences)
        self._done = self._done if self._total else 0

        def advance(count: int) -> None:
            self._done += count
            self._fitting.run.progress(f"read {first.name}", self._done, total)

        found = capture_domain(
            self._view_of(first.place),
            first.sequences,
            first.negatives,
            reads=[
                GateInput(reader._settings.averages, reader._settings.prefix_tokens, domain.source) for reader, domain in others
            ],
            keep_tokens=self._settings.keep_tokens,
            advance=advance,
        )
        if processes().is_main:
            self._fitting.run.begin(f"keep what was read of {first.name}")
            for domain, statistics in zip(domains, found, strict=True):
                statistics.save(domain.path)

    def _how(self, expert: Expert) -> dict[str, object]:
        """What but the text decides a domain's statistics."""
        checkpoint, settings = self._fitting.checkpoint, self._settings
        how: dict[str, object] = {
            "negatives": [digest_of(prompt) for prompt in expert.negative_prompts or []],
            **settings.model_dump(
                mode="json", include={"sequence_length", "tokens_per_domain", "keep_tokens", "compute_dtype"}
            ),
            "averages": settings.averages,
            "prefix": settings.prefix_tokens,
            "routers": [[slot.name, slot.width] for slot in checkpoint.slots],
            **chats_of(self._tokenizer, expert, settings),
        }
        if checkpoint.record.trained:  # what routers read is no longer what the build made
            how["trained"] = sorted(checkpoint.record.trained.values())
        return how

    def _view_of(self, place: int) -> ExpertView:
        if self._view is None:
            dtype = torch.float32 if self._settings.compute_dtype == "float32" else torch.bfloat16
            self._view = expert_view(self._fitting.checkpoint, dtype=dtype, run=self._fitting.run)
        self._view.use_expert(place)
        return self._view
