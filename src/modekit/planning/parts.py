"""Which parts of a layer a recipe mixes in the modekit architecture, and what each expert has at a place."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from modekit.errors import UnsupportedError
from modekit.recipes.layers import Layer
from modekit.recipes.recipe import Recipe
from modekit.sources.adapter import AdapterSource
from modekit.sources.adapter_rules import LowRank
from modekit.sources.family import Family
from modekit.sources.header import TensorRef
from modekit.sources.names import POSITIONS, module_of, split_layer, weight_of
from modekit.sources.prefix import SoftPrefix
from modekit.sources.source import ModelSource


@dataclass(frozen=True)
class FewBits:
    """A difference kept in so many bits per number."""

    bits: int


Kind = LowRank | SoftPrefix | FewBits | str | int | None
"""What an expert has at a place: its low-rank change, a prefix, a difference in a few bits, "own" a module of its own, a rank
to factorise to, or the base's."""


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
        return [kind.bits if isinstance(kind, FewBits) else 0 for kind in self.kinds]

    @property
    def scales(self) -> list[float]:
        """Per expert what its change is multiplied with."""
        return [kind.scale if isinstance(kind, LowRank) else 1.0 for kind in self.kinds]

    @property
    def prefix(self) -> str:
        """What the names of its tensors begin with."""
        return f"{module_of(self.module) if self.calls else self.module}."

    def within(self, tensor: str) -> str:
        """A tensor's name inside the place; of the bias of logits, which stands with the head, the last part."""
        return tensor.removeprefix(self.prefix) if tensor.startswith(self.prefix) else tensor.rpartition(".")[2]

    @property
    def weight(self) -> TensorRef:
        """Of the base's module."""
        weight = weight_in(self.module, self.refs)
        assert weight is not None, self.module
        return weight

    @property
    def may_be_low_rank(self) -> bool:
        """Whether it is a linear map, or an embedding of tokens."""
        weight = weight_in(self.module, self.refs)
        return weight is not None and len(weight.shape) == 2 and self.module.rpartition(".")[2] not in POSITIONS


def weight_in(module: str, refs: Iterable[TensorRef]) -> TensorRef | None:
    """The weight among a module's tensors."""
    return next((ref for ref in refs if ref.name == weight_of(module)), None)


class MixedParts:
    """The parts of one recipe over one family's layers; `mlp` is the whole FFN. Raises UnsupportedError."""

    def __init__(self, recipe: Recipe, sources: tuple[ModelSource, ...], family: Family) -> None:
        self._recipe, self._sources, self._family = recipe, sources, family
        self._check()

    @property
    def splits_ffn(self) -> bool:
        """Whether the FFN is mixed projection by projection: for low-rank experts, and routers finer than a module."""
        low = any(
            isinstance(source, AdapterSource) or expert.is_low_rank
            for expert, source in zip(self._recipe.experts, self._sources[1:], strict=True)
        )
        return low or self._recipe.mixture.router.scope in {"projection", "feature"}

    @property
    def mixes_whole_ffn(self) -> bool:
        """Whether the FFN as a whole was meant, however finely it is mixed in the end."""
        return "mlp" in self._wanted()

    def in_order(self, layer: Layer) -> list[tuple[str, str]]:
        """Part and its module under a layer, in the order in which they run; fused ones once."""
        wanted, stack = self._wanted(), self._family.stack_of(layer)
        if "mlp" in wanted and self.splits_ffn:
            wanted = (wanted - {"mlp"}) | stack.ffn_parts
        chosen = {"mlp": stack.ffn} if "mlp" in wanted and stack.ffn else {}
        for part in stack.parts:
            if part in wanted and stack.parts[part] not in chosen.values():
                chosen[part] = stack.parts[part]
        return sorted(chosen.items(), key=lambda entry: stack.rank(entry[1]))

    def _wanted(self) -> set[str]:
        modules = self._recipe.mixture.modules
        return set(modules) if isinstance(modules, list) else self._automatic()

    def _automatic(self) -> set[str]:
        """The FFN for full models, for adapters what they change, for `as: lora` every linear part."""
        wanted: set[str] = set()
        for expert, source in zip(self._recipe.experts, self._sources[1:], strict=True):
            if isinstance(source, AdapterSource):
                changed = {(layer, module_of(path)) for layer, path in map(split_layer, source.changes) if layer is not None}
                paths = {(self._family.stack_of(layer).name, path) for layer, path in changed}
                for stack in self._family.stacks:
                    wanted |= {part for part, path in stack.parts.items() if (stack.name, path) in paths}
            elif expert.is_low_rank:
                wanted |= set(self._family.all_parts)
            elif not expert.is_base:
                wanted.add("mlp")
        if "mlp" in wanted:
            wanted -= {part for stack in self._family.stacks for part in stack.ffn_parts}
        return wanted or {"mlp"}

    def _check(self) -> None:
        modules = self._recipe.mixture.modules
        if not isinstance(modules, list):
            return
        known = self._family.all_parts
        unknown = [part for part in modules if part != "mlp" and part not in known]
        if unknown:
            raise UnsupportedError(
                f"'{self._family.model_type}' has no such part",
                where="mixture.modules",
                found=", ".join(unknown),
                expected=", ".join(["mlp", *known]),
                remedy="correct the list",
            )
        for part in modules:
            path = self._family.parts.get(part)
            partners = [other for other, its in self._family.parts.items() if its == path and other not in modules]
            if path is not None and partners:
                raise UnsupportedError(
                    f"'{self._family.model_type}' keeps these parts in one module ({path})",
                    where="mixture.modules",
                    found=part,
                    expected=f"{', '.join([part, *partners])} together",
                    remedy="name them all, or none",
                )
