"""The table of `modekit eval`: scores, rows, and how they are shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from pydantic import BaseModel, model_validator

from modekit.evaluation.markdown import markdown_table
from modekit.files.figures import count_of
from modekit.files.typed import Count, Label, Number, as_kind

Kind = Literal["base", "expert", "average", "oracle", "mixture", "label"]
"""Of a row; `label`: the mixture, or the base, that was told a label of every text."""
MOST_CELLS = 2**18
"""Of a table that is read from a file: more than anybody measures."""


@dataclass(frozen=True)
class Score:
    """Of one model on one domain: mean loss per token in nats, perplexity, bits per byte, share of the gap closed.

    `blocks` are the sums of loss, in nats, over up to 20 consecutive parts of the text, the same parts in every row;
    `loss_error` and `gap_error` are standard errors over them. None when there are fewer than two sequences, or in a file of
    an earlier version.
    """

    loss: Number
    perplexity: Number
    bits_per_byte: Number
    gap_closed: Number | None = None
    loss_error: Number | None = None
    gap_error: Number | None = None
    blocks: tuple[Number, ...] | None = None


@dataclass(frozen=True)
class Row:
    """One model; `identity` names exactly what was run, so that an unchanged row is not run again."""

    name: str
    kind: Kind
    total_parameters: int
    active_parameters: int
    scores: Mapping[str, Score]
    identity: str

    def renamed(self, name: str) -> Row:
        """The same row under another name."""
        return replace(self, name=name)

    def mean_loss(self, domains: Sequence[str]) -> float | None:
        """Mean loss over domains; None unless all were scored, and there are some."""
        if not domains or any(domain not in self.scores for domain in domains):
            return None
        return sum(self.scores[domain].loss for domain in domains) / len(domains)

    def mean_gap(self, domains: Sequence[str]) -> float | None:
        """Mean gap closed over the domains that have a gap."""
        gaps = [self.scores[d].gap_closed for d in domains if d in self.scores and self.scores[d].gap_closed is not None]
        return sum(gap for gap in gaps if gap is not None) / len(gaps) if gaps else None


@dataclass(frozen=True)
class Results:
    """The table. `domains` have an expert and enter the means; `unseen` have none."""

    rows: Sequence[Row]
    domains: Sequence[str]
    unseen: Sequence[str]
    text: Mapping[str, Mapping[str, Any]]
    notes: Sequence[str]

    def row(self, name: str) -> Row:
        """A row by its name."""
        return next(row for row in self.rows if row.name == name)

    def as_data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "rows": [
                {
                    **{key: value for key, value in asdict(row).items() if key != "scores"},
                    "domains": {domain: asdict(score) for domain, score in row.scores.items()},
                    "mean": {"loss": row.mean_loss(self.domains), "gap_closed": row.mean_gap(self.domains)},
                }
                for row in self.rows
            ],
            "domains": list(self.domains),
            "unseen": list(self.unseen),
            "text": {name: dict(record) for name, record in self.text.items()},
            "notes": list(self.notes),
        }

    def table(self, between: str = " / ") -> tuple[list[str], list[list[str]]]:
        """Header and cells: loss and perplexity per domain, means, gap closed, total and active parameters.

        `between` separates the two figures of a cell.
        """
        every = [*self.domains, *self.unseen]
        header = ["model", *self.domains, *(f"{name}{between}unseen" for name in self.unseen)]
        header += ["mean loss", "gap closed", f"total{between}active"]
        body = []
        for row in self.rows:
            cells = [row.name]
            for domain in every:
                score = row.scores.get(domain)
                cells.append("-" if score is None else f"{score.loss:.3f}{between}{score.perplexity:.1f}")
            loss, gap = row.mean_loss(self.domains), row.mean_gap(self.domains)
            cells.append("-" if loss is None else f"{loss:.3f}")
            cells.append("-" if gap is None else f"{gap:.2f}")
            cells.append(f"{count_of(row.total_parameters)}{between}{count_of(row.active_parameters)}")
            body.append(cells)
        return header, body

    def markdown(self) -> str:
        """The table, and below it gap closed and bits per byte per domain."""
        header, body = self.table()
        parts = ["Held-out loss in nats per token / perplexity.", "", markdown_table(header, body)]
        for title, pick in (("Gap closed", _gap_text), ("Bits per byte", _bits_text)):
            every = [*self.domains, *([] if pick is _gap_text else self.unseen)]
            cells = [[row.name, *(pick(row.scores.get(domain)) for domain in every)] for row in self.rows]
            parts += ["", f"{title} per domain.", "", markdown_table(["model", *every], cells)]
        parts += ["", *(f"* {note}" for note in self.notes)] if self.notes else []
        return "\n".join(parts) + "\n"


class _SavedRow(BaseModel):
    name: Label
    kind: Kind
    total_parameters: Count
    active_parameters: Count
    domains: dict[Label, Score]
    identity: str


class _Saved(BaseModel):
    rows: list[_SavedRow]
    domains: list[Label]
    unseen: list[Label]
    text: dict[str, dict[str, Any]]
    notes: list[str]

    @model_validator(mode="after")
    def _is_a_table(self) -> _Saved:
        names = [*self.domains, *self.unseen]
        if len(set(names)) < len(names) or len({row.name for row in self.rows}) < len(self.rows):
            raise ValueError("a row or column is named twice")
        if len(self.rows) * (1 + len(names)) > MOST_CELLS:
            raise ValueError(f"a table of more than {MOST_CELLS:,} cells")
        return self


def results_from_data(data: Any) -> Results:
    """A table back from `Results.as_data`. Raises ValueError for anything else."""
    saved = as_kind(data, _Saved)
    rows = [
        Row(row.name, row.kind, row.total_parameters, row.active_parameters, row.domains, row.identity) for row in saved.rows
    ]
    return Results(rows, saved.domains, saved.unseen, saved.text, saved.notes)


def _gap_text(score: Score | None) -> str:
    return "-" if score is None or score.gap_closed is None else f"{score.gap_closed:.2f}"


def _bits_text(score: Score | None) -> str:
    return "-" if score is None else f"{score.bits_per_byte:.3f}"
