"""What `modekit inspect` finds: inspect.json, and one text token by token. Losses are in nats per token; six digits
of a figure are written.

Shape legend: R routers, T tokens, E experts. `shares_RE` and the like are lists of lists.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.errors import CheckpointError
from modekit.files.typed import SIX_DIGITS, Count, Data, Figure, problem_in
from modekit.planning.shape import RouterPosition
from modekit.recipes.layers import Layer

INSPECT_FILE = "inspect.json"
_STACKED = re.compile(r"(encoder|decoder)\.[0-9]{1,6}")  # a layer of a model that has both


def _has_a_layer(router: RouterPosition) -> RouterPosition:
    if isinstance(router.layer, str) and not _STACKED.fullmatch(router.layer):
        raise ValueError("layer must be a number, or encoder. or decoder. and a number")
    return router


Share = Annotated[float, Field(ge=-1e-3, le=1 + 1e-3), SIX_DIGITS]
Position = Annotated[RouterPosition, AfterValidator(_has_a_layer)]


class Dead(Data):
    """An expert that hardly weighs anything in a router (its place among `routers`), in any domain."""

    router: int
    expert: str


class TokenLoss(Data):
    """A token, with its loss (None where it is not predicted)."""

    text: str
    loss: Figure | None


class TokenTrace(Data):
    """A text token by token: its mean loss, the routers' weights [R][T][E], and what leaving out each expert adds to the loss.

    Of a pair: the source, whose tokens have no loss, and behind it the target; where a router does not read, weights are 0.
    """

    text: str
    loss: Figure
    tokens: list[TokenLoss]
    weights: list[list[list[Share]]]
    without: dict[str, Figure | None] = Field(default_factory=dict)


class DomainTrace(TokenTrace):
    """A held-out text of a domain."""

    domain: str


class TextTrace(TokenTrace):
    """One text that a user gave.

    Attributes:
        routers: whose weights these are; of a long text one, named mean.
        top_k: experts per token; None where they vary.
        base_loss: of the base model on the same tokens; None where it is not at hand.
        entropy: mean over tokens and routers.
        windows: in which the text was read, each starting anew.
        scores: name -> the running score at every token, of a router that reads tokens (routing/unseen.py).
        prompt_end: of a chat the weights (E) where the answer begins.
    """

    experts: list[str]
    routers: list[Position]
    top_k: int | None
    base_loss: Figure | None
    entropy: Figure
    windows: Count
    scores: dict[str, list[Figure]] | None = None
    prompt_end: list[Share] | None = None
    notes: list[str]


class Usage(Data):
    """How the routers treat one domain; lists are per router, of `shares` and `chosen` [R][E].

    Attributes:
        expert: the domain's own; None of an unseen one.
        shares: mean weight of each expert; chosen: fraction of tokens that chose it.
        agreement: fraction of tokens on which the own expert leads.
        without: expert -> what leaving it out adds to the loss; empty where there is one expert.
        named: fraction of texts that miss their own expert most.
    """

    expert: str | None
    documents: Count
    tokens: Count
    loss: Figure
    shares: list[list[Share]]
    chosen: list[list[Share]]
    entropy: list[Figure]
    agreement: list[Share] | None
    without: dict[str, Figure | None]
    named: Share | None


class Similarity(Data):
    """Cosine of each pair of experts [E][E], what was compared, and what a reader has to know about it."""

    experts: list[list[Figure]]
    of: str
    notes: list[str] = Field(default_factory=list, exclude=True)


class TopToken(Data):
    """A token, how often it was seen, an expert's mean weight on it, and that over the expert's mean on all tokens."""

    token: str
    count: Count
    share: Share
    lift: Figure


class TokenWeight(Data):
    """A token that speaks for an expert in the router's own table, by how much more than for the others."""

    token: str
    weight: Figure


class UnseenDetection(Data):
    """How well running scores tell text of the domains from that of unseen ones (inspection/unseen.py).

    Attributes:
        at: tokens after which a score is read.
        auroc: score -> unseen domain -> one for each of `at`, None where no text of either kind is as long.
        to_base: domain -> share of its tokens on which the base leads; None where the base is no expert.
    """

    at: list[Count] = Field(max_length=64)
    auroc: dict[str, dict[str, list[Share | None]]]
    to_base: dict[str, Share] | None

    @model_validator(mode="after")
    def _one_for_each(self) -> UnseenDetection:
        if any(len(row) != len(self.at) for rows in self.auroc.values() for row in rows.values()):
            raise ValueError("told_apart.auroc has not a number for each of told_apart.at")
        return self


class Inspection(Data):
    """inspect.json: of `domains`, which have an expert, and `unseen` ones, both in `per_domain`.

    `utilisation` [R][E] is the mean over `domains`; `top_k` is None with top_p; `evidence` and `told_apart` are None where the
    router reads more than tokens. `by_id` [R]: how far the token alone decides; None where no token came five times.
    """

    format: Literal[1] = 1
    checkpoint: dict[str, str]
    experts: list[str] = Field(min_length=1)
    domains: list[str] = Field(max_length=2**12)
    unseen: list[str] = Field(max_length=2**12)
    routers: list[Position]
    top_k: int | None
    per_domain: dict[str, Usage]
    utilisation: list[list[Share]]
    by_id: list[Share] | None = None
    dead: list[Dead]
    similarity: Similarity | None
    top_tokens: dict[str, list[TopToken]]
    evidence: dict[str, list[TokenWeight]] | None = None
    told_apart: UnseenDetection | None = None
    texts: list[DomainTrace]
    notes: list[str]

    @cached_property
    def in_layer(self) -> Counter[Layer | None]:
        """Layer -> number of its routers."""
        return Counter(router.layer for router in self.routers)

    def as_json(self) -> bytes:
        """As it is written: indented it would be three times as long."""
        return (json.dumps(self.model_dump(), sort_keys=True, ensure_ascii=False) + "\n").encode()

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
        if len(self.by_id or self.routers) != routers:
            raise ValueError(f"by_id is not of {routers} routers")
        for sample in self.texts:
            if len(sample.weights) != routers or any(len(tokens) != len(sample.tokens) for tokens in sample.weights):
                raise ValueError("texts[].weights is not routers x tokens")
            if any(len(row) != experts for tokens in sample.weights for row in tokens):
                raise ValueError("texts[].weights does not name every expert")
        if self.similarity is not None and [len(row) for row in self.similarity.experts] != [experts] * experts:
            raise ValueError("similarity.experts is not experts x experts")
        return self


@contextmanager
def only_figures(checkpoint: Checkpoint) -> Iterator[None]:
    """Raises CheckpointError where something found inside is no figure: a mixture whose losses or weights are NaN or Inf."""
    try:
        yield
    except ValidationError as error:
        raise CheckpointError(
            "the mixture's losses or weights are not finite",
            where=str(checkpoint.folder),
            found=problem_in(error),
            remedy="look for what is damaged with `modekit verify`",
        ) from None
