"""The table of `modekit eval-translation`: scores, speed, examples side by side, and how they are shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from pydantic import Field, JsonValue

from modekit.evaluation.identity import ReadText
from modekit.evaluation.markdown import markdown_table, plain
from modekit.evaluation.results import Kind
from modekit.evaluation.results_folder import CheckpointResult
from modekit.evaluation.translation.decoding import Decoding
from modekit.evaluation.translation.examples import Compared, TranslationExample
from modekit.evaluation.translation.scores import Signatures, TranslationScore
from modekit.files.figures import count_of
from modekit.files.typed import Count, Label, Number


@dataclass(frozen=True)
class TranslationSettings(Decoding):
    """How all models wrote, how many pairs of a domain at most, and on which machine."""

    pairs: Count = field(kw_only=True)
    machine: str = field(kw_only=True)


@dataclass(frozen=True)
class TranslationRow:
    """One model. `tokens` were written in `seconds` on the machine that measured it; `cut` translations ended at the limit."""

    name: Label
    kind: Kind
    total_parameters: Count
    active_parameters: Count
    scores: Annotated[Mapping[Label, TranslationScore], Field(alias="domains")]
    tokens: Count
    seconds: Number
    cut: Count

    @property
    def tokens_per_second(self) -> float | None:
        """None where nothing was written."""
        return self.tokens / self.seconds if self.tokens and self.seconds > 0 else None

    def mean(self, domains: Sequence[str]) -> TranslationScore | None:
        """The arithmetic mean of the domains' corpus scores; None unless all were scored, and there are some."""
        if not domains or any(domain not in self.scores for domain in domains):
            return None
        scores = [self.scores[domain] for domain in domains]
        return TranslationScore(
            sum(score.bleu for score in scores) / len(scores), sum(score.chrf for score in scores) / len(scores)
        )


@dataclass(frozen=True)
class TranslationResults(CheckpointResult):
    """translate.json. `domains` have an expert and enter the means; `unseen` have none.

    `differences` (by domain) and `examples` compare the mixture with the base, and are empty without a base.
    """

    rows: Annotated[Sequence[TranslationRow], Field(max_length=2**10)]
    domains: Sequence[Label]
    unseen: Sequence[Label]
    settings: TranslationSettings
    signatures: Signatures
    text: Mapping[str, ReadText]
    differences: Mapping[Label, Compared]
    examples: Annotated[Sequence[TranslationExample], Field(max_length=2**10)]
    notes: Sequence[str] = field(default_factory=list)

    file = "translate.json"
    command = "modekit eval-translation"

    def row(self, name: str) -> TranslationRow:
        """A row by its name."""
        return next(row for row in self.rows if row.name == name)

    def cells(self) -> int:
        """Of a row per model and a column per domain."""
        return len(self.rows) * (1 + len(self.domains) + len(self.unseen))

    def as_data(self) -> dict[str, JsonValue]:
        """Plain data for JSON, with the speed and the means that the table shows."""
        data: dict[str, Any] = super().as_data()
        for row, said in zip(self.rows, data["rows"], strict=True):
            mean = row.mean(self.domains)
            said |= {"tokens_per_second": row.tokens_per_second, "mean": None if mean is None else asdict(mean)}
        return data

    def said(self) -> str:
        """How all models wrote, in a line."""
        beams = self.settings.beams
        way = "greedily" if beams == 1 else f"with {beams} beams"
        return f"BLEU / chrF of held-out sources, translated {way}, at most {self.settings.max_new_tokens} tokens each."

    def table(self, between: str = " / ") -> tuple[list[str], list[list[str]]]:
        """Header and cells: those of `score_table`, tokens per second, and parameters; `between` separates two figures."""
        header, body = score_table(self.rows, self.domains, self.unseen, between)
        for row, cells in zip(self.rows, body, strict=True):
            cells.append("-" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}")
            cells.append(f"{count_of(row.total_parameters)}{between}{count_of(row.active_parameters)}")
        return [*header, "tokens per second", f"total{between}active"], body

    def markdown(self) -> str:
        """For translate.md: the table, what has to be said of it, and the examples, as text without markup."""
        parts = [self.said(), "", markdown_table(*self.table()), "", *(f"* {note}" for note in self.notes)]
        for domain, counted in self.differences.items():
            parts += ["", f"## {plain(domain)}", "", said_of(counted)]
            examples = [each for each in self.examples if each.domain == domain]
            if examples:
                parts += ["", markdown_table(["", *(f"chrF {each.gain:+.1f}" for each in examples)], _lines(examples), plain)]
        return "\n".join(parts) + "\n"


def score_table(
    rows: Sequence[TranslationRow], domains: Sequence[str], unseen: Sequence[str], between: str = " / "
) -> tuple[list[str], list[list[str]]]:
    """Header and cells: BLEU and chrF per domain, their mean, unseen domains; `between` separates the two figures."""
    header = ["model", *domains, "mean", *(f"{name}{between}unseen" for name in unseen)]
    body = []
    for row in rows:
        scores = [*map(row.scores.get, domains), row.mean(domains), *map(row.scores.get, unseen)]
        body.append([row.name, *("-" if each is None else f"{each.bleu:.1f}{between}{each.chrf:.1f}" for each in scores)])
    return header, body


def said_of(counted: Compared) -> str:
    """How often either is better, in a line."""
    return (
        f"Pairs by sentence chrF of the mixture against the base's: higher {counted.better}, lower {counted.worse}, "
        f"the same {counted.same}."
    )


def _lines(examples: Sequence[TranslationExample]) -> list[list[str]]:
    """A line per kind of text, a column per example."""
    lines = [
        ["source", *(each.source for each in examples)],
        ["reference", *(each.reference for each in examples)],
        ["base", *(each.base for each in examples)],
    ]
    if any(each.own is not None for each in examples):
        lines.append(["own expert", *(each.own or "" for each in examples)])
    return [*lines, ["mixture", *(each.mixture for each in examples)]]
