"""The two shapes of result as their headers say them, which a plan and a checkpoint ask without knowing which they have.

A new shape is a class with the members of these two, whose names and meanings are one, and a row here.
"""

from __future__ import annotations

from modekit.planning.carry import CarrySize
from modekit.planning.modekit_shape import ModekitShape
from modekit.planning.native_shape import NativeShape
from modekit.recipes.recipe import Recipe
from modekit.sources.config import Config

Shape = NativeShape | ModekitShape


def open_shape(
    config: Config, recipe: Recipe, where: str, native_type: str | None, dense: Config, carry: CarrySize | None
) -> Shape:
    """The shape of a checkpoint by its config.json and by what its record says.

    `native_type` and `carry` are the record's, `dense` the base's config as it keeps it. Raises CheckpointError.
    """
    if native_type is None:
        return ModekitShape.opened(config, recipe, where)
    return NativeShape.opened(config, recipe, where, native_type, dense, carry)
