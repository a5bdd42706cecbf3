"""Layers by name: 3 in a decoder alone, encoder.3 or decoder.3 in a model that has both; and what a recipe says of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated

from pydantic import AfterValidator

from modekit.errors import RecipeError

Layer = int | str
"""A number; of a model with an encoder `encoder.` or `decoder.` and a number."""
STACKS = ("encoder", "decoder")
_ENTRY = re.compile(r"(?:(encoder|decoder)(?:\.|$))?(?:(\d+)(?:-(\d+))?)?", re.ASCII)
_EXPECTED = "numbers or ranges such as '4-11', of a model with an encoder 'encoder', 'encoder.4' or 'decoder.4-11'"


def layer_at(stack: str, number: int) -> Layer:
    """The name of a stack's layer; the stack of a decoder alone has no name."""
    return f"{stack}.{number}" if stack else number


def stack_of(layer: Layer) -> tuple[str, int]:
    """encoder.3 -> encoder, 3; 3 -> no name, 3."""
    if isinstance(layer, int):
        return "", layer
    stack, _, number = layer.partition(".")
    return stack, int(number)


def order_of(layer: Layer) -> tuple[int, int]:
    """Sorts layers as they run: an encoder's before a decoder's."""
    stack, number = stack_of(layer)
    return (STACKS.index(stack) if stack else 0), number


def named_layers(said: Sequence[int | str] | None, sizes: Mapping[str, int], where: str = "mixture.layers") -> list[Layer]:
    """The layers that a recipe means, all without a word of it, in the order in which they run.

    `sizes`: stack -> number of its layers. Raises RecipeError, with the key `where`, for one that does not exist.
    """
    if said is None:
        return [layer_at(stack, number) for stack, count in sizes.items() for number in range(count)]
    found: dict[Layer, None] = {}
    for entry in said:
        found.update(dict.fromkeys(_meant(entry, sizes, where)))
    return sorted(found, key=order_of)


def _meant(entry: int | str, sizes: Mapping[str, int], where: str) -> Iterator[Layer]:
    stack, first, last = _parsed(entry)
    size = sizes.get(stack, 0)
    last = size - 1 if last is None else last
    if last >= size:
        raise RecipeError(
            "there is no such layer" if stack or "" in sizes else "this names neither the encoder nor the decoder",
            where=where,
            found=entry,
            expected=", ".join(
                f"{name}.0 to {name}.{count - 1}" if name else f"0 to {count - 1}" for name, count in sizes.items()
            ),
            remedy="correct the layers",
        )
    yield from (layer_at(stack, number) for number in range(first, last + 1))


def _parsed(entry: int | str) -> tuple[str, int, int | None]:
    """Stack, first and last layer of an entry; None for the stack's last. Raises ValueError."""
    match = _ENTRY.fullmatch(str(entry))
    stack, first, last = match.groups() if match is not None else (None, None, None)
    if (stack is None and first is None) or (last is not None and int(last) < int(first or 0)):
        raise ValueError(f"must be {_EXPECTED}")
    if first is None:
        return stack or "", 0, None
    return stack or "", int(first), int(last if last is not None else first)


def _said_well(entry: int | str) -> int | str:
    _parsed(entry)
    return entry


Layers = list[Annotated[int | str, AfterValidator(_said_well)]]
"""As a recipe says them: numbers, ranges, stacks."""
