"""The table of `modekit eval`: scores, rows, and how they are shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from modekit.evaluation.markdown import markdown_table

Kind = Literal["base", "expert", "average", "oracle", "mixture"]


@dataclass(frozen=True)
class Score:
    """Of one model on one domain: mean loss per token in nats, perplexity, bits per byte, share of the gap closed.

    `blocks` are the sums of loss, in nats, over up to 20 consecutive parts of the text, the same parts in every row;
    `loss_error` and `gap_error` are standard errors over them. None when there are fewer than two sequences, or in a file of
    an earlier version.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    gap_closed: float | None = None
    loss_error: float | None = None
    gap_error: float | None = None
    blocks: tuple[float, ...] | None = None


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
        """Mean loss over domains; None unless all were scored."""
        if any(domain not in self.scores for domain in domains):
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
            cells.append(f"{_millions(row.total_parameters)}{between}{_millions(row.active_parameters)}")
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


def results_from_data(data: Mapping[str, Any]) -> Results:
    """A table back from `Results.as_data`."""
    names = {key: [str(name) for name in data[key]] for key in ("domains", "unseen", "notes")}
    text = {name: dict(record) for name, record in data["text"].items()}
    return Results(_rows_from_data(data), names["domains"], names["unseen"], text, names["notes"])


def _rows_from_data(data: Mapping[str, Any]) -> list[Row]:
    return [
        Row(
            row["name"], row["kind"], row["total_parameters"], row["active_parameters"],
            {domain: _score_from_data(score) for domain, score in row["domains"].items()}, row["identity"],
        )
        for row in data["rows"]
    ]  # fmt: skip


def _score_from_data(data: Mapping[str, Any]) -> Score:
    blocks = data.get("blocks")
    return Score(**{**data, "blocks": tuple(blocks) if blocks is not None else None})


def _gap_text(score: Score | None) -> str:
    return "-" if score is None or score.gap_closed is None else f"{score.gap_closed:.2f}"


def _bits_text(score: Score | None) -> str:
    return "-" if score is None else f"{score.bits_per_byte:.3f}"


def _millions(count: int) -> str:
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.2f}M"
