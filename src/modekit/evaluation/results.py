"""The table of `modekit eval`: scores, rows, the gap that each row closes, how sure they are, and how they are shown.

gap closed = (loss of base - loss of row) / (loss of base - loss of the domain's own expert)

Standard errors are over parts of the text (delete-a-group jackknife).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field

from modekit.evaluation.results_folder import Result
from modekit.evaluation.tables import Cell, ResultTable
from modekit.files.figures import count_of, or_dash
from modekit.files.typed import Count, Label, Number
from modekit.recipes.strict import BASE

Kind = Literal["base", "expert", "average", "oracle", "mixture", "label"]
"""Of a row; `label`: the mixture, or the base, that read a label with every text."""
_BLOCKS = 20
_SMALLEST_GAP = 0.01  # nats: a share of less is hundreds where a mixture loses a little
Block = tuple[Number, Count]
"""Of a part of a text: the sum of the loss in nats, and how many tokens it is of."""


@dataclass(frozen=True)
class Score:
    """Mean loss of one model on one domain in nats per token, and share of the gap closed with its standard error.

    `blocks`: up to 20 consecutive parts of the text, the same parts in every row.
    """

    loss: Number
    gap_closed: Number | None = None
    gap_error: Number | None = None
    blocks: tuple[Block, ...] = ()

    @property
    def sums(self) -> list[float]:
        """Sum of the loss of each block."""
        return [loss for loss, _ in self.blocks]

    @property
    def perplexity(self) -> float:
        """Of a token."""
        return math.exp(min(self.loss, 700.0))


@dataclass(frozen=True)
class Row:
    """One model; `identity` names exactly what was run, so that an unchanged row is not run again."""

    name: Label
    kind: Kind
    total_parameters: Count
    active_parameters: Count
    scores: Annotated[Mapping[Label, Score], Field(alias="domains")]
    identity: str

    def mean_loss(self, domains: Sequence[str]) -> float | None:
        """Mean loss over domains; None unless all were scored, and there are some."""
        if not domains or any(domain not in self.scores for domain in domains):
            return None
        return sum(self.scores[domain].loss for domain in domains) / len(domains)

    def mean_gap(self, domains: Sequence[str]) -> float | None:
        """Mean gap closed over the domains that have a gap, the same in every row; None unless all domains were scored."""
        gaps = [gap for gap, _ in self._gaps(domains)]
        return sum(gaps) / len(gaps) if gaps else None

    def mean_gap_error(self, domains: Sequence[str]) -> float | None:
        """Its standard error (domains' texts are independent); None unless that of every gap is known."""
        errors = [error for _, error in self._gaps(domains)]
        known = [error for error in errors if error is not None]
        return math.hypot(*known) / len(known) if known and len(known) == len(errors) else None

    def _gaps(self, domains: Sequence[str]) -> list[tuple[float, float | None]]:
        if any(domain not in self.scores for domain in domains):
            return []
        scores = [self.scores[domain] for domain in domains]
        return [(score.gap_closed, score.gap_error) for score in scores if score.gap_closed is not None]


@dataclass(frozen=True)
class Results(Result):
    """eval.json. `domains` have an expert and enter the means; `unseen` have none."""

    rows: Sequence[Row]
    domains: Sequence[Label]
    unseen: Sequence[Label]

    file = "eval.json"
    command = "modekit eval"
    expected = True

    def row(self, name: str) -> Row:
        """A row by its name."""
        return next(row for row in self.rows if row.name == name)

    @property
    def averaged(self) -> str:
        """How many domains a mean gap closed is of: those that have a gap."""
        scores = [row.scores[name] for name in self.domains for row in self.rows[:1] if name in row.scores]
        return f"{sum(score.gap_closed is not None for score in scores)} of {len(self.domains)} domains"

    def of_kind(self, kind: Kind) -> Row | None:
        """The first row of a kind."""
        return next((row for row in self.rows if row.kind == kind), None)

    def tables(self) -> list[ResultTable]:
        """Loss and perplexity per domain, means, gap closed, parameters; in detail gap closed per domain."""
        every, unseen = [*self.domains, *self.unseen], [f"{name}\nunseen" for name in self.unseen]
        header = ["model", *self.domains, *unseen, "mean loss", f"gap closed\n({self.averaged})", "total\nactive"]
        of_base = {} if (base := self.of_kind("base")) is None else base.scores
        apart = {
            (row.name, name): score.loss - of_base[name].loss
            for row in self.rows
            for name, score in row.scores.items()
            if name in of_base
        }
        most = max(map(abs, apart.values()), default=0.0) or 1.0
        body = []
        for row in self.rows:
            cells: list[str | Cell] = [row.name]
            for name in every:
                score, change = row.scores.get(name), apart.get((row.name, name))
                said = "-" if score is None else f"{score.loss:.3f}\n{score.perplexity:.1f}"
                cells.append(Cell(said, change=None if change is None else change / most))
            cells += [or_dash(row.mean_loss(self.domains), ".3f"), or_dash(row.mean_gap(self.domains), ".2f")]
            body.append([*cells, f"{count_of(row.total_parameters)}\n{count_of(row.active_parameters)}"])
        said = "Held-out loss in nats per token, with perplexity; gap closed: 0 = the base, 1 = each domain's own expert."
        gaps = [[row.name, *(_with_error(row.scores.get(name)) for name in self.domains)] for row in self.rows]
        return [
            ResultTable("Loss", header, body, said),
            ResultTable("Gap closed", ["model", *self.domains], gaps, "Per domain, with its standard error.", detail=True),
        ]


def _with_error(score: Score | None) -> str:
    if score is None or score.gap_closed is None:
        return "-"
    return f"{score.gap_closed:.2f}" + ("" if score.gap_error is None else f" ± {score.gap_error:.3f}")


def difference(one: Score, other: Score) -> tuple[float, float | None]:
    """One mean loss less another on the same text, nats per token, and its standard error; None when it is not known."""
    apart = one.loss - other.loss
    if not len(one.blocks) == len(other.blocks) > 1:
        return apart, None
    changes = [ours - theirs for ours, theirs in zip(one.sums, other.sums, strict=True)]
    return apart, mean_error(changes, [tokens for _, tokens in one.blocks])


def _references(rows: Sequence[Row], domains: Sequence[str]) -> dict[str, tuple[Score, Score]]:
    """Scores of the base and of the domain's own expert, for domains whose expert was run."""
    named = {row.name: row for row in rows if row.kind in {"base", "expert"}}
    if BASE not in named:
        return {}
    return {name: (named[BASE].scores[name], named[name].scores[name]) for name in domains if name in named}


def is_gap(base: Score, own: Score) -> bool:
    """Whether the own expert gains more over the base than next to nothing, and than two standard errors, which are known."""
    gain, error = difference(base, own)
    return error is not None and gain > max(_SMALLEST_GAP, 2 * error)


def with_gaps(rows: Sequence[Row], domains: Sequence[str]) -> list[Row]:
    """The rows with the share of each domain's gap that they close, and its error; none where there is no gap."""
    references = {name: each for name, each in _references(rows, domains).items() if is_gap(*each)}

    def closed(row: Row, name: str) -> Score:
        score = row.scores[name]
        if name not in references:
            return replace(score, gap_closed=None, gap_error=None)
        base, own = references[name]
        share = (base.loss - score.loss) / (base.loss - own.loss)
        return replace(score, gap_closed=share, gap_error=gap_error(base.sums, own.sums, score.sums))

    return [replace(row, scores={name: closed(row, name) for name in row.scores}) for row in rows]


def gapless_notes(rows: Sequence[Row], domains: Sequence[str]) -> Iterator[str]:
    """Which domains have no share of a gap, and why."""
    references = _references(rows, domains)
    gains = {name: difference(*each) for name, each in references.items() if not is_gap(*each)}
    if gains:
        said = [f"{name} {gain:+.3f}{'' if error is None else f' ± {error:.3f}'}" for name, (gain, error) in gains.items()]
        yield (
            "gap closed leaves out domains whose own expert gains over the base less than "
            f"{_SMALLEST_GAP} nats per token or two standard errors: {', '.join(said)}; train the expert longer, or give more "
            "held-out text"
        )
    if unknown := [name for name in domains if name not in references]:
        yield f"gap closed leaves out {', '.join(unknown)}: base and own expert were not both scored"


def label_notes(rows: Sequence[Row], domains: Sequence[str]) -> Iterator[str]:
    """What labels save of the loss against none, mean over domains; nothing where a domain was not scored under them."""
    named = {row.name: row for row in rows}
    for row in rows if domains else ():
        model = row.name.partition(",")[0]
        without = named.get(f"{model}, no tag", named.get(model))
        if row.kind != "label" or without is None or without is row or any(name not in row.scores for name in domains):
            continue
        gains = [difference(without.scores[name], row.scores[name]) for name in domains]
        errors = [error for _, error in gains if error is not None]
        error = f" ± {math.hypot(*errors) / len(gains):.3f}" if len(errors) == len(gains) else ""
        gain = sum(gain for gain, _ in gains) / len(gains)
        yield f"{row.name}: a gain of {gain:+.3f}{error} nats per token over none, mean over the domains"


def in_blocks(losses: Sequence[float], tokens: Sequence[int]) -> tuple[Block, ...]:
    """At most 20 consecutive parts: the pieces of a document stand side by side, and depend on each other."""
    count = min(_BLOCKS, len(losses))
    bounds = pairwise(len(losses) * place // count for place in range(count + 1))
    return tuple((sum(losses[start:stop]), sum(tokens[start:stop])) for start, stop in bounds)


def mean_error(sums: Sequence[float], counts: Sequence[float]) -> float | None:
    """Standard error of sum(sums) / sum(counts), from both by block."""
    return jackknife_error(operator.truediv, sums, counts)


def gap_error(base: Sequence[float], own: Sequence[float], row: Sequence[float]) -> float | None:
    """Standard error of (base - row) / (base - own), from sums of loss by block.

    All three read the same text, so that most of its spread cancels. None when blocks are missing, or when one part of the
    text decides whether there is a gap at all.
    """
    if not len(base) == len(own) == len(row) > 1:
        return None

    def share(base: float, own: float, row: float) -> float:
        return (base - row) / (base - own) if base > own else math.nan

    return jackknife_error(share, base, own, row)


def jackknife_error(figure: Callable[..., float], *blocks: Collection[float]) -> float | None:
    """Standard error of a figure of several sums, each given by block: from its values with one block left out each; None when
    one of them is not finite.

    Tukey's jackknife; Efron and Stein, Annals of Statistics 1981.
    """
    totals = [sum(each) for each in blocks]
    without = [figure(*map(operator.sub, totals, parts)) for parts in zip(*blocks, strict=True)]
    count = len(without)
    mean = sum(without) / count
    error = math.sqrt((count - 1) / count * sum((value - mean) ** 2 for value in without))
    return error if math.isfinite(error) else None
