"""One place of a mixture in the modekit architecture: a module of the base, and what each expert has there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from modekit.planning.budgets import Part
from modekit.sources.adapter import LowRank
from modekit.sources.model import TensorRef
from modekit.sources.names import POSITIONS, module_of, weight_of

Kind = LowRank | Part | str | int | None
"""What an expert has at a place: its low-rank change, a difference in a few bits, "own" a module of its own, a rank to
factorise to, or the base's."""


@dataclass(frozen=True)
class PlannedPlace:
    """A module of the base, the tensors in it, and what each expert has there.

    `calls`: where the layer calls several modules itself that are one place here, their names; `module` is the first of them.
    """

    module: str
    refs: tuple[TensorRef, ...]
    kinds: tuple[Kind, ...]
    calls: tuple[str, ...] = ()

    @property
    def is_mixed(self) -> bool:
        """Whether any expert differs from the base here."""
        return any(kind is not None for kind in self.kinds)

    @property
    def own(self) -> list[int]:
        """Experts with a module of their own."""
        return [expert for expert, kind in enumerate(self.kinds) if kind == "own"]

    @property
    def ranks(self) -> list[int]:
        """Per expert the rank of its change; 0 without one."""
        return [kind.rank if isinstance(kind, LowRank) else kind if isinstance(kind, int) else 0 for kind in self.kinds]

    @property
    def bits(self) -> list[int]:
        """Per expert those of each number of its difference; 0 without one."""
        return [kind.bits if isinstance(kind, Part) else 0 for kind in self.kinds]

    @property
    def scales(self) -> list[float]:
        """Per expert what its change is multiplied with."""
        return [kind.scale if isinstance(kind, LowRank) else 1.0 for kind in self.kinds]

    @property
    def prefix(self) -> str:
        """What the names of its tensors begin with."""
        return f"{module_of(self.module) if self.calls else self.module}."

    def within(self, tensor: str) -> str:
        """A tensor's name inside the place; of the bias of logits, which stands with the head, the last part."""
        return tensor.removeprefix(self.prefix) if tensor.startswith(self.prefix) else tensor.rpartition(".")[2]

    @property
    def weight(self) -> TensorRef:
        """Of the base's module."""
        weight = weight_in(self.module, self.refs)
        assert weight is not None, self.module
        return weight

    @property
    def may_be_low_rank(self) -> bool:
        """Whether it is a linear map, or an embedding of tokens."""
        weight = weight_in(self.module, self.refs)
        return weight is not None and len(weight.shape) == 2 and self.module.rpartition(".")[2] not in POSITIONS

    def with_part(self, expert: int, part: Part | None) -> PlannedPlace:
        """The same where an expert has this part of a difference here; None: what it has."""
        if part is None:
            return self
        kind: Kind = part if part.bits else min(part.rank, *self.weight.shape) or "own"
        return replace(self, kinds=(*self.kinds[:expert], kind, *self.kinds[expert + 1 :]))


def weight_in(module: str, refs: Iterable[TensorRef]) -> TensorRef | None:
    """The weight among a module's tensors."""
    return next((ref for ref in refs if ref.name == weight_of(module)), None)
