"""Whole FFN experts in every layer of an architecture that other tools know: a result by its headers, and how to plan one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, cast

from modekit.errors import CheckpointError, UnsupportedError
from modekit.files.typed import shortened
from modekit.planning.channel_choice import carried_size, channels_of, channels_said_by
from modekit.planning.channels import CarrySize, Channels
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
from modekit.planning.tensors import CodeOf, PlannedTensor, as_in, touched
from modekit.recipes.recipe import Recipe
from modekit.sources.config import Config, whole
from modekit.sources.family import Family
from modekit.sources.header import DTYPE_NAMES, TensorRef
from modekit.sources.names import EMBEDDING, FINAL_NORM, HEAD, in_layer, is_ignored, split_layer, weight_of
from modekit.sources.native import Native
from modekit.sources.natives import native_of
from modekit.sources.source import ModelSource
from modekit.weights.made import Copy, Join, Made, Padded, Zeros, scaled
from modekit.weights.padding import FFNKind, Pad

_PARTS: tuple[FFNKind, ...] = ("gate", "up", "down")
_NOT_ARCHITECTURE = ("_name_or_path", "auto_map", "torch_dtype", "dtype", "transformers_version", "architectures", "model_type")


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
            what = "modekit.json names a family that this version of modekit does not know"
            raise CheckpointError(what, where=where, found=native_type, remedy=BUILD_AGAIN) from None
        cls._check_counts(config, recipe, where, native, dense)
        return cls(config, recipe, where, native, channels_said_by(config, recipe, where, native, dense, carry))

    @classmethod
    def _check_counts(cls, config: Config, recipe: Recipe, where: str, native: Native, dense: Config) -> None:
        for key in (native.num_experts_key, native.top_k_key):
            count, most = config.get(key), len(recipe.experts)
            if type(count) is not int or not 1 <= count <= most:
                raise other_record(f"{where}: {key}", shortened(repr(count)), f"1 to {most}, the number of experts")

    @property
    def family(self) -> Family:
        """The row of the dense family."""
        return self.native.family

    @property
    def inner(self) -> int:
        """How many experts each of the recipe's has of its own: 1, unless the base is a mixture itself."""
        return 1

    @property
    def native_type(self) -> str:
        """Of the architecture, as modekit.json keeps it."""
        return self.native.native_type

    @property
    def also_runs_in(self) -> str:
        """Where the result runs besides transformers."""
        biased = bool(self.config.get("attention_bias")) and bool(self.native.serves_with_biases)
        engines = self.native.serves_with_biases if biased else self.native.serves
        wrong = self.vllm_differs
        return f"{engines}; in vLLM with --model-impl transformers, since its own class {wrong}" if wrong else engines

    @property
    def without_gguf(self) -> str | None:
        """Why llama.cpp does not run it; None where it does."""
        if "llama.cpp" in self.also_runs_in:
            return None
        return self.native.without_gguf or f"as it is, {self.native_type} runs in {self.also_runs_in}"

    @property
    def vllm_differs(self) -> str | None:
        """By the row and the config."""
        return next((what for holds, what in self.native.vllm_differs if holds(self.config)), None)

    @property
    def left_out(self) -> set[str]:
        """Tensors that transformers' class has and the result need not, as they have no number."""
        return self.native.empty_names(self._layers)

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
        what, remedy = "a native checkpoint holds whole experts, no adapters", "build with output: {format: modekit}"
        raise UnsupportedError(what, where=self.where, remedy=f"{remedy}, or see `modekit extract`")

    def rerouted(self, recipe: Recipe, tensors: Tensors) -> NativeShape:
        """The same experts under another recipe's routing."""
        return replace(self, config={**self.config, self.native.top_k_key: recipe.top_k})

    def refusals(self, recipe: Recipe) -> list[str]:
        """Settings of a recipe's mixture that only the modekit architecture says."""
        return recipe.beyond_native()

    def other_tensors(self, recipe: Recipe) -> bool:
        """Whether a router needs other channels, or makes something else of them in the first attention."""
        router = [each.mixture.router for each in (recipe, self.recipe) if each.mixture.fit and each.mixture.fit.carried]
        return len(router) == 1 or len({tuple(each.decays) for each in router}) > 1

    def check(self, tensors: Tensors) -> None:
        """Raise CheckpointError unless every tensor of what is mixed is there, in the shape that the others have."""
        self.check_sizes(tensors)
        native, count = self.native, self.experts * self.inner
        paths = [path.format(expert=expert) for path in (native.experts or {}).values() for expert in range(count)]
        ranks = dict.fromkeys(paths, 2) | dict.fromkeys(native.fused or (), 3)
        ranks |= {each.name: len(each.shape) for each in native.written_constants}
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
        names = (in_layer(layer, path) for layer in layers for path in self.native.family.mlp.values())
        return {name: unread(name, file, base.tensor(name).dtype, base.tensor(name).shape) for name in names}, {}

    def parameters(self, sizes: Mapping[str, int], dense: int) -> Parameters:
        """How many a checkpoint with tensors of these sizes has; `dense`, the base's by its files, counts with channels."""
        native, layers = self.native, range(self._layers)
        total = sum(sizes.values())
        besides = [slot.name for slot in self.slots]
        besides += [in_layer(layer, each.name) for layer in layers for each in native.written_constants]
        names = list(native.fused or [name.format(expert=0) for name in (native.experts or {}).values()])
        ffn = sum(sizes[in_layer(layer, name)] for layer in layers for name in names)
        per_expert = ffn // self.experts if native.fused else ffn
        if self.channels is None:  # what remains with one expert, no router and no constants
            dense = total - sum(map(sizes.__getitem__, besides)) - per_expert * (self.experts - 1)
        return Parameters(total, per_expert, total - per_expert * (self.experts - self.recipe.top_k), dense)

    @property
    def _layers(self) -> int:
        return whole(self.config, "num_hidden_layers")


