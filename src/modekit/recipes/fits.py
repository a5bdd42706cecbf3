"""How a router can be set: `FITS` describes every fit by what it reads, how its routers score and when they decide.

Code asks these three parts and never the name, so that a new fit is a row here and a function in routing/fit.py. This room
stands below torch and knows no function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Annotated, Literal

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

from modekit.errors import RecipeError
from modekit.recipes.strict import RecipeData

Scope = Literal["layer", "model", "projection", "feature"]
"""What shares a router."""
ScoreKind = Literal["linear", "norm", "cosine", "attention", "lexical", "tfidf"]
"""What a router makes of its input and gate; see architecture/modekit_router.py."""
MOST_TOKENS = 2**20
"""Tokens of a domain that a table of evidence is made from: more hardly change it."""


@dataclass(frozen=True)
class KeptStatistics:
    """A kind of statistics that a fit keeps of every domain.

    Attributes:
        shared: whether processes can share the text, because what each of them found adds up.
        nbytes: gate width, kept tokens and whether it is in memory -> bytes of one domain for one router.
        memory: bytes of all statistics in memory, and of the model and its activations -> peak bytes of a fit.
        per_router: whether every router has its own; else they are of the text alone.
    """

    shared: bool
    nbytes: Callable[[int, int, bool], int]
    memory: Callable[[int, int], int]
    per_router: bool = True


_SUMS = KeptStatistics(  # sum, mean of negatives, and kept inputs in float16
    shared=True,
    nbytes=lambda width, tokens, _in_memory: width * (16 + 2 * tokens),
    memory=lambda statistics, model: model + statistics,
)
_TOKEN_IDS = KeptStatistics(
    shared=False,
    nbytes=lambda _width, _tokens, _in_memory: 4 * MOST_TOKENS,
    memory=lambda kept, model: model + 4 * kept,
    per_router=False,
)


@dataclass(frozen=True)
class FitInput:
    """What a fit is made from.

    Attributes:
        kind: recipe: nothing else; ids: nothing else, and routers read token ids; changes: the experts' low-rank changes;
            tokens: ids of text, no model is run; router inputs: what routers read while a text runs through its own expert.
        keeps: the statistics that it keeps of every domain, or None.
        sample: whether the kept sample of router inputs is all that it is made from.
    """

    kind: Literal["recipe", "ids", "changes", "tokens", "router inputs"]
    keeps: KeptStatistics | None = None
    sample: bool = False

    @property
    def text(self) -> bool:
        """Whether every domain must have text."""
        return self.kind not in {"recipe", "ids", "changes"}

    @property
    def tokens(self) -> bool:
        """Whether token ids are all that it reads, if anything, and its routers."""
        return self.kind in {"tokens", "ids"}

    @property
    def hidden(self) -> bool:
        """Whether text runs through the models, and a sum and a sample of what routers read there are kept."""
        return self.kind == "router inputs"

    @property
    def low_rank(self) -> bool:
        """Whether experts must be low-rank changes of the base, which are scored."""
        return self.kind == "changes"


RECIPE = FitInput("recipe")
IDS = FitInput("ids")
CHANGES = FitInput("changes")
ROUTER_INPUTS = FitInput("router inputs", _SUMS)
"""The sum of x, and a sample (routing/statistics.py)."""
SAMPLE = FitInput("router inputs", _SUMS, sample=True)
TOKENS = FitInput("tokens", _TOKEN_IDS)
"""Token ids of the text, at most MOST_TOKENS of a domain (routing/token_text.py)."""


@dataclass(frozen=True)
class FitScore:
    """How a router scores experts.

    Attributes:
        kind: as the architecture's config says it.
        rows: of the gate for an expert.
        by_token: that its table has a row for every token, unless a setting makes n-grams of them.
        besides: columns of the gate besides those that tokens choose, and rows besides the experts'.
        native: how native architectures say it: as their router's gate, or as that of a router that reads channels which
            the checkpoint has besides the base's (planning/channels.py); None: not at all.
    """

    kind: ScoreKind
    rows: int = 1
    by_token: bool = False
    besides: int = 0
    native: Literal["gate", "channels"] | None = None


LINEAR = FitScore("linear", native="gate")
NORM = FitScore("norm")
COSINE = FitScore("cosine")
ATTENTION = FitScore("attention", rows=3)
"""Query, key and value."""
BY_TOKEN = FitScore("lexical", by_token=True)
EVIDENCE_AVERAGE = FitScore("lexical", by_token=True, native="channels")
TFIDF = FitScore("tfidf", by_token=True, besides=1)


@dataclass(frozen=True)
class FitTiming:
    """When a router decides.

    Attributes:
        by: granularity: every router for itself, as `granularity` and `per` say; text: one router for the model, before its
            first layer, anew with every token; prefix: the same, but the decision on the first `prefix` tokens stays.
        fading: the decay, unless a recipe says another, of evidence over a text; None: there is none.
    """

    by: Literal["granularity", "text", "prefix"]
    fading: float | None = None

    @property
    def for_model(self) -> bool:
        """Whether one router decides for the whole model, before its first layer runs."""
        return self.by != "granularity"

    @property
    def once(self) -> bool:
        """Whether the decision is of the first `prefix` tokens and stays, whatever `granularity` says."""
        return self.by == "prefix"


BY_GRANULARITY = FitTiming("granularity")
RUNNING = FitTiming("text", fading=0.98)
BY_TOKENS = FitTiming("text")
ONCE = FitTiming("prefix")


@dataclass(frozen=True)
class Fit:
    """All of a fit.

    Attributes:
        name: as `mixture.router.fit` says it.
        about: one sentence for the recipe's schema.
        reads, score, decides: its three parts.
        settings: of a router or an expert, those that this fit takes and some other does not.
        library: which it is fitted by, besides what modekit always has; not needed afterwards.
        title: what tables call it, when that is another word.
    """

    name: str
    about: str
    reads: FitInput
    score: FitScore = LINEAR
    decides: FitTiming = BY_GRANULARITY
    settings: tuple[str, ...] = ()
    library: str = ""
    title: str = ""

    @property
    def is_open(self) -> bool:
        """Whether it stands for the best one, which is yet to be chosen."""
        return self.name == AUTO

    @property
    def chooses(self) -> bool:
        """Whether the select split of every domain's text is kept, too, and chooses between variants of the router."""
        return self.reads.tokens and "classifier" in self.settings

    @property
    def by_token(self) -> bool:
        """Whether a row of its table says what one token is worth."""
        return self.score.by_token

    @property
    def carried(self) -> bool:
        """Whether what a native router reads is carried to it in channels."""
        return self.score.native == "channels"

    @property
    def native(self) -> bool:
        """Whether native architectures can say it."""
        return self.carried or (self.score.native == "gate" and not self.decides.for_model)

    @property
    def tells_unseen(self) -> bool:
        """Whether it can tell text of no domain on the tokens so far."""
        return self.reads.tokens and self.decides.fading is not None

    @property
    def tells_texts(self) -> bool:
        """Whether it says of a text as a whole, on token ids alone, whose it is."""
        return self.reads.tokens and self.reads.text

    @property
    def label(self) -> str:
        """What a table calls it."""
        return self.title or self.name

    def check_library(self) -> None:
        """Raise RecipeError where the library that it needs is not installed. Imports nothing."""
        if self.library and find_spec(self.library) is None:
            raise RecipeError(
                f"fit: {self.name} is fitted by a library that is not installed",
                where="mixture.router.fit",
                found=f"no {self.library}",
                remedy="pip install 'modekit[classifier]', or choose fit: lexical",
            )


