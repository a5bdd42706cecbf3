"""How a router can be set: `FITS` has one row per fit that says all of it.

Whoever has to know something of a fit asks its row, never its name, so that a new fit is a row here and the function that the
row names. This room stands below torch: a row names its functions by import path, and routing/fit.py calls them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

Reads = Literal["nothing", "changes", "tokens", "router inputs", "training"]
"""nothing: the gate follows from the recipe; changes: the experts' low-rank changes; tokens: ids of text, no model is run;
router inputs: what routers read while a text runs through its own expert; training: the gate is trained on text.
"""
Score = Literal["linear", "norm", "standardised", "ngram", "lexical", "tfidf"]
"""What a router makes of its input and gate; see architecture/modekit_router.py."""
Scope = Literal["layer", "model", "projection", "feature"]
"""What shares a router."""


@dataclass(frozen=True)
class Kept:
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


def _sums_bytes(width: int, tokens: int, in_memory: bool) -> int:
    """Sum, mean of negatives, X'X (on disk its triangle in float32) and kept inputs in float16."""
    return width * ((8 * width if in_memory else 2 * (width + 1)) + 16 + 2 * tokens)


def _counts_bytes(width: int, tokens: int, _in_memory: bool) -> int:
    """Counts, and documents on which the temperature is chosen."""
    return 4 * (width + 2 * tokens)


MOST_TOKENS = 2**20
"""Tokens of a domain that a table of evidence is made from: more hardly change it."""
SUMS = Kept(shared=True, nbytes=_sums_bytes, memory=lambda statistics, model: model + statistics)
"""Of what routers read: sums of x and of x x^T, and a sample (routing/statistics.py)."""
COUNTS = Kept(shared=False, nbytes=_counts_bytes, memory=lambda statistics, _model: 4 * statistics)
"""Of n-grams (routing/counts.py)."""
TOKENS = Kept(
    shared=False,
    nbytes=lambda _width, _tokens, _in_memory: 4 * MOST_TOKENS,
    memory=lambda kept, model: model + 4 * kept,
    per_router=False,
)
"""Token ids of the text, at most MOST_TOKENS of a domain (routing/token_text.py)."""


@dataclass(frozen=True)
class Fit:
    """All of a fit.

    Attributes:
        name: as `mixture.router.fit` says it.
        about: one sentence for the recipe's schema.
        function: import path `module:name` of what sets the gates, `Fitting -> FittedRouter` (routing/fitting.py).
        rule: of a fit that is solved router by router from SUMS, import path of what solves one (routing/closed_form.py).
        reads: what it is made from.
        settings: of a router, those that this fit takes and some other does not.
        keeps: its statistics, or None.
        score: how its routers score.
        rows: rank of an expert's changes to what a router reads -> rows of the gate for that expert.
        fading: the decay, unless a recipe says another, of evidence over a text; None: the gate reads what `granularity` says.
        adds_up: that evidence is a sum, else an average, of which several may stand side by side.
        decides_once: one router decides for the whole model, before its first layer runs.
        stays: the decision is of the first `prefix` tokens and stays after them, whatever `granularity` says.
        chooses: the select split of every domain's text is kept, too, and chooses between variants of the router.
        of_tokens: every token has a row in its table, unless a setting makes n-grams of them: it says what a token is worth.
        kinds: value of the setting `features` -> the row that holds under it; without one, this row.
        kind: of such a row, that value.
        library: which it is fitted by, besides what modekit always has; not needed afterwards.
        low_rank: experts must be low-rank changes of the base: their changes are scored, or gates trained on them.
        needs_sample: it is solved on the kept tokens alone.
        takes_negatives: `negative_prompts` have an effect.
        native: whether a plain linear gate says it, which is all that native architectures have.
        carried: what a plain gate reads is carried to it in channels that native checkpoints have besides the base's
            (planning/channels.py).
        title: what tables call it, when that is another word.
    """

    name: str
    about: str
    function: str
    reads: Reads
    rule: str = ""
    settings: tuple[str, ...] = ()
    keeps: Kept | None = None
    score: Score = "linear"
    rows: Callable[[int], int] = lambda _rank: 1
    fading: float | None = None
    adds_up: bool = False
    decides_once: bool = False
    stays: bool = False
    chooses: bool = False
    of_tokens: bool = False
    kinds: Mapping[str, Fit] = field(default_factory=dict)
    kind: str = ""
    library: str = ""
    low_rank: bool = False
    needs_sample: bool = False
    takes_negatives: bool = False
    native: bool = False
    carried: bool = False
    title: str = ""

    @property
    def reads_text(self) -> bool:
        """Whether every domain must have text."""
        return self.reads not in {"nothing", "changes"}

    @property
    def beside_the_gate(self) -> int:
        """Columns of the gate besides those that tokens choose, and rows besides the experts'."""
        return 1 if self.score == "tfidf" else 0

    @property
    def tells_unseen(self) -> bool:
        """Whether it can tell text of no domain on the tokens so far."""
        return self.reads == "tokens" and self.fading is not None

    @property
    def said(self) -> str:
        """As a recipe says it."""
        return f"{self.name}, features: {self.kind}" if self.kind else self.name

    @property
    def label(self) -> str:
        """What a table calls it."""
        return self.title or self.name


