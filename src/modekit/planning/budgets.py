"""What an expert with a budget has at each place: norms, biases and positions whole, every other weight by a part of its
difference from the base's.

A part is low-rank, or all of the difference in a few bits per number, or the whole weight. Which parts are worth most a build
measures (building/parts.py) and writes into the recipe that it records. A plan without them shows the same part for all
weights, the largest within the budget: no build takes more.

Shape legend: O outputs, I inputs, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from modekit.errors import RecipeError
from modekit.recipes.recipe import Expert
from modekit.sources.header import ITEMSIZE
from modekit.weights.factor_size import bytes_of_codes

BITS = (1, 2, 3, 4, 8)
"""Per number of a difference: what a build chooses from."""
SENSITIVITY_TOKENS = 8_192
"""Of an expert's text, by which it chooses."""


def reads_for_budget(expert: Expert) -> bool:
    """Whether a build runs an expert over its text to choose what is kept."""
    return expert.budget is not None and expert.parts is None and bool(expert.text or expert.prompts)


@dataclass(frozen=True)
class Part:
    """What is kept of the difference of a weight: factors of a rank, or bits per number; without either the whole weight."""

    rank: int = 0
    bits: int = 0

    @classmethod
    def read(cls, said: str) -> Part:
        """As a recipe says it: rank 8, 2 bits, whole."""
        if said == "whole":
            return cls()
        rank = said.startswith("rank ")
        number = int(said.removeprefix("rank ") if rank else said.partition(" ")[0])
        return cls(rank=number) if rank else cls(bits=number)

    def __str__(self) -> str:
        return f"rank {self.rank}" if self.rank else f"{self.bits} bits" if self.bits else "whole"

    def price(self, shape: tuple[int, ...], itemsize: int) -> int:
        """Bytes of it for a weight (O, I) whose numbers have so many."""
        outputs, inputs = shape
        if self.bits:
            return bytes_of_codes(outputs, inputs, self.bits) + outputs * ITEMSIZE["F32"]
        return itemsize * (self.rank * (outputs + inputs) if self.rank else outputs * inputs)


@dataclass(frozen=True)
class Budget:
    """What one expert may take, in bytes.

    Attributes:
        shapes: module -> (O, I) of a weight of which a part is kept.
        itemsize: of the result's numbers.
        fixed: of what is kept whole.
        base: of the base model, in the result's dtype.
    """

    shapes: Mapping[str, tuple[int, int]]
    itemsize: int
    fixed: int
    base: int

    def most(self, said: Expert) -> int:
        """What an expert may add."""
        return int((said.budget or 0) * self.base)

    def taken(self, parts: Mapping[str, Part]) -> int:
        """By these parts."""
        return self.fixed + sum(parts[module].price(shape, self.itemsize) for module, shape in self.shapes.items())

    def parts(self, said: Expert, where: str) -> dict[str, Part]:
        """Those of the recipe, or the same for all. Raises RecipeError where they are of other modules or exceed the budget."""
        if said.parts is None:
            return dict.fromkeys(self.shapes, self._same(said, where))
        if said.parts.keys() != self.shapes.keys():
            wrong = sorted(said.parts.keys() ^ self.shapes.keys())
            raise RecipeError(
                "parts must name every module that is mixed, once",
                where=f"{where}: parts",
                found=f"{len(wrong)} too many or too few, first {wrong[0]}",
                remedy="remove 'parts', and a build chooses them",
            )
        parts = {module: Part.read(each) for module, each in said.parts.items()}
        if self.taken(parts) > self.most(said):
            raise RecipeError(
                "the parts exceed the budget",
                where=f"{where}: parts",
                found=f"{self.taken(parts) / self.base:.4f}x",
                expected=f"{said.budget:g}x",
                remedy="give a larger budget, or remove 'parts'",
            )
        return parts

    def _same(self, said: Expert, where: str) -> Part:
        """The largest part for all within an expert's budget. Raises RecipeError when there is none."""
        bits, ranks = (Part(bits=bits) for bits in reversed(BITS)), (Part(rank=2**power) for power in range(9, -1, -1))
        for part in (Part(), *bits, *ranks):
            taken = self.taken(dict.fromkeys(self.shapes, part))
            if taken <= self.most(said):
                return part
        raise RecipeError(
            "the budget is too small for norms, biases and one rank of every weight",
            where=f"{where}: budget",
            found=f"{said.budget:g}x",
            expected=f"{taken / self.base:.2g}x or more",
            remedy="give more, or mix fewer modules",
        )
