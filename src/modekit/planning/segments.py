"""Experts that are parts of one FFN: its hidden channels cut into equal ranges (DeepSeekMoE, arXiv 2401.06066, 3.1).

An FFN is a sum over its hidden channels, so that its parts add up to it. A router weighs what it chooses by numbers that sum
to 1: down is multiplied with as many parts of one FFN as a token gets, so that parts of equal weight add up to the FFN.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from modekit.errors import RecipeError
from modekit.planning.pieces import Piece, PlannedTensor
from modekit.recipes.recipe import Recipe


@dataclass(frozen=True)
class Segments:
    """Of `count` parts of one FFN expert e has the part `places[e]`; `factor` is in front of down."""

    count: int
    places: tuple[int, ...]
    factor: float

    @property
    def owners(self) -> list[int]:
        """Of which FFN each expert is a part: one begins wherever a first part stands."""
        found: list[int] = []
        for place in self.places:
            found.append((found[-1] if found else -1) + (place == 0))
        return found

    def range_of(self, expert: int, channels: int) -> tuple[int, int]:
        """From and to which of so many channels an expert goes."""
        width = channels // self.count
        return self.places[expert] * width, (self.places[expert] + 1) * width

    def cut(self, piece: Piece, expert: int, part: str) -> Piece:
        """What an expert has of a part of the FFN: rows of gate and up, columns of down."""
        if part == "down":
            return replace(piece, columns=self.range_of(expert, piece.ref.shape[1]))
        return piece.cut(self.range_of(expert, piece.ref.shape[0]))

    def scaled(self, tensor: PlannedTensor) -> PlannedTensor:
        """Down with its factor."""
        return replace(tensor, operation="scale", factor=tensor.factor * self.factor)


def segments_of(recipe: Recipe, channels: int = 0) -> Segments | None:
    """None where experts are whole. Raises RecipeError for parts that cannot be in one mixture, or of so many `channels`."""
    said = [expert.segment for expert in recipe.experts]
    if not any(said):
        return None
    places, counts = zip(
        *((int(one), int(other)) for one, _, other in ((each or "1/1").partition("/") for each in said)), strict=True
    )
    whole = all(place == number % counts[0] + 1 for number, place in enumerate(places)) and len(set(counts)) == 1
    if not whole or len(said) % counts[0] or any(expert.adapter for expert in recipe.experts):
        raise RecipeError(
            "segments are parts of full models, all of one size and in order",
            where="experts[].segment",
            found=", ".join(each or "none" for each in said[:8]),
            expected="1/2, 2/2 of one model, then 1/2, 2/2 of the next",
        )
    if channels % counts[0] or recipe.mixture.weights is not None:
        found = "mixture.weights" if recipe.mixture.weights is not None else f"{channels} channels in {counts[0]} parts"
        raise RecipeError(
            "the FFN cannot be cut so", where="experts[].segment", found=found, expected="a number that divides them"
        )
    return Segments(counts[0], tuple(place - 1 for place in places), float(min(counts[0], recipe.top_k)))
