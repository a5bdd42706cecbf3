"""How a router can be set: `FITS` has a row for every fit, of what it reads, how its routers score and when they decide.

Code asks the row and never the name, so that a new fit is a row here and a function in routing/fit.py. This room stands
below torch and knows no function.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Scope = Literal["layer", "model", "projection", "feature"]
"""What shares a router."""


ScoreKind = Literal["linear", "norm", "cosine", "lexical"]
"""What a router makes of its input and gate; see architecture/modekit_router.py."""


MOST_TOKENS = 2**20
"""Tokens of a domain that a table of evidence is made from: more hardly change it."""


AUTO = "auto"
"""In place of a name: recipes/choices.py chooses."""


@dataclass(frozen=True)
class Fit:
    """All of a fit.

    Attributes:
        name: as `mixture.router.fit` says it.
        about: one sentence for the recipe's schema.
        reads: recipe: nothing else; changes: the experts' low-rank changes; tokens: ids of text, no model is run, and one
            router decides for the whole model, before its first layer runs, anew with every token; router inputs: what
            routers read while a text runs through its own expert.
        sample: whether the kept sample of router inputs is all that it is made from.
        score: how routers score experts, as the architecture's config says it.
        native_as: how native architectures say it: as their router's gate, or as that of a router that reads channels which
            the checkpoint has besides the base's (planning/channels.py); None: not at all.
        fading: the decay, unless a recipe says another, of evidence over a text; None: there is none.
        settings: of a router or an expert, those that this fit takes and some other does not.
    """

    name: str
    about: str
    reads: Literal["recipe", "changes", "tokens", "router inputs"]
    settings: tuple[str, ...] = ()
    sample: bool = False
    score: ScoreKind = "linear"
    native_as: Literal["gate", "channels"] | None = None
    fading: float | None = None

    @property
    def is_open(self) -> bool:
        """Whether it stands for the best one, which is yet to be chosen."""
        return self.name == AUTO

    @property
    def reads_text(self) -> bool:
        """Whether every domain must have text, of which statistics are kept."""
        return self.reads in {"tokens", "router inputs"}

    @property
    def reads_ids(self) -> bool:
        """Whether token ids are all that it and its router read."""
        return self.reads == "tokens"

    @property
    def runs_models(self) -> bool:
        """Whether text runs through the models, and a sum and a sample of what routers read there are kept."""
        return self.reads == "router inputs"

    @property
    def carried(self) -> bool:
        """Whether what a native router reads is carried to it in channels."""
        return self.native_as == "channels"


_OF_SUMS = ("temperature", "tokens_per_domain", "sequence_length", "keep_tokens", "compute_dtype", "jitter", "chat")


_REGULAR = (*_OF_SUMS, "l2")


_SCORED = ("temperature", "jitter")


_EVIDENCE = ("temperature", "sequence_length", "buckets", "chat", "seed", "orders")


def _of_inputs(name: str, about: str, settings: tuple[str, ...], score: ScoreKind = "linear") -> Fit:
    return Fit(
        name, about, "router inputs", settings, sample=True, score=score, native_as="gate" if score == "linear" else None
    )


_ROWS = (
    Fit("random", "the paper's noisy router", "recipe", (*_SCORED, "seed"), native_as="gate"),
    replace(
        _of_inputs("centroid", "the mean of what a router reads in a domain", (*_OF_SUMS, "negative_prompts")), sample=False
    ),
    _of_inputs("logistic", "logistic regression on kept tokens", _REGULAR),
    _of_inputs(
        "cosine", "the cosine of a low-dimensional projection with a vector per expert", (*_REGULAR, "dimensions"), "cosine"
    ),
    Fit(
        "lexical",
        "a table of how much every token favours each domain, averaged over the text so far",
        "tokens",
        _EVIDENCE,
        score="lexical",
        native_as="channels",
        fading=0.98,
    ),
    Fit("arrow", "the direction that an adapter amplifies most, without text", "changes", _SCORED, score="norm"),
)


FITS: dict[str, Fit] = {row.name: row for row in _ROWS}
"""Name -> row."""


OPEN = replace(FITS["logistic"], name=AUTO, about="the best for the recipe's text and format")


def fits_with(setting: str) -> list[str]:
    """Names of the fits that take a setting of a router or an expert; none when all do."""
    return [row.name for row in FITS.values() if setting in row.settings]


def row_of(fit: str) -> Fit:
    """The row of a fit; for `auto`, that of what fixed weights once said."""
    return FITS.get(fit, OPEN)
