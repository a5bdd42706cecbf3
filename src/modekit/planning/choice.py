"""The form of a result where a recipe leaves it open: a plain checkpoint wherever it carries what the experts know.

Of adapters of small rank a plain checkpoint carries all, and sizes decide. Of full models it carries the largest part: how much
is measured at a build (building/lost.py), which takes the modekit architecture where too little is left of an expert. The same
recipe takes the same form on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from modekit.files.figures import bytes_of
from modekit.planning.changes import Changed, is_gone
from modekit.planning.plan import Plan
from modekit.recipes.recipe import Recipe
from modekit.sources.source import ModelSource

MOST_LOST = 0.05
"""Of what an expert changes: a plain checkpoint that loses more of one is not taken."""
LARGE, MANY_TIMES = 8 * 10**9, 2.5
"""Bytes, and times the modekit architecture's: a plain checkpoint that takes more than both is not taken."""
ANYWAY = "--format plain, or format: plain in a recipe, builds it anyway"


def choose_form(plain: Plan, other: Plan) -> Plan:
    """Of a plan in each form that which is built, with `otherwise` where the build must measure first."""
    channels, size, other_size = plain.shape.channels, plain.bytes_written, other.bytes_written
    if size > max(LARGE, MANY_TIMES * other_size):
        why = f"a plain checkpoint would take {bytes_of(size)} in place of {bytes_of(other_size)}; {ANYWAY}"
        return replace(other, why=why)
    sizes = f"{bytes_of(size)}; {bytes_of(other_size)} in the modekit architecture"
    if channels is None or channels.carry is None or channels.carry.is_exact:
        return replace(plain, why=f"{plain.why} ({sizes})")
    measured = f"a plain checkpoint, if the build finds that it keeps {1 - MOST_LOST:.0%} of every expert ({sizes})"
    return replace(plain, why=measured, otherwise=other)


def whole_models(recipe: Recipe, sources: Sequence[ModelSource], changed: Changed) -> int:
    """How many experts are full models that differ from the base in more than their FFNs; 0 where the recipe says what becomes
    of that. `sources` begin with the base. Of a model that is gone, the recipe of its mixture says `carry: all` then.
    """
    if "modules" in recipe.mixture.model_fields_set or recipe.output.carry == "ffn":
        return 0
    full = [source for expert, source in zip(recipe.experts, sources[1:], strict=True) if expert.is_whole]
    return sum(recipe.output.carry is not None if is_gone(each) else changed(each) == "more" for each in full)


def why_modekit(recipe: Recipe) -> str | None:
    """Why a recipe that does not ask for a native architecture gets none; None where it may."""
    if recipe.output.format == "plain":
        return None
    adapters = [expert.name for expert in recipe.experts if expert.adapter is not None or expert.lora_rank is not None]
    bits = [expert.name for expert in recipe.experts if expert.bits is not None]
    if recipe.output.format == "modekit":
        return "the recipe asks for the modekit architecture"
    if beyond := recipe.beyond_plain():
        return f"only the modekit architecture has {', '.join(beyond)}"
    if adapters:
        does = "carries them in a plain checkpoint" if recipe.mixture.is_carried else "folds their FFNs into whole experts"
        return f"adapters stay low-rank ({', '.join(adapters)}); output: {{format: plain}} {does}"
    return f"differences stay in a few bits per number ({', '.join(bits)})" if bits else None
