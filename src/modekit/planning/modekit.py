"""How a mixture lies in the modekit architecture: what its tensors are called and what its config.json says.

`config["modekit"]["places"]` says for each place what the torch modules in architecture/ need to know, so that these know
nothing of families or recipes. Which places there are says places.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any, Literal

from modekit.planning.mixture_config import FORMAT, MixtureConfig, Place
from modekit.planning.modekit_shape import ModekitShape
from modekit.planning.parts import PlannedPlace
from modekit.planning.places import Places
from modekit.planning.prefixes import entry_of, prefix_tensors
from modekit.planning.routing_config import routing_config, whole_module_unscored
from modekit.planning.tensors import CodeOf, PlannedTensor, as_in
from modekit.recipes.fits import CHANGES
from modekit.recipes.recipe import Recipe
from modekit.sources.adapter import AdapterSource
from modekit.sources.adapter_rules import LowRank
from modekit.sources.family import Family
from modekit.sources.header import DTYPE_NAMES
from modekit.sources.names import split_layer, weight_of
from modekit.sources.pairs import PAIR_CLASS
from modekit.sources.rows import rows_of
from modekit.sources.source import ModelSource
from modekit.sources.towers import kept_settings
from modekit.weights.made import Bits, Copy, Difference, Factor, Join, Made

_CONFIG = {"AutoConfig": "configuration_modekit.ModekitConfig"}
_CAUSAL = {"AutoModel": "modeling_modekit.ModekitModel", "AutoModelForCausalLM": "modeling_modekit.ModekitForCausalLM"}
_WHOLE = "ModekitForImageTextToText"
_PAIR = {"AutoModelForSeq2SeqLM": f"modekit_pairs.{PAIR_CLASS}"}


class ModekitLayout:
    """The modekit shape of one recipe, as native.py has the other. Raises UnsupportedError when it cannot be said."""

    is_native, channels = False, None
    mixes_more = "mix these parts and layers, too (mixture.modules, mixture.layers)"

    def __init__(self, recipe: Recipe, sources: tuple[ModelSource, ...], family: Family, code_of: CodeOf) -> None:
        self._recipe, self._sources, self._family, self._code_of = recipe, sources, family, code_of
        self._base = sources[0]
        self._count = len(recipe.experts)
        self._places = Places(recipe, sources, family)
        self.unties = self._places.unties
        self.router_dtype = code_of(self._base.tensor(weight_of(family.embedding)))
        self._check_router()

    def backbone_name(self, name: str) -> str | None:
        """What a tensor of the base is called in the backbone; None when no expert needs the base's module."""
        place = self._places.by_tensor.get(name)
        if place is None:
            return name
        return f"{place.module}.base.{place.within(name)}" if self._places.keeps_base(place) else None

    def mixed_names(self) -> set[str]:
        """Tensors of the base of which experts have their own."""
        return {name for name, place in self._places.by_tensor.items() if place.is_mixed}

    def carried_names(self) -> set[str]:
        """None: what experts differ by is theirs here."""
        return set()

    def shape(self, where: str) -> ModekitShape:
        """The base's config.json with what is mixed where under `modekit`."""
        config = {key: value for key, value in self._base.config.items() if key not in ("torch_dtype", "_name_or_path")}
        if self.unties and not self._family.shares:  # whose class takes it for something else
            config["tie_word_embeddings"] = False
        settings = kept_settings(self._base) if self._recipe.output.keep else None
        whole = {} if settings is None else {f"AutoModel{_WHOLE.removeprefix('Modekit')}": f"modeling_modekit.{_WHOLE}"}
        alone = PAIR_CLASS if self._family.pair else "ModekitForCausalLM"
        config |= {
            "architectures": [alone if settings is None else _WHOLE],
            "model_type": "modekit",
            "dtype": DTYPE_NAMES[self.router_dtype],
            "auto_map": {**_CONFIG, **(_PAIR if self._family.pair else _CAUSAL), **whole},
            "modekit": self._said.as_written(),
        }
        return ModekitShape(config, self._recipe, where, self._said, settings)

    def widened(self, tensor: PlannedTensor) -> Iterator[PlannedTensor]:
        """As it is."""
        yield tensor

    def notes(self) -> Iterable[str]:
        """What a user should know of this shape."""
        for expert, name in enumerate(self._recipe.names):
            if isinstance(self._sources[1 + expert], AdapterSource) and any(expert in place.own for place in self._places):
                yield (
                    f"{name}: parts of its adapter are no plain low-rank change (DoRA, IA3, biases) "
                    "and are kept as whole modules"
                )
        parts = self._places.parts
        if parts.splits_ffn and parts.mixes_whole_ffn and any(place.own for place in self._places):
            yield "whole and low-rank experts meet in the FFN: gate, up and down are mixed each, not the FFN's outputs"
        for said in self._recipe.experts:
            if said.bits is not None:
                yield f"{said.name}: differences of its weights are rounded to {said.bits} bits per number"
            if said.lora_rank is not None:
                yield (
                    f"{said.name}: only a part of rank {said.lora_rank} of its difference from the base is kept; "
                    "changes of norms and biases are lost"
                )

    def tensors(self) -> Iterator[PlannedTensor]:
        """What the experts have at every place."""
        for place in self._places:
            for number, expert in enumerate(place.own):
                for ref in place.refs:
                    name = f"{place.module}.experts.{number}.{place.within(ref.name)}"
                    made = as_in(self._sources[1 + expert], self._places.original(ref))
                    yield PlannedTensor(name, self._code_of(ref), ref.shape, "expert", made, expert)
            if any(place.ranks):
                yield from self._low_rank_tensors(place)
            yield from self._few_bits_tensors(place)
            yield from prefix_tensors(place, self._code_of, first=self._is_first(place))
            biases = {expert: self._places.added_bias(place, expert) for expert in range(self._count)}
            added: dict[int, Made] = {expert: bias for expert, bias in biases.items() if bias is not None}
            if added:
                shape = (len(added), place.weight.shape[0])
                code = self._adapter_code([*added.values()])
                yield PlannedTensor(f"{place.module}.lora_bias", code, shape, "adapter", _of_experts(added, 0))

    @cached_property
    def _said(self) -> MixtureConfig:
        labels = self._recipe.other_labels
        optional: dict[str, Any] = {"variant": self._family.variant} if self._family.variant else {}
        optional |= {"wrapper": (self._base.wrapper or {}).get("model_type")} if self._recipe.output.keep else {}
        optional |= {"labels": labels} if labels else {}
        optional |= {"derived": self._family.derived} if self._family.derived is not None else {}
        return MixtureConfig(
            format=FORMAT,
            dense_type=self._family.model_type,
            experts=self._recipe.names,
            routing=routing_config(self._recipe),
            places={place.module: self._entry(place) for place in self._places},
            **optional,
        )

    def _entry(self, place: PlannedPlace) -> Place:
        """The place in config.json; see architecture/modekit_mixed.py."""
        entry: dict[str, object] = {
            "ranks": place.ranks,
            "scales": place.scales,
            "own": place.own,
            "base": self._places.keeps_base(place),
            "router": self._places.leaders[place.module],
        }
        entry |= entry_of(place, first=self._is_first(place))
        if any(place.bits):
            entry["bits"] = place.bits
        biased = [expert for expert in range(self._count) if self._places.added_bias(place, expert) is not None]
        if biased:
            entry["biased"] = biased
            entry["scales"] = [self._places.scale(place, expert) for expert in range(self._count)]
        if self._recipe.mixture.router.scope == "feature" and self._recipe.mixture.method != "linear":
            entry["features"] = place.weight.shape[0]
        if place.calls:
            entry["calls"] = list(place.calls)
        if self._family.of_source(place.module):
            entry["of_source"] = True
        layer, path = split_layer(place.module)
        if layer is not None and path in self._family.heads_first:
            entry["sequence_axis"] = 2
        if entry["router"] == place.module:
            entry["width"] = self._places.width(place)
            entry["rows"] = self._places.rows(place)
        return Place.model_validate(entry)

    def _is_first(self, place: PlannedPlace) -> bool:
        return place is next(iter(self._places))

    def _check_router(self) -> None:
        """Raise UnsupportedError when the fit scores low-rank changes and a router stands before a whole module."""
        mixture = self._recipe.mixture
        if mixture.fit is None or mixture.fit.reads is not CHANGES:
            return
        for leader in self._places:
            for place in self._places.read_by(leader) if self._places.leaders[leader.module] == leader.module else ():
                if place.own:
                    raise whole_module_unscored(self._recipe.experts[place.own[0]], place.module)

    def _low_rank_tensors(self, place: PlannedPlace) -> Iterator[PlannedTensor]:
        """A and B of all experts, each in one tensor."""
        a, b, weight = dict[int, Made](), dict[int, Made](), place.weight
        for expert, kind in enumerate(place.kinds):
            if isinstance(kind, LowRank):
                a[expert], b[expert] = Copy(kind.a), Copy(kind.b if kind.rows is None else rows_of(kind.b, *kind.rows))
            elif isinstance(kind, int):
                pair = self._places.pair(expert, weight)
                a[expert], b[expert] = Factor(*pair, "A", kind), Factor(*pair, "B", kind)
        ranks, code = sum(place.ranks), self._adapter_code([*a.values(), *b.values()])
        yield PlannedTensor(f"{place.module}.lora_A", code, (ranks, weight.shape[1]), "adapter", _of_experts(a, 0))
        yield PlannedTensor(f"{place.module}.lora_B", code, (weight.shape[0], ranks), "adapter", _of_experts(b, 1))

    def _few_bits_tensors(self, place: PlannedPlace) -> Iterator[PlannedTensor]:
        """Codes and steps, of every expert its own."""
        kept = [(expert, bits) for expert, bits in enumerate(place.bits) if bits]
        for number, (expert, bits) in enumerate(kept):
            pair = self._places.pair(expert, place.weight)
            for made, code in ((Bits(*pair, "codes", bits), "U8"), (Bits(*pair, "steps", bits), "F32")):
                name = f"{place.module}.differences.{number}.{made.side}"
                yield PlannedTensor(name, code, made.shape, "adapter", made, expert)

    def _adapter_code(self, parts: list[Made]) -> str:
        """Their own dtype, so that adapters stay bit for bit; float32 when they differ."""
        if self._recipe.output.dtype != "source":
            return self._code_of(parts[0].refs[0])
        codes = {"F32" if isinstance(part, Factor) else _dtype(part) for part in parts}
        return codes.pop() if len(codes) == 1 else "F32"


def _dtype(part: Made) -> str:
    """Of what it is made of: of a difference, the base's."""
    return part.base.dtype if isinstance(part, Difference) else part.ref.dtype if isinstance(part, Copy) else "F32"


def _of_experts(parts: dict[int, Made], axis: Literal[0, 1]) -> Join:
    return Join(tuple(parts.values()), axis, tuple(parts))
