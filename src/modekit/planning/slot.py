"""A router of the result as its headers know it: the shape of its gate, and where it stands.

Shape legend: D width of what a router reads, E experts, J parts of a gate.
"""

from __future__ import annotations

from dataclasses import dataclass

from modekit.recipes.layers import Layer


@dataclass(frozen=True)
class RouterSlot:
    """One router of the result: its gate tensor (max(features, 1) * sum(rows) + shared, J * D).

    Attributes:
        name: of the gate tensor.
        width: D.
        rows: of the gate, per expert.
        features: decisions, when there is one per output feature; else 0.
        parts: J, causal averages that the gate reads.
        shared: rows that are no expert's (of a classifier: how rare each term is).
    """

    name: str
    width: int
    rows: tuple[int, ...]
    features: int = 0
    parts: int = 1
    shared: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """Of the gate."""
        return max(self.features, 1) * sum(self.rows) + self.shared, self.parts * self.width


@dataclass(frozen=True)
class RouterPosition:
    """Where a router stands: its gate's name, and the layer and module that it decides for.

    `layer` is None when it serves several layers or stands outside of them; `module` is what the paths of the places that it
    serves share.
    """

    name: str
    layer: Layer | None
    module: str
