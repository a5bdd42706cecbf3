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
from modekit.planning.places import InBits, Places, PlannedPlace
from modekit.planning.routing_config import routing_config, whole_module_unscored
from modekit.planning.tensors import CodeOf, PlannedTensor, as_in
from modekit.recipes.recipe import Recipe
from modekit.sources.adapter import LowRank
from modekit.sources.family import Family
from modekit.sources.header import DTYPE_NAMES, TensorRef
from modekit.sources.names import split_layer, weight_of
from modekit.sources.pairs import PAIR_CLASS
from modekit.sources.rows import rows_of
from modekit.sources.source import ModelSource
from modekit.weights.made import Copy, Delta, Join, Made

_CONFIG = {"AutoConfig": "configuration_modekit.ModekitConfig"}
_CAUSAL = {"AutoModel": "modeling_modekit.ModekitModel", "AutoModelForCausalLM": "modeling_modekit.ModekitForCausalLM"}
_PAIR = {"AutoModelForSeq2SeqLM": f"modekit_pairs.{PAIR_CLASS}"}


class ModekitLayout:
    """Every tensor of one recipe's result in the modekit architecture. Raises UnsupportedError when it cannot be said."""

    is_native, channels = False, None
    mixes_more = "mix these parts and layers, too (mixture.modules, mixture.layers)"

    def __init__(self, recipe: Recipe, sources: tuple[ModelSource, ...], family: Family, code_of: CodeOf) -> None:
        self._recipe, self._sources, self._family, self._code_of = recipe, sources, family, code_of
        self._base = sources[0]
        self._places = Places(recipe, sources, family)
        self.unties = self._places.unties
        self.router_dtype = code_of(self._base.tensor(weight_of(family.embedding)))
        fit = recipe.mixture.fit
        if fit is not None and fit.reads == "changes":
            self._check_scored()

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

    def widened(self, tensor: PlannedTensor) -> Iterator[PlannedTensor]:
        """A tensor of the backbone, as it is."""
        yield tensor

    def shape(self, where: str) -> ModekitShape:
        """The base's config.json with what is mixed where under `modekit`."""
        config = {key: value for key, value in self._base.config.items() if key not in ("torch_dtype", "_name_or_path")}
        if self.unties and not self._family.shares:  # whose class takes it for something else
            config["tie_word_embeddings"] = False
        config |= {
            "architectures": [PAIR_CLASS if self._family.pair else "ModekitForCausalLM"],
            "model_type": "modekit",
            "dtype": DTYPE_NAMES[self.router_dtype],
            "auto_map": {**_CONFIG, **(_PAIR if self._family.pair else _CAUSAL)},
            "modekit": self._said.as_written(),
        }
        return ModekitShape(config, self._recipe, where, self._said)

    def notes(self) -> Iterable[str]:
        """What a user should know of this form."""
        for expert, said in enumerate(self._recipe.experts):
            if said.adapter is not None and any(expert in place.own for place in self._places):
                yield (
                    f"{said.name}: parts of its adapter are no plain low-rank change (DoRA, biases) "
                    "and are kept as whole modules"
                )
        if self._places.splits_ffn and "mlp" in self._places.wanted and any(place.own for place in self._places):
            yield "whole and low-rank experts meet in the FFN: gate, up and down are mixed each, not the FFN's outputs"
        for said in self._recipe.experts:
            if said.bits is not None:
                bits = f"{said.bits} bit{'s' if said.bits > 1 else ''}"
                yield f"{said.name}: differences of its weights are rounded to {bits} per number"
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
            yield from self._low_rank_tensors(place)
            yield from self._few_bits_tensors(place)
            added = self._added_biases(place)
            if added:
                yield self._of_experts(f"{place.module}.lora_bias", added, (len(added), place.matrix.shape[0]))

    @cached_property
    def _said(self) -> MixtureConfig:
        optional: dict[str, Any] = {
            "variant": self._family.variant,
            "labels": self._recipe.other_labels,
            "derived": self._family.derived,
        }
        return MixtureConfig(
            format=FORMAT,
            dense_type=self._family.model_type,
            experts=self._recipe.names,
            routing=routing_config(self._recipe),
            places={place.module: self._entry(place) for place in self._places},
            **{key: value for key, value in optional.items() if value},
        )

    def _entry(self, place: PlannedPlace) -> Place:
        """The place in config.json; see architecture/modekit_mixed.py."""
        biased, mixture = [*self._added_biases(place)], self._recipe.mixture
        layer, path = split_layer(place.module)
        entry: dict[str, object] = {
            "ranks": place.ranks,
            "scales": [each.scale if isinstance(each, LowRank) else 1.0 for each in place.kinds],
            "own": place.own,
            "base": self._places.keeps_base(place),
            "router": self._places.leaders[place.module],
        }
        optional = {
            "bits": place.bits if any(place.bits) else None,
            "biased": biased,
            "features": place.matrix.shape[0] if mixture.router.scope == "feature" and mixture.method != "linear" else None,
            "calls": list(place.calls),
            "of_source": self._family.of_source(place.module),
            "sequence_axis": 2 if layer is not None and path in self._family.heads_first else None,
        }
        entry |= {key: value for key, value in optional.items() if value}
        if entry["router"] == place.module:
            entry |= {"width": self._places.width(place), "rows": self._places.rows(place)}
        return Place.model_validate(entry)

    def _check_scored(self) -> None:
        """Raise UnsupportedError where a router that scores low-rank changes stands before a whole module."""
        for leader in self._places:
            for place in self._places.read_by(leader) if self._places.leaders[leader.module] == leader.module else ():
                if place.own:
                    raise whole_module_unscored(self._recipe.experts[place.own[0]], place.module)

    def _low_rank_tensors(self, place: PlannedPlace) -> Iterator[PlannedTensor]:
        """A and B of all experts, each in one tensor."""
        a, b = dict[int, Made](), dict[int, Made]()
        for expert, kind in enumerate(place.kinds):
            if isinstance(kind, LowRank):
                a[expert], b[expert] = Copy(kind.a), Copy(_rows(kind.b, kind.rows))
            elif isinstance(kind, int):
                pair = self._pair(expert, place.matrix)
                a[expert], b[expert] = Delta(*pair, "A", kind), Delta(*pair, "B", kind)
        if a:
            (outputs, inputs), ranks, code = (
                place.matrix.shape,
                sum(place.ranks),
                self._adapter_code([*a.values(), *b.values()]),
            )
            yield self._of_experts(f"{place.module}.lora_A", a, (ranks, inputs), 0, code)
            yield self._of_experts(f"{place.module}.lora_B", b, (outputs, ranks), 1, code)

    def _few_bits_tensors(self, place: PlannedPlace) -> Iterator[PlannedTensor]:
        """Codes and steps, of every expert its own."""
        kept = [(expert, bits) for expert, bits in enumerate(place.bits) if bits]
        for number, (expert, bits) in enumerate(kept):
            pair = self._pair(expert, place.matrix)
            for made, code in ((Delta(*pair, "codes", bits), "U8"), (Delta(*pair, "steps", bits), "F32")):
                name = f"{place.module}.differences.{number}.{made.part}"
                yield PlannedTensor(name, code, made.shape, "adapter", made, expert)

    def _added_biases(self, place: PlannedPlace) -> dict[int, Made]:
        """Expert with a difference in a few bits -> what its bias differs by from the base's."""
        found = dict[int, Made]()
        bias = next((ref for ref in place.refs if ref != place.weight), None)
        for expert, kind in enumerate(place.kinds):
            if isinstance(kind, InBits) and bias is not None:
                found[expert] = Delta(*self._pair(expert, bias))
        return found

    def _pair(self, expert: int, ref: TensorRef) -> tuple[TensorRef, TensorRef]:
        """A tensor of a full model, and that of the base."""
        ref = self._places.original(ref)
        return self._sources[1 + expert].matching(ref), ref

    def _of_experts(
        self, name: str, parts: dict[int, Made], shape: tuple[int, ...], axis: Literal[0, 1] = 0, code: str | None = None
    ) -> PlannedTensor:
        """Parts of several experts in one tensor."""
        made = Join(tuple(parts.values()), axis, tuple(parts))
        return PlannedTensor(name, code or self._adapter_code([*parts.values()]), shape, "adapter", made)

    def _adapter_code(self, parts: list[Made]) -> str:
        """Their own dtype, so that adapters stay bit for bit; float32 when they differ."""
        if self._recipe.output.dtype != "source":
            return self._code_of(parts[0].refs[0])
        codes = {_dtype(part) for part in parts}
        return codes.pop() if len(codes) == 1 else "F32"


def _dtype(part: Made) -> str:
    """Of what it is made of: of a difference the base's, of its best low-rank part float32."""
    if isinstance(part, Copy):
        return part.ref.dtype
    return part.base.dtype if isinstance(part, Delta) and not part.rank else "F32"


def _rows(ref: TensorRef, rows: tuple[int, int] | None) -> TensorRef:
    return ref if rows is None else rows_of(ref, *rows)