_OF_SUMS = ("temperature", "tokens_per_domain", "sequence_length", "keep_tokens", "compute_dtype", "jitter", "chat")
_REGULAR = (*_OF_SUMS, "l2")
_OF_ATTENTION = (*_OF_SUMS[1:], "l2")
"""Without a temperature, which a product of query and key would take twice."""
_SCORED = ("temperature", "jitter")
_EVIDENCE = ("temperature", "sequence_length", "buckets", "chat", "false_alarms", "seed", "orders")
_ROWS = (
    Fit("random", "the paper's noisy router", RECIPE, settings=(*_SCORED, "seed"), title="noisy"),
    Fit("hash", "every token has its expert, by a hash of its id, without text", IDS, BY_TOKEN, BY_TOKENS, ("seed",)),
    Fit("centroid", "the mean of what a router reads in a domain", ROUTER_INPUTS, settings=(*_OF_SUMS, "negative_prompts")),
    Fit("logistic", "logistic regression on kept tokens", SAMPLE, settings=_REGULAR),
    Fit(
        "cosine",
        "the cosine of a low-dimensional projection with a vector per expert",
        SAMPLE,
        COSINE,
        settings=(*_REGULAR, "dimensions"),
    ),
    Fit("attention", "attention between the experts", SAMPLE, ATTENTION, settings=_OF_ATTENTION),
    Fit(
        "lexical",
        "a table of how much every token favours each domain, averaged over the text so far",
        TOKENS,
        EVIDENCE_AVERAGE,
        RUNNING,
        _EVIDENCE,
    ),
    Fit(
        "classifier",
        "one decision for a text, by a scikit-learn classifier of its first tokens",
        TOKENS,
        TFIDF,
        ONCE,
        ("temperature", "sequence_length", "seed", "classifier", "chat"),
        library="sklearn",
    ),
    Fit("arrow", "the direction that an adapter amplifies most, without text", CHANGES, NORM, settings=_SCORED),
)
FITS: dict[str, Fit] = {row.name: row for row in _ROWS}
"""Name -> row."""
AUTO = "auto"
"""In place of a name: recipes/auto.py chooses."""
_OPEN = replace(FITS["logistic"], name=AUTO, about="the best for the recipe's text and format")


def fits_with(setting: str) -> list[str]:
    """Names of the fits that take a setting of a router or an expert; none when all do."""
    return [row.name for row in FITS.values() if setting in row.settings]


def row_of(fit: str) -> Fit:
    """The row of a fit; for `auto`, that of what fixed weights once said."""
    return FITS.get(fit, _OPEN)


def known_fit(value: object, *besides: str) -> object:
    """The value, when it names a fit, or is one of the words besides. Raises what pydantic reports as a wrong word."""
    if isinstance(value, str) and value in (*besides, *FITS):
        return value
    *names, last = (f"'{name}'" for name in (*besides, *FITS))
    raise PydanticCustomError("literal_error", "Input should be {expected}", {"expected": f"{', '.join(names)} or {last}"})


def say_fits(schema: RecipeData) -> None:
    """Put the names of the fits, and what each is, into the JSON schema of a key."""
    rows = (_OPEN, *FITS.values())
    schema["enum"] = [row.name for row in rows]
    schema["description"] = "How the gate is set. " + "; ".join(f"{row.name}: {row.about}" for row in rows) + "."


FitName = Annotated[str, BeforeValidator(lambda value: known_fit(value, AUTO))]
