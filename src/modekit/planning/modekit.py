"""How a mixture lies in the modekit architecture: which modules are mixed, what each expert has there, who decides.

A *place* is a module of the base of which experts have their own, kept whole or low-rank; `config["modekit"]["places"]`
says for each what the torch modules in architecture/ need to know, so that these know nothing of families or recipes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from modekit.errors import UnsupportedError
from modekit.planning.pieces import low_rank, piece_of, rows_of, touched
from modekit.planning.plan import Factor, Operation, Piece, PlannedTensor, Role, RouterSlot, joined
from modekit.recipes.recipe import Recipe
from modekit.recipes.router import Router
from modekit.recipes.strict import BASE
from modekit.sources.adapter import AdapterSource, LowRank
from modekit.sources.compatibility import IGNORED, is_tied
from modekit.sources.families import LAYER, PARTS, Family
from modekit.sources.model import DTYPE_NAMES, ModelSource, TensorRef

FORMAT = 1
EMBEDDING, _HEAD = "model.embed_tokens", "lm_head"
ATTENTION = {"q", "k", "v", "o"}
_LAYER_NAME = re.compile(r"^model\.layers\.(\d+)\.(.+)$")


@dataclass(frozen=True)
class _Place:
    """A module of the base, the tensors in it, and what each expert has there.

    `kinds` per expert: None the base's module, "own" a module of its own, or its low-rank change.
    """

    module: str
    group: str  # places of one group may share a router
    refs: tuple[TensorRef, ...]
    kinds: tuple[LowRank | str | int | None, ...]

    @property
    def is_mixed(self) -> bool:
        return any(kind is not None for kind in self.kinds)

    @property
    def own(self) -> list[int]:
        return [expert for expert, kind in enumerate(self.kinds) if kind == "own"]

    @property
    def ranks(self) -> list[int]:
        return [kind.rank if isinstance(kind, LowRank) else kind if isinstance(kind, int) else 0 for kind in self.kinds]

    @property
    def scales(self) -> list[float]:
        return [kind.scale if isinstance(kind, LowRank) else 1.0 for kind in self.kinds]

    @property
    def weight(self) -> TensorRef:
        return next(ref for ref in self.refs if ref.name == f"{self.module}.weight")


class ModekitLayout:
    """The modekit shape of one recipe. `code_of` gives the safetensors dtype of what is made from a tensor."""

    def __init__(
        self, recipe: Recipe, sources: tuple[ModelSource, ...], family: Family, code_of: Callable[[TensorRef], str]
    ) -> None:
        self._recipe, self._sources, self._family, self._code_of = recipe, sources, family, code_of
        self._base = sources[0]
        self._count = len(recipe.experts)
        self._layers = int(self._base.config["num_hidden_layers"])
        self._everything = recipe.mixture.modules == "all"
        self.unties = self._everything and is_tied(self._base, family)
        self.router_dtype = code_of(self._base.tensor(f"{EMBEDDING}.weight"))
        self._check()
        self._check_router()

    # What the plan asks of a layout.

    def backbone_name(self, name: str) -> str | None:
        """What a tensor of the base is called in the backbone; None when no expert needs the base's module."""
        place = self._place_of_tensor.get(name)
        if place is None:
            return name
        return f"{place.module}.base.{_within(place.module, name)}" if self._keeps_base(place) else None

    def mixed_names(self) -> set[str]:
        """Tensors of the base of which experts have their own."""
        return {name for name, place in self._place_of_tensor.items() if place.is_mixed}

    def config(self) -> dict[str, Any]:
        """The base's config.json with what is mixed where under `modekit`."""
        config = {key: value for key, value in self._base.config.items() if key not in ("torch_dtype", "_name_or_path")}
        if self.unties:
            config["tie_word_embeddings"] = False
        return {
            **config,
            "architectures": ["ModekitForCausalLM"],
            "model_type": "modekit",
            "dtype": DTYPE_NAMES[self.router_dtype],
            "auto_map": {
                "AutoConfig": "configuration_modekit.ModekitConfig",
                "AutoModel": "modeling_modekit.ModekitModel",
                "AutoModelForCausalLM": "modeling_modekit.ModekitForCausalLM",
            },
            "modekit": {
                "format": FORMAT,
                "dense_type": self._family.model_type,
                "experts": self._recipe.names,
                "routing": routing_config(self._recipe),
                "places": {place.module: self._entry(place) for place in self._places},
            },
        }

    def slots(self) -> tuple[RouterSlot, ...]:
        """The routers, in the order of the layers."""
        return () if self._recipe.mixture.method == "linear" else tuple(
            slots_of({"routing": routing_config(self._recipe), "places": {p.module: self._entry(p) for p in self._places}})
        )  # fmt: skip

    def notes(self) -> Iterable[str]:
        """What a user should know of this shape."""
        whole = [name for name, place in zip(self._recipe.names, range(self._count), strict=True)
                 if self._whole(place) and isinstance(self._sources[1 + place], AdapterSource)]  # fmt: skip
        for name in whole:
            yield f"{name}: parts of its adapter are no plain low-rank change (DoRA, IA3, biases) and are kept as whole modules"
        if self._splits_ffn and "mlp" in self._parts(raw=True) and any(kind == "own" for p in self._places for kind in p.kinds):
            yield "whole and low-rank experts meet in the FFN: gate, up and down are mixed each, not the FFN's outputs"
        for expert in self._recipe.experts:
            if expert.lora_rank is not None:
                yield (
                    f"{expert.name}: of its difference to the base a part of rank {expert.lora_rank} is kept; "
                    "norms and biases are not"
                )

    def tensors(self) -> Iterator[PlannedTensor]:
        """What the experts have at every place."""
        for place in self._places:
            for number, expert in enumerate(place.own):
                for ref in place.refs:
                    name = f"{place.module}.experts.{number}.{_within(place.module, ref.name)}"
                    yield joined(name, self._code_of(ref), ref.shape, "expert", (piece_of(self._sources, 1 + expert, ref),))
            if any(place.ranks):
                yield from self._low_rank_tensors(place)
            biases = [(expert, self._lora_bias(place, expert)) for expert in range(self._count)]
            pieces = [Piece(1 + expert, ref) for expert, ref in biases if ref is not None]
            if pieces:
                shape = (len(pieces), place.weight.shape[0])
                yield joined(f"{place.module}.lora_bias", self._adapter_code(pieces), shape, "adapter", tuple(pieces))

    # How it follows from recipe and headers.

    @cached_property
    def _places(self) -> list[_Place]:
        places = []
        if self._everything:  # the embedding runs first, so the router is there, whether experts have one of their own or not
            found = map(self._place, self._all_modules())
            places = [place for place in found if place.module == EMBEDDING or place.is_mixed]
        for layer in [] if self._everything else self._recipe.mixture.mixed_layers(self._layers):
            prefix = LAYER.format(layer=layer)
            for part in self._parts():
                module = prefix + (self._family.mlp_module if part == "mlp" else self._family.parts[part])
                if any(name.startswith(f"{module}.") for name in self._base.tensors):
                    place = self._place(module, f"{layer} {'attention' if part in ATTENTION else 'ffn'}")
                    if place.is_mixed:
                        places.append(place)
        if not any(place.is_mixed for place in places):
            raise UnsupportedError(
                "no expert differs from the base in what is mixed", where="mixture.modules",
                remedy="mix other modules or layers, or add an expert that is not 'base'",
            )  # fmt: skip
        return places

    @cached_property
    def _place_of_tensor(self) -> dict[str, _Place]:
        """The place that a tensor of the base belongs to; a tied head that is untied here is found by its own name."""
        found = {ref.name: place for place in self._places for ref in place.refs if ref.name.startswith(f"{place.module}.")}
        head = next((place for place in self._places if place.module == _HEAD), None)
        return {**found, f"{_HEAD}.weight": head} if head is not None else found

    def _parts(self, *, raw: bool = False) -> list[str]:
        """Parts that are mixed, in the order in which they run; fused ones once."""
        modules = self._recipe.mixture.modules
        wanted = set(modules) if isinstance(modules, list) else self._automatic()
        if "mlp" in wanted and self._splits_ffn and not raw:
            wanted = (wanted - {"mlp"}) | {"gate", "up", "down"}
        chosen = ["mlp"] if "mlp" in wanted else []
        seen: set[str] = set()
        for part in PARTS:
            path = self._family.parts.get(part)
            if part in wanted and path is not None and path not in seen:
                seen.add(path)
                chosen.append(part)
        return sorted(chosen, key=lambda part: PARTS.index("gate" if part == "mlp" else part))

    def _automatic(self) -> set[str]:
        """The FFN for full models, for adapters what they change, for `as: lora` every linear part."""
        wanted: set[str] = set()
        for expert, source in zip(self._recipe.experts, self._sources[1:], strict=True):
            if isinstance(source, AdapterSource):
                layers = [match[2].rpartition(".")[0] for name in source.changes if (match := _LAYER_NAME.match(name))]
                wanted |= {part for part, path in self._family.parts.items() if path in layers}
            elif expert.lora_rank is not None:
                wanted |= set(self._family.parts)
            elif not expert.is_base:
                wanted.add("mlp")
        if "mlp" in wanted and wanted & {"gate", "up", "down"}:
            wanted |= {"mlp"}
            wanted -= {"gate", "up", "down"}
        return wanted or {"mlp"}

    @property
    def _splits_ffn(self) -> bool:
        """Whether the FFN is mixed projection by projection: for low-rank experts, and routers finer than a module."""
        low = any(
            isinstance(source, AdapterSource) or expert.lora_rank is not None
            for expert, source in zip(self._recipe.experts, self._sources[1:], strict=True)
        )
        return low or self._recipe.mixture.router.scope in {"projection", "feature"}

    def _check(self) -> None:
        modules = self._recipe.mixture.modules
        if not isinstance(modules, list):
            return
        known = set(self._family.parts)
        unknown = [part for part in modules if part != "mlp" and part not in known]
        if unknown:
            raise UnsupportedError(
                f"'{self._family.model_type}' has no such part", where="mixture.modules", found=", ".join(unknown),
                expected=", ".join(["mlp", *self._family.parts]), remedy="correct the list",
            )  # fmt: skip
        for part in modules:
            path = self._family.parts.get(part)
            partners = [other for other, its in self._family.parts.items() if its == path and other not in modules]
            if path is not None and partners:
                raise UnsupportedError(
                    f"'{self._family.model_type}' keeps these parts in one module ({path})", where="mixture.modules",
                    found=part, expected=f"{', '.join([part, *partners])} together", remedy="name them all, or none",
                )  # fmt: skip

    def _check_router(self) -> None:
        """Raise UnsupportedError when the fit scores low-rank changes and a router stands before a whole module."""
        fit = self._recipe.mixture.fit
        if fit is None or fit.reads != "changes":
            return
        for leader in self._places:
            for place in self._read_by(leader) if self._routers[leader.module] == leader.module else ():
                if place.own:
                    raise whole_module_unscored(self._recipe.names[place.own[0]], place.module)

    def _all_modules(self) -> Iterator[str]:
        """Every module of the base that holds tensors, embedding first, head last."""
        modules: dict[str, None] = {EMBEDDING: None}
        for name in self._base.tensors:
            if IGNORED.search(name):
                continue
            module, _, leaf = name.rpartition(".")
            if leaf not in {"weight", "bias"} or len(self._base.tensors[name].shape) > 2:
                raise UnsupportedError(
                    "modules: all cannot mix this kind of tensor", where=f"base_model ({self._base.spec}): {name}",
                    remedy="name the parts to mix under mixture.modules",
                )  # fmt: skip
            modules[module] = None
        modules.pop(_HEAD, None)
        modules[_HEAD] = None
        ordered = sorted(modules, key=lambda module: (module != EMBEDDING, module == _HEAD, _numbers(module)))
        yield from ordered

    def _place(self, module: str, group: str = "all") -> _Place:
        name_of = f"{module}."
        refs = tuple(ref for name, ref in self._base.tensors.items() if name.startswith(name_of) and not IGNORED.search(name))
        if module == _HEAD and self.unties:
            refs = (self._base.tensor(f"{EMBEDDING}.weight"),)
        return _Place(module, group, refs, tuple(self._kind(expert, module, refs) for expert in range(self._count)))

    def _kind(self, expert: int, module: str, refs: tuple[TensorRef, ...]) -> LowRank | str | int | None:
        source, recipe_expert = self._sources[1 + expert], self._recipe.experts[expert]
        if recipe_expert.is_base:
            return None
        weight = next((ref for ref in refs if ref.name == f"{module}.weight"), None)
        if isinstance(source, AdapterSource):
            if not any(touched(source, ref.name) for ref in refs):
                return None
            change = low_rank(source, weight.name) if weight is not None and len(weight.shape) == 2 else None
            return change or "own"
        if recipe_expert.lora_rank is None:
            return "own"
        if weight is None or len(weight.shape) != 2 or module in {EMBEDDING, _HEAD}:
            return None
        return min(recipe_expert.lora_rank, *weight.shape)

    def _whole(self, expert: int) -> bool:
        return any(place.kinds[expert] == "own" for place in self._places)

    def _keeps_base(self, place: _Place) -> bool:
        return needs_base(self._recipe, place.module, place.own)

    def _lora_bias(self, place: _Place, expert: int) -> TensorRef | None:
        """The bias that an expert's LoRA adds by itself, where the base has no bias that could take it in."""
        source = self._sources[1 + expert]
        change = source.changes.get(f"{place.module}.weight") if isinstance(source, AdapterSource) else None
        if not isinstance(change, LowRank) or change.bias is None:
            return None
        folded = place.kinds[expert] == "own" and any(ref.name == f"{place.module}.bias" for ref in place.refs)
        return None if folded else rows_of(change.bias, change.rows)

    def _entry(self, place: _Place) -> dict[str, Any]:
        """The place in config.json; see architecture/modekit_mixed.py."""
        entry: dict[str, Any] = {
            "ranks": place.ranks, "scales": place.scales, "own": place.own, "base": self._keeps_base(place),
            "router": self._routers[place.module],
        }  # fmt: skip
        biased = [expert for expert in range(self._count) if self._lora_bias(place, expert) is not None]
        if biased:
            entry["biased"] = biased
            entry["scales"] = [self._scale(place, expert) for expert in range(self._count)]
        if self._recipe.mixture.router.scope == "feature" and self._recipe.mixture.method != "linear":
            entry["features"] = place.weight.shape[0]
        match = _LAYER_NAME.match(place.module)
        if match is not None and match[2] in self._family.heads_first:
            entry["sequence_axis"] = 2
        if entry["router"] == place.module:
            entry["width"] = self._width(place)
            entry["rows"] = self._rows(place)
        return entry

    def _scale(self, place: _Place, expert: int) -> float:
        """Of an expert's LoRA at a place, also where it is folded into a module of its own and only its bias is scaled."""
        source = self._sources[1 + expert]
        change = source.changes.get(f"{place.module}.weight") if isinstance(source, AdapterSource) else None
        return change.scale if isinstance(change, LowRank) else place.scales[expert]

    def _leader(self, place: _Place) -> str:
        per = self._recipe.mixture.router.scope
        if per == "model" or self._everything:
            return self._places[0].module
        if per in {"projection", "feature"}:
            return place.module
        return next(other.module for other in self._places if other.group == place.group)

    def _width(self, place: _Place) -> int:
        """Width of what a router at this place reads; or what a setting says (rows of an n-gram table)."""
        if self._recipe.mixture.router.gate_width is not None:
            return self._recipe.mixture.router.gate_width
        if not any(ref.name == f"{place.module}.weight" for ref in place.refs):
            return int(self._base.config["hidden_size"])  # a whole FFN
        shape = place.weight.shape
        return shape[1] if len(shape) == 2 else shape[0]

    def _rows(self, leader: _Place) -> list[int]:
        return gate_rows(self._recipe.mixture.router, [self._ranks_read(leader, expert) for expert in range(self._count)])

    def _ranks_read(self, leader: _Place, expert: int) -> int:
        """Ranks of an expert over all places that read the same input as the router of `leader`."""
        return sum(place.ranks[expert] for place in self._read_by(leader))

    def _read_by(self, leader: _Place) -> list[_Place]:
        """The places whose changes a router at `leader` could score."""
        return [self._places_by_name[name] for name in readers(leader.module, self._family, self._routers)]

    @cached_property
    def _places_by_name(self) -> dict[str, _Place]:
        return {place.module: place for place in self._places}

    @cached_property
    def _routers(self) -> dict[str, str]:
        return {place.module: self._leader(place) for place in self._places}

    def _low_rank_tensors(self, place: _Place) -> Iterator[PlannedTensor]:
        a_pieces, b_pieces = [], []
        weight = place.weight
        for expert, kind in enumerate(place.kinds):
            if isinstance(kind, LowRank):
                a_pieces.append(Piece(1 + expert, kind.a))
                b_pieces.append(Piece(1 + expert, rows_of(kind.b, kind.rows)))
            elif isinstance(kind, int):
                full = piece_of(self._sources, 1 + expert, weight).ref
                a_pieces.append(Piece(1 + expert, weight, factor=Factor("A", kind, full)))
                b_pieces.append(Piece(1 + expert, weight, factor=Factor("B", kind, full)))
        ranks = sum(place.ranks)
        code = self._adapter_code([*a_pieces, *b_pieces])
        role: Role = "adapter"
        yield joined(f"{place.module}.lora_A", code, (ranks, weight.shape[1]), role, tuple(a_pieces))
        columns: Operation = "columns"
        yield PlannedTensor(f"{place.module}.lora_B", code, (weight.shape[0], ranks), role, columns, tuple(b_pieces))

    def _adapter_code(self, pieces: list[Piece]) -> str:
        """The dtype of adapters: their own, so that they stay bit for bit; float32 when they differ."""
        if self._recipe.output.dtype != "source":
            return self._code_of(pieces[0].ref)
        codes = {"F32" if piece.factor is not None else piece.ref.dtype for piece in pieces}
        return codes.pop() if len(codes) == 1 else "F32"


