"""Which parts of a layer a recipe mixes in the modekit architecture: the named ones, or those in which experts differ."""

from __future__ import annotations

from modekit.errors import UnsupportedError
from modekit.recipes.layers import Layer
from modekit.recipes.recipe import Recipe
from modekit.sources.adapter import AdapterSource
from modekit.sources.family import Family
from modekit.sources.model import ModelSource
from modekit.sources.names import module_of, split_layer


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
        for part in stack.in_order:
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
