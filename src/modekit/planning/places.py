"""The places of a mixture in the modekit architecture: which modules of the base they are, and what each expert has there.

A *place* is a module of the base of which experts have their own, kept whole, low-rank or in few bits. Which router decides
there says leaders.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from modekit.errors import MismatchError, UnsupportedError
from modekit.planning.changes import low_rank, touched
from modekit.planning.leaders import entrances, first_to_run, leaders_of, needs_base
from modekit.recipes.layers import Layer, named_layers
from modekit.recipes.recipe import Recipe
from modekit.sources.adapter import AdapterSource, LowRank
from modekit.sources.family import PARTS, Family
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
from modekit.sources.stack import Stack
from modekit.sources.structure import INEXACT_WHOLE

_THE_BASES = (False, None, 0, 0)


@dataclass(frozen=True)
class PlannedPlace:
    """A module of the base, the tensors in it, and what experts have there: a module of their `own`, a low-rank change of one
    of `ranks`, or a difference in `bits` per number; else the base's.

    `calls`: where the layer calls several modules itself that are one place here, their names; `module` is the first of them.
    `changes`: what adapters change there, if it is kept low-rank. `inside`: where it is itself a mixture, name of a tensor ->
    the rank of every expert's change of it. `base`: whether the base's module stays. `leader`: the place of its router.
    """

    module: str
    refs: tuple[TensorRef, ...]
    calls: tuple[str, ...] = ()
    own: tuple[int, ...] = ()
    changes: tuple[LowRank | None, ...] = ()
    ranks: tuple[int, ...] = ()
    bits: tuple[int, ...] = ()
    inside: tuple[tuple[TensorRef, tuple[int, ...]], ...] = ()
    base: bool = True
    leader: str = ""

    def has(self, expert: int) -> bool:
        """Whether an expert differs from the base here."""
        return expert in self.own or bool(self.ranks[expert] or self.bits[expert] or any(r[expert] for _, r in self.inside))

    @property
    def is_mixed(self) -> bool:
        """Whether any expert does."""
        return bool(self.own or any(self.ranks) or any(self.bits) or self.inside)

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


def _check_kind(recipe: Recipe, family: Family) -> None:
    """Raise UnsupportedError for what no mixture with an encoder can be."""
    mixture = recipe.mixture
    router = recipe.mixture.router
    fit = recipe.mixture.fit
    decides_once = mixture.method == "linear" or (fit is not None and fit.reads_ids)
    said = f"this is granularity: {router.granularity}, a router per {router.scope}"
    of_pairs = (
        (
            mixture.modules == "decoder",
            "modules: decoder is for models that are a decoder alone, and this one has an encoder",
            "modules",
            "write modules: all (whole models), or layers: [decoder] with modules: auto",
        ),
        (
            not decides_once and (router.granularity == "sequence") != (router.scope == "model"),
            f"with an encoder one router serves all layers where it decides once per source, and only there; {said}",
            "router",
            "write granularity: sequence and per: model together, or neither",
        ),
        (
            mixture.always_on is not None and bool(mixture.always_on.apart),
            "a common expert that runs apart is for models without an encoder",
            "always_on",
            "leave 'apart' out",
        ),
    )
    for holds, what, where, remedy in of_pairs if family.pair else ():
        if holds:
            raise UnsupportedError(what, where=f"mixture.{where}", remedy=remedy)


def untied(recipe: Recipe, base: ModelSource, family: Family) -> dict[str, str]:
    """Head -> embedding, where whole models tie them and the result does not."""
    return dict(family.ties) if recipe.mixture.modules == "all" and family.is_tied(base) else {}


class Places:
    """Finds the places of one recipe."""

    def __init__(self, recipe: Recipe, sources: tuple[ModelSource, ...], family: Family) -> None:
        self._recipe = recipe
        self._sources = sources
        self._family = family
        self._base = sources[0]
        self._shared = {family.embedding, family.head} if recipe.mixture.modules == "decoder" else set()
        self._unties = untied(recipe, sources[0], family)
        derived = family.derived
        self._blocks = [] if derived is None else derived.blocks
        self._not_linear = set() if derived is None else {*derived.lookups, *derived.columns, *derived.blocks}
        self._wanted = _wanted_parts(recipe, sources, family)
        self._within: dict[str, list[TensorRef]] = {}  # module -> the base's tensors in it, in its order
        for name, ref in self._base.tensors.items():
            for module in accumulate(name.split(".")[:-1], "{}.{}".format):
                self._within.setdefault(module, []).append(ref)
        said = [expert.layers for expert in recipe.experts]
        sizes = family.sizes(self._base.config)
        self._layers: list[list[Layer] | None] = [
            each and named_layers(each, sizes, f"experts[{place}].layers") for place, each in enumerate(said)
        ]

    def all(self) -> list[PlannedPlace]:
        """In the order in which they run. Raises UnsupportedError when there are none."""
        _check_kind(self._recipe, self._family)
        self._check_modules()
        places = list(self._of_everything() if self._recipe.mixture.is_whole else self._of_layers())
        for expert, said in enumerate(self._recipe.experts):
            if not any(place.has(expert) for place in places) and (said.layers is not None or said.is_low_rank):
                raise UnsupportedError(
                    "the expert has nothing of its own that is mixed",
                    where=f"experts[{expert}] '{said.name}': {'layers' if said.layers is not None else 'as'}",
                    remedy="name other layers, or none, and leave 'as: lora' out: then it is kept whole",
                )
        if not any(place.is_mixed for place in places):
            raise UnsupportedError(
                "no expert differs from the base in the mixed modules",
                where="mixture.modules",
                remedy="mix other modules or layers, or add an expert that is not 'base'",
            )
        self._check_reader(places[0].module)
        leaders = leaders_of([place.module for place in places], self._recipe, self._family)
        return [replace(place, leader=leaders[place.module]) for place in places]

    def _in_order(self, layer: Layer, stack: Stack) -> list[tuple[str, str]]:
        """Part and its module under a layer, in the order in which they run; fused ones once."""
        wanted = self._wanted
        # Projection by projection: for low-rank experts, and routers finer than a module.
        low = any(expert.adapter is not None or expert.is_low_rank for expert in self._recipe.experts)
        if "mlp" in wanted and self._family.in_layer(layer, stack.ffn) in self._blocks:
            wanted = wanted - stack.ffn_parts  # an FFN that is itself a mixture is one place
        elif "mlp" in wanted and (low or self._recipe.mixture.router.scope in {"projection", "feature"}):
            wanted = (wanted - {"mlp"}) | stack.ffn_parts
        chosen = {"mlp": stack.ffn} if "mlp" in wanted and stack.ffn else {}
        for part in stack.parts:
            if part in wanted and stack.parts[part] not in chosen.values():
                chosen[part] = stack.parts[part]
        return sorted(chosen.items(), key=lambda entry: stack.rank(entry[1]))

    def _check_modules(self) -> None:
        """Raise UnsupportedError for parts that the family has not, or of a module whose other parts are not named."""
        modules = self._recipe.mixture.modules
        family = self._family
        for part in modules if isinstance(modules, list) else ():
            path = family.decoder.parts.get(part)
            partners = [other for other, its in family.decoder.parts.items() if path is not None and its == path]
            if (part != "mlp" and part not in _all_parts(family)) or not {*partners} <= {*modules}:
                raise UnsupportedError(
                    f"'{family.model_type}' keeps parts in one module"
                    if partners
                    else f"'{family.model_type}' has no such part",
                    where="mixture.modules",
                    found=part,
                    expected=f"{', '.join(partners)} together" if partners else ", ".join(["mlp", *_all_parts(family)]),
                    remedy="correct the list",
                )

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
            raise UnsupportedError(
                "modules: decoder has its router at the norm or the attention with which the first layer begins",
                where="mixture.modules",
                found=f"a pass of a '{self._family.model_type}' model begins with another module",
                remedy="write modules: all (whole models)",
            )
        return (place for place in map(self._place, modules) if place.module == first or place.is_mixed)

    def _of_layers(self) -> Iterator[PlannedPlace]:
        for layer in named_layers(self._recipe.mixture.layers, self._family.sizes(self._base.config)):
            stack = self._family.stack_of(layer)
            for part, path in self._in_order(layer, stack):
                place = self._place(self._family.in_layer(layer, path), stack.ffn_calls if part == "mlp" else ())
                if place.is_mixed:
                    yield place

    def _all_modules(self) -> list[str]:
        """Every module of the base that holds tensors, embedding first, head last."""
        family = self._family
        embedding = self._family.embedding
        for source in self._sources[1:]:
            if LOGITS_BIAS in source.tensors and LOGITS_BIAS not in self._base.tensors:
                raise MismatchError(
                    f"the expert has a {LOGITS_BIAS} and the base model none",
                    where=source.where,
                    remedy="open the base model with transformers, and save it again",
                )
        modules = {embedding, self._module_of(weight_of(family.head or embedding))}
        if family.model_type in INEXACT_WHOLE:
            raise UnsupportedError(
                f"whole models of the family '{family.model_type}' cannot be mixed: {INEXACT_WHOLE[family.model_type]}",
                where="mixture.modules",
                remedy="write modules: [mlp, q, k, v, o], or give adapters",
            )
        if family.derived is not None:
            modules |= {self._module_of(name) for name in (*family.own_names(self._base), *self._unties)}
            return sorted(modules, key=lambda module: (module != embedding, module == family.head, natural_key(module)))
        for name in family.own_names(self._base):
            if name == LOGITS_BIAS:  # with the head
                continue
            if name.rpartition(".")[2] not in {"weight", "bias"} or len(self._base.tensors[name].shape) > 2:
                inside = {part for stack in family.stacks for part in stack.ffn_parts}
                parts = ["mlp", *(part for part in _all_parts(family) if part not in inside)]
                raise UnsupportedError(
                    f"modules: {self._recipe.mixture.modules} cannot mix this kind of tensor",
                    where=f"{self._base.where}: {name}",
                    remedy=f"write the parts to mix: modules: [{', '.join(parts)}]",
                )
            modules.add(module_of(name))
        if any(module in modules for module in entrances(family) if module != embedding):  # which runs in its place
            modules.remove(embedding)
        return sorted(modules, key=lambda module: (module != embedding, module == HEAD, natural_key(module)))

    def _module_of(self, tensor: str) -> str:
        """The smallest module with a tensor that can be another expert's."""
        return next((block for block in self._blocks if tensor.startswith(f"{block}.")), module_of(tensor))

    def _place(self, module: str, calls: tuple[str, ...] = ()) -> PlannedPlace:
        modules = [f"{module_of(module)}.{each}" for each in calls] or [module]
        refs = tuple(ref for each in modules for ref in self._within.get(each, []) if self._is_own(ref.name))
        ties = [(name, original) for name, original in self._unties.items() if name.startswith(f"{module}.")]
        refs += tuple(replace(self._base.tensor(original), name=name) for name, original in ties)
        if module == HEAD and LOGITS_BIAS in self._base.tensors:
            refs = (*refs, self._base.tensor(LOGITS_BIAS))
        bare = PlannedPlace(module, refs, calls)
        kinds = [self._kind(expert, bare) if refs else _THE_BASES for expert in range(len(self._recipe.experts))]
        own, low, ranks, bits = zip(*kinds, strict=True)
        changed = {expert: self._inside(expert, bare) for expert, has in enumerate(own) if has}
        inside = tuple(
            (self._base.tensors[name], tuple(changed.get(expert, {}).get(name, 0) for expert in range(len(kinds))))
            for name in (self._family.tensors if any(changed.values()) else ())  # in the order of the class
            if any(name in each for each in changed.values())
        )
        whole = tuple(expert for expert, each in changed.items() if not each)
        base = needs_base(self._recipe, self._family, module, whole)
        return replace(bare, own=whole, changes=low, ranks=ranks, bits=bits, inside=inside, base=base)

    def _inside(self, expert: int, place: PlannedPlace) -> dict[str, int]:
        """Tensor of a place that is itself a mixture -> rank of an adapter's change; empty where it is not kept so."""
        source = self._sources[1 + expert]
        if not isinstance(source, AdapterSource) or not any(each.startswith(place.prefix) for each in self._family.routed):
            return {}
        names = [ref.name for ref in place.refs if touched(source, ref.name)]
        changes = [source.changes[name] for name in names if name in source.changes and name not in source.replaced]
        plain = all(change.magnitude is None and (change.experts or not change.transposed) for change in changes)
        routed = all(module_of(name) in self._family.routed for name in names if len(self._base.tensors[name].shape) == 3)
        return {name: source.changes[name].rank for name in names} if plain and routed and len(changes) == len(names) else {}

    def _is_own(self, name: str) -> bool:
        known = self._family.tensors
        return (name in known if known else not is_ignored(name)) and name not in self._unties

    def _kind(self, expert: int, place: PlannedPlace) -> tuple[bool, LowRank | None, int, int]:
        """Whether an expert has a module of its own at a place, an adapter's change, the rank of a change, and the bits of a
        difference.
        """
        source = self._sources[1 + expert]
        said = self._recipe.experts[expert]
        module = place.module
        layers = self._layers[expert]
        if said.is_base or module in self._shared or (layers is not None and split_layer(module)[0] not in layers):
            return _THE_BASES
        matrix = place.weight if place.weight is not None and len(place.weight.shape) == 2 else None
        if isinstance(source, AdapterSource):
            changed = any(touched(source, self._unties.get(ref.name, ref.name)) for ref in place.refs)
            change = None if matrix is None else low_rank(source, matrix.name)
            change = change if changed else None
            return changed and change is None, change, 0 if change is None else change.rank, 0
        may_be_low_rank = matrix is not None and module not in self._not_linear
        if said.bits is not None and may_be_low_rank and module.rpartition(".")[2] not in POSITIONS:
            return False, None, 0, said.bits
        if not said.is_low_rank or said.bits is not None:
            return True, None, 0, 0
        if matrix is None or not may_be_low_rank or module == self._family.head or self._family.looks_up(module):
            return _THE_BASES
        return False, None, min(said.rank or 16, *matrix.shape), 0


