"""The rules: what was measured -> what experts have of their own, on which backbone. The router is `fit: auto`'s to choose.

The first row that applies. It says why, with the numbers of the case, and which measurement of this repository it rests on.
Those were made with small models: a rule says where to start, `modekit eval` says what came of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pydantic import JsonValue

from modekit.search.advise.result import Facts, Recommendation

NEARLY_ALL = 0.95
"""Share of an expert's gain from which on leaving the rest behind is not worth its cost."""


@dataclass(frozen=True)
class Rule:
    """A row: when it applies, the keys of `mixture` it sets, why (filled with numbers), and what that rests on."""

    applies: Callable[[Facts], bool]
    mixture: Mapping[str, JsonValue]
    why: Callable[[Facts], str]
    source: str


def choose(facts: Facts) -> Recommendation:
    """What experts have of their own and on which backbone; fixed weights where only some have text for a router."""
    rule = next(rule for rule in EXPERTS if rule.applies(facts))
    if facts.text != "some":
        return Recommendation(rule.mixture, rule.why(facts), rule.source)
    why = f"{rule.why(facts)}; fixed weights, as not every expert has text that a router can be fitted on"
    return Recommendation({"method": "linear", **rule.mixture}, why, rule.source)


def carries(facts: Facts, part: str) -> bool:
    """Whether a part alone is known to hold nearly all of every expert's gain."""
    if part == "ffn" and not facts.outside_ffn:
        return True
    return facts.shares is not None and facts.shares[part] >= NEARLY_ALL


def _average_is_better(facts: Facts) -> bool:
    """Whether FFN experts do better on the average backbone; where nothing was measured, as on the demo."""
    return facts.backbones["average"] > facts.backbones["base"] if facts.backbones else facts.outside_ffn


def _shares(facts: Facts) -> str:
    if not facts.outside_ffn:
        return "nothing but the FFN differs from the base"
    if facts.shares is None:
        return "where the gain sits is not known"
    parts = ", ".join(f"{part} {facts.shares[part]:.2f}" for part in ("ffn", "ffn + attention"))
    return f"put into the base alone, {parts} of the gain (of the expert that keeps least)"


def _backbones(facts: Facts) -> str:
    if facts.backbones is None:
        return "where the gain sits was not measured, and the experts differ from the base outside the FFN"
    return (
        f"FFN experts carry {facts.backbones['base']:.2f} of the gain on the base's backbone and "
        f"{facts.backbones['average']:.2f} on the experts' average: no router can pass that, but `modekit train --what routers "
        "--what attention --what embeddings --what head --what norms` lets the backbone learn the rest"
    )


def carries_adapters(facts: Facts) -> bool:
    """Whether a native mixture has a lexical router, which carries adapters whole."""
    return facts.native and facts.low_rank and facts.text == "all" and facts.lexical_fits


EXPERTS: tuple[Rule, ...] = (
    Rule(
        carries_adapters,
        {"backbone": "base"},
        lambda facts: "adapters whole, attention included, in a plain checkpoint with a lexical router",
        "benchmarks/whole.md: 0.92 of the gap, 0.93 in the modekit architecture, 0.66 with FFNs alone (adapters, top-1)",
    ),
    Rule(
        lambda facts: facts.native and carries(facts, "ffn"),
        {"backbone": "base"},
        lambda facts: f"FFN experts on the base's backbone: {_shares(facts)}",
        "benchmarks/demo.md: experts trained in their FFN alone lose nothing on the base's backbone (oracle 1.00)",
    ),
    Rule(
        lambda facts: facts.native and _average_is_better(facts),
        {"backbone": "average"},
        lambda facts: f"FFN experts are all that a native mixture has; {_backbones(facts)}",
        "benchmarks/demo.md: full fine-tunes 0.56 on the average, 0.44 on the base; folded adapters 0.76 and 0.69 (oracle). "
        "benchmarks/training.md: with training 0.54 native, 0.87 with distillation and an n-gram router",
    ),
    Rule(
        lambda facts: facts.native,
        {"backbone": "base"},
        lambda facts: f"FFN experts are all that a native mixture has; {_backbones(facts)}",
        "measured here, on the base with each expert's FFN",
    ),
    Rule(
        lambda facts: facts.low_rank and (facts.shares is None or carries(facts, "ffn + attention")),
        {"modules": "auto"},
        lambda facts: "adapters stay low-rank, with all that they change in linear layers: a few per cent of the base each",
        "benchmarks/demo.md: low-rank oracle 1.00, folded into FFN experts 0.69 to 0.76",
    ),
    Rule(
        lambda facts: carries(facts, "ffn"),
        {"modules": "auto"},
        lambda facts: f"the FFN as experts: {_shares(facts)}",
        "benchmarks/demo.md: FFN specialists, oracle 1.00; with --native they open in other tools, with a token router (0.88). "
        "benchmarks/training.md: training routers and attention afterwards, 1.12",
    ),
    Rule(
        lambda facts: facts.text == "all",
        {"modules": "all"},
        lambda facts: f"whole models as experts, which leave nothing behind: {_shares(facts)}",
        "benchmarks/training.md: whole models 0.99, FFN experts on the average 0.54, with attention 0.61 (full fine-tunes)",
    ),
    Rule(
        lambda facts: True,
        {"backbone": "average"},
        lambda facts: (
            "the experts' average as backbone: more moved than what experts have of their own, and without text for every "
            "domain no router can choose between whole models"
        ),
        "benchmarks/training.md: linear mixture of full fine-tunes 0.275 on the average, 0.141 on the base",
    ),
)
