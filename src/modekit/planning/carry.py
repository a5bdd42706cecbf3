"""What a plain native checkpoint carries besides FFN experts: by which experts differ in attention, head and embedding.

docs/lexical.md says how it works, benchmarks/whole.md has the mathematics. Every layer has two further sets of channels. Into U
its attention writes what the experts' output projections are to make of it; V tells queries, keys and values, or the head, what
the expert differs by. Some more hidden units of every expert read and clear them (weights/pass_through.py). A layer in front of
the base's first gives V its first content.

Shape legend: D hidden size, F hidden units of an expert, E experts, K units per channel, R_U and R_V channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from pydantic import BaseModel, ConfigDict, Field

from modekit.errors import UnsupportedError
from modekit.planning.pieces import low_rank, touched
from modekit.recipes.recipe import Recipe
from modekit.sources.adapter import AdapterSource
from modekit.sources.family import Config, Family, whole
from modekit.sources.model import ModelSource
from modekit.sources.names import EMBEDDING, HEAD, in_layer, weight_of
from modekit.weights.pass_through import TERMS

BLOCK = 32
"""Channels are as many as the blocks of quantised weights are wide, so that U and V share none with the evidence."""
FULL_RANK = 64
"""R_U and R_V where changes have no small rank (benchmarks/whole.md)."""


class CarrySize(BaseModel):
    """How much is carried; modekit.json keeps it.

    Attributes:
        outputs, inputs: R_U and R_V.
        terms: K.
        head, embedding: whether what the experts' heads and embeddings differ by is carried, too.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    outputs: int = Field(ge=0, le=2**16, multiple_of=BLOCK)
    inputs: int = Field(ge=0, le=2**16, multiple_of=BLOCK)
    terms: int = Field(TERMS, ge=1, le=4)
    head: bool = False
    embedding: bool = False

    @property
    def channels(self) -> int:
        """R_U + R_V."""
        return self.outputs + self.inputs

    @property
    def units(self) -> int:
        """By which F grows."""
        return self.terms * self.channels


def carried_size(recipe: Recipe, sources: Sequence[ModelSource], family: Family, config: Config) -> CarrySize | None:
    """What a native checkpoint of a recipe carries; None where nothing but the FFN changes, or the recipe wants no more.

    Raises UnsupportedError when the budget leaves no room.
    """
    output = recipe.output
    if output.carry == "ffn":
        return None
    experts = [source for source, expert in zip(sources[1:], recipe.experts, strict=True) if not expert.is_base]
    changing = [source for source in experts if isinstance(source, AdapterSource) and _reaches(source, sources[0], family)]
    if not changing and output.carry is None:
        return None
    layers = range(whole(config, "num_hidden_layers"))
    outputs = max(sum(_rank(source, sources[0], family, layer, ("o",)) for source in experts) for layer in layers)
    inputs = max(sum(_rank(source, sources[0], family, layer, ("q", "k", "v")) for source in experts) for layer in layers)
    ends = [any(touched(source, weight_of(module)) for source in experts) for module in (HEAD, EMBEDDING)]
    tied = weight_of(HEAD) not in sources[0].tensors
    head, embedding = (ends[0] or (tied and ends[1])), ends[1]
    most = output.rank or max(FULL_RANK, whole(config, "hidden_size") // 8)
    if output.budget is not None:
        raise UnsupportedError("output.budget is yet to come", where="output.budget")
    return CarrySize(
        outputs=_blocks(_within(outputs, most, output.rank) or (FULL_RANK if embedding else 0)),
        inputs=_blocks(_within(inputs, most, output.rank) or (FULL_RANK if head else 0)),
        head=head,
        embedding=embedding,
    )


def _within(needed: float, most: int, rank: int | None) -> int:
    """All where that is little, else a rank that experience shows to suffice."""
    return int(needed) if needed <= most else (rank or FULL_RANK)


def _blocks(channels: int) -> int:
    return math.ceil(channels / BLOCK) * BLOCK


def _reaches(source: AdapterSource, base: ModelSource, family: Family) -> bool:
    """Whether an adapter changes more than FFNs."""
    ffn = f".{family.mlp_module}."
    changed = {*source.changes, *source.replaced, *source.bias_changes}
    return any(name in base.tensors and ffn not in name for name in changed)


def _rank(source: ModelSource, base: ModelSource, family: Family, layer: int, parts: Sequence[str]) -> float:
    """Of what a source changes in some parts of a layer together; infinite where it has no small rank."""
    total = 0.0
    for name in _weights(family, layer, parts):
        if touched(source, name):
            change = low_rank(source, name)
            total += math.inf if change is None else change.rank
    return total


def _weights(family: Family, layer: int, parts: Sequence[str]) -> Iterator[str]:
    for part in parts:
        yield in_layer(layer, f"{family.parts[part]}.weight")
