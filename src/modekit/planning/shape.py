"""A shape of result as its headers say it: what a plan and a checkpoint ask without knowing which shape they have.

There are two, native_shape.py and modekit_shape.py, and a table of them in shapes.py. What is asked of a mixture that is
loaded stands in loaded/mixture.py. Nothing here imports torch.

Shape legend: E experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from modekit.errors import CheckpointError
from modekit.planning.channels import Channels
from modekit.planning.mixed_tensor import MixedTensor
from modekit.planning.mixture_config import MixtureConfig, Routing
from modekit.planning.slot import RouterPosition, RouterSlot
from modekit.recipes.layers import stack_of
from modekit.recipes.recipe import Recipe
from modekit.sources.family import Family
from modekit.sources.model import TensorRef
from modekit.sources.names import layers_of

BUILD_AGAIN = "build the mixture again"

Tensors = Mapping[str, TensorRef]


def disagreement(where: str, found: object = None) -> CheckpointError:
    """The error where config.json promises other tensors than there are."""
    return CheckpointError("config.json and the weights disagree", where=where, found=found, remedy=BUILD_AGAIN)


def check_sizes(config: Mapping[str, Any], family: Family, tensors: Tensors, where: str) -> None:
    """Raise CheckpointError unless the weights have the layers and the width of which config.json speaks.

    Before anything is made that is as large as it says.
    """
    there = layers_of(tensors)
    for stack in family.stacks:
        layers = 1 + max((number for name, number in map(stack_of, there) if name == stack.name), default=-1)
        if stack.size(config) > layers:
            raise disagreement(f"{where}: {stack.count[0]}", f"{stack.size(config)}, and weights of {layers} layers")
    width = family.hidden(config)
    names = (name for name in tensors if name.startswith(f"{family.embedding}.") and name.endswith(".weight"))
    if width not in {tensors[name].shape[-1] for name in names if tensors[name].shape}:
        raise disagreement(f"{where}: {family.width}", f"{width}, which is not the embedding's")


@dataclass(frozen=True)
class Parameters:
    """How many there are: in all, of each expert's own, active per token at most, and of a dense model of the family."""

    total: int
    per_expert: int
    active: int
    dense: int


@dataclass(frozen=True)
class Shape(ABC):
    """One result: its config.json, the recipe that it came from, and what messages call it (`where`)."""

    config: Mapping[str, Any]
    recipe: Recipe
    where: str

    plain: ClassVar[bool]
    """Whether transformers opens it without code of modekit's."""
    loads_one_expert: ClassVar[bool]
    """Whether one expert at a time is a model of its own in memory, as a fit runs it; else the whole mixture is."""
    skips_experts: ClassVar[bool]
    """Whether what belongs to an expert that no token of a batch takes is not run at all."""
    weights_in_experts: ClassVar[bool]
    """Whether given weights of a linear mixture are in the experts' tensors, and not in the config."""
    code_files: ClassVar[tuple[Path, ...]]
    """What is copied into the checkpoint so that it opens."""

    gguf_apart: ClassVar[bool]
    """Whether llama.cpp runs it as a file of the backbone and one of each adapter, if its experts are adapters."""

    @classmethod
    @abstractmethod
    def is_said_by(cls, native_type: str | None) -> bool:
        """Whether a record with this `native_type` is of this shape."""

    @classmethod
    @abstractmethod
    def opened(
        cls, config: Mapping[str, Any], recipe: Recipe, where: str, native_type: str | None, dense: Mapping[str, Any]
    ) -> Shape:
        """The shape of a finished checkpoint. Raises CheckpointError when config.json or the record does not say it."""

    @property
    @abstractmethod
    def family(self) -> Family:
        """The row of the dense family."""

    @property
    @abstractmethod
    def native_type(self) -> str | None:
        """As modekit.json keeps it."""

    @property
    @abstractmethod
    def also_runs_in(self) -> str:
        """Where the result runs besides transformers."""

    @property
    @abstractmethod
    def without_gguf(self) -> str | None:
        """Why llama.cpp does not run the result; None where it does."""

    @property
    @abstractmethod
    def without_vllm(self) -> str | None:
        """Why vLLM does not serve the result; None where it does."""

    @property
    def through_transformers(self) -> bool:
        """Whether vLLM must run transformers' class, since its own computes something else."""
        return False

    @property
    def left_out(self) -> set[str]:
        """Tensors that transformers' class has and the result need not: without them it computes the same."""
        return set()

    @property
    @abstractmethod
    def channels(self) -> Channels | None:
        """What carries a router's evidence to the gates besides the base's channels, where anything has to."""

    @property
    @abstractmethod
    def mixed(self) -> list[str]:
        """Modules under a layer of which experts have their own."""

    @property
    @abstractmethod
    def slots(self) -> tuple[RouterSlot, ...]:
        """The routers in the order of the layers; none when weights are fixed and no gate is kept."""

    @property
    @abstractmethod
    def positions(self) -> tuple[RouterPosition, ...]:
        """Where the routers stand, or would stand."""

    @property
    @abstractmethod
    def routing(self) -> Routing:
        """How a router turns what it reads into weights."""

    @property
    @abstractmethod
    def mixture(self) -> MixtureConfig:
        """What the experts have at every place. Raises UnsupportedError where they are whole, and no places are said."""

    @abstractmethod
    def rerouted(self, recipe: Recipe, tensors: Tensors) -> Shape:
        """The same experts, whose tensors these are, under another recipe's routing: config and slots as they would be."""

    @abstractmethod
    def other_bases(self, recipe: Recipe) -> list[str]:
        """Places where a recipe needs the base's module and the checkpoint has none, or the reverse."""

    @abstractmethod
    def refusals(self, recipe: Recipe) -> list[str]:
        """Settings of a recipe's mixture that this shape cannot say."""

    @abstractmethod
    def carries(self, recipe: Recipe) -> bool:
        """Whether the backbone carries to the gates all that the routers of a recipe read, and nothing else."""

    @abstractmethod
    def pinned(self, recipe: Recipe) -> Recipe:
        """The recipe such that a build of it gives this shape again, whatever its routing has become."""

    @abstractmethod
    def check(self, tensors: Tensors) -> None:
        """Raise CheckpointError when tensors are missing that config.json promises."""

    @abstractmethod
    def mixed_tensors(self, tensors: Tensors) -> Iterator[MixedTensor]:
        """Every tensor of the base of which experts have their own, and what each has."""

    @abstractmethod
    def parameters(self, sizes: Mapping[str, int], dense: int) -> Parameters:
        """What a checkpoint with tensors of these numbers of elements has; `dense` is the base model's by its files."""

    @property
    def experts(self) -> int:
        """E."""
        return len(self.recipe.experts)