class NativeForm:
    """The tensors of one recipe's result in a native architecture. Raises UnsupportedError where it cannot carry the router.

    Attributes:
        shape: of the result.
        router_dtype: safetensors dtype of the gates.
        mixed: tensors of the base of which every expert has its own.
        unties: head -> embedding, where they are one tensor in the base and two in the result.
        mixes_more: what a recipe has to say so that more parts and layers are mixed, for messages.
    """

    kind: ClassVar[type[NativeShape]] = NativeShape

    def __init__(self, recipe: Recipe, sources: tuple[ModelSource, ...], native: Native, code_of: CodeOf) -> None:
        self._recipe, self._sources, self._native, self._code_of = recipe, sources, native, code_of
        self._family, self._base = native.family, sources[0]
        self._dense = self._family.dense_config(self._base.config)
        self._inner = 1 if native.routed is None else native.routed.count(self._dense)
        self._count = len(recipe.experts) * self._inner
        self.mixes_more = f"{native.native_type} mixes FFNs alone; output: {{format: modekit}} mixes any part (mixture.modules)"
        self._channels = channels_of(recipe, native, self._dense)
        if self._channels is not None:
            carry = carried_size(recipe, sources, self._family, self._dense)
            self._channels = channels_of(recipe, native, self._dense, carry)
        self._front = int(self._channels is not None)
        self._layers = whole(self._base.config, "num_hidden_layers")
        self.mixed = {in_layer(layer, path) for layer in range(self._layers) for path in self._own_paths}
        gate = self._in_base(0, "gate")
        self.router_dtype, self._sizes = code_of(gate), gate.shape
        top_k = recipe.top_k if native.routed is None else whole(self._dense, native.top_k_key)
        sizes = {"experts": self._count, "top_k": top_k, "expert_hidden": gate.shape[0]}
        config = native_config(native, self._base.config, **sizes, dtype=DTYPE_NAMES[self.router_dtype])
        config = config if self._channels is None else self._channels.widened(config)
        self.shape = self.kind(config, recipe, self._base.spec, native, self._channels)
        self._carry = None if self._channels is None else self._channels.carry
        carries_head = self._carry is not None and self._carry.head and self._family.is_tied(self._base)
        self.unties: Mapping[str, str] = self._family.ties if carries_head else {}

    @property
    def _own_paths(self) -> Iterable[str]:
        """Tensors under a layer of the base of which every expert has its own."""
        return self._family.mlp.values()

    @property
    def carried(self) -> set[str]:
        """Tensors of the base by which experts may differ although all share them."""
        if self._carry is None or self._channels is None:
            return set()
        widening, parts = self._channels.widening, self._family.parts
        modules = [*(parts[part] for part in ("q", "k", "v", "o")), *widening.norms]
        names = {weight_of(in_layer(layer, module)) for layer in range(self._layers) for module in modules}
        ends = {HEAD: self._carry.head, FINAL_NORM: self._carry.head, EMBEDDING: self._carry.embedding}
        return names | {weight_of(module) for module, carried in ends.items() if carried}

    def notes(self) -> Iterable[str]:
        """What a user should know of this architecture."""
        if self._native.native_type == "mixtral" and self.shape.config.get("sliding_window"):
            yield "sliding window: exact in transformers; vLLM's and llama.cpp's Mixtral ignore it"
        if self._recipe.output.rank is not None and self._carry is None:
            yield "output.rank has no effect: no adapter changes more than FFNs; for full models write carry: all, too"
        if self._channels is not None:
            experts = [each for each in self._sources[1:] if each is not self._base]
            own = {each for each in self._base.tensors if each.startswith(in_layer(0)) and not is_ignored(each)}
            left = sorted(name for name in own - self.mixed - self.carried if any(touched(each, name) for each in experts))
            yield from self._channels.notes(self._recipe, [name.removeprefix(in_layer(0)) for name in left])

    def backbone(self, tensor: PlannedTensor) -> Iterator[PlannedTensor]:
        """What the result has of a tensor of the base: nothing of the experts' own. Raises UnsupportedError."""
        if tensor.name in self.mixed:
            return
        layer, path = split_layer(tensor.name)
        if isinstance(layer, int):
            if path.startswith(f"{self._family.mlp_module}."):
                raise UnsupportedError(
                    "the FFN has a tensor that the native experts do not",
                    where=f"base_model ({self._base.spec}): {tensor.name}",
                    expected=", ".join(self._family.mlp.values()),
                    remedy="use output: {format: modekit}, or choose a base model with a plain gated FFN",
                )
            tensor = replace(tensor, name=in_layer(layer + self._front, path))
        yield self._with_channels(tensor)

    def _with_channels(self, tensor: PlannedTensor) -> PlannedTensor:
        pad = None if self._channels is None else self._channels.pad_of(tensor.name, tensor.shape, self._family.parts)
        return widened(tensor, pad)

    def experts(self) -> Iterator[PlannedTensor]:
        """What the result has besides the backbone: in front a layer whose experts add nothing, all experts, constants."""
        nothing = dict.fromkeys(_PARTS, [None] * self._count)
        if self._front:
            yield from self._in_front()
            yield from self._of_layer(0, nothing)
        for layer in range(self._layers):
            made = {part: [each for one in self._sources[1:] for each in self._of(one, layer, part)] for part in _PARTS}
            yield from self._of_layer(layer + self._front, made)
        spare, units = (0, 0) if self._channels is None else (self._channels.spare, self._channels.more_units)
        letters = {"D": self._sizes[1] + spare, "F": self._sizes[0] + units, "E": self._count}
        for layer in range(self._layers + self._front):
            for constant in self._native.written_constants:
                shape, name = tuple(letters.get(each) or int(each) for each in constant.shape), in_layer(layer, constant.name)
                yield PlannedTensor(name, self.router_dtype, shape, "constant", Zeros(shape))

    def _in_front(self) -> Iterable[PlannedTensor]:
        """Of the layer before the base's first, of the shapes that the first has: attention that averages evidence and nothing
        else, norms as there.
        """
        assert self._channels is not None
        norms, within = self._channels.widening.norms, in_layer(0)
        for name, ref in self._base.tensors.items():
            if name.startswith(within) and name not in self.mixed and not is_ignored(name):
                made = Copy(ref) if name.rpartition(".")[0].removeprefix(within) in norms else Zeros(ref.shape)
                yield self._with_channels(PlannedTensor(name, self._code_of(ref), ref.shape, "backbone", made))

    def _of_layer(self, layer: int, made: Mapping[str, Sequence[Made | None]]) -> Iterator[PlannedTensor]:
        """The experts in a layer of the result, by what each has of a part of the FFN; zeros where there is nothing.

        Fused, all experts lie in two tensors, gate and up side by side in the first: there, matrices are widened one by one.
        """
        factors, of_base = self._factors(), max(0, layer - self._front)
        for part, path in (self._native.experts or {}).items():
            ref = self._in_base(of_base, part)
            for number, own in enumerate(made[part]):
                expert = number // self._inner
                given = scaled(own or Zeros(ref.shape), factors[expert] if part == "down" else 1.0)
                name = in_layer(layer, path.format(expert=number))
                plain = PlannedTensor(name, self._code_of(ref), ref.shape, "expert", given, expert)
                yield widened(plain, self._pad(part, layer, number))
        if self._native.fused is not None:
            ref = self._in_base(of_base, "gate")
            (rows, columns), code = ref.shape, self._code_of(ref)
            both, down = (in_layer(layer, path) for path in self._native.fused)
            gate_up = [each for pair in zip(made["gate"], made["up"], strict=True) for each in pair]
            apart = widened(of_all(both, code, gate_up, (rows, columns), 2 * self._inner), self._pad("gate_up", layer))
            yield replace(apart, shape=(self._count, 2 * apart.shape[1], apart.shape[2]))
            yield widened(of_all(down, code, made["down"], (columns, rows), self._inner), self._pad("down", layer))

    def _pad(self, part: str, layer: int, expert: int | None = None) -> Pad | None:
        return None if self._channels is None else self._channels.expert_pad(cast(FFNKind, part), layer, expert)

    def _of(self, source: ModelSource, layer: int, part: FFNKind) -> Sequence[Made]:
        """What a model has of a part of the FFN: one for each expert of its own, where it is a mixture itself."""
        return [as_in(source, self._in_base(layer, part))]

    def _in_base(self, layer: int, part: str) -> TensorRef:
        """A part of the FFN in a layer of the base."""
        return self._base.tensor(in_layer(layer, self._family.mlp[part]))

    def _factors(self) -> list[float]:
        """What the last projection of each expert is multiplied with. Raises UnsupportedError for fused experts."""
        weights = self._recipe.mixture.weights
        if weights is None:
            return [1.0] * len(self._recipe.experts)
        # A zero gate weighs every expert 1/E; E w_e in front of the last projection makes it w_e.
        total = sum(weights.values())
        factors = [len(weights) * weights[name] / total for name in self._recipe.names]
        if self._native.experts is None and set(factors) != {1.0}:
            raise UnsupportedError(
                "given weights cannot be folded into this family's fused experts",
                where="mixture.weights",
                remedy="leave weights out (all experts equal), or use output: {format: modekit}",
            )
        return factors


