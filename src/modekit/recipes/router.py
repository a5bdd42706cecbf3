"""The router's settings, and how it can be set: `FITS` has a row for every fit, of what it reads, how its routers score and
when they decide.

Code asks the row and never the name, so that a new fit is a row here and a function in routing/fit.py. This room stands
below torch and knows no function.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from modekit.recipes.strict import RecipeData, RecipePart, Strict, checked, did_you_mean

Scope = Literal["layer", "model", "projection", "feature"]
"""What shares a router."""
ScoreKind = Literal["linear", "norm", "cosine", "attention", "lexical"]
"""What a router makes of its input and gate; see architecture/modekit_router.py."""
MOST_TOKENS = 2**20
"""Tokens of a domain that a table of evidence is made from: more hardly change it."""
AUTO = "auto"
"""In place of a name: recipes/edit.py chooses."""


@dataclass(frozen=True)
class Fit:
    """All of a fit.

    Attributes:
        name: as `mixture.router.fit` says it.
        about: one sentence for the recipe's schema.
        reads: recipe: nothing else; ids: nothing else, and routers read token ids; changes: the experts' low-rank changes;
            tokens: ids of text, no model is run; router inputs: what routers read while a text runs through its own expert.
        sample: whether the kept sample of router inputs is all that it is made from.
        score: how routers score experts, as the architecture's config says it.
        rows: of the gate for an expert.
        native_as: how native architectures say it: as their router's gate, or as that of a router that reads channels which
            the checkpoint has besides the base's (planning/channels.py); None: not at all.
        for_model: whether one router decides for the whole model, before its first layer runs, anew with every token; else
            every router for itself, as `granularity` and `per` say.
        fading: the decay, unless a recipe says another, of evidence over a text; None: there is none.
        settings: of a router or an expert, those that this fit takes and some other does not.
    """

    name: str
    about: str
    reads: Literal["recipe", "ids", "changes", "tokens", "router inputs"]
    settings: tuple[str, ...] = ()
    sample: bool = False
    score: ScoreKind = "linear"
    rows: int = 1
    native_as: Literal["gate", "channels"] | None = None
    for_model: bool = False
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
        """Whether token ids are all that it reads, if anything, and its routers."""
        return self.reads in {"tokens", "ids"}

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
_OF_ATTENTION = (*_OF_SUMS[1:], "l2")
"""Without a temperature, which a product of query and key would take twice."""
_SCORED = ("temperature", "jitter")
_EVIDENCE = ("temperature", "sequence_length", "buckets", "chat", "seed", "orders")


def _of_inputs(name: str, about: str, settings: tuple[str, ...], score: ScoreKind = "linear") -> Fit:
    return Fit(
        name, about, "router inputs", settings, sample=True, score=score, native_as="gate" if score == "linear" else None
    )


_ROWS = (
    Fit("random", "the paper's noisy router", "recipe", (*_SCORED, "seed"), native_as="gate"),
    Fit(
        "hash",
        "every token has its expert, by a hash of its id, without text",
        "ids",
        ("seed",),
        score="lexical",
        for_model=True,
    ),
    replace(
        _of_inputs("centroid", "the mean of what a router reads in a domain", (*_OF_SUMS, "negative_prompts")), sample=False
    ),
    _of_inputs("logistic", "logistic regression on kept tokens", _REGULAR),
    _of_inputs(
        "cosine", "the cosine of a low-dimensional projection with a vector per expert", (*_REGULAR, "dimensions"), "cosine"
    ),
    replace(_of_inputs("attention", "attention between the experts", _OF_ATTENTION, "attention"), rows=3),  # query, key, value
    Fit(
        "lexical",
        "a table of how much every token favours each domain, averaged over the text so far",
        "tokens",
        _EVIDENCE,
        score="lexical",
        native_as="channels",
        for_model=True,
        fading=0.98,
    ),
    Fit("arrow", "the direction that an adapter amplifies most, without text", "changes", _SCORED, score="norm"),
)
FITS: dict[str, Fit] = {row.name: row for row in _ROWS}
"""Name -> row."""
_OPEN = replace(FITS["logistic"], name=AUTO, about="the best for the recipe's text and format")


def fits_with(setting: str) -> list[str]:
    """Names of the fits that take a setting of a router or an expert; none when all do."""
    return [row.name for row in FITS.values() if setting in row.settings]


def row_of(fit: str) -> Fit:
    """The row of a fit; for `auto`, that of what fixed weights once said."""
    return FITS.get(fit, _OPEN)


def known_fit(value: str) -> str:
    """The value, when it names a fit or is `auto`. Raises ValueError."""
    if value not in (known := (AUTO, *FITS)):
        raise ValueError(f"must be one of {', '.join(map(repr, known))}; {did_you_mean(value, known)}".rstrip("; "))
    return value


def say_fits(schema: RecipeData) -> None:
    """Put the names of the fits, and what each is, into the JSON schema of a key."""
    rows = (_OPEN, *FITS.values())
    schema["enum"] = [row.name for row in rows]
    schema["description"] = "How the gate is set. " + "; ".join(f"{row.name}: {row.about}" for row in rows) + "."


FitName = Annotated[str, AfterValidator(known_fit)]
CONTEXT_DECAYS = (0.9,)
"""One average: several side by side fit what they were fitted on better, and other text worse (benchmarks/routers.md)."""
CHAT_DECAY = 0.91  # of evidence, where a router is fitted on chats (benchmarks/chat.md)
PREFIX = 64
"""Tokens after which a decision stays, unless a recipe says another number."""


class Router(Strict):
    """How the router is set. Defaults are the best of benchmarks/router_fits.md."""

    later: ClassVar[tuple[str, ...]] = ("orders", "chat", "dimensions")

    fit: FitName = Field(AUTO, json_schema_extra=say_fits)
    tokens_per_domain: int = Field(16_384, ge=16, description="Tokens of each domain that the fit reads.")
    sequence_length: int = Field(512, ge=8, description="Longest piece of a document, in tokens.")
    temperature: float = Field(1.0, gt=0, description="Divides the router's logits; folded into the gate.")
    l2: float = Field(1e-3, ge=0, description="Regularisation, relative to the mean square of the router's input.")
    compute_dtype: Literal["float32", "bfloat16"] = Field("float32", description="Precision of the forward passes of the fit.")
    keep_tokens: int = Field(8_192, ge=0, description="Router inputs kept per domain and layer, for later re-fits.")
    seed: int = Field(0, ge=0, description="Seed of a random or hash router, of training one, and of text that experts write.")
    granularity: Literal["token", "context", "sequence"] = Field(
        "token",
        description="What the gate reads: the token, a causal average of the text so far, or the first tokens.",
    )
    decay: list[Annotated[float, Field(ge=0, le=1)]] | None = Field(
        None,
        min_length=1,
        max_length=256,
        description="Decays of averages; 1: the mean so far, 0: the token. Lexical: default 0.91 with chats, else 0.98.",
    )
    prefix: int | None = Field(None, ge=1, description="Sequence: tokens after which the decision stays (default 64).")
    dimensions: int | None = Field(
        None, ge=2, description="Cosine: dimensions that what the router reads is projected to (default: one per expert)."
    )
    per: Scope = Field(
        "layer", description="One router for attention and one for the FFN of each layer, one for the model, ..."
    )
    jitter: float = Field(0.0, ge=0, lt=1, description="Random scaling of what the gate reads, in training only.")
    noise: float = Field(0.0, ge=0, description="Random addition to the logits, in training only.")
    buckets: int = Field(2**18, ge=2, le=2**24, description="Lexical: rows of a table that n-grams are hashed into.")
    orders: list[Annotated[int, Field(ge=1, le=4)]] | None = Field(
        None,
        min_length=1,
        max_length=4,
        description="Lexical: n-grams that have a table each; [1], the tokens alone, is what native architectures carry.",
    )
    chat: bool | None = Field(
        None,
        description="Fit inside the chat template, too, on short questions cut from the text; default: if the base has one.",
    )

    @model_validator(mode="after")
    def _no_dead_setting(self) -> Router:
        fields = type(self).model_fields.items()
        given = {key: getattr(self, key) for key, field in fields if getattr(self, key) != field.default}
        return checked(self, [*dict.fromkeys(why for _, why in without_effect(given, self.row))])

    @property
    def row(self) -> Fit:
        """All that is known of the fit."""
        return row_of(self.fit)

    def gate_width(self, vocabulary: int) -> int | None:
        """Width of the gate, when a setting or the vocabulary says it; None: as wide as what the router reads."""
        if not self.row.reads_ids:
            return None
        return self.buckets if self.hashes else vocabulary

    @property
    def hashes(self) -> bool:
        """Whether a lexical router has tables of more than the tokens alone, whose rows are hashed."""
        return self.orders not in (None, [1])

    @property
    def prefix_tokens(self) -> int | None:
        """Tokens after which the decision stays; None when it never does."""
        return (self.prefix or PREFIX) if self.granularity == "sequence" else None

    @property
    def scope(self) -> Scope:
        """What shares a router: as `per` says, the model where one decision is all there can be."""
        return "model" if self.row.for_model else self.per

    @property
    def decays(self) -> list[float]:
        """Of evidence that fades; none for a fit without any."""
        return [] if self.row.fading is None else self.decay or [self.row.fading]

    @property
    def averages(self) -> list[dict[str, float | None]]:
        """What the gate's parts read, as the architecture's config says it; see architecture/modekit_router.py."""
        if self.row.fading is not None:
            return [{"decay": decay} for _ in self.orders or [1] for decay in self.decays]
        if self.granularity == "sequence":
            return [{"decay": 1.0}]
        if self.granularity == "token":
            return [{"decay": None}]
        return [{"decay": decay or None} for decay in self.decay or CONTEXT_DECAYS]


def without_effect(router: RecipePart, row: Fit) -> Iterator[tuple[str, str]]:
    """Of the settings that a router has, those without an effect under its fit, or against it; and what is wrong with each."""
    if row.is_open:
        return
    granularity = router.get("granularity", "token")
    if row.reads_ids and "granularity" in router:
        yield "granularity", f"fit '{row.name}' reads token ids by itself: 'granularity' has no effect; remove it"
        granularity = "token"
    for key, reads_it in (("decay", "context"), ("prefix", "sequence")):
        if key in router and granularity != reads_it and not (key == "decay" and row.fading is not None):
            yield key, f"'{key}' has no effect without granularity: {reads_it}; remove it"
    if row.score != "linear" and not row.for_model and router.get("per") == "feature":
        yield "per", f"fit '{row.name}' makes one decision per module, not one per output feature; choose another"
    if row.for_model and router.get("per", "model") != "model":
        yield "per", f"fit '{row.name}' makes one decision for the whole model; remove 'per', or write per: model"
    if row.sample and router.get("keep_tokens") == 0:
        yield "keep_tokens", f"the {row.name} fit is solved on kept tokens: keep_tokens must be at least 1, or choose centroid"
    for key, fits in ((key, fits_with(key)) for key in router):
        if fits and key not in row.settings:
            yield key, f"'{key}' has no effect with fit: {row.name} (only with {', '.join(fits)}); remove it"
