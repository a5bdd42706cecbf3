"""Shares of the gap closed: how far each row goes from the base towards the domain's own expert.

gap closed = (loss of base - loss of row) / (loss of base - loss of the domain's own expert)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from modekit.evaluation.results import Row, Score
from modekit.evaluation.uncertainty import gap_error
from modekit.recipes.strict import BASE

SMALLEST_GAP = 1e-3  # nats: below it an expert is not better than the base and a share of the gap means nothing


def gaps_of(rows: Sequence[Row], domains: Sequence[str]) -> dict[str, float]:
    """Loss of base less loss of the domain's own expert in nats, for domains whose expert was run."""
    by_name = _references(rows)
    return {
        name: by_name[BASE].scores[name].loss - by_name[name].scores[name].loss
        for name in domains
        if name in by_name and BASE in by_name
    }


def with_gaps(rows: Sequence[Row], gaps: Mapping[str, float]) -> list[Row]:
    """The rows with the share of each gap that they close, and its error; none where the gap is too small."""
    by_name = _references(rows)

    def closed(row: Row, name: str) -> Score:
        score = row.scores[name]
        if gaps.get(name, 0.0) <= SMALLEST_GAP:
            return replace(score, gap_closed=None, gap_error=None)
        base, own = by_name[BASE].scores[name], by_name[name].scores[name]
        share = (base.loss - score.loss) / gaps[name]
        return replace(score, gap_closed=share, gap_error=gap_error(base.blocks, own.blocks, score.blocks))

    return [replace(row, scores={name: closed(row, name) for name in row.scores}) for row in rows]


def _references(rows: Sequence[Row]) -> dict[str, Row]:
    return {row.name: row for row in rows if row.kind in {"base", "expert"}}
