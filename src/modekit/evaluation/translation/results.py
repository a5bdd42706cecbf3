"""The table of `modekit eval --translate`: scores, speed, examples side by side, and how they are shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from modekit.evaluation.markdown import markdown_table, plain
from modekit.evaluation.results import Kind
from modekit.evaluation.translation.examples import Compared, TranslationExample
from modekit.evaluation.translation.scores import TranslationScore
from modekit.files.figures import count_of


@dataclass(frozen=True)
class TranslationRow:
    """One model. `tokens` were written in `seconds` on the machine that measured it; `cut` translations ended at the limit."""

    name: str
    kind: Kind
    total_parameters: int
    active_parameters: int
    scores: Mapping[str, TranslationScore]
    tokens: int
    seconds: float
    cut: int

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
class TranslationResults:
    """The table. `domains` have an expert and enter the means; `unseen` have none. `checkpoint` is what it is of.

    `settings` is how all models wrote, `signatures` what sacrebleu computed. `differences` (by domain) and `examples` compare
    the mixture with the base, and are empty without a base.
    """

    rows: Sequence[TranslationRow]
    domains: Sequence[str]
    unseen: Sequence[str]
    settings: Mapping[str, Any]
    signatures: Mapping[str, str]
    text: Mapping[str, Mapping[str, Any]]
    differences: Mapping[str, Compared]
    examples: Sequence[TranslationExample]
    checkpoint: Mapping[str, str]
    notes: Sequence[str] = field(default_factory=list)

    def row(self, name: str) -> TranslationRow:
        """A row by its name."""
        return next(row for row in self.rows if row.name == name)

    def as_data(self) -> dict[str, Any]:
        """For translate.json."""
        rows = []
        for row in self.rows:
            mean = row.mean(self.domains)
            rows.append(
                {
                    **{key: value for key, value in asdict(row).items() if key != "scores"},
                    "tokens_per_second": row.tokens_per_second,
                    "domains": {domain: asdict(score) for domain, score in row.scores.items()},
                    "mean": asdict(mean) if mean is not None else None,
                }
            )
        return {
            "format": 1,
            "checkpoint": dict(self.checkpoint),
            "settings": dict(self.settings),
            "signatures": dict(self.signatures),
            "rows": rows,
            "domains": list(self.domains),
            "unseen": list(self.unseen),
            "text": {name: dict(record) for name, record in self.text.items()},
            "differences": {name: asdict(each) for name, each in self.differences.items()},
            "examples": [asdict(each) for each in self.examples],
            "notes": list(self.notes),
        }

    def said(self) -> str:
        """How all models wrote, in a line."""
        beams = self.settings["beams"]
        way = "greedily" if beams == 1 else f"with {beams} beams"
        return f"BLEU / chrF of held-out sources, translated {way}, at most {self.settings['max_new_tokens']} tokens each."

    def table(self, between: str = " / ") -> tuple[list[str], list[list[str]]]:
        """Header and cells: BLEU and chrF per domain, their mean, unseen domains, tokens per second, parameters.

        `between` separates the two figures of a cell.
        """
        header = ["model", *self.domains, "mean", *(f"{name}{between}unseen" for name in self.unseen)]
        header += ["tokens per second", f"total{between}active"]
        body = []
        for row in self.rows:
            scores = [*(row.scores.get(name) for name in self.domains), row.mean(self.domains)]
            scores += [row.scores.get(name) for name in self.unseen]
            cells = ["-" if score is None else f"{score.bleu:.1f}{between}{score.chrf:.1f}" for score in scores]
            speed = "-" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}"
            sizes = f"{count_of(row.total_parameters)}{between}{count_of(row.active_parameters)}"
            body.append([row.name, *cells, speed, sizes])
        return header, body

    def markdown(self) -> str:
        """For translate.md: the table, what has to be said of it, and the examples, as text without markup."""
        parts = [self.said(), "", markdown_table(*self.table()), "", *(f"* {note}" for note in self.notes)]
        for domain, counted in self.differences.items():
            parts += ["", f"## {plain(domain)}", "", said_of(counted)]
            examples = [each for each in self.examples if each.domain == domain]
            if examples:
                parts += ["", markdown_table(["", *(f"chrF {each.gain:+.1f}" for each in examples)], _lines(examples), plain)]
        return "\n".join(parts) + "\n"


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
