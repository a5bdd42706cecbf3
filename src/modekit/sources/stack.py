"""A stack of layers of a model, as its family names them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from modekit.sources.config import Config, whole

FFN_PARTS = {"gate", "up", "down"}
LINEAR = {
    **{part: f"self_attn.{part}_proj" for part in "qkvo"},
    **{part: f"mlp.{part}_proj" for part in ("gate", "up", "down")},
}


@dataclass(frozen=True)
class Stack:
    """Layers of one kind, one after the other.

    Attributes:
        name: `encoder` or `decoder` of a pair, else empty.
        layers: what the names of everything in its layers begin with.
        count: key of config.json for their number; of those that are not there, the first that is counts.
        parts: part -> module under the layer; parts that the family fuses share a module.
        ffn: module of the whole FFN under the layer; its input is what the router of whole FFN experts reads.
        ffn_calls: where the layer calls the FFN's modules itself and none holds them: their names, in the order in which it
            does; `ffn` is the first of them, and stands for all.
        ffn_width: key of config.json for F.
        first: what the first layer alone has.
        outside: tensors before and behind the layers that must be there, but for embedding and head.
    """

    name: str = ""
    layers: str = "model.layers."
    count: tuple[str, ...] = ("num_hidden_layers",)
    parts: Mapping[str, str] = field(default_factory=lambda: LINEAR)
    ffn: str = "mlp"
    ffn_calls: tuple[str, ...] = ()
    ffn_width: str = "intermediate_size"
    first: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()

    @property
    def mlp(self) -> dict[str, str]:
        """Part of the FFN -> name under the layer of its weight: gate and up (F, D), down (D, F); fused ones are one."""
        return {part: f"{self.parts[part]}.weight" for part in ("gate", "up", "down") if part in self.parts}

    @property
    def fused(self) -> set[str]:
        """The parts that share a module."""
        return {part for part, path in self.parts.items() if list(self.parts.values()).count(path) > 1}

    @property
    def ffn_modules(self) -> tuple[str, ...]:
        """The modules under the layer that hold the FFN."""
        return tuple(dict.fromkeys((self.ffn, *self.ffn_calls)))

    def rank(self, path: str) -> int:
        """Where a part, or the whole FFN, runs among the others."""
        paths = list(self.parts.values())
        return next((place for place, each in enumerate(paths) if each == path or each.startswith(f"{path}.")), len(paths))

    @property
    def ffn_parts(self) -> set[str]:
        """The parts that make up the FFN."""
        return {
            part for part, path in self.parts.items() if part in FFN_PARTS or (self.ffn and path.startswith(f"{self.ffn}."))
        }

    def size(self, config: Config) -> int:
        """How many layers config.json says there are."""
        return whole(config, next(key for key in self.count if config.get(key) is not None))
