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

from modekit.evaluation.results_folder import CheckpointResult
from modekit.evaluation.tables import Cell, ResultTable
from modekit.files.figures import or_dash
from modekit.files.typed import SIX_DIGITS, Count, Figure
from modekit.planning.shape import RouterPosition
from modekit.recipes.layers import Layer, order_of

Share = Annotated[float, Field(ge=-1e-3, le=1 + 1e-3), SIX_DIGITS]
Rows = Sequence[Sequence[Share]]
_SHOWN = 10  # tokens of an expert
_Body = list[list[str | Cell]]


@dataclass(frozen=True)
class TokenLoss:
    """A token, with its loss (None where it is not predicted)."""

    text: str
    loss: Figure | None


@dataclass(frozen=True, kw_only=True)
class TokenTrace:
    """A text token by token: its mean loss, the routers' weights [R][T][E], and what leaving out each expert adds to the loss.

    Of a pair: the source, whose tokens have no loss, and behind it the target; where a router does not read, weights are 0.
    """

    text: str
    loss: Figure
    tokens: Sequence[TokenLoss]
    weights: Sequence[Rows]
    without: Mapping[str, Figure]


@dataclass(frozen=True, kw_only=True)
class DomainTrace(TokenTrace):
    """A held-out text of a domain."""

    domain: str


@dataclass(frozen=True, kw_only=True)
class TextTrace(TokenTrace):
    """One text that a user gave.

    Attributes:
        routers: whose weights these are; of a long text one, named mean.
        top_k: experts per token; None where they vary.
        base_loss: of the base model on the same tokens; None where it is not at hand.
        entropy: mean over tokens and routers.
        windows: in which the text was read, each starting anew.
        prompt_end: of a chat the weights (E) where the answer begins.
    """

    experts: Sequence[str]
    routers: Sequence[RouterPosition]
    top_k: int | None
    base_loss: Figure | None
    entropy: Figure
    windows: Count
    prompt_end: Sequence[Share] | None
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
        named: fraction of texts that miss their own expert most.
    """

    expert: str | None
    documents: Count
    tokens: Count
    loss: Figure
    shares: Rows
    chosen: Rows
    entropy: Sequence[Figure]
    agreement: Sequence[Share] | None
    without: Mapping[str, Figure]
    named: Share | None


@dataclass(frozen=True)
class Similarity:
    """Cosine of each pair of experts [E][E], what was compared, and what a reader has to know about it."""

    experts: Sequence[Sequence[Figure]]
    of: str
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class TopToken:
    """A token, how often it was seen, an expert's mean weight on it, and that over the expert's mean on all tokens."""

    token: str
    count: Count
    share: Share
    lift: Figure


@dataclass(frozen=True)
class TokenWeight:
    """A token that speaks for an expert in the router's own table, by how much more than for the others."""

    token: str
    weight: Figure


