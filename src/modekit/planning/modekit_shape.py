"""The modekit architecture by the headers of a result: what experts have of any module of the base."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from os.path import commonpath
from pathlib import Path

from modekit.architecture import CODE_FILES
from modekit.errors import CheckpointError, SourceError, UnsupportedError
from modekit.files.typed import as_kind
from modekit.planning.leaders import leaders_of, needs_base, runs_base
from modekit.planning.mixture_config import GATE, MixtureConfig, Place, Routing, routing_config
from modekit.planning.shape import (
    BUILD_AGAIN,
    AnyShape,
    Parameters,
    Recorded,
    RouterPosition,
    RouterSlot,
    Tensors,
    other_record,
    unread,
)
from modekit.recipes.layers import Layer
from modekit.recipes.recipe import Expert, Recipe
from modekit.sources.adapter import LowRank
from modekit.sources.compatible import check_values
from modekit.sources.config import Config, whole
from modekit.sources.family import Family
from modekit.sources.header import TensorRef
from modekit.sources.names import natural_key, split_layer
from modekit.sources.source import ModelSource
from modekit.sources.structure import SIZES
from modekit.weights.factorise import bytes_of_codes

_FIRST = ".experts.0."
_GATE_KEYS = {"router", "width", "features"}


@dataclass(frozen=True)
class ModekitShape(AnyShape):
    """A mixture in the modekit architecture; `mixture` is `config["modekit"]`."""

    mixture: MixtureConfig

    code_files = CODE_FILES
    native_type = None
    routed = None
    channels = None
    vllm_differs = None
    left_out = frozenset[str]()

    @classmethod
    def opened(cls, config: Config, recipe: Recipe, where: str) -> ModekitShape:
        """By config.json. Raises CheckpointError when it does not say what is mixed, or of other experts."""
        try:
            said = as_kind(config.get("modekit"), MixtureConfig)
        except ValueError as error:
            raise CheckpointError(
                "config.json does not say what is mixed",
                where=f"{where}: modekit",
                found=error,
                remedy=BUILD_AGAIN,
            ) from None
        if said.experts != recipe.names or said.labels != recipe.other_labels:
            raise other_record(
                f"{where}: modekit.experts",
                f"{len(said.experts)} experts, of other names or labels, or in another order",
            )
        try:
            if said.derived is None:
                check_values(config, said.family, where=where)
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
        if beyond := self.recipe.beyond_plain():
            return f"only the modekit architecture has {', '.join(beyond)}"
        return f"it keeps adapters ({', '.join(adapters)})" if adapters else "it is in the modekit architecture (output.format)"

    @property
    def also_runs_in(self) -> str:
        """vLLM, by the plug-in that comes with modekit."""
        return "transformers alone" if self.without_vllm else "vLLM with modekit installed there"

    @property
    def without_vllm(self) -> str | None:
        """Why vLLM does not serve it; None where it does."""
        return self.mixture.without_vllm

    def _routers(self) -> Iterator[tuple[RouterSlot, RouterPosition]]:
        """In the order of the layers; of fixed weights, which have no gates, where they would stand."""
        served: dict[str, list[tuple[Layer | None, str]]] = {}
        for module, place in self.mixture.places.items():
            served.setdefault(place.router, []).append(split_layer(module))
        for module in sorted(served, key=natural_key):
            place = self.mixture.places[module]
            layers, paths = zip(*served[module], strict=True)
            assert place.width is not None, module  # checked when the config was read
            parts = len(self.routing.averages)
            shared = self.routing.dimensions or 0
            slot = RouterSlot(module + GATE, place.width, self.experts, place.features, parts, shared)
            is_one = len({*layers}) == 1
            common = commonpath([path.replace(".", "/") for path in paths]) if is_one else ""
            layer = layers[0] if is_one else None
            yield slot, RouterPosition(slot.name, layer, common.replace("/", "."))

    @property
    def slots(self) -> tuple[RouterSlot, ...]:
        """The routers in the order of the layers."""
        return () if self.routing.method == "linear" else tuple(slot for slot, _ in self._routers())

    @property
    def positions(self) -> tuple[RouterPosition, ...]:
        """By the places that a router serves."""
        return tuple(position for _, position in self._routers())

    @property
    def routing(self) -> Routing:
        """As config.json says it."""
        return self.mixture.routing

    def rerouted(self, recipe: Recipe, tensors: Tensors) -> ModekitShape:
        """With the recipe's routing, and its routers where that puts them."""
        leaders = leaders_of(self.mixture.places, recipe, self.family)
        changed = {}
        for module, place in self.mixture.places.items():
            held = tensors.get(f"{module}.base.weight") or tensors.get(f"{module}.experts.0.weight")
            kept = {key: value for key, value in place.as_written().items() if key not in _GATE_KEYS}
            gate = gate_of(module, None if held is None else held.shape, leaders[module], recipe, self.family, self.config)
            changed[module] = Place.model_validate(kept | gate)
        said = self.mixture.model_copy(update={"routing": routing_config(recipe), "places": changed})
        return replace(self, config={**self.config, "modekit": said.as_written()}, mixture=said)

    def other_tensors(self, recipe: Recipe) -> bool:
        """Whether a recipe with the same experts needs other tensors, gates aside: by what routers read and is always on."""
        places = self.mixture.places.items()
        return any(place.base != needs_base(recipe, self.family, module, place.own) for module, place in places)

    def pinned(self, recipe: Recipe) -> Recipe:
        """With its format written out, as under another routing a native architecture might be chosen."""
        if recipe.output.format != "auto":
            return recipe
        return recipe.model_copy(update={"output": recipe.output.model_copy(update={"format": "modekit"})})

    def check(self, tensors: Tensors) -> None:
        """Raise CheckpointError unless every place has the tensors that the config promises, in shapes that fit together."""
        self.check_sizes(tensors)
        leaves = _leaves(tensors)
        for module, place in self.mixture.places.items():
            for name, shape in _promised(module, place, tensors, leaves.get(module, [])).items():
                found = tensors.get(name)
                if found is None or found.shape != shape or (found.dtype == "U8") != name.endswith(".codes"):
                    raise self.disagreement(name)

    def recorded(self, expert: int, base: ModelSource, tensors: Tensors, file: Path) -> Recorded:
        """What is known of an adapter that is no longer there, with the file that it lay in: tensors of the base that it
        replaced, and its low-rank changes.
        """
        replaced = dict[str, TensorRef]()
        changes = dict[str, LowRank]()
        leaves = _leaves(tensors)

        def factors(name: str, of: str, rank: int) -> tuple[TensorRef, TensorRef]:
            a, b = (tensors[f"{of}.lora_{each}"] for each in "AB")
            of_a = unread(f"{name} A", file, a.dtype, (rank, a.shape[1]))
            return of_a, unread(f"{name} B", file, b.dtype, (b.shape[0], rank))

        for module, place in self.mixture.places.items():
            for leaf in leaves.get(module, []) if expert in place.own else ():
                name = place.tensor(module, leaf)
                shape = tensors[f"{module}{_FIRST}{leaf}"].shape
                replaced[name] = unread(name, file, base.tensor(name).dtype, shape)
            if place.ranks[expert]:
                name = place.tensor(module, "weight")
                changes[name] = LowRank(*factors(name, module, place.ranks[expert]), place.scales[expert])
            for each in place.inside:
                if each.ranks[expert]:
                    name = place.tensor(module, each.tensor)
                    shape = base.tensor(name).shape
                    experts = shape[0] if len(shape) == 3 else 0
                    a, b = factors(name, f"{module}.{each.name}", each.ranks[expert] * (experts or 1))
                    turned = a.shape[1] != shape[-1]
                    changes[name] = LowRank(a, b, each.scales[expert], transposed=turned, experts=experts)
        return replaced, changes

    def parameters(self, sizes: Mapping[str, int], dense: int) -> Parameters:
        """Adapters are active as a whole: their product with a weight of zero is computed. Of a table a token reads a row."""
        leaves = _leaves(sizes)
        fit = self.recipe.mixture.fit
        tables = sum(sizes[slot.name] for slot in self.slots) if fit is not None and fit.reads_ids else 0
        one = {
            module: sum(sizes[f"{module}{_FIRST}{leaf}"] for leaf in leaves.get(module, [])) for module in self.mixture.places
        }
        total = sum(sizes.values())
        idle = sum(size * self._idle(module) for module, size in one.items())
        return Parameters(total, sum(one.values()), total - tables - idle, dense)

    def _idle(self, module: str) -> int:
        """How many of the modules at a place, the experts' own and the base's, a token leaves out at least."""
        place = self.mixture.places[module]
        always_on = self.routing.always_on
        beside = always_on is not None and always_on.expert is not None and always_on.weight is not None
        chosen = self.recipe.top_k + beside  # an expert that is always on with a share of its own is not among the top k
        chosen_from = len(place.own) + (place.base and not runs_base(self.recipe, self.family, module))
        return chosen_from - min(chosen, chosen_from)


