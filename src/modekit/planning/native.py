"""How a mixture lies in an architecture that other tools know: whole FFN experts in every layer (native_shape.py)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import ClassVar, cast

from modekit.errors import UnsupportedError
from modekit.planning.carry import CarrySize, carried_size
from modekit.planning.changes import touched
from modekit.planning.channels import channels_of
from modekit.planning.native_shape import NativeShape
from modekit.planning.notes import notes_of_channels
from modekit.planning.tensors import CodeOf, PlannedTensor
from modekit.recipes.recipe import Recipe
from modekit.sources.config import whole
from modekit.sources.header import DTYPE_NAMES, TensorRef
from modekit.sources.names import EMBEDDING, FINAL_NORM, HEAD, in_layer, is_ignored, split_layer, weight_of
from modekit.sources.native import Native
from modekit.sources.source import ModelSource
from modekit.weights.made import Copy, Join, Made, Padded, Zeros, as_in, scaled
from modekit.weights.padding import FFNKind, Pad

_PARTS: tuple[FFNKind, ...] = ("gate", "up", "down")


class NativeForm:
    """The tensors of one recipe's result in a native architecture. Raises UnsupportedError where it cannot carry the router.

    Attributes:
        shape: of the result.
        code_of: safetensors dtype of what comes of a tensor.
        router_dtype: that of the gates.
        mixed: tensors of the base of which every expert has its own.
        unties: head -> embedding, where they are one tensor in the base and two in the result.
        mixes_more: what a recipe has to say so that more parts and layers are mixed, for messages.
    """

    kind: ClassVar[type[NativeShape]] = NativeShape

    def __init__(self, recipe: Recipe, sources: tuple[ModelSource, ...], native: Native, code_of: CodeOf) -> None:
        self._recipe = recipe
        self._sources = sources
        self._native = native
        self.code_of = code_of
        self._family = native.family
        self._base = sources[0]
        self._dense = self._family.dense_config(self._base.config)
        self._inner = 1 if native.routed is None else native.routed.count(self._dense)
        self._count = len(recipe.experts) * self._inner
        self.mixes_more = f"{native.native_type} mixes FFNs alone; output: {{format: modekit}} mixes any part (mixture.modules)"
        self._channels = channels_of(recipe, native, self._dense, self._carried_size())
        if self._channels is not None and native.routed is None:
            self.mixes_more += "; output: {carry: all} carries the rest"
        self._front = int(self._channels is not None)
        self._layers = whole(self._base.config, "num_hidden_layers")
        paths = self._family.decoder.mlp.values() if native.routed is None else native.routed.own
        self.mixed = {in_layer(layer, path) for layer in range(self._layers) for path in paths}
        gate = self._in_base(0, "gate")
        if self._channels is not None:
            self.code_of = partial(_code_beside_channels, code_of)
            if recipe.output.dtype == "float16":
                raise UnsupportedError(
                    "a plain checkpoint has no gates in float16: they would be beyond 65,504",
                    where="output.dtype",
                    found="float16",
                    expected="bfloat16 or float32",
                    remedy="leave output.dtype out, or write output: {format: modekit}",
                )
        self.router_dtype = self.code_of(gate)
        self._sizes = gate.shape
        top_k = recipe.top_k if native.routed is None else whole(self._dense, native.top_k_key)
        sizes = {"experts": self._count, "top_k": top_k, "expert_hidden": gate.shape[0]}
        config = native.config(self._base.config, **sizes, dtype=DTYPE_NAMES[self.router_dtype])
        config = config if self._channels is None else self._channels.widened(config)
        self.shape = self.kind(config, recipe, self._base.spec, native, self._channels)
        self._carry = None if self._channels is None else self._channels.carry
        carries_head = self._carry is not None and self._carry.head and self._family.is_tied(self._base)
        self.unties: Mapping[str, str] = self._family.ties if carries_head else {}

    def _carried_size(self) -> CarrySize | None:
        """What is carried besides the experts' own."""
        return carried_size(self._recipe, self._sources, self._family, self._dense)

    @property
    def carried(self) -> set[str]:
        """Tensors of the base by which experts may differ although all share them."""
        if self._carry is None or self._channels is None:
            return set()
        parts = self._family.decoder.parts
        modules = [*(parts[part] for part in ("q", "k", "v", "o")), *self._channels.widening.norms]
        names = {weight_of(in_layer(layer, module)) for layer in range(self._layers) for module in modules}
        ends = {HEAD: self._carry.head, FINAL_NORM: self._carry.head, EMBEDDING: self._carry.embedding}
        return names | {weight_of(module) for module, carried in ends.items() if carried}

    def notes(self) -> Iterable[str]:
        """What a user should know of this architecture."""
        if self._native.native_type == "mixtral" and self.shape.config.get("sliding_window"):
            yield "sliding window: exact in transformers; vLLM's and llama.cpp's Mixtral ignore it"
        if self._recipe.output.rank is not None and self._carry is None:
            yield "output.rank has no effect: no expert changes more than FFNs"
        if self._channels is not None:
            if self._base.tensor(weight_of(EMBEDDING)).source_dtype == "F16" and self.router_dtype == "BF16":
                yield "float16 is written as bfloat16: the gates would be beyond float16; the modekit architecture keeps it"
            experts = [each for each in self._sources[1:] if each is not self._base]
            own = {each for each in self._base.tensors if each.startswith(in_layer(0)) and not is_ignored(each)}
            left = sorted(name for name in own - self.mixed - self.carried if any(touched(each, name) for each in experts))
            yield from notes_of_channels(self._channels, self._recipe, [name.removeprefix(in_layer(0)) for name in left])

    def backbone(self, tensor: PlannedTensor) -> Iterator[PlannedTensor]:
        """What the result has of a tensor of the base: nothing of the experts' own. Raises UnsupportedError."""
        if tensor.name in self.mixed:
            return
        layer, path = split_layer(tensor.name)
        if isinstance(layer, int):
            if self._native.routed is None and path.startswith(f"{self._family.decoder.ffn}."):
                raise UnsupportedError(
                    "the FFN has a tensor that the native experts do not",
                    where=f"{self._base.where}: {tensor.name}",
                    expected=", ".join(self._family.decoder.mlp.values()),
                    remedy="use output: {format: modekit}, or choose a base model with a plain gated FFN",
                )
            tensor = replace(tensor, name=in_layer(layer + self._front, path))
        yield self._with_channels(tensor)

    def _with_channels(self, tensor: PlannedTensor) -> PlannedTensor:
        pad = None if self._channels is None else self._channels.pad_of(tensor.name, tensor.shape, self._family.decoder.parts)
        return widened(tensor, pad)

    def experts(self) -> Iterator[PlannedTensor]:
        """What the result has besides the backbone: in front a layer whose experts add nothing, all experts, constants."""
        nothing: dict[str, list[Made | None]] = dict.fromkeys(_PARTS, [None] * self._count)
        if self._front:
            yield from self._in_front()
            yield from self._of_layer(0, nothing)
        for layer in range(self._layers):
            made: dict[str, list[Made]] = {
                part: [each for one in self._sources[1:] for each in self._of(one, layer, part)] for part in _PARTS
            }
            yield from self._of_layer(layer + self._front, made)
        spare, units = (0, 0) if self._channels is None else (self._channels.spare, self._channels.more_units)
        letters = {"D": self._sizes[1] + spare, "F": self._sizes[0] + units, "E": self._count}
        for layer in range(self._layers + self._front):
            for constant in self._native.constants:
                shape = tuple(letters.get(each) or int(each) for each in constant.shape)
                name = in_layer(layer, constant.name)
                yield PlannedTensor(name, self.router_dtype, shape, "constant", Zeros(shape))

    def _in_front(self) -> Iterable[PlannedTensor]:
        """Of the layer before the base's first, of the shapes that the first has: attention that averages evidence and nothing
        else, norms as there.
        """
        assert self._channels is not None
        # A gate of what all tokens have keeps its numbers, although what it opens is zero.
        gate = None if self._native.routed is None else self._native.routed.shared_gate
        kept = {*self._channels.widening.norms, gate}
        within = in_layer(0)
        for name, ref in self._base.tensors.items():
            if name.startswith(within) and name not in self.mixed and not is_ignored(name):
                made = Copy(ref) if name.rpartition(".")[0].removeprefix(within) in kept else Zeros(ref.shape)
                yield self._with_channels(PlannedTensor(name, self.code_of(ref), ref.shape, "backbone", made))

    def _of_layer(self, layer: int, made: Mapping[str, Sequence[Made | None]]) -> Iterator[PlannedTensor]:
        """The experts in a layer of the result, by what each has of a part of the FFN; zeros where there is nothing.

        Fused, all experts lie in two tensors, gate and up side by side in the first: there, matrices are widened one by one.
        """
        factors = self._factors()
        of_base = max(0, layer - self._front)
        for part, path in (self._native.experts or {}).items():
            ref = self._in_base(of_base, part)
            for number, own in enumerate(made[part]):
                expert = number // self._inner
                given = scaled(own or Zeros(ref.shape), factors[expert] if part == "down" else 1.0)
                name = in_layer(layer, path.format(expert=number))
                plain = PlannedTensor(name, self.code_of(ref), ref.shape, "expert", given, expert)
                yield widened(plain, self._pad(part, layer, number))
        if self._native.fused is not None:
            ref = self._in_base(of_base, "gate")
            rows, columns = ref.shape
            code = self.code_of(ref)
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
        return self._base.tensor(in_layer(layer, self._family.decoder.mlp[part]))

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


def _code_beside_channels(code_of: CodeOf, ref: TensorRef) -> str:
    """Without float16, in which neither gates nor units that pass a stream on are finite."""
    code = code_of(ref)
    return "BF16" if code == "F16" else code


def widened(tensor: PlannedTensor, pad: Pad | None) -> PlannedTensor:
    """The tensor in a larger one; itself without a pad."""
    if pad is None:
        return tensor
    made = Padded(tensor.made, pad, tensor.dtype, tensor.shape)
    return replace(tensor, shape=made.shape, made=made)


def of_all(name: str, code: str, parts: Sequence[Made | None], matrix: tuple[int, int], each: int) -> PlannedTensor:
    """All experts in one tensor, `each` matrices of every one below each other; zeros without parts."""
    found = tuple(made for made in parts if made is not None)
    shape = (len(parts), *matrix)
    made = Join(found, experts=tuple(place // each for place in range(len(found)))) if found else Zeros(shape)
    return PlannedTensor(name, code, shape, "expert", made)
