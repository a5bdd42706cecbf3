"""The native MoE architecture that says a family's mixture of whole FFN experts exactly: one row of data each.

A row names where the native architecture keeps experts and router, and how its config follows from the dense one.
`choose_native` returns the first row of a family whose rules all hold, or every reason why none does. A new pair is a
new row; the oracle tests in tests/sources/test_families.py run over `NATIVES`.

What makes a row exact is written in its rules and `fixed` settings: the native block must renormalise the weights of
the chosen experts to one, attention, norms and rotary embedding must be the same code, and every default that differs
between the two configs must be written out.
"""

from __future__ import annotations

from modekit.recipes.recipe import Recipe
from modekit.sources.family import Config, Family
from modekit.sources.native_own import IN_THEIR_OWN
from modekit.sources.native_row import Native
from modekit.sources.native_shared import IN_SHARED

NATIVES: tuple[Native, ...] = (*IN_SHARED, *IN_THEIR_OWN)


def choose_native(family: Family, config: Config, recipe: Recipe | None = None) -> tuple[Native | None, list[str]]:
    """The first row that says a mixture of this dense config exactly, or None and the reason of every row tried.

    Without a recipe, of some mixture.
    """
    tried = []
    for row in NATIVES:
        if row.family.model_type == family.model_type and row.family.is_variant(config):
            refusals = row.refusals(config) or ([] if recipe is None else row.beyond(recipe))
            if not refusals:
                return row, []
            tried.append(f"{row.native_type}: {'; '.join(refusals)}")
    reason = _WITHOUT_PARTNER.get(family.model_type, "nobody has written one")
    return None, tried or [f"no native architecture says a mixture of '{family.model_type}': {reason}"]


def leaves_out(config: Config) -> bool:
    """Whether a native config is one whose tensors without a number are left out, so that transformers misses them."""
    return any(
        row.native_type == config.get("model_type")
        and row.empty_names(1)
        and all(config.get(key) == value for key, value in row.fixed.items() if value == 0 and value is not False)
        for row in NATIVES
    )


def native_of(native_type: str, model_type: str) -> Native:
    """The row of a finished checkpoint. Raises StopIteration when there is none."""
    return next(row for row in NATIVES if (row.native_type, row.family.model_type) == (native_type, model_type))


_WITHOUT_PARTNER = {
    "m2m_100": "NLLB-MoE in transformers runs no more than its first two experts",
    "t5": "Switch Transformers multiply what an expert says by its router's probability, which is never 1",
    "gemma": "GeGLU experts",
    "gemma2": "GeGLU experts and sandwich norms",
    "gemma3_text": "GeGLU experts and sandwich norms",
    "gemma4_text": "GeGLU experts and sandwich norms",
    "ministral3": "queries that grow with their position",
    "olmo3": "a window that differs between layers",
    "exaone4": "norms after the block",
    "glm4": "four norms per layer and interleaved partial rotary embedding",
    "starcoder2": "an FFN without a gate",
}
