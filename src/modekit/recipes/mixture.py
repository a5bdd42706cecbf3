"""How the experts are mixed, the router's settings, and what of both has an effect."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from modekit.recipes.backbone import Backbone, BackboneExpert, BackboneMerge
from modekit.recipes.fits import AUTO, FITS, Fit, Scope, fits_with, row_of
from modekit.recipes.layers import Layers
from modekit.recipes.strict import BASE, Name, RecipePart, Strict, checked, did_you_mean, is_unset


def known_fit(value: str) -> str:
    """The value, when it names a fit or is `auto`. Raises ValueError."""
    if value not in (known := (AUTO, *FITS)):
        raise ValueError(f"must be one of {', '.join(map(repr, known))}; {did_you_mean(value, known)}".rstrip("; "))
    return value


FitName = Annotated[str, AfterValidator(known_fit)]
CHAT_DECAY = 0.91  # of evidence, where a router is fitted on chats (benchmarks/chat.md)


class Router(Strict):
    """How the router is set. Defaults are the best of benchmarks/router_fits.md."""

    fit: FitName = AUTO
    tokens_per_domain: int = Field(16_384, ge=16)
    sequence_length: int = Field(512, ge=8)
    temperature: float = Field(1.0, gt=0)
    l2: float = Field(1e-3, ge=0)
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    keep_tokens: int = Field(8_192, ge=0)
    seed: int = Field(0, ge=0)
    granularity: Literal["token", "context", "sequence"] = "token"
    decay: list[Annotated[float, Field(ge=0, le=1)]] | None = Field(None, min_length=1, max_length=256)
    prefix: int | None = Field(None, ge=1)
    dimensions: int | None = Field(None, ge=2, exclude_if=is_unset)
    per: Scope = "layer"
    jitter: float = Field(0.0, ge=0, lt=1)
    noise: float = Field(0.0, ge=0)
    buckets: int = Field(2**18, ge=2, le=2**24)
    orders: list[Annotated[int, Field(ge=1, le=4)]] | None = Field(None, min_length=1, max_length=4, exclude_if=is_unset)
    chat: bool | None = Field(None, exclude_if=is_unset)

    @model_validator(mode="after")
    def _no_dead_setting(self) -> Router:
        fields = type(self).model_fields.items()
        given = {key: getattr(self, key) for key, field in fields if getattr(self, key) != field.default}
        return checked(self, [*dict.fromkeys(why for _, why in without_effect(given, self.row))])

    @property
    def row(self) -> Fit:
        """All that is known of the fit."""
        return row_of(self.fit)

    @property
    def hashes(self) -> bool:
        """Whether a lexical router has tables of more than the tokens alone, whose rows are hashed."""
        return self.orders not in (None, [1])

    @property
    def scope(self) -> Scope:
        """What shares a router: as `per` says, the model where one decision is all there can be."""
        return "model" if self.row.reads_ids else self.per

    @property
    def decays(self) -> list[float]:
        """Of evidence that fades; none for a fit without any."""
        return [] if self.row.fading is None else self.decay or [self.row.fading]


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
    if row.score != "linear" and not row.reads_ids and router.get("per") == "feature":
        yield "per", f"fit '{row.name}' makes one decision per module, not one per output feature; choose another"
    if row.reads_ids and router.get("per", "model") != "model":
        yield "per", f"fit '{row.name}' makes one decision for the whole model; remove 'per', or write per: model"
    if row.sample and router.get("keep_tokens") == 0:
        yield "keep_tokens", f"the {row.name} fit is solved on kept tokens: keep_tokens must be at least 1, or choose centroid"
    for key, fits in ((key, fits_with(key)) for key in router):
        if fits and key not in row.settings:
            yield key, f"'{key}' has no effect with fit: {row.name} (only with {', '.join(fits)}); remove it"


_ONE = Tag("literal[]")
_MANY = Tag("literal[s]")
_ONE_OR_MANY = Discriminator(lambda value: "literal[s]" if isinstance(value, (list, dict)) else "literal[]")
Part = Literal["mlp", "q", "k", "v", "o", "cross_q", "cross_k", "cross_v", "cross_o", "gate", "up", "down"]
Method = Literal["linear", "gating", "routing"]
CHOICES = ("top_k", "top_p", "groups", "threshold")
"""Ways to choose experts, of which a mixture has one."""
READ_BY: dict[str, tuple[Method, ...]] = {
    **dict.fromkeys(CHOICES, ("routing",)),
    **dict.fromkeys(("always_on", "router"), ("routing", "gating")),
    "weights": ("linear",),
}
"""Settings of a mixture -> the methods that read them; others are read by all."""
_Weight = Annotated[float, Field(ge=0)]
_Share = Annotated[float, Field(gt=0, lt=1)]


class AlwaysOn(Strict):
    """An expert, or the base, that takes part in every token."""

    expert: Name
    weight: float | None = Field(None, gt=0, lt=1)
    apart: bool | None = Field(None, exclude_if=is_unset)


class Mixture(Strict):
    """How the experts are mixed."""

    method: Method = "routing"
    top_k: int | None = Field(None, ge=1)
    top_p: float | None = Field(None, gt=0, le=1)
    groups: int | None = Field(None, ge=2, exclude_if=is_unset)
    threshold: Annotated[Annotated[_Share, _ONE] | Annotated[dict[Name, _Share], _MANY], _ONE_OR_MANY] | None = Field(
        None, exclude_if=is_unset
    )
    modules: Annotated[
        Annotated[Literal["auto", "decoder", "all"], _ONE] | Annotated[list[Part], Field(min_length=1), _MANY], _ONE_OR_MANY
    ] = "auto"
    layers: Layers | None = Field(None, min_length=1)
    always_on: AlwaysOn | None = None
    weights: dict[Name, _Weight] | None = None
    router: Router = Field(default_factory=Router)
    backbone: Backbone = "base"

    @model_validator(mode="after")
    def _no_dead_setting(self) -> Mixture:
        return checked(self, [*self._problems(), *(self._problems_of_whole_models() if self.is_whole else ())])

    def _problems(self) -> Iterator[str]:
        given = {key for key in self.model_fields_set if getattr(self, key) is not None}
        for key in sorted(given):
            if self.method not in READ_BY.get(key, (self.method,)):
                yield f"'{key}' has no effect with method '{self.method}'; remove it"
        if len(given & {*CHOICES}) > 1:
            yield f"give one of {', '.join(CHOICES)}"
        always = self.always_on
        if always is not None and always.weight is None and (self.method == "gating" or self.top_k == 1):
            yield "'always_on' without a weight takes one of the places of routing; give it a weight, or another top_k"
        if always is not None and always.apart:
            shares = self.backbone == BASE and self.modules != "all"
            if always.expert != BASE or always.weight is None or not shares:
                yield (
                    "'always_on' with apart: true is the base with a weight, whose head the experts share: write expert: base, "
                    "weight: 0.5, backbone: base, and another word than modules: all"
                )
        if isinstance(self.modules, list):
            parts = [*self.modules, *(("gate", "up", "down") if "mlp" in self.modules else ())]
            if len(set(parts)) < len(parts):
                yield "'modules' names a part twice (mlp is gate, up and down)"
        if self.weights is not None and not 0 < sum(self.weights.values()) < math.inf:
            yield "'weights' must be >= 0 and not all zero"

    def _problems_of_whole_models(self) -> Iterator[str]:
        fit = self.fit
        before_first_layer = self.router.granularity == "sequence" and self.router.per == "model"
        if fit is not None and not fit.reads_ids and (fit.reads == "changes" or not before_first_layer):
            yield (
                f"modules: {self.modules} mixes norms, too, so the decision must be made before the first layer: set "
                "router: {fit: lexical}, or router: {granularity: sequence, per: model} with a fit that reads text"
            )
        if self.layers is not None:
            yield f"'layers' has no effect with modules: {self.modules}; remove it"

    @property
    def is_whole(self) -> bool:
        """Whether experts have every layer of their own, so that one decision before the first layer serves all places."""
        return self.modules in ("all", "decoder")

    @property
    def fit(self) -> Fit | None:
        """How the router is set; None where weights are fixed and nothing is, or where that is still open."""
        return None if self.method == "linear" or self.is_open else self.router.row

    @property
    def varies(self) -> bool:
        """Whether tokens have different numbers of experts."""
        return self.top_p is not None or self.threshold is not None

    @property
    def is_open(self) -> bool:
        """Whether its router is yet to be chosen (recipes/choices.py)."""
        return self.method != "linear" and self.router.row.is_open

    @property
    def is_carried(self) -> bool:
        """Whether a plain checkpoint carries to its router what that reads."""
        return self.fit is not None and self.fit.carried

    @property
    def needs_text(self) -> bool:
        """Whether the router is set from text."""
        return self.fit is not None and self.fit.reads_text

    @property
    def merge(self) -> BackboneMerge | None:
        """The backbone merge with its settings, or None when the backbone is copied from one model."""
        if isinstance(self.backbone, BackboneMerge):
            return self.backbone
        if isinstance(self.backbone, BackboneExpert) or self.backbone == BASE:
            return None
        return BackboneMerge.model_validate({"method": self.backbone})