_SOLVE = "modekit.routing.solve:solve_gates"
_SUMS_SETTINGS = ("temperature", "tokens_per_domain", "sequence_length", "keep_tokens", "compute_dtype", "jitter", "chat")
_REGULAR = (*_SUMS_SETTINGS, "l2")
_SCORED = ("temperature", "jitter")
_OF_CLASSIFIERS = ("temperature", "sequence_length", "seed", "features", "classifier", "chat")
_CLASSIFIERS = {
    "ngrams": Fit(
        "classifier",
        "",
        "modekit.routing.classifier:classifier_gates",
        "tokens",
        settings=(*_OF_CLASSIFIERS, "order", "buckets"),
        keeps=TOKENS,
        score="tfidf",
        decides_once=True,
        stays=True,
        chooses=True,
        kind="ngrams",
        library="sklearn",
    ),
    "hidden": Fit(
        "classifier",
        "",
        "modekit.routing.hidden:hidden_gates",
        "router inputs",
        settings=(*_SUMS_SETTINGS, "seed", "features", "classifier"),
        keeps=SUMS,
        decides_once=True,
        stays=True,
        needs_sample=True,
        kind="hidden",
        library="sklearn",
    ),
}


def _one_per_rank(rank: int) -> int:
    """All of B A; one row of zeros for an expert that changes nothing."""
    return max(1, rank)


