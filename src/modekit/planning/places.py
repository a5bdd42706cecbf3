"""The places of a mixture in the modekit architecture: which modules of the base they are, and what each expert has there.

A *place* is a module of the base of which experts have their own, kept whole or low-rank. Which router decides at it follows
from the recipe's `per`: the first place that a router serves is its leader.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from functools import cached_property
from itertools import islice, takewhile

from modekit.errors import MismatchError, UnsupportedError
from modekit.planning.mixture_config import readers
from modekit.planning.parts import FewBits, Kind, MixedParts, PlannedPlace, weight_in
from modekit.planning.prefixes import place_of_prefixes
from modekit.planning.routing_config import gate_rows, needs_base
from modekit.planning.tensors import low_rank, touched
from modekit.recipes.fits import IDS
from modekit.recipes.layers import Layer, named_layers, order_of
from modekit.recipes.recipe import Recipe
from modekit.sources.adapter import AdapterSource
from modekit.sources.adapter_rules import LowRank
from modekit.sources.config import whole
from modekit.sources.family import Family
from modekit.sources.header import TensorRef
from modekit.sources.names import (
    HEAD,
    LOGITS_BIAS,
    SOFT_PREFIX,
    in_decoder,
    is_ignored,
    module_of,
    natural_key,
    split_layer,
    weight_of,
)
from modekit.sources.rows import rows_of
from modekit.sources.source import ModelSource
from modekit.weights.made import Copy, Difference

ATTENTION = {
    **dict.fromkeys(("q", "k", "v", "o"), "attention"),
    **dict.fromkeys(("cross_q", "cross_o"), "cross-attention"),
    **dict.fromkeys(("cross_k", "cross_v"), "cross-attention to the source"),
}
"""Parts that mix tokens -> those that run on the same ones: cross_k and cross_v on the source's. Others are the FFN's."""


def first_to_run(modules: Collection[str], family: Family) -> str:
    """Of the modules of whole models or whole decoders, the one that a pass reaches first; empty where it is not known."""
    paths = ("input_layernorm", "operator_norm", family.parts.get("q", ""))
    return next((each for each in (*family.entrances, *(family.in_layer(0, path) for path in paths)) if each in modules), "")


def leaders_of(places: Iterable[str], scope: str, family: Family, *, whole: bool) -> dict[str, str]:
    """Place -> place of its router: the first of those that share it, in the order in which they run."""
    if whole:
        return dict.fromkeys(places, first_to_run([*places], family))
    ways = {place: _way(place, family) for place in places}
    leaders: dict[object, str] = {}
    for place in sorted(ways, key=lambda place: ways[place]):
        leaders.setdefault(_sharers(place, family, scope), place)
    return {place: leaders[_sharers(place, family, scope)] for place in ways}


def _way(place: str, family: Family) -> tuple[tuple[int, int], int]:
    """(layer, number of its first part in the order in which parts run) of a place."""
    layer, path = split_layer(place)
    assert layer is not None, place
    return order_of(layer), family.stack_of(layer).rank(path)


def _sharers(place: str, family: Family, scope: str) -> object:
    """What places that share a router have in common."""
    layer, path = split_layer(place)
    if scope != "layer" or layer is None:
        return scope if scope == "model" else place
    if family.derived is not None:  # what the layer calls: its attention, its FFN
        return layer, path.rpartition(".")[0].partition(".")[0]
    parts = {**family.stack_of(layer).parts, **({"q": path} if path == SOFT_PREFIX else {})}
    return layer, next((kind for part, kind in ATTENTION.items() if parts.get(part) == path), None)


def _check_kind(recipe: Recipe, family: Family) -> None:
    """Raise UnsupportedError for what no mixture with an encoder, or of a class without a row, can be yet."""
    mixture, router, fit = recipe.mixture, recipe.mixture.router, recipe.mixture.fit
    decides_once = mixture.method == "linear" or (fit is not None and fit.decides.for_model)
    by_source = router.granularity == "sequence"
    said = f"this is granularity: {router.granularity}, a router per {router.scope}"
    refused = {
        (
            "an encoder reads a source at once, which has no segments, and no token that decides for all",
            *("router", "choose another fit, or granularity: sequence"),
        ): router.granularity == "segment" or (fit is not None and fit.reads is IDS),
        (
            "modules: decoder is for models that are a decoder alone, and this one has an encoder",
            *("modules", "write modules: all (whole models), or layers: [decoder] with modules: auto"),
        ): mixture.modules == "decoder",
        (
            f"with an encoder one router serves all layers where it decides once per source, and only there; {said}",
            *("router", "write granularity: sequence and per: model together, or neither"),
        ): not decides_once and by_source != (router.scope == "model"),
        ("a common expert that runs apart is for models without an encoder", "always_on", "leave 'apart' out"): (
            mixture.always_on is not None and bool(mixture.always_on.apart)
        ),
    }
    known = "weights of experts are averaged in families that modekit has a row for (docs/families.md)"
    row = {(known, "combine", "leave it out"): mixture.combine is not None and family.derived is not None}
    for (what, where, remedy), holds in (row | refused if family.pair else row).items():
        if holds:
            raise UnsupportedError(what, where=f"mixture.{where}", remedy=remedy)


class Places:
    """The places of one recipe in the order in which they run. Raises UnsupportedError when there are none."""

    def __init__(self, recipe: Recipe, sources: tuple[ModelSource, ...], family: Family) -> None:
        self._recipe, self._sources, self._family = recipe, sources, family
        self._base = sources[0]
        _check_kind(recipe, family)
        self._count = len(recipe.experts)
        self._whole = recipe.mixture.is_whole
        self._shared = {family.embedding, family.head} if recipe.mixture.modules == "decoder" else set()
        self.parts = MixedParts(recipe, sources, family)
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

    def added_bias(self, place: PlannedPlace, expert: int) -> Copy | Difference | None:
        """The bias that an expert's LoRA adds by itself, where the base has no bias that could take it in; of a difference
        in a few bits, by what the expert's differs from the base's.
        """
        change = self._change(place, expert)
        if isinstance(place.kinds[expert], FewBits):
            bias = next((ref for ref in place.refs if ref != place.weight), None)
            return None if bias is None else Difference(*self.pair(expert, bias))
        if change is None or change.bias is None:
            return None
        folded = place.kinds[expert] == "own" and any(ref.name == f"{place.module}.bias" for ref in place.refs)
        return None if folded else Copy(change.bias if change.rows is None else rows_of(change.bias, *change.rows))

    def pair(self, expert: int, ref: TensorRef) -> tuple[TensorRef, TensorRef]:
        """A tensor of a full model, and that of the base."""
        ref = self.original(ref)
        return self._sources[1 + expert].matching(ref), ref

    def scale(self, place: PlannedPlace, expert: int) -> float:
        """Of an expert's LoRA at a place, also where it is folded into a module of its own and only its bias is scaled."""
        change = self._change(place, expert)
        return change.scale if change is not None else place.scales[expert]

    def width(self, place: PlannedPlace) -> int:
        """Width of the gate of a router at this place: of what it reads, unless its fit says another."""
        said = self._recipe.mixture.router.gate_width(whole(self._base.config, "vocab_size"))
        if said is not None:
            return said
        if not any(ref.name == weight_of(place.module) for ref in place.refs):
            return self._family.hidden(self._base.config)  # a whole FFN
        return self._family.width_in(place.module, place.weight.shape)

    def rows(self, leader: PlannedPlace) -> list[int]:
        """Rows of a leader's gate per expert, by the ranks over all places that read the same input."""
        read = [place.ranks for place in self.read_by(leader)]
        return gate_rows(self._recipe.mixture.router, [sum(ranks) for ranks in zip(*read, strict=True)])

    def read_by(self, leader: PlannedPlace) -> list[PlannedPlace]:
        """The places whose changes a router at `leader` could score."""
        return [self._by_name[name] for name in readers(leader.module, self._family, self.leaders)]

    @cached_property
    def _by_name(self) -> dict[str, PlannedPlace]:
        return {place.module: place for place in self}

    @cached_property
    def _all(self) -> list[PlannedPlace]:
        places = list(self._of_everything() if self._whole else self._of_layers())
        self._check_experts(places)
        if not any(place.is_mixed for place in places):
            raise UnsupportedError(
                "no expert differs from the base in the mixed modules",
                where="mixture.modules",
                remedy="mix other modules or layers, or add an expert that is not 'base'",
            )
        self._check_reader(places[0].module)
        return places

    def _check_experts(self, places: list[PlannedPlace]) -> None:
        """Raise UnsupportedError where an expert would be the base: its layers, or low-rank parts, have no mixed place."""
        none = (each for each in range(self._count) if all(place.kinds[each] is None for place in places))
        for expert, said in ((each, self._recipe.experts[each]) for each in none):
            if said.layers is not None:
                raise UnsupportedError(
                    "the expert has nothing of its own in its layers that is mixed",
                    where=f"experts[{expert}].layers",
                    found=said.layers,
                    remedy="name other layers, or leave 'layers' out",
                )
            if said.is_low_rank:
                raise UnsupportedError(
                    "nothing of the expert can be kept as a low-rank part",
                    where=f"experts[{expert}] '{said.name}': as",
                    found=f"no module that is mixed has a weight (outputs, inputs) in a '{self._family.model_type}' model",
                    remedy="leave 'as: lora' out: what is mixed of the expert is kept whole",
                )

    def _check_reader(self, first: str) -> None:
        """Raise UnsupportedError where one router, at the first place, is to decide by a source that it does not read."""
        mixture = self._recipe.mixture
        once = mixture.fit is not None and mixture.router.scope == "model" and not mixture.router.row.reads.tokens
        if self._family.pair and once and in_decoder(first):
            raise UnsupportedError(
                "one router for all layers decides by the source, and must be in the encoder",
                where="mixture.router.per",
                found=f"the first place that is mixed is {first}",
                remedy="mix a part of the encoder, too, leave 'per' out, or choose fit: lexical",
            )

    def _of_everything(self) -> Iterable[PlannedPlace]:
        """What runs first has the router, whether experts have a module of their own there or not."""
        places = map(self._place, self._all_modules())
        return (place for place in places if place.module == self._first or place.is_mixed)

    @cached_property
    def _first(self) -> str:
        modules = [module for module in self._all_modules() if module not in self._shared]
        first = first_to_run(modules, self._family)
        if first != next((each for each in self._family.called if each in modules), first or None):
            what = "modules: decoder has its router at the norm or the attention with which the first layer begins"
            found = f"a pass of a '{self._family.model_type}' model begins with another module"
            raise UnsupportedError(what, where="mixture.modules", found=found, remedy="write modules: all (whole models)")
        return first

    def _of_layers(self) -> Iterator[PlannedPlace]:
        for layer in named_layers(self._recipe.mixture.layers, self._family.sizes(self._base.config)):
            prefixes = place_of_prefixes(self._sources, self._family, layer)
            if prefixes is not None:
                yield prefixes
            for part, path in self.parts.in_order(layer):
                module = self._family.in_layer(layer, path)
                calls = self._family.stack_of(layer).ffn_calls if part == "mlp" else ()
                if self._within(module):
                    place = self._place(module, calls)
                    if place.is_mixed:
                        yield place

    def _all_modules(self) -> list[str]:
        """Every module of the base that holds tensors, embedding first, head last."""
        self._check_bias()
        embedding = self._family.embedding
        modules = {embedding, self._family.place_of(weight_of(self._family.head or embedding))}
        if self._family.derived is not None:
            modules |= {self._family.place_of(name) for name in (*self._family.own_names(self._base), *self.unties)}
            return sorted(modules, key=lambda module: (module != embedding, module == self._family.head, natural_key(module)))
        for name in self._family.own_names(self._base):
            ref = self._base.tensors[name]
            if name == LOGITS_BIAS:  # with the head
                continue
            if name.rpartition(".")[2] not in {"weight", "bias"} or len(ref.shape) > 2:
                raise UnsupportedError(
                    f"modules: {self._recipe.mixture.modules} cannot mix this kind of tensor",
                    where=f"base_model ({self._base.spec}): {name}",
                    remedy=f"write the parts to mix: modules: [{', '.join(self._parts_by_name())}]",
                )
            modules.add(module_of(name))
        if any(module in modules for module in self._family.entrances if module != embedding):  # which runs in its place
            modules.remove(embedding)
        return sorted(modules, key=lambda module: (module != embedding, module == HEAD, natural_key(module)))

    def _parts_by_name(self) -> list[str]:
        """The FFN and every part outside of it."""
        inside = {part for stack in self._family.stacks for part in stack.ffn_parts}
        return ["mlp", *(part for part in self._family.all_parts if part not in inside)]

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
        kinds = tuple(self._kind(expert, module, refs) for expert in range(self._count))
        return PlannedPlace(module, refs, kinds, calls)

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

    def _kind(self, expert: int, module: str, refs: tuple[TensorRef, ...]) -> Kind:
        source, said = self._sources[1 + expert], self._recipe.experts[expert]
        layers = self._layers[expert]
        if said.is_base or module in self._shared or (layers is not None and split_layer(module)[0] not in layers):
            return None
        weight = weight_in(module, refs)
        if isinstance(source, AdapterSource):
            if not any(touched(source, self.original(ref).name) for ref in refs):
                return None
            change = low_rank(source, weight.name) if weight is not None and len(weight.shape) == 2 else None
            return change or "own"
        if not said.is_low_rank:
            return "own"
        if said.bits is not None:
            low = PlannedPlace(module, refs, ()).may_be_low_rank and self._family.may_be_low_rank(module)
            return FewBits(said.bits) if low else "own"
        is_end = module == self._family.head or self._family.looks_up(module)
        if weight is None or len(weight.shape) != 2 or is_end or not self._family.may_be_low_rank(module):
            return None
        return min(said.rank or 16, *weight.shape)

    @cached_property
    def _layers(self) -> list[list[Layer] | None]:
        """Per expert those where it may have parts of its own, None: all; elsewhere it is the base."""
        said, sizes = [expert.layers for expert in self._recipe.experts], self._family.sizes(self._base.config)
        return [each and named_layers(each, sizes, f"experts[{place}].layers") for place, each in enumerate(said)]

    def _change(self, place: PlannedPlace, expert: int) -> LowRank | None:
        """What an expert's adapter does to the weight of a place, if that is a low-rank change."""
        source = self._sources[1 + expert]
        change = source.changes.get(weight_of(place.module)) if isinstance(source, AdapterSource) else None
        return change if isinstance(change, LowRank) else None
