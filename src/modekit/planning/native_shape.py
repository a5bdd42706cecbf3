"""A mixture of whole FFN experts in an architecture that other tools know, by the headers of a result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from modekit.errors import CheckpointError, SourceError, UnsupportedError
from modekit.files.typed import shortened
from modekit.planning.carry import CarrySize
from modekit.planning.channels import Channels, channels_of
from modekit.planning.mixture_config import Average, MixtureConfig, Routing
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
from modekit.recipes.recipe import Recipe
from modekit.sources.config import Config, whole
from modekit.sources.family import Family
from modekit.sources.names import in_layer
from modekit.sources.native import Native, Routed
from modekit.sources.natives import native_of
from modekit.sources.source import ModelSource


@dataclass(frozen=True)
class NativeShape(AnyShape):
    """A mixture in the architecture of one row of sources/natives.py; `channels` are what carries a router's evidence to the
    gates besides the base's channels, where anything has to.
    """

    native: Native
    channels: Channels | None = None

    plain = True
    without_vllm = None

    @classmethod
    def opened(
        cls, config: Config, recipe: Recipe, where: str, native_type: str, dense: Config, carry: CarrySize | None
    ) -> NativeShape:
        """Of a finished checkpoint, by the row that it was written by, and what its record says that it carries.

        Raises CheckpointError when there is no row, or config.json has other numbers of experts or channels than can be.
        """
        try:
            native = native_of(native_type, str(dense.get("model_type")))
        except StopIteration:
            raise CheckpointError(
                "modekit.json names a family that this version of modekit does not know",
                where=where,
                found=native_type,
                remedy=BUILD_AGAIN,
            ) from None
        cls._check_counts(config, recipe, where, native, dense)
        return cls(config, recipe, where, native, _channels_said_by(config, recipe, where, native, dense, carry))

    @classmethod
    def _check_counts(cls, config: Config, recipe: Recipe, where: str, native: Native, dense: Config) -> None:
        for key in (native.num_experts_key, native.top_k_key):
            count = config.get(key)
            most = len(recipe.experts)
            if type(count) is not int or not 1 <= count <= most:
                raise other_record(f"{where}: {key}", shortened(repr(count)), f"1 to {most}, the number of experts")

    @property
    def family(self) -> Family:
        """The row of the dense family."""
        return self.native.family

    @property
    def routed(self) -> Routed | None:
        """How the base is a mixture itself, where it is one."""
        return self.native.routed

    @property
    def native_type(self) -> str:
        """Of the architecture, as modekit.json keeps it."""
        return self.native.native_type

    @property
    def also_runs_in(self) -> str:
        """Where the result runs besides transformers."""
        engines = self.native.serves.removesuffix(", llama.cpp") if self._gguf_differs else self.native.serves
        wrong = self.vllm_differs
        return f"{engines}; in vLLM with --model-impl transformers, since its own class {wrong}" if wrong else engines

    @property
    def without_gguf(self) -> str | None:
        """Why llama.cpp does not run it; None where it does."""
        if "llama.cpp" in self.also_runs_in:
            return None
        return self._gguf_differs or self.native.without_gguf or f"as it is, {self.native_type} runs in {self.also_runs_in}"

    @property
    def _gguf_differs(self) -> str | None:
        return next((what for holds, what in self.native.gguf_differs if holds(self.config)), None)

    @property
    def vllm_differs(self) -> str | None:
        """What vLLM's own class computes otherwise, so that it must run transformers'."""
        return next((what for holds, what in self.native.vllm_differs if holds(self.config)), None)

    @property
    def left_out(self) -> set[str]:
        """Tensors that transformers' class has and the result need not, as they have no number."""
        return {in_layer(layer, name) for layer in range(self._layers) for name in self.native.empty}

    @property
    def slots(self) -> tuple[RouterSlot, ...]:
        """The routers in the order of the layers: one each."""
        hidden = whole(self.config, "hidden_size")
        router = self.native.router
        return tuple(RouterSlot(in_layer(layer, router), hidden, self.experts) for layer in range(self._layers))

    @property
    def positions(self) -> tuple[RouterPosition, ...]:
        """Where they stand: before the FFN of every layer."""
        module = self.native.family.decoder.ffn
        router = self.native.router
        return tuple(RouterPosition(in_layer(layer, router), layer, module) for layer in range(self._layers))

    @property
    def routing(self) -> Routing:
        """How they decide: top_k of the token's own logits; a zero gate with top_k = E where weights are fixed."""
        top_k = whole(self.config, self.native.top_k_key)
        return Routing(method="routing", averages=[Average(decay=None)], top_k=top_k, top_p=None, weights=None, always_on=None)

    @property
    def mixture(self) -> MixtureConfig:
        """Nothing that could be asked for by place. Raises UnsupportedError."""
        raise UnsupportedError(
            "a plain checkpoint holds whole experts, no adapters",
            where=self.where,
            remedy="build with output: {format: modekit}, or see `modekit extract`",
        )

    def rerouted(self, recipe: Recipe, tensors: Tensors) -> NativeShape:
        """The same experts under another recipe's routing."""
        return replace(self, config={**self.config, self.native.top_k_key: recipe.top_k})

    def refusals(self, recipe: Recipe) -> list[str]:
        """Settings of a recipe's mixture that only the modekit architecture says."""
        return recipe.beyond_plain()

    def other_tensors(self, recipe: Recipe) -> bool:
        """Whether a router needs other channels, or makes something else of them in the first attention."""
        router = [each.mixture.router for each in (recipe, self.recipe) if each.mixture.is_carried]
        return len(router) == 1 or len({tuple(each.decays) for each in router}) > 1

    def check(self, tensors: Tensors) -> None:
        """Raise CheckpointError unless every tensor of what is mixed is there, in the shape that the others have."""
        self.check_sizes(tensors)
        native = self.native
        count = self.experts * self.inner
        paths = [path.format(expert=expert) for path in (native.experts or {}).values() for expert in range(count)]
        ranks = dict.fromkeys(paths, 2) | dict.fromkeys(native.fused or (), 3)
        ranks |= {each.name: len(each.shape) for each in native.constants}
        for name, rank in ((in_layer(layer, path), rank) for layer in range(self._layers) for path, rank in ranks.items()):
            if name not in tensors or len(tensors[name].shape) != rank:
                raise self.disagreement(name)
        for layer in range(self._layers) if native.fused is not None else ():
            both, down = (tensors[in_layer(layer, name)].shape for name in native.fused or ())
            if both != (count, both[1], down[1]) or down != (count, down[1], both[1] // 2) or both[1] % 2:
                raise self.disagreement(f"an FFN of layer {layer}")

    def recorded(self, expert: int, base: ModelSource, tensors: Tensors, file: Path) -> Recorded:
        """As of ModekitShape: an adapter is folded into tensors of the expert's own."""
        layers = range(self._layers - int(self.channels is not None))
        names = (in_layer(layer, path) for layer in layers for path in self.native.family.decoder.mlp.values())
        return {name: unread(name, file, base.tensor(name).dtype, base.tensor(name).shape) for name in names}, {}

    def parameters(self, sizes: Mapping[str, int], dense: int) -> Parameters:
        """How many a checkpoint with tensors of these sizes has; `dense`, the base's by its files, counts with channels."""
        native = self.native
        layers = range(self._layers)
        total = sum(sizes.values())
        besides = [slot.name for slot in self.slots]
        besides += [in_layer(layer, each.name) for layer in layers for each in native.constants]
        per_expert = self._one_expert(sizes)
        if self.channels is None:  # what remains with one expert, no router and no constants
            dense = total - sum(map(sizes.__getitem__, besides)) - per_expert * (self.experts - 1)
        return Parameters(total, per_expert, total - per_expert * (self.experts - self.recipe.top_k), dense)

    def _one_expert(self, sizes: Mapping[str, int]) -> int:
        """Parameters of one of all experts' FFNs, in all layers."""
        native = self.native
        names = list(native.fused or [name.format(expert=0) for name in (native.experts or {}).values()])
        ffn = sum(sizes[in_layer(layer, name)] for layer in range(self._layers) for name in names)
        return ffn // (self.experts * self.inner) if native.fused else ffn

    @property
    def _layers(self) -> int:
        return whole(self.config, "num_hidden_layers")


def _channels_said_by(
    config: Config, recipe: Recipe, where: str, native: Native, dense: Config, carry: CarrySize | None
) -> Channels | None:
    """Those of a finished checkpoint. Raises CheckpointError where its record cannot have them, or config.json has others."""
    try:
        channels = channels_of(recipe, native, dense, carry)
        wide = {} if channels is None else channels.widened(config)
    except (UnsupportedError, SourceError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            "modekit.json does not say a base that could carry this router",
            where=f"{where}: dense_config",
            found=shortened(str(error)),
            remedy=BUILD_AGAIN,
        ) from None
    for key, value in wide.items():
        if config.get(key) != value:
            raise other_record(f"{where}: {key}", shortened(repr(config.get(key))), value)
    return channels
