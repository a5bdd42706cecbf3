"""How a mixture of whole FFN experts lies in a native architecture: names, experts, constants, config."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from modekit.errors import UnsupportedError
from modekit.planning.carry import carried_size
from modekit.planning.channel_choice import channels_of
from modekit.planning.native_shape import NativeShape
from modekit.planning.segments import segments_of
from modekit.planning.tensors import CodeOf, PlannedTensor, as_in
from modekit.recipes.recipe import Recipe
from modekit.sources.config import whole
from modekit.sources.header import DTYPE_NAMES, TensorRef
from modekit.sources.names import EMBEDDING, FINAL_NORM, HEAD, in_layer, is_ignored, split_layer, weight_of
from modekit.sources.natives import Native
from modekit.sources.source import ModelSource
from modekit.weights.made import Copy, FFNKind, Join, Made, Pad, Padded, Zeros, scaled

_FFN_KINDS: dict[str, FFNKind] = {"gate": "gate", "up": "up", "down": "down"}
_Parts = Mapping[str, Sequence[Made | None]]
"""Part of the FFN -> what each expert has of it; None where nobody has anything."""


class NativeLayout:
    """Every tensor of one recipe's result in a native architecture. Raises UnsupportedError where it cannot carry the router.

    Attributes:
        channels: besides the base's, where anything needs them.
        unties: head -> embedding, where they are one tensor in the base and two in the result.
        mixes_more: what a recipe has to say so that more parts and layers are mixed, for messages.
    """

    is_native = True

    def __init__(self, recipe: Recipe, sources: tuple[ModelSource, ...], native: Native, code_of: CodeOf) -> None:
        self._recipe, self._sources, self._native, self._code_of = recipe, sources, native, code_of
        family, self._base = native.family, sources[0]
        self._family, dense = family, family.dense_config(self._base.config)
        self._layers = whole(self._base.config, "num_hidden_layers")
        self._ffn = {in_layer(layer, path) for layer in range(self._layers) for path in family.mlp.values()}
        self.mixes_more = (
            f"{native.native_type} mixes whole FFNs alone; output: {{format: modekit}} mixes any part (mixture.modules)"
        )
        self._carry, self.channels = None, channels_of(recipe, native, dense)
        if self.channels is not None:
            self._carry = carried_size(recipe, sources, family, dense)
            self.channels = channels_of(recipe, native, dense, self._carry)
        gate = self._as_in_base(0, "gate")
        self.router_dtype, (self._width, self._hidden) = code_of(gate), gate.shape
        self._segments = segments_of(recipe, self._width, carries=self.channels is not None)
        self._front = int(self.channels is not None and self.channels.front)
        carries_head = self._carry is not None and self._carry.head and family.is_tied(self._base)
        self.unties: Mapping[str, str] = family.ties if carries_head else {}

    def backbone_name(self, name: str) -> str | None:
        """What a tensor of the base is called in the backbone; None for the experts'. Raises UnsupportedError."""
        if name in self._ffn:
            return None
        layer, path = split_layer(name)
        if layer is not None and path.startswith(f"{self._family.mlp_module}."):
            raise UnsupportedError(
                "the FFN has a tensor that the native experts do not",
                where=f"base_model ({self._base.spec}): {name}",
                expected=", ".join(self._family.mlp.values()),
                remedy="use output: {format: modekit}, or choose a base model with a plain gated FFN",
            )
        return name if not isinstance(layer, int) else in_layer(layer + self._front, path)

    def widened(self, tensor: PlannedTensor) -> Iterator[PlannedTensor]:
        """A tensor of the backbone as the result has it: in several, with the channels of its router."""
        pad = None if self.channels is None else self.channels.pad_of(tensor.name, tensor.shape, self._family.parts)
        yield _widened(tensor, pad)

    def mixed_names(self) -> set[str]:
        """Tensors of the base of which every expert has its own."""
        return self._ffn

    def carried_names(self) -> set[str]:
        """Tensors of the base by which experts may differ although all share them."""
        if self._carry is None or self.channels is None:
            return set()
        widening, parts = self.channels.widening, self._family.parts
        modules = [parts[part] for part in ("q", "k", "v", "o")]
        modules += [norm for norm in (widening.before_attention, widening.after_attention) if norm is not None]
        names = {weight_of(in_layer(layer, module)) for layer in range(self._layers) for module in modules}
        ends = {HEAD: self._carry.head, FINAL_NORM: self._carry.head, EMBEDDING: self._carry.embedding}
        return names | {weight_of(module) for module, carried in ends.items() if carried}

    def shape(self, where: str) -> NativeShape:
        """The native config.json."""
        config = self._native.native_config(
            self._base.config,
            experts=len(self._recipe.experts),
            top_k=self._recipe.top_k,
            expert_hidden=self._width // self._segments.count,
            dtype=DTYPE_NAMES[self.router_dtype],
        )
        if self.channels is not None:
            config = self.channels.widened(config)
        return NativeShape(config, self._recipe, where, self._native, self.channels)

    def notes(self) -> Iterable[str]:
        """What a user should know of this architecture."""
        shape, form = self.shape(""), self._native.native_type
        if form == "mixtral" and shape.config.get("sliding_window"):
            yield "sliding window: exact in transformers; vLLM's and llama.cpp's Mixtral ignore it"
        if not self._native.serves.startswith(("vLLM", "llama.cpp")):
            yield f"llama.cpp does not run {form}; in vLLM {shape.without_vllm}"
        if self._family.model_type == "qwen2":
            yield "llama.cpp's own qwen2moe does not renormalise router weights: modekit export --gguf writes a Mixtral instead"
        if self.channels is not None:
            yield from self.channels.notes(self._recipe)
        if any(isinstance(tensor.inner, Copy) and tensor.inner.ref.dtype != tensor.dtype for tensor in self._experts(1)):
            yield "some experts have another dtype than the result: their tensors are cast"

    def tensors(self) -> Iterable[PlannedTensor]:
        """Experts and constants."""
        yield from self._in_front()
        yield from self._experts(self._layers)
        spare, units = (0, 0) if self.channels is None else (self.channels.spare, self.channels.more_units)
        letters = {"D": self._hidden + spare, "F": self._width // self._segments.count + units}
        letters |= {"E": len(self._recipe.experts), "H": whole(self._base.config, "num_attention_heads")}
        for layer in range(self._layers + self._front):
            for constant in self._native.written_constants:
                shape, name = tuple(letters.get(each) or int(each) for each in constant.shape), in_layer(layer, constant.name)
                yield PlannedTensor(name, self.router_dtype, shape, "constant", Zeros(shape))

    def _in_front(self) -> Iterable[PlannedTensor]:
        """The layer before the base's first, of the shapes that the first has: attention that averages evidence and nothing
        else, norms as there, experts that add nothing of their own.
        """
        if self.channels is None or not self._front:
            return
        norms = (*self.channels.widening.norms, *self.channels.widening.over_heads)
        within = in_layer(0)
        for name, ref in self._base.tensors.items():
            if name.startswith(within) and name not in self._ffn and not is_ignored(name):
                made = Copy(ref) if name.rpartition(".")[0].removeprefix(within) in norms else Zeros(ref.shape)
                yield from self.widened(PlannedTensor(name, self._code_of(ref), ref.shape, "backbone", made))
        yield from self._of_layer(0, dict.fromkeys(self._family.mlp, [None] * len(self._recipe.experts)))

    def _experts(self, layers: int) -> Iterable[PlannedTensor]:
        """The FFN of every expert in every layer of the base."""
        for layer in range(layers):
            refs = {part: self._base.tensor(in_layer(layer, path)) for part, path in self._family.mlp.items()}
            experts = range(len(self._recipe.experts))
            parts = {part: [self._part(expert, part, ref) for expert in experts] for part, ref in refs.items()}
            yield from self._of_layer(layer + self._front, parts)

    def _of_layer(self, layer: int, parts: _Parts) -> Iterable[PlannedTensor]:
        return self._apart(layer, parts) if self._native.fused is None else self._fused(layer, parts)

    def _apart(self, layer: int, parts: _Parts) -> Iterable[PlannedTensor]:
        """Every projection of every expert a tensor, in a layer of the result; zeros where there is nothing."""
        assert self._native.experts is not None
        factors = self._factors()
        for part, path in self._native.experts.items():
            ref = self._as_in_base(max(0, layer - self._front), part)
            for expert, own in enumerate(parts[part]):
                name, shape = in_layer(layer, path.format(expert=expert)), self._segments.shape(part, *ref.shape)
                made = scaled(own or Zeros(shape), factors[expert] if part == "down" else 1.0)
                plain = PlannedTensor(name, self._code_of(ref), shape, "expert", self._segments.scaled(part, made), expert)
                yield _widened(plain, self._pad(_FFN_KINDS[part], layer, expert))

    def _fused(self, layer: int, parts: _Parts) -> Iterable[PlannedTensor]:
        """All experts in two tensors, gate and up side by side in the first: there, matrices are widened one by one."""
        assert self._native.fused is not None
        self._factors()
        ref = self._as_in_base(max(0, layer - self._front), "gate")
        (rows, columns), code, count = self._segments.shape("gate", *ref.shape), self._code_of(ref), len(self._recipe.experts)
        both, down = (in_layer(layer, path) for path in self._native.fused)
        gate_up = [made for pair in zip(parts["gate"], parts["up"], strict=True) for made in pair]
        made = _of_all(gate_up, shape := (2 * count, rows, columns), 2)
        apart = _widened(PlannedTensor(both, code, shape, "expert", made), self._pad("gate_up", layer))
        yield PlannedTensor(both, code, (count, 2 * apart.shape[1], apart.shape[2]), "expert", apart.made)
        made = self._segments.scaled("down", _of_all(parts["down"], shape := (count, columns, rows), 1))
        yield _widened(PlannedTensor(down, code, shape, "expert", made), self._pad("down", layer))

    def _pad(self, part: FFNKind, layer: int, expert: int | None = None) -> Pad | None:
        return None if self.channels is None else self.channels.expert_pad(part, layer, expert)

    def _as_in_base(self, layer: int, part: str) -> TensorRef:
        """A part of the FFN in a layer of the base."""
        return self._base.tensor(in_layer(layer, self._family.mlp[part]))

    def _part(self, expert: int, part: str, ref: TensorRef) -> Made:
        """What an expert has of a part of the FFN."""
        source = self._sources[1 + expert]
        return self._segments.cut(as_in(source, ref), expert, part)

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


def _widened(tensor: PlannedTensor, pad: Pad | None) -> PlannedTensor:
    """The tensor in a larger one; itself without a pad."""
    if pad is None:
        return tensor
    made = Padded(tensor.made, pad, tensor.dtype, tensor.shape)
    return PlannedTensor(tensor.name, tensor.dtype, made.shape, tensor.role, made, tensor.expert)


def _of_all(parts: Sequence[Made | None], shape: tuple[int, ...], each: int) -> Made:
    """All experts in one tensor, `each` matrices of every one below each other; zeros without parts."""
    found = tuple(made for made in parts if made is not None)
    return Join(found, experts=tuple(place // each for place in range(len(found)))) if found else Zeros(shape)
