"""How a mixture of whole FFN experts lies in a native architecture: names, experts, constants, router, config."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from modekit.errors import UnsupportedError
from modekit.planning.carry import biases_of, carried_size
from modekit.planning.channel_choice import channels_of
from modekit.planning.channels import Channels
from modekit.planning.native_shape import NativeShape
from modekit.planning.segments import segments_of
from modekit.planning.tensors import CodeOf, PlannedTensor, as_in
from modekit.recipes.recipe import Recipe, place_of_base
from modekit.sources.adapter import AdapterSource, LowRank
from modekit.sources.compatibility import is_tied
from modekit.sources.family import whole
from modekit.sources.model import DTYPE_NAMES, ModelSource, TensorRef
from modekit.sources.names import EMBEDDING, FINAL_NORM, HEAD, in_layer, is_ignored, split_layer, weight_of
from modekit.sources.native_row import Native
from modekit.sources.rows import rows_of
from modekit.weights.made import Copy, Filled, Fold, Join, Made, Merge, padded, scaled
from modekit.weights.padded import FFNKind, Pad

_FFN_KINDS: dict[str, FFNKind] = {"gate": "gate", "up": "up", "down": "down"}
_Pieces = dict[str, list[Made | None]]
"""Part of the FFN -> what each expert has of it; None where nobody has anything."""


class NativeLayout:
    """The native shape of one recipe.

    Attributes:
        unties: whether head and embedding, one tensor in the base, are two in the result.
        mixes_more: what a recipe has to say so that more parts and layers are mixed, for messages.
    """

    def __init__(self, recipe: Recipe, sources: tuple[ModelSource, ...], native: Native, code_of: CodeOf) -> None:
        self._recipe, self._sources, self._native, self._code_of = recipe, sources, native, code_of
        family = self._family = native.family
        self._base = sources[0]
        self._layers = whole(self._base.config, "num_hidden_layers")
        self._gate = self._in_base(0, "gate")
        self._ffn = {in_layer(layer, path) for layer in range(self._layers) for path in family.mlp.values()}
        self.router_dtype = code_of(self._gate)
        self.mixes_more = (
            f"{native.native_type} mixes whole FFNs alone; output: {{format: modekit}} mixes any part (mixture.modules)"
        )
        dense = family.dense_config(self._base.config)
        self._carry = None
        if channels_of(recipe, native, dense) is not None:
            self._carry = carried_size(
                recipe, sources, family, dense, lambda size: _spare(channels_of(recipe, native, dense, size))
            )
        self._channels = channels_of(recipe, native, dense, self._carry)
        self._segments = segments_of(recipe, self._gate.shape[0]).beside(self._channels)
        self._front = int(self._channels is not None and self._channels.front)
        carries_head = self._carry is not None and self._carry.head and is_tied(self._base, family)
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

    def apart(self, tensor: PlannedTensor) -> tuple[PlannedTensor, ...]:
        """A tensor of the backbone, or those that the result has in its place: some of its rows each."""
        module, _, leaf = tensor.name.rpartition(".")
        layer, path = split_layer(module)
        if not isinstance(layer, int) or path not in self._native.split:
            return (tensor,)
        dense, start, found = self._family.dense_config(self._base.config), 0, []
        for place, part in enumerate(self._native.split[path]):
            heads = whole(dense, "num_key_value_heads" if place else "num_attention_heads")
            rows = (start, start + heads * whole(dense, "head_dim"))
            made, shape = tensor.made, (rows[1] - start, *tensor.shape[1:])
            made = made.cut(rows) if isinstance(made, Copy | Fold | Merge) else Filled(shape)
            found.append(replace(tensor, name=f"{in_layer(layer, part)}.{leaf}", shape=shape, made=made))
            start = rows[1]
        return tuple(found)

    def mixed_names(self) -> set[str]:
        """Tensors of the base of which every expert has its own."""
        return self._ffn

    def carried_names(self) -> set[str]:
        """Tensors of the base by which experts may differ although all share them."""
        if self._carry is None or self._channels is None:
            return set()
        widening, parts = self._channels.widening, self._family.parts
        modules = [parts[part] for part in ("q", "k", "v", "o")]
        modules += [norm for norm in (widening.before_attention, widening.after_attention) if norm is not None]
        names = {weight_of(in_layer(layer, module)) for layer in range(self._layers) for module in modules}
        if self._carry.biases:
            names.update(name for layer in range(self._layers) for name in biases_of(self._base, self._family, layer))
        ends = {HEAD: self._carry.head, FINAL_NORM: self._carry.head, EMBEDDING: self._carry.embedding}
        return names | {weight_of(module) for module, carried in ends.items() if carried}

    def shape(self, where: str) -> NativeShape:
        """The native config.json."""
        config = self._native.native_config(
            self._base.config,
            experts=len(self._recipe.experts),
            top_k=self._recipe.top_k,
            expert_hidden=self._segments.width(self._gate.shape[0]),
            dtype=DTYPE_NAMES[self.router_dtype],
        )
        if self._channels is not None:
            config = self._channels.widened(config)
        return NativeShape(config, self._recipe, where, self._native, self._channels)

    def widened(self, tensor: PlannedTensor) -> PlannedTensor:
        """A tensor of the backbone with the channels of its router."""
        if self._channels is None:
            return tensor
        return _widened(tensor, self._channels.pad_of(tensor.name, tensor.shape, self._native.parts))

    def notes(self) -> Iterable[str]:
        """What a user should know of this architecture."""
        if self._native.native_type == "mixtral" and self.shape("").config.get("sliding_window"):
            yield "sliding window: exact in transformers; vLLM's and llama.cpp's Mixtral ignore it"
        if not self._native.serves.startswith(("vLLM", "llama.cpp")):
            yield f"llama.cpp does not run {self._native.native_type}; in vLLM {self.shape('').without_vllm}"
        if self._family.model_type == "qwen2":
            yield "llama.cpp's own qwen2moe does not renormalise router weights: modekit export --gguf writes a Mixtral instead"
        if self._channels is not None:
            yield from self._channels.notes(self._recipe)
        place = place_of_base(self._recipe.experts)
        if self._recipe.mixture.unseen is not None and place is not None and self._recipe.top_k > 1:
            leads = f"where '{self._recipe.names[place]}' leads"
            yield f"{self._native.native_type} weighs the next expert in, too, {leads}: top_k: 1 leaves it out"
        if any(isinstance(tensor.inner, Copy) and tensor.inner.ref.dtype != tensor.dtype for tensor in self._experts(1)):
            yield "some experts have another dtype than the result: their tensors are cast"

    def tensors(self) -> Iterable[PlannedTensor]:
        """Experts and constants."""
        yield from self._in_front()
        yield from self._experts(self._layers)
        spare, units = (0, 0) if self._channels is None else (self._channels.spare, self._channels.more_units)
        hidden = whole(self._base.config, "hidden_size") + spare
        expert_hidden = self._segments.width(self._gate.shape[0]) + units
        letters = {"D": hidden, "F": expert_hidden, "E": len(self._recipe.experts)}
        letters["H"] = whole(self._base.config, "num_attention_heads")
        for layer in range(self._layers + self._front):
            for constant in self._native.written_constants:
                shape = tuple(letters[letter] if letter in letters else int(letter) for letter in constant.shape)
                name = in_layer(layer, constant.name)
                yield PlannedTensor(name, self.router_dtype, shape, "constant", Filled(shape, constant.value))

    def _in_front(self) -> Iterable[PlannedTensor]:
        """The layer before the base's first, of the shapes that the first has: attention that averages evidence and nothing
        else, norms as there, experts that add nothing of their own.
        """
        if self._channels is None or not self._front:
            return
        norms = (*self._channels.widening.norms, *self._channels.widening.over_heads)
        within = in_layer(0)
        for name, ref in self._base.tensors.items():
            if name.startswith(within) and name not in self._ffn and not is_ignored(name):
                is_norm = name.rpartition(".")[0].removeprefix(within) in norms
                made = Copy(ref) if is_norm else Filled(ref.shape)
                plain = PlannedTensor(name, self._code_of(ref), ref.shape, "backbone", made)
                yield from map(self.widened, self.apart(plain))
        nothing: list[Made | None] = [None] * len(self._recipe.experts)
        yield from self._of_layer(0, dict.fromkeys(self._family.mlp, nothing), dict.fromkeys(self._recipe.names, 1.0))

    def _as_in_base(self, layer: int, part: str) -> TensorRef:
        """A part of the FFN as the base has it in a layer of the result; in front, as in its first."""
        return self._in_base(max(0, layer - self._front), part)

    def _in_base(self, layer: int, part: str) -> TensorRef:
        """A part of the FFN in a layer of the base."""
        ref = self._base.tensor(in_layer(layer, self._family.mlp[part]))
        rows = self._rows(part, ref)
        return ref if rows is None else rows_of(ref, *rows)

    def _rows(self, part: str, ref: TensorRef) -> tuple[int, int] | None:
        """Which rows of its tensor a part of the FFN is; None for all."""
        if not self._native.is_fused or part == "down":
            return None
        half = ref.shape[0] // 2
        return (0, half) if part == "gate" else (half, 2 * half)

    def _experts(self, layers: int) -> Iterable[PlannedTensor]:
        """The FFN of every expert in every layer of the base."""
        factors = self._factors()
        for layer in range(layers):
            refs = {part: self._base.tensor(in_layer(layer, path)) for part, path in self._family.mlp.items()}
            experts = range(len(self._recipe.experts))
            pieces: _Pieces = {part: [self._part(expert, part, ref) for expert in experts] for part, ref in refs.items()}
            yield from self._of_layer(layer + self._front, pieces, factors)

    def _of_layer(self, layer: int, pieces: _Pieces, factors: Mapping[str, float]) -> Iterable[PlannedTensor]:
        return self._apart(layer, pieces, factors) if self._native.fused is None else self._fused(layer, pieces)

    def _apart(self, layer: int, pieces: _Pieces, factors: Mapping[str, float]) -> Iterable[PlannedTensor]:
        """Every projection of every expert a tensor, in a layer of the result; zeros where there is no piece."""
        assert self._native.experts is not None
        for part, path in self._native.experts.items():
            ref = self._as_in_base(layer, part)
            for expert, piece in enumerate(pieces[part]):
                factor = factors[self._recipe.names[expert]] if part == "down" else 1.0
                name, shape = in_layer(layer, path.format(expert=expert)), self._segments.shape(part, *ref.shape)
                made = scaled(Filled(shape) if piece is None else piece, factor)
                plain = PlannedTensor(name, self._code_of(ref), shape, "expert", self._segments.scaled(part, made), expert)
                yield _widened(plain, self._pad(_FFN_KINDS[part], layer, expert))

    def _fused(self, layer: int, pieces: _Pieces) -> Iterable[PlannedTensor]:
        """All experts in two tensors, gate and up side by side in the first: there, matrices are widened one by one."""
        assert self._native.fused is not None
        ref = self._as_in_base(layer, "gate")
        (rows, columns), code, count = self._segments.shape("gate", *ref.shape), self._code_of(ref), len(self._recipe.experts)
        both, down = (in_layer(layer, path) for path in self._native.fused)
        gate_up = [made for pair in zip(pieces["gate"], pieces["up"], strict=True) for made in pair]
        apart = _widened(_of_all(both, code, (2 * count, rows, columns), gate_up, 2), self._pad("gate_up", layer))
        yield replace(apart, shape=(count, 2 * apart.shape[1], apart.shape[2]))
        whole_down = _of_all(down, code, (count, columns, rows), pieces["down"], 1)
        scaled_down = replace(whole_down, made=self._segments.scaled("down", whole_down.made))
        yield _widened(scaled_down, self._pad("down", layer))

    def _pad(self, part: FFNKind, layer: int, expert: int | None = None) -> Pad | None:
        return None if self._channels is None else self._channels.expert_pad(part, layer, expert)

    def _part(self, expert: int, part: str, ref: TensorRef) -> Made:
        made, rows = self._own(1 + expert, ref), self._rows(part, ref)
        return self._segments.cut(made if rows is None else made.cut(rows), expert, part)

    def _own(self, number: int, ref: TensorRef) -> Copy | Fold:
        source = self._sources[number]
        change = source.changes.get(ref.name) if isinstance(source, AdapterSource) else None
        if isinstance(change, LowRank) and change.bias is not None:
            raise UnsupportedError(
                "the adapter adds a bias where the native experts have none",
                where=f"{source.label} ({source.spec}): {ref.name}",
                remedy="use output: {format: modekit}",
            )
        return as_in(source, ref)

    def _factors(self) -> dict[str, float]:
        """What the last projection of each expert is multiplied with. Raises UnsupportedError for fused experts."""
        weights = self._recipe.mixture.weights
        if weights is None:
            return dict.fromkeys(self._recipe.names, 1.0)
        # A zero gate weighs every expert 1/E; E w_e in front of the last projection makes it w_e.
        total = sum(weights.values())
        factors = {name: len(weights) * weight / total for name, weight in weights.items()}
        if self._native.experts is None and set(factors.values()) != {1.0}:
            raise UnsupportedError(
                "given weights cannot be folded into this family's fused experts",
                where="mixture.weights",
                remedy="leave weights out (all experts equal), or use output: {format: modekit}",
            )
        return factors


def _spare(channels: Channels | None) -> int:
    return 0 if channels is None else channels.spare


def _widened(tensor: PlannedTensor, pad: Pad | None) -> PlannedTensor:
    """The tensor in a larger one; itself without a pad."""
    if pad is None:
        return tensor
    return replace(tensor, shape=pad.widened(tensor.shape), made=padded(tensor.made, pad, tensor.dtype, tensor.shape))


def _of_all(name: str, code: str, shape: tuple[int, ...], parts: Sequence[Made | None], each: int) -> PlannedTensor:
    """A tensor of all experts, `each` matrices of every one below each other; zeros without parts."""
    found = tuple(made for made in parts if made is not None)
    if not found:
        return PlannedTensor(name, code, shape, "expert", Filled(shape))
    return PlannedTensor(name, code, shape, "expert", Join(found, experts=tuple(place // each for place in range(len(found)))))
