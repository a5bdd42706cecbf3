"""What `modekit inspect` finds: inspect.json, and one text token by token. Losses are in nats per token; six digits
of a figure are written.

Shape legend: R routers, T tokens, E experts. `shares_RE` and the like are lists of lists.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Annotated

from pydantic import Field, TypeAdapter

from modekit.evaluation.results_folder import Result
from modekit.evaluation.tables import Cell, ResultTable
from modekit.files.figures import or_dash
from modekit.files.typed import SIX_DIGITS, Figure
from modekit.planning.shape import RouterPosition
from modekit.recipes.layers import order_of

Share = Annotated[float, Field(ge=-1e-3, le=1 + 1e-3), SIX_DIGITS]
Rows = Sequence[Sequence[Share]]
_Body = list[list[str | Cell]]
_MOST_USED = 8


@dataclass(frozen=True)
class TokenLoss:
    """A token, with its loss (None where it is not predicted)."""

    text: str
    loss: Figure | None


@dataclass(frozen=True, kw_only=True)
class TokenTrace:
    """A text token by token: its mean loss, the routers' weights [R][T][E], and what leaving out each expert adds to the loss.

    Of a pair: the source, whose tokens have no loss, and behind it the target; where a router does not read, weights are 0.
    `domain`: of a held-out text.
    """

    domain: str | None = None
    loss: Figure
    tokens: Sequence[TokenLoss]
    weights: Sequence[Rows]
    without: Mapping[str, Figure]


@dataclass(frozen=True, kw_only=True)
class TextTrace(TokenTrace):
    """One text that a user gave.

    Attributes:
        routers: whose weights these are.
        top_k: experts per token; None where they vary.
        base_loss: of the base model on the same tokens; None where it is not at hand.
        entropy: mean over tokens and routers.
    """

    experts: Sequence[str]
    routers: Sequence[RouterPosition]
    top_k: int | None
    base_loss: Figure | None
    entropy: Figure
    notes: Sequence[str]

    def as_data(self) -> dict[str, object]:
        """Plain data for JSON."""
        data: dict[str, object] = TypeAdapter(TextTrace).dump_python(self, mode="json")
        return data


@dataclass(frozen=True, kw_only=True)
class Usage:
    """How the routers treat one domain; lists are per router, of `shares` and `chosen` [R][E].

    Attributes:
        expert: the domain's own; None of an unseen one.
        shares: mean weight of each expert; chosen: fraction of tokens that chose it.
        agreement: fraction of tokens on which the own expert leads.
        without: expert -> what leaving it out adds to the loss; empty where there is one expert.
        inner: of fine-tunes of a mixture, mean weights of its own experts [R][M]; else empty.
    """

    expert: str | None
    loss: Figure
    shares: Rows
    chosen: Rows
    entropy: Sequence[Figure]
    agreement: Sequence[Share] | None
    without: Mapping[str, Figure]
    inner: Rows = ()


@dataclass(frozen=True, kw_only=True)
class Inspection(Result):
    """inspect.json. `similarity` [E][E]: cosine of what two experts changed of the base, empty where a model is gone;
    `top_tokens`: those with the largest mean weight of each expert.
    """

    experts: Sequence[str]
    routers: Sequence[RouterPosition]
    per_domain: Mapping[str, Usage]
    similarity: Sequence[Sequence[Figure]]
    top_tokens: Mapping[str, Sequence[str]]
    texts: Sequence[TokenTrace]

    file = "inspect.json"
    command = "modekit inspect"
    expected = True

    def __post_init__(self) -> None:
        for text in self.texts:
            whole = [[len(self.experts)] * len(text.tokens)] * len(self.routers)
            if [[len(row) for row in rows] for rows in text.weights] != whole:
                raise ValueError("weights of a text must be of every router, token and expert")

    def as_json(self) -> bytes:
        """As it is written: indented it would be three times as long."""
        return (json.dumps(self.as_data(), ensure_ascii=False) + "\n").encode()

    def layers(self) -> dict[str, list[int]]:
        """Layer -> places of its routers; without those that serve several layers."""
        known = {router.layer for router in self.routers if router.layer is not None}
        return {
            str(layer): [place for place, router in enumerate(self.routers) if router.layer == layer]
            for layer in sorted(known, key=order_of)
        }

    def tables(self) -> list[ResultTable]:
        """Weights per domain; what leaving out an expert costs; similarity; tokens; in detail weights by layer."""
        layers = self.layers()
        found = [self._used()]
        if any(usage.without for usage in self.per_domain.values()):
            found.append(self._without())
        if self.similarity:
            rows = zip(self.experts, self.similarity, strict=True)
            alike: _Body = [[name, *(Cell(f"{value:.2f}", share=max(value, 0.0)) for value in row)] for name, row in rows]
            said = "Cosine of what the experts changed of the base model's layers."
            found.append(ResultTable("Similarity of the experts", ["expert", *self.experts], alike, said))
        tokens: _Body = [[name, "  ".join(map(shown, own)) or "-"] for name, own in self.top_tokens.items()]
        said = "Tokens with the largest mean weight of each expert."
        found.append(ResultTable("Tokens that go to each expert", ["expert", "tokens"], tokens, said, prose=True))
        found += [self._domain_by_layer(name, layers) for name in self.per_domain if len(layers) > 1]
        return found + [self._inner(name, layers) for name, usage in self.per_domain.items() if usage.inner]

    def _titles(self) -> list[str]:
        return [name if usage.expert is not None else f"{name}\nunseen" for name, usage in self.per_domain.items()]

    def _used(self) -> ResultTable:
        body: _Body = []
        usages = self.per_domain.values()
        for place, name in enumerate(self.experts):
            shares = [(mean_of(each.shares, place), mean_of(each.chosen, place), each.expert == name) for each in usages]
            cells = [Cell(f"{share:.2f} ({chosen:.2f})", own, share) for share, chosen, own in shares]
            known = [mean_of(each.shares, place) for each in usages if each.expert is not None]
            body.append([name, *cells, f"{fmean(known):.2f}"])
        body.append(["agreement", *("-" if each.agreement is None else f"{fmean(each.agreement):.2f}" for each in usages), ""])
        body.append(["entropy", *(f"{fmean(each.entropy):.2f}" for each in usages), ""])
        said = "Mean weight of each expert per domain; in brackets the fraction of tokens that chose it."
        return ResultTable("Weights of the experts", ["expert", *self._titles(), "used"], body, said)

    def _without(self) -> ResultTable:
        usages = self.per_domain.values()
        most = max((abs(value) for each in usages for value in each.without.values()), default=0.0) or 1.0
        body: _Body = []
        for name in self.experts:
            changes = [(each.without.get(name), each.expert == name) for each in usages]
            cells = [Cell(or_dash(value, "+.3f"), own, change=-(value or 0.0) / most) for value, own in changes]
            body.append([name, *cells])
        body.append(["loss", *(f"{each.loss:.3f}" for each in usages)])
        said = "What leaving out an expert adds to the loss, nats per token."
        return ResultTable("One expert left out", ["left out", *self._titles()], body, said)

    def _domain_by_layer(self, domain: str, layers: Mapping[str, Sequence[int]]) -> ResultTable:
        """The weights by layer, means over a layer's routers."""
        usage, body = self.per_domain[domain], list[list[str | Cell]]()
        for layer, places in layers.items():
            means = [mean_of([usage.shares[place] for place in places], at) for at in range(len(self.experts))]
            named = zip(self.experts, means, strict=True)
            body.append([layer, *(Cell(f"{share:.2f}", name == usage.expert, share) for name, share in named)])
        said = "Mean weight of each expert, layer by layer."
        return ResultTable(f"By layer: {domain}", ["layer", *self.experts], body, said, detail=True)

    def _inner(self, domain: str, layers: Mapping[str, Sequence[int]]) -> ResultTable:
        """Which of the base's own experts a domain uses, layer by layer; the layer in front has none."""
        body: _Body = []
        for layer, (place, *_) in [*layers.items()][1:]:
            row = self.per_domain[domain].inner[place]
            most = sorted(range(len(row)), key=lambda number: -row[number])[:_MOST_USED]
            body.append([layer, "  ".join(f"{number} ({row[number]:.2f})" for number in most)])
        said = "The base's own experts by their number, with their mean weight: those that are used most."
        return ResultTable(f"Own experts: {domain}", ["layer", "experts"], body, said, detail=True, prose=True)


def mean_of(rows: Sequence[Sequence[float]], place: int) -> float:
    """Of an expert, over the routers."""
    return fmean(row[place] for row in rows)


def shown(token: str) -> str:
    """A token with its spaces to be seen, and all that nobody sees written out."""
    return "".join("␣" if c == " " else c if c.isprintable() else c.encode("unicode_escape").decode() for c in token)