_ROWS = (
    Fit(
        "random",
        "the paper's noisy router",
        "modekit.routing.constant:random_gates",
        "nothing",
        settings=("temperature", "jitter", "seed"),
        native=True,
        title="noisy",
    ),
    Fit(
        "centroid",
        "the mean of what a router reads in a domain",
        _SOLVE,
        "router inputs",
        rule="modekit.routing.closed_form:centroid",
        settings=_SUMS_SETTINGS,
        keeps=SUMS,
        takes_negatives=True,
        native=True,
    ),
    Fit(
        "lda",
        "linear discriminants of the domains",
        _SOLVE,
        "router inputs",
        rule="modekit.routing.closed_form:lda",
        settings=_REGULAR,
        keeps=SUMS,
        native=True,
    ),
    Fit(
        "logistic",
        "logistic regression on kept tokens",
        _SOLVE,
        "router inputs",
        rule="modekit.routing.closed_form:logistic",
        settings=_REGULAR,
        keeps=SUMS,
        needs_sample=True,
        native=True,
    ),
    Fit(
        "ridge",
        "least squares on the domains",
        _SOLVE,
        "router inputs",
        rule="modekit.routing.closed_form:ridge",
        settings=_REGULAR,
        keeps=SUMS,
        native=True,
    ),
    Fit(
        "ngram",
        "naive Bayes on the tokens so far",
        "modekit.routing.ngram:count_gate",
        "tokens",
        settings=("temperature", "sequence_length", "keep_tokens", "order", "buckets", "smoothing", "chat", "false_alarms"),
        keeps=COUNTS,
        score="ngram",
        decides_once=True,
        fading=0.98,
        adds_up=True,
    ),
    Fit(
        "lexical",
        "a table of what every token says of its domain, averaged over the text so far",
        "modekit.routing.lexical:lexical_gates",
        "tokens",
        settings=("temperature", "sequence_length", "seed", "orders", "buckets", "chat", "false_alarms"),
        keeps=TOKENS,
        score="lexical",
        decides_once=True,
        fading=0.98,
        of_tokens=True,
        native=True,
        carried=True,
    ),
    Fit(
        "classifier",
        "one decision for a text, by a scikit-learn classifier of its first tokens",
        "modekit.routing.classifier:classifier_gates",
        "tokens",
        settings=_OF_CLASSIFIERS,
        keeps=TOKENS,
        score="tfidf",
        decides_once=True,
        stays=True,
        chooses=True,
        of_tokens=True,
        kinds=_CLASSIFIERS,
        library="sklearn",
    ),
    Fit(
        "arrow",
        "the direction that an adapter amplifies most, without text",
        "modekit.routing.low_rank:arrow",
        "changes",
        settings=_SCORED,
        score="norm",
        low_rank=True,
    ),
    Fit(
        "spectr",
        "the length of what an adapter makes of x, without text",
        "modekit.routing.low_rank:spectr",
        "changes",
        settings=_SCORED,
        score="norm",
        rows=_one_per_rank,
        low_rank=True,
    ),
    Fit(
        "seqr",
        "that length for adapters of equal size, without text",
        "modekit.routing.low_rank:seqr",
        "changes",
        settings=_SCORED,
        score="norm",
        rows=_one_per_rank,
        low_rank=True,
    ),
    Fit(
        "phatgoose",
        "a gate trained for each adapter alone, on its own text",
        "modekit.routing.phatgoose:learned_gates",
        "training",
        settings=("tokens_per_domain", "sequence_length", "seed", "steps", "jitter", "chat"),
        score="standardised",
        low_rank=True,
    ),  # no temperature: its gates are standardised
)
FITS: dict[str, Fit] = {row.name: row for row in _ROWS}
"""Name -> row."""
DEFAULT_FIT = "logistic"
"""Best of benchmarks/router_fits.md among those that every architecture can say."""


def fits_with(setting: str) -> list[str]:
    """Names of the fits that take a setting of a router; none when all do."""
    return [row.said for row in _every_row() if setting in row.settings]


def _every_row() -> Iterator[Fit]:
    for row in FITS.values():
        yield row
        yield from row.kinds.values()


def row_of(fit: str, features: str | None = None) -> Fit:
    """The row that holds for a fit under a value of `features`."""
    row = FITS[fit]
    return row.kinds.get(features or "", row)


def known_fit(value: object) -> object:
    """The value, when it names a fit. Raises what pydantic reports as a wrong word."""
    if isinstance(value, str) and value in FITS:
        return value
    *names, last = (f"'{name}'" for name in FITS)
    raise PydanticCustomError("literal_error", "Input should be {expected}", {"expected": f"{', '.join(names)} or {last}"})


def say_fits(schema: dict[str, Any]) -> None:
    """Put the names of the fits, and what each is, into the JSON schema of a key."""
    schema["enum"] = list(FITS)
    schema["description"] = "How the gate is set. " + "; ".join(f"{row.name}: {row.about}" for row in FITS.values()) + "."


FitName = Annotated[str, BeforeValidator(known_fit)]
