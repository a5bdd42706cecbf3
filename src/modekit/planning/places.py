"""The places of a mixture in the modekit architecture: which modules of the base they are, and what each expert has there.

A *place* is a module of the base of which experts have their own, kept whole, low-rank or in few bits. Which router decides
there follows from the recipe's `per`: the first place that a router serves is its leader.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice, takewhile
from typing import cast

from modekit.errors import MismatchError, UnsupportedError
from modekit.planning.mixture_config import readers
from modekit.planning.routing_config import first_to_run, leaders_of, needs_base
from modekit.planning.tensors import low_rank, touched
from modekit.recipes.layers import Layer, named_layers
from modekit.recipes.recipe import Recipe
from modekit.sources.adapter import AdapterSource, LowRank
from modekit.sources.config import whole
from modekit.sources.family import Family, Stack
from modekit.sources.header import TensorRef
from modekit.sources.names import (
    HEAD,
    LOGITS_BIAS,
    POSITIONS,
    in_decoder,
    is_ignored,
    module_of,
    natural_key,
    split_layer,
    weight_of,
)
from modekit.sources.source import ModelSource


@dataclass(frozen=True)
class InBits:
    """A difference kept in so many bits per number."""

    bits: int


Kind = LowRank | InBits | str | int | None
"""What an expert has at a place: its low-rank change, its difference in a few bits, "own" a module of its own, a rank to
factorise to, or the base's."""


@dataclass(frozen=True)
class PlannedPlace:
    """A module of the base, the tensors in it, and what each expert has there.

    `calls`: where the layer calls several modules itself that are one place here, their names; `module` is the first of them.
    """

    module: str
    refs: tuple[TensorRef, ...]
    kinds: tuple[Kind, ...]
    calls: tuple[str, ...] = ()

    @property
    def is_mixed(self) -> bool:
        """Whether any expert differs from the base here."""
        return any(kind is not None for kind in self.kinds)

    @property
    def own(self) -> list[int]:
        """Experts with a module of their own."""
        return [expert for expert, kind in enumerate(self.kinds) if kind == "own"]

    @property
    def ranks(self) -> list[int]:
        """Per expert the rank of its change; 0 without one."""
        return [kind.rank if isinstance(kind, LowRank) else kind if isinstance(kind, int) else 0 for kind in self.kinds]

    @property
    def bits(self) -> list[int]:
        """Per expert those of each number of its difference; 0 without one."""
        return [kind.bits if isinstance(kind, InBits) else 0 for kind in self.kinds]

    @property
    def prefix(self) -> str:
        """What the names of its tensors begin with."""
        return f"{module_of(self.module) if self.calls else self.module}."

    def within(self, tensor: str) -> str:
        """A tensor's name inside the place; of the bias of logits, which stands with the head, the last part."""
        return tensor.removeprefix(self.prefix) if tensor.startswith(self.prefix) else tensor.rpartition(".")[2]

    @property
    def weight(self) -> TensorRef | None:
        """Of the base's module; None where it has several."""
        return next((ref for ref in self.refs if ref.name == weight_of(self.module)), None)

    @property
    def matrix(self) -> TensorRef:
        """The weight of a linear map, or of an embedding."""
        return cast(TensorRef, self.weight)


def _check_kind(recipe: Recipe, family: Family) -> None:
    """Raise UnsupportedError for what no mixture with an encoder, or of a class without a row, can be yet."""
    mixture, router, fit = recipe.mixture, recipe.mixture.router, recipe.mixture.fit
    decides_once = mixture.method == "linear" or (fit is not None and fit.for_model)
    said = f"this is granularity: {router.granularity}, a router per {router.scope}"
    of_pairs = (
        (
            fit is not None and fit.reads == "ids",
            "an encoder reads a source at once, which has no token that decides for all",
            *("router", "choose another fit, or granularity: sequence"),
        ),
        (
            mixture.modules == "decoder",
            "modules: decoder is for models that are a decoder alone, and this one has an encoder",
            *("modules", "write modules: all (whole models), or layers: [decoder] with modules: auto"),
        ),
        (
            not decides_once and (router.granularity == "sequence") != (router.scope == "model"),
            f"with an encoder one router serves all layers where it decides once per source, and only there; {said}",
            *("router", "write granularity: sequence and per: model together, or neither"),
        ),
        (
            mixture.always_on is not None and bool(mixture.always_on.apart),
            "a common expert that runs apart is for models without an encoder",
            *("always_on", "leave 'apart' out"),
        ),
    )
    for holds, what, where, remedy in of_pairs if family.pair else ():
        if holds:
            raise UnsupportedError(what, where=f"mixture.{where}", remedy=remedy)