def _leaves(tensors: Iterable[str]) -> dict[str, list[str]]:
    """Place -> the tensors that its first expert with a module of its own has there, without the place's name."""
    found: dict[str, list[str]] = {}
    for name in tensors:
        module, sign, leaf = name.partition(_FIRST)
        if sign:
            found.setdefault(module, []).append(leaf)
    return found


def _promised(module: str, place: Place, tensors: Tensors, leaves: list[str]) -> dict[str, tuple[int, ...]]:
    """Tensors that a place must have, and their shapes: those of the base's weight, or of the first expert's."""
    found: dict[str, tuple[int, ...]] = {}
    if bool(place.own) != bool(leaves):
        return {f"{module}{_FIRST}weight": ()}
    for leaf in leaves:
        shape = tensors[f"{module}{_FIRST}{leaf}"].shape
        found |= dict.fromkeys((f"{module}.experts.{number}.{leaf}" for number in range(len(place.own))), shape)
        found |= {f"{module}.base.{leaf}": shape} if place.base else {}
    weight = tensors.get(f"{module}.base.weight")
    ranks = sum(place.ranks)
    bias = tensors.get(f"{module}.lora_bias")
    rows, columns = weight.shape if weight is not None and len(weight.shape) == 2 else (0, 0)
    if ranks:
        found |= {f"{module}.base.weight": (rows, columns)}
        found |= {f"{module}.lora_A": (ranks, columns), f"{module}.lora_B": (rows, ranks)}
    for inside in place.inside:
        held = tensors.get(f"{module}.base.{inside.tensor}")
        name = f"{module}.{inside.name}"
        shape = (0, 0) if held is None else held.shape
        a = tensors.get(f"{name}.lora_A")
        count = sum(inside.ranks) * (shape[0] if len(shape) == 3 else 1)
        inputs, outputs = shape[:-3:-1] if a is None or a.shape[1:] == shape[-1:] else shape[-2:]
        found |= {f"{name}.lora_A": (count, inputs), f"{name}.lora_B": (outputs, count)}
    for number, expert in enumerate(expert for expert, bits in enumerate(place.bits) if bits):
        name = f"{module}.differences.{number}"
        found |= {f"{name}.codes": (rows, place.bits[expert], bytes_of_codes(columns)), f"{name}.steps": (rows,)}
    if place.biased:
        found[f"{module}.lora_bias"] = (len(place.biased), *(() if bias is None else bias.shape[1:2]))
    return found


