"""The rules: what was measured -> what experts have of their own, the backbone, the architecture, the router.

Two tables, of each the first row that applies. Every row says why, with the numbers of the case, and which measurement of this
repository it rests on. Those were made with small models: a rule says where to start, `modekit eval` says what came of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from pydantic import JsonValue

from modekit.search.advise.result import Facts, Recommendation

NEARLY_ALL = 0.95
"""Share of an expert's gain from which on leaving the rest behind is not worth its cost."""
WORDS_DIFFER = 0.9
"""Share of tokens whose domain an n-gram table must name to be the router; on the demo it names 0.97 and closes 0.98."""
FIT_TOKENS = 65_536
"""More text than the default: 0.878 against 0.850 (token), 0.902 against 0.856 (context); benchmarks/routers.md."""


@dataclass(frozen=True)
class Rule:
    """A row: when it applies, the keys of `mixture` it sets, why (filled with numbers), and what that rests on.

    `modules`: a row of ROUTERS for mixtures that have these.
    """

    applies: Callable[[Facts], bool]
    mixture: Mapping[str, JsonValue]
    why: Callable[[Facts], str]
    source: str
    modules: str | None = None


def choose(facts: Facts) -> tuple[Recommendation, Recommendation]:
    """What experts have of their own and on which backbone, and how the router is set."""
    experts = next(rule for rule in EXPERTS if rule.applies(facts))
    modules = (None, "auto" if facts.native else experts.mixture.get("modules"))
    router = next(rule for rule in ROUTERS if rule.modules in modules and rule.applies(facts))
    of_experts, of_router = (Recommendation(rule.mixture, rule.why(facts), rule.source) for rule in (experts, router))
    if facts.experts < 2 and of_router.mixture["method"] == "routing":
        of_router = replace(of_router, why=of_router.why + "; with a single expert it has nothing to decide")
    return of_experts, of_router


def carries(facts: Facts, part: str) -> bool:
    """Whether a part alone is known to hold nearly all of every expert's gain."""
    if part == "ffn" and not facts.outside_ffn:
        return True
    return facts.shares is not None and facts.shares[part] >= NEARLY_ALL


def _average_is_better(facts: Facts) -> bool:
    """Whether FFN experts do better on the average backbone; where nothing was measured, as on the demo."""
    return facts.backbones["average"] > facts.backbones["base"] if facts.backbones else facts.outside_ffn


def _words_differ(facts: Facts) -> bool:
    return facts.word_accuracy is not None and facts.word_accuracy >= WORDS_DIFFER


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


def _words(facts: Facts) -> str:
    if facts.word_accuracy is None:
        return "whether the domains differ in their words is not known"
    if _words_differ(facts):
        return f"the domains differ in their words: n-grams name the domain of {facts.word_accuracy:.2f} of the held-out tokens"
    return f"n-grams name the domain of only {facts.word_accuracy:.2f} of the held-out tokens"


def _carries_adapters(facts: Facts) -> bool:
    """Whether a native mixture has a lexical router, which carries adapters whole."""
    return facts.native and facts.low_rank and facts.fit_text and facts.lexical_fits and _words_differ(facts)


EXPERTS: tuple[Rule, ...] = (
    Rule(
        _carries_adapters,
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
        lambda facts: facts.fit_text,
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
        lambda facts: facts.lexical_fits and _words_differ(facts) and (facts.native or not facts.low_rank),
        {"method": "routing", "router": {"fit": "lexical"}},
        lambda facts: f"{_words(facts)}, and a checkpoint of whole FFNs opens in every engine",
        "benchmarks/demo.md: lexical router in Mixtral 0.97, n-gram router in modekit's own architecture 0.98, logistic 0.88",
        modules="auto",
    ),
    Rule(
        lambda facts: facts.native,
        {"method": "routing", "router": {"fit": "logistic", "tokens_per_domain": FIT_TOKENS}},
        lambda facts: "a linear gate per layer on the token, which is what native architectures have",
        "benchmarks/demo.md: logistic 0.88, ridge 0.87, random 0.30",
    ),
    Rule(
        _words_differ,
        {"method": "routing", "router": {"fit": "ngram"}},
        _words,
        "benchmarks/training.md: n-gram 0.979, context 0.90, token 0.88 (FFN specialists), 0.99 (whole models); "
        "benchmarks/advise.md: 0.95, context 0.84 (adapters)",
    ),
    Rule(
        lambda facts: True,
        {
            "method": "routing",
            "router": {"fit": "logistic", "granularity": "sequence", "per": "model", "tokens_per_domain": FIT_TOKENS},
        },
        lambda facts: f"{_words(facts)}, so that hidden states decide, once per sequence as whole models need",
        "benchmarks/demo.md: whole models, one decision per sequence 0.84",
        modules="all",
    ),
    Rule(
        lambda facts: True,
        {"method": "routing", "router": {"fit": "logistic", "granularity": "context", "tokens_per_domain": FIT_TOKENS}},
        lambda facts: f"{_words(facts)}, so that hidden states decide, averaged over the text so far",
        "benchmarks/routers.md: context 0.90, token 0.88 (FFN specialists); 0.84 and 0.74 (adapters)",
    ),
)
