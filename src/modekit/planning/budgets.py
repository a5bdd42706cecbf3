"""What an expert with a budget has at each place: norms, biases and positions whole, every other weight low-rank.

A weight (O, I) of rank R takes R (O + I) parameters; where that is no less than its own O I, it is kept whole. Which ranks are
worth most a build measures (building/ranks.py) and writes into the recipe that it records. A plan without them shows one rank
for all weights, the largest within the budget: no build takes more.

Shape legend: O outputs, I inputs, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from modekit.errors import RecipeError
from modekit.recipes.recipe import Expert


@dataclass(frozen=True)
class Budget:
    """What one expert may take.

    Attributes:
        shapes: module -> (O, I) of a weight that may be kept low-rank.
        fixed: parameters of what is kept whole.
        base: parameters of the base model.
    """

    shapes: Mapping[str, tuple[int, int]]
    fixed: int
    base: int

    def taken(self, ranks: Mapping[str, int]) -> int:
        """Parameters with these ranks."""
        return self.fixed + sum(min(ranks[module] * sum(shape), shape[0] * shape[1]) for module, shape in self.shapes.items())

    def even(self, said: Expert, where: str) -> int:
        """The largest rank for all within the expert's budget. Raises RecipeError when that is none."""
        most = int((said.budget or 0) * self.base)
        least = self.taken(dict.fromkeys(self.shapes, 1))
        if least > most:
            raise RecipeError(
                "the budget is too small for norms, biases and one rank of every weight",
                where=f"{where}: budget",
                found=f"{said.budget:g}x",
                expected=f"{least / self.base:.2g}x or more",
                remedy="give more, or mix fewer modules",
            )
        low, high = 1, 1 + max((min(shape) for shape in self.shapes.values()), default=1)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.taken(dict.fromkeys(self.shapes, middle)) <= most else (low, middle)
        return low

    def ranks(self, said: Expert, where: str) -> dict[str, int]:
        """Those of the recipe, or the same for all. Raises RecipeError where they are of other modules or exceed the budget."""
        if said.ranks is None:
            return dict.fromkeys(self.shapes, self.even(said, where))
        if said.ranks.keys() != self.shapes.keys():
            wrong = sorted(said.ranks.keys() ^ self.shapes.keys())
            raise RecipeError(
                "ranks must name every module that is mixed, once",
                where=f"{where}: ranks",
                found=f"{len(wrong)} too many or too few, first {wrong[0]}",
                remedy="remove 'ranks', and a build chooses them",
            )
        if self.taken(said.ranks) > (said.budget or 0) * self.base:
            raise RecipeError(
                "the ranks exceed the budget",
                where=f"{where}: ranks",
                found=f"{self.taken(said.ranks) / self.base:.4f}x",
                expected=f"{said.budget:g}x",
                remedy="give a larger budget, or remove 'ranks'",
            )
        return dict(said.ranks)


def is_whole(rank: int, shape: tuple[int, ...]) -> bool:
    """Whether a weight takes no more whole than at this rank."""
    return rank * sum(shape) >= shape[0] * shape[1]