def needs_base(recipe: Recipe, module: str, own: Sequence[int]) -> bool:
    """Whether the base's module stays at a place where the experts `own` have their own."""
    mixture = recipe.mixture
    # The router reads the base's embedding, unless it reads the tokens themselves.
    reads_it = module == EMBEDDING and mixture.fit is not None and mixture.fit.reads != "tokens"
    outside = mixture.always_on is not None and mixture.always_on.expert == BASE
    return len(own) < len(recipe.experts) or outside or reads_it


def whole_module_unscored(expert: str, module: str) -> UnsupportedError:
    """The error for a fit that scores low-rank changes where an expert has a module of its own."""
    return UnsupportedError(
        "the expert's part is no low-rank change that this router could score", where=f"expert '{expert}': {module}",
        remedy="choose a fit that reads text (logistic), or take the expert as lora",
    )  # fmt: skip


def readers(leader: str, family: Family, routers: Mapping[str, str]) -> list[str]:
    """The places that read the same input as the leader and follow its router: q, k and v, or gate and up, of its layer;
    else itself alone. `routers` maps a place to the place of its router.
    """
    match = _LAYER_NAME.match(leader)
    path = match[2] if match is not None else ""
    for parts in ({"q", "k", "v"}, {"gate", "up"}):
        paths = [family.parts[part] for part in PARTS if part in parts and part in family.parts]
        if match is not None and path in paths:
            names = dict.fromkeys(LAYER.format(layer=match[1]) + each for each in paths)
            return [name for name in names if routers.get(name) == leader]
    return [leader] if leader in routers else []


