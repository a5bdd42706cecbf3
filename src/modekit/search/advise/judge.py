"""Numbers -> findings: equal and near-equal experts, experts without a gain, domains that are one text."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import combinations
from typing import TYPE_CHECKING

from modekit.recipes.recipe import Recipe
from modekit.search.advise.drift import Drift
from modekit.search.advise.findings import Finding
from modekit.search.advise.gain import Estimate, Gains

if TYPE_CHECKING:
    from modekit.search.advise.words import Words

SMALLEST_GAIN = 1e-3
"""Nats per token; below it `modekit eval` sees no gap to close either."""
_EQUAL = 1e-6  # relative distance: rounding of sums
_NEAR_COSINE = 0.95
_SAME_TEXT = 0.25  # of the tokens given to one of two domains, given to the wrong one; 0.5 is the same text


def of_files(recipe: Recipe, drift: Drift, usable: Sequence[int]) -> Iterator[Finding]:
    """What the weights alone say: damage, experts that are the base, or each other."""
    for place, expert in enumerate(recipe.experts):
        names = drift.damaged[place]
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            yield Finding(
                "error", expert.name, "its weights hold NaN or Inf", names[0] + more,
                "the model is damaged: save or download it again",
            )  # fmt: skip
    for place in usable:
        if not recipe.experts[place].is_base and not drift.moved[place]:
            yield Finding(
                "warning", recipe.experts[place].name, "it equals the base model, tensor for tensor",
                to_do="write model: base, which keeps its text's way back to the base, or leave it out",
            )  # fmt: skip
    for first, second in combinations([place for place in usable if drift.moved[place]], 2):
        cosine, distance = drift.cosine(first, second), drift.distance(first, second)
        if cosine is not None and cosine >= _NEAR_COSINE:
            same = distance <= _EQUAL
            yield Finding(
                "warning", f"{recipe.names[first]}, {recipe.names[second]}",
                "they are the same model" if same else "they moved almost the same way from the base",
                f"cosine {cosine:.3f}, distance {distance:.3f} of the longer way",
                "keep one of them and give it both texts: two experts that do the same cost memory and bring nothing",
            )  # fmt: skip


def of_gains(recipe: Recipe, gains: Gains, moved: Sequence[int], domains: Collection[int]) -> Iterator[Finding]:
    """Experts that do not help on their own text, or less than another does; of those that differ from the base."""
    for place in [place for place in moved if place in domains]:
        name = recipe.experts[place].name
        gain = gains.gain(place, place)
        if not has_gain(gain):
            yield Finding(
                "warning", name, "it is not better than the base model on its own text",
                f"{said(gain)} nats per token", "check that text and model belong together; else write model: base",
            )  # fmt: skip
        elif gain.error is not None and gain.value < 2 * gain.error:
            yield Finding(
                "note", name, "its gain is within what this much text can tell", f"{said(gain)} nats per token",
                "give more text, or more --tokens",
            )  # fmt: skip
        best = min(moved, key=lambda other: gains.whole[other][place].mean)
        better = gains.better(best, place, place)
        if _is_certain(better) and has_gain(gains.gain(best, place)):
            yield Finding(
                "warning", name, f"{recipe.names[best]} is better on its text than it is itself",
                f"{said(better)} nats per token", "check that models and texts are not mixed up",
            )  # fmt: skip
    yield from _of_base_experts(recipe, gains, moved, domains)


def _of_base_experts(recipe: Recipe, gains: Gains, moved: Sequence[int], domains: Collection[int]) -> Iterator[Finding]:
    """Domains for which the base model stands although another expert is better on their text."""
    for place in sorted(place for place in domains if recipe.experts[place].is_base and place in gains.whole and moved):
        best = min(moved, key=lambda other: gains.whole[other][place].mean)
        better = gains.better(best, place, place)
        if _is_certain(better):
            own, other = gains.whole[place][place].mean, gains.whole[best][place].mean
            yield Finding(
                "warning", recipe.experts[place].name,
                f"the base model, which is its expert, is not the best on its text: {recipe.names[best]} is better",
                f"loss {own:.3f}, {recipe.names[best]} {other:.3f}",
                "give it an expert of its own, or leave it out: the router would send its text to the worse model",
            )  # fmt: skip


def of_words(recipe: Recipe, words: Words) -> Iterator[Finding]:
    """Domains whose texts can hardly be told apart."""
    for first, second in combinations(words.domains, 2):
        confusion = words.confusion(first, second)
        if confusion >= _SAME_TEXT:
            yield Finding(
                "warning", f"{recipe.names[first]}, {recipe.names[second]}", "their texts are nearly the same",
                f"{confusion:.0%} of their tokens are taken for the other's by n-grams (50% is one text)",
                "no router can tell them apart by their words: make one domain of them, or give text that differs",
            )  # fmt: skip


def has_gain(gain: Estimate) -> bool:
    """Whether an expert is better than the base at all."""
    return gain.value > SMALLEST_GAIN


def helps(gains: Gains | None, place: int) -> bool:
    """Whether an expert is better than the base on its own text, as far as that is known."""
    return gains is None or place not in gains.parts or has_gain(gains.gain(place, place))


def said(figure: Estimate, digits: int = 3) -> str:
    """A figure with its standard error."""
    return f"{figure.value:.{digits}f}" + ("" if figure.error is None else f" ± {figure.error:.{digits}f}")


def _is_certain(better: Estimate) -> bool:
    return better.value > max(SMALLEST_GAIN, 2 * (better.error or 0.0))