@dataclass(frozen=True, kw_only=True)
class Inspection(CheckpointResult):
    """inspect.json: of `domains`, which have an expert, and `unseen` ones, both in `per_domain`.

    `utilisation` [R][E] is the mean over `domains`; `top_k` is None with top_p; `evidence` is None where the router reads more
    than tokens. `dead`: experts that hardly
    weigh anything in any domain, each with the places of the routers.
    """

    experts: Sequence[str]
    domains: Sequence[str]
    unseen: Sequence[str]
    routers: Sequence[RouterPosition]
    top_k: int | None
    per_domain: Mapping[str, Usage]
    utilisation: Rows
    dead: Mapping[str, Sequence[int]]
    similarity: Similarity
    top_tokens: Mapping[str, Sequence[TopToken]]
    evidence: Mapping[str, Sequence[TokenWeight]] | None
    texts: Sequence[DomainTrace]

    file = "inspect.json"
    command = "modekit inspect"
    expected = True

    def as_json(self) -> bytes:
        """As it is written: indented it would be three times as long."""
        return (json.dumps(self.as_data(), sort_keys=True, ensure_ascii=False) + "\n").encode()

    def tables(self) -> list[ResultTable]:
        """Weights per domain, by layer; what leaving out an expert costs; similarity; tokens; in detail weights by layer."""
        usages = list(self.per_domain.values())
        found = [self._used(usages), *self._by_layer()]
        if any(usage.without for usage in usages):
            found.append(self._without(usages))
        if self.similarity.experts:
            rows = zip(self.experts, self.similarity.experts, strict=True)
            alike: _Body = [[name, *(Cell(f"{value:.2f}", share=max(value, 0.0)) for value in row)] for name, row in rows]
            said = f"Cosine of {self.similarity.of}."
            found.append(ResultTable("Similarity of the experts", ["expert", *self.experts], alike, said))
        said = "Tokens with the largest mean weight of each expert."
        found.append(_tokens("Tokens that go to each expert", said, self.top_tokens))
        if self.evidence is not None:
            said = "Tokens that speak most for each expert, by the router's own table."
            found.append(_tokens("Tokens that speak for each expert", said, self.evidence))
        return [*found, *self._every_layer()]

    def _titles(self) -> list[str]:
        return [f"{name}\nunseen" if name in self.unseen else name for name in self.per_domain]

    def _used(self, usages: Sequence[Usage]) -> ResultTable:
        body: _Body = []
        for place, name in enumerate(self.experts):
            shares = [(mean_of(each.shares, place), mean_of(each.chosen, place), each.expert == name) for each in usages]
            cells = [Cell(f"{share:.2f} ({chosen:.2f})", own, share) for share, chosen, own in shares]
            body.append([name, *cells, f"{mean_of(self.utilisation, place):.2f}"])
        body.append(["agreement", *("-" if each.agreement is None else f"{fmean(each.agreement):.2f}" for each in usages), ""])
        body.append(["entropy", *(f"{fmean(each.entropy):.2f}" for each in usages), ""])
        said = "Mean weight of each expert per domain; in brackets the fraction of tokens that chose it."
        return ResultTable("Weights of the experts", ["expert", *self._titles(), "used"], body, said)

    def _layers(self) -> dict[Layer, dict[str, int]]:
        """Layer -> module -> place of the router; without those that serve several layers."""
        found: dict[Layer, dict[str, int]] = {}
        for place, router in enumerate(self.routers):
            if router.layer is not None:
                found.setdefault(router.layer, {})[router.module] = place
        return {layer: found[layer] for layer in sorted(found, key=order_of)}

    def _by_layer(self) -> list[ResultTable]:
        """Agreement and entropy by layer, where there are several."""
        layers, own = self._layers(), [self.per_domain[name] for name in self.domains]
        if len(layers) < 2:
            return []
        modules = list(dict.fromkeys(module for of_layer in layers.values() for module in of_layer))
        agreement, entropy = [each.agreement or [] for each in own], [each.entropy for each in own]
        body: _Body = []
        for layer, places in layers.items():
            cells = [
                f"{mean_of(agreement, places[module]):.2f} ({mean_of(entropy, places[module]):.2f})"
                if module in places
                else "-"
                for module in modules
            ]
            body.append([str(layer), *cells])
        said = "Agreement with the domain's own expert, entropy in brackets; means over the domains."
        return [ResultTable("Agreement by layer", ["layer", *(module or "router" for module in modules)], body, said)]

    def _without(self, usages: Sequence[Usage]) -> ResultTable:
        most = max((abs(value) for each in usages for value in each.without.values()), default=0.0) or 1.0
        body: _Body = []
        for name in self.experts:
            changes = [(each.without.get(name), each.expert == name) for each in usages]
            cells = [Cell(or_dash(value, "+.3f"), own, change=-(value or 0.0) / most) for value, own in changes]
            body.append([name, *cells])
        body.append(["loss", *(f"{each.loss:.3f}" for each in usages)])
        body.append(["named", *(or_dash(each.named, ".0%") for each in usages)])
        said = "What leaving out an expert adds to the loss, nats per token. named: texts that miss their own expert most."
        return ResultTable("One expert left out", ["left out", *self._titles()], body, said)

    def _every_layer(self) -> list[ResultTable]:
        """Per domain the weights by layer, means over a layer's routers."""
        layers = self._layers()
        found = []
        for domain, usage in self.per_domain.items() if len(layers) > 1 else ():
            body: _Body = []
            for layer, places in layers.items():
                rows = [usage.shares[place] for place in places.values()]
                shares = [mean_of(rows, place) for place in range(len(self.experts))]
                named = zip(self.experts, shares, strict=True)
                body.append([str(layer), *(Cell(f"{share:.2f}", name == usage.expert, share) for name, share in named)])
            said = "Mean weight of each expert, layer by layer."
            found.append(ResultTable(f"By layer: {domain}", ["layer", *self.experts], body, said, detail=True))
        return found


def mean_of(rows: Sequence[Sequence[float]], place: int) -> float:
    """Of an expert, over the routers."""
    return fmean(row[place] for row in rows)


def _tokens(title: str, said: str, found: Mapping[str, Sequence[TopToken] | Sequence[TokenWeight]]) -> ResultTable:
    body: _Body = [[name, "  ".join(shown(each.token) for each in own[:_SHOWN]) or "-"] for name, own in found.items()]
    return ResultTable(title, ["expert", "tokens"], body, said, prose=True)


def shown(token: str) -> str:
    """A token with its spaces to be seen, and all that nobody sees written out."""
    return "".join("␣" if c == " " else c if c.isprintable() else c.encode("unicode_escape").decode() for c in token)
