"""Weights of the base that an adapter changes: which tensors of its file are for which, and the shapes that they must have.

PEFT adapts modules (`target_modules`), and parameters that no linear module holds (`target_parameters`): experts that a class
keeps in one tensor, a gate. A file names no parameter. The wrappers of one module lie one in the other as `base_layer`, in the
order of its class, the last one outermost (PEFT's `BaseTuner._inject_parameters`).

Shape legend: E experts, O output, I input of a linear map, R rank.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import permutations

from modekit.errors import UnsupportedError
from modekit.sources.header import TensorRef
from modekit.sources.names import module_of

Parts = Mapping[str, TensorRef]
"""The adapter's tensors of one module, by what they are called there."""
_INNER = re.compile(r"(\.base_layer)+$")


@dataclass(frozen=True)
class Adapted:
    """A weight of the base: (O, I), or (E, O, I) of fused experts; `turned` where O and I are the other way round.

    `key` is what patterns of ranks and alphas are compared with: the module's name, or the parameter's. `rank` is R as the
    config says it, of fused experts, whose A would fit more of a smaller rank; 0 where A says it.
    """

    name: str
    shape: tuple[int, ...]
    key: str
    turned: bool = False
    looked_up: bool = False
    rank: int = 0

    @property
    def experts(self) -> int:
        """E; 0 of a matrix."""
        return self.shape[0] if len(self.shape) == 3 else 0

    @property
    def parts(self) -> tuple[str, str]:
        """What A and B are called."""
        return ("lora_embedding_A", "lora_embedding_B") if self.looked_up else ("lora_A.weight", "lora_B.weight")

    def expected(self, parts: Parts) -> dict[str, tuple[int, ...]]:
        """The shapes of A (E R, I) and B (O, R E)."""
        a, b = self.parts
        inputs, outputs = self.shape[-2:] if self.turned else self.shape[:-3:-1]
        found = parts[a].shape[0] if a in parts and parts[a].shape else 0
        ranks = self.experts * self.rank or found
        return {a: (ranks, inputs), b: (outputs, ranks)}

    def fits(self, parts: Parts) -> bool:
        """Whether tensors of an adapter can be for it."""
        return all(part in parts and parts[part].shape == shape for part, shape in self.expected(parts).items())


def wrapped(found: Mapping[str, Parts], weights: Iterable[Adapted], where: str) -> dict[str, Adapted]:
    """Adapted module of a file -> the parameter that it wraps. `weights`: those that the adapter names, as the class has them.

    PEFT's order counts where shapes allow it, else the one order that they allow. Raises UnsupportedError where there are
    several.
    """
    named: dict[str, list[Adapted]] = {}
    for weight in weights:
        named.setdefault(module_of(weight.name), []).append(weight)
    wrappers: dict[str, list[str]] = {}
    for each in sorted(found, key=len, reverse=True):  # the innermost first
        wrappers.setdefault(_INNER.sub("", each), []).append(each)
    meant: dict[str, Adapted] = {}
    for module, own in named.items():
        inner_first = wrappers.get(module, [])
        orders = [
            order
            for order in permutations(own, min(len(own), len(inner_first)))
            if all(weight.fits(found[each]) for weight, each in zip(order, inner_first, strict=False))
        ]
        if len(orders) > 1 and (len(own) != len(inner_first) or orders[0] != (*own,)):
            raise UnsupportedError(
                "which parameter a part of the adapter is for cannot be told",
                where=f"{where}: {inner_first[0]}",
                found=" or ".join(dict.fromkeys(order[0].name for order in orders)),
                expected=f"{len(own)} parts in PEFT's order, or parameters of different shapes",
                remedy="load it with PEFT on its base, and save it again (save_pretrained), or merge it (merge_and_unload)",
            )
        meant |= dict(zip(inner_first, orders[0] if orders else own, strict=False))
    return meant
