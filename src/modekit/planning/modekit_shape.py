"""The modekit shape by its headers: what experts have of any module of the base, as `config["modekit"]` says."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate

from modekit.architecture import CODE_FILES
from modekit.errors import CheckpointError, SourceError
from modekit.files.typed import as_kind
from modekit.planning.mixture_config import MixtureConfig, Place, Routing
from modekit.planning.routing_config import leaders_of, needs_base, routing_config, runs_base
from modekit.planning.shape import (
    BUILD_AGAIN,
    AnyShape,
    LowRankPart,
    MixedTensor,
    Parameters,
    RouterPosition,
    RouterSlot,
    Tensors,
    check_sizes,
    disagreement,
    other_record,
)
from modekit.recipes.recipe import Recipe
from modekit.sources.config import Config, check_values, whole
from modekit.sources.family import Family
from modekit.sources.names import split_layer
from modekit.sources.structure import SIZES
from modekit.weights.few_bits import bytes_of_codes

_FIRST = ".experts.0."
_GATE_KEYS = {"router", "width", "rows", "features"}


@dataclass(frozen=True)
class ModekitShape(AnyShape):
    """A mixture in the modekit architecture; `mixture` is `config["modekit"]`."""

    mixture: MixtureConfig

    code_files = CODE_FILES
    native_type = None
    channels = None

    @classmethod
    def opened(cls, config: Config, recipe: Recipe, where: str) -> ModekitShape:
        """By config.json. Raises CheckpointError when it does not say what is mixed, or of other experts."""
        try:
            said = as_kind(config.get("modekit"), MixtureConfig)
        except ValueError as error:
            raise CheckpointError(
                "config.json does not say what is mixed", where=f"{where}: modekit", found=error, remedy=BUILD_AGAIN
            ) from None
        if said.experts != recipe.names:
            found = f"{len(said.experts)} experts of other names or in another order"
            raise other_record(f"{where}: modekit.experts", found)
        if said.labels != recipe.other_labels:
            raise other_record(f"{where}: modekit.labels", f"{len(said.labels)} other labels, or of other experts")
        try:
            if said.derived is None:
                check_values(config, where=where, pair=said.family.pair)
            for key in SIZES if said.derived is not None else ():
                whole(config, key)
        except SourceError as error:
            raise CheckpointError(error.what, where=error.where, found=error.found, remedy=BUILD_AGAIN) from None
        return cls(config, recipe, where, said)

    @property
    def family(self) -> Family:
        """As config.json names it."""
        return self.mixture.family

    @property
    def without_gguf(self) -> str | None:
        """Why llama.cpp does not run it."""
        if self.mixture.family.pair:
            return "it has an encoder"
        adapters = [each.name for each in self.recipe.experts if each.adapter is not None or each.is_low_rank]
        reasons = [f"it keeps adapters ({', '.join(adapters)})"] if adapters else []
        beyond = self.recipe.beyond_native()
        reasons += [f"only the modekit architecture has {', '.join(beyond)}"] if beyond else []
        if not reasons and self.recipe.output.format == "modekit":
            reasons = ["its recipe asks for the modekit architecture (output.format)"]
        return "; ".join(reasons) or f"no native architecture holds this mixture of '{self.family.model_type}' models"

    @property
    def also_runs_in(self) -> str:
        """vLLM, by the plug-in that comes with modekit."""
        return "transformers alone" if self.without_vllm else "vLLM with modekit installed there"

    @property
    def without_vllm(self) -> str | None:
        """Why vLLM does not serve it; None where it does."""
        return self.mixture.without_vllm

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
        said = rerouted(self.mixture, recipe, self.config, tensors)
        return replace(self, config={**self.config, "modekit": said.as_written()}, mixture=said)

    def other_bases(self, recipe: Recipe) -> list[str]:
        """By what the recipe's routers read, and what is always on."""
        family = self.family
        places = self.mixture.places.items()
        return [module for module, place in places if place.base != needs_base(recipe, family, module, place.own)]

    def pinned(self, recipe: Recipe) -> Recipe:
        """With its format written out, as under another routing a native architecture might be chosen."""
        if recipe.output.format != "auto":
            return recipe
        return recipe.model_copy(update={"output": recipe.output.model_copy(update={"format": "modekit"})})

    def check(self, tensors: Tensors) -> None:
        """Raise CheckpointError unless every place has the tensors that the config promises, in shapes that fit together."""
        check_sizes(self.config, self.mixture.family, tensors, self.where)
        leaves = _leaves(tensors)
        for module, place in self.mixture.places.items():
            wrong = next(_missing_of(module, place, tensors, leaves.get(module, [])), None)
            if wrong is not None:
                raise disagreement(f"{self.where}: {wrong}")

    def mixed_tensors(self, tensors: Tensors) -> Iterator[MixedTensor]:
        """Every tensor of every place: the experts' own modules, and their low-rank changes."""
        of_module = _leaves(tensors)
        for module, place in self.mixture.places.items():
            leaves = of_module.get(module, [])
            if (place.few_bits or any(place.ranks)) and "weight" not in leaves:
                leaves = [*leaves, "weight"]
            for leaf in leaves:
                own = {expert: tensors[f"{module}.experts.{n}.{leaf}"] for n, expert in enumerate(place.own)}
                kept = tensors.get(f"{module}.base.{leaf}")
                shape = next(iter(own.values())).shape if kept is None else kept.shape
                low_rank = _low_rank(tensors, module, place) if leaf == "weight" else {}
                yield MixedTensor(place.tensor(module, leaf), shape, own, low_rank)

    def parameters(self, sizes: Mapping[str, int], dense: int) -> Parameters:
        """Adapters are active as a whole: their product with a weight of zero is computed."""
        leaves = _leaves(sizes)
        one = {
            module: sum(sizes[f"{module}{_FIRST}{leaf}"] for leaf in leaves.get(module, [])) for module in self.mixture.places
        }
        total, idle = sum(sizes.values()), sum(size * self._idle(module) for module, size in one.items())
        return Parameters(total, sum(one.values()), total - idle, dense)

    def _idle(self, module: str) -> int:
        """How many of the modules at a place, the experts' own and the base's, a token leaves out at least."""
        place, always_on = self.mixture.places[module], self.routing.always_on
        own, base = len(place.own), int(place.base)
        beside = always_on is not None and always_on.expert is not None and always_on.weight is not None
        chosen = self.recipe.top_k + beside  # an expert that is always on with a share of its own is not among the top k
        if base and runs_base(self.recipe, self.family, module):
            return own - min(chosen, own)
        return own + base - min(chosen, own + base)


