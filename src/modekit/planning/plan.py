"""A plan: every tensor of the result and where it comes from, and what that takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from modekit.planning.carry import CarrySize
from modekit.planning.modekit_shape import ModekitShape
from modekit.planning.native_shape import NativeShape
from modekit.planning.routed import RoutedShape
from modekit.planning.tensors import PlannedTensor, Shard
from modekit.recipes.recipe import Recipe
from modekit.sources.config import Config
from modekit.sources.family import Family
from modekit.sources.header import FileState
from modekit.sources.source import ModelSource
from modekit.sources.vocabulary import Vocabulary
from modekit.weights.made import Zeros

ROUTER_FILE = "model-router.safetensors"

Shape = NativeShape | ModekitShape
"""Of a result: their members are one, and a plan and a checkpoint ask without knowing which they have."""


def open_shape(
    config: Config, recipe: Recipe, where: str, native_type: str | None, dense: Config, carry: CarrySize | None
) -> Shape:
    """Of a checkpoint, by config.json and by what its record says; `dense` is the base's config. Raises CheckpointError."""
    if native_type is None:
        return ModekitShape.opened(config, recipe, where)
    kind = RoutedShape if native_type == dense.get("model_type") else NativeShape
    return kind.opened(config, recipe, where, native_type, dense, carry)


@dataclass(frozen=True)
class Reused:
    """A mixture whose tensors a plan takes as they are (reuse.py): `files` are shards of the plan that are files of it, `names`
    say of a tensor of the plan which of the mixture's is in it, `otherwise` are the shards of a plan that took nothing.
    """

    model: ModelSource
    files: frozenset[str]
    names: Mapping[str, str] = field(default_factory=dict)
    otherwise: tuple[Shard, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Everything that `build` needs to know. `sources[0]` is the base model, `sources[1 + e]` expert e's.

    `shape` is that of the result; `why` says why it was chosen, `otherwise` what is built where a measurement is against it.
    `reused` is set where the plan changes a mixture that is there. `copied_files` go along; `vocabulary` says whose they are;
    `tell` makes the notes.
    """

    recipe: Recipe
    root: Path
    family: Family
    shape: Shape
    why: str
    sources: tuple[ModelSource, ...]
    shards: tuple[Shard, ...]
    router_dtype: str
    copied_files: tuple[Path, ...]
    tell: Callable[[], Iterable[str]] = field(compare=False, repr=False)
    trust_remote_code: bool = False
    reused: Reused | None = None
    vocabulary: Vocabulary | None = None
    otherwise: Plan | None = None

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What a user should know, whichever form it takes. Made when somebody asks, as it reads a little of each model."""
        return tuple(each for each in self.tell() if self.otherwise is None or each in self.otherwise.notes)

    @property
    def models(self) -> tuple[ModelSource, ...]:
        """All that tensors are taken from."""
        return self.sources if self.reused is None else (*self.sources, self.reused.model)

    @property
    def written_files(self) -> Mapping[str, bytes]:
        """Files beside the weights that no model has like this -> their content."""
        return {} if self.vocabulary is None else self.vocabulary.tokenizer.written

    @property
    def config(self) -> Config:
        """config.json of the result."""
        return self.shape.config

    @cached_property
    def tensors(self) -> tuple[PlannedTensor, ...]:
        """All tensors of the result, the gates last."""
        code = self.router_dtype
        slots = self.shape.slots
        gates = (PlannedTensor(slot.name, code, slot.shape, "router", Zeros(slot.shape)) for slot in slots)
        return (*(tensor for shard in self.shards for tensor in shard.tensors), *gates)

    @cached_property
    def source_states(self) -> dict[Path, FileState | None]:
        """Every weight file of the sources, and its state when its header was read."""
        return {file: source.states[file] for source in self.sources for file in source.files}

    @property
    def bytes_written(self) -> int:
        """Size of the weights."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def parameters(self) -> dict[str, int]:
        """total, active (per token), per expert (of its own, adapters aside), adapters, backbone, router."""
        by_role = Counter[str]()
        for tensor in self.tensors:
            by_role[tensor.role] += tensor.numel
        counted = self.shape.parameters({tensor.name: tensor.numel for tensor in self.tensors}, 0)
        found = {"total": counted.total, "active": counted.active, "per_expert": counted.per_expert}
        return {**found, "adapters": by_role["adapter"], "backbone": by_role["backbone"], "router": by_role["router"]}
