"""The recipe: what a user writes, checked strictly at the door.

Anything that changes the result is in here; command line flags only say where and how loudly. A file is read in read.py,
which reports all problems together, each with its key. What every key means stands in schema.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from modekit.recipes.backbone import BackboneExpert
from modekit.recipes.fits import fits_with
from modekit.recipes.layers import Layers
from modekit.recipes.mixture import CHOICES, Mixture
from modekit.recipes.strict import BASE, SELF, TAKEN, Name, Size, Strict, checked, is_unset

DType = Literal["float32", "bfloat16", "float16", "source"]
Format = Literal["auto", "plain", "modekit"]

_MOST_EXPERTS = 1024  # an expert is a tensor or more in every layer of the plan, whatever lies on disk
_MOST_LABELS = 256  # of an expert


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


_Said = Annotated[str, Field(min_length=1)]
Texts = Annotated[list[_Said], BeforeValidator(_as_list, json_schema_input_type=str | list[str]), Field(min_length=1)]
"""Text of a domain: one path, folder or hub data set, or a list of them."""


class Expert(Strict):
    """One expert: a domain's name, the model or adapter made for it and, for fitting and evaluation, its text."""

    name: Name
    model: str | None = Field(None, min_length=1)
    adapter: str | None = Field(None, min_length=1)
    as_: Literal["full", "lora"] = Field("full", alias="as")
    rank: int | None = Field(None, ge=1)
    bits: int | None = Field(None, ge=1, le=8, exclude_if=is_unset)
    layers: Layers | None = Field(None, min_length=1, exclude_if=is_unset)
    revision: str | None = None
    text: Texts | None = None
    prompts: list[_Said] | None = Field(None, min_length=1)
    negative_prompts: list[_Said] | None = Field(None, min_length=1)
    labels: list[Name] | None = Field(None, min_length=1, max_length=_MOST_LABELS, exclude_if=is_unset)

    @model_validator(mode="after")
    def _one_source(self) -> Expert:
        problems = []
        is_full = self.adapter is None and not self.is_base
        if (self.model is None) == (self.adapter is None):
            problems.append("give either 'model' or 'adapter'")
        if self.as_ == "lora" and not is_full:
            problems.append("'as: lora' keeps a low-rank part of a full model, and this is none: remove 'as'")
        if self.rank is not None and self.as_ != "lora":
            problems.append("'rank' has no effect without 'as: lora'; remove it (an adapter has the rank it was trained with)")
        if self.bits is not None and (not is_full or self.as_ == "lora"):
            problems.append("'bits' keeps the difference of a full model from the base, without 'as: lora'; remove it")
        if self.layers is not None and self.is_base:
            problems.append("'layers' has no effect with model: base; remove it")
        if SELF in (self.text or ()) and not self.writes_text:
            problems.append("'text: self' cannot be combined with other text: leave one of them out")
        return checked(self, problems)

    @property
    def source(self) -> str:
        """What the recipe names: a folder, a hub id or the word base."""
        return self.model or self.adapter or BASE

    @property
    def writes_text(self) -> bool:
        """Whether its text is what it writes itself."""
        return self.text == [SELF]

    @property
    def is_base(self) -> bool:
        """Whether the expert is the base model itself."""
        return self.model == BASE

    @property
    def is_low_rank(self) -> bool:
        """Whether a part of a full model's difference from the base is kept: of low rank, or in a few bits per number."""
        return self.as_ == "lora" or self.bits is not None

    @property
    def lora_rank(self) -> int | None:
        """The rank of a low-rank part; None without one."""
        return (self.rank or 16) if self.as_ == "lora" else None

    @property
    def is_whole(self) -> bool:
        """Whether it is a full model of which everything is kept: as it is, or as a difference in a few bits per number."""
        return self.model is not None and not self.is_base and self.as_ == "full"


