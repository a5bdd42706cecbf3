"""A place in a class that no row of modekit's table describes: a module that may be called with anything, in any layout.

A module of one tensor is brought into the layout of `Mixed`, (B, S, ...). Whatever else is called, such as a whole mixture
of experts, attention with tensors of its own, or a recurrence, runs once for every expert with weight, and the sum is taken:

    y = sum_e g_e E_e(arguments)

An expert alone is called as its own model would call it.

Shape legend: B batch, S sequence, T = B S tokens, H heads, D width, E experts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.cache_utils import Cache

from .modekit_cache import remembering
from .modekit_mixed import Mixed


class MixedAny(Mixed):
    """A place whose module takes any arguments."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns; of an expert alone what its own module does."""
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)] or [self.weight]
        flow = self.flow
        shape_BS = flow.shape_BS
        plain = len(given) == len(args) + len(kwargs) == 1 and not any(True for _ in self._dense.children())
        layout = self._layout(given[0]) if plain else None
        if flow.alone is not None:
            if self.router is not None:
                self._decided(given[0])
            return self._of_one(flow.alone, args, kwargs)
        if layout == "flat" and shape_BS is not None:
            y = super().forward(given[0].view(*shape_BS, -1))
            return y.flatten(0, 1)
        if layout is not None:
            return super().forward(given[0])
        return self._sum_of_all(args, kwargs, self._decided(given[0]))

    def __getattr__(self, name: str) -> Any:
        """What code around the place asks of its module."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base", "experts"):
                raise
            return getattr(self._dense, name)

    def _layout(self, x: torch.Tensor) -> str | None:
        """How x counts tokens; None where `Mixed` cannot read it."""
        if self.flow.shape_BS is None:
            return None
        batch, length = self.flow.shape_BS
        counts = x.ndim > self.sequence_axis and x.shape[0] == batch
        if counts and (self.is_head or x.shape[self.sequence_axis] in (length, 1)):
            return "tokens"
        return "flat" if x.ndim == 2 and x.is_floating_point() and x.shape[0] == batch * length else None

    def _of_one(self, expert: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        y = self._module_of(expert)(*args, **kwargs)
        if self.ranks[expert] or expert in self.few_bits:
            x = args[0] if args else next(iter(kwargs.values()))
            y = self._plus_one(y, x, expert)
        if expert in self.few_bits:
            y = y + self.differences[self.few_bits.index(expert)](x, y.dtype)
        if expert in self.biased:
            y = y + self.lora_bias[self.biased.index(expert)].to(y.dtype) * self.scales[expert]
        return y

    def _sum_of_all(self, args: tuple[Any, ...], kwargs: dict[str, Any], weights: torch.Tensor) -> Any:
        """Every expert's own module, each with a memory of its own, and the base's with what they leave over."""
        parts = self._parts(weights)
        cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
        total: Any = None
        for number, (module, weight) in enumerate(parts):
            if cache is None and not bool(weight.any()) and (total is not None or number + 1 < len(parts)):
                continue
            layers = (getattr(each, "layer_idx", None) for each in module.modules())
            with _memory(cache, next((each for each in layers if each is not None), None), number):
                y = module(*args, **kwargs)
            total = self._added(total, y, weight)
        return total

    def _added(self, total: Any, y: Any, weight: torch.Tensor) -> Any:
        """What comes out, times its weight, on top of the rest; of several outputs the first is the sum, others the last's."""
        if isinstance(y, tuple):
            return (self._added(None if total is None else total[0], y[0], weight), *y[1:])
        scaled = self._weighted_by(y, weight)
        return scaled if total is None else total + scaled

    def _weighted_by(self, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Times a weight per token (B, S), or (B, 1), for y in any layout."""
        shape_BS = self.flow.shape_BS
        assert shape_BS is not None
        weight = weight.to(y.dtype)
        if y.ndim == 2 and y.shape[0] == shape_BS[0] * shape_BS[1]:
            return y * weight.expand(shape_BS).flatten()[:, None]
        if y.ndim == 2 and y.shape[0] == shape_BS[0] and not self._reads_ids:  # what one token says of its sequence
            return y * weight[:, :1]
        y = y[None] if y.ndim == 2 and y.shape[0] == shape_BS[1] else y  # positions, the same of all sequences
        return y * weight[:, -y.shape[1] :].reshape(len(weight), -1, *[1] * (y.ndim - 2))


@contextmanager
def _memory(cache: Cache | None, layer: int | None, number: int) -> Iterator[None]:
    """While open, a layer of the cache is that of the module `number` of a place; the first has the cache's own."""
    if cache is None or layer is None:
        yield
        return
    kept = remembering(cache).of_modules
    if number == 0:
        if (layer, 0) not in kept:
            kept[layer, 0] = copy.deepcopy(cache.layers[layer]) if layer < len(cache.layers) else None
        yield
        return
    if layer >= len(cache.layers):  # nothing is kept here
        yield
        return
    first = cache.layers[layer]
    cache.layers[layer] = kept.get((layer, number)) or copy.deepcopy(kept[layer, 0]) or type(first)()
    try:
        yield
    finally:
        kept[layer, number], cache.layers[layer] = cache.layers[layer], first
