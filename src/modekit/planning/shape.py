"""What the headers of a result say in either form: its routers, what experts have of a tensor, how many parameters there are.

The two forms are native_shape.py and modekit_shape.py. What is asked of a mixture that is loaded stands in loaded/mixture.py.

Shape legend: D width of what a router reads, E experts, J parts of a gate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from modekit.errors import CheckpointError
from modekit.recipes.layers import Layer, stack_of
from modekit.recipes.recipe import Recipe
from modekit.sources.adapter import LowRank
from modekit.sources.config import Config, whole
from modekit.sources.family import Family
from modekit.sources.header import TensorRef
from modekit.sources.names import layers_of

BUILD_AGAIN = "build the mixture again"

Tensors = Mapping[str, TensorRef]
Recorded = tuple[dict[str, TensorRef], dict[str, LowRank]]
"""Tensors of the base that an adapter replaces, and its low-rank changes."""


def other_record(where: str, found: object, expected: object = None) -> CheckpointError:
    """The error where config.json says something else than modekit.json."""
    return CheckpointError(
        "config.json and modekit.json disagree",
        where=where,
        found=found,
        expected=expected,
        remedy=BUILD_AGAIN,
    )


@dataclass(frozen=True)
class RouterSlot:
    """One router of the result: its gate tensor (max(features, 1) * E + shared, J * D).

    Attributes:
        name: of the gate tensor.
        width: D.
        experts: E.
        features: decisions, when there is one per output feature; else 0.
        parts: J, causal averages that the gate reads.
        shared: rows that are no expert's (of a cosine router: the projection).
    """

    name: str
    width: int
    experts: int
    features: int = 0
    parts: int = 1
    shared: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """Of the gate."""
        return max(self.features, 1) * self.experts + self.shared, self.parts * self.width


@dataclass(frozen=True)
class RouterPosition:
    """Where a router stands: its gate's name, the one layer that it serves, and what the paths of the places there share."""

    name: str
    layer: Layer | None
    module: str


@dataclass(frozen=True)
class Parameters:
    """In all; of each expert's own; active per token at most; of a model like the base, and idle there, if it is a mixture."""

    total: int
    per_expert: int
    active: int
    dense: int
    idle: int = 0


def unread(name: str, file: Path, dtype: str, shape: tuple[int, ...]) -> TensorRef:
    """A tensor of a file that is not there: reading it raises SourceError."""
    return TensorRef(name, file, dtype, shape, 0, 0)


@dataclass(frozen=True)
class AnyShape:
    """What both forms have: config.json, the recipe that it came from, and what messages call it.

    `plain`: whether transformers opens it without code of modekit's (`code_files`). Then each expert with the backbone is a
    model of its own, and holds the weight that is given to it.
    """

    config: Config
    recipe: Recipe
    where: str

    plain: ClassVar[bool] = False
    code_files: ClassVar[tuple[Path, ...]] = ()

    @property
    def experts(self) -> int:
        """E."""
        return len(self.recipe.experts)

    @property
    def inner(self) -> int:
        """How many experts each of these has of its own: 1, unless the base is a mixture itself and that takes them apart."""
        return 1

    @property
    def family(self) -> Family:
        """Of the base."""
        raise NotImplementedError

    def check_sizes(self, tensors: Tensors) -> None:
        """Raise CheckpointError unless the weights have the layers and the width of config.json, before such a size is made."""
        there = layers_of(tensors)
        family = self.family
        for stack in family.stacks:
            layers = 1 + max((number for name, number in map(stack_of, there) if name == stack.name), default=-1)
            if stack.size(self.config) > layers:
                raise self.disagreement(stack.count[0], f"{stack.size(self.config)}, and weights of {layers} layers")
        names = (name for name in tensors if name.startswith(f"{family.embedding}.") and name.endswith(".weight"))
        widths = {size for name in names for size in tensors[name].shape[-1:]}
        width = whole(self.config, family.width)
        if family.derived is None and width not in widths:
            raise self.disagreement(family.width, f"{width}, which is not the embedding's")

    def disagreement(self, where: str, found: object = None) -> CheckpointError:
        """The error where config.json promises other tensors than there are."""
        return CheckpointError(
            "config.json and the weights disagree",
            where=f"{self.where}: {where}",
            found=found,
            remedy=BUILD_AGAIN,
        )

    def refusals(self, recipe: Recipe) -> list[str]:
        """Settings of a recipe's mixture that this form cannot say."""
        return []

    def pinned(self, recipe: Recipe) -> Recipe:
        """The recipe of which a build gives this form, whatever its routing has become."""
        return recipe