class Output(Strict):
    """Shape of the result."""

    format: Format = "auto"
    dtype: DType = "source"
    shard_size: Size = Field(5 * 10**9, gt=0)
    channels: int | None = Field(None, ge=32, le=2**16, multiple_of=32, exclude_if=is_unset)
    carry: Literal["ffn", "all"] | None = Field(None, exclude_if=is_unset)
    rank: int | None = Field(None, ge=1, le=2**12, exclude_if=is_unset)


_InShortToo = Annotated[Expert, BeforeValidator(lambda said: said, json_schema_input_type=Expert | str)]
"""An expert in full; one in short is spelled out before (recipes/paths.py)."""


class Recipe(Strict):
    """One mixture. See docs/recipe.md for every key."""

    base_model: str = Field(min_length=1)
    revision: str | None = None
    experts: list[_InShortToo] = Field(min_length=1)
    mixture: Mixture = Field(default_factory=Mixture)
    output: Output = Field(default_factory=Output)
    eval: dict[Name, Texts] = Field(default_factory=dict)

    @field_validator("experts")
    @classmethod
    def _unique(cls, experts: list[Expert]) -> list[Expert]:
        if len(experts) > _MOST_EXPERTS:
            raise ValueError(f"a mixture has {_MOST_EXPERTS} experts at most (found {len(experts)}); leave some out")
        seen: set[str] = set()
        for expert in experts:
            if expert.name in TAKEN:
                raise ValueError(f"an expert cannot be named '{expert.name}', which means a row of the evaluation; rename it")
            if expert.name in seen:
                raise ValueError(f"two experts are named '{expert.name}'; names must differ")
            seen.add(expert.name)
        return experts

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        problems = [
            *self._problems_of_names(),
            *(self._problems_of_plain() if self.output.format == "plain" else ()),
            *self._problems_of_the_form(),
            *self._problems_of_text(),
        ]
        return checked(self, problems)

    def _problems_of_names(self) -> Iterator[str]:
        names = self.names
        mixture = self.mixture
        always_on = self.mixture.always_on
        dimensions = mixture.router.dimensions
        for key, most in (("top_k", mixture.top_k), ("groups", mixture.groups), ("router.dimensions", dimensions)):
            if (most or 0) > len(names):
                yield f"mixture.{key} is {most} but there are only {len(names)} experts"
        for key, by_name in (("threshold", mixture.threshold), ("weights", mixture.weights)):
            if isinstance(by_name, dict) and set(by_name) != set(names):
                yield f"mixture.{key} must name every expert once: {', '.join(names)}"
        if isinstance(mixture.backbone, BackboneExpert) and mixture.backbone.expert not in names:
            yield f"mixture.backbone.expert '{mixture.backbone.expert}' is not an expert: {', '.join(names)}"
        if always_on is not None and always_on.expert not in names:
            if always_on.expert != BASE:
                yield f"mixture.always_on.expert '{always_on.expert}' is not an expert: {', '.join([*names, BASE])}"
            elif always_on.weight is None:
                yield "mixture.always_on: the base is not in the list of experts, so it needs a weight"
        known = {*names, *TAKEN}
        for expert in self.experts:
            for label in expert.labels or ():
                if label in known:
                    yield f"experts '{expert.name}': the label '{label}' is known already; a label leads to one expert"
                known.add(label)

    def _problems_of_plain(self) -> Iterator[str]:
        for name in (expert.name for expert in self.experts if expert.is_low_rank):
            yield f"experts '{name}': experts are whole in output.format plain; remove as: lora or bits"
        if beyond := self.beyond_plain():
            yield f"output.format plain cannot say {', '.join(beyond)}; use modekit or auto"

    def beyond_plain(self) -> list[str]:
        """What of it only the modekit architecture can say."""
        mixture = self.mixture
        fit = self.mixture.fit
        router = self.mixture.router
        reasons = ["modules other than the whole FFN"] if mixture.modules not in ("auto", ["mlp"]) else []
        reasons += ["only some layers"] if mixture.layers is not None else []
        reasons += [key for key in ("top_p", "groups", "threshold", "always_on") if getattr(mixture, key) is not None]
        if fit is not None:
            reasons += [f"granularity: {router.granularity}"] if router.granularity != "token" else []
            reasons += [f"a router per {router.scope}"] if router.scope != "layer" and not fit.carried else []
            reasons += [f"fit: {router.fit}"] if fit.native_as is None else []
            reasons += ["n-grams of a lexical router"] if router.hashes else []
            reasons += ["jitter or noise of the router"] if router.jitter or router.noise else []
        return reasons + ["experts that have only some layers"] * any(each.layers for each in self.experts)

    def _problems_of_the_form(self) -> Iterator[str]:
        mixture = self.mixture
        fit = self.mixture.fit
        output = self.output
        asked = [key for key in ("channels", "carry", "rank") if getattr(output, key) is not None and not mixture.is_open]
        if asked and (output.format == "modekit" or not mixture.is_carried):
            yield f"output.{asked[0]} has no effect without router: {{fit: lexical}} in a plain checkpoint; remove it"
        if "rank" in asked and output.carry == "ffn":
            yield "output.rank has no effect with carry: ffn; remove it"
        whole = [each.name for each in self.experts if each.is_whole]
        if whole and fit is not None and fit.reads == "changes":
            yield (
                f"router fit '{fit.name}' scores low-rank changes, and these experts are full models: "
                f"{', '.join(whole)} (add as: lora with a rank, or choose another fit)"
            )
        bring_all = not any(expert.is_low_rank or expert.layers for expert in self.experts)
        if mixture.modules == "all" and mixture.backbone != BASE and bring_all:
            yield "mixture.backbone has no effect with modules: all, where experts bring everything; remove it"
        if mixture.merge is not None and all(expert.is_base for expert in self.experts):
            yield "mixture.backbone cannot be merged: every expert is 'base'"

    def _problems_of_text(self) -> Iterator[str]:
        silent = [expert.name for expert in self.experts if not expert.text and not expert.prompts]
        if silent and (self.mixture.needs_text or (self.mixture.is_open and len(silent) < len(self.experts))):
            yield (
                f"router fit '{self.mixture.router.fit}' needs text of every domain; missing: {', '.join(silent)} "
                "(add experts[].text, or a few short texts as experts[].prompts; without any, write text: self, and the "
                "expert writes some; without running it, adapters can take router: {fit: arrow}, all others {fit: random})"
            )
        negative = any(expert.negative_prompts for expert in self.experts)
        if negative and "negative_prompts" not in self.mixture.router.row.settings:
            fits = " or ".join(fits_with("negative_prompts"))
            yield f"'negative_prompts' have no effect without router: {{fit: {fits}}}; remove them"

    @property
    def names(self) -> list[str]:
        """Names of the experts in recipe order."""
        return [expert.name for expert in self.experts]

    @property
    def other_labels(self) -> dict[str, int]:
        """Label -> place of its expert, without the experts' own names."""
        return {label: place for place, expert in enumerate(self.experts) for label in expert.labels or ()}

    @property
    def top_k(self) -> int:
        """Experts per token, resolved: all at most for linear, gating, top_p and thresholds; of routing 2 (or all, if fewer) by
        default.
        """
        if self.mixture.method != "routing" or self.mixture.varies:
            return len(self.experts)
        return self.mixture.top_k or self.mixture.groups or min(2, len(self.experts))

    @property
    def chosen(self) -> str:
        """Which experts take part in a token, by the setting that decides it."""
        given = ((key, getattr(self.mixture, key)) for key in CHOICES)
        return next((f"{key} {value}" for key, value in given if value is not None), f"top_k {self.top_k}")

    def digest(self) -> str:
        """sha256 of the recipe in canonical JSON; two recipes that say the same have the same digest."""
        said = self.model_dump(mode="json", by_alias=True)
        if self.mixture.method == "linear":  # has no router; its default was another once
            said["mixture"]["router"]["fit"] = "logistic"
        canonical = json.dumps(said, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def label_of(place: int, expert: Expert) -> str:
    """What messages call an expert's model."""
    return f"experts[{place}] '{expert.name}'"
