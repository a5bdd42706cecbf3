"""Where everything that is not an expert or a router comes from: the base, one expert, or a merge of all."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from modekit.recipes.strict import Name, Strict


class BackboneMerge(Strict):
    """A backbone merged from the experts, with its settings."""

    method: Literal["average", "task_arithmetic", "ties"]
    scale: float = 1.0
    density: float = Field(0.2, gt=0, le=1)

    @model_validator(mode="after")
    def _no_dead_setting(self) -> BackboneMerge:
        live = {"average": set(), "ties": {"scale", "density"}}.get(self.method, {"scale"})
        for key in self.model_fields_set - {"method"} - live:
            raise ValueError(f"'{key}' has no effect with method '{self.method}'; remove it")
        return self


class BackboneExpert(Strict):
    """The backbone of one expert."""

    expert: Name


def _backbone_form(value: object) -> str:
    """Which way of writing a backbone is meant, so that a mistake in it is reported once and not per way."""
    if isinstance(value, BackboneExpert) or (isinstance(value, dict) and "expert" in value):
        return "BackboneExpert"
    return "BackboneMerge" if isinstance(value, (dict, BackboneMerge)) else "literal[]"


Backbone = Annotated[
    Annotated[Literal["base", "average", "task_arithmetic", "ties"], Tag("literal[]")]
    | Annotated[BackboneExpert, Tag("BackboneExpert")]
    | Annotated[BackboneMerge, Tag("BackboneMerge")],
    Discriminator(_backbone_form),
]