def widened(tensor: PlannedTensor, pad: Pad | None) -> PlannedTensor:
    """The tensor in a larger one; itself without a pad."""
    if pad is None:
        return tensor
    made = Padded(tensor.made, pad, tensor.dtype, tensor.shape)
    return replace(tensor, shape=made.shape, made=made)


def of_all(name: str, code: str, parts: Sequence[Made | None], matrix: tuple[int, int], each: int) -> PlannedTensor:
    """All experts in one tensor, `each` matrices of every one below each other; zeros without parts."""
    found, shape = tuple(made for made in parts if made is not None), (len(parts), *matrix)
    made = Join(found, experts=tuple(place // each for place in range(len(found)))) if found else Zeros(shape)
    return PlannedTensor(name, code, shape, "expert", made)


def native_config(
    row: Native, config: Config, *, experts: int, top_k: int, expert_hidden: int, dtype: str
) -> dict[str, object]:
    """The native config.json: the dense one, renamed and completed.

    `experts` is E, `expert_hidden` is F, `dtype` one of float32, bfloat16, float16.
    """
    dense = row.family.dense_config(config)
    native = dict(dense)
    for key in (*row.dropped, *_NOT_ARCHITECTURE):
        native.pop(key, None)
    if not row.writes_head_dim:
        native.pop("head_dim", None)
    native.update(row.fixed)
    native.update(
        {
            "architectures": [row.native_class],
            "model_type": row.native_type,
            "dtype": dtype,
            row.num_experts_key: experts,
            row.top_k_key: top_k,
            row.expert_hidden_key or "intermediate_size": expert_hidden,
        }
    )
    native.update({key: compute(dense) for key, compute in row.computed.items()})
    return native
