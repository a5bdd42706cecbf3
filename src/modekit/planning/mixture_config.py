"""What `config["modekit"]` of a checkpoint must say before anything is read from it; see architecture/modekit_mixed.py."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from modekit.sources.families import FAMILIES


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Average(_Part):
    decay: float | None
    sum: bool = False


class _Ngram(_Part):
    order: int = Field(ge=1)
    buckets: int = Field(ge=2)


class _Routing(_Part):
    method: Literal["linear", "gating", "routing"]
    averages: list[_Average] = Field(min_length=1)
    top_k: int | None
    top_p: float | None
    weights: list[float] | None
    always_on: dict[str, Any] | None
    score: Literal["linear", "norm", "standardised", "ngram"] = "linear"
    jitter: float = 0.0
    noise: float = 0.0
    prefix: int | None = None
    ngram: _Ngram | None = None


class _Place(_Part):
    ranks: list[int]
    scales: list[float]
    own: list[int]
    base: bool
    router: str
    biased: list[int] = []
    features: int = 0
    sequence_axis: int = 1
    width: int | None = None
    rows: list[int] | None = None


class MixtureConfig(_Part):
    """`config["modekit"]`."""

    format: int
    dense_type: str
    experts: list[str] = Field(min_length=1)
    routing: _Routing
    places: dict[str, _Place] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> MixtureConfig:
        count = len(self.experts)
        if self.dense_type not in {family.model_type for family in FAMILIES}:
            raise ValueError(f"dense_type '{self.dense_type}' is no family of this version of modekit")
        for module, place in self.places.items():
            leader = self.places.get(place.router)
            if len(place.ranks) != count or len(place.scales) != count:
                raise ValueError(f"places.{module}: ranks and scales must have {count} entries")
            if not all(0 <= expert < count for expert in [*place.own, *place.biased]):
                raise ValueError(f"places.{module}: there are only {count} experts")
            if leader is None or leader.width is None or leader.rows is None or len(leader.rows) != count:
                raise ValueError(f"places.{module}: there is no router '{place.router}'")
        return self


def problem_of(mixture: Any) -> str | None:
    """What is wrong with `config["modekit"]`; None when nothing is."""
    try:
        MixtureConfig.model_validate(mixture)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        return f"{place}: {first['msg']}" if place else str(first["msg"]).removeprefix("Value error, ")
    return None
