"""The table of `modekit eval`: scores, rows, the gap that each row closes, and how they are shown.

gap closed = (loss of base - loss of row) / (loss of base - loss of the domain's own expert)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.evaluation.identity import ReadSequences, mixture_identities, row_identity
from modekit.evaluation.labels import Gain
from modekit.evaluation.results_folder import Result, results_path
from modekit.evaluation.tables import Cell, ResultTable
from modekit.evaluation.uncertainty import gap_error, mean_error
from modekit.files.figures import count_of, or_dash
from modekit.files.read import LARGE, UNREADABLE, parse_json, read_bytes
from modekit.files.typed import Count, Label, Number
from modekit.files.user_cache import is_proven_here, keep_proven
from modekit.recipes.strict import BASE

Kind = Literal["base", "expert", "average", "oracle", "mixture", "label"]
"""Of a row; `label`: the mixture, or the base, that read a label with every text."""
SMALLEST_GAP = 1e-3  # nats: below it an expert is not better than the base and a share of the gap means nothing


@dataclass(frozen=True)
class Score:
    """Of one model on one domain: mean loss per token in nats, perplexity, bits per byte, share of the gap closed.

    `blocks` are the sums of loss, in nats, over up to 20 consecutive parts of the text, the same parts in every row;
    `loss_error` and `gap_error` are standard errors over them. None when there are fewer than two sequences.
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
        gaps = [gap for gap, _ in self._gaps(domains)]
        return sum(gaps) / len(gaps) if gaps else None

    def mean_gap_error(self, domains: Sequence[str]) -> float | None:
        """Its standard error (domains' texts are independent); None unless that of every gap is known."""
        errors = [error for _, error in self._gaps(domains)]
        known = [error for error in errors if error is not None]
        return math.hypot(*known) / len(known) if known and len(known) == len(errors) else None

    def _gaps(self, domains: Sequence[str]) -> list[tuple[float, float | None]]:
        scores = [self.scores[domain] for domain in domains if domain in self.scores]
        return [(score.gap_closed, score.gap_error) for score in scores if score.gap_closed is not None]


@dataclass(frozen=True)
class Results(Result):
    """eval.json. `domains` have an expert and enter the means; `unseen` have none. It belongs to the mixture of its row."""

    rows: Sequence[Row]
    domains: Sequence[Label]
    unseen: Sequence[Label]
    text: Mapping[str, ReadSequences]

    file = "eval.json"
    command = "modekit eval"
    expected = True

    def row(self, name: str) -> Row:
        """A row by its name."""
        return next(row for row in self.rows if row.name == name)

    def of_kind(self, kind: Kind) -> Row | None:
        """The first row of a kind."""
        return next((row for row in self.rows if row.kind == kind), None)

    def belongs_to(self, checkpoint: Checkpoint) -> bool:
        """Whether the table's mixture is this checkpoint as it is now: experts, router, training and text."""
        mixture, names = self.of_kind("mixture"), [*self.domains, *self.unseen]
        if mixture is None or any(name not in self.text for name in names):
            return False
        experts_id, router_id = mixture_identities(checkpoint)
        return mixture.identity == row_identity(f"{experts_id} {router_id}", checkpoint, [self.text[name] for name in names])

    def as_data(self) -> dict[str, JsonValue]:
        """Plain data for JSON, with the means that the table shows."""
        data: dict[str, Any] = super().as_data()
        for row, said in zip(self.rows, data["rows"], strict=True):
            said["mean"] = {"loss": row.mean_loss(self.domains), "gap_closed": row.mean_gap(self.domains)}
        return data

    def write(self, checkpoint: Checkpoint) -> None:
        """Write eval.json and eval.md, and remember that this file is this user's own."""
        super().write(checkpoint)
        keep_proven(_claim(self.as_json()))

    def tables(self) -> list[ResultTable]:
        """Loss and perplexity per domain, means, gap closed, parameters; in detail gap closed and bits per byte per domain."""
        every, unseen = [*self.domains, *self.unseen], [f"{name}\nunseen" for name in self.unseen]
        header = ["model", *self.domains, *unseen, "mean loss", "gap closed", "total\nactive"]
        base = self.of_kind("base")
        apart = [self._over_base(row, base, name) for row in self.rows for name in every]
        most = max((abs(each) for each in apart if each is not None), default=0.0)
        body = []
        for row in self.rows:
            cells: list[str | Cell] = [row.name]
            for name in every:
                score, change = row.scores.get(name), self._over_base(row, base, name)
                said = "-" if score is None else f"{score.loss:.3f}\n{score.perplexity:.1f}"
                cells.append(Cell(said, change=change / most if change is not None and most else None))
            cells += [or_dash(row.mean_loss(self.domains), ".3f"), or_dash(row.mean_gap(self.domains), ".2f")]
            body.append([*cells, f"{count_of(row.total_parameters)}\n{count_of(row.active_parameters)}"])
        said = "Held-out loss in nats per token, with perplexity; gap closed: 0 = the base, 1 = each domain's own expert."
        gaps = [[row.name, *(_with_error(row.scores.get(name)) for name in self.domains)] for row in self.rows]
        bits = [[row.name, *(_bits(row.scores.get(name)) for name in every)] for row in self.rows]
        return [
            ResultTable("Loss", header, body, said),
            ResultTable("Gap closed", ["model", *self.domains], gaps, "Per domain, with its standard error.", detail=True),
            ResultTable("Bits per byte", ["model", *self.domains, *unseen], bits, "Per domain.", detail=True),
        ]

    @staticmethod
    def _over_base(row: Row, base: Row | None, domain: str) -> float | None:
        """Loss less the base's."""
        if base is None or domain not in row.scores or domain not in base.scores:
            return None
        return row.scores[domain].loss - base.scores[domain].loss


