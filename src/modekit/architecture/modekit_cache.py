"""The key-value cache of a mixture: the routers' running averages, and the common expert's half, go where its sequences go."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


class CarriesRouterStates:
    """Mixed into the class of a key-value cache: the routers' running averages go wherever its sequences go.

    They are no layer of the cache, since transformers looks through its layers for lengths and masks.
    """

    router_states: dict[str, torch.Tensor]
    of_modules: dict[tuple[int, int], Any]
    """Layer and number of an expert's module -> what that keeps of the text, where it keeps something (modekit_any.py)."""
    streams = 1
    """How often every sequence stands in the cache (modeling_modekit.py)."""

    def _places(self, sequences: torch.Tensor) -> torch.Tensor:
        """Rows of the cache of some sequences."""
        if self.streams == 1:
            return sequences
        rows = next(layer.keys.shape[0] for layer in self.layers if getattr(layer, "keys", None) is not None)  # type: ignore[attr-defined]
        return torch.cat([sequences, sequences + rows // 2])

    def _change(self, rule: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.router_states = {place: rule(state) for place, state in self.router_states.items()}

    def _in_all(self, change: str, argument: Any) -> None:
        """Change the cache itself, and what modules beside the first keep."""
        getattr(super(), change)(argument)
        for (_, number), layer in self.of_modules.items():
            if number and layer is not None:
                getattr(layer, change)(argument)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Take the sequences in another order (beam search)."""
        self._in_all("reorder_cache", self._places(beam_idx))
        self._change(lambda state: state.index_select(0, beam_idx.to(state.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        self._in_all("batch_repeat_interleave", repeats)
        self._change(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some sequences."""
        self._in_all("batch_select_indices", self._places(indices))
        self._change(lambda state: state[indices.to(state.device)])

    def reset(self) -> None:
        """Forget everything."""
        super().reset()  # type: ignore[misc]
        self.router_states = {}
        self.of_modules = {}

    def crop(self, tokens: int) -> None:
        """Take tokens back from the keys and values. An average cannot take them back: what it held is forgotten, and
        a pass that would go on from here is refused.
        """
        self._in_all("crop", tokens)
        if tokens:  # generate crops by 0 after every token, and the last one when all is done
            self.router_states = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled and copied as the class of cache that it was, and what it carries."""
        return _carrying, (self.__class__.__mro__[2], self.__dict__)


@functools.cache
def carrier(cache_class: Any) -> Any:
    """The class of a cache, with the routers' averages."""
    return type(cache_class.__name__, (CarriesRouterStates, cache_class), {"__module__": __name__})


def remembering(cache: object) -> CarriesRouterStates:
    """The cache itself, which from now on carries what a mixture keeps."""
    if not isinstance(cache, CarriesRouterStates):
        dense: Any = cache.__class__
        cache.__class__ = carrier(dense)
        cache.__dict__ |= {"router_states": {}, "of_modules": {}}
    assert isinstance(cache, CarriesRouterStates)
    return cache


def _carrying(cache_class: Any, members: dict[str, Any]) -> Any:
    cache = object.__new__(carrier(cache_class))
    cache.__dict__.update(members)
    return cache
