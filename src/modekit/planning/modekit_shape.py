"""The modekit shape by its headers: what experts have of any module of the base, as `config["modekit"]` says."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from pydantic import ValidationError

from modekit.architecture import CODE_FILES
from modekit.errors import CheckpointError
from modekit.planning.mixed_tensor import LowRankPart, MixedTensor, TensorPart
from modekit.planning.mixture_config import MixtureConfig, Place, Routing, problem_in
from modekit.planning.reroute import bases_that_differ, rerouted
from modekit.planning.shape import BUILD_AGAIN, Parameters, Shape, Tensors
from modekit.planning.slot import RouterPosition, RouterSlot
from modekit.recipes.recipe import Recipe
from modekit.sources.names import split_layer

_OWN = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class ModekitShape(Shape):
    """A mixture in the modekit architecture; `said` is `config["modekit"]`."""

    said: MixtureConfig

    plain = False
    loads_one_expert = False
    skips_experts = True
    weights_in_experts = False
    code_files = CODE_FILES
    native_type = None
    also_runs_in = "transformers alone"

    @classmethod
    def is_said_by(cls, native_type: str | None) -> bool:
        """Whether the record names no native architecture."""
        return native_type is None

    @classmethod
    def opened(
        cls, config: Mapping[str, Any], recipe: Recipe, where: str, native_type: str | None, dense_type: str
    ) -> ModekitShape:
        """By config.json. Raises CheckpointError when it does not say what is mixed."""
        try:
            return cls(config, recipe, where, MixtureConfig.model_validate(config.get("modekit")))
        except ValidationError as error:
            raise CheckpointError(
                "config.json does not say what is mixed", where=f"{where}: modekit", found=problem_in(error),
                remedy=BUILD_AGAIN,
            ) from None  # fmt: skip

    @property
    def mixture(self) -> MixtureConfig:
        """What the experts have at every place."""
        return self.said

    @property
    def mixed(self) -> list[str]:
        """Every place without its layer."""
        return sorted({split_layer(module)[1] for module in self.mixture.places})

    @property
    def slots(self) -> tuple[RouterSlot, ...]:
        """The routers in the order of the layers."""
        return () if self.routing.method == "linear" else self.mixture.slots()

    @property
    def positions(self) -> tuple[RouterPosition, ...]:
        """By the places that a router serves."""
        return self.mixture.positions()

    @property
    def routing(self) -> Routing:
        """As config.json says it."""
        return self.mixture.routing

    def rerouted(self, recipe: Recipe, tensors: Tensors) -> ModekitShape:
        """With the recipe's routing, and its routers where that puts them."""
        said = rerouted(self.said, recipe, int(self.config["hidden_size"]), tensors)
        return replace(self, config={**self.config, "modekit": said.as_written()}, said=said)

    def other_bases(self, recipe: Recipe) -> list[str]:
        """By what the recipe's routers read, and what is always on."""
        return bases_that_differ(self.said, recipe)

    def refusals(self, recipe: Recipe) -> list[str]:
        """Nothing: this shape says all mixtures."""
        return []

    def pinned(self, recipe: Recipe) -> Recipe:
        """With its format written out, as under another routing a native architecture might be chosen."""
        if recipe.output.format != "auto":
            return recipe
        return recipe.model_copy(update={"output": recipe.output.model_copy(update={"format": "modekit"})})

    def check(self, tensors: Tensors) -> None:
        """Raise CheckpointError unless the adapters' factors have the ranks that the config says."""
        for module, place in self.mixture.places.items():
            for name in (f"{module}.lora_A", f"{module}.lora_B") if any(place.ranks) else ():
                if name not in tensors or sum(place.ranks) != tensors[name].shape[name.endswith("B")]:
                    raise CheckpointError(
                        "config.json and the weights disagree", where=f"{self.where}: {name}", remedy=BUILD_AGAIN
                    )

    def mixed_tensors(self, tensors: Tensors) -> Iterator[MixedTensor]:
        """Every tensor of every place: the experts' own modules, their low-rank changes, and the biases these add."""
        for module, place in self.mixture.places.items():
            prefix = f"{module}.experts.0."
            leaves = [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]
            if any(place.ranks) and "weight" not in leaves:
                leaves.append("weight")
            for leaf in leaves:
                own = {expert: tensors[f"{module}.experts.{n}.{leaf}"] for n, expert in enumerate(place.own)}
                kept = tensors.get(f"{module}.base.{leaf}")
                shape = next(iter(own.values())).shape if kept is None else kept.shape
                yield MixedTensor(
                    f"{module}.{leaf}", shape, TensorPart(kept) if kept is not None else None,
                    {expert: TensorPart(ref) for expert, ref in own.items()},
                    _low_rank(tensors, module, place) if leaf == "weight" else {},
                )  # fmt: skip
            yield from _added_bias(tensors, module, place)

    def parameters(self, tensors: Tensors, dense: int) -> Parameters:
        """Adapters are active as a whole: their product with a weight of zero is computed."""
        total = sum(ref.numel for ref in tensors.values())
        per_expert = sum(ref.numel for name, ref in tensors.items() if _OWN.search(name)) // self.experts
        return Parameters(total, per_expert, self.active(total, per_expert), dense)


def _low_rank(tensors: Tensors, module: str, place: Place) -> dict[int, LowRankPart]:
    if not any(place.ranks):
        return {}
    a, b = (tensors[f"{module}.lora_{side}"] for side in "AB")
    stops = list(accumulate(place.ranks))
    return {
        expert: LowRankPart(place.scales[expert], a, b, slice(stop - rank, stop))
        for expert, (rank, stop) in enumerate(zip(place.ranks, stops, strict=True))
        if rank
    }


def _added_bias(tensors: Tensors, module: str, place: Place) -> Iterator[MixedTensor]:
    """What adapters add where the base has no bias: a row each of one tensor."""
    biased = [expert for expert in place.biased if place.scales[expert]]
    if biased:
        ref = tensors[f"{module}.lora_bias"]
        width, rows = ref.shape[1], {expert: row for row, expert in enumerate(place.biased)}
        added = {expert: TensorPart(ref, rows[expert] * width, 1.0 / place.scales[expert]) for expert in biased}
        yield MixedTensor(f"{module}.bias", (width,), own=added, holds_changes=True)
