"""The table of `modekit eval`: scores, rows, and how they are shown."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.evaluation.identity import ReadSequences, mixture_identities, row_identity
from modekit.evaluation.markdown import markdown_table
from modekit.evaluation.results_folder import Result, results_path
from modekit.evaluation.uncertainty import gap_error
from modekit.files.figures import count_of, or_dash
from modekit.files.read import LARGE, UNREADABLE, parse_json, read_bytes
from modekit.files.typed import Count, Label, Number
from modekit.files.user_cache import is_proven_here, keep_proven
from modekit.files.write import json_bytes
from modekit.recipes.strict import BASE

Kind = Literal["base", "expert", "average", "oracle", "mixture", "label"]
"""Of a row; `label`: the mixture, or the base, that read a label with every text."""


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

    name: Label
    kind: Kind
    total_parameters: Count
    active_parameters: Count
    scores: Annotated[Mapping[Label, Score], Field(alias="domains")]
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
class Results(Result):
    """eval.json. `domains` have an expert and enter the means; `unseen` have none. It belongs to the mixture of its row."""

    rows: Sequence[Row]
    domains: Sequence[Label]
    unseen: Sequence[Label]
    text: Mapping[str, ReadSequences]
    notes: Sequence[str]

    file = "eval.json"
    command = "modekit eval"
    expected = True

    def row(self, name: str) -> Row:
        """A row by its name."""
        return next(row for row in self.rows if row.name == name)

    def belongs_to(self, checkpoint: Checkpoint) -> bool:
        """Whether the table's mixture is this checkpoint as it is now: experts, router, training and text."""
        mixture = next((row for row in self.rows if row.kind == "mixture"), None)
        names = [*self.domains, *self.unseen]
        if mixture is None or any(name not in self.text for name in names):
            return False
        experts_id, router_id = mixture_identities(checkpoint)
        return mixture.identity == row_identity(f"{experts_id} {router_id}", checkpoint, [self.text[name] for name in names])

    def cells(self) -> int:
        """Of a row per model and a column per domain. Raises ValueError where two have one name."""
        names = [*self.domains, *self.unseen]
        if len(set(names)) < len(names) or len({row.name for row in self.rows}) < len(self.rows):
            raise ValueError("a row or column is named twice")
        return len(self.rows) * (1 + len(names))

    def as_data(self) -> dict[str, JsonValue]:
        """Plain data for JSON, with the means that the table shows."""
        data: dict[str, Any] = super().as_data()
        for row, said in zip(self.rows, data["rows"], strict=True):
            said["mean"] = {"loss": row.mean_loss(self.domains), "gap_closed": row.mean_gap(self.domains)}
        return data

    def write(self, checkpoint: Checkpoint) -> None:
        """Write eval.json and eval.md, and remember that this file is this user's own."""
        super().write(checkpoint)
        keep_proven(_claim(json_bytes(self.as_data())))

    def table(self, between: str = " / ") -> tuple[list[str], list[list[str]]]:
        """Header and cells: loss and perplexity per domain, means, gap closed, total and active parameters."""
        every = [*self.domains, *self.unseen]
        header = ["model", *self.domains, *(f"{name}{between}unseen" for name in self.unseen)]
        header += ["mean loss", "gap closed", f"total{between}active"]
        body = []
        for row in self.rows:
            cells = [row.name]
            for domain in every:
                score = row.scores.get(domain)
                cells.append("-" if score is None else f"{score.loss:.3f}{between}{score.perplexity:.1f}")
            cells += [or_dash(row.mean_loss(self.domains), ".3f"), or_dash(row.mean_gap(self.domains), ".2f")]
            cells.append(f"{count_of(row.total_parameters)}{between}{count_of(row.active_parameters)}")
            body.append(cells)
        return header, body

    def markdown(self) -> str:
        """The table, and below it gap closed and bits per byte per domain."""
        header, body = self.table()
        parts = ["Held-out loss in nats per token / perplexity.", "", markdown_table(header, body)]
        for title, figure, form in (("Gap closed", "gap_closed", ".2f"), ("Bits per byte", "bits_per_byte", ".3f")):
            every = [*self.domains, *([] if figure == "gap_closed" else self.unseen)]
            cells = [
                [row.name, *(or_dash(getattr(row.scores.get(domain), figure, None), form) for domain in every)]
                for row in self.rows
            ]
            parts += ["", f"{title} per domain.", "", markdown_table(["model", *every], cells)]
        parts += ["", *(f"* {note}" for note in self.notes)] if self.notes else []
        return "\n".join(parts) + "\n"


def rows_scored_here(checkpoint: Checkpoint) -> Sequence[Row]:
    """The rows of eval.json, if this user's modekit wrote that very file, as this version does; else none.

    A file that somebody else brought is shown as what it says (`modekit report`), but no row of it stands for a score.
    """
    try:
        content = read_bytes(results_path(checkpoint, Results.file), LARGE)
        return Results.from_data(parse_json(content.decode())).rows if is_proven_here(_claim(content)) else ()
    except UNREADABLE:
        return ()


def _claim(content: bytes) -> str:
    return f"{Results.file} {hashlib.sha256(content).hexdigest()}"


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
