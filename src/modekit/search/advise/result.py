"""The result of `modekit advise`: everything that was found, and the recipe that follows. `--json` prints the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, JsonValue

from modekit.errors import ModekitError
from modekit.evaluation.identity import ReadSequences
from modekit.planning.summary import PlanSummary

Level = Literal["error", "warning", "note"]
"""error: the expert cannot be mixed as it is. warning: it can, and something will be lost or wasted. note: good to know."""

Group = Literal["ffn", "attention", "norms", "embeddings", "head"]
"""Where a tensor of the base lies: search/advise/drift.py."""

LIMITS = (
    "The rules rest on models of a few million parameters (benchmarks/advise.md): `modekit eval` scores the mixture.",
    "A share bounds what any router can reach with that part; how close a router comes is not measured here.",
    "Loss on held-out text of a domain is not how well an expert follows instructions or answers questions.",
)


@dataclass(frozen=True)
class Finding:
    """What the user should know before building, and what to do. `about` names the expert, or experts, or `base_model`."""

    level: Level
    about: str
    what: str
    found: str = ""
    to_do: str = ""


def finding_of(error: ModekitError, about: str) -> Finding:
    """What a build would have stopped at, as a finding."""
    found = [] if error.found is None else [f"found {error.found}"]
    found += [] if error.expected is None else [f"expected {error.expected}"]
    where = f" ({error.where})" if error.where else ""
    return Finding("error", about, error.what + where, ", ".join(found), error.remedy or "")


@dataclass(frozen=True)
class Figure:
    """A figure and its standard error; None with a single block of text."""

    value: float
    error: float | None

    def said(self, digits: int) -> str:
        """With so many digits behind the point, and its error where that is known."""
        return f"{self.value:.{digits}f}" + ("" if self.error is None else f" ± {self.error:.{digits}f}")


class GroupDrift(BaseModel, frozen=True):
    """An expert in a group: |difference| / |base| (None where the base is zero), and the share of its squared difference."""

    relative: float | None
    share: float


class ExpertDrift(BaseModel, frozen=True):
    """How far an expert moved from the base: |difference| / |base|, in all and by group."""

    relative: float
    groups: dict[Group, GroupDrift]


class ExpertPairs(BaseModel, frozen=True):
    """Experts' differences from the base, pair by pair: cosine (None without a difference), and distance by the longer one."""

    experts: list[str]
    cosine: list[list[float | None]]
    distance: list[list[float]]


class PartGain(BaseModel, frozen=True):
    """The base with a part of an expert in it: nats per token on the expert's text, share of its gain (None without one)."""

    loss: float
    share: Figure | None


class ExpertGain(BaseModel, frozen=True):
    """What an expert gains on its own text (nats per token), and which of its parts do."""

    nats: Figure
    parts: dict[str, PartGain]


class WordTable(BaseModel, frozen=True):
    """`named[i][j]`: share of domain i's tokens at which n-grams prefer domain j; `accuracy`: mean of the diagonal."""

    domains: list[str]
    named: list[list[float]]
    accuracy: float


@dataclass(frozen=True)
class Facts:
    """What the rules look at.

    Attributes:
        low_rank: every expert that is not the base is an adapter (or kept as one).
        outside_ffn: whether any expert differs from the base outside the FFN; known from the files.
        shares: part -> smallest share of any expert's gain that it carries; None without text, or without a gain.
        backbones: base and average -> mean share of the gain that FFN experts carry on it; None when not measured.
        text: how many experts have text or prompts for a fit of the router.
        lexical_fits: whether a native architecture carries a lexical router for this base and so many experts.
    """

    native: bool
    experts: int
    low_rank: bool
    outside_ffn: bool
    shares: Mapping[str, float] | None
    backbones: Mapping[str, float] | None
    text: Literal["all", "some", "none"]
    lexical_fits: bool = True


@dataclass(frozen=True)
class Recommendation:
    """What a rule came to: the keys of `mixture` it sets, why, and the measurement that rests on."""

    mixture: Mapping[str, JsonValue]
    why: str
    source: str


class WayToRun(BaseModel, frozen=True):
    """A way to run the experts (ways.py): what it is, or why it cannot be had.

    Attributes:
        loss, lost: nats per token on the experts' own text, each chosen there, in all and over their own models; None where
            that was not measured.
        active, total, bytes: parameters that a token passes and all, and bytes of the weights; None where it cannot be had.
    """

    name: str
    said: str
    loss: float | None = None
    lost: float | None = None
    active: int | None = None
    total: int | None = None
    bytes: int | None = None


class Advice(BaseModel, frozen=True):
    """Everything that was found; experts and domains by name.

    Attributes:
        losses: model -> domain -> held-out nats per token; empty without text.
        limits: what advice cannot know.
    """

    format: Literal[3] = 3
    base_model: str
    drift: dict[str, ExpertDrift]
    similarity: ExpertPairs
    text: dict[str, ReadSequences]
    losses: dict[str, dict[str, float]]
    gain: dict[str, ExpertGain]
    words: WordTable | None
    findings: list[Finding]
    facts: Facts | None = None
    advice: tuple[Recommendation, ...] = ()
    recipe: dict[str, JsonValue] | None = None
    plan: PlanSummary | None = None
    ways: tuple[WayToRun, ...] = ()
    limits: tuple[str, ...] = LIMITS
