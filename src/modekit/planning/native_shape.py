"""The native shape by its headers: whole FFN experts in every layer of an architecture that other tools know."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from modekit.errors import CheckpointError, SourceError, UnsupportedError
from modekit.files.typed import shortened
from modekit.planning.carry import CarrySize
from modekit.planning.channel_choice import channels_of
from modekit.planning.channels import Channels
from modekit.planning.mixture_config import Average, MixtureConfig, Routing
from modekit.planning.segments import segments_of
from modekit.planning.shape import (
    BUILD_AGAIN,
    AnyShape,
    MixedTensor,
    Parameters,
    RouterPosition,
    RouterSlot,
    Tensors,
    check_sizes,
    disagreement,
    other_record,
)
from modekit.recipes.recipe import Recipe
from modekit.sources.config import Config, whole
from modekit.sources.family import Family
from modekit.sources.names import in_layer
from modekit.sources.natives import Native, native_of


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
        """The shape of a finished checkpoint, by the row that it was written by, and what its record says that it carries.

        Raises CheckpointError when this version has none, or config.json has other numbers of experts or channels than there
        can be.
        """
        try:
            native = native_of(native_type, str(dense.get("model_type")))
        except StopIteration:
            raise CheckpointError(
                "modekit.json names a family that this version of modekit does not know",
                where=where,
                found=native_type,
                remedy="build the mixture again with this version of modekit",
            ) from None
        for key in (native.num_experts_key, native.top_k_key):
            count, most = config.get(key), len(recipe.experts)
            if type(count) is not int or not 1 <= count <= most:
                raise other_record(f"{where}: {key}", shortened(repr(count)), f"1 to {most}, the number of experts")
        return cls(config, recipe, where, native, _channels_said_by(config, recipe, where, native, dense, carry))

    @property
    def family(self) -> Family:
        """The row of the dense family."""
        return self.native.family

    @property
    def native_type(self) -> str:
        """`model_type` of the architecture, as modekit.json keeps it."""
        return self.native.native_type

    @property
    def also_runs_in(self) -> str:
        """Where the result runs besides transformers."""
        biased = bool(self.config.get("attention_bias")) and bool(self.native.serves_with_biases)
        engines = self.native.serves_with_biases if biased else self.native.serves
        wrong = self._vllm_differs
        return f"{engines}; in vLLM with --model-impl transformers, since its own class {wrong}" if wrong else engines

    @property
    def without_gguf(self) -> str | None:
        """Why llama.cpp does not run it; None where it does."""
        if "llama.cpp" in self.also_runs_in:
            return None
        return self.native.without_gguf or f"as it is, {self.native_type} runs in {self.also_runs_in}"

    @property
    def through_transformers(self) -> bool:
        """Whether vLLM must run transformers' class, since its own computes something else."""
        return self._vllm_differs is not None

    @property
    def _vllm_differs(self) -> str | None:
        return next((what for holds, what in self.native.vllm_differs if holds(self.config)), None)

    @property
    def left_out(self) -> set[str]:
        """Tensors that transformers' class has and the result need not, as they have no number."""
        return self.native.empty_names(self._layers)

    @property
    def mixed(self) -> list[str]:
        """Modules under a layer of which experts have their own: the whole FFN."""
        return ["mlp"]

    @property
    def slots(self) -> tuple[RouterSlot, ...]:
        """The routers in the order of the layers: one each."""
        rows, hidden = (1,) * self.experts, whole(self.config, "hidden_size")
        return tuple(RouterSlot(in_layer(layer, self.native.router), hidden, rows) for layer in range(self._layers))

    @property
    def positions(self) -> tuple[RouterPosition, ...]:
        """Where they stand: before the FFN of every layer."""
        module = self.native.family.mlp_module
        return tuple(RouterPosition(slot.name, layer, module) for layer, slot in enumerate(self.slots))

    @property
    def routing(self) -> Routing:
        """How they decide: top_k of the token's own logits; a zero gate with top_k = E where weights are fixed."""
        top_k = whole(self.config, self.native.top_k_key)
        return Routing(method="routing", averages=[Average(decay=None)], top_k=top_k, top_p=None, weights=None, always_on=None)

    @property
    def mixture(self) -> MixtureConfig:
        """Nothing that could be asked for by place. Raises UnsupportedError."""
        raise UnsupportedError(
            "a native checkpoint holds whole experts, no adapters",
            where=self.where,
            remedy="build the recipe with output: {format: modekit}, or see `modekit extract`",
        )

    def rerouted(self, recipe: Recipe, tensors: Tensors) -> NativeShape:
        """The same experts under another recipe's routing."""
        return replace(self, config={**self.config, self.native.top_k_key: recipe.top_k})

    def refusals(self, recipe: Recipe) -> list[str]:
        """Settings of a recipe's mixture that only the modekit architecture says."""
        return [*recipe.beyond_native(), *segments_of(self.recipe).refusals(recipe.top_k)]

    def carries(self, recipe: Recipe) -> bool:
        """Whether the router of a recipe needs the channels that this checkpoint has, and no others."""
        return _carried(recipe) == _carried(self.recipe)

    def check(self, tensors: Tensors) -> None:
        """Raise CheckpointError unless every tensor of what is mixed is there, in the shape that the others have."""
        check_sizes(self.config, self.native.family, tensors, self.where)
        native, layers = self.native, range(self._layers)
        for layer in layers:
            for name in self._names(layer):
                self._check_rank(tensors, name, 2 if native.experts is not None else 3)
            for constant in native.written_constants:
                self._check_rank(tensors, in_layer(layer, constant.name), len(constant.shape))
            if native.fused is not None:
                both, down = (tensors[in_layer(layer, name)].shape for name in native.fused)
                if both != (self.experts, both[1], down[1]) or down != (self.experts, down[1], both[1] // 2) or both[1] % 2:
                    raise disagreement(f"{self.where}: {in_layer(layer, native.fused[0])}")

    def _names(self, layer: int) -> list[str]:
        """Of the experts' tensors in a layer."""
        if self.native.experts is None:
            return [in_layer(layer, name) for name in self.native.fused or ()]
        paths = self.native.experts.values()
        return [in_layer(layer, path.format(expert=expert)) for path in paths for expert in range(self.experts)]

    def _check_rank(self, tensors: Tensors, name: str, rank: int) -> None:
        if name not in tensors or len(tensors[name].shape) != rank:
            raise disagreement(f"{self.where}: {name}")

    def mixed_tensors(self, tensors: Tensors) -> Iterator[MixedTensor]:
        """What each expert has of gate, up and down of every layer of the base, in the base's shape: without the channels and
        units besides its own. Of an expert with weight 0 the last projection is zero, and not here.
        """
        native, weights = self.native, self.recipe.mixture.weights
        front, spare, units = (0, 0, 0) if self.channels is None else self._more(self.channels)
        for layer in range(front, self._layers):
            for part, path in native.family.mlp.items():
                if native.fused is None:
                    names = [
                        in_layer(layer, (native.experts or {})[part].format(expert=expert)) for expert in range(self.experts)
                    ]
                    own = {expert: tensors[name] for expert, name in enumerate(names)}
                    rows, columns = own[0].shape
                else:
                    ref = tensors[in_layer(layer, native.fused[part == "down"])]
                    own = dict.fromkeys(range(self.experts), ref)
                    rows, columns = ref.shape[1] // (1 if part == "down" else 2), ref.shape[2]
                if weights is not None and part == "down":
                    own = {expert: ref for expert, ref in own.items() if weights[self.recipe.names[expert]] > 0}
                shape = (rows - spare, columns - units) if part == "down" else (rows - units, columns - spare)
                yield MixedTensor(in_layer(layer - front, path), shape, own)

    @staticmethod
    def _more(channels: Channels) -> tuple[int, int, int]:
        """Layers in front of the base's, channels and hidden units besides its own."""
        return int(channels.front), channels.spare, channels.more_units

    def parameters(self, sizes: Mapping[str, int], dense: int) -> Parameters:
        """How many a checkpoint with tensors of these sizes has; `dense`, the base's by its files, counts with channels."""
        native, layers = self.native, range(self._layers)
        total = sum(sizes.values())
        router = sum(sizes[slot.name] for slot in self.slots)
        constants = sum(sizes[in_layer(layer, each.name)] for layer in layers for each in native.written_constants)
        names = list(native.fused or [name.format(expert=0) for name in (native.experts or {}).values()])
        ffn = sum(sizes[in_layer(layer, name)] for layer in layers for name in names)
        per_expert = ffn // self.experts if native.fused else ffn
        if self.channels is None:  # what remains with one expert, no router and no constants
            dense = total - router - constants - per_expert * (self.experts - 1)
        return Parameters(total, per_expert, total - per_expert * (self.experts - self.recipe.top_k), dense)

    @property
    def _layers(self) -> int:
        return whole(self.config, "num_hidden_layers")


def _carried(recipe: Recipe) -> object:
    """What of a recipe's mixture decides which channels there are, and what its first attention makes of them."""
    fit = recipe.mixture.fit
    if fit is None or not fit.carried:
        return None
    return recipe.mixture.router.decay or fit.fading


def _channels_said_by(
    config: Config, recipe: Recipe, where: str, native: Native, dense: Config, carry: CarrySize | None
) -> Channels | None:
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
