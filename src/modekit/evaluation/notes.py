"""What has to be said below a table of losses: figures without an error, and experts that others beat on their own text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from modekit.evaluation.labels import Gain
from modekit.evaluation.uncertainty import in_blocks, mean_error
from modekit.recipes.strict import BASE

if TYPE_CHECKING:
    from modekit.evaluation.domains import Domain
    from modekit.evaluation.results import Row, Score


def notes_of(rows: Sequence[Row], domains: Sequence[Domain], least: float) -> list[str]:
    """Notes on scored rows, one sentence each. Differences of loss below `least` (nats per token) mean nothing."""
    return [*_without_errors(rows, domains), *_beaten(rows, domains, least)]


def loss_gains(domains: Sequence[Domain], with_label: Row, without: Row) -> list[Gain]:
    """What a label saves of the loss, mean over the domains that have an expert; none where one of them was not scored."""
    own = [domain for domain in domains if domain.expert is not None]
    if not all(_of(with_label, domain) for domain in own):
        return []
    scores = [(without.scores[domain.name], with_label.scores[domain.name], domain) for domain in own]
    gain = sum(one.loss - other.loss for one, other, _ in scores) / len(own)
    errors = [error for each in scores if (error := _error_of_difference(*each)) is not None]
    known = len(errors) == len(own)  # of a mean without one of them nothing is known
    error = math.sqrt(sum(error**2 for error in errors)) / len(own) if known else None
    return [Gain(gain, "nats per token", 3, error)]


def _without_errors(rows: Sequence[Row], domains: Sequence[Domain]) -> Iterator[str]:
    single = [domain.name for domain in domains if len(domain.sequences) < 2]
    if single:
        yield f"no standard errors for {', '.join(single)}: the held-out text is a single sequence; give more, or more --tokens"
    undecided = [
        domain.name
        for domain in domains
        if domain.name not in single
        and any(score.gap_closed is not None and score.gap_error is None for row in rows if (score := _of(row, domain)))
    ]
    if undecided:
        yield (
            f"no standard error of the gap closed for {', '.join(undecided)}: on a part of so little text there is no gap; "
            "give more, or more --tokens"
        )


def _beaten(rows: Sequence[Row], domains: Sequence[Domain], least: float) -> Iterator[str]:
    """Domains whose own expert, which is the base where the recipe says so, is surely worse than another expert."""
    named = {row.name: row for row in rows if row.kind in {"base", "expert"}}
    for domain in domains:
        own = named.get(domain.name, named.get(BASE))
        if domain.expert is None or own is None:
            continue
        others = [row for row in named.values() if row.kind == "expert" and row is not own and _of(row, domain)]
        best = min(others, key=lambda row: row.scores[domain.name].loss, default=None)
        if best is None:
            continue
        mine, other = own.scores[domain.name], best.scores[domain.name]
        if mine.loss - other.loss > max(least, 2 * (_error_of_difference(mine, other, domain) or 0.0)):
            who = "the base model, which is its expert," if own.kind == "base" else "its own expert"
            yield f"{domain.name}: {who} has {mine.loss:.3f} on its text, worse than {best.name} with {other.loss:.3f}"


def _of(row: Row, domain: Domain) -> Score | None:
    return row.scores.get(domain.name)


def _error_of_difference(one: Score, other: Score, domain: Domain) -> float | None:
    """Standard error of the difference of two mean losses on the same text; None when it is not known."""
    if one.blocks is None or other.blocks is None or len(one.blocks) != len(other.blocks):
        return None
    counts = in_blocks([sequence.scored for sequence in domain.sequences])
    if len(counts) != len(one.blocks):
        return None
    return mean_error([a - b for a, b in zip(one.blocks, other.blocks, strict=True)], counts)