class Places:
    """The places of one recipe in the order in which they run. Raises UnsupportedError when there are none."""

    def __init__(self, recipe: Recipe, sources: tuple[ModelSource, ...], family: Family) -> None:
        self._recipe, self._sources, self._family = recipe, sources, family
        self._base, self._whole = sources[0], recipe.mixture.is_whole
        _check_kind(recipe, family)
        self._check_modules()
        self._shared = {family.embedding, family.head} if recipe.mixture.modules == "decoder" else set()
        self.unties = family.ties if recipe.mixture.modules == "all" and family.is_tied(self._base) else {}

    def __iter__(self) -> Iterator[PlannedPlace]:
        return iter(self._all)

    @cached_property
    def by_tensor(self) -> dict[str, PlannedPlace]:
        """The place that a tensor of the base belongs to; a tied head that is untied here is found by its own name."""
        found = {ref.name: place for place in self for ref in place.refs if ref.name.startswith(place.prefix)}
        head = next((place for place in self if place.module == HEAD), None)
        return found if head is None else {**found, LOGITS_BIAS: head}

    def original(self, ref: TensorRef) -> TensorRef:
        """The tensor of the base that a place's tensor is, which has another name where models tie what is untied here."""
        return self._base.tensor(self.unties.get(ref.name, ref.name))

    @cached_property
    def leaders(self) -> dict[str, str]:
        """Place -> the place whose router decides for it."""
        scope = self._recipe.mixture.router.scope
        return leaders_of([place.module for place in self], scope, self._family, whole=self._whole)

    def keeps_base(self, place: PlannedPlace) -> bool:
        """Whether the base's module stays beside what the experts have."""
        return needs_base(self._recipe, self._family, place.module, place.own)

    def width(self, place: PlannedPlace) -> int:
        """Width of the gate of a router at this place: of what it reads, unless its fit says another."""
        said = self._recipe.mixture.router.gate_width(whole(self._base.config, "vocab_size"))
        if said is not None:
            return said
        weight = place.weight  # None: a whole FFN
        return self._family.hidden(self._base.config) if weight is None else self._family.width_in(place.module, weight.shape)

    def rows(self, leader: PlannedPlace) -> list[int]:
        """Rows of a leader's gate per expert."""
        return [self._recipe.mixture.router.row.rows] * len(leader.ranks)

    def read_by(self, leader: PlannedPlace) -> list[PlannedPlace]:
        """The places whose changes a router at `leader` could score."""
        by_name = {place.module: place for place in self}
        return [by_name[name] for name in readers(leader.module, self._family, self.leaders)]

    @property
    def splits_ffn(self) -> bool:
        """Whether the FFN is mixed projection by projection: for low-rank experts, and routers finer than a module."""
        low = any(expert.adapter is not None or expert.is_low_rank for expert in self._recipe.experts)
        return low or self._recipe.mixture.router.scope in {"projection", "feature"}

    @cached_property
    def wanted(self) -> set[str]:
        """Parts of a layer; `mlp` is the whole FFN. Unless the recipe says them: the FFN for full models, for adapters what
        they change, for parts of models every linear part.
        """
        modules, wanted = self._recipe.mixture.modules, set[str]()
        if isinstance(modules, list):
            return set(modules)
        for expert, source in zip(self._recipe.experts, self._sources[1:], strict=True):
            if isinstance(source, AdapterSource):
                changed = {(layer, module_of(path)) for layer, path in map(split_layer, source.changes) if layer is not None}
                paths = {(self._family.stack_of(layer).name, path) for layer, path in changed}
                for stack in self._family.stacks:
                    wanted |= {part for part, path in stack.parts.items() if (stack.name, path) in paths}
            elif not expert.is_base:
                wanted |= set(self._family.all_parts) if expert.is_low_rank else {"mlp"}
        if "mlp" in wanted:
            wanted -= {part for stack in self._family.stacks for part in stack.ffn_parts}
        return wanted or {"mlp"}

    def _in_order(self, stack: Stack) -> list[tuple[str, str]]:
        """Part and its module under a layer, in the order in which they run; fused ones once."""
        wanted = self.wanted
        if "mlp" in wanted and self.splits_ffn:
            wanted = (wanted - {"mlp"}) | stack.ffn_parts
        chosen = {"mlp": stack.ffn} if "mlp" in wanted and stack.ffn else {}
        for part in stack.parts:
            if part in wanted and stack.parts[part] not in chosen.values():
                chosen[part] = stack.parts[part]
        return sorted(chosen.items(), key=lambda entry: stack.rank(entry[1]))

    def _check_modules(self) -> None:
        modules, family = self._recipe.mixture.modules, self._family
        if not isinstance(modules, list):
            return
        if unknown := [part for part in modules if part != "mlp" and part not in family.all_parts]:
            raise UnsupportedError(
                f"'{family.model_type}' has no such part",
                where="mixture.modules",
                found=", ".join(unknown),
                expected=", ".join(["mlp", *family.all_parts]),
                remedy="correct the list",
            )
        for part in modules:
            path = family.parts.get(part)
            partners = [other for other, its in family.parts.items() if its == path and other not in modules]
            if path is not None and partners:
                raise UnsupportedError(
                    f"'{family.model_type}' keeps these parts in one module ({path})",
                    where="mixture.modules",
                    found=part,
                    expected=f"{', '.join([part, *partners])} together",
                    remedy="name them all, or none",
                )

    @cached_property
    def _all(self) -> list[PlannedPlace]:
        places = list(self._of_everything() if self._whole else self._of_layers())
        for expert, said in enumerate(self._recipe.experts):
            if all(place.kinds[expert] is None for place in places):
                self._check_has_nothing(
                    f"experts[{expert}] '{said.name}'", layers=said.layers is not None, low=said.is_low_rank
                )
        if not any(place.is_mixed for place in places):
            raise UnsupportedError(
                "no expert differs from the base in the mixed modules",
                where="mixture.modules",
                remedy="mix other modules or layers, or add an expert that is not 'base'",
            )
        self._check_reader(places[0].module)
        return places

    def _check_has_nothing(self, where: str, *, layers: bool, low: bool) -> None:
        """Raise UnsupportedError for an expert that would be the base: its layers, or low-rank parts, have no mixed place."""
        said = {
            "layers": (layers, "the expert has nothing of its own in its layers that is mixed", "name other layers, or none"),
            "as": (low, "nothing of the expert can be kept as a low-rank part", "leave 'as: lora' out: it is kept whole"),
        }
        for key, (holds, what, remedy) in said.items():
            if holds:
                raise UnsupportedError(what, where=f"{where}: {key}", remedy=remedy)

    def _check_reader(self, first: str) -> None:
        """Raise UnsupportedError where one router, at the first place, is to decide by a source that it does not read."""
        mixture = self._recipe.mixture
        once = mixture.fit is not None and mixture.router.scope == "model" and not mixture.router.row.reads_ids
        if self._family.pair and once and in_decoder(first):
            raise UnsupportedError(
                "one router for all layers decides by the source, and must be in the encoder",
                where="mixture.router.per",
                found=f"the first place that is mixed is {first}",
                remedy="mix a part of the encoder, too, leave 'per' out, or choose fit: lexical",
            )

    def _of_everything(self) -> Iterable[PlannedPlace]:
        """What runs first has the router, whether experts have a module of their own there or not."""
        modules = self._all_modules()
        own = [module for module in modules if module not in self._shared]
        first = first_to_run(own, self._family)
        if first != next((each for each in self._family.called if each in own), first or None):
            what = "modules: decoder has its router at the norm or the attention with which the first layer begins"
            found = f"a pass of a '{self._family.model_type}' model begins with another module"
            raise UnsupportedError(what, where="mixture.modules", found=found, remedy="write modules: all (whole models)")
        return (place for place in map(self._place, modules) if place.module == first or place.is_mixed)

    def _of_layers(self) -> Iterator[PlannedPlace]:
        for layer in named_layers(self._recipe.mixture.layers, self._family.sizes(self._base.config)):
            stack = self._family.stack_of(layer)
            for part, path in self._in_order(stack):
                module = self._family.in_layer(layer, path)
                if self._within(module):
                    place = self._place(module, stack.ffn_calls if part == "mlp" else ())
                    if place.is_mixed:
                        yield place

    def _all_modules(self) -> list[str]:
        """Every module of the base that holds tensors, embedding first, head last."""
        self._check_bias()
        family, embedding = self._family, self._family.embedding
        modules = {embedding, family.place_of(weight_of(family.head or embedding))}
        if family.derived is not None:
            modules |= {family.place_of(name) for name in (*family.own_names(self._base), *self.unties)}
            return sorted(modules, key=lambda module: (module != embedding, module == family.head, natural_key(module)))
        for name in family.own_names(self._base):
            if name == LOGITS_BIAS:  # with the head
                continue
            if name.rpartition(".")[2] not in {"weight", "bias"} or len(self._base.tensors[name].shape) > 2:
                inside = {part for stack in family.stacks for part in stack.ffn_parts}
                parts = ["mlp", *(part for part in family.all_parts if part not in inside)]
                raise UnsupportedError(
                    f"modules: {self._recipe.mixture.modules} cannot mix this kind of tensor",
                    where=f"base_model ({self._base.spec}): {name}",
                    remedy=f"write the parts to mix: modules: [{', '.join(parts)}]",
                )
            modules.add(module_of(name))
        if any(module in modules for module in family.entrances if module != embedding):  # which runs in its place
            modules.remove(embedding)
        return sorted(modules, key=lambda module: (module != embedding, module == HEAD, natural_key(module)))

    def _check_bias(self) -> None:
        """Raise MismatchError where an expert adds a bias to its logits and the base has none that it could stand beside."""
        for source in self._sources[1:]:
            if LOGITS_BIAS in source.tensors and LOGITS_BIAS not in self._base.tensors:
                raise MismatchError(
                    f"the expert has a {LOGITS_BIAS} and the base model none",
                    where=f"{source.label} ({source.spec})",
                    remedy="open the base model with transformers and save it again, which writes one of zeros",
                )

    def _place(self, module: str, calls: tuple[str, ...] = ()) -> PlannedPlace:
        modules = [f"{module_of(module)}.{each}" for each in calls] or [module]
        refs = tuple(ref for each in modules for ref in self._within(each) if self._is_own(ref.name))
        ties = [(name, original) for name, original in self.unties.items() if name.startswith(f"{module}.")]
        refs += tuple(replace(self._base.tensor(original), name=name) for name, original in ties)
        if module == HEAD and LOGITS_BIAS in self._base.tensors:
            refs = (*refs, self._base.tensor(LOGITS_BIAS))
        bare = PlannedPlace(module, refs, (), calls)
        return replace(bare, kinds=tuple(self._kind(expert, bare) for expert in range(len(self._recipe.experts))))

    def _is_own(self, name: str) -> bool:
        known = self._family.tensors
        return (name in known if known else not is_ignored(name)) and name not in self.unties

    def _within(self, module: str) -> list[TensorRef]:
        """The base's tensors whose names begin with a module's, in its order."""
        names, prefix = self._sorted_names, f"{module}."
        begin = bisect_left(names, (prefix, 0))
        found = takewhile(lambda entry: entry[0].startswith(prefix), islice(names, begin, None))
        return [self._base.tensors[name] for name, _ in sorted(found, key=lambda entry: entry[1])]

    @cached_property
    def _sorted_names(self) -> list[tuple[str, int]]:
        """Names of the base's tensors, sorted, and the place of each in its order."""
        return sorted((name, place) for place, name in enumerate(self._base.tensors))

    def _kind(self, expert: int, place: PlannedPlace) -> Kind:
        source, said, module = self._sources[1 + expert], self._recipe.experts[expert], place.module
        layers = self._layers[expert]
        if said.is_base or module in self._shared or (layers is not None and split_layer(module)[0] not in layers):
            return None
        matrix = place.weight if place.weight is not None and len(place.weight.shape) == 2 else None
        if isinstance(source, AdapterSource):
            if not any(touched(source, self.original(ref).name) for ref in place.refs):
                return None
            return (None if matrix is None else low_rank(source, matrix.name)) or "own"
        if not said.is_low_rank:
            return "own"
        may_be_low_rank = matrix is not None and self._family.may_be_low_rank(module)
        if said.bits is not None:
            return InBits(said.bits) if may_be_low_rank and module.rpartition(".")[2] not in POSITIONS else "own"
        if matrix is None or not may_be_low_rank or module == self._family.head or self._family.looks_up(module):
            return None
        return min(said.rank or 16, *matrix.shape)

    @cached_property
    def _layers(self) -> list[list[Layer] | None]:
        """Per expert those where it may have parts of its own, None: all; elsewhere it is the base."""
        said, sizes = [expert.layers for expert in self._recipe.experts], self._family.sizes(self._base.config)
        return [each and named_layers(each, sizes, f"experts[{place}].layers") for place, each in enumerate(said)]
