"""The result of a search: every candidate, the best, and the Pareto front of loss against active parameters.

results/tune.json holds the same; the report reads it back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from modekit.evaluation.identity import ReadSequences
from modekit.evaluation.markdown import markdown_table
from modekit.evaluation.results import SMALLEST_GAP
from modekit.files.figures import count_of, or_dash
from modekit.files.typed import Count, Number
from modekit.recipes.fits import FITS
from modekit.recipes.mixture import CHOICES
from modekit.search.tune.space import label, short_backbone
from modekit.text.amounts import SAMPLE_TOKENS

Losses = dict[str, Number]
"""Domain -> nats per token."""
Reference = dict[str, dict[str, Losses]]
"""Split -> base, own -> losses of the base and of each domain's own expert."""
Mixture = dict[str, JsonValue]
"""As a recipe writes it."""


@dataclass(frozen=True)
class TuneSettings:
    """How much a search does: candidates, tokens per domain and split, and what may run at once."""

    trials: int = 48
    tokens_per_domain: int = SAMPLE_TOKENS
    sequence_length: int = 512
    seed: int = 0
    processes: int = 1
    ray: bool = False


class Candidate(BaseModel):
    """One variant that was tried. `losses`: on the tokens of the select split that were scored."""

    model_config = ConfigDict(frozen=True)

    number: Count
    name: str = ""
    mixture: Mixture
    status: Literal["scored", "dropped", "refused"]
    why: str = ""
    losses: Losses = {}
    tokens: Count = 0
    active: Count = 0
    total: Count = 0
    native: bool = False
    seconds: Number = 0.0

    @property
    def mean(self) -> float:
        """Mean loss over the domains."""
        return mean_of(self.losses)


class ReportedLoss(BaseModel, frozen=True):
    """On the report split, which chose nothing."""

    losses: Losses
    mean_loss: Number
    gap_closed: Number | None


class RankedCandidate(Candidate):
    """A candidate among the others: its mixture in a line, what it came to, whether it is the best, or on the front."""

    description: str
    mean_loss: Number | None
    gap_closed: Number | None
    report: ReportedLoss | None
    best: bool
    pareto: bool


