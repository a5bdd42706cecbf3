"""The table of shapes: which one a finished checkpoint has. A new shape is a file beside these two and a row here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modekit.planning.modekit_shape import ModekitShape
from modekit.planning.native_shape import NativeShape
from modekit.planning.shape import Shape
from modekit.recipes.recipe import Recipe

SHAPES: tuple[type[Shape], ...] = (NativeShape, ModekitShape)


def open_shape(
    config: Mapping[str, Any], recipe: Recipe, where: str, native_type: str | None, dense: Mapping[str, Any]
) -> Shape:
    """The shape of a checkpoint by its config.json and by what its record says.

    `native_type` is the record's, `dense` the base's config as it keeps it. Raises CheckpointError.
    """
    shape = next(shape for shape in SHAPES if shape.is_said_by(native_type))
    return shape.opened(config, recipe, where, native_type, dense)
