"""What advice came to: everything that was found, and the recipe that follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modekit.recipes.recipe import Recipe
from modekit.recipes.strict import BASE
from modekit.search.advise.drift import Drift
from modekit.search.advise.findings import Finding
from modekit.search.advise.judge import has_gain
from modekit.search.advise.measured import Measured
from modekit.search.advise.rules import Choice, Facts

if TYPE_CHECKING:
    from modekit.search.advise.gain import Figure

FORMAT = 1
LIMITS = (
    "The rules rest on models of a few million parameters (benchmarks/advise.md): what a mixture is worth says `modekit eval`.",
    "A share bounds what any router can reach with that part; how near a router comes is not measured here.",
    "Loss on held-out text of a domain is not how well an expert follows instructions or answers questions.",
)


@dataclass(frozen=True)
class Advice:
    """Everything that was found. `recipe` is the advised one as plain data; None when nothing is left to mix."""

    asked: Recipe
    root: Path
    drift: Drift
    usable: Sequence[int]
    measured: Measured
    findings: Sequence[Finding]
    facts: Facts | None
    choices: Sequence[Choice]
    recipe: dict[str, Any] | None
    plan: Mapping[str, Any] | None

    @property
    def limits(self) -> tuple[str, ...]:
        """What advice cannot know."""
        return LIMITS

    def name(self, index: int) -> str:
        """The expert of an index; the base for BASE_INDEX."""
        return self.asked.names[index] if index >= 0 else BASE

    def shares(self, index: int) -> dict[str, Figure] | None:
        """Part -> share of the expert's gain; None without text or without a gain."""
        gains = self.measured.gains
        if gains is None or index not in gains.parts or not has_gain(gains.gain(index, index)):
            return None
        return {part: gains.share(index, losses) for part, losses in gains.parts[index].items()}

    def as_data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "format": FORMAT,
            "base_model": self.asked.base_model,
            "drift": {self.name(index): _drift_data(self.drift, index) for index in self.usable},
            "similarity": {
                "experts": [self.name(index) for index in self.usable],
                "cosine": [[self.drift.cosine(i, j) for j in self.usable] for i in self.usable],
                "distance": [[self.drift.distance(i, j) for j in self.usable] for i in self.usable],
            },
            "text": {self.name(index): dict(record) for index, record in self.measured.texts.items()},
            "losses": self._losses(),
            "gain": {self.name(index): data for index in self.usable if (data := self._gain(index)) is not None},
            "words": self._confusion(),
            "findings": [asdict(finding) for finding in self.findings],
            "facts": asdict(self.facts) if self.facts is not None else None,
            "advice": [{**asdict(choice), "mixture": dict(choice.mixture)} for choice in self.choices],
            "recipe": self.recipe,
            "plan": self.plan,
            "limits": list(LIMITS),
        }

    def _losses(self) -> dict[str, dict[str, float]]:
        gains = self.measured.gains
        whole = gains.whole if gains is not None else {}
        return {
            self.name(model): {self.name(domain): losses.mean for domain, losses in row.items()} for model, row in whole.items()
        }

    def _gain(self, index: int) -> dict[str, Any] | None:
        gains = self.measured.gains
        if gains is None or index not in gains.parts:
            return None
        shares = self.shares(index)
        parts: dict[str, dict[str, Any]] = {
            part: {"loss": losses.mean, "share": None if shares is None else asdict(shares[part])}
            for part, losses in gains.parts[index].items()
        }
        if index in gains.on_average:
            losses = gains.on_average[index]
            share = None if shares is None else asdict(gains.share(index, losses))
            parts["ffn on the average"] = {"loss": losses.mean, "share": share}
        return {"nats": asdict(gains.gain(index, index)), "parts": parts}

    def _confusion(self) -> dict[str, Any] | None:
        confusion = self.measured.confusion
        if confusion is None:
            return None
        return {
            "domains": [self.name(index) for index in confusion.domains],
            "named": confusion.named.tolist(),
            "told_apart": confusion.told_apart,
        }


def _drift_data(drift: Drift, index: int) -> dict[str, Any]:
    groups = {group: {"relative": drift.relative(index, group), "share": drift.share(index, group)} for group in drift.groups}
    return {"relative": drift.total(index), "groups": groups}