def gate_of(
    module: str, weight: tuple[int, ...] | None, leader: str, recipe: Recipe, family: Family, config: Config
) -> dict[str, object]:
    """What a place says of its router; `weight`: the shape of the module's weight, None for a whole FFN."""
    router = recipe.mixture.router
    said = dict[str, object]()
    if router.scope == "feature" and recipe.mixture.fit is not None and weight is not None:
        said["features"] = weight[0]
    if leader == module:
        width = whole(config, family.width) if weight is None else weight[0 if family.keeps_columns(module) else -1]
        ids = router.buckets if router.hashes else whole(config, "vocab_size")
        said["width"] = ids if router.row.reads_ids else width
    return {"router": leader, **said}


def without_names(config: Config) -> dict[str, object]:
    """A mixture's config without what its experts are called, which the recipe says: no result changes with it."""
    said = config.get("modekit")
    own = {key: value for key, value in said.items() if key != "experts"} if isinstance(said, Mapping) else said
    return {**config, "modekit": own}


def whole_module_unscored(expert: Expert, module: str) -> UnsupportedError:
    """The error for a fit that scores low-rank changes where an expert has a module of its own."""
    return UnsupportedError(
        "the expert's part is no low-rank change that this router could score",
        where=f"expert '{expert.name}': {module}",
        remedy="choose a router fit that reads text (lexical or logistic), keep a low-rank part of a model (as: lora), "
        "or train adapters as plain LoRA (without DoRA and modules_to_save)",
    )