class TuneResults(BaseModel, frozen=True):
    """Of a search.

    Attributes:
        candidates: by loss; dropped ones behind those that were scored in full, and behind those that were dropped after more
            of the text, since losses on other text do not compare; refused ones last.
        seconds: that this run of the search took to find the best; the report and the build come on top.
    """

    format: Literal[1] = 1
    checkpoint: dict[str, str]
    candidates: Annotated[list[RankedCandidate], Field(max_length=2**14)]
    reference: Reference
    settings: TuneSettings
    space: dict[str, JsonValue]
    text: dict[str, dict[str, ReadSequences]]
    seconds: Number

    @property
    def best(self) -> RankedCandidate:
        """What is built."""
        return next(each for each in self.candidates if each.best)

    @property
    def front(self) -> list[RankedCandidate]:
        """What no other candidate beats with as few active parameters, from few to many."""
        return sorted((each for each in self.candidates if each.pareto), key=lambda each: each.active)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and cells, best first."""
        return ["", "variant", "select loss", "report loss", "gap closed", "active", "runs as"], [
            [
                "best" if each.best else "front" if each.pareto else "",
                (f"{each.name}: " if each.name else "") + each.description,
                _loss_text(each),
                or_dash(None if each.report is None else each.report.mean_loss, ".4f"),
                or_dash(None if each.report is None else each.report.gap_closed, ".3f"),
                count_of(each.active) if each.active else "-",
                "-" if each.status == "refused" else "native" if each.native else "modekit",
            ]
            for each in self.candidates
        ]

    def markdown(self) -> str:
        """All candidates; dropped ones with the loss at which they were dropped."""
        about = [
            "Mean loss over the domains in nats per token. Candidates were compared on the select split; the report split",
            "chose nothing. In brackets: dropped after a part of the text. Gap closed is that of the report split.",
        ]
        reasons = dict.fromkeys(each.why for each in sorted(self.candidates, key=lambda each: each.number) if each.why)
        refused = ["", "Refused:", *(f"* {' '.join(why.split())}" for why in reasons)] if reasons else []
        return "\n".join([*about, "", markdown_table(*self.table()), *refused, ""])


def rank(found: Sequence[Candidate], reported: Mapping[int, Losses], reference: Reference) -> list[RankedCandidate]:
    """Candidates in the order of the table. `reported`: number -> losses on the report split."""
    order = {"scored": 0, "dropped": 1, "refused": 2}
    ranked = sorted(found, key=lambda each: (order[each.status], -each.tokens, each.mean if each.losses else 0.0))
    best, front = best_of(found), {each.number for each in pareto(found)}
    rows = []
    for each in ranked:
        losses = reported.get(each.number)
        rows.append(
            RankedCandidate(
                **each.model_dump(),
                description=describe(each.mixture),
                mean_loss=each.mean if each.losses else None,
                gap_closed=gap_closed(each.losses, reference["select"]) if each.status == "scored" else None,
                report=losses
                and ReportedLoss(losses=losses, mean_loss=mean_of(losses), gap_closed=gap_closed(losses, reference["report"])),
                best=each is best,
                pareto=each.number in front,
            )
        )
    return rows


def gap_closed(losses: Losses, reference: Mapping[str, Losses]) -> float | None:
    """Mean share of the gap closed, over the domains that have one."""
    base, own = reference["base"], reference["own"]
    gaps = [
        (base[name] - loss) / (base[name] - own[name]) for name, loss in losses.items() if base[name] - own[name] > SMALLEST_GAP
    ]
    return sum(gaps) / len(gaps) if gaps else None


def pareto(found: Sequence[Candidate]) -> list[Candidate]:
    """Of the fully scored: those that no other beats in loss with as few active parameters, from few to many."""
    front: list[Candidate] = []
    scored = [candidate for candidate in found if candidate.status == "scored"]
    for candidate in sorted(scored, key=lambda each: (each.active, each.mean)):
        if not front or candidate.mean < front[-1].mean:
            front.append(candidate)
    return front


def best_of(found: Sequence[Candidate]) -> Candidate | None:
    """Of the fully scored; None when there is none."""
    return min((each for each in found if each.status == "scored"), key=lambda each: each.mean, default=None)


def mean_of(losses: Losses) -> float:
    """Over the domains, each counting equally."""
    return sum(losses.values()) / len(losses)


def describe(mixture: Mapping[str, Any]) -> str:
    """A mixture in a line."""
    router = mixture.get("router", {})
    words = []
    if mixture.get("method") == "linear":
        words.append("linear")
    else:  # older versions' need not say its fit
        words.append(FITS[router.get("fit", "logistic")].label)
        words += [router["granularity"]] if "granularity" in router else []
        words += [f"order {router['order']}"] if "order" in router else []
        words += [f"decay {router['decay'][0]:g}"] if router.get("decay") else []
        words += [f"T {router['temperature']:g}"] if router.get("temperature", 1.0) != 1.0 else []
        words += [f"top-{mixture['top_k']}"] if mixture.get("top_k") else []
        words += [f"{key} {mixture[key]}" for key in CHOICES[1:] if mixture.get(key)]
    always_on = mixture.get("always_on")
    if always_on is not None:
        share = f" {always_on['weight']:g}" if always_on.get("weight") else ""
        words.append(f"always {always_on['expert']}{share}")
    if mixture.get("modules", "auto") != "auto":
        modules = mixture["modules"]
        words.append({"all": "whole models", "decoder": "whole decoders"}.get(str(modules)) or "+".join(modules))
    words += [f"layers {','.join(map(str, mixture['layers']))}"] if mixture.get("layers") else []
    if mixture.get("backbone", "base") != "base":
        words.append("backbone " + short_backbone(label(mixture["backbone"])))
    return ", ".join(words)


def _loss_text(candidate: Candidate) -> str:
    if not candidate.losses:
        return candidate.status
    return f"{candidate.mean:.4f}" if candidate.status == "scored" else f"({candidate.mean:.4f})"
