"""The rules: what was measured -> what experts have of their own, the backbone, the architecture, the router.

Two tables, of each the first row that applies. Every row says why, with the numbers of the case, and which measurement of this
repository it rests on. Those were made with small models: a rule says where to start, `modekit eval` says what came of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

NEARLY_ALL = 0.95
"""Share of an expert's gain from which on leaving the rest behind is not worth its cost."""
TOLD_APART = 0.9
"""Share of tokens whose domain an n-gram table must name to be the router; on the demo it names 0.97 and closes 0.98."""
FIT_TOKENS = 65_536
"""More text than the default: 0.878 against 0.850 (token), 0.902 against 0.856 (context); benchmarks/routers.md."""


@dataclass(frozen=True)
class Facts:
    """What the rules look at.

    Attributes:
        native: the result must open in an architecture that other tools know.
        experts: how many there are to mix.
        low_rank: every expert that is not the base is an adapter (or kept as one).
        outside_ffn: whether any expert differs from the base outside the FFN; known from the files.
        named_parts: whether all that moved in attention are parts that a recipe can name (q, k, v, o).
        shares: part -> smallest share of any expert's gain that it carries; None without text, or without a gain.
        backbones: base and average -> mean share of the gain that FFN experts carry on it; None when not measured.
        fit_text: every expert has text or prompts for a fit.
        told_apart: share of held-out tokens whose domain an n-gram table names; None when it is not known.
        carried: whether a native architecture carries a lexical router for this base and so many experts.
    """

    native: bool
    experts: int
    low_rank: bool
    outside_ffn: bool
    named_parts: bool
    shares: Mapping[str, float] | None
    backbones: Mapping[str, float] | None
    fit_text: bool
    told_apart: float | None
    carried: bool = True

    def carries(self, part: str) -> bool:
        """Whether a part alone is known to hold nearly all of every expert's gain."""
        if part == "ffn" and not self.outside_ffn:
            return True
        return self.shares is not None and self.shares[part] >= NEARLY_ALL

    @property
    def average_is_better(self) -> bool:
        """Whether FFN experts do better on the average backbone; where nothing was measured, as on the demo."""
        return self.backbones["average"] > self.backbones["base"] if self.backbones else self.outside_ffn


@dataclass(frozen=True)
class Rule:
    """A row: when it applies, the keys of `mixture` it sets, why (filled with numbers), and what that rests on.

    A row of ROUTERS with `modules` is for mixtures that have these.
    """

    applies: Callable[[Facts], bool]
    mixture: Mapping[str, Any]
    why: Callable[[Facts], str]
    source: str
    modules: str | None = None


def _carried(facts: Facts, *parts: str) -> str:
    """How much parts carry, in words."""
    if parts == ("ffn",) and not facts.outside_ffn:
        return "nothing but the FFN differs from the base"
    if facts.shares is None:
        return "where the gain sits is not known"
    first, *rest = (f"{part} {facts.shares[part]:.2f}" for part in parts)
    return f"put into the base alone, {', '.join([first, *rest])} of the gain (of the expert that keeps least)"


def _backbones(facts: Facts) -> str:
    if facts.backbones is None:
        return "where the gain sits was not measured, and the experts differ from the base outside the FFN"
    return (
        f"FFN experts carry {facts.backbones['base']:.2f} of the gain on the base's backbone and "
        f"{facts.backbones['average']:.2f} on the experts' average: no router can pass that, but `modekit train --what routers "
        "--what attention --what embeddings --what head --what norms` lets the backbone learn the rest"
    )


