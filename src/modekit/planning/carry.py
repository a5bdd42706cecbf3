"""What a plain native checkpoint carries besides FFN experts: by which experts differ in attention, head and embedding.

docs/lexical.md says how it works, benchmarks/whole.md has the mathematics. Every layer has two further sets of channels. Into U
its attention writes what the experts' output projections are to make of it; V tells queries, keys and values, or the head, what
the expert differs by. Some more hidden units of every expert read and clear them (weights/bases.py). A layer in front of
the base's first gives V its first content.

Shape legend: D hidden size, F hidden units of an expert, E experts, K units per channel, R_U and R_V channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import BaseModel, Field

from modekit.planning.tensors import low_rank, touched
from modekit.recipes.recipe import Recipe
from modekit.sources.adapter import AdapterSource
from modekit.sources.config import Config, whole
from modekit.sources.family import Family
from modekit.sources.names import EMBEDDING, HEAD, in_layer, weight_of
from modekit.sources.source import ModelSource

BLOCK = 32
"""Channels are as many as the blocks of quantised weights are wide, so that U and V share none with the evidence."""
TERMS, EXACT_TERMS = 2, 3
"""K: with two units per channel the error is one in a hundred, which truncated changes hide; with three a thousandth."""
FULL_RANK = 64
"""R_U and R_V where changes have no small rank (benchmarks/whole.md)."""

STREAM_TOKENS = 4_096
"""Of all domains together: the beginnings of their text, which the base reads at a build."""


class CarrySize(BaseModel, extra="forbid", frozen=True):
    """How much is carried; modekit.json keeps it.

    Attributes:
        outputs, inputs: R_U and R_V.
        terms: K.
        head, embedding: whether what the experts' heads and embeddings differ by is carried, too.
    """

    outputs: int = Field(ge=0, le=2**16, multiple_of=BLOCK)
    inputs: int = Field(ge=0, le=2**16, multiple_of=BLOCK)
    terms: int = Field(ge=1, le=4)
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
    """What a native checkpoint of a recipe carries; None where nothing but the FFN changes, or the recipe wants no more."""
    output = recipe.output
    if output.carry == "ffn":
        return None
    experts = [source for source, expert in zip(sources[1:], recipe.experts, strict=True) if not expert.is_base]
    changing = [source for source in experts if isinstance(source, AdapterSource) and _reaches(source, sources[0], family)]
    if not changing and output.carry is None:
        return None
    tied = family.is_tied(sources[0])
    own = [any(touched(source, weight_of(module)) for source in experts) for module in (HEAD, EMBEDDING)]
    layers = whole(config, "num_hidden_layers")
    size = CarrySize(outputs=0, inputs=0, terms=TERMS, head=own[tied], embedding=own[1])
    needed = _needed(experts, family, layers, size)
    most = output.rank or max(FULL_RANK, whole(config, "hidden_size") // 8)
    return _of_rank(size, needed, most, otherwise=output.rank or FULL_RANK)


def _needed(experts: Sequence[ModelSource], family: Family, layers: int, size: CarrySize) -> tuple[float, float]:
    """R_U and R_V that carry everything exactly; infinite where changes have no small rank."""
    outputs = max(sum(_rank(source, family, layer, ("o",)) for source in experts) for layer in range(layers))
    inputs = max(sum(_rank(source, family, layer, ("q", "k", "v")) for source in experts) for layer in range(layers))
    return math.inf if size.embedding else outputs, math.inf if size.head else inputs


def _of_rank(size: CarrySize, needed: tuple[float, float], most: int, *, otherwise: int) -> CarrySize:
    """All that is needed where that is at most `most`, else `otherwise`."""
    outputs, inputs = (int(each) if each <= most else otherwise for each in needed)
    terms = EXACT_TERMS if max(needed) <= most else TERMS
    return size.model_copy(update={"outputs": blocks_of(outputs), "inputs": blocks_of(inputs), "terms": terms})


def blocks_of(channels: int) -> int:
    """As many channels or more, in whole blocks."""
    return math.ceil(channels / BLOCK) * BLOCK


def _reaches(source: AdapterSource, base: ModelSource, family: Family) -> bool:
    """Whether an adapter changes more than FFNs."""
    ffn = f".{family.mlp_module}."
    changed = {*source.changes, *source.replaced}
    return any(name in base.tensors and ffn not in name for name in changed)


def _rank(source: ModelSource, family: Family, layer: int, parts: Sequence[str]) -> float:
    """Of what a source changes in some parts of a layer together; infinite where it has no small rank."""
    total = 0.0
    for name in (in_layer(layer, f"{family.parts[part]}.weight") for part in parts):
        if touched(source, name):
            change = low_rank(source, name)
            total += math.inf if change is None else change.rank
    return total
