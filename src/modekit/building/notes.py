"""What a build says when it is done: which experts are one model, and of which domains the router has read hardly anything."""

from __future__ import annotations

from collections.abc import Iterator

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.record import MixtureRecord
from modekit.planning.notes import BASE_AGAIN, one_model

_FEWEST_DOCUMENTS, _FEWEST_TOKENS = 10, 500  # from which a router learns a domain


def notes_of(checkpoint: Checkpoint) -> list[str]:
    """By the digests of the sources and by the text that the router has read."""
    record = checkpoint.record
    return [*_of_twins(record), *_of_text(record)]


def _of_twins(record: MixtureRecord) -> Iterator[str]:
    same: dict[tuple[str, ...], list[str]] = {_digests(record, 0): []}
    for name, place, expert in zip(record.recipe.names, record.expert_sources, record.recipe.experts, strict=True):
        if not expert.is_base:
            same.setdefault(_digests(record, place), []).append(name)
    base, *others = same.values()
    yield from (f"{name}: {BASE_AGAIN}" for name in base)
    yield from (one_model(names) for names in others if len(names) > 1)


def _digests(record: MixtureRecord, place: int) -> tuple[str, ...]:
    return tuple(sorted(file.blake3 for file in record.sources[place].files.values()))


def _of_text(record: MixtureRecord) -> Iterator[str]:
    for name, read in record.router.text.items():
        if read["documents"] < _FEWEST_DOCUMENTS or read["tokens"] < _FEWEST_TOKENS:
            yield (
                f"{name}: the router was set from {read['documents']:,} documents and {read['tokens']:,} tokens of its text, "
                f"too little to learn a domain from: give at least {_FEWEST_DOCUMENTS} documents and {_FEWEST_TOKENS} tokens"
            )