def _with_error(score: Score | None) -> str:
    if score is None or score.gap_closed is None:
        return "-"
    return f"{score.gap_closed:.2f}" + ("" if score.gap_error is None else f" ± {score.gap_error:.3f}")


def _bits(score: Score | None) -> str:
    return "-" if score is None else f"{score.bits_per_byte:.3f}"


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


def difference(one: Score, other: Score) -> tuple[float, float | None]:
    """One mean loss less another on the same text, nats per token, and its standard error; None when it is not known. Parts of
    the text count as equally long.
    """
    apart = one.loss - other.loss
    if one.blocks is None or other.blocks is None or not len(one.blocks) == len(other.blocks) > 1 or not one.loss:
        return apart, None
    tokens = sum(one.blocks) / one.loss / len(one.blocks)
    return apart, mean_error([a - b for a, b in zip(one.blocks, other.blocks, strict=True)], [tokens] * len(one.blocks))


def _references(rows: Sequence[Row], domains: Sequence[str]) -> dict[str, tuple[Score, Score]]:
    """Scores of the base and of the domain's own expert, for domains whose expert was run."""
    named = {row.name: row for row in rows if row.kind in {"base", "expert"}}
    if BASE not in named:
        return {}
    return {name: (named[BASE].scores[name], named[name].scores[name]) for name in domains if name in named}


def _is_gap(base: Score, own: Score) -> bool:
    """Whether the own expert gains more over the base than nothing, and than two standard errors."""
    gain, error = difference(base, own)
    return gain > max(SMALLEST_GAP, 2 * (error or 0.0))


def with_gaps(rows: Sequence[Row], domains: Sequence[str]) -> list[Row]:
    """The rows with the share of each domain's gap that they close, and its error; none where there is no gap."""
    references = {name: each for name, each in _references(rows, domains).items() if _is_gap(*each)}

    def closed(row: Row, name: str) -> Score:
        score = row.scores[name]
        if name not in references:
            return replace(score, gap_closed=None, gap_error=None)
        base, own = references[name]
        share = (base.loss - score.loss) / (base.loss - own.loss)
        return replace(score, gap_closed=share, gap_error=gap_error(base.blocks, own.blocks, score.blocks))

    return [replace(row, scores={name: closed(row, name) for name in row.scores}) for row in rows]


def gapless_notes(rows: Sequence[Row], domains: Sequence[str]) -> Iterator[str]:
    """Why a domain has no share of its gap."""
    gains = {name: difference(*each)[0] for name, each in _references(rows, domains).items() if not _is_gap(*each)}
    none = [name for name, gain in gains.items() if gain <= SMALLEST_GAP]
    noise = [f"{name} {gain:.3f}" for name, gain in gains.items() if gain > SMALLEST_GAP]
    if none:
        yield f"no gap to close, so not in its mean: {', '.join(none)} (the own expert is not better than the base)"
    if noise:
        yield (
            f"no gap closed is shown, since what the own expert gains over the base is within the noise: {', '.join(noise)} "
            "nats per token; train the expert longer, or give more held-out text"
        )


def beaten_notes(rows: Sequence[Row], owners: Mapping[str, str]) -> Iterator[str]:
    """Domains whose own expert is surely worse than another; `owners`: domain -> its row's name, the base's or its own."""
    named = {row.name: row for row in rows if row.kind in {"base", "expert"}}
    for domain, owner in owners.items():
        own = named.get(owner)
        others = [row for row in named.values() if row.kind == "expert" and row is not own and domain in row.scores]
        best = min(others, key=lambda row: row.scores[domain].loss, default=None)
        if own is None or best is None:
            continue
        mine, other = own.scores[domain], best.scores[domain]
        apart, error = difference(mine, other)
        if apart > max(SMALLEST_GAP, 2 * (error or 0.0)):
            who = "the base model, which is its expert," if own.kind == "base" else "its own expert"
            yield f"{domain}: {who} has {mine.loss:.3f} on its text, worse than {best.name} with {other.loss:.3f}"


def loss_gains(domains: Sequence[str], with_label: Row, without: Row) -> list[Gain]:
    """What a label saves of the loss, mean over domains; none where one of them was not scored."""
    if not all(name in with_label.scores for name in domains):
        return []
    found = [difference(without.scores[name], with_label.scores[name]) for name in domains]
    errors = [error for _, error in found if error is not None]
    error = math.hypot(*errors) / len(found) if len(errors) == len(found) else None  # without one of them nothing is known
    return [Gain(sum(gain for gain, _ in found) / len(found), "nats per token", 3, error)]