EXPERTS: tuple[Rule, ...] = (
    Rule(
        lambda facts: facts.native and facts.carries("ffn"),
        {"backbone": "base"},
        lambda facts: f"FFN experts on the base's backbone: {_carried(facts, 'ffn')}",
        "benchmarks/demo.md: experts trained in their FFN alone lose nothing on the base's backbone (oracle 1.00)",
    ),
    Rule(
        lambda facts: facts.native and facts.average_is_better,
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
        lambda facts: facts.low_rank and (facts.shares is None or facts.carries("ffn + attention")),
        {"modules": "auto"},
        lambda facts: "adapters stay low-rank, with all that they change in linear layers: a few per cent of the base each",
        "benchmarks/demo.md: low-rank oracle 1.00, folded into FFN experts 0.69 to 0.76",
    ),
    Rule(
        lambda facts: facts.carries("ffn"),
        {"modules": "auto"},
        lambda facts: f"the FFN as experts: {_carried(facts, 'ffn')}",
        "benchmarks/demo.md: FFN specialists, oracle 1.00; with --native they open in other tools, with a token router (0.88). "
        "benchmarks/training.md: training routers and attention afterwards, 1.12",
    ),
    Rule(
        lambda facts: facts.named_parts and facts.carries("ffn + attention"),
        {"modules": ["q", "k", "v", "o", "mlp"]},
        lambda facts: f"attention and FFN as experts: {_carried(facts, 'ffn', 'ffn + attention')}",
        "measured here; benchmarks/training.md has a case where it does not suffice (0.61)",
    ),
    Rule(
        lambda facts: facts.shares is not None and facts.fit_text,
        {"modules": "all"},
        lambda facts: f"whole models as experts: {_carried(facts, 'ffn', 'ffn + attention')}",
        "benchmarks/training.md: whole models 0.99, FFN experts on the average 0.54, with attention 0.61 (full fine-tunes)",
    ),
    Rule(
        lambda facts: facts.fit_text,
        {"modules": "all"},
        lambda facts: "whole models as experts: where the gain sits is not known, and so nothing is left behind",
        "benchmarks/training.md: whole models 0.99",
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

ROUTERS: tuple[Rule, ...] = (
    Rule(
        lambda facts: not facts.fit_text and facts.low_rank and not facts.native,
        {"method": "routing", "router": {"fit": "seqr", "granularity": "context"}},
        lambda facts: "without text for every domain, a router that looks at the adapters alone",
        "benchmarks/routers.md: seqr with context 0.63, arrow 0.53, random 0.28 (adapters)",
    ),
    Rule(
        lambda facts: not facts.fit_text,
        {"method": "linear"},
        lambda facts: "without text for every domain no router can be fitted: every expert counts the same",
        "benchmarks/demo.md: uniform 0.37, random router 0.30, fitted from text 0.88 to 0.98",
    ),
    Rule(
        lambda facts: facts.native and facts.carried and facts.told_apart is not None and facts.told_apart >= TOLD_APART,
        {"method": "routing", "router": {"fit": "lexical"}},
        lambda facts: f"{_differ(facts)}, and a plain checkpoint carries a table of what every token says",
        "benchmarks/demo.md: lexical router in Mixtral 0.97, logistic gate on hidden states 0.88",
    ),
    Rule(
        lambda facts: facts.native,
        {"method": "routing", "router": {"fit": "logistic", "tokens_per_domain": FIT_TOKENS}},
        lambda facts: "a linear gate per layer on the token, which is what native architectures have",
        "benchmarks/demo.md: logistic 0.88, ridge 0.87, random 0.30",
    ),
    Rule(
        lambda facts: not facts.low_rank and facts.carried and facts.told_apart is not None and facts.told_apart >= TOLD_APART,
        {"method": "routing", "router": {"fit": "lexical"}},
        lambda facts: f"{_differ(facts)}, and of whole FFNs a checkpoint is made that every engine opens",
        "benchmarks/demo.md: lexical router in Mixtral 0.972, n-gram router in the modekit architecture 0.975",
        modules="auto",
    ),
    Rule(
        lambda facts: facts.told_apart is not None and facts.told_apart >= TOLD_APART,
        {"method": "routing", "router": {"fit": "ngram"}},
        lambda facts: _differ(facts),
        "benchmarks/training.md: n-gram 0.979, context 0.90, token 0.88 (FFN specialists), 0.99 (whole models); "
        "benchmarks/advise.md: 0.95, context 0.84 (adapters)",
    ),
    Rule(
        lambda facts: True,
        {
            "method": "routing",
            "router": {"fit": "logistic", "granularity": "sequence", "per": "model", "tokens_per_domain": FIT_TOKENS},
        },
        lambda facts: f"{_unsure(facts)}, so that hidden states decide, once per sequence as whole models need",
        "benchmarks/demo.md: whole models, one decision per sequence 0.84",
        modules="all",
    ),
    Rule(
        lambda facts: True,
        {"method": "routing", "router": {"fit": "logistic", "granularity": "context", "tokens_per_domain": FIT_TOKENS}},
        lambda facts: f"{_unsure(facts)}, so that hidden states decide, averaged over the text so far",
        "benchmarks/routers.md: context 0.90, token 0.88 (FFN specialists); 0.84 and 0.74 (adapters)",
    ),
)


def _differ(facts: Facts) -> str:
    return f"the domains differ in their words: n-grams name the domain of {facts.told_apart:.2f} of the held-out tokens"


def _unsure(facts: Facts) -> str:
    if facts.told_apart is None:
        return "whether the domains differ in their words is not known"
    return f"n-grams name the domain of only {facts.told_apart:.2f} of the held-out tokens"


@dataclass(frozen=True)
class Choice:
    """What a rule came to: the keys it sets, why, and what that rests on."""

    mixture: Mapping[str, Any]
    why: str
    source: str


def choose(facts: Facts) -> tuple[Choice, Choice]:
    """What experts have of their own and on which backbone, and how the router is set."""
    experts = next(rule for rule in EXPERTS if rule.applies(facts))
    modules = (None, experts.mixture.get("modules"))
    router = next(rule for rule in ROUTERS if rule.modules in modules and rule.applies(facts))
    of_experts, of_router = (Choice(rule.mixture, rule.why(facts), rule.source) for rule in (experts, router))
    if facts.experts < 2 and of_router.mixture["method"] == "routing":
        note = "; with a single expert it has nothing to decide"
        of_router = Choice(of_router.mixture, of_router.why + note, of_router.source)
    return of_experts, of_router
