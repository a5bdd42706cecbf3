"""Experts that are parts of one FFN: its hidden channels cut into equal ranges (DeepSeekMoE, arXiv 2401.06066, 3.1).

An FFN is the sum of its parts. Weights of the chosen experts sum to 1: down is multiplied with the parts of one FFN per token.
"""

from __future__ import annotations

from dataclasses import dataclass

from modekit.errors import RecipeError, UnsupportedError
from modekit.recipes.recipe import Recipe
from modekit.weights.made import Columns, Copy, Fold, Made, scaled


@dataclass(frozen=True)
class Segments:
    """Expert e has part e mod `count` of its FFN; `factor` is in front of down. Of whole experts both are 1."""

    count: int = 1
    factor: float = 1.0
    top_k: int = 0

    def cut(self, made: Copy | Fold, expert: int, part: str) -> Copy | Fold | Columns:
        """What an expert has of a part of the FFN: rows of gate and up, columns of down."""
        if self.count == 1:
            return made
        width = made.ref.shape[part == "down"] // self.count
        start = expert % self.count * width
        return Columns(made.ref, start, start + width) if part == "down" else made.cut((start, start + width))

    def shape(self, part: str, rows: int, columns: int) -> tuple[int, int]:
        """Of a part of one expert, in place of the base's."""
        return (rows, columns // self.count) if part == "down" else (rows // self.count, columns)

    def scaled(self, part: str, made: Made) -> Made:
        """Down with its factor."""
        return scaled(made, self.factor) if part == "down" else made

    def refusals(self, top_k: int) -> list[str]:
        """Why a router cannot choose so many."""
        other = self.count > 1 and top_k != self.top_k
        return [f"another top_k than {self.top_k}, by which its segments are scaled"] if other else []


def segments_of(recipe: Recipe, channels: int = 0, *, carries: bool = False) -> Segments:
    """Of a recipe over FFNs with so many channels; `carries`: a router that reads tokens needs more.

    Raises RecipeError for parts that cannot be in one mixture, UnsupportedError for settings that only other mixtures have.
    """
    said = [expert.segment for expert in recipe.experts]
    if not any(said):
        return Segments()
    count = int((said[0] or "1/1").partition("/")[2])
    in_order = said == [f"{number % count + 1}/{count}" for number in range(len(said))] and len(said) % count == 0
    weighed = recipe.mixture.weights is not None or any(expert.adapter for expert in recipe.experts)
    if not in_order or channels % count or weighed:
        raise RecipeError(
            "the FFN cannot be cut so",
            where="experts[].segment",
            found=f"{', '.join(each or 'none' for each in said[:8])} of {channels or 'its'} channels",
            expected="1/2, 2/2 of one full model, then of the next, without weights; a number that divides the channels",
        )
    beyond = [*recipe.beyond_native(), *(["format: modekit"] if recipe.output.format == "modekit" else [])]
    beyond += [f"a {recipe.mixture.router.fit} router, which needs channels"] if carries else []
    if beyond:
        raise UnsupportedError(
            "segments are whole parts of FFNs in a native architecture",
            where="experts[].segment",
            found=", ".join(beyond),
            remedy="leave that out, use router: {fit: random}, and modekit train",
        )
    return Segments(count, float(min(count, recipe.top_k)), recipe.top_k)
