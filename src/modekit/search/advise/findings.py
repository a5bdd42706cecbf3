"""Numbers -> findings: equal and near-equal experts, experts without a gain, domains that are one text."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import combinations

from pydantic import JsonValue

from modekit.recipes.recipe import Recipe
from modekit.search.advise.drift import Drift
from modekit.search.advise.gains import BASE_INDEX, PARTS, SMALLEST_GAIN, Gains, has_gain
from modekit.search.advise.result import Facts, Figure, Finding
from modekit.search.advise.rules import carries
from modekit.search.advise.text import Confusion

_EQUAL = 1e-6  # relative distance: rounding of sums
NEAR_COSINE = 0.95
"""Of two differences from the base: above it, two experts are nearly one."""
_UNMIXED = 0.01  # of the squared difference: less is rounding in the tables
WORDS_DIFFER = 0.9
"""Share of tokens whose domain an n-gram table must name to be the router; on the demo it names 0.97 and closes 0.98."""
_SAME_TEXT = 0.25  # of the tokens given to one of two domains, given to the wrong one; 0.5 is the same text


def of_files(recipe: Recipe, drift: Drift, usable: Sequence[int]) -> Iterator[Finding]:
    """What the weights alone say: damage, experts that are the base, or each other."""
    for index, expert in enumerate(recipe.experts):
        names = drift.damaged[index]
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            yield Finding(
                "error",
                expert.name,
                "its weights hold NaN or Inf",
                names[0] + more,
                "the model is damaged: save or download it again",
            )
    for index in usable:
        if not recipe.experts[index].is_base and not drift.moved[index]:
            yield Finding(
                "warning",
                recipe.experts[index].name,
                "it equals the base model, tensor for tensor",
                to_do="write model: base, which keeps its text's way back to the base, or leave it out",
            )
    for first, second in combinations([index for index in usable if drift.moved[index]], 2):
        cosine, distance = drift.cosine(first, second), drift.distance(first, second)
        if cosine is not None and cosine >= NEAR_COSINE:
            same = distance <= _EQUAL
            yield Finding(
                "warning",
                f"{recipe.names[first]}, {recipe.names[second]}",
                "they are the same model" if same else "they moved almost the same way from the base",
                f"cosine {cosine:.3f}, distance {distance:.3f} of the longer way",
                "keep one of them and give it both texts: two experts that do the same cost memory and bring nothing",
            )


def of_gains(recipe: Recipe, gains: Gains, moved: Collection[int]) -> Iterator[Finding]:
    """Experts that do not help on their own text, or less than another does. `moved` are those that differ from the base."""
    for index in gains.whole[BASE_INDEX]:
        if index in moved:
            yield from _of_gain(recipe.names[index], gains.gain(index, index))
        yield from _of_better(recipe, gains, moved, index)


def _of_gain(name: str, gain: Figure) -> Iterator[Finding]:
    if not has_gain(gain):
        yield Finding(
            "warning",
            name,
            "it is not better than the base model on its own text",
            f"{gain.said(3)} nats per token",
            "check that text and model belong together; else write model: base",
        )
    elif gain.error is not None and gain.value < 2 * gain.error:
        yield Finding(
            "note",
            name,
            "its gain is within what this much text can tell",
            f"{gain.said(3)} nats per token",
            "give more text, or more --tokens",
        )


def _of_better(recipe: Recipe, gains: Gains, moved: Collection[int], index: int) -> Iterator[Finding]:
    """Another expert that is better on the text of this one, which may be the base itself; and whether all others are."""
    rivals = [other for other in moved if other != index]
    if not rivals:
        return
    best = min(rivals, key=lambda other: gains.whole[other][index].mean)
    better = gains.better(best, index, index)
    is_certain = better.value > max(SMALLEST_GAIN, 2 * (better.error or 0.0))
    if not (is_certain and has_gain(gains.gain(best, index))):
        return
    others = [*rivals, *([BASE_INDEX] if index in moved else [])]
    is_worst = all(gains.whole[other][index].mean < gains.whole[index][index].mean for other in others)
    yield Finding(
        "warning",
        recipe.names[index],
        f"{recipe.names[best]} is better on its text than it is itself",
        f"{better.said(3)} nats per token" + ("; it is the worst of all there" if is_worst and len(others) > 1 else ""),
        "check that models and texts are not mixed up"
        if index in moved
        else f"give this text to {recipe.names[best]}, or train an expert on it: the base is for what no expert knows better",
    )


def of_unmixed(
    recipe: Recipe, drift: Drift, full: Sequence[int], mixture: Mapping[str, JsonValue], facts: Facts
) -> Iterator[Finding]:
    """What full models changed outside of what the advised mixture gives each expert of its own."""
    part = "all" if mixture.get("modules") == "all" else "ffn"
    shares = {index: 1 - sum(drift.share(index, group) for group in PARTS[part] if group in drift.groups) for index in full}
    shares = {index: share for index, share in shares.items() if share >= _UNMIXED}
    if not shares:
        return
    fate = "is averaged with that of the others" if mixture.get("backbone") == "average" else "stays behind"
    said_shares = ", ".join(f"{recipe.names[index]} {share:.0%}" for index, share in shares.items())
    yield Finding(
        "note" if carries(facts, part) else "warning",
        ", ".join(recipe.names[index] for index in shares),
        f"what changed outside of the parts that are mixed {fate}",
        f"{said_shares} of the squared difference from the base",
        "`modekit train` lets the backbone learn it" + ("" if facts.native else "; modules: all leaves nothing behind"),
    )


def of_confusion(recipe: Recipe, confusion: Confusion) -> Iterator[Finding]:
    """Domains whose texts can hardly be distinguished, and routers that read more than words where words tell little."""
    if confusion.accuracy < WORDS_DIFFER:
        yield Finding(
            "note",
            ", ".join(recipe.names[index] for index in confusion.domains),
            "words alone tell little of their domains",
            f"n-grams name the domain of {confusion.accuracy:.2f} of its held-out tokens, mean over the domains",
            "compare router: {fit: logistic, granularity: context}, which reads hidden states (benchmarks/routers.md: 0.90)",
        )
    for first, second in combinations(confusion.domains, 2):
        mistaken = confusion.between(first, second)
        if mistaken >= _SAME_TEXT:
            yield Finding(
                "warning",
                f"{recipe.names[first]}, {recipe.names[second]}",
                "their texts are nearly the same",
                f"{mistaken:.0%} of their tokens are taken for the other's by n-grams (50% is one text)",
                "no router can tell them apart by their words: make one domain of them, or give text that differs",
            )