def _leaves(tensors: Iterable[str]) -> dict[str, list[str]]:
    """Place -> the tensors that its first expert with a module of its own has there, without the place's name."""
    found: dict[str, list[str]] = {}
    for name in tensors:
        module, sign, leaf = name.partition(_FIRST)
        if sign:
            found.setdefault(module, []).append(leaf)
    return found


def _missing_of(module: str, place: Place, tensors: Tensors, leaves: list[str]) -> Iterator[str]:
    """Names of tensors of a place that are not there, or in another shape than the others."""
    ranks, weight = sum(place.ranks), tensors.get(f"{module}.base.weight")
    if bool(place.own) != bool(leaves):
        yield f"{module}{_FIRST}weight"
    for leaf in leaves if place.own else ():
        shape = tensors[f"{module}{_FIRST}{leaf}"].shape
        names = [f"{module}.experts.{number}.{leaf}" for number in range(len(place.own))]
        names += [f"{module}.base.{leaf}"] if place.base else []
        yield from (name for name in names if name not in tensors or tensors[name].shape != shape)
    if ranks and not (weight is not None and len(weight.shape) == 2):
        yield f"{module}.base.weight"
    elif ranks and weight is not None:
        for side, shape in (("A", (ranks, weight.shape[1])), ("B", (weight.shape[0], ranks))):
            name = f"{module}.lora_{side}"
            if name not in tensors or tensors[name].shape != shape:
                yield name
    for number, expert in enumerate(place.few_bits):
        outputs, inputs = weight.shape if weight is not None and len(weight.shape) == 2 else (0, 0)
        wanted = {"codes": (outputs, place.bits[expert], bytes_of_codes(inputs)), "steps": (outputs,)}
        for leaf, sizes in wanted.items():
            name = f"{module}.differences.{number}.{leaf}"
            if name not in tensors or tensors[name].shape != sizes or (leaf == "codes") != (tensors[name].dtype == "U8"):
                yield name
    bias = tensors.get(f"{module}.lora_bias")
    if place.biased and (bias is None or len(bias.shape) != 2 or bias.shape[0] != len(place.biased)):
        yield f"{module}.lora_bias"


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


def rerouted(mixture: MixtureConfig, recipe: Recipe, config: Config, tensors: Tensors) -> MixtureConfig:
    """The same experts under the routing of another recipe; `config` is the checkpoint's."""
    router, family, scope = recipe.mixture.router, mixture.family, recipe.mixture.router.scope
    hidden, vocabulary = family.hidden(config), whole(config, "vocab_size")
    leaders = leaders_of(mixture.places, scope, family, whole=recipe.mixture.is_whole)
    changed = {}
    for module, place in mixture.places.items():
        said: dict[str, object] = {key: value for key, value in place.as_written().items() if key not in _GATE_KEYS}
        said["router"] = leaders[module]
        weight = _weight_shape(module, tensors)
        if scope == "feature" and recipe.mixture.fit is not None and weight is not None:
            said["features"] = weight[0]
        if leaders[module] == module:
            said["width"] = router.gate_width(vocabulary) or (hidden if weight is None else family.width_in(module, weight))
            said["rows"] = [router.row.rows] * len(place.ranks)
        changed[module] = Place.model_validate(said)
    return mixture.model_copy(update={"routing": routing_config(recipe), "places": changed})


def _weight_shape(module: str, tensors: Tensors) -> tuple[int, ...] | None:
    """Shape of the weight of a place's module, as the base or an expert has it; None for a whole FFN."""
    held = tensors.get(f"{module}.base.weight") or tensors.get(f"{module}.experts.0.weight")
    return held.shape if held is not None else None


def without_names(config: Config) -> dict[str, object]:
    """A mixture's config without what its experts are called, which the recipe says: no result changes with it."""
    said = config.get("modekit")
    own = {key: value for key, value in said.items() if key != "experts"} if isinstance(said, Mapping) else said
    return {**config, "modekit": own}