def routers_of(places: Mapping[str, Any]) -> dict[str, str]:
    """Place -> place of its router, from `config["modekit"]["places"]`."""
    return {module: entry["router"] for module, entry in places.items()}


def routing_config(recipe: Recipe) -> dict[str, Any]:
    """`modekit.routing` of config.json; see architecture/modekit_router.py."""
    mixture, router = recipe.mixture, recipe.mixture.router
    always_on = None
    if mixture.always_on is not None:
        place = recipe.names.index(mixture.always_on.expert) if mixture.always_on.expert in recipe.names else None
        always_on = {"expert": place, "weight": mixture.always_on.weight}
    weights = None
    if mixture.method == "linear":
        given = mixture.weights or dict.fromkeys(recipe.names, 1.0)
        total = sum(given.values())
        weights = [given[name] / total for name in recipe.names]
    routing: dict[str, Any] = {
        "method": mixture.method, "top_k": recipe.top_k if mixture.method == "routing" and mixture.top_p is None else None,
        "top_p": mixture.top_p, "weights": weights, "always_on": always_on,
    }  # fmt: skip
    if mixture.method != "linear":
        routing.update(score=router.row.score, jitter=router.jitter, noise=router.noise)
        routing["prefix"] = router.prefix_tokens
        if router.row.score == "ngram":
            routing["ngram"] = {"order": router.order, "buckets": router.buckets}
    routing["averages"] = router.averages
    return routing


def gate_rows(router: Router, ranks: list[int]) -> list[int]:
    """Rows of a gate per expert, for adapters of these ranks."""
    return [router.row.rows(rank) for rank in ranks]


def slots_of(modekit: dict[str, Any]) -> Iterator[RouterSlot]:
    """The routers that `config["modekit"]` names, in the order of the layers."""
    parts = len(modekit["routing"]["averages"])
    for module, entry in sorted(modekit["places"].items(), key=lambda item: _numbers(item[0])):
        if entry["router"] == module:
            yield RouterSlot(f"{module}.router.gate", entry["width"], tuple(entry["rows"]), entry.get("features", 0), parts)


def _within(module: str, tensor: str) -> str:
    """A tensor's name inside its module; of a tied head, the weight."""
    return tensor.removeprefix(f"{module}.") if tensor.startswith(f"{module}.") else tensor.rpartition(".")[2]


def _numbers(name: str) -> tuple[object, ...]:
    head = 0 if ".layers." in name else 1
    return (head, *((0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)))
