"""How a mixture of whole FFN experts lies in a native architecture: names, experts, constants, router, config."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from modekit.errors import UnsupportedError
from modekit.planning.pieces import piece_of
from modekit.planning.plan import Operation, Piece, PlannedTensor, RouterSlot, joined
from modekit.recipes.recipe import Recipe
from modekit.sources.adapter import AdapterSource, LowRank
from modekit.sources.families import LAYER, Family
from modekit.sources.model import DTYPE_NAMES, ModelSource, TensorRef
from modekit.sources.native import Native


class NativeLayout:
    """The native shape of one recipe. `code_of` gives the safetensors dtype of what is made from a tensor."""

    unties = False

    def __init__(
        self, recipe: Recipe, sources: tuple[ModelSource, ...], family: Family, native: Native,
        code_of: Callable[[TensorRef], str],
    ) -> None:  # fmt: skip
        self._recipe, self._sources, self._family, self._native, self._code_of = recipe, sources, family, native, code_of
        self._base = sources[0]
        self._layers = int(self._base.config["num_hidden_layers"])
        self._gate = self._base.tensor(LAYER.format(layer=0) + family.mlp["gate"])
        self._ffn = {LAYER.format(layer=layer) + suffix for layer in range(self._layers) for suffix in family.mlp.values()}
        self._ffn_prefixes = tuple(LAYER.format(layer=layer) + family.mlp_module + "." for layer in range(self._layers))
        self.router_dtype = code_of(self._gate)

    def backbone_name(self, name: str) -> str | None:
        """What a tensor of the base is called in the backbone; None for the experts'. Raises UnsupportedError."""
        if name in self._ffn:
            return None
        if name.startswith(self._ffn_prefixes):
            raise UnsupportedError(
                "the FFN has a tensor that the native experts do not", where=f"base_model ({self._base.spec}): {name}",
                expected=", ".join(self._family.mlp.values()),
                remedy="use output: {format: modekit}, or choose a base model with a plain gated FFN",
            )  # fmt: skip
        return name

    def mixed_names(self) -> set[str]:
        """Tensors of the base of which every expert has its own."""
        return self._ffn

    def config(self) -> dict[str, Any]:
        """The native config.json."""
        return self._native.native_config(
            self._base.config, experts=len(self._recipe.experts), top_k=self._recipe.top_k,
            expert_hidden=self._gate.shape[0], dtype=DTYPE_NAMES[self.router_dtype],
        )  # fmt: skip

    def slots(self) -> tuple[RouterSlot, ...]:
        """One router per layer."""
        rows = (1,) * len(self._recipe.experts)
        hidden = int(self._base.config["hidden_size"])
        return tuple(RouterSlot(LAYER.format(layer=i) + self._native.router, hidden, rows) for i in range(self._layers))

    def notes(self) -> Iterable[str]:
        """What a user should know of this architecture."""
        if self._base.config.get("sliding_window") and self._native.native_type == "mixtral":
            yield "sliding window: exact in transformers; vLLM's and llama.cpp's Mixtral ignore it"
        if self._family.model_type == "qwen2":
            yield "llama.cpp's qwen2moe does not renormalise router weights: not for GGUF"
        if any(tensor.operation == "cast" for tensor in self._experts(1)):
            yield "some experts have another dtype than the result: their tensors are cast"

    def tensors(self) -> Iterable[PlannedTensor]:
        """Experts and constants."""
        yield from self._experts(self._layers)
        hidden, expert_hidden = int(self._base.config["hidden_size"]), self._gate.shape[0]
        letters = {"D": hidden, "F": expert_hidden, "E": len(self._recipe.experts)}
        for layer in range(self._layers):
            for constant in self._native.constants:
                shape = tuple(letters[letter] if letter in letters else int(letter) for letter in constant.shape)
                name = LAYER.format(layer=layer) + constant.name
                yield PlannedTensor(name, self.router_dtype, shape, "constant", "zeros")

    def _experts(self, layers: int) -> Iterable[PlannedTensor]:
        """The FFN of every expert in every layer."""
        native, count = self._native, len(self._recipe.experts)
        factors = self._factors()
        for layer in range(layers):
            prefix = LAYER.format(layer=layer)
            refs = {part: self._base.tensor(prefix + suffix) for part, suffix in self._family.mlp.items()}
            pieces = {part: [self._piece(place, ref) for place in range(1, 1 + count)] for part, ref in refs.items()}
            if native.experts is not None:
                for part, name in native.experts.items():
                    code = self._code_of(refs[part])
                    for expert, piece in enumerate(pieces[part]):
                        factor = factors[self._recipe.names[expert]] if part == "down" else 1.0
                        tensor = joined(prefix + name.format(expert=expert), code, refs[part].shape, "expert", (piece,))
                        operation: Operation = "scale" if factor != 1.0 else tensor.operation
                        yield PlannedTensor(tensor.name, code, tensor.shape, "expert", operation, (piece,), factor)
            elif native.fused is not None:
                gate_up = [piece for pair in zip(pieces["gate"], pieces["up"], strict=True) for piece in pair]
                rows, columns = refs["gate"].shape
                code = self._code_of(refs["gate"])
                yield joined(prefix + native.fused[0], code, (count, 2 * rows, columns), "expert", tuple(gate_up))
                yield joined(prefix + native.fused[1], code, (count, columns, rows), "expert", tuple(pieces["down"]))

    def _piece(self, place: int, ref: TensorRef) -> Piece:
        source = self._sources[place]
        change = source.changes.get(ref.name) if isinstance(source, AdapterSource) else None
        if isinstance(change, LowRank) and change.bias is not None:
            raise UnsupportedError(
                "the adapter adds a bias where the native experts have none",
                where=f"{source.label} ({source.spec}): {ref.name}",
                remedy="use output: {format: modekit}",
            )  # fmt: skip
        return piece_of(self._sources, place, ref)

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
                "given weights cannot be folded into this family's fused experts", where="mixture.weights",
                remedy="leave weights out (all experts equal), or use output: {format: modekit}",
            )  # fmt: skip
        return factors
