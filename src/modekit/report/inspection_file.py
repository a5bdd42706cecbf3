"""What inspect.json has to hold, so that a page of it can be drawn."""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from modekit.files.typed import Count, Number
from modekit.recipes.layers import Layer

Share = Annotated[float, Field(ge=-1e-3, le=1 + 1e-3)]
NamedLayer = Annotated[str, StringConstraints(pattern=r"^(encoder|decoder)\.[0-9]{1,6}$")]
"""A layer of a model that has both."""


class Data(BaseModel):
    """A part of a results file; keys of later versions are passed over."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Router(Data):
    """A router slot; `layer` is None for one that serves several."""

    name: str
    layer: int | NamedLayer | None
    module: str


class Dead(Data):
    """An expert that a router never chooses."""

    router: int
    expert: str


class Token(Data):
    """A token of a sample, with its loss in nats (None for the first)."""

    text: str
    loss: Number | None


class Sample(Data):
    """A held-out text word by word; `weights` are [router][token][expert]."""

    domain: str
    text: str
    loss: Number
    tokens: list[Token]
    weights: list[list[list[Share]]]
    without: dict[str, Number | None] = {}


class Usage(Data):
    """How the routers treat one domain; lists are per router."""

    expert: str | None
    documents: Count
    tokens: Count
    loss: Number
    shares: list[list[Share]]
    chosen: list[list[Share]]
    entropy: list[Number]
    agreement: list[Share] | None
    without: dict[str, Number | None]
    named: Share | None


class Similarity(Data):
    """Of each pair of experts, 1 for identical ones."""

    experts: list[list[Number]]
    of: str


class TopToken(Data):
    """A token that an expert takes more than others."""

    token: str
    share: Share
    count: Count
    lift: Number


class Evidence(Data):
    """A token that speaks for an expert in a lexical router's table."""

    token: str
    weight: Number


class ToldApart(Data):
    """How well a router's running scores tell unseen text; `auroc` is score -> unseen domain -> one for each of `at`."""

    at: list[Count] = Field(max_length=64)
    auroc: dict[str, dict[str, list[Share | None]]]
    to_base: dict[str, Share] | None

    @model_validator(mode="after")
    def _one_for_each(self) -> ToldApart:
        if any(len(row) != len(self.at) for rows in self.auroc.values() for row in rows.values()):
            raise ValueError("told_apart.auroc has not a number for each of told_apart.at")
        return self


class Inspection(Data):
    """inspect.json."""

    format: Literal[1]
    checkpoint: dict[str, str]
    experts: list[str] = Field(min_length=1)
    domains: list[str] = Field(max_length=2**12)
    unseen: list[str] = Field(max_length=2**12)
    routers: list[Router]
    top_k: int | None
    per_domain: dict[str, Usage]
    utilisation: list[list[Share]]
    dead: list[Dead]
    similarity: Similarity | None
    top_tokens: dict[str, list[TopToken]]
    evidence: dict[str, list[Evidence]] | None = None
    told_apart: ToldApart | None = None
    texts: list[Sample]
    notes: list[str]

    @cached_property
    def in_layer(self) -> Counter[Layer | None]:
        """Layer -> number of its routers."""
        return Counter(router.layer for router in self.routers)

    @model_validator(mode="after")
    def _fits_together(self) -> Inspection:
        experts, routers = len(self.experts), len(self.routers)

        def check(rows: list[list[float]], where: str) -> None:
            if len(rows) != routers or any(len(row) != experts for row in rows):
                raise ValueError(f"{where} is not {routers} routers x {experts} experts")

        every = [*self.domains, *self.unseen]
        if set(self.per_domain) != set(every) or len(self.per_domain) != len(every):
            raise ValueError("per_domain does not name the domains")
        for domain, usage in self.per_domain.items():
            check(usage.shares, f"per_domain.{domain}.shares")
            check(usage.chosen, f"per_domain.{domain}.chosen")
        check(self.utilisation, "utilisation")
        for sample in self.texts:
            if len(sample.weights) != routers or any(len(tokens) != len(sample.tokens) for tokens in sample.weights):
                raise ValueError("texts[].weights is not routers x tokens")
            for tokens in sample.weights:
                if any(len(row) != experts for row in tokens):
                    raise ValueError("texts[].weights does not name every expert")
        if self.similarity is not None and [len(row) for row in self.similarity.experts] != [experts] * experts:
            raise ValueError("similarity.experts is not experts x experts")
        return self
