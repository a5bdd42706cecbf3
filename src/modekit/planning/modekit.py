"""How a mixture lies in the modekit architecture: what its tensors are called and what its config.json says.

`config["modekit"]["places"]` says for each place what the torch modules in architecture/ need to know, so that these know
nothing of families or recipes. Which places there are says places.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, Literal

from modekit.planning.mixture_config import FORMAT, InsidePlace, MixtureConfig, Place, routing_config
from modekit.planning.modekit_shape import ModekitShape, gate_of, whole_module_unscored
from modekit.planning.places import Places, PlannedPlace, untied
from modekit.planning.tensors import CodeOf, PlannedTensor
from modekit.recipes.recipe import Recipe
from modekit.sources.adapter import AdapterSource, LowRank
from modekit.sources.family import Family
from modekit.sources.header import DTYPE_NAMES, TensorRef
from modekit.sources.names import HEAD, LOGITS_BIAS, split_layer, weight_of
from modekit.sources.pairs import PAIR_CLASS
from modekit.sources.source import ModelSource
from modekit.weights.made import Copy, Delta, Join, Made, as_in

_CONFIG = {"AutoConfig": "configuration_modekit.ModekitConfig"}
_CAUSAL = {"AutoModel": "modeling_modekit.ModekitModel", "AutoModelForCausalLM": "modeling_modekit.ModekitForCausalLM"}
_PAIR = {"AutoModelForSeq2SeqLM": f"modekit_pairs.{PAIR_CLASS}"}


class ModekitForm:
    """As NativeForm, in the modekit architecture. Raises UnsupportedError when a recipe cannot be said."""

    carried = frozenset[str]()
    mixes_more = "mix these parts and layers, too (mixture.modules, mixture.layers)"

    def __init__(self, recipe: Recipe, sources: tuple[ModelSource, ...], family: Family, code_of: CodeOf) -> None:
        self._recipe = recipe
        self._sources = sources
        self._family = family
        self.code_of = code_of
        self._base = sources[0]
        self.unties = untied(recipe, sources[0], family)
        self._places = Places(recipe, sources, family).all()
        self.router_dtype = code_of(self._base.tensor(weight_of(family.embedding)))
        by_tensor = ((ref.name, place) for place in self._places for ref in place.refs if ref.name.startswith(place.prefix))
        self._by_tensor = dict(by_tensor)
        self._by_tensor.update((LOGITS_BIAS, place) for place in self._places if place.module == HEAD)
        self.mixed = {name for name, place in self._by_tensor.items() if place.is_mixed}
        self.shape = self._shape()
        if recipe.mixture.fit is not None and recipe.mixture.fit.reads == "changes":
            mixture = self.shape.mixture
            own = dict[str, int]()
            for place in (each for each in self._places if each.own or each.inside):
                own[place.module] = next(expert for expert in range(len(recipe.experts)) if place.has(expert))
            leaders = [module for module, place in mixture.places.items() if place.router == module]
            for module in (each for leader in leaders for each in mixture.readers(leader) if each in own):
                raise whole_module_unscored(recipe.experts[own[module]], module)

    def backbone(self, tensor: PlannedTensor) -> Iterator[PlannedTensor]:
        """What the result has of a tensor of the base: nothing where no expert needs the base's module."""
        place = self._by_tensor.get(tensor.name)
        if place is None:
            yield tensor
        elif place.base:
            yield replace(tensor, name=f"{place.module}.base.{place.within(tensor.name)}")

    def notes(self) -> Iterable[str]:
        """What a user should know of this form."""
        blocks = ", and of routed experts," if self._family.routed else ""
        for said in self._recipe.experts:
            if said.lora_rank is not None:
                yield (
                    f"{said.name}: only a part of rank {said.lora_rank} of its difference from the base is kept; "
                    f"changes of embedding, head, norms and biases{blocks} are lost"
                )

    def experts(self) -> Iterator[PlannedTensor]:
        """What the experts have at every place."""
        for place in self._places:
            for number, expert in enumerate(place.own):
                for ref in place.refs:
                    name = f"{place.module}.experts.{number}.{place.within(ref.name)}"
                    made = as_in(self._sources[1 + expert], self._original(ref))
                    yield PlannedTensor(name, self.code_of(ref), ref.shape, "expert", made, expert)
            yield from self._low_rank_tensors(place)
            kept = [(expert, bits) for expert, bits in enumerate(place.bits) if bits]
            for number, (expert, bits) in enumerate(kept):
                pair = self._pair(expert, place.weight)
                for bit, code in ((Delta(*pair, "codes", bits), "U8"), (Delta(*pair, "steps", bits), "F32")):
                    name = f"{place.module}.differences.{number}.{bit.part}"
                    yield PlannedTensor(name, code, bit.shape, "adapter", bit, expert)
            if added := self._added_biases(place):
                biases = self._of_experts(f"{place.module}.lora_bias", added)
                yield replace(biases, shape=(len(added), *next(iter(added.values())).shape))

    def _shape(self) -> ModekitShape:
        """The base's config.json with what is mixed where under `modekit`."""
        recipe = self._recipe
        family = self._family
        config = {key: value for key, value in self._base.config.items() if key not in ("torch_dtype", "_name_or_path")}
        optional: dict[str, Any] = {"variant": family.variant, "labels": recipe.other_labels, "derived": family.derived}
        said = MixtureConfig(
            format=FORMAT,
            dense_type=family.model_type,
            experts=recipe.names,
            routing=routing_config(recipe),
            places={place.module: self._entry(place) for place in self._places},
            **{key: value for key, value in optional.items() if value},
        )
        if self.unties and not family.shares:  # whose class takes it for something else
            config["tie_word_embeddings"] = False
        config |= {
            "architectures": [PAIR_CLASS if family.pair else "ModekitForCausalLM"],
            "model_type": "modekit",
            "dtype": DTYPE_NAMES[self.router_dtype],
            "auto_map": {**_CONFIG, **(_PAIR if family.pair else _CAUSAL)},
            "modekit": said.as_written(),
        }
        return ModekitShape(config, recipe, self._base.spec, said)

    def _entry(self, place: PlannedPlace) -> Place:
        """The place in config.json; see architecture/modekit_mixed.py."""
        biased = [*self._added_biases(place)]
        inside = [self._inside_entry(place, ref, ranks).as_written() for ref, ranks in place.inside]
        layer, path = split_layer(place.module)
        parts = {} if layer is None else self._family.stack_of(layer).parts
        cross = {parts.get("cross_k"), parts.get("cross_v")}  # which run on the encoder's output
        optional = {
            "bits": list(place.bits) if any(place.bits) else None,
            "biased": biased,
            "calls": list(place.calls),
            "of_source": path in cross,
            "inside": inside,
            "sequence_axis": 2 if layer is not None and path in self._family.heads_first else None,
        }
        weight = None if place.weight is None else place.weight.shape
        return Place.model_validate(
            {
                "ranks": list(place.ranks),
                "scales": [1.0 if change is None else change.scale for change in place.changes],
                "own": list(place.own),
                "base": place.base,
                **{key: value for key, value in optional.items() if value},
                **gate_of(place.module, weight, place.leader, self._recipe, self._family, self._base.config),
            }
        )

    def _low_rank_tensors(self, place: PlannedPlace) -> Iterator[PlannedTensor]:
        """A and B of all experts, each in one tensor; then those of the tensors in a place that is itself a mixture."""
        a, b = dict[int, Made](), dict[int, Made]()
        for expert, (change, rank) in enumerate(zip(place.changes, place.ranks, strict=True)):
            if change is not None:
                a[expert] = Copy(change.a)
                b[expert] = Copy(change.b)
            elif rank:
                pair = self._pair(expert, place.weight)
                a[expert], b[expert] = Delta(*pair, "A", rank), Delta(*pair, "B", rank)
        if a:
            yield from self._both(place.module, a, b)
        for ref, ranks in place.inside:
            changes = {expert: self._change(expert, ref) for expert, rank in enumerate(ranks) if rank}
            a = {expert: Copy(change.a) for expert, change in changes.items()}
            b = {expert: Copy(change.b) for expert, change in changes.items()}
            yield from self._both(f"{place.module}.{self._inside_entry(place, ref, ranks).name}", a, b)

    def _both(self, name: str, a: dict[int, Made], b: dict[int, Made]) -> Iterable[PlannedTensor]:
        code = self._adapter_code([*a.values(), *b.values()])
        return self._of_experts(f"{name}.lora_A", a, 0, code), self._of_experts(f"{name}.lora_B", b, 1, code)

    def _inside_entry(self, place: PlannedPlace, ref: TensorRef, ranks: tuple[int, ...]) -> InsidePlace:
        scales = [self._change(expert, ref).scale if rank else 1.0 for expert, rank in enumerate(ranks)]
        return InsidePlace(tensor=place.within(ref.name), ranks=list(ranks), scales=scales)

    def _change(self, expert: int, ref: TensorRef) -> LowRank:
        """An adapter's change of a tensor that it is known to change."""
        source = self._sources[1 + expert]
        assert isinstance(source, AdapterSource)
        return source.changes[ref.name]

    def _added_biases(self, place: PlannedPlace) -> dict[int, Made]:
        """Expert with a difference in a few bits -> what its bias differs by from the base's."""
        bias = next((ref for ref in place.refs if ref != place.weight), None)
        if bias is None:
            return {}
        return {expert: Delta(*self._pair(expert, bias)) for expert, bits in enumerate(place.bits) if bits}

    def _original(self, ref: TensorRef) -> TensorRef:
        """The tensor of the base that a place's tensor is, which has another name where models tie what is untied here."""
        return self._base.tensor(self.unties.get(ref.name, ref.name))

    def _pair(self, expert: int, ref: TensorRef | None) -> tuple[TensorRef, TensorRef]:
        """A tensor of a full model, and that of the base."""
        assert ref is not None  # what is kept of a difference is of one matrix
        ref = self._original(ref)
        return self._sources[1 + expert].matching(ref), ref

    def _of_experts(self, name: str, parts: dict[int, Made], axis: Literal[0, 1] = 0, code: str | None = None) -> PlannedTensor:
        """Parts of several experts in one tensor."""
        made = Join(tuple(parts.values()), axis, tuple(parts))
        return PlannedTensor(name, code or self._adapter_code([*parts.values()]), made.shape, "adapter", made)

    def _adapter_code(self, parts: list[Made]) -> str:
        """Their own dtype, so that adapters stay bit for bit; float32 when they differ."""
        if self._recipe.output.dtype != "source":
            return self.code_of(parts[0].refs[0])
        codes = {_dtype(part) for part in parts}
        return codes.pop() if len(codes) == 1 else "F32"


def _dtype(part: Made) -> str:
    """Of what it is made of: of a difference the base's, of its best low-rank part float32."""
    if isinstance(part, Copy):
        return part.ref.dtype
    return part.base.dtype if isinstance(part, Delta) and not part.rank else "F32"