def _wanted_parts(recipe: Recipe, sources: Sequence[ModelSource], family: Family) -> set[str]:
    """Parts of a layer; `mlp` is the whole FFN. Unless the recipe says them: the FFN for full models, for adapters what they
    change, for parts of models every linear part.
    """
    modules = recipe.mixture.modules
    wanted = set[str]()
    every = set(_all_parts(family))
    if isinstance(modules, list):
        return set(modules)
    for expert, source in zip(recipe.experts, sources[1:], strict=True):
        if isinstance(source, AdapterSource):
            named = map(split_layer, (*source.changes, *source.replaced))
            paths = {(family.stack_of(layer).name, module_of(path)) for layer, path in named if layer is not None}
            for stack in family.stacks:
                wanted |= {part for part, path in stack.parts.items() if (stack.name, path) in paths}
                inside = {path for name, path in paths if name == stack.name and path.startswith(f"{stack.ffn}.")}
                wanted |= {"mlp"} if stack.ffn and inside.difference(stack.parts.values()) else set()
        elif not expert.is_base:
            wanted |= every if expert.is_low_rank else {"mlp"}
    if "mlp" in wanted:
        wanted -= {part for stack in family.stacks for part in stack.ffn_parts}
    return wanted or {"mlp"}


def _all_parts(family: Family) -> list[str]:
    """What any stack has, in the order in which parts run."""
    parts = dict.fromkeys(part for stack in family.stacks for part in stack.parts)
    return sorted(parts, key=lambda part: PARTS.index(part) if part in PARTS else len(PARTS))
