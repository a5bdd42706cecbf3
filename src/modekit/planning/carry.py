"""How much of its experts besides FFNs a plain checkpoint carries: attention, head, embedding, in channels (channels.py).

Shape legend: K units per channel, R_U and R_V channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import BaseModel, Field

from modekit.planning.changes import low_rank, touched
from modekit.recipes.recipe import Recipe
from modekit.sources.adapter import AdapterSource
from modekit.sources.config import Config, whole
from modekit.sources.family import Family
from modekit.sources.names import EMBEDDING, HEAD, in_layer, weight_of
from modekit.sources.source import ModelSource

STREAM_TOKENS = 4_096
"""Of all domains together: pieces of their text, which the base reads at a build that carries more than FFNs."""
PIECE_TOKENS = 136
"""The most of one piece of a document that is measured on."""
SAMPLE_TOKENS, SAMPLE_BYTES = 1_024, 2**28
"""The most of a sample of what its layers read."""
LOST_TOKENS = 2_304
"""The most of every domain on which is measured what full models lose."""
BLOCK = 32
"""Channels are as many as the blocks of quantised weights are wide, so that U and V share none with the evidence."""
TERMS, EXACT_TERMS = 2, 3
"""K: with two units per channel the error is one in a hundred, which truncated changes hide; with three a thousandth."""
FULL_RANK = 64
"""R_U and R_V where changes have no small rank (benchmarks/whole.md)."""


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
    def parts(self) -> str:
        """What of the experts is carried, in words."""
        return ", ".join(["attention", *(["head"] if self.head else []), *(["embedding"] if self.embedding else [])])

    @property
    def is_exact(self) -> bool:
        """Whether there is a channel for all that experts differ by."""
        return self.terms >= EXACT_TERMS

    @property
    def channels(self) -> int:
        """R_U + R_V."""
        return self.outputs + self.inputs

    @property
    def units(self) -> int:
        """By which F grows."""
        return self.terms * self.channels


def blocks_of(channels: int) -> int:
    """As many channels or more, in whole blocks."""
    return math.ceil(channels / BLOCK) * BLOCK


def carried_size(recipe: Recipe, sources: Sequence[ModelSource], family: Family, config: Config) -> CarrySize | None:
    """What a native checkpoint of a recipe carries; None where nothing but the FFN changes, or the recipe wants no more."""
    output = recipe.output
    if not recipe.mixture.is_carried or output.carry == "ffn":
        return None
    experts = [source for source, expert in zip(sources[1:], recipe.experts, strict=True) if not expert.is_base]
    changing = [source for source in experts if isinstance(source, AdapterSource) and reaches(source, sources[0], family)]
    if not changing and output.carry is None:
        return None
    tied = family.is_tied(sources[0])
    own = [any(touched(source, weight_of(module)) for source in experts) for module in (HEAD, EMBEDDING)]
    layers = whole(config, "num_hidden_layers")
    ranks = [[_rank(source, family, parts, layers) for source in experts] for parts in (("o",), ("q", "k", "v"))]
    outputs, inputs = (max(map(sum, zip(*each, strict=True))) for each in ranks)
    needed = (math.inf if own[1] else outputs, math.inf if own[tied] else inputs)  # to carry everything exactly
    most = output.rank or max(FULL_RANK, whole(config, "hidden_size") // 8)
    outputs, inputs = (blocks_of(int(each) if each <= most else output.rank or FULL_RANK) for each in needed)
    terms = EXACT_TERMS if max(needed) <= most else TERMS
    return CarrySize(outputs=outputs, inputs=inputs, terms=terms, head=own[tied], embedding=own[1])


def reaches(source: AdapterSource, base: ModelSource, family: Family) -> bool:
    """Whether an adapter changes more than FFNs."""
    ffn = f".{family.decoder.ffn}."
    changed = {*source.changes, *source.replaced}
    return any(name in base.tensors and ffn not in name for name in changed)


def _rank(source: ModelSource, family: Family, parts: Sequence[str], layers: int) -> list[float]:
    """Per layer, of what a source changes in some parts together; infinite where it has no small rank."""
    found = []
    for layer in range(layers):
        names = [in_layer(layer, f"{family.decoder.parts[part]}.weight") for part in parts]
        changes = [low_rank(source, name) for name in names if touched(source, name)]
        found.append(sum(math.inf if change is None else change.rank for change in changes))
    return found
